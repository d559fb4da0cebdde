"""The decoder-only model, which predicts each next token from those before it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tformer_lib import positional_encoding, profiling
from tformer_lib.transformer.blocks import Embedding, Stack, initialise
from tformer_lib.transformer.config import ModelConfig, make_rope


class Decoder(nn.Module):
    """The decoder-only model: predicts each next token from those before it.

    Args:
        config: what it is made of.
        attend: an attention function under the contract, instead of the one that the config names.
    """

    def __init__(self, config: ModelConfig, *, attend: Callable | None = None):
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        self.stack = Stack(config, attend=attend)
        self.unembedding = nn.Linear(config.width, config.vocab_size, bias=False)
        self.rope = make_rope(config)
        initialise(self, config)
        if config.tie_embeddings:
            self.unembedding.weight = self.embedding.tokens.weight

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache=None,
        only: Tensor | None = None,
    ) -> Tensor:
        """The logits of the token after each one.

        Args:
            tokens: (batch, T) int64.
            positions: (T,) or (batch, T) int64, the place of each token; by default 0, 1, ... or what the cache says.
            mask: boolean, broadcastable to (batch, heads, T, T), on top of the causal mask.
            cache: a KV cache; T new tokens are appended to what it holds.
            only: (n,) int64, the places along T whose logits are wanted; all if not given. A server that reads a
                prompt needs those of its last token alone, and the vocabulary is the widest matrix.

        Returns:
            (batch, T, vocab_size), or (batch, n, vocab_size) with ``only``.

        Raises:
            ValueError: if ``tokens`` has another shape or dtype, or a token is outside the vocabulary or too far along
                for the model.
        """
        if positions is None and cache is not None:
            positions = cache.positions(tokens.shape[1])
        with profiling.range("embed"):
            x = self.embedding(tokens, positions)  # (batch, T, width)
        bias = self.score_bias(tokens.shape[1], cache)
        x = self.stack(x, mask=mask, causal=True, bias=bias, rotate=self.rotation(tokens, positions), cache=cache)
        if cache is not None:
            cache.advance(tokens.shape[1])
        with profiling.range("unembed"):
            return self.unembedding(x if only is None else x[:, only])  # (batch, T or n, vocab_size)

    def rotation(self, tokens: Tensor, positions: Tensor | None) -> Callable[[Tensor], Tensor] | None:
        """RoPE's rotation at these positions, worked out once for all layers, if the config asks for it."""
        if self.rope is None:
            return None
        return self.rope.at(torch.arange(tokens.shape[1], device=tokens.device) if positions is None else positions)

    def score_bias(self, length: int, cache) -> Tensor | None:
        """ALiBi's bias, (heads, T, T), if the config asks for it."""
        if self.config.positions != "alibi":
            return None
        if cache is not None:
            raise ValueError("a model with ALiBi runs without a cache: its bias needs the place of every key")
        return positional_encoding.alibi(self.config.heads, length, device=self.unembedding.weight.device)


def count_parameters(model: nn.Module) -> int:
    """How many numbers the model learns; a tied table counts once."""
    return sum(p.numel() for p in model.parameters())
