"""The figures of the Transformer chapter."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from tformer_lib.teaching import style

BOXES = {"norm": style.YELLOW, "attention": style.SKY, "feed-forward": "#F4B58F", "add": "white"}


def block_diagram() -> None:
    """A block, read upwards: pre-norm beside post-norm."""
    _, axes = style.figure(1, 2, height=4.6)
    for ax, title, rows in (
        (axes[0], "Pre-norm: the sum is left alone", ["norm", "attention", "add", "norm", "feed-forward", "add"]),
        (axes[1], "Post-norm: the sum is normalised", ["attention", "add", "norm", "feed-forward", "add", "norm"]),
    ):
        draw_block(ax, title, rows)
    style.show()


def draw_block(ax: Axes, title: str, rows: Sequence[str]) -> None:
    """Boxes from the bottom up, an arrow between neighbours, and a residual arrow into each sum."""
    ax.set(xlim=(0, 10), ylim=(0, 14.4))
    ax.set_title(title, fontsize=10.5)
    ax.axis("off")
    ax.text(4.2, 0.2, "x  (batch, T, width)", ha="center")
    branch = 1.0
    for i, name in enumerate(rows):
        y = 1.6 + 2.0 * i
        arrow(ax, (4.2, y - 0.95), (4.2, y))
        if name == "add":
            ax.text(4.2, y + 0.5, "+", ha="center", va="center", fontsize=15)
            ax.add_patch(FancyBboxPatch((3.75, y + 0.1), 0.9, 0.8, boxstyle="circle,pad=0.06", fc="none", ec=style.INK))
            arrow(ax, (4.2, branch), (4.8, y + 0.5), style="angle,angleA=0,angleB=90,rad=6", via=8.4)
            branch = y + 1.15
        else:
            ax.add_patch(FancyBboxPatch((1.4, y), 5.6, 1.0, boxstyle="round,pad=0.05", fc=BOXES[name], ec=style.INK))
            ax.text(4.2, y + 0.5, name, ha="center", va="center")
        if name == "norm" and rows[0] != "norm":
            branch = y + 1.15
    arrow(ax, (4.2, 12.65), (4.2, 13.6))


def arrow(ax: Axes, start: tuple, end: tuple, *, style: str | None = None, via: float | None = None) -> None:
    """An arrow, straight or (``via``) out to the right at that x and back."""
    look = {"arrowstyle": "-|>", "mutation_scale": 11, "color": "#1B1F24", "lw": 1.3, "shrinkA": 0, "shrinkB": 0}
    if via is None:
        ax.add_patch(FancyArrowPatch(start, end, **look))
        return
    ax.plot([start[0], via, via], [start[1], start[1], end[1]], color=look["color"], lw=look["lw"])
    ax.add_patch(FancyArrowPatch((via, end[1]), end, **look))


def depth(spread: dict[str, Sequence[float]], losses: dict[str, Sequence[float]]) -> None:
    """What happens to the stream from block to block, and how the same models learn."""
    _, axes = style.figure(1, 2)
    style.lines(axes[0], range(len(next(iter(spread.values())))), spread, markers=False)
    axes[0].set(xlabel="block", ylabel="spread of the stream", ylim=(0, None))
    axes[0].set_title("With fresh weights")
    style.lines(axes[1], range(len(next(iter(losses.values())))), losses, markers=False)
    axes[1].set(xlabel="step", ylabel="loss (nats)", ylim=(0, None))
    axes[1].set_title("No warm-up")
    axes[1].get_legend().remove()
    style.show()


def work_per_token(lengths: Sequence[int], matrices: Sequence[float], attention: Sequence[float]) -> None:
    """FLOPs a token, stacked: the matrices' constant share and attention's growing one."""
    _, ax = style.figure()
    giga = [[f / 1e9 for f in part] for part in (matrices, attention)]
    ax.stackplot(lengths, *giga, colors=[style.SKY, style.ORANGE], labels=["weight matrices", "attention scores"])
    ax.set(xlabel="context length T", ylabel="GFLOP per token, forward", xlim=(0, max(lengths)))
    ax.legend(loc="upper left")
    ax.set_title("GPT-2 small: where the work is")
    style.show()


def cross_attention(weights, source: str, target: str, losses: Sequence[float], floor: float) -> None:
    """The loss of the reversing model, and which source letter each written letter came from."""
    _, axes = style.figure(1, 2, height=3.4, width_ratios=[1.15, 1])
    axes[0].plot(losses, color=style.BLUE)
    axes[0].axhline(floor, color=style.VERMILION, ls="--")
    axes[0].text(len(losses), floor * 0.9, "lowest loss with smoothing", ha="right", va="top", fontsize=9)
    axes[0].set(xlabel="step", ylabel="loss (nats per letter)", ylim=(0, None))
    axes[0].set_title("Learning to reverse")
    style.heatmap(axes[1], weights, rows=list(target), columns=list(source), limit=1.0)
    axes[1].set_xlabel("source letter looked at")
    axes[1].set_ylabel("letter written next")
    axes[1].grid(False)
    style.show()
