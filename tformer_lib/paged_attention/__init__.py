"""Paged attention: keys and values live in blocks of one pool, and a block table says where each sequence's are.

A contiguous cache must reserve what a sequence might grow to. Here memory is handed out in blocks of a few tokens, as
an operating system hands out pages, so that a sequence wastes less than one block, and sequences with a common
beginning can hold the same blocks (Kwon et al., "PagedAttention", arXiv:2309.06180).

Each part has a room:

- ``blocks``: :class:`BlockAllocator` counts who holds each block, and finds blocks again by the tokens that they hold;
  :class:`BlockTable` is one sequence's list of blocks: append, fork, truncate, free. Plain Python, no tensor.
- ``cache``: :class:`PagedKVCache` is a cache behind the interface of ``kv_cache``, over one pool for all layers.
- ``attention``, the public door: :func:`write_cache` puts new keys and values into their slots,
  :func:`paged_attention` walks the tables; :func:`plan_write` and :func:`plan_attention` do what both have in common
  for all layers of a pass once. ``checks``, ``plans``, ``kernels`` and ``operators`` stand behind it.
- ``reference``: step 0, plain PyTorch.

Pools are (blocks, kv_heads, block_size, head_dim); token p of a sequence is in block ``table[p // block_size]`` at
offset ``p % block_size``, and its slot is block * block_size + offset.

The ladder of implementations, each callable by its ``step``; ``step=None`` takes the top one that can do what is asked:

===================== ====================== ========================================== ==============================
step                  source                 what it is                                 runs on
===================== ====================== ========================================== ==============================
0                     reference              blocks gathered, plain attention: the      anything
                                             oracle
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

from tformer_lib.ladder import FP8
from tformer_lib.paged_attention.attention import paged_attention, plan_attention, plan_write, write_cache
from tformer_lib.paged_attention.blocks import (
    BLOCK_SIZE,
    BlockAllocator,
    BlockTable,
    Copies,
    OutOfBlocks,
    Prefix,
    blocks_for,
    same_prefix,
)
from tformer_lib.paged_attention.cache import PLAIN_FORMS, PagedKVCache, PagedLayer, PagedPass, as_variant
from tformer_lib.paged_attention.checks import POOL_DTYPES
from tformer_lib.paged_attention.kernels import PREFILL_STEPS
from tformer_lib.paged_attention.operators import is_traced
from tformer_lib.paged_attention.options import Rows
from tformer_lib.paged_attention.plans import AttentionPlan, WritePlan
from tformer_lib.paged_attention.reference import attend_in_pytorch, attend_rows, gather_blocks, write_in_pytorch

__all__ = [
    "AttentionPlan",
    "BLOCK_SIZE",
    "BlockAllocator",
    "BlockTable",
    "Copies",
    "FP8",
    "OutOfBlocks",
    "PLAIN_FORMS",
    "POOL_DTYPES",
    "PREFILL_STEPS",
    "PagedKVCache",
    "PagedLayer",
    "PagedPass",
    "Prefix",
    "Rows",
    "WritePlan",
    "as_variant",
    "attend_in_pytorch",
    "attend_rows",
    "blocks_for",
    "gather_blocks",
    "is_traced",
    "paged_attention",
    "plan_attention",
    "plan_write",
    "same_prefix",
    "write_cache",
    "write_in_pytorch",
]
