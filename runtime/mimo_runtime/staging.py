"""Stored tensors on a device, as fast as the files can be read and with some hundred megabytes of the host's memory.

A mapped file is read by one thread, a page at a time, counts as memory of this process, and reaches a GPU through a
buffer of the driver. Here threads read plainly. For a GPU they read into pinned buffers, which each takes from a queue
and gives back as soon as its one copy is under way; the buffer taken is the one whose copy began first. The copies are
in the order of the stream that asked for them, so what follows on that stream needs no wait, and a buffer on the device
may be filled again as soon as what reads it is on the stream.

Python runs one thread at a time, and a file may hold 26,000 tensors. So the unit of work is not a tensor but a buffer:
what lies side by side in a file is read by one call, and what goes side by side is copied by one.
"""

import os
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import torch

from mimo_qat.checkpoint.folder import TORCH_DTYPES
from mimo_qat.checkpoint.reader import Box, Checkpoint, Filling
from mimo_runtime.parallel import world

SLOT_BYTES = 2**24
LEAST_BYTES = 2**20  # less is not worth a thread's turn
MOST_THREADS = 16  # more do not read faster
_SLOTS_A_THREAD = 1.5  # copying a buffer takes a tenth of the time of reading it


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
    slots: float = 0.0
    """waiting for a pinned buffer to be copied: above zero where copies, not files, are the limit"""
    copying: float = 0.0
    """asking for copies"""
    waiting: float = 0.0
    """of the caller, until what it asked for was read"""
    reads: int = 0
    bytes: int = 0

    def add(self, other: "Times") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class _Slot:
    """A pinned buffer, and the event after its last copy."""

    buffer: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    event: torch.cuda.Event | None = None

    def ready(self, size: int) -> torch.Tensor:
        """The buffer, at least `size` bytes of it, when nothing reads it any more."""
        if self.event is None:
            self.event = torch.cuda.Event(blocking=True)
        elif len(self.buffer):
            self.event.synchronize()
        if len(self.buffer) < size:
            self.buffer = torch.empty(max(size, SLOT_BYTES), dtype=torch.uint8, pin_memory=True)
        return self.buffer


class _Reading(Filling):
    def __init__(self, tasks: list[Future[Times]], times: Times):
        self.tasks, self.times = tasks, times

    def wait(self) -> None:
        began = time.perf_counter()
        try:
            for task in self.tasks:
                self.times.add(task.result())
        finally:  # after an error nobody waits for what was not begun
            for task in self.tasks:
                task.cancel()
        self.times.waiting += time.perf_counter() - began


class StagedCheckpoint(Checkpoint):
    """A checkpoint whose `raw`, `box` and `gather` give tensors of their own memory on `device`. Close it after use."""

    def __init__(self, folder: str | Path, device: str | torch.device):
        self.device: torch.device = torch.device(device)
        self.times = Times()
        self._threads = threads = reading_threads()
        self._pool = ThreadPoolExecutor(threads, "read")
        self._buffers = threading.local()
        self._slots: SimpleQueue[_Slot] = SimpleQueue()
        many = int(_SLOTS_A_THREAD * threads) + 1
        for _ in range(many):
            self._slots.put(_Slot())
        if self.device.type == "cuda":  # pinning takes as long as proving the headers: do both at once
            index = self.device.index  # other threads have another current device
            index = torch.cuda.current_device() if index is None else index
            for _ in range(many):
                self._pool.submit(self._pin, index)
        try:
            super().__init__(folder)
        except BaseException:
            self._pool.shutdown(cancel_futures=True)
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
            self.gather([(name, rows, columns)], out.view(-1).view(torch.uint8), spread=True).wait()
        return out

    def gather(self, boxes: Iterable[Box], out: torch.Tensor, *, spread: bool = False) -> Filling:
        most = SLOT_BYTES
        if spread:
            most = min(most, max(LEAST_BYTES, -(-len(out) // self._threads)))
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        tasks, at = [], 0
        for pieces in _filled(self._pieces(boxes), most):
            size = sum(p.size for p in pieces)
            tasks.append(self._pool.submit(self._take, pieces, out[at : at + size], stream))
            at += size
        assert at == len(out) and out.dtype == torch.uint8
        return _Reading(tasks, self.times)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        super().close()

    def _pieces(self, boxes: Iterable[Box]) -> Iterator[Piece]:
        """What to read, in order; whole rows that follow each other in a file are one piece, also those of several
        tensors."""
        file, begin, end = "", 0, 0
        for name, rows, columns in boxes:
            spec = self.spec(name)
            shape = spec.shape or (1,)
            size = TORCH_DTYPES[spec.dtype].itemsize
            width = size * shape[-1]
            first, last = (self._offsets[name] + row * width for row in (rows.start, rows.stop))
            self._descriptor(spec.file)  # opened here, by one thread
            whole = len(columns) == shape[-1]
            if whole and spec.file == file and first == end:
                end = last
                continue
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
        began = time.perf_counter()
        slot = self._slots.get()
        try:
            with torch.cuda.stream(stream):  # and its device, which pinned memory belongs to as well
                staged = slot.ready(len(out))[: len(out)]
                waited = time.perf_counter() - began
                times = self._read_pieces(pieces, staged)
                began = time.perf_counter()
                out.copy_(staged, non_blocking=True)
                assert slot.event is not None
                slot.event.record(stream)
        finally:
            self._slots.put(slot)
        times.slots, times.copying = waited, time.perf_counter() - began
        return times

    def _read_pieces(self, pieces: list[Piece], out: torch.Tensor) -> Times:
        began, at = time.perf_counter(), 0
        view, read = out.numpy().data, 0
        for piece in pieces:
            whole = piece.right - piece.left == piece.width
            if whole:
                self._read_at(view[at : at + piece.size], piece.file, piece.offset)
            else:  # columns, by way of a buffer for their rows
                rows = self._scratch(piece.rows * piece.width)
                self._read_at(rows.numpy().data, piece.file, piece.offset)
                rows = rows.view(piece.rows, piece.width)
                target = out[at : at + piece.size].view(piece.rows, -1)
                target.copy_(rows[:, piece.left : piece.right])
            at, read = at + piece.size, read + piece.rows * piece.width
        return Times(reading=time.perf_counter() - began, reads=len(pieces), bytes=read)

    def _scratch(self, size: int) -> torch.Tensor:
        """Memory of this thread for whole rows."""
        mine = self._buffers.__dict__
        if "rows" not in mine or len(mine["rows"]) < size:
            mine["rows"] = torch.empty(max(size, SLOT_BYTES), dtype=torch.uint8)
        return mine["rows"][:size]

    def _pin(self, index: int) -> None:
        """Allocates a buffer before it is needed. The queue's order gives each such task another one."""
        slot = self._slots.get()
        with torch.cuda.device(index):
            slot.ready(SLOT_BYTES)
        self._slots.put(slot)


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
