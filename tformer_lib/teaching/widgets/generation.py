"""The sampler of chapter 07: a recorded distribution, the rules that change it, bars to drag, and draws to count."""

import torch
from torch import nn

from tformer_lib.teaching.widgets import Interactive, module
from tformer_lib.tokens import Encoding

SHOWN = 12
"""Tokens that have a bar of their own; the others share one."""


class Sampler(Interactive):
    """Set the temperature, top-k, top-p and min-p, drag the bars, and draw tokens."""

    _esm = module("generation.js")


def sampler(model: nn.Module, encoding: Encoding, texts: dict[str, str]) -> Sampler:
    """The figure for ``model``, a ``Decoder``, at the ends of some texts, each read from the beginning of a story.

    Args:
        model: gives the logits.
        encoding: its tokens.
        texts: what the menu calls a place -> the text up to there.
    """
    return Sampler(
        label="From a distribution to a token: rules, bars and draws",
        data={"shown": SHOWN, "places": [place(model, encoding, name, text) for name, text in texts.items()]},
    )


@torch.no_grad()
def place(model: nn.Module, encoding: Encoding, name: str, text: str) -> dict:
    """The next token's distribution after a text.

    Returns:
        The name; the words of the likeliest tokens; and log p of every token in hundredths of a nat, from the likeliest
        on: small enough for the page, and the same on every machine.
    """
    tokens = [encoding.eot_token, *encoding.encode_ordinary(text)]
    ordered, order = model(torch.tensor([tokens]))[0, -1].log_softmax(-1).sort(descending=True)  # (vocab_size,)
    words = [encoding.decode([token]) for token in order[:SHOWN].tolist()]
    return {"name": name, "words": words, "logs": (100 * ordered).round().int().tolist()}
