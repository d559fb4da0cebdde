"""Step 0: flash attention in plain PyTorch, tile by tile. It is the oracle of the kernels."""

import math
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from tformer_lib.contract import in_named_dtypes
from tformer_lib.flash_attention.options import Options, Packing
from tformer_lib.ladder import accumulation_dtype

TILE = 128  # rows and columns of a tile


@in_named_dtypes
def tiled_forward(
    q: Tensor, k: Tensor, v: Tensor, options: Options, mask: Tensor | None = None, tile: int = TILE
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of FlashAttention-2 (arXiv:2307.08691), one tile of queries after another.

    Returns:
        out (batch, heads, T, value_dim) of q's dtype; lse (batch, heads, T) in the accumulation dtype.
    """
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    out = q.new_empty((*q.shape[:3], v.shape[-1]))
    lse = q.new_empty(q.shape[:3], dtype=accumulation_dtype(q))
    for rows in tiles(q.shape[2], tile):
        out[:, :, rows], lse[:, :, rows] = forward_rows(q, k, v, rows, options, mask, tile)
    return out, lse


def forward_rows(
    q: Tensor, k: Tensor, v: Tensor, rows: slice, options: Options, mask: Tensor | None = None, tile: int = TILE
) -> tuple[Tensor, Tensor]:
    """One tile of queries against every tile of keys that it may see: the online softmax."""
    dtype, T, S = accumulation_dtype(q), q.shape[2], k.shape[2]
    q_tile = q[:, :, rows].to(dtype)  # (batch, heads, tile, head_dim)
    m = q_tile.new_full(q_tile.shape[:3], -math.inf)  # running maximum of each row
    l = torch.zeros_like(m)  # running sum of exp(score - m)
    O = q_tile.new_zeros((*q_tile.shape[:3], v.shape[-1]))  # running sum of exp(score - m) v
    for columns in key_tiles(rows, T, S, options, tile):
        scores, _ = score_tile(q_tile, k, rows, columns, T, options, mask)  # (batch, heads, tile, tile)
        m_new = torch.maximum(m, scores.amax(-1))
        anchor = m_new.masked_fill(m_new == -math.inf, 0.0)  # a row that has seen no key: -inf - 0, not -inf - -inf
        P = torch.exp(scores - anchor[..., None])
        correction = torch.exp(m - anchor)
        l = l * correction + P.sum(-1)
        O = O * correction[..., None] + P @ v[:, :, columns].to(dtype)
        m = m_new
    anchor = m.masked_fill(m == -math.inf, 0.0)
    return (O / l.masked_fill(l == 0, 1.0)[..., None]).to(q.dtype), anchor + torch.log(l)


@in_named_dtypes
def tiled_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: Options,
    mask: Tensor | None = None,
    tile: int = TILE,
    dbias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 2 of FlashAttention-2: the probabilities come back from the scores and the log-sum-exp.

    With P = exp(S - lse): dV = P^T dO, dP = dO V^T, dS = P (dP - delta), dQ = dS K scale, dK = dS^T Q scale, where
    delta = rowsum(dO O) is the softmax's own correction. A gradient of lse adds dlse P to dS, so it joins delta. Where
    scores were capped, dS passes through the derivative of tanh on its way. dS before that is the gradient of a bias:
    it is added to ``dbias``, a tensor of the bias's shape, where that is given.
    """
    dtype, T, S, kv_heads = accumulation_dtype(q), q.shape[2], k.shape[2], k.shape[1]
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    delta = (dout.to(dtype) * out.to(dtype)).sum(-1)  # (batch, heads, T)
    delta = delta if dlse is None else delta - dlse
    dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
    for rows in tiles(T, tile):
        q_tile, dout_tile = q[:, :, rows].to(dtype), dout[:, :, rows].to(dtype)
        anchor = lse[:, :, rows].masked_fill(lse[:, :, rows] == -math.inf, math.inf)[..., None]  # such a row has P = 0
        for columns in key_tiles(rows, T, S, options, tile):
            scores, capped = score_tile(q_tile, k, rows, columns, T, options, mask)
            P = torch.exp(scores - anchor)
            dP = dout_tile @ v[:, :, columns].to(dtype).mT
            dS = P * (dP - delta[:, :, rows, None])
            if dbias is not None:
                part = part_of(dbias, rows, columns)
                part += dS.sum_to_size(part.shape)
            if options.softcap:
                dS = dS * (1 - (capped / options.softcap) ** 2)
            dv[:, :, columns] += P.mT @ dout_tile
            dk[:, :, columns] += dS.mT @ q_tile * options.scale
            dq[:, :, rows] += dS @ k[:, :, columns].to(dtype) * options.scale
    dk, dv = sum_groups(dk, kv_heads), sum_groups(dv, kv_heads)
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def score_tile(
    q_tile: Tensor, k: Tensor, rows: slice, columns: slice, T: int, options: Options, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The scores of one tile, -inf where the query may not look, and before a bias: (batch, heads, rows, columns)."""
    capped = q_tile @ k[:, :, columns].to(q_tile.dtype).mT * options.scale
    if options.softcap:
        capped = options.softcap * torch.tanh(capped / options.softcap)
    query = torch.arange(rows.start, rows.stop, device=k.device)[:, None] + (
        k.shape[2] - T
    )  # aligned to the bottom right
    key = torch.arange(columns.start, columns.stop, device=k.device)
    scores = capped
    if options.alibi_slopes is not None:  # (heads,) or (batch, heads)
        scores = scores - options.alibi_slopes[..., None, None].to(scores.dtype) * (query - key).abs()
    if options.bias is not None:
        scores = scores + part_of(options.bias, rows, columns).to(scores.dtype)
    if options.last_ahead >= 0:
        scores = scores.masked_fill(key > query + options.last_ahead, -math.inf)
    if options.window:
        scores = scores.masked_fill(key <= query - options.window, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~part_of(mask, rows, columns), -math.inf)
    return scores, capped


def part_of(x: Tensor, rows: slice, columns: slice) -> Tensor:
    """The part of a broadcastable mask or bias that covers one tile."""
    x = x.reshape((1,) * (4 - x.dim()) + tuple(x.shape))
    x = x if x.shape[2] == 1 else x[:, :, rows]
    return x if x.shape[3] == 1 else x[..., columns]


def packed_forward(q: Tensor, k: Tensor, v: Tensor, options: Options, packing: Packing) -> tuple[Tensor, Tensor]:
    """Step 0 on packed sequences: one after another."""
    out, lse = empty_outputs(q, v)
    for i, (rows, columns) in enumerate(sequences(packing)):
        out[:, :, rows], lse[:, :, rows] = tiled_forward(
            q[:, :, rows], k[:, :, columns], v[:, :, columns], options_of(options, i)
        )
    return out, lse


def packed_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: Options,
    packing: Packing,
) -> tuple[Tensor, Tensor, Tensor]:
    """Step 0's gradients on packed sequences."""
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for i, (rows, columns) in enumerate(sequences(packing)):
        dq[:, :, rows], dk[:, :, columns], dv[:, :, columns] = tiled_backward(
            dout[:, :, rows],
            None if dlse is None else dlse[:, :, rows],
            q[:, :, rows],
            k[:, :, columns],
            v[:, :, columns],
            out[:, :, rows],
            lse[:, :, rows],
            options_of(options, i),
        )
    return dq, dk, dv


def options_of(options: Options, sequence: int) -> Options:
    """What is asked of one packed sequence, whose slopes may be its own."""
    slopes = options.alibi_slopes
    return options if slopes is None or slopes.dim() == 1 else replace(options, alibi_slopes=slopes[sequence])


def sequences(packing: Packing) -> list[tuple[slice, slice]]:
    """Where each packed sequence's queries and keys are."""
    starts_q, starts_k = (x.tolist() for x in (packing.cu_seqlens_q, packing.cu_seqlens_k))
    cuts_q = [slice(a, b) for a, b in pairwise(starts_q)]
    cuts_k = [slice(a, b) for a, b in pairwise(starts_k)]
    return list(zip(cuts_q, cuts_k, strict=True))


def tiles(length: int, tile: int) -> list[slice]:
    """Cut ``length`` rows into tiles; the last may be short."""
    return [slice(start, min(start + tile, length)) for start in range(0, length, tile)]


def key_tiles(rows: slice, T: int, S: int, options: Options, tile: int) -> list[slice]:
    """The tiles of keys that any query of ``rows`` may see; the others are never touched."""
    first = max(0, rows.start + S - T - options.window + 1) if options.window else 0
    last = min(S, rows.stop + S - T + options.last_ahead) if options.last_ahead >= 0 else S
    return [columns for columns in tiles(S, tile) if columns.stop > first and columns.start < last]


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """(batch, kv_heads, S, d) -> (batch, heads, S, d): each kv head serves heads / kv_heads query heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def sum_groups(x: Tensor, kv_heads: int) -> Tensor:
    """(batch, heads, S, d) -> (batch, kv_heads, S, d): the gradient of ``repeat_heads``."""
    return x if x.shape[1] == kv_heads else x.unflatten(1, (kv_heads, -1)).sum(2)


def empty_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out (batch, heads, T, value_dim), laid out as q is where q's columns are adjacent, and lse (batch, heads, T)."""
    lse = q.new_empty(q.shape[:3], dtype=accumulation_dtype(q))
    if v.shape[-1] == q.shape[-1]:
        return laid_out_as(q), lse
    batch, heads, T, _ = q.shape
    if q.stride(1) < q.stride(2):  # a view of (batch, T, heads, head_dim)
        return q.new_empty(batch, T, heads, v.shape[-1]).transpose(1, 2), lse
    return q.new_empty(batch, heads, T, v.shape[-1]), lse


def laid_out_as(x: Tensor) -> Tensor:
    """An empty tensor in the order of ``x`` where its columns are adjacent, else contiguous.

    A layer makes its heads by a view of (batch, T, heads * head_dim). What comes back in the same order goes into the
    next matmul without a copy.
    """
    layout = torch.preserve_format if x.stride(-1) == 1 else torch.contiguous_format
    return torch.empty_like(x, memory_format=layout)
