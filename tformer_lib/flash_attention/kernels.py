"""The kernels: which step can do what is asked, whose gradients belong to it, and what a launch is given."""

import ctypes
import math
from dataclasses import replace

import torch
from torch import Tensor

from tformer_lib.flash_attention.options import Options, Packing
from tformer_lib.flash_attention.reference import empty_outputs, laid_out_as
from tformer_lib.ladder import (
    AUTO,
    DTYPE_CODES,
    HALVES,
    Ladder,
    counters,
    loadable,
    refusal_of_dtype,
    refusal_of_hopper,
    refusal_of_place,
    refusal_of_tensor_cores,
)

MOST_HEAD_DIM = 256
# What leads to a step, each rung with one idea more than the one before. The last has them all: it is the step.
RUNGS = {"3": ("3a", "3b", "3c", "3d", "3e"), "4": ("4a", "4b", "4c", "4d", "4e")}
LADDER = Ladder(
    "flash_attention",
    ("0", "cpu", "1", "2", *RUNGS["3"], "3", *RUNGS["4"], "4"),
    {"cpu": ("cpu", "0"), "cuda": ("4", "3", "2", "0")},
    aliases={rungs[-1]: step for step, rungs in RUNGS.items()},
)
# The gradients take the instructions of the step that was asked for, or the best that the device has.
GRADIENTS = {
    "0": ("0",),
    "cpu": ("cpu", "0"),
    "1": ("backward_2_tiled", "0"),
    "2": ("backward_2_tiled", "0"),
    "3": ("backward_3_tensor_core", "0"),
    "4": ("backward_4_hopper", "backward_4_wide", "backward_3_tensor_core", "backward_2_tiled", "0"),
}
GRADIENTS |= {rung: GRADIENTS[step] for step, rungs in RUNGS.items() for rung in rungs}

# These can cap scores, add ALiBi, and take another width of values.
FORMS = ("3", "4", "backward_4_hopper", "backward_3_tensor_core")
MODIFIED = {
    "3": "3_tensor_core_scores",
    "4": "4_hopper_scores",
    "backward_4_hopper": "backward_4_hopper_scores",
    "backward_3_tensor_core": "backward_3_tensor_core_scores",
}


# --- which step ----------------------------------------------------------------------------------------------------


def refusal(step: str, q: Tensor, v: Tensor, mask: Tensor | None, options: Options) -> str | None:
    """Why ``step`` cannot do this, or None if it can."""
    if step == "0":
        return None
    if reason := refusal_of_place(step, q):
        return reason
    if mask is not None:
        return "kernels know the masks causal and window alone; step 0 takes any"
    for name, width in (("head_dim", q.shape[-1]), ("value_dim", v.shape[-1])):
        if width > MOST_HEAD_DIM:
            return f"{name} must be at most {MOST_HEAD_DIM}, got {width}"
    if v.shape[-1] == 0:
        return "the values have no columns"
    if step == "cpu":
        return refusal_of_dtype(q)
    if reason := refusal_of_form(step, q, v, options):
        return reason
    if step in ("1", "2", "backward_2_tiled"):
        return refusal_of_dtype(q, (torch.float32,))
    return refusal_of_16_bits(step, q, v)


def refusal_of_form(step: str, q: Tensor, v: Tensor, options: Options) -> str | None:
    """Why a CUDA step cannot do what goes beyond plain scores and one head_dim."""
    if step in FORMS:
        return None
    if step == "backward_4_wide" and options.deterministic:
        return "the order of its additions to dq changes from run to run"
    if options.softcap:
        return "it does not cap scores (softcap)"
    if options.alibi_slopes is not None or options.bias is not None:
        return "it adds no bias to scores (alibi_slopes, bias)"
    if v.shape[-1] != q.shape[-1] and step != "backward_4_wide":
        return f"it takes values of head_dim {q.shape[-1]} alone, got {v.shape[-1]}"
    return None


def refusal_of_16_bits(step: str, q: Tensor, v: Tensor) -> str | None:
    """Why a tensor-core step cannot do this."""
    if reason := refusal_of_tensor_cores(q.dtype, q.device):
        return reason
    widest = max(q.shape[-1], v.shape[-1])
    for name, width in (("head_dim", q.shape[-1]), ("value_dim", v.shape[-1])):
        if width % 8:
            return f"16-byte loads need a {name} that is a multiple of 8, got {width}"
    if (step[0] == "4" or step in ("backward_4_hopper", "backward_4_wide")) and (reason := refusal_of_hopper(q.device)):
        return reason
    if step == "backward_4_hopper" and widest > 128:
        return f"a head_dim over 128 does not fit the registers of backward_4_hopper.cu, got {widest}"
    if step == "backward_4_wide" and widest <= 128:
        return f"it is made for a head_dim over 128, got {widest}"
    return None


def best_step(step: str, q: Tensor, v: Tensor, mask: Tensor | None, options: Options) -> str:
    """The step that the operator takes, without a word about those that it cannot take."""
    if step != AUTO:
        return step
    names = LADDER.fastest.get(q.device.type, ("0",))
    return LADDER.best(names, q.device, lambda name: refusal(name, q, v, mask, options))[0]


def source_of(step: str, options: Options) -> str:
    """The file of a step: scores that are capped or biased have one of their own, so that plain ones cost no more."""
    return MODIFIED[step] if options.modifies_scores and step in MODIFIED else step


# --- the structs ---------------------------------------------------------------------------------------------------


class Matrix(ctypes.Structure):
    """``flash::Matrix`` of kernels/flash_attention/arguments.h."""

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "row"))]


class Arguments(ctypes.Structure):
    """``flash::Arguments`` of kernels/flash_attention/arguments.h, in the same order."""

    _fields_ = [
        *((name, Matrix) for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "lse",
                "dlse",
                "delta",
                "dq_sum",
                "turn",
                "dealt",
                "cu_seqlens_q",
                "cu_seqlens_k",
                "alibi_slopes",
                "q_scale",
                "k_scale",
                "v_scale",
                "bias",
            )
        ),
        *(
            (name, ctypes.c_int64)
            for name in ("lse_batch", "lse_head", "slopes_batch", "bias_batch", "bias_head", "bias_query", "bias_key")
        ),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "queries", "keys")),
        *((name, ctypes.c_int64) for name in ("total_q", "total_k", "head_dim", "value_dim", "window")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("ahead", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    ]


class Resources(ctypes.Structure):
    """``Resources`` of kernels/common/resources.cuh: what a launch of a CUDA step uses."""

    _fields_ = [
        (name, ctypes.c_int32)
        for name in ("threads", "registers", "spilled_bytes", "shared_bytes", "blocks_per_multiprocessor")
    ]


def resources(step: int | str, q: Tensor, k: Tensor, *, causal: bool = False) -> dict[str, int]:
    """Threads, registers, spilled bytes, shared memory and resident blocks of a CUDA step's launch on such tensors."""
    found = Resources()
    LADDER.kernel(str(step), "resources", q.device).ask(arguments_of(q, k, k, Options(1.0, causal)), found)
    return {name: getattr(found, name) for name, _ in Resources._fields_}


def matrix(x: Tensor) -> Matrix:
    """A (batch, heads, rows, columns) tensor as a kernel sees it."""
    return Matrix(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2))


def arguments_of(q: Tensor, k: Tensor, v: Tensor, options: Options, packing: Packing | None = None) -> Arguments:
    """The arguments that every kernel needs; the caller adds the outputs."""
    arguments = Arguments(q=matrix(q), k=matrix(k), v=matrix(v), scale=options.scale)
    arguments.window, arguments.softcap = options.window, options.softcap
    arguments.batch, arguments.heads, arguments.total_q, arguments.head_dim = q.shape
    arguments.value_dim = v.shape[3]
    arguments.kv_heads, arguments.total_k = k.shape[1], k.shape[2]
    arguments.queries, arguments.keys = q.shape[2], k.shape[2]
    arguments.dtype = DTYPE_CODES[q.dtype]
    arguments.lse_batch, arguments.lse_head = q.shape[1] * q.shape[2], q.shape[2]
    if packing is not None:
        arguments.cu_seqlens_q, arguments.cu_seqlens_k = (
            packing.cu_seqlens_q.data_ptr(),
            packing.cu_seqlens_k.data_ptr(),
        )
        arguments.queries, arguments.keys = packing.max_seqlen_q, packing.max_seqlen_k
        arguments.batch = packing.cu_seqlens_q.shape[0] - 1
    ahead = options.last_ahead
    arguments.ahead = -1 if ahead >= arguments.queries else ahead  # then the first query sees the last key too
    if (slopes := options.alibi_slopes) is not None:
        arguments.alibi_slopes = slopes.data_ptr()
        arguments.slopes_batch = 0 if slopes.dim() == 1 else q.shape[1]
    if (bias := options.bias) is not None:
        strides = (0 if size == 1 else stride for size, stride in zip(bias.shape, bias.stride(), strict=True))
        arguments.bias = bias.data_ptr()
        arguments.bias_batch, arguments.bias_head, arguments.bias_query, arguments.bias_key = strides
    return arguments


# --- running them --------------------------------------------------------------------------------------------------


def run_forward(
    step: str, q: Tensor, k: Tensor, v: Tensor, options: Options, packing: Packing | None
) -> tuple[Tensor, Tensor]:
    """Run a kernel on (batch, heads, T, d) or packed (1, heads, total, d) tensors: out and lse."""
    out, lse = empty_outputs(q, v)
    if 0 in (q.numel(), k.numel(), v.numel()):
        return out.zero_(), lse.fill_(-math.inf)
    options = with_float_bias(options)  # alive until the launch
    if q.is_cuda:
        q, options, _ = positive_scale(q, options)
    q, k, v = map(prepared, (q, k, v))
    arguments = arguments_of(q, k, v, options, packing)
    arguments.out, arguments.lse = matrix(out), lse.data_ptr()
    dealt = counters(q.device) if q.is_cuda else None  # alive until the launch
    arguments.dealt = None if dealt is None else dealt.data_ptr()
    LADDER.launch(source_of(step, options), "forward", arguments, q.device)
    del dealt
    return out, lse


def run_backward(
    step: str,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: Options,
    packing: Packing | None,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v by a kernel of GRADIENTS, written ``into`` tensors of these shapes if there are."""
    dq, dk, dv = map(laid_out_as, (q, k, v)) if into is None else into
    if 0 in (q.numel(), k.numel(), v.numel()):
        return dq.zero_(), dk.zero_(), dv.zero_()
    sign, options = 1.0, with_float_bias(options)  # alive until the launch
    if q.is_cuda:
        q, options, sign = positive_scale(q, options)
    q, k, v, out, dout = map(prepared, (q, k, v, out, dout))
    arguments = arguments_of(q, k, v, options, packing)
    lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
    delta = torch.empty_like(lse)
    arguments.out, arguments.dout = matrix(out), matrix(dout)
    arguments.dq, arguments.dk, arguments.dv = matrix(dq), matrix(dk), matrix(dv)
    arguments.lse, arguments.delta = lse.data_ptr(), delta.data_ptr()
    arguments.dlse = None if dlse is None else dlse.data_ptr()
    source = source_of(step, options)
    scratch = (
        bring_scratch(source, arguments, q, options.deterministic) if q.is_cuda else None
    )  # alive until the launch
    LADDER.launch(source, "backward", arguments, q.device)
    del scratch
    return dq if sign == 1.0 else dq.mul_(sign), dk, dv


def prepared(x: Tensor) -> Tensor:
    """``x`` itself where the kernels of its device and dtype can read it by its strides, else a copy."""
    return loadable(x, aligned=x.is_cuda and x.dtype in HALVES)


def with_float_bias(options: Options) -> Options:
    """The same with a bias of float32, which is what kernels read."""
    return options if options.bias is None else replace(options, bias=options.bias.float())


def positive_scale(q: Tensor, options: Options) -> tuple[Tensor, Options, float]:
    """The same scores by a positive scale, and the sign that moved into a copy of q (0 where the scale is 0).

    The CUDA steps take the maximum of the scores before they scale them, which a negative scale would turn over.
    """
    scale = options.scale
    if scale > 0:
        return q, options, 1.0
    sign = math.copysign(1.0, scale) if scale else 0.0
    return q * sign, replace(options, scale=abs(scale) or 1.0), sign


def bring_scratch(step: str, arguments: Arguments, q: Tensor, deterministic: bool) -> tuple[Tensor, ...]:
    """Allocate what the gradients need between their kernels, in the sizes that they name."""
    sizes = (ctypes.c_int64 * 3)()
    LADDER.kernel(step, "scratch", q.device).ask(arguments, sizes)
    delta = q.new_empty(sizes[0], dtype=torch.float32)
    dq_sum = q.new_zeros(sizes[1], dtype=torch.float32)
    turn = q.new_zeros(sizes[2], dtype=torch.int32) if deterministic else None
    arguments.delta, arguments.dq_sum = delta.data_ptr(), dq_sum.data_ptr()
    arguments.turn = None if turn is None else turn.data_ptr()
    return delta, dq_sum, turn
