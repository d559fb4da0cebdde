"""The rows of chunked cross-entropy on a GPU, in Triton: one program reads a row twice and writes its gradient over it.

The second reading should find the row in the L2 cache. So few rows are on their way at once: 62 registers let two
programs of 16 warps stand on a multiprocessor, which hold 27 MB of GPT-2's rows in bfloat16. What has been read for the
second time is told to leave first.

Sums of exponentials are taken below an anchor. The anchor need not be the row's maximum: any number will do that keeps
exp(z - anchor) finite and not all zero. The largest logit of the first block does, in nearly every row, and then no
warp waits for another before the end of the row. Where a later logit is so much larger that the sum overflows, the
maximum is found first, and the sum taken again.

Ledger (32,768 rows of 50,304 bfloat16 logits, H200; to read and write them once takes 1.57 ms, and to read them twice
and write them 2.36)
  a running maximum, 8 warps, blocks of 4,096   2.44 ms. With blocks of 8,192, 16 warps 2.64 and 32 warps 2.70: fewer
                                                rows at once fit the cache, but the warps wait for one another
  a whole row in registers                      16 warps 2.68, 32 warps 2.87: nothing is read during the arithmetic
  a maximum in each place of the block          2.31 with blocks of 4,096, 3.31 with 8,192: no waiting, but three
                                                exponentials a logit in place of two
  an anchor, as here                            predicted 1.9, measured 1.84: no waiting, two exponentials
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

constexpr = object if triton is None else tl.constexpr  # known when the kernel is compiled
BLOCK, WARPS = 4096, 16
"""Logits that a program takes at once, and its warps."""
LOG2E = 1.4426950408889634


def capped(z, cap, CAP: constexpr):
    """cap * tanh(z / cap), if there is a cap."""
    if CAP:
        z = cap - 2 * cap / (1 + tl.exp(2 * z / cap))
    return z


def sum_below(
    logits, anchor, cap, columns,
    V: constexpr, CAP: constexpr, SMOOTH: constexpr, BLOCK: constexpr, LOG2E: constexpr,
):  # fmt: skip
    """The sum of exp(z - anchor) over a row, and that of z if SMOOTH."""
    exponentials = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    shift = anchor * LOG2E
    for start in range(0, V // BLOCK * BLOCK, BLOCK):
        z = capped(tl.load(logits + start + columns, eviction_policy="evict_last").to(tl.float32), cap, CAP)
        exponentials += tl.exp2(z * LOG2E - shift)
        if SMOOTH:
            sums += z
    if V % BLOCK:
        inside = columns < V % BLOCK
        z = tl.load(logits + V // BLOCK * BLOCK + columns, mask=inside, other=0.0).to(tl.float32)
        z = capped(z, cap, CAP)
        exponentials += tl.where(inside, tl.exp2(z * LOG2E - shift), 0.0)
        if SMOOTH:
            sums += tl.where(inside, z, 0.0)
    return tl.sum(exponentials, 0), tl.sum(sums, 0)


def largest(logits, columns, START: constexpr, END: constexpr, BLOCK: constexpr):
    """The largest logit of a part of a row."""
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(START, END, BLOCK):
        here = start + columns
        most = tl.maximum(most, tl.load(logits + here, mask=here < END, other=float("-inf")).to(tl.float32))
    return tl.max(most, 0)


def rows_kernel(
    logits, targets, losses, count, stride, smoothing, cap,
    V: constexpr, IGNORED: constexpr, SMOOTH: constexpr, CAP: constexpr, GRADIENT: constexpr,
    BLOCK: constexpr, LOG2E: constexpr,
):  # fmt: skip
    """One row: its loss, and its gradient in its place. Each reading takes one exponential for each logit."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target, columns = tl.load(targets + row), tl.arange(0, BLOCK)
    anchor = largest(logits, columns, 0, min(V, BLOCK), BLOCK)
    anchor = capped(tl.where(anchor == float("-inf"), 0.0, anchor), cap, CAP)
    total, sums = sum_below(logits, anchor, cap, columns, V, CAP, SMOOTH, BLOCK, LOG2E)
    if total == float("inf"):
        anchor = capped(largest(logits, columns, 0, V, BLOCK), cap, CAP)
        total, sums = sum_below(logits, anchor, cap, columns, V, CAP, SMOOTH, BLOCK, LOG2E)
    lse = anchor + tl.log(total)
    counts = target != IGNORED
    place = tl.where(counts, target, 0)
    wanted = tl.load(logits + place).to(tl.float32)
    slope_there = 1.0
    if CAP:
        wanted = capped(wanted, cap, CAP)
        slope_there = 1 - (wanted / cap) * (wanted / cap)
    loss = lse - (1 - smoothing) * wanted
    if SMOOTH:
        loss -= smoothing * sums / V
    tl.store(losses + row, tl.where(counts, loss, 0.0))
    if GRADIENT:
        tl.debug_barrier()  # nobody writes before all have read the target's logit
        share = tl.where(counts, 1 / tl.load(count).to(tl.float32), 0.0)
        for start in range(0, V, BLOCK):
            here = start + columns
            inside = here < V
            z = tl.load(logits + here, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
            slope = share
            if CAP:
                z = capped(z, cap, CAP)
                slope = share * (1 - (z / cap) * (z / cap))
            gradient = tl.exp2(z * LOG2E - lse * LOG2E)
            if SMOOTH:
                gradient -= smoothing / V
            gradient = (gradient * slope).to(logits.dtype.element_ty)
            tl.store(logits + here, gradient, mask=inside, eviction_policy="evict_first")
        tl.debug_barrier()  # the target's own gradient is written last
        there = tl.exp2(wanted * LOG2E - lse * LOG2E) - (1 - smoothing)
        if SMOOTH:
            there -= smoothing / V
        tl.store(logits + place, (there * slope_there * share).to(logits.dtype.element_ty))


if triton is not None:
    capped, sum_below, largest = triton.jit(capped), triton.jit(sum_below), triton.jit(largest)
COMPILED = triton.jit(rows_kernel) if triton is not None else None


def can_run(logits: Tensor) -> bool:
    """Whether the kernel can take these logits: on a GPU, in a type of up to 32 bits, where Triton is installed."""
    return COMPILED is not None and logits.is_cuda and logits.dtype != torch.float64 and len(logits) > 0


def take_losses(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    count: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    differentiated: bool,
) -> None:
    """What :func:`tformer_lib.training.cross_entropy.take_losses` does; logits are in memory row by row."""
    tokens, vocab_size = logits.shape
    numbers = logits.stride(0), label_smoothing, softcap
    known = {
        "LOG2E": LOG2E,
        "SMOOTH": label_smoothing > 0,
        "CAP": softcap > 0,
        "GRADIENT": differentiated,
        "BLOCK": BLOCK,
    }
    with torch.cuda.device(logits.device):
        COMPILED[(tokens,)](
            logits, targets, losses, count, *numbers, vocab_size, ignore_index, **known, num_warps=WARPS
        )
