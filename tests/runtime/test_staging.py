"""What threads read of a release, against the mapped file: directly, and through the buffers of a GPU's copies."""

import contextlib
import gc
import importlib.util
import json
import mmap
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mimo_kernels.moe import Packer
from mimo_qat.checkpoint.reader import Checkpoint
from mimo_runtime import staging
from mimo_runtime.experts import compile_ahead
from mimo_runtime.load import LoadConfig, load_target, open_shards
from mimo_runtime.parallel import Ranks
from mimo_runtime.staging import StagedCheckpoint
from mimo_runtime.synthetic import tensors_of
from tests.runtime.conftest import WIDE

ROOT = Path(__file__).parents[2]


class LazyStream:
    """A stand-in for a CUDA stream that does what it was asked for as late as it may: when someone waits for it."""

    turn = threading.RLock()

    def __init__(self, device=None):
        self.asked, self.done = [], 0

    def ask(self, work):
        self.asked.append(work)

    def run(self, count):
        with self.turn:
            while self.done < count:
                self.done += 1
                self.asked[self.done - 1]()

    def synchronize(self):
        self.run(len(self.asked))

    def wait_stream(self, other):
        count = len(other.asked)
        self.ask(lambda: other.run(count))


class LazyEvent:
    def __init__(self, blocking=False):
        self.wait = None

    def record(self, stream):
        count = len(stream.asked)
        self.wait = lambda: stream.run(count)

    def synchronize(self):
        self.wait()


class LazyGpu:
    """Streams, events and copies of `torch.cuda` as stand-ins; `recorded` counts tensors that a stream was recorded
    for. Memory of the CPU is the device's, and no memory is used again while someone holds it. What a GPU copies lies
    in `pinned` memory, {address: size}, which stays so until it was copied."""

    def __init__(self, monkeypatch):
        self.main, self.threads, self.recorded = LazyStream(), threading.local(), 0
        self.pinned, self.pending, copy = {}, [], torch.Tensor.copy_

        def copy_later(out, source, non_blocking=False):
            def work():
                copy(out, source)
                self.pending.remove(source.data_ptr())

            if non_blocking:
                assert any(begin <= source.data_ptr() < begin + size for begin, size in self.pinned.items())
                self.pending.append(source.data_ptr())
                self.current().ask(torch.inference_mode()(work))
            else:
                copy(out, source)

        def record(tensor, stream):
            assert stream is self.current() is not self.main
            self.recorded += 1

        for name, stand_in in (("Stream", LazyStream), ("Event", LazyEvent), ("stream", self.stream)):
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(torch.cuda, "current_stream", self.current)
        monkeypatch.setattr(torch.cuda, "device", self.on)
        monkeypatch.setattr(torch.Tensor, "copy_", copy_later)
        monkeypatch.setattr(torch.Tensor, "record_stream", record)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(torch.cuda, "check_error", lambda done: None)

    def cudaHostRegister(self, begin, size, flags):
        assert begin % mmap.PAGESIZE == 0 and begin not in self.pinned and self.threads.device is not None
        self.pinned[begin] = size

    def cudaHostUnregister(self, begin):
        assert self.threads.device is not None  # in the context that pinned it
        end = begin + self.pinned.pop(begin)
        assert not any(begin <= address < end for address in self.pending)

    @contextlib.contextmanager
    def on(self, device):
        before, self.threads.device = getattr(self.threads, "device", None), device
        yield
        self.threads.device = before

    def current(self, device=None):
        return getattr(self.threads, "stream", self.main)

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.threads.stream = self.current(), stream
        yield
        self.threads.stream = before


@pytest.fixture(params=["cpu", "gpu"])
def staged(request, release, monkeypatch):
    """(a reader with buffers of 1000 bytes, the stand-ins by which it takes the way of a GPU or None)."""
    monkeypatch.setattr(staging, "SLOT_BYTES", 1000)
    reader, gpu = StagedCheckpoint(release, "cpu"), None
    if request.param == "gpu":
        gpu = LazyGpu(monkeypatch)
        monkeypatch.setattr(reader, "_stream", gpu.current)
    yield reader, gpu
    reader.close()
    assert gpu is None or not gpu.pinned


def arrived(gpu) -> None:
    if gpu is not None:
        gpu.main.synchronize()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    left, right = (t.contiguous().view(torch.uint8) for t in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(left, right)


def test_every_tensor_has_the_bytes_of_the_file(staged, release):
    (reader, gpu), mapped, found = staged, Checkpoint(release), []
    for name in mapped.names:
        found.append((name, reader.raw(name), mapped.raw(name)))
        shape = mapped.spec(name).shape
        if len(shape) == 2:
            rows, columns = (range(n // 3, max(n // 3 + 1, 2 * n // 3)) for n in shape)
            for box in ((rows, columns), (rows, range(shape[1]))):
                found.append((name, reader.box(name, *box), mapped.box(name, *box)))
    arrived(gpu)
    for name, got, expected in found:
        assert same(got, expected), name
    assert reader.box(name, range(0), range(0)).numel() == 0


def test_many_boxes_at_once(staged, release):
    """In any order, whole and cut, side by side."""
    (reader, gpu), mapped = staged, Checkpoint(release)
    names = [n for n in mapped.names if n.endswith("down_proj.weight") and ".experts." in n]
    rows, columns = mapped.spec(names[0]).shape
    boxes = [(n, range(rows), range(columns // 2 * (i % 2), columns)) for i, n in enumerate(names[::-1])]
    expected = torch.cat([mapped.box(*box).contiguous().flatten() for box in boxes])
    out = torch.zeros(len(expected) + 2, dtype=torch.uint8)
    reader.gather(boxes, out[1:-1])
    arrived(gpu)
    assert torch.equal(out[1:-1], expected) and out[0] == out[-1] == 0
    mapped.gather(boxes, out[1:-1])
    assert torch.equal(out[1:-1], expected)


def test_several_gathers_are_begun_before_one_is_waited_for(staged, release, monkeypatch):
    """None is read when all have begun; and they are waited for in whatever order."""
    (reader, gpu), mapped, begun = staged, Checkpoint(release), []
    read, go_on = reader._read_at, threading.Event()
    monkeypatch.setattr(reader, "_read_at", lambda *args: (go_on.wait(30), read(*args)))
    for name in (n for n in mapped.names if n.endswith("qkv_proj.weight")):
        out = torch.zeros(mapped.spec(name).nbytes, dtype=torch.uint8)
        begun.append((name, out, reader.begin([(name, *map(range, mapped.spec(name).shape))], out)))
    go_on.set()
    for _, _, filling in begun[::-1]:
        filling.wait()
    arrived(gpu)
    assert len(begun) > 1
    for name, out, _ in begun:
        assert torch.equal(out, mapped.raw(name).view(torch.uint8).flatten()), name


def test_what_is_read_ahead_is_given_once_and_aligned(release):
    """In whatever order it is asked for; then files are read again."""
    reader, mapped = StagedCheckpoint(release, "cpu"), Checkpoint(release)
    names = [n for n in mapped.names if len(mapped.spec(n).shape) == 1 or n.endswith("mlp.gate.weight")]
    reader.ahead(iter(names))
    reader.ahead([])
    reads = reader.times.reads
    assert 0 < reads < len(names)
    for name in names[::-1]:
        found = reader.raw(name)
        assert same(found, mapped.raw(name)) and found.storage_offset() == 0, name
    assert reader.times.reads == reads
    assert same(reader.raw(names[0]), mapped.raw(names[0])) and reader.times.reads > reads
    reader.close()


def jobs_of(names, mapped, use):
    """Jobs of three experts' tensors each."""
    some = [names[i : i + 9] for i in range(0, len(names), 9)]
    sizes = [sum(mapped.spec(n).nbytes for n in job) for job in some]
    boxes = ([(n, *map(range, mapped.spec(n).shape)) for n in job] for job in some)
    return [(b, size, lambda data, job=job: use(job, data)) for b, size, job in zip(boxes, sizes, some, strict=True)]


def test_what_is_handed_over_has_the_bytes_of_the_file(staged, release):
    """On threads, whose buffers are used again; after what was asked for before, before what is asked for after; and
    the memory is marked."""
    (reader, gpu), mapped, found = staged, Checkpoint(release), {}
    names = [n for n in mapped.names if ".experts." in n]

    def use(job, data):
        assert gpu is None or "begun" in found
        found[job[0]] = torch.cat([mapped.raw(n).view(torch.uint8).flatten() for n in job]), data.clone()

    def asked(job, data):
        return use(job, data) if gpu is None else gpu.current().ask(lambda: use(job, data))

    if gpu is not None:
        gpu.main.ask(lambda: found.update(begun=None))
    jobs = jobs_of(names, mapped, asked)
    reader.hand(jobs[:5]).wait()
    if gpu is not None:
        reader._uses.synchronize()
    reader.hand(jobs[5:]).wait()
    assert gpu is None or (gpu.main.done < len(gpu.main.asked) and gpu.recorded == len(jobs))  # nobody waited
    arrived(gpu)
    found.pop("begun", None)
    assert len(found) == len(jobs) > 5
    for first, (expected, data) in found.items():
        assert torch.equal(data, expected), first


def test_a_job_without_bytes_reads_for_itself(staged, release):
    """As where scales are stored as floats. It may not wait for the thread that it would have to run on."""
    (reader, gpu), mapped, found = staged, Checkpoint(release), []
    names = [n for n in mapped.names if ".experts." in n][:6]
    jobs = [((), 0, lambda _, n=name: found.append((n, reader.raw(n)))) for name in names]
    done = threading.Event()
    threading.Thread(target=lambda: (reader.hand(jobs).wait(), done.set()), daemon=True).start()
    assert done.wait(30)
    arrived(gpu)
    assert sorted(n for n, _ in found) == sorted(names) and all(same(t, mapped.raw(n)) for n, t in found)


def test_what_fails_for_whom_bytes_are_handed_is_told(staged, release):
    def fail(job, data):
        raise ValueError(f"no place for {job[0]}")

    reader, mapped = staged[0], Checkpoint(release)
    with pytest.raises(ValueError, match="no place for model"):
        reader.hand(jobs_of([n for n in mapped.names if ".experts." in n], mapped, fail)).wait()


def test_memory_that_cannot_be_pinned_is_told(release, monkeypatch):
    monkeypatch.setattr(staging, "SLOT_BYTES", 2**21)
    reader, gpu = StagedCheckpoint(release, "cpu"), LazyGpu(monkeypatch)

    def refuse(done):
        raise RuntimeError("CUDA error: out of memory\n...")

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "check_error", refuse)
        patch.setattr(reader, "_stream", gpu.current)
        with pytest.raises(ValueError, match=r"2 MB of the host's memory cannot be pinned .* out of memory"):
            reader.raw(reader.names[0])
    reader.close()
    assert not gpu.pending


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e8m0fnu])
def test_scales_of_other_dtypes_are_packed_as_well(release, dtype):
    """Some of them: the rest stays bytes. Floats that are no powers of two are refused by name."""
    expected = load_target(release, LoadConfig("cpu", experts="packed"))
    mapped = Checkpoint(release)
    name = [n for n in mapped.names if ".experts.2." in n and n.endswith("up_proj.weight_scale")][1]
    path = release / mapped.spec(name).file
    stored = load_file(path)
    scales = stored[name].view(torch.float8_e8m0fnu)
    stored[name] = scales.to(dtype)
    save_file(stored, path)
    found = load_target(release, LoadConfig("cpu", experts="packed"))
    assert all(same(a, b) for a, b in zip(tensors_of(found), tensors_of(expected), strict=True))
    if dtype == torch.float32:
        stored[name][0, 0] *= 1.5
        save_file(stored, path)
        with pytest.raises(ValueError, match=f"{name} holds floats that are no powers of two"):
            load_target(release, LoadConfig("cpu", experts="packed"))


def test_neighbours_in_a_file_are_read_together(release, monkeypatch):
    """All that a file holds, in its order, by as many calls as there are buffers of it, each of them full."""
    reader = StagedCheckpoint(release, "cpu")
    file = next(reader.spec(n).file for n in reader.names if ".experts." in n)
    names = sorted((n for n in reader.names if reader.spec(n).file == file), key=reader._offsets.get)
    boxes = []
    for name in names:
        shape = reader.spec(name).shape
        boxes.append((name, range(torch.Size(shape[:-1]).numel()), range(shape[-1])))
    total = sum(reader.spec(n).nbytes for n in names)
    monkeypatch.setattr(staging, "SLOT_BYTES", total // 3 + 1)
    out = torch.empty(total, dtype=torch.uint8)
    reader.gather(boxes, out)
    assert (reader.times.reads, reader.times.bytes) == (3, total) and len(names) > 3
    assert bytes(out.numpy().data) == (release / file).read_bytes()[-total:]
    reader.close()


def test_the_tensor_that_a_file_ends_in_is_named(release):
    """Also where one call reads several."""
    reader = StagedCheckpoint(release, "cpu")
    file = next(reader.spec(n).file for n in reader.names if ".experts." in n)
    names = sorted((n for n in reader.names if reader.spec(n).file == file), key=reader._offsets.get)
    path, middle = release / file, names[len(names) // 2]
    path.write_bytes(path.read_bytes()[: reader._offsets[middle] + 1])
    boxes = [(n, *map(range, reader.spec(n).shape)) for n in names if len(reader.spec(n).shape) == 2]
    out = torch.empty(sum(reader.spec(b[0]).nbytes for b in boxes), dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"{file} ended inside {middle}: .* fetch it again"):
        reader.gather(boxes, out)
    reader.close()


def test_a_file_that_ends_too_early_is_named(release):
    shards = open_shards(release, LoadConfig("cpu"))
    name = max(shards.checkpoint.names, key=lambda n: shards.checkpoint.spec(n).nbytes)
    file = release / shards.checkpoint.spec(name).file
    file.write_bytes(file.read_bytes()[:20_000])
    with pytest.raises(ValueError, match=f"{file.name} ended inside .* fetch it again"):
        for expected in shards.checkpoint.names:
            shards.checkpoint.raw(expected)
    shards.checkpoint.close()


def test_a_release_is_read_in_inference_mode_as_well(release):
    """Threads do not inherit the mode, and tensors made in it may only be written in it."""
    outside = load_target(release, LoadConfig("cpu", torch.float32, ranks=Ranks(1, 2)))
    with torch.inference_mode():
        inside = load_target(release, LoadConfig("cpu", torch.float32, ranks=Ranks(1, 2)))
    assert all(same(a, b) for a, b in zip(tensors_of(inside), tensors_of(outside), strict=True))


def test_a_failed_read_ends_at_once(release, monkeypatch):
    """What waits to be read is given up, where it would take minutes on a slow disk."""
    monkeypatch.setattr(staging, "SLOT_BYTES", 1000)
    staged = StagedCheckpoint(release, "cpu")
    name = next(n for n in staged.names if n.endswith("lm_head.weight"))
    calls, real = [], staged._read_at

    def slow(view, file, offset):
        calls.append(offset)
        if len(calls) == 1:
            raise OSError("the disk is gone")
        time.sleep(0.05)
        real(view, file, offset)

    monkeypatch.setattr(staged, "_read_at", slow)
    monkeypatch.setattr(staging, "LEAST_BYTES", 1000)
    with pytest.raises(OSError, match="the disk is gone"):
        staged.raw(name)
    staged.close()
    pieces = staged.spec(name).nbytes // 1000
    assert len(calls) < pieces / 2


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_kernel_is_compiled_by_a_pack_like_those_to_come(release, monkeypatch, ranks):
    """On a thread, of an expert as files give it; a folder that is none is for others to refuse."""
    put, seen, failed = Packer.put, [], []

    def noted(self, first, *matrices):
        sizes = [(t.shape[1:], t.stride()) for matrix in matrices for t in matrix]
        seen.append((threading.current_thread().name, self.packed.hidden, self.packed.inter, sizes))
        put(self, first, *matrices)

    monkeypatch.setattr(Packer, "put", noted)
    monkeypatch.setattr(threading, "excepthook", failed.append)
    for folder in (release / "nowhere", release):
        compile_ahead(folder, ranks, "cpu")
        for thread in threading.enumerate():
            if thread.name == "compile":
                thread.join()
    load_target(release, LoadConfig("cpu", experts="packed", ranks=Ranks(0, ranks)))
    assert not failed and seen[0][0] == "compile" and len(seen) > 1
    assert all(kind[1:] == seen[0][1:] and kind[0].startswith("read") for kind in seen[1:])


def test_the_collector_is_back_after_a_refusal(tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        open_shards(tmp_path / "nowhere", LoadConfig("cpu"))
    assert gc.isenabled()


def test_ranks_of_a_host_share_its_cores(monkeypatch):
    monkeypatch.setattr(staging.os, "sched_getaffinity", lambda pid: range(64))
    assert staging.reading_threads() == staging.MOST_THREADS
    for ranks, threads in ((4, 14), (8, 7), (16, 4), (64, 1), (128, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert staging.reading_threads() == threads


@pytest.mark.parametrize("ranks", (1, 2))
def test_bench_of_loading(tiny_config, tmp_path, capsys, monkeypatch, ranks):
    """Writes, reads and loads a tiny release; `--gb` takes as many layers as it needs."""
    spec = importlib.util.spec_from_file_location("bench_load", ROOT / "scripts/bench_load.py")
    bench_load = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench_load)
    config, out = tmp_path / "config.json", tmp_path / "out"
    config.write_text(json.dumps(tiny_config | WIDE))
    monkeypatch.setenv("PYTHONPATH", ":".join(str(ROOT / p) for p in ("", "kernels", "runtime")))
    command = ["bench_load.py", "--model", str(config), "--out", str(out), "--device=cpu", f"--ranks={ranks}"]
    command += ["--gb=0.002", "--turns=2", "--keep", f"--json={tmp_path / 'doc.json'}"] + ["--cold"] * (ranks > 1)
    monkeypatch.setattr("sys.argv", command)
    drop, dropped = bench_load.drop, []
    monkeypatch.setattr(bench_load, "drop", lambda paths: dropped.append(drop(paths)))
    assert bench_load.main() == 0
    assert len(dropped) == 5 * (ranks > 1)
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert found == json.loads((tmp_path / "doc.json").read_text())
    stored = Checkpoint(out)
    stored.verify()
    total = sum(stored.spec(n).nbytes for n in stored.names)
    assert found["source"] == ("disk" if ranks > 1 else "page cache")
    assert stored.format == ("mxfp4", "fp8", 0) and found["release_gb"] == total / 1e9 >= 0.002
    assert found["layers"] == stored.geometry.num_hidden_layers < 4
    assert total / ranks <= 1e9 * found["rank_gb"] < 1.2 * total / ranks
    assert found["ratio"] == pytest.approx(found["load_gb_per_s"] / found["read_gb_per_s"])
    caller, threads = found["parts"]["caller"], found["parts"]["threads"]
    assert set(caller) == {"open", "memory", "plan", "spine", "wait", "drain"} and min(caller.values()) >= 0
    assert sum(caller.values()) <= max(found["load_seconds"]) and threads["reading"] >= 0
    assert threads["bytes"] >= 1e9 * found["rank_gb"]
    assert ranks > 1 or 0 < threads["reads"] < len(stored.names)  # neighbours together
    assert found["ratio_of_reachable"] == found["ratio"] and found["rates"] == {}  # nothing is copied to a device
    with pytest.raises(SystemExit, match="2"):  # a folder that was there before must not be deleted
        bench_load.main()
    assert "give a folder that does not exist" in capsys.readouterr().err and (out / "config.json").is_file()
    assert found["read_gb_per_s"] == pytest.approx(found["release_gb"] / min(found["read_seconds"]))
    assert len(found["read_seconds"]) == 3 and len(found["load_seconds"]) == 2
    assert min(found["load_seconds"]) > 0 and found["peak_host_shards"] >= 0 and found["write_gb_per_s"] > 0
