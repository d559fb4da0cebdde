"""The figures' style: what every plot shares draws what it says."""

import ast
import importlib
import inspect
import io
import json
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from itertools import combinations, pairwise
from pathlib import Path

import contrast
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.text import Text
from notebook_rules import load

from tformer_lib.teaching import style
from tformer_lib.teaching.plots import flash_kernels, tokens, transformer

LEAST = 9.5
"""Points: what a figure of ``style.NARROW`` shows 10 pixels high on a phone."""

DRAWERS = [Path(style.__file__), *sorted((Path(style.__file__).parent / "plots").glob("*.py"))]


@pytest.mark.parametrize("file", DRAWERS, ids=lambda file: file.stem)
def test_no_label_is_written_smaller_than_a_phone_shows(file):
    package = "tformer_lib.teaching" + (".plots" if file.parent.name == "plots" else "")
    module = importlib.import_module(package if file.stem == "__init__" else f"{package}.{file.stem}")
    small = [
        f"line {place.value.lineno}: {place.arg}={size}"
        for place in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(place, ast.keyword) and place.arg in ("fontsize", "labelsize", "title_fontsize")
        if isinstance(size := size_of(place.value, module), int | float) and size < LEAST
    ]
    assert small == []
    assert all(value >= LEAST for name, value in style.PARAMETERS.items() if name.endswith(("fontsize", "labelsize")))


def size_of(value: ast.expr, module):
    """The number that stands in the source, or that a name of the module means."""
    return getattr(module, value.id, None) if isinstance(value, ast.Name) else getattr(value, "value", None)


@pytest.mark.parametrize("log_y", [False, True])
def test_an_axis_in_powers_of_two_has_the_ticks_that_are_asked_for(log_y):
    fig, ax = plt.subplots()
    ax.plot([256, 512, 1024, 2048], [1.0, 2.0, 4.0, 8.0])
    style.log2_axis(ax, (256, 1024), log_y=log_y)
    assert ax.get_xscale() == "log"
    assert ax.xaxis.get_transform().base == 2
    assert ax.get_yscale() == ("log" if log_y else "linear")
    assert list(ax.get_xticks()) == [256, 1024]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["256", "1,024"]
    assert len(ax.yaxis.get_minorticklocs()) == 0
    style.log2_axis(ax, [512], ["half"], log_y=log_y)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["half"]
    plt.close(fig)


# --- legends

SVG = "{http://www.w3.org/2000/svg}"
NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in points."""


def drawings(notebook: dict) -> Iterator[str]:
    """The SVG figures of a notebook."""
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            if "image/svg+xml" in output.get("data", {}):
                yield "".join(output["data"]["image/svg+xml"])


def groups(parent: ET.Element, name: str) -> list[ET.Element]:
    """The groups inside an element that matplotlib has named so and numbered."""
    return [child for child in parent if child.tag == f"{SVG}g" and child.get("id", "").startswith(name)]


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", text)]


def legend_rows(axes: ET.Element) -> Iterator[Box]:
    """Where each row of a legend is drawn, its sample of the line included."""
    for legend in groups(axes, "legend_"):
        for text in groups(legend, "text_"):
            drawn = text.find(f"{SVG}g")
            x, y, size = numbers(drawn.get("transform"))[:3]  # size: points of a hundredth of the font
            last = max((numbers(use.get("transform", "0"))[0] for use in drawn.iter(f"{SVG}use")), default=0.0)
            yield x - 280 * size, y - 95 * size, x + (last + 60) * size, y + 30 * size


def curves(axes: ET.Element) -> Iterator[list[tuple[float, float]]]:
    """The corners of each line that shows data."""
    for line in groups(axes, "line2d_"):
        path = line.find(f"{SVG}path")
        if path is not None and "clip-path" in path.attrib:
            found = numbers(path.get("d"))
            yield list(zip(found[::2], found[1::2], strict=True))


def meets(box: Box, start: tuple[float, float], end: tuple[float, float], steps: int = 200) -> bool:
    """Whether a stroke passes through a box."""
    left, top, right, bottom = box
    shares = (step / steps for step in range(steps + 1))
    places = ((start[0] + t * (end[0] - start[0]), start[1] + t * (end[1] - start[1])) for t in shares)
    return any(left <= x <= right and top <= y <= bottom for x, y in places)


def covered(svg: str) -> int:
    """How many rows of legends lie over a line of their own axes."""
    every = [group for group in ET.fromstring(svg).iter(f"{SVG}g") if group.get("id", "").startswith("axes_")]
    return sum(
        any(meets(row, *stroke) for curve in curves(axes) for stroke in pairwise(curve))
        for axes in every
        for row in legend_rows(axes)
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_legend_lies_over_a_line(path):
    assert [covered(svg) for svg in drawings(load(path)) if covered(svg)] == []


@pytest.mark.parametrize(("place", "rows"), [("upper left", 0), ("lower left", 1)])
def test_a_legend_over_a_line_is_found(place, rows):
    fig, ax = plt.subplots()
    ax.plot([0, 1, 2], [0.05, 0.05, 0.05], label="a low line")
    ax.set(ylim=(0, 1))
    ax.legend(loc=place)
    file = io.BytesIO()
    fig.savefig(file, format="svg")
    plt.close(fig)
    assert covered(file.getvalue().decode()) == rows


@pytest.mark.parametrize("scale", ["linear", "log"])
@pytest.mark.parametrize("marks", [{}, {"linestyle": "", "marker": "o"}], ids=["strokes", "points"])
def test_a_measured_figure_makes_room_for_its_legend(scale, marks):
    fig, ax = plt.subplots(figsize=(style.NARROW, 3.2))
    for height in (1.0, 2.0, 3.0, 4.0):
        ax.plot(range(40), [height] * 40, label=f"a line at {height}", **marks)
    ax.set(yscale=scale, ylim=(0.5, 4.5))
    ax.legend()
    fig.canvas.draw()
    assert style.legend_covers(ax)
    low = ax.get_ylim()[0]
    style.clear_legends(fig)
    fig.canvas.draw()
    assert not style.legend_covers(ax)
    assert ax.get_ylim()[0] == low
    plt.close(fig)


def test_a_measured_figure_with_room_stays_as_it_is():
    fig, ax = plt.subplots()
    ax.plot([0, 1, 2], [0.05, 0.05, 0.05], label="a low line")
    ax.set(ylim=(0, 1))
    ax.legend(loc="upper left")
    style.clear_legends(fig)
    assert ax.get_ylim() == (0, 1)
    plt.close(fig)


def test_a_higher_end_that_does_not_clear_the_legend_is_not_kept():
    fig, ax = plt.subplots()
    for height in range(1, 30):
        ax.plot([0, 2], [0.01 * height] * 2, label="low lines" if height == 1 else None)
    ax.set(ylim=(0, 1))
    ax.legend(loc="lower left")
    fig.canvas.draw()
    assert style.legend_covers(ax)
    style.clear_legends(fig)
    assert ax.get_ylim() == (0, 1)
    plt.close(fig)


def test_a_line_may_cross_the_margin_of_a_legend_without_a_frame():
    fig, ax = plt.subplots()
    ax.plot([0, 1, 2], [0.9, 0.8, 0.7], label="a line")
    ax.axhline(0.03)
    ax.set(ylim=(0, 1))
    legend = ax.legend(loc="lower left", frameon=False)
    fig.canvas.draw()
    bottom = ax.transData.inverted().transform(legend.get_window_extent().min)[1]
    assert bottom < 0.03, "the line is inside the box"
    assert not style.legend_covers(ax)
    plt.close(fig)


# --- no text on another


def meetings(figure, gap: float = -1.0) -> list[tuple[str, str]]:
    """The pairs of texts of a figure that lie on one line with less than ``gap`` pixels between them."""
    figure.draw_without_rendering()
    shown = [
        t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and t.get_window_extent().width
    ]
    boxes = [(t.get_text(), t.get_window_extent()) for t in shown]
    return [
        (one, other)
        for (one, a), (other, b) in combinations(boxes, 2)
        if max(a.x0, b.x0) - min(a.x1, b.x1) < gap and min(a.y1, b.y1) - max(a.y0, b.y0) > 1
    ]


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The figures that were shown, still open."""
    figures = []
    monkeypatch.setattr(style, "show", lambda: figures.extend(plt.figure(i) for i in plt.get_fignums()))
    with warnings.catch_warnings():  # a second registration of our two colour maps
        warnings.simplefilter("ignore", UserWarning)
        style.apply_style()
    yield figures
    plt.close("all")


def test_texts_that_meet_are_found():
    figure, ax = plt.subplots()
    ax.text(0.5, 0.5, "one")
    ax.text(0.51, 0.5, "another")
    ax.text(0.5, 0.1, "far away")
    assert meetings(figure) == [("one", "another")]
    plt.close(figure)


LADDERS = {
    "rungs": ("forward, d 128, 16,384: ", ("step 3a", "step 3d", "step 4c", "FlashAttention-3", "sdpa cudnn")),
    "gradients": ("backward, d 128, 16,384: ", ("backward_3_tensor_core.cu", "backward_4_hopper.cu", "sdpa cudnn")),
    "slow ones": ("forward, float32, d 128, 4,096: ", ("step 1", "step 2", "sdpa efficient")),
}


@pytest.mark.parametrize("ladder", LADDERS)
def test_the_two_labels_of_a_bar_of_a_ladder_do_not_meet(drawn, ladder):
    start, names = LADDERS[ladder]
    record = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "nvidia-h200" / "flash_attention.json"
    rows = {row["name"]: row for row in json.loads(record.read_text(encoding="utf-8"))["rows"]}
    bars = {}
    for name in names:
        row = rows[start + name]
        ends = row["flops"] / row["p90"] / 1e12, row["flops"] / row["p10"] / 1e12
        bars[name] = row["rate"] / 1e12, *ends, row["rate"] / 989e12
    flash_kernels.ladder({"bfloat16, head_dim 128, 16,384 tokens": bars, "the same again": bars})
    assert [meetings(figure, gap=6) for figure in drawn] == [[]]


def test_a_line_does_not_cross_the_label_of_a_bar(drawn):
    flash_kernels.times({"the table": 0.14, "cpu.cpp": 0.022}, limit=1e11, flops=3.9e9)
    (ax,) = drawn[0].axes
    (line,) = ax.lines
    for label in ax.texts:
        assert label.get_zorder() > line.get_zorder()
        assert label.get_bbox_patch().get_facecolor() == (1.0, 1.0, 1.0, 1.0), "the line shows through the label"


def drawers() -> Iterator[tuple[str, Callable]]:
    """Every function of the plots that draws without being given anything."""
    for file in DRAWERS:
        if file.parent.name != "plots" or file.stem == "__init__":
            continue
        module = importlib.import_module(f"tformer_lib.teaching.plots.{file.stem}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            given = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
            if function.__module__ == module.__name__ and not given and "style.show()" in inspect.getsource(function):
                yield f"{file.stem}.{name}", function


@pytest.mark.parametrize(("name", "draw"), drawers())
def test_no_text_of_a_drawing_lies_on_another(drawn, name, draw):
    draw()
    assert drawn
    assert [meetings(figure) for figure in drawn] == [[]]


# --- words that can be read


INKS = {style.INK: "INK", style.MUTED: "MUTED", style.RUST: "RUST", style.BLUE: "BLUE"}
"""The colours in which words are written on white."""


@pytest.mark.parametrize("ink", INKS, ids=INKS.get)
def test_each_ink_can_be_read_on_white_in_both_themes(ink):
    assert contrast.readable(ink, "white") >= contrast.LEAST


def test_ink_can_be_read_on_every_ground_that_is_made_for_words():
    pale = style.PALE(np.linspace(0.0, 1.0, 21))[:, :3]
    grounds = [*pale, style.LIGHT, *tokens.TINTS, *transformer.BOXES.values()]
    assert min(contrast.readable(style.INK, ground) for ground in grounds) >= contrast.LEAST
    assert min(contrast.readable(style.MUTED, ground) for ground in tokens.TINTS) >= contrast.LEAST


@pytest.mark.parametrize("file", DRAWERS, ids=lambda file: file.stem)
def test_words_are_written_in_an_ink(file):
    """A colour that is made for areas, such as GREY, is too weak for words."""
    wrong = [
        f"line {call.lineno}: {name.attr}"
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") in ("text", "annotate", "set_title")
        for given in call.keywords
        if given.arg == "color"
        for name in ast.walk(given.value)
        if isinstance(name, ast.Attribute) and name.attr not in INKS.values()
    ]
    assert wrong == []


def test_contrast_is_what_the_guidelines_compute():
    assert contrast.contrast("black", "white") == pytest.approx(21)
    assert contrast.contrast("#777777", "white") == pytest.approx(4.48, abs=0.005)
    white, black = contrast.turned("white"), contrast.turned("black")
    assert white == pytest.approx([18 / 255] * 3, abs=0.002)
    assert black == pytest.approx([1, 1, 1])


NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_all_words_of_the_saved_drawings_can_be_read_in_both_themes(notebook):
    drawings = ["".join(o.get("data", {}).get("image/svg+xml", "")) for o in outputs(load(notebook))]
    found = [word for svg in drawings if svg for word in contrast.words(svg)]
    assert found
    assert [word for word in found if word.contrast < contrast.LEAST] == []


def outputs(notebook: dict) -> Iterator[dict]:
    """All outputs of a notebook."""
    for cell in notebook["cells"]:
        yield from cell.get("outputs", [])


def test_words_that_cannot_be_read_are_found():
    figure, ax = plt.subplots()
    ax.axis("off")
    ax.bar([0, 1, 2], [1, 1, 1], 0.9, color=[style.BLUE, style.BLUE, style.LIGHT])
    for place, (word, ink) in enumerate({"lost": style.INK, "read": "white", "seen": style.INK}.items()):
        ax.text(place, 0.5, word, color=ink, ha="center")
    ax.text(0, 1.5, "faint", color=style.GREY, rotation=90)
    page = io.BytesIO()
    figure.savefig(page, format="svg")
    plt.close(figure)
    weak = {word.text for word in contrast.words(page.getvalue().decode()) if word.contrast < contrast.LEAST}
    assert weak == {"lost", "faint"}


def variables(css: str, selector: str) -> dict[str, str]:
    """The colours that the first rule of a style sheet with this selector gives to variables."""
    rule = re.search(re.escape(selector) + r"\s*\{([^{}]*)\}", css)[1]
    return dict(re.findall(r"(--[\w-]+): *(#[0-9a-fA-F]{6})\b", rule))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_words_of_an_interactive_figure_can_be_read_on_its_shades(theme):
    css = (Path(style.__file__).parent / "widgets" / "kit.css").read_text(encoding="utf-8")
    colours = variables(css, ".tf-widget")
    if theme == "dark":
        colours |= variables(css, 'body[data-jp-theme-light="false"] .tf-widget')
    book = Path(pytest.importorskip("pydata_sphinx_theme").__file__).parent / "theme" / "pydata_sphinx_theme"
    page = (book / "static" / "styles" / "pydata-sphinx-theme.css").read_text(encoding="utf-8")
    words = variables(page, f"html[data-theme={theme}]")
    ink, surface = words["--pst-color-text-base"], {"light": "#ffffff", "dark": "#121212"}[theme]
    picture = colours.pop("--tf-picture-ink", ink)
    assert contrast.contrast(words["--pst-color-text-muted"], surface) >= contrast.LEAST
    assert contrast.contrast(colours["--tf-blue"], surface) >= contrast.LEAST
    assert contrast.contrast(contrast.mixed(colours["--tf-vermilion"], 0.75, ink), surface) >= contrast.LEAST
    for colour in colours.values():
        assert contrast.contrast(picture, contrast.mixed(colour, 0.5, surface)) >= contrast.LEAST
    assert contrast.contrast(ink, contrast.mixed(colours["--tf-blue"], 0.45, surface)) >= contrast.LEAST
