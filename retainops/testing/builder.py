"""The operations of a kernel, one by one, as Triton's interpreter asks for them: mended, and with memory checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.interpreter import TensorHandle

from retainops.testing import libdevice, numerics
from retainops.testing.memory import Memory
from retainops.testing.numerics import Array

_FLOATS = (tl.float16, tl.bfloat16, tl.float32, tl.float64)
_ir = triton_interpreter._ir


def is_bfloat16(x: TensorHandle) -> bool:
    """Whether a value is bfloat16, kept as uint16. (A comparison's result has its operands' dtype, and bool data.)"""
    return x.data.dtype == np.uint16 and x.dtype.scalar == tl.bfloat16


def decode(x: TensorHandle) -> Array:
    """A value as numpy can compute with it: bfloat16 as float32."""
    return numerics.widen(x.data) if is_bfloat16(x) else x.data


def encode(x: Array, dtype: tl.dtype) -> TensorHandle:
    """Round numbers to a dtype."""
    dtype = dtype.scalar
    return TensorHandle(numerics.round_to(x, triton_interpreter._get_np_dtype(dtype), dtype == tl.bfloat16), dtype)


class Builder(triton_interpreter.InterpreterBuilder):
    """Triton's `InterpreterBuilder` with what it lacks; the signatures are its own.

    Attributes:
        memory: checks and logs every access; None: addresses are real and nothing is checked.
        program: the linear index of the program that is running, x fastest.
        unmasked: lines of this program where lanes of a load were masked off and had no `other=`, and the argument.
    """

    def __init__(self) -> None:
        super().__init__()
        # Otherwise every integer operation is done again in 64 bits, for an assertion that only debug mode makes.
        self.options = triton_interpreter.InterpreterOptions(sanitize_overflow=False)
        self.begin((1, 1, 1), None)

    def begin(self, grid: tuple[int, int, int], memory: Memory | None) -> None:
        """Start a launch."""
        self.grid_dim, self.memory = grid, memory
        self.begin_program(0)

    def begin_program(self, program: int) -> None:
        """Start a program."""
        x, y, _ = self.grid_dim
        self.program, self.grid_idx = program, (program % x, program // x % y, program // (x * y))
        self.unmasked: dict[str, str] = {}

    # Memory. What follows `mask`, `other` or `value` differs between versions of Triton.

    def _access(self, kind: str, pointers: TensorHandle, mask: Any) -> TensorHandle:
        if self.memory is None:
            return pointers
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        real = self.memory.access(kind, pointers.data, _data(mask), size, self.program)
        return TensorHandle(real, pointers.dtype)

    def create_masked_load(self, ptrs: TensorHandle, mask: Any, other: Any, *hints: Any, **more: Any) -> TensorHandle:
        return self._load("load", ptrs, mask, other, *hints, **more)

    def create_atomic_load(self, ptr: TensorHandle, mask: Any, *order: Any) -> TensorHandle:
        return self._load("atomic", ptr, mask, None, None, True)

    def _load(self, kind: str, ptrs: TensorHandle, mask: Any, other: Any, *hints: Any, **more: Any) -> TensorHandle:
        real = self._access(kind, ptrs, mask)
        value = super().create_masked_load(real, mask, other, *hints, **more)
        if self.memory and other is None and not (on := _data(mask)).all():
            bfloat16 = is_bfloat16(value)
            value.data = np.where(on, value.data, numerics.poison(value.data.dtype, bfloat16)).astype(value.data.dtype)
            argument = self.memory.argument(int(ptrs.data.reshape(-1)[0]))
            self.unmasked[self.memory.where()] = argument.name if argument else "memory"
        return value

    def create_masked_store(self, ptrs: TensorHandle, value: TensorHandle, mask: Any, *hints: Any) -> None:
        real = self._access("store", ptrs, mask)
        self._refuse_poison("store", ptrs, value, mask)
        super().create_masked_store(real, value, mask, *hints)

    def create_atomic_store(self, ptr: TensorHandle, val: TensorHandle, mask: Any, *order: Any) -> None:
        super().create_masked_store(self._access("atomic", ptr, mask), val, mask, None)

    def create_atomic_rmw(
        self, rmwOp: Any, ptr: TensorHandle, val: TensorHandle, mask: Any, sem: Any, scope: Any
    ) -> TensorHandle:
        if is_bfloat16(val):
            raise NotImplementedError("the simulated GPU has no atomics on bfloat16; use float32")
        real = self._access("atomic", ptr, mask)
        self._refuse_poison("atomic", ptr, val, mask)
        return super().create_atomic_rmw(rmwOp, real, val, mask, sem, scope)

    def create_atomic_cas(self, ptr: TensorHandle, *operands: Any) -> TensorHandle:
        real = self._access("atomic", ptr, np.ones(ptr.data.shape, bool))
        return super().create_atomic_cas(real, *operands)

    def _refuse_poison(self, kind: str, ptrs: TensorHandle, value: TensorHandle, mask: Any) -> None:
        if self.memory is None or not self.unmasked:
            return
        bad = numerics.is_poison(value.data, is_bfloat16(value)) & _data(mask)
        if bad.any():
            pointers = np.broadcast_to(ptrs.data, bad.shape)[bad]
            raise self.memory.poisoned(kind, int(pointers[0]), self.program, self.unmasked)

    # Conversions.

    def cast_impl(self, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
        to = dst_type.scalar
        if to == tl.bfloat16:
            x = decode(src)
            return encode(x if x.dtype.kind == "f" else x.astype(np.float64), to)
        x, dtype = decode(src), triton_interpreter._get_np_dtype(to)
        if x.dtype.kind == "f" and dtype.kind in "iu" and to.is_int():
            return TensorHandle(numerics.to_integers(x, dtype), to)
        if is_bfloat16(src):
            return TensorHandle(x.astype(dtype), to)
        return super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src: TensorHandle, dst_type: tl.dtype, rounding_mode: Any) -> TensorHandle:
        usual = src.dtype.scalar in _FLOATS and dst_type.scalar in _FLOATS
        if usual and rounding_mode != _ir.ROUNDING_MODE.RTZ:
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def get_bf16(self, value: float) -> TensorHandle:
        return encode(np.array([value], np.float64), tl.bfloat16)

    # Arithmetic.

    def binary_op(self, lhs: TensorHandle, rhs: TensorHandle, op: Callable[..., Array]) -> TensorHandle:
        if not (is_bfloat16(lhs) and is_bfloat16(rhs)):
            return super().binary_op(lhs, rhs, op)
        out = op(decode(lhs), decode(rhs))
        return TensorHandle(out, tl.int1) if out.dtype == bool else encode(out, tl.bfloat16)

    def unary_op(self, arg: TensorHandle, op: Callable[..., Array]) -> TensorHandle:
        x = decode(arg)
        if x.dtype.kind != "f":
            return super().unary_op(arg, op)
        return encode(numerics.in_float64(op, x), arg.dtype)

    def _extremum(self, lhs: TensorHandle, rhs: TensorHandle, op: Callable[..., Array]) -> TensorHandle:
        return self.binary_op(lhs, rhs, numerics.keep_poison(op) if self.unmasked else op)

    def create_minnumf(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        return self._extremum(lhs, rhs, np.fmin)

    def create_maxnumf(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        return self._extremum(lhs, rhs, np.fmax)

    def create_clampf(self, arg: TensorHandle, lo: TensorHandle, hi: TensorHandle, propagate_nans: Any) -> TensorHandle:
        if propagate_nans == _ir.PROPAGATE_NAN.NONE:
            return self.create_minnumf(self.create_maxnumf(arg, lo), hi)
        return self.create_minimumf(self.create_maximumf(arg, lo), hi)

    def create_fma(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        return encode(numerics.fma(decode(x), decode(y), decode(z)), z.dtype)

    def create_erf(self, arg: TensorHandle) -> TensorHandle:
        return self.unary_op(arg, libdevice.erf)

    def create_rsqrt(self, arg: TensorHandle) -> TensorHandle:
        return self.unary_op(arg, libdevice.rsqrt)

    def create_dot(
        self, a: TensorHandle, b: TensorHandle, d: TensorHandle, input_precision: Any, *imprecise: Any
    ) -> TensorHandle:
        if a.dtype.scalar not in _FLOATS or b.dtype.scalar not in _FLOATS:
            return super().create_dot(a, b, d, input_precision, *imprecise)
        x, y, acc = decode(a), decode(b), decode(d)
        if x.dtype == np.float32 and not is_bfloat16(a) and input_precision == _ir.INPUT_PRECISION.TF32:
            x, y = numerics.tf32(x), numerics.tf32(y)
        wide = np.promote_types(np.float32, acc.dtype)
        return encode(np.matmul(x.astype(wide), y.astype(wide)) + acc, d.dtype)

    def create_extern_elementwise(
        self, libName: str, libPath: str, symbol: str, argList: list[TensorHandle], retType: tl.dtype, isPure: bool
    ) -> TensorHandle:
        if symbol in ("__nv_fma", "__nv_fmaf", "__nv_fma_rn", "__nv_fmaf_rn"):
            return self.create_fma(*argList)
        y = numerics.in_float64(libdevice.function(symbol), *(decode(x) for x in argList))
        return TensorHandle(y.astype(triton_interpreter._get_np_dtype(retType.scalar)), retType.scalar)

    def create_inline_asm(self, *_: Any) -> None:
        raise NotImplementedError('the interpreter cannot run inline assembly; use simulated_gpu(engine="ptx")')


def _data(mask: Any) -> Array:
    return mask.data if isinstance(mask, TensorHandle) else mask


class Semantic(TritonSemantic):
    """Triton's own, with a short cut."""

    def binary_op_type_checking_impl(self, lhs: Any, rhs: Any, *flags: Any, **more: Any) -> tuple[Any, Any]:
        """Operands of the same type and shape go as they are; in the types that no operation promotes."""
        if (
            isinstance(lhs, tl.tensor)
            and isinstance(rhs, tl.tensor)
            and lhs.dtype.name in ("fp32", "int32", "int64")
            and lhs.dtype.name == rhs.dtype.name
            and lhs.shape is rhs.shape
        ):
            return lhs, rhs
        return super().binary_op_type_checking_impl(lhs, rhs, *flags, **more)


builder = Builder()  # one launch runs at a time: the driver sees to that
semantic = Semantic(builder)
