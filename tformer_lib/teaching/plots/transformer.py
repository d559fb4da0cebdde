"""The figures of the Transformer chapter."""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from tformer_lib.teaching import style

BOXES = {"norm": style.YELLOW, "attention": style.LIGHT, "feed-forward": "#F4B58F", "add": "white"}


def model_diagram() -> None:
    """The whole model, read upwards: decoder-only beside encoder-decoder."""
    fig, axes = style.figure(1, 2, width=style.NARROW, height=6.0, width_ratios=[1, 2.1])
    fig.get_layout_engine().set(w_pad=0, wspace=0)
    for ax, title, right in ((axes[0], "Decoder-only", 7.0), (axes[1], "Encoder-decoder", 14.7)):
        ax.set(xlim=(0, right), ylim=(0, 17.4))
        ax.set_title(title, fontsize=10.5)
        ax.axis("off")
    draw_stack(axes[0], 3.5, "tokens  (batch, T)", ["causal\nattention", "feed-forward"], top=True, norm=True)
    draw_stack(axes[1], 3.5, "source  (batch, S)", ["attention", "feed-forward"], top=False)
    decoder = ["causal\nattention", "cross-\nattention", "feed-forward"]
    draw_stack(axes[1], 11.2, "target  (batch, T)", decoder, top=True)
    axes[1].plot([3.5, 3.5, 7.33, 7.33], [9.0, 10.6, 10.6, 7.8], color=style.INK, lw=1.3)
    arrow(axes[1], (7.33, 7.8), (7.95, 7.8))
    axes[1].text(3.5, 10.9, "memory\n(batch, S, width)", ha="center", va="bottom", fontsize=9.5)
    style.show()


def draw_stack(ax: Axes, x: float, name: str, parts: Sequence[str], *, top: bool, norm: bool = False) -> None:
    """Tokens, their table, the blocks as one frame around ``parts``, and (``top``) the way out, by a final ``norm``."""
    box = partial(draw_box, ax, x)
    ax.text(x, 0.2, name, ha="center", fontsize=9.5)
    arrow(ax, (x, 0.95), (x, 1.8))
    box(1.8, "embedding", style.GREEN + "55")
    arrow(ax, (x, 2.8), (x, 4.9))
    ax.text(x + 0.25, 3.4, "+ position", fontsize=9.5)
    heights = [5.3 + 2.0 * i for i in range(len(parts))]
    colours = [BOXES["feed-forward"] if part == "feed-forward" else BOXES["attention"] for part in parts]
    ax.add_patch(
        FancyBboxPatch((x - 3.3, 4.9), 6.6, heights[-1] - 3.5, boxstyle="round,pad=0.15", fc="none", ec=style.GREY)
    )
    for y, part, colour in zip(heights, parts, colours, strict=True):
        box(y, part, colour)
    for below, above in pairwise(heights):
        arrow(ax, (x, below + 1.0), (x, above))
    ax.text(x + 2.9, heights[-1] + 1.75, "× L", ha="right", va="bottom", fontsize=10.5)
    if top:
        if norm:
            arrow(ax, (x, heights[-1] + 1.0), (x, 12.1))
            box(12.1, "norm", BOXES["norm"])
        arrow(ax, (x, 13.1 if norm else heights[-1] + 1.0), (x, 14.0))
        box(14.0, "unembedding", style.GREEN + "55")
        arrow(ax, (x, 15.0), (x, 15.8))
        ax.text(x, 15.9, "logits\n(batch, T, V)", ha="center", va="bottom", fontsize=9.5)


def draw_box(ax: Axes, x: float, y: float, name: str, colour: str) -> None:
    """A box of height 1 around ``x``, its foot at ``y``."""
    ax.add_patch(FancyBboxPatch((x - 3.2, y), 6.4, 1.0, boxstyle="round,pad=0.05", fc=colour, ec=style.INK))
    ax.text(x, y + 0.5, name, ha="center", va="center", fontsize=9.5, linespacing=0.95)


def block_diagram() -> None:
    """A block, read upwards: pre-norm beside post-norm."""
    _, axes = style.figure(1, 2, width=style.NARROW, height=4.8)
    for ax, title, rows in (
        (axes[0], "Pre-norm:\nthe sum is left alone", ["norm", "attention", "add", "norm", "feed-forward", "add"]),
        (axes[1], "Post-norm:\nthe sum is normalised", ["attention", "add", "norm", "feed-forward", "add", "norm"]),
    ):
        draw_block(ax, title, rows)
    style.show()


def draw_block(ax: Axes, title: str, rows: Sequence[str]) -> None:
    """Boxes from the bottom up, an arrow between neighbours, and a residual arrow into each sum."""
    ax.set(xlim=(1.0, 9.0), ylim=(0, 14.4))
    ax.set_title(title, fontsize=10)
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


def stream(names: Sequence[str], words: Sequence[str], chances: Sequence[float], lengths: Sequence[float]) -> None:
    """The residual stream of one token, read upwards: what each part names once it has been added.

    Numbers are drawn to two digits, so that the picture is the same on every machine.

    Args:
        names: the parts in the order of their addition, the embedding first.
        words: the likeliest next token after each addition.
        chances: its probability.
        lengths: the Euclidean length of the token's vector after each addition.
    """
    _, ax = style.figure(width=style.NARROW, height=0.42 * (len(names) + 1))
    arrow(ax, (0.0, -0.4), (0.0, len(names) - 0.3))
    for y, (name, word, chance, length) in enumerate(zip(names, words, chances, lengths, strict=True)):
        colour = BOXES.get(name.split()[0], style.GREEN + "55")
        ax.add_patch(FancyBboxPatch((-2.3, y - 0.28), 1.75, 0.56, boxstyle="round,pad=0.02", fc=colour, ec=style.INK))
        ax.text(-1.42, y, name, ha="center", va="center", fontsize=9.5)
        arrow(ax, (-0.53, y), (-0.04, y))
        ax.barh(y, 1.5 * round(chance, 2), left=1.12, height=0.5, color=style.LIGHT)
        ax.text(0.98, y, word, ha="right", va="center", fontsize=9.5)
        ax.text(1.2, y, f"{chance:.2f}", va="center", fontsize=9.5)
        ax.text(3.4, y, f"{length:.1f}", ha="right", va="center", fontsize=9.5)
    for x, head in ((-1.42, "adds"), (0.98, "names"), (1.2, "probability"), (3.4, "length")):
        side = {-1.42: "center", 1.2: "left"}.get(x, "right")
        ax.text(x, len(names), head, ha=side, va="center", fontsize=9.5, weight="bold")
    ax.set(xlim=(-2.4, 3.5), ylim=(-0.6, len(names) + 0.4))
    ax.axis("off")
    style.show()


def depth(spread: dict[str, Sequence[float]], losses: dict[str, Sequence[float]]) -> None:
    """What happens to the stream from block to block, and how the same models learn."""
    _, axes = style.figure(2, 1, width=style.NARROW, height=5.4)
    style.lines(axes[0], range(len(next(iter(spread.values())))), spread, markers=False)
    axes[0].set(xlabel="block", ylabel="standard deviation", ylim=(0, None))
    axes[0].set_title("The stream, with fresh weights")
    style.lines(axes[1], range(len(next(iter(losses.values())))), losses, markers=False)
    axes[1].set(xlabel="step", ylabel="loss (nats)", ylim=(0, None))
    axes[1].set_title("The loss, without a warm-up")
    axes[1].get_legend().remove()
    style.show()


def work_per_token(lengths: Sequence[int], matrices: Sequence[float], attention: Sequence[float]) -> None:
    """FLOPs a token, stacked: the matrices' constant share and attention's growing one."""
    _, ax = style.figure(width=style.NARROW, height=3.3)
    giga = [[f / 1e9 for f in part] for part in (matrices, attention)]
    ax.stackplot(lengths, *giga, colors=[style.SKY, style.ORANGE], labels=["weight matrices", "attention proper"])
    ax.set(xlabel="context length T", ylabel="GFLOP per token, forward", xlim=(0, max(lengths)))
    ax.legend(loc="upper left")
    ax.set_title("GPT-2 small: where the work is", fontsize=10.5)
    style.show()


def cross_attention(weights, source: str, target: str, losses: Sequence[float], floor: float) -> None:
    """The loss of the reversing model, and which source letter each written letter came from."""
    _, axes = style.figure(2, 1, width=style.NARROW, height=6.2, height_ratios=[1, 1.5])
    axes[0].plot(losses, color=style.BLUE)
    axes[0].axhline(floor, color=style.VERMILION, ls="--")
    axes[0].text(len(losses), floor * 0.9, "lowest loss with smoothing", ha="right", va="top", fontsize=9.5)
    axes[0].set(xlabel="step", ylabel="loss (nats per letter)", ylim=(0, None))
    axes[0].set_title("Learning to reverse")
    style.heatmap(axes[1], weights, rows=list(target), columns=list(source), limit=1.0)
    axes[1].set_xlabel("source letter looked at")
    axes[1].set_ylabel("letter written next")
    axes[1].grid(False)
    style.show()
