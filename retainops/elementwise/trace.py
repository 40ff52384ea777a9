"""From a Python function of tensors to a graph of steps, and the local names of the values in it.

The function runs once, on stand-ins for its arguments which record what is done to them. Nothing is read of its
source, so one that was typed into a REPL is as good as any.
"""

from __future__ import annotations

import inspect
import numbers
import sys
import types
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import fx

from retainops.dispatch import backend
from retainops.elementwise.standins import Tracer, Value
from retainops.elementwise.step import Step


class Traced(NamedTuple):
    """A function, as its graph.

    Attributes:
        name: the function's.
        parameters: its parameters, in order.
        graph: a placeholder for each parameter, then what reaches the output, then the output.
        names: local names and what they are bound to when the function returns, as far as a gradient reaches it.
        graded: the nodes that have a gradient: inputs and interiors.
        conditions: the nodes that are true or false.
    """

    name: str
    parameters: tuple[inspect.Parameter, ...]
    graph: fx.Graph
    names: dict[str, fx.Node]
    graded: frozenset[fx.Node]
    conditions: frozenset[fx.Node]

    @property
    def inputs(self) -> list[fx.Node]:
        """The placeholders."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    @property
    def steps(self) -> list[fx.Node]:
        """The operations."""
        return [node for node in self.graph.nodes if "step" in node.meta]

    @property
    def output(self) -> fx.Node:
        """What the function returns."""
        return self.graph.output_node().args[0]  # type: ignore[return-value]


def trace(fn: Callable[..., Any]) -> Traced:
    """Run a function on stand-ins.

    Raises:
        TypeError: it is not a plain function of named parameters, or it does not return one value that its tensors
            have a gradient by.
        NotImplementedError: an operation or control flow that the kernels have no form for.
    """
    parameters = _parameters(fn)
    graph = fx.Graph()
    tracer = Tracer(graph, fn.__name__)
    values = {p: tracer.create_proxy("placeholder", p.name, (), {}) for p in parameters}
    by_place = [value for p, value in values.items() if p.kind is not p.KEYWORD_ONLY]
    by_name = {p.name: value for p, value in values.items() if p.kind is p.KEYWORD_ONLY}
    result, local = _run(fn, by_place, by_name)
    if tracer.refused:  # fn caught it, and in eager PyTorch would have gone another way
        raise tracer.refused
    if isinstance(result, torch.Tensor):
        raise TypeError(
            f"{fn.__name__} returns a tensor that was not computed from its parameters; a fused function returns one "
            "that was"
        )
    if not isinstance(result, fx.Proxy):
        raise TypeError(f"{fn.__name__} returns {_described(result)}; a fused function returns one tensor")
    graph.output(result.node)
    graph.eliminate_dead_code()
    conditions = _conditions(fn.__name__, graph)
    graded = differentiable(graph, conditions)
    _check_output(fn.__name__, result.node, graded, conditions)
    # A code object can be made whose names are no identifiers, and they become part of the kernels' source.
    bound = {name: x.node for name, x in local.items() if isinstance(x, Value) and name.isidentifier()}
    names = {name: node for of in graph.nodes for name, node in bound.items() if node is of}
    points = {name: node for name, node in names.items() if "step" in node.meta and node in graded}
    return Traced(fn.__name__, tuple(parameters), graph, points, graded, frozenset(conditions))


def sources(traced: Traced, node: fx.Node, differentiably: bool = True) -> list[int]:
    """Places of the parameters that a node depends on."""
    needed = {node}
    for other in reversed(traced.steps):
        if other in needed:
            step = other.meta["step"]
            pairs = zip(step.operands, step.grads, strict=True)
            needed.update(x for x, grad in pairs if isinstance(x, fx.Node) and (grad is not None or not differentiably))
    return [i for i, source in enumerate(traced.inputs) if source in needed]


def _parameters(fn: Callable[..., Any]) -> list[inspect.Parameter]:
    if not isinstance(fn, types.FunctionType):
        raise TypeError(f"fuse_pointwise: {fn!r} is {type(fn).__name__}; expected a function written in Python")
    name = fn.__name__
    if fn.__code__.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
        raise TypeError(f"{name} is a generator or a coroutine; a fused function returns one tensor")
    parameters = list(inspect.signature(fn, follow_wrapped=False).parameters.values())
    for p in parameters:
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            stars = "*" if p.kind is p.VAR_POSITIONAL else "**"
            raise TypeError(f"{name} has the parameter {stars}{p.name}; a fused function names each of its parameters")
        if p.name == "retain":
            raise TypeError(f"{name} has a parameter retain, which a fused function gets for its points; rename it")
        if p.name == "self":
            raise TypeError(f"{name} is a method; fuse a function of tensors, and call that from the method")
        if p.default is not p.empty and not isinstance(p.default, numbers.Real):
            raise TypeError(f"{name}: the default of {p.name} is {_described(p.default)}; expected a number, or none")
    if not parameters:
        raise TypeError(f"{name} has no parameters; a fused function is one of tensors")
    return parameters


def _described(x: Any) -> str:
    if isinstance(x, (tuple, list, dict)):
        return f"a {type(x).__name__} of {len(x)}"
    return repr(x) if x is None or isinstance(x, (numbers.Number, str)) else type(x).__name__


def _run(fn: Any, args: list[Any], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What a function returns, and its local names as they are when it does."""
    local: dict[str, Any] = {}

    def of_frame(frame: types.FrameType, event: str, _: Any) -> Any:
        if event == "return":
            local.clear()
            local.update(frame.f_locals)
        return of_frame

    def of_calls(frame: types.FrameType, event: str, _: Any) -> Any:
        if frame.f_code is not fn.__code__:
            return None
        frame.f_trace_lines = False
        return of_frame

    before = sys.gettrace()
    sys.settrace(of_calls)
    try:
        # Of the fused functions that fn calls the stand-ins take the reference, whatever calls of tensors are to take.
        with torch.enable_grad(), backend("reference"):
            return fn(*args, **kwargs), local
    finally:
        sys.settrace(before)


def _conditions(name: str, graph: fx.Graph) -> set[fx.Node]:
    """The nodes that are true or false: a parameter is one if it is used as one."""
    steps: list[tuple[fx.Node, Step]] = [(n, n.meta["step"]) for n in graph.nodes if "step" in n.meta]
    used = {s.operands[i] for _, s in steps for i in s.takes}
    found = {n for n, s in steps if s.gives} | {x for x in used if isinstance(x, fx.Node) and x.op == "placeholder"}
    for node, s in steps:
        nodes = [x for x in s.operands if isinstance(x, fx.Node)]
        for i in s.takes:
            if s.operands[i] not in found:
                raise NotImplementedError(
                    f"{name}: operand {i} of {node.meta['what']} is no condition; expected a comparison, or a boolean "
                    "tensor that is a parameter"
                )
        if node.meta["name"] == "sub" and any(map(_is_boolean, nodes)):
            raise NotImplementedError(
                f"{name}: {node.meta['what']} has a condition for an operand, as PyTorch has none; use ~condition, or "
                "1.0 * condition"
            )
        numbered = any(not isinstance(x, (fx.Node, bool)) for x in s.operands)
        if not (s.gives or s.takes or numbered or set(nodes) - found):
            raise NotImplementedError(f"{name}: {node.meta['what']} is arithmetic on conditions alone; use torch.where")
    return found


def _is_boolean(node: fx.Node) -> bool:
    """Whether this is made of comparisons: parameters may be integers, of whose bits eager PyTorch takes & and |."""
    if "step" not in node.meta:
        return False
    step = node.meta["step"]
    return step.gives and all(_is_boolean(step.operands[i]) for i in step.takes)


def differentiable(graph: fx.Graph, conditions: Collection[fx.Node]) -> frozenset[fx.Node]:
    """The nodes that depend on an input differentiably, and on which the output does."""
    depends = {node for node in graph.nodes if node.op == "placeholder" and node not in conditions}
    for node in graph.nodes:
        if any(x in depends for x, _ in _differentiated(node)):
            depends.add(node)
    reached = {graph.output_node().args[0]}
    for node in reversed(graph.nodes):
        if node in reached:
            reached.update(x for x, _ in _differentiated(node))
    return frozenset(depends & reached)


def _differentiated(node: fx.Node) -> Iterator[tuple[fx.Node, str]]:
    if "step" in node.meta:
        for x, grad in zip(node.meta["step"].operands, node.meta["step"].grads, strict=True):
            if isinstance(x, fx.Node) and grad is not None:
                yield x, grad


def _check_output(name: str, output: fx.Node, graded: frozenset[fx.Node], conditions: set[fx.Node]) -> None:
    if output.op == "placeholder":
        raise TypeError(f"{name} returns its argument {output.target}; there is nothing to fuse")
    if output in conditions or output not in graded:
        raise TypeError(f"{name} returns a value that has no gradient, of {output.meta['what']}")
