"""Machine code of CUDA kernels, read without a GPU: instructions, the paths between them, loops, resources."""

import re
import subprocess
import tempfile
from dataclasses import dataclass

from tests.kernels.triton_tools import CUOBJDUMP

LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);")
TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
# Constants (LDC, ULDC) are the arguments; LDS and STS are shared memory.
GLOBAL = re.compile(r"LDG\b|LD\.|STG|ST\.|LDGSTS|ATOMG|REDG|ATOM\.|RED\.|UBLKCP|UTMA")


@dataclass(frozen=True)
class Instruction:
    at: int
    guard: str  # a predicate, or empty
    op: str
    rest: str

    @property
    def target(self) -> int:
        return int(TARGET.search(self.rest).group(1), 16)

    @property
    def barrier(self) -> str:
        """Of BSSY and BSYNC."""
        return self.rest.split(",")[0].strip()

    @property
    def is_conditional(self) -> bool:
        return bool(self.guard) or self.op.startswith("BRA.U") or re.match(r"\s*!?U?P\d", self.rest) is not None

    @property
    def is_global(self) -> bool:
        """Whether it reads or writes what other kernels see. Prefetches (CCTL) do neither."""
        return bool(GLOBAL.match(self.op))


@dataclass(frozen=True)
class Machine:
    """One kernel. `local` bytes of a thread hold what its registers do not."""

    code: list[Instruction]
    registers: int
    local: int
    shared: int  # bytes, static

    def named(self, op: str) -> list[int]:
        return [i for i, instruction in enumerate(self.code) if instruction.op.split(".")[0] == op]

    def reached_without(self, op: str) -> list[Instruction]:
        """All that some thread may come to, from the beginning on, without passing `op`.

        A conditional branch leads both ways, a call comes back. BSYNC goes on where the BSSY before it of the same
        barrier said, so what a path has seen of those is part of where it is.
        """
        index = {instruction.at: i for i, instruction in enumerate(self.code)}
        barred, seen, todo = set(self.named(op)), set(), [(0, ())]
        while todo:
            i, meetings = here = todo.pop()
            if i in barred or here in seen:
                continue
            seen.add(here)
            instruction = self.code[i]
            kind = instruction.op.split(".")[0]
            if kind == "BSSY":
                others = tuple(m for m in meetings if m[0] != instruction.barrier)
                meetings = tuple(sorted((*others, (instruction.barrier, instruction.target))))
            elif kind == "BRA":
                todo.append((index[instruction.target], meetings))
            elif kind == "BSYNC":
                todo.append((index[dict(meetings)[instruction.barrier]], meetings))
            ends = kind in ("EXIT", "RET", "BSYNC") or (kind == "BRA" and not instruction.op.startswith("BRA.DIV"))
            if (not ends or instruction.is_conditional) and i + 1 < len(self.code):
                todo.append((i + 1, meetings))
        return [self.code[i] for i in sorted({i for i, _ in seen})]

    def loops(self) -> list[list[Instruction]]:
        """Bodies of the loops that multiply matrices (of branches back), the shortest first."""
        spans = {(i.target, i.at) for i in self.code if i.op.split(".")[0] == "BRA" and i.target < i.at}
        bodies = ([i for i in self.code if first <= i.at <= last] for first, last in sorted(spans))
        return sorted((b for b in bodies if any(i.op.startswith("HMMA") for i in b)), key=len)


def read(cubin: bytes) -> dict[str, Machine]:
    """The kernels in machine code, by name."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        listing, usage = (
            subprocess.run([CUOBJDUMP, flag, f.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-sass", "-res-usage")
        )
    parts = re.split(r"Function : (\w+)\n", listing)
    kernels = {}
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        code = [Instruction(int(at, 16), guard, op, rest) for at, guard, op, rest in LINE.findall(text)]
        numbers = re.search(rf"Function {name}:\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
        registers, stack, shared, local = map(int, numbers.groups())
        kernels[name] = Machine(code, registers, stack + local, shared)
    return kernels
