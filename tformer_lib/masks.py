"""Masks: who may look at whom.

One convention everywhere: a mask is a boolean tensor that broadcasts to (batch, heads, T, S), and True means "this
query may look at this key". The T queries are the last T of the S positions (aligned to the bottom right), so the mask
of a single new token over a cache of S keys is the last row of the mask of a full pass. With T > S the first T - S
queries stand before every key, and a causal mask shows them nothing.
"""

from functools import reduce

import torch
from torch import Tensor

from tformer_lib.contract import check_integer, readable


def causal(T: int, S: int | None = None, *, device: torch.device | str | None = None) -> Tensor:
    """Each query sees its own position and everything before it.

    Args:
        T: number of queries.
        S: number of keys; T if not given.

    Returns:
        (T, S) boolean, True where a query may look; the last query sees every key.
    """
    queries, keys = positions(T, S, device)
    return keys <= queries  # (T, 1), (1, S) -> (T, S)


def sliding_window(T: int, S: int | None = None, *, window: int, device: torch.device | str | None = None) -> Tensor:
    """Each query sees itself and the ``window - 1`` keys before it (Mistral's causal window, arXiv:2310.06825).

    Returns:
        (T, S) boolean. ``window >= S`` is the causal mask; ``window = 1`` leaves each query itself alone.
    """
    check_integer("window", window)
    if window < 1:
        raise ValueError(f"window must be at least 1 (the query itself), got {window}")
    queries, keys = positions(T, S, device)
    return (keys <= queries) & (keys > queries - window)  # (T, S)


def prefix(T: int, S: int | None = None, *, prefix_length: int, device: torch.device | str | None = None) -> Tensor:
    """Every query sees the first ``prefix_length`` keys; the rest is causal (the prefix LM of T5, arXiv:1910.10683).

    Returns:
        (T, S) boolean. ``prefix_length = 0`` is the causal mask; ``prefix_length >= S`` shows everything to everyone.
    """
    check_integer("prefix_length", prefix_length)
    if prefix_length < 0:
        raise ValueError(f"prefix_length must be at least 0, got {prefix_length}")
    queries, keys = positions(T, S, device)
    return (keys <= queries) | (keys < prefix_length)  # (T, S)


def padding(lengths: Tensor, S: int) -> Tensor:
    """Hide the padding behind sequences of different lengths: row b has real tokens at positions 0 .. lengths[b] - 1.

    Args:
        lengths: (batch,) integers from 0 to S.
        S: the padded length.

    Returns:
        (batch, 1, 1, S) boolean, the same for every head and every query.
    """
    check_integer("S", S)
    if lengths.dim() != 1 or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths must be (batch,) integers, got {tuple(lengths.shape)} of {lengths.dtype}")
    if lengths.numel() and readable(lengths) and not 0 <= int(lengths.min()) <= int(lengths.max()) <= S:
        raise ValueError(f"lengths must lie in 0 .. {S}, got {int(lengths.min())} .. {int(lengths.max())}")
    keys = torch.arange(S, device=lengths.device)  # (S,)
    return (keys < lengths[:, None])[:, None, None, :]  # (batch, S) -> (batch, 1, 1, S)


def document(ids: Tensor, T: int | None = None) -> Tensor:
    """Keep documents that are packed into one row apart: a query sees the keys of its own document alone.

    Args:
        ids: (batch, S) or (S,) integers, the document that each position belongs to.
        T: number of queries, which are the last T positions; S if not given.

    Returns:
        (batch, 1, T, S) or (T, S) boolean. It hides no future: combine it with ``causal``.
    """
    if ids.dim() not in (1, 2) or ids.is_floating_point():
        raise ValueError(f"ids must be (batch, S) or (S,) integers, got {tuple(ids.shape)} of {ids.dtype}")
    S = ids.shape[-1]
    if T is not None and not 0 <= T <= S:
        raise ValueError(f"T is {T}: the queries must be among the {S} positions that have a document")
    queries = ids[..., S - T :] if T is not None else ids  # (..., T)
    same = queries[..., :, None] == ids[..., None, :]  # (..., T, S)
    return same[:, None] if ids.dim() == 2 else same


def combine(*masks: Tensor | None) -> Tensor | None:
    """A query may look where every mask lets it; None masks nothing, and no mask at all gives None.

    Args:
        masks: booleans that broadcast with one another, such as (T, S), (batch, 1, 1, S) and (batch, 1, T, S).
    """
    given = [mask for mask in masks if mask is not None]
    for mask in given:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            came = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"masks must be boolean, True where a query may look, got {came}")
        if mask.device != given[0].device:
            raise ValueError(f"masks must be on one device, got {given[0].device} and {mask.device}")
    try:
        torch.broadcast_shapes(*(mask.shape for mask in given))
    except RuntimeError:
        shapes = ", ".join(str(tuple(mask.shape)) for mask in given)
        raise ValueError(f"masks must broadcast with one another, got {shapes}") from None
    return reduce(torch.logical_and, given) if given else None


def describe(mask: Tensor) -> str:
    """Draw a (T, S) mask, one line a query: # where it may look, a dot where it may not."""
    if mask.dim() != 2 or mask.dtype != torch.bool:
        raise ValueError(f"describe draws one (T, S) boolean mask, got {tuple(mask.shape)} of {mask.dtype}")
    return "\n".join(" ".join("#" if seen else "." for seen in row) for row in mask.tolist())


def positions(T: int, S: int | None = None, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """Where the queries and the keys stand: (T, 1) and (1, S), the last query on the last key."""
    S = T if S is None else S
    check_integer("T", T)
    check_integer("S", S)
    if T < 0 or S < 0:
        raise ValueError(f"T and S must be at least 0, got T = {T} and S = {S}")
    queries = torch.arange(S - T, S, device=device)  # (T,)
    keys = torch.arange(S, device=device)  # (S,)
    return queries[:, None], keys[None, :]
