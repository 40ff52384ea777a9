"""`tl.reduce` and `tl.associative_scan`: the combine function itself, on halves of the block.

So each step rounds as on the GPU (in no GPU's order, though), and numpy's own reductions serve where steps do not round
further.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter

from retainops.testing.builder import builder, semantic
from retainops.testing.numerics import Array
from retainops.testing.rewriting import BlockTruth


def _tensor(data: Array, dtype: tl.dtype) -> tl.tensor:
    handle = triton_interpreter.TensorHandle(data.reshape(data.shape or (1,)), dtype)
    return tl.tensor(handle, tl.block_type(dtype, list(data.shape)) if data.shape else dtype)


Parts = tuple[Array, ...]
Combine = Callable[[Parts, Parts], Parts]


def _combiner(combine_fn: Any, dtypes: Sequence[tl.dtype]) -> Combine:
    def combine(left: Parts, right: Parts) -> Parts:
        out = combine_fn(*map(_tensor, left + right, (*dtypes, *dtypes)))
        out = out if isinstance(out, tuple) else (out,)
        return tuple(
            np.broadcast_to(semantic.to_tensor(o).handle.data, x.shape) for o, x in zip(out, left, strict=True)
        )

    return combine


def _reduce_first(parts: Parts, combine: Combine) -> Parts:
    while parts[0].shape[0] > 1:
        parts = combine(tuple(p[0::2] for p in parts), tuple(p[1::2] for p in parts))
    return parts


def _scan_first(parts: Parts, combine: Combine) -> Parts:
    n = parts[0].shape[0]
    if n == 1:
        return parts
    even, odd = tuple(p[0::2] for p in parts), tuple(p[1::2] for p in parts)
    upto_odd = _scan_first(combine(even, odd), combine)
    before_even = tuple(np.roll(p, 1, axis=0) for p in upto_odd)  # nothing comes before the first: kept below
    upto_even = combine(before_even, even)
    out = tuple(np.empty_like(p) for p in parts)
    for o, e, first, d in zip(out, upto_even, even, upto_odd, strict=True):
        o[0::2], o[1::2] = e, d
        o[0] = first[0]
    return out


_UFUNCS = {  # by the Python function: the hash of a JITFunction is that of its source and all it calls
    tl.standard._sum_combine.fn: np.add,
    tl.standard._elementwise_max.fn: np.fmax,
    tl.standard._elementwise_min.fn: np.fmin,
}


def _ufunc(combine_fn: Any, x: tl.tensor) -> np.ufunc | None:
    """A numpy function that does as well; not where each step rounds, or a masked-off lane's NaN must get through."""
    plain = not builder.unmasked and (x.dtype.is_int() or x.dtype.primitive_bitwidth >= 32)
    return _UFUNCS.get(combine_fn.fn) if plain else None


def reduce(input: Any, axis: int | None, combine_fn: Any, keep_dims: bool = False, **_: Any) -> Any:
    """`tl.reduce`, of a tensor or a tuple of them."""
    if not isinstance(input, tuple):
        return reduce((input,), axis, combine_fn, keep_dims)[0]
    dtypes, shape = [x.dtype for x in input], input[0].handle.data.shape
    if ufunc := _ufunc(combine_fn, input[0]):
        x = input[0].handle.data
        return (_tensor(np.asarray(ufunc.reduce(x, axis=axis, keepdims=keep_dims, dtype=x.dtype)), dtypes[0]),)
    flat = [x.handle.data.reshape(-1) if axis is None else np.moveaxis(x.handle.data, axis, 0) for x in input]
    try:
        out = [p[0] for p in _reduce_first(tuple(flat), _combiner(combine_fn, dtypes))]
    except BlockTruth:  # a scalar `if` in the combine function: one element at a time
        one_by_one = types.SimpleNamespace(fn=combine_fn)
        return tuple(triton_interpreter.ReduceOps(axis, one_by_one, keep_dims).generic_reduce(input))
    if keep_dims:
        out = [p.reshape([1] * len(shape)) if axis is None else np.expand_dims(p, axis) for p in out]
    return tuple(map(_tensor, out, dtypes))


def associative_scan(input: Any, axis: int, combine_fn: Any, reverse: bool = False, **_: Any) -> Any:
    """`tl.associative_scan`, of a tensor or a tuple of them."""
    if not isinstance(input, tuple):
        return associative_scan((input,), axis, combine_fn, reverse)[0]
    dtypes = [x.dtype for x in input]
    parts = tuple(np.moveaxis(x.handle.data, axis, 0) for x in input)
    parts = tuple(p[::-1] for p in parts) if reverse else parts
    try:
        out = _scan_first(parts, _combiner(combine_fn, dtypes))
    except BlockTruth:
        one_by_one = types.SimpleNamespace(fn=combine_fn)
        blocks = tuple(map(_tensor, parts, dtypes))
        out = tuple(x.handle.data for x in triton_interpreter.ScanOps(0, one_by_one, False).generic_scan(blocks))
    out = tuple(p[::-1] for p in out) if reverse else out
    return tuple(_tensor(np.ascontiguousarray(np.moveaxis(p, 0, axis)), t) for p, t in zip(out, dtypes, strict=True))
