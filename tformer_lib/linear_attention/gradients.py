"""The gradients of what the kernels compute: three more sums for a sum; chunks in PyTorch where gates or the delta rule
have gradients."""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from tformer_lib.ladder import AUTO
from tformer_lib.linear_attention.backward import refusal_of_backward, run_backward
from tformer_lib.linear_attention.kernels import choose_step, launch, refusal, refusal_of_chain, run_chain
from tformer_lib.linear_attention.pointwise import in_two_parts, map_features, map_gradient, split_quotient
from tformer_lib.linear_attention.shared import CHUNK, sum_dtype


class Sums:
    """The gradients of a (decaying) sum are three more of them, two from the last token to the first.

    With W_ij = exp(G_i - G_j) below the diagonal and o_i = Σ_j W_ij (q_i·k_j) v_j:

        dq_i = Σ_j W_ij (do_i·v_j) k_j        dk_j = Σ_i W_ij (v_j·do_i) q_i        dv_j = Σ_i W_ij (k_j·q_i) do_i

    so each is the same sum with other tensors for q, k and v. A normalised output o = n / d has dn = do / d and
    dd = -(do·o) / d. The denominator is one more value that is 1 everywhere, so dq gains Σ_j W_ij dd_i k_j, and dk the
    same from the other side: two more sums, whose features are dd and 1. A denominator grows with the text, and float16
    has few bits for do / d then: there a power of two of each token goes from q to dn where a sum takes both, and what
    a sum gives to dq is divided by it.

    Args:
        step: the forward's.
        cu_seqlens, length: of the forward.
    """

    def __init__(self, step: str, cu_seqlens: Tensor | None, length: int):
        self.step, self.cu_seqlens, self.length = step, cu_seqlens, length

    def run(self, q: Tensor, k: Tensor, v: Tensor, **options) -> tuple[Tensor, Tensor]:
        """(out, last state) of one sum, by the step of the forward if these widths suit it."""
        step = self.step if refusal(self.step, q, v, None) is None else choose_step(AUTO, q, v, None, self.length)
        return launch(step, q, k, v, cu_seqlens=self.cu_seqlens, length=self.length, **options)[:2]

    def gradients(
        self,
        dout: Tensor,
        dfinal: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        initial: Tensor | None,
        out: Tensor,
        denominators: Tensor,
        normalised: bool,
        scale: float,
        map_code: int,
        map_scale: float,
    ) -> tuple[Tensor | None, ...]:
        """dq, dk, dv, nothing for log_decay and beta, dinitial."""
        group, raw = q.shape[1] // k.shape[1], (q, k)
        if scale == 0:  # the outputs are 0 whatever the inputs are: what is left comes from the last state
            dout, scale = torch.zeros_like(dout), 1.0
        if map_code:
            q, k = (map_features(x, map_code, map_scale) for x in raw)
        k, v, gates, first, dlast = (to_heads(x, group) for x in (k, v, log_decay, initial, dfinal))
        # A kernel multiplies all that it reads from a state by scale, and the heads of a group share one last state.
        dlast = None if dlast is None else dlast / (scale * group)
        options = {"log_decay": gates, "scale": scale}
        values_of = (lambda state: None if state is None else state[:, :, :-1]) if normalised else lambda state: state
        moved, dnum, dden = None, dout, None
        if normalised and raw[0].dtype == torch.float16:
            moved = lift_rows(dout, denominators)
            part = denominators / moved
            dnum, (dden, shrink), q = divided(dout, part), split_shrunk(dout, out, part), divided(q, moved)
        elif normalised:
            dnum, dden = split_quotient(dout, out, denominators)
        dv, dstate = self.run(k, q, dnum, **options, reverse=True, initial=values_of(dlast))
        dq, _ = self.run(dnum, v, k, **options, initial=as_features(values_of(first)))
        dk, _ = self.run(v, dnum, q, **options, reverse=True, initial=as_features(values_of(dlast)))
        dq, more = divided(dq, moved), [None, None]
        if normalised:
            ones = torch.ones_like(dden[:1, :1, :1]).expand_as(dden)
            more[0], _ = self.run(dden, ones, k, **options, initial=sum_as_features(first, both=True))
            dsum = sum_as_features(dlast if moved is None or dlast is None else dlast * shrink, both=False)
            more[1], row = self.run(ones, dden, q, **options, reverse=True, initial=dsum)
            row = row[..., :2].sum(-1).unsqueeze(2)
            dstate = torch.cat([dstate, row if moved is None else row / shrink], 2)
            if moved is not None:
                more = [divided(more[0], moved) / shrink, more[1] / shrink]
        if log_decay is not None:
            dstate = dstate * self.first_decay(gates)
        raws = (raw[0], to_heads(raw[1], group))
        dq, dk = (
            with_more(x, dx, extra, map_code, map_scale) for x, dx, extra in zip(raws, (dq, dk), more, strict=True)
        )
        dinitial = None if initial is None else from_heads(dstate * scale, group)
        return dq, from_heads(dk, group), from_heads(dv, group), None, None, dinitial

    def first_decay(self, gates: Tensor) -> Tensor:
        """exp of every sequence's first log decay, (sequences, heads, 1, 1): it stands before the first state."""
        if gates.shape[2] == 0:  # no token: the last state is the first one
            sequences = gates.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1
            return gates.new_ones(sequences, gates.shape[1], 1, 1)
        if self.cu_seqlens is None:
            return gates[:, :, :1].exp()
        first, lengths = self.cu_seqlens[:-1].long(), self.cu_seqlens.diff()
        found = gates[0, :, first.clamp(max=gates.shape[2] - 1), 0].T  # (sequences, heads)
        return torch.where(lengths[:, None] > 0, found.exp(), 1.0)[..., None, None]


def to_heads(x: Tensor | None, group: int) -> Tensor | None:
    """(batch, kv_heads, ...) -> (batch, heads, ...): each kv head serves ``group`` query heads."""
    return x if x is None or group == 1 else x.repeat_interleave(group, dim=1)


def from_heads(x: Tensor, group: int) -> Tensor:
    """The gradient of ``to_heads``."""
    return x if group == 1 else x.unflatten(1, (-1, group)).sum(2, dtype=torch.promote_types(x.dtype, torch.float32))


def lift_rows(dout: Tensor, denominators: Tensor) -> Tensor:
    """Powers of two (batch, heads, T) that bring rows of dout / d into 0.001 to 256; 1 where they are."""
    most = divided(dout.abs().amax(-1, keepdim=True).to(denominators.dtype), denominators).squeeze(-1)
    power = torch.where(most > 0, most, 1.0).log2().ceil()
    moved = torch.where(most < 2.0**-10, -10 - power, torch.where(most > 256, 8 - power, 0.0)).clamp(-30, 30)
    return torch.where(most > 0, torch.exp2(moved), 1.0)


def divided(x: Tensor, by: Tensor | None) -> Tensor:
    """Rows of x (batch, heads, T, ...) by a number each (batch, heads, T), or 0 where it is not positive."""
    if by is None:
        return x
    inverse = torch.where(by > 0, 1.0 / torch.where(by > 0, by, 1.0), 0.0).unsqueeze(-1)
    return (x.to(inverse.dtype) * inverse).to(x.dtype)


def split_shrunk(dout: Tensor, out: Tensor, denominators: Tensor) -> tuple[Tensor, Tensor]:
    """-(dout . out) / denominators in two parts, and what it was multiplied by to fit float16."""
    column = -divided((dout.to(denominators.dtype) * out).sum(-1, keepdim=True), denominators)
    shrink = fitting(column).clamp(max=1)
    return in_two_parts(column * shrink, dout.dtype), shrink


def with_more(x: Tensor, dx: Tensor, more: Tensor | None, map_code: int, map_scale: float) -> Tensor:
    """The gradient of x from that of its features, dx, or dx + more."""
    if not map_code:
        return dx if more is None else (dx.to(sum_dtype(dx)) + more).to(dx.dtype)
    return map_gradient(x, dx, torch.zeros_like(dx) if more is None else more, map_code, map_scale)


def as_features(state: Tensor | None) -> Tensor | None:
    """A state whose value rows become features: (.., value_dim, head_dim) -> (.., head_dim, value_dim)."""
    return None if state is None else state.mT.contiguous()


def sum_as_features(state: Tensor | None, *, both: bool) -> Tensor | None:
    """The sum of the keys, a state's last row, as the first of 8 features: (.., rows, head_dim) -> (.., head_dim, 8).

    Args:
        both: as the second too, where the two parts of a number both meet it.
    """
    if state is None:
        return None
    column = state[:, :, -1:].mT
    return torch.cat([column, column if both else torch.zeros_like(column), column.new_zeros(*column.shape[:3], 6)], -1)


# --- by chunks -------------------------------------------------------------------------------------------------------


def chunk_gradients(
    dout: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    length: int,
    scale: float,
) -> tuple[Tensor | None, ...]:
    """dq, dk, dv, dlog_decay, dbeta, dinitial of a decaying sum or the (gated) delta rule.

    States are transposed, as in ``kernels.launch``; ``length`` is of the longest sequence. They are a
    kernel's where it can compute them, else PyTorch's.
    """
    group, dtype = q.shape[1] // k.shape[1], sum_dtype(q)
    if length and refusal_of_backward(q, v, beta) is None:
        dq, *rest = run_backward(dout, dfinal, q, k, v, log_decay, beta, initial, cu_seqlens, length, scale)
        return dq, *(None if x is None else from_heads(x, group) for x in rest)
    gates = k.new_zeros(*k.shape[:3], 1) if log_decay is None else log_decay
    by_token = [q.to(dtype) * scale, *(to_heads(x, group).to(dtype) for x in (k, v)), dout.to(dtype)]
    by_token += [to_heads(gates, group).double(), None if beta is None else to_heads(beta, group).to(dtype)]
    first, dlast = (None if x is None else to_heads(x, group).mT.to(dtype) for x in (initial, dfinal))
    dlast = None if dlast is None else dlast / group
    starts = [0, q.shape[2]] if cu_seqlens is None else cu_seqlens.tolist()
    pieces = []
    for i, (start, stop) in enumerate(pairwise(starts)):
        row = slice(None) if cu_seqlens is None else slice(i, i + 1)
        tokens = [None if x is None else x[:, :, start:stop] for x in by_token]
        pieces.append(Chunks(*tokens, q.dtype).gradients(*(None if x is None else x[row] for x in (first, dlast))))
    *by_token, dstates = zip(*pieces, strict=True)
    dq, dk, dv, dgates, dbeta = (None if x[0] is None else torch.cat(x, 2) for x in by_token)
    return (
        dq * scale,
        from_heads(dk, group),
        from_heads(dv, group),
        None if log_decay is None else from_heads(dgates, group),
        None if beta is None else from_heads(dbeta, group),
        None if initial is None else from_heads(torch.cat(dstates).mT, group),
    )


class Chunks:
    """One sequence of each head in chunks, all of which are worked on at once, but for the two chains of states.

    With G the running sum of a chunk's gates, D_ij = exp(G_i - G_j) for j <= i, B = D k_i.k_j below the diagonal,
    A = beta B and T = (I + A)^-1, a chunk that starts in the state S is

        U = T beta (V - exp(G) K S) = U_0 - W S    O = exp(G) Q S + P U, P = D q_i.k_j    S' = exp(G_C) S + K_end^T U

    where K_end is K decayed to the chunk's end. In a decaying sum U is V. Backwards, with dR the gradient of what T is
    multiplied by,

        dR = T^T (P^T dO + K_end dS') = dR_0 + Y dS'        dS = exp(G_C) dS' + (exp(G) Q)^T dO - (beta exp(G) K)^T dR

    Args:
        q, k, v, dout: (batch, heads, T, ...).
        gates: (batch, heads, T, 1) in float64.
        beta: (batch, heads, T, 1), or None for the decaying sum.
        narrow: the dtype of the operator's inputs, in which a kernel may multiply.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, gates: Tensor, beta: Tensor | None, narrow: torch.dtype
    ):
        self.T, self.narrow = q.shape[2], narrow
        self.by_kernel = refusal_of_chain(q.shape[3], v.shape[3], narrow, q.device) is None
        self.q, self.k, self.v, self.dout, gates = (in_chunks(x) for x in (q, k, v, dout, gates))
        self.beta = None if beta is None else in_chunks(beta)
        G = gates.cumsum(3)
        kept, end, total = (x.exp().to(k.dtype) for x in (G, G[..., -1:, :] - G, G[..., -1:, :]))
        self.kept, self.end, self.total = kept, end, total  # (batch, heads, chunks, C, 1), the same, (.., 1, 1)
        below = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
        self.D = torch.where(below, G - G.mT, -torch.inf).exp().to(k.dtype)
        self.P = self.D * (self.q @ self.k.mT)
        self.k_end = end * self.k
        if beta is not None:
            self.B = (self.D * (self.k @ self.k.mT)).tril(-1)
            self.k_read = self.beta * kept * self.k
            self.U_0, self.W = self.solve(torch.cat([self.beta * self.v, self.k_read], -1), v.shape[3])
            self.dR_0, self.Y = self.solve(torch.cat([self.P.mT @ self.dout, self.k_end], -1), v.shape[3], back=True)

    def solve(self, right: Tensor, width: int, *, back: bool = False) -> tuple[Tensor, Tensor]:
        """T times a right side, or T^T times it, cut after ``width`` columns."""
        A = self.beta * self.B
        solved = torch.linalg.solve_triangular(A.mT if back else A, right, upper=back, unitriangular=True)
        return solved[..., :width], solved[..., width:]

    def states(self, first: Tensor | None) -> Tensor:
        """The state before each chunk: (batch, heads, chunks, head_dim, value_dim)."""
        plain = self.beta is None
        right, values = (None, self.v) if plain else (self.W, self.U_0)
        return self.chain(right, self.k_end, values, None, None, first)[0]

    def state_gradients(self, dlast: Tensor | None) -> tuple[Tensor, Tensor]:
        """The gradient of the state after each chunk, and of the first state."""
        read = self.kept * self.q
        if self.beta is None:
            return self.chain(None, read, self.dout, None, None, dlast, reverse=True)
        return self.chain(self.Y, self.k_read, -self.dR_0, read, self.dout, dlast, reverse=True)

    def chain(
        self,
        right: Tensor | None,
        left: Tensor,
        values: Tensor,
        left2: Tensor | None,
        values2: Tensor | None,
        first: Tensor | None,
        *,
        reverse: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The states before the chunks of S' = exp(G_C) S + L^T (U - R S) + L2^T U2, and the last one."""
        if self.by_kernel:
            shrink = fitting(values, values2) if self.narrow == torch.float16 else 1.0
            values, values2, first = (None if x is None else x * shrink for x in (values, values2, first))
            narrow = [None if x is None else x.to(self.narrow) for x in (right, left, values, left2, values2)]
            return tuple(x / shrink for x in run_chain(*narrow, self.total, first, reverse=reverse))
        added = left.mT @ values if left2 is None else left.mT @ values + left2.mT @ values2
        state = torch.zeros_like(added[:, :, 0]) if first is None else first
        found, order = [], range(added.shape[2])
        for i in reversed(order) if reverse else order:
            found.append(state)
            erased = 0.0 if right is None else left[:, :, i].mT @ (right[:, :, i] @ state)
            state = self.total[:, :, i] * state + added[:, :, i] - erased
        return torch.stack(found[::-1] if reverse else found, 2), state

    def gradients(self, first: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        """dq, dk, dv, dgates, dbeta, and the gradient of the first state (batch, heads, head_dim, value_dim)."""
        if self.T == 0:
            dfirst = torch.zeros_like(self.q[:, :, 0].mT @ self.v[:, :, 0]) if dlast is None else dlast
            nothing = (self.q, self.k, self.v, self.kept.double(), self.beta)
            return *(None if x is None else x.flatten(2, 3)[:, :, :0] for x in nothing), dfirst
        S = self.states(first)
        dS, dfirst = self.state_gradients(dlast)
        U = self.v if self.beta is None else self.U_0 - self.W @ S
        dP = (self.dout @ U.mT).tril()
        dk_end = U @ dS.mT  # (batch, heads, chunks, C, head_dim)
        DdP = self.D * dP
        dq = self.kept * (self.dout @ S.mT) + DdP @ self.k
        dk = DdP.mT @ self.q + self.end * dk_end
        pairs = dP * self.P  # what exp(G_i - G_j) contributes
        to_end = (self.k_end * dk_end).sum(-1, keepdim=True)
        dG = (self.kept * self.dout * (self.q @ S)).sum(-1, keepdim=True) - to_end
        if self.beta is None:
            dv, dbeta = self.P.mT @ self.dout + self.k_end @ dS, None
        else:
            dR, read = self.dR_0 + self.Y @ dS, self.k @ S
            dA = -(dR @ U.mT).tril(-1)
            dB, dread = self.beta * dA, -self.beta * self.kept * dR
            DdB = self.D * dB
            dk = dk + dread @ S.mT + DdB @ self.k + DdB.mT @ self.k
            dv = self.beta * dR
            dbeta = ((self.v - self.kept * read) * dR).sum(-1, keepdim=True) + (dA * self.B).sum(-1, keepdim=True)
            pairs = pairs + dB * self.B
            dG = dG + (dread * read).sum(-1, keepdim=True)
        dG = dG + pairs.sum(-1, keepdim=True) - pairs.mT.sum(-1, keepdim=True)
        at_end = to_end.sum(3, keepdim=True) + (self.total * S * dS).sum((3, 4), keepdim=True)
        dgates = dG.double().flip(3).cumsum(3).flip(3) + at_end
        found = (dq, dk, dv, dgates, dbeta)
        return *(None if x is None else x.flatten(2, 3)[:, :, : self.T] for x in found), dfirst


def fitting(*tensors: Tensor | None) -> Tensor:
    """The power of two that brings the largest of all numbers to 256, which float16 can hold; 1 if all are zeros."""
    most = torch.stack([x.abs().amax() for x in tensors if x is not None and x.numel()] or [torch.zeros(())]).amax()
    return torch.where(most > 0, torch.exp2((8 - most.clamp(min=1e-30).log2().ceil()).clamp(-100, 100)), 1.0)


def in_chunks(x: Tensor) -> Tensor:
    """(batch, heads, T, width) -> (batch, heads, chunks, CHUNK, width), at least one chunk, padded with zeros."""
    T = x.shape[2]
    return F.pad(x, (0, 0, 0, -T % CHUNK if T else CHUNK)).unflatten(2, (-1, CHUNK))
