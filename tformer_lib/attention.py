"""Attention: a query gathers values, weighted by how well their keys match it (Vaswani et al., arXiv:1706.03762).

``attend`` is the reference that every faster form is compared with: the mathematics, under the contract of
``tformer_lib.contract``. ``attend_sdpa`` is the same function by PyTorch's fused kernels. ``MultiHeadAttention`` is the
layer: it makes queries, keys and values from tokens, and takes any such function. ``AttentionVariant`` adds to one what
today's models add: a window, learned sinks, a soft cap, ALiBi.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from tformer_lib import masks
from tformer_lib.contract import check_bias, check_heads, check_inputs, check_positive, in_named_dtypes, score_scale
from tformer_lib.ladder import accumulation_dtype
from tformer_lib.positional_encoding import alibi_slopes
from tformer_lib.rope import turn_both

Attend = Callable[..., Tensor]


@in_named_dtypes
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q k^T + bias) v, over the keys that each query may look at.

    Everything is computed in float32, or float64 for float64 inputs, and the result is rounded once.

    Args:
        q: (batch, heads, T, head_dim).
        k: (batch, kv_heads, S, head_dim); query heads in consecutive groups of heads / kv_heads share a kv head.
        v: (batch, kv_heads, S, value_dim).
        mask: boolean, broadcastable to (batch, heads, T, S), True where a query may look.
        causal: hide the future; the last query sees the last key.
        scale: the finite number that the scores are multiplied by; 1 / sqrt(head_dim) if not given.
        bias: added to the scaled scores, broadcastable to (batch, heads, T, S) (ALiBi, T5).

    Returns:
        (batch, heads, T, value_dim) in the dtype of q; zeros where a query may look at nothing.

    Raises:
        ValueError: the inputs break the contract, or the scale is not finite.
    """
    check_inputs(q, k, v, mask)
    scores = scaled_scores(q, k, score_scale(scale, q.shape[-1]))  # (batch, heads, T, S)
    if bias is not None:
        check_bias(bias, q, k)
        scores = scores + bias.to(scores.dtype)
    weights = masked_softmax(scores, allowed_pairs(q, k, mask, causal))
    return gather(weights, v.to(weights.dtype)).to(q.dtype)


def scaled_scores(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """How well each query matches each key, in float32 or better.

    q and k are widened before the product: rounded to float16 it would keep 11 bits, and overflow at 65,504.
    The heads of a group become more rows of one matrix, so that k is never copied for them.

    Returns:
        (batch, heads, T, S).
    """
    batch, heads, T, head_dim = q.shape
    kv_heads, S = k.shape[1], k.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    q, k = q.to(accumulation_dtype(q)), k.to(accumulation_dtype(k))
    rows = (q * scale).reshape(batch, kv_heads, heads // kv_heads * T, head_dim)  # the group's queries, stacked
    scores = rows @ k.transpose(-2, -1)  # (batch, kv_heads, group * T, S)
    return scores.view(batch, heads, T, S)


def masked_softmax(scores: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Softmax over the keys that may be seen; a row with none of them is all zeros, and so are its gradients.

    A softmax over a row of -inf is NaN, in the result and in the gradient. Such a row is given harmless scores before
    the softmax, and its weights are set to zero after it, so that no NaN is ever made.

    Args:
        scores: (..., T, S).
        allowed: boolean, broadcastable to scores, True where a query may look.
    """
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    blind = (scores == float("-inf")).all(-1, keepdim=True)  # (..., T, 1)
    return scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)


def gather(weights: Tensor, v: Tensor) -> Tensor:
    """Mix the values by the weights.

    Args:
        weights: (batch, heads, T, S).
        v: (batch, kv_heads, S, value_dim).

    Returns:
        (batch, heads, T, value_dim).
    """
    batch, heads, T, S = weights.shape
    kv_heads, value_dim = v.shape[1], v.shape[3]
    rows = weights.reshape(batch, kv_heads, heads // kv_heads * T, S)
    return (rows @ v).view(batch, heads, T, value_dim)


def allowed_pairs(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    """The mask and causality in one boolean tensor that broadcasts to (batch, heads, T, S); None if all is allowed."""
    future_hidden = masks.causal(q.shape[2], k.shape[2], device=q.device) if causal else None  # (T, S)
    return masks.combine(mask, future_hidden)


def attend_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``attend`` by ``torch.nn.functional.scaled_dot_product_attention``: its kernels, under this library's contract.

    PyTorch's own ``is_causal`` is aligned to the top left, so it serves only where T == S and nothing else is masked,
    which is where it is fast; everywhere else the mask is given as a tensor. Arguments and result are ``attend``'s.
    """
    check_inputs(q, k, v, mask)
    T, S, scale = q.shape[2], k.shape[2], score_scale(scale, q.shape[-1])
    if q.numel() == 0 or k.numel() == 0:
        return attend(q, k, v, mask=mask, causal=causal, scale=scale, bias=bias)
    if scale <= 0:  # torch's kernels scale what they have hidden: -inf times 0 is NaN, and times -1 the largest score
        q, scale = (-q, -scale) if scale < 0 else (q * 0.0, 1.0)
    if T == 1 and q.shape[1] != k.shape[1] and q.device.type == "cpu" and bias is None and for_all_heads(mask):
        # The heads of a group become the queries of one head: a CPU then reads its keys once, not once a head.
        rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])  # (batch, kv_heads, group, head_dim)
        return attend_sdpa(rows, k, v, mask=mask, scale=scale).reshape(*q.shape[:3], v.shape[3])
    q, k, v = (aligned(x) if x.is_cuda else x for x in (q, k, v))
    # Branches, not values: under torch.compile a comparison of sizes may be symbolic, which torch's function refuses.
    shared = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    fused = partial(F.scaled_dot_product_attention, q, k, v, scale=scale, **shared)
    hides_something = causal and T > 1  # a single query is the last one, which sees every key
    if mask is None and bias is None and not hides_something:
        return fused(is_causal=False)
    if mask is None and bias is None and T == S:
        return fused(is_causal=True)
    allowed = allowed_pairs(q, k, mask, hides_something)
    blind = None if allowed is None else ~allowed.any(-1, keepdim=True)  # (..., T, 1)
    seen = None if allowed is None else allowed | blind  # kernels differ in what they give a blind query
    out = fused(attn_mask=additive(bias, seen, q, k) if bias is not None else four_dimensional(seen))
    return out if blind is None else out.masked_fill(blind, 0.0)


def for_all_heads(mask: Tensor | None) -> bool:
    """Whether a mask that broadcasts to (batch, heads, T, S) hides the same from every head."""
    return mask is None or mask.dim() < 3 or mask.shape[-3] == 1


@torch.compiler.allow_in_graph  # the compiler's front cannot ask where a tensor begins, what comes behind it can
def aligned(x: Tensor) -> Tensor:
    """x, or a copy of it where its rows could begin at a multiple of 16 bytes and do not.

    PyTorch's CUDA kernels read 16 bytes at once and do not check: other places give NaN, or an error after which the
    process cannot use its GPU any more (https://github.com/pytorch/pytorch/issues/183484).
    """
    unit = max(1, 16 // x.element_size())
    strides = x.stride()[:-1] if x.shape[-1] % unit == 0 else ()
    if all(n % unit == 0 for n in (x.storage_offset(), *strides)):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def additive(bias: Tensor, allowed: Tensor | None, q: Tensor, k: Tensor) -> Tensor:
    """The bias with -inf where a query may not look, as SDPA takes it: four dimensions, in the dtype of q.

    Numbers that q's dtype cannot hold become its largest ones: infinity minus infinity in a softmax is NaN.
    """
    check_bias(bias, q, k)
    most = min(torch.finfo(q.dtype).max, torch.finfo(bias.dtype).max)
    bias = bias.clamp(-most, most).masked_fill(bias == -torch.inf, -torch.inf).to(q.dtype)
    return four_dimensional(bias if allowed is None else bias.masked_fill(~allowed, float("-inf")))


def four_dimensional(x: Tensor) -> Tensor:
    """Put dimensions of size 1 in front until there are four."""
    return x[(None,) * (4 - x.dim())]


@in_named_dtypes
def attend_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """``attend`` for models that change the scores or the weights, which no fused form of torch does.

    Args:
        q, k, v, mask, causal, scale, bias: as for :func:`attend`.
        softcap: scaled scores s become softcap * tanh(s / softcap), so that none is larger (Gemma 2, arXiv:2408.00118).
        sinks: (heads,) a logit for each head that joins the softmax and has no value: a head that finds nothing to look
            at gives its weight to it (gpt-oss, arXiv:2508.10925).
        dropout: the share of weights that are dropped; the others grow by 1 / (1 - dropout).

    Returns:
        (batch, heads, T, value_dim) in the dtype of q.
    """
    check_inputs(q, k, v, mask)
    scores = scaled_scores(q, k, score_scale(scale, q.shape[-1]))  # (batch, heads, T, S)
    if softcap is not None:
        check_positive("softcap", softcap)
        scores = soft_capped(scores, softcap)
    if bias is not None:
        check_bias(bias, q, k)
        scores = scores + bias.to(scores.dtype)
    allowed = allowed_pairs(q, k, mask, causal)
    weights = masked_softmax(scores, allowed) if sinks is None else softmax_with_sinks(scores, allowed, sinks)
    weights = F.dropout(weights, dropout)
    return gather(weights, v.to(weights.dtype)).to(q.dtype)


def soft_capped(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap): nearly x where x is small, and never beyond the cap."""
    return cap * (x / cap).tanh()


def softmax_with_sinks(scores: Tensor, allowed: Tensor | None, sinks: Tensor) -> Tensor:
    """The softmax over the keys and one sink, without the sink's own weight: rows sum to less than 1.

    Args:
        scores: (batch, heads, T, S).
        allowed: boolean, broadcastable to scores.
        sinks: (heads,).
    """
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    sink = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)  # (batch, heads, T, 1)
    return torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]


@dataclass(frozen=True, eq=False)
class AttentionVariant:
    """An attention form with what a model adds to it; it is called like any form.

    What the form can do itself is left to it; where it cannot, :func:`attend_scores` computes the variant.

    Attributes:
        form: any attention form under the contract that takes a scale.
        scale: what scores are multiplied by; 1 / sqrt(head_dim) if None.
        window: a query sees itself and the ``window - 1`` keys before it.
        softcap, sinks, bias, dropout: as in :func:`attend_scores`.
        alibi: whether the score of a key falls with its distance (:func:`tformer_lib.positional_encoding.alibi`).
    """

    form: Attend = attend
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None
    alibi: bool = False
    dropout: float = 0.0

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        places: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attention under the contract.

        Args:
            places: where the queries and the keys stand, (batch or 1, T) and (batch or 1, S) int64; if not given, the
                last query stands where the last key does.
        """
        options = {"mask": mask, "causal": causal, "scale": self.scale}
        aligned = places is None  # else the form would look for the window, and measure distances, in other places
        if self.window is not None and aligned and takes(self.form, "window"):
            options["window"] = self.window
        elif self.window is not None:
            options["mask"] = masks.combine(mask, self.near(q, k, places))
        if self.alibi and self.bias is None and aligned and takes(self.form, "alibi_slopes"):
            # torch.compile does not know whether a constant wants a gradient, and flash attention asks.
            options["alibi_slopes"] = slopes_on(q.shape[1], q.device).detach()
        elif self.alibi or self.bias is not None:
            options["bias"] = self.added(q, k, places)
        if self.softcap is not None:
            options["softcap"] = self.softcap
        if not self.dropout and all(takes(self.form, name) for name in options):
            if self.sinks is None:
                return self.form(q, k, v, **options)
            if takes(self.form, "return_lse"):
                return self.with_sinks(*self.form(q, k, v, return_lse=True, **options))
        return attend_scores(q, k, v, **self.for_scores(q, k, places, options))

    def for_scores(self, q: Tensor, k: Tensor, places: tuple[Tensor, Tensor] | None, options: dict) -> dict:
        """The same options as :func:`attend_scores` takes them: windows as masks, ALiBi as a bias."""
        options = {name: x for name, x in options.items() if name not in ("window", "alibi_slopes")}
        if self.window is not None:
            options["mask"] = masks.combine(options["mask"], self.near(q, k, places))
        if self.alibi:
            options["bias"] = self.added(q, k, places)
        return {**options, "sinks": self.sinks, "dropout": self.dropout}

    def distances(self, q: Tensor, k: Tensor, places: tuple[Tensor, Tensor] | None) -> Tensor:
        """(batch or 1, T, S) int64: how far behind its query each key stands, negative for one that follows."""
        if places is None:
            queries, keys = masks.positions(q.shape[2], k.shape[2], q.device)
            return (queries - keys)[None]
        queries, keys = places
        return queries[:, :, None] - keys[:, None, :]

    def near(self, q: Tensor, k: Tensor, places: tuple[Tensor, Tensor] | None) -> Tensor:
        """(batch or 1, 1, T, S) boolean: the keys of each query's window."""
        distances = self.distances(q, k, places)
        return ((distances >= 0) & (distances < self.window))[:, None]

    def added(self, q: Tensor, k: Tensor, places: tuple[Tensor, Tensor] | None) -> Tensor:
        """What is added to the scores, broadcastable to (batch, heads, T, S): the bias, ALiBi's penalty, or both."""
        if not self.alibi:
            return self.bias
        slopes = slopes_on(q.shape[1], q.device)[:, None, None]
        penalty = -slopes * self.distances(q, k, places).abs()[:, None]  # (batch or 1, heads, T, S)
        return penalty if self.bias is None else penalty + self.bias

    def with_sinks(self, out: Tensor, lse: Tensor) -> Tensor:
        """What a form found without the sinks, as if they had been there.

        The sink adds exp(sink) to a sum that was exp(lse), so every weight shrinks by 1 / (1 + exp(sink - lse)).

        Args:
            out: (batch, heads, T, value_dim), or (total, heads, value_dim).
            lse: out's shape without value_dim, the log-sum-exp of each query's scores.
        """
        sinks = self.sinks.to(lse.dtype)
        share = (lse - (sinks if lse.dim() == 2 else sinks[:, None])).sigmoid()
        return (out * share[..., None]).to(out.dtype)


@torch.compiler.assume_constant_result
def takes(form: Attend, option: str) -> bool:
    """Whether an attention form has that keyword."""
    if form not in OPTIONS:
        OPTIONS[form] = frozenset(inspect.signature(form).parameters)
    return option in OPTIONS[form]


OPTIONS: dict[Attend, frozenset[str]] = {}
"""The keywords of attention forms, which take long to find."""


@torch.compiler.assume_constant_result
def slopes_on(heads: int, device: torch.device) -> Tensor:
    """ALiBi's slopes, (heads,) float32, kept on the device: a CUDA graph must find them there."""
    if is_fake(torch.empty(0)):  # a shape alone, which must not be kept for later
        return alibi_slopes(heads).to(device)
    if (heads, device) not in SLOPES:
        with torch.inference_mode(False):
            SLOPES[heads, device] = alibi_slopes(heads).to(device)
    return SLOPES[heads, device]


SLOPES: dict[tuple[int, torch.device], Tensor] = {}
"""The slopes that :func:`slopes_on` has made."""


MANY_TOKENS = 4096
"""From so many tokens on, one matmul for q, k and v saves more than it costs to copy the weights together."""


def side_by_side(parts: Sequence[nn.Linear], x: Tensor) -> tuple[Tensor, ...]:
    """What each linear map makes of x, by one matmul with their matrices put together.

    One large matmul is faster than several small ones, and its gradient reads and writes x once. The matrices are put
    together anew each time, so that they stay parameters of their own.

    Args:
        parts: linear maps of the same input width, all with a bias or none.
        x: (..., width).

    Returns:
        (..., out_features) for each, as views of one tensor.
    """
    return joined_projection(parts, x).split([part.out_features for part in parts], dim=-1)


def joined_projection(parts: Sequence[nn.Linear], x: Tensor) -> Tensor:
    """The same as the one tensor, (..., sum of out_features)."""
    weight = torch.cat([part.weight for part in parts])  # (sum of out_features, width)
    bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
    return F.linear(x, weight, bias)


class MultiHeadAttention(nn.Module):
    """Several attentions side by side, each in its own learned subspace of the tokens (section 3.2.2 of the paper).

    Args:
        width: the width of a token's vector, in and out.
        heads: number of query heads.
        kv_heads: number of key and value heads, a divisor of heads; heads if not given.
        head_dim: width of a head; width / heads if not given.
        bias: whether the projections have one.
        attend: the attention form, any function under the contract.
        out_bias: whether the last projection has a bias; as the others if not given.
        variant: what is added to the form; None for nothing.
        sinks: whether each head has a learned sink.
        gate: whether each number that the heads found is multiplied by a sigmoid of the token (Qwen3-Next).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        attend: Attend = attend,
        out_bias: bool | None = None,
        variant: AttentionVariant | None = None,
        sinks: bool = False,
        gate: bool = False,
    ) -> None:
        super().__init__()
        for name, size in (("width", width), ("heads", heads), ("head_dim", head_dim)):
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if head_dim is None and width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads; give head_dim, or change one of them")
        self.heads = heads
        self.kv_heads = heads if kv_heads is None else kv_heads
        self.head_dim = width // heads if head_dim is None else head_dim
        check_heads(self.heads, self.kv_heads)
        self.attend = attend
        self.q_proj = nn.Linear(width, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=bias)
        self.out_proj = nn.Linear(self.heads * self.head_dim, width, bias=bias if out_bias is None else out_bias)
        self.variant = AttentionVariant() if sinks and variant is None else variant
        self.sinks = nn.Parameter(torch.zeros(self.heads)) if sinks else None
        self.gate_proj = nn.Linear(width, self.heads * self.head_dim, bias=False) if gate else None
        self.q_norm, self.k_norm = None, None  # a model that normalises queries and keys puts its norms here
        self.joined: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]] | None = None  # all projections in one

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        bias: Tensor | None = None,
        rotate: Callable[[Tensor], Tensor] | None = None,
        cache=None,
    ) -> Tensor:
        """Each token of x gathers from the tokens of context.

        Args:
            x: (batch, T, width), what the queries are made from.
            context: (batch, S, width), what keys and values are made from; x if not given (self-attention).
            mask: boolean, broadcastable to (batch, heads, T, S), True where a query may look.
            causal: hide the future. With a cache this always holds, by the cache's own lengths.
            bias: added to the scores, broadcastable to (batch, heads, T, S).
            rotate: turns (batch, heads, T, head_dim) by its positions (RoPE); applied to queries and keys.
            cache: one layer of a KV cache, which stores the new keys and values and attends over all it holds.

        Returns:
            (batch, T, width).
        """
        alone = context is None and mask is None and bias is None and rotate is None and cache is None
        if alone and self.keeps_one_tensor(x):
            return self.project_out(self.attend_one_tensor(x, causal), x)
        context = x if context is None else context
        q, k, v = self.project(x, context)
        q = self.split(q, self.heads)  # (batch, heads, T, head_dim)
        k = self.split(k, self.kv_heads)  # (batch, kv_heads, S, head_dim)
        v = self.split(v, self.kv_heads)  # (batch, kv_heads, S, head_dim)
        if rotate is not None:
            q, k = turn_both(rotate, q, k)
        attend = self.form(bias)
        if cache is not None:
            found = merge(cache.attend(q, k, v, attend=attend, mask=mask))
        else:
            found = merge(attend(q, k, v, mask=mask, causal=causal))  # (batch, T, heads * head_dim)
        return self.project_out(found, x)

    def project_out(self, found: Tensor, x: Tensor) -> Tensor:
        """What the heads found, gated by the tokens where the layer does that: (batch, T, width)."""
        return self.out_proj(found if self.gate_proj is None else found * self.gate_proj(x).sigmoid())

    def form(self, bias: Tensor | None = None) -> Attend:
        """The attention form, completed by a bias and by the layer's variant where there is one."""
        if self.variant is None:
            return self.attend if bias is None else partial(self.attend, bias=bias)
        dropout = self.variant.dropout if self.training else 0.0
        return replace(self.variant, form=self.attend, sinks=self.sinks, bias=bias, dropout=dropout)

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three projections: (batch, T, heads * head_dim), and twice (batch, S, kv_heads * head_dim).

        Where many tokens on a GPU look at each other, one matmul makes all three: see :func:`side_by_side`.
        """
        if self.joined is not None:
            q, k, v = self.joined(x)
        elif self.joins(x, context):
            q, k, v = side_by_side(self.projections(), x)
        else:
            q, k, v = self.q_proj(x), self.k_proj(context), self.v_proj(context)
        return (q, k, v) if self.q_norm is None else (normalised(self.q_norm, q), normalised(self.k_norm, k), v)

    def projections(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Of queries, keys and values."""
        return self.q_proj, self.k_proj, self.v_proj

    def joins(self, x: Tensor, context: Tensor) -> bool:
        """Whether one matmul makes queries, keys and values: for many tokens on a GPU that look at each other.

        A map with hooks has to be called by itself: tensor parallelism cuts its matrix, and works by its hooks.
        """
        return context is x and is_worth_joining(x) and all(map(is_bare, self.projections()))

    def keeps_one_tensor(self, x: Tensor) -> bool:
        """Whether queries, keys and values go from one matmul to the attention form as the one tensor that they are."""
        plain = self.variant is None and self.q_norm is None and self.joined is None
        return plain and hasattr(self.attend, "qkvpacked") and self.joins(x, x)

    def attend_one_tensor(self, x: Tensor, causal: bool) -> Tensor:
        """What the heads find among the tokens of x, by a form that takes one tensor: (batch, T, heads * head_dim)."""
        qkv = joined_projection(self.projections(), x).unflatten(-1, (-1, self.head_dim))
        return self.attend.qkvpacked(qkv, self.heads, causal=causal).flatten(2)

    def split(self, x: Tensor, heads: int) -> Tensor:
        """(batch, T, heads * head_dim) -> (batch, heads, T, head_dim): one matmul made all heads, a view parts them."""
        return x.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)


def is_worth_joining(x: Tensor) -> bool:
    """Whether three matmuls of x take so long that it pays to copy their weights together: see :func:`side_by_side`."""
    return x.is_cuda and x[..., 0].numel() >= MANY_TOKENS


def is_bare(part: nn.Module) -> bool:
    """Whether a module is a linear map and nothing beside it, so that its weight says all that it does."""
    return type(part) is nn.Linear and not part._forward_pre_hooks and not part._forward_hooks


def normalised(norm: nn.Module, x: Tensor) -> Tensor:
    """x (batch, T, n * size), each group of as many numbers as the norm has gains normalised on its own.

    A norm of head_dim gains normalises each head (Qwen3), one of all of them the whole projection (OLMo 2).
    """
    return norm(x.unflatten(-1, (-1, norm.weight.numel()))).flatten(-2)


def merge(x: Tensor) -> Tensor:
    """(batch, heads, T, head_dim) -> (batch, T, heads * head_dim)."""
    return x.transpose(1, 2).flatten(2)
