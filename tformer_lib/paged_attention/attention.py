"""The public door of paged attention: functions for a call, plans for the layers of a pass."""

import torch
from torch import Tensor

from tformer_lib.contract import score_scale
from tformer_lib.ladder import check_no_tangent
from tformer_lib.paged_attention.checks import check_paged, check_write
from tformer_lib.paged_attention.kernels import DECODE
from tformer_lib.paged_attention.operators import is_traced
from tformer_lib.paged_attention.options import Options, Places, Rows, WriteOptions
from tformer_lib.paged_attention.plans import AttentionPlan, WritePlan, make_plan, make_write_plan


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
    checked: bool = False,
) -> None:
    """Put new keys and values into their slots of the pools, in place.

    Args:
        k, v: (tokens, kv_heads, head_dim), any strides with adjacent columns.
        k_pool, v_pool: (blocks, kv_heads, block_size, head_dim), any strides with adjacent columns.
        slots: (tokens,) int64, block * block_size + offset; -1 for a token that is not to be stored. On a GPU, where
            looking would wait for it, they are believed unless ``checked``.
        cos, sin: (tokens, rotary_dim / 2) float32: the first rotary_dim columns of each key are turned by these angles
            on the way, as ``rope`` does.
        layout: of RoPE's pairs, "half" or "interleaved".
        k_scale, v_scale: a pool of float8 holds x / scale, cut off at the largest float8.
        step: which implementation; the best that the device runs if not given, 0 is PyTorch.
        checked: look for slots past the pool on a GPU too, which waits for it; on a CPU they are always looked for.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a slot is past the pool; the message names what was
            expected and what came.
    """
    places = Places(slots, cos, sin)
    options = WriteOptions(layout, float(k_scale), float(v_scale), DECODE.name(step), checked)
    if is_traced(k, v, k_pool, v_pool, slots):
        if not torch.compiler.is_compiling():
            check_write(k, v, k_pool, v_pool, places, options)
        torch.ops.tformer_lab.write_cache(k, v, k_pool, v_pool, *places, *options)
    else:
        make_write_plan(k, v, k_pool, v_pool, places, options).call(k, v, k_pool, v_pool)


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
    batch_invariant: bool = False,
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
        checked: look for block ids out of range, lengths past the table and starts that cut no rows on a GPU too, which
            waits for it; on a CPU they are always looked for.
        batch_invariant: give each row the same bits whatever the other rows are. It takes one query a row; the kernels
            that promise this need ``query_starts``, and do not share a long row among the GPU's multiprocessors.
        return_lse: return the log-sum-exp of every query's scores too.

    Returns:
        out, of q's shape and dtype; a query that sees no key gets zeros. With ``return_lse`` also lse, of q's shape
        without head_dim, float32 (float64 for float64), -inf for such a query.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or an index is out of range: the message names the row.
    """
    rows = Rows(block_tables, lengths, query_starts, max_queries)
    options = attention_options(q, scale, window, k_scale, v_scale, step, checked, batch_invariant)
    if is_traced(q, k_pool, v_pool, block_tables, lengths):
        if not torch.compiler.is_compiling():
            check_paged(q, k_pool, v_pool, rows, options)
        check_no_tangent("paged attention", q, k_pool, v_pool, instead="attention.attend over gather_blocks")
        out, lse = torch.ops.tformer_lab.paged_attention(q, k_pool, v_pool, *rows, *options)
    else:
        out, lse = make_plan(q, k_pool, v_pool, rows, options).call(q, k_pool, v_pool, return_lse)
    return (out, lse) if return_lse else out


def attention_options(q: Tensor, scale, window, k_scale, v_scale, step, checked, batch_invariant) -> Options:
    """The options of a call, with what was not given filled in."""
    scale = float(score_scale(scale, max(1, q.shape[-1])))
    return Options(scale, window, float(k_scale), float(v_scale), DECODE.name(step), checked, batch_invariant)


def plan_attention(
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
    batch_invariant: bool = False,
) -> AttentionPlan:
    """Check and choose once for all layers of a pass, whose queries and pools are laid out alike::

        plan = plan_attention(q, k_pool, v_pool, block_tables, lengths)   # at the first layer
        out = plan.run(q, k_pool, v_pool)                                 # at every layer

    The arguments, and what is raised, are those of :func:`paged_attention`. The plan holds the tables and lengths;
    their numbers may change on a GPU between runs, as they do when a CUDA graph is replayed.
    """
    rows = Rows(block_tables, lengths, query_starts, max_queries)
    options = attention_options(q, scale, window, k_scale, v_scale, step, checked, batch_invariant)
    return make_plan(q, k_pool, v_pool, rows, options)


def plan_write(
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
    checked: bool = False,
) -> WritePlan:
    """The same for :func:`write_cache`: ``plan.run(k, v, k_pool, v_pool)`` at every layer."""
    options = WriteOptions(layout, float(k_scale), float(v_scale), DECODE.name(step), checked)
    return make_write_plan(k, v, k_pool, v_pool, Places(slots, cos, sin), options)
