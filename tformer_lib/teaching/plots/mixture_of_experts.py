"""The figures of the chapter on mixtures of experts: narrow, so that their labels can be read on a phone."""

from collections.abc import Sequence

import numpy as np
from matplotlib.ticker import FuncFormatter

from tformer_lib.teaching import style


def layer(tokens: Sequence[str], choices: Sequence[Sequence[int]], weights: Sequence[Sequence[float]], experts: int):
    """Tokens on the left, experts on the right, and a line for each choice, as thick as its weight."""
    _, ax = style.figure(height=3.6, width=style.NARROW)
    rows = np.linspace(1, 0, len(tokens))
    places = np.linspace(1.1, -0.1, experts)
    busy = {expert for row in choices for expert in row}
    for row, token, chosen, shares in zip(rows, tokens, choices, weights, strict=True):
        ax.text(-0.06, row, token, ha="right", va="center", fontsize=11, color=style.INK)
        for expert, share in zip(chosen, shares, strict=True):
            rise = places[expert] - row
            ax.plot([0, 1], [row, places[expert]], color=style.BLUE, linewidth=1 + 6 * share, alpha=0.75)
            ground = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
            ax.text(0.24, row + 0.24 * rise, f"{share:.2f}", ha="center", va="center", fontsize=9.5, bbox=ground)
    for expert, place in enumerate(places):
        colour = style.BLUE if expert in busy else style.GREY
        ax.plot(1.04, place, "s", markersize=17, color=colour)
        ax.text(1.14, place, f"expert {expert}", va="center", fontsize=11, color=style.INK)
    ax.set(xlim=(-0.4, 1.62), ylim=(-0.3, 1.3))
    ax.axis("off")
    style.show()


def balance(curves: dict[str, Sequence[float]], *, every: int = 1) -> None:
    """The entropy of the load over the steps of training, one line a model, each smoothed over a few steps."""
    _, ax = style.figure(height=3.4, width=style.NARROW)
    for colour, (name, values) in zip(style.PALETTE, curves.items(), strict=False):
        smooth = np.convolve(values, np.ones(9) / 9, mode="valid")
        ax.plot(every * (np.arange(len(smooth)) + 4), smooth, color=colour, label=name, linewidth=1.6)
    ax.set(xlabel="step of training", ylabel="entropy of the load\n(1 is even)", ylim=(0, 1.04))
    ax.legend(loc="lower right")
    style.show()


def equal_work_and_time(losses: dict[str, Sequence[float]], seconds: dict[str, float], *, every: int) -> None:
    """Validation losses over the steps, and the same losses over the time that the steps took."""
    _, (top, low) = style.figure(2, 1, height=6.4, width=style.NARROW)
    for colour, (name, values) in zip(style.PALETTE, losses.items(), strict=False):
        steps = every * np.arange(len(values))
        top.plot(steps, values, color=colour, label=name)
        low.plot(steps * seconds[name], values, color=colour, label=name)
    end = every * (len(next(iter(losses.values()))) - 1)
    shortest = min(seconds[name] for name in losses) * end
    last = max(values[len(values) // 6] for values in losses.values())
    top.set(title="Equal steps", xlabel="step of training", ylabel="validation loss, nats", ylim=(0, 1.2 * last))
    low.set(title="Equal time", xlabel="seconds of training", ylabel="validation loss, nats", ylim=(0, 1.2 * last))
    low.set_xlim(0, shortest)
    top.legend()
    style.show()


def experts_read(tokens: Sequence[int], predicted: Sequence[float], counted: Sequence[float], experts: int) -> None:
    """How many different experts a step reads, over the number of its tokens: the formula, and a count."""
    _, ax = style.figure(height=3.2, width=style.NARROW)
    ax.plot(tokens, predicted, color=style.BLUE, label="if all choose evenly")
    ax.plot(tokens, counted, color=style.VERMILION, linestyle="", marker="o", label="counted in our mixture")
    ax.axhline(experts, color=style.GREY, linewidth=1, linestyle="--")
    style.log2_axis(ax, tokens)
    ax.set(xlabel="tokens in the step", ylabel="different experts read", ylim=(0, 1.12 * experts))
    ax.legend(loc="lower right")
    style.show()


def step_times(panels: dict[str, dict[str, tuple[Sequence[int], Sequence[float]]]]) -> None:
    """Milliseconds of a layer over the number of tokens, a panel a layer, a line a contestant; dashed is predicted."""
    _, axes = style.figure(len(panels), 1, height=3.3 * len(panels), width=style.NARROW)
    for ax, (title, curves) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        for colour, (name, (tokens, milliseconds)) in zip(style.PALETTE, curves.items(), strict=False):
            look = {"linestyle": "--"} if name.startswith("predicted") else {"marker": "o"}
            ax.plot(tokens, milliseconds, color=colour, label=name, **look)
        style.log2_axis(ax, tokens)
        ax.set(title=title, xlabel="tokens in the step", ylabel="milliseconds", yscale="log")
        for axis in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
            axis(FuncFormatter(lambda ms, _: f"{ms:g}" if f"{ms:e}"[0] in "125" else ""))
    np.atleast_1d(axes)[0].legend(loc="lower center", bbox_to_anchor=(0.5, 1.08))
    style.show()
