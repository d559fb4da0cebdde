"""What turning queries costs, in both layouts, and against the projection that made them.

    python -m benchmarks.rope --device cpu
    python -m benchmarks.rope --device cuda

The theory: turning a pair is six operations on two numbers that are read and written once, so bandwidth is the limit:
a rotation can be as fast as a copy of q. Written as separate products and sums it makes several passes over memory;
compiled, it makes one. The projection does thousands of operations for each number and is bound by the matrix units.

On a GPU the kernels of kernels/rope turn queries and keys in one pass: 8 x 4,096 tokens, 32 + 8 heads.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import (
    Options,
    Report,
    building,
    command_line,
    copies_past_cache,
    copy_rate,
    matmul_rate,
    measure,
)
from tformer_lib.rope import LAYOUTS, Rope, rotate, rotate_both, rotate_both_, turn_pairs

HEADS, HEAD_DIM = 32, 128
BATCH, TOKENS, KV_HEADS = 8, 4096, 8  # of the kernels


PEERS = ("copy", "step 0, compiled", "step 2, 16-byte vectors", "rotate, half, compiled")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command_line(run, arguments, topic="rope", description=__doc__)


def run(args: Options) -> None:
    """Measure on one device and write the report."""
    gpu = args.device == "cuda"
    length, dtype = (8192, torch.bfloat16) if gpu else (512, torch.float32)
    report = Report("rope", args.device, args.out, peers=PEERS)
    report.note(heads=HEADS, head_dim=HEAD_DIM, length=length, dtype=str(dtype))
    measure_rotations(report, length, dtype)
    measure_angles(report, length)
    measure_projection(report, length, dtype)
    if gpu:
        with building(report, "rope", (1, 2)):
            measure_kernels(report)
    report.finish()


def measure_rotations(report: Report, length: int, dtype: torch.dtype) -> None:
    """A copy, then the rotation in each layout, as written and compiled; the limit of all is the copy rate."""
    device, limit = report.device, copy_rate(report.device)
    inputs = copies_past_cache(lambda: (torch.randn(1, HEADS, length, HEAD_DIM, device=device, dtype=dtype),), device)
    moved = 2 * inputs[0][0].numel() * dtype.itemsize  # read once, written once
    for name, turn in rotations(length, device).items():
        timing = measure(turn, inputs, device=device, ahead=True)
        report.add(name, timing, case=f"{length:,} queries", contestant=name, bytes=moved, limit=limit)


def rotations(length: int, device: torch.device) -> dict[str, Callable]:
    """Name -> function of q (batch, heads, T, head_dim)."""
    cos, sin = Rope(HEAD_DIM)(torch.arange(length, device=device))
    functions: dict[str, Callable] = {"copy": torch.clone}
    for layout in LAYOUTS:
        functions[f"rotate, {layout}"] = partial(rotate, cos=cos, sin=sin, layout=layout, step=0)
    for layout in LAYOUTS:
        formula = partial(turn_pairs, cos=cos, sin=sin, layout=layout)
        functions[f"rotate, {layout}, compiled"] = torch.compile(formula)
    return functions


def measure_angles(report: Report, length: int) -> None:
    """Cosines and sines of all positions: made once for all layers."""
    positions = torch.arange(length, device=report.device)
    timing = measure(Rope(HEAD_DIM), [(positions,)], device=report.device, ahead=True)
    names = {"case": "made once", "contestant": "cosines and sines of all positions"}
    facts = {"bytes": 2 * length * HEAD_DIM // 2 * 4, "limit": copy_rate(report.device)}
    report.add(names["contestant"], timing, peer="copy", **names, **facts)


def measure_projection(report: Report, length: int, dtype: torch.dtype) -> None:
    """The product that makes q, for comparison; its limit is the matrix rate."""
    device, width = report.device, HEADS * HEAD_DIM
    hidden = torch.randn(length, width, device=device, dtype=dtype)
    weight = torch.randn(width, width, device=device, dtype=dtype)
    timing = measure(torch.nn.functional.linear, [(hidden, weight)], device=device)
    limit = matmul_rate(device, dtype)
    names = {"case": f"{length:,} queries", "contestant": "projection that makes q"}
    report.add(names["contestant"], timing, flops=2 * length * width * width, limit=limit, **names)


def measure_kernels(report: Report) -> None:
    """Queries and keys together, by each step, in turns with a copy of both and with the compiled formula."""
    device = report.device
    cos, sin = Rope(HEAD_DIM)(torch.arange(TOKENS, device=device))

    def made(heads: int, heads_last: bool) -> Tensor:
        shape = (BATCH, TOKENS, heads, HEAD_DIM) if heads_last else (BATCH, heads, TOKENS, HEAD_DIM)
        x = torch.randn(shape, device=device, dtype=torch.bfloat16)
        return x.transpose(1, 2) if heads_last else x

    report.note(batch=BATCH, tokens=TOKENS, kv_heads=KV_HEADS)
    for layout_name, heads_last in (("batch, heads, T, d", False), ("batch, T, heads, d", True)):
        inputs = [(made(HEADS, heads_last), made(KV_HEADS, heads_last))]  # 336 MB: far past the L2 cache
        moved = 2 * sum(x.numel() for x in inputs[0]) * 2  # read once, written once, 2 bytes each
        contestants = both_sides(cos, sin, *inputs[0])
        timings = {name: [] for name in contestants}
        for _ in range(3):
            for name, turn in contestants.items():
                timings[name].append(measure(turn, inputs, device=device, seconds=0.05, warmup=0.02, ahead=True))
        limit = moved / sorted(timings["copy of both"], key=lambda t: t.median)[1].median
        for name, turns in timings.items():
            middle = sorted(turns, key=lambda t: t.median)[1]
            medians = [1e3 * t.median for t in turns]
            passes = 1.5 if "norm, backward" in name else 1  # x, dout and dx instead of x and out
            row, names = f"{name}; {layout_name}", {"case": layout_name, "contestant": name}
            work = {"bytes": passes * moved, "limit": limit, "milliseconds_of_turns": medians}
            peer = None if name == "copy of both" else f"copy of both; {layout_name}"
            report.add(row, middle, peer=peer, **names, **work)


def both_sides(cos: Tensor, sin: Tensor, q: Tensor, k: Tensor) -> dict[str, Callable]:
    """Name -> function of q and k."""

    def formula(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return turn_pairs(q, cos, sin, "half"), turn_pairs(k, cos, sin, "half")

    joined = torch.empty(q.numel() + k.numel(), dtype=q.dtype, device=q.device)
    target, spare = torch.empty_like(joined), (q.clone(), k.clone())
    norm = {
        "norm_eps": 1e-6,
        "q_weight": torch.ones_like(cos[0]).repeat(2),
        "k_weight": torch.ones_like(cos[0]).repeat(2),
    }
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    normed = rotate_both(*leaves, cos, sin, **norm)
    return {
        "copy of both": lambda q, k: target.copy_(joined),
        "step 0, PyTorch": formula,
        "step 0, compiled": torch.compile(formula),
        "step 1, a lane a pair": partial(rotate_both, cos=cos, sin=sin, step=1),
        "step 2, 16-byte vectors": partial(rotate_both, cos=cos, sin=sin, step=2),
        "step 2, interleaved": partial(rotate_both, cos=cos, sin=sin, layout="interleaved", step=2),
        "step 2, in place": lambda *_: rotate_both_(*spare, cos, sin, step=2),
        "step 2, norm": partial(rotate_both, cos=cos, sin=sin, step=2, **norm),
        "step 2, norm, backward": lambda q, k: torch.autograd.grad(normed, leaves, (q, k), retain_graph=True),
    }


if __name__ == "__main__":
    sys.exit(main())
