"""The public forms: one function for each kind of state, which takes the fastest step of its ladder."""

from torch import Tensor
from torch.nn import functional as F

from tformer_lib.contract import check_inputs, in_named_dtypes, score_scale
from tformer_lib.linear_attention.decay import check_gated, gated_chunked
from tformer_lib.linear_attention.delta import check_beta, delta_chunked
from tformer_lib.linear_attention.feature_maps import FeatureMap, elu_plus_one
from tformer_lib.linear_attention.kernels import MAPS
from tformer_lib.linear_attention.operator import kernel_wanted, run
from tformer_lib.linear_attention.shared import CHUNK
from tformer_lib.linear_attention.sums import associative, chunked, features, positive_scale


@in_named_dtypes
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    feature_map: FeatureMap = elu_plus_one,
    normalised: bool = True,
    chunk: int = CHUNK,
    step: int | str | None = None,
) -> Tensor:
    """Linear attention under the contract, in O(T + S) time and memory: chunked if causal, else by associativity.

    Args:
        q: (batch, heads, T, head_dim).
        k: (batch, kv_heads, S, head_dim).
        v: (batch, kv_heads, S, value_dim).
        mask: key padding alone: boolean, broadcastable to (batch, 1, 1, S), True where a key may be seen.
        causal: aligned to the bottom right.
        scale: q·k is multiplied by it (its root goes to each side before the feature map); None is head_dim ** -0.5,
            as in softmax attention. Katharopoulos et al. use 1.
        feature_map: (..., head_dim) -> (..., features), with no negative inner product where the output is normalised.
        normalised: divide by the sum of the weights; without it the output is Σ_s φ(q_t)·φ(k_s) v_s.
        chunk: tokens per chunk in the causal case; the kernels' chunks are 64 tokens.
        step: which implementation of the causal case, see ``kernels``; the fastest that can do it if None. On a GPU
            that is a kernel for the feature maps ``elu_plus_one`` and ``relu``; a mask or another map takes step 0.

    Returns:
        (batch, heads, T, value_dim) in q's dtype; zeros for a query whose weights are all zero.

    Raises:
        ValueError: if the inputs break the contract, the mask depends on the query or the head, or the step cannot do
            what is asked.
    """
    options = {"mask": mask, "scale": scale, "feature_map": feature_map, "normalised": normalised}
    if not causal:
        return associative(q, k, v, **options)
    if goes_to_kernels(q, mask, feature_map, step):
        out, _ = sum_by_kernels(q, k, v, scale, feature_map, normalised, step=step)
        return out
    return chunked(q, k, v, chunk=chunk, **options)


@in_named_dtypes
def gated_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor,
    scale: float | None = None,
    chunk: int | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    step: int | str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal linear attention whose state forgets: S_t = exp(g_t)·S_{t-1} + k_t v_tᵀ, o_t = scale·q_t S_t.

    With g constant per head it is RetNet's retention, with a gate per token and feature GLA's, with a gate per token
    and head the duality of Mamba-2: there q, k, v are called C, B, x. There is no feature map and no denominator; a
    norm follows in those models.

    Args:
        q: (batch, heads, T, head_dim).
        k: (batch, kv_heads, T, head_dim).
        v: (batch, kv_heads, T, value_dim).
        log_decay: g, at most 0, broadcastable to (batch, kv_heads, T, head_dim). Last dimension 1 is cheaper.
            Below ``FORGET`` it counts as ``FORGET``, which empties the state; so -inf starts a new document.
        scale: None is head_dim ** -0.5.
        chunk: tokens per chunk of step 0; None is 64, or 16 with a gate per feature.
        initial_state: the state before the first token, (batch, kv_heads, head_dim, value_dim); None is zeros.
        return_state: return the state after the last token too.
        cu_seqlens: (sequences + 1,) int32: the batch is one row, in which sequence i begins at token cu_seqlens[i].
            There is then a state a sequence.
        max_seqlen: the length of the longest of them; read from ``cu_seqlens`` if None, which waits for a GPU.
        step: which implementation, see ``kernels``; the fastest that can do it if None. A gate per feature is step 0's.

    Returns:
        (batch, heads, T, value_dim) in q's dtype, and with ``return_state`` the state, in float32 (float64).

    Raises:
        ValueError: if the inputs break the contract, T is not S, or a decay is over 0 or of another shape.
    """
    if kernel_wanted(q, step) and log_decay_is_scalar(log_decay):
        check_gated(q, k, v, log_decay)
        scale = score_scale(scale, q.shape[3])
        options = {"initial_state": initial_state, "cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen, "step": step}
        out, state = run(q, k, v, log_decay=log_decay, scale=scale, **options)
    else:
        refuse_step(step)
        options = {"initial_state": initial_state, "cu_seqlens": cu_seqlens, "return_state": True}
        out, state = gated_chunked(q, k, v, log_decay=log_decay, scale=scale, chunk=chunk, **options)
    return (out, state) if return_state else out


@in_named_dtypes
def delta_attend(
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
    max_seqlen: int | None = None,
    step: int | str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal linear attention by the (gated) delta rule, o_t = scale·q_t S_t.

    Args:
        q: (batch, heads, T, head_dim).
        k: (batch, kv_heads, T, head_dim). The models that use the rule give its rows unit length: with β |k|² over 2
            the state grows without bound.
        v: (batch, kv_heads, T, value_dim).
        beta: step sizes, broadcastable to (batch, kv_heads, T, 1).
        log_decay: g, at most 0, broadcastable to (batch, kv_heads, T, head_dim); None is 0, the rule without gates.
            A last dimension of 1 is cheaper. -inf starts a new document.
        scale, chunk, initial_state, return_state, cu_seqlens, max_seqlen, step: as in ``gated_attend``.

    Returns:
        (batch, heads, T, value_dim) in q's dtype, and with ``return_state`` the state, in float32 (float64).

    Raises:
        ValueError: if the inputs break the contract, T is not S, or a gate or step size is of another shape.
    """
    if kernel_wanted(q, step) and (log_decay is None or log_decay_is_scalar(log_decay)):
        check_gated(q, k, v, q.new_zeros(1, 1, 1, 1) if log_decay is None else log_decay)
        check_beta(beta, k)
        scale = score_scale(scale, q.shape[3])
        options = {"initial_state": initial_state, "cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen, "step": step}
        out, state = run(q, k, v, log_decay=log_decay, beta=beta, scale=scale, **options)
    else:
        refuse_step(step)
        options = {"initial_state": initial_state, "cu_seqlens": cu_seqlens, "return_state": True}
        out, state = delta_chunked(q, k, v, beta=beta, log_decay=log_decay, scale=scale, chunk=chunk, **options)
    return (out, state) if return_state else out


def goes_to_kernels(q: Tensor, mask: Tensor | None, feature_map: FeatureMap, step: int | str | None) -> bool:
    """Whether the causal sum runs by the operator, whose feature maps are few and which hides no keys."""
    able = mask is None and feature_map in MAPS
    if not able:
        refuse_step(step)
    return able and kernel_wanted(q, step)


def sum_by_kernels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    feature_map: FeatureMap,
    normalised: bool,
    *,
    initial_state: Tensor | None = None,
    step: int | str | None = None,
) -> tuple[Tensor, Tensor]:
    """The causal sum by the operator: (out, last state)."""
    check_inputs(q, k, v)
    prefix = k.shape[2] - q.shape[2]
    root = positive_scale(q, scale) ** 0.5
    if prefix > 0:  # keys that every query sees
        _, phi_k, values = features(q, k[:, :, :prefix], v[:, :, :prefix], scale, feature_map, normalised)
        initial_state = phi_k.mT @ values
    first = max(0, -prefix)  # queries that see no key
    options = {"normalised": normalised, "initial_state": initial_state, "step": step}
    new = slice(max(0, prefix), None)
    out, state = run(q[:, :, first:], k[:, :, new], v[:, :, new], feature_map=feature_map, map_scale=root, **options)
    return F.pad(out, (0, 0, first, 0)), state


def log_decay_is_scalar(log_decay: Tensor) -> bool:
    """Whether there is one gate a token and head, as the kernels take it."""
    return isinstance(log_decay, Tensor) and log_decay.dim() == 4 and log_decay.shape[3] == 1


def refuse_step(step: int | str | None) -> None:
    """Refuse a kernel where only step 0 can do what is asked."""
    if step not in (None, 0, "0"):
        raise ValueError(
            f"step {step} cannot do this: it takes causal sums without a mask, gates per head, elu + 1 or relu"
        )
