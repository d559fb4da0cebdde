"""Weights of 8 bits: each row of a matrix as integers and one scale, a quarter of float32's bytes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST = 127
"""The largest integer that is used: -128 would have no counterpart."""

AT_ONCE = 2**19
"""Numbers of a matrix that are widened at once."""


class Int8Linear(nn.Module):
    """A linear map whose matrix is kept in 8 bits: (..., in) -> (..., out).

    Each output has a scale of its own, so that one large row costs the others no precision. The matrix is widened to
    the dtype of x when it is used: this form saves memory, not time, and it is not trained.

    Args:
        linear: the map whose sizes and bias it takes over.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        device = linear.weight.device
        self.register_buffer("weight", torch.zeros(linear.weight.shape, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.ones(linear.out_features, device=device))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in)."""
        y = (F.linear(x, self.weight.to(x.dtype)) * self.scale).to(x.dtype)
        return y if self.bias is None else y + self.bias


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Integers and scales whose products are nearest to a matrix.

    Args:
        weight: (out, in), finite.

    Returns:
        (out, in) int8, from -127 to 127, and (out,) float32. No number is further than half its row's scale from what
        it was.

    Raises:
        ValueError: a number is not finite, so that its row has no scale.
    """
    numbers = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), device=weight.device)
    rows = max(1, AT_ONCE // weight.shape[1])
    for start in range(0, len(weight), rows):
        here = slice(start, start + rows)
        part = weight[here].to(torch.float32, copy=True)  # a copy of few rows: loading takes little more memory
        largest = torch.maximum(part.amax(dim=1), -part.amin(dim=1)) / LARGEST  # of a row with a NaN it is NaN
        if not largest.isfinite().all():
            raise ValueError("a weight is NaN or infinite: it has no place among integers")
        scale[here] = torch.where(largest > 0, largest, 1.0)  # 1 for a row of zeros
        numbers[here] = part.div_(scale[here, None]).round_()
    return numbers, scale


def make_room(model: nn.Module) -> set[str]:
    """Put an :class:`Int8Linear` in the place of every linear map of the blocks; embeddings and experts stay.

    Returns:
        The names of their matrices.
    """
    found = [(name, part) for name, part in model.stack.named_modules() if type(part) is nn.Linear]
    for name, linear in found:
        parent, _, last = name.rpartition(".")
        setattr(model.stack.get_submodule(parent), last, Int8Linear(linear))
    return {f"stack.{name}.weight" for name, _ in found}


@torch.no_grad()
def quantise(model: nn.Module) -> nn.Module:
    """The model with the linear maps of its blocks in 8 bits, changed in place and returned."""
    weights = {name: p for name, p in model.named_parameters() if name.startswith("stack.")}
    for name in make_room(model):
        linear = model.get_submodule(name.removesuffix(".weight"))
        linear.weight, linear.scale = quantise_rows(weights[name])
    return model
