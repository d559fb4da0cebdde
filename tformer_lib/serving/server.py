"""An engine behind HTTP, spoken to as OpenAI's clients do: completions, chat completions, models, health and metrics.

    python -m tformer_lib.serving serve --model stories
    client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")

One thread steps the engine. The event loop reads and writes: each request's pieces come to it through a queue. A client
that hangs up, or waits longer than allowed, cancels its requests; the others do not notice.
"""

import asyncio
import hmac
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tformer_lib.serving.engine import Engine
from tformer_lib.serving.protocol import Ask, Refused, Reply, read
from tformer_lib.serving.request import Params, Piece, Request

log = logging.getLogger(__name__)

ADVICE = {
    401: {"WWW-Authenticate": "Bearer"},
    415: {"Accept": "application/json", "Accept-Encoding": "identity"},
    429: {"Retry-After": "1"},
    504: {"x-should-retry": "false"},  # OpenAI's client asks again by itself; the same text would be as late again
}
"""Headers that tell a client what to do about a refusal, by its status."""

FAILURES = 3
"""After so many steps that fail one after the other, those that wait are ended as well."""


@dataclass(frozen=True)
class Limits:
    """What a server takes upon itself."""

    body: int = 2**20
    """Bytes of a request's body."""
    queue: int = 256
    """Texts that may wait for a batch slot."""
    seconds: float = 300.0
    """How long a request may take, from its first byte to its last piece."""


class Stepper:
    """The thread that steps an engine while there is something to do.

    Args:
        engine: nobody else should step it.
    """

    def __init__(self, engine: Engine):
        self.engine, self.wake, self.stopping = engine, threading.Event(), False
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin."""
        self.thread.start()

    def stop(self) -> None:
        """End what is left, and the thread."""
        for request in [*self.engine.scheduler.running, *self.engine.scheduler.waiting]:
            self.engine.cancel(request)
        self.stopping = True
        self.wake.set()
        self.thread.join()

    def add(self, tokens: list[int], params: Params, index: int, listener: Callable[[Piece], None]) -> Request:
        """Let a request join."""
        request = self.engine.add(tokens, params, id=index, listener=listener)
        self.wake.set()
        return request

    def _run(self) -> None:
        failures = 0
        while True:
            if not self.engine.busy:
                if self.stopping:
                    return
                self.wake.wait()
                self.wake.clear()
                continue
            try:
                self.engine.step()
                failures = 0
            except Exception:
                log.exception("a step failed; its requests have been ended")
                failures += 1
                if failures >= FAILURES:
                    for request in list(self.engine.scheduler.waiting):
                        self.engine.cancel(request)


class Metrics:
    """What Prometheus reads: counters of what was done, and how the engine stands at the moment."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        make = {"registry": self.registry}
        self.requests = Counter("tformer_requests", "Requests by endpoint and status", ["path", "status"], **make)
        self.prompt = Counter("tformer_prompt_tokens", "Tokens of prompts", **make)
        self.written = Counter("tformer_generation_tokens", "Tokens written", **make)
        self.reused = Counter("tformer_reused_tokens", "Tokens that the prefix cache spared", **make)
        self.drafted = Counter("tformer_drafted_tokens", "Drafts that were checked", **make)
        self.accepted = Counter("tformer_accepted_tokens", "Drafts that were written", **make)
        seconds = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
        self.first = Histogram("tformer_time_to_first_token_seconds", "TTFT of a text", buckets=seconds, **make)
        self.each = Histogram("tformer_time_per_output_token_seconds", "TPOT of a text", buckets=seconds, **make)
        self.whole = Histogram("tformer_request_seconds", "From a text's arrival to its end", buckets=seconds, **make)
        scheduler, allocator = engine.scheduler, engine.allocator
        for name, help, value in (
            ("running", "Texts being written", lambda: len(scheduler.running)),
            ("waiting", "Texts that wait for a batch slot", lambda: len(scheduler.waiting)),
            ("blocks", "Blocks of keys and values", lambda: allocator.blocks),
            ("blocks_held", "Blocks that running texts hold", lambda: allocator.held),
            ("preemptions", "Texts that had to give their blocks back", lambda: scheduler.preemptions),
        ):
            Gauge(f"tformer_{name}", help, **make).set_function(value)

    def count(self, request: Request, began: float, first: float | None) -> None:
        """A text has ended."""
        now, written = time.perf_counter(), len(request.new_tokens)
        self.prompt.inc(request.prompt_length)
        self.written.inc(written)
        self.reused.inc(request.reused)
        self.drafted.inc(request.drafted)
        self.accepted.inc(request.accepted)
        self.whole.observe(now - began)
        if first is not None:
            self.first.observe(first - began)
            if written > 1:
                self.each.observe((now - first) / (written - 1))


class Texts:
    """The texts that one HTTP request asked for, and their pieces as they come.

    Args:
        server: whose engine writes them.
    """

    def __init__(self, server: "Server"):
        self.server, self.began = server, time.perf_counter()
        self.pieces: asyncio.Queue[Piece] = asyncio.Queue()
        self.requests: list[Request] = []
        self.firsts: dict[Request, float] = {}

    async def open(self, ask: Ask) -> None:
        """Let all of them join the engine.

        Raises:
            Refused: one of them cannot be served; then none is.
        """
        loop = asyncio.get_running_loop()
        await asyncio.to_thread(self._add_all, ask, partial(loop.call_soon_threadsafe, self._hear))

    def _hear(self, piece: Piece) -> None:
        """A piece has come. It is counted here, because what is written for a client that has gone is written too."""
        request = piece.request
        if piece.token is not None:
            self.firsts.setdefault(request, time.perf_counter())
        if piece.finish_reason is not None:
            self.server.metrics.count(request, self.began, self.firsts.get(request))
        self.pieces.put_nowait(piece)

    def _add_all(self, ask: Ask, hear: Callable[[Piece], None]) -> None:
        engine = self.server.engine
        try:
            for place, prompt in enumerate(ask.prompts):
                tokens = engine.encoding.encode_ordinary(prompt) if isinstance(prompt, str) else prompt
                wish = {**ask.wish, "max_new_tokens": self._most(ask, len(tokens))}
                params = Params(seed=ask.seed, **wish)
                for index in range(place * ask.n, (place + 1) * ask.n):
                    own = replace(params, seed=ask.seed + index)
                    self.requests.append(self.server.stepper.add(tokens, own, index, hear))
        except ValueError as error:
            self.cancel()
            message = str(error).replace("max_new_tokens", "max_tokens")
            too_long = "the engine takes" in message or " blocks, there are " in message
            raise Refused(400, message, "context_length_exceeded" if too_long else "invalid_value") from None

    def _most(self, ask: Ask, tokens: int) -> int:
        """How many tokens to write where the client leaves it open: as many as there is room for."""
        asked, engine = ask.wish["max_new_tokens"], self.server.engine
        if asked is not None:
            return asked
        return max(1, min(engine.max_context, engine.allocator.blocks * engine.allocator.block_size + 1) - tokens)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """All pieces, until each text has ended."""
        ended = 0
        while ended < len(self.requests):
            piece = await self.pieces.get()
            ended += piece.finish_reason is not None
            yield piece

    async def finish(self) -> None:
        """Wait for all of them."""
        async for _ in self:
            pass

    def cancel(self) -> None:
        """End what has not ended, soon."""
        for request in self.requests:
            if request.finish_reason is None:
                self.server.engine.cancel_soon(request)


class Events(Response):
    """A response of server-sent events that ends when the client hangs up."""

    media_type = "text/event-stream"

    def __init__(self, server: "Server", texts: Texts, reply: Reply, ends: float):
        super().__init__(headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self.server, self.texts, self.reply, self.ends = server, texts, reply, ends

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the pieces as they come."""
        try:
            outcome = await until_gone(receive, self._send_all(send), self.ends)
        finally:
            self.server.close(self.texts)
        if outcome is not GONE:
            try:
                async with asyncio.timeout(PATIENCE):
                    await self._send_end(send, outcome)
            except TimeoutError:
                log.warning("a client that did not read its stream was left")

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for piece in self.texts:
            if piece.finish_reason in ("error", "cancelled"):
                await self._say(send, failed(piece.request).body())
                return
            chunk = self.reply.chunk(piece)
            if chunk is not None:
                await self._say(send, chunk)
        if self.reply.ask.include_usage:
            await self._say(send, self.reply.last_chunk(self.texts.requests))
        await self._say(send, "[DONE]")

    async def _send_end(self, send: Send, outcome: object) -> None:
        if outcome is TOO_LATE:
            await self._say(send, self.server.too_late().body())
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _say(self, send: Send, data: dict | str) -> None:
        text = data if isinstance(data, str) else json.dumps(data)
        await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})


PATIENCE = 1.0
"""Seconds that the end of a stream may take, once the time is up: a client that does not read takes for ever."""

GONE, TOO_LATE = object(), object()
"""How :func:`until_gone` ends where the work was not done."""


async def until_gone(receive: Receive, work: Awaitable, ends: float) -> object:
    """Work until it is done, the client has hung up (GONE) or the loop's clock says ``ends`` (TOO_LATE)."""
    work = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(hung_up(receive))
    try:
        left = ends - asyncio.get_running_loop().time()
        await asyncio.wait({work, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        return GONE if gone.done() else TOO_LATE
    except OSError:  # it hung up while something was sent
        return GONE
    finally:
        for task in (work, gone):
            task.cancel()


async def hung_up(receive: Receive) -> None:
    """Return when the client has."""
    while (await receive())["type"] != "http.disconnect":
        pass


def failed(request: Request) -> Refused:
    """What the client of a text that failed is told; what happened stands in the log."""
    log.error("request %s failed: %s", request.id, request.error or request.finish_reason)
    return Refused(500, "the engine could not answer this request")


class Server:
    """The endpoints over one engine.

    Args:
        engine: with an encoding; the server's own from now on.
        name: what clients call the model.
        api_key: what they must send as a bearer token to /v1; anybody may ask if it is None.
        limits: see :class:`Limits`.
    """

    def __init__(self, engine: Engine, name: str, *, api_key: str | None = None, limits: Limits = Limits()):
        if engine.encoding is None:
            raise ValueError("a server needs an engine with an encoding")
        self.engine, self.name, self.api_key, self.limits = engine, name, api_key, limits
        self.stepper, self.metrics = Stepper(engine), Metrics(engine)
        self.unfinished, self.started = 0, int(time.time())
        routes = [
            Route("/v1/completions", self.guarded(partial(self.answer, chat=False)), methods=["POST"]),
            Route("/v1/chat/completions", self.guarded(partial(self.answer, chat=True)), methods=["POST"]),
            Route("/v1/models", self.guarded(self.models), methods=["GET"]),
            Route("/v1/models/{name:path}", self.guarded(self.model), methods=["GET"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/metrics", self.show_metrics, methods=["GET"]),
        ]
        handlers = {HTTPException: refuse_route, Exception: refuse_all}
        self.app = Starlette(
            routes=routes,
            exception_handlers=handlers,
            lifespan=self.lifespan,
            middleware=[Middleware(WithoutLastSlash)],
        )

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """The engine's thread lives as long as the application."""
        self.stepper.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self.stepper.stop)

    def guarded(self, endpoint: Callable[[HTTPRequest], Awaitable[Response]]) -> Callable:
        """An endpoint that asks for the key, counts its answers, and says in JSON why it refuses."""

        async def guarded_endpoint(request: HTTPRequest) -> Response:
            try:
                self.check_key(request)
                response = await endpoint(request)
            except Refused as refusal:
                response = JSONResponse(refusal.body(), refusal.status, ADVICE.get(refusal.status))
            except ClientDisconnect:
                response = Response(status_code=499)
            except Exception:
                log.exception("a request failed")
                response = JSONResponse(Refused(500, "the server failed on this request").body(), 500)
            path = request.scope["route"].path if "route" in request.scope else request.url.path
            self.metrics.requests.labels(path, response.status_code).inc()
            return response

        return guarded_endpoint

    def check_key(self, request: HTTPRequest) -> None:
        """Refuse who does not know the key."""
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        is_right = hmac.compare_digest(given.strip(" ").encode("latin-1"), (self.api_key or "").encode())
        if self.api_key is not None and not (is_right and scheme.lower() == "bearer"):
            raise Refused(401, "a valid API key is needed, as a bearer token", "invalid_api_key")

    async def answer(self, request: HTTPRequest, *, chat: bool) -> Response:
        """Complete prompts."""
        ends = asyncio.get_running_loop().time() + self.limits.seconds
        try:
            async with asyncio.timeout_at(ends):
                body = await self.body_of(request)
        except TimeoutError:
            raise self.too_late() from None
        ask = read(body, chat=chat, encoding=self.engine.encoding)
        if ask.model != self.name:
            raise Refused(404, f"there is no model {ask.model!r}, this is {self.name!r}", "model_not_found", "model")
        if self.unfinished + ask.choices > len(self.engine.scheduler.tables) - 1 + self.limits.queue:
            raise Refused(429, "too many requests wait already; try again later", "queue_full")
        texts, reply = Texts(self), Reply(ask, self.engine.encoding)
        self.unfinished += ask.choices
        try:
            await texts.open(ask)
            if ask.stream:
                response = Events(self, texts, reply, ends)
                texts = None  # it closes them
                return response
            outcome = await until_gone(request.receive, texts.finish(), ends)
            return self.whole(outcome, texts, reply)
        finally:
            if texts is not None:
                self.close(texts, ask.choices)

    def whole(self, outcome: object, texts: Texts, reply: Reply) -> Response:
        """The answer at once, or why there is none."""
        if outcome is GONE:
            raise ClientDisconnect
        if outcome is TOO_LATE:
            raise self.too_late()
        for request in texts.requests:
            if request.finish_reason in ("error", "cancelled"):
                raise failed(request)
        return JSONResponse(reply.whole(texts.requests))

    def close(self, texts: Texts, choices: int | None = None) -> None:
        """Nobody waits for these any more."""
        self.unfinished -= len(texts.requests) if choices is None else choices
        texts.cancel()

    def too_late(self) -> Refused:
        """What is said when time is up."""
        return Refused(504, f"not done within {self.limits.seconds:g} s", "timeout")

    def too_long(self) -> Refused:
        """What is said to a body over the limit."""
        return Refused(413, f"the body is longer than {self.limits.body:,} bytes", "body_too_long")

    async def body_of(self, request: HTTPRequest) -> object:
        """The JSON that came, if it is not too long."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "the body must be JSON, and its Content-Type application/json")
        coding = request.headers.get("content-encoding", "identity")
        if coding.lower() != "identity":
            raise Refused(415, f"a body of Content-Encoding {coding} is not read: send the JSON uncompressed")
        if int(request.headers.get("content-length", 0)) > self.limits.body:  # before any of it comes
            raise self.too_long()
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > self.limits.body:
                raise self.too_long()
            parts.append(part)
        try:
            return json.loads(b"".join(parts))
        except (ValueError, RecursionError):
            raise Refused(400, "the body is not JSON", "malformed_json") from None

    async def models(self, request: HTTPRequest) -> Response:
        """The one model there is."""
        return JSONResponse({"object": "list", "data": [self.card()]})

    async def model(self, request: HTTPRequest) -> Response:
        """What is known of it."""
        if request.path_params["name"] != self.name.rstrip("/"):
            raise Refused(404, f"there is no such model, this is {self.name!r}", "model_not_found", "model")
        return JSONResponse(self.card())

    def card(self) -> dict:
        """The model as clients list it; max_model_len is vLLM's."""
        facts = {"id": self.name, "object": "model", "created": self.started, "owned_by": "tformer-lab"}
        return {**facts, "max_model_len": self.engine.max_context}

    async def health(self, request: HTTPRequest) -> Response:
        """Whether the engine's thread lives."""
        alive = self.stepper.thread.is_alive()
        return JSONResponse({"status": "ok" if alive else "the engine has stopped"}, 200 if alive else 503)

    async def show_metrics(self, request: HTTPRequest) -> Response:
        """For Prometheus."""
        return Response(generate_latest(self.metrics.registry), media_type="text/plain; version=0.0.4; charset=utf-8")


class WithoutLastSlash:
    """Every path means the same with a slash at its end: some clients and proxies put one there.

    A redirect would not do, because many clients follow none with a body.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on, its path without the slash."""
        if scope["type"] == "http":
            scope = {**scope, "path": scope["path"].rstrip("/") or "/"}
        await self.app(scope, receive, send)


async def refuse_route(request: HTTPRequest, error: Exception) -> Response:
    """A path or a method that is not here, and which are."""
    message = f"{request.method} {request.url.path}: {error.detail}"
    if error.status_code == 404:
        message += f"; there are {', '.join(route.path_format for route in request.app.routes)}"
    refusal = Refused(error.status_code, message)
    return JSONResponse(refusal.body(), refusal.status, error.headers)


async def refuse_all(request: HTTPRequest, error: Exception) -> Response:
    """Whatever else happens: no trace leaves the server."""
    return JSONResponse(Refused(500, "the server failed on this request").body(), 500)
