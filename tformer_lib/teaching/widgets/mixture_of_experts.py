"""The router of chapter 13: tokens choose experts, and experts have so many places."""

from collections.abc import Sequence

from torch import Tensor

from tformer_lib.teaching.widgets import Interactive, module


class RoutingTable(Interactive):
    """Change how many experts a token chooses and how many places an expert has, and see who is dropped."""

    _esm = module("mixture_of_experts.js")


def routing(tokens: Sequence[str], logits: Tensor) -> RoutingTable:
    """The table of these tokens and the experts that they choose.

    Args:
        tokens: T texts.
        logits: (T, experts), what a router says of them.

    Raises:
        ValueError: there are not as many tokens as rows of logits.
    """
    if len(tokens) != len(logits):
        raise ValueError(f"there are {len(tokens)} tokens and {len(logits)} rows of logits")
    rows = [[round(number, 2) for number in row] for row in logits.tolist()]
    return RoutingTable(
        label="Routing: which experts the tokens choose, and which choices find a place",
        data={"tokens": [token.replace("\n", "¶") for token in tokens], "logits": rows},
    )
