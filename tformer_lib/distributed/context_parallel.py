"""Context parallel: a text too long for one device is cut along its tokens, and attention goes round in a ring.

Each process holds the queries, keys and values of its own tokens. In N turns the blocks of keys and values pass from
process to process, and each process attends to the block that it holds at the moment: a part of its rows' softmax. Two
parts are joined exactly by their log-sum-exps, as flash attention joins two tiles (Liu et al. 2023, "Ring Attention",
arXiv:2310.01889). While a block is used, the next one is on its way.

Causal attention gives the later tokens more work. :func:`zigzag` therefore cuts the text into 2 N chunks and gives
process r the chunks r and 2 N - 1 - r (Brandon et al. 2023, "Striped Attention", arXiv:2311.09431, has the same aim;
the layout is that of Llama 3, arXiv:2407.21783, section 3.3.2).
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from tformer_lib.contract import check_inputs, counted, score_scale
from tformer_lib.flash_attention import flash_attention, merge_states
from tformer_lib.ladder import AUTO, accumulation_dtype

Span = tuple[int, int]
"""Neighbouring tokens of the whole text: the first, and the one after the last."""


def contiguous(length: int, size: int) -> list[list[Span]]:
    """Cut a text into one chunk a process; where it does not divide evenly, some get one token more.

    Args:
        length: tokens of the whole text.
        size: processes.

    Returns:
        For each process its chunks.
    """
    return [[span] for span in chunks(length, size)]


def zigzag(length: int, size: int) -> list[list[Span]]:
    """Cut a text into two chunks a process, an early and a late one, so that causal attention costs each the same."""
    parts = chunks(length, 2 * size)
    return [[parts[rank], parts[2 * size - 1 - rank]] for rank in range(size)]


def chunks(length: int, count: int) -> list[Span]:
    """``count`` neighbouring spans of a text, whose lengths differ by one at most."""
    if length < 0:
        raise ValueError(f"a text cannot have {length} tokens")
    ends = [length * i // count for i in range(count + 1)]
    return list(pairwise(ends))


def own_part(x: Tensor, spans: Sequence[Span], dim: int) -> Tensor:
    """The tokens of some spans, side by side along ``dim``."""
    return torch.cat([x.narrow(dim, start, stop - start) for start, stop in spans], dim)


def positions_of(spans: Sequence[Span], device: torch.device | str = "cpu") -> Tensor:
    """(tokens,) int64: where the tokens of some spans stand in the whole text."""
    return torch.cat([torch.arange(start, stop, device=device) for start, stop in spans])


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: list[list[Span]],
    group: dist.ProcessGroup | None = None,
    causal: bool = False,
    scale: float | None = None,
    step: int | str | None = None,
    mask: None = None,
) -> Tensor:
    """Attention of this process's queries over all processes' keys and values, with gradients.

    Args:
        q: (batch, heads, tokens, head_dim): the queries of this process's spans, in their order.
        k, v: (batch, kv_heads, tokens, head_dim), of the same tokens.
        layout: for each process of the group, which spans of the text it holds: :func:`zigzag` or :func:`contiguous`.
        group: the processes of the ring; all of them if not given.
        causal: a query sees no token after its own.
        scale: of the scores, head_dim ** -0.5 if not given.
        step: of flash attention's ladder.
        mask: must be None: it is here because the attention contract has it.

    Returns:
        (batch, heads, tokens, head_dim) in q's dtype.

    Raises:
        ValueError: if the inputs break the contract, or the layout does not fit the group or the inputs.
    """
    check_inputs(q, k, v)
    ring = Ring(group, layout, causal, float(score_scale(scale, q.shape[-1])), AUTO if step is None else str(step))
    ring.check(q, mask)
    return RingAttention.apply(q, k, v, ring)


class Ring:
    """Who is in the ring, which tokens each holds, and what attention is asked for."""

    def __init__(self, group, layout: list[list[Span]], causal: bool, scale: float, step: str):
        self.group = dist.group.WORLD if group is None else group
        self.rank, self.size = self.group.rank(), self.group.size()
        self.layout, self.causal, self.scale, self.step = layout, causal, scale, step

    def check(self, q: Tensor, mask) -> None:
        """Refuse what does not fit; each process sees its own part alone."""
        if mask is not None:
            raise ValueError("ring attention takes no mask, only causal")
        if len(self.layout) != self.size:
            raise ValueError(
                f"the layout is for {counted(len(self.layout), 'process', 'processes')}, the ring has {self.size}"
            )
        if q.shape[2] != self.tokens(self.rank):
            raise ValueError(f"process {self.rank} holds {self.tokens(self.rank)} tokens, q came with {q.shape[2]}")

    def tokens(self, rank: int) -> int:
        """How many tokens a process holds."""
        return sum(stop - start for start, stop in self.layout[rank])

    def holder(self, turn: int) -> int:
        """Whose keys and values this process has in a turn: its own first, then those of the ones before it."""
        return (self.rank - turn) % self.size

    def pass_on(self, parts: list[Tensor], turn: int) -> tuple[list[Tensor], list]:
        """Begin to send what this process has in a turn to the next one, and to receive what comes from the one before.

        Returns:
            Where the next turn's tensors will be, and the requests to wait for.
        """
        tokens = self.tokens(self.holder(turn + 1))
        coming = [x.new_empty((*x.shape[:2], tokens, x.shape[3])) for x in parts]
        after, before = ((self.rank + way) % self.size for way in (1, -1))
        after, before = (dist.get_global_rank(self.group, rank) for rank in (after, before))
        sends = [dist.P2POp(dist.isend, x, after, self.group) for x in parts]
        receives = [dist.P2POp(dist.irecv, x, before, self.group) for x in coming]
        return coming, dist.batch_isend_irecv([op for pair in zip(sends, receives, strict=True) for op in pair])

    def meetings(self, turn: int):
        """The pairs of spans that meet in a turn: (rows of q, columns of k, whether the pair is on the diagonal)."""
        row = 0
        for a in self.layout[self.rank]:
            column = 0
            for b in self.layout[self.holder(turn)]:
                size_a, size_b = a[1] - a[0], b[1] - b[0]
                if size_a and size_b and not (self.causal and b[0] > a[0]):  # spans never overlap partly
                    yield slice(row, row + size_a), slice(column, column + size_b), self.causal and a == b
                column += size_b
            row += a[1] - a[0]


class RingAttention(torch.autograd.Function):
    """The ring, forward and backward. Nothing of size T x S is kept; keys and values come round again for gradients."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, ring: Ring) -> Tensor:
        """Each turn attends to the block that is here, and joins it with what was seen before."""
        dtype = accumulation_dtype(q)
        out = torch.zeros(q.shape, dtype=dtype, device=q.device)
        lse = torch.full(q.shape[:3], -torch.inf, dtype=dtype, device=q.device)
        held, coming, requests = [k.contiguous(), v.contiguous()], None, []
        for turn in range(ring.size):
            if turn + 1 < ring.size:
                coming, requests = ring.pass_on(held, turn)
            for rows, columns, diagonal in ring.meetings(turn):
                some_k, some_v = (x[:, :, columns] for x in held)
                part, part_lse = attend_with_lse(q[:, :, rows], some_k, some_v, ring, diagonal)
                seen = (out[:, :, rows], part.to(dtype)), (lse[:, :, rows], part_lse)
                out[:, :, rows], lse[:, :, rows] = merge_states(*seen)
            for request in requests:
                request.wait()
            held, requests = coming, []
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.ring = ring
        return out

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple:
        """The gradients of keys and values travel with them, and each process adds its part as they pass."""
        q, k, v, out, lse = ctx.saved_tensors
        ring, dtype = ctx.ring, accumulation_dtype(q)
        dq = torch.zeros(q.shape, dtype=dtype, device=q.device)
        held, coming, requests = [k.contiguous(), v.contiguous()], None, []
        gradients = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in held]
        for turn in range(ring.size):
            if turn + 1 < ring.size:
                coming, requests = ring.pass_on(held, turn)
            for rows, columns, diagonal in ring.meetings(turn):
                some = q[:, :, rows], *(x[:, :, columns] for x in held)
                kept = dout[:, :, rows].contiguous(), out[:, :, rows], lse[:, :, rows].contiguous()
                for total, part in zip(
                    (dq[:, :, rows], *(x[:, :, columns] for x in gradients)),
                    attend_backward(*some, *kept, ring, diagonal),
                    strict=True,
                ):
                    total += part
            for request in requests:
                request.wait()
            gradients = carried(ring, gradients, turn)
            held, requests = coming, []
        return dq.to(q.dtype), gradients[0].to(k.dtype), gradients[1].to(v.dtype), None


def carried(ring: Ring, gradients: list[Tensor], turn: int) -> list[Tensor]:
    """The gradients after they have moved one process on, as their keys and values do; after N turns they are home."""
    if ring.size == 1:
        return gradients
    coming, requests = ring.pass_on(gradients, turn)
    for request in requests:
        request.wait()
    return coming


def attend_with_lse(q: Tensor, k: Tensor, v: Tensor, ring: Ring, diagonal: bool) -> tuple[Tensor, Tensor]:
    """Flash attention of some queries over some keys, and the log-sum-exp of each row."""
    step = None if ring.step == AUTO else ring.step
    return flash_attention(q, k, v, causal=diagonal, scale=ring.scale, step=step, return_lse=True)


def attend_backward(q, k, v, dout, out, lse, ring: Ring, diagonal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The part of dq, dk and dv that some queries and some keys make together.

    ``out`` and ``lse`` are those over all keys, so exp(score - lse) are the whole softmax's probabilities, and the
    parts add up.
    """
    lengths = q.shape[2], k.shape[2]
    *gradients, _ = torch.ops.tformer_lab.flash_attention_backward(
        dout, None, q, k, v, out, lse, None, None, None, *lengths, diagonal, 0, ring.scale, ring.step, False
    )
    return tuple(gradients)


def ring_attend(layout: list[list[Span]], group: dist.ProcessGroup | None = None) -> Callable[..., Tensor]:
    """Ring attention as a model takes it: ``Decoder(config, attend=ring_attend(layout))``.

    The model is given this process's tokens, and their places: ``model(tokens, positions=positions_of(layout[rank]))``.
    """
    return partial(ring_attention, layout=layout, group=group)
