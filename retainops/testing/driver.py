"""A Triton driver with no GPU behind it: launches are specialised and compiled for real, then recorded.

`driver(target, execute)` makes Triton believe that a GPU of the named architecture is there. A launch
`kernel[grid](cpu_tensors, ...)` then goes through Triton's own argument specialisation and its whole compiler
(down to the cubin, by the ptxas in triton's wheel), and ends in `execute(launch)` instead of a GPU. What is
executed is up to the caller: nothing (static reports), Triton's interpreter (`simulated_gpu`), or the
compiled PTX itself (`ptx`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from retainops import dispatch
from retainops.testing.frontend import compiling, launching

TARGETS = {
    **{f"sm_{n}": GPUTarget("cuda", n, 32) for n in (80, 86, 89, 90, 100, 120)},
    **{name: GPUTarget("hip", name, 64) for name in ("gfx90a", "gfx942")},
}


@dataclass(frozen=True)
class Launch:
    """One kernel launch: the function, its grid, every argument in signature order, and the compiled kernel."""

    fn: triton.JITFunction
    grid: tuple[int, int, int]
    args: tuple[Any, ...]
    kernel: Any  # triton.compiler.CompiledKernel: .asm["ptx"], .asm["cubin"], .metadata

    @property
    def name(self) -> str:
        """The kernel's name, as a profiler would show it."""
        return self.kernel.metadata.name


Execute = Callable[[Launch], object]  # what it returns is ignored


class _Properties:
    """Stands for the driver's C module. The figures are an H200's; only occupancy heuristics read them."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": 232448,
            "multiprocessor_count": 132,
            "warpSize": 32,
            "max_num_regs": 65536,
            "sm_clock_rate": 1980000,
            "mem_clock_rate": 3201000,
            "mem_bus_width": 6144,
        }

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 0, 0, 0, 0, 1024  # module, function, registers, spills, most threads


class SimulatedDriver(DriverBase):
    """Answers Triton's questions about the device, and hands every launch to `execute`."""

    def __init__(self, target: GPUTarget, execute: Execute, launches: list[Launch], compiles: bool) -> None:
        super().__init__()
        self.target, self.execute, self.launches, self.compiles = target, execute, launches, compiles
        self.utils = _Properties()

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        def launch(gx, gy, gz, stream, function, packed, launch_metadata, on_enter, on_exit, *args):
            with launching:  # another thread's compiler adds to these
                kernels = (k for cache in src.fn.device_caches.values() for k in cache[0].values())
                kernel = next(k for k in kernels if k.src is src)
            # Triton keeps a launcher with the compiled kernel: run the launch under the driver of the moment.
            triton.runtime.driver.active.launched(src.fn, (gx, gy, gz), args, kernel)

        return launch

    def launched(self, fn: triton.JITFunction, grid: tuple[int, int, int], args: tuple[Any, ...], kernel: Any) -> None:
        """Execute a launch and record it; other threads wait for it, as they would for a GPU's stream."""
        launch = Launch(fn, grid, args, kernel)
        with launching:
            self.execute(launch)
        self.launches.append(replace(launch, args=()))  # a record that held tensors would keep them alive

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        # Triton caches compiled kernels by this number: one no real device has keeps the caches apart.
        return (1000 if self.compiles else 2000) + list(TARGETS.values()).index(self.target)

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_benchmarker(self) -> Callable[..., list[float]]:
        def bench(call: Callable[[], Any], quantiles: Any = None, **_: Any) -> list[float]:
            call()
            return [1.0] * len(quantiles or [0])

        return bench


@contextlib.contextmanager
def _fusion_said_aloud() -> Iterator[None]:
    """Say explicitly what Triton would do anyway about fusing a * b + c into one rounding.

    Triton 3.9 warns at the first compile when nobody said it, because 3.10 changes the default. Here it stays what
    it is, enabled unless TRITON_DEFAULT_FP_FUSION=0, so that the code under test is the code of a plain launch.
    """
    language = triton.knobs.language
    with language.scope():  # on leaving restores the knob, and the environment variable that setting it sets
        language.default_fp_fusion = language.default_fp_fusion
        yield


_one_at_a_time = threading.RLock()  # Triton has one active driver in a process


@contextlib.contextmanager
def driver(target: str = "sm_90", execute: Execute | None = None, *, compiles: bool = True) -> Iterator[list[Launch]]:
    """Inside the `with`, CPU tensors take the kernels' path and every launch goes to `execute`.

    Args:
        target: the architecture to compile for, one of `TARGETS` ("sm_80", ..., "sm_120", "gfx942").
        execute: called with each `Launch`, in order; None records and executes nothing, so that what the
            kernels would have written keeps whatever it held.
        compiles: False: translate kernels to Triton's IR and no further (a `Launch` has no machine code then).

    Yields:
        The list of launches so far, which grows; their `args` are dropped once executed.

    Raises:
        ValueError: an unknown target.
        RuntimeError: entered from another thread while one is active there (Triton has one driver in a process).
    """
    if target not in TARGETS:
        raise ValueError(f"driver: unknown target {target!r}; expected one of {', '.join(TARGETS)}")
    if not _one_at_a_time.acquire(blocking=False):
        raise RuntimeError("driver: another thread is simulating a GPU; Triton has one driver in a process")
    config = triton.runtime.driver
    before = config._active  # reading `.active` would ask for a real driver, which may not exist
    launches: list[Launch] = []
    config.set_active(SimulatedDriver(TARGETS[target], execute or (lambda launch: None), launches, compiles))
    try:
        with dispatch.kernels_on("cpu"), _fusion_said_aloud(), compiling(compiles):
            yield launches
    finally:
        config.set_active(before)
        _one_at_a_time.release()
