"""Linear attention: replace exp(q·k) by φ(q)·φ(k), and the sum over keys can be taken before any query arrives.

Softmax attention gives key s the weight exp(q·k_s). If the weight is instead an inner product of features,

    o_t = Σ_s φ(q_t)·φ(k_s) v_s / Σ_s φ(q_t)·φ(k_s) = φ(q_t)·[Σ_s φ(k_s) v_sᵀ] / φ(q_t)·[Σ_s φ(k_s)],

the brackets are one (features x value_dim) matrix and one vector, whatever the number of keys: O(N·D·d) time for N
tokens and D features, O(D·d) memory for decoding. The denominator is the same sum with every value set to one, so this
file appends a column of ones to v and keeps a single matrix, ``sums`` (batch, kv_heads, features, value_dim + 1).

The causal case has three forms that give the same numbers: ``parallel`` (N² work, the oracle), ``recurrent`` (an RNN)
and ``chunked`` (parallel inside a chunk, recurrent between chunks). ``gated_*`` are the same three with a decaying
state and no denominator: RetNet, GLA and, with scalar gates, the state-space duality of Mamba-2.

Features and sums are kept in float32 (float64 for float64 inputs) whatever the dtype of q: a running sum in bfloat16
stops growing at 256 times its addend.

Sources: Katharopoulos et al. 2020, "Transformers are RNNs"; Choromanski et al. 2021, "Rethinking Attention with
Performers" (FAVOR+); Sun et al. 2023, "Retentive Network"; Yang et al. 2024, "Gated Linear Attention Transformers";
Dao and Gu 2024, "Transformers are SSMs".
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from tformer_lib.contract import check_inputs, readable

FeatureMap = Callable[[Tensor], Tensor]
CHUNK = 64  # near head_dim, where the work inside a chunk (C·d) and between chunks (d·d) balance
FORGET = -100.0  # exp of it is 0 in float32; -inf would make the difference of two running sums NaN
GATED_CHUNK = 16  # a gate per feature needs (C, C, features) numbers inside a chunk


# Feature maps: (..., d) -> (..., features), never negative in their inner products.


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1, (..., d) -> (..., d): positive everywhere (Katharopoulos et al. 2020, eq. 7).

    Below zero it is exp(x), and is computed so: the sum ``elu(x) + 1`` rounds to 0 in float32 from x = -17 on.
    """
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def relu(x: Tensor) -> Tensor:
    """max(x, 0), (..., d) -> (..., d): cheap and sparse, but a query may find no key at all (its output is zero)."""
    return x.clamp(min=0)


def taylor(x: Tensor) -> Tensor:
    """exp to second order, (..., d) -> (..., 1 + d + d²): φ(q)·φ(k) = 1 + q·k + (q·k)²/2, which is at least 1/2."""
    square = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2) / 2**0.5  # (..., d²)
    return torch.cat([torch.ones_like(x[..., :1]), x, square], dim=-1)


class RandomFeatures:
    """Positive random features of FAVOR+: the mean of φ(q)·φ(k) over the draw of the projection is exp(q·k), exactly.

    φ(x) = exp(w_i·x - |x|²/2) / √features for rows w_i ~ N(0, I) (Choromanski et al. 2021, lemma 1). Orthogonal rows
    keep each row's distribution and lower the variance. The exponent of a key is not shifted by a maximum over keys,
    as some implementations do: that maximum would depend on future keys. It is at most |w_i|²/2 as it stands.

    Args:
        head_dim: width of x.
        features: number of random features; the error falls as 1/√features.
        seed: the projection is a function of (head_dim, features, seed, orthogonal) alone.
        orthogonal: draw the rows orthogonal in blocks of head_dim.
    """

    def __init__(self, head_dim: int, features: int, *, seed: int = 0, orthogonal: bool = True):
        if head_dim < 1 or features < 1:
            raise ValueError(f"head_dim and features must be at least 1, got {head_dim} and {features}")
        self.projection = draw_projection(head_dim, features, seed, orthogonal)  # (features, head_dim)

    def __call__(self, x: Tensor) -> Tensor:
        """Features of keys: (..., head_dim) -> (..., features)."""
        return self.exponent(x).exp() / self.projection.shape[0] ** 0.5

    def of_queries(self, x: Tensor) -> Tensor:
        """Features of queries, each row scaled so that its largest is 1: the scale cancels in the normalised output."""
        exponent = self.exponent(x)
        return (exponent - exponent.detach().amax(-1, keepdim=True)).exp()

    def exponent(self, x: Tensor) -> Tensor:
        """w_i·x - |x|²/2 for every row w_i: (..., head_dim) -> (..., features)."""
        if x.shape[-1] != self.projection.shape[1]:
            raise ValueError(f"these features were drawn for head_dim {self.projection.shape[1]}, got {x.shape[-1]}")
        projection = self.projection.to(x)
        return x @ projection.T - x.square().sum(-1, keepdim=True) / 2


def draw_projection(head_dim: int, features: int, seed: int, orthogonal: bool) -> Tensor:
    """Gaussian rows (features, head_dim) in float64, orthogonal within each block of head_dim rows if asked."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(features, head_dim, generator=generator, dtype=torch.float64)
    if not orthogonal:
        return rows
    blocks = -(-features // head_dim)
    square = torch.randn(blocks, head_dim, head_dim, generator=generator, dtype=torch.float64)
    Q, R = torch.linalg.qr(square)
    # LAPACK's signs favour one half-space, which biases the features; making R's diagonal positive takes that out.
    Q = Q * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    directions = Q.mT.flatten(0, 1)[:features]  # (features, head_dim), unit rows
    return directions * rows.norm(dim=1, keepdim=True)  # lengths of independent Gaussian rows


# The public forms.


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    feature_map: FeatureMap = elu_plus_one,
    chunk: int = CHUNK,
) -> Tensor:
    """Linear attention under the contract, in O(T + S) time and memory: chunked if causal, else by associativity.

    Args:
        q: (batch, heads, T, head_dim).
        k: (batch, kv_heads, S, head_dim).
        v: (batch, kv_heads, S, value_dim).
        mask: key padding alone: boolean, broadcastable to (batch, 1, 1, S), True where a key may be seen.
        causal: aligned to the bottom right.
        scale: q·k is multiplied by it (its root goes to each side before the feature map); None is head_dim ** -0.5,
            as in softmax attention. Katharopoulos et al. use 1.
        feature_map: (..., head_dim) -> (..., features), with no negative inner product.
        chunk: tokens per chunk in the causal case.

    Returns:
        (batch, heads, T, value_dim) in q's dtype; zeros for a query whose weights are all zero.

    Raises:
        ValueError: if the inputs break the contract, or the mask depends on the query or the head.
    """
    form = chunked if causal else associative
    extra = {"chunk": chunk} if causal else {}
    return form(q, k, v, mask=mask, scale=scale, feature_map=feature_map, **extra)


def parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    feature_map: FeatureMap = elu_plus_one,
) -> Tensor:
    """The form with all T x S weights written out: O(T·S) work, any mask. The oracle of the other forms."""
    check_inputs(q, k, v, mask)
    phi_q, phi_k, v_one = features(q, k, v, scale, feature_map)
    weights = scores(phi_q, phi_k)  # (batch, kv_heads, group, T, S)
    if causal:
        weights = weights.masked_fill(~causal_mask(q.shape[2], k.shape[2], q.device), 0.0)
    if mask is not None:
        weights = weights.masked_fill(~by_group(mask, k.shape[1]), 0.0)
    out = (weights.flatten(2, 3) @ v_one).unflatten(2, weights.shape[2:4])  # (batch, kv_heads, group, T, value_dim + 1)
    return normalise(out, q.dtype)


def associative(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    feature_map: FeatureMap = elu_plus_one,
) -> Tensor:
    """Every query sees every key: φ(Q)·(φ(K)ᵀ·V) instead of (φ(Q)·φ(K)ᵀ)·V. Arguments as in ``attend``."""
    phi_q, phi_k, v_one = checked_features(q, k, v, mask, scale, feature_map)
    sums = phi_k.mT @ v_one  # (batch, kv_heads, features, value_dim + 1)
    return normalise(read(phi_q, sums), q.dtype)


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    feature_map: FeatureMap = elu_plus_one,
) -> Tensor:
    """Causal attention as an RNN: add the token's outer product to the sums, then read. Arguments as in ``attend``."""
    phi_q, phi_k, v_one = checked_features(q, k, v, mask, scale, feature_map)
    sums, phi_k, v_one = absorb_prefix(phi_k, v_one, q.shape[2])
    outputs = []
    for t in range(q.shape[2]):
        now = slice(t, t + 1)
        sums = sums + phi_k[:, :, now].mT @ v_one[:, :, now]
        outputs.append(read(phi_q[:, :, :, now], sums))
    return normalise(join(outputs, phi_q, v_one), q.dtype)


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    feature_map: FeatureMap = elu_plus_one,
    chunk: int = CHUNK,
) -> Tensor:
    """Causal attention chunk by chunk: large matrix products, one state between them. Arguments as in ``attend``."""
    phi_q, phi_k, v_one = checked_features(q, k, v, mask, scale, feature_map)
    sums, phi_k, v_one = absorb_prefix(phi_k, v_one, q.shape[2])
    out, _ = scan_chunks(phi_q, phi_k, v_one, sums, chunk)
    return normalise(out, q.dtype)


def scan_chunks(phi_q: Tensor, phi_k: Tensor, v_one: Tensor, sums: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Causal numerators and denominators of T queries over T keys after a state; the state is returned updated.

    Args:
        phi_q: (batch, kv_heads, group, T, features).
        phi_k: (batch, kv_heads, T, features).
        v_one: (batch, kv_heads, T, value_dim + 1).
        sums: (batch, kv_heads, features, value_dim + 1), the state before the first key.
        chunk: tokens per chunk.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    outputs = []
    for start in range(0, phi_k.shape[2], chunk):
        now = slice(start, start + chunk)
        q_c, k_c, v_c = phi_q[:, :, :, now], phi_k[:, :, now], v_one[:, :, now]
        within = scores(q_c, k_c).tril()  # (batch, kv_heads, group, C, C)
        inside = (within.flatten(2, 3) @ v_c).unflatten(2, within.shape[2:4])
        outputs.append(read(q_c, sums) + inside)
        sums = sums + k_c.mT @ v_c
    return join(outputs, phi_q, v_one), sums


# What the forms share.


def features(q: Tensor, k: Tensor, v: Tensor, scale: float | None, feature_map: FeatureMap) -> tuple[Tensor, ...]:
    """φ(q) (batch, kv_heads, group, T, features), φ(k) (batch, kv_heads, S, features), v with a column of ones."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if scale <= 0:
        raise ValueError(f"scale must be positive, since its root goes to each side of φ(q)·φ(k), got {scale}")
    dtype = sum_dtype(q)
    query_map = getattr(feature_map, "of_queries", feature_map)
    phi_q = query_map(q.to(dtype) * scale**0.5).unflatten(1, (k.shape[1], -1))
    phi_k = feature_map(k.to(dtype) * scale**0.5)
    return phi_q, phi_k, F.pad(v.to(dtype), (0, 1), value=1.0)


def checked_features(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, feature_map: FeatureMap
) -> tuple[Tensor, ...]:
    """``features`` behind the contract's door, with the features of masked keys and their values set to zero."""
    check_inputs(q, k, v, mask)
    phi_q, phi_k, v_one = features(q, k, v, scale, feature_map)
    if mask is None:
        return phi_q, phi_k, v_one
    keep = key_padding(mask)  # (batch or 1, 1, S or 1, 1)
    return phi_q, phi_k.masked_fill(~keep, 0.0), v_one.masked_fill(~keep, 0.0)


def key_padding(mask: Tensor) -> Tensor:
    """A mask that depends on the key alone, as (batch or 1, 1, S or 1, 1); anything else is refused."""
    full = mask[(None,) * (4 - mask.dim())]
    if full.shape[1] != 1 or full.shape[2] != 1:
        raise ValueError(
            "linear attention sums over the keys before it meets a query, so its mask can only hide keys: "
            f"expected a mask that broadcasts to (batch, 1, 1, S), got {tuple(mask.shape)} (parallel() takes any mask)"
        )
    return full.mT


def sum_dtype(x: Tensor) -> torch.dtype:
    """The dtype of features and running sums: float32, or float64 for float64 inputs."""
    return torch.promote_types(x.dtype, torch.float32)


def scores(phi_q: Tensor, phi_k: Tensor) -> Tensor:
    """φ(q)·φ(k): (batch, kv_heads, group, T, D) and (batch, kv_heads, S, D) -> (batch, kv_heads, group, T, S)."""
    return (phi_q.flatten(2, 3) @ phi_k.mT).unflatten(2, phi_q.shape[2:4])


def read(phi_q: Tensor, sums: Tensor) -> Tensor:
    """Ask a state: (batch, kv_heads, group, T, D) and (batch, kv_heads, D, e) -> (batch, kv_heads, group, T, e)."""
    return (phi_q.flatten(2, 3) @ sums).unflatten(2, phi_q.shape[2:4])


def absorb_prefix(phi_k: Tensor, v_one: Tensor, T: int) -> tuple[Tensor, Tensor, Tensor]:
    """Align S keys with T queries at the bottom right: (state of the keys before the first query, last T keys, values).

    Where there are fewer keys than queries, the first queries get keys with zero features, which weigh nothing.
    """
    prefix = phi_k.shape[2] - T
    if prefix < 0:
        phi_k, v_one = (F.pad(x, (0, 0, -prefix, 0)) for x in (phi_k, v_one))
        prefix = 0
    sums = phi_k[:, :, :prefix].mT @ v_one[:, :, :prefix]  # (batch, kv_heads, features, value_dim + 1)
    return sums, phi_k[:, :, prefix:], v_one[:, :, prefix:]


def join(outputs: list[Tensor], phi_q: Tensor, v_one: Tensor) -> Tensor:
    """Concatenate outputs along T; with no token at all, an empty tensor of the right shape."""
    return torch.cat(outputs, dim=3) if outputs else phi_q.new_zeros(*phi_q.shape[:4], v_one.shape[-1])


def normalise(out: Tensor, dtype: torch.dtype) -> Tensor:
    """Numerator over denominator: (batch, kv_heads, group, T, e + 1) -> (batch, heads, T, e); zero where that is zero.

    No epsilon is added: it would pull every output with a small denominator towards zero.
    """
    numerator, denominator = out[..., :-1], out[..., -1:]
    seen = denominator > 0
    # The inner where keeps 1/0 out of the backward pass, where it would turn into NaN.
    out = torch.where(seen, numerator / torch.where(seen, denominator, 1.0), 0.0)
    return out.flatten(1, 2).to(dtype)


def causal_mask(T: int, S: int, device: torch.device) -> Tensor:
    """(T, S), True where a query may look, the last query seeing the last key."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def by_group(mask: Tensor, kv_heads: int) -> Tensor:
    """A mask of up to 4 dimensions as (batch or 1, kv_heads or 1, group or 1, T or 1, S or 1)."""
    full = mask[(None,) * (4 - mask.dim())]
    return full.unsqueeze(1) if full.shape[1] == 1 else full.unflatten(1, (kv_heads, -1))


# Decoding: the state instead of a KV cache.


class LinearState:
    """One layer's memory: the sums over all tokens so far. Its size does not depend on how many there were.

    Args:
        feature_map, scale, chunk: as in ``attend``.

    Attributes:
        sums: None before the first token, then (batch, kv_heads, features, value_dim + 1) in float32 or float64.
    """

    def __init__(self, *, feature_map: FeatureMap = elu_plus_one, scale: float | None = None, chunk: int = CHUNK):
        self.feature_map, self.scale, self.chunk = feature_map, scale, chunk
        self.sums: Tensor | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, attend: Callable | None = None, mask: Tensor | None = None):
        """Add T new tokens and return their causal outputs (batch, heads, T, value_dim): prefill and decode alike.

        Args:
            q, k, v: as in the module's ``attend``, with T = S: only the new tokens.
            attend: ignored; a KV cache takes one here, and this state holds nothing another form could read.
            mask: key padding of the new tokens, broadcastable to (batch, 1, 1, T).
        """
        if q.dim() == 4 and k.dim() == 4 and q.shape[2] != k.shape[2]:
            raise ValueError(
                f"a state takes new tokens only, expected as many queries as keys, got {q.shape[2]} and {k.shape[2]}"
            )
        phi_q, phi_k, v_one = checked_features(q, k, v, mask, self.scale, self.feature_map)
        if self.sums is None:
            self.sums = phi_k.new_zeros(*phi_k.shape[:2], phi_k.shape[3], v_one.shape[3])
        self.check_fits(phi_k, v_one)
        out, self.sums = scan_chunks(phi_q, phi_k, v_one, self.sums, self.chunk)
        return normalise(out, q.dtype)

    def check_fits(self, phi_k: Tensor, v_one: Tensor) -> None:
        """Refuse tokens of another batch, head count, width or device than those already summed."""
        came = (*phi_k.shape[:2], phi_k.shape[3], v_one.shape[3])
        if came != tuple(self.sums.shape):
            raise ValueError(
                f"the state holds (batch, kv_heads, features, value_dim + 1) = {tuple(self.sums.shape)}, got {came}"
            )
        if phi_k.device != self.sums.device:
            raise ValueError(f"the state is on {self.sums.device}, the new tokens are on {phi_k.device}")


class LinearCache:
    """The states of a model's layers behind the interface of a KV cache (``positions``, ``layer``, ``advance``)."""

    def __init__(self, layers: int, batch: int, *, device: torch.device | str = "cpu", **state_options):
        self.states = [LinearState(**state_options) for _ in range(layers)]
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)

    def positions(self, T: int) -> Tensor:
        """Positions of the next T tokens: (batch, T)."""
        return self.lengths[:, None] + torch.arange(T, device=self.lengths.device)

    def layer(self, index: int) -> LinearState:
        """The state of one layer."""
        return self.states[index]

    def advance(self, T: int) -> None:
        """Count T tokens as stored in every layer."""
        self.lengths = self.lengths + T


# Decay: the bridge to state-space models.


def retention_log_decay(heads: int) -> Tensor:
    """RetNet's decays, log(1 - 2^(-5 - h)) for head h, as (1, heads, 1, 1) in float64 (Sun et al. 2023, eq. 8)."""
    if heads < 1:
        raise ValueError(f"heads must be at least 1, got {heads}")
    return torch.log1p(-torch.exp2(-5.0 - torch.arange(heads, dtype=torch.float64))).view(1, heads, 1, 1)


def gated_attend(
    q: Tensor, k: Tensor, v: Tensor, *, log_decay: Tensor, scale: float | None = None, chunk: int = GATED_CHUNK
) -> Tensor:
    """Causal linear attention whose state forgets: S_t = exp(g_t)·S_{t-1} + k_t v_tᵀ, o_t = scale·q_t S_t.

    With g constant per head it is RetNet's retention, with a gate per token and feature GLA's, with a gate per token
    and head the duality of Mamba-2: there q, k, v are called C, B, x. There is no feature map and no denominator; a
    norm follows in those models. Computed chunk by chunk.

    Args:
        q: (batch, heads, T, head_dim).
        k: (batch, kv_heads, T, head_dim).
        v: (batch, kv_heads, T, value_dim).
        log_decay: g, at most 0, broadcastable to (batch, kv_heads, T, head_dim). Last dimension 1 is cheaper.
            Below ``FORGET`` it counts as ``FORGET``, which empties the state; so -inf starts a new document.
        scale: None is head_dim ** -0.5.
        chunk: tokens per chunk.

    Returns:
        (batch, heads, T, value_dim) in q's dtype.

    Raises:
        ValueError: if the inputs break the contract, T is not S, or a decay is over 0 or of another shape.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    q_g, k, values, gates = gated_inputs(q, k, v, log_decay, scale)
    state = k.new_zeros(*k.shape[:2], k.shape[3], v.shape[3])
    outputs = []
    for start in range(0, k.shape[2], chunk):
        now = slice(start, start + chunk)
        q_c, k_c, v_c = q_g[:, :, :, now], k[:, :, now], values[:, :, now]
        since = gates[:, :, now].cumsum(2)  # (batch, kv_heads, C, 1 or head_dim): log decay from the chunk's start
        within = decayed_scores(q_c, k_c, since)
        inside = (within.flatten(2, 3) @ v_c).unflatten(2, within.shape[2:4])
        outputs.append(read(q_c * decay(since, q_c).unsqueeze(2), state) + inside)
        total = since[:, :, -1:]  # (batch, kv_heads, 1, 1 or head_dim)
        state = decay(total, k_c).mT * state + (k_c * decay(total - since, k_c)).mT @ v_c
    return join(outputs, q_g, values).flatten(1, 2).to(q.dtype)


def gated_recurrent(q: Tensor, k: Tensor, v: Tensor, *, log_decay: Tensor, scale: float | None = None) -> Tensor:
    """``gated_attend`` as the recurrence that defines it, one token at a time; arguments and errors are the same."""
    q_g, k, values, gates = gated_inputs(q, k, v, log_decay, scale)
    state = k.new_zeros(*k.shape[:2], k.shape[3], v.shape[3])
    outputs = []
    for t in range(k.shape[2]):
        now = slice(t, t + 1)
        state = decay(gates[:, :, now], k).mT * state + k[:, :, now].mT @ values[:, :, now]
        outputs.append(read(q_g[:, :, :, now], state))
    return join(outputs, q_g, values).flatten(1, 2).to(q.dtype)


def gated_parallel(q: Tensor, k: Tensor, v: Tensor, *, log_decay: Tensor, scale: float | None = None) -> Tensor:
    """``gated_attend`` with all T x T weights written out: attention under a mask of decays instead of a softmax.

    Arguments and errors are the same.
    """
    q_g, k, values, gates = gated_inputs(q, k, v, log_decay, scale)
    weights = decayed_scores(q_g, k, gates.cumsum(2))  # (batch, kv_heads, group, T, T)
    out = (weights.flatten(2, 3) @ values).unflatten(2, weights.shape[2:4])
    return out.flatten(1, 2).to(q.dtype)


def gated_inputs(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float | None) -> tuple[Tensor, ...]:
    """q·scale (batch, kv_heads, group, T, head_dim), k, v and gates (batch, kv_heads, T, 1 or head_dim), checked.

    The gates are float64: their running sums grow large where the differences that matter are small.
    """
    check_inputs(q, k, v)
    batch, kv_heads, S, head_dim = k.shape
    if q.shape[2] != S:
        raise ValueError(f"gated linear attention needs as many queries as keys, got {q.shape[2]} and {S}")
    if not isinstance(log_decay, Tensor):
        raise ValueError(f"log_decay must be a tensor of 4 dimensions, got {type(log_decay).__name__}")
    fits = log_decay.dim() == 4 and all(
        g in (1, n) for g, n in zip(log_decay.shape, (batch, kv_heads, S, head_dim), strict=True)
    )
    if not fits:
        expected = f"(batch, kv_heads, T, head_dim) = {(batch, kv_heads, S, head_dim)}"
        raise ValueError(f"log_decay must have 4 dimensions that broadcast to {expected}, got {tuple(log_decay.shape)}")
    if readable(log_decay) and bool((log_decay > 0).any()):
        raise ValueError(
            f"log_decay must be at most 0, so that the state does not grow, got {log_decay.max().item():.3g}"
        )
    dtype = sum_dtype(q)
    scale = head_dim**-0.5 if scale is None else scale
    gates = log_decay.to(k.device, torch.float64).clamp(min=FORGET).expand(batch, kv_heads, S, -1)
    return (q.to(dtype) * scale).unflatten(1, (kv_heads, -1)), k.to(dtype), v.to(dtype), gates


def decayed_scores(q: Tensor, k: Tensor, since: Tensor) -> Tensor:
    """Σ_d q_t[d] k_s[d] exp(since_t[d] - since_s[d]) for s <= t, else 0: (batch, kv_heads, group, T, T).

    The difference is taken before the exponential, which is then at most 1. exp(since_t)·exp(-since_s) would need no
    (T, T, head_dim) tensor, but its second factor overflows float32 once a feature has decayed by e^-88.

    Args:
        q: (batch, kv_heads, group, T, head_dim).
        k: (batch, kv_heads, T, head_dim).
        since: (batch, kv_heads, T, 1 or head_dim), the running sum of log decays.
    """
    visible = causal_mask(k.shape[2], k.shape[2], k.device)[..., None]  # (T, T, 1)
    gap = since.unsqueeze(3) - since.unsqueeze(2)  # (batch, kv_heads, T, T, 1 or head_dim)
    kept = decay(torch.where(visible, gap, -torch.inf), k)
    if since.shape[-1] == 1:
        return scores(q, k) * kept.squeeze(-1).unsqueeze(2)
    return torch.einsum("bhgtd,bhsd,bhtsd->bhgts", q, k, kept)


def decay(log_decay: Tensor, like: Tensor) -> Tensor:
    """exp(log_decay), the share that is kept, in the dtype of another tensor."""
    return log_decay.exp().to(like.dtype)
