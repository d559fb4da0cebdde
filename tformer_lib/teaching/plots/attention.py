"""Figures of the attention chapter: narrow, so that their labels can be read on a phone."""

from collections.abc import Sequence

from matplotlib.patches import FancyArrowPatch
from torch import Tensor

from tformer_lib.teaching import style


def looking_back(tokens: Sequence[str], weights: Tensor) -> None:
    """The last token's attention weights (T,): an arc to each token, as thick as the weight that it gets.

    The weights are drawn to two digits, so that the picture is the same on every machine.
    """
    T = len(tokens)
    _, ax = style.figure(width=3.4, height=0.23 * T)
    for i, (token, weight) in enumerate(zip(tokens, weights.tolist(), strict=True)):
        dark = round(weight, 2) >= 0.02 or i == T - 1
        ax.text(0.0, i, token, ha="right", va="center", color=style.INK if dark else style.MUTED)
        if round(weight, 2) >= 0.02:
            width = 1 + 5 * round(weight, 2)
            look = {"arrowstyle": "-|>", "mutation_scale": 12 + width, "linewidth": width, "color": style.BLUE}
            ax.add_patch(FancyArrowPatch((0.04, T - 1), (0.04, i), connectionstyle="arc3,rad=0.5", **look))
            ax.text(0.22, i - 0.1, f"{weight:.2f}", va="center", color=style.BLUE, weight="bold")
    ax.set(xlim=(-0.4, 0.75), ylim=(T - 0.4, -0.6))
    ax.axis("off")
    style.show()


def weights(matrix: Tensor, queries: Sequence[str], keys: Sequence[str]) -> None:
    """Attention weights (T, S) with the tokens beside them and each weight in its cell."""
    _, ax = style.figure(width=4.0, height=0.55 + 0.42 * len(queries))
    style.heatmap(ax, matrix, rows=queries, columns=keys, values=".2f", limit=1.0)
    ax.set_ylabel("query")
    style.show()


def saturation(dims: Sequence[int], largest: dict[str, Sequence[float]], slope: dict[str, Sequence[float]]) -> None:
    """The largest attention weight, and the size of the softmax's derivative, over head_dim."""
    fig, (top, bottom) = style.figure(2, 1, width=style.NARROW, height=6.0, sharex=True)
    drawn = style.lines(top, dims, largest)
    style.lines(bottom, dims, slope)
    for ax in (top, bottom):
        ax.get_legend().remove()
    fig.legend(handles=drawn, loc="outside upper left")
    top.set(ylim=(0, 1))
    top.set_title("largest of 64 attention weights", fontsize=10.5)
    bottom.set_title("size of the softmax's derivative", fontsize=10.5)
    bottom.set_yscale("log")
    style.log2_axis(bottom, dims, [str(d) for d in dims], minor=True)
    bottom.set_xlabel("head_dim")
    style.show()


def times(lengths: Sequence[int], seconds: dict[str, Sequence[float]], model: Sequence[float]) -> None:
    """Measured times over the length, beside the time that the cost model gives."""
    _, ax = style.figure(width=style.NARROW, height=3.4)
    style.lines(ax, lengths, {name: [1e3 * t for t in ts] for name, ts in seconds.items()})
    ax.plot(lengths, [1e3 * t for t in model], color=style.GREY, linewidth=1.2, label="FLOPs / measured matmul rate")
    style.log2_axis(ax, lengths, log_y=True, minor=True)
    ax.set(xlabel="length T = S", ylabel="milliseconds")
    ax.legend()
    style.show()


def flop_shares(lengths: Sequence[int], shares: dict[str, Sequence[float]]) -> None:
    """The share of a layer's FLOPs that its scores and mixing take, over the length, for several widths."""
    _, ax = style.figure(width=style.NARROW, height=3.1)
    style.lines(ax, lengths, shares)
    ax.axhline(0.5, color=style.GREY, linewidth=1.0)
    style.log2_axis(ax, list(lengths)[::3])
    ax.set(xlabel="length T", ylabel="share of the layer's FLOPs", ylim=(0, 1))
    style.show()
