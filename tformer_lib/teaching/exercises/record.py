"""The learner's progress, in one small local file, and beside it the answers that passed.

The file is ``.tformer-progress.json`` in the working directory (beside the notebooks), or what ``TFORMER_PROGRESS``
names; set to an empty string, nothing is kept. A test run keeps nothing either. Losing the file, or being
unable to write it, never stops a notebook.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path

from tformer_lib.checkpoint import locked, write_atomically
from tformer_lib.teaching.exercises.sources import Source


def path() -> Path | None:
    """Where the record is kept; None where nothing is to be kept."""
    named = os.environ.get("TFORMER_PROGRESS")
    if named is not None:
        return Path(named) if named else None
    if "PYTEST_VERSION" in os.environ:
        return None
    return Path(".tformer-progress.json")


def read(file: Path | None = None) -> dict:
    """The record as it stands: ``{"passed": [names], "tries": {name: {"count": 3, "last": "an answer's mark"}}}``.

    What is missing, unreadable or of another form is left out.

    Args:
        file: a learner's file; by default the local one.
    """
    file = file or path()
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file else {}
    except (OSError, ValueError, RecursionError):
        found = {}
    found = found if isinstance(found, dict) else {}
    names, tries = found.get("passed"), found.get("tries")
    return {
        "passed": sorted({name for name in names if isinstance(name, str)} if isinstance(names, list) else ()),
        "tries": {
            name: {"count": kept["count"], "last": str(kept.get("last", ""))}
            for name, kept in (tries.items() if isinstance(tries, dict) else ())
            if isinstance(kept, dict) and type(kept.get("count")) is int and kept["count"] > 0
        },
    }


def passed() -> set[str]:
    """Names of the exercises that were passed; empty where there is no readable record."""
    return set(read()["passed"])


def add(name: str, *, answer: str, right: bool) -> None:
    """Note that an exercise was tried; quietly does nothing where the file cannot be written.

    After the first right answer nothing is counted any more.

    Args:
        name: the exercise.
        answer: a mark of the answer. The same answer, checked again, is no new try.
        right: whether it passed.
    """
    file = path()
    if file is None:
        return
    try:
        with locked(file.parent, wait=True):  # another chapter's kernel may be noting its own
            found = read(file)
            if name in found["passed"]:
                return
            before = found["tries"].get(name, {"count": 0, "last": ""})
            if before["last"] != answer:
                found["tries"][name] = {"count": before["count"] + 1, "last": answer}
            elif not right:
                return
            found["passed"] = sorted({*found["passed"], name} if right else found["passed"])
            write_atomically(file, (json.dumps(found, indent=1) + "\n").encode())
    except OSError:
        return


def answers_path() -> Path | None:
    """Where answers are kept: beside the record, with ``.answers`` after its name."""
    file = path()
    return None if file is None else file.with_name(f"{file.name}.answers")


def answers() -> dict[str, Source]:
    """The answers that were kept, by exercise; what is missing, unreadable or of another form is left out."""
    file = answers_path()
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file else {}
    except (OSError, ValueError, RecursionError):
        found = {}
    kept = {}
    for name, facts in found.items() if isinstance(found, dict) else ():
        try:
            source = Source(**facts)
        except TypeError:
            continue
        lines = isinstance(source.imports, list) and all(isinstance(line, str) for line in source.imports)
        texts = isinstance(source.definitions, dict) and all(isinstance(x, str) for x in source.definitions.values())
        if lines and texts and source.function in source.definitions:
            kept[name] = source
    return kept


def keep(name: str, source: Source) -> None:
    """Keep an answer that passed; quietly does nothing where the file cannot be written."""
    file = answers_path()
    if file is None:
        return
    try:
        with locked(file.parent, wait=True):
            found = {other: asdict(kept) for other, kept in answers().items()}
            if found.get(name) != asdict(source):
                write_atomically(file, (json.dumps(found | {name: asdict(source)}, indent=1) + "\n").encode())
    except OSError:
        return
