"""Programmatic dependent launch of the kernels of a decode step: a kernel starts while the one before it still runs.

A decode step is some hundred short kernels, so that the gaps between them and the first wait for memory of each are as
long as their work. A kernel launched with `dependent` may begin before its predecessor has ended; it computes addresses
and asks for its weights, then waits until the predecessor is complete and its writes are visible.

Rules, for every kernel that takes the keywords of `dependent`, Triton's and those of `cuda` alike:

1. Every thread waits, also one that exits early, before it stores anything and before it loads what a kernel of a step
   writes. Not only what the predecessor wrote: the caching allocator hands its buffers on, so that an early store would
   overwrite what a predecessor still reads. No thread passes before the whole predecessor is complete, and all of the
   predecessor waited for its own; so after the wait everything earlier is complete.
2. Before it a thread may load what no kernel of a step writes: weights, which have been written long before. Triton's
   kernels prefetch theirs: nothing there keeps the compiler from moving a load across the wait, nor a use of it before.
   A prefetch brings a line into the second-level cache, which all multiprocessors and all kernels share, so it cannot
   return an old value, whoever writes the line and whenever. Early loads of CUDA kernels are volatile assembly without
   `.nc`: ptxas moves the wait before loads through the read-only path, and what was meant to be early is late.
3. A kernel lets its successor begin at once, before its own wait, unless its source says otherwise. So several kernels
   may be ahead. The blocks of the next one come when all blocks of this one have let them, hence are on
   multiprocessors: each kernel is placed completely before the next one's blocks come, and nobody who waits takes the
   place of somebody who is waited for.
4. A kernel that waits first and then lets its successor begin is a border: whatever began behind it finds complete all
   that came before it. Two kernels load early what a step does write, and rely on one. `attend` of window.cu reads its
   ring and the position, which the pass before has written: the border is `rows.begin`, the first kernel of a pass.
   `experts` of moe.cu reads its rows and their positions, which are older than the router's logits: those are the
   border. Where torch's own kernels stand between, each of them is one. (`attend` and `experts` are borders as well, to
   keep the weights of what follows out of their way: `experts` in the last turn of a block.)

A kernel launched without the keywords, by torch, begins after the one before it has ended, as ever; and one that lets
nobody begin has a successor that begins when it ends.

It is on where it can be, from compute capability 9 on. MIMO_KERNELS_PDL=0 in the environment turns it off, to compare;
it is read once a process. When off, kernels are launched one after the other, and the code of Triton's has no trace of
it. Bits are the same.
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
    """Whether the environment allows it: all but MIMO_KERNELS_PDL=0."""
    return os.environ.get("MIMO_KERNELS_PDL", "1") != "0"


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
    """With PDL: lets the next kernel begin, then waits until the one before is complete."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def wait_first(PDL: tl.constexpr):
    """With PDL: waits until the kernel before is complete, then lets the next one begin."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


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
