"""The figures of chapter 09."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tformer_lib.teaching import style


def recomputation(prompt: int = 3, new: int = 7) -> None:
    """How often each score of a query with a key is computed while ``new`` tokens are generated.

    The token that is generated last is never fed back, so ``prompt + new - 1`` positions are ever computed.
    """
    length = prompt + new - 1
    position = torch.arange(length)
    passes = new - (position - (prompt - 1)).clamp_min(0)  # of the uncached loop, that compute this row
    causal = torch.ones(length, length).tril()
    _, axes = style.figure(1, 2, height=3.5, sharey=True)
    for ax, counts, name in ((axes[0], causal * passes[:, None], "Without a cache"), (axes[1], causal, "With a cache")):
        style.heatmap(ax, counts.masked_fill(causal == 0, torch.nan), values=".0f", limit=new)
        ax.set(title=f"{name}: {int(counts.sum())} scores", xlabel="key")
        ax.set_xticks(range(length))
    axes[0].set_ylabel("query")
    axes[0].set_yticks(range(length))
    style.show()


def work(contexts: Sequence[int], uncached: Sequence[int], cached: Sequence[int]) -> None:
    """Floating-point operations for the next token over the length of the text, on logarithmic axes."""
    _, ax = style.figure(height=3.2)
    style.lines(ax, contexts, {"without a cache": uncached, "with a cache": cached})
    ax.set(xscale="log", yscale="log", xlabel="tokens so far", ylabel="FLOPs for the next token")
    ax.set_title("The next token's work, by the cost model")
    style.show()


def time_per_token(contexts: Sequence[int], measured: dict[str, Sequence], predicted: dict[str, Sequence]) -> None:
    """Measured time per token (markers) and what the cost model says (lines), both {name: milliseconds}."""
    _, ax = style.figure(height=3.6)
    for i, (name, times) in enumerate(measured.items()):
        ax.plot(
            contexts, times, linestyle="", marker=style.MARKERS[i], color=style.PALETTE[i], label=name, markersize=7
        )
    for i, (name, times) in enumerate(predicted.items()):
        ax.plot(contexts, times, linestyle=style.DASHES[i], color=style.PALETTE[i], label=f"{name}, predicted")
    ax.set(xlabel="tokens so far", ylabel="milliseconds for the next token", ylim=(0, None))
    ax.set_title("Without a cache time grows with the text, with one it stays near flat")
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
    _, (left, right) = style.figure(1, 2, height=3.6, width_ratios=(1.2, 1))
    style.heatmap(left, visible)
    left.set(title="Who sees whom", xlabel="key", ylabel="query")
    shade = (table.float() - torch.tensor(steps)[:, None] + 12).clamp_min(2).masked_fill(table < 0, torch.nan)
    style.heatmap(right, shade, rows=[f"after {n}" for n in steps], columns=range(table.shape[1]), limit=26)
    for (row, column), position in zip(
        torch.cartesian_prod(*map(torch.arange, table.shape)).tolist(), table.flatten(), strict=True
    ):
        right.text(column, row, str(int(position)) if position >= 0 else "", ha="center", va="center", fontsize=9)
    right.set(title="The position in each slot", xlabel="slot")
    style.show()


def filters(names: Sequence[str], probabilities: Sequence[Tensor]) -> None:
    """Bars of a distribution after each sampling rule, one panel a rule."""
    _, axes = style.figure(1, len(names), height=2.6, sharey=True)
    for ax, name, p in zip(axes, names, probabilities, strict=True):
        ax.bar(range(len(p)), p.tolist(), color=style.BLUE, width=0.8)
        ax.set_xlabel("token")
        ax.set_title(name, fontsize=9.5)
    axes[0].set_ylabel("probability")
    style.show()


def recorded(record: dict, contexts: dict) -> None:
    """What ``benchmarks/kv_cache.py`` measured on a GPU: whole generations as bars, single steps over the context."""
    whole = sorted(record["rows"], key=lambda row: -row["seconds"])
    _, (left, right) = style.figure(1, 2, height=3.8, width_ratios=(1.1, 1))
    names = [row["name"].replace(", ", ",\n", 1).replace(" + ", "\n+ ") for row in whole]
    values = [row["extra"]["milliseconds_per_token"] for row in whole]
    bars = left.barh(range(len(whole)), values, color=style.BLUE)
    left.bar_label(bars, fmt="%.2f", padding=3, fontsize=9)
    left.set_yticks(range(len(whole)), names, fontsize=8.5)
    left.invert_yaxis()
    left.set(title="A whole generation", xscale="log", xlabel="milliseconds per token", xlim=(0.3, 6 * max(values)))
    by_context(right, contexts)
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
    ax.set(title="One step", xlabel="tokens so far", ylabel="milliseconds", ylim=(0, 6.5))
