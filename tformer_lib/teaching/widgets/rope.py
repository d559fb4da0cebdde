"""The rotating pairs of chapter 08: move a query and a key, and watch each pair turn and the score answer."""

import torch

from tformer_lib.rope import Rope
from tformer_lib.teaching.widgets import Interactive, module


class RotatingPairs(Interactive):
    """Two sliders for two positions; four dials; the score over the distance."""

    _esm = module("rope.js")


def rotating_pairs(head_dim: int = 8, reach: int = 40, seed: int = 3) -> RotatingPairs:
    """The figure for one head of ``head_dim`` channels and positions 0 .. ``reach``; q and k have random directions."""
    angles = 2 * torch.pi * torch.rand(2, head_dim // 2, generator=torch.Generator().manual_seed(seed))
    lengths = torch.tensor([[1.0], [0.8]])
    q, k = torch.view_as_real(torch.polar(lengths.expand_as(angles), angles))
    return RotatingPairs(
        label="The rotating pairs: a query and a key, before and after RoPE",
        data={
            "reach": reach,
            "q": rounded(q),
            "k": rounded(k),
            "frequencies": {str(base): frequencies(head_dim, base) for base in (100, 10000)},
        },
    )


def frequencies(head_dim: int, base: float) -> list[float]:
    """Radians per position of each pair, short enough to be shown."""
    return [round(f, 4) for f in Rope(head_dim, base=base).frequencies().tolist()]


def rounded(pairs: torch.Tensor) -> list[list[float]]:
    """Two decimals are enough to draw."""
    return [[round(x, 2) for x in pair] for pair in pairs.tolist()]
