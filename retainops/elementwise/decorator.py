"""The public object: a user's function as a fused op."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from retainops.dispatch import run
from retainops.elementwise.codegen import generate
from retainops.elementwise.op import record
from retainops.elementwise.trace import trace
from retainops.ops._check import check_elementwise
from retainops.points import PointTable
from retainops.retained import Retained


def fuse_pointwise(fn: Callable[..., torch.Tensor]) -> FusedPointwise:
    """Make one forward and one backward kernel of a function, in which every local name can be retained.

    The function is run once, on stand-ins for its arguments, when it is decorated. Its backward is derived from the
    operations that it did, and Triton source is written for both; loops unroll, and what the function read besides its
    arguments is fixed. On a CPU, without triton and inside torch.compile the same operations run in PyTorch.

    Args:
        fn: a function of tensors, and of numbers, by named parameters; defaults are numbers. It returns one tensor,
            and does elementwise operations only: docs/fuse_pointwise.md lists them.

    Returns:
        The function, with one more keyword argument, `retain`, and the attributes `source` (the text of the kernels)
        and `points` (the local names that can be retained). A name that was bound several times is its last value.

    Raises:
        TypeError: fn is not a function of named parameters that returns one tensor which has a gradient.
        NotImplementedError: an operation, control flow by the value of a tensor, or an in-place operation, that the
            kernels have no form for; the message names it and its line.

    Example:
        >>> @ro.fuse_pointwise
        ... def f(a, b, bias):
        ...     c = a * b
        ...     h = torch.tanh(c + bias)
        ...     return h * torch.sigmoid(c)
        >>> kept = ro.Retained("c", h=ro.Stats("l2"))
        >>> f(a, b, bias, retain=kept).sum().backward()
    """
    return FusedPointwise(fn)


class FusedPointwise:
    """A function that `fuse_pointwise` has made an op of.

    Attributes:
        source: the Triton source of both kernels.
        points: the local names that can be retained: a mapping to formula and shape, whose repr is a table.
        op: its record, as the ops of retainops have one.
    """

    def __init__(self, fn: Callable[..., torch.Tensor]) -> None:
        traced = trace(fn)
        generated = generate(traced)
        functools.update_wrapper(self, fn)
        self.source = generated.source
        self.op = record(self, traced, generated)
        self.points = PointTable(self.op)
        self._used = [traced.parameters[i].name for i in generated.inputs]
        self._names = [p.name for p in traced.parameters]
        self._by_place = [p.name for p in traced.parameters if p.kind is not p.KEYWORD_ONLY]
        self._by_name = [p.name for p in traced.parameters if p.kind is not p.POSITIONAL_ONLY]
        self._defaults = {p.name: p.default for p in traced.parameters if p.default is not p.empty}
        self._accepts = inspect.Signature(list(traced.parameters))
        retain = inspect.Parameter("retain", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="Retained | None")
        self.__signature__ = inspect.Signature([*traced.parameters, retain])

    def __call__(self, *args: Any, retain: Retained | None = None, **kwargs: Any) -> torch.Tensor:
        inputs = self._inputs(args, kwargs)
        check_elementwise(self.op.name, **{n: x for n, x in zip(self._names, inputs, strict=True) if n in self._used})
        if retain is not None and not self.op.points:
            raise KeyError(f"{self.op.name} has no points: no local name of it is bound to a value on the way")
        return run(self.op, inputs, retain)

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The arguments in the order of the parameters."""
        placed = dict(zip(self._by_place, args, strict=False))
        given = {**self._defaults, **placed, **kwargs}
        wrong = [name for name in kwargs if name in placed or name not in self._by_name]
        if wrong or len(args) > len(self._by_place) or len(given) < len(self._names):
            self._refuse(args, kwargs)
        return tuple([given[name] for name in self._names])

    def _refuse(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
        try:
            self._accepts.bind(*args, **kwargs)
        except TypeError as e:
            raise TypeError(f"{self.op.name}{self._accepts}: {e}") from None
        raise AssertionError("arguments that Python accepts were refused")

    def __get__(self, instance: object, owner: type | None = None) -> FusedPointwise:
        if instance is not None:
            raise TypeError(
                f"{self.op.name} was called as a method of {type(instance).__name__}; a fused function takes tensors, "
                "not self: make it a staticmethod, or a function outside the class"
            )
        return self

    def __reduce__(self) -> str:
        return str(self.__dict__["__qualname__"])  # as functions: by name, so copies are the function itself

    def __repr__(self) -> str:
        names = ", ".join(self._names)
        return f"<fused function {self.op.name}({names}), points: {', '.join(self.points) or 'none'}>"
