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


def verify(logits, guesses):
    """logits (guesses + 1, vocabulary) -> how many guesses are accepted, and the token that follows them."""
    said = logits.argmax(-1).tolist()
    accepted = 0
    while accepted < len(guesses) and guesses[accepted] == said[accepted]:
        accepted += 1
    return accepted, said[accepted]


def speculate(model, cache, draft, text, new_tokens, n, verify=verify, kept=lambda text, accepted, n: len(text) - 1):
    text, end = list(text), len(text) + new_tokens
    start = len(text)
    while len(text) < end:
        guesses = list(draft(text, min(n, end - len(text) - 1)))
        logits = model(torch.tensor([text[-1:] + guesses]), cache=cache)[0]
        accepted, following = verify(logits, guesses)
        text += [*guesses[:accepted], following]
        cache.truncate([kept(text, accepted, len(guesses))])
    return text[start:]


def speculate_and_cut_at_the_end(model, cache, draft, text, new_tokens, n):
    text, new = torch.tensor(text), torch.tensor([], dtype=torch.int64)
    while len(new) < new_tokens:
        whole = torch.cat([text, new])
        guesses = torch.tensor(draft(whole.tolist(), n), dtype=torch.int64)
        said = model(torch.cat([whole[-1:], guesses])[None], cache=cache)[0].argmax(-1)
        accepted = int((guesses == said[:-1]).cumprod(0).sum())
        new = torch.cat([new, said[: accepted + 1]])[:new_tokens]
        cache.truncate([len(text) + len(new) - 1])
    return new


def greedy_one_by_one(model, cache, draft, text, new_tokens, n):
    return speculate(model, cache, draft, text, new_tokens, 0)


def speculate_never_cuts(model, cache, draft, text, new_tokens, n):
    return speculate(model, cache, draft, text, new_tokens, n, kept=lambda text, accepted, n: int(cache.lengths[0]))


def speculate_cuts_one_too_few(model, cache, draft, text, new_tokens, n):
    def kept(text, accepted, n):
        return min(len(text), int(cache.lengths[0]))

    return speculate(model, cache, draft, text, new_tokens, n, kept=kept)


def speculate_cuts_one_too_many(model, cache, draft, text, new_tokens, n):
    return speculate(model, cache, draft, text, new_tokens, n, kept=lambda text, accepted, n: len(text) - 2)


def speculate_counts_all_that_agree(model, cache, draft, text, new_tokens, n):
    def agree(logits, guesses):
        said = logits.argmax(-1).tolist()
        accepted = sum(a == b for a, b in zip(guesses, said, strict=False))
        return accepted, said[accepted]

    return speculate(model, cache, draft, text, new_tokens, n, verify=agree)


def speculate_reads_the_row_behind(model, cache, draft, text, new_tokens, n):
    return speculate(
        model, cache, draft, text, new_tokens, n, verify=lambda logits, guesses: verify(logits.roll(-1, 0), guesses)
    )


def speculate_takes_the_last_row(model, cache, draft, text, new_tokens, n):
    def last(logits, guesses):
        return verify(logits, guesses)[0], int(logits[-1].argmax())

    return speculate(model, cache, draft, text, new_tokens, n, verify=last)


def speculate_believes_the_draft(model, cache, draft, text, new_tokens, n):
    return speculate(
        model,
        cache,
        draft,
        text,
        new_tokens,
        n,
        verify=lambda logits, guesses: (len(guesses), int(logits[-1].argmax())),
    )


def speculate_without_a_token_of_its_own(model, cache, draft, text, new_tokens, n):
    """Where all guesses are right, the last row is thrown away."""
    new, start = [], len(text)
    while len(new) < new_tokens:
        whole = list(text) + new
        guesses = draft(whole, n)
        accepted, following = verify(model(torch.tensor([whole[-1:] + guesses]), cache=cache)[0], guesses)
        new += guesses[:accepted] if accepted == n else [*guesses[:accepted], following]
        new = new[:new_tokens]
        cache.truncate([start + len(new) - 1])
    return new


def speculate_stalls(model, cache, draft, text, new_tokens, n):
    """Only guesses are ever written."""
    new, start = [], len(text)
    while len(new) < new_tokens:
        whole = list(text) + new
        guesses = draft(whole, n)
        accepted, _ = verify(model(torch.tensor([whole[-1:] + guesses]), cache=cache)[0], guesses)
        new += guesses[:accepted]
        cache.truncate([start + len(new) - 1])
    return new[:new_tokens]


def speculate_writes_too_much(model, cache, draft, text, new_tokens, n):
    new = []
    while len(new) < new_tokens:
        new += speculate(model, cache, lambda text, _: draft(text, n), list(text) + new, 1, n)
    return new


def speculate_reads_the_prompt_again(model, cache, draft, text, new_tokens, n):
    def whole(tokens, cache):
        held = cache.tokens[:]
        cache.truncate([0])
        return model(torch.cat([torch.tensor([held]), tokens], dim=1), cache=cache)[:, len(held) :]

    return speculate(whole, cache, draft, text, new_tokens, n)


def step_with_a_number_that_is_only_large(q, k, v, keys, values):
    keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
    scores = q @ keys.mT / q.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(scores.shape[-1] - scores.shape[-2] + 1)
    return scores.masked_fill(future, -1e4).softmax(-1) @ values, keys, values


def tokens_that_fit_of_two_bytes(memory, layers, heads, kv_heads, head_dim, itemsize):
    return memory // (4 * layers * kv_heads * head_dim) // (itemsize // 2 or 1)


RIGHT = {
    "kv_cache.tokens_that_fit": tokens_that_fit,
    "kv_cache.step": step,
    "kv_cache.visible": visible,
    "kv_cache.slot": slot,
    "kv_cache.speculate": speculate,
}
ALSO_RIGHT = {
    "kv_cache.tokens_that_fit": [lambda *shape: torch.tensor(tokens_that_fit(*shape))],
    "kv_cache.step": [lambda *tensors: list(step(*tensors))],
    "kv_cache.speculate": [speculate_and_cut_at_the_end],
}
WRONG = {
    "kv_cache.tokens_that_fit": [
        tokens_that_fit_of_two_bytes,
        tokens_by_query_heads,
        tokens_without_values,
        tokens_in_fractions,
        tokens_whatever_the_number,
    ],
    "kv_cache.step": [
        step_with_a_number_that_is_only_large,
        step_sees_the_future,
        step_top_left,
        step_does_not_see_itself,
        step_forgets,
        step_unscaled,
    ],
    "kv_cache.visible": [visible_by_the_longest, visible_whole_chunk, visible_without_itself],
    "kv_cache.slot": [slot_round_everything, slot_out_of_step],
    "kv_cache.speculate": [
        greedy_one_by_one,
        speculate_never_cuts,
        speculate_cuts_one_too_few,
        speculate_cuts_one_too_many,
        speculate_counts_all_that_agree,
        speculate_reads_the_row_behind,
        speculate_takes_the_last_row,
        speculate_believes_the_draft,
        speculate_without_a_token_of_its_own,
        speculate_stalls,
        speculate_writes_too_much,
        speculate_reads_the_prompt_again,
        lambda model, cache, draft, text, new_tokens, n: text + speculate(model, cache, draft, text, new_tokens, n),
        lambda model, cache, draft, text, new_tokens, n: draft(text, new_tokens),
    ],
}
