"""Runs the kernels of `mimo_kernels/*.cu` on a processor, for tests: `emulator.h` stands in for CUDA and for `ptx.cuh`.

Launchers call `cuda.launch` as ever; the fixture of a test replaces it by `launch`, and tensors stay in host memory.
"""

import ctypes
import hashlib
import itertools
import shutil
import subprocess
import tempfile
import threading
from functools import cache
from pathlib import Path

import pytest

from mimo_kernels import cuda

HERE, KERNELS = Path(__file__).parent, Path(cuda.__file__).parent
COMPILING = threading.Lock()
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="g++ is missing")


@cache
def library(
    source: str, name: str, shapes: tuple[tuple[str, int], ...], change: tuple[str, str] = ("", "")
) -> ctypes.CDLL:
    """The kernel compiled for this processor; of `change` (old, new) the first old in its text is made new."""
    text = (KERNELS / source).read_text()
    assert change[0] in text
    for old, new in (change, ('#include "ptx.cuh"\n', ""), ("extern __shared__ uint4 shared[];", "")):
        text = text.replace(old, new, 1) if old else text
    call = 'extern "C" int run(void** args, int blocks, int threads, unsigned seed, bool together) '
    call += f"{{ return emulate({name}, args, blocks, threads, seed, together, {dict(shapes).get('CLUSTER', 1)}); }}"
    text = f'#include "{HERE}/emulator.h"\n{text}\n{call}\n'
    folder = Path(tempfile.gettempdir()) / f"emulated-{hashlib.sha256((text + str(shapes)).encode()).hexdigest()[:16]}"
    folder.mkdir(exist_ok=True)
    (folder / "kernel.cpp").write_text(text)
    out = folder / "kernel.so"
    command = ["g++", "-std=c++17", "-O2", "-shared", "-fPIC", "-pthread", "-w", "-fno-gnu-unique"]
    command += [*(f"-D{n}={v}" for n, v in shapes), str(folder / "kernel.cpp"), "-o", str(out)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(out))


class Emulated:
    """`cuda.launch` with its arguments; `seed` draws the order of threads, `together` runs all blocks at once."""

    def __init__(self, seed: int = 0, together: bool = False, change: tuple[str, str] = ("", "")):
        self.seed, self.together, self.change = seed, together, change
        self.calls = itertools.count()  # so that ranks, which call at once, have orders of their own

    def __call__(self, kernel: cuda.Kernel, blocks: int, args, *, dependent: bool) -> None:
        values, types = cuda._packed(args)
        held = [t(v) for v, t in zip(values, types, strict=True)]
        pointers = (ctypes.c_void_p * len(held))(*(ctypes.cast(ctypes.byref(h), ctypes.c_void_p) for h in held))
        with COMPILING:  # ranks call at once
            run = library(kernel.source, kernel.name, kernel.shapes, self.change).run
        seed = ctypes.c_uint(self.seed + 1000 * next(self.calls))
        assert run(pointers, blocks, kernel.threads, seed, self.together) == 0, (
            "nobody can go on, or one wrote to who was not there"
        )


@pytest.fixture
def emulated(monkeypatch):
    """emulated(seed, together, multiprocessors, change): from now on kernels run here."""

    def begin(
        seed: int = 0, together: bool = False, multiprocessors: int = 2, change: tuple[str, str] = ("", "")
    ) -> None:
        monkeypatch.setattr(cuda, "launch", Emulated(seed, together, change))
        monkeypatch.setattr(cuda, "multiprocessors", lambda device: multiprocessors)

    return begin
