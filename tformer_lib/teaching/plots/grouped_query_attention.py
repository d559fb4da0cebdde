"""The figures of the chapter on grouped queries: narrow, so that their labels can be read on a phone."""

from collections.abc import Sequence

from tformer_lib.teaching import style


def sharing(heads: int = 8, kv_heads: Sequence[int] = (8, 2, 1)) -> None:
    """Which query head reads which key and value head, for several numbers of kv heads."""
    _, axes = style.figure(len(kv_heads), 1, height=1.75 * len(kv_heads), width=style.NARROW)
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
        ax.set_yticks([0, 1], ["key and\nvalue heads", "query\nheads"])
        ax.set(title=f"{titles.get(n, 'GQA')}: kv_heads = {n}", ylim=(-0.35, 1.3), xlim=(-0.7, heads - 0.3))
        ax.set_xticks([])
        ax.grid(False)
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
    style.show()


def uptraining(losses: Sequence[float], before: float, pretrained: float) -> None:
    """The training loss of a converted model over the steps, with where it started and where it came from."""
    _, ax = style.figure(height=3.2, width=style.NARROW)
    ax.plot(range(1, len(losses) + 1), losses, color=style.BLUE, label="training loss, converted model")
    ax.axhline(before, color=style.VERMILION, linestyle="--", label="validation, before repair")
    ax.axhline(pretrained, color=style.GREEN, linestyle="-.", label="validation, original model")
    ax.set(xlabel="step of up-training", ylabel="nats per token", ylim=(0, 1.6 * before))
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
    _, (top, low) = style.figure(2, 1, height=6.2, width=style.NARROW)
    style.lines(top, size, {"pooled": [row["loss_converted"] for row in rows]})
    style.lines(low, size, curves)
    top.set(title="Right after pooling", ylabel="validation loss, nats")
    low.set(title="After up-training", ylabel="validation loss, nats")
    low.legend(loc="lower left")
    for ax in (top, low):
        highest = max(max(line.get_ydata()) for line in ax.get_lines())
        ax.axhline(records[0]["facts"]["loss_pretrained"], color=style.GREY, linewidth=1)
        ax.set(xscale="log", xlabel="KiB of cache per token (KV heads)", ylim=(0, 1.1 * highest))
        ax.set_xticks(size, [f"{x:g} ({row['kv_heads']})" for x, row in zip(size, rows, strict=True)])
        ax.minorticks_off()
    style.show()


def decode_time(kv_heads: Sequence[int], milliseconds: dict[str, Sequence[float]]) -> None:
    """Milliseconds of one decode step's attention over the number of kv heads, one line a form."""
    _, ax = style.figure(height=3.8, width=style.NARROW)
    style.lines(ax, kv_heads, milliseconds)
    style.log2_axis(ax, kv_heads)
    ax.set(xlabel="KV heads", ylabel="milliseconds", ylim=(0, None))
    style.show()


def cache_sizes(names: Sequence[str], numbers: Sequence[int]) -> None:
    """Numbers cached per token and layer, as points on a logarithmic axis."""
    _, ax = style.figure(height=2.4, width=style.NARROW)
    ax.plot(numbers, range(len(names)), linestyle="", marker="o", markersize=8, color=style.BLUE)
    for row, number in enumerate(numbers):
        place = {"xytext": (8, 0), "textcoords": "offset points", "va": "center"}
        ax.annotate(f"{number:,}", (number, row), **place, fontsize=9.5, bbox=style.GROUND)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.6, -0.4)
    ax.set(xscale="log", xlabel="numbers cached per token and layer", xlim=(min(numbers) / 2, max(numbers) * 6))
    style.show()
