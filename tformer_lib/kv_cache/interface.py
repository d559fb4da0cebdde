"""What all caches share: their shape, the plan of a pass, and the books of how long each row is."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import index as whole

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tformer_lib import masks
from tformer_lib.attention import Attend, AttentionVariant
from tformer_lib.contract import counted, product_dtype


@dataclass(frozen=True)
class CacheShape:
    """What a cache holds for each token, and for how many rows."""

    layers: int
    batch: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    value_dim: int | None = None
    """The size of a value where it is not ``head_dim``: 0 where values are made from the keys."""

    @classmethod
    def of(cls, model: nn.Module, batch: int) -> "CacheShape":
        """The shape that ``model`` (a ``Decoder``) needs for ``batch`` rows, in its dtype and on its device.

        Under autocast the dtype is that in which its projections come then. Linear layers, which keep no keys, are not
        counted.
        """
        config, weight = model.config, next(model.parameters())
        heads, head_dim, value_dim = config.cached_dims
        layers = config.layers - config.types_of_layers.count("linear")
        return cls(layers, batch, heads, head_dim, product_dtype(weight), weight.device, value_dim)

    @property
    def size_of_value(self) -> int:
        """``value_dim``, or ``head_dim`` where that says nothing else."""
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token of one row takes: a key and a value in every layer and kv head."""
        return self.layers * self.kv_heads * (self.head_dim + self.size_of_value) * self.dtype.itemsize


@dataclass
class Pass:
    """What all layers of one forward pass share, worked out once.

    Attributes:
        length: T, the new tokens per row, padding included.
        positions: (batch, T) int64, the place of each new token.
        real: (batch, T) boolean, False for padding; None where all tokens are real.
        start: the place of the first new token where it is one number for all rows and all tokens are real, else None.
        columns: how many stored keys the pass looks at, its own included.
        visible: (batch, 1, T, columns) boolean, True where a query may look; None where causality says it all.
        survivors: (rows, places, slots), each (n,) int64: which new tokens are kept, and where; None where all are.
        lengths_after: how many tokens each row holds once the pass is stored; None where the device alone knows.
    """

    length: int
    positions: Tensor
    real: Tensor | None
    start: int | None
    columns: int
    visible: Tensor | None = None
    survivors: tuple[Tensor, Tensor, Tensor] | None = None
    lengths_after: list[int] | None = None


class LayerCache:
    """One layer's part of a cache."""

    def __init__(self, cache: "KVCache", index: int):
        self.cache, self.index = cache, index

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, attend: Attend, mask: Tensor | None = None) -> Tensor:
        """Store the new keys and values, then let the new queries look at all that the cache holds up to them.

        Args:
            q: (batch, heads, T, head_dim).
            k: (batch, kv_heads, T, head_dim), rotated already where the model rotates keys.
            v: (batch, kv_heads, T, head_dim).
            attend: any attention form under the contract.
            mask: boolean, broadcastable to (batch, heads, T, S), on top of causality. Its column s is the token at
                place s of a row; S counts the tokens of the longest row, the new ones too.

        Returns:
            (batch, heads, T, head_dim); zeros for padding.

        Raises:
            ValueError: the cache is full, or the new keys or the mask do not fit it: the message names both.
        """
        self.cache.check(k, v)
        attend = self.cache.placed(attend, k.shape[2])
        now = self.cache.current_pass(k.shape[2])
        mask = self.cache.mask_on_columns(mask, now)
        self.cache.unfinished = now
        keys, values = self.cache.store(self.index, k.detach(), v.detach(), now)  # (batch, kv_heads, S, head_dim)
        causal = now.visible is None and now.length > 1
        return attend(q, keys, values, mask=masks.combine(now.visible, mask), causal=causal)


class KVCache(ABC):
    """What the caches share: how long each row is, which of the new tokens are real, and what may be refused."""

    def __init__(self, shape: CacheShape):
        self.shape = shape
        self.lengths = torch.zeros(shape.batch, dtype=torch.int64, device=shape.device)
        self.host_lengths = [0] * shape.batch  # the same numbers where reading them does not wait for a GPU
        self.counts: list[int] | None = None
        self.unfinished: Pass | None = None  # a pass that has stored something and was not counted yet
        self._pass: Pass | None = None

    def expect(self, counts: Sequence[int]) -> None:
        """Say that the next pass is ragged: row b brings ``counts[b]`` real tokens, and padding to their right.

        Padding is never stored and never seen, whatever it holds, NaN included.
        """
        counts = whole_numbers(counts)
        if len(counts) != self.shape.batch or any(count < 0 for count in counts):
            raise ValueError(f"counts must be {counted(self.shape.batch, 'number')} of at least 0, got {counts}")
        self.counts, self._pass = counts, None

    def positions(self, T: int) -> Tensor:
        """The places of the next T tokens in their rows, (batch, T) int64; padding is given place 0."""
        self._pass = self.plan(T)
        real = self._pass.real
        return self._pass.positions if real is None else self._pass.positions.masked_fill(~real, 0)

    def layer(self, index: int) -> LayerCache:
        """The part of layer ``index``.

        Raises:
            ValueError: there is no such layer.
        """
        if not 0 <= index < self.shape.layers:
            raise ValueError(f"the cache has layers 0 to {self.shape.layers - 1}, got {index}")
        return LayerCache(self, index)

    def advance(self, T: int) -> None:
        """Count the T tokens that all layers have stored (of a ragged pass, the real ones).

        Raises:
            ValueError: the pass that is under way has another length.
        """
        self.check_length(T)
        counts = [T] * self.shape.batch if self.counts is None else self.counts
        self.lengths += T if self.counts is None else self._on_device(counts)
        self.host_lengths = [n + count for n, count in zip(self.host_lengths, counts, strict=True)]
        self.counts, self._pass, self.unfinished = None, None, None

    def check_length(self, T: int) -> None:
        """Refuse to count T tokens where the pass that is under way brought another number of them."""
        if self._pass is not None and self._pass.length != T:
            raise ValueError(
                f"the pass that is under way brought {counted(self._pass.length, 'token')}, to be counted: {T}"
            )

    def current_pass(self, T: int) -> Pass:
        """The pass that is under way, or a new one where none is."""
        if self._pass is None or self._pass.length != T:
            self._pass = self.plan(T)
        return self._pass

    def plan(self, T: int) -> Pass:
        """Work out what the layers of a pass of T tokens share."""
        if self.counts is not None and max(self.counts, default=0) > T:
            raise ValueError(
                f"the cache expects up to {counted(max(self.counts), 'token')} in a row, the pass brings {T}"
            )
        self.abandon()
        counts = [T] * self.shape.batch if self.counts is None else self.counts
        ends = [n + count for n, count in zip(self.host_lengths, counts, strict=True)]
        self.check_room(ends)
        steps = torch.arange(T, device=self.lengths.device)
        ragged = any(count != T for count in counts)
        real = steps < self._on_device(counts)[:, None] if ragged else None  # (batch, T)
        start = self.host_lengths[0] if not ragged and len(set(self.host_lengths)) == 1 else None
        positions = self.lengths[:, None] + steps
        return self.complete(Pass(T, positions, real, start, max(ends, default=0), lengths_after=ends))

    def mask_on_columns(self, mask: Tensor | None, now: Pass) -> Tensor | None:
        """A mask over the places of the tokens, (..., T, S), as one over the columns that the pass looks at.

        Raises:
            ValueError: the mask covers another number of tokens than the longest row holds after the pass.
        """
        places = None if mask is None or mask.dim() == 0 or mask.shape[-1] == 1 else self.places(now)
        if places is None:
            return mask
        S = mask.shape[-1] if now.lengths_after is None else max(now.lengths_after, default=0)
        if mask.dim() > 4 or mask.shape[-1] != S:
            raise ValueError(f"the longest row holds {S} tokens, which a mask must cover, got {tuple(mask.shape)}")
        full = F.pad(mask[(None,) * (4 - mask.dim())], (0, 1), value=False).expand(self.shape.batch, -1, -1, -1)
        column = places.masked_fill(places < 0, S)[:, None, None, :]  # for a hole, the column that hides it
        return full.gather(3, column.expand(-1, *full.shape[1:3], -1))  # (batch, heads or 1, T or 1, columns)

    def placed(self, attend: Attend, T: int) -> Attend:
        """The form that T new tokens attend by, told where queries and keys stand if it depends on that."""
        if not isinstance(attend, AttentionVariant) or (attend.window is None and not attend.alibi):
            return attend
        now = self.current_pass(T)
        keys = self.places(now)
        keys = torch.arange(now.columns, device=self.lengths.device)[None] if keys is None else keys
        return partial(attend, places=(now.positions, keys))

    def places(self, now: Pass) -> Tensor | None:
        """(batch, columns) the place of the token in each column of a pass, negative for none; None if the same."""
        return None

    def abandon(self) -> None:
        """Undo what a pass stored that failed before its end, so that nothing of it is ever seen, NaN included."""
        if self.unfinished is not None:
            self.erase_after(self.host_lengths)
            self.unfinished = None

    def check(self, k: Tensor, v: Tensor) -> None:
        """Refuse keys and values that do not fit what the cache was made for."""
        shape = self.shape
        for name, x, size in (("keys", k, shape.head_dim), ("values", v, shape.size_of_value)):
            wanted = (shape.batch, shape.kv_heads, size)
            if x.device != self.lengths.device:
                raise ValueError(f"the cache is on {self.lengths.device}, the {name} came on {x.device}")
            if x.dtype != shape.dtype:
                raise ValueError(f"the cache holds {shape.dtype}, the {name} came in {x.dtype}")
            came = (x.shape[0], x.shape[1], x.shape[3])
            for what, want, have in zip(("batch", "kv_heads", "head_dim"), wanted, came, strict=True):
                if want != have:
                    raise ValueError(f"the cache was made for {what} {want}, the {name} came with {what} {have}")

    def check_room(self, ends: list[int]) -> None:  # noqa: B027 (a cache without a limit has nothing to refuse)
        """Refuse a pass after which some row would hold more than there is room for."""

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token of one row takes: a key and a value in every layer and kv head."""
        return self.shape.bytes_per_token

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of keys and values that the cache takes now, used or reserved."""

    @abstractmethod
    def complete(self, now: Pass) -> Pass:
        """Add to a pass what depends on how this cache lays out its keys: what is visible, what is kept."""

    @abstractmethod
    def store(self, layer: int, k: Tensor, v: Tensor, now: Pass) -> tuple[Tensor, Tensor]:
        """Keep the new keys and values, each (batch, kv_heads, T, head_dim), and return all that the pass looks at."""

    @abstractmethod
    def erase_after(self, lengths: Sequence[int]) -> None:
        """Leave no number of a token after the first ``lengths[b]`` of each row b where a later pass would meet it."""

    @abstractmethod
    def reset(self) -> None:
        """Forget everything, as if just made."""

    @abstractmethod
    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget all but the first ``lengths[b]`` tokens of each row b (a rejected draft, an edited prompt).

        Raises:
            ValueError: a row holds fewer tokens than it is to keep, or a ring has lost some of them.
        """

    @abstractmethod
    def reorder(self, rows: Sequence[int]) -> None:
        """Row b becomes a copy of what row ``rows[b]`` was; more or fewer rows than before may be named.

        Raises:
            ValueError: there is no such row.
        """

    def _set_lengths(self, lengths: Sequence[int]) -> None:
        """Set the lengths in place: a captured graph holds their address."""
        self.lengths.copy_(self._on_device(lengths))
        self.host_lengths, self.counts, self._pass, self.unfinished = list(lengths), None, None, None

    def check_truncate(self, lengths: Sequence[int]) -> list[int]:
        """The lengths that rows are to be cut to, as integers.

        Raises:
            ValueError: they cannot be cut to them; nothing has changed.
        """
        lengths = whole_numbers(lengths)
        fits = len(lengths) == self.shape.batch and all(
            0 <= n <= held for n, held in zip(lengths, self.host_lengths, strict=True)
        )
        if not fits:
            raise ValueError(f"rows hold {self.host_lengths} tokens, which cannot be truncated to {lengths}")
        return lengths

    def _take_rows(self, rows: Sequence[int]) -> tuple[list[int], Tensor]:
        """The bookkeeping of ``reorder``; returns the rows, also as an index. An expectation is forgotten."""
        rows = whole_numbers(rows)
        if not all(0 <= row < self.shape.batch for row in rows):
            raise ValueError(f"the cache has rows 0 to {self.shape.batch - 1}, got {rows}")
        self.abandon()
        index = self._on_device(rows)
        self.lengths = self.lengths[index]
        self.host_lengths = [self.host_lengths[row] for row in rows]
        self.shape = replace(self.shape, batch=len(rows))
        self.counts, self._pass = None, None
        return rows, index

    def _on_device(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.lengths.device)


def whole_numbers(numbers: Sequence[int] | Tensor) -> list[int]:
    """A list of Python integers, whatever they came in.

    Raises:
        ValueError: one of them is no integer, or there is no list of them.
    """
    try:
        numbers = numbers.tolist() if isinstance(numbers, Tensor) else list(numbers)
        return [whole(number) for number in numbers]
    except TypeError:
        raise ValueError(f"lengths, counts and rows must be integers, got {numbers}") from None
