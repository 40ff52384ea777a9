"""triton.language as interpreted kernels see it, for as long as a launch runs."""

from __future__ import annotations

import functools
import inspect
import math
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.extra import libdevice as any_libdevice
from triton.language.extra.cuda import libdevice as cuda_libdevice
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.jit import JITFunction

from retainops.testing.builder import builder, semantic
from retainops.testing.hints import max_constancy, max_contiguous, multiple_of
from retainops.testing.reductions import associative_scan, reduce
from retainops.testing.rewriting import interpreted, loop

_MISSING = object()


class Patched:
    """Attributes replaced inside a `with`, and put back exactly as they were."""

    def __init__(self, changes: Sequence[tuple[Any, str, Any]]) -> None:
        self._changes = changes

    def __enter__(self) -> None:
        self._before = [(owner, name, vars(owner).get(name, _MISSING)) for owner, name, _ in self._changes]
        for owner, name, value in self._changes:
            setattr(owner, name, value)

    def __exit__(self, *_: object) -> None:
        for owner, name, value in reversed(self._before):
            if value is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


def _index(x: tl.tensor) -> int:
    return int(x.handle.data.item())


def _always(x: tl.tensor) -> bool:
    """A tensor's truth to the interpreter's own code, where it says "there is one"; kernels ask `rewriting.truth`."""
    return True


def _static_range(start: Any, stop: Any = None, step: Any = 1) -> range:
    start, stop = (0, start) if stop is None else (start, stop)
    return range(*(b.value if isinstance(b, tl.constexpr) else b for b in (start, stop, step)))


# The same results, faster: what Triton computes anew for every value depends on a shape or a dtype only.

_original_np_dtype = triton_interpreter._get_np_dtype
_np_dtypes: dict[str, np.dtype[Any]] = {}


def _np_dtype(dtype: tl.dtype) -> np.dtype[Any]:
    found = _np_dtypes.get(dtype.name)
    if found is None:
        found = _np_dtypes[dtype.name] = _original_np_dtype(dtype)
    return found


@functools.cache
def _shape(*sizes: int) -> tuple[tl.tuple, tl.constexpr]:
    return tl.tuple([tl.constexpr(n) for n in sizes]), tl.constexpr(math.prod(sizes))


def _make_tensor(self: tl.tensor, handle: Any, type: tl.dtype) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _shape(*type.shape) if type.is_block() else _shape()


_original_block_type = tl.block_type.__init__
_block_types: dict[tuple[Any, ...], dict[str, Any]] = {}


def _make_block_type(self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
    key = (element_ty.name, *(n.value if isinstance(n, tl.constexpr) else n for n in shape))
    if key not in _block_types:
        _original_block_type(self, element_ty, shape)
        _block_types[key] = vars(self)
    self.__dict__ = _block_types[key] | {"element_ty": element_ty}


def _method(function: Any) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: function(self, *args, **kwargs)


def _builtin(function: Any) -> Callable[..., Any]:
    function = inspect.unwrap(function)  # from a check that there is a `_semantic`
    return lambda *args, **kwargs: function(*args, **{**kwargs, "_semantic": semantic})


class _Recorder:
    """Takes the place of Triton's own scope of patches; changes nothing."""

    def __init__(self) -> None:
        self.changes: list[tuple[Any, str, Any]] = []

    def set_attr(self, owner: Any, name: str, value: Any) -> None:
        self.changes.append((owner, name, value))


@functools.cache
def changes() -> list[tuple[Any, str, Any]]:
    """Every attribute to replace while kernels are interpreted, as (owner, name, value)."""
    ours = {"interpreter_builder": builder, "interpreter_semantic": semantic, "_get_np_dtype": _np_dtype}
    found = [(triton_interpreter, name, value) for name, value in ours.items()]
    with Patched([*found, (triton_interpreter, "_LangPatchScope", _Recorder)]):
        kernel = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
        found += triton_interpreter._patch_lang(kernel).changes
    for owner in (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base, cuda_libdevice):
        found += [(owner, name, _builtin(f)) for name, f in inspect.getmembers(owner, tl.core.is_builtin)]
    found += [
        (any_libdevice, f.__name__, _builtin(f)) for _, f in inspect.getmembers(cuda_libdevice, tl.core.is_builtin)
    ]
    for owner in (tl, tl.core, tl.tensor):
        found += [(owner, "reduce", reduce), (owner, "associative_scan", associative_scan)]
    for owner in (tl, tl.core):
        found += [(owner, "range", loop), (owner, "static_range", _static_range)]
        found += [(owner, hint.__name__, hint) for hint in (multiple_of, max_contiguous, max_constancy)]
    found += [(tl.tensor, "__index__", _index), (tl.tensor, "__bool__", _always)]
    found += [(tl.tensor, "__init__", _make_tensor), (tl.block_type, "__init__", _make_block_type)]
    members = {name: f for name, f in vars(tl.tensor).items() if isinstance(f, JITFunction)}  # x.sum(), x.max(), ...
    found += [(tl.tensor, name, _method(f)) for name, f in members.items()]
    found.append((JITFunction, "__call__", lambda self, *args, **kwargs: interpreted(self)(*args, **kwargs)))
    return list({(id(owner), name): (owner, name, value) for owner, name, value in found}.values())
