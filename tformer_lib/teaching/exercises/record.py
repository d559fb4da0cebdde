"""The learner's progress, in one small local file.

The file is ``.tformer-progress.json`` in the working directory (beside the notebooks), or what ``TFORMER_PROGRESS``
names; set to an empty string, nothing is kept. A test run keeps nothing either. Losing the file, or being
unable to write it, never stops a notebook.
"""

import json
import os
from pathlib import Path

from tformer_lib.checkpoint import locked, write_atomically


def path() -> Path | None:
    """Where the record is kept; None where nothing is to be kept."""
    named = os.environ.get("TFORMER_PROGRESS")
    if named is not None:
        return Path(named) if named else None
    if "PYTEST_VERSION" in os.environ:
        return None
    return Path(".tformer-progress.json")


def passed() -> set[str]:
    """Names of the exercises that were passed; empty where there is no readable record."""
    file = path()
    try:
        names = json.loads(file.read_text(encoding="utf-8"))["passed"] if file else []
        return {name for name in names if isinstance(name, str)}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def add(name: str) -> None:
    """Note that an exercise was passed; quietly does nothing where the file cannot be written."""
    file = path()
    if file is None or name in passed():
        return
    try:
        with locked(file.parent, wait=True):  # another chapter's kernel may be noting its own
            write_atomically(file, (json.dumps({"passed": sorted(passed() | {name})}, indent=1) + "\n").encode())
    except OSError:
        return
