"""Figures of the sparse-attention chapter: narrow, so that their labels can be read on a phone."""

from collections.abc import Sequence

from torch import Tensor

from tformer_lib.teaching import style


def gallery(masks: dict[str, Tensor], *, columns: int = 2, block: int | None = None) -> None:
    """Several (T, T) masks in a grid, each under its name with the share of pairs that it keeps.

    Args:
        masks: name -> mask.
        columns: panels in a row.
        block: draw lines between blocks of this many positions.
    """
    rows = -(-len(masks) // columns)
    _, axes = style.figure(rows, columns, width=style.NARROW, height=2.05 * rows + 0.3, squeeze=False)
    for ax, (name, mask) in zip(axes.flat, masks.items(), strict=False):
        ax.imshow(mask.float().numpy(), cmap=style.WEIGHTS, vmin=0, vmax=1.5, interpolation="nearest")
        ax.set_title(f"{name}: {mask.float().mean():.0%}", fontsize=9.5)
        frame(ax)
        for edge in range(block or 0, mask.shape[0] if block else 0, block or 1):
            ax.axhline(edge - 0.5, color=style.GREY, linewidth=0.5)
            ax.axvline(edge - 0.5, color=style.GREY, linewidth=0.5)
    for ax in axes.flat[len(masks) :]:
        ax.set_axis_off()
    for ax in axes[:, 0]:
        ax.set_ylabel("query")
    style.show()


def frame(ax) -> None:
    """No ticks and no grid, and a thin border all around."""
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set(visible=True, color=style.GREY)


def reach(curves: dict[str, Sequence[float]]) -> None:
    """Share of its past that the last token can know of, over the number of layers."""
    _, ax = style.figure(width=style.NARROW, height=4.0)
    layers = range(1, len(next(iter(curves.values()))) + 1)
    style.lines(ax, list(layers), curves)
    ax.set(xlabel="layers", ylabel="share of the past in reach", ylim=(0, 1.05))
    ax.set_xticks(list(layers))
    ax.legend(fontsize=9.5, loc="upper center", bbox_to_anchor=(0.45, -0.18), ncols=2, frameon=False)
    style.show()


def growth(lengths: Sequence[int], panels: dict[str, dict[str, Sequence[float]]]) -> None:
    """Measured growth with the length on logarithmic axes, a panel for each quantity, one below the other."""
    _, axes = style.figure(len(panels), 1, width=style.NARROW, height=3.2 * len(panels), squeeze=False)
    for ax, (label, curves) in zip(axes.flat, panels.items(), strict=True):
        style.lines(ax, lengths, curves)
        style.log2_axis(ax, list(lengths)[::2], log_y=True)
        ax.set(xlabel="tokens N", ylabel=label)
        low, high = ax.get_ylim()
        ax.set_ylim(low, high * 6)  # room for the legend
        ax.legend(fontsize=9.5, loc="upper left")
    style.show()


def by_live_blocks(points: dict[str, tuple[int, float]]) -> None:
    """Milliseconds over the number of live blocks, a labelled point a pattern, and the line through the origin."""
    _, ax = style.figure(width=style.NARROW, height=4.4)
    slope = sum(live * ms for live, ms in points.values()) / sum(live * live for live, _ in points.values())
    most = max(live for live, _ in points.values())
    ax.plot([0, 1.1 * most], [0, 1.1 * slope * most], color=style.GREY, linewidth=1.0, label="proportional")
    for i, (name, (live, ms)) in enumerate(points.items()):
        ax.plot(live, ms, style.MARKERS[i % 6], color=style.PALETTE[i % 6], label=name, markersize=7)
    ax.set(xlabel="live blocks", ylabel="milliseconds", xlim=(0, 1.15 * most), ylim=(0, None))
    ax.legend(fontsize=9.5, loc="upper center", bbox_to_anchor=(0.45, -0.18), ncols=2, frameon=False)
    style.show()


def retrieval(distances: Sequence[int], measured: dict[str, Sequence[float]], predicted: dict[str, Sequence[float]]):
    """Share of pairs recalled over their distance: points measured, lines predicted from the mask alone."""
    _, axes = style.figure(len(measured), 1, width=style.NARROW, height=1.75 * len(measured) + 0.3, sharex=True)
    for i, (ax, name) in enumerate(zip(axes, measured, strict=True)):
        ax.plot(distances, predicted[name], color=style.GREY, linewidth=1.5, drawstyle="steps-mid")
        ax.plot(distances, measured[name], style.MARKERS[i], color=style.PALETTE[i], markersize=3.2)
        ax.set(ylabel="share recalled", ylim=(0, 1.06))
        ax.set_title(name, fontsize=10)
    axes[-1].set_xlabel("distance")
    style.show()
