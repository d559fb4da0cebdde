"""How fast the flash-attention ladder is, beside torch's own attention: ``python -m benchmarks.flash_attention``.

Theory. The forward of T queries over S keys does 4 T S d floating-point operations a head (2 T S d for Q K^T, as many
for P V), half of it under a causal mask; the backward does five such products instead of two. At these lengths both
are limited by arithmetic: a tile of K and V is used for 64 to 192 queries, hundreds of operations for each byte. So the
limit beside each row is the rate of a large matrix product on the same device in the same run.

On a GPU the script measures the forward (steps 3 and 4, in turns with torch's backends and FlashAttention-3), the
backward, packed sequences, the float32 steps 1 and 2, the rungs that lead to steps 3 and 4, the error against float64
and the registers. What single ideas buy (the same kernel with one of them taken out), and how long kernels take to
build, goes to a file of its own, ``flash_attention-ablations``, because compilers work there. On a CPU the script
measures the C++ twin beside torch's attention and the naive one.

FlashAttention-3 is taken from the ``vllm`` wheel (``vllm.vllm_flash_attn``), where it is installed; otherwise its rows
are missing.
"""

import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import (
    Options,
    Report,
    Timing,
    command_line,
    copies_past_cache,
    edited_copy,
    host_seconds,
    load_twice,
    matmul_rate,
    measure,
    measure_in_turns,
    profiled,
    take_turns,
)
from tformer_lib import flash_attention as flash
from tformer_lib import jit
from tformer_lib.flash_attention import kernels

TOKENS, WIDTH = 16384, 2048  # tokens of a batch, and heads x head_dim
SHAPES = [(d, length, causal) for d in (64, 128) for length in (4096, 16384) for causal in (False, True)]
LENGTHS = {64: (512, 1024, 2048, 4096, 8192, 16384), 128: (512, 1024, 2048, 4096, 8192, 16384), 256: (4096, 16384)}
PEERS = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION}
BUILDS = (1, 2, 3, 4, "float8", "backward_4_hopper", "backward_4_wide", "backward_3_tensor_core", "backward_2_tiled")
SECONDS = 0.1  # of each measurement, after as long a warm-up

HOPPER, TENSOR_CORE = "4_hopper.cuh", "3_tensor_core.cuh"
TURNS_LINE = "static constexpr bool TURNS = RUNG == PERSISTENT ? Shape::TURNS : RUNG >= IN_TURNS;"
WITHOUT_TURNS = [(TURNS_LINE, "static constexpr bool TURNS = false;")]
WITH_TURNS = [(TURNS_LINE, "static constexpr bool TURNS = true;")]
WITHOUT_OVERLAP = [
    ("static constexpr bool OVERLAP = RUNG >= flash::OVERLAP;", "static constexpr bool OVERLAP = false;")
]
WITHOUT_SWIZZLE = [("SWIZZLED ? chunk ^ (row % 8) : chunk", "chunk")]
ABLATIONS = [  # (step, what is changed, file, edits)
    (3, "without the swizzle", TENSOR_CORE, WITHOUT_SWIZZLE),
    (4, "without turns", HOPPER, WITHOUT_TURNS),
    (4, "with turns", HOPPER, WITH_TURNS),
    (4, "without overlap inside a warpgroup", HOPPER, WITHOUT_OVERLAP),
    (4, "without either", HOPPER, WITHOUT_TURNS + WITHOUT_OVERLAP),
    (4, "128 keys a tile", HOPPER, [("Shape<128, 2, 176>", "Shape<128, 2, 128>")]),
    (4, "192 keys a tile", HOPPER, [("Shape<128, 2, 176>", "Shape<128, 2, 192>")]),
]


def flops(batch: int, heads: int, T: int, S: int, d: int, causal: bool, products: int = 2) -> float:
    """Operations of ``products`` matrix products over all scores, half of which a causal mask removes."""
    return 2.0 * products * batch * heads * T * S * d * (0.5 if causal else 1.0)


def random_inputs(d: int, length: int, device: str, dtype: torch.dtype, count: int = 3) -> tuple[Tensor, ...]:
    """``count`` tensors of (batch, heads, length, d)."""
    shape = (TOKENS // length, WIDTH // d, length, d)
    return tuple(torch.randn(shape, device=device, dtype=dtype) for _ in range(count))


def peer(backend: SDPBackend, causal: bool) -> Callable:
    """torch's attention, held to one backend."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return attend


def own(step: int | str, causal: bool, deterministic: bool = False) -> Callable:
    """One step of the ladder."""
    return lambda q, k, v: flash.flash_attention(q, k, v, causal=causal, step=step, deterministic=deterministic)


def flash_attention_3(causal: bool) -> Callable | None:
    """FlashAttention-3 on packed sequences, as vLLM ships it, or None where it is not installed."""
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except ImportError:
        return None

    def attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, length: int) -> Tensor:
        return flash_attn_varlen_func(q, k, v, length, starts, length, cu_seqlens_k=starts, causal=causal, fa_version=3)

    return attend


def packed(q: Tensor, k: Tensor, v: Tensor) -> tuple:
    """The same sequences end to end, (batch x length, heads, d), where each begins, and how long it is."""
    batch, heads, length, d = q.shape
    starts = torch.arange(batch + 1, device=q.device, dtype=torch.int32) * length
    q, k, v = (x.transpose(1, 2).reshape(batch * length, heads, d) for x in (q, k, v))
    return q, k, v, starts, length


def label(d: int, length: int, causal: bool) -> str:
    """A shape, as the rows name it."""
    return f"d {d}, {length:,}{', causal' if causal else ''}"


# --- GPU -----------------------------------------------------------------------------------------------------------


def time_forward(report: Report, limit: float) -> None:
    """Step 4, and step 3 at some lengths, beside torch's two fast backends and FlashAttention-3."""
    for d, length, causal in (
        (d, n, causal) for d, lengths in LENGTHS.items() for n in lengths for causal in (False, True)
    ):
        inputs = copies_past_cache(lambda d=d, n=length: random_inputs(d, n, "cuda", torch.bfloat16), "cuda")
        contestants = {name: (peer(backend, causal), inputs) for name, backend in PEERS.items()}
        if (attend := flash_attention_3(causal)) is not None:
            contestants["FlashAttention-3"] = attend, [packed(*x) for x in inputs]
        steps = (3, 4) if (d, length, causal) in SHAPES else (4,)
        contestants |= {f"step {step}": (own(step, causal), inputs) for step in steps}
        for name, timing in measure_in_turns(contestants).items():
            work = flops(TOKENS // length, WIDTH // d, length, length, d, causal)
            name = f"forward, {label(d, length, causal)}: {name}"
            report.add(name, timing, flops=work, limit=limit, d=d, length=length, causal=causal)


def time_rungs(report: Report, limit: float) -> None:
    """The rungs that lead to steps 3 and 4."""
    for d, causal in itertools.product((64, 128), (False, True)):
        inputs = [random_inputs(d, 16384, "cuda", torch.bfloat16)]
        contestants = {rung: (own(rung, causal), inputs) for rung in (*flash.RUNGS["3"], *flash.RUNGS["4"])}
        for rung, timing in measure_in_turns(contestants).items():
            work = flops(1, WIDTH // d, 16384, 16384, d, causal)
            name = f"forward, {label(d, 16384, causal)}: step {rung}"
            report.add(name, timing, flops=work, limit=limit, d=d, length=16384, causal=causal)


def time_backward(report: Report, limit: float) -> None:
    """The gradients of all three inputs, with and without the deterministic order."""
    for d, length, causal in SHAPES:
        contestants = {name: peer(backend, causal) for name, backend in PEERS.items()}
        contestants["backward_4_hopper.cu"] = own(4, causal)
        contestants["backward_4_hopper.cu, deterministic"] = own(4, causal, deterministic=True)
        contestants["backward_3_tensor_core.cu"] = own(3, causal)
        time_gradients(report, limit, contestants, d, length, causal)
    for causal in (False, True):
        contestants = {"sdpa flash": peer(PEERS["sdpa flash"], causal), "backward_4_wide.cu": own(4, causal)}
        contestants["backward_3_tensor_core.cu"] = own(3, causal)
        time_gradients(report, limit, contestants, 256, 4096, causal)


def time_gradients(
    report: Report,
    limit: float,
    contestants: dict[str, Callable],
    d: int,
    length: int,
    causal: bool,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """The gradients of all three inputs by each contestant."""
    q, k, v, dout = random_inputs(d, length, "cuda", dtype, 4)
    for x in (q, k, v):
        x.requires_grad_()
    outs = {name: attend(q, k, v) for name, attend in contestants.items()}
    gradients = lambda out: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)  # noqa: E731
    work = flops(TOKENS // length, WIDTH // d, length, length, d, causal, products=5)
    precision = "float32, " if dtype == torch.float32 else ""
    for name, timing in measure_in_turns({name: (gradients, [(out,)]) for name, out in outs.items()}).items():
        name = f"backward, {precision}{label(d, length, causal)}: {name}"
        report.add(name, timing, flops=work, limit=limit, d=d, length=length, causal=causal)


def time_packed(report: Report, limit: float) -> None:
    """Four sequences packed end to end, none of them a whole number of tiles."""
    lengths = [7001, 4999, 3001, 1383]
    starts = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
    for d in (64, 128):
        q, k, v = (x[0].transpose(0, 1).contiguous() for x in random_inputs(d, TOKENS, "cuda", torch.bfloat16))
        contestants = {}
        if (peer_3 := flash_attention_3(True)) is not None:
            contestants["FlashAttention-3"] = partial(peer_3, q, k, v, starts, max(lengths))
        for step in (3, 4):
            attend = partial(flash.flash_attention_varlen, q, k, v, starts, starts, max(lengths), max(lengths))
            contestants[f"step {step}"] = partial(attend, causal=True, step=step)
        work = sum(flops(1, WIDTH // d, n, n, d, True) for n in lengths)
        for name, timing in measure_in_turns({x: (run, [()]) for x, run in contestants.items()}).items():
            name = f"packed, 1,383 to 7,001 tokens, causal, d {d}: {name}"
            dense = f"forward, {label(d, 4096, True)}: step 4"
            report.add(name, timing, flops=work, limit=limit, d=d, lengths=lengths, causal=True, dense=dense)


def flash_attention_3_form(q: Tensor, k: Tensor, v: Tensor, **options) -> Callable | None:
    """FlashAttention-3 on the same tensors with options of its own, or None where it is not installed."""
    if flash_attention_3(False) is None:
        return None
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    q_packed, k_packed, v_packed = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in (q, k, v))
    starts = [torch.arange(x.shape[0] + 1, device="cuda", dtype=torch.int32) * x.shape[2] for x in (q, k)]
    lengths = {"max_seqlen_q": q.shape[2], "max_seqlen_k": k.shape[2], "cu_seqlens_k": starts[1], "fa_version": 3}
    return lambda: flash_attn_varlen_func(q_packed, k_packed, v_packed, cu_seqlens_q=starts[0], **lengths, **options)


def time_forms(report: Report, limit: float) -> None:
    """Grouped heads, windows, fewer queries than keys, and scores and values of other forms, at d 128.

    ``dense`` names the row of full or causal attention whose queries see about as many keys, or "": grouped heads and
    other forms of scores have the row "plain" for that.
    """
    T, heads = 8192, WIDTH // 128
    slopes = 2.0 ** -torch.arange(1, heads + 1, device="cuda", dtype=torch.float32)
    plain, window, softcap = {"causal": True}, {"window": 1024}, {"causal": True, "softcap": 50.0}
    shifted, long = {"window": (1024, 1024)}, f"forward, {label(128, T, True)}: step 4"
    near, both = (f"forward, {label(128, 2048, causal)}: step 4" for causal in (True, False))
    cases = (  # (name, query heads, kv heads, queries, value_dim, dense, our options, FlashAttention-3's or why none)
        ("plain", heads, heads, T, 128, long, plain, plain),
        ("16 / 4 heads", heads, heads // 4, T, 128, "", plain, plain),
        ("32 heads", 32, 32, T, 128, "", plain, plain),
        ("32 / 8 heads", 32, 8, T, 128, "form, 32 heads: step 4", plain, plain),
        ("2,048 queries of 8,192 keys", heads, heads, 2048, 128, long, plain, plain),
        ("window 1,024", heads, heads, T, 128, near, window, {"causal": True, "window_size": [1023, 0]}),
        ("1,024 keys to each side", heads, heads, T, 128, both, shifted, {"window_size": [1024, 1024]}),
        ("softcap 50", heads, heads, T, 128, "", softcap, softcap),
        ("ALiBi", heads, heads, T, 128, "", {"causal": True, "alibi_slopes": slopes}, "FlashAttention-3 has no ALiBi"),
        ("keys 192, values 128", heads, heads, T, 128, "", plain, "no peer was measured"),
    )
    for name, query_heads, kv_heads, queries, value_dim, dense, options, peers_options in cases:
        d = 192 if "192" in name else 128
        shapes = ((query_heads, queries, d), (kv_heads, T, d), (kv_heads, T, value_dim))
        q, k, v = (torch.randn(2, *shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
        contestants = {"step 4": partial(flash.flash_attention, q, k, v, step=4, **options)}
        alone = peers_options if isinstance(peers_options, str) else None
        if alone is None and (attend := flash_attention_3_form(q, k, v, **peers_options)) is not None:
            contestants["FlashAttention-3"] = attend
        pairs = 2 * query_heads * pairs_seen(queries, T, options)
        for contestant, timing in measure_in_turns(
            {x: (run, [()]) for x, run in contestants.items()}, seconds=SECONDS
        ).items():
            facts = {"d": d, "value_dim": value_dim, "queries": queries, "keys": T, "heads": [query_heads, kv_heads]}
            facts |= {"form": name, "dense": dense or "form, plain: step 4"}
            work = 2.0 * pairs * (d + value_dim)
            report.add(f"form, {name}: {contestant}", timing, flops=work, limit=limit, alone=alone, **facts)


def time_float8(report: Report, limit: float) -> None:
    """The forward in float8 beside the one in bfloat16 and FlashAttention-3's."""
    for length, causal in itertools.product((4096, 16384), (False, True)):
        q, k, v = random_inputs(128, length, "cuda", torch.bfloat16)
        numbers, scales = zip(*map(flash.quantize_float8, (q, k, v)), strict=True)
        contestants = {
            "float8": partial(flash.flash_attention_float8, *numbers, *scales, causal=causal, step="float8"),
            "step 4": partial(flash.flash_attention, q, k, v, causal=causal, step=4),
        }
        descales = [x.expand(q.shape[0], -1).contiguous() for x in scales]  # (batch, kv_heads)
        given = dict(zip(("q_descale", "k_descale", "v_descale"), descales, strict=True))
        if (attend := flash_attention_3_form(*numbers, causal=causal, **given)) is not None:
            contestants["FlashAttention-3"] = attend
        work = flops(TOKENS // length, WIDTH // 128, length, length, 128, causal)
        for name, timing in measure_in_turns(
            {x: (run, [()]) for x, run in contestants.items()}, seconds=SECONDS
        ).items():
            name = f"float8, {label(128, length, causal)}: {name}"
            report.add(name, timing, flops=work, limit=limit, d=128, length=length, causal=causal)


def note_float8_errors(report: Report) -> None:
    """The root of the mean squared error of float8, with and without a rotation, and of bfloat16, against float64."""
    for inputs in ("normal", "outliers"):
        torch.manual_seed(8)
        q, k, v = (torch.randn(1, 4, 4096, 128, device="cuda") for _ in range(3))
        if (
            inputs == "outliers"
        ):  # one number in a thousand is ten times as large, as FlashAttention-3's authors draw them
            q, k, v = (x + 10 * torch.randn_like(x) * (torch.rand_like(x) < 1e-3) for x in (q, k, v))
        rows = slice(0, 4096, 7)
        exact = exact_rows(q, k, v, rows, False)
        R = flash.hadamard_rotation(128, device="cuda")
        found = {"bfloat16": flash.flash_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), step=4)}
        for name, x in (("float8", (q, k, v)), ("float8, rotated", (q @ R, k @ R, v))):
            numbers, scales = zip(*map(flash.quantize_float8, x), strict=True)
            found[name] = flash.flash_attention_float8(*numbers, *scales, step="float8")
        for name, out in found.items():
            error = (out[:, :, rows].double() - exact).square().mean().sqrt().item()
            report.note(**{f"root mean squared error, {inputs} inputs: {name}": error})


def pairs_seen(queries: int, keys: int, options: dict) -> int:
    """Pairs of a query and a key that it sees, of one head."""
    window = options.get("window")
    left, right = window if isinstance(window, tuple) else (window - 1 if window else keys, 0)
    position = torch.arange(keys - queries, keys)
    first, last = (position - left).clamp(min=0), (position + right).clamp(max=keys - 1)
    return int((last - first + 1).sum())


def time_float32(report: Report) -> None:
    """Steps 1 and 2 beside torch's memory-efficient backend, in float32."""
    limit = matmul_rate("cuda", torch.float32)
    report.note(matmul_float32_tflops=limit / 1e12)
    for d in (64, 128):
        inputs = [random_inputs(d, 4096, "cuda", torch.float32)]
        contestants = {"sdpa efficient": peer(SDPBackend.EFFICIENT_ATTENTION, False)}
        contestants |= {f"step {step}": own(step, False) for step in (1, 2)}
        for name, attend in contestants.items():
            timing = measure(attend, inputs, device="cuda", seconds=SECONDS, min_calls=3)
            work = flops(TOKENS // 4096, WIDTH // d, 4096, 4096, d, False)
            name = f"forward, float32, {label(d, 4096, False)}: {name}"
            report.add(name, timing, flops=work, limit=limit, d=d, length=4096, causal=False)
        gradients = {"sdpa efficient": contestants["sdpa efficient"], "backward_2_tiled.cu": contestants["step 2"]}
        time_gradients(report, limit, gradients, d, 4096, False, torch.float32)


def time_ablations(report: Report, limit: float) -> None:
    """What one idea buys: the same kernel without it, in turns with the whole one."""
    changes = [(step, "", TENSOR_CORE if step == 3 else HOPPER, []) for step in (3, 4)] + ABLATIONS
    with ExitStack() as stack:
        folders = [stack.enter_context(edited_copy(f"flash_attention/{file}", edits)) for _, _, file, edits in changes]
        for d in (64, 128):
            inputs = [random_inputs(d, 16384, "cuda", torch.bfloat16)]
            facts = {"d": d, "length": 16384, "causal": False}
            contestants, compared = {}, {}
            for (step, change, *_), folder in zip(changes, folders, strict=True):
                if "keys" in change and d == 64:
                    continue
                whole = f"forward, {label(d, 16384, False)}: step {step}"
                name = f"{whole}, {change}" if change else whole
                contestants[name] = partial(call_within, folder, own(step, False)), inputs
                compared[name] = {"peer": whole} if change else {"alone": "the others are compared with it"}
            work = flops(1, WIDTH // d, 16384, 16384, d, False)
            for name, timing in measure_in_turns(contestants, seconds=3 * SECONDS).items():
                report.add(name, timing, flops=work, limit=limit, **compared[name], **facts)


def call_within(folder: str, fn: Callable, *args: Tensor) -> Tensor:
    """Call a function whose kernels come from this folder."""
    with jit.kernels_from(folder):
        return fn(*args)


def exact_rows(q: Tensor, k: Tensor, v: Tensor, rows: slice, causal: bool) -> Tensor:
    """Float64 attention of some rows."""
    q, k, v = q[:, :, rows].double(), k.double(), v.double()
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        positions = torch.arange(k.shape[2], device=q.device)
        scores = scores.masked_fill(positions > positions[rows, None], -torch.inf)
    return scores.softmax(-1) @ v


def note_errors(report: Report) -> None:
    """The largest error against float64 of each contestant, on the same inputs."""
    for d, causal in ((64, False), (64, True), (128, False), (128, True)):
        torch.manual_seed(d)
        q, k, v = (x[:1, :4] for x in random_inputs(d, 4096, "cuda", torch.bfloat16))
        rows = slice(0, 4096, 7)
        exact = exact_rows(q, k, v, rows, causal)
        contestants = {name: peer(backend, causal) for name, backend in PEERS.items()}
        contestants |= {f"step {step}": own(step, causal) for step in (3, 4)}
        for name, attend in contestants.items():
            error = (attend(q, k, v)[:, :, rows].double() - exact).abs().max().item()
            report.note(**{f"error, d {d}{', causal' if causal else ''}: {name}": error})


def build_edited(step: int | str, file: str, edits: Sequence[tuple[str, str]]) -> None:
    """Build an edited kernel in a process of its own, so that whoever measures it later finds it in the cache."""
    code = "from benchmarks.harness import edited_kernel\nfrom tformer_lib import jit\n"
    code += f"with edited_kernel('flash_attention/{file}', {edits!r}):\n    jit.load('flash_attention', {step!r})"
    subprocess.run([sys.executable, "-c", code], check=True)


def note_resources(report: Report) -> None:
    """Registers, spills, shared memory and resident blocks of every step."""
    halves = [*flash.RUNGS["3"], 3, *flash.RUNGS["4"], 4]
    for step, dtype in ((1, torch.float32), (2, torch.float32), *((step, torch.bfloat16) for step in halves)):
        for d in (64, 128, 256):
            q = torch.empty(1, 1, 4096, d, device="cuda", dtype=dtype)
            report.note(**{f"resources, step {step}, d {d}": flash.resources(step, q, q)})
    for step, dtype in (
        ("float8", torch.bfloat16),
        ("backward_4_hopper", torch.bfloat16),
        ("backward_4_wide", torch.bfloat16),
        ("backward_3_tensor_core", torch.bfloat16),
        ("backward_2_tiled", torch.float32),
    ):
        widths = {"float8": (128,), "backward_4_hopper": (64, 128), "backward_4_wide": (256,)}
        for d in widths.get(step, (64, 128, 256)):
            q = torch.empty(1, 1, 4096, d, device="cuda", dtype=dtype)
            report.note(**{f"resources, {step}, d {d}": flash.resources(step, q, q)})


def run_gpu(report: Report) -> None:
    """Everything that a Hopper GPU can show of the kernels as they are."""
    limit = matmul_rate("cuda", torch.bfloat16)
    report.note(matmul_bfloat16_tflops=limit / 1e12)
    time_forward(report, limit)
    report.finish()  # what there is so far, should the rest be cut short
    time_backward(report, limit)
    time_packed(report, limit)
    time_forms(report, limit)
    time_float8(report, limit)
    report.finish()
    note_errors(report)
    note_float8_errors(report)
    note_resources(report)
    time_float32(report)
    time_rungs(report, limit)


def run_ablations(report: Report) -> None:
    """Build every kernel from nothing, and measure those with one idea taken out."""
    limit = matmul_rate("cuda", torch.bfloat16)
    report.note(matmul_bfloat16_tflops=limit / 1e12, **load_twice("flash_attention", BUILDS))
    with ThreadPoolExecutor(len(ABLATIONS)) as pool:
        for build in [pool.submit(build_edited, step, file, edits) for step, _, file, edits in ABLATIONS]:
            build.result()
    time_ablations(report, limit)


def run_once() -> None:
    """Every kernel of the ladder once at d 128, and cuDNN's beside them: what a profiler watches (``--nvtx``)."""
    rungs = (*flash.RUNGS["3"], *flash.RUNGS["4"])  # the last of each is the step
    for dtype, length, steps in ((torch.float32, 2048, (1, 2)), (torch.bfloat16, TOKENS, rungs)):
        shape = (1, WIDTH // 128, length, 128)
        q, k, v, dout = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(4))
        for step in steps:
            out, lse = flash.flash_attention(q, k, v, step=step, return_lse=True)
            if step in (1, 2, "3e", "4e"):
                gradients = flash.GRADIENTS[str(step)][0]
                given = (dout, None, q, k, v, out, lse, flash.Options(128**-0.5), None)
                kernels.run_backward(gradients, *given)  # autograd's thread has no range
        if dtype == torch.bfloat16:
            peer(SDPBackend.CUDNN_ATTENTION, False)(q, k, v)
            numbers, scales = zip(*map(flash.quantize_float8, (q, k, v)), strict=True)
            flash.flash_attention_float8(*numbers, *scales, step="float8")


# --- CPU -----------------------------------------------------------------------------------------------------------


def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with the whole matrix of scores in memory."""
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v


def run_cpu(report: Report) -> None:
    """The C++ twin at 4,096 tokens, 8 heads, d 64, float32."""
    torch.set_num_threads(min(2, torch.get_num_threads()))
    limit = matmul_rate("cpu", torch.float32)
    report.note(matmul_float32_tflops=limit / 1e12)
    start = time.perf_counter()
    jit.load(flash.LADDER.topic, "cpu")
    report.note(load_seconds=time.perf_counter() - start)
    contestants = {"naive": naive, "sdpa": F.scaled_dot_product_attention, "C++ twin": own("cpu", False)}
    inputs, clock = [torch.randn(1, 8, 4096, 64) for _ in range(3)], partial(host_seconds, device=torch.device("cpu"))
    calls = {name: partial(clock, partial(attend, *inputs)) for name, attend in contestants.items()}
    for name, times in take_turns(calls, 8).items():
        work = flops(1, 8, 4096, 4096, 64, False)
        timing = Timing(median(times), min(times), max(times), len(times))
        name = f"forward, float32, 8 heads, {label(64, 4096, False)}: {name}"
        report.add(name, timing, flops=work, limit=limit, spread="p10 and p90 are the fastest and the slowest call")


def run_twin() -> None:
    """The C++ twin once, beside the matrix of scores: what a profiler watches on a CPU."""
    q, k, v = torch.randn(3, 1, 4, 512, 64)
    naive(q, k, v)
    flash.flash_attention(q, k, v, step="cpu")


LADDER_PEERS = (
    "FlashAttention-3",
    "sdpa cudnn",
    "sdpa flash",
    "sdpa efficient",
    "sdpa",
    "naive",
    "step 3",
    "step 4",
)


@dataclass(frozen=True)
class LadderOptions(Options):
    """The ladder beside torch's own attention."""

    kernels: bool = True
    """Measure the kernels as they are."""
    ablations: bool = True
    """Measure them with one idea taken out too, and how long they take to build, into a file of its own."""
    nvtx: bool = False
    """Measure nothing: run each kernel once for a profiler."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command_line(run, arguments, options=LadderOptions, topic="flash_attention", description=__doc__)


def run(options: LadderOptions) -> None:
    """Measure, print and write the JSON."""
    if options.nvtx:
        return profiled(run_once if options.device == "cuda" else run_twin, device=options.device, warmup=1)
    if options.kernels:
        report = Report("flash_attention", options.device, options.out, peers=LADDER_PEERS)
        run_cpu(report) if options.device == "cpu" else run_gpu(report)
        report.finish()
    if options.ablations and options.device == "cuda":
        report = Report("flash_attention-ablations", options.device, options.out)
        run_ablations(report)
        report.finish()


if __name__ == "__main__":
    sys.exit(main())
