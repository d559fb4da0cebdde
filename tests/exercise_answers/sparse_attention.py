"""Answers to the exercises of the sparse-attention chapter."""

import torch


def distances(T):
    position = torch.arange(T)
    return position[:, None] - position[None, :]


def strided(T, stride):
    d = distances(T)
    return (d >= 0) & ((d < stride) | (d % stride == 0))


def strided_sees_the_future(T, stride):
    d = distances(T)
    return (d.abs() < stride) | (d % stride == 0)


def strided_as_fixed(T, stride):
    d, position = distances(T), torch.arange(T)
    return (d >= 0) & ((d < stride) | (position % stride == 0))


def strided_as_both(T, stride):
    d = distances(T)
    return (d >= 0) & (d < stride) & (d % stride == 0)


def layout(mask, block, reduce=torch.any):
    T, S = mask.shape
    padded = torch.nn.functional.pad(mask, (0, -S % block, 0, -T % block))
    tiles = padded.unflatten(1, (-1, block)).unflatten(0, (-1, block))  # (rows, block, columns, block)
    return reduce(reduce(tiles, 3), 1)


def layout_of_full_blocks(mask, block):
    return layout(mask, block, torch.all)


def layout_by_corners(mask, block):
    return mask[::block, ::block]


def layout_drops_the_rest(mask, block):
    T, S = (n // block * block for n in mask.shape)
    return layout(mask[:T, :S], block)


def window(q, k, v, window, reach=0):
    outputs = []
    for start in range(0, len(q), window):
        end, first = min(start + window, len(q)), max(0, start - window)
        distance = torch.arange(start, end)[:, None] - torch.arange(first, end)
        scores = q[start:end] @ k[first:end].T / q.shape[1] ** 0.5
        scores = scores.masked_fill((distance < 0) | (distance >= window + reach), -torch.inf)
        outputs.append(scores.softmax(-1) @ v[first:end])
    return torch.cat(outputs)


def window_with_all_scores(q, k, v, window):
    d = distances(len(q))
    scores = (q @ k.T / q.shape[1] ** 0.5).masked_fill((d < 0) | (d >= window), -torch.inf)
    return scores.softmax(-1) @ v


def window_from_the_first_key(q, k, v, window):
    outputs = []
    for start in range(0, len(q), window):
        end = min(start + window, len(q))
        distance = torch.arange(start, end)[:, None] - torch.arange(end)
        scores = (q[start:end] @ k[:end].T / q.shape[1] ** 0.5).masked_fill(
            (distance < 0) | (distance >= window), -torch.inf
        )
        outputs.append(scores.softmax(-1) @ v[:end])
    return torch.cat(outputs)


def window_one_wider(q, k, v, size):
    return window(q, k, v, size, reach=1)


def window_of_its_own_block(q, k, v, window):
    pieces = zip(*(x.split(window) for x in (q, k, v)), strict=True)
    future = lambda n: torch.ones(n, n).triu(1).bool()  # noqa: E731
    scores = [((q @ k.T / q.shape[1] ** 0.5).masked_fill(future(len(q)), -torch.inf), v) for q, k, v in pieces]
    return torch.cat([s.softmax(-1) @ v for s, v in scores])


def layers(mask):
    full, reach, count = torch.ones_like(mask).tril(), mask, 1
    while not bool((reach | ~full).all()):
        further = (reach.float() @ mask.float()) > 0
        if torch.equal(further, reach):
            return None
        reach, count = further, count + 1
    return count


def layers_by_the_window(mask):
    widest = int(mask.sum(1).max())
    return -(-(len(mask) - 1) // max(1, widest - 1))


def layers_one_too_many(mask):
    count = layers(mask)
    return None if count is None else count + 1


def layers_never_gives_up(mask):
    return layers(mask) or len(mask)


def blocks(q, k, v, live, allows, block, start=-torch.inf, rescale=True, blind=True, tile=None):
    T, S = len(q), len(k)
    out = q.new_zeros(T, v.shape[1])
    for r in range(len(live)):
        i = torch.arange(r * block, min(T, (r + 1) * block))
        most, weight = torch.full((len(i), 1), start), torch.zeros(len(i), 1)
        summed = torch.zeros(len(i), v.shape[1])
        for c in live[r].nonzero().flatten().tolist():
            j = torch.arange(c * block, min(S, (c + 1) * block))
            seen = allows(i[:, None], j[None, :]) if tile is None else tile(allows, i, j)
            scores = (q[i] @ k[j].T / q.shape[1] ** 0.5).masked_fill(~seen, -torch.inf)
            higher = torch.maximum(most, scores.amax(1, keepdim=True))
            base = higher.masked_fill(higher == -torch.inf, 0.0) if blind else higher
            weights, shrink = (scores - base).exp(), (most - base).exp() if rescale else 1.0
            weight, summed = shrink * weight + weights.sum(1, keepdim=True), shrink * summed + weights @ v[j]
            most = higher
        out[i] = summed / (weight.masked_fill(weight == 0, 1.0) if blind else weight)
    return out


def blocks_gathered(q, k, v, live, allows, block):
    outputs = []
    columns = torch.arange(len(k)) // block
    for r, rows in enumerate(torch.arange(len(q)).split(block)):
        j = live[r][columns].nonzero().flatten()
        seen = allows(rows[:, None], j[None, :])
        scores = (q[rows] @ k[j].T / q.shape[1] ** 0.5).masked_fill(~seen, -torch.inf)
        outputs.append(scores.softmax(-1).nan_to_num(0.0) @ v[j])
    return torch.cat(outputs)


def blocks_batched(q, k, v, live, allows, block, counts=None):
    """Rows of blocks with equally many live columns together, in one batched product; padded to whole blocks."""
    T, S, pad = len(q), len(k), torch.nn.functional.pad
    tile = lambda x: pad(x, (0, 0, 0, -len(x) % block)).unflatten(0, (-1, block))  # noqa: E731
    q, k, v, inside = tile(q), tile(k), tile(v), torch.arange(block)
    out, many = q.new_zeros(*q.shape[:2], v.shape[-1]), live.sum(1)
    for n in many.unique().tolist() if counts is None else counts(many):
        r = (many == n).nonzero().flatten() if counts is None else torch.arange(len(live))
        c = live[r].float().topk(n).indices  # (rows, n)
        i = (r[:, None] * block + inside)[:, :, None]
        j = (c[:, :, None] * block + inside).flatten(1)[:, None, :]
        seen = allows(i, j) & (j < S) & live[r].gather(1, c).repeat_interleave(block, 1)[:, None, :]
        scores = q[r] @ k[c].flatten(1, 2).mT / q.shape[-1] ** 0.5
        out[r] = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0) @ v[c].flatten(1, 2)
    return out.flatten(0, 1)[:T]


def blocks_padded_to_the_longest(q, k, v, live, allows, block):
    return blocks_batched(q, k, v, live, allows, block, counts=lambda many: [int(many.max())])


def blocks_with_all_scores(q, k, v, live, allows, block):
    inside = live.repeat_interleave(block, 0).repeat_interleave(block, 1)[: len(q), : len(k)]
    seen = inside & allows(torch.arange(len(q))[:, None], torch.arange(len(k))[None, :])
    return (q @ k.T / q.shape[1] ** 0.5).masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0) @ v


def blocks_all_of_them(q, k, v, live, allows, block):
    dead = lambda i, j: live[i // block, j // block]  # noqa: E731
    return blocks(q, k, v, torch.ones_like(live), lambda i, j: allows(i, j) & dead(i, j), block)


def blocks_that_ignore_the_layout(q, k, v, live, allows, block):
    return blocks(q, k, v, torch.ones_like(live), allows, block)


def blocks_that_ignore_the_mask(q, k, v, live, allows, block):
    return blocks(q, k, v, live, lambda i, j: i + j >= 0, block)


def blocks_with_a_softmax_each(q, k, v, live, allows, block):
    out = q.new_zeros(len(q), v.shape[1])
    for r, c in live.nonzero().tolist():
        only = torch.zeros_like(live)
        only[r, c] = True
        out += blocks(q, k, v, only, allows, block)
    return out


def blocks_without_rescaling(*args):
    return blocks(*args, rescale=False)


def blocks_nan_for_the_blind(*args):
    return blocks(*args, blind=False)


def blocks_from_a_maximum_of_zero(*args):
    return blocks(*args, start=0.0)


def blocks_with_local_positions(*args):
    return blocks(*args, tile=lambda allows, i, j: allows((i - i[0])[:, None], (j - j[0])[None, :]))


def blocks_that_drop_the_rest(q, k, v, live, allows, block):
    S = len(k) // block * block
    return blocks(q, k[:S], v[:S], live[:, : S // block], allows, block)


def blocks_that_see_the_padding(q, k, v, live, allows, block):
    more = -len(k) % block
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, more)) for x in (k, v))
    return blocks(q, k, v, live, allows, block)


def blocks_without_a_maximum(q, k, v, live, allows, block):
    weight, out = torch.zeros(len(q), 1), q.new_zeros(len(q), v.shape[1])
    for r, c in live.nonzero().tolist():
        i, j = (torch.arange(n * block, min(m, (n + 1) * block)) for n, m in ((r, len(q)), (c, len(k))))
        weights = (q[i] @ k[j].T / q.shape[1] ** 0.5).exp() * allows(i[:, None], j[None, :])
        weight[i] += weights.sum(1, keepdim=True)
        out[i] += weights @ v[j]
    return out / weight.masked_fill(weight == 0, 1.0)


def layout_of_what_is_dense(mask, block):
    rows = [torch.stack([tile.float().mean() > 0.1 for tile in part.split(block, 1)]) for part in mask.split(block, 0)]
    return torch.stack(rows)


def layers_until_the_last_hears_all(mask):
    reach = mask.float()
    for count in range(1, len(mask) + 1):
        if reach[-1].all():
            return count
        reach = (reach @ mask.float() > 0).float()
    return None


def layers_until_the_first_is_heard(mask):
    reach = mask.float()
    for count in range(1, len(mask) + 1):
        if reach[:, 0].all():
            return count
        reach = (reach @ mask.float() > 0).float()
    return None


RIGHT = {
    "sparse_attention.strided": strided,
    "sparse_attention.layout": layout,
    "sparse_attention.window": window,
    "sparse_attention.layers": layers,
    "sparse_attention.blocks": blocks,
}
ALSO_RIGHT = {"sparse_attention.blocks": [blocks_gathered, blocks_batched]}
WRONG = {
    "sparse_attention.strided": [strided_sees_the_future, strided_as_fixed, strided_as_both],
    "sparse_attention.layout": [
        layout_of_what_is_dense,
        layout_of_full_blocks,
        layout_by_corners,
        layout_drops_the_rest,
    ],
    "sparse_attention.window": [
        window_with_all_scores,
        window_from_the_first_key,
        window_one_wider,
        window_of_its_own_block,
    ],
    "sparse_attention.layers": [
        layers_until_the_last_hears_all,
        layers_until_the_first_is_heard,
        layers_by_the_window,
        layers_one_too_many,
        layers_never_gives_up,
    ],
    "sparse_attention.blocks": [
        blocks_padded_to_the_longest,
        blocks_with_all_scores,
        blocks_all_of_them,
        blocks_that_ignore_the_layout,
        blocks_that_ignore_the_mask,
        blocks_with_a_softmax_each,
        blocks_without_rescaling,
        blocks_nan_for_the_blind,
        blocks_from_a_maximum_of_zero,
        blocks_with_local_positions,
        blocks_that_drop_the_rest,
        blocks_that_see_the_padding,
        blocks_without_a_maximum,
    ],
}
