"""The positional-encoding explorer of chapter 04: what each scheme tells a query about each key."""

import torch

from tformer_lib.positional_encoding import alibi_slopes, sinusoidal, t5_bucket
from tformer_lib.teaching.widgets import Interactive, module


class PositionExplorer(Interactive):
    """Choose a scheme, a query and a key, and read what the scheme says about the pair."""

    _esm = module("positional_encoding.js")


def explorer(length: int = 64, width: int = 32, heads: int = 8) -> PositionExplorer:
    """The explorer for ``length`` positions, tables of ``width`` channels, and ``heads`` ALiBi heads."""
    return PositionExplorer(
        label="Positional-encoding explorer: what a scheme tells a query about each key",
        data={
            "length": length,
            "tables": {str(base): table(length, width, base) for base in (10000, 100)},
            "slopes": alibi_slopes(heads).tolist(),
            "buckets": t5_bucket(-torch.arange(length), bidirectional=False).tolist(),
        },
    )


def table(length: int, width: int, base: float) -> list[list[int]]:
    """A sinusoidal table, position by position, in hundredths: small enough to be stored in the page."""
    return (100 * sinusoidal(length, width, base=base)).round().int().tolist()
