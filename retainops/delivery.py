"""How the answers of a compiled graph come to their slots, once its backward has run."""

from __future__ import annotations

import functools
import threading
import weakref
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch

from retainops import parcel
from retainops.buffers import Into, share_memory
from retainops.shards import local
from retainops.stats import Part as PartOfStats
from retainops.wants import Want

_owners: weakref.WeakValueDictionary[int, Addressee] = weakref.WeakValueDictionary()
"""By the address of a gradient out of a graph, the slot that took it last."""


class Addressee:
    """The part of a slot that compiled graphs know: a carrier, and what becomes of all that arrives at it.

    Attributes:
        carrier: a leaf, an input of the graph; backward accumulates a parcel in it.
    """

    name: str
    want: Want
    carrier: torch.Tensor
    _lock: threading.RLock

    def _new_carrier(self) -> None:
        """One to which nothing comes that was sent to an earlier one."""
        self._address: int | None = None  # of the gradient out of a graph that is held
        self.carrier = parcel.carrier()
        self.carrier.register_post_accumulate_grad_hook(functools.partial(_outside_graphs(), weakref.ref(self)))

    def _deliver(self, parts: dict[str, torch.Tensor]) -> None:
        self.note_arrival(compiled=True)
        dense = parts.pop("dense", None)
        # The full gradient's shape is checked before anything is taken.
        with self._lock:  # not by `bind`: a Part is one already
            leaf = None if dense is None else self._bind("torch.compile", dense.shape, dense.dtype, dense.device)
        if parts:
            self.merge(parts)
        if dense is None or leaf is None:
            return
        if isinstance(self.want, Into):
            self.place("torch.compile", dense, None)
            return
        if torch.is_grad_enabled():  # create_graph
            dense = NoSecond.apply(dense, torch.empty((), device=dense.device, requires_grad=True), self.name)
        with self._lock:
            leaf.grad = self._own(dense.contiguous()) if leaf.grad is None else leaf.grad + dense

    def _own(self, dense: torch.Tensor) -> torch.Tensor:
        """A gradient out of a graph in memory that no other slot holds: what is equal Inductor stores once for all."""
        owner = _owners.get(local(dense).data_ptr())
        held = None if owner is None or owner is self else owner.grad
        if held is not None and share_memory(held, dense):
            dense = dense.clone()
        self._disown()
        self._address = local(dense).data_ptr()
        _owners[self._address] = self
        return dense

    def _disown(self) -> None:
        if self._address is not None and _owners.get(self._address) is self:
            del _owners[self._address]
        self._address = None

    # What a slot does for compiled graphs as for all others.

    @property
    @abstractmethod
    def grad(self) -> torch.Tensor | None: ...

    @abstractmethod
    def _bind(self, op: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor: ...

    @abstractmethod
    def merge(self, parts: Mapping[str, PartOfStats], leaf: torch.Tensor | None = None) -> None: ...

    @abstractmethod
    def place(
        self, op: str, grad: torch.Tensor, value: torch.Tensor | None, leaf: torch.Tensor | None = None
    ) -> torch.Tensor | None: ...

    @abstractmethod
    def note_arrival(self, compiled: bool = False) -> None: ...


@functools.cache
def _outside_graphs() -> Callable[[weakref.ref[Addressee], torch.Tensor], None]:
    return torch.compiler.disable(_unpack)  # at the first slot: it loads torch._dynamo


def _unpack(addressee: weakref.ref[Addressee], carrier: torch.Tensor) -> None:
    """After a backward: move what arrived at the carrier into the slot, outside any graph."""
    slot, parts = addressee(), carrier.grad
    if slot is not None and slot.carrier is carrier and isinstance(parts, parcel.Parcel):
        carrier.grad = None
        slot._deliver(parts.parts())


class NoSecond(torch.autograd.Function):
    """A gradient out of a compiled graph under create_graph: what is made of it fails in backward, not to lose a part.

    PyTorch does the same for the gradients of such a graph's inputs.
    """

    @staticmethod
    def forward(ctx: Any, dense: torch.Tensor, _: torch.Tensor, name: str) -> torch.Tensor:
        ctx.name = name
        return dense.view_as(dense)

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> NoReturn:
        raise RuntimeError(
            f"torch.compile: the gradient of point '{ctx.name}' was made in a compiled graph, which has no second "
            "derivative; ask for it in eager, or detach() it"
        )
