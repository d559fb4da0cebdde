"""One thread at a time, in the order in which they came."""

import threading
from collections import deque


class Turns:
    """A lock that threads get in the order in which they asked for it, and that its holder may take again.

    ``threading.RLock`` promises no order: a thread that steps an engine in a loop would take it again before another
    one that waits wakes up, for as long as it has something to do.
    """

    def __init__(self):
        self.guard = threading.Lock()
        self.waiting: deque[tuple[int, threading.Lock]] = deque()
        self.holder: int | None = None
        self.depth = 0

    def __enter__(self) -> "Turns":
        me = threading.get_ident()
        if self.holder == me:
            self.depth += 1
            return self
        gate = threading.Lock()
        with self.guard:
            if self.holder is None:
                self.holder, self.depth = me, 1
                return self
            gate.acquire()
            self.waiting.append((me, gate))
        try:
            gate.acquire()
        except BaseException:  # Ctrl-C while it waits
            self._give_up(me, gate)
            raise
        return self

    def __exit__(self, *_) -> None:
        self.depth -= 1
        if self.depth == 0:
            with self.guard:
                self._pass_on()

    def _pass_on(self) -> None:
        if not self.waiting:
            self.holder = None
            return
        self.holder, gate = self.waiting.popleft()
        self.depth = 1
        gate.release()

    def _give_up(self, me: int, gate: threading.Lock) -> None:
        """Leave the queue, or pass the turn on, if it came just now."""
        with self.guard:
            if (me, gate) in self.waiting:
                self.waiting.remove((me, gate))
            else:
                self._pass_on()
