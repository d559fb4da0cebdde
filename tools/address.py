"""Say where the course's repository is, so that its pages offer Binder and Colab.

    python -m tools.address https://github.com/someone/tformer-lab
    python -m tools.address ""                                       # take it back

Two things change: ``course_address`` in ``_config.yml``, which ``_ext/launch.py`` reads, and the first cell of each
chapter. Colab opens a notebook alone, so that cell fetches the rest of the course there. Elsewhere it does nothing,
and no page shows it.
"""

import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
MARK = "colab"
CELL = """import sys

if "google.colab" in sys.modules:  # Colab opens this notebook alone: fetch and install the rest
    !git clone --quiet --depth 1 {address} /content/course
    %pip install --quiet --editable /content/course
    %cd -q /content/course/notebooks
    sys.path.insert(0, "/content/course")  # a running kernel does not see an editable install"""


def main() -> int:
    """Set the address that the command line gives."""
    given = sys.argv[1] if len(sys.argv) == 2 else None
    address = (given or "").strip().rstrip("/").removesuffix(".git")
    if given is None or not re.fullmatch(r"(https://github\.com/[\w.-]+/[\w.-]+)?", address):
        print(__doc__)
        print(f"An address is https://github.com/owner/name, which Binder and Colab can open; got {given!r}.")
        return 2
    set_address(ROOT, address)
    told = f"the chapters open on Binder and Colab from {address}" if address else "the chapters open here alone"
    print(f"{told}; `make book` shows it")
    return 0


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
