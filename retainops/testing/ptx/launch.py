"""Launching: from a Triton launch, or from PTX at hand, to a `Machine`."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from retainops.testing.driver import Launch
from retainops.testing.ptx.counters import WARP, Counters
from retainops.testing.ptx.instructions import decode
from retainops.testing.ptx.machine import Job, Machine
from retainops.testing.ptx.parse import parse
from retainops.testing.ptx.program import Variable
from retainops.testing.ptx.spaces import Global
from retainops.testing.ptx.types import TYPES, Array, PTXError

_LANES = 4096  # as many CTAs run side by side as make this many threads
_HIDDEN = 2  # parameters Triton adds at the end: pointers to scratch memory, which nothing emulated here uses


class Emulator:
    """Executes one PTX module.

    Args:
        ptx: the module's text, with one kernel in it.

    Raises:
        PTXError: text that cannot be read. An unsupported instruction raises only when it is reached.

    Example:
        Emulator(compiled.asm["ptx"]).launch((4,), 128, [x, y, n], shared=0)
    """

    def __init__(self, ptx: str) -> None:
        self.program = parse(ptx)
        self._code = [decode(instruction) for instruction in self.program.code]

    def launch(
        self,
        grid: Sequence[int],
        threads: int,
        args: Sequence[torch.Tensor | int | float | bool | np.generic],
        shared: int = 0,
        names: Sequence[str] = (),
    ) -> Counters:
        """Executes the kernel over a grid.

        Args:
            grid: one to three numbers of CTAs.
            threads: in a CTA; a multiple of 32.
            args: one for each of the kernel's parameters, in order: CPU tensors for pointers, numbers for the rest
                (converted to the parameter's type). Parameters left over at the end are passed as 0.
            shared: bytes of dynamic shared memory.
            names: what errors call the arguments.

        Raises:
            PTXError: a fault, named with its instruction, thread and argument.
        """
        wanted = self.program.threads
        if threads % WARP or threads < 1 or wanted not in (None, threads):
            raise PTXError(f"{threads} threads in a CTA; expected {wanted or f'a multiple of {WARP}'}")
        memory = Global(self.program.variables)
        x, y, z = (int(n) for n in (*grid, 1, 1, 1)[:3])
        job = Job(self.program, self._code, memory, self._params(memory, args, names), (x, y, z), threads, shared)
        cta = np.arange(x * y * z)
        coordinates = np.stack([cta % max(x, 1), cta // max(x, 1) % max(y, 1), cta // max(x * y, 1)], axis=1)
        batch = max(1, _LANES // threads)
        with np.errstate(all="ignore"):
            for start in range(0, len(cta), batch):
                Machine(job, coordinates[start : start + batch]).run()
        return job.counters

    def _params(self, memory: Global, args: Sequence[Any], names: Sequence[str]) -> Array:
        declared = self.program.kernel.params
        if not len(args) <= len(declared) <= len(args) + _HIDDEN:
            raise PTXError(f"{self.program.kernel.name} has {len(declared)} parameters; {len(args)} were passed")
        block = np.zeros(self.program.sizes["param"], np.uint8)
        for i, (variable, arg) in enumerate(zip(declared, args, strict=False)):
            name = names[i] if i < len(names) else f"argument {i}"
            data = np.frombuffer(_bytes(memory, variable, arg, name), np.uint8)
            block[variable.address : variable.address + len(data)] = data
        return block


def _bytes(memory: Global, variable: Variable, arg: Any, name: str) -> bytes:
    """An argument as the bytes of a parameter."""
    if variable.type is None:
        raise PTXError(f"{name} is passed as a block of {variable.size} bytes (a TMA descriptor?): not emulated")
    if isinstance(arg, torch.Tensor):
        arg = np.uint64(memory.add(name, arg))
    elif isinstance(arg, float) and variable.type.kind != "f":
        raise PTXError(f"{name} is {arg!r}, but the parameter is .{variable.type.name}")
    elif variable.type.kind == "f" and not isinstance(arg, np.generic):
        arg = variable.type.number.type(arg)
    data = arg.tobytes() if isinstance(arg, np.generic) else (int(arg) % (1 << 64)).to_bytes(8, "little")
    return data[: variable.size].ljust(variable.size, b"\0")


@functools.lru_cache(maxsize=64)
def _emulator(ptx: str) -> Emulator:
    return Emulator(ptx)


def run(launch: Launch) -> Counters:
    """Executes a launch through its compiled PTX: the `execute` of `retainops.testing.driver.driver`.

    Raises:
        PTXError: a fault, or something the kernel does that is not emulated.
    """
    kernel = launch.kernel
    if "ptx" not in kernel.asm:
        raise PTXError(f"{launch.name} was compiled for {kernel.metadata.target}, which has no PTX")
    if getattr(kernel.metadata, "num_ctas", 1) != 1:
        raise PTXError(f"{launch.name} runs in clusters of {kernel.metadata.num_ctas} CTAs: not emulated")
    flat = list(flatten(kernel.src.signature, launch.args))
    return _emulator(kernel.asm["ptx"]).launch(
        launch.grid,
        kernel.metadata.num_warps * WARP,
        [arg for _, arg in flat],
        kernel.metadata.shared,
        [name for name, _ in flat],
    )


def flatten(signature: dict[str, Any], args: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """The arguments that are parameters of the PTX, by name: constants left out, tuples taken apart."""
    for (name, type_), arg in zip(signature.items(), args, strict=True):
        yield from _flatten(name, type_, arg)


def _flatten(name: str, type_: Any, arg: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(type_, tuple):
        for i, (inner, item) in enumerate(zip(type_, arg, strict=True)):
            yield from _flatten(f"{name}[{i}]", inner, item)
    elif type_ == "constexpr":
        return
    elif type_.startswith("*"):
        yield name, arg if isinstance(arg, torch.Tensor) else arg.base  # a triton.reinterpret-ed tensor
    elif type_.startswith(("tensordesc", "nvTmaDesc")):
        raise PTXError(f"argument {name} is a tensor descriptor: TMA is not emulated")
    else:
        yield name, _scalar(type_, arg)


def _scalar(type_: str, arg: Any) -> Any:
    """A number as Triton passes it, by the name of its Triton type ("i32", "u1", "fp16", ...)."""
    kind, bits = type_.rstrip("0123456789"), int(type_.lstrip("abcdefghijklmnopqrstuvwxyz"))
    if kind in ("i", "u"):
        return int(arg)
    if kind == "bf":
        return TYPES["bf16"].encode(np.array([arg], np.float64))[0]
    return TYPES[f"f{bits}"].number.type(arg)
