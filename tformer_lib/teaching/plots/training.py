"""The figures of chapter 06."""

from collections.abc import Callable, Sequence

import numpy as np

from tformer_lib.teaching import style


def surprises(words: Sequence[str], nats: Sequence[float]) -> None:
    """How surprising each token was, from top to bottom; drawn to one digit, the same on every machine."""
    _, ax = style.figure(width=style.NARROW, height=0.24 * len(words) + 0.5)
    values = [round(x, 1) for x in nats]
    bars = ax.barh(range(len(words)), values, color=[style.VERMILION if x >= 1.5 else style.BLUE for x in values])
    ax.bar_label(bars, [f"{x:.1f}" for x in values], padding=3, fontsize=9.5)
    ax.set_yticks(range(len(words)), [word.replace(" ", "\u00b7") for word in words])
    ax.set(xlabel="surprise in nats", xlim=(0, 1.15 * max(values)), ylim=(len(words) - 0.4, -0.6))
    ax.grid(axis="y", visible=False)
    style.show()


def one_batch(losses: dict[str, Sequence[float]], floor: float) -> None:
    """The loss on one batch, step by step, of runs that should learn it by heart.

    Args:
        losses: label -> the loss of each step.
        floor: the entropy of the text, nats per token.
    """
    _, ax = style.figure(width=style.NARROW, height=3.2)
    style.lines(ax, range(len(next(iter(losses.values())))), losses, markers=False)
    ax.axhline(floor, color=style.INK, linewidth=1.0, linestyle="--")
    ax.text(0, floor * 0.75, f"floor {floor:.2f}", fontsize=9.5, va="top")
    ax.set(xlabel="step", ylabel="nats per token", yscale="log", ylim=(0.03, 9))
    ax.set_yticks([0.03, 0.1, 0.3, 1, 3], ["0.03", "0.1", "0.3", "1", "3"])
    ax.minorticks_off()
    style.show()


def sweep(rates: Sequence[float], losses: Sequence[float], steps: int) -> None:
    """The loss after a few steps over the peak learning rate."""
    _, ax = style.figure(width=style.NARROW, height=2.8)
    ax.plot(rates, losses, marker="o")
    for rate, loss in zip(rates, losses, strict=True):
        place = {"xytext": (0, -8), "va": "top"} if loss == min(losses) else {"xytext": (0, 7)}  # away from the line
        ax.annotate(f"{loss:.1f}", (rate, loss), **place, textcoords="offset points", ha="center", fontsize=9.5)
    ax.set(xlabel="peak learning rate", ylabel="nats per token", xscale="log", ylim=(2, 7.8))
    ax.set_title(f"validation loss after {steps} steps", fontsize=10.5)
    style.show()


def budget(sizes: Sequence[float], losses: dict[str, Sequence[float]]) -> None:
    """The loss over the number of parameters at a fixed budget, by two fits of one law.

    Args:
        sizes: parameters.
        losses: label -> the loss at each size.
    """
    _, ax = style.figure(width=style.NARROW, height=3.2)
    for i, (label, values) in enumerate(losses.items()):
        ax.plot(sizes, values, label=label, color=style.PALETTE[i], linestyle=style.DASHES[i])
        best = int(np.argmin(values))
        ax.plot(sizes[best], values[best], style.MARKERS[i], color=style.PALETTE[i], markersize=8)
    ax.set(xlabel="parameters", ylabel="loss in nats", xscale="log", ylim=(1.9, 2.2))
    ax.legend(loc="upper center")
    style.show()


def loop() -> None:
    """The loop of training, as boxes and arrows."""
    _, ax = style.figure(width=style.NARROW, height=2.9)
    boxes = {
        "text\nas tokens": (0.62, 2.3),
        "windows\n(batch, T)": (2.02, 2.3),
        "model\n(at first\nrandom)": (3.45, 2.3),
        "loss\n-log p(next)": (3.3, 0.4),
        "gradient": (1.2, 0.4),
    }
    look = {"boxstyle": "round,pad=0.4", "facecolor": "white", "edgecolor": style.BLUE}
    for words, (x, y) in boxes.items():
        ax.text(x, y, words, ha="center", va="center", bbox=look)
    for start, end in (
        ((1.1, 2.3), (1.48, 2.3)),
        ((2.56, 2.3), (2.96, 2.3)),
        ((3.45, 1.86), (3.45, 0.72)),
        ((2.7, 0.4), (1.67, 0.4)),
    ):
        ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": style.INK, "linewidth": 1.3})
    step = {"arrowstyle": "-|>", "color": style.VERMILION, "linewidth": 1.6}
    ax.annotate("", (2.98, 1.95), (1.35, 0.62), arrowprops=step)
    ax.text(0.1, 1.35, "AdamW: a small step\nof every weight", va="center", color=style.RUST)
    ax.set(xlim=(0, 4.2), ylim=(0, 2.9))
    ax.axis("off")
    style.show()


def valley(paths: dict[str, np.ndarray], curvature: tuple[float, float]) -> None:
    """Where optimizers walk in a valley that is steep across and flat along.

    Args:
        paths: label -> (steps, 2) positions.
        curvature: of the two axes.
    """
    _, ax = style.figure(width=style.NARROW, height=3.2)
    x, y = np.meshgrid(np.linspace(-10.5, 1.5, 120), np.linspace(-1.5, 1.5, 80))
    ax.contour(x, y, np.sqrt(curvature[0] * x**2 + curvature[1] * y**2), levels=10, colors=style.GREY, linewidths=0.6)
    for i, (label, path) in enumerate(paths.items()):
        ax.plot(
            *path.T,
            label=label,
            color=style.PALETTE[i],
            linestyle=style.DASHES[i],
            marker=style.MARKERS[i],
            markersize=3.5,
        )
    ax.plot(0, 0, marker="*", color=style.INK, markersize=13, linestyle="none", label="the lowest point")
    ax.set(xlabel="weight 1 (flat)", ylabel="weight 2 (steep)", xlim=(-10.5, 1.5), ylim=(-1.5, 1.5))
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0))
    style.show()


def schedule(rate: Callable[[int], float], warmup: int, steps: int) -> None:
    """The learning rate of every step."""
    _, ax = style.figure(width=style.NARROW, height=2.6)
    ax.plot(range(steps + 1), [rate(t) for t in range(steps + 1)])
    ax.axvline(warmup, color=style.GREY, linestyle=":", linewidth=1.2)
    ax.annotate("the warm-up ends", (warmup, rate(steps)), (warmup + 0.02 * steps, rate(steps)), fontsize=9.5)
    ax.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    style.show()


def losses(short: Sequence[dict], long: Sequence[dict], floor: float) -> None:
    """The run of this page, and the longer one that was recorded, each beside the floor.

    Args:
        short: measurements of this page's run.
        long: those of the recorded run.
        floor: nats per token that no model can expect to beat.
    """
    _, axes = style.figure(2, 1, width=style.NARROW, height=5.4, sharey=True)
    titles = ("this page, on a CPU", "recorded, on a GPU")
    for ax, title, history in zip(axes, titles, (short, long), strict=True):
        train = [(h["step"], h["loss"]) for h in history if "loss" in h]
        val = [(max(h["step"], 1), h["val_loss"]) for h in history if "val_loss" in h]  # no 0 on a logarithmic axis
        ax.plot(*zip(*train, strict=True), color=style.SKY, linewidth=1.2, label="training batch")
        ax.plot(*zip(*val, strict=True), color=style.BLUE, marker="o", markersize=4, label="validation")
        ax.axhline(floor, color=style.VERMILION, linestyle="--", label=f"floor: {floor:.3f}")
        ax.set(title=title, ylabel="nats per token", xscale="log", yscale="log", ylim=(0.22, 8))
        ax.set_yticks([0.25, 0.5, 1, 2, 4, 8], ["0.25", "0.5", "1", "2", "4", "8"])
        ax.minorticks_off()
    line = {"arrowstyle": "-", "color": style.INK, "linewidth": 0.8}
    for words, (step, loss), place in (("shelf", (200, 0.5), (45, 0.34)), ("spike", (500, 0.4), (1100, 0.62))):
        axes[1].annotate(words, (step, loss), place, ha="center", va="center", fontsize=10, arrowprops=line)
    axes[1].set_xlabel("step")
    axes[0].legend(loc="lower left", bbox_to_anchor=(0, 0.12))
    style.show()


def overfitting(histories: dict[str, Sequence[dict]], reference: float, label: str) -> None:
    """Training and validation loss of recorded runs, which part.

    Args:
        histories: label -> measurements.
        reference: a published loss to compare with.
        label: whose it is.
    """
    _, ax = style.figure(width=style.NARROW, height=4.4)
    for i, (name, history) in enumerate(histories.items()):
        val = [(h["step"], h["val_loss"]) for h in history if "val_loss" in h and h["step"]]
        train = [(h["step"], h["loss"]) for h in history if "loss" in h and h["step"] >= 100]
        smooth = [(step, np.mean([x for s, x in train if step - 250 < s <= step])) for step, _ in val]
        colour = style.PALETTE[i]
        ax.plot(
            *zip(*val, strict=True), color=colour, marker=style.MARKERS[i], markersize=4, label=f"validation, {name}"
        )
        ax.plot(*zip(*smooth, strict=True), color=colour, linestyle=":", label=f"training, {name}")
    ax.axhline(reference, color=style.INK, linewidth=1.0, linestyle="--", label=f"{label}: {reference}")
    ax.set(xlabel="step", ylabel="nats per character", ylim=(0.3, 2.6))
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0))
    style.show()


def flops(parts: dict[str, float]) -> None:
    """What a token's training step is made of, in floating-point operations."""
    _, ax = style.figure(height=1.9)
    names, values = list(parts), [parts[name] / 1e6 for name in parts]
    bars = ax.barh(names, values, color=[style.PALETTE[i] for i in range(len(names))], height=0.6)
    ax.bar_label(bars, [f"{v:.1f}" for v in values], padding=4, fontsize=9.5)
    ax.set(xlabel="million floating-point operations per token", xlim=(0, 1.12 * max(values)))
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    style.show()
