"""Begin a chapter: make every file that the layout asks for, small but whole, so that all tests pass from the first
minute.

    python -m tformer_lib.teaching.new_chapter 18-mixture-of-experts --title "Mixture of experts"

It writes the module with its test, the notebook, the checks of its exercises with right and wrong answers, and enters
the chapter into the table of contents, the list of chapters and the table of the layout. Nothing that exists is
overwritten.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = Path(__file__).with_name("new_chapter.md")

FLOORS = ("GROUND", "FORMS", "MODELS", "USERS")
"""Who may import whom, from the ground up, as tests/test_layout.py has it."""


@dataclass(frozen=True)
class Chapter:
    """A chapter that is to be: its name, title and question, and the part and the floor that it is on."""

    name: str
    title: str
    question: str
    part: str
    floor: str

    @property
    def topic(self) -> str:
        """The name without its number, as Python writes it: ``mixture_of_experts``."""
        return self.name.partition("-")[2].replace("-", "_")


def main() -> int:
    """Make the chapter that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("name", help="number and topic: 18-mixture-of-experts")
    parser.add_argument("--title", help="the chapter's title; by default the topic")
    parser.add_argument("--question", default="What question does this chapter answer?")
    parser.add_argument("--part", default="II. What modern models changed", help="the part's caption in _toc.yml")
    parser.add_argument("--floor", choices=FLOORS, default="FORMS", help="the module's floor in tests/test_layout.py")
    given = parser.parse_args()
    if not (ROOT / "_toc.yml").exists():
        parser.error("a chapter is begun in a checkout of the course, installed by `make setup`")
    title = given.title or given.name.partition("-")[2].replace("-", " ").capitalize()
    try:
        written = make(ROOT, Chapter(given.name, title, given.question, given.part, given.floor))
    except ValueError as wrong:
        parser.error(str(wrong))
    tidy([path for path in written if path.endswith((".py", ".ipynb"))])
    print("\n".join(written))
    print(f"Next: make notebooks NB=notebooks/{given.name}.ipynb, then make test; book/contributing.md has the rest.")
    return 0


def make(root: Path, chapter: Chapter) -> list[str]:
    """Write the chapter's files under ``root``; returns what was written or changed.

    Raises:
        ValueError: the name is none, the part does not exist, or one of the files does.
    """
    if not re.fullmatch(r"\d\d-[a-z0-9]+(-[a-z0-9]+)*", chapter.name):
        raise ValueError(
            f"a chapter's name is two digits and a topic in hyphens, such as 18-my-topic; got {chapter.name!r}"
        )
    files = {path: fill(text, chapter) for path, text in templates(chapter).items()}
    there = [path for path in files if (root / path).exists()]
    if there:
        raise ValueError(f"{', '.join(there)} exists already")
    entries = {path: enter(root, chapter) for path, enter in ENTRIES.items()}  # all are made before one is written
    for path, text in (files | entries).items():
        (root / path).write_text(text, encoding="utf-8")
    return [*files, *entries]


def tidy(files: list[str]) -> None:
    """Sort the imports and break the lines as the linter wants them: that depends on the length of the topic's word."""
    ruff = shutil.which("ruff", path=Path(sys.executable).parent) or shutil.which("ruff")
    for verb in (["check", "--select", "I", "--quiet", "--fix"], ["format", "--quiet"]) if ruff else ():
        subprocess.run([ruff, *verb, *files], cwd=ROOT, check=True)


def templates(chapter: Chapter) -> dict[str, str]:
    """Path -> text of each new file, from ``new_chapter.md``."""
    topic = chapter.topic
    blocks = dict(
        re.findall(r"^## (\w+)\n\n`{4}\w*\n(.*?)^`{4}$", TEMPLATES.read_text(encoding="utf-8"), re.DOTALL | re.M)
    )
    return {
        f"tformer_lib/{topic}.py": blocks["module"],
        f"tests/test_{topic}.py": blocks["test"],
        f"tformer_lib/teaching/exercises/{topic}.py": blocks["exercises"],
        f"tests/exercise_answers/{topic}.py": blocks["answers"],
        f"notebooks/{chapter.name}.ipynb": notebook(blocks["notebook"]),
    }


def fill(text: str, chapter: Chapter) -> str:
    """Put the chapter's words into a template."""
    words = {"TOPIC": chapter.topic, "TITLE": chapter.title, "QUESTION": chapter.question, "NUMBER": chapter.name[:2]}
    return re.sub(r"<<(\w+)>>", lambda mark: words[mark[1]], text)


def notebook(text: str) -> str:
    """A notebook from cells that are divided by lines of ``--- markdown`` or ``--- code [tags]``."""
    cells = []
    for number, part in enumerate(re.split(r"^--- ", text, flags=re.MULTILINE)[1:]):
        head, _, body = part.partition("\n")
        kind, *tags = head.split()
        metadata = {"tags": tags} if tags else {}
        cell = {"cell_type": kind, "id": f"cell-{number:02}", "metadata": metadata}
        code = {"execution_count": None, "outputs": []} if kind == "code" else {}
        cells.append(cell | code | {"source": body.strip("\n").splitlines(keepends=True)})
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    whole = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


# Entries in files that exist


def enter_contents(root: Path, chapter: Chapter) -> str:
    """``_toc.yml`` with the chapter at the end of its part."""
    text = (root / "_toc.yml").read_text(encoding="utf-8")
    part = re.search(
        rf"^  - caption: {re.escape(chapter.part)}\n    chapters:\n(?:      - file: .*\n)+", text, re.MULTILINE
    )
    if not part:
        known = ", ".join(re.findall(r"^  - caption: (.*)$", text, re.MULTILINE))
        raise ValueError(f"_toc.yml has no part {chapter.part!r}; it has {known}")
    return f"{text[: part.end()]}      - file: notebooks/{chapter.name}\n{text[part.end() :]}"


def enter_layout(root: Path, chapter: Chapter) -> str:
    """``tests/test_layout.py`` with the chapter's row, and its module on its floor."""
    text = (root / "tests" / "test_layout.py").read_text(encoding="utf-8")
    if f'"{chapter.name}":' not in text:
        text = re.sub(
            r"(^ROWS = \{\n.*?)^\}", rf'\1    "{chapter.name}": ("{chapter.topic}",),\n}}', text, flags=re.DOTALL | re.M
        )
    sets = text[text.index("GROUND = ") : text.index("FLOORS = ")]
    if f'"{chapter.topic}"' not in sets:
        text = text.replace("FLOORS = (", f'{chapter.floor} |= {{"{chapter.topic}"}}\nFLOORS = (')
    return text


def enter_question(root: Path, chapter: Chapter) -> str:
    """``book/_ext/tables.py`` with the chapter's question."""
    text = (root / "book" / "_ext" / "tables.py").read_text(encoding="utf-8")
    if f'"{chapter.name}":' in text:
        return text
    row = f'    "{chapter.name}": {json.dumps(chapter.question, ensure_ascii=False)},\n'
    return re.sub(
        r"(^QUESTIONS = \{\n.*?)^\}", lambda found: f"{found[1]}{row}}}", text, flags=re.DOTALL | re.MULTILINE
    )


def enter_readme(root: Path, chapter: Chapter) -> str:
    """``README.md`` with the chapter's row in the list of chapters."""
    text = (root / "README.md").read_text(encoding="utf-8")
    number = int(chapter.name[:2])
    row = f"| {number} | [{chapter.title}](notebooks/{chapter.name}.ipynb) | `{chapter.topic}.py` | begun |\n"
    text = re.sub(rf"^\| {number} \|.*\n", "", text, flags=re.MULTILINE)
    last = [found for found in re.finditer(r"^\| (\d+) \|.*\n", text, re.MULTILINE) if int(found[1]) < number][-1]
    return text[: last.end()] + row + text[last.end() :]


ENTRIES = {
    "_toc.yml": enter_contents,
    "tests/test_layout.py": enter_layout,
    "book/_ext/tables.py": enter_question,
    "README.md": enter_readme,
}
"""File -> the function that makes its text with the chapter entered."""


if __name__ == "__main__":
    sys.exit(main())
