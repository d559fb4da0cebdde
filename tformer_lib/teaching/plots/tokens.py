"""Figures of the tokens chapter."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from tformer_lib.teaching import style

TINTS = ("#D6E9F5", "#FBE3D3")
"""Light blue and light orange in turn, so that a token can be told from its neighbours."""

LINE = 42
"""Characters in a line of a story."""


def cuts(rows: dict[str, Sequence[str]]) -> None:
    """One text cut in several ways: a row of boxes for each, all to the same scale.

    Args:
        rows: name of the way -> the pieces of the text, which join to the same text in each row.
    """
    length = max(sum(map(len, pieces)) for pieces in rows.values())
    _, ax = style.figure(width=style.NARROW, height=0.62 * len(rows) + 0.2)
    for row, (name, pieces) in enumerate(rows.items()):
        ax.text(0.1, row - 0.36, f"{name}: {len(pieces)} tokens", va="bottom", fontsize=9.5)
        boxes(ax, row, pieces)
    ax.set(xlim=(-0.5, length + 0.5), ylim=(len(rows) - 0.6, -0.75))
    ax.set_axis_off()
    style.show()


def boxes(ax: Axes, row: int, pieces: Sequence[str]) -> None:
    """The pieces as boxes in a row, each as wide as its characters; a space is drawn as a low bracket."""
    left = 0
    for i, piece in enumerate(pieces):
        shape = FancyBboxPatch(
            (left + 0.12, row - 0.26), len(piece) - 0.24, 0.52, boxstyle="round,pad=0,rounding_size=0.12", linewidth=0.8
        )
        shape.set(facecolor=TINTS[i % 2], edgecolor=style.GREY)
        ax.add_patch(shape)
        for k, character in enumerate(piece.replace(" ", "␣")):
            colour = style.MUTED if character == "␣" else style.INK
            ax.text(
                left + k + 0.5, row, character, ha="center", va="center", family="monospace", fontsize=9.5, color=colour
            )
        left += len(piece)


def steps(merges: Sequence[int], work: dict[str, Sequence[float]]) -> None:
    """Counted steps of the two trainers, summed up to each number of merges."""
    _, ax = style.figure(width=style.NARROW, height=3.0)
    style.lines(ax, merges, work)
    style.log2_axis(ax, merges, log_y=True, minor=True)
    ax.set(xlabel="merges learned", ylabel="symbols visited")
    style.show()


def seconds(sizes: Sequence[int], times: dict[str, Sequence[float]]) -> None:
    """Measured time of the two trainers over the size of the vocabulary."""
    _, ax = style.figure(width=style.NARROW, height=3.0)
    style.lines(ax, sizes, times)
    ax.set_yscale("log")
    ax.set(xlabel="vocabulary size", ylabel="seconds")
    style.show()


def recorded(times: dict[str, float]) -> None:
    """Recorded seconds, one bar a row."""
    _, ax = style.figure(width=style.NARROW, height=0.36 * len(times) + 0.8)
    colours = [style.VERMILION if "plain" in name else style.BLUE for name in times]
    ax.barh(list(times), list(times.values()), color=colours, height=0.6)
    for name, value in times.items():
        ax.text(value, name, f" {value:.1f} s", va="center", fontsize=9.5)
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.set(xlabel="seconds", xlim=(0, 1.25 * max(times.values())))
    style.show()


def compression(curves: dict[str, tuple[Sequence[int], Sequence[float]]], single: tuple[str, int, float]) -> None:
    """Bytes per token over the size of the vocabulary.

    Args:
        curves: corpus -> (vocabulary sizes, bytes per token).
        single: one more point: its name, its vocabulary size, its bytes per token.
    """
    _, ax = style.figure(width=style.NARROW, height=3.2)
    for i, (name, (sizes, ratios)) in enumerate(curves.items()):
        look = {"color": style.PALETTE[i], "linestyle": style.DASHES[i], "marker": style.MARKERS[i]}
        ax.plot(sizes, ratios, label=name, **look)
    ax.plot(*single[1:], color=style.INK, marker="*", markersize=11, linestyle="none", label=single[0])
    style.log2_axis(ax, [256, 1024, 4096, 16384, 50257])
    ax.set(xlabel="vocabulary size", ylabel="bytes per token", ylim=(0, None))
    ax.legend()
    style.show()


def cost(sizes: Sequence[int], costs: dict[str, Sequence[float]]) -> None:
    """Cost per byte of text over the size of the vocabulary, with a ring at each curve's least."""
    _, ax = style.figure(width=style.NARROW, height=3.0)
    for line in style.lines(ax, sizes, costs):
        x, y = min(line.get_xydata(), key=lambda point: point[1])
        ax.plot(x, y, "o", markersize=14, fillstyle="none", color=line.get_color())
    style.log2_axis(ax, sizes, log_y=True)
    ax.set(xlabel="vocabulary size", ylabel="million multiply-adds\nper byte of text")
    style.show()


def frequency(counts: Sequence[int], learned: Sequence[int]) -> None:
    """How often each token is used, most used first, and how often the trainer had seen its pair when it made it."""
    _, ax = style.figure(width=style.NARROW, height=3.0)
    ax.plot(range(1, len(counts) + 1), counts, color=style.BLUE, label="tokens, most used first")
    ax.plot(range(1, len(learned) + 1), learned, color=style.VERMILION, linestyle="--", label="pairs, when merged")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set(xlabel="rank", ylabel="times in the text")
    ax.legend(loc="lower left")
    style.show()


def surprise(words: Sequence[tuple[str, float]]) -> None:
    """A story with each word on a background as dark as its surprise in bits."""
    placed = wrap([(word, nats / 0.6931471805599453) for word, nats in words])
    rows = placed[-1][1] + 1
    fig, ax = style.figure(width=style.NARROW, height=0.29 * rows + 0.75)
    limit = max(bits for *_, bits in placed)
    for left, row, word, bits in placed:
        shade = style.PALE(max(bits, 0.0) / limit)
        ax.add_patch(FancyBboxPatch((left, row - 0.42), len(word), 0.84, boxstyle="square,pad=0", color=shade, lw=0))
        for k, character in enumerate(word):
            ax.text(left + k + 0.5, row, character, ha="center", va="center", family="monospace", fontsize=9.5)
    ax.set(xlim=(0, LINE), ylim=(rows - 0.4, -0.6))
    ax.set_axis_off()
    scale = style.ScalarMappable(cmap=style.PALE)
    scale.set_clim(0, limit)
    bar = fig.colorbar(scale, ax=ax, orientation="horizontal", shrink=0.8, aspect=30, pad=0.02)
    bar.set_label("surprise of the word, given all before it (bits)", fontsize=9.5)
    style.show()


def wrap(words: Sequence[tuple[str, float]]) -> list[tuple[int, int, str, float]]:
    """Column, row, word and value of each word, broken into lines."""
    placed, left, row = [], 0, 0
    for word, value in words:
        if left + len(word.rstrip()) > LINE:
            left, row = 0, row + 1
        placed.append((left, row, word.rstrip(), value))
        left += len(word)
    return placed


def ladder(losses: dict[str, float], floor: float) -> None:
    """What models that see more and more reach, in nats per token, and the floor."""
    _, ax = style.figure(width=style.NARROW, height=0.42 * len(losses) + 1.1)
    names = list(losses)
    ax.barh(names, list(losses.values()), color=style.SKY, edgecolor=style.INK, linewidth=0.6, height=0.6)
    for name, loss in losses.items():
        ax.text(loss + 0.14, name, f"{loss:.2f}", va="center", fontsize=9.5)
    ax.axvline(floor, color=style.VERMILION, linewidth=1.4, linestyle="--")
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.set(xlabel="validation loss (nats per token);\ndashed: the entropy floor", xlim=(0, 1.2 * max(losses.values())))
    style.show()


def shares(names: Sequence[str], counts: dict[str, Sequence[float]], ylabel: str) -> None:
    """Groups of horizontal bars: one group a name, one bar an entry of ``counts``."""
    _, ax = style.figure(width=style.NARROW, height=0.5 * len(names) + 0.9)
    thick = 0.8 / len(counts)
    for i, (label, values) in enumerate(counts.items()):
        places = [k + (i - (len(counts) - 1) / 2) * thick for k in range(len(names))]
        hatch = ("", "///", "...")[i % 3]
        ax.barh(places, values, height=thick, label=label, color=style.PALETTE[i], edgecolor="white", hatch=hatch)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.set(xlabel=ylabel)
    ax.legend()
    style.show()
