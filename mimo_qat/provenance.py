"""What every output folder records about its making, and how files are written: whole or not at all."""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "safetensors", "huggingface_hub", "triton", "deepspeed")


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is synced and renamed, on an error it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def put_in_place(work: Path, folder: Path) -> None:
    """`work` takes the name `folder`; where that is there already its files move in, each whole, config.json last."""
    if not folder.exists():
        work.rename(folder)
        return
    for path in sorted((p for p in work.rglob("*") if p.is_file()), key=lambda p: (p.name == "config.json", p)):
        place = folder / path.relative_to(work)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)
    shutil.rmtree(work)


def write_json(path: str | Path, document: Any) -> None:
    """Writes `document` as indented JSON, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(document, indent=2) + "\n")


def with_earlier(records: list[dict[str, Any]], path: str | None, rows: str) -> list[dict[str, Any]]:
    """`records`, then those of the file `path` that they do not measure again; names that begin with `rows` are rows.

    A row says something beside the other rows of its commit, so it is only replaced by one of the same commit.
    """

    def mark(record: dict[str, Any]) -> tuple[str, str]:
        return record["name"], record["commit"] if record["name"].startswith(rows) else ""

    known = {mark(record) for record in records}
    earlier = json.loads(Path(path).read_text()) if path else []
    return records + [record for record in earlier if mark(record) not in known]


def hardware() -> dict[str, Any]:
    """Processor, cores, memory and GPUs of this machine."""
    import torch

    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux, or a processor that states no name: the architecture has to do
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpus": gpus}


def resident_bytes(peak: bool = False) -> int:
    """Memory that this process has now, or had at most, in bytes. (Of a new program the kernel's ru_maxrss begins with
    the size of the process that started it.)"""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:" if peak else "VmRSS:")[1].split()[0])


def versions() -> dict[str, str]:
    """Python's version and those of the packages that shape results; a package that is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit of the source tree, with "+dirty" for uncommitted changes; the package version outside a checkout.

    MIMO_QAT_COMMIT says it where the tree was copied without its history.
    """
    if os.environ.get("MIMO_QAT_COMMIT"):
        return os.environ["MIMO_QAT_COMMIT"]
    root = Path(__file__).parents[1]

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=True).stdout

    try:
        if Path(git("rev-parse", "--show-toplevel").strip()).resolve() != root.resolve():
            raise OSError("installed inside somebody else's checkout")
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        try:
            return "v" + metadata.version("mimo-qat")
        except metadata.PackageNotFoundError:
            return "unknown"


def command_line() -> str:
    """The command that runs, as a shell reads it, with the program's name instead of its path."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = spec.name.removesuffix(".__main__") if spec and spec.name != "__main__" else None
    program = ["python", "-m", module] if module else [Path(sys.argv[0]).name]
    return shlex.join([*program, *sys.argv[1:]])


def write_provenance(folder: str | Path, config: Any, command: str | None = None) -> None:
    """Writes `provenance.json`: the command, the whole configuration, commit, versions and hardware."""
    document = {
        "command": command or command_line(),
        "config": asdict(config) if is_dataclass(config) and not isinstance(config, type) else config,
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(),
    }
    write_json(Path(folder) / "provenance.json", document)


class JsonlLog:
    """Metrics as one JSON object a line, flushed at once. `keep_until` drops the lines of steps that a resumed
    run computes again."""

    def __init__(self, path: str | Path, keep_until: int = 0):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if keep_until and self.path.exists():
            lines = self.path.read_text().splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= keep_until]
        self.path.write_text("".join(line + "\n" for line in kept))

    def write(self, **values: Any) -> None:
        """Appends one line; give `step` first."""
        with open(self.path, "a") as file:
            file.write(json.dumps(values) + "\n")
