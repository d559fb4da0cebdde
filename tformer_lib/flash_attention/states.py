"""Attention over parts of the keys, put together: an output and its log-sum-exp say all that a part has to say."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tformer_lib.ladder import accumulation_dtype


def merge_states(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The attention over all keys, from those over disjoint parts of them, as ``return_lse=True`` gives them.

    A part's weight is the share of its exponentials in the sum of all: out = sum exp(lse_i - lse) out_i with
    lse = log sum exp(lse_i) (FlashInfer, arXiv:2501.01005, calls the pair a state). Parts may be merged in any order
    and grouping, so keys may be cut among passes, devices or caches. Gradients flow to outputs and log-sum-exps.

    Args:
        outs: of each part (..., T, value_dim), of one shape, dtype and device.
        lses: of each part (..., T), float32 (float64 for float64 outputs); -inf where a query saw no key of the part.

    Returns:
        out (..., T, value_dim) of the parts' dtype, zero where a query saw no key of any part; lse (..., T),
        -inf there.

    Raises:
        ValueError: there is no part, or parts do not fit one another.
    """
    check_states(outs, lses)
    each = torch.stack(tuple(lses))  # (parts, ..., T)
    m = each.detach().amax(0)
    m = m.masked_fill(m == -torch.inf, 0.0)
    weights = torch.exp(each - m)
    total = weights.sum(0)
    blind = total == 0
    total = total.masked_fill(blind, 1.0)  # so that a row without keys has gradients of zero, and no NaN
    out = ((weights / total)[..., None] * torch.stack(tuple(outs))).sum(0)
    return out.to(outs[0].dtype), (m + torch.log(total)).masked_fill(blind, -torch.inf)


def check_states(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    """Refuse parts that do not fit one another."""
    if not outs or len(outs) != len(lses):
        raise ValueError(f"each part has an output and a log-sum-exp, got {len(outs)} and {len(lses)}")
    first, wide = outs[0], accumulation_dtype(outs[0])
    for out, lse in zip(outs, lses, strict=True):
        if out.shape != first.shape or out.dtype != first.dtype or out.device != first.device:
            came = f"{out.dtype} of shape {tuple(out.shape)} on {out.device}"
            raise ValueError(
                f"outputs must be {first.dtype} of shape {tuple(first.shape)} on {first.device}, got {came}"
            )
        if lse.shape != first.shape[:-1] or lse.dtype != wide or lse.device != first.device:
            came = f"{lse.dtype} of shape {tuple(lse.shape)} on {lse.device}"
            expected = f"{wide} of shape {tuple(first.shape[:-1])} on {first.device}"
            raise ValueError(f"log-sum-exps must be {expected}, got {came}")
