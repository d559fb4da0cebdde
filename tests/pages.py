"""What a reader would see go wrong on a page: visit it in a browser, and follow its links in the files.

The tests of the built book ask here, and so do the tests that plant each fault in a page and require that it is found.
"""

import re
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

from chromium import Browser

DESKTOP, PHONE = 1280, 390


@dataclass(frozen=True)
class Visit:
    """What one visit found.

    Attributes:
        errors: messages on the console, exceptions that nobody caught, requests that failed.
        outside: addresses that the page asked for, beyond its own server.
        missing: images that cannot be shown.
        raw: mathematics that is not typeset.
        too_wide: parts that stand out of the screen, if the page can be moved sideways.
        figures: how many interactive figures the page has.
        drawn: how many of them drew themselves.
        still: those that stay the same when their controls are moved, counted from 0.
        nonsense: what only a fault of a figure's program writes into a page.
        grounds: the background colours of plotted figures, in both themes.
        copy_buttons: how many blocks of code have a button that copies them.
    """

    errors: list[str]
    outside: list[str]
    missing: list[str]
    raw: list[str]
    too_wide: list[str]
    figures: int
    drawn: int
    still: list[int]
    nonsense: list[str]
    grounds: list[str]
    copy_buttons: int


def visit(browser: Browser, url: str, width: int, *, patience: float = 10.0) -> Visit:
    """Open a page at a screen's width, play with its figures, and tell what was found.

    Args:
        browser: the browser.
        url: the page's address.
        width: of the screen, in pixels; below 600 it is a phone.
        patience: seconds that the interactive figures may take to draw.
    """
    browser.resize(width, 900)
    browser.open(url)
    server = url[: url.index("/", len("http://")) + 1]
    figures = browser.evaluate(FIGURES)
    drawn = browser.evaluate(f"({DRAWN})({1000 * patience})") if figures else 0
    missing, raw = browser.evaluate(MISSING_IMAGES), browser.evaluate(RAW_MATHEMATICS)
    too_wide = browser.evaluate(f"({TOO_WIDE})({width})") if width < 600 else []
    still = [i for i in range(drawn) if not browser.evaluate(f"({MOVE})({i})")]
    return Visit(
        errors=list(browser.messages),
        outside=[asked for asked in browser.requests if not asked.startswith((server, "data:", "blob:"))],
        missing=missing,
        raw=raw,
        too_wide=too_wide,
        figures=figures,
        drawn=drawn,
        still=still,
        nonsense=browser.evaluate(NONSENSE),
        grounds=browser.evaluate(GROUNDS),
        copy_buttons=browser.evaluate("document.querySelectorAll('button.copybtn').length"),
    )


def broken_links(site: Path) -> list[str]:
    """The links between the pages of a folder that lead to no file, or to no such place in it."""
    files = [f for f in sorted(site.rglob("*.html")) if not {"offline", "_static"} & set(f.relative_to(site).parts)]
    texts = {f: re.sub(r"<script\b.*?</script>", "", f.read_text(encoding="utf-8"), flags=re.DOTALL) for f in files}
    anchors = {file: {unescape(name) for name in re.findall(r'\sid="([^"]+)"', text)} for file, text in texts.items()}
    return [
        f"{file.relative_to(site)}: {link}"
        for file, text in texts.items()
        for link in map(unescape, re.findall(r'<a\s[^>]*?\bhref="([^"]*)"', text))
        if leads_nowhere(urljoin(file.as_uri(), link), anchors)
    ]


def leads_nowhere(url: str, anchors: dict[Path, set[str]]) -> bool:
    """Whether a link into the folder finds no file, or no such anchor in it; links elsewhere are not followed."""
    path, anchor = urldefrag(url)
    if not path.startswith("file:"):
        return False
    target = Path(unquote(path.removeprefix("file://")))
    return not target.is_file() or bool(anchor and target in anchors and unquote(anchor) not in anchors[target])


FIGURES = "document.querySelectorAll('script[type$=\"widget-view+json\"]').length"

MISSING_IMAGES = """
Promise.all([...document.images].map((image) => {
  image.loading = 'eager';
  return image.decode().then(() => null, () => image.src);
})).then((sources) => sources.filter(Boolean))
"""

RAW_MATHEMATICS = r"""
(() => {
  const found = [...document.querySelectorAll('.math')].filter((m) => !m.querySelector('mjx-container'));
  const failed = [...document.querySelectorAll('mjx-merror, mjx-container mtext[mathcolor=red]')];
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
(width) => document.documentElement.scrollWidth <= width ? [] :
  [...document.querySelectorAll('article *')].filter((e) => e.getBoundingClientRect().right > width + 1)
    .filter((e) => !e.closest('pre, .pst-scrollable-table-container, .tf-scroll, mjx-container'))
    .slice(0, 5).map((e) => `${e.tagName}.${e.className}: ${e.textContent.trim().slice(0, 60)}`)
    .concat(`the page is ${document.documentElement.scrollWidth} wide`)
"""

DRAWN = """
(patience) => new Promise((resolve) => {
  const wanted = document.querySelectorAll('script[type$="widget-view+json"]').length;
  const drawn = () => [...document.querySelectorAll('.tf-widget .tf-body')]
    .filter((body) => body.childElementCount && body.getBoundingClientRect().height > 40).length;
  const start = Date.now();
  const look = () => drawn() >= wanted || Date.now() - start > patience ? resolve(drawn()) : setTimeout(look, 50);
  look();
})
"""

MOVE = """
async (index) => {
  const body = document.querySelectorAll('.tf-widget .tf-body')[index];
  const picture = () => {
    const copy = body.cloneNode(true);
    copy.querySelectorAll('.tf-control, .tf-stepper, input, select, button').forEach((control) => control.remove());
    return copy.innerHTML + [...body.querySelectorAll('canvas')].map((c) => c.toDataURL()).join();
  };
  const changes = async (before) => {
    for (let i = 0; i < 15 && picture() === before; i++) await new Promise((resolve) => setTimeout(resolve, 20));
    return picture() !== before;
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
    if (await changes(before)) return true;
  }
  return false;
}
"""
"""Whether moving one of a figure's controls, each in turn, changes something that is not a control."""

NONSENSE = """
(() => {
  const drawn = [...document.querySelectorAll('.tf-widget')].map((w) => w.outerHTML).join();
  return ['[object ', 'undefined', 'NaN'].filter((word) => drawn.includes(word));
})()
"""

GROUNDS = """
(() => {
  const root = document.documentElement;
  const before = root.dataset.theme;
  const found = new Set();
  for (const theme of ['light', 'dark']) {
    root.dataset.theme = theme;
    document.querySelectorAll('.cell_output img').forEach((i) => found.add(getComputedStyle(i).backgroundColor));
  }
  root.dataset.theme = before;
  return [...found];
})()
"""
