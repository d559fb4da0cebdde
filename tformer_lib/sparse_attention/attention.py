"""The public functions: attention over a pattern, and over blocks that were chosen."""

import torch
from torch import Tensor

from tformer_lib.contract import check_inputs, has_no_numbers, score_scale
from tformer_lib.ladder import AUTO, HALVES, check_no_tangent
from tformer_lib.sparse_attention.blocks import attend_blocks, in_blocks
from tformer_lib.sparse_attention.checks import check_chosen, check_sinks
from tformer_lib.sparse_attention.kernels import LADDER, refusal
from tformer_lib.sparse_attention.lists import BLOCK as KERNEL_BLOCK
from tformer_lib.sparse_attention.lists import TILE
from tformer_lib.sparse_attention.patterns import BLOCK, Band, Pattern


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: Pattern,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    block: int = BLOCK,
    sinks: Tensor | None = None,
    step: int | str | None = None,
) -> Tensor:
    """Softmax attention over the pairs that a pattern allows, in time and memory of its live blocks.

    Args:
        q: (batch, heads, T, head_dim).
        k: (batch, kv_heads, S, head_dim).
        v: (batch, kv_heads, S, value_dim).
        pattern: which pairs may meet, the queries being the last T of S positions.
        mask: boolean, broadcastable to (batch, heads, T, S); allows less than the pattern, saves no work, runs step 0.
        causal: short for ``pattern & causal()``.
        scale: None is head_dim ** -0.5.
        block: queries and keys per block of step 0; a multiple of a block pattern's own leaves nothing half empty.
        sinks: (heads,) or None: a logit of each head that joins the softmax of its rows and has no value (gpt-oss).
        step: 0 for plain PyTorch, "cpu", 1 or 2 for a kernel; on a GPU the fastest that can do it if not given.

    Returns:
        (batch, heads, T, value_dim) in q's dtype; zeros for a query that may look at nothing.

    Raises:
        ValueError: if the inputs break the contract, the pattern does not cover S positions, or the step cannot do it.
    """
    check_inputs(q, k, v, mask)
    check_sinks(sinks, q)
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    if not isinstance(pattern, Pattern):
        raise ValueError(f"pattern must be a Pattern such as sliding_window(512), got {type(pattern).__name__}")
    name = LADDER.name(step)
    scale = float(score_scale(scale, q.shape[-1]))
    if mask is not None and name not in (AUTO, "0"):
        raise ValueError(f"step {name} cannot do this: a mask beside the pattern needs step 0")
    # Step 0 makes its plan from the pattern: no graph can hold that, and where there are no numbers there is no plan.
    traced = torch.compiler.is_compiling() or has_no_numbers(q)
    if mask is not None or (not traced and (name == "0" or (name == AUTO and not has_kernel(q, v)))):
        pattern = pattern & Band(None, 0) if causal else pattern
        return attend_blocks(q, k, v, pattern, mask, scale, block, sinks)
    check_no_tangent("this step of sparse attention", q, k, v, sinks, instead="step=0")
    return torch.ops.tformer_lab.sparse_attention(q, k, v, sinks, None, pattern.handle, bool(causal), scale, name)[0]


def attend_chosen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    sinks: Tensor | None = None,
    step: int | str | None = None,
) -> Tensor:
    """Softmax attention of each tile of 128 queries over the blocks of 64 keys that were chosen for it.

    Nothing waits for the device, so it may have chosen them itself a moment ago.

    Args:
        q: (batch, heads, T, head_dim).
        k, v: (batch, kv_heads, S, head_dim).
        chosen: (batch, heads, ceil(T / 128), n) integers, where batch may be 1, and heads 1 or kv_heads: indices of
            blocks, each at most once in a list, in any order; -1 for none.
        causal: hide the future inside of what was chosen; the last query sees the last key.
        scale: None is head_dim ** -0.5.
        sinks: (heads,) or None, as in :func:`attend`.
        step: 0, "cpu", 1 or 2; the fastest that can do it if not given.

    Returns:
        (batch, heads, T, value_dim) in q's dtype; zeros for a query that may look at nothing.

    Raises:
        ValueError: if the inputs break the contract, or, on a CPU, ``chosen`` names a block that is not there or one
            twice. On a GPU that would wait for it, so there it is believed.
    """
    check_inputs(q, k, v)
    check_sinks(sinks, q)
    check_chosen(chosen, q, k)
    heads = chosen.shape[1]
    if heads not in (1, q.shape[1]):
        chosen = chosen.repeat_interleave(q.shape[1] // heads, dim=1)
    scale = float(score_scale(scale, q.shape[-1]))
    check_no_tangent("attend_chosen", q, k, v, sinks, instead="attention.attend under the mask of the chosen blocks")
    options = (-1, bool(causal), scale, LADDER.name(step))
    return torch.ops.tformer_lab.sparse_attention(q, k, v, sinks, chosen, *options)[0]


@torch.no_grad()
def choose_blocks(q: Tensor, k: Tensor, count: int, *, causal: bool = False) -> Tensor:
    """For each tile of 128 queries the blocks of 64 keys whose mean key the tile's mean query likes best.

    A choice by means is that of Mixture of Block Attention (Lu et al. 2025, arXiv:2502.13189), there for each query. No
    gradient passes: what is chosen is not differentiable.

    Args:
        q: (batch, heads, T, head_dim).
        k: (batch, kv_heads, S, head_dim). The heads that share a kv head choose together.
        count: blocks to choose; under ``causal`` the two that hold the tile's own positions are always among them.
        causal: choose no block that begins after the tile's last query. The last query stands at the last key.

    Returns:
        (batch, kv_heads, ceil(T / 128), min(count, blocks)) indices for :func:`attend_chosen`, -1 where none is left.

    Raises:
        ValueError: if count is too small.
    """
    least = 2 if causal else 1
    if count < least:
        raise ValueError(f"count must be at least {least}, got {count}")
    T, S = q.shape[2], k.shape[2]
    q = q.unflatten(1, (k.shape[1], -1)).float().mean(2)  # (batch, kv_heads, T, head_dim)
    scores = block_means(q, TILE) @ block_means(k.float(), KERNEL_BLOCK).mT  # (batch, kv_heads, tiles, blocks)
    if causal:
        first = (
            torch.arange(scores.shape[2], device=q.device)[:, None] * TILE + S - T
        )  # position of a tile's first query
        last = (first + TILE - 1).clamp(max=S - 1)
        begin = torch.arange(scores.shape[3], device=q.device) * KERNEL_BLOCK
        scores = scores.masked_fill((begin + KERNEL_BLOCK > first) & (begin <= last), torch.inf)
        scores = scores.masked_fill(begin > last, -torch.inf)
    best = scores.topk(min(count, scores.shape[3]), dim=-1)
    return best.indices.masked_fill(best.values == -torch.inf, -1)


def block_means(x: Tensor, block: int) -> Tensor:
    """(batch, heads, length, d) -> (batch, heads, blocks, d), the mean of each block; the last may be shorter."""
    padded = in_blocks(x, block)  # (batch, heads, blocks, block, d), zeros at the end
    sizes = torch.full((padded.shape[2], 1), float(block), device=x.device)
    sizes[-1:] = x.shape[2] - (padded.shape[2] - 1) * block
    return padded.sum(3) / sizes


def has_kernel(q: Tensor, v: Tensor) -> bool:
    """Whether a kernel can do it; the ladder warns where a GPU is left with PyTorch on 16-bit numbers."""
    if not q.is_cuda or q.dtype not in HALVES:
        return False
    return LADDER.choose(AUTO, q.device, lambda step: refusal(step, q, v)) != "0"
