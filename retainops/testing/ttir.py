"""Triton's IR as a tree: operations, their operands and the regions inside them, read from its text."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_NAME = r"%[\w.$-]+(?:#\d+)?"
_LINE = re.compile(rf"^(?:({_NAME}(?::\d+)?(?:, {_NAME}(?::\d+)?)*) = )?(.*?)(?: loc\((.*)\))?$")
_ATTRIBUTES = re.compile(r" <?\{[^{}]*\}>?")
_ARGUMENT = re.compile(rf"({_NAME}): (.+?)(?: \{{[^}}]*\}})? loc\(")


@dataclass
class Block:
    """Operations in their order, and the arguments (name, type) that the block begins with."""

    arguments: list[tuple[str, str]] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)


@dataclass
class Operation:
    """One operation.

    Attributes:
        name: with its dialect, "arith.muli".
        results, operands: names of values, "%x" or "%x#1".
        types: of the results.
        text: as it is written, without results and types.
        location: what `Module.where` takes.
        elements: of a reduction: how many go into one result.
        blocks: of its regions, in their order.
    """

    name: str
    results: list[str]
    operands: list[str]
    types: list[str]
    text: str
    location: str
    blocks: list[Block] = field(default_factory=list)
    elements: int = 1


class Module:
    """One kernel: Triton's IR once calls are inlined.

    Attributes:
        arguments: of the kernel, (name without "%", type).
        body: its operations.
    """

    def __init__(self, text: str) -> None:
        self._locations = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", text, re.MULTILINE))
        self._lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
        self._at = next(n for n, line in enumerate(self._lines) if line.startswith("tt.func"))
        self.arguments = [(name[1:], type_) for name, type_ in _ARGUMENT.findall(self._lines[self._at])]
        self._at += 1
        self.body = self._block()

    def where(self, location: str) -> list[str]:
        """The lines of source that an operation comes from, "kernels/tiles.py:54", each called by the next one."""
        location = self._locations.get(location, location)
        if call := re.fullmatch(r"callsite\((#loc\d*) at (#loc\d*)\)", location):
            return self.where(call[1]) + self.where(call[2])
        if named := re.fullmatch(r'"[^"]*"\((#loc\d*)\)', location):
            return self.where(named[1])
        if line := re.match(r'"([^"]*)":(\d+):\d+', location):
            return ["/".join(line[1].split("/")[-2:]) + ":" + line[2]]
        return []

    def _block(self) -> Block:
        block = Block()
        while not self._lines[self._at].startswith("}"):
            line = self._lines[self._at]
            if line.startswith("^"):
                block.arguments = _ARGUMENT.findall(line)
                self._at += 1
            else:
                block.operations.append(self._operation(line))
        return block

    def _operation(self, line: str) -> Operation:
        found = _LINE.match(line)
        assert found
        results, body, location = found[1] or "", found[2], found[3] or ""
        blocks = []
        self._at += 1
        if body.endswith("{"):
            while True:
                blocks.append(self._block())
                end = self._lines[self._at]
                self._at += 1
                if not end.endswith("{"):
                    break
            closing = _LINE.match(end)
            assert closing
            location, signature = closing[3] or "", closing[2]
        else:
            signature = body
        text, *_ = (plain := _ATTRIBUTES.sub("", body)).split(" : ", 1)
        name = text.split()[0].split("(")[0].strip('"')
        types = _types_of_results(name, plain if blocks and "->" in plain else _ATTRIBUTES.sub("", signature))
        operands = re.findall(_NAME, text)
        names = _names(results)
        if len(types) == 1:  # "tt.split" writes one for both of its results
            types = types * len(names)
        return Operation(name, names, operands, types, body, location, blocks, _elements(body, signature))


def _elements(text: str, signature: str) -> int:
    """The size of the dim that a reduction takes away: "{axis = 1 : i32}", "(tensor<2x1024xi32>) -> ..."."""
    axis, shape = re.search(r"axis = (\d+)", text), re.search(r"\(tensor<((?:\d+x)+)", signature)
    return int(shape[1].split("x")[int(axis[1])]) if axis and shape else 1


def _names(results: str) -> list[str]:
    """The results' names: "%r:2" is %r#0 and %r#1."""
    names = []
    for each in filter(None, results.split(", ")):
        name, _, count = each.partition(":")
        names += [f"{name}#{n}" for n in range(int(count))] if count else [name]
    return names


def _types_of_results(name: str, signature: str) -> list[str]:
    """What stands behind the last arrow, or "to", or behind the colon; of a comparison, booleans."""
    if name in ("scf.for", "scf.if", "scf.while"):
        arrow = re.search(r"-> \(?([^{]*?)\)?(?: : \w+)? ?(?:\{|$)", signature)
        return _split(arrow[1]) if arrow else []
    _, _, types = signature.partition(" : ")
    if name == "arith.cmpi":
        return [re.sub(r"i\d+(>?)$", r"i1\1", types)]
    if name == "arith.select":
        return _split(types)[-1:]
    for between in (" -> ", " to "):
        types = types.rpartition(between)[2]
    types = types.strip()
    return _split(types[1:-1] if types.startswith("(") else types)[: 1 if name == "tt.addptr" else None]


def _split(types: str) -> list[str]:
    """At the commas that are in no bracket."""
    parts, depth = [""], 0
    for c in types:
        depth += (c in "<(") - (c in ">)")
        if c == "," and not depth:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts if part.strip()]
