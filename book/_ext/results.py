"""Fill the page of results when the book is built, from the files under ``benchmarks/results/``.

``{{ results }}`` in ``book/results.md`` becomes a section a topic, with a table for each file: every row's time with
its spread, its rate, its share of the limit, and how it compares with its peer; what else a file holds is folded.
Nothing on the page is written by hand, so it cannot fall behind the files.
"""

import json
import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.chapters import load

TITLES = {"rope": "RoPE", "kv_cache": "The KV cache", "ratios": "The guard: each kernel beside its peer"}
"""Topic -> heading, where it is not the topic's words."""

PEERS = (
    ("attention", r"^attend,", "attend_sdpa,"),
    ("flash_attention", r": (step [34].*|sdpa flash|backward.cu.*)$", ": sdpa cudnn"),
    ("flash_attention", r": (step [12].*)$", ": sdpa efficient"),
    ("flash_attention", r": (naive|C\+\+ twin.*)$", ": sdpa"),
    ("kv_cache", r"^(cached|recorded), context", "uncached, context"),
    ("kv_cache", r"^(?!.*context|transformers).*$", "transformers generate, default cache, cuDNN off"),
    ("kv_cache", r"^(?!.*context|transformers).*$", "uncached"),
    ("linear_attention", r"^(linear, chunked|softmax, written out)", "softmax, fused"),
    ("sparse_attention", r"^window of 512", "dense causal, fused"),
    ("sparse_attention", r"^(?!dense|window of).*$", "causal"),
    ("grouped_query_attention", r"copied$", "grouped"),
    ("rope", r"^rotate.*$", "copy"),
    ("profiling", r"^unfused softmax$", "fused softmax"),
    ("profiling", r"^attention, keys (copied|viewed)$", "attention, keys in order"),
    ("profiling", r"^decode step, CUDA graph", "decode step, eager"),
)
"""(topic, what a row's name holds, what its peer's name holds instead). A row's own ``extra["peer"]`` goes before."""


PREFIXES = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("", 1.0))
"""Of rates."""


def fill(app: Sphinx, page: str, source: list[str]) -> None:
    """Replace the mark on the page of results."""
    if page == "results":
        root = Path(app.srcdir).resolve().parent
        source[0] = source[0].replace("{{ results }}", sections(root / "benchmarks" / "results"))


def sections(folder: Path) -> str:
    """A section for each topic, with all its files."""
    files = sorted(folder.glob("*/*.json"))
    records = [(file, json.loads(file.read_text(encoding="utf-8"))) for file in files]
    records = [(file, record) for file, record in records if isinstance(record, dict) and "command" in record]
    order = list(dict.fromkeys(module for chapter in load().chapters for module in chapter.modules))
    topics = sorted({topic_of(file) for file, _ in records}, key=lambda t: (order.index(t) if t in order else 99, t))
    parts = []
    for topic in topics:
        parts.append(f"## {TITLES.get(topic, topic.replace('_', ' ').capitalize())}")
        parts += [part for file, record in records if topic_of(file) == topic for part in (heading(file), body(record))]
    return "\n\n".join(parts)


def topic_of(file: Path) -> str:
    """The topic that a file belongs to: ``training-stories.json`` belongs to training."""
    return file.stem.partition("-")[0]


def heading(file: Path) -> str:
    """The device and the file's name."""
    device = {"cpu": "On a CPU", "nvidia-h200": "On an NVIDIA H200"}.get(file.parent.name, f"On {file.parent.name}")
    return f"### {device}: `{file.stem}`"


def body(record: dict) -> str:
    """Where the numbers come from, the table, and the facts beside them."""
    parts = [provenance(record)]
    if timed_rows(record):
        parts.append(rows_table(record))
    facts = [(name, value) for name, value in flat(record.get("facts", {})) if shown(value)]
    if facts:
        lines = table(("what", "value"), [(f"`{name}`", number(value)) for name, value in facts])
        parts.append(f"::::{{admonition}} What else was noted\n:class: dropdown\n\n{lines}\n::::")
    return "\n\n".join(parts)


def provenance(record: dict) -> str:
    """One line: device, versions, date, commit, command."""
    versions = ", ".join(f"{name} {value}" for name, value in record.get("versions", {}).items() if value)
    commit = f", commit {record['commit'].removesuffix('+changes')}" if record.get("commit") else ""
    date = str(record.get("date", ""))[:10]
    return f"*{record.get('device', '')} ({versions}), {date}{commit}:* `{record['command']}`"


def timed_rows(record: dict) -> list[dict]:
    """The rows that hold a time; a file may hold rows of another kind, or none."""
    rows = record.get("rows", [])
    return [row for row in rows if isinstance(row, dict) and "seconds" in row] if isinstance(rows, list) else []


def rows_table(record: dict) -> str:
    """Every row with its spread, its rate, its share of the limit, and its peer."""
    rows = {row["name"]: row for row in timed_rows(record)}
    lines = [
        (name, time(row["seconds"]), spread(row), rate(row), share(row), beside(record, row, rows))
        for name, row in rows.items()
    ]
    head = ("what", "time", "spread", "rate", "of the limit", "beside its peer")
    filled = [i for i in range(len(head)) if any(line[i] for line in lines)]
    return table(tuple(head[i] for i in filled), [tuple(line[i] for i in filled) for line in lines])


def beside(record: dict, row: dict, rows: dict[str, dict]) -> str:
    """How the row's time compares with its peer's."""
    peer = peer_of(str(record.get("topic", "")).partition("-")[0], row, rows)
    if peer is None:
        return ""
    ratio = rows[peer]["seconds"] / row["seconds"]
    told = f"{ratio:.2f} times as fast as" if ratio >= 1 else f"takes {1 / ratio:.2f} times as long as"
    return f"{told} {short_peer(peer, row['name'])}"


def short_peer(peer: str, name: str) -> str:
    """The peer's name without the beginning or the end that it shares with the row's, cut at commas and colons."""
    mine, its = re.split(r"(?<=[,:]) ", name), re.split(r"(?<=[,:]) ", peer)
    while len(its) > 1 and mine and its[0] == mine[0]:
        mine, its = mine[1:], its[1:]
    while len(its) > 1 and mine and its[-1] == mine[-1]:
        mine, its = mine[:-1], its[:-1]
    return " ".join(its).rstrip(",:")


def peer_of(topic: str, row: dict, rows: dict[str, dict]) -> str | None:
    """The name of the row to compare with, if there is one."""
    named = row.get("extra", {}).get("peer")
    if named in rows and named != row["name"]:
        return named
    for its_topic, pattern, replacement in PEERS:
        peer = re.sub(pattern, lambda found, r=replacement: r, row["name"], count=1)
        if topic == its_topic and re.search(pattern, row["name"]) and peer in rows and peer != row["name"]:
            return peer
    return None


def time(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    return scaled(seconds, (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9)))


def scaled(value: float, units: tuple[tuple[str, float], ...]) -> str:
    """Three digits and the largest unit that the value reaches, or the smallest."""
    unit, size = next(((unit, size) for unit, size in units if value >= size), units[-1])
    return f"{value / size:,.0f}\u00a0{unit}" if value >= 1000 * size else f"{value / size:.3g}\u00a0{unit}"


def spread(row: dict) -> str:
    """Half the width of the middle 80 % of the calls."""
    known = (row.get("calls") or 2) > 1 and row.get("p90") is not None and row.get("p10") is not None
    return f"±\u00a0{(row['p90'] - row['p10']) / row['seconds'] / 2:.0%}" if known else ""


def rate(row: dict) -> str:
    """FLOP/s or bytes/s with a prefix."""
    if not row.get("rate"):
        return ""
    unit = "FLOP/s" if row.get("flops") is not None else "B/s"
    return scaled(row["rate"], tuple((prefix + unit, size) for prefix, size in PREFIXES))


def share(row: dict) -> str:
    """The share of the limit."""
    return "" if row.get("share") is None else f"{row['share']:.1%}"


def flat(facts: dict, before: str = "") -> list[tuple[str, object]]:
    """Facts with the names of dictionaries before those of their entries."""
    found = []
    for name, value in facts.items():
        found += flat(value, f"{before}{name}: ") if isinstance(value, dict) else [(before + str(name), value)]
    return found


def shown(value) -> bool:
    """Whether a fact fits into a line: no lists, no long texts."""
    return isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= 200)


def number(value) -> str:
    """A value as a person reads it."""
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e6 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value).replace("|", "\\|")


def table(head: tuple[str, ...], rows) -> str:
    """A Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def setup(app: Sphinx) -> dict:
    """Register with Sphinx."""
    app.connect("source-read", fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
