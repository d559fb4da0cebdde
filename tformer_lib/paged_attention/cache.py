"""The cache interface of ``kv_cache`` over one pool of blocks for all layers."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tformer_lib.attention import AttentionVariant, attend, attend_sdpa
from tformer_lib.contract import check_integer, counted
from tformer_lib.flash_attention import flash_attention
from tformer_lib.kv_cache import CacheShape, LayerCache, Pass, StaticCache, whole_numbers
from tformer_lib.paged_attention.attention import paged_attention, write_cache
from tformer_lib.paged_attention.blocks import BLOCK_SIZE, BlockAllocator, BlockTable, Copies, OutOfBlocks, blocks_for
from tformer_lib.paged_attention.reference import gather_blocks


@dataclass
class PagedPass(Pass):
    """A pass over a paged cache.

    Attributes:
        slots: (batch * T,) int64, where each new token goes; -1 for padding.
        tables: (batch, blocks) int32.
        ends: (batch,) int32, keys of each row once the pass is stored.
        packed: (real tokens,) int64, which of the batch * T tokens are real; None where all are.
        starts: (batch + 1,) int32, where each row's real tokens begin among them; None for one token a row.
    """

    slots: Tensor | None = None
    tables: Tensor | None = None
    ends: Tensor | None = None
    packed: Tensor | None = None
    starts: Tensor | None = None


PLAIN_FORMS = (attend, attend_sdpa, flash_attention)
"""Attention forms that compute what :func:`paged_attention` does, so that it may stand in for them."""


class PagedLayer(LayerCache):
    """One layer's part of a paged cache."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, attend: Callable[..., Tensor], mask: Tensor | None = None
    ) -> Tensor:
        """As for any cache; plain softmax attention is read from the blocks, other forms get a contiguous copy."""
        variant = as_variant(attend)
        if variant is None or mask is not None:
            return super().attend(q, k, v, attend=attend, mask=mask)
        self.cache.check(k, v)
        now = self.cache.current_pass(k.shape[2])
        self.cache.write(self.index, k.detach(), v.detach(), now)
        return self.cache.look(self.index, q, now, variant)


def as_variant(attend: Callable[..., Tensor]) -> AttentionVariant | None:
    """The form as a variant that :func:`paged_attention` can compute (window, scale, sinks); None if it is another."""
    variant = attend if isinstance(attend, AttentionVariant) else AttentionVariant(attend)
    changes_scores = variant.softcap is not None or variant.alibi or variant.bias is not None or variant.dropout
    return None if changes_scores or variant.form not in PLAIN_FORMS else variant


class PagedKVCache(StaticCache):
    """A cache whose rows take blocks from one pool as they grow; rows may share blocks.

    Args:
        shape: what is held for each token.
        blocks: how many blocks the pool has, for all rows together.
        block_size: tokens in a block.
        max_length: the most tokens that a row may hold; as many as fit the pool if not given.
        step: which implementation of :func:`write_cache` and :func:`paged_attention` to use.
    """

    def __init__(
        self,
        shape: CacheShape,
        blocks: int,
        block_size: int = BLOCK_SIZE,
        *,
        max_length: int | None = None,
        step: int | str | None = None,
    ):
        if shape.size_of_value != shape.head_dim:
            raise ValueError(f"a pool holds values of head_dim {shape.head_dim} numbers, got {shape.size_of_value}")
        if max_length is not None:
            check_integer("max_length", max_length)
            if max_length < 1:
                raise ValueError(f"max_length must be at least 1 token, got {max_length}")
        super().__init__(shape)
        self.allocator = BlockAllocator(blocks, block_size)
        self.max_length = blocks * block_size if max_length is None else max_length
        self.step = step
        size = (shape.layers, 2, blocks, shape.kv_heads, block_size, shape.head_dim)
        self.pools = torch.zeros(size, dtype=shape.dtype, device=shape.device)
        self._make_tables([BlockTable(self.allocator) for _ in range(shape.batch)])

    def _make_tables(self, rows: list[BlockTable]) -> None:
        """Hold these rows, and a copy of their block tables on the device; entry 0 where a row has no block."""
        width = blocks_for(self.max_length, self.allocator.block_size)
        self.rows = rows
        self.host_tables = torch.zeros(len(rows), width, dtype=torch.int32)
        self.tables = torch.zeros_like(self.host_tables, device=self.shape.device)
        self._upload(range(len(rows)))

    def _upload(self, changed: Iterable[int]) -> None:
        """Bring the device's block tables up to date."""
        changed = list(changed)
        for row in changed:
            blocks = self.rows[row].blocks
            self.host_tables[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        if changed:
            used = max(len(row.blocks) for row in self.rows)
            self.tables[:, :used].copy_(self.host_tables[:, :used])

    @property
    def nbytes(self) -> int:
        """Bytes of the pool."""
        return self.pools.numel() * self.pools.element_size()

    @property
    def nbytes_held(self) -> int:
        """Bytes of the blocks that rows hold; a shared block counts once."""
        return self.allocator.held * self.allocator.block_size * self.bytes_per_token

    def reset(self) -> None:
        """Forget everything, cached prefixes too."""
        self.allocator.reset()
        for row in self.rows:
            row.blocks, row.length, row.prefixes = [], 0, []
        self._set_lengths([0] * self.shape.batch)

    def check_room(self, ends: list[int]) -> None:
        """Take the blocks that a pass needs, or refuse it: :class:`OutOfBlocks`, a ValueError, names the shortage."""
        for row, end in enumerate(ends):
            if end > self.max_length:
                raise ValueError(
                    f"the cache is full: row {row} would hold {end} of at most {counted(self.max_length, 'token')}"
                )
        changed, copies = [], []
        try:
            for index, (row, end) in enumerate(zip(self.rows, ends, strict=True)):
                before = len(row.blocks)
                copied = self._reserve(index, row, end - row.length)
                copies += copied
                if copied or len(row.blocks) != before:
                    changed.append(index)
        finally:  # rows before the one that was refused keep what they got
            self._copy(copies)
            self._upload(changed)

    def _reserve(self, index: int, row: BlockTable, tokens: int) -> Copies:
        try:
            return row.reserve(tokens)
        except OutOfBlocks as error:
            held = f"row {index} holds {row.length} tokens, and {tokens} more came"
            raise OutOfBlocks(f"the cache is full: {held}: {error}") from None

    def _copy(self, copies: Copies) -> None:
        """Copy blocks in every layer, keys and values."""
        if copies:
            sources, targets = (self._on_device(side) for side in zip(*copies, strict=True))
            self.pools[:, :, targets] = self.pools[:, :, sources]

    def layer(self, index: int) -> PagedLayer:
        """The part of layer ``index``."""
        super().layer(index)  # refuses an index out of range
        return PagedLayer(self, index)

    def replayed(self) -> None:
        """Count one more token per row on the host; call ``check_room``, which takes the blocks, before each pass."""
        super().replayed()
        for row in self.rows:
            row.advance(1)

    def static_plan(self) -> Pass:
        """A pass of one token reads lengths and tables from the device alone."""
        return self.complete(Pass(1, self.lengths[:, None], None, None, self.max_length))

    def complete(self, now: Pass) -> PagedPass:
        """Where the new tokens go, and where each row's keys are."""
        size, used = self.allocator.block_size, blocks_for(now.columns, self.allocator.block_size)
        shared = (now.length, now.positions, now.real, now.start, now.columns, now.visible, now.survivors)
        paged = PagedPass(*shared, tables=self.tables[:, :used])
        places = (now.positions // size).clamp_max(self.tables.shape[1] - 1)  # padding may lie past the table
        slots = self.tables.gather(1, places).long() * size + now.positions % size  # (batch, T)
        paged.slots = (slots if now.real is None else slots.masked_fill(~now.real, -1)).flatten()
        if now.real is not None:
            paged.packed = self._on_device(real_places(self.counts, now.length))
        counts = [now.length] * self.shape.batch if self.counts is None else self.counts
        paged.ends = (self.lengths + (now.length if self.counts is None else self._on_device(counts))).int()
        if now.length != 1 or now.real is not None:
            paged.starts = self._on_device(running_sum(counts)).int()
        return paged

    def advance(self, T: int) -> None:
        """Count the tokens that all layers have stored; on the device alone under ``static_shapes``."""
        super().advance(T)
        if not self.is_static:
            for row, length in zip(self.rows, self.host_lengths, strict=True):
                row.advance(length - row.length)

    def write(self, layer: int, k: Tensor, v: Tensor, now: PagedPass) -> None:
        """Put new keys and values (batch, kv_heads, T, head_dim) into their slots."""
        k, v = (x.transpose(1, 2).flatten(0, 1) for x in (k, v))  # (batch * T, kv_heads, head_dim)
        write_cache(k, v, *self.pools[layer], now.slots, step=self.step)

    def look(self, layer: int, q: Tensor, now: PagedPass, variant: AttentionVariant) -> Tensor:
        """Attention of q (batch, heads, T, head_dim) over the blocks; zeros for padding."""
        batch, _, T, _ = q.shape
        queries = q.transpose(1, 2).flatten(0, 1)  # (batch * T, heads, head_dim)
        real = queries if now.packed is None else queries[now.packed]
        rows = {"query_starts": now.starts, "max_queries": T, "scale": variant.scale, "window": variant.window}
        with_sinks = variant.sinks is not None
        found = paged_attention(
            real, *self.pools[layer], now.tables, now.ends, step=self.step, return_lse=with_sinks, **rows
        )
        found = variant.with_sinks(*found) if with_sinks else found
        out = found if now.packed is None else torch.zeros_like(queries).index_copy(0, now.packed, found)
        return out.unflatten(0, (batch, T)).transpose(1, 2)

    def store(self, layer: int, k: Tensor, v: Tensor, now: PagedPass) -> tuple[Tensor, Tensor]:
        """Write, and return a contiguous copy of what the rows hold, for forms that cannot read blocks."""
        self.write(layer, k, v, now)
        if now.start is None:
            seen = torch.arange(now.columns, device=k.device) <= now.positions[:, :, None]  # (batch, T, S)
            now.visible = (seen if now.real is None else seen & now.real[:, :, None])[:, None]
        keys, values = (gather_blocks(pool, now.tables, now.ends, now.columns) for pool in self.pools[layer])
        return keys, values

    def erase_after(self, lengths: Sequence[int]) -> None:
        """Nothing: no pass looks past a row's length, whatever lies there."""

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget all but the first ``lengths[b]`` tokens of each row b; blocks without holders go back."""
        lengths = self.check_truncate(lengths)
        for row, length in zip(self.rows, lengths, strict=True):
            row.truncate(length)
        self._set_lengths(lengths)

    def reorder(self, rows: Sequence[int]) -> None:
        """Row b becomes a fork of what row ``rows[b]`` was: no keys or values move until a row writes."""
        rows, _ = self._take_rows(rows)
        forks = [self.rows[row].fork() for row in rows]
        for row in self.rows:
            row.free()
        self._make_tables(forks)

    def reuse(self, row: int, tokens: Sequence[int]) -> int:
        """Let an empty row hold the cached beginning of a prompt; returns how many tokens need not be computed.

        Raises:
            ValueError: the row holds tokens, there is no such row, or the prompt is longer than a row may be.
        """
        row, tokens = self._text_of(row, tokens)
        reused = self.rows[row].reuse(tokens)
        lengths = list(self.host_lengths)
        lengths[row] = reused
        self._upload([row])
        self._set_lengths(lengths)
        return reused

    def publish(self, row: int, tokens: Sequence[int]) -> None:
        """Let later prompts find the full blocks of a row, which holds these tokens.

        Raises:
            ValueError: there is no such row, or there are more tokens than a row may hold.
        """
        row, tokens = self._text_of(row, tokens)
        self.rows[row].publish(tokens)

    def _text_of(self, row: int, tokens: Sequence[int] | Tensor) -> tuple[int, list[int]]:
        """A row and its tokens as integers: two tensors that hold one number are two keys of a dictionary."""
        (row,), tokens = whole_numbers([row]), whole_numbers(tokens)
        if not 0 <= row < self.shape.batch or len(tokens) > self.max_length:
            room = f"{counted(self.shape.batch, 'row')} of at most {counted(self.max_length, 'token')}"
            raise ValueError(f"the cache has {room}, got row {row} and {counted(len(tokens), 'token')}")
        return row, tokens


def real_places(counts: Sequence[int], T: int) -> list[int]:
    """The places of the real tokens in a batch that is padded to T on the right and then flattened."""
    return [row * T + step for row, count in enumerate(counts) for step in range(count)]


def running_sum(counts: Sequence[int]) -> list[int]:
    """0, then the sum of the first count, of the first two, ..."""
    sums = [0]
    for count in counts:
        sums.append(sums[-1] + count)
    return sums
