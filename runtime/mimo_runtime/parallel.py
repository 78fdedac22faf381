"""Ranks that share one model: tensor parallelism behind three calls, `sum`, `gather` and `agree`.

Every rank runs the whole program on its share of the weights. Activations between sublayers, routing, sampling noise
(keyed by position) and therefore every decision are computed by all ranks alike, so nothing of it is broadcast. That
holds only while all ranks have the same bits: `sum` adds in rank order everywhere, and `agree` proves the result.

The transport is torch.distributed: gloo between CPU processes, NCCL between GPUs, where `symmetric.Symmetric` replaces
it for the small sums of a decode step. Processes come from torchrun, or from any launcher that sets RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
"""

import atexit
import os
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, ClassVar

import torch

from mimo_kernels import moe, residual
from mimo_runtime.norms import Norm, add_norm
from mimo_runtime.watch import Watch

START_SECONDS = 300  # a launcher may start processes far apart


@dataclass
class Ranks:
    """One rank of `size`, without a connection to the others: enough to load its share; alone it computes too."""

    rank: int = 0
    size: int = 1
    collectives: ClassVar[str] = "none"  # what sums go through, for who reports a measurement

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The contributions x [T, H] of all ranks, added in rank order in float32 and rounded once to x's dtype."""
        assert self.size == 1
        return x

    def add_norm(self, x: torch.Tensor, part: torch.Tensor | None, norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
        """(x + the sum of the contributions `part` of all ranks, its norm), each [T, H]; None is no contribution, and
        one may be in parts, as `moe.parts` leaves it."""
        return add_norm(x, None if part is None else self.sum(part), norm)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., n] of all ranks -> [..., size * n], in rank order."""
        assert self.size == 1
        return x

    def begin_pass(self) -> None:
        """Says that this rank begins a pass of the model: who stops here is late, also where a graph replays it."""

    def record(self, x: torch.Tensor) -> None:
        """Notes activations that all ranks should hold with the same bits, for the next `agree`."""

    def agree(self, when: str, tokens: list[int]) -> None:
        """Where that was asked for: ValueError unless all ranks recorded the same bits and chose the same `tokens`."""


class Alone(Ranks):
    """The first of `size` ranks without the others: its work and its bytes, for measurements. What it computes is not
    the model: sums hold its own contribution, and what is gathered is its own part again."""

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x] * self.size, dim=-1)


class Group(Ranks):
    """A rank connected to the others."""

    collectives = "torch.distributed"

    def __init__(self, rank: int, size: int, watch: Watch, checking: bool):
        import torch.distributed as dist

        super().__init__(rank, size)
        self.watch, self.checking, self.mark = watch, checking, torch.zeros((), dtype=torch.int64)
        # torch 2.13 renamed the function and deprecated the only name that 2.11 knows.
        self._all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    def _all(self, x: torch.Tensor) -> torch.Tensor:
        """[size, *x.shape]. Bytes travel, so that no transport need know the dtype or round."""
        x = x.contiguous()
        out = torch.empty(self.size, *x.shape, dtype=x.dtype, device=x.device)
        self.watch.calls += 1
        try:
            self._all_gather(out.view(-1).view(torch.uint8), x.view(-1).view(torch.uint8))
        except RuntimeError:  # gloo says that a connection closed, not whose; the watch knows, and ends this process
            self.watch.blame()
            raise
        return out

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """All contributions travel to all ranks and are added there: size * T * H elements a rank. `Symmetric` does the
        same for few rows in one launch."""
        parts = self._all(x)
        total = parts[0].float()
        for part in parts[1:]:
            total += part
        return total.to(x.dtype)

    def add_norm(self, x: torch.Tensor, part: torch.Tensor | None, norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
        if part is not None:
            part = moe.combine(part)
        if part is None or not norm.fuses(x) or self.size > residual.MAX_PARTS:
            return super().add_norm(x, part, norm)
        return residual.add_rms_norm(x, self._all(part), norm.weight, norm.eps)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._all(x).unbind(0), dim=-1)

    def begin_pass(self) -> None:
        self.watch.calls += 1

    def record(self, x: torch.Tensor) -> None:
        if self.checking:
            self.mark = self.mark * 0x5851F42D4C957F2D + checksum(x)

    def agree(self, when: str, tokens: list[int]) -> None:
        if not self.checking:
            return
        self.record(torch.tensor(tokens, device=self.mark.device))
        marks = self._all(self.mark).tolist()
        self.mark = torch.zeros_like(self.mark)
        others = [r for r, mark in enumerate(marks) if mark != marks[0]]
        if others:
            raise ValueError(
                f"ranks differ, first in {when}: rank {', '.join(map(str, others))} has other bits than rank 0; "
                "compare their GPUs, drivers and weights"
            )


def checksum(x: torch.Tensor) -> torch.Tensor:
    """int64 [] of the bits of x and of their places: the sum, modulo 2^64, of byte i times the odd number 2 i + 1."""
    data = x.detach().contiguous().view(-1).view(torch.uint8).long()
    return (data * (2 * torch.arange(len(data), device=x.device) + 1)).sum()


def world() -> tuple[int, int]:
    """(rank, number of ranks) that the launcher gave this process."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def place(device: str) -> str:
    """The torch device for `device` "auto", "cpu" or "cuda": of several processes on a host each takes its own GPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if world()[1] == 1:
        return device
    if device.startswith("cuda:"):
        raise ValueError(f"device is {device} for all {world()[1]} processes; use cuda, each then takes its own GPU")
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device


def connect(device: str, timeout: float, check: bool, collectives: str = "nccl") -> Ranks:
    """The ranks that the launcher started, on `device` as `place` gave it; one that needs no connection alone.

    `collectives` as in EngineConfig; ValueError where they are to be symmetric and cannot.
    """
    rank, size = world()
    if size == 1:
        return Ranks()
    watch = _start(torch.device(device), rank, size)
    watch.timeout = timeout
    group = _group(torch.device(device), watch, check, collectives)
    group.mark = group.mark.to(device)
    return group


def _group(device: torch.device, watch: Watch, check: bool, collectives: str) -> Group:
    if collectives != "nccl" and (device.type == "cuda" or collectives == "symmetric"):
        from mimo_runtime.symmetric import Symmetric, map_memory

        try:
            return Symmetric(watch, check, map_memory(device, watch))
        except ValueError:
            if collectives == "symmetric":
                raise
    return Group(watch.rank, watch.size, watch, check)


def control_group(device: str) -> tuple[Watch, Any]:
    """The watch of this process, and a gloo group beside the one of the sums, for words between the hosts: one may
    wait in it for as long as a server is idle. A collective of all ranks, `device` as `place` gave it, before they
    load: whoever waits for it inside the store keeps the watch's beats from it."""
    import torch.distributed as dist

    watch = _start(torch.device(device), *world())
    return watch, dist.new_group(backend="gloo", timeout=timedelta(days=3650))


@cache
def _start(device: torch.device, rank: int, size: int) -> Watch:
    """Joins the other processes, once a process."""
    import torch.distributed as dist

    store = _store(rank)
    watch = Watch(store, rank, size)
    watch.meet(START_SECONDS)
    watch.start()
    cuda = device.type == "cuda"
    if cuda:
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast: its order of addition is not ours to fix
        torch.cuda.set_device(device)
    # The watch names who is late; a time-out of the transport would only say that somebody is.
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=size,
        timeout=timedelta(days=1),
        device_id=device if cuda else None,
    )
    atexit.register(_stop, watch)
    return watch


def _store(rank: int) -> Any:
    """The launcher's key-value store: torchrun's own where it runs one, else rank 0 serves it."""
    import torch.distributed as dist

    if "MASTER_ADDR" not in os.environ:
        raise ValueError(
            "WORLD_SIZE is set but MASTER_ADDR is not; start the processes with torchrun, or unset WORLD_SIZE"
        )
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank == 0 and not agent,
        timeout=timedelta(seconds=START_SECONDS),
        wait_for_workers=False,
    )
    return dist.PrefixStore(f"mimo-runtime/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _stop(watch: Watch) -> None:
    import torch.distributed as dist

    watch.end()
    dist.destroy_process_group()
