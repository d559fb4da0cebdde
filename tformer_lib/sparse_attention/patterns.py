"""Patterns: which pairs of positions may meet, and the plan that turns a pattern into lists of live blocks."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 64  # queries and keys per block: large enough for matmuls, small enough to follow a window of a few hundred
SLICE = 2**21  # scores held at once in the forward pass: 8 MiB in float32, near the size of a last-level cache
Span = tuple[Tensor, Tensor]  # the first and the last position of each block, inclusive


_handles = count()
_patterns: WeakValueDictionary[int, "Pattern"] = WeakValueDictionary()
_recent: deque["Pattern"] = deque(maxlen=1024)  # what a forward pass used, kept until its gradients have been computed


# Patterns.


class Pattern:
    """Which queries may look at which keys. Subclasses give ``allows`` and ``may_touch``.

    ``handle`` is the number by which an operator, which takes no Python objects, finds the pattern.
    """

    def __new__(cls, *_: object, **__: object) -> "Pattern":
        pattern = super().__new__(cls)
        object.__setattr__(pattern, "handle", next(_handles))  # a frozen dataclass may be given it no other way
        _patterns[pattern.handle] = pattern
        return pattern

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "handle"}  # a copy has its own

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        """True where a query at position q may look at a key at position k.

        Args:
            q, k: integers of equal dimensions that broadcast with each other; q may be negative (before every key).

        Returns:
            boolean of their broadcast shape, with one dimension (batch) in front where the pattern has one.
        """
        raise NotImplementedError

    def may_touch(self, q: Span, k: Span) -> Tensor:
        """True where a rectangle of pairs may hold an allowed one; False is a promise that it holds none.

        Args:
            q: first and last query position of each block, (query_blocks, 1) each.
            k: first and last key position of each block, (1, key_blocks) each.
        """
        raise NotImplementedError

    def __or__(self, other: "Pattern") -> "Pattern":
        return Either(self, other)

    def __and__(self, other: "Pattern") -> "Pattern":
        return Both(self, other)

    def mask(self, T: int, S: int | None = None, *, device: torch.device | str | None = None) -> Tensor:
        """The boolean mask (T, S), or (batch, 1, T, S) where documents differ between rows of the batch."""
        S = T if S is None else S
        q, k = torch.arange(S - T, S, device=device)[:, None], torch.arange(S, device=device)[None, :]
        allowed = self.allows(q, k)
        return allowed.unsqueeze(1) if allowed.dim() == 3 else allowed.expand(T, S)

    def layout(self, T: int, S: int | None = None, block: int = BLOCK) -> Tensor:
        """Which blocks hold an allowed pair: (query_blocks, key_blocks) boolean, exact, at the cost of a plan."""
        S = T if S is None else S
        live = torch.zeros(blocks_in(T, block), blocks_in(S, block), dtype=torch.bool)
        for bucket in plan(self, T, S, block):
            live[bucket.rows[:, None].expand_as(bucket.blocks)[bucket.live], bucket.blocks[bucket.live]] = True
        return live


def pattern_of(handle: int) -> Pattern:
    """The pattern with this handle, which lives while somebody holds it, and through the next thousand calls.

    Raises:
        ValueError: there is none.
    """
    pattern = _patterns.get(handle)
    if pattern is None:
        raise ValueError(f"no pattern has the handle {handle}: it must live until the gradients have been computed")
    _recent.append(pattern)
    return pattern


@dataclass(frozen=True)
class Either(Pattern):
    """Pairs that one pattern or the other allows."""

    left: Pattern
    right: Pattern

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        return self.left.allows(q, k) | self.right.allows(q, k)

    def may_touch(self, q: Span, k: Span) -> Tensor:
        return self.left.may_touch(q, k) | self.right.may_touch(q, k)


@dataclass(frozen=True)
class Both(Pattern):
    """Pairs that both patterns allow."""

    left: Pattern
    right: Pattern

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        return self.left.allows(q, k) & self.right.allows(q, k)

    def may_touch(self, q: Span, k: Span) -> Tensor:
        return self.left.may_touch(q, k) & self.right.may_touch(q, k)


@dataclass(frozen=True)
class Band(Pattern):
    """Keys from ``before`` positions back to ``after`` positions ahead of the query, every ``step``-th counted from it.

    None for ``before`` or ``after`` is no limit.
    """

    before: int | None
    after: int | None
    step: int = 1

    def __post_init__(self):
        for name, reach in (("before", self.before), ("after", self.after)):
            if reach is not None and reach < 0:
                raise ValueError(f"{name} must be at least 0 or None, got {reach}")
        if self.step < 1:
            raise ValueError(f"step must be at least 1, got {self.step}")

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        distance = q - k
        allowed = distance % self.step == 0 if self.step > 1 else torch.ones_like(distance, dtype=torch.bool)
        if self.before is not None:
            allowed &= distance <= self.before
        if self.after is not None:
            allowed &= distance >= -self.after
        return allowed

    def may_touch(self, q: Span, k: Span) -> Tensor:
        nearest, farthest = q[0] - k[1], q[1] - k[0]  # the smallest and the largest distance in the rectangle
        if self.after is not None:
            nearest = nearest.clamp(min=-self.after)
        if self.before is not None:
            farthest = farthest.clamp(max=self.before)
        return farthest - farthest % self.step >= nearest  # the largest multiple of step is still in the interval


@dataclass(frozen=True)
class Segments(Pattern):
    """Queries and keys in the same segment of ``size`` consecutive positions."""

    size: int

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        return q // self.size == k // self.size

    def may_touch(self, q: Span, k: Span) -> Tensor:
        return (q[0] // self.size <= k[1] // self.size) & (k[0] // self.size <= q[1] // self.size)


@dataclass(frozen=True)
class Summaries(Pattern):
    """Every query sees the last ``width`` keys of each segment of ``size`` positions."""

    size: int
    width: int

    def __post_init__(self):
        if not 1 <= self.width <= self.size:
            raise ValueError(f"width must lie in 1 .. size = {self.size}, got {self.width}")

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        return (k % self.size >= self.size - self.width) & (q == q)

    def may_touch(self, q: Span, k: Span) -> Tensor:
        within = k[1] % self.size
        last = torch.where(within >= self.size - self.width, k[1], k[1] - within - 1)  # the last summary at or before
        return (last >= k[0]) & (q[0] == q[0])


@dataclass(frozen=True)
class GlobalTokens(Pattern):
    """Tokens at ``positions`` see everyone and are seen by everyone."""

    positions: tuple[int, ...]

    def __post_init__(self):
        if not self.positions or min(self.positions) < 0:
            raise ValueError(f"positions must be one or more numbers of at least 0, got {self.positions}")

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        positions = torch.tensor(self.positions, device=q.device)
        return torch.isin(q, positions) | torch.isin(k, positions)

    def may_touch(self, q: Span, k: Span) -> Tensor:
        positions = torch.tensor(self.positions, device=q[0].device)
        hits = [((first[..., None] <= positions) & (positions <= last[..., None])).any(-1) for first, last in (q, k)]
        return hits[0] | hits[1]


class BlockPattern(Pattern):
    """An explicit table of blocks: query block i sees all of key block j where ``table[i, j]``.

    Args:
        block: positions per block of the table (which need not be the block that ``attend`` computes with).
        table: (blocks, blocks) boolean; it covers positions 0 .. blocks · block - 1.
    """

    def __init__(self, block: int, table: Tensor):
        if table.dim() != 2 or table.shape[0] != table.shape[1] or table.dtype != torch.bool:
            raise ValueError(f"table must be (blocks, blocks) boolean, got {tuple(table.shape)} of {table.dtype}")
        if block < 1:
            raise ValueError(f"block must be at least 1, got {block}")
        self.block, self.table = block, table.clone()

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        self.check_covers(k)
        rows, columns = q.clamp(min=0) // self.block, k // self.block
        return self.table.to(q.device)[rows, columns] & (q >= 0)

    def may_touch(self, q: Span, k: Span) -> Tensor:
        self.check_covers(k[1])
        counts = F.pad(
            self.table.to(q[0].device).long().cumsum(0).cumsum(1), (1, 0, 1, 0)
        )  # ones above and to the left
        top, bottom = (x.clamp(min=0) // self.block + i for i, x in enumerate(q))
        left, right = (x // self.block + i for i, x in enumerate(k))
        return counts[bottom, right] - counts[top, right] - counts[bottom, left] + counts[top, left] > 0

    def check_covers(self, k: Tensor) -> None:
        """Refuse keys beyond the table."""
        covered = self.table.shape[0] * self.block
        if k.numel() and int(k.max()) >= covered:
            raise ValueError(f"this table covers {covered} positions, got a key at position {int(k.max())}")


class Documents(Pattern):
    """Queries and keys of the same document, for documents packed into one row.

    Args:
        ids: (S,) or (batch, S) integers, the document of each position.
    """

    def __init__(self, ids: Tensor):
        if ids.dim() not in (1, 2) or ids.is_floating_point():
            raise ValueError(f"ids must be (S,) or (batch, S) integers, got {tuple(ids.shape)} of {ids.dtype}")
        self.ids = ids.clone()

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        self.check_covers(k)
        ids = self.ids.to(q.device)
        return (ids[..., q.clamp(min=0)] == ids[..., k]) & (q >= 0)

    def may_touch(self, q: Span, k: Span) -> Tensor:
        self.check_covers(k[1])
        q_low, q_high = self.ranges(q[0][:, 0], q[1][:, 0])  # (..., query_blocks)
        k_low, k_high = self.ranges(k[0][0], k[1][0])  # (..., key_blocks)
        meet = (q_low[..., :, None] <= k_high[..., None, :]) & (k_low[..., None, :] <= q_high[..., :, None])
        return meet.flatten(0, -3).any(0) if meet.dim() == 3 else meet

    def ranges(self, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and the largest document between each first and last position."""
        if not len(first):
            return (self.ids[..., :0].to(first.device),) * 2
        spans = [self.ids[..., a : b + 1] for a, b in zip(first.clamp(min=0), last.clamp(min=0), strict=True)]
        return tuple(
            torch.stack([pick(s, -1) for s in spans], -1).to(first.device) for pick in (torch.amin, torch.amax)
        )

    def check_covers(self, k: Tensor) -> None:
        """Refuse keys beyond the documents."""
        if k.numel() and int(k.max()) >= self.ids.shape[-1]:
            raise ValueError(f"documents cover {self.ids.shape[-1]} positions, got a key at position {int(k.max())}")


# The patterns that have names.


def everything() -> Pattern:
    """Every query sees every key."""
    return Band(None, None)


def causal() -> Pattern:
    """Every query sees itself and what came before."""
    return Band(None, 0)


def sliding_window(window: int) -> Pattern:
    """Causal: every query sees itself and the ``window - 1`` keys before it (as in ``masks.sliding_window``)."""
    return dilated(window, 1)


def dilated(window: int, dilation: int) -> Pattern:
    """Causal: ``window`` keys, ``dilation`` positions apart, the query's own among them."""
    if window < 1:
        raise ValueError(f"window must be at least 1 (the query itself), got {window}")
    return Band((window - 1) * dilation, 0, dilation)


def global_tokens(positions: Iterable[int]) -> Pattern:
    """Tokens that see everyone and are seen by everyone; with ``& causal()``, that are seen by all who come later."""
    return GlobalTokens(tuple(positions))


def strided(stride: int) -> Pattern:
    """Sparse Transformer, strided: the last ``stride`` positions, and every stride-th (Child et al., section 4.3)."""
    return sliding_window(stride) | Band(None, 0, stride)


def fixed(stride: int, width: int = 1) -> Pattern:
    """Sparse Transformer, fixed: the query's own segment, and the last ``width`` of every segment, all causal."""
    return (Segments(stride) | Summaries(stride, width)) & causal()


def documents(ids: Tensor) -> Pattern:
    """Packed documents: (S,) or (batch, S) integers. It hides no future: combine it with ``causal()``."""
    return Documents(ids)


def longformer(window: int, positions: Iterable[int] = ()) -> Pattern:
    """Longformer: ``window / 2`` keys on either side, and global tokens (Beltagy et al. 2020, figure 2d)."""
    local = Band(window // 2, window // 2)
    positions = tuple(positions)
    return local | GlobalTokens(positions) if positions else local


def big_bird(length: int, *, block: int = BLOCK, random_blocks: int = 3, seed: int = 0) -> Pattern:
    """BigBird over blocks: neighbours on either side, the first and last block global, random blocks for every row.

    Args:
        length: positions, a multiple of block.
        block: positions per block.
        random_blocks: blocks drawn for each row among those it does not see yet (fewer where fewer are left).
        seed: the draw is a function of it and of the shape alone.

    Raises:
        ValueError: if block does not divide length, or a number is too small.
    """
    if block < 1 or random_blocks < 0:
        raise ValueError(f"block must be at least 1 and random_blocks at least 0, got {block} and {random_blocks}")
    if length < 1 or length % block:
        raise ValueError(f"length must be a positive multiple of block = {block}, got {length}")
    n = length // block
    index = torch.arange(n)
    table = (index[:, None] - index).abs() <= 1  # (n, n)
    table[[0, -1]] = table[:, [0, -1]] = True
    return BlockPattern(block, table | draw_blocks(~table, random_blocks, seed))


def draw_blocks(free: Tensor, count: int, seed: int) -> Tensor:
    """Choose up to ``count`` of the free blocks in each row, uniformly: (n, n) boolean -> (n, n) boolean."""
    draw = torch.rand(free.shape, generator=torch.Generator().manual_seed(seed)).masked_fill(~free, -1.0)
    chosen = torch.zeros_like(free)
    best = draw.topk(min(count, free.shape[1]), dim=1).indices
    return chosen.scatter(1, best, True) & free


def receptive_field(mask: Tensor, layers: int) -> Tensor:
    """Which inputs can have reached a position after some layers: a step along the mask for each layer.

    Args:
        mask: (T, T) boolean. A residual connection keeps each position's own input too.
        layers: number of layers.

    Returns:
        (T, T) boolean, True where output t can depend on input s.
    """
    step = (mask | torch.eye(mask.shape[0], dtype=torch.bool, device=mask.device)).float()
    reach = torch.eye(mask.shape[0], device=mask.device)
    for _ in range(layers):
        reach = (reach @ step > 0).float()
    return reach > 0


# The plan: a pattern, turned into lists of blocks.


@dataclass(frozen=True)
class Bucket:
    """Query blocks that see about equally many key blocks, so that they can be computed as one batch.

    Attributes:
        rows: (R,) indices of query blocks.
        blocks: (R, m) indices of the key blocks that each of them sees, padded with block 0.
        live: (R, m) boolean, False where padded.
        allowed: (1 or batch, 1, R, 1, block, m · block) boolean, the pattern inside those blocks.
        hidden: the same without the rows that allow nothing: what to set to -inf before a softmax.
        blind: (1 or batch, 1, R, 1, block, 1) boolean, those rows.
    """

    rows: Tensor
    blocks: Tensor
    live: Tensor
    allowed: Tensor
    hidden: Tensor
    blind: Tensor

    def slices(self, cells_per_row: int) -> Iterator["Bucket"]:
        """Cut the bucket so that a piece holds about SLICE scores, if each row of blocks holds ``cells_per_row``."""
        step = max(1, SLICE // max(1, cells_per_row))
        for start in range(0, self.rows.shape[0], step):
            now = slice(start, start + step)
            masks = (x[:, :, now] for x in (self.allowed, self.hidden, self.blind))
            yield Bucket(self.rows[now], self.blocks[now], self.live[now], *masks)


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # a plan that is first made in inference must serve training later
def plan(pattern: Pattern, T: int, S: int, block: int, device: torch.device | str = "cpu") -> tuple[Bucket, ...]:
    """The live blocks of a pattern in buckets of query blocks. Kept for the next call: two bytes for each live pair."""
    if not isinstance(pattern, Pattern):
        raise ValueError(f"pattern must be a Pattern such as sliding_window(512), got {type(pattern).__name__}")
    if T == 0 or S == 0:
        return ()
    pairs = candidate_blocks(pattern, T, S, block, device)
    tiles = pattern_tiles(pattern, T, S, block, pairs)  # (..., pairs, block, block)
    live = tiles.any(-1).any(-1)  # (..., pairs)
    live = live.flatten(0, -2).any(0) if live.dim() > 1 else live
    pairs, tiles = pairs[live], tiles[..., live, :, :]
    counts = pairs[:, 0].bincount(minlength=blocks_in(T, block))  # live key blocks of each query block
    most = blocks_in(S, block)
    sizes = torch.tensor([min(bucket_size(n), most) for n in counts.tolist()], device=counts.device)
    return tuple(
        make_bucket(m, (sizes == m).nonzero()[:, 0], counts, pairs, tiles) for m in sizes.unique().tolist() if m
    )


def candidate_blocks(pattern: Pattern, T: int, S: int, block: int, device: torch.device | str) -> Tensor:
    """Pairs (query block, key block) that may be live, (pairs, 2), ordered by query block."""
    q_first, q_last = spans(T, block, S - T, device)
    k_first, k_last = spans(S, block, 0, device)
    touched = pattern.may_touch((q_first[:, None], q_last[:, None]), (k_first[None, :], k_last[None, :]))
    return touched.expand(len(q_first), len(k_first)).nonzero()


def spans(length: int, block: int, start: int, device: torch.device | str) -> Span:
    """First and last position of each block of ``length`` positions that begin at ``start``: (blocks,) each."""
    first = torch.arange(0, length, block, device=device)
    return first + start, (first + block - 1).clamp(max=length - 1) + start


def pattern_tiles(pattern: Pattern, T: int, S: int, block: int, pairs: Tensor) -> Tensor:
    """The mask inside each pair of blocks: (pairs, block, block) boolean, or (batch, pairs, block, block)."""
    within = torch.arange(block, device=pairs.device, dtype=torch.int32)
    pieces = []
    for some in pairs.int().split(max(1, SLICE // block**2)):
        q, k = (some[:, i, None] * block + within for i in (0, 1))  # indices (pairs, block)
        allowed = pattern.allows((q.clamp(max=T - 1) + S - T).unsqueeze(2), k.clamp(max=S - 1).unsqueeze(1))
        pieces.append(allowed & (q < T).unsqueeze(2) & (k < S).unsqueeze(1))
    return torch.cat(pieces, dim=-3) if pieces else torch.zeros(0, block, block, dtype=torch.bool, device=pairs.device)


def bucket_size(count: int) -> int:
    """Round a number of live blocks up to three significant bits: few buckets, at most a quarter of padding."""
    step = 1 << max(0, count.bit_length() - 3)
    return -(-count // step) * step


def make_bucket(size: int, rows: Tensor, counts: Tensor, pairs: Tensor, tiles: Tensor) -> Bucket:
    """The bucket of query blocks ``rows`` (R,), each padded to ``size`` key blocks."""
    slot = torch.arange(size, device=rows.device)
    first = (counts.cumsum(0) - counts)[rows]  # (R,), where each row's pairs begin
    live = slot < counts[rows, None]  # (R, size)
    index = torch.where(live, first[:, None] + slot, 0)
    allowed = tiles[..., index, :, :] & live[:, :, None, None]  # (..., R, size, block, block)
    allowed = allowed.transpose(-3, -2).flatten(-2)  # (..., R, block, size · block)
    allowed = (allowed if allowed.dim() == 4 else allowed.unsqueeze(0)).unsqueeze(2).unsqueeze(1)
    return Bucket(rows, torch.where(live, pairs[index, 1], 0), live, allowed, *hide(allowed))


def hide(allowed: Tensor) -> tuple[Tensor, Tensor]:
    """What to set to -inf before a softmax, and which rows to set to zero after it: (..., T, S), (..., T, 1) boolean.

    A row that allows nothing is hidden nothing, so that its softmax is finite and its gradients are too.
    """
    blind = ~allowed.any(-1, keepdim=True)
    return ~(allowed | blind), blind


def blocks_in(length: int, block: int) -> int:
    """Number of blocks that cover a length."""
    return -(-length // block)
