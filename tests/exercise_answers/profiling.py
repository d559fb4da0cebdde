"""Answers to the exercises of the profiling chapter."""

from itertools import pairwise
from statistics import mean, median

from tformer_lib.attention import attend_sdpa


def least_time(flops, bytes, launches, roof):
    times = {
        "arithmetic": flops / roof.flops_per_second,
        "memory": bytes / roof.bytes_per_second,
        "launches": launches * roof.launch_seconds,
    }
    word = max(times, key=times.get)
    return times[word], word


def least_time_added(flops, bytes, launches, roof):
    parts = roof.parts(flops, bytes, launches)
    return sum(parts.values()), max(parts, key=parts.get)


def least_time_without_launches(flops, bytes, launches, roof):
    return least_time(flops, bytes, 0, roof)


def least_time_of_one_launch(flops, bytes, launches, roof):
    return least_time(flops, bytes, 1, roof)


def shortest_time(flops, bytes, launches, roof):
    parts = roof.parts(flops, bytes, launches)
    word = min(parts, key=parts.get)
    return parts[word], word


def worth(seconds, speedups):
    whole = sum(seconds.values())
    return min(speedups, key=lambda name: whole - seconds[name] * (1 - 1 / speedups[name]))


def worth_by_speedup(seconds, speedups):
    return max(speedups, key=speedups.get)


def worth_by_phase(seconds, speedups):
    return max(speedups, key=seconds.get)


def busy(intervals, start, end):
    covered, reached = 0.0, start
    for i in sorted(intervals, key=lambda i: i["start_us"]):
        stop = min(i["start_us"] + i["duration_us"], end)
        covered += max(0.0, stop - max(i["start_us"], reached))
        reached = max(reached, stop)
    return covered / (end - start)


def busy_added(intervals, start, end):
    return sum(i["duration_us"] for i in intervals) / (end - start)


def busy_capped(intervals, start, end):
    return min(1.0, busy_added(intervals, start, end))


def busy_not_cut(intervals, start, end):
    last = max((i["start_us"] + i["duration_us"] for i in intervals), default=end)
    return busy(intervals, min(start, 0.0), max(end, last)) * (max(end, last) - min(start, 0.0)) / (end - start)


def without_copies(q, k, v):
    return attend_sdpa(q, k.transpose(1, 2), v.transpose(1, 2))


def contiguous(q, k, v):
    return attend_sdpa(q, k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous())


def reshaped(q, k, v):
    batch, S, heads, d = k.shape
    return attend_sdpa(q, k.reshape(batch, heads, S, d), v.reshape(batch, heads, S, d))


def values_copied(q, k, v):
    return attend_sdpa(q, k.transpose(1, 2), v.transpose(1, 2).clone())


def slower(ours, peers, recorded, tolerance):
    return median(a / b for a, b in zip(ours, peers, strict=True)) > recorded * tolerance


def slower_by_time(ours, peers, recorded, tolerance):
    return median(ours) > recorded * tolerance


def slower_by_means(ours, peers, recorded, tolerance):
    return mean(ours) / mean(peers) > recorded * tolerance


def slower_by_the_worst(ours, peers, recorded, tolerance):
    return max(a / b for a, b in zip(ours, peers, strict=True)) > recorded * tolerance


def own_time(ranges, order=lambda r: (r[1], -r[2]), all_above=False, once=True, touch=True, apart=True):
    own, names = [r[2] - r[1] for r in ranges], {r[0]: [0, 0] for r in ranges}
    gaps = {r[3]: [] for r in ranges}
    for thread in gaps if apart else [None]:
        open_ranges, reached = [], None
        for i in sorted(
            (i for i, r in enumerate(ranges) if r[3] == thread or not apart), key=lambda i: order(ranges[i])
        ):
            name, start, stop, own_thread = ranges[i]
            while open_ranges and (
                ranges[open_ranges[-1]][2] <= start if touch else ranges[open_ranges[-1]][2] < start
            ):
                open_ranges.pop()
            for parent in open_ranges if all_above else open_ranges[-1:]:
                own[parent] -= stop - start
            if not open_ranges and reached is not None and reached < start:
                gaps[own_thread].append((reached, start))
            if not once or all(ranges[p][0] != name for p in open_ranges):
                names[name][1] += stop - start
            open_ranges.append(i)
            reached = stop if reached is None else max(reached, stop)
    for (name, *_), x in zip(ranges, own, strict=True):
        names[name][0] += x
    return own, {name: tuple(pair) for name, pair in names.items()}, gaps


def own_time_by_events(ranges):
    """In the other style: a beginning and an end for each range, and a clock that goes from event to event."""
    own = [0.0] * len(ranges)
    names = {r[0]: [0.0, 0.0] for r in ranges}
    gaps = {r[3]: [] for r in ranges}
    for thread in gaps:
        mine = sorted((r[1], -r[2], i) for i, r in enumerate(ranges) if r[3] == thread)
        stack, clock = [], mine[0][0]

        def advance(to, stack, clock):
            if stack:
                own[stack[-1]] += to - clock
                names[ranges[stack[-1]][0]][0] += to - clock
                for name in {ranges[i][0] for i in stack}:
                    names[name][1] += to - clock
            return to

        for start, _, i in mine:
            while stack and ranges[stack[-1]][2] <= start:
                clock = advance(ranges[stack[-1]][2], stack, clock)
                stack.pop()
            if not stack and clock < start:
                gaps[thread].append([clock, start])
            clock = advance(start, stack, clock)
            stack.append(i)
        while stack:
            clock = advance(ranges[stack[-1]][2], stack, clock)
            stack.pop()
    return tuple(own), names, gaps


def own_time_with_children(ranges):
    return [r[2] - r[1] for r in ranges], *own_time(ranges)[1:]


def own_time_less_all_below(ranges):
    return own_time(ranges, all_above=True)


def own_time_counting_recursion_twice(ranges):
    return own_time(ranges, once=False)


def own_time_without_the_order_of_ties(ranges):
    return own_time(ranges, order=lambda r: r[1])


def own_time_in_the_order_given(ranges):
    return own_time(ranges, order=lambda r: 0)


def own_time_of_touching_as_nested(ranges):
    return own_time(ranges, touch=False)


def own_time_of_all_threads_together(ranges):
    return own_time(ranges, apart=False)


def own_time_with_gaps_between_neighbours(ranges):
    own, names, gaps = own_time(ranges)
    for thread in gaps:
        mine = sorted(r[1:3] for r in ranges if r[3] == thread)
        gaps[thread] = [(a[1], b[0]) for a, b in pairwise(mine) if a[1] < b[0]]
    return own, names, gaps


def own_time_with_gaps_of_no_length(ranges):
    own, names, gaps = own_time(ranges)
    for thread in gaps:
        stops = {r[2] for r in ranges if r[3] == thread}
        touching = [(r[1], r[1]) for r in ranges if r[3] == thread and r[1] in stops]
        gaps[thread] = sorted(gaps[thread] + touching)
    return own, names, gaps


def busy_in_whole_microseconds(intervals, start, end):
    busy = set()
    for i in intervals:
        busy |= set(range(int(max(i["start_us"], start)), int(min(i["start_us"] + i["duration_us"], end))))
    return len(busy) / (end - start)


def slower_by_the_medians(ours, peers, recorded, tolerance):
    return sorted(ours)[len(ours) // 2] / sorted(peers)[len(peers) // 2] > recorded * tolerance


RIGHT = {
    "profiling.least_time": least_time,
    "profiling.worth": worth,
    "profiling.busy": busy,
    "profiling.without_copies": without_copies,
    "profiling.slower": slower,
    "profiling.own_time": own_time,
}
ALSO_RIGHT = {"profiling.own_time": [own_time_by_events]}
WRONG = {
    "profiling.least_time": [least_time_added, least_time_without_launches, least_time_of_one_launch, shortest_time],
    "profiling.worth": [worth_by_speedup, worth_by_phase],
    "profiling.busy": [busy_in_whole_microseconds, busy_added, busy_capped, busy_not_cut],
    "profiling.without_copies": [contiguous, reshaped, values_copied],
    "profiling.slower": [slower_by_the_medians, slower_by_time, slower_by_means, slower_by_the_worst],
    "profiling.own_time": [
        own_time_with_children,
        own_time_less_all_below,
        own_time_counting_recursion_twice,
        own_time_without_the_order_of_ties,
        own_time_in_the_order_given,
        own_time_of_touching_as_nested,
        own_time_of_all_threads_together,
        own_time_with_gaps_between_neighbours,
        own_time_with_gaps_of_no_length,
    ],
}
