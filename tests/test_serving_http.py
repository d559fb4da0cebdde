"""The server over HTTP: OpenAI's own client, many of them, some that vanish, and bodies that nobody should send."""

import asyncio
import contextlib
import gc
import gzip
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

import httpx
import openai
import pytest
import torch
import uvicorn
from draws import draws
from hypothesis import given
from hypothesis import strategies as st
from sharp import sharpened

from tformer_lib.generation import generate
from tformer_lib.serving import Engine, Speculation
from tformer_lib.serving.protocol import render
from tformer_lib.serving.server import Limits, Server
from tformer_lib.transformer import Decoder, ModelConfig


class Bytes:
    """An encoding with a token for each byte."""

    n_vocab, eot_token = 256, 0

    def encode_ordinary(self, text):
        return list(text.encode("utf-8", "replace"))

    def decode_single_token_bytes(self, token):
        return bytes([token])


def make_model():
    torch.manual_seed(3)
    return sharpened(Decoder(ModelConfig(vocab_size=256, max_length=96, width=16, layers=1, heads=2, positions="rope")))


MODEL = make_model()


def alone(prompt: str, count: int, **rules) -> list[int]:
    """The tokens that a prompt is answered with where there is no server."""
    return generate(MODEL, [list(prompt.encode())], max_new_tokens=count, **rules)[0]


def text_of(tokens: list[int]) -> str:
    return bytes(tokens).decode("utf-8", "replace")


class Running:
    """A server on a free port of the loopback, in a thread of its own."""

    def __init__(self, *, api_key=None, limits=None, max_num_seqs=8, blocks=64, **options):
        self.engine = Engine(
            MODEL, Bytes(), blocks=blocks, block_size=4, max_num_seqs=max_num_seqs, budget=32, **options
        )
        self.server = Server(self.engine, "tiny", api_key=api_key, limits=limits or Limits())
        self.listening = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.address = self.listening.getsockname()
        self.url = f"http://127.0.0.1:{self.address[1]}"
        self.uvicorn = uvicorn.Server(
            uvicorn.Config(self.server.app, log_level="critical", timeout_graceful_shutdown=20)
        )
        self.thread = threading.Thread(target=lambda: self.uvicorn.run(sockets=[self.listening]))

    def __enter__(self):
        self.thread.start()
        while not self.uvicorn.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_):
        self.uvicorn.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive(), "the server does not stop"
        self.listening.close()
        self.check_nothing_is_held()

    def client(self, **options):
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **options})

    def post(self, body, path="/v1/completions", **options):
        return httpx.post(self.url + path, json=body, timeout=30, **options)

    def check_nothing_is_held(self, seconds=10.0):
        """What was cancelled is gone with the next step."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and (self.engine.busy or self.server.unfinished):
            time.sleep(0.01)
        assert not self.engine.busy
        assert self.server.unfinished == 0
        assert self.engine.allocator.held == 0
        assert set(self.engine.allocator.holders) == {0}

    def check_it_still_answers(self):
        answer = self.client().completions.create(model="tiny", prompt="ab", max_tokens=3, temperature=0)
        assert answer.choices[0].text == text_of(alone("ab", 3))


@pytest.fixture(scope="module")
def running():
    with Running() as server:
        yield server


ASK = {"model": "tiny", "prompt": "hello", "max_tokens": 6, "temperature": 0, "extra_body": {"ignore_eos": True}}


def test_a_completion_is_what_the_model_writes_alone(running):
    answer = running.client().completions.create(**ASK)
    wanted = alone("hello", 6)
    assert answer.choices[0].text == text_of(wanted)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 6, 11)
    assert answer.model == "tiny"
    by_tokens = running.client().completions.create(**ASK | {"prompt": list(b"hello")})
    assert by_tokens.choices[0].text == answer.choices[0].text
    assert by_tokens.usage.prompt_tokens_details.cached_tokens == 4  # a block of the prompt was known


def test_several_prompts_and_several_texts_of_each(running):
    wish = {"temperature": 1.5, "seed": 40, "n": 2, "prompt": ["one", "three"]}
    answer = running.client().completions.create(**ASK | wish)
    wanted = [
        text_of(alone(prompt, 6, temperature=1.5, seed=40 + index))
        for index, prompt in enumerate(["one", "one", "three", "three"])
    ]
    assert [choice.text for choice in answer.choices] == wanted
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (8, 24)
    unseeded = {running.client().completions.create(**ASK | {"temperature": 1.5}).choices[0].text for _ in range(4)}
    assert len(unseeded) > 1


def test_a_stream_is_the_same_text_in_pieces(running):
    pieces = list(running.client().completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
    assert "".join(choice.text for piece in pieces for choice in piece.choices) == text_of(alone("hello", 6))
    assert len(pieces) > 3
    assert [choice.finish_reason for piece in pieces for choice in piece.choices][-1] == "length"
    assert pieces[-1].choices == []
    assert pieces[-1].usage.completion_tokens == 6
    assert {piece.usage for piece in pieces[:-1]} == {None}
    events = events_of(running.post(body_of(stream=True, stream_options={"include_usage": True})))
    assert all("usage" in event for event in events), "OpenAI's servers say null until the last one"
    assert not any("usage" in event for event in events_of(running.post(body_of(stream=True))))


def events_of(response) -> list[dict]:
    *events, last = [event.removeprefix("data: ") for event in response.text.split("\n\n") if event]
    assert last == "[DONE]"
    return [json.loads(event) for event in events]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_each_event_counts_its_text_where_a_load_generator_asks_for_it(running, path):
    """GuideLLM and vLLM's own benchmarks send continuous_usage_stats with every request."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = body_of(stream=True, stream_options=options, n=2, temperature=1.5, seed=3, max_tokens=12)
    if "chat" in path:
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    *events, last = events_of(running.post(body, path))
    assert all(event["usage"]["prompt_tokens"] == last["usage"]["prompt_tokens"] for event in events)
    for index in range(2):
        counts = [event["usage"]["completion_tokens"] for event in events if event["choices"][0]["index"] == index]
        assert counts == sorted(counts)
        assert (counts[0] < 12, counts[-1]) == (True, 12)
    assert last["usage"]["completion_tokens"] == 24
    del options["include_usage"]
    assert not any("usage" in event for event in events_of(running.post(body, path))), "nothing was to be counted"


def test_a_chat_is_answered_whole_and_in_pieces(running):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    assert render(messages) == "system: Be brief.\nuser: hi\nassistant:"
    ask = {"model": "tiny", "messages": messages, "max_completion_tokens": 6, "temperature": 0}
    ask |= {"extra_body": {"ignore_eos": True}}
    wanted = text_of(alone(render(messages), 6))
    whole = running.client().chat.completions.create(**ask)
    assert (whole.choices[0].message.role, whole.choices[0].message.content) == ("assistant", wanted)
    pieces = [piece.choices[0].delta for piece in running.client().chat.completions.create(**ask, stream=True)]
    assert "".join(piece.content for piece in pieces) == wanted
    assert [piece.role for piece in pieces if piece.role] == ["assistant"]
    longest = running.client().chat.completions.create(**{k: v for k, v in ask.items() if k != "max_completion_tokens"})
    assert longest.usage.total_tokens == 96, "where nothing is said, the context is the limit"


def test_stop_strings_and_stop_tokens_end_a_text(running):
    tokens = alone("hello", 20)
    text = text_of(tokens)
    stop = text[3:5]
    answer = running.client().completions.create(**ASK | {"max_tokens": 20, "stop": stop})
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (text[: text.index(stop)], "stop")
    body = {"ignore_eos": True, "stop_token_ids": [tokens[2]]}
    answer = running.client().completions.create(**ASK | {"max_tokens": 20, "extra_body": body})
    assert answer.usage.completion_tokens == tokens.index(tokens[2]) + 1
    assert answer.choices[0].finish_reason == "stop"


def test_log_probabilities_are_the_models(running):
    tokens = alone("hello", 6)
    with torch.no_grad():
        logits = MODEL(torch.tensor([list(b"hello") + tokens]))[0, 4:-1].double()
    wanted = logits.log_softmax(-1)
    answer = running.client().completions.create(**ASK | {"logprobs": 3}).choices[0].logprobs
    chosen = wanted.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(answer.token_logprobs).double(), chosen, rtol=1e-4, atol=1e-4)
    top = wanted.topk(3).values
    for found, right in zip(answer.top_logprobs, top.tolist(), strict=True):
        assert sorted(found.values(), reverse=True) == pytest.approx(right[: len(found)], abs=1e-4) or len(found) < 3
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 4, "temperature": 0}
    answer = running.client().chat.completions.create(**chat, logprobs=True, top_logprobs=2)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens
    assert all(entry.logprob == pytest.approx(entry.top_logprobs[0].logprob) for entry in entries), "greedy: the first"
    streamed = list(running.client().completions.create(**ASK | {"logprobs": 0, "stream": True}))
    reports = [piece.choices[0].logprobs for piece in streamed if piece.choices[0].logprobs]
    values = [value for report in reports for value in report.token_logprobs]
    torch.testing.assert_close(torch.tensor(values).double(), chosen, rtol=1e-4, atol=1e-4)


def name_of_byte(byte: int) -> str:
    return chr(byte) if byte < 128 else f"bytes:\\x{byte:02x}"


@pytest.mark.parametrize("prompt", ["\x00", "zz", "é"])
def test_reports_name_tokens_that_are_parts_of_characters_by_their_bytes(running, prompt):
    """The tiny model's tokens are bytes, half of them no characters alone."""
    tokens = alone(prompt, 6)
    assert any(token > 127 for token in tokens)
    answer = running.client().completions.create(**ASK | {"prompt": prompt, "logprobs": 20}).choices[0]
    assert answer.logprobs.tokens == [name_of_byte(token) for token in tokens]
    assert all(len(top) == 20 for top in answer.logprobs.top_logprobs), "of tokens with one name, one is told"
    ends = [*answer.logprobs.text_offset[1:], len(answer.text)]
    for token, start, end in zip(tokens, answer.logprobs.text_offset, ends, strict=True):
        assert token > 127 or answer.text[start:end] == chr(token)
    chat = {"model": "tiny", "messages": [{"role": "user", "content": prompt}], "max_tokens": 6, "temperature": 0}
    answer = running.client().chat.completions.create(**chat, logprobs=True, top_logprobs=20).choices[0]
    together = bytes(byte for entry in answer.logprobs.content for byte in entry.bytes)
    assert together.decode("utf-8", "replace") == answer.message.content
    for entry in answer.logprobs.content:
        assert len({tuple(top.bytes) for top in entry.top_logprobs}) == 20
        assert all(top.token == name_of_byte(*top.bytes) for top in entry.top_logprobs)


def test_models_health_and_metrics(running):
    assert [model.id for model in running.client().models.list()] == ["tiny"]
    assert running.client().models.retrieve("tiny").id == "tiny"
    assert httpx.get(running.url + "/health").json() == {"status": "ok"}
    running.check_it_still_answers()
    text = httpx.get(running.url + "/metrics").text
    written = float(re.search(r"^tformer_generation_tokens_total (\S+)$", text, re.M)[1])
    assert written >= 3
    assert re.search(r"^tformer_blocks 64.0$", text, re.M)
    assert re.search(r'^tformer_requests_total\{path="/v1/completions",status="200"\} \S+$', text, re.M)
    assert float(re.search(r"^tformer_time_to_first_token_seconds_count (\S+)$", text, re.M)[1]) >= 1


# Many at once


def test_200_streams_at_once_each_get_their_own_text():
    count = 200
    prompts = [f"{i} is a number" for i in range(count)]
    wanted = [text_of(alone(prompt, 4 + i % 7)) for i, prompt in enumerate(prompts)]

    async def one(client, i):
        ask = ASK | {"prompt": prompts[i], "max_tokens": 4 + i % 7, "stream": True}
        return "".join([piece.choices[0].text async for piece in await client.completions.create(**ask)])

    async def everyone(url):
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=100) as client:
            return await asyncio.gather(*(one(client, i) for i in range(count)))

    with Running(max_num_seqs=16, blocks=24) as running:
        step, all_here = running.engine.step, threading.Event()

        def patient_step():
            while not all_here.is_set() and running.engine.arrivals < count:
                time.sleep(0.01)
            all_here.set()
            return step()

        running.engine.step = patient_step
        assert asyncio.run(everyone(running.url)) == wanted
        assert running.engine.scheduler.preemptions > 0, "there were blocks for all: nothing was put to the test"
        running.check_nothing_is_held()


def test_clients_that_vanish_take_nothing_with_them(running):
    def vanish(i):
        body = ASK | {"prompt": f"vanishing {i}", "max_tokens": 80, "ignore_eos": True, "stream": i % 2 == 0}
        del body["extra_body"]
        data = json.dumps(body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
        )
        with socket.create_connection(running.address) as connection:
            whole = head.encode() + b"\r\n\r\n" + data
            connection.sendall(whole[: len(whole) - (3 if i % 5 == 4 else 0)])  # some before they have said all
            if i % 4 == 0 and i % 5 != 4:
                connection.recv(300)

    before = running.engine.arrivals
    with ThreadPoolExecutor(20) as pool:
        futures = [pool.submit(vanish, i) for i in range(40)]
        kept = running.client().completions.create(**ASK | {"max_tokens": 40})
        [future.result() for future in futures]
    assert kept.choices[0].text == text_of(alone("hello", 40))
    running.check_nothing_is_held()
    assert running.engine.arrivals > before + 1
    running.check_it_still_answers()


@pytest.mark.parametrize("speculation", [None, Speculation(tokens=3, ngram_min=1)])
def test_metrics_count_what_was_written_whether_or_not_somebody_read_it(speculation):
    with Running(max_num_seqs=3, speculation=speculation) as running:
        made, add, step = [], running.engine.add, running.engine.step
        running.engine.add = lambda *args, **options: made.append(add(*args, **options)) or made[-1]
        running.engine.step = lambda: (time.sleep(0.03), step())[1]
        ask = ASK | {"max_tokens": 70}
        with contextlib.closing(running.client().completions.create(**ask | {"max_tokens": 5}, stream=True)) as stream:
            list(stream)
        with contextlib.closing(running.client().completions.create(**ask, n=2, stream=True)) as stream:
            next(iter(stream))  # and hang up
        running.server.limits = Limits(seconds=0.3)
        assert running.post(body_of(max_tokens=70)).status_code == 504  # 70 tokens take a second, or with drafts half
        running.server.limits, running.engine.step = Limits(), step
        assert running.post(body_of(prompt=["hello", "hello"], max_tokens=70)).status_code == 200
        running.check_nothing_is_held()
        names = {"prompt": "prompt_length", "reused": "reused", "drafted": "drafted", "accepted": "accepted"}
        happened = {f"tformer_{name}_tokens_total": sum(getattr(r, of) for r in made) for name, of in names.items()}
        happened["tformer_generation_tokens_total"] = sum(len(request.new_tokens) for request in made)
        happened["tformer_request_seconds_count"] = len(made)
        end = time.monotonic() + 10
        while (told := {name: running.server.metrics.registry.get_sample_value(name) for name in happened}) != happened:
            assert time.monotonic() < end, f"counted {told}, there were {happened}"
            time.sleep(0.01)
        assert {request.finish_reason for request in made} == {"length", "cancelled"}


def test_a_client_that_does_not_read_is_not_waited_for(monkeypatch):
    monkeypatch.setattr("tformer_lib.serving.server.PATIENCE", 0.05)
    body = json.dumps({"model": "tiny", "prompt": "a", "stream": True, "max_tokens": 40, "ignore_eos": True}).encode()
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}
    coming, said = [{"type": "http.request", "body": body}], []

    async def receive():
        return coming.pop() if coming else await asyncio.Event().wait()

    async def send(message):
        said.append(message["type"])
        if len(said) > 3:  # the buffers are full
            await asyncio.Event().wait()

    with Running(limits=Limits(seconds=0.3)) as running:
        asyncio.run(asyncio.wait_for(running.server.app(scope, receive, send), 5))
        assert said.count("http.response.start") == 1
        assert len(said) > 3
        running.check_nothing_is_held(1.0)
        running.check_it_still_answers()


# What is refused


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"prompt": "x" * 200}, 400, "200 tokens and 6 to write make 206, the engine takes 96 a request"),
        ({"prompt": ""}, 400, "the prompt is empty"),
        ({"prompt": []}, 400, "prompt must be a text, a list of tokens"),
        ({"prompt": None}, 400, "prompt must be a text, a list of tokens"),
        ({"prompt": [1.5]}, 400, "prompt must be a text, a list of tokens"),
        ({"prompt": [["a"]]}, 400, "prompt must be a text, a list of tokens"),
        ({"prompt": [5, 999]}, 400, "the prompt holds token 999, the model knows 0 to 255"),
        ({"prompt": ["good", "x" * 200]}, 400, "the engine takes 96 a request"),
        ({"prompt": ["a"] * 65}, 400, "1 to 64 texts may be asked for at once, got 65"),
        ({"n": 0}, 400, "1 to 64 texts may be asked for at once"),
        ({"n": 10**30}, 400, "1 to 64 texts may be asked for at once"),
        ({"n": True}, 400, "n must be of type int, got True"),
        ({"max_tokens": 0}, 400, "max_tokens must be at least 1, got 0"),
        ({"max_tokens": 10**40}, 400, "the engine takes 96 a request"),
        ({"max_tokens": "many"}, 400, "max_tokens must be a whole number, got 'many'"),
        ({"temperature": -1}, 400, "temperature must be at least 0 and finite in float32"),
        ({"temperature": 1e39}, 400, "temperature must be at least 0 and finite in float32"),
        ({"temperature": "hot"}, 400, "temperature must be a number, got 'hot'"),
        ({"temperature": {}}, 400, "temperature must be a number"),
        ({"top_p": 0}, 400, "top_p must be in (0, 1]"),
        ({"top_k": -2}, 400, "top_k must be at least 1"),
        ({"top_k": "all"}, 400, "top_k must be of type int, got 'all'"),
        ({"repetition_penalty": 0}, 400, "repetition_penalty must be greater than 0"),
        ({"seed": 1.5}, 400, "seed must be of type int"),
        ({"stop": 5}, 400, "stop must be a list of strings"),
        ({"stop": ["", "a"]}, 400, "none of them empty"),
        ({"stop": ["a"] * 17}, 400, "at most 16 stop strings"),
        ({"stop_token_ids": ["a"]}, 400, "stop_tokens must be a list of tokens"),
        ({"logprobs": 21}, 400, "at most 20 tokens are reported"),
        ({"logprobs": -1}, 400, "at most 20 tokens are reported"),
        ({"stream": "yes"}, 400, "stream must be of type bool"),
        ({"stream_options": {"include_usage": 1}}, 400, "include_usage must be of type bool"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty is not supported"),
        ({"echo": True}, 400, "echo is not supported"),
        ({"best_of": 3, "n": 2}, 400, "best_of is not supported"),
        ({"tempo": 1}, 400, "unknown field: tempo"),
        ({"stream_options": {"include_usage": True, "include_weather": True}}, 400, "in stream_options: 'include_weat"),
        ({"model": "other"}, 404, "there is no model 'other', this is 'tiny'"),
        ({"model": None}, 400, "model is missing"),
        ({"model": 5}, 400, "model must be of type str"),
    ],
)
def test_absurd_parameters_are_refused_and_the_next_request_is_served(running, change, status, message):
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 6, "temperature": 0, **change}
    response = running.post(body)
    assert response.status_code == status
    error = response.json()["error"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert "Traceback" not in response.text
    running.check_it_still_answers()
    running.check_nothing_is_held()


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        (None, "messages is missing"),
        ("hi", "messages must be of type list"),
        ([{"role": "user"}], "content must be text"),
        ([{"role": "wizard", "content": "x"}], "role must be system or developer or user or assistant, got 'wizard'"),
        ([{"role": ["user"], "content": "x"}], "role must be system or developer or user or assistant, got ['user']"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "content must be text"),
        ([[]], "needs a role and a content"),
        ([{"role": "tool", "tool_call_id": "1", "content": "x"}], "role must be system or developer or user or assis"),
        ([{"role": "user", "content": "x", "name": 1}], "name must be of type str"),
        ([{"role": "user", "content": "x", "weight": 1}], "unknown field in messages: 'weight'"),
        ([{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}], "in messages: 'tool_calls'"),
        ([{"role": "user", "content": "x" * 100}], "the engine takes 96 a request"),
    ],
)
def test_absurd_conversations_are_refused(running, messages, message):
    response = running.post({"model": "tiny", "messages": messages, "max_tokens": 3}, "/v1/chat/completions")
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
    running.check_it_still_answers()


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def test_a_tool_is_refused_by_its_name_whatever_must_be_chosen(running):
    """Pydantic AI and instructor send a choice with their tools, and before them."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        response = running.post({"tool_choice": choice, **body, "tools": [TOOL]}, "/v1/chat/completions")
        assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")


def test_what_clients_add_by_themselves_and_changes_nothing_is_served(running):
    """Agents' frameworks say how to call tools where there are none, who asks, and at which price."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "temperature": 0}
    neutral = {
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "functions": [],
        "function_call": "none",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "service_tier": "auto",
        "prompt_cache_key": "key",
        "safety_identifier": "user",
        "top_k": -1,
        "stop": None,
    }
    plain = running.post(body, "/v1/chat/completions").json()
    answer = running.post({**body, **neutral}, "/v1/chat/completions")
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"] == plain["choices"]
    for name, value in (("modalities", ["text", "audio"]), ("functions", [{"name": "f"}]), ("service_tier", "flex")):
        response = running.post({**body, name: value}, "/v1/chat/completions")
        assert (response.status_code, response.json()["error"]["param"]) == (400, name)
    both = body_of(n=2, best_of=2, temperature=1.5, seed=4)
    assert running.post(both).json()["choices"] == running.post({**both, "best_of": 1}).json()["choices"]


@pytest.mark.parametrize("top_k", [0, -1])
def test_vllms_words_for_all_tokens_are_understood(running, top_k):
    ask = body_of(temperature=3.0, seed=7, max_tokens=20)
    assert running.post({**ask, "top_k": top_k}).json()["choices"] == running.post(ask).json()["choices"]
    assert running.post({**ask, "top_k": 1}).json()["choices"] != running.post(ask).json()["choices"]


def test_a_message_may_say_who_speaks():
    said = {"role": "assistant", "content": "Hi.", "refusal": None, "tool_calls": None, "name": None}
    named = {"role": "user", "content": "Hello.", "name": "Lily"}
    assert render([named, said]) == "user Lily: Hello.\nassistant: Hi.\nassistant:"


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"\xff\xfe", 400),
        (b"[" * 100_000, 400),
        (b'{"n": ' + b"9" * 5000 + b"}", 400),
        (b"[1, 2]", 400),
        (b'"text"', 400),
        (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', 400),
        (b'{"model": "tiny", "prompt": "\\ud800", "max_tokens": 2}', 200),
        (b'{"model": "tiny", "prompt": "a", "\\ud800": 1}', 400),
        (b'{"prompt": "' + b"x" * 2**20 + b'"}', 413),
    ],
)
def test_malformed_bodies_are_refused_and_the_next_request_is_served(running, content, status):
    headers = {"Content-Type": "application/json"}
    response = httpx.post(running.url + "/v1/completions", content=content, headers=headers, timeout=30)
    assert response.status_code == status
    if status != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    running.check_it_still_answers()


# Bodies drawn at random: what is right, and one or two fields that are not

TEXTS = st.one_of(st.text(max_size=8), st.sampled_from(["\ud800", "a\0b", "x" * 300]))
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.sampled_from([2**64, 10**300, 1e39, -0.0]), st.floats(), TEXTS
)
ANYTHING = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=6
)
STOPS = st.text(min_size=1, max_size=3)
GOOD = {
    "temperature": st.floats(0, 3),
    "top_p": st.floats(0.05, 1),
    "top_k": st.integers(1, 300),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(0.5, 3),
    "n": st.integers(1, 3),
    "seed": st.integers(-(2**63), 2**63),
    "stop": STOPS | st.lists(STOPS, max_size=4),
    "stop_token_ids": st.lists(st.integers(0, 255), max_size=4),
    "ignore_eos": st.booleans(),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "max_tokens": st.integers(1, 20),
    "user": TEXTS,
}
PROMPTS = st.text(min_size=1, max_size=12) | st.lists(st.integers(0, 255), min_size=1, max_size=6)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]), "content": st.text(max_size=8)})
NAMES = [*GOOD, "model", "prompt", "messages", "logprobs", "top_logprobs", "best_of", "echo", "response_format", "x"]
ABSURD = st.dictionaries(st.sampled_from(NAMES) | TEXTS, ANYTHING, max_size=2)
BODIES = {
    "/v1/completions": (
        {"prompt": PROMPTS | st.lists(PROMPTS, min_size=1, max_size=3)},
        {"logprobs": st.integers(0, 5)},
    ),
    "/v1/chat/completions": ({"messages": st.lists(MESSAGE, min_size=1, max_size=2)}, {"logprobs": st.booleans()}),
}


@draws(40)
@given(data=st.data(), path=st.sampled_from(sorted(BODIES)))
def test_any_body_is_answered_or_refused_in_words(running, data, path):
    needed, more = BODIES[path]
    right = st.fixed_dictionaries({"model": st.just("tiny"), **needed}, optional={**GOOD, **more})
    body = data.draw(right) | data.draw(st.just({}) | ABSURD)
    headers = {"Content-Type": "application/json"}
    response = httpx.post(running.url + path, content=json.dumps(body), headers=headers, timeout=30)
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert "Traceback" not in response.text
    elif "event-stream" in response.headers["content-type"]:
        *events, last = [event.removeprefix("data: ") for event in response.text.split("\n\n") if event]
        assert last == "[DONE]"
        assert not any("error" in json.loads(event) for event in events)
    else:
        assert response.json()["usage"]["completion_tokens"] >= 1
    running.check_nothing_is_held()


def test_other_paths_methods_and_kinds_of_bodies(running):
    lost = httpx.post(running.url + "/completions", json=body_of()).json()["error"]["message"]
    assert lost.startswith("POST /completions: Not Found; there are /v1/completions, /v1/chat/completions, /v1/models")
    assert lost.endswith("/v1/models/{name}, /health, /metrics")
    assert httpx.get(running.url + "/v1/completions").status_code == 405
    text = httpx.post(running.url + "/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"})
    assert text.status_code == 415, "what any web page may send without being asked"
    packed = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    body = gzip.compress(json.dumps(body_of()).encode())
    answer = httpx.post(running.url + "/v1/completions", content=body, headers=packed)
    assert answer.status_code == 415
    assert "Content-Encoding gzip is not read" in answer.json()["error"]["message"]
    assert answer.headers["accept-encoding"] == "identity"
    packed["Content-Encoding"] = "Identity"
    plain = httpx.post(running.url + "/v1/completions", json=body_of(), headers=packed)
    assert plain.status_code == 200
    with pytest.raises(openai.NotFoundError):
        running.client().models.retrieve("other")


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    "path",
    ["/v1/models", "/v1/models/tiny", "/v1/models/other", "/health", "/v1/completions", "/v1/chat/completions", "/x"],
)
def test_a_path_is_answered_with_a_slash_at_its_end_as_without(running, method, path):
    body = body_of(seed=1, temperature=0)
    if "chat" in path:
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    plain, slashed = (
        httpx.request(method, running.url + path + end, json=body if method == "POST" else None) for end in ("", "/")
    )
    assert slashed.status_code == plain.status_code, slashed.text
    own = {"id", "created", "usage"}  # the second prompt is found in the cache
    one, other = ({k: v for k, v in answer.json().items() if k not in own} for answer in (plain, slashed))
    assert other == one


def test_metrics_are_found_with_a_slash_and_count_one_path(running):
    for end in ("", "/", "//"):
        assert httpx.get(running.url + "/v1/models" + end).status_code == 200
    said = httpx.get(running.url + "/metrics/").text
    assert 'path="/v1/models"' in said
    assert 'path="/v1/models/' not in said.replace('path="/v1/models/{name:path}', "")


def test_a_key_is_asked_for_behind_a_slash():
    with Running(api_key="k") as running:
        assert httpx.get(running.url + "/v1/models/").status_code == 401
        assert httpx.get(running.url + "/v1/models/", headers={"Authorization": "Bearer k"}).status_code == 200


def test_a_key_is_asked_for():
    with Running(api_key="sésame") as running:
        for key in ("none", "sesame", "sésamé"):
            response = running.post(ASK, headers={"Authorization": f"Bearer {key}".encode()})
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
        assert httpx.get(running.url + "/v1/models").status_code == 401
        assert httpx.get(running.url + "/health").status_code == 200
        for scheme, status in (("Bearer", 200), ("bearer", 200), ("BEARER ", 200), ("Basic", 401)):
            headers = {"Authorization": f"{scheme} sésame".encode()}
            assert httpx.get(running.url + "/v1/models", headers=headers).status_code == status
        assert httpx.get(running.url + "/v1/models", headers={"Authorization": "sésame".encode()}).status_code == 401


def test_a_full_queue_and_a_slow_answer_are_told_and_cancelled():
    with Running(max_num_seqs=1, limits=Limits(queue=1, seconds=0.5)) as running:
        step, slow = running.engine.step, threading.Event()
        slow.set()

        def slow_step():
            time.sleep(0.05 if slow.is_set() else 0)
            return step()

        running.engine.step = slow_step
        with ThreadPoolExecutor(8) as pool:
            statuses = list(pool.map(lambda i: running.post(body_of(max_tokens=60)).status_code, range(8)))
        assert set(statuses) == {429, 504}
        assert statuses.count(504) == 2
        stream = running.client().completions.create(**ASK | {"max_tokens": 60}, stream=True)
        with pytest.raises(openai.APIError, match=r"not done within 0\.5 s"), contextlib.closing(stream):
            list(stream)
        slow.clear()
        running.check_nothing_is_held()
        running.check_it_still_answers()


def body_of(**changes):
    return {"model": "tiny", "prompt": "hello", "max_tokens": 6, "temperature": 0, "ignore_eos": True, **changes}


def test_a_body_that_would_be_too_long_is_refused_before_it_comes(running):
    """curl asks first, with Expect: 100-continue, where a body is long."""
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1048577\r\n"
    with socket.create_connection(running.address, timeout=10) as connection:
        connection.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_a_text_that_came_too_late_is_asked_for_once():
    """OpenAI's client asks again by itself after an error of the server, unless the server advises against it."""
    with Running(limits=Limits(seconds=0.2)) as running:
        step = running.engine.step
        running.engine.step = lambda: (time.sleep(0.05), step())[1]
        with pytest.raises(openai.InternalServerError, match=r"not done within 0\.2 s"):
            running.client(max_retries=5).completions.create(**ASK | {"max_tokens": 80})
        asked = {"path": "/v1/completions", "status": "504"}
        assert running.server.metrics.registry.get_sample_value("tformer_requests_total", asked) == 1


def test_a_body_that_never_comes_is_not_waited_for():
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    with Running(limits=Limits(seconds=0.3)) as running, socket.create_connection(running.address) as connection:
        connection.sendall(head.encode() + b"{")
        connection.settimeout(10)
        assert b" 504 " in connection.recv(1000)


def test_steps_that_fail_are_told_without_a_trace_and_the_engine_goes_on(running, caplog):
    launch = running.engine.runner.launch
    with patch.object(running.engine.runner, "launch", side_effect=RuntimeError("secret of the kernel")):
        whole = running.post(body_of())
        events = running.post(body_of(stream=True))
    assert running.engine.runner.launch == launch
    assert (whole.status_code, events.status_code) == (500, 200)
    for response in (whole, events):
        assert "the engine could not answer this request" in response.text
        assert "secret" not in response.text
    assert "[DONE]" not in events.text
    with patch.object(running.server, "check_key", side_effect=ZeroDivisionError("secret")):
        response = running.post(body_of())
    assert response.status_code == 500
    assert "secret" not in response.text
    assert "secret of the kernel" in caplog.text, "the server's own log says what happened"
    running.check_it_still_answers()


def test_a_plan_that_keeps_failing_ends_those_that_wait(running):
    with patch.object(running.engine.scheduler, "plan", side_effect=RuntimeError("broken")):
        assert running.post(body_of()).status_code == 500
    running.check_it_still_answers()


# The command


def test_a_shutdown_finishes_what_has_begun():
    command = [sys.executable, "-m", "tformer_lib.serving", "serve", "--port", "0", "--max-context", "256"]
    environment = {**os.environ, "TFORMER_API_KEY": "key", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        try:
            url = re.search(r"http://127\.0\.0\.1:\d+/v1", process.stdout.readline())[0]
            client = openai.OpenAI(base_url=url, api_key="key", max_retries=0)
            ask = {"model": "stories", "prompt": "Once upon", "max_tokens": 200, "temperature": 0, "stream": True}
            stream = client.completions.create(**ask, extra_body={"ignore_eos": True})
            pieces = [next(iter(stream))]
            offer = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABk"}
            assert httpx.get(url.removesuffix("/v1") + "/health", headers=offer).status_code == 200
            process.send_signal(signal.SIGINT)
            pieces += stream
            assert pieces[-1].choices[0].finish_reason == "length"
            assert process.wait(30) == 130
            assert process.stderr.read() == ""
        finally:
            process.kill()


def test_a_server_does_not_stop_to_look_through_what_it_began_with(monkeypatch):
    """A full collection of garbage looks at some 350,000 objects, and holds up whoever waits for a token."""
    from tformer_lib.serving.command import main

    seen = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: seen.append(len(gc.get_objects())))
    before = len(gc.get_objects())
    try:
        assert main(["serve", "--port", "0"]) == 0
    finally:
        gc.unfreeze()
    assert seen[0] < before / 20


def test_the_command_chooses_how_connections_are_read_and_kept(monkeypatch):
    """Whatever else is installed: a request on a connection that the server closes just now is lost."""
    from tformer_lib.serving.command import main

    configs = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: configs.append(server.config))
    try:
        assert main(["serve", "--port", "0"]) == 0
    finally:
        gc.unfreeze()
    (config,) = configs
    assert config.http == "h11", "httptools takes the body of a request that offers HTTP/2 for HTTP/2 itself"
    assert config.timeout_keep_alive > 90, "Go's clients keep an idle connection for 90 seconds"


def test_the_first_client_does_not_wait_for_kernels_to_be_built(monkeypatch):
    from tformer_lib.serving.command import main

    engines, make = [], Server.__init__

    def make_and_note(server, engine, *others, **options):
        engines.append((engine, engine.arrivals))
        make(server, engine, *others, **options)

    monkeypatch.setattr(Server, "__init__", make_and_note)
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: None)
    try:
        assert main(["serve", "--port", "0"]) == 0
    finally:
        gc.unfreeze()
    ((engine, arrivals),) = engines
    assert arrivals == 1, "no step was tried before the server listened"
    assert not engine.busy
    assert engine.allocator.held == 0


@pytest.mark.parametrize(
    ("arguments", "refusal"),
    [
        (["--port", "99999"], "port from 0 to 65535"),
        (["--timeout", "nan"], "timeout must be above 0"),
        (["--max-queue", "-1"], "max_queue must be at least 0"),
        (["--host", "256.256.256.256", "--port", "0"], "error: "),
        (["--model", "nobody"], "there is no pretrained model 'nobody'"),
    ],
)
def test_the_command_refuses_in_one_line(arguments, refusal, capsys):
    from tformer_lib.serving.command import main

    assert main(["serve", *arguments]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert refusal in said.err


def test_a_port_that_is_taken_is_refused(capsys):
    from tformer_lib.serving.command import main

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--port", str(taken.getsockname()[1])]) == 2
        told = capsys.readouterr().err
    assert "in use by another program; --port names another one" in told
    assert told.count("\n") == 1


def test_numbers_in_reports_are_numbers(running):
    body = body_of(logprobs=20, max_tokens=3)
    response = running.post(body)
    assert all(math.isfinite(value) for value in response.json()["choices"][0]["logprobs"]["token_logprobs"])
    assert "NaN" not in response.text
    assert "Infinity" not in response.text
