"""Three bottlenecks, each before and after its repair, with what the roofline promised; and how steady the clock is.

    python -m benchmarks.profiling --device cpu
    python -m benchmarks.profiling --device cuda    # GPT-2's 124M shape; records the kernels of a decode step too
    python -m benchmarks.profiling --device cuda --servers    # a naive cache and the paged engine, over one window

The theory: an operator takes at least as long as its arithmetic, its memory traffic, or its launch, whichever is
longest. A decode step of a small model has a hundred operators that do little, so launches decide; the repair is one
launch for all (a CUDA graph) or more work for each (a batch). A softmax written as five operators moves 8 times its
matrix, written as one 2 times. Keys that are transposed and copied before each use move 3 times instead of once.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import (
    Options,
    Report,
    command_line,
    compare,
    copies_past_cache,
    copy_rate,
    launch_seconds,
    matmul_rate,
    measure,
    noise,
    profiled,
)
from benchmarks.kv_cache import GPT2, SMALL
from tformer_lib import positional_encoding, profiling
from tformer_lib.generation import StaticStep, decode_step, generate, prefill
from tformer_lib.kv_cache import CacheShape, PreallocatedCache, pass_cost
from tformer_lib.transformer import Decoder

CONTEXT, CAPACITY = 512, 1056
"""Tokens in the cache when a decode step is looked at, and those that it has room for."""


PEERS = ("eager", "CUDA graph", "fused softmax", "unfused softmax", "keys in order", "keys copied")


@dataclass(frozen=True)
class ProfilingOptions(Options):
    """The bottlenecks, or what a profiler or a page wants instead."""

    nvtx: bool = False
    """Measure nothing: run both softmaxes and a copy, once, for a profiler."""
    servers: bool = False
    """Instead, record two servers over the same window, into profiling-servers.json."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command_line(run, arguments, options=ProfilingOptions, topic="profiling", description=__doc__)


def run(args: ProfilingOptions) -> None:
    """The limits, the noise, the three bottlenecks; on a GPU also the recordings of its kernels."""
    if args.nvtx:
        return for_profiler(torch.device(args.device))
    if args.servers:
        return servers(torch.device(args.device), args.out)
    report = Report("profiling", args.device, args.out, peers=PEERS)
    limits(report)
    for stage in (decoding, softmax, transposed_keys, steadiness, ranges_off):
        stage(report)
        report.save()
    report.finish()


def for_profiler(device: torch.device) -> None:
    """The second and the third bottleneck, one call each, inside the NVTX range that profilers look for."""
    size, S = (16384, 4096) if device.type == "cuda" else (256, 64)
    x = torch.randn(size, size, device=device).to(dtype_of(device))
    q, k, v = (torch.randn(8, n, 32, 128, device=device).to(dtype_of(device)) for n in (1, S, S))
    calls = ((unfused_softmax, x), (fused_softmax, x), (with_copies, q.transpose(1, 2), k, v))
    profiled(lambda: [fn(*inputs) for fn, *inputs in calls], device=device, warmup=1)


def dtype_of(device: torch.device) -> torch.dtype:
    """What a device is measured in."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def limits(report: Report) -> None:
    """Note the roofline of the device: the rates of a product and of a copy, and the cost of a launch."""
    report.dtype = dtype_of(report.device)
    report.roofline = profiling.Roofline(
        matmul_rate(report.device, report.dtype), copy_rate(report.device), launch_seconds(report.device)
    )
    report.note(
        dtype=str(report.dtype),
        matmul_flops_per_second=report.roofline.flops_per_second,
        copy_bytes_per_second=report.roofline.bytes_per_second,
        launch_seconds=report.roofline.launch_seconds,
    )


@torch.no_grad()
def decoding(report: Report) -> None:
    """A decode step over the batch, kernel by kernel; on a GPU also recorded in a CUDA graph."""
    gpu = report.device.type == "cuda"
    model = Decoder(GPT2 if gpu else SMALL).to(report.device, report.dtype).eval()
    kinds = {"eager": eager, "eager, unchecked": unchecked, "CUDA graph": recorded} if gpu else {"eager": eager}
    recordings = {}
    for kind, make in kinds.items():
        for batch in (1,) if kind == "eager, unchecked" else (1, 2, 4, 8, 16, 32) if gpu else (1, 4, 16):
            step, tokens, cache = make(model, batch)
            call = returning(step, tokens, cache)
            timing = measure(call, device=report.device, seconds=1.0 if gpu and batch == 1 else 0.3, min_calls=5)
            work = pass_cost(model.config, held=CONTEXT, new=1, itemsize=report.dtype.itemsize)
            more_rows = (batch - 1) * (CONTEXT + 1) * CacheShape.of(model, 1).bytes_per_token  # the weights are shared
            title = f"decode step, {kind}, batch {batch}"
            facts = {"kind": kind, "batch": batch, "flops_of_products": batch * work.flops}
            facts |= {"case": f"decode step, batch {batch}", "contestant": kind}
            facts |= {"alone": None if gpu else "a CPU has no graph to replay"}
            report.add(title, timing, bytes=work.bytes + more_rows, limit=report.roofline.bytes_per_second, **facts)
            if batch == 1:
                recordings[kind] = record_steps(report, kind, call)
    report.attach(decode_recordings=recordings)


def eager(model: Decoder, batch: int) -> tuple[Callable, Tensor, PreallocatedCache]:
    """A step that launches its kernels one by one, on a cache that holds ``CONTEXT`` tokens a row."""
    cache = filled(model, batch)
    return decode_step(model, cache), torch.zeros(batch, 1, dtype=torch.int64, device=cache.lengths.device), cache


def unchecked(model: Decoder, batch: int) -> tuple[Callable, Tensor, PreallocatedCache]:
    """The eager step without the check that positions fit the table, which waits for the GPU twice a step."""
    step, tokens, cache = eager(model, batch)

    def without_check(tokens: Tensor) -> Tensor:
        kept, positional_encoding.check_in_table = positional_encoding.check_in_table, lambda *a: None
        try:
            return step(tokens)
        finally:
            positional_encoding.check_in_table = kept

    return without_check, tokens, cache


def recorded(model: Decoder, batch: int) -> tuple[Callable, Tensor, PreallocatedCache]:
    """The same step, recorded in a CUDA graph."""
    cache = PreallocatedCache(CacheShape.of(model, batch), CAPACITY)
    step = StaticStep(model, cache)
    fill(model, cache)
    return step, torch.zeros(batch, 1, dtype=torch.int64, device=cache.lengths.device), cache


def filled(model: Decoder, batch: int) -> PreallocatedCache:
    """A cache with ``CONTEXT`` tokens in each row."""
    cache = PreallocatedCache(CacheShape.of(model, batch), CAPACITY)
    fill(model, cache)
    return cache


def fill(model: Decoder, cache: PreallocatedCache) -> None:
    """Prefill random tokens, in chunks so that their logits stay small."""
    batch = cache.lengths.shape[0]
    prefill(model, torch.randint(model.config.vocab_size, (batch, CONTEXT)).tolist(), cache, chunk=128)


def returning(step: Callable, tokens: Tensor, cache: PreallocatedCache) -> Callable[[], Tensor]:
    """One step that starts again at ``CONTEXT`` once the cache is full."""

    def call() -> Tensor:
        if max(cache.host_lengths) >= CAPACITY:
            cache.truncate([CONTEXT] * len(cache.host_lengths))
        return step(tokens)

    return call


def record_steps(report: Report, kind: str, call: Callable, steps: int = 4) -> dict:
    """The intervals of a few steps, recorded without the host's operators, which would slow it; and their phases.

    The first trace of a process is thrown away: it starts the profiler's library. So is the first step of each trace.
    """
    traces = {}
    for operators in (True, True, False):
        with profiling.trace(operators=operators) as traces[operators]:
            for _ in range(steps + 1):
                call()
    intervals = without_first(traces[False].intervals(), steps + 1)
    window, with_operators = end_of(intervals), end_of(without_first(traces[True].intervals(), steps + 1))
    busy = profiling.utilisation(intervals, 0, window)
    print(f"{kind}: {steps} steps in {window:.0f} us, {with_operators:.0f} us when the host's operators are recorded")
    print(traces[False].table(14), flush=True)
    launches = round(traces[False].launches() * steps / (steps + 1))
    facts = {"steps": steps, "launches": launches, "kernels": len(intervals), "utilisation": busy}
    facts |= {"window_us_with_operators": with_operators, "phases": traces[True].phases()}
    return profiling.pack(intervals, window) | facts


def without_first(intervals: list[dict], steps: int) -> list[dict]:
    """The intervals of all steps but the first, which all have as many; time counts from the first that is left."""
    kept = intervals[len(intervals) // steps :]
    return [i | {"start_us": round(i["start_us"] - kept[0]["start_us"], 3)} for i in kept]


def end_of(intervals: list[dict]) -> float:
    """When the last interval ends, in microseconds from the start of the first."""
    return max(i["start_us"] + i["duration_us"] for i in intervals)


def record_call(fn: Callable, inputs: list[tuple]) -> dict:
    """The intervals of one call that was not the first."""
    with profiling.trace() as trace:
        for _ in range(2):
            fn(*inputs[0])
    second = without_first(trace.intervals(), 2)
    return profiling.pack(second, end_of(second))


def unfused_softmax(x: Tensor) -> Tensor:
    """Softmax over the last dimension, an operator a line: (rows, columns) -> the same."""
    x = x - x.amax(-1, keepdim=True)  # reads the matrix twice, writes it once
    x = x.exp()  # reads, writes
    return x / x.sum(-1, keepdim=True)  # reads twice, writes once


def fused_softmax(x: Tensor) -> Tensor:
    """The same in one operator, which reads the matrix and writes it."""
    return x.softmax(-1)


def softmax(report: Report) -> None:
    """Both, on scores far larger than the cache."""
    size = 16384 if report.device.type == "cuda" else 3072
    inputs = copies_past_cache(
        lambda: (torch.randn(size, size, device=report.device, dtype=report.dtype),), report.device, most=3
    )
    for fn in (unfused_softmax, fused_softmax):
        add_by_bytes(report, "softmax", fn.__name__.replace("_", " "), fn, inputs, size=size)


def add_by_bytes(report: Report, case: str, contestant: str, fn: Callable, inputs: list[tuple], **facts) -> None:
    """Time a function, and put beside it the bytes that its operators move and what the roofline makes of them."""
    with profiling.count() as work:
        fn(*inputs[0])
    timing = measure(fn, inputs, device=report.device, seconds=0.4, min_calls=3)
    predicted = report.roofline.seconds(work.flops, work.bytes, work.calls)
    facts |= {"operators": work.calls, "predicted_seconds": predicted, "recording": record_call(fn, inputs)}
    name = contestant if case in contestant else f"{case}, {contestant}"
    facts |= {"case": case, "contestant": contestant}
    report.add(name, timing, bytes=work.bytes, limit=report.roofline.bytes_per_second, **facts)


def with_copies(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one query over keys stored as (batch, S, heads, head_dim), copied into the order of the kernel."""
    k, v = (x.transpose(1, 2).contiguous() for x in (k, v))  # (batch, heads, S, head_dim)
    return F.scaled_dot_product_attention(q, k, v)


def with_views(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same over the same tensors, transposed by their strides alone."""
    return F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2))


def in_order(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same over keys stored as (batch, heads, S, head_dim) in the first place, as the course's caches do."""
    return F.scaled_dot_product_attention(q, k, v)


def transposed_keys(report: Report) -> None:
    """One query a row over a cache that is larger than the processor's."""
    gpu = report.device.type == "cuda"
    batch, heads, S, head_dim = (8, 32, 4096, 128) if gpu else (1, 8, 8192, 64)

    def make(order: tuple[int, int]) -> list[tuple]:
        shape = (batch, *order, head_dim)
        new = lambda *shape: torch.randn(shape, device=report.device, dtype=report.dtype)  # noqa: E731
        return copies_past_cache(
            lambda: (new(batch, heads, 1, head_dim), new(*shape), new(*shape)), report.device, most=8
        )

    sizes = {"batch": batch, "heads": heads, "S": S, "head_dim": head_dim}
    for title, fn, order in (
        ("keys copied", with_copies, (S, heads)),
        ("keys viewed", with_views, (S, heads)),
        ("keys in order", in_order, (heads, S)),
    ):
        add_by_bytes(report, "attention", title, fn, make(order), **sizes)


def servers(device: torch.device, out: Path | None, window_us: float = 30_000.0) -> None:
    """A naive cache and the paged engine on the same requests: what the GPU does in a window in the middle of decoding.

    Written to profiling-servers.json. The first trace of each is thrown away.
    """
    from benchmarks import serving

    report = Report("profiling-servers", device, out)
    model, requests = serving.llama(device.type), serving.workload()
    step = serving.naive_step(model, [prompt for prompt, _ in requests[: serving.ROWS_RESERVED]])
    report.attach(naive=watch(step, window_us) | {"rows_of_a_step": serving.ROWS_RESERVED})
    engine = serving.make_engine(model, max_num_seqs=serving.REQUESTS)
    for prompt, new in requests:
        engine.add(prompt, {"max_new_tokens": new})
    while len(engine.log) < 300:
        engine.step()
    found, latest = watch(engine.step, window_us), list(engine.log)[-20:]
    report.attach(paged=found | {"rows_of_a_step": round(sum(step.samples for step in latest) / len(latest))})
    for name, recording in report.facts.items():
        facts = {key: value for key, value in recording.items() if key not in ("names", "rows")}
        print(f"{name}: {facts}\n{profiling.time_table(profiling.totals(profiling.unpack(recording)))}", flush=True)
    report.save()


def watch(step: Callable[[], object], window_us: float) -> dict:
    """The kernels of a window that opens a little after a trace begins, and the seconds of a step with no profiler."""
    enough = 1.4 * window_us / 1e6
    seconds = steps_for(step, enough) / 1e6
    for _ in range(2):
        with profiling.trace(operators=False) as trace:
            steps_for(step, enough)
    intervals = trace.intervals()
    print(f"  {len(intervals)} kernels in {end_of(intervals):.0f} us", flush=True)
    begin = min(0.2 * window_us, max(0.0, end_of(intervals) - window_us))
    moved = [i | {"start_us": round(i["start_us"] - begin, 3)} for i in intervals]
    packed = profiling.pack(moved, window_us, digits=1, name=kind_of_kernel)
    busy = profiling.utilisation(profiling.unpack(packed), 0, window_us)
    return packed | {"seconds_of_a_step": seconds, "utilisation": busy, "kernels": len(packed["rows"])}


def steps_for(step: Callable[[], object], seconds: float) -> float:
    """Take steps for so long, and return the microseconds of one."""
    torch.cuda.synchronize()
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        step()
        count += 1
    torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - begin) / count


KINDS = {
    "matrix products": ("gemm", "nvjet", "cutlass", "gemv", "splitk", "product_kernel"),
    "copying the cache": ("catarray",),
    "attention": ("decode_kernel", "prefill_kernel", "fmha", "flash", "sdpa", "softmax"),
}


def kind_of_kernel(name: str) -> str:
    """What a kernel is for, told by its name."""
    return next((kind for kind, words in KINDS.items() if any(word in name.lower() for word in words)), "others")


def steadiness(report: Report) -> None:
    """The same measurement many times, of a short and of a longer operator; and a ratio of a function to itself."""
    size = 1024 if report.device.type == "cuda" else 256
    small, large = (torch.randn(n, n, device=report.device, dtype=report.dtype) for n in (size, 4 * size))
    found = {}
    for name, x in (("a short product", small), ("a longer product", large)):
        found[name] = noise(lambda x=x: x @ x, device=report.device, seconds=0.05, warmup=0.02)
    itself = compare(lambda: large @ large, lambda: large @ large, device=report.device)
    found["a product beside itself"] = {"ratio": itself.median, "p10": itself.p10, "p90": itself.p90}
    for name, facts in found.items():
        print(f"  noise of {name}: { ({k: v for k, v in facts.items() if k != 'medians'}) }", flush=True)
    report.attach(noise=found)


def ranges_off(report: Report) -> None:
    """What the ranges of a decode loop cost when nobody listens, as a share of the loop."""
    model, tokens, opened = Decoder(SMALL).to(report.device).eval(), 16, []
    prompt = list(range(32))
    with profiling.listening(lambda name: opened.append(name) or profiling.OFF):
        generate(model, [prompt], max_new_tokens=tokens)
    loop = measure(lambda: generate(model, [prompt], max_new_tokens=tokens), device=report.device, seconds=0.6)
    many = 10_000

    def ranges() -> None:
        for _ in range(many):
            with profiling.range("nothing"):
                pass

    each = measure(ranges, seconds=0.3).median / many
    report.note(
        ranges_in_a_decode_loop=len(opened),
        seconds_of_a_range_when_off=each,
        seconds_of_the_decode_loop=loop.median,
        share_of_ranges_when_off=len(opened) * each / loop.median,
    )


if __name__ == "__main__":
    sys.exit(main())
