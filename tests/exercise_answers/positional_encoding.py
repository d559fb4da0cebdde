"""Answers to the exercises of chapter 02."""

import math

import torch


def sinusoidal(T, width, *, layout="interleaved", divisor=None, degrees=False):
    positions = torch.arange(T)[:, None]
    exponents = torch.arange(0, width, 2) / (divisor or width)
    angles = positions * 10000.0**-exponents
    if layout == "halves":
        return torch.cat((angles.sin(), angles.cos()), dim=-1)
    table = torch.empty(T, width)
    table[:, 0::2] = angles.sin()
    table[:, 1::2] = angles.sin() if layout == "sines" else angles.cos()
    return table


def shift(steps, width, *, sign=1, transposed=False):
    angles = sign * steps * 10000.0 ** (-torch.arange(0, width, 2) / width)
    matrix = torch.zeros(width, width)
    for i, angle in enumerate(angles):
        cos, sin = angle.cos(), angle.sin()
        matrix[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = torch.tensor([[cos, sin], [-sin, cos]])
    return matrix.T if transposed else matrix


def same_angle(steps, width):
    cos, sin = math.cos(steps), math.sin(steps)
    return torch.block_diag(*[torch.tensor([[cos, sin], [-sin, cos]])] * (width // 2))


def alibi(slopes, T, S, *, sign=-1, offset=None):
    offset = S - T if offset is None else offset
    distance = (torch.arange(S) - (torch.arange(T)[:, None] + offset)).abs()
    return sign * slopes[:, None, None] * distance


def unsigned_future(slopes, T, S):
    return slopes[:, None, None] * (torch.arange(S) - (torch.arange(T)[:, None] + S - T))


def bucket(distance, buckets, max_distance):
    exact = buckets // 2
    if distance < exact:
        return distance
    share = math.log(distance / exact) / math.log(max_distance / exact)
    return min(int(exact + share * (buckets - exact)), buckets - 1)


def uncapped(distance, buckets, max_distance):
    exact = buckets // 2
    if distance < exact:
        return distance
    return int(exact + math.log(distance / exact) / math.log(max_distance / exact) * (buckets - exact))


def linear(distance, buckets, max_distance):
    exact = buckets // 2
    if distance < exact:
        return distance
    return min(exact + (distance - exact) * (buckets - exact) // (max_distance - exact), buckets - 1)


RIGHT = {
    "positional_encoding.sinusoidal": sinusoidal,
    "positional_encoding.shift": shift,
    "positional_encoding.alibi": alibi,
    "positional_encoding.bucket": bucket,
}
WRONG = {
    "positional_encoding.sinusoidal": [
        lambda T, width: sinusoidal(T, width, layout="halves"),
        lambda T, width: sinusoidal(T, width, layout="sines"),
        lambda T, width: sinusoidal(T, width, divisor=width / 2),
        lambda T, width: sinusoidal(T + 1, width)[1:],
    ],
    "positional_encoding.shift": [
        lambda steps, width: shift(steps, width, sign=-1),
        lambda steps, width: shift(steps, width, transposed=True),
        same_angle,
        lambda steps, width: torch.eye(width),
    ],
    "positional_encoding.alibi": [
        lambda slopes, T, S: alibi(slopes, T, S, sign=1),
        lambda slopes, T, S: alibi(slopes, T, S, offset=0),
        unsigned_future,
    ],
    "positional_encoding.bucket": [
        uncapped,
        linear,
        lambda distance, buckets, largest: min(distance, buckets - 1),
    ],
}
