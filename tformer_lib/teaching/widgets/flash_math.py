"""The tile stepper of chapter 15: tiles of keys and values go by, and m, l and O are updated."""

import torch
from torch import Tensor

from tformer_lib.teaching.widgets import Interactive, module

QUERIES, KEYS, WIDTH, TILE = 4, 8, 2, 2


class TileStepper(Interactive):
    """Choose who may look where, go from tile to tile, and read the running state of four queries."""

    _esm = module("flash_math.js")


def stepper() -> TileStepper:
    """The stepper for the last four queries of a text of eight tokens, in tiles of two keys."""
    generator = torch.Generator().manual_seed(10)
    scores = (2 * torch.randn(QUERIES, KEYS, generator=generator, dtype=torch.float64)).round(decimals=1)
    v = torch.randn(KEYS, WIDTH, generator=generator, dtype=torch.float64).round(decimals=1)
    everything = torch.ones(QUERIES, KEYS, dtype=torch.bool)
    blind = everything.clone()
    blind[2] = False
    masks = {"all keys": everything, "causal": everything.tril(KEYS - QUERIES), "row 2 sees nothing": blind}
    cases = {name: walk(scores.masked_fill(~mask, -torch.inf), v) for name, mask in masks.items()}
    return TileStepper(
        label="Tile stepper: keys and values go by in tiles of two",
        data={"v": v.tolist(), "tile": TILE, "cases": cases},
    )


def walk(scores: Tensor, v: Tensor) -> dict:
    """The scores as JSON, and the state at the start, after each tile, and after the division by l."""
    m, l, O = torch.full((QUERIES,), -torch.inf, dtype=v.dtype), v.new_zeros(QUERIES), v.new_zeros(QUERIES, WIDTH)
    states = [state(m, l, O, torch.ones_like(l))]
    for start in range(0, KEYS, TILE):
        tile = scores[:, start : start + TILE]
        m_new = torch.maximum(m, tile.amax(1))
        anchor = m_new.masked_fill(m_new == -torch.inf, 0.0)
        P, correction = torch.exp(tile - anchor[:, None]), torch.exp(m - anchor)
        m, l, O = m_new, l * correction + P.sum(1), O * correction[:, None] + P @ v[start : start + TILE]
        states.append(state(m, l, O, correction) | {"P": rounded(P)})
    out, lse = O / l.masked_fill(l == 0, 1.0)[:, None], m + torch.log(l)
    return {"scores": rounded(scores), "states": states, "out": rounded(out), "lse": rounded(lse)}


def state(m: Tensor, l: Tensor, O: Tensor, correction: Tensor) -> dict:
    """The running state as JSON."""
    return {"m": rounded(m), "l": rounded(l), "O": rounded(O), "correction": rounded(correction)}


def rounded(x: Tensor) -> list:
    """Numbers of two decimals; None for minus infinity, which JSON has not."""
    if x.dim() > 1:
        return [rounded(row) for row in x]
    return [None if value == -torch.inf else round(value, 2) + 0.0 for value in x.tolist()]
