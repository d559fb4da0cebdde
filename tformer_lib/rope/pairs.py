"""Pairs of channels: two layouts, the turn in plain PyTorch (step 0), and weights from one layout to the other."""

import torch
from torch import Tensor

from tformer_lib.contract import check_dense, counted

LAYOUTS = ("half", "interleaved")


def turn_pairs(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """Turn each pair (a, b) of channels: (a cos - b sin, a sin + b cos). Computed in float32 or wider.

    Args:
        x: (batch, heads, T, head_dim).
        cos, sin: (T, rotary_dim / 2) or (batch, T, rotary_dim / 2).

    Returns:
        x's shape and dtype; channels from rotary_dim on are unchanged.
    """
    cos, sin = (t.unsqueeze(-3) for t in (cos, sin))  # (1, T, pairs) or (batch, 1, T, pairs): the same for all heads
    rotary_dim = 2 * cos.shape[-1]
    a, b = split_pairs(x[..., :rotary_dim], layout)  # each (batch, heads, T, rotary_dim / 2)
    turned = join_pairs(a * cos - b * sin, a * sin + b * cos, layout).to(x.dtype)
    return turned if rotary_dim == x.shape[-1] else torch.cat((turned, x[..., rotary_dim:]), dim=-1)


def split_pairs(x: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """The first and the second member of every pair: (..., 2 pairs) -> two of (..., pairs)."""
    if layout == "interleaved":
        return x[..., 0::2], x[..., 1::2]
    return x.chunk(2, dim=-1)


def join_pairs(a: Tensor, b: Tensor, layout: str) -> Tensor:
    """The inverse of `split_pairs`."""
    if layout == "interleaved":
        return torch.stack((a, b), dim=-1).flatten(-2)
    return torch.cat((a, b), dim=-1)


def convert_layout(parameter: Tensor, heads: int, *, to: str, rotary_dim: int | None = None) -> Tensor:
    """Reorder the rows of a q_proj or k_proj parameter from one layout to the other, ``to``.

    The model computes the same scores after it, if its Rope changes layout too. Values and the output
    projection stay as they are: scores are sums over channels, and v is never turned.

    Args:
        parameter: weight (heads * head_dim, width), or bias (heads * head_dim,).
        heads: query heads for q_proj, kv heads for k_proj.
        to: the layout wanted, "half" or "interleaved"; the parameter is in the other one.
        rotary_dim: how many channels of each head turn; all by default.

    Returns:
        A new tensor of the parameter's shape.
    """
    check_layout(to)
    rows = parameter.shape[0]
    if heads < 1 or rows % heads:
        raise ValueError(
            f"{heads} heads do not divide the {rows} rows of a parameter of shape {tuple(parameter.shape)}"
        )
    head_dim = rows // heads
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    check_rotary_dim(rotary_dim, head_dim)
    order = torch.arange(head_dim, device=parameter.device)
    pairs = split_pairs(order[:rotary_dim], "interleaved" if to == "half" else "half")
    order = torch.cat((join_pairs(*pairs, to), order[rotary_dim:]))  # row order[c] of a head becomes its row c
    return parameter.unflatten(0, (heads, head_dim))[:, order].flatten(0, 1)


def check_layout(layout: str) -> None:
    """Refuse a layout that does not exist."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")


def check_rotary_dim(rotary_dim: int, head_dim: int) -> None:
    """Refuse a number of turning channels that does not form pairs or is more than there are."""
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"rotary_dim must be even and at least 2, since channels turn in pairs, got {rotary_dim}")
    if rotary_dim > head_dim:
        raise ValueError(f"rotary_dim must be at most head_dim, got {rotary_dim} and {head_dim}")


def check_rotation(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> None:
    """Refuse an x that the angles do not fit."""
    check_layout(layout)
    check_dense("x", x)
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x must be (batch, heads, T, head_dim) floats, got shape {tuple(x.shape)} of {x.dtype}")
    if cos.shape != sin.shape or cos.dim() not in (2, 3):
        raise ValueError(f"cos and sin must both be ([batch,] T, pairs), got {tuple(cos.shape)} and {tuple(sin.shape)}")
    for name, t in (("cos", cos), ("sin", sin)):
        if not t.is_floating_point() or t.device != x.device:
            raise ValueError(f"{name} must be floats on {x.device}, where x is, got {t.dtype} on {t.device}")
    if cos.shape[-2] != x.shape[-2]:
        raise ValueError(
            f"x has {counted(x.shape[-2], 'token')}, but there are angles for {counted(cos.shape[-2], 'position')}"
        )
    if cos.dim() == 3 and cos.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"x has batch {x.shape[0]}, but there are angles for a batch of {cos.shape[0]}")
    if 2 * cos.shape[-1] > x.shape[-1]:
        raise ValueError(f"x has head_dim {x.shape[-1]}, too small for {cos.shape[-1]} pairs of channels")
