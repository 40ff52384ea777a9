"""Arithmetic on numbers alone, in a call whose arguments are numbers: Python does it, as in eager PyTorch.

Kernels hold interiors in float32, in which 1 - beta has few digits left; and whether 1 / (n - 1) has a value depends on
that of n, which a plan does not know. So such a call takes the kernels of the rest of the function, and hands them the
results.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import fx

from retainops.elementwise.trace import Traced, differentiable


class Rest(NamedTuple):
    """What a function does besides arithmetic on numbers.

    Attributes:
        traced: its parameters are those of the function, then one for each result that it is handed.
        inputs: of the function that it is the rest of.
        steps: the arithmetic, in order.
        handed: those of its results that `traced` takes.
    """

    traced: Traced
    inputs: list[fx.Node]
    steps: list[fx.Node]
    handed: list[fx.Node]

    def arguments(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """What `traced` takes where the function takes these."""
        values = dict(zip(self.inputs, inputs, strict=True))
        for node in self.steps:
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            called: Any = node.target
            if node.op == "call_method":
                called, args = getattr(args[0], called), args[1:]
            values[node] = called(*args, **kwargs)
        return (*inputs, *(values[node] for node in self.handed))


def rest(traced: Traced, numbered: Sequence[bool]) -> Rest | None:
    """A function without its arithmetic on numbers alone, if there is any.

    Args:
        numbered: of each parameter, whether it is a number.
    """
    numbers = {node for node, is_number in zip(traced.inputs, numbered, strict=True) if is_number}
    steps = []
    for node in traced.steps:
        if numbers.issuperset(node.all_input_nodes):
            numbers.add(node)
            steps.append(node)
    if not steps or traced.output in numbers:
        return None
    handed = [node for node in steps if not numbers.issuperset(node.users)]
    return Rest(_handed(traced, numbers, handed), traced.inputs, steps, handed)


def _handed(traced: Traced, numbers: set[fx.Node], handed: list[fx.Node]) -> Traced:
    graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
    parameters = list(traced.parameters)
    for node in traced.inputs:
        new[node] = graph.placeholder(str(node.target))
    for node in handed:
        name = node.meta["name"]
        while any(name == p.name for p in parameters):
            name += "_"
        new[node] = graph.placeholder(name)
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY))
    for node in traced.steps:
        if node not in numbers:
            new[node] = graph.node_copy(node, new.__getitem__)
            step = node.meta["step"]
            operands = tuple(new[x] if isinstance(x, fx.Node) else x for x in step.operands)
            new[node].meta["step"] = step._replace(operands=operands)
    graph.output(new[traced.output])
    names = {name: new[node] for name, node in traced.names.items() if node not in numbers}
    conditions = frozenset(new[x] for x in traced.conditions if x in new)
    return Traced(traced.name, tuple(parameters), graph, names, differentiable(graph, conditions), conditions)
