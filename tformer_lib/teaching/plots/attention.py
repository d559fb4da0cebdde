"""Figures of the attention chapter."""

from collections.abc import Sequence

from torch import Tensor

from tformer_lib.teaching import style


def weights(panels: dict[str, Tensor], queries: Sequence[str], keys: Sequence[str]) -> None:
    """Attention weights (T, S), one panel a name, with the tokens beside them and each share in its cell."""
    _, axes = style.figure(1, len(panels), height=3.5, sharey=True, squeeze=False)
    for ax, (name, matrix) in zip(axes[0], panels.items(), strict=True):
        style.heatmap(ax, matrix, rows=queries, columns=keys, values=".2f", limit=1.0)
        ax.set_title(name, fontsize=10, pad=8)
        ax.tick_params(axis="x", rotation=45)
    axes[0, 0].set_ylabel("query: gathers")
    style.show()


def saturation(dims: Sequence[int], largest: dict[str, Sequence[float]], slope: dict[str, Sequence[float]]) -> None:
    """The largest of the shares, and the size of the softmax's derivative, over head_dim."""
    _, (left, right) = style.figure(1, 2, height=3.0)
    style.lines(left, dims, largest)
    style.lines(right, dims, slope)
    left.set(ylabel="largest share", ylim=(0, 1))
    right.set(ylabel="norm of the derivative")
    right.set_yscale("log")
    for ax in (left, right):
        ax.set_xscale("log", base=2)
        ax.set_xticks(list(dims), [str(d) for d in dims])
        ax.set_xlabel("head_dim")
    style.show()


def times(lengths: Sequence[int], seconds: dict[str, Sequence[float]], model: Sequence[float]) -> None:
    """Measured times over the length, beside the time that the cost model gives."""
    _, ax = style.figure(height=3.2)
    style.lines(ax, lengths, {name: [1e3 * t for t in ts] for name, ts in seconds.items()})
    ax.plot(lengths, [1e3 * t for t in model], color=style.GREY, linewidth=1.2, label="FLOPs / measured matmul rate")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(list(lengths), [f"{n:,}" for n in lengths])
    ax.set(xlabel="length T = S", ylabel="milliseconds")
    ax.legend()
    style.show()


def flop_shares(lengths: Sequence[int], shares: dict[str, Sequence[float]]) -> None:
    """The share of a layer's FLOPs that its scores and mixing take, over the length, for several widths."""
    _, ax = style.figure(height=2.9)
    style.lines(ax, lengths, shares)
    ax.axhline(0.5, color=style.GREY, linewidth=1.0)
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(lengths), [f"{n:,}" for n in lengths])
    ax.set(xlabel="length T", ylabel="share of the layer's FLOPs", ylim=(0, 1))
    style.show()
