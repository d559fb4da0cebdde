"""The public door of flash attention: checks what comes in, and calls the operator."""

import torch
from torch import Tensor

from tformer_lib.contract import check_inputs, score_scale
from tformer_lib.flash_attention import operators  # noqa: F401 (registers torch.ops.tformer_lab.flash_attention)
from tformer_lib.flash_attention.checks import check_options, check_packed
from tformer_lib.flash_attention.kernels import LADDER
from tformer_lib.ladder import check_no_tangent


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
        NotImplementedError: a forward-mode derivative is asked for, which no step has.
        tformer_lib.jit.BuildError: the step's kernel cannot be built here; the message says what to install.

    A kernel reads q, k and v where they lie, by their strides. The tensor-core steps load 16 bytes at a time: a tensor
    whose columns are not adjacent or whose rows are not 16-byte aligned is copied first.
    """
    check_inputs(q, k, v, mask)
    check_options(q, v, window)
    check_no_tangent("flash attention", q, k, v, instead="attention.attend")
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
        float(score_scale(scale, q.shape[-1])),
        LADDER.name(step),
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
    checked: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of several sequences packed end to end, each over its own keys alone.

    Args:
        q: (total_q, heads, head_dim).
        k, v: (total_k, kv_heads, head_dim).
        cu_seqlens_q: (batch + 1,) int32, where each sequence's queries begin; the last entry is total_q.
        cu_seqlens_k: (batch + 1,) int32, the same of the keys. A sequence may be empty.
        max_seqlen_q, max_seqlen_k: the longest lengths; read from the tensors if not given, which waits for the GPU.
            What these four say is checked on a CPU; on a GPU that would wait for it, so there they are believed.
        checked: check them on a GPU too.

    Returns:
        out (total_q, heads, head_dim), and with ``return_lse`` lse (heads, total_q). The other arguments, and what is
        raised, are those of :func:`flash_attention`.
    """
    check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k)
    q4, k4, v4 = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # (total, heads, d) -> (1, heads, total, d)
    check_inputs(q4, k4, v4)
    check_options(q4, v4, window)
    check_no_tangent("flash attention", q, k, v, instead="attention.attend")
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
        float(score_scale(scale, q.shape[-1])),
        LADDER.name(step),
        is_deterministic(deterministic),
        checked,
    )
    out, lse = out[0].transpose(0, 1), lse[0]  # (total_q, heads, d), (heads, total_q)
    return (out, lse) if return_lse else out


def longest(cu_seqlens: Tensor) -> int:
    """The length of the longest packed sequence."""
    return int(cu_seqlens.diff().max()) if cu_seqlens.shape[0] > 1 else 0


def is_deterministic(wish: bool | None) -> bool:
    """What the caller wishes, or torch's global setting."""
    return torch.are_deterministic_algorithms_enabled() if wish is None else wish
