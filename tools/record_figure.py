"""Draw what was recorded for the front page and the README: ``python -m tools.record_figure``.

Two charts of bars, from ``benchmarks/results/nvidia-h200``: the steps of the flash attention kernels beside peers,
and the serving engine beside its peers. It writes ``book/images/records.html``, whose colours follow the theme of the
book, and ``kernels.svg`` and ``engine.svg`` beside it for the README. ``tests/test_book.py`` holds them to the records.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from tformer_lib import command_line
from tools.chapters import ROOT
from tools.front_figure import ACCENT, DIM, INK, LINE, SECOND, box, line, text

RESULTS = Path("benchmarks") / "results" / "nvidia-h200"
IMAGES = Path("book") / "images"
WIDTH, LEFT, BAR, PITCH = 400, 148, 15, 21
"""Of a chart, in pixels: its width, where its bars begin, how thick a bar is, and from one bar to the next."""

CASE = "forward, d 128, 16,384"
RUNGS = {
    "3a": "tensor cores",
    "3b": "swizzle",
    "3c": "double buffer",
    "3d": "wide tiles",
    "3e": "folded scale",
    "4a": "TMA and wgmma",
    "4b": "producer",
    "4c": "turns",
    "4d": "overlap",
    "4e": "persistent",
}
PEERS = {"sdpa flash": "PyTorch's flash", "sdpa cudnn": "cuDNN", "FlashAttention-3": "FlashAttention-3"}
SERVERS = {
    "transformers": "transformers",
    "contiguous": "contiguous caches",
    "static": "static batches",
    "nano-vllm": "nano-vllm",
    "engine": "our engine",
}

THEMES = (
    "svg{color:#1f2328;--tf-accent:#0072b2;--tf-second:#d55e00;--pst-color-text-muted:#59636e;"
    "--pst-color-border:#d1d9e0}@media(prefers-color-scheme:dark){svg{color:#f0f6fc;--tf-accent:#56b4e9;"
    "--tf-second:#ff8a3d;--pst-color-text-muted:#9198a1;--pst-color-border:#3d444d}}"
)
FONT = 'font-family="system-ui, -apple-system, Segoe UI, DejaVu Sans, sans-serif"'


def kernels(root: Path) -> str:
    """The chart of the flash attention steps."""
    record = read(root, "flash_attention")
    rates = {row["contestant"]: row["rate"] / 1e12 for row in record["rows"] if row["case"] == CASE}
    ours = [(f"{rung} {name}", rates[f"step {rung}"], True) for rung, name in RUNGS.items() if f"step {rung}" in rates]
    peers = [(name, rates[contestant], False) for contestant, name in PEERS.items() if contestant in rates]
    return chart(
        "Flash attention, forward, TFLOP/s",
        f"bf16, head_dim 128, 16,384 tokens, {where(record)}",
        [*ours, *sorted(peers, key=lambda bar: bar[1])],
    )


def engine(root: Path) -> str:
    """The chart of the serving engine."""
    record = read(root, "serving")  # all of its rows are of one run
    found = {
        row["contestant"]: row["extra"]["tokens_per_second"] / 1e3
        for row in record["rows"]
        if row["case"] == "requests, all lengths" and "tokens_per_second" in row.get("extra", {})
    }
    bars = [(name, found[server], server == "engine") for server, name in SERVERS.items() if server in found]
    return chart(
        "Serving, thousand tokens written a second",
        f"the same requests of all lengths, {where(record)}",
        sorted(bars, key=lambda bar: bar[1]),
    )


def read(root: Path, topic: str) -> dict:
    """A record of measurements on the GPU."""
    return json.loads((root / RESULTS / f"{topic}.json").read_text(encoding="utf-8"))


def where(record: dict) -> str:
    """The device of a record."""
    return f"one {record['device']}"


def chart(title: str, below: str, bars: Sequence[tuple[str, float, bool]]) -> str:
    """A chart of horizontal bars.

    Args:
        title: what is drawn, with its unit.
        below: on what it was measured.
        bars: a name, a value and whether it is ours, from the top.
    """
    most, top = max(value for _, value, _ in bars), 52
    height = top + PITCH * len(bars) + 4
    parts = [text(0, 16, title, 15, "start", weight=600), text(0, 35, below, 11.5, "start", DIM)]
    parts.append(line(LEFT, top - 5, LEFT, height - 4, LINE))
    for i, (name, value, ours) in enumerate(bars):
        y, length = top + PITCH * i, max(1.0, (WIDTH - LEFT - 44) * value / most)
        parts.append(text(LEFT - 8, y + 12, name, 12, "end", weight=600 if ours else 400))
        parts.append(box(LEFT, y, length, BAR, ACCENT if ours else SECOND, radius=2, opacity=0.9 if ours else 0.75))
        parts.append(
            text(LEFT + length + 6, y + 12, f"{value:.0f}" if value >= 10 else f"{value:.1f}", 12, "start", INK)
        )
    said = "; ".join(f"{name} {value:.3g}" for name, value, _ in bars)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{title}, {below}: {said}." {FONT} '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def files(root: Path) -> dict[Path, str]:
    """What each file of the figure should hold."""
    charts = {"kernels": kernels(root), "engine": engine(root)}
    page = "\n".join(charts.values())
    return {
        root / IMAGES / "records.html": f'<div class="tf-records">\n{page}\n</div>\n',
        **{root / IMAGES / f"{name}.svg": standalone(drawn) for name, drawn in charts.items()},
    }


def standalone(drawn: str) -> str:
    """A chart as a file of its own, with a width and the colours of both themes."""
    sized = re.sub(r'<svg viewBox="0 0 (\d+) (\d+)"', r'<svg width="\1" height="\2" viewBox="0 0 \1 \2"', drawn)
    return sized.replace("</svg>", f"<style>{THEMES}</style></svg>") + "\n"


def write() -> None:
    """Write the charts."""
    for path, content in files(ROOT).items():
        path.write_text(content, encoding="utf-8")
        print(path.relative_to(ROOT))


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the charts."""
    return command_line.without_options(write, arguments, program="python -m tools.record_figure", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
