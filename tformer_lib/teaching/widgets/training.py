"""The attention explorer of chapter 06: where each head of the trained stories model looks, on a story."""

import torch
from torch import Tensor, nn

from tformer_lib.attention import allowed_pairs, gather, masked_softmax, scaled_scores
from tformer_lib.teaching.running import STORY
from tformer_lib.teaching.widgets import Interactive, module
from tformer_lib.tokens import Encoding


class AttentionExplorer(Interactive):
    """Choose a token, a layer and a head, and see which earlier tokens it looks at."""

    _esm = module("training.js")


def attention_explorer(model: nn.Module, encoding: Encoding, text: str = STORY) -> AttentionExplorer:
    """The explorer for ``model``, a ``Decoder``, reading ``text`` from its start."""
    tokens = [encoding.eot_token, *encoding.encode_ordinary(text)]
    weights, chances = read(model, tokens)
    words = ["(start) ", *(encoding.decode([token]) for token in tokens[1:])]
    return AttentionExplorer(
        label="Attention explorer: where each head of the stories model looks",
        data={
            "tokens": words,
            "next": [best(row, encoding) for row in chances],
            "weights": [[digits(head) for head in layer] for layer in weights],
        },
    )


@torch.no_grad()
def read(model: nn.Module, tokens: list[int]) -> tuple[Tensor, Tensor]:
    """One pass that keeps what is usually thrown away.

    Returns:
        The attention weights (layers, heads, T, T), and the probabilities of the next token (T, vocab_size).
    """
    kept: list[Tensor] = []

    def attend(q, k, v, *, mask=None, causal=False, scale=None, bias=None):
        weights = masked_softmax(scaled_scores(q, k, scale), allowed_pairs(q, k, mask, causal))
        kept.append(weights[0])
        return gather(weights, v)

    attentions = [block.attention for block in model.stack.blocks]
    usual = [attention.attend for attention in attentions]
    try:
        for attention in attentions:
            attention.attend = attend
        logits = model(torch.tensor([tokens]))[0]
    finally:
        for attention, form in zip(attentions, usual, strict=True):
            attention.attend = form
    return torch.stack(kept), logits.softmax(-1)


def best(chances: Tensor, encoding: Encoding) -> list:
    """The likeliest next token and its chance in percent."""
    chance, token = chances.max(-1)
    return [encoding.decode([int(token)]), round(100 * chance.item())]


def digits(weights: Tensor) -> str:
    """The lower triangle of (T, T) weights, row after row, two hexadecimal digits each: small enough for the page."""
    T = len(weights)
    seen = weights[torch.ones(T, T, dtype=torch.bool).tril()]
    return "".join(f"{value:02x}" for value in (255 * seen).round().int().tolist())
