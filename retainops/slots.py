"""Slots: what a caller asks for, and where the answer lands.

A slot is a leaf tensor of one stored element, expanded to the interior's shape, that an op takes as one more
differentiable input. The op's backward returns the interior's gradient for it, and everything else (accumulation,
`retain_graph`, `create_graph`, `torch.autograd.grad`, hooks) is autograd's own doing.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch

from retainops import parcel
from retainops.stats import STATISTICS, Stats, merge, parts_of


class Into:
    """Ask for a point's gradient in a buffer of yours, written by the backward kernel itself.

    Args:
        buffer: a tensor of the point's shape and device, in the point's dtype or float32 (which keeps what the
            kernel computed, unrounded). Any strides, but no two elements may share memory. It must not require grad.
        accumulate: False: the first gradient after the slot was made or `reset()` overwrites the buffer and later
            ones add to it. True: every gradient adds to what the buffer holds.

    Raises:
        TypeError: `buffer` is not a tensor.
        ValueError: `buffer` requires grad, is not floating point, or overlaps itself.

    Example:
        >>> total = torch.zeros(1024, 1024)
        >>> y = ro.mul_sin(a, b, retain=ro.Retained(c=ro.Into(total, accumulate=True)))
    """

    __slots__ = ("accumulate", "buffer")

    def __init__(self, buffer: torch.Tensor, *, accumulate: bool = False) -> None:
        if not isinstance(buffer, torch.Tensor):
            raise TypeError(f"Into: buffer is {type(buffer).__name__}; expected a torch.Tensor to write into")
        if buffer.requires_grad:
            raise ValueError("Into: buffer requires grad; pass buffer.detach(), or a tensor made without it")
        if not buffer.is_floating_point() or buffer.layout != torch.strided:
            raise ValueError(f"Into: buffer is {buffer.dtype}, {buffer.layout}; expected a dense floating-point tensor")
        if overlaps_itself(buffer):
            raise ValueError(
                f"Into: elements of buffer share memory (shape {tuple(buffer.shape)}, strides {buffer.stride()}); "
                "pass a tensor that owns each element, such as torch.empty(shape)"
            )
        self.buffer = buffer
        self.accumulate = accumulate

    def check(self, op: str, point: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        """Raise if the buffer cannot hold a gradient like this."""
        buffer = self.buffer
        right_dtype = buffer.dtype in (dtype, torch.float32) if dtype != torch.float64 else buffer.dtype == dtype
        if buffer.shape != shape or buffer.device != device or not right_dtype:
            raise ValueError(
                f"{op}: the Into buffer for point '{point}' has shape {tuple(buffer.shape)}, {buffer.dtype}, on "
                f"{buffer.device}; expected shape {tuple(shape)}, {dtype}, on {device}"
                + ("" if dtype == torch.float64 else " (or torch.float32)")
            )

    def __repr__(self) -> str:
        return f"Into({self.buffer.dtype} buffer{', accumulate=True' if self.accumulate else ''})"


class Answer(NamedTuple):
    """What one backward call is to do for a slot.

    Attributes:
        tensor: where the gradient goes; None if only statistics are wanted.
        accumulate: add to what is there.
        returned: what backward returns to autograd for the slot.
        stats: statistics to take and hand to `Slot.merge`.
    """

    tensor: torch.Tensor | None
    accumulate: bool
    returned: torch.Tensor | None
    stats: Stats | None


class Arrival(NamedTuple):
    """When the first gradient since `reset()` came to a slot.

    Attributes:
        number: counts up over all slots, in the order of backward.
        compiled: it came out of a compiled graph, which hands over all that it has at once, in any order.
    """

    number: int
    compiled: bool


_arrivals = itertools.count()


class Slot:
    """One point that was asked for, and its gradient or its statistics once `backward()` has run.

    Attributes:
        name: the point's name.
        grad: the gradient of the loss with respect to the interior value: shape and dtype of the interior (an
            `Into` buffer's dtype there); None before backward, and if only statistics were asked for. It accumulates
            over uses and backward calls.
        l2, sum, ...: one attribute a statistic of `Stats`; None before backward.
        tensor: the leaf itself, for `torch.autograd.grad(loss, slot.tensor)` and hooks. A hook sees the gradient;
            it cannot change what flows on to the op's inputs.
        shape, dtype: the interior's; None until the slot's first use.
    """

    def __init__(self, name: str, want: Into | Stats | None = None) -> None:
        self.name = name
        self.want = want
        self._leaf: torch.Tensor | None = None
        self._filled = False  # an Into buffer holds a gradient
        self._may_rebind = False
        self._parts: dict[str, torch.Tensor] = {}
        self._arrival: Arrival | None = None
        self.carrier = parcel.carrier(name)
        self.carrier.register_post_accumulate_grad_hook(functools.partial(_outside_graphs(), weakref.ref(self)))

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
                "call the op with retain= first"
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
        """What a compiled graph is to answer: the full gradient ("dense"), parts of statistics, or both."""
        if not isinstance(self.want, Stats):
            return ("dense",)
        return (("dense",) if self.want.grad else ()) + self.want.parts

    def __getattr__(self, name: str) -> torch.Tensor | None:
        want = self.__dict__.get("want")
        if isinstance(want, Stats) and name in want.names:
            statistic = STATISTICS[name]
            return statistic.read(*(self._parts[p] for p in statistic.parts)) if self._parts else None
        asked = f"its statistics are {', '.join(want.names)}" if isinstance(want, Stats) else "it has no statistics"
        if name in STATISTICS:
            asked += f'; ask with Stats("{name}")'
        raise AttributeError(f"slot '{self.__dict__.get('name')}' has no attribute '{name}': {asked}")

    def reset(self) -> None:
        """Forget the gradient, as `tensor.grad = None` does; the next use may have another shape."""
        self._filled = False
        self._may_rebind = True
        self._parts = {}
        self._arrival = None
        self.carrier.grad = None
        if self._leaf is not None:
            self._leaf.grad = None

    def bind(self, op: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The leaf for an interior of this shape, dtype and device: made at the first use, the same one after that.

        Raises:
            RuntimeError: the slot was used with another shape, dtype or device and not reset since.
            ValueError: the `Into` buffer does not fit, or the `Stats` cannot be taken.
        """
        leaf = self._leaf
        if leaf is not None and (leaf.shape, leaf.dtype, leaf.device) == (shape, dtype, device):
            self._may_rebind = False
            return leaf
        if leaf is not None and not self._may_rebind:
            raise RuntimeError(
                f"{op}: point '{self.name}' has shape {tuple(shape)}, {dtype}, on {device} here, but its slot holds "
                f"one of shape {tuple(leaf.shape)}, {leaf.dtype}, on {leaf.device}; call reset() on it between the "
                "two, or use one Retained for each"
            )
        if self.want is not None:
            self.want.check(op, self.name, shape, dtype, device)
        # One stored element, whatever the shape: a slot costs no memory until its gradient arrives.
        self._leaf = torch.zeros((), dtype=dtype, device=device).expand(shape).requires_grad_()
        self._may_rebind = False
        return self._leaf

    def answer(self, op: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Answer:
        """For an op's backward: a tensor to write the gradient to, dense and new or the caller's buffer.

        The shape is the graph's: the slot itself may have been reset and bound to another one since.
        """
        self._note_arrival()
        if isinstance(self.want, Into):
            buffer = self.want.buffer
            self.want.check(op, self.name, shape, dtype, device)
            if not buffer.is_inference():
                torch.autograd.graph.increment_version(buffer)  # a kernel's writes are otherwise unknown to autograd
            accumulate, self._filled = self.want.accumulate or self._filled, True
            return Answer(buffer, accumulate, None, None)
        if self.want is not None and not self.want.grad:
            return Answer(None, False, None, self.want)
        new = torch.empty(shape, dtype=dtype, device=device)
        return Answer(new, False, new, self.want)

    def merge(self, parts: Mapping[str, torch.Tensor]) -> None:
        """Take one backward call's parts of statistics."""
        self._note_arrival()
        # No graph is kept through statistics, and what create_graph gave is not theirs to hold.
        self._parts = merge(self._parts, {name: part.detach() for name, part in parts.items()})

    def deposit(self, op: str, grad: torch.Tensor, value: torch.Tensor | None) -> torch.Tensor | None:
        """Put a gradient that exists already where the caller wants it; what to return to autograd for the slot.

        `value` is the interior's value, for statistics that need it.
        """
        self._note_arrival()
        if isinstance(self.want, Into):
            answer = self.answer(op, grad.shape, grad.dtype, grad.device)
            with torch.no_grad():
                if answer.accumulate:
                    self.want.buffer.add_(grad)
                else:
                    self.want.buffer.copy_(grad)
            return None
        if self.want is not None:
            with torch.no_grad():
                found = parts_of(self.want.parts, self.want.over, grad.detach(), value)
                self.merge(dict(zip(self.want.parts, found, strict=True)))
            return grad if self.want.grad else None
        return grad

    def _deposit_from_graph(self, parts: dict[str, torch.Tensor]) -> None:
        """Take what a compiled graph answered."""
        self._note_arrival(compiled=True)
        dense = parts.pop("dense", None)
        if parts:
            self.merge(parts)
        if dense is None:
            return
        leaf = self.bind("torch.compile", dense.shape, dense.dtype, dense.device)
        if isinstance(self.want, Into):
            self.deposit("torch.compile", dense, None)
        else:
            leaf.grad = dense.contiguous() if leaf.grad is None else leaf.grad + dense

    def _readings(self) -> dict[str, torch.Tensor | None]:
        names = self.want.names if isinstance(self.want, Stats) else ()
        return {"grad": self.grad, **{name: getattr(self, name) for name in names}}

    def _note_arrival(self, compiled: bool = False) -> None:
        if self._arrival is None:
            self._arrival = Arrival(next(_arrivals), compiled)

    def _is_finite(self) -> bool | None:
        """Whether the gradient is; None: there is none. Reads a value, so it waits for the GPU."""
        if self.grad is not None:
            return bool(self.grad.isfinite().all())
        found = self.nonfinite if self._tells_nonfinite() and isinstance(self.want, Stats) else None
        return None if found is None else not bool(found.any())

    def _tells_nonfinite(self) -> bool:
        return not isinstance(self.want, Stats) or self.want.grad or "nonfinite" in self.want.names

    def __repr__(self) -> str:
        return f"Slot({', '.join(self._row())})"

    def _row(self) -> tuple[str, str, str, str]:
        filled = bool(self._parts) if isinstance(self.want, Stats) else self.grad is not None
        unknown = "any shape" if filled else "not used yet"  # statistics out of a compiled graph come without a shape
        shape = unknown if self.shape is None else str(tuple(self.shape))
        dtype = "" if self.dtype is None else str(self.dtype).removeprefix("torch.")
        state = "grad" if self.want is None else repr(self.want)
        return self.name, shape, dtype, state if filled else f"no {state} yet"


@functools.cache
def _outside_graphs() -> Callable[[weakref.ref[Slot], torch.Tensor], None]:
    return torch.compiler.disable(_unpack)  # at the first slot: it loads torch._dynamo


def _unpack(slot: weakref.ref[Slot], leaf: torch.Tensor) -> None:
    """After a backward: move what arrived at the carrier into the slot, outside any graph."""
    holder, parts = slot(), leaf.grad
    if holder is not None and isinstance(parts, parcel.Parcel):
        leaf.grad = None
        holder._deposit_from_graph(parts.parts())


class Retained(Mapping[str, Slot]):
    """A request for the gradients of an op's points, and afterwards their holder: a mapping from name to `Slot`.

    Args:
        *names: points whose full gradient is wanted.
        **wants: points whose gradient is wanted in another form: `c=ro.Into(buffer)`, `c=ro.Stats("l2")`.

    Raises:
        TypeError: a name is not a string, a want is neither `Into` nor `Stats`, or nothing is asked for.
        ValueError: a name is given twice.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.mul_sin(a, b, retain=kept).sum().backward()
        >>> kept.c.grad is kept["c"].grad
        True
    """

    def __init__(self, *names: str, **wants: Into | Stats) -> None:
        if not names and not wants:
            raise TypeError('Retained: no point named; name at least one, as in Retained("c")')
        self._slots: dict[str, Slot] = {}
        for name in names:
            if not isinstance(name, str):
                raise TypeError(f"Retained: a point's name is {type(name).__name__}; expected a string")
            if name in self._slots or name in wants:
                raise ValueError(f"Retained: point '{name}' is named twice; name it once")
            self._slots[name] = Slot(name)
        for name, want in wants.items():
            if not isinstance(want, (Into, Stats)):
                raise TypeError(f"Retained: {name}= is {type(want).__name__}; expected Into(buffer) or Stats(...)")
            self._slots[name] = Slot(name, want)

    @classmethod
    def of(cls, slots: Mapping[str, Slot]) -> Retained:
        """A request that is answered in slots of another one, perhaps by other names."""
        new = cls.__new__(cls)
        new._slots = dict(slots)
        return new

    def __getitem__(self, name: str) -> Slot:
        try:
            return self._slots[name]
        except KeyError:
            raise KeyError(f"no point '{name}' was retained; there are: {', '.join(self._slots)}") from None

    def __getattr__(self, name: str) -> Slot:
        if not name.startswith("_") and name in self._slots:
            return self._slots[name]
        retained = ", ".join(self.__dict__.get("_slots", ()))
        raise AttributeError(f"Retained has no attribute or point '{name}'; retained points: {retained}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, name: object) -> bool:
        return name in self._slots

    # A request is an object with a state of its own: two equal-looking ones are two.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def reset(self) -> None:
        """Forget every slot's gradient; the next use may have other shapes."""
        for slot in self._slots.values():
            slot.reset()

    def to_dict(self) -> dict[str, dict[str, torch.Tensor | None]]:
        """Name of a point -> {"grad": its gradient, and each statistic asked for}; None for what is not there."""
        return {name: slot._readings() for name, slot in self._slots.items()}

    def state(self) -> dict[str, torch.Tensor]:
        """What is there, flat and detached: {"layers.0.act.grad": ..., "layers.0.act.l2": ...}, for `torch.save`."""
        found = ((f"{name}.{what}", t) for name, of in self.to_dict().items() for what, t in of.items())
        return {name: t.detach() for name, t in found if t is not None}

    def first_nonfinite(self) -> str | None:
        """The name of the first point, in the order of backward, whose gradient has an inf or a nan; None: all finite.

        It reads values, so it waits for the GPU. The order is that in which gradients first came since `reset()`. A
        compiled graph hands them over all at once: among its points, one that was registered (or asked for) later
        counts as earlier in backward.

        Raises:
            ValueError: of some point neither the gradient nor the statistic "nonfinite" was asked for.
            RuntimeError: no gradient has come yet.

        Example:
            >>> with ro.retain(model, "*", ro.Stats("nonfinite")) as kept:
            ...     model(x).sum().backward()
            >>> kept.first_nonfinite()
            'layers.7.act'
        """
        silent = [name for name, slot in self._slots.items() if not slot._tells_nonfinite()]
        if silent:
            raise ValueError(
                f'first_nonfinite: nothing tells of {listed(silent)}; ask for the gradient, or for Stats("nonfinite")'
            )
        arrived = _in_backward_order(self._slots)
        if not arrived:
            raise RuntimeError("first_nonfinite: no gradient has come to any point; call backward() first")
        return next((name for name in arrived if self._slots[name]._is_finite() is False), None)

    def __repr__(self) -> str:
        rows = [slot._row() for slot in self._slots.values()]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "Retained\n" + "\n".join("  " + line.rstrip() for line in lines)


def _in_backward_order(slots: Mapping[str, Slot]) -> list[str]:
    place = {name: i for i, name in enumerate(slots)}
    arrivals = sorted((slot._arrival, name) for name, slot in slots.items() if slot._arrival is not None)
    order: list[str] = []
    for compiled, group in itertools.groupby(arrivals, key=lambda arrived: arrived[0].compiled):
        names = [name for _, name in group]
        order += sorted(names, key=place.__getitem__, reverse=True) if compiled else names
    return order


def listed(names: Iterable[str], most: int = 20) -> str:
    """Names with commas between, the rest of a long list as a count."""
    names = list(names)
    more = len(names) - most
    return ", ".join(names[:most]) + (f", ... and {more} more" if more > 0 else "")


def overlaps_itself(t: torch.Tensor) -> bool:
    """Whether two elements of `t` may share memory (never False when they do)."""
    span = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1:
            if stride < span:
                return True
            span = stride * (size - 1) + span
    return False


def share_memory(t: torch.Tensor, u: torch.Tensor) -> bool:
    """Whether the address ranges of `t` and `u` meet."""
    if t.device != u.device or not t.numel() or not u.numel():
        return False
    (t0, t1), (u0, u1) = _range(t), _range(u)
    return t0 < u1 and u0 < t1


def _range(t: torch.Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()
