"""The figures' style: what every plot shares draws what it says."""

import ast
import importlib
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from tformer_lib.teaching import style

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
