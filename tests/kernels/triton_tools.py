"""Triton kernels without a GPU: in the interpreter, in a process of their own, and as machine code for an H200."""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_kernels_in_the_interpreter")
outside = pytest.mark.skipif(INTERPRETED, reason="this is the interpreter process")

TRITON = importlib.util.find_spec("triton")
CUOBJDUMP = Path(TRITON.origin).parent / "backends/nvidia/bin/cuobjdump" if TRITON else Path("cuobjdump")
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);")
needs_tools = pytest.mark.skipif(not CUOBJDUMP.exists(), reason="no triton package with cuobjdump")


def pass_in_the_interpreter(file, count):
    """Runs the `inside` tests of a file. Triton reads the variable when it is first imported."""
    triton = pytest.importorskip("triton")
    numpy = importlib.metadata.version("numpy")
    if triton.__version__.startswith("3.6.") and tuple(map(int, numpy.split(".")[:2])) >= (2, 4):
        pytest.skip(f"the interpreter of triton 3.6 cannot loop up to a loaded value with numpy {numpy}; 2.3 works")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0 and f"{count} passed" in run.stdout, run.stdout[-4000:] + run.stderr[-2000:]


def compiled_for_sm90(kernel, pointers, constants, warps, stages):
    """What Triton makes for an H100 or H200; with programmatic dependent launch unless the constants say otherwise."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    constants = {name: True for name in ("PDL",) if name in names} | constants
    signature = {n: pointers.get(n) or ("constexpr" if n in constants else "i32") for n in names}
    # Tensors start at multiples of 16 bytes. Without that promise Triton would load bytes, and the counts mean nothing.
    # So do strides, where a kernel has any.
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in pointers or n.endswith("_stride")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def compile_for_sm90(kernel, pointers, constants, warps, stages):
    """(instructions (address, opcode, arguments), registers a thread, bytes of shared memory) for an H100 or H200."""
    compiled = compiled_for_sm90(kernel, pointers, constants, warps, stages)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        listing, usage = (
            subprocess.run([CUOBJDUMP, flag, f.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-sass", "-res-usage")
        )
    code = [(int(at, 16), op, rest) for at, op, rest in INSTRUCTION.findall(listing)]
    return code, int(re.search(r"REG:(\d+)", usage).group(1)), compiled.metadata.shared


def main_loop(code):
    """Opcodes of the smallest loop (a branch back) that multiplies matrices."""
    jumps = [(int(re.search(r"0x([0-9a-f]+)", rest).group(1), 16), at) for at, op, rest in code if op == "BRA"]
    bodies = ([op for at, op, _ in code if first <= at <= last] for first, last in jumps if first < last)
    return min((b for b in bodies if any("MMA.16816" in op or "GMMA" in op for op in b)), key=len)


def spills(code):
    """Instructions that move registers to memory and back."""
    return [op for _, op, _ in code if op.startswith(("LDL", "STL"))]
