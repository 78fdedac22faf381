"""One thread of the PTX that `mimo_kernels.allreduce_triton` puts into its kernels, executed in Python.

Triton's interpreter has no inline assembly. This has the instructions that those few lines use, on 64-bit integers for
registers, and raises KeyError for any other.
"""

import re
import struct
from collections.abc import Callable

import torch

LOW32 = 2**32 - 1


def as_float(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits & LOW32))[0]


def as_bits(value: torch.Tensor) -> int:
    return int(value.view(torch.int32)) & LOW32


def bf16(bits: int) -> int:
    return int(torch.tensor(as_float(bits)).bfloat16().view(torch.int16)) & 0xFFFF


class Thread:
    """`operands` are the values of $0, $1, ...; memory is read and written, 8 bytes at a time, by the two functions.

    A clock ticks once a look. `run` returns the operands after it.
    """

    def __init__(self, operands: list[int], load: Callable[[int], int], store: Callable[[int, int], None]):
        self.registers = {f"${i}": value for i, value in enumerate(operands)}
        self.load_word, self.store_word, self.clock = load, store, 0

    def value(self, name: str) -> int:
        if name == "%clock64":
            self.clock += 1
            return self.clock
        return int(name, 0) if re.match(r"-?\d", name) else self.registers[name]

    def address(self, text: str) -> int:
        return sum(self.value(part.strip()) for part in text.strip("[]").split("+"))

    def run(self, text: str) -> list[int]:
        body = re.sub(r"^\s*\{|\}\s*$", "", text)
        lines = [part.strip() for part in re.sub(r"(\w+):", r"\1:;", body).split(";") if part.strip()]
        labels = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
        at = 0
        while at < len(lines):
            line, at = lines[at], at + 1
            if line.endswith(":") or line.startswith(".reg"):
                continue
            if guard := re.match(r"@(!?)(\w+)\s+(.*)", line, re.DOTALL):
                if bool(self.registers[guard[2]]) == (guard[1] == "!"):
                    continue
                line = guard[3]
            opcode, rest = line.split(None, 1)
            if opcode == "bra":
                at = labels[rest]
            else:
                operands = [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s]+", rest)]
                self.step(opcode, operands)
        return [self.registers[f"${i}"] for i in range(sum(name[0] == "$" for name in self.registers))]

    def step(self, opcode: str, operands: list[str]) -> None:
        first, others = operands[0], operands[1:]
        names = [name.strip() for name in first.strip("{}").split(",")]
        if opcode == "ld.relaxed.sys.global.v2.b64":
            for i, name in enumerate(names):
                self.registers[name] = self.load_word(self.address(others[0]) + 8 * i)
        elif opcode == "st.relaxed.sys.global.v2.b64":
            for i, name in enumerate(others[0].strip("{}").split(",")):
                self.store_word(self.address(first) + 8 * i, self.value(name.strip()))
        elif opcode == "mov.b64" and len(names) == 2:
            word = self.value(others[0])
            self.registers |= {names[0]: word & LOW32, names[1]: word >> 32 & LOW32}
        elif opcode == "mov.b64":
            low, high = (self.value(name.strip()) & LOW32 for name in others[0].strip("{}").split(","))
            self.registers[first] = low | high << 32
        elif opcode.startswith("setp"):
            a, b = (
                (self.value(name) & LOW32 for name in others[:2]) if ".s32" in opcode else map(self.value, others[:2])
            )
            _, comparison, *combination, _ = opcode.split(".")
            held = {"eq": a == b, "ne": a != b, "lt": a < b}[comparison]
            if combination:
                other = bool(self.registers[others[2]])
                held = {"or": held or other, "and": held and other}[combination[0]]
            self.registers[first] = int(held)
        else:
            a, *more = (self.value(name) for name in others)
            self.registers[first] = {
                "mov.b32": lambda: a & LOW32,
                "mov.u64": lambda: a,
                "add.u64": lambda: a + more[0],
                "shl.b32": lambda: a << more[0] & LOW32,
                "and.b32": lambda: a & more[0],
                "add.rn.f32": lambda: as_bits(torch.tensor(as_float(a)) + torch.tensor(as_float(more[0]))),
                "cvt.rn.bf16x2.f32": lambda: bf16(a) << 16 | bf16(more[0]),
            }[opcode]()
