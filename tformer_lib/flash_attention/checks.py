"""What flash attention refuses: at its public door, and again in its operators where a kernel would index by it.

Shapes are looked at on every device. What ``cu_seqlens`` hold is looked at on a CPU, where that costs microseconds; on
a GPU it would wait for the device, so there it is looked at where ``checked`` says so.
"""

import numpy as np
import torch
from torch import Tensor

from tformer_lib.contract import check_bias, check_dense, check_inputs, check_positive
from tformer_lib.flash_attention.options import Options, Packing
from tformer_lib.ladder import accumulation_dtype

Window = int | tuple[int | None, int | None] | None


def check_options(
    q: Tensor,
    window: Window,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    batch: int | None = None,
) -> None:
    """Refuse what no step can do. ``batch``: how many sequences are packed; q's first dimension if not given."""
    if isinstance(window, tuple):
        check_sides(window)
    elif window is not None:
        check_whole("window", window, 1, "(the query itself)")
    if softcap is not None:
        check_positive("softcap", softcap)
    if alibi_slopes is not None:
        check_slopes(alibi_slopes, q, q.shape[0] if batch is None else batch)


def check_whole(name: str, number: int, least: int, why: str) -> None:
    """Refuse a number of keys that is not whole or too small."""
    if isinstance(number, float):
        raise ValueError(f"{name} must be a whole number of keys, got {number}")
    if number < least:
        raise ValueError(f"{name} must be at least {least} {why}, got {number}")


def check_sides(window: tuple[int | None, int | None]) -> None:
    """Refuse a window that does not say how many keys before and how many after a query's own it sees."""
    if len(window) != 2:
        raise ValueError(f"window must be a number of keys or a pair (left, right), got {window}")
    for name, side in zip(("left", "right"), window, strict=True):
        if side is not None:
            check_whole(f"window's {name} side", side, 0, "(None: no bound)")


def check_slopes(slopes: Tensor, q: Tensor, batch: int) -> None:
    """Refuse slopes that are not one number a head, or a head and sequence."""
    if not isinstance(slopes, Tensor) or slopes.dtype != torch.float32:
        came = slopes.dtype if isinstance(slopes, Tensor) else type(slopes).__name__
        raise ValueError(f"alibi_slopes must be a float32 tensor, got {came}")
    if slopes.device != q.device:
        raise ValueError(f"alibi_slopes must be on the device of q, {q.device}, got {slopes.device}")
    if slopes.shape not in ((q.shape[1],), (batch, q.shape[1])):
        expected = f"({q.shape[1]},) or ({batch}, {q.shape[1]})"
        raise ValueError(f"alibi_slopes must be (heads,) or (batch, heads), {expected}, got {tuple(slopes.shape)}")
    if slopes.requires_grad:
        raise ValueError("alibi_slopes must not require a gradient, for none would reach them")


def check_packed(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> None:
    """Refuse packed inputs of the wrong shape; what cu_seqlens hold is not read, since that waits for the GPU."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_dense(name, x)
        if x.dim() != 3:
            raise ValueError(f"{name} must have 3 dimensions (total, heads, head_dim), got shape {tuple(x.shape)}")
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if x.dim() != 1 or x.dtype != torch.int32 or x.shape[0] < 1:
            raise ValueError(f"{name} must be (batch + 1,) int32, got {tuple(x.shape)} of {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k must agree in length, got {cu_seqlens_q.shape[0]} and "
            f"{cu_seqlens_k.shape[0]}"
        )


def check_operands(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Options, packing: Packing | None, checked: bool
) -> None:
    """Refuse what a kernel cannot index by, for who calls an operator without the public door."""
    on_cpu = q.device.type == "cpu"
    if on_cpu:
        check_inputs(q, k, v, mask)
        batch = None if packing is None else packing.cu_seqlens_q.shape[0] - 1
        check_options(q, options.window or None, options.softcap or None, options.alibi_slopes, batch)
        if options.bias is not None:
            check_bias(options.bias, q, k)
    if packing is not None and (on_cpu or checked):
        if q.shape[0] != 1 or mask is not None:
            raise ValueError(f"packed sequences lie in one batch row and have no mask, got batch {q.shape[0]}")
        check_packed(q[0], k[0], v[0], packing.cu_seqlens_q, packing.cu_seqlens_k)
        check_packing("q", packing.cu_seqlens_q, q.shape[2], packing.max_seqlen_q)
        check_packing("k", packing.cu_seqlens_k, k.shape[2], packing.max_seqlen_k)


def check_gradients(q: Tensor, v: Tensor, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor) -> None:
    """Refuse gradients and results that do not fit q and v."""
    wide = accumulation_dtype(q)
    shape = (*q.shape[:3], v.shape[-1])
    expected = {"dout": (dout, shape, q.dtype), "out": (out, shape, q.dtype), "lse": (lse, q.shape[:3], wide)}
    if dlse is not None:
        expected["dlse"] = (dlse, q.shape[:3], wide)
    for name, (x, shape, dtype) in expected.items():
        if x.shape != shape or x.dtype != dtype or x.device != q.device:
            came = f"{x.dtype} of shape {tuple(x.shape)} on {x.device}"
            raise ValueError(f"{name} must be {dtype} of shape {tuple(shape)} on {q.device}, got {came}")


def check_packing(name: str, cu_seqlens: Tensor, total: int, most: int) -> None:
    """Refuse numbers that would send a kernel past the ends of its tensors. Waits for a GPU.

    Args:
        name: "q" or "k".
        cu_seqlens: (batch + 1,) int32.
        total: tokens that are packed.
        most: what the caller says is the longest sequence.
    """
    starts = cu_seqlens.cpu().numpy().astype(np.int64)
    if starts[0] != 0 or starts[-1] != total:
        raise ValueError(f"cu_seqlens_{name} must go from 0 to {total}, got {starts[0]} to {starts[-1]}")
    lengths = np.diff(starts)
    if (lengths < 0).any():
        raise ValueError(f"cu_seqlens_{name} must not fall, got {starts.tolist()}")
    if (lengths > most).any():
        raise ValueError(f"max_seqlen_{name} is {most}, the longest sequence has {lengths.max()} tokens")
