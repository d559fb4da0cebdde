"""Answers to the exercises of the masks chapter."""

import torch


def causal(T, S):
    return torch.arange(S) <= torch.arange(S - T, S)[:, None]


def causal_top_left(T, S):
    return torch.ones(T, S, dtype=torch.bool).tril()


def causal_inverted(T, S):
    return torch.arange(S) > torch.arange(S - T, S)[:, None]


def causal_without_itself(T, S):
    return torch.arange(S) < torch.arange(S - T, S)[:, None]


def causal_in_float(T, S):
    return causal(T, S).float()


def sinks(T, S, window, sinks):
    queries, keys = torch.arange(S - T, S)[:, None], torch.arange(S)
    return (keys <= queries) & ((keys > queries - window) | (keys < sinks))


def sinks_from_the_future(T, S, window, sinks):
    queries, keys = torch.arange(S - T, S)[:, None], torch.arange(S)
    return (keys <= queries) & (keys > queries - window) | (keys < sinks)


def sinks_one_wider(T, S, window, sinks):
    queries, keys = torch.arange(S - T, S)[:, None], torch.arange(S)
    return (keys <= queries) & ((keys >= queries - window) | (keys < sinks))


def packed(ids):
    same = ids[:, :, None] == ids[:, None, :]
    return (same & causal(ids.shape[1], ids.shape[1]))[:, None]


def packed_sees_the_future(ids):
    return (ids[:, :, None] == ids[:, None, :])[:, None]


def packed_by_order_of_ids(ids):
    return ((ids[:, :, None] >= ids[:, None, :]) & causal(ids.shape[1], ids.shape[1]))[:, None]


def packed_without_heads(ids):
    return packed(ids)[:, 0]


def peeks(model, x):
    before = model(x)
    for t in range(1, len(x)):
        changed = x.clone()
        changed[t:] += 10
        if not torch.allclose(model(changed)[:t], before[:t]):
            return True
    return False


def peeks_looks_at_the_last_token_only(model, x):
    changed = x.clone()
    changed[-1] += 10
    return not torch.allclose(model(changed)[0], model(x)[0])


def peeks_asks_too_much(model, x):
    changed = x.clone()
    changed[-1] += 10
    return not torch.allclose(model(changed), model(x))


def peeks_changes_its_input(model, x):
    before = model(x)
    x[-1] += 10
    return not torch.allclose(model(x)[:-1], before[:-1])


def peeks_by_the_gradient(model, x):
    slopes = torch.autograd.functional.jacobian(model, x)  # (T, width, T, width)
    return bool((slopes != 0).any(3).any(1).triu(1).any())


def tree(parents, lengths):
    (batch, D), S = parents.shape, int(lengths.max())
    sees = (parents[:, :, None] == torch.arange(D)) | torch.eye(D, dtype=torch.bool)
    steps = 1
    while steps < D:
        sees = sees.float() @ sees.float() > 0
        steps *= 2
    real = parents > -2
    prefix = (torch.arange(S) < lengths[:, None])[:, None].expand(batch, D, S)
    mask = torch.cat((prefix, sees), -1) & real[:, :, None]
    return mask[:, None], (lengths[:, None] + sees.sum(-1) - 1) * real


def tree_by_walking(parents, lengths):
    (batch, D), S = parents.shape, max(lengths.tolist())
    mask = torch.zeros(batch, 1, D, S + D, dtype=torch.bool)
    positions = [[0] * D for _ in range(batch)]
    for b, row in enumerate(parents.tolist()):
        for t in range(D):
            if row[t] == -2:
                continue
            mask[b, 0, t, : lengths[b]] = True
            above, depth = t, -1
            while above >= 0:
                mask[b, 0, t, S + above] = True
                above, depth = row[above], depth + 1
            positions[b][t] = int(lengths[b]) + depth
    return [mask, positions]


def tree_is_a_chain(parents, lengths):
    mask, positions = tree(parents, lengths)
    D = parents.shape[1]
    drafts = causal(D, D) & (parents > -2)[:, None, :, None] & (parents > -2)[:, None, None]
    return torch.cat((mask[..., :-D], drafts), -1), positions


def tree_in_order(parents, lengths):
    mask, positions = tree(parents, lengths)
    D = parents.shape[1]
    sees = torch.zeros(len(parents), D, D, dtype=torch.bool)
    for b, row in enumerate(parents.tolist()):
        for t, parent in enumerate(row):
            if parent >= 0:
                sees[b, t] = sees[b, parent]
            sees[b, t, t] = parent > -2
    return torch.cat((mask[..., :-D], sees[:, None]), -1), positions


def tree_of_parents_alone(parents, lengths):
    mask, positions = tree(parents, lengths)
    D = parents.shape[1]
    sees = (parents[:, :, None] == torch.arange(D)) | torch.eye(D, dtype=torch.bool) & (parents > -2)[:, :, None]
    return torch.cat((mask[..., :-D], sees[:, None]), -1), positions


def tree_sees_its_children(parents, lengths):
    mask, positions = tree(parents, lengths)
    D = parents.shape[1]
    return torch.cat((mask[..., :-D], mask[..., -D:].mT), -1), positions


def tree_without_itself(parents, lengths):
    mask, positions = tree(parents, lengths)
    D = parents.shape[1]
    return torch.cat((mask[..., :-D], mask[..., -D:] & ~torch.eye(D, dtype=torch.bool)), -1), positions


def tree_behind_a_padded_prefix(parents, lengths):
    mask, positions = tree(parents, lengths)
    S, real = int(lengths.max()), parents > -2
    mask[..., :S] = real[:, None, :, None]
    return mask, positions


def tree_with_padding(parents, lengths):
    mask, positions = tree(parents.clamp(min=-1), lengths)
    return mask, positions


def tree_numbered_in_order(parents, lengths):
    D = parents.shape[1]
    return tree(parents, lengths)[0], (lengths[:, None] + torch.arange(D)) * (parents > -2)


def tree_numbered_from_the_longest(parents, lengths):
    mask, positions = tree(parents, lengths)
    return mask, (positions + lengths.max() - lengths[:, None]) * (parents > -2)


def tree_numbered_one_too_far(parents, lengths):
    mask, positions = tree(parents, lengths)
    return mask, (positions + 1) * (parents > -2)


def peeks_at_neighbours(model, x):
    before = model(x)
    for t in range(1, len(x)):
        for by in (10, -10):
            changed = x.clone()
            changed[t] += by
            if not torch.allclose(model(changed)[t - 1], before[t - 1]):
                return True
    return False


def peeks_at_column_0(model, x):
    before = model(x)
    for t in range(1, len(x)):
        for by in (10, -10):
            changed = x.clone()
            changed[t:] += by
            if not torch.allclose(model(changed)[:t, 0], before[:t, 0]):
                return True
    return False


def peeks_at_zeros(model, x):
    before = model(x)
    for t in range(1, len(x)):
        changed = x.clone()
        changed[t:] = 0
        if not torch.allclose(model(changed)[:t], before[:t]):
            return True
    return False


def peeks_at_both_ends(model, x):
    before = model(x)
    for t in (1, len(x) - 1):
        for by in (10, -10):
            changed = x.clone()
            changed[t:] += by
            if not torch.allclose(model(changed)[:t], before[:t]):
                return True
    return False


def sinks_before_every_key(T, S, window, sinks):
    queries, keys = torch.arange(S - T, S).clamp(min=0)[:, None], torch.arange(S)
    return (keys <= queries) & ((keys > queries - window) | (keys < sinks))


RIGHT = {
    "masks.causal": causal,
    "masks.sinks": sinks,
    "masks.packed": packed,
    "masks.peeks": peeks,
    "masks.tree": tree,
}
ALSO_RIGHT = {"masks.tree": [tree_by_walking]}
WRONG = {
    "masks.causal": [causal_top_left, causal_inverted, causal_without_itself, causal_in_float],
    "masks.sinks": [sinks_before_every_key, sinks_from_the_future, sinks_one_wider],
    "masks.packed": [packed_sees_the_future, packed_by_order_of_ids, packed_without_heads],
    "masks.peeks": [
        peeks_at_neighbours,
        peeks_at_column_0,
        peeks_at_zeros,
        peeks_at_both_ends,
        peeks_looks_at_the_last_token_only,
        peeks_asks_too_much,
        peeks_changes_its_input,
        peeks_by_the_gradient,
    ],
    "masks.tree": [
        tree_is_a_chain,
        tree_in_order,
        tree_of_parents_alone,
        tree_sees_its_children,
        tree_without_itself,
        tree_behind_a_padded_prefix,
        tree_with_padding,
        tree_numbered_in_order,
        tree_numbered_from_the_longest,
        tree_numbered_one_too_far,
    ],
}
