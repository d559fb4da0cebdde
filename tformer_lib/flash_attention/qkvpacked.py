"""Self-attention over queries, keys and values that one matmul made and that stay one tensor, as their gradient does.

Three views of one tensor cost nothing on the way in. On the way back three gradients would have to be copied together,
because the matmul's own gradient reads them as one tensor. Here each is written into its place of that tensor: for
GPT-2's 124M on an H200, this saves a copy of 151 MB in each layer of a step of 32,768 tokens.

``MultiHeadAttention`` calls it where nothing stands between the projections and the attention: no RoPE, no norm of
queries and keys, no cache, no mask.
"""

import torch
from torch import Tensor

from tformer_lib import profiling
from tformer_lib.contract import check_dense, check_inputs, score_scale
from tformer_lib.flash_attention import operators, reference
from tformer_lib.flash_attention.attention import flash_attention, is_deterministic
from tformer_lib.flash_attention.checks import Window, check_gradients, check_options
from tformer_lib.flash_attention.kernels import LADDER
from tformer_lib.flash_attention.options import Options, options_of
from tformer_lib.ladder import check_no_tangent


def flash_attention_qkvpacked(
    qkv: Tensor,
    heads: int,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: Window = None,
    step: int | str | None = None,
    deterministic: bool | None = None,
) -> Tensor:
    """:func:`flash_attention` of the tokens of one tensor over each other.

    Args:
        qkv: (batch, T, heads + 2 kv_heads, head_dim): each token's queries, then its keys, then its values.
        heads: how many of them are queries.
        causal, scale, window, step, deterministic: as for :func:`flash_attention`.

    Returns:
        (batch, T, heads, head_dim), contiguous.

    Raises:
        ValueError: the heads do not fit, or what :func:`flash_attention` refuses.
    """
    check_joined(qkv, heads)
    q, k, v = parts_of(qkv, heads)
    check_inputs(q, k, v)
    check_options(q, window, None, None)
    check_no_tangent("flash attention", qkv, instead="attention.attend")
    asked = options_of(causal, float(score_scale(scale, qkv.shape[-1])), window)
    options = asked.causal, asked.window, asked.scale, LADDER.name(step), is_deterministic(deterministic), asked.ahead
    return torch.ops.tformer_lab.flash_attention_qkvpacked(qkv, heads, *options)[0]


flash_attention.qkvpacked = flash_attention_qkvpacked


def check_joined(qkv: Tensor, heads: int) -> None:
    """Refuse a tensor whose heads are not as many keys as values beside the queries."""
    check_dense("qkv", qkv)
    if qkv.dim() != 4:
        raise ValueError(f"qkv must be (batch, T, heads + 2 kv_heads, head_dim), got shape {tuple(qkv.shape)}")
    others = qkv.shape[2] - heads
    if heads < 1 or others < 2 or others % 2:
        raise ValueError(f"{qkv.shape[2]} heads are not {heads} of queries and as many of keys as of values")


def parts_of(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as views, each (batch, its heads, T, head_dim)."""
    kv_heads = (qkv.shape[2] - heads) // 2
    return qkv.transpose(1, 2).split((heads, kv_heads, kv_heads), dim=1)


# --- the operators -------------------------------------------------------------------------------------------------


@torch.library.custom_op("tformer_lab::flash_attention_qkvpacked", mutates_args=())
def qkvpacked_op(
    qkv: Tensor, heads: int, causal: bool, window: int, scale: float, step: str, deterministic: bool, ahead: int
) -> tuple[Tensor, Tensor]:
    """out (batch, T, heads, head_dim), and lse (batch, heads, T)."""
    check_joined(qkv, heads)
    options = Options(scale, causal, window, deterministic, ahead)
    out, lse = operators.compute(*parts_of(qkv, heads), None, options, None, step)
    return out.transpose(1, 2).contiguous(), lse


@qkvpacked_op.register_fake
def qkvpacked_fake(qkv: Tensor, heads: int, *_: object) -> tuple[Tensor, Tensor]:
    """The shapes, dtypes and strides of what the operator returns."""
    q, _, v = parts_of(qkv, heads)
    out, lse = reference.empty_outputs(q, v)
    return out.transpose(1, 2).contiguous(), lse


@torch.library.custom_op("tformer_lab::flash_attention_qkvpacked_backward", mutates_args=())
def qkvpacked_backward_op(
    dout: Tensor,
    dlse: Tensor | None,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    heads: int,
    causal: bool,
    window: int,
    scale: float,
    step: str,
    deterministic: bool,
    ahead: int,
) -> Tensor:
    """The gradient of qkv, contiguous."""
    check_joined(qkv, heads)
    options = Options(scale, causal, window, deterministic, ahead)
    q, k, v = parts_of(qkv, heads)
    given = dout.transpose(1, 2), dlse, q, k, v, out.transpose(1, 2), lse
    operators.check_operands(q, k, v, None, options, None, False)
    check_gradients(q, v, given[0], dlse, given[5], lse)
    d_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    operators.differentiate(step, given, None, options, None, into=parts_of(d_qkv, heads))
    return d_qkv


@qkvpacked_backward_op.register_fake
def qkvpacked_backward_fake(dout: Tensor, dlse: Tensor | None, qkv: Tensor, *_: object) -> Tensor:
    """The shape, dtype and strides of the gradient."""
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def save_for_backward(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    """Keep qkv, out and lse."""
    qkv, *ctx.options = inputs
    ctx.save_for_backward(qkv, *output)
    ctx.set_materialize_grads(False)


def backward(ctx, dout: Tensor | None, dlse: Tensor | None) -> tuple:
    """The gradient of qkv."""
    qkv, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    d_qkv = torch.ops.tformer_lab.flash_attention_qkvpacked_backward(dout, dlse, qkv, out, lse, *ctx.options)
    return d_qkv, *(None for _ in ctx.options)


def forward_flops(qkv, heads, *_, out_val=None) -> int:
    """For ``profiling.count``: S = Q K^T and O = P V."""
    return operators.flops(*parts_of(qkv, heads)[:2], None, None, 2 * qkv.shape[3])


def backward_flops(dout, dlse, qkv, out, lse, heads, *_, out_val=None) -> int:
    """For ``profiling.count``: S again, dP, dV, dQ and dK."""
    return operators.flops(*parts_of(qkv, heads)[:2], None, None, 5 * qkv.shape[3])


qkvpacked_op.register_autograd(backward, setup_context=save_for_backward)
profiling.PRODUCTS[torch.ops.tformer_lab.flash_attention_qkvpacked] = forward_flops
profiling.PRODUCTS[torch.ops.tformer_lab.flash_attention_qkvpacked_backward] = backward_flops
