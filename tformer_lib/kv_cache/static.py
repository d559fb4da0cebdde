"""Caches whose passes of one token have shapes and addresses that never change, so that they can be recorded."""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

from tformer_lib.kv_cache.interface import CacheShape, KVCache, Pass


class StaticCache(KVCache):
    """A cache that can say what a pass of one token needs from what the device knows alone."""

    def __init__(self, shape: CacheShape):
        super().__init__(shape)
        self.is_static = False

    @contextmanager
    def static_shapes(self) -> Iterator[None]:
        """Within it, a pass of one token depends on no number that the host knows, but on ``lengths`` and on memory.

        One recording of the pass (a CUDA graph, a compiled function) is then right at every length. The host's books
        stand still meanwhile: call ``replayed()`` after each pass.
        """
        was, self.is_static, self._pass = self.is_static, True, None
        try:
            yield
        finally:
            self.is_static, self._pass = was, None

    def replayed(self) -> None:
        """Count one more token per row on the host, after a pass under ``static_shapes``."""
        self.host_lengths = [n + 1 for n in self.host_lengths]

    def plan(self, T: int) -> Pass:
        """Work out what the layers of a pass of T tokens share."""
        if not self.is_static:
            return super().plan(T)
        if T != 1 or self.counts is not None:
            came = f"{T} a row" if self.counts is None else f"{self.counts}"
            raise ValueError(f"under static_shapes a pass brings 1 token a row, got {came}")
        self.abandon()
        return self.static_plan()

    @abstractmethod
    def static_plan(self) -> Pass:
        """What the layers of a pass of one token a row share, under ``static_shapes``."""

    def advance(self, T: int) -> None:
        """Count the T tokens that all layers have stored; on the device alone under ``static_shapes``."""
        if not self.is_static:
            return super().advance(T)
        self.lengths += T
        self._pass, self.unfinished = None, None
