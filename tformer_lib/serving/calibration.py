"""The scales of float8 pools, from what a model makes of some texts."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from tformer_lib.attention import attend_sdpa
from tformer_lib.ladder import FP8
from tformer_lib.transformer import evaluating


class Watch:
    """A cache, as ``Decoder.forward`` sees it, that keeps nothing but the largest magnitudes."""

    def __init__(self, device: torch.device):
        self.device = device
        self.keys = self.values = 0.0

    def positions(self, T: int) -> Tensor:
        """(1, T) int64: a text from its beginning."""
        return torch.arange(T, device=self.device)[None]

    def layer(self, index: int) -> "Watch":
        """One for all layers."""
        return self

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, attend=None, mask: Tensor | None = None) -> Tensor:
        """Causal attention over the pass itself."""
        self.keys = max(self.keys, k.abs().max().item())
        self.values = max(self.values, v.abs().max().item())
        return attend_sdpa(q, k, v, causal=True)

    def advance(self, T: int) -> None:
        """Nothing to count."""


@torch.no_grad()
def calibrate(model: nn.Module, texts: Iterable[Sequence[int]], *, margin: float = 2.0) -> tuple[float, float]:
    """Scales for ``Engine(kv_dtype="float8", kv_scales=...)``: what keys and what values are divided by.

    The largest magnitude that was seen, times the margin, becomes float8's largest number, 448. One scale serves all
    layers: a floating-point number has the same relative precision, 1 / 16, over 15 powers of two, so a scale needs to
    be right only so far that little is cut off at the top and little underflows (Micikevicius et al. 2022,
    arXiv:2209.05433).

    Args:
        model: a ``Decoder``.
        texts: tokens like those that will be served.
        margin: how much larger than here keys and values may become before they are cut off.

    Returns:
        the scales of keys and of values.

    Raises:
        ValueError: there is no text, or what it makes is not finite.
    """
    watch = Watch(next(model.parameters()).device)
    with evaluating(model):
        for text in texts:
            model(torch.tensor([list(text)], device=watch.device), cache=watch)
    if not (0 < watch.keys < float("inf") and 0 < watch.values < float("inf")):
        raise ValueError(f"there is nothing to calibrate by: the largest key is {watch.keys}, value {watch.values}")
    most = torch.finfo(FP8).max
    return margin * watch.keys / most, margin * watch.values / most
