"""The command line: go on with a text, or converse."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from tformer_lib import command_line, pretrained
from tformer_lib.generation.conversation import Conversation

PROGRAM = "python -m tformer_lib.generation"
HELP = """Let a model write: one that was trained here, or a public one.

  python -m tformer_lib.generation --prompt "Once upon a time"     go on with a text, as it comes
  python -m tformer_lib.generation --chat                          converse: a line is a turn, Ctrl-D ends
  python -m tformer_lib.generation --chat --model Qwen/Qwen3-0.6B  with a model of the Hugging Face hub, or a folder

Of each turn only its new tokens are read: the keys and values of all that was said before stay in the cache. A line
"/again" asks for another answer to the last turn, "/new" begins a new conversation. A model without a chat template,
such as the stories model that comes with the library, goes on with the text instead of answering.
"""


@dataclass(frozen=True)
class Settings:
    """What to write, with what."""

    model: str = "stories"
    """A model of the library, a folder (of a run, or laid out as the hub does it), or a name on the hub."""
    prompt: str | None = None
    """The text to go on with; with --chat the first turn."""
    chat: bool = False
    """Converse: a line of the input is a turn."""
    system: str | None = None
    """What a model with a chat template is told before the first turn."""
    dtype: Literal["float32", "bfloat16", "int8"] | None = None
    """Of the weights in memory; as they are in the file if not given. int8 keeps the blocks' matrices in 8 bits."""
    device: str = "auto"
    """Where to run."""
    context: int | None = None
    """The most tokens of the text; by default the model's, but at most 4,096."""
    max_new_tokens: int = 256
    """Tokens to write at most in a turn."""
    temperature: float = 0.0
    """What the logits are divided by: 0 always takes the likeliest token, 1 draws from the model's own distribution."""
    top_k: int | None = None
    """Draw from this many likeliest tokens only; None is from all."""
    top_p: float | None = None
    """Draw from the fewest likeliest tokens whose probabilities add up to this."""
    min_p: float | None = None
    """Draw from tokens at least this many times as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that were seen become less likely."""
    seed: int = 0
    """Seeds the draws."""

    @property
    def rules(self) -> dict:
        """The arguments of :meth:`Conversation.say`."""
        names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
        return {name: getattr(self, name) for name in names}

    def open(self) -> Conversation:
        """The model behind a conversation.

        Raises:
            ValueError: there is nothing to do, or the model cannot be had.
            OSError: one of its files is missing.
        """
        if self.prompt is None and not self.chat:
            raise ValueError("either --prompt or --chat must be given")
        dtype = None if self.dtype is None else getattr(torch, self.dtype)
        model, encoding = pretrained.load(self.model, device=command_line.pick_device(self.device), dtype=dtype)
        return Conversation(model, encoding, self.context, self.system, plain=not self.chat)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command_line.run(lambda: write(arguments))


def write(arguments: Sequence[str] | None) -> int:
    """Do what the arguments ask for; returns the exit status."""
    settings = command_line.parse(Settings, arguments, program=PROGRAM, description=HELP)
    conversation = settings.open()
    if not settings.chat:
        pieces = conversation.say(settings.prompt, **settings.rules)
        print(settings.prompt, end="", flush=True)
        show(pieces)
        return 0
    if not conversation.templated:
        note(f"{settings.model} has no chat template: it goes on with the text, and what you write is appended to it")
    return converse(conversation, settings)


def converse(conversation: Conversation, settings: Settings) -> int:
    """Take turns until the input ends; returns the exit status, which says whether a turn was refused."""
    status = 0
    for line in turns(settings.prompt):
        if line == "/new":
            conversation.clear()
            continue
        try:
            text = conversation.take_back() if line == "/again" else line
            pieces = conversation.say(text, **settings.rules)
        except ValueError as error:
            status = command_line.refuse(error)
            continue
        show(pieces)
        if sys.stdin.isatty():
            turn = conversation.turns[-1]
            note(f"[tokens read: {turn.read}, written: {turn.written}, {turn.tokens_per_second:.1f} a second]")
    return status


def turns(first: str | None) -> Iterator[str]:
    """The first turn, if it is given, and a line of the input each; at a terminal it is asked for."""
    if first is not None:
        yield first
    if not sys.stdin.isatty():
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def show(pieces: Iterator[str]) -> None:
    """Print pieces of a text as they come, and end the line."""
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


def note(text: str) -> None:
    """Say something that is no answer."""
    print(text, file=sys.stderr, flush=True)
