"""The residual stream of chapter 05: what each token's vector says after each addition, and without one of them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tformer_lib.teaching.running import STORY
from tformer_lib.teaching.widgets import Interactive, module
from tformer_lib.tokens import Encoding

NAMED = 3
"""How many of the likeliest next tokens the figure names after an addition."""


class ResidualStream(Interactive):
    """Choose a token, follow its vector upwards, and leave a branch out."""

    _esm = module("transformer.js")


def residual_stream(model: nn.Module, encoding: Encoding, text: str = STORY) -> ResidualStream:
    """The figure for a ``Decoder`` that reads ``text``; the page needs the model no more.

    Args:
        model: its parts are recorded here.
        encoding: its tokens.
        text: read from its first token.
    """
    tokens = encoding.encode_ordinary(text)
    ids = torch.tensor([tokens])  # (1, T)
    parts = branches(model)
    added = additions(model, ids)  # (1 + branches, T, width)
    stream = added.cumsum(0)
    words: list[str] = []

    def named(chances: Tensor) -> list[list[int]]:
        """For each token, the likeliest next ones as places in ``words``, each with its tenths of a percent."""
        found = chances.topk(NAMED)  # (T, NAMED)
        return [
            [number for pair in zip(map(place, row), shares, strict=True) for number in pair]
            for row, shares in zip(found.indices.tolist(), (1000 * found.values).round().int().tolist(), strict=True)
        ]

    def place(token: int) -> int:
        word = encoding.decode([token])
        if word not in words:
            words.append(word)
        return words.index(word)

    return ResidualStream(
        label="The residual stream: what a token's vector says after each addition",
        data={
            "tokens": [encoding.decode([token]) for token in tokens],
            "start": tokens.index(encoding.encode_ordinary(" said")[0]) if text == STORY else len(tokens) - 1,
            "parts": ["embedding", *parts],
            "says": [named(chances) for chances in lens(model, stream)],
            "lengths": (10 * stream.norm(dim=-1)).round().int().tolist(),  # tenths
            "without": [named(left_out(model, ids, part)) for part in parts],
            "words": words,
        },
    )


def branches(model: nn.Module) -> dict[str, nn.Module]:
    """The branches of a ``Decoder`` in the order of their additions: ``attention 0``, ``feed-forward 0``, ..."""
    return {
        f"{name} {i}": branch
        for i, block in enumerate(model.stack.blocks)
        for name, branch in (("attention", block.attention), ("feed-forward", block.feed_forward))
    }


@torch.no_grad()
def additions(model: nn.Module, ids: Tensor) -> Tensor:
    """What the embedding and each branch add to the stream of every token of ids (1, T): (1 + branches, T, width)."""
    kept: list[Tensor] = []
    parts = [model.embedding, *branches(model).values()]
    handles = [part.register_forward_hook(lambda _, __, output: kept.append(output[0])) for part in parts]
    try:
        model(ids)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(kept)


@torch.no_grad()
def lens(model: nn.Module, stream: Tensor) -> Tensor:
    """The logit lens: probabilities of the next token, if the model stopped at these vectors (..., width)."""
    return model.unembedding(model.stack.final_norm(stream)).softmax(-1)


@contextmanager
def silent(branch: nn.Module) -> Iterator[None]:
    """Let a branch add nothing inside a ``with`` block."""
    handle = branch.register_forward_hook(lambda _, __, output: torch.zeros_like(output))
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def left_out(model: nn.Module, ids: Tensor, part: str) -> Tensor:
    """Probabilities of the next token, (T, vocab_size), if one of :func:`branches` adds nothing."""
    with silent(branches(model)[part]):
        return model(ids)[0].softmax(-1)
