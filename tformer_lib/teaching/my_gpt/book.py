"""The book's own answers to the exercises that are parts of a GPT, each complete in itself."""

from itertools import pairwise

import torch
from torch import Tensor


def encode(word: bytes, merges: list[tuple[bytes, bytes]]) -> list[bytes]:
    """A word into tokens: of the pairs in it, the one that was learned first is merged, until none is left."""
    order = {pair: i for i, pair in enumerate(merges)}
    cut = [bytes([byte]) for byte in word]
    while known := [pair for pair in pairwise(cut) if pair in order]:
        left, right = min(known, key=order.get)
        place = next(i for i, pair in enumerate(pairwise(cut)) if pair == (left, right))
        cut[place : place + 2] = [left + right]
    return cut


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(batch, T, heads * head_dim) -> (batch, heads, T, head_dim)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def causal(T: int, S: int) -> Tensor:
    """(T, S) boolean, True where a query may look; the last query stands on the last key."""
    return torch.arange(S) <= torch.arange(S - T, S)[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """(batch, heads, T, d), twice (batch, heads, S, d), (T, S) boolean -> q's shape."""
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5  # (batch, heads, T, S)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return weights.masked_fill(~mask, 0.0) @ v


def rms_norm(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """Each token divided by its root mean square, times the gain: (batch, T, width) to the same."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * gain


def temperature(logits: Tensor, temperature: float) -> Tensor:
    """logits (vocab_size,) -> probabilities (vocab_size,)."""
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(), len(logits)).double()
    return (logits / temperature).softmax(-1)


def top_p(probabilities: Tensor, p: float) -> Tensor:
    """(vocab_size,) -> (vocab_size,): 0 for the tokens that are dropped."""
    ordered, order = probabilities.sort(descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = torch.zeros_like(probabilities)
    kept[order] = torch.where(before < p, ordered, 0.0)
    return kept / kept.sum()


def draw(probabilities: Tensor, u: float) -> int:
    """probabilities (vocab_size,) float64 and a number in [0, 1) -> the number of a token."""
    return int((probabilities.cumsum(-1) <= u).sum())
