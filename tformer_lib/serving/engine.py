"""The engine: requests, scheduler and runner joined, step by step; and the short way for those who have all prompts."""

import gc
import numbers
import operator
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import wraps

import torch
from torch import nn

from tformer_lib import profiling
from tformer_lib.contract import counted
from tformer_lib.generation import TextStream, check_memory, check_number
from tformer_lib.kv_cache import CacheShape
from tformer_lib.ladder import FP8
from tformer_lib.paged_attention import BLOCK_SIZE, BlockAllocator, blocks_for
from tformer_lib.serving.request import LogProbabilities, Params, Piece, Request, check_counts
from tformer_lib.serving.runner import NONE, Inputs, Launched, Runner
from tformer_lib.serving.scheduler import Row, Scheduler
from tformer_lib.serving.speculation import ModelDrafter, Speculation, accepted, make_drafter
from tformer_lib.serving.turns import Turns
from tformer_lib.tokens import Encoding

DEFAULT_MEMORY = 2**27
"""Bytes of keys and values that an engine holds unless told otherwise."""

KV_DTYPES: dict[str, torch.dtype | None] = {"auto": None, "float8": FP8}
"""What pools may hold; None is the model's own numbers."""

STEPS_REMEMBERED = 10_000
"""How many of the latest steps ``Engine.log`` keeps."""


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
    drafted: int
    """Drafts that were checked (see ``speculation``); they are among the rows' tokens."""
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
        return self.samples == len(self.rows) == self.tokens - self.drafted

    @property
    def waste(self) -> float:
        """The share of the held blocks' slots in which there is nothing."""
        slots = self.held_blocks * self.block_size
        return self.unused_slots / slots if slots else 0.0


def one_at_a_time(step: Callable) -> Callable:
    """An engine's ``step`` in turns, which leaves no request half done: where it fails, those that run end with it."""

    @wraps(step)
    def safe_step(engine: "Engine") -> list[Piece]:
        with engine.turns, engine.runner.as_current():
            if engine.is_stepping:
                raise RuntimeError("a step was asked for from within a step, by a listener")
            engine.is_stepping = True
            try:
                return step(engine)
            except BaseException as error:  # KeyboardInterrupt too: a notebook's stop button
                engine.abandon(repr(error))
                raise
            finally:
                engine.is_stepping = False
                while engine.leaving:
                    engine.cancel(engine.leaving.popleft())

    return safe_step


class Engine:
    """Continuous batching: requests come and go at any step, and none notices the others.

    Threads may share an engine: one is in it at a time, and the others get their turns in the order in which they came.
    Steps run in evaluation mode, whatever mode the model is in. When its weights have changed, nothing is used any more
    that was computed with the old ones: running requests go on from their texts, which are read again.

    Settings whose names differ from vLLM's have those in brackets.

    Args:
        model: a ``Decoder``.
        encoding: what prompts given as text, ``Request.text`` and stop strings are made with.
        blocks: how many blocks of keys and values there are; if not given, as many as DEFAULT_MEMORY holds
            (``num_gpu_blocks_override``).
        block_size: tokens in a block.
        max_num_seqs: the most requests that run at once; each of them has a batch slot.
        budget: the most tokens that a step computes (``max_num_batched_tokens``); a smaller one bounds how long those
            that write must wait for a prompt to be read, a larger one reads prompts faster. At least ``max_num_seqs``.
        max_context: the longest text, prompt and new tokens (``max_model_len``); the model's ``max_length`` if not
            given.
        prefix_cache: whether blocks of earlier prompts are used again where a prompt begins as they did
            (``enable_prefix_caching``). A model with linear layers has none: no block holds the state of a beginning.
        spare_blocks, policy: see :class:`Scheduler`.
        ahead: how many steps are launched before the tokens of a step are looked at; 1 on a GPU, 0 elsewhere
            (``async_scheduling``).
        cuda_graphs: record steps in which all rows write, and with ``compile`` those of a Llama-like model on Hopper
            that read up to 2,048 tokens of prompts; by default where the model is on a GPU (the opposite of
            ``enforce_eager``).
        compile: see :class:`Runner`.
        speculation: how tokens are drafted that a step then checks; None: they are not
            (``speculative_config``). See ``speculation``.
        kv_dtype: "auto" is the model's; "float8" has half the bytes of bfloat16, and 4 bits of precision
            (``kv_cache_dtype``).
        kv_scales: what keys and values are divided by on their way to float8, see :func:`calibrate`.
        deterministic: let no bit of a request's logits depend on the other requests, see below
            (``VLLM_BATCH_INVARIANT``).
        window_rings: give each batch slot a ring for window layers, of a window and a step's tokens, and not blocks for
            all that it has read: far less memory where texts are long. Beginnings that others wrote cannot be used
            again then (``prefix_cache``).

    What is promised: a request's greedy text is the one that it would get alone as long as equal sums have equal bits.
    In float64 and on small models that is the rule. In bfloat16 on a GPU it is not: a matrix product picks its kernel
    by the number of rows, and split-KV decode cuts a row where the other rows' lengths say, so a sum may be taken in
    another order. Where two logits are nearly equal, the text may then go on differently. With ``deterministic`` each
    step computes exactly ``budget`` tokens, padding included, each as a row of one query whose keys are read in one
    fixed order. So a small budget fits, of 64 to 128. How prompts are cut, who is preempted and what comes from the
    prefix cache changes nothing then. It costs the padding, and attention that does not share a long row among
    multiprocessors.
    """

    def __init__(
        self,
        model: nn.Module,
        encoding: Encoding | None = None,
        *,
        blocks: int | None = None,
        block_size: int = BLOCK_SIZE,
        max_num_seqs: int = 64,
        budget: int = 512,
        max_context: int | None = None,
        prefix_cache: bool = True,
        spare_blocks: float = 0.0,
        policy: str = "mixed",
        ahead: int | None = None,
        cuda_graphs: bool | None = None,
        compile: bool = False,
        speculation: Speculation | None = None,
        kv_dtype: str = "auto",
        kv_scales: tuple[float, float] = (1.0, 1.0),
        deterministic: bool = False,
        window_rings: bool = False,
    ):
        check_servable(model, max_context)
        if speculation is not None and speculation.model is not None:
            check_servable(speculation.model, None)
        if model.config.linear is not None:
            check_states(speculation, deterministic)
        if window_rings and "window" not in model.config.types_of_layers:
            raise ValueError("window_rings are for window layers, of which this model has none")
        prefix_cache = prefix_cache and not window_rings and model.config.linear is None
        check_counts(1, block_size=block_size, max_num_seqs=max_num_seqs, budget=budget)
        self.max_context = model.config.max_length if max_context is None else max_context
        if blocks is None:
            rings = {"window_rings": window_rings, "most": max_num_seqs * blocks_for(self.max_context, block_size)}
            blocks = blocks_that_fit(model, DEFAULT_MEMORY, block_size, kv_dtype, **rings)
        ahead = int(next(model.parameters()).is_cuda) if ahead is None else ahead
        check_counts(1, blocks=blocks)
        check_counts(0, ahead=ahead)
        if check_number("spare_blocks", spare_blocks, numbers.Real) < 0:
            raise ValueError(f"spare_blocks must be at least 0, got {spare_blocks}")
        self.model, self.encoding, self.ahead = model, encoding, ahead
        max_blocks = min(blocks_for(self.max_context, block_size), blocks)
        lanes = 1 if speculation is None else 1 + speculation.tokens
        check_scales(kv_dtype, kv_scales)
        if kv_dtype == "float8" or deterministic:
            check_kernels_serve(model)
        rows = max(budget, lanes * max_num_seqs) if deterministic else lanes * max_num_seqs
        check_room(model, blocks * block_size, rows, budget, max_blocks, ahead, kv_dtype, window_rings)
        self.allocator = BlockAllocator(blocks, block_size)
        sizes = {"max_num_seqs": max_num_seqs, "budget": budget, "max_blocks": max_blocks}
        rules = {"prefix_cache": prefix_cache, "spare_blocks": spare_blocks, "policy": policy}
        self.scheduler = Scheduler(self.allocator, **rules, **sizes)
        with torch.inference_mode(False):  # steps outside of it will write to the pools
            precision = {"kv_dtype": KV_DTYPES[kv_dtype], "kv_scales": kv_scales, "deterministic": deterministic}
            precision["window_rings"] = window_rings
            options = {"compile": compile, "lanes": lanes, "depth": ahead + 1, **precision}
            self.runner = Runner(model, self.allocator, **sizes, **options)
            self.drafter = None
            if speculation is not None:
                more = {"blocks": blocks, "block_size": block_size, "max_context": self.max_context, "compile": compile}
                self.drafter = make_drafter(speculation, model, **more, **sizes)
        self.launched: deque[tuple[Launched, Step]] = deque()
        self.log: deque[Step] = deque(maxlen=STEPS_REMEMBERED)
        self.arrivals, self.turns = 0, Turns()
        self.is_stepping, self.is_stale, self.leaving = False, False, deque()
        self.doubted: set[Request] = set()  # whose next tokens do not count, see _distrust
        if self.runner.device.type == "cuda" if cuda_graphs is None else cuda_graphs:
            with self.runner.as_current():
                self.runner.capture([budget] if deterministic else graph_sizes(most_lanes(max_num_seqs, speculation)))
                if isinstance(self.drafter, ModelDrafter):
                    self.drafter.runner.capture(graph_sizes(2 * min(max_num_seqs, speculation.most_rows)))

    def add(
        self,
        prompt: str | Sequence[int],
        params: Params | dict | None = None,
        *,
        id=None,
        listener: Callable[[Piece], None] | None = None,
    ) -> Request:
        """Let a request join.

        Args:
            prompt: text, or tokens.
            params: what is asked for: :class:`Params` or a dict of some of its fields.
            id: a name for it; a number if not given.
            listener: called with each piece that is written for this request, by the thread that steps, and in any case
                with a last one, whose request has a ``finish_reason``. It must be quick, and must not step.

        Raises:
            ValueError: the prompt is empty or too long, or a parameter makes no sense. The other requests go on.
        """
        params = Params.of(params)
        tokens = self._tokens_of(prompt)
        self._check(tokens, params)
        request = Request(id, tokens, params, listener)
        if self.encoding is not None:
            request.stream = TextStream(self.encoding, params.stop)
        with self.turns:
            request.arrival = self.arrivals
            request.id = request.arrival if id is None else id
            self.arrivals += 1
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
        total = len(tokens) + params.max_new_tokens
        asked = f"{counted(len(tokens), 'token')} and {params.max_new_tokens} to write"
        if total > self.max_context:
            raise ValueError(f"a prompt of {asked} make {total}, the engine takes {self.max_context} a request")
        if blocks_for(total - 1, block_size) > self.allocator.blocks:  # the last one is not fed back
            there = f"{counted(self.allocator.blocks, 'block')} of {block_size}"
            needed = counted(blocks_for(total - 1, block_size), "block")
            raise ValueError(f"a prompt of {asked} need {needed}, and the cache has {there}")
        if params.stop and self.encoding is None:
            raise ValueError("stop strings need an engine with an encoding; stop_tokens need none")

    @property
    def busy(self) -> bool:
        """Whether there is anything left to do."""
        return bool(self.scheduler.running or self.scheduler.waiting or self.launched)

    @one_at_a_time
    def step(self) -> list[Piece]:
        """Launch the next step, and return what the latest finished ones wrote."""
        pieces: list[Piece] = []
        if self.runner.weights_changed() or self.is_stale:
            self._start_over(pieces)
        drafts = self._draft(pieces)
        if self.scheduler.is_short():  # a token on its way may end a request: look before taking blocks away
            while self.launched:
                self._finish(pieces)
        before, started = self.scheduler.preemptions, time.perf_counter()
        with profiling.range("plan"):
            rows = self.scheduler.plan(drafts)
        if rows:
            step = self._describe(rows, self.scheduler.preemptions - before, started)
            with profiling.range("launch"):
                self.launched.append((self.runner.launch(rows, self.scheduler.tables), step))
            step.launched = time.perf_counter()
        is_known = not rows or any(row.drafts for row in rows)  # how long texts with drafts are, is known at once
        while len(self.launched) > (0 if is_known else self.ahead):
            self._finish(pieces)
        return pieces

    def _draft(self, pieces: list[Piece]) -> dict[Request, list[int]]:
        """What may follow the texts that are written, if anybody guesses."""
        candidates = [] if self.drafter is None else self.drafter.candidates(self.scheduler.running)
        if not candidates:
            return {}
        while self.launched:  # a guess begins where the text ends
            self._finish(pieces)
        with profiling.range("draft"):
            return self.drafter.propose(candidates)

    def _start_over(self, pieces: list[Piece]) -> None:
        """What was computed so far does not count: all blocks are emptied, those that run wait to be read again."""
        while self.launched:
            self._finish(pieces)
        while self.scheduler.running:
            self.scheduler.preempt()
        self.allocator.reset()
        if self.drafter is not None:
            self.drafter.reset()
        self.is_stale = False
        self.doubted.clear()

    def forget(self) -> None:
        """Empty the prefix cache, and compute anew what runs, at the next step.

        The engine sees for itself when weights are trained or loaded. It cannot see writes through ``.data`` or under
        inference mode, nor a module that was put in the place of another.
        """
        self.is_stale = True

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
            drafted=sum(len(row.drafts) for row in rows),
            started=started,
        )

    def _finish(self, pieces: list[Piece]) -> None:
        """Wait for the oldest launched step, and hand out its tokens."""
        launched, step = self.launched.popleft()
        if launched.arrived is not None:
            with profiling.range("wait"):
                launched.arrived.synchronize()
        tokens = launched.tokens.tolist()
        reports = iter(() if launched.logprobs is None else launched.logprobs.tolist())
        place = 0
        for row in launched.rows:
            wished, row.request.pending = row.request.params.logprobs, row.request.pending - 1
            chosen = tokens[place : place + 1 + len(row.drafts)]
            place += len(chosen)
            logprobs = [None if wished is None else reported(next(reports), wished) for _ in chosen]
            if row.request in self.doubted:
                row.request.table.truncate(min(row.request.table.length, row.request.known))
            elif row.request.finish_reason is None:  # else it ended while these tokens were on their way
                self._accept_row(row, chosen, logprobs, pieces)
        step.finished = time.perf_counter()
        self.log.append(step)

    def _accept_row(self, row: Row, chosen: list[int], logprobs: list, pieces: list[Piece]) -> None:
        """A row's token has come back; where it had drafts, one for each place, of which those before the first
        refused draft and the one in its place count. The keys and values of refused drafts are rolled back."""
        request, kept = row.request, accepted(row.drafts, chosen) if row.drafts else 0
        if row.drafts:
            request.table.truncate(row.start + row.count - len(row.drafts) + kept)
            request.drafted += len(row.drafts)
        for place, (token, report) in enumerate(zip(chosen[: 1 + kept], logprobs, strict=False)):
            request.accepted += place < kept  # one that ends the text is written, those behind it are not
            pieces.append(self._accept(request, token, report))
            if request.finish_reason is not None:
                return
        if row.drafts:
            self.drafter.settle(request, kept)

    def _accept(self, request: Request, token: int, logprobs: LogProbabilities | None) -> Piece:
        """A token has come back: it becomes text, and may be the last."""
        if token == NONE:
            self._distrust(request)
            return self._end(request, "error", error="the logits after its tokens are not finite")
        request.tokens.append(token)
        if logprobs is not None:
            request.logprobs.append(logprobs)
        stopped, text = token in request.stop_tokens, ""
        if request.stream is not None:
            try:
                text = "" if stopped else request.stream.push(token)
            except Exception as error:  # an encoding that has no bytes for it; the other requests go on
                return self._end(request, "error", token, error=f"token {token} has no text: {error!r}")
            stopped = stopped or request.stream.stopped
        if stopped or len(request.tokens) == request.end:
            return self._end(request, "stop" if stopped else "length", token, text)
        return self._tell(request, token, text)

    def _distrust(self, request: Request) -> None:
        """Let nobody use what was computed for a request whose logits are no numbers.

        A NaN spreads to the tokens before it, because a weight of 0 times NaN is NaN. So its beginning is not found any
        more, and those that have found it already are computed anew.
        """
        own = set(request.table.blocks[request.begun // self.allocator.block_size :])
        found = {other for other in self.scheduler.running if other is not request and own & set(other.table.blocks)}
        self.doubted |= found
        self.is_stale = self.is_stale or bool(found)
        request.table.unpublish()

    def _end(self, request: Request, reason: str, token: int | None = None, text: str = "", error=None) -> Piece:
        """Its last piece; its blocks are free."""
        if self.scheduler.prefix_cache and request.batch_slot >= 0 and error is None:
            request.table.publish(request.tokens)
        request.finish_reason, request.error = reason, error
        self.scheduler.remove(request)
        self.doubted.discard(request)
        if self.drafter is not None:
            self.drafter.forget(request)
        if request.stream is not None and not request.stream.stopped:
            text += request.stream.finish()
        return self._tell(request, token, text)

    def _tell(self, request: Request, token: int | None, text: str) -> Piece:
        """Hand a piece to the request, and to the one who listens to it."""
        request.text += text
        logprobs = request.logprobs[-1] if request.logprobs and token is not None else None
        piece = Piece(request, token, text, logprobs, request.finish_reason)
        if request.listener is not None:
            try:
                request.listener(piece)
            except Exception as error:  # whose fault must not be the other requests'
                request.listener = None
                if request.finish_reason is None:
                    return self._end(request, "error", token, error=f"its listener failed: {error!r}")
        return piece

    def abandon(self, error: str) -> None:
        """End the requests that run, with the reason "error": a step failed, and what it had counted is not computed.

        All blocks are empty afterwards, prefixes included; those that wait are served by the next steps.

        Args:
            error: what went wrong, for ``Request.error``.
        """
        with self.turns:
            self.launched.clear()
            for request in list(self.scheduler.running):
                self._end(request, "error", error=error)
            self.allocator.reset()
            if self.drafter is not None:
                self.drafter.reset()

    def cancel_soon(self, request: Request) -> None:
        """:meth:`cancel` it at the end of the step that is under way, or of the next; any thread may call, none waits.

        Raises:
            ValueError: the request is another engine's.
        """
        self._check_ours(request)
        self.leaving.append(request)

    def cancel(self, request: Request) -> None:
        """End a request now. Its blocks are free at once: the device does things in order, so what is written into them
        next is written after what is under way. Cancelling twice, or what has ended, does nothing.

        Raises:
            ValueError: the request is another engine's.
        """
        self._check_ours(request)
        with self.turns:
            if self.is_stepping:  # a generator that was thrown away is closed by whoever collects the garbage
                self.leaving.append(request)
            elif request.finish_reason is None:
                self._end(request, "cancelled")

    def _check_ours(self, request: Request) -> None:
        if request.table is not None and request.table.allocator is not self.allocator:
            raise ValueError(f"{request} is another engine's")

    def run(self) -> None:
        """Step until nothing is left to do."""
        while self.busy:
            self.step()


def reported(row: list[float], count: int) -> LogProbabilities:
    """One row of ``Launched.logprobs``, of which this request asked for the ``count`` likeliest."""
    k = len(row) // 2
    return LogProbabilities(row[0], [(int(row[1 + k + i]), row[1 + i]) for i in range(min(count, k))])


def graph_sizes(max_num_seqs: int) -> list[int]:
    """The numbers of rows that steps are padded to: 1, 2, 4, 8, then every 8 up to 64, every 16 up to the most."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, max_num_seqs + 16, 16)]
    return [*(size for size in sizes if size < max_num_seqs), max_num_seqs]


def most_lanes(max_num_seqs: int, speculation: Speculation | None) -> int:
    """The most tokens of a step in which all rows write: one a row, and the drafts."""
    if speculation is None:
        return max_num_seqs
    return max(max_num_seqs, min(max_num_seqs, speculation.most_rows) * (1 + speculation.tokens))


def shape_of(model: nn.Module, kv_dtype: str = "auto", window_rings: bool = False) -> CacheShape:
    """What an engine's pools hold for each token; rings, which hold a window each, are not counted.

    Raises:
        ValueError: there is no such kv_dtype.
    """
    if kv_dtype not in KV_DTYPES:
        raise ValueError(f"kv_dtype must be one of {', '.join(KV_DTYPES)}, got {kv_dtype!r}")
    shape = CacheShape.of(model, 1)
    layers = shape.layers - (model.config.types_of_layers.count("window") if window_rings else 0)
    return replace(shape, dtype=KV_DTYPES[kv_dtype] or shape.dtype, layers=layers)


def blocks_that_fit(
    model: nn.Module,
    memory: int,
    block_size: int = BLOCK_SIZE,
    kv_dtype: str = "auto",
    *,
    window_rings: bool = False,
    most: int | None = None,
) -> int:
    """How many blocks of this model's keys and values fit into ``memory`` bytes; ``most``, where they take none."""
    size = shape_of(model, kv_dtype, window_rings).bytes_per_token * block_size
    return memory // size if size else most


def freeze_heap() -> None:
    """Let Python's garbage collector leave alone what there is now: for a process that does nothing but serve.

    A full collection looks at every object, some 350,000 once PyTorch is imported. That takes 0.2 s, in which no step
    is launched, and comes about every fourth time that 256 requests are served. What a step makes and drops is still
    collected. (vLLM does the same when it has started.)
    """
    gc.collect()
    gc.freeze()


def check_kernels_serve(model: nn.Module) -> None:
    """Refuse a model whose attention no kernel computes from the blocks: copies are made in the model's own numbers."""
    config = model.config
    if config.attention_softcap is not None or config.positions == "alibi" or config.latent is not None:
        raise ValueError("float8 pools and deterministic steps serve no soft cap, no ALiBi and no latent attention")


def check_scales(kv_dtype: str, kv_scales: tuple[float, float]) -> None:
    """Refuse scales that are no pair of positive numbers, and scales where nothing is scaled."""
    scales = [check_number("each of kv_scales", scale, numbers.Real) for scale in kv_scales]
    if len(scales) != 2 or not all(0 < scale < float("inf") for scale in scales):
        raise ValueError(f"kv_scales must be two positive numbers, of keys and of values, got {kv_scales}")
    if kv_dtype != "float8" and scales != [1.0, 1.0]:
        raise ValueError(f"kv_scales are for kv_dtype 'float8', got {kv_scales} for {kv_dtype!r}")


def check_room(
    model: nn.Module,
    tokens: int,
    max_num_seqs: int,
    budget: int,
    max_blocks: int,
    ahead: int,
    kv_dtype: str = "auto",
    window_rings: bool = False,
) -> None:
    """Refuse sizes that no memory holds, before any of it is asked for."""
    shape = shape_of(model, kv_dtype, window_rings)
    check_memory(f"a pool of {tokens} tokens' keys and values", shape.bytes_per_token * tokens, shape.device)
    steps = (2 + ahead) * Inputs.bytes_for(budget, max_num_seqs + 1, max_blocks)  # those on the host, and the device's
    asked = f"a step of {budget} tokens in {max_num_seqs} batch slots of {max_blocks} blocks, and {ahead} ahead of it,"
    check_memory(asked, steps, "cpu")


def check_servable(model: nn.Module, max_context: int | None) -> None:
    """Refuse a model whose rows would not be independent of each other, or too long a context for its positions."""
    config = model.config
    if model.rope is not None and model.rope.scaling.needs_length:
        kind = type(model.rope.scaling).__name__
        raise ValueError(f"{kind} turns keys by the length of the text, which differs from row to row")
    if max_context is not None and check_number("max_context", max_context, numbers.Integral) < 2:
        raise ValueError(f"max_context must be at least 2, a token of a prompt and a new one, got {max_context}")
    if config.positions == "learned" and (max_context or 0) > config.max_length:
        raise ValueError(f"max_context is {max_context}, the model has learned {config.max_length} positions")


def check_states(speculation: Speculation | None, deterministic: bool) -> None:
    """Refuse for a model with linear layers what asks more of a state than to go on."""
    if speculation is not None:
        raise ValueError("a linear layer's state cannot go back to before a draft: there is no speculation with it")
    if deterministic:
        raise ValueError("linear layers run rows of equally many tokens together: their steps are not deterministic")


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
        """Like :meth:`generate`, but yields each piece as it comes: those of these prompts, whoever steps the engine.

        Whoever stops listening cancels what is left. The last piece of a request that ends without a token, because it
        was refused or failed, has the token None.
        """
        inbox: deque[Piece] = deque()
        requests = self._add_all(prompts, params, inbox.append)
        inbox.extendleft(last_of(request) for request in reversed(requests) if request.table is None)
        try:
            lasting = True
            while lasting:
                lasting = self._advance(requests, inbox)
                while inbox:
                    yield inbox.popleft()
        finally:
            for request in requests:
                self.engine.cancel(request)

    def _advance(self, requests: list[Request], inbox: Collection[Piece] = ()) -> bool:
        """Whether any of the requests lasts; if so, step, unless another thread's step has filled the inbox."""
        with self.engine.turns:
            lasting = any(request.finish_reason is None for request in requests)
            if lasting and not inbox:
                self.engine.step()
        return lasting

    def _add_all(self, prompts: Sequence, params, listener=None) -> list[Request]:
        if isinstance(prompts, str) or not isinstance(prompts, Iterable):
            raise ValueError(f"prompts must be a list of prompts, got {prompts!r}")
        prompts = list(prompts)
        each = list(params) if isinstance(params, (list, tuple)) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise ValueError(f"params must be one for all or one for each prompt: {len(prompts)}, got {len(each)}")
        return [
            self._add(place, prompt, asked, listener)
            for place, (prompt, asked) in enumerate(zip(prompts, each, strict=True))
        ]

    def _add(self, place: int, prompt, asked, listener) -> Request:
        try:
            return self.engine.add(prompt, asked, id=place, listener=listener)
        except ValueError as error:
            return refused(place, str(error))

    def _drive(self, requests: list[Request]) -> None:
        """Step until all have ended; where a step fails, none of them is left waiting."""
        try:
            while self._advance(requests):
                pass
        finally:
            for request in requests:
                self.engine.cancel(request)


def last_of(request: Request) -> Piece:
    """All that is ever heard of a request that was never let in."""
    return Piece(request, None, "", finish_reason=request.finish_reason)


def refused(id, error: str) -> Request:
    """A request that was never let in."""
    request = Request(id, [], Params())
    request.finish_reason, request.error = "error", error
    return request
