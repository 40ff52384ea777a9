"""What a launch did: instructions issued, and how well its global memory accesses coalesced."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from retainops.testing.ptx.types import Array

WARP = 32
SECTOR = 32  # bytes: the unit in which global memory is moved


@dataclass
class Counters:
    """Dynamic counts of one launch; `+` adds those of two.

    Attributes:
        instructions: warp instructions issued, by full opcode ("ld.global.v4.b32"); a warp counts once for each
            instruction that at least one of its threads reaches.
        bytes_loaded, bytes_stored: what the threads asked for in global memory (masked threads ask for nothing).
        sectors: 32-byte sectors touched, summed over the warps' requests.
        ideal_sectors: the fewest that could hold the distinct bytes of those requests. `sectors == ideal_sectors`
            is full coalescing; a request that starts inside a sector touches one more.
    """

    instructions: Counter[str] = field(default_factory=Counter)
    bytes_loaded: int = 0
    bytes_stored: int = 0
    sectors: int = 0
    ideal_sectors: int = 0

    def count(self, prefix: str = "") -> int:
        """Warp instructions whose opcode starts with `prefix`: `count("ld.global")`; all of them by default."""
        return sum(n for opcode, n in self.instructions.items() if opcode.startswith(prefix))

    def __add__(self, other: Counters) -> Counters:
        return Counters(
            self.instructions + other.instructions,
            self.bytes_loaded + other.bytes_loaded,
            self.bytes_stored + other.bytes_stored,
            self.sectors + other.sectors,
            self.ideal_sectors + other.ideal_sectors,
        )

    def request(self, lanes: Array, addresses: Array, size: int, stored: bool) -> None:
        """Counts one instruction's access to global memory: `size` aligned bytes at each lane's address."""
        if stored:
            self.bytes_stored += len(lanes) * size
        else:
            self.bytes_loaded += len(lanes) * size
        first = lanes[0] // WARP * WARP
        warps = np.full(((lanes[-1] - first) // WARP + 1, WARP), -1, np.int64)
        warps.reshape(-1)[lanes - first] = addresses
        warps.sort(axis=1)
        self.sectors += int(_distinct(warps >> 5).sum())
        self.ideal_sectors += int((-(-_distinct(warps) * size // SECTOR)).sum())


def _distinct(ordered: Array) -> Array:
    """How many distinct non-negative numbers each sorted row holds."""
    new = ordered >= 0
    new[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
    return new.sum(axis=1)
