"""Figures of the chapter on flash attention for Hopper: narrow, so that a phone can show their labels."""

from collections.abc import Sequence

from matplotlib.patches import Rectangle

from tformer_lib.teaching import style
from tformer_lib.teaching.plots.flash_kernels import SMALL, bare, bars, box, timeline


def accumulator(row: int = 20, column: int = 2, warp: int = 1) -> None:
    """The accumulator of a wgmma: which warp holds which rows, and which lane which elements of one warp's part.

    Args:
        row, column: the element that gets a frame.
        warp: the warp whose 16 x 8 part is drawn large.
    """
    _, ax = style.figure(width=style.NARROW, height=5.2)
    bare(ax, 42, 52)
    for w in range(4):
        colour = style.SKY if w == warp else "none"
        box(ax, 0, 6 + 11 * w, 13, 11, f"warp {w}\nrows {16 * w}\nto {16 * w + 15}", colour, alpha=0.7)
    ax.text(6.5, 3.8, "64 rows × N", ha="center", fontsize=10, fontweight="bold")
    for corner, target in ((6 + 11 * warp, 6.0), (6 + 11 * (warp + 1), 50.0)):
        ax.plot([13, 18], [corner, target], color=style.GREY, linewidth=0.8)
    ax.text(30, 3.8, f"warp {warp}, columns 0 to 7", ha="center", fontsize=10, fontweight="bold")
    for r in range(16):
        ax.text(19.6, 6 + 2.75 * (r + 0.5), 16 * warp + r, ha="right", va="center", fontsize=SMALL)
        for pair in range(4):
            lane, marked = r % 8 * 4 + pair, 16 * warp + r == row and pair == column // 2
            x, y = 20.3 + 5.3 * pair, 6 + 2.75 * r
            for i in range(2):
                colour = style.PALETTE[2 * (r // 8) + i]
                ax.add_patch(Rectangle((x + 2.65 * i, y), 2.65, 2.75, facecolor=colour, alpha=0.4, linewidth=0))
            edge, width = (style.INK, 2.0) if marked else ("white", 0.7)
            look = {"facecolor": "none", "edgecolor": edge, "linewidth": width, "zorder": 2 + marked}
            ax.add_patch(Rectangle((x, y), 5.3, 2.75, **look))
            weight = "bold" if marked else "normal"
            ax.text(x + 2.65, y + 1.45, lane, ha="center", va="center", fontsize=SMALL, weight=weight)
    style.show()


def descriptor(value: int, fields: Sequence[tuple[str, int, int]]) -> None:
    """The 64 bits of a shared-memory descriptor, highest on top, with what each field says.

    Args:
        value: the descriptor.
        fields: (name, lowest bit, number of bits).
    """
    _, ax = style.figure(width=style.NARROW, height=3.9)
    bare(ax, 32, 29)
    for bit in range(64):
        x, y = 31 - bit % 32, 2.2 + 6.5 * (1 - bit // 32)
        owner = next((i for i, (_, low, count) in enumerate(fields) if low <= bit < low + count), None)
        colour = style.PALETTE[owner] if owner is not None else style.GREY
        on = value >> bit & 1
        look = {"facecolor": colour, "alpha": 0.5 if on else 0.15, "edgecolor": "white", "linewidth": 0.6}
        ax.add_patch(Rectangle((x, y), 1, 3, **look))
        if on:
            ax.text(x + 0.5, y + 1.6, "1", ha="center", va="center", fontsize=SMALL, color=style.INK)
    for bit in (63, 48, 32, 31, 16, 0):
        ax.text(31.5 - bit % 32, 1.2 + 6.5 * (1 - bit // 32), bit, ha="center", va="center", fontsize=SMALL)
    for i, (name, low, count) in enumerate(fields):
        y = 15.5 + 2.7 * i
        ax.add_patch(Rectangle((0, y - 0.9), 1.2, 1.8, facecolor=style.PALETTE[i], alpha=0.5))
        number = value >> low & ((1 << count) - 1)
        ax.text(1.9, y, f"bits {low} to {low + count - 1}: {name} = {number}", va="center", fontsize=SMALL)
    style.show()


def swizzle_map(rows: int = 8, chunks: int = 8) -> None:
    """Where TMA puts the 16-byte pieces of eight rows: cell (row, place) says which piece lies there."""
    _, ax = style.figure(width=3.6, height=3.5)
    for row in range(rows):
        for place in range(chunks):
            chunk = place ^ row
            look = {"facecolor": style.PALETTE[chunk % 6], "alpha": 0.45, "edgecolor": "white", "linewidth": 0.8}
            ax.add_patch(Rectangle((place, row), 1, 1, **look))
            weight = "bold" if chunk == 3 else "normal"
            ax.text(place + 0.5, row + 0.54, chunk, ha="center", va="center", fontsize=SMALL, weight=weight)
            if chunk == 3:
                frame = {"facecolor": "none", "edgecolor": style.INK, "linewidth": 1.8, "zorder": 3}
                ax.add_patch(Rectangle((place, row), 1, 1, **frame))
    ax.set(xlim=(0, chunks), ylim=(rows, 0), aspect="equal", ylabel="row")
    ax.set_xticks([i + 0.5 for i in range(chunks)], range(chunks))
    ax.set_yticks([i + 0.5 for i in range(rows)], range(rows))
    ax.set_xlabel("place in the row (each is 4 banks)")
    ax.grid(False)
    style.show()


def registers(layouts: dict[str, Sequence[tuple[str, int, int]]], most: int = 65536) -> None:
    """How the registers of an SM are shared out.

    Args:
        layouts: title -> (whose, threads, registers of each).
        most: registers of an SM.
    """
    _, ax = style.figure(width=style.NARROW, height=0.9 + 1.0 * len(layouts))
    colours = (style.SKY, style.ORANGE, style.GREEN)
    for i, (_, parts) in enumerate(layouts.items()):
        at = 0
        for j, (whose, threads, each) in enumerate(parts):
            size = threads * each
            ax.barh(i, size, left=at, height=0.5, color=colours[j], alpha=0.55, edgecolor=style.INK, linewidth=0.7)
            ax.text(at + size / 2, i, each, ha="center", va="center", fontsize=SMALL)
            ax.text(at + size / 2, i - 0.38, whose, ha="center", va="center", fontsize=SMALL)
            at += size
    ax.axvline(most, color=style.VERMILION, linestyle="--", linewidth=1.4)
    ax.set_yticks(range(len(layouts)), list(layouts))
    ax.set(xlim=(0, most * 1.03), ylim=(len(layouts) - 0.5, -0.6), xlabel="registers of the SM; dashed: 65,536")
    ax.set_xticks([0, 16384, 32768, 49152], ["0", "16k", "32k", "48k"])
    ax.grid(axis="y", visible=False)
    style.show()


def ring(tiles: int = 4, stages: int = 2, load: float = 1.6, work: float = 2.4) -> None:
    """A producer, two buffers, a consumer: when each buffer is full, and the phase of its barrier."""
    _, ax = style.figure(width=style.NARROW, height=3.6)
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
        ax.text(full + 0.16, height, phase, fontsize=SMALL, va="center")
        ax.annotate("", (full, height - 0.25), (full, 0.32), arrowprops={"arrowstyle": "->", "color": style.GREY})
        if i + stages < tiles:
            ax.annotate("", (empty, 0.34), (empty, height + 0.25), arrowprops={"arrowstyle": "->", "linestyle": ":"})
    timeline(ax, ["TMA", "buffer 0:\nphase", "buffer 1:\nphase", "tensor\ncores"], uses[-1][0] + work + 0.2)
    style.show()


def causal_order(orders: dict[str, Sequence[Sequence[int]]]) -> None:
    """What each persistent block does when, for causal tiles of different length: tile i has i + 1 tiles of keys.

    Args:
        orders: name -> for each block, the tiles that it takes, in order.
    """
    _, axes = style.figure(len(orders), 1, width=style.NARROW, height=1.7 * len(orders) + 0.4, sharex=True)
    most = max(tile + 1 for blocks in orders.values() for tiles in blocks for tile in tiles)
    longest = max(sum(tile + 1 for tile in tiles) for blocks in orders.values() for tiles in blocks)
    for ax, (name, blocks) in zip(axes, orders.items(), strict=True):
        ends = [sum(tile + 1 for tile in tiles) for tiles in blocks]
        for block, tiles in enumerate(blocks):
            at = 0
            for tile in tiles:
                share = (tile + 1) / most
                ax.barh(block, tile + 1, left=at, height=0.8, color=style.PALE(0.15 + 0.85 * share), edgecolor="white")
                ax.text(at + (tile + 1) / 2, block, tile, ha="center", va="center", fontsize=SMALL)
                at += tile + 1
        ax.axvline(sum(ends) / len(ends), color=style.VERMILION, linestyle="--", linewidth=1.4)
        ax.set(ylim=(len(blocks) - 0.4, -0.6), xlim=(0, longest + 0.5), ylabel="block", yticks=range(len(blocks)))
        ax.set_title(f"{name}: ends at {max(ends)}", fontsize=10.5)
        ax.grid(axis="y", visible=False)
    axes[-1].set_xlabel("time, in tiles of keys; dashed: all end together")
    style.show()
