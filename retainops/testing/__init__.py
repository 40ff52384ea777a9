"""Verifying kernels, with or without a GPU. docs/verification.md is the tour.

simulated_gpu()    CPU tensors take the kernels' path; Triton's interpreter executes, with checks (layer 1)
ptx                the compiled PTX itself, executed on CPU tensors (layer 2)
static_report()    registers, spills, widths of accesses, from the machine code (layer 3)
overflows()        integers of addresses that may overflow for some size of the tensors, from Triton's IR
predict()          a roofline model's time (layer 4)
check_op()         an op against eager PyTorch, its retain_grad(), and float64
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retainops.testing.check import check_op
    from retainops.testing.memory import KernelFault
    from retainops.testing.overflow import overflows
    from retainops.testing.roofline import predict
    from retainops.testing.simulated import simulated_gpu
    from retainops.testing.static import static_report

_HOMES = {
    "KernelFault": "memory",
    "check_op": "check",
    "overflows": "overflow",
    "predict": "roofline",
    "simulated_gpu": "simulated",
    "static_report": "static",
}

__all__ = ["KernelFault", "check_op", "overflows", "predict", "simulated_gpu", "static_report"]


def __getattr__(name: str) -> Any:
    # On demand: check_op works where triton is missing, and the emulator is only loaded by who uses it.
    if name in _HOMES:
        return getattr(importlib.import_module(f"retainops.testing.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
