"""Launching a kernel: what follows from the layouts of its operands is worked out once, and remembered.

The first launch of a layout goes through Triton, which specialises and compiles the kernel. Later ones start what that
gave, with new pointers: on small tensors Triton's own look-up would be most of the time that a call takes.
"""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Callable, Hashable, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from retainops.buffers import share_memory
from retainops.ops._operands import Grad, Kept, KeptSum, Seed, key_of, listener, maker_of
from retainops.ops._saved import Unread
from retainops.ops._walk import Walk, walk


class Prepared(NamedTuple):
    """What is known of a launch before its pointers.

    Attributes:
        kept: the kernel, and functions that are constants of it: a key has their ids, which are theirs while they live.
        makers: one for each operand or tuple of them: makes the kernel's argument.
        tail: the kernel's arguments behind the operands.
        start: starts the compiled kernel on its grid, on a device's current stream.
    """

    kept: tuple[Any, ...]
    makers: tuple[Callable[[Any], Any], ...]
    tail: tuple[Any, ...]
    start: Callable[..., Any]

    def arguments(self, operands: Sequence[Any]) -> list[Any]:
        """The kernel's first arguments."""
        return [make(x) for make, x in zip(self.makers, operands, strict=True)]


MOST = 4096
"""Launches that are remembered. When there are more all are forgotten, and prepared again as they come."""
APART = "apart"
"""Stands for a launch that is made as two: of the gradients, then of the points."""
_prepared: dict[Hashable, Prepared | str] = {}
forgotten: list[Callable[[], None]] = [_prepared.clear]
"""What forgets all that is remembered of launches."""


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
        **constants: the kernel's own; one that follows from the walk is a function of it, such as `covers`.
    """
    if not shape.numel():
        return
    flat = _flat(operands)
    device = _device_of(flat)
    if device < 0:  # no GPU's, so a simulated one's
        device = triton.runtime.driver.active.get_current_device()
    elif device != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, shape, dtype, *operands, walked=walked, programs=programs, **constants)
        return
    held = torch.float64 if dtype == torch.float64 else torch.float32
    if held == torch.float64 and any(isinstance(x, numbers.Real) for x in flat):  # Triton passes numbers as float32
        operands = _each(operands, lambda x: _tensor(x, held, flat) if isinstance(x, numbers.Real) else x)
        flat = _flat(operands)
    if any(type(x) is Kept and x.is_into for x in flat):
        operands = _apart(operands)
        flat = _flat(operands)
    # Triton hashes a function by its source and all that it refers to, anew each time.
    constant = [id(x) if type(x) is triton.JITFunction else x for x in constants.values()]
    key = (id(kernel), shape, held, device, *map(key_of, flat), *constant)
    known = _prepared.get(key)
    if isinstance(known, Prepared):
        _start(known.start, device, *known.arguments(operands), *known.tail)
        return
    if known is None:
        if len(_prepared) >= MOST:
            _prepared.clear()
        if not _reordered(shape, flat, walked):
            _prepared[key] = _first(kernel, shape, held, operands, flat, walked, programs, constants)
            return
        _prepared[key] = APART
    for some in (_each(operands, _no_point), _each(operands, _no_gradient)):
        launch(kernel, shape, dtype, *some, walked=walked, programs=programs, **constants)


def launch_as_it_is(kernel: Any, programs: int, device: torch.device, *arguments: Any, **constants: Any) -> None:
    """Launch a kernel over nothing that is walked, with arguments that are made: as kernel[(programs,)](...)."""
    listening = listener.get()
    with on_device(device), listening.unheard() if listening else contextlib.nullcontext():
        compiled = kernel[(programs,)](*arguments, **constants)
        number = triton.runtime.driver.active.get_current_device()
    if listening:
        tail = [constants[name] for name in kernel.arg_names[len(arguments) :]]
        listening.started(_starter(compiled, (programs, 1, 1)), number, [*arguments, *tail])


def _start(start: Callable[..., Any], device: int, *arguments: Any) -> None:
    listening = listener.get()
    if listening is None:
        start(device, *arguments)
    else:
        with listening.unheard():
            start(device, *arguments)
        listening.started(start, device, arguments)


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
    way = _way(shape, flat, walked)
    grid = (programs(way) if programs else way.grid[0], 1, 1)
    constants = {name: x(way) if isinstance(x, FunctionType) else x for name, x in constants.items()}
    dtype = tl.float64 if held == torch.float64 else tl.float32
    makers = tuple(_maker(way, shape, x, held) for x in operands)
    if listening := listener.get():
        listening.is_early = True
    prepared = Prepared((kernel, *constants.values()), makers, (), print)
    given = prepared.arguments(operands)
    compiled = kernel[grid](*given, way.shape, dtype, *way.block, **constants, num_warps=way.warps)
    tail = (way.shape, dtype, *way.block, *(constants[name] for name in kernel.arg_names[len(given) + 4 :]))
    return prepared._replace(tail=tail, start=_starter(compiled, grid))


def _way(shape: torch.Size, flat: Sequence[Any], walked: Callable[..., Walk] | None) -> Walk:
    """How these operands are walked."""
    written = [x for x in flat if hasattr(x, "summed")]
    tensors = [t for x in flat if isinstance(t := getattr(x, "tensor", x), torch.Tensor) and not isinstance(x, Seed)]
    summed = [small for x in written for small in x.summed]
    gradients = [small for x in written if isinstance(x, Grad) for small in x.summed]
    numbered = [x.shape for x in flat if isinstance(x, Seed)]
    return (walked or walk)(shape, tensors, summed, numbered, gradients)


def _reordered(shape: torch.Size, flat: Sequence[Any], walked: Callable[..., Walk] | None) -> bool:
    """Whether points would change the order in which gradients are summed: they lie otherwise in memory, say."""
    if not any(_is_point(x) for x in flat) or not any(getattr(x, "is_summed", False) for x in flat):
        return False
    return _way(shape, flat, walked) != _way(shape, [x for x in flat if not _is_point(x)], walked)


def _is_point(x: Any) -> bool:
    return isinstance(x, (Kept, KeptSum)) or hasattr(x, "kept")


def _no_point(x: Any) -> Any:
    return None if _is_point(x) else x


def _no_gradient(x: Any) -> Any:
    return None if hasattr(x, "is_summed") else x


def _maker(way: Walk, shape: torch.Size, operand: Any, held: torch.dtype) -> Callable[[Any], Any]:
    """`maker_of`, also for a tuple of operands."""
    if type(operand) is not tuple:
        return maker_of(way, shape, operand, held)
    makers = [maker_of(way, shape, x, held) for x in operand]
    return lambda group: tuple([make(x) for make, x in zip(makers, group, strict=True)])


# The versions of Triton whose compiled kernels are known to be started as `_starter` does.
_IS_KNOWN = (3, 6) <= tuple(int(n) for n in triton.__version__.split(".")[:2]) <= (3, 9)


def _starter(compiled: Any, grid: tuple[int, int, int]) -> Callable[..., None]:
    """What starts a compiled kernel: start(device, *arguments), as `compiled[grid](*arguments)` does.

    Triton asks for the device again, and calls a profiler's hooks before and after a launch even where there are none.
    """
    by_triton = compiled[grid]
    run, function, packed = compiled.run, compiled.function, compiled.packed_metadata
    runtime, driver = triton.knobs.runtime, triton.runtime.driver

    def start(device: int, *arguments: Any) -> None:
        if not _IS_KNOWN or _is_hooked(runtime.launch_enter_hook) or _is_hooked(runtime.launch_exit_hook):
            by_triton(*arguments)
            return
        run(*grid, driver.active.get_current_stream(device), function, packed, None, None, None, *arguments)

    return start


def _is_hooked(hook: Any) -> bool:
    """Whether anything happens in it: a chain of hooks may be empty."""
    return bool(getattr(hook, "calls", hook))


def forget() -> None:
    """Prepare every launch anew, as tests ask for that change what `walked` and `programs` depend on."""
    for forget_these in forgotten:
        forget_these()


def current(device: torch.device) -> int | None:
    """The number of the GPU to launch on, a simulated one's too; None: it is another one's turn."""
    if device.type != "cuda":
        return triton.runtime.driver.active.get_current_device()
    number = torch.cuda.current_device()
    return number if device.index == number else None


def triton_dtype(x: torch.Tensor) -> tl.dtype:
    """A tensor's dtype, as a constant of a kernel."""
    return getattr(tl, str(x.dtype).removeprefix("torch."))


def _device_of(flat: Sequence[Any]) -> int:
    """The number of the operands' GPU; less than 0: they are elsewhere."""
    for x in flat:
        if isinstance(x, (torch.Tensor, Unread)):
            return x.get_device()
    raise AssertionError("a launch without a tensor")


def _tensor(x: Any, dtype: torch.dtype, flat: Sequence[Any]) -> torch.Tensor:
    """A number as a tensor, on the device of the operands."""
    return torch.full((), x, dtype=dtype, device=next(x.device for x in flat if isinstance(x, (torch.Tensor, Unread))))


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


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a GPU the current one: Triton launches there, whatever the tensors say."""
    return contextlib.nullcontext() if _is_current(device) else torch.cuda.device(device)


def _is_current(device: torch.device) -> bool:
    return device.type != "cuda" or device.index == torch.cuda.current_device()
