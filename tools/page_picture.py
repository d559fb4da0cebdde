"""Take the README's picture of a page: ``python -m tools.page_picture`` writes ``book/images/page.png``.

It opens chapter 2 of the built book (``make book``) in Chromium, at its interactive figure. The picture carries a
checksum of the figure's program, and a test asks for a new picture when the program has changed.
"""

import hashlib
import io
import shutil
import sys
from collections.abc import Sequence

import matplotlib.image

from tformer_lib import command_line
from tformer_lib.teaching.widgets.attention import Lookup
from tools.chapters import ROOT

PAGE = ROOT / "book" / "_build" / "html" / "notebooks" / "02-attention.html"
PICTURE = ROOT / "book" / "images" / "page.png"
SIZE = {"width": 1280, "height": 800}
ABOVE = 185
"""Pixels of the page that are shown above the figure."""

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def checksum() -> str:
    """Of the program and the look of the figure."""
    return hashlib.sha256((Lookup._esm + Lookup._css).encode()).hexdigest()[:16]


def shot(browser: str) -> bytes:
    """The page in the light theme, as a PNG."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=browser, chromium_sandbox=False).new_page(
            viewport=SIZE, color_scheme="light"
        )
        page.goto(PAGE.as_uri(), wait_until="networkidle")
        page.wait_for_selector(".tf-widget svg text")
        page.evaluate("MathJax.startup.promise")
        top = "document.querySelector('.tf-widget').getBoundingClientRect().top"
        page.evaluate(f"window.scrollBy({{ top: {top} - {ABOVE}, behavior: 'instant' }})")
        page.wait_for_timeout(500)
        return page.screenshot()


def take() -> int:
    """Take the picture, if the book is built and a browser is here."""
    browser = next((path for path in map(shutil.which, BROWSERS) if path), None)
    if browser is None or not PAGE.exists():
        print("Chromium is not installed" if browser is None else "the book is not built: make book", file=sys.stderr)
        return 1
    pixels = (255 * matplotlib.image.imread(io.BytesIO(shot(browser)))).astype("uint8")
    matplotlib.image.imsave(PICTURE, pixels, metadata={"figure": checksum(), "Software": None})
    print(f"wrote {PICTURE.name}, {PICTURE.stat().st_size // 1000} kB")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Take the picture."""
    return command_line.without_options(take, arguments, program="python -m tools.page_picture", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
