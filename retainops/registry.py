"""The registry: one record per op. Tests, `check`, `bench`, `points` and the docs are written once, over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from retainops.names import near

Point = Callable[[str, torch.Tensor], torch.Tensor]
"""What a reference calls at its interior values: `c = point("c", a * b)`; it returns the value itself."""


@dataclass(frozen=True)
class PointInfo:
    """One interior value that can be retained.

    Attributes:
        name: as in `Retained(name)`.
        formula: the value, in the symbols of the op's page, reference and kernel.
        shape: in words, such as "broadcast of a and b".
        inputs: places of the op's inputs that it is made of, of which one must require grad; None: of all of them.
    """

    name: str
    formula: str
    shape: str
    inputs: tuple[int, ...] | None = None

    def requires_grad(self, inputs: Sequence[Any]) -> bool:
        """Whether the point of these inputs of the op requires grad, where grad mode is on."""
        of = inputs if self.inputs is None else [inputs[i] for i in self.inputs if i < len(inputs)]
        return any(isinstance(x, torch.Tensor) and x.requires_grad for x in of)


@dataclass(frozen=True)
class Op:
    """All that the rest of the library knows about one op.

    Attributes:
        name: the public name, also the stem of its files.
        call: the public function; it returns a tensor, or a tuple of them.
        formula: what it computes, in one line.
        points: its interior values, in forward order.
        reference: `reference(*inputs, point)`: the definition, in plain PyTorch.
        launch: `launch(inputs, slots)` runs the Triton path; `slots` maps point names to bound-to-be `Slot`s.
        refuses: `refuses(*inputs)` says why the kernels cannot take these inputs, or None.
        sample: `sample(shape, dtype, device, generator)` makes inputs for tests and benchmarks.
        traffic: `traffic(*inputs)` is the fewest bytes that (forward, backward, a retained point) must move.
        outputs: of an op of several outputs, the name of the point that each is, or "" where it is none.
        constants: places of inputs that have no gradient on the kernels, though they may be floating-point: tables.
        kind: "elementwise", or "row" if elements along the last dim depend on each other, or "attention" if points are
            of (..., heads, queries, keys), and `Part`, `Relevance` and statistics over these can be asked for: what
            tests may assume of it.
    """

    name: str
    call: Callable[..., Any]
    formula: str
    points: tuple[PointInfo, ...]
    reference: Callable[..., Any]
    launch: Callable[..., Any]
    refuses: Callable[..., str | None]
    sample: Callable[..., tuple[Any, ...]]
    traffic: Callable[..., tuple[int, int, int]]
    outputs: tuple[str, ...] = ()
    constants: tuple[int, ...] = ()
    kind: str = "elementwise"


_ops: dict[str, Op] = {}
_aliases: list[tuple[str | Callable[..., Any], str]] = []


def register(op: Op) -> Op:
    """Add an op; its name and its public function must be new."""
    assert op.name not in _ops, op.name
    _ops[op.name] = op
    return op


def alias(name: str, *others: str | Callable[..., Any]) -> None:
    """Let `find` take other names and functions for the op of this name."""
    _aliases.extend((other, name) for other in others)


def ops() -> Iterator[Op]:
    """Every op, in the order of registration."""
    return iter(_ops.values())


def find(op: Op | str | Callable[..., Any]) -> Op:
    """The record of an op given by name, by its public function, or by itself.

    A function that is not in the registry may carry its record as its attribute `op`, as fused functions do.

    Raises:
        KeyError: there is none; the message lists what there is.
    """
    if isinstance(own := getattr(op, "op", None), Op):
        return own
    for record in _ops.values():
        if op is record or op == record.name or op is record.call:
            return record
    for other, name in _aliases:
        if op is other or op == other:
            return _ops[name]
    if isinstance(op, torch.nn.Module):
        raise KeyError(
            f"a {type(op).__name__} is a model, not an op of retainops; for what a model can be asked, ro.points(model)"
        )
    wrong = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    # A function that is not ours is another one than any of ours, however alike their names are.
    meant = near(op, _ops) if isinstance(op, str) else ""
    raise KeyError(f"{wrong!r} is not an op of retainops{meant or '; there are: ' + ', '.join(_ops)}")
