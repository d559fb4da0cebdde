"""The desk of chapter 00: change a story, and see what the model expects next and where one of its heads looks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product

import torch
from torch import Tensor, nn

from tformer_lib.teaching.running import STORY
from tformer_lib.teaching.widgets import Interactive, module
from tformer_lib.teaching.widgets.training import digits, read
from tformer_lib.tokens import Encoding

CHOICES = {
    "name": ("Lily", "Ben", "Anna", "Tom"),
    "colour": ("red", "blue", "green"),
    "toy": ("ball", "kite", "drum"),
}
"""What the reader may change in the story. The first of each is the story's own."""

LIKELIEST = 5
"""How many next tokens the figure shows."""


class StoryDesk(Interactive):
    """Choose the words of the story and how far the model has read it; silence a head."""

    _esm = module("ten_minutes.js")


@contextmanager
def silenced(model: nn.Module, layer: int, head: int) -> Iterator[None]:
    """Let one head of a ``Decoder`` say nothing inside a ``with`` block: what it hands on is multiplied by zero.

    Args:
        model: the model; its weights are as before when the block ends.
        layer: counted from 0.
        head: counted from 0.
    """
    d = model.config.size_of_head
    columns = model.stack.blocks[layer].attention.out_proj.weight.data[:, d * head : d * (head + 1)]
    kept = columns.clone()
    columns.zero_()
    try:
        yield
    finally:
        columns.copy_(kept)


def story_desk(model: nn.Module, encoding: Encoding, *, layer: int, head: int) -> StoryDesk:
    """The figure for a ``Decoder``: every story that :data:`CHOICES` make, with and without one head.

    Args:
        model: reads the stories here; the page needs it no more.
        encoding: its tokens.
        layer: of the head whose attention is shown, and which can be silenced.
        head: of the same.
    """
    words: list[str] = []
    states = [state(model, encoding, chosen, (layer, head), words) for chosen in product(*CHOICES.values())]
    return StoryDesk(
        label="A story to change: what the model expects next",
        data={
            "choices": [[what, list(ways)] for what, ways in CHOICES.items()],
            "words": words,
            "states": states,
            "head": f"head {head} of layer {layer}",
        },
    )


def state(
    model: nn.Module, encoding: Encoding, chosen: Sequence[str], place: tuple[int, int], words: list[str]
) -> dict:
    """What the page keeps of one story: its tokens, what comes next at each of them, and where the head looks.

    The tokens and the likeliest next ones are numbers of ``words``, which grows.
    """
    tokens = [encoding.eot_token, *encoding.encode_ordinary(story(chosen))]
    weights, chances = read(model, tokens)
    with silenced(model, *place):
        _, without = read(model, tokens)

    def number(token: int) -> int:
        word = encoding.decode([token]) if token != encoding.eot_token else "(start) "
        if word not in words:
            words.append(word)
        return words.index(word)

    def likeliest(rows: Tensor) -> list[list[int]]:
        """For each token the numbers of the likeliest words, and their chances in tenths of a percent, in turns."""
        found = rows.topk(LIKELIEST)
        pairs = zip(found.indices.tolist(), (1000 * found.values).round().int().tolist(), strict=True)
        return [[x for token, share in zip(*pair, strict=True) for x in (number(token), share)] for pair in pairs]

    return {
        "tokens": [number(token) for token in tokens],
        "next": likeliest(chances),
        "without": likeliest(without),
        "looks": digits(weights[place]),
    }


def story(chosen: Sequence[str]) -> str:
    """The running story with these words in the places of its own."""
    text = STORY
    for own, word in zip((ways[0] for ways in CHOICES.values()), chosen, strict=True):
        text = text.replace(own, word)
    return text


def next_tokens(model: nn.Module, encoding: Encoding, text: str, count: int = LIKELIEST) -> list[tuple[str, float]]:
    """The likeliest next tokens of a text and the probability that the model gives to each.

    Args:
        model: a ``Decoder``.
        encoding: its tokens.
        text: read from its start.
        count: how many.
    """
    with torch.no_grad():
        logits = model(torch.tensor([[encoding.eot_token, *encoding.encode_ordinary(text)]]))[0, -1]  # (vocab_size,)
    found = logits.softmax(-1).topk(count)
    return [
        (encoding.decode([token]), share)
        for token, share in zip(found.indices.tolist(), found.values.tolist(), strict=True)
    ]
