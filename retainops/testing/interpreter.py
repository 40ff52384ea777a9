"""Runs a launch in Triton's interpreter, mended, on the launch's own tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.interpreter import TensorHandle
from triton.runtime.jit import TensorWrapper
from triton.tools.tensor_descriptor import TensorDescriptor

from retainops.testing import specialised
from retainops.testing.builder import builder
from retainops.testing.driver import Launch
from retainops.testing.language import Patched, changes
from retainops.testing.memory import KernelFault, Memory
from retainops.testing.rewriting import interpreted, running_line

Programs = Callable[[int, int], bool] | Iterable[int] | None
_MOST = (2**31 - 1, 65535, 65535)  # programs in each dim of a grid


def run(launch: Launch, *, check: bool = True, programs: Programs = None) -> None:
    """Execute a launch, one program after another.

    Args:
        launch: from `retainops.testing.driver`.
        check: raise `KernelFault` on accesses that no kernel may make, and arguments that this one was not compiled
            for (see `simulated_gpu`).
        programs: which to execute (see `simulated_gpu`).
    """
    total = launch.grid[0] * launch.grid[1] * launch.grid[2]
    if check and any(n > most for n, most in zip(launch.grid, _MOST, strict=True)):
        raise KernelFault(f"{launch.name}: a grid of {launch.grid}; a GPU takes at most {_MOST}: use the first dim")
    if check:
        specialised.check(launch)
    memory = Memory(launch.name, launch.grid, running_line) if check else None
    function, args = interpreted(launch.fn), _arguments(launch, memory)
    builder.begin(launch.grid, memory)
    with np.errstate(all="ignore"), Patched(changes()):
        try:
            for program in _chosen(programs, total):
                builder.begin_program(program)
                function(*args)
        finally:
            builder.begin((1, 1, 1), None)


def _chosen(programs: Programs, total: int) -> Iterable[int]:
    if programs is None:
        return range(total)
    if callable(programs):
        return [i for i in range(total) if programs(i, total)]
    return sorted({i % total for i in programs if -total <= i < total})


def _arguments(launch: Launch, memory: Memory | None) -> list[Any]:
    """The arguments as the kernel sees them, by the types that they were compiled for."""
    types = launch.kernel.src.signature
    return [_argument(x, types[n], n, memory) for n, x in zip(launch.fn.arg_names, launch.args, strict=True)]


def _argument(x: Any, ty: Any, name: str, memory: Memory | None) -> Any:
    if ty == "constexpr":
        return x.value if isinstance(x, tl.constexpr) else x
    if isinstance(x, tuple):
        items = [_argument(item, t, n, memory) for item, t, n in zip(x, ty, specialised.parts(x, name), strict=True)]
        return type(x)(*items) if hasattr(x, "_fields") else tuple(items)
    if isinstance(x, TensorDescriptor):
        base = _Placed(x.base, _place(x.base, name, memory))
        placed = TensorDescriptor(base, x.shape, x.strides, x.block_shape, x.padding)
        return triton_interpreter._implicit_cvt(placed)
    dtype = tl.str_to_ty(ty, None)
    value = _place(x, name, memory) if dtype.is_ptr() else x
    return tl.tensor(TensorHandle(np.array([value], triton_interpreter._get_np_dtype(dtype)), dtype), dtype)


def _place(x: Any, name: str, memory: Memory | None) -> int:
    tensor: torch.Tensor = x.base if isinstance(x, TensorWrapper) else x
    return memory.add(name, tensor) if memory else tensor.data_ptr()


class _Placed:
    """A tensor at another address, as far as the interpreter asks."""

    def __init__(self, tensor: torch.Tensor, address: int) -> None:
        self.dtype, self.shape, self._address = tensor.dtype, tensor.shape, address

    def data_ptr(self) -> int:
        return self._address
