"""Figures of the serving chapter: narrow, so that a phone can show their labels."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from tformer_lib.serving import Step
from tformer_lib.teaching import style

READING, WRITING, IDLE = style.ORANGE, style.BLUE, "#FFFFFF"


def static_lanes(writes: Sequence[int], max_num_seqs: int) -> list[list[tuple[int, int, str]]]:
    """What each request does under static batching: (first step, steps, "reading" | "writing" | "idle").

    Args:
        writes: tokens that each request writes, in the order of arrival; a batch reads its prompts in one step, which
            writes the first token of each.
        max_num_seqs: requests in a batch.
    """
    lanes, start = [], 0
    for first in range(0, len(writes), max_num_seqs):
        batch = writes[first : first + max_num_seqs]
        for new in batch:
            rest = (start + new, max(batch) - new, "idle")
            lanes.append([(start, 1, "reading"), (start + 1, new - 1, "writing"), rest])
        start += max(batch)
    return lanes


def engine_lanes(log: Sequence[Step], requests: int) -> list[list[tuple[int, int, str]]]:
    """What each request does in an engine's log, in the same words. A step that reads a prompt's end also writes."""
    lanes: list[list[tuple[int, int, str]]] = [[] for _ in range(requests)]
    furthest = [0] * requests
    for number, step in enumerate(log):
        for arrival, start, count in step.rows:
            is_again = start < furthest[arrival]  # it had to give its blocks back
            kind = "reading" if count > 1 or start == 0 or is_again else "writing"
            furthest[arrival] = max(furthest[arrival], start + count)
            lane = lanes[arrival]
            if lane and lane[-1][2] == kind and lane[-1][0] + lane[-1][1] == number:
                lane[-1] = (lane[-1][0], lane[-1][1] + 1, kind)
            else:
                lane.append((number, 1, kind))
    return lanes


def lanes(pictures: dict[str, list[list[tuple[int, int, str]]]]) -> None:
    """One panel a picture: a line a request, time in steps to the right.

    Args:
        pictures: title -> lanes, as :func:`static_lanes` and :func:`engine_lanes` give them.
    """
    _, axes = style.figure(
        len(pictures), 1, width=style.NARROW, height=2.5 * len(pictures) + 0.8, sharex=True, squeeze=False
    )
    end = max(start + steps for rows in pictures.values() for lane in rows for start, steps, _ in lane)
    for ax, (title, rows) in zip(axes[:, 0], pictures.items(), strict=True):
        for line, lane in enumerate(rows):
            draw_lane(ax, line, lane)
        last = max(start + steps for lane in rows for start, steps, _ in lane)
        ax.axvline(last, color=style.INK, linewidth=1)
        ax.set(xlim=(0, 1.01 * end), ylim=(len(rows) - 0.4, -0.6), ylabel="request")
        ax.set_title(f"{title}: {last} steps", fontsize=10.5)
        ax.set_yticks(range(0, len(rows), 2))
        ax.grid(axis="y", visible=False)
    axes[-1, 0].set_xlabel("step")
    idle = {"facecolor": IDLE, "hatch": "////", "edgecolor": style.GREY}
    keys = [
        Patch(facecolor=READING, label="reads"),
        Patch(facecolor=WRITING, label="writes"),
        Patch(label="idle", **idle),
    ]
    axes[0, 0].figure.legend(handles=keys, loc="outside lower center", ncols=3)
    style.show()


def draw_lane(ax: Axes, line: int, lane: list[tuple[int, int, str]]) -> None:
    """The bars of one request."""
    for start, steps, kind in lane:
        look = {"facecolor": READING if kind == "reading" else WRITING, "edgecolor": "none"}
        if kind == "idle":
            look = {"facecolor": IDLE, "hatch": "////", "edgecolor": style.GREY, "linewidth": 0.6}
        ax.barh(line, steps, left=start, height=0.75, **look)


def bound(rows: Sequence[int], seconds: Sequence[float], marks: dict[str, int]) -> None:
    """Tokens a second, and milliseconds that each reader waits for the next token, over the number of rows.

    Args:
        rows: rows of a step.
        seconds: least time of a step with so many rows.
        marks: label -> a number of rows to point at.
    """
    rows, seconds = np.array(rows), np.array(seconds)
    _, axes = style.figure(2, 1, width=style.NARROW, height=5.4)
    axes[0].plot(rows, rows / seconds / 1e3, color=style.BLUE)
    axes[1].plot(rows, seconds * 1e3, color=style.VERMILION, linestyle="--")
    for i, (name, place) in enumerate(marks.items()):
        at = np.interp(place, rows, seconds)
        for ax, y in ((axes[0], place / at / 1e3), (axes[1], at * 1e3)):
            ax.plot(place, y, marker=style.MARKERS[i], color=style.INK, linestyle="none", label=name)
    axes[0].set(title="All together", xlabel="rows in a step", ylabel="thousand tokens a second", ylim=(0, None))
    axes[1].set(title="Each of them", xlabel="rows in a step", ylabel="ms between tokens", ylim=(0, None))
    axes[0].legend(loc="lower right")
    style.show()


def budgets(names: Sequence[int], worst: Sequence[float], first: Sequence[float], total: Sequence[float]) -> None:
    """What a token budget buys and costs.

    Args:
        names: the budgets.
        worst: seconds of the longest pause between two tokens of a request that writes.
        first: seconds until the median request has its first token.
        total: seconds until all have ended.
    """
    _, ax = style.figure(width=style.NARROW, height=3.9)
    series = {
        "longest pause between two tokens": [1e3 * value for value in worst],
        "first token, median request": [1e3 * value for value in first],
        "all requests done": [1e3 * value for value in total],
    }
    style.lines(ax, names, series)
    style.log2_axis(ax, names, [f"{n:,}" if i % 2 == 0 else "" for i, n in enumerate(names)], log_y=True)
    ax.set(xlabel="tokens that a step may compute", ylabel="ms, by the bound", ylim=(0.4, 6e3))
    ax.legend(loc="upper right", ncols=1)
    style.show()


def latency(
    rates: Sequence[float], visits: Sequence[tuple[Sequence[float], Sequence[float]]], knee: tuple[float, float]
) -> None:
    """Time to the first token and time per output token, over the rate at which requests arrive.

    Args:
        rates: requests a second.
        visits: for each rate the seconds of the first and of the second, one for each request.
        knee: between which two rates the knee was predicted.
    """
    _, axes = style.figure(2, 1, width=style.NARROW, height=5.8)
    first = {
        "median": [1e3 * np.median(waits) for waits, _ in visits],
        "90th percentile": [1e3 * np.quantile(waits, 0.9) for waits, _ in visits],
    }
    style.lines(axes[0], rates, first)
    axes[0].set_yscale("log")
    style.lines(axes[1], rates, {"median": [1e3 * np.median(gaps) for _, gaps in visits]})
    axes[0].set(title="Time to the first token", ylabel="ms, by the cost model")
    axes[1].set(title="Time per output token", ylabel="ms, by the cost model", ylim=(0, None))
    for ax in axes:
        ax.axvspan(*knee, color=style.GREY, alpha=0.25, label="predicted knee")
        ax.set(xlabel="requests a second")
        ax.legend(loc="upper left" if ax is axes[0] else "lower right")
    style.show()


def driven(rows: Sequence[dict]) -> None:
    """The waits of an engine that was driven, and those that the cost models predict, over the rate of arrivals.

    Args:
        rows: of a record of ``benchmarks/serving.py``, those of its part "knee" among them.
    """
    _, axes = style.figure(2, 1, width=style.NARROW, height=6.4)
    names = {"driven": "measured", "predicted by the bound": "by the bound"}
    names["predicted by its steps"] = "by the measured steps"
    rows = [row for row in rows if "rate" in row["extra"]]
    rates = sorted({row["extra"]["rate"] for row in rows})
    for ax, waits, percentile in ((axes[0], "ttft_ms", "p90"), (axes[1], "tpot_ms", "p50")):
        found = {(row["contestant"], row["extra"]["rate"]): row["extra"][waits][percentile] for row in rows}
        ys = {name: [found[who, rate] for rate in rates] for who, name in names.items() if (who, rates[0]) in found}
        style.lines(ax, rates, ys)
        ax.set(xlabel="requests a second", ylabel="ms")
        ax.get_legend().remove()
    axes[0].figure.legend(handles=axes[0].lines, loc="outside lower center")
    axes[0].set(title="Time to the first token, 90th percentile", yscale="log")
    axes[1].set(title="Time per output token, median", ylim=(0, None))
    style.show()


def blocks(log: Sequence[Step], blocks: int, requests: int) -> None:
    """Blocks held and requests running over an engine's steps; a mark where one had to give its blocks back."""
    _, (top, bottom) = style.figure(2, 1, width=style.NARROW, height=4.8, sharex=True, height_ratios=(1, 1.5))
    steps = range(len(log))
    top.step(steps, [step.held_blocks for step in log], where="post", color=style.GREEN)
    top.axhline(blocks, color=style.INK, linestyle=":", linewidth=1)
    lost = [number for number, step in enumerate(log) if step.preemptions]
    top.plot(lost, [blocks] * len(lost), "v", color=style.VERMILION, label="a request is preempted", clip_on=False)
    top.set(ylabel="blocks held", ylim=(0, 1.15 * blocks))
    top.legend(loc="lower right")
    for line, lane in enumerate(engine_lanes(log, requests)):
        draw_lane(bottom, line, lane)
    bottom.set(xlabel="step", ylabel="request", ylim=(requests - 0.4, -0.6), xlim=(0, len(log)))
    bottom.set_yticks(range(requests))
    bottom.grid(axis="y", visible=False)
    bottom.legend(handles=[Patch(facecolor=READING, label="reads"), Patch(facecolor=WRITING, label="writes")], ncols=2)
    style.show()


def throughput(rates: dict[str, float], ours: str = "engine") -> None:
    """Tokens a second of each way to serve, and how many times more the engine writes."""
    _, ax = style.figure(width=style.NARROW, height=0.6 + 0.65 * len(rates))
    for line, (name, rate) in enumerate(rates.items()):
        ax.barh(line, rate, color=style.BLUE if name == ours else style.GREY, height=0.45)
        ratio = "" if name == ours else f"; the engine writes {rates[ours] / rate:.1f} x as many"
        ax.text(0, line - 0.28, f"{name}: {rate:,.0f}{ratio}", va="bottom", fontsize=9.5)
    ax.set(xlabel="tokens a second", ylim=(len(rates) - 0.6, -0.8), yticks=[])
    ax.grid(axis="y", visible=False)
    style.show()


def progress(engine: Sequence[Sequence[float]], static: Sequence[Sequence[float]], room: int) -> None:
    """Rows and memory in use over the time of a run.

    Args:
        engine: (seconds, rows that write, tokens computed, live tokens, waiting, held blocks) of some steps.
        static: (seconds, rows that somebody waits for, rows, live tokens) of some steps.
        room: tokens that the memory holds.
    """
    ours, theirs = np.array(engine, dtype=float).T, np.array(static, dtype=float).T
    _, axes = style.figure(2, 1, width=style.NARROW, height=5.8)
    axes[0].plot(ours[0], ours[1], color=style.BLUE, label="engine")
    axes[0].plot(theirs[0], theirs[1], color=style.VERMILION, linestyle="--", label="static batches")
    axes[0].set(title="Rows that somebody waits for", xlabel="seconds", ylim=(0, None))
    axes[1].plot(ours[0], ours[3] / room, color=style.BLUE, label="engine: tokens held")
    axes[1].plot(theirs[0], theirs[3] / room, color=style.VERMILION, linestyle="--", label="static: tokens held")
    axes[1].axhline(1.0, color=style.VERMILION, linewidth=1, linestyle=":", label="static: reserved")
    axes[1].set(title="Share of the 4 GiB", xlabel="seconds", ylim=(0, 1.45))
    for ax in axes:
        ax.legend(loc="upper right")
    style.show()
