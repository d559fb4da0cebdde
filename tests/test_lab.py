"""The course in JupyterLab, in a browser that reaches nothing but this machine, as ``make lab`` opens it.

Every chapter is opened as a new learner finds it, before any cell runs. Two small chapters are run as well: the first
one, with the trained model, and the one about masks, cut down to a few cells, whose figure is moved. ``pytest --nbval``
compares what the cells of the others print; here it is how JupyterLab shows it. The deep profile runs every chapter.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from draws import is_deep
from pages import DESKTOP, MOVE, NONSENSE, Tab, executable, launched
from playwright.sync_api import TimeoutError as TimedOut

from tools import lab as learners_lab
from tools.chapters import load

ROOT = Path(__file__).resolve().parents[1]
NAMES = [chapter.name for chapter in load(ROOT).chapters if chapter.ready]
CHAPTER = ROOT / "notebooks" / "03-masks.ipynb"

WHOLE = {"windowingMode": "none"}
"""JupyterLab's setting that keeps every cell in the page, seen or not."""

pytestmark = pytest.mark.skipif(executable() is None, reason="Chromium is not installed (apt install chromium)")


def short_version(chapter: Path) -> dict:
    """The title, the first code cell and the interactive figure, without outputs, then an equation, an exercise, and a
    prediction with its answer."""
    notebook = json.loads(chapter.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    figure = next(c for c in code if any("widget-view" in kind for o in c["outputs"] for kind in o.get("data", {})))
    text = [cell for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    signs = ("$$", ":::{exercise}", "{admonition} Predict", "{admonition} Answer")
    shown = {id(c): c for c in (next(c for c in text if sign in "".join(c["source"])) for sign in signs)}
    cells = [text[0], code[0], figure, *shown.values()]
    for cell in (code[0], figure):
        cell.update(outputs=[], execution_count=None)
    kernel = {"kernelspec": notebook["metadata"]["kernelspec"]}
    return {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> str:
    """The address of a JupyterLab with settings of its own, on a learner's folder and a short chapter."""
    home = tmp_path_factory.mktemp("lab")
    folder = home / "learn"
    own = {f"JUPYTER_{kind}_DIR": str(home / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in own.items():
            patch.setenv(name, value)  # the chapters are signed with a key of the test's own
        learners_lab.bring(ROOT, folder)
    (folder / "chapter.ipynb").write_text(json.dumps(short_version(CHAPTER)), encoding="utf-8")
    for name in NAMES:
        shutil.copy(folder / f"{name}.ipynb", folder / f"run-{name}.ipynb")
    tracker = home / "user" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    tracker.parent.mkdir(parents=True)
    tracker.write_text(json.dumps(WHOLE), encoding="utf-8")
    port = free_port()
    command = [sys.executable, "-m", "jupyterlab", *learners_lab.options(folder)]
    command += ["--no-browser", "--expose-app-in-browser", "--IdentityProvider.token="]
    command += ["--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    command += [f"--LabApp.workspaces_dir={home / 'spaces'}", f"--LabApp.user_settings_dir={home / 'user'}"]
    command += ["--LabApp.extension_manager=readonly"]
    own |= {"PYTHONPATH": str(ROOT), "TFORMER_PROGRESS": ""}
    with open(home / "log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | own, cwd=folder)
    try:
        address = f"http://127.0.0.1:{port}/"
        wait_for(address, server, home / "log")
        yield address
    finally:
        server.terminate()
        server.wait(timeout=30)


@pytest.mark.parametrize(("user", "allowed"), [(0, True), (1000, False)])
def test_root_may_open_the_lab_in_a_container(user, allowed, tmp_path, monkeypatch):
    shutil.copy(ROOT / "notebooks" / f"{NAMES[0]}.ipynb", tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    assert ("--allow-root" in learners_lab.options(tmp_path)) is allowed


def wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    """Wait until the server answers."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"{address}api", timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not answer within a minute:\n{log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def tab(lab) -> Tab:
    """A tab in which JupyterLab stands open, with a kernel for the chapters that are only looked at."""
    with launched() as browser:
        one = Tab.of_width(browser, DESKTOP)
        one.page.goto(f"{lab}lab/tree/chapter.ipynb?reset", timeout=90_000)
        wait(one, f"window.jupyterapp?.shell && {CURRENT}?.context?.isReady", "JupyterLab did not open the notebook")
        wait(one, TYPESET, "a cell of text was not typeset")
        wait(one, f"{CURRENT}.sessionContext.isReady", "it has no kernel")
        end_kernel(one)
        one.looking = one.page.evaluate(
            "window.jupyterapp.serviceManager.kernels.startNew({name: 'python3'}).then((k) => k.id)"
        )
        yield one


def test_a_figure_moves_with_a_live_kernel(tab, lab):
    open_notebook(tab, "chapter", own_kernel=True)
    run_all(tab)
    wait(tab, f"{DRAWN} === 1", "the figure was not drawn")
    assert tab.page.evaluate("document.querySelectorAll('.tf-widget .tf-body svg').length") == 1
    assert tab.page.evaluate(f"({MOVE})(0)"), "the figure does not change when its controls are moved"
    assert tab.page.evaluate(NONSENSE) == []
    assert tab.page.evaluate("document.querySelectorAll('.jp-MarkdownCell .katex-display').length") >= 1
    assert set(tab.page.evaluate(BOXES)) == {
        "What you will be able to do",
        "Exercise 1 (The causal mask)",
        "Predict",
        "Answer",
    }
    assert faults(tab) == []
    assert [url for url in tab.requests if not url.startswith((lab, "data:", "blob:"))] == []
    end_kernel(tab)


@pytest.mark.parametrize("name", NAMES)
def test_a_new_learner_opens_a_chapter(tab, lab, name):
    open_notebook(tab, name)
    wanted = tab.page.evaluate(FIGURES)
    wait(tab, f"{DRAWN} === {wanted}", "an interactive figure is not drawn from its recorded state")
    assert wanted or name in WITHOUT_FIGURE
    assert faults(tab) == []
    assert tab.page.evaluate(PASSED) == []
    assert [url for url in tab.requests if not url.startswith((lab, "data:", "blob:"))] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_chapter_runs_from_top_to_bottom(tab, name):
    """The first one in an ordinary run, whose notebooks nbval runs; all of them in the deep one, in ten minutes."""
    if name != NAMES[0] and not is_deep():
        pytest.skip("the deep profile runs every chapter in JupyterLab")
    open_notebook(tab, f"run-{name}", own_kernel=True)
    run_all(tab)
    wait(tab, f"{DRAWN} === {tab.page.evaluate(FIGURES)}", "an interactive figure is not drawn by its kernel")
    pictures = len(re.findall('"image/png"', (ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")))
    shown = tab.page.evaluate("document.querySelectorAll('.jp-OutputArea-output img').length")
    assert shown >= min(pictures, 3)
    assert faults(tab) == []
    end_kernel(tab)


@pytest.fixture
def chapter(tab) -> Tab:
    """The tab with the short chapter in it; the next test finds it as this one leaves it."""
    if tab.page.evaluate(f"{CURRENT}?.context?.path") != "chapter.ipynb":
        open_notebook(tab, "chapter")
    return tab


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        ("&lt;Figure size 420x340 with 1 Axes&gt;", "<Figure size"),
        (":::{admonition} Predict", ":::"),
        ("$$ x $$", "$$"),
        ("{cite}vaswani2017", "{cite}"),
        ("<span title='Citation Not Found'>key</span>", "Not Found"),
        ("<div data-mime-type='application/vnd.jupyter.error'>NameError</div>", "NameError"),
        ("<details open><summary>Answer</summary>42</details>", "Answer"),
        ("<img src='data:image/png;base64,AAAA' alt='a broken picture'>", "a broken picture"),
    ],
)
def test_a_fault_is_found(chapter, planted, found):
    assert faults(chapter) == []
    cell = f"{CURRENT}.node.querySelector('.jp-MarkdownCell')"
    chapter.page.evaluate(f"window.whole = {cell}.innerHTML; {cell}.innerHTML += {json.dumps(planted)}; 0")
    chapter.page.wait_for_timeout(100)
    try:
        assert any(found in fault for fault in faults(chapter)), faults(chapter)
    finally:
        chapter.page.evaluate(f"{cell}.innerHTML = window.whole; 0")


def test_an_open_solution_is_found(tab):
    open_notebook(tab, "03-masks")
    tab.page.evaluate(f"{CURRENT}.content.widgets.filter((c) => c.inputHidden)[0].inputHidden = false; 0")
    assert [fault for fault in faults(tab) if fault.startswith("an open solution")] != []


def open_notebook(tab: Tab, name: str, *, own_kernel: bool = False) -> None:
    """Open a notebook in a tab and wait until its text is typeset.

    What is only looked at shares one kernel, which runs nothing: to start one for every chapter takes a minute. The
    notebooks that stand open are closed first, none of them while its kernel starts: JupyterLab would give the next
    notebook of that name a session that it is about to end.
    """
    tab.page.evaluate(
        "[...window.jupyterapp.shell.widgets('main')].forEach((tab) => tab.dispose()); window.everyCellRan = false; 0"
    )
    tab.forget()
    asked = {"path": f"{name}.ipynb"} | ({} if own_kernel else {"kernel": {"id": tab.looking}})
    tab.page.evaluate(f"window.jupyterapp.commands.execute('docmanager:open', {json.dumps(asked)}); 0")
    wait(tab, f"{CURRENT}?.context?.path === '{name}.ipynb' && {CURRENT}.context.isReady", "it did not open")
    wait(tab, f"{CURRENT}.sessionContext.isReady", "it has no kernel")
    wait(tab, TYPESET, "a cell of text was not typeset")


def run_all(tab: Tab) -> None:
    """Run every cell, and wait until the kernel rests and each cell has run.

    JupyterLab shows the output of a cell that runs, also of a folded one; the source stays folded.
    """
    wait(tab, f"{CURRENT}.sessionContext.kernelDisplayStatus === 'idle'", "the kernel did not start")
    tab.page.evaluate("window.everyCellRan = true; window.jupyterapp.commands.execute('notebook:run-all-cells'); 0")
    wait(tab, RAN, "a cell did not come to its end", seconds=240)


def end_kernel(tab: Tab) -> None:
    """End the kernel of the notebook in front."""
    tab.page.evaluate(f"{CURRENT}.sessionContext.shutdown().then(() => 0)")


def faults(tab: Tab) -> list[str]:
    """What a learner would see go wrong in the open notebook."""
    return tab.page.evaluate(FAULTS) + [said for said in tab.messages if not re.search(HARMLESS, said)]


def wait(tab: Tab, expression: str, otherwise: str, seconds: float = 60) -> None:
    """Wait until a JavaScript expression is true; fail with a reason and what the page shows if it never is."""
    try:
        tab.page.wait_for_function(f"Boolean({expression})", polling=100, timeout=1000 * seconds)
    except TimedOut:
        shown = tab.page.evaluate("document.body.innerText.slice(-2000)")
        pytest.fail(f"{otherwise}: {tab.messages} {shown}")


WITHOUT_FIGURE = {"08-rope"}
"""Chapters whose interactive figure answers a prediction, so that it waits for its cell to run."""

HARMLESS = r"Canceled future for execute_request|Kernel connection disconnected|reading 'kernel'"
"""What JupyterLab itself reports when a tab is closed while its figures are restored."""

CURRENT = "window.jupyterapp.shell.currentWidget"
FIGURES = f"""
{CURRENT}.content.widgets.filter((cell) => cell.model.type === 'code' && cell.model.outputs)
  .flatMap((cell) => Array.from({{length: cell.model.outputs.length}}, (_, i) => cell.model.outputs.get(i)))
  .filter((output) => Object.keys(output.data ?? {{}}).some((kind) => kind.includes('widget-view'))).length
"""
DRAWN = f"""
[...{CURRENT}.node.querySelectorAll('.tf-widget .tf-body')]
  .filter((body) => body.childElementCount && body.getBoundingClientRect().height > 40).length
"""
TYPESET = f"""
[...{CURRENT}.node.querySelectorAll('.jp-MarkdownCell')].length > 0 &&
[...{CURRENT}.node.querySelectorAll('.jp-MarkdownCell')].every((cell) => cell.innerText.trim())
"""
RAN = f"""
{CURRENT}.sessionContext.kernelDisplayStatus === 'idle' &&
{CURRENT}.content.widgets.every((cell) => cell.model.type !== 'code' || !cell.model.sharedModel.getSource().trim()
  || cell.model.executionCount)
"""
BOXES = f"""
[...{CURRENT}.node.querySelectorAll('.jp-MarkdownCell :is(aside, details)')]
  .map((box) => box.innerText.split('\\n')[0].replace(/\\s/g, ' '))
"""
PASSED = f"""
{CURRENT}.content.widgets
  .filter((cell) => cell.model.type === 'code' && !cell.outputHidden && /^passed/m.test(cell.outputArea.node.innerText))
  .map((cell) => cell.outputArea.node.innerText)
"""
"""Outputs in sight that say that an exercise is solved."""

FAULTS = f"""
(() => {{
  const notebook = {CURRENT}, node = notebook.node, found = [];
  const all = (selector) => [...node.querySelectorAll(selector)].filter((e) => e.checkVisibility());
  const say = (kind, elements) => found.push(...elements.map((e) => `${{kind}}: ${{e.outerHTML.slice(0, 300)}}`));
  const text = [];
  for (const cell of all('.jp-MarkdownCell')) {{
    const copy = cell.cloneNode(true);
    copy.querySelectorAll('code, pre, annotation, .cm-editor, .jp-InputArea-editor').forEach((part) => part.remove());
    text.push(copy.textContent);
  }}
  const marks = /:::.*|\\$\\$.*|\\{{(?:eq|cite(?::t)?|ref|doc|term|exercise|solution|admonition|math)\\}}.*/g;
  found.push(...text.join('\\n').match(marks) ?? []);
  found.push(...node.innerText.match(/<Figure size.*|<\\?xml.*/g) ?? []);
  say('not resolved', all('[title*="Not Found"], [title*="not found"], .katex-error'));
  say('an error', all('[data-mime-type="application/vnd.jupyter.error"], [data-mime-type$="stderr"]'));
  say('an open answer', all('.jp-MarkdownCell details[open]'));
  say('a picture that is not drawn', all('img').filter((image) => image.complete && !image.naturalWidth));
  for (const cell of notebook.content.widgets) {{
    const tags = cell.model.getMetadata('tags') ?? [];
    const folded = tags.includes('solution') || tags.includes('hide-cell');
    if (folded && !cell.inputHidden) found.push(`an open solution: ${{cell.inputArea.node.innerText.slice(0, 99)}}`);
    if (folded && !cell.outputHidden && !window.everyCellRan) found.push('the output of a solution');
  }}
  for (const fold of all('.jp-OutputPlaceholder'))
    if (!/^\\s*From /.test(fold.innerText)) found.push(`a fold that tells what is in it: ${{fold.innerText}}`);
  return found;
}})()
"""
"""What a learner would see go wrong in the notebook in front."""
