"""The exercises of the chapter on the mathematics of flash attention."""

import math
import weakref

import torch
from torch import Tensor

from tformer_lib.teaching.exercises.attention import NoAutograd
from tformer_lib.teaching.exercises.engine import (
    exercise,
    is_close,
    require,
    require_close,
    require_integer,
    require_number,
    require_shape,
)
from tformer_lib.teaching.exercises.linear_attention import LargestTensor


def exact(scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output (T, d) and log-sum-exp (T,) in float64; a row of -inf gives 0 and -inf."""
    scores, v = scores.double(), v.double()
    lse = scores.logsumexp(-1)
    P = (scores - lse.masked_fill(lse == -math.inf, 0.0)[:, None]).exp()
    return P @ v, lse


def require_pair(result, what: str) -> None:
    """Fail unless two things were returned."""
    require(isinstance(result, (tuple, list)) and len(result) == 2, f"return two things: {what}")


def stream(scores: Tensor, v: Tensor):
    """Pairs of a score (a float) and a value (d,): they can be read once, and have no length.

    Fails where the reader keeps the values: the last two may still have a name in its loop.
    """
    values = []
    for score, value in zip(scores.tolist(), v, strict=True):
        kept = sum(reference() is not None for reference in values)
        require(kept <= 2, f"your function keeps the values: {kept} of them at once. m, l and O are all that you need")
        value = value.clone()
        values.append(weakref.ref(value))
        yield score, value


STREAMS = {
    "ordinary scores": [0.5, -1.0, 2.0, 0.0, 1.5],
    "scores that fall": [3.0, 2.0, 1.0, 0.0],
    "scores that rise": [0.0, 1.0, 2.0, 3.0],
    "one score": [-2.0],
    "scores around 1000": [1000.0, 1001.0, 999.0],
    "scores around -1000": [-1000.0, -1001.0, -999.0],
    "scores far from one another": [1000.0, -1000.0, 1001.0, -math.inf, -500.0],
    "a hidden key first": [-math.inf, 1.0, 0.0],
    "a hidden key in between": [1.0, -math.inf, 2.0],
    "hidden keys alone": [-math.inf, -math.inf],
}


@exercise(
    "flash_math.online",
    title="Softmax of a stream",
    hints=(
        "Keep three things: m = -inf, l = 0, O = 0. What must be done to l and O before m is replaced?",
        "m_new = max(m, score); l and O are multiplied by exp(m - m_new), then exp(score - m_new) is added.",
        "Where m_new is still -inf, -inf - -inf is not a number: skip that key. At the end l = 0 means: nothing seen.",
    ),
)
def check_online(fn):
    for name, scores in STREAMS.items():
        scores = torch.tensor(scores)
        d = 2 + len(scores) % 2
        v = torch.randn(len(scores), d)
        result = fn(stream(scores, v), d)
        require_pair(result, "the output and the log-sum-exp")
        out, lse = exact(scores[None], v)
        require_shape(result[0], (d,), f"the output for {name}")
        require(bool(torch.isfinite(result[0]).all()), f"{name}: the output is {result[0].tolist()}")
        if not math.isinf(lse[0]):
            undivided = out[0] * (lse[0] - scores.double().max()).exp()
            require(
                len(scores) == 1 or not torch.allclose(result[0].double(), undivided, atol=1e-4),
                f"{name}: the output was not divided by l at the end",
            )
        require_close(
            result[0], out[0], f"{name}: the output is wrong: were l and O both multiplied by exp(m - m_new)?"
        )
        require_close(
            torch.tensor(require_number(result[1], "the log-sum-exp")), lse[0], f"{name}: the log-sum-exp is wrong"
        )


@exercise(
    "flash_math.merge",
    title="Merge two partial results",
    hints=(
        "Each part's output was divided by its own sum, exp(lse). Undo that, add, and divide by the common sum.",
        "The common log-sum-exp is torch.logaddexp(lse_a, lse_b). Part a enters with the weight exp(lse_a - lse).",
        "Where both parts are -inf, -inf - -inf is NaN: subtract 0 there instead (masked_fill), and the weights are 0.",
    ),
)
def check_merge(fn):
    v = torch.randn(9, 4)
    cases = {
        "two halves": (torch.randn(5, 9), 4),
        "one key and eight": (torch.randn(5, 9), 1),
        "scores around 500": (torch.randn(5, 9) + 500, 3),
    }
    for name, first, second in (("an empty first part", 0, 1), ("an empty second part", 1, 0), ("two empty", 0, 0)):
        scores = torch.randn(2, 9)
        scores[:, :4] = scores[:, :4] if first else -math.inf
        scores[:, 4:] = scores[:, 4:] if second else -math.inf
        cases[name] = (scores, 4)
    cases["rows whose scores are 1,000 apart"] = (torch.randn(5, 9) + 1000 * torch.arange(-2.0, 3)[:, None], 4)
    cases["values of 7 numbers"] = (torch.randn(3, 9), 4)
    cases["one query"] = (torch.randn(1, 9), 4)
    for name, (scores, cut) in cases.items():
        v = torch.randn(9, 7) if name == "values of 7 numbers" else v
        parts = (*exact(scores[:, :cut], v[:cut]), *exact(scores[:, cut:], v[cut:]))
        before = [x.clone() for x in parts]
        result = fn(*parts)
        require(all(map(torch.equal, parts, before)), "your function changes the parts that it was given")
        require_pair(result, "the output and the log-sum-exp")
        out, lse = exact(scores, v)
        require_close(result[1], lse, f"{name}: the log-sum-exp is wrong", name=f"{name}: the log-sum-exp")
        require_close(result[0], out, f"{name}: the output is wrong", name=f"{name}: the output")


@exercise(
    "flash_math.backward",
    title="The gradients of one tile",
    hints=(
        "P of this tile is exp(scores - lse), with the lse of the whole row: its rows need not sum to 1 here.",
        "dP = dout @ v.T, and dS = P * (dP - delta). The delta of a row belongs to all of its keys, not to this tile.",
        "delta = (dout * out).sum(-1, keepdim=True); dq = dS @ k * scale, dk = dS.T @ q * scale, dv = P.T @ dout.",
    ),
)
def check_backward(fn):
    part = slice(2, 5)
    for T, S, tile, d, value_dim in (
        (4, 6, slice(0, 6), 4, 4),
        (5, 8, part, 4, 4),
        (5, 8, part, 9, 3),
        (1, 4, slice(0, 4), 4, 4),
    ):
        shapes = (T, d), (S, d), (S, value_dim)
        q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
        scores = q @ k.T / d**0.5
        out, lse = scores.softmax(-1) @ v, scores.logsumexp(-1)
        dout = torch.randn(T, value_dim, dtype=torch.float64)
        wanted = true_gradients(q, k, v, out, dout, tile)
        given = (x.detach() for x in (q, k[tile], v[tile], out, lse, dout))
        with NoAutograd():
            result = fn(*given)
        require(isinstance(result, (tuple, list)) and len(result) == 3, "return three things: dq, dk and dv")
        explain_tile(result[2], q.detach(), k.detach()[tile], dout)
        where = "all keys in one tile" if tile == slice(0, S) else f"keys 2 to 4 of {S}"
        for name, found, right in zip(("dv", "dk", "dq"), reversed(result), wanted, strict=True):
            require(name == "dv" or not is_close(found, d**0.5 * right), f"{name} lacks the scale, 1/sqrt(d)")
            require_close(found, right, f"{name} is wrong for {where}", name=name)


def explain_tile(dv: Tensor, q: Tensor, k: Tensor, dout: Tensor) -> None:
    """Name the usual mistake in the probabilities of a tile."""
    within = (q @ k.T / q.shape[1] ** 0.5).softmax(-1).T @ dout
    require(
        len(k) > 3 or not is_close(dv, within),
        "the probabilities sum to 1 within the tile: take the log-sum-exp of the whole row",
    )


def true_gradients(q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, tile: slice) -> tuple[Tensor, ...]:
    """dv and dk of the tile's keys, and the tile's share of dq, with the softmax's Jacobian written out."""
    _, dk, dv = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    scale = q.shape[1] ** -0.5
    P = (q @ k.T * scale).softmax(-1).detach()
    jacobian = torch.diag_embed(P) - P[:, :, None] * P[:, None, :]  # (T, S, S)
    dS = torch.einsum("tij,tj->ti", jacobian, dout @ v.detach().T)
    return dv[tile], dk[tile], dS[:, tile] @ k.detach()[tile] * scale


@exercise(
    "flash_math.tiles",
    title="Count the tiles of a causal mask",
    hints=(
        "Query i stands at position i + S - T: the last query sees the last key.",
        "Skip a tile if its last query comes before its first key; it is whole if its first query sees its last key.",
        "The last tile of queries or keys may be short: its last row is min(start + tile, length) - 1.",
    ),
)
def check_tiles(fn):
    shapes = ((8, 8, 4, 4), (8, 8, 4, 2), (8, 8, 2, 4), (10, 10, 4, 4), (4, 12, 4, 4), (1, 9, 4, 4), (7, 13, 3, 5))
    for T, S, rows, columns in shapes:
        result = fn(T, S, rows, columns)
        three = hasattr(result, "__len__") and len(result) == 3
        require(three, "return three counts: skipped, masked, whole")
        result = [require_integer(count, "a count") for count in result]
        expected = count_tiles(T, S, rows, columns)
        shape = f"{T} queries in tiles of {rows}, {S} keys in tiles of {columns}"
        total = sum(expected)
        require(sum(result) == total, f"{shape}: there are {total} tiles, and you count {sum(result)}")
        for name, found, wanted in zip(("skipped", "masked", "whole"), result, expected, strict=True):
            require(found == wanted, f"{shape}: {wanted} tiles are {name}, and you count {found}")
    with LargestTensor() as seen:
        fn(512, 512, 128, 128)
    built = f"right, but for 512 queries and keys a tensor of {seen.most:,} numbers was made: do not build the mask"
    require(seen.most < 512 * 128, built)


def count_tiles(T: int, S: int, rows: int, columns: int) -> tuple[int, int, int]:
    """Skipped, masked and whole tiles, from the mask itself."""
    mask = torch.ones(T, S).tril(S - T)
    skipped = masked = whole = 0
    for strip in mask.split(rows):
        for tile in strip.split(columns, dim=1):
            share = tile.mean().item()
            skipped, masked, whole = skipped + (share == 0), masked + (0 < share < 1), whole + (share == 1)
    return skipped, masked, whole
