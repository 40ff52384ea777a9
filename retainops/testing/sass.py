"""NVIDIA machine code (SASS): disassemble a cubin, and parse and classify its instructions.

The tools are those in triton's wheel, so no CUDA toolkit is needed.
"""

from __future__ import annotations

import functools
import hashlib
import re
import struct
import subprocess
import tempfile
from dataclasses import dataclass

import triton

_LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;\s*/\* (0x[0-9a-f]{16}) \*/"
)
_MORE = re.compile(r"^\s*/\* (0x[0-9a-f]{16}) \*/\s*$")  # the upper half of the instruction above
_GLOBAL = ("LDG", "STG", "LDGSTS", "LD", "ST", "RED", "REDG", "ATOM", "ATOMG")
_ON_CHIP = ("LDL", "STL", "LDS", "STS", "ATOMS")


@dataclass(frozen=True)
class Instruction:
    """One machine instruction: `@!P0 LDG.E.128 R4, desc[UR4][R2.64]` has guard "!P0" and opcode "LDG.E.128"."""

    address: int
    guard: str
    opcode: str
    operands: str
    encoding: str

    @property
    def base(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def is_constant_load(self) -> bool:
        """A load from a table in the constant bank, such as the 2/pi of the slow path of sin and cos."""
        return self.base == "LDG" and ".CONSTANT" in self.opcode

    @property
    def is_global(self) -> bool:
        """Whether it reads or writes a tensor."""
        return self.base in _GLOBAL and not self.is_constant_load

    @property
    def bits(self) -> int:
        """Width of a memory access for one thread, 0 for anything else."""
        if self.base not in _GLOBAL + _ON_CHIP:
            return 0
        width = re.search(r"\.(?:[USBF]|BF)?(8|16|32|64|128|256)(?=\.|$)", self.opcode)
        return int(width[1]) if width else 32

    @property
    def access(self) -> str | None:
        """How `KernelReport.accesses` counts it: "LDG.128", "LDG.CONSTANT.32", "LDSM", ..., None for arithmetic."""
        if self.bits:
            return f"{self.base}{'.CONSTANT' * self.is_constant_load}.{self.bits}"
        return self.base if re.match(r"UTMA|UBLK|LDSM|STSM", self.base) else None

    @property
    def target(self) -> int:
        """Where a branch or call goes."""
        address = re.search(r"0x([0-9a-f]+)", self.operands)
        if address is None:
            raise ValueError(f"sass: cannot follow the indirect jump `{self.opcode} {self.operands}`")
        return int(address[1], 16)

    @property
    def condition(self) -> str:
        """The predicate that a branch waits for: its guard, or the first operand in `BRA.U !UP0, 0x80`."""
        operand = re.match(r"(!?U?P\d)\s*,", self.operands)
        return " & ".join(filter(None, (self.guard, operand and operand[1])))


@functools.lru_cache(maxsize=256)
def disassemble(cubin: bytes) -> str:
    """The text of a cubin's machine code, by the cuobjdump in triton's wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def parse(text: str) -> list[Instruction]:
    """The instructions in cuobjdump's text, NOPs included (one can be where a branch goes).

    Raises:
        ValueError: there are none, so this is not cuobjdump's text or the format has changed.
    """
    code: list[Instruction] = []
    for line in text.splitlines():
        if found := _LINE.match(line):
            address, guard, opcode, operands, encoding = found.groups()
            operands = re.sub(r"\s*[&?]\w+=?.*", "", operands)  # scheduling, which newer cuobjdumps append
            code.append(Instruction(int(address, 16), guard or "", opcode, operands, encoding))
        elif (more := _MORE.match(line)) and code:
            last = code[-1]
            code[-1] = Instruction(last.address, last.guard, last.opcode, last.operands, last.encoding + more[1])
    if not code:
        raise ValueError(f"sass.parse: no instruction in the text, which begins {text[:80]!r}")
    return code


def machine_code(cubin: bytes) -> str:
    """sha256 of a cubin's instructions alone, the `.text` sections: no names, no line numbers, no parameters."""
    if cubin[:6] != b"\x7fELF\x02\x01":
        raise ValueError(f"sass.machine_code: not a cubin (a 64-bit ELF file); it begins {cubin[:16]!r}")
    (table,) = struct.unpack_from("<Q", cubin, 0x28)  # e_shoff; then e_shentsize, e_shnum, e_shstrndx
    size, count, names_at = struct.unpack_from("<3H", cubin, 0x3A)
    # Of each section header: sh_name, sh_offset, sh_size.
    sections = [struct.unpack_from("<I20x2Q", cubin, table + k * size) for k in range(count)]
    names = sections[names_at][1]
    digest = hashlib.sha256()
    for name, offset, length in sections:
        if cubin.startswith(b".text.", names + name):
            digest.update(cubin[offset : offset + length])
    return digest.hexdigest()
