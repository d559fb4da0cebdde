"""Interactive figures, one Python file and one JavaScript file a chapter.

The data is computed in Python, the drawing is plain JavaScript on SVG, and no kernel is needed to play: a figure works
in the published page, offline, and in JupyterLab alike. A chapter's ``widgets/<topic>.py`` holds::

    from tformer_lib.teaching.widgets import Interactive, module

    class MaskBuilder(Interactive):
        _esm = module("masks.js")

    def mask_builder(length):
        return MaskBuilder(label="Mask builder: who sees whom", data={"length": length})

and its ``widgets/<topic>.js`` defines ``function draw(root, data, kit)``, which fills the element ``root``. ``kit``
(see ``kit.js``) makes elements, SVG, labelled controls and a stepper that work by keyboard and are announced by a
screen reader; ``kit.css`` gives colours that follow the theme of the page.
"""

from pathlib import Path

import anywidget
import traitlets

FOLDER = Path(__file__).parent


def module(file: str) -> str:
    """The ES module of a figure: the common kit, the chapter's ``draw``, and the entry point that anywidget calls.

    Args:
        file: a JavaScript file in this folder that defines ``function draw(root, data, kit)``.
    """
    sources = [(FOLDER / name).read_text(encoding="utf-8") for name in ("kit.js", file)]
    return "\n".join([*sources, "export default { render: renderWith(draw) };", ""])


class Interactive(anywidget.AnyWidget):
    """Base of the interactive figures.

    Args:
        label: what the figure is, read out by a screen reader and shown above it.
        data: everything that ``draw`` needs, as JSON; keep it small, for it is stored in the page.
    """

    _css = (FOLDER / "kit.css").read_text(encoding="utf-8")
    label = traitlets.Unicode("Interactive figure").tag(sync=True)
    data = traitlets.Dict().tag(sync=True)

    def __repr__(self) -> str:
        """The label: the same on every run, so that the tests can compare the cell."""
        return f"Interactive figure: {self.label}"
