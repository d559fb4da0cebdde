"""Make recorded measurements again, each by the command that its record holds, and print what was beside what is.

    python -m benchmarks.repeat                              # list the records, and what speaks against each
    python -m benchmarks.repeat kv_cache sparse_attention    # make two of them again, into runs/repeated/
    python -m benchmarks.repeat --stale --seconds 600        # those that something speaks against, for ten minutes

The records are those of the device that is here: of its own name if there are any, else those of an H200, which then
stand beside the times of your GPU. A command that made several records runs once. Something speaks against a record
that was made without a commit or beside changes, and against one whose kernels or library have changed since.

A row has changed if the medians differ by more than both spreads (10th to 90th percentile) allow. The exit status is
how many commands failed.
"""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from tyro.conf import Positional

from benchmarks.harness import RESULTS, device_name, writing_to
from tformer_lib import command_line

ROOT = RESULTS.parents[1]
BASELINE = "nvidia-h200"
"""Whose records a GPU without records of its own is compared with."""


@dataclass(frozen=True)
class Asked:
    """Which records to make again."""

    records: Annotated[tuple[str, ...], Positional] = ()
    """Names of records, without ``.json``."""
    stale: bool = False
    """Those that something speaks against; with names, those of the names."""
    of: str = ""
    """The folder of benchmarks/results/ that holds them; by default that of the device that is here."""
    out: Path = Path("runs") / "repeated"
    """Where the new records go, in the folder of the course."""
    seconds: float = float("inf")
    """After this time nothing is begun, and what runs is ended."""

    def __post_init__(self):
        if not self.seconds > 0:
            raise ValueError(f"seconds must be above 0, got {self.seconds}")


@dataclass(frozen=True)
class Record:
    """One file of results, as a run left it."""

    name: str
    content: dict

    @property
    def words(self) -> list[str] | None:
        """The command that made it, as a list; None where no command alone did, and words say how it was made."""
        with contextlib.suppress(ValueError):  # a quotation mark that none follows: words of English
            words = shlex.split(self.content["command"])
            if words[:2] == ["python", "-m"] and "..." not in words:
                return words
        return None

    @property
    def against(self) -> str:
        """What speaks against the record, in a few words; empty where nothing does."""
        commit = self.content.get("commit")
        if commit is None:
            return "made without a commit"
        if "+" in commit:
            return "made beside changes"
        other = ("*.cu", "*.cuh") if "--device cpu" in self.content["command"] else ("*.cpp",)
        changed = changed_since(commit, self.sources(), without=other)
        if changed is None:
            return f"its commit {commit} is not here"
        return f"changed since: {', '.join(changed)}" if changed else ""

    def sources(self) -> list[str]:
        """What it measured, as far as names tell: the topic's kernels and its module."""
        topic = self.name.partition("-")[0]
        places = [f"kernels/{topic}", f"tformer_lib/{topic}", f"tformer_lib/{topic}.py"]
        return [place for place in places if (ROOT / place).exists()]


def changed_since(commit: str, places: Sequence[str], without: Sequence[str] = ()) -> list[str] | None:
    """Those of the places that differ from what they were at a commit; None where git does not know the commit.

    Args:
        commit: as git names it.
        places: files and folders, relative to the project.
        without: patterns of files that do not count.
    """
    changed = []
    for place in places:
        paths = [place, *(f":(exclude){pattern}" for pattern in without)]
        found = subprocess.run(["git", "diff", "--quiet", commit, "--", *paths], cwd=ROOT, capture_output=True)
        if found.returncode > 1:
            return None
        changed += [place] if found.returncode else []
    return changed


def load(folder: Path) -> dict[str, Record]:
    """The records of a device by name; files that no command made, such as a ledger, are left out.

    Raises:
        ValueError: there are none.
    """
    files = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*.json")}
    found = {name: Record(name, files[name]) for name in sorted(files) if files[name].get("command")}
    if not found:
        there = sorted(path.name for path in folder.parent.glob("*") if any(path.glob("*.json")))
        raise ValueError(f"no records in {folder.name}; there are records of {', '.join(there)}")
    return found


def here() -> str:
    """The folder whose records the device that is here is compared with."""
    own = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return own if any(RESULTS.joinpath(own).glob("*.json")) else BASELINE


def choose(records: dict[str, Record], asked: Asked) -> list[Record]:
    """Those that were asked for.

    Raises:
        ValueError: a name that no record has, or a record that no command alone made.
    """
    if unknown := [name for name in asked.records if name not in records]:
        raise ValueError(f"no record is called {', '.join(unknown)}; there are {', '.join(records)}")
    if lost := [name for name in asked.records if records[name].words is None]:
        raise ValueError(f"no command alone made {', '.join(lost)}")
    named = [records[name] for name in asked.records] or list(records.values())
    return [record for record in named if record.words and (not asked.stale or record.against)]


@contextlib.contextmanager
def leaving_when_asked() -> Iterator[None]:
    """Let SIGTERM and a terminal that closes leave the block as an exception does, so that it can tidy up."""

    def leave(number: int, _frame) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@leaving_when_asked()
def run(words: Sequence[str], out: Path, seconds: float) -> str:
    """Run a recorded command, its results into a folder; returns what went wrong, or nothing."""
    command = [sys.executable, *words[1:]]
    process = subprocess.Popen(command, cwd=ROOT, env=writing_to(out), start_new_session=True)
    try:
        status = process.wait(None if seconds == float("inf") else max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return "the time is up"
    finally:
        if process.poll() is None:  # the benchmark, and what it has started
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return f"exit status {status}" if status else ""


def compare(before: dict, after: dict) -> list[str]:
    """A line for each row of two records: milliseconds before and after, their ratio, and whether that is a change."""
    was, lines = {row["name"]: row for row in before.get("rows", [])}, []
    if not was and not after.get("rows"):
        return ["  no rows: the record holds facts alone"]
    for row in after.get("rows", []):
        if (old := was.pop(row["name"], None)) is None:
            lines.append(f"  {row['name']:<56} {'':>12} {row['seconds'] * 1e3:12.3f}  new")
            continue
        apart = row["p10"] > old["p90"] or old["p10"] > row["p90"]
        times = f"{old['seconds'] * 1e3:12.3f} {row['seconds'] * 1e3:12.3f}"
        lines.append(
            f"  {row['name']:<56} {times}  {row['seconds'] / old['seconds']:.2f}{'  changed' if apart else ''}"
        )
    return lines + [f"  {name:<56} {row['seconds'] * 1e3:12.3f} {'':>12}  not made again" for name, row in was.items()]


def written_at(file: Path) -> int | None:
    """When a file was last written, in nanoseconds; None where there is none."""
    return file.stat().st_mtime_ns if file.exists() else None


def repeat(records: Sequence[Record], asked: Asked) -> int:
    """Make records again, one command after the other; returns how many commands failed."""
    end, out, failed = time.monotonic() + asked.seconds, ROOT / asked.out, []
    commands: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        commands.setdefault(tuple(record.words), []).append(record)
    for words, made in commands.items():
        line, left = shlex.join(words), end - time.monotonic()
        print(f"== {line}", flush=True)
        left_there = {record.name: written_at(out / f"{record.name}.json") for record in made}
        wrong = run(words, out, left) if left > 0 else "the time is up"
        for record in made:
            file = out / f"{record.name}.json"
            if wrong or written_at(file) == left_there[record.name]:
                print(f"{record.name}: {wrong or 'the command did not write it'}")
                continue
            after = json.loads(file.read_text(encoding="utf-8"))
            print(f"{record.name}: milliseconds on {record.content['device']} then, on {after['device']} now")
            print("\n".join(compare(record.content, after)), flush=True)
        failed += [line] if wrong else []
    print(f"{len(commands) - len(failed)} of {len(commands)} commands ran; new records are in {out}")
    return len(failed)


def show(records: Sequence[Record]) -> None:
    """Two lines for each record: its day and what speaks against it; the command, and its seconds if known."""
    for record in records:
        command = shlex.join(record.words) if record.words else "no command alone made it"
        command += f"  # {record.content['took']:.0f} s" if "took" in record.content else ""
        print(
            f"{record.name:<40} {record.content['date'][:10]}  {record.against or 'as its sources are'}\n    {command}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """List the records, or make again what the command line names; returns how many commands failed."""

    def go() -> int:
        asked = command_line.parse(Asked, arguments, program="python -m benchmarks.repeat", description=__doc__)
        records = load(RESULTS.joinpath(asked.of or here()))
        if asked.records or asked.stale:
            return repeat(choose(records, asked), asked)
        show(list(records.values()))
        return 0

    return command_line.run(go)


if __name__ == "__main__":
    sys.exit(main())
