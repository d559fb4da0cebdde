"""Figures of the chapter on the mathematics of flash attention: narrow, so that a phone can show their labels."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from tformer_lib.teaching import style


def two_ways(tokens: int = 12, tile: int = 3) -> None:
    """What is written: the whole table of scores, or one tile at a time beside the running m, l and O."""
    _, axes = style.figure(2, 1, width=style.NARROW, height=6.6)
    axes[0].add_patch(Rectangle((0, 0), tokens, tokens, facecolor=style.VERMILION, alpha=0.5, edgecolor=style.INK))
    axes[0].text(tokens / 2, tokens / 2, "scores\nT × T\nin HBM", ha="center", va="center")
    axes[0].set_title("Standard: the whole table is written", fontsize=10.5)
    row, columns = 2, tokens // tile
    for column in range(columns):
        now, gone = column == 2, column < 2
        look = {"facecolor": style.LIGHT if now else "none"}
        axes[1].add_patch(Rectangle((column * tile, row * tile), tile, tile, edgecolor=style.INK, **look))
        word = "now" if now else "gone" if gone else "later"
        axes[1].text((column + 0.5) * tile, (row + 0.5) * tile, word, ha="center", va="center", fontsize=9.5)
    axes[1].annotate("", (tokens, row * tile + 4.2), (0, row * tile + 4.2), arrowprops={"arrowstyle": "->"})
    axes[1].text(tokens / 2, row * tile + 5.2, "tiles of keys pass by", ha="center", fontsize=9.5)
    for i, (name, width) in enumerate((("m", 0.8), ("ℓ", 0.8), ("O", 2.4))):
        x = tokens + 0.8 + 1.2 * i
        axes[1].add_patch(Rectangle((x, row * tile), width, tile, facecolor=style.GREEN, alpha=0.5, edgecolor="k"))
        axes[1].text(x + width / 2, row * tile - 0.4, name, ha="center", fontsize=10)
    axes[1].text(tokens + 3.2, row * tile + 4.2, "kept", ha="center", fontsize=9.5)
    axes[1].set_title("Flash: one tile at a time, three things kept", fontsize=10.5)
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


def trace(tokens: Sequence[str], scores: Sequence[float], m: Sequence[float], l: Sequence[float]) -> None:
    """A row of scores with its running maximum, and the running sum beside it, token by token from top to bottom.

    The numbers are drawn to one digit, so that the picture is the same on every machine.

    Args:
        tokens: the keys' tokens.
        scores: one row.
        m: the running maximum after each score.
        l: the running sum of exp(score - m) after each score.
    """
    scores, m, l = ([round(x, 1) for x in values] for values in (scores, m, l))
    _, (left, right) = style.figure(1, 2, width=style.NARROW, height=0.235 * len(tokens) + 0.9, sharey=True)
    place = np.arange(len(tokens))
    left.plot(scores, place, "o", color=style.GREY, label="score")
    left.step(m, place, where="pre", color=style.BLUE, label="maximum m")
    right.plot(l, place, marker="s", markersize=4, color=style.VERMILION, label="sum ℓ")
    for ax in (left, right):
        for i in range(1, len(m)):
            if m[i] > m[i - 1]:
                ax.axhline(i, color=style.INK, linewidth=1.0, linestyle=":")
        ax.grid(visible=False, axis="y")
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=9.5, handlelength=1.0)
    left.set(yticks=place, ylim=(len(tokens) - 0.5, -0.5), xlabel="score")
    left.set_yticklabels(tokens)
    right.set(xlabel="sum of exp(score − m)", xlim=(0, None))
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
        bound: T² d² / C, of the theorem.
        standard: numbers moved where the table is written.
        least: every input read and every output written once.
        chips: label -> numbers that a real fast memory holds.
    """
    _, ax = style.figure(width=style.NARROW, height=4.4)
    ax.plot(memory, counted, marker="o", color=style.BLUE, label="tiles, counted")
    ax.plot(memory, bound, color=style.GREEN, linestyle="-.", label="T² d² / C")
    ax.axhline(standard, color=style.VERMILION, linestyle="--", label="standard: 4 T² + 4 T d")
    ax.axhline(least, color=style.GREY, linestyle=":", label="read and write everything once")
    for name, size in chips.items():
        ax.vlines(size, least * 0.4, standard, color=style.INK, linewidth=0.8)
        ax.text(size * 0.9, least * 1.3, name, fontsize=9.5, ha="right")
    style.log2_axis(ax, list(memory)[::2], [f"{n // 1024}k" for n in memory][::2], log_y=True)
    ax.set(xlabel="numbers C that fit into fast memory", ylabel="numbers moved", ylim=(least * 0.4, standard * 60))
    ax.legend(loc="upper right", fontsize=9.5)
    style.show()


def errors(sizes: Sequence[float], curves: dict[str, Sequence[float]]) -> None:
    """Largest error against float64 over the size of the scores; a line ends where the result is no number."""
    _, ax = style.figure(width=style.NARROW, height=4.0)
    style.lines(ax, sizes, curves)
    for i, (name, values) in enumerate(curves.items()):
        finite = [j for j, value in enumerate(values) if np.isfinite(value)]
        if finite and len(finite) < len(values):
            end = finite[-1]
            arrow = {"arrowstyle": "-", "color": style.PALETTE[i]}
            point, place = (sizes[end], values[end]), (sizes[end], values[end] / 6)
            ax.annotate(f"{name}: NaN beyond", point, place, ha="center", fontsize=9.5, arrowprops=arrow)
    style.log2_axis(ax, sizes, [f"{s:g}" for s in sizes], log_y=True)
    ax.set(xlabel="standard deviation of the scores", ylabel="largest error against float64")
    style.show()


def memory(lengths: Sequence[int], measured: dict[str, Sequence[float]], model: dict[str, Sequence[float]]) -> None:
    """Measured peak bytes of a forward and a backward (markers) beside what the model counts (lines), in MiB."""
    _, ax = style.figure(width=style.NARROW, height=4.0)
    for i, (name, values) in enumerate(measured.items()):
        look = {"color": style.PALETTE[i], "marker": style.MARKERS[i], "markersize": 7}
        ax.plot(lengths, np.array(values) / 2**20, linestyle="", label=f"{name}, measured", **look)
    for i, (name, values) in enumerate(model.items()):
        look = {"color": style.PALETTE[i], "linestyle": style.DASHES[i]}
        ax.plot(lengths, np.array(values) / 2**20, label=name, **look)
    style.log2_axis(ax, lengths, log_y=True)
    ax.set(xlabel="tokens T", ylabel="peak MiB")
    ax.legend(fontsize=9.5)
    style.show()
