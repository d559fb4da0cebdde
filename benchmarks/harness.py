"""The one harness that every measurement of the course uses.

A benchmark is three steps: :func:`measure` times a function, a :class:`Report` collects the rows with the peer and the
limit of each, and ``report.finish()`` prints a table and writes one JSON with the hardware, the versions, the commit
and the command that made it. :func:`command_line` reads the flags, which are the same for all.

How the time is taken, so that two runs agree:

- On a GPU, device events around each call; on a CPU, ``perf_counter``. Both after a warm-up.
- The median of many calls, with the 10th and 90th percentile beside it: a difference inside that spread is noise.
- Inputs rotate through several copies that together are larger than the last-level cache, unless the caller says that
  the data is meant to stay in the cache.
"""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from shutil import copytree
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Literal, TypeVar

import torch

from tformer_lib import command_line as commands
from tformer_lib import jit, profiling
from tformer_lib.checkpoint import write_atomically

RESULTS = Path(__file__).parent / "results"
BEGAN = time.monotonic()
"""When this process loaded the harness."""


@dataclass(frozen=True)
class Options:
    """What every benchmark can be asked."""

    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """What to measure; by default the GPU if there is one."""
    out: Path | None = None
    """The folder to write to, instead of benchmarks/results/ and the device's name."""


def command_line(
    benchmark: Callable[[Options], object],
    arguments: Sequence[str] | None = None,
    *,
    options: type[Options] = Options,
    topic: str,
    description: str,
) -> int:
    """The command line of a benchmark: read its flags, seed, run it; returns the exit status.

    Args:
        benchmark: does it all; what it returns is left alone, but for an exit status.
        arguments: by default those of this process.
        options: a dataclass that adds flags to :class:`Options`.
        topic: the topic's word: the command is ``python -m benchmarks.<topic>``.
        description: the script's docstring.
    """

    def run() -> int:
        asked = commands.parse(options, arguments, program=f"python -m benchmarks.{topic}", description=description)
        commands.pick_device(asked.device)  # refuses one that is not here, before anything is made
        torch.manual_seed(0)
        status = benchmark(asked)
        return status if isinstance(status, int) else 0

    return commands.run(run)


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median, the 10th and 90th percentile, and how many calls were timed."""

    median: float
    p10: float
    p90: float
    calls: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        """The timing of some calls."""
        p10, *_, p90 = quantiles(seconds, n=10) if len(seconds) > 1 else (seconds[0], seconds[0])
        return cls(median(seconds), p10, p90, len(seconds))

    @property
    def spread(self) -> float:
        """Width of the middle 80 % of the calls, as a share of the median."""
        return (self.p90 - self.p10) / self.median


def measure(
    fn: Callable,
    inputs: Sequence[tuple] = ((),),
    *,
    device: torch.device | str = "cpu",
    seconds: float = 0.5,
    warmup: float = 0.1,
    min_calls: int = 5,
    max_calls: int = 1000,
    ahead: bool = False,
) -> Timing:
    """Time ``fn(*inputs[i])``, rotating through ``inputs``.

    Args:
        fn: the function to time.
        inputs: one tuple of arguments per set; several sets keep repeated calls from finding their data in the cache.
        device: where the work happens; a CUDA device is timed with device events.
        seconds: how long to go on timing, within ``min_calls`` and ``max_calls``.
        warmup: seconds of calls before the clock starts (at least one call of each input set).
        ahead: let the host get ahead of a GPU before each batch of calls, so that a kernel which takes less time than
            its launch is timed and not the launch.
    """
    device = torch.device(device)
    warm_up(fn, inputs, device, warmup)
    timer = partial(time_cuda, ahead=ahead) if device.type == "cuda" else time_cpu
    times = timer(fn, inputs, seconds, min_calls, max_calls)
    return Timing.of(times)


Found = TypeVar("Found")


def take_turns(contestants: Mapping[str, Callable[[], Found]], turns: int) -> dict[str, list[Found]]:
    """What each contestant returns, called once in each turn: what else the machine does disturbs all of them alike.

    Each turn begins with another contestant: who follows one that heats a GPU less finds a higher clock.
    """
    found, names = {name: [] for name in contestants}, list(contestants)
    for turn in range(turns):
        first = turn * len(names) // turns
        for name in names[first:] + names[:first]:
            found[name].append(contestants[name]())
    return found


def in_turns(
    contestants: dict[str, Callable[[], object]], *, seconds: float, turns: int = 3
) -> dict[str, tuple[Timing, list[float]]]:
    """The middle of several measurements on a GPU of each, taken in turns, and the medians of all in milliseconds.

    Args:
        contestants: functions of nothing, by name.
        seconds: of each measurement, after half as long a warm-up.
    """
    measured = partial(measure, device="cuda", seconds=seconds, warmup=seconds / 2, ahead=True)
    timings = take_turns({name: partial(measured, call) for name, call in contestants.items()}, turns)
    middle = {name: sorted(found, key=lambda t: t.median)[turns // 2] for name, found in timings.items()}
    return {name: (middle[name], [1e3 * t.median for t in found]) for name, found in timings.items()}


def measure_graph(fn: Callable, inputs: Sequence[tuple] = ((),), *, seconds: float = 0.5) -> Timing:
    """The time of one call inside a CUDA graph that holds a call on every input set, at least ten.

    Args:
        fn, inputs, seconds: as of ``measure``.
    """
    rounds = -(-10 // len(inputs))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for arguments in inputs:
            fn(*arguments)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for arguments in list(inputs) * rounds:
            fn(*arguments)
    timing, calls = measure(graph.replay, device="cuda", seconds=seconds), rounds * len(inputs)
    return replace(timing, median=timing.median / calls, p10=timing.p10 / calls, p90=timing.p90 / calls)


TURNS = 3  # of contestants that are measured in turns, so that clocks and power are shared alike


def measure_in_turns(
    contestants: Mapping[str, tuple[Callable, Sequence[tuple]]], *, seconds: float = 0.1
) -> dict[str, Timing]:
    """Each contestant (function, sets of arguments) on a GPU, a part of its time in each turn.

    Returns:
        of each the median of its turns' medians, and the spread of all of them.
    """
    measured = partial(measure, device="cuda", seconds=seconds / TURNS, warmup=seconds / TURNS)
    found = take_turns({name: partial(measured, *contestant) for name, contestant in contestants.items()}, TURNS)
    return {
        name: Timing(
            median(t.median for t in turns),
            min(t.p10 for t in turns),
            max(t.p90 for t in turns),
            sum(t.calls for t in turns),
        )
        for name, turns in found.items()
    }


def warm_up(fn: Callable, inputs: Sequence[tuple], device: torch.device, seconds: float) -> None:
    """Call ``fn`` on every input set once, then until ``seconds`` have passed."""
    for args in inputs:
        fn(*args)
    synchronize(device)
    start, i = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        fn(*inputs[i % len(inputs)])
        synchronize(device)
        i += 1


def time_cpu(fn: Callable, inputs: Sequence[tuple], seconds: float, min_calls: int, max_calls: int) -> list[float]:
    """Seconds of each call by the host's clock."""
    times, begin = [], time.perf_counter()
    while len(times) < max_calls and (len(times) < min_calls or time.perf_counter() - begin < seconds):
        args = inputs[len(times) % len(inputs)]
        start = time.perf_counter()
        fn(*args)
        times.append(time.perf_counter() - start)
    return times


HEAD_START = 20_000_000  # cycles that a GPU sleeps, 10 ms, while the host fills its queue


def time_cuda(
    fn: Callable, inputs: Sequence[tuple], seconds: float, min_calls: int, max_calls: int, *, ahead: bool = False
) -> list[float]:
    """Seconds of each call by device events, which leave the host's launch overhead out when the queue is full."""
    times, begin, done = [], time.perf_counter(), 0
    while done < max_calls and (done < min_calls or time.perf_counter() - begin < seconds):
        batch = min(max(min_calls, 10), max_calls - done)
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(batch)]
        if ahead:
            torch.cuda._sleep(HEAD_START)
        for i, (start, end) in enumerate(events):
            args = inputs[(done + i) % len(inputs)]
            start.record()
            fn(*args)
            end.record()
        torch.cuda.synchronize()
        times += [start.elapsed_time(end) / 1e3 for start, end in events]
        done += batch
    return times


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it (nothing to do on a CPU)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copies_past_cache(make: Callable[[], tuple], device: torch.device | str, *, most: int = 64) -> list[tuple]:
    """Call ``make()`` for enough input sets that together they are twice the last-level cache.

    Args:
        make: returns one tuple of arguments; the bytes of its tensors are counted.
        most: the most sets to make, for inputs that are tiny.
    """
    first = make()
    size = sum(x.numel() * x.element_size() for x in first if isinstance(x, torch.Tensor))
    count = min(most, max(1, -(-2 * last_level_cache(torch.device(device)) // max(size, 1))))
    return [first, *(make() for _ in range(count - 1))]


def last_level_cache(device: torch.device) -> int:
    """Bytes of the device's last-level cache (32 MiB is assumed for a CPU that does not say)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(p.read_text().rstrip("K\n")) * 1024 for p in sizes), default=32 * 2**20)


def matmul_rate(device: torch.device | str, dtype: torch.dtype, *, size: int | None = None) -> float:
    """The device's measured matrix-product rate in FLOP/s: the ceiling that shares of compute are taken of."""
    device = torch.device(device)
    n = size or (8192 if device.type == "cuda" else 1024)
    make = lambda: (torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype))  # noqa: E731
    return 2 * n**3 / measure(torch.matmul, [make(), make()], device=device).median


def copy_rate(device: torch.device | str, *, size: int | None = None) -> float:
    """The device's measured copy rate in bytes/s, read plus written: the ceiling for shares of bandwidth."""
    device = torch.device(device)
    n = size or (2**32 if device.type == "cuda" else 2**28)
    source = torch.randint(0, 255, (n,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * n / measure(target.copy_, [(source,)], device=device).median


def launch_seconds(device: torch.device | str) -> float:
    """What it takes to start one operator that has next to nothing to do: the floor of any small operator's time.

    The operators are issued one after the other and waited for once, as a model does it.
    """
    device, many = torch.device(device), 1000
    x = torch.zeros(8, device=device)

    def issue() -> None:
        for _ in range(many):
            x.add_(1.0)

    times = []
    for _ in range(7):
        synchronize(device)
        start = time.perf_counter()
        issue()
        synchronize(device)
        times.append((time.perf_counter() - start) / many)
    return median(times[2:])


@contextmanager
def edited_kernel(file: str, edits: Sequence[tuple[str, str]]) -> Iterator[None]:
    """Within it, kernels are built from a copy of ``kernels/`` in which ``file`` has each text replaced by another.

    Raises:
        ValueError: the file no longer holds a text that is to be replaced.
    """
    with edited_copy(file, edits) as folder, jit.kernels_from(folder):
        yield


@contextmanager
def edited_copy(file: str, edits: Sequence[tuple[str, str]]) -> Iterator[str]:
    """The folder of such a copy, for ``jit.kernels_from``; it goes when this ends."""
    with TemporaryDirectory() as folder:
        copytree(jit.kernels_folder(), folder, dirs_exist_ok=True)
        path = Path(folder) / file
        text = path.read_text()
        for old, new in edits:
            if old not in text:
                raise ValueError(f"{file} no longer holds {old!r}")
            text = text.replace(old, new)
        path.write_text(text)
        yield folder


def load_twice(topic: str, steps: Sequence[int | str]) -> dict[str, float]:
    """Seconds to build kernels in an empty cache, one after the other, and to load them again in a new process.

    Meant to run beside measurements of a GPU that do not feel a compiler on the host.
    """
    code = "import time, torch; from tformer_lib import jit; torch.cuda.init()\n"
    code += f"for step in {tuple(steps)}:\n    t = time.time()\n    jit.load({topic!r}, step)\n"
    code += "    print(round(time.time() - t, 3))"
    facts = {}
    with TemporaryDirectory() as folder:
        environ = os.environ | {"TORCH_EXTENSIONS_DIR": folder}
        for what in ("build seconds", "second load seconds"):
            words = [sys.executable, "-c", code]
            done = subprocess.run(words, capture_output=True, text=True, check=True, env=environ)
            seconds = map(float, done.stdout.split())
            facts |= {f"{what}, step {step}": x for step, x in zip(steps, seconds, strict=True)}
    return facts


def compare(
    one: Callable[[], object], other: Callable[[], object], *, device: torch.device | str = "cpu", pairs: int = 15
) -> Timing:
    """How many times longer ``one`` takes than ``other``, called in turns so that both see the same machine.

    A ratio of neighbours is steadier than a ratio of two medians: what slows the machine for a while slows both.

    Returns:
        A :class:`Timing` whose numbers are ratios: the median over the pairs, and its 10th and 90th percentile.
    """
    device = torch.device(device)
    for fn in (one, other, one, other):
        fn()
    ratios = [host_seconds(one, device) / host_seconds(other, device) for _ in range(pairs)]
    p10, *_, p90 = quantiles(ratios, n=10)
    return Timing(median(ratios), p10, p90, pairs)


def host_seconds(fn: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call by the host's clock, until the device has finished."""
    synchronize(device)
    start = time.perf_counter()
    fn()
    synchronize(device)
    return time.perf_counter() - start


def profiled(fn: Callable[[], object], *, device: torch.device | str, warmup: int = 3) -> None:
    """Run ``fn`` for an outside profiler: what ``--nvtx`` does in a script instead of measuring.

    After ``warmup`` calls, one call stands inside the NVTX range "measured", which ``benchmarks/nsys.sh`` and
    ``benchmarks/ncu.sh`` look for; the library's own ranges lie within. Nothing is timed and nothing is written, for
    a program that runs under a profiler is slower than alone.
    """
    device = torch.device(device)
    for _ in range(warmup):
        fn()
    synchronize(device)
    profiling.enable()
    try:
        with profiling.range("measured"):
            fn()
            synchronize(device)
    finally:
        profiling.disable()


def noise(fn: Callable[[], object], *, device: torch.device | str = "cpu", repeats: int = 20, **options) -> dict:
    """What the harness says when nothing changes: the same measurement again and again.

    Args:
        fn: anything; it must do the same on every call.
        repeats: how many whole measurements.
        options: passed on to :func:`measure`.

    Returns:
        The medians in seconds, their spread (largest over smallest, less 1), and the typical distance of one from
        the median of all, as a share of it.
    """
    medians = [measure(fn, device=device, **options).median for _ in range(repeats)]
    middle = median(medians)
    return {
        "repeats": repeats,
        "medians": medians,
        "spread": max(medians) / min(medians) - 1,
        "typical": median(abs(m - middle) for m in medians) / middle,
    }


@dataclass
class Row:
    """One measurement: what was run, how long it took, what it did, its peer, and what the limit is.

    Several contestants do the same work, the ``case``; ``peer`` is the name of the row to compare with. ``flops`` and
    ``bytes`` are what one call must do at least; ``limit`` is the rate to compare with (FLOP/s if flops are given, else
    bytes/s). Where there is no peer, ``alone`` says why; where there is no limit, ``unbounded`` does.
    """

    name: str
    case: str
    contestant: str
    seconds: float
    p10: float
    p90: float
    calls: int
    flops: float | None = None
    bytes: float | None = None
    limit: float | None = None
    peer: str | None = None
    alone: str | None = None
    unbounded: str | None = None
    extra: dict = field(default_factory=dict)

    @property
    def rate(self) -> float | None:
        """FLOP/s or bytes/s reached."""
        work = self.flops if self.flops is not None else self.bytes
        return None if work is None else work / self.seconds

    @property
    def share(self) -> float | None:
        """The share of the limit reached."""
        return None if self.rate is None or self.limit is None else self.rate / self.limit

    @property
    def rate_text(self) -> str:
        """The rate with its unit."""
        if self.rate is None:
            return ""
        return f"{self.rate / 1e12:.3f} {'TFLOP/s' if self.flops is not None else 'TB/s'}"


def results_folder(out: Path | str | None, name: str) -> Path:
    """Where files go: ``out``, else what ``TFORMER_RESULTS`` names, else ``benchmarks/results/`` and a name."""
    return Path(out or os.environ.get("TFORMER_RESULTS") or RESULTS / name)


def writing_to(out: Path | str) -> dict[str, str]:
    """The environment of a process whose benchmarks write to ``out``, whatever their own command says."""
    return os.environ | {"TFORMER_RESULTS": str(out)}


class Report:
    """The rows of one benchmark, written as one JSON that says where, when and how they were made.

    Args:
        topic: the topic's word, which names the file.
        device: what was measured; names the folder under ``benchmarks/results/``.
        out: another folder to write to, instead of ``benchmarks/results/<device>/``.
        peers: contestants to compare with, those that say most first. A row that names no peer of its own is compared
            with the first of them that did its case, other than itself.
        folder: another name under ``benchmarks/results/`` than the device's.
    """

    def __init__(
        self,
        topic: str,
        device: torch.device | str = "cpu",
        out: Path | str | None = None,
        peers: Sequence[str] = (),
        folder: str | None = None,
    ):
        self.topic, self.peers = topic, list(peers)
        self.device = torch.device(device)
        self.out = results_folder(out, folder or device_name(self.device))
        self.rows: list[Row] = []
        self.facts: dict = {}

    def add(
        self,
        name: str | None = None,
        timing: Timing | None = None,
        *,
        case: str | None = None,
        contestant: str | None = None,
        peer: str | None = None,
        alone: str | None = None,
        flops: float | None = None,
        bytes: float | None = None,
        limit: float | None = None,
        unbounded: str | None = None,
        **extra,
    ) -> Row:
        """Add a timed row.

        Args:
            name: of the row; by default "case: contestant". A name alone is cut there.
            timing: of the calls.
            case: the work: what is done on what, in words that all contestants share.
            contestant: who does it.
            peer: the name of the row to compare with; by default found by the report's ``peers``.
            alone: why there is no peer.
            flops: what a call must do at least.
            bytes: the same in bytes read and written.
            limit: the rate to compare with.
            unbounded: why there is no limit.
            extra: what is kept beside it (sizes, settings).
        """
        if case is None:
            case, _, contestant = name.rpartition(": ") if ": " in name else ("", "", name)
        numbers = (timing.median, timing.p10, timing.p90, timing.calls, flops, bytes, limit)
        row = Row(name or f"{case}: {contestant}", case, contestant, *numbers, peer, alone, unbounded, extra)
        self.rows.append(row)
        print(format_row(row), flush=True)
        return row

    def peer_of(self, row: Row) -> str | None:
        """The name of the row to compare with; None where there is none."""
        if row.peer is not None or row.alone is not None:
            return row.peer
        same = {other.contestant: other.name for other in self.rows if other.case == row.case and other is not row}
        return next((same[peer] for peer in self.peers if peer in same), None)

    def missing(self) -> list[tuple[str, str]]:
        """(name of a row, "peer" or "limit") of what is neither given nor explained; who is a peer needs none."""
        peers = {row.name: self.peer_of(row) for row in self.rows}
        alone = [r for r in self.rows if peers[r.name] is None and r.alone is None and r.name not in peers.values()]
        unbounded = [row for row in self.rows if row.limit is None and row.unbounded is None]
        return [*((row.name, "peer") for row in alone), *((row.name, "limit") for row in unbounded)]

    def note(self, **facts) -> None:
        """Keep facts that are no timing: ceilings, losses, counts."""
        self.facts.update(facts)
        for name, value in facts.items():
            print(f"  {name}: {value}", flush=True)

    def attach(self, **facts) -> None:
        """Keep facts that are too long to print, such as a recording of kernels; only their names are printed."""
        self.facts.update(facts)
        print(f"  attached: {', '.join(facts)}", flush=True)

    def as_dict(self) -> dict:
        """All that the JSON holds."""
        rows = [{**asdict(r), "peer": self.peer_of(r), "rate": r.rate, "share": r.share} for r in self.rows]
        return {
            "topic": self.topic,
            **environment(self.device),
            "facts": self.facts,
            "peers": self.peers,
            "rows": rows,
        }

    def save(self) -> Path:
        """Write ``<out>/<topic>.json`` atomically with what is known so far, and return its path."""
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / f"{self.topic}.json"
        write_atomically(path, (as_json(self.as_dict()) + "\n").encode())
        return path

    def finish(self) -> Path:
        """Save, and print the table."""
        path = self.save()
        print(f"\n{self.topic} on {device_label(self.device)}")
        print("\n".join(format_row(row) for row in self.rows))
        for name, what in self.missing():
            print(f"  {name} has no {what}: name it, or say why there is none")
        print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
        return path


@contextmanager
def building(report: Report, topic: str, steps: Sequence[int | str]) -> Iterator[None]:
    """Beside what is measured within it, ``load_twice``, whose seconds are noted at the end."""
    with ThreadPoolExecutor(1) as pool:
        builds = pool.submit(load_twice, topic, steps)
        yield
        report.note(**builds.result())


def as_json(value) -> str:
    """Indented JSON, in which a list that holds only numbers takes one line."""
    return re.sub(r"\[[\s\d.,eE+-]+\]", lambda found: re.sub(r"\s+", " ", found[0]), json.dumps(value, indent=1))


def format_row(row: Row) -> str:
    """One line of the table: name, median time with its spread, rate, share of the limit."""
    share = "" if row.share is None else f"{row.share:6.1%} of limit"
    spread = (row.p90 - row.p10) / row.seconds
    return f"  {row.name:<48} {row.seconds * 1e3:10.3f} ms  ±{spread / 2:4.0%}  {row.rate_text:>16}  {share}".rstrip()


def environment(device: torch.device) -> dict:
    """The hardware, the versions, the commit, the date and the command of this run, and its seconds so far."""
    return {
        "device": device_label(device),
        "machine": {
            "processor": cpu_name(),
            "threads": torch.get_num_threads(),
            "platform": f"{platform.system()} {platform.machine()}",
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(),
        "took": round(time.monotonic() - BEGAN, 1),
    }


def device_label(device: torch.device) -> str:
    """The device's name as a person reads it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def device_name(device: torch.device) -> str:
    """The device's name as a folder: 'nvidia-h200', or 'cpu'."""
    return "cpu" if device.type == "cpu" else device_label(device).lower().replace(" ", "-")


def cpu_name() -> str:
    """The processor's model name and how many cores this process may use."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{names[0] if names else platform.processor() or platform.machine()}, {cores} cores"


def commit() -> str | None:
    """The commit that is checked out, with '+changes' where the tree differs from it.

    Outside a checkout, such as in a copy of the files on another machine, ``TFORMER_COMMIT`` names it; else None.
    """
    root = Path(__file__).parent
    run = lambda *words: subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)  # noqa: E731
    head = run("rev-parse", "--short=12", "HEAD")
    if head.returncode:
        return os.environ.get("TFORMER_COMMIT") or None
    return head.stdout.strip() + ("+changes" if run("status", "--porcelain", "-uno").stdout.strip() else "")


def command() -> str:
    """The command line as one would type it: ``python -m benchmarks.topic --flags``, but for where results go.

    A file is named without its folder, which another machine does not have.
    """
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    program = ["-m", spec.name.removesuffix(".__main__")] if spec else [Path(sys.argv[0]).name]
    flags = [flag for flag in sys.argv[1:] if not flag.startswith("--out=")]
    if "--out" in flags:
        place = flags.index("--out")
        del flags[place : place + 2]
    flags = [Path(flag).name if Path(flag).is_absolute() else flag for flag in flags]
    return shlex.join(["python", *program, *flags])
