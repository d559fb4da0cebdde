"""The cache that concatenates: the idea in its shortest form."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from tformer_lib.kv_cache.interface import CacheShape, KVCache, Pass


class GrowingCache(KVCache):
    """Concatenate the new keys and values to the old ones.

    It needs no limit in advance. Each token copies the whole cache, and in a ragged batch every pass takes as many
    columns as its longest row brings: shorter rows have holes there, which hold zeros and are never seen. Holes stay
    when rows become equally long again, so only a cache with as many columns as each row has tokens has none.
    """

    def __init__(self, shape: CacheShape):
        super().__init__(shape)
        self.reset()

    def reset(self) -> None:
        """Forget everything, as if just made."""
        shape = self.shape
        empty = partial(torch.zeros, dtype=shape.dtype, device=shape.device)
        self.keys = [empty(shape.batch, shape.kv_heads, 0, shape.head_dim)] * shape.layers
        self.values = [empty(shape.batch, shape.kv_heads, 0, shape.size_of_value)] * shape.layers
        self.column_positions = torch.zeros(shape.batch, 0, dtype=torch.int64, device=shape.device)  # -1 for a hole
        self._set_lengths([0] * shape.batch)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held, holes included."""
        return sum(x.numel() * x.element_size() for x in (*self.keys, *self.values))

    def complete(self, now: Pass) -> Pass:
        """All columns are looked at; which of them a query sees, their positions say."""
        held = self.column_positions.shape[1]
        now.columns = held + now.length
        if now.start != held:  # rows differ in length, or there are holes
            columns = self._columns_after(now)[:, None, :]  # (batch, 1, S)
            seen = (columns >= 0) & (columns <= now.positions[:, :, None])  # (batch, T, S)
            now.visible = (seen if now.real is None else seen & now.real[:, :, None])[:, None]
        return now

    def places(self, now: Pass) -> Tensor | None:
        """(batch, columns) the place of the token in each column of a pass, -1 for a hole; None without holes."""
        return None if now.visible is None else self._columns_after(now)

    def _columns_after(self, now: Pass) -> Tensor:
        """(batch, S) the position of the token in each column once the pass is stored, -1 for a hole."""
        new = now.positions if now.real is None else now.positions.masked_fill(~now.real, -1)
        return torch.cat([self.column_positions, new], dim=1)

    def store(self, layer: int, k: Tensor, v: Tensor, now: Pass) -> tuple[Tensor, Tensor]:
        """Concatenate, with zeros for padding."""
        held = self.column_positions.shape[1]
        if now.real is not None:
            padding = ~now.real[:, None, :, None]  # (batch, 1, T, 1)
            k, v = k.masked_fill(padding, 0.0), v.masked_fill(padding, 0.0)
        self.keys[layer] = torch.cat([self.keys[layer][:, :, :held], k], dim=2)
        self.values[layer] = torch.cat([self.values[layer][:, :, :held], v], dim=2)
        return self.keys[layer], self.values[layer]

    def advance(self, T: int) -> None:
        """Count the tokens, and keep the positions of their columns."""
        self.check_length(T)
        self.column_positions = self._columns_after(self.current_pass(T))
        super().advance(T)

    def erase_after(self, lengths: Sequence[int]) -> None:
        """Turn the columns of later tokens into holes, and drop the columns at the end that all rows lack."""
        forgotten = self.column_positions >= self._on_device(lengths)[:, None]  # (batch, S)
        positions = self.column_positions.masked_fill(forgotten, -1)
        live = (positions >= 0).any(0).nonzero()
        end = int(live.max()) + 1 if live.numel() else 0
        hidden = forgotten[:, None, :end, None]
        self.keys = [x[:, :, :end].masked_fill(hidden, 0.0) for x in self.keys]
        self.values = [x[:, :, :end].masked_fill(hidden, 0.0) for x in self.values]
        self.column_positions = positions[:, :end]

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget all but the first ``lengths[b]`` tokens of each row b."""
        lengths = self.check_truncate(lengths)
        self.erase_after(lengths)
        self._set_lengths(lengths)

    def reorder(self, rows: Sequence[int]) -> None:
        """Row b becomes a copy of what row ``rows[b]`` was."""
        _, index = self._take_rows(rows)
        self.keys, self.values = [x[index] for x in self.keys], [x[index] for x in self.values]
        self.column_positions = self.column_positions[index]
