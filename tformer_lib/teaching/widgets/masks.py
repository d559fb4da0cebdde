"""The mask builder of chapter 03: combine masks, and see who sees whom."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tformer_lib import masks
from tformer_lib.teaching.widgets import Interactive, module

TOKENS = ("I", "have", "lost", "my", "red", "ball", "Pip", "found", "it", "again")
DOCUMENTS = (0, 0, 0, 0, 0, 0, 1, 1, 1, 1)


class MaskBuilder(Interactive):
    """Choose a mask, combine it with padding and documents, and read what each query may look at."""

    _esm = module("masks.js")


def mask_builder(tokens: Sequence[str] = TOKENS, documents: Sequence[int] = DOCUMENTS) -> MaskBuilder:
    """The builder for these tokens, of which each belongs to a document."""
    if len(tokens) != len(documents):
        raise ValueError(f"each token needs a document, got {len(tokens)} tokens and {len(documents)} documents")
    S = len(tokens)
    sizes = range(1, S + 1)
    return MaskBuilder(
        label="Mask builder: who sees whom",
        data={
            "tokens": list(tokens),
            "everyone": bits(torch.ones(S, S, dtype=torch.bool)),
            "causal": bits(masks.causal(S)),
            "window": [bits(masks.sliding_window(S, window=size)) for size in sizes],
            "prefix": [bits(masks.prefix(S, prefix_length=size)) for size in sizes],
            "padding": [bits(masks.padding(torch.tensor([size]), S)[0, 0].expand(S, S)) for size in sizes],
            "documents": bits(masks.document(torch.tensor(documents))),
        },
    )


def bits(mask: Tensor) -> list[str]:
    """A (T, S) mask as one string of 0 and 1 a query: small enough to be stored in the page."""
    return ["".join("1" if seen else "0" for seen in row) for row in mask.tolist()]
