"""The planner of chapter 21: what each scheme holds and how long its step takes, for a model, devices and links."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from tformer_lib.distributed import costs
from tformer_lib.teaching.widgets import Interactive, module
from tformer_lib.transformer import ModelConfig

DEVICES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""How many devices one can choose."""

SCHEMES = {
    "DDP": costs.ddp,
    "FSDP": partial(costs.fsdp, weight_bytes=2),
    "tensor parallel": costs.tensor_parallel,
    "tensor parallel x FSDP": partial(costs.mixed, weight_bytes=2),
}
"""What the figure compares; FSDP gathers weights in bfloat16, as large runs do."""


class Planner(Interactive):
    """Choose a model, a number of devices and the links between them, and read what each scheme would hold and take."""

    _esm = module("scaling_out.js")


def planner(
    models: dict[str, ModelConfig], links: dict[str, costs.Machine], *, windows: int = 1024, context: int = 4096
) -> Planner:
    """The planner for these models and machines.

    Args:
        models: label -> config.
        links: label -> what the devices and the links between them can do.
        windows: texts in a step's batch.
        context: tokens of each.
    """
    plans = [
        [
            [[plan(config, machine, size, windows, context, name) for name in SCHEMES] for size in DEVICES]
            for machine in links.values()
        ]
        for config in models.values()
    ]
    names = {"models": list(models), "links": list(links), "devices": list(DEVICES), "schemes": list(SCHEMES)}
    numbers = {"plans": plans, "memory": [machine.memory / 1e9 for machine in links.values()]}
    data = names | numbers | {"tokens": windows * context}
    return Planner(label="Planner: a model over many devices", data=data)


def plan(
    config: ModelConfig, machine: costs.Machine, size: int, windows: int, context: int, name: str
) -> Sequence[float]:
    """One scheme: gigabytes of weights, gradients, optimizer and activations, seconds of arithmetic and of waiting,
    gigabytes sent, and micro-batches (0 where it does not fit, however small they are)."""
    counts, scheme = costs.Counts.of(config, windows, context), SCHEMES[name]
    found = costs.that_fits(scheme, counts, machine, size)
    pieces = found[1] if found else 0
    cost = found[0] if found else scheme(replace(counts, pieces=windows), machine, size)
    held = (cost.weights, cost.gradients, cost.optimizer, cost.activations)
    numbers = (*(part / 1e9 for part in held), cost.compute, cost.exposed, cost.sent / 1e9)
    return [*(float(f"{x:.3g}") for x in numbers), pieces]
