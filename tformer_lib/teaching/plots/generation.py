"""Figures of the generation chapter: narrow, so that their labels can be read on a phone.

Probabilities are drawn to two or three digits, so that the pictures are the same on every machine.
"""

from collections.abc import Sequence

from tformer_lib.teaching import style


def shapes(places: dict[str, Sequence[tuple[str, float]]]) -> None:
    """The likeliest tokens at some places of a text.

    Args:
        places: the end of the text -> tokens and their probabilities.
    """
    rows = [len(tokens) for tokens in places.values()]
    _, axes = style.figure(
        len(places), 1, width=style.NARROW, height=0.24 * sum(rows) + 0.75 * len(rows), height_ratios=rows
    )
    for ax, (end, tokens) in zip(axes, places.items(), strict=True):
        values = [round(p, 3) for _, p in tokens]
        bars = ax.barh(range(len(tokens)), values, color=style.BLUE)
        ax.bar_label(bars, [f"{p:.2f}" for p in values], padding=3, fontsize=9.5)
        ax.set_yticks(range(len(tokens)), [token.strip() for token, _ in tokens])
        ax.set(xlim=(0, 1.12), ylim=(len(tokens) - 0.4, -0.6))
        ax.set_title(f"after … {end}", fontsize=10.5)
        ax.grid(axis="y", visible=False)
    axes[-1].set_xlabel("probability")
    style.show()


def temperatures(words: Sequence[str], shares: dict[str, Sequence[float]]) -> None:
    """The probabilities of a few words at some temperatures, side by side."""
    _, ax = style.figure(width=style.NARROW, height=3.2)
    thick = 0.8 / len(shares)
    for i, (label, values) in enumerate(shares.items()):
        at = [place + (i - (len(shares) - 1) / 2) * thick for place in range(len(words))]
        ax.bar(at, [round(v, 3) for v in values], thick, label=label, color=style.PALETTE[i])
    ax.set_xticks(range(len(words)), words)
    ax.set_ylabel("probability")
    ax.grid(axis="x", visible=False)
    ax.legend()
    style.show()


def line(words: Sequence[str], probabilities: Sequence[float], u: float) -> None:
    """The line from 0 to 1 cut into parts as long as the probabilities, and where a uniform number falls."""
    _, ax = style.figure(width=style.NARROW, height=1.7)
    left = 0.0
    for i, (word, p) in enumerate(zip(words, probabilities, strict=True)):
        ax.barh(0, p, left=left, height=0.8, color=style.PALETTE[i], alpha=0.35, edgecolor=style.INK, linewidth=0.8)
        ax.text(left + p / 2, 0, word, ha="center", va="center", fontsize=9.5, rotation=0 if p > 0.15 else 90)
        left += p
    ax.annotate(
        f"u = {u}",
        (u, 0.4),
        (u, 0.95),
        ha="center",
        fontsize=10,
        color=style.RUST,
        arrowprops={"arrowstyle": "-|>", "color": style.VERMILION},
    )
    ax.set(xlim=(0, 1), ylim=(-0.5, 1.15), yticks=[])
    ax.grid(visible=False)
    ax.spines["left"].set_visible(False)
    style.show()
