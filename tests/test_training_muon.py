"""Muon for the matrices: its step, what it trains and what AdamW does, and runs that go on where they were."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tformer_lib import training
from tformer_lib.mixture_of_experts import ExpertsConfig
from tformer_lib.training import Run, TrainingConfig, optimizer
from tformer_lib.transformer import Decoder

MODEL = training.llama_like(vocab_size=48, max_length=32, width=32, layers=2, heads=4, kv_heads=2)


def config(**changes) -> TrainingConfig:
    return training.preset("quick", **{"optimizer": "muon", "model": MODEL, **changes})


def orthogonalised(x: Tensor, steps: int = 5) -> Tensor:
    """Newton and Schulz's iteration with Muon's polynomial, in float64."""
    x = x.double() / x.double().norm()
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def nesterov(gradients: list[Tensor], momentum: float = 0.95) -> Tensor:
    """The direction of the last of some gradients, in float64."""
    average = torch.zeros_like(gradients[0], dtype=torch.float64)
    for gradient in gradients:
        average = momentum * average + (1 - momentum) * gradient.double()
    return momentum * average + (1 - momentum) * gradients[-1].double()


@pytest.mark.parametrize("name", ["attention.q_proj", "attention.k_proj", "feed_forward.up", "feed_forward.down"])
def test_a_step_is_that_of_a_float64_reference(name):
    torch.manual_seed(0)
    model = Decoder(MODEL)
    steps = training.make_optimizer(model, config(learning_rate=0.01, muon_factor=2.0, weight_decay=0.1))
    weight = model.stack.blocks[0].get_submodule(name).weight
    expected, gradients = weight.detach().double(), []
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        gradients.append(weight.grad.clone())
        steps.step()
        size = 0.2 * max(weight.shape) ** 0.5
        expected = (1 - 0.02 * 0.1) * expected - 0.02 * size * orthogonalised(nesterov(gradients))
    moved = (expected - weight.double()).norm() / (0.02 * size * orthogonalised(nesterov(gradients))).norm()
    assert moved <= 0.03  # torch iterates in bfloat16


@pytest.mark.parametrize("shape", [(32, 32), (96, 32), (32, 96)])
def test_the_update_has_singular_values_of_about_one(shape):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(shape))
    muon = {"factor": 1.0, "decay": 0.0, "lr": 1.0, "betas": (0.9, 0.99), "fused": False}
    steps = optimizer.MuonAndAdamW([weight], [{"params": [torch.nn.Parameter(torch.zeros(3))]}], **muon)
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    s = torch.logspace(0, -1, min(shape))  # of one gradient, the largest ten times the smallest
    weight.grad = u @ torch.diag(s) @ v
    steps.step()
    update = -weight.detach() / (0.2 * max(shape) ** 0.5)
    assert 0.6 < torch.linalg.svdvals(update).min() <= torch.linalg.svdvals(update).max() < 1.3
    along = u.T @ update @ v.T  # the directions stay: what is off the diagonal is rounding
    assert (along - torch.diag(along.diagonal())).abs().max() < 0.05
    assert along.diagonal().min() > 0.6


def test_muon_has_the_linear_maps_of_the_blocks_and_adamw_the_rest():
    model = Decoder(MODEL)
    steps = training.make_optimizer(model, config(weight_decay=0.3))
    names = {p: name for name, p in model.named_parameters()}
    groups = [{names[p] for p in group["params"]} for group in steps.param_groups]
    blocks = {f"stack.blocks.{i}." for i in range(2)}
    linear = [f"attention.{x}_proj.weight" for x in ("q", "k", "v", "out")]
    linear += [f"feed_forward.{x}.weight" for x in ("up", "gate", "down")]
    assert groups[0] == {block + name for block in blocks for name in linear}
    assert groups[1] == {"embedding.tokens.weight"}  # tied: the output projection too
    assert all(name.endswith("norm.weight") for name in groups[2])
    assert set.union(*groups) == set(names.values())
    assert sum(map(len, groups)) == len(names)
    assert [group["weight_decay"] for group in steps.param_groups] == [0.3, 0.3, 0.0]


def test_stacked_experts_stay_with_adamw():
    experts = ExpertsConfig(count=4)
    model = Decoder(training.llama_like(vocab_size=48, max_length=32, width=32, layers=1, heads=4, experts=experts))
    muon = set(training.make_optimizer(model, config()).param_groups[0]["params"])
    assert all(p.dim() == 2 for p in muon)
    assert not any(p in muon for name, p in model.named_parameters() if p.dim() == 3)


def test_what_adamw_has_moves_as_with_adamw_alone():
    torch.manual_seed(0)
    models = [Decoder(MODEL), Decoder(MODEL)]
    models[1].load_state_dict(models[0].state_dict())
    both = [
        training.make_optimizer(m, config(optimizer=name)) for m, name in zip(models, ("muon", "adamw"), strict=True)
    ]
    for _ in range(3):
        for parameters in zip(*(m.parameters() for m in models), strict=True):
            gradient = torch.randn_like(parameters[0])
            for parameter in parameters:
                parameter.grad = gradient.clone()
        for steps in both:
            steps.step()
    assert torch.equal(models[0].embedding.tokens.weight, models[1].embedding.tokens.weight)
    assert torch.equal(models[0].stack.final_norm.weight, models[1].stack.final_norm.weight)
    assert not torch.equal(
        models[0].stack.blocks[0].feed_forward.up.weight, models[1].stack.blocks[0].feed_forward.up.weight
    )


def test_its_state_goes_to_another_and_both_go_on_alike():
    torch.manual_seed(0)
    models = [Decoder(MODEL), Decoder(MODEL)]
    models[1].load_state_dict(models[0].state_dict())
    first, second = (training.make_optimizer(m, config()) for m in models)
    gradients = [torch.randn_like(p) for p in models[0].parameters()]

    def step(model, steps):
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        steps.step()

    step(models[0], first)
    models[1].load_state_dict(models[0].state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for model, steps in zip(models, (first, second), strict=True):
        step(model, steps)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_closure_is_refused():
    with pytest.raises(ValueError, match="no closure"):
        training.make_optimizer(Decoder(MODEL), config()).step(lambda: 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"optimizer": "sgd"}, "adamw or muon, got 'sgd'"), ({"muon_factor": 0.0}, "muon_factor must be positive")],
)
def test_what_makes_no_sense_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        config(**change)


# --- runs


def tiny(data: Path, out: Path, **changes) -> TrainingConfig:
    values = {"steps": 8, "batch": 4, "context": 16, "warmup": 2, "eval_interval": 4, "save_interval": 1}
    values |= {"eval_windows": 4, "log_interval": 1, "sample_tokens": 4, "device": "cpu", "optimizer": "muon"}
    model = training.llama_like(width=16, layers=1, heads=2, dropout=0.1)
    return TrainingConfig(**{"model": model, "data": str(data), "out": str(out), **values, **changes})


def test_a_resumed_run_has_the_same_weights(data, tmp_path):
    for out in ("whole", "broken"):
        run = Run(tiny(data, tmp_path / out))
        if out == "broken":
            run.start()
            for _ in range(3):
                run.take_step()
            run.save()
            run = Run.resume(tmp_path / out)
            run.history = []
        run.train(quiet=True)
    a, b = (training.read_tensors(tmp_path / out / "checkpoint.safetensors")[0] for out in ("whole", "broken"))
    weights = [name for name in a if not name.startswith("random")]
    assert any("momentum_buffer" in name for name in weights)
    for name in weights:
        assert torch.equal(a[name], b[name]), name


def test_the_state_of_the_other_optimizer_is_refused(data, tmp_path):
    training.train(tiny(data, tmp_path), quiet=True)
    with pytest.raises(ValueError, match="optimizer"):
        Run.resume(tmp_path, optimizer="adamw")


def test_the_schedule_moves_both_rates(data, tmp_path):
    run = Run(tiny(data, tmp_path, muon_factor=3.0))
    run.take_step()
    rates = [group["lr"] for group in run.optimizer.param_groups]
    assert rates == pytest.approx([3 * rates[1], rates[1], rates[1]])
    assert rates[1] == training.learning_rate(0, run.config)


def test_it_learns(data, tmp_path):
    run = training.train(tiny(data, tmp_path, steps=60, learning_rate=1e-2, min_learning_rate=1e-3), quiet=True)
    found = [line["val_loss"] for line in run.history if "val_loss" in line]
    assert found[-1] < 0.7 * found[0]  # 60 steps of 64 tokens
