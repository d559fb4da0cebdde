"""A layer of experts against the loop that defines it and a dense feed-forward of the same work.

    python -m benchmarks.mixture_of_experts --device cpu       # a small layer, some seconds
    python -m benchmarks.mixture_of_experts --device cuda      # the layers of Mixtral 8x7B and Qwen3-30B-A3B

The theory: a few tokens cost the bytes of the experts that they choose, and many cost the arithmetic of their k experts
each. The dense feed-forward is as wide as k experts together, so its arithmetic is that of the experts, and its bytes
are those of k experts however many tokens there are. The limit of a row is the larger of its two times.

The router is random, so the load is nearly even. Its time is part of every form's.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.harness import Options, Report, command_line, copy_rate, matmul_rate, measure
from tformer_lib.mixture_of_experts import (
    ExpertsConfig,
    MixtureOfExperts,
    expected_experts,
    mix_batched,
    mix_by_loop,
    mix_grouped,
)
from tformer_lib.transformer import FeedForward, ModelConfig, make_feed_forward


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
        "Mixtral 8x7B": Shape(4096, 14336, 8, 2, (1, 4, 16, 64, 256, 1024, 4096)),
        "Qwen3-30B-A3B": Shape(2048, 768, 128, 8, (1, 4, 16, 64, 256, 1024, 4096)),
    },
    "cpu": {"width 192, 16 experts of 192": Shape(192, 192, 16, 2, (1, 16, 256, 2048))},
}

FORMS: dict[str, Callable] = {"grouped": mix_grouped, "loop": mix_by_loop, "batched": mix_batched}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command_line(run, arguments, options=Options, topic="mixture_of_experts", description=__doc__)


def run(asked: Options) -> None:
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
            timing = measure(fn, inputs, device=weight.device, seconds=0.15, warmup=0.05, ahead=ahead)
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

        timing = measure(step, inputs, device=weight.device, seconds=0.3, warmup=0.05)
        flops = 3 * 2 * 3 * shape.width * shape.inner * shape.per_token * tokens
        case = f"{name}, {tokens:,} tokens, forward and backward"
        report.add(timing=timing, case=case, contestant=who, flops=flops, limit=rates["flops"], tokens=tokens)


if __name__ == "__main__":
    sys.exit(main())
