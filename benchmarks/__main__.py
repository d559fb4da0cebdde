"""Run every benchmark that this machine can run: ``python -m benchmarks`` (what ``make bench`` calls).

Each topic runs in its own process, on the CPU, and on the GPU too where there is one. The topic ``ratios`` is a guard:
it fails, and so does the whole, where a kernel has become slower beside its peer than what is on record.
"""

import pkgutil
import subprocess
import sys
import time

import torch

import benchmarks

ROOMS = {"harness", "sanitize", "__main__"}


def topics() -> list[str]:
    """The topics that have a benchmark: every module of this package but the rooms that serve them all."""
    return sorted(m.name for m in pkgutil.iter_modules(benchmarks.__path__) if m.name not in ROOMS)


def main() -> int:
    """Run them one after the other and return how many failed."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    failed = []
    for topic in topics():
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
