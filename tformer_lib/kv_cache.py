"""KV caches: keep each token's keys and values, so that the next token costs one token's work, not the whole text's.

A decoder's keys and values at a position depend on the tokens up to there and on nothing later. Once computed they
never change, so a generated token needs only its own query, key and value, and one look over the stored ones.

Three caches stand behind one interface, which ``Decoder.forward(tokens, cache=cache)`` drives:

- :class:`GrowingCache` concatenates: the idea in its shortest form, with a copy of everything at each token.
- :class:`PreallocatedCache` writes into memory that it reserved: no copies, fixed addresses, a limit.
- :class:`RingCache` keeps the first few tokens and the latest window, so that its memory never grows.

The interface, which a paged cache implements as well:

- ``cache.expect(counts)``: the next pass is ragged, row b brings counts[b] real tokens and padding to their right.
- ``cache.positions(T)``: (batch, T) the places of the next T tokens. ``cache.lengths``: (batch,) tokens held so far.
- ``cache.layer(i).attend(q, k, v, attend=..., mask=...)``: store the T new keys and values, and attend over all held.
- ``cache.advance(T)``: the pass is over, its tokens count from now on.

A cache serves inference: what it stores carries no gradient.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import index as whole

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tformer_lib import masks


@dataclass(frozen=True)
class CacheShape:
    """What a cache holds for each token, and for how many rows."""

    layers: int
    batch: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"

    @classmethod
    def of(cls, model: nn.Module, batch: int) -> "CacheShape":
        """The shape that ``model`` (a ``Decoder``) needs for ``batch`` rows, in its dtype and on its device."""
        config, weight = model.config, next(model.parameters())
        heads, head_dim = config.number_of_kv_heads, config.size_of_head
        return cls(config.layers, batch, heads, head_dim, weight.dtype, weight.device)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token of one row takes: a key and a value in every layer and kv head."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True)
class Cost:
    """The least that a pass must do: floating-point operations, and bytes read from or written to memory."""

    flops: int
    bytes: int


def pass_cost(config, *, held: int, new: int, itemsize: int = 4) -> Cost:
    """What one row's pass of a ``Decoder`` costs, embeddings and norms left out.

    Of a mixture of experts, those that one token passes through are read: a row of several tokens may read more.

    Args:
        config: the model's ``ModelConfig``.
        held: tokens whose keys and values are in the cache already; 0 without a cache.
        new: tokens that the pass brings: 1 for a cached decode step, the whole text without a cache.
        itemsize: bytes of a number.
    """
    q_width = config.heads * config.size_of_head
    kv_width = config.number_of_kv_heads * config.size_of_head
    projections = config.layers * 2 * config.width * (q_width + kv_width)
    weights = projections + config.active_feed_forward_weights + config.width * config.vocab_size
    pairs = new * held + new * (new + 1) // 2  # of a query with a key that it may see
    attention = config.layers * 4 * q_width * pairs  # a multiply and an add, in the scores and in the mix of values
    kv_numbers = 2 * config.layers * kv_width * (held + new)
    return Cost(2 * weights * new + attention, (weights + kv_numbers) * itemsize)


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

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, attend: Callable[..., Tensor], mask: Tensor | None = None
    ) -> Tensor:
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
            raise ValueError(f"counts must be {self.shape.batch} numbers of at least 0, got {counts}")
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
        """Count the T tokens that all layers have stored (of a ragged pass, the real ones)."""
        counts = [T] * self.shape.batch if self.counts is None else self.counts
        self.lengths += T if self.counts is None else self._on_device(counts)
        self.host_lengths = [n + count for n, count in zip(self.host_lengths, counts, strict=True)]
        self.counts, self._pass, self.unfinished = None, None, None

    def current_pass(self, T: int) -> Pass:
        """The pass that is under way, or a new one where none is."""
        if self._pass is None or self._pass.length != T:
            self._pass = self.plan(T)
        return self._pass

    def plan(self, T: int) -> Pass:
        """Work out what the layers of a pass of T tokens share."""
        if self.counts is not None and max(self.counts, default=0) > T:
            raise ValueError(f"the cache expects up to {max(self.counts)} tokens in a row, the pass brings {T}")
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
        wanted = (shape.batch, shape.kv_heads, shape.head_dim)
        for name, x in (("keys", k), ("values", v)):
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

    def _check_static(self, T: int) -> None:
        """Refuse a pass that a recording for one token a row does not fit."""
        if T != 1 or self.counts is not None:
            came = f"{T} a row" if self.counts is None else f"{self.counts}"
            raise ValueError(f"under static_shapes a pass brings 1 token a row, got {came}")

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token of one row takes: 2 * layers * kv_heads * head_dim * bytes of a number."""
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

    def _checked_shorter(self, lengths: Sequence[int]) -> list[int]:
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
        ValueError: one of them is no integer.
    """
    numbers = numbers.tolist() if isinstance(numbers, Tensor) else list(numbers)
    try:
        return [whole(number) for number in numbers]
    except TypeError:
        raise ValueError(f"lengths, counts and rows must be integers, got {numbers}") from None


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
        nothing = torch.zeros(shape.batch, shape.kv_heads, 0, shape.head_dim, dtype=shape.dtype, device=shape.device)
        self.keys, self.values = [nothing] * shape.layers, [nothing] * shape.layers
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
        lengths = self._checked_shorter(lengths)
        self.erase_after(lengths)
        self._set_lengths(lengths)

    def reorder(self, rows: Sequence[int]) -> None:
        """Row b becomes a copy of what row ``rows[b]`` was."""
        _, index = self._take_rows(rows)
        self.keys, self.values = [x[index] for x in self.keys], [x[index] for x in self.values]
        self.column_positions = self.column_positions[index]


class PreallocatedCache(KVCache):
    """Write into memory that was reserved for ``capacity`` tokens a row: token p of a row is in slot p.

    Args:
        shape: what is held for each token.
        capacity: the most tokens that a row may hold.
    """

    def __init__(self, shape: CacheShape, capacity: int):
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1 token, got {capacity}")
        super().__init__(shape)
        self.capacity = capacity
        size = (shape.layers, shape.batch, shape.kv_heads, capacity, shape.head_dim)
        self.keys = torch.zeros(size, dtype=shape.dtype, device=shape.device)
        self.values = torch.zeros_like(self.keys)  # zeros: a weight of 0 times an unwritten NaN would be NaN
        self.slots = torch.arange(capacity, device=shape.device)
        self.rows = torch.arange(shape.batch, device=shape.device)[:, None]  # (batch, 1)
        self.is_static = False

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values reserved."""
        return 2 * self.keys.numel() * self.keys.element_size()

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

    @contextmanager
    def static_shapes(self) -> Iterator[None]:
        """Within it, a pass of one token looks at all slots behind a mask that the device makes from ``lengths``.

        Nothing then depends on a number that the host knows, so one recording of the pass (a CUDA graph, a compiled
        function) is right at every length. The host's books stand still meanwhile: call ``replayed()`` after each pass.
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
        self._check_static(T)
        self.abandon()
        positions = self.lengths[:, None]  # (batch, 1)
        filled = self.slots <= positions  # (batch, capacity); a ring's slots fill in order too
        return Pass(1, positions, None, None, self.capacity, filled[:, None, None, :])

    def advance(self, T: int) -> None:
        """Count the T tokens that all layers have stored; on the device alone under ``static_shapes``."""
        if not self.is_static:
            return super().advance(T)
        self.lengths += T
        self._pass, self.unfinished = None, None

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
        lengths = self._checked_shorter(lengths)
        self.erase_after(lengths)
        self._set_lengths(lengths)

    def reorder(self, rows: Sequence[int]) -> None:
        """Row b becomes a copy of what row ``rows[b]`` was; the memory moves, so a graph must be captured anew."""
        rows, index = self._take_rows(rows)
        self.keys, self.values = self.keys[:, index], self.values[:, index]
        self.rows = torch.arange(len(rows), device=index.device)[:, None]


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

    def erase_after(self, lengths: Sequence[int]) -> None:
        """Write zeros over later tokens.

        Raises:
            ValueError: a row has more of them than slots: they have overwritten what it would see.
        """
        held = self.host_lengths if self.unfinished is None else self.unfinished.lengths_after
        if held is None or any(n > self.capacity for n in held):
            came = "" if self.unfinished is None else ", with those of a pass that failed"
            raise ValueError(f"rows hold {held} tokens{came}, of which a ring of {self.capacity} has lost some")
        super().erase_after(lengths)
