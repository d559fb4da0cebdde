"""Sparse attention: say which pairs of positions may meet, and compute no block of pairs that is empty.

A pattern is a small object that answers two questions: which pairs of positions are allowed (``allows``, exact), and
which rectangles of pairs may hold an allowed one (``may_touch``, from the rectangle's corners alone, never too few).
Patterns compose with ``|`` (either allows) and ``&`` (both allow):

    sliding_window(512) | global_tokens([0]) & causal()

``pattern.mask(T, S)`` is the boolean mask of the contract; ``pattern.layout(T, S, block)`` says which blocks are live.
``attend`` visits live blocks alone: for each block of queries it gathers the live blocks of keys and values, and does
dense softmax attention on those. Work and memory, forward and backward, follow the number of live blocks.

Positions count from the first key. The T queries are the last T positions, as everywhere in this library.

Sources: Child et al. 2019, "Generating Long Sequences with Sparse Transformers"; Beltagy et al. 2020, "Longformer";
Zaheer et al. 2020, "Big Bird".

====== ==================== ================================================= ======================================
step   source               what it is                                        runs on
====== ==================== ================================================= ======================================
0      blocks.py            dense attention of gathered blocks, PyTorch       anything
"cpu"  cpu.cpp              the same lists in vectorised C++                  a CPU, f32 bf16 f16
1      1_tensor_core.cu     mma.sync over lists of blocks                     sm_80 on, bf16 f16
2      2_hopper.cu          the flash kernel for Hopper over lists of blocks  sm_90, bf16 f16
====== ==================== ================================================= ======================================

``attend`` takes the top step that can do what is asked, on a CPU step 0; ``attend_chosen`` takes lists that the device
chose itself. ``Indexer`` scores all pairs cheaply, and ``chosen_tokens`` makes the mask of each query's best. Gradients
come from ``backward.cu`` on a Hopper GPU, from ``backward_tensor_core.cu`` on others from sm_80 on and for step 1, from
``cpu.cpp`` for its own step, else from step 0.
"""

from tformer_lib.sparse_attention.attention import attend, attend_chosen, choose_blocks
from tformer_lib.sparse_attention.blocks import attend_blocks, attend_piece, in_blocks, narrow
from tformer_lib.sparse_attention.indexer import Indexer, chosen_tokens, index_loss, index_scores
from tformer_lib.sparse_attention.lists import Lists, pattern_lists
from tformer_lib.sparse_attention.patterns import (
    BLOCK,
    Band,
    BlockPattern,
    Both,
    Bucket,
    Documents,
    Either,
    GlobalTokens,
    Pattern,
    Segments,
    Summaries,
    big_bird,
    blocks_in,
    bucket_size,
    candidate_blocks,
    causal,
    dilated,
    documents,
    draw_blocks,
    everything,
    fixed,
    global_tokens,
    hide,
    longformer,
    make_bucket,
    pattern_tiles,
    plan,
    receptive_field,
    sliding_window,
    spans,
    strided,
)

__all__ = [
    "BLOCK",
    "Band",
    "BlockPattern",
    "Both",
    "Bucket",
    "Documents",
    "Either",
    "GlobalTokens",
    "Indexer",
    "Lists",
    "Pattern",
    "Segments",
    "Summaries",
    "attend",
    "attend_blocks",
    "attend_chosen",
    "attend_piece",
    "big_bird",
    "blocks_in",
    "bucket_size",
    "candidate_blocks",
    "causal",
    "choose_blocks",
    "chosen_tokens",
    "dilated",
    "documents",
    "draw_blocks",
    "everything",
    "fixed",
    "global_tokens",
    "hide",
    "in_blocks",
    "index_loss",
    "index_scores",
    "longformer",
    "make_bucket",
    "narrow",
    "pattern_lists",
    "pattern_tiles",
    "plan",
    "receptive_field",
    "sliding_window",
    "spans",
    "strided",
]
