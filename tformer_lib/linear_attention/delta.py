"""The delta rule: a token corrects what the state answers to its key, instead of adding to it.

    S_t = a_t·(I - β_t k_t k_tᵀ)·S_{t-1} + β_t k_t v_tᵀ = a_t·S_{t-1} + k_t u_tᵀ,   u_t = β_t (v_t - a_t·k_tᵀ S_{t-1})

is one step of gradient descent, of size β_t, on |Sᵀ k_t - v_t|²/2 (Schlag et al. 2021). The gate a_t = exp(g_t), at
most 1, lets the state forget as well: the gated delta rule (Yang, Kautz and Hatamizadeh 2025). Qwen3-Next has a gate
per head. Kimi Linear has a gate per feature, which multiplies the rows of S_{t-1} before the correction.

What token t writes, u_t, depends on what the tokens before it wrote. Within a chunk that is one triangular system, so a
chunk is matrix products again (the WY representation and the UT transform of Yang et al. 2024).
"""

from functools import partial

import torch
from torch import Tensor

from tformer_lib.contract import in_named_dtypes
from tformer_lib.linear_attention.decay import decay, decayed_scores, default_chunk, fits, gated_inputs
from tformer_lib.linear_attention.shared import by_kv_head, by_sequence, chunks, first_state, join, read


@in_named_dtypes
def delta_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    chunk: int | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``delta_attend`` chunk by chunk: matrix products inside a chunk, one state between chunks.

    Args:
        chunk: tokens per chunk; None is 64, or 16 with a gate per feature. The others are those of ``delta_attend``.
    """
    inputs = delta_inputs(q, k, v, beta, log_decay, scale)
    chunk = default_chunk(inputs[-1]) if chunk is None else chunk
    out, state = by_sequence(partial(scan_delta, chunk=chunk), cu_seqlens, initial_state, *inputs)
    return (out.to(q.dtype), state) if return_state else out.to(q.dtype)


@in_named_dtypes
def delta_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``delta_attend`` as the recurrence that defines it, one token at a time; arguments and errors are the same."""
    inputs = delta_inputs(q, k, v, beta, log_decay, scale)
    out, state = by_sequence(step_delta, cu_seqlens, initial_state, *inputs)
    return (out.to(q.dtype), state) if return_state else out.to(q.dtype)


def scan_delta(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gates: Tensor, initial: Tensor | None, *, chunk: int
) -> tuple[Tensor, Tensor]:
    """The outputs (batch, heads, T, value_dim) and the last state, chunk by chunk.

    Let S be the state before a chunk and G the running sum of its gates. Row i of what the chunk writes is

        u_i = β_i (v_i - exp(G_i) k_iᵀ S - Σ_{j<i} exp(G_i - G_j) k_iᵀ k_j u_j),

    so (I + A) U = diag(β) (V - exp(G) K S), with A_ij = β_i exp(G_i - G_j) k_iᵀ k_j below the diagonal. With U for V
    the chunk is a decaying sum.

    Args:
        q: (batch, heads, T, head_dim), scaled.
        k, v: (batch, kv_heads, T, ...).
        beta: (batch, kv_heads, T, 1).
        gates: (batch, kv_heads, T, 1 or head_dim) in float64.
        initial: (batch, kv_heads, head_dim, value_dim), or None for zeros.
        chunk: tokens per chunk.
    """
    q_g, state = by_kv_head(q, k), first_state(initial, k, v.shape[3])
    outputs = []
    for now in chunks(k.shape[2], chunk):
        q_c, k_c, v_c, beta_c = q_g[:, :, :, now], k[:, :, now], v[:, :, now], beta[:, :, now]
        since = gates[:, :, now].cumsum(2)  # (batch, kv_heads, C, 1 or head_dim): log decay from the chunk's start
        kept = decay(since, k_c)
        A = beta_c * decayed_scores(k_c.unsqueeze(2), k_c, since).squeeze(2)  # (batch, kv_heads, C, C)
        wanted = beta_c * (v_c - (k_c * kept) @ state)
        # The solver reads below the diagonal alone, and takes the diagonal for ones.
        U = torch.linalg.solve_triangular(A, wanted, upper=False, unitriangular=True)  # (batch, kv_heads, C, value_dim)
        within = decayed_scores(q_c, k_c, since)
        inside = (within.flatten(2, 3) @ U).unflatten(2, within.shape[2:4])
        outputs.append(read(q_c * kept.unsqueeze(2), state) + inside)
        total = since[:, :, -1:]
        state = decay(total, k_c).mT * state + (k_c * decay(total - since, k_c)).mT @ U
    return join(outputs, q_g, v).flatten(1, 2), state


def step_delta(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gates: Tensor, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``scan_delta`` token by token: forget, correct, read."""
    q_g, state = by_kv_head(q, k), first_state(initial, k, v.shape[3])
    outputs = []
    for t in range(k.shape[2]):
        now = slice(t, t + 1)
        k_t = k[:, :, now]
        state = decay(gates[:, :, now], k).mT * state
        state = state + k_t.mT @ (beta[:, :, now] * (v[:, :, now] - k_t @ state))
        outputs.append(read(q_g[:, :, :, now], state))
    return join(outputs, q_g, v).flatten(1, 2), state


def delta_inputs(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, scale: float | None
) -> tuple[Tensor, ...]:
    """q·scale, k, v, β (batch, kv_heads, T, 1) and gates (batch, kv_heads, T, 1 or head_dim), checked."""
    log_decay = q.new_zeros(1, 1, 1, 1) if log_decay is None else log_decay
    q_s, k, v, gates = gated_inputs(q, k, v, log_decay, scale)
    check_beta(beta, k)
    return q_s, k, v, beta.to(k).expand(*k.shape[:3], 1), gates


def check_beta(beta: Tensor, k: Tensor) -> None:
    """Refuse step sizes that do not broadcast to a number a token of k (batch, kv_heads, T, head_dim)."""
    if not isinstance(beta, Tensor):
        raise ValueError(f"beta must be a tensor of 4 dimensions, got {type(beta).__name__}")
    if not fits(beta, (*k.shape[:3], 1)):
        expected = f"(batch, kv_heads, T, 1) = {(*k.shape[:3], 1)}"
        raise ValueError(f"beta must have 4 dimensions that broadcast to {expected}, got {tuple(beta.shape)}")
