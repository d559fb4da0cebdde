"""What torch.compile sees of paged attention: two operators."""

import torch
from torch import Tensor

from tformer_lib.ladder import accumulation_dtype, address_of
from tformer_lib.paged_attention.options import Options, Places, Rows, WriteOptions
from tformer_lib.paged_attention.plans import make_plan, make_write_plan


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
    step: str,
    checked: bool = False,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """What torch.compile sees of :func:`paged_attention`."""
    rows = Rows(block_tables, lengths, query_starts, max_queries)
    options = Options(scale, window, k_scale, v_scale, step, checked, batch_invariant)
    return make_plan(q, k_pool, v_pool, rows, options).call(q, k_pool, v_pool, True)


@paged_attention_op.register_fake
def paged_attention_fake(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """The shapes and dtypes of what the operator returns."""
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=accumulation_dtype(q))


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
    step: str,
    checked: bool = False,
) -> None:
    """What torch.compile sees of :func:`write_cache`."""
    options = WriteOptions(layout, k_scale, v_scale, step, checked)
    make_write_plan(k, v, k_pool, v_pool, Places(slots, cos, sin), options).call(k, v, k_pool, v_pool)


@write_cache_op.register_fake
def write_cache_fake(*_: object) -> None:
    """It returns nothing."""


def is_traced(*tensors: Tensor) -> bool:
    """Whether a compiler or a transform looks on, who must see one operator; else calling the kernel saves 15 us."""
    return torch.compiler.is_compiling() or any(address_of(x) is None for x in tensors)
