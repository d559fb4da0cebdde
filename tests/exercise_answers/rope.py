"""Answers to the exercises of chapter 08."""

import math

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


def yarn(head_dim, base, factor, length, beta_fast=32, beta_slow=1):
    def pair_with(turns):
        return head_dim / 2 * math.log(length / (2 * math.pi * turns), base)

    theta = base ** (-torch.arange(0, head_dim, 2) / head_dim)
    start, end = max(math.floor(pair_with(beta_fast)), 0), math.ceil(pair_with(beta_slow))
    share = ((torch.arange(head_dim // 2) - start) / (end - start)).clamp(0, 1)
    return (1 - share) * theta + share * theta / factor, 1 + 0.1 * math.log(factor)


def yarn_in_plain_python(head_dim, base, factor, length, beta_fast, beta_slow):
    theta = [base ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    turns = [length / (2 * math.pi) * base ** (-2 * i / head_dim) for i in range(10 * head_dim)]
    start = max([i for i, t in enumerate(turns) if t >= beta_fast], default=0)
    end = next(i for i, t in enumerate(turns) if t <= beta_slow)
    kept = [min(max((end - i) / (end - start), 0), 1) for i in range(head_dim // 2)]
    return [t * (k + (1 - k) / factor) for t, k in zip(theta, kept, strict=True)], 1 + math.log(factor) / 10


def yarn_by_turns(head_dim, base, factor, length, beta_fast, beta_slow):
    theta = base ** (-torch.arange(0, head_dim, 2) / head_dim)
    kept = ((length * theta / (2 * math.pi) - beta_slow) / (beta_fast - beta_slow)).clamp(0, 1)
    return kept * theta + (1 - kept) * theta / factor, 1 + 0.1 * math.log(factor)


def sharpened_by(change):
    """Right frequencies, and the attention factor changed."""

    def answer(*arguments):
        frequencies, attention = yarn(*arguments)
        return frequencies, change(attention)

    return answer


def yarn_starts_before_pair_0(head_dim, base, factor, length, beta_fast, beta_slow):
    i = torch.arange(head_dim // 2)
    start, end = (head_dim / 2 * math.log(length / (2 * math.pi * turns), base) for turns in (beta_fast, beta_slow))
    share = ((i - math.floor(start)) / (math.ceil(end) - math.floor(start))).clamp(0, 1)
    return base ** (-2 * i / head_dim) * (1 - share + share / factor), 1 + 0.1 * math.log(factor)


def yarn_unrounded(head_dim, base, factor, length, beta_fast, beta_slow):
    i = torch.arange(head_dim // 2)
    start, end = (head_dim / 2 * math.log(length / (2 * math.pi * turns), base) for turns in (beta_fast, beta_slow))
    share = ((i - max(start, 0)) / (end - max(start, 0))).clamp(0, 1)
    return base ** (-2 * i / head_dim) * (1 - share + share / factor), 1 + 0.1 * math.log(factor)


def yarn_blends_wavelengths(head_dim, base, factor, length, beta_fast, beta_slow):
    found, sharper = yarn(head_dim, base, factor, length, beta_fast, beta_slow)
    plain = base ** (-torch.arange(0, head_dim, 2) / head_dim)
    share = (1 - found / plain) / (1 - 1 / factor) if factor > 1 else 0
    return plain / (1 + share * (factor - 1)), sharper


def yarn_forgets_two_pi(head_dim, base, factor, length, beta_fast, beta_slow):
    return yarn(head_dim, base, factor, length * 2 * math.pi, beta_fast, beta_slow)


def interpolates_every_pair(head_dim, base, factor, length, beta_fast, beta_slow):
    return base ** (-torch.arange(0, head_dim, 2) / head_dim) / factor, 1 + 0.1 * math.log(factor)


def positions_as_floats(lengths):
    return torch.cat([torch.arange(n) for n in lengths]).float()


def yarn_that_ends_at_the_last_pair(head_dim, base, factor, length, beta_fast, beta_slow):
    pair = lambda turns: head_dim / 2 * math.log(length / (2 * math.pi * turns), base)  # noqa: E731
    first, last = max(math.floor(pair(beta_fast)), 0), min(math.ceil(pair(beta_slow)), head_dim // 2 - 1)
    pairs = torch.arange(head_dim // 2)
    theta, share = base ** (-2 * pairs / head_dim), ((pairs - first) / (last - first)).clamp(0, 1)
    return (1 - share) * theta + share * theta / factor, 1 + 0.1 * math.log(factor)


def rotate_four_dimensions(x, angles):
    batch, heads, T, head_dim = x.shape
    return rotate(x, angles).view(batch, heads, T, head_dim)


RIGHT = {
    "rope.rotate": rotate,
    "rope.positions": lambda lengths: torch.cat([torch.arange(n) for n in lengths]),
    "rope.convert": convert,
    "rope.ntk": lambda base, factor, dim: base * factor ** (dim / (dim - 2)),
    "rope.yarn": yarn,
}
ALSO_RIGHT = {
    "rope.yarn": [yarn_in_plain_python, lambda *a: [x.numpy() if torch.is_tensor(x) else x for x in yarn(*a)]],
}
WRONG = {
    "rope.rotate": [
        rotate_four_dimensions,
        turns_the_first_member_twice,
        lambda x, angles: library_rotate(x, angles.cos(), angles.sin(), "half"),
        lambda x, angles: rotate(x, -angles),
        lambda x, angles: x,
        members_not_put_back,
        reflects,
    ],
    "rope.positions": [
        positions_as_floats,
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
    "rope.yarn": [
        yarn_that_ends_at_the_last_pair,
        interpolates_every_pair,
        yarn_by_turns,
        yarn_unrounded,
        yarn_blends_wavelengths,
        yarn_forgets_two_pi,
        yarn_starts_before_pair_0,
        lambda d, base, factor, *rest: yarn(d, base, 1 / factor, *rest),
        lambda *shape: yarn(*shape[:4], shape[5], shape[4]),
        lambda *shape: (1 / yarn(*shape)[0], yarn(*shape)[1]),
        sharpened_by(lambda sharper: sharper**2),
        sharpened_by(lambda sharper: 1 / sharper),
        sharpened_by(lambda sharper: 1.0),
        sharpened_by(lambda sharper: sharper - 1),
    ],
}
