"""Draw the picture of the front page: ``python -m tools.front_figure`` writes ``book/images/front.html``.

Ten small panels, one idea each, on a wide screen in two rows and on a phone in two columns. The colours are CSS
variables, so that the picture follows the theme. The stripes and the weights are computed by the library.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from tformer_lib import command_line, masks
from tformer_lib.positional_encoding import alibi, sinusoidal

PANEL = (176, 168)  # width and height of a panel
GAP = 14
INK, DIM, LINE = "currentColor", "var(--pst-color-text-muted)", "var(--pst-color-border)"
ACCENT, SECOND = "var(--tf-accent)", "var(--tf-second)"
WORDS = ("I", "have", "lost", "my", "red", "ball")


def box(x, y, width, height, fill="none", stroke="none", radius=3, opacity=1.0) -> str:
    """A rectangle."""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{radius}" '
        f'fill="{fill}" fill-opacity="{opacity:.2f}" stroke="{stroke}"/>'
    )


def text(x, y, words, size=13, anchor="middle", fill=INK, weight=400) -> str:
    """A line of text."""
    look = f'font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" style="fill:{fill}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {look}>{words}</text>'


def line(x1, y1, x2, y2, stroke=DIM, arrow=False) -> str:
    """A line, with an arrow's head if wanted."""
    head = ' marker-end="url(#tf-arrow)"' if arrow else ""
    return f'<path d="M{x1:.1f} {y1:.1f} L{x2:.1f} {y2:.1f}" stroke="{stroke}" stroke-width="1.5" fill="none"{head}/>'


def grid(values: torch.Tensor, x, y, cell, gap=1.5, fill=ACCENT) -> str:
    """A matrix of values between 0 and 1 as squares of that opacity."""
    rows, columns = values.shape
    return "".join(
        box(x + j * cell, y + i * cell, cell - gap, cell - gap, fill, radius=2, opacity=float(values[i, j]))
        for i in range(rows)
        for j in range(columns)
    )


def tokens() -> str:
    """Text cut into tokens."""
    pieces = (("the", 30), (" fox", 34), (" jump", 44), ("ed", 24))
    parts, x = [text(88, 58, "the fox jumped", 15)], 16
    for i, (piece, width) in enumerate(pieces):
        parts.append(box(x, 78, width, 30, ACCENT if i % 2 == 0 else SECOND, opacity=0.28, radius=5))
        parts.append(text(x + width / 2, 98, piece.strip(), 13))
        x += width + 4
    return "".join(parts)


def positions() -> str:
    """Sinusoidal encodings of ten positions."""
    stripes = (sinusoidal(12, 14).float() + 1) / 2
    return grid(stripes.T[:7], 14, 42, 12.5, gap=1)


def weights() -> str:
    """Causal attention weights under an ALiBi bias."""
    bias = alibi(4, 6, 6)[1].float() * 3
    pulls = torch.tensor([0.0, 0.2, 1.5, 0.0, 0.8, 0.3])
    scores = (bias + pulls).masked_fill(~masks.causal(6), -torch.inf)
    parts = [grid(scores.softmax(-1) ** 0.7, 56, 40, 15)]
    return "".join(parts) + "".join(text(50, 52 + 15 * i, word, 13, "end", DIM) for i, word in enumerate(WORDS))


def blocks() -> str:
    """A stack of blocks, and the residual stream that runs past them."""
    parts = [line(40, 134, 40, 40, ACCENT, arrow=True)]
    for i, name in enumerate(("feed-forward", "attention", "feed-forward", "attention")):
        y = 42 + 24 * i
        parts += [
            box(66, y, 96, 19, ACCENT if i % 2 else SECOND, opacity=0.25, radius=5),
            text(114, y + 14, name, 13),
        ]
        parts.append(line(66, y + 9.5, 46, y + 9.5, DIM, arrow=True))
    return "".join(parts)


def next_token() -> str:
    """A distribution over the next token."""
    parts = []
    for i, (word, share) in enumerate((("Lily", 0.62), ("Ben", 0.21), ("Tom", 0.12), ("she", 0.03))):
        y = 44 + 23 * i
        parts += [text(56, y + 13, word, 13, "end"), box(64, y, 150 * share, 16, ACCENT, opacity=0.85 - 0.15 * i)]
    return "".join(parts)


def cache() -> str:
    """A row of cached keys and values, and the new one."""
    parts = []
    for row, name in enumerate("kv"):
        y = 52 + 34 * row
        parts.append(text(16, y + 16, name, 13))
        for j in range(8):
            new = j == 7
            parts.append(box(28 + 17 * j, y, 14, 22, SECOND if new else ACCENT, opacity=0.95 if new else 0.35))
    return "".join([*parts, line(154, 130, 154, 114, SECOND, arrow=True), text(146, 132, "new token", 13, "end", DIM)])


def groups() -> str:
    """Eight query heads that share two key-value heads."""
    parts = []
    for i in range(8):
        x = 26 + 18 * i
        parts += [line(x, 64, 53 + 72 * (i // 4), 106, LINE), box(x - 6, 50, 12, 14, ACCENT, opacity=0.7)]
    for j in range(2):
        parts += [box(45 + 72 * j, 106, 17, 22, SECOND, opacity=0.8)]
    return "".join([*parts, text(88, 44, "queries", 13, fill=DIM), text(88, 122, "k, v", 13, fill=DIM)])


def tiles() -> str:
    """The matrix of scores, visited tile by tile."""
    parts = []
    for i in range(4):
        for j in range(i + 1):
            current = (i, j) == (2, 1)
            done = (i, j) < (2, 1)
            opacity = 0.95 if current else 0.35 if done else 0.1
            parts.append(box(44 + 23 * j, 40 + 23 * i, 21, 21, SECOND if current else ACCENT, opacity=opacity))
    return "".join(parts)


def pages() -> str:
    """A block table that points to blocks anywhere in memory."""
    parts, places = [], ((1, 0), (0, 2), (3, 1))
    for i in range(4):
        for j in range(3):
            used = (i, j) in places
            parts.append(box(94 + 18 * i, 44 + 28 * j, 15, 22, ACCENT if used else LINE, opacity=0.8 if used else 0.35))
    for row, (i, j) in enumerate(places):
        y = 52 + 24 * row
        parts += [box(20, y, 26, 20, SECOND, opacity=0.45), text(33, y + 15, str(3 * i + j), 13)]
        parts.append(line(48, y + 10, 92 + 18 * i, 55 + 28 * j, DIM))
    return "".join(parts)


def pattern() -> str:
    """A sparse pattern: a window, and the first keys as sinks."""
    keep = masks.sliding_window(10, window=3) | (masks.causal(10) & (torch.arange(10) < 2))
    return grid(keep.float() * 0.75 + masks.causal(10).float() * 0.12, 42, 40, 9.6, gap=1.2)


PANELS = (
    ("Tokens", "text becomes numbers", tokens),
    ("Attention", "who looks at whom", weights),
    ("Positions", "order becomes a wave", positions),
    ("The Transformer", "a stack that adds", blocks),
    ("Training", "guess the next token", next_token),
    ("KV cache", "never compute it twice", cache),
    ("Grouped queries", "heads that share", groups),
    ("Sparse attention", "look at less", pattern),
    ("Flash attention", "a tile at a time", tiles),
    ("Paged attention", "memory in blocks", pages),
)


def panel(title: str, caption: str, draw, x: float, y: float) -> str:
    """One panel at its place."""
    width, height = PANEL
    return (
        f'<g transform="translate({x} {y})">{box(0.5, 0.5, width - 1, height - 1, "none", LINE, 8)}'
        f"{text(12, 24, title, 15, 'start', weight=600)}{draw()}{text(12, height - 12, caption, 13, 'start', DIM)}</g>"
    )


def picture(columns: int, kind: str) -> str:
    """All panels in rows of ``columns``."""
    width, height = PANEL[0] + GAP, PANEL[1] + GAP
    rows = -(-len(PANELS) // columns)
    drawn = [panel(*p, (i % columns) * width, (i // columns) * height) for i, p in enumerate(PANELS)]
    hidden = ' aria-hidden="true"' if kind == "tf-tall" else f' role="img" aria-label="{DESCRIPTION}"'
    size = f'viewBox="0 0 {columns * width - GAP} {rows * height - GAP}"'
    return f'<svg class="{kind}" {size}{hidden} xmlns="http://www.w3.org/2000/svg">{"".join(drawn)}</svg>'


DESCRIPTION = (
    "Ten panels, from left to right: " + "; ".join(f"{title}: {caption}" for title, caption, _ in PANELS) + "."
)

ARROW = (
    '<svg width="0" height="0" aria-hidden="true" style="position:absolute"><defs>'
    f'<marker id="tf-arrow" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
    f'<path d="M0 0 L8 4 L0 8 z" fill="{DIM}"/></marker></defs></svg>'
)


def write() -> None:
    """Write the picture."""
    target = Path(__file__).resolve().parents[1] / "book" / "images" / "front.html"
    body = "\n".join([ARROW, picture(5, "tf-wide"), picture(2, "tf-tall")])
    target.write_text(f'<div class="tf-hero">\n{body}\n</div>\n', encoding="utf-8")
    print(f"wrote {target.name}, {target.stat().st_size // 1000} kB")


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the picture."""
    return command_line.without_options(write, arguments, program="python -m tools.front_figure", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
