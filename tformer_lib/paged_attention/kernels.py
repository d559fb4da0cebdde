"""The kernels: which step can do what is asked, what it is given, and the scratch memory between its thread blocks."""

import struct

import torch
from torch import Tensor

from tformer_lib.ladder import (
    Kernel,
    Ladder,
    is_aligned,
    refusal_of_dtype,
    refusal_of_hopper,
    refusal_of_place,
    refusal_of_tensor_cores,
    stream_of,
    wants_gradients,
)
from tformer_lib.paged_attention.options import Options, Rows

TOPIC = "paged_attention"
PREFILL_STEPS = ("prefill_hopper", "prefill_tensor_core")  # the better first
STEPS = ("0", "cpu", "1", "2", "prefill", *PREFILL_STEPS)
DECODE = Ladder(TOPIC, STEPS, {"cpu": ("cpu", "0"), "cuda": ("2", "1", "0")})
PREFILL = Ladder(TOPIC, STEPS, {"cpu": ("cpu", "0"), "cuda": (*PREFILL_STEPS, "0")})
INVARIANT = Ladder(TOPIC, STEPS, {"cpu": ("cpu", "0"), "cuda": (*PREFILL_STEPS, "1", "0")})
WRITE = Ladder(TOPIC, STEPS, {"cpu": ("cpu", "0"), "cuda": ("write_cache", "0")})  # a GPU has one kernel that writes
DECODE_HEAD_DIMS, PREFILL_HEAD_DIMS, MOST_HEAD_DIM = (64, 128), (64, 128, 256), 256
TMA_ROWS, TILE_ROWS = 8, 128  # of prefill_hopper.cu: a box of TMA has so many rows at least, a tile of queries at least


# --- which step ----------------------------------------------------------------------------------------------------


def choose_step(q: Tensor, k_pool: Tensor, v_pool: Tensor, rows: Rows, options: Options) -> str:
    """The step asked for, if it can do this; without one, the top one that can."""
    reason_of = lambda name: refusal(name, q, k_pool, v_pool, rows.one_query, options.scale)  # noqa: E731
    step = options.step
    if options.batch_invariant:
        return INVARIANT.choose(step, q.device, lambda name: refusal_of_invariance(name, rows) or reason_of(name))
    if step == "prefill":  # the better of the two, or the reason of the one that asks for less
        step = next((name for name in PREFILL_STEPS if reason_of(name) is None), PREFILL_STEPS[-1])
    return (DECODE if rows.one_query else PREFILL).choose(step, q.device, reason_of)


def refusal(step: str, q: Tensor, k_pool: Tensor, v_pool: Tensor, one_query: bool, scale: float) -> str | None:
    """Why ``step`` cannot do this, or None if it can."""
    if step == "0":
        return None
    if reason := refusal_of_place(step, q) or refusal_of_dtype(q) or refusal_of_memory(q, k_pool, v_pool):
        return reason
    if step == "cpu":
        return None
    if step in ("1", "2") and not one_query:
        return "it takes one query a row: leave query_starts out, or say max_queries=1"
    if step == "1":
        return None if q.shape[2] <= MOST_HEAD_DIM else f"head_dim is at most {MOST_HEAD_DIM}, got {q.shape[2]}"
    if reason := refusal_of_16_bits(step, q, k_pool, v_pool):
        return reason
    if step in PREFILL_STEPS and scale <= 0:
        return f"it takes the maximum of the scores before it scales them: scale must be positive, got {scale}"
    return refusal_of_tma(q, k_pool) if step == "prefill_hopper" else None


def refusal_of_invariance(step: str, rows: Rows) -> str | None:
    """Why a step's sums depend on the other rows, or None if they do not.

    Step 2 cuts all rows' keys, end to end, into equal shares, so where a row is cut depends on the others. The prefill
    steps go through a row's keys in tiles that begin at its first one, and share a tile of queries only within a row.
    """
    if step == "2" or step == "prefill":
        return "where it cuts a row's keys depends on the other rows"
    if step in PREFILL_STEPS and rows.query_starts is None:
        return "it needs query_starts"
    return None


def refusal_of_memory(*tensors: Tensor) -> str | None:
    """Why no kernel can take these tensors, the pools among them."""
    if wants_gradients(*tensors):
        return "kernels have no gradients: call it under torch.no_grad()"
    if any(x.dim() == 4 and x.stride(3) != 1 for x in tensors):
        return "the columns of the pools must be adjacent"
    return None


def refusal_of_16_bits(step: str, q: Tensor, k_pool: Tensor, v_pool: Tensor) -> str | None:
    """Why a tensor-core step cannot do this."""
    widths, block_size = DECODE_HEAD_DIMS if step == "2" else PREFILL_HEAD_DIMS, k_pool.shape[2]
    if reason := refusal_of_tensor_cores(q.dtype, q.device):
        return reason
    if q.shape[2] not in widths:
        return f"head_dim must be one of {', '.join(map(str, widths))}, got {q.shape[2]}"
    if block_size & (block_size - 1):
        return f"the block size must be a power of two, got {block_size}"
    if not (is_aligned(k_pool) and is_aligned(v_pool)):
        return "16-byte loads need pools whose addresses and strides are multiples of 16 bytes"
    return None


def refusal_of_tma(q: Tensor, k_pool: Tensor) -> str | None:
    """Why the prefill by TMA and wgmma cannot do this."""
    block_size, group = k_pool.shape[2], q.shape[1] // k_pool.shape[1]
    if reason := refusal_of_hopper(q.device):
        return reason
    if k_pool.dtype != q.dtype:
        return f"TMA copies pools as they are, so they must be of q's dtype {q.dtype}, got {k_pool.dtype}"
    if block_size < TMA_ROWS:
        return f"TMA's swizzle works on {TMA_ROWS} rows: the block size must be that at least, got {block_size}"
    if group > TILE_ROWS:
        return f"the query heads of a kv head must fit into a tile of {TILE_ROWS} rows, got {group}"
    return None


def choose_writer(step: str, k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor) -> str:
    """Who writes: the step asked for, or the fastest; on a GPU every step but 0 is the one kernel that writes."""
    if step in STEPS and step not in ("0", "cpu"):
        step = "write_cache"
    return WRITE.choose(step, k.device, lambda name: refusal_of_write(name, k, v, k_pool, v_pool))


def refusal_of_write(step: str, k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor) -> str | None:
    """Why ``step`` cannot write this, or None if it can."""
    if step == "0":
        return None
    if reason := refusal_of_place(step, k) or refusal_of_dtype(k) or refusal_of_memory(k, v, k_pool, v_pool):
        return reason
    return None if v.dtype == k.dtype else f"kernels take k and v of one dtype, got {k.dtype} and {v.dtype}"


# --- what they are given -------------------------------------------------------------------------------------------

ARGUMENTS = struct.Struct("Pqq Pqq Pqqq Pqqq 6P 8q ff ii q")
"""``paged::Arguments`` of kernels/paged_attention/arguments.h: packing it takes a microsecond, where a
ctypes structure takes ten, and decode calls are short."""

WRITE_ARGUMENTS = struct.Struct("Pqq Pqq Pqqq Pqqq 3P 7q ff iii 4x")
"""``paged::WriteArguments`` of the same file."""


def kernels_of(step: str, k_pool: Tensor, with_step_2: bool) -> tuple[tuple[Kernel, tuple[int, ...]], ...]:
    """The C functions of a step, with what each takes beyond the arguments and the stream.

    Prefill leaves rows with one query to step 2, where that can take them.
    """
    device = k_pool.device
    if step not in PREFILL_STEPS:
        return ((DECODE.kernel(step, "attend" if step == "cpu" else "decode", device), ()),)
    least, blocks = 2 if with_step_2 else 1, k_pool.shape[0]
    more = (least, blocks) if step == "prefill_hopper" else (least,)
    prefill = (PREFILL.kernel(step, "prefill", device), more)
    return (prefill, (DECODE.kernel("2", "decode", device), ())) if with_step_2 else (prefill,)


# --- scratch memory ------------------------------------------------------------------------------------------------

CAPTURE = -1
_scratch: dict[tuple[int, int], tuple[int, int, int]] = {}
_scratch_tensors: list[Tensor] = []

MOST_PARTIAL = 2 * 2 * 16 * (128 + 2)
"""Floats of partial results a multiprocessor: two blocks (three at head_dim 64 take less), two results of 16 heads."""


def scratch_of(device: torch.device, pairs: int) -> tuple[int, int]:
    """Where step 2 leaves partial results and counts arrivals: one place for each stream, kept from call to call.

    All CUDA graphs of a device share one place, which the calls before their capture have made: they must not run at
    the same time. A graph holds its addresses, so what was outgrown is never given back.

    Args:
        device: a GPU.
        pairs: rows times heads at least; each counts its arrivals.

    Returns:
        the addresses of the partial results and of the counts, which are zeros between calls.

    Raises:
        RuntimeError: a graph is being captured, and no call came before.
    """
    stream = CAPTURE if torch.cuda.is_current_stream_capturing() else stream_of(device)
    found = _scratch.get((device.index, stream))
    if found is None or found[2] < pairs:
        if stream == CAPTURE:
            raise RuntimeError("call paged attention once before capturing it in a CUDA graph: its scratch must exist")
        for owner in (CAPTURE, stream):
            found = _scratch[device.index, owner] = make_scratch(device, max(pairs, 2**16))
        torch.cuda.current_stream(device).synchronize()  # the counts are zeros for every stream
    return found[:2]


def make_scratch(device: torch.device, pairs: int) -> tuple[int, int, int]:
    """The addresses of partial results and counts, and for how many pairs they suffice."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    partial = torch.empty(processors * MOST_PARTIAL, dtype=torch.float32, device=device)
    arrivals = torch.zeros(pairs, dtype=torch.int32, device=device)
    _scratch_tensors.extend((partial, arrivals))
    return partial.data_ptr(), arrivals.data_ptr(), pairs
