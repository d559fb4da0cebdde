"""Intervals: what ran when, packed for the disk, added up, and the share of a window that they fill.

An interval is ``{"name": str, "start_us": float, "duration_us": float, "stream": int}``, in microseconds since the
first one. To keep a recording small on disk, :func:`pack` writes intervals as

    {"window_us": 20000.0, "names": ["gemm", "softmax"], "rows": [[name index, start_us, duration_us, stream], ...]}

and :func:`unpack` gives the intervals back. ``window_us`` is the length of the fixed window that was looked at: it
counts from 0, and what runs over its end is cut there.
"""

from collections.abc import Sequence


def as_intervals(events: Sequence[dict]) -> list[dict]:
    """Events of a trace as intervals that count from the first."""
    if not events:
        return []
    zero = min(float(e["ts"]) for e in events)
    return [
        {
            "name": e["name"],
            "start_us": round(float(e["ts"]) - zero, 3),
            "duration_us": round(float(e["dur"]), 3),
            "stream": int(e.get("args", {}).get("stream", e["tid"])),
        }
        for e in events
    ]


def totals(intervals: Sequence[dict]) -> dict[str, dict]:
    """Name -> {"calls", "seconds"}, the longest first."""
    found: dict[str, dict] = {}
    for interval in intervals:
        entry = found.setdefault(interval["name"], {"calls": 0, "seconds": 0.0})
        entry["calls"] += 1
        entry["seconds"] += interval["duration_us"] / 1e6
    return dict(sorted(found.items(), key=lambda item: -item[1]["seconds"]))


def time_table(found: dict[str, dict], rows: int = 10) -> str:
    """:func:`totals` as text: share, time, calls, time of one call, name."""
    whole = sum(entry["seconds"] for entry in found.values()) or 1.0
    lines = [f"{'share':>6} {'ms':>10} {'calls':>7} {'us each':>9}  name"]
    for name, entry in list(found.items())[:rows]:
        seconds, calls = entry["seconds"], entry["calls"]
        line = f"{seconds / whole:6.1%} {seconds * 1e3:10.3f} {calls:7d} {seconds / calls * 1e6:9.1f}"
        lines.append(f"{line}  {short_name(name)}")
    rest = list(found.values())[rows:]
    if rest:
        seconds, calls = sum(e["seconds"] for e in rest), sum(e["calls"] for e in rest)
        lines.append(f"{seconds / whole:6.1%} {seconds * 1e3:10.3f} {calls:7d} {'':9}  {len(rest)} others")
    return "\n".join(lines)


def short_name(name: str, longest: int = 60) -> str:
    """A kernel's name without its namespaces, template arguments and parameters."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "").replace("<unnamed>::", "")
    head = name.partition("<")[0].partition("(")[0].rpartition("::")[2] if not name.startswith("aten::") else name
    return (head or name)[:longest]


def pack(intervals: Sequence[dict], window_us: float, *, digits: int = 2, name=short_name) -> dict:
    """Intervals as a small recording: those that begin inside the window, each name written once.

    Args:
        intervals: as :meth:`Trace.intervals` gives them.
        window_us: how much of them to keep, from 0 on.
        digits: decimals of a microsecond.
        name: shortens a name.
    """
    kept = [i for i in intervals if 0 <= i["start_us"] < window_us]
    names = list(dict.fromkeys(name(i["name"]) for i in kept))
    places = {n: i for i, n in enumerate(names)}
    rows = [
        [places[name(i["name"])], round(i["start_us"], digits), round(i["duration_us"], digits), i["stream"]]
        for i in kept
    ]
    return {"window_us": window_us, "names": names, "rows": rows}


def unpack(recording: dict) -> list[dict]:
    """The intervals of a recording made by :func:`pack`."""
    return [
        {"name": recording["names"][name], "start_us": start, "duration_us": duration, "stream": stream}
        for name, start, duration, stream in recording["rows"]
    ]


def spans(intervals: Sequence[dict], *, gap_us: float = 0.0) -> list[tuple[float, float]]:
    """(begin, end) in microseconds of the stretches in which something ran, whatever the stream.

    Args:
        intervals: in any order; they may overlap.
        gap_us: pauses up to this long do not end a stretch.
    """
    joined: list[tuple[float, float]] = []
    for begin, end in sorted((i["start_us"], i["start_us"] + i["duration_us"]) for i in intervals):
        if joined and begin <= joined[-1][1] + gap_us:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((begin, end))
    return joined


def utilisation(intervals: Sequence[dict], start_us: float, end_us: float) -> float:
    """The share of a fixed window in which at least one interval ran.

    A busy device is not a fast one: a kernel that wastes its time counts as much as one that works.

    Raises:
        ValueError: the window is empty.
    """
    if end_us <= start_us:
        raise ValueError(f"the window must end after it starts, got {start_us} to {end_us} us")
    inside = ((max(begin, start_us), min(end, end_us)) for begin, end in spans(intervals))
    return sum(max(0.0, end - begin) for begin, end in inside) / (end_us - start_us)
