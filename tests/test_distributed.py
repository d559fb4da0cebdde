"""Several processes do what one does, in gradients, logits, attention and checkpoints, and end when one is lost."""

import copy
import dataclasses
import functools
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

from tformer_lib import distributed, generation, serving, training
from tformer_lib.attention import attend
from tformer_lib.distributed import Workers, costs, workers
from tformer_lib.mixture_of_experts import ExpertsConfig
from tformer_lib.training import Run, TrainingConfig
from tformer_lib.training.run import choose_forms
from tformer_lib.transformer import Decoder, count_parameters

ROOT = Path(__file__).parent.parent
SMALL = training.llama_like(vocab_size=48, max_length=64, width=32, layers=2, heads=4, kv_heads=4)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pools():
    """Two processes and four, for the whole file."""
    pools = {size: Workers(size, timeout=120) for size in (2, 4)}
    yield pools
    for pool in pools.values():
        pool.close()


def tiny(data: Path, out: Path, **changes) -> TrainingConfig:
    """A run of a second, without dropout, so that the number of processes changes nothing."""
    values = {"steps": 6, "batch": 8, "context": 16, "warmup": 3, "eval_interval": 3, "save_interval": 2}
    values |= {"eval_windows": 5, "log_interval": 1, "sample_tokens": 4, "device": "cpu", "average": 0.8}
    model = training.llama_like(width=16, layers=2, heads=2)
    return TrainingConfig(**{"model": model, "data": str(data), "out": str(out), **values, **changes})


def losses(out: Path) -> dict[tuple[int, str], float]:
    """(step, name) -> value of every loss and norm of a run."""
    lines = training.read_metrics(out)
    names = ("loss", "val_loss", "gradient_norm")
    return {(line["step"], name): line[name] for line in lines for name in names if name in line}


def refusal(function, *args, **options) -> str:
    """Why a function refuses what it is given; caught in the process, so that the pool goes on."""
    try:
        function(*args, **options)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


# --- the processes


def test_one_process_is_a_world_of_its_own():
    world = distributed.world()
    assert (world.rank, world.size, world.is_first) == (0, 1, True)
    assert (world.any(True), world.any(False)) == (True, False)
    x = torch.tensor([3.0])
    assert world.mean(x).item() == 3.0
    assert world.share(6) == slice(0, 6)


def test_processes_share_evenly_and_agree(pools):
    def ask():
        world = distributed.world()
        rank = torch.tensor(float(world.rank))
        return world.share(8), world.any(world.rank == 1), world.sum(rank).item(), world.mean(rank).item()

    assert pools[4].run(ask) == [(slice(2 * r, 2 * r + 2), True, 6.0, 1.5) for r in range(4)]


def test_what_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="a batch of 7 cannot be shared by 2 processes evenly"):
        distributed.World(0, 2).share(7)


def test_a_failure_names_the_process_and_its_line(pools):
    def fail():
        if dist.get_rank() == 1:
            raise KeyError("the second one")
        dist.barrier()

    with pytest.raises(RuntimeError, match=r"(?s)process 1 of 2 failed:.*in fail.*KeyError: 'the second one'"):
        pools[2].run(fail)
    assert pools[2].run(dist.get_rank) == [0, 1]  # new ones have taken their places


def test_a_dead_process_ends_the_call(pools):
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="exit code -9"):
        pools[2].run(lambda: os.kill(os.getpid(), signal.SIGKILL) if dist.get_rank() == 0 else dist.barrier())
    assert time.monotonic() - start < 20


def test_a_call_that_does_not_end_is_ended(pools):
    pools[2].run(dist.get_rank)
    with pytest.raises(TimeoutError, match="no answer from process 1 within 1 s"):
        pools[2].run(lambda: time.sleep(30 * dist.get_rank()), timeout=1)


def test_functions_of_a_notebook_travel_with_what_they_name():
    scope = {"__name__": "__main__", "torch": torch, "factor": 3}
    source = "def helper(x): return factor * x\ndef ask(x, more=1): return torch.tensor([helper(y) + more for y in x])"
    exec(source, scope)
    parcel = workers.pickle.dumps(workers.packed(scope["ask"]))
    scope.clear()
    assert workers.unpacked(workers.pickle.loads(parcel))([1, 2]).tolist() == [4, 7]


# --- data parallel


def gradients_of(scheme: str, pieces: int, chunked: bool = False) -> dict[str, torch.Tensor]:
    """The gradients of a batch of 8 windows, cut into so many pieces, in this process's world."""
    torch.manual_seed(0)
    model = Decoder(SMALL)
    rows = torch.randint(0, 48, (8, 13))
    network = distributed.data_parallel(model, scheme)
    mine = distributed.world().share(8)
    announced = []

    def announce(last):
        announced.append(last)
        distributed.announce_piece(network, last)

    loss_of = lambda x, y: training.next_token_loss(network, x, y, chunked=chunked)  # noqa: E731
    training.accumulate_gradient(loss_of, rows[mine, :-1], rows[mine, 1:], pieces, announce)
    assert announced == [False] * (pieces - 1) + [True]
    return {name: distributed.whole(p.grad) for name, p in model.named_parameters()}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("scheme", ["ddp", "fsdp"])
def test_gradients_are_those_of_one_process(pools, scheme, pieces, size):
    alone = gradients_of(scheme, 1)
    for theirs in pools[size].run(gradients_of, scheme, pieces):
        assert theirs.keys() == alone.keys()
        for name, gradient in alone.items():
            assert (theirs[name] - gradient).abs().max() <= 1e-6 * max(1.0, gradient.abs().max()), name


def gpt2_gradients(fused: bool, kinds: dict) -> dict[str, torch.Tensor]:
    """The gradients of a small GPT-2, with GELU inside its products or without."""
    torch.manual_seed(0)
    gpt2 = {"norm": "layernorm", "feed_forward": "gelu_tanh", "positions": "learned", "bias": False}
    model = Decoder(dataclasses.replace(SMALL, **gpt2))
    choose_forms(model, training.preset("quick", model=model.config, fused_gelu=fused))
    rows = torch.randint(0, 48, (8, 13))
    layout = distributed.Layout(distributed.world(), **kinds)
    network, mine = layout.spread(model, 12), layout.share(8, "a batch")
    training.next_token_loss(network, rows[mine, :-1], rows[mine, 1:]).backward()
    return {name: distributed.whole(p.grad) for name, p in model.named_parameters()}


@pytest.mark.parametrize("kinds", [{"scheme": "ddp"}, {"scheme": "fsdp"}, {"scheme": "fsdp", "tensor": 2}], ids=str)
def test_gelu_inside_the_products_has_the_same_gradients(pools, kinds):
    alone = gpt2_gradients(False, {"scheme": "ddp"})
    for theirs in pools[2].run(gpt2_gradients, True, kinds):
        for name, gradient in alone.items():
            assert (theirs[name] - gradient).abs().max() <= 1e-5 * max(1.0, gradient.abs().max()), name


@pytest.mark.parametrize("scheme", ["ddp", "fsdp"])
def test_a_loss_in_chunks_has_the_same_gradients(pools, scheme):
    alone = gradients_of(scheme, 1)
    for theirs in pools[2].run(gradients_of, scheme, 2, chunked=True):
        for name, gradient in alone.items():
            assert (theirs[name] - gradient).abs().max() <= 1e-6 * max(1.0, gradient.abs().max()), name


def held_by_fsdp() -> tuple[int, int, int]:
    """Bytes of weights, gradients and AdamW's moments in this process, after a step."""
    torch.manual_seed(0)
    model = Decoder(SMALL)
    network = distributed.data_parallel(model, "fsdp")
    optimizer = torch.optim.AdamW(model.parameters())
    rows = torch.randint(0, 48, (2, 13))
    training.next_token_loss(network, rows[:, :-1], rows[:, 1:]).backward()
    optimizer.step()
    here = lambda x: x.to_local().nbytes if isinstance(x, DTensor) else 0  # noqa: E731
    parameters = list(model.parameters())
    moments = sum(here(x) for state in optimizer.state.values() for x in state.values())
    return sum(map(here, parameters)), sum(here(p.grad) for p in parameters), moments


def test_fsdp_holds_its_share_and_no_more(pools):
    torch.manual_seed(0)
    whole = 4 * count_parameters(Decoder(SMALL))
    held = torch.tensor(pools[4].run(held_by_fsdp))
    assert held.sum(0).tolist() == [whole, whole, 2 * whole]
    cost = costs.fsdp(costs.Counts.of(SMALL, 4, 16), costs.Machine(), 4)
    norms = whole / 4 - costs.Counts.of(SMALL, 4, 16).parameters  # which the formula leaves out
    assert cost.gradients == pytest.approx((whole - 4 * norms) / 4)
    assert cost.optimizer == pytest.approx(2 * cost.gradients)
    assert held[:, 0].max() <= 1.2 * whole / 4


def compiled_gradients(scheme: str, chunked: bool) -> dict[str, torch.Tensor]:
    """The same as :func:`gradients_of`, through the compiled loss of a run."""
    torch.manual_seed(0)
    model = Decoder(dataclasses.replace(SMALL, layers=2))
    rows = torch.randint(0, 48, (8, 13))
    network = distributed.data_parallel(model, scheme)
    with pytest.MonkeyPatch.context() as patch:  # the compiler's front alone: no C++ is made here
        patch.setattr(
            torch, "compile", lambda function, compiler=torch.compile: compiler(function, backend="aot_eager")
        )
        loss_of = functools.partial(training.training_loss, chunked=chunked)
        loss = distributed.compile_loss(network, loss_of, training.mean_cross_entropy)
    mine = distributed.world().share(8)
    loss(network, rows[mine, :-1], rows[mine, 1:]).backward()
    return {name: distributed.whole(p.grad) for name, p in model.named_parameters()}


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("scheme", ["ddp", "fsdp"])
def test_a_compiled_step_gathers_and_sends_all_the_same(pools, scheme, chunked):
    alone = gradients_of(scheme, 1)
    for theirs in pools[2].run(compiled_gradients, scheme, chunked):
        for name, gradient in alone.items():
            assert (theirs[name] - gradient).abs().max() <= 1e-6 * max(1.0, gradient.abs().max()), name


# --- tensor parallel


def tensor_parallel_errors(positions: str, sequence: bool, gather: bool, **changes) -> dict[str, float]:
    """How far loss, logits and gradients are from the whole model's; in float64."""
    torch.manual_seed(0)
    model = Decoder(dataclasses.replace(SMALL, positions=positions, **changes)).double()
    whole = copy.deepcopy(model)
    inputs, targets = torch.randint(0, 48, (2, 2, 8))
    expected = training.next_token_loss(whole, inputs, targets)
    expected.backward()
    distributed.tensor_parallel(
        model, init_device_mesh("cpu", (dist.get_world_size(),)), sequence=sequence, gather_logits=gather
    )
    assert model.config.number_of_kv_heads == SMALL.number_of_kv_heads // dist.get_world_size()
    if gather:
        loss = training.next_token_loss(model, inputs, targets)
        loss.backward()
    else:
        with loss_parallel():
            loss = training.next_token_loss(model, inputs, targets)
            loss.backward()
    apart = {"loss": (distributed.whole(loss) - expected).abs().item()}
    apart["logits"] = (distributed.whole(model(inputs)) - whole(inputs)).abs().max().item()
    gradients = {name: p.grad for name, p in whole.named_parameters()}
    apart |= {n: (distributed.whole(p.grad) - gradients[n]).abs().max().item() for n, p in model.named_parameters()}
    return apart


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    ("positions", "sequence", "gather", "changes"),
    [
        ("rope", False, True, {}),
        ("rope", True, False, {}),
        ("learned", True, True, {"norm": "layernorm", "feed_forward": "gelu", "bias": True}),
        ("learned", False, False, {"tie_embeddings": False}),
    ],
)
def test_tensor_parallel_computes_what_the_whole_model_does(pools, size, positions, sequence, gather, changes):
    for apart in pools[size].run(tensor_parallel_errors, positions, sequence, gather, **changes):
        assert {name for name, error in apart.items() if not error <= 1e-12} == set()


def joined_errors() -> dict[str, float]:
    """The same with many tokens on a GPU, where a layer makes queries, keys and values by one matmul if it may."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tformer_lib.attention.is_worth_joining", lambda x: True)
        return tensor_parallel_errors("learned", False, True, attention="flash_attention")


def test_tensor_parallel_keeps_to_its_hooks_where_one_matmul_could_make_all_heads(pools):
    for apart in pools[2].run(joined_errors):
        assert {name for name, error in apart.items() if not error <= 1e-12} == set()


def test_what_cannot_be_cut_evenly_is_named(pools):
    def cut():
        model = Decoder(dataclasses.replace(SMALL, kv_heads=2))
        return refusal(distributed.tensor_parallel, model, init_device_mesh("cpu", (4,)))

    assert pools[4].run(cut) == ["kv_heads 2 cannot be cut into 4 equal pieces"] * 4


def written(cut: bool) -> tuple[list, list, tuple]:
    """What an engine and ``generate`` write, and the shape of the engine's pool of keys."""
    torch.manual_seed(0)
    model = Decoder(SMALL)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)  # so that no two logits are near each other
    if cut:
        distributed.tensor_parallel(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
    llm = serving.LLM(model, max_num_seqs=3, blocks=16)
    requests = llm.generate(prompts, serving.Params(max_new_tokens=9))
    return (
        [request.new_tokens for request in requests],
        generation.generate(model, prompts, max_new_tokens=9),
        tuple(llm.engine.runner.pools[0][0].shape),
    )


def test_an_engine_over_two_processes_writes_what_one_writes(pools):
    texts, generated, (blocks, kv_heads, *rest) = written(cut=False)
    assert texts == generated
    for theirs in pools[2].run(written, cut=True):
        assert theirs == (texts, generated, (blocks, kv_heads // 2, *rest))


# --- context parallel


def ring_error(length: int, layout: str, causal: bool, dtype=torch.float64) -> float:
    """How far the ring's out, dq, dk and dv are from those of attention over the whole text."""
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(2, heads, length, 8, dtype=dtype) for heads in (4, 2, 2, 4))
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = attend(*whole, causal=causal, scale=0.3)
    expected.backward(dout)
    spans = getattr(distributed, layout)(length, dist.get_world_size())
    mine = spans[dist.get_rank()]
    part = lambda x: distributed.own_part(x, mine, 2)  # noqa: E731
    own = [part(x).requires_grad_() for x in (q, k, v)]
    out = distributed.ring_attention(*own, layout=spans, causal=causal, scale=0.3)
    out.backward(part(dout))
    pairs = [(out, part(expected)), *((a.grad, part(b.grad)) for a, b in zip(own, whole, strict=True))]
    return max(((a - b).abs().max().item() if a.numel() else 0.0) for a, b in pairs)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_ring_attention_is_attention(pools, layout, causal, size):
    for length in (16, 13, 3):  # even, ragged, and shorter than there are chunks
        assert max(pools[size].run(ring_error, length, layout, causal)) <= 1e-13


def test_the_zigzag_gives_everyone_the_same_work():
    pairs = lambda spans: sum(sum(range(start + 1, stop + 1)) for start, stop in spans)  # noqa: E731
    shares = [pairs(spans) for spans in distributed.zigzag(4096, 8)]
    assert max(shares) == min(shares)
    lopsided = [pairs(spans) for spans in distributed.contiguous(4096, 8)]
    assert max(lopsided) > 10 * min(lopsided)
    for layout in (distributed.zigzag(37, 4), distributed.contiguous(37, 4)):
        assert sorted(p for spans in layout for p in distributed.positions_of(spans).tolist()) == list(range(37))


def cut_text_errors() -> tuple[float, float]:
    """A whole model whose text is cut: how far logits and gradients are from one process's."""
    torch.manual_seed(0)
    inputs, targets = torch.randint(0, 48, (2, 2, 22))
    layout = distributed.zigzag(22, dist.get_world_size())
    mine = layout[dist.get_rank()]
    whole = Decoder(SMALL).double()
    model = Decoder(SMALL, attend=distributed.ring_attend(layout)).double()
    model.load_state_dict(whole.state_dict())
    expected = whole(inputs)
    torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten()).backward()
    logits = model(distributed.own_part(inputs, mine, 1), positions=distributed.positions_of(mine))
    own = distributed.own_part(targets, mine, 1)
    (
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), own.flatten(), reduction="sum") / targets.numel()
    ).backward()
    world = distributed.world()
    gradients = zip(model.parameters(), whole.parameters(), strict=True)
    apart = max((world.sum(a.grad) - b.grad).abs().max().item() for a, b in gradients)
    return (logits - distributed.own_part(expected, mine, 1)).abs().max().item(), apart


def test_a_model_over_a_cut_text_is_the_same_model(pools):
    assert max(max(errors) for errors in pools[2].run(cut_text_errors)) <= 1e-13


def test_a_ring_refuses_what_does_not_fit(pools):
    def ask(tokens, layout, **options):
        q = torch.randn(1, 1, tokens, 4)
        return refusal(distributed.ring_attention, q, q, q, layout=layout, **options)

    two = distributed.contiguous(8, 2)
    assert pools[2].run(ask, 5, two) == [f"process {rank} holds 4 tokens, q came with 5" for rank in (0, 1)]
    assert pools[2].run(ask, 4, distributed.contiguous(12, 3))[0] == "the layout is for 3 processes, the ring has 2"
    assert pools[2].run(ask, 4, two, mask=True)[0] == "ring attention takes no mask, only causal"


# --- expert parallel


def spread_experts(bias: bool) -> dict[str, float]:
    """How far outputs and gradients of experts that are spread are from those of one process with all tokens."""
    size, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(0)
    experts = ExpertsConfig(count=4, per_token=2, shared_width=16, balance_weight=0.0)
    model = Decoder(dataclasses.replace(SMALL, experts=experts, bias=bias)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) / 20)  # biases too
    whole, mine = copy.deepcopy(model), distributed.world().share(8)
    rows = torch.randint(0, 48, (8, 9))
    expected = whole(rows[:, :-1])
    training.mean_cross_entropy(expected, rows[:, 1:]).backward()
    distributed.expert_parallel(model)
    logits = model(rows[mine, :-1])
    training.mean_cross_entropy(logits, rows[mine, 1:]).backward()
    apart = {"logits": (logits - expected[mine]).abs().max().item()}
    for (name, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
        if ".experts." in name:
            gradient, wanted = p.grad / size, q.grad.chunk(size)[rank]
        else:
            gradient, wanted = distributed.world().mean(p.grad), q.grad
        apart[name] = (gradient - wanted).abs().max().item() if wanted.numel() else 0.0
    return apart


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_experts_that_are_spread_do_what_they_do_together(pools, bias, size):
    for apart in pools[size].run(spread_experts, bias):
        assert {name for name, error in apart.items() if not error <= 1e-12} == set()


def test_experts_that_cannot_be_spread_are_refused(pools):
    def ask(**changes):
        experts = ExpertsConfig(**{"count": 4, "per_token": 1, **changes})
        return refusal(distributed.expert_parallel, Decoder(dataclasses.replace(SMALL, experts=experts)))

    assert pools[2].run(ask, count=3)[0] == "3 experts cannot be shared by 2 processes evenly"
    assert "set capacity_factor to None" in pools[2].run(ask, capacity_factor=1.0)[0]


# --- runs and their checkpoints


def train(config: TrainingConfig) -> int:
    """Train in this process's world; returns how far it came."""
    run = Run(config)
    run.train(quiet=True)
    return run.step


def go_on(out: str, **changes) -> int:
    """Go on with a run in this process's world."""
    run = Run.resume(out, **changes)
    run.train(quiet=True)
    return run.step


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory) -> dict:
    """The losses of one process that trains to the end."""
    out = tmp_path_factory.mktemp("unbroken")
    train(tiny(data, out))
    return losses(out)


@pytest.mark.parametrize("scheme", ["ddp", "fsdp"])
def test_a_run_of_two_goes_on_with_one_and_with_four(pools, data, tmp_path, unbroken, scheme):
    assert pools[2].run(train, tiny(data, tmp_path / "two", steps=4, parallel=scheme)) == [4, 4]
    for size in (1, 4):
        out = tmp_path / f"on-{size}"
        subprocess.run(["cp", "-r", tmp_path / "two", out], check=True)
        steps = [go_on(str(out), steps=6)] if size == 1 else pools[size].run(go_on, str(out), steps=6)
        assert steps == [6] * size
        ours = losses(out)
        first = {key: value for key, value in ours.items() if key[0] <= 4}
        assert first == {key: value for key, value in losses(tmp_path / "two").items() if key in first}
        left = [p.name for p in out.iterdir() if "checkpoint" in p.name or p.name == "sharded.json"]
        assert sorted(left) == (["checkpoint.safetensors"] if size == 1 else ["checkpoint-6", "sharded.json"])


@pytest.mark.parametrize("scheme", ["ddp", "fsdp"])
def test_several_processes_learn_what_one_learns(pools, data, tmp_path, unbroken, scheme):
    pools[2].run(train, tiny(data, tmp_path, parallel=scheme, accumulation=2))
    ours = losses(tmp_path)
    assert ours.keys() == unbroken.keys()
    assert all(ours[key] == pytest.approx(unbroken[key], rel=1e-5) for key in ours)
    best = training.read_tensors(tmp_path / "best.safetensors")[0]
    model = Decoder(tiny(data, tmp_path).model)
    assert {name: tuple(x.shape) for name, x in best.items()}.keys() == dict(model.named_parameters()).keys()


LAYOUTS = {
    "tensor": (2, {"tensor_parallel": 2}),
    "context": (2, {"context_parallel": 2}),
    "experts": (2, {"expert_parallel": True}),
    "two of context, two readers": (4, {"context_parallel": 2}),
    "two of tensor, two replicas": (4, {"tensor_parallel": 2, "parallel": "fsdp"}),
    "tensor and context": (4, {"tensor_parallel": 2, "context_parallel": 2, "parallel": "fsdp"}),
}


def with_experts(changes: dict) -> dict:
    """The changes of a layout, and a model with experts where it shares them."""
    experts = ExpertsConfig(count=4, per_token=2, balance_weight=0.01)
    if "expert_parallel" not in changes:
        return changes
    return {**changes, "model": training.llama_like(width=16, layers=2, heads=2, experts=experts)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_learns_what_one_process_learns_and_goes_on_with_one(pools, data, tmp_path, layout):
    size, changes = LAYOUTS[layout]
    changes = with_experts(changes)
    alone = {key: value for key, value in changes.items() if key == "model"}
    train(tiny(data, tmp_path / "one", **alone))
    expected = losses(tmp_path / "one")
    config = tiny(data, tmp_path / "many", steps=4, accumulation=2, **changes)
    pools[size].run(train, config)
    many = losses(tmp_path / "many")
    # the balance of a mixture is taken over each process's tokens, and so a little different
    rel = 2e-3 if layout == "experts" else 2e-5
    assert {key for key in expected if key[0] <= 3} <= many.keys()
    for key in many.keys() & expected.keys() - {(4, "val_loss")}:
        if key[1] != "gradient_norm" or layout != "experts":
            assert many[key] == pytest.approx(expected[key], rel=rel), key
    best = training.read_tensors(tmp_path / "many" / "best.safetensors")[0]
    shapes = {name: tuple(p.shape) for name, p in Run.resume(tmp_path / "one").model.named_parameters()}
    assert {name: tuple(x.shape) for name, x in best.items()} == shapes
    subprocess.run(["cp", "-r", tmp_path / "many", tmp_path / "again"], check=True)
    back = {"tensor_parallel": 1, "context_parallel": 1, "expert_parallel": False}
    go_on(str(tmp_path / "many"), steps=6, **back)
    pools[size].run(go_on, str(tmp_path / "again"), steps=6)
    one, same = losses(tmp_path / "many"), losses(tmp_path / "again")
    for key in one.keys() & same.keys():
        if key[1] != "gradient_norm" or layout != "experts":
            assert same[key] == pytest.approx(one[key], rel=rel), key


def test_layouts_that_cannot_be_are_refused(pools, data, tmp_path):
    refused = {
        "no multiple of context_parallel 1 x tensor_parallel 3": {"tensor_parallel": 3},
        "2 replicas of each piece, which need parallel fsdp": {"tensor_parallel": 2},
        "cannot be cut into 8 equal chunks": {"context_parallel": 4, "context": 12},
        "expert_parallel needs a model with experts": {"expert_parallel": True},
        "expert_parallel goes with parallel ddp": {"expert_parallel": True, "parallel": "fsdp"},
        "heads 2 cannot be cut into 4": {"tensor_parallel": 4},
        "full attention alone": {
            "context_parallel": 4,
            "model": training.llama_like(width=16, layers=2, heads=2, window=4),
        },
        "no experts, linear layers": {"tensor_parallel": 4, **with_experts({"expert_parallel": False})},
    }
    for message, changes in refused.items():
        for said in pools[4].run(refusal, Run, tiny(data, tmp_path, **changes)):
            assert message in said


@pytest.mark.parametrize("scheme", ["ddp", "fsdp"])
def test_muon_learns_the_same_in_several_processes_and_goes_on_with_one(pools, data, tmp_path, scheme):
    config = tiny(data, tmp_path / "one", optimizer="muon", dtype="float32")
    train(config)
    alone = losses(tmp_path / "one")
    pools[2].run(train, dataclasses.replace(config, out=str(tmp_path / "two"), parallel=scheme, steps=4))
    go_on(str(tmp_path / "two"), steps=6)
    ours = {key: value for key, value in losses(tmp_path / "two").items() if key[0] <= 3}
    assert ours
    assert all(value == pytest.approx(alone[key], rel=5e-3) for key, value in ours.items())
    assert losses(tmp_path / "two")[6, "val_loss"] == pytest.approx(alone[6, "val_loss"], rel=2e-2)


@pytest.mark.parametrize("scheme", ["ddp", "fsdp"])
def test_experts_are_balanced_by_the_loads_of_all_processes(pools, data, tmp_path, scheme):
    experts = ExpertsConfig(count=4, per_token=2, balance_weight=0.0, bias_rate=0.05)
    model = training.llama_like(width=16, layers=2, heads=2, experts=experts)
    train(tiny(data, tmp_path / "one", model=model))
    pools[2].run(train, tiny(data, tmp_path / "two", model=model, parallel=scheme))
    alone, ours = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert all(ours[key] == pytest.approx(alone[key], rel=1e-5) for key in alone)
    biases = [training.read_tensors(tmp_path / x / "best.safetensors")[0] for x in ("one", "two")]
    names = [name for name in biases[0] if name.endswith("selection_bias")]
    assert names
    assert all(torch.allclose(biases[0][name], biases[1][name]) and biases[0][name].any() for name in names)


def test_a_resumed_run_has_the_losses_of_an_unbroken_one(pools, data, tmp_path, unbroken):
    """The schedule depends on the last step, so the run is cut short by a signal and not by fewer steps."""
    pools[2].run(train_and_be_stopped, tiny(data, tmp_path, parallel="fsdp"), 4)
    pools[4].run(go_on, str(tmp_path))
    ours = losses(tmp_path)
    assert ours.keys() == unbroken.keys()
    assert all(ours[key] == pytest.approx(unbroken[key], rel=1e-5) for key in ours)


def train_and_be_stopped(config: TrainingConfig, step: int) -> tuple[bool, int, int | None]:
    """The last process alone is asked to stop in that step."""
    run = Run(config)
    take = run.take_step

    def take_step():
        if run.step == step - 1 and run.world.rank == run.world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return take()

    run.take_step = take_step
    return run.train(quiet=True), run.step, run.stopped_by


def test_a_signal_to_one_process_stops_all_at_the_same_step(pools, data, tmp_path):
    assert pools[2].run(train_and_be_stopped, tiny(data, tmp_path), 3) == [(False, 3, signal.SIGTERM)] * 2
    assert distributed.newest(tmp_path)[1]["step"] == 3


def test_the_run_of_one_process_goes_on_with_two(pools, data, tmp_path):
    train(tiny(data, tmp_path, steps=4))
    pools[2].run(go_on, str(tmp_path), steps=6, parallel="fsdp")
    assert distributed.newest(tmp_path)[1]["step"] == 6
    assert not (tmp_path / "checkpoint.safetensors").exists()


def save_what_is_not_finite(config: TrainingConfig) -> str:
    """One process alone holds a number that is not finite when all save."""
    run = Run(config)
    run.train(quiet=True)
    if run.world.rank == 1:
        with torch.no_grad():
            next(p for p in run.model.parameters() if p.to_local().numel()).to_local().view(-1)[0] = math.nan
    try:
        run.save()
    except FloatingPointError as error:
        return str(error)
    return "saved"


def test_numbers_that_are_not_finite_are_saved_by_nobody(pools, data, tmp_path):
    said = pools[2].run(save_what_is_not_finite, tiny(data, tmp_path, steps=2, parallel="fsdp"))
    assert "because another process holds such numbers" in said[0]
    assert "1 of" in said[1]
    assert distributed.newest(tmp_path)[0] == tmp_path / "checkpoint-2"


def test_damaged_checkpoints_are_refused(pools, data, tmp_path):
    pools[2].run(train, tiny(data, tmp_path, steps=2))
    pointer = json.loads((tmp_path / "sharded.json").read_text())
    with pytest.raises(ValueError, match="already holds a run"):
        train(tiny(data, tmp_path, steps=3))
    folder = tmp_path / pointer["folder"]
    shard = next(folder.iterdir())
    kept = shard.read_bytes()
    shard.unlink()
    with pytest.raises(ValueError, match="is of another configuration: it does not have"):
        Run.resume(tmp_path)
    shard.write_bytes(kept)
    pointer["facts"]["config"]["model"]["width"] = 24
    (tmp_path / "sharded.json").write_text(json.dumps(pointer))
    with pytest.raises(ValueError, match=r"the run's is \(\d+, 24\)"):
        Run.resume(tmp_path)
    (tmp_path / "sharded.json").write_text("{")
    with pytest.raises(ValueError, match=r"sharded\.json is damaged"):
        Run.resume(tmp_path)


# --- torchrun


def command_of(*words: str) -> tuple[list[str], dict]:
    """torchrun, and the environment that it runs in."""
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return [sys.executable, "-m", "torch.distributed.run", *words], clean | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def flags_of(config: TrainingConfig) -> list[str]:
    """The command that trains such a run."""
    words = ["-m", "tformer_lib.training", "train", "--data", config.data, "--out", config.out, "--device", "cpu"]
    words += ["--model.width", "16", "--model.layers", "2", "--model.heads", "2"]
    names = ("steps", "batch", "context", "warmup", "eval_interval", "save_interval", "eval_windows", "log_interval")
    names += ("sample_tokens", "average", "parallel", "timeout", "learning_rate", "min_learning_rate")
    for name in names:
        words += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    return words


def test_a_killed_process_ends_the_run_and_one_process_goes_on(data, tmp_path):
    config = tiny(data, tmp_path, steps=100_000, eval_interval=100_000, sample_tokens=0, timeout=20.0)
    command, environment = command_of("--standalone", "--nproc-per-node", "2", *flags_of(config))
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        try:
            deadline = time.monotonic() + 60
            while not (tmp_path / "sharded.json").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            victim = next(pid for pid, rank in children(run.pid) if rank == "1")
            os.kill(victim, signal.SIGKILL)
            killed = time.monotonic()
            said = run.communicate(timeout=40)[0]
            assert time.monotonic() - killed < 30
        finally:
            run.kill()
    assert run.returncode != 0
    error = next(line for line in said.splitlines() if line.startswith("error: "))
    step = re.search(r"process 0 of 2 has lost another one at step (\d+); the last checkpoint is kept", error)[1]
    assert int(step) >= 2
    come = distributed.newest(tmp_path)[1]["step"]
    assert go_on(str(tmp_path), steps=come + 2) == come + 2


def children(parent: int) -> list[tuple[int, str]]:
    """(process id, rank) of the processes that torchrun has started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int(folder.joinpath("stat").read_text().rpartition(")")[2].split()[1]) == parent:
                variables = folder.joinpath("environ").read_bytes().split(b"\0")
                rank = next(x for x in variables if x.startswith(b"LOCAL_RANK="))
                found.append((int(folder.name), rank.partition(b"=")[2].decode()))
        except (OSError, StopIteration):
            continue
    return found


def test_two_machines_of_one_process_each_train_together(data, tmp_path, unbroken):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "test"]
    meeting += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"]
    command, environment = command_of(*meeting, *flags_of(tiny(data, tmp_path, parallel="fsdp")))
    machines = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    try:
        said = [machine.communicate(timeout=90)[0] for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert sum("finished at step 6" in text for text in said) == 1
    ours = losses(tmp_path)
    assert all(ours[key] == pytest.approx(unbroken[key], rel=1e-5) for key in unbroken)


# --- the formulas


def bytes_seen(scheme: str) -> tuple[float, float]:
    """What the formula says that a step sends, and what the profiler saw."""
    config = dataclasses.replace(SMALL, vocab_size=512, width=64)
    size = dist.get_world_size()
    torch.manual_seed(0)
    if scheme == "ring":
        layout = distributed.zigzag(64, size)
        q, k, v = (torch.randn(1, heads, 64 // size, 8, requires_grad=True) for heads in (4, 2, 2))
        call = lambda: distributed.ring_attention(q, k, v, layout=layout).sum().backward()  # noqa: E731
        counted = costs.ring_bytes(costs.Counts(0, 0, 1, 0, 16, 0, 0, 1, 64), size, itemsize=4)
    else:
        network = distributed.data_parallel(Decoder(config), scheme)
        rows = torch.randint(0, 512, (2, 13))
        call = lambda: training.next_token_loss(network, rows[:, :-1], rows[:, 1:]).backward()  # noqa: E731
        counted = getattr(costs, scheme)(costs.Counts.of(config, 4, 12), costs.Machine(), size).sent
    call()
    return counted, distributed.bytes_sent(call)


@pytest.mark.parametrize("scheme", ["ddp", "fsdp", "ring"])
def test_a_step_sends_the_bytes_that_the_formula_counts(pools, scheme):
    for counted, seen in pools[2].run(bytes_seen, scheme):
        assert seen == pytest.approx(counted, rel=0.01)


def test_counts_of_parameters_are_the_models():
    for config in (SMALL, dataclasses.replace(SMALL, positions="learned", tie_embeddings=False, kv_heads=2)):
        norms = (2 * config.layers + 1) * config.width
        assert costs.Counts.of(config, 1, 8).parameters == count_parameters(Decoder(config)) - norms


def test_what_one_device_sends_is_nothing():
    counts = costs.Counts.of(SMALL, 8, 16)
    for scheme in costs.SCHEMES.values():
        cost = scheme(counts, costs.Machine(), 1)
        assert (cost.sent, cost.exposed, cost.efficiency) == (0, 0, 1)


def test_more_devices_hold_less_where_the_scheme_cuts():
    counts, machine = costs.Counts.of(SMALL, 64, 16), costs.Machine()
    for name in ("FSDP", "tensor parallel"):
        held = [costs.SCHEMES[name](counts, machine, size).optimizer for size in (1, 2, 4, 8)]
        assert held == [held[0] / size for size in (1, 2, 4, 8)]
    assert costs.ddp(counts, machine, 8).optimizer == costs.ddp(counts, machine, 1).optimizer
    cost, pieces = costs.that_fits(costs.fsdp, counts, dataclasses.replace(machine, memory=600_000), 2)
    assert pieces > 1
    assert cost.held <= 600_000 < costs.fsdp(dataclasses.replace(counts, pieces=pieces // 2), machine, 2).held
    assert costs.that_fits(costs.ddp, counts, dataclasses.replace(machine, memory=1000), 2) is None
    mixed = costs.mixed(counts, machine, 8, 1)
    plain = costs.fsdp(counts, machine, 8)
    assert (mixed.sent, mixed.weights) == pytest.approx((plain.sent, plain.weights))
