"""KV caches: keep each token's keys and values, so that the next token costs one token's work, not the whole text's.

A decoder's keys and values at a position depend on the tokens up to there and on nothing later. Once computed they
never change, so a generated token needs only its own query, key and value, and one look over the stored ones.

Three caches stand behind one interface, which ``Decoder.forward(tokens, cache=cache)`` drives:

- :class:`GrowingCache` concatenates: the idea in its shortest form, with a copy of everything at each token.
- :class:`PreallocatedCache` writes into memory that it reserved: no copies, fixed addresses, a limit.
- :class:`RingCache` keeps the first few tokens and the latest window, so that its memory never grows.

A model whose layers are of different kinds has a :class:`ModelCache`, which gives each kind the one that it needs.

The interface, which a paged cache implements as well:

- ``cache.expect(counts)``: the next pass is ragged, row b brings counts[b] real tokens and padding to their right.
- ``cache.positions(T)``: (batch, T) the places of the next T tokens. ``cache.lengths``: (batch,) tokens held so far.
- ``cache.layer(i).attend(q, k, v, attend=..., mask=...)``: store the T new keys and values, and attend over all held.
- ``cache.advance(T)``: the pass is over, its tokens count from now on.

A cache serves inference: what it stores carries no gradient.
"""

from tformer_lib.kv_cache.cost import Cost, cache_bytes, pass_cost
from tformer_lib.kv_cache.growing import GrowingCache
from tformer_lib.kv_cache.interface import CacheShape, KVCache, LayerCache, Pass, whole_numbers
from tformer_lib.kv_cache.model_cache import ModelCache
from tformer_lib.kv_cache.preallocated import PreallocatedCache
from tformer_lib.kv_cache.ring import RingCache
from tformer_lib.kv_cache.state import StateCache, StateLayer
from tformer_lib.kv_cache.static import StaticCache

__all__ = [
    "CacheShape",
    "Cost",
    "GrowingCache",
    "KVCache",
    "LayerCache",
    "ModelCache",
    "Pass",
    "PreallocatedCache",
    "RingCache",
    "StateCache",
    "StateLayer",
    "StaticCache",
    "cache_bytes",
    "pass_cost",
    "whole_numbers",
]
