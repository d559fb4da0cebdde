"""Step 0: dense attention of buckets of query blocks over the live blocks that they see, in plain PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional as F

from tformer_lib.contract import in_named_dtypes
from tformer_lib.sparse_attention.patterns import Bucket, Pattern, hide, plan


@in_named_dtypes
def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    mask: Tensor | None,
    scale: float,
    block: int,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention over a pattern's live blocks; arguments as in ``attend``, checked there."""
    T, S, kv_heads = q.shape[2], k.shape[2], k.shape[1]
    q_blocks = in_blocks(q, block).unflatten(
        1, (kv_heads, -1)
    )  # (batch, kv_heads, group, query_blocks, block, head_dim)
    k_blocks, v_blocks = in_blocks(k, block), in_blocks(v, block)  # (batch, kv_heads, key_blocks, block, ...)
    sinks = None if sinks is None else sinks.view(kv_heads, -1)  # (kv_heads, group)
    rows, outputs = [], []
    for bucket in plan(pattern, T, S, block, q.device):
        for piece in bucket.slices(q.shape[0] * q.shape[1] * block * bucket.allowed.shape[-1]):
            if mask is not None:
                piece = narrow(piece, mask, (T, S), block, kv_heads)
            rows.append(piece.rows)
            outputs.append(attend_piece(q_blocks, k_blocks, v_blocks, piece, scale, sinks))
    out = v.new_zeros(*q_blocks.shape[:5], v.shape[3])
    if outputs:
        out = out.index_copy(3, torch.cat(rows), torch.cat(outputs, dim=3))
    else:  # no pair is allowed: zeros, and a function of the inputs, so that a backward pass finds its way
        out = out + sum(x[..., :0].sum() for x in (q, k, v))
    return out.flatten(3, 4)[:, :, :, :T].flatten(1, 2)


def in_blocks(x: Tensor, block: int) -> Tensor:
    """(batch, heads, length, d) -> (batch, heads, blocks, block, d), padded with zeros at the end."""
    missing = -x.shape[2] % block
    return (F.pad(x, (0, 0, 0, missing)) if missing else x).unflatten(2, (-1, block))


def attend_piece(
    q_blocks: Tensor, k_blocks: Tensor, v_blocks: Tensor, piece: Bucket, scale: float, sinks: Tensor | None
) -> Tensor:
    """Dense attention of R query blocks, each over its m live key blocks, scores in float32 or better.

    Args:
        q_blocks: (batch, kv_heads, group, query_blocks, block, head_dim).
        k_blocks, v_blocks: (batch, kv_heads, key_blocks, block, head_dim or value_dim).
        piece: the rows, the blocks, and what is hidden inside them.
        sinks: (kv_heads, group) or None, a logit of every row that takes its share of the softmax and has no value.

    Returns:
        (batch, kv_heads, group, R, block, value_dim).
    """
    dtype = torch.promote_types(q_blocks.dtype, torch.float32)
    q = q_blocks.index_select(3, piece.rows).transpose(2, 3)  # (batch, kv_heads, R, group, block, head_dim)
    group_and_block = q.shape[3:5]
    q = q.flatten(3, 4).to(dtype) * scale  # (batch, kv_heads, R, group · block, head_dim)
    k, v = (x.index_select(2, piece.blocks.flatten()).to(dtype) for x in (k_blocks, v_blocks))
    k, v = (x.unflatten(2, piece.blocks.shape).flatten(3, 4) for x in (k, v))  # (batch, kv_heads, R, m · block, ...)
    scores = (q @ k.mT).unflatten(3, group_and_block)  # (batch, kv_heads, R, group, block, m · block)
    weights = softmax_with_sinks(scores.masked_fill_(piece.hidden, -torch.inf), sinks)
    out = (weights.flatten(3, 4) @ v).unflatten(3, group_and_block)
    return out.masked_fill(piece.blind, 0.0).transpose(2, 3).to(q_blocks.dtype)


def softmax_with_sinks(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the last dimension of (batch, kv_heads, R, group, block, keys), without the sinks' own share."""
    if sinks is None:
        return scores.softmax(-1)
    column = sinks.to(scores.dtype)[:, None, :, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat((scores, column), dim=-1).softmax(-1)[..., :-1]


def narrow(piece: Bucket, mask: Tensor, lengths: tuple[int, int], block: int, kv_heads: int) -> Bucket:
    """The piece, allowing only what the caller's mask allows too."""
    T, S = lengths
    within = torch.arange(block, device=mask.device)
    q = (piece.rows[:, None] * block + within).clamp(max=T - 1)  # (R, block)
    k = (piece.blocks[:, :, None] * block + within).flatten(1).clamp(max=S - 1)  # (R, m · block)
    full = mask[(None,) * (4 - mask.dim())].expand(-1, -1, T, S)  # a view: broadcast dimensions have stride 0
    seen = full[:, :, q[:, :, None], k[:, None, :]]  # (batch or 1, heads or 1, R, block, m · block)
    seen = seen.unsqueeze(2) if seen.shape[1] == 1 else seen.unflatten(1, (kv_heads, -1))
    allowed = seen.transpose(2, 3) & piece.allowed  # (batch or 1, kv_heads or 1, R, group or 1, block, m · block)
    return Bucket(piece.rows, piece.blocks, piece.live, allowed, *hide(allowed))
