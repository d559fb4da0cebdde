"""A process that kills itself in the middle of its work, to see what it leaves behind."""

import os
import signal
from pathlib import Path

from tformer_lib import checkpoint


def die() -> None:
    """End this process without another word."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(what: str, count: int) -> None:
    """Kill this process at its ``count``-th call of a system function, or half way through a write of a checkpoint.

    Args:
        what: "write", "unlink", or a function of ``os``: "fsync", "replace".
        count: from 1.
    """
    calls = [0]

    def now() -> bool:
        calls[0] += 1
        return calls[0] == count

    def wrap(function):
        return lambda *a, **k: (die() if now() else None, function(*a, **k))[1]

    class Torn:
        """A file of which a write may end half way."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data: bytes) -> int:
            if now():
                self.file.write(data[: len(data) // 2])
                self.file.flush()
                die()
            return self.file.write(data)

    if what == "write":
        checkpoint.open = lambda *a, **k: Torn(open(*a, **k))  # noqa: SIM115 (it closes what it holds)
    elif what == "unlink":
        Path.unlink = wrap(Path.unlink)
    else:
        setattr(os, what, wrap(getattr(os, what)))
