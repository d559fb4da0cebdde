"""JupyterLab with a live kernel, in a browser that reaches nothing but this machine: a figure draws and moves, and the
text shows its boxes, exercises and equations.

The chapter is cut down to a few cells, so that this takes seconds.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from chromium import Browser, executable
from pages import MOVE, NONSENSE

ROOT = Path(__file__).resolve().parents[1]
CHAPTER = ROOT / "notebooks" / "03-masks.ipynb"

SETTINGS = {
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},  # every cell is in the page, seen or not
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
}

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
    """The address of a JupyterLab of the test's own, with settings of its own, on the chapter's short version."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "work").mkdir()
    (folder / "work" / "chapter.ipynb").write_text(json.dumps(short_version(CHAPTER)), encoding="utf-8")
    overrides = folder / "settings" / "overrides.json"
    overrides.parent.mkdir()
    overrides.write_text(json.dumps(SETTINGS), encoding="utf-8")
    port = free_port()
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser"]
    command += ["--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    command += ["--IdentityProvider.token=", f"--ServerApp.root_dir={folder / 'work'}"]
    command += [f"--LabApp.app_settings_dir={overrides.parent}", "--LabApp.news_url="]
    command += [f"--LabApp.workspaces_dir={folder / 'spaces'}", f"--LabApp.user_settings_dir={folder / 'user'}"]
    command += ["--LabApp.extension_manager=readonly"]
    own = {"JUPYTER_CONFIG_DIR": str(folder / "config"), "PYTHONPATH": str(ROOT), "TFORMER_PROGRESS": ""}
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | own)
    try:
        address = f"http://127.0.0.1:{port}/"
        wait_for(address, server, folder / "log")
        yield address
    finally:
        server.terminate()
        server.wait(timeout=30)


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


def test_figure_moves_with_a_live_kernel(lab):
    with Browser() as browser:
        browser.resize(1280, 900)
        # JupyterLab runs the notebook that has the focus.
        browser.send("Emulation.setFocusEmulationEnabled", enabled=True)
        browser.open(f"{lab}lab/tree/chapter.ipynb?reset", most=90)
        wait(browser, OPENED, "the notebook did not open")
        browser.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells'); 0")
        wait(browser, DRAWN, "the figure was not drawn")
        wait(browser, f"{SESSION}.kernelDisplayStatus === 'idle'", "the kernel did not come to rest")
        assert browser.evaluate("document.querySelectorAll('.tf-widget .tf-body svg').length") == 1
        assert browser.evaluate(f"({MOVE})(0)"), "the figure does not change when its controls are moved"
        assert browser.evaluate(NONSENSE) == []
        assert [url for url in browser.requests if not url.startswith((lab, "data:", "blob:"))] == []
        assert browser.evaluate(RAW) is None, "JupyterLab shows MyST as it is written: is jupyterlab-myst installed?"
        assert browser.evaluate(EQUATIONS) >= 1
        assert set(browser.evaluate(BOXES)) == {
            "What you will be able to do",
            "Exercise 1 (The causal mask)",
            "Predict",
            "Answer",
        }
        assert browser.messages == []


def wait(browser: Browser, expression: str, otherwise: str, seconds: float = 60) -> None:
    """Wait until a JavaScript expression is true; fail with a reason and what the page shows if it never is."""
    deadline = time.monotonic() + seconds
    while not browser.evaluate(f"Boolean({expression})"):
        shown = browser.evaluate("document.body.innerText.slice(-2000)") if time.monotonic() > deadline else None
        assert shown is None, f"{otherwise}: {browser.messages} {shown}"
        browser.listen(0.2, most=0.2)


NOTEBOOK = "[...(window.jupyterapp?.shell.widgets('main') ?? [])].find((one) => one.sessionContext)"
SESSION = f"{NOTEBOOK}?.sessionContext"
OPENED = f"{SESSION}?.isReady && {NOTEBOOK}.context.isReady && window.jupyterapp.shell.currentWidget === {NOTEBOOK}"
DRAWN = """
[...document.querySelectorAll('.tf-widget .tf-body')]
  .some((body) => body.childElementCount && body.getBoundingClientRect().height > 40)
"""
BOXES = """
[...document.querySelectorAll('.jp-MarkdownCell :is(aside, details)')]
  .map((box) => box.innerText.split('\\n')[0].replace(/\\s/g, ' '))
"""
RAW = "document.querySelector('.jp-Notebook').innerText.match(/:::.*|\\$\\$|\\{(eq|cite|exercise)\\}/g)"
EQUATIONS = "document.querySelectorAll('.jp-MarkdownCell .katex-display').length"
