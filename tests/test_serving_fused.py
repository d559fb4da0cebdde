"""The pass of few kernels beside the model's own, and its kernels beside float64."""

import itertools
import random
from collections import Counter, deque
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from draws import draws
from hypothesis import given
from hypothesis import strategies as st

from tformer_lib.generation import generate
from tformer_lib.ladder import FP8
from tformer_lib.paged_attention import Rows, plan_attention
from tformer_lib.rope import turn_pairs
from tformer_lib.serving import Engine, FusedPass, Inputs, PackedPass, Speculation, join_projections
from tformer_lib.serving import runner as runner_module
from tformer_lib.serving.fused import PRODUCTS, refusal
from tformer_lib.serving.runner import Staging, prompt_sizes
from tformer_lib.transformer import Decoder, ModelConfig

ON_GPU = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a GPU of Hopper's kind"
)
LLAMA = {"norm": "rmsnorm", "feed_forward": "swiglu", "positions": "rope", "bias": False}


def make_model(dtype=torch.float64, **options):
    torch.manual_seed(3)
    sizes = {"vocab_size": 96, "max_length": 256, "width": 128, "layers": 3, "heads": 2, "kv_heads": 1, "head_dim": 64}
    model = Decoder(ModelConfig(**{**sizes, **LLAMA, **options})).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # gains other than one, and layers that change what passes them
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() == 1 else 0.05))
    return model.to(dtype)


def empty_pools(model, blocks=40, block_size=4, dtype=torch.float64, device="cpu"):
    size, config = (blocks, model.config.number_of_kv_heads, block_size, model.config.size_of_head), model.config
    return [tuple(torch.full(size, 9.0, dtype=dtype, device=device) for _ in "kv") for _ in range(config.layers)]


def test_it_is_the_models_pass_for_prompts_and_for_single_tokens():
    model, block_size = make_model(), 4
    join_projections(model)
    assert refusal(model) is None
    counts, held, generator = [7, 1, 3], [0, 5, 2], torch.Generator().manual_seed(1)
    tables = torch.randperm(40, generator=generator)[:24].view(3, 8).int()
    theirs, ours = empty_pools(model), empty_pools(model)
    fused = FusedPass(model, ours, None)
    for step in range(3):  # what was held already, new tokens of each row, and one more token of each
        news = [held, counts, [1, 1, 1]][step]
        befores = [[0, 0, 0], held, [h + c for h, c in zip(held, counts, strict=True)]][step]
        chosen = [row for row in range(3) if news[row]]
        places = torch.cat([torch.arange(befores[row], befores[row] + news[row]) for row in chosen])
        rows = torch.repeat_interleave(torch.tensor(chosen), torch.tensor([news[row] for row in chosen]))
        slots = tables[rows, places // block_size].long() * block_size + places % block_size
        tokens = torch.randint(96, places.shape, generator=generator)
        starts = torch.tensor([0, *torch.tensor([news[row] for row in chosen]).cumsum(0).tolist()]).int()
        lengths = torch.tensor([befores[row] + news[row] for row in chosen]).int()
        most = None if step == 2 else max(news)
        where = Rows(tables[chosen], lengths, None if step == 2 else starts, most)
        with torch.no_grad():
            expected = model(tokens[None], cache=PackedPass(theirs, places, slots, *where))[0]
            found = fused(tokens, places, slots, where)
            some = fused(tokens, places, slots, where, only=torch.tensor([0]))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(some, expected[:1], rtol=1e-9, atol=1e-9)
        for left, right in zip(sum(theirs, ()), sum(ours, ()), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "layernorm"},
        {"bias": True},
        {"feed_forward": "gelu"},
        {"feed_forward": "geglu"},
        {"positions": "learned"},
        {"rope_layout": "interleaved"},
        {"qk_norm": "head"},
        {"attention_sinks": True},
        {"attention_gate": True},
        {"attention_scale": 0.3},
        {"window": 8, "layer_types": ("window", "full", "full")},
        {"branch_norm": "both"},
        {"head_dim": 32},
    ],
)
def test_what_the_kernels_do_not_know_is_refused(options):
    model = make_model(torch.float32, **options)
    join_projections(model)
    assert refusal(model).startswith("the kernels ")


class RecordedPrompts:
    """What a CUDA graph of a step with prompts does, on a CPU: it computes from the buffer's numbers."""

    def __init__(self, runner, size):
        self.inputs = Inputs(runner.buffer, size, runner.max_num_seqs + 1, runner.max_num_seqs, runner.max_blocks)
        self.runner, self.replays = runner, 0
        self.hidden = torch.zeros(runner.max_num_seqs, runner.model.config.width, dtype=torch.float64)

    def replay(self):
        self.replays += 1
        self.hidden.copy_(self.runner._hidden(self.inputs))


def record_prompts(runner, sizes):
    """Let a runner use the pass of few kernels, recorded for so many tokens; returns what stands for graphs."""
    runner.fused = FusedPass(runner.model, runner.pools, None)
    graphs = [RecordedPrompts(runner, size) for size in sorted(sizes)]
    runner.prompts = {size: (graph, graph.hidden) for size, graph in zip(sorted(sizes), graphs, strict=True)}
    return graphs


@cache
def joined_model(layers=3):
    model = make_model(layers=layers)
    join_projections(model)
    return model


BEGINNINGS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [5, 6, 7, 8, 5, 6, 7, 8, 5, 6, 7, 8], []]
DRAFTS = [None, {"tokens": 3, "ngram_max": 2, "ngram_min": 1}, {"tokens": 2, "layers": 1}, {"tokens": 4, "layers": 3}]


@draws(40)
@given(data=st.data())
def test_steps_with_prompts_that_are_recorded_write_what_each_writes_alone(data):
    """Prompts that begin alike, drafts, too few blocks, requests that leave: whatever steps come of it."""
    model, draw = joined_model(), data.draw
    most, drafts = draw(st.integers(1, 5)), dict(draw(st.sampled_from(DRAFTS)) or {})
    if "layers" in drafts:
        drafts["model"] = joined_model(drafts.pop("layers"))
    budget, rule = draw(st.integers(most, 40)), st.fixed_dictionaries({"temperature": st.sampled_from([0, 1])})
    engine = Engine(
        model,
        blocks=draw(st.integers(11, 60)),
        block_size=4,
        max_num_seqs=most,
        budget=budget,
        ahead=draw(st.integers(0, 2)),
        speculation=Speculation(**drafts) if drafts else None,
    )
    sizes = draw(st.lists(st.integers(1, budget), min_size=1, max_size=3, unique=True))
    graphs = record_prompts(engine.runner, sizes)
    if "model" in drafts:
        record_prompts(engine.drafter.runner, sizes)
    tails = st.lists(st.integers(0, 95), min_size=1, max_size=28)
    made, leaving = [], {}
    for i in range(draw(st.integers(1, 7))):
        prompt = (draw(st.sampled_from(BEGINNINGS)) + draw(tails))[:30]
        rules = {"max_new_tokens": 5, "seed": i, **draw(rule)}
        if draw(st.integers(0, 3)) == 0:
            rules["repetition_penalty"] = 1.3
        made.append((engine.add(prompt, {**rules, "logprobs": draw(st.sampled_from([None, 2]))}), rules))
        if draw(st.integers(0, 4)) == 0:
            leaving[made[-1][0]] = draw(st.integers(1, 9))
    for step in itertools.count():
        for request, when in leaving.items():
            if when == step:
                engine.cancel(request)
        if not engine.busy:
            break
        engine.step()
    for request, rules in made:
        expected = generate(model, [request.prompt], **rules)[0]
        assert request.finish_reason in ("length", "cancelled" if request in leaving else "length")
        assert request.new_tokens == expected[: len(request.new_tokens)]
        assert request.finish_reason == "cancelled" or len(request.new_tokens) == len(expected)
        assert len(request.logprobs) == (0 if request.params.logprobs is None else len(request.new_tokens))
    if max(sizes) == budget and not drafts:
        assert sum(graph.replays for graph in graphs) == len(engine.log)


class Copied:
    """Stands for the event after a copy to a GPU that is slow: it has not been made before somebody waits for it."""

    def __init__(self):
        self.under_way = False

    def record(self):
        self.under_way = True

    def synchronize(self):
        self.under_way = False


@pytest.mark.parametrize("ahead", [0, 1, 2, 3])
def test_numbers_of_a_step_are_not_written_over_before_the_device_has_copied_them(ahead, monkeypatch):
    """A draft model reads a long prompt in many steps, and nobody waits for any of them."""
    drafts = Speculation(tokens=2, model=joined_model(1))
    engine = Engine(joined_model(), blocks=60, max_num_seqs=2, budget=4, ahead=ahead, speculation=drafts)
    runners, fill, fills = (engine.runner, engine.drafter.runner), Inputs.fill, []
    for runner in runners:
        runner.staging = deque(Staging(memory, Copied()) for memory, _ in runner.staging)

    def fill_what_was_copied(inputs, *arguments, **options):
        (copied,) = (
            copied
            for runner in runners
            for memory, copied in runner.staging
            if memory.data_ptr() == inputs.given.data_ptr()
        )
        assert not copied.under_way
        fills.append(copied)
        return fill(inputs, *arguments, **options)

    monkeypatch.setattr(Inputs, "fill", fill_what_was_copied)
    made = [engine.add([*range(10 * i, 10 * i + 60)], {"max_new_tokens": 6}) for i in range(3)]
    engine.run()
    for request in made:
        assert request.new_tokens == generate(engine.model, [request.prompt], max_new_tokens=6)[0]
    used = Counter(map(id, fills))
    assert all(used[id(copied)] > 1 for _, copied in engine.drafter.runner.staging)
    assert (
        len(engine.runner.returned) > engine.ahead
    )  # a step's tokens are read before those of another take their place


@pytest.mark.parametrize("budget", [1, 7, 64, 65, 300, 512, 700, 1024, 2000, 2048, 2049, 16384])
def test_sizes_of_recorded_prompts_fit_the_budget_and_waste_little(budget):
    sizes = prompt_sizes(budget)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == min(budget, 2048)
    for before, size in itertools.pairwise([0, *sizes]):
        assert size - before <= max(64, size / 5)


# on a GPU


@pytest.fixture(params=[torch.bfloat16, torch.float16])
def fused(request):
    model = make_model(request.param).cuda()
    join_projections(model)
    return FusedPass(model, [], None)


def tolerance(dtype):
    return {"rtol": 2**-7 if dtype == torch.bfloat16 else 2**-10, "atol": 2e-2 if dtype == torch.bfloat16 else 3e-3}


@ON_GPU
@pytest.mark.parametrize("rows", [1, 3, 160, 300])
@pytest.mark.parametrize("width", [104, 2048, 4096, 8192])
def test_add_norm_and_gate(fused, rows, width):
    dtype = fused.model.embedding.tokens.weight.dtype
    x, added, both = (torch.randn(rows, n * width, device="cuda", dtype=dtype) for n in (1, 1, 2))
    parts = torch.randn(3, rows, width, device="cuda")
    norm = torch.nn.RMSNorm(width, eps=1e-5, device="cuda", dtype=dtype)
    torch.nn.init.normal_(norm.weight)
    for more in (None, added, parts):
        total = x.clone()
        out = fused.add_norm(total, more, norm)
        exact = x.double() if more is None else x.double() + (more.double().sum(0) if more is parts else more.double())
        torch.testing.assert_close(total.double(), exact, **tolerance(dtype))
        exact = F.rms_norm(total.double(), (width,), norm.weight.double(), 1e-5)
        torch.testing.assert_close(out.double(), exact, **tolerance(dtype))
    gates, hidden = both.double().chunk(2, -1)
    torch.testing.assert_close(fused.gate(both).double(), F.silu(gates) * hidden, **tolerance(dtype))


@ON_GPU
@pytest.mark.parametrize("sizes", [(64, 8, 2), (128, 6, 6), (64, 32, 8)])
@pytest.mark.parametrize("is_float8", [False, True])
@pytest.mark.parametrize("parts", [0, 3])
def test_turn_stores_keys_and_values_in_their_slots_alone(fused, sizes, is_float8, parts):
    (d, heads, kv_heads), rows = sizes, 37
    dtype = fused.model.embedding.tokens.weight.dtype
    cache, fused.scales = (FP8, (0.7, 1.3)) if is_float8 else (dtype, None)
    columns = (heads + 2 * kv_heads) * d
    qkv = torch.randn(parts, rows, columns, device="cuda") if parts else torch.randn(rows, columns).to("cuda", dtype)
    q, k, v = (
        (qkv.sum(0) if parts else qkv.clone()).double().unflatten(1, (-1, d)).split((heads, kv_heads, kv_heads), dim=1)
    )
    pools = [torch.full((rows, kv_heads, 16, d), 7.0, device="cuda").to(cache) for _ in "kv"]
    slots = torch.randperm(rows * 16, device="cuda")[:rows]
    slots[::5] = -1
    angles = torch.randn(rows, d // 2, device="cuda") * 100
    cos, sin = angles.cos(), angles.sin()
    q, k = (turn_pairs(x.transpose(0, 1), cos.double(), sin.double(), "half").transpose(0, 1) for x in (q, k))
    torch.testing.assert_close(fused.turn(qkv, *pools, slots, cos, sin).double(), q, **tolerance(dtype))
    stored = slots >= 0
    for pool, exact, scale in zip(pools, (k, v), fused.scales or (1, 1), strict=True):
        by_slot = pool.double().transpose(1, 2).flatten(0, 1)
        close = {"rtol": 2**-4 + 2**-7, "atol": 2e-2} if is_float8 else tolerance(dtype)
        torch.testing.assert_close(by_slot[slots[stored]] * scale, exact[stored], **close)
        others = torch.ones(len(by_slot), dtype=torch.bool, device="cuda")
        others[slots[stored]] = False
        assert (by_slot[others] == 7).all()


@ON_GPU
@pytest.mark.parametrize("rows", [1, 5, 160])
def test_attention_that_starts_early_is_the_same(rows):
    d, heads, kv_heads = 64, 32, 8
    lengths = torch.randint(1, 1000, (rows,), device="cuda").int()
    lengths[0] = 0 if rows > 1 else 900
    tables = torch.randperm(64 * rows, device="cuda").view(rows, 64).int()
    pools = [torch.randn(64 * rows, kv_heads, 16, d, device="cuda", dtype=torch.bfloat16) for _ in "kv"]
    q = torch.randn(rows, heads, d, device="cuda", dtype=torch.bfloat16)
    plan = plan_attention(q, *pools, tables, lengths)
    expected = plan.run(q, *pools)
    for _ in range(3):
        late = torch.zeros_like(q)
        torch.cuda._sleep(2_000_000)
        late.copy_(q)  # the kernel before is not done when attention is launched
        assert torch.equal(plan.run(late, *pools, settled=True), expected)


@ON_GPU
@pytest.mark.parametrize("tokens", [1, 7, 64, 65, 128, 130, 160, 161, 192, 200, 256])
@pytest.mark.parametrize("sizes", [(3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192), (256, 64)])
def test_products_of_few_rows(tokens, sizes):
    fused = FusedPass(make_model(torch.bfloat16).cuda(), [], None)
    x = torch.randn(tokens, sizes[1], device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(*sizes, device="cuda", dtype=torch.bfloat16) / sizes[1] ** 0.5
    exact = x.double() @ weight.double().T
    found = fused.product(x, weight, own=True)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double().sum(0), exact, rtol=1e-4, atol=1e-4)
    gates, hidden = exact.chunk(2, -1)
    found = fused.gated_product(x, weight, own=True).double()
    torch.testing.assert_close(found, F.silu(gates) * hidden, rtol=2**-7, atol=1e-3)


@ON_GPU
@pytest.mark.parametrize("rows", [1, 33, 160, 256])
@pytest.mark.parametrize("own", [("qkv",), ("out",), ("gate_up",), ("down",), PRODUCTS])
def test_each_product_may_be_of_either_kind(rows, own):
    """Sums are rounded at other places, so both are compared with float64, which a wrong product would leave far."""
    sizes = {"heads": 4, "kv_heads": 2, "width": 256, "feed_forward_width": 512}
    tokens, lengths, tables = torch.randint(96, (rows,)), torch.randint(1, 17, (rows,)), torch.randperm(rows)[:, None]
    where = (lengths - 1, tables[:, 0] * 16 + lengths - 1)

    def logits(dtype, device, own):
        model = make_model(torch.bfloat16, **sizes).to(device, dtype)
        join_projections(model)
        fused = FusedPass(model, empty_pools(model, rows, 16, dtype, device), None)
        if device == "cuda":
            assert fused.takes(rows) == PRODUCTS
            assert fused.takes(257) == ()
        numbers = [x.to(device) for x in (tokens, *where, tables.int(), lengths.int())]
        with torch.no_grad():
            return fused(*numbers[:3], Rows(*numbers[3:]), own=own).cpu().double()

    exact = logits(torch.float64, "cpu", ())
    theirs, ours = (logits(torch.bfloat16, "cuda", kind) - exact for kind in ((), own))
    assert ours.std() <= 2 * theirs.std()
    assert ours.abs().max() <= 3 * theirs.abs().max()


@ON_GPU
@pytest.mark.parametrize("options", [{}, {"kv_dtype": "float8"}, {"block_size": 64}, {"block_size": 12}])
def test_recorded_steps_with_prompts_are_those_that_are_launched(options):
    """The logits of drawn steps, prompts in pieces and rows that write, beside the same steps launched one by one."""
    engine = Engine(make_model(torch.bfloat16).cuda(), blocks=300, max_num_seqs=24, budget=300, compile=True, **options)
    runner = engine.runner
    if options.get("block_size") == 12:
        assert not runner.prompts  # no kernel reads such blocks
        return
    assert list(runner.prompts) == [64, 128, 192, 256, 300]
    compared, launch = [], runner._replay_prompts

    def both(size, rows, tables, samples):
        found, batch_slots = launch(size, rows, tables, samples)
        found, kept = found.clone(), batch_slots.clone()
        expected, slots = runner._run(rows, tables, samples)  # fills the host's buffer and writes the keys once more
        assert torch.equal(kept, slots)
        torch.testing.assert_close(found, expected, rtol=0, atol=0.12)  # products of other shapes add in another order
        compared.append((size, len(rows), samples))
        return found, kept

    runner._replay_prompts = both
    draw = random.Random(5)
    for i in range(60):
        engine.add([draw.randrange(96) for _ in range(draw.choice((1, 5, 60, 150)))], {"max_new_tokens": 1 + i % 9})
        if i % 3 == 0:
            engine.step()
    engine.run()
    assert {size for size, *_ in compared} >= {192, 256, 300}
    assert any(samples < rows for _, rows, samples in compared)


@ON_GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"kv_dtype": "float8"}, {"deterministic": True}])
def test_an_engine_writes_with_it_what_it_writes_without(dtype, options, monkeypatch):
    written = []
    for refused in (False, True):
        if refused:
            monkeypatch.setattr(runner_module, "refusal", lambda model: "not this time")
        engine = Engine(make_model(dtype).cuda(), blocks=200, max_num_seqs=8, budget=64, compile=not refused, **options)
        assert (engine.runner.fused is None) == refused
        prompts = [[(7 * i + j) % 96 for j in range(5 + 9 * i)] for i in range(8)]
        made = [engine.add(prompt, {"max_new_tokens": 6, "logprobs": 96}) for prompt in prompts]
        engine.run()
        written.append([[(t, p.top) for t, p in zip(r.new_tokens, r.logprobs, strict=True)] for r in made])
    compared = 0
    for ours, theirs in zip(*written, strict=True):
        for (token, top), (other, others) in zip(ours, theirs, strict=True):
            both = torch.tensor([[value for _, value in sorted(found)] for found in (top, others)])
            torch.testing.assert_close(*both, rtol=0, atol=0.15 if dtype == torch.bfloat16 else 0.03)
            compared += 1
            if token != other:
                break
    assert compared >= 24
