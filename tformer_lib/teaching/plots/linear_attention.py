"""Figures of the linear-attention chapter: narrow, so that their labels can be read on a phone."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from tformer_lib.teaching import style


def two_orders(tokens: int, head_dim: int) -> None:
    """The product Q Kᵀ V in its two orders, every matrix drawn to scale."""
    _, axes = style.figure(2, 1, width=style.NARROW, height=3.4)
    d, N = head_dim, tokens
    kv = ("KᵀV", d, d)
    draw_product(
        axes[0],
        [("Q", N, d), ("Kᵀ", d, N), ("=", 0, 0), ("QKᵀ", N, N), ("V", N, d), ("=", 0, 0), ("O", N, d)],
        f"(Q Kᵀ) V: {N * N:,} numbers in between",
    )
    draw_product(
        axes[1],
        [("Kᵀ", d, N), ("V", N, d), ("=", 0, 0), kv, ("", 0, 0), ("Q", N, d), kv, ("=", 0, 0), ("O", N, d)],
        f"Q (Kᵀ V): {d * d:,} numbers in between",
    )
    style.show()


def draw_product(ax: Axes, factors: Sequence[tuple[str, int, int]], title: str) -> None:
    """Matrices side by side as rectangles: (name, rows, columns), or a sign with no rows."""
    tallest, x = max(rows for _, rows, _ in factors), 0.0
    for name, rows, columns in factors:
        if rows:
            between = len(name) > 2
            colour = style.VERMILION if between else style.SKY
            box = (x, (tallest - rows) / 2)
            ax.add_patch(Rectangle(box, columns, rows, facecolor=colour, alpha=0.45, edgecolor=style.INK))
            above = rows < 0.3 * tallest
            ax.text(x + columns / 2, box[1] + rows + 1 if above else tallest / 2, name, ha="center", va="bottom")
        else:
            ax.text(x + 4, tallest / 2, name, ha="center", va="center", fontsize=14)
        x += max(columns, 8) + 6
    ax.set(xlim=(-2, 260), ylim=(-2, tallest + 4), title=title, aspect="equal")
    ax.set_axis_off()


def maps(x: Tensor, curves: dict[str, Tensor]) -> None:
    """The weight of a key as a function of q·k, for several feature maps, beside exp."""
    _, ax = style.figure(width=style.NARROW, height=3.2)
    style.lines(ax, x, curves, markers=False)
    ax.axhline(0, color=style.GREY, linewidth=0.8)
    ax.set(xlabel="q·k", ylabel="weight", ylim=(-0.5, 8))
    style.show()


def feature_error(features: Sequence[int], errors: dict[str, Sequence[float]]) -> None:
    """Error of the estimated weights over the number of features, with the line that falls as 1/√features."""
    _, ax = style.figure(width=style.NARROW, height=3.3)
    style.lines(ax, features, errors)
    above = [1.4 * next(iter(errors.values()))[0] * (features[0] / m) ** 0.5 for m in features]
    ax.plot(features, above, color=style.GREY, linewidth=1.0)
    ax.text(features[-1], above[-1], " ∝ 1/√features", va="center", fontsize=9.5)
    style.log2_axis(ax, features, [str(m) for m in features], log_y=True, minor=True)
    ax.set(xlabel="features", ylabel="relative error of a weight", xlim=(None, 4.5 * features[-1]))
    style.show()


def slope(x: Sequence[float], y: Sequence[float], last: int = 4) -> float:
    """The slope of a line through the last points on logarithmic axes: the exponent of the growth."""
    return float(np.polyfit(np.log(x[-last:]), np.log(y[-last:]), 1)[0])


def growth(lengths: Sequence[int], panels: dict[str, dict[str, Sequence[float]]]) -> None:
    """Measured growth on logarithmic axes, a panel for each quantity, each line labelled with its slope.

    Args:
        lengths: tokens.
        panels: axis label -> (name -> values; shorter lists belong to the first lengths).
    """
    _, axes = style.figure(len(panels), 1, width=style.NARROW, height=3.3 * len(panels), squeeze=False)
    for ax, (label, curves) in zip(axes.flat, panels.items(), strict=True):
        for i, (name, values) in enumerate(curves.items()):
            x = lengths[: len(values)]
            look = {"color": style.PALETTE[i], "linestyle": style.DASHES[i], "marker": style.MARKERS[i]}
            ax.plot(x, values, label=f"{name}: slope {slope(x, values):.2f}", **look)
        style.log2_axis(ax, list(lengths)[::2], log_y=True)
        ax.set(xlabel="tokens N", ylabel=label)
        low, high = ax.get_ylim()
        ax.set_ylim(low, high * 12)  # room for the legend
        ax.legend(fontsize=9.5, loc="upper left")
    style.show()


def decays(masks: dict[str, Tensor]) -> None:
    """Masks of decays: how much of each key is left when each query arrives."""
    in_two_columns(masks)


def recall(pairs: Sequence[int], accuracies: dict[str, Sequence[float]], chance: float) -> None:
    """Accuracy of recall over the number of pairs that must be kept in mind."""
    _, ax = style.figure(width=style.NARROW, height=3.5)
    style.lines(ax, pairs, accuracies)
    ax.axhline(chance, color=style.GREY, linewidth=1.0)
    ax.text(pairs[-1], chance + 0.015, "chance", fontsize=9.5, ha="right")
    style.log2_axis(ax, pairs, [str(n) for n in pairs], minor=True)
    ax.set(xlabel="pairs to remember", ylabel="share recalled", ylim=(0, 1.04))
    ax.legend(loc="lower left", fontsize=9.5)
    style.show()


def cross_talk(similarities: dict[str, Tensor]) -> None:
    """Similarity of every query with every key, (keys, keys), a panel a model, each row scaled to its own key."""
    in_two_columns(similarities)


def in_two_columns(tables: dict[str, Tensor]) -> None:
    """Tables of queries and keys with values up to 1, each under its name."""
    rows = -(-len(tables) // 2)
    _, axes = style.figure(rows, 2, width=style.NARROW, height=2.2 * rows, squeeze=False)
    for ax, (name, table) in zip(axes.flat, tables.items(), strict=False):
        style.heatmap(ax, table, limit=1.0)
        ax.set_title(name, fontsize=10)
        ax.set(xlabel="key", ylabel="query", aspect="equal", xticks=[], yticks=[])
    for ax in axes.flat[len(tables) :]:
        ax.set_axis_off()
    style.show()
