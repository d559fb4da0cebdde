"""Serving: under every schedule a request gets what it would get alone, and every block comes back."""

import itertools
import json
import math
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from unittest.mock import Mock

import pytest
import torch
from draws import draws
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from sharp import sharpened

from tformer_lib import pretrained
from tformer_lib.generation import cut, generate, generate_uncached
from tformer_lib.paged_attention import BlockAllocator
from tformer_lib.serving import (
    LLM,
    Engine,
    Inputs,
    JoinedFeedForward,
    JoinedProjections,
    Params,
    Request,
    Scheduler,
    Speculation,
    TextStream,
    blocks_that_fit,
    graph_sizes,
    overlap,
    runner,
)
from tformer_lib.serving.command import main
from tformer_lib.serving.runner import likeliest
from tformer_lib.serving.scheduler import POLICIES
from tformer_lib.serving.turns import Turns
from tformer_lib.tokens import characters
from tformer_lib.transformer import Decoder, ModelConfig

VOCAB, CONTEXT = 23, 40


def make_model(seed=5, **options):
    torch.manual_seed(seed)
    shape = {
        "width": 16,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "positions": "rope",
        "tie_embeddings": False,
        **options,
    }
    return sharpened(Decoder(ModelConfig(vocab_size=VOCAB, max_length=CONTEXT, **shape)).double())


MODEL = make_model()
ALONE: dict = {}


def alone(prompt, **rules):
    """What the request gets without an engine."""
    key = (tuple(prompt), tuple(sorted(rules.items())))
    if key not in ALONE:
        ALONE[key] = generate(MODEL, [prompt], **rules)[0]
    return ALONE[key]


def check_all_blocks_are_back(engine):
    allocator = engine.allocator
    assert not engine.busy
    assert allocator.held == 0
    assert allocator.available == allocator.blocks
    assert set(allocator.holders) == {0}
    assert len(engine.scheduler.free_batch_slots) == len(engine.scheduler.tables) - 1


# Any schedule


PREFIXES = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 11, 12], [7]]


@st.composite
def requests(draw):
    """(step at which it arrives, prompt, max_new_tokens, stop token or None, step at which it is cancelled or None)."""
    prefix = draw(st.sampled_from(PREFIXES))
    tail = draw(st.lists(st.integers(0, VOCAB - 1), max_size=4))
    new = draw(st.integers(1, 14))
    stop = draw(st.none() | st.integers(0, VOCAB - 1))
    cancelled = draw(st.none() | st.none() | st.integers(1, 20))
    return draw(st.integers(0, 12)), prefix[: draw(st.integers(1, len(prefix)))] + tail, new, stop, cancelled


@draws(60)
@given(
    plans=st.lists(requests(), min_size=1, max_size=7),
    max_num_seqs=st.integers(1, 5),
    more_budget=st.integers(0, 12),
    block_size=st.sampled_from([1, 2, 4, 8]),
    more_blocks=st.integers(0, 8),
    ahead=st.integers(0, 1),
    prefix_cache=st.booleans(),
    spare=st.sampled_from([0.0, 1.0]),
    policy=st.sampled_from(POLICIES),
)
def test_every_schedule_writes_what_each_request_gets_alone(
    plans, max_num_seqs, more_budget, block_size, more_blocks, ahead, prefix_cache, spare, policy
):
    longest = max(len(prompt) + new - 1 for _, prompt, new, _, _ in plans)
    engine = Engine(
        MODEL,
        blocks=-(-longest // block_size) + more_blocks,  # the longest fits, most of the time not two
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        budget=max_num_seqs + more_budget,
        ahead=ahead,
        prefix_cache=prefix_cache,
        spare_blocks=spare,
        policy=policy,
    )
    made, step = {}, 0
    while engine.busy or len(made) < len(plans):
        for i, (arrives, prompt, new, stop, cancelled) in enumerate(plans):
            if arrives == step:
                stops = () if stop is None else (stop,)
                made[i] = engine.add(prompt, {"max_new_tokens": new, "stop_tokens": stops})
            if cancelled == step and i in made:
                engine.cancel(made[i])
        engine.step()
        step += 1
        assert step < 2000, "the engine makes no progress"
    for i, (_, prompt, new, stop, cancelled) in enumerate(plans):
        expected = cut(alone(prompt, max_new_tokens=new), () if stop is None else (stop,))
        if made[i].finish_reason == "cancelled":
            assert cancelled is not None
            expected = expected[: len(made[i].new_tokens)]
        else:
            assert made[i].finish_reason == ("stop" if stop is not None and expected[-1] == stop else "length")
        assert made[i].new_tokens == expected
    check_all_blocks_are_back(engine)


def test_a_shortage_preempts_the_latest_and_loses_nothing():
    prompts = [[i, 2, 3, 4, 5, 6] for i in range(6)]
    engine = Engine(MODEL, blocks=12, block_size=4, max_num_seqs=6, budget=32, prefix_cache=False)
    made = [engine.add(prompt, {"max_new_tokens": 20}) for prompt in prompts]
    while engine.busy:
        engine.step()
        arrivals = [request.arrival for request in engine.scheduler.running]
        assert arrivals == sorted(arrivals)
        assert all(r.arrival > max(arrivals, default=-1) for r in engine.scheduler.waiting)
    assert engine.scheduler.preemptions > 0
    assert made[0].preemptions == 0
    assert [request.new_tokens for request in made] == [alone(prompt, max_new_tokens=20) for prompt in prompts]
    check_all_blocks_are_back(engine)


def test_no_step_passes_its_budget_and_long_prompts_come_in_pieces():
    engine = Engine(MODEL, block_size=4, max_num_seqs=3, budget=5)
    made = [engine.add(list(range(20)), {"max_new_tokens": 6}) for _ in range(3)]
    engine.run()
    assert all(step.tokens <= 5 for step in engine.log)
    assert [count for step in engine.log for arrival, _, count in step.rows if arrival == 0][:4] == [5, 5, 5, 5]
    mixed = [step for step in engine.log if step.samples and step.tokens > step.samples]
    assert mixed, "no step read a prompt while another row wrote"
    assert all(request.new_tokens == made[0].new_tokens for request in made)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_says_who_waits_while_a_prompt_is_read(policy):
    engine = Engine(MODEL, block_size=4, max_num_seqs=4, budget=8, policy=policy)
    engine.add([1, 2], {"max_new_tokens": 12})
    engine.step()
    engine.step()
    late = engine.add(list(range(20)), {"max_new_tokens": 2})
    engine.run()
    prompts = [step for step in engine.log if any(arrival == 1 and count > 1 for arrival, _, count in step.rows)]
    writers = [{arrival for arrival, _, _ in step.rows} - {1} for step in prompts]
    first = next(place for place, step in enumerate(engine.log) if step is prompts[0])
    if policy in ("mixed", "longest first"):
        assert (len(prompts), writers, first) == (3, [{0}] * 3, 2)
    elif policy == "prefill first":
        assert (len(prompts), writers, first) == (3, [set()] * 3, 2)
    else:
        assert (len(prompts), writers, first) == (3, [set()] * 3, 12)
    assert late.new_tokens == alone(list(range(20)), max_new_tokens=2)


def serve_by(policy, news, **options):
    """An engine that has served them all, and the requests in the order in which they were let in."""
    prompts = [[i, 2, 3, 4, 5, 6] for i in range(len(news))]
    engine = Engine(MODEL, block_size=4, budget=32, prefix_cache=False, policy=policy, **options)
    made = [engine.add(prompt, {"max_new_tokens": new}) for prompt, new in zip(prompts, news, strict=True)]
    begun = []
    while engine.busy:
        engine.step()
        begun += [request for request in engine.scheduler.running if request not in begun]
    for request, prompt, new in zip(made, prompts, news, strict=True):
        assert request.new_tokens == alone(prompt, max_new_tokens=new)
    check_all_blocks_are_back(engine)
    return engine, [request.params.max_new_tokens for request in begun]


def test_the_longest_are_let_in_first_and_only_as_many_as_will_fit():
    news = [4, 30, 12, 25, 3, 18, 30, 9]
    engine, begun = serve_by("mixed", news, blocks=21, max_num_seqs=8)
    assert engine.scheduler.preemptions > 0
    engine, begun = serve_by("longest first", news, blocks=21, max_num_seqs=8)
    assert begun == sorted(news, reverse=True)
    assert engine.scheduler.preemptions == 0
    steps = {
        policy: len(serve_by(policy, [4, 4, 4, 4, 20], max_num_seqs=2)[0].log) for policy in ("mixed", "longest first")
    }
    assert steps["mixed"] - steps["longest first"] >= 7  # the two places before the long one are not waited for


def test_what_will_be_held_at_most_is_foreseen():
    scheduler = Scheduler(BlockAllocator(100, 4), max_num_seqs=4, budget=64, max_blocks=20)
    for prompt, new in ((10, 8), (3, 20), (6, 1)):
        scheduler.add(Request(None, [0] * prompt, Params(max_new_tokens=new)))
    scheduler.plan()
    # One token of each is on its way. The rows that run may then write 7, 19 and 0 more beyond 11, 4 and 7 tokens. When
    # the first has written its 7, it holds 18, the second 11 and a fourth of 5 tokens 12: 41, and 3 places in each.
    fourth = Request(None, [0] * 5, Params(max_new_tokens=15))
    assert scheduler._peak(fourth) == (41 + 3 * 3) / 4


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="policy must be one of mixed, prefill first"):
        Engine(MODEL, policy="any")


def test_a_shared_beginning_is_computed_once():
    prompt = list(range(1, 18))
    engine = Engine(MODEL, block_size=4, max_num_seqs=4, budget=64)
    first = engine.add(prompt, {"max_new_tokens": 3})
    engine.run()
    again = engine.add(prompt, {"max_new_tokens": 3})
    engine.run()
    assert (first.reused, again.reused) == (0, 16)
    assert again.new_tokens == first.new_tokens
    exact = engine.add(prompt[:16], {"max_new_tokens": 3})  # fills its last block, all of which is known
    engine.run()
    assert exact.reused == 12
    assert exact.new_tokens == alone(prompt[:16], max_new_tokens=3)
    together = [engine.add([20, *prompt], {"max_new_tokens": 3}) for _ in range(3)]  # in one step
    engine.run()
    assert [request.reused for request in together] == [0, 16, 16]
    assert all(request.new_tokens == alone([20, *prompt], max_new_tokens=3) for request in together)
    check_all_blocks_are_back(engine)


def test_a_written_text_is_a_prefix_for_the_next_turn():
    engine = Engine(MODEL, block_size=4, max_num_seqs=2, budget=64)
    first = engine.add([1, 2, 3], {"max_new_tokens": 14})
    engine.run()
    second = engine.add([*first.tokens, 9], {"max_new_tokens": 3})
    engine.run()
    assert second.reused == 16
    assert second.new_tokens == alone([*first.tokens, 9], max_new_tokens=3)


# Sampling


@draws(15)
@given(seeds=st.lists(st.integers(0, 50), min_size=2, max_size=4), more=st.integers(0, 9), ahead=st.integers(0, 1))
def test_a_seeded_request_does_not_depend_on_its_neighbours(seeds, more, ahead):
    rules = [
        {"temperature": 1.3, "top_k": 20, "top_p": 0.95},
        {"temperature": 1.0, "repetition_penalty": 1.5},
        {"repetition_penalty": 2.0},
        {},
    ]
    engine = Engine(MODEL, blocks=12, block_size=4, max_num_seqs=4, budget=4 + more, ahead=ahead)
    plans = [([seed % VOCAB, 3, 1], {"seed": seed, **rules[i % 4]}) for i, seed in enumerate(seeds)]
    made = [engine.add(prompt, {"max_new_tokens": 12, **wish}) for prompt, wish in plans]
    engine.run()
    for request, (prompt, wish) in zip(made, plans, strict=True):
        assert request.new_tokens == alone(prompt, max_new_tokens=12, **wish)


@pytest.mark.parametrize("ahead", [0, 1])
def test_log_probabilities_are_the_models_own_for_those_who_ask(ahead):
    rules = [{"logprobs": 0}, {"logprobs": 3, "temperature": 2.0, "repetition_penalty": 1.5}, {}, {"logprobs": 50}]
    engine = Engine(MODEL, blocks=12, block_size=4, max_num_seqs=4, budget=6, ahead=ahead, prefix_cache=False)
    made = [engine.add([i, 2, 3, 4, 5], {"max_new_tokens": 16, **wish}) for i, wish in enumerate(rules)]
    engine.run()
    assert engine.scheduler.preemptions > 0
    for request, wish in zip(made, rules, strict=True):
        wanted = {key: value for key, value in wish.items() if key != "logprobs"}
        assert request.new_tokens == alone(request.prompt, max_new_tokens=16, **wanted)
        if "logprobs" not in wish:
            assert request.logprobs == []
            continue
        with torch.no_grad():
            right = MODEL(torch.tensor([request.tokens]))[0, request.prompt_length - 1 : -1].log_softmax(-1)
        for entry, token, row in zip(request.logprobs, request.new_tokens, right, strict=True):
            assert entry.chosen == pytest.approx(row[token].item(), abs=1e-9)
            values, tokens = row.topk(min(wish["logprobs"], VOCAB))
            assert [token for token, _ in entry.top] == tokens.tolist()
            assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-9)


def test_sampled_requests_survive_a_preemption():
    rules = {"temperature": 1.5, "repetition_penalty": 1.3, "max_new_tokens": 20}
    engine = Engine(MODEL, blocks=12, block_size=4, max_num_seqs=6, budget=32, prefix_cache=False)
    made = [engine.add([i, 2, 3, 4, 5, 6], {"seed": i, **rules}) for i in range(6)]
    engine.run()
    assert engine.scheduler.preemptions > 0
    for i, request in enumerate(made):
        assert request.new_tokens == alone([i, 2, 3, 4, 5, 6], seed=i, **rules)


# Other models


@pytest.mark.parametrize(
    "options",
    [
        {"positions": "learned"},
        {"positions": "sinusoidal"},
        {"feed_forward": "swiglu"},
        {"positions": "alibi"},
        {"window": 3},
        {"window": 5, "layer_types": ("window", "nope"), "attention_sinks": True, "qk_norm": "head"},
        {"attention_softcap": 2.0, "attention_scale": 0.7, "attention_gate": True},
    ],
)
def test_other_decoders_are_served_too(options):
    model = make_model(**options)
    engine = Engine(model, blocks=14, block_size=4, max_num_seqs=3, budget=6)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11]]
    made = [engine.add(prompt, {"max_new_tokens": 12}) for prompt in prompts]
    engine.run()
    assert [request.new_tokens for request in made] == generate(model, prompts, max_new_tokens=12)
    assert [request.new_tokens for request in made] == [
        generate_uncached(model, prompt, max_new_tokens=12) for prompt in prompts
    ]


@pytest.mark.parametrize("bias", [True, False])
def test_joined_projections_are_the_same_layer(bias):
    plain, joined = (make_model(bias=bias, feed_forward="swiglu") for _ in range(2))
    for block in joined.stack.blocks:
        block.attention.joined = JoinedProjections(block.attention)
        JoinedFeedForward.join(block.feed_forward)
    together = joined.stack.blocks[0].feed_forward
    assert together.up.weight.data_ptr() == together.joined[0][len(together.joined[0]) // 2 :].data_ptr()
    assert joined.state_dict().keys() == plain.state_dict().keys()
    attention = joined.stack.blocks[0].attention
    weights = attention.joined
    assert attention.k_proj.weight.data_ptr() == weights.weight[weights.sizes[0] :].data_ptr()
    engines = [Engine(model, block_size=4, max_num_seqs=3, budget=8) for model in (plain, joined)]
    texts = [[engine.add([1, 2, 3 + i], {"max_new_tokens": 8}) for i in range(4)] for engine in engines]
    for engine in engines:
        engine.run()
    assert [r.new_tokens for r in texts[0]] == [r.new_tokens for r in texts[1]]


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_likeliest_token_is_the_first_of_the_largest(device, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(5, (40, 96), generator=generator).to(dtype)  # many are equal
    logits[3, 50], logits[4, 7], logits[5, :] = math.nan, math.inf, -math.inf
    tokens, finite = likeliest(logits.to(device))
    assert tokens.tolist() == logits.argmax(-1).tolist()
    assert (~finite).nonzero().flatten().tolist() == [3, 4, 5]


def test_steps_that_are_not_recorded_leave_compiled_blocks_alone(monkeypatch):
    from torch._dynamo.utils import counters

    model, traced = make_model(), []
    for block in model.stack.blocks:
        block.compile(backend="eager", dynamic=True)
    for graphs, compiled_from in (({}, 8192), ({1: ()}, 8192), ({1: ()}, 4)):
        torch._dynamo.reset()
        counters.clear()
        monkeypatch.setattr(runner, "COMPILED_FROM", compiled_from)
        engine = Engine(model, blocks=8, block_size=4, max_num_seqs=1, budget=8)
        engine.runner.graphs = graphs  # a prompt of five tokens fits into no recorded step
        made = engine.add([1, 2, 3, 4, 5], {"max_new_tokens": 1})
        engine.run()
        assert made.new_tokens == alone([1, 2, 3, 4, 5], max_new_tokens=1)
        traced.append(counters["frames"]["total"] > 0)
    assert traced == [True, False, True]


HYBRID = {
    "layer_types": ("linear", "full"),
    "linear": {"key_heads": 2, "value_heads": 4, "head_dim": 4, "value_dim": 6},
}


@pytest.mark.parametrize("options", [HYBRID, HYBRID | {"layer_types": ("linear",), "positions": "none"}])
@pytest.mark.parametrize("blocks", [8, 40])
def test_states_follow_their_rows_through_chunks_and_preemption(options, blocks):
    """Prompts in pieces, rows of unequal counts, a batch slot that is taken again, and rows that lose their blocks."""
    model = make_model(**options)
    engine = Engine(model, blocks=blocks, block_size=4, max_num_seqs=3, budget=7)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11, 12], [11], [1, 2, 3], [5] * 12, [6, 7]]
    made = [engine.add(prompt, {"max_new_tokens": 12}) for prompt in prompts]
    engine.run()
    expected = [generate_uncached(model, prompt, max_new_tokens=12) for prompt in prompts]
    assert [request.new_tokens for request in made] == expected
    assert (engine.scheduler.preemptions > 0) == (blocks == 8)
    again = engine.add(prompts[1], {"max_new_tokens": 12})
    engine.run()
    assert again.new_tokens == expected[1]
    with pytest.raises(ValueError, match="cannot go back to before a draft"):
        Engine(model, speculation=Speculation())
    with pytest.raises(ValueError, match="not deterministic"):
        Engine(model, deterministic=True)


@pytest.mark.parametrize("budget", [3, 4, 40])
@pytest.mark.parametrize("kinds", [("window", "full"), ("window",)])
def test_window_layers_keep_a_ring_in_each_batch_slot(kinds, budget):
    """Texts go round a ring several times, in chunks that begin anywhere in a block, after preemption too."""
    model = make_model(window=5, layer_types=kinds, attention_sinks=True)
    options = {"blocks": 16, "block_size": 4, "max_num_seqs": 3, "budget": budget}
    engine = Engine(model, window_rings=True, **options)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [11], [5] * 19, [6, 7]]
    made = [engine.add(prompt, {"max_new_tokens": 16}) for prompt in prompts]
    engine.run()
    expected = [generate_uncached(model, prompt, max_new_tokens=16) for prompt in prompts]
    assert [request.new_tokens for request in made] == expected
    ring = engine.runner.pools[0][0]
    # three batch slots and nobody's; a window and a step, and one
    assert ring.shape[0] == 4 * (-(-(5 + budget) // 4) + 1)
    drafted = Engine(model, window_rings=True, speculation=Speculation(tokens=3), **options)
    again = [drafted.add(prompt, {"max_new_tokens": 16}) for prompt in prompts]
    drafted.run()
    assert [request.new_tokens for request in again] == expected
    same = Engine(model, window_rings=True, deterministic=True, **options)
    again = [same.add(prompt, {"max_new_tokens": 16}) for prompt in prompts]
    same.run()
    assert [request.new_tokens for request in again] == expected
    with pytest.raises(ValueError, match="window_rings are for window layers"):
        Engine(MODEL, window_rings=True)


def test_models_whose_rows_depend_on_each_other_are_refused():
    with pytest.raises(ValueError, match="DynamicNTK turns keys by the length"):
        Engine(make_model(rope_scaling={"rope_type": "dynamic", "factor": 2.0}))
    with pytest.raises(ValueError, match="max_context is 41, the model has learned 40 positions"):
        Engine(make_model(positions="learned"), max_context=41)
    with pytest.raises(ValueError, match="at least 1 token for each of 8 batch slots, got 4"):
        Engine(MODEL, max_num_seqs=8, budget=4)


# Threads and streams


def test_threads_that_share_an_engine_get_their_own_texts():
    llm = LLM(MODEL, blocks=24, block_size=4, max_num_seqs=4, budget=8)
    prompts = [[i, 2, 3, 1 + i % 5] for i in range(8)]

    def work(i):
        rules = {"max_new_tokens": 8, "temperature": 0.5 * (i % 3), "seed": i}
        for _ in range(4):
            if i % 2:
                tokens = llm.generate([prompts[i]], rules)[0].new_tokens
            else:
                tokens = [piece.token for piece in llm.stream([prompts[i]], rules)]
            assert tokens == alone(prompts[i], **rules)
        return True

    for i in range(8):  # the oracle is asked before, by one thread
        alone(prompts[i], max_new_tokens=8, temperature=0.5 * (i % 3), seed=i)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [True] * 8
    check_all_blocks_are_back(llm.engine)


def test_a_stream_gives_its_own_pieces_and_all_of_them_whoever_steps():
    llm = LLM(MODEL, blocks=24, block_size=4, max_num_seqs=4, budget=8)
    first, second = (llm.stream([[i, 2, 3]], {"max_new_tokens": 10}) for i in (1, 2))
    got = [next(first), next(second), next(second)]
    assert llm.generate([[3, 2]], {"max_new_tokens": 12})[0].new_tokens == alone([3, 2], max_new_tokens=12)
    got += first
    assert [p.token for p in got if p.request is got[0].request] == alone([1, 2, 3], max_new_tokens=10)
    llm.engine.run()
    got += second
    assert [p.token for p in got if p.request is got[1].request] == alone([2, 2, 3], max_new_tokens=10)
    assert len(got) == 20
    check_all_blocks_are_back(llm.engine)


def test_a_stream_that_is_thrown_away_takes_nothing_with_it():
    llm = LLM(MODEL, blocks=24, block_size=4, max_num_seqs=4, budget=8)
    kept, lost = llm.stream([[1, 2, 3]], {"max_new_tokens": 10}), llm.stream([[2, 2, 3]], {"max_new_tokens": 10})
    tokens = [next(kept).token, next(kept).token]
    next(lost)
    launch = llm.engine.runner.launch

    def collect(*arguments):  # as the garbage collector may at any time
        nonlocal lost
        lost = None
        return launch(*arguments)

    llm.engine.runner.launch = collect
    tokens += [piece.token for piece in kept]
    assert tokens == alone([1, 2, 3], max_new_tokens=10)
    check_all_blocks_are_back(llm.engine)


def test_a_listener_hears_everything_and_may_fail_alone():
    engine, heard = Engine(MODEL, blocks=24, block_size=4, max_num_seqs=4, budget=8), []

    def breaks(piece):
        raise OSError("nobody there")

    def steps(piece):
        engine.step()

    good = engine.add([1, 2, 3], {"max_new_tokens": 5}, listener=heard.append)
    bad = [engine.add([1, 2, 4], {"max_new_tokens": 5}, listener=listener) for listener in (breaks, steps)]
    left = engine.add([1, 2, 5], {"max_new_tokens": 5}, listener=heard.append)
    engine.step()
    engine.cancel(left)
    engine.run()
    assert [piece.token for piece in heard if piece.request is good] == alone([1, 2, 3], max_new_tokens=5)
    assert [piece.token for piece in heard if piece.request is left][-1] is None
    assert [request.finish_reason for request in (good, *bad, left)] == ["length", "error", "error", "cancelled"]
    assert "nobody there" in bad[0].error
    assert "from within a step" in bad[1].error
    check_all_blocks_are_back(engine)


def test_turns_come_in_order_and_to_one_at_a_time():
    turns, order, inside = Turns(), [], []

    def take(name):
        with turns, turns:
            inside.append(name)
            assert inside == [name]
            order.append(name)
            inside.remove(name)

    threads = [threading.Thread(target=take, args=(name,)) for name in range(8)]
    with turns:
        for place, thread in enumerate(threads, start=1):
            thread.start()
            while len(turns.waiting) < place:
                time.sleep(0.001)
        interrupted = turns.waiting[3]
        turns._give_up(*interrupted)  # what Ctrl-C does to one that waits
    for place, thread in enumerate(threads):
        if place != 3:
            thread.join(10)
    assert order == [0, 1, 2, 4, 5, 6, 7]
    assert turns.holder is None
    interrupted[1].release()  # the thread that still waits: it takes a turn that nobody gave
    threads[3].join(10)
    gate = threading.Lock()
    turns.holder, turns.depth = 5, 1
    turns._give_up(5, gate)  # Ctrl-C just after the turn had come
    assert turns.holder is None


class Schedules(RuleBasedStateMachine):
    """Requests, streams, cancellations and changed minds in any order, in pools that are too small."""

    @initialize(
        max_num_seqs=st.integers(1, 4),
        more_budget=st.integers(0, 9),
        block_size=st.sampled_from([1, 2, 4]),
        more_blocks=st.integers(0, 6),
        ahead=st.integers(0, 1),
        prefix_cache=st.booleans(),
    )
    def make(self, max_num_seqs, more_budget, block_size, more_blocks, ahead, prefix_cache):
        blocks = -(-24 // block_size) + more_blocks
        options = {"blocks": blocks, "block_size": block_size, "prefix_cache": prefix_cache, "ahead": ahead}
        self.llm = LLM(MODEL, max_num_seqs=max_num_seqs, budget=max_num_seqs + more_budget, **options)
        self.engine, self.asked, self.streams, self.cancelled = self.llm.engine, [], [], set()

    prompts = st.sampled_from(PREFIXES).flatmap(
        lambda prefix: st.builds(
            lambda n, tail: [*prefix[:n], *tail],
            st.integers(1, len(prefix)),
            st.lists(st.integers(0, VOCAB - 1), max_size=3),
        )
    )
    wishes = st.fixed_dictionaries(
        {"max_new_tokens": st.integers(1, 12)},
        optional={
            "temperature": st.sampled_from([0.7, Fraction(3, 2), 2**64]),
            "seed": st.integers(-3, 3),
            "repetition_penalty": st.sampled_from([1.3, 1e30]),
            "stop_tokens": st.tuples(st.integers(0, VOCAB - 1)),
        },
    )

    @rule(prompt=prompts, wish=wishes)
    def add(self, prompt, wish):
        self.asked.append((self.engine.add(prompt, wish), wish))

    @rule(prompt=prompts, wish=wishes)
    def open(self, prompt, wish):
        self.streams.append([self.llm.stream([prompt], wish), prompt, wish, [], False])

    @rule()
    def step(self):
        self.engine.step()

    @rule(place=st.integers(0, 5), pieces=st.integers(1, 4))
    def read(self, place, pieces):
        if place < len(self.streams):
            stream, _, _, got, _ = self.streams[place]
            got += itertools.islice(stream, pieces)

    @rule(place=st.integers(0, 5))
    def close(self, place):
        if place < len(self.streams):
            self.streams[place][0].close()
            self.streams[place][4] = True

    @rule(place=st.integers(0, 9))
    def cancel(self, place):
        if place < len(self.asked):
            request, _ = self.asked[place]
            if request.finish_reason is None:
                self.cancelled.add(request)
            self.engine.cancel(request)

    @rule(prompt=prompts, wish=wishes)
    def generate_beside(self, prompt, wish):
        (request,) = self.llm.generate([prompt], wish)
        assert request.new_tokens == alone(prompt, **wish)

    @rule(prompt=prompts, refused=st.sampled_from([{"temperature": 1e39}, {"max_new_tokens": 99}, {"tempo": 1}]))
    def ask_for_nonsense(self, prompt, refused):
        with pytest.raises(ValueError, match=r"finite in float32|the engine takes 40|unknown parameters: tempo"):
            self.engine.add(prompt, refused)

    @rule()
    def forget(self):
        self.engine.forget()

    @invariant()
    def blocks_are_counted(self):
        scheduler, allocator = self.engine.scheduler, self.engine.allocator
        holders = Counter(block for request in scheduler.running for block in request.table.blocks)
        assert [holders[block] for block in range(allocator.blocks)] == allocator.holders
        arrivals = [request.arrival for request in [*scheduler.running, *scheduler.waiting]]
        assert arrivals == sorted(arrivals)

    @invariant()
    def nobody_writes_what_it_would_not_alone(self):
        for request, wish in self.asked:
            whole = alone(request.prompt, **wish)
            assert request.new_tokens == whole[: len(request.new_tokens)]

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        self.engine.run()
        for request, wish in self.asked:
            whole = alone(request.prompt, **wish)
            stopped = whole[-1] in wish.get("stop_tokens", ())
            assert request.finish_reason == (
                "cancelled" if request in self.cancelled else "stop" if stopped else "length"
            )
            assert request in self.cancelled or request.new_tokens == whole
        for stream, prompt, wish, got, closed in self.streams:
            got += stream
            tokens, whole = [piece.token for piece in got if piece.token is not None], alone(prompt, **wish)
            assert tokens == (whole[: len(tokens)] if closed else whole)
            assert len({piece.request for piece in got}) <= 1
        self.engine.run()  # the last step that was launched ahead, for nobody
        check_all_blocks_are_back(self.engine)


Schedules.TestCase.settings = draws(40, stateful_step_count=30)
TestSchedules = Schedules.TestCase


# One request's troubles are its own


NUMBERS = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True),
    st.fractions(),
    st.integers(-3, 3),
    st.integers(-(2**70), 2**70),
    st.sampled_from([2**64, 10**400, 1e300, 5e-324, -0.0, -1e-99, 1 + 1e-12, None, "1", True]),
)


@draws(150)
@given(
    wish=st.dictionaries(
        st.sampled_from(["temperature", "seed", "repetition_penalty", "top_k", "top_p", "min_p", "max_new_tokens"]),
        NUMBERS,
        min_size=1,
    ),
    sampled=st.booleans(),
)
def test_whatever_numbers_are_asked_for_the_others_go_on(wish, sampled):
    llm, good = LLM(MODEL, blocks=24, block_size=4, max_num_seqs=4, budget=8), {"max_new_tokens": 5}
    wish = {"max_new_tokens": 4, "temperature": 0.8 if sampled else 0.0, **wish}
    before, odd, after = llm.generate([[1, 2], [3, 4], [5, 6]], [good, wish, good])
    assert before.new_tokens == alone([1, 2], **good)
    assert after.new_tokens == alone([5, 6], **good)
    if odd.error is None:
        assert odd.new_tokens == alone([3, 4], **wish)
    else:
        assert odd.new_tokens == []
        assert "must be" in odd.error or "the engine takes" in odd.error
    check_all_blocks_are_back(llm.engine)


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_token_without_bytes_ends_its_own_request(ahead):
    class Gap(Bytes):
        def decode_single_token_bytes(self, token):
            if token == hole:
                raise KeyError(token)
            return bytes([token])

    wish = {"max_new_tokens": 9, "temperature": 2.0, "seed": 1}
    others, whole = alone([5, 6], **wish), alone([1, 2, 3], **wish)
    hole = next(token for token in whole[2:] if token not in others and token not in whole[:2])
    llm = LLM(MODEL, Gap(), blocks=24, block_size=4, max_num_seqs=2, budget=8, ahead=ahead)
    broken, fine = llm.generate([[1, 2, 3], [5, 6]], wish)
    assert (broken.finish_reason, fine.finish_reason) == ("error", "length")
    assert broken.error == f"token {hole} has no text: KeyError({hole})"
    assert broken.new_tokens == whole[: whole.index(hole) + 1]
    assert fine.new_tokens == others
    last = list(llm.stream([[1, 2, 3]], wish))[-1]
    assert (last.token, last.request.finish_reason) == (hole, "error")
    llm.engine.run()
    check_all_blocks_are_back(llm.engine)


@pytest.mark.parametrize("wish", [{}, {"temperature": 1.0}, {"repetition_penalty": 2.0}])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("ahead", [0, 1])
def test_logits_that_are_no_numbers_end_their_own_request(number, ahead, wish):
    engine = Engine(MODEL, blocks=24, block_size=4, max_num_seqs=2, budget=8, ahead=ahead)
    good, bad = (engine.add([i, 2, 3], {"max_new_tokens": 6, **wish}) for i in (1, 2))
    choose = engine.runner.choose

    def broken(logits, requests, batch_slots):
        for place, request in enumerate(requests):
            if request is bad and len(request.tokens) + request.pending > 5:
                logits[place] = number
        return choose(logits, requests, batch_slots)

    engine.runner.choose = broken
    engine.run()
    assert (good.finish_reason, bad.finish_reason) == ("length", "error")
    assert bad.error == "the logits after its tokens are not finite"
    assert good.new_tokens == alone([1, 2, 3], max_new_tokens=6, **wish)
    assert bad.new_tokens == alone([2, 2, 3], max_new_tokens=6, **wish)[:2]
    check_all_blocks_are_back(engine)


@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize("block_size", [1, 2])
def test_a_text_that_ends_without_numbers_leaves_no_beginning_to_others(ahead, block_size):
    """In its second layer a NaN is in every key of its pass: masked, its value is still multiplied by 0."""
    poison, model = 7, make_model()
    with torch.no_grad():
        model.embedding.tokens.weight[poison] = math.nan
    engine = Engine(model, blocks=24, block_size=block_size, max_num_seqs=2, budget=16, ahead=ahead)
    bad = engine.add([1, 2, 3, poison, 4, 5], {"max_new_tokens": 6})
    engine.run()
    good = engine.add([1, 2, 3, 4, 5], {"max_new_tokens": 3})
    engine.run()
    assert (bad.finish_reason, good.finish_reason, good.reused) == ("error", "length", 0)
    assert good.new_tokens == generate(model, [[1, 2, 3, 4, 5]], max_new_tokens=3)[0]
    check_all_blocks_are_back(engine)


@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize("speculation", [None, Speculation(tokens=2, ngram_min=1)])
def test_those_who_share_a_beginning_that_turns_out_without_numbers_are_computed_anew(ahead, speculation):
    poison, model = 7, make_model()
    with torch.no_grad():
        model.embedding.tokens.weight[poison] = math.nan
    engine = Engine(model, block_size=1, max_num_seqs=4, budget=32, ahead=ahead, speculation=speculation)
    first, bad, good = ([1, 9], [1, 2, 3, poison, 4, 5], [1, 2, 3, 4, 5])
    made = [engine.add(prompt, {"max_new_tokens": 8}) for prompt in (first, bad, good)]
    engine.run()
    assert [request.finish_reason for request in made] == ["length", "error", "length"]
    for request, prompt in ((made[0], first), (made[2], good)):
        assert request.new_tokens == generate(model, [prompt], max_new_tokens=8)[0]
    assert made[2].preemptions == 1
    check_all_blocks_are_back(engine)


def test_a_stream_tells_of_those_that_were_refused():
    pieces = list(LLM(MODEL).stream([[1, 2], [], [3]], [{"max_new_tokens": 2}, {}, {"tempo": 3}]))
    refused = [piece for piece in pieces if piece.token is None]
    assert [(piece.request.id, piece.request.finish_reason) for piece in refused] == [(1, "error"), (2, "error")]
    assert [piece.token for piece in pieces if piece.request.id == 0] == alone([1, 2], max_new_tokens=2)


def test_what_is_given_as_an_iterator_is_read_once():
    params = Params(stop_tokens=iter([3, 4]), stop=iter(["a", "b"]))
    assert (params.stop_tokens, params.stop) == ((3, 4), ("a", "b"))
    assert params == Params.of({"stop_tokens": [3, 4], "stop": ["a", "b"]})
    whole = alone([1, 2, 3], max_new_tokens=10)
    assert Engine(MODEL).add(iter([1, 2, 3]), {"max_new_tokens": 2}).prompt == [1, 2, 3]
    (request,) = LLM(MODEL).generate(iter([[1, 2, 3]]), {"max_new_tokens": 10, "stop_tokens": iter([whole[3]])})
    assert request.new_tokens == cut(whole, [whole[3]])


# The model under the engine


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("change", ["written", "loaded", "replaced", "data"])
def test_when_the_weights_change_nothing_is_answered_from_the_old_ones(change, ahead):
    model, other = make_model(seed=5), make_model(seed=6)
    engine = Engine(model, blocks=24, block_size=2, max_num_seqs=4, budget=32, ahead=ahead)
    prompt = [1, 2, 3, 4, 5, 6, 7]
    running = engine.add([8, 9, 10, 11], {"max_new_tokens": 12})
    first = engine.add(prompt, {"max_new_tokens": 3})
    while first.finish_reason is None:
        engine.step()
    if change == "written":
        with torch.no_grad():
            for old, new in zip(model.parameters(), other.parameters(), strict=True):
                old.copy_(new)
    elif change == "loaded":
        model.load_state_dict(other.state_dict())
    elif change == "replaced":
        model.load_state_dict(other.state_dict(), assign=True)
    else:
        for old, new in zip(model.parameters(), other.parameters(), strict=True):
            old.data.copy_(new)
        engine.forget()  # this leaves no trace
    before = len(running.tokens) + running.pending  # a token on its way is the old model's
    again = engine.add(prompt, {"max_new_tokens": 3})
    engine.run()
    assert again.reused == 0
    assert again.new_tokens == generate(other, [prompt], max_new_tokens=3)[0]
    kept = running.tokens[:before]
    assert running.tokens[before:] == generate(other, [kept], max_new_tokens=16 - before)[0]
    third = engine.add(prompt, {"max_new_tokens": 3})
    engine.run()
    assert third.reused == 6
    assert third.new_tokens == again.new_tokens
    check_all_blocks_are_back(engine)


def test_steps_are_in_evaluation_mode_and_leave_the_modes_alone():
    model = make_model(dropout=0.5)
    wanted = generate(model, [[1, 2, 3]], max_new_tokens=8)[0]
    model.train()
    model.stack.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    llm = LLM(model, blocks=16)
    assert [module.training for module in model.modules()] == modes
    for piece in llm.stream([[1, 2, 3]], {"max_new_tokens": 3}):
        assert [module.training for module in model.modules()] == modes, piece
    model.train()
    assert llm.generate([[1, 2, 3]], {"max_new_tokens": 8})[0].new_tokens == wanted
    assert all(module.training for module in model.modules())


def test_an_engine_made_under_inference_mode_serves_outside_and_the_other_way_round():
    wish = {"max_new_tokens": 5, "repetition_penalty": 1.5}
    with torch.inference_mode():
        made_inside = Engine(MODEL, blocks=16)
        made_inside.add([1, 2], wish)
        made_inside.step()
        model = make_model()
    made_inside.run()
    assert made_inside.log[-1].samples == 1
    stepped_inside = Engine(MODEL, blocks=16)
    first = stepped_inside.add([1, 2], wish)
    with torch.inference_mode():
        stepped_inside.step()
    second = stepped_inside.add([3, 4], wish)
    stepped_inside.run()
    assert (first.new_tokens, second.new_tokens) == (alone([1, 2], **wish), alone([3, 4], **wish))
    (request,) = LLM(model, blocks=16).generate([[1, 2]], wish)
    assert request.new_tokens == alone([1, 2], **wish)


# Text


TEXT = "A naïve café: 漢字, 🙂🙃 and the end. The end."


class Bytes:
    """An encoding with a token for each byte: every character that is not ASCII is cut."""

    n_vocab, eot_token = 256, 0

    def encode_ordinary(self, text):
        return list(text.encode())

    def decode_single_token_bytes(self, token):
        return bytes([token])


def test_pieces_are_whole_characters():
    stream = TextStream(Bytes())
    pieces = [stream.push(token) for token in TEXT.encode()] + [stream.finish()]
    assert "".join(pieces) == TEXT
    assert all(len(piece) <= 1 for piece in pieces)
    cut_off = TextStream(Bytes())
    assert [cut_off.push(token) for token in "é".encode()[:1]] == [""]
    assert cut_off.finish() == "\N{REPLACEMENT CHARACTER}"
    assert TextStream(Bytes()).push(300) == ""


@draws(200)
@given(
    text=st.text(alphabet="abé🙂", max_size=30),
    stop=st.lists(st.text(alphabet="abé🙂", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_end_the_text_wherever_tokens_are_cut(text, stop):
    beginnings = [text[:n] for n in range(len(text) + 1)]
    ended = next((t for t in beginnings if any(string in t for string in stop)), None)
    expected = text if ended is None else ended[: min(ended.find(string) for string in stop if string in ended)]
    stream, shown = TextStream(Bytes(), stop), ""
    for token in text.encode():
        shown += stream.push(token)
        assert expected.startswith(shown), "something was shown that had to be taken back"
        if stream.stopped:
            break
    assert stream.stopped == (ended is not None)
    assert shown + ("" if stream.stopped else stream.finish()) == expected


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [("abc", "cd", 1), ("abab", "abac", 2), ("aa", "aaa", 2), ("aaa", "aaa", 2), ("", "x", 0)],
)
def test_overlap_is_the_longest_begun_stop_string(text, stop, expected):
    assert overlap(text, stop) == expected


def test_a_stop_string_ends_one_request_alone():
    model, encoding = pretrained.load()
    prompts = ["Once upon a time", "One day"]
    free = LLM(model, encoding).generate(prompts, {"max_new_tokens": 50})
    stop = free[0].text[21:28]
    stopped = LLM(model, encoding).generate(prompts, [{"max_new_tokens": 50, "stop": [stop]}, {"max_new_tokens": 50}])
    assert stopped[0].text == free[0].text[: free[0].text.index(stop)]
    assert (stopped[0].finish_reason, stopped[1].finish_reason) == ("stop", "length")
    assert stopped[1].new_tokens == free[1].new_tokens
    assert free[0].text == encoding.decode(free[0].new_tokens)


def test_the_stream_yields_what_generate_returns_and_stops_when_nobody_listens():
    model, encoding = pretrained.load()
    prompts, rules = ["Once upon a time", "One day a", "The"], {"max_new_tokens": 20}
    whole = LLM(model, encoding).generate(prompts, rules)
    texts, tokens = ["", "", ""], [[], [], []]
    for piece in LLM(model, encoding).stream(prompts, rules):
        texts[piece.request.id] += piece.text
        tokens[piece.request.id].append(piece.token)
    assert texts == [request.text for request in whole]
    assert tokens == [request.new_tokens for request in whole]
    llm = LLM(model, encoding)
    listening = llm.stream(prompts, rules)
    next(listening)
    listening.close()
    llm.engine.run()
    check_all_blocks_are_back(llm.engine)


# What is refused


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1] * 30, {"max_new_tokens": 11}, "30 tokens and 11 to write make 41, the engine takes 40 a request"),
        ([1] * 20, {"max_new_tokens": 14}, "need 9 blocks, and the cache has 8 blocks of 4"),
        ([1, 99], {}, "holds token 99, the model knows 0 to 22"),
        ("text", {}, "needs an engine with an encoding"),
        ([1], {"stop": ["x"], "max_new_tokens": 2}, "stop strings need an engine with an encoding"),
        ([1], {"stop": "x"}, "stop must be a list of strings"),
        ([1], {"temprature": 1.0, "top": 3}, "unknown parameters: temprature, top; there are temperature, seed"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ([1], {"temperature": -1.0}, "temperature must be at least 0"),
        ([1], {"seed": [1]}, "seed must be one number"),
        ([1], {"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ([1], {"top_k": 2.5, "temperature": 1.0}, "top_k must be a whole number"),
        ([1], {"max_new_tokens": None}, "max_new_tokens must be a whole number"),
        ([1], {"stop": 5}, "stop must be a list of strings"),
        ([1], {"stop": torch.tensor(0.5)}, "stop must be a list of strings"),
        ([1.5], {}, "a prompt must be a text or a list of tokens"),
        (["1"], {}, "a prompt must be a text or a list of tokens"),
        ([1], {"stop_tokens": 3}, "stop_tokens must be a list of tokens"),
        ([1], {"logprobs": -1}, "logprobs must be at least 0, got -1"),
        ([1], {"logprobs": True}, "logprobs must be a whole number, got True"),
        ([1], {5: 1}, "unknown parameters: 5"),
        ([1], [3], "params must be Params or a dict"),
        (None, {}, "a prompt must be a text or a list of tokens"),
    ],
)
def test_a_bad_request_is_refused_and_the_others_go_on(prompt, params, message):
    options = {"blocks": 8, "block_size": 4, "max_num_seqs": 2, "budget": 8}
    good = [1, 2, 3]
    with pytest.raises(ValueError, match=message):
        Engine(MODEL, **options).add(prompt, params)
    answers = LLM(MODEL, **options).generate(
        [good, prompt, good], [{"max_new_tokens": 5}, params, {"max_new_tokens": 5}]
    )
    assert [request.finish_reason for request in answers] == ["length", "error", "length"]
    assert message.split(",")[0] in answers[1].error
    assert answers[0].new_tokens == answers[2].new_tokens == alone(good, max_new_tokens=5)


def test_a_long_context_takes_no_more_than_there_is():
    engine = Engine(MODEL, blocks=16, block_size=4, max_context=10**9)
    assert engine.scheduler.tables.shape == (65, 16)
    with pytest.raises(ValueError, match="need 17 blocks, and the cache has 16 blocks of 4"):
        engine.add([1] * 60, {"max_new_tokens": 6})
    request = engine.add([1] * 60, {"max_new_tokens": 5})
    engine.run()
    assert request.finish_reason == "length"


def test_senseless_calls_are_refused():
    llm = LLM(MODEL)
    with pytest.raises(ValueError, match="must be a list of prompts"):
        llm.generate("text")
    with pytest.raises(ValueError, match="must be a list of prompts, got 5"):
        llm.generate(5)
    for options, match in (
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"max_num_seqs": 2.5}, "max_num_seqs must be a whole number, got 2.5"),
        ({"max_context": 0}, "max_context must be at least 2"),
        ({"max_context": 2.5}, "max_context must be a whole number, got 2.5"),
        ({"blocks": 0}, "blocks must be at least 1, got 0"),
        ({"blocks": "all"}, "blocks must be a whole number, got 'all'"),
        ({"ahead": -1}, "ahead must be at least 0, got -1"),
        ({"spare_blocks": -1}, "spare_blocks must be at least 0, got -1"),
        ({"ahead": 10**12}, r"batch slots of \d+ blocks, and 1000000000000 ahead of it, takes [\d,.]+ GiB, cpu has"),
        ({"blocks": 10**12}, r"a pool of 16000000000000 tokens' keys and values takes [\d,.]+ GiB, cpu has"),
        ({"max_num_seqs": 10**11, "budget": 10**11}, r"a step of 100000000000 tokens in 100000000000 batch slots of"),
    ):
        with pytest.raises(ValueError, match=match):
            Engine(MODEL, **options)
    with pytest.raises(ValueError, match="one for each prompt: 2, got 1"):
        llm.generate([[1], [2]], [{}])
    with pytest.raises(ValueError, match="unknown parameters"):
        Params.of({"stop_token": 1})


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_a_step_that_fails_ends_what_runs_and_the_engine_goes_on(ahead, error):
    engine = Engine(MODEL, blocks=32, block_size=2, max_num_seqs=2, budget=4, ahead=ahead)
    prompt = [1, 2, 3, 4, 5, 6, 7]
    running, other, waiting = (engine.add(prompt, {"max_new_tokens": 5}) for _ in range(3))
    launch, engine.runner.launch = engine.runner.launch, Mock(side_effect=error)  # after blocks have got their names
    with pytest.raises(type(error)):
        engine.step()
    engine.runner.launch = launch
    assert (running.finish_reason, running.error) == ("error", repr(error))
    again = engine.add(prompt, {"max_new_tokens": 5})  # must not find what was never computed
    engine.run()
    assert {r.finish_reason for r in (other, waiting, again)} <= {"error", "length"}
    assert waiting.new_tokens == again.new_tokens == alone(prompt, max_new_tokens=5)
    check_all_blocks_are_back(engine)


def test_an_interrupted_answer_leaves_nothing_behind():
    llm = LLM(MODEL, blocks=32, block_size=4, max_num_seqs=1, budget=4)
    step, llm.engine.step = llm.engine.step, Mock(side_effect=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1, 2], [3]], {"max_new_tokens": 5})
    llm.engine.step = step
    assert not llm.engine.busy
    assert llm.generate([[1, 2]], {"max_new_tokens": 5})[0].new_tokens == alone([1, 2], max_new_tokens=5)


def test_another_engines_request_is_not_cancelled():
    ours, theirs = Engine(MODEL, blocks=16), Engine(MODEL, blocks=16)
    request = theirs.add([1, 2], {"max_new_tokens": 3})
    with pytest.raises(ValueError, match="another engine's"):
        ours.cancel(request)
    theirs.run()
    assert request.new_tokens == alone([1, 2], max_new_tokens=3)


def test_cancelling_twice_or_late_does_nothing():
    engine = Engine(MODEL, blocks=16, block_size=4, max_num_seqs=1, budget=8)
    done, running, waiting = (engine.add([1, i], {"max_new_tokens": 4}) for i in range(3))
    while done.finish_reason is None:
        engine.step()
    engine.step()
    for request in (done, running, running, waiting):
        engine.cancel(request)
    assert [r.finish_reason for r in (done, running, waiting)] == ["length", "cancelled", "cancelled"]
    assert running.new_tokens == alone([1, 1], max_new_tokens=4)[: len(running.new_tokens)]
    check_all_blocks_are_back(engine)


# Counting


def test_the_log_counts_what_was_done():
    engine = Engine(MODEL, block_size=4, max_num_seqs=4, budget=16, prefix_cache=False)
    prompts = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10]]
    made = [engine.add(prompt, {"max_new_tokens": 6}) for prompt in prompts]
    engine.run()
    assert sum(step.samples for step in engine.log) == sum(len(request.new_tokens) for request in made)
    assert sum(step.tokens for step in engine.log) == sum(len(prompt) + 5 for prompt in prompts)
    for step in engine.log:
        assert step.held_blocks * 4 == step.live_tokens + step.unused_slots
        assert 0 <= step.waste < 1
        assert step.finished >= step.started
    assert [step.is_decode for step in engine.log] == [False] + [True] * 5


def test_sizes():
    assert graph_sizes(5) == [1, 2, 4, 5]
    assert graph_sizes(8) == [1, 2, 4, 8]
    assert graph_sizes(70) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 70]
    assert blocks_that_fit(MODEL, 10 * 2 * 2 * 2 * 4 * 8 * 16) == 10  # 2 layers, k and v, 2 heads of 4, 8 bytes


def test_the_scheduler_alone_needs_no_model():
    from tformer_lib.serving import Request

    scheduler = Scheduler(BlockAllocator(4, 4), max_num_seqs=2, budget=4, max_blocks=4)
    scheduler.add(Request(0, range(6), Params(max_new_tokens=2)))
    (row,) = scheduler.plan()
    assert (row.start, row.count, row.samples) == (0, 4, False)
    (row,) = scheduler.plan()
    assert (row.start, row.count, row.samples) == (4, 2, True)


def test_a_step_is_padded_with_rows_that_store_and_see_nothing():
    engine = Engine(MODEL, blocks=10, block_size=4, max_num_seqs=3, budget=8)
    buffer = torch.full((Inputs.bytes_for(4, 4, 10),), 77, dtype=torch.uint8)
    inputs = Inputs(buffer, 4, 4, 4, 10)
    inputs.fill([], engine.scheduler.tables, 4)  # as it is when a graph is recorded
    assert inputs.size <= len(buffer)
    assert inputs.lengths.tolist() == [0] * 4
    assert inputs.slots.tolist() == [-1] * 4
    assert inputs.batch_slots.tolist() == inputs.token_batch_slots.tolist() == [3] * 4
    engine.add([5, 6, 7], {"max_new_tokens": 2})
    engine.add([8], {"max_new_tokens": 2})
    engine.step()
    rows = engine.scheduler.plan()
    inputs.fill(rows, engine.scheduler.tables, 4)
    assert inputs.given.tolist() == [rows[0].request.tokens[3], rows[1].request.tokens[1], 0, 0]
    assert inputs.positions.tolist() == [3, 1, 0, 0]
    blocks = [row.request.table.blocks[0] for row in rows]
    assert inputs.slots.tolist() == [4 * blocks[0] + 3, 4 * blocks[1] + 1, -1, -1]
    assert inputs.lengths.tolist() == [4, 2, 0, 0]
    assert inputs.starts.tolist() == [0, 1, 2, 2, 2]
    assert inputs.tables[:, 0].tolist() == [*blocks, 0, 0]


# The command


def test_the_command_answers_a_file(tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "Once upon a time", "max_new_tokens": 8}, {"prompt": ""}, {"prompt": "One", "tempo": 1}]
    file.write_text("\n\n".join(json.dumps(line) for line in lines))
    assert main(["--prompts", str(file)]) == 2
    said = capsys.readouterr()
    answers = [json.loads(line) for line in said.out.splitlines()]
    assert [answer["finish_reason"] for answer in answers] == ["length", "error", "error"]
    assert "the prompt is empty" in answers[1]["error"]
    assert "unknown parameters: tempo" in answers[2]["error"]
    assert said.err == "error: 2 of 3 requests got no answer\n"
    assert main(["--prompt", "Once upon a time", "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out == "Once upon a time" + answers[0]["text"] + "\n"
    assert main(["--prompt", "Once upon a time", "The", "--max-new-tokens", "8", "--stop", "."]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["text"] == answers[0]["text"]
    for options in (["--drafts", "3"], ["--drafts", "3", "--draft-model", "stories"]):
        assert main(["--prompt", "Once upon a time", "--max-new-tokens", "8", *options]) == 0
        assert capsys.readouterr().out == "Once upon a time" + answers[0]["text"] + "\n"
    file.write_text(json.dumps({"prompt": "a\u2028b", "max_new_tokens": 2}, ensure_ascii=False))
    assert main(["--prompts", str(file)]) == 0


@pytest.mark.parametrize(
    ("arguments", "refusal"),
    [
        ([], "either --prompt or --prompts must be given"),
        (["--prompt", ""], "the prompt is empty: there is no token to continue"),
        (["--prompt", "a", "--max-new-tokens", "9999"], "the engine takes 256 a request"),
        (["--prompt", "a", "--temperature", "1e39"], "temperature must be at least 0 and finite in float32"),
        (["--prompt", "a", "--model", "nobody"], "there is no pretrained model 'nobody', nor a folder of that name"),
        (["--prompt", "a", "--model", "."], "best.safetensors"),
        (["--prompt", "a", "--device", "abacus"], "device 'abacus' is not here"),
        (["--prompt", "a", "--memory", "10"], "memory is 10 bytes, less than a block of keys and values takes"),
        (["--prompt", "a", "--memory", "1" + 18 * "0"], "keys and values takes"),
        (["--prompt", "a", "--max-num-seqs", "0"], "max_num_seqs must be at least 1, got 0"),
        (["--prompt", "a", "--max-context", "999999999999", "--budget", "1" + 14 * "0"], "a step of"),
        (["--prompts", "missing.jsonl"], "missing.jsonl"),
        (["--prompts", "FILE"], "line 1: one JSON object was expected"),
        (["--prompt", "a", "--drafts", "-1"], "drafts must be at least 0, got -1"),
        (["--prompt", "a", "--draft-model", "stories"], "draft_model is 'stories', but drafts is 0"),
        (["--prompt", "a", "--tempo", "1"], "--tempo"),
        (["--prompt", "a", "--seed", "one"], "one"),
    ],
)
def test_the_command_refuses_in_one_line(arguments, refusal, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text("[1, 2]\n")
    assert main([str(file) if word == "FILE" else word for word in arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert refusal in said.err


def test_the_command_serves_a_run_by_its_folder(tmp_path, capsys):
    for file in pretrained.folder().iterdir():
        name = "best.safetensors" if file.name == "model.safetensors" else file.name
        (tmp_path / name).write_bytes(file.read_bytes())
    texts = []
    for options in ([], ["--model", str(tmp_path)]):
        assert main(["--prompt", "One day", "--max-new-tokens", "5", *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


# On a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_on_a_gpu_the_text_is_that_of_each_alone(cuda_graphs):
    model = make_model(width=128, heads=2, kv_heads=1).to("cuda", torch.float32)
    prompts = [[i % VOCAB, *range(1 + i % 9)] for i in range(12)]
    engine = Engine(model, blocks=20, block_size=16, max_num_seqs=8, budget=16, cuda_graphs=cuda_graphs)
    made = [engine.add(prompt, {"max_new_tokens": 20}) for prompt in prompts]
    engine.run()
    assert [request.new_tokens for request in made] == [generate(model, [p], max_new_tokens=20)[0] for p in prompts]
    check_all_blocks_are_back(engine)


def test_an_encoding_of_characters_serves_too():
    encoding = characters("abcdefghijklmnopqrstu")
    request = LLM(MODEL, encoding).generate(["abc"], {"max_new_tokens": 5})[0]
    assert request.text == "".join(encoding.decode([t]) for t in request.new_tokens if t < encoding.n_vocab)


def test_the_stepper_shows_what_schedules_do():
    from tformer_lib.teaching.widgets.serving import REQUESTS, stepper

    data = stepper().data
    assert len(data["names"]) == len(REQUESTS)
    for name, run in data["runs"].items():
        computed = [0] * len(REQUESTS)
        for step in run["steps"]:
            counts = [count for _, count in step["states"]]
            assert step["tokens"] == sum(counts) <= (run["budget"] or 1000)
            computed = [total + count for total, count in zip(computed, counts, strict=True)]
            for i, (what, _) in enumerate(step["states"]):
                assert (i in step["owners"]) == (what in ("reads", "writes", "idle")) or what == "waits"
        least = [prompt + new - 1 for _, prompt, new in REQUESTS]
        again = [total - needed for total, needed in zip(computed, least, strict=True)]
        assert min(again) >= 0
        assert (sum(again) == 0) == (name == "continuous, 12 blocks"), "idle rows and lost blocks cost tokens"
    assert any(what == "preempted" for step in run["steps"] for what, _ in step["states"])
