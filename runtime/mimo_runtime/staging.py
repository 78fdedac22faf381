"""Stored tensors on a device, as fast as the files can be read and with some hundred megabytes of the host's memory.

A mapped file is read by one thread, a page at a time, counts as memory of this process, and reaches a GPU through a
buffer of the driver. Here threads read plainly. For a GPU they read into pinned buffers, which each takes from a queue;
one more thread asks for the copies, since the driver takes one at a time anyway, and gives a buffer back when its copy
is under way; the buffer taken is the one whose copy began first. Of eight cores and more an eighth is left for that
thread and the caller.

`gather` copies in the order of the stream that asked for it, so what follows on that stream needs no wait. What `hand`
reads meets on the device, where it is used when the last part of it is on its way. All its copies are on one stream,
which runs them back to back, and all its uses on another: the caller is free for other work, and copies do not wait for
kernels. A buffer on the device belongs to the stream of the copies and goes back to torch's allocator with a mark of
the stream of its use, so it is filled again when it was used.

Python runs one thread at a time, and each call that lets go of it waits in a queue to get it back. A release holds
26,000 tensors, so the unit of work is not a tensor but a buffer: what lies side by side in a file is read by one call,
what goes side by side is copied by one, and what a kernel takes is several copies.
"""

import contextlib
import itertools
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import torch

from mimo_qat.checkpoint.folder import TORCH_DTYPES
from mimo_qat.checkpoint.layout import DTYPE_BYTES
from mimo_qat.checkpoint.reader import Box, Checkpoint, Filling, Job
from mimo_runtime.parallel import world

SLOT_BYTES = 2**25
LEAST_BYTES = 2**20  # less is not worth a thread's turn
MOST_THREADS = 16  # more do not read faster
_SLOTS_A_THREAD = 2  # one is read while another is copied


def reading_threads() -> int:
    """Threads of this process that read at once: ranks of one host share its cores, and some are for the
    caller and for the thread that copies."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", world()[1]))
    cores = max(1, len(os.sched_getaffinity(0)) // ranks)
    return min(MOST_THREADS, cores - cores // 8)


class Piece(NamedTuple):
    """`rows` rows of `width` bytes from `offset` of a file on, of which the bytes `left` to `right` are wanted: where
    that is not all of them, whole rows of a matrix; else any bytes, as one row."""

    file: str
    offset: int
    rows: int
    width: int
    left: int
    right: int

    @property
    def size(self) -> int:
        return self.rows * (self.right - self.left)


@dataclass
class Times:
    """Seconds of the threads, summed over them, and what they did; `waiting` is the caller's own."""

    reading: float = 0.0
    """in calls that read, and in cutting columns out of rows"""
    pinning: float = 0.0
    """pinning buffers"""
    slots: float = 0.0
    """waiting for a pinned buffer to be copied: above zero where copies, not files, are the limit"""
    copying: float = 0.0
    """asking for copies, which one thread does"""
    using: float = 0.0
    """in what `hand` calls: on a GPU that thread's too, asking for what packs experts"""
    waiting: float = 0.0
    """of the caller, until what it asked for was read"""
    reads: int = 0
    bytes: int = 0

    def add(self, other: "Times") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


Result = Times | Future[Times]  # of a task; the future is of what goes on with what it has read


class _Slot:
    """A buffer of the host that a GPU copies from once it is pinned, and the event after its last copy.

    The driver makes pinned memory a page at a time, for one thread at a time, and under the lock that everybody needs
    who asks for memory. So the pages come with the first bytes that are read into them, for all threads at once, and
    are pinned when they are there.
    """

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8)
        self.event: torch.cuda.Event | None = None
        self._pinned: torch.device | None = None  # for whom

    def ready(self, size: int) -> torch.Tensor:
        """The buffer, at least `size` bytes of it, when nothing reads it any more."""
        if self.event is None:
            self.event = torch.cuda.Event(blocking=True)
        elif self._pinned is not None:
            self.event.synchronize()
        if len(self.buffer) < size:
            self.free()
            pages = mmap.mmap(-1, max(size, SLOT_BYTES), flags=mmap.MAP_PRIVATE)  # kept by the tensor
            with contextlib.suppress(OSError):  # large pages are sooner pinned, and not every kernel has them
                pages.madvise(mmap.MADV_HUGEPAGE)
            self.buffer = torch.frombuffer(pages, dtype=torch.uint8)
        return self.buffer

    def pin(self, device: torch.device) -> None:
        """Lets the driver copy from the buffer without a buffer of its own; once, and not before something is read.
        ValueError where the driver cannot."""
        if self._pinned is not None:
            return
        with torch.cuda.device(device):  # other threads have another current device
            done = torch.cuda.cudart().cudaHostRegister(self.buffer.data_ptr(), len(self.buffer), 0)
        try:
            torch.cuda.check_error(done)
        except RuntimeError as error:
            raise ValueError(
                f"{len(self.buffer) >> 20} MB of the host's memory cannot be pinned for copies to {device} "
                f"({str(error).splitlines()[0]}); free memory, or raise the limit of locked memory (ulimit -l)"
            ) from None
        self._pinned = device

    def free(self) -> None:
        """Gives its memory back, when nothing reads it any more."""
        if self._pinned is not None:
            assert self.event is not None
            self.event.synchronize()
            with torch.cuda.device(self._pinned):
                torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self.buffer.data_ptr()))
        self.buffer, self._pinned = torch.empty(0, dtype=torch.uint8), None


@dataclass
class _Landing:
    """Where `left` tasks bring their parts, `out` or memory of `size` bytes on `device` that the first copy makes; the
    last one has `use` called with it. A GPU copies on `stream` and uses on `used`."""

    device: torch.device
    stream: torch.cuda.Stream | None
    size: int
    out: torch.Tensor | None = None
    use: Callable[[torch.Tensor], None] | None = None
    used: torch.cuda.Stream | None = None
    left: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def part(self, at: int, size: int) -> torch.Tensor:
        """Bytes `at` to `at + size`; new memory belongs to the current stream."""
        with self.lock:
            if self.out is None:
                self.out = torch.empty(self.size, dtype=torch.uint8, device=self.device)
            return self.out[at : at + size]

    def arrived(self) -> None:
        """Uses it if the part that was asked for was the last one."""
        with self.lock:
            self.left -= 1
            if self.left or self.use is None:
                return
        data, self.out = self.out, None
        assert data is not None
        if self.used is None:
            self.use(data)
            return
        assert self.stream is not None
        with torch.cuda.stream(self.used):
            self.used.wait_stream(self.stream)
            data.record_stream(self.used)  # freed soon, filled again only after its use
            self.use(data)


class _Reading(Filling):
    """Tasks; `used`, a stream, comes before what follows on `stream`."""

    def __init__(
        self,
        tasks: list[Future[Result]],
        times: Times,
        stream: torch.cuda.Stream | None = None,
        used: torch.cuda.Stream | None = None,
    ):
        self.tasks, self.times, self.stream, self.used = tasks, times, stream, used

    def wait(self) -> None:
        began = time.perf_counter()
        try:
            for task in self.tasks:
                done = task.result()
                self.times.add(done.result() if isinstance(done, Future) else done)
        finally:  # after an error nobody waits for what was not begun
            for task in self.tasks:
                task.cancel()
        if self.stream is not None and self.used is not None:
            self.stream.wait_stream(self.used)
        self.times.waiting += time.perf_counter() - began


class StagedCheckpoint(Checkpoint):
    """A checkpoint whose `raw`, `box` and `gather` give tensors of their own memory on `device`, and whose `hand` does
    its work beside them. Close it after use."""

    def __init__(self, folder: str | Path, device: str | torch.device):
        self.device: torch.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.times = Times()
        self._buffers = threading.local()
        self._ahead: dict[str, torch.Tensor] = {}  # bytes that `raw` will be asked for
        threads = reading_threads()
        self._parts = max(1, threads // 4)
        self._handing = ThreadPoolExecutor(threads, "read")
        self._gathering = ThreadPoolExecutor(self._parts, "gather")  # never queues behind the reading of experts
        self._copying = ThreadPoolExecutor(1, "copy")  # the driver takes one at a time anyway
        self._turns = threading.Semaphore(threads)  # of both
        self._slots = [_Slot() for _ in range(_SLOTS_A_THREAD * threads + 1)]
        self._free: SimpleQueue[_Slot] = SimpleQueue()
        for slot in self._slots:
            self._free.put(slot)
        self._copies: torch.cuda.Stream | None = None  # of what `hand` reads, and where it is used
        self._uses: torch.cuda.Stream | None = None
        try:
            super().__init__(folder)
        except BaseException:
            self._end()
            raise

    def raw(self, name: str) -> torch.Tensor:
        spec = self.spec(name)
        if name in self._ahead:  # a copy is aligned, and leaves nothing of its neighbours in memory
            return self._ahead.pop(name).clone().view(TORCH_DTYPES[spec.dtype]).view(spec.shape)
        return self.box(*self._whole(name)).view(spec.shape)

    def ahead(self, names: Iterable[str]) -> None:
        ordered = sorted(names, key=lambda n: (self.spec(n).file, self._offsets[n]))
        sizes = [self.spec(n).nbytes for n in ordered]
        out = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
        self.gather(map(self._whole, ordered), out)
        self._ahead |= zip(ordered, out.split(sizes), strict=True)

    def _whole(self, name: str) -> Box:
        shape = self.spec(name).shape
        columns = shape[-1] if shape else 1
        return name, range(torch.Size(shape).numel() // max(columns, 1)), range(columns)

    def box(self, name: str, rows: range, columns: range) -> torch.Tensor:
        dtype = TORCH_DTYPES[self.spec(name).dtype]
        out = torch.empty(len(rows), len(columns), dtype=dtype, device=self.device)
        if out.numel():
            self.gather([(name, rows, columns)], out.view(-1).view(torch.uint8))
        return out

    def gather(self, boxes: Iterable[Box], out: torch.Tensor) -> None:
        self.begin(boxes, out).wait()

    def begin(self, boxes: Iterable[Box], out: torch.Tensor) -> Filling:
        assert out.dtype == torch.uint8
        most = min(SLOT_BYTES, max(LEAST_BYTES, -(-len(out) // self._parts)))  # a part for every thread
        landing = _Landing(self.device, self._stream(), len(out), out)
        return _Reading(self._begin(self._gathering, landing, boxes, most), self.times)

    def hand(self, jobs: Sequence[Job]) -> Filling:
        stream, tasks = self._stream(), list[Future[Result]]()
        if stream is not None:
            self._copies = self._copies or torch.cuda.Stream(self.device)
            self._uses = self._uses or torch.cuda.Stream(self.device)
            self._copies.wait_stream(stream)
        for boxes, size, use in jobs:
            landing = _Landing(self.device, self._copies, size, use=use, used=self._uses)
            tasks += self._begin(self._handing, landing, boxes, SLOT_BYTES)
        return _Reading(tasks, self.times, stream, self._uses)

    def _begin(
        self, pool: ThreadPoolExecutor, landing: _Landing, boxes: Iterable[Box], most: int
    ) -> list[Future[Result]]:
        """Tasks that bring the bytes of boxes, one box after the other, up to `most` bytes each."""
        groups = [*_filled(self._pieces(boxes), most)] or [[]]
        starts = [*itertools.accumulate((sum(p.size for p in pieces) for pieces in groups), initial=0)]
        assert starts.pop() == landing.size
        landing.left = len(groups)
        return [pool.submit(self._take, pieces, landing, at) for pieces, at in zip(groups, starts, strict=True)]

    def close(self) -> None:
        self._end()
        self._ahead.clear()
        super().close()

    def _end(self) -> None:
        for pool in (self._handing, self._gathering, self._copying):
            pool.shutdown(cancel_futures=True)
        for slot in self._slots:  # also those whose copy was given up
            slot.free()
        if self._uses is not None:  # also after an error nobody gets memory that is still written
            torch.cuda.current_stream(self.device).wait_stream(self._uses)

    def _stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None

    def _pieces(self, boxes: Iterable[Box]) -> Iterator[Piece]:
        """What to read, in order; whole rows that follow each other in a file are one piece, also those of several
        tensors."""
        file, begin, end = "", 0, 0
        for name, rows, columns in boxes:
            _, dtype, shape, its_file = self.specs[name]
            offset, across = self._offsets[name], shape[-1] if shape else 1
            size = DTYPE_BYTES[dtype]
            width = size * across
            first, last = offset + rows.start * width, offset + rows.stop * width
            whole = columns.stop - columns.start == across
            if whole and first == end and its_file == file:
                end = last
                continue
            self._descriptor(its_file)  # opened here, by one thread
            if end > begin:
                yield Piece(file, begin, 1, end - begin, 0, end - begin)
            file, begin, end = its_file, first, last if whole else first
            if not whole:
                yield Piece(file, first, len(rows), width, size * columns.start, size * columns.stop)
                file = ""
        if end > begin:
            yield Piece(file, begin, 1, end - begin, 0, end - begin)

    @torch.inference_mode()  # which threads do not inherit: `out` may have been made in it, and may be written in it
    def _take(self, pieces: list[Piece], landing: _Landing, at: int) -> Result:
        """Reads pieces one after the other to their place; for a GPU into a buffer first, which goes to the thread that
        asks for copies. Where there is nothing to read this thread calls the job's function, which may read itself."""
        size = sum(p.size for p in pieces)
        if landing.stream is None or not size:
            times = self._read_pieces(pieces, landing.part(at, size))
            began = time.perf_counter()
            landing.arrived()
            times.using = time.perf_counter() - began
            return times
        began = time.perf_counter()
        slot = self._free.get()
        try:
            staged = slot.ready(size)[:size]
            slots = time.perf_counter() - began
            times = self._read_pieces(pieces, staged)
            began = time.perf_counter()
            slot.pin(self.device)
            times.slots, times.pinning = slots, time.perf_counter() - began
            return self._copying.submit(self._copy, slot, staged, landing, at, times)
        except BaseException:
            self._free.put(slot)
            raise

    @torch.inference_mode()
    def _copy(self, slot: _Slot, staged: torch.Tensor, landing: _Landing, at: int, times: Times) -> Times:
        """Enqueues the copy of a buffer, and what uses it where it was the last one."""
        began = time.perf_counter()
        try:
            with torch.cuda.stream(landing.stream):
                landing.part(at, len(staged)).copy_(staged, non_blocking=True)
                assert slot.event is not None
                slot.event.record(landing.stream)
        finally:
            self._free.put(slot)
        copied = time.perf_counter()
        landing.arrived()
        times.copying, times.using = copied - began, time.perf_counter() - copied
        return times

    def _read_pieces(self, pieces: list[Piece], out: torch.Tensor) -> Times:
        view, at, read = out.numpy().data, 0, 0
        with self._turns:
            began = time.perf_counter()
            for piece in pieces:
                whole = piece.right - piece.left == piece.width
                if whole:
                    self._read_at(view[at : at + piece.size], piece.file, piece.offset)
                else:  # columns, by way of a buffer for their rows
                    rows = self._scratch("rows", piece.rows * piece.width)
                    self._read_at(rows.numpy().data, piece.file, piece.offset)
                    rows = rows.view(piece.rows, piece.width)
                    target = out[at : at + piece.size].view(piece.rows, -1)
                    target.copy_(rows[:, piece.left : piece.right])
                at, read = at + piece.size, read + piece.rows * piece.width
            return Times(reading=time.perf_counter() - began, reads=len(pieces), bytes=read)

    def _scratch(self, what: str, size: int) -> torch.Tensor:
        """Memory of this thread for `what`."""
        mine = self._buffers.__dict__
        if what not in mine or len(mine[what]) < size:
            mine[what] = torch.empty(max(size, SLOT_BYTES), dtype=torch.uint8)
        return mine[what][:size]


def _filled(pieces: Iterable[Piece], most: int) -> Iterator[list[Piece]]:
    """Pieces in their order, cut so that together they are up to `most` bytes. Rows of which columns are wanted
    are not cut, and no more at a time than would be `most` bytes whole."""
    group: list[Piece] = []
    room = most
    for piece in pieces:
        while piece.size:
            whole = piece.right - piece.left == piece.width
            many = min(piece.size, room)  # bytes
            if not whole:  # rows
                many = min(many // (piece.right - piece.left), max(most // piece.width, 1))
            if not many and group:
                yield group
                group, room = [], most
                continue
            many = max(many, 1)
            if whole:
                group.append(piece._replace(width=many, right=many))
                piece = piece._replace(offset=piece.offset + many, width=piece.width - many, right=piece.right - many)
            else:
                group.append(piece._replace(rows=many))
                piece = piece._replace(offset=piece.offset + many * piece.width, rows=piece.rows - many)
            room -= group[-1].size
            if room <= 0:
                yield group
                group, room = [], most
    if group:
        yield group
