"""Sums of a decode step over memory that the GPUs of one host map of each other, instead of NCCL.

A step of 48 layers has 96 sums of a few rows, and what they cost is latency. `mimo_kernels.allreduce` does one in one
launch, with the bits of `Group.sum`. Prefills, gathers and other dtypes than BF16 still go through NCCL.
"""

import os
import socket
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # nothing here uses it; read when memory is mapped

import torch

from mimo_kernels import allreduce, moe
from mimo_runtime.norms import Norm, add_norm
from mimo_runtime.parallel import START_SECONDS, Group
from mimo_runtime.watch import Watch

ELEMENTS = allreduce.capacity(allreduce.WIDEST_NORM)  # room for the widest rows; 8 MiB for 8 ranks


class Memory(NamedTuple):
    """A receive buffer on every rank: this rank's, what keeps those of the others mapped, and where all of them are."""

    buffer: torch.Tensor
    handle: Any
    addresses: list[int]


class Symmetric(Group):
    """A rank whose small sums go through a channel of `mimo_kernels.allreduce`."""

    collectives = "symmetric"

    def __init__(self, watch: Watch, checking: bool, memory: Memory):
        super().__init__(watch.rank, watch.size, watch, checking)
        self.memory = memory
        device = memory.buffer.device
        self.channel = allreduce.open_channel(watch.rank, memory.addresses, ELEMENTS, watch.timeout, device)
        self._failed = self.channel.failed_host.numpy()  # a look costs no launch and no wait

    def _small(self, x: torch.Tensor, multiple: int) -> bool:
        """Whether x [T, H] is the channel's work, where H has to be such a multiple."""
        few = len(x) <= allreduce.MAX_TOKENS and x.numel() <= ELEMENTS
        return few and x.dtype == torch.bfloat16 and x.shape[1] % multiple == 0

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        if not self._small(x, allreduce.PACKET):
            return super().sum(x)
        self._check()
        self.watch.calls += 1
        return allreduce.all_reduce(x.contiguous(), self.channel)

    def add_norm(self, x: torch.Tensor, part: torch.Tensor | None, norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
        together = norm.fuses(x) and self._small(x, allreduce.PACKET * allreduce.CELL)
        if part is None or not together or x.shape[1] > allreduce.WIDEST_NORM:
            return add_norm(x, None if part is None else self.sum(moe.combine(part)), norm)
        self._check()
        self.watch.calls += 1
        part = part if part.ndim == 3 else part.contiguous()
        return allreduce.all_reduce_add_norm(part, x.contiguous(), norm.weight, norm.eps, self.channel)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        self._check()
        return super().gather(x)

    def begin_pass(self) -> None:
        self._check()
        super().begin_pass()

    def agree(self, when: str, tokens: list[int]) -> None:
        """Comes after the host has read what a round did, so that a sum which failed in it is known by then."""
        self._check()
        super().agree(when, tokens)

    def _check(self) -> None:
        """ValueError if a sum has waited in vain. The watch ends the process before that, if it knows whose fault."""
        if late := int(self._failed[0]):
            self.watch.blame()
            raise ValueError(
                f"rank {late - 1} of {self.size} did not send its part of a sum within {self.channel.seconds:.0f} s; "
                "look at its log, or raise rank_timeout if it is only slow"
            )


def here(device: torch.device) -> str:
    """Words that say on which host and device this rank is."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()}/{boot.read_text().strip() if boot.exists() else ''} {device.index}"


def obstacle(device: torch.device, places: list[str]) -> str | None:
    """Why the rank on `device` cannot map the memory of the ranks at `places` (each as `here` says), or None."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] < 9:
        return "needs NVIDIA GPUs of compute capability 9 or more"
    if len(places) > allreduce.MAX_RANKS:
        return f"is for at most {allreduce.MAX_RANKS} ranks"
    hosts, indices = zip(*(place.split(" ") for place in places), strict=True)
    if len(set(hosts)) > 1:
        return "needs all ranks on one host"
    others = [int(i) for i in indices if int(i) != device.index]
    if len(others) != len(places) - 1 or max(others) >= torch.cuda.device_count():
        return "needs a GPU for each rank, all of them visible to all ranks"
    deaf = [i for i in others if not torch.cuda.can_device_access_peer(device, i)]
    return f"needs peer access, which GPU {device.index} does not have to GPU {deaf[0]}" if deaf else None


def exchange(watch: Watch, name: str, word: str) -> list[str]:
    """The words of all ranks, through the launcher's store; returns when all have said theirs.

    Looks again and again, because a client that waits inside the store would keep the watch's beats from it.
    """
    turn = watch.store.add(f"{name}/{watch.rank}", 1)
    watch.store.set(f"{name}/{turn}/{watch.rank}", word)
    keys = [f"{name}/{turn}/{r}" for r in range(watch.size)]
    until = time.monotonic() + START_SECONDS
    while not watch.store.check(keys):
        if time.monotonic() > until:
            raise ValueError(f"not all of {watch.size} ranks have come to {name} in {START_SECONDS} s; see their logs")
        time.sleep(0.01)
    return [value.decode() for value in watch.store.multi_get(keys)]


def map_memory(device: torch.device, watch: Watch) -> Memory:
    """A zeroed receive buffer on every rank, mapped by all.

    A collective of all ranks. ValueError, on all of them, with the reason of the first that cannot.
    """
    why = obstacle(device, exchange(watch, "place", here(device)))
    _none(exchange(watch, "reach", why or ""))
    offset, bases, why = 0, [0] * watch.size, ""
    buffer, handle = torch.empty(0), None
    try:
        import torch.distributed as dist
        import torch.distributed._symmetric_memory as symm_mem

        words = allreduce.buffer_words(watch.size, ELEMENTS)
        buffer = symm_mem.empty(words, dtype=torch.int64, device=device)
        assert dist.group.WORLD is not None
        handle = symm_mem.rendezvous(buffer, dist.group.WORLD)
        bases = handle.buffer_ptrs
        # The tensor may lie anywhere in an allocation of torch's pool, of which the handle knows the base.
        offset = buffer.data_ptr() - bases[watch.rank]
        buffer.zero_()
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        why = f"failed: {str(error).splitlines()[0]}"
    # Nobody sends before every buffer is zero: these words are the barrier, too.
    said = exchange(watch, "mapped", why or str(offset))
    _none([word if not word.isdigit() else "" for word in said])
    return Memory(buffer, handle, [base + int(word) for base, word in zip(bases, said, strict=True)])


def _none(reasons: list[str]) -> None:
    for rank, why in enumerate(reasons):
        if why:
            raise ValueError(f"collectives symmetric {why} (rank {rank}); use nccl")
