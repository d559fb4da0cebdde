"""Figures of the profiling chapter: timelines of recorded kernels, rooflines, before and after, narrow for a phone."""

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from tformer_lib.profiling import Roofline, amdahl, spans, totals, unpack, utilisation
from tformer_lib.teaching import style

HATCHES = ("", "///", "xx", "\\\\\\", "+++")


def timeline(
    recordings: dict[str, dict],
    *,
    window_us: float | None = None,
    named: int = 4,
    title: str = "",
    lane: str = "stream",
) -> None:
    """What a device did over the same fixed window, one strip a recording: kernels as bars by stream, gaps left white.

    Args:
        recordings: label -> what :func:`tformer_lib.profiling.pack` made.
        window_us: the window from 0 that every strip shows; by default the shortest recording's.
        named: how many of the kernels that take the most time have a colour of their own.
        lane: what a row is: a GPU's stream, a processor's thread.
    """
    window = window_us or min(r["window_us"] for r in recordings.values())
    unit, size = ("ms", 1e3) if window >= 2000 else ("µs", 1.0)
    shown = {label: [i for i in unpack(r) if i["start_us"] < window] for label, r in recordings.items()}
    looks = looks_of([i for intervals in shown.values() for i in intervals], named)
    height = 1.0 + 0.17 * len(looks) + 1.1 * len(shown)
    _, axes = style.figure(len(shown), 1, width=style.NARROW, height=height, sharex=True, squeeze=False)
    for ax, (label, intervals) in zip(axes[:, 0], shown.items(), strict=True):
        strip(ax, intervals, looks, size, lane, gap_us=window / 1000)
        busy = utilisation(intervals, 0, window) if intervals else 0.0
        ax.set_title(f"{label}: busy {busy:.0%} of the time", fontsize=10)
    axes[-1, 0].set(xlim=(0, window / size), xlabel=f"{unit} since the window opened")
    legend(axes[-1, 0], looks)
    if title:
        axes[0, 0].figure.suptitle(title, x=0.01, ha="left", fontsize=11.5, fontweight="bold")
    style.show()


def looks_of(intervals: Sequence[dict], named: int) -> dict[str, tuple[str, str]]:
    """Name -> (colour, hatch) for those that take the most time; the others share the last entry."""
    names = list(totals(intervals))[:named]
    return {name: (style.PALETTE[i], HATCHES[i]) for i, name in enumerate(names)} | {"others": (style.GREY, "")}


def strip(
    ax: Axes, intervals: Sequence[dict], looks: dict[str, tuple[str, str]], size: float, lane: str, *, gap_us: float
) -> None:
    """One recording: a row for each stream. Bars of a kind nearer than ``gap_us``, a dot, are drawn as one."""
    streams = sorted({i["stream"] for i in intervals})
    for name, (colour, _) in reversed(looks.items()):  # those that take the most time on top
        mine = [i for i in intervals if (i["name"] if i["name"] in looks else "others") == name]
        for row, stream in enumerate(streams):
            stretches = spans([i for i in mine if i["stream"] == stream], gap_us=gap_us)
            bars = [(begin / size, (end - begin) / size) for begin, end in stretches]
            ax.broken_barh(bars, (row - 0.42, 0.84), facecolor=colour, edgecolor=colour, linewidth=0.2)
    ax.set_yticks(range(len(streams)), [f"{lane} {i + 1}" for i in range(len(streams))])
    ax.set_ylim(-0.6, max(len(streams), 1) - 0.4)
    ax.grid(False)


def legend(ax: Axes, looks: dict[str, tuple[str, str]]) -> None:
    """The named kernels, under the axis."""
    handles = [Patch(facecolor=colour, label=shortened(name)) for name, (colour, _) in looks.items()]
    ax.figure.legend(handles=handles, loc="outside lower left", ncols=1)


def shortened(name: str, longest: int = 38) -> str:
    """A name that fits beside another."""
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def roofline(roof: Roofline, points: dict[str, tuple[float, float]]) -> None:
    """The limit over the intensity, and what was reached: the dotted line above a mark is what is left.

    Args:
        roof: the device's limits.
        points: label -> (FLOPs per byte, FLOP/s reached).
    """
    at = [intensity for intensity, _ in points.values()]
    x = np.geomspace(min(at) / 3, max(at) * 3, 200)
    _, ax = style.figure(width=style.NARROW, height=5.2)
    ax.plot(x, [roof.rate(i) / 1e12 for i in x], color=style.INK, linewidth=2)
    ax.axvline(roof.ridge, color=style.GREY, linestyle="--", linewidth=1)
    for i, (label, (intensity, rate)) in enumerate(points.items()):
        colour, marker = style.PALETTE[i % 6], style.MARKERS[i % 6]
        ax.plot([intensity] * 2, [rate / 1e12, roof.rate(intensity) / 1e12], ":", color=colour, linewidth=1.5)
        ax.plot(intensity, rate / 1e12, marker, color=colour, markersize=9, markeredgecolor="white", label=label)
    top = 12 * roof.flops_per_second / 1e12
    for place, side, words in ((0.85, "right", "memory\ndecides"), (1.18, "left", "arithmetic\ndecides")):
        ax.text(roof.ridge * place, top / 1.4, words, ha=side, va="top", fontsize=9.5, color=style.INK)
    ax.set(xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel="TFLOP/s", xlim=(x[0], x[-1]), ylim=(None, top))
    ax.set_title("Under the roof of one GPU")
    ax.figure.legend(loc="outside lower center", ncols=1)
    style.show()


def before_after(pairs: dict[str, tuple[float, float, float | None]], *, unit: str = "ms", title: str = "") -> None:
    """Bars of times: measured, and the roofline's prediction as a mark.

    Args:
        pairs: label -> (seconds, half the spread in seconds, predicted seconds or None).
    """
    size = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}[unit]
    _, ax = style.figure(width=style.NARROW, height=1.5 + 0.5 * len(pairs))
    for row, (_, (seconds, error, predicted)) in enumerate(pairs.items()):
        ax.barh(row, seconds / size, 0.6, color=style.BLUE if row == len(pairs) - 1 else style.SKY, xerr=error / size)
        ax.text(seconds / size, row, f"  {seconds / size:.3g} {unit}", va="bottom", fontsize=9.5)
        if predicted is not None:
            ax.plot([predicted / size] * 2, [row - 0.4, row + 0.4], color=style.VERMILION, linewidth=3)
    ax.plot([], [], color=style.VERMILION, linewidth=3, label="predicted")
    ax.set_yticks(range(len(pairs)), [textwrap.fill(label, 15) for label in pairs])
    ax.invert_yaxis()
    ax.set(xlabel=unit, xlim=(0, 1.35 * max(s + e for s, e, _ in pairs.values()) / size))
    ax.set_title(textwrap.fill(title, 36), fontsize=10)
    ax.figure.legend(loc="outside lower center")
    ax.grid(axis="y", visible=False)
    style.show()


def steps_over_batch(
    batches: Sequence[int], lines: dict[str, Sequence[float]], predicted: dict[str, Sequence[float]]
) -> None:
    """Milliseconds of a decode step over the batch: measured with markers, predicted as thin grey lines."""
    _, ax = style.figure(width=style.NARROW, height=3.9)
    style.lines(ax, batches, {name: [1e3 * s for s in seconds] for name, seconds in lines.items()})
    for i, (name, seconds) in enumerate(predicted.items()):
        look = {"color": style.GREY, "linestyle": style.DASHES[i + 2], "linewidth": 1.5}
        ax.plot(batches, [1e3 * s for s in seconds], label=name, **look)
    ax.set(xscale="log", yscale="log", xlabel="rows in the batch", ylabel="milliseconds of a step")
    ax.set_xticks(list(batches), [str(b) for b in batches])
    ax.minorticks_off()
    ax.set_title("One decode step over its rows")
    if ax.get_legend() is not None:
        ax.get_legend().remove()
    ax.figure.legend(loc="outside lower center", ncols=2)
    style.show()


def three_times(parts: dict[str, dict[str, float]]) -> None:
    """For each piece of work, the seconds that arithmetic, memory and launches would take alone; the longest decides.

    Args:
        parts: label -> what :meth:`Roofline.parts` gives.
    """
    _, ax = style.figure(width=style.NARROW, height=3.5)
    kinds = ("arithmetic", "memory", "launches")
    for i, kind in enumerate(kinds):
        values = [1e3 * p[kind] for p in parts.values()]
        ax.bar(
            np.arange(len(parts)) + 0.27 * (i - 1), values, 0.25, color=style.PALETTE[i], hatch=HATCHES[i], label=kind
        )
    ax.set_xticks(range(len(parts)), [textwrap.fill(label, 12) for label in parts])
    ax.set(yscale="log", ylabel="milliseconds, alone")
    ax.set_title("Three times for the same work")
    ax.grid(axis="x", visible=False)
    ax.figure.legend(loc="outside lower center", ncols=3, columnspacing=1.0)
    style.show()


def law_of_amdahl(shares: Sequence[float]) -> None:
    """How much faster the whole gets as a part of it gets faster."""
    _, ax = style.figure(width=style.NARROW, height=3.4)
    speedups = np.geomspace(1, 100, 60)
    style.lines(
        ax,
        speedups,
        {f"{share:.0%} of the time": [amdahl(share, s) for s in speedups] for share in shares},
        markers=False,
    )
    ax.set(xscale="log", xlabel="times that the part gets faster", ylabel="times that the whole does", ylim=(0, None))
    ax.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    ax.minorticks_off()
    ax.set_title("Amdahl's law")
    style.show()


def steadiness(found: dict[str, dict]) -> None:
    """The medians of the same measurement, repeated: each as a share of the median of all."""
    _, ax = style.figure(width=style.NARROW, height=2.4)
    rows = {name: facts["medians"] for name, facts in found.items() if "medians" in facts}
    for row, medians in enumerate(rows.values()):
        shares = [m / float(np.median(medians)) for m in medians]
        ax.plot(shares, [row] * len(medians), style.MARKERS[row], color=style.PALETTE[row], alpha=0.6)
    ax.axvline(1.0, color=style.GREY, linewidth=1)
    ax.set_yticks(range(len(rows)), [textwrap.fill(name, 13) for name in rows])
    ax.set(xlabel="time, as a share of the median of all", ylim=(-0.6, len(rows) - 0.4))
    ax.set_title("The same measurement again")
    style.show()


SHARES = {
    "tensor_share": "tensor cores busy",
    "issue_share": "cycles that issue an instruction",
    "dram_share": "memory busy",
    "occupancy": "warps resident",
}
"""What the hardware counts -> what we call it."""


def counters(kernels: dict[str, dict], shares: Sequence[str], *, title: str = "What the hardware counted") -> None:
    """For each kernel, what the hardware counted, as shares of its peaks.

    Args:
        kernels: label -> one kernel as :func:`tformer_lib.profiling.read_counters` gives it.
        shares: which of :data:`SHARES` to draw.
    """
    _, ax = style.figure(width=style.NARROW, height=1.7 + (0.14 + 0.14 * len(shares)) * len(kernels))
    thick = 0.8 / len(shares)
    for i, word in enumerate(shares):
        values = [100 * k.get(word, 0.0) for k in kernels.values()]
        look = {"facecolor": style.PALETTE[i], "hatch": HATCHES[i], "edgecolor": "white", "label": SHARES[word]}
        ax.barh(np.arange(len(kernels)) + thick * (i - (len(shares) - 1) / 2), values, 0.95 * thick, **look)
    ax.set_yticks(range(len(kernels)), list(kernels))
    ax.invert_yaxis()
    ax.set(xlim=(0, 100), xlabel="% of the peak")
    ax.set_title(textwrap.fill(title, 36), fontsize=10)
    ax.figure.legend(loc="outside lower center", ncols=1)
    ax.grid(axis="y", visible=False)
    style.show()
