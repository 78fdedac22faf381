"""Programmatic dependent launch of the kernels of a decode step: a kernel starts while the one before it still runs.

A decode step is some hundred short kernels, so that the gaps between them and the first wait for memory of each are as
long as their work. A kernel launched with `dependent` may begin before its predecessor has ended; it computes addresses
and asks for its weights, then waits until the predecessor is complete and its writes are visible.

Rules, for every kernel that takes the keywords of `dependent`:

1. Every program calls `wait`, also one that exits early, before it loads anything and before it stores anything. Not
   only what the predecessor wrote: the caching allocator hands its buffers on, so that an early store would overwrite
   what a predecessor still reads. No program passes before the whole predecessor is complete, which waited for its own
   predecessor, so everything earlier is complete as well.
2. Before it a program computes addresses, and may `prefetch` what lies at addresses that no earlier kernel computes:
   weights, or a ring of keys that is read whole. A prefetch brings a line into the second-level cache, which all
   multiprocessors and all kernels share, so it cannot return an old value, whoever writes the line and whenever. Loads
   before the wait could, and are not allowed.
3. `wait` lets the successor begin at once after it. Then all programs of this kernel are on multiprocessors, so that
   waiting programs of the successor take no place from them, and only one kernel is ahead.

A kernel launched without the keywords, by torch or by `allreduce_triton`, begins after the one before it has ended, as
ever; and one that never calls `wait` lets its successor begin when it ends.

MIMO_KERNELS_PDL=1 in the environment turns it on; it is read once a process. It is off otherwise, because no GPU has
run it yet and what could go wrong, a race, shows neither in Triton's interpreter nor in compiled code. When off,
kernels are launched one after the other and their code has no trace of it. Off below compute capability 9 in any case.
"""

import os
from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LINE_BYTES = tl.constexpr(128)  # of the second-level cache, and of a prefetch
_PREFETCH_BYTES = 2**16  # a program: three on each of 132 multiprocessors ask for half of an H200's second-level cache


@cache
def switched_on() -> bool:
    """Whether the environment allows it."""
    return os.environ.get("MIMO_KERNELS_PDL", "0") == "1"


@cache
def _capable(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] >= 9


def dependent(x: torch.Tensor) -> dict[str, bool]:
    """Keywords of a kernel's launch on the device of x: the constant PDL, and Triton's own option."""
    if x.is_cuda and switched_on() and _capable(x.device):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


def prefetched_lines(rows: int, row_bytes: int) -> int:
    """How many cache lines of each of `rows` rows of `row_bytes` a program asks for: all, up to 64 KB in total."""
    return min(row_bytes, _PREFETCH_BYTES // rows) // LINE_BYTES.value


@triton.jit
def wait(PDL: tl.constexpr):
    """With PDL: until the kernel before is complete. Then lets the next one begin."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def prefetch(at):
    """Asks for the cache lines at the pointers `at`, which have to be inside of a tensor."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // no value in $0", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def prefetch_span(at, SIZE: tl.constexpr):
    """Asks for the cache lines of SIZE elements side by side, from the pointer `at` on."""
    STEP: tl.constexpr = LINE_BYTES * 8 // at.dtype.element_ty.primitive_bitwidth
    for first in tl.static_range(0, SIZE, 128 * STEP):
        prefetch(at + tl.minimum(first + tl.arange(0, 128) * STEP, SIZE - 1))


@triton.jit
def prefetch_rows(at, LINES: tl.constexpr, STEP: tl.constexpr):
    """Asks for LINES cache lines, STEP elements each, of every row at the pointers `at` [rows]."""
    BLOCK: tl.constexpr = LINES & -LINES  # tl.arange takes a power of two
    for first in tl.static_range(0, LINES, BLOCK):
        prefetch(at[:, None] + (first + tl.arange(0, BLOCK))[None, :] * STEP)
