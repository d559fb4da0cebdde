"""The operator around the kernels, with its gradients, and the way into it."""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from tformer_lib.contract import in_named_dtypes
from tformer_lib.ladder import AUTO, KERNEL_DTYPES, check_no_tangent
from tformer_lib.linear_attention.decay import FORGET
from tformer_lib.linear_attention.feature_maps import FeatureMap
from tformer_lib.linear_attention.gradients import Sums, chunk_gradients
from tformer_lib.linear_attention.kernels import FEW_TOKENS, LADDER, MAPS, MOST_HEAD_DIM, choose_step, launch, refusal
from tformer_lib.linear_attention.pointwise import map_features
from tformer_lib.linear_attention.shared import check_cu_seqlens, check_packing, check_state, sum_dtype


@torch.library.custom_op("tformer_lab::linear_attention", mutates_args=())
@in_named_dtypes
def linear_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    length: int,
    scale: float,
    map_code: int,
    map_scale: float,
    normalised: bool,
    step: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator behind the public forms: (out, last states, denominators), see ``launch``."""
    if cu_seqlens is not None and q.device.type == "cpu":  # a GPU would wait for what is read here
        longest = max(stop - start for start, stop in pairwise(check_packing(cu_seqlens, q)))
        if longest > length:
            raise ValueError(f"max_seqlen is {length}, the longest sequence has {longest} tokens")
    if map_code and maps_first(step, q, v, length):
        q, k, map_code = map_features(q, map_code, map_scale), map_features(k, map_code, map_scale), 0
    return launch(
        choose_step(step, q, v, beta, length, mapped=map_code != 0),
        q,
        k,
        v,
        log_decay=log_decay,
        beta=beta,
        initial=initial,
        cu_seqlens=cu_seqlens,
        length=length,
        scale=scale,
        map_code=map_code,
        map_scale=map_scale,
        normalised=normalised,
    )


def maps_first(step: str, q: Tensor, v: Tensor, length: int) -> bool:
    """Whether features are made by a kernel of their own, so that step 4 can follow, which is faster together."""
    return step == AUTO and length > FEW_TOKENS and refusal("4", q, v, None) is None


def denominators_like(q: Tensor, normalised: bool) -> Tensor:
    """Room for a number a query, or for none."""
    return q.new_empty(q.shape[:3] if normalised else (0,), dtype=sum_dtype(q))


@linear_attention_op.register_fake
def linear_attention_fake(
    q, k, v, log_decay, beta, initial, cu_seqlens, length, scale, map_code, map_scale, normalised, step
):
    """The shapes and dtypes of what the operator returns."""
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = q.new_empty(sequences, k.shape[1], v.shape[3] + int(normalised), q.shape[3], dtype=sum_dtype(q))
    return q.new_empty(*q.shape[:3], v.shape[3]), final, denominators_like(q, normalised)


@torch.library.custom_op("tformer_lab::linear_attention_backward", mutates_args=())
@in_named_dtypes
def linear_attention_backward_op(
    dout: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor,
    denominators: Tensor,
    length: int,
    scale: float,
    map_code: int,
    map_scale: float,
    normalised: bool,
    step: str,
    gate_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, log_decay, beta and the first states; what was not given has an empty one.

    ``gate_gradient``: whether log_decay needs one; without, three sums are enough.
    """
    grow = lift(dout) if q.dtype == torch.float16 else None
    if grow is not None:
        dout, dfinal = dout * grow, None if dfinal is None else dfinal * grow
    if beta is None and not gate_gradient:
        sums = Sums(choose_backward(step, q, v, length), cu_seqlens, length)
        options = (normalised, scale, map_code, map_scale)
        grads = sums.gradients(dout, dfinal, q, k, v, log_decay, initial, out, denominators, *options)
    else:
        grads = chunk_gradients(dout, dfinal, q, k, v, log_decay, beta, initial, cu_seqlens, length, scale)
    if grow is not None:
        grads = [None if grad is None else grad / grow for grad in grads]
    inputs = (q, k, v, log_decay, beta, initial)
    return tuple(contiguous_like(grad, x, q) for grad, x in zip(grads, inputs, strict=True))


def lift(dout: Tensor) -> Tensor:
    """The power of two that brings gradients below 0.001 to 1/64; 1 for others. float16 has all bits from 6e-5 on."""
    most = dout.abs().amax().float() if dout.numel() else dout.new_zeros((), dtype=torch.float32)
    small = (most > 0) & (most < 2.0**-10)
    return torch.where(small, torch.exp2(-6 - torch.where(small, most, 1.0).log2().ceil()), 1.0)


def contiguous_like(grad: Tensor | None, x: Tensor | None, q: Tensor) -> Tensor:
    """A gradient as the operator returns it: contiguous, in the dtype of its input, empty where there is no input."""
    if x is None:
        return q.new_empty(0)
    grad = torch.zeros_like(x) if grad is None else grad.to(x.dtype)
    return grad.contiguous()


@linear_attention_backward_op.register_fake
def linear_attention_backward_fake(dout, dfinal, q, k, v, log_decay, beta, initial, *_):
    """The shapes and dtypes of the gradients."""
    inputs = (q, k, v, log_decay, beta, initial)
    return tuple(q.new_empty(0) if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs)


def choose_backward(step: str, q: Tensor, v: Tensor, length: int) -> str:
    """The step that computes the gradients of a sum: the forward's, where values are no wider than features may be."""
    wide = v.shape[3] > MOST_HEAD_DIM or v.shape[3] % 8
    return "0" if step == "0" or wide else choose_step(step, q, v, None, length)


def save_for_backward(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Keep the inputs and the output; nothing of size T x T, and no state but the first."""
    *tensors, ctx.length, ctx.scale, ctx.map_code, ctx.map_scale, ctx.normalised, ctx.step = inputs
    out, _, denominators = output
    ctx.save_for_backward(*tensors, out, denominators)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def backward(ctx, dout: Tensor | None, dfinal: Tensor | None, _: Tensor | None) -> tuple:
    """The gradients of the operator's inputs."""
    *inputs, cu_seqlens, out, denominators = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    grads = torch.ops.tformer_lab.linear_attention_backward(
        dout,
        dfinal,
        *inputs,
        cu_seqlens,
        out,
        denominators,
        *(ctx.length, ctx.scale, ctx.map_code, ctx.map_scale, ctx.normalised, ctx.step, ctx.needs_input_grad[3]),
    )
    return *(None if x is None else grad for x, grad in zip(inputs, grads, strict=True)), *(None for _ in range(7))


linear_attention_op.register_autograd(backward, setup_context=save_for_backward)


# --- the way in ------------------------------------------------------------------------------------------------------


def kernel_wanted(q: Tensor, step: int | str | None) -> bool:
    """Whether a call goes to the operator: a step was asked for, or the tensors are on a GPU that has kernels."""
    return step is not None or (q.is_cuda and q.dtype in KERNEL_DTYPES)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    scale: float = 1.0,
    feature_map: FeatureMap | None = None,
    map_scale: float = 1.0,
    normalised: bool = False,
    step: int | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal linear attention by the operator: (out, last states).

    Args:
        q, k, v: checked, T = S.
        log_decay, beta: broadcastable to (batch, kv_heads, T, 1).
        initial_state: (sequences, kv_heads, head_dim, value_dim (+ 1 if normalised)).
        max_seqlen: of the longest packed sequence; read from ``cu_seqlens`` if None, which waits for a GPU.
        feature_map: one of ``MAPS``, applied to q and k times ``map_scale``.
        step: of the ladder; the fastest that can do it if None.
    """
    inputs = (q, k, v, log_decay, beta, initial_state)
    check_no_tangent("this step of linear attention", *inputs, instead="the forms without a step, on a CPU")
    head_dim, value_dim = q.shape[3], v.shape[3]
    if feature_map is not None and head_dim % 8:  # a kernel's padding would be mapped too
        q, k = (feature_map(x.to(sum_dtype(x)) * map_scale).to(x.dtype) for x in (q, k))
        feature_map, map_scale = None, 1.0
    by_token = lambda x: None if x is None else x.to(q.device, sum_dtype(q)).expand(*k.shape[:3], 1)  # noqa: E731
    log_decay = None if log_decay is None else log_decay.clamp(min=FORGET)
    if initial_state is not None:
        sequences = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
        check_state(initial_state, k, value_dim + normalised, sequences)
        initial_state = pad_state(initial_state.to(sum_dtype(q)).mT, value_dim, normalised)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, q)
    if cu_seqlens is not None and max_seqlen is None:
        max_seqlen = int(cu_seqlens.diff().max())
    out, final, _ = torch.ops.tformer_lab.linear_attention(
        pad_columns(q),
        pad_columns(k),
        pad_columns(v),
        by_token(log_decay),
        by_token(beta),
        initial_state,
        cu_seqlens,
        q.shape[2] if max_seqlen is None else max_seqlen,
        scale,
        MAPS[feature_map],
        map_scale,
        normalised,
        LADDER.name(step),
    )
    return out[..., :value_dim], unpad_state(final, value_dim, head_dim, normalised).mT


def pad_state(state: Tensor, value_dim: int, normalised: bool) -> Tensor:
    """A transposed state for values and features that are padded to a multiple of 8; the sum of the keys stays last."""
    if value_dim % 8 == 0:
        return pad_columns(state)  # as it is: a copy would take longer than the step of one token
    rows = F.pad(state[:, :, :value_dim], (0, 0, 0, -value_dim % 8))
    return pad_columns(torch.cat([rows, state[:, :, value_dim:]], 2) if normalised else rows)


def unpad_state(state: Tensor, value_dim: int, head_dim: int, normalised: bool) -> Tensor:
    """The inverse of ``pad_state``."""
    if value_dim % 8 and normalised:
        state = torch.cat([state[:, :, :value_dim], state[:, :, -1:]], 2)
    return state[:, :, : value_dim + normalised, :head_dim]


def pad_columns(x: Tensor) -> Tensor:
    """x with columns of zeros up to a multiple of 8, which 16-byte loads need."""
    return F.pad(x, (0, -x.shape[3] % 8)) if x.shape[3] % 8 else x
