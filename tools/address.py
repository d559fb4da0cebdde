"""Say where the course's repository is, so that its pages offer Binder and Colab.

    python -m tools.address https://github.com/someone/tformer-lab
    python -m tools.address ""                                       # take it back

Two things change: ``course_address`` in ``_config.yml``, which ``_ext/launch.py`` reads, and the first cell of each
chapter. Colab opens a notebook alone, so that cell fetches the rest of the course there. Elsewhere it does nothing,
and no page shows it.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import nbformat
import tyro

from tformer_lib import command_line

ROOT = Path(__file__).resolve().parents[1]
MARK = "colab"
CELL = """import sys

if "google.colab" in sys.modules:  # Colab opens this notebook alone: fetch and install the rest
    !git clone --quiet --depth 1 {address} /content/course
    %pip install --quiet --editable /content/course
    %cd -q /content/course/notebooks
    sys.path.insert(0, "/content/course")  # a running kernel does not see an editable install"""


@dataclass(frozen=True)
class Asked:
    """Say where the course's repository is.

    Args:
        address: https://github.com/owner/name, which Binder and Colab can open; an empty one takes it back.
    """

    address: Annotated[str, tyro.conf.Positional]


def main(arguments: list[str] | None = None) -> int:
    """Set the address that the command line gives."""
    return command_line.run(lambda: change(arguments))


def change(arguments: list[str] | None) -> None:
    """Set the address, and say what that changes."""
    asked = command_line.parse(Asked, arguments, program="python -m tools.address", description=__doc__)
    address = asked.address.strip().rstrip("/").removesuffix(".git")
    if not re.fullmatch(r"(https://github\.com/[\w.-]+/[\w.-]+)?", address):
        raise ValueError(f"an address is https://github.com/owner/name, got {asked.address!r}")
    set_address(ROOT, address)
    told = f"the chapters open on Binder and Colab from {address}" if address else "the chapters open here alone"
    print(f"{told}; `make book` shows it")


def set_address(root: Path, address: str) -> None:
    """Write the address into the configuration and the chapters; an empty one takes it out."""
    config = root / "_config.yml"
    text = re.sub(r"course_address: \S+", f'course_address: "{address}"', config.read_text(encoding="utf-8"))
    config.write_text(text, encoding="utf-8")
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        set_cell(notebook, address)
        nbformat.write(notebook, path)


def set_cell(notebook: nbformat.NotebookNode, address: str) -> None:
    """Put Colab's cell before the first code cell, or take it out, and count the cells that were run anew."""
    notebook.cells = [cell for cell in notebook.cells if cell.id != MARK]
    if address:
        first = next(i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code")
        notebook.cells.insert(first, colab_cell(address))
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    for count, cell in enumerate(code, start=1):
        cell.execution_count = count
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count


def colab_cell(address: str) -> nbformat.NotebookNode:
    """The cell, as it is after a run on another machine than Colab: without output."""
    return nbformat.v4.new_code_cell(CELL.format(address=address), id=MARK, metadata={"tags": ["remove-cell"]})


if __name__ == "__main__":
    sys.exit(main())
