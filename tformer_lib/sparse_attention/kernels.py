"""The ladder of kernels over lists of blocks behind one operator, and its step 0: one tile after another in PyTorch."""

import ctypes

import torch
from torch import Tensor

from tformer_lib.contract import in_named_dtypes
from tformer_lib.ladder import (
    AUTO,
    DTYPE_CODES,
    Ladder,
    accumulation_dtype,
    loadable,
    refusal_of_dtype,
    refusal_of_hopper,
    refusal_of_place,
    refusal_of_tensor_cores,
)
from tformer_lib.sparse_attention.checks import check_gradients, check_operator
from tformer_lib.sparse_attention.lists import (
    BLOCK,
    NONE,
    TILE,
    Lists,
    chosen_lists,
    pattern_lists,
    transpose_chosen,
)
from tformer_lib.sparse_attention.patterns import Band, blocks_in, pattern_of

LADDER = Ladder("sparse_attention", steps=("0", "cpu", "1", "2"), fastest={"cuda": ("2", "1", "0")})
GRADIENTS = {
    "0": ("0",),
    "cpu": ("cpu", "0"),
    "1": ("backward_tensor_core", "backward", "0"),
    "2": ("backward", "backward_tensor_core", "0"),
}
"""Whose gradients: those of the step's own instructions, or of simpler ones."""
MOST_HEAD_DIM = {"1": 128, "2": 256, "backward": 128, "backward_tensor_core": 128}


def refusal(step: str, q: Tensor, v: Tensor) -> str | None:
    """Why ``step`` cannot do this, or None if it can."""
    if step == "0":
        return None
    if reason := refusal_of_place(step, q):
        return reason
    if v.shape[-1] != q.shape[-1]:
        return f"v must have q's head_dim {q.shape[-1]}, got {v.shape[-1]}"
    if step == "cpu":
        return refusal_of_dtype(q)
    if reason := refusal_of_tensor_cores(q.dtype, q.device):
        return reason
    if step in ("2", "backward") and (reason := refusal_of_hopper(q.device)):
        return reason
    if q.shape[-1] % 8 or q.shape[-1] > MOST_HEAD_DIM[step]:
        return f"head_dim must be a multiple of 8 up to {MOST_HEAD_DIM[step]}, got {q.shape[-1]}"
    return None


def refusal_of_order(step: str) -> str | None:
    """Why a step's gradients are not what ``torch.use_deterministic_algorithms`` asks for."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    return "its blocks add to dq in any order" if step.startswith("backward") and deterministic else None


def choose_gradients(step: str, q: Tensor, v: Tensor) -> str:
    """Which gradients belong to a step, or to the device if the step is "auto"."""
    names = GRADIENTS[("2" if q.is_cuda else "0") if step == AUTO else step]
    if names == ("0",):
        return "0"
    return LADDER.first(names, q.device, lambda name: refusal_of_order(name) or refusal(name, q, v))


# --- the kernels ---------------------------------------------------------------------------------------------------


class Matrix(ctypes.Structure):
    """``sparse::Matrix`` of kernels/sparse_attention/arguments.h."""

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "row"))]


class ListsDescription(ctypes.Structure):
    """``sparse::Lists``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("counts", "blocks", "masks", "words", "order")),
        *((name, ctypes.c_int64) for name in ("counts_batch", "counts_head", "blocks_batch", "blocks_head")),
        *((name, ctypes.c_int64) for name in ("blocks_tile", "number_of_masks", "first_for_all", "rows")),
    ]


class Arguments(ctypes.Structure):
    """``sparse::Arguments``, in the same order."""

    _fields_ = [
        *((name, Matrix) for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")),
        *((name, ctypes.c_void_p) for name in ("lse", "dlse", "statistics", "dq_sum", "sinks", "next")),
        ("lists", ListsDescription),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "queries", "keys", "head_dim")),
        ("scale", ctypes.c_float),
        ("causal", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    ]


def matrix(x: Tensor) -> Matrix:
    """A (batch, heads, rows, columns) tensor as a kernel sees it."""
    return Matrix(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2))


def describe_lists(lists: Lists) -> ListsDescription:
    """Lists as a kernel sees them; a dimension of one has stride 0."""
    strides = [
        s if n > 1 else 0 for t in (lists.counts, lists.blocks) for n, s in zip(t.shape[:2], t.stride(), strict=False)
    ]
    optional = (None if t is None else t.data_ptr() for t in (lists.masks, lists.words, lists.order))
    number = 0 if lists.words is None else lists.words.shape[0]
    return ListsDescription(
        lists.counts.data_ptr(), lists.blocks.data_ptr(), *optional, *strides, lists.blocks.stride(2), number,
        lists.first_for_all, lists.rows,
    )  # fmt: skip


def arguments_of(q: Tensor, k: Tensor, v: Tensor, lists: Lists, scale: float, causal: bool) -> Arguments:
    """The arguments that every kernel needs; the caller adds the outputs."""
    arguments = Arguments(
        q=matrix(q), k=matrix(k), v=matrix(v), lists=describe_lists(lists), scale=scale, causal=causal
    )
    arguments.batch, arguments.heads, arguments.queries, arguments.head_dim = q.shape
    arguments.kv_heads, arguments.keys = k.shape[1], k.shape[2]
    arguments.dtype = DTYPE_CODES[q.dtype]
    return arguments


def positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float, float]:
    """The same scores by a positive scale, and the sign that moved into a copy of q (0 where the scale is 0).

    A kernel takes the maximum of the scores before it scales them, which a negative scale would turn over.
    """
    if scale > 0:
        return q, scale, 1.0
    sign = -1.0 if scale else 0.0
    return q * sign, abs(scale) or 1.0, sign


def launch_forward(
    step: str, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, lists: Lists, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """A kernel's output and log-sum-exp."""
    out, lse = empty_outputs(q, v)
    if q.is_cuda:
        q, scale, _ = positive_scale(q, scale)
    q, k, v = (loadable(x, aligned=x.is_cuda) for x in (q, k, v))
    arguments = arguments_of(q, k, v, lists, scale, causal)
    counter = q.new_zeros(1, dtype=torch.int32)
    sinks = None if sinks is None else sinks.float().contiguous()
    arguments.out, arguments.lse, arguments.next = matrix(out), lse.data_ptr(), counter.data_ptr()
    arguments.sinks = None if sinks is None else sinks.data_ptr()
    LADDER.launch(step, "forward", arguments, q.device)
    return out, lse


def launch_backward(
    step: str,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    columns: Lists,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """A kernel's gradients of q, k and v, from the lists of every tile of keys."""
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    q, scale, sign = positive_scale(q, scale)
    q, k, v, out, dout = (loadable(x, aligned=True) for x in (q, k, v, out, dout))
    arguments = arguments_of(q, k, v, columns, scale, causal)
    dlse = None if dlse is None else dlse.contiguous()
    arguments.out, arguments.dout, arguments.lse = matrix(out), matrix(dout), lse.data_ptr()
    arguments.dq, arguments.dk, arguments.dv = matrix(dq), matrix(dk), matrix(dv)
    arguments.dlse = None if dlse is None else dlse.data_ptr()
    sizes = (ctypes.c_int64 * 2)()
    LADDER.kernel(step, "scratch", q.device).ask(arguments, sizes)
    statistics, dq_sum = q.new_empty(sizes[0], dtype=torch.float32), q.new_zeros(sizes[1], dtype=torch.float32)
    arguments.statistics, arguments.dq_sum = statistics.data_ptr(), dq_sum.data_ptr()
    LADDER.launch(step, "backward", arguments, q.device)
    return dq if sign == 1.0 else dq * sign, dk, dv


def launch_cpu_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rows: Lists,
    columns: Lists,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The C++ twin's gradients: of q from the lists of every tile of queries, of k and v from those of keys."""
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    q, k, v, out, dout = (loadable(x) for x in (q, k, v, out, dout))
    arguments = arguments_of(q, k, v, rows, scale, causal)
    dlse = None if dlse is None else dlse.contiguous()
    statistics = q.new_empty(*q.shape[:2], blocks_in(q.shape[2], BLOCK), 2, BLOCK, dtype=torch.float32)
    arguments.out, arguments.dout, arguments.lse = matrix(out), matrix(dout), lse.data_ptr()
    arguments.dq, arguments.dk, arguments.dv = matrix(dq), matrix(dk), matrix(dv)
    arguments.dlse = None if dlse is None else dlse.data_ptr()
    arguments.statistics = statistics.data_ptr()
    LADDER.launch("cpu", "prepare", arguments, q.device)
    LADDER.launch("cpu", "query_gradients", arguments, q.device)
    arguments.lists = describe_lists(columns)
    LADDER.launch("cpu", "key_gradients", arguments, q.device)
    return dq, dk, dv


def empty_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out (batch, heads, T, value_dim) of q's dtype, and lse (batch, heads, T)."""
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=accumulation_dtype(q))


# --- step 0: one tile of queries after another ---------------------------------------------------------------------


def tile_of(lists: Lists, tile: int, q: Tensor, S: int, causal: bool) -> tuple[Tensor, Tensor]:
    """One tile of queries: the positions of its keys (1 or batch, 1 or heads, n), and who sees them (..., rows, n)."""
    n = int(lists.counts[:, :, tile].max())
    blocks = lists.blocks[:, :, tile, :n].long()
    listed = torch.arange(n, device=q.device) < lists.counts[:, :, tile, None]
    within = torch.arange(BLOCK, device=q.device)
    keys = blocks[..., None] * BLOCK + within  # (..., n, BLOCK)
    live = (listed & (blocks != NONE))[..., None] & (keys < S)
    rows = torch.arange(tile * TILE, min((tile + 1) * TILE, q.shape[2]), device=q.device)
    seen = live.unsqueeze(-3)  # (..., 1, n, BLOCK)
    if causal:
        seen = seen & (keys.unsqueeze(-3) <= (rows + S - q.shape[2])[:, None, None])
    if lists.masks is not None:
        masks = lists.masks[:, :, tile, :n].long()
        words = lists.words[masks.clamp(min=0)][..., : len(rows)]  # (..., n, rows)
        bits = (words[..., None] >> within & 1).bool() | (masks == NONE)[..., None, None]
        seen = seen & bits.transpose(-3, -2)
    seen = seen.expand(*blocks.shape[:2], len(rows), n, BLOCK).flatten(-2)
    return keys.clamp(0, max(S - 1, 0)).flatten(-2), seen


def gathered(x: Tensor, keys: Tensor, heads: int) -> Tensor:
    """The rows of x (batch, kv_heads, S, d) at keys (1 or batch, 1 or heads, n): (batch, heads, n, d), wide."""
    x = x.to(accumulation_dtype(x)).repeat_interleave(heads // x.shape[1], dim=1)
    return x.gather(2, keys[..., None].expand(*x.shape[:2], keys.shape[2], x.shape[3]))


def tiles_of(q: Tensor, k: Tensor) -> range:
    """The tiles of queries that may see anything."""
    return range(blocks_in(q.shape[2], TILE) if k.shape[2] else 0)


def listed_forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, lists: Lists, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Step 0: out and the log-sum-exp of every row's scores and its sink."""
    out, lse = empty_outputs(q, v)
    out.zero_()
    lse.copy_(-torch.inf if sinks is None else sinks[:, None].expand_as(lse))
    for tile in tiles_of(q, k):
        rows = slice(tile * TILE, (tile + 1) * TILE)
        keys, seen = tile_of(lists, tile, q, k.shape[2], causal)
        if keys.shape[2] == 0:
            continue
        scores = q[:, :, rows].to(lse.dtype) @ gathered(k, keys, q.shape[1]).mT * scale
        scores = scores.masked_fill(~seen, -torch.inf)
        total = torch.logaddexp(scores.logsumexp(-1), lse[:, :, rows])  # lse holds the sink alone until now
        P = torch.exp(scores - total.masked_fill(total == -torch.inf, 0.0)[..., None])
        out[:, :, rows] = (P @ gathered(v, keys, q.shape[1])).to(q.dtype)
        lse[:, :, rows] = total
    return out, lse


def listed_backward(
    dout: Tensor,
    delta: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    lists: Lists,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Step 0: the gradients of q, k and v, from the lists of every tile of queries.

    Args:
        delta: (batch, heads, T), rowsum(dout out) less the gradient of lse.
    """
    dtype, heads = lse.dtype, q.shape[1]
    dq = torch.zeros(q.shape, dtype=dtype, device=q.device)
    dk, dv = (torch.zeros(x.shape[0], heads, *x.shape[2:], dtype=dtype, device=x.device) for x in (k, v))
    for tile in tiles_of(q, k):
        rows = slice(tile * TILE, (tile + 1) * TILE)
        keys, seen = tile_of(lists, tile, q, k.shape[2], causal)
        q_tile, dout_tile = q[:, :, rows].to(dtype), dout[:, :, rows].to(dtype)
        k_tile, v_tile = gathered(k, keys, heads), gathered(v, keys, heads)
        scores = (q_tile @ k_tile.mT * scale).masked_fill(~seen, -torch.inf)
        anchor = lse[:, :, rows].masked_fill(lse[:, :, rows] == -torch.inf, torch.inf)[
            ..., None
        ]  # such a row has P = 0
        P = torch.exp(scores - anchor)
        dS = P * (dout_tile @ v_tile.mT - delta[:, :, rows, None]) * scale
        dq[:, :, rows] = dS @ k_tile
        for total, part in ((dk, dS.mT @ q_tile), (dv, P.mT @ dout_tile)):
            total.scatter_add_(2, keys[..., None].expand_as(part), part)
    dk, dv = (x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


# --- the operator --------------------------------------------------------------------------------------------------


def lists_of(q: Tensor, k: Tensor, chosen: Tensor | None, handle: int, causal: bool, *, transposed: bool) -> Lists:
    """The lists of a call: those of the pattern with this handle, or what was chosen."""
    T, S = q.shape[2], k.shape[2]
    if chosen is None:
        pattern = pattern_of(handle)
        return pattern_lists(pattern & Band(None, 0) if causal else pattern, T, S, q.device, transposed)
    return transpose_chosen(chosen, T, S) if transposed else chosen_lists(chosen)


@torch.library.custom_op("tformer_lab::sparse_attention", mutates_args=())
@in_named_dtypes
def sparse_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    chosen: Tensor | None,
    handle: int,
    causal: bool,
    scale: float,
    step: str,
) -> tuple[Tensor, Tensor]:
    """The operator behind the public functions: out and lse. ``handle`` names a pattern where nothing is chosen."""
    check_operator(q, k, v, sinks, chosen)
    lists = lists_of(q, k, chosen, handle, causal, transposed=False)
    compare = causal and chosen is not None  # a pattern's masks know already
    name = LADDER.choose(step, q.device, lambda name: refusal(name, q, v))
    if name == "0" or q.numel() == 0 or k.numel() == 0:
        return listed_forward(q, k, v, sinks, lists, scale, compare)
    return launch_forward(name, q, k, v, sinks, lists, scale, compare)


@sparse_attention_op.register_fake
def sparse_attention_fake(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """The shapes and dtypes of what the operator returns."""
    return empty_outputs(q, v)


@torch.library.custom_op("tformer_lab::sparse_attention_backward", mutates_args=())
@in_named_dtypes
def sparse_attention_backward_op(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    chosen: Tensor | None,
    handle: int,
    causal: bool,
    scale: float,
    step: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    check_operator(q, k, v, None, chosen)
    check_gradients(dout, dlse, q, v, out, lse)
    lse = lse.contiguous()
    compare = causal and chosen is not None
    name = choose_gradients(step, q, v)
    if name == "0" or q.numel() == 0 or k.numel() == 0:
        lists = lists_of(q, k, chosen, handle, causal, transposed=False)
        delta = row_products(dout, out, dlse)
        return listed_backward(dout, delta, q, k, v, lse, lists, scale, compare)
    columns = lists_of(q, k, chosen, handle, causal, transposed=True)
    if name == "cpu":
        rows = lists_of(q, k, chosen, handle, causal, transposed=False)
        return launch_cpu_backward(dout, dlse, q, k, v, out, lse, rows, columns, scale, compare)
    return launch_backward(name, dout, dlse, q, k, v, out, lse, columns, scale, compare)


@sparse_attention_backward_op.register_fake
def sparse_attention_backward_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    """The shapes and dtypes of the gradients."""
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def row_products(dout: Tensor, out: Tensor, dlse: Tensor | None) -> Tensor:
    """delta = rowsum(dout out) - dlse, (batch, heads, T)."""
    dtype = accumulation_dtype(out)
    delta = (dout.to(dtype) * out.to(dtype)).sum(-1)
    return delta if dlse is None else delta - dlse


def save_for_backward(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    """Keep the inputs, out and lse; nothing of size T x S."""
    q, k, v, sinks, chosen, *options = inputs
    ctx.save_for_backward(q, k, v, sinks, chosen, *output)
    ctx.options = options
    ctx.set_materialize_grads(False)


def backward(ctx, dout: Tensor | None, dlse: Tensor | None) -> tuple:
    """The gradients of the operator's inputs. A sink's is that of a score whose value is zero: -P delta."""
    q, k, v, sinks, chosen, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv = torch.ops.tformer_lab.sparse_attention_backward(dout, dlse, q, k, v, out, lse, chosen, *ctx.options)
    dsinks = None
    if sinks is not None and ctx.needs_input_grad[3]:
        P = torch.exp(sinks[:, None].to(lse.dtype) - lse)  # (batch, heads, T)
        dsinks = -(P * row_products(dout, out, dlse)).sum((0, 2)).to(sinks.dtype)
    return dq, dk, dv, dsinks, *(None for _ in range(1 + len(ctx.options)))


sparse_attention_op.register_autograd(backward, setup_context=save_for_backward)
