"""The exercises of the paged attention chapter."""

import random
from collections import OrderedDict

import torch

from tformer_lib.contract import counted
from tformer_lib.teaching.exercises.engine import exercise, require, require_close, require_integer, require_shape
from tformer_lib.teaching.exercises.tokens import count_lines


@exercise(
    "paged_attention.slots",
    title="From a position to a slot",
    hints=(
        "Which entry of the table does position p need, and which place inside that block?",
        "Entry p // block_size, place p % block_size: the same division twice.",
        "block_table[p // block_size] * block_size + p % block_size",
    ),
)
def check_slots(fn):
    for table, size in (([7, 2, 5], 4), ([3], 16), ([9, 0, 4, 1], 1)):
        for start, stop in ((0, 3), (2, 6), (5, 12), (0, 0)):
            start, stop = min(start, len(table) * size), min(stop, len(table) * size)
            found = list(fn(table, size, start, stop))
            require(
                len(found) == stop - start, f"positions {start} to {stop - 1} are {stop - start}, you gave {len(found)}"
            )
            for p, slot in zip(range(start, stop), found, strict=True):
                expected = table[p // size] * size + p % size
                place = f"position {p} of table {table} with blocks of {size}"
                slot = require_integer(slot, f"{place}: the slot")
                require(slot != p or p == expected, f"{place}: slot {p} ignores the table")
                require(slot == expected, f"{place} is in slot {expected}, you say {slot}")


@exercise(
    "paged_attention.append",
    title="Append with copy on write",
    hints=(
        "There are three cases. When is the next slot in a block that the sequence does not have yet?",
        "At length % size == 0 a new block is needed and nothing is copied. Else look at who holds the last block.",
        "If holders[last] > 1: take a block, count it 1, take 1 off the old one, replace it, return the pair.",
    ),
    in_place=True,
)
def check_append(fn):
    cases = [(length, shared, 4) for length, shared in ((0, False), (4, False), (3, False), (6, True), (8, True))]
    for length, shared, size in (*cases, (5, False, 4), (4, True, 3), (6, False, 3), (8, True, 3), (4, False, 8)):
        blocks = [5, 2, 7][: -(-length // size)]
        holders = [0] * 8
        for block in blocks:
            holders[block] = (3 if length == 6 else 2) if shared else 1
        empty = [b for b in range(8) if holders[b] == 0]
        before = list(blocks), list(holders), len(empty)
        copies = fn(blocks, length, holders, empty, size)
        judge_append(before, blocks, length, holders, empty, copies, shared, size)


def judge_append(before, blocks, length, holders, empty, copies, shared, size) -> None:
    """Hold what is there after an append against what was there before it."""
    old_blocks, old_holders, old_empty = before
    state = f"length {length}, blocks {old_blocks}, {'shared' if shared else 'held by this sequence alone'}"
    state += "" if size == 4 else f", {size} tokens in a block"
    full = length % size == 0
    copied = [tuple(pair) for pair in copies] if copies is not None else None
    require(copied is not None, f"{state}: return the list of copies, an empty one where there is none")
    taken = old_empty - len(empty)
    wanted = int(full or shared)
    require(taken == wanted, f"{state}: blocks taken from the empty ones: {taken}, expected {wanted}")
    if full:
        grown = len(blocks) == len(old_blocks) + 1
        require(grown, f"{state}: the new block must go into `blocks` itself, which holds {blocks} afterwards")
        require(copied == [], f"{state}: the next token starts a block, so nothing is copied, and you copy {copied}")
        require(blocks[:-1] == old_blocks, f"{state}: the blocks before must stay, and they are {blocks}")
    elif shared:
        require(len(copied) == 1, f"{state}: others read the last block, so it is copied first; your copies: {copied}")
        require(copied[0] == (old_blocks[-1], blocks[-1]), f"{state}: the copy goes from the old block to the new one")
        require(blocks[:-1] == old_blocks[:-1], f"{state}: only the last block is replaced, and they are {blocks}")
        require(blocks[-1] != old_blocks[-1], f"{state}: the last block is still the one that others read")
        left = holders[old_blocks[-1]]
        require(
            left == old_holders[old_blocks[-1]] - 1, f"{state}: the old block has lost one holder, and counts {left}"
        )
    else:
        require(blocks == old_blocks and copied == [], f"{state}: there is room, and nobody else reads it: no change")
    require(blocks[-1] not in empty, f"{state}: block {blocks[-1]} is in use and still among the empty ones")
    require(holders[blocks[-1]] == 1, f"{state}: block {blocks[-1]} has one holder, and counts {holders[blocks[-1]]}")


@exercise(
    "paged_attention.match",
    title="The longest cached beginning of a prompt",
    hints=(
        "Walk block by block. The key of a block is made from the key of the block before it.",
        "Stop at the first block that is not there. A key that is there proves nothing: compare the tokens too.",
        "Only blocks that end before the last token count: for start in range(0, len(tokens) - size, size).",
    ),
)
def check_match(fn):
    text = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    for size, lengths in ((2, (10, 9, 8, 3, 2, 1)), (4, (10, 9, 8, 5, 4))):
        for n in lengths:
            cached = chain(text, size, strong)
            found = list(fn(text[:n], cached, size, strong))
            expected = list(range((n - 1) // size))
            place = f"a prompt of {counted(n, 'token')} in blocks of {size}, all cached"
            require(len(found) < n / size, f"{place}: nothing is left to compute, so there are no logits")
            require(found == expected, f"{place}: blocks {found}, expected {expected}")
    holes = chain(text, 2, strong)
    del holes[chain_key(text[:4], 2, strong)]
    require(list(fn(text, holes, 2, strong)) == [0], "after a block that is missing, no later one may be used")
    other = [7, 7, *text[2:]]
    message = "the second block has the same tokens after a different beginning: its keys and values differ"
    require(list(fn(other, chain(text, 2, strong), 2, strong)) == [], message)
    message = "two beginnings with one key: a block with other tokens was taken. Compare the tokens"
    require(list(fn(other, chain(text, 2, weak), 2, weak)) == [], message)
    mixed = chain(text, 2, weak) | {weak(2, text[2:4]): (1, tuple(other[:4]))}
    message = "a block with the same tokens was taken, cached after another beginning: compare all tokens up to its end"
    require(list(fn(text, mixed, 2, weak))[:2] == [0], message)


def strong(parent, tokens):
    """A key that hardly ever collides."""
    return hash((parent, tuple(tokens)))


def weak(parent, tokens):
    """A key that knows only how long the beginning is."""
    return (parent or 0) + len(tokens)


def chain_key(tokens, size, key_of):
    """The key of the last block of these tokens."""
    key = None
    for start in range(0, len(tokens), size):
        key = key_of(key, tokens[start : start + size])
    return key


def chain(tokens, size, key_of):
    """{key: (block, all tokens up to its end)} for the full blocks of a text."""
    ends = range(size, len(tokens) + 1, size)
    return {chain_key(tokens[:end], size, key_of): (i, tuple(tokens[:end])) for i, end in enumerate(ends)}


@exercise(
    "paged_attention.combine",
    title="Merge the parts of a context",
    hints=(
        "Each part's output was divided by its own sum, whose logarithm is its lse. What undoes that?",
        "lse = logsumexp of the parts' lse; the weight of a part is exp(its lse - lse).",
        "Where all parts are empty, lse is -inf, and -inf - (-inf) is not a number: subtract 0 there.",
    ),
)
def check_combine(fn):
    check_combined(fn, count=4, empty=3, heads=5, d=8)
    check_combined(fn, count=3, empty=0, heads=7, d=6)
    scores, values = torch.randn(1, 9, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    wanted, wanted_lse = partial_attention(scores, values)
    answer = fn(wanted[None], wanted_lse[None])
    require_close(answer[0], wanted, "one head and one part: there is nothing to merge", name="the output of one head")
    require_close(answer[1], wanted_lse, "one head and one part: there is nothing to merge", name="its log-sum-exp")


def check_combined(fn, count: int, empty: int, heads: int, d: int) -> None:
    """Merge parts of ten keys, one of them empty; head 0 has large scores, and head 4 sees nothing."""
    scores = 3 * torch.randn(heads, 10 * count, dtype=torch.float64)  # (heads, keys)
    scores[:, 10 * empty : 10 * empty + 10] = -torch.inf
    scores[4] = -torch.inf
    scores[0] += 800  # exp of these overflows
    values = torch.randn(10 * count, d, dtype=torch.float64)
    parts = [partial_attention(s, v) for s, v in zip(scores.split(10, 1), values.split(10), strict=True)]
    outs, lses = (torch.stack(x) for x in zip(*parts, strict=True))
    wanted, wanted_lse = partial_attention(scores, values)
    answer = fn(outs.clone(), lses.clone())
    is_pair = isinstance(answer, tuple | list) and len(answer) == 2
    require(is_pair, "return two things: the output and its log-sum-exp")
    out, lse = answer
    require_shape(out, (heads, d), "the output")
    require_shape(lse, (heads,), "the log-sum-exp")
    require(not out[4].isnan().any(), "head 4 sees no key in any part: its output is NaN, and should be zeros")
    require(out[0].isfinite().all(), "head 0 has large scores: exp overflows, unless the largest lse is subtracted")
    plain = [head for head in range(heads) if head not in (0, 4)]
    require_close(out[plain], wanted[plain], "the output is not that of all keys at once", name="the output")
    require_close(out[[0, 4]], wanted[[0, 4]], "heads with large scores or with none go wrong", name="the output")
    plain.append(0)
    require_close(lse[plain], wanted_lse[plain], "lse is not that of all keys at once", name="the log-sum-exp")
    require(lse[4] < -1e9, f"head 4 sees no key: the logarithm of a sum of nothing is -inf, and yours is {lse[4]:.4g}")


def partial_attention(scores, values):
    """(heads, keys), (keys, d) -> the output (heads, d) over these keys alone and its log-sum-exp (heads,)."""
    lse = scores.logsumexp(-1)
    return torch.exp(scores - lse.clamp_min(-1e300)[:, None]) @ values, lse


@exercise(
    "paged_attention.lru",
    title="An allocator that remembers",
    hints=(
        "Three places for a block: empty, cached with a key, or in use. Which one does take() look at first?",
        "take() prefers empty blocks; else it evicts the cached block that was freed longest ago, and its key.",
        "An OrderedDict of key and block keeps the order: popitem(last=False) is the oldest. find() takes one out.",
    ),
)
def check_lru(fn):
    pool, model = fn(3), Model(3)
    for method in ("take", "free", "find"):
        require(hasattr(pool, method), f"the object that you return has no method {method}")
    story = [("take",), ("take",), ("take",), ("free", 0, "a"), ("free", 1, "b"), ("find", "a"), ("take",)]
    story += [("find", "b"), ("free", 0, "a"), ("take",), ("find", "a"), ("take",)]
    for step in story:
        play(pool, model, step)
    draw = random.Random(0)
    for blocks in (3, 5, 1):
        pool, model = fn(blocks), Model(blocks)
        for _ in range(300):
            play(pool, model, draw_step(draw, model))
    require_constant_time(fn)


class Model:
    """The right answer, spelled out."""

    def __init__(self, blocks):
        self.empty, self.cached, self.used = blocks, OrderedDict(), []


class Key(str):
    """A key that counts how often one is compared with another, or hashed to be looked up."""

    compared = hashed = 0

    def __eq__(self, other):
        Key.compared += 1
        return super().__eq__(other)

    def __hash__(self):
        Key.hashed += 1
        return super().__hash__()


def require_constant_time(fn) -> None:
    """Fail if a key is looked for among all the others, or the oldest among all."""
    pool = fn(400)
    blocks = [pool.take() for _ in range(400)]
    for block in blocks:
        pool.free(block, Key(f"key {block}"))
    oldest = next(block for block in blocks if block != 200)
    Key.compared = 0
    found = pool.find(Key("key 200"))
    require(found == 200, f"of 400 blocks cached under their numbers, find('key 200') gives {found}")
    words = f"find() compared a key with {Key.compared} others"
    require(Key.compared <= 10, f"{words}: in constant time, a dictionary finds it at once")
    Key.hashed, taken = 0, []
    lines = count_lines(lambda: taken.append(pool.take()))
    require(taken == [oldest], f"of 399 cached blocks, take() gives {taken[0]}, which was not the oldest")
    words = f"take() looked at {max(Key.hashed, lines)} keys or lines of code for the oldest of 399 cached blocks"
    require(Key.hashed <= 10 and lines <= 100, f"{words}: keep them in the order in which they were freed")


def draw_step(draw, model):
    """A random operation that makes sense now."""
    kind = draw.choice(("take", "free", "free", "find"))
    if kind == "free" and model.used:
        return ("free", draw.randrange(len(model.used)), draw.choice((None, *"abcdefgh")))
    return ("find", draw.choice("abcdefgh")) if kind == "find" else ("take",)


def play(pool, model, step) -> None:
    """Do one operation on both; the i-th block in use is named by i."""
    kind, *arguments = step
    if kind == "take":
        expected = bool(model.empty or model.cached)
        found = pool.take()
        require((found is not None) == expected, take_message(found, model))
        cached = next((key for key, block in model.cached.items() if block == found), None)
        if model.empty:
            because = f"which is cached under {cached!r}, while {model.empty} blocks are empty"
            require(cached is None, f"take() gives block {found}, {because}")
            model.empty -= 1
        elif expected:
            model.cached.popitem(last=False)
        if expected:
            require(
                found not in model.used,
                f"take() gives block {found}, which is in use: it was taken or found, and not freed since",
            )
            require(found not in model.cached.values(), f"take() gives block {found}, which was not the oldest")
            model.used.append(found)
    elif kind == "free":
        index, key = arguments
        block = model.used.pop(index)
        pool.free(block, None if key in model.cached else key)
        if key is None or key in model.cached:
            model.empty += 1
        else:
            model.cached[key] = block
    else:
        expected = model.cached.pop(arguments[0], None)
        found = pool.find(arguments[0])
        because = "it was evicted, or never freed under that key" if expected is None else "it is cached there"
        require(found == expected, f"find({arguments[0]!r}) gives {found}, expected {expected}: {because}")
        if expected is not None:
            model.used.append(expected)


def take_message(found, model) -> str:
    """What is wrong with the answer of take()."""
    if found is None:
        return f"take() gives None, while {model.empty} blocks are empty and {len(model.cached)} cached"
    return f"take() gives block {found} while all blocks are in use; expected None"
