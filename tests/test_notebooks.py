"""What every notebook keeps, beside the outputs that ``pytest --nbval`` compares."""

import importlib
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "notebooks").glob("*.ipynb"))

UNCOMPARED: dict[str, int] = {"06-training": 1}
"""Notebook -> how many of its cells may be tagged so that their output is not compared (or that they are not run)."""

LIGHT = 2_000_000
"""Bytes: the most that a notebook may weigh."""


def load(path: Path) -> dict:
    """The notebook as JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def cells(path: Path, kind: str) -> list[dict]:
    """The cells of one kind."""
    return [cell for cell in load(path)["cells"] if cell["cell_type"] == kind]


def source(cell: dict) -> str:
    """A cell's source as one string."""
    return "".join(cell["source"])


def prose(path: Path) -> str:
    """The text of the Markdown cells, without code blocks."""
    text = "\n\n".join(source(cell) for cell in cells(path, "markdown"))
    return re.sub(r"^(`{3,}).*?^\1", "", text, flags=re.DOTALL | re.MULTILINE)


def texts(path: Path):
    """Every string of the notebook that a reader may see: sources and outputs, but no encoded pictures."""
    for cell in load(path)["cells"]:
        yield source(cell)
        for output in cell.get("outputs", []):
            yield "".join(output.get("text", ""))
            data = output.get("data", {})
            yield from ("".join(v) for k, v in data.items() if k.startswith("text/"))


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def notebook(request) -> Path:
    """Each notebook in turn."""
    return request.param


def test_every_code_cell_was_run_in_order(notebook):
    counts = [cell["execution_count"] for cell in cells(notebook, "code") if source(cell).strip()]
    assert counts == list(range(1, len(counts) + 1)), f"run it again: make notebooks NB=notebooks/{notebook.name}"


def test_no_cell_ends_in_an_error(notebook):
    for cell in cells(notebook, "code"):
        errors = [o["ename"] for o in cell["outputs"] if o["output_type"] == "error"]
        assert not errors, f"{errors} in\n{source(cell)}"


def test_nothing_is_written_to_stderr(notebook):
    for cell in cells(notebook, "code"):
        assert not [o for o in cell["outputs"] if o.get("name") == "stderr"], f"stderr from\n{source(cell)}"


def test_no_absolute_path(notebook):
    for text in texts(notebook):
        found = re.search(r"(?<![\w.:/])/(?:home|root|work|tmp|Users|usr|opt|mnt)/\S*", text)
        assert not found, f"an absolute path: {found[0]}"


def test_every_picture_has_alternative_text(notebook):
    for cell in cells(notebook, "code"):
        pictures = [o for o in cell["outputs"] if any(k.startswith("image/") for k in o.get("data", {}))]
        if pictures:
            alt = cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "")
            assert len(alt) >= 20, f"a picture needs mystnb.image.alt in the metadata of\n{source(cell)}"


def test_cells_that_are_not_compared_are_counted(notebook):
    tags = {"nbval-ignore-output", "nbval-skip", "nbval-raises-exception"}
    comments = re.compile(r"^\s*#\s*(?:NBVAL_\w+|PYTEST_VALIDATE\w+)", re.MULTILINE)
    ignored = [
        cell
        for cell in cells(notebook, "code")
        if tags & set(cell["metadata"].get("tags", [])) or comments.search(source(cell))
    ]
    assert len(ignored) <= UNCOMPARED.get(notebook.stem, 0)


def test_kernel_is_python3(notebook):
    assert load(notebook)["metadata"]["kernelspec"]["name"] == "python3"


def test_headings_step_down_by_one(notebook):
    levels = [len(mark) for mark in re.findall(r"^(#{1,6}) ", prose(notebook), flags=re.MULTILINE)]
    assert levels[0] == 1
    assert levels.count(1) == 1, "a chapter has one title"
    assert all(after <= before + 1 for before, after in pairwise(levels)), f"a level of heading is skipped: {levels}"


def test_three_exercises_each_with_a_check(notebook):
    text = "\n".join(source(cell) for cell in cells(notebook, "markdown"))
    code = "\n".join(source(cell) for cell in cells(notebook, "code"))
    asked = re.findall(r"^[:`]{3,}\{exercise(?:-start)?\}", text, flags=re.MULTILINE)
    checked = set(re.findall(r"exercises\.check\(\s*[\"']([\w.]+)[\"']", code))
    assert len(asked) >= 3, f"{len(asked)} exercises"
    assert len(checked) >= 3, f"checks: {sorted(checked)}"


def test_learner_is_told_what_fails_and_the_solution_passes(notebook):
    said = [line for text in texts(notebook) for line in text.splitlines()]
    code = "\n".join(source(cell) for cell in cells(notebook, "code"))
    for name in set(re.findall(r"exercises\.check\(\s*[\"']([\w.]+)[\"']", code)):
        outputs = outputs_of_check(notebook, name)
        assert any(o.startswith("passed: ") for o in outputs), f"no solution on the page passes {name}: {outputs}"
    assert any(line.startswith("not yet: ") for line in said), "the learner's cells start with an honest stub"


def outputs_of_check(path: Path, name: str) -> list[str]:
    """The lines that cells calling this check printed."""
    calls = [c for c in cells(path, "code") if re.search(rf"check\(\s*[\"']{re.escape(name)}[\"']", source(c))]
    return [line for c in calls for o in c["outputs"] for line in "".join(o.get("text", "")).splitlines()]


def test_notebook_is_light(notebook):
    assert notebook.stat().st_size <= LIGHT


def test_interactive_figures_are_the_library_s(notebook):
    states = load(notebook)["metadata"].get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {})
    figures = [s["state"] for s in states.get("state", {}).values() if "_anywidget_id" in s["state"]]
    for figure in figures:
        module, _, name = figure["_anywidget_id"].rpartition(".")
        drawn = getattr(importlib.import_module(module), name)
        told = f"{name} has changed since: make notebooks NB=notebooks/{notebook.name}"
        assert figure["_esm"] == drawn._esm, told
        assert figure["_css"] == drawn._css, told
