"""Fill the status page when the book is built: what made the outputs, and what was measured where.

``{{ outputs }}`` on the page becomes the table of ``book/status.json`` (written by ``book/status.py`` when the
notebooks are run), ``{{ measurements }}`` the list of the files under ``benchmarks/results/``.
"""

import json
from pathlib import Path

from sphinx.application import Sphinx


def fill(app: Sphinx, page: str, source: list[str]) -> None:
    """Replace the two marks on the status page."""
    if page != "status":
        return
    root = Path(app.srcdir).resolve().parent
    source[0] = source[0].replace("{{ outputs }}", outputs(root)).replace("{{ measurements }}", measurements(root))


def outputs(root: Path) -> str:
    """A table of the machine and the versions that made the notebooks' outputs."""
    record = json.loads((root / "book" / "status.json").read_text(encoding="utf-8"))
    return table(("what", "version"), record.items())


def measurements(root: Path) -> str:
    """A table of the recorded measurements: topic, device, versions, date, command."""
    files = sorted((root / "benchmarks" / "results").glob("*/*.json"))
    rows = [row for row in (measurement(file) for file in files) if row]
    if not rows:
        return "Nothing has been recorded yet."
    return table(("topic", "device", "torch", "date", "command"), rows)


def measurement(file: Path) -> tuple[str, ...] | None:
    """One row for one file of results; None for a file of another kind."""
    record = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(record, dict) or "command" not in record:
        return None
    torch = record.get("versions", {}).get("torch", "")
    return file.stem, record.get("device", ""), torch, record.get("date", "")[:10], f"`{record['command']}`"


def table(head: tuple[str, ...], rows) -> str:
    """A Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def setup(app: Sphinx) -> dict:
    """Register with Sphinx."""
    app.connect("source-read", fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
