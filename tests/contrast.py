"""How well words can be read: WCAG's contrast, the dark theme's turn of colours, and the words of a drawing.

The Web Content Accessibility Guidelines ask a contrast of 4.5 between words and what is behind them (success criterion
1.4.3, level AA).
"""

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.path import Path as Outline
from matplotlib.transforms import Affine2D

LEAST = 4.5
CSS = Path(__file__).resolve().parents[1] / "book" / "_static" / "custom.css"
SVG = "{http://www.w3.org/2000/svg}"
STEPS = {"M": Outline.MOVETO, "L": Outline.LINETO, "Q": Outline.CURVE3, "C": Outline.CURVE4}

Colour = np.ndarray
"""Red, green and blue, each 0 to 1."""


def rgb(name) -> Colour:
    """A colour by name, by its hexadecimal number, or as it is."""
    return np.asarray(to_rgb(name))


def luminance(colour: Colour) -> float:
    """The relative luminance that WCAG defines: 0 for black, 1 for white."""
    linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def contrast(one, other) -> float:
    """WCAG's contrast of two colours, 1 to 21."""
    low, high = sorted((luminance(rgb(one)), luminance(rgb(other))))
    return (high + 0.05) / (low + 0.05)


def mixed(colour, share: float, ground="white") -> Colour:
    """So much of a colour over a ground."""
    return share * rgb(colour) + (1 - share) * rgb(ground)


@cache
def dark_filter() -> tuple[float, float, float]:
    """What the dark theme does to a figure: share that is inverted, degrees by which the hue turns, brightness."""
    found = re.search(
        r"filter: invert\(([\d.]+)\) hue-rotate\((\d+)deg\) brightness\(([\d.]+)\)", CSS.read_text("utf-8")
    )
    return tuple(map(float, found.groups()))


def turned(colour) -> Colour:
    """A figure's colour in the dark theme, by the matrices of the filter effects of CSS."""
    inverted, degrees, brightness = dark_filter()
    grey = np.array([[0.213, 0.715, 0.072]] * 3)
    sine = np.array([[-0.213, -0.715, 0.928], [0.143, 0.140, -0.283], [-0.787, 0.715, 0.072]])
    angle = np.radians(degrees)
    turn = grey + np.cos(angle) * (np.eye(3) - grey) + np.sin(angle) * sine
    return np.clip(brightness * np.clip(turn @ (inverted + (1 - 2 * inverted) * rgb(colour)), 0, 1), 0, 1)


def readable(words, ground) -> float:
    """The contrast of words with a ground in a figure, in the theme in which it is smaller."""
    return min(contrast(words, ground), contrast(turned(words), turned(ground)))


class Area(NamedTuple):
    """Something filled in a drawing."""

    outline: Outline
    colour: str
    opacity: float
    clip: str


class Word(NamedTuple):
    """Words in a drawing, and the worst contrast of their beginning, middle and end with what is behind."""

    text: str
    colour: str
    contrast: float


def words(svg: str) -> Iterator[Word]:
    """The words of a drawing by matplotlib (pictures and markers in it count as white)."""
    root = ET.fromstring(svg, ET.XMLParser(target=ET.TreeBuilder(insert_comments=True)))
    boxes = {clip.get("id"): clip.find(f"{SVG}rect") for clip in root.iter(f"{SVG}clipPath")}
    areas: list[Area] = []
    for element in shown(root):
        if element.tag == f"{SVG}path":
            areas += filled(element)
        elif (element.get("id") or "").startswith("text_"):
            text = " ".join(part.text.strip() for part in element if part.tag is ET.Comment)
            for run in element:
                if run.tag == f"{SVG}g" and not run.get("id"):
                    colour = look(run).get("fill", "#000000")
                    grounds = (behind(point, areas, boxes) for point in middle(run))
                    yield Word(text, colour, min(readable(colour, ground) for ground in grounds))


def shown(element: ET.Element) -> Iterator[ET.Element]:
    """The parts in the order in which they are drawn; a group of words comes after the box behind it."""
    for part in element:
        if part.tag is ET.Comment or part.tag == f"{SVG}defs":
            continue
        yield from shown(part)
        yield part


def look(element: ET.Element) -> dict[str, str]:
    """The element's style."""
    pairs = (entry.split(":", 1) for entry in (element.get("style") or "").split(";") if ":" in entry)
    return {name.strip(): value.strip() for name, value in pairs}


def filled(path: ET.Element) -> Iterator[Area]:
    """The path as an area, where it is filled with a colour."""
    style, codes, points = look(path), [], []
    colour = style.get("fill", "#000000")
    if not colour.startswith("#"):  # nothing, or a hatch
        return
    for step, numbers in re.findall(r"([MLQC])([^MLQCz]*)", path.get("d")):
        pairs = np.array(numbers.split(), float).reshape(-1, 2)
        points.extend(pairs)
        codes.extend([STEPS[step]] * len(pairs))
    opacity = float(style.get("opacity", 1)) * float(style.get("fill-opacity", 1))
    if points:
        yield Area(Outline(points, codes), colour, opacity, (path.get("clip-path") or "")[5:-1])


def middle(run: ET.Element) -> Iterator[np.ndarray]:
    """Points in the first, the middle and the last letter of a run of words; a letter is about 60 units wide."""
    glyphs = [use.get("transform") or "translate(0 0)" for use in run.iter(f"{SVG}use")]
    starts = [float(re.search(r"translate\((-?[\d.]+)", glyph)[1]) if "translate" in glyph else 0.0 for glyph in glyphs]
    place = transform(run.get("transform") or "")
    for start in (min(starts), (min(starts) + max(starts)) / 2, max(starts)):
        yield place.transform((start + 30, 30))


def transform(text: str) -> Affine2D:
    """What ``translate``, ``scale`` and ``rotate`` of an SVG do together."""
    whole = Affine2D()
    for name, numbers in reversed(re.findall(r"(\w+)\(([^)]*)\)", text)):
        values = [float(number) for number in re.split(r"[ ,]+", numbers.strip())]
        step = Affine2D()
        whole += {"translate": step.translate, "scale": step.scale, "rotate": step.rotate_deg}[name](*values)
    return whole


def behind(point: np.ndarray, areas: list[Area], boxes: dict[str, ET.Element]) -> Colour:
    """The colour at a point, after all areas that were drawn so far."""
    colour = rgb("white")
    for area in areas:
        if inside(point, boxes.get(area.clip)) and area.outline.contains_point(point):
            colour = mixed(area.colour, area.opacity, colour)
    return colour


def inside(point: np.ndarray, box: ET.Element | None) -> bool:
    """Whether a point lies in the rectangle to which an area is cut, if there is one."""
    if box is None:
        return True
    x, y, width, height = (float(box.get(name)) for name in ("x", "y", "width", "height"))
    return x <= point[0] <= x + width and y <= point[1] <= y + height
