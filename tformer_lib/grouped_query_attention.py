"""Grouped-query attention: groups of query heads share one head of keys and values, so that the cache shrinks.

One parameter, ``kv_heads``, spans the family: as many as query heads is multi-head attention (MHA), fewer is
grouped-query attention (GQA: each of the kv_heads serves one group of heads / kv_heads queries), one is multi-query
attention (MQA: all queries share it). Every attention form here takes it, through the shapes of k and v; what this file
adds is the plain oracle, the way from a trained MHA model to a GQA one, and multi-head latent attention (MLA).

Sources: Shazeer 2019, "Fast Transformer Decoding" (MQA, arXiv:1911.02150); Ainslie et al. 2023, "GQA"
(arXiv:2305.13245); DeepSeek-AI 2024, "DeepSeek-V2" (MLA, arXiv:2405.04434).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tformer_lib.attention import Attend, attend, merge
from tformer_lib.contract import check_heads, check_inputs


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Copy each kv head for every query head of its group: (batch, kv_heads, S, d) -> (batch, heads, S, d)."""
    check_heads(heads, x.shape[1])
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def attend_repeated(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> Tensor:
    """Grouped-query attention as multi-head attention on copied keys and values: the definition, and the oracle.

    It reads and writes heads / kv_heads times as much memory as there is to know. Arguments are those of ``attend``.
    """
    check_inputs(q, k, v, mask)
    heads = q.shape[1]
    return attend(q, repeat_heads(k, heads), repeat_heads(v, heads), mask=mask, causal=causal, scale=scale)


# From a trained MHA model to GQA


def pool_heads(projection: Tensor, kv_heads: int, head_dim: int) -> Tensor:
    """The mean of the heads of each group (Ainslie et al. 2023, section 2.1).

    Args:
        projection: (heads * head_dim, ...) the weight or the bias of a key or value projection.
        kv_heads: how many heads remain.
        head_dim: rows that belong to one head.

    Returns:
        (kv_heads * head_dim, ...).
    """
    check_heads(projection.shape[0] // head_dim, kv_heads)
    groups = projection.unflatten(0, (kv_heads, -1, head_dim))  # (kv_heads, heads / kv_heads, head_dim, ...)
    return groups.mean(dim=1).flatten(0, 1)


def to_grouped(model: nn.Module, kv_heads: int) -> nn.Module:
    """A copy of a ``Decoder`` with fewer kv heads, each the mean of the heads that it replaces.

    The copy computes something else unless the heads of a group were equal: train it a little (:func:`uptrain`).

    Args:
        model: the trained model; it is left as it is.
        kv_heads: how many kv heads the copy has, a divisor of what the model has.
    """
    config = model.config
    check_heads(config.number_of_kv_heads, kv_heads)
    pooled = {
        name: pool_heads(weight, kv_heads, config.size_of_head) if is_kv_projection(name) else weight
        for name, weight in model.state_dict().items()
    }
    weight = next(model.parameters())
    grouped = type(model)(replace(config, kv_heads=kv_heads)).to(weight.device, weight.dtype)
    grouped.load_state_dict(pooled)
    return grouped.train(model.training)


def is_kv_projection(name: str) -> bool:
    """Whether a parameter of that name makes keys or values."""
    return ".k_proj." in name or ".v_proj." in name


def uptrain(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss_of: Callable[[nn.Module, Tensor, Tensor], Tensor],
    *,
    learning_rate: float = 1e-3,
) -> list[float]:
    """Let a converted model get used to its shared heads: a short AdamW run whose rate falls linearly to 0.

    Args:
        model: trained in place.
        batches: inputs and targets, each (batch, T) int64; their number is the number of steps.
        loss_of: the loss of (model, inputs, targets).
        learning_rate: of the first step.

    Returns:
        The loss at each step.
    """
    batches = list(batches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches))
    losses = []
    for inputs, targets in batches:
        loss = loss_of(model, inputs, targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


# Multi-head latent attention


@dataclass(frozen=True)
class LatentConfig:
    """The sizes of multi-head latent attention in a model (DeepSeek-V2).

    Raises:
        ValueError: a size is too small; the message names it.
    """

    keys: int
    """Numbers cached per token for the keys and values of all heads together (``kv_lora_rank``)."""
    rope_dim: int
    """Further numbers, the rotated key that all heads share (``qk_rope_head_dim``)."""
    value_dim: int | None = None
    """The size of a head's value; None is that of the part of its key that knows no position."""
    queries: int | None = None
    """The size of a token's latent query, of which all heads' queries are made; None makes them of the token."""

    def __post_init__(self):
        for name in ("keys", "rope_dim", "value_dim", "queries"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} of the latents must be at least 1, got {getattr(self, name)}")

    @property
    def entry(self) -> int:
        """Numbers cached per token."""
        return self.keys + self.rope_dim


class MultiHeadLatentAttention(nn.Module):
    """Every head has keys and values of its own, all made from one short vector per token, and that alone is cached.

    With c = norm(W_down x) of ``latent`` numbers, head h has k_h = W_up_k,h c and v_h = W_up_v,h c. Positions cannot be
    rotated into keys that are made after the cache, so a rotated key of ``rope_dim`` numbers, shared by all heads, is
    cached beside c, and each head's query has a rotated part to match it (DeepSeek-V2, section 2.1).

    Args:
        width: the width of a token's vector, in and out.
        heads: number of heads.
        head_dim: width of a head's value, and of the part of its query and key that knows no position.
        latent: numbers that are cached per token for all heads' keys and values together.
        rope_dim: further numbers, the shared rotated key; 0 leaves positions to the model.
        value_dim: width of a head's value where it is not head_dim.
        query_latent: the size of the latent that queries are made of; they are made of the token if not given. It saves
            memory in training, and no cache.
        scale: what scores are multiplied by; 1 / sqrt(head_dim + rope_dim) if not given.
        attend: an attention form that takes values of another size than keys.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        *,
        latent: int,
        rope_dim: int = 0,
        value_dim: int | None = None,
        query_latent: int | None = None,
        scale: float | None = None,
        attend: Attend = attend,
    ):
        super().__init__()
        if rope_dim % 2:
            raise ValueError(f"RoPE turns pairs, so rope_dim must be even, got {rope_dim}")
        self.heads, self.head_dim, self.latent, self.rope_dim = heads, head_dim, latent, rope_dim
        self.scale = (head_dim + rope_dim) ** -0.5 if scale is None else scale
        self.attend = attend
        value_dim = head_dim if value_dim is None else value_dim
        self.q_down, self.q_norm = None, None
        if query_latent is not None:
            self.q_down, self.q_norm = nn.Linear(width, query_latent, bias=False), nn.RMSNorm(query_latent, eps=1e-6)
        self.q_proj = nn.Linear(query_latent or width, heads * (head_dim + rope_dim), bias=False)
        self.down = nn.Linear(width, latent + rope_dim, bias=False)
        self.norm = nn.RMSNorm(latent, eps=1e-6)
        self.up_k = nn.Parameter(torch.randn(heads, head_dim, latent) * latent**-0.5)
        self.up_v = nn.Parameter(torch.randn(heads, value_dim, latent) * latent**-0.5)
        self.out_proj = nn.Linear(heads * value_dim, width, bias=False)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        bias: None = None,
        rotate: Callable[[Tensor], Tensor] | None = None,
        cache: "LatentCache | Any | None" = None,
        absorb: bool = False,
    ) -> Tensor:
        """Each token of x gathers from what is cached and from x.

        Args:
            x: (batch, T, width).
            mask: boolean, broadcastable to (batch, heads, T, S), True where a query may look.
            causal: hide the future; the last query sees the last key.
            bias: there is none here.
            rotate: turns (batch, heads, T, rope_dim) by its positions.
            cache: this layer's latents of the tokens before x; those of x are appended, unless this raises an error.
                In a layer of one of the caches of ``kv_cache`` they are the keys of one head, without values.
            absorb: attend to the latents themselves instead of making keys and values from them: the same result, and
                far less work where there are few queries and many keys, as in decoding.

        Returns:
            (batch, T, width).
        """
        if bias is not None:
            raise ValueError("multi-head latent attention takes no bias")
        q, rotated_q = self.queries(x, rotate)
        entries = self.compress(x, rotate)  # (batch, T, latent + rope_dim)
        if isinstance(cache, LatentCache):
            entries = cache.joined(entries)  # (batch, S, latent + rope_dim)
        elif cache is not None:
            return self.out_proj(merge(self.attend_stored(q, rotated_q, entries, cache, mask)))
        form = self.attend_absorbed if absorb else self.attend_expanded
        out = self.out_proj(merge(form(q, rotated_q, entries, mask=mask, causal=causal)))
        if cache is not None:
            cache.entries = entries.detach()
        return out

    def attend_stored(self, q: Tensor, rotated_q: Tensor, entries: Tensor, cache, mask: Tensor | None) -> Tensor:
        """Attention over what a layer of a KV cache holds, once x's latents are among it; absorbed in any case.

        Args:
            q, rotated_q: as for :meth:`attend_absorbed`.
            entries: (batch, T, latent + rope_dim), those of the new tokens.
            cache: the layer, whose keys are one head of latent + rope_dim numbers and whose values are none.
            mask: as for every cache.
        """
        keys = entries[:, None]  # (batch, 1, T, latent + rope_dim)
        q = torch.cat([torch.einsum("hdc,bhtd->bhtc", self.up_k, q), rotated_q], dim=-1)
        form = partial(attend_latents, attend=self.attend, latent=self.latent, scale=self.scale)
        found = cache.attend(q, keys, keys[..., :0], attend=form, mask=mask)  # (batch, heads, T, latent)
        return torch.einsum("hdc,bhtc->bhtd", self.up_v, found)

    def queries(self, x: Tensor, rotate: Callable[[Tensor], Tensor] | None) -> tuple[Tensor, Tensor]:
        """The queries' plain part (batch, heads, T, head_dim) and rotated part (batch, heads, T, rope_dim)."""
        x = x if self.q_down is None else self.q_norm(self.q_down(x))
        q = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (batch, heads, T, head_dim + rope_dim)
        plain, rotated = q.split((self.head_dim, self.rope_dim), dim=-1)
        return plain, rotated if rotate is None else rotate(rotated)

    def compress(self, x: Tensor, rotate: Callable[[Tensor], Tensor] | None) -> Tensor:
        """What is cached of x (batch, T, width): its latent and the shared key, (batch, T, latent + rope_dim)."""
        latent, key = self.down(x).split((self.latent, self.rope_dim), dim=-1)
        if rotate is not None:
            key = rotate(key[:, None])[:, 0]  # one head for all
        return torch.cat([self.norm(latent), key], dim=-1)

    def attend_expanded(self, q: Tensor, rotated_q: Tensor, entries: Tensor, **options) -> Tensor:
        """Make every head's keys and values, then multi-head attention.

        Args:
            q: (batch, heads, T, head_dim).
            rotated_q: (batch, heads, T, rope_dim).
            entries: (batch, S, latent + rope_dim).

        Returns:
            (batch, heads, T, head_dim).
        """
        latent, key = entries.split((self.latent, self.rope_dim), dim=-1)
        k = torch.einsum("hdc,bsc->bhsd", self.up_k, latent)  # (batch, heads, S, head_dim)
        v = torch.einsum("hdc,bsc->bhsd", self.up_v, latent)
        k = torch.cat([k, key[:, None].expand(-1, self.heads, -1, -1)], dim=-1)  # (..., head_dim + rope_dim)
        return self.attend(torch.cat([q, rotated_q], dim=-1), k, v, scale=self.scale, **options)

    def attend_absorbed(self, q: Tensor, rotated_q: Tensor, entries: Tensor, **options) -> Tensor:
        """Carry the queries to the latents instead: multi-query attention with one key head, the cache itself.

        q . (W_up_k c) = (W_up_k^T q) . c, and a weighted sum of W_up_v c is W_up_v of the weighted sum of c.
        Arguments and result are those of ``attend_expanded``.
        """
        q = torch.einsum("hdc,bhtd->bhtc", self.up_k, q)  # (batch, heads, T, latent)
        q = torch.cat([q, rotated_q], dim=-1)  # (batch, heads, T, latent + rope_dim)
        shared = entries[:, None]  # (batch, 1, S, latent + rope_dim): one kv head
        gathered = attend(q, shared, shared[..., : self.latent], scale=self.scale, **options)
        return torch.einsum("hdc,bhtc->bhtd", self.up_v, gathered)


def attend_latents(q: Tensor, k: Tensor, v: Tensor, *, attend: Attend, latent: int, **options) -> Tensor:
    """Attention whose values are the first ``latent`` numbers of the keys, under the contract otherwise.

    Args:
        q: (batch, heads, T, latent + rope_dim).
        k: (batch, 1, S, latent + rope_dim).
        v: anything; it is not looked at.
        attend: the form that computes it.

    Returns:
        (batch, heads, T, latent).
    """
    return attend(q, k, k[..., :latent], **options)


class LatentCache:
    """One layer's latents, (batch, S, latent + rope_dim), concatenated as they come: no keys, no values.

    Its rows are equally long. It serves inference: what it holds carries no gradient.
    """

    def __init__(self) -> None:
        self.entries: Tensor | None = None

    def joined(self, new: Tensor) -> Tensor:
        """All that is held, then new (batch, T, latent + rope_dim): (batch, S, latent + rope_dim). Nothing is kept yet.

        Raises:
            ValueError: new does not fit what is held.
        """
        if self.entries is None:
            return new
        held, came = ((x.shape[0], x.shape[2], x.dtype, x.device) for x in (self.entries, new))
        if held != came:
            raise ValueError(f"the cache holds (batch, latent + rope_dim, dtype, device) = {held}, got {came}")
        return torch.cat([self.entries, new], dim=1)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0 if self.entries is None else self.entries.numel() * self.entries.element_size()
