"""Answers to the exercises of the profiling chapter."""

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


RIGHT = {
    "profiling.least_time": least_time,
    "profiling.worth": worth,
    "profiling.busy": busy,
    "profiling.without_copies": without_copies,
    "profiling.slower": slower,
}
WRONG = {
    "profiling.least_time": [least_time_added, least_time_without_launches, least_time_of_one_launch, shortest_time],
    "profiling.worth": [worth_by_speedup, worth_by_phase],
    "profiling.busy": [busy_added, busy_capped, busy_not_cut],
    "profiling.without_copies": [contiguous, reshaped, values_copied],
    "profiling.slower": [slower_by_time, slower_by_means, slower_by_the_worst],
}
