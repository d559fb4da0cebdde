"""The command line: train, resume, sample."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Literal

from tformer_lib import command_line, distributed
from tformer_lib.checkpoint import load_weights, read_tensors, require
from tformer_lib.mixture_of_experts import ExpertsConfig
from tformer_lib.tokens import load_encoding
from tformer_lib.training.config import PRESETS, TrainingConfig, config_from_dict, preset
from tformer_lib.training.run import Run, sample_text
from tformer_lib.transformer import Decoder, ModelConfig, count_parameters

# The command line


@dataclass(frozen=True)
class Resume:
    """Go on with a run from its last checkpoint, exactly where it was."""

    out: str
    """The run's folder."""
    steps: int | None = None
    """Train to this step instead of the run's own last one (the cosine then ends there)."""
    data: str | None = None
    """Where the corpus is now, if it was moved."""
    device: str | None = None
    """Go on on another device."""
    parallel: Literal["ddp", "fsdp"] | None = None
    """Go on with the other scheme."""
    tensor_parallel: int | None = None
    """Go on with another number of processes that cut each matrix."""
    context_parallel: int | None = None
    """Go on with another number of processes that cut each window."""
    expert_parallel: bool | None = None
    """Go on with experts that are shared, or are not."""
    timeout: float = distributed.TIMEOUT
    """Seconds that a process waits for the others before it gives up."""


CHANGED_BY_RESUME = ("steps", "data", "device", "parallel", "tensor_parallel", "context_parallel", "expert_parallel")


@dataclass(frozen=True)
class Sample:
    """Let the best weights of a run write."""

    out: str
    """The run's folder."""
    prompt: str = ""
    """What to go on from; by default the beginning of a text."""
    max_new_tokens: int = 200
    """Tokens to write at most."""
    temperature: float = 0.8
    """What the logits are divided by: 0 always takes the likeliest token, 1 draws from the model's own distribution."""
    top_k: int | None = None
    """Draw from this many likeliest tokens only; None is from all."""
    seed: int = 0
    """Seeds the draws."""
    device: str = "auto"
    """Where to run."""


def command_train(config: TrainingConfig) -> int:
    """Train a run from the beginning, together with the other processes if torchrun has started several."""
    with distributed.joined(cpu=config.device == "cpu", timeout=config.timeout):
        return train_and_tell(Run(config))


def command_resume(command: Resume) -> int:
    """Go on with a run, in as many processes as torchrun has started now."""
    changes = {name: getattr(command, name) for name in CHANGED_BY_RESUME}
    command_line.named("out", command.out)
    with distributed.joined(cpu=command.device == "cpu", timeout=command.timeout):
        return train_and_tell(Run.resume(command.out, **{k: v for k, v in changes.items() if v is not None}))


def train_and_tell(run: Run) -> int:
    """Train, say where things are, and return the exit status: 128 and the signal's number where one stopped it."""
    config, say = run.config, print if run.world.is_first else lambda text: None
    say(
        f"{count_parameters(run.model):,} parameters on {describe_place(run)}, "
        f"{config.batch * config.context:,} tokens a step, steps {run.step} to {config.steps}, "
        f"validation on {run.val_tokens:,} tokens; Ctrl-C saves and stops"
    )
    finished = run.train()
    floor = "" if run.floor is None else f" (the entropy of the text is {run.floor:.4f})"
    say(f"{'finished' if finished else 'stopped'} at step {run.step}, best validation loss {run.best:.4f}{floor}")
    say(f"next: python -m tformer_lib.training {'sample' if finished else 'resume'} --out {run.out}")
    return 0 if finished else 128 + run.stopped_by


def describe_place(run: Run) -> str:
    """The device, and how many processes share the work."""
    if run.world.size == 1:
        return f"{run.device}"
    config, schemes = run.config, [run.config.parallel] if run.layout.replicas > 1 else []
    schemes += [f"{kind} {n}" for kind in ("context", "tensor") if (n := getattr(config, f"{kind}_parallel")) > 1]
    schemes += ["experts"] if config.expert_parallel else []
    return f"{run.world.size} x {run.device.type} ({', '.join(schemes)})"


def command_sample(command: Sample) -> int:
    """Write a text."""
    source = command_line.named("out", command.out) / "best.safetensors"
    weights, facts = read_tensors(source)
    require(facts, {"config", "beginning"}, str(source))
    encoding = load_encoding(command.out)
    model = Decoder(config_from_dict(facts["config"], f"{source}: config").model)
    load_weights(model, weights, str(source))
    model.to(command_line.pick_device(command.device)).eval()
    prompt = facts["beginning"] + encoding.encode(command.prompt, disallowed_special=())
    options = {"temperature": command.temperature, "top_k": command.top_k, "seed": command.seed}
    print(command.prompt + sample_text(model, encoding, prompt, command.max_new_tokens, **options))
    return 0


def preset_in(arguments: Sequence[str]) -> str:
    """The preset that the arguments name: flags change its fields, so it must be known before they are read."""
    for argument, following in pairwise([*arguments, ""]):
        if argument.startswith("--preset"):
            return argument.partition("=")[2] if "=" in argument else following
    return "quick"


def describe_presets() -> str:
    """One line per preset, for --help."""
    lines = []
    for name, c in PRESETS.items():
        shape = f"{c.model.layers} layers, {c.model.width} wide, context {c.context}"
        lines.append(f"  {name:22} {shape}, {c.steps:,} steps of {c.batch} windows of {c.data}")
    return "\n".join(lines)


PROGRAM = "python -m tformer_lib.training"
HELP = """Train a small Transformer, go on with it after a stop, and let it write.

  python -m tformer_lib.tokens --help                              make a corpus first
  python -m tformer_lib.training train --preset quick              train on it
  python -m tformer_lib.training train --help                      every setting, with the preset's value
  python -m tformer_lib.training resume --out runs/quick           go on after Ctrl-C or a crash
  python -m tformer_lib.training sample --out runs/quick --prompt Once
  torchrun --nproc-per-node 2 -m tformer_lib.training train        the same on two GPUs (or in two processes)

Presets:
"""


@contextlib.contextmanager
def checks_deferred() -> Iterator[None]:
    """Let configs be built unchecked: tyro would put what their checks say into a box of its own, cut into lines."""
    checks = {kind: kind.__post_init__ for kind in (ExpertsConfig, ModelConfig, TrainingConfig)}
    for kind in checks:
        kind.__post_init__ = lambda self: None
    try:
        yield
    finally:
        for kind, check in checks.items():
            kind.__post_init__ = check


def read_command(arguments: Sequence[str]) -> TrainingConfig | Resume | Sample:
    """What the command line asks for; ``--help`` prints and exits."""
    import tyro  # here, so that the library trains where there is no tyro

    start = preset(preset_in(arguments))
    settings = tyro.conf.subcommand("train", default=start, description="Train a model from the beginning.")
    commands = (
        Annotated[TrainingConfig, settings]
        | Annotated[Resume, tyro.conf.subcommand("resume")]
        | Annotated[Sample, tyro.conf.subcommand("sample")]
    )
    with checks_deferred():
        command = command_line.parse(commands, arguments, program=PROGRAM, description=HELP + describe_presets())
    if isinstance(command, TrainingConfig):
        experts = command.model.experts and replace(command.model.experts)  # built again, now with their checks
        replace(command.model, experts=experts), replace(command)
    return command


def run_command(arguments: Sequence[str]) -> int:
    """Do what the command line asks for; returns the exit status."""
    command = read_command(arguments)
    return {TrainingConfig: command_train, Resume: command_resume, Sample: command_sample}[type(command)](command)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command_line.run(lambda: run_command(sys.argv[1:] if arguments is None else arguments))
