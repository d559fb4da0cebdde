"""The list of the course, ``book/chapters.toml``, and the files that are made from it.

    python -m tools.chapters            # write _toc.yml and the README's table
    python -m tools.chapters --check    # only say which of them is out of date

The extensions of the book and the layout test read the list through :func:`load`.
"""

import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tformer_lib import command_line

ROOT = Path(__file__).resolve().parents[1]
LIST = "book/chapters.toml"
TO_COME = "to come"
MARKS = ("<!-- chapters: made by python -m tools.chapters -->\n", "<!-- end of chapters -->\n")


@dataclass(frozen=True)
class Chapter:
    """One row of the list."""

    number: int
    word: str
    title: str
    part: str
    modules: tuple[str, ...]
    question: str
    subjects: str = ""
    state: str = "ready"
    test: str = ""
    was: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The notebook's name without its ending: ``02-attention``."""
        return f"{self.number:02}-{self.word}"

    @property
    def page(self) -> str:
        """The page in the book: ``notebooks/02-attention``."""
        return f"notebooks/{self.name}"

    @property
    def ready(self) -> bool:
        """Whether there is a notebook."""
        return self.state != TO_COME

    @property
    def test_file(self) -> str:
        """The file of the topic's tests."""
        return f"tests/test_{self.test or self.modules[0]}.py"


@dataclass(frozen=True)
class Part:
    """A part of the book: its caption, and the pages before its chapters."""

    word: str
    caption: str
    pages: tuple[str, ...] = ()
    was: tuple[str, ...] = ()


@dataclass(frozen=True)
class Course:
    """The whole list."""

    parts: tuple[Part, ...]
    chapters: tuple[Chapter, ...]
    floors: dict[str, list[str]]

    def of(self, part: str) -> list[Chapter]:
        """The chapters of a part, in reading order."""
        return [chapter for chapter in self.chapters if chapter.part == part]

    def named(self, name: str) -> Chapter | None:
        """The chapter of a notebook's name, or None."""
        return next((chapter for chapter in self.chapters if chapter.name == name), None)

    def redirects(self) -> dict[str, str]:
        """Earlier page -> the page that it leads to now, seen from where the earlier one was."""
        moved = [(old, chapter.page) for chapter in self.chapters if chapter.ready for old in chapter.was]
        moved += [(old, part.pages[0]) for part in self.parts for old in part.was]
        return {old: f"{new.rpartition('/')[2]}.html" for old, new in moved}


def load(root: Path = ROOT) -> Course:
    """Read the list.

    Raises:
        ValueError: a chapter names a part that is not there, or two chapters share a number or a word.
    """
    data = tomllib.loads((root / LIST).read_text(encoding="utf-8"))
    parts = tuple(Part(**tuples(row)) for row in data["parts"])
    chapters = tuple(sorted((Chapter(**tuples(row)) for row in data["chapters"]), key=lambda c: c.number))
    for chapter in chapters:
        if chapter.part not in {part.word for part in parts}:
            raise ValueError(f"{LIST}: {chapter.name} is in part {chapter.part!r}, which is not there")
    for what in ("number", "word"):
        values = [getattr(chapter, what) for chapter in chapters]
        twice = {value for value in values if values.count(value) > 1}
        if twice:
            raise ValueError(f"{LIST}: two chapters have the {what} {', '.join(map(str, sorted(twice)))}")
    return Course(parts, chapters, data["floors"])


def tuples(row: dict) -> dict:
    """A row with its lists as tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}


def contents(course: Course) -> str:
    """The text of ``_toc.yml``."""
    lines = [
        f"# The order of the book, made from {LIST} by `python -m tools.chapters`.",
        "format: jb-book",
        "root: index",
        "options:",
        "  numbered: false",
        "parts:",
    ]
    for part in course.parts:
        lines += [f"  - caption: {part.caption}", "    chapters:"]
        ready = [chapter.page for chapter in course.of(part.word) if chapter.ready]
        lines += [f"      - file: {page}" for page in (*part.pages, *ready)]
    return "\n".join(lines) + "\n"


def readme(course: Course, root: Path = ROOT) -> str:
    """The README with its table of chapters made anew."""
    text = (root / "README.md").read_text(encoding="utf-8")
    before, start, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not start or not end:
        raise ValueError(f"README.md has no lines {MARKS[0].strip()} and {MARKS[1].strip()}")
    return before + start + readme_table(course, root) + end + after


def readme_table(course: Course, root: Path = ROOT) -> str:
    """A row for each chapter: its notebook, the library that it explains, and whether it is there."""
    lines = ["| | chapter | library | state |", "|---|---|---|---|"]
    for chapter in course.chapters:
        title = f"[{chapter.title}](notebooks/{chapter.name}.ipynb)" if chapter.ready else chapter.title
        code = ", ".join(f"`{place}`" for module in chapter.modules for place in places(module, root))
        lines.append(f"| {chapter.number} | {title} | {code} | {chapter.state} |")
    return "\n".join(lines) + "\n"


def places(module: str, root: Path) -> list[str]:
    """Where a module and its kernels are, as the README writes it."""
    library = f"{module}/" if (root / "tformer_lib" / module).is_dir() else f"{module}.py"
    kernels = f"kernels/{module}/"
    return [library, kernels] if (root / kernels).is_dir() else [library]


def files(root: Path = ROOT) -> dict[str, str]:
    """Each file that is made from the list, and what it should hold."""
    course = load(root)
    return {"_toc.yml": contents(course), "README.md": readme(course, root)}


def stale(root: Path = ROOT) -> list[str]:
    """The files that do not hold what the list says."""
    return [name for name, text in files(root).items() if (root / name).read_text(encoding="utf-8") != text]


def write(root: Path = ROOT) -> list[str]:
    """Bring the files up to date; returns those that changed."""
    changed = stale(root)
    for name, text in files(root).items():
        (root / name).write_text(text, encoding="utf-8")
    return changed


@dataclass(frozen=True)
class Asked:
    """What to do with the files."""

    check: bool = False
    """Only say which of them is out of date; the exit status is 1 if any is."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the files, or look at them."""

    def go() -> int:
        asked = command_line.parse(Asked, arguments, program="python -m tools.chapters", description=__doc__)
        behind = stale() if asked.check else write()
        print("\n".join(behind) or "nothing to do")
        return int(asked.check and bool(behind))

    return command_line.run(go)


if __name__ == "__main__":
    sys.exit(main())
