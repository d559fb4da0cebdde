"""For a teacher: chapters without solutions for a class, and one table of who passed what.

    python -m tools.classroom write class                 # what `make class` does
    python -m tools.classroom collect handed-in           # a table of the files that learners handed in

Nothing needs a network or an account. A learner works on the chapters, and hands in the small file that
``exercises.hand_in("Ada")`` writes, or ``.tformer-progress.json`` itself in a folder of the learner's name.
"""

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import nbformat
import tyro

from tformer_lib import command_line
from tformer_lib.checkpoint import write_atomically
from tformer_lib.teaching.exercises import record
from tformer_lib.teaching.exercises.engine import Exercise, all_exercises
from tools.chapters import ROOT, load
from tools.handout import handed_out

PROGRAM = "python -m tools.classroom"
SOLUTION = "solution"
"""The tag of a cell that holds a solution."""


@dataclass(frozen=True)
class Write:
    """Write the chapters without their solutions into a folder.

    Args:
        folder: where they go; it must be new or empty.
        chapters: which, such as 02-attention; by default every one.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    chapters: tuple[str, ...] = ()


@dataclass(frozen=True)
class Collect:
    """Make one table of what the learners handed in.

    Args:
        folder: where their files lie: ada.json, or ada/.tformer-progress.json.
        out: a CSV file with a row for each learner, beside the table that is printed.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    out: Path | None = None


@dataclass(frozen=True)
class Learner:
    """What one learner handed in: ``tries[name]`` is how many different answers to an exercise were checked."""

    name: str
    passed: frozenset[str]
    tries: dict[str, int]


def main(arguments: list[str] | None = None) -> int:
    """Write a class's folder, or collect what its learners handed in."""
    return command_line.run(lambda: act(arguments))


def act(arguments: list[str] | None) -> int:
    """Do what the command line says; returns the exit status."""
    commands = Annotated[Write, tyro.conf.subcommand("write")] | Annotated[Collect, tyro.conf.subcommand("collect")]
    asked = command_line.parse(commands, arguments, program=PROGRAM, description=__doc__)
    if isinstance(asked, Write):
        for name in write(ROOT, asked.folder, asked.chapters):
            print(asked.folder / f"{name}.ipynb")
        return 0
    learners, unread = collect(asked.folder)
    for path, reason in unread:
        print(f"{path}: {reason}", file=sys.stderr)
    known = [exercise for exercise in all_exercises() if any(exercise.name in one.tries for one in learners)]
    print(table(learners, known))
    if asked.out:
        write_csv(asked.out, learners, all_exercises())
    return 1 if unread else 0


def write(root: Path, folder: Path, names: tuple[str, ...] = ()) -> list[str]:
    """Write chapters without the cells that hold solutions.

    Args:
        root: the course.
        folder: made where it is missing.
        names: the chapters; empty for every one that is ready.

    Returns:
        The names of the chapters that were written.

    Raises:
        ValueError: there is no such chapter, or something lies in the folder already.
    """
    ready = [chapter.name for chapter in load(root).chapters if chapter.ready]
    if unknown := sorted(set(names) - set(ready)):
        raise ValueError(f"there is no chapter {unknown[0]!r}; there are {', '.join(ready)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"{folder} is not an empty folder; a class gets a new one, so that nobody's work is overwritten"
        )
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [name for name in ready if not names or name in names]
    for name in chosen:
        notebook = handed_out(root, name)
        notebook.cells = [cell for cell in notebook.cells if SOLUTION not in cell.metadata.get("tags", [])]
        write_atomically(folder / f"{name}.ipynb", (nbformat.writes(notebook) + "\n").encode())
    return chosen


def collect(folder: Path) -> tuple[list[Learner], list[tuple[Path, str]]]:
    """Read what the learners handed in.

    Args:
        folder: holds ``ada.json``, or ``ada/.tformer-progress.json``, at any depth.

    Returns:
        The learners by name, and the files that could not be read, each with the reason. A learner who handed in twice
        keeps what either file has passed, and the larger number of tries.

    Raises:
        ValueError: there is no such folder, or nothing in it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    found: dict[str, Learner] = {}
    unread = []
    for path in sorted(folder.rglob("*.json")):
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            unread.append((path, "is not JSON"))
            continue
        if not isinstance(said, dict) or not isinstance(said.get("passed"), list):
            unread.append((path, "is not a file of progress: it has no list 'passed'"))
            continue
        name = said.get("learner") if isinstance(said.get("learner"), str) else ""
        name = name.strip() or (path.parent.name if path.name.startswith(".") else path.stem)
        found[name] = joined(found.get(name), name, record.read(path))
    if not found and not unread:
        raise ValueError(f"nothing was handed in: {folder} holds no .json file")
    return [found[name] for name in sorted(found, key=str.casefold)], unread


def joined(before: Learner | None, name: str, said: dict) -> Learner:
    """A learner with what one more file says. A file older than the count of tries has passed without a try."""
    passed = {*said["passed"], *(before.passed if before else ())}
    tries = dict(before.tries) if before else {}
    for exercise in {*said["passed"], *said["tries"]}:
        count = said["tries"].get(exercise, {}).get("count", 0)
        tries[exercise] = max(count, tries.get(exercise, 0))
    return Learner(name, frozenset(passed), tries)


def table(learners: list[Learner], exercises: list[Exercise]) -> str:
    """A Markdown table with a row for each exercise and a column for each learner.

    A passed exercise shows the number of tries; one that is not passed yet has brackets around it.
    """
    names = [" ".join(one.name.replace("|", "/").split()) for one in learners]
    rows = [["exercise", *names, "passed"], ["---"] * (len(learners) + 2)]
    for exercise in exercises:
        count = sum(exercise.name in one.passed for one in learners)
        rows.append([exercise.name, *(entry(one, exercise.name) for one in learners), f"{count} of {len(learners)}"])
    known = {exercise.name for exercise in exercises}
    rows.append(["passed in all", *(str(len(one.passed & known)) for one in learners), ""])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def entry(learner: Learner, exercise: str) -> str:
    """What the table says of a learner and an exercise: ``3``, passed at the third try; ``(2)``, tried twice."""
    if exercise in learner.passed:
        return str(learner.tries[exercise] or "passed")
    return f"({learner.tries[exercise]})" if exercise in learner.tries else ""


def write_csv(path: Path, learners: list[Learner], exercises: list[Exercise]) -> None:
    """Write a row for each learner, with two columns for each exercise: whether it is passed, and the tries."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["learner", *(f"{e.name} {what}" for e in exercises for what in ("passed", "tries"))])
        for one in learners:
            kept = ((int(e.name in one.passed), one.tries.get(e.name, 0)) for e in exercises)
            rows.writerow([spelled(one.name), *(value for pair in kept for value in pair)])


def spelled(name: str) -> str:
    """A name that a spreadsheet takes for text: a formula begins with one of these signs."""
    return f"'{name}" if name[:1] in "=+-@\t\r" else name


if __name__ == "__main__":
    sys.exit(main())
