"""The sentence that runs through the book, and the diagram of the model that opens each chapter.

Both come back on every page: the reader sees what each chapter does to the same eleven tokens, and where in the model
it happens.
"""

from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from tformer_lib.teaching.style import BLUE, GREY, INK, MUTED, NARROW, figure, show

STORY = 'Once, Lily lived in a little house by the sea. "I have lost my red ball," said Lily.'
"""A story that the grammar of :mod:`tformer_lib.stories` can write in its parts, short enough for a figure."""

SENTENCE = '"I have lost my red ball," said Lily.'
"""Its last sentence: the model has to find the name in what came before."""

OUTER = ("text", "tokens", "embedding", "blocks", "logits", "next\ntoken")
"""The way of a text through the model."""

INNER = ("q, k, v", "rotate", "scores", "mask", "softmax", "mix v", "feed-\nforward")
"""What happens inside a block, in this order."""

EXTRA = ("requests", "loss", "cache")
"""Boxes beside the way."""

LEFT, MIDDLE, RIGHT = 0.7, 2.1, 3.5
"""Columns of the upper half."""

PLACES = {
    "requests": (LEFT, 5.3), "text": (LEFT, 4.4), "tokens": (MIDDLE, 4.4), "embedding": (RIGHT, 4.4),
    "next\ntoken": (LEFT, 3.3), "logits": (MIDDLE, 3.3), "blocks": (RIGHT, 3.3), "loss": (MIDDLE, 2.4),
    "q, k, v": (0.55, 1.15), "rotate": (1.58, 1.15), "scores": (2.62, 1.15), "mask": (3.65, 1.15),
    "cache": (0.55, 0.2), "feed-\nforward": (1.58, 0.2), "mix v": (2.62, 0.2), "softmax": (3.65, 0.2),
}  # fmt: skip
"""Where the middle of each box is. The way runs to the right and comes back below, so that it fits a phone."""

PARTS = {
    "ten-minutes": OUTER,
    "tokens": ("tokens",),
    "attention": ("q, k, v", "scores", "softmax", "mix v"),
    "masks": ("mask",),
    "positional-encoding": ("embedding", "scores"),
    "transformer": ("embedding", "blocks", *INNER, "logits"),
    "training": ("logits", "loss"),
    "generation": ("logits", "next\ntoken"),
    "rope": ("rotate",),
    "kv-cache": ("cache",),
    "grouped-query-attention": ("q, k, v", "cache"),
    "sparse-attention": ("scores", "mask"),
    "linear-attention": ("scores", "softmax", "mix v"),
    "mixture-of-experts": ("feed-\nforward",),
    "real-models": (*OUTER, *INNER),
    "flash-math": ("scores", "mask", "softmax", "mix v"),
    "flash-kernels": ("scores", "mask", "softmax", "mix v"),
    "flash-hopper": ("scores", "mask", "softmax", "mix v"),
    "paged-attention": ("cache", "scores", "softmax", "mix v"),
    "serving": ("requests", "cache", "blocks", "next\ntoken"),
    "profiling": ("blocks", *INNER),
    "scaling-out": ("requests", "blocks", *INNER, "loss"),
}
"""Chapter's word -> the boxes that it is about."""


def model_map(word: str) -> None:
    """Draw the model with the boxes marked that a chapter is about.

    Args:
        word: the chapter's word in ``book/chapters.toml``, such as ``"attention"``.

    Raises:
        ValueError: no chapter has that word.
    """
    if word not in PARTS:
        raise ValueError(f"no chapter is called {word!r}; there are {', '.join(PARTS)}")
    _, ax = figure(height=4.3, width=NARROW)
    ax.set(xlim=(0, 4.2), ylim=(-0.25, 5.65))
    ax.axis("off")
    frame = {"boxstyle": "round,pad=0,rounding_size=0.1", "fill": False, "edgecolor": "#C9CED6"}
    ax.add_patch(FancyBboxPatch((0.03, -0.2), 4.14, 2.06, **frame))
    ax.text(0.13, 1.68, "inside each block", fontsize=10.5, color=MUTED, va="center")
    for name in PLACES:
        box(ax, name, name in PARTS[word])
    for way in (OUTER, INNER):
        for one, other in pairwise(way):
            arrow(ax, one, other)
    arrow(ax, "requests", "text")
    arrow(ax, "loss", "logits", both=True)
    arrow(ax, "cache", "q, k, v", both=True)
    line = {"arrowstyle": "-|>", "mutation_scale": 9, "shrinkA": 0, "shrinkB": 0, "linewidth": 1.2}
    ax.add_patch(FancyArrowPatch((RIGHT, 2.97), (RIGHT, 1.86), color=GREY, linestyle=(0, (3, 2)), **line))
    colour = BLUE if word in ("generation", "ten-minutes") else GREY
    ax.add_patch(FancyArrowPatch((LEFT + 0.3, 3.63), (MIDDLE - 0.3, 4.07), color=colour, **line))
    show()


def box(ax: Axes, name: str, marked: bool) -> None:
    """A box with its name, filled where it is marked."""
    (x, y), (width, height) = PLACES[name], size_of(name)
    shape = FancyBboxPatch(
        (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=0.1",
        facecolor="#CFE6F4" if marked else "#F4F5F7", edgecolor=BLUE if marked else "#C9CED6",
        linewidth=2.0 if marked else 1.0,
    )  # fmt: skip
    ax.add_patch(shape)
    weight = "bold" if marked else "normal"
    ax.text(x, y, name, ha="center", va="center", fontsize=10.5, color=INK, fontweight=weight, linespacing=0.95)


def size_of(name: str) -> tuple[float, float]:
    """Width and height of a box: what is inside a block is smaller."""
    return (0.86, 0.6) if name in INNER or name == "cache" else (1.08, 0.66)


def arrow(ax: Axes, start: str, end: str, *, both: bool = False) -> None:
    """A thin arrow from the edge of one box to the edge of another, in the same row or column."""
    (x, y), (to_x, to_y) = PLACES[start], PLACES[end]
    (width, height), (to_width, to_height) = size_of(start), size_of(end)
    side = (to_x > x) - (to_x < x), (to_y > y) - (to_y < y)
    near = x + side[0] * width / 2, y + side[1] * height / 2
    far = to_x - side[0] * to_width / 2, to_y - side[1] * to_height / 2
    look = {"arrowstyle": "<|-|>" if both else "-|>", "mutation_scale": 9, "color": GREY, "linewidth": 1.1}
    ax.add_patch(FancyArrowPatch(near, far, shrinkA=0, shrinkB=0, **look))
