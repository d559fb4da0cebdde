"""Run every benchmark that this machine can run, or the topics that are named: what ``make bench`` calls.

    python -m benchmarks                          # all of them, under five minutes on two cores
    python -m benchmarks kv_cache --device cpu    # one; `python -m benchmarks.kv_cache --help` lists its own options

Each topic runs in its own process, on the CPU, and on the GPU too where there is one. The topic ``ratios`` is a guard:
it fails, and so does the whole, where a kernel has become slower beside its peer than what is on record.
"""

import pkgutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from tyro.conf import Positional

import benchmarks
from tformer_lib import command_line

ROOMS = {"doors", "harness", "repeat", "sanitize", "scaling_command", "serving_latency", "serving_peer", "__main__"}


def topics() -> list[str]:
    """The topics that have a benchmark: every module of this package but the rooms that serve them all."""
    return sorted(m.name for m in pkgutil.iter_modules(benchmarks.__path__) if m.name not in ROOMS)


@dataclass(frozen=True)
class Asked:
    """Which benchmarks to run."""

    topics: Annotated[tuple[str, ...], Positional] = ()
    """By default all."""
    device: tuple[Literal["cpu", "cuda"], ...] = ()
    """By default all that are here."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line names, or everything; returns how many failed."""

    def run() -> int:
        asked = command_line.parse(Asked, arguments, program="python -m benchmarks", description=__doc__)
        here = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
        if unknown := set(asked.topics) - set(topics()):
            raise ValueError(f"no such topic: {', '.join(sorted(unknown))}; there are {', '.join(topics())}")
        if missing := set(asked.device) - set(here):
            raise ValueError(f"there is no {missing.pop()} here")
        return run_all(asked.topics or topics(), asked.device or here)

    return command_line.run(run)


def run_all(names: Sequence[str], devices: Sequence[str]) -> int:
    """Run these topics on these devices; returns how many failed."""
    failed = []
    for topic in names:
        for device in devices:
            print(f"== {topic} on {device}", flush=True)
            start = time.perf_counter()
            code = subprocess.run([sys.executable, "-m", f"benchmarks.{topic}", "--device", device]).returncode
            print(f"== {topic} on {device}: {time.perf_counter() - start:.0f} s\n", flush=True)
            failed += [f"{topic} on {device}"] if code else []
    print(f"failed: {', '.join(failed)}" if failed else "all benchmarks ran")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
