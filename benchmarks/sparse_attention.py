"""What a window saves over dense attention: time against fused kernels, memory against the scores written out.

    python -m benchmarks.sparse_attention --device cpu
    python -m benchmarks.sparse_attention --device cuda

The theory: dense causal attention takes 2·N²·d operations if it skips the future. A window of w in blocks of b takes
4·N·(w + b)·d, since a row of blocks sees w/b + 1 of them: a gain of N / (2·(w + b)), if both ran at the same rate.
Written out, dense attention holds N² scores; the blocks hold one slice of theirs at a time.

On a GPU the kernels of kernels/sparse_attention are measured, forward and backward, beside FlexAttention and the dense
flash kernel, in turns. Their limit is the rate of a matrix product, over the pairs of the live blocks (128 by 64
pairs).
"""

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Options, Report, building, command_line, in_turns, matmul_rate, measure
from benchmarks.linear_attention import faster_from, make, peak_bytes
from tformer_lib import sparse_attention
from tformer_lib.attention import attend
from tformer_lib.flash_attention import flash_attention
from tformer_lib.sparse_attention import Pattern, attend_chosen

HEAD_DIM, TOKENS, WINDOW, BLOCK = 64, 16384, 512, 128
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
KERNEL_HEADS, KERNEL_HEAD_DIM = 16, 128
CHOSEN_TOKENS, CHOSEN_HEADS, CHOSEN_BLOCKS = 65536, 4, 64
TURN_SECONDS = 0.02
BUILDS = (1, 2, "backward", "backward_tensor_core")


PEERS = ("dense causal, fused", "causal", f"window of {WINDOW}")
"""Of what a CPU measures."""

KERNEL_PEERS = ("FlexAttention", "our flash kernel", "dense, our flash kernel", "step 2", "step 1", "chosen blocks")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command_line(run, arguments, topic="sparse_attention", description=__doc__)


def run(args: Options) -> None:
    """The claim at 16,384 tokens, then the growth with the length and the patterns side by side."""
    device = torch.device(args.device)
    report = Report("sparse_attention", device, args.out, peers=KERNEL_PEERS if device.type == "cuda" else PEERS)
    if device.type == "cuda":
        with building(report, "sparse_attention", BUILDS):
            kernels(report)
        report.finish()
        return
    rate = matmul_rate(device, torch.float32)
    sizes = {"tokens": TOKENS, "window": WINDOW, "block": BLOCK, "head_dim": HEAD_DIM}
    report.note(**sizes, matmul_flops_per_second=rate, lengths=list(LENGTHS))
    seconds = time_lengths(report, device, rate)
    ratio = seconds["dense, fused"][-1] / seconds["window"][-1]
    report.note(
        milliseconds={name: [1e3 * t for t in ts] for name, ts in seconds.items()}, times_faster=round(ratio, 2)
    )
    report.note(predicted_times_faster=TOKENS / (2 * (WINDOW + BLOCK)))
    starts = {
        name: faster_from(LENGTHS, ts, seconds["dense, fused"]) for name, ts in seconds.items() if "window" in name
    }
    report.note(faster_from=starts, predicted_faster_from=2 * (WINDOW + BLOCK))
    peak = memory(device)
    report.note(peak_mib=peak, memory_share=peak["window"][-1] / peak["dense, written out"][-1])
    patterns(report, device, rate)
    report.finish()


def window(q, k, v):
    """The form that is measured."""
    return sparse_attention.attend(q, k, v, pattern=sparse_attention.sliding_window(WINDOW), block=BLOCK)


def twin(q, k, v):
    """The same by the C++ twin of the kernels."""
    return sparse_attention.attend(q, k, v, pattern=sparse_attention.sliding_window(WINDOW), step="cpu")


def fused(q, k, v):
    """Dense causal attention by PyTorch's fused kernel."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def naive(q, k, v):
    """Dense causal attention with all its scores written out."""
    return attend(q, k, v, causal=True)


def time_lengths(report: Report, device: torch.device, rate: float) -> dict[str, list[float]]:
    """Median seconds over the length; the plan of each length is made in the warm-up, and timed by itself."""
    seconds = {"dense, fused": [], "window": [], "window, C++": []}
    for N in LENGTHS:
        inputs = [make(N, device)]
        live = int(sparse_attention.sliding_window(WINDOW).layout(N, block=BLOCK).sum())
        dense = measure(fused, inputs, device=device, seconds=0.3, min_calls=3)
        sparse = measure(window, inputs, device=device, seconds=0.3, min_calls=3)
        facts = {"case": f"N = {N:,}", "limit": rate, "tokens": N}
        row = f"dense causal, fused, N = {N:,}"
        report.add(row, dense, contestant="dense causal, fused", flops=2 * N * N * HEAD_DIM, **facts)
        facts |= {"flops": 4 * live * BLOCK**2 * HEAD_DIM, "live_blocks": live}
        report.add(f"window of {WINDOW}, N = {N:,}", sparse, contestant=f"window of {WINDOW}", **facts)
        compiled = measure(twin, inputs, device=device, seconds=0.3, min_calls=3)
        name = f"window of {WINDOW}, C++ twin"
        report.add(f"{name}, N = {N:,}", compiled, contestant=name, **facts)
        for name, timing in zip(seconds, (dense, sparse, compiled), strict=True):
            seconds[name].append(timing.median)
    make_plan = sparse_attention.plan.__wrapped__
    pattern = sparse_attention.sliding_window(WINDOW)
    planned = measure(make_plan, [(pattern, TOKENS, TOKENS, BLOCK, device)], device=device, min_calls=3)
    names = {"case": f"N = {TOKENS:,}", "contestant": "making the plan, once"}
    peer, why = (
        f"window of {WINDOW}, N = {TOKENS:,}",
        "a list is made on a host: neither arithmetic nor bandwidth decides",
    )
    row = f"making the plan, once, N = {TOKENS:,}"
    report.add(row, planned, peer=peer, unbounded=why, tokens=TOKENS, **names)
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
        facts = {"case": f"patterns at {N:,} tokens", "contestant": name, "tokens": N, "live_blocks": live}
        alone = "it is what the patterns are compared with" if name == "causal" else None
        report.add(name, timing, flops=4 * live * BLOCK**2 * HEAD_DIM, limit=rate, alone=alone, **facts)


# On a GPU.


def kernels(report: Report) -> None:
    """The kernels beside their peers, over patterns, windows of growing width, and chosen blocks."""
    rate = matmul_rate(report.device, torch.bfloat16)
    report.note(
        heads=KERNEL_HEADS, head_dim=KERNEL_HEAD_DIM, tokens=TOKENS, dtype="bfloat16", matmul_flops_per_second=rate
    )
    causal = sparse_attention.causal()
    big_bird = sparse_attention.big_bird(TOKENS, block=128, random_blocks=3)
    named = {
        f"window {WINDOW}": sparse_attention.sliding_window(WINDOW),
        "BigBird, blocks of 128, 3 random": big_bird,
        f"window {WINDOW} and 4 sinks": sparse_attention.sliding_window(WINDOW)
        | (sparse_attention.global_tokens(range(4)) & causal),
        "documents of 1,024, causal": sparse_attention.Segments(1024) & causal,
        "causal": causal,
    }
    for name, pattern in named.items():
        measure_pattern(report, rate, name, pattern, flex_mask(name, big_bird))
    measure_growth(report, rate)
    measure_chosen(report, rate)


def flex_mask(name: str, big_bird: sparse_attention.BlockPattern) -> Callable | None:
    """The same pattern in FlexAttention's words, for those that are compared."""
    if name.startswith("BigBird"):
        table = big_bird.table.cuda()
        return lambda b, h, q, k: table[q // 128, k // 128]
    if name == f"window {WINDOW}":
        return lambda b, h, q, k: (q >= k) & (q - k < WINDOW)
    return None


def fresh(tokens: int, heads: int, count: int) -> list[Tensor]:
    """(1, heads, tokens, head_dim) of random numbers."""
    shape = (1, heads, tokens, KERNEL_HEAD_DIM)
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(count)]


def both_ways(forward: Callable[..., Tensor], inputs: list[Tensor], dout: Tensor) -> tuple[Callable, Callable]:
    """The forward alone, and the backward alone of one forward that was done before."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = forward(*leaves)
    return lambda: forward(*inputs), lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def measure_pattern(report: Report, rate: float, name: str, pattern: Pattern, flex: Callable | None) -> None:
    """Each step, forward and backward, beside FlexAttention and the flash kernel where they know the pattern."""
    *inputs, dout = fresh(TOKENS, KERNEL_HEADS, 4)
    live = sparse_attention.pattern_lists(pattern, TOKENS, TOKENS, inputs[0].device).live
    forms = {
        f"step {step}": lambda q, k, v, s=step: sparse_attention.attend(q, k, v, pattern=pattern, step=s)
        for step in (1, 2)
    }
    if name == f"window {WINDOW}":
        forms["our flash kernel"] = lambda q, k, v: flash_attention(q, k, v, window=WINDOW)
    if name == "causal":
        forms["our flash kernel"] = lambda q, k, v: flash_attention(q, k, v, causal=True)
    if flex is not None:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        mask = create_block_mask(flex, None, None, TOKENS, TOKENS, device="cuda")
        compiled = torch.compile(flex_attention)
        forms["FlexAttention"] = lambda q, k, v: compiled(q, k, v, block_mask=mask)
    ways = {form: both_ways(forward, inputs, dout) for form, forward in forms.items()}
    contestants = {f"{form}, forward": way[0] for form, way in ways.items()}
    contestants |= {f"{form}, backward": way[1] for form, way in ways.items() if form != "step 1"}
    pairs = KERNEL_HEADS * live * 128 * 64
    share = live * 128 * 64 / TOKENS**2
    for contestant, (timing, turns) in in_turns(contestants, seconds=TURN_SECONDS).items():
        products = 5 if contestant.endswith("backward") else 2
        flops = 2 * products * pairs * KERNEL_HEAD_DIM
        who, way = contestant.rsplit(", ", 1)
        names = {"name": f"{name}: {contestant}", "case": f"{name}, {way}", "contestant": who}
        lonely = sum(other.endswith(way) for other in contestants) == 1
        names |= {"alone": "nothing else that is measured here has gradients for this pattern"} if lonely else {}
        report.add(timing=timing, flops=flops, limit=rate, live_share=share, milliseconds_of_turns=turns, **names)


def measure_growth(report: Report, rate: float) -> None:
    """Windows of growing width: time over live blocks, and the slope of a straight line through them."""
    *inputs, dout = fresh(TOKENS, KERNEL_HEADS, 4)
    work, times = [], {"forward": [], "backward": []}
    for width in (512, 1024, 2048, 4096, 8192):
        pattern = sparse_attention.sliding_window(width)
        live = sparse_attention.pattern_lists(pattern, TOKENS, TOKENS, inputs[0].device).live
        ways = both_ways(lambda q, k, v, p=pattern: sparse_attention.attend(q, k, v, pattern=p), inputs, dout)
        found = in_turns(dict(zip(times, ways, strict=True)), seconds=TURN_SECONDS)
        work.append(live)
        for way, products in (("forward", 2), ("backward", 5)):
            timing, turns = found[way]
            times[way].append(timing.median)
            flops = 2 * products * KERNEL_HEADS * live * 128 * 64 * KERNEL_HEAD_DIM
            peer = None if width == WINDOW else f"window {WINDOW}: {way}"
            report.add(
                timing=timing,
                case=f"window {width}",
                contestant=way,
                peer=peer,
                alone=None if peer else "it is what the wider windows are compared with",
                flops=flops,
                limit=rate,
                live_blocks=live,
                milliseconds_of_turns=turns,
            )
    lines = {way: straight_line(work, [1e6 * t for t in ts]) for way, ts in times.items()}
    report.note(microseconds_per_live_block={way: line[0] for way, line in lines.items()})
    report.note(microseconds_at_no_blocks={way: line[1] for way, line in lines.items()})


def straight_line(x: list[float], y: list[float]) -> tuple[float, float]:
    """Slope and intercept of the least squares line."""
    A = torch.tensor([[value, 1.0] for value in x], dtype=torch.float64)
    return tuple(torch.linalg.lstsq(A, torch.tensor(y, dtype=torch.float64)[:, None]).solution[:, 0].tolist())


def measure_chosen(report: Report, rate: float) -> None:
    """Blocks that the device chose, beside dense attention by the flash kernel: how much faster, how much less work."""
    *inputs, dout = fresh(CHOSEN_TOKENS, CHOSEN_HEADS, 4)
    shape = (1, CHOSEN_HEADS, CHOSEN_TOKENS // 128, CHOSEN_TOKENS // 64)
    chosen = torch.rand(shape, device="cuda").topk(CHOSEN_BLOCKS, dim=-1).indices
    ways = {
        "chosen blocks": both_ways(lambda q, k, v: attend_chosen(q, k, v, chosen), inputs, dout),
        "dense, our flash kernel": both_ways(lambda q, k, v: flash_attention(q, k, v), inputs, dout),
    }
    contestants = {
        f"{form}, {way}": call
        for form, pair in ways.items()
        for way, call in zip(("forward", "backward"), pair, strict=True)
    }
    seconds = {}
    for contestant, (timing, turns) in in_turns(contestants, seconds=TURN_SECONDS).items():
        keys = CHOSEN_BLOCKS * 64 if contestant.startswith("chosen") else CHOSEN_TOKENS
        products = 5 if contestant.endswith("backward") else 2
        flops = 2 * products * CHOSEN_HEADS * CHOSEN_TOKENS * keys * KERNEL_HEAD_DIM
        who, way = contestant.rsplit(", ", 1)
        row = f"{CHOSEN_TOKENS:,} tokens: {contestant}"
        names = {"case": f"{CHOSEN_TOKENS:,} tokens, {way}", "contestant": who}
        report.add(row, timing, flops=flops, limit=rate, heads=CHOSEN_HEADS, milliseconds_of_turns=turns, **names)
        seconds[contestant] = timing.median
    work = CHOSEN_TOKENS / (CHOSEN_BLOCKS * 64)
    for way in ("forward", "backward"):
        faster = seconds[f"dense, our flash kernel, {way}"] / seconds[f"chosen blocks, {way}"]
        report.note(**{f"chosen_{way}": {"times_faster": faster, "times_less_work": work}})


if __name__ == "__main__":
    sys.exit(main())
