"""Figures of the positional encoding chapter: narrow, so that their labels can be read on a phone."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Circle
from torch import Tensor

from tformer_lib.positional_encoding import sinusoidal, t5_bucket
from tformer_lib.teaching import style


def counters(length: int = 32, bits: int = 5) -> None:
    """A binary counter above sinusoids of the same rhythm: each digit or wave is half as fast as the one above it."""
    positions = torch.arange(length)
    digits = torch.stack([(positions >> i) & 1 for i in range(bits)])
    waves = torch.stack([torch.sin(2 * torch.pi * positions / 2 ** (i + 1) + 0.4) for i in range(bits)])
    _, (upper, lower) = style.figure(2, 1, height=4.0, width=style.NARROW)
    style.heatmap(upper, digits, rows=[f"digit {i}" for i in range(bits)])
    style.heatmap(lower, waves, rows=[f"wave {i}" for i in range(bits)], signed=True)
    upper.set_title("Binary digits jump", fontsize=11)
    lower.set_title("Waves glide", fontsize=11)
    lower.set(xlabel="position")
    style.show()


def table(encoding: Tensor) -> None:
    """A table of encodings, (positions, width), as a heat map."""
    figure, ax = style.figure(height=3.9, width=style.NARROW)
    image = style.heatmap(ax, encoding, signed=True, limit=1.0)
    ax.set(xlabel="channel", ylabel="position")
    figure.colorbar(image, ax=ax, label="value")
    style.show()


def clocks(steps: int, starts: Sequence[int], width: int = 16, count: int = 3) -> None:
    """The first hands of the sinusoidal encoding before and after the same number of steps, from several starts."""
    thetas = 10000.0 ** (-2 * np.arange(count) / width)
    _, axes = style.figure(len(starts), count, height=1.75 * len(starts), width=style.NARROW)
    for row, start in zip(axes, starts, strict=True):
        for i, (ax, theta) in enumerate(zip(row, thetas, strict=True)):
            draw_clock(ax, start * theta, (start + steps) * theta)
            ax.set_title(f"clock {i}: {start} to {start + steps}", fontsize=9.5, loc="center", pad=3)
            ax.text(0, -1.22, f"{np.degrees(steps * theta):.0f}°", ha="center", va="top", fontsize=10.5)
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
    _, ax = style.figure(height=3.2, width=style.NARROW)
    style.lines(ax, distance, curves, markers=False)
    ax.set(xlabel="distance between two positions", ylabel="product, 1 at distance 0", ylim=(None, 1.5))
    style.show()


def biases(alibi: Tensor, t5: Tensor) -> None:
    """One head of ALiBi beside one head of T5's buckets, each (T, S), and T5's bucket over distance."""
    _, axes = plt.subplot_mosaic([["alibi", "t5"], ["curve", "curve"]], figsize=(style.NARROW, 4.8))
    style.heatmap(axes["alibi"], alibi, signed=True)
    style.heatmap(axes["t5"], t5)
    distance = torch.arange(0, 161)
    axes["curve"].step(distance, t5_bucket(-distance, bidirectional=False), where="mid", color=style.BLUE)
    axes["alibi"].set(xlabel="key", ylabel="query")
    axes["t5"].set(xlabel="key")
    axes["curve"].set(xlabel="distance", ylabel="bucket")
    titles = {"alibi": "ALiBi, one head", "t5": "T5, bucket", "curve": "T5, causal"}
    for name, title in titles.items():
        axes[name].set_title(title, fontsize=10.5)
    style.show()


def slopes(slopes: Tensor, reach: int = 64) -> None:
    """What ALiBi multiplies the weight of a key by, over its distance, for every second head."""
    distance = torch.arange(reach)
    curves = {
        f"head {h}: slope 1/{1 / slopes[h]:.0f}": torch.exp(-slopes[h] * distance) for h in range(0, len(slopes), 2)
    }
    _, ax = style.figure(height=3.9, width=style.NARROW)
    style.lines(ax, distance, curves, markers=False)
    ax.set(xlabel="distance of the key", ylabel="weight is multiplied by")
    ax.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=2, columnspacing=1.0)
    style.show()


def by_position(accuracy: dict[str, Tensor], first: int, trained: int, chance: float) -> None:
    """Accuracy at each position from ``first`` on, a panel a scheme; lines mark the trained length and guessing."""
    rows = -(-len(accuracy) // 2)
    _, axes = style.figure(rows, 2, height=1.65 * rows, width=style.NARROW, sharex=True, sharey=True)
    for ax, (name, share) in zip(axes.flat, accuracy.items(), strict=False):
        ax.plot(range(first, first + len(share)), share, color=style.BLUE)
        ax.axvline(trained - 0.5, color=style.INK, linewidth=1)
        ax.axhline(chance, color=style.GREY, linewidth=1, linestyle=":")
        ax.set(ylim=(0, 1.08))
        ax.set_title(name, fontsize=10.5, pad=4)
    for ax in axes[-1]:
        ax.set_xlabel("position")
    for ax in axes[:, 0]:
        ax.set_ylabel("share right")
    style.show()
