"""Every cache, in every chunking and raggedness, gives the uncached logits; and what cannot fit is refused by name."""

import pytest
import torch
from cache_sessions import CACHES as SESSION_CACHES
from cache_sessions import CAPACITY, VOCABULARY, Session
from cache_sessions import MODELS as SESSION_MODELS
from draws import draws
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tformer_lib import masks
from tformer_lib.kv_cache import (
    CacheShape,
    GrowingCache,
    ModelCache,
    PreallocatedCache,
    RingCache,
    cache_bytes,
    pass_cost,
)
from tformer_lib.paged_attention import PagedKVCache
from tformer_lib.transformer import Decoder, ModelConfig

WINDOW, SINKS = 5, 2
CACHES = {
    "growing": lambda shape: GrowingCache(shape),
    "preallocated": lambda shape: PreallocatedCache(shape, 40),
    "ring": lambda shape: RingCache(shape, WINDOW, SINKS),
    "paged": lambda shape: PagedKVCache(shape, 10 * shape.batch, block_size=4),
}
MODELS = {
    "gpt2-like": {"positions": "learned", "kv_heads": None},
    "llama-like": {"positions": "rope", "kv_heads": 2, "norm": "rmsnorm", "feed_forward": "swiglu", "bias": False},
    "multi-query": {"positions": "rope", "kv_heads": 1, "attention": "attention"},
}


def make_model(name="llama-like", dtype=torch.float64):
    torch.manual_seed(7)
    config = ModelConfig(vocab_size=23, max_length=48, width=32, layers=2, heads=4, **MODELS[name])
    return Decoder(config).to(dtype).eval()


MODEL = {name: make_model(name) for name in MODELS}


def tokens_of(batch, length, seed=0):
    return torch.randint(23, (batch, length), generator=torch.Generator().manual_seed(seed))


def uncached(model, tokens, cache_name):
    """The oracle: one pass over everything, under the mask that the cache promises to be equal to."""
    T = tokens.shape[1]
    mask = None
    if cache_name == "ring":
        mask = masks.sliding_window(T, window=WINDOW) | (masks.causal(T) & (torch.arange(T) < SINKS))
    return model(tokens, mask=mask)


def feed(model, cache, tokens, counts):
    """Append counts[b] tokens of each row, padded on the right; returns each row's logits for its real tokens."""
    T = max(counts)
    batch = torch.full((len(counts), T), 22)
    for row, count in enumerate(counts):
        start = cache.host_lengths[row]
        batch[row, :count] = tokens[row, start : start + count]
    if any(count != T for count in counts):
        cache.expect(counts)
    logits = model(batch, cache=cache)
    return [logits[row, :count] for row, count in enumerate(counts)]


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("name", CACHES)
@draws(25)
@given(data=st.data())
def test_cached_logits_equal_uncached_for_any_split_and_raggedness(name, model_name, data):
    model, rows = MODEL[model_name], data.draw(st.integers(1, 3), "rows")
    chunk = st.lists(st.integers(0, 9), min_size=rows, max_size=rows).filter(any)
    even = st.integers(1, 9).map(lambda n: [n] * rows)
    passes = data.draw(st.lists(st.one_of(chunk, even, st.just([1] * rows)), min_size=1, max_size=6), "passes")
    lengths = [sum(column) for column in zip(*passes, strict=True)]
    if max(lengths) > 40:
        return
    tokens = tokens_of(rows, max(lengths))
    cache = CACHES[name](CacheShape.of(model, rows))
    with torch.no_grad():
        wanted = uncached(model, tokens, name)
        got = [feed(model, cache, tokens, counts) for counts in passes]
    for row in range(rows):
        torch.testing.assert_close(torch.cat([p[row] for p in got]), wanted[row, : lengths[row]], rtol=0, atol=1e-12)
    assert cache.lengths.tolist() == cache.host_lengths == lengths


# Models whose layers are of different kinds, and scores that depend on places

MIXED = {
    "windows and full layers": {
        "positions": "rope",
        "window": 4,
        "layer_types": ("window", "window", "full"),
        "window_rope_base": 100.0,
        "qk_norm": "head",
        "norm": "rmsnorm_1p",
        "branch_norm": "both",
    },
    "windows alone": {"positions": "rope", "window": 5, "attention_sinks": True},
    "wide windows and no RoPE": {"positions": "rope", "window": 30, "layer_types": ("window", "nope")},
    "alibi": {"positions": "alibi"},
    "linear layers, windows and full layers": {
        "positions": "rope",
        "window": 4,
        "layer_types": ("linear", "window", "full"),
        "linear": {"key_heads": 2, "value_heads": 4, "head_dim": 4, "value_dim": 6},
    },
    "linear layers alone": {
        "positions": "none",
        "rotary_fraction": 1.0,
        "layer_types": ("linear",),
        "linear": {"key_heads": 2, "value_heads": 2, "head_dim": 4, "value_dim": 4, "kernel": 2},
    },
    "alibi in windows": {
        "positions": "alibi",
        "window": 4,
        "layer_types": ("window", "full"),
        "attention_softcap": 2.0,
    },
}


def mixed_model(name):
    torch.manual_seed(8)
    options = {"kv_heads": 2, "rotary_fraction": 0.5, **MIXED[name]}
    model = Decoder(ModelConfig(vocab_size=23, max_length=48, width=32, layers=3, heads=4, **options)).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


MIXED_MODEL = {name: mixed_model(name) for name in MIXED}
MIXED_CACHES = {
    "growing": lambda model, rows: GrowingCache(CacheShape.of(model, rows)),
    "preallocated": lambda model, rows: PreallocatedCache(CacheShape.of(model, rows), 40),
    "paged": lambda model, rows: PagedKVCache(CacheShape.of(model, rows), 10 * rows, block_size=4),
    "by kinds": lambda model, rows: ModelCache.of(model, rows, 40),
}


@pytest.mark.parametrize("model_name", MIXED)
@pytest.mark.parametrize("name", MIXED_CACHES)
@draws(12)
@given(data=st.data())
def test_layers_of_every_kind_are_cached_for_any_split_and_raggedness(name, model_name, data):
    model, rows = MIXED_MODEL[model_name], data.draw(st.integers(1, 3), "rows")
    chunk = st.lists(st.integers(0, 9), min_size=rows, max_size=rows).filter(any)
    passes = data.draw(st.lists(st.one_of(chunk, st.just([1] * rows)), min_size=1, max_size=6), "passes")
    lengths = [sum(column) for column in zip(*passes, strict=True)]
    if max(lengths) > 40:
        return
    tokens, cache = tokens_of(rows, max(lengths)), MIXED_CACHES[name](model, rows)
    if model.config.linear is not None and name != "by kinds":
        with pytest.raises(ValueError, match=r"needs a cache that holds states|the cache has layers 0 to"):
            feed(model, cache, tokens, passes[0])
        return
    with torch.no_grad():
        wanted = model(tokens)
        got = [feed(model, cache, tokens, counts) for counts in passes]
    for row in range(rows):
        torch.testing.assert_close(torch.cat([p[row] for p in got]), wanted[row, : lengths[row]], rtol=0, atol=1e-11)
    assert cache.lengths.tolist() == cache.host_lengths == lengths


def test_a_cache_by_kinds_takes_what_its_layers_can_see():
    model = MIXED_MODEL["windows and full layers"]
    cache = ModelCache.of(model, 2, 40)
    assert {name: type(part) for name, part in cache.parts.items()} == {"window": RingCache, "full": PreallocatedCache}
    assert cache.nbytes == 2 * cache_bytes(model.config, 40, itemsize=8) == 2 * 2 * 2 * 8 * 8 * (4 + 4 + 40)
    assert cache.shape.layers == 3
    assert cache.bytes_per_token == 3 * 2 * 2 * 8 * 8
    with pytest.raises(ValueError, match="the cache has layers 0 to 2, got 3"):
        cache.layer(3)
    with pytest.raises(ValueError, match="part full must have 1 layers and 2 rows, got 2 and 2"):
        ModelCache({"full": GrowingCache(CacheShape(2, 2, 1, 4))}, ("full",))


@pytest.mark.parametrize("name", ["windows and full layers", "windows alone", "wide windows and no RoPE"])
def test_a_cache_by_kinds_is_cut_reordered_emptied_and_static(name):
    model = MIXED_MODEL[name]
    cache, tokens = ModelCache.of(model, 2, 40), tokens_of(2, 12)
    with torch.no_grad():
        wanted = model(tokens)
        model(tokens[:, :4], cache=cache)
        cache.truncate([2, 3])
        got = feed(model, cache, tokens, [2, 1])
        torch.testing.assert_close(got[1], wanted[1, 3:4], rtol=0, atol=1e-11)
        cache.reorder([1, 1])
        model(tokens[1:, 4:8].repeat(2, 1), cache=cache)
        with cache.static_shapes():
            step = model(tokens[1:, 8:9].repeat(2, 1), cache=cache)
        cache.replayed()
        torch.testing.assert_close(step[:, 0], wanted[1, 8].repeat(2, 1), rtol=0, atol=1e-11)
        assert cache.lengths.tolist() == cache.host_lengths == [9, 9]
        cache.reset()
        torch.testing.assert_close(model(tokens, cache=cache), wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["linear layers, windows and full layers", "linear layers alone"])
def test_states_are_reordered_emptied_kept_by_a_pass_that_fails_and_never_cut(name):
    model = MIXED_MODEL[name]
    cache, tokens = ModelCache.of(model, 2, 40), tokens_of(2, 12)
    with torch.no_grad():
        wanted = model(tokens)
        feed(model, cache, tokens, [4, 3])
        before = cache.nbytes
        with pytest.raises(ValueError, match="row 0 holds 4 tokens in one state, which cannot be cut to 2"):
            cache.truncate([2, 3])
        if "window" not in cache.parts:  # a ring has lost what a pass that fails overwrote, and says so
            last = model.stack.final_norm
            model.stack.final_norm = None  # the pass fails after all layers
            with pytest.raises(TypeError):
                feed(model, cache, tokens, [2, 2])
            model.stack.final_norm = last
        got = feed(model, cache, tokens, [2, 1])
        torch.testing.assert_close(got[0], wanted[0, 4:6], rtol=0, atol=1e-11)
        cache.reorder([0, 0])
        with cache.static_shapes():
            step = model(tokens[:1, 6:7].repeat(2, 1), cache=cache)
        cache.replayed()
        torch.testing.assert_close(step[:, 0], wanted[0, 6].repeat(2, 1), rtol=0, atol=1e-11)
        assert cache.lengths.tolist() == cache.host_lengths == [7, 7]
        assert cache.nbytes == before == 2 * cache_bytes(model.config, 40, itemsize=8)
        cache.reset()
        torch.testing.assert_close(model(tokens, cache=cache), wanted, rtol=0, atol=1e-11)


# Sequences of operations

PROGRAMS = {
    "rows of one length with holes": "append 6,8,8; append 9,7,7; append 1,1,1",
    "truncate, and catch up": "append 5,5; truncate 3,5; append 2,0; append 1,1",
    "reorder after a ragged prefill": "append 3,5; reorder 0,0; append 1,1",
    "drop the longest row": "append 2,4; reorder 0; append 3; append 1",
    "more padding than the longest row needs": "append_padded 2,2; append 1,1",
    "a prefill over holes": "append 4,1; append 0,3; append 4,4",
    "a mask over holes": "append 3,5; append_masked 2,2; append 2,0; append 1,1",
    "a mask past a window": "append 9,4; append_masked 1,1; append_masked 3,2; append 1,1",
    "expect, and reorder before the pass": "append 3,3; announce 2,0; reorder 1,0; append 2,2",
    "expect, and fewer rows": "append 3,3; announce 2,0; reorder 1; append 1",
    "expect, and truncate": "append 3,3; announce 2,0; truncate 3,2; append 2,2",
    "expect, truncate, and a static pass": "append 3,2; announce 1,0; truncate 3,2; static 1",
    "a pass that died on NaN": "append 2,3; die 3,1; append 1,2; append 0,1",
    "died, then reordered": "append 2,3; die 3,1; reorder 1,0; append 1,1",
    "died, then truncated": "append 2,3; die 2,2; truncate 1,3; append 3,1",
    "died, then static": "append 2,3; die 3,1; truncate 2,3; static 1; static 1",
    "one row forgotten, whose window is full": "append 9,9; truncate 0,9; append 1,1; append 8,1; append 1,1",
    "full, and smaller": "append 20,3; append 5,1; append 2,1; truncate 1,4; append 2,2",
    "reused, forked and written": "append 6,6; publish 0; reuse 1,0,6; append 0,3; reorder 1,1; append 1,2",
    "published, truncated and written": "append 8,2; publish 0; truncate 6,2; append 2,0; reuse 1,2,8; append 1,1",
}
"""The shortest sequences of each kind that was ever wrong, or could be."""


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("name", SESSION_CACHES)
@torch.no_grad()
def test_known_sequences_equal_recomputation(name, program):
    session = None
    for operation, numbers in (step.split() for step in PROGRAMS[program].split("; ")):
        numbers = [int(number) for number in numbers.split(",")]
        session = session or Session(name, rows=len(numbers))
        session.do(operation, numbers)
        session.check()


@torch.no_grad()
def test_a_prompt_that_is_too_long_for_a_row_is_refused_and_changes_nothing():
    session = Session("paged", rows=2)
    session.append([CAPACITY, 3])
    session.publish(0)
    session.reuse(1, 0, CAPACITY)  # and one token more
    session.check()
    assert session.lengths == [CAPACITY, 3]
    session.reuse(1, 0, CAPACITY - 1)
    session.append([0, 1])
    session.check()


class AnyOrder(RuleBasedStateMachine):
    """Operations in any order on one kind of cache; what a row holds is compared with recomputation after each rule."""

    cache = ""

    @initialize(rows=st.integers(1, 3), form=st.sampled_from(sorted(SESSION_MODELS)))
    def begin(self, rows, form):
        self.session = Session(self.cache, rows, form)

    def numbers(self, data, least, most):
        rows = len(self.session.texts)
        return data.draw(st.lists(st.integers(least, most), min_size=rows, max_size=rows))

    masked = st.sampled_from([0.0, 0.0, 0.4])

    @rule(data=st.data(), padding=st.integers(0, 2), mask=masked)
    def append_ragged(self, data, padding, mask):
        self.session.append(self.numbers(data, 0, 6), padding=padding, mask=mask)

    @rule(count=st.integers(0, 6), mask=masked)
    def append_even(self, count, mask):
        self.session.append([count] * len(self.session.texts), mask=mask)

    @rule(steps=st.integers(1, 3), mask=masked)
    def decode(self, steps, mask):
        for _ in range(steps):
            self.session.append([1] * len(self.session.texts), mask=mask)

    @rule(steps=st.integers(1, 3))
    def decode_static(self, steps):
        if not self.session.announced:
            self.session.static(steps)

    @rule(steps=st.integers(0, 2), mask=masked)
    def catch_up(self, steps, mask):
        """Every row becomes as long as the longest: by the lengths alone, nothing seems to have been ragged."""
        lengths = self.session.lengths
        self.session.append([max(lengths) - n for n in lengths])
        self.decode(steps, mask)

    @rule(data=st.data(), edit=st.sampled_from(["truncate", "reorder", "reset"]))
    def edit(self, data, edit):
        if edit == "truncate":
            self.session.truncate([data.draw(st.integers(0, n)) for n in self.session.lengths])
        elif edit == "reorder":
            row = st.integers(0, len(self.session.texts) - 1)
            self.session.reorder(data.draw(st.lists(row, min_size=1, max_size=3)))
        else:
            self.session.reset()

    @rule(data=st.data(), edit=st.sampled_from(["truncate", "reorder", "reset"]))
    def edit_after_an_expectation(self, data, edit):
        self.session.announce(self.numbers(data, 0, 4))
        self.edit(data, edit)

    @rule(data=st.data(), goes_on=st.booleans())
    def die(self, data, goes_on):
        self.session.die(self.numbers(data, 0, 4))
        if goes_on:
            self.session.append(self.numbers(data, 0, 4))

    @rule(data=st.data(), rewrites=st.booleans())
    def publish(self, data, rewrites):
        row = data.draw(st.integers(0, len(self.session.texts) - 1))
        self.session.publish(row)
        if rewrites:  # the end of what was published
            lengths = self.session.lengths
            lengths[row] = max(0, lengths[row] - data.draw(st.integers(1, 3)))
            self.session.truncate(lengths)
            self.append_ragged(data, 0, 0.0)

    @rule(data=st.data(), keep=st.integers(0, CAPACITY))
    def reuse(self, data, keep):
        row = data.draw(st.integers(0, len(self.session.texts) - 1))
        self.session.reuse(row, data.draw(st.integers(0, len(self.session.prompts) - 1)), keep)

    @invariant()
    def books_agree(self):
        if hasattr(self, "session"):
            self.session.check()


@pytest.mark.parametrize("name", SESSION_CACHES)
@torch.no_grad()
def test_operations_in_any_order_equal_recomputation(name):
    machine = type(name, (AnyOrder,), {"cache": name})
    run_state_machine_as_test(
        machine, settings=draws(150, stateful_step_count=15, suppress_health_check=[*HealthCheck])
    )


@pytest.mark.parametrize("name", SESSION_CACHES)
@torch.no_grad()
def test_a_pass_is_counted_with_its_own_length_or_not_at_all(name, monkeypatch):
    model, tokens = SESSION_MODELS["sdpa"][name], tokens_of(2, 6) % VOCABULARY
    cache, wanted = SESSION_CACHES[name](model, 2), model(tokens)
    model(tokens[:, :2], cache=cache)
    for wrong in (-1, 1):
        with monkeypatch.context() as patch:
            patch.setattr(cache, "advance", lambda T, wrong=wrong: type(cache).advance(cache, T + wrong))
            with pytest.raises(ValueError, match="brought 3 tokens"):
                model(tokens[:, 2:5], cache=cache)
        assert cache.host_lengths == [2, 2]
    torch.testing.assert_close(model(tokens[:, 2:], cache=cache), wanted[:, 2:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CACHES)
@torch.no_grad()
def test_float32_decode_equals_uncached_at_every_step(name):
    model, tokens = make_model(dtype=torch.float32), tokens_of(2, 30)
    cache = CACHES[name](CacheShape.of(model, 2))
    wanted = uncached(model, tokens, name)
    got = torch.cat([model(tokens[:, i : i + 1], cache=cache) for i in range(30)], dim=1)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_padding_is_never_seen_whatever_it_holds(name, poison):
    shape = CacheShape(layers=1, batch=2, kv_heads=1, head_dim=4, dtype=torch.float64)
    k, v, q = torch.randn(3, 2, 1, 12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    outputs = []
    for hostile in (False, True):
        cache = CACHES[name](shape)
        outs = []
        for start, counts in ((0, [8, 3]), (8, [1, 1]), (9, [0, 3])):
            T = max(counts)
            parts = [x[:, :, start : start + T].clone() for x in (q, k, v)]
            for row, count in enumerate(counts):
                for x in parts:
                    x[row, :, count:] = poison if hostile else 0.0
            cache.expect(counts)
            out = cache.layer(0).attend(*parts, attend=reference)
            cache.advance(T)
            outs += [out[row, :, :count] for row, count in enumerate(counts)]
            assert all((out[row, :, count:] == 0).all() for row, count in enumerate(counts))
        outputs.append(torch.cat([x.flatten() for x in outs]))
    assert outputs[0].isfinite().all()
    assert torch.equal(*outputs)


def reference(q, k, v, **options):
    from tformer_lib.attention import attend

    return attend(q, k, v, **options)


@pytest.mark.parametrize("name", CACHES)
def test_every_attention_form_may_be_given(name):
    from tformer_lib.attention import attend, attend_sdpa

    shape = CacheShape(layers=1, batch=2, kv_heads=2, head_dim=8, dtype=torch.float64)
    q, (k, v) = torch.randn(2, 4, 20, 8, dtype=torch.float64), torch.randn(2, 2, 2, 20, 8, dtype=torch.float64)
    results = []
    for form in (attend, attend_sdpa):
        cache = CACHES[name](shape)
        outs = []
        for start, stop in ((0, 6), (6, 7), (7, 19), (19, 20)):
            part = slice(start, stop)
            outs.append(cache.layer(0).attend(q[:, :, part], k[:, :, part], v[:, :, part], attend=form))
            cache.advance(stop - start)
        results.append(torch.cat(outs, dim=2))
    torch.testing.assert_close(*results)


@torch.no_grad()
def test_a_mask_on_top_of_causality_is_obeyed():
    model, tokens = MODEL["llama-like"], tokens_of(2, 12)
    mask = torch.rand(12, 12, generator=torch.Generator().manual_seed(3)) < 0.6
    cache = PreallocatedCache(CacheShape.of(model, 2), 16)
    got = [model(tokens[:, :7], mask=mask[:7, :7], cache=cache), model(tokens[:, 7:], mask=mask[7:], cache=cache)]
    torch.testing.assert_close(torch.cat(got, dim=1), model(tokens, mask=mask))


# Memory


@pytest.mark.parametrize(("kv_heads", "dtype", "expected"), [(4, torch.float32, 512), (1, torch.bfloat16, 64)])
def test_bytes_per_token_are_what_the_formula_says_and_what_is_allocated(kv_heads, dtype, expected):
    shape = CacheShape(layers=2, batch=3, kv_heads=kv_heads, head_dim=8, dtype=dtype)
    assert shape.bytes_per_token == 2 * 2 * kv_heads * 8 * dtype.itemsize == expected
    assert PreallocatedCache(shape, 10).nbytes == 3 * 10 * expected
    assert RingCache(shape, 5, 2).nbytes == 3 * 7 * expected
    growing = GrowingCache(shape)
    new = torch.zeros(3, kv_heads, 4, 8, dtype=dtype)
    for tokens in (4, 8):
        for layer in range(2):
            growing.layer(layer).attend(new, new, new, attend=reference)
        growing.advance(4)
        assert growing.nbytes == 3 * tokens * expected


@pytest.mark.parametrize(("held", "new"), [(0, 1), (0, 7), (7, 1), (5, 3)])
@pytest.mark.parametrize("name", ["gpt2-like", "llama-like"])
def test_pass_cost_counts_the_flops_that_torch_counts(name, held, new):
    from torch.utils.flop_counter import FlopCounterMode

    options = MODELS[name] | {"attention": "attention"}
    config = ModelConfig(vocab_size=23, max_length=48, width=32, layers=2, heads=4, **options)
    model, tokens = Decoder(config), tokens_of(1, held + new)
    cache = GrowingCache(CacheShape.of(model, 1))
    with torch.no_grad():
        if held:
            model(tokens[:, :held], cache=cache)
        with FlopCounterMode(display=False) as counter:
            model(tokens[:, held:], cache=cache)
    hidden_pairs = new * (new - 1) // 2  # the dense product computes them, causality throws them away
    cost = pass_cost(config, held=held, new=new)
    assert counter.get_total_flops() == cost.flops + 2 * 4 * 32 * hidden_pairs
    weights = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embedding.places" not in n)
    assert cost.bytes == 4 * weights + (held + new) * CacheShape.of(model, 1).bytes_per_token


def test_the_ring_never_grows():
    shape = CacheShape(layers=1, batch=1, kv_heads=1, head_dim=2)
    cache = RingCache(shape, WINDOW, SINKS)
    address, size = cache.keys.data_ptr(), cache.nbytes
    new = torch.randn(1, 1, 3, 2)
    for _ in range(50):
        cache.layer(0).attend(new, new, new, attend=reference)
        cache.advance(3)
    assert (cache.keys.data_ptr(), cache.nbytes, cache.host_lengths) == (address, size, [150])


def test_the_cache_returns_views_of_its_memory_not_copies():
    cache = PreallocatedCache(CacheShape(1, 2, 1, 4), 16)
    seen = []
    new = torch.randn(2, 1, 3, 4)
    cache.layer(0).attend(new, new, new, attend=lambda q, k, v, **_: seen.extend([k, v]) or q)
    assert [x.untyped_storage().data_ptr() for x in seen] == [
        x.untyped_storage().data_ptr() for x in (cache.keys, cache.values)
    ]


# Editing


@pytest.mark.parametrize("name", ["growing", "preallocated", "paged"])
@torch.no_grad()
def test_truncated_rows_go_on_as_if_the_rest_had_never_been(name):
    model, tokens, other = MODEL["llama-like"], tokens_of(3, 12), tokens_of(3, 12, seed=9)
    cache = CACHES[name](CacheShape.of(model, 3))
    feed(model, cache, tokens, [9, 4, 12])
    cache.truncate([5, 4, 0])
    edited = torch.stack([torch.cat([tokens[b, :n], other[b, n:]]) for b, n in enumerate((5, 4, 0))])
    for counts in ([3, 1, 2], [1, 1, 1], [2, 6, 4]):
        before = list(cache.host_lengths)
        for row, logits in enumerate(feed(model, cache, edited, counts)):
            wanted = model(edited)[row, before[row] : before[row] + counts[row]]
            torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CACHES)
@torch.no_grad()
def test_reordered_and_forked_rows_carry_their_past(name):
    model, tokens = MODEL["llama-like"], tokens_of(2, 14)
    cache = CACHES[name](CacheShape.of(model, 2))
    feed(model, cache, tokens, [9, 6])
    cache.reorder([1, 0, 1])
    moved = tokens[[1, 0, 1]]
    got = feed(model, cache, moved, [1, 1, 1])
    wanted = uncached(model, moved, name)
    for row, place in enumerate((6, 9, 6)):
        torch.testing.assert_close(got[row][0], wanted[row, place], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CACHES)
@torch.no_grad()
def test_reset_is_as_good_as_new_even_after_nan(name):
    model, tokens = MODEL["llama-like"], tokens_of(2, 9)
    shape = CacheShape.of(model, 2)
    cache = CACHES[name](shape)
    nan = torch.full((2, shape.kv_heads, 9, shape.head_dim), float("nan"), dtype=shape.dtype)
    cache.layer(0).attend(nan.repeat(1, 2, 1, 1), nan, nan, attend=reference)
    cache.advance(9)
    cache.reset()
    got = feed(model, cache, tokens, [9, 2])
    torch.testing.assert_close(got[1], uncached(model, tokens, name)[1, :2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CACHES)
@torch.no_grad()
def test_a_pass_that_brings_nothing_changes_nothing(name):
    model, tokens = MODEL["llama-like"], tokens_of(2, 9)
    cache = CACHES[name](CacheShape.of(model, 2))
    feed(model, cache, tokens, [9, 2])
    assert model(tokens[:, :0], cache=cache).shape == (2, 0, model.config.vocab_size)
    cache.expect([0, 0])
    assert model(tokens[:, :3], cache=cache).isfinite().all()
    assert cache.lengths.tolist() == [9, 2]


def test_a_ring_that_lost_tokens_refuses_to_be_truncated():
    cache = RingCache(CacheShape(1, 1, 1, 2), WINDOW, SINKS)
    new = torch.randn(1, 1, 8, 2)
    cache.layer(0).attend(new, new, new, attend=reference)
    cache.advance(8)
    with pytest.raises(ValueError, match="has lost some"):
        cache.truncate([3])


@torch.no_grad()
def test_a_pass_that_failed_half_way_leaves_the_cache_usable():
    model, tokens = MODEL["llama-like"], tokens_of(1, 8)
    for name in CACHES:
        cache = CACHES[name](CacheShape.of(model, 1))
        feed(model, cache, tokens, [4])
        half = torch.randn(1, 2, 3, 8, dtype=torch.float64)
        cache.layer(0).attend(half.repeat(1, 2, 1, 1), half, half, attend=reference)  # no advance: the pass died
        got = feed(model, cache, tokens, [3])
        if name != "ring":  # a ring may have evicted for the failed pass what it cannot bring back
            torch.testing.assert_close(got[0], model(tokens)[0, 4:7], rtol=0, atol=1e-12)


# Static shapes


@pytest.mark.parametrize("name", ["preallocated", "ring", "paged"])
@torch.no_grad()
def test_static_passes_equal_ordinary_ones_on_ragged_rows(name):
    model, tokens = MODEL["llama-like"], tokens_of(3, 30)
    caches = [CACHES[name](CacheShape.of(model, 3)) for _ in range(2)]
    for cache in caches:
        feed(model, cache, tokens, [5, 2, 8])
    for _ in range(15):
        ordinary = torch.stack(feed(model, caches[0], tokens, [1, 1, 1]))
        new = torch.stack([tokens[b, n : n + 1] for b, n in enumerate(caches[1].host_lengths)])
        caches[1].check_room([n + 1 for n in caches[1].host_lengths])
        with caches[1].static_shapes():
            static = model(new, cache=caches[1])
        caches[1].replayed()
        torch.testing.assert_close(static, ordinary, rtol=0, atol=1e-12)
    assert caches[0].lengths.tolist() == caches[1].lengths.tolist() == caches[1].host_lengths


@torch.no_grad()
def test_a_static_pass_is_one_token_a_row_and_leaves_no_plan_behind():
    model, tokens = MODEL["llama-like"], tokens_of(2, 9)
    for name in ("preallocated", "ring", "paged"):
        cache = CACHES[name](CacheShape.of(model, 2))
        feed(model, cache, tokens, [3, 3])
        cache.expect([1, 0])
        with cache.static_shapes(), pytest.raises(ValueError, match=r"1 token a row, got \[1, 0\]"):
            cache.positions(1)
        cache.truncate([3, 3])
        with cache.static_shapes():
            with cache.static_shapes():
                cache.positions(1)
            assert cache.is_static
        assert not cache.is_static
        got = feed(model, cache, tokens, [1, 1])
        torch.testing.assert_close(got[0], model(tokens)[0, 3:4], rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_ring_whose_pass_died_past_its_window_says_so_until_it_is_reset():
    model, tokens = MODEL["llama-like"], tokens_of(1, 12)
    cache = RingCache(CacheShape.of(model, 1), WINDOW, SINKS)
    feed(model, cache, tokens, [6])
    half = torch.randn(1, 2, 3, 8, dtype=torch.float64)
    cache.layer(0).attend(half.repeat(1, 2, 1, 1), half, half, attend=reference)  # no advance: the pass died
    for edit in (lambda: cache.positions(1), lambda: cache.truncate([2]), lambda: cache.reorder([0])):
        with pytest.raises(ValueError, match=r"hold \[9\] tokens, with those of a pass that failed.* has lost some"):
            edit()
    cache.reset()
    got = feed(model, cache, tokens, [12])
    torch.testing.assert_close(got[0], uncached(model, tokens, "ring")[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["growing", "ring"])
def test_a_mask_that_covers_another_number_of_tokens_is_refused(name):
    cache = CACHES[name](CacheShape(layers=1, batch=2, kv_heads=1, head_dim=4))
    cache.expect([9, 3])
    for T in (9, 1):
        new = torch.randn(2, 1, T, 4)
        wrong = torch.ones(T, 17, dtype=torch.bool)
        with pytest.raises(
            ValueError, match=r"the longest row holds \d+ tokens, which a mask must cover, got \(\d, 17"
        ):
            cache.layer(0).attend(new, new, new, attend=reference, mask=wrong)
        cache.layer(0).attend(new, new, new, attend=reference)
        cache.advance(T)


@pytest.mark.parametrize("row", [-1, 2])
def test_reuse_and_publish_refuse_a_row_that_is_not_there(row):
    cache = CACHES["paged"](CacheShape(layers=1, batch=2, kv_heads=1, head_dim=4))
    with pytest.raises(ValueError, match=f"2 rows of at most 80 tokens, got row {row} and 3 tokens"):
        cache.reuse(row, [1, 2, 3])
    with pytest.raises(ValueError, match=f"2 rows of at most 80 tokens, got row {row} and 3 tokens"):
        cache.publish(row, [1, 2, 3])


# Refusals


def refused(match, k=(2, 1, 3, 4), dtype=torch.float32, device="cpu", cache=None):
    cache = cache or PreallocatedCache(CacheShape(layers=1, batch=2, kv_heads=1, head_dim=4), 8)
    new = torch.zeros(k, dtype=dtype, device=device)
    with pytest.raises(ValueError, match=match):
        cache.layer(0).attend(new, new, new, attend=reference)


def test_what_does_not_fit_is_refused_by_name():
    refused("made for batch 2, the keys came with batch 3", k=(3, 1, 3, 4))
    refused("made for kv_heads 1, the keys came with kv_heads 2", k=(2, 2, 3, 4))
    refused("made for head_dim 4, the keys came with head_dim 8", k=(2, 1, 3, 8))
    refused("holds torch.float32, the keys came in torch.float16", dtype=torch.float16)
    refused("the cache is on cpu, the keys came on meta", device="meta")
    refused("the cache is full: row 0 holds 0 of 8 tokens, and 9 more came", k=(2, 1, 9, 4))


def test_a_full_row_among_others_is_named():
    cache = PreallocatedCache(CacheShape(layers=1, batch=2, kv_heads=1, head_dim=4), 8)
    new = torch.zeros(2, 1, 8, 4)
    cache.expect([3, 8])
    cache.layer(0).attend(new, new, new, attend=reference)
    cache.advance(8)
    refused("row 1 holds 8 of 8 tokens, and 1 more came", k=(2, 1, 1, 4), cache=cache)


def test_wrong_counts_rows_layers_and_sizes_are_refused():
    shape = CacheShape(layers=2, batch=2, kv_heads=1, head_dim=4)
    cache = PreallocatedCache(shape, 8)
    for call, match in (
        (lambda: cache.expect([1]), "counts must be 2 numbers"),
        (lambda: cache.expect([1, -1]), "counts must be 2 numbers"),
        (lambda: (cache.expect([1, 5]), cache.positions(4)), "expects up to 5 tokens in a row, the pass brings 4"),
        (lambda: cache.layer(2), "layers 0 to 1, got 2"),
        (lambda: cache.expect([1, 0.5]), "must be integers"),
        (lambda: cache.truncate([1, 0]), "cannot be truncated"),
        (lambda: cache.truncate([0.0, 0.0]), "must be integers"),
        (lambda: cache.reorder([0.5]), "must be integers"),
        (lambda: cache.reorder([2]), "rows 0 to 1"),
        (lambda: cache.truncate(0), "must be integers, got 0"),
        (lambda: cache.reorder(1), "must be integers, got 1"),
        (lambda: cache.expect(torch.tensor(3)), "must be integers"),
        (lambda: PreallocatedCache(shape, 0), "at least 1 token"),
        (lambda: PreallocatedCache(shape, 2.5), "capacity must be an integer, got 2.5"),
        (lambda: RingCache(shape, 0), "window must be at least 1"),
        (lambda: RingCache(shape, float("nan")), "window must be an integer, got nan"),
        (lambda: PagedKVCache(shape, 4, 2, max_length=-1), "max_length must be at least 1 token, got -1"),
        (lambda: PagedKVCache(shape, 4, 2, max_length=0.5), "max_length must be an integer, got 0.5"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
