"""What the device did round by round: a Chrome trace of some rounds, and from it how long it waited for the host.

Rounds are graphs that the host replays ahead, so between two of them the device should not be idle for longer than
between two kernels of one. The trace is taken after the first rounds of a text, with as many rounds ahead as in a timed
run; CUPTI's own work makes kernels look a little longer than they are.
"""

import statistics
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from mimo_runtime.config import SamplingConfig
from mimo_runtime.engine import Engine
from mimo_runtime.rounds import Rounds, Step
from mimo_runtime.speculate import Round

FIRST, ROUNDS = 4, 16  # rounds before the trace, and in it


class TracedRounds(Rounds):
    """Rounds of which a profiler sees some, of the first text that is drafted or, without `drafted`, plain. (Forced
    acceptance decodes a text plainly before it drafts it.) The graphs are those of `rounds`."""

    def __init__(self, rounds: Rounds, drafted: bool):
        super().__init__(rounds.state, rounds.ahead, False, rounds.ranks)
        self.graphs, self.drafted = rounds.graphs, drafted
        self.profiler = profile(activities=[ProfilerActivity.CUDA], acc_events=True)
        self.meant, self.enqueued = False, 0

    def run(
        self, step: Step, kind: Hashable, start: int, left: int, most: int, drafted: int | None = None
    ) -> Iterator[Round]:
        self.meant = self.drafted == (most > 1)
        return super().run(step, kind, start, left, most, drafted)

    def _enqueue(self, step: Step, bound: int, slot: int) -> None:
        if self.meant and self.enqueued == FIRST:
            torch.cuda.synchronize()
            self.profiler.start()
        super()._enqueue(step, bound, slot)
        self.enqueued += self.meant
        if self.meant and self.enqueued == FIRST + ROUNDS:
            torch.cuda.synchronize()
            self.profiler.stop()


def waits_us(kernels: Sequence[tuple[float, float]], rounds: int) -> list[float]:
    """Microseconds between the end of all kernels of a round and the begin of the next round's first, for each two of
    `rounds`. kernels: (begin, end) of each in µs, in order of their begins, as many in each round."""
    count, rest = divmod(len(kernels), rounds)
    if rest or not count:
        raise ValueError(f"{len(kernels)} kernels are not {rounds} rounds of as many; trace rounds with cuda_graphs on")
    firsts = range(count, len(kernels), count)
    return [max(0.0, kernels[i][0] - max(end for _, end in kernels[:i])) for i in firsts]


def traced(engine: Engine, ids: list[int], sampling: SamplingConfig, path: Path, **way: Any) -> dict[str, Any]:
    """Decodes once more and writes the trace of ROUNDS rounds to `path` (rank 0 alone); -> their figures in µs.

    `engine` plays CUDA graphs. ValueError for a text of too few rounds."""
    with profile(activities=[ProfilerActivity.CUDA]):  # the first one takes seconds, in which other ranks would wait
        torch.cuda.synchronize()
    before = engine.rounds
    engine.rounds = rounds = TracedRounds(before, way.get("speculate", True))
    try:
        engine.generate(ids, sampling, **way)
    finally:
        engine.rounds = before
        if FIRST < rounds.enqueued < FIRST + ROUNDS:
            rounds.profiler.stop()
    if rounds.enqueued < FIRST + ROUNDS:
        raise ValueError(f"a text of {rounds.enqueued} rounds; for --trace give a max_new_tokens of more rounds")
    if engine.ranks.rank == 0:
        rounds.profiler.export_chrome_trace(str(path))
    device = [e for e in rounds.profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = [(e.time_range.start, e.time_range.end) for e in device if not e.name.startswith("Mem")]
    waits = waits_us(sorted(spans), ROUNDS)
    span = max(end for _, end in spans) - min(begin for begin, _ in spans)
    return {
        "kernels": len(spans) // ROUNDS,
        "round_us": span / ROUNDS,
        "host_us": statistics.median(waits),
        "host_us_most": max(waits),
        "file": path.name,
    }
