"""The cache stepper of chapter 09: what lies where in each cache, pass by pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tformer_lib.attention import attend
from tformer_lib.kv_cache import CacheShape, GrowingCache, KVCache, PreallocatedCache, RingCache
from tformer_lib.teaching.widgets import Interactive, module


class CacheStepper(Interactive):
    """Choose a cache, go from pass to pass, and see the slots of two rows fill."""

    _esm = module("kv_cache.js")


def stepper(prompts: Sequence[int] = (5, 2), new: int = 7, window: int = 4, sinks: int = 2) -> CacheStepper:
    """The stepper for prompts of these lengths and ``new`` decoded tokens, as the caches of the library hold them."""
    shape = CacheShape(layers=1, batch=len(prompts), kv_heads=1, head_dim=1)
    caches = {
        "growing": GrowingCache(shape),
        "preallocated": PreallocatedCache(shape, max(prompts) + new),
        f"ring: {sinks} sinks and a window of {window}": RingCache(shape, window, sinks),
    }
    return CacheStepper(
        label="Cache stepper: prefill two prompts, then decode",
        data={"caches": {name: passes(cache, prompts, new) for name, cache in caches.items()}},
    )


def passes(cache: KVCache, prompts: Sequence[int], new: int) -> list[dict]:
    """Prefill, then decode; after each pass the position in each slot of each row (-1 for none), and which are new."""
    states = []
    for counts in [list(prompts), *([[1] * len(prompts)] * new)]:
        before = list(cache.host_lengths)
        push(cache, counts)
        states.append({"slots": held(cache).tolist(), "before": before, "after": list(cache.host_lengths)})
    return states


def push(cache: KVCache, counts: list[int]) -> None:
    """Append counts[b] tokens to row b."""
    T = max(counts)
    if min(counts) < T:
        cache.expect(counts)
    x = torch.zeros(len(counts), 1, T, 1)
    cache.layer(0).attend(x, x, x, attend=attend)
    cache.advance(T)


def held(cache: KVCache) -> Tensor:
    """(batch, slots) int64: the position of the token in each slot, -1 where there is none."""
    if isinstance(cache, GrowingCache):
        return cache.column_positions
    if isinstance(cache, RingCache):
        return cache.slot_positions()
    return cache.slots.where(cache.slots < cache.lengths[:, None], -1)
