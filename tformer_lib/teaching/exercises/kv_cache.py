"""The exercises of the KV cache chapter."""

import operator

import torch

from tformer_lib import masks
from tformer_lib.attention import attend
from tformer_lib.kv_cache import CacheShape, RingCache
from tformer_lib.teaching.exercises.engine import exercise, require, require_close, require_dtype, require_shape


@exercise(
    "kv_cache.tokens_that_fit",
    title="How many tokens fit into a memory",
    hints=(
        "Count the bytes of one token first: which tensors does each layer keep for it, and of what shape?",
        "A key and a value, in every layer, for every kv head (not for every query head), head_dim numbers each.",
        "memory // (2 * layers * kv_heads * head_dim * itemsize): a token fits wholly or not at all.",
    ),
)
def check_tokens_that_fit(fn):
    cases = (
        ((80 * 2**30, 32, 32, 32, 128, 2), 163_840, "Llama 2 7B"),
        ((80 * 2**30, 32, 32, 8, 128, 2), 655_360, "Llama 3 8B, whose 32 query heads share 8 kv heads"),
        ((1_000_000, 12, 12, 12, 64, 2), 27, "GPT-2 with a megabyte"),
        ((36_863, 12, 12, 12, 64, 2), 0, "a memory that is one byte short of a token"),
    )
    memory, layers, heads, kv_heads, head_dim, _ = cases[0][0]
    require(
        fn(memory, layers, heads, kv_heads, head_dim, 2) != fn(memory, layers, heads, kv_heads, head_dim, 4),
        "numbers of 4 bytes take more memory than those of 2, and you find room for as many tokens",
    )
    for arguments, expected, name in cases:
        found = fn(*arguments)
        try:
            found = operator.index(found)
        except TypeError:
            require(False, f"{name}: the number of tokens should be an int, and is {type(found).__name__}")
        per_head = arguments[0] // (2 * arguments[1] * arguments[2] * arguments[4] * arguments[5])
        require(
            found == expected or found != per_head,
            f"{name}: {found:,} would fit if each query head kept keys and values, expected {expected:,}",
        )
        require(
            found != 2 * expected or not expected, f"{name}: {found:,} is twice too many: a value goes with each key"
        )
        require(found == expected, f"{name}: {found:,} tokens, expected {expected:,}")


@exercise(
    "kv_cache.step",
    title="Attention with a cache, for one new token or several",
    hints=(
        "Append the new keys and values along the axis of the length, which is the third.",
        "With several new tokens, the first of them must not see the last: which mask is aligned to the last key?",
        "masks.causal(T, S) with S the length after appending; or attend(..., causal=True), which is aligned so.",
    ),
)
def check_step(fn):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 9, 8, generator=generator)
    wanted = attend(q, k, v, causal=True)
    keys, values = k[:, :, :3], v[:, :, :3]
    for start, stop in ((3, 4), (4, 7), (7, 9)):
        new = slice(start, stop)
        answer = fn(q[:, :, new], k[:, :, new], v[:, :, new], keys, values)
        require(
            isinstance(answer, (tuple, list)) and len(answer) == 3,
            "return three things: the output, all keys, all values",
        )
        out, keys, values = answer
        require_close(
            keys, k[:, :, :stop], "the keys returned are not the old ones followed by the new", name="the keys"
        )
        require_close(values, v[:, :, :stop], "the values are not the old ones followed by the new", name="the values")
        require_shape(out, (2, 4, stop - start, 8), "the output")
        explain_step(out, q[:, :, new], k[:, :, :stop], v[:, :, :stop], start)
        for t in range(stop - start):
            place = f"with {start} tokens cached and {stop - start} new, the new token {t}"
            require_close(
                out[:, :, t], wanted[:, :, start + t], f"{place} does not see exactly the tokens up to itself"
            )


def explain_step(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, held: int) -> None:
    """Name the usual mistakes in what the T new queries see of the S keys, ``held`` of them old."""
    T, S = q.shape[2], k.shape[2]
    mistakes = {
        "the scores are not divided by sqrt(head_dim)": attend(q, k, v, causal=True, scale=1.0),
        "the new tokens do not see themselves: append first, then look": attend(q, k[:, :, :held], v[:, :, :held]),
        "the mask is aligned to the first key: new token 0 sees one key, and not all that are cached": attend(
            q, k, v, mask=masks.causal(S)[:T]
        ),
    }
    if T > 1:
        mistakes[f"of {T} new tokens, the first sees the last: the future leaks"] = attend(q, k, v)
    for words, wrong in mistakes.items():
        require(not torch.allclose(out, wrong.to(out.dtype), atol=1e-4), words)


@exercise(
    "kv_cache.visible",
    title="The mask of a ragged batch",
    hints=(
        "Row b holds lengths[b] tokens; where does its new query t stand?",
        "At position lengths[b] + t. It may see the slots up to there, of the S slots there are.",
        "(torch.arange(S) <= (lengths[:, None] + torch.arange(T))[:, :, None])[:, None]",
    ),
)
def check_visible(fn):
    for lengths, T, S in (([3, 0, 5], 1, 8), ([2, 4], 3, 7), ([0], 4, 4)):
        mask = fn(torch.tensor(lengths), T, S)
        name = f"the mask for lengths {lengths}, T = {T}, S = {S}"
        require_shape(mask, (len(lengths), 1, T, S), name)
        require_dtype(mask, torch.bool, name)
        for b, length in enumerate(lengths):
            for t in range(T):
                seen = mask[b, 0, t].nonzero().flatten().tolist()
                if seen != list(range(length + t + 1)):
                    require(False, explain(b, t, length, seen))


def explain(b: int, t: int, length: int, seen: list[int]) -> str:
    """What is wrong with the slots that a query sees."""
    last = length + t
    beyond = [slot for slot in seen if slot > last]
    missing = [slot for slot in range(last + 1) if slot not in seen]
    fault = f"sees slot {beyond[0]}, which is not its past" if beyond else f"does not see slot {missing[0]}"
    return f"row {b} holds {length} tokens, so its new query {t} stands at position {last}, but it {fault}"


@exercise(
    "kv_cache.slot",
    title="The slot of a token in a ring with sinks",
    hints=(
        "The first `sinks` positions keep their own slots for good. What is left for the others?",
        "`window` slots behind the sinks, used round and round: count positions from the first that is no sink.",
        "position if position < sinks else sinks + (position - sinks) % window",
    ),
)
def check_slot(fn):
    for window, sinks in ((4, 2), (3, 0), (1, 1), (5, 4)):
        ring = RingCache(CacheShape(1, 1, 1, 2), window, sinks)
        place = f"window = {window}, sinks = {sinks}"
        for position in range(4 * (window + sinks)):
            found, expected = int(fn(position, window, sinks)), int(ring.slot(torch.tensor(position)))
            require(
                0 <= found < window + sinks, f"{place}: position {position} goes to slot {found}, which does not exist"
            )
            if position >= sinks:
                require(found >= sinks, f"{place}: position {position} overwrites the sink in slot {found}")
            require(found == expected, f"{place}: position {position} goes to slot {found}, expected {expected}")
