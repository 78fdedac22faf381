"""The server over real sockets, with OpenAI's own client: its answers are the engine's, and no client harms another."""

import asyncio
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from mimo_runtime.config import EngineConfig, SamplingConfig
from mimo_runtime.engine import Engine, Generation
from mimo_runtime.prompts import encode
from mimo_runtime.serve_config import ServeConfig
from mimo_runtime.server import Api, Server, listen
from mimo_runtime.speculate import Round

ROOT = Path(__file__).parents[2]
SHORT = {"dtype": "float32", "device": "cpu", "max_len": 512}
ASK = [{"role": "user", "content": "Name a lock."}]


class PacedEngine:
    """An engine that waits for `gate`, sleeps after every round, fails on request, and counts its rounds. It hands over
    `group` tokens at once, as if the drafts of a random drafter were ever accepted."""

    def __init__(self, engine: Engine):
        self.engine, self.target, self.drafter, self.device = engine, engine.target, engine.drafter, engine.device
        self.ranks = engine.ranks
        self.gate, self.pause, self.fail, self.rounds, self.group = threading.Event(), 0.0, False, 0, 1
        self.gate.set()

    def generate(self, prompt, sampling, *, on_tokens):
        assert self.gate.wait(20)
        if self.fail:
            raise RuntimeError("CUDA error: something")

        held: list[int] = []

        def paced(tokens):
            self.rounds += 1
            held.extend(tokens)
            if len(held) >= self.group:
                on_tokens(held[:])
                held.clear()
            time.sleep(self.pause)

        out = self.engine.generate(prompt, sampling, on_tokens=paced)
        if held:
            on_tokens(held)
        return out


@pytest.fixture(scope="module")
def made() -> dict:
    """What the first test makes for all."""
    return {}


@pytest.fixture
def engine(made, request) -> Engine:
    if not made:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        release = request.getfixturevalue("release")
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        text = [Path(path).read_text() for path in (json.__file__, logging.__file__)]
        raw.train_from_iterator(text, trainers.BpeTrainer(vocab_size=510, initial_alphabet=alphabet))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")
        tokenizer.chat_template = (
            "{% for m in messages %}{% if m.content == 'refuse' %}{{ raise_exception('no') }}{% endif %}"
            "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
        )
        tokenizer.save_pretrained(release)
        made |= {"folder": release, "engine": Engine(release, EngineConfig(**SHORT)), "tokenizer": tokenizer}
    return made["engine"]


@pytest.fixture
def serve(engine, made):
    """serve(**settings) -> a running server: .url, .engine (paced), .api, and .client(key) of package openai."""

    class Running:
        def __init__(self, **config):
            self.engine = PacedEngine(engine)
            cfg = ServeConfig(**{"folder": str(made["folder"]), "port": 0, **SHORT, **config})
            bound = listen(cfg)
            self.port = bound.getsockname()[1]
            self.url = f"http://127.0.0.1:{self.port}"
            self.api = Api(self.engine, cfg)
            self.server = Server(self.api)
            self.thread = threading.Thread(target=self.server.run, args=([bound],))
            self.thread.start()
            wait(lambda: self.server.started)

        def client(self, key="none", kind=openai.OpenAI, **kw):
            return kind(base_url=self.url + "/v1", api_key=key, max_retries=0, timeout=30, **kw)

        def post(self, body, path="/v1/chat/completions", **headers):
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            return httpx.post(self.url + path, content=content, headers=headers, timeout=30)

        def metric(self, name):
            page = httpx.get(self.url + "/metrics").text
            return sum(float(v) for v in re.findall(rf"^mimo_{name}(?:{{.*}})? (\S+)$", page, re.MULTILINE))

        def stop(self):
            self.engine.gate.set()
            self.engine.pause = 0
            self.server.should_exit = True
            self.thread.join(20)
            assert not self.thread.is_alive()

    running = []

    def start(**config):
        running.append(Running(**config))
        return running[-1]

    yield start
    for server in running:
        server.stop()


@pytest.fixture
def expect(engine, made):
    """expect(max_tokens, ...) -> what the engine answers to ASK, as (text, tokens)."""

    def answer(tokens=24, temperature=0.0, seed=0, text=ASK[0]["content"], chat=True):
        sampling = SamplingConfig(max_new_tokens=tokens, temperature=temperature, seed=seed)
        made_tokens = engine.generate(encode(made["tokenizer"], text, chat), sampling).tokens
        return made["tokenizer"].decode(made_tokens, clean_up_tokenization_spaces=False), made_tokens

    return answer


def wait(condition, seconds=15.0):
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it did not happen in time"
        time.sleep(0.005)


@contextmanager
def in_background(*calls):
    """Runs the calls in threads; yields a list that their results (or exceptions) fill."""
    results: list = [None] * len(calls)

    def run(i):
        try:
            results[i] = calls[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    yield results
    for thread in threads:
        thread.join(30)


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.9, "seed": 7}], ids=str)
def test_answers_are_the_engines(serve, expect, engine, made, sampling):
    server = serve(model_name="tiny")
    client = server.client()
    text, _ = expect(**sampling)
    assert [m.id for m in client.models.list()] == ["tiny"]
    whole = client.chat.completions.create(model="tiny", messages=ASK, max_completion_tokens=24, **sampling)
    assert whole.choices[0].message.content == text and whole.choices[0].finish_reason == "length"
    prompt_tokens = len(encode(made["tokenizer"], ASK[0]["content"]))
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (prompt_tokens, 24)

    kw = {"stream": True, "stream_options": {"include_usage": True}, **sampling}
    *chunks, last = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=24, **kw)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == text and len(chunks) > 3
    assert [c.choices[0].finish_reason for c in chunks][-2:] == [None, "length"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert last.choices == [] and last.usage == whole.usage and all(c.usage is None for c in chunks)

    bare, _ = expect(text="def lock(", chat=False, **sampling)
    ids = encode(made["tokenizer"], "def lock(", chat=False)
    for prompt in ("def lock(", ids, ["def lock("]):
        done = client.completions.create(model="tiny", prompt=prompt, max_tokens=24, **sampling)
        assert done.choices[0].text == bare
    parts = client.completions.create(model="tiny", prompt=ids, max_tokens=24, stream=True, **sampling)
    assert "".join(p.choices[0].text for p in parts) == bare


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_text_and_the_engine(serve, expect, made, stream):
    server = serve()
    server.engine.group = 4
    text, tokens = expect(tokens=120)
    stop = text[30:33]
    body = {"messages": ASK, "temperature": 0, "max_tokens": 120, "stop": ["not in it", stop], "stream": stream}
    if stream:
        with httpx.stream("POST", server.url + "/v1/chat/completions", json=body) as reply:
            events = [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: {")]
        got = "".join(e["choices"][0]["delta"].get("content", "") for e in events)
        finish = events[-1]["choices"][0]["finish_reason"]
    else:
        reply = server.post(body).json()
        got, finish = reply["choices"][0]["message"]["content"], reply["choices"][0]["finish_reason"]
        needed = next(n for n in range(120) if stop in made["tokenizer"].decode(tokens[:n]).rstrip("\ufffd"))
        assert reply["usage"]["completion_tokens"] == needed
    assert got == text[: text.index(stop)] and finish == "stop"
    assert server.engine.rounds < 60  # of about 110
    after = server.post({"messages": ASK, "temperature": 0, "max_tokens": 120}).json()
    assert after["choices"][0]["message"]["content"] == text


def test_two_hundred_clients_at_once_and_a_third_of_them_rude(serve, expect):
    """Every polite client gets its own answer; the others hang up in the middle, or read a byte now and then."""
    server = serve(max_queue=200, max_queue_per_client=200)
    expected = {seed: expect(8, 0.8, seed)[0] for seed in range(6)}
    longest = 0

    async def polite(client, seed, stream):
        kw = {"model": server.api.cfg.name, "messages": ASK, "max_tokens": 8, "temperature": 0.8, "seed": seed}
        if not stream:
            done = await client.chat.completions.create(**kw)
            return done.choices[0].message.content == expected[seed]
        parts = await client.chat.completions.create(stream=True, **kw)
        return "".join([p.choices[0].delta.content or "" async for p in parts]) == expected[seed]

    async def rude(i):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        body = json.dumps({"messages": ASK, "max_tokens": 64, "stream": True}).encode()
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        if i % 2:
            await reader.read(1)
        else:
            for _ in range(20):
                await reader.read(1)
                await asyncio.sleep(0.01)
        writer.close()
        return True

    async def watch():
        nonlocal longest
        while True:
            longest = max(longest, len(server.api.scheduler.waiting))
            await asyncio.sleep(0.002)

    async def everyone():
        watcher = asyncio.create_task(watch())
        async with server.client(kind=openai.AsyncOpenAI) as client:
            calls = [rude(i) if i % 3 == 0 else polite(client, i % 6, i % 2 == 0) for i in range(200)]
            done = await asyncio.gather(*calls)
        watcher.cancel()
        return done

    assert asyncio.run(everyone()) == [True] * 200
    assert 50 < longest <= 200
    wait(lambda: server.metric("running") == 0 and server.metric("queue_length") == 0)
    assert server.metric("requests_total") == 200 and httpx.get(server.url + "/health").status_code == 200


# --- clients that leave, stall or flood -------------------------------------------------------------------------------


def test_a_client_that_hangs_up_frees_the_engine_and_the_queue(serve, expect):
    server = serve()
    server.engine.pause = 0.02
    with httpx.stream("POST", server.url + "/v1/chat/completions", json={"messages": ASK, "stream": True}) as reply:
        lines = reply.iter_lines()
        next(lines)
        with pytest.raises(httpx.ReadTimeout):  # a second client waits behind it, and gives up
            httpx.post(server.url + "/v1/chat/completions", json={"messages": ASK}, timeout=0.2)
        wait(lambda: server.metric("queue_length") == 0)
        assert server.metric("running") == 1
    wait(lambda: server.metric("running") == 0)
    assert server.engine.rounds < 60  # of hundreds
    assert 'status="499"} 2' in httpx.get(server.url + "/metrics").text
    server.engine.pause = 0
    done = server.post({"messages": ASK, "max_tokens": 24, "temperature": 0})
    assert done.json()["choices"][0]["message"]["content"] == expect()[0]


def test_a_client_that_does_not_read_is_given_up(serve):
    """At the level of ASGI: a `send` that never returns is a full socket."""
    server = serve(io_seconds=0.2)
    app, blocked = server.api.app().router.routes[0].app, asyncio.Event

    async def stuck():
        body, sent = json.dumps({"messages": ASK, "stream": True}).encode(), []

        async def receive():
            if not sent:
                sent.append(1)
                return {"type": "http.request", "body": body, "more_body": False}
            await blocked().wait()

        async def send(message):
            await blocked().wait()

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [], "query_string": b""}
        await app({**scope, "client": ("10.0.0.1", 1)}, receive, send)

    server.engine.pause = 0.02
    asyncio.run_coroutine_threadsafe(stuck(), server.api.scheduler.loop).result(10)
    wait(lambda: server.metric("running") == 0, 2)
    assert 'status="499"} 1' in httpx.get(server.url + "/metrics").text and server.engine.rounds < 40


def test_a_request_that_does_not_arrive_is_given_up(serve):
    server = serve(io_seconds=0.2)
    with socket.create_connection(("127.0.0.1", server.port)) as s:
        s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert s.recv(100).startswith(b"HTTP/1.1 408")


def test_a_full_queue_says_when_to_come_back(serve):
    server = serve(max_queue=4)
    server.engine.gate.clear()

    def ask():
        return server.post({"messages": ASK, "max_tokens": 4})

    with in_background(ask) as first:
        wait(lambda: server.metric("running") == 1)
        with in_background(*[ask] * 4) as waiting:
            wait(lambda: server.metric("queue_length") == 4)
            for _ in range(20):
                refused = ask()
                assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
                assert refused.json()["error"]["code"] == "queue_full"
            with pytest.raises(openai.RateLimitError):
                server.client().chat.completions.create(model=server.api.cfg.name, messages=ASK)
            assert server.metric("queue_length") == 4
            server.engine.gate.set()
    assert [r.status_code for r in [*first, *waiting]] == [200] * 5


def test_one_client_cannot_fill_the_queue(serve, tmp_path, caplog):
    keys = tmp_path / "keys"
    keys.write_text("# two people\nanna-secret\nben-secret  # on leave\n")
    server = serve(max_queue_per_client=2, api_key_file=str(keys))
    server.engine.gate.clear()

    def ask(key):
        return lambda: server.post({"messages": ASK, "max_tokens": 2}, Authorization=f"Bearer {key}")

    for name in ("mimo_runtime.serve", "uvicorn.error", "uvicorn.access"):
        caplog.set_level(logging.DEBUG, name)
    with in_background(ask("anna-secret")) as first:
        wait(lambda: server.metric("running") == 1)
        with in_background(*[ask("anna-secret")] * 2) as second:
            wait(lambda: server.metric("queue_length") == 2)
            refused = ask("anna-secret")()
            assert refused.status_code == 429 and refused.json()["error"]["code"] == "client_queue_full"
            with in_background(ask("ben-secret")) as other:
                wait(lambda: server.metric("queue_length") == 3)
                server.engine.gate.set()
    assert [r.status_code for r in [*first, *second, *other]] == [200] * 4
    for key in ("wrong-secret", "anna-secre", "anna-secret2", "# on leave"):
        with pytest.raises(openai.AuthenticationError):
            server.client(key).models.list()
        assert ask(key)().status_code == 401
    assert httpx.get(server.url + "/v1/models").status_code == 401
    assert httpx.get(server.url + "/health").status_code == 200
    assert "401" in caplog.text and "secret" not in caplog.text + httpx.get(server.url + "/metrics").text


# --- sessions ---------------------------------------------------------------------------------------------------------


def test_an_idle_session_gives_way(serve, monkeypatch):
    monkeypatch.setenv("TEST_KEYS", "anna, ben")
    server = serve(max_sessions=1, idle_seconds=0.6, api_key_env="TEST_KEYS")
    body = {"messages": ASK, "max_tokens": 2}
    assert server.post(body, Authorization="Bearer anna").status_code == 200
    refused = server.post(body, Authorization="Bearer ben")
    assert refused.status_code == 429 and refused.json()["error"]["code"] == "sessions_full"
    assert refused.headers["retry-after"] == "1" and server.metric("sessions") == 1
    time.sleep(0.7)
    assert server.post(body, Authorization="Bearer ben").status_code == 200


def test_a_session_ends_with_what_runs_and_waits(serve):
    server = serve(session_seconds=0.8)
    server.engine.pause = 0.03

    def stream():
        text = ""
        kw = {"model": server.api.cfg.name, "messages": ASK, "stream": True}
        try:
            for part in server.client().chat.completions.create(**kw):
                text += part.choices[0].delta.content or ""
        except openai.APIError as error:
            return text, error
        return text, None

    with in_background(stream) as streamed:
        wait(lambda: server.metric("running") == 1)
        refused = server.post({"messages": ASK})  # waits behind it
        assert refused.status_code == 403 and refused.json()["error"]["code"] == "session_over"
    text, error = streamed[0]
    assert text and error.code == "session_over"
    wait(lambda: server.metric("running") == 0, 2)
    server.engine.pause = 0
    assert server.post({"messages": ASK, "max_tokens": 2}).status_code == 200  # a new session


# --- requests that are wrong ------------------------------------------------------------------------------------------

WRONG = {
    "no JSON": (b'{"messages": [', 400, "invalid_json"),
    "no UTF-8": (b'{"messages": "\xff\xfe"}', 400, "invalid_json"),
    "a list": (b"[]", 400, "invalid_json"),
    "nested": (b'{"messages": ' + b"[" * 100_000, 400, "invalid_json"),
    "NaN": (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', 400, "invalid_json"),
    "surrogate": (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "invalid_json"),
    "huge": (b'{"messages": "' + b"x" * 300_000 + b'"}', 413, "request_too_large"),
    "no messages": ({}, 400, "missing_field"),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "invalid_value"),
    "assistant last": ({"messages": [*ASK, {"role": "assistant", "content": "x"}]}, 400, "invalid_value"),
    "role": ({"messages": [{"role": "king", "content": "x"}]}, 400, "invalid_value"),
    "template": ({"messages": [{"role": "user", "content": "refuse"}]}, 400, "invalid_value"),
    "prompt": ({"messages": [{"role": "user", "content": "lock " * 600}]}, 400, "context_length_exceeded"),
    "max_tokens": ({"messages": ASK, "max_tokens": 511}, 400, "context_length_exceeded"),
    "n": ({"messages": ASK, "n": 2}, 400, "unsupported_value"),
    "logprobs": ({"messages": ASK, "logprobs": True}, 400, "unsupported_value"),
    "tools": ({"messages": ASK, "tools": [{"type": "function"}]}, 400, "unsupported_value"),
    "json mode": ({"messages": ASK, "response_format": {"type": "json_object"}}, 400, "unsupported_value"),
    "temperature": ({"messages": ASK, "temperature": "hot"}, 400, "invalid_value"),
    "top_p": ({"messages": ASK, "top_p": 0}, 400, "invalid_value"),
    "seed": ({"messages": ASK, "seed": 2**70}, 400, "invalid_value"),
    "bool": ({"messages": ASK, "max_tokens": True}, 400, "invalid_value"),
    "stop": ({"messages": ASK, "stop": [""]}, 400, "invalid_value"),
    "model": ({"messages": ASK, "model": "gpt-5"}, 404, "model_not_found"),
}


def test_wrong_requests_are_refused_in_openais_format_and_harm_nothing(serve):
    server = serve(max_request_bytes=200_000)
    for name, (body, status, code) in WRONG.items():
        reply = server.post(body)
        error = reply.json()["error"]
        assert (reply.status_code, error["code"]) == (status, code), (name, error)
        assert error["message"] and error["type"] == "invalid_request_error"
    for prompt in ("", [], [1, 512], [-1], ["a", "b"], [[1], [2]], 7):
        assert server.post({"prompt": prompt}, "/v1/completions").status_code == 400, prompt
    assert httpx.get(server.url + "/v1/completions").status_code == 405
    assert httpx.get(server.url + "/nothing").json()["error"]["code"] == "not_found"
    with socket.create_connection(("127.0.0.1", server.port)) as s:
        s.sendall(b"\x16\x03\x01 no HTTP at all\r\n\r\n")
        assert s.recv(100).startswith(b"HTTP/1.1 400")
    polite = {"messages": ASK, "max_tokens": 2, "n": 1, "logprobs": False, "tools": [], "user": "u", "unknown": {}}
    assert server.post(polite).status_code == 200
    assert server.engine.rounds == 2  # of the last request alone


# --- the server's own life --------------------------------------------------------------------------------------------


def test_metrics_count_what_happened(serve, engine, made, expect):
    server = serve()
    ids = encode(made["tokenizer"], ASK[0]["content"])
    out = engine.generate(ids, SamplingConfig(max_new_tokens=40))
    lengths = [r.accepted + 1 for r in out.rounds if not r.cut]
    for _ in range(3):
        assert server.post({"messages": ASK, "max_tokens": 40, "temperature": 0}).status_code == 200
    assert server.post({}).status_code == 400
    wait(lambda: server.metric("running") == 0)
    page = httpx.get(server.url + "/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'mimo_requests_total{endpoint="/v1/chat/completions",status="200"} 3' in page.text
    assert 'mimo_requests_total{endpoint="/v1/chat/completions",status="400"} 1' in page.text
    assert server.metric("prompt_tokens_total") == 3 * len(ids) and server.metric("generated_tokens_total") == 120
    assert server.metric("acceptance_length_sum") == 3 * sum(lengths)
    assert server.metric("acceptance_length_count") == 3 * len(lengths)
    assert server.metric("queue_seconds_count") == 3 and server.metric("decode_seconds_sum") > 0
    for line in page.text.splitlines():
        assert re.fullmatch(
            r"# (HELP|TYPE) mimo_\w+ .+|mimo_\w+(\{\w+=\"[^\"]*\"(,\w+=\"[^\"]*\")*\})? [\d.e+-]+", line
        )


def test_the_acceptance_length_leaves_out_rounds_that_were_cut(serve, made):
    """Rounds by hand: three tokens and a round cut by the budget; then two, two, and what a stop string cut."""
    server = serve()
    a, b, c, d = (made["tokenizer"].convert_tokens_to_ids(t) for t in "abcd")
    rounds = [Round([b, b, b], 7, 2, False), Round([c], 7, 5, True)]

    def generate(prompt, sampling, *, on_tokens):
        on_tokens([a])
        for r in rounds:
            on_tokens(r.tokens)
        return Generation([a, *(t for r in rounds for t in r.tokens)], "length", rounds, [0.1] * len(rounds), 0.1)

    server.engine.generate = generate
    assert server.post({"messages": ASK}).json()["choices"][0]["message"]["content"] == "abbbc"
    wait(lambda: server.metric("acceptance_length_count") == 1)
    assert server.metric("acceptance_length_sum") == 3 and server.metric("generated_tokens_total") == 5
    rounds = [Round([b, b], 7, 1, False), Round([b, b], 7, 1, False), Round([c, d], 7, 1, False)]
    reply = server.post({"messages": ASK, "stop": "cd"}).json()
    assert reply["choices"][0] | {"logprobs": 0} == {
        "index": 0,
        "message": {"role": "assistant", "content": "abbbb"},
        "logprobs": 0,
        "finish_reason": "stop",
    }
    wait(lambda: server.metric("acceptance_length_count") == 3)
    assert server.metric("acceptance_length_sum") == 7 and server.metric("decode_seconds_count") == 1


def test_a_failing_engine_is_reported_and_tried_again(serve):
    server = serve()
    server.engine.fail = True
    reply = server.post({"messages": ASK})
    assert reply.status_code == 500 and "CUDA" not in reply.text and reply.json()["error"]["type"] == "server_error"
    assert httpx.get(server.url + "/health").status_code == 503
    server.engine.fail = False
    assert server.post({"messages": ASK, "max_tokens": 2}).status_code == 200
    assert httpx.get(server.url + "/health").json() == {"status": "ok", "ranks": 1}


@pytest.mark.parametrize("patience", [10.0, 0.1], ids=["finishes", "cuts"])
def test_shutting_down_refuses_what_waits_and_ends_what_runs(serve, patience):
    server = serve(shutdown_seconds=patience)
    server.engine.pause = 0.03

    def ask(tokens):
        return lambda: server.post({"messages": ASK, "max_tokens": tokens, "temperature": 0})

    with in_background(ask(40)) as running:
        wait(lambda: server.engine.rounds > 2)
        with in_background(ask(4), ask(4)) as waiting:
            wait(lambda: server.metric("queue_length") == 2)
            server.server.should_exit = True
    assert [r.status_code for r in waiting] == [503, 503]
    assert running[0].status_code == (200 if patience > 1 else 503)
    server.thread.join(10)
    assert not server.thread.is_alive()


def test_the_command_ends_with_zero_on_sigterm(engine, made):
    flags = ["--port=0", "--device=cpu", "--dtype=float32", "--max_len=512"]
    command = [sys.executable, "-m", "mimo_runtime", "serve", str(made["folder"]), *flags]
    tree = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "runtime"))}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=tree)
    try:
        url = next(m[1] for line in process.stderr if (m := re.search(r"serving release at (\S+)", line)))
        with httpx.stream(
            "POST", url + "/chat/completions", json={"messages": ASK, "stream": True}, timeout=30
        ) as reply:
            lines = reply.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and '"finish_reason": "length"' in rest[-2]
        assert process.wait(20) == 0 and "Traceback" not in process.stderr.read()
    finally:
        process.kill()
