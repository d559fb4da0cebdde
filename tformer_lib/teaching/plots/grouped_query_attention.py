"""The figures of chapter 10."""

from collections.abc import Sequence

import numpy as np

from tformer_lib.teaching import style


def sharing(heads: int = 8, kv_heads: Sequence[int] = (8, 2, 1)) -> None:
    """Which query head reads which key and value head, for several numbers of kv heads."""
    _, axes = style.figure(1, len(kv_heads), height=2.7)
    titles = {heads: "MHA", 1: "MQA"}
    for ax, n in zip(axes, kv_heads, strict=True):
        group = heads // n
        places = [(i + 0.5) * group - 0.5 for i in range(n)]
        for head in range(heads):
            colour = style.PALETTE[head // group % 6]
            ax.plot([head, places[head // group]], [1, 0], color=colour, linewidth=1.5)
            ax.plot(head, 1, "o", color=colour, markersize=9)
        for i, place in enumerate(places):
            ax.plot(place, 0, "s", color=style.PALETTE[i % 6], markersize=13)
        ax.set_yticks([0, 1], ["key and\nvalue heads", "query\nheads"] if ax is axes[0] else ["", ""])
        ax.set(title=f"{titles.get(n, 'GQA')}: kv_heads = {n}", ylim=(-0.35, 1.3), xlim=(-0.7, heads - 0.3))
        ax.set_xticks([])
        ax.grid(False)
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
    style.show()


def uptraining(losses: Sequence[float], before: float, pretrained: float) -> None:
    """The training loss of a converted model over the steps, with where it started and where it came from."""
    _, ax = style.figure(height=3.0)
    ax.plot(range(1, len(losses) + 1), losses, color=style.BLUE, label="training loss of the converted model")
    ax.axhline(before, color=style.VERMILION, linestyle="--", label="validation loss right after the conversion")
    ax.axhline(pretrained, color=style.GREEN, linestyle="-.", label="validation loss of the model it came from")
    ax.set(
        xlabel="step of up-training",
        ylabel="nats per token",
        title="A few steps undo most of the damage",
        ylim=(0, 1.45 * before),
    )
    ax.legend()
    style.show()


def trade_off(*records: dict) -> None:
    """Validation loss over the cache's bytes per token: as converted, and after each record's up-training."""
    rows = records[0]["facts"]["quality"]
    size = [row["bytes_per_token"] / 1024 for row in rows]
    curves = {
        f"{r['facts']['steps']} steps of {r['facts']['batch']} windows": [
            q["loss_uptrained"] for q in r["facts"]["quality"]
        ]
        for r in records
    }
    _, (left, right) = style.figure(1, 2, height=3.4)
    style.lines(left, size, {"pooled": [row["loss_converted"] for row in rows]})
    style.lines(right, size, curves)
    left.set(title="Right after pooling", ylabel="validation loss, nats per token")
    right.set(title="After up-training")
    right.legend(loc="lower right")
    for ax in (left, right):
        top = max(max(line.get_ydata()) for line in ax.get_lines())
        ax.axhline(records[0]["facts"]["loss_pretrained"], color=style.GREY, linewidth=1)
        ax.set(xscale="log", xlabel="KiB of cache per token (kv heads)", ylim=(0, 1.1 * top))
        ax.set_xticks(size, [f"{x:g} ({row['kv_heads']})" for x, row in zip(size, rows, strict=True)])
        ax.minorticks_off()
    style.show()


def decode_time(kv_heads: Sequence[int], milliseconds: dict[str, Sequence[float]]) -> None:
    """Milliseconds of one decode step's attention over the number of kv heads, one line a form."""
    _, ax = style.figure(height=3.3)
    style.lines(ax, kv_heads, milliseconds)
    ax.set(xscale="log", yscale="log", xlabel="kv heads", ylabel="milliseconds", title="One decode step's attention")
    ax.set_xticks(kv_heads, [str(n) for n in kv_heads])
    ax.minorticks_off()
    style.show()


def cache_sizes(names: Sequence[str], numbers: Sequence[int]) -> None:
    """Numbers cached per token and layer, as bars on a logarithmic axis."""
    _, ax = style.figure(height=2.6)
    bars = ax.barh(np.arange(len(names)), numbers, color=style.BLUE)
    ax.bar_label(bars, labels=[f"{n:,}" for n in numbers], padding=3)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set(xscale="log", xlabel="numbers cached per token and layer", xlim=(min(numbers) / 2, max(numbers) * 4))
    style.show()
