"""What is asked and what is answered: parameters, requests, and pieces of text."""

import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

from tformer_lib.generation import Sampling, TextStream, check_number, random_stream, stops_of
from tformer_lib.paged_attention import BlockTable


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
    logprobs: int | None = None
    """Report the log-probabilities of each token and of so many of the likeliest, by the model alone; None: of none."""

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.seed, int):
            raise ValueError(f"a request's seed must be one number, got {self.seed!r}")
        new = check_number("max_new_tokens", self.max_new_tokens, numbers.Integral)
        if new < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {new}")
        try:
            stop = ("",) if isinstance(self.stop, str) else tuple(self.stop)
        except TypeError:  # a number, a tensor without dimensions
            stop = ("",)
        if not all(map(is_text, stop)):
            raise ValueError(f"stop must be a list of strings, none of them empty, got {self.stop!r}")
        if self.logprobs is not None and check_number("logprobs", self.logprobs, numbers.Integral) < 0:
            raise ValueError(f"logprobs must be at least 0, got {self.logprobs}")
        for name, value in (
            ("max_new_tokens", new),
            ("stop_tokens", tuple(stops_of(self.stop_tokens))),
            ("stop", stop),
        ):
            object.__setattr__(self, name, value)  # as read: an iterator gives its values once

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
        if unknown := sorted(map(str, set(given) - set(known))):
            raise ValueError(f"unknown parameters: {', '.join(unknown)}; there are {', '.join(known)}")
        return cls(**given)

    @property
    def rules(self) -> Sampling:
        """How tokens are chosen, without the seed: requests with equal rules are sampled together."""
        names = [field.name for field in fields(Sampling) if field.name != "seed"]
        return Sampling(**{name: getattr(self, name) for name in names})


def check_counts(least: int, **counts: int) -> None:
    """Refuse what is no whole number, or less than the least."""
    for name, value in counts.items():
        if check_number(name, value, numbers.Integral) < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def is_text(x) -> bool:
    """Whether x is a string, and not an empty one."""
    return isinstance(x, str) and bool(x)


class Request:
    """A prompt, what was asked for, and what has been written so far.

    Attributes:
        id: given by the caller, or a number; ``arrival`` is the place in the order of arrival.
        listener: called with each :class:`Piece` as it comes, by the thread that steps the engine.
        tokens: the prompt and all new tokens that have come back.
        text: what is certain of the new tokens' text, if the engine has an encoding.
        logprobs: what ``Params.logprobs`` asked for, of each new token.
        finish_reason: "length", "stop", "cancelled" or "error"; None while it lasts.
        error: why it was refused, or what ended it.
        table: its blocks; ``table.length`` tokens have been computed or are being so.
        pending: tokens that were sampled for it and have not come back.
        reused: tokens that a prefix cache spared it, ``begun`` of them when it was let in last; ``preemptions``: how
            often it had to start over.
        drafted: tokens that were drafted for it and checked; ``accepted``: how many of them it has written.
    """

    def __init__(self, id, prompt: Sequence[int], params: Params, listener: Callable[["Piece"], None] | None = None):
        self.id, self.params, self.arrival, self.listener = id, params, -1, listener
        self.tokens, self.prompt_length = list(prompt), len(prompt)
        self.text, self.finish_reason, self.error = "", None, None
        self.logprobs: list[LogProbabilities] = []
        self.table: BlockTable | None = None
        self.stream: TextStream | None = None
        self.batch_slot, self.pending, self.reused, self.preemptions = -1, 0, 0, 0
        self.end = self.prompt_length + params.max_new_tokens
        self.stop_tokens = frozenset(params.stop_tokens)
        self.begun, self.drafted, self.accepted = 0, 0, 0
        self.rules, self.random = params.rules, random_stream(params.seed) if params.temperature > 0 else None
        self.uniforms: list[float] = []
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

    def uniform(self, place: int) -> float:
        """The number in [0, 1) that decides which token stands at this place of its text, if it is sampled.

        It belongs to the place, not to the step that asks: drafts that are refused use none up.
        """
        while len(self.uniforms) <= place - self.prompt_length:
            self.uniforms.append(self.random.random())
        return self.uniforms[place - self.prompt_length]

    def __repr__(self) -> str:
        written = len(self.tokens) - self.prompt_length
        return f"Request({self.id!r}, prompt={self.prompt_length}, new={written}, finish_reason={self.finish_reason!r})"


class LogProbabilities(NamedTuple):
    """What the model thought of a token when it was chosen: natural logarithms, temperature and rules left out."""

    chosen: float
    top: list[tuple[int, float]]
    """The likeliest tokens and theirs."""


class Piece(NamedTuple):
    """What one step wrote for one request."""

    request: Request
    token: int | None
    """None where the request ended without one: refused, cancelled, or with an error."""
    text: str
    """Whole characters; later pieces may be needed for this token's."""
    logprobs: LogProbabilities | None = None
    finish_reason: str | None = None
    """Its request's, where this is the last piece of it."""
