"""Triton's front end alone: launches are specialised, kernels are translated to Triton's IR, and that is all.

What is wrong with a kernel as a program (types, shapes, constants, names) is found there, in a tenth of the time
that a whole compile takes. It is for tests that execute many kernels and read no machine code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import triton
from triton._C.libtriton import ir
from triton.runtime.jit import JITFunction


class Translated:
    """What Triton gets in the place of a compiled kernel: a signature and a name, and no machine code."""

    function = packed_metadata = None

    def __init__(self, src: Any, name: str) -> None:
        self.src: Any = src
        self.asm: dict[str, Any] = {}
        self.metadata = SimpleNamespace(name=name)

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *args: triton.runtime.driver.active.launched(self.src.fn, grid, args, self)

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, gx: int, gy: int, gz: int, *rest: Any) -> None:
        # stream, function, packed metadata, launch metadata, two hooks; then the kernel's own arguments
        triton.runtime.driver.active.launched(self.src.fn, (gx, gy, gz), rest[6:], self)


def _translate(
    fn: JITFunction, key: str, signature: Any, device: int, constexprs: Any, options: Any, attrs: Any, warmup: bool
) -> Translated:
    kernels, _, target, backend, _ = fn.device_caches[device]
    src = fn.ASTSource(fn, signature, constexprs, attrs)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    codegen, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    module = src.make_ir(target, options, codegen, modules, context)
    kernels[key] = Translated(src, module.get_entry_func_name())
    return kernels[key]


_compile = JITFunction._do_compile


@contextlib.contextmanager
def compiling(whole: bool) -> Iterator[None]:
    """Inside the `with`, a launch compiles its kernel as ever, or translates it only."""
    before = JITFunction._do_compile
    JITFunction._do_compile = _compile if whole else _translate
    try:
        yield
    finally:
        JITFunction._do_compile = before
