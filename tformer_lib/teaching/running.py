"""The sentence that runs through the book, and the diagram of the model that opens each chapter.

Both come back on every page: the reader sees what each chapter does to the same eleven tokens, and where in the model
it happens.
"""

from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from tformer_lib.teaching.style import BLUE, GREY, INK, figure, show

STORY = 'Once, Lily lived in a little house by the sea. "I have lost my red ball," said Lily.'
"""A story that the grammar of :mod:`tformer_lib.stories` can write in its parts, short enough for a figure."""

SENTENCE = '"I have lost my red ball," said Lily.'
"""Its last sentence: the model has to find the name in what came before."""

OUTER = ("text", "tokens", "embedding", "blocks", "logits", "next\ntoken")
"""The way of a text through the model."""

INNER = ("q, k, v", "rotate", "scores", "mask", "softmax", "mix v", "feed-\nforward")
"""What happens inside a block, in this order."""

EXTRA = {"loss": (4, 1.32), "cache": (0, -1.22), "requests": (0, 1.32)}
"""Boxes beside the way: name -> (column, how far above or below)."""

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
    _, ax = figure(height=3.5)
    ax.set(xlim=(-0.56, 6.54), ylim=(-1.15, 4.8))
    ax.axis("off")
    marked = PARTS[word]
    row(ax, OUTER, 3.0, marked, step=1.19, width=1.04)
    row(ax, INNER, 0.55, marked, step=1.0, width=0.9)
    ax.text(-0.5, 1.5, "inside each block", fontsize=13, color=GREY, va="center")
    arrow(ax, (3 * 1.19, 2.58), (3 * 1.19, 1.08), dashed=True)
    for name, (column, rise) in EXTRA.items():
        at = (column * 1.19, 3.0 + rise) if rise > 0 else (0.0, 0.55 + rise)
        box(ax, name, at, name in marked, width=1.04, height=0.7)
        near, far = (at[1] - 0.35, 3.42) if rise > 0 else (at[1] + 0.35, 0.13)
        arrow(ax, (at[0], near), (at[0], far), both=name in ("cache", "loss"))
    back = FancyArrowPatch(
        (5 * 1.19, 2.5), (1.19, 2.5), connectionstyle="arc3,rad=-0.16", arrowstyle="-|>", mutation_scale=12,
        color=BLUE if word in ("generation", "ten-minutes") else GREY, linewidth=1.2,
    )  # fmt: skip
    ax.add_patch(back)
    show()


def row(ax: Axes, names: tuple[str, ...], y: float, marked: tuple[str, ...], *, step: float, width: float) -> None:
    """Boxes from left to right, with an arrow from each to the next."""
    for i, name in enumerate(names):
        box(ax, name, (i * step, y), name in marked, width=width, height=0.84)
        if i:
            arrow(ax, ((i - 1) * step + width / 2, y), (i * step - width / 2, y))


def box(ax: Axes, name: str, at: tuple[float, float], marked: bool, *, width: float, height: float) -> None:
    """A box with its name, filled where it is marked."""
    shape = FancyBboxPatch(
        (at[0] - width / 2, at[1] - height / 2), width, height, boxstyle="round,pad=0,rounding_size=0.12",
        facecolor="#CFE6F4" if marked else "#F4F5F7", edgecolor=BLUE if marked else "#C9CED6",
        linewidth=2.0 if marked else 1.0,
    )  # fmt: skip
    ax.add_patch(shape)
    weight = "bold" if marked else "normal"
    size = 10 if marked and name == "embedding" else 11.5  # in bold it would touch the frame
    ax.text(*at, name, ha="center", va="center", fontsize=size, color=INK, fontweight=weight, linespacing=0.95)


def arrow(ax: Axes, start: tuple, end: tuple, *, dashed: bool = False, both: bool = False) -> None:
    """A thin arrow."""
    style, line = ("<|-|>" if both else "-|>"), (0, (3, 2)) if dashed else "-"
    look = {"arrowstyle": style, "mutation_scale": 9, "color": GREY, "linewidth": 1.1, "linestyle": line}
    ax.add_patch(FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, **look))
