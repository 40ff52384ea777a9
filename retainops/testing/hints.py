"""What a kernel tells the compiler of its integers: taken at its word on a GPU, and checked here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl

from retainops.testing import numerics
from retainops.testing.builder import builder
from retainops.testing.memory import KernelFault
from retainops.testing.numerics import Array


def multiple_of(input: tl.tensor, values: Any, _semantic: Any = None) -> tl.tensor:
    """`tl.multiple_of`: along each dim, the first element of what is contiguous there divides by a number."""

    def holds(x: Array, n: int, unit: int) -> Array:
        inner = np.zeros(x.shape, bool)
        inner[..., 1:] = x[..., 1:] - x[..., :-1] == unit
        return inner | (x % n == 0)

    return _checked("multiple_of", input, values, holds, "begins what is contiguous")


def max_contiguous(input: tl.tensor, values: Any, _semantic: Any = None) -> tl.tensor:
    """`tl.max_contiguous`: along each dim, so many elements at a time follow one another."""
    return _checked("max_contiguous", input, values, _in_steps, "does not follow the one before")


def max_constancy(input: tl.tensor, values: Any, _semantic: Any = None) -> tl.tensor:
    """`tl.max_constancy`: along each dim, so many elements at a time are equal."""
    return _checked(
        "max_constancy", input, values, lambda x, n, unit: _in_steps(x, n, 0), "is not equal to the one before"
    )


def _in_steps(x: Array, n: int, step: int) -> Array:
    """Which elements are so much more than the one before; the first of each n of them need not be."""
    ok = np.ones(x.shape, bool)
    ok[..., 1:] = (x[..., 1:] - x[..., :-1] == step) | (np.arange(1, x.shape[-1]) % n == 0)
    return ok


def _checked(
    name: str, input: tl.tensor, values: Any, holds: Callable[[Array, int, int], Array], what: str
) -> tl.tensor:
    memory, x = builder.memory, input.handle.data
    if memory is None or (builder.unmasked and (x == numerics.poison(x.dtype, False)).any()):
        return input  # of lanes that a load masked off nothing is known
    values = [_value(v) for v in (values if isinstance(values, (list, tuple, tl.tuple)) else [values])]
    x, unit = x.astype(np.int64), 1
    if input.dtype.is_ptr():  # contiguous in elements, and a multiple in bytes
        unit = max(1, input.dtype.element_ty.primitive_bitwidth // 8)
    for dim, n in enumerate(values):
        bad = np.moveaxis(~holds(np.moveaxis(x, dim, -1), n, unit), -1, dim)
        if bad.any():
            at = tuple(int(i) for i in np.argwhere(bad)[0])
            hint = f"tl.{name}({', '.join(map(str, values))}) at {memory.where()}"
            where = f"element {at[0] if len(at) == 1 else at}, {int(x[at])}, {what} in dim {dim}"
            raise KernelFault(f"{memory.kernel}: {hint} by {memory.label(builder.program)}: {where}; leave it out")
    return input


def _value(x: Any) -> Any:
    return x.value if isinstance(x, tl.constexpr) else x
