"""What fewer key and value heads save in time, and what they cost in quality.

    python -m benchmarks.grouped_query_attention --device cpu                  # decode attention, under half a minute
    python -m benchmarks.grouped_query_attention --device cpu --steps 60       # up-training, some minutes

The theory of a decode step's attention: it reads every cached key and value once, so its time is proportional to
kv_heads, as long as the bandwidth is what limits it, and nobody copies heads.

Quality: the pretrained model has as many kv heads as query heads. It is converted to fewer by mean-pooling, its
validation loss is measured, it is up-trained for a few steps on new stories, and measured again. So is the unconverted
model, with the same further training: otherwise more training would pass for less loss by grouping. The result is
``grouped_query_attention-uptraining.json``.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.harness import Options, Report, command_line, copies_past_cache, copy_rate, measure
from tformer_lib import pretrained, stories
from tformer_lib.attention import attend
from tformer_lib.grouped_query_attention import attend_repeated, to_grouped, uptrain
from tformer_lib.kv_cache import CacheShape
from tformer_lib.tokens import join_stories
from tformer_lib.training import evaluate, evaluation_windows, next_token_loss, read_windows


@dataclass(frozen=True)
class UptrainingOptions(Options):
    """The time of a decode step's attention, or with ``--steps`` the quality for every number of kv heads."""

    steps: int = 0
    """Steps of up-training for each model; 0 measures time instead."""
    batch: int = 8
    """Windows of 256 tokens in a step."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    topic = "grouped_query_attention"
    return command_line(run, arguments, options=UptrainingOptions, topic=topic, description=__doc__)


def run(args: UptrainingOptions) -> None:
    """The time of a decode step's attention, or with ``--steps`` the quality for every number of kv heads."""
    topic = f"grouped_query_attention{'-uptraining' if args.steps else ''}"
    report = Report(topic, args.device, args.out, peers=("copied", "grouped"))
    if args.steps:
        quality(report, args)
    else:
        decode_speed(report, args.device)
    report.finish()


def quality(report: Report, args: UptrainingOptions) -> None:
    """Convert, measure, up-train, measure."""
    model, encoding = pretrained.load(device=args.device)
    context = model.config.max_length
    windows = evaluation_windows(tokens_of(encoding, 120, "gqa val"), context, end_of_document=encoding.eot_token)
    val = [x.to(args.device) for x in windows]
    train = tokens_of(encoding, 200 + args.steps * args.batch, "gqa train")
    report.note(
        steps=args.steps,
        batch=args.batch,
        context=context,
        val_windows=len(val[0]),
        loss_pretrained=evaluate(model, *val),
    )
    curves = []
    for kv_heads in divisors(model.config.number_of_kv_heads):
        grouped = to_grouped(model, kv_heads)
        converted = evaluate(grouped, *val)
        losses = uptrain(grouped, batches(train, context, args), next_token_loss)
        curves.append(
            {
                "kv_heads": kv_heads,
                "bytes_per_token": CacheShape.of(grouped, 1).bytes_per_token,
                "loss_converted": converted,
                "loss_uptrained": evaluate(grouped, *val),
                "training_losses": [round(x, 4) for x in losses],
            }
        )
        print({k: v for k, v in curves[-1].items() if k != "training_losses"}, flush=True)
    report.facts["quality"] = curves


def divisors(heads: int) -> list[int]:
    """Every number of kv heads that divides, largest first."""
    return [n for n in range(heads, 0, -1) if heads % n == 0]


def tokens_of(encoding, count: int, seed: str) -> np.ndarray:
    """Stories that the training has not seen, as token ids, (tokens,)."""
    text = join_stories(stories.stories(count, seed))
    return np.array(encoding.encode(text, allowed_special="all"))


def batches(tokens: np.ndarray, context: int, args: UptrainingOptions) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The same windows for every model."""
    draw = np.random.default_rng(0)
    starts = [draw.integers(0, len(tokens) - context, args.batch) for _ in range(args.steps)]
    return [tuple(x.to(args.device) for x in read_windows(tokens, s, context)) for s in starts]


def decode_speed(report: Report, device: str) -> None:
    """One query per head over 4,096 keys, by kv heads, and with the keys and values copied for each query head."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    batch, heads, keys, head_dim = (1, 16, 4096, 64) if device == "cpu" else (16, 32, 8192, 128)
    if device == "cpu":
        torch.set_num_threads(1)  # the products are small: two threads would wait for each other
    bandwidth = copy_rate(device)
    report.note(copy_bytes_per_second=bandwidth, decode_shape=[batch, heads, keys, head_dim], decode_dtype=str(dtype))
    for kv_heads in divisors(heads):
        make = lambda n=kv_heads: (  # noqa: E731
            torch.randn(batch, heads, 1, head_dim, device=device, dtype=dtype),
            *torch.randn(2, batch, n, keys, head_dim, device=device, dtype=dtype),
        )
        inputs = copies_past_cache(make, device, most=3)
        work = {"bytes": 2 * inputs[0][1].numel() * dtype.itemsize, "limit": bandwidth, "kv_heads": kv_heads}
        for name, form in (("grouped", attend), ("copied", attend_repeated)):
            timing = measure(form, inputs, device=device, seconds=1.0)
            case = f"decode attention, {kv_heads} kv heads"
            report.add(timing=timing, case=case, contestant=name, form=name, **work)


if __name__ == "__main__":
    sys.exit(main())
