"""Lists of blocks as the kernels read them: which blocks of 64 columns each tile of 128 rows sees, and the bits inside.

Forward, rows are queries and columns keys; for the gradients of keys and values, rows are keys and columns queries. For
the gradients of blocks that were chosen a tile is one block of 64 keys.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tformer_lib.sparse_attention.patterns import SLICE, Pattern, blocks_in, spans

TILE = 128  # rows that share a list: kernels/sparse_attention/arguments.h
BLOCK = 64  # columns of one entry
NONE = -1


@dataclass(frozen=True, eq=False)
class Lists:
    """The entries of every tile of rows.

    Attributes:
        counts: (1 or batch, 1 or heads, tiles) int32, entries of each list.
        blocks: (1 or batch, 1 or heads, tiles, most) int32, the entries' blocks of columns; -1 is no block.
        masks: of blocks' shape, the row of ``words`` with an entry's mask, -1 where all of it is seen; None: no masks.
        words: (masks, rows) int64, whose bit c says whether a row and column c of the entry's block meet; or None.
        order: (tiles) int32, the tiles, longest lists first; or None, in order.
        first_for_all: how many tiles of ``order`` are so long that those of every head come before any of the others.
        rows: how many rows a tile has, 128 or 64.
    """

    counts: Tensor
    blocks: Tensor
    masks: Tensor | None = None
    words: Tensor | None = None
    order: Tensor | None = None
    first_for_all: int = 0
    rows: int = TILE

    @property
    def live(self) -> int:
        """Entries in all, of one row of the batch and head or of as many as there are lists for."""
        return int(self.counts.sum())


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # lists that are first made in inference must serve training later
def pattern_lists(
    pattern: Pattern, T: int, S: int, device: torch.device | str = "cpu", transposed: bool = False
) -> Lists:
    """The lists of a pattern, kept for the next call: 4 bytes for a whole block, 1 KB for a partial one.

    Args:
        transposed: rows are keys, for the gradients of k and v.
    """
    rows, columns = (S, T) if transposed else (T, S)
    tiles, blocks = blocks_in(rows, TILE), blocks_in(columns, BLOCK)
    row_start, column_start = (0, S - T) if transposed else (S - T, 0)  # positions count from the first key
    row_spans, column_spans = spans(rows, TILE, row_start, device), spans(columns, BLOCK, column_start, device)
    if transposed:
        touched = pattern.may_touch(tuple(x[:, None] for x in column_spans), tuple(x[None] for x in row_spans)).mT
    else:
        touched = pattern.may_touch(tuple(x[:, None] for x in row_spans), tuple(x[None] for x in column_spans))
    pairs = touched.expand(tiles, blocks).nonzero()  # (pairs, 2), ordered by tile
    kinds, words = [], []
    for some in pairs.split(max(1, SLICE // (TILE * BLOCK))):
        kind, partial = classify(pattern, T, S, some, transposed)
        kinds.append(kind)
        words.append(partial)
    if not kinds:
        kinds.append(torch.zeros(1, 0, dtype=torch.int8, device=device))
        words.append([torch.zeros(0, TILE, dtype=torch.int64, device=device)])
    kind = torch.cat(kinds, dim=-1)  # (1 or batch, pairs)
    words = torch.cat([torch.cat([partial[b] for partial in words]) for b in range(kind.shape[0])])
    return gather_lists(kind, words, pairs, tiles)


def classify(pattern: Pattern, T: int, S: int, pairs: Tensor, transposed: bool) -> tuple[Tensor, list[Tensor]]:
    """What some pairs of a tile and a block hold.

    Returns:
        (1 or batch, pairs) int8: 0 nothing, 1 some, 2 all; and for each row of the batch the words of those with some.
    """
    row = pairs[:, 0, None] * TILE + torch.arange(TILE, device=pairs.device)
    column = pairs[:, 1, None] * BLOCK + torch.arange(BLOCK, device=pairs.device)
    row, column = row[:, :, None], column[:, None, :]  # (pairs, TILE, 1), (pairs, 1, BLOCK)
    q, k = (column, row) if transposed else (row, column)
    inside = (q < T) & (k < S)
    allowed = pattern.allows(q.clamp(max=T - 1) + S - T, k.clamp(max=S - 1)) & inside
    allowed = allowed if allowed.dim() == 4 else allowed[None]  # (1 or batch, pairs, TILE, BLOCK)
    kind = allowed.flatten(2).any(-1).to(torch.int8) + (allowed | ~inside).flatten(2).all(-1)
    bits = torch.arange(BLOCK, device=pairs.device)
    return kind, [(allowed[b][kind[b] == 1].long() << bits).sum(-1) for b in range(allowed.shape[0])]


def gather_lists(kind: Tensor, words: Tensor, pairs: Tensor, tiles: int) -> Lists:
    """Lists from what every pair holds (1 or batch, pairs), and the masks of those that are partial, in their order."""
    batch = kind.shape[0]
    row, at = (kind > 0).nonzero(as_tuple=True)  # ordered by batch and pair
    tile = row * tiles + pairs[at, 0]
    counts = tile.bincount(minlength=batch * tiles)
    most = max(1, int(counts.max())) if counts.numel() else 1
    place = torch.arange(len(tile), device=tile.device) - (counts.cumsum(0) - counts)[tile]
    blocks = torch.full((batch * tiles, most), NONE, dtype=torch.int32, device=tile.device)
    blocks[tile, place] = pairs[at, 1].int()
    masks = torch.full_like(blocks, NONE)
    partial = kind[row, at] == 1
    masks[tile[partial], place[partial]] = torch.arange(len(words), dtype=torch.int32, device=tile.device)
    counts = counts.view(batch, 1, tiles)
    longest = counts.amax((0, 1))
    order = longest.argsort(descending=True, stable=True)
    first = int((longest > 2 * longest.float().median()).sum()) if tiles else 0
    has_masks = len(words) > 0
    return Lists(
        counts.int(),
        blocks.view(batch, 1, tiles, most),
        masks.view(batch, 1, tiles, most) if has_masks else None,
        words if has_masks else None,
        order.int(),
        first,
    )


def chosen_lists(chosen: Tensor) -> Lists:
    """Lists that the device chose: (1 or batch, 1 or heads, tiles, most) indices of blocks, -1 for none."""
    counts = torch.full(chosen.shape[:3], chosen.shape[3], dtype=torch.int32, device=chosen.device)
    return Lists(counts, chosen.int().contiguous())


def transpose_chosen(chosen: Tensor, T: int, S: int) -> Lists:
    """The lists of keys for lists of queries that have no masks, without waiting for the device.

    A tile is the block of 64 keys that was chosen, so that nothing is computed but what was: of two blocks in a tile of
    128, most tiles of queries chose one. A tile of queries is two blocks of 64.
    """
    query_blocks, key_blocks, tiles = blocks_in(T, BLOCK), blocks_in(S, BLOCK), chosen.shape[2]
    sees = torch.zeros(*chosen.shape[:3], key_blocks + 1, dtype=torch.bool, device=chosen.device)
    sees.scatter_(3, torch.where(chosen < 0, key_blocks, chosen).long(), True)
    sees = sees[..., :-1].mT  # (batch, heads, key_blocks, tiles)
    place = torch.where(sees, sees.cumsum(-1) - 1, tiles)
    tile = torch.arange(tiles, dtype=torch.int32, device=chosen.device).expand_as(place)
    listed = tile.new_full((*place.shape[:3], tiles + 1), NONE).scatter_(3, place, tile)[..., :tiles, None]
    halves = torch.arange(2, dtype=torch.int32, device=chosen.device)
    blocks = torch.where(listed == NONE, NONE, 2 * listed + halves).flatten(3)
    counts = 2 * sees.sum(-1)
    if query_blocks < 2 * tiles:  # the last tile has one block, and its entries stand last
        counts -= sees[..., -1].long()
    return Lists(counts.int(), blocks, rows=BLOCK)
