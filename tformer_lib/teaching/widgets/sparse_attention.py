"""The pattern composer of chapter 11: put patterns together, and see pairs, blocks and reach."""

from tformer_lib.teaching.widgets import Interactive, module


class PatternComposer(Interactive):
    """Choose the parts of a pattern and a number of layers, and read what it keeps and how far it reaches."""

    _esm = module("sparse_attention.js")


def composer(length: int = 32, block: int = 4) -> PatternComposer:
    """The composer for ``length`` positions, counted in blocks of ``block``."""
    return PatternComposer(
        label="Pattern composer: which pairs meet, which blocks are computed, how far it reaches",
        data={"length": length, "block": block},
    )
