"""Lets nbval compare drawings as pictures, not as strings (see ``tests/pictures.py``), and the longest files go first.

It stands here, and not among the chapters, so that a reader finds nothing but chapters there. Where nbval is not
installed, the other tests run all the same.
"""

import copy
import sys
from pathlib import Path

try:
    from nbval.plugin import IPyNbCell
except ImportError:
    IPyNbCell = None

sys.path.insert(0, str(Path(__file__).parent / "tests"))

from pictures import same_picture

FIRST = ("test_lab.py", "test_flash_attention.py", "test_browser.py", "test_new_chapter.py", "test_distributed.py")
"""Files that take minutes: where several run at a time, none of them is left for the end."""

SVG = "image/svg+xml"
strictly = IPyNbCell and IPyNbCell.compare_outputs


def compare_outputs(self, test: list, ref: list, skip_compare: tuple | None = None) -> bool:
    """nbval's comparison, after every new drawing that is the recorded picture took the recorded one's place.

    Of a figure in two formats only the SVG is compared.
    """
    test, ref = copy.deepcopy(test), copy.deepcopy(ref)
    new, recorded = ([output["data"] for output in side if SVG in output.get("data", {})] for side in (test, ref))
    for drawing in (*new, *recorded):
        drawing.pop("image/png", None)
    for ours, theirs in zip(new, recorded, strict=False):  # a missing one is for nbval to tell
        if same_picture(ours[SVG], theirs[SVG]):
            ours[SVG] = theirs[SVG]
    return strictly(self, test, ref, skip_compare)


if IPyNbCell:
    IPyNbCell.compare_outputs = compare_outputs


def pytest_collection_modifyitems(items: list) -> None:
    """Put the tests of the longest files first; the others stay in their order."""
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))
