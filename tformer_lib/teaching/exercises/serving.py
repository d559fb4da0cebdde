"""The exercises of the serving chapter."""

import random

from tformer_lib.serving import overlap
from tformer_lib.teaching.exercises.engine import exercise, in_digits, require, require_integer, require_number


@exercise(
    "serving.decode_bound",
    title="The bound of a decode step",
    hints=(
        "A step writes one token a row. Which bytes must it read once, whatever the number of rows?",
        "All weights once, and the keys and values of every row: rows * context * bytes per token.",
        "rows * bandwidth / (weights + rows * context * per_token)",
    ),
)
def check_decode_bound(fn):
    cases = (
        ((1, 0, 10, 100, 1000), 10.0, "one row without a past"),
        ((4, 5, 10, 100, 1000), 4 * 1000 / 300, "four rows with five tokens each"),
        ((4, 0, 10, 100, 1000), 40.0, "four rows without a past share one reading of the weights"),
        ((150, 850, 32_768, 2_470_000_000, 4.3e12), 97_022.8, "150 rows of a 1B model on an H200"),
    )
    for arguments, expected, name in cases:
        found = require_number(fn(*arguments), f"{name}: the tokens a second")
        close = abs(found - expected) < 1e-4 * expected
        if not close and abs(found - expected / arguments[0]) < 1e-4 * expected:
            require(False, f"{name}: {found:,.1f} are the steps a second; each step writes a token in every row")
        mine, right = in_digits(found, expected, ",.1f")
        require(close, f"{name}: {mine} tokens a second, expected {right}")


@exercise(
    "serving.admit",
    title="Who may join?",
    hints=(
        "Go through those that wait in their order. How many blocks does a prompt of n tokens take?",
        "-(-n // block_size), rounded up. Stop at the first that does not fit: who came later must not pass it.",
        "Stop when `max_num_seqs` run. Keep `spare` blocks free for each request that runs, the new ones included.",
    ),
)
def check_admit(fn):
    generator = random.Random(0)
    fixed = [
        ([5, 5, 5], 0, 9, 9, 4, 0),
        ([100, 4], 0, 9, 9, 4, 0),
        ([4, 4, 4], 3, 4, 9, 4, 0),
        ([4, 4, 4], 2, 9, 5, 4, 1),
    ]
    drawn = [
        ([generator.randint(1, 40) for _ in range(6)], generator.randint(0, 3), 6, generator.randint(0, 30), 8, spare)
        for spare in (0, 1, 2)
        for _ in range(20)
    ]
    for waiting, running, max_num_seqs, free, block_size, spare in fixed + drawn:
        found, expected = fn(list(waiting), running, max_num_seqs, free, block_size, spare), 0
        while expected < len(waiting) and running + expected < max_num_seqs:
            needed = -(-waiting[expected] // block_size)
            left = free - sum(-(-n // block_size) for n in waiting[:expected])
            if needed > left - spare * (running + expected):
                break
            expected += 1
        case = f"prompts {waiting}, {running} of {max_num_seqs} batch slots taken, "
        case += f"{free} free blocks of {block_size}, spare {spare}"
        found = require_integer(found, "how many of those that wait may join")
        require(found <= len(waiting), f"{case}: {found} join, but only {len(waiting)} wait")
        if found > expected and running + found > max_num_seqs:
            require(False, f"{case}: {found} join, and {running + found - max_num_seqs} of them have no batch slot")
        needed = [-(-tokens // block_size) for tokens in waiting]
        require(
            found <= expected
            or expected + 1 == len(waiting)
            or found != passing(needed, running, max_num_seqs, free, spare),
            f"{case}: prompt {expected} does not fit, and nobody passes it: {expected} join, and you let in {found}",
        )
        require(found <= expected, f"{case}: {found} join, the blocks suffice for {expected}: they take {needed}")
        require(found == expected, f"{case}: {found} join, and there was room for {expected}")


def passing(needed: list[int], running: int, max_num_seqs: int, free: int, spare: int) -> int:
    """How many join if small prompts pass those that do not fit."""
    joined = 0
    for blocks in needed:
        if running + joined < max_num_seqs and blocks <= free - spare * (running + joined):
            free, joined = free - blocks, joined + 1
    return joined


@exercise(
    "serving.chunk",
    title="A step under a budget",
    hints=(
        "Rows that write come first, one token each: what is left of the budget?",
        "Give it to the prompts in their order: each gets what it still lacks, or all that is left.",
        "count = min(lacking, left); left -= count, for each prompt.",
    ),
)
def check_chunk(fn):
    cases = (
        (0, [10], 4, [4]),
        (3, [10, 5], 8, [5, 0]),
        (3, [2, 5], 8, [2, 3]),
        (0, [4, 4], 8, [4, 4]),
        (8, [3], 8, [0]),
        (2, [1, 1, 1, 9], 8, [1, 1, 1, 3]),
        (0, [3, 1, 9], 8, [3, 1, 4]),
        (5, [], 8, []),
    )
    for writing, lacking, budget, expected in cases:
        given = list(lacking)
        found = list(fn(writing, given, budget))
        case = f"{writing} rows write, prompts lack {lacking}, budget {budget}"
        require(len(found) == len(expected), f"{case}: one number a prompt was expected, got {found}")
        require(min(found, default=0) >= 0, f"{case}: {found}: no prompt can get less than nothing")
        spent = writing + sum(found)
        require(spent <= budget, f"{case}: {found} and {writing} that write are {spent} tokens, over the budget")
        require(found == expected, f"{case}: got {found}, expected {expected}")
        require(given == lacking, "the list that came in was changed")


@exercise(
    "serving.certain",
    title="How much can be shown?",
    hints=(
        "What may not be shown yet is an end of the text with which a stop string could begin.",
        "Look for the longest end of the text that is a beginning of the stop string.",
        "Try sizes from min(len(text), len(stop) - 1) down to 1: if text.endswith(stop[:size]), hold those back.",
    ),
)
def check_certain(fn):
    cases = ["the end", "THE E", "a", "", "aaa", "abab", "THE THE EN", "x.\n", "\n\n", "so: THE END OF"]
    for text in cases:
        for stop in ("THE END", "abac", "\n\n", "aaaa", "x", "THE END OF IT"):
            if stop in text:
                continue
            found, expected = fn(text, stop), len(text) - overlap(text, stop)
            case = f"text {text!r}, stop string {stop!r}"
            found = require_integer(found, "how many characters are certain")
            if found > expected:
                begun = text[expected:]
                require(False, f"{case}: {found} characters are shown, but {begun!r} may begin the stop string")
            require(found == expected, f"{case}: {text[:found]!r} is shown, and {text[:expected]!r} is certain")


@exercise(
    "serving.next_request",
    title="Priorities under which nobody starves",
    hints=(
        "Among those that wait, take the highest priority; among equals, the one that came first.",
        "A request of low priority must come to its turn in the end: let its priority grow while it waits.",
        "max(range(len(waiting)), key=lambda i: (waiting[i][1] + (now - waiting[i][0]) // patience, -waiting[i][0]))",
    ),
)
def check_next_request(fn):
    simple = [
        ([(0, 0), (1, 2), (2, 1)], 1, "the highest priority goes first"),
        ([(3, 1), (1, 1), (2, 1)], 1, "among equals, the one that came first"),
        ([(0, 5)], 0, "the only one"),
    ]
    for waiting, expected, why in simple:
        found = fn(list(waiting), 4, 10)
        require(found in range(len(waiting)), f"return a place in the list, 0 to {len(waiting) - 1}, got {found!r}")
        require(found == expected, f"waiting (arrival, priority) {waiting}: place {found} was taken, {why}: {expected}")
    for patience in (10, 5):
        check_patience(fn, patience)
    draw = random.Random(2)
    for _ in range(60):
        now, patience = 100, draw.choice((5, 10, 20))
        waiting = [(draw.randint(0, now), draw.randint(0, 6)) for _ in range(draw.randint(1, 6))]
        check_choice(fn, waiting, now, patience)


def check_choice(fn, waiting: list[tuple[int, int]], now: int, patience: int) -> None:
    """Fail unless the most important goes first, where each ``patience`` steps of waiting count as one priority.

    Whether a part of them counts for a part is left open, and so is the order of those who come level by it.
    """
    by_step = [(priority + (now - arrival) // patience, -arrival) for arrival, priority in waiting]
    by_part = [(priority + (now - arrival) / patience, -arrival) for arrival, priority in waiting]
    right = {max(range(len(waiting)), key=worth.__getitem__) for worth in (by_step, by_part)}
    found = fn(list(waiting), now, patience)
    require(found in range(len(waiting)), f"return a place in the list, 0 to {len(waiting) - 1}, got {found!r}")
    taken, worth = waiting[found], [round(worth, 2) for worth, _ in by_part]
    same = any(waiting[place] == taken for place in right)
    require(
        same,
        f"at step {now} with a patience of {patience}, of (arrival, priority) {waiting} place {found} was taken; with "
        f"the waiting, the priorities are {worth}",
    )


def check_patience(fn, patience: int) -> None:
    """Fail if an unimportant request starves, or is served before its time, beside an important one at every step."""
    waiting, served = [(0, 0)], None
    for now in range(1, 400):  # a new important request at every step, one place a step
        waiting.append((now, 3))
        taken = waiting.pop(fn(list(waiting), now, patience))
        if taken == (0, 0):
            served = now
            break
    starves = "with an important request at every step, the unimportant one waited 400 steps: it starves"
    require(served is not None, starves)
    early = f"went first at step {served}, before its patience of {patience} steps was over"
    require(served >= patience, f"the unimportant request {early}")
    enough = f"{4 * patience} are enough for 3 priorities at {patience} steps each"
    require(served <= 5 * patience, f"the unimportant request waited {served} steps; {enough}")
