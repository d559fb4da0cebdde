"""Begin a chapter: make every file that the layout asks for, small but whole, so that all tests pass from the first
minute.

    python -m tools.new_chapter 22-state-spaces --title "State spaces"

It writes the module with its test, the notebook, the checks of its exercises with right and wrong answers, and enters
the chapter into ``book/chapters.toml``, from which the table of contents and the README's table are made, and into the
longest course of ``book/syllabuses.toml``. Nothing that exists is overwritten.
"""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import nbformat
import tomlkit
import tyro

from tformer_lib import command_line
from tools.chapters import LIST, ROOT, load, write

SYLLABUSES = "book/syllabuses.toml"
TEMPLATES = Path(__file__).with_name("new_chapter.md")


@dataclass(frozen=True)
class NewChapter:
    """A chapter that is to be: its name, title and question, and the part and the floor that it is on."""

    name: str
    title: str
    question: str
    part: str
    floor: str

    @property
    def number(self) -> int:
        """The number in its name."""
        return int(self.name[:2])

    @property
    def word(self) -> str:
        """The name without its number: ``state-spaces``."""
        return self.name.partition("-")[2]

    @property
    def topic(self) -> str:
        """The word as Python writes it: ``state_spaces``."""
        return self.word.replace("-", "_")


@dataclass(frozen=True)
class Asked:
    """Begin a chapter.

    Args:
        name: number and topic, such as 22-state-spaces.
        title: the chapter's title; by default the one that is planned, or the topic.
        question: the question that it answers; by default the one that is planned.
        part: the part's word in book/chapters.toml; by default the one that is planned.
        floor: the module's floor in the same file.
    """

    name: Annotated[str, tyro.conf.Positional]
    title: str = ""
    question: str = ""
    part: str = ""
    floor: Literal["ground", "forms", "models", "users"] = "forms"


def main(arguments: list[str] | None = None) -> int:
    """Make the chapter that the command line names."""
    return command_line.run(lambda: begin(arguments))


def begin(arguments: list[str] | None) -> None:
    """Make the chapter, and say what was written and what comes next."""
    asked = command_line.parse(Asked, arguments, program="python -m tools.new_chapter", description=__doc__)
    if not (ROOT / "_toc.yml").exists():
        raise ValueError("a chapter is begun in a checkout of the course, installed by `make setup`")
    planned = load(ROOT).named(asked.name)
    title = asked.title or (planned and planned.title) or asked.name[3:].replace("-", " ").capitalize()
    question = asked.question or (planned and planned.question) or "What question does this chapter answer?"
    part = asked.part or (planned and planned.part) or "modern-models"
    written = make(ROOT, NewChapter(asked.name, title, question, part, asked.floor))
    tidy([path for path in written if path.endswith((".py", ".ipynb"))])
    print("\n".join(written))
    print(f"Next: make notebooks NB=notebooks/{asked.name}.ipynb, then make test; book/contributing.md has the rest.")


def make(root: Path, chapter: NewChapter) -> list[str]:
    """Write the chapter's files under ``root``; returns what was written or changed.

    Raises:
        ValueError: the name is none, the part does not exist, or one of the files does.
    """
    if not re.fullmatch(r"\d\d-[a-z0-9]+(-[a-z0-9]+)*", chapter.name):
        raise ValueError(
            f"a chapter's name is two digits and a topic in hyphens, such as 22-my-topic; got {chapter.name!r}"
        )
    files = {path: fill(text, chapter) for path, text in templates(chapter).items()}
    there = [path for path in files if (root / path).exists()]
    if there:
        raise ValueError(f"{', '.join(there)} exists already")
    exercises = re.findall(r'^@exercise\("([\w.]+)"', files[f"tformer_lib/teaching/exercises/{chapter.topic}.py"], re.M)
    # before a file is written: it may be refused
    listed = {LIST: enter(root, chapter), SYLLABUSES: schedule(root, chapter, exercises)}
    for path, text in (files | listed).items():
        (root / path).write_text(text, encoding="utf-8")
    return [*files, *listed, *write(root)]


def schedule(root: Path, chapter: NewChapter, exercises: list[str]) -> str:
    """``book/syllabuses.toml`` with the chapter and its exercises in the course that has them all."""
    document = tomlkit.parse((root / SYLLABUSES).read_text(encoding="utf-8"))
    weeks = max(document["syllabus"], key=lambda course: course["weeks"])["week"]
    week = next((week for week in reversed(weeks) if week["chapters"][0] <= chapter.name), weeks[0])
    week["chapters"] = sorted({*week["chapters"], chapter.name})
    week["exercises"] = [*week["exercises"], *(name for name in exercises if name not in week["exercises"])]
    return tomlkit.dumps(document)


def tidy(files: list[str]) -> None:
    """Sort the imports and break the lines as the linter wants them: that depends on the length of the topic's word."""
    ruff = shutil.which("ruff", path=Path(sys.executable).parent) or shutil.which("ruff")
    for verb in (["check", "--select", "I", "--quiet", "--fix"], ["format", "--quiet"]) if ruff else ():
        subprocess.run([ruff, *verb, *files], cwd=ROOT, check=True)


def templates(chapter: NewChapter) -> dict[str, str]:
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


def fill(text: str, chapter: NewChapter) -> str:
    """Put the chapter's words into a template."""
    words = {
        "TOPIC": chapter.topic,
        "TITLE": chapter.title,
        "QUESTION": chapter.question,
        "NUMBER": str(chapter.number),
    }
    return re.sub(r"<<(\w+)>>", lambda mark: words[mark[1]], text)


def notebook(text: str) -> str:
    """A notebook from cells that are divided by lines of ``--- markdown`` or ``--- code [tags]``."""
    made = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    cells = []
    for number, part in enumerate(re.split(r"^--- ", text, flags=re.MULTILINE)[1:]):
        head, _, body = part.partition("\n")
        kind, *tags = head.split()
        metadata = {"tags": tags} if tags else {}
        if {"hide-cell", "hide-output"} & set(tags):  # what the page folds, JupyterLab and VS Code fold too
            metadata["jupyter"] = {"outputs_hidden": True} | ({"source_hidden": True} if "hide-cell" in tags else {})
        cells.append(made[kind](body.strip("\n"), id=f"cell-{number:02}", metadata=metadata))
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    return nbformat.writes(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})) + "\n"


# The row in the list of the course


def enter(root: Path, chapter: NewChapter) -> str:
    """``book/chapters.toml`` with the chapter's row, and its module on its floor.

    A row that says "to come" is filled in; otherwise one is added.

    Raises:
        ValueError: the part does not exist, or the number or the word is another chapter's.
    """
    course = load(root)
    if chapter.part not in {part.word for part in course.parts}:
        known = ", ".join(part.word for part in course.parts)
        raise ValueError(f"{LIST} has no part {chapter.part!r}; it has {known}")
    document = tomlkit.parse((root / LIST).read_text(encoding="utf-8"))
    planned = course.named(chapter.name)
    taken = [c for c in course.chapters if planned is None and (c.number == chapter.number or c.word == chapter.word)]
    if taken:
        raise ValueError(f"{chapter.name} shares its number or its word with {taken[0].name}")
    if planned:
        row = next(row for row in document["chapters"] if row["number"] == chapter.number)
        row.pop("state", None)
        row["modules"] = [chapter.topic]
    else:
        row = tomlkit.table()
        row.update({"number": chapter.number, "word": chapter.word, "part": chapter.part, "modules": [chapter.topic]})
        document["chapters"].append(row)
    row.update({"title": chapter.title, "question": chapter.question})
    if not any(chapter.topic in modules for modules in document["floors"].values()):
        document["floors"][chapter.floor].append(chapter.topic)
    return tomlkit.dumps(document)


if __name__ == "__main__":
    sys.exit(main())
