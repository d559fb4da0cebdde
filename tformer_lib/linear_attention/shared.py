"""What the forms of linear attention share: products in groups of heads, chunks, packed sequences."""

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

CHUNK = 64  # near head_dim, where the work inside a chunk (C·d) and between chunks (d·d) balance


def sum_dtype(x: Tensor) -> torch.dtype:
    """The dtype of features and running sums: float32, or float64 for float64 inputs."""
    return torch.promote_types(x.dtype, torch.float32)


def scores(phi_q: Tensor, phi_k: Tensor) -> Tensor:
    """φ(q)·φ(k): (batch, kv_heads, group, T, D) and (batch, kv_heads, S, D) -> (batch, kv_heads, group, T, S)."""
    return (phi_q.flatten(2, 3) @ phi_k.mT).unflatten(2, phi_q.shape[2:4])


def read(phi_q: Tensor, sums: Tensor) -> Tensor:
    """Ask a state: (batch, kv_heads, group, T, D) and (batch, kv_heads, D, e) -> (batch, kv_heads, group, T, e)."""
    return (phi_q.flatten(2, 3) @ sums).unflatten(2, phi_q.shape[2:4])


def join(outputs: list[Tensor], phi_q: Tensor, v_one: Tensor) -> Tensor:
    """Concatenate outputs along T; with no token at all, an empty tensor of the right shape."""
    return torch.cat(outputs, dim=3) if outputs else phi_q.new_zeros(*phi_q.shape[:4], v_one.shape[-1])


def causal_mask(T: int, S: int, device: torch.device) -> Tensor:
    """(T, S), True where a query may look, the last query seeing the last key."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def chunks(T: int, chunk: int) -> Iterator[slice]:
    """Cut T tokens into chunks; the last may be short."""
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    return (slice(start, start + chunk) for start in range(0, T, chunk))


def first_state(initial: Tensor | None, k: Tensor, value_dim: int) -> Tensor:
    """The state before the first token (batch, kv_heads, features, value_dim): the one that was given, else zeros.

    Args:
        k: (batch, kv_heads, T, features), in the dtype of the sums.
    """
    if initial is None:
        return k.new_zeros(*k.shape[:2], k.shape[3], value_dim)
    check_state(initial, k, value_dim)
    return initial.to(k.dtype)


def check_state(state: Tensor, k: Tensor, value_dim: int, sequences: int | None = None) -> None:
    """Refuse a state that does not fit the keys (batch, kv_heads, T, features), of other sequences than its own too."""
    shape = (k.shape[0] if sequences is None else sequences, k.shape[1], k.shape[3], value_dim)
    if tuple(state.shape) != shape:
        raise ValueError(f"the state must be (batch, kv_heads, features, values) = {shape}, got {tuple(state.shape)}")
    if state.device != k.device:
        raise ValueError(f"the state is on {state.device}, the new tokens are on {k.device}")


def by_kv_head(q: Tensor, k: Tensor) -> Tensor:
    """(batch, heads, T, d) -> (batch, kv_heads, group, T, d): the query heads of each kv head of k."""
    return q.unflatten(1, (k.shape[1], -1))


def by_sequence(
    form: Callable, cu_seqlens: Tensor | None, initial: Tensor | None, *by_token: Tensor
) -> tuple[Tensor, Tensor]:
    """``form(*by_token, initial) -> (out, state)``, or where ``cu_seqlens`` is given the same of each sequence.

    Args:
        form: takes tensors (batch, heads, T, width) and a state or None.
        cu_seqlens: None, or (sequences + 1,) int32: where each sequence begins in the one batch row, and where all end.
        initial: None, or a state for each batch row or sequence: (.., kv_heads, features, value_dim).
        by_token: tensors (batch, heads, T, width).

    Returns:
        out (batch, heads, T, value_dim), and the last state of each batch row or sequence.
    """
    if cu_seqlens is None:
        return form(*by_token, initial)
    starts = check_packing(cu_seqlens, by_token[0])
    if initial is not None and initial.shape[0] != len(starts) - 1:
        raise ValueError(f"expected a state for each sequence: {len(starts) - 1}, got {initial.shape[0]}")
    outs, states = [], []
    for i, (start, stop) in enumerate(pairwise(starts)):
        out, state = form(*(x[:, :, start:stop] for x in by_token), None if initial is None else initial[i : i + 1])
        outs.append(out)
        states.append(state)
    return torch.cat(outs, 2), torch.cat(states)


def check_packing(cu_seqlens: Tensor, x: Tensor) -> list[int]:
    """The entries of ``cu_seqlens``, if they cut x (1, heads, tokens, width) into sequences."""
    check_cu_seqlens(cu_seqlens, x)
    starts = cu_seqlens.tolist()
    if starts[0] != 0 or starts[-1] != x.shape[2] or any(a > b for a, b in pairwise(starts)):
        raise ValueError(f"cu_seqlens must rise from 0 to {x.shape[2]}, got {starts}")
    return starts


def check_cu_seqlens(cu_seqlens: Tensor, x: Tensor) -> None:
    """Refuse what cannot say where sequences begin; its values are not read, since that waits for a GPU."""
    if x.shape[0] != 1:
        raise ValueError(f"packed sequences lie in one batch row, got a batch of {x.shape[0]}")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"cu_seqlens must be (sequences + 1,) int32, got {tuple(cu_seqlens.shape)} of {cu_seqlens.dtype}"
        )
    if cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens must be on the device of q, {x.device}, got {cu_seqlens.device}")
