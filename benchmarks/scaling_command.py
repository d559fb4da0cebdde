"""The training command itself, in one process and in all: do the losses agree, and how fast does each scheme train?

    python -m benchmarks.scaling_command --device cuda     # on all GPUs of this machine, over NCCL
    python -m benchmarks.scaling_command --device cpu      # two processes and gloo: a rehearsal

Every run is a command that a reader can type: ``python -m tformer_lib.training train``, alone or under torchrun. All
runs read the same windows in the same order, so their losses may differ by rounding alone: a sum over two devices adds
in another order, and bfloat16 rounds each number to 8 bits. Runs in float32 show how much of the difference that is.
The loss that balances experts is taken over each process's tokens. It is another loss in two processes, so it is off
here: with it, 0.24 nats lay between one process and two after 16 steps in float32, without it rounding.

First a run of all processes stops half way and goes on in half as many, beside one that never stopped.

A step's time is the median over the lines of the run's log but the first, in which kernels are loaded and memory is
taken. Nothing is compiled, since the ring of context parallel cannot be.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from benchmarks.harness import Options, Report, Timing, command_line, device_name

ALONE = "one process"
DENSE = {
    "DDP": ("--parallel", "ddp"),
    "FSDP": ("--parallel", "fsdp"),
    "tensor parallel": ("--parallel", "fsdp", "--tensor-parallel", "{processes}"),
    "context parallel": ("--context-parallel", "{processes}"),
}
EXPERTS = (
    *("model.experts:experts-config", "--model.experts.count", "8", "--model.experts.per-token", "2"),
    *("--model.experts.balance-weight", "0"),
)
"""Each is made as wide as the model, so that all eight fit where several runs keep their checkpoints. The loss that
balances experts is left out: it is taken over each process's tokens, and so is another one where they are spread."""
SHARED = {"expert parallel": ("--expert-parallel",)}

SIZES = {
    "cuda": {"width": 1024, "layers": 8, "heads": 16, "batch": 32, "context": 1024, "steps": 20, "line": 4},
    "cpu": {"width": 64, "layers": 2, "heads": 4, "batch": 4, "context": 64, "steps": 4, "line": 2},
}
"""``line`` is how many steps one line of the log stands for. At a width of 2,048 the learning rate is too high for
losses to be compared: two runs that differ by rounding alone were 0.25 nats apart after 8 steps."""


@dataclass(frozen=True)
class CommandOptions(Options):
    """Which processes, and in what precision."""

    processes: int | None = None
    """One a device; by default as many as there are GPUs, or two on a CPU."""
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    """The precisions of the matrix products; a CPU has float32 alone. Without bfloat16 the file's name says so."""
    stories: int = 4000
    """Stories of the corpus."""
    resumed_on: int | None = None
    """Processes that go on with a run of all; by default half as many."""
    timeout: float = 120.0
    """Seconds that one run may take."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command_line(run, arguments, options=CommandOptions, topic="scaling_command", description=__doc__)


def run(asked: CommandOptions) -> int:
    """Every scheme beside one process; returns how many runs failed."""
    on_gpu = asked.device == "cuda"
    processes = asked.processes or (torch.cuda.device_count() if on_gpu else 2)
    if processes < 2:
        print("there is one GPU here, and so nothing to compare")
        return 0
    folder = f"{device_name(torch.device(asked.device))}-x{processes}" if on_gpu else "cpu"
    name = "scaling-command" if "bfloat16" in asked.dtypes or not on_gpu else "scaling-command-float32"
    report = Report(name, asked.device, asked.out, peers=[ALONE], folder=folder)
    report.note(processes=processes, backend="NCCL" if on_gpu else "gloo", **SIZES[asked.device])
    with TemporaryDirectory() as place:
        bench = Bench(asked, processes, Path(place), report)
        bench.make_corpus()
        bench.stop_and_go_on("float32")
        for dtype in asked.dtypes if on_gpu else ("float32",):
            bench.compare(dtype)
    report.finish()
    return bench.failed


class Bench:
    """All runs over one corpus."""

    def __init__(self, asked: CommandOptions, processes: int, place: Path, report: Report):
        self.asked, self.processes, self.place, self.report = asked, processes, place, report
        self.sizes, self.failed = SIZES[asked.device], 0

    def make_corpus(self) -> None:
        """The stories that all runs read."""
        make = ["-m", "tformer_lib.tokens", "--stories", str(self.asked.stories), "--out", str(self.place / "corpus")]
        subprocess.run([sys.executable, *make], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def compare(self, dtype: str) -> None:
        """One process, dense and with experts, each on a device of its own; then all processes, a scheme at a time."""
        narrow = ("--model.feed-forward-width", str(self.sizes["width"]), *EXPERTS)
        cases = {"experts": (narrow, SHARED), "dense": ((), DENSE)}
        with ThreadPoolExecutor(len(cases)) as pool:  # the two that stand alone run side by side
            jobs = {
                name: pool.submit(self.train, f"{name}, {dtype}", dtype, (), model, device=i)
                for i, (name, (model, _)) in enumerate(cases.items())
            }
            alone = {name: job.result() for name, job in jobs.items()}
        for name, (model, schemes) in cases.items():
            self.add(f"{name}, {dtype}", ALONE, alone[name], None)
            for scheme, flags in schemes.items():
                flags = tuple(flag.format(processes=self.processes) for flag in flags)
                lines = self.train(f"{name}, {dtype}, {scheme}", dtype, flags, model)
                self.add(f"{name}, {dtype}", scheme, lines, alone[name])
                shutil.rmtree(self.folder(f"{name}, {dtype}, {scheme}"), ignore_errors=True)  # gigabytes of checkpoints

    def stop_and_go_on(self, dtype: str) -> None:
        """All processes take half of the steps and save; fewer take the other half, beside a run of all to the end."""
        steps, fewer = self.sizes["steps"], self.asked.resumed_on or self.processes // 2
        case = f"dense, {dtype}, FSDP in {self.processes} processes, from the middle on in {fewer}"
        unbroken = self.train(f"unbroken, {dtype}", dtype, DENSE["FSDP"], ())
        name = f"stopped, {dtype}"
        if self.train(name, dtype, DENSE["FSDP"], (), steps=steps // 2) is None or unbroken is None:
            return
        begin = time.perf_counter()
        lines = self.launch(name, ["resume", "--out", str(self.folder(name)), "--steps", str(steps)], fewer)
        if lines is not None:
            later = [line for line in lines if line["step"] > steps // 2]
            expected = [line for line in unbroken if line["step"] > steps // 2]
            self.report.note(resumed={"case": case, "loss_differs_by": difference(later, expected)})
            self.report.facts["resumed"]["seconds of the second command"] = round(time.perf_counter() - begin, 1)

    def folder(self, name: str) -> Path:
        """Where a run's files are."""
        return self.place / name.replace(", ", "-").replace(" ", "-")

    def train(
        self,
        name: str,
        dtype: str,
        flags: Sequence[str],
        model: Sequence[str],
        *,
        device: int | None = None,
        steps: int | None = None,
    ) -> list[dict] | None:
        """One run, alone on a device or over all of them: the lines of its log, or None if it failed."""
        s, steps = self.sizes, str(steps or self.sizes["steps"])
        arguments = [
            *("train", "--data", str(self.place / "corpus"), "--out", str(self.folder(name))),
            *("--batch", str(s["batch"]), "--context", str(s["context"]), "--dtype", dtype, "--compile", "False"),
            *("--steps", steps, "--eval-interval", steps, "--save-interval", steps, "--eval-windows", "32"),
            *("--log-interval", str(s["line"]), "--sample-tokens", "0", "--warmup", "5"),
            *("--learning-rate", "1e-3", "--min-learning-rate", "1e-3"),  # so that no rate depends on the last step
            *("--timeout", str(self.asked.timeout / 2)),
            *(x for key in ("width", "layers", "heads") for x in (f"--model.{key}", str(s[key]))),
        ]
        if self.asked.device == "cpu" or device is not None:
            arguments += ["--device", "cpu" if self.asked.device == "cpu" else f"cuda:{device}"]
        return self.launch(name, [*arguments, *flags, *model], 1 if device is not None else self.processes)

    def launch(self, name: str, arguments: Sequence[str], processes: int) -> list[dict] | None:
        """The training command with these arguments, under torchrun where there are several processes."""
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
        line = [sys.executable, "-m", *(torchrun if processes > 1 else ()), "tformer_lib.training", *arguments]
        try:
            done = subprocess.run(line, capture_output=True, text=True, timeout=self.asked.timeout)
        except subprocess.TimeoutExpired:
            return self.note_failure(name, f"it took longer than {self.asked.timeout:g} seconds")
        if done.returncode:
            told = [text for text in done.stderr.splitlines() if "rror" in text and "torch" not in text]
            return self.note_failure(name, (told or [done.stderr.strip()])[0][-1000:])
        lines = (self.folder(name) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(text) for text in lines]

    def note_failure(self, name: str, why: str) -> None:
        """Keep why a run failed, and go on."""
        self.failed += 1
        self.report.note(**{f"failed: {name}": why})

    def add(self, case: str, scheme: str, lines: list[dict] | None, alone: list[dict] | None) -> None:
        """A row: a step's time, the losses, and how far they are from those of one process."""
        if lines is None:
            return
        logged = [line for line in lines if "loss" in line]
        tokens = self.sizes["batch"] * self.sizes["context"]
        seconds = sorted(tokens / line["tokens_per_second"] for line in logged[1:])
        middle = median(seconds)
        timing = Timing(middle, seconds[0], seconds[-1], len(seconds) * self.sizes["line"])
        self.report.add(
            timing=timing,
            case=case,
            contestant=scheme,
            unbounded="what bounds each scheme is forecast by benchmarks.scaling",
            tokens_per_second=round(tokens / middle),
            losses=[line["loss"] for line in logged],
            val_losses=[line["val_loss"] for line in lines if "val_loss" in line],
            gradient_norms=[line["gradient_norm"] for line in logged],
            loss_differs_by=None if alone is None else difference(lines, alone),
        )
        if alone is not None:
            print(f"  {case}, {scheme}: the losses differ by at most {difference(lines, alone):.2g} nats", flush=True)
        self.report.save()


def difference(lines: list[dict], others: list[dict]) -> float:
    """The largest difference of two runs' losses, in nats."""
    names = [(i, key) for i, line in enumerate(lines) for key in ("loss", "val_loss") if key in line]
    return max(abs(lines[i][key] - others[i][key]) for i, key in names)


if __name__ == "__main__":
    sys.exit(main())
