"""The code that asks for a point of an op, as its user writes it."""

from __future__ import annotations

import inspect

import retainops as ro
from retainops.ops.gated import GATED, PACKED
from retainops.ops.pointwise import FAMILY
from retainops.registry import Op

_EXAMPLE = """\
kept = ro.Retained("{point}")
{result} = ro.{call}
y.sum().backward()
kept["{point}"].grad  # what {point}.retain_grad() would have left in {point}.grad"""


def snippet(op: Op) -> str:
    """Code that runs where the op's inputs have the names that its formula gives them."""
    several = str(inspect.signature(op.call).return_annotation).startswith("tuple")
    return _EXAMPLE.format(point=op.points[0].name, result="y, *_" if several else "y", call=call_of(op))


def call_of(op: Op) -> str:
    """The call after `ro.`, with the inputs that it cannot do without."""
    function, given = op.name, _needed(op)
    if op in (*GATED.values(), *PACKED.values()):  # one function for each unit, packed or not
        function = op.name.removesuffix("_packed")
        given = ["x"] if op in PACKED.values() else ["gate", "up"]
        if function == "geglu_tanh":
            function, given = "geglu", [*given, 'approximate="tanh"']
    elif op.name in FAMILY and not hasattr(ro, op.name):
        function = f"pointwise.{op.name}"
    return f"{function}({', '.join(given)}, retain=kept)"


def _needed(op: Op) -> list[str]:
    parameters = inspect.signature(op.call).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.name != "retain"]
