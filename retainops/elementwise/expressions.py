"""Text: variables, and expressions put inside others."""

from __future__ import annotations

import builtins
import ctypes
import keyword
import re
from typing import Any, NamedTuple

from torch.fx import Node

from retainops.elementwise.comparisons import compared_with, needs_rounding
from retainops.elementwise.step import HELPERS, Step, literal
from retainops.elementwise.trace import Traced, sources

TILES = ("load", "store", "store_grad", "tile")
_ARGUMENTS = ("X", "Y", "DX", "DY", "DC", "SHAPE", "DTYPE", "BLOCK_M", "BLOCK_N", "at", "dy", "tl", "triton", "retain")
_TAKEN = {*_ARGUMENTS, *TILES, *(name for names in HELPERS.values() for name in names)}
_TAKEN |= {*keyword.kwlist, *keyword.softkwlist, *dir(builtins)}

_LONGEST = 200
"""Characters of a part of a formula."""


def identifier(name: str) -> str:
    """A name in ASCII that is one to Python, Triton and PTX alike."""
    spelled = "".join(c if re.match(r"\w", c, re.ASCII) else f"u{ord(c):x}" if c.isalpha() else "" for c in name)
    return spelled if spelled.isidentifier() else f"f{spelled}"


class Variables:
    """A variable for each node, and for its gradient: the user's own name where it is free."""

    def __init__(self, traced: Traced) -> None:
        self._taken = set(_TAKEN)
        self._of: dict[Node, str] = {}
        self._places = {node: i for i, node in enumerate(node for node in traced.inputs if node.users)}
        named = {node: name for name, node in reversed(traced.names.items())}
        for node in traced.inputs:
            self._of[node] = self.take(str(node.target))
        for node in sorted(traced.steps, key=lambda node: node not in named):
            self._of[node] = self.take(named.get(node, "y" if node is traced.output else node.meta["name"]))

    def __getitem__(self, node: Node) -> str:
        return self._of[node]

    def operand(self, node: Node) -> str:
        """What kernels take for an input."""
        return f"X[{self._places[node]}]"

    def take(self, wanted: str) -> str:
        """A variable that nothing else has."""
        wanted = free = identifier(wanted)
        count = 0
        while free in self._taken:
            count += 1
            free = f"{wanted}_{count}"
        self._taken.add(free)
        return free


class Expression(NamedTuple):
    """Text, and how tightly it binds: 0 anything, 1 as a sum, 2 as a product, 3 as a name or a call."""

    text: str
    binds: int = 3


_OPERATORS = {"{0} + {1}": (1, 1, 2), "{0} - {1}": (1, 1, 2), "{0} * {1}": (2, 2, 3), "{0} / {1}": (2, 2, 3)}
"""How tightly each binds, and its operands must."""


def compose(template: str, operands: list[Expression]) -> Expression:
    """A template with expressions in its places, in parentheses where they need them."""
    is_call = re.fullmatch(r"[\w.]+\(.*\)", template) is not None
    binds, *needs = _OPERATORS.get(template, (3 if is_call or template == "{0}" else 0, *[3] * len(operands)))
    if re.fullmatch(r"[\w.]+\(({\d}|[^{}()<>|&*+-])*\)", template):
        needs = [0] * len(operands)  # between commas
    texts = [x.text if x.binds >= need else f"({x.text})" for x, need in zip(operands, needs, strict=True)]
    return Expression(template.format(*texts), binds)


def atom(traced: Traced, variables: Variables, step: Step, i: int) -> str:
    """An operand of a step as a name or a number."""
    x: Any = step.operands[i]
    if not isinstance(x, Node):
        beside = compared_with(traced, step, i)
        if beside is not None and needs_rounding(x):
            return f"rounded({literal(x)}, {variables.operand(beside)}, DTYPE)"
        is_tensor = step.tensors or (step.compares and ctypes.c_float(x).value != x)
        return f"tl.full((1, 1), {literal(x)}, DTYPE)" if is_tensor else literal(x)
    if x in traced.conditions and i not in step.takes:
        return f"{variables[x]}.to(DTYPE)"
    return as_compared(traced, variables, step, i, variables[x])


def as_compared(traced: Traced, variables: Variables, step: Step, i: int, text: str) -> str:
    """An operand, which is a number where the one input behind it is, as it is compared with an input."""
    beside = compared_with(traced, step, i)
    if beside is None:
        return text
    behind = sources(traced, step.operands[i], differentiably=False)
    if len(behind) != 1 or traced.inputs[behind[0]] in (beside, *traced.conditions):
        return text
    return f"compared({text}, {variables.operand(traced.inputs[behind[0]])}, {variables.operand(beside)})"


def sum_of(shares: list[str]) -> str:
    """Products added up."""
    return " + ".join(shares).replace(" + -", " - ")


def formulas(traced: Traced) -> dict[str, str]:
    """The value of each point, and of the output under "", in the user's names; long parts of one are "...".

    A loop that uses a value several times would make them grow with a power of its length.
    """
    names = {node: name for name, node in reversed(traced.names.items())}
    found = {node: Expression(str(node.target)) for node in traced.inputs}
    whole: dict[Node, str] = {}
    for node in traced.steps:
        step = node.meta["step"]
        operands = [found[x] if isinstance(x, Node) else Expression(repr(x)) for x in step.operands]
        value = compose(step.formula or step.value, operands)
        whole[node] = value.text
        shown = value if len(value.text) <= _LONGEST else Expression("...")
        found[node] = Expression(names[node]) if node in names else shown
    return {**{name: whole[node] for name, node in traced.names.items()}, "": whole[traced.output]}
