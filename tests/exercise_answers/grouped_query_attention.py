"""Answers to the exercises of the grouped-query attention chapter."""

import torch


def kv_head(head, heads, kv_heads):
    return head // (heads // kv_heads)


def kv_head_interleaved(head, heads, kv_heads):
    return head % kv_heads


def kv_head_always_first(head, heads, kv_heads):
    return 0


def kv_head_divided_by_kv_heads(head, heads, kv_heads):
    return head // kv_heads


def scores(q, k):
    batch, heads, T, head_dim = q.shape
    return (q.reshape(batch, k.shape[1], -1, head_dim) @ k.transpose(-2, -1)).view(batch, heads, T, k.shape[2])


def scores_copied(q, k):
    return q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-2, -1)


def scores_of_tiled_heads(q, k):
    return q @ k.repeat(1, q.shape[1] // k.shape[1], 1, 1).transpose(-2, -1)


def scores_broadcast(q, k):
    grouped = q.unflatten(1, (k.shape[1], -1))
    return (grouped @ k[:, :, None].expand(-1, -1, grouped.shape[2], -1, -1).contiguous().transpose(-2, -1)).flatten(
        1, 2
    )


def pool(weight, kv_heads, head_dim):
    return weight.view(kv_heads, -1, head_dim, weight.shape[1]).mean(1).reshape(kv_heads * head_dim, -1)


def pool_strided(weight, kv_heads, head_dim):
    return weight.view(-1, kv_heads, head_dim, weight.shape[1]).mean(0).reshape(kv_heads * head_dim, -1)


def pool_takes_the_first(weight, kv_heads, head_dim):
    return weight.view(kv_heads, -1, head_dim, weight.shape[1])[:, 0].reshape(kv_heads * head_dim, -1)


def pool_sums(weight, kv_heads, head_dim):
    return weight.view(kv_heads, -1, head_dim, weight.shape[1]).sum(1).reshape(kv_heads * head_dim, -1)


def absorb(q, up, latents):
    return torch.einsum("hdc,bhtd->bhtc", up, q) @ latents[:, None].transpose(-2, -1)


def absorb_expands(q, up, latents):
    return q @ torch.einsum("hdc,bsc->bhsd", up, latents).transpose(-2, -1)


def absorb_one_head_for_all(q, up, latents):
    return torch.einsum("dc,bhtd->bhtc", up[0], q) @ latents[:, None].transpose(-2, -1)


TOPIC = "grouped_query_attention"


def absorb_makes_keys_in_turn(q, up, latents):
    return torch.stack([q[:, h] @ (latents @ up[h].T).mT for h in range(len(up))], dim=1)


def pool_neighbouring_rows(weight, kv_heads, head_dim):
    return weight.unflatten(0, (kv_heads * head_dim, -1)).mean(1)


def scores_scaled(q, k):
    rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
    return (rows @ k.mT).reshape(*q.shape[:3], -1) / q.shape[-1] ** 0.5


RIGHT = {f"{TOPIC}.{fn.__name__}": fn for fn in (kv_head, scores, pool, absorb)}
WRONG = {
    f"{TOPIC}.kv_head": [kv_head_interleaved, kv_head_always_first, kv_head_divided_by_kv_heads],
    f"{TOPIC}.scores": [scores_copied, scores_of_tiled_heads, scores_broadcast, scores_scaled],
    f"{TOPIC}.pool": [pool_strided, pool_takes_the_first, pool_sums, pool_neighbouring_rows],
    f"{TOPIC}.absorb": [absorb_expands, absorb_one_head_for_all, absorb_makes_keys_in_turn],
}
