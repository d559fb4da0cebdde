"""The cache of recurrent layers: a state of one size for each row, however many tokens it holds."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tformer_lib.kv_cache.interface import CacheShape, Pass
from tformer_lib.kv_cache.static import StaticCache
from tformer_lib.linear_attention import LayerState


class StateCache(StaticCache):
    """What linear layers remember of each row: the input of their convolution's next step, and a matrix a head.

    A state cannot forget its last tokens, so a row can be cut to nothing and to no other length.

    Args:
        shape: of which layers, rows, dtype and device count; a linear layer has no keys and values.
        channels: numbers that the convolution sees of a token.
        before: tokens before the next one that it sees.
        state: the shape of a row's state, (heads, head_dim, value_dim), which is kept in float32 or better.
    """

    def __init__(self, shape: CacheShape, *, channels: int, before: int, state: tuple[int, int, int]):
        super().__init__(shape)
        new = {"device": shape.device}
        wide = torch.promote_types(shape.dtype, torch.float32)
        self.channels = torch.zeros(shape.layers, shape.batch, channels, before, dtype=shape.dtype, **new)
        self.memory = torch.zeros(shape.layers, shape.batch, *state, dtype=wide, **new)
        self.rows = torch.arange(shape.batch, device=shape.device)
        self.pending: list[tuple[int, Tensor, Tensor, Tensor]] = []  # layer, rows, channels, memory of this pass

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return self.channels.nbytes + self.memory.nbytes

    @property
    def bytes_per_token(self) -> int:
        """A token more takes nothing."""
        return 0

    def layer(self, index: int) -> "StateLayer":
        """The part of layer ``index``."""
        super().layer(index)  # refuses an index out of range
        return StateLayer(self, index)

    def static_plan(self) -> Pass:
        """Nothing is laid out."""
        return Pass(1, self.lengths[:, None], None, None, 0)

    def complete(self, now: Pass) -> Pass:
        """Nothing is laid out."""
        return now

    def store(self, layer: int, k: Tensor, v: Tensor, now: Pass) -> tuple[Tensor, Tensor]:
        """There are no keys and values."""
        raise ValueError("a linear layer's cache holds states, it was given keys and values")

    def advance(self, T: int) -> None:
        """The pass is over: what its layers left becomes the states. A pass that fails before leaves no trace."""
        self.check_length(T)
        for layer, rows, channels, memory in self.pending:
            self.channels[layer, rows], self.memory[layer, rows] = channels, memory
        self.pending = []
        super().advance(T)

    def abandon(self) -> None:
        """Forget what a pass left that failed before its end."""
        self.pending, self.unfinished = [], None

    def erase_after(self, lengths: Sequence[int]) -> None:
        """Nothing of later tokens is in a state that was not advanced."""

    def reset(self) -> None:
        """Forget everything, in place."""
        self.truncate([0] * self.shape.batch)

    def check_truncate(self, lengths: Sequence[int]) -> list[int]:
        """The lengths as integers, each of them 0 or what the row holds."""
        lengths = super().check_truncate(lengths)
        for row, (length, held) in enumerate(zip(lengths, self.host_lengths, strict=True)):
            if length not in (0, held):
                raise ValueError(f"row {row} holds {held} tokens in one state, which cannot be cut to {length}")
        return lengths

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget all of a row, or nothing of it.

        Raises:
            ValueError: a row is to keep some of its tokens and not others.
        """
        lengths = self.check_truncate(lengths)
        self.abandon()
        empty = [row for row, length in enumerate(lengths) if not length]
        self.channels[:, empty], self.memory[:, empty] = 0.0, 0.0
        self._set_lengths(lengths)

    def reorder(self, rows: Sequence[int]) -> None:
        """Row b becomes a copy of what row ``rows[b]`` was."""
        rows, index = self._take_rows(rows)
        self.channels, self.memory = self.channels[:, index], self.memory[:, index]
        self.rows = torch.arange(len(rows), device=index.device)


class StateLayer:
    """One layer's states."""

    def __init__(self, cache: StateCache, index: int):
        self.cache, self.index = cache, index

    def run(self, layer: Callable[..., Tensor], x: Tensor) -> Tensor:
        """A linear layer over each row's new tokens, from the row's own state.

        Rows that bring equally many tokens run together, so that no padding comes into a state.

        Args:
            layer: x (rows, T, width) and ``state`` (a :class:`LayerState`) to (rows, T, width).
            x: (batch, T, width).

        Returns:
            (batch, T, width); zeros for padding.
        """
        cache = self.cache
        cache.current_pass(x.shape[1])
        counts = cache.counts
        if counts is None or all(count == x.shape[1] for count in counts):
            return self._run(layer, x, cache.rows)
        out = torch.zeros_like(x)
        for count in sorted(set(counts) - {0}):
            rows = torch.tensor([row for row, n in enumerate(counts) if n == count], device=x.device)
            out[rows, :count] = self._run(layer, x[rows, :count], rows).to(out.dtype)  # autocast's may be another
        return out

    def _run(self, layer: Callable[..., Tensor], x: Tensor, rows: Tensor) -> Tensor:
        state, cache = LayerState(), self.cache
        state.channels, state.memory = cache.channels[self.index, rows], cache.memory[self.index, rows]
        out = layer(x, state=state)
        cache.pending.append((self.index, rows, state.channels.to(cache.channels.dtype), state.memory))
        return out
