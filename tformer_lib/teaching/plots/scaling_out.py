"""Figures of the chapter on several devices."""

from collections.abc import Sequence

from matplotlib.patches import FancyArrowPatch, Rectangle

from tformer_lib.distributed.costs import Cost
from tformer_lib.teaching import style

PARTS = (
    ("weights", style.BLUE),
    ("gradients", style.VERMILION),
    ("optimizer", style.GREEN),
    ("activations", style.ORANGE),
)
"""What a device holds, and its colour."""


def ring_turns(size: int = 4) -> None:
    """The turns of a ring all-reduce: rows are turns, columns processes, in each the chunks; finished sums are dark.

    Args:
        size: processes, and chunks that each of them cuts its numbers into.
    """
    turns = 2 * (size - 1)
    _, ax = style.figure(width=4.2, height=0.62 * (turns + 1) + 0.5)
    added = [[1] * size for _ in range(size)]  # (process, chunk): how many processes' numbers are in it
    for turn in range(turns + 1):
        for rank in range(size):
            sent = (rank - turn) % size if turn < turns else None
            for chunk in range(size):
                draw_chunk(ax, rank, turn, chunk, added[rank][chunk], size, chunk == sent)
        if turn < turns:
            moved = [(rank, (rank - turn) % size) for rank in range(size)]
            counts = [added[rank][chunk] for rank, chunk in moved]
            for (rank, chunk), count in zip(moved, counts, strict=True):
                after = (rank + 1) % size
                added[after][chunk] = added[after][chunk] + count if turn < size - 1 else count
    ax.set(xlim=(-0.9, 1.25 * size - 0.2), ylim=(turns + 0.9, -0.75))
    ax.axis("off")
    for rank in range(size):
        ax.text(1.25 * rank + 0.5, -0.25, f"process {rank}", ha="center", fontsize=9.5)
    for turn in range(turns + 1):
        ax.text(-0.15, turn + 0.3, "start" if turn == 0 else f"after {turn}", ha="right", va="center", fontsize=9.5)
    style.show()


def draw_chunk(ax, rank: int, turn: int, chunk: int, count: int, size: int, is_sent: bool) -> None:
    """One chunk of one process: darker the more processes' numbers it has added up, framed if it is sent next."""
    left, width = 1.25 * rank + chunk / size, 1 / size
    shade = style.PALE(0.15 + 0.85 * (count - 1) / (size - 1))
    frame = {"edgecolor": style.VERMILION, "linewidth": 2.0, "zorder": 3} if is_sent else {"edgecolor": style.GREY}
    ax.add_patch(Rectangle((left + 0.01, turn + 0.05), width - 0.02, 0.5, facecolor=shade, **frame))
    ax.text(left + width / 2, turn + 0.3, str(count), ha="center", va="center", fontsize=9.5, zorder=4)


def ring_of_keys(words: Sequence[Sequence[str]]) -> None:
    """Processes in a ring, each with its own words, and arrows along which keys and values travel.

    Args:
        words: for each process, the tokens that it holds.
    """
    _, ax = style.figure(width=4.2, height=0.75 * len(words) + 0.6)
    for rank, held in enumerate(words):
        ax.add_patch(Rectangle((0.5, rank), 3.4, 0.6, facecolor="#EAF3F9", edgecolor=style.BLUE))
        text = " ".join(word.strip() for word in held)
        ax.text(0.6, rank + 0.3, f"{rank}:  {text}", va="center", fontsize=9.5)
        if rank + 1 < len(words):
            ax.add_patch(arrow((2.2, rank + 0.62), (2.2, rank + 0.98)))
    ax.add_patch(arrow((0.48, len(words) - 0.7), (0.48, 0.3), rad=-0.35))
    ax.text(2.3, 0.8, "keys, values", fontsize=9.5, va="center")
    ax.set(xlim=(-0.6, 4.0), ylim=(len(words) - 0.2, -0.2))
    ax.axis("off")
    style.show()


def arrow(start: tuple[float, float], end: tuple[float, float], rad: float = 0.0) -> FancyArrowPatch:
    """An arrow in the ink of the course."""
    bend = f"arc3,rad={rad}"
    return FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=style.VERMILION, connectionstyle=bend)


def held_bars(costs: dict[str, Cost], memory: float) -> None:
    """Gigabytes that each device holds, one bar a scheme, beside what a device has.

    Args:
        costs: label -> cost.
        memory: bytes of a device.
    """
    _, ax = style.figure(width=4.2, height=0.5 * len(costs) + 1.3)
    for row, cost in enumerate(costs.values()):
        left = 0.0
        for part, colour in PARTS:
            size = getattr(cost, part) / 1e9
            ax.barh(row, size, left=left, color=colour, height=0.6, label=part if row == 0 else None)
            left += size
    ax.axvline(memory / 1e9, color=style.INK, linestyle="--", linewidth=1.2)
    ax.text(memory / 1e9, -0.75, f"{memory / 1e9:.0f} GB", ha="center", fontsize=9.5)
    ax.set_yticks(range(len(costs)), list(costs))
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("gigabytes a device")
    ax.legend(loc="upper center", bbox_to_anchor=(0.4, -0.32), ncols=2)
    style.show()
