"""The cross entropy that a forward computes: PyTorch's function or module, or a module that is made in the forward."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from retainops.fusing._code import called, methods, parsed
from retainops.fusing._patterns import FUNCTIONS, LOOPS
from retainops.fusing.op_calls import EXCHANGED, Call, op_or_own
from retainops.nn.point import HoldsPoints
from retainops.ops.cross_entropy import CROSS_ENTROPY
from retainops.registry import PointInfo

Tensor = torch.Tensor
FUNCTION, MODULE = F.cross_entropy, nn.CrossEntropyLoss
"""PyTorch's, whatever stands there by now."""
POINTS = tuple(info.name for info in CROSS_ENTROPY.points)


class LossCall(HoldsPoints):
    """For a module whose forward computes a cross entropy; its points are logits and p, as the loss is given them."""

    def point_infos(self) -> tuple[PointInfo, ...]:
        return CROSS_ENTROPY.points

    def fused_loss(self, function: Any, *args: Any, **named: Any) -> Any:
        """function(*args, **named): the loss, or of a class of losses what computes one."""
        if function is MODULE:  # which Dynamo takes for a function: it has no attributes there
            return functools.partial(self.fused_loss_by, _options(*args, **named))
        found = _as_op(*args, **named) if function is FUNCTION else EXCHANGED
        return op_or_own(self, POINTS, found, function, args, named)

    def fused_loss_by(self, options: tuple[Any, ...], input: Any, target: Any) -> Any:
        """The loss, by a `torch.nn.CrossEntropyLoss` with these options."""
        args = input, target, *options
        return op_or_own(self, POINTS, _as_op(*args), FUNCTION, args, {})


class CrossEntropyLoss(HoldsPoints):
    """`torch.nn.CrossEntropyLoss`; its points are logits and p."""

    op = CROSS_ENTROPY

    def forward(self: Any, input: Any, target: Any) -> Any:
        args = input, target, self.weight, None, self.ignore_index, None, self.reduction, self.label_smoothing
        return op_or_own(self, POINTS, _as_op(*args), FUNCTION, args, {})


def _options(
    weight: Any = None,
    size_average: Any = None,
    ignore_index: Any = -100,
    reduce: Any = None,
    reduction: Any = "mean",
    label_smoothing: Any = 0.0,
) -> tuple[Any, ...]:
    """In this order they are the class's arguments, and the function's after input and target."""
    return weight, size_average, ignore_index, reduce, reduction, label_smoothing


def _as_op(input: Any, target: Any, *args: Any, **named: Any) -> Call | str:
    """From the function's arguments to the op and its inputs, or why PyTorch's is to be called: for its errors, too."""
    weight, size_average, ignore_index, reduce, reduction, label_smoothing = _options(*args, **named)
    if not all(isinstance(x, Tensor) and not x.is_nested for x in (input, target)) or not input.is_floating_point():
        return "it is not of a tensor of floating-point numbers and one of classes"
    if target.dtype is not torch.int64:
        return f"its target is {target.dtype}, and the op takes class indices"
    logits = input.movedim(1, -1) if input.dim() > 2 else input  # its classes are dim 1
    if not logits.dim() or not logits.shape[-1] or logits.shape[:-1] != target.shape or input.device != target.device:
        return "its target does not fit its input"
    if weight is not None and (
        not isinstance(weight, Tensor)
        or weight.requires_grad
        or not weight.is_floating_point()
        or (weight.shape, weight.device) != (logits.shape[-1:], input.device)
        or (weight.dtype != input.dtype and not _is_autocast(input))  # which computes in float32
    ):
        return "its weight is not a constant number for each class"
    if size_average is not None or reduce is not None or reduction not in ("none", "mean", "sum"):
        return "it says by size_average or reduce how it is reduced"
    numbers = isinstance(ignore_index, int) and isinstance(label_smoothing, (int, float))
    if not numbers or not 0 <= label_smoothing <= 1:
        return f"its ignore_index is {ignore_index}, its label_smoothing {label_smoothing}"
    return CROSS_ENTROPY, (logits, target, weight, ignore_index, reduction, label_smoothing, 0.0, None)


def _is_autocast(x: Tensor) -> bool:
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def why_not_once(module: nn.Module) -> str | None:
    """Why the losses that a module's methods make have no points: those of two calls would be sums. None: they have."""
    for _, function in methods(type(module)):
        tree = parsed(function)
        if tree is None:
            continue
        is_loss = functools.partial(_is_loss, module, function)
        for made in _makes(tree, is_loss):
            if (why := _why_not_once(tree, made)) is not None:
                return why
    return None


def _is_loss(module: nn.Module, function: Any, name: str) -> bool:
    return called(module, function, name) is MODULE


def _makes(tree: ast.FunctionDef, is_loss: Callable[[str], bool]) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        named = isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute))
        if named and is_loss(ast.unparse(node.func)):  # type: ignore[attr-defined]
            yield node  # type: ignore[misc]


def _why_not_once(tree: ast.FunctionDef, made: ast.Call) -> str | None:
    if any(isinstance(node, ast.Call) and node.func is made for node in ast.walk(tree)):
        return None
    block, i = next(
        ((b, i) for b in _blocks(tree) for i, s in enumerate(b) if getattr(s, "value", None) is made), ([], 0)
    )
    match block[i : i + 1]:
        case [ast.Assign(targets=[ast.Name(id=name)])]:
            pass
        case _:
            return "what becomes of the loss that it makes is not known"
    if any(name in _names_in(node) for node in ast.walk(tree) if isinstance(node, FUNCTIONS) and node is not tree):
        return f"its {name} is used in a function inside"
    if any(name in getattr(node, "names", ()) for node in ast.walk(tree)):  # global, nonlocal
        return f"its {name} is no variable of its own"
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == name]
    callees = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    mine = {id(node) for statement in block[i + 1 :] for node in ast.walk(statement)}
    wanted = set()
    for node in uses:
        if id(node) in mine and not isinstance(node.ctx, ast.Load):
            return f"its {name} may be another one later"
        if id(node) in mine and id(node) not in callees:
            return f"its {name} is not only called"
        if id(node) in mine:
            wanted.add(id(node))
        elif isinstance(node.ctx, ast.Load) and not _is_set_before(tree, name, node, made):
            return f"its {name} may be another one where it is called"
    often = sum(_most(statement, wanted) for statement in block[i + 1 :])
    if often > 1:
        return "the loss that it makes may be called several times, and its points would be of several calls"
    return None if often else "the loss that it makes is not called"


def _blocks(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    """The lists of statements in code, outer ones first."""
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            if isinstance(statements := getattr(node, field, None), list):
                yield statements


def _names_in(function: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}


def _is_set_before(tree: ast.AST, name: str, use: ast.AST, made: ast.AST) -> bool:
    """Whether a name that is used was set before, in a block around the use, and since then not to what was made."""
    for block in _blocks(tree):
        at = next((i for i, statement in enumerate(block) if _holds(statement, use)), 0)
        for k, statement in enumerate(block[:at]):
            targets = statement.targets if isinstance(statement, ast.Assign) else []
            sets = any(isinstance(target, ast.Name) and target.id == name for target in targets)
            if sets and not any(_holds(between, made) for between in block[k : at + 1]):
                return True
    return False


def _holds(statement: ast.AST, wanted: ast.AST) -> bool:
    return any(node is wanted for node in ast.walk(statement))


def _most(node: ast.AST, wanted: set[int]) -> int:
    """How many of these nodes run at most; in a loop they count twice."""
    if isinstance(node, (ast.If, ast.IfExp)):
        branches = (node.body, node.orelse)
        here = [sum(_most(n, wanted) for n in (b if isinstance(b, list) else [b])) for b in branches]
        return _most(node.test, wanted) + max(here)
    inside = sum(_most(child, wanted) for child in ast.iter_child_nodes(node))
    return (id(node) in wanted) + inside * (2 if isinstance(node, LOOPS) else 1)
