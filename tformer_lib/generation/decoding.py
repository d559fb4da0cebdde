"""The loop: prefill the prompts, then decode token by token."""

import numbers
import operator
import os
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from tformer_lib import profiling
from tformer_lib.contract import counted
from tformer_lib.generation.sampling import Sampler, Sampling, check_number
from tformer_lib.generation.steps import changing_shapes, decode_step
from tformer_lib.kv_cache import CacheShape, KVCache, ModelCache, PreallocatedCache, cache_bytes
from tformer_lib.transformer import evaluating

STEPS_BETWEEN_CHECKS = 32
"""On a GPU, whether all rows have stopped is asked only so often: asking waits for the device."""


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
        cache = cache_of(model, len(prompts), max(map(len, prompts)) + max_new_tokens) if cache is None else cache
        check_cache(cache, len(prompts))
        device = cache.lengths.device
        stops = torch.tensor(stop_tokens, dtype=torch.int64, device=device)
        sampler = Sampler(rules, prompts, max_new_tokens, model.config.vocab_size, device)
        step = decode_step(model, cache, cuda_graph=cuda_graph, compile=compile)
    with profiling.range("prefill"):
        logits = prefill(model, prompts, cache, chunk=chunk)  # (batch, vocab_size)
    yield from tokens_after(logits, sampler, step, count=max_new_tokens, stops=stops, check_every=check_every)


@torch.no_grad()
def tokens_after(
    logits: Tensor,
    sampler: Sampler,
    step: Callable[[Tensor], Tensor],
    *,
    count: int,
    stops: Tensor,
    check_every: int = 1,
) -> Iterator[Tensor]:
    """Choose a token, append it, and so on: yields the tokens of all rows, (batch,) each, until all have stopped.

    Args:
        logits: (batch, vocab_size), after what the cache holds.
        sampler: chooses.
        step: what :func:`decode_step` returns.
        count: the most tokens of a row.
        stops: (n,) int64, the tokens that end a row.
        check_every: how many steps pass from one look at whether all have stopped to the next.
    """
    stopped = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    for done in range(1, count + 1):
        with profiling.range("sampling"):
            tokens = sampler(logits)  # (batch,)
        yield tokens
        if len(stops):
            stopped = stopped | torch.isin(tokens, stops)
            if done % check_every == 0 and stopped.all():
                return
        if done < count:
            with profiling.range("decode"):
                logits = step(tokens[:, None])


def cache_of(model: nn.Module, rows: int, capacity: int) -> KVCache:
    """A cache for a model's rows of at most ``capacity`` tokens.

    Raises:
        ValueError: the device has no memory for it; none was asked for then.
    """
    shape = CacheShape.of(model, rows)
    needed = rows * cache_bytes(model.config, capacity, itemsize=shape.dtype.itemsize)
    check_memory(f"a cache of {counted(rows, 'row')} of {counted(capacity, 'token')}", needed, shape.device)
    if set(model.config.types_of_layers) == {"full"}:
        return PreallocatedCache(shape, capacity)
    return ModelCache.of(model, rows, capacity)


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
        raise ValueError(f"the cache was made for {counted(cache.shape.batch, 'row')}, the prompts are {rows}")
    if any(cache.host_lengths):
        raise ValueError(f"the cache holds {cache.host_lengths} tokens already; reset() empties it")


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
            f"with {max_new_tokens} new tokens a prompt of {longest} needs {needed} positions, "
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
