"""Flash attention: exact attention that never writes the T x S scores to memory.

Two tiles of numbers at a time are enough, because the softmax can be computed online: a running maximum m, a running
sum l and an unnormalised output O are corrected whenever a new tile of keys raises the maximum (Dao et al.,
arXiv:2205.14135; Milakov and Gimelshein, arXiv:1805.02867). The backward recomputes the probabilities from the
log-sum-exp that the forward kept, L = m + log l.

The ladder of implementations, each callable by its ``step``:

====== ============================== ============================================ ====================
step   source                         what it is                                   runs on
====== ============================== ============================================ ====================
0      this file                      tiles in plain PyTorch: the oracle           anything
"cpu"  cpu.cpp                        the same tiles in vectorised C++             a CPU, f32 bf16 f16
1      1_scalar.cu                    one warp a query, no tiles                   a GPU, f32
2      2_tiled.cu                     tiles in shared memory, no tensor cores      a GPU, f32
3      3_tensor_core.cu               mma.sync, ldmatrix, cp.async                 sm_80 on, bf16 f16
4      4_hopper.cu                    TMA, wgmma, warp specialisation              sm_90, bf16 f16
====== ============================== ============================================ ====================

``step=None`` takes the top one that can do what is asked. Gradients come from ``cpu.cpp`` on a CPU, from
``backward.cu`` on a Hopper GPU (step 4; bf16 and f16, head_dim up to 128), from ``backward_tensor_core.cu`` on any GPU
from sm_80 on (step 3; bf16 and f16), from ``backward_tiled.cu`` in float32, and from step 0 otherwise.
"""

import ctypes
import math
import warnings
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from tformer_lib import jit, profiling
from tformer_lib.contract import check_inputs

TOPIC = "flash_attention"
TILE = 128  # rows and columns of step 0's tiles
MOST_HEAD_DIM = 256
HALVES = (torch.bfloat16, torch.float16)
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CPU_LADDER, CUDA_LADDER = ("cpu", "0"), ("4", "3", "2", "0")
# The gradients take the instructions of the step that was asked for, or the best that the device has.
GRADIENTS = {
    "0": ("0",),
    "cpu": ("cpu", "0"),
    "1": ("backward_tiled", "0"),
    "2": ("backward_tiled", "0"),
    "3": ("backward_tensor_core", "0"),
    "4": ("backward", "backward_tensor_core", "backward_tiled", "0"),
}
NO_TOOLS = "no C++ compiler and ninja to build it with: install g++ and `pip install ninja`"
STEPS = ("0", "cpu", "1", "2", "3", "4")


# --- the public door -----------------------------------------------------------------------------------------------


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    step: int | str | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q k^T scale) v in O(T + S) memory, under the attention contract (``tformer_lib.contract``).

    Args:
        q: (batch, heads, T, head_dim), any strides.
        k: (batch, kv_heads, S, head_dim); kv_heads divides heads.
        v: (batch, kv_heads, S, head_dim).
        mask: boolean, broadcastable to (batch, heads, T, S), True where a query may look. The kernels know causal and
            window alone, so any other mask runs step 0 (on a GPU with a warning: it is slower).
        causal: a query sees no later key; the last query sees the last key.
        scale: of the scores, head_dim ** -0.5 if not given.
        window: a query sees itself and the ``window - 1`` keys before it; implies causal.
        step: which implementation, see the table above; the top one that can do it if not given.
        return_lse: return the log-sum-exp of every row's scores too.
        deterministic: the same bits of dq in every run, on a GPU at some cost in speed; follows
            ``torch.use_deterministic_algorithms`` if not given. The forward always is.

    Returns:
        out, of q's shape and dtype, a row that sees no key is zero; with ``return_lse`` also lse, (batch, heads, T)
        float32 (float64 for float64 inputs), -inf for such a row.

    Raises:
        ValueError: the inputs break the contract, or the step cannot do what is asked.
        tformer_lib.jit.BuildError: the step's kernel cannot be built here; the message says what to install.

    A kernel reads q, k and v where they lie, by their strides. The tensor-core steps load 16 bytes at a time: a tensor
    whose columns are not adjacent or whose rows are not 16-byte aligned is copied first.
    """
    check_inputs(q, k, v, mask)
    check_options(q, v, window)
    out, lse = torch.ops.tformer_lab.flash_attention(
        q,
        k,
        v,
        mask,
        None,
        None,
        q.shape[2],
        k.shape[2],
        bool(causal or window),
        window or 0,
        float(q.shape[-1] ** -0.5 if scale is None else scale),
        step_name(step),
        is_deterministic(deterministic),
    )
    return (out, lse) if return_lse else out


def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    step: int | str | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of several sequences packed end to end, each over its own keys alone.

    Args:
        q: (total_q, heads, head_dim).
        k, v: (total_k, kv_heads, head_dim).
        cu_seqlens_q: (batch + 1,) int32, where each sequence's queries begin; the last entry is total_q.
        cu_seqlens_k: (batch + 1,) int32, the same of the keys. A sequence may be empty.
        max_seqlen_q, max_seqlen_k: the longest lengths; read from the tensors if not given, which waits for the GPU.
            What these four say is checked on a CPU; on a GPU that would wait for it, so there they are believed.

    Returns:
        out (total_q, heads, head_dim), and with ``return_lse`` lse (heads, total_q). The other arguments, and what is
        raised, are those of :func:`flash_attention`.
    """
    check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k)
    q4, k4, v4 = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # (total, heads, d) -> (1, heads, total, d)
    check_inputs(q4, k4, v4)
    check_options(q4, v4, window)
    out, lse = torch.ops.tformer_lab.flash_attention(
        q4,
        k4,
        v4,
        None,
        cu_seqlens_q,
        cu_seqlens_k,
        longest(cu_seqlens_q) if max_seqlen_q is None else max_seqlen_q,
        longest(cu_seqlens_k) if max_seqlen_k is None else max_seqlen_k,
        bool(causal or window),
        window or 0,
        float(q.shape[-1] ** -0.5 if scale is None else scale),
        step_name(step),
        is_deterministic(deterministic),
    )
    out, lse = out[0].transpose(0, 1), lse[0]  # (total_q, heads, d), (heads, total_q)
    return (out, lse) if return_lse else out


def check_options(q: Tensor, v: Tensor, window: int | None) -> None:
    """Refuse what no step can do."""
    if v.shape[-1] != q.shape[-1]:
        raise ValueError(f"v must have q's head_dim {q.shape[-1]}, got {v.shape[-1]}")
    if isinstance(window, float):
        raise ValueError(f"window must be a whole number of keys, got {window}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (the query itself), got {window}")


def step_name(step: int | str | None) -> str:
    """The name of a step in STEPS, or "auto"; by comparisons, since torch.compile may trace ``step`` as a symbol."""
    if step is None:
        return "auto"
    for name in STEPS:
        if step == (name if isinstance(step, str) or not name.isdigit() else int(name)):
            return name
    raise ValueError(f"step must be one of {', '.join(STEPS)}, got {step!r}")


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


def check_packing(name: str, cu_seqlens: Tensor, total: int, most: int) -> None:
    """Refuse numbers that would send a kernel past the ends of its tensors. Reads them: for a CPU alone.

    Args:
        name: "q" or "k".
        cu_seqlens: (batch + 1,) int32.
        total: tokens that are packed.
        most: what the caller says is the longest sequence.
    """
    starts = cu_seqlens.tolist()
    if starts[0] != 0 or starts[-1] != total:
        raise ValueError(f"cu_seqlens_{name} must go from 0 to {total}, got {starts[0]} to {starts[-1]}")
    lengths = [stop - start for start, stop in pairwise(starts)]
    if min(lengths, default=0) < 0:
        raise ValueError(f"cu_seqlens_{name} must not fall, got {starts}")
    if max(lengths, default=0) > most:
        raise ValueError(f"max_seqlen_{name} is {most}, the longest sequence has {max(lengths)} tokens")


def longest(cu_seqlens: Tensor) -> int:
    """The length of the longest packed sequence."""
    return int(cu_seqlens.diff().max()) if cu_seqlens.shape[0] > 1 else 0


def is_deterministic(wish: bool | None) -> bool:
    """What the caller wishes, or torch's global setting."""
    return torch.are_deterministic_algorithms_enabled() if wish is None else wish


# --- step 0: the oracle --------------------------------------------------------------------------------------------


def tiled_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, window: int, scale: float, tile: int = TILE
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of FlashAttention-2 (arXiv:2307.08691), one tile of queries after another.

    Returns:
        out (batch, heads, T, head_dim) of q's dtype; lse (batch, heads, T) in the accumulation dtype.
    """
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=accumulation_dtype(q))
    for rows in tiles(q.shape[2], tile):
        out[:, :, rows], lse[:, :, rows] = forward_rows(q, k, v, rows, mask, causal, window, scale, tile)
    return out, lse


def forward_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: slice,
    mask: Tensor | None,
    causal: bool,
    window: int,
    scale: float,
    tile: int,
) -> tuple[Tensor, Tensor]:
    """One tile of queries against every tile of keys that it may see: the online softmax."""
    dtype, T, S = accumulation_dtype(q), q.shape[2], k.shape[2]
    q_tile = q[:, :, rows].to(dtype)  # (batch, heads, tile, head_dim)
    m = q_tile.new_full(q_tile.shape[:3], -math.inf)  # running maximum of each row
    l = torch.zeros_like(m)  # running sum of exp(score - m)
    O = torch.zeros_like(q_tile)  # running sum of exp(score - m) v
    for columns in key_tiles(rows, T, S, causal, window, tile):
        scores = score_tile(q_tile, k, rows, columns, T, S, mask, causal, window, scale)  # (batch, heads, tile, tile)
        m_new = torch.maximum(m, scores.amax(-1))
        anchor = m_new.masked_fill(m_new == -math.inf, 0.0)  # a row that has seen no key: -inf - 0, not -inf - -inf
        P = torch.exp(scores - anchor[..., None])
        correction = torch.exp(m - anchor)
        l = l * correction + P.sum(-1)
        O = O * correction[..., None] + P @ v[:, :, columns].to(dtype)
        m = m_new
    anchor = m.masked_fill(m == -math.inf, 0.0)
    return (O / l.masked_fill(l == 0, 1.0)[..., None]).to(q.dtype), anchor + torch.log(l)


def tiled_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    window: int,
    scale: float,
    tile: int = TILE,
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 2 of FlashAttention-2: the probabilities come back from the scores and the log-sum-exp.

    With P = exp(S - lse): dV = P^T dO, dP = dO V^T, dS = P (dP - delta), dQ = dS K scale, dK = dS^T Q scale, where
    delta = rowsum(dO O) is the softmax's own correction. A gradient of lse adds dlse P to dS, so it joins delta.
    """
    dtype, T, S, kv_heads = accumulation_dtype(q), q.shape[2], k.shape[2], k.shape[1]
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    delta = (dout.to(dtype) * out.to(dtype)).sum(-1)  # (batch, heads, T)
    delta = delta if dlse is None else delta - dlse
    dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
    for rows in tiles(T, tile):
        q_tile, dout_tile = q[:, :, rows].to(dtype), dout[:, :, rows].to(dtype)
        anchor = lse[:, :, rows].masked_fill(lse[:, :, rows] == -math.inf, math.inf)[..., None]  # such a row has P = 0
        for columns in key_tiles(rows, T, S, causal, window, tile):
            scores = score_tile(q_tile, k, rows, columns, T, S, mask, causal, window, scale)
            P = torch.exp(scores - anchor)
            dP = dout_tile @ v[:, :, columns].to(dtype).mT
            dS = P * (dP - delta[:, :, rows, None])
            dv[:, :, columns] += P.mT @ dout_tile
            dk[:, :, columns] += dS.mT @ q_tile * scale
            dq[:, :, rows] += dS @ k[:, :, columns].to(dtype) * scale
    dk, dv = sum_groups(dk, kv_heads), sum_groups(dv, kv_heads)
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def score_tile(
    q_tile: Tensor,
    k: Tensor,
    rows: slice,
    columns: slice,
    T: int,
    S: int,
    mask: Tensor | None,
    causal: bool,
    window: int,
    scale: float,
) -> Tensor:
    """The scaled scores of one tile, -inf where the query may not look: (batch, heads, rows, columns)."""
    scores = q_tile @ k[:, :, columns].to(q_tile.dtype).mT * scale
    query = torch.arange(rows.start, rows.stop, device=k.device)[:, None] + (S - T)  # aligned to the bottom right
    key = torch.arange(columns.start, columns.stop, device=k.device)
    if causal:
        scores = scores.masked_fill(key > query, -math.inf)
    if window:
        scores = scores.masked_fill(key <= query - window, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask_tile(mask, rows, columns), -math.inf)
    return scores


def mask_tile(mask: Tensor, rows: slice, columns: slice) -> Tensor:
    """The part of a broadcastable mask that covers one tile."""
    mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    mask = mask if mask.shape[2] == 1 else mask[:, :, rows]
    return mask if mask.shape[3] == 1 else mask[..., columns]


def tiles(length: int, tile: int) -> list[slice]:
    """Cut ``length`` rows into tiles; the last may be short."""
    return [slice(start, min(start + tile, length)) for start in range(0, length, tile)]


def key_tiles(rows: slice, T: int, S: int, causal: bool, window: int, tile: int) -> list[slice]:
    """The tiles of keys that any query of ``rows`` may see; the others are never touched."""
    first = max(0, rows.start + S - T - window + 1) if window else 0
    last = min(S, rows.stop + S - T) if causal else S
    return [columns for columns in tiles(S, tile) if columns.stop > first and columns.start < last]


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Sums are kept in float32, or in float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """(batch, kv_heads, S, d) -> (batch, heads, S, d): each kv head serves heads / kv_heads query heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def sum_groups(x: Tensor, kv_heads: int) -> Tensor:
    """(batch, heads, S, d) -> (batch, kv_heads, S, d): the gradient of ``repeat_heads``."""
    return x if x.shape[1] == kv_heads else x.unflatten(1, (kv_heads, -1)).sum(2)


# --- which step ----------------------------------------------------------------------------------------------------


def choose_step(step: str, q: Tensor, mask: Tensor | None) -> str:
    """The step asked for, if it can do this; for "auto" the top one that can."""
    if step != "auto":
        if reason := refusal(step, q, mask):
            raise ValueError(f"step {step} cannot do this: {reason}")
        return step
    ladder = {"cpu": CPU_LADDER, "cuda": CUDA_LADDER}.get(q.device.type, ("0",))
    chosen = next(name for name in ladder if not refusal(name, q, mask))
    if chosen == "0" and len(ladder) > 1:
        warn_of_step_0(q, mask)
    return chosen


def warn_of_step_0(q: Tensor, mask: Tensor | None) -> None:
    """Say why a machine that could run a kernel runs PyTorch instead: a GPU always, a CPU if it lacks the tools."""
    usual = "cpu" if not q.is_cuda else "3" if q.dtype in HALVES else "2"
    reason = refusal(usual, q, mask)
    if q.is_cuda or reason == NO_TOOLS:
        warnings.warn(f"flash attention runs step 0, plain PyTorch, which is slow: {reason}", stacklevel=3)


def refusal(step: str, q: Tensor, mask: Tensor | None) -> str | None:
    """Why ``step`` cannot do this, or None if it can."""
    if step == "0":
        return None
    wanted = "cpu" if step == "cpu" else "cuda"
    if q.device.type != wanted:
        return f"it runs on {wanted}, and q is on {q.device.type}"
    if mask is not None:
        return "kernels know the masks causal and window alone; step 0 takes any"
    if q.shape[-1] > MOST_HEAD_DIM:
        return f"head_dim must be at most {MOST_HEAD_DIM}, got {q.shape[-1]}"
    if step == "cpu":
        return refusal_of_cpu(q)
    return refusal_of_cuda(step, q)


def refusal_of_cpu(q: Tensor) -> str | None:
    """Why the C++ twin cannot do this."""
    if q.dtype not in DTYPE_CODES:
        return f"the C++ twin takes float32, bfloat16 and float16, got {q.dtype}"
    return None if has_cpu_twin() else NO_TOOLS


@cache
def has_cpu_twin() -> bool:
    """Whether the C++ twin is built, or can be."""
    return jit.can_build_cpp() or jit.is_built(TOPIC, "cpu")


def refusal_of_cuda(step: str, q: Tensor) -> str | None:
    """Why a CUDA step cannot do this."""
    if step in ("1", "2", "backward_tiled"):
        return None if q.dtype == torch.float32 else f"it takes float32, got {q.dtype}"
    if q.dtype not in HALVES:
        return f"tensor-core steps take bfloat16 and float16, got {q.dtype}"
    if q.shape[-1] % 8:
        return f"16-byte loads need a head_dim that is a multiple of 8, got {q.shape[-1]}"
    capability = torch.cuda.get_device_capability(q.device)
    if capability < (8, 0):
        return f"mma.sync with bfloat16 and cp.async need compute capability 8.0, this GPU has {capability}"
    if step in ("4", "backward") and capability != (9, 0):
        return f"wgmma is of compute capability 9.0 alone, this GPU has {capability}"
    if step == "backward" and q.shape[-1] > 128:
        return f"a head_dim over 128 does not fit the registers of backward.cu, got {q.shape[-1]}"
    return None


# --- the kernels ---------------------------------------------------------------------------------------------------


class Matrix(ctypes.Structure):
    """``flash::Matrix`` of kernels/flash_attention/arguments.h."""

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "row"))]


class Arguments(ctypes.Structure):
    """``flash::Arguments`` of kernels/flash_attention/arguments.h, in the same order."""

    _fields_ = [
        *((name, Matrix) for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")),
        *(
            (name, ctypes.c_void_p)
            for name in ("lse", "dlse", "delta", "dq_sum", "turn", "cu_seqlens_q", "cu_seqlens_k")
        ),
        *(
            (name, ctypes.c_int64)
            for name in ("lse_batch", "lse_head", "batch", "heads", "kv_heads", "queries", "keys")
        ),
        *((name, ctypes.c_int64) for name in ("total_q", "total_k", "head_dim", "window")),
        ("scale", ctypes.c_float),
        ("causal", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    ]


class Resources(ctypes.Structure):
    """``flash::Resources``: what a launch of a CUDA step uses."""

    _fields_ = [
        (name, ctypes.c_int32)
        for name in ("threads", "registers", "spilled_bytes", "shared_bytes", "blocks_per_multiprocessor")
    ]


@cache
def kernel(step: str, device: torch.device, name: str) -> ctypes._CFuncPtr:
    """A C function of a step's library, built at the first call."""
    function = getattr(jit.load(TOPIC, step, device=device), name)
    function.restype = ctypes.c_char_p  # null, or what went wrong
    return function


def launch(step: str, name: str, arguments: Arguments, device: torch.device) -> None:
    """Call a C function of a step: on a GPU with the tensors' device current, on that device's current stream."""
    function = kernel(step, device, name)
    if device.type == "cuda":
        with torch.cuda.device(device):
            stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
            error = function(ctypes.byref(arguments), stream)
    else:
        error = function(ctypes.byref(arguments), None)
    if error:
        raise RuntimeError(f"flash attention, step {step}, {name}: {error.decode()}")


def resources(step: int | str, q: Tensor, k: Tensor, *, causal: bool = False) -> dict[str, int]:
    """Threads, registers, spilled bytes, shared memory and resident blocks of a CUDA step's launch on such tensors."""
    function = kernel(str(step), q.device, "resources")
    found = Resources()
    with torch.cuda.device(q.device):
        error = function(ctypes.byref(describe(q, k, k, causal=causal)), ctypes.byref(found))
    if error:
        raise RuntimeError(error.decode())
    return {name: getattr(found, name) for name, _ in Resources._fields_}


def matrix(x: Tensor) -> Matrix:
    """A (batch, heads, rows, columns) tensor as a kernel sees it."""
    return Matrix(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2))


def describe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: tuple[Tensor, Tensor] | None = None,
    longest: tuple[int, int] | None = None,
    causal: bool = False,
    window: int = 0,
    scale: float = 1.0,
) -> Arguments:
    """The arguments that every kernel needs; the caller adds the outputs."""
    arguments = Arguments(q=matrix(q), k=matrix(k), v=matrix(v), causal=causal, window=window, scale=scale)
    arguments.batch, arguments.heads, arguments.total_q, arguments.head_dim = q.shape
    arguments.kv_heads, arguments.total_k = k.shape[1], k.shape[2]
    arguments.queries, arguments.keys = longest or (q.shape[2], k.shape[2])
    arguments.dtype = DTYPE_CODES[q.dtype]
    arguments.lse_batch, arguments.lse_head = q.shape[1] * q.shape[2], q.shape[2]
    if cu_seqlens is not None:
        arguments.cu_seqlens_q, arguments.cu_seqlens_k = (x.data_ptr() for x in cu_seqlens)
        arguments.batch = cu_seqlens[0].shape[0] - 1
    return arguments


def readable(x: Tensor) -> Tensor:
    """``x`` itself where 16-byte loads along its rows can read it, else a copy."""
    step = 16 // x.element_size()
    strides = [stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1]
    columns_adjacent = x.shape[3] == 1 or x.stride(3) == 1
    aligned = (
        x.device.type == "cpu"
        or x.dtype not in HALVES
        or (x.data_ptr() % 16 == 0 and all(stride % step == 0 for stride in strides))
    )
    return x if columns_adjacent and aligned else x.clone(memory_format=torch.contiguous_format)


# --- the operator --------------------------------------------------------------------------------------------------


def run_forward(
    step: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    cu_seqlens: tuple[Tensor, Tensor] | None,
    longest: tuple[int, int],
    causal: bool,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Run one step of the ladder on (batch, heads, T, d) or packed (1, heads, total, d) tensors."""
    if step == "0":
        if cu_seqlens is None:
            return tiled_forward(q, k, v, mask, causal, window, scale)
        return packed_forward(q, k, v, cu_seqlens, causal, window, scale)
    out, lse = empty_outputs(q)
    if q.numel() == 0 or k.numel() == 0:
        return out.zero_(), lse.fill_(-math.inf)
    if q.is_cuda:
        q, scale, _ = positive_scale(q, scale)
    q, k, v = readable(q), readable(k), readable(v)
    arguments = describe(q, k, v, cu_seqlens=cu_seqlens, longest=longest, causal=causal, window=window, scale=scale)
    arguments.out, arguments.lse = matrix(out), lse.data_ptr()
    launch(step, "forward", arguments, q.device)
    return out, lse


def run_backward(
    step: str,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    cu_seqlens: tuple[Tensor, Tensor] | None,
    longest: tuple[int, int],
    causal: bool,
    window: int,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v by a step of GRADIENTS."""
    if step == "0":
        if cu_seqlens is None:
            return tiled_backward(dout, dlse, q, k, v, out, lse, mask, causal, window, scale)
        return packed_backward(dout, dlse, q, k, v, out, lse, cu_seqlens, causal, window, scale)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    sign = 1.0
    if q.is_cuda:
        q, scale, sign = positive_scale(q, scale)
    q, k, v, out, dout = (readable(x) for x in (q, k, v, out, dout))
    arguments = describe(q, k, v, cu_seqlens=cu_seqlens, longest=longest, causal=causal, window=window, scale=scale)
    delta = torch.empty_like(lse)
    dlse = None if dlse is None else dlse.contiguous()
    arguments.out, arguments.dout = matrix(out), matrix(dout)
    arguments.dq, arguments.dk, arguments.dv = matrix(dq), matrix(dk), matrix(dv)
    arguments.lse, arguments.delta = lse.data_ptr(), delta.data_ptr()
    arguments.dlse = None if dlse is None else dlse.data_ptr()
    scratch = bring_scratch(step, arguments, q, deterministic) if q.is_cuda else None  # kept alive until the launch
    launch(step, "backward", arguments, q.device)
    del scratch
    return dq if sign == 1.0 else dq * sign, dk, dv


def positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float, float]:
    """The same scores by a positive scale, and the sign that moved into a copy of q (0 where the scale is 0).

    The CUDA steps take the maximum of the scores before they scale them, which a negative scale would turn over.
    """
    if scale > 0:
        return q, scale, 1.0
    sign = math.copysign(1.0, scale) if scale else 0.0
    return q * sign, abs(scale) or 1.0, sign


def bring_scratch(step: str, arguments: Arguments, q: Tensor, deterministic: bool) -> tuple[Tensor, ...]:
    """Allocate what the gradients need between their kernels, in the sizes that they name."""
    sizes = (ctypes.c_int64 * 3)()
    if error := kernel(step, q.device, "scratch")(ctypes.byref(arguments), sizes):
        raise RuntimeError(error.decode())
    delta = q.new_empty(sizes[0], dtype=torch.float32)
    dq_sum = q.new_zeros(sizes[1], dtype=torch.float32)
    turn = q.new_zeros(sizes[2], dtype=torch.int32) if deterministic else None
    arguments.delta, arguments.dq_sum = delta.data_ptr(), dq_sum.data_ptr()
    arguments.turn = None if turn is None else turn.data_ptr()
    return delta, dq_sum, turn


def packed_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: tuple[Tensor, Tensor], causal: bool, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Step 0 on packed sequences: one after another."""
    out, lse = empty_outputs(q)
    for rows, columns in sequences(cu_seqlens):
        out[:, :, rows], lse[:, :, rows] = tiled_forward(
            q[:, :, rows], k[:, :, columns], v[:, :, columns], None, causal, window, scale
        )
    return out, lse


def packed_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: tuple[Tensor, Tensor],
    causal: bool,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Step 0's gradients on packed sequences."""
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for rows, columns in sequences(cu_seqlens):
        dq[:, :, rows], dk[:, :, columns], dv[:, :, columns] = tiled_backward(
            dout[:, :, rows],
            None if dlse is None else dlse[:, :, rows],
            q[:, :, rows],
            k[:, :, columns],
            v[:, :, columns],
            out[:, :, rows],
            lse[:, :, rows],
            None,
            causal,
            window,
            scale,
        )
    return dq, dk, dv


def sequences(cu_seqlens: tuple[Tensor, Tensor]) -> list[tuple[slice, slice]]:
    """Where each packed sequence's queries and keys are."""
    starts_q, starts_k = (x.tolist() for x in cu_seqlens)
    cuts_q = [slice(a, b) for a, b in pairwise(starts_q)]
    cuts_k = [slice(a, b) for a, b in pairwise(starts_k)]
    return list(zip(cuts_q, cuts_k, strict=True))


def empty_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """out, laid out as q is where q's columns are adjacent, and lse (batch, heads, T)."""
    layout = torch.preserve_format if q.stride(-1) == 1 else torch.contiguous_format
    return torch.empty_like(q, memory_format=layout), q.new_empty(q.shape[:3], dtype=accumulation_dtype(q))


@torch.library.custom_op("tformer_lab::flash_attention", mutates_args=())
def flash_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    window: int,
    scale: float,
    step: str,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """The operator behind both public functions; it sees one batch row where sequences are packed."""
    packed = None if cu_seqlens_q is None else (cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous())
    if packed and q.device.type == "cpu":
        check_packing("q", cu_seqlens_q, q.shape[2], max_seqlen_q)
        check_packing("k", cu_seqlens_k, k.shape[2], max_seqlen_k)
    chosen = choose_step(step, q, mask)
    longest = (max_seqlen_q, max_seqlen_k)
    return run_forward(chosen, q, k, v, mask, packed, longest, causal, window, scale)


@flash_attention_op.register_fake
def flash_attention_fake(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """The shapes, dtypes and strides of what the operator returns."""
    return empty_outputs(q)


@torch.library.custom_op("tformer_lab::flash_attention_backward", mutates_args=())
def flash_attention_backward_op(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    window: int,
    scale: float,
    step: str,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    packed = None if cu_seqlens_q is None else (cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous())
    chosen = choose_backward(step, q, mask)
    longest = (max_seqlen_q, max_seqlen_k)
    return run_backward(
        chosen, dout, dlse, q, k, v, out, lse, mask, packed, longest, causal, window, scale, deterministic
    )


@flash_attention_backward_op.register_fake
def flash_attention_backward_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    """The shapes and dtypes of the gradients."""
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def choose_backward(step: str, q: Tensor, mask: Tensor | None) -> str:
    """Whose gradients: those that belong to the step; a warning if a GPU is left with step 0."""
    names = GRADIENTS[("4" if q.is_cuda else "cpu") if step == "auto" else step]
    chosen = next(name for name in names if not refusal(name, q, mask))
    if q.is_cuda and chosen == "0" and step != "0":
        usual = "backward_tensor_core" if q.dtype in HALVES else "backward_tiled"
        warnings.warn(
            f"the gradients run step 0, plain PyTorch, which is slow: {refusal(usual, q, mask)}", stacklevel=2
        )
    return chosen


def save_for_backward(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    """Keep what the gradients need: the inputs, out and lse; nothing of size T x S."""
    q, k, v, mask, cu_seqlens_q, cu_seqlens_k, *options = inputs
    ctx.save_for_backward(q, k, v, *output, mask, cu_seqlens_q, cu_seqlens_k)
    ctx.options = options
    ctx.set_materialize_grads(False)


def backward(ctx, dout: Tensor | None, dlse: Tensor | None) -> tuple:
    """The gradients of the operator's inputs; lse has one too, where it was used."""
    q, k, v, out, lse, mask, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv = torch.ops.tformer_lab.flash_attention_backward(
        dout, dlse, q, k, v, out, lse, mask, cu_seqlens_q, cu_seqlens_k, *ctx.options
    )
    return dq, dk, dv, *(None for _ in range(3 + len(ctx.options)))


flash_attention_op.register_autograd(backward, setup_context=save_for_backward)


def flops(q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, products: int) -> int:
    """FLOPs of so many products of (T, head_dim) by (head_dim, S), causal or not, of each head and sequence."""
    batch, heads, T, head_dim = q.shape
    pairs = batch * T * k.shape[2]
    if cu_seqlens_q is not None:
        pairs = int((cu_seqlens_q.diff().long() * cu_seqlens_k.diff()).sum())
    return 2 * products * heads * head_dim * pairs


def forward_flops(q, k, v, mask, cu_seqlens_q, cu_seqlens_k, *_, out_val=None) -> int:
    """For ``profiling.count``: S = Q K^T and O = P V."""
    return flops(q, k, cu_seqlens_q, cu_seqlens_k, 2)


def backward_flops(dout, dlse, q, k, v, out, lse, mask, cu_seqlens_q, cu_seqlens_k, *_, out_val=None) -> int:
    """For ``profiling.count``: S again, dP, dV, dQ and dK."""
    return flops(q, k, cu_seqlens_q, cu_seqlens_k, 5)


profiling.PRODUCTS[torch.ops.tformer_lab.flash_attention] = forward_flops
profiling.PRODUCTS[torch.ops.tformer_lab.flash_attention_backward] = backward_flops
