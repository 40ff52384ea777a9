"""The static report: what the machine code of a call's kernels does, read and not executed.

Everything is taken from what Triton really compiled for the call: registers and spills from its own ptxas command,
accesses and instructions from the SASS (on AMD from the assembly text).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import triton
from triton.compiler.compiler import make_backend

from retainops.testing import sass
from retainops.testing.driver import Launch, driver
from retainops.testing.flow import Step, whole_tile

_AMD_ACCESS = re.compile(r"(global|buffer|flat|scratch|ds)_(load|store|read|write|atomic)")


@dataclass(frozen=True)
class KernelReport:
    """What one compiled kernel is; its `str` is a readable block.

    Counts are of instructions in the code, and a kernel with a whole-tile body and a masked tail holds both;
    `whole_tile` counts one of them. Keys that a mapping lacks count 0.

    Attributes:
        name: the kernel's name.
        target: the architecture, "sm_90" or "gfx942".
        num_warps: warps a program.
        registers: registers a thread (AMD: VGPRs).
        spill_stores, spill_loads: bytes a thread moves because registers ran out, as ptxas counts them (AMD: 4 for
            each spilled VGPR).
        stack: bytes of stack a thread. Not always a spill: Triton 3.6's `tl.sin` keeps 32 bytes for its slow path.
        shared: bytes of shared memory a program.
        machine_code: sha256 of the instructions' encodings alone (AMD: of their text). Equal if and only if the
            instructions are the same, whatever the kernel's name, line numbers and names of arguments.
        image: the cubin (AMD: the assembly text), from which the rest is read when it is asked for.
    """

    name: str
    target: str
    num_warps: int
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int
    machine_code: str
    image: bytes = field(repr=False)

    @property
    def is_nvidia(self) -> bool:
        """Whether the target is NVIDIA's, so that there is SASS."""
        return self.target.startswith("sm_")

    @functools.cached_property
    def sass(self) -> str:
        """The disassembly (AMD: the assembly)."""
        return sass.disassemble(self.image) if self.is_nvidia else self.image.decode()

    @functools.cached_property
    def _opcodes(self) -> list[tuple[str, str | None]]:
        """Of each instruction but NOPs the opcode, and how `accesses` counts it."""
        if self.is_nvidia:
            return [(i.base, i.access) for i in sass.parse(self.sass) if i.base != "NOP"]
        names = [line.split()[0] for line in _amd_instructions(self.sass)]
        return [(name, name if _AMD_ACCESS.match(name) else None) for name in names]

    @property
    def instructions(self) -> int:
        """How many instructions, without NOPs."""
        return len(self._opcodes)

    @property
    def mix(self) -> Counter[str]:
        """Instructions by opcode without modifiers: "FFMA", "LDG", ..."""
        return Counter(opcode for opcode, _ in self._opcodes)

    @property
    def accesses(self) -> Counter[str]:
        """Memory instructions by opcode and bits: "LDG.128", "STG.16", "LDS.32"; on AMD "global_load_dwordx4".

        Loads from the constant tables of sin and cos are "LDG.CONSTANT.32".
        """
        return Counter(access for _, access in self._opcodes if access)

    @property
    def loads(self) -> Counter[str]:
        """The accesses that read global memory: "LDG.128" and so on."""
        return _only(self.accesses, r"(LDG|LDGSTS|LD)\.\d|(global|buffer|flat)_load")

    @property
    def stores(self) -> Counter[str]:
        """The accesses that write global memory: "STG.128" and so on."""
        return _only(self.accesses, r"(STG|ST)\.\d|(global|buffer|flat)_store")

    @functools.cached_property
    def path(self) -> list[Step]:
        """What a warp executes whose tile lies inside the tensor (see `retainops.testing.flow`).

        Raises:
            ValueError: on AMD, whose control flow is not followed.
        """
        if not self.is_nvidia:
            raise ValueError(f"{self.name}: the whole tile's path is followed for sm_* targets only, not {self.target}")
        return whole_tile(sass.parse(self.sass))

    @property
    def whole_tile(self) -> Counter[str]:
        """The accesses of a tile that lies inside the tensor, each loop run once: of two bodies only this one."""
        return Counter(s.instruction.access for s in self.path if s.active and s.instruction.access)

    @property
    def narrowest(self) -> int:
        """Bits of the narrowest global access of a whole tile: 128 says that every one is as wide as can be."""
        found = [s.instruction.bits for s in self.path if s.active and s.instruction.is_global]
        if not found:
            raise ValueError(f"{self.name}: a whole tile makes no global access")
        return min(found)

    def __str__(self) -> str:
        spills = self.spill_stores + self.spill_loads
        spilled = f"SPILLS {self.spill_stores} B out, {self.spill_loads} B in" if spills else "no spills"
        lines = [
            f"{self.name} for {self.target}: {self.num_warps} warps, {self.registers} registers, {spilled}, "
            f"stack {self.stack} B, shared {self.shared} B",
            f"  {self.instructions} instructions: {_counts(self.mix.most_common(8))}, ...",
            f"  accesses: {_counts(sorted(self.accesses.items())) or 'none'}",
        ]
        if self.is_nvidia:
            accesses = _counts(sorted(self.whole_tile.items())) or "none"
            lines.append(f"  whole tile: {len(self.path)} instructions a warp; {accesses}")
        return "\n".join([*lines, f"  machine code {self.machine_code[:16]}"])


def static_report(call: Callable[[], Any], target: str = "sm_90") -> list[KernelReport]:
    """Compile every kernel that a call launches, for a target that need not be there, and report on each.

    Args:
        call: runs an op, forward and backward as it likes, on CPU tensors. Its launches are specialised and
            compiled as on a GPU: same block sizes, alignments and None pointers. Kernels are not executed, so what
            they would have written holds anything.
        target: one of `retainops.testing.driver.TARGETS`, such as "sm_80", "sm_90", "sm_120", "gfx942".

    Returns:
        One report for each compiled kernel, in the order of their first launch.

    Raises:
        ValueError: an unknown target, or the call launched no kernel.

    Example:
        >>> for report in static_report(lambda: ro.mul_sin(a, b).sum().backward()):
        ...     print(report)
    """
    with driver(target) as launches:
        call()
    if not launches:
        raise ValueError(
            "static_report: the call launched no kernel; pass a callable that runs the kernels' path on CPU tensors "
            "(retainops.explain says which path a call takes, and why)"
        )
    kernels = {(launch.fn, launch.kernel.hash): launch for launch in launches}
    return [report(launch, target) for launch in kernels.values()]


def report(launch: Launch, target: str) -> KernelReport:
    """The report on one recorded launch."""
    if "cubin" in launch.kernel.asm:
        return _nvidia(launch, target)
    return _amd(launch, target)


def _nvidia(launch: Launch, target: str) -> KernelReport:
    cubin, (_, log) = launch.kernel.asm["cubin"], assemble(launch.kernel)
    return KernelReport(
        name=launch.name,
        target=target,
        num_warps=launch.kernel.metadata.num_warps,
        registers=_number(r"Used (\d+) registers", log),
        spill_stores=_number(r"(\d+) bytes spill stores", log),
        spill_loads=_number(r"(\d+) bytes spill loads", log),
        stack=_number(r"(\d+) bytes stack frame", log),
        shared=launch.kernel.metadata.shared,
        machine_code=sass.machine_code(cubin),
        image=cubin,
    )


@functools.lru_cache(maxsize=256)
def assemble(kernel: Any) -> tuple[bytes, str]:
    """The cubin of a compiled kernel and what ptxas said of it: Triton's own command once more, its log shown."""
    metadata = kernel.metadata._asdict()
    backend = make_backend(kernel.metadata.target)
    with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(io.StringIO()) as log:
        triton.knobs.nvidia.dump_ptxas_log = True
        options = backend.parse_options(metadata)
        cubin = backend.make_cubin(kernel.asm["ptx"], metadata, options, kernel.metadata.target.arch)
    return cubin, log.getvalue()


def _amd(launch: Launch, target: str) -> KernelReport:
    text = launch.kernel.asm["amdgcn"]
    spilled = 4 * _number(r"\.vgpr_spill_count:\s+(\d+)", text)
    code = "\n".join(" ".join(line.split()) for line in _amd_instructions(text))
    return KernelReport(
        name=launch.name,
        target=target,
        num_warps=launch.kernel.metadata.num_warps,
        registers=_number(r"\.vgpr_count:\s+(\d+)", text),
        spill_stores=spilled,
        spill_loads=spilled,
        stack=_number(r"\.private_segment_fixed_size:\s+(\d+)", text),
        shared=launch.kernel.metadata.shared,
        machine_code=hashlib.sha256(code.encode()).hexdigest(),
        image=text.encode(),
    )


def _amd_instructions(text: str) -> list[str]:
    # Directives begin with a dot, labels and the metadata's keys do not begin with a blank.
    lines = re.findall(r"^[ \t]+([a-z]\w*(?:[ \t][^;\n]*)?)", text, re.MULTILINE)
    return [line for line in lines if not line.startswith("s_nop")]


def _number(pattern: str, text: str) -> int:
    """The largest number that a pattern finds: a cubin may hold a kernel and functions that it calls."""
    found = re.findall(pattern, text)
    if not found:
        raise ValueError(f"static_report: no {pattern!r} in the compiler's output: {text[:400]!r}")
    return max(map(int, found))


def _only(counts: Counter[str], pattern: str) -> Counter[str]:
    return Counter({name: n for name, n in counts.items() if re.match(pattern, name)})


def _counts(items: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{n} {name}" for name, n in items)
