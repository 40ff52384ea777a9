"""Launching a kernel: what follows from the layouts of its operands is worked out once, and remembered.

The first launch of a layout goes through Triton, which specialises and compiles the kernel. Later ones start what that
gave, with new pointers: on small tensors Triton's own look-up would be most of the time that a call takes.
"""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from retainops.buffers import share_memory
from retainops.ops._operands import Grad, Kept, Seed, key_of, maker_of
from retainops.ops._saved import Unread
from retainops.ops._walk import Walk, walk


class Prepared(NamedTuple):
    """What is known of a launch before its pointers.

    Attributes:
        kept: the kernel, and functions that are constants of it: a key has their ids, which are theirs while they live.
        groups: of each of the kernel's first parameters: None for an operand, a number for a tuple of so many.
        makers: one for each operand: makes the argument.
        tail: the kernel's arguments behind the operands.
        start: starts the compiled kernel on its grid.
    """

    kept: tuple[Any, ...]
    groups: tuple[int | None, ...]
    makers: tuple[Callable[[Any], Any], ...]
    tail: tuple[Any, ...]
    start: Callable[..., Any]

    def arguments(self, flat: Sequence[Any]) -> list[Any]:
        """The kernel's first arguments."""
        made = [make(x) for make, x in zip(self.makers, flat, strict=True)]
        found: list[Any] = []
        i = 0
        for size in self.groups:
            found.append(made[i] if size is None else tuple(made[i : i + size]))
            i += size or 1
        return found


MOST = 4096
"""Launches that are remembered. When there are more all are forgotten, and prepared again as they come."""
_prepared: dict[Hashable, Prepared] = {}


def launch(
    kernel: Any,
    shape: torch.Size,
    dtype: torch.dtype,
    *operands: Any,
    walked: Callable[..., Walk] | None = None,
    programs: Callable[[Walk], int] | None = None,
    **constants: Any,
) -> None:
    """Launch a kernel of the form kernel(*operands, SHAPE, DTYPE, BLOCK_M, BLOCK_N, **constants) over a shape.

    Args:
        kernel: the Triton kernel.
        shape: the shape that all operands broadcast to.
        dtype: the result's, which decides the dtype of interiors.
        *operands: in the kernel's order, each one or a tuple of them: what is read (tensors, numbers, `Seed`,
            `Unread`), gradients to write (`Grad`), points (`Kept`, `KeptSum`, or None where nobody asked).
        walked: how to walk the tensors, from what `walk` takes; default: `walk`. Like `programs` it may depend on the
            kernel, the shape and the layouts of the operands, and on nothing else.
        programs: how many programs a walk is shared by; default: each tile has its own.
        **constants: the kernel's own.
    """
    if not shape.numel():
        return
    flat = _flat(operands)
    held = torch.float64 if dtype == torch.float64 else torch.float32
    device = next(x.device for x in flat if isinstance(x, (torch.Tensor, Unread)))
    if held == torch.float64 and any(isinstance(x, numbers.Real) for x in flat):  # Triton passes numbers as float32
        operands = _each(operands, lambda x: _tensor(x, held, device) if isinstance(x, numbers.Real) else x)
        flat = _flat(operands)
    if any(type(x) is Kept and x.is_into for x in flat):
        operands = _apart(operands)
        flat = _flat(operands)
    with on_device(device):
        where = device.index if device.type == "cuda" else triton.runtime.driver.active.get_current_device()
        key = (id(kernel), shape, held, where, *map(key_of, flat), *map(_key_of_constant, constants.values()))
        known = _prepared.get(key)
        if known is None:
            if len(_prepared) >= MOST:
                _prepared.clear()
            _prepared[key] = _first(kernel, shape, held, operands, flat, walked, programs, constants)
            return
        known.start(*known.arguments(flat), *known.tail)


def _first(
    kernel: Any,
    shape: torch.Size,
    held: torch.dtype,
    operands: Sequence[Any],
    flat: Sequence[Any],
    walked: Callable[..., Walk] | None,
    programs: Callable[[Walk], int] | None,
    constants: dict[str, Any],
) -> Prepared:
    """Launch through Triton; what to do the next time."""
    written = [x for x in flat if hasattr(x, "summed")]
    tensors = [t for x in flat if isinstance(t := getattr(x, "tensor", x), torch.Tensor) and not isinstance(x, Seed)]
    summed = [small for x in written for small in x.summed]
    gradients = [small for x in written if isinstance(x, Grad) for small in x.summed]
    numbered = [x.shape for x in flat if isinstance(x, Seed)]
    way = (walked or walk)(shape, tensors, summed, numbered, gradients)
    grid = (programs(way) if programs else way.grid[0], 1, 1)
    dtype = tl.float64 if held == torch.float64 else tl.float32
    groups = tuple(len(x) if type(x) is tuple else None for x in operands)
    makers = tuple(maker_of(way, shape, x, held) for x in flat)
    prepared = Prepared((kernel, *constants.values()), groups, makers, (), print)
    given = prepared.arguments(flat)
    compiled = kernel[grid](*given, way.shape, dtype, *way.block, **constants, num_warps=way.warps)
    tail = (way.shape, dtype, *way.block, *(constants[name] for name in kernel.arg_names[len(given) + 4 :]))
    return prepared._replace(tail=tail, start=compiled[grid])


def _key_of_constant(x: Any) -> Hashable:
    """Triton hashes a function by its source and all that it refers to, anew each time."""
    return id(x) if isinstance(x, triton.JITFunction) else x


def forget() -> None:
    """Prepare every launch anew: for tests that change what `walked` and `programs` depend on."""
    _prepared.clear()


def triton_dtype(x: torch.Tensor) -> tl.dtype:
    """A tensor's dtype, as a constant of a kernel."""
    return getattr(tl, str(x.dtype).removeprefix("torch."))


def _tensor(x: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full((), x, dtype=dtype, device=device)


def _flat(operands: Sequence[Any]) -> list[Any]:
    return [x for group in operands for x in (group if type(group) is tuple else (group,))]


def _each(operands: Sequence[Any], change: Callable[[Any], Any]) -> tuple[Any, ...]:
    return tuple(tuple(map(change, x)) if type(x) is tuple else change(x) for x in operands)


def _apart(operands: Sequence[Any]) -> tuple[Any, ...]:
    """The operands of a backward, with a copy of what an `Into` buffer shares memory with: programs would race."""
    buffers = [x.tensor for x in _flat(operands) if type(x) is Kept and x.is_into and x.tensor is not None]

    def apart(x: Any) -> Any:
        shared = isinstance(x, torch.Tensor) and any(share_memory(x, buffer) for buffer in buffers)
        return x.clone() if shared else x

    return _each(operands, apart)


_HERE = contextlib.nullcontext()


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a GPU the current one: Triton launches there, whatever the tensors say."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return _HERE
