"""What a window saves over dense attention: time against fused kernels, memory against the scores written out.

    python -m benchmarks.sparse_attention --device cpu

The theory: dense causal attention takes 2·N²·d operations if it skips the future. A window of w in blocks of b takes
4·N·(w + b)·d, since a row of blocks sees w/b + 1 of them: a gain of N / (2·(w + b)), if both ran at the same rate.
Written out, dense attention holds N² scores; the blocks hold one slice of theirs at a time.
"""

import argparse

import torch
from torch.nn import functional as F

from benchmarks.harness import Report, matmul_rate, measure
from benchmarks.linear_attention import make, peak_bytes
from tformer_lib import sparse_attention
from tformer_lib.attention import attend

HEAD_DIM, TOKENS, WINDOW, BLOCK = 64, 16384, 512, 128
LENGTHS = (2048, 4096, 8192, 16384)


def main() -> None:
    """The claim at 16,384 tokens, then the growth with the length and the patterns side by side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    device = torch.device(parser.parse_args().device)
    report = Report("sparse_attention", device)
    rate = matmul_rate(device, torch.float32)
    sizes = {"tokens": TOKENS, "window": WINDOW, "block": BLOCK, "head_dim": HEAD_DIM}
    report.note(**sizes, matmul_flops_per_second=rate, lengths=list(LENGTHS))
    seconds = time_lengths(report, device, rate)
    ratio = seconds["dense, fused"][-1] / seconds["window"][-1]
    report.note(
        milliseconds={name: [1e3 * t for t in ts] for name, ts in seconds.items()}, times_faster=round(ratio, 2)
    )
    report.note(predicted_times_faster=TOKENS / (2 * (WINDOW + BLOCK)))
    peak = memory(device)
    report.note(peak_mib=peak, memory_share=peak["window"][-1] / peak["dense, written out"][-1])
    patterns(report, device, rate)
    report.finish()


def window(q, k, v):
    """The form that is measured."""
    return sparse_attention.attend(q, k, v, pattern=sparse_attention.sliding_window(WINDOW), block=BLOCK)


def fused(q, k, v):
    """Dense causal attention by PyTorch's fused kernel."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def naive(q, k, v):
    """Dense causal attention with all its scores written out."""
    return attend(q, k, v, causal=True)


def time_lengths(report: Report, device: torch.device, rate: float) -> dict[str, list[float]]:
    """Median seconds over the length; the plan of each length is made in the warm-up, and timed by itself."""
    seconds = {"dense, fused": [], "window": []}
    for N in LENGTHS:
        inputs = [make(N, device)]
        live = int(sparse_attention.sliding_window(WINDOW).layout(N, block=BLOCK).sum())
        dense = measure(fused, inputs, device=device, seconds=0.3, min_calls=3)
        sparse = measure(window, inputs, device=device, seconds=0.3, min_calls=3)
        report.add(f"dense causal, fused, N = {N:,}", dense, flops=2 * N * N * HEAD_DIM, limit=rate, tokens=N)
        flops = 4 * live * BLOCK**2 * HEAD_DIM
        report.add(f"window of {WINDOW}, N = {N:,}", sparse, flops=flops, limit=rate, tokens=N, live_blocks=live)
        seconds["dense, fused"].append(dense.median)
        seconds["window"].append(sparse.median)
    make_plan = sparse_attention.plan.__wrapped__
    pattern = sparse_attention.sliding_window(WINDOW)
    planned = measure(make_plan, [(pattern, TOKENS, TOKENS, BLOCK, device)], device=device, min_calls=3)
    report.add(f"making the plan, once, N = {TOKENS:,}", planned, tokens=TOKENS)
    return seconds


def memory(device: torch.device) -> dict[str, list[float]]:
    """Peak MiB beyond the inputs over the length; the window's includes making its plan."""
    peaks = {"dense, written out": [], "window": [], "window, with backward": []}
    for N in LENGTHS:
        inputs = make(N, device)
        for name, form, backward in zip(peaks, (naive, window, window), (False, False, True), strict=True):
            sparse_attention.plan.cache_clear()
            peaks[name].append(peak_bytes(form, inputs, backward=backward) / 2**20)
    return peaks


def patterns(report: Report, device: torch.device, rate: float) -> None:
    """Several patterns of about the same density, at 8,192 tokens: time follows the live blocks."""
    N, causal = 8192, sparse_attention.causal()
    inputs = [make(N, device)]
    named = {
        "sliding window 512": sparse_attention.sliding_window(512),
        "dilated 128 by 4": sparse_attention.dilated(128, 4),
        "window 512 and 4 global tokens": sparse_attention.sliding_window(512)
        | (sparse_attention.global_tokens(range(4)) & causal),
        "strided 128": sparse_attention.strided(128),
        "fixed 512, 32": sparse_attention.fixed(512, 32),
        "BigBird, 3 random blocks": sparse_attention.big_bird(N, block=BLOCK, random_blocks=3),
        "causal": causal,
    }
    for name, pattern in named.items():
        live = int(pattern.layout(N, block=BLOCK).sum())
        form = lambda q, k, v, p=pattern: sparse_attention.attend(q, k, v, pattern=p, block=BLOCK)  # noqa: E731
        timing = measure(form, inputs, device=device, seconds=0.3, min_calls=3)
        report.add(name, timing, flops=4 * live * BLOCK**2 * HEAD_DIM, limit=rate, tokens=N, live_blocks=live)


if __name__ == "__main__":
    main()
