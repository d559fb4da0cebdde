"""Training: how many tokens a second, what share of the device's matrix-product rate, and how far a recipe gets.

    python -m benchmarks.training --device cuda                               # the speed of a training step
    python -m benchmarks.training --recipe shakespeare-char     # train a preset, keep its log

The limit of a step is the arithmetic that it needs, ``estimate_flops_per_token``, at the rate of the device's own
matrix products (measured here, in the same precision). The share of it that is reached is known as model FLOPs
utilisation.
A step is all of it: forward, backward, clipping, AdamW. The windows are on the device already.
"""

import json
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from benchmarks.harness import Options, Report, command_line, matmul_rate, measure
from tformer_lib import training
from tformer_lib.training import Run, TrainingConfig
from tformer_lib.transformer import Decoder, ModelConfig, count_parameters

GPT2_SMALL = TrainingConfig(
    model=ModelConfig(
        vocab_size=50304,  # GPT-2's 50,257, rounded up to a multiple of 64 as nanoGPT does: tensor cores like it
        max_length=1024,
        width=768,
        layers=12,
        heads=12,
        feed_forward="gelu_tanh",
        bias=False,
    ),
    batch=32,
    context=1024,
    learning_rate=6e-4,
    min_learning_rate=6e-5,
    beta2=0.95,
)

SHAPES = {
    "cuda": {"shakespeare-char": training.preset("shakespeare-char"), "GPT-2 small, 124M": GPT2_SMALL},
    "cpu": {name: training.preset(name) for name in ("shakespeare-char-cpu", "quick")},
}
VOCABULARY = {"shakespeare-char": 65, "shakespeare-char-cpu": 65, "quick": 1024}


@dataclass(frozen=True)
class TrainingOptions(Options):
    """Measure the speed of a step, or train a recipe."""

    recipe: str | None = None
    """Train this preset to its end instead, and keep its log."""
    set: tuple[str, ...] = ()
    """With --recipe: fields to change, as FIELD=VALUE."""
    pack: bool = False
    """With --recipe: pack the run's files into one .tar.gz beside the log."""
    name: str | None = None
    """With --recipe: what to call the log, instead of training-<preset>."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command_line(run, arguments, options=TrainingOptions, topic="training", description=__doc__)


def run(asked: TrainingOptions) -> None:
    """Measure the speed of a step, or train a recipe."""
    if asked.recipe:
        train_recipe(asked)
    else:
        measure_steps(torch.device(asked.device), asked.out)


def measure_steps(device: torch.device, out: Path | None) -> None:
    """Tokens per second of each shape, and the share of the matrix-product rate."""
    report = Report("training", device, out)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    limit = matmul_rate(device, dtype)
    report.note(matmul_rate=limit, matmul_dtype=str(dtype).removeprefix("torch."), compiled=device.type == "cuda")
    for name, config in SHAPES[device.type].items():
        model = replace(
            config.model, vocab_size=VOCABULARY.get(name, config.model.vocab_size), max_length=config.context
        )
        config = replace(config, model=model)
        tokens, flops = config.batch * config.context, training.estimate_flops_per_token(model, config.context)
        step, parameters = make_step(config, device)
        timing = measure(step, [random_windows(config, device) for _ in range(4)], device=device, seconds=4)
        report.add(
            timing=timing,
            case=name,
            contestant=f"a step of {tokens:,} tokens",
            alone="no other trainer was measured",
            flops=flops * tokens,
            limit=limit,
            tokens_per_second=round(tokens / timing.median),
            flops_per_token=flops,
            parameters=parameters,
            batch=config.batch,
            context=config.context,
        )
    report.finish()


def make_step(config: TrainingConfig, device: torch.device) -> tuple[Callable, int]:
    """A function of (inputs, targets) that does one whole step, and the number of parameters."""
    torch.manual_seed(0)
    model = Decoder(config.model).to(device)
    optimizer = training.make_optimizer(model, config)
    loss_of = torch.compile(training.next_token_loss) if device.type == "cuda" else training.next_token_loss

    def step(inputs: torch.Tensor, targets: torch.Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of(model, inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, count_parameters(model)


def random_windows(config: TrainingConfig, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of random tokens, (batch, context) int64 each."""
    rows = torch.randint(0, config.model.vocab_size, (config.batch, config.context + 1), device=device)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def train_recipe(arguments: TrainingOptions) -> None:
    """Train a preset, and write its configuration, its log and its best validation loss as one JSON."""
    name = arguments.name or f"training-{arguments.recipe}"
    report = Report(name, arguments.device, arguments.out)
    run = Run(recipe_config(arguments, name))
    start = time.perf_counter()
    run.train()
    report.note(
        preset=arguments.recipe,
        parameters=count_parameters(run.model),
        best_val_loss=run.best,
        best_step=min((line for line in run.history if "val_loss" in line), key=lambda line: line["val_loss"])["step"],
        val_tokens=run.val_tokens,
        floor=run.floor,
        seconds=round(time.perf_counter() - start, 1),
    )
    report.facts |= {"config": asdict(run.config), "history": run.history}
    report.finish()
    if arguments.pack:
        pack(run.out, report.out / f"{name}.tar.gz")


def recipe_config(arguments: TrainingOptions, name: str) -> TrainingConfig:
    """The preset with the changes that the arguments ask for."""
    values = asdict(training.preset(arguments.recipe, out=f"runs/{name}", device=arguments.device))
    for change in arguments.set:
        field, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"--set takes FIELD=VALUE, got {change!r}")
        where = values["model"] if field.startswith("model.") else values
        try:
            where[field.removeprefix("model.")] = json.loads(value)
        except ValueError as error:
            raise ValueError(f"--set {change}: the value must be JSON ({error})") from error
    return training.config_from_dict(values)


def pack(folder: Path, target: Path) -> None:
    """Put a run's files into one archive, the checkpoint left out."""
    with tarfile.open(target, "w:gz") as archive:
        for path in sorted(folder.iterdir()):
            if path.name != "checkpoint.safetensors":
                archive.add(path, arcname=path.name)


if __name__ == "__main__":
    sys.exit(main())
