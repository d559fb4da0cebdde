"""Speculative decoding: guess the next tokens cheaply, and let the model check all guesses in one pass.

A decode step at a small batch reads all weights to write one token a row. The same step can compute several tokens of a
row for nearly the same bytes, if somebody says what they might be. So a *drafter* proposes k tokens, the step computes
the logits after the last known token and after each draft, and a token is chosen at each of these 1 + k places by the
request's own rules. Drafts count as long as they are what was chosen; the first choice that differs from its draft is
the next token, and what was computed for the drafts behind it is rolled back (Leviathan et al. 2023, arXiv:2211.17192;
Chen et al. 2023, arXiv:2302.01318).

Each token that is written was chosen from the model's own logits, with the random number that belongs to its place. So
the text is the one that would be written without drafts: equal token for token where it is greedy, and, with the same
seed, where it is sampled. A draft model draws with the same numbers, so that it often draws the same tokens. Accepting
with probability min(1, p / q), as in the papers, keeps the distribution too and accepts somewhat more, but the text
would then depend on who drafts.

With an acceptance rate a, the same for each draft, a step with k drafts writes (1 - a^(k + 1)) / (1 - a) tokens.

- :class:`NgramDrafter` looks the last few tokens up in the text itself: what followed them last time may follow again.
- :class:`ModelDrafter` asks a smaller model with the same tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from tformer_lib.paged_attention import BlockAllocator, BlockTable, OutOfBlocks
from tformer_lib.serving.request import Request, check_counts
from tformer_lib.serving.runner import Runner
from tformer_lib.serving.scheduler import Row


@dataclass(frozen=True)
class Speculation:
    """How an engine drafts. In brackets: the names in vLLM's ``speculative_config``.

    Raises:
        ValueError: a number is out of its range.
    """

    tokens: int = 4
    """Drafts of a row in a step, at most (``num_speculative_tokens``)."""
    model: nn.Module | None = None
    """A ``Decoder`` with the same vocabulary that drafts (``model``); None looks n-grams up in the text itself."""
    ngram_max: int = 4
    """The last so many tokens are looked up first (``prompt_lookup_max``) ..."""
    ngram_min: int = 2
    """... and then fewer, down to so many (``prompt_lookup_min``)."""
    most_rows: int = 32
    """Nothing is drafted while more requests run: then the step is no longer bound by reading the weights."""

    def __post_init__(self):
        counts = {name: getattr(self, name) for name in ("tokens", "ngram_max", "ngram_min", "most_rows")}
        check_counts(1, **counts)
        if self.ngram_min > self.ngram_max:
            raise ValueError(f"ngram_min must be at most ngram_max, got {self.ngram_min} and {self.ngram_max}")


def accepted(drafts: Sequence[int], chosen: Sequence[int]) -> int:
    """How many drafts count: the first so many are what was chosen."""
    pairs = enumerate(zip(drafts, chosen, strict=False))
    return next((place for place, (draft, token) in pairs if draft != token), len(drafts))


def expected_tokens(acceptance: float, drafts: int) -> float:
    """Tokens that a step writes on average, if each draft is accepted with this probability, whatever came before."""
    return sum(acceptance**i for i in range(drafts + 1))


@dataclass(frozen=True)
class Patience:
    """When drafts are worth what they cost, and how long a request writes without them where they are not."""

    worth: float
    """Accepted drafts of a step, on average, that pay for it: a step with drafts is longer, and nothing overlaps it."""
    growth: int
    """A pause is so many times as long as the one before it."""
    longest: int
    """The longest pause, in tokens."""


class Attempts:
    """How a request's drafts have fared.

    Args:
        patience: with how much of it they are made.
    """

    def __init__(self, patience: Patience):
        self.patience, self.failures, self.paused_until = patience, 0, 0
        self.mean = 1.2 * patience.worth  # of accepted drafts, the latest steps counting most: one failure is too many

    def count(self, kept: int, length: int) -> None:
        """Of the latest drafts ``kept`` counted; the text has ``length`` tokens now."""
        self.mean += (kept - self.mean) / 4
        self.failures = 0 if self.mean >= self.patience.worth else self.failures + 1
        pause = min(self.patience.growth**self.failures, self.patience.longest) if self.failures else 0
        self.paused_until = length + pause


class Drafter(ABC):
    """Who guesses what follows the texts that are being written.

    Args:
        options: how many drafts, and for how many rows.
    """

    patience = Patience(worth=0.5, growth=2, longest=64)

    def __init__(self, options: Speculation):
        self.options = options
        self.attempts: dict[Request, Attempts] = {}

    def candidates(self, running: Sequence[Request]) -> list[Request]:
        """Requests for which it is worth knowing all tokens before the next step: drafts are likely to be found.

        They may have a token on its way, which nobody knows yet.
        """
        if len(running) > self.options.most_rows:
            return []
        return [request for request in running if self._may_draft(request) and self.is_promising(request)]

    def _may_draft(self, request: Request) -> bool:
        """Whether it writes, its rules look at nothing but the logits, and two tokens or more are wanted still."""
        if request.wanted != 1 or request.rules.repetition_penalty != 1 or request.end - request.known < 2:
            return False
        attempts = self.attempts.get(request)
        return attempts is None or len(request.tokens) >= attempts.paused_until

    def propose(self, candidates: Iterable[Request]) -> dict[Request, list[int]]:
        """Drafts of what follows each text, for those of which no token is on its way."""
        ready = [request for request in candidates if request.batch_slot >= 0 and self._may_draft(request)]
        found = self.guess({request: min(self.options.tokens, request.end - request.known - 1) for request in ready})
        for request in ready:
            if not found.get(request):
                self.settle(request, 0)
        return {request: drafts for request, drafts in found.items() if drafts}

    def settle(self, request: Request, kept: int) -> None:
        """Of the drafts of a request ``kept`` counted."""
        self.attempts.setdefault(request, Attempts(self.patience)).count(kept, len(request.tokens))

    def forget(self, request: Request) -> None:
        """It has ended."""
        self.attempts.pop(request, None)

    def reset(self) -> None:
        """Forget how drafts have fared, and what was computed: it is not to be trusted any more."""
        self.attempts.clear()

    @abstractmethod
    def is_promising(self, request: Request) -> bool:
        """Whether drafts for it are likely to be found."""

    @abstractmethod
    def guess(self, wanted: dict[Request, int]) -> dict[Request, list[int]]:
        """Up to so many drafts for each of these requests, whose tokens are all known."""


class NgramIndex:
    """Where each short run of tokens stands in a text that grows.

    Args:
        sizes: the lengths of runs, those to be looked up first at the front.
    """

    def __init__(self, sizes: Sequence[int]):
        self.sizes, self.indexed = sizes, 0
        self.next_to: dict[tuple[int, ...], int] = {}  # a run -> the place after the latest of its occurrences

    def find(self, text: Sequence[int]) -> int | None:
        """The place after the latest earlier occurrence of the text's end; None where there is none.

        Args:
            text: the tokens so far; of one text, each time at least as long.
        """
        for end in range(self.indexed, len(text) - 1):  # runs that end before the last token: it looks for others
            for size in self.sizes:
                if size <= end + 1:
                    self.next_to[tuple(text[end + 1 - size : end + 1])] = end + 1
        self.indexed = max(self.indexed, len(text) - 1)
        runs = (tuple(text[-size:]) for size in self.sizes if size <= len(text))
        return next((self.next_to[run] for run in runs if run in self.next_to), None)


def continuation(text: Sequence[int], place: int, count: int) -> list[int]:
    """``count`` tokens from ``place`` on; where the text ends, what was read goes on in the same rhythm."""
    tokens = list(text[place : place + count])
    while len(tokens) < count:
        tokens.append(tokens[place + len(tokens) - len(text)])
    return tokens


class NgramDrafter(Drafter):
    """What followed the text's last few tokens when they stood in it before (prompt lookup; Saxena 2023).

    It costs a look into a dictionary, and finds something where texts repeat themselves or their prompt: summaries,
    code that is edited, answers that quote.
    """

    def __init__(self, options: Speculation):
        super().__init__(options)
        self.sizes = range(options.ngram_max, options.ngram_min - 1, -1)
        self.indices: dict[Request, NgramIndex] = {}

    def _find(self, request: Request) -> int | None:
        if request not in self.indices:
            self.indices[request] = NgramIndex(self.sizes)
        return self.indices[request].find(request.tokens)

    def is_promising(self, request: Request) -> bool:
        """Whether the known tokens end as something before did."""
        return self._find(request) is not None

    def guess(self, wanted: dict[Request, int]) -> dict[Request, list[int]]:
        """What followed, for those where something did."""
        places = {request: self._find(request) for request in wanted}
        return {r: continuation(r.tokens, places[r], n) for r, n in wanted.items() if places[r] is not None}

    def forget(self, request: Request) -> None:
        """It has ended."""
        super().forget(request)
        self.indices.pop(request, None)


class Shadow:
    """A request as the draft model's runner sees it: the same text and rules, blocks of its own.

    Attributes:
        table: its blocks of the draft model's keys and values.
        pending: drafts of this round that are on the device.
        drafts, after: those of the latest round, and how many tokens of the text they followed.
    """

    def __init__(self, request: Request, allocator: BlockAllocator):
        self.request, self.table, self.pending = request, BlockTable(allocator), 0
        self.tokens, self.params, self.rules = request.tokens, request.params, request.rules
        self.is_plain, self.uniform = request.is_plain, request.uniform
        self.drafts: list[int] = []
        self.after = 0

    @property
    def batch_slot(self) -> int:
        """The request's own."""
        return self.request.batch_slot

    def roll_back(self) -> None:
        """Forget the keys and values of drafts that the text did not take."""
        kept = accepted(self.drafts, self.tokens[self.after :])
        kept = min(kept, len(self.tokens) - self.after)
        self.table.truncate(min(self.table.length, self.after + kept, len(self.tokens) - 1))

    @property
    def missing(self) -> int:
        """Tokens of the text that the draft model has not read."""
        return len(self.tokens) - self.table.length


class ModelDrafter(Drafter):
    """A smaller model that writes ahead. It has blocks of its own, as many as the large one, and no prefix cache.

    Args:
        options: with the draft model.
        model: the one that checks.
        blocks, block_size, max_num_seqs, budget, max_blocks: as the engine's.
        max_context: the longest text.
        compile: see :class:`Runner`.

    Raises:
        ValueError: the models do not share a vocabulary, or the draft model has learned too few positions.
    """

    patience = Patience(worth=1.0, growth=16, longest=1024)  # each draft costs a step of the draft model

    def __init__(
        self,
        options: Speculation,
        model: nn.Module,
        *,
        blocks: int,
        block_size: int,
        max_num_seqs: int,
        budget: int,
        max_blocks: int,
        max_context: int,
        compile: bool = False,
    ):
        super().__init__(options)
        ours, theirs = options.model.config, model.config
        if ours.vocab_size != theirs.vocab_size:
            sizes = f"{ours.vocab_size} tokens, the model that checks {theirs.vocab_size}"
            raise ValueError(f"a draft model must have the same vocabulary: it knows {sizes}")
        if ours.positions == "learned" and ours.max_length < max_context:
            raise ValueError(f"the draft model has learned {ours.max_length} positions, texts may have {max_context}")
        self.budget, self.allocator = budget, BlockAllocator(blocks, block_size)
        sizes = {"max_num_seqs": max_num_seqs, "budget": budget, "max_blocks": max_blocks, "compile": compile}
        self.runner = Runner(options.model, self.allocator, lanes=2, depth=options.tokens + 2, **sizes)
        self.tables = np.zeros((max_num_seqs + 1, max_blocks), dtype=np.int32)
        self.shadows: dict[Request, Shadow] = {}

    def is_promising(self, request: Request) -> bool:
        """Always: a model has a guess for any text."""
        return True

    def guess(self, wanted: dict[Request, int]) -> dict[Request, list[int]]:
        """What the draft model writes, by the request's own rules and random numbers."""
        if self.runner.weights_changed():
            self.reset()
        shadows = {request: shadow for request, n in wanted.items() if (shadow := self._shadow(request, n))}
        if not shadows:
            return {}
        self._read(list(shadows.values()))
        rounds = []
        for place in range(max(wanted[request] for request in shadows)):
            rows = [self._row(shadow) for request, shadow in shadows.items() if wanted[request] > place]
            rounds.append((rows, self.runner.launch(rows, self.tables, send_back=False).tokens))
        written = torch.cat([tokens for _, tokens in rounds]).tolist()  # waits for the device
        takers = [row.request for rows, _ in rounds for row in rows]
        for shadow in shadows.values():
            shadow.drafts, shadow.after, shadow.pending = [], len(shadow.tokens), 0
        for shadow, token in zip(takers, written, strict=True):
            shadow.drafts.append(token)
        return {request: finite(shadow.drafts) for request, shadow in shadows.items()}

    def _shadow(self, request: Request, drafts: int) -> Shadow | None:
        """The request's shadow with blocks for its text and all drafts but the last; None where there are too few."""
        if request not in self.shadows:
            self.shadows[request] = Shadow(request, self.allocator)
        shadow = self.shadows[request]
        shadow.roll_back()
        try:
            shadow.table.reserve(shadow.missing + drafts - 1)
        except OutOfBlocks:
            self._drop(request)
            return None
        blocks = shadow.table.blocks
        self.tables[request.batch_slot, : len(blocks)] = blocks
        return shadow

    def _read(self, shadows: list[Shadow]) -> None:
        """Catch up with the texts until the rest fits into one step."""
        while sum(shadow.missing for shadow in shadows) > self.budget:
            rows, left = [], self.budget
            for shadow in shadows:
                count = min(shadow.missing - 1, left)
                if count > 0:
                    rows.append(Row(shadow, shadow.table.length, count, False))
                    shadow.table.length += count
                    left -= count
            self.runner.launch(rows, self.tables, send_back=False)

    @staticmethod
    def _row(shadow: Shadow) -> Row:
        """The next step of a shadow: what it has not read of its text, or the draft that it wrote last."""
        count = max(shadow.missing, 1)
        row = Row(shadow, shadow.table.length, count, True)
        shadow.table.length += count
        shadow.pending += 1
        return row

    def forget(self, request: Request) -> None:
        """It has ended: its blocks are free."""
        super().forget(request)
        self._drop(request)

    def _drop(self, request: Request) -> None:
        if shadow := self.shadows.pop(request, None):
            shadow.table.free()

    def reset(self) -> None:
        """Read all texts again."""
        super().reset()
        for request in list(self.shadows):
            self._drop(request)


def finite(tokens: list[int]) -> list[int]:
    """The tokens before the first that was none, because the draft model's logits were not finite."""
    return tokens[: next((i for i, token in enumerate(tokens) if token < 0), len(tokens))]


def make_drafter(options: Speculation, model: nn.Module, **sizes: int) -> Drafter:
    """The drafter that the options ask for; ``sizes`` as :class:`ModelDrafter` takes them."""
    return NgramDrafter(options) if options.model is None else ModelDrafter(options, model, **sizes)
