"""The gradients of what the kernels compute: three more sums for a sum, chunk after chunk for the delta rule."""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from tformer_lib.linear_attention.delta import scan_delta
from tformer_lib.linear_attention.feature_maps import FeatureMap, relu
from tformer_lib.linear_attention.kernels import MAP_OF_CODE, launch
from tformer_lib.linear_attention.shared import CHUNK, chunks, first_state, sum_dtype


class Sums:
    """The gradients of a (decaying) sum are three more of them, two from the last token to the first.

    With W_ij = exp(G_i - G_j) below the diagonal and o_i = Σ_j W_ij (q_i·k_j) v_j:

        dq_i = Σ_j W_ij (do_i·v_j) k_j        dk_j = Σ_i W_ij (v_j·do_i) q_i        dv_j = Σ_i W_ij (k_j·q_i) do_i

    so each is the same sum with other tensors for q, k and v. A normalised output o = n / d has dn = do / d and
    dd = -(do·o) / d. The denominator is one more value that is 1 everywhere, so where values take the place of
    features, v gets a column of ones, and do a column of dd (in two parts, since one bfloat16 is not enough).

    Args:
        step: the kernel that computes them.
        cu_seqlens, length: of the forward.
    """

    def __init__(self, step: str, cu_seqlens: Tensor | None, length: int):
        self.step, self.cu_seqlens, self.length = step, cu_seqlens, length

    def run(self, q: Tensor, k: Tensor, v: Tensor, **options) -> tuple[Tensor, Tensor]:
        """(out, last state) of one sum."""
        return launch(self.step, q, k, v, cu_seqlens=self.cu_seqlens, length=self.length, **options)[:2]

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
        final: Tensor,
        denominators: Tensor,
        normalised: bool,
        scale: float,
        map_code: int,
        map_scale: float,
    ) -> tuple[Tensor | None, ...]:
        """dq, dk, dv, dlog_decay, nothing for beta, dinitial."""
        group, value_dim = q.shape[1] // k.shape[1], v.shape[3]
        feature_map = MAP_OF_CODE[map_code]
        raw = (q, k)
        if feature_map is not None:
            q, k = (feature_map(x.to(sum_dtype(x)) * map_scale).to(x.dtype) for x in raw)
        k, v, gates, first, dlast = (to_heads(x, group) for x in (k, v, log_decay, initial, dfinal))
        # A kernel multiplies all that it reads from a state by scale, and the heads of a group share one last state.
        dlast = None if dlast is None else dlast / (scale * group)
        dnum, values = dout, v
        if normalised:
            dnum, dden = split_quotient(dout, out, denominators)
            values, dnum_wide = with_ones(v), with_column(dnum, dden)
        else:
            dnum_wide = dnum
        dv, dstate = self.run(
            k,
            q,
            dnum,
            log_decay=gates,
            scale=scale,
            reverse=True,
            initial=None if dlast is None else dlast[:, :, :value_dim],
        )
        dq, _ = self.run(
            dnum_wide, values, k, log_decay=gates, scale=scale, initial=as_features(first, normalised, True)
        )
        dk, dwide = self.run(
            values,
            dnum_wide,
            q,
            log_decay=gates,
            scale=scale,
            reverse=True,
            initial=as_features(dlast, normalised, False),
        )
        if normalised:
            row = (dwide[..., value_dim] + dwide[..., value_dim + 1]).unsqueeze(2)  # (.., 1, head_dim)
            dstate = torch.cat([dstate, row], 2)
        dgates = None
        if log_decay is not None:
            dgates = self.decay_gradient(q, k, dq, dk, final, dfinal, group)
            dstate = dstate * self.first_decay(gates)
        if feature_map is not None:
            dq, dk = (
                map_gradient(x, dx, feature_map, map_scale) for x, dx in ((raw[0], dq), (to_heads(raw[1], group), dk))
            )
        dinitial = None if initial is None else from_heads(dstate * scale, group)
        return dq, from_heads(dk, group), from_heads(dv, group), dgates, None, dinitial

    def decay_gradient(
        self, q: Tensor, k: Tensor, dq: Tensor, dk: Tensor, final: Tensor, dfinal: Tensor | None, group: int
    ) -> Tensor:
        """dlog_decay (batch, kv_heads, T, 1).

        exp(g_t) stands in W_ij where j < t <= i. q_i·dq_i sums what the pairs (i, j) contribute over j, and k_j·dk_j
        over i, so the sum over i >= t of q_i·dq_i - k_i·dk_i leaves just those pairs. The last state is one more query.
        """
        dot = lambda x, y: (x.to(sum_dtype(x)) * y).sum(-1)  # noqa: E731
        gap = from_heads((dot(q, dq) - dot(k, dk)).unsqueeze(-1), group)  # (batch, kv_heads, T, 1)
        after = gap.double().flip(2).cumsum(2).flip(2)
        if self.cu_seqlens is not None:
            after = F.pad(after, (0, 0, 0, 1))
            after = after[:, :, :-1] - after[:, :, self.cu_seqlens[1:].long()][:, :, self.sequence_of_token(q)]
        if dfinal is None:
            return after
        last = (dfinal.double() * final).sum((2, 3))[:, :, None, None]  # (sequences, kv_heads, 1, 1)
        if self.cu_seqlens is not None:
            last = last[self.sequence_of_token(q), :, 0].transpose(0, 1).unsqueeze(0)  # (1, kv_heads, T, 1)
        return after + last

    def sequence_of_token(self, q: Tensor) -> Tensor:
        """(T,): which packed sequence each token belongs to."""
        tokens = torch.arange(q.shape[2], device=q.device, dtype=torch.int32)
        return torch.searchsorted(self.cu_seqlens[1:].contiguous(), tokens, right=True)

    def first_decay(self, gates: Tensor) -> Tensor:
        """exp of every sequence's first log decay, (sequences, heads, 1, 1): it stands before the first state."""
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


def split_quotient(dout: Tensor, out: Tensor, denominators: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of numerator (dout's shape and dtype) and denominator (batch, heads, T, 1) of out = n / d."""
    seen = denominators > 0
    inverse = torch.where(seen, 1.0 / torch.where(seen, denominators, 1.0), 0.0).unsqueeze(-1)
    dout_wide = dout.to(inverse.dtype)
    dden = -(dout_wide * out).sum(-1, keepdim=True) * inverse
    return (dout_wide * inverse).to(dout.dtype), dden


def with_ones(v: Tensor) -> Tensor:
    """v with eight more columns: two of ones, then zeros."""
    extra = v.new_zeros(*v.shape[:3], 8)
    extra[..., :2] = 1.0
    return torch.cat([v, extra], -1)


def with_column(x: Tensor, column: Tensor) -> Tensor:
    """x with eight more columns: a float32 column in two parts, then zeros."""
    high = column.to(x.dtype)
    extra = x.new_zeros(*x.shape[:3], 8)
    extra[..., :1], extra[..., 1:2] = high, (column - high.to(column.dtype)).to(x.dtype)
    return torch.cat([x, extra], -1)


def as_features(state: Tensor | None, normalised: bool, both: bool) -> Tensor | None:
    """A state whose value rows become features: (.., value_dim (+ 1), head_dim) -> (.., head_dim, value_dim (+ 8)).

    Args:
        both: whether each of the two parts of a column meets the row of sums, or the first alone.
    """
    if state is None:
        return None
    if not normalised:
        return state.mT.contiguous()
    rows, extra = state.mT[..., :-1], state.mT[..., -1:]
    second = extra if both else torch.zeros_like(extra)
    return torch.cat([rows, extra, second, extra.new_zeros(*extra.shape[:3], 6)], -1)


def map_gradient(x: Tensor, dphi: Tensor, feature_map: FeatureMap, map_scale: float) -> Tensor:
    """The gradient of x, where phi = feature_map(x map_scale)."""
    x = x.to(sum_dtype(x)) * map_scale
    slope = (x > 0).to(x.dtype) if feature_map is relu else torch.where(x > 0, 1.0, x.clamp(max=0).exp())
    return (dphi * slope * map_scale).to(dphi.dtype)


# --- the delta rule --------------------------------------------------------------------------------------------------


def delta_gradients(
    dout: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor | None, ...]:
    """dq, dk, dv, dlog_decay, dbeta, dinitial of the (gated) delta rule, in PyTorch, chunk after chunk from the last.

    States are transposed, as in ``kernels.launch``.
    """
    group, dtype = q.shape[1] // k.shape[1], sum_dtype(q)
    gates = k.new_zeros(*k.shape[:3], 1) if log_decay is None else log_decay
    by_token = [
        q.to(dtype) * scale,
        *(to_heads(x, group).to(dtype) for x in (k, v, beta)),
        to_heads(gates, group).double(),
    ]
    first, dlast = (None if x is None else to_heads(x, group).mT.to(dtype) for x in (initial, dfinal))
    dlast = None if dlast is None else dlast / group
    starts = [0, q.shape[2]] if cu_seqlens is None else cu_seqlens.tolist()
    pieces = []
    for i, (start, stop) in enumerate(pairwise(starts)):
        row = slice(None) if cu_seqlens is None else slice(i, i + 1)
        tokens = [x[:, :, start:stop] for x in (*by_token, dout.to(dtype))]
        pieces.append(delta_chain(*tokens, *(None if x is None else x[row] for x in (first, dlast))))
    *by_token, dstates = zip(*pieces, strict=True)
    dq, dk, dv, dbeta, dgates = (torch.cat(x, 2) for x in by_token)
    dinitial = None if initial is None else from_heads(torch.cat(dstates).mT, group)
    dgates = None if log_decay is None else from_heads(dgates, group)
    return dq * scale, *(from_heads(x, group) for x in (dk, dv)), dgates, from_heads(dbeta, group), dinitial


def delta_chain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    gates: Tensor,
    dout: Tensor,
    first: Tensor | None,
    dlast: Tensor | None,
) -> tuple[Tensor, ...]:
    """The gradients of ``scan_delta`` (q, k, v, beta, gates, first state), one kv head a head.

    Args:
        q, k, v, beta, dout: (batch, heads, T, ...).
        gates: (batch, heads, T, 1) in float64.
        first, dlast: the state before and the gradient of the state after (batch, heads, head_dim, value_dim), or None.
    """
    cuts = list(chunks(k.shape[2], CHUNK))
    state = first_state(first, k, v.shape[3])
    states = []
    for now in cuts:
        states.append(state)
        _, state = scan_delta(
            q[:, :, now], k[:, :, now], v[:, :, now], beta[:, :, now], gates[:, :, now], state, chunk=CHUNK
        )
    dstate = torch.zeros_like(state) if dlast is None else dlast
    grads = []
    for now, state in zip(reversed(cuts), reversed(states), strict=True):
        *found, dstate = delta_chunk(*(x[:, :, now] for x in (q, k, v, beta, gates, dout)), state, dstate)
        grads.append(found)
    if not grads:
        return *(torch.zeros_like(x) for x in (q, k, v, beta, gates)), dstate
    return *(torch.cat(x[::-1], 2) for x in zip(*grads, strict=True)), dstate


def delta_chunk(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gates: Tensor, dout: Tensor, S: Tensor, dS: Tensor
) -> tuple[Tensor, ...]:
    """One chunk's gradients of (q, k, v, beta, gates, state before), given dout and that of the state after, dS.

    With D_ij = exp(G_i - G_j) for j <= i, B = D k_i.k_j below the diagonal, A = beta B, T = (I + A)^-1, the forward is

        U = T R, R = beta (V - exp(G) K S)      O = exp(G) Q S + P U, P = D q_i.k_j      S' = exp(G_C) S + K_end^T U

    where K_end is K decayed to the chunk's end.
    """
    G = gates.cumsum(2)
    kept, end, total = (x.exp().to(k.dtype) for x in (G, G[:, :, -1:] - G, G[:, :, -1:]))  # (batch, heads, C, 1), .., 1
    C = k.shape[2]
    below = torch.ones(C, C, dtype=torch.bool, device=k.device).tril()
    D = torch.where(below, G - G.mT, -torch.inf).exp().to(k.dtype)
    B, P = (D * (k @ k.mT)).tril(-1), D * (q @ k.mT)
    read = k @ S  # (batch, heads, C, value_dim)
    wanted = v - kept * read
    U = torch.linalg.solve_triangular(beta * B, beta * wanted, upper=False, unitriangular=True)

    dU = P.mT @ dout + (end * k) @ dS
    dR = torch.linalg.solve_triangular((beta * B).mT, dU, upper=True, unitriangular=True)
    dA = -(dR @ U.mT).tril(-1)
    dP = (dout @ U.mT).tril()
    dB, dread = beta * dA, -beta * kept * dR
    dk_end = U @ dS.mT  # (batch, heads, C, head_dim)
    DdP, DdB = D * dP, D * dB
    dq = kept * (dout @ S.mT) + DdP @ k
    dk = DdP.mT @ q + end * dk_end + dread @ S.mT + DdB @ k + DdB.mT @ k
    dbeta = (wanted * dR).sum(-1, keepdim=True) + (dA * B).sum(-1, keepdim=True)

    pairs = dP * P + dB * B  # what exp(G_i - G_j) contributes
    to_end = (end * k * dk_end).sum(-1, keepdim=True)
    dG = (kept * dout * (q @ S)).sum(-1, keepdim=True) + (dread * read).sum(-1, keepdim=True) - to_end
    dG = dG + pairs.sum(-1, keepdim=True) - pairs.mT.sum(-1, keepdim=True)
    dG_last = to_end.sum(2, keepdim=True) + (total * S * dS).sum((2, 3), keepdim=True)
    dG = torch.cat([dG[:, :, :-1], dG[:, :, -1:] + dG_last], 2)
    dgates = dG.double().flip(2).cumsum(2).flip(2)
    dS = total * dS + (kept * q).mT @ dout + k.mT @ dread
    return dq, dk, beta * dR, dbeta, dgates, dS
