"""Fill tables of the book when it is built, from what is in the project.

``{{ chapters }}`` on the front page becomes the list of the chapters in ``book/chapters.toml``, and ``{{ part }}`` on
the page of a part the list of that part's, with the time to read each. On the status page ``{{ outputs }}`` becomes the
table of ``book/status.json``, which ``tools/status.py`` writes when the notebooks are run, and ``{{ measurements }}``
the list of the files under ``benchmarks/results/``. The teachers' page gets its ``{{ syllabuses }}`` from
``book/syllabuses.toml`` and its ``{{ times }}`` from the heads of the chapters, and ``{{ questions }}`` are those of
``tests/questions``. The addresses that a page had before lead to it.
"""

import json
import re
import sys
import tomllib
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.chapters import load


def fill(app: Sphinx, page: str, source: list[str]) -> None:
    """Replace the marks on the pages that have them."""
    marks = {
        "index": {"{{ chapters }}": chapters},
        "status": {"{{ outputs }}": outputs, "{{ measurements }}": measurements},
        "teachers": {"{{ syllabuses }}": syllabuses, "{{ times }}": times},
        "questions": {"{{ questions }}": questions},
    }
    root = Path(app.srcdir).resolve().parent
    if page.startswith("parts/"):
        marks = {page: {"{{ part }}": lambda root: part(root, page)}}
    for mark, make in marks.get(page, {}).items():
        source[0] = source[0].replace(mark, make(root))
        app.env.note_reread()  # what it is made from may change while the page does not


def chapters(root: Path) -> str:
    """The chapters, each with the question that it answers; those to come have no page yet."""
    rows = [
        (f"[](notebooks/{c.name}.ipynb)" if c.ready else f"{c.number}. {c.title} (to come)", c.question)
        for c in load(root).chapters
    ]
    return table(("chapter", "the question it answers"), rows)


def part(root: Path, page: str) -> str:
    """The chapters of the part that begins with ``page``: the question of each, and the time that it takes."""
    course = load(root)
    word = next(part.word for part in course.parts if page in part.pages)
    rows = [
        (f"[](../notebooks/{c.name}.ipynb)", c.question, minutes(root / "notebooks" / f"{c.name}.ipynb"))
        for c in course.of(word)
        if c.ready
    ]
    return table(("chapter", "the question it answers", "minutes to read"), rows)


def times(root: Path) -> str:
    """How long each chapter takes to read, and how many exercises it has."""
    rows = []
    for chapter in load(root).chapters:
        notebook = root / "notebooks" / f"{chapter.name}.ipynb"
        if chapter.ready:
            exercises = notebook.read_text(encoding="utf-8").count(":::{exercise}")
            rows.append((f"[](notebooks/{chapter.name}.ipynb)", minutes(notebook), exercises))
    return table(("chapter", "minutes to read", "exercises"), rows)


def syllabuses(root: Path) -> str:
    """A section for each course: its goal, and a table of its weeks."""
    return "\n\n".join(syllabus(root, one) for one in read(root / "book" / "syllabuses.toml")["syllabus"])


def syllabus(root: Path, course: dict) -> str:
    """A course's weeks: the chapters, what they assume, and the exercises that are set."""
    listed = load(root)
    rows = []
    for number, week in enumerate(course["week"], 1):
        chapters = [listed.named(name) for name in week["chapters"]]
        links = [
            f"[](notebooks/{c.name}.ipynb), {minutes(root / 'notebooks' / f'{c.name}.ipynb')} minutes"
            if c.ready
            else f"{c.number}. {c.title} (to come)"
            for c in chapters
        ]
        exercises = ", ".join(f"`{name}`" for name in week["exercises"]) or "none"
        rows.append((number, "<br>".join(links), week["assumes"], exercises))
    head = table(("week", "chapters, and the minutes to read each", "a student knows before", "exercises"), rows)
    return f"### {course['weeks']} weeks: {course['title']}\n\n{course['goal']}\n\n{head}"


def questions(root: Path) -> str:
    """The questions of each chapter, with the answer folded under each."""
    sections = []
    for chapter in load(root).chapters:
        file = root / "tests" / "questions" / f"{chapter.name}.toml"
        if chapter.ready and file.exists():
            boxes = [folded(one["ask"], one["answer"]) for one in read(file)["questions"]]
            title = f"## {chapter.number}. {chapter.title}"
            sections.append("\n\n".join((title, f"[](notebooks/{chapter.name}.ipynb): {chapter.question}", *boxes)))
    return "\n\n".join(sections)


def folded(question: str, answer: str) -> str:
    """A question whose answer stays folded until it is asked for."""
    return f":::{{admonition}} {question}\n:class: dropdown\n{answer}\n:::"


def read(file: Path) -> dict:
    """What a TOML file holds."""
    return tomllib.loads(file.read_text(encoding="utf-8"))


def redirect(app: Sphinx, config: Config) -> None:
    """Hand the earlier addresses of the pages to sphinx-reredirects."""
    config.redirects = load(Path(app.srcdir).resolve().parent).redirects()


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
    """A table of the recorded measurements: topic, device, versions, date, commit, command."""
    files = sorted((root / "benchmarks" / "results").glob("*/*.json"))
    rows = [row for row in (measurement(file) for file in files) if row]
    if not rows:
        return "Nothing has been recorded yet."
    return table(("topic", "device", "torch", "date", "commit", "command"), rows)


def measurement(file: Path) -> tuple[str, ...] | None:
    """One row for one file of results; None for a file of another kind."""
    record = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(record, dict) or "command" not in record:
        return None
    torch = record.get("versions", {}).get("torch", "")
    commit = (record.get("commit") or "not recorded").replace("+changes", "<br>and changes")
    return file.stem, record.get("device", ""), torch, record.get("date", "")[:10], commit, f"`{record['command']}`"


def table(head: tuple[str, ...], rows) -> str:
    """A Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def setup(app: Sphinx) -> dict:
    """Register with Sphinx."""
    app.connect("config-inited", redirect, priority=100)
    app.connect("source-read", fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
