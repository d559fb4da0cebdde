"""The cache that keeps the first few tokens and the latest window."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tformer_lib.attention import Attend, AttentionVariant
from tformer_lib.contract import check_integer
from tformer_lib.kv_cache.interface import CacheShape, Pass
from tformer_lib.kv_cache.preallocated import PreallocatedCache


class RingCache(PreallocatedCache):
    """Keep the first ``sinks`` tokens and the latest ``window``: memory stays the same however long the text grows.

    A query at position p sees the keys j <= p with j < sinks or j > p - window: the sliding window of Mistral 7B
    (arXiv:2310.06825) with the attention sinks of StreamingLLM (arXiv:2309.17453). In every layer that is exactly what
    an uncached model sees under ``masks.sliding_window`` joined with the first ``sinks`` columns.

    Positions are the tokens' places in the text. StreamingLLM instead counts places within the cache; with RoPE, whose
    scores know only distances, the two differ in how far away the sinks seem. Here the sinks recede as the text grows,
    so that the cache stays equal to a mask; a model that must run far past its trained length wants the other choice.

    Args:
        shape: what is held for each token.
        window: how many of the latest tokens a query sees, its own included.
        sinks: how many of the first tokens are kept for good.
    """

    def __init__(self, shape: CacheShape, window: int, sinks: int = 4):
        check_integer("window", window)
        check_integer("sinks", sinks)
        if window < 1 or sinks < 0:
            raise ValueError(f"window must be at least 1 and sinks at least 0, got {window} and {sinks}")
        super().__init__(shape, sinks + window)
        self.window, self.sinks = window, sinks

    def check_room(self, ends: list[int]) -> None:
        """There is always room: the oldest token of the window makes it."""

    def slot(self, positions: Tensor) -> Tensor:
        """Sinks stay in the first slots; the rest goes round the others."""
        return torch.where(positions < self.sinks, positions, self.sinks + (positions - self.sinks) % self.window)

    def slot_positions(self, lengths: Tensor | None = None) -> Tensor:
        """(batch, capacity) int64: the place in the text of the token in each slot, -1 for an empty slot.

        Args:
            lengths: (batch,) how many tokens the rows hold; as many as now if not given.
        """
        last = (self.lengths if lengths is None else lengths)[:, None] - 1
        latest = last - (last - self.slots) % self.window  # the last position that falls on this slot
        held = torch.where(self.slots < self.sinks, self.slots, latest)
        return held.masked_fill((held < self.slots) | (held > last), -1)

    def complete(self, now: Pass) -> Pass:
        """While nothing has been evicted, and for one token a row, slots do; else old and new stand side by side."""
        if now.columns <= self.capacity:
            return super().complete(now)
        if now.length == 1 and now.real is None:
            return self._complete_step(now)
        held, new = self.slot_positions(), self._new_places(now)
        seen = self._window_of(now.positions, torch.cat([held, new], dim=1))
        now.visible = seen if now.real is None else seen & now.real[:, None, :, None]
        now.columns = held.shape[1] + now.length
        end = new.amax(1, keepdim=True) + 1 if now.length else self.lengths[:, None]  # (batch, 1)
        kept = (new >= 0) & ((new < self.sinks) | (new >= end - self.window))
        rows, places = kept.nonzero(as_tuple=True)
        now.survivors = rows, places, self.slot(new[rows, places])
        return now

    def placed(self, attend: Attend, T: int) -> Attend:
        """As in every cache; a window that is no narrower than the ring hides nothing more."""
        if isinstance(attend, AttentionVariant) and not self.sinks and (attend.window or 0) >= self.window:
            attend = replace(attend, window=None)
        return super().placed(attend, T)

    def places(self, now: Pass) -> Tensor | None:
        """(batch, columns) the place of the token in each column; None while nothing has been evicted."""
        if now.columns > self.capacity:
            return torch.cat([self.slot_positions(), self._new_places(now)], dim=1)
        if now.lengths_after is not None and max(now.lengths_after, default=0) <= self.capacity:
            return None
        return self.slot_positions(self.lengths + 1)  # one token a row, which is written before it looks

    def _complete_step(self, now: Pass) -> Pass:
        """One token a row: it overwrites the token that leaves its window, so it may see every filled slot."""
        now.columns = self.capacity
        if now.start is None:
            now.visible = (self.slots <= now.positions)[:, None, None, :]
        return now

    def _new_places(self, now: Pass) -> Tensor:
        """(batch, T) the places of a pass's tokens, -1 for padding."""
        return now.positions if now.real is None else now.positions.masked_fill(~now.real, -1)

    def _window_of(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Which keys (batch, S) the queries (batch, T) see, by their positions: (batch, 1, T, S)."""
        q, k = queries[:, :, None], keys[:, None, :]
        seen = (k >= 0) & (k <= q) & ((k < self.sinks) | (k > q - self.window))
        return seen[:, None]

    def store(self, layer: int, k: Tensor, v: Tensor, now: Pass) -> tuple[Tensor, Tensor]:
        """Write first where nothing that is still seen gets lost by it; else look at old and new, then write."""
        if now.columns <= self.capacity:
            return super().store(layer, k, v, now)
        if now.real is not None:
            padding = ~now.real[:, None, :, None]  # (batch, 1, T, 1)
            k, v = k.masked_fill(padding, 0.0), v.masked_fill(padding, 0.0)
        keys = torch.cat([self.keys[layer], k], dim=2)  # (batch, kv_heads, capacity + T, head_dim)
        values = torch.cat([self.values[layer], v], dim=2)
        self.write(self.keys[layer], k, now)
        self.write(self.values[layer], v, now)
        return keys, values

    def check_truncate(self, lengths: Sequence[int]) -> list[int]:
        """The lengths as integers.

        Raises:
            ValueError: later tokens of a row have overwritten what it would see. All of a row can be forgotten.
        """
        lengths = super().check_truncate(lengths)
        held = self.host_lengths if self.unfinished is None else self.unfinished.lengths_after
        if held is None or any(n > self.capacity and cut not in (0, n) for n, cut in zip(held, lengths, strict=True)):
            came = "" if self.unfinished is None else ", with those of a pass that failed"
            raise ValueError(f"rows hold {held} tokens{came}, of which a ring of {self.capacity} has lost some")
        return lengths

    def erase_after(self, lengths: Sequence[int]) -> None:
        """Write zeros over later tokens, unless they have overwritten what a row would see."""
        super().erase_after(self.check_truncate(lengths))
