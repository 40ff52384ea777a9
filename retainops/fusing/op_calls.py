"""A call of a function of PyTorch's that a forward makes, and the op that stands for it where it can."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from retainops.nn.point import HoldsPoints, gradients_reach
from retainops.registry import Op

ANY_CALL = "FN(*ARGS, **NAMED)"
"""The pattern of one."""
Call = tuple[Op, tuple[Any, ...]]
"""An op and its inputs."""

EXCHANGED = "it is another function than when the model was fused"


def op_or_own(
    module: HoldsPoints,
    points: tuple[str, ...],
    found: Call | str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    named: Mapping[str, Any],
) -> Any:
    """The op, or where that was found not to do, the function.

    Args:
        points: of the call.
        found: the op and its inputs, or the reason why PyTorch's function is to be called.

    Raises:
        RuntimeError: its points are asked for, and it is PyTorch's function.
    """
    if not isinstance(found, str):
        op, inputs = found
        return module.call(*inputs, op=op)
    y = function(*args, **named)
    asked = [name for name in points if any(name in request for request in module._requests)]
    if asked and gradients_reach(y):
        name = getattr(function, "__name__", type(function).__name__)
        raise RuntimeError(
            f"{type(module).__name__}: {' and '.join(map(repr, asked))} {'is' if len(asked) == 1 else 'are'} asked "
            f"for, and no op stands for its call of {name}: {found}; leave this point out"
        )
    return y
