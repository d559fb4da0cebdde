"""The command line: complete prompts, or serve them over HTTP."""

import errno
import json
import logging
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

from tformer_lib import command_line, pretrained
from tformer_lib.serving.engine import DEFAULT_MEMORY, LLM, blocks_that_fit, freeze_heap
from tformer_lib.serving.request import Params, Request, check_counts
from tformer_lib.serving.speculation import Speculation
from tformer_lib.tokens import Encoding

PROGRAM = "python -m tformer_lib.serving"
HELP = """Serve a model to many requests at once.

  python -m tformer_lib.serving --prompt "Once upon a time"       write on, as it comes
  python -m tformer_lib.serving --prompts requests.jsonl          a line of JSON for each request
  python -m tformer_lib.serving serve --model stories             over HTTP, as OpenAI's clients ask

Where no command is named, it is "complete".
"""

IDLE = 120
"""Seconds that a connection is kept between two requests: longer than clients keep theirs (aiohttp 15, Go 90). Where
the server is the first to close one, a request that is just being sent on it is lost."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class EngineOptions:
    """What both commands need."""

    model: str = "stories"
    """A model of the library, or the folder of one that was trained here."""
    device: str = "auto"
    """Where to run."""
    memory: int = DEFAULT_MEMORY
    """Bytes of keys and values."""
    max_num_seqs: int = 64
    """Requests that run at once."""
    budget: int = 512
    """Tokens computed in a step."""
    max_context: int | None = None
    """The longest text, prompt and new tokens; by default the model's."""
    drafts: int = 0
    """Tokens that are guessed ahead in a step, and checked (speculative decoding)."""
    draft_model: str | None = None
    """The model that guesses them, with the same tokens; by default they are looked up in the text itself."""
    compile: bool = False
    """Join and fuse kernels; but for models of Llama's kind on Hopper, the first steps then take a while."""

    def open(self) -> LLM:
        """The model behind an engine."""
        model, encoding = pretrained.load(self.model, device=command_line.pick_device(self.device))
        blocks = blocks_that_fit(model, self.memory)
        if blocks < 1:
            raise ValueError(f"memory is {self.memory:,} bytes, less than a block of keys and values takes")
        options = {"max_num_seqs": self.max_num_seqs, "budget": self.budget, "max_context": self.max_context}
        options["compile"] = self.compile
        return LLM(model, encoding, blocks=blocks, speculation=self.speculation(), **options)

    def speculation(self) -> Speculation | None:
        """How tokens are drafted, if they are."""
        check_counts(0, drafts=self.drafts)
        if self.drafts == 0:
            if self.draft_model is not None:
                raise ValueError(f"draft_model is {self.draft_model!r}, but drafts is 0: how many should it guess?")
            return None
        if self.draft_model is None:
            return Speculation(tokens=self.drafts)
        draft, _ = pretrained.load(self.draft_model, device=command_line.pick_device(self.device))
        return Speculation(tokens=self.drafts, model=draft)


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
        given = {field.name: getattr(self, field.name) for field in fields(Params) if hasattr(self, field.name)}
        return {"stop_tokens": [encoding.eot_token], **given}

    def requests(self) -> list[dict]:
        """What each request says itself: its prompt, and in a file its parameters."""
        if bool(self.prompt) == (self.prompts is not None):
            raise ValueError("either --prompt or --prompts must be given")
        return read_lines(self.prompts) if self.prompts else [{"prompt": text} for text in self.prompt]


@dataclass(frozen=True)
class Serve(EngineOptions):
    """Answer OpenAI's completions and chat completions over HTTP, until Ctrl-C, which finishes what has begun."""

    host: str = "127.0.0.1"
    """The address to listen at; others than the loopback are reached from outside."""
    port: int = 8000
    """The port to listen at; 0 takes a free one."""
    name: str | None = None
    """What clients call the model; by default its name or folder's."""
    api_key: str | None = None
    """What clients must send; by default what TFORMER_API_KEY holds, or nothing."""
    max_body: int = 2**20
    """Bytes of a request's body."""
    max_queue: int = 256
    """Texts that may wait for a batch slot; more are refused."""
    timeout: float = 300.0
    """Seconds that a request may take."""
    grace: int = 30
    """Seconds that a shutdown waits for what has begun."""


def serve(command: Serve) -> int:
    """Listen until Ctrl-C or SIGTERM; returns the exit status."""
    try:
        import uvicorn

        from tformer_lib.serving.server import Limits, Server
    except ImportError as error:
        raise ImportError(f"{error}; pip install 'tformer-lab[serve]' brings what a server needs") from None
    check_counts(1, max_body=command.max_body)
    check_counts(0, max_queue=command.max_queue, grace=command.grace)
    if not 0 < command.timeout < float("inf") or not 0 <= command.port < 2**16:
        raise ValueError(f"timeout must be above 0 and port from 0 to 65535, got {command.timeout} and {command.port}")
    key = command.api_key or os.environ.get("TFORMER_API_KEY") or None
    limits = Limits(command.max_body, command.max_queue, command.timeout)
    name = command.name or Path(command.model).resolve().name
    llm = command.open()
    # Two tokens build the kernels; else the first client would wait for them.
    llm.generate([[llm.engine.encoding.eot_token]], {"max_new_tokens": 2})
    server = Server(llm.engine, name, api_key=key, limits=limits)
    options = {"log_level": "warning", "access_log": False, "server_header": False, "timeout_keep_alive": IDLE}
    options |= {"ws": "none", "http": "h11"}  # httptools loses the body of a client that offers HTTP/2, as Java's does
    config = uvicorn.Config(server.app, timeout_graceful_shutdown=command.grace, **options)
    logging.getLogger("uvicorn.error").addFilter(is_not_of_upgrades)
    with listen(command.host, command.port) as listening:
        address = f"[{command.host}]" if ":" in command.host else command.host
        if command.host not in LOOPBACK and key is None:
            print(
                "warning: anybody who reaches this address may use the model; --api-key asks for a key", file=sys.stderr
            )
        freeze_heap()
        print(f"serving {name} on http://{address}:{listening.getsockname()[1]}/v1", flush=True)
        uvicorn.Server(config).run(sockets=[listening])
    return 0


def listen(host: str, port: int) -> socket.socket:
    """A socket that clients can connect to.

    Raises:
        OSError: there is no such address here, or another program listens there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        hint = "--port names another one, and --port 0 takes one that is free"
        raise OSError(f"port {port} of {host} is in use by another program; {hint}") from None


def is_not_of_upgrades(record: logging.LogRecord) -> bool:
    """Whether a line belongs into the log.

    A client that offers HTTP/2 or a web socket, as Java's does with each connection, is answered by HTTP/1.1. Nothing
    is wrong then, but uvicorn would advise the operator to install a library of web sockets.
    """
    return not record.getMessage().startswith(("Unsupported upgrade", "No supported WebSocket"))


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
    import tyro  # here, so that the library works where there is no tyro

    commands = Annotated[Complete, tyro.conf.subcommand("complete")] | Annotated[Serve, tyro.conf.subcommand("serve")]
    words = list(arguments)
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help")):
        words = ["complete", *words]
    command = command_line.parse(commands, words, program=PROGRAM, description=HELP)
    return serve(command) if isinstance(command, Serve) else complete(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command_line.run(lambda: run_command(sys.argv[1:] if arguments is None else arguments))
