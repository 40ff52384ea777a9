"""Slots: what a caller asks for, and where the answer lands.

A slot is a leaf tensor of one stored element, expanded to the interior's shape, that an op takes as one more
differentiable input. The op's backward returns the interior's gradient for it, and everything else (accumulation,
`retain_graph`, `create_graph`, `torch.autograd.grad`, hooks) is autograd's own doing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch


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

    def __repr__(self) -> str:
        return f"Into({self.buffer.dtype} buffer{', accumulate=True' if self.accumulate else ''})"


class Answer(NamedTuple):
    """Where one backward call puts a point's gradient, and what it then returns to autograd for the slot."""

    tensor: torch.Tensor
    accumulate: bool  # add to what is there
    returned: torch.Tensor | None


class Slot:
    """One point that was asked for, and its gradient once `backward()` has run.

    Attributes:
        name: the point's name.
        grad: the gradient of the loss with respect to the interior value: shape and dtype of the interior (an
            `Into` buffer's dtype there); None before backward. It accumulates over uses and backward calls.
        tensor: the leaf itself, for `torch.autograd.grad(loss, slot.tensor)` and hooks. A hook sees the gradient;
            it cannot change what flows on to the op's inputs.
        shape, dtype: the interior's; None until the slot's first use.
    """

    def __init__(self, name: str, want: Into | None = None) -> None:
        self.name = name
        self.want = want
        self._leaf: torch.Tensor | None = None
        self._filled = False  # an Into buffer holds a gradient
        self._may_rebind = False

    @property
    def grad(self) -> torch.Tensor | None:
        if self.want is not None:
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

    def reset(self) -> None:
        """Forget the gradient, as `tensor.grad = None` does; the next use may have another shape."""
        self._filled = False
        self._may_rebind = True
        if self._leaf is not None:
            self._leaf.grad = None

    def bind(self, op: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The leaf for an interior of this shape, dtype and device: made at the first use, the same one after that.

        Raises:
            RuntimeError: the slot was used with another shape, dtype or device and not reset since.
            ValueError: the `Into` buffer does not fit.
        """
        leaf = self._leaf
        if leaf is not None and (leaf.shape, leaf.dtype, leaf.device) == (shape, dtype, device):
            self._may_rebind = False
            return leaf
        if leaf is not None and not self._may_rebind:
            raise RuntimeError(
                f"{op}: point '{self.name}' has shape {tuple(shape)}, {dtype}, on {device} here, but its slot holds one "
                f"of shape {tuple(leaf.shape)}, {leaf.dtype}, on {leaf.device}; call reset() on it between the two, or "
                "use one Retained for each"
            )
        if self.want is not None:
            self._check_buffer(op, self.want.buffer, shape, dtype, device)
        # One stored element, whatever the shape: a slot costs no memory until its gradient arrives.
        self._leaf = torch.zeros((), dtype=dtype, device=device).expand(shape).requires_grad_()
        self._may_rebind = False
        return self._leaf

    def answer(self, op: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Answer:
        """For an op's backward: a tensor to write the gradient to, dense and new or the caller's buffer.

        The shape is the graph's: the slot itself may have been reset and bound to another one since.
        """
        if self.want is None:
            new = torch.empty(shape, dtype=dtype, device=device)
            return Answer(new, False, new)
        buffer = self.want.buffer
        self._check_buffer(op, buffer, shape, dtype, device)
        if not buffer.is_inference():
            torch.autograd.graph.increment_version(buffer)  # a kernel's writes are otherwise unknown to autograd
        accumulate, self._filled = self.want.accumulate or self._filled, True
        return Answer(buffer, accumulate, None)

    def deposit(self, op: str, grad: torch.Tensor) -> torch.Tensor | None:
        """Put a gradient that exists already where the caller wants it; what to return to autograd for the slot."""
        if self.want is None:
            return grad
        buffer, accumulate, _ = self.answer(op, grad.shape, grad.dtype, grad.device)
        with torch.no_grad():
            if accumulate:
                buffer.add_(grad)
            else:
                buffer.copy_(grad)
        return None

    def _check_buffer(
        self, op: str, buffer: torch.Tensor, shape: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> None:
        right_dtype = buffer.dtype in (dtype, torch.float32) if dtype != torch.float64 else buffer.dtype == dtype
        if buffer.shape != shape or buffer.device != device or not right_dtype:
            raise ValueError(
                f"{op}: the Into buffer for point '{self.name}' has shape {tuple(buffer.shape)}, {buffer.dtype}, on "
                f"{buffer.device}; expected shape {tuple(shape)}, {dtype}, on {device}"
                + ("" if dtype == torch.float64 else " (or torch.float32)")
            )

    def __repr__(self) -> str:
        return f"Slot({', '.join(self._row())})"

    def _row(self) -> tuple[str, str, str, str]:
        shape = "not used yet" if self.shape is None else str(tuple(self.shape))
        dtype = "" if self.dtype is None else str(self.dtype).removeprefix("torch.")
        state = "no grad yet" if self.grad is None else "grad" if self.want is None else f"grad in {self.want}"
        return self.name, shape, dtype, state


class Retained(Mapping[str, Slot]):
    """A request for the gradients of an op's points, and afterwards their holder: a mapping from name to `Slot`.

    Args:
        *names: points whose full gradient is wanted.
        **wants: points whose gradient is wanted in another form: `c=ro.Into(buffer)`.

    Raises:
        TypeError: a name is not a string, a want is not an `Into`, or nothing is asked for.
        ValueError: a name is given twice.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.mul_sin(a, b, retain=kept).sum().backward()
        >>> kept.c.grad is kept["c"].grad
        True
    """

    def __init__(self, *names: str, **wants: Into) -> None:
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
            if not isinstance(want, Into):
                raise TypeError(f"Retained: {name}= is {type(want).__name__}; expected Into(buffer)")
            self._slots[name] = Slot(name, want)

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

    def __repr__(self) -> str:
        rows = [slot._row() for slot in self._slots.values()]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "Retained\n" + "\n".join("  " + line.rstrip() for line in lines)


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
