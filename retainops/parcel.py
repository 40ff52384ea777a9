"""How an answer leaves a compiled graph: a tensor to autograd, several tensors to the compiler.

A compiled graph cannot create a leaf, and a leaf made before the call would need the interior's shape. A `Parcel` has
none: to autograd it is a 0-dim tensor, and it carries named tensors of any shape. The slot's *carrier* is a parcel that
is a leaf, an input of the graph; the backward of a point returns a parcel as its gradient. AOTAutograd takes parcels
apart into ordinary graph outputs, which Inductor stores from its fused kernels. Adding two parcels merges part by part,
each by its own rule, so a maximum stays a maximum.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from retainops.stats import MERGE


class Parcel(torch.Tensor):
    """To autograd a 0-dim float32 tensor; carries named tensors of any shape. Adding two merges them.

    Its device is what autograd compares with the carrier's. What it carries may be on another: a carrier is made before
    anybody knows where the point will be.
    """

    _names: tuple[str, ...]
    _op: str  # that gave them, for messages; not the point: a graph is one for all layers, whatever they are called
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, op: str, names: tuple[str, ...], parts: Sequence[torch.Tensor], device: torch.device | None = None
    ) -> Parcel:
        return torch.Tensor._make_wrapper_subclass(cls, (), dtype=torch.float32, device=device or parts[0].device)

    def __init__(
        self, op: str, names: tuple[str, ...], parts: Sequence[torch.Tensor], device: torch.device | None = None
    ) -> None:
        self._op, self._names = op, names
        for name, part in zip(names, parts, strict=True):
            setattr(self, f"_{name}", part)

    def parts(self) -> dict[str, torch.Tensor]:
        """The tensors it carries."""
        return {name: getattr(self, f"_{name}") for name in self._names}

    def _like(self, device: torch.device | None = None) -> Parcel:
        """Another one of the same parts."""
        return Parcel(self._op, self._names, list(self.parts().values()), device or self.device)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Parcel({self.parts()})"

    def __tensor_flatten__(self) -> tuple[list[str], tuple[str, tuple[str, ...], torch.device]]:
        return [f"_{name}" for name in self._names], (self._op, self._names, self.device)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, torch.Tensor], meta: tuple[str, tuple[str, ...], torch.device], *_: Any
    ) -> Parcel:
        op, names, device = meta
        return Parcel(op, names, [inner[f"_{name}"] for name in names], device)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        op, aten = func.overloadpacket, torch.ops.aten
        if op is aten.add:
            return _add(*args[:2])
        # What autograd does to a gradient on its way to a leaf, and to a leaf on its way into a graph.
        if op in (aten.detach, aten.alias, aten.clone, aten.view, aten.new_empty_strided, aten.empty_like):
            return args[0]._like()
        if op is aten._to_copy and (kwargs or {}).keys() <= {"device"}:  # to where the carrier is
            return args[0]._like((kwargs or {}).get("device"))
        if op is aten.isnan:  # what anomaly mode asks of every gradient
            return torch.stack([part.isnan().any() for part in args[0].parts().values()]).any()
        if op is aten.copy_:
            args[0].__init__(args[1]._op, args[1]._names, list(args[1].parts().values()))
            return args[0]
        raise RuntimeError(f"the gradient of a slot inside torch.compile came to {func}, which is not defined for it")


def _add(x: Parcel, y: Parcel) -> Parcel:
    ours, theirs = x.parts(), y.parts()
    for name, part in ours.items():
        for what in ("shape", "dtype"):
            if (one := getattr(part, what)) != (other := getattr(theirs[name], what)):
                one, other = (tuple(s) if what == "shape" else s for s in (one, other))
                raise RuntimeError(
                    f"{x._op}: a point inside torch.compile was used with two {what}s before one backward: "
                    f"{one} and {other}; give each use a slot of its own"
                )
    return Parcel(x._op, x._names, [MERGE[name](part, theirs[name]) for name, part in ours.items()], x.device)


def pack(op: str, names: tuple[str, ...], *parts: torch.Tensor) -> torch.Tensor:
    """A parcel, made inside a compiled graph."""
    return Parcel(op, names, parts)


@functools.cache
def _let_dynamo_keep_pack() -> None:
    # Here rather than on import: torch._dynamo takes a second to load (which every optimizer step asks for as well).
    torch.compiler.allow_in_graph(pack)


def carrier() -> torch.Tensor:
    """A leaf for a slot inside torch.compile."""
    _let_dynamo_keep_pack()
    # On the GPU where one is in use: a CPU input would keep CUDA graphs away from the whole graph.
    device = "cuda" if torch.cuda.is_initialized() else "cpu"
    return Parcel("", ("dense",), [torch.empty((), device=device)]).requires_grad_()  # nobody reads its value
