"""A checkpoint of Llama 3.2's 1B shape, with random weights: how long it takes to load, and to write a token.

    python -m benchmarks.real_models --part loading     # beside reading its files; the most memory that a process took
    python -m benchmarks.real_models --part decoding    # beside transformers; on a GPU our engine too

Loading reads files that the operating system has in memory already, so that the disk is left out of all rows alike.
Decoding is bound by reading the weights once a token (and few keys), which is the limit of its rows.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from benchmarks.harness import Options, Report, command_line, copy_rate, measure
from tformer_lib import pretrained
from tformer_lib.generation import generate
from tformer_lib.serving import LLM
from tformer_lib.transformer import Decoder

SHAPE = pretrained.PUBLISHED["meta-llama/Llama-3.2-1B"].config
TINY = SHAPE | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 4}
PROMPT = list(range(1, 65))
READING = "reading the files"
THEIRS = "transformers generate, sdpa"


@dataclass(frozen=True)
class RealModelsOptions(Options):
    """What this benchmark can be asked besides."""

    part: Literal["loading", "decoding"] = "loading"
    """What to measure."""
    tiny: bool = False
    """A model that takes no time, to see that all runs."""
    tokens: int = 64
    """How many tokens are written in a call."""


def main(arguments=None) -> int:
    """The command line."""
    return command_line(run, arguments, options=RealModelsOptions, topic="real_models", description=__doc__)


def run(asked: RealModelsOptions) -> None:
    """Write the checkpoint, and measure what was asked."""
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), TINY if asked.tiny else SHAPE)
        report = Report(f"real_models-{asked.part}", asked.device, asked.out, peers=(READING, THEIRS))
        {"loading": loading, "decoding": decoding}[asked.part](report, Path(folder), asked)
        report.finish()


def write_checkpoint(folder: Path, config: dict) -> None:
    """Random weights in bfloat16, in two files."""
    model = Decoder(pretrained.config_from_hub(config)).to(torch.bfloat16)
    size = sum(p.nbytes for p in model.parameters())
    pretrained.to_hub(model, folder, largest=int(0.7 * size))


def loading(report: Report, folder: Path, asked: RealModelsOptions) -> None:
    """Seconds to read the files, and to load them in each dtype; the most memory, each in a process of its own."""
    bytes_of_files = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    work = {"case": "a checkpoint of random bfloat16 weights", "unbounded": "what the files' bytes cost is the peer"}
    calls = 5 if not asked.tiny else 2
    timed = partial(measure, seconds=0.0, warmup=0.0, min_calls=calls, max_calls=calls)
    report.add(timing=timed(partial(read_all, folder)), contestant=READING, bytes=bytes_of_files, **work)
    for dtype in ("bfloat16", "float32", "int8"):
        load = partial(load_all, folder, dtype)
        peak, weights = peak_of(folder, dtype)
        facts = {"peak_bytes": peak, "weight_bytes": weights, "peak_share": round(peak / weights, 3)}
        report.add(timing=timed(load), contestant=f"from_hub, {dtype}", bytes=bytes_of_files, **work, **facts)


def read_all(folder: Path) -> int:
    """Read every file whole into one piece of memory, as one must who keeps what is in it."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        memory = torch.empty(path.stat().st_size, dtype=torch.uint8)
        with open(path, "rb") as file:
            total += file.readinto(memory.numpy())
    return total


def load_all(folder: Path, dtype: str) -> None:
    """Load the model and touch every page of its weights, which a mapped file is read by."""
    touch(pretrained.from_hub(folder, dtype=getattr(torch, dtype)))


def touch(model: Decoder) -> None:
    """Read a byte of every page."""
    for x in model.state_dict().values():
        x.view(-1).view(torch.uint8)[::4096].sum()


def peak_of(folder: Path, dtype: str) -> tuple[int, int]:
    """The most memory that loading took in a process of its own, beyond what it had before, and the weights' bytes."""
    program = f"from benchmarks.real_models import tell_peak; tell_peak({str(folder)!r}, {dtype!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def tell_peak(folder: str, dtype: str) -> None:
    """What a process of its own does for :func:`peak_of`."""
    before = resident("VmRSS")
    model = pretrained.from_hub(folder, dtype=getattr(torch, dtype))
    touch(model)
    sizes = {x.data_ptr(): x.nbytes for x in model.state_dict().values()}  # a tied table counts once
    print(json.dumps([resident("VmHWM") - before, sum(sizes.values())]))


def resident(what: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM the most so far. What was read of a mapped file counts too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


def decoding(report: Report, folder: Path, asked: RealModelsOptions) -> None:
    """Tokens a second of one row: ours, our engine's, and those of transformers."""
    device, count = torch.device(asked.device), asked.tokens
    model = pretrained.from_hub(folder, device=device)
    weights = sum(p.nbytes for name, p in model.named_parameters())
    limit = copy_rate(device)
    report.note(copy_bytes_per_second=limit, new_tokens=count, prompt=len(PROMPT), weight_bytes=weights)
    work = {"case": f"a row of {count} tokens, bfloat16", "bytes": count * weights, "limit": limit}
    timed = partial(measure, device=device, seconds=4.0, warmup=0.0, min_calls=3, max_calls=20)
    report.add(timing=timed(theirs(folder, device, count)), contestant=THEIRS, **work)
    write = partial(generate, model, [PROMPT], max_new_tokens=count)
    report.add(timing=timed(write), contestant="ours, generate", **work)
    if device.type == "cuda":
        report.add(timing=timed(partial(write, cuda_graph=True)), contestant="ours, a CUDA graph", **work)
        llm = LLM(model, blocks=64, seats=1)
        report.add(timing=timed(lambda: llm.generate([PROMPT], {"max_new_tokens": count})), contestant="engine", **work)


def theirs(folder: Path, device: torch.device, count: int) -> Callable[[], object]:
    """The same by transformers, which reads the same folder."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    prompt = torch.tensor([PROMPT], device=device)
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    return partial(model.generate, prompt, attention_mask=torch.ones_like(prompt), **options)


if __name__ == "__main__":
    sys.exit(main())
