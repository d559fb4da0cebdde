"""The figures of chapter 09."""

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
        ylim=(0, None),
    )
    ax.legend()
    style.show()


def trade_off(record: dict) -> None:
    """Validation loss over the cache's bytes per token: as converted, and after up-training."""
    rows = record["facts"]["quality"]
    size = [row["bytes_per_token"] / 1024 for row in rows]
    _, (left, right) = style.figure(1, 2, height=3.3)
    left.plot(size, [row["loss_converted"] for row in rows], linestyle="--", marker="s", color=style.VERMILION)
    left.set(title="Right after pooling", ylabel="validation loss, nats per token")
    right.plot(size, [row["loss_uptrained"] for row in rows], linestyle="-", marker="o", color=style.BLUE)
    right.set(title=f"After {record['facts']['steps']} steps of up-training")
    for ax, key in ((left, "loss_converted"), (right, "loss_uptrained")):
        ax.set(xscale="log", xlabel="cache, KiB per token")
        ax.set_xticks(size, [f"{x:g}" for x in size])
        ax.minorticks_off()
        for x, row in zip(size, rows, strict=True):
            ax.annotate(f"{row['kv_heads']} kv", (x, row[key]), xytext=(4, 6), textcoords="offset points", fontsize=9)
        ax.margins(0.15)
    style.show()


def decode_time(record: dict) -> None:
    """Time of one decode step's attention over the number of kv heads: grouped, with copied heads, and the bound."""
    rows = [row for row in record["rows"] if "kv_heads" in row["extra"]]
    kv_heads = sorted({row["extra"]["kv_heads"] for row in rows})
    pick = lambda form: [  # noqa: E731
        next(r for r in rows if r["extra"]["kv_heads"] == n and r["extra"]["form"] == form) for n in kv_heads
    ]
    curves = {
        "copied for each query head": [1e3 * r["seconds"] for r in pick("copied")],
        "grouped, nothing copied": [1e3 * r["seconds"] for r in pick("grouped")],
        "bound: bytes / bandwidth": [1e3 * r["bytes"] / r["limit"] for r in pick("grouped")],
    }
    _, ax = style.figure(height=3.3)
    style.lines(ax, kv_heads, curves)
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
