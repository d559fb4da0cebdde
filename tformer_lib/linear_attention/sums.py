"""The sum of keys times values: softmax attention's exp(q·k) replaced by an inner product of features.

The causal case has three forms that give the same numbers: ``parallel`` (N² work, the oracle), ``recurrent`` (an RNN)
and ``chunked`` (parallel inside a chunk, recurrent between chunks). The denominator is the numerator's sum with every
value set to one, so a column of ones is appended to v and one matrix is kept, (features x value_dim + 1). Without
normalisation there is no such column.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from tformer_lib.contract import check_inputs, in_named_dtypes, score_scale
from tformer_lib.linear_attention.feature_maps import FeatureMap, elu_plus_one
from tformer_lib.linear_attention.shared import (
    CHUNK,
    causal_mask,
    check_packing,
    chunks,
    first_state,
    join,
    read,
    scores,
    sum_dtype,
)

# The public forms.


@in_named_dtypes
def parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    feature_map: FeatureMap = elu_plus_one,
    normalised: bool = True,
) -> Tensor:
    """The form with all T x S weights written out: O(T·S) work, any mask. The oracle of the other forms."""
    check_inputs(q, k, v, mask)
    phi_q, phi_k, values = features(q, k, v, scale, feature_map, normalised)
    weights = scores(phi_q, phi_k)  # (batch, kv_heads, group, T, S)
    if causal:
        weights = weights.masked_fill(~causal_mask(q.shape[2], k.shape[2], q.device), 0.0)
    if mask is not None:
        weights = weights.masked_fill(~by_group(mask, k.shape[1]), 0.0)
    out = (weights.flatten(2, 3) @ values).unflatten(2, weights.shape[2:4])  # (.., group, T, value_dim + 1)
    return finish(out, q.dtype, normalised)


@in_named_dtypes
def associative(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    feature_map: FeatureMap = elu_plus_one,
    normalised: bool = True,
) -> Tensor:
    """Every query sees every key: φ(Q)·(φ(K)ᵀ·V) instead of (φ(Q)·φ(K)ᵀ)·V. Arguments as in ``attend``."""
    phi_q, phi_k, values = checked_features(q, k, v, mask, scale, feature_map, normalised)
    sums = phi_k.mT @ values  # (batch, kv_heads, features, value_dim + 1)
    return finish(read(phi_q, sums), q.dtype, normalised)


@in_named_dtypes
def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    feature_map: FeatureMap = elu_plus_one,
    normalised: bool = True,
) -> Tensor:
    """Causal attention as an RNN: add the token's outer product to the sums, then read. Arguments as in ``attend``."""
    phi_q, phi_k, values = checked_features(q, k, v, mask, scale, feature_map, normalised)
    sums, phi_k, values = absorb_prefix(phi_k, values, q.shape[2])
    outputs = []
    for t in range(q.shape[2]):
        now = slice(t, t + 1)
        sums = sums + phi_k[:, :, now].mT @ values[:, :, now]
        outputs.append(read(phi_q[:, :, :, now], sums))
    return finish(join(outputs, phi_q, values), q.dtype, normalised)


@in_named_dtypes
def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    feature_map: FeatureMap = elu_plus_one,
    normalised: bool = True,
    chunk: int = CHUNK,
) -> Tensor:
    """Causal attention chunk by chunk: large matrix products, one state between them. Arguments as in ``attend``."""
    phi_q, phi_k, values = checked_features(q, k, v, mask, scale, feature_map, normalised)
    sums, phi_k, values = absorb_prefix(phi_k, values, q.shape[2])
    out, _ = scan_chunks(phi_q, phi_k, values, sums, chunk)
    return finish(out, q.dtype, normalised)


def chunked_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float | None = None,
    feature_map: FeatureMap = elu_plus_one,
    normalised: bool = True,
    chunk: int = CHUNK,
) -> Tensor:
    """``chunked`` over several sequences that lie end to end in one batch row, each over its own tokens alone.

    Args:
        q: (1, heads, tokens, head_dim); k and v as in ``attend``, with as many keys as queries.
        cu_seqlens: (sequences + 1,) int32, where each sequence begins; the last entry is ``tokens``.
    """
    phi_q, phi_k, values = checked_features(q, k, v, None, scale, feature_map, normalised)
    if phi_q.shape[3] != phi_k.shape[2]:
        raise ValueError(f"packed sequences need as many queries as keys, got {phi_q.shape[3]} and {phi_k.shape[2]}")
    starts = check_packing(cu_seqlens, q)
    outputs = []
    for start, stop in pairwise(starts):
        now = slice(start, stop)
        sums = first_state(None, phi_k, values.shape[3])
        outputs.append(scan_chunks(phi_q[:, :, :, now], phi_k[:, :, now], values[:, :, now], sums, chunk)[0])
    return finish(join(outputs, phi_q, values), q.dtype, normalised)


def scan_chunks(phi_q: Tensor, phi_k: Tensor, values: Tensor, sums: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Causal numerators and denominators of T queries over T keys after a state; the state is returned updated.

    Args:
        phi_q: (batch, kv_heads, group, T, features).
        phi_k: (batch, kv_heads, T, features).
        values: (batch, kv_heads, T, value_dim + 1), a column of ones last, or without it where nothing is normalised.
        sums: (batch, kv_heads, features, value_dim + 1), the state before the first key.
        chunk: tokens per chunk.
    """
    outputs = []
    for now in chunks(phi_k.shape[2], chunk):
        q_c, k_c, v_c = phi_q[:, :, :, now], phi_k[:, :, now], values[:, :, now]
        within = scores(q_c, k_c).tril()  # (batch, kv_heads, group, C, C)
        inside = (within.flatten(2, 3) @ v_c).unflatten(2, within.shape[2:4])
        outputs.append(read(q_c, sums) + inside)
        sums = sums + k_c.mT @ v_c
    return join(outputs, phi_q, values), sums


# What the forms share.


def features(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, feature_map: FeatureMap, normalised: bool
) -> tuple[Tensor, ...]:
    """φ(q) (batch, kv_heads, group, T, features), φ(k) (batch, kv_heads, S, features), v and, for the sum of the
    weights, a column of ones."""
    scale, dtype = positive_scale(q, scale), sum_dtype(q)
    query_map = getattr(feature_map, "of_queries", feature_map)
    phi_q = query_map(q.to(dtype) * scale**0.5).unflatten(1, (k.shape[1], -1))
    phi_k = feature_map(k.to(dtype) * scale**0.5)
    values = v.to(dtype)
    return phi_q, phi_k, F.pad(values, (0, 1), value=1.0) if normalised else values


def positive_scale(q: Tensor, scale: float | None) -> float:
    """The scale of q·k: the one that was given, or head_dim ** -0.5."""
    scale = score_scale(scale, q.shape[-1])
    if scale <= 0:
        raise ValueError(f"scale must be positive, since its root goes to each side of φ(q)·φ(k), got {scale}")
    return scale


def checked_features(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, feature_map: FeatureMap, normalised: bool
) -> tuple[Tensor, ...]:
    """``features`` behind the contract's door, with the features of masked keys and their values set to zero."""
    check_inputs(q, k, v, mask)
    phi_q, phi_k, values = features(q, k, v, scale, feature_map, normalised)
    if mask is None:
        return phi_q, phi_k, values
    keep = key_padding(mask)  # (batch or 1, 1, S or 1, 1)
    return phi_q, phi_k.masked_fill(~keep, 0.0), values.masked_fill(~keep, 0.0)


def key_padding(mask: Tensor) -> Tensor:
    """A mask that depends on the key alone, as (batch or 1, 1, S or 1, 1); anything else is refused."""
    full = mask[(None,) * (4 - mask.dim())]
    if full.shape[1] != 1 or full.shape[2] != 1:
        raise ValueError(
            "linear attention sums over the keys before it meets a query, so its mask can only hide keys: "
            f"expected a mask that broadcasts to (batch, 1, 1, S), got {tuple(mask.shape)} (parallel() takes any mask)"
        )
    return full.mT


def absorb_prefix(phi_k: Tensor, values: Tensor, T: int) -> tuple[Tensor, Tensor, Tensor]:
    """Align S keys with T queries at the bottom right: (state of the keys before the first query, last T keys, values).

    Where there are fewer keys than queries, the first queries get keys with zero features, which weigh nothing.
    """
    prefix = phi_k.shape[2] - T
    if prefix < 0:
        phi_k, values = (F.pad(x, (0, 0, -prefix, 0)) for x in (phi_k, values))
        prefix = 0
    sums = phi_k[:, :, :prefix].mT @ values[:, :, :prefix]  # (batch, kv_heads, features, value_dim + 1)
    return sums, phi_k[:, :, prefix:], values[:, :, prefix:]


def finish(out: Tensor, dtype: torch.dtype, normalised: bool) -> Tensor:
    """(batch, kv_heads, group, T, e) in the dtype of the sums -> (batch, heads, T, value_dim) in ``dtype``."""
    return normalise(out, dtype) if normalised else out.flatten(1, 2).to(dtype)


def normalise(out: Tensor, dtype: torch.dtype) -> Tensor:
    """Numerator over denominator: (batch, kv_heads, group, T, e + 1) -> (batch, heads, T, e); zero where that is zero.

    No epsilon is added: it would pull every output with a small denominator towards zero.
    """
    numerator, denominator = out[..., :-1], out[..., -1:]
    seen = denominator > 0
    # The inner where keeps 1/0 out of the backward pass, where it would turn into NaN.
    out = torch.where(seen, numerator / torch.where(seen, denominator, 1.0), 0.0)
    return out.flatten(1, 2).to(dtype)


def by_group(mask: Tensor, kv_heads: int) -> Tensor:
    """A mask of up to 4 dimensions as (batch or 1, kv_heads or 1, group or 1, T or 1, S or 1)."""
    full = mask[(None,) * (4 - mask.dim())]
    return full.unsqueeze(1) if full.shape[1] == 1 else full.unflatten(1, (kv_heads, -1))
