"""The decoder-only model, which predicts each next token from those before it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tformer_lib import profiling
from tformer_lib.attention import soft_capped
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
        self.window_rope = make_rope(config, "window") if config.window_rope_base is not None else None
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
        head: "Callable[[Tensor, Decoder], Tensor] | None" = None,
    ) -> Tensor:
        """The logits of the token after each one.

        Args:
            tokens: (batch, T) int64.
            positions: (T,) or (batch, T) int64, the place of each token; by default 0, 1, ... or what the cache says.
            mask: boolean, broadcastable to (batch, heads, T, T), on top of the causal mask.
            cache: a KV cache; T new tokens are appended to what it holds.
            only: (n,) int64, the places along T whose logits are wanted; all if not given. A server that reads a
                prompt needs those of its last token alone, and the vocabulary is the widest matrix.
            head: a function of (what the blocks made of the tokens, (batch, T, width); this model) in place of
                :meth:`unembed`, such as a loss that never holds all logits.

        Returns:
            (batch, T, vocab_size), or (batch, n, vocab_size) with ``only``, or what ``head`` returns.

        Raises:
            ValueError: if ``tokens`` has another shape or dtype, or a token is outside the vocabulary or too far along
                for the model.
        """
        if positions is None and cache is not None:
            positions = cache.positions(tokens.shape[1])
        with profiling.range("embed"):
            x = self.embedding(tokens, positions)  # (batch, T, width)
        x = self.stack(x, mask=mask, causal=True, rotate=self.rotation(tokens, positions), cache=cache)
        if cache is not None:
            cache.advance(tokens.shape[1])
        with profiling.range("unembed"):
            x = x if only is None else x[:, only]
            return self.unembed(x) if head is None else head(x, self)  # (batch, T or n, vocab_size)

    def unembed(self, x: Tensor) -> Tensor:
        """What the blocks made of tokens to the logits of the next: (..., width) -> (..., vocab_size)."""
        logits, cap = self.unembedding(x), self.config.logit_softcap
        return logits if cap is None else soft_capped(logits, cap)

    def rotation(self, tokens: Tensor, positions: Tensor | None) -> "Callable[[Tensor], Tensor] | dict | None":
        """RoPE's rotation at these positions, worked out once for all layers, if the config asks for it.

        Where layers of different kinds turn differently, it is one for each kind.
        """
        if self.rope is None:
            return None
        positions = torch.arange(tokens.shape[1], device=tokens.device) if positions is None else positions
        if self.window_rope is None and "nope" not in self.config.types_of_layers:
            return self.rope.at(positions)
        full = self.rope.at(positions)
        return {"full": full, "window": full if self.window_rope is None else self.window_rope.at(positions)}


def count_parameters(model: nn.Module) -> int:
    """How many numbers the model learns; a tied table counts once."""
    return sum(p.numel() for p in model.parameters())
