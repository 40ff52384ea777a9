"""What a kernel was compiled for, against the arguments that it is started with.

Triton compiles in a pointer's dtype, that it divides by 16, an int that is 1, and every constexpr. A GPU goes by these
whatever comes later: a compiled kernel that somebody keeps and starts again must be started with the like. The
interpreter executes the source with what came, so it would look right.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterator
from typing import Any

import triton.language as tl
from triton.runtime.jit import JITFunction, mangle_type
from triton.tools.tensor_descriptor import TensorDescriptor

from retainops.testing.driver import Launch
from retainops.testing.memory import KernelFault

Path = tuple[int, ...]
_REMEDY = "start a compiled kernel with arguments like those of its first launch, or launch through Triton"


def check(launch: Launch) -> None:
    """Raise `KernelFault` where an argument is not what the kernel was compiled for."""
    source = launch.kernel.src
    for i, (name, x) in enumerate(zip(launch.fn.arg_names, launch.args, strict=True)):
        for where, came, compiled in _differences(x, source.signature[name], name, (i,), source):
            raise KernelFault(f"{launch.name}: {where} is {came}; the kernel was compiled for {compiled}: {_REMEDY}")


def parts(x: tuple[Any, ...], name: str) -> list[str]:
    """The names of an argument's parts: "X.ptr" of a named tuple, "X[0]" of a plain one."""
    fields = getattr(x, "_fields", None)
    return [f"{name}.{f}" for f in fields] if fields else [f"{name}[{i}]" for i in range(len(x))]


def _differences(x: Any, ty: Any, name: str, path: Path, source: Any) -> Iterator[tuple[str, str, str]]:
    """(argument, what came, what was compiled in), as words."""
    if ty == "constexpr":
        x, constant = _value(x), _value(source.constants.get(path))
        if not _same(x, constant):
            yield name, _shown(x), _shown(constant)
    elif isinstance(x, tuple) and isinstance(ty, tuple) and len(x) == len(ty):
        for i, (item, t, part) in enumerate(zip(x, ty, parts(x, name), strict=True)):
            yield from _differences(item, t, part, (*path, i), source)
    elif not _is_of(x, ty):
        yield name, _shown(x), f"{len(ty)} parts" if isinstance(ty, tuple) else ty
    else:
        address = x.data_ptr() if hasattr(x, "data_ptr") else x
        for attribute, n in source.attrs.get(path, ()):
            if attribute == "tt.divisibility" and address % n:
                yield name, f"{address:#x}" if address is not x else f"{x}", f"what divides by {n}"


def _same(x: Any, y: Any) -> bool:
    """Whether a constant is what was compiled in; of functions, as Triton has it, whether they are written alike."""
    if isinstance(x, JITFunction) and isinstance(y, JITFunction):
        return x is y or x.cache_key == y.cache_key
    return bool(x is y or x == y or (x != x and y != y))


def _is_of(x: Any, ty: Any) -> bool:
    """Whether a value can be passed as a type of Triton's: "*fp32", "i64", "fp32", "tensordesc<...>"."""
    if not isinstance(ty, str):
        return False  # another number of parts
    if ty[0] in "iu" and ty[1:].isdigit():
        bits, signed = int(ty[1:]), ty[0] == "i" and ty != "i1"
        return isinstance(x, int) and (-(2 ** (bits - 1)) <= x < 2 ** (bits - 1) if signed else 0 <= x < 2**bits)
    if ty[:2] in ("fp", "bf"):
        return isinstance(x, numbers.Real)  # NumPy's too
    return bool(_type(x) == ty.replace("*k", "*", 1))  # *k: to constants


def _type(x: Any) -> str | None:
    """A pointer's type, or a descriptor's; None: it is neither."""
    return mangle_type(x) if hasattr(x, "data_ptr") or isinstance(x, TensorDescriptor) else None


def _value(x: Any) -> Any:
    return x.value if isinstance(x, tl.constexpr) else x


def _shown(x: Any) -> str:
    return f"{len(x)} parts" if isinstance(x, tuple) else _type(x) or str(x)
