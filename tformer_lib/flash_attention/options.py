"""What is asked of an attention beside its tensors, and where packed sequences begin."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Options:
    """What is asked of every step.

    Attributes:
        scale: of the scores.
        causal: a query sees no later key; the last query sees the last key.
        window: a query sees its own key and the ``window - 1`` before it, and what ``ahead`` allows; 0: no such bound.
        deterministic: the gradients have the same bits in every run.
        ahead: without ``causal``, how many keys after its own a query sees; -1: all of them.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0: they do not.
        alibi_slopes: (heads,) or (batch, heads) float32: a score loses its head's slope times the distance of the key
            from the query's own, after it was capped.
        bias: (batch or 1, heads or 1, T or 1, S or 1) floating-point: is added to the scores after they were capped.
    """

    scale: float
    causal: bool = False
    window: int = 0
    deterministic: bool = False
    ahead: int = -1
    softcap: float = 0.0
    alibi_slopes: Tensor | None = field(default=None, compare=False)
    bias: Tensor | None = field(default=None, compare=False)

    @property
    def last_ahead(self) -> int:
        """How many keys after its own a query sees: 0 with ``causal``, -1 for all."""
        return 0 if self.causal else self.ahead

    @property
    def modifies_scores(self) -> bool:
        """Whether scores are more than products times the scale."""
        return self.softcap > 0 or self.alibi_slopes is not None or self.bias is not None


@dataclass(frozen=True, slots=True)
class Packing:
    """Where each of several sequences lies that are packed end to end in one batch row.

    Attributes:
        cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32, contiguous: where each sequence's queries and keys begin.
        max_seqlen_q, max_seqlen_k: the longest lengths.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


def options_of(
    causal: bool,
    scale: float,
    window: int | tuple[int | None, int | None] | None,
    *,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    deterministic: bool = False,
) -> Options:
    """What a caller asked for, in the terms that every step knows."""
    keys, ahead = 0, -1
    if isinstance(window, tuple):
        left, right = window
        keys, ahead = 0 if left is None else left + 1, -1 if right is None else right
    elif window is not None:
        keys, ahead = window, 0
    causal = bool(causal or ahead == 0)
    return Options(scale, causal, keys, deterministic, -1 if causal else ahead, softcap or 0.0, alibi_slopes, bias)
