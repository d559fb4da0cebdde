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


def align(q, k, v, out, kv_heads, head_dim, *, undo=True, turn_q=True, pairs="half", target="group", proper=False):
    def paired(weight):
        heads = weight.unflatten(0, (-1, head_dim))
        first, second = heads.chunk(2, 1) if pairs == "half" else (heads[:, ::2], heads[:, 1::2])
        return torch.complex(first, second)

    def flat(heads):
        parts = torch.stack([heads.real, heads.imag], 1 if pairs == "half" else 2)
        return parts.flatten(1, 2).flatten(0, 1)

    q, k = paired(q), paired(k)
    v, out = v.unflatten(0, (-1, head_dim)).clone(), out.unflatten(1, (-1, head_dim)).clone()
    for i in range(len(k)):
        group = len(k) // kv_heads
        first = {"group": i - i % group, "zero": 0, "strided": i % kv_heads}[target]
        turn = (k[first] * k[i].conj()).sum(-1, keepdim=True)
        k[i] *= turn / turn.abs()
        if turn_q:
            q[i] *= turn / turn.abs()
        left, _, right = torch.linalg.svd(v[first] @ v[i].T)
        if proper and torch.det(left @ right) < 0:
            left[:, -1] *= -1
        v[i] = left @ right @ v[i]
        if undo:
            out[:, i] = out[:, i] @ (left @ right).T
    return flat(q), flat(k), v.flatten(0, 1), out.flatten(1)


def align_in_double(q, k, v, out, kv_heads, head_dim):
    """Keys by real 2 x 2 turns, in float64, and each group turned as a whole besides."""
    half, group = head_dim // 2, k.shape[0] // head_dim // kv_heads
    q, k, v, out = (w.double().clone() for w in (q, k, v, out))
    for i in range(k.shape[0] // head_dim):
        own, first = i * head_dim, (i - i % group) * head_dim
        for j in range(half):
            rows, wanted = (torch.tensor([start + j, start + j + half]) for start in (own, first))
            (a, b), (c, d) = k[wanted], k[rows]
            angle = torch.atan2(b @ c - a @ d, a @ c + b @ d)
            turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
            q[rows], k[rows] = turn @ q[rows], turn @ k[rows]
        here = slice(own, own + head_dim)
        left, _, right = torch.linalg.svd(v[first : first + head_dim] @ v[here].T)
        v[here], out[:, here] = left @ right @ v[here], out[:, here] @ (left @ right).T
    whole = torch.linalg.qr(torch.ones(head_dim, head_dim, dtype=torch.float64) + torch.eye(head_dim))[0]
    v = (whole @ v.unflatten(0, (-1, head_dim))).flatten(0, 1)
    return [q, k, v, (out.unflatten(1, (-1, head_dim)) @ whole.T).flatten(1)]


def align_nothing(q, k, v, out, kv_heads, head_dim):
    return q, k, v, out


def align_without_undoing(*weights):
    return align(*weights, undo=False)


def align_keys_alone(*weights):
    return align(*weights, turn_q=False)


def align_interleaved_pairs(*weights):
    return align(*weights, pairs="interleaved")


def align_to_head_zero(*weights):
    return align(*weights, target="zero")


def align_strided_groups(*weights):
    return align(*weights, target="strided")


def align_without_reflections(*weights):
    return align(*weights, proper=True)


def align_keys_as_values(q, k, v, out, kv_heads, head_dim):
    """The keys by a full orthogonal matrix, which RoPE does not allow."""
    turned = align(q, k, k, q.T, kv_heads, head_dim)
    return turned[3].T, turned[2], *align(q, k, v, out, kv_heads, head_dim)[2:]


def align_values_alone(q, k, v, out, kv_heads, head_dim):
    return q, k, *align(q, k, v, out, kv_heads, head_dim)[2:]


def align_in_place(q, k, v, out, kv_heads, head_dim):
    for old, new in zip((q, k, v, out), align(q, k, v, out, kv_heads, head_dim), strict=True):
        old.copy_(new)
    return q, k, v, out


RIGHT = {f"{TOPIC}.{fn.__name__}": fn for fn in (kv_head, scores, pool, absorb, align)}
ALSO_RIGHT = {f"{TOPIC}.align": [align_in_double]}
WRONG = {
    f"{TOPIC}.kv_head": [kv_head_interleaved, kv_head_always_first, kv_head_divided_by_kv_heads],
    f"{TOPIC}.scores": [scores_copied, scores_of_tiled_heads, scores_broadcast, scores_scaled],
    f"{TOPIC}.pool": [pool_strided, pool_takes_the_first, pool_sums, pool_neighbouring_rows],
    f"{TOPIC}.absorb": [absorb_expands, absorb_one_head_for_all, absorb_makes_keys_in_turn],
    f"{TOPIC}.align": [
        align_nothing,
        align_without_undoing,
        align_keys_alone,
        align_interleaved_pairs,
        align_to_head_zero,
        align_strided_groups,
        align_without_reflections,
        align_keys_as_values,
        align_values_alone,
        align_in_place,
    ],
}
