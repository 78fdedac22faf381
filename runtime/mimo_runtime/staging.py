"""Stored tensors on a device, as fast as the files can be read and with a few megabytes of the host's memory.

A mapped file is read by one thread, a page at a time, counts as memory of this process, and reaches a GPU through a
buffer of the driver. Here a few threads read plainly. For a GPU each has two pinned buffers: it fills one while the
other's copies are under way. The copies are in the order of the stream that asked for them, so what follows on that
stream needs no wait, and packing one layer goes on while the next one is read.
"""

import os
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from mimo_qat.checkpoint.folder import TORCH_DTYPES
from mimo_qat.checkpoint.reader import Checkpoint, Part
from mimo_runtime.parallel import world

SLOT_BYTES = 2**23
MOST_THREADS = 16  # two pinned buffers each; more do not read faster


def reading_threads() -> int:
    """Threads of this process that read at once: ranks of one host share its cores."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", world()[1]))
    return max(1, min(MOST_THREADS, len(os.sched_getaffinity(0)) // ranks))


class Piece(NamedTuple):
    """Whole stored rows, at most a buffer of them: `rows` rows of `width` bytes from byte `skip` of a tensor on, of
    which the bytes `left` to `right` go to `out` uint8 [rows, right - left]."""

    name: str
    skip: int
    rows: int
    width: int
    left: int
    right: int
    out: torch.Tensor


class StagedCheckpoint(Checkpoint):
    """A checkpoint whose `raw`, `box` and `read` give tensors of their own memory on `device`. Close it after use."""

    def __init__(self, folder: str | Path, device: str | torch.device):
        super().__init__(folder)
        self.device = torch.device(device)
        self._pool = ThreadPoolExecutor(reading_threads(), "read")
        self._buffers = threading.local()

    def raw(self, name: str) -> torch.Tensor:
        shape = self.spec(name).shape
        columns = shape[-1] if shape else 1
        rows = torch.Size(shape).numel() // max(columns, 1)
        return self.box(name, range(rows), range(columns)).view(shape)

    def box(self, name: str, rows: range, columns: range) -> torch.Tensor:
        dtype = TORCH_DTYPES[self.spec(name).dtype]
        out = torch.empty(len(rows), len(columns), dtype=dtype, device=self.device)
        self.read([(name, rows, columns, out)])
        return out

    def read(self, parts: Iterable[Part]) -> None:
        cuda = torch.device(self.device).type == "cuda"
        stream = torch.cuda.current_stream(self.device) if cuda else None
        tasks: list[Future[None]] = []
        try:
            for pieces in _grouped(self._cut(p) for p in parts):
                tasks.append(self._pool.submit(self._take, pieces, stream))
            for task in tasks:
                task.result()
        finally:  # after an error nobody waits for what was not begun
            for task in tasks:
                task.cancel()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        super().close()

    def _cut(self, part: Part) -> list[Piece]:
        name, rows, columns, out = part
        spec = self.spec(name)
        size = spec.nbytes // max(torch.Size(spec.shape).numel(), 1)
        width = size * (spec.shape[-1] if spec.shape else 1)
        left, right = size * columns.start, size * columns.stop
        self._descriptor(spec.file)  # opened here, by one thread
        assert out.is_contiguous() and tuple(out.shape) == (len(rows), len(columns)) and out.element_size() == size
        target = out.view(torch.uint8) if out.numel() else out.new_empty(0, 0, dtype=torch.uint8)
        many = max(1, SLOT_BYTES // max(width, 1))
        starts = range(0, len(target), many)
        pieces = [target[i : i + many] for i in starts]
        return [
            Piece(name, (rows.start + i) * width, len(p), width, left, right, p)
            for i, p in zip(starts, pieces, strict=True)
        ]

    @torch.inference_mode()  # which threads do not inherit: `out` may have been made in it, and may be written in it
    def _take(self, pieces: list[Piece], stream: torch.cuda.Stream | None) -> None:
        """Reads the pieces that one buffer holds and, on a GPU, enqueues their copies."""
        if stream is None:
            for piece in pieces:
                self._read_piece(piece, piece.out)
            return
        with torch.cuda.stream(stream):  # and its device, which pinned memory belongs to as well
            buffer, event = self._slot(sum(p.out.numel() for p in pieces))
            at = 0
            for piece in pieces:
                size = piece.out.numel()
                staged = buffer[at : at + size].view(piece.out.shape)
                self._read_piece(piece, staged)
                piece.out.copy_(staged, non_blocking=True)
                at += size
            event.record(stream)

    def _read_piece(self, piece: Piece, into: torch.Tensor) -> None:
        """The bytes of a piece, on the host; columns by way of a buffer for their whole rows."""
        spec, whole = self.specs[piece.name], piece.right - piece.left == piece.width
        held = into if whole else self._scratch(piece.rows * piece.width)
        self._read_into(held.view(-1).numpy().data, spec, piece.skip)
        if not whole:
            into.copy_(held.view(piece.rows, piece.width)[:, piece.left : piece.right])

    def _scratch(self, size: int) -> torch.Tensor:
        mine = self._buffers.__dict__
        if "rows" not in mine or len(mine["rows"]) < size:
            mine["rows"] = torch.empty(max(size, SLOT_BYTES), dtype=torch.uint8)
        return mine["rows"][:size]

    def _slot(self, size: int) -> tuple[torch.Tensor, torch.cuda.Event]:
        """The pinned buffer of this thread whose turn it is, and the event after its copies, which has been waited for;
        a row longer than a buffer gets a longer one."""
        slots = self._buffers.__dict__.setdefault("slots", [])
        if len(slots) == 2:
            buffer, event = slots.pop(0)
            event.synchronize()
        else:
            buffer, event = torch.empty(0, dtype=torch.uint8), torch.cuda.Event(blocking=True)
        if len(buffer) < size:
            buffer = torch.empty(max(size, SLOT_BYTES), dtype=torch.uint8, pin_memory=True)
        slots.append((buffer, event))
        return buffer, event


def _grouped(parts: Iterable[list[Piece]]) -> Iterable[list[Piece]]:
    """Pieces in their order, as many together as a buffer holds."""
    group: list[Piece] = []
    size = 0
    for pieces in parts:
        for piece in pieces:
            if group and size + piece.out.numel() > SLOT_BYTES:
                yield group
                group, size = [], 0
            group.append(piece)
            size += piece.out.numel()
    if group:
        yield group
