"""The protocol of `mimo_kernels.allreduce_triton` as coroutines that an adversary schedules, one memory access a step.

A store is under way until the schedule delivers it; those to one address arrive in order, all others in any. A rank
begins a launch when all programs of the one before have ended, and its programs (one a cell) interleave freely. What a
launch computes is, for each cell and word, the tuple of the ranks' contributions in rank order.
"""

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

WORDS = 2  # of a packet; each carries its own flag
MODULUS = 2**32


class Stuck(Exception):
    """All that still run poll, and nothing is under way that could end it."""


@dataclass(frozen=True)
class Rules:
    """The protocol, and what may be broken in it."""

    halves: int = 2
    torn: bool = False  # payload and flag as two accesses
    gives_up: float = 0.0  # chance that a round of polling in vain is the last
    stops: tuple[int, int] | None = None  # (rank, launch that it does not begin)
    start: int = 0  # epochs before the first launch


def contribution(rank: int, launch: int, cell: int, word: int) -> tuple[int, ...]:
    return rank, launch, cell, word


class Simulation:
    """`ranks` ranks that make launches of sizes[i] cells; `speeds` are the chances of a rank's step."""

    def __init__(self, rules: Rules, sizes: list[int], speeds: list[float], seed: int):
        self.rules, self.sizes, self.speeds = rules, sizes, speeds
        self.random, self.ranks = random.Random(seed), len(speeds)
        self.memory: dict[tuple, object] = {}
        self.under_way: dict[tuple, deque] = {}
        self.changes = 0
        self.epochs = [[rules.start] * max(sizes) for _ in speeds]
        self.failed = [0] * self.ranks
        self.results: list[list[dict]] = [[] for _ in speeds]  # of each rank and launch: {(cell, word): sum}
        self.marks: list[list[int]] = [[] for _ in speeds]  # `failed` after each launch

    # --- memory: an address is (owner, half, source, cell, word, part)

    def store(self, address: tuple, value: object) -> None:
        self.under_way.setdefault(address, deque()).append(value)

    def load(self, address: tuple) -> object:
        return self.memory.get(address, self.rules.start if address[-1] == "flag" else None)

    def deliver(self) -> None:
        address = self.random.choice(list(self.under_way))
        self.memory[address] = self.under_way[address].popleft()
        if not self.under_way[address]:
            del self.under_way[address]
        self.changes += 1

    def send(self, address: tuple, payload: tuple, flag: int) -> Iterator[None]:
        if self.rules.torn:
            self.store((*address, "payload"), payload)
            self.store((*address, "flag"), flag)
        else:
            self.store((*address, "word"), (payload, flag))
        yield

    def look(self, address: tuple) -> Iterator[None]:
        """-> (payload, flag)"""
        if self.rules.torn:
            flag = self.load((*address, "flag"))
            yield
            return self.load((*address, "payload")), flag
        word = self.load((*address, "word"))
        yield
        return word or (None, self.rules.start)

    # --- programs

    def program(self, rank: int, launch: int, cell: int, out: dict) -> Iterator[int | None]:
        """One cell of one launch. Yields None after an access, or the state of the memory that it polled in vain."""
        epoch = (self.epochs[rank][cell] + 1) % MODULUS
        dead = self.failed[rank]
        half = epoch % self.rules.halves
        yield None
        for peer in range(self.ranks):
            for word in range(WORDS):
                if not dead:
                    yield from self.send((peer, half, rank, cell, word), contribution(rank, launch, cell, word), epoch)
        places = [(source, word) for source in range(self.ranks) for word in range(WORDS)]
        while True:
            before, got = self.changes, {}
            for source, word in places:
                got[source, word] = yield from self.look((rank, half, source, cell, word))
            missing = [source for source, word in places if got[source, word][1] != epoch]
            if dead or not missing:
                break
            if self.random.random() < self.rules.gives_up:
                self.failed[rank] = 1 + missing[0]
                break
            yield before
        for word in range(WORDS):
            out[cell, word] = tuple(got[source, word][0] for source in range(self.ranks))
        self.epochs[rank][cell] = epoch

    def begin(self, rank: int, launch: int) -> list:
        if launch == len(self.sizes) or self.rules.stops == (rank, launch):
            return []
        self.results[rank].append({})
        return [[self.program(rank, launch, cell, self.results[rank][-1]), None] for cell in range(self.sizes[launch])]

    def run(self) -> None:
        """Until all ranks have made their launches. Raises Stuck."""
        running = {rank: self.begin(rank, 0) for rank in range(self.ranks)}
        running = {rank: programs for rank, programs in running.items() if programs}
        while running:
            polling = all(state == self.changes for programs in running.values() for _, state in programs)
            if self.under_way and (polling or self.random.random() < 0.4):
                self.deliver()
                continue
            if polling and not self.rules.gives_up:
                raise Stuck
            rank = self.random.choices(list(running), [self.speeds[r] for r in running])[0]
            program = self.random.choice(running[rank])
            try:
                program[1] = next(program[0])
            except StopIteration:
                running[rank].remove(program)
            if not running[rank]:
                self.marks[rank].append(self.failed[rank])
                running[rank] = self.begin(rank, len(self.results[rank]))
                if not running[rank]:
                    del running[rank]

    def expected(self, launch: int) -> dict:
        """What every rank should have."""
        return {
            (cell, word): tuple(contribution(r, launch, cell, word) for r in range(self.ranks))
            for cell in range(self.sizes[launch])
            for word in range(WORDS)
        }

    def wrong(self) -> list[tuple[int, int]]:
        """(rank, launch) of sums that are not right, although the rank says nothing of a failure."""
        return [
            (rank, launch)
            for rank in range(self.ranks)
            for launch, failed in enumerate(self.marks[rank])
            if not failed and self.results[rank][launch] != self.expected(launch)
        ]
