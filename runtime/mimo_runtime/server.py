"""mimo-runtime serve runs/demo/release --port 8000

An OpenAI-compatible server (chat completions and completions, streamed or not) over one engine that decodes one
sequence at a time: for trying a release with ordinary clients, and for giving several people a turn. It does not
batch; engines that do serve the same folder. A model of several GPUs (`serve_ranks`):

    torchrun --nproc_per_node 8 -m mimo_runtime serve release --port 8000

    curl localhost:8000/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Hello"}]}'

GET /metrics and /health need no key. Put a proxy in front for TLS. Needs the extra `serve` (starlette and uvicorn).
"""

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import math
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, nullcontext
from typing import Any

import jinja2
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mimo_runtime.config import SamplingConfig
from mimo_runtime.detokenize import Decoder
from mimo_runtime.engine import Engine
from mimo_runtime.parallel import place, world
from mimo_runtime.prompts import encode_messages, load_tokenizer
from mimo_runtime.protocol import Answer, ApiError, Kind, Request, bad, parse, usage
from mimo_runtime.scheduler import Done, Job, Scheduler, Sessions
from mimo_runtime.serve_config import ServeConfig
from mimo_runtime.serve_ranks import Control, SharedEngine, follow

log = logging.getLogger("mimo_runtime.serve")


class _ClientGone(Exception):
    """The client closed its connection, or did not read for too long."""


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Awaits `work`, and cancels it when the client closes the connection (_ClientGone)."""

    async def disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(disconnect())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise _ClientGone
        tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Api:
    """What the endpoints share: scheduler, sessions, keys and the tokenizer of prompts."""

    def __init__(self, engine: Engine | SharedEngine, cfg: ServeConfig):
        self.cfg, self.vocab_size, self.ranks = cfg, engine.target.geometry.vocab_size, engine.ranks.size
        # Two tokenizers, because two threads must not use one: prompts are encoded while the engine's thread decodes.
        self.tokenizer = load_tokenizer(cfg.folder)
        self.scheduler = Scheduler(engine, Decoder(load_tokenizer(cfg.folder)), cfg)
        self.sessions = Sessions(cfg)
        self.encoder = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self.keys = [hashlib.sha256(key.encode()).digest() for key in cfg.api_keys()]
        self.started = int(time.time())

    def app(self) -> Starlette:
        """The ASGI application."""

        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            self.scheduler.start()
            yield
            await self.scheduler.close()
            self.encoder.shutdown(wait=False, cancel_futures=True)

        async def api_error(_: HttpRequest, error: Any) -> Response:
            return JSONResponse(error.body, error.status, error.headers)

        async def http_error(_: HttpRequest, error: Any) -> Response:
            found = ApiError(error.status_code, f"{error.detail}: no such path, or another method", "not_found")
            return JSONResponse(found.body, error.status_code, error.headers)

        routes = [
            Route("/v1/chat/completions", Completions(self, "chat.completion"), methods=["POST"]),
            Route("/v1/completions", Completions(self, "text_completion"), methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
        ]
        handlers: Any = {ApiError: api_error, HTTPException: http_error}
        return Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)

    async def models(self, http: HttpRequest) -> Response:
        """GET /v1/models: the one model."""
        self.client(http)
        model = {"id": self.cfg.name, "object": "model", "created": self.started, "owned_by": "mimo-runtime"}
        return JSONResponse({"object": "list", "data": [model | {"max_model_len": self.cfg.max_len}]})

    async def health(self, _: HttpRequest) -> Response:
        """GET /health: 200, or 503 where the last generation failed or the server shuts down."""
        state = "failed" if self.scheduler.failed else "shutting down" if self.scheduler.draining else "ok"
        return JSONResponse({"status": state, "ranks": self.ranks}, 200 if state == "ok" else 503)

    async def metrics(self, _: HttpRequest) -> Response:
        """GET /metrics: Prometheus text."""
        s = self.scheduler
        sessions = self.sessions.count(time.monotonic())
        now = {"queue_length": len(s.waiting), "running": int(s.running is not None), "sessions": sessions}
        text = s.metrics.text(**now, ranks=self.ranks)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    def client(self, http: HttpRequest) -> str:
        """The client's key number or address. ApiError 401 where a key is needed and missing."""
        if not self.keys:
            return http.client.host if http.client else "local"
        scheme, _, key = http.headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(key.strip().encode()).digest()
        match = [hmac.compare_digest(given, known) for known in self.keys]  # all of them: equal time for every key
        if scheme.lower() != "bearer" or not any(match):
            raise ApiError(401, "wrong or missing API key; send Authorization: Bearer KEY", "invalid_api_key")
        return f"key {match.index(True)}"

    async def job(self, request: Request, client: str) -> Job:
        """The request as the engine takes it. ApiError 400 where the prompt or the answer is too long."""
        prompt = await asyncio.get_running_loop().run_in_executor(self.encoder, self._encode, request)
        if not prompt:
            raise bad("prompt", "the prompt has no tokens; send a text that is not empty")
        if len(prompt) > self.cfg.prompt_limit:
            message = f"the prompt has {len(prompt)} tokens, this server takes {self.cfg.prompt_limit}; shorten it"
            raise bad("prompt", message, "context_length_exceeded")
        room = min(self.cfg.max_output_tokens, self.cfg.max_len - len(prompt))
        most = request.max_tokens
        if most is None:
            most = room if request.kind == "chat.completion" else min(16, room)  # OpenAI's default of completions
        if most > room:
            message = f"max_tokens is {most}, {room} are possible after {len(prompt)} prompt tokens; ask for fewer"
            raise bad("max_tokens", message, "context_length_exceeded")
        sampling = SamplingConfig(
            max_new_tokens=most,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            seed=request.seed,
        )
        return Job(client, prompt, sampling, request.stops)

    def _encode(self, request: Request) -> list[int]:
        prompt = request.prompt
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if request.kind == "chat.completion":
            try:
                return encode_messages(self.tokenizer, prompt)  # type: ignore[arg-type]
            except jinja2.TemplateError as error:
                raise bad("messages", f"the model's chat template refuses these messages: {error}") from None
        if not all(0 <= i < self.vocab_size for i in prompt):  # type: ignore[operator]
            raise bad("prompt", f"token ids must be from 0 to {self.vocab_size - 1}; use this model's tokenizer")
        return prompt  # type: ignore[return-value]


class Completions:
    """POST /v1/chat/completions or /v1/completions, as an ASGI application."""

    def __init__(self, api: Api, kind: Kind):
        self.api, self.kind = api, kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, and counts it under the status that it ended with."""
        status = 499
        try:
            status = await self._answer(scope, receive, send)
        except ApiError as error:
            status = error.status
            raise
        except _ClientGone:
            pass
        except Exception:
            status = 500
            raise
        finally:
            path = scope["path"]
            self.api.scheduler.metrics.add("requests_total", endpoint=path, status=status)
            log.info("%s %d", path, status)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> int:
        api, http = self.api, HttpRequest(scope, receive)
        client = api.client(http)
        request = parse(await self._body(http), self.kind, api.cfg.name)
        api.scheduler.admit(client)  # before the work of encoding, and again after it
        job = await api.job(request, client)
        session = api.sessions.enter(client, time.monotonic())
        try:
            api.scheduler.submit(job)
            turn = _Turn(job, Answer(request, api.cfg.name), api.sessions.deadline(session), api.cfg.io_seconds)
            work = turn.stream(send) if request.stream else turn.whole(scope, receive, send)
            await _while_connected(receive, work)
            return turn.status
        finally:
            api.scheduler.cancel(job)
            api.sessions.leave(session, time.monotonic())

    async def _body(self, http: HttpRequest) -> bytes:
        most, body = self.api.cfg.max_request_bytes, bytearray()
        try:
            async with asyncio.timeout(self.api.cfg.io_seconds):
                async for part in http.stream():
                    body += part
                    if len(body) > most:
                        raise ApiError(413, f"the request is larger than {most} bytes; shorten it", "request_too_large")
        except ClientDisconnect:
            raise _ClientGone from None
        except TimeoutError:
            raise ApiError(408, "the request did not arrive in time; send it faster", "request_timeout") from None
        return bytes(body)


class _Turn:
    """One answer on its way from the engine to the client, before `deadline` (on the clock of time.monotonic)."""

    def __init__(self, job: Job, answer: Answer, deadline: float, io_seconds: float):
        self.job, self.answer, self.deadline, self.io_seconds, self.status = job, answer, deadline, io_seconds, 200

    async def whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The whole answer in one document."""
        text = ""
        while isinstance(event := await self._next(), str):
            text += event
        response = JSONResponse(self.answer.whole(text, event.finish, self._usage(event)))
        await self._timely(response(scope, receive, send))

    async def stream(self, send: Send) -> None:
        """Server-sent events; the response starts with the first text, so that earlier errors keep their status."""
        event = await self._next()
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await self._timely(send({"type": "http.response.start", "status": 200, "headers": headers}))
        if self.answer.chat:
            await self._event(send, self.answer.chunk("", first=True))
        try:
            while isinstance(event, str):
                await self._event(send, self.answer.chunk(event))
                event = await self._next()
            await self._event(send, self.answer.chunk("", event.finish))
            if self.answer.include_usage:
                await self._event(send, self.answer.usage_chunk(self._usage(event)))
        except ApiError as error:
            self.status = error.status
            await self._event(send, error.body)
        await self._timely(send({"type": "http.response.body", "body": b"data: [DONE]\n\n"}))

    async def _next(self) -> str | Done:
        left = self.deadline - time.monotonic()
        try:
            async with asyncio.timeout(left if math.isfinite(left) else None):
                event = await self.job.events.get()
        except TimeoutError:
            raise ApiError(403, "the session's time is over; the next request begins another", "session_over") from None
        if isinstance(event, ApiError):
            raise event
        return event

    def _usage(self, done: Done) -> dict[str, int]:
        return usage(len(self.job.prompt), done.tokens)

    async def _event(self, send: Send, document: dict[str, Any]) -> None:
        body = f"data: {json.dumps(document, ensure_ascii=False)}\n\n".encode()
        await self._timely(send({"type": "http.response.body", "body": body, "more_body": True}))

    async def _timely(self, sent: Any) -> None:
        try:
            async with asyncio.timeout(self.io_seconds):
                await sent
        except TimeoutError:
            raise _ClientGone from None


class Server(uvicorn.Server):
    """uvicorn, which tells the scheduler when it begins to shut down."""

    def __init__(self, api: Api):
        cfg = api.cfg
        self.api = api
        super().__init__(
            uvicorn.Config(
                api.app(),
                log_config=None,
                access_log=False,
                proxy_headers=False,  # a client could name any address
                server_header=False,
                ws="none",
                limit_concurrency=cfg.max_connections,
                timeout_keep_alive=max(math.ceil(cfg.io_seconds), 1),
                # What is left then is a client that does not read: its task is cancelled.
                timeout_graceful_shutdown=math.ceil(cfg.shutdown_seconds) + 2,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Says where it listens once it does."""
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        log.info("serving %s at http://%s:%d/v1", self.api.cfg.name, f"[{host}]" if ":" in host else host, port)
        if not (self.api.keys or ipaddress.ip_address(host).is_loopback):
            log.warning("everyone who reaches %s may use this server; give --api_key_file to ask for keys", host)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuses what waits, then lets uvicorn finish what runs."""
        self.api.scheduler.drain()
        await super().shutdown(sockets)


def listen(cfg: ServeConfig) -> socket.socket:
    """A socket bound to host and port; uvicorn begins to listen on it once the model is loaded."""
    bound = socket.socket(socket.AF_INET6 if ":" in cfg.host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((cfg.host, cfg.port))
    except OSError as error:
        bound.close()
        raise ValueError(f"cannot listen on {cfg.host} port {cfg.port} ({error}); choose another --port") from None
    return bound


def main(cfg: ServeConfig) -> None:
    """Serves a release over HTTP until SIGTERM or SIGINT, then finishes what runs and exits with 0. Of several ranks
    the first one serves; the others do their part of each request, and end with it."""
    rank, size = world()
    if rank:
        return follow(cfg)
    cfg.api_keys()  # refused before the model is loaded, as a port that is taken
    bound = listen(cfg)
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    log.setLevel(logging.INFO)
    control = Control(place(cfg.device)) if size > 1 else None
    engine = Engine(cfg.folder, cfg)
    shared = SharedEngine(engine, control) if control else None
    server = Server(Api(shared or engine, cfg))
    with shared or nullcontext():
        # uvicorn handles both signals and raises them again at its end; by then they are handled.
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, lambda *_: None)
        server.run(sockets=[bound])
