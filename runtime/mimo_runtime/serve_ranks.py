"""One request on all ranks: what `torchrun --nproc_per_node N -m mimo_runtime serve RELEASE` adds to the server.

Rank 0 runs the HTTP server and its queue. The other ranks wait for its jobs and call `Engine.generate` with the same
arguments, so that decoding goes as it does in `generate` and `bench`: nothing of it is broadcast. What rank 0 alone
knows is when a job comes and whether a client still wants it. It says so over a gloo group of its own (`Control`), in
an order that is fixed beforehand: a job; then one word, go on or stop, after every round, that is each time that
`on_tokens` is called; then the next job, and an empty one at the end.

Why nobody waits for ever. Call this word k of a job. Every rank asks for it after it has read what round k did and
before it enqueues anything more, so all ranks stop after the same round, with the same rounds enqueued ahead, which the
devices still play to their end. Rank 0 says word k once it has read round k. That takes the work of all devices in
rounds up to k, which every rank enqueued after the words before k, and no host: word k depends on earlier words only.
A rank that is gone breaks the connection, and one that does not come is late for the watch, which counts jobs and words
as it counts collectives. Between two jobs all ranks have counted the same, so that an idle rank is never late.

The words are off the device's critical path: with `rounds_ahead` of 2 or more it plays the next round meanwhile. A tree
is grown by the hosts, and waits.

A job that `generate` refuses before its first collective (ValueError: it checks lengths and tokens) is refused by all
ranks alike. After any other error the ranks may be out of step: the watch says which rank it was, and ends all.
"""

import json
import logging
import signal
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from mimo_runtime.config import SamplingConfig
from mimo_runtime.engine import Engine, Generation
from mimo_runtime.parallel import control_group, place
from mimo_runtime.serve_config import ServeConfig

log = logging.getLogger("mimo_runtime.serve")


class Control:
    """What rank 0 says to the others. Every method is called by all ranks, and made before they load: they meet."""

    def __init__(self, device: str):
        self.watch, self.group = control_group(device)

    def meet(self) -> None:
        """Returns when all ranks have come here."""
        self.watch.calls += 1
        self._together(dist.barrier)

    def share(self, data: bytes = b"") -> bytes:
        """The `data` of rank 0, on all ranks, once all have it. The others may wait for it as long as they like."""
        first, size = self.watch.rank == 0, torch.tensor([len(data)])
        self.watch.calls += first
        self._together(dist.broadcast, size, 0)
        self.watch.calls += not first  # from here on who does not come is late
        payload = torch.zeros(int(size), dtype=torch.uint8)
        if data:
            payload = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if len(payload):
            self._together(dist.broadcast, payload, 0)
        self._together(dist.barrier)
        return payload.numpy().tobytes()

    def word(self, stop: bool) -> bool:
        """What rank 0 says: True is stop."""
        said = torch.tensor([stop], dtype=torch.uint8)
        self.watch.calls += 1
        self._together(dist.broadcast, said, 0)
        return bool(said)

    def _together(self, collective: Callable[..., Any], *args: Any) -> None:
        try:
            collective(*args, group=self.group)
        except RuntimeError:  # a connection closed; the watch knows whose, and ends this process
            self.watch.blame()
            raise


class _Stopped(Exception):
    """Rank 0 said stop."""


class SharedEngine:
    """One rank's engine, with a `generate` that takes all ranks along: rank 0 calls it, the others `follow`.

    It has what the server asks of an Engine. On rank 0 a context manager, whose end sends the others home.
    """

    def __init__(self, engine: Engine, control: Control):
        self.engine, self.control, self.broken = engine, control, False
        self.target, self.drafter, self.device, self.ranks = engine.target, engine.drafter, engine.device, engine.ranks

    def generate(
        self, prompt_ids: list[int], sampling: SamplingConfig, *, on_tokens: Callable[[list[int]], None]
    ) -> Generation:
        """As Engine.generate, of which all ranks do their part; what `on_tokens` raises stops all of them.

        RuntimeError after an error that not all ranks may have met alike: the watch is about to end the process.
        """
        if self.broken:
            raise RuntimeError("the ranks are out of step after an earlier error; start the server again")
        self.control.share(json.dumps({"prompt": prompt_ids, "sampling": asdict(sampling)}).encode())
        return self._run(prompt_ids, sampling, on_tokens)

    def follow(self) -> None:
        """Does this rank's part of every job until rank 0 is done."""
        while data := self.control.share():
            job = json.loads(data)
            job["sampling"]["stop_token_ids"] = tuple(job["sampling"]["stop_token_ids"])
            try:
                self._run(job["prompt"], SamplingConfig(**job["sampling"]), lambda tokens: None)
            except Exception as error:
                if self.broken:
                    if not isinstance(error, ValueError):
                        log.exception("the engine failed")
                    self.control.watch.join()  # it ends this process

    def _run(
        self, prompt_ids: list[int], sampling: SamplingConfig, on_tokens: Callable[[list[int]], None]
    ) -> Generation:
        watch, stopped = self.control.watch, False
        begun = watch.calls

        def after(tokens: list[int]) -> None:
            nonlocal stopped
            wanted = False
            try:
                on_tokens(tokens)
                wanted = True
            finally:
                stopped = self.control.word(not wanted)
            if stopped:
                raise _Stopped

        try:
            return self.engine.generate(prompt_ids, sampling, on_tokens=after)
        except Exception as error:
            refused = isinstance(error, ValueError) and watch.calls == begun
            if not (stopped or refused):
                self.broken = True
                watch.stop(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}")
            raise

    def __enter__(self) -> "SharedEngine":
        self.control.meet()
        return self

    def __exit__(self, *_: object) -> None:
        if self.broken:
            self.control.watch.join()  # it ends this process
        self.control.share()


def follow(cfg: ServeConfig) -> None:
    """What a rank other than 0 does: loads its share, then its part of every job.

    SIGTERM and SIGINT, which a launcher sends to all, are rank 0's: it lets the running request end, then all go.
    """
    control = Control(place(cfg.device))
    shared = SharedEngine(Engine(cfg.folder, cfg), control)
    control.meet()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)
    shared.follow()
