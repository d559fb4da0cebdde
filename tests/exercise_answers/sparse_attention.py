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


RIGHT = {
    "sparse_attention.strided": strided,
    "sparse_attention.layout": layout,
    "sparse_attention.window": window,
    "sparse_attention.layers": layers,
}
WRONG = {
    "sparse_attention.strided": [strided_sees_the_future, strided_as_fixed, strided_as_both],
    "sparse_attention.layout": [layout_of_full_blocks, layout_by_corners, layout_drops_the_rest],
    "sparse_attention.window": [window_with_all_scores, window_one_wider, window_of_its_own_block],
    "sparse_attention.layers": [layers_by_the_window, layers_one_too_many, layers_never_gives_up],
}
