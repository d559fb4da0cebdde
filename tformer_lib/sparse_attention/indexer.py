"""Choosing tokens by looking at all of them cheaply: the indexer of DeepSeek Sparse Attention.

Source: DeepSeek-AI 2025, "DeepSeek-V3.2" (arXiv:2512.02556), section 2.1. There indexers multiply in 8-bit numbers.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Indexer(nn.Module):
    """How much each query wants each key, by queries and keys of a few numbers; all index heads share one key.

    Args:
        width: of a token's vector.
        heads: index heads.
        dim: numbers of an index query and of an index key.
        query_width: of the vectors that index queries are made of (in DeepSeek-V3.2 the latent queries); ``width`` if
            not given.
        rope_dim: so many of their first numbers are turned by ``rotate``.
    """

    def __init__(self, width: int, heads: int, dim: int, *, query_width: int | None = None, rope_dim: int = 0):
        super().__init__()
        self.heads, self.dim, self.rope_dim = heads, dim, rope_dim
        self.q_proj = nn.Linear(query_width or width, heads * dim, bias=False)
        self.k_proj = nn.Linear(width, dim, bias=False)
        self.k_norm = nn.LayerNorm(dim, eps=1e-6)
        self.weigh = nn.Linear(width, heads, bias=False)

    def forward(
        self, x: Tensor, *, queries: Tensor | None = None, rotate: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """The score of every pair of tokens.

        Args:
            x: (batch, T, width).
            queries: (batch, T, query_width), what index queries are made of; x if not given.
            rotate: turns (batch, heads, T, rope_dim) by positions.

        Returns:
            (batch, T, T) float32.
        """
        q = self.q_proj(x if queries is None else queries).unflatten(-1, (self.heads, self.dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x))[:, None]  # (batch, 1, T, dim)
        if rotate is not None:
            q, k = (torch.cat([rotate(y[..., : self.rope_dim]), y[..., self.rope_dim :]], -1) for y in (q, k))
        return index_scores(q, k[:, 0], self.weigh(x))


def index_scores(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
    """The sum over heads of w_h ReLU(q_h . k), each times 1 / sqrt(heads · dim).

    Args:
        q: (batch, heads, T, dim).
        k: (batch, S, dim), shared by the heads.
        weights: (batch, T, heads), how much each query asks each head.

    Returns:
        (batch, T, S) float32.
    """
    scores = (q.float() @ k.float().mT[:, None]).relu()  # (batch, heads, T, S)
    scale = (q.shape[1] * q.shape[3]) ** -0.5
    return (weights.float() * scale).unsqueeze(-2).matmul(scores.transpose(1, 2)).squeeze(-2)


@torch.no_grad()
def chosen_tokens(scores: Tensor, count: int, *, causal: bool = False) -> Tensor:
    """The ``count`` keys that each query's scores like best, as a mask of the contract; no gradient passes.

    Args:
        scores: (batch, T, S).
        count: keys for each query; a query that sees fewer gets all of them.
        causal: choose among the keys that are no later than the query; the last query sees the last key.

    Returns:
        (batch, 1, T, S) boolean.

    Raises:
        ValueError: count is below 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    seen = seen_pairs(scores, causal)
    best = scores.masked_fill(~seen, -torch.inf).topk(min(count, scores.shape[2]), dim=-1).indices
    return (torch.zeros_like(seen).scatter_(2, best, True) & seen)[:, None]


def index_loss(scores: Tensor, attention: Tensor, *, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """How far the softmax of an indexer's scores is from the attention that it serves: KL(attention || indexer).

    DeepSeek-V3.2 trains an indexer with it, first on all pairs while the model stands still, then on those that were
    chosen, while the model learns to live with the choice.

    Args:
        scores: (batch, T, S), the indexer's.
        attention: (batch, heads, T, S) weights of the heads, which are summed; no gradient passes to them.
        mask: (batch, 1, T, S) boolean, the pairs that count (:func:`chosen_tokens`); all that are seen if not given.
        causal: as for :func:`chosen_tokens`.

    Returns:
        A scalar, 0 where both agree.
    """
    seen = seen_pairs(scores, causal)
    if mask is not None:
        seen = seen & mask[:, 0]
    target = attention.detach().float().sum(1).masked_fill(~seen, 0.0)
    target = target / target.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    log_index = scores.masked_fill(~seen, -torch.inf).log_softmax(-1)
    gap = torch.where(target > 0, target * (target.clamp(min=1e-38).log() - log_index.masked_fill(~seen, 0.0)), 0.0)
    return gap.sum(-1).mean()


def seen_pairs(scores: Tensor, causal: bool) -> Tensor:
    """(batch, T, S) boolean, True where a query may look."""
    seen = torch.ones_like(scores, dtype=torch.bool)
    return seen.tril(scores.shape[2] - scores.shape[1]) if causal else seen
