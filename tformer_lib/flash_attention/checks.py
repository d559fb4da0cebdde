"""What flash attention refuses: at its public door, and again in its operators where a kernel would index by it.

Shapes are looked at on every device. What ``cu_seqlens`` hold is looked at on a CPU, where that costs microseconds; on
a GPU it would wait for the device, so there it is looked at where ``checked`` says so.
"""

import numpy as np
import torch
from torch import Tensor

from tformer_lib.contract import check_inputs
from tformer_lib.flash_attention.options import Packing
from tformer_lib.ladder import accumulation_dtype


def check_options(q: Tensor, v: Tensor, window: int | None) -> None:
    """Refuse what no step can do."""
    if v.shape[-1] != q.shape[-1]:
        raise ValueError(f"v must have q's head_dim {q.shape[-1]}, got {v.shape[-1]}")
    if isinstance(window, float):
        raise ValueError(f"window must be a whole number of keys, got {window}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (the query itself), got {window}")


def check_packed(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> None:
    """Refuse packed inputs of the wrong shape; what cu_seqlens hold is not read, since that waits for the GPU."""
    for name, x in (("q", q), ("k", k), ("v", v)):
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
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, window: int, packing: Packing | None, checked: bool
) -> None:
    """Refuse what a kernel cannot index by, for who calls an operator without the public door."""
    on_cpu = q.device.type == "cpu"
    if on_cpu:
        check_inputs(q, k, v, mask)
        check_options(q, v, window or None)
    if packing is not None and (on_cpu or checked):
        if q.shape[0] != 1 or mask is not None:
            raise ValueError(f"packed sequences lie in one batch row and have no mask, got batch {q.shape[0]}")
        check_packed(q[0], k[0], v[0], packing.cu_seqlens_q, packing.cu_seqlens_k)
        check_packing("q", packing.cu_seqlens_q, q.shape[2], packing.max_seqlen_q)
        check_packing("k", packing.cu_seqlens_k, k.shape[2], packing.max_seqlen_k)


def check_gradients(q: Tensor, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor) -> None:
    """Refuse gradients and results that are not laid out as those of q are."""
    wide = accumulation_dtype(q)
    expected = {"dout": (dout, q.shape, q.dtype), "out": (out, q.shape, q.dtype), "lse": (lse, q.shape[:3], wide)}
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
