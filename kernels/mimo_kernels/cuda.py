"""CUDA C++ kernels of this package: compiled by NVRTC when they are first used, launched on torch's current stream.

A kernel is a function of a `.cu` file beside this one. Shapes are macros, so that loops have constant bounds; what
changes from call to call is an argument. NVRTC and the driver are reached through NVIDIA's `cuda.bindings`, which
torch's CUDA builds bring along; no compiler and no headers of the user's machine take part.

Triton's kernels stay beside these: they are the other opinion in tests, and what runs where a shape does not fit.
"""

import ctypes
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

ARCH = "sm_90a"


@dataclass(frozen=True)
class Kernel:
    """The function `name` of the file `source`, with `shapes` as macros, and the size of its blocks."""

    source: str
    name: str
    shapes: tuple[tuple[str, int], ...]
    threads: int
    shared: int = 0  # bytes of dynamic shared memory


@cache
def usable(device: torch.device) -> bool:
    """Whether these kernels run on `device`: a GPU of compute capability 9 and NVIDIA's bindings."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    try:
        import cuda.bindings.driver
        import cuda.bindings.nvrtc  # noqa: F401
    except ImportError:
        warnings.warn(
            "cuda-bindings is missing, so Triton's kernels run instead: pip install cuda-bindings", stacklevel=2
        )
        return False
    return True


@cache
def cubin(source: str, shapes: tuple[tuple[str, int], ...]) -> bytes:
    """Machine code of `source`. RuntimeError with the compiler's words when it does not compile."""
    from cuda.bindings import nvrtc

    folder = Path(__file__).parent
    text, header = (folder / source).read_bytes(), (folder / "ptx.cuh").read_bytes()
    options = [f"--gpu-architecture={ARCH}", "--std=c++17", *(f"-D{name}={value}" for name, value in shapes)]
    program = _values(nvrtc.nvrtcCreateProgram(text, source.encode(), 1, [header], [b"ptx.cuh"]))
    try:
        (code,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
        if int(code) != 0:
            log = b" " * _values(nvrtc.nvrtcGetProgramLogSize(program))
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"{source} with {dict(shapes)} does not compile:\n{log.decode()}")
        out = b" " * _values(nvrtc.nvrtcGetCUBINSize(program))
        _values(nvrtc.nvrtcGetCUBIN(program, out))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return out


@cache
def _function(kernel: Kernel, device: int) -> Any:
    """The loaded function on GPU number `device`, whose context is current."""
    from cuda.bindings import driver

    module = _values(driver.cuModuleLoadData(cubin(kernel.source, kernel.shapes)))
    function = _values(driver.cuModuleGetFunction(module, kernel.name.encode()))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _values(driver.cuFuncSetAttribute(function, attribute, kernel.shared))
    return function


def launch(kernel: Kernel, blocks: int, args: Sequence[torch.Tensor | int | float], *, dependent: bool) -> None:
    """Launches `blocks` blocks on the device of the first argument, a tensor. Integers are int, floats are float.

    With `dependent`, blocks may begin before the kernel before has ended, see `launch`.
    """
    from cuda.bindings import driver

    first = args[0]
    assert isinstance(first, torch.Tensor)
    with torch.cuda.device_of(first):
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = kernel.threads, 1, 1
        config.sharedMemBytes = kernel.shared
        config.hStream = torch.cuda.current_stream().cuda_stream
        if dependent:
            early = driver.CUlaunchAttribute()
            early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            early.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [early], 1
        _values(driver.cuLaunchKernelEx(config, _function(kernel, first.device.index), _packed(args), 0))


@cache
def multiprocessors(device: torch.device) -> int:
    """How many the device has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def _packed(args: Sequence[torch.Tensor | int | float]) -> tuple[tuple, tuple]:
    """Arguments as the bindings take them: values and C types."""
    values = tuple(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args)
    types: dict[type, Any] = {int: ctypes.c_int, float: ctypes.c_float}
    return values, tuple(ctypes.c_void_p if isinstance(a, torch.Tensor) else types[type(a)] for a in args)


def _values(result: tuple) -> Any:
    """What a call of the bindings gave beside its code. RuntimeError for a code that is not 0."""
    code, *values = result
    if int(code) != 0:
        raise RuntimeError(f"CUDA: {code.name}")
    return values[0] if len(values) == 1 else values
