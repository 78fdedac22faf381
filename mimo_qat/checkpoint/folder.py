"""The tensors of a folder by name: the index is the only map, every header is proved before a byte of it is believed.

Every path must stay inside the folder, every header is bounded by its file, and every tensor is named exactly once.
`raw` maps a tensor from its file, `rows` and `pieces` read bytes with plain reads: a mapped page counts as the reader's
memory for as long as the file stays in the page cache, which a conversion of 1 TB must not.
"""

import copy
import os
import struct
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from mimo_qat.checkpoint.geometry import brief, parse_json
from mimo_qat.checkpoint.layout import DTYPE_BYTES, TensorSpec, read_json

INDEX_FILE = "model.safetensors.index.json"
PIECE_BYTES = 2**23
MAX_ELEMENTS = 2**63  # more is a damaged shape
MAX_HEADER_BYTES = 10**8  # the library's limit
MAX_FILE_NAME = 255  # bytes, on every usual file system
TORCH_DTYPES = {
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
}


def inside(folder: Path, name: Any) -> Path:
    """The file `name` of `folder`; ValueError where the name or a link in it leads out.

    A folder of the Hugging Face hub cache links to the blobs of its own repository, which is allowed.
    """
    if not isinstance(name, str) or not name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError(f"{folder}: the index names the file {name!r}; only paths inside the folder are read")
    root, path = folder.resolve(), (folder / name).resolve()
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(path.is_relative_to(r) for r in roots):
        raise ValueError(f"{folder / name} is a link that leads out of the folder; put the file itself there")
    return folder / name


def read_header(path: Path, file: str) -> tuple[dict[str, TensorSpec], dict[str, str], dict[str, int]]:
    """({name: TensorSpec with this `file`, in file order}, metadata, {name: offset of its bytes}) of a file.

    Proves that tensors lie one after the other, without gaps, to the end of the file. The library safetensors, which
    does so too, would map the file, and that waits for threads that pin memory meanwhile. ValueError names the file and
    the fault.
    """
    if len(path.name.encode("utf-8", "surrogatepass")) > MAX_FILE_NAME:
        raise ValueError(f"{path.parent}: the index names a file of {len(path.name)} characters; fetch the index again")
    if not path.is_file():
        raise ValueError(f"{path} is named by the index but does not exist; fetch or write that file again")
    size = path.stat().st_size
    with path.open("rb") as f:
        prefix = f.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"{path} is not a safetensors file or was cut off in its header; fetch it again")
        raw = f.read(length)

    def damaged(reason: str) -> ValueError:
        return ValueError(f"{path} is damaged or cut off ({reason}); fetch or write it again")

    try:
        header = parse_json(raw.decode("utf-8"), "its header")
        metadata = header.pop("__metadata__", None)
        metadata = {} if metadata is None else metadata
        "".join([*header, *metadata, *metadata.values()]).encode()  # strings, without halves of characters
        ordered = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    except (AttributeError, KeyError, TypeError):
        raise damaged("its header holds an entry that describes no tensor") from None
    except ValueError as error:
        raise damaged(str(error).partition(";")[0]) from None
    specs: dict[str, TensorSpec] = {}
    offsets: dict[str, int] = {}
    begin, payload = 0, 8 + length
    for name, entry in ordered:
        dtype, shape, place = entry.get("dtype"), entry.get("shape"), entry["data_offsets"]
        if str(dtype) not in DTYPE_BYTES:
            raise ValueError(f"{path}: {brief(name)} has dtype {brief(dtype)}, which no release uses; export it again")
        count = _elements(shape)
        end = begin + DTYPE_BYTES[dtype] * count
        if count < 0 or place != [begin, end] or not type(place[0]) is type(place[1]) is int or end > size - payload:
            raise damaged(f"{brief(name)}, {dtype} {brief(shape)}, cannot be at {brief(place)} behind byte {begin}")
        specs[name] = TensorSpec(name, dtype, tuple(shape), file)
        offsets[name], begin = payload + begin, end
    if payload + begin != size:
        raise damaged(f"its header describes {begin} bytes, but {size - payload} follow")
    return specs, metadata, offsets


def _elements(shape: Any) -> int:
    """Elements of a tensor whose header states this shape, -1 where it is none."""
    count = 1
    for n in shape if type(shape) is list else [None]:
        if type(n) is not int or not 0 <= n < MAX_ELEMENTS or count > MAX_ELEMENTS:
            return -1
        count *= n
    return count


class TensorFolder:
    """The tensors of a folder, by name; data is mapped from the files on request.

    `index` is the parsed index, or {} for a folder with one file of `lone_files` and no index.
    """

    def __init__(self, folder: str | Path, lone_files: tuple[str, ...] = ("model.safetensors",)):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder} is not a folder; give the folder that holds config.json and the weights")
        self.index: dict[str, Any] = {}
        self.specs: dict[str, TensorSpec] = {}
        self._offsets: dict[str, int] = {}
        self._handles: dict[str, Any] = {}
        self._descriptors: dict[str, int] = {}
        if (self.folder / INDEX_FILE).is_file():
            self.index = read_json(self.folder / INDEX_FILE)
            self._read_indexed()
            return
        lone = next((f for f in lone_files if (self.folder / f).is_file()), None)
        if lone is None:
            raise ValueError(f"{self.folder} has neither {INDEX_FILE} nor {lone_files[0]}; fetch the index")
        self.specs = self._header(lone)

    def _header(self, file: str) -> dict[str, TensorSpec]:
        specs, _, offsets = read_header(inside(self.folder, file), file)
        self._offsets |= offsets
        return specs

    def _read_indexed(self) -> None:
        weight_map = self.index.get("weight_map")
        if not isinstance(weight_map, dict) or set(map(type, weight_map.values())) != {str}:
            raise ValueError(
                f"{self.folder / INDEX_FILE} has no weight_map of tensor names to files; fetch or write the index again"
            )
        found: dict[str, TensorSpec] = {}
        for file in dict.fromkeys(weight_map.values()):
            header = self._header(file)
            if not found.keys().isdisjoint(header):
                twice = min(header.keys() & found.keys())
                raise ValueError(
                    f"{self.folder}: {twice} is in {found[twice].file} and in {file}; "
                    "keep one and write the index again"
                )
            if not header.keys() <= weight_map.keys():
                unknown = min(header.keys() - weight_map.keys())
                raise ValueError(
                    f"{self.folder / file} holds {unknown}, which the index does not name; write the index again"
                )
            found |= header
        for name, file in weight_map.items():
            spec = found.get(name)
            if spec is None or spec.file != file:
                raise ValueError(
                    f"{self.folder}: the index places {name} in {file}, which does not hold it; "
                    "write the index again or fetch that file again"
                )
            self.specs[name] = spec

    @property
    def metadata(self) -> dict[str, Any]:
        """The index's metadata: save_format, tp_size, total_size, scale_rule; {} without an index."""
        found = self.index.get("metadata")
        return found if isinstance(found, dict) else {}

    @property
    def names(self) -> list[str]:
        """Tensor names in the order of the index."""
        return list(self.specs)

    def __contains__(self, name: str) -> bool:
        return name in self.specs

    def spec(self, name: str) -> TensorSpec:
        """TensorSpec of a stored tensor; ValueError names one that is not there."""
        if name not in self.specs:
            raise ValueError(
                f"{self.folder} holds no tensor {name}; compare the folder with `mimo-qat layout CONFIG --list true`"
            )
        return self.specs[name]

    def raw(self, name: str) -> torch.Tensor:
        """The tensor as it is stored, on the CPU."""
        file = self.spec(name).file
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(inside(self.folder, file), framework="pt")
            except (RuntimeError, SafetensorError):  # larger than this machine's memory; or odd, without a fault
                return self.rows(name)
        return self._handles[file].get_tensor(name)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows [start, stop) of a tensor as it is stored, read into memory of their own; all of it for a scalar."""
        spec = self.spec(name)
        shape = spec.shape if start == 0 and stop is None else (min(stop or 0, spec.shape[0]) - start, *spec.shape[1:])
        dtype = TORCH_DTYPES[spec.dtype]
        if not spec.nbytes or 0 in shape:
            return torch.empty(shape, dtype=dtype)
        row = spec.nbytes // spec.shape[0] if spec.shape else spec.nbytes
        data = torch.empty(spec.nbytes if shape == spec.shape else row * shape[0], dtype=torch.uint8)
        self._read_into(data.numpy().data, spec, start * row)
        return data.view(dtype).view(shape)

    def pieces(self, name: str) -> Iterator[memoryview]:
        """The bytes of a tensor in order, a few megabytes at a time; each piece is overwritten by the next."""
        spec = self.spec(name)
        buffer = memoryview(bytearray(min(PIECE_BYTES, spec.nbytes)))
        for done in range(0, spec.nbytes, PIECE_BYTES):
            piece = buffer[: min(PIECE_BYTES, spec.nbytes - done)]
            self._read_into(piece, spec, done)
            yield piece

    def _read_into(self, view: memoryview, spec: TensorSpec, skip: int) -> None:
        self._read_at(view, spec.file, self._offsets[spec.name] + skip)

    def _read_at(self, view: memoryview, file: str, offset: int) -> None:
        """Fills `view` with the bytes of a file from `offset` on."""
        descriptor = self._descriptor(file)
        while view:
            try:
                done = os.preadv(descriptor, [view], offset)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.folder / file)) from None
            if not done:
                starts = ((self._offsets[n], n) for n, spec in self.specs.items() if spec.file == file)
                name = max(start for start in starts if start[0] <= offset)[1]
                raise ValueError(
                    f"{self.folder / file} ended inside {name}: it was cut off after it was opened; fetch it again"
                )
            view, offset = view[done:], offset + done

    def _descriptor(self, file: str) -> int:
        if file not in self._descriptors:
            self._descriptors[file] = os.open(inside(self.folder, file), os.O_RDONLY | os.O_CLOEXEC)
        return self._descriptors[file]

    def narrow(self, names: set[str]) -> Self:
        """This folder with those tensors alone, no file open: small enough to send to another process."""
        part = copy.copy(self)
        part.index, part._handles, part._descriptors = {}, {}, {}
        part.specs = {n: self.specs[n] for n in sorted(names)}
        part._offsets = {n: self._offsets[n] for n in part.specs}
        return part

    def close(self) -> None:
        """Closes the files that `rows` and `pieces` opened."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])
