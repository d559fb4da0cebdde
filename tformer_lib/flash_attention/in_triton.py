"""Step 3 again, in Triton: a language in which a program names tiles, and the compiler deals them out to lanes.

It stands beside the ladder as a translation to read and to time, not as one of its steps. Triton comes with the CUDA
builds of torch; where it or a GPU is missing, :func:`flash_attention_in_triton` refuses in words.
"""

import math
from functools import cache

import torch
from torch import Tensor

from tformer_lib.contract import check_inputs, score_scale

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

constexpr = object if triton is None else tl.constexpr  # known when the kernel is compiled
LOG2E = 1.4426950408889634
HEAD_DIMS = (16, 32, 64, 128)


def forward_kernel(
    Q, K, V, O, scale, heads, group, T, S, q_b, q_h, q_row, k_b, k_h, k_row, v_b, v_h, v_row, o_b, o_h, o_row,
    CAUSAL: constexpr, D: constexpr, ROWS: constexpr, KEYS: constexpr,
):  # fmt: skip
    """A tile of ROWS queries of one head against every tile of KEYS keys that it may see."""
    b, h = tl.program_id(1) // heads, tl.program_id(1) % heads
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    keys, columns = tl.arange(0, KEYS), tl.arange(0, D)
    Q += b.to(tl.int64) * q_b + h * q_h
    K += b.to(tl.int64) * k_b + h // group * k_h
    V += b.to(tl.int64) * v_b + h // group * v_h
    O += b.to(tl.int64) * o_b + h * o_h

    q = tl.load(Q + rows[:, None] * q_row + columns[None, :], mask=rows[:, None] < T, other=0.0)  # (ROWS, D)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    end = tl.minimum(S, (tl.program_id(0) + 1) * ROWS + S - T) if CAUSAL else S
    for start in range(0, end, KEYS):
        here = start + keys
        k = tl.load(K + here[None, :] * k_row + columns[:, None], mask=here[None, :] < S, other=0.0)  # (D, KEYS)
        scores = tl.dot(q, k)  # (ROWS, KEYS)
        seen = here[None, :] < S
        if CAUSAL:
            seen = seen & (here[None, :] <= rows[:, None] + S - T)
        scores = tl.where(seen, scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, 1))
        anchor = tl.where(m_new == float("-inf"), 0.0, m_new * scale)
        P = tl.exp2(scores * scale - anchor[:, None])
        correction = tl.exp2(m * scale - anchor)
        l = l * correction + tl.sum(P, 1)
        v = tl.load(V + here[:, None] * v_row + columns[None, :], mask=here[:, None] < S, other=0.0)  # (KEYS, D)
        acc = tl.dot(P.to(v.dtype), v, acc * correction[:, None])
        m = m_new
    out = acc / tl.where(l > 0.0, l, 1.0)[:, None]
    tl.store(O + rows[:, None] * o_row + columns[None, :], out.to(O.dtype.element_ty), mask=rows[:, None] < T)


def flash_attention_in_triton(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None
) -> Tensor:
    """softmax(q k^T scale) v by the kernel above, the forward alone.

    Args:
        q: (batch, heads, T, head_dim) bfloat16 or float16 on an NVIDIA GPU; head_dim one of 16, 32, 64, 128.
        k, v: (batch, kv_heads, S, head_dim).
        causal: a query sees no later key; the last query sees the last key.
        scale: of the scores, head_dim ** -0.5 if not given; greater than 0.

    Returns:
        out, of q's shape and dtype; a row that sees no key is zero.

    Raises:
        ValueError: the inputs break the contract, or are none that this kernel takes.
        RuntimeError: Triton or an NVIDIA GPU is missing; the message says which.
    """
    check_inputs(q, k, v)
    if reason := refusal():
        raise RuntimeError(reason)
    scale = float(score_scale(scale, q.shape[-1]))
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"this kernel takes bfloat16 and float16, got {q.dtype}")
    if q.shape[-1] not in HEAD_DIMS or v.shape[-1] != q.shape[-1]:
        raise ValueError(f"this kernel takes a head_dim of {HEAD_DIMS}, the same for q and v, got {q.shape[-1]}")
    if scale <= 0:
        raise ValueError(f"this kernel takes a scale above 0, got {scale}")
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if q.numel() == 0 or k.numel() == 0:
        return out.zero_()
    batch, heads, T, d = q.shape
    strides = [x.stride(i) for x in (q, k, v, out) for i in range(3)]
    rows, keys = 128, 128 if d <= 64 else 64  # the tiles of step 3, for four warps
    grid = (math.ceil(T / rows), batch * heads)
    compiled()[grid](
        q, k, v, out, scale * LOG2E, heads, heads // k.shape[1], T, k.shape[2], *strides,
        CAUSAL=causal, D=d, ROWS=rows, KEYS=keys, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


@cache
def compiled():
    """The kernel as Triton launches it; it is compiled for each data type and head_dim at the first call."""
    return triton.jit(forward_kernel)


def refusal() -> str | None:
    """Why the kernel cannot run here, or None if it can."""
    if not torch.cuda.is_available():
        return "Triton compiles for GPUs, and torch sees none here"
    if triton is None:
        return "Triton is not installed here; it comes with the CUDA builds of torch"
    return None
