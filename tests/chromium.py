"""A small driver for headless Chromium over its debugging protocol, for the tests of the built book.

Every host but the loopback is unreachable for the browser, so that a page that asks the network for something fails.
"""

import base64
import itertools
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

import websocket

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def executable() -> str | None:
    """Where Chromium or Chrome is, if it is installed."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """One headless browser with one page.

    Use it as a context manager. ``messages`` holds what the page reported as errors on its console, with the exceptions
    that were not caught and the requests that failed; ``requests`` every address that it asked for.
    """

    def __init__(self):
        self.profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        self.process = subprocess.Popen(
            [
                executable(),
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--remote-debugging-port=0",
                "--remote-allow-origins=*",
                f"--user-data-dir={self.profile.name}",
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
                "--hide-scrollbars",
                "--force-color-profile=srgb",
                "about:blank",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.ids = itertools.count(1)
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.loaded = False
        self.socket = websocket.create_connection(self.page_address(), timeout=60, max_size=None)
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def page_address(self) -> str:
        """The address of the page's debugging socket, once the browser has written its port."""
        port_file = Path(self.profile.name) / "DevToolsActivePort"
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if port_file.exists() and port_file.read_text().strip():
                port = port_file.read_text().split()[0]
                targets = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list"))
                pages = [t for t in targets if t["type"] == "page"]
                if pages:
                    return pages[0]["webSocketDebuggerUrl"]
            time.sleep(0.1)
        raise RuntimeError("Chromium did not start within 30 seconds")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *error) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(timeout=20)
        self.profile.cleanup()

    def send(self, method: str, **parameters) -> dict:
        """Send one command and return its result; what the page reports meanwhile is kept."""
        number, deadline = next(self.ids), time.monotonic() + 60
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while time.monotonic() < deadline:
            message = json.loads(self.socket.recv())
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]
            self.note(message)
        raise TimeoutError(f"Chromium did not answer {method} within a minute")

    def note(self, event: dict) -> None:
        """Keep what an event says about errors, requests and loading."""
        name, data = event.get("method"), event.get("params", {})
        if name == "Runtime.exceptionThrown":
            details = data["exceptionDetails"]
            self.messages.append(details.get("exception", {}).get("description") or details["text"])
        elif name == "Runtime.consoleAPICalled" and data["type"] == "error":
            self.messages.append(" ".join(str(a.get("value") or a.get("description")) for a in data["args"]))
        elif name == "Log.entryAdded" and data["entry"]["level"] == "error":
            self.messages.append(f"{data['entry']['text']} {data['entry'].get('url', '')}")
        elif name == "Network.requestWillBeSent":
            self.requests.append(data["request"]["url"])
        elif name == "Page.loadEventFired":
            self.loaded = True

    def listen(self, seconds: float, *, most: float = 10.0) -> None:
        """Take what the page reports until it has been quiet for ``seconds``, or ``most`` seconds have passed."""
        deadline = time.monotonic() + most
        self.socket.settimeout(seconds)
        try:
            while time.monotonic() < deadline:
                self.note(json.loads(self.socket.recv()))
        except websocket.WebSocketTimeoutException:
            pass
        finally:
            self.socket.settimeout(60)

    def open(self, url: str, *, quiet: float = 0.4, most: float = 30.0) -> None:
        """Load a page, and wait until it is loaded and quiet."""
        self.messages, self.requests, self.loaded = [], [], False
        self.send("Page.navigate", url=url)
        deadline = time.monotonic() + most
        while time.monotonic() < deadline:
            self.listen(quiet)
            if self.loaded and self.evaluate(SETTLED):
                return
        raise TimeoutError(f"{url} was not quiet within {most} seconds")

    def evaluate(self, expression: str):
        """The value of a JavaScript expression; promises are awaited."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"].get("exception", {}).get("description", "an exception"))
        return result["result"].get("value")

    def resize(self, width: int, height: int, *, scale: float = 1.0) -> None:
        """Lay the page out as on a screen of this size."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )

    def screenshot(self, path: Path | str, *, whole: bool = False) -> None:
        """Write a PNG of the screen, or of the whole page."""
        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        Path(path).write_bytes(base64.b64decode(data))


SETTLED = """
(() => {
  const maths = document.querySelector('.math') && document.querySelector('script[src*="mathjax"]');
  if (maths && !(window.MathJax && MathJax.startup && MathJax.startup.promise)) return false;
  return !maths || MathJax.startup.promise.then(() => true);
})()
"""
