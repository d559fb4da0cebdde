"""Training: how many tokens a second, what share of the device's matrix-product rate, and how far a recipe gets.

    python -m benchmarks.training --device cuda                               # the speed of a training step
    python -m benchmarks.training --device cuda --nanogpt model.py            # beside nanoGPT's model (that file of it)
    python -m benchmarks.training --recipe shakespeare-char     # train a preset, keep its log
    python -m benchmarks.training --tries shakespeare-char      # train it with each of several settings
    python -m benchmarks.training --optimizers shakespeare-char # AdamW beside Muon, each at several learning rates

The limit of a step is the arithmetic that it needs, ``estimate_flops_per_token``, at the rate of the device's own
matrix products (measured here, in the same precision). The share of it that is reached is known as model FLOPs
utilisation.
A step is all of it: forward, backward, clipping, AdamW. The windows are on the device already. The steps of one shape
are timed in turns, and on a GPU the profiler says how long each kind of kernel takes in them.
"""

import importlib.util
import json
import math
import multiprocessing
import re
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import nn

from benchmarks.harness import (
    Options,
    Report,
    Timing,
    command_line,
    copy_rate,
    matmul_rate,
    measure,
    take_turns,
    warm_up,
)
from tformer_lib import training
from tformer_lib.training import Run, TrainingConfig
from tformer_lib.training.captured import CapturedStep
from tformer_lib.training.loss import is_chunked
from tformer_lib.training.run import choose_forms
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

GPT2_MEDIUM = replace(GPT2_SMALL, batch=16, model=replace(GPT2_SMALL.model, width=1024, layers=24, heads=16))

SHAPES = {
    "cuda": {
        "shakespeare-char": training.preset("shakespeare-char"),
        "GPT-2 small, 124M": GPT2_SMALL,
        "GPT-2 medium, 350M": GPT2_MEDIUM,
    },
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
    """What to call the file, instead of training, training-<preset> or training-optimizers."""
    shapes: tuple[str, ...] = ()
    """Measure these shapes alone, in this order, by the beginnings of their names."""
    nanogpt: Path | None = None
    """nanoGPT's model.py: its model is then timed in turns with ours, in the same process."""
    seconds: float = 4.0
    """How long each contestant's steps are timed."""
    tries: str | None = None
    """Train this preset with each of the settings in TRIES instead."""
    optimizers: tuple[str, ...] = ()
    """Compare AdamW with Muon on these presets instead, each at several learning rates."""
    steps: int = 1000
    """With --optimizers: the steps of each run."""
    workers: int = 1
    """With --optimizers or --tries: the runs that go on at once."""
    budget: float = 3600.0
    """With --optimizers or --tries: seconds after which no run begins."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command_line(run, arguments, options=TrainingOptions, topic="training", description=__doc__)


def run(asked: TrainingOptions) -> None:
    """Measure the speed of a step, train a recipe, try settings, or compare optimizers."""
    if asked.recipe:
        train_recipe(asked)
    elif asked.tries:
        compare_tries(asked)
    elif asked.optimizers:
        compare_optimizers(asked)
    else:
        measure_steps(asked)


# --- the speed of a step

NANOGPT, PLAIN = "nanoGPT's model", "sdpa, all logits at once"
OWN = "flash attention, logits in chunks"
FUSED = OWN + ", norms fused with sums"
GRAPH = FUSED + ", one CUDA graph"
NARROW = GRAPH + ", residual stream in bfloat16"
GELU = NARROW + ", GELU in the products"


def measure_steps(asked: TrainingOptions) -> None:
    """Tokens per second of each shape and contestant, the share of the matrix-product rate, and where the time goes."""
    device = torch.device(asked.device)
    report = Report(asked.name or "training", device, asked.out, peers=[NANOGPT, PLAIN])
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    limit = matmul_rate(device, dtype)
    report.note(matmul_rate=limit, matmul_dtype=str(dtype).removeprefix("torch."), compiled=device.type == "cuda")
    shapes = SHAPES[device.type]
    for name in [n for wish in asked.shapes or ("",) for n in shapes if n.startswith(wish)]:
        config = shapes[name]
        vocab_size = VOCABULARY.get(name, config.model.vocab_size)
        config = replace(config, model=replace(config.model, vocab_size=vocab_size, max_length=config.context))
        measure_shape(report, name, config, device, limit, asked)
        report.save()
    report.finish()


def measure_shape(report: Report, name: str, config: TrainingConfig, device: torch.device, limit, asked) -> None:
    """Add the rows of one shape, and where a step's time goes."""
    torch._dynamo.reset()  # else a second shape is compiled for all sizes that differ from the first's
    tokens, flops = config.batch * config.context, training.estimate_flops_per_token(config.model, config.context)
    windows = [random_windows(config, device) for _ in range(4)]
    steps, peaks = {}, {}
    for contestant, make in contestants(name, config, device, asked.nanogpt).items():
        step, parameters = make()
        warm_up(step, windows, device, 0.1)  # compiles
        steps[contestant], peaks[contestant] = step, peak_memory(step, windows[0], device)
    for contestant, timing in in_turns(steps, windows, device, asked.seconds).items():
        report.add(
            timing=timing,
            case=name,
            contestant=contestant,
            alone="no other trainer was measured" if len(steps) == 1 else None,
            flops=flops * tokens,
            limit=limit,
            tokens_per_second=round(tokens / timing.median),
            flops_per_token=flops,
            parameters=parameters,
            batch=config.batch,
            context=config.context,
            peak_bytes=peaks[contestant],
        )
    report.save()
    if device.type == "cuda" and len(steps) > 1:
        copy = copy_rate(device, size=2**30)
        spent = {}
        for contestant, step in steps.items():
            wide = contestant not in (NARROW, GELU)
            least = least_by_kernel(replace(config, residual_in_fp32=wide), limit, copy)
            spent[contestant] = where_time_goes(step, windows, least)
        for contestant, step in steps.items():
            if not isinstance(step, CapturedStep):  # a replay has kernels, but no operators with shapes
                spent[contestant]["products"] = product_times(step, windows[0], limit)
        bounds = least_seconds(config, limit, copy)
        load = {contestant: clock_and_power(step, windows, device) for contestant, step in steps.items()}
        report.attach(**{f"kernels of {name}": {"bounds": bounds, "milliseconds": spent, "under load": load}})
        for contestant, found in spent.items():
            print(
                f"  {contestant}: " + ", ".join(f"{kind} {ms:.2f}" for kind, ms in found["kinds"].items()), flush=True
            )
            print(f"    {load[contestant]}", flush=True)
        print("  least: " + ", ".join(f"{kind} {ms:.2f}" for kind, ms in bounds.items()), flush=True)


def print_milliseconds(name: str, kinds: dict[str, float]) -> None:
    """One line: how long each kind takes."""
    print(f"  {name}: {', '.join(f'{kind} {ms:.2f}' for kind, ms in kinds.items())} ms", flush=True)


def contestants(name: str, config: TrainingConfig, device: torch.device, nanogpt: Path | None) -> dict[str, Callable]:
    """Who makes a step: functions that return it and the number of parameters. GPT-2's shapes have several."""
    if device.type == "cpu" or not name.startswith("GPT-2"):
        return {f"a step of {config.batch * config.context:,} tokens": partial(make_step, config, device)}
    rungs = {OWN: replace(config, model=replace(config.model, attention="flash_attention"))}
    for rung, change in (
        (FUSED, {"fused_norms": True}),
        (GRAPH, {"cuda_graph": True}),
        (NARROW, {"residual_in_fp32": False}),
        (GELU, {"fused_gelu": True}),
    ):
        rungs[rung] = replace(list(rungs.values())[-1], **change)
    found = {name: partial(make_step, rung, device) for name, rung in reversed(rungs.items())}
    if config.model == GPT2_SMALL.model:
        found[PLAIN] = partial(make_step, config, device, chunked=False)
    else:  # fewer, for each compiles anew and a graph keeps its memory
        found = {name: found[name] for name in (GELU, NARROW, GRAPH, FUSED)}
    return found if nanogpt is None else {NANOGPT: partial(make_nanogpt_step, nanogpt, config, device), **found}


def in_turns(steps: dict[str, Callable], windows: list, device: torch.device, seconds: float) -> dict[str, Timing]:
    """Time the steps of several contestants, a few of each at a time, so that all see the same machine."""
    if device.type == "cpu":
        return {name: measure(step, windows, device=device, seconds=seconds) for name, step in steps.items()}
    turns = {name: partial(seconds_of_some, step, windows) for name, step in steps.items()}
    times, begin = {name: [] for name in steps}, time.perf_counter()
    while time.perf_counter() - begin < seconds * len(steps):
        for name, (some,) in take_turns(turns, 1).items():
            times[name] += some
    return {name: Timing.of(some) for name, some in times.items()}


def seconds_of_some(step: Callable, windows: list, count: int = 6) -> list[float]:
    """Seconds of some steps on a GPU, after one that is not timed: what came before has left the caches to another."""
    step(*windows[0])
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for i, (start, end) in enumerate(events):
        start.record()
        step(*windows[i % len(windows)])
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def make_step(config: TrainingConfig, device: torch.device, *, chunked: bool | None = None) -> tuple[Callable, int]:
    """A function of (inputs, targets) that does one whole step, and the number of parameters."""
    torch.manual_seed(0)
    model = Decoder(config.model).to(device)
    choose_forms(model, config)
    optimizer = training.make_optimizer(model, config)
    chunked = is_chunked(chunked, config.batch * config.context, config.model.vocab_size)
    loss_of = partial(training.next_token_loss, chunked=chunked)
    loss_of = torch.compile(loss_of) if device.type == "cuda" else loss_of
    step = whole_step(partial(loss_of, model), model, optimizer, config, device)
    return CapturedStep(step, device) if config.cuda_graph else step, count_parameters(model)


def make_nanogpt_step(file: Path, config: TrainingConfig, device: torch.device) -> tuple[Callable, int]:
    """The same with the model and the optimizer of nanoGPT's model.py, as its train.py uses them."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    m = config.model
    sizes = {"n_layer": m.layers, "n_head": m.heads, "n_embd": m.width, "vocab_size": m.vocab_size}
    model = module.GPT(module.GPTConfig(block_size=config.context, dropout=0.0, bias=m.bias, **sizes)).to(device)
    betas = config.beta1, config.beta2
    optimizer = model.configure_optimizers(config.weight_decay, config.learning_rate, betas, device.type)
    compiled = torch.compile(model) if device.type == "cuda" else model
    loss_of = lambda inputs, targets: compiled(inputs, targets)[1]  # noqa: E731
    return whole_step(loss_of, model, optimizer, config, device), count_parameters(model)


def whole_step(
    loss_of: Callable, model: nn.Module, optimizer, config: TrainingConfig, device: torch.device
) -> Callable:
    """Forward, backward, clipping and the optimizer, as a function of (inputs, targets) that returns the loss."""
    parameters = list(model.parameters())

    def step(inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of(inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return (loss.detach(),)

    return step


def peak_memory(step: Callable, window: tuple, device: torch.device) -> int | None:
    """Bytes that a step holds at most beside what was there before it; None on a CPU.

    Of a captured step, the step that was captured: a replay takes no memory, since the graph keeps it.
    """
    if device.type == "cpu":
        return None
    step = step.step if isinstance(step, CapturedStep) else step
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(*window)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


KINDS = {
    "loss": r"rows_kernel|^triton.*(softmax|logsumexp|nll)",
    "norms, activations, residual sums": "^triton|sum_and_norm_kernel|gradients_kernel",
    "attention": "flash|fmha|attention|forward_kernel|backward_kernel|prepare_kernel|round_dq",
    "matrix products": "nvjet|gemm|cutlass|cublas|splitk|gemv",
    "optimizer": "adam",
    "clipping": "lpnorm|multi_tensor|foreach",
    "fills and copies": "memset|memcpy|fill|copy",
}
"""What a kernel is for, by a part of its name; the first that fits. What is left is "other"."""


def where_time_goes(step: Callable, windows: list, least: dict[str, float], *, calls: int = 3, kept: int = 40) -> dict:
    """The milliseconds of a step by kind of kernel, with the gaps between kernels, and the longest kernels.

    Args:
        step: takes a window.
        windows: what the steps read in turn.
        least: what :func:`least_by_kernel` says; it stands beside the kernels whose names it knows.
        calls: the steps that are profiled.
        kept: how many kernels are listed: name, calls in a step, milliseconds, and the least milliseconds or None.
    """
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for i in range(calls):
            step(*windows[i % len(windows)])
        torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    events = [e for e in events if not e.name.startswith("Optimizer.")]  # marks a range, and is no kernel
    kernels, counts = Counter(), Counter()
    for event in events:
        kernels[event.name] += event.time_range.elapsed_us() / 1e3 / calls
        counts[event.name] += 1 / calls
    kinds = Counter()
    for name, ms in kernels.items():
        kinds[kind_of(name)] += ms
    span = (max(e.time_range.end for e in events) - min(e.time_range.start for e in events)) / 1e3 / calls
    kinds["nothing runs"] = max(0.0, span - sum(kernels.values()))
    longest = [
        [name[:120], round(counts[name], 2), round(ms, 4), least_of(name, least)]
        for name, ms in kernels.most_common(kept)
    ]
    return {"kinds": {kind: round(ms, 3) for kind, ms in kinds.most_common()}, "longest": longest}


def least_of(kernel: str, least: dict[str, float]) -> float | None:
    """The least milliseconds of a kernel, if a pattern fits its name."""
    return next((ms for pattern, ms in least.items() if re.search(pattern, kernel)), None)


def kind_of(kernel: str) -> str:
    """What a kernel is for, by its name."""
    lower = kernel.lower()
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, lower)), "other")


def clock_and_power(step: Callable, windows: list, device: torch.device, *, seconds: float = 2.0) -> dict | None:
    """The clock and the power of a GPU that does nothing but these steps: medians of the second half of the time.

    A GPU at its limit of power lowers its clock, and then a step takes as long as its energy needs.
    """
    asked = ["nvidia-smi", f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"]
    asked += ["--query-gpu=clocks.sm,power.draw,power.limit", "--format=csv,noheader,nounits", "--loop-ms=100"]
    try:
        watch = subprocess.Popen(asked, stdout=subprocess.PIPE, text=True)
    except OSError:
        return None
    begin, ends = time.perf_counter(), []
    while time.perf_counter() - begin < seconds:
        step(*windows[len(ends) % len(windows)])
        ends.append(torch.cuda.Event())
        ends[-1].record()
        ends[max(0, len(ends) - 3)].synchronize()  # the host stays two steps ahead: the GPU does not wait for it
    torch.cuda.synchronize()
    watch.terminate()
    return medians_of_samples(watch.communicate()[0])


def medians_of_samples(text: str) -> dict | None:
    """The medians of the later half of lines "clock, power, limit"; None if there is none, or the GPU does not tell."""
    samples = [line.split(", ") for line in text.splitlines()]
    samples = [sample for sample in samples[len(samples) // 2 :] if len(sample) == 3]
    try:
        clock, power, limit = (median(map(float, column)) for column in zip(*samples, strict=True))
    except ValueError:
        return None
    return {"clock in MHz": clock, "power in W": power, "limit in W": limit}


def product_times(step: Callable, window: tuple, matmul: float) -> list[list]:
    """The matrix products of a step: [shape, calls, milliseconds, least milliseconds], those that take longest first.

    Args:
        step: takes a window; its operators are seen only if it is not captured.
        window: what it reads.
        matmul: the device's matrix products, FLOP/s.
    """
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        step(*window)
        torch.cuda.synchronize()
    spent, calls = Counter(), Counter()
    for event in profile.events():
        if event.name in ("aten::mm", "aten::addmm") and event.kernels:
            (m, k), (_, n) = [shape for shape in event.input_shapes if len(shape) == 2][-2:]
            spent[m, k, n] += sum(kernel.duration for kernel in event.kernels) / 1e3
            calls[m, k, n] += 1
    least = lambda shape: 2e3 * calls[shape] * math.prod(shape) / matmul  # noqa: E731
    return [
        [" x ".join(f"{size:,}" for size in shape), calls[shape], round(ms, 4), round(least(shape), 4)]
        for shape, ms in spent.most_common()
    ]


def least_by_kernel(config: TrainingConfig, matmul: float, copy: float) -> dict[str, float]:
    """Milliseconds that the device's rates allow the kernels of a step whose names fit a pattern.

    Args:
        config: the run's, of a GPT-2 model in bfloat16.
        matmul: the device's matrix products, FLOP/s.
        copy: its memory, bytes/s read plus written.
    """
    m, tokens, wide = config.model, config.batch * config.context, 4 if config.residual_in_fp32 else 2
    stream, hidden = tokens * m.width, tokens * m.size_of_feed_forward  # numbers of one layer
    sums = (2 * m.layers - 1) * stream
    product = 2 * m.layers * stream * config.context / 2  # FLOPs of one of causal attention's, over all layers
    bytes_of = {
        "sum_and_norm_kernel": (2 * wide + 4) * sums,  # reads the stream and the branch, writes the sum and the norm
        "gradients_kernel": (16 if wide == 4 else 8) * sums,  # in float32 the branch's gradient is a copy in 16 bits
        "rows_kernel": 4 * tokens * m.vocab_size,  # a logit is read once, its gradient written
        "sigmoid_backward": 6 * m.layers * hidden,  # GELU's input and two gradients
        "sigmoid": 4 * m.layers * hidden,
        "prepare_kernel": 4 * m.layers * stream,  # attention's output and its gradient
        "round_dq_kernel": 6 * m.layers * stream,
        "FusedOptimizer": 28 * count_parameters(Decoder(m).to("meta")),
    }
    flops_of = {"flash.*forward_kernel": 2 * product, "flash.*backward_kernel": 5 * product}
    least = {name: count / copy for name, count in bytes_of.items()}
    least |= {name: count / matmul for name, count in flops_of.items()}
    return {name: round(1e3 * seconds, 4) for name, seconds in least.items()}


def least_seconds(config: TrainingConfig, matmul: float, copy: float) -> dict[str, float]:
    """Milliseconds of each kind that the device's own rates allow: the products' arithmetic, the others' bytes.

    Args:
        config: the run's, of a GPT-2 model in bfloat16 with a residual stream in float32.
        matmul: the device's matrix products, FLOP/s.
        copy: its memory, bytes/s read plus written.
    """
    m, tokens = config.model, config.batch * config.context
    weights = m.layers * (4 * m.width**2 + 2 * m.width * m.size_of_feed_forward) + m.width * m.vocab_size
    numbers = count_parameters(Decoder(m).to("meta"))
    attention = 7 * 2 * m.layers * m.width * config.context / 2 * tokens  # causal: 2 products forward, 5 backward
    logits = 2 * tokens * m.vocab_size
    # of each layer: two sums and norms read and write the stream, forward and backward; an activation, twice
    stream, hidden = 4 * tokens * m.width, 2 * tokens * m.size_of_feed_forward
    elementwise = m.layers * (2 * (2.5 * stream + 4 * stream) + 2 * hidden + 3 * hidden)
    return {
        "matrix products": round(6e3 * weights * tokens / matmul, 3),
        "attention": round(1e3 * attention / matmul, 3),
        "loss": round(2e3 * logits / copy, 3),  # read once, its gradient written once
        "norms, activations, residual sums": round(1e3 * elementwise / copy, 3),
        "optimizer": round(28e3 * numbers / copy, 3),  # weight, two moments: read and written; the gradient read
        "clipping": round(12e3 * numbers / copy, 3),  # the gradient read, read and written
    }


def random_windows(config: TrainingConfig, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of random tokens, (batch, context) int64 each."""
    rows = torch.randint(0, config.model.vocab_size, (config.batch, config.context + 1), device=device)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


# --- recipes


def train_recipe(arguments: TrainingOptions) -> None:
    """Train a preset, and write its configuration, its log and its best validation loss as one JSON."""
    name = arguments.name or f"training-{arguments.recipe}"
    report = Report(name, arguments.device, arguments.out)
    run = Run(recipe_config(arguments.recipe, name, arguments.device, arguments.set))
    report.facts |= trained(run, arguments.recipe)
    report.note()
    report.finish()
    if arguments.pack:
        pack(run.out, report.out / f"{name}.tar.gz")


def trained(run: Run, preset: str, quiet: bool = False) -> dict:
    """Train a run to its end: its best validation loss and where it was, its configuration and its log."""
    start = time.perf_counter()
    run.train(quiet=quiet)
    return {
        "preset": preset,
        "parameters": count_parameters(run.model),
        "best_val_loss": run.best,
        "best_step": min(evaluations(run.history), key=lambda line: line["val_loss"])["step"],
        "val_tokens": run.val_tokens,
        "floor": run.floor,
        "seconds": round(time.perf_counter() - start, 1),
        "config": asdict(run.config),
        "history": run.history,
    }


def evaluations(history: list[dict]) -> list[dict]:
    """The lines of a log that have a validation loss."""
    return [line for line in history if "val_loss" in line]


def recipe_config(preset: str, name: str, device: str, changes: Sequence[str]) -> TrainingConfig:
    """The preset with changes, each ``FIELD=VALUE``."""
    values = asdict(training.preset(preset, out=f"runs/{name}", device=device))
    for change in changes:
        field, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"--set takes FIELD=VALUE, got {change!r}")
        where = values["model"] if field.startswith("model.") else values
        try:
            where[field.removeprefix("model.")] = json.loads(value)
        except ValueError as error:
            raise ValueError(f"--set {change}: the value must be JSON ({error})") from error
    return training.config_from_dict(values)


# --- one preset, several settings

PLAIN_RECIPE = ("average=0.0", "token_noise=0.0", "model.dropout=0.2")
"""nanoGPT's settings for Shakespeare, of those that are tried."""
TRIES = (
    PLAIN_RECIPE,
    ("average=0.998", "token_noise=0.1", "model.dropout=0.3"),
    ("average=0.0", "token_noise=0.0", "model.dropout=0.3"),
    (
        "average=0.998",
        "token_noise=0.1",
        "model.dropout=0.3",
        'model.norm="layernorm"',
        'model.feed_forward="gelu"',
        'model.positions="learned"',
        "model.feed_forward_width=1536",
    ),
    ("average=0.99", "token_noise=0.1", "model.dropout=0.4", "steps=2000"),
)


def compare_tries(asked: TrainingOptions) -> None:
    """Train a preset with each of ``TRIES``: every try in a table, the recipe and the best with their logs.

    Runs that go on at once share the device, so their seconds say nothing about speed.
    """
    report = Report(asked.name or f"training-{asked.tries}-tries", asked.device, asked.out)
    report.facts = {"tries": []}
    begin = time.perf_counter()
    with ProcessPoolExecutor(asked.workers, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(try_one, asked, number, begin) for number in range(len(TRIES))]
        for job in as_completed(jobs):
            if (found := job.result()) is not None:
                keep_try(report.facts, found)
                print(f"  {found['best_val_loss']:.4f} at step {found['best_step']}: {found['changes']}", flush=True)
                report.save()
    report.facts["tries"].sort(key=lambda row: row["best_val_loss"])
    report.finish()


def try_one(asked: TrainingOptions, number: int, begin: float) -> dict | None:
    """One of ``TRIES``, in a process of its own; None if there is no time left for it."""
    if time.perf_counter() - begin > asked.budget:  # the machine's clock, the same in all processes
        return None
    kept = ("sample_tokens=0", "save_interval=1000000")
    run = Run(recipe_config(asked.tries, f"{asked.tries}-try-{number}", asked.device, (*TRIES[number], *kept)))
    return {"changes": list(TRIES[number]), **trained(run, asked.tries, quiet=True)}


def keep_try(facts: dict, found: dict) -> None:
    """Add a try to the table; the recipe's log is kept, and the log of the best so far."""
    config, last = found["config"], evaluations(found["history"])[-1]["val_loss"]
    row = {"changes": found["changes"], "dropout": config["model"]["dropout"]}
    row |= {name: config[name] for name in ("token_noise", "average", "weight_decay", "learning_rate", "steps")}
    row |= {name: config["model"][name] for name in ("norm", "feed_forward", "positions")}
    row |= {name: found[name] for name in ("parameters", "best_val_loss", "best_step")} | {"last_val_loss": last}
    facts["tries"].append(row)
    if tuple(found["changes"]) == PLAIN_RECIPE:
        facts["recipe"] = found
    if found["best_val_loss"] == min(row["best_val_loss"] for row in facts["tries"]):
        facts["best"] = found


# --- AdamW beside Muon

RATES = (1e-3, 2e-3, 4e-3, 5e-4, 8e-3, 1.6e-2)
"""The peak learning rates that both optimizers are tried at, the likeliest first."""


def compare_optimizers(asked: TrainingOptions) -> None:
    """Train presets with AdamW and with Muon at the same learning rates, and the best of each with other seeds.

    All else is the preset's, weight decay too, but for the warm-up (a twentieth of the steps), the least learning rate
    (a tenth of the peak), and no average of the weights.

    The file has the validation losses of every run, and how many tokens the best of each optimizer needed for the loss
    that the best AdamW ends with.
    """
    report = Report(asked.name or "training-optimizers", asked.device, asked.out)
    report.facts = {"steps": asked.steps, "rates": RATES, "best": [], "runs": []}
    begin = time.perf_counter()
    runs = [(p, o, rate, 1337) for rate in RATES for p in asked.optimizers for o in ("adamw", "muon")]
    with ProcessPoolExecutor(asked.workers, multiprocessing.get_context("spawn")) as pool:
        train_all(pool, runs, asked, report, begin)
        best = [best_run(report.facts["runs"], p, o) for p in asked.optimizers for o in ("adamw", "muon")]
        again = [(r["preset"], r["optimizer"], r["rate"], seed) for seed in (1, 2) for r in best if r]
        train_all(pool, again, asked, report, begin)
    for line in report.facts["best"]:
        print(f"  {line}", flush=True)


def train_all(pool: ProcessPoolExecutor, runs: list, asked: TrainingOptions, report: Report, begin: float) -> None:
    """Train these (preset, optimizer, rate, seed), and keep what each of them measures."""
    jobs = [pool.submit(train_one, run, asked.steps, asked.device, begin, asked.budget) for run in runs]
    for job in as_completed(jobs):
        if (found := job.result()) is not None:
            report.facts["runs"].append(found)
            report.facts["best"] = [summary(report.facts["runs"], preset) for preset in asked.optimizers]
            print("  {preset} {optimizer} {rate:g} seed {seed}: {val_loss:.4f}".format(**found), flush=True)
            report.save()


def train_one(run: tuple, steps: int, device: str, begin: float, budget: float) -> dict | None:
    """One run, in a process of its own; None if there is no time left for it. A run that diverges has a loss of NaN."""
    preset, optimizer, rate, seed = run
    if time.perf_counter() - begin > budget:  # the machine's clock, the same in all processes
        return None
    every = max(1, steps // 40)
    changes = {"learning_rate": rate, "min_learning_rate": rate / 10, "optimizer": optimizer, "seed": seed}
    changes |= {"steps": steps, "warmup": steps // 20, "eval_interval": every, "log_interval": every}
    changes |= {"sample_tokens": 0, "save_interval": steps, "device": device}
    changes["eval_windows"] = 256 if device == "cuda" else 32
    changes |= {"average": 0.0, "compile": False}  # losses are measured, of the weights themselves
    config = training.preset(preset, out=f"runs/{preset}-{optimizer}-{rate:g}-{seed}", **changes)
    found = {
        "preset": preset,
        "optimizer": optimizer,
        "rate": rate,
        "seed": seed,
        "tokens": config.batch * config.context,
    }
    trained = Run(config)
    try:
        trained.train(quiet=True)
    except FloatingPointError:
        return {**found, "val_loss": float("nan"), "curve": []}
    curve = [[line["step"], round(line["val_loss"], 5)] for line in trained.history if "val_loss" in line]
    return {**found, "val_loss": min(loss for _, loss in curve), "curve": curve}


def best_run(runs: list[dict], preset: str, optimizer: str) -> dict | None:
    """The run of the sweep with the lowest validation loss."""
    tried = [r for r in runs if (r["preset"], r["optimizer"], r["seed"]) == (preset, optimizer, 1337)]
    return min((r for r in tried if r["val_loss"] == r["val_loss"]), key=lambda r: r["val_loss"], default=None)


def summary(runs: list[dict], preset: str) -> dict:
    """Both optimizers at their best rates: their losses over the seeds, and the tokens to AdamW's loss."""
    line = {"preset": preset}
    for optimizer in ("adamw", "muon"):
        best = best_run(runs, preset, optimizer)
        same = [r for r in runs if best and all(r[k] == best[k] for k in ("preset", "optimizer", "rate"))]
        line[optimizer] = {"rate": best and best["rate"], "val_loss": [r["val_loss"] for r in same]}
        target = line["adamw"]["val_loss"] and max(line["adamw"]["val_loss"])
        line["target"] = target
        line[optimizer]["tokens"] = [tokens_to(r, target) for r in same]
    return line


def tokens_to(run: dict, target: float) -> int | None:
    """The tokens after which a run's validation loss was first no higher than a target."""
    return next((step * run["tokens"] for step, loss in run["curve"] if loss <= target + 1e-5), None)


def pack(folder: Path, target: Path) -> None:
    """Put a run's files into one archive, the checkpoint left out."""
    with tarfile.open(target, "w:gz") as archive:
        for path in sorted(folder.iterdir()):
            if path.name != "checkpoint.safetensors":
                archive.add(path, arcname=path.name)


if __name__ == "__main__":
    sys.exit(main())
