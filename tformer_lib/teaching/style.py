"""One family of figures: one palette, one size system, two ways of drawing an axes full of numbers.

The colours are Okabe and Ito's (2008), which readers with the common forms of colour blindness can tell apart. Where a
figure has several lines, :func:`lines` changes the dash and the marker with the colour, so that it reads in black and
white too. Figures have a white background of their own; the book lays them on a card in the dark theme.

Figures are SVG by default, and the same bytes on every run, so that the tests compare them. A PNG goes beside each SVG,
because JupyterLab draws no SVG of a notebook that it does not trust. A figure of times or of float32 numerics differs
from machine to machine: draw it inside :func:`measured`, which gives PNG alone, and is not compared.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW, INK, GREY = "#CC79A7", "#56B4E9", "#F0E442", "#1B1F24", "#8A9099"
LIGHT = "#9AD2F2"
"""Sky, lighter: behind words, which the dark theme draws light on dark."""

MUTED, RUST = "#5C636C", "#B04A00"
"""Grey and vermilion, darker: for words, which need a contrast of 4.5 with what is behind them, in both themes."""

PALETTE = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY)
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P")

WEIGHTS = LinearSegmentedColormap.from_list("weights", ["#FFFFFF", "#9CC9E3", BLUE, "#00304D"])
"""White for nothing, dark blue for much: attention weights, probabilities, masks."""

SIGNED = LinearSegmentedColormap.from_list("signed", ["#8A3D00", VERMILION, "#FFFFFF", BLUE, "#00304D"])
"""Vermilion below zero, white at zero, blue above: embeddings, biases, differences."""

PALE = LinearSegmentedColormap.from_list("pale", ["#FFFFFF", "#7FB9DA"])
"""The light half of ``WEIGHTS``: behind words, because no ink can be read on its middle in both themes."""

WIDTH = 7.0
"""Inches of a figure as wide as the text."""

NARROW = 4.2
"""Inches: at this width a label of 9.5 points is 10 pixels high on a phone."""

GROUND = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
"""The box behind a number that would otherwise lie on a line of the grid."""

SMALL = 48
"""Rows or columns up to which a heatmap is drawn as shapes."""

PARAMETERS = {
    "figure.figsize": (WIDTH, 3.2),
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "white",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 10.5,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#E3E6EA",
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 2.0,
    "lines.markersize": 5.0,
    "image.cmap": "weights",
    "svg.hashsalt": "tformer-lab",
    "svg.fonttype": "path",
}


def setup(seed: int = 0) -> None:
    """Make a notebook repeatable and its figures one family: call it in the first cell.

    Seeds Python, numpy and torch, uses two threads (so that sums are added in the same order on every machine with at
    least two cores), and asks for reproducible SVG figures.

    Args:
        seed: the seed of all three generators.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(2)
    torch.set_printoptions(precision=4, sci_mode=False)
    apply_style()
    use_format("svg")


def apply_style() -> None:
    """Give matplotlib the sizes, fonts and colours of the course."""
    for cmap, name in ((WEIGHTS, "weights"), (SIGNED, "signed")):
        plt.colormaps.register(cmap, name=name, force=True)
    plt.rcParams.update(PARAMETERS)
    plt.rcParams["axes.prop_cycle"] = plt.cycler(color=PALETTE)


def use_format(name: str) -> None:
    """Ask the notebook for figures as ``"svg"`` (with a PNG beside it) or ``"retina"`` (PNG at twice the size).

    Outside a notebook this does nothing.
    """
    if not in_notebook():
        return
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    formats = ("svg", "png") if name == "svg" else (name,)
    facts = {"Date": None, "Creator": None} if name == "svg" else {"Software": None}
    set_matplotlib_formats(*formats, metadata=facts, bbox_inches="tight")


def in_notebook() -> bool:
    """Whether figures go into a notebook's cell."""
    return "inline" in plt.get_backend().lower()


@contextmanager
def measured() -> Iterator[None]:
    """Show the figures drawn inside as PNG: for times, and for numbers whose last digits differ between machines.

    ::

        with teaching.measured():
            plots.flash.speed(times)
    """
    show()
    use_format("retina")
    MEASURED.append(True)
    try:
        yield
        show()
    finally:
        MEASURED.pop()
        use_format("svg")


MEASURED: list[bool] = []
"""One entry while figures are drawn inside :func:`measured`."""


def show() -> None:
    """Show every open figure and close it: the last line of a function that draws."""
    if MEASURED:  # nobody knows the numbers beforehand; a compared figure is laid out by hand, and a test looks at it
        for number in plt.get_fignums():
            clear_legends(plt.figure(number))
    if in_notebook():
        plt.show()
    plt.close("all")


def clear_legends(figure: Figure, tries: int = 15) -> None:
    """Raise the upper end of an axis until the legend of its axes lies over no line, if this helps."""
    for ax in figure.axes:
        if ax.get_legend() is None:
            continue
        before = ax.get_ylim()
        for _ in range(tries):
            figure.canvas.draw()
            if not legend_covers(ax):
                break
            scale = ax.yaxis.get_transform()
            low, high = scale.transform(np.asarray(ax.get_ylim()))
            ax.set_ylim(top=float(scale.inverted().transform(np.asarray([high + 0.05 * (high - low)]))[0]))
        else:
            ax.set_ylim(before)


def legend_covers(ax: Axes) -> bool:
    """Whether the words or the samples of the legend lie over a line of its axes, as they are drawn."""
    legend = ax.get_legend()
    seen = (*legend.get_texts(), *legend.legend_handles)  # its frame is not drawn, so the margin inside may be crossed
    box = Bbox.union([part.get_window_extent() for part in seen])
    for line in ax.lines:
        path = line.get_transform().transform_path(line.get_path())
        stroke = line.get_linestyle() not in ("None", "none", " ", "") and len(path.vertices) > 1
        if path.intersects_bbox(box, filled=False) if stroke else box.count_contains(path.vertices):
            return True
    return False


def figure(
    rows: int = 1, columns: int = 1, *, height: float = 3.2, width: float = WIDTH, **options
) -> tuple[Figure, Axes]:
    """A figure of the course's width with ``rows`` x ``columns`` axes.

    Args:
        rows: rows of axes.
        columns: columns of axes; three is the most that reads on a phone.
        height: inches.
        width: inches; the text is 7 wide.
        options: passed on to ``plt.subplots`` (``sharey``, ``width_ratios``, ...).
    """
    return plt.subplots(rows, columns, figsize=(width, height), **options)


def heatmap(
    ax: Axes,
    matrix,
    *,
    rows: Sequence | None = None,
    columns: Sequence | None = None,
    signed: bool = False,
    values: str | None = None,
    limit: float | None = None,
) -> ScalarMappable:
    """Draw a matrix with a line between its cells, row 0 on top.

    Args:
        ax: where.
        matrix: (rows, columns), a tensor or array; booleans are drawn as 0 and 1.
        rows: labels of the rows.
        columns: labels of the columns (above the matrix).
        signed: colours for positive and negative values around zero, instead of from zero upwards.
        values: a format such as ``".2f"`` to write each value into its cell; the colours are then pale.
        limit: the value of the darkest colour; by default the largest in the matrix.
    """
    matrix = np.asarray(matrix.detach().cpu() if isinstance(matrix, torch.Tensor) else matrix)
    if matrix.ndim != 2:
        raise ValueError(f"heatmap needs a matrix, got shape {matrix.shape}")
    if signed and values:
        raise ValueError("values are written on pale colours, which show no sign: leave out signed or values")
    top = limit or largest(matrix)
    matrix = matrix.astype(float)
    low, colours = (-top, SIGNED) if signed else (0.0, PALE if values else WEIGHTS)
    image = draw_cells(ax, matrix, cmap=colours, vmin=low, vmax=top)
    label_cells(ax, matrix.shape, rows, columns)
    if values:
        write_values(ax, matrix, values)
    return image


def turn_words(ax: Axes) -> None:
    """Turn the words below or above a matrix upright. A mark or a single letter stays as it is: "I" would be a dash."""
    for label in ax.get_xticklabels():
        label.set_rotation(90 if len(label.get_text().strip()) > 2 else 0)


def largest(matrix: np.ndarray) -> float:
    """The value to draw darkest: the largest finite magnitude; above 1 for booleans, so that True is blue."""
    if matrix.dtype == bool:
        return 1.5
    finite = np.abs(matrix[np.isfinite(matrix)])
    return float(finite.max(initial=0.0)) or 1.0


def draw_cells(ax: Axes, matrix: np.ndarray, **colours) -> ScalarMappable:
    """Colour the cells: as shapes with a thin border where they are few, as one picture where they are many."""
    if max(matrix.shape) > SMALL:
        return ax.imshow(matrix, aspect="auto", interpolation="nearest", **colours)
    edges = [np.arange(n + 1) - 0.5 for n in matrix.shape]
    image = ax.pcolormesh(edges[1], edges[0], matrix, edgecolors="#C9CED6", linewidth=0.5, **colours)
    ax.set_ylim(edges[0][-1], edges[0][0])
    return image


def label_cells(ax: Axes, shape: tuple[int, int], rows: Sequence | None, columns: Sequence | None) -> None:
    """Ticks with the given labels, the columns' above the matrix."""
    ax.grid(False)
    ax.tick_params(length=0)
    if rows is not None:
        ax.set_yticks(range(shape[0]), [str(r) for r in rows])
    if columns is not None:
        ax.set_xticks(range(shape[1]), [str(c) for c in columns])
        ax.xaxis.tick_top()
        ax.xaxis.set_label_position("top")


def write_values(ax: Axes, matrix: np.ndarray, form: str) -> None:
    """Write each finite value into its cell."""
    for (row, column), value in np.ndenumerate(matrix):
        if np.isfinite(value):
            ax.text(column, row, format(value, form), ha="center", va="center", fontsize=9.5)


def log2_axis(
    ax: Axes,
    ticks: Sequence[float],
    labels: Sequence[str] | None = None,
    *,
    log_y: bool = False,
    minor: bool = False,
) -> None:
    """A horizontal axis in powers of two with a tick at each of these values: lengths, sizes, counts that double.

    Args:
        ax: what is drawn on already.
        ticks: where the ticks are.
        labels: of the ticks; by default the values, with commas between thousands.
        log_y: make the vertical axis logarithmic too, to base 10.
        minor: leave the small ticks between.
    """
    ax.set_xscale("log", base=2)
    if log_y:
        ax.set_yscale("log")
    ax.set_xticks(list(ticks), [f"{tick:,}" for tick in ticks] if labels is None else labels)
    if not minor:
        ax.minorticks_off()


def lines(ax: Axes, x: Sequence, ys: dict[str, Sequence], *, markers: bool = True, **options) -> list[Line2D]:
    """Draw one line per entry of ``ys``, each with a colour, a dash and a marker of its own, and a legend.

    Args:
        ax: where.
        x: the common abscissa.
        ys: label -> ordinates.
        markers: draw a marker at each point (leave out for long curves).
        options: passed on to ``ax.plot``.
    """
    drawn = []
    for i, (label, y) in enumerate(ys.items()):
        look = {"color": PALETTE[i % 6], "linestyle": DASHES[i % 6], "marker": MARKERS[i % 6] if markers else None}
        drawn += ax.plot(x, y, label=label, **(look | options))
    if len(ys) > 1:
        ax.legend()
    return drawn
