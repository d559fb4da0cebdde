"""Fetch what the book's pages load at run time, so that the built book asks the network for nothing.

    python -m tools.vendor

Three packages come from the npm registry by ``npm pack``, and each archive's SHA-512 is compared with the one written
here; anywidget's module comes from the installed Python package. The files go to ``book/vendor/offline``, which git
ignores. Where npm or the network is missing, the book is built all the same, and its pages use the public networks.
"""

import base64
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from tformer_lib import command_line

VENDOR = Path(__file__).resolve().parents[1] / "book" / "vendor"

PACKAGES = {
    "mathjax@3.2.2": "Bt+SSVU8eBG27zChVewOicYs7Xsdt40qm4+UpHyX7k0/O9NliPc+x77k1/FEsPsjKPZGJvtRZM1vO+geW0OhGw==",
    "requirejs@2.3.8": "7/cTSLOdYkNBNJcDMWf+luFvMriVm7eYxp4BcFCsAX0wF421Vyce5SXP17c+Jd5otXKGNehIonFlyQXSowL6Mw==",
    "@jupyter-widgets/html-manager@1.0.15": (
        "5thBIV6ymNgmPVOHvzx+gGy8ZSKmSazhtGw4/c4xJDVzRhG9PTeQsRjF3FUTopvFi//SABeNz1yp47bCrJ3CQA=="
    ),
}
"""Package and version -> the archive's SHA-512, in base64, as the registry publishes it."""

SAFELY = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
"""How an archive is unpacked: Python before 3.11.4 knows no filters, and the checksum says what is in it."""

NPM_OPTIONS = ("--silent", "--fetch-retries=1", "--fetch-retry-mintimeout=1000", "--fetch-timeout=60000")
"""Give up soon where there is no network."""

MATHJAX = ("tex-mml-chtml.js", "input", "output/chtml", "output/chtml.js", "a11y", "ui")

CONFIGURE_REQUIRE = """// Says where the widget modules are: in this folder, wherever the page stands.
(function () {
  const base = new URL(".", document.currentScript.src).href.replace(/\\/$/, "");
  window.__jupyter_widgets_assets_path__ = base + "/npm/@jupyter-widgets/html-manager/dist/";
  requirejs.config({ baseUrl: base + "/npm", paths: { anywidget: base + "/anywidget" } });
})();
"""


class Unavailable(Exception):
    """npm or the network is missing, or an archive is not the one that was checked."""


def provide() -> int:
    """Fetch everything, or say why not; the book can be built either way."""
    if current():
        print("book/vendor is up to date")
        return 0
    try:
        fetch_all()
    except Unavailable as reason:
        print(f"book/vendor: {reason}; the pages will load MathJax and the widget manager from the network")
        return 0
    print("book/vendor: MathJax and the widget manager are served from the book")
    return 0


def stamp() -> str:
    """What this script would fetch: compared with what is there."""
    return hashlib.sha256(Path(__file__).read_bytes() + anywidget_module().read_bytes()).hexdigest()


def current() -> bool:
    """Whether everything is there already, from this very script."""
    done = VENDOR / "offline" / "complete"
    return done.exists() and done.read_text() == stamp()


def anywidget_module() -> Path:
    """The module that draws the interactive figures, from the installed package."""
    return Path(find_spec("anywidget").origin).parent / "nbextension" / "index.js"


def fetch_all() -> None:
    """Build the folder beside its place, then move it there, so that it is whole or absent."""
    with tempfile.TemporaryDirectory(dir=VENDOR.parent, prefix=".vendor-") as temporary:
        work = Path(temporary)
        packages = {name: fetch(name, checksum, work) for name, checksum in PACKAGES.items()}
        mathjax, require, manager = packages.values()
        site = work / "site" / "offline"
        copy_mathjax(mathjax / "es5", site / "mathjax")
        copy_widgets(require, manager, site)
        (site / "complete").write_text(stamp())
        shutil.rmtree(VENDOR, ignore_errors=True)
        (work / "site").rename(VENDOR)


def fetch(name: str, checksum: str, work: Path) -> Path:
    """Download one package, compare its checksum, unpack it; returns the unpacked folder."""
    npm = shutil.which("npm")
    if npm is None:
        raise Unavailable("npm is not installed")
    folder = Path(tempfile.mkdtemp(dir=work))
    command = [npm, "pack", *NPM_OPTIONS, "--pack-destination", str(folder), name]
    try:
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"npm took more than three minutes to fetch {name}") from None
    archives = list(folder.glob("*.tgz"))
    if ran.returncode or not archives:
        raise Unavailable(f"npm could not fetch {name} ({last_line(ran.stderr)})")
    found = base64.b64encode(hashlib.sha512(archives[0].read_bytes()).digest()).decode()
    if found != checksum:
        raise Unavailable(f"{name} has SHA-512 {found}, expected {checksum}")
    with tarfile.open(archives[0]) as archive:
        archive.extractall(folder, **SAFELY)
    return folder / "package"


def last_line(text: str) -> str:
    """The last line of what a program said."""
    return (text.strip().splitlines() or ["no reason given"])[-1]


def copy_mathjax(source: Path, target: Path) -> None:
    """The one bundle the book loads, and the fonts and parts that it may ask for."""
    target.mkdir(parents=True)
    for name in MATHJAX:
        part = source / name
        if part.is_dir():
            shutil.copytree(part, target / name)
        elif part.exists():
            shutil.copy(part, target / name)


def copy_widgets(require: Path, manager: Path, target: Path) -> None:
    """RequireJS, the widget manager with its fonts (which it looks for in two places), and anywidget's module."""
    shutil.copy(require / "require.js", target)
    shutil.copy(manager / "dist" / "embed-amd.js", target)
    shutil.copy(anywidget_module(), target / "anywidget.js")
    (target / "rq-config.js").write_text(CONFIGURE_REQUIRE)
    fonts = [f for f in (manager / "dist").iterdir() if f.suffix in {".woff", ".woff2"}]
    for folder in ("npm/@jupyter-widgets", "npm/@jupyter-widgets/html-manager/dist"):
        (target / folder).mkdir(parents=True, exist_ok=True)
        for font in fonts:
            shutil.copy(font, target / folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch what the book needs."""
    return command_line.without_options(provide, arguments, program="python -m tools.vendor", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
