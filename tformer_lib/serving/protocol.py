"""What OpenAI's clients say and hear: bodies become prompts and parameters, requests become bodies.

The fields are those of the completions and chat completions of OpenAI's API reference, and those that vLLM adds to them
(top_k, min_p, repetition_penalty, stop_token_ids, ignore_eos, continuous_usage_stats). A field that is not served is
refused, never ignored.
"""

import codecs
import secrets
import time
from dataclasses import dataclass
from typing import Any

from tformer_lib.serving.request import Piece, Request
from tformer_lib.tokens import Encoding

MOST_CHOICES = 64
"""The most texts that one body may ask for: its prompts times n."""

MOST_LOGPROBS, MOST_STOPS = 20, 16

SHARED = {
    "model", "temperature", "top_p", "n", "stream", "stream_options", "stop", "seed", "user", "metadata", "store",
    "presence_penalty", "frequency_penalty", "logit_bias", "top_k", "min_p", "repetition_penalty", "stop_token_ids",
    "ignore_eos", "max_tokens", "logprobs",
}  # fmt: skip
FIELDS = {
    "completion": SHARED | {"prompt", "echo", "suffix", "best_of"},
    "chat": SHARED | {
        "messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls", "functions",
        "function_call", "response_format", "modalities", "service_tier", "prompt_cache_key", "safety_identifier",
    },
}  # fmt: skip
NEUTRAL = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
}
"""Fields that are known and not served: all that they may be is what changes nothing."""

ROLES = ("system", "developer", "user", "assistant")


class Refused(Exception):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        message: what the client is told.
        code: one word for programs, as OpenAI has them.
        param: the field that is wrong.
    """

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def body(self) -> dict:
        """As OpenAI's clients read it."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        param = None if self.param is None else printable(self.param)
        return {"error": {"message": printable(self.message), "type": kind, "param": param, "code": self.code}}


def printable(text: str) -> str:
    """A text that UTF-8 can write: JSON may bring half of a surrogate pair, in the name of a field for example."""
    return text.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True)
class Ask:
    """What a body asks for."""

    chat: bool
    model: str
    prompts: list[str | list[int]]
    n: int
    wish: dict
    """The fields of ``Params``, but for the seed; max_new_tokens is None where the client leaves it open."""
    seed: int
    stream: bool
    include_usage: bool
    continuous_usage: bool
    """Whether each event counts the tokens of its text so far; vLLM's load generators ask for this."""

    @property
    def choices(self) -> int:
        """How many texts are to be written."""
        return len(self.prompts) * self.n


def read(body: Any, *, chat: bool, encoding: Encoding) -> Ask:
    """A body's meaning.

    Args:
        body: parsed JSON.
        chat: whether it came to the chat completions.
        encoding: whose end-of-text token ends a text.

    Raises:
        Refused: the body is no object, lacks what is needed, or holds what is not known or of the wrong kind.
    """
    if not isinstance(body, dict):
        raise Refused(400, "the body must be a JSON object")
    fields = {name: value for name, value in body.items() if value is not None}
    for name in fields:
        if name not in FIELDS["chat" if chat else "completion"]:
            raise Refused(400, f"unknown field: {name}", "unknown_parameter", name)
    n = take(fields, "n", int, 1)
    if fields.get("best_of") == n:  # the best n of n are all of them
        del fields["best_of"]
    for name, allowed in NEUTRAL.items():  # in this order: tools before the choice of one
        if name in fields and fields[name] not in allowed:
            raise Refused(400, f"{name} is not supported", "unsupported_parameter", name)
    prompts = [render(take(fields, "messages", list))] if chat else prompts_of(fields)
    if not 1 <= n * len(prompts) <= MOST_CHOICES:
        raise Refused(400, f"1 to {MOST_CHOICES} texts may be asked for at once, got {n * len(prompts)}", param="n")
    options = take(fields, "stream_options", dict, {})
    refuse_unknown(options, {"include_usage", "continuous_usage_stats"}, "stream_options")
    include_usage = take(options, "include_usage", bool, False)
    return Ask(
        chat=chat,
        model=take(fields, "model", str),
        prompts=prompts,
        n=n,
        wish=wish_of(fields, chat, encoding),
        seed=take(fields, "seed", int, secrets.randbits(48)),
        stream=take(fields, "stream", bool, False),
        include_usage=include_usage,
        continuous_usage=take(options, "continuous_usage_stats", bool, False) and include_usage,
    )


def refuse_unknown(fields: dict, known: set[str], place: str) -> None:
    """Refuse a field inside another that is not served, unless it says nothing: null, an empty list, false."""
    for name in fields.keys() - known:
        if fields[name]:
            raise Refused(400, f"unknown field in {place}: {shortened(name)}", "unknown_parameter", place)


REQUIRED = object()


def take(fields: dict, name: str, kind: type, default: Any = REQUIRED) -> Any:
    """A field of one kind; a bool is no int."""
    if name not in fields:
        if default is REQUIRED:
            raise Refused(400, f"{name} is missing", "missing_required_parameter", name)
        return default
    value = fields[name]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise Refused(400, f"{name} must be of type {kind.__name__}, got {shortened(value)}", "invalid_type", name)
    return value


def shortened(value: Any) -> str:
    """A value as an error message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def wish_of(fields: dict, chat: bool, encoding: Encoding) -> dict:
    """The fields of ``Params``, as far as the body has them; their ranges are checked by Params."""
    stop = fields.get("stop", [])
    if isinstance(stop, list) and len(stop) > MOST_STOPS:
        raise Refused(400, f"at most {MOST_STOPS} stop strings are looked for, got {len(stop)}", param="stop")
    ends = [] if take(fields, "ignore_eos", bool, False) else [encoding.eot_token]
    wish = {name: fields[name] for name in ("top_p", "top_k", "min_p", "repetition_penalty") if name in fields}
    if take(wish, "top_k", int, 0) in (0, -1):  # vLLM's words for all
        wish.pop("top_k", None)
    most = fields.get("max_completion_tokens", fields.get("max_tokens", None if chat else 16))
    return wish | {
        "temperature": fields.get("temperature", 1.0),
        "max_new_tokens": most,
        "stop": [stop] if isinstance(stop, str) else stop,
        "stop_tokens": ends + take(fields, "stop_token_ids", list, []),
        "logprobs": logprobs_of(fields, chat),
    }


def logprobs_of(fields: dict, chat: bool) -> int | None:
    """How many of the likeliest tokens are to be reported; None reports nothing."""
    if chat:
        wanted, count = take(fields, "logprobs", bool, False), take(fields, "top_logprobs", int, 0)
        if count and not wanted:
            raise Refused(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    else:
        wanted, count = "logprobs" in fields, take(fields, "logprobs", int, 0)
    if not 0 <= count <= MOST_LOGPROBS:
        raise Refused(400, f"at most {MOST_LOGPROBS} tokens are reported, got {count}", param="logprobs")
    return count if wanted else None


def prompts_of(fields: dict) -> list[str | list[int]]:
    """One text or list of tokens, or several."""
    prompt = fields.get("prompt")
    if isinstance(prompt, str) or is_tokens(prompt):
        return [prompt]
    if isinstance(prompt, list) and prompt and all(isinstance(part, str) or is_tokens(part) for part in prompt):
        return prompt
    wanted = "a text, a list of tokens, or a list of either"
    raise Refused(400, f"prompt must be {wanted}, got {shortened(prompt)}", "invalid_type", "prompt")


def is_tokens(prompt: Any) -> bool:
    """Whether it is a list of whole numbers, and not an empty one."""
    is_list = isinstance(prompt, list) and bool(prompt)
    return is_list and all(isinstance(token, int) and not isinstance(token, bool) for token in prompt)


def render(messages: list) -> str:
    """A conversation as a text that an answer follows. The models here were taught no format of their own."""
    if not messages:
        raise Refused(400, "messages is empty", param="messages")
    lines = []
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        if role is None:
            raise Refused(400, f"a message needs a role and a content, got {shortened(message)}", param="messages")
        if role not in ROLES:
            raise Refused(
                400, f"a message's role must be {' or '.join(ROLES)}, got {shortened(role)}", param="messages"
            )
        refuse_unknown(message, {"role", "content", "name"}, "messages")
        name = take(message, "name", str, "") if message.get("name") is not None else ""
        lines.append(f"{role}{name and f' {name}'}: {content_of(message)}\n")
    return "".join(lines) + "assistant:"


def content_of(message: dict) -> str:
    """A message's text, which may come in parts."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content:
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if all(isinstance(part, str) for part in parts):
            return "".join(parts)
    raise Refused(400, f"a message's content must be text, got {shortened(content)}", param="messages")


class Reply:
    """The bodies that answer one ask.

    Args:
        ask: what was asked.
        encoding: whose texts the tokens are.
    """

    def __init__(self, ask: Ask, encoding: Encoding):
        self.ask, self.encoding, self.created = ask, encoding, int(time.time())
        self.id = ("chatcmpl-" if ask.chat else "cmpl-") + secrets.token_hex(12)
        self.lengths = [0] * ask.choices  # of the text that the tokens so far make, for the offsets of the next
        self.decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in range(ask.choices)]
        self.begun = [False] * ask.choices
        self.written = [0] * ask.choices

    def whole(self, requests: list[Request]) -> dict:
        """The answer at once; ``Request.id`` is the number of the choice."""
        kind = "chat.completion" if self.ask.chat else "text_completion"
        return {**self._head(kind), "choices": list(map(self._choice, requests)), "usage": self._usage(requests)}

    def chunk(self, piece: Piece) -> dict | None:
        """A piece as an event, or None where there is nothing to say."""
        index = piece.request.id
        self.written[index] += piece.token is not None
        logprobs = None if piece.logprobs is None else self._logprobs(index, [piece.token], [piece.logprobs])
        reason = piece.finish_reason
        if not (piece.text or logprobs or reason):
            return None
        choice: dict = {"index": index, "logprobs": logprobs, "finish_reason": reason}
        if self.ask.chat:
            role = {} if self.begun[index] else {"role": "assistant"}
            choice["delta"] = {**role, "content": piece.text}
        else:
            choice["text"] = piece.text
        self.begun[index] = True
        kind = "chat.completion.chunk" if self.ask.chat else "text_completion"
        chunk = {**self._head(kind), "choices": [choice]}
        return {**chunk, "usage": self._usage_so_far(piece.request)} if self.ask.include_usage else chunk

    def _usage_so_far(self, request: Request) -> dict | None:
        """What an event counts of its text, or None where the last event alone counts.

        The request itself may have gone on since its piece was written.
        """
        return counted(request.prompt_length, self.written[request.id]) if self.ask.continuous_usage else None

    def last_chunk(self, requests: list[Request]) -> dict:
        """The event that counts the tokens."""
        kind = "chat.completion.chunk" if self.ask.chat else "text_completion"
        return {**self._head(kind), "choices": [], "usage": self._usage(requests)}

    def _usage(self, requests: list[Request]) -> dict:
        return usage(requests, self.ask.n)

    def _head(self, kind: str) -> dict:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.ask.model}

    def _choice(self, request: Request) -> dict:
        logprobs = self._logprobs(request.id, request.new_tokens, request.logprobs) if request.logprobs else None
        choice: dict = {"index": request.id, "logprobs": logprobs, "finish_reason": request.finish_reason}
        if self.ask.chat:
            return {**choice, "message": {"role": "assistant", "content": request.text}}
        return {**choice, "text": request.text}

    def _logprobs(self, index: int, tokens: list[int], logprobs: list) -> dict:
        """The report of some tokens, in the form of the endpoint."""
        written = [self._bytes_of(token) for token in tokens]
        tops = [[(self._bytes_of(token), value) for token, value in entry.top] for entry in logprobs]
        if self.ask.chat:
            return {
                "content": [
                    {**told(token, entry.chosen), "top_logprobs": [told(*pair) for pair in top]}
                    for token, entry, top in zip(written, logprobs, tops, strict=True)
                ]
            }
        offsets = []
        for token in written:
            offsets.append(self.lengths[index])
            self.lengths[index] += len(self.decoders[index].decode(token))
        return {
            "tokens": list(map(name_of, written)),
            "token_logprobs": [entry.chosen for entry in logprobs],
            "top_logprobs": [{name_of(token): value for token, value in top} for top in tops],
            "text_offset": offsets,
        }

    def _bytes_of(self, token: int) -> bytes:
        known = token < self.encoding.n_vocab
        return self.encoding.decode_single_token_bytes(token) if known else b""


def name_of(token: bytes) -> str:
    """A token as a report names it: its text, or, where it holds a part of a character, its bytes in OpenAI's form."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def told(token: bytes, logprob: float) -> dict:
    """A token of a chat's report. The bytes of several make the characters of which each has a part."""
    return {"token": name_of(token), "logprob": logprob, "bytes": list(token)}


def usage(requests: list[Request], n: int) -> dict:
    """How many tokens were read and written; a prompt counts once, however many texts (n) follow it."""
    prompts = requests[::n]
    read = sum(request.prompt_length for request in prompts)
    written = sum(len(request.new_tokens) for request in requests)
    cached = sum(min(request.reused, request.prompt_length) for request in prompts)
    return {**counted(read, written), "prompt_tokens_details": {"cached_tokens": cached}}


def counted(read: int, written: int) -> dict:
    """Tokens in the words of the protocol."""
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
