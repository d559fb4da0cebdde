"""Every symbol of the chapters' formulas stands on the notation page, and the sizes have one meaning everywhere."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "book" / "notation.md").read_text(encoding="utf-8")
CHAPTERS = sorted((ROOT / "notebooks").glob("[0-9][0-9]-*.ipynb"))
ONE_MEANING = ("B", "D", "F", "G", "H", "H_{kv}", "L", "S", "T", "b", "d", "w")
"""Each stands in one row of the page, beside the letters that others have fixed."""

GREEK = re.findall(
    r"\w+",
    """
alpha beta gamma delta epsilon varepsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau phi varphi chi psi
omega ell Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega
""",
)
WORDS = re.compile(r"\\(?:text|operatorname|mathrm|textbf|begin|end|label|tag)\*?\{[^{}]*\}")
SYMBOL = re.compile(r"\\(mathbf|mathcal|mathbb)\s*\{?\s*([A-Za-z])\}?|\\([A-Za-z]+)|([A-Za-z])")


def formulas(text: str) -> list[str]:
    """The formulas of a piece of Markdown, in lines and on lines of their own."""
    text = re.sub(r"^(`{3,}).*?^\1", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`\n]+`", "", text).replace(r"\$", "")
    shown = re.findall(r"\$\$(.+?)\$\$", text, flags=re.DOTALL)
    return shown + re.findall(r"\$([^$]+)\$", re.sub(r"\$\$.+?\$\$", " ", text, flags=re.DOTALL))


def symbols(formula: str) -> Iterator[str]:
    r"""The letters of a formula: ``W`` and ``q`` of ``W_q``, ``\mathbf{S}``, ``\theta``; words in it are no symbols."""
    for style, styled, command, letter in SYMBOL.findall(WORDS.sub(" ", formula)):
        if styled:
            yield f"\\{style}{{{styled}}}"
        elif letter or command in GREEK:
            yield letter or f"\\{command}"


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading of the page, without its head."""
    text = re.split(r"^#+ ", PAGE.split(f"# {heading}\n")[1], flags=re.MULTILINE)[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def known(chapter: int) -> set[str]:
    """The symbols that the page explains for a chapter."""
    everywhere = [cells[0] for heading in ("Sizes", "Tensors") for cells in rows(heading)]
    letters = rows("Letters and their chapters") + rows("Letters that others have fixed")
    here = [cells[0] for cells in letters if cells[2] == "all" or str(chapter) in re.findall(r"\d+", cells[2])]
    return {symbol for cell in everywhere + here for formula in formulas(cell) for symbol in symbols(formula)}


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_the_page_has_every_symbol_of_a_chapter(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    found = {symbol: formula for text in texts for formula in formulas(text) for symbol in symbols(formula)}
    missing = {symbol: found[symbol] for symbol in sorted(found.keys() - known(int(path.stem[:2])))}
    assert missing == {}, (
        "symbols that book/notation.md does not list for this chapter, each with a formula that has it"
    )


def test_the_sizes_have_one_meaning():
    tables = ("Sizes", "Tensors", "Letters and their chapters")
    listed = [name for table in tables for cells in rows(table) for name in re.findall(r"\$([^$]+)\$", cells[0])]
    counts = Counter(listed)
    assert {name: counts[name] for name in ONE_MEANING} == dict.fromkeys(ONE_MEANING, 1)


def test_the_page_lists_no_letter_that_its_chapters_lack():
    used = {}
    for path in CHAPTERS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
        used[int(path.stem[:2])] = {s for text in texts for formula in formulas(text) for s in symbols(formula)}
    idle = []
    for cells in rows("Letters and their chapters"):
        first = next((s for formula in formulas(cells[0]) for s in symbols(formula)), None)
        idle += [(cells[0], n) for n in map(int, re.findall(r"\d+", cells[2])) if first and first not in used[n]]
    assert idle == []


def test_a_symbol_that_is_missing_is_found():
    assert sorted(set(symbols(r"\mathbf{S} = Q_i K_j^\top / \sqrt d + \theta_\text{old}"))) == [
        "K", "Q", r"\mathbf{S}", r"\theta", "d", "i", "j",
    ]  # fmt: skip
    assert formulas("a `$x$`, $q$ and\n\n$$\nz\n$$ (eq-z)") == ["\nz\n", "q"]
    assert r"\kappa" not in known(2)
