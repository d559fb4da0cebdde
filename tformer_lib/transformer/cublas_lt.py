"""Matrix products with something done to each number before it is stored, by cuBLASLt.

PyTorch multiplies matrices by cuBLAS and cuBLASLt, but its own operators have few of cuBLASLt's **epilogues**: what is
done to a number while it is still in a register, between the product's last addition and the store. cuBLASLt is a C
library, and PyTorch has loaded it already, so ctypes calls it.

cuBLASLt counts matrices by columns. A matrix that lies in memory row by row is, read by columns, its own transpose. So
out = a b is asked for as its transpose, b^T a^T, in which all three lie as they are.

Source: https://docs.nvidia.com/cuda/cublas/#using-the-cublaslt-api, whose names are in the comments.
"""

import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

GELU_AND_INPUT = 32 | 128
"""GELU (by tanh) of the product; the product itself goes to ``aux`` (CUBLASLT_EPILOGUE_GELU_AUX)."""
GELU_GRADIENT = 64 | 128
"""The product times GELU's slope at ``aux`` (CUBLASLT_EPILOGUE_DGELU)."""

TYPES = {torch.bfloat16: 14, torch.float16: 2}  # CUDA_R_16BF, CUDA_R_16F
COMPUTE_FLOAT32, REAL_FLOAT32 = 68, 0  # CUBLAS_COMPUTE_32F, CUDA_R_32F: sums and scales are in float32
TRANSPOSE_A, TRANSPOSE_B, EPILOGUE, AUX_POINTER, AUX_STRIDE = 3, 4, 7, 11, 12  # CUBLASLT_MATMUL_DESC_*
MOST_WORKSPACE = 1  # CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES
WORKSPACE = 32 * 2**20
CANDIDATES = 8
"""Algorithms that are timed for a shape. cuBLASLt lists those first that it takes for the fastest."""
ALIGNMENT = 256  # bytes that cuBLASLt takes for granted when it chooses an algorithm
LIBRARIES = ("libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so")


class Choice(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t: an algorithm, and what is known of it."""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("status", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


@cache
def library() -> ctypes.CDLL | None:
    """cuBLASLt, which a PyTorch with CUDA has loaded; None where there is none."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return None
    for name in LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def call(function: str, *arguments) -> None:
    """Call a function of the library.

    Raises:
        RuntimeError: it returned another status than success.
    """
    if status := getattr(library(), function)(*arguments):
        raise RuntimeError(f"{function} of cuBLASLt failed with status {status}")


@cache
def handle(device: int) -> ctypes.c_void_p:
    """The library's state for a GPU."""
    found = ctypes.c_void_p()
    with torch.cuda.device(device):
        call("cublasLtCreate", ctypes.byref(found))
    return found


@dataclass
class Plan:
    """How a product of one shape is done: descriptions of the operation and the matrices, and an algorithm."""

    operation: ctypes.c_void_p
    b: ctypes.c_void_p
    a: ctypes.c_void_p
    out: ctypes.c_void_p
    candidates: list[Choice]
    best: Choice | None  # the fastest, once they have been timed
    lock: threading.Lock  # the pointer of aux is written into the operation before each call


def as_columns(x: Tensor) -> tuple[bool, int, int, int]:
    """How cuBLASLt sees a matrix, as its transpose: whether it must be transposed; stored rows, columns, stride.

    Raises:
        ValueError: it lies neither row by row nor column by column.
    """
    rows, columns = x.shape
    if x.is_contiguous():
        return False, columns, rows, columns
    if x.t().is_contiguous():
        return True, rows, columns, rows
    raise ValueError(f"a matrix must be contiguous, or its transpose, got strides {x.stride()}")


def set_attribute(operation: ctypes.c_void_p, name: int, value) -> None:
    """Set a field of an operation's description."""
    size = ctypes.c_size_t(ctypes.sizeof(value))
    call("cublasLtMatmulDescSetAttribute", operation, name, ctypes.byref(value), size)


def make_layout(dtype: torch.dtype, rows: int, columns: int, stride: int) -> ctypes.c_void_p:
    """The description of a matrix that lies column by column."""
    found, sizes = ctypes.c_void_p(), (ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(stride))
    call("cublasLtMatrixLayoutCreate", ctypes.byref(found), TYPES[dtype], *sizes)
    return found


@cache
def plan(device: int, dtype: torch.dtype, a: tuple, b: tuple, epilogue: int, aux: int) -> Plan:
    """The plan for matrices of a shape; ``a`` and ``b`` are seen as :func:`as_columns` says.

    Raises:
        RuntimeError: cuBLASLt knows no way to do it.
    """
    operation, wish, found = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int()
    call("cublasLtMatmulDescCreate", ctypes.byref(operation), COMPUTE_FLOAT32, REAL_FLOAT32)
    set_attribute(operation, TRANSPOSE_A, ctypes.c_int32(b[0]))
    set_attribute(operation, TRANSPOSE_B, ctypes.c_int32(a[0]))
    set_attribute(operation, EPILOGUE, ctypes.c_uint32(epilogue))
    set_attribute(operation, AUX_POINTER, ctypes.c_void_p(aux))  # its alignment counts for the choice
    rows, columns = a[1] if a[0] else a[2], b[2] if b[0] else b[1]
    set_attribute(operation, AUX_STRIDE, ctypes.c_int64(columns))
    layouts = make_layout(dtype, *b[1:]), make_layout(dtype, *a[1:]), make_layout(dtype, columns, rows, columns)
    call("cublasLtMatmulPreferenceCreate", ctypes.byref(wish))
    room, choices = ctypes.c_size_t(WORKSPACE), (Choice * CANDIDATES)()
    size = ctypes.c_size_t(ctypes.sizeof(room))
    call("cublasLtMatmulPreferenceSetAttribute", wish, MOST_WORKSPACE, ctypes.byref(room), size)
    with torch.cuda.device(device):
        given = handle(device), operation, *layouts, layouts[2], wish, CANDIDATES, choices, ctypes.byref(found)
        call("cublasLtMatmulAlgoGetHeuristic", *given)
    call("cublasLtMatmulPreferenceDestroy", wish)
    if found.value == 0:
        raise RuntimeError(f"cuBLASLt has no algorithm for {rows} x {columns} in {dtype} with epilogue {epilogue}")
    return Plan(operation, *layouts, list(choices)[: found.value], None, threading.Lock())


def matmul(a: Tensor, b: Tensor, aux: Tensor, epilogue: int) -> Tensor:
    """The product with an epilogue, on the current stream.

    The first product of a shape times the algorithms, unless a CUDA graph is being captured.

    Args:
        a: (m, k), on a GPU, in bfloat16 or float16; contiguous, or its transpose is.
        b: (k, n), the same.
        aux: (m, n), contiguous: written or read by the epilogue.
        epilogue: :data:`GELU_AND_INPUT` or :data:`GELU_GRADIENT`.

    Returns:
        (m, n).

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    shape = a.shape[0], b.shape[1]
    if a.shape[1] != b.shape[0] or aux.shape != shape or not aux.is_contiguous():
        raise ValueError(f"expected (m, k), (k, n) and (m, n), got {[tuple(x.shape) for x in (a, b, aux)]}")
    if a.dtype not in TYPES or {x.dtype for x in (a, b, aux)} != {a.dtype} or {a.device} != {b.device, aux.device}:
        raise ValueError("expected three matrices of one GPU in bfloat16 or float16")
    a, b = (x if x.data_ptr() % ALIGNMENT == 0 else x.clone() for x in (a, b))
    found = plan(a.device.index, a.dtype, as_columns(a), as_columns(b), epilogue, ALIGNMENT)
    out, room = a.new_empty(shape), torch.empty(WORKSPACE, dtype=torch.uint8, device=a.device)
    one, zero = ctypes.c_float(1), ctypes.c_float(0)
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (a, b, out, room)]
    stream = ctypes.c_void_p(torch.cuda.current_stream(a.device).cuda_stream)
    with found.lock, torch.cuda.device(a.device):
        set_attribute(found.operation, AUX_POINTER, ctypes.c_void_p(aux.data_ptr()))
        factors = ctypes.byref(one), pointers[1], found.b, pointers[0], found.a
        result = ctypes.byref(zero), pointers[2], found.out, pointers[2], found.out

        def run(choice: Choice) -> None:
            how = ctypes.byref(choice.algorithm), pointers[3], ctypes.c_size_t(WORKSPACE), stream
            call("cublasLtMatmul", handle(a.device.index), found.operation, *factors, *result, *how)

        if found.best is None and not torch.cuda.is_current_stream_capturing():
            found.best = min(found.candidates, key=lambda choice: milliseconds(run, choice))
        run(found.best or found.candidates[0])
    return out


def milliseconds(run: Callable[[Choice], None], choice: Choice, *, calls: int = 5) -> float:
    """The least time of some calls on the current stream, after one that is not timed."""
    run(choice)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    events[0].record()
    for event in events[1:]:
        run(choice)
        event.record()
    events[-1].synchronize()
    return min(a.elapsed_time(b) for a, b in pairwise(events))
