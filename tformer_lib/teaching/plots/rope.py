"""The figures of the RoPE chapter: narrow, so that their labels can be read on a phone."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from tformer_lib.rope import Rope
from tformer_lib.teaching import style


def layouts(head_dim: int = 8) -> None:
    """Which channels make a pair: neighbours in one layout, halves in the other; an arc joins a pair."""
    pairs = {
        "interleaved: neighbours": [(i, i + 1) for i in range(0, head_dim, 2)],
        "half: i and i + head_dim / 2": [(i, i + head_dim // 2) for i in range(head_dim // 2)],
    }
    _, axes = style.figure(2, 1, height=3.6, width=style.NARROW, height_ratios=(1, 1.9))
    for ax, (title, joined) in zip(axes, pairs.items(), strict=True):
        for number, (a, b) in enumerate(joined):
            arc = np.linspace(0, math.pi, 40)
            middle, radius = (a + b) / 2, (b - a) / 2
            look = {"color": style.PALETTE[number % 6], "linestyle": style.DASHES[number % 6]}
            ax.plot(middle - radius * np.cos(arc), 0.35 + 0.45 * radius * np.sin(arc), **look)
            for channel in (a, b):
                ax.text(
                    channel, 0, str(channel), ha="center", va="center", bbox={"facecolor": "white", "boxstyle": "round"}
                )
        ax.set(
            title=title,
            xlim=(-0.7, head_dim - 0.3),
            ylim=(-0.4, 0.7 + 0.45 * (pairs[title][0][1] - pairs[title][0][0]) / 2),
            xticks=[],
            yticks=[],
        )
        ax.grid(False)
        ax.spines[["left", "bottom"]].set_visible(False)
    axes[-1].set_xlabel("channel of the head")
    style.show()


def decay(distances: Tensor, aligned: Tensor, spread: Tensor, bound: Tensor) -> None:
    """The score over distance for q = k, the spread of scores for random q and k, and the paper's bound."""
    _, ax = style.figure(height=3.4, width=style.NARROW)
    style.lines(
        ax,
        distances,
        {"q = k, all ones": aligned, "bound, rescaled": bound, "random q, k": spread},
        markers=False,
    )
    style.log2_axis(ax, [4**i for i in range(7)])
    ax.set(xlabel="distance", ylabel="score, 1 = the largest")
    below(ax, columns=2)
    style.show()


def turns(rope: Rope, length: int, longer: int) -> None:
    """Full turns of each pair within the trained length and within a longer one; under one, angles are new."""
    frequencies = rope.frequencies()
    _, ax = style.figure(height=3.4, width=style.NARROW)
    pairs = range(len(frequencies))
    counts = {f"within {n:,} positions": frequencies * n / (2 * math.pi) for n in (length, longer)}
    style.lines(ax, pairs, counts)
    ax.axhline(1, color=style.INK, linewidth=1)
    ax.annotate("one full turn", (0, 1), xytext=(2, 4), textcoords="offset points", fontsize=9.5)
    ax.set_yscale("log")
    ax.set(xlabel="pair, fast to slow", ylabel="full turns", xticks=range(0, len(frequencies), 3))
    below(ax, columns=2)
    style.show()


def scalings(ropes: dict[str, Rope], plain: Rope) -> None:
    """What each scaling multiplies the frequency of each pair by."""
    curves = {name: rope.frequencies() / plain.frequencies() for name, rope in ropes.items()}
    _, ax = style.figure(height=4.0, width=style.NARROW)
    style.lines(ax, range(len(plain.frequencies())), curves)
    ax.set(xlabel="pair, fast to slow", ylabel="frequency is multiplied by", ylim=(0, 1.08))
    below(ax, columns=2)
    style.show()


def extrapolation(losses: dict[str, Sequence[float]], edges: Sequence[int], trained: int, floor: float) -> None:
    """Validation loss by position, a line for each scaling; where the trained context ends is marked.

    Args:
        losses: name -> mean loss of each bin of positions.
        edges: the bins' edges, one more than there are bins.
        trained: the trained context.
        floor: the loss of the unscaled model within its context.
    """
    middles = [(a + b) / 2 for a, b in pairwise(edges)]
    _, ax = style.figure(height=4.2, width=style.NARROW)
    style.lines(ax, middles, losses)
    ax.axvline(trained, color=style.INK, linewidth=1)
    ax.axhline(floor, color=style.GREY, linewidth=1, linestyle=":")
    ax.annotate(
        "trained context",
        (trained, ax.get_ylim()[1]),
        xytext=(4, -12),
        textcoords="offset points",
        fontsize=9.5,
    )
    ax.set(xlabel="position", ylabel="loss, nats per token")
    below(ax, columns=2)
    style.show()


def below(ax: Axes, columns: int) -> None:
    """Put the legend under the axis label, where a narrow figure has room."""
    ax.legend(loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=columns, fontsize=9.5)


def total_turn(frequencies: Tensor, distance: Tensor) -> Tensor:
    """Mean of cos(distance * theta) over the pairs: the score of two equal vectors, scaled to 1 at distance 0."""
    return torch.cos(distance[:, None].double() * frequencies.double()).mean(-1)


def costs(seconds: dict[str, float]) -> None:
    """Milliseconds of each way to spend them, as bars."""
    _, ax = style.figure(height=0.8 + 0.42 * len(seconds), width=style.NARROW)
    bars = ax.barh(list(seconds), [1e3 * s for s in seconds.values()], color=style.BLUE)
    ax.bar_label(bars, fmt="%.1f", padding=3)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set(xlabel="milliseconds")
    ax.margins(x=0.15)
    style.show()
