"""Float8 pools, and texts that do not depend on their neighbours in any bit."""

import math

import pytest
import torch
import torch.nn.functional as F
from draws import draws
from hypothesis import example, given
from hypothesis import strategies as st
from test_serving import MODEL, PREFIXES, VOCAB, check_all_blocks_are_back, make_model

from tformer_lib import pretrained
from tformer_lib.ladder import FP8
from tformer_lib.serving import Engine, PackedPass, Speculation, blocks_that_fit, calibrate
from tformer_lib.stories import stories as tell_stories

CUDA = torch.cuda.is_available()

# Float8


def pools_for(model, tokens, dtype):
    """Pools of one block of so many tokens."""
    config, device = model.config, next(model.parameters()).device
    size = (1, config.number_of_kv_heads, tokens, config.size_of_head)
    return [tuple(torch.zeros(size, dtype=dtype, device=device) for _ in range(2)) for _ in range(config.layers)]


@torch.no_grad()
def loss_of(model, text, dtype, scales=None):
    """Mean cross-entropy of a text's tokens, all keys and values of which went through pools of this dtype."""
    T = len(text)
    tokens, numbers = torch.tensor([text]), torch.arange(T)
    rows = (torch.zeros(1, 1, dtype=torch.int32), torch.tensor([T], dtype=torch.int32))
    starts = torch.tensor([0, T], dtype=torch.int32)
    cache = PackedPass(pools_for(model, T, dtype), numbers, numbers, *rows, starts, T, scales=scales)
    return F.cross_entropy(model(tokens, cache=cache)[0, :-1].double(), tokens[0, 1:]).item()


@pytest.fixture(scope="module")
def stories():
    model, encoding = pretrained.load()
    text = encoding.encode_ordinary("\n".join(tell_stories(40, seed=99)))
    return model, encoding, [text[start : start + 240] for start in range(0, 240 * 6, 240)]


def test_float8_pools_cost_the_stories_little(stories):
    model, _, texts = stories
    scales = calibrate(model, texts[:2])
    exact = sum(loss_of(model, text, torch.float32) for text in texts) / len(texts)
    rounded = sum(loss_of(model, text, FP8, scales) for text in texts) / len(texts)
    unscaled = sum(loss_of(model, text, FP8, (1.0, 1.0)) for text in texts) / len(texts)
    assert 0 < abs(rounded - exact) < 0.02  # nats a token; not exactly 0, since 3 bits behind the point are few
    assert abs(unscaled - exact) < 0.02
    tiny = sum(loss_of(model, text, FP8, (1e6, 1e6)) for text in texts) / len(texts)
    assert tiny - exact > 0.5  # a scale that lets everything underflow is not harmless


def test_float8_texts_agree_with_float32_texts_most_of_the_time(stories):
    model, encoding, texts = stories
    prompts = [text[:20] for text in texts] + [encoding.encode_ordinary("Once upon a time")]
    scales = calibrate(model, texts[:2])
    answers = []
    for options in ({}, {"kv_dtype": "float8", "kv_scales": scales}):
        engine = Engine(model, max_num_seqs=8, **options)
        made = [engine.add(prompt, {"max_new_tokens": 30}) for prompt in prompts]
        engine.run()
        answers.append([request.new_tokens for request in made])
        check_all_blocks_are_back(engine)
    same = sum(a == b for left, right in zip(*answers, strict=True) for a, b in zip(left, right, strict=True))
    assert same / (30 * len(prompts)) > 0.6


def test_float8_pools_hold_more_tokens_in_the_same_memory():
    model = make_model().float()
    assert blocks_that_fit(model, 2**20, 16, "float8") == 4 * blocks_that_fit(model, 2**20, 16)
    engine = Engine(model, blocks=8, kv_dtype="float8")
    assert {pool.dtype for pools in engine.runner.pools for pool in pools} == {FP8}


def test_float8_with_drafts_and_preemption_writes_what_it_writes_without(stories):
    model, _, texts = stories
    scales, wish = calibrate(model, texts[:1]), {"max_new_tokens": 16}
    prompts, wanted = [text[:20] for text in texts[:4]], []
    for blocks, speculation in ((64, None), (6, Speculation(tokens=3, ngram_min=1))):
        precision = {"kv_dtype": "float8", "kv_scales": scales}
        engine = Engine(model, blocks=blocks, max_num_seqs=4, budget=64, speculation=speculation, **precision)
        made = [engine.add(prompt, wish) for prompt in prompts]
        engine.run()
        wanted.append([request.new_tokens for request in made])
    assert engine.scheduler.preemptions > 0
    assert wanted[0] == wanted[1]


def test_calibration_finds_the_largest_numbers():
    watched = []
    for block in MODEL.stack.blocks:
        block.attention.v_proj.register_forward_hook(lambda module, args, out: watched.append(out.abs().max().item()))
    try:
        k_scale, v_scale = calibrate(MODEL, [[1, 2, 3], [4, 5]], margin=1.5)
    finally:
        for block in MODEL.stack.blocks:
            block.attention.v_proj._forward_hooks.clear()
    assert v_scale == pytest.approx(1.5 * max(watched) / 448)
    assert k_scale > 0
    with pytest.raises(ValueError, match="nothing to calibrate by"):
        calibrate(MODEL, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_dtype": "float4"}, "kv_dtype must be one of auto, float8, got 'float4'"),
        ({"kv_dtype": "float8", "kv_scales": (1.0,)}, "kv_scales must be two positive numbers"),
        ({"kv_dtype": "float8", "kv_scales": (1.0, 0.0)}, "kv_scales must be two positive numbers"),
        ({"kv_dtype": "float8", "kv_scales": (1.0, "2")}, "each of kv_scales must be a number"),
        ({"kv_scales": (2.0, 1.0)}, "kv_scales are for kv_dtype 'float8'"),
    ],
)
def test_senseless_precision_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Engine(MODEL, **options)


@pytest.mark.parametrize("wish", [{"kv_dtype": "float8"}, {"deterministic": True}])
@pytest.mark.parametrize("options", [{"positions": "alibi"}, {"attention_softcap": 2.0}])
def test_models_that_no_kernel_serves_are_refused_at_once(wish, options):
    with pytest.raises(ValueError, match="serve no soft cap, no ALiBi and no latent attention"):
        Engine(make_model(**options), **wish)


# Any company


def answers_of(model, plans, **options):
    """What each request of interest gets in this company: tokens and log-probabilities, to the last bit."""
    engine = Engine(model, deterministic=True, **options)
    made = {}
    step = 0
    while engine.busy or len(made) < len(plans):
        for i, (arrives, prompt, wish) in enumerate(plans):
            if arrives <= step and i not in made:
                made[i] = engine.add(prompt, {"logprobs": 2, **wish})
        engine.step()
        step += 1
    check_all_blocks_are_back(engine)
    return [(made[i].new_tokens, made[i].logprobs) for i in range(len(plans))]


prompts = st.sampled_from(PREFIXES).flatmap(
    lambda prefix: st.builds(
        lambda n, tail: [*prefix[:n], *tail],
        st.integers(1, len(prefix)),
        st.lists(st.integers(0, VOCAB - 1), max_size=4),
    )
)
wishes = st.fixed_dictionaries(
    {"max_new_tokens": st.integers(1, 10)}, optional={"temperature": st.just(0.8), "seed": st.integers(0, 3)}
)


@draws(30)
@example(  # each place of a draft has a random number of its own, though each row is drawn alone
    one=(0, [1, 2, 0], {"max_new_tokens": 8, "temperature": 0.8, "seed": 3}),
    others=[],
    max_num_seqs=1,
    more_blocks=0,
    prefix_cache=False,
    speculates=True,
    wide=False,
)
@given(
    one=st.tuples(st.integers(0, 6), prompts, wishes),
    others=st.lists(st.tuples(st.integers(0, 6), prompts, wishes), max_size=5),
    max_num_seqs=st.integers(1, 5),
    more_blocks=st.integers(0, 6),
    prefix_cache=st.booleans(),
    speculates=st.booleans(),
    wide=st.booleans(),
)
def test_a_deterministic_request_has_the_same_bits_in_any_company(
    one, others, max_num_seqs, more_blocks, prefix_cache, speculates, wide
):
    model = MODEL if wide else SINGLE
    longest = max(len(prompt) + wish["max_new_tokens"] for _, prompt, wish in [one, *others])
    alone = answers_of(model, [one], blocks=64, block_size=4, max_num_seqs=1, budget=8, prefix_cache=False)
    sizes = {"blocks": -(-longest // 4) + more_blocks, "block_size": 4, "max_num_seqs": max_num_seqs, "budget": 8}
    speculation = Speculation(tokens=2, ngram_min=1) if speculates else None
    among = answers_of(model, [one, *others], prefix_cache=prefix_cache, speculation=speculation, **sizes)
    assert among[0] == alone[0]


SINGLE = make_model().float()


def test_every_deterministic_step_has_one_shape():
    engine = Engine(SINGLE, blocks=32, block_size=4, max_num_seqs=3, budget=7, deterministic=True)
    shapes = set()
    hook = SINGLE.stack.blocks[0].feed_forward.register_forward_hook(lambda module, args, out: shapes.add(out.shape))
    try:
        for i in range(5):
            engine.add([i, 2, 3, 4, 5, 6, 7, 8, 9][: 3 + i], {"max_new_tokens": 5})
        engine.run()
    finally:
        hook.remove()
    assert shapes == {(1, 7, 16)}
    assert len({step.tokens for step in engine.log}) > 2


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("kv_dtype", ["auto", "float8"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_on_a_gpu_bfloat16_requests_have_the_same_bits_in_any_company(cuda_graphs, kv_dtype, head_dim):
    model = make_model(width=256, heads=8, kv_heads=2, head_dim=head_dim).to("cuda", torch.bfloat16)
    options = {"blocks": 60, "block_size": 16, "budget": 32, "cuda_graphs": cuda_graphs, "kv_dtype": kv_dtype}
    wish = {"max_new_tokens": 20}
    one = (0, [1, 2, 3, 4, 5, 6, 7], wish)
    seeded = (2, [3, 1, 2], {**wish, "temperature": 0.9, "seed": 5})
    alone = [answers_of(model, [plan], max_num_seqs=1, **options)[0] for plan in (one, seeded)]
    for seed in range(4):
        torch.manual_seed(seed)
        others = [
            (int(torch.randint(6, ())), torch.randint(VOCAB, (int(torch.randint(1, 20, ())),)).tolist(), wish)
            for _ in range(4 + 4 * seed)
        ]
        assert answers_of(model, [one, seeded, *others], max_num_seqs=4 + 3 * seed, **options)[:2] == alone


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_on_a_gpu_float8_pools_serve(cuda_graphs):
    model = make_model(width=256, heads=4, kv_heads=2, head_dim=64).to("cuda", torch.bfloat16)
    prompts = [[i % VOCAB, *range(1 + i % 9)] for i in range(12)]
    scales = calibrate(model, prompts)
    options = {"kv_dtype": "float8", "kv_scales": scales, "cuda_graphs": cuda_graphs}
    engine = Engine(model, blocks=20, block_size=16, max_num_seqs=8, budget=32, **options)
    made = [engine.add(prompt, {"max_new_tokens": 20, "logprobs": 0}) for prompt in prompts]
    engine.run()
    for request in made:  # the model itself, without a cache, finds its choices as likely
        with torch.no_grad():
            right = model(torch.tensor([request.tokens], device="cuda"))[0, request.prompt_length - 1 : -1].float()
        chosen = right.log_softmax(-1).gather(1, torch.tensor(request.new_tokens, device="cuda")[:, None])[:, 0]
        told = torch.tensor([entry.chosen for entry in request.logprobs])
        assert math.isfinite(told.sum().item())
        assert (told - chosen.cpu()).abs().mean() < 0.3
    check_all_blocks_are_back(engine)
