"""Chat templates, rendered by a process that cannot take this one with it (:mod:`tformer_lib.pretrained.rendering`)."""

import atexit
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from threading import Lock

from tformer_lib.pretrained import rendering


class Renderer:
    """The process that renders, started when it is first needed and again where it has ended."""

    def __init__(self):
        self.lock, self.process, self.owner = Lock(), None, None

    def render(self, template: str, known: Mapping[str, object]) -> str:
        """A template with what it knows.

        Raises:
            ValueError: the template refuses, fails, or takes too much; or what it is to know is not JSON.
            ImportError: jinja2 is missing; the message says how to install it.
        """
        if find_spec("jinja2") is None:
            raise ImportError("a chat template is rendered by jinja2: pip install 'tformer-lab[hub]'")
        try:
            line = json.dumps({"template": template, "known": known}, default=plain)
        except (TypeError, RecursionError) as error:
            raise ValueError(f"a conversation must be of texts, numbers, lists and dictionaries: {error}") from error
        with self.lock:
            answer = self.ask(line)
        if not answer:
            raise ValueError(
                f"the chat template was stopped: it took {rendering.SECONDS} seconds of a processor, or failed"
            )
        found = json.loads(answer)
        if "error" in found:
            raise ValueError(f"the chat template refuses the conversation: {found['error']}")
        return found["text"]

    def ask(self, line: str) -> str:
        """The line that the process answers, empty where it ended instead."""
        if self.process is None or self.owner != os.getpid() or self.process.poll() is not None:
            self.start()
        answer = ""
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            pass
        finally:
            if not answer:  # it ended, or somebody interrupted us while it was at work
                self.stop()
        return answer

    def start(self) -> None:
        """Start the process, out of reach of the terminal's Ctrl-C."""
        places = os.pathsep.join(place for place in sys.path if place)
        self.owner = os.getpid()
        self.process = subprocess.Popen(
            [sys.executable, str(Path(rendering.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            env=os.environ | {"PYTHONPATH": places},
            start_new_session=True,
        )

    def stop(self) -> None:
        """End the process, if it is ours."""
        if self.process is not None and self.owner == os.getpid():
            self.process.kill()
            self.process.communicate()
        self.process = None


def plain(x: object) -> object:
    """A mapping or a sequence of another kind as one that JSON knows."""
    if isinstance(x, Mapping):
        return dict(x)
    raise TypeError(f"{type(x).__name__} is none of them")


RENDERER = Renderer()
"""The one process for all templates."""

atexit.register(RENDERER.stop)
