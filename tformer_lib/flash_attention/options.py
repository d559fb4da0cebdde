"""What is asked of an attention beside its tensors, and where packed sequences begin."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Options:
    """What is asked of every step.

    Attributes:
        scale: of the scores.
        causal: a query sees no later key; the last query sees the last key.
        window: a query sees so many keys, its own the last; 0: no window. With a window, causal is True.
        deterministic: the gradients have the same bits in every run.
    """

    scale: float
    causal: bool = False
    window: int = 0
    deterministic: bool = False


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
