"""Several devices: training, decoding and attention over all of them, beside one alone, and beside the forecast.

    python -m benchmarks.scaling --device cuda                        # on all GPUs of this machine
    python -m benchmarks.scaling --device cuda --processes 4 --parts links training --shapes 350M 1B
    python -m benchmarks.scaling --device cuda --parts decoding --shapes 1B --batches 1 64
    python -m benchmarks.scaling --device cuda --parts ring --lengths 65536 262144 1048576
    python -m benchmarks.scaling --device cpu                         # two processes and gloo: a rehearsal

The script starts itself under torchrun, one process a device. Its parts:

- links: what the devices can send each other, by size, and their rate of matrix products: the forecast's only inputs.
- training: tokens per second of a step with DDP and with FSDP2 (every device has as many windows as one alone has), the
  bytes that a step sends, counted and as the profiler saw them, and the memory.
- decoding: milliseconds a token at batch 1 and 64, with the matrices cut by tensor parallel, beside one device.
- ring: exact attention over a text that is cut along its tokens, beside one device with all of it; the limit is the
  arithmetic of one device's share at the rate of matrix products.

The forecasts come from ``tformer_lib.distributed.costs`` and are made before the measurement.
"""

import gc
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.harness import Options, Report, Timing, command_line, device_name, results_folder
from benchmarks.serving import LLAMA_1B
from benchmarks.training import GPT2_SMALL
from tformer_lib import distributed, training
from tformer_lib.attention import attend
from tformer_lib.distributed import costs
from tformer_lib.distributed.traffic import collectives, sent_bytes
from tformer_lib.flash_attention import flash_attention
from tformer_lib.serving import LLM, Params
from tformer_lib.training import TrainingConfig
from tformer_lib.training.loss import mean_cross_entropy
from tformer_lib.transformer import Decoder, ModelConfig, count_parameters

GPT2_MEDIUM = replace(GPT2_SMALL, model=replace(GPT2_SMALL.model, width=1024, layers=24, heads=16))
LLAMA_1B_TRAINED = replace(GPT2_SMALL, model=replace(LLAMA_1B, max_length=2048), batch=8, context=2048)
LLAMA_8B = replace(LLAMA_1B, width=4096, layers=32, head_dim=128, feed_forward_width=14336, tie_embeddings=False)
TINY = TrainingConfig(
    model=training.llama_like(vocab_size=512, max_length=64, width=64, layers=2, heads=4), batch=4, context=64
)

TRAINED = {
    "cuda": {"350M": GPT2_MEDIUM, "1B": LLAMA_1B_TRAINED},
    "cpu": {"tiny": replace(TINY, model=replace(TINY.model, vocab_size=512, max_length=64))},
}
DECODED = {
    "cuda": {"350M": GPT2_MEDIUM.model, "1B": LLAMA_1B, "8B": LLAMA_8B},
    "cpu": {"tiny": replace(TINY.model, vocab_size=512, max_length=64)},
}
PARTS = ("links", "training", "decoding", "ring")


@dataclass(frozen=True)
class ScalingOptions(Options):
    """Which devices, and which parts."""

    processes: int | None = None
    """One a device; by default as many as there are GPUs, or two on a CPU."""
    parts: tuple[Literal["links", "training", "decoding", "ring"], ...] = PARTS
    """What to measure."""
    shapes: tuple[str, ...] = ("350M", "8B", "tiny")
    """Which models to train (350M, 1B) and to let decode (350M, 1B, 8B)."""
    batches: tuple[int, ...] = (1,)
    """How many texts are decoded at once."""
    lengths: tuple[int, ...] = (65_536,)
    """Tokens of the texts that go round in the ring; a CPU takes at most 2,048."""
    steps: int = 12
    """Steps of training that are timed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command_line(run, arguments, options=ScalingOptions, topic="scaling", description=__doc__)


def run(asked: ScalingOptions) -> int | None:
    """Start one process a device, or be one of them."""
    if not distributed.was_launched():
        return launch(asked)
    with distributed.joined(cpu=asked.device == "cpu"):
        Bench(asked).run()
    return 0


def launch(asked: ScalingOptions) -> int:
    """This script again under torchrun, with the same arguments; returns its exit status."""
    here = torch.cuda.device_count() if asked.device == "cuda" else None
    count = asked.processes or here or 2
    if asked.processes is None and here == 1:
        print("there is one GPU here, and so nothing to scale over")
        return 0
    if count < 2:
        raise ValueError(f"--processes must be at least 2, got {count}")
    if here is not None and count > here:
        raise ValueError(f"--processes {count} needs as many GPUs, here {'is' if here == 1 else 'are'} {here}")
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), "-m", "benchmarks.scaling"]
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return subprocess.run([sys.executable, *torchrun, *sys.argv[1:]], env=os.environ | threads).returncode


def shared_seconds(fn: Callable[[], object], device: torch.device, calls: int, warmup: int = 3) -> Timing:
    """Time ``fn`` in all processes at once, the same number of calls in each; a call takes as long as in the slowest.

    The harness calls as often as fits into a time, which would differ between processes, and a collective operation
    that one of them calls once more than the others never ends.
    """
    for _ in range(warmup):
        fn()
    settle(device)
    if device.type == "cuda":
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
        for start, end in events:
            start.record()
            fn()
            end.record()
        torch.cuda.synchronize()
        times = [start.elapsed_time(end) / 1e3 for start, end in events]
    else:
        times = []
        for _ in range(calls):
            start = time.perf_counter()
            fn()
            times.append(time.perf_counter() - start)
    slowest = torch.tensor(times, dtype=torch.float64)
    if distributed.world().size > 1:
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return Timing.of(slowest.tolist())


def settle(device: torch.device) -> None:
    """Wait for the device, then for the other processes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    distributed.world().any(False)


class Bench:
    """All parts, in one process of several."""

    def __init__(self, asked: ScalingOptions):
        self.asked, self.world = asked, distributed.world()
        self.device = distributed.own_device(torch.device(asked.device))
        self.on_gpu = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        size = self.world.size
        folder = "cpu" if not self.on_gpu else f"{device_name(self.device)}-x{size}"
        self.out = results_folder(asked.out, folder)
        self.machine = costs.Machine(per_host=size)
        self.limit = float("nan")
        self.report = self.new_report("links")

    def new_report(self, part: str) -> Report:
        """One file a part, so that a part can be measured again alone."""
        return Report(f"scaling-{part}", self.device, self.out, peers=("one device",))

    def run(self) -> None:
        """The parts that were asked for, after the links, which all need; the first process prints and writes."""
        warnings.filterwarnings("ignore", message=".*deprecated", category=FutureWarning)  # torch's names change
        for part in ("links", *(part for part in PARTS[1:] if part in self.asked.parts)):
            self.report = self.new_report(part)
            self.note(devices=self.world.size, backend="NCCL" if self.on_gpu else "gloo")
            if part != "links":
                self.note(matmul_rate=self.limit, link_rate=self.machine.link, latency=self.machine.latency)
            getattr(self, part)()
            self.free()
            if self.world.is_first and part in self.asked.parts:
                self.report.finish()

    def note(self, **facts) -> None:
        """Keep facts, in the first process."""
        if self.world.is_first:
            self.report.note(**facts)

    def add(self, timing: Timing, **about) -> None:
        """Keep a row, in the first process."""
        if self.world.is_first:
            self.report.add(timing=timing, **about)

    def free(self) -> None:
        """Give memory back before the next model."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    # --- links

    def links(self) -> None:
        """The rates that the forecasts are made from."""
        n = 8192 if self.on_gpu else 512
        factors = [torch.randn(n, n, device=self.device, dtype=self.dtype) for _ in range(2)]
        self.limit = 2 * n**3 / shared_seconds(partial(torch.matmul, *factors), self.device, 20).median
        del factors
        size, most = self.world.size, 2**30 if self.on_gpu else 2**22
        whole = torch.zeros(most // 4, device=self.device)
        timings = {}
        for sent in sorted({2**13, 2**20, most // 16, most}):
            timings[sent] = shared_seconds(partial(dist.all_reduce, whole[: sent // 4]), self.device, 10)
            self.add_link("all-reduce", sent, costs.all_reduce_bytes(sent, size), timings[sent])
        own = torch.zeros(most // 4 // size, device=self.device)
        gathered = shared_seconds(lambda: dist.all_gather_into_tensor(whole, own), self.device, 10)
        self.add_link("all-gather", most, costs.all_gather_bytes(most, size), gathered)
        scattered = shared_seconds(lambda: dist.reduce_scatter_tensor(own, whole), self.device, 10)
        self.add_link("reduce-scatter", most, costs.all_gather_bytes(most, size), scattered)
        half = whole[: len(whole) // 2]
        passed = shared_seconds(lambda: self.pass_on(half, whole[len(whole) // 2 :]), self.device, 10)
        self.add_link("pass on in a ring", most // 2, most / 2, passed)
        link = costs.all_reduce_bytes(most, size) / timings[most].median
        latency = timings[2**13].median / (2 * (size - 1))
        self.machine = replace(self.machine, link=link, latency=latency)
        self.note(matmul_rate=self.limit, link_rate=link, latency=latency)

    def add_link(self, name: str, size: int, sent: float, timing: Timing) -> None:
        """A row of one collective operation."""
        about = {"alone": "it is the link itself", "unbounded": "it is the measurement of the limit"}
        case = f"{name} of {size:,} bytes"
        self.add(timing, case=case, contestant=f"{self.world.size} devices", bytes=sent, **about)

    def pass_on(self, sent: torch.Tensor, coming: torch.Tensor) -> None:
        """To the next device, from the one before."""
        rank, size = self.world.rank, self.world.size
        ends = (dist.P2POp(dist.isend, sent, (rank + 1) % size), dist.P2POp(dist.irecv, coming, (rank - 1) % size))
        for request in dist.batch_isend_irecv(list(ends)):
            request.wait()

    # --- training

    def training(self) -> None:
        """Each shape on one device, with DDP and with FSDP2."""
        self.check_gradients()
        for name, config in TRAINED[self.device.type].items():
            if name in self.asked.shapes:
                self.train_shape(name, config)

    def check_gradients(self) -> None:
        """How far the gradients of both schemes are from those of one process that reads the whole batch."""
        model = replace(TINY.model, vocab_size=512, max_length=64)
        tokens = torch.randint(0, 512, (4 * self.world.size, 65), generator=torch.Generator().manual_seed(1))
        inputs, targets = tokens[:, :-1].to(self.device), tokens[:, 1:].to(self.device)
        mine, found = self.world.share(len(tokens)), {}
        for scheme in ("one", "ddp", "fsdp"):
            torch.manual_seed(0)
            decoder = Decoder(model).to(self.device)
            network = decoder if scheme == "one" else distributed.data_parallel(decoder, scheme)
            part = slice(None) if scheme == "one" else mine
            training.next_token_loss(network, inputs[part], targets[part]).backward()
            found[scheme] = {n: distributed.whole(p.grad) for n, p in decoder.named_parameters()}
        largest = max(x.abs().max().item() for x in found["one"].values())
        for scheme in ("ddp", "fsdp"):
            apart = max((found[scheme][n] - x).abs().max().item() for n, x in found["one"].items())
            self.note(**{f"{scheme}_gradients_differ_by": apart / largest})

    def train_shape(self, name: str, config: TrainingConfig) -> None:
        """One shape, three ways."""
        size, tokens = self.world.size, config.batch * config.context
        flops = training.estimate_flops_per_token(config.model, config.context) * tokens
        counts = costs.Counts.of(config.model, config.batch * size, config.context)
        alone: float | None = None
        for scheme in ("one device", "ddp", "fsdp"):
            if alone is not None:
                self.forecast(name, scheme, counts, flops / alone)
            step, parameters = self.make_step(config, scheme)
            if scheme == "one device" and not self.world.is_first:
                del step
                alone = self.told(0.0)
                continue
            timing = self.timed_step(step, scheme)
            peak = torch.cuda.max_memory_allocated() if self.on_gpu else None
            case, many = f"a step of {name}", 1 if scheme == "one device" else size
            rate = many * tokens / timing.median
            about = {"tokens_per_second": round(rate), "parameters": parameters, "peak_memory": peak}
            if scheme == "one device":
                alone = self.told(timing.median)
            about |= {"times_one_device": rate / (tokens / alone), "batch": many * config.batch}
            self.add(timing, case=case, contestant=scheme, flops=flops, limit=self.limit, **about)
            if scheme != "one device":
                self.sent(f"{name} {scheme}", step, getattr(costs, scheme)(counts, self.machine, size).sent)
            del step
            self.free()

    def told(self, value: float) -> float:
        """What the first process says, in all of them."""
        told = torch.tensor(value if self.world.is_first else 0.0, dtype=torch.float64)
        return self.world.sum(told).item()

    def forecast(self, name: str, scheme: str, counts: costs.Counts, rate: float) -> None:
        """What the formulas say of a scheme, from the links and from one device's step, before it is measured."""
        cost = getattr(costs, scheme)(counts, replace(self.machine, flops=rate), self.world.size)
        speed = self.world.size * cost.compute / cost.seconds
        held = cost.weights + cost.gradients + cost.optimizer
        facts = {"times_one_device": speed, "seconds": cost.seconds, "exposed": cost.exposed, "sent": cost.sent}
        self.note(**{f"forecast: {name} {scheme}": facts | {"held": held}})

    def timed_step(self, step: Callable[[], object], scheme: str) -> Timing:
        """A step's time; the first process is alone with that of one device."""
        if scheme != "one device":
            return shared_seconds(step, self.device, self.asked.steps, warmup=4)
        for _ in range(4):
            step()
        times = []
        for _ in range(self.asked.steps):
            if self.on_gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            if self.on_gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return Timing.of(times)

    def make_step(self, config: TrainingConfig, scheme: str) -> tuple[Callable[[], object], int]:
        """A function that takes one whole step on windows of this device's own, and the number of parameters.

        Blocks are compiled one by one in all three, so that none has another compiler's advantage.
        """
        torch.manual_seed(0)
        with self.device:
            model = Decoder(config.model)
        parameters = count_parameters(model)
        network = model if scheme == "one device" else distributed.data_parallel(model, scheme)
        optimizer = training.make_optimizer(model, config)
        head = mean_cross_entropy
        if self.on_gpu:
            for block in model.stack.blocks:
                block.compile()
            head = torch.compile(mean_cross_entropy)
        torch.manual_seed(self.world.rank)
        rows = torch.randint(0, config.model.vocab_size, (config.batch, config.context + 1), device=self.device)
        inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

        def step() -> None:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.on_gpu):
                loss = head(network(inputs), targets)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step, parameters

    def sent(self, name: str, step: Callable[[], object], counted: float) -> None:
        """The bytes of one step: by the formula, by the profiler, and by the link's own counters."""
        before = link_counters(self.world.local_rank) if self.on_gpu else None
        settle(self.device)
        seen = collectives(step, self.device)
        settle(self.device)
        after = link_counters(self.world.local_rank) if self.on_gpu else None
        size = self.world.size
        profiled = sum(sent_bytes(kind, count, size) for kind, count in seen)
        facts = {"counted": counted, "profiled": profiled, "operations": len(seen)}
        if before is not None and after is not None:
            facts["on the wire"] = after - before
        self.note(**{f"bytes sent: {name}": facts})

    # --- decoding

    def decoding(self) -> None:
        """Each shape on one device, and cut over all."""
        for name, config in DECODED[self.device.type].items():
            for batch in self.asked.batches if name in self.asked.shapes else ():
                texts = [flat(self.decode(name, config, batch, way)) for way in ("one device", "tensor parallel")]
                same = sum(a == b for a, b in zip(*texts, strict=False)) / max(1, len(texts[1]))
                self.note(**{f"tokens alike: {name}, batch {batch}": same})

    def decode(self, name: str, config: ModelConfig, batch: int, way: str) -> list[list[int]]:
        """Milliseconds a token; returns what was written, which is nothing in a process that had nothing to do."""
        prompt, new = (128, 128) if self.on_gpu else (8, 8)
        cut = way == "tensor parallel"
        torch.manual_seed(0)
        texts: list[list[int]] = []
        with self.device:
            model = Decoder(replace(config, max_length=max(config.max_length, prompt + new)))
        model.to(self.dtype).requires_grad_(False)
        if cut:
            mesh = init_device_mesh(self.device.type, (self.world.size,))
            distributed.tensor_parallel(model, mesh)
        weights = sum(p.to_local().nbytes if hasattr(p, "to_local") else p.nbytes for p in model.parameters())
        if cut or self.world.is_first:
            blocks = batch * (-(-(prompt + new) // 16) + 1)
            llm = LLM(
                model, blocks=blocks, block_size=16, max_num_seqs=batch, budget=max(512, batch), prefix_cache=False
            )
            generator = torch.Generator().manual_seed(1)
            prompts = torch.randint(0, config.vocab_size, (batch, prompt), generator=generator).tolist()
            answer = lambda count: [r.new_tokens for r in llm.generate(prompts, Params(max_new_tokens=count))]  # noqa: E731
            answer(4)
            times = []
            for _ in range(5):
                seconds = []
                for count in (1, new):
                    start = time.perf_counter()
                    texts = answer(count)
                    seconds.append(time.perf_counter() - start)
                times.append((seconds[1] - seconds[0]) / (new - 1))
            self.add(
                Timing.of(times),
                case=f"a token of {name}, batch {batch}",
                contestant=way,
                bytes=weights,
                unbounded="the rate of a copy was not measured here",
                all_reduces=2 * config.layers + 1 if cut else 0,
            )
            for graphs in (llm.engine.runner.graphs, llm.engine.runner.prompts):
                graphs.clear()  # a graph that sends must go before the link that it sends over
            del llm, answer
        del model
        self.free()
        settle(self.device)
        return texts

    # --- the ring

    def ring(self) -> None:
        """Attention, forward and backward, over texts that are cut along their tokens."""
        heads, head_dim, kv_heads = (16, 128, 4) if self.on_gpu else (2, 16, 1)
        self.check_ring(heads, head_dim, kv_heads)
        forms = {"one device": partial(flash_attention, causal=True)}
        too_long = 2**18  # tokens from which on one device alone would take minutes
        for length in self.asked.lengths if self.on_gpu else (min(2048, *self.asked.lengths),):
            layout = distributed.zigzag(length, self.world.size)
            forms["ring"] = partial(distributed.ring_attention, layout=layout, causal=True)
            mine = len(distributed.positions_of(layout[self.world.rank]))
            for way, tokens in (("one device", length), ("ring", mine)):
                if way == "one device" and length > too_long:
                    continue
                tensors = self.made_up(tokens, heads, kv_heads, head_dim)
                calls = {"calls": 10} if length < too_long else {"calls": 3, "warmup": 1}
                peer = {"alone": "one device would take minutes"} if length > too_long else {}
                # 2 products forward and 5 backward of T x S x head_dim; causality leaves half of each
                for what, call, products in (
                    ("forward", forward_only, 2),
                    ("forward and backward", forward_and_backward, 7),
                ):
                    timing = shared_seconds(partial(call, forms[way], *tensors), self.device, **calls)
                    self.add(
                        timing,
                        case=f"causal attention, {length:,} tokens, {what}",
                        contestant=way,
                        flops=products * heads * head_dim * length**2 / (1 if way == "one device" else self.world.size),
                        limit=self.limit,
                        **peer,
                    )
                if way == "ring":
                    counts = costs.Counts(0, 0, 1, 0, kv_heads * head_dim, 0, 0, batch=1, context=length)
                    counted = costs.ring_bytes(counts, self.world.size, itemsize=self.dtype.itemsize)
                    self.sent(f"ring of {length:,}", partial(forward_and_backward, forms[way], *tensors), counted)
                del tensors
                self.free()

    def made_up(self, tokens: int, heads: int, kv_heads: int, head_dim: int) -> list[torch.Tensor]:
        """q, k, v and the gradient of out, for so many tokens."""
        torch.manual_seed(self.world.rank)
        make = lambda h: torch.randn(1, h, tokens, head_dim, device=self.device, dtype=self.dtype)  # noqa: E731
        return [*(make(h).requires_grad_() for h in (heads, kv_heads, kv_heads)), make(heads)]

    def check_ring(self, heads: int, head_dim: int, kv_heads: int) -> None:
        """How far the ring is from attention in float64, ragged and causal; beside it, how far one device is."""
        length = 1021
        generator = torch.Generator().manual_seed(2)
        full = [torch.randn(1, h, length, head_dim, generator=generator) for h in (heads, kv_heads, kv_heads, heads)]
        full = [x.to(self.device, self.dtype) for x in full]
        exact = values_and_gradients(lambda *x: attend(*x, causal=True), [x.double() for x in full])
        whole = values_and_gradients(lambda *x: flash_attention(*x, causal=True), full)
        layout = distributed.zigzag(length, self.world.size)
        mine = layout[self.world.rank]
        form = lambda *x: distributed.ring_attention(*x, layout=layout, causal=True)  # noqa: E731
        ours = values_and_gradients(form, [distributed.own_part(x, mine, 2) for x in full])
        apart = torch.zeros(2, dtype=torch.float64)
        for e, w, o in zip(exact, whole, ours, strict=True):
            near = distributed.own_part(e, mine, 2)
            ratios = ((o.double() - near).abs().max() / e.abs().max(), (w.double() - e).abs().max() / e.abs().max())
            apart = torch.maximum(apart, torch.stack(ratios).cpu())
        dist.all_reduce(apart, op=dist.ReduceOp.MAX)
        self.note(ring_differs_by=apart[0].item(), one_device_differs_by=apart[1].item())


def flat(texts: list[list[int]]) -> list[int]:
    """All tokens of some texts."""
    return [token for text in texts for token in text]


def forward_only(form: Callable, q, k, v, dout) -> None:
    """Attention without gradients."""
    with torch.no_grad():
        form(q, k, v)


def forward_and_backward(form: Callable, q, k, v, dout) -> None:
    """Attention and the gradients of its inputs."""
    torch.autograd.grad(form(q, k, v), (q, k, v), dout)


def values_and_gradients(form: Callable, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """out, dq, dk and dv of (q, k, v, dout)."""
    *inputs, dout = (x.detach().requires_grad_() for x in tensors)
    out = form(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout.detach())]


def link_counters(index: int) -> int | None:
    """Bytes that a GPU's NVLinks have sent so far, by the driver's counters; None where it does not say."""
    try:
        told = subprocess.run(["nvidia-smi", "nvlink", "-gt", "d", "-i", str(index)], capture_output=True, text=True)
    except OSError:
        return None
    sent = [int(n) for n in re.findall(r"Data Tx:\s*(\d+)\s*KiB", told.stdout)]
    return sum(sent) * 1024 if sent else None


if __name__ == "__main__":
    sys.exit(main())
