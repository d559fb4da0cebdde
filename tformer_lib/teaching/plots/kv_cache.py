"""The figures of the KV cache chapter: narrow, so that their labels can be read on a phone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tformer_lib.teaching import style


def recomputation(tokens: Sequence[str], prompt: int) -> None:
    """How often each score of a query with a key is computed while all ``tokens`` but the prompt are read one by one.

    Args:
        tokens: the tokens that are read; the one that is written last is not among them.
        prompt: how many of them the first pass reads.
    """
    length = len(tokens)
    position = torch.arange(length)
    passes = length - position.clamp_min(prompt - 1)  # of the uncached loop, that compute this row
    causal = torch.ones(length, length).tril()
    _, axes = style.figure(2, 1, height=7.2, width=style.NARROW)
    for ax, counts, name in ((axes[0], causal * passes[:, None], "Without a cache"), (axes[1], causal, "With a cache")):
        shown = counts.masked_fill(causal == 0, torch.nan)
        style.heatmap(ax, shown, values=".0f", limit=length - prompt + 1, rows=tokens)
        ax.set_title(f"{name}: {int(counts.sum())} scores")
        ax.set_xticks(range(length), tokens)
        style.turn_words(ax)
    axes[0].set_ylabel("query: reads")
    axes[1].set(ylabel="query: reads", xlabel="key: is read")
    axes[0].set_xticklabels([])
    style.show()


def work(contexts: Sequence[int], uncached: Sequence[int], cached: Sequence[int]) -> None:
    """Floating-point operations for the next token over the length of the text, on logarithmic axes."""
    _, ax = style.figure(height=3.2, width=style.NARROW)
    style.lines(ax, contexts, {"without a cache": uncached, "with a cache": cached})
    ax.set(xscale="log", yscale="log", xlabel="tokens so far", ylabel="FLOPs for the next token")
    style.show()


def time_per_token(contexts: Sequence[int], measured: dict[str, Sequence], predicted: dict[str, Sequence]) -> None:
    """Measured time per token (markers) and what the cost model says (lines), both {name: milliseconds}."""
    _, ax = style.figure(height=3.6, width=style.NARROW)
    for i, (name, times) in enumerate(measured.items()):
        ax.plot(
            contexts, times, linestyle="", marker=style.MARKERS[i], color=style.PALETTE[i], label=name, markersize=7
        )
    for i, (name, times) in enumerate(predicted.items()):
        ax.plot(contexts, times, linestyle=style.DASHES[i], color=style.PALETTE[i], label=f"{name}, predicted")
    ax.set(xlabel="tokens so far", ylabel="milliseconds for the next token", ylim=(0, None))
    ax.legend()
    style.show()


def ring(visible: Tensor, slots: Sequence[Sequence[int]], steps: Sequence[int]) -> None:
    """Who sees whom in a ring, and what lies in its slots.

    Args:
        visible: (T, T) boolean, who sees whom.
        slots: for each of ``steps``, the position in each slot, -1 for an empty one.
        steps: how many tokens had been written.
    """
    table = torch.tensor(slots)
    _, (top, low) = style.figure(2, 1, height=6.4, width=style.NARROW, height_ratios=(1.7, 1))
    style.heatmap(top, visible)
    top.set(title="Who sees whom", xlabel="key", ylabel="query")
    shade = (table.float() - torch.tensor(steps)[:, None] + 12).clamp_min(2).masked_fill(table < 0, torch.nan)
    style.heatmap(low, shade, rows=[f"after {n}" for n in steps], columns=range(table.shape[1]), limit=30)
    for (row, column), position in zip(
        torch.cartesian_prod(*map(torch.arange, table.shape)).tolist(), table.flatten(), strict=True
    ):
        low.text(column, row, str(int(position)) if position >= 0 else "", ha="center", va="center", fontsize=9.5)
    low.set(title="The position in each slot", xlabel="slot")
    style.show()


def recorded(record: dict, contexts: dict) -> None:
    """What ``benchmarks/kv_cache.py`` measured on a GPU: whole generations as points, single steps over the context."""
    whole = sorted(record["rows"], key=lambda row: -row["seconds"])
    _, (top, low) = style.figure(2, 1, height=7.0, width=style.NARROW, height_ratios=(1.2, 1))
    names = [row["name"].replace(", ", ",\n", 1).replace(" + ", "\n+ ") for row in whole]
    values = [row["extra"]["milliseconds_per_token"] for row in whole]
    top.plot(values, range(len(whole)), linestyle="", marker="o", markersize=8, color=style.BLUE)
    for row, value in enumerate(values):
        place = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}
        top.annotate(f"{value:.2f}", (value, row), **place, fontsize=9.5, bbox=style.GROUND)
    top.set_yticks(range(len(whole)), names, fontsize=9.5)
    top.set_ylim(len(whole) - 0.4, -0.6)
    top.set(title="A whole generation", xscale="log", xlabel="milliseconds per token", xlim=(0.5, 3 * max(values)))
    by_context(low, contexts)
    style.show()


def by_context(ax, record: dict) -> None:
    """Milliseconds per token over the context, one line for each kind of step."""
    points = [row for row in record["rows"] if "context" in row["extra"]]
    contexts = sorted({row["extra"]["context"] for row in points})
    names = {"uncached": "uncached", "cached": "cached, eager", "recorded": "cached, CUDA graph"}
    lines = {
        label: [1e3 * row["seconds"] for row in points if row["extra"]["kind"] == kind] for kind, label in names.items()
    }
    style.lines(ax, contexts, {label: line for label, line in lines.items() if len(line) == len(contexts)})
    ax.set(title="One step", xlabel="tokens so far", ylabel="milliseconds", ylim=(0, None))
