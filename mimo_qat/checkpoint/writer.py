"""Tensors as safetensors files and folders: whole or not at all, and the same bytes on every run.

safetensors' own `save_file` wants all tensors of a file in memory. Here the header comes first, from the layout alone,
and each tensor is written to its place when it is ready, so memory stays at one tensor while a file may be 35 GB. The
bytes are those that `save_file` would write (a test compares them). A file carries a temporary name until it is
complete and on the disk; a job that is killed leaves finished files, which the next run keeps.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from mimo_qat.checkpoint.folder import INDEX_FILE, TORCH_DTYPES
from mimo_qat.checkpoint.geometry import DraftGeometry, release_drafter_config
from mimo_qat.checkpoint.journal import Journal
from mimo_qat.checkpoint.layout import (
    HF_SHARD_BYTES,
    Config,
    TensorSpec,
    drafter_tensors,
    files_of,
    header_bytes,
    hf_shards,
    target_tensors,
    totals,
)
from mimo_qat.checkpoint.reader import MASK_FILE
from mimo_qat.provenance import atomic_write, write_json

MANIFEST_FILE = "conversion.json"
PT_METADATA = {"format": "pt"}
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

Source = torch.Tensor | Callable[[], torch.Tensor]


def _sha256(descriptor: int, offset: int, size: int) -> str:
    """SHA-256 of a part of an open file, in hex."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(size, 2**23)))
    while size:
        done = os.preadv(descriptor, [buffer[: min(size, len(buffer))]], offset)
        if not done:
            return ""
        digest.update(buffer[:done])
        offset, size = offset + done, size - done
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class FileWriter:
    """One safetensors file of known tensors, written in any order; a context manager.

    The file takes its name when the context ends without an error and every tensor was written; otherwise nothing
    is left. `specs` may come in any order: the file has safetensors' own.

    With a `journal` path the unfinished file stays instead, beside a record of the tensors that are whole, which
    `commit` extends. The next writer of that file hashes those again and goes on with the others.
    """

    def __init__(
        self,
        path: Path,
        specs: list[TensorSpec],
        metadata: Mapping[str, str] | None = PT_METADATA,
        journal: Path | None = None,
    ):
        ordered = files_of({s.name: s for s in specs})
        if len(ordered) != 1 or len({s.name for s in specs}) != len(specs):
            raise ValueError(f"{path}: the tensors given are not those of one file, each once; split them by file")
        self.path = path
        self.temporary = path.with_name(f".{path.name}.tmp")
        self._specs = {s.name: s for s in next(iter(ordered.values()))}
        self._offsets: dict[str, int] = {}
        self._header = header_bytes(self._specs.values(), metadata)
        end = len(self._header)
        for spec in self._specs.values():
            self._offsets[spec.name] = end
            end += spec.nbytes
        self.size = end
        self._left = set(self._specs)
        self._cursor: dict[str, int] = {}
        self._hashes: dict[str, Any] = {}
        self._descriptor: int | None = None
        self._journal = Journal(journal, self._header) if journal else None
        self._whole: Any = None
        """hash of the file so far, while every byte came in file order"""
        self._end = 0

    def is_complete(self) -> bool:
        """Whether the file is there already, with this header and this size."""
        if not self.path.is_file() or self.path.stat().st_size != self.size:
            return False
        with self.path.open("rb") as f:
            return f.read(len(self._header)) == self._header

    def __enter__(self) -> "FileWriter":
        keep = 0 if self._journal else os.O_TRUNC
        self._descriptor = os.open(self.temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | keep, 0o666)
        self._whole, self._end = hashlib.sha256() if self._journal else None, 0
        if self._journal:
            self._journal.open()
            self._left -= self._kept()
        if len(self._left) == len(self._specs):
            os.truncate(self._descriptor, 0)
        os.truncate(self._descriptor, self.size)
        self._put(self._header, 0)
        return self

    def _kept(self) -> set[str]:
        """Tensors of the journal whose bytes in the unfinished file are those that it records."""
        assert self._journal and self._descriptor is not None
        if os.fstat(self._descriptor).st_size != self.size:
            self._journal.keep(set())
            return set()
        whole = set()
        for name, digest in self._journal.digests.items():
            offset, size = self._offsets[name], self._specs[name].nbytes
            if _sha256(self._descriptor, offset, size) == digest:
                whole.add(name)
        self._journal.keep(whole)
        return set(self._journal.digests)

    @property
    def left(self) -> frozenset[str]:
        """Names of the tensors that are not written yet."""
        return frozenset(self._left)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes one tensor; ValueError where its name, dtype or shape is not that of the layout, or it came before."""
        spec = self._expected(name)
        have = (_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
        if have != (spec.dtype, spec.shape):
            raise ValueError(
                f"{self.path}: {name} is {have[0]} {list(have[1])}, the layout says {spec.dtype} {list(spec.shape)}; "
                "convert the tensor, or correct the config that the layout came from"
            )
        self.append(name, tensor)

    def append(self, name: str, part: torch.Tensor | memoryview) -> None:
        """Writes the next rows (or raw bytes) of a tensor; the last of them make it whole."""
        spec = self._expected(name)
        if isinstance(part, torch.Tensor):
            assert _NAMES.get(part.dtype) == spec.dtype, f"{name} is {part.dtype}, the layout says {spec.dtype}"
            part = part.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data
        view = memoryview(part)
        done = self._cursor.get(name, 0)
        assert done + len(view) <= spec.nbytes, f"{name} got more than its {spec.nbytes} bytes"
        self._put(view, self._offsets[name] + done)
        self._cursor[name] = done + len(view)
        if self._journal:
            self._hashes.setdefault(name, hashlib.sha256()).update(view)
        if self._cursor[name] == spec.nbytes:
            self._left.remove(name)

    def _expected(self, name: str) -> TensorSpec:
        if name not in self._left:
            fault = "was written before" if name in self._specs else "is not in the layout of this file"
            raise ValueError(f"{self.path}: tensor {name} {fault}; give each tensor of the layout once")
        return self._specs[name]

    def commit(self, changed: int | None = None) -> None:
        """Records the tensors that became whole since the last call; `changed` is summed up over all calls."""
        assert self._journal and self._descriptor is not None
        whole = {n: h.hexdigest() for n, h in self._hashes.items() if n not in self._left}
        self._hashes = {n: h for n, h in self._hashes.items() if n in self._left}
        self._journal.add(whole, changed, sum(self._specs[n].nbytes for n in whole), self._descriptor)

    def _put(self, data: bytes | memoryview, offset: int) -> None:
        assert self._descriptor is not None, "used outside its context"
        view = memoryview(data)
        if self._whole is not None and offset == self._end:
            self._whole.update(view)
            self._end += len(view)
        else:
            self._whole = None
        while view:
            done = os.pwrite(self._descriptor, view, offset)
            view, offset = view[done:], offset + done

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._descriptor is not None
        whole = kind is None and not self._left
        try:
            if whole:
                os.fsync(self._descriptor)
                if self._journal:
                    if not self.temporary.exists() or not os.path.samestat(
                        os.fstat(self._descriptor), self.temporary.stat()
                    ):
                        raise ValueError(f"{self.temporary} was taken away by another conversion; run one at a time")
                    digest = self._whole.hexdigest() if self._whole else _sha256(self._descriptor, 0, self.size)
                    self._journal.finish(digest)
        finally:
            os.close(self._descriptor)
            self._descriptor = None
            if self._journal:
                self._journal.close()
        if whole:
            os.replace(self.temporary, self.path)
            return
        if not self._journal:
            self.temporary.unlink(missing_ok=True)
        if kind is None:
            self.refuse_gaps()

    def refuse_gaps(self) -> None:
        """ValueError where a tensor of the file was not written yet."""
        if self._left:
            raise ValueError(
                f"{self.path}: {len(self._left)} tensors were not given, the first {min(self._left)}; "
                "every tensor of the layout is needed"
            )


def write_index(folder: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, Any]) -> None:
    """model.safetensors.index.json: `metadata` plus total_size (payload bytes), and the file of every tensor."""
    index = {
        "metadata": {**metadata, "total_size": totals(specs)[1]},
        "weight_map": {name: specs[name].file for name in sorted(specs)},
    }
    write_json(folder / INDEX_FILE, index)


def write_tensors(
    folder: Path,
    specs: Mapping[str, TensorSpec],
    tensors: Mapping[str, Source] | Iterable[tuple[str, Source]],
    metadata: Mapping[str, str] | None = PT_METADATA,
) -> None:
    """Every file of `specs` from tensors (or callables that make them) given once each, in any order.

    A file takes its name only when all of them are complete, so that a failure leaves none.
    """
    with ExitStack() as stack:
        writers = {
            file: stack.enter_context(FileWriter(folder / file, members, metadata))
            for file, members in files_of(specs).items()
        }
        for name, source in _pairs(specs, tensors):
            if name not in specs:
                raise ValueError(f"{folder}: tensor {name} is not in the layout of this config; drop or rename it")
            writers[specs[name].file].write(name, source() if callable(source) else source)
        for writer in writers.values():  # all of them before any takes its name
            writer.refuse_gaps()


def _pairs(
    specs: Mapping[str, TensorSpec], tensors: Mapping[str, Source] | Iterable[tuple[str, Source]]
) -> Iterator[tuple[str, Source]]:
    """(name, source) pairs; those of a mapping in layout order, so that disks see sequential writes."""
    if not isinstance(tensors, Mapping):
        yield from tensors
        return
    yield from ((name, tensors[name]) for name in specs if name in tensors)
    yield from ((name, source) for name, source in tensors.items() if name not in specs)


def write_bf16_folder(
    folder: str | Path,
    config: Config,
    tensors: Mapping[str, Source] | Iterable[tuple[str, Source]],
    *,
    mtp_layers: int | None = None,
    max_shard_bytes: int = HF_SHARD_BYTES,
) -> dict[str, TensorSpec]:
    """An unquantised checkpoint: published per-expert names, BF16 (router by its config, router bias F32).

    `tensors` gives every tensor of `target_tensors(config, experts="bf16", spine="bf16")` once, as a tensor of the
    layout's dtype or a callable that returns one; an iterable of pairs may come in any order and is consumed lazily.
    Writes model-0000i-of-0000N.safetensors, the index, and last config.json without quantization_config. Existing
    other files of the folder stay. Returns the layout.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    specs = target_tensors(config, experts="bf16", spine="bf16", mtp_layers=mtp_layers)
    specs = hf_shards(specs, max_shard_bytes)
    write_tensors(folder, specs, tensors)
    write_index(folder, specs, {"save_format": "bf16"})
    write_json(folder / "config.json", {k: v for k, v in config.items() if k != "quantization_config"})
    return specs


def write_drafter(
    folder: str | Path, draft_config: Config, tensors: Mapping[str, Source], mask_embedding: torch.Tensor
) -> dict[str, TensorSpec]:
    """A DFlash drafter as published: weights without safetensors metadata, own index, mask_embedding.pt, config.json.

    `tensors` holds the published names (63 BF16 tensors at five layers), `mask_embedding` is [H]. The config gets
    every spelling that engines look for; its vocab_size must be the target's.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = release_drafter_config(draft_config, draft_config["vocab_size"])
    geometry, specs = DraftGeometry.from_config(config), drafter_tensors(config)
    if mask_embedding.shape != (geometry.hidden_size,) or not mask_embedding.isfinite().all():
        raise ValueError(f"the mask embedding is {list(mask_embedding.shape)} or not finite; train it with the drafter")
    write_tensors(folder, specs, tensors, metadata=None)
    sidecar = {"mask_token_id": geometry.mask_token_id, "embedding": mask_embedding.detach().cpu().bfloat16().clone()}
    with atomic_write(folder / MASK_FILE) as temporary, temporary.open("wb") as f:
        torch.save(sidecar, f)
    write_index(folder, specs, {})
    write_json(folder / "config.json", config)
    return specs
