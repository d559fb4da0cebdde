"""What linear attention saves over softmax attention as the text grows, in time and in memory.

    python -m benchmarks.linear_attention --device cpu
    python -m benchmarks.linear_attention --device cuda --study stories --steps 700    # what a hybrid of both learns
    python -m benchmarks.linear_attention --device cuda --study recall --steps 6000

The theory: softmax attention takes 4·N²·d operations (half of that if the future is skipped), and N² numbers if it is
written out; chunked linear attention takes 4·N·C·d + 4·N·d² operations for chunks of C, and O(N·d) numbers. On
logarithmic axes the slopes are 2 and 1. Decoding from a state takes 4·d² operations a token, whatever came before.

On a GPU the products of a chunk are fast, and memory is the limit: a forward reads q, k and v and writes the output
once, so the limit beside each row is a device copy's rate. Softmax attention is held to the same bytes, to show by how
much its N² operations take it away from them. flash-linear-attention stands beside, where it is installed.

With ``--study``, three models of four layers are trained: softmax attention in all layers, three layers of the gated
delta rule to one of softmax attention, the gated delta rule in all layers. They learn the stories, or to recall values
by their keys. The results are ``linear_attention-stories.json`` and ``linear_attention-recall.json``.

Predicted before the first run of the stories (700 steps): the three losses lie within 0.02 nats of one another and the
hybrid's is the lowest, because its short convolutions see neighbours and its full layer sees all. Came (one seed):
0.322 softmax, 0.337 hybrid, 0.321 linear, so the hybrid is the highest; in steps 36 to 70 2.12, 1.24 and 1.22.

Recall, first recipe (1,500 steps of 64 rows of 16 pairs, a rate of 0.003 and a weight decay of 0.1): predicted 95 % of
16 pairs for all three, came 15 % for softmax and 20 % for the hybrid, for none of them finds out that a value belongs
to the key before it. With rows of 4, 8 and 16 pairs in turns, 128 rows a step, a rate of 0.001 and no decay, the
hybrid recalls 99.98 % of 16 pairs and 58 % of 32 after 1,500 steps, softmax 27 % and 8 % after 4,000.
Predicted for 6,000 steps of it: of 16 pairs hybrid and linear recall all, of 32 (twice as many as were trained) the
hybrid 0.6, linear 0.4, for its states of 32 x 32 hold no more than 32 values. The stacks with linear layers learn the
task early: a convolution joins a value to its key, for which softmax attention needs a layer, and it stays below 0.5.
Came: the hybrid 1.0 and 0.64, linear 1.0 and 0.85, softmax 0.27 and 0.08. So the states of four linear layers hold more
than was thought.
"""

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks.grouped_query_attention import tokens_of
from benchmarks.harness import (
    Options,
    Report,
    Timing,
    building,
    command_line,
    copies_past_cache,
    copy_rate,
    in_turns,
    matmul_rate,
    measure,
    measure_graph,
)
from tformer_lib import linear_attention, pretrained
from tformer_lib.attention import attend
from tformer_lib.flash_attention import flash_attention
from tformer_lib.training import evaluate, evaluation_windows, next_token_loss, read_windows
from tformer_lib.training.data import IGNORED
from tformer_lib.transformer import Decoder, LinearConfig, ModelConfig

HEAD_DIM = 64
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
READ = (1024, 16384)  # tokens that a state has read before one more
WRITTEN_OUT = 8192  # the longest text whose N² scores are written out

GPU_TOKENS, GPU_HEADS, GPU_HEAD_DIM = 32768, 16, 128
GPU_LENGTHS = (2048, 8192, 32768)
CROSSOVER = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
LONG = 65536  # from here on one turn: softmax attention takes 0.1 s and more
DECODED = 8  # sequences; of 131,072 keys their caches are 8.6 GB
GPU_SECONDS = 0.06  # of each measurement of decoding, after as long a warm-up
TURN_SECONDS = 0.02
BUILDS = (1, 2, 3, 4, "backward", "chain", "pointwise")
SOFTMAX, PEER = "softmax, our flash kernel", ", flash-linear-attention"


@dataclass(frozen=True)
class LinearOptions(Options):
    """Time and memory over the length, or with ``--study`` what a hybrid of linear and softmax attention learns."""

    study: Literal["stories", "recall"] | None = None
    """Train models on this task instead."""
    steps: int = 400
    """Steps of training for each model of a study."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command_line(run, arguments, options=LinearOptions, topic="linear_attention", description=__doc__)


def run(args: LinearOptions) -> None:
    """Time and memory over the length, and the time of a decoded token over the length before it."""
    device = torch.device(args.device)
    if args.study is not None:
        study = {"stories": learn_stories, "recall": learn_recall}[args.study]
        study(Report(f"linear_attention-{args.study}", device, args.out, peers=()), args.steps)
        return
    if device.type == "cuda":
        report = Report("linear_attention", device, args.out, peers=(SOFTMAX, "sum", "linear"))
        with building(report, "linear_attention", BUILDS):
            on_gpu(report)
        report.finish()
        return
    report = Report("linear_attention", device, args.out, peers=("softmax, fused", "linear, chunked"))
    rate = matmul_rate(device, torch.float32)
    report.note(head_dim=HEAD_DIM, chunk=linear_attention.CHUNK, matmul_flops_per_second=rate, lengths=list(LENGTHS))
    times = time_forms(report, device, rate)
    report.note(time_slopes={name: slope(LENGTHS[: len(t)], t) for name, t in times.items()})
    fused = times["softmax, fused"]
    report.note(faster_from={name: faster_from(LENGTHS, t, fused) for name, t in times.items() if "linear" in name})
    memory = memory_of_forms(device)
    report.note(peak_mib=memory)
    slopes = {f"{kind}, {n}": slope(LENGTHS[: len(m)], m) for kind, ms in memory.items() for n, m in ms.items()}
    report.note(memory_slopes=slopes)
    decode(report, device)
    report.finish()


def forms() -> dict[str, Callable]:
    """The forms that are compared, all causal."""
    return {
        "softmax, written out": lambda q, k, v: attend(q, k, v, causal=True),
        "softmax, fused": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "linear, chunked": lambda q, k, v: linear_attention.attend(q, k, v, causal=True),
        "linear, C++ twin": lambda q, k, v: linear_attention.attend(q, k, v, causal=True, step="cpu"),
    }


def operations(name: str, N: int) -> int:
    """The operations that a form must do at least."""
    if name == "softmax, fused":
        return 2 * N * N * HEAD_DIM  # it skips the future
    if name == "softmax, written out":
        return 4 * N * N * HEAD_DIM
    return 4 * N * linear_attention.CHUNK * HEAD_DIM + 4 * N * HEAD_DIM * (HEAD_DIM + 1)


def lengths_of(name: str) -> list[int]:
    """The lengths at which a form is run."""
    return [N for N in LENGTHS if name != "softmax, written out" or N <= WRITTEN_OUT]


def time_forms(report: Report, device: torch.device, rate: float) -> dict[str, list[float]]:
    """Seconds of each form at each length (the 10th percentile, which other work on the machine disturbs least)."""
    times = {}
    for name, form in forms().items():
        for N in lengths_of(name):
            timing = measure(form, [make(N, device)], device=device, seconds=0.2, min_calls=3)
            work = {"flops": operations(name, N), "limit": rate, "tokens": N}
            report.add(f"{name}, N = {N:,}", timing, case=f"N = {N:,}", contestant=name, **work)
            times.setdefault(name, []).append(timing.p10)
    return times


def memory_of_forms(device: torch.device) -> dict[str, dict[str, list[float]]]:
    """Peak MiB beyond the inputs, of a forward pass and of a forward and a backward pass."""
    kinds = {"forward: peak MiB": False, "forward and backward: peak MiB": True}
    return {
        kind: {
            name: [peak_bytes(form, make(N, device), backward=backward) / 2**20 for N in lengths_of(name)]
            for name, form in forms().items()
            if name != "softmax, fused"
        }
        for kind, backward in kinds.items()
    }


def decode(report: Report, device: torch.device) -> None:
    """Time of one more token from a state, after texts of different lengths."""
    limit = copy_rate(device)
    for N in READ:
        state = linear_attention.LinearState()
        state.attend(*make(N, device))
        token = make(1, device)
        timing = measure(state.attend, [token], device=device, seconds=0.3)
        other = READ[-1] if READ[0] == N else READ[0]
        work = {"bytes": 2 * state.sums.nbytes, "limit": limit, "tokens": N, "state_bytes": state.sums.nbytes}
        names = {"case": "one token", "contestant": f"from a state of {N:,}"}
        peer = f"one token from a state of {other:,}"
        report.add(f"one token from a state of {N:,}", timing, peer=peer, **names, **work)


def make(N: int, device: torch.device) -> tuple[Tensor, ...]:
    """q, k and v of one head: (1, 1, N, HEAD_DIM) each."""
    return tuple(torch.randn(3, 1, 1, N, HEAD_DIM, device=device).unbind(0))


# --- on a GPU --------------------------------------------------------------------------------------------------------


def on_gpu(report: Report) -> None:
    """Every member at 32,768 tokens, the errors, the crossover with softmax attention, decoding."""
    device, limit = report.device, copy_rate(report.device)
    report.note(heads=GPU_HEADS, head_dim=GPU_HEAD_DIM, tokens=GPU_TOKENS, copy_bytes_per_second=limit)
    with torch.no_grad():
        report.note(relative_error=errors(device))
    own = members() | {SOFTMAX: lambda x: flash_attention(x["q"], x["k"], x["v"], causal=True)}
    contestants = {name: (form, False) for name, form in own.items()}
    contestants["sum, tokens first in memory"] = (lambda x: own["sum"](heads_first(x)), True)
    time_members(report, contestants, limit)
    for N in CROSSOVER:
        cross(report, N, limit)
    decode_on_gpu(report, limit)
    report.save()
    for name, form in flash_linear_attention().items():  # last, because it tunes itself for minutes
        time_members(report, {name + PEER: (form, True), name: (own[name], False)}, limit, way="{} beside a peer")


def draw(N: int, device: torch.device, *, batch: int | None = None, tokens_first: bool = False) -> dict[str, Tensor]:
    """q, k, v in bfloat16, unit keys, and the numbers a token of the gated members, in float32.

    Args:
        batch: None is as many sequences as make up GPU_TOKENS, at least one.
        tokens_first: (batch, N, heads, ..) in memory, as flash-linear-attention has it.
    """
    batch = max(1, GPU_TOKENS // N) if batch is None else batch
    shape = (batch, N, GPU_HEADS, GPU_HEAD_DIM) if tokens_first else (batch, GPU_HEADS, N, GPU_HEAD_DIM)
    x = {name: torch.randn(shape, device=device, dtype=torch.bfloat16) for name in "qkv"}
    x["unit_k"] = F.normalize(x["k"].float(), dim=-1).bfloat16()
    x["log_decay"] = F.logsigmoid(torch.randn(*shape[:3], 1, device=device))
    x["retention"] = linear_attention.retention_log_decay(GPU_HEADS).to(device, torch.float32)
    x["beta"] = torch.rand(*shape[:3], 1, device=device)
    return x


def members() -> dict[str, Callable]:
    """The members of the family, as functions of what ``draw`` gives."""
    la = linear_attention
    return {
        "sum": lambda x: la.operator.run(x["q"], x["k"], x["v"], scale=GPU_HEAD_DIM**-0.5)[0],
        "normalised, elu + 1": lambda x: la.attend(x["q"], x["k"], x["v"], causal=True),
        "retention": lambda x: la.gated_attend(x["q"], x["k"], x["v"], log_decay=x["retention"]),
        "decay by token": lambda x: la.gated_attend(x["q"], x["k"], x["v"], log_decay=x["log_decay"]),
        "delta rule": lambda x: la.delta_attend(x["q"], x["unit_k"], x["v"], beta=x["beta"]),
        "gated delta rule": lambda x: la.delta_attend(
            x["q"], x["unit_k"], x["v"], beta=x["beta"], log_decay=x["log_decay"]
        ),
    }


def errors(device: torch.device, N: int = 4096) -> dict[str, float]:
    """|out - truth| / |truth| of each member against step 0 in float64."""
    x = draw(N, device, batch=1)
    wide = {name: value.double() for name, value in x.items()}
    found = {}
    for name, form in members().items():
        truth = form(wide)
        found[name] = round(((form(x).double() - truth).norm() / truth.norm()).item(), 6)
    return found


def time_members(
    report: Report, contestants: dict[str, tuple[Callable, bool]], limit: float, *, way: str = "{}"
) -> None:
    """Forwards and gradients at each of GPU_LENGTHS, all contestants in turns.

    Args:
        contestants: functions of what ``draw`` gives, and whether tokens come first in memory.
        way: what "forward" and "gradient" become in the names of the rows.
    """
    moved = 4 * GPU_TOKENS * GPU_HEADS * GPU_HEAD_DIM * 2  # bytes of q, k, v and the output
    for N in GPU_LENGTHS:
        inputs = {tokens_first: draw(N, report.device, tokens_first=tokens_first) for tokens_first in (False, True)}
        for kind, prepare, least in (("forward", forward_of, moved), ("gradient", gradient_of, 2 * moved)):
            case, calls = f"{way.format(kind)}, N = {N:,}", {}
            for name, (form, tokens_first) in contestants.items():
                try:
                    call = prepare(form, inputs[tokens_first])
                    call()
                except RuntimeError as error:
                    if PEER not in name:
                        raise
                    report.note(**{f"refused, {case}: {name}": str(error)[:200]})
                    continue
                calls[name] = call
            for name, (timing, turns) in in_turns(calls, seconds=TURN_SECONDS).items():
                peer = f"{case}: {name.removesuffix(PEER)}" if PEER in name else f"{case}: {name}{PEER}"
                known = PEER in name or name + PEER in calls
                work = {"bytes": least, "limit": limit, "tokens": N, "peer": peer if known else None}
                report.add(timing=timing, case=case, contestant=name, milliseconds_of_turns=turns, **work)
        report.save()


def heads_first(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """q, k and v of (batch, N, heads, d) as views of (batch, heads, N, d)."""
    return x | {name: x[name].transpose(1, 2) for name in "qkv"}


def flash_linear_attention() -> dict[str, Callable]:
    """flash-linear-attention's members over (batch, N, heads, head_dim), none where it is not installed."""
    try:
        from fla.ops.delta_rule import chunk_delta_rule
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
        from fla.ops.linear_attn import chunk_linear_attn
    except ImportError:
        return {}
    number = lambda x, name: x[name].squeeze(-1)  # noqa: E731
    scale = GPU_HEAD_DIM**-0.5
    return {
        "sum": lambda x: chunk_linear_attn(x["q"], x["k"], x["v"], normalize=False)[0],
        "delta rule": lambda x: chunk_delta_rule(
            x["q"], x["unit_k"], x["v"], number(x, "beta").bfloat16(), scale=scale
        )[0],
        "gated delta rule": lambda x: chunk_gated_delta_rule(
            x["q"], x["unit_k"], x["v"], number(x, "log_decay"), number(x, "beta"), scale=scale
        )[0],
    }


def forward_of(form: Callable, x: dict[str, Tensor]) -> Callable[[], Tensor]:
    """A forward pass that keeps nothing for a backward."""
    return torch.no_grad()(lambda: form(x))


def gradient_of(form: Callable, x: dict[str, Tensor]) -> Callable[[], tuple]:
    """A backward pass to q, k, v, and to what a token brings of gates and step sizes; the forward is done here."""
    names = ("q", "k", "unit_k", "v", "log_decay", "beta")
    x = {name: value.detach().requires_grad_(name in names) for name, value in x.items()}
    out = form(x)
    dout = torch.randn_like(out)
    leaves = [x[name] for name in names]
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True, allow_unused=True)


def time_call(call: Callable, device: torch.device, *arguments) -> Timing:
    """The time of a call on the GPU; the host is ahead of it, so that launches are not timed."""
    return measure(call, [arguments], device=device, seconds=GPU_SECONDS, warmup=GPU_SECONDS, min_calls=3, ahead=True)


def cross(report: Report, N: int, limit: float) -> None:
    """Linear and softmax attention at one length, forward and backward, in turns."""
    x = draw(N, report.device)
    forms = {
        "linear": members()["normalised, elu + 1"],
        SOFTMAX: lambda x: flash_attention(x["q"], x["k"], x["v"], causal=True),
    }
    moved = 4 * x["q"].nbytes
    for case, prepare, least in (("crossover", forward_of, moved), ("crossover, gradient", gradient_of, 2 * moved)):
        calls = {name: prepare(form, x) for name, form in forms.items()}
        for name, (timing, turns) in in_turns(calls, seconds=TURN_SECONDS, turns=3 if N < LONG else 1).items():
            work = {"bytes": least, "limit": limit, "tokens": N, "milliseconds_of_turns": turns}
            report.add(timing=timing, case=f"{case}, N = {N:,}", contestant=name, **work)


def decode_on_gpu(report: Report, limit: float) -> None:
    """One more token for each of DECODED sequences: from a state, and from a cache of so many keys.

    A call takes less time on the GPU than its start from Python, so each is measured inside a CUDA graph, as engines
    decode. States and caches rotate through more bytes than the L2 cache holds.
    """
    device = report.device
    token = draw(1, device, batch=DECODED)
    q, k, v = token["q"], token["k"], token["v"]
    case, own = f"one token for each of {DECODED} sequences", "from a state"
    options = {"feature_map": linear_attention.elu_plus_one, "normalised": True}
    shape = (DECODED, GPU_HEADS, GPU_HEAD_DIM + 1, GPU_HEAD_DIM)  # transposed, as a call leaves it for the next one
    states = copies_past_cache(lambda: (torch.randn(shape, device=device).abs().mT,), device)
    step = lambda state: linear_attention.operator.run(q, k, v, **options, initial_state=state)  # noqa: E731
    work = {"case": case, "limit": limit, "sequences": DECODED}
    facts = work | {"bytes": 2 * states[0][0].nbytes, "peer": f"{case}: from {CROSSOVER[-1]:,} keys"}
    with torch.no_grad():
        report.add(timing=measure_graph(step, states, seconds=GPU_SECONDS), contestant=own, **facts)
        called = time_call(lambda: step(*states[0]), device)
        report.add(timing=called, contestant=f"{own}, started from Python", **(facts | {"peer": f"{case}: {own}"}))
        for N in CROSSOVER:
            shape = (2, DECODED, GPU_HEADS, N, GPU_HEAD_DIM)
            caches = copies_past_cache(lambda s=shape: (torch.randn(s, device=device, dtype=torch.bfloat16),), device)
            step = lambda old: flash_attention(q, old[0], old[1], causal=True)  # noqa: E731
            timing = measure_graph(step, caches, seconds=GPU_SECONDS)
            name, peer = f"from {N:,} keys", f"{case}: {own}"
            report.add(timing=timing, contestant=name, bytes=caches[0][0].nbytes, peer=peer, tokens=N, **work)


# --- hybrids ---------------------------------------------------------------------------------------------------------

STACKS = {"softmax": ("full",), "hybrid": ("linear", "linear", "linear", "full"), "linear": ("linear",)}
WIDTH, STACK_HEADS, STACK_HEAD_DIM, LAYERS = 128, 4, 32, 4
CONTEXT, STORY_BATCH, RECALL_BATCH = 256, 32, 128
KEYS, VALUES, PAIRS = 64, 32, (4, 8, 16)  # of the recall task; so many pairs in a row of the training, in turns
RECALLED = (4, 8, 16, 32)


def learn_stories(report: Report, steps: int) -> None:
    """Train each stack on stories; write its loss on others, in nats a token."""
    device = report.device
    _, encoding = pretrained.load(device=device)
    windows = evaluation_windows(tokens_of(encoding, 150, "linear val"), CONTEXT, end_of_document=encoding.eot_token)
    validation = [x.to(device) for x in windows]
    told = tokens_of(encoding, 16 * steps, "linear train")
    note_sizes(report, steps, batch=STORY_BATCH, context=CONTEXT, training_tokens=len(told))
    for name in STACKS:
        torch.manual_seed(0)
        model, draw = make_stack(name, encoding.n_vocab).to(device), np.random.default_rng(0)
        starts = [draw.integers(0, len(told) - CONTEXT - 1, STORY_BATCH) for _ in range(steps)]
        batches = (read_windows(told, at, CONTEXT) for at in starts)
        curve = train_stack(model, batches, steps, learning_rate=3e-3, weight_decay=0.1)
        found = {"parameters": count_parameters(model), "loss": evaluate(model, *validation), "training": curve}
        report.note(**{name: found})
        report.save()
    report.finish()


def learn_recall(report: Report, steps: int) -> None:
    """Train each stack to recall values; write the shares that it recalls."""
    note_sizes(report, steps, batch=RECALL_BATCH, keys=KEYS, values=VALUES, pairs=list(PAIRS))
    for name in STACKS:
        torch.manual_seed(0)
        model, generator = make_stack(name, KEYS + VALUES).to(report.device), torch.Generator().manual_seed(0)
        batches = (draw_recall(RECALL_BATCH, PAIRS[t % len(PAIRS)], generator) for t in range(steps))
        curve = train_stack(model, batches, steps, learning_rate=1e-3, weight_decay=0.0)
        report.note(**{name: {"shares": {n: recalled_share(model, n) for n in RECALLED}, "training": curve}})
        report.save()
    report.finish()


def note_sizes(report: Report, steps: int, **facts) -> None:
    """What all stacks have in common."""
    report.note(width=WIDTH, layers=LAYERS, heads=STACK_HEADS, head_dim=STACK_HEAD_DIM, steps=steps, **facts)


def make_stack(name: str, symbols: int) -> Decoder:
    """Four layers whose kinds are those of ``STACKS``."""
    sizes = {"key_heads": STACK_HEADS, "value_heads": STACK_HEADS}
    linear = LinearConfig(**sizes, head_dim=STACK_HEAD_DIM, value_dim=STACK_HEAD_DIM)
    config = ModelConfig(
        vocab_size=symbols,
        max_length=2 * CONTEXT,
        width=WIDTH,
        layers=LAYERS,
        heads=STACK_HEADS,
        norm="rmsnorm",
        feed_forward="swiglu",
        positions="rope",
        bias=False,
        layer_types=STACKS[name],
        linear=linear if "linear" in STACKS[name] else None,
    )
    return Decoder(config)


def count_parameters(model: torch.nn.Module) -> int:
    """Numbers that are learned."""
    return sum(parameter.numel() for parameter in model.parameters())


def draw_recall(batch: int, pairs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pairs of a key and a value, then the same pairs in another order: inputs and targets (batch, 4 pairs - 1).

    The targets are the values that come again; all else does not count.
    """
    keys = torch.rand(batch, KEYS, generator=generator).argsort(1)[:, :pairs]
    stored = torch.stack([keys, KEYS + torch.randint(VALUES, (batch, pairs), generator=generator)], 2)
    order = torch.rand(batch, pairs, generator=generator).argsort(1)[..., None]
    tokens = torch.cat([stored, stored.gather(1, order.expand(-1, -1, 2))], 1).flatten(1)  # (batch, 4 pairs)
    targets = torch.full_like(tokens, IGNORED)
    targets[:, 2 * pairs + 1 :: 2] = tokens[:, 2 * pairs + 1 :: 2]
    return tokens[:, :-1], targets[:, 1:]


def train_stack(
    model: Decoder,
    batches: Iterable[tuple[Tensor, Tensor]],
    steps: int,
    *,
    learning_rate: float,
    weight_decay: float,
) -> list[float]:
    """AdamW with warm-up and a cosine; the mean training loss of each twentieth of the steps."""
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    rate = torch.tensor(learning_rate, device=device)  # a tensor, so that a recorded step reads what it is now
    options = {"betas": (0.9, 0.98), "weight_decay": weight_decay, "capturable": on_gpu, "foreach": on_gpu}
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate if on_gpu else learning_rate, **options)

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            loss = next_token_loss(model, inputs, targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    step, losses = Recorded(step) if on_gpu else step, []
    for t, batch in enumerate(batches):
        now = min(1.0, (t + 1) / 50) * (0.05 + 0.95 * (1 + math.cos(math.pi * t / steps)) / 2)
        rate.fill_(learning_rate * now)
        if not on_gpu:
            optimizer.param_groups[0]["lr"] = rate.item()
        losses.append(step(*(x.to(device) for x in batch)))
    every = max(1, steps // 20)
    return [round(part.mean().item(), 4) for part in torch.stack(losses).split(every)]


class Recorded:
    """A training step whose kernels are recorded, in a CUDA graph for each shape of batch, and then replayed.

    A small model's step is a thousand short kernels, whose start from Python takes many times as long as they do.
    """

    WARM_UP = 3  # calls that really run, on a stream of their own, before the shape is recorded

    def __init__(self, step: Callable[..., Tensor]):
        self.step, self.stream = step, torch.cuda.Stream()
        self.calls: dict[torch.Size, int] = {}
        self.graphs: dict[torch.Size, tuple] = {}

    def __call__(self, *batch: Tensor) -> Tensor:
        """The loss of one more step."""
        shape = batch[0].shape
        self.calls[shape] = self.calls.get(shape, 0) + 1
        if self.calls[shape] <= self.WARM_UP:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                loss = self.step(*batch)
            torch.cuda.current_stream().wait_stream(self.stream)
            return loss
        if shape not in self.graphs:
            inputs, graph = [x.clone() for x in batch], torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                loss = self.step(*inputs)
            self.graphs[shape] = graph, inputs, loss
        graph, inputs, loss = self.graphs[shape]
        for old, new in zip(inputs, batch, strict=True):
            old.copy_(new)
        graph.replay()
        return loss.clone()


@torch.no_grad()
def recalled_share(model: Decoder, pairs: int, batches: int = 8) -> float:
    """The share of values that the model names right when their keys come again."""
    device, right = next(model.parameters()).device, []
    generator = torch.Generator().manual_seed(1)
    for _ in range(batches):
        inputs, targets = (x.to(device) for x in draw_recall(RECALL_BATCH, pairs, generator))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            best = model(inputs).argmax(-1)
        right.append((best == targets)[targets != IGNORED].float().mean())
    return round(torch.stack(right).mean().item(), 4)


def faster_from(lengths: Sequence[int], times: Sequence[float], peer: Sequence[float]) -> int | None:
    """The first of the lengths from which on ``times`` are below the peer's at every one; None if there is none."""
    slower = [N for N, own, other in zip(lengths, times, peer, strict=False) if own >= other]
    later = [N for N in lengths if not slower or slower[-1] < N]
    return later[0] if later else None


def slope(x, y) -> float:
    """The slope of the last three points on logarithmic axes."""
    return round(math.log(y[-1] / y[-3]) / math.log(x[len(y) - 1] / x[len(y) - 3]), 3)


def peak_bytes(fn: Callable, inputs: tuple[Tensor, ...], *, backward: bool = False) -> int:
    """The most bytes that were allocated at once during a call, beyond what was there before it."""
    inputs = tuple(x.detach().requires_grad_(backward) for x in inputs)

    def call():
        out = fn(*inputs)
        if backward:
            torch.autograd.grad(out.sum(), inputs)

    if inputs[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


if __name__ == "__main__":
    sys.exit(main())
