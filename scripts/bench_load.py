"""python scripts/bench_load.py --model recipes/model/mimo-v2.5.json --gb 60 --out /scratch/load --json load.json

How fast a release is loaded, beside how fast its files can be read at all. Writes a folder in the published layout
(MXFP4 experts, FP8 spine) of random bytes, with as many layers as `--gb` needs; reads all of its files by plain
sequential reads of several threads into reused buffers; and loads the share of rank 0 of `--ranks` in a process of its
own, as the runtime does. The bar: at least 60 % of that reading rate, and at most two shards of host memory on top of
what the process held before. Beside it stands the rate of copies from pinned memory to the GPU: what is loaded can
arrive no faster than the slower of the two, and the ratio to that one is printed too. Reads and loads take turns, a
read first and last: the fastest read counts, and the median of the loads. With `--cold` the files leave the page cache
before every turn, so that the disk is what is read, as after a start of the machine. The last line is one JSON
document; exits with 1 below the bar on a GPU. (A CPU holds the weights themselves and packs them slowly.)

Where the time goes: the caller's seconds are one after the other (proving the headers; memory for the experts and
planning their reads; the spine, while experts are read; waiting for the rest of them; and the GPU's rest at the end).
The threads' are summed over them: reading, waiting for a buffer that is still copied, and of the one that copies:
asking for copies, and asking for packing. Threads that wait for buffers mean that copies are the limit, a caller that
does not wait means that Python is.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from mimo_kernels.moe import Packer
from mimo_qat.checkpoint.layout import Geometry, TensorSpec, files_of, header_bytes, read_json, target_tensors, totals
from mimo_qat.checkpoint.writer import PT_METADATA, write_index
from mimo_qat.provenance import hardware, resident_bytes, versions, write_json
from mimo_runtime.experts import at_once
from mimo_runtime.load import LoadConfig, open_shards, target_of
from mimo_runtime.parallel import Ranks
from mimo_runtime.shards import ExpertRecord
from mimo_runtime.staging import MOST_THREADS, SLOT_BYTES, StagedCheckpoint
from mimo_runtime.synthetic import RandomTensors, allocated, model_config

BUFFER = 2**23
RATE, SHARDS = 0.6, 2.0  # the bar


def layout(config: dict[str, Any]) -> dict[str, TensorSpec]:
    return target_tensors(config, experts="mxfp4", spine="fp8", mtp_layers=0)


def sized(model: str, layers: int | None, gb: float | None) -> dict[str, Any]:
    """config.json of the first `layers` layers, or of the fewest that take `gb` GB, of all where those take less."""
    if layers is not None or gb is None:
        return model_config(model, layers)
    most = model_config(model, None)["num_hidden_layers"]
    sizes = (n for n in range(1, most) if totals(layout(model_config(model, n)))[1] >= gb * 1e9)
    return model_config(model, next(sizes, None))


def write_release(folder: Path, config: dict[str, Any], threads: int) -> dict[str, list[TensorSpec]]:
    """A folder that the loader takes for a release; values repeat, a few megabytes of a kind. {file: its tensors}."""
    specs, tensors = layout(config), RandomTensors("cpu")
    files = files_of(specs)
    need, free = totals(specs)[1], shutil.disk_usage(folder).free
    if need > 0.98 * free:
        raise SystemExit(f"error: {need / 1e9:.1f} GB do not fit {folder}, {free / 1e9:.1f} GB are free; lower --gb")
    kinds = {spec.name: tensors.table_of(spec) for spec in specs.values()}  # one tensor for each kind
    bytes_of = {id(t): bytes(t.view(torch.uint8).numpy().data) for t in kinds.values()}
    long = {key: memoryview(data * -(-BUFFER // len(data))) for key, data in bytes_of.items()}

    def write(file: str) -> None:
        with (folder / file).open("wb", buffering=0) as f:
            f.write(header_bytes(files[file], PT_METADATA))
            for spec in files[file]:
                data = long[id(kinds[spec.name])]
                for done in range(0, spec.nbytes, len(data)):
                    left = data[: spec.nbytes - done]
                    while left:
                        left = left[f.write(left) :]

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, files))
    write_index(folder, specs, {"save_format": "mxfp4"})
    write_json(folder / "config.json", config)
    return files


def read_files(paths: list[Path], threads: int) -> float:
    """Seconds of reading all bytes of the files, each by one thread from begin to end, into one buffer."""

    def read(path: Path) -> None:
        buffer = memoryview(bytearray(BUFFER))
        with path.open("rb", buffering=0) as f:
            while f.readinto(buffer):
                pass

    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, sorted(paths, key=lambda p: -p.stat().st_size)))
    return time.perf_counter() - began


def drop(paths: list[Path]) -> None:
    """Takes files out of the page cache, once they are on the disk."""
    for path in paths:
        with path.open("rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(folder: Path, ranks: int, device: str) -> dict[str, float]:
    """What is not the loader's work, done before it: a context, its libraries and the compiled kernel. {what: rate or
    seconds}: of packing alone, in GB/s of stored bytes, and of copies from pinned memory."""
    (torch.ones(16, 16, device=device) @ torch.ones(16, 16, device=device)).sum().item()
    began, g = time.perf_counter(), Geometry.from_config(read_json(folder / "config.json"))
    record = ExpertRecord(g.hidden_size, g.moe_intermediate_size // ranks)
    many = min(at_once(record), g.n_routed_experts)
    data = torch.zeros(many * record.size, dtype=torch.uint8, device=device)
    matrices, packer = record.gate_up_down(data), Packer(many, record.hidden, record.inter, device)
    packer.put(0, *matrices)
    packer.check()
    found = {"compile_seconds": time.perf_counter() - began}
    size = 2 * SLOT_BYTES  # not the loader's own, which would find these in the allocator's cache
    pinned = [torch.zeros(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    target = torch.empty(size, dtype=torch.uint8, device=device)

    def copy() -> None:
        for staged in pinned:
            target.copy_(staged, non_blocking=True)

    copy_seconds = event_seconds(copy)
    found["copy_gb_per_s"] = len(pinned) * size / copy_seconds / 1e9
    found["pack_gb_per_s"] = len(data) / event_seconds(lambda: packer.put(0, *matrices)) / 1e9
    return found


def event_seconds(work: Callable[[], None], turns: int = 10) -> float:
    """Seconds that a GPU takes for `work`, the mean of some turns after one."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    work()
    begin.record()
    for _ in range(turns):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / turns


def load(folder: Path, ranks: int, device: str) -> dict[str, Any]:
    """The loader's time, the bytes of the share, and by how much the process grew meanwhile at most."""
    rates = warm(folder, ranks, device) if device.startswith("cuda") else {}
    if rates:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    before, began = resident_bytes(), time.perf_counter()
    cfg = LoadConfig(device, experts="packed", linears="kernel", ranks=Ranks(0, ranks))
    shards = open_shards(folder, cfg)
    opened = time.perf_counter() - began
    target = target_of(shards, cfg, ())
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    held = allocated(target)
    checkpoint, share = shards.checkpoint, 0
    assert isinstance(checkpoint, StagedCheckpoint)
    for name, boxes in shards.boxes.items():
        spec = checkpoint.spec(name)
        each = spec.nbytes // torch.Size(spec.shape).numel()
        share += each * sum(len(rows) * len(columns) for rows, columns in boxes) if len(spec.shape) > 1 else spec.nbytes
    checkpoint.close()
    grown = resident_bytes(peak=True) - before - (0 if device.startswith("cuda") else held)
    gpu = torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else None
    parts = {"caller": {"open": opened, **shards.seconds}, "threads": vars(checkpoint.times)}
    found = {"seconds": seconds, "bytes": share, "held": held, "host_growth": max(grown, 0), "gpu_peak": gpu}
    return found | {"parts": parts, "rates": rates}


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="flash", help="flash, pro or a config.json")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--layers", type=int, help="write the first so many layers")
    size.add_argument("--gb", type=float, help="write as many layers as make a release of so many GB; all without both")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the release; deleted at the end")
    parser.add_argument("--keep", action="store_true", help="keep the folder")
    parser.add_argument("--turns", type=int, default=3, help="loads, each in a process of its own")
    parser.add_argument("--cold", action="store_true", help="read from the disk instead of the page cache")
    parser.add_argument("--ranks", type=int, default=1, help="load the share of rank 0 of so many")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, default=min(MOST_THREADS, cores), help="that write, and read the files")
    parser.add_argument("--json", help="file that gets the document too")
    parser.add_argument("--load_alone", action="store_true", help=argparse.SUPPRESS)  # in the process of its own
    options = parser.parse_args()
    if options.load_alone:
        print(json.dumps(load(options.out, options.ranks, options.device)))
        return 0
    if options.turns < 1:
        parser.error("--turns 0 loads nothing; give at least 1")
    config = sized(options.model, options.layers, options.gb)
    if options.out.exists():
        parser.error(f"{options.out} exists, and --out is deleted at the end; give a folder that does not exist")
    options.out.mkdir(parents=True)
    try:
        document = measure(options, config)
    finally:
        if not options.keep:
            shutil.rmtree(options.out)
    if options.json:
        write_json(options.json, document)
    source = f"{document['source']} read at {document['read_gb_per_s']:.2f}"
    seconds = statistics.median_high(document["load_seconds"])
    print(f"{document['release_gb']:.1f} GB: written at {document['write_gb_per_s']:.2f} GB/s, {source}, rank 0 of "
          f"{options.ranks} loaded {document['rank_gb']:.1f} GB in {seconds:.2f} s at "
          f"{document['load_gb_per_s']:.2f} GB/s ({document['ratio']:.0%}), host memory "
          f"{document['peak_host_shards']:.2f} shards")  # fmt: skip
    reachable = f"{document['reachable_gb_per_s']:.2f} GB/s ({document['ratio_of_reachable']:.0%} of it)"
    print(f"reachable, the slower of reading and copies to the device: {reachable}")
    for who, parts in document["parts"].items():
        print(f"{who}: " + ", ".join(f"{n} {x:.3f}" if isinstance(x, float) else f"{n} {x}" for n, x in parts.items()))
    if document["rates"]:
        beyond = (document["peak_gpu_bytes"] - document["held_bytes"]) / 1e6
        rates = ", ".join(f"{n} {x:.2f}" for n, x in document["rates"].items())
        print(f"alone: {rates}; GPU memory beyond the weights {beyond:.0f} MB")
    print(json.dumps(document))
    return 0 if document["ok"] or options.device == "cpu" else 1


def measure(options: argparse.Namespace, config: dict[str, Any]) -> dict[str, Any]:
    """Writes, then reads and loads in turn, and reads once more."""
    began = time.perf_counter()
    files = write_release(options.out, config, options.threads)
    write_seconds = time.perf_counter() - began
    sizes = {file: sum(spec.nbytes for spec in members) for file, members in files.items()}
    total, paths = sum(sizes.values()), [options.out / file for file in files]
    ready = (lambda: drop(paths)) if options.cold else (lambda: None)
    command = [sys.executable, __file__, "--load_alone", f"--ranks={options.ranks}", f"--device={options.device}"]
    reads, loads = [], []

    def read() -> None:
        ready()
        reads.append(read_files(paths, options.threads))

    for _ in range(options.turns):
        read()
        ready()
        done = subprocess.run([*command, f"--out={options.out}"], stdout=subprocess.PIPE, text=True, check=True)
        loads.append(json.loads(done.stdout.strip().splitlines()[-1]))
    read()
    found = sorted(loads, key=lambda load: load["seconds"])[len(loads) // 2]
    rate, read_rate = found["bytes"] / found["seconds"] / 1e9, total / min(reads) / 1e9
    shards = max(load["host_growth"] for load in loads) / max(sizes.values())
    reachable = min(read_rate, found["rates"].get("copy_gb_per_s", read_rate))
    return {
        "ok": rate >= RATE * read_rate and shards <= SHARDS,
        "release_gb": total / 1e9,
        "layers": config["num_hidden_layers"],
        "files": len(files),
        "shard_gb": max(sizes.values()) / 1e9,
        "write_gb_per_s": total / write_seconds / 1e9,
        "source": "disk" if options.cold else "page cache",
        "read_gb_per_s": read_rate,
        "read_seconds": reads,
        "threads": options.threads,
        "ranks": options.ranks,
        "device": options.device,
        "rank_gb": found["bytes"] / 1e9,
        "load_seconds": [load["seconds"] for load in loads],
        "load_gb_per_s": rate,
        "ratio": rate / read_rate,
        "reachable_gb_per_s": reachable,
        "ratio_of_reachable": rate / reachable,
        "parts": found["parts"],
        "rates": found["rates"],
        "peak_host_shards": shards,
        "held_bytes": found["held"],
        "peak_gpu_bytes": found["gpu_peak"],
        "conditions": {"hardware": hardware(), "versions": versions(), "cores": len(os.sched_getaffinity(0))},
    }


if __name__ == "__main__":
    raise SystemExit(main())
