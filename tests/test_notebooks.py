"""What every notebook keeps, beside the outputs that ``pytest --nbval`` compares; the rules: ``notebook_rules.py``."""

import ast
import copy
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import notebook_rules as rules
import pytest
from notebook_rules import cells, load, source, texts
from pictures import same_picture

from tformer_lib.teaching import display, kernels
from tformer_lib.teaching.exercises.engine import all_exercises
from tools import chapters

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def notebook(request) -> Path:
    """Each notebook in turn."""
    return request.param


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
def test_notebook_keeps_the_rule(notebook, rule):
    assert list(rule(load(notebook))) == []


def test_title_is_the_number_and_the_title_of_the_list(notebook):
    chapter = chapters.load().named(notebook.stem)
    title = source(cells(load(notebook), "markdown")[0]).partition("\n")[0]
    assert title == f"# {chapter.number}. {chapter.title}"


def test_cells_that_are_not_compared_are_counted(notebook):
    assert len(rules.uncompared(load(notebook))) <= rules.UNCOMPARED.get(notebook.stem, 0)


def test_notebook_is_light(notebook):
    assert notebook.stat().st_size <= rules.LIGHT


def test_no_difference_is_printed_as_zeros_alone(notebook):
    """A number that four digits or more show as zeros is told as a bound: ``teaching.under``."""
    said = [line for text in printed(load(notebook)) for line in text.splitlines()]
    zeros = [line for line in said if re.search(r"(?<![\d.])0\.0{4,}(?![\d.])", line)]
    assert zeros == []


def test_one_of_a_kind_is_not_printed_in_the_plural(notebook):
    said = [line for text in printed(load(notebook)) for line in text.splitlines()]
    wrong = [line for line in said if rules.ONE_OF_MANY.search(line)]
    assert wrong == []


def test_no_column_has_a_space_before_its_colon(notebook):
    said = [line for text in printed(load(notebook)) for line in text.splitlines()]
    wrong = [line for line in said if re.match(r"[\w ,'%-]*\w +:(\s|$)", line)]
    assert wrong == []


def printed(notebook: dict) -> Iterator[str]:
    """What the cells print, their tables among it."""
    for cell in cells(notebook, "code"):
        for output in cell["outputs"]:
            yield "".join(output.get("text", ""))
            yield "".join(output.get("data", {}).get("text/plain", ""))


def test_three_exercises_each_with_a_check(notebook):
    text = "\n".join(source(cell) for cell in cells(load(notebook), "markdown"))
    code = "\n".join(source(cell) for cell in cells(load(notebook), "code"))
    asked = re.findall(r"^[:`]{3,}\{exercise(?:-start)?\}", text, flags=re.MULTILINE)
    checked = set(re.findall(r"exercises\.check\(\s*[\"']([\w.]+)[\"']", code))
    assert len(asked) >= 3, f"{len(asked)} exercises"
    assert len(checked) >= 3, f"checks: {sorted(checked)}"


def test_learner_is_told_what_fails_and_the_solution_passes(notebook):
    said = [line for text in texts(load(notebook)) for line in text.splitlines()]
    code = "\n".join(source(cell) for cell in cells(load(notebook), "code"))
    for name in set(re.findall(r"exercises\.check\(\s*[\"']([\w.]+)[\"']", code)):
        outputs = outputs_of_check(notebook, name)
        assert any(o.startswith("passed: ") for o in outputs), f"no solution on the page passes {name}: {outputs}"
    assert any(line.startswith("not yet: ") for line in said), "the learner's cells start with an honest stub"


def test_an_exercise_and_its_check_share_a_title(notebook):
    titles = {exercise.name: exercise.title for exercise in all_exercises()}
    title, found = None, {}
    for cell in load(notebook)["cells"]:
        heads = re.findall(r"^[:`]{3,}\{exercise(?:-start)?\} *(.*)", source(cell), flags=re.MULTILINE)
        title = heads[-1] if heads else title
        for name in re.findall(r"exercises\.check\(\s*[\"']([\w.]+)[\"']", source(cell)):
            found.setdefault(name, title)
    assert found
    assert {name: titles[name] for name in found} == found


def outputs_of_check(path: Path, name: str) -> list[str]:
    """The lines that cells calling this check printed."""
    called = re.compile(rf"check\(\s*[\"']{re.escape(name)}[\"']")
    calls = [cell for cell in cells(load(path), "code") if called.search(source(cell))]
    return [line for c in calls for o in c["outputs"] for line in "".join(o.get("text", "")).splitlines()]


def test_interactive_figures_are_the_library_s(notebook):
    states = load(notebook)["metadata"].get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {})
    figures = [s["state"] for s in states.get("state", {}).values() if "_anywidget_id" in s["state"]]
    for figure in figures:
        module, _, name = figure["_anywidget_id"].rpartition(".")
        drawn = getattr(importlib.import_module(module), name)
        told = f"{name} has changed since: make notebooks NB=notebooks/{notebook.name}"
        assert figure["_esm"] == drawn._esm, told
        assert figure["_css"] == drawn._css, told


def stale_listings(notebook: dict, monkeypatch) -> list[str]:
    """The calls whose listing on the page is not what the library's source says today."""
    names, now, stale = {}, [], []
    for module in (display, kernels):
        monkeypatch.setattr(module, "show_markdown", now.append)
    for cell in cells(notebook, "code"):
        page = ["".join(o["data"]["text/markdown"]) for o in cell["outputs"] if "text/markdown" in o.get("data", {})]
        for statement in ast.parse(source(cell)).body:
            text = ast.unparse(statement)
            if isinstance(statement, ast.Import | ast.ImportFrom):
                exec(text, names)
            elif re.match(r"(teaching\.)?show_(source|kernel)\(", text):
                now.clear()
                try:
                    exec(text, names)
                except NameError:
                    continue  # it shows what a cell before has defined
                if not set(now) <= set(page):
                    stale.append(text)
    return stale


def test_listings_are_the_library_s(notebook, monkeypatch):
    """What nbval finds in half an hour is found here in seconds, whenever a function that is shown has changed."""
    assert stale_listings(load(notebook), monkeypatch) == [], f"make notebooks NB=notebooks/{notebook.name}"


def test_a_stale_listing_is_found(monkeypatch):
    shown = {"output_type": "display_data", "data": {"text/markdown": ["From `tformer_lib/masks.py`:", "as it was"]}}
    cell = code("from tformer_lib import masks, teaching\nteaching.show_source(masks.causal)", shown)
    assert stale_listings({"cells": [cell]}, monkeypatch) == ["teaching.show_source(masks.causal)"]


# The rules themselves: each finds the fault that it is there for.


def markdown(text: str) -> dict:
    """A Markdown cell."""
    return {"cell_type": "markdown", "metadata": {}, "source": [text]}


def code(text: str, *outputs: dict, count: int | None = 1, **metadata) -> dict:
    """A code cell that was run."""
    return {
        "cell_type": "code",
        "metadata": metadata,
        "source": [text],
        "outputs": [*outputs],
        "execution_count": count,
    }


LISTING = {"output_type": "display_data", "data": {"text/markdown": ["```python\n", "norm = clip(model)\n", "```"]}}

SOUND = {
    "cells": [
        markdown("# Title\n\n## Part"),
        code("1 + 1", {"output_type": "stream", "name": "stdout", "text": ["2"]}),
        code("show_source(step)", LISTING, count=2),
    ],
    "metadata": {"kernelspec": {"name": "python3"}},
}

FIGURE = {"output_type": "display_data", "data": {"application/vnd.jupyter.widget-view+json": {"model_id": "7f"}}}
PICTURE = {"output_type": "display_data", "data": {"image/png": "iVBORw0KGgo="}}

DRAWN = {"output_type": "display_data", "data": {"image/svg+xml": "<svg/>"}}

PRINTED = {"output_type": "stream", "name": "stdout", "text": ["1\n"]}
TABLE = {"output_type": "display_data", "data": {"text/markdown": ["| a | b |\n", "|---|---|\n", "| 1 | 2 |"]}}

FAULTY = {
    "run_in_order": [code("2", count=None), code("2", count=5)],
    "no_error": [
        code("1 / 0", {"output_type": "error", "ename": "ZeroDivisionError"}, count=3),
        code("warn()", {"output_type": "stream", "name": "stderr", "text": ["careful"]}, count=3),
    ],
    "no_absolute_path": [
        markdown("see /home/me/notes"),
        code("open(path)", {"output_type": "stream", "name": "stdout", "text": ["in /tmp/x/y.py"]}, count=3),
    ],
    "pictures_have_words": [code("draw()", PICTURE, count=3)],
    "figures_have_a_caption": [code("draw()", PICTURE, count=3), code("explore()", FIGURE, count=3)],
    "captions_follow_their_figure": [code("draw(), print(1)", PICTURE, PRINTED, count=3)],
    "drawings_have_a_picture": [code("draw()", DRAWN, count=3)],
    "solutions_are_folded": [
        {
            **code("answer()", count=3),
            "metadata": {"tags": ["hide-cell", "solution"], "jupyter": {"outputs_hidden": True}},
        },
        {**code("answer()", count=3), "metadata": {"tags": ["hide-output"]}},
    ],
    "predictions_stay_open": [[markdown(":::{admonition} Predict\n:class: predict\n:::"), code("1", PRINTED, count=3)]],
    "no_markdown_table_in_outputs": [code("rows()", TABLE, count=3)],
    "listings_have_what_is_explained": [markdown("- `clip` shortens.\n- `optimizer.step` moves.\n\nAnd so on.")],
    "streams_are_whole": [code("print(1), print(2)", PRINTED, PRINTED, count=3)],
    "figures_keep_their_state": [code("explore()", FIGURE, count=3)],
    "headings_step_down": [markdown("# A second title"), markdown("#### Too deep")],
}


@pytest.mark.parametrize("name", [rule.__name__ for rule in rules.RULES])
def test_rule_finds_its_fault(name):
    rule = getattr(rules, name)
    assert list(rule(SOUND)) == []
    faults = [fault if isinstance(fault, list) else [fault] for fault in FAULTY.get(name, [])]
    faulty = [{**SOUND, "cells": [*SOUND["cells"], *fault]} for fault in faults]
    if name == "kernel_is_python3":
        faulty = [{**SOUND, "metadata": {"kernelspec": {"name": "my-env"}}}]
    assert faulty
    for one in faulty:
        assert list(rule(copy.deepcopy(one))), one["cells"][-1]


DRAWING = '<svg><defs><path id="p1f" d="M 1 2.5 \nL 3.25 4"/></defs><use href="#p1f" x="7" fill="#1b1f24"/></svg>'


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        (("3.25", "3.249999"), True),
        (("p1f", "p2a"), True),  # a name is a hash of coordinates
        (("3.25", "3.5"), False),
        (("3.25 4", "3.25"), False),
        (("L", "Q"), False),
        (("#1b1f24", "#1b1f25"), False),
        (('href="#p1f"', 'href="#p1e"'), False),
    ],
)
def test_a_drawing_is_compared_as_a_picture(change, is_same):
    assert same_picture(DRAWING, DRAWING.replace(*change)) == is_same


def test_a_reference_to_a_chapter_has_its_number_and_title(notebook):
    titles = {f"{chapter.name}.ipynb": f"{chapter.number}. {chapter.title}" for chapter in chapters.load(ROOT).chapters}
    told = []
    for text in (source(cell) for cell in cells(load(notebook), "markdown")):
        for words, name in re.findall(r"\[([^\]]*)\]\(([0-9]{2}-[\w-]+\.ipynb)(?:#[^)]*)?\)", text):
            told += [(words, titles[name])] * (words != titles[name])
    assert told == [], "links and the titles of the chapters that they lead to"
