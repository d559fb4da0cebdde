"""Serving: many requests on one model, each answered as if it were alone.

    llm = LLM(model, encoding)
    for request in llm.generate(["Once upon", "One day"], {"max_new_tokens": 40}): print(request.text)
    for piece in llm.stream(["Once upon"], {"max_new_tokens": 40}): print(piece.text, end="")

    engine = Engine(model, encoding)                    # the same, step by step
    request = engine.add("Once upon", {"stop": ["."]})
    while engine.busy: pieces = engine.step()

Each step runs one pass over whatever rows there are: the next token of those that write, a piece of the prompt of those
that are being read, up to a budget of tokens (Yu et al. 2022, "Orca"; Agrawal et al. 2023, "Sarathi"). Keys and values
live in blocks (Kwon et al. 2023, arXiv:2309.06180). Where blocks run out, the request that came last gives its own back
and is computed again later.

- :class:`Scheduler` decides who computes what; it knows blocks and counts, no tensors.
- :class:`Runner` does it: one copy to the device, one pass, the next tokens. On a GPU, steps in which all rows write
  are CUDA graphs.
- :class:`Engine` joins them, one step ahead on a GPU: step n + 1 is launched before the tokens of step n are read.
- :class:`TextStream` makes text of tokens as they come.

``python -m tformer_lib.serving --prompt "Once upon a time"`` serves from the command line.
"""

import argparse
import codecs
import json
import numbers
import operator
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial, wraps
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tformer_lib import pretrained, profiling
from tformer_lib.attention import MultiHeadAttention, merge
from tformer_lib.generation import Sampling, check_number, distribution, draw, penalise_repetition, stops_of
from tformer_lib.kv_cache import CacheShape
from tformer_lib.paged_attention import BLOCK_SIZE, BlockAllocator, BlockTable, blocks_for, paged_attention, write_cache
from tformer_lib.tokens import Encoding

DEFAULT_MEMORY = 2**27
"""Bytes of keys and values that an engine holds unless told otherwise."""

STEPS_REMEMBERED = 10_000
"""How many of the latest steps ``Engine.log`` keeps."""

SAMPLED = -1
"""Stands in a step's input for a token that only the device knows yet: the one that this seat sampled last."""


# --- requests ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Params(Sampling):
    """What a request asks for: the rules of :class:`generation.Sampling`, and when to end.

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    max_new_tokens: int = 64
    """The most tokens to write."""
    stop_tokens: Sequence[int] = ()
    """The text ends with the first of these, which is its last token."""
    stop: Sequence[str] = ()
    """The text ends before the first of these strings."""

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.seed, int):
            raise ValueError(f"a request's seed must be one number, got {self.seed!r}")
        check_number("max_new_tokens", self.max_new_tokens, numbers.Integral)
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        stops_of(self.stop_tokens)
        if not isinstance(self.stop, Iterable) or isinstance(self.stop, str) or not all(map(is_text, self.stop)):
            raise ValueError(f"stop must be a list of strings, none of them empty, got {self.stop!r}")

    @classmethod
    def of(cls, given: "Params | dict | None") -> "Params":
        """Params as they are, from a dict of some of them, or the defaults.

        Raises:
            ValueError: there is no such parameter, or it is out of its range.
        """
        if isinstance(given, cls):
            return given
        if not isinstance(given, (dict, type(None))):
            raise ValueError(f"params must be Params or a dict, got {given!r}")
        given, known = dict(given or {}), [field.name for field in fields(cls)]
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(f"unknown parameters: {', '.join(unknown)}; there are {', '.join(known)}")
        return cls(**given)

    @property
    def rules(self) -> Sampling:
        """How tokens are chosen, without the seed: requests with equal rules are sampled together."""
        names = [field.name for field in fields(Sampling) if field.name != "seed"]
        return Sampling(**{name: getattr(self, name) for name in names})


def is_text(x) -> bool:
    """Whether x is a string, and not an empty one."""
    return isinstance(x, str) and bool(x)


class Request:
    """A prompt, what was asked for, and what has been written so far.

    Attributes:
        id: given by the caller, or a number; ``arrival`` is the place in the order of arrival.
        tokens: the prompt and all new tokens that have come back.
        text: what is certain of the new tokens' text, if the engine has an encoding.
        finish_reason: "length", "stop", "cancelled" or "error"; None while it lasts.
        error: why it was refused, or what made a step fail.
        table: its blocks; ``table.length`` tokens have been computed or are being so.
        pending: tokens that were sampled for it and have not come back.
        reused: tokens that a prefix cache spared it; ``preemptions``: how often it had to start over.
    """

    def __init__(self, id, prompt: Sequence[int], params: Params):
        self.id, self.params, self.arrival = id, params, -1
        self.tokens, self.prompt_length = list(prompt), len(prompt)
        self.text, self.finish_reason, self.error = "", None, None
        self.table: BlockTable | None = None
        self.stream: TextStream | None = None
        self.seat, self.pending, self.reused, self.preemptions = -1, 0, 0, 0
        self.end = self.prompt_length + params.max_new_tokens
        self.stop_tokens = frozenset(stops_of(params.stop_tokens))
        self.rules, self.random = params.rules, Random(params.seed) if params.temperature > 0 else None
        self.is_plain = params.temperature == 0 and params.repetition_penalty == 1

    @property
    def prompt(self) -> list[int]:
        """The tokens it began with."""
        return self.tokens[: self.prompt_length]

    @property
    def new_tokens(self) -> list[int]:
        """The tokens written for it."""
        return self.tokens[self.prompt_length :]

    @property
    def known(self) -> int:
        """Tokens of its text, those included that only the device knows yet."""
        return len(self.tokens) + self.pending

    @property
    def wanted(self) -> int:
        """Tokens to compute before its next one can be sampled: 1 for a row that writes, 0 if its last one was."""
        known = len(self.tokens) + self.pending
        return known - self.table.length if known < self.end else 0

    def __repr__(self) -> str:
        written = len(self.tokens) - self.prompt_length
        return f"Request({self.id!r}, prompt={self.prompt_length}, new={written}, finish_reason={self.finish_reason!r})"


class Piece(NamedTuple):
    """What one step wrote for one request."""

    request: Request
    token: int
    text: str
    """Whole characters; later pieces may be needed for this token's."""


class TextStream:
    """Text from tokens as they come: whole characters only, and nothing that might turn out to begin a stop string.

    A token is a piece of bytes. It may end within a character, and a stop string may begin within one token and end
    within another. So what comes out may lag behind, and is never taken back.

    Args:
        encoding: whose tokens they are.
        stop: the text ends before the first of these.
    """

    def __init__(self, encoding: Encoding, stop: Sequence[str] = ()):
        self.encoding, self.stop = encoding, stop
        self.characters = codecs.getincrementaldecoder("utf-8")("replace")
        self.held, self.stopped = "", False

    def push(self, token: int) -> str:
        """The text that is certain after this token, and was not before; tokens past the vocabulary write nothing."""
        data = self.encoding.decode_single_token_bytes(token) if token < self.encoding.n_vocab else b""
        return self._release(self.characters.decode(data))

    def finish(self) -> str:
        """What was held back, where nothing more will come."""
        last = self._release(self.characters.decode(b"", final=True))
        rest, self.held = self.held, ""
        return last + rest

    def _release(self, new: str) -> str:
        text = self.held + new
        found = [place for place in (text.find(stop) for stop in self.stop) if place >= 0]
        if found:
            self.held, self.stopped = "", True
            return text[: min(found)]
        certain = len(text) - max((overlap(text, stop) for stop in self.stop), default=0)
        self.held = text[certain:]
        return text[:certain]


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text are the beginning of the stop string, fewer than all of it."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)


# --- the scheduler -------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A request's part of a step: it computes ``count`` tokens from ``start`` on."""

    request: Request
    start: int
    count: int
    samples: bool
    """Whether they reach the end of what is known, so that a new token follows."""


class Scheduler:
    """Who computes what in the next step. First come, first served.

    Running requests are in the order of arrival, and all of them came before all that wait. Rows that write take one
    token of the budget each; what is left goes to prompts, in pieces if need be. A request is let in when there are
    blocks for all of its text so far and some to grow; where those that write need more blocks than there are, the
    latest to arrive gives its own back and waits again.

    Args:
        allocator: the blocks.
        seats: the most requests that run at once.
        budget: the most tokens that a step computes.
        max_blocks: the most blocks that a request may hold.
        prefix_cache: whether a prompt's beginning is looked for among the blocks that were computed before.
        spare_blocks: blocks per running request that must stay free when another is let in, so that it is not thrown
            out again soon.
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        *,
        seats: int,
        budget: int,
        max_blocks: int,
        prefix_cache: bool = True,
        spare_blocks: float = 0.0,
    ):
        if seats < 1 or budget < seats:
            raise ValueError(f"budget must be at least 1 token for each of {seats} seats, got {budget}")
        self.allocator, self.budget, self.spare_blocks = allocator, budget, spare_blocks
        self.prefix_cache = prefix_cache
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.free_seats = list(range(seats - 1, -1, -1))
        self.tables = np.zeros((seats + 1, max_blocks), dtype=np.int32)  # by seat; the last one is nobody's
        self.preemptions = 0

    def add(self, request: Request) -> None:
        """Let a request wait for its turn."""
        request.table = BlockTable(self.allocator)
        self.waiting.append(request)

    def is_short(self) -> bool:
        """Whether those that write need more blocks for their next token than there are."""
        if len(self.running) <= self.allocator.available:
            return False
        return sum(r.table.slack == 0 and r.wanted == 1 for r in self.running) > self.allocator.available

    def plan(self) -> list[Row]:
        """The rows of the next step, none if there is nothing to do. Their blocks are taken and counted as computed."""
        while self.is_short():
            self.preempt()
        rows: list[Row] = []
        left = self.budget
        for request in self.running:
            left -= self._take(request, left, rows)
        while left and self.waiting and self.free_seats and self._admit(self.waiting[0]):
            left -= self._take(self.running[-1], left, rows)
        return rows

    def _take(self, request: Request, left: int, rows: list[Row]) -> int:
        """Give a request its part of the step, as far as budget and blocks allow; returns how many tokens it has."""
        table = request.table
        wanted = request.wanted
        count = min(wanted, left)
        if count > table.slack:
            room = table.slack + self.allocator.available * self.allocator.block_size
            count = min(count, room)
            self._reserve(request, count)
        if count == 0:
            return 0
        rows.append(Row(request, table.length, count, count == wanted))
        table.length += count
        request.pending += count == wanted
        if self.prefix_cache and table.length // self.allocator.block_size > len(table.prefixes):
            table.publish(request.tokens)
        return count

    def _reserve(self, request: Request, count: int) -> None:
        held = len(request.table.blocks)
        request.table.reserve(count)
        self.tables[request.seat, held : len(request.table.blocks)] = request.table.blocks[held:]

    def _admit(self, request: Request) -> bool:
        """Let the first that waits run, if its text so far would fit; with what a prefix cache has of it."""
        allocator, table = self.allocator, request.table
        found = allocator.match(request.tokens) if self.prefix_cache else []
        alive = sum(allocator.holders[block] > 0 for block in found)  # these cost nothing
        needed = blocks_for(request.known, allocator.block_size) - alive
        if needed > allocator.available - int(self.spare_blocks * len(self.running)):
            return False
        self.waiting.popleft()
        self.running.append(request)
        request.seat = self.free_seats.pop()
        if found:
            request.reused += table.reuse(request.tokens)
            self.tables[request.seat, : len(table.blocks)] = table.blocks
        return True

    def preempt(self) -> None:
        """The latest to arrive gives its blocks back and waits; its tokens stay, their keys are computed again."""
        request = self.running[-1]
        self._leave(request)
        request.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(request)

    def remove(self, request: Request) -> None:
        """Forget a request that has ended, wherever it stands."""
        if request.seat < 0:
            self.waiting.remove(request)
        else:
            self._leave(request)

    def _leave(self, request: Request) -> None:
        self.running.remove(request)
        request.table.free()
        self.free_seats.append(request.seat)
        request.seat = -1


# --- the pass ------------------------------------------------------------------------------------------------------


class PackedPass:
    """A cache, as ``Decoder.forward`` sees it, for rows that stand end to end: tokens (1, total).

    Args:
        pools: for each layer those of its keys and of its values, (blocks, kv_heads, block_size, head_dim) each. They
            are no views of one tensor, because a compiler must take care not to mix up parts of what is written to.
        positions: (total,) int64, the place of each token in its row.
        slots: (total,) int64, where its key and value go; -1 for none.
        tables: (rows, max_blocks) int32.
        lengths: (rows,) int32, tokens of each row, the new ones included.
        starts: (rows + 1,) int32, where each row's tokens begin; None where each row has one.
        max_queries: the most tokens that a row brings.
    """

    def __init__(self, pools, positions, slots, tables, lengths, starts=None, max_queries=None):
        self.pools, self.places, self.slots = pools, positions, slots
        self.rows = (tables, lengths)
        self.starts, self.max_queries = starts, max_queries

    def positions(self, T: int) -> Tensor:
        """(1, T) int64."""
        return self.places[None]

    def layer(self, index: int) -> "PackedLayer":
        """The part of layer ``index``."""
        return PackedLayer(self, *self.pools[index])

    def advance(self, T: int) -> None:
        """Nothing to count: the scheduler has."""


class PackedLayer:
    """One layer's pools, and the rows that all layers share."""

    def __init__(self, packed: PackedPass, k_pool: Tensor, v_pool: Tensor):
        self.packed, self.k_pool, self.v_pool = packed, k_pool, v_pool

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, attend=None, mask: Tensor | None = None) -> Tensor:
        """Store the new keys and values, then let each token look at its own row up to itself.

        Args:
            q: (1, heads, total, head_dim).
            k, v: (1, kv_heads, total, head_dim).
        """
        now, pools = self.packed, (self.k_pool, self.v_pool)
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (total, heads or kv_heads, head_dim)
        write_cache(k, v, *pools, now.slots)
        out = paged_attention(q, *pools, *now.rows, query_starts=now.starts, max_queries=now.max_queries)
        return out.transpose(0, 1)[None]  # (1, heads, total, head_dim)


class Inputs:
    """The numbers that a step needs on the device, in one buffer, so that they get there in one copy.

    Fields, (tokens,) int64: ``given`` (SAMPLED where the device knows the token), ``token_seats``, ``positions``,
    ``slots``; (samples,) int64: ``places`` of the tokens whose logits are wanted, ``seats`` of their rows; int32:
    ``lengths`` (rows,), ``starts`` (rows + 1,), ``tables`` (rows, max_blocks).
    """

    def __init__(self, buffer: Tensor, tokens: int, rows: int, samples: int, max_blocks: int):
        wide = [("given", tokens), ("token_seats", tokens), ("positions", tokens), ("slots", tokens)]
        wide += [("places", samples), ("seats", samples)]
        narrow = [("lengths", rows), ("starts", rows + 1), ("tables", rows * max_blocks)]
        self.size = 0
        for dtype, sizes in ((torch.int64, wide), (torch.int32, narrow)):
            for name, size in sizes:
                stop = self.size + size * dtype.itemsize
                setattr(self, name, buffer[self.size : stop].view(dtype))
                self.size = stop
        self.tables = self.tables.view(rows, max_blocks)

    @staticmethod
    def bytes_for(tokens: int, rows: int, max_blocks: int) -> int:
        """The size of a buffer that holds any step of so many tokens and rows."""
        return 8 * (4 * tokens + 2 * rows) + 4 * (2 * rows + 1 + rows * max_blocks)

    def fill(self, rows: list[Row], tables: np.ndarray, block_size: int) -> None:
        """Write the rows in; a field that is longer than they are is padded with rows of length 0.

        Args:
            rows: the scheduler's.
            tables: (seats + 1, max_blocks) int32, by seat; the last seat is nobody's.
            block_size: tokens in a block.
        """
        counts = np.array([row.count for row in rows], dtype=np.int64)
        first = np.array([row.start for row in rows], dtype=np.int64)
        seats = np.array([row.request.seat for row in rows], dtype=np.int64)
        starts = np.concatenate(([0], counts.cumsum()))  # (rows + 1,)
        row_of = np.repeat(np.arange(len(rows)), counts)  # (tokens,)
        positions = np.arange(starts[-1]) - starts[row_of] + first[row_of]
        blocks = tables[seats[row_of], positions // block_size].astype(np.int64)
        samples = np.array([row.samples for row in rows], dtype=bool)
        nobody = len(tables) - 1
        put(self.given, np.array(known_tokens(rows), dtype=np.int64), 0)
        put(self.token_seats, seats[row_of], nobody)
        put(self.positions, positions, 0)
        put(self.slots, blocks * block_size + positions % block_size, -1)
        put(self.places, starts[1:][samples] - 1, 0)
        put(self.seats, seats[samples], nobody)
        put(self.lengths, first + counts, 0)
        put(self.starts, starts, starts[-1])
        put(self.tables, tables[seats], 0)


def put(field: Tensor, values: np.ndarray, padding: int) -> None:
    """Values into the first places of a field, padding into the rest."""
    memory = field.numpy()
    memory[: len(values)] = values
    memory[len(values) :] = padding


def known_tokens(rows: list[Row]) -> list[int]:
    """The rows' tokens end to end, SAMPLED for those that have not come back."""
    tokens: list[int] = []
    for row in rows:
        part = row.request.tokens[row.start : row.start + row.count]
        tokens += part
        if len(part) < row.count:
            tokens.append(SAMPLED)
    return tokens


class Launched(NamedTuple):
    """A step whose tokens are on their way."""

    requests: list[Request]
    """Those for whom a token was sampled, in the order of the tokens."""
    tokens: Tensor
    """(requests,) int64 on the host, once ``arrived`` says so."""
    arrived: "torch.cuda.Event | None"


class Runner:
    """Runs the scheduler's rows through the model and chooses their next tokens.

    Args:
        model: a ``Decoder``.
        allocator: how many blocks there are, of what size.
        seats: the most rows of a step.
        budget: the most tokens of a step.
        max_blocks: the most blocks of a row.
        compile: join and fuse each block's kernels with ``torch.compile``, which takes a while at the first steps. It
            changes the model for good: from then on it needs a cache.
    """

    def __init__(self, model: nn.Module, allocator: BlockAllocator, *, seats, budget, max_blocks, compile=False):
        shape = CacheShape.of(model, seats)
        self.model, self.block_size, self.max_blocks = model, allocator.block_size, max_blocks
        self.device = torch.device(shape.device)
        size = (allocator.blocks, shape.kv_heads, allocator.block_size, shape.head_dim)
        new_pool = partial(torch.zeros, size, dtype=shape.dtype, device=self.device)
        self.pools = [(new_pool(), new_pool()) for _ in range(shape.layers)]  # memory of their own: see PackedPass
        self.last_tokens = torch.zeros(seats + 1, dtype=torch.int64, device=self.device)
        self.seen: Tensor | None = None
        on_gpu = self.device.type == "cuda"
        room = Inputs.bytes_for(budget, seats, max_blocks)
        self.staging = [torch.zeros(room, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2)]
        self.returned = [torch.zeros(seats, dtype=torch.int64, pin_memory=on_gpu) for _ in range(2)]
        self.buffer = torch.zeros(room, dtype=torch.uint8, device=self.device)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        if compile:
            compile_blocks(model)

    @torch.no_grad()
    def launch(self, rows: list[Row], tables: np.ndarray) -> Launched:
        """Start a step. On a GPU nothing here waits for it."""
        self.staging.reverse()  # the device may still be reading the other one
        self.returned.reverse()
        requests = [row.request for row in rows if row.samples]
        only_writing = len(requests) == len(rows) and all(row.count == 1 for row in rows)
        size = next((size for size in self.graphs if size >= len(rows)), None) if only_writing else None
        if size is not None:
            logits, seats = self._replay(size, rows, tables)
        else:
            logits, seats = self._run(rows, tables, len(requests))
        if not requests:
            return Launched([], self.returned[0][:0], None)
        with profiling.range("sampling"):
            tokens = self.choose(logits, requests, seats)
        self.last_tokens[seats] = tokens
        return Launched(requests, *self._send_back(tokens))

    def _run(self, rows: list[Row], tables: np.ndarray, samples: int) -> tuple[Tensor, Tensor]:
        """Any rows: the logits (samples, vocab_size) and the seats (samples,) of those that sample."""
        inputs = self._upload(rows, tables, sum(row.count for row in rows), len(rows), samples)
        most = max(row.count for row in rows)
        logits = self._forward(inputs, starts=inputs.starts, max_queries=most, only=inputs.places)
        return logits, inputs.seats

    def _replay(self, size: int, rows: list[Row], tables: np.ndarray) -> tuple[Tensor, Tensor]:
        """Rows of one token each, padded to a recorded size."""
        inputs = self._upload(rows, tables, size, size, size)
        graph, logits = self.graphs[size]
        graph.replay()
        return logits[: len(rows)], inputs.seats[: len(rows)]

    def _upload(self, rows: list[Row], tables: np.ndarray, *sizes: int) -> Inputs:
        host = Inputs(self.staging[0], *sizes, self.max_blocks)
        host.fill(rows, tables, self.block_size)
        self.buffer[: host.size].copy_(self.staging[0][: host.size], non_blocking=True)
        return Inputs(self.buffer, *sizes, self.max_blocks)

    def _forward(self, inputs: Inputs, *, starts=None, max_queries=None, only=None) -> Tensor:
        """(tokens that are looked at, vocab_size)."""
        tokens = torch.where(inputs.given == SAMPLED, self.last_tokens[inputs.token_seats], inputs.given)  # (total,)
        rows = (inputs.tables, inputs.lengths, starts, max_queries)
        cache = PackedPass(self.pools, inputs.positions, inputs.slots, *rows)
        return self.model(tokens[None], cache=cache, only=only)[0]

    def _send_back(self, tokens: Tensor) -> tuple[Tensor, "torch.cuda.Event | None"]:
        """Tokens (n,) to the host, and what tells that they have arrived."""
        if self.device.type != "cuda":
            return tokens, None
        host, arrived = self.returned[0][: len(tokens)], torch.cuda.Event()
        host.copy_(tokens, non_blocking=True)
        arrived.record()
        return host, arrived

    @torch.no_grad()
    def capture(self, sizes: Sequence[int]) -> None:
        """Record a step of one token a row in a CUDA graph, for each of these numbers of rows.

        Each is run once before, on the stream that records: kernels keep scratch memory by stream, and what is made
        while recording would be filled only by a replay.
        """
        stream, pool = torch.cuda.Stream(), None
        for size in sorted(sizes, reverse=True):  # the largest first: the others fit into its memory
            inputs = self._upload([], np.zeros((1, self.max_blocks), np.int32), size, size, size)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._forward(inputs)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                logits = self._forward(inputs)
            graph.replay()  # the first replay of a graph takes longer
            self.graphs[size], pool = (graph, logits), graph.pool()
        self.graphs = dict(sorted(self.graphs.items()))

    # choosing tokens

    def choose(self, logits: Tensor, requests: list[Request], seats: Tensor) -> Tensor:
        """The next token of each row, (rows,) int64, by the rules of its own request.

        Args:
            logits: (rows, vocab_size).
            requests: one a row.
            seats: (rows,) int64, on the device.
        """
        tokens = logits.argmax(-1)
        groups: dict[Sampling, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            if not request.is_plain:
                groups[request.rules].append(place)
        for rules, places in groups.items():
            index = torch.tensor(places).to(self.device, non_blocking=True)
            tokens[index] = self._sample(logits[index], rules, [requests[i] for i in places], seats[index])
        return tokens

    def _sample(self, logits: Tensor, rules: Sampling, requests: list[Request], seats: Tensor) -> Tensor:
        if rules.repetition_penalty != 1:
            seen = self._seen_by(requests, seats, logits.shape[1])
            logits = penalise_repetition(logits, seen, rules.repetition_penalty)
        if rules.temperature == 0:
            tokens = logits.argmax(-1)
        else:
            uniforms = torch.tensor([request.random.random() for request in requests], dtype=torch.float64)
            tokens = draw(distribution(logits, rules), uniforms.to(self.device, non_blocking=True))
        if rules.repetition_penalty != 1:
            self.seen[seats, tokens] = True
        return tokens

    def _seen_by(self, requests: list[Request], seats: Tensor, vocab_size: int) -> Tensor:
        """(rows, vocab_size) boolean: the tokens of each row so far. Those that just sat down bring theirs along."""
        if self.seen is None:
            self.seen = torch.zeros(len(self.last_tokens), vocab_size, dtype=torch.bool, device=self.device)
        for request in requests:
            if request.pending == 1 and request.table.length == len(request.tokens):  # all its tokens are known here
                self.seen[request.seat] = False
                self.seen[request.seat, torch.tensor(request.tokens, device=self.device)] = True
        return self.seen[seats]


def compile_blocks(model: nn.Module) -> None:
    """Fuse the kernels of each block with ``torch.compile``, for any number of tokens; all blocks share the result."""
    for block in model.stack.blocks:
        if isinstance(block.attention, MultiHeadAttention):  # else an engine has done so before
            block.attention = JoinedAttention(block.attention)
        block.compile(dynamic=True)


class JoinedAttention(nn.Module):
    """A self-attention layer whose queries, keys and values come out of one matrix product instead of three.

    A few rows fill a GPU badly: the product with a small matrix takes as long as its launch. The three matrices become
    parts of one, and stay parameters of the layer under their names.

    Args:
        attention: the layer, whose matrices move into one piece of memory.
    """

    def __init__(self, attention: MultiHeadAttention):
        super().__init__()
        self.attention = attention
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.sizes = [projection.out_features for projection in projections]
        self.weight = torch.cat([projection.weight.detach() for projection in projections])  # (sum of sizes, width)
        has_bias = attention.q_proj.bias is not None
        self.bias = torch.cat([projection.bias.detach() for projection in projections]) if has_bias else None
        for projection, part in zip(projections, self.weight.split(self.sizes), strict=True):
            projection.weight.data = part

    def forward(self, x: Tensor, *, mask=None, causal=False, bias=None, rotate=None, cache=None) -> Tensor:
        """x (1, total, width) and a cache's layer, as :class:`MultiHeadAttention` takes them; causal in any case."""
        layer, joined = self.attention, F.linear(x, self.weight, self.bias)  # (1, total, sum of sizes)
        heads = (layer.heads, layer.kv_heads, layer.kv_heads)
        q, k, v = (layer.split(part, n) for part, n in zip(joined.split(self.sizes, -1), heads, strict=True))
        if rotate is not None:
            q, k = rotate(q), rotate(k)
        return layer.out_proj(merge(cache.attend(q, k, v, attend=layer.attend, mask=mask)))


# --- the engine ----------------------------------------------------------------------------------------------------


@dataclass
class Step:
    """What one step did; ``Engine.log`` holds the latest."""

    rows: list[tuple[int, int, int]]
    """(the request's place in the order of arrival, first position, number of tokens) of each row."""
    samples: int
    """Rows that got a token."""
    waiting: int
    """Requests that were not running."""
    preemptions: int
    """Requests that had to give their blocks back before this step."""
    live_tokens: int
    """Keys that the running rows hold, in one layer and head; those in shared blocks count for each row."""
    unused_slots: int
    """Slots in the running rows' blocks that hold no token."""
    held_blocks: int
    """Blocks that running rows hold; a shared one counts once."""
    block_size: int
    started: float
    """Seconds, by a clock that counts from some moment or other."""
    launched: float = float("nan")
    """When the host had asked for all of it."""
    finished: float = float("nan")
    """When its tokens had come back."""

    @property
    def tokens(self) -> int:
        """Tokens computed."""
        return sum(count for _, _, count in self.rows)

    @property
    def is_decode(self) -> bool:
        """Whether every row wrote, and none read a prompt."""
        return self.samples == len(self.rows) == self.tokens

    @property
    def waste(self) -> float:
        """The share of the held blocks' slots in which there is nothing."""
        slots = self.held_blocks * self.block_size
        return self.unused_slots / slots if slots else 0.0


def ends_all_on_error(step: Callable) -> Callable:
    """An engine's ``step`` that leaves no request half done: where it fails, those that run end with "error"."""

    @wraps(step)
    def safe_step(engine: "Engine") -> list[Piece]:
        try:
            return step(engine)
        except BaseException as error:  # KeyboardInterrupt too: a notebook's stop button
            engine.abandon(repr(error))
            raise

    return safe_step


class Engine:
    """Continuous batching: requests come and go at any step, and none notices the others.

    Args:
        model: a ``Decoder``; it is put into evaluation mode.
        encoding: what prompts given as text, ``Request.text`` and stop strings are made with.
        blocks: how many blocks of keys and values there are; if not given, as many as DEFAULT_MEMORY holds.
        block_size: tokens in a block.
        seats: the most requests that run at once.
        budget: the most tokens that a step computes; a smaller one bounds how long those that write must wait for a
            prompt to be read, a larger one reads prompts faster. At least one a seat.
        max_context: the longest text, prompt and new tokens; the model's ``max_length`` if not given.
        prefix_cache: whether blocks of earlier prompts are used again where a prompt begins as they did.
        spare_blocks: see :class:`Scheduler`.
        ahead: how many steps are launched before the tokens of a step are looked at; 1 on a GPU, 0 elsewhere.
        cuda_graphs: record steps in which all rows write; by default where the model is on a GPU.
        compile: see :class:`Runner`.
    """

    def __init__(
        self,
        model: nn.Module,
        encoding: Encoding | None = None,
        *,
        blocks: int | None = None,
        block_size: int = BLOCK_SIZE,
        seats: int = 64,
        budget: int = 512,
        max_context: int | None = None,
        prefix_cache: bool = True,
        spare_blocks: float = 0.0,
        ahead: int | None = None,
        cuda_graphs: bool | None = None,
        compile: bool = False,
    ):
        check_servable(model, max_context)
        for name, value in (("block_size", block_size), ("seats", seats), ("budget", budget)):
            check_number(name, value, numbers.Integral)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        blocks = blocks_that_fit(model, DEFAULT_MEMORY, block_size) if blocks is None else blocks
        self.model, self.encoding = model.eval(), encoding
        self.max_context = model.config.max_length if max_context is None else max_context
        max_blocks = blocks_for(self.max_context, block_size)
        self.allocator = BlockAllocator(blocks, block_size)
        sizes = {"seats": seats, "budget": budget, "max_blocks": max_blocks}
        self.scheduler = Scheduler(self.allocator, prefix_cache=prefix_cache, spare_blocks=spare_blocks, **sizes)
        self.runner = Runner(model, self.allocator, compile=compile, **sizes)
        on_gpu = self.runner.device.type == "cuda"
        self.ahead = int(on_gpu) if ahead is None else ahead
        self.launched: deque[tuple[Launched, Step]] = deque()
        self.log: deque[Step] = deque(maxlen=STEPS_REMEMBERED)
        self.arrivals = 0
        if on_gpu if cuda_graphs is None else cuda_graphs:
            self.runner.capture(graph_sizes(seats))

    def add(self, prompt: str | Sequence[int], params: Params | dict | None = None, *, id=None) -> Request:
        """Let a request join.

        Args:
            prompt: text, or tokens.
            params: what is asked for: :class:`Params` or a dict of some of its fields.
            id: a name for it; a number if not given.

        Raises:
            ValueError: the prompt is empty or too long, or a parameter makes no sense. The other requests go on.
        """
        params = Params.of(params)
        tokens = self._tokens_of(prompt)
        self._check(tokens, params)
        request = Request(self.arrivals if id is None else id, tokens, params)
        request.arrival = self.arrivals
        self.arrivals += 1
        if self.encoding is not None:
            request.stream = TextStream(self.encoding, params.stop)
        self.scheduler.add(request)
        return request

    def _tokens_of(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            if self.encoding is None:
                raise ValueError("a prompt given as text needs an engine with an encoding")
            return self.encoding.encode_ordinary(prompt)
        try:
            return [operator.index(token) for token in prompt]
        except TypeError:
            raise ValueError(f"a prompt must be a text or a list of tokens, got {prompt!r}") from None

    def _check(self, tokens: list[int], params: Params) -> None:
        """Refuse what could never be answered."""
        vocab_size, block_size = self.model.config.vocab_size, self.allocator.block_size
        if not tokens:
            raise ValueError("the prompt is empty: there is no token to continue")
        if not 0 <= min(tokens) <= max(tokens) < vocab_size:
            strange = next(token for token in tokens if not 0 <= token < vocab_size)
            raise ValueError(f"the prompt holds token {strange}, the model knows 0 to {vocab_size - 1}")
        total, asked = len(tokens) + params.max_new_tokens, f"{len(tokens)} tokens and {params.max_new_tokens} new ones"
        if total > self.max_context:
            raise ValueError(f"a prompt of {asked} are {total}, the engine takes {self.max_context} a request")
        if blocks_for(total - 1, block_size) > self.allocator.blocks:  # the last one is not fed back
            there = f"{self.allocator.blocks} blocks of {block_size}"
            raise ValueError(f"a prompt of {asked} need {blocks_for(total - 1, block_size)} blocks, there are {there}")
        if params.stop and self.encoding is None:
            raise ValueError("stop strings need an engine with an encoding; stop_tokens need none")

    @property
    def busy(self) -> bool:
        """Whether there is anything left to do."""
        return bool(self.scheduler.running or self.scheduler.waiting or self.launched)

    @ends_all_on_error
    def step(self) -> list[Piece]:
        """Launch the next step, and return what the latest finished ones wrote."""
        pieces: list[Piece] = []
        if self.scheduler.is_short():  # a token on its way may end a request: look before taking blocks away
            while self.launched:
                self._finish(pieces)
        before, started = self.scheduler.preemptions, time.perf_counter()
        with profiling.range("plan"):
            rows = self.scheduler.plan()
        if rows:
            step = self._describe(rows, self.scheduler.preemptions - before, started)
            with profiling.range("launch"):
                self.launched.append((self.runner.launch(rows, self.scheduler.tables), step))
            step.launched = time.perf_counter()
        while len(self.launched) > (self.ahead if rows else 0):
            self._finish(pieces)
        return pieces

    def _describe(self, rows: list[Row], preemptions: int, started: float) -> Step:
        running = self.scheduler.running
        return Step(
            rows=[(row.request.arrival, row.start, row.count) for row in rows],
            samples=sum(row.samples for row in rows),
            waiting=len(self.scheduler.waiting),
            preemptions=preemptions,
            live_tokens=sum(request.table.length for request in running),
            unused_slots=sum(request.table.slack for request in running),
            held_blocks=self.allocator.held,
            block_size=self.allocator.block_size,
            started=started,
        )

    def _finish(self, pieces: list[Piece]) -> None:
        """Wait for the oldest launched step, and hand out its tokens."""
        launched, step = self.launched.popleft()
        if launched.arrived is not None:
            with profiling.range("wait"):
                launched.arrived.synchronize()
        for request, token in zip(launched.requests, launched.tokens.tolist(), strict=True):
            request.pending -= 1
            if request.finish_reason is None:  # else it ended while this token was on its way
                pieces.append(self._accept(request, token))
        step.finished = time.perf_counter()
        self.log.append(step)

    def _accept(self, request: Request, token: int) -> Piece:
        """A token has come back: it becomes text, and may be the last."""
        request.tokens.append(token)
        stopped, text = token in request.stop_tokens, ""
        if request.stream is not None:
            text = "" if stopped else request.stream.push(token)
            stopped = stopped or request.stream.stopped
        if stopped or len(request.tokens) == request.end:
            self._end(request, "stop" if stopped else "length")
            if request.stream is not None and not request.stream.stopped:
                text += request.stream.finish()
        request.text += text
        return Piece(request, token, text)

    def _end(self, request: Request, reason: str) -> None:
        if self.scheduler.prefix_cache and request.seat >= 0:
            request.table.publish(request.tokens)
        request.finish_reason = reason
        self.scheduler.remove(request)

    def abandon(self, error: str) -> None:
        """End the requests that run, with the reason "error": a step failed, and what it had counted is not computed.

        All blocks are empty afterwards, prefixes included; those that wait are served by the next steps.

        Args:
            error: what went wrong, for ``Request.error``.
        """
        self.launched.clear()
        for request in list(self.scheduler.running):
            request.finish_reason, request.error = "error", error
            self.scheduler.remove(request)
        self.allocator.reset()

    def cancel(self, request: Request) -> None:
        """End a request now. Its blocks are free at once: the device does things in order, so what is written into them
        next is written after what is under way. Cancelling twice, or what has ended, does nothing.

        Raises:
            ValueError: the request is another engine's.
        """
        if request.table is not None and request.table.allocator is not self.allocator:
            raise ValueError(f"{request} is another engine's")
        if request.finish_reason is None:
            self._end(request, "cancelled")
            if request.stream is not None:
                request.text += request.stream.finish()

    def run(self) -> None:
        """Step until nothing is left to do."""
        while self.busy:
            self.step()


def graph_sizes(seats: int) -> list[int]:
    """The numbers of rows that steps are padded to: 1, 2, 4, 8, then every 8 up to 64, every 16 up to the seats."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, seats + 16, 16)]
    return [*(size for size in sizes if size < seats), seats]


def blocks_that_fit(model: nn.Module, memory: int, block_size: int = BLOCK_SIZE) -> int:
    """How many blocks of this model's keys and values fit into ``memory`` bytes."""
    return memory // (CacheShape.of(model, 1).bytes_per_token * block_size)


def check_servable(model: nn.Module, max_context: int | None) -> None:
    """Refuse a model whose rows would not be independent of each other, or too long a context for its positions."""
    config = model.config
    if config.positions == "alibi":
        raise ValueError("a model with ALiBi runs without a cache, so it cannot be served")
    if model.rope is not None and model.rope.scaling.needs_length:
        kind = type(model.rope.scaling).__name__
        raise ValueError(f"{kind} turns keys by the length of the text, which differs from row to row")
    if max_context is not None and max_context < 2:
        raise ValueError(f"max_context must be at least 2, a token of a prompt and a new one, got {max_context}")
    if config.positions == "learned" and (max_context or 0) > config.max_length:
        raise ValueError(f"max_context is {max_context}, the model has learned {config.max_length} positions")


# --- the short way -------------------------------------------------------------------------------------------------


class LLM:
    """A model behind an engine, for those who have their prompts together.

    Args:
        model: a ``Decoder``.
        encoding: of its tokens; needed for prompts and stop strings given as text.
        options: the other arguments of :class:`Engine`.
    """

    def __init__(self, model: nn.Module, encoding: Encoding | None = None, **options):
        self.engine = Engine(model, encoding, **options)

    def generate(self, prompts: Sequence, params=None) -> list[Request]:
        """Answer all prompts.

        Args:
            prompts: texts or lists of tokens.
            params: :class:`Params` or a dict of some of its fields, for all prompts or one for each.

        Returns:
            The requests in the order of the prompts, each with ``text``, ``new_tokens`` and ``finish_reason``. One that
            could not be served has the reason "error" and says why in ``error``; the others are answered all the same.
        """
        requests = self._add_all(prompts, params)
        self._drive(requests)
        return requests

    def stream(self, prompts: Sequence, params=None) -> Iterator[Piece]:
        """Like :meth:`generate`, but yields each piece as it comes. Whoever stops listening cancels what is left."""
        requests = self._add_all(prompts, params)
        try:
            while any(request.finish_reason is None for request in requests):
                yield from self.engine.step()
        finally:
            for request in requests:
                self.engine.cancel(request)

    def _add_all(self, prompts: Sequence, params) -> list[Request]:
        if isinstance(prompts, str) or not isinstance(prompts, Iterable):
            raise ValueError(f"prompts must be a list of prompts, got {prompts!r}")
        prompts = list(prompts)
        each = list(params) if isinstance(params, (list, tuple)) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise ValueError(f"params must be one for all or one for each of {len(prompts)} prompts, got {len(each)}")
        return [
            self._add(place, prompt, asked) for place, (prompt, asked) in enumerate(zip(prompts, each, strict=True))
        ]

    def _add(self, place: int, prompt, asked) -> Request:
        try:
            return self.engine.add(prompt, asked, id=place)
        except ValueError as error:
            return refused(place, str(error))

    def _drive(self, requests: list[Request]) -> None:
        """Step until all have ended; where a step fails, none of them is left waiting."""
        try:
            while any(request.finish_reason is None for request in requests):
                self.engine.step()
        finally:
            for request in requests:
                self.engine.cancel(request)


def refused(id, error: str) -> Request:
    """A request that was never let in."""
    request = Request(id, [], Params())
    request.finish_reason, request.error = "error", error
    return request


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve prompts from the command line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--prompt", action="append", help="a prompt; may be given several times")
    where.add_argument("--prompts", type=Path, help='a file with one {"prompt": "...", "temperature": ...} a line')
    parser.add_argument("--model", default="stories", help="a pretrained model of the library")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", type=int, default=DEFAULT_MEMORY, help="bytes of keys and values")
    parser.add_argument("--seats", type=int, default=64, help="requests that run at once")
    parser.add_argument("--budget", type=int, default=512, help="tokens computed in a step")
    for name in ("max_new_tokens", "top_k", "seed"):
        parser.add_argument("--" + name.replace("_", "-"), type=int)
    for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
        parser.add_argument("--" + name.replace("_", "-"), type=float)
    parser.add_argument("--stop", action="append", help="end before this string; may be given several times")
    options = vars(parser.parse_args(arguments))
    asked = {field.name: options[field.name] for field in fields(Params) if options.get(field.name) is not None}
    serve(options, asked)


def serve(options: dict, asked: dict) -> None:
    """Run the command: stream a single prompt, or print one line of JSON for each request."""
    model, encoding = pretrained.load(options["model"], device=options["device"])
    blocks = blocks_that_fit(model, options["memory"])
    llm = LLM(model, encoding, blocks=blocks, seats=options["seats"], budget=options["budget"])
    asked = {"stop_tokens": [encoding.eot_token], **asked}
    if options["prompt"] and len(options["prompt"]) == 1:
        print(options["prompt"][0], end="", flush=True)
        for piece in llm.stream(options["prompt"], asked):
            print(piece.text, end="", flush=True)
        print()
        return
    lines = read_lines(options["prompts"]) if options["prompts"] else [{"prompt": text} for text in options["prompt"]]
    prompts = [line.pop("prompt", "") for line in lines]
    for request in llm.generate(prompts, [{**asked, **line} for line in lines]):
        line = {"id": request.id, "text": request.text, "finish_reason": request.finish_reason}
        print(json.dumps(line if request.error is None else {**line, "error": request.error}, ensure_ascii=False))


def read_lines(path: Path) -> list[dict]:
    """The requests of a file, one JSON object a line; empty lines are skipped."""
    lines = path.read_text(encoding="utf-8").splitlines()
    requests = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            requests.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            sys.exit(f"{path}, line {number}: one JSON object was expected ({error})")
    return requests


if __name__ == "__main__":
    main()
