"""What linear attention saves over softmax attention as the text grows, in time and in memory.

    python -m benchmarks.linear_attention --device cpu

The theory: softmax attention takes 4·N²·d operations (half of that if the future is skipped), and N² numbers if it is
written out; chunked linear attention takes 4·N·C·d + 4·N·d² operations for chunks of C, and O(N·d) numbers. On
logarithmic axes the slopes are 2 and 1. Decoding from a state takes 4·d² operations a token, whatever came before.
"""

import math
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import Options, Report, command_line, copy_rate, matmul_rate, measure
from tformer_lib import linear_attention
from tformer_lib.attention import attend

HEAD_DIM = 64
LENGTHS = (1024, 2048, 4096, 8192, 16384)
WRITTEN_OUT = 8192  # the longest text whose N² scores are written out


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command_line(run, arguments, topic="linear_attention", description=__doc__)


def run(args: Options) -> None:
    """Time and memory over the length, and the time of a decoded token over the length before it."""
    device = torch.device(args.device)
    report = Report("linear_attention", device, args.out, peers=("softmax, fused", "linear, chunked"))
    rate = matmul_rate(device, torch.float32)
    report.note(head_dim=HEAD_DIM, chunk=linear_attention.CHUNK, matmul_flops_per_second=rate, lengths=list(LENGTHS))
    times = time_forms(report, device, rate)
    report.note(time_slopes={name: slope(LENGTHS[: len(t)], t) for name, t in times.items()})
    memory = memory_of_forms(device)
    report.note(peak_mib=memory)
    slopes = {f"{kind}, {n}": slope(LENGTHS[: len(m)], m) for kind, ms in memory.items() for n, m in ms.items()}
    report.note(memory_slopes=slopes)
    decode(report, device)
    report.finish()


def forms() -> dict[str, Callable]:
    """The forms that are compared, all causal."""
    return {
        "softmax, written out": lambda q, k, v: attend(q, k, v, causal=True),
        "softmax, fused": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "linear, chunked": lambda q, k, v: linear_attention.attend(q, k, v, causal=True),
    }


def operations(name: str, N: int) -> int:
    """The operations that a form must do at least."""
    if name == "softmax, fused":
        return 2 * N * N * HEAD_DIM  # it skips the future
    if name == "softmax, written out":
        return 4 * N * N * HEAD_DIM
    return 4 * N * linear_attention.CHUNK * HEAD_DIM + 4 * N * HEAD_DIM * (HEAD_DIM + 1)


def lengths_of(name: str) -> list[int]:
    """The lengths at which a form is run."""
    return [N for N in LENGTHS if name != "softmax, written out" or N <= WRITTEN_OUT]


def time_forms(report: Report, device: torch.device, rate: float) -> dict[str, list[float]]:
    """Seconds of each form at each length (the 10th percentile, which other work on the machine disturbs least)."""
    times = {}
    for name, form in forms().items():
        for N in lengths_of(name):
            timing = measure(form, [make(N, device)], device=device, seconds=0.2, min_calls=3)
            work = {"flops": operations(name, N), "limit": rate, "tokens": N}
            report.add(f"{name}, N = {N:,}", timing, case=f"N = {N:,}", contestant=name, **work)
            times.setdefault(name, []).append(timing.p10)
    return times


def memory_of_forms(device: torch.device) -> dict[str, dict[str, list[float]]]:
    """Peak MiB beyond the inputs, of a forward pass and of a forward and a backward pass."""
    kinds = {"forward: peak MiB": False, "forward and backward: peak MiB": True}
    return {
        kind: {
            name: [peak_bytes(form, make(N, device), backward=backward) / 2**20 for N in lengths_of(name)]
            for name, form in forms().items()
            if name != "softmax, fused"
        }
        for kind, backward in kinds.items()
    }


def decode(report: Report, device: torch.device) -> None:
    """Time of one more token from a state, after texts of different lengths."""
    limit = copy_rate(device)
    for N in (LENGTHS[0], LENGTHS[-1]):
        state = linear_attention.LinearState()
        state.attend(*make(N, device))
        token = make(1, device)
        timing = measure(state.attend, [token], device=device, seconds=0.3)
        other = LENGTHS[-1] if LENGTHS[0] == N else LENGTHS[0]
        work = {"bytes": 2 * state.sums.nbytes, "limit": limit, "tokens": N, "state_bytes": state.sums.nbytes}
        names = {"case": "one token", "contestant": f"from a state of {N:,}"}
        peer = f"one token from a state of {other:,}"
        report.add(f"one token from a state of {N:,}", timing, peer=peer, **names, **work)


def make(N: int, device: torch.device) -> tuple[Tensor, ...]:
    """q, k and v of one head: (1, 1, N, HEAD_DIM) each."""
    return tuple(torch.randn(3, 1, 1, N, HEAD_DIM, device=device).unbind(0))


def slope(x, y) -> float:
    """The slope of the last three points on logarithmic axes."""
    return round(math.log(y[-1] / y[-3]) / math.log(x[len(y) - 1] / x[len(y) - 3]), 3)


def peak_bytes(fn: Callable, inputs: tuple[Tensor, ...], *, backward: bool = False) -> int:
    """The most bytes that were allocated at once during a call, beyond what was there before it."""
    inputs = tuple(x.detach().requires_grad_(backward) for x in inputs)

    def call():
        out = fn(*inputs)
        if backward:
            torch.autograd.grad(out.sum(), inputs)

    if inputs[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


if __name__ == "__main__":
    sys.exit(main())
