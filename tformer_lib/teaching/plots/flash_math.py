"""Figures of the chapter on the mathematics of flash attention."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from tformer_lib.teaching import style


def two_ways(tokens: int = 12, tile: int = 3) -> None:
    """Who writes what: the whole table of scores, or one tile at a time beside the running m, l and O."""
    _, axes = style.figure(1, 2, height=3.5)
    axes[0].add_patch(Rectangle((0, 0), tokens, tokens, facecolor=style.VERMILION, alpha=0.5, edgecolor=style.INK))
    axes[0].text(tokens / 2, tokens / 2, "scores\nN × N\nin slow memory", ha="center", va="center")
    axes[0].set_title("Standard: the table is written", fontsize=10.5)
    row, columns = 2, tokens // tile
    for column in range(columns):
        now, gone = column == 2, column < 2
        look = {"facecolor": style.BLUE if now else "none", "alpha": 0.8 if now else 1.0}
        axes[1].add_patch(Rectangle((column * tile, row * tile), tile, tile, edgecolor=style.INK, **look))
        word = "now" if now else "gone" if gone else "later"
        axes[1].text((column + 0.5) * tile, (row + 0.5) * tile, word, ha="center", va="center", fontsize=9)
    axes[1].annotate("", (tokens, row * tile + 4.2), (0, row * tile + 4.2), arrowprops={"arrowstyle": "->"})
    axes[1].text(tokens / 2, row * tile + 5.2, "tiles of keys go by", ha="center", fontsize=9)
    for i, (name, width) in enumerate((("m", 0.8), ("l", 0.8), ("O", 2.4))):
        x = tokens + 0.8 + 1.2 * i
        axes[1].add_patch(Rectangle((x, row * tile), width, tile, facecolor=style.GREEN, alpha=0.5, edgecolor="k"))
        axes[1].text(x + width / 2, row * tile - 0.4, name, ha="center", fontsize=10)
    axes[1].text(tokens + 3.2, row * tile + 4.2, "kept", ha="center", fontsize=9)
    axes[1].set_title("Flash: one tile, and what it adds up to", fontsize=10.5)
    for ax in axes:
        frame(ax, tokens)
    style.show()


def frame(ax: Axes, tokens: int) -> None:
    """The outline of the table, its sides named, no ticks."""
    ax.add_patch(Rectangle((0, 0), tokens, tokens, facecolor="none", edgecolor=style.GREY, linestyle="--"))
    ax.set(xlim=(-0.5, tokens + 6), ylim=(tokens + 1.8, -1.0), xticks=[], yticks=[], aspect="equal")
    ax.text(tokens / 2, tokens + 1.4, "keys", ha="center")
    ax.set(ylabel="queries")
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.grid(False)


def trace(scores: Sequence[float], m: Sequence[float], l: Sequence[float]) -> None:
    """The stream of scores with its running maximum, and the running sum below.

    Args:
        scores: one row.
        m: the running maximum after each score.
        l: the running sum of exp(score - m) after each score.
    """
    _, (top, bottom) = style.figure(2, 1, height=4.2, sharex=True)
    place = np.arange(1, len(scores) + 1)
    top.plot(place, scores, "o", color=style.GREY, label="score")
    top.step(place, m, where="post", color=style.BLUE, label="m, the largest so far")
    bottom.plot(place, l, marker="s", color=style.VERMILION, label="l, the sum of exp(score - m)")
    risen = [i for i in range(1, len(m)) if m[i] > m[i - 1]]
    for ax in (top, bottom):
        for i in risen:
            ax.axvline(place[i], color=style.GREY, linewidth=0.8, linestyle=":")
    top.set(ylabel="score", xticks=place)
    bottom.set(ylabel="l", xlabel="scores seen; dotted: the maximum rises, and l is rescaled", ylim=(0, None))
    top.legend(loc="lower right")
    style.show()


def traffic(
    memory: Sequence[int],
    counted: Sequence[int],
    bound: Sequence[float],
    standard: int,
    least: int,
    chips: dict[str, int],
) -> None:
    """Numbers moved over the size of the fast memory, on logarithmic axes.

    Args:
        memory: numbers that fit into the fast memory.
        counted: numbers moved by the tiled loops with each.
        bound: N² d² / M, of the theorem.
        standard: numbers moved where the table is written.
        least: every input read and every output written once.
        chips: label -> numbers that a real fast memory holds.
    """
    _, ax = style.figure(height=3.9)
    ax.plot(memory, counted, marker="o", color=style.BLUE, label="tiled loops, counted")
    ax.plot(memory, bound, color=style.GREEN, linestyle="-.", label="N² d² / M")
    ax.axhline(standard, color=style.VERMILION, linestyle="--", label="standard: 4 N² + 4 N d")
    ax.axhline(least, color=style.GREY, linestyle=":", label="read and write everything once")
    for name, size in chips.items():
        ax.vlines(size, least * 0.4, standard, color=style.INK, linewidth=0.8)
        ax.text(size * 1.08, standard * 0.4, name, fontsize=9)
    style.log2_axis(ax, list(memory)[::2], [f"{n // 1024}k" for n in memory][::2], log_y=True)
    ax.set(xlabel="numbers M that fit into fast memory", ylabel="numbers moved", ylim=(least * 0.4, standard * 30))
    ax.legend(loc="upper right", fontsize=9)
    style.show()


def errors(sizes: Sequence[float], curves: dict[str, Sequence[float]]) -> None:
    """Largest error against float64 over the size of the scores; a line ends where the result is no number."""
    _, ax = style.figure(height=3.6)
    style.lines(ax, sizes, curves)
    for i, (name, values) in enumerate(curves.items()):
        finite = [j for j, value in enumerate(values) if np.isfinite(value)]
        if finite and len(finite) < len(values):
            end = finite[-1]
            arrow = {"arrowstyle": "-", "color": style.PALETTE[i]}
            point, place = (sizes[end], values[end]), (sizes[end], values[end] / 6)
            ax.annotate(f"{name}: NaN beyond", point, place, ha="center", fontsize=9, arrowprops=arrow)
    style.log2_axis(ax, sizes, [f"{s:g}" for s in sizes], log_y=True)
    ax.set(xlabel="standard deviation of the scores", ylabel="largest error against float64")
    style.show()


def memory(lengths: Sequence[int], measured: dict[str, Sequence[float]], model: dict[str, Sequence[float]]) -> None:
    """Measured peak bytes of a forward and a backward (markers) beside what the model counts (lines), in MiB."""
    _, ax = style.figure(height=3.6)
    for i, (name, values) in enumerate(measured.items()):
        look = {"color": style.PALETTE[i], "marker": style.MARKERS[i], "markersize": 7}
        ax.plot(lengths, np.array(values) / 2**20, linestyle="", label=f"{name}, measured", **look)
    for i, (name, values) in enumerate(model.items()):
        look = {"color": style.PALETTE[i], "linestyle": style.DASHES[i]}
        ax.plot(lengths, np.array(values) / 2**20, label=name, **look)
    style.log2_axis(ax, lengths, log_y=True)
    ax.set(xlabel="tokens N", ylabel="peak MiB")
    ax.legend(fontsize=9)
    style.show()
