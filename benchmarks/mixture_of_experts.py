"""A layer of experts against the loop that defines it and a dense feed-forward of the same work.

    python -m benchmarks.mixture_of_experts --device cpu       # a small layer, some seconds
    python -m benchmarks.mixture_of_experts --device cuda      # the layers of Mixtral 8x7B and Qwen3-30B-A3B
    python -m benchmarks.mixture_of_experts --device cpu --steps 1200      # small models on the stories, some minutes

The theory: a few tokens cost the bytes of the experts that they choose, and many cost the arithmetic of their k experts
each. The dense feed-forward is as wide as k experts together, so its arithmetic is that of the experts, and its bytes
are those of k experts however many tokens there are. The limit of a row is the larger of its two times.

The router is random, so the load is nearly even. Its time is part of every form's.

With ``--steps``, five small models learn the stories from the same windows: a mixture balanced by its loss, by its
selection bias or not at all, a dense model of the mixture's work for each token, and a dense model of its weights. They
take their steps in turns, so that what slows the machine for a while slows them all. Kept are the validation losses,
the entropy of the load at each step, and the time of a step: ``mixture_of_experts-training.json``.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness import Options, Report, Timing, command_line, copy_rate, matmul_rate, measure, synchronize
from tformer_lib import pretrained, stories, training
from tformer_lib.mixture_of_experts import (
    ExpertsConfig,
    MixtureOfExperts,
    expected_experts,
    load_entropy,
    mix_batched,
    mix_by_loop,
    mix_grouped,
    mixtures,
    update_selection_biases,
)
from tformer_lib.tokens import join_stories
from tformer_lib.transformer import Decoder, FeedForward, ModelConfig, count_parameters, make_feed_forward


@dataclass(frozen=True)
class Shape:
    """A layer of experts, and how many tokens pass through it at once."""

    width: int
    inner: int
    experts: int
    per_token: int
    tokens: tuple[int, ...]

    def config(self) -> ModelConfig:
        """Of a model with one such layer."""
        experts = ExpertsConfig(count=self.experts, per_token=self.per_token, balance_weight=0.0)
        sizes = {"vocab_size": 1, "width": self.width, "layers": 1, "heads": 1, "feed_forward_width": self.inner}
        return ModelConfig(**sizes, norm="rmsnorm", feed_forward="swiglu", bias=False, experts=experts)


SHAPES = {
    "cuda": {
        "Mixtral 8x7B": Shape(4096, 14336, 8, 2, (1, 4, 16, 64, 512, 4096)),
        "Qwen3-30B-A3B": Shape(2048, 768, 128, 8, (1, 4, 16, 64, 512, 4096)),
    },
    "cpu": {"width 192, 16 experts of 192": Shape(192, 192, 16, 2, (1, 16, 256, 2048))},
}

FORMS: dict[str, Callable] = {"grouped": mix_grouped, "loop": mix_by_loop, "batched": mix_batched}


@dataclass(frozen=True)
class MixtureOptions(Options):
    """Measure the forms of a layer, or with ``--steps`` train small models."""

    steps: int = 0
    """Train for this many steps instead."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command_line(run, arguments, options=MixtureOptions, topic="mixture_of_experts", description=__doc__)


def run(asked: MixtureOptions) -> None:
    """Measure the forms of a layer, or with ``--steps`` train small models."""
    if asked.steps:
        train_models(asked)
    else:
        measure_layers(asked)


def measure_layers(asked: MixtureOptions) -> None:
    """Every shape, forward for each number of tokens, and forward with backward for the most."""
    device = torch.device(asked.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    report = Report("mixture_of_experts", device, asked.out, peers=("dense, the same work", "loop"))
    rates = {
        "flops": matmul_rate(device, dtype),
        "bytes": copy_rate(device, size=None if device.type == "cuda" else 2**26),
    }
    report.note(matmul_rate=rates["flops"], copy_rate=rates["bytes"], dtype=str(dtype).removeprefix("torch."))
    for name, shape in SHAPES[device.type].items():
        layer, dense = layers_of(shape, device, dtype)
        for tokens in shape.tokens:
            measure_forward(report, name, shape, layer, dense, tokens, rates)
        measure_gradients(report, name, shape, layer, dense, shape.tokens[-1], rates)
        report.save()
    report.finish()


def layers_of(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[MixtureOfExperts, FeedForward]:
    """The experts, and the dense feed-forward as wide as those of one token together."""
    config = shape.config()
    wide = replace(config, experts=None, feed_forward_width=shape.per_token * shape.inner)
    with torch.device(device):
        return make_feed_forward(config).to(dtype).eval(), FeedForward(wide).to(dtype).eval()


def contestants(layer: MixtureOfExperts, dense: nn.Module) -> dict[str, Callable[[Tensor], Tensor]]:
    """Every form, router and all, and the dense feed-forward."""
    forms = {name: partial(through, layer, form) for name, form in FORMS.items()}
    return {"dense, the same work": dense, **forms}


def through(layer: MixtureOfExperts, form: Callable, x: Tensor) -> Tensor:
    """Route x (N, width), and mix the experts by one form."""
    return form(layer.experts, x, layer.router(x))


def work_of(shape: Shape, tokens: int, experts: float, itemsize: int, rates: dict) -> dict:
    """What the forward pass must do and its limit: FLOPs where they take longer, else the bytes of so many experts."""
    matrix = 3 * shape.width * shape.inner
    flops, read = 2 * matrix * shape.per_token * tokens, matrix * itemsize * experts
    if flops / rates["flops"] > read / rates["bytes"]:
        return {"flops": flops, "limit": rates["flops"]}
    return {"bytes": read, "limit": rates["bytes"]}


def measure_forward(
    report: Report, name: str, shape: Shape, layer: MixtureOfExperts, dense: FeedForward, tokens: int, rates: dict
) -> None:
    """Each contestant on several sets of tokens, which choose different experts."""
    weight = layer.experts.up
    inputs = [(torch.randn(tokens, shape.width, device=weight.device, dtype=weight.dtype),) for _ in range(8)]
    with torch.no_grad():
        chosen = [layer.router(x).experts.unique().numel() for (x,) in inputs]
        read = sum(chosen) / len(chosen)
        for who, fn in contestants(layer, dense).items():
            ahead = weight.is_cuda and who in ("grouped", "dense, the same work")  # the others wait for the GPU
            timing = measure(fn, inputs, device=weight.device, seconds=0.1, warmup=0.02, ahead=ahead)
            experts = shape.per_token if fn is dense else read
            report.add(
                timing=timing,
                case=f"{name}, {tokens:,} tokens, forward",
                contestant=who,
                tokens=tokens,
                experts_read=experts,
                experts_expected=expected_experts(shape.experts, shape.per_token, tokens),
                **work_of(shape, tokens, experts, weight.element_size(), rates),
            )


def measure_gradients(
    report: Report, name: str, shape: Shape, layer: MixtureOfExperts, dense: FeedForward, tokens: int, rates: dict
) -> None:
    """Forward and backward of many tokens, three times the arithmetic of forward."""
    weight = layer.experts.up
    make = partial(torch.randn, tokens, shape.width, device=weight.device, dtype=weight.dtype)
    inputs = [(make().requires_grad_(), make()) for _ in range(4)]
    for who, fn in contestants(layer, dense).items():

        def step(x: Tensor, grad: Tensor, fn: Callable = fn) -> None:
            fn(x).backward(grad)
            for parameter in (x, *layer.parameters(), *dense.parameters()):
                parameter.grad = None

        timing = measure(step, inputs, device=weight.device, seconds=0.15, warmup=0.02)
        flops = 3 * 2 * 3 * shape.width * shape.inner * shape.per_token * tokens
        case = f"{name}, {tokens:,} tokens, forward and backward"
        report.add(timing=timing, case=case, contestant=who, flops=flops, limit=rates["flops"], tokens=tokens)


# Training

SIXTEEN = ExpertsConfig(count=16, per_token=2, width=32, balance_weight=0.0)

MODELS: dict[str, dict] = {
    "mixture": {"experts": replace(SIXTEEN, balance_weight=0.1)},
    "mixture, selection bias": {"experts": replace(SIXTEEN, router="sigmoid_then_topk", bias_rate=0.01)},
    "mixture, not balanced": {"experts": SIXTEEN},
    "dense, the same work": {"feed_forward_width": 2 * 32},
    "dense, the same weights": {"feed_forward_width": 16 * 32},
}
"""What each model has in the place of the feed-forward."""


@dataclass
class Learner:
    """A model that learns, and what was seen of it."""

    model: Decoder
    optimizer: torch.optim.Optimizer
    seconds: list[float] = field(default_factory=list)
    entropies: list[list[float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def step(self, rate: float, inputs: Tensor, targets: Tensor) -> None:
        """One step of training, timed, and how even the load of each layer was."""
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        training.training_loss(self.model, inputs, targets).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        synchronize(inputs.device)
        self.seconds.append(time.perf_counter() - start)
        self.entropies.append([round(load_entropy(layer.load), 4) for layer in mixtures(self.model)])
        update_selection_biases(self.model)

    def facts(self) -> dict:
        """What is kept of it."""
        config = self.model.config
        return {
            "parameters": count_parameters(self.model),
            "active_feed_forward_weights": config.active_feed_forward_weights,
            "validation_losses": self.losses,
            "load_entropies": self.entropies if config.experts else [],
        }


def train_models(asked: MixtureOptions) -> None:
    """Let all models learn in turns."""
    device = torch.device(asked.device)
    report = Report("mixture_of_experts-training", device, asked.out, peers=("dense, the same work",))
    _, encoding = pretrained.load()
    shape = training.llama_like(vocab_size=encoding.n_vocab, max_length=128, width=64, layers=2, heads=4)
    settings = {"steps": asked.steps, "batch": 8, "context": 128, "warmup": 10, "beta2": 0.98, "weight_decay": 0.1}
    config = training.TrainingConfig(model=shape, learning_rate=6e-3, min_learning_rate=6e-4, **settings)
    texts = [join_stories(stories.stories(count, f"mixture {use}")) for count, use in ((6000, "train"), (100, "val"))]
    train, val = (np.array(encoding.encode(text, allowed_special="all")) for text in texts)
    windows = training.evaluation_windows(val, config.context, end_of_document=encoding.eot_token)
    windows = [x.to(device) for x in windows]
    learners = {name: learner(replace(shape, **changes), config, device) for name, changes in MODELS.items()}
    every = max(1, asked.steps // 24)
    for step in range(asked.steps + 1):
        if step % every == 0:
            for one in learners.values():
                one.losses.append(round(training.evaluate(one.model, *windows), 4))
        if step < asked.steps:
            starts = training.window_starts(len(train), config, step)
            inputs, targets = (x.to(device) for x in training.read_windows(train, starts, config.context))
            for one in learners.values():
                one.step(training.learning_rate(step, config), inputs, targets)
    tokens = config.batch * config.context
    facts = {name: one.facts() for name, one in learners.items()}
    report.note(tokens_per_step=tokens, steps=asked.steps, evaluated_every=every, learning_rate=config.learning_rate)
    report.attach(models=facts)
    for name, one in learners.items():
        print(name, one.losses[-1], flush=True)
        report.add(
            timing=Timing.of(one.seconds[min(10, len(one.seconds) // 2) :]),  # without the first ones
            case=f"a training step of {tokens:,} tokens, small models",
            contestant=name,
            unbounded="so small a model is bound by the start of its operators, not by a rate",
        )
    report.finish()


def learner(config: ModelConfig, settings: training.TrainingConfig, device: torch.device) -> Learner:
    """A new model with its optimizer; all begin from one seed."""
    torch.manual_seed(0)
    model = Decoder(config).to(device)
    return Learner(model, training.make_optimizer(model, settings))


if __name__ == "__main__":
    sys.exit(main())
