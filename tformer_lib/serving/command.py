"""The command line: complete prompts."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from tformer_lib import command_line, pretrained
from tformer_lib.serving.engine import DEFAULT_MEMORY, LLM, blocks_that_fit
from tformer_lib.serving.request import Params, Request
from tformer_lib.tokens import Encoding
from tformer_lib.training import pick_device

PROGRAM = "python -m tformer_lib.serving"
HELP = """Serve a model to many requests at once.

  python -m tformer_lib.serving --prompt "Once upon a time"       write on, as it comes
  python -m tformer_lib.serving --prompts requests.jsonl          a line of JSON for each request
"""


@dataclass(frozen=True)
class EngineOptions:
    """What an engine is made of."""

    model: str = "stories"
    """A model of the library, or the folder of one that was trained here."""
    device: str = "auto"
    """Where to run."""
    memory: int = DEFAULT_MEMORY
    """Bytes of keys and values."""
    seats: int = 64
    """Requests that run at once."""
    budget: int = 512
    """Tokens computed in a step."""
    max_context: int | None = None
    """The longest text, prompt and new tokens; by default the model's."""

    def open(self) -> LLM:
        """The model behind an engine."""
        model, encoding = pretrained.load(self.model, device=pick_device(self.device))
        blocks = blocks_that_fit(model, self.memory)
        if blocks < 1:
            raise ValueError(f"memory is {self.memory:,} bytes, less than a block of keys and values takes")
        options = {"seats": self.seats, "budget": self.budget, "max_context": self.max_context}
        return LLM(model, encoding, blocks=blocks, **options)


@dataclass(frozen=True)
class Complete(EngineOptions):
    """Continue one prompt as it comes, or several with a line of JSON for each."""

    prompt: tuple[str, ...] = ()
    """The prompts."""
    prompts: Path | None = None
    """A file with one {"prompt": "...", "temperature": ...} a line."""
    max_new_tokens: int = 64
    """Tokens to write at most."""
    stop: tuple[str, ...] = ()
    """End before the first of these strings."""
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

    def asked(self, encoding: Encoding) -> dict:
        """The parameters of a request that says nothing itself."""
        names = [field.name for field in fields(Params) if field.name != "stop_tokens"]
        return {"stop_tokens": [encoding.eot_token], **{name: getattr(self, name) for name in names}}

    def requests(self) -> list[dict]:
        """What each request says itself: its prompt, and in a file its parameters."""
        if bool(self.prompt) == (self.prompts is not None):
            raise ValueError("either --prompt or --prompts must be given")
        return read_lines(self.prompts) if self.prompts else [{"prompt": text} for text in self.prompt]


def complete(command: Complete) -> int:
    """Stream a single prompt, or print one line of JSON for each request; returns the exit status."""
    requests, llm = command.requests(), command.open()
    asked = command.asked(llm.engine.encoding)
    if len(command.prompt) == 1:
        return stream(llm, command.prompt[0], asked)
    prompts = [line.pop("prompt", "") for line in requests]
    answers = llm.generate(prompts, [{**asked, **line} for line in requests])
    for request in answers:
        print(json.dumps(summary(request), ensure_ascii=False))
    refused = sum(request.error is not None for request in answers)
    return command_line.refuse(f"{refused} of {len(answers)} requests got no answer") if refused else 0


def stream(llm: LLM, prompt: str, asked: dict) -> int:
    """Print a text as it comes; returns the exit status."""
    pieces = llm.stream([prompt], asked)
    first = next(pieces)
    if first.request.error is not None:
        return command_line.refuse(first.request.error)
    print(prompt + first.text, end="", flush=True)
    for piece in pieces:
        print(piece.text, end="", flush=True)
    print()
    return 0 if first.request.error is None else command_line.refuse(first.request.error)


def summary(request: Request) -> dict:
    """A request's line."""
    line = {"id": request.id, "text": request.text, "finish_reason": request.finish_reason}
    return line if request.error is None else {**line, "error": request.error}


def read_lines(path: Path) -> list[dict]:
    """The requests of a file, one JSON object a line; empty lines are skipped.

    Raises:
        ValueError: a line is something else; the message says which.
    """
    requests = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):  # U+2028 ends no line of JSON
        if not line.strip():
            continue
        try:
            requests.append(dict(json.loads(line)))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: one JSON object was expected ({error})") from None
    return requests


def run_command(arguments: Sequence[str]) -> int:
    """Do what the command line asks for; returns the exit status."""
    return complete(command_line.parse(Complete, arguments, program=PROGRAM, description=HELP))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command_line.run(lambda: run_command(sys.argv[1:] if arguments is None else arguments))
