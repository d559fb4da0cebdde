"""Serve MathJax, RequireJS and the widget manager from the book itself, where ``tools/vendor.py`` has fetched them.

Without them the pages ask their content delivery networks, as Sphinx and MyST-NB do by default, and the build says so.
"""

from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util import logging

ADDRESS = "../offline"  # seen from _static/, where Sphinx looks for scripts
SCRIPTS = ("require.js", "rq-config.js", "embed-amd.js")
LATER = {"defer": "defer"}  # the words and pictures of a page are shown before its interactive figures are loaded


def use_vendored(app: Sphinx, config: Config) -> None:
    """Point the configuration at the vendored files, if they are all there."""
    folder = Path(app.srcdir) / "vendor"
    if not (folder / "offline" / "complete").exists():
        logging.getLogger(__name__).info(
            "book/vendor is not there: pages with mathematics or interactive figures will load MathJax and the widget "
            "manager from the network. `python -m tools.vendor` fetches them, and the book then needs no network."
        )
        config.nb_ipywidgets_js = {url: {**how, **LATER} for url, how in config.nb_ipywidgets_js.items()}
        return
    config.html_extra_path = [*config.html_extra_path, "vendor"]
    config.mathjax_path = f"{ADDRESS}/mathjax/tex-mml-chtml.js"
    config.nb_ipywidgets_js = {f"{ADDRESS}/{name}": LATER for name in SCRIPTS}


def setup(app: Sphinx) -> dict:
    """Register with Sphinx; before MyST-NB reads its configuration."""
    app.connect("config-inited", use_vendored, priority=10)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
