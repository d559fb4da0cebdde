"""A KV cache driven by any sequence of operations, beside an oracle that keeps plain lists of token ids.

:class:`Session` holds a cache and, for each row, the list of its tokens. After every pass it recomputes all logits from
scratch, without a cache, in float64, and compares. It knows nothing of columns, slots, blocks or holes.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch

from tformer_lib.attention import attend
from tformer_lib.kv_cache import CacheShape, GrowingCache, ModelCache, PreallocatedCache, RingCache
from tformer_lib.paged_attention import OutOfBlocks, PagedKVCache
from tformer_lib.transformer import Decoder, ModelConfig

VOCABULARY, LONGEST, CAPACITY = 11, 40, 24
WINDOW, SINKS = 5, 2
CACHES = {
    "growing": lambda model, rows: GrowingCache(CacheShape.of(model, rows)),
    "preallocated": lambda model, rows: PreallocatedCache(CacheShape.of(model, rows), CAPACITY),
    "ring": lambda model, rows: RingCache(CacheShape.of(model, rows), WINDOW, SINKS),
    "paged": lambda model, rows: PagedKVCache(CacheShape.of(model, rows), 64, block_size=4, max_length=CAPACITY),
    "paged-tight": lambda model, rows: PagedKVCache(CacheShape.of(model, rows), 12, block_size=2, max_length=CAPACITY),
    "by kinds": lambda model, rows: ModelCache.of(model, rows, CAPACITY),
    "with states": lambda model, rows: ModelCache.of(model, rows, CAPACITY),
}
LAYERS = {"by kinds": ("window", "full"), "with states": ("linear", "window", "full")}
"""The layers of the models whose caches have parts; every other model has full layers."""


def make_model(attention: str, layers: tuple[str, ...] = ()) -> Decoder:
    """Two layers, so that a wrong key in the first changes the keys of the second; the same weights for every form."""
    torch.manual_seed(3)
    options = {"kv_heads": 1, "positions": "rope", "norm": "rmsnorm", "attention": attention, "layers": 2}
    if layers:
        options |= {"layers": len(layers), "layer_types": layers, "window": WINDOW}
    if "linear" in layers:
        options["linear"] = {"key_heads": 1, "value_heads": 2, "head_dim": 4, "value_dim": 6}
    config = ModelConfig(vocab_size=VOCABULARY, max_length=LONGEST, width=16, heads=2, **options)
    return Decoder(config).double().eval()


MODELS = {form: {name: make_model(form, LAYERS.get(name, ())) for name in CACHES} for form in ("attention", "sdpa")}


@dataclass(frozen=True)
class Token:
    """An id, and the places that a mask hid from it."""

    id: int
    hidden: frozenset[int] = frozenset()


@dataclass
class Session:
    """A cache, and what its rows hold.

    Attributes:
        name: a key of ``CACHES``.
        form: a key of ``MODELS``.
        texts: the tokens of each row.
        announced: ``expect`` was called, and no pass came since.
        published: what later prompts may find, though the rows that held it have long gone on.
        waiting: logits that are still to be compared: of each pass, and where each row ended after it. A text that goes
            on keeps its logits, so one recomputation serves all passes up to the next edit or :meth:`check`.
    """

    name: str
    rows: int
    form: str = "attention"
    texts: list[list[Token]] = field(default_factory=list)
    announced: bool = False
    published: list[list[int]] = field(default_factory=list)
    waiting: list[tuple[torch.Tensor, list[int], list[int]]] = field(default_factory=list)

    def __post_init__(self):
        self.model, self.random = MODELS[self.form][self.name], random.Random(self.rows)
        self.cache = CACHES[self.name](self.model, self.rows)
        self.texts = [[] for _ in range(self.rows)]

    @property
    def lengths(self) -> list[int]:
        return [len(text) for text in self.texts]

    @property
    def limit(self) -> int:
        """The most tokens that a row may hold."""
        return LONGEST if self.name in ("growing", "ring") else CAPACITY  # of a row's full layers

    @property
    def prompts(self) -> list[list[int]]:
        """The ids that rows hold, then those that were published."""
        return [[token.id for token in text] for text in self.texts] + self.published

    @property
    def window(self) -> int | None:
        """How many tokens a ring of the cache holds; None where it has none."""
        return WINDOW + SINKS if self.name == "ring" else WINDOW if self.name in LAYERS else None

    @property
    def has_states(self) -> bool:
        return self.name == "with states"

    def can_be_cut(self, to: list[int]) -> bool:
        """Whether rows can forget all but so many tokens: a state keeps all or none, a ring what nothing overwrote."""
        lost = [length > (0 if self.has_states else self.window or LONGEST) for length in self.lengths]
        return not any(l and n not in (0, length) for l, n, length in zip(lost, to, self.lengths, strict=True))

    def check(self) -> None:
        """The logits are those of recomputation, and the cache's books say what the lists say."""
        self.compare()
        assert self.cache.lengths.tolist() == self.cache.host_lengths == self.lengths
        assert self.cache.shape.batch == len(self.texts)

    # Operations

    def do(self, operation: str, numbers: list[int]) -> None:
        """An operation by its name, for sequences that are written down."""
        if operation == "append_padded":
            self.append(numbers, padding=3)
        elif operation == "append_masked":
            self.append(numbers, mask=0.5)
        elif operation in ("static", "publish", "reuse"):
            getattr(self, operation)(*numbers)
        else:
            getattr(self, operation)(numbers)

    def append(self, counts: list[int], *, padding: int = 0, mask: float = 0.0) -> None:
        """A pass with counts[b] real tokens in row b; a mask hides each key with the given probability."""
        mask = 0.0 if self.has_states else mask  # a linear layer hides nothing
        new = [[self.random.randrange(VOCABULARY) for _ in range(count)] for count in counts]
        T, ends = max(counts) + padding, [n + count for n, count in zip(self.lengths, counts, strict=True)]
        if max(ends) > LONGEST:
            return  # the model ends there
        shown = torch.rand(len(counts), 1, T, max(ends), generator=self._generator()) >= mask
        ids = torch.tensor([row + [0] * (T - len(row)) for row in new], dtype=torch.int64).view(len(new), T)
        if self.announced or any(count != T for count in counts):
            self.cache.expect(counts)
            self.announced = True
        with self._refusal(ends) as refused:
            logits = self.model(ids, cache=self.cache, mask=shown if mask else None)
        if refused:
            return
        self.announced = False
        for row, text in enumerate(self.texts):
            for step, id in enumerate(new[row]):
                hidden = (~shown[row, 0, step]).nonzero().flatten().tolist()
                text.append(Token(id, frozenset(hidden)))
        self.waiting.append((logits, counts, self.lengths))

    def static(self, steps: int) -> None:
        """Passes of one token a row that read the lengths from the device alone."""
        for _ in range(steps):
            ends = [n + 1 for n in self.lengths]
            if self.name == "growing" or max(ends) > LONGEST:
                return
            with self._refusal(ends) as refused:
                self.cache.check_room(ends)
            if refused:
                return
            new = [self.random.randrange(VOCABULARY) for _ in self.texts]
            with self.cache.static_shapes():
                logits = self.model(torch.tensor(new)[:, None], cache=self.cache)
            self.cache.replayed()
            for text, id in zip(self.texts, new, strict=True):
                text.append(Token(id))
            self.waiting.append((logits, [1] * len(new), self.lengths))

    def announce(self, counts: list[int]) -> None:
        """``expect`` a pass that may never come."""
        self.cache.expect(counts)
        self.announced = True

    def die(self, counts: list[int]) -> None:
        """A pass that fails after its first layer, whose keys and values were NaN."""
        T, ends = max(counts), [n + count for n, count in zip(self.lengths, counts, strict=True)]
        if T == 0 or max(ends) > LONGEST or max(ends) > (self.window or LONGEST) or self.has_states:
            return  # a ring overwrites what it cannot bring back: a test of its own, and a state another
        shape = self.cache.shape
        nan = torch.full((shape.batch, shape.kv_heads, T, shape.head_dim), torch.nan, dtype=shape.dtype)
        self.cache.expect(counts)
        self.announced = True
        with self._refusal(ends):
            self.cache.layer(0).attend(nan.repeat(1, 2, 1, 1), nan, nan, attend=attend)

    def truncate(self, lengths: list[int]) -> None:
        """Keep the first lengths[b] tokens of each row, or all where it has fewer."""
        self.compare()
        lengths = [min(n, length) for n, length in zip(lengths, self.lengths, strict=True)]
        if not self.can_be_cut(lengths):
            with pytest.raises(ValueError, match=r"has lost some|in one state, which cannot be cut"):
                self.cache.truncate(lengths)
            return
        self.cache.truncate(lengths)
        self.announced = False
        self.texts = [text[:n] for text, n in zip(self.texts, lengths, strict=True)]

    def reorder(self, rows: list[int]) -> None:
        """Row b becomes a copy of row rows[b]."""
        self.compare()
        self.cache.reorder(rows)
        self.announced = False
        self.texts = [list(self.texts[row]) for row in rows]

    def reset(self) -> None:
        """Forget everything."""
        self.compare()
        self.cache.reset()
        self.announced = False
        self.texts, self.published = [[] for _ in self.texts], []

    def publish(self, row: int) -> None:
        """Let later prompts find the row's blocks, whose keys depend on the ids alone where no mask hid anything."""
        if self.name.startswith("paged") and not any(token.hidden for token in self.texts[row]):
            ids = [token.id for token in self.texts[row]]
            self.cache.publish(row, ids)
            self.published.append(ids)

    def reuse(self, row: int, source: int, keep: int) -> None:
        """A row begins again, with the first ``keep`` tokens of a prompt and one more, as far as blocks hold them."""
        if not self.name.startswith("paged"):
            return
        prompt = [*self.prompts[source][:keep], self.random.randrange(VOCABULARY)]
        if len(prompt) > self.limit:
            too_long = f"rows of at most {self.limit} tokens, got row {row} and {len(prompt)} tokens"
            with pytest.raises(ValueError, match=too_long):
                self.cache.reuse(row, prompt)
            return
        lengths = self.lengths
        lengths[row] = 0
        self.truncate(lengths)
        reused = self.cache.reuse(row, prompt)
        assert 0 <= reused < len(prompt)
        self.texts[row] = [Token(id) for id in prompt[:reused]]

    # The oracle

    def wanted(self) -> torch.Tensor:
        """(rows, longest, vocabulary) the logits of every token, from scratch."""
        longest, rows = max(self.lengths), len(self.texts)
        ids = torch.zeros(rows, longest, dtype=torch.int64)
        seen = self._promised(longest).repeat(rows, 1, 1, 1)
        for row, text in enumerate(self.texts):
            ids[row, : len(text)] = torch.tensor([token.id for token in text], dtype=torch.int64)
            seen[row, 0, len(text) :] = False
            for place, token in enumerate(text):
                if hidden := [key for key in token.hidden if key <= place]:  # the mask also covered longer rows
                    seen[row, 0, place, hidden] = False
        return MODELS["attention"][self.name](ids, mask=None if self.has_states else seen)

    def _promised(self, longest: int) -> torch.Tensor:
        """(longest, longest) whether a query sees a key, as long as no mask hides it."""
        queries, keys = torch.arange(longest)[:, None], torch.arange(longest)
        inside = self.name != "ring" or (keys < SINKS) | (keys > queries - WINDOW)
        return (keys <= queries) & inside

    def compare(self) -> None:
        """Recompute all logits, and compare those of the passes since the last time."""
        waiting, self.waiting = [(x, counts, ends) for x, counts, ends in self.waiting if any(counts)], []
        if not waiting:
            return
        wanted = self.wanted()
        for logits, counts, ends in waiting:
            for row, (count, end) in enumerate(zip(counts, ends, strict=True)):
                torch.testing.assert_close(logits[row, :count], wanted[row, end - count : end], rtol=0, atol=1e-12)

    @contextmanager
    def _refusal(self, ends: list[int]) -> Iterator[list[ValueError]]:
        """Collect the error of a pass after which rows hold so many tokens, if there is no room for them."""
        refused = []
        try:
            yield refused
        except OutOfBlocks as error:
            if self.name != "paged-tight":
                raise
            refused.append(error)
        except ValueError as error:
            if max(ends) <= self.limit or "the cache is full" not in str(error):
                raise
            refused.append(error)

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.random.randrange(2**31))
