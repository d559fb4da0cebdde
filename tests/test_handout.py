"""What a learner opens reads well where nothing knows the book: no role of MyST is left that needs other files."""

import re
from pathlib import Path

import nbformat
import pytest

from tools import handout
from tools.chapters import load

ROOT = Path(__file__).resolve().parents[1]
NAMES = [chapter.name for chapter in load(ROOT).chapters if chapter.ready]
REFERENCES = """
@article{one2020, author = {One, Ada}, title = {A}, year = {2020}, doi = {10.1/x}}
@misc{two2021, author = {de la Two, Bo and {Big Lab}}, title = {B}, year = {2021}, eprint = {2101.1}}
@misc{three2022, author = {A, B and C, D and E, F}, title = {C}, year = {2022}}
@misc{four2023, author = {{A Team}}, title = {D}, year = {2023}, howpublished = {\\url{https://four.example}}}
"""


def chapter(folder: Path, *cells) -> nbformat.NotebookNode:
    """A chapter of these cells, handed out."""
    (folder / "notebooks").mkdir()
    (folder / "book").mkdir()
    (folder / "book" / "references.bib").write_text(REFERENCES)
    nbformat.write(nbformat.v4.new_notebook(cells=list(cells)), folder / "notebooks" / "02-attention.ipynb")
    return handout.handed_out(folder, "02-attention")


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("{cite}`one2020`.", "([One, 2020](https://doi.org/10.1/x))."),
        ("{cite:t}`two2021` say", "[de la Two and Big Lab (2021)](https://arxiv.org/abs/2101.1) say"),
        ("{cite}`three2022,four2023`", "(A et al., 2022; [A Team, 2023](https://four.example))"),
        ("By {eq}`eq-here`: $$ x $$", "By {eq}`eq-here`: $$ x $$"),
        ("By {eq}`eq-there` of [3. Masks](03-masks.ipynb)", "By an equation of [3. Masks](03-masks.ipynb)"),
        ("[The results](../results.md) and [4. P](04-p.ipynb)", "The results and [4. P](04-p.ipynb)"),
    ],
)
def test_a_reference_becomes_words(tmp_path, written, read):
    given = nbformat.v4.new_markdown_cell(written), nbformat.v4.new_markdown_cell("$$\nx\n$$ (eq-here)")
    assert chapter(tmp_path, *given).cells[0].source == read


def test_a_work_that_the_list_lacks_is_an_error(tmp_path):
    with pytest.raises(KeyError, match="nobody1900"):
        chapter(tmp_path, nbformat.v4.new_markdown_cell("{cite}`nobody1900`"))


def test_the_answer_to_a_prediction_waits_for_its_cell_to_run(tmp_path):
    given = [
        nbformat.v4.new_code_cell(
            source,
            outputs=[nbformat.v4.new_output("stream", text="seen")],
            execution_count=1,
            metadata={"tags": tags, "jupyter": {"outputs_hidden": bool(tags)}},
        )
        for source, tags in (
            ("print(42)", ["hide-output"]),
            ("teaching.show_source(attend)", ["hide-output"]),
            ("print(1)", []),
        )
    ]
    cells = chapter(tmp_path, *given).cells
    assert [len(cell.outputs) for cell in cells] == [0, 1, 1]
    assert [bool(cell.metadata.jupyter.get("outputs_hidden")) for cell in cells] == [False, True, False]
    assert cells[0].execution_count is None, "a count beside no output looks like a cell that printed nothing"


@pytest.mark.parametrize("name", NAMES)
def test_no_reference_is_left_that_needs_another_file(name):
    notebook = handout.handed_out(ROOT, name)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert re.findall(r"\{cite[^`]*`[^`]*`", text) == []
    assert set(handout.EQUATION.findall(text)) <= handout.labels(notebook)
    assert re.findall(r"\]\(\.\./[^)]*\)", text) == []


@pytest.mark.parametrize("name", NAMES)
def test_an_equation_of_another_chapter_is_named_with_its_chapter(name):
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    own = handout.labels(notebook)
    for cell in (cell for cell in notebook.cells if cell.cell_type == "markdown"):
        for found in handout.EQUATION.finditer(cell.source):
            where = re.match(r" of \[\d+\. ", cell.source[found.end() :])
            assert found.group(1) in own or where, cell.source[found.start() - 40 : found.end() + 40]
