"""Answers to the exercises of chapter 07."""

import torch

from tformer_lib.rope import convert_layout
from tformer_lib.rope import rotate as library_rotate


def rotate(x, angles):
    a, b = x[..., 0::2], x[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def members_not_put_back(x, angles):
    a, b = x[..., 0::2], x[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def reflects(x, angles):
    a, b = x[..., 0::2], x[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((a * cos + b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def convert(weight, heads):
    head_dim = weight.shape[0] // heads
    return weight.view(heads, head_dim // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


def turns_the_first_member_twice(x, angles):
    x[..., 0::2] = x[..., 0::2] * angles.cos() - x[..., 1::2] * angles.sin()
    x[..., 1::2] = x[..., 0::2] * angles.sin() + x[..., 1::2] * angles.cos()
    return x


RIGHT = {
    "rope.rotate": rotate,
    "rope.positions": lambda lengths: torch.cat([torch.arange(n) for n in lengths]),
    "rope.convert": convert,
    "rope.ntk": lambda base, factor, dim: base * factor ** (dim / (dim - 2)),
}
WRONG = {
    "rope.rotate": [
        turns_the_first_member_twice,
        lambda x, angles: library_rotate(x, angles.cos(), angles.sin(), "half"),
        lambda x, angles: rotate(x, -angles),
        lambda x, angles: x,
        members_not_put_back,
        reflects,
    ],
    "rope.positions": [
        lambda lengths: torch.arange(sum(lengths)),
        lambda lengths: torch.cat([torch.arange(1, n + 1) for n in lengths]),
        lambda lengths: torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)]),
    ],
    "rope.convert": [
        lambda weight, heads: weight,
        lambda weight, heads: convert(weight, 1),
        lambda weight, heads: convert_layout(weight, heads, to="interleaved"),
    ],
    "rope.ntk": [
        lambda base, factor, dim: base * factor,
        lambda base, factor, dim: base,
        lambda base, factor, dim: base * factor ** (dim / 2),
    ],
}
