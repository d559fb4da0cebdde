"""Answers to the exercises of the chapter on the mathematics of flash attention."""

import math

import numpy as np
import torch


def online(stream, d):
    m, l, O = -math.inf, 0.0, torch.zeros(d)
    for score, v in stream:
        m_new = max(m, score)
        if m_new == -math.inf:
            continue
        correction, p = math.exp(m - m_new), math.exp(score - m_new)
        m, l, O = m_new, l * correction + p, O * correction + p * v
    return (O / l, m + math.log(l)) if l else (O, -math.inf)


def online_without_maximum(stream, d):
    l, O = 0.0, torch.zeros(d)
    for score, v in stream:
        l, O = l + math.exp(score), O + math.exp(score) * v
    return O / l, math.log(l)


def online_forgets_to_rescale(stream, d):
    m, l, O = -math.inf, 0.0, torch.zeros(d)
    for score, v in stream:
        m = max(m, score)
        p = math.exp(score - m) if m > -math.inf else 0.0
        l, O = l + p, O + p * v
    return (O / l, m + math.log(l)) if l else (O, -math.inf)


def online_forgets_the_output(stream, d):
    m, l, O = -math.inf, 0.0, torch.zeros(d)
    for score, v in stream:
        m_new = max(m, score)
        if m_new == -math.inf:
            continue
        p = math.exp(score - m_new)
        m, l, O = m_new, l * math.exp(m - m_new) + p, O + p * v
    return (O / l, m + math.log(l)) if l else (O, -math.inf)


def online_starts_at_zero(stream, d):
    m, l, O = 0.0, 0.0, torch.zeros(d)
    for score, v in stream:
        m_new = max(m, score)
        correction, p = math.exp(m - m_new), math.exp(score - m_new)
        m, l, O = m_new, l * correction + p, O * correction + p * v
    return (O / l, m + math.log(l)) if l else (O, -math.inf)


def online_gives_nan_to_hidden_keys(stream, d):
    m, l, O = torch.tensor(-math.inf), torch.tensor(0.0), torch.zeros(d)
    for score, v in stream:
        m_new = m.clamp(min=score)
        correction, p = (m - m_new).exp(), (score - m_new).exp()
        m, l, O = m_new, l * correction + p, O * correction + p * v
    return O / l, m + l.log()


def merge(out_a, lse_a, out_b, lse_b):
    lse = torch.logaddexp(lse_a, lse_b)
    anchor = lse.masked_fill(lse == -math.inf, 0.0)
    weight_a, weight_b = (lse_a - anchor).exp()[:, None], (lse_b - anchor).exp()[:, None]
    return weight_a * out_a + weight_b * out_b, lse


def merge_by_the_mean(out_a, lse_a, out_b, lse_b):
    return (out_a + out_b) / 2, torch.logaddexp(lse_a, lse_b)


def merge_adds(out_a, lse_a, out_b, lse_b):
    return out_a + out_b, torch.logaddexp(lse_a, lse_b)


def merge_overflows(out_a, lse_a, out_b, lse_b):
    a, b = lse_a.float().exp(), lse_b.float().exp()
    return (a[:, None] * out_a + b[:, None] * out_b) / (a + b)[:, None], (a + b).log()


def merge_gives_nan_to_empty_rows(out_a, lse_a, out_b, lse_b):
    lse = torch.logaddexp(lse_a, lse_b)
    return (lse_a - lse).exp()[:, None] * out_a + (lse_b - lse).exp()[:, None] * out_b, lse


def backward(q, k, v, out, lse, dout):
    scale = q.shape[1] ** -0.5
    P = (q @ k.T * scale - lse[:, None]).exp()
    delta = (dout * out).sum(-1, keepdim=True)
    dS = P * (dout @ v.T - delta)
    return dS @ k * scale, dS.T @ q * scale, P.T @ dout


def backward_without_delta(q, k, v, out, lse, dout):
    return backward(q, k, v, torch.zeros_like(out), lse, dout)


def backward_with_the_delta_of_the_tile(q, k, v, out, lse, dout):
    scale = q.shape[1] ** -0.5
    P = (q @ k.T * scale - lse[:, None]).exp()
    dP = dout @ v.T
    dS = P * (dP - (P * dP).sum(-1, keepdim=True))
    return dS @ k * scale, dS.T @ q * scale, P.T @ dout


def backward_without_scale(q, k, v, out, lse, dout):
    dq, dk, dv = backward(q, k, v, out, lse, dout)
    return dq * q.shape[1] ** 0.5, dk * q.shape[1] ** 0.5, dv


def backward_normalises_the_tile(q, k, v, out, lse, dout):
    return backward(q, k, v, out, (q @ k.T * q.shape[1] ** -0.5).logsumexp(-1), dout)


def tiles(T, S, rows, columns, shift=None):
    skipped = masked = whole = 0
    shift = S - T if shift is None else shift
    for top in range(0, T, rows):
        first, last = top + shift, min(top + rows, T) - 1 + shift
        for left in range(0, S, columns):
            right = min(left + columns, S) - 1
            if left > last:
                skipped += 1
            elif right <= first:
                whole += 1
            else:
                masked += 1
    return skipped, masked, whole


def tiles_aligned_to_the_top(T, S, rows, columns):
    return tiles(T, S, rows, columns, shift=0)


def tiles_without_the_short_ones(T, S, rows, columns):
    return tiles(T // rows * rows, S // columns * columns, rows, columns)


def tiles_of_the_whole_mask(T, S, rows, columns):
    mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    shares = [tile.float().mean().item() for strip in mask.split(rows) for tile in strip.split(columns, dim=1)]
    return shares.count(0.0), sum(0 < share < 1 for share in shares), shares.count(1.0)


def tiles_with_one_masked_in_a_row(T, S, rows, columns):
    down, across = -(-T // rows), -(-S // columns)
    whole = down * (down - 1) // 2
    return down * across - whole - down, down, whole


def online_keeps_everything(stream, d):
    scores, values = zip(*stream, strict=True)
    scores = torch.tensor(scores)
    lse = scores.logsumexp(0)
    return (scores.softmax(0) @ torch.stack(values), lse) if lse > -math.inf else (torch.zeros(d), lse)


def online_without_the_division(stream, d):
    m, l, O = -math.inf, 0.0, torch.zeros(d)
    for score, v in stream:
        m_new = max(m, score)
        if m_new == -math.inf:
            continue
        correction, p = math.exp(m - m_new), math.exp(score - m_new)
        m, l, O = m_new, l * correction + p, O * correction + p * v
    return O, m + math.log(l) if l else -math.inf


def backward_by_autograd(q, k, v, out, lse, dout):
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    P = (leaves[0] @ leaves[1].T * q.shape[1] ** -0.5 - lse[:, None]).exp()
    delta = (dout * out).sum(1, keepdim=True)
    ((P @ leaves[2] * dout).sum() - (P * delta).sum()).backward()
    return [x.grad for x in leaves]


RIGHT = {
    "flash_math.online": online,
    "flash_math.merge": merge,
    "flash_math.backward": backward,
    "flash_math.tiles": tiles,
}
ALSO_RIGHT = {"flash_math.tiles": [lambda *shape: torch.tensor(tiles(*shape)), lambda *shape: np.array(tiles(*shape))]}
WRONG = {
    "flash_math.online": [
        online_without_maximum,
        online_keeps_everything,
        online_without_the_division,
        online_forgets_to_rescale,
        online_forgets_the_output,
        online_starts_at_zero,
        online_gives_nan_to_hidden_keys,
    ],
    "flash_math.merge": [merge_by_the_mean, merge_adds, merge_overflows, merge_gives_nan_to_empty_rows],
    "flash_math.backward": [
        backward_by_autograd,
        backward_without_delta,
        backward_with_the_delta_of_the_tile,
        backward_without_scale,
        backward_normalises_the_tile,
    ],
    "flash_math.tiles": [
        tiles_aligned_to_the_top,
        tiles_without_the_short_ones,
        tiles_of_the_whole_mask,
        tiles_with_one_masked_in_a_row,
    ],
}
