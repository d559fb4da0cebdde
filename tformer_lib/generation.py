"""Generation: prefill the prompt, then decode token by token, choosing each by the rules asked for.

    generate(model, [[1, 2, 3], [4, 5]], max_new_tokens=20)                                  # greedy
    generate(model, prompts, max_new_tokens=20, temperature=0.8, top_p=0.95, seed=1)         # sampled
    for tokens in stream(model, [prompt], max_new_tokens=20): ...                            # as they come

A row's text does not depend on what else is in the batch: prompts of different lengths are padded on the right and the
cache never sees the padding, and row i draws from its own random stream, seeded with ``seed + i``.

On a GPU, a small model's decode step is bound by launching its kernels. ``cuda_graph=True`` records the step once and
replays it with one launch (:class:`StaticStep`); ``compile=True`` fuses its kernels first.
"""

import math
import numbers
import operator
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor, nn

from tformer_lib import profiling
from tformer_lib.kv_cache import CacheShape, KVCache, ModelCache, PreallocatedCache, cache_bytes
from tformer_lib.transformer import evaluating

STEPS_BETWEEN_CHECKS = 32
"""On a GPU, whether all rows have stopped is asked only so often: asking waits for the device."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits. The rules apply in the order of the fields that follow ``seed``.

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    temperature: float = 0.0
    """What logits are divided by; 0 always takes the most likely token (greedy)."""
    seed: int | Sequence[int] = 0
    """Row i draws from a stream seeded with seed + i, or with seed[i]."""
    repetition_penalty: float = 1.0
    """Logits of tokens seen in the row are divided by it where positive, else multiplied (Keskar et al. 2019, CTRL)."""
    top_k: int | None = None
    """Keep the k most likely tokens (Fan et al. 2018)."""
    top_p: float | None = None
    """Keep the fewest tokens whose probabilities add up to top_p (the nucleus; Holtzman et al. 2020)."""
    min_p: float | None = None
    """Keep tokens at least min_p times as likely as the likeliest (Nguyen et al. 2024)."""

    def __post_init__(self):
        for name, kind, wanted, holds in RANGES:
            value = getattr(self, name)
            if value is None and name in ("top_k", "top_p", "min_p"):
                continue
            number = check_number(name, value, kind)
            if not holds(float32(number) if isinstance(number, float) else number):
                raise ValueError(f"{name} must be {wanted}, got {value}")
            object.__setattr__(self, name, number)
        if isinstance(self.seed, Sequence) and not isinstance(self.seed, str):
            seed = tuple(check_number("each seed", seed, numbers.Integral) for seed in self.seed)
        elif isinstance(self.seed, numbers.Integral):
            seed = int(self.seed)
        else:
            raise ValueError(f"seed must be a whole number, or one for each prompt, got {self.seed!r}")
        object.__setattr__(self, "seed", seed)


RANGES = (
    ("temperature", numbers.Real, "at least 0 and finite in float32", lambda x: 0 <= x < math.inf),
    ("repetition_penalty", numbers.Real, "greater than 0 and finite in float32", lambda x: 0 < x < math.inf),
    ("top_k", numbers.Integral, "at least 1", lambda x: x >= 1),
    ("top_p", numbers.Real, "in (0, 1]", lambda x: 0 < x <= 1),
    ("min_p", numbers.Real, "in [0, 1]", lambda x: 0 <= x <= 1),
)
"""What the fields of :class:`Sampling` may be, as float32, in which they meet the logits."""


def check_number(name: str, value, kind: type) -> int | float:
    """The value as an int (``numbers.Integral``) or as a float (``numbers.Real``), as which it will be used.

    Raises:
        ValueError: it is no number of that kind, or larger than a float can be.
    """
    whole = kind is numbers.Integral
    if isinstance(value, bool) or not isinstance(value, kind):
        raise ValueError(f"{name} must be a {'whole ' if whole else ''}number, got {value!r}")
    try:
        return int(value) if whole else float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite in float32, got a number past what floats can say") from None


def float32(number: float) -> float:
    """The number as it is in float32: too large a one is infinite, too small a one is 0."""
    return torch.tensor(number, dtype=torch.float32).item()


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that were seen less likely.

    Args:
        logits: (batch, vocab_size).
        seen: (batch, vocab_size) boolean, True for tokens of the prompt and of the text so far.
        penalty: above 1 discourages, below 1 encourages; as strong as it may be, finite logits stay finite.

    Returns:
        (batch, vocab_size), float64 for float64 and float32 for all others.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    most = torch.finfo(logits.dtype).max
    changed = torch.where(logits > 0, logits / penalty, logits * penalty).clamp(-most, most)
    return torch.where(seen, changed, logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """-inf for all but the k largest logits of each row; ties with the k-th stay. (batch, vocab_size) -> the same."""
    kth = logits.topk(min(k, logits.shape[-1])).values[:, -1:]  # (batch, 1)
    return logits.masked_fill(logits < kth, float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """-inf for all but the fewest most likely tokens whose probabilities reach p. (batch, vocab_size) -> the same."""
    ordered, order = logits.sort(descending=False)
    beyond = ordered.softmax(-1).cumsum(-1) <= 1 - p  # the unlikely end, which p does without
    beyond[:, -1] = False  # the likeliest token always stays
    return logits.masked_fill(beyond.scatter(1, order, beyond), float("-inf"))


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """-inf for tokens less than p times as likely as the likeliest. (batch, vocab_size) -> the same."""
    likely = logits.softmax(-1)
    return logits.masked_fill(likely < p * likely.amax(-1, keepdim=True), float("-inf"))


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """The probabilities that a token is drawn from: temperature, then top-k, top-p and min-p, in transformers' order.

    Args:
        logits: (batch, vocab_size), the repetition penalty applied.
        sampling: the rules; the temperature must be above 0.

    Returns:
        (batch, vocab_size) float64; temperature and rules are applied in float32, or in float64 for float64 logits.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    coldest = torch.finfo(logits.dtype).tiny  # colder, and a quotient is 0 / 0
    logits = (logits - logits.amax(-1, keepdim=True)) / max(sampling.temperature, coldest)  # at most 0: no overflow
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None and sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = keep_min_p(logits, sampling.min_p)
    return logits.double().softmax(-1)


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The token at which the running sum of probabilities passes the uniform number (inverse transform sampling).

    One number per row decides its token, so that rows keep random streams of their own, without one generator each
    on the device.

    Args:
        probabilities: (batch, vocab_size) float64.
        uniforms: (batch,) float64 in [0, 1).

    Returns:
        (batch,) int64.
    """
    sums = probabilities.cumsum(-1)  # (batch, vocab_size)
    target = uniforms[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, target, right=True).squeeze(1).clamp_max(probabilities.shape[-1] - 1)


class Sampler:
    """Chooses the next token of every row, and remembers what it needs from step to step.

    Args:
        sampling: the rules.
        prompts: the rows' tokens so far.
        steps: how many tokens will be drawn at most.
        vocab_size: how many tokens there are.
        device: where the logits will be.
    """

    def __init__(
        self, sampling: Sampling, prompts: Sequence[Sequence[int]], steps: int, vocab_size: int, device: torch.device
    ):
        self.sampling, self.step = sampling, 0
        self.seen = seen_tokens(prompts, vocab_size).to(device) if sampling.repetition_penalty != 1 else None
        if sampling.temperature > 0:
            streams = [random_stream(seed) for seed in row_seeds(sampling.seed, len(prompts))]
            numbers = [[stream.random() for _ in range(steps)] for stream in streams]
            self.uniforms = torch.tensor(numbers, dtype=torch.float64).to(device)  # (batch, steps)

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits (batch, vocab_size) -> tokens (batch,) int64. Nothing here waits for a GPU."""
        if self.seen is not None:
            logits = penalise_repetition(logits, self.seen, self.sampling.repetition_penalty)
        if self.sampling.temperature > 0:
            tokens = draw(distribution(logits, self.sampling), self.uniforms[:, self.step])
        else:
            tokens = logits.argmax(-1)
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        self.step += 1
        return tokens


def seen_tokens(prompts: Sequence[Sequence[int]], vocab_size: int) -> Tensor:
    """(batch, vocab_size) boolean, True for the tokens of each prompt."""
    seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        seen[row, list(prompt)] = True
    return seen


def row_seeds(seed: int | Sequence[int], batch: int) -> list[int]:
    """The seed of each row: seed + i, or the i-th of those given; refuses another number of seeds than rows."""
    if isinstance(seed, int):
        return [seed + row for row in range(batch)]
    if len(seed) != batch:
        raise ValueError(f"seed must be one number or one per prompt: {batch} prompts, {len(seed)} seeds")
    return list(seed)


def random_stream(seed: int) -> Random:
    """The random numbers of one row: different ones for each seed, while ``Random`` knows a seed but for its sign."""
    return Random(seed if seed >= 0 else str(seed))


class StaticStep:
    """One decode step whose shapes and addresses never change, so that it can be recorded once and replayed.

    On a GPU the step is captured in a CUDA graph: its hundred or more kernels then cost one launch. The lengths live on
    the device and the step advances them itself, so one recording serves every length up to the cache's capacity.
    Elsewhere, or with ``capture=False``, the same step runs uncaptured.

    Args:
        model: a ``Decoder``; a step runs in evaluation mode.
        cache: a cache with ``static_shapes`` (preallocated or ring), still empty: recording writes to it.
        compile: fuse the step's kernels with ``torch.compile`` first; its first call takes tens of seconds.
        capture: record a CUDA graph; by default where the cache is on a GPU.
        backend: the compiler's backend.
    """

    def __init__(
        self,
        model: nn.Module,
        cache: KVCache,
        *,
        compile: bool = False,
        capture: bool | None = None,
        backend: str = "inductor",
    ):
        if not hasattr(cache, "static_shapes"):
            raise ValueError(f"a static step needs a preallocated or a ring cache, got {type(cache).__name__}")
        if any(cache.host_lengths):
            raise ValueError(f"a static step is recorded on an empty cache, this one holds {cache.host_lengths} tokens")
        self.model, self.cache = model, cache
        self.tokens = torch.zeros(cache.shape.batch, 1, dtype=torch.int64, device=cache.lengths.device)
        self.forward = lambda tokens: model(tokens, cache=cache)[:, -1]
        if compile:
            self.forward = torch.compile(self.forward, fullgraph=True, backend=backend)
        self.graph: torch.cuda.CUDAGraph | None = None
        if cache.lengths.is_cuda if capture is None else capture:
            self._capture()

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Append tokens (batch, 1) int64 and return the logits (batch, vocab_size) of the next.

        The logits of a captured step are overwritten by the next call.
        """
        self.cache.check_room([n + 1 for n in self.cache.host_lengths])
        if self.graph is None:
            logits = self._run(tokens)
        else:
            self.tokens.copy_(tokens)
            self.graph.replay()
            logits = self.logits
        self.cache.replayed()
        return logits

    def _run(self, tokens: Tensor) -> Tensor:
        with evaluating(self.model), self.cache.static_shapes():
            return self.forward(tokens)

    @torch.no_grad()
    def _capture(self) -> None:
        """Warm up on a side stream, as CUDA graphs ask, record, and leave the cache empty again."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.cache.reset()
                self._run(self.tokens)
        torch.cuda.current_stream().wait_stream(side)
        self.cache.reset()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self._run(self.tokens)
        self.cache.reset()


@contextmanager
def changing_shapes() -> Iterator[None]:
    """PyTorch's attention without cuDNN, which prepares a plan for every new shape, and here each step has one.

    On a GPU where PyTorch prefers cuDNN, preparing takes tens of milliseconds, each step's attention microseconds.
    The switch is the whole process's: the first that enters turns it off, the last that leaves puts it back.
    """
    with SWITCH.lock:
        if SWITCH.inside == 0:
            SWITCH.preferred = torch.backends.cuda.cudnn_sdp_enabled()
            torch.backends.cuda.enable_cudnn_sdp(False)
        SWITCH.inside += 1
    try:
        yield
    finally:
        with SWITCH.lock:
            SWITCH.inside -= 1
            if SWITCH.inside == 0:
                torch.backends.cuda.enable_cudnn_sdp(SWITCH.preferred)


class Switch:
    """How many are inside :func:`changing_shapes`, and how the first of them found things."""

    def __init__(self):
        self.lock, self.inside, self.preferred = threading.Lock(), 0, True


SWITCH = Switch()


@torch.no_grad()
@changing_shapes()
def prefill(model: nn.Module, prompts: Sequence[Sequence[int]], cache: KVCache, *, chunk: int | None = None) -> Tensor:
    """Put the prompts into the cache.

    Args:
        model: a ``Decoder``.
        prompts: one sequence of tokens per row; they may differ in length.
        cache: appended to.
        chunk: how many tokens a pass takes at most; all at once if not given. Smaller chunks bound the memory of a
            pass (its logits and scores), and let a server decode other requests in between.

    Returns:
        (batch, vocab_size) the logits after each prompt's last token.
    """
    tokens, counts = pad(prompts, cache.lengths.device)
    size = tokens.shape[1] if chunk is None else check_number("chunk", chunk, numbers.Integral)
    if size < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    last: list[Tensor | None] = [None] * len(counts)
    for start in range(0, tokens.shape[1], size):
        part = tokens[:, start : start + size]  # (batch, up to size)
        here = [min(max(count - start, 0), part.shape[1]) for count in counts]
        if min(here) < part.shape[1]:
            cache.expect(here)
        with evaluating(model):
            logits = model(part, cache=cache)  # (batch, up to size, vocab_size)
        for row, count in enumerate(counts):
            if start < count <= start + size:
                last[row] = logits[row, count - start - 1]
    return torch.stack(last)


def pad(prompts: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> tuple[Tensor, list[int]]:
    """Prompts to one (batch, longest) int64 tensor, padded with 0 on the right, and how many tokens each has."""
    prompts = rows_of(prompts)
    counts = [len(prompt) for prompt in prompts]
    tokens = torch.tensor([prompt + [0] * (max(counts) - len(prompt)) for prompt in prompts], dtype=torch.int64)
    return tokens.to(device), counts


def rows_of(prompts: Sequence[Sequence[int]] | Tensor) -> list[list[int]]:
    """Prompts as lists of int; refuses none at all, an empty one, and one that is no sequence of whole numbers."""
    rows = prompts.tolist() if isinstance(prompts, Tensor) else list(prompts)
    if not rows:
        raise ValueError("there must be at least one prompt")
    return [tokens_of(row, f"prompt {place}") for place, row in enumerate(rows)]


def tokens_of(row: Sequence[int], name: str) -> list[int]:
    """A sequence of tokens as a list of int; ``name`` is what an error calls it."""
    try:
        tokens = [operator.index(token) for token in (row.tolist() if isinstance(row, Tensor) else row)]
    except TypeError:
        raise ValueError(f"prompts must be a list of token lists, but {name} is {row!r}") from None
    if not tokens:
        raise ValueError(f"{name} is empty: there is no token to continue")
    return tokens


@torch.no_grad()
def decode(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_tokens: Sequence[int] = (),
    cache: KVCache | None = None,
    chunk: int | None = None,
    cuda_graph: bool = False,
    compile: bool = False,
    check_every: int = 1,
    **sampling,
) -> Iterator[Tensor]:
    """The loop behind :func:`generate` and :func:`stream`: yields the next token of every row, (batch,) on the device.

    Rows that have stopped go on with tokens that mean nothing, until all have, which is looked at every
    ``check_every`` steps. The other arguments are those of :func:`generate`.
    """
    rules, prompts, stop_tokens = Sampling(**sampling), rows_of(prompts), stops_of(stop_tokens)
    check_lengths(model, prompts, max_new_tokens)
    check_vocabulary(prompts, model.config.vocab_size)
    with torch.inference_mode(False):  # what is made here is written to at every step, whatever mode that runs in
        cache = cache_for(model, prompts, max_new_tokens) if cache is None else cache
        check_cache(cache, len(prompts))
        device = cache.lengths.device
        stops = torch.tensor(stop_tokens, dtype=torch.int64, device=device)
        stopped = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        sampler = Sampler(rules, prompts, max_new_tokens, model.config.vocab_size, device)
        step = decode_step(model, cache, cuda_graph=cuda_graph, compile=compile)
    with profiling.range("prefill"):
        logits = prefill(model, prompts, cache, chunk=chunk)  # (batch, vocab_size)
    for done in range(1, max_new_tokens + 1):
        with profiling.range("sampling"):
            tokens = sampler(logits)  # (batch,)
        yield tokens
        if stop_tokens:
            stopped |= torch.isin(tokens, stops)
            if done % check_every == 0 and stopped.all():
                return
        if done < max_new_tokens:
            with profiling.range("decode"):
                logits = step(tokens[:, None])


def cache_for(model: nn.Module, prompts: list[list[int]], max_new_tokens: int) -> KVCache:
    """A cache of the right size; refuses one that the device has no memory for, before asking for it."""
    shape, capacity = CacheShape.of(model, len(prompts)), max(map(len, prompts)) + max_new_tokens
    what = f"a cache of {len(prompts)} rows of {capacity} tokens"
    needed = len(prompts) * cache_bytes(model.config, capacity, itemsize=shape.dtype.itemsize)
    check_memory(what, needed, shape.device)
    if set(model.config.types_of_layers) == {"full"}:
        return PreallocatedCache(shape, capacity)
    return ModelCache.of(model, len(prompts), capacity)


def check_memory(what: str, needed: int, device: torch.device | str) -> None:
    """Refuse what takes more bytes than the device has at all: on a CPU it would be promised, and the process killed.

    Raises:
        ValueError: the message names both.
    """
    device = torch.device(device)
    if device.type == "cuda":
        there = torch.cuda.mem_get_info(device)[1]
    else:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else sys.maxsize
    if needed > there:
        raise ValueError(f"{what} takes {needed / 2**30:,.1f} GiB, {device} has {there / 2**30:,.1f} GiB")


def check_cache(cache: KVCache, rows: int) -> None:
    """Refuse a cache for another number of rows, and one that holds something: it would be read on, as if asked for."""
    if cache.shape.batch != rows:
        raise ValueError(f"the cache was made for {cache.shape.batch} rows, there are {rows} prompts")
    if any(cache.host_lengths):
        raise ValueError(f"the cache holds {cache.host_lengths} tokens already; reset() empties it")


def decode_step(
    model: nn.Module, cache: KVCache, *, cuda_graph: bool = False, compile: bool = False
) -> Callable[[Tensor], Tensor]:
    """The function that appends tokens (batch, 1) and returns the next logits (batch, vocab_size).

    Raises:
        ValueError: a CUDA graph was asked for, and the cache is on no GPU.
    """
    if cuda_graph and not cache.lengths.is_cuda:
        raise ValueError(f"cuda_graph needs a model on a GPU, this one is on {cache.lengths.device}")
    if cuda_graph or compile:
        return StaticStep(model, cache, compile=compile, capture=cuda_graph)

    def step(tokens: Tensor) -> Tensor:
        with evaluating(model), changing_shapes():
            return model(tokens, cache=cache)[:, -1]

    return step


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_tokens: Sequence[int] = (),
    cache: KVCache | None = None,
    chunk: int | None = None,
    cuda_graph: bool = False,
    compile: bool = False,
    **sampling,
) -> list[list[int]]:
    """Continue each prompt.

    Args:
        model: a ``Decoder``.
        prompts: one sequence of tokens per row; they may differ in length.
        max_new_tokens: the most tokens to add to a row.
        stop_tokens: a row ends with the first of these, which is its last token.
        cache: an empty cache for as many rows as there are prompts; one of the right size if not given.
        chunk: prefill the prompts in pieces of at most so many tokens.
        cuda_graph: record the decode step in a CUDA graph and replay it (GPU only).
        compile: run the decode step through ``torch.compile``.
        sampling: the fields of :class:`Sampling`: temperature, seed, repetition_penalty, top_k, top_p, min_p.

    Returns:
        The new tokens of each row, without its prompt.

    Raises:
        ValueError: a prompt is empty or holds a token that the model does not know, a rule is out of its range, or the
            cache was made for other rows, holds something, is full, or (before any work) the model's learned positions
            or the device's memory do not suffice.
    """
    device, stop_tokens = next(model.parameters()).device, stops_of(stop_tokens)
    steps = decode(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens,
        cache=cache,
        chunk=chunk,
        cuda_graph=cuda_graph,
        compile=compile,
        check_every=STEPS_BETWEEN_CHECKS if device.type == "cuda" else 1,
        **sampling,
    )
    tokens = torch.stack(list(steps), dim=1)  # (batch, steps)
    return [cut(row, stop_tokens) for row in tokens.tolist()]


def stream(
    model: nn.Module, prompts: Sequence[Sequence[int]], *, stop_tokens: Sequence[int] = (), **options
) -> Iterator[list[int | None]]:
    """Like :func:`generate`, but yields after each step the new token of every row, None for rows that have stopped."""
    live, stops = None, stops_of(stop_tokens)
    for tokens in decode(model, prompts, stop_tokens=stops, **options):
        row_tokens = tokens.tolist()
        live = [True] * len(row_tokens) if live is None else live
        yield [token if alive else None for token, alive in zip(row_tokens, live, strict=True)]
        live = [alive and token not in stops for token, alive in zip(row_tokens, live, strict=True)]


@torch.no_grad()
def generate_uncached(model: nn.Module, prompt: Sequence[int], *, max_new_tokens: int) -> list[int]:
    """Greedy generation with no cache: each token costs a pass over the whole text. The oracle of the tests.

    Args:
        model: a ``Decoder``.
        prompt: the tokens of one row.
        max_new_tokens: how many tokens to add.
    """
    device = next(model.parameters()).device
    tokens = torch.tensor([list(prompt)], device=device)  # (1, T)
    with evaluating(model), changing_shapes():
        for _ in range(max_new_tokens):
            best = model(tokens)[:, -1].argmax(-1, keepdim=True)  # (1, 1)
            tokens = torch.cat([tokens, best], dim=1)
    return tokens[0, len(prompt) :].tolist()


def cut(tokens: list[int], stop_tokens: Sequence[int]) -> list[int]:
    """The tokens up to the first stop token, that one included."""
    ends = [index for index, token in enumerate(tokens) if token in stop_tokens]
    return tokens[: ends[0] + 1] if ends else tokens


def check_lengths(model: nn.Module, prompts: list[list[int]], max_new_tokens: int) -> None:
    """Refuse what a table of learned positions cannot hold, before any work is done."""
    check_number("max_new_tokens", max_new_tokens, numbers.Integral)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    longest, limit = max(len(prompt) for prompt in prompts), model.config.max_length
    needed = longest + max_new_tokens - 1  # the last new token is not fed back
    if model.config.positions == "learned" and needed > limit:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones need {needed} positions, "
            f"the model has learned {limit}"
        )


def check_vocabulary(prompts: list[list[int]], vocab_size: int) -> None:
    """Refuse tokens that the model does not know, which a GPU would report as an assertion far from here."""
    for place, prompt in enumerate(prompts):
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            strange = next(token for token in prompt if not 0 <= token < vocab_size)
            raise ValueError(f"prompt {place} holds token {strange}, the model knows 0 to {vocab_size - 1}")


def stops_of(stop_tokens: Sequence[int]) -> list[int]:
    """Stop tokens as a list of int; refuses what is no sequence of whole numbers."""
    try:
        return [
            operator.index(token)
            for token in (stop_tokens.tolist() if isinstance(stop_tokens, Tensor) else stop_tokens)
        ]
    except TypeError:
        raise ValueError(f"stop_tokens must be a list of tokens, got {stop_tokens!r}") from None
