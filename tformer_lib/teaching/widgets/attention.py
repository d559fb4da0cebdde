"""The lookup of chapter 02: a query meets the keys, and the values flow to the output by their attention weights."""

from collections.abc import Sequence

from torch import Tensor

from tformer_lib.teaching.widgets import Interactive, module


class Lookup(Interactive):
    """Choose the token that asks, the temperature of the softmax and what the values are; follow q, k and v."""

    _esm = module("attention.js")


def lookup(stories: dict[str, tuple[Sequence[str], Tensor]], W_q: Tensor, W_k: Tensor, W_v: Tensor) -> Lookup:
    """The figure for a few short stories under the same three projections.

    The scores are not divided by the square root of head_dim: the reader does that, with the temperature.

    Args:
        stories: name of a story -> its T tokens, and their vectors (T, width).
        W_q: (width, head_dim).
        W_k: (width, head_dim).
        W_v: (width, value_dim).

    Raises:
        ValueError: if a story's tokens and vectors differ in number, or a matrix does not fit the vectors.
    """
    for name, (tokens, x) in stories.items():
        if len(tokens) != len(x):
            raise ValueError(f"story {name!r} has {len(tokens)} tokens and {len(x)} vectors")
        for label, matrix in (("W_q", W_q), ("W_k", W_k), ("W_v", W_v)):
            if matrix.shape[0] != x.shape[1]:
                raise ValueError(
                    f"{label} takes vectors of {matrix.shape[0]} numbers, those of {name!r} have {x.shape[1]}"
                )
    return Lookup(
        label="A lookup by attention: follow the query, the keys and the values",
        data={
            "stories": [
                {
                    "name": name,
                    "tokens": list(tokens),
                    "q": rounded(x @ W_q),
                    "k": rounded(x @ W_k),
                    "values": {"v": rounded(x @ W_v), "k": rounded(x @ W_k), "x": rounded(x)},
                }
                for name, (tokens, x) in stories.items()
            ]
        },
    )


def rounded(x: Tensor) -> list[list[float]]:
    """Rows of numbers with six digits: small enough for the page, and the same on every machine."""
    return [[round(number, 6) for number in row] for row in x.tolist()]
