"""The traced graph as plain PyTorch that names its interiors: the definition of a fused function."""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from retainops.elementwise.trace import Traced
from retainops.registry import Point


def reference_of(traced: Traced) -> Callable[..., torch.Tensor]:
    """A function `reference(*inputs, point)` which does what the graph says."""
    text = _Text(traced)
    body = "\n".join(f"    {line}" for line in text.lines())
    source = f"def reference({', '.join(text.parameters)}):\n{body}\n"
    exec(compile(source, "<retainops reference>", "exec"), text.globals)
    return text.globals["reference"]


class _Text:
    """Python of parameters and numbered names; all else it finds in its globals."""

    def __init__(self, traced: Traced) -> None:
        self._traced = traced
        self._numbers = itertools.count()
        self.globals: dict[str, Any] = {}
        self.parameters = [p.name for p in traced.parameters]
        self._names: dict[Node, str] = dict(zip(traced.inputs, self.parameters, strict=True))
        self._point = self._new("point")
        self.parameters.append(self._point)

    def lines(self) -> list[str]:
        tap = self._given(_tap)
        lines = []
        for node in self._traced.steps:
            args = [self._text(x) for x in node.args]
            options = [f"{name}={self._text(x)}" for name, x in node.kwargs.items()]
            if node.op == "call_method":
                called, args = f"{args[0]}.{node.target}", args[1:]
            else:
                called = self._given(node.target)
            value = self._names[node] = self._new("v")
            lines.append(f"{value} = {called}({', '.join([*args, *options])})")
            named = [name for name, of in self._traced.names.items() if of is node]
            lines += [f"{value} = {tap}({self._point}, {self._given(name)}, {value})" for name in named]
        return [*lines, f"return {self._names[self._traced.output]}"]

    def _text(self, x: Any) -> str:
        return self._names[x] if isinstance(x, Node) else self._given(x)

    def _given(self, value: Any) -> str:
        name = self._new("g")
        self.globals[name] = value
        return name

    def _new(self, prefix: str) -> str:
        name = prefix if prefix == "point" else f"{prefix}{next(self._numbers)}"
        while name in self.parameters:
            name += "_"
        return name


def _tap(point: Point, name: str, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return point(name, value)
    if isinstance(value, numbers.Number):  # since the arguments are: a request for it is told that it has no gradient
        point(name, torch.tensor(value))
    return value
