"""When two drawings are the same picture: what ``conftest.py`` lets nbval ask of SVG figures.

Processors differ in the last bits of an exponential, and so a curve's point in the sixth digit. That is no difference
to a reader. Everything but numbers must agree to the letter, and no number may move by more than ``TOLERANCE``.
"""

import re

TOLERANCE = 0.05
"""Points: how far a coordinate may move. A line is 1 to 2 points wide."""

NUMBER = re.compile(r"(?<![\w#.])-?\d+(?:\.\d+)?(?:e-?\d+)?")
NAME = re.compile(r'(?<=id=")[^"]+')


def renamed(svg: str) -> str:
    """The drawing with its parts named in order: matplotlib names a shape by a hash of its coordinates."""
    order = {name: f"part{place}" for place, name in enumerate(dict.fromkeys(NAME.findall(svg)))}
    named = re.compile(r'(?<=id=")([^"]+)|(?<=#)([\w.-]+)')
    return named.sub(lambda found: order.get(found.group(), found.group()), svg)


def same_picture(one: str, other: str) -> bool:
    """Whether two SVG drawings differ in nothing but numbers, and in those by ``TOLERANCE`` at most."""
    if one == other:
        return True
    one, other = renamed(one), renamed(other)
    if NUMBER.sub("0", one) != NUMBER.sub("0", other):
        return False
    pairs = zip(NUMBER.findall(one), NUMBER.findall(other), strict=True)
    return all(abs(float(a) - float(b)) <= TOLERANCE for a, b in pairs)
