"""Figures of the chapter on the kernels of flash attention: narrow, so that a phone can show their labels."""

import textwrap
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from tformer_lib.teaching import style

SMALL = 9.5
LANES = 32
BANKS = 32
GROUND = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
"""Behind a label that a line may cross."""
ROOM = 62
"""Points that a bar of the ladder leaves free for its two labels: a speed behind its end, a share at the right edge."""


def box(
    ax: Axes, x: float, y: float, width: float, height: float, text: str = "", colour: str = "none", **look
) -> None:
    """A rectangle with a text in its middle."""
    size = look.pop("size", SMALL)
    ink = look.pop("ink", style.INK)
    ax.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor=style.INK, linewidth=0.8, **look))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color=ink)


def bare(ax: Axes, width: float, height: float) -> None:
    """An axes without ticks, y downwards, for a drawing of this size."""
    ax.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.grid(False)


# --- the GPU -------------------------------------------------------------------------------------------------------


def multiprocessor() -> None:
    """What is inside one SM of an H200, what each part does in a cycle, and what lies below it."""
    _, ax = style.figure(width=style.NARROW, height=5.0)
    bare(ax, 60, 74)
    ax.add_patch(Rectangle((0.5, 4.5), 59, 46, facecolor="none", edgecolor=style.INK, linewidth=1.4))
    ax.text(0.5, 3, "one SM of 132, in one clock cycle", fontsize=10, fontweight="bold")
    box(ax, 2, 7, 56, 7, "4 schedulers: each starts one warp instruction", "#E3E6EA")
    units = {
        "tensor\ncores": "4,096\nFLOPs",
        "float32\nlanes": "256\nFLOPs",
        "SFUs": "16\nexp2",
        "loads,\nstores": "128\nbytes",
    }
    for i, (unit, rate) in enumerate(units.items()):
        ax.text(8.5 + 14.3 * i, 19, unit, ha="center", va="center", fontsize=SMALL)
        box(ax, 2 + 14.3 * i, 23, 13, 9, rate, style.LIGHT)
    box(ax, 2, 34.5, 56, 6, "registers: 256 KB", "#F3CE7E")
    box(ax, 2, 42.5, 56, 6, "shared memory and L1 cache: 256 KB", "#F3CE7E")
    ax.text(0.5, 55.5, "shared by all 132 SMs", fontsize=10, fontweight="bold")
    box(ax, 0.5, 57.5, 59, 6, "L2 cache: 50 MB", "#F3CE7E")
    box(ax, 0.5, 66, 59, 6, "HBM: 141 GB, 4.8 TB/s", "#F3CE7E")
    style.show()


# --- the cost model ------------------------------------------------------------------------------------------------


def ceilings(rows: Sequence[tuple[str, float, float, float]]) -> None:
    """Where each kernel's ceiling lies, and what was measured.

    Args:
        rows: (name, share of the peak if its units take turns, share if they all work at once, measured share).
    """
    _, ax = style.figure(width=style.NARROW, height=1.2 + 0.34 * len(rows))
    for i, (_, turns, at_once, measured) in enumerate(rows):
        ax.barh(i, at_once - turns, left=turns, height=0.5, color=style.SKY, alpha=0.6, edgecolor=style.INK)
        ax.plot(measured, i, "D", color=style.VERMILION, markersize=7, markeredgecolor="white")
    ax.barh(np.nan, 0, color=style.SKY, alpha=0.6, edgecolor=style.INK, label="model: in turns … all at once")
    ax.plot([], [], "D", color=style.VERMILION, markersize=7, label="measured")
    ax.set_yticks(range(len(rows)), [name for name, *_ in rows])
    ax.set(xlim=(0, 1.05), ylim=(len(rows) - 0.4, -0.6), xlabel="share of the data sheet's peak")
    ax.xaxis.set_major_formatter("{x:.0%}")
    ax.grid(axis="y", visible=False)
    ax.legend(loc="lower right", bbox_to_anchor=(1.02, 1.0), fontsize=SMALL)
    style.show()


# --- step 1 --------------------------------------------------------------------------------------------------------


def warp_per_query(d: int = 64) -> None:
    """Step 1: which lane holds which column. One warp, its query and one key."""
    _, ax = style.figure(width=style.NARROW, height=3.0)
    bare(ax, 64, 46)
    for y, name, marked in ((5, "q", style.BLUE), (17, "k, one key", style.SKY)):
        ax.text(0, y - 1.2, name, fontsize=SMALL)
        for column in range(d):
            colour = marked if column % LANES == 3 else "none"
            ax.add_patch(Rectangle((column, y), 1, 4, facecolor=colour, edgecolor=style.GREY, linewidth=0.5))
    for column in (3, 3 + LANES):
        ax.text(column + 0.5, 11.6, "×", ha="center", va="center", fontsize=12)
        ax.annotate("", (19.5, 29), (column + 0.5, 21.4), arrowprops={"arrowstyle": "->", "color": style.GREY})
    box(ax, 8, 29, 23, 6, "lane 3: a part", style.GREEN, alpha=0.4)
    box(ax, 40, 29, 23, 6, "31 other parts", "none")
    ax.annotate("", (32, 40.2), (20, 35.4), arrowprops={"arrowstyle": "->", "color": style.GREY})
    ax.annotate("", (32, 40.2), (51, 35.4), arrowprops={"arrowstyle": "->", "color": style.GREY})
    ax.text(32, 43.5, "5 shuffles: the score, in all 32 lanes", ha="center", fontsize=SMALL)
    style.show()


def sectors(rows: dict[str, Sequence[int]], sector: int = 32) -> None:
    """Which sectors of 32 bytes a request of 32 lanes touches, and which bytes of them it uses.

    Args:
        rows: name -> the byte address of each lane's float.
    """
    _, axes = style.figure(len(rows), 1, width=style.NARROW, height=1.25 * len(rows) + 0.3)
    for ax, (name, addresses) in zip(np.atleast_1d(axes), rows.items(), strict=True):
        touched = sorted({address // sector for address in addresses})
        shown = touched[:8]
        for place, index in enumerate(shown):
            ax.add_patch(Rectangle((place * 8.6, 0), 8, 1, facecolor="none", edgecolor=style.INK))
            for address in addresses:
                if address // sector == index:
                    ax.add_patch(Rectangle((place * 8.6 + address % sector / 4, 0), 1, 1, facecolor=style.BLUE))
        ax.set(xlim=(-0.3, 69), ylim=(1.1, -0.1), xticks=[], yticks=[])
        ax.spines[["left", "bottom"]].set_visible(False)
        ax.grid(False)
        used = 4 * len(addresses) / (sector * len(touched))
        some = " (8 shown)" if len(touched) > len(shown) else ""
        ax.set_title(f"{name}: {len(touched)} sectors{some}, {used:.0%} used", fontsize=10)
    style.show()


# --- step 2 --------------------------------------------------------------------------------------------------------


def thread_tile(rows: int = 64, keys: int = 64, x: int = 16, held: int = 4) -> None:
    """Step 2: the scores of a tile, and which of them one thread of the 256 holds."""
    _, (left, right) = style.figure(2, 1, width=style.NARROW, height=6.9, height_ratios=[0.8, 1])
    bare(left, 100, 88)
    box(left, 2, 20, 20, 50, "Q\n64 × d", style.ORANGE, alpha=0.5)
    box(left, 28, 2, 50, 12, "K (then V), 64 × d", style.SKY, alpha=0.6)
    box(left, 28, 20, 50, 50, "")
    box(left, 84, 20, 14, 50, "O\nin\nregis-\nters", style.GREEN, alpha=0.4)
    left.text(53, 45, "scores in registers,\nthen P in shared\nmemory", ha="center", va="center", fontsize=SMALL)
    left.text(2, 80, "orange, blue: shared memory, read by all threads", fontsize=SMALL)
    left.set_title("A block's tile", fontsize=10.5)
    right.set(xlim=(-0.5, keys), ylim=(rows, -0.5), aspect="equal", xlabel="keys", ylabel="queries")
    for (ty, tx), colour in {(5, 3): style.BLUE, (5, 4): style.SKY, (12, 11): style.VERMILION}.items():
        for i in range(held):
            for j in range(keys // x):
                cell = (tx + j * x, ty * held + i)
                right.add_patch(Rectangle(cell, 1, 1, facecolor=colour, edgecolor="white", linewidth=0.3))
        right.text(tx + 1.6, ty * held - 1, f"y {ty}, x {tx}" if tx != 4 else "", fontsize=SMALL, color=style.INK)
    right.set_xticks(range(0, keys + 1, x))
    right.set_yticks(range(0, rows + 1, x))
    right.set_title("Scores of three of its threads", fontsize=10.5)
    style.show()


def banks(strides: dict[str, int], lanes: int = 8, shown: int = 8) -> None:
    """Which of the 32 banks eight lanes hit that read 16 bytes of eight neighbouring rows.

    Args:
        strides: name -> length of a row of the tile, in floats of 4 bytes.
    """
    _, axes = style.figure(len(strides), 1, width=style.NARROW, height=1.8 * len(strides) + 0.3, sharex=True)
    for ax, (name, stride) in zip(np.atleast_1d(axes), strides.items(), strict=True):
        hits = np.zeros(BANKS, dtype=int)
        for lane in range(lanes):
            first = lane * stride % BANKS
            box(ax, first, hits[first], 4, 1, str(lane), style.BLUE, ink="white")
            hits[first : first + 4] += 1
        ax.set(xlim=(0, BANKS), ylim=(0, shown + 0.2), yticks=[0, 4, 8], ylabel="turns")
        ax.set_title(f"{name}: {hits.max()} turn{'s' if hits.max() > 1 else ''}", fontsize=10.5)
    axes = np.atleast_1d(axes)
    axes[-1].set_xticks(range(0, BANKS + 1, 4))
    axes[-1].set_xlabel("bank of shared memory; in the boxes: lane")
    style.show()


# --- step 3 --------------------------------------------------------------------------------------------------------


def fragments(owners: dict[str, tuple[Callable[[int, int], tuple[int, int]], int]], marked: int = 5) -> None:
    """Which lane holds each element of the operands of one mma.sync, and in which of its registers.

    Args:
        owners: three times name -> (a function (row, column) -> (lane, register), number of columns); 16 rows each.
        marked: the lane whose elements have a frame.
    """
    figure, axes = style.figure(2, 2, width=style.NARROW, height=8.3)
    grid = axes[0, 0].get_gridspec()
    for ax in axes[0]:
        ax.remove()
    places = [figure.add_subplot(grid[0, :]), axes[1, 0], axes[1, 1]]
    for ax, (name, (owner, columns)) in zip(places, owners.items(), strict=True):
        beside = owner(0, 0)[0] == owner(0, 1)[0]  # a lane holds two neighbouring columns, or two neighbouring rows
        down, right = (1, 2) if beside else (2, 1)
        for row in range(0, 16, down):
            for column in range(0, columns, right):
                (lane, first), (_, second) = owner(row, column), owner(row + down - 1, column + right - 1)
                look = {"alpha": 0.45, "linewidth": 0}
                ax.add_patch(Rectangle((column, row), right, down, facecolor=style.PALETTE[first], **look))
                if first != second:
                    look = {"facecolor": style.PALETTE[second], "linewidth": 0}
                    ax.add_patch(Rectangle((column + 1, row), 1, 1, facecolor="white", linewidth=0))
                    ax.add_patch(Rectangle((column + 1, row), 1, 1, alpha=0.45, **look))
                frame, width = (style.INK, 1.8) if lane == marked else ("white", 0.6)
                look = {"facecolor": "none", "edgecolor": frame, "linewidth": width, "zorder": 2 + (lane == marked)}
                ax.add_patch(Rectangle((column, row), right, down, **look))
                at, weight = (column + right / 2, row + down / 2 + 0.03), "bold" if lane == marked else "normal"
                ax.text(*at, lane, ha="center", va="center", fontsize=SMALL, weight=weight)
        ax.set(xlim=(0, columns), ylim=(16, 0), aspect="equal")
        ax.set_xticks(range(0, columns + 1, 8))
        ax.set_yticks(range(0, 17, 8))
        ax.set_title(name, fontsize=10)
        ax.grid(False)
    style.show()


def bars(ax: Axes, lane: float, pieces: Sequence[tuple[float, float, str, str]], height: float = 0.62) -> None:
    """Pieces of work in one lane of a timeline: (start, length, text, colour)."""
    for start, length, text, colour in pieces:
        ax.barh(lane, length, left=start, height=height, color=colour, alpha=0.75, edgecolor=style.INK, linewidth=0.7)
        ax.text(start + length / 2, lane, text, ha="center", va="center", fontsize=SMALL)


def timeline(ax: Axes, names: Sequence[str], end: float, xlabel: str = "time") -> None:
    """Lanes from top to bottom, no numbers on the time axis."""
    ax.set_yticks(range(len(names)), names)
    ax.set(ylim=(len(names) - 0.45, -0.55), xlim=(0, end), xticks=[], xlabel=xlabel)
    ax.grid(False)


def double_buffer(tiles: int = 3, load: float = 3.0, work: float = 5.0) -> None:
    """Loads and products of a few tiles: one buffer (they take turns), and two (they overlap)."""
    _, axes = style.figure(2, 1, width=style.NARROW, height=3.6, sharex=True)
    serial, at = ([], []), 0.0
    for i in range(tiles):
        serial[0].append((at, load, str(i), style.SKY))
        serial[1].append((at + load, work, f"tile {i}", style.ORANGE))
        at += load + work
    overlapped, ready = ([], []), 0.0
    for i in range(tiles):
        overlapped[0].append((ready if i else 0.0, load, str(i), style.SKY))
        start = load if i == 0 else max(ready + load, overlapped[1][-1][0] + work)
        overlapped[1].append((start, work, f"tile {i}", style.ORANGE))
        ready = start
    for ax, (loads, products), title in (
        (axes[0], serial, "One buffer"),
        (axes[1], overlapped, "Two buffers"),
    ):
        bars(ax, 0, loads)
        bars(ax, 1, products)
        timeline(ax, ["cp.async\nof tile", "tensor\ncores"], at + 0.5)
        ax.set_title(title, fontsize=10.5)
    axes[0].set_xlabel("")
    style.show()


# --- the ladder ----------------------------------------------------------------------------------------------------


def ladder(
    panels: dict[str, dict[str, tuple[float, float, float, float]]], here: dict[str, dict[str, float]] | None = None
) -> None:
    """TFLOP/s of every rung and of its peers, one panel for each shape and number format, with shares of its peak.

    Args:
        panels: title -> {name -> (TFLOP/s, the slow and the fast end of the middle 80 % of calls, share of the data
            sheet's peak)}; names that start with "step" or "backward" are the course's own.
        here: title -> {name -> TFLOP/s on this machine's GPU}, where there is one.
    """
    sizes = [len(rows) for rows in panels.values()]
    longest = max(len(name) for rows in panels.values() for name in rows)  # the wider the names, the narrower a title
    height = 0.9 * len(sizes) + 0.3 * sum(sizes)
    figure, axes = style.figure(len(panels), 1, width=style.NARROW, height=height, height_ratios=sizes)
    axes = np.atleast_1d(axes)
    for ax, (title, rows) in zip(axes, panels.items(), strict=True):
        marks = (here or {}).get(title, {})
        for i, (name, (rate, low, high, share)) in enumerate(rows.items()):
            own = name.startswith(("step", "backward"))
            ax.barh(i, rate, height=0.62, color=style.BLUE if own else style.GREY, alpha=1 if own else 0.6)
            ax.plot([low, high], [i, i], color=style.INK, linewidth=1.2)
            if name in marks:
                ax.plot(marks[name], i, "D", color=style.VERMILION, markeredgecolor="white", markersize=8)
            text = f"{rate:,.1f}" if rate < 10 else f"{rate:,.0f}"
            ax.annotate(text, (max(rate, high), i), (4, 0), textcoords="offset points", va="center", fontsize=SMALL)
            ax.text(1.0, i, f"{share:.0%}", transform=ax.get_yaxis_transform(), va="center", ha="right", fontsize=SMALL)
        ax.set_yticks(range(len(rows)), list(rows))
        ax.set(ylim=(len(rows) - 0.4, -0.6), xlabel="TFLOP/s; right: share of the peak")
        ax.set_title(textwrap.fill(title, 50 - longest), fontsize=10)
        ax.grid(axis="y", visible=False)
        if marks:
            ax.plot([], [], "D", color=style.VERMILION, label="on this machine")
            ax.legend(loc="lower right", fontsize=SMALL)
    figure.draw_without_rendering()  # only now it is known how wide the names of the bars leave the axes
    for ax, rows in zip(axes, panels.values(), strict=True):
        width = 72 * ax.get_window_extent().width / figure.dpi
        ax.set_xlim(0, max(max(rate, high) for rate, _, high, _ in rows.values()) * width / (width - ROOM))
    style.show()


def times(seconds: dict[str, float], limit: float = 0.0, flops: float = 0.0) -> None:
    """Milliseconds of a few ways to the same attention.

    Args:
        seconds: name -> seconds; names that hold "cpp" or "yours" are the course's own and the reader's.
        limit: FLOP/s of a matrix multiplication on the same device, which draws a line; 0 draws none.
        flops: of the attention.
    """
    _, ax = style.figure(width=style.NARROW, height=1.4 + 0.4 * len(seconds))
    names = list(seconds)
    values = [1e3 * seconds[name] for name in names]
    ax.barh(
        range(len(names)),
        values,
        color=[style.BLUE if "cpp" in name or "yours" in name else style.GREY for name in names],
        height=0.6,
    )
    for i, value in enumerate(values):
        label = f"{value:,.0f} ms"
        ax.annotate(label, (value, i), (5, 0), textcoords="offset points", va="center", fontsize=SMALL, bbox=GROUND)
    if limit:
        at = 1e3 * flops / limit
        ax.axvline(at, color=style.VERMILION, linestyle="--", label="a matmul of as many FLOPs")
    ax.set_yticks(range(len(names)), names)
    ax.set(xlabel="milliseconds", ylim=(len(names) - 0.4, -0.6), xlim=(0, max(values) * 1.3))
    ax.grid(axis="y", visible=False)
    if limit:
        ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), fontsize=SMALL)
    style.show()


def busy(lengths: Sequence[int], shares: dict[str, Sequence[float]]) -> None:
    """The share of the SMs' time that has a tile to work on, over the length of a text.

    Args:
        lengths: tokens.
        shares: name -> a share for each length.
    """
    _, ax = style.figure(width=style.NARROW, height=3.8)
    style.lines(ax, lengths, shares)
    style.log2_axis(ax, lengths[::2])
    ax.yaxis.set_major_formatter("{x:.0%}")
    ax.set(xlabel="tokens", ylabel="SM time with work", ylim=(0, 1.05))
    ax.legend(loc="lower right")
    style.show()
