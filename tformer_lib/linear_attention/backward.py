"""The gradients of the delta rule and the decaying sum on tensor cores: how backward.cu is called."""

import ctypes

import torch
from torch import Tensor

from tformer_lib.ladder import DTYPE_CODES, loadable, refusal_of_tensor_cores
from tformer_lib.linear_attention.kernels import LADDER, Arguments, Matrix, bring_scratch, matrix
from tformer_lib.linear_attention.shared import CHUNK

MOST_HEAD_DIM = 128
BLOCK_VALUES = 64  # value columns of a block that walks along the chunks
SHARED_BYTES = {64: 150_064, 128: 231_984}  # of a block of its largest kernel, by the width that head_dim is padded to


class Gradients(ctypes.Structure):
    """``linear::Gradients`` of kernels/linear_attention/backward.cu, in the same order."""

    _fields_ = [
        ("forward", Arguments),
        *((name, Matrix) for name in ("dout", "dq", "dk", "dv")),
        *((name, ctypes.c_void_p) for name in ("dlog_decay", "dbeta", "dfinal", "dinitial")),
        *((name, ctypes.c_void_p) for name in ("states", "writes", "dstates", "dwrites", "scores", "dsegments")),
        *((f"{name}_shrinks", ctypes.c_void_p) for name in ("state", "write", "dstate", "dwrite", "score")),
    ]


def refusal_of_backward(q: Tensor, v: Tensor, beta: Tensor | None) -> str | None:
    """Why backward.cu cannot be used."""
    device, head_dim, value_dim = q.device, q.shape[3], v.shape[3]
    if device.type != "cuda":
        return f"it runs on cuda, and q is on {device.type}"
    if head_dim > MOST_HEAD_DIM or head_dim % 8 or value_dim % 8:
        return f"head_dim is at most {MOST_HEAD_DIM}, all widths multiples of 8, got {head_dim} and {value_dim}"
    needed, there = SHARED_BYTES[64 if head_dim <= 64 else 128], shared_bytes(device)
    if there < needed:
        return f"its tiles need {needed:,} bytes of shared memory, a block of this GPU has {there:,}"
    return refusal_of_tensor_cores(q.dtype, device)


def fills_device(blocks: int, device: torch.device) -> bool:
    """Whether so many blocks leave few multiprocessors idle. Segments would pass over the text twice."""
    return 4 * blocks >= 3 * torch.cuda.get_device_properties(device).multi_processor_count


def shared_bytes(device: torch.device) -> int:
    """The most shared memory that a block may ask for."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def run_backward(
    dout: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    length: int,
    scale: float,
    segment_count: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """dq, dk, dv, dlog_decay, dbeta and dinitial, the last five a query head; what was not given has none.

    Args:
        dout: (batch, heads, T, value_dim), T at least 1.
        dfinal, initial: (sequences, kv_heads, value_dim, head_dim) float32, transposed states, or None for zeros.
        log_decay, beta: (batch, kv_heads, T, 1) float32, any strides; no decay if None, the decaying sum without beta.
        length: of the longest sequence.
        segment_count: into how many segments sequences are cut; chosen to fill the device if None.
    """
    dout, q, k, v = (loadable(x, aligned=True) for x in (dout, q, k, v))
    batch, heads, T, head_dim = q.shape
    kv_heads, value_dim = k.shape[1], v.shape[3]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=q.device)  # noqa: E731
    g = Gradients()
    a = g.forward
    a.q, a.k, a.v = (matrix(x) for x in (q, k, v))
    a.sequences, a.heads, a.kv_heads, a.rows, a.length = sequences, heads, kv_heads, T, length
    a.head_dim, a.value_dim, a.dtype, a.scale = head_dim, value_dim, DTYPE_CODES[q.dtype], scale
    for name, x in (("log_decay", log_decay), ("beta", beta)):
        if x is not None:
            setattr(a, name, matrix(x))
    held = [None if x is None else x.contiguous() for x in (initial, dfinal, cu_seqlens)]
    a.initial, g.dfinal, a.cu_seqlens = (None if x is None else x.data_ptr() for x in held)
    if segment_count is None and fills_device(sequences * heads * -(-value_dim // BLOCK_VALUES), q.device):
        segment_count = 1
    held += bring_scratch("3", a, q, sequences * kv_heads, segment_count, delta=beta is not None)
    chunks, writes = a.chunk_slots, a.chunk_slots * value_dim * CHUNK * (beta is not None)
    scratch = {
        "states": q.new_empty(kv_heads * chunks * value_dim * head_dim),
        "writes": q.new_empty(kv_heads * writes),
        "dstates": q.new_empty(heads * chunks * value_dim * head_dim),
        "dwrites": q.new_empty(heads * writes),
        "scores": q.new_empty(heads * chunks * CHUNK**2),
        "dsegments": new(sequences * heads * (a.segment_count - 1) * value_dim * head_dim),
    }
    if q.dtype == torch.float16:  # what the others are multiplied by to fit
        slices = -(-value_dim // BLOCK_VALUES)
        counts = {"state": kv_heads, "write": kv_heads, "dstate": heads, "dwrite": heads}
        scratch |= {f"{name}_shrinks": new(count * chunks * slices) for name, count in counts.items()}
        scratch["score_shrinks"] = new(heads * chunks)
    dq, dk, dv = (q.new_empty(batch, heads, T, width) for width in (head_dim, head_dim, value_dim))
    dlog_decay, dbeta = new(batch, heads, T, 1), None if beta is None else new(batch, heads, T, 1)
    dinitial = None if initial is None else new(sequences, heads, value_dim, head_dim)
    g.dout, g.dq, g.dk, g.dv = (matrix(x) for x in (dout, dq, dk, dv))
    for name, x in {**scratch, "dlog_decay": dlog_decay, "dbeta": dbeta, "dinitial": dinitial}.items():
        setattr(g, name, None if x is None else x.data_ptr())
    LADDER.launch("backward", "gradients", g, q.device)
    return dq, dk, dv, dlog_decay, dbeta, dinitial
