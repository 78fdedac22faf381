"""Stored tensors on a device, as fast as the files can be read and with some hundred megabytes of the host's memory.

A mapped file is read by one thread, a page at a time, counts as memory of this process, and reaches a GPU through a
buffer of the driver. Here threads read plainly. For a GPU they read into pinned buffers, which each takes from a queue
and gives back as soon as its one copy is under way; the buffer taken is the one whose copy began first.

`gather` copies in the order of the stream that asked for it, so what follows on that stream needs no wait. What `hand`
reads goes through a buffer on the device to whoever rearranges it, all on the reading thread and on a stream of the
buffer's own: then the caller is free for other work, and copies do not wait for kernels.

Python runs one thread at a time, and each call that lets go of it waits in a queue to get it back. A release holds
26,000 tensors, so the unit of work is not a tensor but a buffer: what lies side by side in a file is read by one call,
and what goes side by side is copied by one.
"""

import contextlib
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
_SLOTS_A_THREAD = 1.25  # copying a buffer takes a tenth of the time of reading it


def reading_threads() -> int:
    """Threads of this process that read at once: ranks of one host share its cores."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", world()[1]))
    return max(1, min(MOST_THREADS, len(os.sched_getaffinity(0)) // ranks))


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
    """Seconds of the reading threads, summed over them, and what they did; `waiting` is the caller's own."""

    reading: float = 0.0
    """in calls that read, and in cutting columns out of rows"""
    pinning: float = 0.0
    """making pinned buffers ahead"""
    slots: float = 0.0
    """waiting for a pinned buffer to be copied: above zero where copies, not files, are the limit"""
    copying: float = 0.0
    """asking for copies"""
    using: float = 0.0
    """in what `hand` calls: on a GPU, asking for what packs experts"""
    waiting: float = 0.0
    """of the caller, until what it asked for was read"""
    reads: int = 0
    bytes: int = 0

    def add(self, other: "Times") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def _nothing() -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8)


@dataclass
class _Slot:
    """A pinned buffer, and the event after what last read it; for `hand`, its equal on the device and their stream."""

    buffer: torch.Tensor = field(default_factory=_nothing)
    event: torch.cuda.Event | None = None
    twin: torch.Tensor = field(default_factory=_nothing)
    stream: torch.cuda.Stream | None = None

    def ready(self, size: int) -> torch.Tensor:
        """The buffer, at least `size` bytes of it, when nothing reads it any more."""
        if self.event is None:
            self.event = torch.cuda.Event(blocking=True)
        elif len(self.buffer):
            self.event.synchronize()
        if len(self.buffer) < size:
            self.buffer = torch.empty(max(size, SLOT_BYTES), dtype=torch.uint8, pin_memory=True)
        return self.buffer

    def beside(self, device: torch.device) -> torch.Tensor:
        """The twin of the buffer, on the current stream."""
        if len(self.twin) < len(self.buffer):
            self.twin = torch.empty(len(self.buffer), dtype=torch.uint8, device=device)
        return self.twin


class _Readers:
    """Threads and their pinned buffers, which are made when they are first needed, or by `pin` before."""

    def __init__(self, threads: int, device: torch.device):
        self.threads, self.device = threads, device
        self.pool = ThreadPoolExecutor(threads, "read")
        self.slots = [_Slot() for _ in range(int(_SLOTS_A_THREAD * threads) + 1)]
        self.free: SimpleQueue[_Slot] = SimpleQueue()
        for slot in self.slots:
            self.free.put(slot)

    def pin(self) -> list[Future[Times]]:
        """Begins to make the buffers. The queue's order gives each task another one."""
        return [self.pool.submit(self._pin) for _ in self.slots]

    def _pin(self) -> Times:
        slot, began = self.free.get(), time.perf_counter()
        with torch.cuda.device(self.device):  # other threads have another current device
            slot.ready(SLOT_BYTES)
        self.free.put(slot)
        return Times(pinning=time.perf_counter() - began)

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)


class _Reading(Filling):
    """Tasks of `readers`; their streams come before what follows on `stream`."""

    def __init__(self, tasks: list[Future[Times]], times: Times, readers: _Readers, stream: torch.cuda.Stream | None):
        self.tasks, self.times, self.readers, self.stream = tasks, times, readers, stream

    def wait(self) -> None:
        began = time.perf_counter()
        try:
            for task in self.tasks:
                self.times.add(task.result())
        finally:  # after an error nobody waits for what was not begun
            for task in self.tasks:
                task.cancel()
        for slot in self.readers.slots:
            if self.stream is not None and slot.stream is not None:
                self.stream.wait_stream(slot.stream)
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
        threads = reading_threads()
        self._handing = _Readers(threads, self.device)
        self._gathering = _Readers(max(1, threads // 4), self.device)  # never queues behind what takes long
        self._pins = self._handing.pin() if self.device.type == "cuda" else []  # meanwhile the headers are proved
        try:
            super().__init__(folder)
        except BaseException:
            self._end()
            raise

    def raw(self, name: str) -> torch.Tensor:
        shape = self.spec(name).shape
        columns = shape[-1] if shape else 1
        rows = torch.Size(shape).numel() // max(columns, 1)
        return self.box(name, range(rows), range(columns)).view(shape)

    def box(self, name: str, rows: range, columns: range) -> torch.Tensor:
        dtype = TORCH_DTYPES[self.spec(name).dtype]
        out = torch.empty(len(rows), len(columns), dtype=dtype, device=self.device)
        if out.numel():
            self.gather([(name, rows, columns)], out.view(-1).view(torch.uint8))
        return out

    def gather(self, boxes: Iterable[Box], out: torch.Tensor) -> None:
        readers, stream = self._gathering, self._stream()
        most = min(SLOT_BYTES, max(LEAST_BYTES, -(-len(out) // readers.threads)))  # a part for every thread
        tasks, at = [], 0
        for pieces in _filled(self._pieces(boxes), most):
            size = sum(p.size for p in pieces)
            tasks.append(readers.pool.submit(self._take, pieces, out[at : at + size], stream))
            at += size
        assert at == len(out) and out.dtype == torch.uint8
        _Reading(tasks, self.times, readers, stream).wait()

    def hand(self, jobs: Sequence[Job]) -> Filling:
        readers, stream = self._handing, self._stream()
        begin = None if stream is None else stream.record_event()
        tasks = [readers.pool.submit(self._hand, [*self._pieces(boxes)], size, use, begin) for boxes, size, use in jobs]
        pins, self._pins = self._pins, []
        return _Reading(pins + tasks, self.times, readers, stream)

    def close(self) -> None:
        self._end()
        super().close()

    def _end(self) -> None:
        self._handing.close()
        self._gathering.close()

    def _stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None

    def _pieces(self, boxes: Iterable[Box]) -> Iterator[Piece]:
        """What to read, in order; whole rows that follow each other in a file are one piece, also those of several
        tensors."""
        file, begin, end = "", 0, 0
        for name, rows, columns in boxes:
            spec, offset = self.spec(name), self._offsets[name]
            size, across = DTYPE_BYTES[spec.dtype], spec.shape[-1] if spec.shape else 1
            width = size * across
            first, last = offset + rows.start * width, offset + rows.stop * width
            whole = len(columns) == across
            if whole and first == end and spec.file == file:
                end = last
                continue
            self._descriptor(spec.file)  # opened here, by one thread
            if end > begin:
                yield Piece(file, begin, 1, end - begin, 0, end - begin)
            file, begin, end = spec.file, first, last if whole else first
            if not whole:
                yield Piece(file, first, len(rows), width, size * columns.start, size * columns.stop)
                file = ""
        if end > begin:
            yield Piece(file, begin, 1, end - begin, 0, end - begin)

    @torch.inference_mode()  # which threads do not inherit: `out` may have been made in it, and may be written in it
    def _take(self, pieces: list[Piece], out: torch.Tensor, stream: torch.cuda.Stream | None) -> Times:
        """Reads pieces one after the other into `out`; for a GPU into a buffer first, and enqueues its copy."""
        if stream is None:
            return self._read_pieces(pieces, out)
        with self._slot(self._gathering, len(out), stream) as (slot, times):
            times.add(self._read_pieces(pieces, slot.buffer[: len(out)]))
            began = time.perf_counter()
            out.copy_(slot.buffer[: len(out)], non_blocking=True)
            times.copying = time.perf_counter() - began
        return times

    @torch.inference_mode()
    def _hand(
        self, pieces: list[Piece], size: int, use: Callable[[torch.Tensor], None], begin: torch.cuda.Event | None
    ) -> Times:
        """Reads pieces into a buffer on the device, and calls `use` with it; for a GPU on a stream after `begin`."""
        if begin is None:
            data = self._scratch("data", size)
            times = self._read_pieces(pieces, data)
            use(data)
            return times
        with self._slot(self._handing, size) as (slot, times):
            times.add(self._read_pieces(pieces, slot.buffer[:size]))
            began = time.perf_counter()
            assert slot.stream is not None
            slot.stream.wait_event(begin)
            data = slot.beside(self.device)[:size]
            data.copy_(slot.buffer[:size], non_blocking=True)
            times.copying = time.perf_counter() - began
            use(data)
            times.using = time.perf_counter() - began - times.copying
        return times

    @contextlib.contextmanager
    def _slot(
        self, readers: _Readers, size: int, stream: torch.cuda.Stream | None = None
    ) -> Iterator[tuple[_Slot, Times]]:
        """A buffer of `size` bytes that nothing reads, on `stream` or the slot's own, and how long that took."""
        began = time.perf_counter()
        slot = readers.free.get()
        try:
            if stream is None:
                slot.stream = stream = slot.stream or torch.cuda.Stream(self.device)
            with torch.cuda.stream(stream):  # and its device, which pinned memory belongs to as well
                slot.ready(size)
                yield slot, Times(slots=time.perf_counter() - began)
                assert slot.event is not None
                slot.event.record(stream)
        finally:
            readers.free.put(slot)

    def _read_pieces(self, pieces: list[Piece], out: torch.Tensor) -> Times:
        began, at = time.perf_counter(), 0
        view, read = out.numpy().data, 0
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
