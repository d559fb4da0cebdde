"""What attention costs over the length: the reference, which writes its scores, beside PyTorch's fused kernels.

    python -m benchmarks.attention --device cpu
    python -m benchmarks.attention --device cuda

The theory: the two products of a head take 4 T S head_dim FLOPs (half of that where causal tiles are skipped, three
times that with the backward), so the least time is the FLOPs over the matrix-product rate. The plain form also moves
every score at least four times, 16 bytes in float32, for 4 head_dim FLOPs: it is bound by memory, not by arithmetic.
"""

import sys
from collections.abc import Sequence

import torch

from benchmarks.harness import Options, Report, command_line, copies_past_cache, copy_rate, matmul_rate, measure
from tformer_lib.attention import attend, attend_sdpa

HEAD_DIM = 64
FORMS = {"attend": attend, "attend_sdpa": attend_sdpa}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command_line(run, arguments, topic="attention", description=__doc__)


def run(args: Options) -> None:
    """Forward, causal forward and causal training, by both forms, over the length."""
    on_gpu = args.device == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    batch, heads = (4, 16) if on_gpu else (1, 8)
    report = Report("attention", args.device, args.out, peers=("attend_sdpa", "attend"))
    limit = matmul_rate(args.device, dtype)
    report.note(matmul_flops_per_second=limit, copy_bytes_per_second=copy_rate(args.device))
    report.note(batch=batch, heads=heads, head_dim=HEAD_DIM, dtype=str(dtype))
    for T in (1024, 2048, 4096, 8192) if on_gpu else (256, 512, 1024):
        for causal, backward in ((False, False), (True, False), (True, True)):
            for name in FORMS:
                add_row(report, name, (batch, heads, T, HEAD_DIM), dtype, causal, backward, limit)
    report.finish()


def add_row(
    report: Report,
    name: str,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    causal: bool,
    backward: bool,
    limit: float,
) -> None:
    """Time one form on one shape (batch, heads, T, head_dim); the FLOPs are those that the mathematics asks for."""

    def make() -> tuple[torch.Tensor, ...]:
        return tuple(torch.randn(shape, device=report.device, dtype=dtype, requires_grad=backward) for _ in range(3))

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        (train if backward else infer)(FORMS[name], q, k, v, causal)

    inputs = copies_past_cache(make, report.device, most=4)
    timing = measure(call, inputs, device=report.device, seconds=0.3)
    batch, heads, T, head_dim = shape
    flops = 4 * batch * heads * T * T * head_dim * (0.5 if causal else 1) * (3 if backward else 1)
    case = f"T {T:,}{', causal' if causal else ''}{', forward and backward' if backward else ''}"
    facts = {"form": name, "T": T, "causal": causal, "backward": backward, "score_bytes": 4 * batch * heads * T * T}
    report.add(timing=timing, case=case, contestant=name, flops=flops, limit=limit, **facts)


@torch.no_grad()
def infer(form, q, k, v, causal: bool) -> None:
    """The forward pass alone."""
    form(q, k, v, causal=causal)


def train(form, q, k, v, causal: bool) -> None:
    """Forward and backward."""
    out = form(q, k, v, causal=causal)
    torch.autograd.grad(out, (q, k, v), torch.ones_like(out))


if __name__ == "__main__":
    sys.exit(main())
