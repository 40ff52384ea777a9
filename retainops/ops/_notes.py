"""Notes of what is done to tensors: Python lines that do it again."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from retainops.ops._operands import listener
from retainops.slots import Slot

Tensor = torch.Tensor
Replay = Callable[..., Any]
aten = torch.ops.aten

EMPTY = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided)
"""What makes a tensor that nobody has written yet."""
ALIASES = (aten.alias.default, aten.detach.default)
"""What makes another tensor of the same memory and layout."""


class Notes(TorchDispatchMode):
    """What is done to tensors: by PyTorch, which tells a dispatch mode, and by kernels, which `launch` tells of.

    Attributes:
        are_whole: all that was done could be noted.
        is_early: a kernel was compiled for the first time: the next call has less to do.
    """

    def __init__(self, given: Sequence[Any], slots: Mapping[str, Slot]) -> None:
        super().__init__()
        self.given, self.slots = given, slots
        # An alias of each: one tensor in two places is two in another call of this key.
        self.aliases = [x.detach() if isinstance(x, Tensor) else x for x in given]
        self.names: dict[int, str] = {id(x): f"x{i}" for i, x in enumerate(self.aliases) if isinstance(x, Tensor)}
        self.held: list[Tensor] = []  # an id is a tensor's own while it lives
        self.lines: list[tuple[str, str]] = []  # the name that each gives a value, or "", and what it is
        self.constants: dict[str, Any] = {"empty_strided": torch.empty_strided, "new": tuple.__new__}
        self.are_whole, self.is_early, self.hears = True, False, True

    def take(self, do: Callable[..., Any]) -> Any:
        """Run and note it."""
        listener.set(self)
        try:
            with self:
                return do(*self.aliases)
        finally:
            listener.set(None)

    def given_back(self, results: Any) -> Any:
        """The results, with what was given itself and not its alias."""
        if isinstance(results, (tuple, list)):
            return type(results)(map(self.given_back, results))
        at = next((i for i, alias in enumerate(self.aliases) if alias is results and results is not None), None)
        return results if at is None else self.given[at]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.hears:
            return result
        results = result if isinstance(result, (tuple, list)) and func.is_view else (result,)
        for each in results:
            if not isinstance(each, Tensor):
                self.are_whole &= not _has_tensor(args)  # whose value is read
            elif torch.is_grad_enabled():  # a reference is differentiated
                self.are_whole = False
            elif func in ALIASES and self.names.get(id(args[0]), "x")[0] == "t":  # of a new tensor: PyTorch makes them
                self._name(each, self.names[id(args[0])])
            elif each.device.type != "meta":
                self._note(func, args, kwargs or {}, each)
        return result

    def _note(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor) -> None:
        size, stride = tuple(result.shape), tuple(result.stride())
        if func.overloadpacket in EMPTY:
            dtype, device = self._constant(result.dtype), self._constant(result.device)
            line = f"empty_strided({size}, {stride}, dtype={dtype}, device={device})"
        elif func.is_view and result.dtype == args[0].dtype:
            base = args[0]
            line = f"{self._of(base)}.as_strided({size}, {stride}"
            if further := result.storage_offset() - base.storage_offset():
                line += f", {self._of(base)}.storage_offset() + {further}"
            line += ")"
        else:
            named = "".join(f", {name}={self._of(x)}" for name, x in kwargs.items())
            line = f"{self._constant(func)}({', '.join(map(self._of, args))}{named})"
        if id(result) in self.names:  # written in place
            self.lines.append(("", line))
            return
        name = f"t{len(self.lines)}"
        self._name(result, name)
        self.lines.append((name, line))

    def _name(self, result: Tensor, name: str) -> None:
        self.names[id(result)] = name
        self.held.append(result)

    @contextlib.contextmanager
    def unheard(self) -> Iterator[None]:
        """What PyTorch does inside the `with` is not noted: a simulated GPU has it do the kernels' work."""
        self.hears = False
        try:
            yield
        finally:
            self.hears = True

    def started(self, start: Callable[..., None], device: int, arguments: Sequence[Any]) -> None:
        """A compiled kernel was started: `start` is what does it."""
        self.lines.append(("", f"{self._constant(start)}({device}, {', '.join(map(self._of, arguments))})"))

    def arrives(self, slot: Slot) -> None:
        """A gradient comes to a slot: which of them is first says `Retained.first_nonfinite`."""
        self.lines.append(("", f"slots[{self._point(slot)!r}].note_arrival()"))

    def _point(self, slot: Slot) -> str:
        return next(name for name, other in self.slots.items() if other is slot)

    def merge(self, slot: Slot, parts: Mapping[str, Any], leaf: Tensor) -> None:
        """Give a slot statistics. What becomes of those that it has is its own affair."""
        point = self._point(slot)
        inner = ", ".join(f"{name!r}: {self._of(part)}" for name, part in parts.items())
        self.lines.append(("", f"slots[{point!r}].merge({{{inner}}}, leaves[{point!r}])"))
        with self.unheard():
            slot.merge(parts, leaf)

    def _of(self, x: Any) -> str:
        """A value as the function has it."""
        if isinstance(x, Tensor):
            self.are_whole &= id(x) in self.names
            return self.names.get(id(x), "?")
        if isinstance(x, (tuple, list)) and _has_tensor(x):
            inner = "".join(f"{self._of(part)}, " for part in x)
            if type(x) in (tuple, list):
                return f"({inner})" if type(x) is tuple else f"[{inner}]"
            return f"new({self._constant(type(x))}, ({inner}))"  # a NamedTuple
        return repr(x) if x is None or type(x) in (int, bool) else self._constant(x)

    def _constant(self, x: Any) -> str:
        name = next((name for name, known in self.constants.items() if known is x), f"c{len(self.constants)}")
        self.constants[name] = x
        return name

    def replay(self, results: Any) -> Replay | None:
        """The function; None: not all could be noted."""
        source = self.source(results)
        if not self.are_whole:
            return None
        namespace = dict(self.constants)
        exec(compile(source, "<replay>", "exec"), namespace)
        return namespace["replay"]

    def source(self, results: Any) -> str:
        """The function's lines, without those that make what nobody uses."""
        lines = [f"    return {self._of(results)}"]
        used = set(re.findall(r"\w+", lines[0]))
        for name, line in reversed(self.lines):
            if not name or name in used:
                lines.append(f"    {name} = {line}" if name else f"    {line}")
                used.update(re.findall(r"\w+", line))
        head = f"def replay({', '.join(['slots', 'leaves', *(f'x{i}' for i in range(len(self.given)))])}):"
        return "\n".join([head, *reversed(lines)])


def _has_tensor(x: Any) -> bool:
    if isinstance(x, (tuple, list)):
        return any(map(_has_tensor, x))
    return isinstance(x, Tensor)
