"""What continuous batching over blocks gains over a static batch, and how near a step comes to its bound.

    python -m benchmarks.serving --device cuda      # 256 requests on a 1B Llama shape, 4 GiB of keys and values
    python -m benchmarks.serving --device cpu       # 16 requests on the pretrained stories model

The theory: a decode step reads all weights and the keys and values of all rows, once. Its bound is those bytes over the
bandwidth. A static batch reads the weights for as many rows as could be reserved at full length, and goes on until its
longest row has ended; a continuous one reads them for as many rows as really fit, and fills each place at once.

Variants, on the same requests (prompts and outputs of 100 to 1,024 tokens, drawn from one seed, no stop tokens; every
length as likely, and in the part "skewed" every order of magnitude as likely, which is nearer to real traffic):

- engine: ``serving.Engine``.
- longest first: the same engine under the policy of that name, which trusts the lengths that requests ask for. Here all
  write as many as they ask for; where texts end earlier, it gains less.
- static: the same engine and kernels, in the same process, given a batch at a time: as many requests as can be reserved
  at full length (2,048 tokens), all of which go on until the longest has ended.
- contiguous: ``generation.generate`` on a preallocated cache with its recorded step, one such batch.
- transformers: the same shape, its own generate, one such batch, greedy, bfloat16, SDPA without cuDNN (which would
  prepare a plan for every new shape).
- nano-vllm: another engine of this kind, at the same memory and at 64 GiB, if it can be imported. How it is set up for
  a fair run is written in ``serving_peer``.

The parts run in processes of their own, unless ``--no-apart`` says otherwise. A batch's tokens count if they were asked
for.

The parts "latency" and "knee" let requests arrive while others are served, one by one at random (Poisson) or many at
once (bursts), at rates below and above what the engine can bear, and ask how long each waits: see ``serving_latency``.

The part "timeline" takes a decode step apart. Of 160 rows with 930 keys each, a step takes 2.73 ms on an H200 where its
bytes would take 1.71 (63 %), and the kernels say why:

    attention          1.43 ms, 1.14 by its bytes: 305 MB a layer at 3.4 TB/s. A call lasts 89 us, of which some 9 pass
                       before the first bytes arrive and after the last, and rows this short end often
    matrix products    1.02 ms, 0.57 by their bytes, the gate among them. A product of few rows has a floor of its own:
                       6.5 us for out (2.0 by its bytes) and 7.7 for q, k and v (2.9); down, cut along its inner
                       dimension, takes 12.8 and 3.1 for the sum of its parts (7.8); gate and up 21 (15.6 by bytes,
                       13.6 by arithmetic)
    small kernels      0.13 ms: sums and norms, RoPE with the writing of keys and values, 2.6 us each
    choosing tokens    0.03 ms
    the host           nothing: it takes 0.8 ms a step, and is a step ahead

What was tried to come nearer, what it promised, and what it gave:

    matrix products in Triton, with the weights' rows as those of wgmma, cut along the inner dimension: gate and up 25.1
        us instead of 18 (cuBLAS 23.4 in the same graph), down 15.8 instead of 11 (17.2), out 6.9 instead of 5 (7.0)
    fixed sizes of the joined matrices, so that the gate's loads are aligned: 4.4 us instead of 7.4 where the kernel is
        tuned for as many rows as it gets, and 7.1 where it was tuned for few; 3 were promised
    the search for the likeliest token as one compiled kernel: 45 us, 10 promised, 31 before; taken back
    all compiled kernels tuned by coordinate descent: one row 1,175 us instead of 1,239, 160 rows 2,803 instead of 2,750
    mixed steps: with compiled blocks they took 18 ms, of 512 tokens or of 4,096, because the host needs one for each
        block that it calls. With the blocks as they stand 74 of them took 0.67 to 0.97 s, as fused passes 0.57 to 0.59
    nine kernels a layer, each of which starts while the one before still runs (serving/fused.py), in place of 12 that a
        compiler made: 0.2 ms promised; 2.67 ms instead of 2.77, and 1.24 instead of 1.34 for one row
    the weights of the next product fetched into the L2 cache by the kernels before it, while memory rests: another 0.18
        ms promised; 2.82 ms instead of 2.67. The products were 1 to 2 us shorter, and to ask took 2 to 8 us
    products of few rows by wgmma, the tokens shared by a cluster of blocks (kernels/serving/few_rows.cu): 0.3 ms
        promised. The first version lost: 38 us instead of 22 for gate and up, because to arrive at another block's
        barrier with .release.cluster flushes all that the GPU writes, 1 us in each step of 64 columns. Without that,
        all four take 1.61 ms a step instead of 1.75 at 64 rows and 1.13 instead of 1.17 at one. At 160 rows they lose
        (2.62 for 2.56), but gate and up alone win (2.53). So each is timed when the engine starts, and the faster is
        recorded. The timing has rows without keys, and so misses some: at 64 rows it takes two of the four
    all of these: steps of 128 rows or more at 58 % of the bytes' bound, 50 in the record before; 1.88 times nano-vllm's
        tokens a second at 4 GiB and 1.45 at 64, 1.41 and 1.27 before (nano-vllm wrote 19,144 a second in the one run
        and 21,052 in the other)
    no full collection of garbage while requests are served (``freeze_heap``), which takes 0.2 s of a host: one of two
        runs at 64 GiB had one, whose steps of 128 rows or more took 3.24 ms on average and 2.86 by the median. 3.0 s
        promised for all requests, 3.06 came (3.14 before), and those steps reach 63 % of the bound in place of 57
    the policy "longest first": from a replay of the log, 1,291 steps in place of 1,659 and 3.3 s in place of 3.8 were
        promised. 1,295 steps and 3.52 s came, in place of 4.02: 12 % less, and 14 were promised. It writes 2.46 times
        nano-vllm's tokens a second. At 64 GiB, where all requests fit, it changes nothing (3.05 and 3.06 s)

    steps with prompts in CUDA graphs. The part "steps" found the host asking for 5.0 and 8.4 ms (two machines) for the
        kernels of 30 rows and 482 tokens of a prompt, which take 2.8. 2.9 ms were promised for the step in place of 5.4
        and 9.1, and a knee between 100 and 125 requests a second in place of 60 to 80. 2.85 ms came, and the knee lies
        between 80 and 100 (serving-latency.json; serving-latency-earlier.json is the run before)

The last record has the engine at 2.15 times nano-vllm's tokens a second at 4 GiB and 1.43 at 64. Beside the earlier one
(1.88 and 1.45, kept as serving-earlier.json) the engine was 3 % slower at 4 GiB and nano-vllm 15 %: its two rounds took
9.09 and 8.21 s, where they had taken 7.71 and 7.00. The part "transformers" was cut from the last record.

What was counted since, and not measured:

    where the time goes at 4 GiB: 0.42 s of 3.8 in steps full of prompts, 1.92 in 704 steps while the memory is full,
        1.47 in 924 steps in which nobody waits. A step of rows that write takes 1.21 ms, 0.86 times what its keys and
        values take at 4.3 TB/s, and 2.8 us a row. A piece of a prompt adds 0.4 ms and 2.6 us a token
    the 27 kernels of PyTorch between a step's last product and the next step's first one: 116 us at 142 rows, 28 of
        which are the search for the largest logits. Three kernels of our own could take 30; there are none yet

The part "steps" asks where a step of a lightly loaded server spends its time: on the clock, in the host that asks for
its kernels, and in the kernels.

The parts "speculation", "float8" and "deterministic" ask what each of these gains or costs: drafts at batch 1, on texts
that repeat themselves, that never do, and that mislead; float8 in the same bytes of keys and values; and steps of one
shape, under which no bit of a text depends on its neighbours. On a CPU, "precision" measures what float8 does to the
loss and to greedy texts, and "soak" runs for twenty minutes.
"""

import json
import math
import operator
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import median, quantiles

import torch
import torch.nn.functional as F

from benchmarks.harness import Options, Report, Timing, command_line, synchronize, take_turns
from benchmarks.serving_latency import Load, compare_policies, find_knee, skewed_lengths
from benchmarks.serving_peer import is_there as nano_vllm_is_there
from benchmarks.serving_peer import make_server, time_server
from tformer_lib import pretrained
from tformer_lib.generation import changing_shapes, generate, prefill
from tformer_lib.kv_cache import CacheShape, GrowingCache
from tformer_lib.ladder import FP8
from tformer_lib.serving import (
    Engine,
    PackedPass,
    Request,
    Speculation,
    Step,
    blocks_that_fit,
    calibrate,
    freeze_heap,
)
from tformer_lib.stories import stories
from tformer_lib.tokens import Encoding
from tformer_lib.transformer import Decoder, ModelConfig, count_parameters

LLAMA_1B = ModelConfig(
    vocab_size=128256,
    max_length=2048,
    width=2048,
    layers=16,
    heads=32,
    kv_heads=8,
    head_dim=64,
    feed_forward_width=8192,
    norm="rmsnorm",
    feed_forward="swiglu",
    positions="rope",
    rope_base=500_000.0,
    bias=False,
)
MEMORY = 4 * 2**30
FULL_LENGTH = 2048
BANDWIDTH = 4.3e12
"""Bytes a second that an H200 reads at best; what the bound of a step is taken of."""
REQUESTS, SHORTEST, LONGEST = 256, 100, 1024
ROWS_RESERVED = MEMORY // (FULL_LENGTH * 2 * 16 * 8 * 64 * 2)
SECONDS = {"engine": 120, "latency": 300, "soak": 1500, "precision": 300}
MOST_SECONDS = 80
"""How long each part may take, and how long those that are not listed."""

ROOMY, ROOMY_CASE = 64 * 2**30, "256 requests, 64 GiB"
"""Memory in which all requests fit at once."""

PEERS = ("nano-vllm", "static", "sequential", "engine", "64 tokens a step", "1024 tokens a step", "no prefix cache")
PEERS += ("no drafts", "bfloat16", "any order", "predicted by the bound", "predicted by its steps")
MANY_STEPS = "a run of many steps; the bound of a step stands beside the decode steps"


@dataclass(frozen=True)
class ServingOptions(Options):
    """Continuous batching beside a static batch."""

    parts: tuple[str, ...] = ()
    """Which parts to run; by default all that fit the device."""
    apart: bool = True
    """Whether each part runs in a process of its own; in one, they share what is compiled."""
    part: str | None = None
    """One part, in this process, its result written to the file --out: what the parts' own processes are asked."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command_line(run, arguments, options=ServingOptions, topic="serving", description=__doc__)


def run(args: ServingOptions) -> None:
    """Run each part in a process of its own; one that fails is recorded, and the others go on."""
    for part in (*args.parts, *([args.part] if args.part else [])):
        if part not in PARTS:
            raise ValueError(f"there is no part {part!r}; there are {', '.join(PARTS)}")
    if args.part:
        result = PARTS[args.part](args.device)
        args.out.write_text(json.dumps(result))
        return
    report = Report("serving", args.device, args.out, peers=PEERS)
    apart = {part for part in PARTS if args.apart or part.startswith("nano-vllm")}
    if args.device == "cuda":
        report.note(requests=REQUESTS, kv_memory_bytes=MEMORY, rows_reserved_at_full_length=ROWS_RESERVED)
    for part in args.parts or default_parts(args.device):
        result = run_apart(part, args.device) if part in apart else PARTS[part](args.device)
        add_rows(report, result.pop("rows", []))
        report.note(**result)
        compare(report)
        report.finish()


def default_parts(device: str) -> list[str]:
    """All that fit the device; nano-vllm only where it can be imported."""
    if device == "cpu":
        return ["stories", "latency"]
    return [
        part
        for part in PARTS
        if part not in ("stories", "precision", "soak") and (nano_vllm_is_there() or not part.startswith("nano-vllm"))
    ]


def run_apart(part: str, device: str) -> dict:
    """A part's result, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks.serving", "--device", device, "--part", part, "--out", str(out)]
        begin = time.perf_counter()
        try:
            subprocess.run(command, timeout=SECONDS.get(part, MOST_SECONDS), check=True)
            result = json.loads(out.read_text())
        except subprocess.SubprocessError as error:
            result = {f"failed_{part}": f"{type(error).__name__}: {error}"[:300]}
        return {**result, f"wall_seconds_{part}": round(time.perf_counter() - begin, 1)}


def add_rows(report: Report, rows: list[dict]) -> None:
    """Rows that came from another process."""
    for row in rows:
        report.add(row.pop("name"), Timing(*row.pop("timing")), **row)


def compare(report: Report) -> None:
    """How many times more tokens a second the engine writes."""
    rates = {(row.case, row.contestant): row for row in report.rows if "tokens_per_second" in row.extra}
    for (case, _), row in rates.items():
        ours = rates.get((case, "engine"))
        if ours and ours is not row:
            times = ours.extra["tokens_per_second"] / row.extra["tokens_per_second"]
            report.note(**{f"engine / {row.name}": round(times, 2)})


# the workload


def workload(skewed: bool = False, count: int = REQUESTS) -> list[tuple[list[int], int]]:
    """(prompt, number of tokens to write) of each request: every length as likely, or every order of magnitude."""
    random = Random(0)

    def length() -> int:
        if skewed:
            return round(math.exp(random.uniform(math.log(SHORTEST), math.log(LONGEST))))
        return random.randint(SHORTEST, LONGEST)

    pairs = [(length(), length()) for _ in range(count)]
    return [([random.randrange(LLAMA_1B.vocab_size) for _ in range(p)], new) for p, new in pairs]


def llama(device: str, **options) -> Decoder:
    """The 1B shape with random weights, made on the device; ``options`` are other fields of its config."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Decoder(replace(LLAMA_1B, **options))
    torch.set_default_dtype(torch.float32)
    return model.eval()


def weight_bytes(model: Decoder) -> int:
    """What a step reads of the weights: a tied table once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def make_engine(model: Decoder, *, max_num_seqs: int, memory: int = MEMORY, **options) -> Engine:
    """An engine with so many bytes of keys and values, warmed up."""
    begin = time.perf_counter()
    settings = {"budget": 4096, "prefix_cache": False, "compile": True, "spare_blocks": 1.0, **options}
    blocks = blocks_that_fit(model, memory, kv_dtype=settings.get("kv_dtype", "auto"))
    engine = Engine(model, blocks=blocks, max_num_seqs=max_num_seqs, **settings)
    for length in (700, 300, 700, 2000):  # compiles for any number of tokens, and lets libraries choose their kernels
        engine.add(list(range(length)), {"max_new_tokens": 4})
        engine.add(list(range(length // 2)), {"max_new_tokens": 4})
        engine.run()
    engine.log.clear()
    freeze_heap()
    print(f"engine ready after {time.perf_counter() - begin:.1f} s", flush=True)
    return engine


# the parts


def engine_part(device: str) -> dict:
    """All requests at once, and then in static batches, by the same engine."""
    model = llama(device)
    engine = make_engine(model, max_num_seqs=REQUESTS)
    parts = [continuous(engine), longest_first(engine), static(engine)]
    rows = [row for part in parts for row in part.pop("rows")]
    facts = {"parameters": count_parameters(model), "weight_bytes": weight_bytes(model)}
    return {"rows": rows, **facts, **parts[0], **parts[1], **parts[2]}


def continuous(engine: Engine) -> dict:
    """All requests at once, twice; the log is that of the second time."""
    seconds = []
    for _ in range(2):
        engine.log.clear()
        seconds.append(time_engine(engine, [workload()]))
    log = list(engine.log)
    trace = [
        [round(s.finished - log[0].started, 4), s.samples, s.tokens, s.live_tokens, s.waiting, s.held_blocks]
        for s in log
    ]
    return {
        "rows": [total_row("engine", seconds, workload()), *decode_rows("engine", log, engine.model)],
        "engine_peak_waste": max(step.waste for step in log),
        "engine_steps": len(log),
        "engine_decode_steps": sum(step.is_decode for step in log),
        "engine_preemptions": sum(step.preemptions for step in log),
        "engine_most_rows": max(len(step.rows) for step in log),
        "engine_seconds_in_decode_steps": sum(s for _, s in decode_times(log)),
        "engine_tokens_per_second_while_some_wait": rate_under_load(log),
        "engine_median_host_seconds_per_decode_step": median(s.launched - s.started for s in log if s.is_decode),
        "engine_own_products": {size: list(own) for size, own in engine.runner.own_products.items()},
        "engine_log": trace[::4],
        "engine_log_columns": ["seconds", "tokens written", "tokens computed", "live tokens", "waiting", "held blocks"],
    }


def longest_first(engine: Engine) -> dict:
    """All requests at once, twice, those with the longest answers let in first."""
    seconds = time_longest_first(engine, workload())
    steps, preemptions = len(engine.log), sum(step.preemptions for step in engine.log)
    facts = {"longest_first_steps": steps, "longest_first_preemptions": preemptions}
    return {"rows": [total_row("longest first", seconds, workload())], **facts}


def time_longest_first(engine: Engine, requests: list[tuple[list[int], int]]) -> list[float]:
    """Seconds for all requests, twice, those with the longest answers first; the log is that of the second time."""
    seconds, policy = [], engine.scheduler.policy
    engine.scheduler.policy = "longest first"
    for _ in range(2):
        engine.log.clear()
        seconds.append(time_engine(engine, [requests]))
    engine.scheduler.policy = policy
    return seconds


def roomy_part(device: str) -> dict:
    """All requests at once where all of them fit: 64 GiB of keys and values."""
    model, requests, seconds = llama(device), workload(), []
    engine = make_engine(model, max_num_seqs=REQUESTS, memory=ROOMY)
    longest = time_longest_first(engine, requests)
    for _ in range(2):
        engine.log.clear()
        seconds.append(time_engine(engine, [requests]))
    written = sum(new for _, new in requests)
    why = {"alone": "all requests fit, and so they would into a static batch"}
    rows = [
        run_row(ROOMY_CASE, who, times, written) for who, times in (("engine", seconds), ("longest first", longest))
    ]
    rows += [{**row, **why} for row in decode_rows("engine, 64 GiB", list(engine.log), model)]
    return {"rows": rows, "roomy_steps": len(engine.log)}


def skewed_part(device: str) -> dict:
    """The first part's two variants on lengths of which most are short, as in real traffic."""
    model, requests = llama(device), workload(skewed=True)
    engine = make_engine(model, max_num_seqs=REQUESTS)
    batches = [requests[i : i + ROWS_RESERVED] for i in range(0, REQUESTS, ROWS_RESERVED)]
    longest = [[(prompt, max(new for _, new in batch)) for prompt, _ in batch] for batch in batches]
    rows, steps = [], {}
    for name, given, repeats in (("engine", [requests], 2), ("static", longest, 1)):
        seconds = []
        for _ in range(repeats):
            engine.log.clear()
            seconds.append(time_engine(engine, given))
        rows.append(total_row(f"{name}, skewed lengths", seconds, requests))
        steps[f"{name}_steps_skewed"] = len(engine.log)
    mean_prompt, mean_output = (
        sum(numbers) / REQUESTS for numbers in zip(*((len(p), n) for p, n in requests), strict=True)
    )
    return {"rows": rows, **steps, "mean_prompt_skewed": mean_prompt, "mean_output_skewed": mean_output}


def rate_under_load(log: list[Step]) -> float:
    """Tokens written a second from the first step to the last in which a request waited."""
    busy = [step for step in log if step.waiting] or log
    return sum(step.samples for step in busy) / (busy[-1].finished - busy[0].started)


def static(engine: Engine) -> dict:
    """A batch at a time, each row going on until the longest has ended."""
    requests = workload()
    batches = [requests[i : i + ROWS_RESERVED] for i in range(0, REQUESTS, ROWS_RESERVED)]
    longest = [[(prompt, max(new for _, new in batch)) for prompt, _ in batch] for batch in batches]
    engine.log.clear()
    seconds = [time_engine(engine, longest)]
    log = list(engine.log)
    first = min(arrival for arrival, _, _ in log[0].rows)
    trace = [
        [round(s.finished - log[0].started, 4), useful_rows(s, requests, first), s.samples, s.live_tokens] for s in log
    ]
    return {
        "rows": [total_row("static", seconds, requests), *decode_rows("static", log, engine.model)],
        "static_steps": len(log),
        "static_mean_waste": 1 - sum(share_of_reserved(batch) for batch in batches) / len(batches),
        "static_log": trace[::8],
        "static_log_columns": ["seconds", "rows that somebody waits for", "rows", "live tokens"],
    }


def useful_rows(step: Step, requests: list[tuple[list[int], int]], first: int) -> int:
    """How many rows of a step write a token that was asked for; ``first`` is the arrival of the first request."""
    written = [(requests[arrival - first], start + count) for arrival, start, count in step.rows]
    return sum(len(prompt) <= end < len(prompt) + new for (prompt, new), end in written)


def share_of_reserved(batch: list[tuple[list[int], int]]) -> float:
    """The share of a batch's reserved slots, over its whole time, that hold a token somebody waits for."""
    token_steps = sum(len(prompt) * new + new * new / 2 for prompt, new in batch)
    return token_steps / (len(batch) * FULL_LENGTH * max(new for _, new in batch))


def time_engine(engine: Engine, batches: list[list[tuple[list[int], int]]]) -> float:
    """Seconds for all batches, one after the other."""
    begin = time.perf_counter()
    for batch in batches:
        for prompt, new in batch:
            engine.add(prompt, {"max_new_tokens": new})
        engine.run()
    return time.perf_counter() - begin


def total_row(name: str, seconds: list[float], requests: list[tuple[list[int], int]]) -> dict:
    """These requests as a row; tokens that nobody asked for do not count."""
    written = sum(new for _, new in requests)
    timing = (median(seconds), min(seconds), max(seconds), len(seconds))
    who, _, lengths = name.partition(", ")
    names = {"name": name, "case": f"requests, {lengths or 'all lengths'}", "contestant": who, "unbounded": MANY_STEPS}
    return {**names, "timing": timing, "tokens": written, "tokens_per_second": round(written / median(seconds))}


def decode_times(log: list[Step]) -> list[tuple[Step, float]]:
    """The steps in which all rows wrote and whose forerunner did too, with the seconds between their ends."""
    steps = [pair for pair in pairwise(log) if all(step.is_decode for step in pair)]
    return [(now, now.finished - before.finished) for before, now in steps]


def decode_rows(name: str, log: list[Step], model: Decoder) -> list[dict]:
    """Decode steps against the bytes that they must read: all of them, and those with many rows."""
    rows, weights, per_token = [], weight_bytes(model), CacheShape.of(model, 1).bytes_per_token
    for what, least in (("all", 1), ("of 128 rows or more", 128), ("of 33 to 64 rows", 33)):
        chosen = [(s, t) for s, t in decode_times(log) if s.samples >= least and (least != 33 or s.samples <= 64)]
        if len(chosen) < 10:
            continue
        times = [t for _, t in chosen]
        moved = [weights + step.live_tokens * per_token for step, _ in chosen]
        p10, *_, p90 = quantiles(times, n=10)
        bound = sum(moved) / BANDWIDTH
        extra = {"steps": len(chosen), "share_of_total_bound": round(bound / sum(times), 4)}
        extra["mean_rows"] = round(sum(s.samples for s, _ in chosen) / len(chosen), 1)
        timing = (median(times), p10, p90, len(times))
        row = {"name": f"{name}, decode steps, {what}", "case": f"decode steps, {what}", "contestant": name}
        row["alone"] = "the static batch never has as many rows" if what.startswith("of 128") else None
        rows.append({**row, "timing": timing, "bytes": median(moved), "limit": BANDWIDTH, **extra})
    return rows


def contiguous_part(device: str) -> dict:
    """One batch by ``generation.generate``: its recorded step looks at all reserved slots behind a mask."""
    model, batch = llama(device), workload()[:ROWS_RESERVED]
    prompts, longest = [prompt for prompt, _ in batch], max(new for _, new in batch)
    begin = time.perf_counter()
    generate(model, prompts, max_new_tokens=longest, chunk=64, cuda_graph=True)
    synchronize(torch.device(device))
    return {"rows": [total_row("contiguous", [time.perf_counter() - begin], batch)]}


def transformers_part(device: str) -> dict:
    """One batch by transformers, padded on the left as its documentation asks."""
    import transformers

    model, batch = transformers_llama(device), workload()[:ROWS_RESERVED]
    width, longest = max(len(prompt) for prompt, _ in batch), max(new for _, new in batch)
    tokens = torch.tensor([[0] * (width - len(p)) + p for p, _ in batch], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p, _ in batch], device=device)

    def run(new: int) -> None:
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        with changing_shapes(), torch.no_grad():
            model.generate(tokens, attention_mask=mask, **options)
        synchronize(torch.device(device))

    run(4)
    begin = time.perf_counter()
    run(longest)
    seconds = [time.perf_counter() - begin]
    facts = {"transformers_version": transformers.__version__, "transformers_steps": longest}
    return {"rows": [total_row("transformers", seconds, batch)], **facts}


def transformers_llama(device: str) -> torch.nn.Module:
    """transformers' Llama of the same shape, with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=LLAMA_1B.vocab_size,
        hidden_size=LLAMA_1B.width,
        intermediate_size=LLAMA_1B.feed_forward_width,
        num_hidden_layers=LLAMA_1B.layers,
        num_attention_heads=LLAMA_1B.heads,
        num_key_value_heads=LLAMA_1B.kv_heads,
        head_dim=LLAMA_1B.head_dim,
        max_position_embeddings=LLAMA_1B.max_length,
        rope_theta=LLAMA_1B.rope_base,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        bos_token_id=0,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.eval()


def naive_step(model: Decoder, prompts: list[list[int]]) -> Callable[[], None]:
    """A decode step on a cache that grows by concatenation, its kernels launched one by one."""
    cache = GrowingCache(CacheShape.of(model, len(prompts)))
    state = {"tokens": prefill(model, prompts, cache, chunk=64).argmax(-1, keepdim=True)}

    @torch.no_grad()
    def step() -> None:
        with changing_shapes():
            logits = model(state["tokens"], cache=cache)[:, -1]
        state["tokens"] = logits.argmax(-1, keepdim=True)
        state["tokens"].tolist()  # a server must look at what was written

    for _ in range(10):
        step()
    return step


def stories_part(device: str) -> dict:
    """16 requests on the pretrained model: one after the other, and together."""
    model, encoding = pretrained.load(device=device)
    random = Random(0)
    openings = ["Once upon a time", "One day", "A little girl named", "The dog"]
    prompts = [encoding.encode_ordinary(openings[i % 4]) + [random.randrange(256) for _ in range(i)] for i in range(16)]
    rules = {"max_new_tokens": 60}
    seconds: dict[str, list[float]] = {"sequential": [], "engine": []}
    for _ in range(3):
        begin = time.perf_counter()
        alone = [generate(model, [prompt], **rules)[0] for prompt in prompts]
        seconds["sequential"].append(time.perf_counter() - begin)
        engine = Engine(model, max_num_seqs=16, budget=256)
        begin = time.perf_counter()
        made = [engine.add(prompt, rules) for prompt in prompts]
        engine.run()
        seconds["engine"].append(time.perf_counter() - begin)
    rows = [total_row(name, times, [(prompt, 60) for prompt in prompts]) for name, times in seconds.items()]
    return {"rows": rows, "stories_same_texts": alone == [request.new_tokens for request in made]}


# latency under load


def latency_part(device: str) -> dict:
    """Every policy under every load; see ``serving_latency``."""
    return compare_policies(*(stories_load(device) if device == "cpu" else llama_load(device)))


def stories_load(device: str) -> tuple[Load, Load, Load, tuple[int, ...]]:
    """The pretrained model: requests, some with a shared beginning, some talks, and the budgets that are compared."""
    model, encoding = pretrained.load(device=device)
    random, count = Random(0), 28

    def engine(**options) -> Engine:
        made = Engine(model, max_num_seqs=16, **{"prefix_cache": False, **options})
        made.add([1] * 20, {"max_new_tokens": 3})
        made.run()
        return made

    def tokens(length: int) -> list[int]:
        return [random.randrange(encoding.n_vocab) for _ in range(length)]

    prompts = [tokens(length) for length in skewed_lengths(random, count, 8, 180)]
    beginning = tokens(160)
    shared = Load([beginning + tokens(8) for _ in range(count)], [8] * count, engine)
    chats = Load([tokens(80) for _ in range(8)], [16] * 8, engine, [[tokens(12) for _ in range(3)] for _ in range(8)])
    return Load(prompts, skewed_lengths(random, count, 6, 36), engine), shared, chats, (16, 64, 1024)


def llama_load(device: str) -> tuple[Load, Load, Load, tuple[int, ...]]:
    """The 1B shape with a quarter of the slots that the requests need, so that a queue forms: 64 of the skewed
    requests, with answers of a third of the length, some with a shared beginning, some talks, and the budgets."""
    model, pairs, random = llama(device), workload(skewed=True)[:64], Random(1)
    engine = partial(make_engine, model, max_num_seqs=16)

    def tokens(length: int) -> list[int]:
        return [random.randrange(LLAMA_1B.vocab_size) for _ in range(length)]

    beginning = tokens(1024)
    shared = Load([beginning + tokens(32) for _ in pairs], [64] * len(pairs), engine)
    questions = [[tokens(48) for _ in range(3)] for _ in range(12)]
    chats = Load([tokens(700) for _ in questions], [128] * len(questions), engine, questions)
    return Load([p for p, _ in pairs], [new // 3 for _, new in pairs], engine), shared, chats, (256, 1024, 8192)


PREFILL_RATE = 600e12
"""Operations a second of a step that reads prompts: what the cost model counts with."""


def knee_part(device: str) -> dict:
    """300 requests, one by one at rates from light load to past saturation, driven and predicted."""
    model, requests = llama(device), workload(count=300)
    load = Load([prompt for prompt, _ in requests], [new for _, new in requests], partial(make_engine, model))
    weights, per_token = weight_bytes(model), CacheShape.of(model, 1).bytes_per_token

    def step_seconds(tokens: int, held: int) -> float:
        return max(weights * tokens / PREFILL_RATE, (weights + held * per_token) / BANDWIDTH)

    return find_knee(load.engine(max_num_seqs=256, budget=512), load, (30, 60, 80, 100, 140), step_seconds)


# nano-vllm


def nano_vllm_part(device: str, *, memory: int = MEMORY) -> dict:
    """The same requests by nano-vllm, which has to be on PYTHONPATH; see ``serving_peer``."""
    requests = workload()
    seconds = time_server(make_server(LLAMA_1B, memory, REQUESTS), requests, LLAMA_1B.vocab_size)
    if memory == MEMORY:
        return {"rows": [total_row("nano-vllm", seconds, requests)]}
    return {"rows": [run_row(ROOMY_CASE, "nano-vllm", seconds, sum(new for _, new in requests))]}


# a step taken apart


KINDS = {
    "attention": ("decode_kernel", "prefill_kernel"),
    "matrix products": ("nvjet", "gemm", "splitk", "cutlass", "product_kernel"),
    "RoPE and writing keys and values": ("turn_kernel", "rope", "sin_kernel", "cos_kernel", "write_kernel"),
    "sums and norms": ("norm",),
    "gate": ("gate_kernel", "triton"),
    "choosing tokens": ("argmax", "maxops", "maxnan", "reduce_kernel"),
}
"""Kernels by a part of their names, lower case; the first kind that fits counts."""


def kind_of(name: str) -> str:
    """What a kernel does."""
    return next((kind for kind, parts in KINDS.items() if any(part in name.lower() for part in parts)), "the rest")


def timeline_part(device: str) -> dict:
    """A decode step of many rows, kernel by kernel, beside the bytes that each kind must move."""
    model, rows, steps = llama(device), 160, 10
    engine = make_engine(model, max_num_seqs=rows, memory=8 * 2**30)
    for i in range(rows):
        engine.add([(7 * i + j) % LLAMA_1B.vocab_size for j in range(900)], {"max_new_tokens": 200})
    while engine.scheduler.waiting or any(request.wanted != 1 for request in engine.scheduler.running):
        engine.step()
    engine.log.clear()
    for _ in range(30):
        engine.step()
    log, times = list(engine.log), decode_times(list(engine.log))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            engine.step()
        synchronize(torch.device(device))
    spent: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spent[kind_of(event.name)] += event.device_time / 1e6 / steps
            kernels[kind_of(event.name)] += 1
    live = median(step.live_tokens for step in log)
    moved = {"attention": live * CacheShape.of(model, 1).bytes_per_token, "matrix products": weight_bytes(model)}
    moved["choosing tokens"] = rows * LLAMA_1B.vocab_size * 2
    step = median(seconds for _, seconds in times)
    bound = {"bytes": moved["attention"] + moved["matrix products"], "limit": BANDWIDTH}
    made = [timeline_row("the whole step, unprofiled", step, len(times), **bound)]
    for kind, seconds in spent.most_common():
        bytes = moved.get(kind)
        limits = (
            {"unbounded": "its numbers stay in the L2 cache"} if bytes is None else {"bytes": bytes, "limit": BANDWIDTH}
        )
        made.append(timeline_row(kind, seconds, steps, kernels=round(kernels[kind] / steps, 1), **limits))
    return {"rows": made, "timeline_rows": rows, "timeline_live_tokens": live}


def timeline_row(what: str, seconds: float, calls: int, **extra) -> dict:
    """A kind of kernel as a row."""
    names = {"name": f"decode step of 160 rows: {what}", "case": "decode step of 160 rows", "contestant": what}
    return {**names, "timing": (seconds, seconds, seconds, calls), "alone": "a part of one step", **extra}


STEPS = {
    "one row": (1, 0),
    "30 rows": (30, 0),
    "30 rows and 482 tokens of a prompt": (30, 482),
    "30 rows and 482 tokens of a prompt, kernels asked for one by one": (30, 482),
}
"""Kinds of step of a lightly loaded server: rows that write, tokens of a prompt beside them."""


def steps_part(device: str) -> dict:
    """Kinds of step on the clock, beside what the host takes to ask for them and what their kernels take."""
    model, made, each = llama(device), [], 10
    engine = make_engine(model, max_num_seqs=40, budget=512)
    for case, (rows, piece) in STEPS.items():
        if case.endswith("one by one"):
            engine.runner.prompts.clear()

        def step(piece: int = piece) -> None:
            if piece:
                engine.add([(len(engine.log) + i) % LLAMA_1B.vocab_size for i in range(piece)], {"max_new_tokens": 1})
            engine.step()

        for i in range(rows):
            engine.add([(7 * i + j) % LLAMA_1B.vocab_size for j in range(900)], {"max_new_tokens": 200})
        while engine.scheduler.waiting or any(request.wanted != 1 for request in engine.scheduler.running):
            engine.step()
        for _ in range(10):
            step()
        engine.log.clear()
        for _ in range(40):
            step()
        log = list(engine.log)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(each):
                step()
            synchronize(torch.device(device))
        events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        kernels = sum(event.device_time for event in events) / 1e6 / each
        asking = [step.launched - step.started for step in log]
        clock = [now.finished - before.finished for before, now in pairwise(log)]
        tokens = median(step.tokens for step in log)
        names = {"case": f"a step of {case}", "alone": "a part of one step"}
        facts = names | {"tokens": tokens, "live_tokens": median(step.live_tokens for step in log)}
        made += [
            facts | {"contestant": "the step", "timing": spread(clock), "unbounded": MANY_STEPS},
            facts | {"contestant": "the host, until it has asked for it", "timing": spread(asking), "unbounded": HOST},
            facts
            | {"contestant": "its kernels", "timing": (kernels,) * 3 + (each,), "kernels": len(events) / each}
            | {"unbounded": "it is the sum of all kinds of kernel"},
        ]
        engine.run()
    return {"rows": [row | {"name": f"{row['case']}: {row['contestant']}"} for row in made]}


HOST = "what a host does has no limit of the device's"


def spread(seconds: Sequence[float]) -> tuple[float, float, float, int]:
    """The median, the tenth and ninetieth percentile, and how many."""
    p10, *_, p90 = quantiles(seconds, n=10)
    return median(seconds), p10, p90, len(seconds)


# speculation, float8 pools, texts without neighbours


def run_row(case: str, who: str, seconds: Sequence[float], tokens: int, **extra) -> dict:
    """A contestant's runs as a row."""
    timing = (median(seconds), min(seconds), max(seconds), len(seconds))
    names = {"name": f"{case}: {who}", "case": case, "contestant": who, "unbounded": MANY_STEPS}
    return {**names, "timing": timing, "tokens": tokens, "tokens_per_second": round(tokens / median(seconds)), **extra}


def first_layers(model: Decoder, layers: int) -> Decoder:
    """A draft model for nothing: the first blocks, with the embeddings and the last norm of the whole."""
    with torch.device("meta"):
        draft = Decoder(replace(model.config, layers=layers))
    draft.embedding, draft.unembedding = model.embedding, model.unembedding
    draft.stack.blocks, draft.stack.final_norm = model.stack.blocks[:layers], model.stack.final_norm
    return draft.eval()


CYCLE = 96
"""Tokens after which a repeating text begins anew."""

TEXTS = {
    "repeating text": (0, {}),
    "three likely tokens": (CYCLE, {"temperature": 1.0, "top_k": 3}),
    "text without repetition": (2 * CYCLE, {"temperature": 100.0}),
}
"""Each kind of text: the token with which its prompt ends, and how it is written; see :func:`successors`."""


@torch.no_grad()
def successors(model: Decoder) -> Decoder:
    """Weights under which a token decides what follows it, for what random weights write never repeats itself.

    The blocks hardly add to what they get, so the last token's embedding is what the output looks at, and the row of a
    token is the sum of the embeddings that it follows. After each of the first ``CYCLE`` tokens comes the next, and
    after the last the first. After each of the next ``CYCLE`` come three of them, equally likely: most pairs of tokens
    have then stood in the text before, and what followed them rarely follows again. Every matrix keeps its random
    digits, because a GPU multiplies zeros faster.
    """
    for block in model.stack.blocks:
        block.attention.out_proj.weight.mul_(1e-3)
        block.feed_forward.down.weight.mul_(1e-3)
    table = model.embedding.tokens.weight
    first, second = table[:CYCLE].clone(), table[CYCLE : 2 * CYCLE].clone()
    model.unembedding.weight[:CYCLE] = first.roll(1, 0)
    model.unembedding.weight[CYCLE : 2 * CYCLE] = sum(second.roll(shift, 0) for shift in (1, 5, 23))
    return model


def speculation_part(device: str) -> dict:
    """One request at a time: with and without drafts, on texts for which they are good, misleading and none."""
    model = successors(llama(device, tie_embeddings=False))
    options = {"max_num_seqs": 1, "budget": 512}
    contestants = {"no drafts": make_engine(model, **options)}
    contestants["n-grams"] = make_engine(model, speculation=Speculation(tokens=6), **options)
    draft = Speculation(tokens=4, model=first_layers(model, 2))
    contestants["first 2 of 16 layers"] = make_engine(model, speculation=draft, **options)
    stranger = Speculation(tokens=4, model=llama(device, layers=2))  # whose drafts are never right
    contestants["a stranger of 2 layers"] = make_engine(model, speculation=stranger, **options)
    random, rows, facts = Random(3), [], {}
    beginning, new = [random.randrange(2 * CYCLE, LLAMA_1B.vocab_size) for _ in range(255)], 256
    for case, (last_token, rules) in TEXTS.items():
        seconds, last = {who: [] for who in contestants}, {}
        for seed in range(4):
            for who, engine in contestants.items():
                begin = time.perf_counter()
                wish = {"max_new_tokens": new, "seed": seed, **rules}
                last[who] = engine.add([*beginning, last_token], wish)
                engine.run()
                seconds[who].append(time.perf_counter() - begin)
        for who, times in seconds.items():
            request = last[who]
            shares = {"drafted": request.drafted, "accepted": request.accepted}
            rows.append(run_row(f"batch 1, {case}", who, times, new, **shares))
            facts[f"speed-up, {case}, {who}"] = round(median(seconds["no drafts"]) / median(times), 3)
            facts[f"same text, {case}, {who}"] = request.new_tokens == last["no drafts"].new_tokens
    return {"rows": rows, **facts}


@torch.no_grad()
def precision_part(device: str) -> dict:
    """What float8 keys and values cost: the loss on unseen stories, and how many greedy tokens stay the same."""
    model, encoding = pretrained.load(device=device)
    text = encoding.encode_ordinary("\n".join(stories(400, seed=99)))
    texts = [text[start : start + 240] for start in range(0, 240 * 100, 240)]
    scales, facts = calibrate(model, texts[:8]), {}
    kinds = {"float32": (torch.float32, None), "float8": (FP8, scales), "float8 unscaled": (FP8, (1.0, 1.0))}
    for name, (dtype, by) in kinds.items():
        losses = [loss_through_pools(model, some, dtype, by) for some in texts[8:]]
        facts[f"loss, {name}"] = round(sum(losses) / len(losses), 5)
        facts[f"perplexity, {name}"] = round(math.exp(sum(losses) / len(losses)), 4)
    written = []
    for options in ({}, {"kv_dtype": "float8", "kv_scales": scales}):
        engine = Engine(model, max_num_seqs=32, **options)
        made = [engine.add(some[:20], {"max_new_tokens": 100}) for some in texts[8:]]
        engine.run()
        written.append([request.new_tokens for request in made])
    pairs = [pair for left, right in zip(*written, strict=True) for pair in zip(left, right, strict=True)]
    facts["greedy tokens"], facts["greedy tokens that are the same"] = len(pairs), sum(a == b for a, b in pairs)
    facts["texts"], facts["texts that are the same"] = len(written[0]), sum(map(operator.eq, *written))
    return {"rows": [], "tokens": sum(len(some) - 1 for some in texts[8:]), "scales": list(scales), **facts}


def loss_through_pools(
    model: Decoder, text: list[int], dtype: torch.dtype, scales: tuple[float, float] | None
) -> float:
    """Mean cross-entropy of a text's tokens, all keys and values of which went through pools of this dtype."""
    tokens = torch.tensor([text], device=next(model.parameters()).device)
    places, config = torch.arange(len(text), device=tokens.device), model.config
    size = (1, config.number_of_kv_heads, len(text), config.size_of_head)  # one block holds all of it
    pools = [[torch.zeros(size, dtype=dtype, device=tokens.device) for _ in "kv"] for _ in range(config.layers)]
    table, length = places.new_zeros(1, 1).int(), places.new_tensor([len(text)]).int()
    starts = places.new_tensor([0, len(text)]).int()
    cache = PackedPass(pools, places, places, table, length, starts, len(text), scales=scales)
    return F.cross_entropy(model(tokens, cache=cache)[0, :-1].double(), tokens[0, 1:]).item()


def float8_part(device: str) -> dict:
    """The same requests in the same bytes of keys and values: bfloat16 and float8 in turns."""
    model, requests = llama(device), workload()
    scales = calibrate(model, [prompt for prompt, _ in requests[:4]])
    precisions = {"bfloat16": {}, "float8": {"kv_dtype": "float8", "kv_scales": scales}}
    engines = {who: make_engine(model, max_num_seqs=REQUESTS, **options) for who, options in precisions.items()}
    return in_turns("256 requests, 4 GiB", engines, requests, "float8", turns=2)


def deterministic_part(device: str) -> dict:
    """What it costs that a text does not depend on its neighbours."""
    model, requests = llama(device), workload()[:128]
    engines = {"any order": make_engine(model, max_num_seqs=128)}
    engines["deterministic"] = make_engine(model, max_num_seqs=128, budget=128, deterministic=True)
    return in_turns("128 requests, 4 GiB", engines, requests, "deterministic", turns=2)


def int8_part(device: str) -> dict:
    """One request at a time: weights in bfloat16 and in int8."""
    prompt, new = list(range(256)), 256
    engines = {"bfloat16": make_engine(llama(device), max_num_seqs=1)}
    engines["int8 weights"] = make_engine(pretrained.quantise(llama(device)), max_num_seqs=1)

    def run(engine: Engine) -> float:
        begin = time.perf_counter()
        engine.add(prompt, {"max_new_tokens": new})
        engine.run()
        return time.perf_counter() - begin

    seconds = take_turns({who: partial(run, engine) for who, engine in engines.items()}, 3)
    rows = [run_row("batch 1, weights", who, times, new) for who, times in seconds.items()]
    gain = median(seconds["bfloat16"]) / median(seconds["int8 weights"])
    return {"rows": rows, "int8 weights / bfloat16, batch 1": round(gain, 3)}


def in_turns(case: str, engines: dict[str, Engine], requests: list, who: str, *, turns: int) -> dict:
    """The requests through each engine in turn, and how much faster ``who`` is than the first."""

    def run(engine: Engine) -> float:
        engine.log.clear()
        return time_engine(engine, [requests])

    seconds = take_turns({name: partial(run, engine) for name, engine in engines.items()}, turns)
    most = {name: max(len(step.rows) for step in engine.log) for name, engine in engines.items()}
    written = sum(new for _, new in requests)
    rows = [run_row(case, name, times, written, most_rows=most[name]) for name, times in seconds.items()]
    first = next(iter(engines))
    return {"rows": rows, f"{who} / {first}": round(median(seconds[first]) / median(seconds[who]), 3)}


# a soak


SOAK_SECONDS, SOAK_REQUESTS = 1200, 1000


def soak_part(device: str) -> dict:
    """Twenty minutes of everything at once in pools that are too small: what is left over, and what memory grew by.

    Requests share beginnings, are greedy or sampled, ask for log-probabilities, stop early, and every fifth is
    cancelled at some moment; one engine is plain, two draft, one has float8 pools and lets in the longest first. The
    texts of the first three are compared with what the same request gets alone.
    """
    model, encoding = pretrained.load(device=device)
    options = ({}, {"speculation": Speculation()}, {"speculation": Speculation(model=model)})
    options += ({"kv_dtype": "float8", "policy": "longest first"},)
    engines = [Engine(model, encoding, blocks=14, block_size=8, max_num_seqs=6, budget=24, **more) for more in options]
    random, begin, ends, memory, texts = Random(0), time.perf_counter(), Counter(), [], []
    for number in range(SOAK_REQUESTS):
        engine, (prompt, wish) = engines[number % len(engines)], soak_request(random, encoding, number)
        ours = [engine.add(prompt, wish, listener=lambda piece: ends.update([piece.finish_reason]))]
        for _ in range(random.randrange(12)):
            engine.step()
        if random.random() < 0.2:
            engine.cancel(random.choice([*ours, *engine.scheduler.running, *engine.scheduler.waiting]))
        if number % 10 < 3:
            engine.run()
            texts.append(same_alone(engine, ours[0], wish))
        if number % 100 == 99:
            for busy in engines:
                busy.run()
            memory.append(resident_bytes())
        time.sleep(max(0.0, SOAK_SECONDS * (number + 1) / SOAK_REQUESTS - (time.perf_counter() - begin)))
    return {
        "soak_requests": SOAK_REQUESTS,
        "soak_seconds": round(time.perf_counter() - begin),
        "soak_ends": {str(reason): count for reason, count in ends.items() if reason is not None},
        "soak_pieces": sum(ends.values()),
        "soak_steps": sum(len(engine.log) for engine in engines),
        "soak_preemptions": sum(engine.scheduler.preemptions for engine in engines),
        "soak_evictions": sum(engine.allocator.evictions for engine in engines),
        "soak_drafted": sum(step.drafted for engine in engines for step in engine.log),
        "soak_texts_compared": sum(same is not None for same in texts),
        "soak_texts_that_differ": sum(same is False for same in texts),
        "soak_blocks_held": [engine.allocator.held for engine in engines],
        "soak_draft_blocks_held": engines[2].drafter.allocator.held,
        "soak_resident_megabytes": [round(size / 1e6, 1) for size in memory],
    }


def soak_request(random: Random, encoding: Encoding, number: int) -> tuple[list[int], dict]:
    """A prompt, which begins as many others do, and what is asked for."""
    opening = random.choice(("Once upon a time there was a little", "One day a dog", "The"))
    noise = [random.randrange(encoding.n_vocab) for _ in range(random.randrange(40))]
    wish = {"max_new_tokens": random.randint(1, 60), "seed": number, "temperature": random.choice([0.0, 0.8])}
    more = ({}, {"logprobs": 2}, {"stop": ["."]}, {"stop_tokens": [random.randrange(encoding.n_vocab)]})
    return encoding.encode_ordinary(opening) + noise, wish | random.choice(more)


def same_alone(engine: Engine, request: Request, wish: dict) -> bool | None:
    """Whether a text is the one that its request gets alone; None where it was cancelled, or its cache is rounded."""
    if request.finish_reason == "cancelled" or engine.runner.scales is not None:
        return None
    alone = Engine(engine.model, engine.encoding, max_num_seqs=1)
    again = alone.add(request.prompt, wish)
    alone.run()
    return again.new_tokens == request.new_tokens


def resident_bytes() -> int:
    """What the process holds in memory now, by Linux's count."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


PARTS: dict[str, Callable[[str], dict]] = {
    "engine": engine_part,
    "nano-vllm": nano_vllm_part,
    "roomy": roomy_part,
    "nano-vllm, 64 GiB": partial(nano_vllm_part, memory=ROOMY),
    "skewed": skewed_part,
    "transformers": transformers_part,
    "contiguous": contiguous_part,
    "latency": latency_part,
    "knee": knee_part,
    "timeline": timeline_part,
    "steps": steps_part,
    "speculation": speculation_part,
    "float8": float8_part,
    "deterministic": deterministic_part,
    "int8": int8_part,
    "stories": stories_part,
    "precision": precision_part,
    "soak": soak_part,
}

if __name__ == "__main__":
    os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "1")  # the parts compile the same blocks
    sys.exit(main())
