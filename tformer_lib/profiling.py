"""Where the time goes: named ranges, traces, counts of work, and the limits to hold them against.

    profiling.enable()                              # from here on, ranges reach Nsight Systems and Nsight Compute
    with profiling.range("attention"): ...          # free when off

    with profiling.trace("decode.json") as trace:   # Chrome's format, which Perfetto opens
        generate(model, [prompt], max_new_tokens=8)
    print(trace.table())

    with profiling.count() as work:                 # FLOPs and bytes, operator by operator
        model(tokens)
    print(work.table())

The calls are the same on a CPU and on a GPU. Where a GPU took part, a trace's intervals are its kernels and copies, by
CUDA stream; on a CPU alone they are the operators that do the work themselves, by thread.

**Intervals.** An interval is ``{"name": str, "start_us": float, "duration_us": float, "stream": int}``, in microseconds
since the first one. To keep a recording small on disk, :func:`pack` writes intervals as

    {"window_us": 20000.0, "names": ["gemm", "softmax"], "rows": [[name index, start_us, duration_us, stream], ...]}

and :func:`unpack` gives the intervals back. ``window_us`` is the length of the fixed window that was looked at: it
counts from 0, and what runs over its end is cut there.

Sources: Amdahl 1967 (the law); Williams, Waterman and Patterson 2009 (the roofline); the NVTX documentation.
"""

import csv
import gzip
import json
import math
import os
import re
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
"""The categories of a trace that say what a GPU did."""

PRODUCTS: dict = dict(flop_registry)
"""Operator -> the formula for its FLOPs: PyTorch's own, the CPU's fused attention, which it leaves out, and those that
modules of this library add for their kernels."""

_off = nullcontext()
_markers: tuple[Callable[[str], AbstractContextManager], ...] = ()


def range(name: str) -> AbstractContextManager:
    """A named stretch of time, for a ``with``. It costs a function call when nobody listens.

    Args:
        name: the phase: ``"attention"``, ``"sampling"``. One word for one thing, so that filters find it.
    """
    if not _markers or torch.compiler.is_compiling():
        return _off
    return _marked(name)


@contextmanager
def _marked(name: str) -> Iterator[None]:
    """Tell every listener where the range begins and ends."""
    with ExitStack() as stack:
        for marker in _markers:
            stack.enter_context(marker(name))
        yield


def enable() -> None:
    """Send ranges to NVIDIA's tools, until :func:`disable`.

    Raises:
        ImportError: neither the nvtx package nor a PyTorch with CUDA is there.
    """
    global _markers
    _markers = (*_markers, nvtx_marker())


def disable() -> None:
    """Switch every range off."""
    global _markers
    _markers = ()


def enabled() -> bool:
    """Whether anybody listens to ranges."""
    return bool(_markers)


def nvtx_marker() -> Callable[[str], AbstractContextManager]:
    """What makes an NVTX range: the nvtx package, or PyTorch's binding where it was built with CUDA."""
    try:
        import nvtx
    except ImportError as error:
        if torch.version.cuda is None:
            raise ImportError("NVTX ranges need the nvtx package, which is missing: pip install nvtx") from error
        return torch.cuda.nvtx.range
    return nvtx.annotate


@contextmanager
def listening(marker: Callable[[str], AbstractContextManager]) -> Iterator[None]:
    """Call ``marker(name)`` for each range opened inside."""
    global _markers
    before = _markers
    _markers = (*before, marker)
    try:
        yield
    finally:
        _markers = before


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


COUNTERS = {
    "seconds": ("gpu__time_duration.sum",),
    "sm_share": ("sm__throughput.avg.pct_of_peak_sustained_elapsed",),
    "issue_share": (
        "sm__issue_active.avg.pct_of_peak_sustained_elapsed",
        "smsp__issue_active.avg.pct_of_peak_sustained_active",
    ),
    "tensor_share": ("sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",),
    "dram_share": ("gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",),
    "dram_read": ("dram__bytes_read.sum",),
    "l2_hits": ("lts__t_sector_hit_rate.pct",),
    "occupancy": ("sm__warps_active.avg.pct_of_peak_sustained_active",),
    "registers": ("launch__registers_per_thread",),
}
"""Our word -> Nsight Compute's, the first that was collected. Shares are of a peak: what the processors, their tensor
cores and the memory can do, the cycles in which an instruction could be issued, the warps that fit."""

STALLS = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
"""Why a warp did not issue an instruction; "selected" and "not_selected" are no reasons to wait."""

UNITS = {"ns": 1e-9, "us": 1e-6, "usecond": 1e-6, "nsecond": 1e-9, "ms": 1e-3, "msecond": 1e-3, "s": 1.0, "second": 1.0}
UNITS |= {f"{prefix}byte": 10.0**power for prefix, power in (("", 0), ("K", 3), ("M", 6), ("G", 9))} | {"%": 0.01}


def read_counters(path: Path | str, wanted: dict[str, tuple[str, ...]] = COUNTERS) -> list[dict]:
    """The kernels of a CSV that ``ncu --import report --csv --page raw`` printed, in the order they ran.

    Args:
        path: the file, or what :func:`shorten_counters` made of it.
        wanted: our word -> the names that a counter goes by; those that were not collected are left out.

    Returns:
        One dict a kernel: its name as ``"name"``, a short one as ``"kernel"``, each counter in seconds, bytes, shares
        or numbers, and as ``"waits_for"`` the commonest reason why its warps waited, where those were collected.
    """
    _, units, kernels = raw_page(path)
    named = [{"name": row["Kernel Name"], "kernel": short_name(row["Kernel Name"])} for row in kernels]
    return [names | counters_of(row, units, wanted) for names, row in zip(named, kernels, strict=True)]


def raw_page(path: Path | str) -> tuple[list[str], dict[str, str], list[dict[str, str]]]:
    """The columns of a raw page, the unit of each, and its rows.

    Raises:
        ValueError: the file is not ncu's raw page.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"') or line.startswith("ID,")), len(lines))
    reader = csv.DictReader(lines[start:])
    rows = list(reader)
    if not rows or "Kernel Name" not in rows[0]:
        raise ValueError(f"{path} is not the raw page of ncu: make it with ncu --import FILE --csv --page raw")
    return list(reader.fieldnames), rows[0], rows[1:]


def counters_of(row: dict[str, str], units: dict[str, str], wanted: dict[str, tuple[str, ...]]) -> dict:
    """One row's counters as numbers, in the unit that the second line of the file names."""
    found = {}
    for word, names in wanted.items():
        name = next((name for name in names if number_in(row.get(name)) is not None), None)
        if name is not None:
            found[word] = number_in(row[name]) * UNITS.get(units[name], 1.0)
    stalls = {match[1]: number_in(row[name]) or 0.0 for name in row if (match := STALLS.fullmatch(name))}
    reasons = {reason: value for reason, value in stalls.items() if "selected" not in reason}
    return found | ({"waits_for": max(reasons, key=reasons.get).replace("_", " ")} if reasons else {})


def number_in(text: str | None) -> float | None:
    """A number as ncu writes it, with commas between thousands; None where there is none."""
    return None if text in (None, "", "n/a", "nan") else float(text.replace(",", ""))


def shorten_counters(path: Path | str, out: Path | str, wanted: dict[str, tuple[str, ...]] = COUNTERS) -> None:
    """Copy of a raw page only the columns that :func:`read_counters` reads: a few kilobytes instead of hundreds."""
    columns, units, kernels = raw_page(path)
    named = ("ID", "Kernel Name", "Block Size", "Grid Size", *(name for names in wanted.values() for name in names))
    kept = [name for name in columns if name in named or STALLS.fullmatch(name)]
    with Path(out).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, kept, extrasaction="ignore", quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows([units, *kernels])


@dataclass
class Work:
    """What was counted: operator -> calls, FLOPs of its matrix products, elements of other results, bytes moved."""

    operators: dict[str, dict] = field(default_factory=lambda: defaultdict(lambda: dict.fromkeys(COUNTED, 0)))

    @property
    def flops(self) -> int:
        """FLOPs of the matrix products and of fused attention, a multiplication and an addition counting two."""
        return sum(entry["flops"] for entry in self.operators.values())

    @property
    def bytes(self) -> int:
        """Bytes read and written, if each operator reads its inputs and writes its results once."""
        return sum(entry["bytes"] for entry in self.operators.values())

    @property
    def calls(self) -> int:
        """Operators that did something; views are free and not counted."""
        return sum(entry["calls"] for entry in self.operators.values())

    def table(self, rows: int = 10) -> str:
        """The operators that move the most bytes."""
        lines = [f"{'bytes':>15} {'flops':>15} {'flop/byte':>9} {'calls':>7}  operator"]
        for name, e in sorted(self.operators.items(), key=lambda item: -item[1]["bytes"])[:rows]:
            intensity = e["flops"] / e["bytes"] if e["bytes"] else 0.0
            lines.append(f"{e['bytes']:15,} {e['flops']:15,} {intensity:9.2f} {e['calls']:7d}  {name}")
        return "\n".join(lines)


COUNTED = ("calls", "flops", "elements", "bytes")


class count(TorchDispatchMode):
    """Count FLOPs and bytes of everything that runs inside; ``as`` gives the :class:`Work`.

    The bytes are those of a machine without a cache: each operator reads each input once and writes each result once.
    An input that was expanded counts its distinct elements, a look-up only the rows that it takes, a view nothing.
    """

    def __init__(self):
        super().__init__()
        self.work = Work()

    def __enter__(self) -> Work:
        super().__enter__()
        return self.work

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operator and add it up."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not moves_nothing(func):
            entry = self.work.operators[str(func._overloadpacket)]
            formula = PRODUCTS.get(func._overloadpacket)
            entry["calls"] += 1
            entry["bytes"] += traffic(func, args, kwargs, out)
            entry["flops"] += formula(*args, **kwargs, out_val=out) if formula else 0
            entry["elements"] += 0 if formula else sum(t.numel() for t in tensors(out))
        return out


LOOKUPS = {torch.ops.aten.embedding, torch.ops.aten.index_select, torch.ops.aten.gather, torch.ops.aten.index}
"""Operators that read of their first input only what they return."""

WRITES = {torch.ops.aten.copy_, torch.ops.aten.fill_, torch.ops.aten.zero_}
"""Operators that overwrite their first input without reading it."""

NEW_NAMES = {torch.ops.aten.detach, torch.ops.aten.alias, torch.ops.aten._unsafe_view}
RESERVES = {torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.empty_strided, torch.ops.aten.new_empty}
EMPTY = NEW_NAMES | RESERVES
"""Operators that move nothing: other names for the same numbers, and memory that is left as it is."""


def moves_nothing(func) -> bool:
    """Whether an operator only makes a view, or reserves memory."""
    if func._overloadpacket in EMPTY:
        return True
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def traffic(func, args: tuple, kwargs: dict, out) -> int:
    """Bytes that one operator reads and writes."""
    inputs, packet = tensors((args, kwargs)), func._overloadpacket
    if packet in LOOKUPS or packet in WRITES:
        inputs = inputs[1:]
    taken = sum(distinct_bytes(t) for t in tensors(out)) if packet in LOOKUPS else 0
    return taken + sum(distinct_bytes(t) for t in inputs) + sum(distinct_bytes(t) for t in tensors(out))


def tensors(tree) -> list[Tensor]:
    """The tensors in nested arguments."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def distinct_bytes(x: Tensor) -> int:
    """Bytes of a tensor's elements, those that ``expand`` repeats counted once."""
    if x.numel() == 0:
        return 0
    size = x.element_size()
    for length, stride in zip(x.shape, x.stride(), strict=True):
        size *= length if stride else 1
    return size


def attention_flops(query, key, value, *args, out_val=None, **kwargs) -> int:
    """FLOPs of fused attention on a CPU: two products of (T, head_dim) by (head_dim, S) a head, causal or not."""
    batch, heads, T, head_dim = query.shape
    return 2 * batch * heads * T * key.shape[2] * (head_dim + value.shape[3])


def attention_backward_flops(grad_out, query, key, value, *args, out_val=None, **kwargs) -> int:
    """FLOPs of its gradients: five products where the forward has two (the scores are computed again)."""
    batch, heads, T, head_dim = query.shape
    return 2 * batch * heads * T * key.shape[2] * (3 * head_dim + 2 * value.shape[3])


PRODUCTS.setdefault(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, attention_flops)
PRODUCTS.setdefault(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward, attention_backward_flops)


@dataclass(frozen=True)
class Roofline:
    """The limits of a device, and what they promise.

    Args:
        flops_per_second: the rate of its matrix products, measured.
        bytes_per_second: the rate of a large copy, bytes read and written, measured.
        launch_seconds: what it takes to start one operator, measured.
    """

    flops_per_second: float
    bytes_per_second: float
    launch_seconds: float = 0.0

    @property
    def ridge(self) -> float:
        """FLOPs per byte at which arithmetic takes as long as memory."""
        return self.flops_per_second / self.bytes_per_second

    def rate(self, intensity: float) -> float:
        """The FLOP/s that work of so many FLOPs per byte can reach."""
        return min(self.flops_per_second, intensity * self.bytes_per_second)

    def parts(self, flops: float, bytes: float, launches: int = 1) -> dict[str, float]:
        """Seconds that the arithmetic, the memory and the launches would each take alone."""
        return {
            "arithmetic": flops / self.flops_per_second,
            "memory": bytes / self.bytes_per_second,
            "launches": launches * self.launch_seconds,
        }

    def seconds(self, flops: float, bytes: float, launches: int = 1) -> float:
        """The least time: the three overlap at best, so the longest decides."""
        return max(self.parts(flops, bytes, launches).values())

    def bound(self, flops: float, bytes: float, launches: int = 1) -> str:
        """What decides: "arithmetic", "memory" or "launches"."""
        parts = self.parts(flops, bytes, launches)
        return max(parts, key=parts.get)


def amdahl(share: float, speedup: float) -> float:
    """How many times faster the whole gets when ``share`` of its time gets ``speedup`` times faster.

    Raises:
        ValueError: the share is no share, or the speedup is not positive.
    """
    if not 0 <= share <= 1 or speedup <= 0:
        raise ValueError(f"share must be in [0, 1] and speedup above 0, got {share} and {speedup}")
    left = 1 - share + share / speedup
    return 1 / left if left else math.inf
