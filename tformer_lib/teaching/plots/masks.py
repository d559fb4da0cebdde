"""Figures of the masks chapter: narrow, so that their labels can be read on a phone."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from tformer_lib.teaching import style
from tformer_lib.teaching.display import show_table


def who_sees_whom(mask: Tensor, queries: Sequence[str], keys: Sequence[str]) -> None:
    """One (T, S) mask with the tokens beside it."""
    fig, ax = style.figure(height=1.3 + 0.26 * len(queries), width=style.NARROW)
    style.heatmap(ax, mask, rows=queries, columns=keys)
    ax.set(xlabel="key: looked at", ylabel="query: looks")
    style.turn_words(ax)
    note(fig, "filled: may look")
    style.show()


def gallery(masks: dict[str, Tensor], *, columns: int = 3, diagonal: bool = False) -> None:
    """Several (T, S) masks in a grid, each under its name.

    Args:
        masks: name -> mask.
        columns: panels in a row; two make a narrow figure.
        diagonal: outline each query's own position, to show what lies to its right.
    """
    rows = -(-len(masks) // columns)
    width = style.NARROW if columns <= 2 else style.WIDTH
    _, axes = style.figure(rows, columns, height=2.35 * rows + 0.3, width=width, squeeze=False)
    for ax, (name, mask) in zip(axes.flat, masks.items(), strict=False):
        style.heatmap(ax, mask, rows=every(mask.shape[0]), columns=every(mask.shape[1]))
        ax.set_title(name, fontsize=10, pad=8)
        ax.set_aspect("equal")
        if diagonal:
            outline_diagonal(ax, *mask.shape)
    for ax in axes.flat[len(masks) :]:
        ax.set_axis_off()
    for ax in axes[:, 0]:
        ax.set_ylabel("query")
    style.show()


def every(length: int) -> list[str]:
    """Labels 0 .. length - 1; in a long row every fourth alone, which is enough to count by."""
    return [str(i) if length <= 8 or i % 4 == 0 else "" for i in range(length)]


def outline_diagonal(ax: Axes, T: int, S: int) -> None:
    """A frame around the key that each query stands on."""
    for t in range(T):
        s = S - T + t
        ax.add_patch(Rectangle((s - 0.5, t - 0.5), 1, 1, fill=False, edgecolor=style.VERMILION, linewidth=1.8))


def used_share(lengths: Sequence[int], shares: dict[str, Sequence[float]]) -> None:
    """The share of the T x T scores that each mask keeps, over T."""
    _, ax = style.figure(height=3.1, width=style.NARROW)
    style.lines(ax, lengths, shares)
    style.log2_axis(ax, list(lengths)[::2])
    ax.set(xlabel="length T", ylabel="share of the scores kept", ylim=(0, 1))
    style.show()


def times(lengths: Sequence[int], seconds: dict[str, Sequence[float]]) -> None:
    """Measured time of an attention under each mask, over T, and a line that grows as T squared."""
    _, ax = style.figure(height=3.3, width=style.NARROW)
    milliseconds = {name: [1e3 * t for t in ts] for name, ts in seconds.items()}
    style.lines(ax, lengths, milliseconds)
    last = max(ts[-1] for ts in milliseconds.values())
    quadratic = [last * (n / lengths[-1]) ** 2 for n in lengths]
    ax.plot(lengths, quadratic, color=style.GREY, linewidth=1.0, label="proportional to T²")
    style.log2_axis(ax, lengths, log_y=True, minor=True)
    ax.set(xlabel="length T", ylabel="milliseconds")
    ax.legend()
    style.show()


def losses(curves: dict[str, Sequence[float]], floor: float) -> None:
    """Training loss of several runs, and the entropy below which no honest model can come."""
    _, ax = style.figure(height=3.1, width=style.NARROW)
    steps = range(len(next(iter(curves.values()))))
    style.lines(ax, steps, curves, markers=False)
    ax.axhline(floor, color=style.GREY, linewidth=1.2)
    ax.text(
        len(steps) - 1, floor * 1.02, "entropy of the tokens", ha="right", va="bottom", color=style.INK, fontsize=9.5
    )
    ax.set(xlabel="training step", ylabel="loss (nats per token)", ylim=(0, 1.25 * floor))
    style.show()


def note(fig: plt.Figure, text: str) -> None:
    """A line of small print under the figure."""
    fig.supxlabel(text, fontsize=9.5, color=style.INK)


def verdicts(results: dict[str, dict[str, bool]]) -> None:
    """A table of forms (rows) and tests (columns): name of a form -> name of a test -> did it pass."""
    tests = list(next(iter(results.values())))
    rows = [[name, *("ok" if fine else "**fails**" for fine in passed.values())] for name, passed in results.items()]
    show_table(["form", *tests], rows)
