"""What the public functions and the operators refuse."""

import torch
from torch import Tensor

from tformer_lib.contract import check_inputs
from tformer_lib.sparse_attention.lists import BLOCK, TILE
from tformer_lib.sparse_attention.patterns import blocks_in


def check_operator(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, chosen: Tensor | None) -> None:
    """Refuse what a kernel would follow out of its tensors, from whoever calls the operator."""
    check_inputs(q, k, v)
    check_sinks(sinks, q)
    if chosen is None:
        return
    check_chosen(chosen, q, k)
    if chosen.shape[1] not in (1, q.shape[1]):
        raise ValueError(f"the operator takes a choice of 1 or {q.shape[1]} heads, got {chosen.shape[1]}")
    if chosen.device.type == "cpu" and chosen.numel():
        check_entries(chosen, blocks_in(k.shape[2], BLOCK))


def check_entries(chosen: Tensor, blocks: int) -> None:
    """Refuse blocks that are not there, and one that is chosen twice. Reads them: for a CPU alone."""
    least, most = int(chosen.min()), int(chosen.max())
    if least < -1 or most >= blocks:
        raise ValueError(
            f"chosen must hold blocks 0 to {blocks - 1}, or -1 for none, got {least if least < -1 else most}"
        )
    ordered = chosen.sort(-1).values
    if ((ordered.diff(dim=-1) == 0) & (ordered[..., 1:] >= 0)).any():
        raise ValueError("chosen must hold a block at most once in a list")


def check_gradients(dout: Tensor, dlse: Tensor | None, q: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
    """Refuse gradients, outputs and statistics of other shapes than the forward gave."""
    wanted = (*q.shape[:3], v.shape[3])
    for name, x, shape in (
        ("dout", dout, wanted),
        ("out", out, wanted),
        ("dlse", dlse, q.shape[:3]),
        ("lse", lse, q.shape[:3]),
    ):
        if x is not None and (x.shape != torch.Size(shape) or x.device != q.device):
            raise ValueError(f"{name} must be {tuple(shape)} on {q.device}, got {tuple(x.shape)} on {x.device}")


def check_sinks(sinks: Tensor | None, q: Tensor) -> None:
    """Refuse sinks of the wrong shape or place."""
    if sinks is None:
        return
    if sinks.shape != q.shape[1:2] or sinks.device != q.device or not sinks.is_floating_point():
        came = f"{tuple(sinks.shape)} of {sinks.dtype} on {sinks.device}"
        raise ValueError(f"sinks must be ({q.shape[1]},) floats on {q.device}, got {came}")


def check_chosen(chosen: Tensor, q: Tensor, k: Tensor) -> None:
    """Refuse a choice of the wrong shape, dtype or place."""
    if chosen.dim() != 4 or chosen.is_floating_point() or chosen.dtype == torch.bool or chosen.device != q.device:
        raise ValueError(
            f"chosen must be (batch, heads, tiles, n) integers on {q.device}, got {tuple(chosen.shape)} of "
            f"{chosen.dtype} on {chosen.device}"
        )
    tiles, blocks = blocks_in(q.shape[2], TILE), blocks_in(k.shape[2], BLOCK)
    wanted = ((1, q.shape[0]), (1, k.shape[1], q.shape[1]), (tiles,), tuple(range(blocks + 1)))
    for name, size, sizes in zip(
        ("batch", "heads", "tiles of 128 queries", "blocks"), chosen.shape, wanted, strict=True
    ):
        if size not in sizes:
            expected = " or ".join(map(str, dict.fromkeys(sizes))) if len(sizes) < 4 else f"at most {sizes[-1]}"
            raise ValueError(f"chosen must have {expected} {name}, got {size}")
