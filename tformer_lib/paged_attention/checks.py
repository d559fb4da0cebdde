"""What the operators refuse: tensors that do not fit, and numbers that would send a kernel out of the pools."""

from itertools import pairwise

import torch
from torch import Tensor

from tformer_lib.contract import check_heads
from tformer_lib.ladder import FP8
from tformer_lib.paged_attention.blocks import blocks_for
from tformer_lib.paged_attention.options import Options, Places, Rows

POOL_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, FP8)


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


def check_write(k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, places: Places) -> None:
    """Refuse what :func:`write_cache` cannot store. Looks at shapes alone: nothing waits for the device."""
    slots, cos, sin = places
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


def check_paged(q: Tensor, k_pool: Tensor, v_pool: Tensor, rows: Rows, options: Options) -> None:
    """Refuse what :func:`paged_attention` cannot read. Looks at shapes alone: nothing waits for the device."""
    block_tables, lengths, query_starts, _ = rows
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
    if options.window is not None and options.window < 1:
        raise ValueError(f"window must be at least 1, got {options.window}")


def check_indices(pool: Tensor, rows: Rows, total: int) -> None:
    """Refuse numbers that would make a kernel read outside the pools or the table, naming the row. Waits for a GPU.

    Args:
        pool: (blocks, kv_heads, block_size, head_dim).
        rows: as :func:`paged_attention` takes them.
        total: how many queries there are.
    """
    block_tables, lengths, query_starts, _ = rows
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
