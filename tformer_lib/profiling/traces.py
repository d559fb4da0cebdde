"""Traces: what a profiler recorded, in Chrome's format."""

import gzip
import json
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from tformer_lib.profiling.intervals import as_intervals, time_table, totals
from tformer_lib.profiling.ranges import listening

KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
"""The categories of a trace that say what a GPU did."""


class Trace:
    """What a profiler recorded.

    Args:
        events: the ``traceEvents`` of Chrome's format; those that last (``"ph": "X"``) are looked at.
    """

    def __init__(self, events: Sequence[dict] = ()):
        self.events = list(events)

    @classmethod
    def read(cls, path: Path | str) -> "Trace":
        """A trace from a file that torch.profiler, Perfetto or Chrome wrote; ``.gz`` is unpacked."""
        path = Path(path)
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        content = json.loads(raw)
        return cls(content["traceEvents"] if isinstance(content, dict) else content)

    def save(self, path: Path | str) -> None:
        """Write the trace for chrome://tracing or https://ui.perfetto.dev; compressed where the name ends in .gz."""
        path, raw = Path(path), json.dumps({"traceEvents": self.events}).encode()
        path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)

    def of(self, *categories: str) -> list[dict]:
        """The lasting events of these categories, in the order of their start."""
        chosen = [e for e in self.events if e.get("ph") == "X" and e.get("cat") in categories]
        return sorted(chosen, key=lambda e: (float(e["ts"]), -float(e["dur"])))

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU did anything."""
        return any(e.get("cat") in KERNELS for e in self.events)

    def intervals(self) -> list[dict]:
        """Kernels by stream, or on a CPU alone the working operators by thread; time counts from the first."""
        events = self.of(*KERNELS) if self.on_gpu else working(self.of("cpu_op"))
        return as_intervals(events)

    def launches(self) -> int:
        """How often the host asked the GPU for something; on a CPU alone, how many operators ran."""
        if not self.on_gpu:
            return len(self.intervals())
        calls = self.of("cuda_runtime", "cuda_driver")
        return sum("Launch" in e["name"] or "Memcpy" in e["name"] or "Memset" in e["name"] for e in calls)

    def phases(self) -> dict[str, dict]:
        """Name of each range -> {"calls", "seconds"}: time on the host between its beginning and its end."""
        return totals(as_intervals(self.of("user_annotation")))

    def table(self, rows: int = 10) -> str:
        """The kernels (or operators) that took the most time, with the share of each."""
        return time_table(totals(self.intervals()), rows)


@contextmanager
def trace(path: Path | str | None = None, *, operators: bool = True) -> Iterator[Trace]:
    """Record what runs inside, ranges included, by torch.profiler.

    Args:
        path: where to write the trace as well, for chrome://tracing or https://ui.perfetto.dev.
        operators: record the host's operators and ranges too. They slow the host down; where the question is how long
            a GPU waits for it, leave them out. Without a GPU they are all there is, and always recorded.

    The host's part is that of the thread that records and of autograd's; the GPU's is everybody's.

    Raises:
        RuntimeError: something is being recorded already. PyTorch has one recorder, and a second start ends the
            process.
        FileNotFoundError: the folder of ``path`` does not exist; said before anything runs.
    """
    if path is not None and not Path(path).parent.is_dir():
        raise FileNotFoundError(f"the trace is to be written to {path}, but there is no folder {Path(path).parent}")
    if torch.autograd._profiler_enabled() or not _recording.acquire(blocking=False):
        raise RuntimeError("a trace is being recorded already: end it before the next one begins")
    try:
        yield from _record(path, operators)
    finally:
        _recording.release()


_recording = threading.Lock()


def _record(path: Path | str | None, operators: bool) -> Iterator[Trace]:
    """:func:`trace`, once nobody else records."""
    gpu = torch.cuda.is_available()
    activities = [torch.profiler.ProfilerActivity.CUDA] if gpu else []
    if operators or not gpu:
        activities.append(torch.profiler.ProfilerActivity.CPU)
    profiler = torch.profiler.profile(activities=activities, acc_events=True)  # the flag: no warning on torch 2.11
    recorded = Trace()
    with listening(torch.profiler.record_function):
        with silent_start():
            profiler.start()
        try:
            yield recorded
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        finally:  # after an error too: what ran before it
            with silent_start():
                profiler.stop()
            recorded.events = events_of(profiler)
            if path is not None:
                recorded.save(path)


def events_of(profiler: torch.profiler.profile) -> list[dict]:
    """What a profiler that has stopped recorded, in Chrome's format."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        return Trace.read(file).events


@contextmanager
def silent_start() -> Iterator[None]:
    """Keep what the profiler's own library says about starting and stopping off the page: it writes to descriptor 2."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def working(events: Sequence[dict]) -> list[dict]:
    """Those of a thread's nested operators that do the work themselves, and not by calling others.

    An operator is kept whole where more than half of its time lies outside the operators that it calls; else it is
    left out, and those that it calls are looked at.

    Args:
        events: ordered by start, with ``ts`` and ``dur`` in microseconds, and ``tid``.
    """
    kept = []
    for thread in {e["tid"] for e in events}:
        kept += descend(nest([e for e in events if e["tid"] == thread]))
    return sorted(kept, key=lambda e: float(e["ts"]))


def nest(events: Sequence[dict]) -> list[tuple[dict, list]]:
    """One thread's events, ordered by start, as a forest: (event, [(event called, [...]), ...])."""
    roots: list = []
    open_calls: list[tuple[float, list]] = [(float("inf"), roots)]  # (end, children) of what is running
    for event in events:
        while float(event["ts"]) >= open_calls[-1][0]:
            open_calls.pop()
        children: list = []
        open_calls[-1][1].append((event, children))
        open_calls.append((float(event["ts"]) + float(event["dur"]), children))
    return roots


def descend(forest: list[tuple[dict, list]]) -> list[dict]:
    """The operators of a forest that keep more than half of their time for themselves."""
    kept = []
    for event, children in forest:
        inside = sum(float(child["dur"]) for child, _ in children)
        kept += [event] if inside < float(event["dur"]) / 2 or not children else descend(children)
    return kept
