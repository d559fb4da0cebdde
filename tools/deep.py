"""Draw 100 times as many examples as an ordinary run, in many processes: what a release asks of every property.

    python -m tools.deep --processes 24 --seconds 280

Each test that draws is cut into pieces of half a minute, each a process with random examples of its own, and the
cheapest tests come first. Every piece that ended is a line of ``--out``, so that the next call goes on where this one
stopped. At the end a table says how often each test has drawn its ordinary number of examples, and which were drawn to
the end. A test that nothing is known of is first run as in an ordinary run.
"""

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Annotated

import tyro

from tformer_lib import command_line
from tools.chapters import ROOT

DEEP = 100
"""How many times an ordinary run's examples a test is to draw."""

PIECE = 30.0
"""Seconds that a piece takes, about: many times what a process needs to begin."""


FEW = 4
"""Tests of one piece of which nothing is known."""


@dataclass(frozen=True)
class Asked:
    """Draw many examples.

    Args:
        tests: files, folders or names of tests, as pytest takes them.
        processes: how many pieces run at a time, each with one thread.
        seconds: when to stop; what runs then is ended and does not count.
        out: the file of what was drawn, read first.
        piece: seconds that a piece takes, about, on the machine that the costs were measured on; what runs when the
            time is up is lost, so a busy machine wants short ones.
    """

    tests: Annotated[tuple[str, ...], tyro.conf.Positional] = ("tests",)
    processes: int = 2
    seconds: float = 3600.0
    out: Path = Path("deep.jsonl")
    piece: float = PIECE


@dataclass(frozen=True)
class Piece:
    """Tests that one process draws for, each ``multiple`` times its ordinary number of examples."""

    tests: tuple[str, ...]
    multiple: int


@dataclass
class Drawn:
    """What one test has drawn so far: how many times its ordinary number, how many examples, in how many seconds."""

    multiple: int = 0
    examples: int = 0
    seconds: float = 0.0
    failures: int = 0


def main(arguments: list[str] | None = None) -> int:
    """Draw what the command line asks for; the exit status is 1 where an example failed."""
    return command_line.run(lambda: draw(arguments))


def draw(arguments: list[str] | None) -> int:
    """Collect the tests, run their pieces, and print the table."""
    asked = command_line.parse(Asked, arguments, program="python -m tools.deep", description=__doc__)
    deadline = time.monotonic() + asked.seconds
    collected = run_pytest(["--collect-only", "-q", *asked.tests], subprocess.PIPE, DEEP_MULTIPLE=str(DEEP))
    tests = [line for line in collected.stdout.splitlines() if "::" in line and " " not in line.partition("::")[0]]
    for line in collected.stdout.splitlines():
        if line.startswith("ERROR"):
            print(line)  # a file that could not be read, for want of a package perhaps: its tests do not draw
    if not tests:
        raise ValueError(f"there is no test that draws in {' '.join(asked.tests)}: {collected.stdout}")
    known = read(asked.out)
    new = [test for test in tests if test not in known]
    run([Piece(tuple(new[i : i + FEW]), 1) for i in range(0, len(new), FEW)], asked, deadline)
    known = read(asked.out)
    run(list(pieces({test: known[test] for test in tests if test in known}, asked.piece)), asked, deadline)
    known = read(asked.out)
    print(table({test: known[test] for test in tests}))
    return int(any(known[test].failures for test in tests))


def pieces(known: dict[str, Drawn], piece: float = PIECE) -> Iterator[Piece]:
    """What is left to draw, the cheapest tests first and several of them in one piece of so many seconds."""
    cost = {test: drawn.seconds / drawn.multiple for test, drawn in known.items()}
    left = {test: DEEP - drawn.multiple for test, drawn in known.items() if drawn.multiple < DEEP}
    together, seconds = [], 0.0
    for test in sorted(left, key=lambda test: cost[test] * left[test]):
        parts = ceil(cost[test] * left[test] / piece) or 1
        multiple = ceil(left[test] / parts)
        if together and (parts > 1 or seconds + cost[test] * multiple > piece or left[together[0]] != multiple):
            yield Piece(tuple(together), left[together[0]])
            together, seconds = [], 0.0
        if parts > 1:
            yield from (Piece((test,), min(multiple, n)) for n in range(left[test], 0, -multiple))
        else:
            together.append(test)
            seconds += cost[test] * multiple
    if together:
        yield Piece(tuple(together), left[together[0]])


def run(todo: list[Piece], asked: Asked, deadline: float) -> None:
    """Run pieces, some at a time, until all ended or the time is up."""

    def one(piece: Piece) -> None:
        if (left := deadline - time.monotonic()) > 0:
            environment = {"DEEP_MULTIPLE": str(piece.multiple), "DEEP_OUT": str(asked.out.resolve())}
            run_pytest(["-q", *piece.tests], subprocess.DEVNULL, timeout=left, **environment)

    with ThreadPoolExecutor(asked.processes) as pool:
        list(pool.map(one, todo))


def run_pytest(arguments: list[str], out: int, timeout: float | None = None, **environment: str):
    """Run pytest with ``deep_plugin.py``; a run that is out of time is ended."""
    command = [sys.executable, "-m", "pytest", "-p", "tools.deep_plugin", "-p", "no:cacheprovider", "-o", "addopts="]
    environment = {"OMP_NUM_THREADS": "1", "HYPOTHESIS_PROFILE": "deep"} | environment
    try:
        return subprocess.run(
            [*command, *arguments],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=out,
            stderr=out,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return None


def read(path: Path) -> dict[str, Drawn]:
    """Test -> what it has drawn, from the lines of a file."""
    known = defaultdict(Drawn)
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        row = json.loads(line)
        drawn = known[row["test"]]
        drawn.multiple += row["multiple"]
        drawn.examples += row["examples"]
        drawn.seconds += row["seconds"]
        drawn.failures += bool(row["failure"])
    return known


def table(known: dict[str, Drawn]) -> str:
    """What every test drew, those first that are not drawn to the end."""
    rows = sorted(known.items(), key=lambda row: (row[1].multiple >= DEEP, -row[1].seconds))
    whole = sum(drawn.multiple >= DEEP for drawn in known.values())
    lines = [
        f"{drawn.multiple:4} x  {drawn.examples:9,} examples {drawn.seconds:8.0f} s  {drawn.failures or '':3} {test}"
        for test, drawn in rows
    ]
    examples, failures = (sum(getattr(drawn, what) for drawn in known.values()) for what in ("examples", "failures"))
    return "\n".join([*lines, f"{whole} of {len(known)} tests whole, {examples:,} examples, failures: {failures}"])


if __name__ == "__main__":
    sys.exit(main())
