"""Paged attention: keys and values live in blocks of one pool, and a block table says where each sequence's are.

A contiguous cache must reserve what a sequence might grow to. Here memory is handed out in blocks of a few tokens, as
an operating system hands out pages, so that a sequence wastes less than one block, and sequences with a common
beginning can hold the same blocks (Kwon et al., "PagedAttention", arXiv:2309.06180).

Memory:

- :class:`BlockAllocator` counts who holds each block, and finds blocks again by the tokens that they hold.
- :class:`BlockTable` is one sequence's list of blocks: append, fork, truncate, free.
- :class:`PagedKVCache` is a cache behind the interface of ``kv_cache``, over one pool for all layers.

Attention over it: :func:`write_cache` puts new keys and values into their slots, :func:`paged_attention` walks the
tables. Pools are (blocks, kv_heads, block_size, head_dim); token p of a sequence is in block ``table[p // block_size]``
at offset ``p % block_size``, and its slot is block * block_size + offset.

The ladder of implementations, each callable by its ``step``; ``step=None`` takes the top one that can do what is asked:

===================== ====================== ========================================== ==============================
step                  source                 what it is                                 runs on
===================== ====================== ========================================== ==============================
0                     this file              blocks gathered, plain attention: the      anything
                                             reference
"cpu"                 cpu.cpp                tiles of keys read from the blocks, in     a CPU, f32 bf16 f16
                                             vectors
1                     1_block_table.cu       decode: a thread block a query head        a GPU, head_dim up to 256
2                     2_split_kv.cu          decode: work cut evenly, tensor cores,     sm_80 on, bf16 f16,
                                             cp.async                                   head_dim 64 128
"prefill_tensor_core" prefill_tensor_core.cu many queries a row, by mma.sync; step 2    sm_80 on, bf16 f16,
                                             for the rows with one                      head_dim 64 128 256
"prefill_hopper"      prefill_hopper.cu      the same by TMA and wgmma                  sm_90, the same; blocks of 8
                                                                                        or more
"prefill"                                    the better of the two that can do it
===================== ====================== ========================================== ==============================

All of them read pools of q's dtype, and all but "prefill_hopper" pools of float8. What a GPU's kernels refuse runs
step 0, which waits for the device.
"""

import ctypes
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from tformer_lib import jit
from tformer_lib.attention import attend, attend_sdpa, gather, masked_softmax, scaled_scores
from tformer_lib.contract import check_heads
from tformer_lib.flash_attention import flash_attention
from tformer_lib.kv_cache import CacheShape, KVCache, LayerCache, Pass
from tformer_lib.rope import rotate

BLOCK_SIZE = 16
FP8 = torch.float8_e4m3fn
POOL_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, FP8)


# --- the public door -----------------------------------------------------------------------------------------------


def write_cache(
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slots: Tensor,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    layout: str = "half",
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    step: int | str | None = None,
) -> None:
    """Put new keys and values into their slots of the pools, in place.

    Args:
        k, v: (tokens, kv_heads, head_dim), any strides with adjacent columns.
        k_pool, v_pool: (blocks, kv_heads, block_size, head_dim), any strides with adjacent columns.
        slots: (tokens,) int64, block * block_size + offset; -1 for a token that is not to be stored. On a GPU, where
            looking would wait for it, they are believed.
        cos, sin: (tokens, rotary_dim / 2) float32: the keys are turned by these angles on the way, as ``rope`` does.
        layout: of RoPE's pairs, "half" or "interleaved".
        k_scale, v_scale: a pool of float8 holds x / scale, cut off at the largest float8.
        step: which implementation; the best that the device runs if not given, 0 is PyTorch.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message names what was expected and what came.
    """
    run = torch.ops.tformer_lab.write_cache if is_traced(k) else run_write
    run(k, v, k_pool, v_pool, slots, cos, sin, layout, k_scale, v_scale, None if step is None else str(step))


def paged_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    *,
    query_starts: Tensor | None = None,
    max_queries: int | None = None,
    scale: float | None = None,
    window: int | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    step: int | str | None = None,
    checked: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of each row's newest tokens over all its keys, which lie in blocks.

    Args:
        q: (batch, heads, head_dim), one query a row, the row's last token; or with ``query_starts`` (total, heads,
            head_dim), the queries of all rows end to end.
        k_pool, v_pool: (blocks, kv_heads, block_size, head_dim); kv_heads divides heads.
        block_tables: (batch, max_blocks) int32, the blocks of each row in order; what stands past a row's last block
            is ignored.
        lengths: (batch,) int32, keys of each row, those of its queries included (they are written already); 0 for an
            empty row.
        query_starts: (batch + 1,) int32; row b's queries are q[starts[b] : starts[b + 1]], the last of its tokens.
            Prefill, prefill in chunks and decoding rows may stand side by side.
        max_queries: the most queries that a row has, where the host knows it; kernels size their grid by it.
        scale: of the scores, head_dim ** -0.5 if not given.
        window: a query sees itself and the ``window - 1`` keys before it.
        k_scale, v_scale: what the numbers in the pools are multiplied by.
        step: which implementation; the best that the device runs if not given, 0 is PyTorch.
        checked: look for block ids out of range and for lengths past the table first, which waits for the device.
        return_lse: return the log-sum-exp of every query's scores too.

    Returns:
        out, of q's shape and dtype; a query that sees no key gets zeros. With ``return_lse`` also lse, of q's shape
        without head_dim, float32 (float64 for float64), -inf for such a query.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a checked index is wrong: the message names the row.
    """
    if checked:
        check_paged(q, k_pool, v_pool, block_tables, lengths, query_starts, window)
        check_indices(k_pool, block_tables, lengths, query_starts, q.shape[0])
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    step = None if step is None else str(step)
    rows = (block_tables, lengths, query_starts, max_queries)
    options = (scale, window, float(k_scale), float(v_scale), step)
    if is_traced(q):
        out, lse = torch.ops.tformer_lab.paged_attention(q, k_pool, v_pool, *rows, *options)
    else:
        out, lse = run_attention(q, k_pool, v_pool, *rows, *options, return_lse)
    return (out, lse) if return_lse else out


def check_pools(k_pool: Tensor, v_pool: Tensor) -> None:
    """Refuse pools that are not a pair of one shape, dtype and device."""
    for name, pool in (("k_pool", k_pool), ("v_pool", v_pool)):
        if pool.dim() != 4:
            shape = tuple(pool.shape)
            raise ValueError(f"{name} must have shape (blocks, kv_heads, block_size, head_dim), got {shape}")
        if pool.dtype not in POOL_DTYPES:
            raise ValueError(f"{name} must be float64, float32, bfloat16, float16 or float8_e4m3fn, got {pool.dtype}")
    for what in ("shape", "dtype", "device"):
        if getattr(k_pool, what) != getattr(v_pool, what):
            raise ValueError(f"the pools differ in {what}: {getattr(k_pool, what)} and {getattr(v_pool, what)}")


def check_dtype(name: str, x: Tensor, pool: Tensor) -> None:
    """Refuse numbers that are not in the pool's dtype; a pool of float8 takes any."""
    if pool.dtype != FP8 and x.dtype != pool.dtype:
        raise ValueError(f"the pools hold {pool.dtype}, {name} came in {x.dtype}")


def check_integers(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int | str, ...], device) -> None:
    """Refuse an index tensor of another dtype, shape or device; a size given as a string may be anything."""
    fits = x.dim() == len(shape) and all(isinstance(n, str) or n == m for n, m in zip(shape, x.shape, strict=True))
    if x.dtype != dtype or not fits:
        wanted = "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"
        raise ValueError(f"{name} must be {dtype} of shape {wanted}, got {x.dtype} of shape {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"the pools are on {device}, {name} came on {x.device}")


def check_write(k, v, k_pool, v_pool, slots, cos, sin) -> None:
    """Refuse what :func:`write_cache` cannot store."""
    check_pools(k_pool, v_pool)
    wanted = ("tokens", k_pool.shape[1], k_pool.shape[3])
    for name, x in (("k", k), ("v", v)):
        if x.dim() != 3 or x.shape[1:] != wanted[1:] or x.shape != k.shape:
            raise ValueError(f"{name} must have shape (tokens, {wanted[1]}, {wanted[2]}), got {tuple(x.shape)}")
        if x.device != k_pool.device:
            raise ValueError(f"the pools are on {k_pool.device}, {name} came on {x.device}")
        check_dtype(name, x, k_pool)
    check_integers("slots", slots, torch.int64, (k.shape[0],), k_pool.device)
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin must be given together")
    for name, x in (("cos", cos), ("sin", sin)):
        if x is not None and (x.dim() != 2 or x.shape[0] != k.shape[0] or x.dtype != torch.float32):
            came = f"{x.dtype} of shape {tuple(x.shape)}"
            raise ValueError(f"{name} must be float32 of shape ({k.shape[0]}, rotary_dim / 2), got {came}")


def check_slots(slots: Tensor, pool: Tensor) -> None:
    """Refuse a slot past the pool, into which a kernel would write all the same. Reads the slots: for a CPU alone."""
    room = pool.shape[0] * pool.shape[2]
    if slots.numel() and (most := int(slots.max())) >= room:
        raise ValueError(f"slots hold {most}, the pool has slots 0 to {room - 1}")


def check_paged(q, k_pool, v_pool, block_tables, lengths, query_starts, window) -> None:
    """Refuse what :func:`paged_attention` cannot read. Looks at shapes alone: nothing waits for the device."""
    check_pools(k_pool, v_pool)
    if q.dim() != 3 or q.shape[2] != k_pool.shape[3]:
        raise ValueError(f"q must have shape (queries, heads, {k_pool.shape[3]}), got {tuple(q.shape)}")
    check_heads(q.shape[1], k_pool.shape[1])
    check_dtype("q", q, k_pool)
    if q.device != k_pool.device:
        raise ValueError(f"the pools are on {k_pool.device}, q came on {q.device}")
    batch = q.shape[0] if query_starts is None else lengths.shape[0]
    check_integers("lengths", lengths, torch.int32, (batch,), k_pool.device)
    check_integers("block_tables", block_tables, torch.int32, (batch, "max_blocks"), k_pool.device)
    if query_starts is not None:
        check_integers("query_starts", query_starts, torch.int32, (batch + 1,), k_pool.device)
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")


def check_indices(pool: Tensor, block_tables: Tensor, lengths: Tensor, query_starts: Tensor | None, total: int) -> None:
    """Refuse numbers that would make a kernel read outside the pools or the table, naming the row. Waits for a GPU.

    Args:
        pool: (blocks, kv_heads, block_size, head_dim).
        block_tables, lengths, query_starts: as :func:`paged_attention` takes them.
        total: how many queries there are.
    """
    blocks, _, block_size, _ = pool.shape
    room = block_tables.shape[1] * block_size
    for row, (table, length) in enumerate(zip(block_tables.tolist(), lengths.tolist(), strict=True)):
        if not 0 <= length <= room:
            raise ValueError(f"row {row} has length {length}, its table has room for 0 to {room} tokens")
        for place, block in enumerate(table[: blocks_for(length, block_size)]):
            if not 0 <= block < blocks:
                have = f"the pool has blocks 0 to {blocks - 1}"
                raise ValueError(f"row {row} names block {block} at place {place}, {have}")
    if query_starts is None:
        return
    starts = query_starts.tolist()
    if starts[0] != 0 or starts[-1] != total:
        raise ValueError(f"query_starts must go from 0 to {total}, got {starts[0]} to {starts[-1]}")
    for row, (start, stop) in enumerate(pairwise(starts)):
        if stop < start:
            raise ValueError(f"query_starts must not fall, row {row} goes from {start} to {stop}")


# --- step 0: PyTorch -----------------------------------------------------------------------------------------------


def write_in_pytorch(k, v, k_pool, v_pool, slots, cos, sin, layout, k_scale, v_scale) -> None:
    """Step 0 of :func:`write_cache`."""
    if cos is not None:
        wide = k if k.dtype == torch.float64 else k.float()
        k = rotate(wide.transpose(0, 1)[None], cos, sin, layout)[0].transpose(0, 1)  # (tokens, kv_heads, head_dim)
    kept = slots >= 0
    blocks, offsets = slots[kept] // k_pool.shape[2], slots[kept] % k_pool.shape[2]
    as_numbers(k_pool)[blocks, :, offsets] = as_numbers(to_pool(k[kept], k_pool.dtype, k_scale))
    as_numbers(v_pool)[blocks, :, offsets] = as_numbers(to_pool(v[kept], v_pool.dtype, v_scale))


def to_pool(x: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """x / scale in the pool's dtype; float8 has no infinity, so what is too large becomes the largest number."""
    if dtype != FP8:
        return x.to(dtype) if scale == 1.0 else (x / scale).to(dtype)
    most = torch.finfo(FP8).max
    return (x.float() / scale).clamp(-most, most).to(FP8)


def as_numbers(x: Tensor) -> Tensor:
    """The same memory as bytes where it is float8, which PyTorch cannot index."""
    return x.view(torch.uint8) if x.dtype == FP8 else x


def attend_in_pytorch(
    q, k_pool, v_pool, block_tables, lengths, query_starts, scale, window, k_scale, v_scale
) -> tuple[Tensor, Tensor]:
    """Step 0 of :func:`paged_attention`: rows with equally many queries are gathered and attended together."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(q.shape)
    lse = q.new_full(q.shape[:2], -torch.inf, dtype=wide)
    starts = torch.arange(q.shape[0] + 1, device=q.device) if query_starts is None else query_starts.long()
    counts = starts.diff()  # (batch,)
    for count in counts.unique().tolist():
        rows = (counts == count).nonzero().squeeze(1)
        places = starts[rows, None] + torch.arange(count, device=q.device)  # (rows, count)
        longest = int(lengths[rows].max())
        keys, values = (
            gather_blocks(pool, block_tables[rows], lengths[rows], longest).to(wide) * factor
            for pool, factor in ((k_pool, k_scale), (v_pool, v_scale))
        )  # (rows, kv_heads, S, head_dim)
        seen = visible_keys(lengths[rows], count, keys.shape[2], window)[:, None]  # (rows, 1, count, S)
        scores = scaled_scores(q[places].transpose(1, 2).to(wide), keys, scale)  # (rows, heads, count, S)
        mixed = gather(masked_softmax(scores, seen), values)  # (rows, heads, count, head_dim)
        out[places] = mixed.transpose(1, 2).to(q.dtype)
        lse[places] = scores.masked_fill(~seen, -torch.inf).logsumexp(-1).transpose(1, 2)
    return out, lse


def gather_blocks(pool: Tensor, block_tables: Tensor, lengths: Tensor, S: int) -> Tensor:
    """What a contiguous cache would hold: the rows' tokens in order, zeros past each row's length.

    Zeros, not what lies there: a weight of 0 times a stale NaN would be NaN.

    Args:
        pool: (blocks, kv_heads, block_size, head_dim).
        block_tables: (batch, max_blocks); entries past a row's last block may be anything.
        lengths: (batch,) tokens in each row.
        S: the longest length, or more.

    Returns:
        (batch, kv_heads, S, head_dim).
    """
    block_size = pool.shape[2]
    used_blocks = blocks_for(S, block_size)
    held = torch.arange(used_blocks * block_size, device=pool.device) < lengths[:, None]  # (batch, slots)
    blocks = block_tables[:, :used_blocks].long().masked_fill(~held[:, ::block_size], 0)  # (batch, used_blocks)
    x = as_numbers(pool)[blocks].transpose(1, 2).flatten(2, 3)[:, :, :S]  # (batch, kv_heads, S, head_dim)
    return x.masked_fill(~held[:, None, :S, None], 0).view(pool.dtype)


def visible_keys(lengths: Tensor, count: int, S: int, window: int | None) -> Tensor:
    """Which of a row's S keys its last ``count`` tokens see: (batch, count, S) boolean, aligned to the bottom right."""
    keys = torch.arange(S, device=lengths.device)
    places = (lengths[:, None] - count + torch.arange(count, device=lengths.device))[:, :, None]  # (batch, count, 1)
    seen = keys <= places
    return seen if window is None else seen & (keys > places - window)


def blocks_for(tokens: int, block_size: int) -> int:
    """How many blocks hold so many tokens."""
    return -(-tokens // block_size)


# --- memory --------------------------------------------------------------------------------------------------------


class OutOfBlocks(ValueError):
    """Every block is held by some sequence. Nothing was changed: free or preempt a sequence, then try again."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """What a cached block holds: these tokens, after the tokens of all blocks before it.

    Keys and values depend on everything before them, so the tokens of one block do not name its contents; the chain
    does.
    """

    parent: "Prefix | None"
    tokens: tuple[int, ...]
    key: int
    """The hash of the parent's key and these tokens. Equal keys prove nothing: hashes collide."""


def same_prefix(a: Prefix | None, b: Prefix | None) -> bool:
    """Whether two chains hold the same tokens. Most often they are one object, and the first look tells."""
    while a is not b:
        if a is None or b is None or a.tokens != b.tokens:
            return False
        a, b = a.parent, b.parent
    return True


class BlockAllocator:
    """Who holds each block of a pool, and which tokens the blocks hold that nobody holds any more.

    A block is in one of three states: held (its count of holders is above 0), cached (nobody holds it, but its
    contents are known and may be found again), or empty. A new block is taken from the empty ones, then from the cached
    ones, the least recently used first. Every operation takes constant time per block.

    Args:
        blocks: how many there are.
        block_size: tokens in a block.
        hash_of: the hash of (parent's key, tokens); Python's own if not given.
    """

    def __init__(self, blocks: int, block_size: int = BLOCK_SIZE, *, hash_of: Callable[[tuple], int] = hash):
        if blocks < 1 or block_size < 1:
            raise ValueError(f"there must be at least 1 block of at least 1 token, got {blocks} of {block_size}")
        self.blocks, self.block_size, self.hash_of = blocks, block_size, hash_of
        self.evictions = 0
        self.reset()

    def reset(self) -> None:
        """Forget everything, as if just made; tables that still hold blocks must not be used afterwards."""
        self.holders = [0] * self.blocks
        self.empty = list(range(self.blocks - 1, -1, -1))  # the last one is taken first
        self.unheld: OrderedDict[int, None] = OrderedDict()  # cached blocks that nobody holds, the oldest first
        self.prefix_of: list[Prefix | None] = [None] * self.blocks
        self.block_of: dict[int, int] = {}  # the key of a prefix -> the block that holds it

    @property
    def available(self) -> int:
        """How many blocks can be taken."""
        return len(self.empty) + len(self.unheld)

    @property
    def held(self) -> int:
        """How many blocks somebody holds."""
        return self.blocks - self.available

    def take(self, count: int = 1) -> list[int]:
        """Blocks for the caller alone to write.

        Raises:
            OutOfBlocks: fewer are available; then none is taken.
        """
        if count > self.available:
            raise OutOfBlocks(f"{count} blocks are needed, {self.available} of {self.blocks} are available")
        return [self._take_one() for _ in range(count)]

    def _take_one(self) -> int:
        if self.empty:
            block = self.empty.pop()
        else:
            block, _ = self.unheld.popitem(last=False)
            self._forget(block)
            self.evictions += 1
        self.holders[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more holder; a cached block that nobody held comes back to life.

        Raises:
            ValueError: the block is empty.
        """
        if self.holders[block] == 0:
            if block not in self.unheld:
                raise ValueError(f"block {block} is empty: there is nothing to share")
            del self.unheld[block]
        self.holders[block] += 1

    def free(self, block: int) -> None:
        """One holder fewer; a block without holders is cached if its contents are known, else empty.

        Raises:
            ValueError: nobody holds it.
        """
        if self.holders[block] == 0:
            raise ValueError(f"block {block} is freed, but nobody holds it")
        self.holders[block] -= 1
        if self.holders[block] == 0:
            if self.prefix_of[block] is None:
                self.empty.append(block)
            else:
                self.unheld[block] = None

    def make_writable(self, block: int) -> bool:
        """Whether its one holder may write into the block. If so, what was known of its contents is forgotten."""
        if self.holders[block] != 1:
            return False
        if self.prefix_of[block] is not None:
            self._forget(block)
        return True

    def _forget(self, block: int) -> None:
        del self.block_of[self.prefix_of[block].key]
        self.prefix_of[block] = None

    def publish(self, block: int, parent: Prefix | None, tokens: Sequence[int]) -> Prefix:
        """Make a full block findable by its contents.

        If another block has the same contents already, that one stays the one that is found; if another prefix has the
        same key, this block is not published.

        Args:
            block: held by the caller, all its slots written.
            parent: the prefix that ends just before this block; None for the first block.
            tokens: the block_size tokens whose keys and values it holds.

        Returns:
            The prefix that ends with this block: the parent of the next.

        Raises:
            ValueError: the block is not full, nobody holds it, or it is known to hold other tokens.
        """
        if len(tokens) != self.block_size:
            raise ValueError(f"only a full block of {self.block_size} tokens can be found again, got {len(tokens)}")
        if self.holders[block] == 0:
            raise ValueError(f"block {block} is published, but nobody holds it")
        known = self.find(parent, tokens)
        if known is not None:
            return self.prefix_of[known]
        if self.prefix_of[block] is not None:
            raise ValueError(f"block {block} holds other tokens already")
        prefix = Prefix(parent, tuple(tokens), self._key(parent, tokens))
        if prefix.key not in self.block_of:
            self.block_of[prefix.key], self.prefix_of[block] = block, prefix
        return prefix

    def find(self, parent: Prefix | None, tokens: Sequence[int]) -> int | None:
        """The block that holds these tokens after that prefix; None if there is none. A hit is proved, not believed."""
        block = self.block_of.get(self._key(parent, tokens))
        if block is None:
            return None
        prefix = self.prefix_of[block]
        return block if prefix.tokens == tuple(tokens) and same_prefix(prefix.parent, parent) else None

    def _key(self, parent: Prefix | None, tokens: Sequence[int]) -> int:
        return self.hash_of((None if parent is None else parent.key, tuple(tokens)))

    def match(self, tokens: Sequence[int]) -> list[int]:
        """The blocks that hold the longest cached beginning of a prompt. Nobody holds them by this: share each.

        At least one token is left over. Its logits are what the prompt was given for, so it must be computed, even
        where the prompt fills its last block exactly and all of it is cached.
        """
        found, parent = [], None
        for start in range(0, len(tokens) - self.block_size, self.block_size):
            block = self.find(parent, tokens[start : start + self.block_size])
            if block is None:
                break
            found.append(block)
            parent = self.prefix_of[block]
        return found


Copies = list[tuple[int, int]]
"""(from, to) pairs of blocks whose contents the pools must copy before anything is written."""


class BlockTable:
    """The blocks of one sequence, in order: block i holds its tokens i * block_size and on.

    Args:
        allocator: where blocks come from and go back to.
    """

    __slots__ = ("allocator", "blocks", "length", "prefixes")

    def __init__(self, allocator: BlockAllocator):
        self.allocator = allocator
        self.blocks: list[int] = []
        self.length = 0
        self.prefixes: list[Prefix] = []  # of the first blocks, as far as their contents are published

    @property
    def slack(self) -> int:
        """Slots that are reserved and hold no token."""
        return len(self.blocks) * self.allocator.block_size - self.length

    def blocks_wanted(self, tokens: int) -> int:
        """How many blocks :meth:`reserve` would take."""
        missing = blocks_for(self.length + tokens, self.allocator.block_size) - len(self.blocks)
        return max(missing, 0) + (tokens > 0 and self._last_is_shared())

    def _last_is_shared(self) -> bool:
        """Whether the next token falls into a block that others hold too."""
        place, offset = divmod(self.length, self.allocator.block_size)
        return offset > 0 and self.allocator.holders[self.blocks[place]] > 1

    def reserve(self, tokens: int) -> Copies:
        """Make room to write so many tokens after those held; asking twice takes nothing twice.

        A block that is shared and partly filled is not written into: the table gets a copy of its own (copy on write).

        Returns:
            The block copies to be done before the tokens are written.

        Raises:
            OutOfBlocks: there are too few; then nothing has changed.
        """
        wanted = self.blocks_wanted(tokens)
        taken = self.allocator.take(wanted) if wanted else []
        copies = []
        place, offset = divmod(self.length, self.allocator.block_size)
        if tokens > 0 and offset > 0 and not self.allocator.make_writable(self.blocks[place]):
            shared, own = self.blocks[place], taken.pop()
            self.allocator.free(shared)
            self.blocks[place] = own
            copies.append((shared, own))
        self.blocks += taken
        return copies

    def advance(self, tokens: int) -> None:
        """So many reserved tokens have been written.

        Raises:
            ValueError: more than were reserved.
        """
        if tokens > self.slack:
            raise ValueError(f"{tokens} tokens were written where {self.slack} slots were reserved")
        self.length += tokens

    def append(self, tokens: int) -> Copies:
        """:meth:`reserve`, then :meth:`advance`: for a caller who writes them in any case."""
        copies = self.reserve(tokens)
        self.length += tokens
        return copies

    def slots(self, start: int, stop: int) -> list[int]:
        """The slots of the tokens from start to stop: block * block_size + offset."""
        size = self.allocator.block_size
        return [self.blocks[i // size] * size + i % size for i in range(start, stop)]

    def fork(self) -> "BlockTable":
        """A second sequence with the same tokens, which holds the same blocks. Nothing is copied until one writes."""
        other = BlockTable(self.allocator)
        other.blocks = self.blocks[: blocks_for(self.length, self.allocator.block_size)]
        other.length, other.prefixes = self.length, list(self.prefixes)
        for block in other.blocks:
            self.allocator.share(block)
        return other

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` tokens. Blocks are freed from the end, so that a cached beginning, which
        more prompts have in common, outlives what follows it.

        Raises:
            ValueError: the sequence is shorter.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"a sequence of {self.length} tokens cannot be truncated to {length}")
        kept = blocks_for(length, self.allocator.block_size)
        for block in reversed(self.blocks[kept:]):
            self.allocator.free(block)
        del self.blocks[kept:]
        del self.prefixes[length // self.allocator.block_size :]
        self.length = length

    def free(self) -> None:
        """Give all blocks back."""
        self.truncate(0)

    def reuse(self, tokens: Sequence[int]) -> int:
        """Hold the cached blocks of a prompt's beginning; the table must be empty.

        Args:
            tokens: the whole prompt.

        Returns:
            How many of its tokens need not be computed: fewer than all, see :meth:`BlockAllocator.match`.

        Raises:
            ValueError: the table holds blocks.
        """
        if self.blocks:
            raise ValueError(f"only an empty table can reuse blocks, this one holds {self.length} tokens")
        for block in self.allocator.match(tokens):
            self.allocator.share(block)
            self.blocks.append(block)
            self.prefixes.append(self.allocator.prefix_of[block])
        self.length = len(self.blocks) * self.allocator.block_size
        return self.length

    def publish(self, tokens: Sequence[int]) -> None:
        """Let later prompts find the full blocks.

        Args:
            tokens: what the sequence holds, from its beginning; more than it holds may be given.
        """
        size = self.allocator.block_size
        for place in range(len(self.prefixes), min(self.length, len(tokens)) // size):
            parent = self.prefixes[-1] if self.prefixes else None
            part = tokens[place * size : (place + 1) * size]
            self.prefixes.append(self.allocator.publish(self.blocks[place], parent, part))


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
        if attend not in PLAIN_FORMS or mask is not None:
            return super().attend(q, k, v, attend=attend, mask=mask)
        self.cache.check(k, v)
        now = self.cache.current_pass(k.shape[2])
        self.cache.write(self.index, k.detach(), v.detach(), now)
        return self.cache.look(self.index, q, now)


class PagedKVCache(KVCache):
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
        super().__init__(shape)
        self.allocator = BlockAllocator(blocks, block_size)
        self.max_length = blocks * block_size if max_length is None else max_length
        self.step, self.is_static = step, False
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
                raise ValueError(f"the cache is full: row {row} would hold {end} of at most {self.max_length} tokens")
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

    @contextmanager
    def static_shapes(self) -> Iterator[None]:
        """Within it, a pass of one token reads lengths and tables from the device alone, as a CUDA graph needs.

        Call ``check_room`` before each pass, which takes the blocks, and ``replayed()`` after it.
        """
        was, self.is_static, self._pass = self.is_static, True, None
        try:
            yield
        finally:
            self.is_static, self._pass = was, None

    def replayed(self) -> None:
        """Count one more token per row on the host, after a pass under ``static_shapes``."""
        self.host_lengths = [n + 1 for n in self.host_lengths]
        for row in self.rows:
            row.advance(1)

    def plan(self, T: int) -> Pass:
        """Work out what the layers of a pass of T tokens share."""
        if not self.is_static:
            return super().plan(T)
        self._check_static(T)
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
        if self.is_static:
            self.lengths += T
            self._pass, self.unfinished = None, None
            return
        super().advance(T)
        for row, length in zip(self.rows, self.host_lengths, strict=True):
            row.advance(length - row.length)

    def write(self, layer: int, k: Tensor, v: Tensor, now: PagedPass) -> None:
        """Put new keys and values (batch, kv_heads, T, head_dim) into their slots."""
        k, v = (x.transpose(1, 2).flatten(0, 1) for x in (k, v))  # (batch * T, kv_heads, head_dim)
        write_cache(k, v, *self.pools[layer], now.slots, step=self.step)

    def look(self, layer: int, q: Tensor, now: PagedPass) -> Tensor:
        """Attention of q (batch, heads, T, head_dim) over the blocks; zeros for padding."""
        batch, _, T, _ = q.shape
        queries = q.transpose(1, 2).flatten(0, 1)  # (batch * T, heads, head_dim)
        real = queries if now.packed is None else queries[now.packed]
        found = paged_attention(
            real, *self.pools[layer], now.tables, now.ends, query_starts=now.starts, max_queries=T, step=self.step
        )
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
        lengths = self._checked_shorter(lengths)
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
        """Let an empty row hold the cached beginning of a prompt; returns how many tokens need not be computed."""
        if not 0 <= row < self.shape.batch or len(tokens) > self.max_length:
            room = f"{self.shape.batch} rows of at most {self.max_length} tokens"
            raise ValueError(f"the cache has {room}, got row {row} and {len(tokens)} tokens")
        reused = self.rows[row].reuse(tokens)
        lengths = list(self.host_lengths)
        lengths[row] = reused
        self._upload([row])
        self._set_lengths(lengths)
        return reused

    def publish(self, row: int, tokens: Sequence[int]) -> None:
        """Let later prompts find the full blocks of a row, which holds these tokens."""
        self.rows[row].publish(tokens)


def real_places(counts: Sequence[int], T: int) -> list[int]:
    """The places of the real tokens in a batch that is padded to T on the right and then flattened."""
    return [row * T + step for row, count in enumerate(counts) for step in range(count)]


def running_sum(counts: Sequence[int]) -> list[int]:
    """0, then the sum of the first count, of the first two, ..."""
    sums = [0]
    for count in counts:
        sums.append(sums[-1] + count)
    return sums


# --- which step ----------------------------------------------------------------------------------------------------

TOPIC = "paged_attention"
NO_TOOLS = "no C++ compiler and ninja to build it with: install g++ and `pip install ninja`"
PREFILL_STEPS = ("prefill_hopper", "prefill_tensor_core")  # the better first
STEPS = ("0", "cpu", "1", "2", "prefill", *PREFILL_STEPS)
HALVES = (torch.bfloat16, torch.float16)
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, FP8: 3}
DECODE_LADDER, PREFILL_LADDER, CPU_LADDER = ("2", "1", "0"), (*PREFILL_STEPS, "0"), ("cpu", "0")
DECODE_HEAD_DIMS, PREFILL_HEAD_DIMS, MOST_HEAD_DIM = (64, 128), (64, 128, 256), 256
TMA_ROWS, TILE_ROWS = 8, 128  # of prefill_hopper.cu: a box of TMA has so many rows at least, a tile of queries at least


@dataclass(frozen=True)
class Kind:
    """What decides which kernels can do it, apart from addresses: hashable, so that the answer is kept."""

    device: torch.device
    dtype: torch.dtype
    cache_dtype: torch.dtype
    head_dim: int
    block_size: int
    one_query: bool


def choose_step(step: str | None, q: Tensor, k_pool: Tensor, v_pool: Tensor, one_query: bool, scale: float) -> str:
    """The step asked for, if it can do this; without one, the top one that can."""
    kind = Kind(q.device, q.dtype, k_pool.dtype, q.shape[-1], k_pool.shape[2], one_query)
    tensors = (q, k_pool, v_pool)
    if step is None:
        return next(name for name in ladder(kind) if refusal_of_tensors(name, tensors, scale) is None)
    if step not in STEPS:
        raise ValueError(f"step must be one of {', '.join(STEPS)}, got {step!r}")
    for name in PREFILL_STEPS if step == "prefill" else (step,):
        reason = refusal(name, kind) or refusal_of_tensors(name, tensors, scale)
        if reason is None:
            return name
    raise ValueError(f"step {step} cannot do this: {reason}")


@cache
def ladder(kind: Kind) -> tuple[str, ...]:
    """The steps that can do it, the fastest first."""
    names = {"cpu": CPU_LADDER, "cuda": DECODE_LADDER if kind.one_query else PREFILL_LADDER}
    return tuple(name for name in names.get(kind.device.type, ("0",)) if refusal(name, kind) is None)


def refusal(step: str, kind: Kind) -> str | None:
    """Why ``step`` cannot do this, or None if it can."""
    if step == "0":
        return None
    wanted = "cpu" if step == "cpu" else "cuda"
    if kind.device.type != wanted:
        return f"it runs on {wanted}, and q is on {kind.device.type}"
    if kind.dtype not in DTYPE_CODES or kind.dtype == FP8:
        return f"kernels take float32, bfloat16 and float16, got {kind.dtype}"
    if step == "cpu":
        return None if has_cpu_twin() else NO_TOOLS
    if step in ("1", "2") and not kind.one_query:
        return "it takes one query a row: leave query_starts out, or say max_queries=1"
    if step == "1":
        return None if kind.head_dim <= MOST_HEAD_DIM else f"head_dim is at most {MOST_HEAD_DIM}, got {kind.head_dim}"
    return refusal_of_tensor_cores(step, kind)


def refusal_of_tensor_cores(step: str, kind: Kind) -> str | None:
    """Why a tensor-core step cannot do this."""
    widths = DECODE_HEAD_DIMS if step == "2" else PREFILL_HEAD_DIMS
    if kind.dtype not in HALVES:
        return f"tensor-core steps take bfloat16 and float16, got {kind.dtype}"
    if kind.head_dim not in widths:
        return f"head_dim must be one of {', '.join(map(str, widths))}, got {kind.head_dim}"
    if kind.block_size & (kind.block_size - 1):
        return f"the block size must be a power of two, got {kind.block_size}"
    capability = torch.cuda.get_device_capability(kind.device)
    if capability < (8, 0):
        return f"mma.sync with bfloat16 and cp.async need compute capability 8.0, this GPU has {capability}"
    return refusal_of_hopper(kind, capability) if step == "prefill_hopper" else None


def refusal_of_hopper(kind: Kind, capability: tuple[int, int]) -> str | None:
    """Why the prefill by TMA and wgmma cannot do this."""
    if capability != (9, 0):
        return f"wgmma is of compute capability 9.0 alone, this GPU has {capability}"
    if kind.cache_dtype != kind.dtype:
        return f"TMA copies pools as they are, so they must be of q's dtype {kind.dtype}, got {kind.cache_dtype}"
    if kind.block_size < TMA_ROWS:
        return f"TMA's swizzle works on {TMA_ROWS} rows: the block size must be that at least, got {kind.block_size}"
    return None


@cache
def has_cpu_twin() -> bool:
    """Whether the C++ twin is built, or can be."""
    return jit.can_build_cpp() or jit.is_built(TOPIC, "cpu")


def refusal_of_tensors(step: str, tensors: tuple[Tensor, Tensor, Tensor], scale: float) -> str | None:
    """Why ``step`` cannot read these very tensors."""
    if step == "0":
        return None
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "kernels have no gradients: call it under torch.no_grad()"
    pools = tensors[1:]
    if any(pool.stride(3) != 1 for pool in pools):
        return "the columns of the pools must be adjacent"
    if step in ("1", "cpu"):
        return None
    if not all(is_aligned(pool) for pool in pools):
        return "16-byte loads need pools whose addresses and strides are multiples of 16 bytes"
    if step in PREFILL_STEPS and scale <= 0:
        return f"it takes the maximum of the scores before it scales them: scale must be positive, got {scale}"
    group = tensors[0].shape[1] // pools[0].shape[1]
    if step == "prefill_hopper" and group > TILE_ROWS:
        return f"the query heads of a kv head must fit into a tile of {TILE_ROWS} rows, got {group}"
    return None


def is_aligned(x: Tensor) -> bool:
    """Whether every row of x begins at a multiple of 16 bytes."""
    step = 16 // x.element_size()
    return x.data_ptr() % 16 == 0 and all(stride % step == 0 for stride in x.stride()[:-1])


# --- the kernels ---------------------------------------------------------------------------------------------------

ARGUMENTS = struct.Struct("Pqq Pqq Pqqq Pqqq 6P 8q ff ii")
"""``paged::Arguments`` of kernels/paged_attention/arguments.h: packing it takes a microsecond, where a
ctypes structure takes ten, and decode calls are short."""

WRITE_ARGUMENTS = struct.Struct("Pqq Pqq Pqqq Pqqq 3P 7q ff iii 4x")
"""``paged::WriteArguments`` of the same file."""


@cache
def kernel(step: str, device: torch.device, name: str) -> ctypes._CFuncPtr:
    """A C function of a step's library, built at the first call."""
    function = getattr(jit.load(TOPIC, step, device=device), name)
    function.restype = ctypes.c_char_p  # null, or what went wrong
    more = {"prefill_tensor_core": 1, "prefill_hopper": 2}.get(step, 0) if name == "prefill" else 0
    function.argtypes = [ctypes.c_char_p, ctypes.c_void_p, *[ctypes.c_int32] * more]
    return function


@dataclass(frozen=True, slots=True)
class Plan:
    """A call but for its addresses, kept for the next tensors of the same layout.

    Checking shapes, choosing a step and collecting strides takes Python longer than a short decode takes a GPU.

    Attributes:
        step: "0", or the step that was chosen.
        device: where it runs.
        calls: the C functions to call, with what each takes beyond the arguments and the stream.
        layouts: the strides of each tensor in the arguments, in their order.
        numbers: the arguments after the last address.
        pairs: counters that step 2 needs, or the better prefill; 0 if neither takes part.
        copies: whether a tensor must be copied first, so that the kernels can read it.
    """

    step: str
    device: torch.device
    calls: tuple[tuple[ctypes._CFuncPtr, tuple[int, ...]], ...] = ()
    layouts: tuple[tuple[int, ...], ...] = ()
    numbers: tuple[float, ...] = ()
    pairs: int = 0
    copies: bool = False


MOST_PLANS = 4096
_plans: dict[tuple, Plan] = {}


def layout_of(x: Tensor | None) -> tuple | None:
    """All that a plan depends on, apart from the address."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.device)


def keep_plan(key: tuple, plan: Plan) -> Plan:
    """Keep a plan; many different layouts come from prompts of many lengths, so old ones are dropped."""
    if len(_plans) >= MOST_PLANS:
        _plans.clear()
    _plans[key] = plan
    return plan


def forget_plans() -> None:
    """Choose again at the next call: for who has changed the kernels."""
    _plans.clear()


def launch(plan: Plan, arguments: bytes) -> None:
    """Call a plan's C functions: on a GPU with the tensors' device current, on that device's current stream."""
    if plan.device.type == "cuda" and torch.cuda.current_device() != plan.device.index:
        with torch.cuda.device(plan.device):
            return launch(plan, arguments)
    stream = stream_of(plan.device) if plan.device.type == "cuda" else None
    for function, more in plan.calls:
        if error := function(arguments, stream, *more):
            raise RuntimeError(f"paged attention, step {plan.step}: {error.decode()}")
    return None


def stream_of(device: torch.device) -> int:
    """The handle of the device's current stream, by the short way that compiled code takes."""
    return torch._C._cuda_getCurrentRawStream(device.index)


CAPTURE = -1
_scratch: dict[tuple[int, int], tuple[int, int, int]] = {}
_scratch_tensors: list[Tensor] = []


def scratch_of(device: torch.device, pairs: int) -> tuple[int, int]:
    """Where step 2 leaves partial results and counts arrivals: one place for each stream, kept from call to call.

    All CUDA graphs of a device share one place, which the calls before their capture have made: they must not run at
    the same time. A graph holds its addresses, so what was outgrown is never given back.

    Args:
        device: a GPU.
        pairs: rows times heads at least; each counts its arrivals.

    Returns:
        the addresses of the partial results and of the counts, which are zeros between calls.

    Raises:
        RuntimeError: a graph is being captured, and no call came before.
    """
    stream = CAPTURE if torch.cuda.is_current_stream_capturing() else stream_of(device)
    found = _scratch.get((device.index, stream))
    if found is None or found[2] < pairs:
        if stream == CAPTURE:
            raise RuntimeError("call paged attention once before capturing it in a CUDA graph: its scratch must exist")
        for owner in (CAPTURE, stream):
            found = _scratch[device.index, owner] = make_scratch(device, max(pairs, 2**16))
        torch.cuda.current_stream(device).synchronize()  # the counts are zeros for every stream
    return found[:2]


def make_scratch(device: torch.device, pairs: int) -> tuple[int, int, int]:
    """The addresses of partial results and counts, and for how many pairs they suffice."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    partial = torch.empty(processors * MOST_PARTIAL, dtype=torch.float32, device=device)
    arrivals = torch.zeros(pairs, dtype=torch.int32, device=device)
    _scratch_tensors.extend((partial, arrivals))
    return partial.data_ptr(), arrivals.data_ptr(), pairs


MOST_PARTIAL = 2 * 2 * 16 * (128 + 2)
"""Floats of partial results a multiprocessor: two blocks (three at head_dim 64 take less), two results of 16 heads."""


# --- attention -----------------------------------------------------------------------------------------------------


def run_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    query_starts: Tensor | None,
    max_queries: int | None,
    scale: float,
    window: int | None,
    k_scale: float,
    v_scale: float,
    step: str | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Choose a step and run it; lse is None where it was not asked for and costs something."""
    tensors = (q, k_pool, v_pool, block_tables, lengths, query_starts)
    options = (max_queries, scale, window, k_scale, v_scale, step)
    addresses = (q.data_ptr(), k_pool.data_ptr(), v_pool.data_ptr())
    unaligned = (addresses[0] | addresses[1] | addresses[2]) & 15
    with_grad = torch.is_grad_enabled() and (q.requires_grad or k_pool.requires_grad or v_pool.requires_grad)
    key = (*map(layout_of, tensors), options, unaligned, with_grad)
    plan = _plans.get(key) or keep_plan(key, plan_attention(tensors, *options))
    if plan.step == "0":
        return attend_in_pytorch(*tensors, scale, window, k_scale, v_scale)
    if plan.copies:
        return run_attention(*map(readable, tensors), *options, with_lse)
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:2], dtype=torch.float32) if with_lse else None
    if q.numel() == 0:
        return out, lse
    q_strides, out_strides, k_strides, v_strides = plan.layouts
    arguments = ARGUMENTS.pack(
        addresses[0],
        *q_strides,
        out.data_ptr(),
        *out_strides,
        addresses[1],
        *k_strides,
        addresses[2],
        *v_strides,
        block_tables.data_ptr(),
        lengths.data_ptr(),
        0 if query_starts is None else query_starts.data_ptr(),
        0 if lse is None else lse.data_ptr(),
        *(scratch_of(plan.device, plan.pairs) if plan.pairs else (0, 0)),
        *plan.numbers,
    )
    launch(plan, arguments)
    return out, lse


def plan_attention(
    tensors: tuple[Tensor | None, ...],
    max_queries: int | None,
    scale: float,
    window: int | None,
    k_scale: float,
    v_scale: float,
    step: str | None,
) -> Plan:
    """Check the tensors (as :func:`paged_attention` takes them), and choose the step for their layout."""
    q, k_pool, v_pool, block_tables, lengths, query_starts = tensors
    check_paged(*tensors, window)
    one_query = query_starts is None or max_queries == 1
    chosen = choose_step(step, q, k_pool, v_pool, one_query, scale)
    if chosen == "0":
        return Plan(chosen, q.device)
    if any(x is not readable(x) for x in tensors):
        return Plan(chosen, q.device, copies=True)
    tokens, heads, d = q.shape
    numbers = (
        block_tables.stride(0),
        lengths.shape[0],
        tokens,
        heads,
        k_pool.shape[1],
        d,
        k_pool.shape[2],
        window or 0,
        scale * k_scale,
        v_scale,
        DTYPE_CODES[q.dtype],
        DTYPE_CODES[k_pool.dtype],
    )
    layouts = (q.stride()[:2], (heads * d, d), k_pool.stride()[:3], v_pool.stride()[:3])
    uses_step_2 = chosen == "2" or (chosen in PREFILL_STEPS and d in DECODE_HEAD_DIMS)
    pairs = max(2, lengths.shape[0] * heads) if uses_step_2 or chosen == "prefill_hopper" else 0
    return Plan(chosen, q.device, calls_of(chosen, k_pool, uses_step_2), layouts, numbers, pairs)


def calls_of(step: str, k_pool: Tensor, uses_step_2: bool) -> tuple:
    """The C functions of a step; prefill leaves rows with one query to step 2, where that can take them."""
    device = k_pool.device
    if step == "cpu":
        return ((kernel("cpu", device, "attend"), ()),)
    if step not in PREFILL_STEPS:
        return ((kernel(step, device, "decode"), ()),)
    least, blocks = 2 if uses_step_2 else 1, k_pool.shape[0]
    prefill = (kernel(step, device, "prefill"), (least, blocks) if step == "prefill_hopper" else (least,))
    return (prefill, (kernel("2", device, "decode"), ())) if uses_step_2 else (prefill,)


def readable(x: Tensor | None) -> Tensor | None:
    """``x`` itself where a kernel can read it, else a copy; the pools are refused earlier, for they are too large."""
    if x is None or x.dim() == 4:
        return x
    if not x.is_floating_point():
        return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    return x if x.stride(-1) == 1 and (x.device.type == "cpu" or is_aligned(x)) else x.clone().contiguous()


# --- writing -------------------------------------------------------------------------------------------------------


def run_write(
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slots: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    layout: str,
    k_scale: float,
    v_scale: float,
    step: str | None,
) -> None:
    """Choose a step of :func:`write_cache` and run it: a GPU has one kernel, a CPU its twin."""
    tensors = (k, v, k_pool, v_pool, slots, cos, sin)
    options = (layout, k_scale, v_scale, step)
    with_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    key = (*map(layout_of, tensors), options, with_grad)
    plan = _plans.get(key) or keep_plan(key, plan_write(tensors, *options))
    if plan.device.type == "cpu":
        check_slots(slots, k_pool)
    if plan.step == "0":
        write_in_pytorch(*tensors, layout, k_scale, v_scale)
    elif plan.copies:
        run_write(*(x if x is None or x.dim() == 4 else x.contiguous() for x in tensors), *options)
    elif k.numel():
        k_strides, v_strides, k_pool_strides, v_pool_strides = plan.layouts
        arguments = WRITE_ARGUMENTS.pack(
            k.data_ptr(),
            *k_strides,
            v.data_ptr(),
            *v_strides,
            k_pool.data_ptr(),
            *k_pool_strides,
            v_pool.data_ptr(),
            *v_pool_strides,
            slots.data_ptr(),
            0 if cos is None else cos.data_ptr(),
            0 if sin is None else sin.data_ptr(),
            *plan.numbers,
        )
        launch(plan, arguments)


def plan_write(
    tensors: tuple[Tensor | None, ...], layout: str, k_scale: float, v_scale: float, step: str | None
) -> Plan:
    """Check the tensors (as :func:`write_cache` takes them), and choose who writes them."""
    k, v, k_pool, v_pool, _, cos, sin = tensors
    check_write(*tensors)
    if step is not None and step not in STEPS:
        raise ValueError(f"step must be one of {', '.join(STEPS)}, got {step!r}")
    reason = refusal_of_write(step, k, v, k_pool, v_pool)
    if reason and step is not None and step != "0":
        raise ValueError(f"step {step} cannot do this: {reason}")
    if reason or step == "0":
        return Plan("0", k.device)
    if any(x is not None and x.stride(-1) != 1 and x.shape[-1] > 1 for x in tensors):
        return Plan("write_cache", k.device, copies=True)
    numbers = (
        0 if cos is None else cos.stride(0),
        0 if sin is None else sin.stride(0),
        *k.shape,
        k_pool.shape[2],
        0 if cos is None else 2 * cos.shape[1],
        k_scale,
        v_scale,
        layout == "interleaved",
        DTYPE_CODES[k.dtype],
        DTYPE_CODES[k_pool.dtype],
    )
    layouts = (k.stride()[:2], v.stride()[:2], k_pool.stride()[:3], v_pool.stride()[:3])
    step = "cpu" if k.device.type == "cpu" else "write_cache"
    return Plan(step, k.device, ((kernel(step, k.device, "write_cache"), ()),), layouts, numbers)


def refusal_of_write(step: str | None, k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor) -> str | None:
    """Why no kernel can write this, or None if one can."""
    if k.device.type not in ("cpu", "cuda"):
        return f"kernels run on cpu and cuda, and k is on {k.device.type}"
    if step is not None and (step == "cpu") != (k.device.type == "cpu"):
        return f"k is on {k.device.type}"
    if k.dtype not in DTYPE_CODES or k.dtype == FP8 or v.dtype != k.dtype:
        return f"kernels take k and v in float32, bfloat16 or float16, got {k.dtype} and {v.dtype}"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (k, v, k_pool, v_pool)):
        return "kernels have no gradients: call it under torch.no_grad()"
    if k_pool.stride(3) != 1 or v_pool.stride(3) != 1:
        return "the columns of the pools must be adjacent"
    return NO_TOOLS if k.device.type == "cpu" and not has_cpu_twin() else None


# --- the operators -------------------------------------------------------------------------------------------------


@torch.library.custom_op("tformer_lab::paged_attention", mutates_args=())
def paged_attention_op(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    query_starts: Tensor | None,
    max_queries: int | None,
    scale: float,
    window: int | None,
    k_scale: float,
    v_scale: float,
    step: str | None,
) -> tuple[Tensor, Tensor]:
    """What torch.compile sees of :func:`paged_attention`."""
    rows = (block_tables, lengths, query_starts, max_queries)
    return run_attention(q, k_pool, v_pool, *rows, scale, window, k_scale, v_scale, step, True)


@paged_attention_op.register_fake
def paged_attention_fake(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """The shapes and dtypes of what the operator returns."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=wide)


@torch.library.custom_op("tformer_lab::write_cache", mutates_args=("k_pool", "v_pool"))
def write_cache_op(
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slots: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    layout: str,
    k_scale: float,
    v_scale: float,
    step: str | None,
) -> None:
    """What torch.compile sees of :func:`write_cache`."""
    run_write(k, v, k_pool, v_pool, slots, cos, sin, layout, k_scale, v_scale, step)


@write_cache_op.register_fake
def write_cache_fake(*_: object) -> None:
    """It returns nothing."""


def is_traced(x: Tensor) -> bool:
    """Whether a compiler looks on, who must see one operator; else calling the kernel directly saves 15 us."""
    return torch.compiler.is_compiling() or type(x) is not Tensor
