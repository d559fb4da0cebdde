"""Answers to the exercises of chapter 04."""

import math

import torch
from torch.nn import functional as F


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


def skew(queries, table, S, *, flip=False, offset=None, short=False):
    batch, heads, T = queries.shape[:3]
    longest = (len(table) + 1) // 2
    rows = table.flip(0) if flip else table
    rows = rows[longest - S : longest + T - 1]
    scores = F.pad(queries @ rows.T, (0, 0 if short else 1))  # (batch, heads, T, S + T)
    start, size = T - 1 if offset is None else offset, T * (S + T - 1)
    flat = F.pad(scores.flatten(2), (0, T))[:, :, start : start + size]
    return flat.view(batch, heads, T, S + T - 1)[..., :S]


def skew_as_strided(queries, table, S):
    batch, heads, T = queries.shape[:3]
    longest = (len(table) + 1) // 2
    scores = torch.einsum("bhtd,rd->bhtr", queries, table[longest - S : longest + T - 1]).contiguous()
    step = S + T - 1
    return scores.as_strided((batch, heads, T, S), (heads * T * step, T * step, step - 1, 1), T - 1)


def skew_from_the_left(queries, table, S):
    """Transformer-XL's way: the column in front, and one row less."""
    batch, heads, T = queries.shape[:3]
    longest = (len(table) + 1) // 2
    scores = F.pad(queries @ table[longest - S : longest + T - 1].T, (1, 0))
    return scores.view(batch, heads, S + T, T)[:, :, 1:].reshape(batch, heads, T, S + T - 1)[..., :S]


def skew_top_left(queries, table, S):
    T = queries.shape[2]
    padded = torch.cat((queries, queries.new_zeros(*queries.shape[:2], S - T, queries.shape[3])), 2)
    return skew(padded, table, S)[:, :, :T]


def skew_causal(queries, table, S):
    """Music Transformer's: the past's distances alone, a column in front, one row less."""
    batch, heads, T = queries.shape[:3]
    longest = (len(table) + 1) // 2
    scores = F.pad(queries @ table[longest - S : longest].T, (1, 0))  # (batch, heads, T, S + 1)
    flat = scores.flatten(2)[:, :, T:]
    return flat.reshape(batch, heads, T, S)


def skew_by_index(queries, table, S):
    T, zero = queries.shape[2], len(table) // 2
    distance = torch.arange(S) - (torch.arange(T)[:, None] + S - T)
    return torch.einsum("bhtd,tsd->bhts", queries, table[zero + distance])


def skew_by_gather(queries, table, S):
    T, zero = queries.shape[2], len(table) // 2
    distance = torch.arange(S) - (torch.arange(T)[:, None] + S - T)
    return (queries @ table.T).gather(-1, (zero + distance).expand(*queries.shape[:2], T, S))


def skew_by_rows(queries, table, S):
    T, zero = queries.shape[2], len(table) // 2
    rows = [queries[:, :, i] @ table[zero - (S - T + i) :][:S].T for i in range(T)]
    return torch.stack(rows, 2)


def skew_all_rows(queries, table, S):
    batch, heads, T = queries.shape[:3]
    columns = len(table)
    scores = F.pad(queries @ table.T, (0, 1)).flatten(2)[:, :, columns // 2 - (S - T) :]
    return F.pad(scores, (0, T * columns))[:, :, : T * columns].view(batch, heads, T, columns)[..., :S]


def skew_across_heads(queries, table, S):
    """Flattens the heads as well, with nothing between them."""
    batch, heads, T = queries.shape[:3]
    longest = (len(table) + 1) // 2
    flat = (queries @ table[longest - S : longest + T - 1].T).flatten()[T - 1 :]
    return F.pad(flat, (0, T - 1)).view(batch, heads, T, S + T - 1)[..., :S]


def skew_without_gradient(queries, table, S):
    return skew(queries, table.detach(), S)


RIGHT = {
    "positional_encoding.sinusoidal": sinusoidal,
    "positional_encoding.shift": shift,
    "positional_encoding.alibi": alibi,
    "positional_encoding.bucket": bucket,
    "positional_encoding.skew": skew,
}
ALSO_RIGHT = {"positional_encoding.skew": [skew_as_strided, skew_from_the_left]}
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
    "positional_encoding.skew": [
        lambda queries, table, S: skew(queries, table, S, flip=True),
        lambda queries, table, S: skew(queries, table, S, offset=0),
        lambda queries, table, S: skew(queries, table, S, short=True),
        skew_top_left,
        skew_causal,
        skew_by_index,
        skew_by_gather,
        skew_by_rows,
        skew_all_rows,
        skew_across_heads,
        skew_without_gradient,
    ],
}
