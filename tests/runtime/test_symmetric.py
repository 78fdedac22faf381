"""Who may use symmetric sums, how ranks agree on it, and what becomes of a sum that waited in vain; without GPUs."""

import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from mimo_kernels import allreduce
from mimo_runtime import symmetric
from mimo_runtime.norms import Norm
from mimo_runtime.parallel import Group, _group
from mimo_runtime.symmetric import Memory, Symmetric, exchange, here, map_memory, obstacle
from mimo_runtime.watch import Watch


class Blamed(Watch):
    """A watch that does not run and notes when it is asked."""

    def __init__(self, store=None, rank=0, size=2):
        super().__init__(store, rank, size)
        self.blamed = 0

    def blame(self) -> None:
        self.blamed += 1


@pytest.fixture
def gpus(monkeypatch):
    """Four Hopper GPUs, of which 3 reaches no other."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda device, peer: 3 not in (device.index, peer))


def test_who_may(gpus, monkeypatch):
    device = torch.device("cuda", 1)
    assert obstacle(device, ["a 0", "a 1"]) is None and obstacle(device, ["a 2", "a 0", "a 1"]) is None
    assert "GPU 1 does not have to GPU 3" in obstacle(device, ["a 0", "a 1", "a 3"])
    assert "on one host" in obstacle(device, ["a 0", "b 1"])
    assert "a GPU for each rank" in obstacle(device, ["a 1", "a 1"])
    assert "visible to all ranks" in obstacle(device, ["a 1", "a 4"])
    assert "at most 8 ranks" in obstacle(device, [f"a {i}" for i in range(9)])
    assert "needs NVIDIA GPUs" in obstacle(torch.device("cpu"), ["a None", "a None"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "capability 9" in obstacle(device, ["a 0", "a 1"])
    assert here(device).endswith(" 1") and len(here(device).split(" ")) == 2


def together(size, call):
    """call(watch) on so many threads with one store; what each returned or raised."""
    store, said = dist.HashStore(), [None] * size

    def run(rank):
        try:
            said[rank] = call(Blamed(store, rank, size))
        except ValueError as error:
            said[rank] = str(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return said


def test_words_are_exchanged_again_and_again():
    def call(watch):
        return [exchange(watch, "name", f"{turn} of {watch.rank}") for turn in range(3)]

    assert together(3, call) == [[[f"{turn} of {r}" for r in range(3)] for turn in range(3)]] * 3


def test_all_ranks_refuse_alike(monkeypatch):
    cpu = torch.device("cpu")
    said = together(2, lambda watch: map_memory(cpu, watch))
    assert said == ["collectives symmetric needs NVIDIA GPUs of compute capability 9 or more (rank 0); use nccl"] * 2
    said = together(2, lambda watch: _group(cpu, watch, False, "symmetric"))
    assert len(set(said)) == 1 and said[0].endswith("use nccl")
    assert {type(g) for g in together(2, lambda watch: _group(cpu, watch, False, "auto"))} == {Group}
    # One that has the trouble alone: the others hear of it.
    monkeypatch.setattr(symmetric, "obstacle", lambda device, places: None)
    monkeypatch.setattr(symmetric, "here", lambda device: "a 0")
    broken = threading.local()

    def rendezvous(watch):
        broken.rank = watch.rank
        return map_memory(cpu, watch)

    def empty(*_, **__):
        if broken.rank == 1:
            raise RuntimeError("no memory\nand a long story")
        return torch.ones(4, dtype=torch.int64)

    class Handle:
        def __init__(self, tensor):
            self.buffer_ptrs = [tensor.data_ptr() - 64] * 2

    import torch.distributed._symmetric_memory as symm_mem

    monkeypatch.setattr(symm_mem, "empty", empty)
    monkeypatch.setattr(symm_mem, "rendezvous", lambda tensor, group: Handle(tensor))
    monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD="group"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert together(2, rendezvous) == ["collectives symmetric failed: no memory (rank 1); use nccl"] * 2
    monkeypatch.setattr(symm_mem, "empty", lambda *_, **__: torch.ones(4, dtype=torch.int64))
    for memory in together(2, rendezvous):  # as if both ranks' buffers were at one base, 64 bytes on
        assert memory.addresses == [memory.buffer.data_ptr()] * 2 and not memory.buffer.any()


def ranks(watch, checking=False):
    return Symmetric(watch, checking, Memory(torch.empty(0), None, [0, 0]))


def test_small_sums_go_through_the_channel(monkeypatch):
    taken = []
    monkeypatch.setattr(Group, "sum", lambda self, x: taken.append("group"))
    monkeypatch.setattr(allreduce, "all_reduce", lambda x, channel: taken.append(channel))
    r = ranks(Blamed())
    x = torch.zeros(16, 64, dtype=torch.bfloat16)
    r.sum(x)
    assert taken == [r.channel] and r.watch.calls == 1
    for other in (torch.cat((x, x)), x.float(), x[:, :6], torch.zeros(16, 8256, dtype=torch.bfloat16)):
        r.sum(other)
    assert taken[1:] == ["group"] * 4
    assert r.channel.seconds == r.watch.timeout == 20 and r.collectives == "symmetric"


def test_a_sum_with_the_norm_behind_it_is_one_launch_where_the_shape_allows(monkeypatch):
    taken = []
    monkeypatch.setattr(allreduce, "all_reduce", lambda x, channel: taken.append("sum") or x)
    monkeypatch.setattr(allreduce, "all_reduce_add_norm", lambda *given: taken.append(given) or (0, 0))
    r, weight = ranks(Blamed()), torch.ones(512, dtype=torch.bfloat16)
    x, part = torch.zeros(2, 8, 512, dtype=torch.bfloat16)
    r.add_norm(x, part, Norm(weight, 1e-5, fused=True))
    assert r.watch.calls == 1 and taken[0][2:] == (weight, 1e-5, r.channel)
    assert torch.equal(taken[0][0], part) and torch.equal(taken[0][1], x)
    for width, fused in ((512, False), (96, True)):
        new, _ = r.add_norm(x[:, :width], part[:, :width], Norm(weight[:width], 1e-5, fused=fused))
        assert taken.pop() == "sum" and new.shape == (8, width)
    r.add_norm(x, None, Norm(weight, 1e-5, fused=True))
    assert len(taken) == 1


def test_a_sum_that_waited_in_vain_is_an_error_by_name():
    r = ranks(Blamed())
    r.agree("round 1", [1])
    r.begin_pass()
    r.channel.failed_host[0] = 2
    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    calls = [lambda: r.agree("round 2", [1]), r.begin_pass, lambda: r.sum(x), lambda: r.gather(x)]
    for i, call in enumerate(calls):
        with pytest.raises(ValueError, match="rank 1 of 2 did not send its part of a sum within 20 s; look at its log"):
            call()
        assert r.watch.blamed == i + 1
