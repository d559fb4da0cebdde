"""A state that forgets: the bridge to retention and state-space models.

``gated_*`` are the three causal forms with a decaying state and no denominator: RetNet, GLA and, with a gate per token
and head, the state-space duality of Mamba-2.
"""

from functools import partial

import torch
from torch import Tensor

from tformer_lib.contract import check_inputs, in_named_dtypes, readable, score_scale
from tformer_lib.linear_attention.shared import (
    CHUNK,
    by_kv_head,
    by_sequence,
    causal_mask,
    chunks,
    first_state,
    join,
    read,
    scores,
    sum_dtype,
)

FORGET = -100.0  # exp of it is 0 in float32; -inf would make the difference of two running sums NaN
FEATURE_CHUNK = 16  # a gate per feature needs (C, C, features) numbers inside a chunk


def retention_log_decay(heads: int) -> Tensor:
    """RetNet's decays, log(1 - 2^(-5 - h)) for head h, as (1, heads, 1, 1) in float64 (Sun et al. 2023, eq. 8)."""
    if heads < 1:
        raise ValueError(f"heads must be at least 1, got {heads}")
    return torch.log1p(-torch.exp2(-5.0 - torch.arange(heads, dtype=torch.float64))).view(1, heads, 1, 1)


@in_named_dtypes
def gated_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor,
    scale: float | None = None,
    chunk: int | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``gated_attend`` chunk by chunk: matrix products inside a chunk, one state between chunks.

    Args:
        chunk: tokens per chunk; None is 64, or 16 with a gate per feature. The others are those of ``gated_attend``.
    """
    inputs = gated_inputs(q, k, v, log_decay, scale)
    chunk = default_chunk(inputs[-1]) if chunk is None else chunk
    out, state = by_sequence(partial(scan_decayed, chunk=chunk), cu_seqlens, initial_state, *inputs)
    return (out.to(q.dtype), state) if return_state else out.to(q.dtype)


@in_named_dtypes
def gated_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``gated_attend`` as the recurrence that defines it, one token at a time; arguments and errors are the same."""
    inputs = gated_inputs(q, k, v, log_decay, scale)
    out, state = by_sequence(step_decayed, cu_seqlens, initial_state, *inputs)
    return (out.to(q.dtype), state) if return_state else out.to(q.dtype)


@in_named_dtypes
def gated_parallel(q: Tensor, k: Tensor, v: Tensor, *, log_decay: Tensor, scale: float | None = None) -> Tensor:
    """``gated_attend`` with all T x T weights written out: attention under a mask of decays instead of a softmax.

    Arguments and errors are the same.
    """
    q_s, k, values, gates = gated_inputs(q, k, v, log_decay, scale)
    weights = decayed_scores(by_kv_head(q_s, k), k, gates.cumsum(2))  # (batch, kv_heads, group, T, T)
    out = (weights.flatten(2, 3) @ values).unflatten(2, weights.shape[2:4])
    return out.flatten(1, 2).to(q.dtype)


def scan_decayed(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, initial: Tensor | None, *, chunk: int
) -> tuple[Tensor, Tensor]:
    """The outputs (batch, heads, T, value_dim) and the last state, chunk by chunk.

    Args:
        q: (batch, heads, T, head_dim), scaled.
        k, v: (batch, kv_heads, T, ...).
        gates: (batch, kv_heads, T, 1 or head_dim) in float64.
        initial: (batch, kv_heads, head_dim, value_dim), or None for zeros.
        chunk: tokens per chunk.
    """
    q_g, state = by_kv_head(q, k), first_state(initial, k, v.shape[3])
    outputs = []
    for now in chunks(k.shape[2], chunk):
        q_c, k_c, v_c = q_g[:, :, :, now], k[:, :, now], v[:, :, now]
        since = gates[:, :, now].cumsum(2)  # (batch, kv_heads, C, 1 or head_dim): log decay from the chunk's start
        within = decayed_scores(q_c, k_c, since)
        inside = (within.flatten(2, 3) @ v_c).unflatten(2, within.shape[2:4])
        outputs.append(read(q_c * decay(since, q_c).unsqueeze(2), state) + inside)
        total = since[:, :, -1:]  # (batch, kv_heads, 1, 1 or head_dim)
        state = decay(total, k_c).mT * state + (k_c * decay(total - since, k_c)).mT @ v_c
    return join(outputs, q_g, v).flatten(1, 2), state


def step_decayed(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """``scan_decayed`` token by token."""
    q_g, state = by_kv_head(q, k), first_state(initial, k, v.shape[3])
    outputs = []
    for t in range(k.shape[2]):
        now = slice(t, t + 1)
        state = decay(gates[:, :, now], k).mT * state + k[:, :, now].mT @ v[:, :, now]
        outputs.append(read(q_g[:, :, :, now], state))
    return join(outputs, q_g, v).flatten(1, 2), state


def gated_inputs(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float | None) -> tuple[Tensor, ...]:
    """q·scale (batch, heads, T, head_dim), k, v and gates (batch, kv_heads, T, 1 or head_dim), checked.

    The gates are float64: their running sums grow large where the differences that matter are small.
    """
    check_gated(q, k, v, log_decay)
    dtype = sum_dtype(q)
    scale = score_scale(scale, q.shape[3])
    gates = log_decay.to(k.device, torch.float64).clamp(min=FORGET).expand(*k.shape[:3], -1)
    return q.to(dtype) * scale, k.to(dtype), v.to(dtype), gates


def check_gated(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> None:
    """Refuse what breaks the contract, other keys than queries, and decays that do not fit."""
    check_inputs(q, k, v)
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"gated linear attention needs as many queries as keys, got {q.shape[2]} and {k.shape[2]}")
    check_log_decay(log_decay, k)


def check_log_decay(log_decay: Tensor, k: Tensor) -> None:
    """Refuse decays that do not broadcast to k (batch, kv_heads, T, head_dim), or that let a state grow."""
    if not isinstance(log_decay, Tensor):
        raise ValueError(f"log_decay must be a tensor of 4 dimensions, got {type(log_decay).__name__}")
    if not fits(log_decay, k.shape):
        expected = f"(batch, kv_heads, T, head_dim) = {tuple(k.shape)}"
        raise ValueError(f"log_decay must have 4 dimensions that broadcast to {expected}, got {tuple(log_decay.shape)}")
    if k.is_cuda:
        return  # reading its values would wait for the GPU
    if readable(log_decay) and bool((log_decay > 0).any()):
        raise ValueError(
            f"log_decay must be at most 0, so that the state does not grow, got {log_decay.max().item():.3g}"
        )


def fits(x: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether x has as many dimensions as ``shape``, each of that size or 1."""
    return x.dim() == len(shape) and all(have in (1, wanted) for have, wanted in zip(x.shape, shape, strict=True))


def default_chunk(gates: Tensor) -> int:
    """Tokens per chunk: with a gate per feature, a chunk needs (C, C, features) numbers."""
    return CHUNK if gates.shape[-1] == 1 else FEATURE_CHUNK


def decayed_scores(q: Tensor, k: Tensor, since: Tensor) -> Tensor:
    """Σ_d q_t[d] k_s[d] exp(since_t[d] - since_s[d]) for s <= t, else 0: (batch, kv_heads, group, T, T).

    The difference is taken before the exponential, which is then at most 1. exp(since_t)·exp(-since_s) would need no
    (T, T, head_dim) tensor, but its second factor overflows float32 once a feature has decayed by e^-88.

    Args:
        q: (batch, kv_heads, group, T, head_dim).
        k: (batch, kv_heads, T, head_dim).
        since: (batch, kv_heads, T, 1 or head_dim), the running sum of log decays.
    """
    visible = causal_mask(k.shape[2], k.shape[2], k.device)[..., None]  # (T, T, 1)
    gap = since.unsqueeze(3) - since.unsqueeze(2)  # (batch, kv_heads, T, T, 1 or head_dim)
    kept = decay(torch.where(visible, gap, -torch.inf), k)
    if since.shape[-1] == 1:
        return scores(q, k) * kept.squeeze(-1).unsqueeze(2)
    return torch.einsum("bhgtd,bhsd,bhtsd->bhgts", q, k, kept)


def decay(log_decay: Tensor, like: Tensor) -> Tensor:
    """exp(log_decay), the share that is kept, in the dtype of another tensor."""
    return log_decay.exp().to(like.dtype)
