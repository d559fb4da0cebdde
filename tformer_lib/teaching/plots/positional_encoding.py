"""The figures of chapter 04."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Circle
from torch import Tensor

from tformer_lib.positional_encoding import sinusoidal, t5_bucket
from tformer_lib.teaching import style


def counters(length: int = 32, bits: int = 5) -> None:
    """A binary counter beside sinusoids of the same rhythm: each digit or wave is half as fast as the one above it."""
    positions = torch.arange(length)
    digits = torch.stack([(positions >> i) & 1 for i in range(bits)])
    waves = torch.stack([torch.sin(2 * torch.pi * positions / 2 ** (i + 1) + 0.4) for i in range(bits)])
    _, (left, right) = style.figure(1, 2, height=2.6)
    style.heatmap(left, digits, rows=[f"bit {i}" for i in range(bits)])
    style.heatmap(right, waves, rows=[f"wave {i}" for i in range(bits)], signed=True)
    left.set(title="Binary digits jump", xlabel="position")
    right.set(title="Waves glide", xlabel="position")
    style.show()


def table(encoding: Tensor) -> None:
    """A table of encodings, (positions, width), as a heat map."""
    figure, ax = style.figure(height=3.4)
    image = style.heatmap(ax, encoding, signed=True, limit=1.0)
    ax.set(xlabel="channel", ylabel="position", title="Each row is what is added to the token at that position")
    figure.colorbar(image, ax=ax, label="value")
    style.show()


def clocks(steps: int, starts: Sequence[int], width: int = 16, count: int = 3) -> None:
    """The first hands of the sinusoidal encoding before and after the same number of steps, from several starts."""
    thetas = 10000.0 ** (-2 * np.arange(count) / width)
    _, axes = style.figure(len(starts), count, height=2.3 * len(starts))
    for row, start in zip(axes, starts, strict=True):
        for i, (ax, theta) in enumerate(zip(row, thetas, strict=True)):
            draw_clock(ax, start * theta, (start + steps) * theta)
            ax.set_title(f"clock {i}, p = {start} to {start + steps}", fontsize=10.5, loc="center")
            ax.text(0, -1.28, f"turned by {np.degrees(steps * theta):.0f}°", ha="center", va="top")
    style.show()


def draw_clock(ax: Axes, before: float, after: float) -> None:
    """A face whose hand turns clockwise from the top, by angles in radians: its tip is at (sin, cos)."""
    turn = np.linspace(before, after, 60)
    ax.add_patch(Circle((0, 0), 1, fc="none", ec=style.GREY))
    ax.fill([0, *(0.6 * np.sin(turn))], [0, *(0.6 * np.cos(turn))], color=style.SKY, alpha=0.45, lw=0)
    for angle, look in ((before, {"color": style.GREY, "ls": "--"}), (after, {"color": style.BLUE})):
        ax.plot([0, np.sin(angle)], [0, np.cos(angle)], lw=2.5, **look)
    ax.set(xlim=(-1.3, 1.3), ylim=(-1.6, 1.15), aspect="equal")
    ax.axis("off")


def similarity(width: int = 64, reach: int = 128, bases: Sequence[float] = (100, 10_000, 1_000_000)) -> None:
    """Dot product of two sinusoidal rows over their distance, for several bases; 1 is the product with itself."""
    distance = np.arange(-reach, reach + 1)
    curves = {}
    for base in bases:
        rows = sinusoidal(torch.arange(2 * reach + 1), width, base=base)
        curves[f"base {base:,}"] = rows @ rows[reach] / (width / 2)
    _, ax = style.figure(height=3.0)
    style.lines(ax, distance, curves, markers=False)
    ax.set(
        xlabel="distance between two positions",
        ylabel="scaled dot product",
        title="Near is similar; left and right are the same",
    )
    style.show()


def biases(alibi: Tensor, t5: Tensor) -> None:
    """One head of ALiBi beside one head of T5's buckets, each (T, S), and T5's bucket over distance."""
    _, axes = style.figure(1, 3, height=2.9)
    style.heatmap(axes[0], alibi, signed=True)
    style.heatmap(axes[1], t5)
    axes[0].set(title="ALiBi, one head", xlabel="key", ylabel="query")
    axes[1].set(title="T5, bucket number", xlabel="key", ylabel="query")
    distance = torch.arange(0, 161)
    axes[2].step(distance, t5_bucket(-distance, bidirectional=False), where="mid", color=style.BLUE)
    axes[2].set(title="T5, causal", xlabel="distance", ylabel="bucket")
    style.show()


def slopes(slopes: Tensor, reach: int = 64) -> None:
    """What ALiBi multiplies the weight of a key by, over its distance, for every second head."""
    distance = torch.arange(reach)
    curves = {f"head {h}: slope {slopes[h]:.4f}": torch.exp(-slopes[h] * distance) for h in range(0, len(slopes), 2)}
    _, ax = style.figure(height=3.0)
    style.lines(ax, distance, curves, markers=False)
    ax.set(xlabel="distance of the key", ylabel="weight is multiplied by", title="Heads look near and far")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    style.show()


def by_position(accuracy: dict[str, Tensor], first: int, trained: int, chance: float) -> None:
    """Accuracy at each position from ``first`` on, for several schemes; a line marks the end of the trained length."""
    _, ax = style.figure(height=3.6)
    style.lines(ax, range(first, first + len(next(iter(accuracy.values())))), accuracy, markers=False)
    ax.axvline(trained - 0.5, color=style.INK, linewidth=1)
    ax.annotate("trained up to here", (trained, 0.03), xytext=(6, 0), textcoords="offset points", fontsize=9.5)
    ax.axhline(chance, color=style.GREY, linewidth=1, linestyle=":")
    ax.annotate("guessing", (first, chance), xytext=(2, 4), textcoords="offset points", fontsize=9.5)
    ax.set(xlabel="position", ylabel="share correct", ylim=(0, 1.04), title="Which token stood three back?")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    style.show()
