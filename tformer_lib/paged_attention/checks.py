"""What the operators refuse: tensors that do not fit, and numbers that would send a kernel out of the pools.

Shapes are looked at on every device. Numbers are looked at on a CPU, where that costs microseconds; on a GPU it would
wait for the device, so there they are looked at where ``checked`` says so.
"""

import numpy as np
import torch
from torch import Tensor

from tformer_lib.contract import ATTENTION_DTYPES, check_dense, check_heads, check_writable
from tformer_lib.ladder import FP8
from tformer_lib.paged_attention.options import Options, Places, Rows, WriteOptions
from tformer_lib.rope import LAYOUTS

POOL_DTYPES = (*ATTENTION_DTYPES, FP8)


def check_pools(k_pool: Tensor, v_pool: Tensor) -> None:
    """Refuse pools that are not a pair of one shape, dtype and device."""
    for name, pool in (("k_pool", k_pool), ("v_pool", v_pool)):
        check_dense(name, pool)
        if pool.dim() != 4:
            shape = tuple(pool.shape)
            raise ValueError(f"{name} must have shape (blocks, kv_heads, block_size, head_dim), got {shape}")
        if 0 in pool.shape[1:]:
            raise ValueError(f"{name} must have at least 1 kv head, slot and column, got shape {tuple(pool.shape)}")
        if pool.dtype not in POOL_DTYPES:
            raise ValueError(f"{name} must be float64, float32, bfloat16, float16 or float8_e4m3fn, got {pool.dtype}")
    for what in ("shape", "dtype", "device"):
        if getattr(k_pool, what) != getattr(v_pool, what):
            raise ValueError(f"the pools differ in {what}: {getattr(k_pool, what)} and {getattr(v_pool, what)}")


def check_dtype(name: str, x: Tensor, pool: Tensor) -> None:
    """Refuse numbers that are not in the pool's dtype; a pool of float8 takes those of any attention."""
    if x.dtype not in ATTENTION_DTYPES:
        raise ValueError(f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}")
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


def check_write(k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, places: Places, options: WriteOptions) -> None:
    """Refuse what :func:`write_cache` cannot store. Looks at shapes alone: nothing waits for the device."""
    slots, cos, sin = places
    check_pools(k_pool, v_pool)
    if k_pool.is_neg() or v_pool.is_neg():
        raise ValueError("pools must hold what they say: nothing is written to a view of their negatives")
    check_writable("k_pool", k_pool)
    check_writable("v_pool", v_pool)
    wanted = ("tokens", k_pool.shape[1], k_pool.shape[3])
    for name, x in (("k", k), ("v", v)):
        check_dense(name, x)
        if x.dim() != 3 or x.shape[1:] != wanted[1:] or x.shape != k.shape:
            raise ValueError(f"{name} must have shape (tokens, {wanted[1]}, {wanted[2]}), got {tuple(x.shape)}")
        if x.device != k_pool.device:
            raise ValueError(f"the pools are on {k_pool.device}, {name} came on {x.device}")
        check_dtype(name, x, k_pool)
    check_integers("slots", slots, torch.int64, (k.shape[0],), k_pool.device)
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin must be given together")
    if options.layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {options.layout!r}")
    if cos is not None:
        check_angles(cos, sin, k)


def check_angles(cos: Tensor, sin: Tensor, k: Tensor) -> None:
    """Refuse angles that are not (tokens, rotary_dim / 2) for a rotary_dim that k's heads have."""
    tokens, _, head_dim = k.shape
    for name, x in (("cos", cos), ("sin", sin)):
        if x.dim() != 2 or x.shape[0] != tokens or x.dtype != torch.float32:
            came = f"{x.dtype} of shape {tuple(x.shape)}"
            raise ValueError(f"{name} must be float32 of shape ({tokens}, rotary_dim / 2), got {came}")
        if x.device != k.device:
            raise ValueError(f"k is on {k.device}, {name} came on {x.device}")
    if cos.shape != sin.shape:
        raise ValueError(f"cos and sin must agree in shape, got {tuple(cos.shape)} and {tuple(sin.shape)}")
    if 2 * cos.shape[1] > head_dim:
        raise ValueError(f"cos turns {2 * cos.shape[1]} columns, a head has {head_dim}")


def check_slots(slots: Tensor, pool: Tensor) -> None:
    """Refuse a slot past the pool, into which a kernel would write all the same. Waits for a GPU."""
    room = pool.shape[0] * pool.shape[2]
    if slots.numel() and (most := int(slots.max())) >= room:
        raise ValueError(f"slots hold {most}, the pool has slots 0 to {room - 1}")


def check_paged(q: Tensor, k_pool: Tensor, v_pool: Tensor, rows: Rows, options: Options) -> None:
    """Refuse what :func:`paged_attention` cannot read. Looks at shapes alone: nothing waits for the device."""
    block_tables, lengths, query_starts, max_queries = rows
    check_pools(k_pool, v_pool)
    check_dense("q", q)
    if q.dim() != 3 or q.shape[2] != k_pool.shape[3]:
        raise ValueError(f"q must have shape (queries, heads, {k_pool.shape[3]}), got {tuple(q.shape)}")
    check_heads(q.shape[1], k_pool.shape[1])
    check_dtype("q", q, k_pool)
    if q.device != k_pool.device:
        raise ValueError(f"the pools are on {k_pool.device}, q came on {q.device}")
    batch = q.shape[0] if query_starts is None else lengths.numel()
    check_integers("lengths", lengths, torch.int32, (batch,), k_pool.device)
    check_integers("block_tables", block_tables, torch.int32, (batch, "max_blocks"), k_pool.device)
    if query_starts is not None:
        check_integers("query_starts", query_starts, torch.int32, (batch + 1,), k_pool.device)
    if options.window is not None and not (isinstance(options.window, int) and options.window >= 1):
        raise ValueError(f"window must be a whole number of keys, at least 1, got {options.window}")
    if max_queries is not None and max_queries < 0:
        raise ValueError(f"max_queries must be at least 0, got {max_queries}")
    if options.batch_invariant and not rows.one_query:
        raise ValueError("batch_invariant takes one query a row: give query_starts with max_queries=1")


def check_indices(pool: Tensor, rows: Rows, total: int) -> None:
    """Refuse numbers that would make a kernel read outside the pools or the table, naming the row. Waits for a GPU.

    Args:
        pool: (blocks, kv_heads, block_size, head_dim).
        rows: as :func:`paged_attention` takes them.
        total: how many queries there are.
    """
    tables, lengths = rows.block_tables.cpu().numpy(), rows.lengths.cpu().numpy()
    (blocks, _, block_size, _), room = pool.shape, tables.shape[1] * pool.shape[2]
    is_long = (lengths < 0) | (lengths > room)
    if is_long.any():
        row = is_long.argmax()
        raise ValueError(f"row {row} has length {lengths[row]}, its table has room for 0 to {room} tokens")
    starts = np.arange(0, room, block_size)  # of each block of a table: the first token that it would hold
    is_wrong = ((tables < 0) | (tables >= blocks)) & (starts < lengths[:, None])  # (batch, max_blocks)
    if is_wrong.any():
        row, place = np.argwhere(is_wrong)[0]
        have = f"the pool has blocks 0 to {blocks - 1}"
        raise ValueError(f"row {row} names block {tables[row, place]} at place {place}, {have}")
    if rows.query_starts is not None:
        check_starts(rows.query_starts.cpu().numpy().astype(np.int64), total, rows.max_queries)


def check_starts(starts: np.ndarray, total: int, max_queries: int | None) -> None:
    """Refuse query_starts (batch + 1,) that do not cut ``total`` queries into rows of at most ``max_queries``."""
    if starts[0] != 0 or starts[-1] != total:
        raise ValueError(f"query_starts must go from 0 to {total}, got {starts[0]} to {starts[-1]}")
    counts = starts[1:] - starts[:-1]
    if (counts < 0).any():
        row = (counts < 0).argmax()
        raise ValueError(f"query_starts must not fall, row {row} goes from {starts[row]} to {starts[row + 1]}")
    if max_queries is not None and (counts > max_queries).any():
        row = (counts > max_queries).argmax()
        raise ValueError(f"max_queries is {max_queries}, row {row} has {counts[row]} queries")
