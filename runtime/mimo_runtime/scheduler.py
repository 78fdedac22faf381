"""Who is served when: sessions, a bounded queue, and the one thread in which the engine runs.

All state lives in the event loop's thread, so there are no locks. The engine's thread only reads `Job.cancelled` and
hands events over with `call_soon_threadsafe`. A job that nobody waits for any more stops at its next round: the
engine's callback raises, which leaves nothing behind, since its caches need no reset.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from mimo_runtime.config import SamplingConfig
from mimo_runtime.detokenize import Decoder, Detokenizer, StopStrings
from mimo_runtime.engine import Engine, Generation
from mimo_runtime.protocol import ApiError
from mimo_runtime.serve_config import ServeConfig
from mimo_runtime.serve_ranks import SharedEngine

log = logging.getLogger("mimo_runtime.serve")


class Metrics:
    """Counters and gauges in Prometheus' text format."""

    HELP = {
        "requests_total": ("counter", "requests by endpoint and status; 499 is a client that went away"),
        "prompt_tokens_total": ("counter", "prompt tokens of requests that ran"),
        "generated_tokens_total": ("counter", "tokens that the engine committed"),
        "queue_length": ("gauge", "requests that wait"),
        "running": ("gauge", "requests in the engine, 0 or 1"),
        "sessions": ("gauge", "clients with a session"),
        "ranks": ("gauge", "processes that share the model"),
        "acceptance_length": ("summary", "tokens a verification with drafts, the model's own token included"),
        "queue_seconds": ("summary", "time between arrival and start"),
        "prefill_seconds": ("summary", "time of prompts, to the first token, of generations that were not ended early"),
        "decode_seconds": ("summary", "time after the first token, of the same"),
    }

    def __init__(self) -> None:
        self.values = defaultdict[str, float](int)

    def add(self, name: str, amount: float = 1, **labels: Any) -> None:
        """Adds to a counter."""
        inside = ",".join(f'{k}="{v}"' for k, v in labels.items())
        self.values[f"{name}{{{inside}}}" if inside else name] += amount

    def observe(self, name: str, total: float, count: int = 1) -> None:
        """Adds `count` observations that sum to `total` to a summary."""
        self.add(name + "_sum", total)
        self.add(name + "_count", count)

    def text(self, **gauges: int) -> str:
        """The page; `gauges` are the values of this moment."""
        lines = []
        for name, (kind, text) in self.HELP.items():
            lines += [f"# HELP mimo_{name} {text}", f"# TYPE mimo_{name} {kind}"]
            if kind == "gauge":
                lines.append(f"mimo_{name} {gauges[name]}")
            elif kind == "summary":
                lines += [f"mimo_{name}_{part} {self.values[f'{name}_{part}']}" for part in ("sum", "count")]
            else:
                found = {k: v for k, v in self.values.items() if k.split("{")[0] == name}
                labelled = name == "requests_total"
                lines += [f"mimo_{k} {v}" for k, v in (found or ({} if labelled else {name: 0})).items()]
        return "\n".join(lines) + "\n"


@dataclass
class Session:
    """The time that a client holds one of the places."""

    opened: float
    last_used: float
    active: int = 0
    """requests that wait or run"""


class Sessions:
    """At most `max_sessions` clients at a time, each until its time is over or it was idle for too long."""

    def __init__(self, cfg: ServeConfig):
        self.cfg = cfg
        self.open: dict[str, Session] = {}

    def enter(self, client: str, now: float) -> Session:
        """The client's session for one more request, a new one where it has none. ApiError 429 where none is free."""
        self._end(now)
        session = self.open.get(client)
        if session is None:
            if self.cfg.max_sessions and len(self.open) >= self.cfg.max_sessions:
                wait = min(self._ends(s, now) for s in self.open.values()) - now
                raise ApiError(
                    429,
                    f"all {self.cfg.max_sessions} sessions are taken; try again later",
                    "sessions_full",
                    retry_after=max(math.ceil(min(wait, self.cfg.idle_seconds)), 1),
                )
            session = self.open[client] = Session(now, now)
        session.active += 1
        return session

    def leave(self, session: Session, now: float) -> None:
        """Ends a request that `enter` began."""
        session.active, session.last_used = session.active - 1, now

    def deadline(self, session: Session) -> float:
        """When the session ends by age."""
        return session.opened + (self.cfg.session_seconds or math.inf)

    def count(self, now: float) -> int:
        """Sessions open now."""
        self._end(now)
        return len(self.open)

    def _ends(self, s: Session, now: float) -> float:
        idle = (now if s.active else s.last_used) + self.cfg.idle_seconds
        return min(self.deadline(s), idle)

    def _end(self, now: float) -> None:
        self.open = {client: s for client, s in self.open.items() if self._ends(s, now) > now}


@dataclass(frozen=True)
class Done:
    """The last event of a job that went well; tokens as in `usage`."""

    finish: str
    tokens: int


class _Stop(Exception):
    """Raised through the engine's callback to end a generation."""


@dataclass(eq=False)
class Job:
    """One request on its way through the queue and the engine. `events` gets pieces of text, then Done or ApiError."""

    client: str
    prompt: list[int]
    sampling: SamplingConfig
    stops: tuple[str, ...] = ()
    arrived: float = field(default_factory=time.monotonic)
    events: asyncio.Queue[str | Done | ApiError] = field(default_factory=asyncio.Queue)
    cancelled: bool = False


@dataclass
class _Run:
    """What the engine's thread knows of the job it runs."""

    job: Job
    text: Detokenizer
    stops: StopStrings
    rounds: list[int] = field(default_factory=list)
    """tokens of each round, the prefill's one first"""
    counted: int = 0
    """tokens up to the stop string"""


def _use(device: torch.device) -> None:
    """Makes `device` the one that kernels of this thread are launched on; each thread begins with the first GPU."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


class Scheduler:
    """The queue in front of one engine. `start` it inside of the event loop, `drain` and `close` it at the end."""

    def __init__(self, engine: Engine | SharedEngine, decoder: Decoder, cfg: ServeConfig):
        self.engine, self.decoder, self.cfg = engine, decoder, cfg
        self.metrics = Metrics()
        self.waiting: deque[Job] = deque()
        self.running: Job | None = None
        self.draining, self.failed = False, False
        self.thread = ThreadPoolExecutor(1, "engine", initializer=_use, initargs=(engine.device,))
        self.busy_seconds, self.finished = 0.0, 0

    def start(self) -> None:
        """Starts to take jobs."""
        self.loop = asyncio.get_running_loop()
        self.arrival = asyncio.Event()
        self.task = self.loop.create_task(self._serve())

    def admit(self, client: str) -> None:
        """ApiError 429 where the queue or the client's share of it is full, 503 at the end of the server's life."""
        if self.draining:
            raise self._closing()
        if len(self.waiting) >= self.cfg.max_queue:
            raise self._full(f"{self.cfg.max_queue} requests wait already", "queue_full")
        if sum(job.client == client for job in self.waiting) >= self.cfg.max_queue_per_client:
            raise self._full(f"{self.cfg.max_queue_per_client} of your requests wait already", "client_queue_full")

    def submit(self, job: Job) -> None:
        """Puts a job at the end of the queue; errors as of `admit`."""
        self.admit(job.client)
        self.waiting.append(job)
        self.arrival.set()

    def cancel(self, job: Job) -> None:
        """Takes a job out of the queue, or ends it at its next round; one that is done stays as it is."""
        job.cancelled = True
        with contextlib.suppress(ValueError):
            self.waiting.remove(job)

    def drain(self) -> None:
        """Refuses what waits and what comes; what runs may go on for `shutdown_seconds`."""
        self.draining = True
        while self.waiting:
            self.waiting.popleft().events.put_nowait(self._closing())
        self.loop.call_later(self.cfg.shutdown_seconds, self._cut)

    async def close(self) -> None:
        """Ends what runs and waits for the engine's thread."""
        self.draining = True
        self._cut()
        self.arrival.set()
        await self.task
        self.thread.shutdown()

    def _cut(self) -> None:
        if self.running:
            self.running.events.put_nowait(self._closing())
            self.running.cancelled = True

    def _closing(self) -> ApiError:
        return ApiError(503, "the server shuts down; try again later or elsewhere", "shutting_down", retry_after=5)

    def _full(self, reason: str, code: str) -> ApiError:
        mean = self.busy_seconds / self.finished if self.finished else 1.0
        wait = min(max(math.ceil(mean * len(self.waiting)), 1), 600)
        return ApiError(429, f"{reason}; try again in {wait} s", code, retry_after=wait)

    async def _serve(self) -> None:
        while not (self.draining and not self.waiting):
            if not self.waiting:
                self.arrival.clear()
                await self.arrival.wait()
                continue
            job = self.running = self.waiting.popleft()
            began = time.monotonic()
            self.metrics.observe("queue_seconds", began - job.arrived)
            run = _Run(job, Detokenizer(self.decoder), StopStrings(job.stops))
            try:
                out = await self.loop.run_in_executor(self.thread, self._generate, run)
                self.failed = False
            except Exception:  # whatever the engine met, the next request deserves its own try
                log.exception("the engine failed")
                self.failed, out = True, None
                job.events.put_nowait(ApiError(500, "the engine failed; see the server's log", "engine_failed"))
            self.busy_seconds, self.finished = self.busy_seconds + time.monotonic() - began, self.finished + 1
            self._count(run, out)
            self.running = None

    def _generate(self, run: _Run) -> Generation | None:
        """Runs in the engine's thread; None where the generation was ended early."""

        def send(event: str | Done) -> None:
            self.loop.call_soon_threadsafe(run.job.events.put_nowait, event)

        def on_tokens(tokens: list[int]) -> None:
            run.rounds.append(len(tokens))
            if run.job.cancelled:
                raise _Stop
            # Token by token where a stop string may cut a round, so that usage does not depend on the drafts.
            for part in ([t] for t in tokens) if run.job.stops else (tokens,):
                run.counted += len(part)
                shown = run.stops.push(run.text.push([t for t in part if t not in ends]))
                if shown:
                    send(shown)
                if run.stops.found:
                    raise _Stop

        ends = self.engine.target.stop_token_ids
        try:
            out = self.engine.generate(run.job.prompt, run.job.sampling, on_tokens=on_tokens)
        except _Stop:
            if run.stops.found:
                send(Done("stop", run.counted))
            return None
        rest = run.stops.push(run.text.flush())
        found = run.stops.found
        if rest := rest + run.stops.flush():
            send(rest)
        send(Done("stop" if found else out.finish, run.counted))
        return out

    def _count(self, run: _Run, out: Generation | None) -> None:
        self.metrics.add("prompt_tokens_total", len(run.job.prompt))
        self.metrics.add("generated_tokens_total", sum(run.rounds))
        if out:
            self.metrics.observe("prefill_seconds", out.prefill_seconds)
            self.metrics.observe("decode_seconds", out.decode_seconds)
        if self.engine.drafter:
            # The last round of a generation may have been cut, and says nothing then.
            lengths = [r.accepted + 1 for r in out.rounds if not r.cut] if out else run.rounds[1:-1]
            self.metrics.observe("acceptance_length", sum(lengths), len(lengths))
