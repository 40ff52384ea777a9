"""PTX types, and how the bits of a register become numbers.

A register holds raw bits: an unsigned array (bool for predicates) with one entry a lane. `Type.decode` views them as
the numbers an instruction works on and `Type.encode` turns its result back into bits. A bf16 number is a float32
array while it is worked on, because numpy has no bf16; packed types (`f16x2`, ...) are arrays of shape (lanes, 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from retainops.testing.ptx import numerics

Array = npt.NDArray[Any]

UNSIGNED: dict[int, np.dtype[Any]] = {
    1: np.dtype(bool),
    8: np.dtype("u1"),
    16: np.dtype("u2"),
    32: np.dtype("u4"),
    64: np.dtype("u8"),
}
SIGNED: dict[int, np.dtype[Any]] = {8: np.dtype("i1"), 16: np.dtype("i2"), 32: np.dtype("i4"), 64: np.dtype("i8")}
FLOAT: dict[int, np.dtype[Any]] = {16: np.dtype("f2"), 32: np.dtype("f4"), 64: np.dtype("f8")}


class PTXError(RuntimeError):
    """What a GPU would fault on, hang on or leave undefined, or what the emulator does not know."""


@dataclass(frozen=True)
class Type:
    """One PTX type.

    Attributes:
        name: as PTX spells it, without the dot.
        kind: "u" unsigned, "s" signed, "b" untyped bits, "f" IEEE floating point, "bf" bf16, "pred".
        bits: the width of the register it fills.
        pack: how many numbers share that register.
    """

    name: str
    kind: str
    bits: int
    pack: int = 1

    @property
    def family(self) -> str:
        """Which of the instructions of one name is meant: "float", "int" or "pred"."""
        return {"f": "float", "bf": "float", "pred": "pred"}.get(self.kind, "int")

    @property
    def raw(self) -> np.dtype[Any]:
        """The unsigned (or bool) dtype of a register of this width."""
        return UNSIGNED[self.bits]

    @property
    def number(self) -> np.dtype[Any]:
        """The dtype of the numbers that `decode` gives."""
        if self.kind == "bf":
            return FLOAT[32]
        return {"f": FLOAT, "s": SIGNED}.get(self.kind, UNSIGNED)[self.bits // self.pack]

    def decode(self, raw: Array) -> Array:
        """Bits (`self.raw`) to numbers (`self.number`)."""
        if self.kind == "bf":
            numbers = numerics.bf16_to_f32(raw.view(np.uint16))
        elif self.kind in "fs":
            numbers = raw.view(self.number)
        else:
            return raw
        return numbers if self.pack == 1 else numbers.reshape(-1, self.pack)

    def encode(self, numbers: Array) -> Array:
        """Numbers to bits, rounding to nearest even where they are wider than the type."""
        if self.kind == "bf":
            numbers = numerics.bf16_bits(numbers)
        elif numbers.dtype != self.number:
            numbers = numbers.astype(self.number)
        if not numbers.flags.c_contiguous:
            numbers = np.ascontiguousarray(numbers)
        return numbers.reshape(-1).view(self.raw)


TYPES = {
    "pred": Type("pred", "pred", 1),
    **{f"{kind}{bits}": Type(f"{kind}{bits}", kind, bits) for kind in "usb" for bits in (8, 16, 32, 64)},
    **{f"f{bits}": Type(f"f{bits}", "f", bits) for bits in (16, 32, 64)},
    "bf16": Type("bf16", "bf", 16),
    "f16x2": Type("f16x2", "f", 32, pack=2),
    "bf16x2": Type("bf16x2", "bf", 32, pack=2),
    "f32x2": Type("f32x2", "f", 64, pack=2),
}


def resize(raw: Array, bits: int, signed: bool = False) -> Array:
    """Bits widened (with zeros, or with the sign) or cut to another register width."""
    have = raw.dtype.itemsize * 8
    if raw.dtype == bool or have == bits:
        return raw
    if signed and have < bits:
        return raw.view(SIGNED[have]).astype(SIGNED[bits]).view(UNSIGNED[bits])
    return raw.astype(UNSIGNED[bits])
