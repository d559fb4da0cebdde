"""The rows of chunked cross-entropy on a GPU, in Triton: one program reads a row twice and writes its gradient over it.

The second reading finds the row in the cache: 132 programs at a time hold 13 MB of GPT-2's rows in bfloat16.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

constexpr = object if triton is None else tl.constexpr  # known when the kernel is compiled
BLOCK, WARPS = 4096, 8
"""Logits that a program takes at once, and its warps."""


def rows_kernel(
    logits, targets, losses, count, stride, smoothing, cap,
    V: constexpr, IGNORED: constexpr, SMOOTH: constexpr, CAP: constexpr, GRADIENT: constexpr, BLOCK: constexpr,
):  # fmt: skip
    """One row: its loss, and its gradient in its place. Each reading takes one exponential for each logit."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target, columns = tl.load(targets + row), tl.arange(0, BLOCK)
    m = tl.full([], float("-inf"), tl.float32)  # the largest logit so far, and the sum of exponentials below it
    l = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        here = start + columns
        z = tl.load(logits + here, mask=here < V, other=float("-inf")).to(tl.float32)
        if CAP:
            z = tl.where(here < V, cap - 2 * cap / (1 + tl.exp(2 * z / cap)), float("-inf"))
        if SMOOTH:
            sums += tl.where(here < V, z, 0.0)
        m_new = tl.maximum(m, tl.max(z, 0))
        anchor = tl.where(m_new == float("-inf"), 0.0, m_new)
        l = l * tl.exp(m - anchor) + tl.exp(z - anchor)
        m = m_new
    lse = m + tl.log(tl.sum(l, 0))
    counts = target != IGNORED
    place = tl.where(counts, target, 0)
    wanted = tl.load(logits + place).to(tl.float32)
    if CAP:
        wanted = cap - 2 * cap / (1 + tl.exp(2 * wanted / cap))
    loss = lse - (1 - smoothing) * wanted
    if SMOOTH:
        loss -= smoothing * tl.sum(sums, 0) / V
    tl.store(losses + row, tl.where(counts, loss, 0.0))
    if GRADIENT:
        tl.debug_barrier()  # nobody writes before all have read the target's logit
        share = tl.where(counts, 1 / tl.load(count).to(tl.float32), 0.0)
        for start in range(0, V, BLOCK):
            here = start + columns
            z = tl.load(logits + here, mask=here < V, other=0.0).to(tl.float32)
            slope = share
            if CAP:
                z = cap - 2 * cap / (1 + tl.exp(2 * z / cap))
                slope = share * (1 - (z / cap) * (z / cap))
            gradient = tl.exp(z - lse) - tl.where(here == place, 1 - smoothing, 0.0)
            if SMOOTH:
                gradient -= smoothing / V
            tl.store(logits + here, (gradient * slope).to(logits.dtype.element_ty), mask=here < V)


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
    known = {"SMOOTH": label_smoothing > 0, "CAP": softcap > 0, "GRADIENT": differentiated, "BLOCK": BLOCK}
    with torch.cuda.device(logits.device):
        COMPILED[(tokens,)](
            logits, targets, losses, count, *numbers, vocab_size, ignore_index, **known, num_warps=WARPS
        )
