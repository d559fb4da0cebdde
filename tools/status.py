"""Record the machine and the versions that made the notebooks' outputs: run ``python -m tools.status`` after them."""

import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from tformer_lib import command_line

PACKAGES = (
    "torch", "numpy", "tiktoken", "safetensors", "matplotlib", "ipywidgets", "anywidget",
    "jupyterlab", "jupyter-book", "Sphinx", "myst-nb", "nbval",
)  # fmt: skip


def processor() -> str:
    """The processor's model name, as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def record() -> dict[str, str]:
    """Machine and versions, in the order of the page."""
    machine = {
        "Processor": f"{processor()}, {os.cpu_count()} cores",
        "System": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
    }
    return machine | {name: version(name) for name in PACKAGES}


def write() -> None:
    """Write what :func:`record` finds."""
    path = Path(__file__).resolve().parents[1] / "book" / "status.json"
    path.write_text(json.dumps(record(), indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path.name}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Record the machine and the versions."""
    return command_line.without_options(write, arguments, program="python -m tools.status", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
