"""The figure of the first chapter: narrow, so that its labels can be read on a phone."""

from collections.abc import Sequence

from tformer_lib.teaching import style


def foretold(tokens: Sequence[str], chances: Sequence[float]) -> None:
    """How probable the model found each token before it read it: a bar a token, from top to bottom.

    Args:
        tokens: T of them.
        chances: the probability of each, drawn to two digits so that the picture is the same on every machine.
    """
    T = len(tokens)
    _, ax = style.figure(width=3.6, height=0.24 * T)
    shares = [round(chance, 2) for chance in chances]
    ax.barh(range(T), shares, color=style.BLUE, height=0.66)
    for i, share in enumerate(shares):
        ax.text(share + 0.02, i, f"{100 * share:.0f} %" if share >= 0.01 else "under 1 %", va="center", fontsize=9.5)
    ax.set_yticks(range(T), [token.strip() or "␣" for token in tokens])
    ax.set(xlim=(0, 1.25), ylim=(T - 0.4, -0.6))
    ax.set_xticks([])
    ax.grid(visible=False)
    ax.spines["bottom"].set_visible(False)
    style.show()
