"""Step 0: blocks gathered with PyTorch, and plain attention over them. It is the oracle of the kernels."""

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from tformer_lib.attention import Attend, AttentionVariant, gather, masked_softmax, scaled_scores
from tformer_lib.contract import in_named_dtypes
from tformer_lib.ladder import FP8, accumulation_dtype
from tformer_lib.paged_attention.blocks import blocks_for
from tformer_lib.paged_attention.options import Options, Places, Rows, WriteOptions
from tformer_lib.rope import rotate


def write_in_pytorch(
    k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, places: Places, options: WriteOptions
) -> None:
    """Step 0 of :func:`write_cache`."""
    slots, cos, sin = places
    if cos is not None:
        wide = k if k.dtype == torch.float64 else k.float()
        rotated = rotate(wide.transpose(0, 1)[None], cos, sin, options.layout)[0]  # (kv_heads, tokens, head_dim)
        k = rotated.transpose(0, 1)
    kept = slots >= 0
    blocks, offsets = slots[kept] // k_pool.shape[2], slots[kept] % k_pool.shape[2]
    as_numbers(k_pool)[blocks, :, offsets] = as_numbers(to_pool(k[kept], k_pool.dtype, options.k_scale))
    as_numbers(v_pool)[blocks, :, offsets] = as_numbers(to_pool(v[kept], v_pool.dtype, options.v_scale))


def to_pool(x: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """x / scale in the pool's dtype; float8 has no infinity, so what is too large becomes the largest number."""
    if dtype != FP8:
        return x.to(dtype) if scale == 1.0 else (x / scale).to(dtype)
    most = torch.finfo(FP8).max
    return (x.float() / scale).clamp(-most, most).to(FP8)


def as_numbers(x: Tensor) -> Tensor:
    """The same memory as bytes where it is float8, which PyTorch cannot index."""
    return x.view(torch.uint8) if x.dtype == FP8 else x


@in_named_dtypes
def attend_in_pytorch(q: Tensor, k_pool: Tensor, v_pool: Tensor, rows: Rows, options: Options) -> tuple[Tensor, Tensor]:
    """Step 0 of :func:`paged_attention`: rows with equally many queries are gathered and attended together."""
    tables, lengths, query_starts, _ = rows
    wide = accumulation_dtype(q)
    out = q.new_zeros(q.shape)
    lse = q.new_full(q.shape[:2], -torch.inf, dtype=wide)
    starts = torch.arange(q.shape[0] + 1, device=q.device) if query_starts is None else query_starts.long()
    counts = starts.diff()  # (batch,)
    for count in counts.unique().tolist():
        same = (counts == count).nonzero().squeeze(1)
        places = starts[same, None] + torch.arange(count, device=q.device)  # (rows, count)
        longest = int(lengths[same].max())
        keys, values = (
            gather_blocks(pool, tables[same], lengths[same], longest).to(wide) * factor
            for pool, factor in ((k_pool, options.k_scale), (v_pool, options.v_scale))
        )  # (rows, kv_heads, S, head_dim)
        seen = visible_keys(lengths[same], count, keys.shape[2], options.window)[:, None]  # (rows, 1, count, S)
        scores = scaled_scores(q[places].transpose(1, 2).to(wide), keys, options.scale)  # (rows, heads, count, S)
        mixed = gather(masked_softmax(scores, seen), values)  # (rows, heads, count, head_dim)
        out[places] = mixed.transpose(1, 2).to(q.dtype)
        lse[places] = scores.masked_fill(~seen, -torch.inf).logsumexp(-1).transpose(1, 2)
    return out, lse


def attend_one_by_one(q: Tensor, k_pool: Tensor, v_pool: Tensor, rows: Rows, options: Options) -> tuple[Tensor, Tensor]:
    """Step 0 with each row, of one query at most, by itself: products of one shape add in one order."""
    out, lse = q.new_zeros(q.shape), q.new_full(q.shape[:2], -torch.inf, dtype=accumulation_dtype(q))
    starts = list(range(q.shape[0] + 1)) if rows.query_starts is None else rows.query_starts.tolist()
    for row, (start, stop) in enumerate(pairwise(starts)):
        if stop > start:
            alone = Rows(rows.block_tables[row : row + 1], rows.lengths[row : row + 1])
            out[start:stop], lse[start:stop] = attend_in_pytorch(q[start:stop], k_pool, v_pool, alone, options)
    return out, lse


def attend_rows(q: Tensor, k_pool: Tensor, v_pool: Tensor, rows: Rows, attend: Attend) -> Tensor:
    """Any attention form over what lies in blocks, for forms that no kernel computes (a soft cap, ALiBi).

    Rows with equally many queries are gathered and attend together. With one query a row nothing is read by the host,
    so that a CUDA graph can record it.

    Args:
        q, k_pool, v_pool, rows: as for :func:`paged_attention`.
        attend: an attention form under the contract; an ``AttentionVariant`` is told where queries and keys stand.

    Returns:
        (total, heads, value_dim).
    """
    tables, lengths, query_starts, _ = rows
    if query_starts is None:
        S = tables.shape[1] * k_pool.shape[2]
        return attend_gathered(q[:, None], k_pool, v_pool, tables, lengths, S, attend)[:, 0]
    starts = query_starts.long()
    counts = starts.diff()  # (batch,)
    places, found = [], []
    for count in counts.unique().tolist():
        same = (counts == count).nonzero().squeeze(1)
        here = starts[same, None] + torch.arange(count, device=q.device)  # (rows, count)
        S = int(lengths[same].max())
        found.append(attend_gathered(q[here], k_pool, v_pool, tables[same], lengths[same], S, attend).flatten(0, 1))
        places.append(here.flatten())
    found = torch.cat(found)  # (total, heads, value_dim)
    return found.new_zeros(q.shape[0], *found.shape[1:]).index_copy(0, torch.cat(places), found)


def attend_gathered(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, tables: Tensor, lengths: Tensor, S: int, attend: Attend
) -> Tensor:
    """The attention of each row's last tokens, q (rows, count, heads, head_dim), over its keys; the same shape."""
    count = q.shape[1]
    keys, values = (gather_blocks(pool, tables, lengths, S) for pool in (k_pool, v_pool))
    seen = visible_keys(lengths, count, keys.shape[2], None)[:, None]  # (rows, 1, count, S)
    if isinstance(attend, AttentionVariant):
        queries = lengths[:, None] - count + torch.arange(count, device=q.device)  # (rows, count)
        attend = partial(attend, places=(queries, torch.arange(keys.shape[2], device=q.device)[None]))
    return attend(q.transpose(1, 2), keys, values, mask=seen).transpose(1, 2)


def gather_blocks(pool: Tensor, block_tables: Tensor, lengths: Tensor, S: int) -> Tensor:
    """What a contiguous cache would hold: the rows' tokens in order, zeros past each row's length.

    Zeros, not what lies there: a weight of 0 times a stale NaN would be NaN.

    Args:
        pool: (blocks, kv_heads, block_size, head_dim).
        block_tables: (batch, max_blocks); entries past a row's last block may be anything.
        lengths: (batch,) tokens in each row.
        S: the longest length, or more.

    Returns:
        (batch, kv_heads, S, head_dim).
    """
    block_size = pool.shape[2]
    used_blocks = blocks_for(S, block_size)
    slots = torch.arange(used_blocks * block_size, device=pool.device)
    held = slots < lengths[:, None]  # (batch, slots)
    blocks = block_tables[:, :used_blocks].long()  # (batch, used_blocks)
    blocks = blocks.masked_fill(~held[:, ::block_size], 0)
    x = as_numbers(pool)[blocks].transpose(1, 2)  # (batch, kv_heads, used_blocks, block_size, head_dim)
    x = x.flatten(2, 3)[:, :, :S]  # (batch, kv_heads, S, head_dim)
    return x.masked_fill(~held[:, None, :S, None], 0).view(pool.dtype)


def visible_keys(lengths: Tensor, count: int, S: int, window: int | None) -> Tensor:
    """Which of a row's S keys its last ``count`` tokens see: (batch, count, S) boolean, aligned to the bottom right."""
    keys = torch.arange(S, device=lengths.device)
    places = (lengths[:, None] - count + torch.arange(count, device=lengths.device))[:, :, None]  # (batch, count, 1)
    seen = keys <= places
    return seen if window is None else seen & (keys > places - window)
