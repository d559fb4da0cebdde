"""What turning queries costs, in both layouts, and against the projection that made them.

    python -m benchmarks.rope --device cpu
    python -m benchmarks.rope --device cuda

The theory: turning a pair is six operations on two numbers that are read and written once, so bandwidth is the limit:
a rotation can be as fast as a copy of q. Written as separate products and sums it makes several passes over memory;
compiled, it makes one. The projection does thousands of operations for each number and is bound by the matrix units.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.harness import Report, copies_past_cache, copy_rate, matmul_rate, measure
from tformer_lib.rope import LAYOUTS, Rope, rotate

HEADS, HEAD_DIM = 32, 128


def main() -> None:
    """Measure on one device and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    gpu = args.device == "cuda"
    length, dtype = (8192, torch.bfloat16) if gpu else (512, torch.float32)
    report = Report("rope", args.device)
    report.note(heads=HEADS, head_dim=HEAD_DIM, length=length, dtype=str(dtype))
    measure_rotations(report, length, dtype)
    measure_angles(report, length)
    measure_projection(report, length, dtype)
    report.finish()


def measure_rotations(report: Report, length: int, dtype: torch.dtype) -> None:
    """A copy, then the rotation in each layout, as written and compiled; the limit of all is the copy rate."""
    device, limit = report.device, copy_rate(report.device)
    inputs = copies_past_cache(lambda: (torch.randn(1, HEADS, length, HEAD_DIM, device=device, dtype=dtype),), device)
    moved = 2 * inputs[0][0].numel() * dtype.itemsize  # read once, written once
    for name, turn in rotations(length, device).items():
        report.add(name, measure(turn, inputs, device=device), bytes=moved, limit=limit)


def rotations(length: int, device: torch.device) -> dict[str, Callable]:
    """Name -> function of q (batch, heads, T, head_dim)."""
    cos, sin = Rope(HEAD_DIM)(torch.arange(length, device=device))
    functions: dict[str, Callable] = {"copy": torch.clone}
    for layout in LAYOUTS:
        functions[f"rotate, {layout}"] = partial(rotate, cos=cos, sin=sin, layout=layout)
    for layout in LAYOUTS:
        functions[f"rotate, {layout}, compiled"] = torch.compile(partial(rotate, cos=cos, sin=sin, layout=layout))
    return functions


def measure_angles(report: Report, length: int) -> None:
    """Cosines and sines of all positions: made once for all layers."""
    positions = torch.arange(length, device=report.device)
    timing = measure(Rope(HEAD_DIM), [(positions,)], device=report.device)
    report.add("cosines and sines of all positions", timing, bytes=2 * length * HEAD_DIM // 2 * 4)


def measure_projection(report: Report, length: int, dtype: torch.dtype) -> None:
    """The product that makes q, for comparison; its limit is the matrix rate."""
    device, width = report.device, HEADS * HEAD_DIM
    hidden = torch.randn(length, width, device=device, dtype=dtype)
    weight = torch.randn(width, width, device=device, dtype=dtype)
    timing = measure(torch.nn.functional.linear, [(hidden, weight)], device=device)
    limit = matmul_rate(device, dtype)
    report.add("projection that makes q", timing, flops=2 * length * width * width, limit=limit)


if __name__ == "__main__":
    main()
