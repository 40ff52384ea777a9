"""PTX text to a `Program`: instructions whose operands are resolved to registers, addresses and targets.

The functions of a module are laid out one after the other, so a program counter is an index into `Program.code`.
Registers, labels and variables are looked up in nested scopes (module, function, `{ ... }` of an inline-assembly
block), as PTX scopes them.
"""

from __future__ import annotations

import re
import struct
from collections import ChainMap
from collections.abc import Iterator
from dataclasses import dataclass

from retainops.testing.ptx.program import (
    WINDOW,
    Address,
    Function,
    Immediate,
    Instruction,
    Negated,
    Operand,
    Program,
    Register,
    Special,
    Target,
    Variable,
    Vector,
)
from retainops.testing.ptx.types import TYPES, PTXError

Scope = ChainMap[str, Operand]

_COMMENT = re.compile(r"/\*.*?\*/|^(?!\s*\.loc\b)([^\n]*?)//[^\n]*", re.S | re.M)
_DEBUG = re.compile(r"\.section\s[^{]*\{[^}]*\}")
_TOKEN = re.compile(
    r"""(?P<skip>\s+|\.(?:version|target|address_size|file)\b[^\n]*|\.(?:visible|extern|weak)\b|\.pragma[^;]*;)
    |\.loc\b(?P<loc>[^\n]*)
    |\.(?P<kind>entry|func)\b(?P<header>[^{;]*)(?P<opens>[{;])
    |\.(?P<space>global|const|shared|local|param|reg)\b(?P<declared>[^;]*);
    |(?P<brace>[{}])
    |(?P<label>[$\w]+):(?!:)
    |(?P<statement>[@a-z][^;]*);""",
    re.X,
)
_STATEMENT = re.compile(r"(?:@(!?)\s*([%$\w]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
_FLOAT_BITS = re.compile(r"0[fFdD]([0-9A-Fa-f]{8}|[0-9A-Fa-f]{16})$")
_INTEGER = re.compile(r"(-?)(0[xX][0-9A-Fa-f]+|\d+)U?$")


def parse(text: str) -> Program:
    """Parses a PTX module that holds one kernel.

    Raises:
        PTXError: the text is not PTX as LLVM prints it, or names something that is not declared.
    """
    return _Parser(text).parse()


@dataclass
class _Statement:
    text: str
    line: int
    source: str
    scope: Scope


class _Parser:
    def __init__(self, text: str) -> None:
        def blank(match: re.Match[str]) -> str:
            return (match.group(1) if match.lastindex else "") + "\n" * match.group().count("\n")

        self.text = _DEBUG.sub(blank, _COMMENT.sub(blank, text))
        self.program = Program()
        self.module: Scope = ChainMap()
        self.scope = self.module
        self.function: Function | None = None
        self.statements: list[_Statement] = []  # of the function being read
        self.source = ""
        self.line = 1

    def parse(self) -> Program:
        position = 0
        while position < len(self.text):
            token = _TOKEN.match(self.text, position)
            if token is None:
                raise PTXError(f"cannot read PTX line {self.line}: {self.text[position : position + 60]!r}")
            self._token(token)
            self.line += token.group().count("\n")
            position = token.end()
        if self.program.kernel.pc is None:
            raise PTXError("no .entry (kernel) in this PTX")
        return self.program

    def _token(self, token: re.Match[str]) -> None:
        if token["loc"] is not None:
            self.source = token["loc"].rpartition("//")[2].strip() if "//" in token["loc"] else ""
        elif token["kind"]:
            self._function(token["kind"], token["header"], token["opens"] == "{")
        elif token["space"]:
            self._declare(token["space"], token["declared"])
        elif token["brace"] == "{":
            self.scope = self.scope.new_child()
        elif token["brace"] == "}":
            self._close()
        elif token["label"]:
            self.scope[token["label"]] = Target(len(self.program.code) + len(self.statements))
        elif token["statement"]:
            line = self.line + token.group().count("\n", 0, token.start("statement") - token.start())
            self.statements.append(_Statement(" ".join(token["statement"].split()), line, self.source, self.scope))

    def _function(self, kind: str, header: str, has_body: bool) -> None:
        match = re.match(r"\s*(?:\(([^)]*)\))?\s*([$\w]+)\s*(?:\(([^)]*)\))?(.*)", header, re.S)
        if match is None:
            raise PTXError(f"cannot read the function header at PTX line {self.line}: {header.strip()[:60]!r}")
        returns, name, params, attributes = match.groups()
        function = self.module.setdefault(name, Function(name))
        assert isinstance(function, Function)
        if not has_body:
            return
        self.scope = self.module.new_child()
        self.function, function.pc = function, len(self.program.code)
        function.returns, function.params = self._params(returns), self._params(params)
        if kind == "entry":
            if self.program.kernel.pc is not None:
                raise PTXError(f"two kernels in one module: {self.program.kernel.name} and {name}")
            self.program.kernel = function
            threads = re.search(r"\.reqntid\s+(\d+)", attributes)
            self.program.threads = int(threads[1]) if threads else None

    def _params(self, text: str | None) -> tuple[Variable, ...]:
        declared = (p.strip().removeprefix(".param") for p in (text or "").split(",") if p.strip())
        return tuple(self._variable("param", p) for p in declared)

    def _declare(self, space: str, text: str) -> None:
        if space != "reg":
            self._variable(space, text)
            return
        type_name, names = text.strip().split(None, 1)
        bits = TYPES.get(type_name[1:], TYPES["b64"]).bits  # of wider types no instruction is supported
        for name, count in re.findall(r"([%$\w]+)\s*(?:<(\d+)>)?", names):
            for each in [f"{name}{i}" for i in range(int(count))] if count else [name]:
                self.scope[each] = Register(len(self.program.registers), bits)
                self.program.registers.append(bits)

    def _variable(self, space: str, text: str) -> Variable:
        left, _, initial = text.partition("=")
        match = re.search(r"([$\w]+)\s*(?:\[(\d*)\])?\s*$", left)
        type_ = next((TYPES[w] for w in re.findall(r"\.(\w+)", left) if w in TYPES), None)
        if match is None or type_ is None:
            raise PTXError(f"cannot read the declaration at PTX line {self.line}: .{space}{text[:60]}")
        width = type_.bits // 8
        size = width * (1 if match[2] is None else int(match[2] or 0))
        alignment = re.search(r"\.align\s+(\d+)", left.partition(".ptr")[0])
        if space in ("global", "const"):
            address = (len(self.program.variables) + 1) << WINDOW
        else:
            step = max(int(alignment[1]) if alignment else 1, width)
            address = -(-self.program.sizes[space] // step) * step
            self.program.sizes[space] = address + size
        data = self._initial(initial, width, size) if space in ("global", "const") else b""
        variable = Variable(match[1], space, address, size, type_ if match[2] is None else None, data)
        if data:
            self.program.variables.append(variable)
        self.scope[variable.name] = variable
        return variable

    def _initial(self, text: str, width: int, size: int) -> bytes:
        words = text.strip().strip("{}").split(",") if text.strip() else []
        data = b""
        for word in words:
            value = _number(word.strip())
            if value is None:
                raise PTXError(f"the initial value {word.strip()!r} at PTX line {self.line} is not a number")
            data += (value % (1 << 8 * width)).to_bytes(width, "little")
        return data.ljust(size, b"\0")

    def _close(self) -> None:
        parent = self.scope.parents
        if parent.maps[0] is not self.module.maps[0]:  # the end of a block, not of a function
            self.scope = parent
            return
        assert self.function is not None
        self.statements.append(_Statement("ret", self.line, self.source, self.scope))
        start = len(self.program.code)
        built = [self._instruction(s, start + i) for i, s in enumerate(self.statements)]
        self.program.code += built
        self.scope, self.function, self.statements = self.module, None, []

    def _instruction(self, statement: _Statement, pc: int) -> Instruction:
        match = _STATEMENT.fullmatch(statement.text)
        if match is None or self.function is None:
            raise PTXError(f"cannot read PTX line {statement.line}: {statement.text[:60]!r}")
        negated, guard, opcode, rest = match.groups()
        name, *words = opcode.split(".")
        try:
            operands = tuple(_operand(word, statement.scope) for word in _split(rest))
            guard_register = _operand(guard, statement.scope) if guard else None
        except PTXError as error:
            raise PTXError(f"{error} in PTX line {statement.line}: {statement.text}") from None
        assert guard_register is None or isinstance(guard_register, Register)
        return Instruction(
            text=statement.text,
            line=statement.line,
            source=statement.source,
            function=self.function,
            pc=pc,
            guard=guard_register,
            guard_negated=bool(negated),
            name=name,
            modifiers=tuple(w for w in words if w not in TYPES),
            types=tuple(TYPES[w] for w in words if w in TYPES),
            operands=operands,
        )


def _split(text: str) -> Iterator[str]:
    """Splits at the commas that no bracket encloses."""
    depth, start = 0, 0
    for i, character in enumerate(text):
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            yield text[start:i].strip()
            start = i + 1
    if text[start:].strip():
        yield text[start:].strip()


def _number(text: str) -> int | None:
    if match := _FLOAT_BITS.match(text):
        return int(match[1], 16)
    if match := _INTEGER.match(text):
        return int(match[1] + match[2], 0)
    if re.fullmatch(r"-?\d+\.\d+", text):
        return int.from_bytes(struct.pack("<d", float(text)), "little")
    return None


def _operand(text: str, scope: Scope) -> Operand:
    if text[0] == "[":
        base, _, offset = text[1:-1].partition("+")
        found = _operand(base.strip(), scope)
        start = Immediate(found.address) if isinstance(found, Variable) else found
        if not isinstance(start, (Register, Immediate)):
            raise PTXError(f"address {text} without a register or variable")
        return Address(start, _number(offset.strip()) or 0)
    if text[0] in "{(":
        return Vector(tuple(None if w == "_" else _operand(w, scope) for w in _split(text[1:-1])))
    if "|" in text:
        return Vector(tuple(None if w == "_" else _operand(w, scope) for w in text.split("|")))
    if text[0] == "!":
        register = _operand(text[1:], scope)
        assert isinstance(register, Register)
        return Negated(register)
    number = _number(text)
    if number is not None:
        return Immediate(number)
    if text in scope:
        return scope[text]
    if text[0] == "%":
        return Special(text)
    raise PTXError(f"unknown name {text!r}")
