"""Open JupyterLab on the learner's own copy of the chapters, where the learner stopped.

    python -m tools.lab                          # what `make lab` does
    python -m tools.lab --fresh 02-attention     # a clean copy of a chapter; the learner's own is kept beside it

The chapters lie in ``notebooks/``, where the tests compare them with what the code prints. A learner works on copies in
``learn/``, which git ignores. So an update of the course changes no line that a learner has written: a chapter in which
no cell was edited is replaced by the new one, and an edited one stays. What is copied is signed, so that JupyterLab
trusts its drawings and its figures.
"""

import hashlib
import json
import os
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated

import nbformat
import tyro
from nbformat.sign import NotebookNotary

from tformer_lib import command_line
from tools.chapters import ROOT, load
from tools.handout import handed_out

FOLDER = "learn"
SETTINGS = Path(__file__).with_name("lab_settings")
PROGRESS = ".tformer-progress.json"
"""In the learner's folder: what the checks of the exercises note (``tformer_lib.teaching.exercises.record``)."""

RECORD = ".course.json"
"""In the learner's folder: what each chapter was when it was copied, and when that was."""


@dataclass(frozen=True)
class Asked:
    """Open JupyterLab on the learner's own copy of the chapters.

    Args:
        jupyter: options for JupyterLab itself, after two hyphens.
        fresh: take a clean copy of this chapter, such as 02-attention, and stop.
        no_open: bring the folder up to date and stop.
    """

    jupyter: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    fresh: str = ""
    no_open: bool = False


def main(arguments: list[str] | None = None) -> int:
    """Bring the learner's folder up to date, and open it."""
    return command_line.run(lambda: act(arguments))


def act(arguments: list[str] | None) -> None:
    """Do what the command line says; JupyterLab takes the place of this process."""
    asked = command_line.parse(Asked, arguments, program="python -m tools.lab", description=__doc__)
    folder = ROOT / FOLDER
    if asked.fresh:
        print(fresh(ROOT, folder, Path(asked.fresh).stem))
        return
    for line in (*bring(ROOT, folder), progress(folder)):
        print(line)
    if asked.no_open:
        return
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait stall beside a busy browser
    os.chdir(folder)
    command = [sys.executable, "-m", "jupyterlab", *options(folder), *asked.jupyter]
    os.execv(sys.executable, command)


def options(folder: Path) -> list[str]:
    """What JupyterLab is told: its folder, its first page, and to ask the network for nothing.

    In a container one is often root, whom JupyterLab refuses by itself. It listens to this machine alone.
    """
    root = ["--allow-root"] if os.geteuid() == 0 else []
    return [
        *root,
        f"--ServerApp.root_dir={folder}",
        f"--LabApp.default_url=/lab/tree/{latest(folder).name}",
        f"--LabApp.app_settings_dir={SETTINGS}",
        "--LabApp.news_url=",
    ]


def bring(root: Path, folder: Path) -> list[str]:
    """Copy what is missing, replace what the learner has not edited, and keep the rest.

    Returns:
        One line for each chapter of which the course has a newer version than the learner's edited one.
    """
    folder.mkdir(exist_ok=True)
    record, kept = read_record(folder), []
    for name in (chapter.name for chapter in load(root).chapters if chapter.ready):
        target, chapter = folder / f"{name}.ipynb", handed_out(root, name)
        new, mine, before = sources(chapter), sources(read(target)), record.get(name, {}).get("sources")
        if not target.exists() or (mine == before and new != before):
            record[name] = keep(chapter, target)
        elif mine not in (before, new) and new != before:
            kept.append(
                f"{name} has changed in the course; yours, which you edited, stays. A clean copy: make fresh NB={name}"
            )
    write_record(folder, record)
    return kept


def fresh(root: Path, folder: Path, name: str) -> str:
    """Put a clean copy of a chapter into the learner's folder; the learner's own gets another name.

    Raises:
        ValueError: there is no such chapter.
    """
    source, target = root / "notebooks" / f"{name}.ipynb", folder / f"{name}.ipynb"
    if not source.exists():
        known = ", ".join(chapter.name for chapter in load(root).chapters if chapter.ready)
        raise ValueError(f"there is no chapter {name!r}; there are {known}")
    folder.mkdir(exist_ok=True)
    told = f"{FOLDER}/{target.name} is a clean copy"
    chapter = handed_out(root, name)
    if target.exists() and sources(read(target)) != sources(chapter):
        mine = free_name(folder, f"{name} mine {date.today()}")
        target.rename(mine)
        told += f"; yours is now {FOLDER}/{mine.name}"
    write_record(folder, read_record(folder) | {name: keep(chapter, target)})
    return told


def free_name(folder: Path, stem: str) -> Path:
    """A notebook of that name that is not there yet."""
    names = (f"{stem}{number}.ipynb" for number in ("", *(f" ({n})" for n in range(2, 1000))))
    return next(folder / name for name in names if not (folder / name).exists())


def keep(chapter: nbformat.NotebookNode, target: Path) -> dict:
    """Write and sign a chapter, as a person does who trusts it; returns what the record keeps of it."""
    partial = target.with_suffix(".partial")
    nbformat.write(chapter, partial)
    partial.replace(target)
    NotebookNotary().sign(nbformat.read(target, as_version=4))
    return {"sources": sources(chapter), "saved": target.stat().st_mtime_ns}


def read(path: Path) -> dict | None:
    """A notebook as JSON; None where there is none that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def sources(notebook: dict | None) -> str | None:
    """A hash of the cells' text, without their outputs: running a chapter does not edit it. None for no notebook."""
    try:
        text = json.dumps(["".join(cell["source"]) for cell in notebook["cells"]])
    except (KeyError, TypeError):
        return None
    return hashlib.sha256(text.encode()).hexdigest()


def latest(folder: Path) -> Path:
    """The notebook that the learner saved last; where none was saved since it was copied, the first."""
    record, notebooks = read_record(folder), sorted(folder.glob("*.ipynb"))
    saved = {path: path.stat().st_mtime_ns for path in notebooks}
    worked = [path for path in notebooks if saved[path] != record.get(path.stem, {}).get("saved")]
    return max(worked, key=saved.get) if worked else notebooks[0]


def progress(folder: Path) -> str:
    """One line on the exercises that the learner has passed, from the file that their checks keep."""
    found = read(folder / PROGRESS)
    passed = found.get("passed") if isinstance(found, dict) else None
    count = len(passed) if isinstance(passed, list) else 0
    return f"{count} {'exercise' if count == 1 else 'exercises'} passed so far; exercises.progress() lists them"


def read_record(folder: Path) -> dict:
    """What each chapter was when it was copied; empty where there is no readable record."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return record if isinstance(record, dict) else {}
    except (OSError, ValueError):
        return {}


def write_record(folder: Path, record: dict) -> None:
    """Write the record whole or not at all."""
    partial = folder / f"{RECORD}.partial"
    partial.write_text(json.dumps(record), encoding="utf-8")
    partial.replace(folder / RECORD)


if __name__ == "__main__":
    sys.exit(main())
