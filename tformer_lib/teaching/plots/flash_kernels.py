"""Figures of the chapter on the kernels of flash attention."""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from tformer_lib.teaching import style

LANES = 32
BANKS = 32
TERA = 1e12


def box(
    ax: Axes, x: float, y: float, width: float, height: float, text: str = "", colour: str = "none", **look
) -> None:
    """A rectangle with a text in its middle."""
    size = look.pop("size", 9)
    ink = look.pop("ink", style.INK)
    ax.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor=style.INK, linewidth=0.8, **look))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color=ink)


def bare(ax: Axes, width: float, height: float) -> None:
    """An axes without ticks, y downwards, for a drawing of this size."""
    ax.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.grid(False)


# --- the machine ---------------------------------------------------------------------------------------------------


def multiprocessor() -> None:
    """What is inside one multiprocessor of an H200, what each part does in a cycle, and what lies below it."""
    _, ax = style.figure(height=3.9)
    bare(ax, 100, 60)
    ax.add_patch(Rectangle((1, 5), 66, 40.5, facecolor="none", edgecolor=style.INK, linewidth=1.4))
    ax.text(1, 3.6, "one multiprocessor, in one cycle", fontsize=10, fontweight="bold")
    box(ax, 3, 7, 62, 6.5, "4 schedulers: each starts an instruction of one warp", "#E3E6EA")
    units = {
        "tensor cores": "4,096\noperations",
        "float32 lanes": "256\noperations",
        "special\nfunctions": "16\nexponentials",
        "loads and\nstores": "128\nbytes",
    }
    for i, (unit, rate) in enumerate(units.items()):
        ax.text(10 + 15.8 * i, 16.4, unit, ha="center", va="center", fontsize=9)
        box(ax, 3 + 15.8 * i, 19, 14.6, 9, rate, style.SKY)
    box(ax, 3, 31, 62, 5.5, "registers of all threads: 256 KB", "#F3CE7E")
    box(ax, 3, 38.2, 62, 5.5, "shared memory and first cache: 256 KB", "#F3CE7E")
    box(ax, 1, 48, 98, 5, "second cache: 60 MB", "#F3CE7E")
    box(ax, 1, 54.5, 98, 5, "main memory: 141 GB", "#F3CE7E")
    for i in range(12):
        box(ax, 72 + 9.2 * (i % 3), 5 + 10.4 * (i // 3), 8.2, 9.3)
    ax.text(72, 3.6, "131 more", fontsize=10, fontweight="bold")
    style.show()


# --- the cost model ------------------------------------------------------------------------------------------------


def ceilings(rows: Sequence[tuple[str, float, float, float]]) -> None:
    """Where each kernel's ceiling lies, and what was measured.

    Args:
        rows: (name, share of the limit if its units take turns, share if they all work at once, measured share).
    """
    _, ax = style.figure(height=0.7 + 0.42 * len(rows))
    for i, (_, turns, at_once, measured) in enumerate(rows):
        ax.barh(i, at_once - turns, left=turns, height=0.5, color=style.SKY, alpha=0.6, edgecolor=style.INK)
        ax.plot(measured, i, "D", color=style.VERMILION, markersize=8, markeredgecolor="white")
    ax.barh(np.nan, 0, color=style.SKY, alpha=0.6, edgecolor=style.INK, label="model: taking turns … all at once")
    ax.plot([], [], "D", color=style.VERMILION, markersize=8, label="measured")
    ax.set_yticks(range(len(rows)), [name for name, *_ in rows])
    ax.set(xlim=(0, 1.05), ylim=(len(rows) - 0.4, -0.6), xlabel="share of a matrix product's speed on the same device")
    ax.xaxis.set_major_formatter("{x:.0%}")
    ax.grid(axis="y", visible=False)
    ax.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=2)
    style.show()


# --- step 1 --------------------------------------------------------------------------------------------------------


def warp_per_query(d: int = 64) -> None:
    """Step 1: who holds what. Eight warps of a block, each with one query, all reading the same keys."""
    _, ax = style.figure(height=3.4)
    bare(ax, 100, 50)
    for warp in range(8):
        y = 9 + 4.6 * warp
        ax.text(1, y + 1.8, f"warp {warp}", fontsize=9, va="center")
        for column in range(d // LANES):
            for lane in range(LANES):
                colour = style.BLUE if lane == 3 else "none"
                x = 11 + (column * LANES + lane) * 0.82
                ax.add_patch(Rectangle((x, y), 0.82, 3.6, facecolor=colour, edgecolor=style.GREY, linewidth=0.4))
        ax.annotate("", (73, y + 1.8), (64.5, y + 1.8), arrowprops={"arrowstyle": "->", "color": style.GREY})
    ax.text(11, 5, f"q, {d} columns: lane 3 holds the blue ones", fontsize=9.5)
    box(ax, 73, 9, 9, 36, "one key\nat a time\n\nk and v", style.SKY, alpha=0.6)
    ax.annotate("", (88, 27), (82.5, 27), arrowprops={"arrowstyle": "->"})
    ax.text(88.5, 27, "5 shuffles:\none score,\nin all\n32 lanes", fontsize=9, va="center")
    ax.text(73, 5, "every warp reads", fontsize=9.5)
    style.show()


# --- step 2 --------------------------------------------------------------------------------------------------------


def thread_tile(rows: int = 64, keys: int = 64, x: int = 16, held: int = 4) -> None:
    """Step 2: the scores of a tile, and which of them one thread of the 256 holds."""
    _, (left, right) = style.figure(1, 2, height=3.5, width_ratios=[1.15, 1])
    bare(left, 100, 88)
    box(left, 2, 20, 20, 50, "Q\n64 × d", style.ORANGE, alpha=0.5)
    box(left, 28, 2, 50, 12, "K (then V), 64 × d", style.SKY, alpha=0.6)
    box(left, 28, 20, 50, 50, "")
    box(left, 84, 20, 14, 50, "O\nin\nregis-\nters", style.GREEN, alpha=0.4)
    left.text(53, 45, "scores in registers,\nthen P in shared\nmemory", ha="center", va="center", fontsize=9)
    left.text(2, 80, "orange, blue: shared memory, read by all", fontsize=9)
    left.set_title("A block's tile", fontsize=10.5)
    right.set(xlim=(-0.5, keys), ylim=(rows, -0.5), aspect="equal", xlabel="keys", ylabel="queries")
    for (ty, tx), colour in {(5, 3): style.BLUE, (5, 4): style.SKY, (12, 11): style.VERMILION}.items():
        for i in range(held):
            for j in range(keys // x):
                cell = (tx + j * x, ty * held + i)
                right.add_patch(Rectangle(cell, 1, 1, facecolor=colour, edgecolor="white", linewidth=0.3))
        right.text(tx + 1.6, ty * held - 1, f"y {ty}, x {tx}" if tx != 4 else "", fontsize=8, color=style.INK)
    right.set_xticks(range(0, keys + 1, x))
    right.set_yticks(range(0, rows + 1, x))
    right.set_title("Scores of three of its threads", fontsize=10.5)
    style.show()


def banks(strides: dict[str, int], lanes: int = 8, shown: int = 8) -> None:
    """Which of the 32 banks eight lanes hit that read 16 bytes of eight neighbouring rows.

    Args:
        strides: name -> length of a row of the tile, in floats of 4 bytes.
    """
    _, axes = style.figure(len(strides), 1, height=1.7 * len(strides) + 0.3, sharex=True)
    for ax, (name, stride) in zip(np.atleast_1d(axes), strides.items(), strict=True):
        hits = np.zeros(BANKS, dtype=int)
        for lane in range(lanes):
            first = lane * stride % BANKS
            look = {"size": 8, "ink": "white"}
            box(ax, first, hits[first], 4, 1, f"lane {lane}", style.BLUE, **look)
            hits[first : first + 4] += 1
        ax.set(xlim=(0, BANKS), ylim=(0, shown + 0.2), yticks=[0, 4, 8], ylabel="turns")
        ax.set_title(f"{name}: {hits.max()} turn{'s' if hits.max() > 1 else ''}", fontsize=10.5)
    axes = np.atleast_1d(axes)
    axes[-1].set_xticks(range(0, BANKS + 1, 4))
    axes[-1].set_xlabel("bank of shared memory (4 bytes wide each)")
    style.show()


# --- step 3 --------------------------------------------------------------------------------------------------------


def fragments(owners: dict[str, Callable[[int, int], tuple[int, int]]], shapes: dict[str, tuple[int, int]]) -> None:
    """Which lane holds each element of the operands of one mma.sync, and in which of its registers.

    Args:
        owners: name -> a function (row, column) -> (lane, register).
        shapes: name -> (rows, columns).
    """
    _, axes = style.figure(1, 3, height=4.0, width_ratios=[shapes[name][1] for name in owners])
    for ax, (name, owner) in zip(axes, owners.items(), strict=True):
        rows, columns = shapes[name]
        for row in range(rows):
            for column in range(columns):
                lane, register = owner(row, column)
                colour = style.PALETTE[register]
                ax.add_patch(
                    Rectangle((column, row), 1, 1, facecolor=colour, alpha=0.45, edgecolor="white", linewidth=0.6)
                )
                weight = "bold" if lane == 5 else "normal"
                ax.text(column + 0.5, row + 0.53, lane, ha="center", va="center", fontsize=6.5, weight=weight)
        ax.set(xlim=(0, columns), ylim=(rows, 0), aspect="equal")
        ax.set_xticks(range(0, columns + 1, 8))
        ax.set_yticks(range(0, rows + 1, 8))
        ax.set_title(name, fontsize=10)
        ax.grid(False)
    style.show()


def bars(ax: Axes, lane: float, pieces: Sequence[tuple[float, float, str, str]], height: float = 0.62) -> None:
    """Pieces of work in one lane of a timeline: (start, length, text, colour)."""
    for start, length, text, colour in pieces:
        ax.barh(lane, length, left=start, height=height, color=colour, alpha=0.75, edgecolor=style.INK, linewidth=0.7)
        ax.text(start + length / 2, lane, text, ha="center", va="center", fontsize=8.5)


def timeline(ax: Axes, names: Sequence[str], end: float, xlabel: str = "time") -> None:
    """Lanes from top to bottom, no numbers on the time axis."""
    ax.set_yticks(range(len(names)), names)
    ax.set(ylim=(len(names) - 0.45, -0.55), xlim=(0, end), xticks=[], xlabel=xlabel)
    ax.grid(False)


def double_buffer(tiles: int = 4, load: float = 2.2, work: float = 3.0) -> None:
    """Loads and products of a few tiles: one buffer (they take turns), and two (they overlap)."""
    _, axes = style.figure(2, 1, height=3.3, sharex=True)
    serial, at = ([], []), 0.0
    for i in range(tiles):
        serial[0].append((at, load, f"load {i}", style.SKY))
        serial[1].append((at + load, work, f"tile {i}", style.ORANGE))
        at += load + work
    overlapped, ready = ([], []), 0.0
    for i in range(tiles):
        overlapped[0].append((ready if i else 0.0, load, f"load {i}", style.SKY))
        start = load if i == 0 else max(ready + load, overlapped[1][-1][0] + work)
        overlapped[1].append((start, work, f"tile {i}", style.ORANGE))
        ready = start
    for ax, (loads, products), title in (
        (axes[0], serial, "One buffer: the tensor cores wait for every load"),
        (axes[1], overlapped, "Two buffers: tile i + 1 is on its way while tile i is multiplied"),
    ):
        bars(ax, 0, loads)
        bars(ax, 1, products)
        timeline(ax, ["cp.async", "tensor cores"], at + 0.5)
        ax.set_title(title, fontsize=10.5)
    axes[0].set_xlabel("")
    style.show()


# --- step 4 --------------------------------------------------------------------------------------------------------


def ring(tiles: int = 5, stages: int = 2, load: float = 1.6, work: float = 2.4) -> None:
    """A producer, two buffers, a consumer: who waits for which barrier, and the parity of its phase."""
    _, ax = style.figure(height=3.3)
    colours = (style.SKY, style.ORANGE)
    loads, uses, at = [], [], 0.0
    for i in range(tiles):
        free = uses[i - stages][0] + uses[i - stages][1] if i >= stages else 0.0
        start = max(at, free)
        loads.append((start, load, f"K{i}", colours[i % stages]))
        at = start + load
        begin = max(at, uses[-1][0] + uses[-1][1] if uses else 0.0)
        uses.append((begin, work, f"Q K{i}", colours[i % stages]))
    bars(ax, 0, loads)
    bars(ax, 3, uses)
    for i in range(tiles):
        stage, phase, height = i % stages, i // stages % 2, 1 + i % stages
        full, empty = loads[i][0] + load, uses[i][0] + work
        ax.barh(height, empty - full, left=full, height=0.5, color=colours[stage], alpha=0.35, edgecolor=style.GREY)
        ax.text(full + 0.06, height, f"full, phase {phase}", fontsize=8, va="center")
        ax.annotate("", (full, height - 0.25), (full, 0.32), arrowprops={"arrowstyle": "->", "color": style.GREY})
        if i + stages < tiles:
            ax.annotate("", (empty, 0.34), (empty, height + 0.25), arrowprops={"arrowstyle": "->", "linestyle": ":"})
    timeline(ax, ["producer, TMA", "buffer 0", "buffer 1", "consumer"], uses[-1][0] + work + 0.2)
    style.show()


def causal_order(orders: dict[str, Sequence[Sequence[int]]]) -> None:
    """What each persistent block does when, for causal tiles of different length: tile i has i + 1 tiles of keys.

    Args:
        orders: name -> for each block, the tiles that it takes, in order.
    """
    _, axes = style.figure(len(orders), 1, height=1.55 * len(orders) + 0.4, sharex=True)
    most = max(tile + 1 for blocks in orders.values() for tiles in blocks for tile in tiles)
    longest = max(sum(tile + 1 for tile in tiles) for blocks in orders.values() for tiles in blocks)
    for ax, (name, blocks) in zip(axes, orders.items(), strict=True):
        ends = [sum(tile + 1 for tile in tiles) for tiles in blocks]
        for block, tiles in enumerate(blocks):
            at = 0
            for tile in tiles:
                share = (tile + 1) / most
                ax.barh(
                    block, tile + 1, left=at, height=0.8, color=style.WEIGHTS(0.15 + 0.5 * share), edgecolor="white"
                )
                ink = "white" if share > 0.6 else style.INK
                ax.text(at + (tile + 1) / 2, block, tile, ha="center", va="center", fontsize=8, color=ink)
                at += tile + 1
        ax.axvline(sum(ends) / len(ends), color=style.VERMILION, linestyle="--", linewidth=1.4)
        ax.set(ylim=(len(blocks) - 0.4, -0.6), xlim=(0, longest + 0.5), ylabel="block", yticks=range(len(blocks)))
        ax.set_title(f"{name}: the last block ends at {max(ends)}", fontsize=10.5)
        ax.grid(axis="y", visible=False)
    axes[-1].set_xlabel("time, in tiles of keys; dashed: all blocks end together")
    style.show()


# --- the ladder ----------------------------------------------------------------------------------------------------


def ladder(panels: dict[str, dict[str, tuple[float, float]]], here: dict[str, dict[str, float]] | None = None) -> None:
    """TFLOP/s of every step and of what stands beside it, with the share of the limit that is.

    Args:
        panels: title -> {name -> (TFLOP/s, share of a matrix product on the same device)}; names that start with
            "step" or "backward" are the course's own.
        here: title -> {name -> TFLOP/s on this machine's GPU}, where there is one.
    """
    _, axes = style.figure(1, len(panels), height=4.2, sharey=True)
    for ax, (title, rows) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        marks = (here or {}).get(title, {})
        for i, (name, (rate, share)) in enumerate(rows.items()):
            own = name.startswith(("step", "backward"))
            ax.barh(i, rate, height=0.62, color=style.BLUE if own else style.GREY, alpha=1 if own else 0.6)
            if name in marks:
                ax.plot(marks[name], i, "D", color=style.VERMILION, markeredgecolor="white", markersize=8)
            ax.text(rate + 8, i, f"{rate:,.1f}" if rate < 10 else f"{rate:,.0f}", va="center", fontsize=9)
            ax.text(1.0, i, f"{share:.0%}", transform=ax.get_yaxis_transform(), va="center", ha="right", fontsize=9)
        most = max(rate for rate, _ in rows.values())
        ax.set_yticks(range(len(rows)), list(rows))
        ax.set(xlim=(0, most * 1.45), ylim=(len(rows) - 0.4, -0.6), xlabel="TFLOP/s")
        ax.set_title(title, fontsize=10.5)
        ax.grid(axis="y", visible=False)
        if marks:
            ax.plot([], [], "D", color=style.VERMILION, label="on this machine")
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12))
    style.show()


def times(seconds: dict[str, float], limit: float, flops: float) -> None:
    """Milliseconds of a few ways to the same attention on this CPU, and the fewest that the operations allow."""
    _, ax = style.figure(height=0.9 + 0.4 * len(seconds))
    names = list(seconds)
    values = [1e3 * seconds[name] for name in names]
    ax.barh(
        range(len(names)), values, color=[style.BLUE if "cpp" in name else style.GREY for name in names], height=0.6
    )
    for i, value in enumerate(values):
        ax.text(value * 1.03, i, f"{value:,.0f} ms", va="center", fontsize=9)
    ax.axvline(
        1e3 * flops / limit, color=style.VERMILION, linestyle="--", label="a matrix product of as many operations"
    )
    ax.set_yticks(range(len(names)), names)
    ax.set(xlabel="milliseconds", ylim=(len(names) - 0.4, -0.6), xlim=(0, max(values) * 1.2))
    ax.grid(axis="y", visible=False)
    ax.legend(loc="lower right")
    style.show()


def busy(lengths: Sequence[int], shares: dict[str, Sequence[float]]) -> None:
    """The share of the multiprocessors' time that has a tile to work on, over the length of a text.

    Args:
        lengths: tokens.
        shares: name -> a share for each length.
    """
    _, ax = style.figure(height=3.2)
    style.lines(ax, lengths, shares)
    style.log2_axis(ax, lengths)
    ax.yaxis.set_major_formatter("{x:.0%}")
    ax.set(xlabel="tokens", ylabel="multiprocessor time with work", ylim=(0, 1.05))
    ax.legend(loc="lower right")
    style.show()
