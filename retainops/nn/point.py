"""What modules that hold points have in common, and the simplest of them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from retainops.nn._several import call_with_several
from retainops.points import check_no_transform, records, tap
from retainops.registry import Op, PointInfo
from retainops.retained import Retained

LOCK = threading.Lock()
"""Of the requests of all modules, while they change: several threads may ask one module."""


class HoldsPoints(nn.Module):
    """A module around an op of retainops, whose points `ro.retain(model, ...)` can ask for.

    A subclass says which op, and calls it by `call`, which hands over what is asked for at the moment. One that chooses
    between ops lists the points of them all in `point_infos` and says which one it calls; a value that is a point in
    one op and an input of another goes through `point`.

    Requests are a plain attribute, a tuple: torch.compile guards on it, so asking compiles once more and ceasing to ask
    is back to the graph from before. Copies and pickles of the module carry none.

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

    def ask(self, request: Retained) -> None:
        """Answer this request too, from now on: its names are those of `point_infos`."""
        with LOCK:
            self.__dict__["_requests"] = (*self._requests, request)

    def cease(self, request: Retained) -> None:
        """No longer answer it."""
        with LOCK:
            self.__dict__["_requests"] = tuple(other for other in self._requests if other is not request)

    def call(self, *inputs: Any, op: Op | None = None) -> torch.Tensor:
        """The op of these inputs, with the points that are asked for. Where no gradient comes nothing is kept.

        Args:
            *inputs: as the op's reference takes them.
            op: another op than the class's.
        """
        return call(self.op if op is None else op, inputs, self._requests)

    def point(self, name: str, value: torch.Tensor, as_view: bool = True) -> torch.Tensor:
        """A value that is in memory anyway, as a point: its gradient goes to whoever asks for it.

        Others may have the value too, so PyTorch refuses in-place operations on what comes back, a view; not so with
        `as_view=False`, where nobody else has it.
        """
        return tapped(type(self).__name__, name, value, self._requests, as_view)

    def __getstate__(self) -> dict[str, Any]:
        # A request belongs to the `with` that made it, which knows nothing of copies. PyTorch leaves out what calls a
        # module that was compiled in place: that calls this one, not the copy.
        return {**super().__getstate__(), "_requests": ()}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__deepcopy__" in vars(cls):  # as in the class of a parametrized module: it copies all attributes
            cls.__deepcopy__ = _without_requests(vars(cls)["__deepcopy__"])  # type: ignore[attr-defined]


def _without_requests(deepcopy: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(deepcopy)
    def call(self: HoldsPoints, memo: dict[int, Any]) -> Any:
        copied = deepcopy(self, memo)
        copied.__dict__["_requests"] = ()
        return copied

    return call


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

    def __init__(self) -> None:  # so that Python names this class where it is given arguments
        super().__init__()

    def point_infos(self) -> tuple[PointInfo, ...]:
        return (PointInfo(self.POINT, "x", "of its input"),)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._requests and not isinstance(x, torch.Tensor):
            _check_not_symbolic(x)
            name = self._requests[0][self.POINT].name
            raise TypeError(f"Point '{name}': the input is {type(x).__name__}; expected a torch.Tensor")
        return self.point(self.POINT, x)


def call(op: Op, inputs: tuple[Any, ...], requests: tuple[Retained, ...]) -> torch.Tensor:
    """The op of these inputs, for each of these requests. Where no gradient comes nothing is kept, and no error."""
    note_grad_mode(requests)
    if not requests or not gradients_reach(*inputs):
        return op.call(*inputs)
    # A weight may require grad where the data does not, as in a first layer: then points made of the data have none.
    mine = parts_for(requests, [p for p in op.points if p.requires_grad(inputs)])
    if not mine:
        return op.call(*inputs)
    if len(mine) == 1:
        return op.call(*inputs, retain=mine[0])
    return call_with_several(op, inputs, mine)


def tapped(
    op: str, name: str, value: torch.Tensor, requests: tuple[Retained, ...], as_view: bool = False
) -> torch.Tensor:
    """A value in memory as the point of this name, for each of these requests; `as_view` as of `tap`."""
    note_grad_mode(requests)
    for request in requests:
        slot = request.get(name)
        if slot is not None and gradients_reach(value):
            value = tap(op, slot, value, as_view=as_view)
    return value


def parts_for(requests: tuple[Retained, ...], points: Sequence[PointInfo]) -> tuple[Retained, ...]:
    """Of requests that are for several parts of a module, what they ask of these points."""
    parts = (_part_of(request, [p.name for p in points]) for request in requests)
    return tuple(part for part in parts if part is not None)


def _part_of(request: Retained, names: Sequence[str]) -> Retained | None:
    """The part of a request that is for points of these names."""
    mine = {name: request[name] for name in names if name in request}
    if len(mine) == len(request):
        return request
    return Retained.of(mine) if mine else None


def note_grad_mode(requests: tuple[Retained, ...]) -> None:
    """Remember whether requests were met where grad mode is on, or off: `ro.retain` warns if it was always off."""
    if requests and not torch.compiler.is_compiling():
        is_on = records()
        for request in requests:
            if is_on:
                request.with_grad = True
            else:
                request.without_grad = True


def gradients_reach(*inputs: Any) -> bool:
    """Whether anything computed from these inputs can have a gradient.

    Raises:
        RuntimeError: it comes from outside a torch.vmap, inside of which a request would get nothing; or torch.fx
            records what is computed.
    """
    _check_not_symbolic(*inputs)
    if not records():
        return False
    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
    if any(x.requires_grad for x in tensors):
        return True
    if not torch.compiler.is_compiling() and any(map(_is_reached_from_outside, tensors)):
        check_no_transform("retain")
    return False


def _check_not_symbolic(*inputs: Any) -> None:
    """Raise where what is asked is called with stand-ins of torch.fx: the program that it records has no points."""
    if not torch.compiler.is_compiling() and any(isinstance(x, torch.fx.Proxy) for x in inputs):
        raise RuntimeError(
            "retain: points were asked for while torch.fx records this call, and the program that it makes answers no "
            "request; leave the `with` of ro.retain first, or trace with a Tracer whose is_leaf_module is true of "
            "ro.nn.HoldsPoints"
        )


def _is_reached_from_outside(x: torch.Tensor) -> bool:
    """Whether a batch that torch.vmap took apart requires grad, which its parts do not say."""
    while torch._C._functorch.is_batchedtensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x.requires_grad
