"""What a reader would see go wrong on a page: visit it in a browser, and follow its links in the files.

The tests of the built book ask here, and so do the tests that plant each fault in a page and require that it is found.
Playwright drives the Chromium or Chrome that is installed. Every host but the loopback is unreachable for it, so that a
page that asks the network for something fails.
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
ALONE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
DESKTOP, PHONE = 1280, 390
READABLE = 10
"""Pixels: the least height of a label's letters, capitals and descenders together."""


def executable() -> str | None:
    """Where Chromium or Chrome is, if it is installed."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


@contextmanager
def launched() -> Iterator[Browser]:
    """A browser without a window, which reaches nothing but this machine."""
    with sync_playwright() as playwright:
        args = [ALONE, "--force-color-profile=srgb"]
        yield playwright.chromium.launch(executable_path=executable(), chromium_sandbox=False, args=args)


@dataclass
class Tab:
    """A page of the browser, and what happened on it since it was last opened.

    Attributes:
        page: Playwright's page.
        messages: errors on the console, exceptions that nobody caught, requests that failed.
        requests: every address that it asked for.
    """

    page: Page
    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.page.set_default_timeout(60_000)
        self.page.on("console", lambda said: said.type == "error" and self.messages.append(with_place(said)))
        self.page.on("pageerror", lambda error: self.messages.append(error.stack or error.message))
        self.page.on("request", lambda asked: self.requests.append(asked.url))

    @classmethod
    def of_width(cls, browser: Browser, width: int) -> "Tab":
        """A tab on a screen of so many pixels; below 600 it is a phone."""
        return cls(browser.new_page(viewport={"width": width, "height": 900}, is_mobile=width < 600))

    def open(self, url: str) -> None:
        """Load a page, and wait until nothing is under way and its mathematics is typeset."""
        self.forget()
        self.page.goto(url, wait_until="networkidle")
        self.page.wait_for_function(SETTLED)

    def forget(self) -> None:
        """Let what happens from now on be all that happened."""
        self.messages.clear()
        self.requests.clear()


def with_place(said) -> str:
    """A message of the console, with the file that it is about."""
    return f"{said.text} {said.location.get('url', '')}"


@dataclass(frozen=True)
class Visit:
    """What one visit found.

    Attributes:
        errors: messages on the console, exceptions that nobody caught, requests that failed.
        outside: addresses that the page asked for, beyond its own server.
        missing: images that cannot be shown.
        raw: mathematics that is not typeset.
        too_wide: formulas that are cut off or must be scrolled, and what stands out of a page that can be moved.
        small: labels of figures that are less than ``READABLE`` pixels high, before and after the controls are moved.
        cut_tables: tables that are wider than their place. On a phone they scroll; a desktop shows them whole.
        cut_comments: comments of one line that go on outside of their listing, though there is room to begin in it.
        needlessly_moved: tables that are wider than their place and would fit it, in rows of nine lines at most.
        broken_tokens: tokens that begin with a space, and options, that break behind it or behind a dash.
        nameless: images that a screen reader cannot describe.
        figures: how many interactive figures the page has.
        drawn: how many of them drew themselves.
        still: those that stay the same when their controls are moved, counted from 0.
        cut_words: words that end outside of their interactive figure, before and after its controls are moved.
        nonsense: what only a fault of a figure's program writes into a page.
        grounds: the background colours of plotted figures, in both themes.
        copy_buttons: how many blocks of code have a button that copies them.
        hindrances: what axe-core says hinders readers with a disability, where it was asked.
    """

    errors: list[str]
    outside: list[str]
    missing: list[str]
    raw: list[str]
    too_wide: list[str]
    small: list[str]
    cut_tables: list[str]
    cut_comments: list[str]
    needlessly_moved: list[str]
    broken_tokens: list[str]
    nameless: list[str]
    figures: int
    drawn: int
    still: list[int]
    cut_words: list[str]
    nonsense: list[str]
    grounds: list[str]
    copy_buttons: int
    hindrances: list[str] = field(default_factory=list)


def visit(tab: Tab, url: str, *, patience: float = 10.0) -> Visit:
    """Open a page, play with its figures, and tell what was found.

    Args:
        tab: of the browser, as wide as the screen.
        url: the page's address.
        patience: seconds that the interactive figures may take to draw.
    """
    tab.open(url)
    evaluate, width = tab.page.evaluate, tab.page.viewport_size["width"]
    server = url[: url.index("/", len("http://")) + 1]
    figures = evaluate(FIGURES)
    drawn = evaluate(f"({DRAWN})({1000 * patience})") if figures else 0
    missing, raw = evaluate(MISSING_IMAGES), evaluate(RAW_MATHEMATICS)
    too_wide = evaluate(f"({TOO_WIDE})({width})")
    evaluate(UNFOLD)  # once: a page of long listings takes seconds to lay out
    too_wide += evaluate(SCROLLED)
    small, cut_words = evaluate(f"({SMALL})({READABLE})"), evaluate(CUT_WORDS)
    cut = {name: evaluate(code) for name, code in IN_FOLDS.items()}
    still = [i for i in range(drawn) if not evaluate(f"({MOVE})({i})")]
    small += evaluate(f"({SMALL})({READABLE})") if drawn else []
    evaluate(FOLD)
    return Visit(
        errors=list(tab.messages),
        outside=[asked for asked in tab.requests if not asked.startswith((server, "data:", "blob:"))],
        missing=missing,
        raw=raw,
        too_wide=too_wide,
        small=small,
        **cut,
        broken_tokens=evaluate(BROKEN_TOKENS),
        nameless=evaluate(NAMELESS),
        figures=figures,
        drawn=drawn,
        still=still,
        cut_words=[*cut_words, *evaluate(CUT_WORDS)],
        nonsense=evaluate(NONSENSE),
        grounds=evaluate(GROUNDS),
        copy_buttons=evaluate("document.querySelectorAll('button.copybtn').length"),
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


SETTLED = """
(() => {
  const maths = document.querySelector('.math') && document.querySelector('script[src*="mathjax"]');
  if (maths && !(window.MathJax && MathJax.startup && MathJax.startup.promise)) return false;
  return !maths || MathJax.startup.promise.then(() => true);
})()
"""

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
(width) => {
  const folded = [...document.querySelectorAll('article details:not([open])')];
  folded.forEach((one) => { one.open = true; });
  const around = (formula) => formula.closest('p, li, dd, article');
  const right = (element) => element.getBoundingClientRect().right;
  const cut = [...document.querySelectorAll('article mjx-container:not([display="true"])')]
    .filter((formula) => !formula.closest('.pst-scrollable-table-container'))
    .filter((formula) => right(formula) > right(around(formula)) + 1)
    .map((formula) => `a formula is cut off in: ${around(formula).textContent.trim().slice(0, 60)}`);
  folded.forEach((one) => { one.open = false; });
  if (document.documentElement.scrollWidth <= width) return cut;
  return cut.concat([...document.querySelectorAll('article *')].filter((e) => right(e) > width + 1)
    .filter((e) => !e.closest('pre, .pst-scrollable-table-container, .tf-scroll, mjx-container'))
    .slice(0, 5).map((e) => `${e.tagName}.${e.className}: ${e.textContent.trim().slice(0, 60)}`),
    `the page is ${document.documentElement.scrollWidth} wide`);
}
"""

SCROLLED = """
(async () => {
  const folded = [...document.querySelectorAll('article details:not([open])')];
  folded.forEach((one) => { one.open = true; });
  await new Promise((fitted) => setTimeout(fitted, 100));
  const found = [...document.querySelectorAll('article mjx-container[display="true"]')]
    .filter((formula) => formula.scrollWidth > formula.clientWidth + 1)
    .map((formula) => `a formula must be scrolled: ${formula.parentElement.textContent.trim().slice(0, 60)}`);
  folded.forEach((one) => { one.open = false; });
  return found;
})()
"""

UNFOLD = """
(async () => {
  window.opened = [...document.querySelectorAll('article details:not([open])')];
  window.opened.forEach((one) => { one.open = true; });
  await new Promise((told) => setTimeout(told, 100));
  for (let frame = 0; frame < 2; frame++) await new Promise(requestAnimationFrame); // phone.js fits before a frame
})()
"""
FOLD = "window.opened.forEach((one) => { one.open = false; })"

UNFOLDED = """
  const folded = [...document.querySelectorAll('article details:not([open])')];
  folded.forEach((one) => { one.open = true; });
"""

SMALL = f"""
(least) => {{
  {UNFOLDED}
  const scale = ({{ a, b }}) => Math.hypot(a, b);
  const found = [...document.querySelectorAll('article svg text')]
    .filter((label) => label.getBoundingClientRect().width > 0)
    .map((label) => [label, parseFloat(getComputedStyle(label).fontSize) * scale(label.getScreenCTM())])
    .concat([...document.querySelectorAll('article .cell_output img')].map((image) => {{
      const perInch = /svg/.test(image.currentSrc.slice(-4)) ? 96 : 200; // how matplotlib's two formats count
      const [look, inches] = [getComputedStyle(image), image.naturalWidth / perInch];
      const drawn = image.clientWidth - parseFloat(look.paddingLeft) - parseFloat(look.paddingRight);
      return [image, inches && drawn > 0 ? 9.5 * drawn / (72 * inches) : least]; // 9.5 points: the smallest label
    }}))
    .filter(([, size]) => size < least - 0.05)
    .map(([label, size]) => `${{size.toFixed(1)}} px: ${{(label.textContent || label.src).slice(-40)}}`);
  folded.forEach((one) => {{ one.open = false; }});
  return [...new Set(found)];
}}
"""

CUT_TABLES = f"""
(() => {{
  {UNFOLDED}
  const more = (table) => table.scrollWidth - table.parentElement.clientWidth;
  const found = [...document.querySelectorAll('article table')]
    .filter((table) => more(table) > 1 && table.parentElement.clientWidth)
    .map((table) => `${{more(table)}} px: ${{table.textContent.trim().slice(0, 60)}}`);
  folded.forEach((one) => {{ one.open = false; }});
  return found;
}})()
"""

FITTED = """
  const opened = [...document.querySelectorAll('article details:not([open])')];
  opened.forEach((one) => { one.open = true; });
  await new Promise((told) => setTimeout(told, 100));
  for (let frame = 0; frame < 2; frame++) await new Promise(requestAnimationFrame); // phone.js fits before a frame
"""

CUT_COMMENTS = f"""
(async () => {{
  {FITTED}
  const found = [...document.querySelectorAll('article .highlight pre :is(.c1, .sd)')]
    .filter((comment) => !comment.textContent.includes('\\n'))
    .filter((comment) => {{
      const [pre, own] = [comment.closest('pre'), comment.getBoundingClientRect()];
      const end = pre.getBoundingClientRect().right - pre.scrollLeft;
      return own.width && own.left < end - 110 && own.right > end + 1;
    }})
    .map((comment) => comment.textContent.slice(0, 60));
  opened.forEach((one) => {{ one.open = false; }});
  return found;
}})()
"""

NEEDLESSLY_MOVED = f"""
(async () => {{
  {FITTED}
  const found = [...document.querySelectorAll('article table')].filter((table) => {{
    const room = table.parentElement.clientWidth;
    if (!room || table.scrollWidth <= room + 1) return false;
    const style = table.getAttribute('style');
    table.style.cssText = 'width: 100% !important; min-width: 0 !important; max-width: none !important';
    const tallest = Math.max(...[...table.rows].map((row) => row.clientHeight));
    const fits = table.scrollWidth <= room + 1 && tallest <= 9 * parseFloat(getComputedStyle(table).lineHeight);
    if (style === null) table.removeAttribute('style'); else table.setAttribute('style', style);
    return fits;
  }}).map((table) => table.textContent.trim().slice(0, 60));
  opened.forEach((one) => {{ one.open = false; }});
  return found;
}})()
"""

IN_FOLDS = {"cut_tables": CUT_TABLES, "cut_comments": CUT_COMMENTS, "needlessly_moved": NEEDLESSLY_MOVED}

BROKEN_TOKENS = r"""
[...document.querySelectorAll('article code, article code .pre')]
  .filter((code) => (code.matches('.pre') ? /^--?[\w-]{1,24}$/ : /^['"]? \S+$/).test(code.textContent))
  .filter((code) => code.getClientRects().length > 1)
  .map((code) => code.closest('code').parentElement.textContent.trim().slice(0, 60))
"""

NAMELESS = r"""
[...document.querySelectorAll('article img')]
  .filter((image) => image.alt.trim().length < 10 || /\.(png|svg)$|^image$/.test(image.alt))
  .map((image) => `${image.src.slice(-40)}: ${image.alt}`)
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

CUT_WORDS = """
[...document.querySelectorAll('.tf-widget svg')].flatMap((picture) => {
  const { left, right } = picture.getBoundingClientRect();
  return [...picture.querySelectorAll('text')]
    .filter((words) => words.getBoundingClientRect().width)
    .filter((words) => words.getBoundingClientRect().left < left - 1 || words.getBoundingClientRect().right > right + 1)
    .map((words) => words.textContent.trim().slice(0, 60));
})
"""

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
