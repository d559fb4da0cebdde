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


RIGHT = {"masks.causal": causal, "masks.sinks": sinks, "masks.packed": packed, "masks.peeks": peeks}
WRONG = {
    "masks.causal": [causal_top_left, causal_inverted, causal_without_itself, causal_in_float],
    "masks.sinks": [sinks_from_the_future, sinks_one_wider],
    "masks.packed": [packed_sees_the_future, packed_by_order_of_ids, packed_without_heads],
    "masks.peeks": [peeks_looks_at_the_last_token_only, peeks_asks_too_much, peeks_changes_its_input],
}
