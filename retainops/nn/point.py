"""What modules that hold points have in common, and the simplest of them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from retainops.nn._several import call_with_several
from retainops.points import tap
from retainops.registry import Op, PointInfo
from retainops.retained import Retained


class HoldsPoints(nn.Module):
    """A module around one op of retainops, whose points `ro.retain(model, ...)` can ask for.

    A subclass says which op, and calls it by `call`, which hands over what is asked for at the moment. Requests are
    a plain attribute, a tuple: torch.compile guards on it, so asking compiles once more and ceasing to ask is back to
    the graph from before. Copies and pickles of the module carry none.

    Attributes:
        op: the record of the op, as `retainops.registry.find("mul_sin")` gives it.

    Example:
        >>> class MulSin(HoldsPoints):
        ...     op = find("mul_sin")
        ...     def forward(self, x):
        ...         return self.call(x, 30.0)
    """

    op: ClassVar[Op]

    def __init__(self) -> None:
        super().__init__()
        self._requests: tuple[Retained, ...] = ()

    def point_infos(self) -> tuple[PointInfo, ...]:
        """Its points, in forward order; `ro.retain` calls them by the module's path, a dot, and their name."""
        return self.op.points

    def call(self, *inputs: Any) -> torch.Tensor:
        """The op of these inputs, with the points that are asked for. Without grad nothing is kept, and no error."""
        requests = self._requests
        if not requests or not gradients_reach(*inputs):
            return self.op.call(*inputs)
        if len(requests) == 1:
            return self.op.call(*inputs, retain=requests[0])
        return call_with_several(self.op, inputs, requests)

    def __getstate__(self) -> dict[str, Any]:
        # A request belongs to the `with` that made it, which knows nothing of copies.
        return {**self.__dict__, "_requests": ()}


class Point(HoldsPoints):
    """The identity, at which the gradient can be asked for: put one wherever a value should have a name.

    While `ro.retain(model, ...)` asks for it, the output is a view of the input, on which PyTorch refuses in-place
    operations (`nn.ReLU(inplace=True)` right after it, say). Otherwise it is the input.

    Raises:
        TypeError: asked for, and the input is not a tensor.
        RuntimeError: asked for, and called with two shapes in one `with`.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), ro.nn.Point(), nn.Tanh())
        >>> with ro.retain(model, "1") as kept:
        ...     model(x).sum().backward()
        >>> kept["1"].grad
    """

    POINT = ""  # the module's path is the point's whole name

    def point_infos(self) -> tuple[PointInfo, ...]:
        return (PointInfo(self.POINT, "x", "of its input"),)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for request in self._requests:
            slot = request[self.POINT]
            if not isinstance(x, torch.Tensor):
                raise TypeError(f"Point '{slot.name}': the input is {type(x).__name__}; expected a torch.Tensor")
            if gradients_reach(x):
                x = tap("Point", slot, x)
        return x


def gradients_reach(*inputs: Any) -> bool:
    """Whether anything computed from these inputs can have a gradient."""
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)
