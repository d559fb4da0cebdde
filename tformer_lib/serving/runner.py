"""A step on the device: one copy of its numbers, one pass through the model, the next tokens."""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tformer_lib import profiling
from tformer_lib.attention import Attend, AttentionVariant, MultiHeadAttention
from tformer_lib.generation import Sampling, distribution, draw, one_row, penalise_repetition
from tformer_lib.kv_cache import CacheShape
from tformer_lib.ladder import FP8
from tformer_lib.paged_attention import (
    AttentionPlan,
    BlockAllocator,
    Rows,
    WritePlan,
    as_variant,
    attend_rows,
    blocks_for,
    is_traced,
    paged_attention,
    plan_attention,
    plan_write,
    write_cache,
)
from tformer_lib.serving.fused import FusedPass, refusal, refusal_of_weights
from tformer_lib.serving.request import Request
from tformer_lib.serving.scheduler import Row
from tformer_lib.serving.states import BatchSlotLayer, BatchSlotStates
from tformer_lib.transformer import FeedForward, evaluating

SAMPLED = -1
"""Stands in a step's input for a token that only the device knows yet: the one that this batch slot sampled last."""

NONE = -1
"""Comes back in place of a token where the logits were not finite, and there is none to choose."""


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
        scales: what keys and values are divided by on their way into pools of float8; None elsewhere.
        batch_invariant: whether a row's attention must not depend on the other rows, in any bit.
        states: of the linear layers, whose pools are None; and the batch slot of each token, (total,) int64.
        rings: where window layers keep what they can still see, if not in the blocks of the others.
    """

    def __init__(
        self,
        pools,
        positions,
        slots,
        tables,
        lengths,
        starts=None,
        max_queries=None,
        *,
        scales: tuple[float, float] | None = None,
        batch_invariant: bool = False,
        states: tuple[BatchSlotStates, Tensor] | None = None,
        rings: "Rings | None" = None,
    ):
        self.states, self.rings = states, rings
        self.pools, self.places, self.slots = pools, positions, slots
        self.rows = (tables, lengths)
        self.scales = {} if scales is None else {"k_scale": scales[0], "v_scale": scales[1]}
        self.options = {"query_starts": starts, "max_queries": max_queries, **self.scales}
        if batch_invariant:
            self.options["batch_invariant"] = True
        self.plans: dict[tuple, WritePlan | AttentionPlan] = {}  # made by the first layer of a kind, for all of it

    def positions(self, T: int) -> Tensor:
        """(1, T) int64."""
        return self.places[None]

    def layer(self, index: int) -> "PackedLayer | BatchSlotLayer":
        """The part of layer ``index``."""
        if self.pools[index] is None:
            states, batch_slots = self.states
            return states.layer(index, batch_slots, self.places, self.options["query_starts"])
        if self.rings is not None and self.rings.layers[index]:
            return PackedLayer(self, *self.pools[index], rings=self.rings)
        return PackedLayer(self, *self.pools[index])

    def advance(self, T: int) -> None:
        """Nothing to count: the scheduler has."""


class PackedLayer:
    """One layer's pools, and the rows that all layers share."""

    def __init__(self, packed: PackedPass, k_pool: Tensor, v_pool: Tensor, *, rings: "Rings | None" = None):
        self.packed, self.k_pool, self.v_pool = packed, k_pool, v_pool
        tables, lengths = packed.rows
        self.rows = (tables if rings is None else rings.tables, lengths)
        self.slots = packed.slots if rings is None else rings.slots
        self.in_ring = rings is not None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, attend: Attend, mask: Tensor | None = None) -> Tensor:
        """Store the new keys and values, then let each token look at its own row up to itself.

        Args:
            q: (1, heads, total, head_dim).
            k, v: (1, kv_heads, total, head_dim); v of no numbers where values are made from the keys.
            attend: the layer's attention form; a plain one, with a window, a scale or sinks, is read from the blocks.
        """
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (total, heads or kv_heads, head_dim)
        self._write(k, v if v.shape[-1] else k)
        variant = as_variant(attend)
        if variant is None:
            out = self._gather(q, attend)
        elif variant.sinks is None:
            out = self._read(q, variant)
        else:
            out = variant.with_sinks(*self._read(q, variant, return_lse=True))
        return out.transpose(0, 1)[None]  # (1, heads, total, head_dim)

    def _gather(self, q: Tensor, attend: Attend) -> Tensor:
        """Attention that no kernel computes, over copies of what the blocks hold.

        Raises:
            ValueError: the pools are float8, or the rows must not depend on each other in any bit.
        """
        now = self.packed
        if now.scales or "batch_invariant" in now.options:
            raise ValueError("float8 pools and deterministic steps serve no soft cap, no ALiBi and no latent attention")
        rows = Rows(*self.rows, now.options["query_starts"], now.options["max_queries"])
        return attend_rows(q, self.k_pool, self.v_pool, rows, attend)

    def _write(self, k: Tensor, v: Tensor) -> None:
        """Store keys and values, (total, kv_heads, head_dim) each."""
        now, pools = self.packed, (self.k_pool, self.v_pool)
        if is_traced(k):  # a compiler looks on, who must see one operator
            return write_cache(k, v, *pools, self.slots, **now.scales)
        key = (self.in_ring, k.stride(), v.stride())
        if key not in now.plans:
            now.plans[key] = plan_write(k, v, *pools, self.slots, **now.scales)
        return now.plans[key].run(k, v, *pools)

    def _read(self, q: Tensor, variant: AttentionVariant, **returned) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of q (total, heads, head_dim) over the blocks, as :func:`paged_attention` returns it."""
        now, pools = self.packed, (self.k_pool, self.v_pool)
        options = {**now.options, "scale": variant.scale, "window": variant.window}
        if is_traced(q):
            return paged_attention(q, *pools, *self.rows, **options, **returned)
        key = (self.in_ring, q.stride(), variant.scale, variant.window)
        if key not in now.plans:
            now.plans[key] = plan_attention(q, *pools, *self.rows, **options)
        return now.plans[key].run(q, *pools, **returned)


class Rings(NamedTuple):
    """Where window layers keep keys and values: each batch slot has a few blocks of its own, which its tokens go round.

    A block comes round again when what it held has left every window, so that no allocator is asked.
    """

    layers: Sequence[bool]
    """Whether each layer of the model is one of them."""
    tables: Tensor
    """(rows, max_blocks) int32: the blocks of each row's batch slot, over and over."""
    slots: Tensor
    """(total,) int64, where each token goes; -1 for none."""

    @staticmethod
    def blocks(window: int, tokens: int, block_size: int) -> int:
        """Blocks of a batch slot: a window, a step's tokens, and one because a window may begin anywhere in a block."""
        return blocks_for(window + tokens, block_size) + 1


class Inputs:
    """The numbers that a step needs on the device, in one buffer, so that they get there in one copy.

    Fields, (tokens,) int64: ``given`` (SAMPLED where the device knows the token), ``token_batch_slots``, ``positions``,
    ``slots``; (samples,) int64: ``places`` of the tokens whose logits are wanted, ``batch_slots`` of their rows; int32:
    ``lengths`` (rows,), ``starts`` (rows + 1,), ``tables`` (rows, max_blocks).
    """

    def __init__(self, buffer: Tensor, tokens: int, rows: int, samples: int, max_blocks: int):
        wide = [("given", tokens), ("token_batch_slots", tokens), ("positions", tokens), ("slots", tokens)]
        wide += [("places", samples), ("batch_slots", samples)]
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

    def fill(
        self, rows: list[Row], tables: np.ndarray, block_size: int, *, lanes: bool = False, rest: bool = False
    ) -> None:
        """Write the rows in; a field that is longer than they are is padded with rows of length 0.

        Args:
            rows: the scheduler's.
            tables: (max_num_seqs + 1, max_blocks) int32, by batch slot; the last batch slot is nobody's.
            block_size: tokens in a block.
            lanes: whether each token stands in a row of its own, whose table is that of all the tokens of its request:
                a row then has one query, as a recorded step has it.
            rest: whether the tokens past those of the rows belong to the last row, which holds no key.
        """
        counts = np.array([row.count for row in rows], dtype=np.int64)
        first = np.array([row.start for row in rows], dtype=np.int64)
        batch_slots = np.array([row.request.batch_slot for row in rows], dtype=np.int64)
        starts = np.concatenate(([0], counts.cumsum()))  # (rows + 1,)
        row_of = np.repeat(np.arange(len(rows)), counts)  # (tokens,)
        positions = np.arange(starts[-1]) - starts[row_of] + first[row_of]
        blocks = tables[batch_slots[row_of], positions // block_size].astype(np.int64)
        asked = np.array([row.asks for row in rows], dtype=np.int64)
        asking = np.repeat(np.arange(len(rows)), asked)  # (samples,)
        places = np.arange(len(asking)) + (starts[1:] - asked.cumsum())[asking]  # the last ones of each row
        nobody = len(tables) - 1
        put(self.given, np.array(known_tokens(rows), dtype=np.int64), 0)
        put(self.token_batch_slots, batch_slots[row_of], nobody)
        put(self.positions, positions, 0)
        put(self.slots, blocks * block_size + positions % block_size, -1)
        put(self.places, places, 0)
        put(self.batch_slots, batch_slots[asking], nobody)
        if lanes:
            batch_slots, first, counts, starts = batch_slots[row_of], positions, 1, np.arange(len(self.starts))
        put(self.lengths, first + counts, 0)
        put(self.starts, starts, starts[-1])
        if rest:
            self.starts[-1] = len(self.given)
        put(self.tables, tables[batch_slots], 0)


def put(field: Tensor, values: np.ndarray, padding: int) -> None:
    """Values into the first places of a field, padding into the rest."""
    memory = field.numpy()
    memory[: len(values)] = values
    memory[len(values) :] = padding


def known_tokens(rows: list[Row]) -> list[int]:
    """The rows' tokens end to end, drafts included, SAMPLED for those that have not come back."""
    tokens: list[int] = []
    for row in rows:
        part = row.request.tokens[row.start : row.start + row.count]
        tokens += part
        tokens += row.drafts
        if len(part) + len(row.drafts) < row.count:
            tokens.append(SAMPLED)
    return tokens


class Launched(NamedTuple):
    """A step whose tokens are on their way."""

    rows: list[Row]
    """Those for which tokens were chosen: one for each, and one more for each of its drafts."""
    tokens: Tensor
    """(tokens,) int64 in the order of the rows, on the host once ``arrived`` says so."""
    arrived: "torch.cuda.Event | None"
    logprobs: Tensor | None = None
    """(tokens of requests that asked, 1 + 2 k) float64 on the host: the chosen token's, those of the k likeliest, and
    these."""


class Staging(NamedTuple):
    """Where the host writes the numbers of a step, from where the device copies them."""

    memory: Tensor
    """(bytes,) uint8, pinned for a GPU."""
    copied: "torch.cuda.Event | None"
    """Whether the device has made its copy of what was written last; None on a CPU, which copies at once."""


class Runner:
    """Runs the scheduler's rows through the model and chooses their next tokens.

    Args:
        model: a ``Decoder``.
        allocator: how many blocks there are, of what size.
        max_num_seqs: the most rows of a step.
        budget: the most tokens of a step.
        max_blocks: the most blocks of a row.
        compile: join and fuse each block's kernels: a Llama-like model's on Hopper by :class:`FusedPass`, others with
            ``torch.compile``, which takes a while at the first steps. It changes the model for good: from then on it
            needs a cache.
        lanes: the most tokens of a row for which a recorded step is used; a row's drafts are such tokens.
        depth: how many steps may be launched before the tokens of the first of them are read.
        kv_dtype: of the pools; the model's if not given.
        kv_scales: what keys and what values are divided by on their way into pools of float8.
        deterministic: compute the same bits for a token whatever else the step computes. Each step then has ``budget``
            tokens, each in a lane of its own, so that every product has one shape and adds in one order.
        window_rings: whether window layers keep :class:`Rings` instead of blocks of the allocator.
    """

    def __init__(
        self,
        model: nn.Module,
        allocator: BlockAllocator,
        *,
        max_num_seqs: int,
        budget: int,
        max_blocks: int,
        compile: bool = False,
        lanes: int = 1,
        depth: int = 2,
        kv_dtype: torch.dtype | None = None,
        kv_scales: tuple[float, float] = (1.0, 1.0),
        deterministic: bool = False,
        window_rings: bool = False,
    ):
        shape = CacheShape.of(model, max_num_seqs)
        self.model, self.block_size, self.max_blocks = model, allocator.block_size, max_blocks
        self.lanes, self.budget, self.deterministic = lanes, budget, deterministic
        self.max_num_seqs = max_num_seqs
        kv_dtype = shape.dtype if kv_dtype is None else kv_dtype
        self.scales = kv_scales if kv_dtype == FP8 else None
        self.device = torch.device(shape.device)
        kinds, window = model.config.types_of_layers, model.config.window
        self.in_ring = [window_rings and kind == "window" for kind in kinds]
        self.ring = Rings.blocks(window, max(budget, lanes), self.block_size) if any(self.in_ring) else 0
        size = (shape.kv_heads, allocator.block_size, shape.head_dim)
        has_values = shape.size_of_value > 0  # else they are made from the keys, whose pool then serves as both
        self.pools: list[tuple[Tensor, Tensor] | None] = []  # memory of their own: see PackedPass
        for kind, in_ring in zip(kinds, self.in_ring, strict=True):
            blocks = self.ring * (max_num_seqs + 1) if in_ring else allocator.blocks
            new_pool = partial(torch.zeros, blocks, *size, dtype=kv_dtype, device=self.device)
            pool = None if kind == "linear" else new_pool()
            self.pools.append(None if pool is None else (pool, new_pool() if has_values else pool))
        self.states = None
        if model.config.linear is not None:
            self.states = BatchSlotStates(model.config, max_num_seqs + 1, shape.dtype, self.device)
        self.last_tokens = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=self.device)
        self.seen: Tensor | None = None
        on_gpu = self.device.type == "cuda"
        rows = max(budget, lanes * max_num_seqs) if deterministic else lanes * max_num_seqs
        room = Inputs.bytes_for(max(budget, lanes * max_num_seqs), rows + 1, max_blocks)
        self.staging = deque(
            Staging(torch.zeros(room, dtype=torch.uint8, pin_memory=on_gpu), torch.cuda.Event() if on_gpu else None)
            for _ in range(depth)
        )
        most = lanes * max_num_seqs
        self.returned = deque(torch.zeros(most, dtype=torch.int64, pin_memory=on_gpu) for _ in range(depth))
        self.buffer = torch.zeros(room, dtype=torch.uint8, device=self.device)
        self.graphs: dict[int, tuple] = {}  # by the number of lanes: a CUDA graph, its logits, and the likeliest tokens
        self.prompts: dict[int, tuple] = {}  # by the number of tokens: a CUDA graph, and what it leaves of each sample
        self.fused: FusedPass | None = None
        self.own_products: dict[int, tuple[str, ...]] = {}  # which of its products cuBLAS does not compute, by lanes
        if compile:
            join_projections(model)
            if (refusal(model) or refusal_of_weights(model.embedding.tokens.weight)) is None:
                self.fused = FusedPass(model, self.pools, self.scales)
            else:
                compile_blocks(model)
        self.parameters = [module._parameters for module in model.modules() if module._parameters]
        self.weights = self._state_of_weights()

    @torch.inference_mode(False)  # what is written here is written again by steps outside of it
    @torch.no_grad()
    def launch(self, rows: list[Row], tables: np.ndarray, *, send_back: bool = True) -> Launched:
        """Start a step. On a GPU nothing here waits for it.

        Args:
            rows: what it computes.
            tables: the blocks of each batch slot, (max_num_seqs + 1, max_blocks) int32.
            send_back: whether the host asks for the tokens; else they stay on the device.
        """
        self.staging.rotate()  # the device may still be reading the others
        self.returned.rotate()
        sampling = [row for row in rows if row.samples]
        requests = [row.request for row in sampling for _ in range(row.asks)]
        size = self._recorded_size(rows)
        best: tuple[Tensor, ...] = ()
        if size is not None:
            logits, batch_slots, *best = self._replay(size, rows, tables, len(requests))
        elif (size := self._recorded_prompts(rows)) is not None:
            logits, batch_slots = self._replay_prompts(size, rows, tables, len(requests))
        else:
            logits, batch_slots = self._run(rows, tables, len(requests))
        if not requests:
            return Launched([], self.returned[0][:0], None)
        with profiling.range("sampling"):
            tokens = self.choose(logits, requests, batch_slots, *best)
        self.last_tokens[batch_slots] = tokens.clamp_min(0)  # a step ahead reads it before anybody has looked
        if not send_back:
            return Launched(sampling, tokens, None)
        logprobs = self._log_probabilities(logits, tokens, requests)
        return Launched(sampling, *self._send_back(tokens), logprobs)

    def _recorded_size(self, rows: list[Row]) -> int | None:
        """The recorded step that these rows fit into, with their tokens in lanes; None where they read a prompt."""
        if self.deterministic:
            return self.budget if self.graphs else None
        if not self.graphs or any(row.count > self.lanes for row in rows):
            return None
        tokens = sum(row.count for row in rows)
        return next((size for size in self.graphs if size >= tokens), None)

    def _recorded_prompts(self, rows: list[Row]) -> int | None:
        """The recorded step with prompts that these rows fit into; None where there is none."""
        if sum(row.asks for row in rows) > self.max_num_seqs:
            return None
        tokens = sum(row.count for row in rows)
        return next((size for size in self.prompts if size >= tokens), None)

    def as_current(self) -> AbstractContextManager:
        """The model's device as the current one, which each thread has for itself."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _run(self, rows: list[Row], tables: np.ndarray, samples: int) -> tuple[Tensor, Tensor]:
        """Any rows: the logits (samples, vocab_size) and the batch slots (samples,) of those that sample."""
        if self.deterministic:
            inputs = self._upload(rows, tables, self.budget, self.budget, self.budget, lanes=True)
            return self._forward(inputs)[inputs.places[:samples]], inputs.batch_slots[:samples]
        tokens, most = sum(row.count for row in rows), max(row.count for row in rows)
        inputs = self._upload(rows, tables, tokens, len(rows), samples)
        with self._as_it_stands(tokens):
            logits = self._forward(inputs, starts=inputs.starts, max_queries=most, only=inputs.places)
        return logits, inputs.batch_slots

    @contextmanager
    def _as_it_stands(self, tokens: int) -> Iterator[None]:
        """Where decode steps are recorded: the others, of so many tokens, leave compiled blocks alone within it.

        To call a compiled block costs the host a millisecond, because it looks at all that the block was compiled for;
        a block as it stands is launched in a quarter of that. What is recorded costs the host nothing either way.
        (``torch.compiler.set_stance`` does the same for a whole program, and takes six milliseconds.)
        """
        if not self.graphs or tokens >= COMPILED_FROM:
            yield
            return
        blocks = list(self.model.stack.blocks)
        compiled = [block._compiled_call_impl for block in blocks]
        for block in blocks:
            block._compiled_call_impl = None
        try:
            yield
        finally:
            for block, call in zip(blocks, compiled, strict=True):
                block._compiled_call_impl = call

    def _replay(self, size: int, rows: list[Row], tables: np.ndarray, samples: int) -> tuple[Tensor, ...]:
        """Tokens in lanes, padded to a recorded size: the same as :meth:`_run`, and what :func:`likeliest` finds."""
        inputs = self._upload(rows, tables, size, size, size, lanes=True)
        graph, *found = self.graphs[size]
        graph.replay()
        all_sample = samples == sum(row.count for row in rows)
        places = slice(samples) if all_sample else inputs.places[:samples]
        logits, *best = (x[places] for x in found)
        return logits, inputs.batch_slots[:samples], *best

    def _replay_prompts(self, size: int, rows: list[Row], tables: np.ndarray, samples: int) -> tuple[Tensor, Tensor]:
        """Rows that read prompts, padded to a recorded number of tokens: the same as :meth:`_run`.

        The tokens past theirs are in a row of nobody's, whose keys go nowhere.
        """
        inputs = self._upload(rows, tables, size, self.max_num_seqs + 1, self.max_num_seqs, rest=True)
        graph, hidden = self.prompts[size]
        graph.replay()
        return self.model.unembed(hidden[:samples]), inputs.batch_slots[:samples]

    def _upload(self, rows: list[Row], tables: np.ndarray, *sizes: int, **options: bool) -> Inputs:
        memory, copied = self.staging[0]
        if copied is not None:
            copied.synchronize()  # a drafter reads a long text in more steps than there are buffers
        host = Inputs(memory, *sizes, self.max_blocks)
        host.fill(rows, tables, self.block_size, **options)
        self.buffer[: host.size].copy_(memory[: host.size], non_blocking=True)
        if copied is not None:
            copied.record()
        return Inputs(self.buffer, *sizes, self.max_blocks)

    def _forward(
        self, inputs: Inputs, *, starts=None, max_queries=None, only=None, own: tuple[str, ...] = ()
    ) -> Tensor:
        """(tokens that are looked at, vocab_size)."""
        tokens = self._tokens(inputs)
        if self.deterministic:
            starts, max_queries = inputs.starts, 1
        rows = Rows(inputs.tables, inputs.lengths, starts, max_queries)
        if self.fused is not None:
            options = {"only": only, "batch_invariant": self.deterministic, "own": own}
            return self.fused(tokens, inputs.positions, inputs.slots, rows, **options)
        states = None if self.states is None else (self.states, inputs.token_batch_slots)
        options = {"scales": self.scales, "batch_invariant": self.deterministic, "states": states}
        options["rings"] = self._rings(inputs) if self.ring else None
        cache = PackedPass(self.pools, inputs.positions, inputs.slots, *rows, **options)
        with evaluating(self.model), one_row(self.model, tokens):
            return self.model(tokens[None], cache=cache, only=only)[0]

    def _tokens(self, inputs: Inputs) -> Tensor:
        """(total,) int64: those that were given, and those that only the device knows."""
        sampled = self.last_tokens[inputs.token_batch_slots]
        return torch.where(inputs.given == SAMPLED, sampled, inputs.given)

    def _hidden(self, inputs: Inputs) -> Tensor:
        """What the logits of a step with prompts are made of, (samples, width), by few kernels."""
        rows = Rows(inputs.tables, inputs.lengths, inputs.starts, len(inputs.given))
        return self.fused.hidden(self._tokens(inputs), inputs.positions, inputs.slots, rows, only=inputs.places)

    def _rings(self, inputs: Inputs) -> Rings:
        """Where this step's tokens go and find their rows in window layers, worked out on the device."""
        size, batch_slots, positions = self.block_size, inputs.token_batch_slots, inputs.positions
        first = inputs.starts[:-1].long().clamp_max(len(batch_slots) - 1)  # the first token of each row
        laps = torch.arange(self.max_blocks, device=self.device) % self.ring
        tables = (batch_slots[first, None] * self.ring + laps).int()  # (rows, max_blocks)
        slots = (batch_slots * self.ring + positions // size % self.ring) * size + positions % size
        return Rings(self.in_ring, tables, slots.masked_fill(inputs.slots < 0, -1))

    def _send_back(self, tokens: Tensor) -> tuple[Tensor, "torch.cuda.Event | None"]:
        """Tokens (n,) to the host, and what tells that they have arrived."""
        if self.device.type != "cuda":
            return tokens, None
        host, arrived = self.returned[0][: len(tokens)], torch.cuda.Event()
        host.copy_(tokens, non_blocking=True)
        arrived.record()
        return host, arrived

    def weights_changed(self) -> bool:
        """Whether parameters were written to or replaced since this was asked last.

        Graphs are recorded again where they would read from the old places. Writes through ``.data`` and under
        inference mode leave no trace.
        """
        before, self.weights = self.weights, self._state_of_weights()
        if self.graphs and before[0] != self.weights[0]:
            self.capture(list(self.graphs))
        return before != self.weights

    def _state_of_weights(self) -> tuple[list[int], list[int]]:
        """Where each parameter lies, and how often it was written to."""
        parameters = [p for of_module in self.parameters for p in of_module.values() if p is not None]
        places = [p.data_ptr() for p in parameters]
        try:
            return places, [p._version for p in parameters]
        except RuntimeError:  # made under inference mode, where nobody counts
            return places, []

    @torch.inference_mode(False)
    @torch.no_grad()
    def capture(self, sizes: Sequence[int]) -> None:
        """Record steps in CUDA graphs: of one token a row for each of these numbers of rows, and steps with prompts.

        The latter only for :class:`FusedPass`, whose kernels learn from the device how long the rows are, and for as
        many tokens as :func:`prompt_sizes` says.
        """
        stream, pool = torch.cuda.Stream(), None
        none = np.zeros((len(self.last_tokens), self.max_blocks), np.int32)
        with_prompts = self.fused is not None and not self.deterministic
        for size in sorted(prompt_sizes(self.budget), reverse=True) if with_prompts else ():
            inputs = self._upload([], none, size, self.max_num_seqs + 1, self.max_num_seqs, rest=True)
            rows = Rows(inputs.tables, inputs.lengths, inputs.starts, size)
            if self.fused.reads_by_kernels(size, rows):
                self.prompts[size] = record(partial(self._hidden, inputs), stream, pool)
                pool = self.prompts[size][0].pool()
        for size in sorted(sizes, reverse=True):  # the largest first: the others fit into its memory
            inputs = self._upload([], none, size, size, size)
            self.graphs[size] = self._record_fastest(inputs, stream, pool)
            pool = self.graphs[size][0].pool()
        self.graphs, self.prompts = dict(sorted(self.graphs.items())), dict(sorted(self.prompts.items()))

    def _record_fastest(self, inputs: Inputs, stream: "torch.cuda.Stream", pool) -> tuple:
        """A recorded step, its logits and what :func:`likeliest` finds; each product by who is faster at this size."""
        own: tuple[str, ...] = ()
        best = self._record(inputs, stream, pool, own)
        names = () if self.fused is None or self.deterministic else self.fused.takes(len(inputs.given))
        seconds = replay_seconds(best[0]) if names else 0.0
        for name in names:
            tried = self._record(inputs, stream, best[0].pool(), (*own, name))
            needed = replay_seconds(tried[0])
            if needed < CLEARLY * seconds:
                best, seconds, own = tried, needed, (*own, name)
        self.own_products[len(inputs.given)] = own
        return best

    def _record(self, inputs: Inputs, stream: "torch.cuda.Stream", pool, own: tuple[str, ...]) -> tuple:
        """The same for products that were chosen."""

        def step() -> tuple[Tensor, ...]:
            logits = self._forward(inputs, own=own)
            return logits, *likeliest(logits)

        graph, found = record(step, stream, pool)
        return graph, *found

    # choosing tokens

    def choose(self, logits: Tensor, requests: list[Request], batch_slots: Tensor, *best: Tensor) -> Tensor:
        """The next token of each row, (rows,) int64, by the rules of its own request; NONE where logits are not finite.

        Args:
            logits: (rows, vocab_size).
            requests: one a row; where it is the same in several rows, they are for the places one after another.
            batch_slots: (rows,) int64, on the device.
            best: what :func:`likeliest` has found in the logits, if it was asked already.
        """
        tokens, finite = best or likeliest(logits)
        earlier = rows_before(requests)
        groups: dict[tuple, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            if not request.is_plain:  # a sum over the vocabulary may take another order where there are more rows
                groups[request.rules, place if self.deterministic else None].append(place)
        for (rules, _), places in groups.items():
            index = torch.tensor(places).to(self.device, non_blocking=True)
            asked = [(requests[i], earlier[i]) for i in places]
            tokens[index] = self._sample(logits[index], rules, asked, batch_slots[index])
        return tokens.masked_fill(~finite, NONE)

    def _sample(self, logits: Tensor, rules: Sampling, asked: list[tuple[Request, int]], batch_slots: Tensor) -> Tensor:
        """Tokens for rows of equal rules; ``asked`` has each row's request, and how many rows of its came before."""
        if rules.repetition_penalty != 1:
            seen = self._seen_by([request for request, _ in asked], batch_slots, logits.shape[1])
            logits = penalise_repetition(logits, seen, rules.repetition_penalty)
        if rules.temperature == 0:
            tokens = logits.argmax(-1)
        else:
            uniforms = torch.tensor(uniforms_of(asked), dtype=torch.float64)
            tokens = draw(distribution(logits, rules), uniforms.to(self.device, non_blocking=True))
        if rules.repetition_penalty != 1:
            self.seen[batch_slots, tokens] = True
        return tokens

    def _log_probabilities(self, logits: Tensor, tokens: Tensor, requests: list[Request]) -> Tensor | None:
        """What is reported of the chosen tokens, for the rows that asked: see :class:`Launched`."""
        places = [place for place, request in enumerate(requests) if request.params.logprobs is not None]
        if not places:
            return None
        index = torch.tensor(places, device=self.device)
        k = min(max(requests[place].params.logprobs for place in places), logits.shape[1])
        logprobs = logits[index].double().log_softmax(-1)
        chosen = logprobs.gather(1, tokens[index, None].clamp_min(0))
        top, which = logprobs.topk(k)
        reported = torch.cat([chosen, top, which.double()], dim=1)
        host = torch.empty(reported.shape, dtype=reported.dtype, pin_memory=self.device.type == "cuda")
        return host.copy_(reported, non_blocking=True)

    def _seen_by(self, requests: list[Request], batch_slots: Tensor, vocab_size: int) -> Tensor:
        """(rows, vocab_size) boolean: the tokens of each row so far. A new request brings its own along."""
        if self.seen is None:
            self.seen = torch.zeros(len(self.last_tokens), vocab_size, dtype=torch.bool, device=self.device)
        for request in requests:
            if request.pending == 1 and request.table.length == len(request.tokens):  # all its tokens are known here
                self.seen[request.batch_slot] = False
                self.seen[request.batch_slot, torch.tensor(request.tokens, device=self.device)] = True
        return self.seen[batch_slots]


def rows_before(requests: list[Request]) -> list[int]:
    """For each row, how many rows before it are for the same request, and so for earlier places of its text."""
    counts, before = Counter(), []
    for request in requests:
        before.append(counts[request])
        counts[request] += 1
    return before


def uniforms_of(asked: list[tuple[Request, int]]) -> list[float]:
    """The random number of each row, by the place in its text for which it is."""
    return [request.uniform(len(request.tokens) + request.pending - 1 + before) for request, before in asked]


def likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The first of the largest logits of each row, and whether it is finite. NaN counts as the largest.

    On a GPU the vocabulary is cut into parts: a kernel that reduces a row in one block is slow where rows are few.

    Args:
        logits: (rows, vocab_size).

    Returns:
        (rows,) int64 and (rows,) boolean.
    """
    rows, vocab_size = logits.shape
    parts = PARTS if logits.is_cuda and vocab_size % PARTS == 0 else 1
    most, places = logits.reshape(rows, parts, -1).max(-1)  # (rows, parts)
    part = most.argmax(-1, keepdim=True)  # (rows, 1)
    tokens = part * (vocab_size // parts) + places.gather(1, part)
    return tokens[:, 0], most.gather(1, part)[:, 0].isfinite()


def record(step: Callable[[], Any], stream: "torch.cuda.Stream", pool) -> tuple["torch.cuda.CUDAGraph", Any]:
    """A CUDA graph of what a function launches, and what it returned: tensors that each replay writes anew.

    The function is called once before, on the stream that records: kernels keep scratch memory by stream, and what is
    made while recording would be filled only by a replay.
    """
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        found = step()
    graph.replay()  # the first replay of a graph takes longer
    return graph, found


def prompt_sizes(budget: int) -> list[int]:
    """The numbers of tokens that steps with prompts are padded to: every 64 up to 512, every 128 up to 1,024, every 256
    up to 2,048. Of more tokens, the kernels take longer than the host, which can ask for them one by one."""
    sizes = [*range(64, 512, 64), *range(512, 1024, 128), *range(1024, 2048 + 1, 256)]
    fitting = [size for size in sizes if size < budget]
    return fitting if budget > sizes[-1] else [*fitting, budget]


CLEARLY = 0.995
"""How much shorter a recorded step must be, as a share, before it takes the place of another."""

REPLAYS = 9
"""How often a recorded step is timed."""


def replay_seconds(graph: "torch.cuda.CUDAGraph") -> float:
    """What a replay takes on the device, the median of some."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPLAYS)]
    for begin, end in events:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return median(begin.elapsed_time(end) for begin, end in events) / 1e3


COMPILED_FROM = 8192
"""Tokens of a step from which the time that fused kernels save is longer than the host's, see ``Runner``."""

MOST_VARIANTS = 64
"""After so many, PyTorch gives up compiling a block and runs it as it stands."""

PARTS = 32
"""Parts of a vocabulary whose largest logits are found side by side."""


def compile_blocks(model: nn.Module) -> None:
    """Fuse the kernels of each block with ``torch.compile``, for any number of tokens; all blocks share the result.

    Engines of other precision or with other rows are other variants of it, of which a process may have some.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_VARIANTS)
    join_projections(model)
    for block in model.stack.blocks:
        block.compile(dynamic=True)


def join_projections(model: nn.Module) -> None:
    """One product for queries, keys and values, and one for gates and hidden values, in each block that has such."""
    for block in model.stack.blocks:
        attention, feed_forward = block.attention, block.feed_forward
        if isinstance(attention, MultiHeadAttention) and attention.joined is None and is_plain(attention.q_proj):
            attention.joined = JoinedProjections(attention)
        if type(feed_forward) is FeedForward and is_plain(feed_forward.gate):
            JoinedFeedForward.join(feed_forward)


def is_plain(layer: nn.Module | None) -> bool:
    """Whether a layer is a linear map as torch has it; one whose numbers are kept otherwise cannot be joined."""
    return type(layer) is nn.Linear


def join(layers: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """One matrix (sum of out_features, in_features) and one bias for layers with one input; theirs are parts of it.

    Their sizes are marked as fixed. They are no parameters, so a compiler that is told to expect any number of tokens
    would expect any number of features too, and could not tell that half a row begins at a multiple of 16 bytes.
    """
    weight = torch.cat([layer.weight.detach() for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers])
    for tensor in (weight, *(() if bias is None else (bias,))):
        torch._dynamo.mark_static(tensor)
    for layer, part in zip(layers, weight.split([layer.out_features for layer in layers]), strict=True):
        layer.weight.data = part
    return weight, bias


class JoinedFeedForward(FeedForward):
    """A gated feed-forward layer whose gate and hidden values come out of one matrix product instead of two."""

    @classmethod
    def join(cls, layer: FeedForward) -> None:
        """Let a layer become one: its two matrices move into one piece of memory, and keep their names."""
        layer.joined = join((layer.gate, layer.up))  # (2 * feed_forward_width, width)
        layer.__class__ = cls

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width)."""
        gate, hidden = F.linear(x, *self.joined).chunk(2, dim=-1)  # (..., feed_forward_width) each
        return self.down(self.activation(gate) * hidden)


class JoinedProjections:
    """Queries, keys and values of a self-attention layer out of one matrix product instead of three.

    A few rows fill a GPU badly: the product with a small matrix takes as long as its launch. The three matrices become
    parts of one, and stay parameters of the layer under their names.

    Args:
        attention: the layer, whose matrices move into one piece of memory.
    """

    def __init__(self, attention: MultiHeadAttention):
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.sizes = [projection.out_features for projection in projections]
        self.weight, self.bias = join(projections)  # (sum of sizes, width)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (1, total, width) -> queries, keys and values, (1, total, size) each."""
        return F.linear(x, self.weight, self.bias).split(self.sizes, dim=-1)
