"""Fill the page of results when the book is built, from the files under ``benchmarks/results/``.

``{{ summary }}`` in ``book/results.md`` becomes a table with a row for each file, and ``{{ results }}`` a section a
topic, with a table for each file: every row's time with its spread, its rate, its share of the limit, and how it
compares with its peer; what else a file holds is folded. Nothing on the page is written by hand, so it cannot fall
behind the files.
"""

import json
import re
import sys
from pathlib import Path
from statistics import median

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.chapters import load

TITLES = {
    "scaling": "Scaling out",
    "rope": "RoPE",
    "kv_cache": "The KV cache",
    "grouped_query_attention": "Grouped-query attention",
    "ratios": "The guard: each kernel beside its peer",
}
"""Topic -> heading, where it is not the topic's words."""

DEVICES = {"cpu": "a CPU", "nvidia-h200": "an NVIDIA H200"}
DEVICES |= {f"nvidia-h200-x{count}": f"{count} NVIDIA H200" for count in (2, 4, 8)}
"""Folder -> what it is called."""

PREFIXES = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("", 1.0))
"""Of rates."""


def fill(app: Sphinx, page: str, source: list[str]) -> None:
    """Replace the marks on the page of results."""
    if page == "results":
        folder = Path(app.srcdir).resolve().parent / "benchmarks" / "results"
        source[0] = source[0].replace("{{ summary }}", summary(folder)).replace("{{ results }}", sections(folder))
        app.env.note_reread()  # the files may change while the page does not


def records_of(folder: Path) -> list[tuple[Path, dict]]:
    """Every file of results with what it holds, in the order of the chapters."""
    records = [(file, json.loads(file.read_text(encoding="utf-8"))) for file in sorted(folder.glob("*/*.json"))]
    records = [(file, record) for file, record in records if isinstance(record, dict) and "command" in record]
    order = [name for chapter in load().chapters for name in (*chapter.modules, chapter.word.replace("-", "_"))]
    place = lambda topic: (order.index(topic) if topic in order else 99, topic)  # noqa: E731
    return sorted(records, key=lambda pair: place(topic_of(pair[0])))


def summary(folder: Path) -> str:
    """A row for each file that holds times: how many, the most of a limit, and how rows compare with their peers."""
    lines = [summary_row(file, record) for file, record in records_of(folder) if timed_rows(record)]
    return table(("topic", "device", "rows", "most of a limit", "times as fast as the peers"), lines)


def summary_row(file: Path, record: dict) -> tuple[str, ...]:
    """The row of one file; a row counts unless it stands in the script's list of peers before its own peer."""
    rows = {row["name"]: row for row in timed_rows(record)}
    ours = [row for row in rows.values() if not is_peer(row, rows, record.get("peers", []))] or list(rows.values())
    best = max((row for row in ours if row.get("share") is not None), key=lambda row: row["share"], default=None)
    most = "" if best is None else f"{best['share']:.0%}: {best['name']}"
    ratios = sorted(rows[row["peer"]]["seconds"] / row["seconds"] for row in ours if row["peer"] in rows)
    told = "" if not ratios else spread_of(ratios)
    link = f"[`{file.stem}`](#{anchor(file)})"
    device = joined(DEVICES.get(file.parent.name, file.parent.name))
    return link, device, str(len(rows)), whole_sizes(most), ", ".join(map(joined, told.split(", ")))


def joined(words: str) -> str:
    """The same on one line: beside a column of long words, a narrow one would be broken at every space."""
    return words.replace(" ", "\u00a0")


def spread_of(ratios: list[float]) -> str:
    """Sorted ratios in words: the slowest, the fastest and the middle one; a single number if they look the same."""
    low, high, middle = (
        f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"
        for ratio in (ratios[0], ratios[-1], median(ratios))
    )
    return low if low == high else f"{low} to {high}, middle {middle}"


def is_peer(row: dict, rows: dict[str, dict], peers: list[str]) -> bool:
    """Whether a row is there for others to be compared with: the list names the best known first, ours last."""
    rank = {name: place for place, name in enumerate(peers)}
    mine = rank.get(row["contestant"], len(peers))
    if row["peer"] not in rows:
        return mine < len(peers)
    return mine < rank.get(rows[row["peer"]]["contestant"], len(peers))


def anchor(file: Path) -> str:
    """The name of a file's section, to link to."""
    return f"results-{file.parent.name}-{file.stem}".replace("_", "-").replace(".", "-").lower()


def sections(folder: Path) -> str:
    """A section for each topic, with all its files."""
    records = records_of(folder)
    parts = []
    for topic in dict.fromkeys(topic_of(file) for file, _ in records):
        parts.append(f"## {TITLES.get(topic, topic.replace('_', ' ').capitalize())}")
        parts += [part for file, record in records if topic_of(file) == topic for part in (heading(file), body(record))]
    return "\n\n".join(parts)


def topic_of(file: Path) -> str:
    """The topic that a file belongs to: ``training-stories.json`` belongs to training."""
    return file.stem.partition("-")[0]


def heading(file: Path) -> str:
    """The device and the file's name."""
    device = DEVICES.get(file.parent.name, file.parent.name)
    return f"({anchor(file)})=\n### On {device}: `{file.stem}`"


def body(record: dict) -> str:
    """Where the numbers come from, the table, and the facts beside them."""
    parts = [provenance(record)]
    if timed_rows(record):
        parts.append(rows_table(record))
    if "results" in record:
        parts.append(folded("What the sanitizer found", sanitizer_table(record["results"])))
    facts = [(name, value) for name, value in flat(record.get("facts", {})) if shown(value)]
    if facts:
        lines = table(("what", "value"), [(called(name), fact(name, value)) for name, value in facts])
        parts.append(folded("What else was noted", lines))
    return "\n\n".join(parts)


def folded(title: str, text: str) -> str:
    """A box that stays folded until it is opened."""
    return f"::::{{admonition}} {title}\n:class: dropdown\n\n{text}\n::::"


def sanitizer_table(findings: list[dict]) -> str:
    """How many runs found what they should, and what each tool said about each case.

    A control holds a planted fault, which the tool must find.
    """
    kernels = [one["clean"] for one in findings if one["expected"] == "clean"]
    controls = [not one["clean"] for one in findings if one["expected"] != "clean"]
    told = f"Nothing was found in {sum(kernels)} of {len(kernels)} runs of kernels."
    if controls:
        told += f" The planted fault was found in {sum(controls)} of {len(controls)} controls."
    rows = [
        (one["case"], one["tool"], one["summary"], "nothing" if one["expected"] == "clean" else "the planted fault")
        for one in findings
    ]
    return f"{told}\n\n{table(('case', 'tool', 'what it said', 'what it should find'), rows)}"


def provenance(record: dict) -> str:
    """One line: device, versions, date, commit, command."""
    versions = ", ".join(f"{name} {value}" for name, value in record.get("versions", {}).items() if value)
    date = str(record.get("date", ""))[:10]
    return f"*{record.get('device', '')} ({versions}), {date}, {commit(record)}:* `{record['command']}`"


def commit(record: dict) -> str:
    """The commit that was measured, and whether the files differed from it."""
    if not record.get("commit"):
        return "of an unrecorded commit"
    name, changed, _ = str(record["commit"]).partition("+changes")
    return f"commit {name}" + (" with changes that were not committed" if changed else "")


def timed_rows(record: dict) -> list[dict]:
    """The rows that hold a time; a file may hold rows of another kind, or none."""
    rows = record.get("rows", [])
    return [row for row in rows if isinstance(row, dict) and "seconds" in row] if isinstance(rows, list) else []


def rows_table(record: dict) -> str:
    """Every row with its spread, its rate, its share of the limit, and its peer."""
    rows = {row["name"]: row for row in timed_rows(record)}
    lines = [
        (named(row), row["contestant"], time(row["seconds"]), spread(row), rate(row), share(row), beside(row, rows))
        for row in rows.values()
    ]
    return table(("case", "contestant", "time", "spread", "rate", "of the limit", "beside its peer"), lines)


def named(row: dict) -> str:
    """The case; a phone has no room for a column of contestants, so it shows them here."""
    return f'{whole_sizes(row["case"])}<span class="tf-of">: {row["contestant"]}</span>'


def whole_sizes(words: str) -> str:
    """The same, with ``d 64`` or ``N = 512`` on one line."""
    return re.sub(r"\b([dNT]) (?=(?:= )?\d)", "\\1\u00a0", words)


def beside(row: dict, rows: dict[str, dict]) -> str:
    """How the row's time compares with its peer's, or why it has none."""
    if row.get("peer") not in rows:
        return row.get("alone") or "is the peer"
    peer = rows[row["peer"]]
    ratio = peer["seconds"] / row["seconds"]
    told = f"{ratio:.2f} times as fast as" if ratio >= 1 else f"takes {1 / ratio:.2f} times as long as"
    if "1.00" in (f"{ratio:.2f}", f"{1 / ratio:.2f}"):
        told = "as fast as"
    return f"{told} {peer['contestant'] if peer['case'] == row['case'] else peer['name']}"


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
    """The share of the limit, or why there is none."""
    return row.get("unbounded") or "" if row.get("share") is None else f"{row['share']:.1%}"


def flat(facts: dict, before: str = "") -> list[tuple[str, object]]:
    """Facts with the names of dictionaries before those of their entries."""
    found = []
    for name, value in facts.items():
        found += flat(value, f"{before}{name}: ") if isinstance(value, dict) else [(before + str(name), value)]
    return found


def shown(value) -> bool:
    """Whether a fact fits into a line: no lists, no long texts."""
    return isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= 200)


MEASURES = (
    (r".*bytes_per_second|link_rate|copy_rate", "B/s", 1.0),
    (r".*flops_per_second|matmul_rate", "FLOP/s", 1.0),
    (r".*_gb_s", "B/s", 1e9),
    (r".*_tb_s", "B/s", 1e12),
    (r".*_tflops", "FLOP/s", 1e12),
    (r".*_ms", "s", 1e-3),
    (r"latency|exposed", "s", 1.0),
    (r"sent|held", "B", 1.0),
    (r"calls|kernels|launches|operations|steps", None, 1.0),
)
"""What the last part of a name is, the unit of its value if it has one, and how many of that unit the value counts."""

WORDS = {"microseconds": ("s", 1e-6), "us": ("s", 1e-6), "milliseconds": ("s", 1e-3), "bounds": ("s", 1e-3)}
WORDS |= {"seconds": ("s", 1.0), "bytes": ("B", 1.0)}
"""A word anywhere in a name, as in ``seconds_of_a_step`` or ``milliseconds: kinds: attention``: the same of it."""

SPELT = {"flops": "FLOPs", "gpt2": "GPT-2", "val": "validation"}
SPELT |= {word: word.upper() for word in ("cuda", "ddp", "fsdp", "kv", "tpot", "ttft")}
"""Words of names that are short forms, and how a reader knows them."""


def called(name: str) -> str:
    """The name of a fact in words; settings keep the names that they have in the code."""
    if name.startswith("config: "):
        return f"`{name}`"
    told = ": ".join(words(part) for part in name.split(": "))
    if measure(name)[0] == "s":
        told = re.sub(r"\b(?:micro|milli)?seconds\b|\bus\b", "time", told)
    return re.sub(r"([\\`*_|$<\[\]])", r"\\\1", told)


def words(part: str) -> str:
    """A part of a name in words, without an abbreviated unit at its end, which stands beside the value.

    A part that has spaces was written for a reader, so it keeps the names of functions that stand in it.
    """
    before, found, part = part.rpartition("wall_seconds_")
    if " " not in part:
        part = re.sub(r"_(?:gb_s|tb_s|tflops|ms)$", "", part)
        part = " ".join(SPELT.get(word, word) for word in part.split("_"))
    return f"{before}wall time, {part}" if found else part


def fact(name: str, value) -> str:
    """A fact as a person reads it; a rate, a time or a number of bytes with its unit."""
    unit, size = measure(name)
    if unit is None or not isinstance(value, int | float) or isinstance(value, bool):
        return number(value)
    if unit == "B" or value == 0:
        return f"{number(value)}\u00a0{unit}"  # to the last byte, since some are compared
    if unit == "s":
        return time(value * size)
    return scaled(value * size, tuple((prefix + unit, scale) for prefix, scale in PREFIXES))


def measure(name: str) -> tuple[str | None, float]:
    """The unit that the name of a fact tells, and how many of it the value counts; no unit where it tells none."""
    last = name.split(": ")[-1]
    for form, unit, size in MEASURES:
        if re.fullmatch(form, last):
            return unit, size
    found = [WORDS[word] for word in re.split(r"[^a-z]+", name) if word in WORDS]
    return found[-1] if found else (None, 1.0)


def number(value) -> str:
    """A value as a person reads it."""
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}" if abs(value) < 1e12 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value).replace("|", "\\|")


def table(head: tuple[str, ...], rows) -> str:
    """A Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def setup(app: Sphinx) -> dict:
    """Register with Sphinx."""
    app.connect("source-read", fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
