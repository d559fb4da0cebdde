"""Buttons that open a chapter elsewhere, once the course has an address: ``course_address`` in ``_config.yml``.

While it is empty a page offers its download alone. With the address of a repository on GitHub, every page has buttons
for the repository and its issues, and every chapter opens on Binder and on Colab; ``course_hub`` adds a JupyterHub of
your own. ``make address URL=https://github.com/someone/tformer-lab`` sets it, and gives the chapters the cell that
Colab needs.
"""

from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.errors import ConfigError

BINDER, COLAB = "https://mybinder.org", "https://colab.research.google.com"


def offer(app: Sphinx, config: Config) -> None:
    """Turn the theme's buttons on, or leave them off."""
    address = config.course_address.rstrip("/")
    if not address:
        return
    if not address.startswith("https://github.com/"):
        raise ConfigError(f"course_address is {address!r}; Binder and Colab need https://github.com/owner/name")
    buttons = {**config.html_theme_options.get("launch_buttons", {}), "binderhub_url": BINDER, "colab_url": COLAB}
    if config.course_hub:
        buttons["jupyterhub_url"] = config.course_hub
    config.html_theme_options = {
        **config.html_theme_options,
        "repository_url": address,
        "repository_branch": "main",
        "path_to_docs": "",
        "use_repository_button": True,
        "use_issues_button": True,
        "launch_buttons": buttons,
    }


def setup(app: Sphinx) -> dict:
    """Register with Sphinx."""
    app.add_config_value("course_address", "", "html", [str])
    app.add_config_value("course_hub", "", "html", [str])
    app.connect("config-inited", offer, priority=10)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
