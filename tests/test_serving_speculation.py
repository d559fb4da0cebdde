"""Speculative decoding: whoever drafts, and however badly, each request gets what it would get alone."""

import copy
import math
from collections import Counter
from functools import partial
from random import Random

import pytest
import torch
from draws import draws
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import initialize
from test_serving import CONTEXT, MODEL, PREFIXES, VOCAB, Schedules, alone, check_all_blocks_are_back, make_model

from tformer_lib.generation import Sampling, cut, distribution, generate
from tformer_lib.serving import Engine, Speculation, accepted, expected_tokens
from tformer_lib.serving import engine as engine_module
from tformer_lib.serving.speculation import Attempts, Drafter, NgramIndex, Patience, continuation

OTHER = make_model(seed=6, layers=1)


class Noise(Drafter):
    """Drafts that know nothing, for texts that are not ready for any as well: the worst that a drafter may do."""

    def __init__(self, seed, tokens=3, draft=None):
        super().__init__(Speculation(tokens=tokens))
        self.random, self.draft = Random(seed), draft

    def candidates(self, running):
        return list(running)

    def is_promising(self, request):
        return True

    def guess(self, wanted):
        made = {}
        for request, count in wanted.items():
            whole = alone(request.prompt, max_new_tokens=12)[len(request.new_tokens) :]
            right = self.random.randrange(count + 1)  # so many are what a greedy text goes on with
            wrong = [self.random.randrange(VOCAB) for _ in range(count)]
            drafts = self.draft or [*whole[:right], *wrong]
            made[request] = drafts[: self.random.randint(0, count) if self.draft is None else count]
        return made


KINDS = {
    "n-grams": Speculation(tokens=3, ngram_max=3, ngram_min=1),
    "the model itself": Speculation(tokens=4, model=MODEL),
    "another model": Speculation(tokens=2, model=OTHER),
    "few rows": Speculation(tokens=2, model=MODEL, most_rows=1),
    "noise": Speculation(tokens=3),
}


def engine_with(kind, **options):
    engine = Engine(MODEL, speculation=KINDS[kind], **options)
    if kind == "noise":
        engine.drafter = Noise(7)
    return engine


def check_drafts_are_back(engine):
    check_all_blocks_are_back(engine)
    assert not engine.drafter.attempts
    if hasattr(engine.drafter, "shadows"):
        assert not engine.drafter.shadows
        assert engine.drafter.allocator.held == 0
    assert not getattr(engine.drafter, "indices", None)


# Any schedule


@st.composite
def requests(draw):
    """(step of arrival, prompt, what is asked for, step at which it is cancelled or None)."""
    prefix = draw(st.sampled_from([*PREFIXES, [1, 2, 3, 1, 2, 3, 1, 2]]))
    prompt = prefix[: draw(st.integers(1, len(prefix)))] + draw(st.lists(st.integers(0, VOCAB - 1), max_size=3))
    wish = {"max_new_tokens": draw(st.integers(1, 14))}
    if draw(st.booleans()):
        wish |= {"temperature": draw(st.sampled_from([0.3, 1.0])), "seed": draw(st.integers(0, 3))}
    if draw(st.integers(0, 5)) == 0:
        wish["repetition_penalty"] = 1.4
    if draw(st.booleans()):
        wish["stop_tokens"] = (draw(st.integers(0, VOCAB - 1)),)
    return draw(st.integers(0, 10)), prompt, wish, draw(st.none() | st.none() | st.integers(1, 15))


@draws(80)
@given(
    plans=st.lists(requests(), min_size=1, max_size=6),
    kind=st.sampled_from(sorted(KINDS)),
    max_num_seqs=st.integers(1, 4),
    more_budget=st.integers(0, 12),
    block_size=st.sampled_from([1, 2, 4, 8]),
    more_blocks=st.integers(0, 8),
    ahead=st.integers(0, 1),
    prefix_cache=st.booleans(),
)
def test_every_schedule_with_drafts_writes_what_each_request_gets_alone(
    plans, kind, max_num_seqs, more_budget, block_size, more_blocks, ahead, prefix_cache
):
    longest = max(len(prompt) + wish["max_new_tokens"] - 1 for _, prompt, wish, _ in plans)
    sizes = {"blocks": -(-longest // block_size) + more_blocks, "block_size": block_size, "max_num_seqs": max_num_seqs}
    engine = engine_with(kind, budget=max_num_seqs + more_budget, ahead=ahead, prefix_cache=prefix_cache, **sizes)
    made, step = {}, 0
    while engine.busy or len(made) < len(plans):
        for i, (arrives, prompt, wish, cancelled) in enumerate(plans):
            if arrives == step:
                made[i] = engine.add(prompt, wish)
            if cancelled == step and i in made:
                engine.cancel(made[i])
        engine.step()
        step += 1
        assert step < 2000, "the engine makes no progress"
        holders = Counter(block for request in engine.scheduler.running for block in request.table.blocks)
        assert [holders[block] for block in range(engine.allocator.blocks)] == engine.allocator.holders
    for i, (_, prompt, wish, cancelled) in enumerate(plans):
        rules = {name: value for name, value in wish.items() if name != "stop_tokens"}
        expected = cut(alone(prompt, **rules), wish.get("stop_tokens", ()))
        if made[i].finish_reason == "cancelled":
            assert cancelled is not None
            expected = expected[: len(made[i].new_tokens)]
        else:
            assert made[i].finish_reason == ("stop" if expected[-1] in wish.get("stop_tokens", ()) else "length")
        assert made[i].new_tokens == expected
        assert 0 <= made[i].accepted <= min(made[i].drafted, len(made[i].new_tokens))
    assert all(step.tokens <= engine.scheduler.budget for step in engine.log)
    check_drafts_are_back(engine)


class SchedulesWithDrafts(Schedules):
    """The same rules as without drafts, and the same promises."""

    @initialize(
        max_num_seqs=st.integers(1, 4),
        more_budget=st.integers(0, 9),
        block_size=st.sampled_from([1, 2, 4]),
        more_blocks=st.integers(0, 6),
        ahead=st.integers(0, 1),
        prefix_cache=st.booleans(),
        kind=st.sampled_from(sorted(KINDS)),
    )
    def make(self, max_num_seqs, more_budget, block_size, more_blocks, ahead, prefix_cache, kind):
        super().make(max_num_seqs, more_budget, block_size, more_blocks, ahead, prefix_cache)
        engine = self.llm.engine
        sizes = {"blocks": engine.allocator.blocks, "block_size": block_size, "prefix_cache": prefix_cache}
        self.llm.engine = engine_with(
            kind, max_num_seqs=max_num_seqs, budget=max_num_seqs + more_budget, ahead=ahead, **sizes
        )
        self.engine = self.llm.engine

    def teardown(self):
        super().teardown()
        if hasattr(self, "engine"):
            check_drafts_are_back(self.engine)


SchedulesWithDrafts.TestCase.settings = draws(30, stateful_step_count=30)
TestSchedulesWithDrafts = SchedulesWithDrafts.TestCase


# The ends of the scale


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_drafter_that_is_always_right_saves_steps(ahead):
    engine = Engine(MODEL, block_size=4, max_num_seqs=2, ahead=ahead, speculation=Speculation(tokens=4, model=MODEL))
    made = [engine.add([1 + i, 2, 3], {"max_new_tokens": 21}) for i in range(2)]
    engine.run()
    for request in made:
        assert request.new_tokens == alone(request.prompt, max_new_tokens=21)
        assert request.accepted == request.drafted == 16  # 21 = 1 with the prompt, then 4 steps of 1 + 4
    assert [step.drafted for step in engine.log if step.samples] == [0, 8, 8, 8, 8]
    assert [step.is_decode for step in engine.log if step.samples] == [False, True, True, True, True]
    check_drafts_are_back(engine)


def test_a_drafter_that_is_always_wrong_is_asked_less_and_less():
    engine = Engine(MODEL, block_size=4, max_num_seqs=1, speculation=Speculation(tokens=3))
    whole = alone([1, 2, 3], max_new_tokens=30)
    wrong = next(token for token in range(VOCAB) if token not in whole)
    engine.drafter = Noise(1, draft=[wrong] * 3)
    request = engine.add([1, 2, 3], {"max_new_tokens": 30})
    engine.run()
    assert request.new_tokens == whole
    assert request.accepted == 0
    assert [step.drafted > 0 for step in engine.log].count(True) == 4  # pauses of 2, 4, 8 and 16 tokens
    assert len(engine.log) == 30


def test_drafts_are_given_up_where_too_few_are_accepted_and_tried_again():
    attempts, length, tried = Attempts(Patience(worth=0.5, growth=2, longest=64)), 0, []
    for _ in range(12):  # one of five drafts is accepted: each step writes 1.2 tokens, and costs more than that
        attempts.count(len(tried) % 5 == 4, length)
        tried.append(attempts.paused_until - length)
        length = max(attempts.paused_until, length + 1)
    assert tried[-4:] == [64] * 4
    for _ in range(2):
        attempts.count(3, length)
    assert (attempts.paused_until, attempts.failures) == (length, 0)


def test_ties_are_broken_alike():
    model = make_model()
    with torch.no_grad():
        model.unembedding.weight[[token for token in range(VOCAB) if token not in (5, 7)]] = 0.0  # logits of exactly 0
    whole = generate(model, [[1, 2, 3]], max_new_tokens=20)[0]
    assert 0 in whole
    assert len(set(whole)) > 1
    for speculation in (KINDS["n-grams"], Speculation(tokens=3, model=model), Speculation(tokens=3, model=OTHER)):
        engine = Engine(model, block_size=4, max_num_seqs=2, speculation=speculation)
        made = [engine.add([1, 2, 3], {"max_new_tokens": 20}) for _ in range(2)]
        engine.run()
        assert [request.new_tokens for request in made] == [whole, whole]


def test_a_stop_token_among_accepted_drafts_is_the_last_token():
    whole = alone([1, 2, 3], max_new_tokens=20)
    for stop in dict.fromkeys(whole):
        engine = Engine(MODEL, block_size=4, max_num_seqs=1, speculation=Speculation(tokens=4, model=MODEL))
        request = engine.add([1, 2, 3], {"max_new_tokens": 20, "stop_tokens": [stop]})
        engine.run()
        assert request.new_tokens == whole[: whole.index(stop) + 1]
        assert request.finish_reason == "stop"
        assert request.accepted < len(request.new_tokens), "each step writes its accepted drafts and at most one more"
        check_drafts_are_back(engine)


def beginning_right(whole, right, request, count):
    """Drafts of which the first ``right`` are those of the text, and the others are not."""
    wrong = next(token for token in range(VOCAB) if token not in whole)
    return [*whole[len(request.new_tokens) :][:right], *[wrong] * count][:count]


@pytest.mark.parametrize("right", range(4))
def test_what_was_computed_for_refused_drafts_is_no_prefix(right):
    """The slot of a refused draft holds another token's key: nobody may find it under the name of the right one.

    That could happen where a text ends in the place of a refused draft, with a stop token that fills a block.
    """
    prompt = [1, 2, 3]
    whole = alone(prompt, max_new_tokens=24)
    drafts_of = partial(beginning_right, whole, right)
    for stop in dict.fromkeys(whole):
        engine = Engine(MODEL, block_size=1, max_num_seqs=1, speculation=Speculation(tokens=3))
        engine.drafter = Noise(1)
        engine.drafter.guess = lambda wanted: {r: drafts_of(r, count) for r, count in wanted.items()}
        first = engine.add(prompt, {"max_new_tokens": 24, "stop_tokens": [stop]})
        engine.run()
        assert first.new_tokens == cut(whole, [stop])
        again = engine.add([*first.tokens, 5, 6], {"max_new_tokens": 8})
        engine.run()
        assert again.reused >= len(first.tokens) - 1
        assert again.new_tokens == alone([*first.tokens, 5, 6], max_new_tokens=8)


def test_drafts_take_no_block_that_a_next_token_needs():
    engine = Engine(MODEL, blocks=5, block_size=2, max_num_seqs=3, budget=20, prefix_cache=False)
    made = [engine.add([i, 2, 3], {"max_new_tokens": 4}) for i in range(2)]
    engine.step()
    first, second = made
    rows = engine.scheduler.plan({first: [1] * 9, second: [1] * 9})
    assert [row.count for row in rows] == [1 + 2, 1]  # a slot is left over in each; the last block goes to the first
    assert [row.asks for row in rows] == [3, 1]


# Sampling


def total_variation(counts, exact):
    """Half the sum of the differences between frequencies and probabilities."""
    drawn = sum(counts.values())
    return sum(abs(counts[token] / drawn - p) for token, p in enumerate(exact)) / 2


def second_tokens(count, **options):
    """How often each token comes second, after a prompt, over ``count`` seeds."""
    engine = Engine(MODEL, blocks=400, block_size=4, max_num_seqs=64, budget=512, **options)
    if "speculation" in options and options["speculation"].model is None:
        engine.drafter = Noise(3, draft=[5, 9])
    rules = {"temperature": 0.9, "max_new_tokens": 3}
    made = [engine.add([1, 2, 3], {"seed": seed, **rules}) for seed in range(count)]
    engine.run()
    assert sum(request.drafted for request in made) >= count
    return Counter(request.new_tokens[1] for request in made)


@pytest.mark.parametrize("model", [None, MODEL, OTHER])
def test_sampling_with_drafts_keeps_the_distribution(model, monkeypatch):
    """The tokens of 3,000 seeds are as frequent as the model's own probabilities say.

    Over n draws from v tokens, the total variation from the truth is at most sqrt(v / n) / 2 on average (Jensen), and
    passes its average by more than sqrt(log(1 / d) / 2 n) with probability d at most (McDiarmid). Here d is 1e-9.
    """
    count, rules = 3000, Sampling(temperature=0.9)
    with torch.no_grad():
        first = distribution(MODEL(torch.tensor([[1, 2, 3]]))[:, -1], rules)[0]  # (VOCAB,)
        texts = torch.tensor([[1, 2, 3, token] for token in range(VOCAB)])
        exact = first @ distribution(MODEL(texts)[:, -1], rules)  # (VOCAB,)
    bound = math.sqrt(VOCAB / count) / 2 + math.sqrt(math.log(1e9) / (2 * count))
    options = {"speculation": Speculation(tokens=2, model=model, most_rows=64)}
    assert total_variation(second_tokens(count, **options), exact.tolist()) < bound
    if model is not MODEL:  # believing every draft is another distribution, and this test sees it
        monkeypatch.setattr(engine_module, "accepted", lambda drafts, chosen: len(drafts))
        believed = Counter()
        engine = Engine(MODEL, blocks=400, block_size=4, max_num_seqs=64, budget=512, **options)
        engine.drafter = Noise(3, draft=[5, 9])
        monkeypatch.setattr(
            engine, "_accept_row", lambda row, chosen, reports, pieces: believed.update([*row.drafts, *chosen][:1])
        )
        for seed in range(8):
            engine.add([1, 2, 3], {"seed": seed, "temperature": 0.9, "max_new_tokens": 3})
        for _ in range(4):
            engine.step()
        assert total_variation(believed, exact.tolist()) > bound


def test_log_probabilities_come_with_accepted_drafts():
    engine = Engine(MODEL, block_size=4, max_num_seqs=2, speculation=Speculation(tokens=3, model=OTHER))
    made = [engine.add([1, 2, 3 + i], {"max_new_tokens": 12, "logprobs": 2, "temperature": 0.7}) for i in range(2)]
    engine.run()
    for request in made:
        with torch.no_grad():
            right = MODEL(torch.tensor([request.tokens]))[0, request.prompt_length - 1 : -1].log_softmax(-1)
        chosen = right.gather(1, torch.tensor(request.new_tokens)[:, None])[:, 0]
        assert [entry.chosen for entry in request.logprobs] == pytest.approx(chosen.tolist(), abs=1e-9)


@pytest.mark.parametrize("broken", ["the model", "the draft model"])
def test_logits_that_are_no_numbers(broken):
    engine = Engine(MODEL, blocks=24, block_size=4, max_num_seqs=2, speculation=Speculation(tokens=3, model=MODEL))
    good, bad = (engine.add([i, 2, 3], {"max_new_tokens": 9}) for i in (1, 2))
    runner = engine.runner if broken == "the model" else engine.drafter.runner
    choose = runner.choose

    def breaking(logits, requests, batch_slots):
        for place, request in enumerate(requests):
            if getattr(request, "request", request) is bad and len(request.tokens) > 4:
                logits[place] = math.nan
        return choose(logits, requests, batch_slots)

    runner.choose = breaking
    engine.run()
    assert good.new_tokens == alone([1, 2, 3], max_new_tokens=9)
    if broken == "the model":
        assert (bad.finish_reason, bad.error) == ("error", "the logits after its tokens are not finite")
        assert bad.new_tokens == alone([2, 2, 3], max_new_tokens=9)[: len(bad.new_tokens)]
    else:
        assert bad.new_tokens == alone([2, 2, 3], max_new_tokens=9)
    check_drafts_are_back(engine)


# The draft model


def test_a_draft_model_reads_long_texts_in_pieces_and_takes_turns_for_its_blocks():
    speculation = Speculation(tokens=3, model=MODEL)
    engine = Engine(MODEL, blocks=16, block_size=4, max_num_seqs=3, budget=5, ahead=1, speculation=speculation)
    engine.drafter.allocator.take(8)  # half of its blocks are gone: not all texts fit
    made = [engine.add([i] * 18, {"max_new_tokens": 12}) for i in range(3)]
    engine.run()
    assert sum(request.drafted for request in made) > 0
    assert all(request.new_tokens == alone(request.prompt, max_new_tokens=12) for request in made)
    assert engine.drafter.allocator.held == 8


def test_a_draft_model_whose_weights_change_reads_again():
    model, draft = make_model(), make_model()
    engine = Engine(model, block_size=4, max_num_seqs=1, speculation=Speculation(tokens=2, model=draft))
    request = engine.add([1, 2, 3], {"max_new_tokens": 16})
    for _ in range(3):
        engine.step()
    assert request.accepted == request.drafted > 0
    with torch.no_grad():
        draft.unembedding.weight.neg_()
    engine.run()
    assert request.new_tokens == alone([1, 2, 3], max_new_tokens=16)
    assert request.accepted < request.drafted


def test_a_failed_step_leaves_no_shadow():
    engine = Engine(MODEL, block_size=4, max_num_seqs=2, speculation=Speculation(tokens=2, model=OTHER))
    broken, waiting = (engine.add([i, 2], {"max_new_tokens": 8}) for i in range(2))
    engine.step()
    launch, engine.drafter.runner.launch = engine.drafter.runner.launch, None
    with pytest.raises(TypeError):
        engine.step()
    engine.drafter.runner.launch = launch
    assert broken.finish_reason == waiting.finish_reason == "error"
    again = engine.add([0, 2], {"max_new_tokens": 8})
    engine.run()
    assert again.new_tokens == alone([0, 2], max_new_tokens=8)
    check_drafts_are_back(engine)


# The recorded step


class Recorded:
    """What a CUDA graph does, on a CPU: it computes from the buffer's numbers and leaves the logits in one place."""

    def __init__(self, runner, size):
        from tformer_lib.serving import Inputs

        self.inputs = Inputs(runner.buffer, size, size, size, runner.max_blocks)
        self.runner, self.logits = runner, torch.zeros(size, VOCAB, dtype=torch.float64)

    def replay(self):
        self.logits.copy_(self.runner._forward(self.inputs))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_recorded_step_checks_drafts_in_lanes(kind):
    engine = engine_with(kind, blocks=30, block_size=4, max_num_seqs=3, budget=9, ahead=1)
    graphs = {size: Recorded(engine.runner, size) for size in (2, 5, 9)}
    engine.runner.graphs = {size: (graph, graph.logits) for size, graph in graphs.items()}
    made = [engine.add([i, 1, 2, 3, 1, 2], {"max_new_tokens": 14, "seed": i, "temperature": i % 2}) for i in range(5)]
    engine.run()
    for i, request in enumerate(made):
        assert request.new_tokens == alone(request.prompt, max_new_tokens=14, seed=i, temperature=i % 2)
    assert any(graph.logits.any() for graph in graphs.values())
    check_drafts_are_back(engine)


# Looking up


@draws(200)
@given(text=st.lists(st.integers(0, 3), min_size=1, max_size=30), cuts=st.lists(st.integers(1, 30), max_size=4))
def test_the_index_finds_the_latest_earlier_occurrence_of_the_longest_run(text, cuts):
    index = NgramIndex(range(3, 0, -1))
    for end in [*sorted(end for end in cuts if end <= len(text)), len(text)]:
        known = text[:end]
        expected = None
        for size in (3, 2, 1):
            places = [i + size for i in range(end - size) if known[i : i + size] == known[end - size :]]
            if places:
                expected = places[-1]
                break
        assert index.find(known) == expected


def test_a_short_rhythm_goes_on():
    assert continuation([1, 2, 3, 4], 1, 2) == [2, 3]
    assert continuation([7, 1, 2, 1, 2], 3, 5) == [1, 2, 1, 2, 1]
    assert continuation([5, 5], 1, 3) == [5, 5, 5]


def test_expected_tokens_per_step():
    assert expected_tokens(0.0, 4) == 1
    assert expected_tokens(1.0, 4) == 5
    assert expected_tokens(0.8, 4) == pytest.approx((1 - 0.8**5) / 0.2)
    random, total = Random(0), 0
    for _ in range(20_000):
        total += 1 + accepted([1] * 4, [int(random.random() < 0.8) for _ in range(4)])
    assert total / 20_000 == pytest.approx(expected_tokens(0.8, 4), abs=0.05)


def test_accepted_is_the_length_of_the_common_beginning():
    assert accepted((), [4]) == 0
    assert accepted((1, 2, 3), [1, 2, 3, 9]) == 3
    assert accepted((1, 2, 3), [1, 5, 3, 9]) == 1
    assert accepted((1,), [-1, 9]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"tokens": 1.5}, "tokens must be a whole number"),
        ({"most_rows": 0}, "most_rows must be at least 1"),
        ({"ngram_min": 3, "ngram_max": 2}, "ngram_min must be at most ngram_max, got 3 and 2"),
    ],
)
def test_senseless_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Speculation(**options)


def test_draft_models_that_do_not_fit_are_refused():
    torch.manual_seed(0)
    small = make_model(seed=1, positions="learned")
    assert Engine(MODEL, speculation=Speculation(model=small)).max_context == CONTEXT
    with pytest.raises(ValueError, match="has learned 40 positions, texts may have 50"):
        Engine(MODEL, max_context=50, speculation=Speculation(model=small))
    from tformer_lib.transformer import Decoder, ModelConfig

    stranger = Decoder(ModelConfig(vocab_size=VOCAB + 1, max_length=CONTEXT, width=16, layers=1, heads=2))
    with pytest.raises(ValueError, match="it knows 24 tokens, the model that checks 23"):
        Engine(MODEL, speculation=Speculation(model=stranger))
    stretched = make_model(rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(ValueError, match="DynamicNTK turns keys by the length"):
        Engine(MODEL, speculation=Speculation(model=stretched))


@torch.no_grad()
def nearly(model):
    """A model that often, but not always, writes what this one does."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for weight in other.parameters():
        noise = torch.randn(weight.shape, generator=generator).to(weight)
        weight.add_(noise * weight.std(correction=0), alpha=0.15)
    return other


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("kind", ["n-grams", "itself", "another"])
def test_on_a_gpu_drafts_change_no_text(kind, cuda_graphs):
    model = make_model(width=128, heads=2, kv_heads=1).to("cuda", torch.float32)
    other = nearly(model)  # a stranger would have no draft accepted
    draft = {"n-grams": None, "itself": model, "another": other}[kind]
    engine = Engine(
        model,
        blocks=40,
        max_num_seqs=8,
        budget=64,
        cuda_graphs=cuda_graphs,
        speculation=Speculation(tokens=3, model=draft, ngram_min=1),
    )
    prompts = [[i % VOCAB, *range(1 + i % 9)] for i in range(12)]
    made = [engine.add(prompt, {"max_new_tokens": 20}) for prompt in prompts]
    engine.run()
    assert [request.new_tokens for request in made] == [generate(model, [p], max_new_tokens=20)[0] for p in prompts]
    assert sum(request.accepted for request in made) > 0
    check_drafts_are_back(engine)
