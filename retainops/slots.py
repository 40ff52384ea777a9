"""Slots: one point that was asked for, and where the answer lands.

A slot is a leaf tensor of one stored element, expanded to the interior's shape, that an op takes as one more
differentiable input. The op's backward returns the interior's gradient for it, and everything else (accumulation,
`retain_graph`, `create_graph`, `torch.autograd.grad`, hooks) is autograd's own doing.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from retainops.arrivals import Arrival, noted
from retainops.buffers import Into, share_memory
from retainops.delivery import Addressee
from retainops.part import Part
from retainops.relevance import KINDS, Relevance
from retainops.shards import is_dtensor
from retainops.stats import STATISTICS, TAKE_VALUE, Stats, merge, parts_of, total
from retainops.stats import Part as PartOfStats
from retainops.wants import Answer, Want

_UNREAL = [getattr(torch._C._TorchDispatchModeKey, name) for name in ("FAKE", "PROXY", "FUNCTIONAL")]
"""Modes whose tensors mean nothing outside of them."""


class Slot(Addressee):
    """One point that was asked for, and its gradient or its statistics once `backward()` has run.

    Attributes:
        name: the point's name.
        grad: the gradient of the loss with respect to the interior value: shape and dtype of the interior (an
            `Into` buffer's dtype there); None before backward, and if only statistics were asked for. It accumulates
            over uses and backward calls.
        l2, sum, ...: one attribute a statistic of `Stats` or a relevance of `Relevance`; None before backward.
        tensor: the leaf itself, for `torch.autograd.grad(loss, slot.tensor)` and hooks. A hook sees the gradient;
            it cannot change what flows on to the op's inputs.
        shape, dtype: the interior's, of a `Part` that part's; None until the slot's first use.
    """

    def __init__(self, name: str, want: Want = None) -> None:
        self.name = name
        self.want = want
        self._leaf: torch.Tensor | None = None
        self._filled = False  # an Into buffer holds a gradient
        self._may_rebind = False
        self._parts: dict[str, PartOfStats] = {}
        self._reduced_over: set[tuple[int, ...]] = set()  # ranks that the statistics are of, beside this one
        self._along: list[tuple[list[int], int]] = []  # and, reduced, those of the mesh that they were DTensors of
        self._arrival: Arrival | None = None
        self._connect()

    def _connect(self) -> None:
        # Leaves of other shapes since `reset()`, which statistics may come to as well; a graph holds each of them.
        self._others: MutableMapping[int, torch.Tensor] | None = None
        self._lock = threading.RLock()  # threads may use one slot at once; backward calls come from several anyway
        self._new_carrier()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles take the gradient along, and get a lock and a carrier of their own."""
        state = {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("_lock", "_others", "carrier", "_address")
        }
        return {**state, "_leaf.grad": None if self._leaf is None else self._leaf.grad}  # a pickled leaf loses its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        grad = state.pop("_leaf.grad", None)
        self.__dict__.update(state)
        if self._leaf is not None:
            self._leaf.grad = grad
        self._connect()

    @property
    def grad(self) -> torch.Tensor | None:
        if isinstance(self.want, Into):
            return self.want.buffer if self._filled else None
        return None if self._leaf is None else self._leaf.grad

    @property
    def tensor(self) -> torch.Tensor:
        if self._leaf is None:
            raise RuntimeError(
                f"slot '{self.name}' has no tensor yet: it takes its shape from the first op called with it; "
                "call the op with retain= first. (Inside a compiled graph it has none: use backward())"
            )
        return self._leaf

    @property
    def shape(self) -> torch.Size | None:
        return None if self._leaf is None else self._leaf.shape

    @property
    def dtype(self) -> torch.dtype | None:
        return None if self._leaf is None else self._leaf.dtype

    @property
    def parts(self) -> tuple[str, ...]:
        """What a compiled graph is to answer: the gradient ("dense"), parts of statistics, or both."""
        if not isinstance(self.want, (Stats, Relevance)):
            return ("dense",)
        return (("dense",) if self.want.grad else ()) + self.want.parts

    @property
    def takes_value(self) -> bool:
        """Whether the answer needs the point's value beside its gradient."""
        return not TAKE_VALUE.isdisjoint(self.parts)

    def __getattr__(self, name: str) -> torch.Tensor | None:
        want = self.__dict__.get("want")
        if isinstance(want, Stats) and name in want.names:
            statistic = STATISTICS[name]
            return statistic.read(*(total(self._parts[p]) for p in statistic.parts)) if self._parts else None
        if isinstance(want, Relevance) and name in want.names:
            return total(self._parts[name]).clone() if self._parts else None
        asked = "it has no statistics"
        if name in ("value", "data", "activation"):
            asked = "a slot holds gradients; for values hook the module whose input or output they are"
        elif isinstance(want, (Stats, Relevance)):
            asked = f"its {'statistics' if isinstance(want, Stats) else 'relevances'} are {', '.join(want.names)}"
        if name in STATISTICS or name in KINDS:
            asked += f'; ask with {"Stats" if name in STATISTICS else "Relevance"}("{name}")'
        raise AttributeError(f"slot '{self.__dict__.get('name')}' has no attribute '{name}': {asked}")

    def reset(self) -> None:
        """Forget the gradient, as `tensor.grad = None` does; the next use may have another shape."""
        self._filled = False
        self._may_rebind = True
        self._parts = {}
        self._reduced_over = set()
        self._along = []
        self._others = None
        self._arrival = None
        self.carrier.grad = None
        self._disown()
        if self._leaf is not None:
            self._leaf.grad = None

    def renew(self) -> None:
        """`reset()`; and what graphs from before it still deliver is not shown, nor do hooks on `tensor` stay.

        (An `Into` buffer is one for all graphs.)
        """
        self.reset()
        self._leaf = None
        self._new_carrier()

    def bind(self, op: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The leaf for an interior of this shape, dtype and device: made at the first use, the same one after that.

        Raises:
            RuntimeError: the slot was used with another shape, dtype or device and not reset since. (Statistics without
                the gradient take other shapes, if they have the same shape themselves: one number has.)
            ValueError: the `Into` buffer does not fit, or the `Stats` or the `Relevance` cannot be taken.
            IndexError: the `Part` is out of range.
        """
        with self._lock:
            if isinstance(self.want, Part):
                shape = self.want.shape(op, self.name, shape)
            return self._bind(op, shape, dtype, device)

    def _bind(self, op: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        leaf, fakes = self._leaf, _makes_fakes()
        alike = leaf is not None and (type(leaf) is torch.Tensor) != fakes
        if leaf is not None and alike and (leaf.shape, leaf.dtype, leaf.device) == (shape, dtype, device):
            self._may_rebind = False
            return leaf
        if leaf is not None and not self._may_rebind:
            if not alike:
                raise RuntimeError(
                    f"{op}: point '{self.name}' is {'of' if fakes else 'outside of'} a FakeTensorMode here, and its "
                    f"slot was used {'outside of it' if fakes else 'inside one'}; call reset() on it between the two, "
                    "or use one Retained for each"
                )
            if not self._adds_up(leaf, shape, dtype, device):
                alike = (leaf.dtype, leaf.device) == (dtype, device)
                any_shape = ", or ask for statistics of the whole tensor alone, which take any shape" if alike else ""
                raise RuntimeError(
                    f"{op}: point '{self.name}' has shape {tuple(shape)}, {dtype}, on {device} here, but its slot "
                    f"holds one of shape {tuple(leaf.shape)}, {leaf.dtype}, on {leaf.device}; call reset() on it "
                    f"between the two, or use one Retained for each{any_shape}"
                )
            if self._others is None:
                self._others = weakref.WeakValueDictionary()
            self._others[id(leaf)] = leaf
        if self.want is not None and not isinstance(self.want, Part):
            self.want.check(op, self.name, shape, dtype, device)
        self._leaf = self._new_leaf(shape, dtype, device)
        self._may_rebind = False
        return self._leaf

    def _adds_up(self, leaf: torch.Tensor, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> bool:
        want = self.want
        if not isinstance(want, Stats) or want.grad or (leaf.dtype, leaf.device) != (dtype, device):
            return False
        return want.shape(shape) == want.shape(leaf.shape)

    @staticmethod
    def _new_leaf(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        # One stored element, whatever the shape: a slot costs no memory until its gradient arrives.
        modes = torch._C._len_torch_dispatch_stack()
        if modes and any(torch._C._get_dispatch_mode(key) is not None for key in _UNREAL):
            return torch.zeros((), dtype=dtype, device=device).expand(shape).requires_grad_()
        # A selective checkpoint takes what it saved by counting operations, and running forward again makes no leaf.
        with _disable_current_modes() if modes else contextlib.nullcontext():
            zero = _zero(dtype, device)
            # Of one element or none it would count as dense, a gradient would be cloned to its strides, and adding to
            # one of stride 0 autograd warns.
            few = len(shape) > 0 and shape.numel() <= 1
            return (zero.new_zeros(shape) if few else zero.expand(shape)).requires_grad_()

    def answer(self, op: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Answer:
        """For an op's backward: a tensor to write the gradient to, dense and new or the caller's buffer.

        The shape is the graph's: the slot itself may have been reset and bound to another one since.
        """
        self.note_arrival()
        return self._answer(op, shape, dtype, device)

    def _answer(self, op: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Answer:
        if self.want is None:
            new = torch.empty(shape, dtype=dtype, device=device)
            return Answer(new, False, new, None)
        if isinstance(self.want, Into):
            buffer = self.want.buffer
            self.want.check(op, self.name, shape, dtype, device)
            torch.autograd.graph.increment_version(buffer)  # a kernel's writes are otherwise unknown to autograd
            return Answer(buffer, self.want.accumulate or self._filled, None, None)
        if isinstance(self.want, Relevance):
            return Answer(None, False, None, None)
        stats = self.want if isinstance(self.want, Stats) else None
        if stats is not None and not stats.grad:
            return Answer(None, False, None, stats)
        new = torch.empty(shape, dtype=dtype, device=device)
        return Answer(new, False, new, stats)

    def written(self) -> None:
        """An `Into` buffer that `answer` named has its gradient now (and had not, if a backward failed before)."""
        self._filled = isinstance(self.want, Into)

    def merge(self, parts: Mapping[str, PartOfStats], leaf: torch.Tensor | None = None) -> None:
        """Take one backward call's parts of statistics, unless they come to a leaf that a reset has done away with."""
        earlier: Mapping[int, torch.Tensor] = self._others or {}
        if leaf is not None and leaf is not self._leaf and earlier.get(id(leaf)) is not leaf:
            return
        with self._lock:
            # No graph is kept through statistics, and what create_graph gave is not theirs to hold.
            alone = {name: part.detach() if isinstance(part, torch.Tensor) else part for name, part in parts.items()}
            self._parts = merge(self.name, self._parts, alone)

    def apart(self, grad: torch.Tensor) -> torch.Tensor:
        """A gradient that goes on to others, as it is now: an `Into` buffer that is this very tensor will change."""
        buffer = self.want.buffer if isinstance(self.want, Into) else None
        if buffer is None or not torch._C._has_storage(grad) or not share_memory(grad, buffer):
            return grad
        return grad.clone()

    def deposit(
        self, op: str, grad: torch.Tensor, value: torch.Tensor | None, leaf: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Take a gradient that comes, and exists already; what to return to autograd for the slot. See `place`."""
        self.note_arrival()
        return self.place(op, grad, value, leaf)

    def place(
        self, op: str, grad: torch.Tensor, value: torch.Tensor | None, leaf: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Put a gradient, of which it is noted that it came, where the caller wants it.

        `value` is the interior's value, for statistics that need it; `leaf` is the one that the graph was built with.
        `grad` and `value` may be wider than the interior's dtype: what is kept is rounded to it last.
        """
        dtype = grad.dtype if leaf is None else leaf.dtype
        if isinstance(self.want, (Into, Stats)) and not torch._C._has_storage(grad):
            batched = "batched (is_grads_batched, or a vectorised jacobian)", ", or go through the batch in a loop"
            kind, more = batched if grad.layout is torch.strided else (f"of the layout {grad.layout}", "")
            raise RuntimeError(
                f"{op}: point '{self.name}' was asked for {self.want}, and its gradient is {kind}; "
                f"ask for the gradient itself{more}"
            )
        if isinstance(self.want, Into):
            with self._lock, torch.no_grad():
                self.want.check_kind(op, self.name, is_dtensor(grad))
                answer = self._answer(op, grad.shape, dtype, grad.device)
                if answer.accumulate:
                    self.want.buffer.add_(grad)
                else:
                    self.want.buffer.copy_(grad)
                self.written()
            return None
        if isinstance(self.want, Part):
            return self.want.of(op, self.name, grad).to(dtype)
        if self.want is not None:
            with torch.no_grad():
                found = parts_of(self.want.parts, self.want.over, grad.detach(), value, dtype)
                self.merge(dict(zip(self.want.parts, found, strict=True)), leaf)
            return grad.to(dtype) if self.want.grad else None
        return grad.to(dtype)

    def _readings(self) -> dict[str, torch.Tensor | None]:
        names = self.want.names if isinstance(self.want, (Stats, Relevance)) else ()
        return {"grad": self.grad, **{name: getattr(self, name) for name in names}}

    def note_arrival(self, compiled: bool = False) -> None:
        """Something came: `first_nonfinite` asks for the order."""
        with self._lock:
            self._arrival = noted(self._arrival, compiled)

    def _is_finite(self) -> bool | None:
        """Whether the gradient is; None: there is none. Reads a value, so it waits for the GPU."""
        if self.grad is not None:
            grad = self.grad.detach()
            values = grad.coalesce().values() if grad.is_sparse else grad
            (count,) = parts_of(("nonfinite",), "tensor", values, None)
            return not bool(total(count))  # of a DTensor, on every rank the same
        found = self.nonfinite if isinstance(self.want, Stats) and self._tells_nonfinite() else None
        return None if found is None else not bool(found.any())

    def _tells_nonfinite(self) -> bool:
        if isinstance(self.want, (Part, Relevance)):
            return False
        return not isinstance(self.want, Stats) or self.want.grad or "nonfinite" in self.want.names

    def __repr__(self) -> str:
        return f"Slot({', '.join(self._row())})"

    def _row(self) -> tuple[str, str, str, str]:
        filled = bool(self._parts) if isinstance(self.want, (Stats, Relevance)) else self.grad is not None
        unknown = "any shape" if filled else "not used yet"  # statistics out of a compiled graph come without a shape
        shape = unknown if self.shape is None else str(tuple(self.shape))
        dtype = "" if self.dtype is None else str(self.dtype).removeprefix("torch.")
        state = "grad" if self.want is None else repr(self.want)
        return self.name, shape, dtype, state if filled else f"no {state} yet"


def _makes_fakes() -> bool:
    """Whether a FakeTensorMode is active, whose tensors have no values."""
    key = torch._C._TorchDispatchModeKey.FAKE
    return bool(torch._C._len_torch_dispatch_stack()) and torch._C._get_dispatch_mode(key) is not None


@functools.cache
def _zero(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What all slots of a dtype are expansions of: making one costs a kernel's launch."""
    with torch.inference_mode(False):
        return torch.zeros((), dtype=dtype, device=device)
