"""A learner's bench for kernels: build an edited copy of a step, check it, and time it beside the original.

``compile_step("flash_attention", "cpu", text)`` does it on any machine with a C++ compiler, and with the number of a
CUDA step in place of ``"cpu"`` on a machine with a GPU. Everything happens in a process of its own with a limit of
time: a kernel that is wrong, crashes or never ends costs the notebook one sentence.
"""

import contextlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

import torch
import torch.nn.functional as F
from torch import Tensor

from tformer_lib import jit
from tformer_lib.attention import attend
from tformer_lib.contract import counted
from tformer_lib.flash_attention import LADDER, flash_attention

TOPIC = "flash_attention"
SECONDS = 300.0
"""The most that building, checking and timing may take together."""

GUARD = 8
"""Rows of NaN before and after q, k and v: a kernel that reads outside of them shows it."""

SHAPES = (  # (T, S, heads, kv_heads, head_dim, causal, window)
    (1, 1, 1, 1, 64, False, None),
    (5, 70, 2, 1, 64, False, None),
    (37, 90, 2, 2, 40, True, None),
    (37, 24, 2, 1, 64, True, None),
    (96, 256, 1, 1, 128, False, None),
    (97, 257, 2, 1, 128, True, None),
    (130, 129, 2, 2, 64, False, None),
    (128, 128, 1, 1, 64, True, None),
    (200, 200, 2, 1, 64, True, 33),
    (63, 300, 1, 1, 256, True, None),
)
"""What an edited step is checked on: lengths around its tiles, fewer queries than keys and more, and a window."""


@dataclass
class Bench:
    """What came of an edited kernel.

    ``right`` says whether it built, ended and agreed with float64; ``message`` says it in words. ``seconds`` has the
    median, the 10th and the 90th percentile of a call of "yours", of the step "as it is" and of PyTorch's SDPA; it is
    empty where the kernel is not right.
    """

    right: bool
    message: str
    build_seconds: float = math.nan
    seconds: dict[str, tuple[float, float, float]] = field(default_factory=dict)

    def __repr__(self) -> str:
        return self.message

    def medians(self) -> dict[str, float]:
        """Name -> median seconds, as ``plots.flash_kernels.times`` draws it."""
        return {name: times[0] for name, times in self.seconds.items()}


def step_file(topic: str, step: int | str) -> str:
    """The file, under ``kernels/``, in which a step's code stands: its own, or the header that its rungs share.

    Raises:
        FileNotFoundError: there is no such step; the message lists those that there are.
    """
    source = jit.find_source(topic, LADDER.aliases.get(str(step), step))
    included = re.findall(r'^#include "(\d\w*\.cuh)"', source.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return f"{topic}/{included[0] if included else source.name}"


def compile_step(topic: str, step: int | str, edited: str | dict[str, str], *, seconds: float = SECONDS) -> Bench:
    """Build an edited copy of a step, check it against float64 on odd shapes, and time it beside the original.

    Args:
        topic: ``"flash_attention"``, the one topic that this bench knows.
        step: ``"cpu"`` for the C++ twin; ``1``, ``"3b"`` and so on for a CUDA step on a machine with a GPU.
        edited: the whole text that takes the place of ``step_file(topic, step)``, or {file under kernels/: text}.
        seconds: the most that all of it may take.

    Returns:
        a :class:`Bench`. It never raises for what is wrong with the kernel: the message says it.

    Raises:
        ValueError: the topic is another one, or ``edited`` names a file that is not there.
        FileNotFoundError: there is no such step.
    """
    if topic != TOPIC:
        raise ValueError(f"the bench knows the kernels of {TOPIC!r}, got {topic!r}")
    step = LADDER.aliases.get(str(step), step)
    files = {step_file(topic, step): edited} if isinstance(edited, str) else edited
    for name in files:
        if not (jit.kernels_folder() / name).is_file():
            raise ValueError(f"kernels/{name} is not there: name a file such as {step_file(topic, step)!r}")
    if reason := cannot_build(topic, step):
        return Bench(False, reason)
    with tempfile.TemporaryDirectory(prefix="tformer-bench-") as folder:
        copy = Path(folder) / "kernels"
        shutil.copytree(jit.kernels_folder(), copy)
        for name, text in files.items():
            (copy / name).write_text(text, encoding="utf-8")
        return run_child({"folder": str(copy), "step": str(step)}, seconds)


def cannot_build(topic: str, step: int | str) -> str | None:
    """What is missing to build this step here, in words, or None."""
    try:
        source = jit.find_source(topic, step)
        jit.check_tools(source)
        if source.suffix == ".cu":
            jit.architecture()
    except jit.BuildError as missing:
        return f"nothing was built: {missing}"
    return None


def run_child(task: dict, seconds: float) -> Bench:
    """Do the work in a process of its own, and say in words how it ended."""
    home = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))
    task = task | {"seconds": seconds}
    words = [sys.executable, "-c", "from tformer_lib.teaching.bench import work; work()", json.dumps(task)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    child = subprocess.Popen(words, env=environment, start_new_session=True, **pipes)
    try:
        out, errors = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        out, _ = child.communicate()
        return ended(out, f"it was stopped after {seconds:.0f} seconds: does a loop not move on?")
    except BaseException:  # the cell was interrupted, say
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        raise
    if child.returncode:
        last = errors.strip().splitlines()[-1] if errors.strip() else f"it ended with {child.returncode}"
        crash = "it crashed: does it read or write outside of its arrays?"
        return ended(out, crash if child.returncode < 0 or "CUDA" in last else f"the bench failed: {last}")
    return ended(out, "the bench said nothing")


def ended(out: str, otherwise: str) -> Bench:
    """The bench that the child's lines describe; ``otherwise`` is what happened if they come to no end."""
    told = {}
    for line in out.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            told |= json.loads(line)
    built = told.get("build_seconds", math.nan)
    if "wrong" in told:
        return Bench(False, told["wrong"], built)
    if "seconds" not in told:
        where = f", on {told['shape']}" if "shape" in told else ""
        return Bench(False, f"{otherwise.removesuffix('?')}{where}{'?' if otherwise.endswith('?') else ''}", built)
    times = {name: tuple(values) for name, values in told["seconds"].items()}
    return Bench(True, f"right on {told['shapes']} shapes, to the rounding of {told['dtype']}", built, times)


# --- in the child ----------------------------------------------------------------------------------------------------


def work() -> None:
    """Build, check and time what the command line says; tell each result as a line of JSON."""
    task = json.loads(sys.argv[1])
    signal.alarm(math.ceil(task["seconds"]) + 1)  # ends even an endless loop, if nobody is there to do it
    folder, step = task["folder"], task["step"]
    is_cuda = jit.find_source(TOPIC, step).suffix == ".cu"
    device = "cuda" if is_cuda else "cpu"
    dtype = torch.bfloat16 if is_cuda and step not in ("1", "2") else torch.float32
    torch.manual_seed(0)
    with jit.kernels_from(folder):
        start = time.perf_counter()
        try:
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                jit.load(TOPIC, step)
        except jit.BuildError as failure:
            return tell(wrong=f"it does not compile: {first_error(str(failure))}")
        tell(build_seconds=time.perf_counter() - start)
        shapes = [shape for shape in SHAPES if takes(shape, dtype)]
        for shape in shapes:
            tell(shape=described(shape))
            if complaint := check_shape(step, shape, device, dtype):
                return tell(wrong=complaint)
    tell(shapes=len(shapes), dtype=str(dtype).removeprefix("torch."), shape="the timed shape")
    tell(seconds=measure(folder, step, device, dtype))


def tell(**facts) -> None:
    """One line for the parent."""
    print(json.dumps(facts), flush=True)


def first_error(text: str) -> str:
    """The compiler's first complaint, with the file's name and the line, without its folder."""
    found = re.findall(r"^.*?([^/\n]*(?::\d+:\d+|\(\d+\)): (?:fatal )?error: .*)$", text, flags=re.MULTILINE)
    return found[0] if found else text.strip().splitlines()[-1]


def takes(shape: tuple, dtype: torch.dtype) -> bool:
    """Whether every step of this data type takes the shape: the tensor-core steps read 16 bytes at a time."""
    return dtype == torch.float32 or shape[4] % 8 == 0


def described(shape: tuple) -> str:
    """A shape in words."""
    T, S, heads, kv_heads, d, causal, window = shape
    more = ", causal" * causal + (f", window {window}" if window else "")
    sizes = f"{counted(T, 'query', 'queries')}, {counted(S, 'key')}"
    return f"{sizes}, {heads}/{kv_heads} heads, head_dim {d}{more}"


def check_shape(step: str, shape: tuple, device: str, dtype: torch.dtype) -> str | None:
    """What is wrong with the step on one shape, in words, or None: twice the error of plain PyTorch is allowed."""
    T, S, heads, kv_heads, d, causal, window = shape
    q = guarded(heads, T, d, device, dtype)
    k, v = (guarded(kv_heads, S, d, device, dtype) for _ in range(2))
    mask = seen(T, S, causal or window is not None, window).to(device)
    exact = attend(q.double(), k.double(), v.double(), mask=mask)
    plain = attend(q, k, v, mask=mask)
    torch.use_deterministic_algorithms(True)  # torch then fills what it allocates with NaN: nothing old is left there
    out = flash_attention(q, k, v, causal=causal, window=window, step=step)
    torch.use_deterministic_algorithms(False)
    if device == "cuda":
        torch.cuda.synchronize()
    allowed = 2 * (plain.double() - exact).abs().max().item() + 1e-5
    bad = ~((out.double() - exact).abs() <= allowed)
    if not bad.any():
        return None
    where = tuple(bad.nonzero()[0].tolist())
    said = f"at (batch, head, query, column) {where} it is {out[where].item():.4g}, expected {exact[where].item():.4g}"
    return f"{described(shape)}: the output is wrong ({said})"


def guarded(heads: int, rows: int, d: int, device: str, dtype: torch.dtype) -> Tensor:
    """(1, heads, rows, d) of random numbers between rows of NaN."""
    whole = torch.full((1, heads, rows + 2 * GUARD, d), torch.nan, device=device, dtype=dtype)
    inner = whole[:, :, GUARD : GUARD + rows]
    inner.copy_(torch.randn(inner.shape))
    return inner


def seen(T: int, S: int, causal: bool, window: int | None) -> Tensor:
    """Which key each query sees, (T, S): the last query sees the last key."""
    here, there = torch.arange(T)[:, None] + S - T, torch.arange(S)
    mask = there <= here if causal else torch.ones(T, S, dtype=torch.bool)
    return mask & (there > here - window) if window else mask


def measure(folder: str, step: str, device: str, dtype: torch.dtype) -> dict[str, list[float]]:
    """Seconds of a call of the edited step, of the step as it is, and of SDPA, in turns: they share the clock."""
    shape = (
        (1, 16, 8192, 128) if dtype == torch.bfloat16 else (1, 16, 4096, 128) if device == "cuda" else (1, 4, 1024, 64)
    )
    q, k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    found = {"yours": [], "as it is": [], "SDPA": []}
    calls: dict[str, Callable] = {
        "yours": lambda: flash_attention(q, k, v, step=step),
        "as it is": lambda: flash_attention(q, k, v, step=step),
        "SDPA": lambda: F.scaled_dot_product_attention(q, k, v),
    }
    for turn in range(8):
        for name, call in calls.items():
            with jit.kernels_from(folder) if name == "yours" else contextlib.nullcontext():
                times = list(timed(call, device, 3))
            found[name] += times if turn else []  # the first turn warms up
    return {name: [median(x), quantiles(x, n=10)[0], quantiles(x, n=10)[-1]] for name, x in found.items()}


def timed(call: Callable, device: str, calls: int) -> Iterator[float]:
    """Seconds of each call: by events on a GPU, by the clock on a CPU."""
    for _ in range(calls):
        if device == "cpu":
            start = time.perf_counter()
            call()
            yield time.perf_counter() - start
        else:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            yield begin.elapsed_time(end) / 1e3
