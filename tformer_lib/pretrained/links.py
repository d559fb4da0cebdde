"""Links between our parameters and the tensors of a checkpoint, which can be walked both ways."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = Sequence[Tensor]


def as_they_are(*tensors: Tensor) -> Tensors:
    """Nothing changes."""
    return tensors


@dataclass(frozen=True)
class Link:
    """Some of our parameters, and the tensors of a checkpoint that hold the same numbers.

    Attributes:
        ours, theirs: names.
        read: their tensors to ours.
        write: ours to theirs. What it makes of tensors without numbers says which shapes a file must have.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    read: Callable[..., Tensors] = as_they_are
    write: Callable[..., Tensors] = as_they_are


def same(ours: str, theirs: str) -> Link:
    """One tensor that both have."""
    return Link((ours,), (theirs,))


def transposed(ours: str, theirs: str) -> Link:
    """A matrix that they hold as (in, out) and we as (out, in)."""

    def flip(x: Tensor) -> Tensors:
        return (x.mT,)

    return Link((ours,), (theirs,), flip, flip)


def stacked(ours: str, theirs: Sequence[str]) -> Link:
    """A tensor of ours, whose first dimension counts what they hold apart."""

    def read(*parts: Tensor) -> Tensors:
        return (torch.stack(parts),)

    def write(x: Tensor) -> Tensors:
        return x.unbind()

    return Link((ours,), tuple(theirs), read, write)
