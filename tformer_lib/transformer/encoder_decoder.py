"""The model of the paper: an encoder, a decoder that looks at what it made, and the loss that it was trained with."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tformer_lib.contract import counted
from tformer_lib.masks import padding
from tformer_lib.transformer.blocks import Embedding, Stack, initialise
from tformer_lib.transformer.config import ModelConfig
from tformer_lib.transformer.evaluation import evaluating


class EncoderDecoder(nn.Module):
    """The model of the paper: an encoder reads the source, a decoder writes the target while looking at it.

    The three embedding tables (source, target, output) are one, as in section 3.4 of the paper, unless
    ``config.tie_embeddings`` is off, which leaves the output its own.
    """

    def __init__(self, config: ModelConfig, *, attend: Callable | None = None):
        super().__init__()
        if config.positions in ("rope", "alibi"):
            raise ValueError(f"the encoder-decoder takes sinusoidal, learned or no positions, got {config.positions!r}")
        if set(config.types_of_layers) != {"full"}:
            raise ValueError(f"the encoder-decoder has full layers alone, got {', '.join(set(config.types_of_layers))}")
        self.config = config
        self.embedding = Embedding(config)
        self.encoder = Stack(config, attend=attend)
        self.decoder = Stack(config, cross=True, attend=attend)
        self.unembedding = nn.Linear(config.width, config.vocab_size, bias=False)
        initialise(self, config)
        if config.tie_embeddings:
            self.unembedding.weight = self.embedding.tokens.weight

    def forward(
        self,
        source: Tensor,
        target: Tensor,
        *,
        source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> Tensor:
        """The logits of the target's next tokens.

        Args:
            source: (batch, S) int64.
            target: (batch, T) int64, shifted right: it starts with the start token.
            source_lengths: (batch,) int64, how many tokens of each source row are real; None is all.
            target_lengths: the same for the target.

        Returns:
            (batch, T, vocab_size).

        Raises:
            ValueError: if tokens have another shape or dtype or are outside the vocabulary, or lengths do not fit them.
        """
        memory = self.encode(source, source_lengths)
        return self.decode(target, memory, source_lengths=source_lengths, target_lengths=target_lengths)

    def encode(self, source: Tensor, lengths: Tensor | None = None) -> Tensor:
        """source (batch, S) int64 -> memory (batch, S, width)."""
        x = self.embedding(source)  # (batch, S, width)
        return self.encoder(x, mask=None if lengths is None else padding(lengths, source.shape[1]))

    def decode(
        self,
        target: Tensor,
        memory: Tensor,
        *,
        source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> Tensor:
        """target (batch, T) int64 and memory (batch, S, width) -> logits (batch, T, vocab_size)."""
        x = self.embedding(target)  # (batch, T, width)
        x = self.decoder(
            x,
            memory=memory,
            causal=True,
            mask=None if target_lengths is None else padding(target_lengths, target.shape[1]),
            memory_mask=None if source_lengths is None else padding(source_lengths, memory.shape[1]),
        )
        return self.unembedding(x)

    @torch.no_grad()
    def translate(
        self,
        source: Tensor,
        *,
        start: int,
        end: int,
        max_length: int | None = None,
        source_lengths: Tensor | None = None,
    ) -> Tensor:
        """Write the most likely target token by token, without dropout.

        Args:
            source: (batch, S) int64.
            start: the token that opens a target; it may be the one that closes it.
            end: the token that closes it; rows that have written it go on with it.
            max_length: the most tokens to write; by default ``config.max_length - 1``.
            source_lengths: (batch,) int64, how many tokens of each source row are real; None is all.

        Returns:
            (batch, at most max_length) int64, without the start token.

        Raises:
            ValueError: the logits of a row are NaN or infinite, so that no token is the likeliest.
        """
        with evaluating(self):
            memory = self.encode(source, source_lengths)
            target = torch.full((source.shape[0], 1), start, device=source.device)
            ended = torch.zeros_like(target, dtype=torch.bool)
            for _ in range(self.config.max_length - 1 if max_length is None else max_length):
                logits = self.decode(target, memory, source_lengths=source_lengths)[:, -1]  # (batch, vocab_size)
                if not (finite := logits.amax(-1).isfinite()).all():
                    row, written = int(finite.int().argmin()), target.shape[1] - 1
                    raise ValueError(f"the logits of row {row} are not finite after {counted(written, 'new token')}")
                step = logits.argmax(-1, keepdim=True).masked_fill(ended, end)  # (batch, 1)
                target, ended = torch.cat([target, step], dim=1), ended | (step == end)
                if ended.all():
                    break
        return target[:, 1:]


def label_smoothed_loss(logits: Tensor, targets: Tensor, *, smoothing: float = 0.1, ignore_index: int = -100) -> Tensor:
    """Cross-entropy against a target that keeps ``1 - smoothing`` for the right token and spreads the rest evenly.

    It is computed in float32, or in float64 for float64 logits.

    Args:
        logits: (..., vocab_size).
        targets: (...) int64; places that hold ``ignore_index`` do not count.
        smoothing: the share spread over all tokens, the right one included (section 5.4 of the paper: 0.1).

    Returns:
        The mean over the places that count, in nats; NaN, as in torch, if none does.

    Raises:
        ValueError: if smoothing is not in [0, 1].
    """
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing must be in [0, 1], got {smoothing}")
    flat = logits.reshape(-1, logits.shape[-1]).to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(flat, targets.reshape(-1), label_smoothing=smoothing, ignore_index=ignore_index)
