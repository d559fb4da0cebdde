"""How fast attention over a block table is, beside dense caches: ``python -m benchmarks.paged_attention``.

Theory. A decode step reads each key and each value once: batch x context x kv_heads x head_dim x 2 numbers. For each it
does 2 x heads / kv_heads operations, 8 at four query heads to a kv head, where the device could do two hundred. So the
limit is memory, and the rate is bytes of K and V over time. The limit beside each row is the device's copy rate (read
plus written) in the same run; a stream that only reads may pass it, which is why its rate is noted too.

Prefill is limited by arithmetic, like flash attention: its limit is the rate of a large matrix product.

On a GPU the script measures decode (steps 1 and 2) as a call from Python and as a replayed CUDA graph, beside torch's
attention over dense caches of the same size, over batches, contexts, ragged rows, block sizes; step 2 in turns with
FlashAttention-3's paged kernel, over ratios of heads, widths and float8; prefill; writing; what single ideas of step 2
buy; and the time that Python takes to launch. On a CPU, the C++ twin beside PyTorch.

FlashAttention-3 is taken from the ``vllm`` wheel (``vllm.vllm_flash_attn``), where it is installed; otherwise its rows
are missing. It reads pools of (blocks, block_size, kv_heads, head_dim), as vLLM lays them out.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import (
    Options,
    Report,
    command_line,
    copy_rate,
    edited_kernel,
    matmul_rate,
    measure,
    measure_graph,
    measure_in_turns,
    profiled,
)
from tformer_lib.paged_attention import FP8, PREFILL_STEPS, blocks_for, write_cache
from tformer_lib.paged_attention import paged_attention as attention

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 16
SECONDS = 0.1  # of each measurement, after as long a warm-up
ROTATE = 2**29  # bytes of keys and values that repeated calls rotate through: ten times the GPU's L2 cache
BF16 = torch.bfloat16
DENSE = {"dense cache, sdpa cudnn": SDPBackend.CUDNN_ATTENTION, "dense cache, sdpa flash": SDPBackend.FLASH_ATTENTION}

STEP_2 = "2_split_kv.cu"
RING, WARPS = "(D == 64 ? 192 : 128) * 1024", "WARPS = 4, THREADS = WARPS * WARP, BLOCKS = D == 64 ? 3 : 2;"
ABLATIONS = {  # what is changed -> edits
    "one block of 4 warps a multiprocessor": [(WARPS, WARPS.replace("D == 64 ? 3 : 2", "1"))],
    "one block of 8 warps a multiprocessor": [
        (WARPS, WARPS.replace("D == 64 ? 3 : 2", "1").replace("WARPS = 4", "WARPS = 8"))
    ],
    "192 KB of ring": [(RING, "192 * 1024")],
    "the table asked when it is needed": [
        ("        copy(K, a.k);\n", "        look_up();\n        copy(K, a.k);\n"),
        ("        look_up();\n    }\n};", "    }\n};"),
        ("    loader.look_up();\n", ""),
    ],
    "without teams": [("int(std::gcd(blocks, bundles_of(*a, Sh::ROWS)))", "1")],
    "without the swizzle": [("((chunk % 8 ^ row % 8) * 16)", "(chunk % 8 * 16)")],
}
MEASURED_ALONE = [  # a changed kernel is built for what is measured, in seconds
    ("case 64: return few ? run(Shape<Number, Cache, 64, 8>{}) : run(Shape<Number, Cache, 64, 16>{});\n", ""),
    (
        "return few ? run(Shape<Number, Cache, 128, 8>{}) : run(Shape<Number, Cache, 128, 16>{});",
        'return few ? run(Shape<Number, Cache, 128, 8>{}) : "not built";',
    ),
    (
        "return a.dtype == BFLOAT16 ? with_shape<Bf16, Fp8>(a, run) : with_shape<Fp16, Fp8>(a, run);",
        'return "not built";',
    ),
    (
        "return a.dtype == BFLOAT16 ? with_shape<Bf16, Bf16>(a, run) : with_shape<Fp16, Fp16>(a, run);",
        'return a.dtype == BFLOAT16 ? with_shape<Bf16, Bf16>(a, run) : "not built";',
    ),
]


def ragged(rows: int, least: int, most: int) -> list[int]:
    """Lengths drawn evenly, the same in every run."""
    return torch.randint(least, most + 1, (rows,), generator=torch.Generator().manual_seed(1)).tolist()


DECODE = {
    "64 x 8,192": [8192] * 64,
    "64 rows of 100 to 16,384": ragged(64, 100, 16384),
    "1 x 32,768": [32768],
    "16 x 2,048": [2048] * 16,
    "1 x 1,024": [1024],
    "64 x 1,024": [1024] * 64,
    "256 x 512": [512] * 256,
    "4 x 131,072": [131072] * 4,
}
PRIMARY = tuple(DECODE)[:4]
BESIDE = {  # decode beside FlashAttention-3: (lengths, what differs from 32 / 8 heads, d 128, bfloat16)
    **{name: (DECODE[name], {}) for name in (*PRIMARY, "256 x 512")},
    "64 x 8,192, d 64": ([8192] * 64, {"d": 64}),
    "64 x 8,192, 64 / 8 heads": ([8192] * 64, {"heads": 64}),
    "16 x 2,048, 64 / 8 heads": ([2048] * 16, {"heads": 64}),
    "64 x 8,192, 16 / 16 heads": ([8192] * 64, {"heads": 16, "kv_heads": 16}),
    "64 x 8,192, 8 / 1 heads": ([8192] * 64, {"heads": 8, "kv_heads": 1}),
    "64 x 8,192, float8": ([8192] * 64, {"cache": FP8}),
    "256 x 2,048, float8": ([2048] * 256, {"cache": FP8}),
    "1 x 32,768, float8": ([32768], {"cache": FP8}),
}
SETS = 12  # of inputs, at most, where FlashAttention-3 needs pools of its own beside them


# --- inputs --------------------------------------------------------------------------------------------------------


def make_rows(
    lengths: Sequence[int],
    *,
    heads: int = HEADS,
    kv_heads: int = KV_HEADS,
    d: int = HEAD_DIM,
    block_size: int = BLOCK_SIZE,
    dtype: torch.dtype = BF16,
    cache: torch.dtype | None = None,
    queries: Sequence[int] | None = None,
    device: str = "cuda",
) -> dict[str, Tensor]:
    """Arguments of ``paged_attention``: rows of these lengths, their blocks shuffled over the whole pool."""
    used = [blocks_for(n, block_size) for n in lengths]
    order = torch.randperm(sum(used), dtype=torch.int32)
    tables = torch.zeros(len(lengths), max(used), dtype=torch.int32)
    for row, blocks in enumerate(order.split(used)):
        tables[row, : len(blocks)] = blocks
    shape = (sum(used), kv_heads, block_size, d)
    k_pool, v_pool = (torch.randn(shape, device=device, dtype=dtype).to(cache or dtype) for _ in range(2))
    counts = [1] * len(lengths) if queries is None else queries
    x = {"q": torch.randn(sum(counts), heads, d, device=device, dtype=dtype), "k_pool": k_pool, "v_pool": v_pool}
    x |= {"block_tables": tables.to(device), "lengths": torch.tensor(lengths, dtype=torch.int32, device=device)}
    if queries is not None:
        starts = torch.tensor([0, *queries]).cumsum(0)
        x["query_starts"] = starts.to(device, torch.int32)
    return x


def kv_bytes(x: dict[str, Tensor]) -> int:
    """Bytes of keys and values that the rows hold."""
    _, kv_heads, _, d = x["k_pool"].shape
    return int(x["lengths"].sum()) * kv_heads * d * 2 * x["k_pool"].element_size()


def rotation(make: Callable[[], dict[str, Tensor]]) -> list[tuple[dict[str, Tensor]]]:
    """Enough input sets that repeated calls find nothing in the cache."""
    first = make()
    return [(first,), *((make(),) for _ in range(min(63, ROTATE // kv_bytes(first))))]


def own(step: int | str | None) -> Callable:
    """One step on a dictionary of arguments."""
    return lambda x: attention(**x, step=step)


# --- GPU -----------------------------------------------------------------------------------------------------------


def time_decode(report: Report, limit: float) -> None:
    """Step 2 as a call and as a graph, step 1, and torch over a dense cache where rows are equally long."""
    for name, lengths in DECODE.items():
        inputs = rotation(lambda lengths=lengths: make_rows(lengths))
        facts = {"bytes": kv_bytes(inputs[0][0]), "limit": limit, "lengths": lengths if len(set(lengths)) > 1 else None}
        calls = {"step 2": own(2)} | ({"step 1": own(1)} if name in PRIMARY else {})
        for contestant, fn in calls.items():
            timing = measure(fn, inputs, device="cuda", seconds=SECONDS)
            report.add(f"decode, {name}: {contestant}", timing, **facts)
        report.add(f"decode, {name}: step 2, CUDA graph", measure_graph(own(2), inputs, seconds=SECONDS), **facts)
        del inputs
        if len(set(lengths)) == 1:
            time_dense(report, name, lengths, facts)
        torch.cuda.empty_cache()


def time_dense(report: Report, name: str, lengths: list[int], facts: dict) -> None:
    """Torch's attention over contiguous caches of the same size."""
    shape = (len(lengths), KV_HEADS, lengths[0], HEAD_DIM)
    q = torch.randn(len(lengths), HEADS, 1, HEAD_DIM, device="cuda", dtype=BF16)
    sets = 1 + min(63, ROTATE // facts["bytes"])
    inputs = [tuple(torch.randn(shape, device="cuda", dtype=BF16) for _ in range(2)) for _ in range(sets)]
    for contestant, backend in DENSE.items():
        with sdpa_kernel(backend):
            fn = lambda k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)  # noqa: E731
            try:
                timing = measure(fn, inputs, device="cuda", seconds=SECONDS)
            except RuntimeError as error:
                report.note(**{f"decode, {name}: {contestant}": str(error).splitlines()[0]})
                continue
        report.add(f"decode, {name}: {contestant}", timing, **facts)


def flash_attention_3(x: dict[str, Tensor]) -> Callable | None:
    """FlashAttention-3's kernel on the same rows, with pools in its own layout, or None where it is not installed."""
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except ImportError:
        return None

    rows = x["lengths"].shape[0]
    pools = [x[name].transpose(1, 2).contiguous() for name in ("k_pool", "v_pool")]
    q, given = x["q"], {"max_seqlen_q": 1, "max_seqlen_k": int(x["lengths"].max()), "causal": True, "fa_version": 3}
    given |= {"cu_seqlens_q": torch.arange(rows + 1, device="cuda", dtype=torch.int32)}
    given |= {"seqused_k": x["lengths"], "block_table": x["block_tables"]}
    if pools[0].dtype == FP8:  # it takes queries in float8 too, and a scale for each row and kv head
        q, scale = q.to(FP8), torch.ones(rows, pools[0].shape[2], device="cuda")
        given |= dict.fromkeys(("q_descale", "k_descale", "v_descale"), scale)
    return lambda: flash_attn_varlen_func(q, *pools, **given)


def time_beside(report: Report, limit: float) -> None:
    """Step 2 in turns with FlashAttention-3."""
    for name, (lengths, options) in BESIDE.items():
        inputs = rotation(lambda lengths=lengths, options=options: make_rows(lengths, **options))[:SETS]
        contestants = {"step 2": (own(2), inputs)}
        if (first := flash_attention_3(inputs[0][0])) is not None:
            calls = [first, *(flash_attention_3(x) for (x,) in inputs[1:])]
            contestants["FlashAttention-3"] = (lambda call: call()), [(call,) for call in calls]
        for contestant, timing in measure_in_turns(contestants, seconds=2 * SECONDS).items():
            facts = {"bytes": kv_bytes(inputs[0][0]), "limit": limit}
            report.add(f"decode in turns, {name}: {contestant}", timing, **facts)
        del contestants, inputs
        torch.cuda.empty_cache()


def time_variety(report: Report, limit: float) -> None:
    """Other layouts of the same 64 x 8,192: block sizes, float8, widths, ratios of heads."""
    variety = {
        **{f"blocks of {n}": {"block_size": n} for n in (1, 8, 32, 64, 256)},
        "float8": {"cache": FP8},
        "head_dim 64": {"d": 64},
        "head_dim 64, float8": {"d": 64, "cache": FP8},
        "8 heads": {"heads": 8},
        "64 heads": {"heads": 64},
        "float16": {"dtype": torch.float16},
    }
    for name, options in variety.items():
        inputs = [(make_rows([8192] * 64, **options),)]
        timing = measure(own(2), inputs, device="cuda", seconds=SECONDS)
        facts = {"bytes": kv_bytes(inputs[0][0]), "limit": limit, "peer": "decode, 64 x 8,192: step 2"}
        report.add(f"decode, 64 x 8,192, {name}: step 2", timing, **facts)
        del inputs
        torch.cuda.empty_cache()


def time_prefill(report: Report, limit: float) -> None:
    """Whole prompts, a chunk of long prompts, and a chunk among decoding rows; torch over the same keys, contiguous."""
    cases = {
        "1 x 16,384": ([16384], [16384]),
        "4 x 4,096": ([4096] * 4, [4096] * 4),
        "8 chunks of 512 over 8,192": ([512] * 8, [8192] * 8),
        "a chunk of 1,024 over 4,096 among 63 decoding rows": ([1024] + [1] * 63, [4096] * 64),
    }
    for name, (queries, lengths) in cases.items():
        for kind, options in {"": {}, ", head_dim 64": {"d": 64}, ", float8": {"cache": FP8}}.items():
            x = make_rows(lengths, queries=queries, **options)
            pairs = sum(T * (S - T) + T * (T + 1) / 2 for T, S in zip(queries, lengths, strict=True))
            work = 4 * HEADS * x["q"].shape[2] * pairs
            for step in PREFILL_STEPS:
                if step == "prefill_hopper" and options.get("cache") == FP8:
                    continue
                timing = measure(own(step), [(x,)], device="cuda", seconds=SECONDS)
                peer = f"prefill, {name}: step {step}" if options.get("cache") == FP8 else None
                report.add(f"prefill, {name}{kind}: step {step}", timing, peer=peer, flops=work, limit=limit)
        if len(set(lengths)) == 1 and queries == lengths:
            shape = (len(lengths), HEADS, lengths[0], HEAD_DIM)
            dense = tuple(torch.randn(shape, device="cuda", dtype=BF16) for _ in range(3))
            for contestant, backend in DENSE.items():
                with sdpa_kernel(backend):
                    causal = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: E731
                    timing = measure(causal, [dense], device="cuda", seconds=SECONDS)
                work = 2 * len(lengths) * HEADS * HEAD_DIM * lengths[0] ** 2
                report.add(f"prefill, {name}: {contestant}", timing, flops=work, limit=limit)


def time_writing(report: Report, limit: float) -> None:
    """8,192 tokens scattered over a pool: plain, rotated on the way, and to float8."""
    tokens, blocks = 8192, 8192
    for name, cache, is_rotated in (("", BF16, False), (", rotated", BF16, True), (", to float8", FP8, False)):
        size = (blocks, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
        pools = [torch.zeros(size, device="cuda", dtype=BF16).to(cache) for _ in range(2)]
        k, v = (torch.randn(tokens, KV_HEADS, HEAD_DIM, device="cuda", dtype=BF16) for _ in range(2))
        angles = torch.rand(tokens, HEAD_DIM // 2, device="cuda")
        options = {"cos": angles.cos(), "sin": angles.sin()} if is_rotated else {}
        inputs = [(torch.randperm(blocks * BLOCK_SIZE, device="cuda")[:tokens],) for _ in range(8)]
        fn = lambda slots, pools=pools, k=k, v=v, options=options: write_cache(k, v, *pools, slots, **options)  # noqa: E731
        moved = 2 * tokens * KV_HEADS * HEAD_DIM * (2 + cache.itemsize)
        timing = measure(fn, inputs, device="cuda", seconds=SECONDS)
        row = f"write_cache, {tokens:,} tokens{name}"
        facts = {"case": row, "bytes": moved, "limit": limit}
        report.add(row, timing, contestant="called", peer=f"{row}, CUDA graph", **facts)
        timing = measure_graph(fn, inputs, seconds=SECONDS)
        report.add(f"{row}, CUDA graph", timing, contestant="CUDA graph", peer=row, **facts)


def time_ablations(report: Report, limit: float) -> None:
    """What one idea of step 2 buys: the same kernel without it."""
    cases = {name: rotation(lambda name=name: make_rows(DECODE[name])) for name in PRIMARY}
    for change, edits in ABLATIONS.items():
        with edited_kernel(f"paged_attention/{STEP_2}", edits + MEASURED_ALONE):
            for name, inputs in cases.items():
                timing = measure(own(2), inputs, device="cuda", seconds=SECONDS)
                facts = {"bytes": kv_bytes(inputs[0][0]), "limit": limit}
                whole = f"decode, {name}: step 2"
                report.add(f"{whole}, {change}", timing, peer=whole, **facts)


def note_launch(report: Report) -> None:
    """Microseconds that Python takes for one call, the GPU having less to do than that."""
    x = make_rows([16])
    calls = {"step 2": own(2), "operator": own_operator}
    for name, fn in calls.items():
        for _ in range(50):
            fn(x)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(500):
            fn(x)
        report.note(**{f"host microseconds a call, {name}": (time.perf_counter() - start) / 500 * 1e6})
        torch.cuda.synchronize()


def own_operator(x: dict[str, Tensor]) -> Tensor:
    """The same through torch's dispatcher, as compiled code calls it."""
    scale = HEAD_DIM**-0.5
    return torch.ops.tformer_lab.paged_attention(*x.values(), None, None, scale, None, 1.0, 1.0, "2")[0]


def note_errors(report: Report) -> None:
    """The largest error against float64, and that of plain PyTorch in bfloat16 beside it."""
    x = make_rows(ragged(8, 1, 3000))
    wide = {name: t.double() if name in ("q", "k_pool", "v_pool") else t for name, t in x.items()}
    exact = attention(**wide, step=0)
    for step in (0, 1, 2):
        error = (attention(**x, step=step).double() - exact).abs().max().item()
        report.note(**{f"error, decode: step {step}": error})


def read_rate() -> float:
    """Bytes a second of a kernel that only reads."""
    source = torch.randn(2**30, device="cuda")
    return source.numel() * 4 / measure(source.sum, device="cuda", seconds=SECONDS).median


def run_gpu(report: Report, ablations: bool) -> None:
    """Everything that a GPU can show."""
    limit = copy_rate("cuda")
    report.note(copy_tb_s=limit / 1e12, read_tb_s=read_rate() / 1e12)
    note_errors(report)
    note_launch(report)
    time_beside(report, limit)
    time_decode(report, limit)
    report.finish()  # what there is so far, should the rest be cut short
    if ablations:
        time_ablations(report, limit)
        report.finish()
    time_variety(report, limit)
    time_writing(report, limit)
    matmul = matmul_rate("cuda", BF16)
    report.note(matmul_bfloat16_tflops=matmul / 1e12)
    time_prefill(report, matmul)


def run_once(device: str) -> None:
    """Steps 1 and 2 at 64 x 8,192, on a CPU step 0 and the twin: what a profiler watches (``--nvtx``)."""
    gpu = device == "cuda"
    x = make_rows(DECODE["64 x 8,192"]) if gpu else make_rows([256] * 4, **SMALL)
    one, other = (own(1), own(2)) if gpu else (own(0), own("cpu"))
    profiled(lambda: (one(x), other(x)), device=device)


# --- CPU -----------------------------------------------------------------------------------------------------------


SMALL = {"heads": 8, "kv_heads": 2, "d": 64, "dtype": torch.float32, "device": "cpu"}
"""The heads of what a CPU measures."""


def run_cpu(report: Report) -> None:
    """The C++ twin beside step 0, and beside torch over a dense cache, in float32."""
    torch.set_num_threads(min(2, torch.get_num_threads()))
    limit = copy_rate("cpu")
    report.note(copy_gb_s=limit / 1e9)
    for batch, context in ((16, 128), (8, 1024)):
        x = make_rows([context] * batch, **SMALL)
        dense = [torch.randn(batch, 2, context, 64) for _ in range(2)]
        q = x["q"][:, :, None]
        contestants = {
            "C++ twin": lambda x=x: own("cpu")(x),
            "step 0": lambda x=x: own(0)(x),
            "dense cache, sdpa": lambda q=q, kv=dense: F.scaled_dot_product_attention(q, *kv, enable_gqa=True),
        }
        for name, fn in contestants.items():
            timing = measure(fn, seconds=0.5)
            name = f"decode, {batch} x {context:,}, 8 / 2 heads, d 64: {name}"
            report.add(name, timing, bytes=kv_bytes(x), limit=limit)


PEERS = (
    "FlashAttention-3",
    *DENSE,
    "dense cache, sdpa",
    "step 0",
    "step 1",
    "step prefill_tensor_core",
    "step prefill_hopper",
    "step 2",
)


@dataclass(frozen=True)
class PagedOptions(Options):
    """Attention over a block table beside dense caches."""

    ablations: bool = True
    """Measure the kernels with one idea taken out too."""
    nvtx: bool = False
    """Measure nothing: run steps 1 and 2 once for a profiler."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command_line(run, arguments, options=PagedOptions, topic="paged_attention", description=__doc__)


def run(options: PagedOptions) -> None:
    """Measure, print and write the JSON."""
    if options.nvtx:
        return run_once(options.device)
    report = Report("paged_attention", options.device, options.out, peers=PEERS)
    with torch.no_grad():
        if options.device == "cpu":
            run_cpu(report)
        else:
            run_gpu(report, options.ablations)
    report.finish()


if __name__ == "__main__":
    sys.exit(main())
