"""Answers to the exercises of the KV cache chapter."""

import torch

from tformer_lib.attention import attend


def tokens_that_fit(memory, layers, heads, kv_heads, head_dim, itemsize):
    return memory // (2 * layers * kv_heads * head_dim * itemsize)


def tokens_by_query_heads(memory, layers, heads, kv_heads, head_dim, itemsize):
    return memory // (2 * layers * heads * head_dim * itemsize)


def tokens_without_values(memory, layers, heads, kv_heads, head_dim, itemsize):
    return memory // (layers * kv_heads * head_dim * itemsize)


def tokens_in_fractions(memory, layers, heads, kv_heads, head_dim, itemsize):
    return memory / (2 * layers * kv_heads * head_dim * itemsize)


def step(q, k, v, keys, values):
    keys, values = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
    return attend(q, keys, values, causal=True), keys, values


def step_sees_the_future(q, k, v, keys, values):
    keys, values = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
    return attend(q, keys, values), keys, values


def step_top_left(q, k, v, keys, values):
    keys, values = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
    mask = torch.ones(q.shape[2], keys.shape[2], dtype=torch.bool).tril()
    return attend(q, keys, values, mask=mask), keys, values


def step_does_not_see_itself(q, k, v, keys, values):
    out = attend(q, keys, values)
    return out, torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)


def step_forgets(q, k, v, keys, values):
    return step(q, k, v, keys, values)[0], keys, values


def visible(lengths, T, S):
    queries = lengths[:, None] + torch.arange(T)
    return (torch.arange(S) <= queries[:, :, None])[:, None]


def visible_by_the_longest(lengths, T, S):
    return visible(lengths.max().expand(len(lengths)), T, S)


def visible_whole_chunk(lengths, T, S):
    return (torch.arange(S) < (lengths + T)[:, None])[:, None, None].expand(-1, 1, T, S)


def visible_without_itself(lengths, T, S):
    queries = lengths[:, None] + torch.arange(T)
    return (torch.arange(S) < queries[:, :, None])[:, None]


def slot(position, window, sinks):
    return position if position < sinks else sinks + (position - sinks) % window


def slot_round_everything(position, window, sinks):
    return position % (window + sinks)


def slot_out_of_step(position, window, sinks):
    return position if position < sinks else sinks + position % window


def step_unscaled(q, k, v, keys, values):
    keys, values = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
    return attend(q, keys, values, causal=True, scale=1.0), keys, values


def tokens_whatever_the_number(memory, layers, heads, kv_heads, head_dim, itemsize):
    return memory // (2 * layers * kv_heads * head_dim)


RIGHT = {
    "kv_cache.tokens_that_fit": tokens_that_fit,
    "kv_cache.step": step,
    "kv_cache.visible": visible,
    "kv_cache.slot": slot,
}
ALSO_RIGHT = {
    "kv_cache.tokens_that_fit": [lambda *shape: torch.tensor(tokens_that_fit(*shape))],
    "kv_cache.step": [lambda *tensors: list(step(*tensors))],
}
WRONG = {
    "kv_cache.tokens_that_fit": [
        tokens_by_query_heads,
        tokens_without_values,
        tokens_in_fractions,
        tokens_whatever_the_number,
    ],
    "kv_cache.step": [step_sees_the_future, step_top_left, step_does_not_see_itself, step_forgets, step_unscaled],
    "kv_cache.visible": [visible_by_the_longest, visible_whole_chunk, visible_without_itself],
    "kv_cache.slot": [slot_round_everything, slot_out_of_step],
}
