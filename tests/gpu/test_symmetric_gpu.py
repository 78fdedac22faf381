"""Sums over memory that GPUs map of each other: bits, graphs, a rank that stops, and time beside NCCL.

    PYTHONPATH=.:kernels:runtime python -m pytest -q -s -m gpu tests/gpu/test_symmetric_gpu.py

Most tests start this file as one process a GPU (2 to 8 of them); -s shows the times. With one GPU, ranks that share it.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mimo_kernels import allreduce
from mimo_qat.graphs import Graph
from mimo_runtime.parallel import Group, connect, place

ROOT = Path(__file__).parents[2]
GPUS = min(torch.cuda.device_count(), allreduce.MAX_RANKS)
SIZES = sorted({2, max(2, GPUS)} | ({4} if GPUS > 4 else set()))

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 1, reason="no CUDA device")]
several = pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices")


# ---- what a process does


def contributions(seed: int, ranks: int, tokens: int, hidden: int) -> torch.Tensor:
    """[R, T, H], the same on all ranks, of magnitudes so different that the order of addition shows."""
    g = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(ranks, tokens, hidden, generator=g, device="cuda")
    return (x * torch.exp2(torch.randint(-12, 12, x.shape, generator=g, device="cuda").float())).bfloat16()


def differences(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.view(torch.int16) != b.view(torch.int16)).sum()


def bits(ranks) -> dict:
    """1,000 epochs of random sizes without a look at the device in between; hosts and GPUs late at random."""
    draw, own = random.Random(0), random.Random(1 + ranks.rank)
    bad, other = torch.zeros(2, dtype=torch.int64, device="cuda")
    for epoch in range(1000):
        parts = contributions(epoch, ranks.size, draw.randint(1, 16), draw.choice([576, 4096, 6144, 8192]))
        if own.random() < 0.1:
            time.sleep(own.random() * 0.02)
        if own.random() < 0.1:
            torch.cuda._sleep(int(own.random() * 4e6))
        got = ranks.sum(parts[ranks.rank])
        bad += differences(got, allreduce.reference(parts))
        if epoch % 50 == 0:
            other += differences(got, Group.sum(ranks, parts[ranks.rank]))
    return {"differences": int(bad), "from NCCL": int(other)}


def graph(ranks) -> dict:
    """A graph of two plain sums and a fused one, replayed 1,000 times; the host of one rank is late at random."""
    table = torch.stack([contributions(i, ranks.size, 8, 4096) for i in range(32)])
    sums = torch.stack([allreduce.reference(parts) for parts in table])
    mine = table[:, ranks.rank].contiguous()
    weight = contributions(99, 1, 1, 4096)[0, 0]
    step, bad = torch.zeros(2, dtype=torch.int64, device="cuda")

    def at(rows: torch.Tensor, ahead: int) -> torch.Tensor:
        return rows.index_select(0, ((step + ahead) % len(rows))[None])[0]

    def play() -> None:
        step.add_(1)
        for ahead in range(2):
            bad.add_(differences(ranks.sum(at(mine, ahead)), at(sums, ahead)))
        x = at(sums, 7)
        new, _ = allreduce.all_reduce_add_norm(at(mine, 2), x, weight, 1e-5, ranks.channel)
        bad.add_(differences(new, x + at(sums, 2)))

    captured, own = Graph(play, ()), random.Random(ranks.rank)
    for _ in range(1000):
        if own.random() < 0.02:
            time.sleep(own.random() * 0.05)
        captured()
    return {"differences": int(bad), "steps": int(step)}


def norm(ranks) -> dict:
    """The fused form: its residual by bits, its norm against the definition, and both alike on all ranks."""
    bad = apart = other = total = 0
    for seed, hidden in enumerate((512, 4096, 6144, 8192)):
        for tokens in (1, 8, 16):
            parts, x = (contributions(seed + i, n, tokens, hidden) for i, n in ((0, ranks.size), (40, 1)))
            weight = contributions(80, 1, 1, hidden)[0, 0]
            new, normed = allreduce.all_reduce_add_norm(parts[ranks.rank], x[0], weight, 1e-5, ranks.channel)
            want, want_normed = allreduce.reference_add_norm(parts, x[0], weight, 1e-5)
            bad += int(differences(new, want))
            apart += int(((normed.float() - want_normed.float()).abs() > want_normed.float().abs() * 2**-6).sum())
            other += sum(int(differences(normed, part)) for part in ranks.gather(normed).chunk(ranks.size, -1))
            total += normed.numel()
    return {"differences": bad, "far": apart, "ranks differ": other, "elements": total}


def stops(ranks, how: str) -> dict:
    """After 20 sums the last rank dies, sleeps, or goes on as if it had sent its part."""
    for epoch in range(20):
        ranks.sum(contributions(epoch, ranks.size, 8, 4096)[ranks.rank])
    torch.cuda.synchronize()
    # Short waits only now: the first sum compiles, on one rank longer than on another.
    ranks.watch.timeout = 2.0
    ranks.channel = replace(ranks.channel, seconds=2.0)
    print(f"stopped at {time.time()}", flush=True)
    if ranks.rank == ranks.size - 1:
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        until = time.monotonic() + 30
        while time.monotonic() < until:
            time.sleep(0.1)
            ranks.watch.calls += how == "skips"
    ranks.agree("round 1", [1])
    for _ in range(96):
        ranks.sum(torch.ones(8, 4096, dtype=torch.bfloat16, device="cuda"))
    torch.cuda.synchronize()
    ranks.agree("round 2", [1])
    return {"said": "nothing"}


def times(ranks) -> dict:
    """Microseconds of one of 48 sums in a graph, the median of 50 replays."""
    x = contributions(0, ranks.size, 8, 4096)[ranks.rank]
    weight = x[0].clone()

    def separate(part: torch.Tensor) -> torch.Tensor:
        new = part + ranks.sum(part)
        return torch.nn.functional.rms_norm(new.float(), new.shape[-1:], None, 1e-5).to(new.dtype) * weight

    ways = {
        "NCCL all_gather + additions": lambda: Group.sum(ranks, x),
        "symmetric": lambda: ranks.sum(x),
        "symmetric, 1 row": lambda: ranks.sum(x[:1]),
        "symmetric, then residual and norm": lambda: separate(x),
        "symmetric with residual and norm": lambda: allreduce.all_reduce_add_norm(x, x, weight, 1e-5, ranks.channel),
    }
    found = {}
    for name, way in ways.items():

        def many(way=way) -> None:
            for _ in range(48):
                way()

        captured, marks = Graph(many, ()), []
        for _ in range(50):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            captured()
            last.record()
            marks.append((first, last))
        torch.cuda.synchronize()
        found[name] = sorted(first.elapsed_time(last) for first, last in marks)[25] * 1000 / 48
    return found


JOBS = {"bits": bits, "graph": graph, "norm": norm, "times": times}


def main() -> None:
    job, _, how = sys.argv[1].partition(" ")
    ranks = connect(place("cuda"), 20.0, False, "symmetric")
    assert ranks.collectives == "symmetric"
    try:
        found = stops(ranks, how) if job == "stops" else JOBS[job](ranks)
        torch.cuda.synchronize()
        ranks.agree(job, [])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    print(json.dumps(found), flush=True)


# ---- ranks that share one GPU


def channels(ranks: int, seconds: float) -> tuple[list[allreduce.Channel], torch.Tensor]:
    """One on each of `ranks` buffers, and the buffers, which have to live as long."""
    elements = allreduce.capacity(8192)
    words = allreduce.buffer_words(ranks, elements)
    buffers = torch.zeros(ranks, words, dtype=torch.int64, device="cuda")
    addresses = [buffer.data_ptr() for buffer in buffers]
    ends = [allreduce.open_channel(r, addresses, elements, seconds, "cuda") for r in range(ranks)]
    torch.cuda.synchronize()
    return ends, buffers


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("hidden", [576, 4096, 6144, 8192])
def test_ranks_in_turns(ranks, hidden):
    """All send before one receives: the compiled kernels by themselves."""
    from mimo_kernels import allreduce_triton

    ends, _buffers = channels(ranks, 2.0)
    for epoch, tokens in enumerate((1, 16, 3, 8, 1)):
        parts = contributions(epoch, ranks, tokens, hidden)
        for phase in (1, 2):
            sums = [allreduce_triton.all_reduce(x, end, phase) for x, end in zip(parts, ends, strict=True)]
        assert not sum(int(differences(got, allreduce.reference(parts))) for got in sums)
        if hidden % 512:
            continue
        x, weight = contributions(epoch + 50, 1, tokens, hidden)[0], contributions(90, 1, 1, hidden)[0, 0]
        for phase in (1, 2):
            fused = [
                allreduce_triton.all_reduce_add_norm(part, x, weight, 1e-5, end, phase)
                for part, end in zip(parts, ends, strict=True)
            ]
        new, normed = allreduce.reference_add_norm(parts, x, weight, 1e-5)
        for got, got_normed in fused:
            assert not differences(got, new) and not differences(got_normed, fused[0][1])
            torch.testing.assert_close(got_normed.float(), normed.float(), rtol=2**-6, atol=0)
    assert not any(int(end.failed) or int(end.failed_host) for end in ends)


def memory_on(streams: list[torch.cuda.Stream], *shape: int) -> None:
    """Gives each stream room for two tensors: to ask for it waits for what runs, which would wait for who asks."""
    for stream in streams:
        with torch.cuda.stream(stream):
            _room = [torch.empty(*shape, dtype=torch.bfloat16, device="cuda") for _ in range(2)]


def test_ranks_at_once_on_streams_of_one_gpu():
    """They really wait for each other; all of their programs fit onto the GPU together."""
    (ends, _buffers), streams = channels(4, 20.0), [torch.cuda.Stream() for _ in range(4)]
    bad = torch.zeros(4, dtype=torch.int64, device="cuda")
    memory_on(streams, 16, 4096)
    for epoch in range(200):
        parts = contributions(epoch, 4, 1 + epoch % 16, 4096)
        expected = allreduce.reference(parts)
        torch.cuda.synchronize()
        sums: dict[int, torch.Tensor] = {}
        for r in torch.randperm(4, generator=torch.Generator().manual_seed(epoch)).tolist():
            with torch.cuda.stream(streams[r]):
                sums[r] = allreduce.all_reduce(parts[r], ends[r])
        torch.cuda.synchronize()
        for r, found in sums.items():
            bad[r] += differences(found, expected)
    assert bad.tolist() == [0] * 4 and not any(int(end.failed) for end in ends)


@pytest.mark.parametrize("hidden", [4096, 6144])
@pytest.mark.parametrize("experts", [0, 8])
def test_fused_ranks_at_once_on_streams_of_one_gpu(hidden, experts):
    """The public fused form, by turns with Triton's over the same buffers: sums of the same bits, norms of the same
    bits on all ranks. Of contributions, or of the float32 parts of experts."""
    from mimo_kernels import allreduce_triton

    ranks = 4
    (ends, _buffers), streams = channels(ranks, 20.0), [torch.cuda.Stream() for _ in range(ranks)]
    memory_on(streams, 16, hidden)
    spare, _more_buffers = channels(ranks, 1e-3)
    row = torch.zeros(1, hidden, dtype=torch.bfloat16, device="cuda")
    part = torch.zeros(experts, 1, hidden, device="cuda") if experts else row
    for form in (allreduce.all_reduce_add_norm, allreduce_triton.all_reduce_add_norm):
        form(part, row, row[0], 1e-5, spare[0])  # compiles
    torch.cuda.synchronize()
    for epoch in range(100):
        tokens = 1 + epoch % 16
        x, weight = contributions(epoch + 50, 1, tokens, hidden)[0], contributions(90, 1, 1, hidden)[0, 0]
        parts = contributions(epoch, ranks * max(experts, 1), tokens, hidden)
        if experts:
            sums = parts.float().unflatten(0, (ranks, experts)).mul(1.0009765625)
            mine = list(sums.transpose(1, 2).contiguous().transpose(1, 2))
            total = sums[:, 0]
            for part in sums.unbind(1)[1:]:
                total = total + part
            new, norm = allreduce.reference_add_norm(total.bfloat16(), x, weight, 1e-5)
        else:
            mine = list(parts)
            new, norm = allreduce.reference_add_norm(parts, x, weight, 1e-5)
        form = allreduce_triton.all_reduce_add_norm if epoch % 3 == 2 else allreduce.all_reduce_add_norm
        torch.cuda.synchronize()
        results: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for r in torch.randperm(ranks, generator=torch.Generator().manual_seed(epoch)).tolist():
            with torch.cuda.stream(streams[r]):
                results[r] = form(mine[r], x, weight, 1e-5, ends[r])
        torch.cuda.synchronize()
        for got, got_normed in results.values():
            assert not differences(got, new) and not differences(got_normed, results[0][1]), epoch
            torch.testing.assert_close(got_normed.float(), norm.float(), rtol=2**-6, atol=0)
    assert not any(int(end.failed) or int(end.failed_host) for end in ends)


@pytest.mark.parametrize("fused", [False, True])
def test_a_wait_in_vain_ends_and_the_next_ones_pass(fused):
    x = contributions(0, 3, 8, 4096)

    def add(part: torch.Tensor, end: allreduce.Channel) -> None:
        if fused:
            allreduce.all_reduce_add_norm(part, x[2], x[2, 0], 1e-5, end)
        else:
            allreduce.all_reduce(part, end)

    for seconds in (1e-3, 0.5):  # the first call compiles
        ends, _buffers = channels(3, seconds)
        add(x[1], ends[1])
        torch.cuda.synchronize()
        began = time.monotonic()
        for _ in range(96):
            add(x[0], ends[0])
        torch.cuda.synchronize()
        took = time.monotonic() - began
        assert int(ends[0].failed_host) == int(ends[0].failed) == 3
    assert 0.4 < took < 2


# ---- what pytest does


def launch(job: str, size: int) -> tuple[list[int], list[str], str, float]:
    """(exit codes, what each printed, standard error of all, time when the last one ended)"""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "runtime"), os.environ.get("PYTHONPATH", "")]
    shared = {"PYTHONPATH": os.pathsep.join(paths), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "4"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    running = [
        subprocess.Popen(
            [sys.executable, __file__, job],
            env=os.environ | shared | {"RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(size)
    ]
    try:
        said = [p.communicate(timeout=180) for p in running]
    finally:
        for p in running:
            p.kill()
    return [p.returncode for p in running], [out for out, _ in said], "".join(err for _, err in said), time.time()


def found(job: str, size: int) -> list[dict]:
    codes, said, errors, _ = launch(job, size)
    assert codes == [0] * size, errors[-6000:]
    return [json.loads(out.strip().splitlines()[-1]) for out in said]


@several
@pytest.mark.parametrize("size", SIZES)
def test_bits_of_a_thousand_epochs(size):
    assert found("bits", size) == [{"differences": 0, "from NCCL": 0}] * size


@several
@pytest.mark.parametrize("size", SIZES)
def test_a_graph_replayed_a_thousand_times(size):
    assert found("graph", size) == [{"differences": 0, "steps": 1002}] * size


@several
@pytest.mark.parametrize("size", SIZES)
def test_the_fused_form(size):
    for report in found("norm", size):
        assert report["differences"] == report["ranks differ"] == report["far"] == 0 and report["elements"] > 0


@several
@pytest.mark.parametrize("how", ["dies", "sleeps", "skips"])
def test_a_rank_that_stops_is_an_error_by_name(how):
    """Within 10 s, where waits end after 2 s; the last rank is the one to name."""
    codes, said, errors, ended = launch(f"stops {how}", 2)
    stopped = max(float(line.split()[-1]) for out in said for line in out.splitlines() if line.startswith("stopped"))
    assert codes[0] == 1 and "error: rank 1 of 2" in errors, errors[-6000:]
    # Rank 0 ends first; one that skips finds out afterwards that the store is gone.
    assert ended - stopped < (15 if how == "skips" else 10), errors[-6000:]


@several
def test_times_beside_nccl():
    for size in SIZES:
        reports = found("times", size)
        print(f"\n8 rows of 4096 (64 KB), {size} ranks, {torch.cuda.get_device_name()}, us a sum in a graph of 48")
        for name in reports[0]:
            print(f"  {name:36}{reports[0][name]:8.2f}")


if __name__ == "__main__":
    main()
