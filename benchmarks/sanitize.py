"""Every kernel of a topic under a sanitizer: ``python -m benchmarks.sanitize flash_attention [--device cpu]``.

On a GPU it is compute-sanitizer. Three tools watch each kernel on small odd shapes, one process for each pair:
``memcheck`` (reads and writes outside of an allocation; torch's caching allocator is off, so that every tensor is an
allocation of its own), ``racecheck`` (shared memory read or written by two threads with nothing that orders them) and
``synccheck`` (barriers used wrongly). Two controls show that the tools see these kernels at all: a launch whose lse has
too few elements, and a kernel without one of its barriers. They must fail.

On a CPU the C++ twin is built with the compiler's address sanitizer, whose library is loaded before Python, and answers
random calls of the public doors, right and wrong (``benchmarks.doors``). A kernel that reads or writes outside of a
tensor ends the process. The control is the same launch with a short lse.

A topic joins by a function that returns its cases by name, and a row in TOPICS; on a CPU by its doors. The summary goes
to ``<results>/<topic>-sanitizer.json``, the full output of a case that fails to the screen.
"""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Annotated, Literal

import torch
from tyro.conf import Positional

from benchmarks import doors
from benchmarks.harness import command, device_name, edited_kernel, environment, results_folder
from tformer_lib import command_line as commands
from tformer_lib import flash_attention as flash
from tformer_lib import jit
from tformer_lib.checkpoint import write_atomically
from tformer_lib.flash_attention import kernels, reference

TOOLS = ("memcheck", "racecheck", "synccheck")
FOUND = 9  # exit status of a tool that found something
GRADIENT_WIDTHS = {
    "backward_4_hopper": (40, 64, 128),
    "backward_4_wide": (136, 256),
    "backward_3_tensor_core": (40, 128, 256),
    "backward_2_tiled": (40, 256),
}
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?).*")
ADDRESS = re.compile(r"ERROR: AddressSanitizer: [\w-]+|\d[\d,]* calls: .*")


def from_cpu(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Random numbers made on the CPU, so that no other kernel runs under the tool."""
    return torch.randn(*shape).to("cuda", dtype)


# --- flash attention -----------------------------------------------------------------------------------------------


def flash_cases() -> dict[str, Callable]:
    """The steps of the ladder, the gradients, and the two controls."""
    cases = {name: partial(run_flash_backward, name) for name in GRADIENT_WIDTHS}
    cases |= {"gradients, other forms": run_flash_form_gradients, "float8": run_flash_float8}
    cases |= {f"step {step}, other forms": partial(run_flash_forms, step) for step in (3, 4)}
    steps = (1, 2, *flash.RUNGS["3"][:-1], 3, *flash.RUNGS["4"][:-1], 4)  # the last rung is the step
    cases |= {f"step {step}": partial(run_flash_forward, step) for step in steps}
    return cases | {"control: lse too short": write_past_lse, "control: a barrier left out": leave_out_a_barrier}


def flash_dtype(step: int | str) -> torch.dtype:
    """What a step computes with."""
    return torch.float32 if step in (1, 2, "backward_2_tiled") else torch.bfloat16


def run_flash_forward(step: int | str) -> None:
    """Odd lengths, two heads to a kv head, every width of tile, causal, a window, packed sequences."""
    dtype = flash_dtype(step)
    for d, (T, S), options in itertools.product(
        (40, 64, 128, 256), ((70, 203), (203, 70)), ({}, {"causal": True}, {"window": 33})
    ):
        q, k, v = (from_cpu(1, h, n, d, dtype=dtype) for h, n in ((2, T), (1, S), (1, S)))
        flash.flash_attention(q, k, v, step=step, **options)
    starts = torch.tensor([0, 70, 70, 203], dtype=torch.int32).cuda()
    for d in (64, 128, 256):
        q, k, v = (from_cpu(203, h, d, dtype=dtype) for h in (2, 1, 1))
        flash.flash_attention_varlen(q, k, v, starts, starts, 133, 133, causal=True, step=step)
    torch.cuda.synchronize()


FORMS = (
    {"window": (20, 50)},
    {"softcap": 5.0, "causal": True},
    {"softcap": 5.0, "window": (33, 0), "alibi_slopes": (0.5, 0.1)},
)
FORM_WIDTHS = ((64, 64), (128, 40), (192, 128), (256, 256))


def flash_form(options: dict) -> dict:
    """Options whose slopes are a tensor on the GPU."""
    slopes = {"alibi_slopes": torch.tensor(options["alibi_slopes"]).cuda()} if "alibi_slopes" in options else {}
    return options | slopes


def run_flash_forms(step: int) -> None:
    """Windows with two sides, capped and biased scores, values of another width."""
    for (d, value_dim), (T, S), options in itertools.product(FORM_WIDTHS, ((70, 203), (203, 70)), FORMS):
        sizes = ((2, T, d), (1, S, d), (1, S, value_dim))
        q, k, v = (from_cpu(1, *size, dtype=torch.bfloat16) for size in sizes)
        flash.flash_attention(q, k, v, step=step, **flash_form(options))
    torch.cuda.synchronize()


def run_flash_float8() -> None:
    """Odd lengths and widths, causal and a window with two sides."""
    for d, (T, S), options in itertools.product(
        (80, 128), ((70, 203), (203, 70)), ({"causal": True}, {"window": (9, 50)})
    ):
        x = [flash.quantize_float8(torch.randn(1, h, n, d)) for h, n in ((2, T), (1, S), (1, S))]
        numbers, scales = ([x.cuda() for x in part] for part in zip(*x, strict=True))
        flash.flash_attention_float8(*numbers, *scales, step="float8", **options)
    torch.cuda.synchronize()


def run_flash_form_gradients() -> None:
    """The gradients of them, in both orders of dq."""
    for step, (d, value_dim), options in itertools.product((3, 4), FORM_WIDTHS, FORMS):
        leaves = [
            from_cpu(1, *size, dtype=torch.bfloat16).requires_grad_()
            for size in ((2, 70, d), (1, 203, d), (1, 203, value_dim))
        ]
        out = flash.flash_attention(*leaves, step=step, deterministic=step == 4, **flash_form(options))
        torch.autograd.grad(out, leaves, torch.ones_like(out))
    torch.cuda.synchronize()


def run_flash_backward(name: str) -> None:
    """The gradients at odd lengths: both orders of dq, two heads to a kv head, packed sequences."""
    dtype, starts = flash_dtype(name), torch.tensor([0, 70, 70, 203], dtype=torch.int32).cuda()
    has_one_order = name in ("backward_2_tiled", "backward_4_wide")
    orders = (False,) if has_one_order else (False, True)
    for d, (T, S), deterministic, packed in itertools.product(
        GRADIENT_WIDTHS[name], ((70, 203), (203, 70)), orders, (False, True)
    ):
        (T, S), packing = ((203, 203), flash.Packing(starts, starts, 133, 133)) if packed else ((T, S), None)
        q, k, v, out, dout = (from_cpu(1, h, n, d, dtype=dtype) for h, n in ((2, T), (1, S), (1, S), (2, T), (2, T)))
        lse = torch.zeros(1, 2, T).cuda()
        options = flash.Options(d**-0.5, causal=True, deterministic=deterministic)
        kernels.run_backward(name, dout, None, q, k, v, out, lse, options, packing)
    torch.cuda.synchronize()


def write_past_lse(step: str = "1", device: str = "cuda") -> None:
    """A launch with an lse of half the elements: the tool must find the writes past its end."""
    q, k, v = (torch.randn(1, 1, 2048, 64).to(device) for _ in range(3))
    out, lse = reference.empty_outputs(q, v)
    short = lse[..., :1024].clone()
    arguments = kernels.arguments_of(q, k, v, flash.Options(1.0))
    arguments.out, arguments.lse = kernels.matrix(out), short.data_ptr()
    flash.LADDER.launch(step, "forward", arguments, q.device)
    if q.is_cuda:
        torch.cuda.synchronize()


def leave_out_a_barrier() -> None:
    """Step 2 without the barrier between the reads of K and the loads of V: racecheck must find the race."""
    with edited_kernel("flash_attention/2_tiled.cu", [("__syncthreads();  // K has been read, P is written", "")]):
        flash.flash_attention(*(from_cpu(1, 1, 200, 64, dtype=torch.float32) for _ in range(3)), step=2)
        torch.cuda.synchronize()


# --- paged attention -----------------------------------------------------------------------------------------------


def paged_cases() -> dict[str, Callable]:
    """Both decode steps, prefill mixed with decode, and writing."""
    return {
        "decode, step 1": partial(run_paged_decode, 1),
        "decode, step 2": partial(run_paged_decode, 2),
        "prefill": run_paged_prefill,
        "write_cache": run_paged_writing,
    }


def paged_rows(lengths: list[int], counts: list[int] | None = None, **options) -> dict[str, torch.Tensor]:
    """Rows of a paged cache, made on the CPU; tables name nonsense past a row's last block."""
    from benchmarks.paged_attention import make_rows

    x = make_rows(lengths, queries=counts, device="cpu", **options)
    nonsense = torch.full((len(lengths), 3), 2**30, dtype=torch.int32)
    x["block_tables"] = torch.cat((x["block_tables"], nonsense), dim=1)
    return {name: tensor.cuda() for name, tensor in x.items()}


def run_paged_decode(step: int) -> None:
    """Ragged rows, an empty one, every shape of tile, blocks smaller and larger than a step, a window, float8."""
    from tformer_lib.paged_attention import FP8, paged_attention

    lengths = [0, 1, 17, 130, 700, 3000]
    for d, heads, cache in itertools.product((64, 128), (8, 24), (None, FP8)):
        x = paged_rows(lengths, d=d, heads=heads, kv_heads=2, cache=cache)
        paged_attention(**x, step=step, return_lse=True)
    for block_size in (1, 8, 64):
        paged_attention(**paged_rows(lengths, heads=4, kv_heads=1, block_size=block_size), step=step, window=100)
    torch.cuda.synchronize()


def run_paged_prefill() -> None:
    """Chunks, whole prompts and decoding rows side by side."""
    from tformer_lib.paged_attention import FP8, PREFILL_STEPS, paged_attention

    lengths, counts = [900, 0, 333, 100, 2, 17], [1, 0, 5, 100, 2, 7]
    for d, cache in itertools.product((64, 128, 256), (None, FP8)):
        x = paged_rows(lengths, counts, d=d, heads=6, kv_heads=2, cache=cache)
        for step in ("prefill_tensor_core",) if cache else PREFILL_STEPS:
            paged_attention(**x, step=step, return_lse=True, window=200)
    paged_attention(**paged_rows(lengths, counts, heads=4, kv_heads=2, block_size=1), step="prefill")
    torch.cuda.synchronize()


def run_paged_writing() -> None:
    """16 bytes at a time and one by one, rotated, to float8."""
    from tformer_lib.paged_attention import FP8, write_cache

    for (kv_heads, d), cache in itertools.product(((2, 64), (3, 20)), (torch.bfloat16, FP8)):
        k, v = (from_cpu(50, kv_heads, d, dtype=torch.bfloat16) for _ in range(2))
        pools = [torch.zeros(10, kv_heads, 8, d).to(cache).cuda() for _ in range(2)]
        slots, angles = torch.randperm(80)[:50].cuda(), torch.rand(50, d // 2).cuda()
        write_cache(k, v, *pools, slots)
        for layout in ("half", "interleaved"):
            write_cache(k, v, *pools, slots, cos=angles, sin=angles, layout=layout)
    torch.cuda.synchronize()


# --- RoPE and sparse attention -------------------------------------------------------------------------------------


def rope_cases() -> dict[str, Callable]:
    """Both steps."""
    return {f"step {step}": partial(run_rope, step) for step in (1, 2)}


def run_rope(step: int) -> None:
    """Both layouts, partial rotation, heads last, a norm with its gradients, in place, angles from positions."""
    from tformer_lib.rope import rotate_at_positions, rotate_both, rotate_both_

    frequencies, positions = torch.rand(16).cuda(), torch.arange(70).repeat(2, 1).cuda()
    cos, sin, weight = torch.rand(70, 16).cuda(), torch.rand(70, 16).cuda(), torch.rand(96).cuda()
    for dtype, layout, heads_last in itertools.product(
        (torch.bfloat16, torch.float32), ("half", "interleaved"), (False, True)
    ):
        shapes = [(2, 70, h, 96) if heads_last else (2, h, 70, 96) for h in (5, 2)]
        q, k = (from_cpu(*shape, dtype=dtype) for shape in shapes)
        q, k = (x.transpose(1, 2) if heads_last else x for x in (q, k))
        rotate_at_positions(q, k, positions, frequencies, layout, step=step)
        leaves = [x.detach().requires_grad_() for x in (q, k)]
        for norm in ({}, {"norm_eps": 1e-6, "q_weight": weight}):
            out = rotate_both(*leaves, cos, sin, layout, step=step, **norm)
            torch.autograd.grad(out, leaves, (q, k))
        rotate_both_(q, k, cos, sin, layout, step=step)
    torch.cuda.synchronize()


def sparse_cases() -> dict[str, Callable]:
    """Both steps, the gradients, and blocks that were chosen."""
    cases = {f"step {step}": partial(run_sparse, step) for step in (1, 2)}
    gradients = {"backward": 2, "backward_tensor_core": 1}
    cases |= {name: partial(run_sparse_backward, step) for name, step in gradients.items()}
    return cases | {"chosen": run_chosen}


def sparse_inputs(d: int, T: int, S: int) -> list[torch.Tensor]:
    """Two heads to a kv head."""
    return [from_cpu(1, h, n, d, dtype=torch.bfloat16) for h, n in ((2, T), (1, S), (1, S))]


def run_sparse(step: int) -> None:
    """Odd lengths, every width of tile, patterns with whole, partial and no blocks, sinks."""
    from tformer_lib import sparse_attention as sparse

    for d, (T, S) in itertools.product((40, 64, 128) if step == 1 else (40, 64, 128, 256), ((70, 333), (333, 70))):
        for pattern in (sparse.sliding_window(50), sparse.everything(), sparse.global_tokens([3])):
            sparse.attend(*sparse_inputs(d, T, S), pattern=pattern, sinks=torch.rand(2).cuda(), step=step)
    torch.cuda.synchronize()


def run_sparse_backward(step: int) -> None:
    """The gradients at odd lengths."""
    from tformer_lib import sparse_attention as sparse

    for d, (T, S) in itertools.product((40, 64, 128), ((70, 333), (333, 70))):
        for pattern in (sparse.sliding_window(50), sparse.everything()):
            leaves = [x.requires_grad_() for x in sparse_inputs(d, T, S)]
            out = sparse.attend(*leaves, pattern=pattern, step=step)
            torch.autograd.grad(out, leaves, torch.ones_like(out))
    torch.cuda.synchronize()


def run_chosen() -> None:
    """Lists with gaps, an odd number of entries, causal, and their gradients."""
    from tformer_lib import sparse_attention as sparse

    for d, step in itertools.product((64, 128), (1, 2)):
        leaves = [x.requires_grad_() for x in sparse_inputs(d, 333, 333)]
        chosen = torch.stack([torch.randperm(6)[:3] for _ in range(3)])[None, None].cuda()
        chosen[0, 0, 1, 2] = -1
        out = sparse.attend_chosen(*leaves, chosen, causal=True, step=step)
        torch.autograd.grad(out, leaves, torch.ones_like(out))
    torch.cuda.synchronize()


# --- linear attention ----------------------------------------------------------------------------------------------


def linear_cases() -> dict[str, Callable]:
    """Every step, the gradients of the operator, and those by chunks in several segments."""
    steps = {f"step {step}": partial(run_linear, step) for step in (1, 2, 3, 4)}
    return steps | {"gradients": run_linear_gradients, "gradients by chunks": run_linear_backward}


def linear_inputs(
    d: int, T: int, *, delta: bool, gated: bool, dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    """Two heads to a kv head; numbers a token where a member of the family has them."""
    x = {name: from_cpu(1, heads, T, d, dtype=dtype) for name, heads in (("q", 2), ("k", 1), ("v", 1))}
    x["k"] = torch.nn.functional.normalize(x["k"], dim=-1)
    if delta:
        x["beta"] = torch.rand(1, 1, T, 1).cuda()
    return x | ({"log_decay": -torch.rand(1, 1, T, 1).cuda()} if gated else {})


def run_linear(step: int) -> None:
    """An odd length in one segment and in several, states in and out, from the end, packed, mapped and normalised."""
    from tformer_lib.linear_attention.kernels import launch

    starts = torch.tensor([0, 70, 70, 203], dtype=torch.int32).cuda()
    deltas = {2: (False,), 3: (True,)}.get(step, (False, True))
    widths = (
        ((torch.bfloat16, 128), (torch.float16, 128)) if step == 4 else ((torch.bfloat16, d) for d in (40, 128, 256))
    )
    for (dtype, d), delta, gated in itertools.product(widths, deltas, (False, True)):
        x = linear_inputs(d, 203, delta=delta, gated=gated, dtype=dtype)
        initial = torch.rand(3, 1, d, d).cuda()
        for count in (1, 3):
            launch(str(step), **x, initial=initial[:1], segment_count=count)
            launch(str(step), **x, initial=initial, cu_seqlens=starts, length=133, segment_count=count)
            if not delta:
                launch(str(step), **x, segment_count=count, reverse=True)
            if not delta and not gated:
                launch(str(step), **x, segment_count=count, normalised=True, map_code=1, map_scale=0.3)
    torch.cuda.synchronize()


def run_linear_gradients() -> None:
    """Of every member."""
    from tformer_lib.linear_attention.operator import run

    for d, delta, gated in itertools.product((64, 128), (False, True), (False, True)):
        x = {name: t.requires_grad_() for name, t in linear_inputs(d, 203, delta=delta, gated=gated).items()}
        out, _ = run(**x, scale=d**-0.5)
        torch.autograd.grad(out, list(x.values()), torch.ones_like(out))
    torch.cuda.synchronize()


def run_linear_backward() -> None:
    """An odd length in one segment and in several, states in and out, packed; decaying sum and delta rule."""
    from tformer_lib.linear_attention.backward import run_backward

    starts = torch.tensor([0, 70, 70, 203], dtype=torch.int32).cuda()
    cases = ((40, False, True), (64, True, True), (128, False, True), (128, True, False))
    for (d, delta, gated), dtype in itertools.product(cases, (torch.bfloat16, torch.float16)):
        x = linear_inputs(d, 203, delta=delta, gated=gated, dtype=dtype)
        dout, states = from_cpu(1, 2, 203, d, dtype=dtype), torch.rand(3, 1, d, d).cuda()
        numbers = (x.get("log_decay"), x.get("beta"))
        for count in (1, 3):
            few = states[:1]
            run_backward(dout, few, x["q"], x["k"], x["v"], *numbers, few, None, 203, 0.1, count)
            run_backward(dout, states, x["q"], x["k"], x["v"], *numbers, states, starts, 133, 0.1, count)
    torch.cuda.synchronize()


# --- the doors of the C++ twins ------------------------------------------------------------------------------------


def door_cases(topic: str, calls: int) -> dict[str, Callable]:
    """Every door of a topic, and the control."""
    cases = {
        f"door: {name}": partial(knock, draw, doors.steps(topic, name)[-1], calls)
        for name, draw in doors.DOORS[topic].items()
    }
    return cases | {"control: lse too short": partial(write_past_lse, "cpu", "cpu")}


def knock(draw: Callable[[Random], doors.Call], step: int | str, calls: int) -> None:
    """So many random calls by one step; an AssertionError ends them at the first that is answered wrongly."""
    refused = 0
    for seed in range(calls):
        call = draw(Random(seed))
        call.check(step)
        refused += call.refused
    print(f"{calls:,} calls: {calls - refused:,} answered, {refused:,} refused")


def watch_addresses() -> None:
    """Build the C++ twins with the address sanitizer, whose library this process has loaded before all others."""
    os.environ.pop("LD_PRELOAD", None)  # this process has it; the compiler need not be watched
    jit.CPP_FLAGS += ["-fsanitize=address", "-fno-omit-frame-pointer", "-O1"]  # -O3 would compile for minutes


def address_sanitizer() -> str:
    """The libraries to load first: the compiler's sanitizer, and the C++ library whose exceptions it must know."""
    found = []
    for name in ("libasan.so", "libstdc++.so.6"):
        words = [jit.compiler(), f"-print-file-name={name}"]
        found.append(subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip())
    if not all(map(os.path.isabs, found)):
        sys.exit(f"{jit.compiler()} has no address sanitizer: install libasan, or set CXX to a g++ that has it")
    return " ".join(found)


def serving_cases() -> dict[str, Callable]:
    """A step of the engine in few kernels, its products cuBLAS's and our own."""
    return {"decode_step": partial(run_fused_pass, own=()), "few_rows": partial(run_fused_pass)}


def run_fused_pass(own: Sequence[str] | None = None) -> None:
    """Rows that decode, some of them empty, with pools of bfloat16 and of float8."""
    from tformer_lib.paged_attention import Rows
    from tformer_lib.serving import FusedPass, join_projections
    from tformer_lib.serving.fused import PRODUCTS
    from tformer_lib.transformer import Decoder, ModelConfig

    sizes = {"width": 256, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 64, "feed_forward_width": 512}
    kind = {"norm": "rmsnorm", "feed_forward": "swiglu", "positions": "rope", "bias": False}
    model = Decoder(ModelConfig(vocab_size=96, max_length=256, **sizes, **kind)).to("cuda", torch.bfloat16).eval()
    join_projections(model)
    for rows, dtype in itertools.product((1, 37, 130), (torch.bfloat16, torch.float8_e4m3fn)):
        pools = [tuple(torch.zeros(rows, 2, 16, 64, device="cuda", dtype=dtype) for _ in "kv") for _ in range(2)]
        fused = FusedPass(model, pools, None if dtype == torch.bfloat16 else (0.5, 0.5))
        lengths, tables = torch.arange(rows) % 17, torch.arange(rows).int()[:, None]
        slots = torch.where(lengths > 0, 16 * torch.arange(rows) + lengths - 1, -1).cuda()
        where = (lengths.sub(1).clamp_min(0).cuda(), slots, Rows(tables.cuda(), lengths.int().cuda()))
        with torch.no_grad():
            fused(torch.zeros(rows, dtype=torch.int64).cuda(), *where, own=PRODUCTS if own is None else own)
    torch.cuda.synchronize()


TOPICS = {
    "flash_attention": flash_cases,
    "linear_attention": linear_cases,
    "paged_attention": paged_cases,
    "rope": rope_cases,
    "serving": serving_cases,
    "sparse_attention": sparse_cases,
}
CONTROLS = {"control: lse too short": "memcheck", "control: a barrier left out": "racecheck"}


# --- running the tools ---------------------------------------------------------------------------------------------


def pairs(cases: dict[str, Callable], tools: list[str]) -> list[tuple[str, str]]:
    """(tool, case) of everything to run; a control has one tool."""
    return [(t, c) for t, c in itertools.product(tools, cases) if t in ("address", CONTROLS.get(c, t))]


def under(tool: str, topic: str, case: str, calls: int) -> tuple[list[str], dict[str, str]]:
    """The command that runs a case under a tool, and the environment that it needs."""
    words = ["python", "-m", "benchmarks.sanitize", topic, "--run", case]
    if tool == "address":
        options = f"detect_leaks=0:exitcode={FOUND}"
        words += ["--device", "cpu", "--calls", str(calls)]
        return words, {"LD_PRELOAD": address_sanitizer(), "ASAN_OPTIONS": options}
    watched = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND)]
    return watched + words, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def check(topic: str, seconds: float, calls: int, tool: str, case: str) -> dict:
    """Run one case under one tool in a process of its own, and read the summary."""
    words, more = under(tool, topic, case, calls)
    start = time.perf_counter()
    real = [sys.executable if word == "python" else word for word in words]
    environ = os.environ | more
    child = subprocess.Popen(
        real, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ, start_new_session=True
    )
    try:
        output, status = child.communicate(timeout=seconds)[0], child.returncode
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # the tool and what it watches
        output, status = child.communicate()[0], None
    found = (ADDRESS if tool == "address" else SUMMARY).search(output)
    ending = f"in {seconds:.0f} s" if status is None else f"and exit status {status}"
    return {
        "case": case,
        "tool": tool,
        "clean": status == 0 and found is not None and (tool == "address" or found[1] == "0"),
        "expected": "errors" if case in CONTROLS else "clean",
        "summary": found[0] if found else f"no summary {ending}",
        "seconds": round(time.perf_counter() - start, 1),
        "command": " ".join(f"'{w}'" if " " in w else w for w in words),
        "output": output,
    }


def as_hoped(result: dict) -> bool:
    """A kernel is clean; a control is not, and the tool said why."""
    return result["clean"] if result["expected"] == "clean" else not result["summary"].startswith("no summary")


@dataclass(frozen=True)
class SanitizeOptions:
    """Every kernel of a topic under a sanitizer."""

    topic: Annotated[str, Positional]
    """Whose kernels or doors: flash_attention, linear_attention, paged_attention, rope, sparse_attention; on a CPU
    attention and mixture_of_experts too."""
    device: Literal["cuda", "cpu"] = "cuda"
    """CUDA kernels under compute-sanitizer, or the C++ twin under an address sanitizer."""
    calls: int = 3000
    """On a CPU: random calls of each door."""
    run: str | None = None
    """Run this case alone, with no tool."""
    tools: tuple[Literal["memcheck", "racecheck", "synccheck", "initcheck"], ...] = TOOLS
    """What watches on a GPU."""
    cases: tuple[str, ...] = ()
    """Only these; by default all."""
    jobs: int = 8
    """Processes at a time."""
    seconds: float = 300.0
    """The most that one case may take."""

    def __post_init__(self):
        topics = doors.DOORS if self.device == "cpu" else TOPICS
        if self.topic not in topics:
            raise ValueError(f"there is no topic {self.topic!r} on {self.device}; there are {', '.join(topics)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""

    def run() -> int:
        program = "python -m benchmarks.sanitize"
        return sanitize(commands.parse(SanitizeOptions, arguments, program=program, description=__doc__))

    return commands.run(run)


def sanitize(options: SanitizeOptions) -> int:
    """Run one case (what the tool watches), or all of them under every tool; returns the exit status."""
    torch.manual_seed(0)
    on_cpu = options.device == "cpu"
    cases = door_cases(options.topic, options.calls) if on_cpu else TOPICS[options.topic]()
    if options.run:
        if on_cpu:
            watch_addresses()
        cases[options.run]()
        return 0
    cases = {name: run for name, run in cases.items() if name in (options.cases or cases)}
    wanted = pairs(cases, ["address"] if on_cpu else options.tools)
    results: dict[tuple[str, str], dict] = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        running = {pool.submit(check, options.topic, options.seconds, options.calls, *pair): pair for pair in wanted}
        for future in as_completed(running):  # shown and saved as they come, so that a run that is cut leaves a log
            result = results[running[future]] = future.result()
            verdict = "as it should be" if as_hoped(result) else "NOT as it should be"
            summary = f"{result['tool']:<10} {result['case']:<28} {result['summary']:<60} {verdict}"
            print(f"{summary}  {result['seconds']} s", flush=True)
            output = result.pop("output")
            if not as_hoped(result):
                print("\n".join(output.splitlines()[:60]), flush=True)
            save(options.topic, torch.device(options.device), [results[pair] for pair in wanted if pair in results])
    return 0 if all(map(as_hoped, results.values())) else 1


def save(topic: str, device: torch.device, results: list[dict]) -> None:
    """Write what is known so far to ``<results>/<topic>-sanitizer.json``."""
    folder = results_folder(None, device_name(device))
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"topic": topic, **environment(device), "command": command(), "results": results}
    write_atomically(folder / f"{topic}-sanitizer.json", (json.dumps(facts, indent=1) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
