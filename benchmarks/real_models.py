"""A checkpoint of Llama 3.2's 1B shape, with random weights: how long it takes to load, and to write a token.

    python -m benchmarks.real_models --part loading     # beside reading its files; the most memory that a process took
    python -m benchmarks.real_models --part decoding    # beside transformers; on a GPU our engine too
    python -m benchmarks.real_models --part attention   # transformers' Llama and Qwen3 on our attention, a GPU only

Loading reads files that the operating system has in memory already, so that the disk is left out of all rows alike.
A decode step is bound by reading the weights once (and few keys), which is the limit of its rows. What a step takes is
the time of a long text less that of a short one, so that the prompt and what is prepared once are left out of all
rows alike. Where several contestants do the same work, they take turns: what else the machine does disturbs them alike.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks.harness import Options, Report, Timing, command_line, copy_rate, host_seconds, matmul_rate, take_turns
from tformer_lib import pretrained
from tformer_lib.generation import generate
from tformer_lib.pretrained.interface import NAME, register_with_transformers
from tformer_lib.serving import LLM
from tformer_lib.transformer import Decoder

SHAPE = pretrained.PUBLISHED["meta-llama/Llama-3.2-1B"].config
TINY = SHAPE | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 8}
PROMPT = list(range(1, 9))
"""Short: it is left out of all rows."""
READING = "reading the files"
SHORT = 4
"""Tokens of the short text that a long one is compared with."""
BACKENDS = {"sdpa": "sdpa", "fa3": "FlashAttention-3", NAME: "our attention"}
"""What attention transformers is asked for, and what a row calls it.

FlashAttention-3 is taken from the ``vllm`` wheel. transformers looks for names with "flash" among packages of its own.
"""
THEIRS = "transformers, sdpa"
FAMILIES = {"Llama": "meta-llama/Llama-3.2-1B", "Qwen3": "Qwen/Qwen3-0.6B"}


@dataclass(frozen=True)
class RealModelsOptions(Options):
    """What this benchmark can be asked besides."""

    part: tuple[Literal["loading", "decoding", "attention"], ...] = ("loading",)
    """What to measure, one after the other."""
    tiny: bool = False
    """A model that takes no time, to see that all runs."""
    folder: Path | None = None
    """Where the checkpoint is, or is to be written and kept; by default it is written and taken away again."""
    tokens: int = 64
    """How many tokens the long text has."""
    dtypes: tuple[Literal["float32", "bfloat16", "int8"], ...] = ("bfloat16", "int8")
    """What is loaded; a float32 model of this shape takes 5 GB."""
    rounds: int = 5
    """How many turns each contestant takes."""


def main(arguments=None) -> int:
    """The command line."""
    return command_line(run, arguments, options=RealModelsOptions, topic="real_models", description=__doc__)


def run(asked: RealModelsOptions) -> None:
    """Measure what was asked, each part in a file of its own."""
    for part in asked.part:
        report = Report(f"real_models-{part}", asked.device, asked.out, peers=(READING, THEIRS))
        if part == "attention":
            attention(report, asked)
        else:
            with tempfile.TemporaryDirectory() as made:
                folder = asked.folder or Path(made)
                if not (folder / "config.json").is_file():
                    write_checkpoint(folder, TINY if asked.tiny else SHAPE, torch.device(asked.device))
                {"loading": loading, "decoding": decoding}[part](report, folder, asked)
        report.finish()


def write_checkpoint(folder: Path, config: dict, device: torch.device) -> None:
    """Random weights in bfloat16, drawn on a device, in two files."""
    with made_in(torch.bfloat16), device:
        model = Decoder(pretrained.config_from_hub(config))
    size = sum(p.nbytes for p in model.parameters())
    pretrained.to_hub(model, folder, largest=int(0.7 * size))


@contextmanager
def made_in(dtype: torch.dtype) -> Iterator[None]:
    """Within it, weights are made in a dtype, and never in a wider one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def loading(report: Report, folder: Path, asked: RealModelsOptions) -> None:
    """Seconds to read the files, and to load them in each dtype; the most memory, each in a process of its own."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    contestants = {READING: partial(read_all, folder)}
    contestants |= {f"from_hub, {dtype}": partial(load_all, folder, dtype) for dtype in asked.dtypes}
    for name, timing in in_turns(contestants, asked.rounds).items():
        facts = {}
        if name != READING:
            peak, weights = peak_of(folder, name.removeprefix("from_hub, "))
            facts = {"peak_bytes": peak, "weight_bytes": weights, "peak_share": round(peak / weights, 3)}
        report.add(
            timing=timing,
            case="a checkpoint of random bfloat16 weights",
            contestant=name,
            bytes=size,
            unbounded="what the files' bytes cost is the peer",
            **facts,
        )


def in_turns(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Seconds of each, one call a turn after one that is not timed."""
    for call in contestants.values():
        call()
    return timed_in_turns(contestants, rounds, torch.device("cpu"))


def timed_in_turns(
    contestants: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, Timing]:
    """Seconds of each, one call a turn."""
    clocks = {name: partial(host_seconds, call, device) for name, call in contestants.items()}
    return {name: Timing.of(seconds) for name, seconds in take_turns(clocks, rounds).items()}


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
    """Seconds of a decode step of one row: ours, our engine's, and those of transformers."""
    device = torch.device(asked.device)
    model = pretrained.from_hub(folder, device=device)
    weights = sum(p.nbytes for p in model.parameters())
    limit = copy_rate(device)
    report.note(copy_bytes_per_second=limit, prompt=len(PROMPT), weight_bytes=weights, new_tokens=asked.tokens)
    model_of_theirs = load_theirs(folder, device)
    names = backends(device) if device.type == "cuda" else ["sdpa"]
    contestants = {f"transformers, {BACKENDS[name]}": theirs(model_of_theirs, name) for name in names}
    contestants["ours, generate"] = lambda count: generate(model, [PROMPT], max_new_tokens=count)
    if device.type == "cuda":
        llm = LLM(model, blocks=64, max_num_seqs=1)
        contestants["ours, a CUDA graph"] = lambda n: generate(model, [PROMPT], max_new_tokens=n, cuda_graph=True)
        contestants["our engine"] = lambda n: llm.generate([PROMPT], {"max_new_tokens": n})
    for name, timing in time_of_a_step(contestants, asked.tokens, asked.rounds, device).items():
        speed = round(1 / timing.median, 2)
        report.add(
            timing=timing,
            case="a decode step of one row, bfloat16",
            contestant=name,
            bytes=weights,
            limit=limit,
            tokens_per_second=speed,
        )


def time_of_a_step(
    contestants: dict[str, Callable[[int], object]], count: int, rounds: int, device: torch.device
) -> dict[str, Timing]:
    """Seconds a token of each that writes as many as it is asked, in turns: of ``count`` tokens less a short text."""
    for write in contestants.values():
        write(SHORT)

    def seconds_of_a_token(write: Callable[[int], object]) -> float:
        short, long = (host_seconds(partial(write, tokens), device) for tokens in (SHORT, count))
        return (long - short) / (count - SHORT)

    clocks = {name: partial(seconds_of_a_token, write) for name, write in contestants.items()}
    return {name: Timing.of(seconds) for name, seconds in take_turns(clocks, rounds).items()}


def load_theirs(folder: Path, device: torch.device) -> nn.Module:
    """The same files as transformers reads them."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()


def theirs(model: nn.Module, backend: str) -> Callable[[int], object]:
    """What writes so many greedy tokens after the prompt with an attention of :data:`BACKENDS`."""

    def write(count: int) -> None:
        model.set_attn_implementation(backend)
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        prompt = torch.tensor([PROMPT], device=model.device)
        model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)

    return write


def backends(device: torch.device) -> list[str]:
    """Those of :data:`BACKENDS` that are there, each registered with transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    register_with_transformers()
    if device.type != "cuda" or not find_spec("vllm"):
        return ["sdpa", NAME]
    AttentionInterface.register("fa3", attend_with_flash_attention_3)
    AttentionMaskInterface.register("fa3", lambda *_, **__: None)
    return list(BACKENDS)


def attend_with_flash_attention_3(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: None, scaling: float | None = None, **_
) -> tuple[Tensor, None]:
    """One causal row: q (1, heads, T, head_dim), k and v (1, kv_heads, S, head_dim) -> (1, T, heads, head_dim)."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    ends = torch.arange(2, device=q.device, dtype=torch.int32)
    out = flash_attn_varlen_func(
        *(x[0].transpose(0, 1) for x in (q, k, v)),
        max_seqlen_q=q.shape[2],
        cu_seqlens_q=ends * q.shape[2],
        max_seqlen_k=k.shape[2],
        cu_seqlens_k=ends * k.shape[2],
        softmax_scale=scaling,
        causal=True,
        fa_version=3,
    )
    return out[None], None


def attention(report: Report, asked: RealModelsOptions) -> None:
    """Seconds in which transformers' own models read a prompt, with each attention of :data:`BACKENDS`."""
    device = torch.device(asked.device)
    limit = matmul_rate(device, torch.bfloat16)
    report.note(matmul_flops_per_second=limit)
    for family, name in FAMILIES.items():
        config = pretrained.PUBLISHED[name].config | ({"vocab_size": 512, "num_hidden_layers": 2} if asked.tiny else {})
        model = random_model_of_theirs(config, device)
        for length in (64,) if asked.tiny else (4096, 16384):
            tokens = torch.randint(model.config.vocab_size, (1, length), device=device)
            read = {backend: partial(read_prompt, model, tokens, backend) for backend in backends(device)}
            apart = {backend: distance(run(), read["sdpa"]()) for backend, run in read.items()}
            for backend, timing in timed_in_turns(read, asked.rounds, device).items():
                report.add(
                    timing=timing,
                    case=f"{family} reads {length:,} tokens",
                    contestant=f"transformers, {BACKENDS[backend]}",
                    flops=flops_of_reading(config, length),
                    limit=limit,
                    difference_from_sdpa=apart[backend],
                )
            report.save()


def random_model_of_theirs(config: dict, device: torch.device) -> nn.Module:
    """A model of transformers with random weights in bfloat16."""
    import transformers

    theirs = transformers.AutoConfig.for_model(**config)
    with device:
        return transformers.AutoModelForCausalLM.from_config(theirs, dtype=torch.bfloat16).eval()


@torch.no_grad()
def read_prompt(model: nn.Module, tokens: Tensor, backend: str) -> Tensor:
    """The logits after the last token, (1, vocab_size)."""
    model.set_attn_implementation(backend)
    return model(tokens, use_cache=False, logits_to_keep=1).logits[:, -1].float()


def distance(one: Tensor, other: Tensor) -> float:
    """The root mean square of the difference of two vectors, as a share of that of the second."""
    return ((one - other).norm() / other.norm()).item()


def flops_of_reading(config: dict, length: int) -> float:
    """Floating-point operations of a prompt: two a parameter of the blocks and a token, and causal attention's."""
    ours = pretrained.config_from_hub(config)
    with torch.device("meta"):
        model = Decoder(ours)
    blocks = sum(p.numel() for p in model.stack.parameters())
    pairs = length * (length + 1) / 2
    return 2 * blocks * length + 4 * ours.layers * ours.heads * ours.size_of_head * pairs


if __name__ == "__main__":
    sys.exit(main())
