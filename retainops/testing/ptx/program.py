"""What a PTX module is after parsing: a `Program` of `Instruction`s whose operands are resolved."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Union

from retainops.testing.ptx.types import PTXError, Type

WINDOW = 40  # every global variable and tensor has a window of 2**40 bytes of the address space to itself


@dataclass(frozen=True)
class Register:
    """A register by its number, and how many bits it holds (1 for a predicate)."""

    slot: int
    bits: int


@dataclass(frozen=True)
class Immediate:
    """A constant: an integer, the bits of a floating-point one, or the address of a variable."""

    value: int


@dataclass(frozen=True)
class Special:
    """A read-only register of the hardware, such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Address:
    """`[base + offset]`."""

    base: Register | Immediate
    offset: int


@dataclass(frozen=True)
class Target:
    """A label, or a function's first instruction."""

    pc: int


@dataclass(frozen=True)
class Vector:
    """Several operands in the place of one: `{a, b}`, `(a, b)` or `a|b`; None stands for the sink `_`."""

    items: tuple[Operand | None, ...]


@dataclass(frozen=True)
class Negated:
    """`!%p` as a source operand."""

    register: Register


Operand = Union[Register, Immediate, Special, Address, Target, Vector, Negated, "Variable", "Function"]


@dataclass(frozen=True)
class Variable:
    """A named piece of memory: where it starts in its state space, and its bytes or their number."""

    name: str
    space: str
    address: int
    size: int
    type: Type | None = None
    data: bytes = b""


@dataclass
class Function:
    """A function of the module; `pc` stays None when only its declaration is there."""

    name: str
    pc: int | None = None
    returns: tuple[Variable, ...] = ()
    params: tuple[Variable, ...] = ()


@dataclass(frozen=True)
class Instruction:
    """One instruction: `@guard name.modifiers.types operands;`."""

    text: str
    line: int
    source: str  # "file.py:12", where Triton says so
    function: Function
    pc: int
    guard: Register | None
    guard_negated: bool
    name: str
    modifiers: tuple[str, ...]
    types: tuple[Type, ...]
    operands: tuple[Operand, ...]

    @property
    def type(self) -> Type:
        """The last type of the opcode: that of the sources."""
        if not self.types:
            raise PTXError(f"{self.name} without a type")
        return self.types[-1]

    @property
    def opcode(self) -> str:
        """The opcode in full, such as "ld.global.v4.b32"."""
        return next(word for word in self.text.split() if not word.startswith("@"))

    @property
    def where(self) -> str:
        """The instruction and its place, for an error."""
        origin = f", from {self.source}" if self.source else ""
        return f"{self.text}  (PTX line {self.line}{origin})"


@dataclass
class Program:
    """A parsed module and the sizes of the memories it needs."""

    code: list[Instruction] = field(default_factory=list)
    kernel: Function = field(default_factory=lambda: Function(""))
    registers: list[int] = field(default_factory=list)  # bits of each
    variables: list[Variable] = field(default_factory=list)  # .global and .const, in order of their windows
    sizes: dict[str, int] = field(default_factory=lambda: {"local": 0, "param": 0, "shared": 0})
    threads: int | None = None  # what .reqntid asks for
