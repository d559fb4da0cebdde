"""The cache that writes into memory that it reserved."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tformer_lib.contract import check_integer
from tformer_lib.kv_cache.interface import CacheShape, Pass
from tformer_lib.kv_cache.static import StaticCache


class PreallocatedCache(StaticCache):
    """Write into memory that was reserved for ``capacity`` tokens a row: token p of a row is in slot p.

    Args:
        shape: what is held for each token.
        capacity: the most tokens that a row may hold.
    """

    def __init__(self, shape: CacheShape, capacity: int):
        check_integer("capacity", capacity)
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1 token, got {capacity}")
        super().__init__(shape)
        self.capacity = capacity
        size = (shape.layers, shape.batch, shape.kv_heads, capacity)
        self.keys = torch.zeros(*size, shape.head_dim, dtype=shape.dtype, device=shape.device)
        self.values = self.keys.new_zeros(*size, shape.size_of_value)  # 0 times an unwritten NaN would be NaN
        self.slots = torch.arange(capacity, device=shape.device)
        self.rows = torch.arange(shape.batch, device=shape.device)[:, None]  # (batch, 1)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values reserved."""
        return (self.keys.numel() + self.values.numel()) * self.keys.element_size()

    def reset(self) -> None:
        """Forget everything, in place."""
        self.keys.zero_()
        self.values.zero_()
        self._set_lengths([0] * self.shape.batch)

    def check_room(self, ends: list[int]) -> None:
        """Refuse a pass after which a row would hold more than ``capacity`` tokens."""
        for row, (end, held) in enumerate(zip(ends, self.host_lengths, strict=True)):
            if end > self.capacity:
                raise ValueError(
                    f"the cache is full: row {row} holds {held} of {self.capacity} tokens, and {end - held} more came"
                )

    def slot(self, positions: Tensor) -> Tensor:
        """Where the token at each position is kept; same shape."""
        return positions

    def static_plan(self) -> Pass:
        """A pass of one token looks at all slots behind a mask that the device makes from ``lengths``."""
        positions = self.lengths[:, None]  # (batch, 1)
        filled = self.slots <= positions  # (batch, capacity); a ring's slots fill in order too
        return Pass(1, positions, None, None, self.capacity, filled[:, None, None, :])

    def complete(self, now: Pass) -> Pass:
        """A query sees the slots up to its own position."""
        if now.start is None:
            seen = self.slots[: now.columns] <= now.positions[:, :, None]  # (batch, T, S)
            now.visible = (seen if now.real is None else seen & now.real[:, :, None])[:, None]
        if now.real is not None:
            rows, places = now.real.nonzero(as_tuple=True)
            now.survivors = rows, places, self.slot(now.positions[rows, places])
        return now

    def store(self, layer: int, k: Tensor, v: Tensor, now: Pass) -> tuple[Tensor, Tensor]:
        """Write, and return a view of the slots that are in use: nothing is copied."""
        self.write(self.keys[layer], k, now)
        self.write(self.values[layer], v, now)
        return self.keys[layer][:, :, : now.columns], self.values[layer][:, :, : now.columns]

    def write(self, memory: Tensor, new: Tensor, now: Pass) -> None:
        """Put new (batch, kv_heads, T, head_dim) into its slots of memory (batch, kv_heads, capacity, head_dim)."""
        if now.survivors is not None:
            rows, places, slots = now.survivors
            memory[rows, :, slots] = new[rows, :, places]  # (n, kv_heads, head_dim)
        elif now.start is not None and now.start + now.length <= self.capacity:
            memory[:, :, now.start : now.start + now.length] = new
        else:
            memory[self.rows, :, self.slot(now.positions)] = new.transpose(1, 2)  # (batch, T, kv_heads, head_dim)

    def erase_after(self, lengths: Sequence[int]) -> None:
        """Write zeros over later tokens."""
        for row, length in enumerate(lengths):
            self.keys[:, row, :, length:] = 0.0
            self.values[:, row, :, length:] = 0.0

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget all but the first ``lengths[b]`` tokens of each row b."""
        lengths = self.check_truncate(lengths)
        self.erase_after(lengths)
        self._set_lengths(lengths)

    def reorder(self, rows: Sequence[int]) -> None:
        """Row b becomes a copy of what row ``rows[b]`` was; the memory moves, so a graph must be captured anew."""
        rows, index = self._take_rows(rows)
        self.keys, self.values = self.keys[:, index], self.values[:, index]
        self.rows = torch.arange(len(rows), device=index.device)[:, None]
