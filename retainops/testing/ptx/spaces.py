"""PTX state spaces: memory that knows its bounds.

Tensors do not keep their addresses. Each storage (and each constant table of the module) gets a window of 2**40 bytes
of its own, with the real address's alignment, so that an access past the end of one tensor cannot land in another.
Memory nobody has written reads as 0xff bytes: NaN in every floating-point type, -1 in the integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from retainops.testing.ptx.program import WINDOW, Variable
from retainops.testing.ptx.types import UNSIGNED, Array, PTXError

_PAGE = 4096
LOCAL_WINDOW, SHARED_WINDOW = 0xFFFFFE, 0xFFFFFF  # where generic addresses of these spaces lie


class Rows:
    """Shared, local or parameter memory: one row of bytes for each CTA or lane.

    Args:
        count: how many rows.
        size: bytes in a row.
    """

    def __init__(self, count: int, size: int) -> None:
        self.size = size
        self.bytes = np.full((count, -(-size // 16) * 16), 0xFF, np.uint8)

    def inside(self, addresses: Array, size: int) -> Array:
        """Which accesses of `size` bytes lie within a row."""
        return addresses <= np.uint64(max(self.size - size, 0)) if self.size >= size else np.zeros(len(addresses), bool)

    def describe(self, address: int) -> str:
        """For an error: what lies at an address."""
        return f"byte {address:#x} of {self.size}"

    def load(self, rows: Array, addresses: Array, bits: int) -> Array:
        """The numbers at these addresses, as unsigned integers of `bits` bits; in bounds and aligned."""
        return self.bytes.view(UNSIGNED[bits])[rows, (addresses // np.uint64(bits // 8)).astype(np.int64)]

    def store(self, rows: Array, addresses: Array, values: Array) -> None:
        """Writes unsigned integers to these addresses; in bounds and aligned."""
        width = values.dtype.itemsize
        self.bytes.view(values.dtype)[rows, (addresses // np.uint64(width)).astype(np.int64)] = values


@dataclass
class _Storage:
    name: str
    start: int  # the emulated address of memory[0]
    memory: Array
    writable: bool
    low: int  # the bounds: those of the views that were passed, not of the whole storage
    high: int
    views: dict[int, tuple[Array, int]] = field(default_factory=dict)

    def view(self, width: int) -> tuple[Array, int]:
        """The memory as unsigned integers of `width` bytes, and the address of the first."""
        if width not in self.views:
            skip = -self.start % width
            whole = max(len(self.memory) - skip, 0) // width * width
            self.views[width] = self.memory[skip : skip + whole].view(UNSIGNED[8 * width]), self.start + skip
        return self.views[width]


class Global:
    """Global and constant memory: tensors passed as arguments, and the module's own tables."""

    def __init__(self, variables: Sequence[Variable]) -> None:
        self.storages = [
            _Storage(v.name, v.address, np.frombuffer(v.data, np.uint8), False, v.address, v.address + len(v.data))
            for v in variables
        ]
        self.known: dict[int, _Storage] = {}  # by the storage's real address

    def add(self, name: str, tensor: torch.Tensor) -> int:
        """Makes a tensor's memory accessible.

        What may be touched is the memory from its first element to its last (gaps between its rows included). Views
        of one storage share one window, so that they overlap as they do in reality; there, what lies between the
        first and the last byte of all the views passed may be touched.

        Returns:
            The address of its first element.
        """
        if tensor.device.type != "cpu":
            raise PTXError(f"argument {name} is on {tensor.device}; the emulator takes CPU tensors")
        storage = tensor.untyped_storage()
        real = storage.data_ptr()
        found = self.known.get(real) if storage.nbytes() else None
        if found is None:
            start = (len(self.storages) + 1 << WINDOW) + real % _PAGE
            memory = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            found = _Storage(name, start, memory, True, start + len(memory), start)
            self.storages.append(found)
            self.known[real] = found
        address = found.start + int(tensor.storage_offset()) * tensor.element_size()
        if tensor.numel():
            last = sum((int(n) - 1) * int(stride) for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
            found.low = min(found.low, address)
            found.high = max(found.high, address + (last + 1) * tensor.element_size())
        return address

    def inside(self, addresses: Array, size: int) -> Array:
        """Which accesses of `size` bytes lie within a tensor or table."""
        good = np.zeros(len(addresses), bool)
        for window, chosen in self._windows(addresses):
            if 0 <= window < len(self.storages):
                storage = self.storages[window]
                part = addresses[chosen]
                low, high = np.uint64(storage.low), np.uint64(max(storage.high - size + 1, 0))
                good[chosen] = (part >= low) & (part < high)
        return good

    def describe(self, address: int) -> str:
        """For an error: what lies at an address."""
        window = (address >> WINDOW) - 1
        if not 0 <= window < len(self.storages):
            return f"address {address:#x}, which belongs to no argument (a null or wild pointer)"
        storage = self.storages[window]
        return f"byte {address - storage.low} of {storage.name}, which has {max(storage.high - storage.low, 0)} bytes"

    def load(self, rows: Array, addresses: Array, bits: int) -> Array:
        """The numbers at these addresses, as unsigned integers of `bits` bits; in bounds and aligned."""
        result = np.empty(len(addresses), UNSIGNED[bits])
        for window, chosen in self._windows(addresses):
            memory, first = self.storages[window].view(bits // 8)
            result[chosen] = memory[self._index(addresses[chosen], first, bits // 8)]
        return result

    def store(self, rows: Array, addresses: Array, values: Array) -> None:
        """Writes unsigned integers to these addresses; in bounds and aligned."""
        width = values.dtype.itemsize
        for window, chosen in self._windows(addresses):
            if not self.storages[window].writable:
                raise PTXError(f"a store to the constant table {self.storages[window].name}")
            memory, first = self.storages[window].view(width)
            memory[self._index(addresses[chosen], first, width)] = values[chosen]

    @staticmethod
    def _index(addresses: Array, first: int, width: int) -> Array:
        return ((addresses - np.uint64(first)) // np.uint64(width)).astype(np.int64)

    @staticmethod
    def _windows(addresses: Array) -> list[tuple[int, Array | slice]]:
        """The windows touched, and which accesses touch each: almost always one window for all."""
        windows = (addresses >> np.uint64(WINDOW)).astype(np.int64) - 1
        if len(windows) and (windows == windows[0]).all():
            return [(int(windows[0]), slice(None))]
        return [(int(w), windows == w) for w in np.unique(windows)]
