"""A conversation with a model: turns that share one cache, so that of each turn only what is new is read."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tformer_lib.generation.decoding import cache_of, check_vocabulary, prefill, tokens_after
from tformer_lib.generation.sampling import Sampler, Sampling
from tformer_lib.generation.steps import decode_step
from tformer_lib.generation.text import TextStream
from tformer_lib.pretrained import HubEncoding
from tformer_lib.tokens import Encoding

LONGEST = 4096
"""Tokens that a conversation may hold, where the model allows more and nobody asks for more."""

CHUNK = 512
"""Tokens of a turn that one pass reads, which bounds the memory of its logits."""


@dataclass
class Turn:
    """What was said, what was answered, and what it took.

    Attributes:
        said: the user's text.
        tokens: of the whole text up to the end of the answer, its stop token included.
        start: how many of them stood there before the answer.
        read: how many of them were read in this turn; the others were in the cache.
        answer: the text of the answer so far.
        ended: whether the model ended its answer itself.
        reading, writing: seconds.
    """

    said: str
    tokens: list[int]
    start: int
    read: int = 0
    answer: str = ""
    ended: bool = False
    reading: float = 0.0
    writing: float = 0.0

    @property
    def written(self) -> int:
        """Tokens of the answer, its stop token included."""
        return len(self.tokens) - self.start

    @property
    def tokens_per_second(self) -> float:
        """How fast the answer was written; the first token, which reading brings along, is left out."""
        return (self.written - 1) / self.writing if self.written > 1 and self.writing > 0 else 0.0


@dataclass
class Conversation:
    """Turns with a model, which keeps the keys and values of all that was said.

    A model with a chat template is given each turn in the form that it was trained on. Any other model goes on with
    the text: what you say is appended, after a space if there is none, and the answer is how the model goes on.

        conversation = Conversation(model, encoding)
        for piece in conversation.say("Hello!", max_new_tokens=100, temperature=0.7):
            print(piece, end="", flush=True)

    Args:
        model: a ``Decoder``.
        encoding: its tokens.
        context: the most tokens that it may hold; the model's ``max_length``, but at most :data:`LONGEST`, if not
            given.
        system: what a model with a chat template is told before the first turn.
        plain: go on with the text even if there is a chat template.

    Raises:
        ValueError: the context is longer than the model's, or than the device has memory for; or a model without a
            chat template is to be told something.
    """

    model: nn.Module
    encoding: Encoding | HubEncoding
    context: int | None = None
    system: str | None = None
    plain: bool = False
    turns: list[Turn] = field(default_factory=list, init=False)

    def __post_init__(self):
        most = self.model.config.max_length
        if self.context is None:
            self.context = min(most, LONGEST)
        if not 2 <= self.context <= most:
            raise ValueError(f"context must be from 2 to {most}, which is the model's, got {self.context}")
        if self.system is not None and not self.templated:
            raise ValueError("this model has no chat template, so it cannot be told what it is")
        self.cache = cache_of(self.model, 1, self.context)
        self.held: list[int] = []  # the tokens whose keys and values the cache holds
        self.draws = 0  # answers so far, each of which has random numbers of its own

    @property
    def templated(self) -> bool:
        """Whether turns are written in the form of a chat template."""
        return not self.plain and getattr(self.encoding, "template", None) is not None

    def say(self, text: str, *, max_new_tokens: int = 256, seed: int = 0, **sampling) -> Iterator[str]:
        """Take a turn: pieces of the answer, as they come. The turn is ``turns[-1]`` from the first piece on.

        Whoever stops listening ends the answer there, and the conversation can go on from it.

        Args:
            text: what you say.
            max_new_tokens: the most tokens of the answer; fewer where the context has no room for them.
            seed: of the random numbers; each answer draws from a stream of its own.
            sampling: the other fields of :class:`Sampling`.

        Raises:
            ValueError: there is no room for an answer, or a rule is out of its range. Nothing has changed then.
        """
        rules = Sampling(seed=seed + self.draws, **sampling)
        tokens = self.tokens_with(text)
        room = self.context - len(tokens)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if room < 1:
            raise ValueError(
                f"with this turn the conversation has {len(tokens)} tokens, and its context is {self.context}: "
                "begin a new one, or ask for a longer context"
            )
        check_vocabulary([tokens], self.model.config.vocab_size)
        self.draws += 1
        turn = Turn(text, tokens, len(tokens))
        self.turns.append(turn)
        return self.answer(turn, rules, min(max_new_tokens, room))

    def answer(self, turn: Turn, rules: Sampling, count: int) -> Iterator[str]:
        """Read what is new of a turn, and write its answer of at most ``count`` tokens: pieces of text."""
        start = time.perf_counter()
        try:
            with torch.inference_mode(False):  # the cache outlives the mode that a caller may be in
                logits = self.read(turn)
                ends = stop_tokens(self.encoding)
                stops = torch.tensor(ends, dtype=torch.int64, device=logits.device)
                sampler = Sampler(rules, [turn.tokens], count, self.model.config.vocab_size, logits.device)
            stream, step = TextStream(self.encoding), decode_step(self.model, self.cache)
            for found in tokens_after(logits, sampler, step, count=count, stops=stops):
                token, now = found.item(), time.perf_counter()
                if turn.written == 0:
                    turn.reading = now - start
                turn.tokens.append(token)
                turn.writing = now - start - turn.reading
                turn.ended = token in ends
                self.held = turn.tokens[: self.cache.host_lengths[0]]
                piece = "" if turn.ended else stream.push(token)
                turn.answer += piece
                if piece:
                    yield piece
            last = stream.finish()
            turn.answer += last
            if last:
                yield last
        except GeneratorExit:  # nobody listens any more: what was written stays
            raise
        except BaseException:  # a pass that was interrupted may have overwritten what a ring held
            self.cache.reset()
            self.held = []
            raise

    def read(self, turn: Turn) -> Tensor:
        """Read what the cache does not hold of a turn's tokens; returns the logits after the last, (1, vocab_size)."""
        kept = min(common(self.held, turn.tokens), len(turn.tokens) - 1)  # one at least gives the logits
        if kept < len(self.held):
            kept = self.forget_after(kept)
        turn.read = len(turn.tokens) - kept
        logits = prefill(self.model, [turn.tokens[kept:]], self.cache, chunk=CHUNK)
        self.held = turn.tokens[: self.cache.host_lengths[0]]
        return logits

    def forget_after(self, kept: int) -> int:
        """Shorten the cache to its first tokens; where a ring or a state cannot go back, to none. Returns how many."""
        try:
            self.cache.truncate([kept])
        except ValueError:
            self.cache.reset()
            kept = 0
        self.held = self.held[:kept]
        return kept

    def tokens_with(self, text: str) -> list[int]:
        """The tokens of the conversation so far and of a turn.

        What was read and written stays as it is: only what follows is made into tokens, because a tokenizer may cut an
        answer into other tokens than those that the model wrote.
        """
        before = self.turns[-1] if self.turns else None
        if not self.templated:
            if before is None:
                return first_tokens(self.encoding, text)
            apart = before.ended or not text or text[0].isspace() or (before.said + before.answer)[-1:].isspace()
            return before.tokens + self.encoding.encode_ordinary(text if apart else f" {text}")
        rendered = self.encoding.render([*self.messages, {"role": "user", "content": text}])
        if before is None:
            return self.encoding.encode(rendered, specials=False)
        so_far = self.encoding.render(self.messages[:-1]) + before.answer
        if not rendered.startswith(so_far):  # the template shortens or changes what was said before
            return self.encoding.encode(rendered, specials=False)
        tokens = before.tokens[:-1] if before.ended else before.tokens  # the template writes the end of a turn itself
        return tokens + self.encoding.encode(rendered[len(so_far) :], specials=False)

    @property
    def messages(self) -> list[dict]:
        """The conversation as a chat template reads it."""
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for turn in self.turns:
            messages += [{"role": "user", "content": turn.said}, {"role": "assistant", "content": turn.answer}]
        return messages

    def take_back(self) -> str:
        """Forget the last turn, and return what was said in it. Its keys and values stay until they are in the way.

        Raises:
            ValueError: nothing was said yet.
        """
        if not self.turns:
            raise ValueError("nothing was said yet")
        return self.turns.pop().said

    def clear(self) -> None:
        """Begin anew."""
        self.turns.clear()


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens at their beginnings are the same."""
    differ = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))


def stop_tokens(encoding: Encoding | HubEncoding) -> Sequence[int]:
    """The tokens that end an answer."""
    if isinstance(encoding, HubEncoding):
        return encoding.stop_tokens
    try:
        return [encoding.eot_token]
    except KeyError:  # an encoding of characters that marks no end
        return []


def first_tokens(encoding: Encoding | HubEncoding, text: str) -> list[int]:
    """The tokens of a text that begins here, after the token that the model knows beginnings by, if there is one.

    A model that was trained here has seen texts one after the other, with the end of one before the beginning of the
    next.

    Raises:
        ValueError: the text is empty, and there is no such token.
    """
    if isinstance(encoding, HubEncoding):
        tokens = encoding.encode(text)
    else:
        tokens = [*stop_tokens(encoding), *encoding.encode_ordinary(text)]
    if not tokens:
        raise ValueError("the text is empty: there is no token to continue")
    return tokens
