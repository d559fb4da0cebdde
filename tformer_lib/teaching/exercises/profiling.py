"""The exercises of the profiling chapter."""

import random
from collections.abc import Callable
from itertools import pairwise

import torch

from tformer_lib import profiling
from tformer_lib.attention import attend_sdpa
from tformer_lib.teaching.exercises.engine import exercise, in_digits, require, require_close, require_number

KINDS = ("arithmetic", "memory", "launches")


@exercise(
    "profiling.least_time",
    title="The least time, and what decides it",
    hints=(
        "Work out three times: what each of arithmetic, memory and launches would take if it were alone.",
        "They overlap at best, so they do not add up: which of the three can you not beat?",
        "times = {'arithmetic': flops / roof.flops_per_second, ...}; word = max(times, key=times.get)",
    ),
)
def check_least_time(fn: Callable) -> None:
    large, small = profiling.Roofline(1e14, 2e12, launch_seconds=4e-6), profiling.Roofline(1e12, 1e11, 1e-5)
    cases = (
        (1e12, 1e9, 1, large, "a large matrix product"),
        (1e9, 4e9, 1, large, "a large copy"),
        (1e6, 1e6, 200, large, "200 small operators"),
        (1e10, 1e9, 10, large, "work on the memory side of the ridge"),
        (1e10, 1e8, 10, small, "a matrix product on a slower machine"),
        (1e9, 4e9, 1, small, "a large copy on a slower machine"),
        (1e6, 1e6, 200, small, "200 small operators on a slower machine"),
    )
    for flops, moved, launches, roof, name in cases:
        answer = fn(flops, moved, launches, roof)
        is_pair = isinstance(answer, tuple | list) and len(answer) == 2
        require(is_pair, "return two things: the seconds, and what decides")
        seconds, word = answer
        seconds = require_number(seconds, "the least time")
        require(word in KINDS, f"what decides should be one of {', '.join(KINDS)}, and is {word!r}")
        expected, parts = roof.bound(flops, moved, launches), roof.parts(flops, moved, launches)
        require(word == expected, f"{name}: {word} would take {parts[word]:.2g} s, {expected} {parts[expected]:.2g} s")
        require(
            abs(seconds - sum(parts.values())) > 1e-12 or seconds == parts[word],
            f"{name}: {seconds:.3g} s is the sum of the three, but they run at the same time at best",
        )
        mine, right = in_digits(seconds, parts[expected])
        require(abs(seconds / parts[expected] - 1) < 1e-6, f"{name}: {mine} s, expected {right} s")


@exercise(
    "profiling.worth",
    title="Which repair is worth the most",
    hints=(
        "A repair touches one phase. What does the whole take afterwards?",
        "The rest stays: whole - seconds + seconds / speedup. The best repair leaves the least.",
        "min(speedups, key=lambda name: sum(seconds.values()) - seconds[name] * (1 - 1 / speedups[name]))",
    ),
)
def check_worth(fn: Callable) -> None:
    cases = (
        (
            {"attention": 2.0, "feed-forward": 6.0, "sampling": 2.0},
            {"attention": 10.0, "feed-forward": 1.5},
            "feed-forward",
        ),
        ({"attention": 9.0, "feed-forward": 4.0}, {"attention": 1.1, "feed-forward": 4.0}, "feed-forward"),
        ({"prefill": 1.0, "decode": 99.0}, {"prefill": 1000.0, "decode": 1.05}, "decode"),
        ({"a": 4.0, "b": 4.0, "c": 1.0}, {"a": 2.0, "b": 3.0, "c": 50.0}, "b"),
    )
    for seconds, speedups, expected in cases:
        found = fn(seconds, speedups)
        require(found in speedups, f"return the name of a repair, one of {', '.join(speedups)}; this is {found!r}")
        after = {n: sum(seconds.values()) - seconds[n] * (1 - 1 / s) for n, s in speedups.items()}
        require(
            found == expected,
            f"of phases {seconds} with speed-ups {speedups}: repairing {found} leaves {after[found]:.3g} s, "
            f"repairing {expected} leaves {after[expected]:.3g} s",
        )


@exercise(
    "profiling.busy",
    title="How busy was the device?",
    hints=(
        "Two kernels on two streams may run at the same time: that time counts once.",
        "Sort by the start and walk: remember where the busy stretch ends that you are in. Cut at the window's ends.",
        "covered = 0; reached = start; for b, e in sorted(...): covered += max(0, min(e, end) - max(b, reached)); "
        "reached = max(reached, min(e, end))",
    ),
)
def check_busy(fn: Callable) -> None:
    make = lambda *pairs: [  # noqa: E731
        {"name": "k", "start_us": float(b), "duration_us": float(e - b), "stream": s} for b, e, s in pairs
    ]
    cases = (
        (make((0, 4, 0), (6, 8, 0)), 0, 10, 0.6, "two kernels one after the other"),
        (make((0, 6, 0), (2, 8, 1)), 0, 10, 0.8, "two streams that overlap"),
        (make((0, 10, 0), (2, 4, 1), (5, 6, 1)), 0, 10, 1.0, "short kernels beside a long one"),
        (make((0, 4, 0), (9, 20, 0)), 2, 10, 0.375, "kernels that begin before the window and end after it"),
        (make((6, 8, 0), (0, 4, 0)), 0, 10, 0.6, "intervals that are not in order"),
        (make((1, 5, 0)), 0, 8, 0.5, "a window of another length"),
        (make((100, 108, 0), (102, 104, 1), (103, 109, 1)), 100, 110, 0.9, "overlaps in a window that begins late"),
        (make((0.25, 0.75, 0), (0.5, 1.5, 1), (3.125, 3.25, 0)), 0, 4, 0.34375, "kernels of less than a microsecond"),
        ([], 0, 10, 0.0, "an idle device"),
    )
    for intervals, start, end, expected, name in cases:
        found = require_number(fn(intervals, float(start), float(end)), f"{name}: the share")
        require(found <= 0 or found != 100 * expected, f"{name}: {found:.3g}: return a share, 1 for all of the time")
        why = "cut what begins before the window or ends after it" if "window" in name else "overlaps count once"
        require(found <= 1 + 1e-9, f"{name}: {found:.3g} is more than all of the time: {why}")
        mine, right = in_digits(found, expected)
        require(abs(found - expected) < 1e-6, f"{name}: {mine} of the window, expected {right}")


@exercise(
    "profiling.without_copies",
    title="Attention without copies",
    hints=(
        "`profiling.count()` around your function lists the operators that move bytes. Which of them is not attention?",
        "`.contiguous()`, `.clone()` and most `.reshape()`s of a transposed tensor write it anew. What reads strides?",
        "attend_sdpa reads any strides: attend_sdpa(q, k.transpose(1, 2), v.transpose(1, 2))",
    ),
)
def check_without_copies(fn: Callable) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 1, 16, generator=generator)
    check_one_reading(fn, q, *torch.randn(2, 2, 300, 4, 16, generator=generator))
    q = torch.randn(1, 3, 1, 8, generator=generator)
    check_one_reading(fn, q, *torch.randn(2, 1, 400, 3, 8, generator=generator))


def check_one_reading(fn: Callable, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Count the bytes of attention over k and v (batch, S, heads, head_dim)."""
    with profiling.count() as work, torch.no_grad():
        out = fn(q, k, v)
    wanted = attend_sdpa(q, k.transpose(1, 2), v.transpose(1, 2))
    require_close(out, wanted, "the output is not attention over all keys of each head", name="the output")
    size = k.numel() * k.element_size()
    copies = [name for name in ("aten.clone", "aten.copy_", "aten.cat", "aten.stack") if moved(work, name) >= size]
    require(not copies, f"{', '.join(copies)} moves the keys or values: {work.bytes:,} bytes in all for {2 * size:,}")
    require(work.bytes < 4 * size, f"{work.bytes:,} bytes are moved; reading k and v once is {2 * size:,}")


def moved(work: profiling.Work, name: str) -> int:
    """Bytes that one operator moved."""
    return work.operators[name]["bytes"] if name in work.operators else 0


@exercise(
    "profiling.slower",
    title="A guard for slow kernels",
    hints=(
        "The two lists were measured in turns: ours[i] and peers[i] saw the same machine. What do you compare?",
        "A ratio for each pair, and of those the median: one disturbed pair must not decide.",
        "statistics.median(a / b for a, b in zip(ours, peers)) > recorded * tolerance",
    ),
)
def check_slower(fn: Callable) -> None:
    peers = [1.0, 1.1, 0.9, 1.0, 1.05, 0.95, 1.0]
    double = lambda times: [2 * t for t in times]  # noqa: E731
    busy = [1, 1, 3, 4, 5, 5, 6]  # the machine slows down for both
    disturbed = [*peers[:-1], 40.0]
    cases = (
        (peers, peers, False, "nothing changed"),
        (double(peers), peers, True, "our kernel takes twice as long"),
        ([1.8 * t for t in peers], peers, True, "our kernel takes 1.8 times as long"),
        (double(peers), double(peers), False, "the whole machine is half as fast"),
        ([t * b for t, b in zip(peers, busy, strict=True)], [float(b) for b in busy], False, "the machine became busy"),
        (disturbed, peers, False, "one single call was disturbed"),
        (double(peers), [*peers[:-1], 40.0], True, "our kernel is slower, and one call of the peer was disturbed"),
        ([5.0, 1, 1, 4, 4], [1.0, 1, 1, 4, 4], False, "one call was disturbed, and then the machine became busy"),
        ([1.0, 2.0, 2.0], [1.0, 1.0, 1.0], True, "two calls of three, the last among them, took twice as long"),
        ([2.0, 2.0, 1.0], [1.0, 1.0, 1.0], True, "two calls of three, the first among them, took twice as long"),
    )
    cases = [(*case, 1.0, 1.5) for case in cases]
    cases += [
        (double(peers), peers, False, "our kernel always took twice as long as its peer", 2.0, 1.5),
        (double(peers), peers, False, "twice as long, and a tolerance of three times", 1.0, 3.0),
        (double(peers), peers, True, "half as long in the record, and twice as long now", 0.5, 3.0),
    ]
    for ours, others, expected, name, recorded, tolerance in cases:
        found = fn(list(ours), list(others), recorded, tolerance)
        require(found in (True, False), f"return True or False; this is {found!r}")
        word = "is no alarm" if not expected else "should raise an alarm"
        require(bool(found) == expected, f"{name}: that {word}, and the answer is {found}")


def draw_ranges(draw: random.Random, start: int, stop: int, thread, depth: int = 0) -> list[tuple]:
    """Random ranges of one thread inside start .. stop: nested, touching, recursive, some as long as their parent."""
    ranges, at = [], start
    while at < stop and len(ranges) < 12:
        begin = at + draw.choice((0, 0, 1, 3))
        end = min(stop, begin + draw.choice((1, 4, 9, 20, stop - start)))
        if begin >= stop:
            break
        ranges.append((draw.choice("abc"), begin, end, thread))
        if depth < 4 and draw.random() < 0.7:
            ranges += draw_ranges(draw, begin, end, thread, depth + 1)
        at = end
    return ranges


def moment_by_moment(ranges: list[tuple]) -> tuple[list, dict, dict]:
    """The same three answers by asking, between any two ends, what was open: each moment is the innermost range's."""
    own, names, gaps = [0] * len(ranges), {name: [0, 0] for name, *_ in ranges}, {}
    for thread in dict.fromkeys(r[3] for r in ranges):
        mine = [i for i, r in enumerate(ranges) if r[3] == thread]
        ends = sorted({t for i in mine for t in ranges[i][1:3]})
        gaps[thread] = []
        for a, b in pairwise(ends):
            around = [i for i in mine if ranges[i][1] <= a and b <= ranges[i][2]]
            if not around:
                gaps[thread].append((a, b))
                continue
            innermost = max(around, key=lambda i: (ranges[i][1], -ranges[i][2], i))
            own[innermost] += b - a
            names[ranges[innermost][0]][0] += b - a
            for name in {ranges[i][0] for i in around}:
                names[name][1] += b - a
    return own, names, gaps


@exercise(
    "profiling.own_time",
    title="Whose time is it?",
    hints=(
        "Walk over a thread's ranges in the order in which they begin, and keep a stack of those that are still open. "
        "The top of the stack, once you have closed what ended, is the parent.",
        "A range adds its duration to its own time and takes it from its parent's, and from no other's. Of two that "
        "begin together the longer one comes first: sort by (start, -stop).",
        "The total of a name: count a range only where no open range has the same name.",
        "A gap opens where the stack has run empty, from the last stop to the next start. Keep threads apart.",
    ),
)
def check_own_time(fn: Callable) -> None:
    draw = random.Random(0)
    fixed = (
        (
            [("step", 0, 10, 0), ("attention", 2, 6, 0), ("softmax", 3, 5, 0)],
            "a child and a grandchild",
            "the child's time holds the grandchild's already",
        ),
        (
            [("a", 0, 4, 0), ("b", 4, 6, 0), ("c", 9, 10, 0)],
            "ranges that touch, and a gap",
            "neighbours are no children",
        ),
        (
            [("inner", 0, 3, 0), ("outer", 0, 8, 0)],
            "two that begin together, the inner one listed first",
            "the longer one is the parent",
        ),
        (
            [("outer", 0, 5, 0), ("inner", 0, 5, 0), ("leaf", 4, 5, 0)],
            "two that begin and end together",
            "the one listed first is the parent",
        ),
        (
            [("f", 0, 10, 0), ("f", 2, 8, 0), ("g", 3, 5, 0), ("f", 6, 7, 0)],
            "f, which calls itself",
            "a child of the same name is a child",
        ),
        (
            [("main", 0, 9, 1), ("worker", 2, 5, 2), ("worker", 7, 8, 2)],
            "two threads",
            "what another thread does meanwhile is no child",
        ),
        ([("main", 0, 9, 1), ("worker", 2, 5, 2)], "two threads of one range each", "neither has a gap"),
        (
            [("a", 1, 2, 0), ("long", 4, 20, 0), ("b", 5, 6, 0), ("c", 22, 23, 0)],
            "a gap after a nest",
            "b ends long before its parent does",
        ),
        (
            [("a", 0.25, 4.5, 0), ("b", 0.5, 0.75, 0), ("c", 0.75, 1.0, 0), ("a", 4.625, 5.0, 0)],
            "ranges of less than a microsecond",
            "times are not whole numbers",
        ),
        ([], "an empty trace", ""),
    )
    for ranges, case, note in fixed:
        compare_own_times(fn(list(ranges)), ranges, case, note)
    for many in range(12):
        ranges = [r for thread in range(1 + many % 3) for r in draw_ranges(draw, 0, 40 + many, f"thread {thread}")]
        draw.shuffle(ranges)
        case = f"{len(ranges)} random ranges on {1 + many % 3} threads"
        compare_own_times(fn(list(ranges)), ranges, case, "only the children's time comes off, each child's once")


def compare_own_times(answer, ranges: list[tuple], case: str, note: str) -> None:
    """Fail unless the three parts of the answer are right; the note says what the case is about."""
    three = isinstance(answer, tuple | list) and len(answer) == 3
    require(three, "return three things: the own times, the names' (own, total), and the gaps of each thread")
    found, found_names, found_gaps = answer
    own, names, gaps = moment_by_moment(ranges)
    require(hasattr(found, "__len__") and len(found) == len(own), f"{case}: the own times should be {len(own)} numbers")
    found = [float(x) for x in found]
    for (name, start, stop, _), x, wanted in zip(ranges, found, own, strict=True):
        words = f"{case}: {name} from {start} to {stop} has {wanted} of its own, and you say {x:.6g}"
        whole = abs(x - (stop - start)) < 1e-6
        why = "that is all of its time, with its children's" if whole else note
        require(abs(x - wanted) < 1e-6, f"{words}: {why}")
    for part, kind in (
        (found_names, "names: {name: (own, total)}"),
        (found_gaps, "gaps: {thread: [(start, stop), ...]}"),
    ):
        require(isinstance(part, dict), f"{case}: return a dictionary of the {kind}; this is a {type(part).__name__}")
    strange = sorted(map(str, set(found_names) ^ set(names)))
    require(
        not strange, f"{case}: {', '.join(strange)} should be among the names if, and only if, a range has that name"
    )
    for name, (wanted, total) in names.items():
        pair = found_names[name]
        require(hasattr(pair, "__len__") and len(pair) == 2, f"{case}: give {name} a pair, (own, total)")
        x, y = map(float, pair)
        require(abs(x - wanted) < 1e-6, f"{case}: the own times of {name} add up to {wanted}, and you say {x:.6g}")
        why = f": while {name} runs inside {name}, a moment counts once" if y > total else ""
        require(abs(y - total) < 1e-6, f"{case}: the total of {name} is {total}, and you say {y:.6g}{why}")
    strange = sorted(map(str, set(found_gaps) ^ set(gaps)))
    require(
        not strange, f"{case}: each thread has a list of gaps, an empty one if it never waits; look at {strange[:1]}"
    )
    for thread, wanted in gaps.items():
        mine = [tuple(map(float, gap)) for gap in found_gaps[thread]]
        for a, b in mine:
            require(a < b, f"{case}: you give a gap from {a:g} to {b:g}: ranges that touch leave none")
            busy = next((r for r in ranges if r[3] == thread and r[1] < b and a < r[2]), None)
            require(not busy, f"{case}: a gap from {a:g} to {b:g}, but on that thread {busy and busy[0]} runs then")
        require(mine == sorted(mine), f"{case}: list the gaps in the order of time")
        said = ", ".join(f"{a:g} to {b:g}" for a, b in mine) or "none"
        truth = ", ".join(f"{a} to {b}" for a, b in wanted) or "none"
        require(mine == wanted, f"{case}: the gaps of thread {thread!r} are {truth}, and you say {said}")
