"""Names the rank that died or does not keep up, within seconds, where a collective would wait for it in silence.

A thread of every process writes a beat to the launcher's key-value store twice a second, with the number of
collectives that its main thread has begun, and reads those of the others. It costs the decoding next to nothing, and
it still runs when the main thread hangs inside a collective or waits for a GPU that does.
"""

import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from threading import Event, Thread
from typing import Any

BEAT = 0.5  # seconds between beats
GRACE = 3.0  # seconds without a beat that are enough once a connection has broken


@dataclass
class Peer:
    """What was last read of another rank: its beat and calls, and when each of them last changed."""

    beat: str
    calls: int
    beat_at: float
    calls_at: float


class Watch(Thread):
    """`calls` is counted up before each collective by who decodes. Ends the process when a rank is at fault."""

    def __init__(self, store: Any, rank: int, size: int):
        super().__init__(daemon=True, name="watch")
        self.store, self.rank, self.size = store, rank, size
        self.calls, self.timeout = 0, 20.0
        self._broken, self._over = Event(), Event()
        self._why = ""

    def meet(self, seconds: float) -> None:
        """Waits until every rank has come; ValueError names one that has not after so many seconds."""
        self._say("0")
        for r in range(self.size):
            try:
                self.store.wait([f"rank/{r}"], timedelta(seconds=seconds))
            except RuntimeError:
                raise ValueError(
                    f"rank {r} of {self.size} has not started after {seconds:.0f} s; look at its machine's log"
                ) from None

    def _say(self, beat: str) -> None:
        self.store.set(f"rank/{self.rank}", f"{beat} {self.calls} {int(self._broken.is_set())}")

    def blame(self) -> None:
        """For the main thread after a broken collective: returns only if no rank turns out to be at fault."""
        self._broken.set()
        self.join(self.timeout + GRACE)

    def stop(self, why: str) -> None:
        """Says that this rank cannot go on. Returns at once; the watch then names it and ends the process of each rank,
        where a plain exit would only be noticed at the next collective."""
        self._why = why

    def end(self) -> None:
        """Says that this rank is done. Who may hold the store (rank 0) stays until the others are done as well."""
        if self._broken.is_set():
            return
        self._over.set()
        self.join(2 * GRACE)
        try:
            self._say("ended")
            until = time.monotonic() + self.timeout
            while self.rank == 0 and time.monotonic() < until:
                if all(beat == "ended" for beat, _, _ in self._read().values()):
                    return
                time.sleep(0.05)
        except RuntimeError:  # the store is gone, with the rank that held it: nobody left to tell
            return

    def _read(self) -> dict[int, tuple[str, int, bool]]:
        """{other rank: (beat, calls, whether one of its connections broke)}."""
        others = [r for r in range(self.size) if r != self.rank]
        said = [value.decode().split() for value in self.store.multi_get([f"rank/{r}" for r in others])]
        return {r: (s[0], int(s[1]), s[2] == "1") for r, s in zip(others, said, strict=True)}

    def run(self) -> None:
        """Until `end`: beats, reads, and stops the process at the first fault."""
        tick, mine, mine_at, peers = 0, -1, 0.0, {}  # type: int, int, float, dict[int, Peer]
        while not self._over.wait(BEAT):
            tick += 1
            try:
                self._say(str(tick))
                read = self._read()
                if self.store.check(["stopped"]):  # another rank has said why
                    os._exit(1)
            except RuntimeError:
                self._halt({0: "it is gone, and the store of the launcher with it"})
                return
            now = time.monotonic()
            if self.calls != mine:
                mine, mine_at = self.calls, now
            for r, (beat, calls, broken) in read.items():
                if broken:  # not every rank is connected to the one that died
                    self._broken.set()
                peer = peers.setdefault(r, Peer(beat, calls, now, now))
                if beat != peer.beat:
                    peer.beat, peer.beat_at = beat, now
                if calls != peer.calls:
                    peer.calls, peer.calls_at = calls, now
            faults = {r: why for r, peer in peers.items() if (why := self._fault(peer, mine, mine_at, now))}
            if self._why:
                faults = {self.rank: self._why}
            if faults:
                self._halt(faults)

    def _fault(self, peer: Peer, mine: int, mine_at: float, now: float) -> str | None:
        """What is wrong with a rank. Before its first collective it may take any time: it is loading."""
        if peer.beat == "ended":
            return "it ended before the others, for a reason of its own" if peer.calls < mine else None
        silent = now - peer.beat_at
        if silent > (GRACE if self._broken.is_set() else self.timeout):
            return f"no sign of life for {silent:.0f} s, it was killed or its machine is gone"
        waited = now - max(peer.calls_at, mine_at)
        if 0 < peer.calls < mine and waited > self.timeout:
            return f"it is alive but late, the others have waited {waited:.0f} s for its next step"
        return None

    def _halt(self, faults: dict[int, str]) -> None:
        """Ends this process, since its main thread may never return. One of the healthy ranks, or who said `stop`, says
        why, and tells the others to end as well; they wait for that, because a launcher ends all processes when one
        does."""
        if self._over.is_set():
            return
        if self._why or self.rank == min(set(range(self.size)) - set(faults)):
            first = True
            with suppress(RuntimeError):  # without a store they find that out for themselves
                first = self.store.add("stopped", 1) == 1
            for r, why in faults.items() if first else ():
                print(f"error: rank {r} of {self.size} stopped the run: {why}", file=sys.stderr, flush=True)
        time.sleep(GRACE)
        os._exit(1)
