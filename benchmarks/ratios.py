"""Has a kernel become slower? Each one beside its peer, called in turns, against the ratio that was recorded.

    python -m benchmarks.ratios --device cpu             # compare: exit code 1 and a line for each that is slower
    python -m benchmarks.ratios --device cpu --record    # write what is measured as the new record

A time depends on the machine and on who else uses it; the ratio of a kernel to a peer that runs in the next moment on
the same data depends on much less. A ratio counts how many times as long the course's form takes as its peer, so above
the record is slower. Up to :data:`TOLERANCE` times the record passes: that is wider than the noise (see the spread that
is recorded beside each), and narrower than a kernel that does its work twice. What fails is measured again, longer,
before it is told.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.harness import RESULTS, Options, Report, Timing, command_line, compare, device_name
from benchmarks.kv_cache import GPT2, SMALL
from benchmarks.profiling import fused_softmax, unfused_softmax
from tformer_lib import linear_attention, sparse_attention
from tformer_lib.attention import attend, attend_sdpa
from tformer_lib.flash_attention import flash_attention
from tformer_lib.generation import generate, generate_uncached
from tformer_lib.jit import BuildError
from tformer_lib.paged_attention import paged_attention
from tformer_lib.transformer import Decoder

TOLERANCE = 1.5
"""How many times the recorded ratio still passes."""

Pair = tuple[Callable[[], object], Callable[[], object]]
"""The course's form and its peer, each a call without arguments."""


def tensors(device: str, shape: tuple[int, ...], dtype: torch.dtype, count: int = 3) -> tuple[torch.Tensor, ...]:
    """``count`` random tensors."""
    return tuple(torch.randn(shape, device=device, dtype=dtype) for _ in range(count))


def flash_beside_sdpa(device: str) -> Pair:
    """The best step of the ladder that runs here, beside PyTorch's fused attention, causal."""
    gpu = device == "cuda"
    q, k, v = tensors(device, (4, 16, 4096, 128) if gpu else (1, 4, 256, 64), dtype_of(device))
    step = None if gpu else "cpu"
    return (
        lambda: flash_attention(q, k, v, causal=True, step=step),
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    )


def fused_beside_plain(device: str) -> Pair:
    """PyTorch's fused attention beside the reference, which writes its scores."""
    q, k, v = tensors(device, (4, 16, 2048, 64) if device == "cuda" else (1, 8, 512, 64), dtype_of(device))
    return lambda: attend_sdpa(q, k, v, causal=True), lambda: attend(q, k, v, causal=True)


def cached_beside_uncached(device: str) -> Pair:
    """Greedy generation with a cache (on a GPU with a recorded step) beside the loop without one."""
    gpu = device == "cuda"
    model, new = Decoder(GPT2 if gpu else SMALL).to(device, dtype_of(device)).eval(), 64 if gpu else 32
    prompt = list(range(64))
    return (
        lambda: generate(model, [prompt], max_new_tokens=new, cuda_graph=gpu),
        lambda: generate_uncached(model, prompt, max_new_tokens=new),
    )


def linear_beside_softmax(device: str) -> Pair:
    """Causal linear attention in chunks beside PyTorch's fused softmax attention."""
    q, k, v = tensors(device, (4, 16, 8192, 64) if device == "cuda" else (1, 4, 2048, 64), dtype_of(device))
    return lambda: linear_attention.attend(q, k, v, causal=True), lambda: attend_sdpa(q, k, v, causal=True)


def sparse_beside_dense(device: str) -> Pair:
    """A window of 256 tokens beside PyTorch's fused attention over all pairs."""
    q, k, v = tensors(device, (4, 16, 8192, 64) if device == "cuda" else (1, 4, 2048, 64), dtype_of(device))
    window = sparse_attention.sliding_window(256)
    return (
        lambda: sparse_attention.attend(q, k, v, pattern=window),
        lambda: attend_sdpa(q, k, v, causal=True),
    )


def paged_beside_reference(device: str) -> Pair:
    """The best decode kernel that runs here, beside the PyTorch reference."""
    batch, heads, length, head_dim = (32, 32, 2048, 128) if device == "cuda" else (4, 8, 512, 64)
    blocks = batch * length // 16
    k_pool, v_pool = tensors(device, (blocks, heads, 16, head_dim), dtype_of(device), 2)
    (q,) = tensors(device, (batch, heads, head_dim), dtype_of(device), 1)
    tables = torch.randperm(blocks, device=device).reshape(batch, -1).int()
    lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
    arguments = (q, k_pool, v_pool, tables, lengths)
    return lambda: paged_attention(*arguments), lambda: paged_attention(*arguments, step=0)


def one_operator_beside_five(device: str) -> Pair:
    """A fused softmax beside one of five operators."""
    (x,) = tensors(device, (8192, 8192) if device == "cuda" else (2048, 2048), dtype_of(device), 1)
    return lambda: fused_softmax(x), lambda: unfused_softmax(x)


CASES: dict[str, Callable[[str], Pair]] = {
    "attention: attend_sdpa / attend": fused_beside_plain,
    "flash_attention: the best step / PyTorch's": flash_beside_sdpa,
    "kv_cache: cached / uncached": cached_beside_uncached,
    "linear_attention: chunked / softmax": linear_beside_softmax,
    "sparse_attention: a window / dense": sparse_beside_dense,
    "paged_attention: the best step / the reference": paged_beside_reference,
    "profiling: a softmax of one operator / of five": one_operator_beside_five,
}


def dtype_of(device: str) -> torch.dtype:
    """What a device is measured in."""
    return torch.bfloat16 if device == "cuda" else torch.float32


@dataclass(frozen=True)
class GuardOptions(Options):
    """Each kernel beside its peer."""

    record: bool = False
    """Keep what is measured as the record, instead of comparing with it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns how many became slower."""
    return command_line(run, arguments, options=GuardOptions, topic="ratios", description=__doc__)


def run(args: GuardOptions) -> int:
    """Measure every case, then record or compare; returns how many became slower."""
    report = Report("ratios", args.device, args.out)
    record = {} if args.record else recorded(report.device)
    slower = [line for name, make in CASES.items() if (line := examine(report, name, make, record))]
    if args.record:
        report.note(tolerance=TOLERANCE)
        report.finish()
    print("\n".join(["", *slower] if slower else ["", "no kernel became slower than its record allows"]))
    return len(slower)


@torch.no_grad()
def examine(report: Report, name: str, make: Callable[[str], Pair], record: dict[str, float]) -> str | None:
    """Measure one case, keep it, and return a line if it is slower than recorded."""
    try:
        one, other = make(report.device.type)
        found = compare(one, other, device=report.device)
        limit = record.get(name, float("inf")) * TOLERANCE
        if found.median > limit:
            found = compare(one, other, device=report.device, pairs=45)
    except BuildError as error:
        print(f"  left out, {name}: {str(error).splitlines()[0]}")
        return None
    report.facts[name] = {"ratio": found.median, "p10": found.p10, "p90": found.p90}
    print(line_of(name, found, record.get(name)), flush=True)
    if found.median <= limit:
        return None
    return (
        f"SLOWER: {name} takes {found.median:.2f} times as long as its peer; "
        f"{record[name]:.2f} was recorded, and {TOLERANCE} times that is allowed"
    )


def line_of(name: str, found: Timing, before: float | None) -> str:
    """One line of the table."""
    told = "not recorded" if before is None else f"{before:.3f} recorded"
    return f"  {name:<48} {found.median:8.3f}  ({found.p10:.3f} to {found.p90:.3f}), {told}"


def recorded(device: torch.device) -> dict[str, float]:
    """The ratios on record for this kind of device; none where nothing was recorded."""
    path = Path(RESULTS) / device_name(device) / "ratios.json"
    if not path.exists():
        print(f"nothing is recorded for {device_name(device)}: python -m benchmarks.ratios --record")
        return {}
    facts = json.loads(path.read_text(encoding="utf-8"))["facts"]
    return {name: entry["ratio"] for name, entry in facts.items() if isinstance(entry, dict)}


if __name__ == "__main__":
    sys.exit(main())
