"""What holds the parts of a GPT together: the weights, the blocks, and the loop that writes."""

import random
from itertools import pairwise
from operator import itemgetter

import regex
import torch
from safetensors.torch import load_file
from torch import Tensor

from tformer_lib import pretrained
from tformer_lib.teaching.my_gpt.book import (
    attend,
    causal,
    draw,
    encode,
    rms_norm,
    split_heads,
    temperature,
    top_p,
)

LAYERS, HEADS, EPSILON, ROPE_BASE = 4, 8, 1e-5, 10_000.0


def load_weights(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The weights of the book's model, by the names that they have in its file."""
    tensors = load_file(pretrained.folder("stories") / "model.safetensors")
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def learned_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges in the order in which they were learned, from the numbers of the tokens that they made."""
    merges = []
    for token, rank in sorted(ranks.items(), key=itemgetter(1)):
        cut = [bytes([byte]) for byte in token]
        while len(cut) > 2:
            numbers = [ranks.get(left + right, rank) for left, right in pairwise(cut)]
            place = numbers.index(min(numbers))
            cut[place : place + 2] = [cut[place] + cut[place + 1]]
        if len(cut) == 2:
            merges.append(tuple(cut))
    return merges


class Tokens:
    """From a text to numbers, by ``encode``, and back."""

    def __init__(self):
        _, encoding = pretrained.load("stories")
        self.ranks, self.pattern, self.end = encoding._mergeable_ranks, encoding._pat_str, encoding.eot_token
        self.merges, self.decode = learned_merges(self.ranks), encoding.decode

    def numbers(self, text: str) -> list[int]:
        """The numbers of a story's beginning: the end of the story before it comes first."""
        words = [word.encode() for word in regex.findall(self.pattern, text)]
        return [self.end, *(self.ranks[token] for word in words for token in encode(word, self.merges))]


def rotate(x: Tensor) -> Tensor:
    """RoPE, which chapter 8 explains: each pair of numbers is turned by an angle that grows with the position.

    x: (batch, heads, T, head_dim) to the same. The angles are float32 in every model, as they were in training.
    """
    T, half = x.shape[2], x.shape[3] // 2
    speeds = 1.0 / ROPE_BASE ** (torch.arange(half) / half)  # (head_dim / 2,)
    angles = torch.arange(T)[:, None] * speeds  # (T, head_dim / 2)
    first, second = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def gpt(ids: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """The logits of the token after each one: ids (batch, T) int64 -> (batch, T, vocab_size)."""
    T, table = ids.shape[1], weights["embedding.tokens.weight"]
    x = table[ids]  # (batch, T, width)
    for layer in range(LAYERS):
        part = {name.removeprefix(f"stack.blocks.{layer}."): tensor for name, tensor in weights.items()}
        h = rms_norm(x, part["attention_norm.weight"], EPSILON)
        q, k, v = (split_heads(h @ part[f"attention.{name}_proj.weight"].T, HEADS) for name in "qkv")
        found = attend(rotate(q), rotate(k), v, causal(T, T))  # (batch, heads, T, head_dim)
        x = x + found.transpose(1, 2).flatten(2) @ part["attention.out_proj.weight"].T
        h = rms_norm(x, part["feed_forward_norm.weight"], EPSILON)
        gate = torch.nn.functional.silu(h @ part["feed_forward.gate.weight"].T)
        x = x + (gate * (h @ part["feed_forward.up.weight"].T)) @ part["feed_forward.down.weight"].T
    return rms_norm(x, weights["stack.final_norm.weight"], EPSILON) @ table.T


def write(prompt: str, *, count: int = 80, warmth: float = 0.8, p: float = 0.95, seed: int = 0) -> str:
    """Go on with a story, for at most ``count`` tokens; returns all of it.

    Args:
        prompt: how the story begins.
        count: the most tokens to write.
        warmth: the temperature.
        p: of top-p.
        seed: of the random numbers.
    """
    tokens, weights, uniform = Tokens(), load_weights(), random.Random(seed)
    numbers = tokens.numbers(prompt)
    for _ in range(count):
        logits = gpt(torch.tensor([numbers]), weights)[0, -1]  # (vocab_size,)
        chosen = int(draw(top_p(temperature(logits, warmth), p).double(), uniform.random()))
        if chosen == tokens.end:
            break
        numbers.append(chosen)
    return tokens.decode(numbers[1:])


if __name__ == "__main__":
    print(write("Once, Lily"))
