"""Fill tables of the book when it is built, from what is in the project.

``{{ chapters }}`` on the front page becomes the list of the chapters in ``_toc.yml``, and ``{{ part }}`` on the page
of a part the list of that part's, with the time to read each. On the status page ``{{ outputs }}`` becomes the table
of ``book/status.json``, which ``book/status.py`` writes when the notebooks are run, and ``{{ measurements }}`` the
list of the files under ``benchmarks/results/``.
"""

import json
import re
from pathlib import Path

import yaml
from sphinx.application import Sphinx

QUESTIONS = {
    "01-tokens": "How does text become numbers, and who decides where a word is cut?",
    "02-attention": "How does one token find the others that it needs?",
    "03-masks": "Who may look at whom, and how do you know that nobody peeks?",
    "04-positional-encoding": "Attention sees a set. How does it learn the order?",
    "05-transformer": "What does a layer add to attention, and why does the stack hold?",
    "06-training": "When has a model learnt all that there is to learn?",
    "08-rope": "Why do modern models turn their queries instead of adding positions?",
    "09-kv-cache": "Why does the second token cost less than the first?",
    "10-grouped-query-attention": "How many keys and values do you need to keep?",
    "11-sparse-attention": "Which pairs can you leave out?",
    "12-linear-attention": "Can attention cost the same for every token, and what is forgotten?",
    "15-flash-math": "How can a softmax be exact when you never see the whole row?",
    "16-flash-kernels": "What does it take to reach the limit of the machine?",
    "18-paged-attention": "Where do a thousand growing caches go?",
    "19-serving": "Who computes next, when everybody waits?",
    "20-profiling": "It is slow: where do you look first?",
    "21-scaling-out": "What changes when one device is too small?",
}


def fill(app: Sphinx, page: str, source: list[str]) -> None:
    """Replace the marks on the pages that have them."""
    marks = {
        "index": {"{{ chapters }}": chapters},
        "status": {"{{ outputs }}": outputs, "{{ measurements }}": measurements},
    }
    root = Path(app.srcdir).resolve().parent
    if page.startswith("parts/"):
        marks = {page: {"{{ part }}": lambda root: part(root, page)}}
    for mark, make in marks.get(page, {}).items():
        source[0] = source[0].replace(mark, make(root))


def chapters(root: Path) -> str:
    """The chapters of the table of contents, each with the question that it answers."""
    contents = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
    files = [chapter["file"] for part in contents["parts"] for chapter in part["chapters"]]
    names = [Path(file).name for file in files if file.startswith("notebooks/")]
    rows = [(name[:2], f"[](notebooks/{name}.ipynb)", QUESTIONS.get(name, "")) for name in names]
    return table(("", "chapter", "the question it answers"), rows)


def part(root: Path, page: str) -> str:
    """The chapters of the part that begins with ``page``: the question of each, and the time that it takes."""
    contents = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
    files = next(files for p in contents["parts"] if page in (files := [c["file"] for c in p["chapters"]]))
    names = [Path(file).name for file in files if file.startswith("notebooks/")]
    rows = [
        (f"[](../notebooks/{n}.ipynb)", QUESTIONS.get(n, ""), minutes(root / "notebooks" / f"{n}.ipynb")) for n in names
    ]
    return table(("chapter", "the question it answers", "minutes to read"), rows)


def minutes(notebook: Path) -> str:
    """How long a chapter says that it takes."""
    text = "".join(json.loads(notebook.read_text(encoding="utf-8"))["cells"][0]["source"])
    found = re.search(r"Time:\*{1,2}\D*(\d+) minutes", text)
    return found[1] if found else ""


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
