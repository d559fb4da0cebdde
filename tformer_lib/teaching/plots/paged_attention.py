"""The figures of chapter 18: narrow, so that a phone can show their labels."""

import textwrap
from collections.abc import Sequence

import torch
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from tformer_lib.paged_attention import BlockTable
from tformer_lib.teaching import style

KINDS = ("keys and values", "reserved, used later", "reserved, never used", "free")
COLOURS = (style.BLUE, style.SKY, "#F3C98B", "#FFFFFF")
HATCHES = ("", "//", "xx", "")


def shares(found: dict[str, Sequence[float]]) -> None:
    """Stacked bars: what the slots of a pool are used for under each policy.

    Args:
        found: name -> four shares that add up to 1, in the order of KINDS.
    """
    _, ax = style.figure(width=style.NARROW, height=0.55 * len(found) + 1.35)
    left = torch.zeros(len(found))
    for kind, colour, hatch, values in zip(KINDS, COLOURS, HATCHES, zip(*found.values(), strict=True), strict=True):
        widths = 100 * torch.tensor(values)
        bars = ax.barh(range(len(found)), widths, left=left, color=colour, hatch=hatch, edgecolor=style.INK, label=kind)
        for bar in bars:
            bar.set_linewidth(0.6)
        left += widths
    for row, values in enumerate(found.values()):
        colour = "white" if values[0] > 0.1 else style.INK
        ax.text(1, row, f"{100 * values[0]:.0f} %", va="center", color=colour, fontweight="bold")
    ax.set_yticks(range(len(found)), [textwrap.fill(name, 13) for name in found])
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.set(xlabel="share of the slots, in percent", xlim=(0, 100))
    ax.figure.legend(ncols=2, loc="outside lower center", columnspacing=1.0)
    style.show()


def maps(memories: dict[str, Tensor], *, columns: int = 64) -> None:
    """What stands in each part of a pool at one moment, row by row like a page of text.

    Args:
        memories: name -> (cells,) int64, an index into KINDS for each cell.
        columns: cells in a row.
    """
    _, axes = style.figure(len(memories), 1, width=style.NARROW, height=1.25 * len(memories) + 0.6)
    colours = ListedColormap([*COLOURS])
    for ax, (name, cells) in zip(axes, memories.items(), strict=True):
        ax.imshow(cells.view(-1, columns).numpy(), cmap=colours, vmin=0, vmax=3, aspect="auto", interpolation="nearest")
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
        ax.spines[:].set_visible(True)
        ax.set_title(name, fontsize=10)
    looks = zip(KINDS, COLOURS, strict=True)
    patches = [Patch(facecolor=colour, edgecolor=style.INK, linewidth=0.6, label=kind) for kind, colour in looks]
    axes[0].figure.legend(handles=patches, ncols=2, loc="outside lower center", columnspacing=1.0)
    style.show()


def page_table(tables: dict[str, BlockTable], texts: dict[str, Sequence[str]], blocks: int) -> None:
    """Sequences as they see themselves, and where their blocks lie in the pool.

    Args:
        tables: name -> the sequence's block table.
        texts: name -> its words.
        blocks: how many blocks the pool has.
    """
    size = next(iter(tables.values())).allocator.block_size
    pitch, line = size + 0.6, 1.45  # from one block to the next, and from one line to the next
    lines = sum(-(-len(table.blocks) // 2) for table in tables.values())
    ratios = (line * lines, line * -(-blocks // 2))
    _, (top, bottom) = style.figure(2, 1, width=style.NARROW, height=0.52 * sum(ratios) + 0.6, height_ratios=ratios)
    words: list[str] = [""] * (blocks * size)
    owner: list[int | None] = [None] * blocks
    y = 0.0
    for number, (name, table) in enumerate(tables.items()):
        top.text(-0.4, y + 0.5, name, fontweight="bold", va="center", ha="right")
        for place, block in enumerate(table.blocks):
            owner[block] = number
            x, low = (place % 2) * pitch, y - line * (place // 2)
            part = list(texts[name][place * size : (place + 1) * size])
            words[block * size : block * size + len(part)] = part
            draw_block(top, x, low, part, size, number)
            top.text(x + size / 2, low + 0.97, f"→ block {block}", ha="center", va="bottom", fontsize=9.5)
        y -= line * -(-len(table.blocks) // 2)
    for block in range(blocks):
        x, low = (block % 2) * pitch, -line * (block // 2)
        held = words[block * size : (block + 1) * size] if owner[block] is not None else []
        draw_block(bottom, x, low, [w for w in held if w], size, owner[block])
        bottom.text(x, low + 1.02, f"block {block}", va="bottom", fontsize=9.5)
    for ax, title, height in zip((top, bottom), ("What the sequences see", "What the pool holds"), ratios, strict=True):
        ax.set(xlim=(-1.2, 2 * pitch), ylim=(line - height - 0.1, 1.6))
        ax.set_title(title)
        ax.axis("off")
    style.show()


def draw_block(ax, x: float, y: float, words: Sequence[str], size: int, owner: int | None) -> None:
    """One block of slots with words in them; empty slots are white."""
    colour = "white" if owner is None else (style.BLUE, style.VERMILION)[owner]
    for offset in range(size):
        filled = offset < len(words)
        ax.add_patch(
            Rectangle((x + offset, y + 0.1), 1, 0.8, facecolor=colour if filled else "white", alpha=0.22, linewidth=0)
        )
        if filled:
            ax.text(x + offset + 0.5, y + 0.5, words[offset], ha="center", va="center", fontsize=9.5)
    dash = "-" if owner != 1 else "--"
    edge = style.GREY if owner is None else (style.BLUE, style.VERMILION)[owner]
    ax.add_patch(Rectangle((x, y + 0.1), size, 0.8, fill=False, edgecolor=edge, linewidth=1.4, linestyle=dash))


def block_sizes(sizes: Sequence[int], waste: Sequence[float], formula: Sequence[float], entries: Sequence[int]) -> None:
    """The two sides of a block size: slots wasted, and how long the tables are."""
    shown = {"simulated": waste, "(b − 1) / 2 per sequence": formula}
    _, (top, bottom) = style.figure(2, 1, width=style.NARROW, height=5.4)
    style.lines(top, sizes, {name: [100 * share for share in shares] for name, shares in shown.items()})
    top.set(xscale="log", xlabel="tokens in a block, b", ylabel="percent of held slots", ylim=(0, None))
    top.set_title("Slots held and empty")
    style.lines(bottom, sizes, {"entries": entries})
    bottom.set(xscale="log", yscale="log", xlabel="tokens in a block, b", ylabel="entries for 8,192 tokens")
    bottom.set_title("Table of one sequence")
    for ax in (top, bottom):
        ax.set_xticks(sizes, [str(s) for s in sizes])
        ax.minorticks_off()
    style.show()


def prefix_saving(names: Sequence[str], computed: Sequence[int], blocks: Sequence[int]) -> None:
    """Bars: prompt tokens that were computed, and blocks that are held, without sharing and with it."""
    _, axes = style.figure(2, 1, width=style.NARROW, height=3.2)
    for ax, values, label in zip(axes, (computed, blocks), ("prompt tokens computed", "blocks held"), strict=True):
        bars = ax.barh(range(len(names)), values, color=[style.VERMILION, style.BLUE], hatch=None)
        ax.bar_label(bars, padding=3, fmt="{:,.0f}")
        ax.set_yticks(range(len(names)), names)
        ax.set_xticks([])
        ax.invert_yaxis()
        ax.set(title=label, xlim=(0, 1.25 * max(values)))
        ax.grid(False, axis="y")
    style.show()


def decode_step(batches: Sequence[int], bounds: dict[str, Sequence[float]]) -> None:
    """Lower bounds of a decode step over the batch, {what must be done: milliseconds}."""
    _, ax = style.figure(width=style.NARROW, height=3.6)
    style.lines(ax, batches, bounds)
    ax.set(xscale="log", yscale="log", xlabel="sequences in the batch", ylabel="milliseconds, at least")
    ax.set_title("A decode step, by what it reads")
    ax.set_xticks(batches, [str(b) for b in batches])
    ax.minorticks_off()
    style.show()


def decode_times(
    contexts: Sequence[int], times: dict[str, Sequence[float]], sizes: Sequence[int], by_size: Sequence[float]
) -> None:
    """Microseconds of a decode step over the context, {name: times}; and of the last over the block size."""
    _, (top, bottom) = style.figure(2, 1, width=style.NARROW, height=6.2, height_ratios=(1.4, 1))
    style.lines(top, contexts, times)
    top.set(xscale="log", yscale="log", xlabel="tokens per row", ylabel="microseconds")
    top.set_title("A decode step, 8 rows")
    top.set_xticks(contexts, [str(n) for n in contexts])
    bottom.bar([str(size) for size in sizes], by_size, color=style.GREEN)
    bottom.set(xlabel="tokens in a block", ylabel="microseconds")
    bottom.set_title(f"The twin at {contexts[-1]:,} tokens")
    top.minorticks_off()
    style.show()


CONTESTANTS = {
    "step 1": "1_block_table.cu",
    "step 2": "2_split_kv.cu",
    "step 2, CUDA graph": "2_split_kv.cu in a CUDA graph",
    "dense cache, sdpa cudnn": "contiguous, PyTorch with cuDNN",
}
LABELS = {"padding": 2, "fontsize": 9.5, "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.6}, "zorder": 5}
"""Of the bars: each covers the dashed line behind it."""

WORK = ("64 x 8,192", "64 rows of 100 to 16,384", "16 x 2,048", "1 x 32,768", "1 x 1,024")


def recorded(record: dict) -> None:
    """What ``benchmarks/paged_attention.py`` measured on a GPU: keys and values read a second, by work and by block."""
    rates = {row["name"]: row["rate"] / 1e12 for row in record["rows"]}
    limit = record["facts"]["copy_tb_s"]
    _, (top, bottom) = style.figure(2, 1, width=style.NARROW, height=9.0, height_ratios=(2.4, 1))
    for i, (contestant, label) in enumerate(CONTESTANTS.items()):
        values = [rates.get(f"decode, {work}: {contestant}", 0.0) for work in WORK]
        places = [place + 0.2 * (i - 1.5) for place in range(len(WORK))]
        bars = top.barh(places, values, 0.18, color=style.PALETTE[i], hatch=HATCHES[i], label=label)
        top.bar_label(bars, [f"{value:.2f}" if value else "" for value in values], **LABELS)
    top.axvline(limit, color=style.INK, linestyle="--", linewidth=1.2, label="device copy, same run")
    top.set_yticks(range(len(WORK)), [work.replace(" rows of ", " rows,\n") for work in WORK])
    top.invert_yaxis()
    top.set(title="Decode: TB/s of keys and values", xlabel="TB/s", xlim=(0, 1.2 * limit))
    top.figure.legend(loc="outside lower center", ncols=1)
    by_block(bottom, rates, limit)
    style.show()


def by_block(ax, rates: dict[str, float], limit: float) -> None:
    """TB/s of step 2 over the block size, at 64 rows of 8,192 tokens."""
    sizes = (1, 8, 16, 32, 64, 256)
    names = {size: f"decode, 64 x 8,192, blocks of {size}: step 2" for size in sizes} | {
        16: "decode, 64 x 8,192: step 2"
    }
    known = [size for size in sizes if names[size] in rates]
    bars = ax.bar([str(size) for size in known], [rates[names[size]] for size in known], color=style.PALETTE[1])
    ax.bar_label(bars, fmt="%.1f", **LABELS)
    ax.axhline(limit, color=style.INK, linestyle="--", linewidth=1.2)
    ax.set(title="TB/s at 64 x 8,192", xlabel="tokens in a block", ylim=(0, 1.2 * limit))


def bookkeeping(rows: dict[str, Sequence[float]], sequences: Sequence[int]) -> None:
    """Microseconds of Python per decode step over the number of sequences."""
    _, ax = style.figure(width=style.NARROW, height=3.2)
    style.lines(ax, sequences, rows)
    ax.set(xlabel="sequences that append a token", ylabel="microseconds per step", ylim=(0, None))
    ax.set_title("The time of the allocator, on this CPU")
    style.show()
