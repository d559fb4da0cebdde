"""What a KV cache saves, and where a naive one saves nothing.

    python -m benchmarks.kv_cache --device cuda     # GPT-2's 124M shape, batch 1, 1,024 new tokens
    python -m benchmarks.kv_cache --device cuda --contexts     # a token at several context lengths, from 32 to 2,000
    python -m benchmarks.kv_cache --device cpu      # a small model, both

The theory: without a cache, token n costs a pass over n tokens. With one it costs a pass over one token, which reads
every weight and every cached key and value once: at best (weights + cache) / bandwidth. On a GPU a small model's pass
over one token and over a thousand take about the same time when each kernel is launched from Python, because launching
is what takes the time; recording the step in a CUDA graph removes that.

Every variant generates greedily from the same prompt, in the same run.
"""

import contextlib
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from benchmarks.harness import (
    Options,
    Report,
    Timing,
    command_line,
    copy_rate,
    matmul_rate,
    measure,
    profiled,
    synchronize,
)
from tformer_lib.generation import StaticStep, changing_shapes, decode_step, generate, generate_uncached, prefill
from tformer_lib.kv_cache import CacheShape, GrowingCache, KVCache, PreallocatedCache, RingCache, pass_cost
from tformer_lib.transformer import Decoder, ModelConfig, count_parameters

GPT2 = ModelConfig(vocab_size=50257, max_length=2048, width=768, layers=12, heads=12, feed_forward="gelu_tanh")
SMALL = ModelConfig(vocab_size=512, max_length=2048, width=192, layers=4, heads=6, feed_forward="gelu_tanh")

THEIRS = "transformers generate, default cache"
PEERS = (THEIRS + ", cuDNN off", THEIRS, "uncached", "cached, preallocated", "cached")


@dataclass(frozen=True)
class CacheOptions(Options):
    """What a cache saves."""

    new_tokens: int | None = None
    """Tokens to generate; by default 1,024 on a GPU, 192 on a CPU."""
    contexts: bool = False
    """Measure one token at several context lengths alone; the file is ``kv_cache-contexts.json``."""
    nvtx: bool = False
    """Measure nothing: decode a few tokens for a profiler."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command_line(run, arguments, options=CacheOptions, topic="kv_cache", description=__doc__)


def run(args: CacheOptions) -> None:
    """Run every variant; one that fails is recorded with its error, and the others go on."""
    gpu = args.device == "cuda"
    bench = Bench(args, GPT2 if gpu else SMALL, torch.bfloat16 if gpu else torch.float32)
    if args.nvtx:
        return bench.decode_for_profiler()
    bench.note_sizes()
    if args.contexts:
        bench.contexts()
        return bench.report.finish()
    variants = bench.gpu_variants() if gpu else bench.cpu_variants()
    for variant in (*variants, bench.ratios):
        bench.try_out(variant)
    bench.report.finish()
    late = (bench.cuda_graph_compiled, bench.ratios) if gpu else (bench.contexts,)
    for variant in late:  # compiling takes the longest, so what is known is written before it
        bench.try_out(variant)
    bench.report.finish()


class Bench:
    """The model, the prompt, and the report that all variants share."""

    def __init__(self, args: CacheOptions, config: ModelConfig, dtype: torch.dtype):
        name = "kv_cache-contexts" if args.contexts else "kv_cache"
        self.report, self.device = Report(name, args.device, args.out, peers=PEERS), torch.device(args.device)
        self.config, self.dtype = config, dtype
        self.new_tokens = args.new_tokens or (1024 if args.device == "cuda" else 192)
        self.prompt = torch.randint(config.vocab_size, (32,)).tolist()
        self.model = Decoder(config).to(self.device, dtype).eval()
        self.seconds: dict[str, float] = {}
        self.texts: dict[str, list[int]] = {}

    def note_sizes(self) -> None:
        """Note the sizes and the bandwidth that the rows are compared with."""
        middle = len(self.prompt) + self.new_tokens // 2
        self.step_bytes = pass_cost(self.config, held=middle, new=1, itemsize=self.dtype.itemsize).bytes
        self.bandwidth, self.products = copy_rate(self.device), matmul_rate(self.device, self.dtype)
        self.report.note(
            parameters=count_parameters(self.model),
            dtype=str(self.dtype),
            prompt_tokens=len(self.prompt),
            new_tokens=self.new_tokens,
            bytes_per_token=self.shape().bytes_per_token,
            copy_bytes_per_second=self.bandwidth,
            matmul_flops_per_second=self.products,
            bandwidth_bound_seconds_per_token=self.step_bytes / self.bandwidth,
        )

    @torch.no_grad()
    def decode_for_profiler(self, held: int = 512, steps: int = 4) -> None:
        """A few eager steps after ``held`` tokens on the naive cache, which concatenates, inside NVTX ranges."""
        cache = GrowingCache(self.shape())
        prefill(self.model, torch.randint(self.config.vocab_size, (1, held)), cache)
        step, token = decode_step(self.model, cache), torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        profiled(lambda: [step(token) for _ in range(steps)], device=self.device)

    def shape(self) -> CacheShape:
        """One row of this model."""
        return CacheShape.of(self.model, 1)

    def preallocated(self, capacity: int | None = None) -> PreallocatedCache:
        """A cache with room for the whole run, as ``generate`` makes it, or for ``capacity`` tokens."""
        return PreallocatedCache(self.shape(), capacity or len(self.prompt) + self.new_tokens)

    def try_out(self, variant: Callable[[], None]) -> None:
        """Run a variant; if it fails, record why."""
        name = getattr(variant, "__name__", str(variant))
        try:
            begin = time.perf_counter()
            variant()
            self.report.note(**{f"wall_seconds_{name}": round(time.perf_counter() - begin, 2)})
        except Exception as error:
            traceback.print_exc()
            self.report.note(**{f"failed_{name}": f"{type(error).__name__}: {error}"[:500]})

    def gpu_variants(self) -> list[Callable[[], None]]:
        """What is launched kernel by kernel, what is recorded, and a peer."""
        ours = [self.same_text, self.plans, self.uncached, self.cached_preallocated, self.cuda_graph]
        return [*ours, self.transformers, self.transformers_without_cudnn]

    def cpu_variants(self) -> list[Callable[[], None]]:
        """What a machine without a GPU can show."""
        return [self.uncached, self.cached_growing, self.cached_preallocated, self.cached_ring]

    def uncached(self) -> None:
        """The plain loop: the whole text again for each token, kernels launched one by one."""
        self.time_run("uncached", lambda: generate_uncached(self.model, self.prompt, max_new_tokens=self.new_tokens))

    @torch.no_grad()
    def plans(self) -> None:
        """What PyTorch's own choice of attention costs when each call has a new length, and when all have the same."""
        for name, lengths in (("new lengths", range(300, 340)), ("one length", [300] * 40)):
            inputs = [torch.zeros(1, length, dtype=torch.int64, device=self.device) for length in lengths]
            self.model(inputs[0])
            synchronize(self.device)
            begin = time.perf_counter()
            for tokens in inputs:
                self.model(tokens)
            synchronize(self.device)
            milliseconds = (time.perf_counter() - begin) / len(inputs) * 1e3
            self.report.note(**{f"milliseconds_per_pass_by_default_{name.replace(' ', '_')}": round(milliseconds, 2)})

    def same_text(self) -> None:
        """In float64, where ties do not break at random: does a recorded step write the uncached loop's text?"""
        model = Decoder(SMALL).to(self.device, torch.float64).eval()
        prompt = [token % SMALL.vocab_size for token in self.prompt]
        wanted = generate_uncached(model, prompt, max_new_tokens=64)
        got = generate(model, [prompt], max_new_tokens=64, cuda_graph=True)
        self.report.note(cuda_graph_writes_the_uncached_text_in_float64=got == [wanted])

    def cached_growing(self) -> None:
        """Concatenation."""
        self.time_cached("cached, growing", GrowingCache(self.shape()))

    def cached_preallocated(self) -> None:
        """Kernels launched one by one, on one token."""
        self.time_cached("cached, preallocated", self.preallocated())

    def cached_ring(self) -> None:
        """A window of 64 tokens and 4 sinks."""
        self.time_cached("cached, ring of 4 + 64", RingCache(self.shape(), 64))

    def cuda_graph(self) -> None:
        """The step recorded once, one launch per token."""
        self.time_static("cached, CUDA graph", compile=False)

    def cuda_graph_compiled(self) -> None:
        """The step's kernels fused by torch.compile, then recorded."""
        self.time_static("cached, torch.compile + CUDA graph", compile=True)

    def transformers(self) -> None:
        """The same shape in transformers, by its generate with the default cache."""
        self.time_transformers(THEIRS)

    def transformers_without_cudnn(self) -> None:
        """The same, spared the plans that cuDNN makes for each new shape."""
        with changing_shapes():
            self.time_transformers(THEIRS + ", cuDNN off")

    def time_transformers(self, name: str) -> None:
        """Time its greedy generate, launched as its documentation does."""
        model = transformers_gpt2(self.config).to(self.device, self.dtype).eval()
        tokens = torch.tensor([self.prompt], device=self.device)

        def run(new: int = self.new_tokens) -> list[int]:
            out = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
            return out[0, len(self.prompt) :].tolist()

        run(16)
        import transformers

        self.report.note(transformers_version=transformers.__version__)
        self.time_run(name, run, keep_text=False)

    def time_cached(self, name: str, cache: KVCache) -> None:
        """Time decoding on a cache with an ordinary step."""
        step = decode_step(self.model, cache)
        self.time_run(name, lambda: self.decode(cache, step))

    def time_static(self, name: str, *, compile: bool) -> None:
        """Time decoding by a step recorded beforehand; what the recording took stands beside it."""
        cache, begin = self.preallocated(), time.perf_counter()
        step = StaticStep(self.model, cache, compile=compile)
        synchronize(self.device)
        setup = time.perf_counter() - begin
        self.time_run(name, lambda: self.decode(cache, step), setup_seconds=round(setup, 2))

    @torch.no_grad()
    def decode(self, cache: KVCache, step: Callable[[torch.Tensor], torch.Tensor]) -> list[int]:
        """Prefill, then a step for each token; nothing waits for the device before the end."""
        cache.reset()
        text, logits = [], prefill(self.model, [self.prompt], cache)
        for _ in range(self.new_tokens - 1):
            text.append(logits.argmax(-1, keepdim=True))  # (1, 1)
            logits = step(text[-1])
        text.append(logits.argmax(-1, keepdim=True))
        return torch.cat(text, dim=1)[0].tolist()

    def time_run(self, name: str, run: Callable[[], list[int]], *, keep_text: bool = True, **extra) -> None:
        """Time whole generations: a first one to warm up, then up to five; a slow one only once."""
        times = []
        while len(times) < 2 or (sum(times) < 3.0 and len(times) < 6):
            begin = time.perf_counter()
            text = run()
            synchronize(self.device)
            times.append(time.perf_counter() - begin)
            if times[0] > 12.0:
                break
        times = times[1:] or times  # the first run warms up
        self.seconds[name] = median(times)
        if keep_text:
            self.texts[name] = text
        timing = Timing(median(times), min(times), max(times), len(times))
        per_token = self.seconds[name] / self.new_tokens
        self.report.add(
            name,
            timing,
            case=f"{self.new_tokens:,} new tokens",
            contestant=name,
            bytes=self.step_bytes * self.new_tokens,
            limit=self.bandwidth,
            milliseconds_per_token=round(per_token * 1e3, 4),
            new_tokens=self.new_tokens,
            **extra,
        )

    @torch.no_grad()
    def contexts(self) -> None:
        """Time per token at several context lengths: with no cache, a cache, and a recorded step over 2,048 slots."""
        graph_step = StaticStep(self.model, self.preallocated(2048)) if self.device.type == "cuda" else None
        for context in (32, 128, 256, 512, 1024, 1536, 2000)[: 7 if self.device.type == "cuda" else 5]:
            text = torch.randint(self.config.vocab_size, (1, context), device=self.device)
            self.time_at(context, "uncached", lambda text=text: self.model(text))
            cache = self.preallocated(2048)
            step = decode_step(self.model, cache)
            self.time_at(context, "cached", self.steps_from(cache, step, text), steps=8)
            if graph_step is not None:
                recorded = self.steps_from(graph_step.cache, graph_step, text)
                self.time_at(context, "recorded", recorded, steps=8)

    def steps_from(self, cache: KVCache, step: Callable, text: torch.Tensor, steps: int = 8) -> Callable[[], None]:
        """A function that takes 8 steps after ``text`` and forgets them again."""
        cache.reset()
        prefill(self.model, text, cache)

        def run() -> None:
            for _ in range(steps):
                step(text[:, :1])
            cache.truncate([text.shape[1]])

        return run

    def time_at(self, context: int, kind: str, run: Callable[[], None], *, steps: int = 1) -> None:
        """Time one token at a context length, and put the cost model's count beside it."""
        timing = measure(run, device=self.device, seconds=0.25, warmup=0.05, min_calls=3)
        held, new = (0, context) if kind == "uncached" else (context, 1)
        cost = pass_cost(self.config, held=held, new=new, itemsize=self.dtype.itemsize)
        per_token = Timing(timing.median / steps, timing.p10 / steps, timing.p90 / steps, timing.calls)
        # a step with no cache is compared by its arithmetic, one with a cache by the bytes it reads
        by_flops = {"flops": cost.flops, "limit": self.products}
        work = by_flops if kind == "uncached" else {"bytes": cost.bytes, "limit": self.bandwidth}
        name, case = f"{kind}, context {context}", f"a token after {context}"
        self.report.add(name, per_token, case=case, contestant=kind, context=context, kind=kind, **work)

    def ratios(self) -> None:
        """How many times faster each variant is than the uncached loop and than transformers; do the texts agree?"""
        for name, seconds in self.seconds.items():
            facts = {}
            for base in ("uncached", THEIRS, THEIRS + ", cuDNN off"):
                if base in self.seconds and base != name:
                    facts[f"{name} / {base}"] = round(self.seconds[base] / seconds, 2)
            with contextlib.suppress(KeyError):
                facts[f"{name}: tokens until it differs from uncached"] = agreement(
                    self.texts["uncached"], self.texts[name]
                )
            self.report.note(**facts)


def agreement(a: list[int], b: list[int]) -> int:
    """How many tokens two texts begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def transformers_gpt2(config: ModelConfig) -> torch.nn.Module:
    """transformers' GPT-2 of the same shape, with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.max_length,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=config.heads,
            bos_token_id=0,
            eos_token_id=None,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
