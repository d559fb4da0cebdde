"""What every notebook keeps, as plain functions: the tests call them, and so does the pre-commit hook.

    python tests/notebook_rules.py notebooks/02-attention.ipynb

Each rule takes a notebook as JSON and yields what breaks it, one sentence a complaint.
"""

import json
import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

LIGHT = 2_500_000
"""Bytes: the most that a notebook may weigh; a figure is in it twice, as SVG and as PNG."""

UNCOMPARED: dict[str, int] = {"06-training": 1}
"""Notebook -> how many of its cells may be tagged so that their output is not compared (or that they are not run)."""

PLURALS = (
    "beams|blocks|bytes|devices|dimensions|experts|FLOPs|GPUs|groups|heads|keys|layers|numbers|operators|pairs|passes|"
    "pieces|places|positions|processes|prompts|queries|ranges|rounds|rows|seconds|steps|tensors|texts|tokens"
)
ONE_OF_MANY = re.compile(rf"(?<![\w.,/^-])(?<!- )1 (?:(?!has|holds|makes|owns|sees)\w+ )?(?:{PLURALS})\b")
"""What a message says that puts any number before a plural: 1 heads, 1 new tokens."""


def load(path: Path) -> dict:
    """The notebook as JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def cells(notebook: dict, kind: str) -> list[dict]:
    """The cells of one kind."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def source(cell: dict) -> str:
    """A cell's source as one string."""
    return "".join(cell["source"])


def texts(notebook: dict) -> Iterator[str]:
    """Every string that a reader may see: sources and outputs, but no encoded pictures."""
    for cell in notebook["cells"]:
        yield source(cell)
        for output in cell.get("outputs", []):
            yield "".join(output.get("text", ""))
            data = output.get("data", {})
            yield from ("".join(v) for k, v in data.items() if k.startswith("text/"))


def prose(notebook: dict) -> str:
    """The text of the Markdown cells, without code blocks."""
    text = "\n\n".join(source(cell) for cell in cells(notebook, "markdown"))
    return re.sub(r"^(`{3,}).*?^\1", "", text, flags=re.DOTALL | re.MULTILINE)


def run_in_order(notebook: dict) -> Iterator[str]:
    """Every code cell was run, from the first to the last: nbval compares only cells that were."""
    counts = [cell["execution_count"] for cell in cells(notebook, "code") if source(cell).strip()]
    if counts != list(range(1, len(counts) + 1)):
        yield f"its cells were not run in order ({counts}): make notebooks NB=..."


def no_error(notebook: dict) -> Iterator[str]:
    """No cell ends in an error, and none writes to stderr."""
    for cell in cells(notebook, "code"):
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                yield f"{output['ename']} in\n{source(cell)}"
            if output.get("name") == "stderr":
                yield f"stderr from\n{source(cell)}"


def no_absolute_path(notebook: dict) -> Iterator[str]:
    """Neither a source nor an output names a place on the author's machine."""
    for text in texts(notebook):
        for found in re.findall(r"(?<![\w.:/])/(?:home|root|work|tmp|Users|usr|opt|mnt)/\S*", text):
            yield f"an absolute path: {found}"


def pictures_have_words(notebook: dict) -> Iterator[str]:
    """Every picture has alternative text."""
    for cell in cells(notebook, "code"):
        pictures = [o for o in cell["outputs"] if any(k.startswith("image/") for k in o.get("data", {}))]
        if pictures and len(cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "")) < 20:
            yield f"a picture needs mystnb.image.alt in the metadata of\n{source(cell)}"


def figures_have_a_caption(notebook: dict) -> Iterator[str]:
    """A figure in sight has a caption in italics below it. One that answers a prediction is explained by the answer."""
    after = notebook["cells"]
    for place, cell in enumerate(after):
        folded = {"hide-output", "hide-cell", "solution"} & set(cell["metadata"].get("tags", []))
        kinds = " ".join(kind for output in cell.get("outputs", []) for kind in output.get("data", {}))
        if folded or not re.search(r"image/|widget-view", kinds):
            continue
        below = next((source(one) for one in after[place + 1 :] if one["cell_type"] == "markdown"), "")
        if not re.search(r"^\*(?!\*)\S", below, flags=re.MULTILINE):
            yield f"no caption (*in italics*) stands below the figure of\n{source(cell)}"


def captions_follow_their_figure(notebook: dict) -> Iterator[str]:
    """What a cell prints stands before its figure, and not between the figure and its caption."""
    for cell in cells(notebook, "code"):
        for above, below in pairwise(cell["outputs"]):
            if below["output_type"] == "stream" and re.search(r"image/|widget-view", " ".join(above.get("data", {}))):
                yield f"print before you draw:\n{source(cell)}"


def drawings_have_a_picture(notebook: dict) -> Iterator[str]:
    """Beside every SVG stands a PNG: JupyterLab draws no SVG of a notebook that is not trusted yet."""
    for cell in cells(notebook, "code"):
        kinds = [set(output.get("data", {})) for output in cell["outputs"]]
        if any("image/svg+xml" in kind and "image/png" not in kind for kind in kinds):
            yield f"an SVG without a PNG (make notebooks NB=...):\n{source(cell)}"


def solutions_are_folded(notebook: dict) -> Iterator[str]:
    """A solution, and whatever the page hides, is folded in JupyterLab and VS Code too."""
    for cell in cells(notebook, "code"):
        tags, folds = set(cell["metadata"].get("tags", [])), cell["metadata"].get("jupyter", {})
        if {"solution", "hide-cell"} & tags and not (folds.get("source_hidden") and folds.get("outputs_hidden")):
            yield f"source_hidden and outputs_hidden are missing in the metadata of\n{source(cell)}"
        if "hide-output" in tags and not folds.get("outputs_hidden"):
            yield f"outputs_hidden is missing in the metadata of\n{source(cell)}"


def predictions_stay_open(notebook: dict) -> Iterator[str]:
    """Between a prediction and its answer every output is folded."""
    asked = False
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            question, answer = (source(cell).rfind(mark) for mark in (":class: predict", "{admonition} Answer"))
            asked = question > answer if question != answer else asked
        elif asked and cell.get("outputs") and not {"hide-output", "hide-cell"} & set(cell["metadata"].get("tags", [])):
            yield f"an output that answers a prediction is in sight below\n{source(cell)}"


def no_markdown_table_in_outputs(notebook: dict) -> Iterator[str]:
    """No output is a table in Markdown, which the book would show as one line with bars; ``show_table`` makes HTML."""
    for cell in cells(notebook, "code"):
        for output in cell["outputs"]:
            text = "".join(output.get("data", {}).get("text/markdown", ""))
            if re.search(r"^\|[-: |]*-{3}[-: |]*\|\s*$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE):
                yield f"a Markdown table in the output of\n{source(cell)}"


def streams_are_whole(notebook: dict) -> Iterator[str]:
    """What a cell prints is one output, wherever it was flushed: else JupyterLab shows it in pieces."""
    for cell in cells(notebook, "code"):
        if any(a["output_type"] == b["output_type"] == "stream" for a, b in pairwise(cell["outputs"])):
            yield f"its printed output is in pieces (make notebooks NB=...):\n{source(cell)}"


def listings_have_what_is_explained(notebook: dict) -> Iterator[str]:
    """An item below a listing that begins with a name in code explains something that the listing shows."""
    shown = ""
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            outputs = ["".join(o.get("data", {}).get("text/markdown", "")) for o in cell["outputs"]]
            shown += "\n".join([source(cell), *outputs]) if re.search(r"\bshow_(source|kernel)\(", source(cell)) else ""
        elif shown:
            items = source(cell).partition("\n\n")[0]
            for item in re.findall(r"^- `([^`]+)`", items, flags=re.MULTILINE):
                if missing := [name for name in re.findall(r"[A-Za-z_]\w*", item) if name not in shown]:
                    yield f"the listing above does not show {', '.join(missing)}, which this explains: {item}"
            shown = ""


def figures_keep_their_state(notebook: dict) -> Iterator[str]:
    """Every interactive figure can be drawn without a kernel: JupyterLab's own save leaves out what that takes."""
    kept = notebook["metadata"].get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {}).get("state", {})
    for cell in cells(notebook, "code"):
        views = [o.get("data", {}).get("application/vnd.jupyter.widget-view+json") for o in cell["outputs"]]
        if any(view and view["model_id"] not in kept for view in views):
            yield f"no state of its interactive figure is saved (make notebooks NB=...):\n{source(cell)}"


def kernel_is_python3(notebook: dict) -> Iterator[str]:
    """The kernel's name is one that every machine has."""
    name = notebook["metadata"].get("kernelspec", {}).get("name")
    if name != "python3":
        yield f"its kernel is {name!r}, expected 'python3'"


def headings_step_down(notebook: dict) -> Iterator[str]:
    """One title, and no level of heading left out."""
    levels = [len(mark) for mark in re.findall(r"^(#{1,6}) ", prose(notebook), flags=re.MULTILINE)]
    if levels[:1] != [1] or levels.count(1) != 1:
        yield f"a chapter begins with its one title; its headings have the levels {levels}"
    if any(after > before + 1 for before, after in pairwise(levels)):
        yield f"a level of heading is skipped: {levels}"


def uncompared(notebook: dict) -> list[dict]:
    """The cells that ask not to be run or not to be compared."""
    tags = {"nbval-ignore-output", "nbval-skip", "nbval-raises-exception"}
    comments = re.compile(r"^\s*#\s*(?:NBVAL_\w+|PYTEST_VALIDATE\w+)", re.MULTILINE)
    return [
        cell
        for cell in cells(notebook, "code")
        if tags & set(cell["metadata"].get("tags", [])) or comments.search(source(cell))
    ]


RULES = (
    run_in_order,
    no_error,
    no_absolute_path,
    pictures_have_words,
    figures_have_a_caption,
    captions_follow_their_figure,
    drawings_have_a_picture,
    solutions_are_folded,
    predictions_stay_open,
    no_markdown_table_in_outputs,
    streams_are_whole,
    listings_have_what_is_explained,
    figures_keep_their_state,
    kernel_is_python3,
    headings_step_down,
)


def complaints(path: Path) -> list[str]:
    """Everything that is wrong with one notebook."""
    notebook = load(path)
    found = [complaint for rule in RULES for complaint in rule(notebook)]
    if len(uncompared(notebook)) > UNCOMPARED.get(path.stem, 0):
        found.append(f"{len(uncompared(notebook))} cells are tagged so that their output is not compared")
    if path.stat().st_size > LIGHT:
        found.append(f"it weighs {path.stat().st_size / 1e6:.1f} MB; the most is {LIGHT / 1e6:.0f} MB")
    return found


def main() -> int:
    """Print what is wrong with the notebooks that the command line names."""
    found = [f"{path}: {complaint}" for path in map(Path, sys.argv[1:]) for complaint in complaints(path)]
    print("\n".join(found))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
