"""The built book in a real browser that can reach nothing but this machine.

Every page is opened in headless Chromium, at a desktop's and at a phone's width. A page fails that asks the network for
anything, reports an error, shows an image that is missing or mathematics that is not typeset, or is wider than a phone.
Every interactive figure must draw, and draw something else when its control is moved. Links are followed in the files.

Without Chromium, or where MathJax could not be fetched by ``book/vendor.py``, these tests are skipped and say why.
"""

import functools
import http.server
import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest
import yaml
from bs4 import BeautifulSoup
from chromium import Browser, executable

ROOT = Path(__file__).resolve().parents[1]
CONTENTS = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
PAGES = [CONTENTS["root"], *(chapter["file"] for part in CONTENTS["parts"] for chapter in part["chapters"])]
CHAPTERS = [page for page in PAGES if page.startswith("notebooks/")]

AXE = (
    "axe-core@4.10.3",
    "Xm7bpRXnDSX2YE2YFfBk2FnF0ep6tmG7xPh8iHee8MIcrgq762Nkce856dYtJYLkuIoYZvGfTs/PbZhideTcEg==",
)
"""Package and version, and the archive's SHA-512."""

KINDS_OF_PAGE = ["index", "glossary", *CHAPTERS[:1]]
"""Pages that together show every kind of part. The dark theme has the same colours on all, so it is read on these."""

EXAMINED = PAGES if os.environ.get("CI") else KINDS_OF_PAGE
"""Pages that axe-core reads in the light theme: all of them in CI; at home some seconds a page are saved."""

LIGHT = 2_000_000
"""Bytes: the most that the HTML and the pictures of a chapter may weigh together."""

pytestmark = pytest.mark.skipif(executable() is None, reason="Chromium is not installed (apt install chromium)")


def script(path: Path):
    """A script of the book as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A file server that writes no log."""

    def log_message(self, *_):
        """Nothing."""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder of the book, built anew as ``make book`` does."""
    subprocess.run([sys.executable, "book/vendor.py"], cwd=ROOT, check=True, capture_output=True)
    if not (ROOT / "book" / "vendor" / "offline" / "complete").exists():
        pytest.skip("MathJax and the widget manager could not be fetched (npm pack)")
    out = tmp_path_factory.mktemp("book")
    command = [str(Path(sys.executable).parent / "jupyter-book")]
    command += ["build", "book", "-n", "-W", "--keep-going", "--path-output", str(out)]
    build = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = (build.stdout + build.stderr).splitlines()
    assert build.returncode == 0, "\n".join(line for line in lines if "WARNING" in line or "ERROR" in line)
    return out / "_build" / "html"


@pytest.fixture(scope="module")
def address(site) -> str:
    """Where the book is served on this machine."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Browser:
    """One browser for all pages."""
    with Browser() as one:
        yield one


@pytest.mark.parametrize("page", PAGES)
def test_page_is_whole(browser, address, page):
    browser.resize(1280, 900)
    browser.open(f"{address}{page}.html")
    assert browser.messages == []
    assert [url for url in browser.requests if not url.startswith((address, "data:", "blob:"))] == []
    assert browser.evaluate(MISSING_IMAGES) == []
    assert browser.evaluate(RAW_MATHEMATICS) == []


@pytest.mark.parametrize("page", PAGES)
def test_page_fits_a_phone(browser, address, page):
    browser.resize(390, 844)
    browser.open(f"{address}{page}.html")
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390, browser.evaluate(TOO_WIDE)


@pytest.mark.parametrize("page", CHAPTERS)
@pytest.mark.parametrize("width", [1280, 390])
def test_interactive_figures_move(browser, address, page, width):
    browser.resize(width, 900)
    browser.open(f"{address}{page}.html")
    views = browser.evaluate("document.querySelectorAll('script[type$=\"widget-view+json\"]').length")
    if not views:
        pytest.skip("no interactive figure on this page")
    assert browser.evaluate(WIDGETS_DRAWN) == views, browser.messages
    for i in range(views):
        assert browser.evaluate(f"({MOVE})({i})"), f"figure {i + 1} does not change when its controls are moved"
    drawn = browser.evaluate("[...document.querySelectorAll('.tf-widget')].map((w) => w.outerHTML).join()")
    assert [word for word in ("[object ", "undefined", "NaN") if word in drawn] == []
    assert browser.messages == []


@pytest.fixture(scope="module")
def axe(tmp_path_factory) -> str:
    """The source of axe-core, which finds what hinders readers with a disability."""
    vendor = script(ROOT / "book" / "vendor.py")
    try:
        package = vendor.fetch(*AXE, tmp_path_factory.mktemp("axe"))
    except vendor.Unavailable as reason:
        pytest.skip(f"axe-core could not be fetched: {reason}")
    return (package / "axe.min.js").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("page", "theme"), [*((page, "light") for page in EXAMINED), *((page, "dark") for page in KINDS_OF_PAGE)]
)
def test_page_is_accessible(browser, address, axe, page, theme):
    browser.resize(1280, 900)
    browser.open(f"{address}{page}.html")
    browser.evaluate(f"localStorage.setItem('mode', '{theme}'); localStorage.setItem('theme', '{theme}')")
    browser.open(f"{address}{page}.html")
    browser.evaluate(f"{axe}; 0")
    assert browser.evaluate(SERIOUS_FINDINGS) == []


@pytest.mark.parametrize("page", CHAPTERS)
def test_both_themes_show_figures_on_a_light_ground(browser, address, page):
    browser.open(f"{address}{page}.html")
    for theme in ("light", "dark"):
        browser.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
        grounds = browser.evaluate(
            "[...document.querySelectorAll('.cell_output img')].map((i) => getComputedStyle(i).backgroundColor)"
        )
        assert set(grounds) <= {"rgb(255, 255, 255)"}


@pytest.mark.parametrize("page", CHAPTERS)
def test_chapter_is_light(site, page):
    html = site / f"{page}.html"
    soup = BeautifulSoup(html.read_text(encoding="utf-8"), "html.parser")
    images = {(html.parent / unquote(image["src"])).resolve() for image in soup.select("img[src]")}
    weight = html.stat().st_size + sum(image.stat().st_size for image in images if image.exists())
    assert weight <= LIGHT, f"{weight / 1e6:.1f} MB"


def test_internal_links_and_anchors_resolve(site):
    soups = {
        file: BeautifulSoup(file.read_text(encoding="utf-8"), "html.parser") for file in sorted(site.rglob("*.html"))
    }
    soups = {file: soup for file, soup in soups.items() if "offline" not in file.parts and "_static" not in file.parts}
    anchors = {file: {tag["id"] for tag in soup.select("[id]")} for file, soup in soups.items()}
    broken = []
    for file, soup in soups.items():
        for link in soup.select("a[href]"):
            path, anchor = urldefrag(urljoin(file.as_uri(), link["href"]))
            if not path.startswith("file:"):
                continue
            target = Path(unquote(path.removeprefix("file://")))
            if not target.is_file() or (anchor and target in anchors and unquote(anchor) not in anchors[target]):
                broken.append(f"{file.relative_to(site)}: {link['href']}")
    assert broken == []


SERIOUS_FINDINGS = """
axe.run({ exclude: [['mjx-container'], ['.highlight']] }, { runOnly: ['wcag2a', 'wcag2aa'] })
  .then((found) => found.violations
  .filter((v) => ['serious', 'critical'].includes(v.impact))
  .map((v) => `${v.id}, ${v.nodes.length} times: ${v.nodes[0].html.slice(0, 200)} ${v.nodes[0].failureSummary}`))
"""

MISSING_IMAGES = "[...document.images].filter((i) => i.complete && !i.naturalWidth).map((i) => i.src)"

RAW_MATHEMATICS = r"""
(() => {
  const found = [...document.querySelectorAll('.math')].filter((m) => !m.querySelector('mjx-container'));
  const failed = [...document.querySelectorAll('mjx-merror')];
  const walk = document.createTreeWalker(document.querySelector('article'), NodeFilter.SHOW_TEXT);
  const raw = [];
  while (walk.nextNode()) {
    const node = walk.currentNode;
    if (node.parentElement.closest('pre, code, script, style, svg, mjx-container')) continue;
    if (/\$\S[^$]*\S\$|\$\$|\\\(|\\\[|\\begin\{/.test(node.data)) raw.push(node.data.trim());
  }
  return [...found, ...failed].map((m) => m.textContent).concat(raw);
})()
"""

TOO_WIDE = """
[...document.querySelectorAll('article *')].filter((e) => e.getBoundingClientRect().right > 391)
  .slice(0, 5).map((e) => `${e.tagName}.${e.className}: ${e.textContent.trim().slice(0, 60)}`)
"""

WIDGETS_DRAWN = """
new Promise((resolve) => {
  const wanted = document.querySelectorAll('script[type$="widget-view+json"]').length;
  const drawn = () => [...document.querySelectorAll('.tf-widget .tf-body')]
    .filter((body) => body.childElementCount && body.getBoundingClientRect().height > 40).length;
  const start = Date.now();
  const look = () => drawn() >= wanted || Date.now() - start > 10000 ? resolve(drawn()) : setTimeout(look, 100);
  look();
})
"""

MOVE = """
async (index) => {
  const body = document.querySelectorAll('.tf-widget .tf-body')[index];
  const pause = () => new Promise((resolve) => setTimeout(resolve, 150));
  const picture = () => {
    const copy = body.cloneNode(true);
    copy.querySelectorAll('.tf-control, .tf-stepper, input, select, button').forEach((control) => control.remove());
    return copy.innerHTML + [...body.querySelectorAll('canvas')].map((c) => c.toDataURL()).join();
  };
  const tell = (control, type) => control.dispatchEvent(new Event(type, { bubbles: true }));
  for (const control of body.querySelectorAll('input, select, button, [tabindex="0"]')) {
    if (control.disabled) continue;
    const before = picture();
    if (control.type === 'range' || control.type === 'number') {
      control.value = control.value === control.max ? control.min : control.max;
      tell(control, 'input');
      tell(control, 'change');
    } else if (control.tagName === 'SELECT') {
      control.selectedIndex = (control.selectedIndex + 1) % control.options.length;
      tell(control, 'input');
      tell(control, 'change');
    } else control.click ? control.click() : tell(control, 'click');
    await pause();
    if (picture() !== before) return true;
  }
  return false;
}
"""
