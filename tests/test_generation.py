"""Generation: text independent of batching, chunking and cache; filters equal to transformers'; draws by the law."""

import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
import torch
from draws import draws
from hypothesis import given
from hypothesis import strategies as st
from sharp import sharpened

from tests.checkpoints import TURNS, save_chat_model
from tformer_lib import pretrained
from tformer_lib.generation import (
    Conversation,
    Sampler,
    Sampling,
    StaticStep,
    cut,
    distribution,
    draw,
    generate,
    generate_uncached,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    one_row,
    penalise_repetition,
    prefill,
    random_stream,
    stream,
)
from tformer_lib.generation.conversation import stop_tokens
from tformer_lib.kv_cache import CacheShape, GrowingCache, ModelCache, PreallocatedCache, RingCache
from tformer_lib.transformer import Decoder, ModelConfig, evaluating

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3], [5, 8, 9, 7, 9]]


def make_model(seed=11, **options):
    torch.manual_seed(seed)
    config = ModelConfig(vocab_size=29, max_length=64, width=32, layers=2, heads=4, **{"positions": "rope", **options})
    return sharpened(Decoder(config).double())


MODEL = make_model()
CACHES = {
    "default": lambda batch: None,
    "growing": lambda batch: GrowingCache(CacheShape.of(MODEL, batch)),
    "preallocated": lambda batch: PreallocatedCache(CacheShape.of(MODEL, batch), 50),
    "ring that never wraps": lambda batch: RingCache(CacheShape.of(MODEL, batch), 50),
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("chunk", [None, 1, 3, 100])
def test_a_ragged_batch_continues_each_prompt_as_if_alone_and_uncached(cache, chunk):
    alone = [generate_uncached(MODEL, prompt, max_new_tokens=12) for prompt in PROMPTS]
    assert generate(MODEL, PROMPTS, max_new_tokens=12, cache=CACHES[cache](3), chunk=chunk) == alone
    assert len({tuple(text) for text in alone}) == 3


@draws(20)
@given(seed=st.integers(0, 10**6), order=st.permutations(range(3)), chunk=st.integers(1, 9))
def test_a_seeded_row_does_not_depend_on_its_batch(seed, order, chunk):
    rules = {"max_new_tokens": 6, "temperature": 1.3, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.2}
    seeds = [seed, seed + 10, seed + 20]
    alone = [generate(MODEL, [p], seed=s, **rules)[0] for p, s in zip(PROMPTS, seeds, strict=True)]
    together = generate(MODEL, [PROMPTS[i] for i in order], seed=[seeds[i] for i in order], chunk=chunk, **rules)
    assert together == [alone[i] for i in order]


def test_seeds_repeat_and_differ_and_a_longer_run_begins_the_same():
    rules = {"temperature": 2.0}
    first = generate(MODEL, PROMPTS, max_new_tokens=10, seed=1, **rules)
    assert first == generate(MODEL, PROMPTS, max_new_tokens=10, seed=1, **rules)
    assert first != generate(MODEL, PROMPTS, max_new_tokens=10, seed=2, **rules)
    longer = generate(MODEL, PROMPTS, max_new_tokens=20, seed=1, **rules)
    assert [row[:10] for row in longer] == first
    twins = generate(MODEL, [PROMPTS[0]] * 3, max_new_tokens=10, seed=1, **rules)
    assert len({tuple(row) for row in twins}) == 3


def test_stop_tokens_end_their_own_row_alone():
    free = generate(MODEL, PROMPTS, max_new_tokens=12)
    stop = free[0][4]
    stopped = generate(MODEL, PROMPTS, max_new_tokens=12, stop_tokens=[stop])
    assert stopped == [cut(row, [stop]) for row in free]
    assert stopped[0][-1] == stop
    assert stop not in stopped[0][:-1]


def test_generation_ends_as_soon_as_all_rows_have_stopped():
    free = generate(MODEL, [PROMPTS[0]], max_new_tokens=12)[0]
    calls = []
    hook = MODEL.register_forward_hook(lambda *_: calls.append(1))
    generate(MODEL, [PROMPTS[0]], max_new_tokens=12, stop_tokens=[free[2]])
    hook.remove()
    assert len(calls) == 1 + free.index(free[2])  # the prefill, and one step for each token before the stop


def test_the_stream_yields_what_generate_returns():
    stop = generate(MODEL, PROMPTS, max_new_tokens=12)[1][3]
    options = {"max_new_tokens": 12, "stop_tokens": [stop], "temperature": 0.7, "seed": 4}
    columns = list(stream(MODEL, PROMPTS, **options))
    rows = [[token for token in row if token is not None] for row in zip(*columns, strict=True)]
    assert rows == generate(MODEL, PROMPTS, **options)


def test_stop_tokens_may_come_from_an_iterator():
    free = generate(MODEL, PROMPTS, max_new_tokens=12)
    stops = [free[0][4], free[1][2]]
    wanted = [cut(row, stops) for row in free]
    assert generate(MODEL, PROMPTS, max_new_tokens=12, stop_tokens=iter(stops)) == wanted
    columns = list(stream(MODEL, PROMPTS, max_new_tokens=12, stop_tokens=iter(stops)))
    assert [[token for token in row if token is not None] for row in zip(*columns, strict=True)] == wanted


def modes(model):
    return [module.training for module in model.modules()]


def test_dropout_is_off_while_generating_and_the_modes_come_back():
    model = make_model(dropout=0.5)
    wanted = generate(model, PROMPTS, max_new_tokens=8)
    model.train()
    model.stack.blocks[0].eval()  # a part of it is not trained
    before = modes(model)
    assert generate(model, PROMPTS, max_new_tokens=8) == wanted
    assert modes(model) == before
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="is outside the vocabulary"):
        generate_uncached(model, [1, 99], max_new_tokens=1)
    assert modes(model) == before
    caches = [PreallocatedCache(CacheShape.of(model, 3), 20) for _ in range(2)]
    step = StaticStep(model, caches[0])
    for cache in caches:
        torch.testing.assert_close(prefill(model, PROMPTS, cache).argmax(-1), torch.tensor([row[0] for row in wanted]))
    assert step(torch.tensor([row[:1] for row in wanted])).argmax(-1).tolist() == [row[1] for row in wanted]
    assert modes(model) == before


@given(turns=st.lists(st.integers(0, 2), max_size=30), closed=st.sets(st.integers(0, 2)))
@draws(20)
def test_streams_in_any_order_keep_their_texts_and_the_modes(turns, closed):
    model = make_model(dropout=0.5)
    wanted = [generate(model, [prompt], max_new_tokens=8)[0] for prompt in PROMPTS]
    model.train()
    before = modes(model)
    streams, got = [stream(model, [prompt], max_new_tokens=8) for prompt in PROMPTS], [[], [], []]
    for turn in turns:
        got[turn] += next(streams[turn], [])
        assert modes(model) == before, "between its steps a stream leaves the model alone"
    for place in closed:
        streams[place].close()
    for place in {0, 1, 2} - closed:
        got[place] += [row[0] for row in streams[place]]
        assert got[place] == wanted[place]
    assert all(wanted[place][: len(got[place])] == got[place] for place in closed)
    assert modes(model) == before


def test_evaluations_that_overlap_end_together():
    model = make_model(dropout=0.5).train()
    first, second = evaluating(model), evaluating(model)
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert not any(modes(model)), "the second is not done"
    second.__exit__(None, None, None)
    assert all(modes(model))


def switches():
    return torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.mkldnn.enabled


@pytest.mark.parametrize(("prompts", "dtype"), [(PROMPTS, torch.float64), (PROMPTS[:1], torch.bfloat16)])
def test_threads_that_generate_leave_the_switches_as_they_were(prompts, dtype):
    model, before = make_model(dropout=0.5).to(dtype).train(), switches()
    wanted = generate(model, prompts, max_new_tokens=8)
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda _: generate(model, prompts, max_new_tokens=8), range(24)))
    assert dtype == torch.bfloat16 or texts == [wanted] * 24  # one's prefill may meet another's switch, and round apart
    assert all(modes(model))
    assert switches() == before


@pytest.mark.parametrize(
    ("rows", "dtype", "spared"), [(1, "bfloat16", True), (2, "bfloat16", False), (1, "float32", False)]
)
def test_onednn_is_left_out_of_one_row_in_bfloat16_alone(rows, dtype, spared, monkeypatch):
    model, seen = make_model().to(getattr(torch, dtype)), []
    unembed = Decoder.unembed
    watch = lambda self, x: seen.append((x.shape[1], torch.backends.mkldnn.enabled)) or unembed(self, x)  # noqa: E731
    monkeypatch.setattr(Decoder, "unembed", watch)
    before = torch.backends.mkldnn.enabled
    generate(model, PROMPTS[:1] * rows, max_new_tokens=4)
    assert seen == [(8, before)] + 3 * [(1, before and not spared)]
    assert torch.backends.mkldnn.enabled == before


@pytest.mark.parametrize(("out", "width"), [(64, 8192), (129, 333)])
def test_products_of_one_row_add_in_float32(out, width):
    x, weight = torch.randn(1, 1, width).bfloat16(), torch.randn(out, width).bfloat16()
    exact = torch.nn.functional.linear(x.double(), weight.double())
    model = torch.nn.Linear(1, 1).bfloat16()
    with one_row(model, torch.zeros(1, 1, dtype=torch.int64)):
        found = torch.nn.functional.linear(x, weight)
        ones = torch.nn.functional.linear(torch.ones_like(x), torch.ones_like(weight))
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-3)  # one rounding: half a unit of 2**-7
    torch.testing.assert_close(ones.double(), torch.full_like(exact, width), rtol=2**-8, atol=0)  # bfloat16 ends at 256


def test_a_stream_may_begin_under_inference_mode_and_go_on_outside():
    options = {"max_new_tokens": 6, "stop_tokens": [28], "repetition_penalty": 1.5}
    with torch.inference_mode():
        going = stream(MODEL, PROMPTS, **options)
        first = next(going)
    columns = [first, *going]
    rows = [[token for token in row if token is not None] for row in zip(*columns, strict=True)]
    assert rows == generate(MODEL, PROMPTS, **options)


def test_a_ring_generates_the_text_of_the_windowed_model():
    from tformer_lib import masks

    window, sinks, prompt = 6, 2, PROMPTS[0]
    text = list(prompt)
    for _ in range(20):
        T = len(text)
        mask = masks.sliding_window(T, window=window) | (masks.causal(T) & (torch.arange(T) < sinks))
        with torch.no_grad():
            text.append(int(MODEL(torch.tensor([text]), mask=mask)[0, -1].argmax()))
    for chunk in (None, 3):
        cache = RingCache(CacheShape.of(MODEL, 1), window, sinks)
        assert generate(MODEL, [prompt], max_new_tokens=20, cache=cache, chunk=chunk) == [text[len(prompt) :]]


# The static step, which a CUDA graph records


@pytest.mark.parametrize("make_cache", [lambda s: PreallocatedCache(s, 40), lambda s: RingCache(s, 6, 2)])
def test_the_static_step_equals_the_ordinary_one(make_cache):
    caches = [make_cache(CacheShape.of(MODEL, 3)) for _ in range(2)]
    static = StaticStep(MODEL, caches[1])
    ordinary, recorded = (prefill(MODEL, PROMPTS, cache) for cache in caches)
    for _ in range(20):
        torch.testing.assert_close(recorded, ordinary, rtol=0, atol=1e-10)
        tokens = ordinary.argmax(-1, keepdim=True)
        with torch.no_grad():
            ordinary, recorded = MODEL(tokens, cache=caches[0])[:, -1], static(tokens)


def test_the_static_step_is_one_graph_for_all_lengths():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    cache = PreallocatedCache(CacheShape.of(MODEL, 3), 30)
    step = StaticStep(MODEL, cache, compile=True, backend=count)
    logits = prefill(MODEL, PROMPTS, cache)
    texts = []
    for _ in range(10):
        texts.append(logits.argmax(-1))
        logits = step(texts[-1][:, None])
    assert torch.stack(texts, dim=1).tolist() == generate(MODEL, PROMPTS, max_new_tokens=10)
    assert len(graphs) == 1


def test_the_static_step_refuses_what_it_cannot_record():
    shape = CacheShape.of(MODEL, 1)
    with pytest.raises(ValueError, match="needs a preallocated or a ring cache, got GrowingCache"):
        StaticStep(MODEL, GrowingCache(shape))
    cache = PreallocatedCache(shape, 4)
    step = StaticStep(MODEL, cache)
    prefill(MODEL, [[1, 2, 3]], cache)
    step(torch.tensor([[4]]))
    with pytest.raises(ValueError, match="row 0 holds 4 of 4 tokens"):
        step(torch.tensor([[5]]))
    with pytest.raises(ValueError, match="recorded on an empty cache"):
        StaticStep(MODEL, cache)
    with pytest.raises(ValueError, match="cuda_graph needs a model on a GPU"):
        generate(MODEL, [[1]], max_new_tokens=1, cuda_graph=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("make_cache", [lambda s: PreallocatedCache(s, 40), lambda s: RingCache(s, 6, 2)])
def test_a_cuda_graph_generates_the_same_text(make_cache):
    model = make_model().cuda()
    texts = [
        generate(model, PROMPTS, max_new_tokens=20, cuda_graph=graph, cache=make_cache(CacheShape.of(model, 3)))
        for graph in (False, True)
    ]
    assert texts[0] == texts[1]


# Sampling


def hostile_logits():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 50, generator=generator) * torch.logspace(-2, 2, 64)[:, None]
    logits[0] = 0.0
    logits[1, :10] = logits[1].max()
    return logits


@pytest.mark.parametrize("k", [1, 5, 50, 1000])
def test_top_k_equals_transformers(k):
    from transformers.generation.logits_process import TopKLogitsWarper

    logits = hostile_logits()
    assert torch.equal(keep_top_k(logits, k), TopKLogitsWarper(min(k, 50))(None, logits))


@pytest.mark.parametrize("p", [0.01, 0.5, 0.9, 0.999])
def test_top_p_equals_transformers(p):
    from transformers.generation.logits_process import TopPLogitsWarper

    logits = hostile_logits()
    assert torch.equal(keep_top_p(logits, p), TopPLogitsWarper(p)(None, logits))


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 1.0])
def test_min_p_equals_transformers(p):
    from transformers.generation.logits_process import MinPLogitsWarper

    logits = hostile_logits()
    assert torch.equal(keep_min_p(logits, p), MinPLogitsWarper(p)(None, logits))


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.5])
def test_repetition_penalty_equals_transformers(penalty):
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    logits = hostile_logits()
    past = torch.randint(50, (64, 20), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(64, 50, dtype=torch.bool).scatter(1, past, True)
    assert torch.equal(
        penalise_repetition(logits, seen, penalty), RepetitionPenaltyLogitsProcessor(penalty)(past, logits)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("penalty", [3e38, 2e-38])
def test_the_strongest_penalty_still_leaves_probabilities(penalty, dtype):
    logits = torch.tensor([[-2.0, -3.0, 0.0, -0.5], [2.0, 3.0, 0.0, 0.5], [-1.0, -2.0, -3.0, -4.0]], dtype=dtype)
    seen = torch.ones(3, 4, dtype=torch.bool)
    changed = penalise_repetition(logits, seen, penalty)
    assert changed.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert changed.isfinite().all()
    found = distribution(changed, Sampling(temperature=0.5, top_p=0.9))
    torch.testing.assert_close(found.sum(-1), torch.ones(3, dtype=torch.float64))


def test_numbers_of_other_kinds_are_taken_as_what_they_are():
    odd = Sampling(Fraction(1, 2), np.int64(3), np.float32(1.5), top_k=np.int32(4), top_p=Fraction(9, 10), min_p=0)
    assert odd == Sampling(0.5, 3, 1.5, top_k=4, top_p=0.9, min_p=0.0)
    assert [type(value) for value in vars(odd).values()] == [float, int, float, int, float, float]
    rules = {"temperature": 2**64, "top_k": 2**70, "seed": 2**100}
    assert len(generate(MODEL, [[1]], max_new_tokens=3, **rules)[0]) == 3


def test_every_seed_has_a_stream_of_its_own():
    numbers = {seed: random_stream(seed).random() for seed in range(-50, 51)}
    assert len(set(numbers.values())) == 101
    rows = generate(MODEL, [[1]] * 3, max_new_tokens=20, temperature=3.0, seed=-1)
    assert len({tuple(row) for row in rows}) == 3


def test_all_rules_together_equal_transformers_pipeline():
    from transformers.generation import logits_process as hf

    logits = hostile_logits()
    wanted = logits
    for warper in (
        hf.TemperatureLogitsWarper(0.7),
        hf.TopKLogitsWarper(30),
        hf.TopPLogitsWarper(0.9),
        hf.MinPLogitsWarper(0.02),
    ):
        wanted = warper(None, wanted)
    got = distribution(logits, Sampling(temperature=0.7, top_k=30, top_p=0.9, min_p=0.02))
    torch.testing.assert_close(got, wanted.double().softmax(-1), rtol=1e-5, atol=1e-9)


def test_draws_follow_the_probabilities_and_never_leave_their_support():
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0], dtype=torch.float64)
    n = 40_000
    uniforms = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counts = Counter(draw(probabilities.expand(n, 6), uniforms).tolist())
    assert set(counts) == {1, 3, 4}
    for token, p in ((1, 0.5), (3, 0.3), (4, 0.2)):
        assert abs(counts[token] / n - p) < 4 * (p * (1 - p) / n) ** 0.5
    edges = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert draw(probabilities.expand(3, 6), edges).tolist() == [1, 3, 4]


@pytest.mark.parametrize("temperature", [1e-5, 1e-38, 1e-40, 5e-324])
def test_a_temperature_near_zero_is_nearly_greedy(temperature):
    logits = torch.tensor([[1.0, 5.0, 3.0], [-3.0, -1e4, 2.0], [3e38, -3e38, 0.0]])
    for rules in ({}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.1}):
        found = distribution(logits, Sampling(temperature=temperature, **rules))
        assert found.tolist() == [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]


@pytest.mark.parametrize("rules", [{}, {"temperature": 1.0}])
@pytest.mark.parametrize("number", [-math.inf, math.inf, math.nan])
def test_a_penalty_makes_no_number_of_what_is_none(number, rules):
    logits = torch.full((1, 4), -math.inf)
    logits[0, 2] = number
    everything = torch.ones(1, 4, dtype=torch.bool)
    for penalty in (0.5, 10.0):
        changed = penalise_repetition(logits, everything, penalty)
        torch.testing.assert_close(changed, logits, rtol=0, atol=0, equal_nan=True)
        sampler = Sampler(Sampling(repetition_penalty=penalty, **rules), [[0, 1, 2, 3]], 1, 4, logits.device)
        with pytest.raises(ValueError, match="the logits of row 0 are not finite after 0 new tokens"):
            sampler(logits)


def test_penalty_makes_a_greedy_text_stop_repeating():
    plain = generate(MODEL, [[1, 1]], max_new_tokens=25)[0]
    varied = generate(MODEL, [[1, 1]], max_new_tokens=25, repetition_penalty=10.0)[0]
    assert len(set(varied)) > len(set(plain))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"temperature": -1}, "temperature must be at least 0 and finite in float32, got -1"),
        ({"temperature": -1e-99}, "temperature must be at least 0 and finite in float32, got -1e-99"),  # 0 in float32
        ({"min_p": -1e-99}, "min_p must be in"),
        ({"min_p": 1 + 1e-12}, "min_p must be in"),
        ({"top_p": 1 + 1e-12}, "top_p must be in"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"min_p": 2}, "min_p must be in"),
        ({"repetition_penalty": 0}, "repetition_penalty must be greater than 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"top_k": 2.5}, "top_k must be a whole number, got 2.5"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"temperature": None}, "temperature must be a number, got None"),
        ({"temperature": float("nan")}, "temperature must be at least 0 and finite in float32, got nan"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"seed": ["a", "b", "c"]}, "each seed must be a whole number, got 'a'"),
        ({"temperature": math.inf}, "temperature must be at least 0 and finite in float32, got inf"),
        ({"temperature": 1e39}, "temperature must be at least 0 and finite in float32"),
        ({"temperature": 10**400}, "temperature must be finite in float32"),
        ({"temperature": Fraction(10**5000)}, "temperature must be finite in float32"),
        ({"repetition_penalty": 1e300}, "repetition_penalty must be greater than 0 and finite in float32"),
        ({"repetition_penalty": 1e-50}, "repetition_penalty must be greater than 0 and finite in float32"),
        ({"chunk": 2.5}, "chunk must be a whole number, got 2.5"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number, got 2.5"),
        ({"stop_tokens": 3}, "stop_tokens must be a list of tokens, got 3"),
        ({"cache": PreallocatedCache(CacheShape.of(MODEL, 1), 40)}, "made for 1 row, the prompts are 3"),
        ({"seed": [1], "temperature": 1.0}, "3 prompts, 1 seed$"),
    ],
)
def test_senseless_options_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        generate(MODEL, PROMPTS, **{"max_new_tokens": 2, **options})


@pytest.mark.parametrize("layers", [("full", "full"), ("linear", "full"), ("window", "full")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_under_autocast_the_cache_holds_what_the_projections_are(layers, dtype):
    """As nanoGPT samples: weights in float32, matrix products in bfloat16."""
    linear = {"key_heads": 2, "value_heads": 4, "head_dim": 4, "value_dim": 6}
    options = {"linear": linear} if "linear" in layers else {"window": 5} if "window" in layers else {}
    model = make_model(layer_types=layers, **options).to(dtype)
    text = torch.tensor([PROMPTS[0]])
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert CacheShape.of(model, 1).dtype == (torch.float64 if dtype == torch.float64 else torch.bfloat16)
        written = generate(model, PROMPTS, max_new_tokens=4)
        cache = ModelCache.of(model, 1, 40)
        found = torch.cat([model(part, cache=cache) for part in text.split(5, dim=1)], dim=1)
        expected = model(text)
    assert [len(row) for row in written] == [4] * len(PROMPTS)
    assert found.dtype == expected.dtype
    error = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error < (1e-9 if dtype == torch.float64 else 0.05)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("rules", [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9, "top_k": 3}], ids=str)
def test_logits_that_are_no_numbers_are_refused_on_a_cpu(wrong, rules):
    """They would be written on as if they were text: always the last token of the vocabulary, or the wrong one."""
    model = make_model()
    with torch.no_grad():
        model.embedding.tokens.weight[PROMPTS[1][-1]] = wrong
    with pytest.raises(ValueError, match=r"the logits of row [01] are not finite after 0 new tokens"):
        generate(model, PROMPTS, max_new_tokens=2, **rules)
    found = Sampler(Sampling(**rules), [[0]] * 2, 2, 3, torch.device("cpu"))
    found(torch.tensor([[0.0, -math.inf, 1.0]] * 2))
    with pytest.raises(ValueError, match="the logits of row 1 are not finite after 1 new token"):
        found(torch.tensor([[0.0, 1.0, 2.0], [0.0, wrong, 0.0]]))


def test_a_cache_that_holds_something_is_refused():
    cache = PreallocatedCache(CacheShape.of(MODEL, 1), 40)
    wanted = generate(MODEL, [PROMPTS[0]], max_new_tokens=5, cache=cache)
    with pytest.raises(ValueError, match=r"the cache holds \[12\] tokens already; reset\(\) empties it"):
        generate(MODEL, [PROMPTS[0]], max_new_tokens=5, cache=cache)
    cache.reset()
    assert generate(MODEL, [PROMPTS[0]], max_new_tokens=5, cache=cache) == wanted


def test_more_tokens_than_the_memory_holds_are_refused_before_they_are_asked_for():
    with pytest.raises(ValueError, match=r"a cache of 3 rows of 10000000000008 tokens takes [\d,.]+ GiB, cpu has"):
        generate(MODEL, PROMPTS, max_new_tokens=10**13)


def test_senseless_prompts_are_refused():
    for prompts, match in (
        ([], "at least one prompt"),
        ([[1], []], "prompt 1 is empty"),
        ([1, 2], "prompt 0 is 1"),
        (["ab"], "list of token lists"),
        ([[1, 2.0]], r"prompt 0 is \[1, 2.0\]"),
        ([[1], [0, 10_000]], "prompt 1 holds token 10000, the model knows 0 to"),
        ([[-1]], "prompt 0 holds token -1"),
    ):
        with pytest.raises(ValueError, match=match):
            generate(MODEL, prompts, max_new_tokens=2)
    with pytest.raises(TypeError, match="temprature"):
        generate(MODEL, [[1]], max_new_tokens=2, temprature=1.0)


def test_a_learned_table_too_short_is_refused_before_any_work():
    model = make_model(positions="learned")
    with pytest.raises(
        ValueError, match="with 6 new tokens a prompt of 60 needs 65 positions, the model has learned 64"
    ):
        generate(model, [[1] * 60], max_new_tokens=6)
    assert len(generate(model, [[1] * 60], max_new_tokens=5)[0]) == 5


# --- conversations ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "windows", "linear"])
def chat_model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    save_chat_model(folder, request.param)
    return pretrained.load(folder, dtype=torch.float64)


class Counted:
    """A model that counts the tokens which pass through it; ``fail_at`` names a pass that is interrupted half-way."""

    def __init__(self, model, monkeypatch):
        self.tokens, self.passes, self.fail_at = 0, 0, None
        forward, block = model.forward, model.stack.blocks[-1]

        def counted(tokens, **options):
            self.tokens += tokens.numel()
            self.passes += 1
            return forward(tokens, **options)

        def fail(*_):
            if self.passes == self.fail_at:
                raise KeyboardInterrupt

        monkeypatch.setattr(model, "forward", counted)
        self.hook = block.register_forward_pre_hook(fail)


def as_if_alone(conversation) -> list[int]:
    """The last answer, written in one go by a model that has a cache of its own."""
    model, turn = conversation.model, conversation.turns[-1]
    stops, prompt = stop_tokens(conversation.encoding), turn.tokens[: turn.start]
    return generate(model, [prompt], max_new_tokens=max(turn.written, 1), stop_tokens=stops)[0]


def test_of_each_turn_only_what_is_new_is_read(chat_model, monkeypatch):
    model, encoding = chat_model
    counted, conversation = Counted(model, monkeypatch), Conversation(model, encoding, system="Be a dog.")
    texts = ["Once upon a time", "there was", "a dog, 日本", "", " and  two <|im_start|> spaces"]
    for number, text in enumerate(texts):
        held, counted.tokens = conversation.cache.host_lengths[0], 0
        pieces = list(conversation.say(text, max_new_tokens=9))
        turn = conversation.turns[-1]
        new = encoding.render(conversation.messages[:-1])
        assert encoding.decode(turn.tokens[: turn.start]) == new, (
            "what is read is the conversation, no more and no less"
        )
        assert counted.tokens == turn.read + turn.written - 1
        if number and not conversation.turns[-2].ended:
            assert turn.read == turn.start - held
        assert "".join(pieces) == turn.answer
        assert turn.tokens[turn.start :] == as_if_alone(conversation)
    assert conversation.turns[-1].start > 100


def test_another_answer_reads_one_token(chat_model, monkeypatch):
    model, encoding = chat_model
    conversation = Conversation(model, encoding)
    for text in ("Once upon a time there was", "a dog and two spaces"):
        list(conversation.say(text, max_new_tokens=12))
    first, held = conversation.turns[-1], conversation.cache.host_lengths[0]
    list(conversation.say(conversation.take_back(), max_new_tokens=12))
    again = conversation.turns[-1]
    assert again.tokens == first.tokens
    can_go_back = model.config.types_of_layers == ("full", "full")
    assert again.read == (1 if can_go_back else again.start)
    assert conversation.cache.host_lengths[0] == held
    drawn = set()
    for _ in range(3):
        list(conversation.say(conversation.take_back(), max_new_tokens=12, temperature=1.5))
        drawn.add(conversation.turns[-1].answer)
    assert len(drawn) == 3, "each answer draws from a stream of its own"
    conversation.clear()
    with pytest.raises(ValueError, match="nothing was said yet"):
        conversation.take_back()
    list(conversation.say("Once", max_new_tokens=5))
    assert conversation.turns[-1].tokens[conversation.turns[-1].start :] == as_if_alone(conversation)


def test_whoever_stops_listening_can_go_on(chat_model, monkeypatch):
    model, encoding = chat_model
    conversation = Conversation(model, encoding)
    answer = conversation.say("Once upon a time", max_new_tokens=50)
    for _ in range(3):
        next(answer)
    answer.close()
    assert 3 <= conversation.turns[-1].written < 50
    list(conversation.say("there was", max_new_tokens=8))
    assert encoding.render(conversation.messages[:-1]) == encoding.decode(
        conversation.turns[-1].tokens[: conversation.turns[-1].start]
    )
    assert conversation.turns[-1].tokens[conversation.turns[-1].start :] == as_if_alone(conversation)


@pytest.mark.parametrize("fail_at", [1, 2, 5])
def test_an_interrupted_pass_leaves_nothing_that_is_seen(chat_model, fail_at, monkeypatch):
    model, encoding = chat_model
    conversation = Conversation(model, encoding)
    list(conversation.say("Once upon", max_new_tokens=4))
    counted = Counted(model, monkeypatch)
    counted.fail_at = fail_at
    with pytest.raises(KeyboardInterrupt):
        list(conversation.say("a time there was", max_new_tokens=20))
    counted.hook.remove()
    list(conversation.say("a dog", max_new_tokens=8))
    assert conversation.turns[-1].tokens[conversation.turns[-1].start :] == as_if_alone(conversation)


def test_a_template_that_changes_what_was_said_is_followed(tmp_path):
    """As templates that leave out what a model thought: the common beginning is kept, the rest is read again."""
    template = TURNS.replace("message.content", "(message.content if loop.last else message.content[:3])")
    save_chat_model(tmp_path, template=template)
    conversation = Conversation(*pretrained.load(tmp_path, dtype=torch.float64))
    for text in ("Once upon a time", "there was a dog", "and two spaces"):
        list(conversation.say(text, max_new_tokens=9))
        turn = conversation.turns[-1]
        expected = conversation.encoding.render(conversation.messages[:-1])
        assert conversation.encoding.decode(turn.tokens[: turn.start]) == expected
        assert turn.tokens[turn.start :] == as_if_alone(conversation)


def test_a_full_context_refuses_a_turn_and_changes_nothing(chat_model):
    model, encoding = chat_model
    conversation = Conversation(model, encoding, context=40)
    list(conversation.say("Once", max_new_tokens=100))
    turn = conversation.turns[-1]
    assert turn.ended or len(turn.tokens) == 40, "it writes as long as there is room"
    with pytest.raises(ValueError, match="its context is 40: begin a new one"):
        conversation.say("there was a dog and two spaces and lines " * 3)
    for rules in ({"max_new_tokens": 0}, {"temperature": -1.0}):
        with pytest.raises(ValueError, match="must be at least"):
            conversation.say("x", **rules)
    assert conversation.turns == [turn]
    for context in (1, 513):
        with pytest.raises(ValueError, match=f"context must be from 2 to 512, which is the model's, got {context}"):
            Conversation(model, encoding, context=context)


def test_a_model_without_a_template_goes_on_with_the_text(chat_model):
    model, encoding = pretrained.load()
    conversation = Conversation(model, encoding)
    assert not conversation.templated
    said = ["Once, Lily lived", "Then", " she"]
    for text in said:
        list(conversation.say(text, max_new_tokens=10))
    turn, told = conversation.turns[-1], "".join(f"{turn.said}{turn.answer} " for turn in conversation.turns[:2])
    assert encoding.decode(turn.tokens[1 : turn.start]) == told.rstrip() + " she"
    assert turn.tokens[0] == encoding.eot_token
    assert turn.tokens[turn.start :] == as_if_alone(conversation)
    list(conversation.say("", max_new_tokens=200))
    assert conversation.turns[-1].ended
    assert conversation.turns[-1].read == 1, "nothing new was said: the last token was still unread"
    with pytest.raises(ValueError, match="no chat template"):
        Conversation(model, encoding, system="Be a dog.")
    public = Conversation(*chat_model, plain=True)
    list(public.say("Once upon", max_new_tokens=4))
    assert public.turns[0].tokens[: public.turns[0].start] == chat_model[1].encode("Once upon")
