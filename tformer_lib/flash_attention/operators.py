"""The operators behind the public door: torch.compile, autograd and the profiler see these."""

from dataclasses import replace

import torch
from torch import Tensor

from tformer_lib import profiling
from tformer_lib.flash_attention import kernels, reference
from tformer_lib.flash_attention.checks import check_gradients, check_operands
from tformer_lib.flash_attention.kernels import GRADIENTS, LADDER, refusal
from tformer_lib.flash_attention.options import Options, Packing
from tformer_lib.flash_attention.plans import Plan, is_watched
from tformer_lib.ladder import AUTO, address_of


@torch.library.custom_op("tformer_lab::flash_attention", mutates_args=())
def flash_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    window: int,
    scale: float,
    step: str,
    deterministic: bool,
    checked: bool = False,
    ahead: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The operator behind both public functions; it sees one batch row where sequences are packed."""
    added = in_rows(alibi_slopes), in_four_dimensions(bias)
    options = Options(scale, causal, window, deterministic, ahead, softcap, *added)
    packing = pack(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return compute(q, k, v, mask, options, packing, step, checked)


def compute(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    options: Options,
    packing: Packing | None,
    step: str,
    checked: bool = False,
) -> tuple[Tensor, Tensor]:
    """out and lse, by the step that was asked for or the fastest that can do it."""
    check_operands(q, k, v, mask, options, packing, checked)
    chosen = LADDER.choose(step, q.device, lambda name: refusal(name, q, v, mask, options))
    if chosen != "0":
        return kernels.run_forward(chosen, q, k, v, options, packing)
    if packing is None:
        return reference.tiled_forward(q, k, v, options, mask)
    return reference.packed_forward(q, k, v, options, packing)


def in_rows(alibi_slopes: Tensor | None) -> Tensor | None:
    """Slopes as kernels read them, one after another."""
    return None if alibi_slopes is None else alibi_slopes.contiguous()


def in_four_dimensions(bias: Tensor | None) -> Tensor | None:
    """A bias that broadcasts to (batch, heads, T, S), with ones for the dimensions that it lacks."""
    return None if bias is None else bias.reshape((1,) * (4 - bias.dim()) + tuple(bias.shape))


def pack(cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, *longest: int) -> Packing | None:
    """Where packed sequences lie; None where they are not packed."""
    if cu_seqlens_q is None:
        return None
    return Packing(cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), *longest)


@flash_attention_op.register_fake
def flash_attention_fake(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
    """The shapes, dtypes and strides of what the operator returns."""
    return reference.empty_outputs(q, v)


@torch.library.custom_op("tformer_lab::flash_attention_backward", mutates_args=())
def flash_attention_backward_op(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    window: int,
    scale: float,
    step: str,
    deterministic: bool,
    ahead: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    bias_wanted: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, and where it is wanted that of the bias (else an empty tensor)."""
    added = in_rows(alibi_slopes), in_four_dimensions(bias)
    options = Options(scale, causal, window, deterministic, ahead, softcap, *added)
    packing = pack(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    check_operands(q, k, v, mask, options, packing, False)
    check_gradients(q, v, dout, dlse, out, lse)
    dbias = torch.zeros(options.bias.shape if bias_wanted else 0, dtype=lse.dtype, device=q.device)
    gradients = differentiate(
        step, (dout, dlse, q, k, v, out, lse), mask, options, packing, dbias if bias_wanted else None
    )
    return *gradients, dbias.to(bias.dtype).reshape(bias.shape) if bias_wanted else dbias


def differentiate(
    step: str,
    given: tuple[Tensor | None, ...],
    mask: Tensor | None,
    options: Options,
    packing: Packing | None,
    dbias: Tensor | None = None,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, written ``into`` tensors of these shapes if there are any.

    ``given`` are dout, dlse, q, k, v, out and lse. The bias's gradient is added to ``dbias``.
    """
    _, _, q, k, v, _, _ = given
    into = tuple(map(reference.laid_out_as, (q, k, v))) if into is None else into
    chosen = "0" if dbias is not None else choose_backward(step, q, v, mask, options)
    if chosen != "0":
        return kernels.run_backward(chosen, *given, options, packing, into)
    if packing is None:
        gradients = reference.tiled_backward(*given, options, mask, dbias=dbias)
    else:
        gradients = reference.packed_backward(*given, options, packing)
    return tuple(place.copy_(dx) for place, dx in zip(into, gradients, strict=True))


@flash_attention_backward_op.register_fake
def flash_attention_backward_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *asked: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The shapes, dtypes and strides of the gradients."""
    given = dict(zip(ASKED, asked, strict=False))
    dbias = given["bias"].new_empty(given["bias"].shape) if given.get("bias_wanted") else lse.new_empty(0)
    return *map(reference.laid_out_as, (q, k, v)), dbias


# What the operator takes behind lse; who calls it may leave out the last ones.
ASKED = (
    *("mask", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "causal", "window", "scale", "step"),
    *("deterministic", "ahead", "softcap", "alibi_slopes", "bias", "bias_wanted"),
)


def choose_backward(step: str, q: Tensor, v: Tensor, mask: Tensor | None, options: Options) -> str:
    """Whose gradients: those that belong to the step that was asked for, or to the fastest of the device."""
    names = GRADIENTS[LADDER.fastest.get(q.device.type, ("0",))[0] if step == AUTO else step]
    return LADDER.first(names, q.device, lambda name: refusal(name, q, v, mask, options))


def save_for_backward(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    """Keep what the gradients need: the inputs, out and lse; nothing of size T x S."""
    q, k, v, mask, cu_seqlens_q, cu_seqlens_k, *options, _, ahead, softcap, alibi_slopes, bias = inputs  # _: checked
    ctx.save_for_backward(q, k, v, *output, mask, cu_seqlens_q, cu_seqlens_k, alibi_slopes, bias)
    ctx.options, ctx.form = options, (ahead, softcap)
    ctx.set_materialize_grads(False)


def backward(ctx, dout: Tensor | None, dlse: Tensor | None) -> tuple:
    """The gradients of the operator's inputs; lse has one too, where it was used."""
    q, k, v, out, lse, mask, cu_seqlens_q, cu_seqlens_k, *added = ctx.saved_tensors  # alibi_slopes and bias
    dout = torch.zeros_like(out) if dout is None else dout
    wanted = ctx.needs_input_grad[-1]
    dq, dk, dv, dbias = torch.ops.tformer_lab.flash_attention_backward(
        dout, dlse, q, k, v, out, lse, mask, cu_seqlens_q, cu_seqlens_k, *ctx.options, *ctx.form, *added, wanted
    )
    return dq, dk, dv, *(None for _ in range(7 + len(ctx.options))), dbias if wanted else None


class Planned(torch.autograd.Function):
    """The same for a planned call, without ``torch.library`` in between."""

    @staticmethod
    def forward(ctx, plan: Plan, with_lse: bool, q: Tensor, k: Tensor, v: Tensor, *others: Tensor | None):
        """out, or out and lse; ``others`` are alibi_slopes, cu_seqlens_q and cu_seqlens_k."""
        out, lse = plan.run(q, k, v, others)
        ctx.save_for_backward(q, k, v, out, lse, *others)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        return (out, lse) if with_lse else out

    @staticmethod
    def backward(ctx, dout: Tensor | None, dlse: Tensor | None = None) -> tuple:
        """The gradients of q, k and v, by the operator where somebody watches, or asks for a second derivative."""
        plan, (q, k, v, out, lse, slopes, *starts) = ctx.plan, ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        given, o, packing = (dout, dlse, q, k, v, out, lse), plan.options, pack(*starts, *plan.longest)
        plain = all(address_of(x) is not None for x in (dout, dlse) if x is not None)
        if torch.is_grad_enabled() or is_watched() or not plain:
            asked = (*plan.longest, o.causal, o.window, o.scale, plan.step, o.deterministic, o.ahead, o.softcap, slopes)
            *gradients, _ = torch.ops.tformer_lab.flash_attention_backward(*given, None, *starts, *asked)
        else:
            gradients = differentiate(plan.step, given, None, replace(o, alibi_slopes=slopes), packing)
        return None, None, *gradients, None, None, None


def flops(q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, columns: int) -> int:
    """FLOPs of products between T queries and S keys, causal or not, of each head and sequence; ``columns`` in all."""
    batch, heads, T, _ = q.shape
    pairs = batch * T * k.shape[2]
    if cu_seqlens_q is not None:
        pairs = int((cu_seqlens_q.diff().long() * cu_seqlens_k.diff()).sum())
    return 2 * columns * heads * pairs


def forward_flops(q, k, v, mask, cu_seqlens_q, cu_seqlens_k, *_, out_val=None) -> int:
    """For ``profiling.count``: S = Q K^T and O = P V."""
    return flops(q, k, cu_seqlens_q, cu_seqlens_k, q.shape[3] + v.shape[3])


def backward_flops(dout, dlse, q, k, v, out, lse, mask, cu_seqlens_q, cu_seqlens_k, *_, out_val=None) -> int:
    """For ``profiling.count``: S again, dP, dV, dQ and dK."""
    return flops(q, k, cu_seqlens_q, cu_seqlens_k, 3 * q.shape[3] + 2 * v.shape[3])


flash_attention_op.register_autograd(backward, setup_context=save_for_backward)
profiling.PRODUCTS[torch.ops.tformer_lab.flash_attention] = forward_flops
profiling.PRODUCTS[torch.ops.tformer_lab.flash_attention_backward] = backward_flops
