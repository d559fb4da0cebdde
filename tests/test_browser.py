"""The built book in a real browser that can reach nothing but this machine.

Every page is opened in headless Chromium, at a desktop's and at a phone's width. A page fails that asks the network for
anything, reports an error, shows an image that is missing or mathematics that is not typeset, or is wider than a phone.
Every interactive figure must draw, and draw something else when its control is moved. Links are followed in the files.
What is looked at stands in ``pages.py``; each fault is also planted in a page here, and must be found.

Without Chromium, or where MathJax could not be fetched by ``tools/vendor.py``, these tests are skipped and say why.
"""

import functools
import http.server
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote

import pytest
import yaml
from bs4 import BeautifulSoup
from pages import DESKTOP, DRAWN, PHONE, Tab, Visit, broken_links, executable, launched, visit

from tformer_lib import teaching

ROOT = Path(__file__).resolve().parents[1]
CONTENTS = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
PAGES = [CONTENTS["root"], *(chapter["file"] for part in CONTENTS["parts"] for chapter in part["chapters"])]
CHAPTERS = [page for page in PAGES if page.startswith("notebooks/")]

AXE = (
    "axe-core@4.10.3",
    "Xm7bpRXnDSX2YE2YFfBk2FnF0ep6tmG7xPh8iHee8MIcrgq762Nkce856dYtJYLkuIoYZvGfTs/PbZhideTcEg==",
)
"""Package and version, and the archive's SHA-512."""

KINDS_OF_PAGE = ["index", "glossary", "notebooks/03-masks"]
"""Pages that together show every kind of part. The dark theme has the same colours on all, so it is read on these."""

EXAMINED = PAGES if os.environ.get("CI") else KINDS_OF_PAGE
"""Pages that axe-core reads in the light theme: all of them in CI; at home some seconds a page are saved."""

LIGHT = 2_000_000
"""Bytes: the most that the HTML and the pictures of a chapter may weigh together."""

WITH_FIGURE = "notebooks/11-sparse-attention"
"""A page with an interactive figure, in which faults are planted."""

pytestmark = pytest.mark.skipif(executable() is None, reason="Chromium is not installed (apt install chromium)")


def script(path: Path):
    """A script of the book as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Server(http.server.SimpleHTTPRequestHandler):
    """A file server that writes no log, and can be told to be slow."""

    late: ClassVar[dict[str, float]] = {}
    """File name -> seconds that it is held back."""

    def do_GET(self):
        """Answer one request."""
        name = self.path.partition("?")[0].rpartition("/")[2]
        time.sleep(self.late.get(name, 0))
        super().do_GET()

    def log_message(self, *_):
        """Nothing."""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder of the book: ``$TFORMER_BOOK``, which ``make book`` has just built, or built anew as it does."""
    subprocess.run([sys.executable, "-m", "tools.vendor"], cwd=ROOT, check=True, capture_output=True)
    if not (ROOT / "book" / "vendor" / "offline" / "complete").exists():
        pytest.skip("MathJax and the widget manager could not be fetched (npm pack)")
    if "TFORMER_BOOK" in os.environ:
        return Path(os.environ["TFORMER_BOOK"])
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
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def tabs() -> dict[int, Tab]:
    """Width -> a tab of it, of one browser for all pages."""
    with launched() as browser:
        yield {width: Tab.of_width(browser, width) for width in (DESKTOP, PHONE)}


@pytest.fixture
def desktop(tabs) -> Tab:
    """A tab as wide as a desktop's screen."""
    return tabs[DESKTOP]


@pytest.fixture(scope="module")
def seen(tabs, address, axe):
    """``seen(page, width)``: what a visit found, and axe-core at a desktop's width.

    Each page is opened once at each width, for all the tests: to open a chapter takes seconds.
    """

    @functools.cache
    def look(page: str, width: int) -> Visit:
        found = visit(tabs[width], f"{address}{page}.html")
        if axe and width == DESKTOP and page in EXAMINED:
            found = replace(found, hindrances=hindrances(tabs[width], axe))
        return found

    return look


@pytest.mark.parametrize("page", PAGES)
def test_page_is_whole(seen, page):
    found = seen(page, DESKTOP)
    assert found.errors == []
    assert found.outside == []
    assert found.missing == []
    assert found.raw == []


@pytest.mark.parametrize("page", PAGES)
def test_page_fits_a_phone(seen, page):
    found = seen(page, PHONE)
    assert found.too_wide == []
    assert found.cut_comments == []
    assert found.needlessly_moved == []
    assert found.broken_tokens == []
    assert found.errors == []


@pytest.mark.parametrize("page", PAGES)
def test_a_desktop_shows_all_of_a_page(seen, page):
    found = seen(page, DESKTOP)
    assert found.too_wide == []
    assert found.cut_tables == []
    assert found.broken_tokens == []


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_labels_of_figures_can_be_read(seen, page, width):
    assert seen(page, width).small == []


@pytest.mark.parametrize("page", PAGES)
def test_images_say_what_they_show(seen, page):
    assert seen(page, DESKTOP).nameless == []


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_interactive_figures_move(seen, page, width):
    found = seen(page, width)
    assert found.drawn == found.figures, found.errors
    assert found.still == [], "these figures, counted from 0, do not change when their controls are moved"
    assert found.nonsense == []


@pytest.mark.parametrize("page", CHAPTERS)
@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_words_of_interactive_figures_are_whole(seen, page, width):
    assert seen(page, width).cut_words == []


def test_names_are_whole_in_a_table_that_fits_a_desktop(desktop, address):
    desktop.open(address + "notebooks/17-flash-hopper.html")
    names = desktop.page.evaluate("""[...document.querySelectorAll("article table code")]
        .filter((code) => /^[\\w.]{8,24}$/.test(code.textContent))
        .map((code) => [code.textContent, code.getClientRects().length])""")
    assert "4a_one_warpgroup.cu" in dict(names)
    assert {name: lines for name, lines in names if lines > 1} == {}


MOVED = """
() => {
  const container = (table) => table.closest('.pst-scrollable-table-container');
  const table = [...document.querySelectorAll('article table')].find((t) => t.matches('.tf-named'));
  const box = container(table);
  const cell = table.rows[1].cells[0];
  const look = () => [getComputedStyle(box).maskImage !== 'none', Math.round(cell.getBoundingClientRect().left)];
  const before = look();
  box.scrollLeft = box.scrollWidth;
  return new Promise((told) => requestAnimationFrame(() => requestAnimationFrame(() => told([before, look()]))));
}
"""


def test_a_table_that_is_moved_shows_that_it_goes_on_and_keeps_its_names(tabs, address):
    tabs[PHONE].open(f"{address}teachers.html")
    page = tabs[PHONE].page
    (faded, left), (still_faded, moved_to) = page.evaluate(MOVED)
    assert faded
    assert not still_faded, "at its end nothing goes on"
    assert abs(moved_to - left) <= 2  # its border goes out of sight
    fading = "[...document.querySelectorAll('.tf-more')].every((box) => box.scrollWidth > box.clientWidth + 2)"
    assert page.evaluate(fading)


def test_a_phone_shows_what_is_a_little_too_wide_and_marks_what_is_cut(tabs, address):
    tabs[PHONE].open(f"{address}notebooks/21-scaling-out.html")
    page = tabs[PHONE].page
    page.evaluate("document.querySelectorAll('article details').forEach((one) => { one.open = true; })")
    page.evaluate("new Promise((told) => requestAnimationFrame(() => requestAnimationFrame(told)))")
    unmarked = """[...document.querySelectorAll('article table')]
        .map((table) => [table, table.parentElement])
        .filter(([table, box]) => box.scrollWidth > box.clientWidth + 2 && !box.classList.contains('tf-more'))
        .map(([table]) => table.textContent.trim().slice(0, 60))"""
    assert page.evaluate(unmarked) == []
    assert page.evaluate("document.querySelectorAll('.tf-more').length") > 0
    longest = """[...document.querySelectorAll('.output.stream.tf-small pre')].map((pre) => {
        const lines = pre.textContent.trimEnd().split('\\n').length;
        return pre.clientHeight / parseFloat(getComputedStyle(pre).lineHeight) - lines;
    })"""
    extra = page.evaluate(longest)
    assert extra
    assert max(extra) < 3, "a line was broken although it is set smaller"


def test_what_a_phone_breaks_off_a_printed_line_is_indented(tabs, address):
    tabs[PHONE].open(f"{address}notebooks/21-scaling-out.html")
    lines = tabs[PHONE].page.evaluate("""[...document.querySelectorAll('.output.stream pre')]
        .filter((pre) => pre.querySelector('.tf-line') && pre.clientWidth)
        .flatMap((pre) => [...pre.querySelectorAll('.tf-line')].map((line) => {
            const words = document.createRange();
            words.selectNodeContents(line);
            const lefts = [...new Set([...words.getClientRects()].map((one) => Math.round(one.left)))];
            return [lefts, pre.textContent === [...pre.childNodes].map((one) => one.textContent).join('')];
        }))""")
    broken = [lefts for lefts, _ in lines if len(lefts) > 1]
    assert broken
    assert all(first < min(rest) for first, *rest in broken)
    assert all(whole for _, whole in lines)


def test_the_results_name_case_and_contestant_beside_their_numbers_on_a_phone(tabs, address):
    names = """[...document.querySelectorAll('article table:has(.tf-of) tr:nth-child(1) td')].slice(0, 3)
        .map((cell) => [cell.innerText.trim(), cell.offsetWidth > 0])"""
    for width, seen in ((PHONE, [True, False, True]), (DESKTOP, [True, True, True])):
        tabs[width].open(f"{address}results.html")
        cells = tabs[width].page.evaluate(names)
        assert [shown for _, shown in cells] == seen
        assert (": train_bpe" in cells[0][0]) == (width == PHONE)


def test_a_table_in_a_folded_box_is_fitted_when_the_box_is_opened(tabs, address):
    tabs[PHONE].open(f"{address}results.html")
    page = tabs[PHONE].page
    box = page.locator(".admonition.toggle", has_text="sanitizer").first
    box.locator(".toggle-button").click()
    page.evaluate("new Promise((told) => requestAnimationFrame(() => requestAnimationFrame(told)))")
    cut = box.evaluate("""(box) => [...box.querySelectorAll("table")].map((table) => table.parentElement)
        .filter((box) => box.scrollWidth > box.clientWidth + 2 && !box.classList.contains("tf-more")).length""")
    assert box.locator("table").first.is_visible()
    assert cut == 0


def test_a_number_in_code_is_not_broken(tabs, address):
    tabs[PHONE].open(f"{address}results.html")
    broken = """[...document.querySelectorAll('article code wbr')]
        .map((mark) => `${mark.previousSibling?.textContent}|${mark.nextSibling?.textContent}`)
        .filter((around) => /\\d\\.\\|\\d/.test(around))"""
    assert tabs[PHONE].page.evaluate(broken) == []


def test_links_in_a_table_have_the_colour_of_links(desktop, address):
    desktop.open(f"{address}setup.html")
    colours = "[...document.querySelectorAll('article td a, article p a')].map((link) => getComputedStyle(link).color)"
    assert len(set(desktop.page.evaluate(colours))) == 1


def test_the_frame_of_a_command_ends_in_its_cell(desktop, address):
    desktop.open(f"{address}status.html")
    outside = """
    [...document.querySelectorAll('article td code')].filter((code) => {
      const end = code.closest('td').getBoundingClientRect().right;
      return [...code.querySelectorAll('.pre')].some((part) => part.getBoundingClientRect().right > end + 1)
        || code.getBoundingClientRect().right > end + 1;
    }).map((code) => code.textContent)
    """
    assert desktop.page.evaluate(outside) == []


def test_the_list_of_contents_stays_on_the_screen(desktop, address):
    """The theme does not break names in code, so long names of files ran out of the window."""
    desktop.open(f"{address}/results.html")
    ends = desktop.page.evaluate(
        "[...document.querySelectorAll('.bd-sidebar-secondary code')].map(e => e.getBoundingClientRect().right)"
    )
    assert ends
    assert max(ends) <= desktop.page.viewport_size["width"]


def test_a_date_in_a_table_stays_on_one_line(desktop, address):
    desktop.open(f"{address}/status.html")
    lines = desktop.page.evaluate(
        "[...document.querySelectorAll('td:nth-child(4) .tf-joined')].map(e => e.getClientRects().length)"
    )
    assert set(lines) == {1}


def test_there_are_interactive_figures(seen):
    assert sum(seen(page, DESKTOP).figures for page in CHAPTERS) >= 10


@pytest.mark.parametrize("page", CHAPTERS)
def test_both_themes_show_figures_on_a_light_ground(seen, page):
    assert set(seen(page, DESKTOP).grounds) <= {"rgb(255, 255, 255)"}


@pytest.mark.parametrize("page", CHAPTERS)
def test_chapter_offers_its_tools(seen, site, page):
    soup = BeautifulSoup((site / f"{page}.html").read_text(encoding="utf-8"), "html.parser")
    assert seen(page, DESKTOP).copy_buttons >= 5, "blocks of code can be copied"
    assert any(link["href"].endswith(".ipynb") for link in soup.select("a[href]")), "the notebook can be downloaded"
    assert soup.select_one("a.left-prev")
    assert soup.select_one("a.right-next")
    assert soup.select_one("input[type=search]")


@pytest.mark.parametrize("page", CHAPTERS)
def test_chapter_is_light(site, page):
    html = site / f"{page}.html"
    soup = BeautifulSoup(html.read_text(encoding="utf-8"), "html.parser")
    images = {(html.parent / unquote(image["src"])).resolve() for image in soup.select("img[src]")}
    weight = html.stat().st_size + sum(image.stat().st_size for image in images if image.exists())
    assert weight <= LIGHT, f"{weight / 1e6:.1f} MB"


@pytest.mark.parametrize("page", CHAPTERS)
def test_chapter_links_its_terms_once(site, page):
    soup = BeautifulSoup((site / f"{page}.html").read_text(encoding="utf-8"), "html.parser")
    linked = [link["href"] for link in soup.select("a.tf-term")]
    assert len(linked) >= 3
    assert len(set(linked)) == len(linked)
    assert all(link.startswith("../glossary.html#term-") for link in linked)


@pytest.mark.parametrize("page", CHAPTERS)
def test_what_is_printed_stands_where_the_notebook_has_it(site, page):
    soup = BeautifulSoup((site / f"{page}.html").read_text(encoding="utf-8"), "html.parser")
    shown = {" ".join(block.get_text().split()) for block in soup.select(".cell_output .stream pre")}
    cells = json.loads((ROOT / f"{page}.ipynb").read_text(encoding="utf-8"))["cells"]
    for cell in (cell for cell in cells if "remove-output" not in cell["metadata"].get("tags", [])):
        printed = [part["text"] for part in cell.get("outputs", []) if part["output_type"] == "stream"]
        if len(printed) > 1:  # between them stand tables or figures, which they introduce
            assert {" ".join("".join(text).split()) for text in printed} <= shown


def test_internal_links_and_anchors_resolve(site):
    assert broken_links(site) == []


def test_search_finds_a_word(desktop, address):
    desktop.open(f"{address}search.html?q=softmax")
    found = desktop.page.evaluate("[...document.querySelectorAll('#search-results li a')].map((a) => a.href).join()")
    assert "notebooks/02-attention.html" in found
    assert desktop.messages == []


def test_inline_code_keeps_the_space_before_a_token(desktop, address):
    desktop.open(f"{address}notebooks/00-ten-minutes.html")
    widths = desktop.page.evaluate(
        """(() => {
          const code = [...document.querySelectorAll('p code')].find((e) => e.textContent === ' Lily');
          const before = code.getBoundingClientRect().width;
          code.textContent = 'Lily';
          return [before, code.getBoundingClientRect().width];
        })()"""
    )
    assert widths[0] > widths[1] + 4


TRANSPOSED = "[...document.querySelectorAll('mjx-container[display=true]')].filter((e) => e.textContent.includes('⊤'))"


BETWEEN_PIXELS = """(e) => {
  const top = e.getBoundingClientRect().top;
  e.parentElement.style.position = 'relative';
  e.parentElement.style.top = `${0.5 - (top - Math.floor(top))}px`;
}"""
"""Move a formula half way between two rows of pixels: where it begins with a row, a bar that is cut may show."""


def pictures(page, style: str) -> list[bytes]:
    """Each displayed formula with a transposition sign, and the room around it, in a style."""
    found = []
    for number in range(page.evaluate(f"{TRANSPOSED}.length")):
        formula = page.evaluate_handle(f"{TRANSPOSED}[{number}]").as_element()
        formula.evaluate("(e, style) => { [e, e.parentElement].forEach((one) => { one.style = style; }); }", style)
        formula.scroll_into_view_if_needed()
        formula.evaluate(BETWEEN_PIXELS)
        box = formula.query_selector("mjx-math").bounding_box()
        found.append(page.screenshot(clip=box | {"y": box["y"] - 8, "height": box["height"] + 16}))
    return found


def test_the_bar_of_a_transposition_sign_is_drawn(desktop, address):
    desktop.open(f"{address}notebooks/02-attention.html")
    assert pictures(desktop.page, "") == pictures(desktop.page, "overflow: visible")
    tight = "padding-block: 0"  # the fault: the bar stands out of the formula's line, and is cut off
    assert pictures(desktop.page, tight) != pictures(desktop.page, f"{tight}; overflow: visible")


def test_first_paint_does_not_wait_for_interactive_figures(desktop, address, monkeypatch):
    monkeypatch.setattr(Server, "late", {"embed-amd.js": 1.5})
    desktop.page.route("**/*", lambda route: route.continue_())  # nothing comes from the cache
    desktop.open(f"{address}{WITH_FIGURE}.html")
    desktop.page.unroute("**/*")
    painted = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
    arrived = "performance.getEntriesByType('resource').find((r) => r.name.includes('embed-amd')).responseEnd"
    assert desktop.page.evaluate(f"{painted} < {arrived}")


@pytest.mark.parametrize(
    ("typed", "chapter"),
    [("kv cache", "09-kv-cache"), ("byte pair encoding", "01-tokens"), ("rotary", "08-rope"), ("GQA", "10-grouped")],
)
def test_search_finds_the_chapter_first(desktop, address, typed, chapter):
    desktop.open(f"{address}search.html?q={typed.replace(' ', '+')}")
    assert desktop.page.evaluate(FIRST_FOUND).startswith(f"notebooks/{chapter}")


def test_a_stepper_keeps_the_keyboard_at_its_ends(desktop, address):
    desktop.open(f"{address}notebooks/15-flash-math.html")
    desktop.page.evaluate(f"({DRAWN})(10000)")
    desktop.page.evaluate("document.querySelectorAll('.tf-stepper button')[1].focus(); 0")
    for key, number in [("End", 6), ("ArrowRight", 6), ("ArrowLeft", 5), ("Home", 1), ("ArrowRight", 2)]:
        desktop.page.keyboard.press(key)
        assert f"step {number} of 6" in desktop.page.evaluate("document.querySelector('.tf-where').textContent")
    assert desktop.page.evaluate("document.activeElement.textContent") == "Next"


LOOKUP = """
(async (values, story, log) => {
  const [query, temperature] = document.querySelectorAll('.tf-widget input[type=range]');
  const [stories, kinds] = document.querySelectorAll('.tf-widget select');
  for (const [control, value] of [[temperature, log], [stories, story], [kinds, values]]) {
    control.value = value;
    control.dispatchEvent(new Event(control.tagName === 'SELECT' ? 'change' : 'input'));
  }
  return document.querySelector('.tf-readout').textContent;
})
"""
"""Set the controls of the lookup of chapter 2; what its readout then says."""


@pytest.fixture(scope="module")
def figure(tabs, address):
    """``figure(page)``: a tab with the page, whose figure is drawn. One tab serves all tests that set all controls."""

    @functools.cache
    def opened(page: str) -> Tab:
        tab = Tab.of_width(tabs[DESKTOP].page.context.browser, DESKTOP)
        tab.open(f"{address}{page}.html")
        tab.page.evaluate(f"({DRAWN})(10000)")
        return tab

    return opened


@pytest.mark.parametrize(
    ("values", "story", "log", "says"),
    [
        ("v", 0, 0, "“Lily” 0.85 and “I” 0.12. Output: (0.85, 0.00)"),
        ("v", 1, 0, "“Ben” 0.85 and “I” 0.12. Output: (0.00, 0.85)"),
        ("k", 1, 0, "Output: (0.91, 0.00)"),
        ("v", 0, 2, "“Lily” 0.73"),  # a temperature of the root of 2
    ],
)
def test_the_lookup_computes_the_numbers_of_the_page(figure, values, story, log, says):
    assert says in figure("notebooks/02-attention").page.evaluate(f"{LOOKUP}('{values}', {story}, {log})")


SAMPLER = """
((place, settings) => {
  const menu = document.querySelector('.tf-widget select');
  menu.value = place;
  menu.dispatchEvent(new Event('change'));
  const sliders = document.querySelectorAll('.tf-widget input[type=range]');
  settings.forEach((value, i) => {
    sliders[i].value = value;
    sliders[i].dispatchEvent(new Event('input'));
  });
  return document.querySelector('.tf-readout').textContent;
})
"""
"""Set the place and the four sliders of the sampler of chapter 7; what its readout then says."""


@pytest.mark.parametrize(
    ("place", "settings", "says"),
    [
        (
            0,
            [10, 0, 0, 0],
            "1,024 of 1,024 tokens can be drawn. The likeliest is “little” with 0.372. The entropy is 1.64",
        ),
        (0, [20, 0, 2, 0], "100 of 1,024 tokens"),  # temperature 2, top-p 0.90
        (0, [20, 0, 0, 2], "6 of 1,024 tokens"),  # temperature 2, min-p 0.10
        (3, [10, 4, 0, 0], "5 of 1,024 tokens can be drawn. The likeliest is “Lily” with 1.000"),
    ],
)
def test_the_sampler_computes_the_numbers_of_the_page(figure, place, settings, says):
    assert says in figure("notebooks/07-generation").page.evaluate(f"{SAMPLER}({place}, {settings})")


def test_the_sampler_s_bars_can_be_dragged_and_drawn_from(desktop, address):
    desktop.open(f"{address}notebooks/07-generation.html")
    desktop.page.evaluate(f"({DRAWN})(10000)")
    dragged = """
    (() => {
      const bar = () => document.querySelector('.tf-widget [role=slider]');
      const start = bar().getBoundingClientRect();
      const event = (type, dx) => new PointerEvent(type, { clientX: start.x + dx, bubbles: true });
      const at = (type, target, dx) => target.dispatchEvent(event(type, dx));
      at('pointerdown', bar(), 0);
      at('pointermove', window, 60);
      at('pointerup', window, 60);
      const moved = Number(bar().getAttribute('aria-valuenow'));
      bar().dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowLeft', bubbles: true }));
      return [moved, Number(bar().getAttribute('aria-valuenow'))];
    })()
    """
    moved, then = desktop.page.evaluate(dragged)
    assert moved > 0.4, "it was 0.372"
    assert then == pytest.approx(moved - 0.01, abs=0.002)
    drawn = """
    (() => {
      document.querySelectorAll('.tf-widget .tf-button')[1].click();
      return document.querySelectorAll('.tf-readout')[1].textContent;
    })()
    """
    assert re.search(r"“little” came \d+ times in 1,000 draws; expected are \d+", desktop.page.evaluate(drawn))


def test_print_shows_what_was_folded_and_in_the_light_theme(desktop, address):
    desktop.open(f"{address}{WITH_FIGURE}.html")
    desktop.page.evaluate("document.documentElement.dataset.theme = 'dark'")
    desktop.page.evaluate("window.dispatchEvent(new Event('beforeprint')); 0")
    desktop.page.emulate_media(media="print")
    desktop.page.evaluate("new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)))")
    folded, theme = desktop.page.evaluate(FOLDED), desktop.page.evaluate("document.documentElement.dataset.theme")
    drawn = desktop.page.evaluate("document.querySelector('.tf-widget svg').getBoundingClientRect().height")
    desktop.page.emulate_media(media="null")
    desktop.page.evaluate("window.dispatchEvent(new Event('afterprint')); 0")
    assert folded == []
    assert theme == "light"
    assert drawn > 40
    assert desktop.page.evaluate("document.documentElement.dataset.theme") == "dark"


@pytest.fixture(scope="module")
def axe(tmp_path_factory) -> str:
    """The source of axe-core, which finds what hinders readers with a disability; empty where it cannot be fetched."""
    vendor = script(ROOT / "tools" / "vendor.py")
    try:
        package = vendor.fetch(*AXE, tmp_path_factory.mktemp("axe"))
    except vendor.Unavailable:
        return ""
    return (package / "axe.min.js").read_text(encoding="utf-8")


def hindrances(tab: Tab, axe: str) -> list[str]:
    """What axe-core finds on the page that is open."""
    tab.page.mouse.move(1, 1)  # nothing is hovered over
    tab.page.evaluate(AT_REST)
    tab.page.evaluate(f"{axe}; 0")
    return tab.page.evaluate(SERIOUS_FINDINGS)


@pytest.mark.parametrize("page", EXAMINED)
def test_page_is_accessible(seen, axe, page):
    if not axe:
        pytest.skip("axe-core could not be fetched (npm pack)")
    assert seen(page, DESKTOP).hindrances == []


@pytest.fixture
def dark(desktop, address) -> Tab:
    """The desktop's tab for a reader who chose the dark theme."""
    choose = "(theme) => { localStorage.setItem('mode', theme); localStorage.setItem('theme', theme); }"
    desktop.open(f"{address}index.html")
    desktop.page.evaluate(choose, "dark")
    yield desktop
    desktop.page.evaluate("localStorage.clear()")


@pytest.mark.parametrize("page", KINDS_OF_PAGE)
def test_page_is_accessible_in_the_dark(dark, address, axe, page):
    if not axe:
        pytest.skip("axe-core could not be fetched (npm pack)")
    dark.open(f"{address}{page}.html")
    assert dark.page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert hindrances(dark, axe) == []


# The tests themselves: a fault that is planted is found.


@pytest.fixture
def planted(tabs, address, site):
    """``planted(page, old, new, width)``: a visit of the page in which ``new`` stands instead of ``old``."""
    written = []

    def plant(page: str, old: str, new: str, width: int):
        html = (site / f"{page}.html").read_text(encoding="utf-8")
        assert old in html
        file = (site / f"{page}.html").with_stem("planted")
        file.write_text(html.replace(old, new), encoding="utf-8")
        written.append(file)
        return visit(tabs[width], f"{address}{file.relative_to(site)}", patience=1.5)

    yield plant
    for file in written:
        file.unlink()


FAULTS = r"""
<img src="https://example.org/outside.png" alt="">
<img src="no-picture.png" alt=""> <img loading="lazy" style="margin-top:9000px" src="no-lazy-picture.png" alt="">
<p>The score is $q \cdot k$.</p> <span class="math">\(\nosuchmacro\)</span> <span class="math">\(x^a^b\)</span>
<div style="width:700px">too wide</div>
<div class="math">\[111111111 + 222222222 + 333333333 + 444444444 + 555555555 + 666666666\]</div>
<details><p>Long: <span class="math">\(111111111 + 222222222 + 333333333 + 444444444 + 55555555\)</span></p></details>
<script>console.error('a message');</script> <script>throw new Error('an exception');</script>
<script src="no-script.js"></script>
<div class="highlight"><pre><i class="c1"># a comment</i><b class="c1"># of a line that ends outside it</b></pre></div>
<div><table style="min-width:500px !important"><tr><td>words</td><td>would</td><td>fit</td></tr></table></div>
<p style="width:40px"><code>' Lily'</code> <code><span class="pre">--dashes</span></code></p>
<style>.c1 { display: inline !important; white-space: pre !important }
code, .pre { white-space: normal !important; overflow-wrap: normal !important }
pre { font-size: 30px !important }</style>
</article>"""


def test_what_hinders_a_reader_is_found(desktop, address, axe):
    if not axe:
        pytest.skip("axe-core could not be fetched (npm pack)")
    desktop.open(f"{address}index.html")
    desktop.page.evaluate("document.querySelector('article').insertAdjacentHTML('beforeend', '<button></button>')")
    assert [found.partition(",")[0] for found in hindrances(desktop, axe)] == ["button-name"]


def test_faults_of_a_page_are_found(planted):
    found = planted("notation", "</article>", FAULTS, PHONE)
    assert found.outside == ["https://example.org/outside.png"]
    for name in ("outside.png", "no-picture.png", "no-lazy-picture.png"):
        assert any(name in address for address in found.missing)
    assert any("q \\cdot k" in text for text in found.raw)
    assert any("nosuchmacro" in text for text in found.raw)
    assert any("Double exponent" in text for text in found.raw)
    assert any("too wide" in part for part in found.too_wide), found.too_wide
    assert any("a formula is cut off in: Long" in part for part in found.too_wide), found.too_wide
    assert any("must be scrolled: 111111111" in part for part in found.too_wide), found.too_wide
    assert any("of a line that ends outside" in text for text in found.cut_comments), found.cut_comments
    assert any("words" in text for text in found.needlessly_moved), found.needlessly_moved
    assert len([text for text in found.broken_tokens if "Lily" in text and "dashes" in text]) == 2
    for words in ("a message", "an exception", "no-script.js"):
        assert any(words in message for message in found.errors)


@pytest.mark.parametrize(
    ("render", "finds"),
    [
        ("() => {}", lambda found: found.drawn == 0),
        ("() => { throw new Error('no figure') }", lambda found: found.drawn == 0 and found.errors),
        (
            "(c) => { renderWith(draw)(c); c.el.querySelectorAll('input, select, button')"
            ".forEach((control) => control.replaceWith(control.cloneNode(true))) }",
            lambda found: found.drawn == 1 and found.still == [0],
        ),
        ("(c) => { renderWith(draw)(c); c.el.firstChild.append(0 / 0) }", lambda found: found.nonsense == ["NaN"]),
        (
            "(c) => { renderWith(draw)(c); c.el.querySelector('.tf-widget').insertAdjacentHTML('beforeend',"
            " '<svg width=60><text x=50 y=20>too far</text></svg>') }",
            lambda found: "too far" in found.cut_words,
        ),
    ],
    ids=["draws nothing", "throws", "does not answer", "writes NaN", "cuts words off"],
)
def test_faults_of_a_figure_are_found(planted, render, finds):
    found = planted(WITH_FIGURE, "render: renderWith(draw)", f"render: {render}", DESKTOP)
    assert found.figures == 1
    assert finds(found), found


def test_broken_links_are_found(tmp_path):
    (tmp_path / "a.html").write_text('<h1 id="top">A</h1> <a href="b.html#there">b</a> <a href="b.html#lost">lost</a>')
    (tmp_path / "b.html").write_text('<p id="there">B</p> <a href="a.html">a</a> <a href="c.html">none</a>')
    assert broken_links(tmp_path) == ["a.html: b.html#lost", "b.html: c.html"]


SERIOUS_FINDINGS = """
axe.run({ exclude: [['mjx-container'], ['.highlight'], ['svg.tf-picture > *']] }, { runOnly: ['wcag2a', 'wcag2aa'] })
  .then((found) => found.violations
  .filter((v) => ['serious', 'critical'].includes(v.impact))
  .map((v) => `${v.id}, ${v.nodes.length} times: ${v.nodes[0].html.slice(0, 200)} ${v.nodes[0].failureSummary}`))
"""

AT_REST = """
new Promise((resolve) => {
  const look = () => {  // not by their promises: that of a transition inside a part that is folded may stay open
    document.getAnimations().some((one) => one.playState === 'running') ? setTimeout(look, 50) : resolve(0);
  };
  look();
})
"""

FIRST_FOUND = """
new Promise((resolve) => {
  const look = () => {
    const first = document.querySelector('#search-results li a');
    first ? resolve(first.getAttribute('href')) : setTimeout(look, 50);
  };
  look();
})
"""

FOLDED = """
[...document.querySelectorAll('article details > :not(summary), article .dropdown > :not(.admonition-title)')]
  .filter((part) => part.textContent.trim())
  .filter((part) => !part.checkVisibility({ contentVisibilityAuto: true, visibilityProperty: true }))
  .map((part) => part.textContent.trim().slice(0, 80))
"""
"""What a reader of the page could unfold, and a reader of the paper could not."""


CHAT = """<!doctype html><style>{style}</style><body><script type=module>
{module}
const handlers = {{}};
window.sent = [];
window.tell = (data) => {{ window.data = data; handlers["change:data"](); }};
window.data = {data};
const model = {{
  get: (name) => (name === "data" ? window.data : "Chat"),
  on: (event, handler) => (handlers[event] = handler),
  off: () => {{}},
  send: (message) => {{
    window.sent.push(message);
    if ({live} && message.do === "hello") setTimeout(() => handlers["msg:custom"]("here"));
  }},
}};
renderChat({{ model, el: document.body }});
</script>"""


@pytest.mark.parametrize("live", [False, True])
def test_the_chat_asks_its_kernel_or_says_that_there_is_none(desktop, tmp_path, live):
    box = teaching.chat(say="Once, Lily lived in", max_new_tokens=6, look=(1, 4))
    module = box._esm.replace("export default { render: renderChat };", "")
    options = {"style": box._css, "data": json.dumps(box.data), "live": json.dumps(live)}
    (tmp_path / "chat.html").write_text(CHAT.format(module=module, **options))
    desktop.open(f"file://{tmp_path}/chat.html")
    assert desktop.page.evaluate(f"({DRAWN})(1000)") == 1
    desktop.page.evaluate("Object.assign(document.querySelector('textarea'), {value: 'Then'})")
    for number in range(4):
        desktop.page.evaluate(f"document.querySelectorAll('.tf-button')[{number}].click()")
    asked = desktop.page.evaluate("JSON.stringify(window.sent)")
    note = desktop.page.evaluate("document.querySelector('.tf-readout').textContent")
    if not live:
        assert json.loads(asked) == [{"do": "hello"}]
        assert note.startswith("Run this cell in JupyterLab")
        return
    assert json.loads(asked) == [{"do": "hello"}, {"do": "say", "text": "Then"}, {"do": "again"}, {"do": "new"}]
    busy = box.data | {"busy": True, "turns": [*box.data["turns"], {"said": "<b>bold</b>", "answer": "", "took": ""}]}
    desktop.page.evaluate(f"window.tell({json.dumps(busy)})")
    disabled = "[...document.querySelectorAll('.tf-button')].map((button) => button.disabled).join()"
    assert desktop.page.evaluate(disabled) == "true,false,true,true"
    assert "<b>bold</b>" in desktop.page.evaluate("document.body.innerText"), "what is said is shown as text"
