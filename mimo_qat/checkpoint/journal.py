"""What of an unfinished file is whole: one JSON line a commit, so that a killed job goes on inside the file.

The first line names the header that the file is being written with; a journal of another layout is not used. A line
that a killed job left half written ends the journal. Every record is checked against the bytes before it is believed,
so the syncs here only bound how much a power failure can cost, not what is right.
"""

import fcntl
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

SYNC_BYTES = 2**30
LOCK_SECONDS = 30


class Journal:
    """The record of one file; `digests` are the SHA-256 of its whole tensors, `changed` the sum of what was added."""

    def __init__(self, path: Path, header: bytes):
        self.path = path
        self.header = hashlib.sha256(header).hexdigest()
        self._descriptor: int | None = None
        self._unsynced = 0
        self._read()

    def _forget(self) -> None:
        self.digests: dict[str, str] = {}
        self.changed: int | None = None
        self.sha256: str | None = None  # of the whole file, once it is finished
        self._lines: list[dict[str, Any]] = []

    def _read(self) -> None:
        self._forget()
        if not self.path.is_file():
            return
        with self.path.open("rb") as f:
            for number, line in enumerate(f):
                try:
                    entry = json.loads(line)
                except ValueError:
                    return
                if number == 0:
                    if entry != {"header": self.header}:
                        return
                    continue
                self._apply(entry)

    def _apply(self, entry: dict[str, Any]) -> None:
        self.sha256 = entry.get("file", self.sha256)
        self.digests |= entry.get("tensors", {})
        if entry.get("changed") is not None:
            self.changed = (self.changed or 0) + entry["changed"]
        self._lines.append(entry)

    def open(self) -> None:
        """Takes the journal for this process; ValueError where another one keeps it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        waited = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._read()  # what the other process wrote in the meantime
                return
            except BlockingIOError:  # a worker of a killed job ends with the tensor that it is at
                if time.monotonic() > waited:
                    raise ValueError(f"{self.path} is in use by another conversion; wait for it to end") from None
                time.sleep(0.05)

    def keep(self, names: set[str]) -> None:
        """Starts the journal anew with the commits all of whose tensors are in `names`."""
        assert self._descriptor is not None
        kept = [line for line in self._lines if line.get("tensors", {}).keys() <= names and "file" not in line]
        self._forget()
        os.ftruncate(self._descriptor, 0)
        self._append({"header": self.header})
        for line in kept:
            self._apply(line)
            self._append(line)

    def add(self, digests: dict[str, str], changed: int | None, size: int, data: int) -> None:
        """Records tensors that are whole in the file `data` (a descriptor), `size` bytes of them."""
        self._unsynced += size
        if self._unsynced >= SYNC_BYTES:
            os.fsync(data)
        entry = {"tensors": digests} | ({} if changed is None else {"changed": changed})
        self._apply(entry)
        self._append(entry)
        if self._unsynced >= SYNC_BYTES:
            assert self._descriptor is not None
            os.fsync(self._descriptor)
            self._unsynced = 0

    def finish(self, sha256: str) -> None:
        """Records the hash of the finished file."""
        assert self._descriptor is not None
        self._apply({"file": sha256})
        self._append({"file": sha256})
        os.fsync(self._descriptor)

    def _append(self, entry: dict[str, Any]) -> None:
        assert self._descriptor is not None
        os.lseek(self._descriptor, 0, os.SEEK_END)
        os.write(self._descriptor, json.dumps(entry).encode() + b"\n")

    def close(self) -> None:
        """Lets the journal go."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
