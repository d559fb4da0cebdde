"""The cost explorer of chapter 12: operations and memory of quadratic and linear attention."""

from tformer_lib.linear_attention import CHUNK
from tformer_lib.teaching.widgets import Interactive, module


class CostExplorer(Interactive):
    """Choose a head's width, a number of features and a length, and read what each form costs."""

    _esm = module("linear_attention.js")


def costs() -> CostExplorer:
    """The explorer, for chunks of the library's size."""
    return CostExplorer(
        label="Cost explorer: softmax attention against linear attention",
        data={"chunk": CHUNK, "bytes": 4},
    )
