"""A chapter as a learner opens it: in JupyterLab, in VS Code or on Colab, not as a page of the book.

The book resolves citations and counts equations over all chapters. An editor of notebooks knows one file, and shows
``{cite}`vaswani2017` `` as an error or as it is written. A handed out chapter therefore names authors and years and
links to the works, and gives no number to an equation of another chapter.
"""

import re
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path

import nbformat
from pybtex.database import Entry, parse_file

CITATION = re.compile(r"\{cite(:t)?\}`([^`]+)`")
EQUATION = re.compile(r"\{eq\}`([^`]+)`")
LABEL = re.compile(r"^\$\$ \(([\w-]+)\)", re.MULTILINE)
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]+\)")
LISTING = re.compile(r"\bshow_(?:source|kernel)\(")


def handed_out(root: Path, name: str) -> nbformat.NotebookNode:
    """A chapter of the course at ``root``, such as ``02-attention``, as a learner gets it."""
    notebook = nbformat.read(root / "notebooks" / f"{name}.ipynb", as_version=4)
    own = labels(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = CITATION.sub(partial(cited, root), cell.source)
            cell.source = EQUATION.sub(partial(equation, own), cell.source)
            cell.source = OUTSIDE.sub(r"\1", cell.source)  # a page of the book; the learner's folder has none
        elif "hide-output" in cell.metadata.get("tags", []) and not LISTING.search(cell.source):
            hide_the_answer(cell)
    return notebook


def hide_the_answer(cell: nbformat.NotebookNode) -> None:
    """Leave out the output that answers a prediction, until the learner runs the cell.

    The page folds it. JupyterLab folds it too, but shows its first line beside the fold, which is often the answer, and
    for a figure a line such as ``<Figure size 420x340 with 1 Axes>``. A listing of the library's source stays folded:
    its first line names the file.
    """
    cell.outputs, cell.execution_count = [], None
    cell.metadata.get("jupyter", {}).pop("outputs_hidden", None)


def cited(root: Path, found: re.Match) -> str:
    """A citation as links: ``([Vaswani et al., 2017](...))``, or ``[Vaswani et al. (2017)](...)`` within a sentence."""
    within, keys = found.groups()
    works = bibliography(root / "book" / "references.bib")
    style: Callable[[str, str], str] = "{} ({})".format if within else "{}, {}".format
    links = [link(style(authors(works[key]), works[key].fields["year"]), works[key]) for key in keys.split(",")]
    return ", ".join(links) if within else f"({'; '.join(links)})"


def link(text: str, work: Entry) -> str:
    """The text, as a link where the work has an address."""
    address = next(iter(addresses(work)), None)
    return f"[{text}]({address})" if address else text


def addresses(work: Entry) -> Iterable[str]:
    """Where a work can be read, the best address first."""
    fields = work.fields
    if "eprint" in fields:
        yield f"https://arxiv.org/abs/{fields['eprint']}"
    if "doi" in fields:
        yield f"https://doi.org/{fields['doi']}"
    if "url" in fields:
        yield fields["url"]
    if found := re.search(r"\\url\{([^}]+)\}", fields.get("howpublished", "")):
        yield found.group(1)


def authors(work: Entry) -> str:
    """The authors as the page names them: one, two, or the first and "et al."."""
    names = [re.sub(r"[{}]", "", " ".join(one.prelast_names + one.last_names)) for one in work.persons["author"]]
    return " and ".join(names) if len(names) < 3 else f"{names[0]} et al."


def equation(own: set[str], found: re.Match) -> str:
    """A reference to an equation. Of another chapter, which the sentence goes on to name, no number is known."""
    return found.group() if found.group(1) in own else "an equation"


def labels(notebook: nbformat.NotebookNode) -> set[str]:
    """The labels of a chapter's equations."""
    return {label for cell in notebook.cells if cell.cell_type == "markdown" for label in LABEL.findall(cell.source)}


@cache
def bibliography(path: Path) -> dict[str, Entry]:
    """The works that the course cites, by key."""
    return dict(parse_file(str(path)).entries)
