"""The files of a conversion, each written by one process, several at a time.

A worker holds the tensors of one module; what it needs to know of the source travels with its job, so that it reads
no header and no index. It ends when its parent does: the next run finds the journals of a killed one free.
"""

import errno
import os
import signal
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from tqdm import tqdm

from mimo_kernels.mxfp4 import Rule
from mimo_qat.checkpoint.journal import Journal
from mimo_qat.checkpoint.layout import TensorSpec, header_bytes
from mimo_qat.checkpoint.writer import PT_METADATA, FileWriter
from mimo_qat.dialects import Step, run_step
from mimo_qat.provenance import resident_bytes
from mimo_qat.sources import Source

MAX_WORKERS = 4
MAX_THREADS = 4  # of one process: 32 took 80 s over what 4 do in 7, since every small operation ends in a barrier
SMALL_BYTES = 2**28  # below this a second process takes longer to start than the work
GO_ON = "run the same command again: it goes on where it stopped"


@dataclass
class Job:
    """One file to write."""

    path: Path
    journal: Path
    specs: list[TensorSpec]
    steps: list[Step]
    source: Source
    rule: Rule
    device: str

    @property
    def nbytes(self) -> int:
        """Payload of the file."""
        return sum(s.nbytes for s in self.specs)

    def record(self) -> Journal:
        """What was written down about the finished file."""
        return Journal(self.journal, header_bytes(self.specs, PT_METADATA))


class Stopped(Exception):
    """The run ended while this worker was busy."""


def write_file(job: Job, progress: Callable[[int], bool]) -> None:
    """Writes the file of a job, or what is left of it. `progress(bytes)` returns whether to go on.

    ValueError for everything that a disk or a source can do wrong; the unfinished file stays and can be gone on with.
    """
    try:
        _write_file(job, progress)
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ValueError(f"{job.path}: {reason}; make room there, and {GO_ON}") from None
        raise ValueError(f"{error.filename or job.path}: {reason}; repair or fetch it, and {GO_ON}") from None
    finally:
        job.source.checkpoint.close()


def _write_file(job: Job, progress: Callable[[int], bool]) -> None:
    files = {s.file for s in job.source.specs.values()}
    writer = FileWriter(job.path, job.specs, journal=job.journal)
    if job.record().sha256 and writer.is_complete():
        progress(job.nbytes)
        return
    job.source.unchanged(files)
    dtypes = {s.name: s.dtype for s in job.specs}
    with writer:
        left = writer.left
        progress(sum(s.nbytes for s in job.specs if s.name not in left))
        for step in job.steps:
            if not left & set(step.out):
                continue
            changed: int | None = None
            for name, part, count in run_step(step, job.source, job.rule, job.device, dtypes):
                writer.append(name, part)
                changed = changed if count is None else (changed or 0) + count
                if not progress(part.nbytes):
                    raise Stopped
            writer.commit(changed)
        job.source.unchanged(files)


# ---- processes

_shared: Any = None  # (bytes written, stop) of the worker's parent, set when the worker starts


def _start(counter: Any, stop: Any, parent: int, threads: int) -> None:
    global _shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
    Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    _shared = (counter, stop)


def _end_with(parent: int) -> None:
    """Ends this process when its parent is gone, also where it waits for a job that nobody will send."""
    process = parent_process()
    if process is not None:
        wait_for([process.sentinel])
    os._exit(os.getppid() == parent)


def _work(job: Job) -> tuple[int, int]:
    """Writes a file; returns (process, its peak memory so far)."""
    counter, stop = _shared

    def progress(size: int) -> bool:
        with counter.get_lock():
            counter.value += size
        return not stop.value

    with torch.no_grad():
        write_file(job, progress)
    return os.getpid(), resident_bytes(peak=True)


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(jobs: list[Job], workers: int | None) -> list[int]:
    """Writes the files of all jobs; returns the peak memory of each process besides this one.

    ValueError of the first that fails; the others stop after their tensor.
    """
    total, cores = sum(job.nbytes for job in jobs), usable_cores()
    if workers is None:
        workers = 1 if total < SMALL_BYTES else min(MAX_WORKERS, cores)
    workers = max(1, min(workers, len(jobs)))
    threads = max(1, min(MAX_THREADS, cores // workers))
    with tqdm(total=total, unit="B", unit_scale=True, desc="convert", disable=None, smoothing=0.05) as bar:
        if workers == 1:
            before = torch.get_num_threads()
            torch.set_num_threads(min(before, threads))
            try:
                for job in jobs:
                    write_file(job, lambda size: bar.update(size) or True)
            finally:
                torch.set_num_threads(before)
            return []
        return _run_pool(sorted(jobs, key=lambda j: -j.nbytes), workers, threads, bar)


def _run_pool(jobs: list[Job], workers: int, threads: int, bar: Any) -> list[int]:
    context = get_context("spawn")  # torch's threads and CUDA do not survive a fork
    counter, stop = context.Value("q", 0), context.Value("b", 0)
    arguments = (counter, stop, os.getpid(), threads)
    peaks: dict[int, int] = {}
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=arguments) as pool:
        waiting: set[Future] = {pool.submit(_work, job) for job in jobs}
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_EXCEPTION)
                bar.update(counter.value - bar.n)
                for future in done:
                    process, peak = future.result()
                    peaks[process] = max(peak, peaks.get(process, 0))
        except BrokenProcessPool:
            raise ValueError(
                f"a worker was killed, which the system does when memory runs out; give fewer --workers, or {GO_ON}"
            ) from None
        finally:
            stop.value = 1
            pool.shutdown(cancel_futures=True)
    return list(peaks.values())
