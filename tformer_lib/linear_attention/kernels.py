"""The kernels of linear attention: which step can do what is asked, and how it is called.

====== ================ ======================================================== ==========================
step   source           what it is                                               runs on
====== ================ ======================================================== ==========================
0      this package     chunks in plain PyTorch: the oracle                      anything
cpu    cpu.cpp          the same chunks in vectorised C++                        a CPU, f32 bf16 f16
1      1_recurrent.cu   one token after another, no tensor cores; decoding       a GPU, f32 bf16 f16
2      2_chunked.cu     chunks on tensor cores: sum, mean, decaying sum          sm_80 on, bf16 f16
3      3_delta.cu       chunks on tensor cores: delta rule, gated delta rule     sm_80 on, bf16 f16
4      4_hopper.cu      the chunks of 2 and 3 by wgmma, warp specialisation      sm_90, bf16 f16
====== ================ ======================================================== ==========================

Gradients of sums whose decays need none are three more sums, by the forward's step (``gradients``, ``pointwise.cu``).
Those of decays and of the delta rule are ``backward.cu``. What it cannot compute are chunks in PyTorch, whose chains of
states are ``chain.cu``.

The kernels keep a state transposed: (sequences, kv_heads, value_dim, head_dim), with one more row, the sum of the keys,
where the output is normalised.
"""

import ctypes
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from tformer_lib.ladder import (
    DTYPE_CODES,
    KERNEL_DTYPES,
    Ladder,
    loadable,
    refusal_of_dtype,
    refusal_of_hopper,
    refusal_of_place,
    refusal_of_tensor_cores,
)
from tformer_lib.linear_attention.decay import scan_decayed
from tformer_lib.linear_attention.delta import scan_delta
from tformer_lib.linear_attention.feature_maps import FeatureMap, elu_plus_one, relu
from tformer_lib.linear_attention.shared import CHUNK, by_kv_head, by_sequence, first_state, sum_dtype
from tformer_lib.linear_attention.sums import finish, scan_chunks

STEPS = ("0", "cpu", "1", "2", "3", "4")
LADDER = Ladder("linear_attention", steps=STEPS, fastest={"cpu": ("cpu", "0"), "cuda": ("4", "3", "2", "1", "0")})
FEW = Ladder("linear_attention", steps=STEPS, fastest={"cpu": ("cpu", "0"), "cuda": ("1", "0")})
MAPPED = Ladder("linear_attention", steps=STEPS, fastest={"cpu": ("cpu", "0"), "cuda": ("2", "1", "0")})
FEW_TOKENS = 8  # up to so many tokens a sequence, token after token is faster than a chunk of 64
MOST_HEAD_DIM = 256
MOST_CHAIN_DIM = 128
MAPS: dict[FeatureMap | None, int] = {None: 0, elu_plus_one: 1, relu: 2}
"""``enum Map`` of kernels/linear_attention/arguments.h: the feature maps that the kernels know."""
MAP_OF_CODE = {code: feature_map for feature_map, code in MAPS.items()}
CHUNK_STEPS = ("2", "3", "4")
BLOCKS_PER_MULTIPROCESSOR = {"2": 2, "3": 2, "4": 1}  # see their shapes
LEAST_SEGMENT = 8  # chunks: a shorter segment's state costs more than the wait that it saves


# --- the call --------------------------------------------------------------------------------------------------------


class Matrix(ctypes.Structure):
    """``linear::Matrix`` of kernels/linear_attention/arguments.h, and ``linear::Numbers``."""

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "row"))]


class Arguments(ctypes.Structure):
    """``linear::Arguments`` of kernels/linear_attention/arguments.h, in the same order."""

    _fields_ = [
        *((name, Matrix) for name in ("q", "k", "v", "out", "log_decay", "beta")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("initial", "final", "denominators", "segments", "transitions", "segment_decay", "inverses"),
                "cu_seqlens",
            )
        ),
        *((name, ctypes.c_int64) for name in ("sequences", "heads", "kv_heads", "length", "rows")),
        *(
            (name, ctypes.c_int64)
            for name in ("head_dim", "value_dim", "segment_count", "segment_chunks", "chunk_slots")
        ),
        *((name, ctypes.c_float) for name in ("scale", "map_scale")),
        *((name, ctypes.c_int32) for name in ("map", "dtype", "normalise", "reverse")),
    ]


def matrix(x: Tensor) -> Matrix:
    """A (batch, heads, rows, columns) tensor as a kernel sees it."""
    return Matrix(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2))


def launch(
    step: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    initial: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    length: int | None = None,
    scale: float = 1.0,
    map_code: int = 0,
    map_scale: float = 1.0,
    normalised: bool = False,
    reverse: bool = False,
    segment_count: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a kernel.

    Args:
        q, k, v: (batch, heads or kv_heads, T, ...), or packed in one batch row.
        log_decay, beta: (batch, kv_heads, T, 1) float32, any strides.
        initial: (sequences, kv_heads, rows, head_dim) float32: the state before, transposed.
        length: of the longest packed sequence.
        reverse: from the last token to the first; token t's decay then acts between t and t - 1.
        segment_count: into how many segments sequences are cut; chosen to fill the device if None.

    Returns:
        out (batch, heads, T, value_dim), the last states (transposed), and where the output is normalised the
        denominators (batch, heads, T) in float32.
    """
    if step == "0":
        options = {"scale": scale, "map_code": map_code, "map_scale": map_scale, "normalised": normalised}
        tensors = {"log_decay": log_decay, "beta": beta, "initial": initial, "cu_seqlens": cu_seqlens}
        return plain(q, k, v, **tensors, **options, reverse=reverse)
    q, k, v = (loadable(x, aligned=True) for x in (q, k, v))
    batch, heads, T, head_dim = q.shape
    kv_heads, value_dim = k.shape[1], v.shape[3]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    states = sequences * kv_heads
    out = q.new_empty(batch, heads, T, value_dim)
    new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=q.device)  # noqa: E731
    final = new(sequences, kv_heads, value_dim + normalised, head_dim)
    denominators = new(batch, heads, T) if normalised else new(0)
    if T == 0 or sequences == 0:
        return out, final.zero_() if initial is None else final.copy_(initial), denominators
    a = Arguments(q=matrix(q), k=matrix(k), v=matrix(v), out=matrix(out), final=final.data_ptr())
    a.denominators = denominators.data_ptr() if normalised else None
    a.sequences, a.heads, a.kv_heads, a.rows, a.length = sequences, heads, kv_heads, T, T if length is None else length
    a.head_dim, a.value_dim, a.dtype, a.scale = head_dim, value_dim, DTYPE_CODES[q.dtype], scale
    a.map, a.map_scale, a.normalise, a.reverse = map_code, map_scale, normalised, reverse
    held = [q, k, v]  # tensors must live until the launch
    for name, x in (("log_decay", log_decay), ("beta", beta)):
        if x is not None:
            setattr(a, name, matrix(x))
    for name, x in (("initial", initial), ("cu_seqlens", cu_seqlens)):
        if x is not None:
            held.append(x.contiguous())
            setattr(a, name, held[-1].data_ptr())
    if step in CHUNK_STEPS:
        held += bring_scratch(step, a, q, states, segment_count, delta=beta is not None)
    LADDER.launch(step, "forward", a, q.device)
    return out, final, denominators


def bring_scratch(
    step: str, a: Arguments, q: Tensor, states: int, segment_count: int | None, *, delta: bool
) -> list[Tensor]:
    """Choose the segments, and allocate what the kernels of a step hand to one another."""
    chunks = -(-a.length // CHUNK)
    wide = step == "4" or (step == "2" and 64 < a.head_dim <= 128)
    blocks = a.sequences * a.heads * -(-a.value_dim // (128 if wide else 64))  # of so many value columns
    segment_count = segments(step, blocks, chunks, q.device) if segment_count is None else min(segment_count, chunks)
    a.segment_chunks = -(-chunks // segment_count)
    a.segment_count = -(-chunks // a.segment_chunks)
    a.chunk_slots = a.sequences * chunks if a.cu_seqlens is None else a.rows // CHUNK + a.sequences
    slots = states * (a.segment_count - 1)
    floats = lambda n: torch.empty(n, dtype=torch.float32, device=q.device)  # noqa: E731
    scratch = [floats(slots * (a.value_dim + a.normalise) * a.head_dim), floats(slots)]
    a.segments, a.segment_decay = (x.data_ptr() for x in scratch)
    if delta:
        scratch += [floats(slots * a.head_dim**2), q.new_empty(a.kv_heads * a.chunk_slots * CHUNK**2)]
        a.transitions, a.inverses = (x.data_ptr() for x in scratch[2:])
    return scratch


def segments(step: str, blocks: int, chunks: int, device: torch.device) -> int:
    """Into how many segments to cut sequences of so many chunks, where one segment of all gives so many blocks."""
    wanted = BLOCKS_PER_MULTIPROCESSOR[step] * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(wanted // blocks, chunks // LEAST_SEGMENT))


class Chain(ctypes.Structure):
    """``linear::Chain`` of kernels/linear_attention/arguments.h, in the same order."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("right", "left", "values", "left2", "values2")),
        *((name, ctypes.c_void_p) for name in ("kept", "first", "states", "last")),
        *((name, ctypes.c_int64) for name in ("count", "chunks", "head_dim", "value_dim")),
        *((name, ctypes.c_int32) for name in ("dtype", "reverse")),
    ]


def refusal_of_chain(head_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why chain.cu cannot be used."""
    if device.type != "cuda":
        return f"it runs on cuda, and q is on {device.type}"
    if head_dim > MOST_CHAIN_DIM or head_dim % 8 or value_dim % 8:
        return f"head_dim is at most {MOST_CHAIN_DIM}, all widths multiples of 8, got {head_dim} and {value_dim}"
    return refusal_of_tensor_cores(dtype, device)


def run_chain(
    right: Tensor | None,
    left: Tensor,
    values: Tensor,
    left2: Tensor | None,
    values2: Tensor | None,
    kept: Tensor,
    first: Tensor | None,
    *,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """States S' = kept S + L^T (U - R S) + L2^T U2 over the chunks of each head, by chain.cu.

    Args:
        right, left, left2: (batch, heads, chunks, 64, head_dim), of 16 bits; right and the second pair may be None.
        values, values2: (batch, heads, chunks, 64, value_dim).
        kept: (batch, heads, chunks, 1, 1) float32.
        first: (batch, heads, head_dim, value_dim), or None for zeros.
        reverse: from the last chunk to the first.

    Returns:
        The state before each chunk (batch, heads, chunks, head_dim, value_dim), and the last, in float32.
    """
    batch, heads, count, _, head_dim = left.shape
    value_dim, device = values.shape[4], left.device
    matrices = [None if x is None else x.contiguous() for x in (right, left, values, left2, values2)]
    kept = kept.float().contiguous()
    first = None if first is None else first.mT.float().contiguous()
    states = torch.empty(batch, heads, count, value_dim, head_dim, dtype=torch.float32, device=device)
    last = torch.empty(batch, heads, value_dim, head_dim, dtype=torch.float32, device=device)
    pointers = [None if x is None else x.data_ptr() for x in (*matrices, kept, first, states, last)]
    a = Chain(*pointers, batch * heads, count, head_dim, value_dim, DTYPE_CODES[left.dtype], reverse)
    if batch * heads:
        LADDER.launch("chain", "chain", a, device)
    return states.mT, last.mT


# --- which step ------------------------------------------------------------------------------------------------------


def refusal(step: str, q: Tensor, v: Tensor, beta: Tensor | None) -> str | None:
    """Why ``step`` cannot do this, or None if it can."""
    if step == "0":
        return None
    if reason := refusal_of_place(step, q) or refusal_of_dtype(q, KERNEL_DTYPES):
        return reason
    if step == "cpu":
        return None
    if q.shape[3] > MOST_HEAD_DIM:
        return f"head_dim must be at most {MOST_HEAD_DIM}, got {q.shape[3]}"
    if q.shape[3] % 8:
        return f"16-byte loads need a head_dim that is a multiple of 8, got {q.shape[3]}"
    if step == "1":
        return None
    if step in ("2", "3") and (step == "3") != (beta is not None):
        return f"step {step} is {'the delta rule, which needs beta' if step == '3' else 'without the delta rule'}"
    return refusal_of_tensor_cores(q.dtype, q.device) or (refusal_of_step_4(q, v) if step == "4" else None)


def refusal_of_step_4(q: Tensor, v: Tensor) -> str | None:
    """Why two warpgroups of 64 value columns each, with a head_dim padded to 128, cannot do this, or would idle."""
    if not 64 < q.shape[3] <= 128 or v.shape[3] <= 64:
        return f"it is for a head_dim of 65 to 128 and a value_dim over 64, got {q.shape[3]} and {v.shape[3]}"
    return refusal_of_hopper(q.device)


def choose_step(step: str, q: Tensor, v: Tensor, beta: Tensor | None, length: int, *, mapped: bool = False) -> str:
    """The step that was asked for, or the fastest that can do it.

    Args:
        length: of the longest sequence.
        mapped: whether the kernel applies a feature map. Step 4's producer then takes longer than its consumers.
    """
    ladder = FEW if length <= FEW_TOKENS else MAPPED if mapped else LADDER
    return ladder.choose(step, q.device, lambda name: refusal(name, q, v, beta))


# --- step 0 ----------------------------------------------------------------------------------------------------------


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    initial: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float = 1.0,
    map_code: int = 0,
    map_scale: float = 1.0,
    normalised: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``launch`` computes, in PyTorch."""
    dtype, feature_map = sum_dtype(q), MAP_OF_CODE[map_code]
    phi_q, phi_k = (x.to(dtype) if feature_map is None else feature_map(x.to(dtype) * map_scale) for x in (q, k))
    values = F.pad(v.to(dtype), (0, 1), value=1.0) if normalised else v.to(dtype)
    gates = phi_k.new_zeros(*k.shape[:3], 1) if log_decay is None else log_decay
    by_token = [phi_q * scale, phi_k, values, *([] if beta is None else [beta.to(dtype)]), gates.double()]
    scan = partial(scan_decayed if beta is None else scan_delta, chunk=CHUNK)
    if log_decay is None and beta is None:
        scan = scan_sum

    def form(*by_token_and_initial):
        *by_token, initial = by_token_and_initial
        if not reverse:
            return scan(*by_token, initial)
        *tensors, gates = (x.flip(2) for x in by_token)
        gates = F.pad(gates, (0, 0, 1, 0))[:, :, :-1]  # a token's decay acts between it and the token before
        out, state = scan(*tensors, gates, initial)
        return out.flip(2), state

    out, state = by_sequence(form, cu_seqlens, None if initial is None else initial.mT, *by_token)
    denominators = out[..., -1].clone(memory_format=torch.contiguous_format) if normalised else out.new_empty(0)
    out = finish(by_kv_head(out, k), q.dtype, normalised)
    return out, state.mT.clone(memory_format=torch.contiguous_format), denominators  # never a view of an input


def scan_sum(q: Tensor, k: Tensor, v: Tensor, _: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """``scan_decayed`` where nothing decays, exactly."""
    out, state = scan_chunks(by_kv_head(q, k), k, v, first_state(initial, k, v.shape[3]), CHUNK)
    return out.flatten(1, 2), state
