"""Triton's front end alone: launches are specialised, kernels are translated to Triton's IR, and that is all.

What is wrong with a kernel as a program (types, shapes, constants, names) is found there, in a tenth of the time
that a whole compile takes. It is for tests that execute many kernels and read no machine code.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import triton
from triton._C.libtriton import ir
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction


class Translated:
    """What Triton gets in the place of a compiled kernel: a signature and a name, and no machine code."""

    function = packed_metadata = None

    def __init__(self, src: Any, options: Any, name: str) -> None:
        self.src: Any = src
        self.options = options
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
    kernels[key] = Translated(src, options, _module(src, target, backend, options)[0].get_entry_func_name())
    return kernels[key]


def _module(src: Any, target: Any, backend: Any, options: Any) -> tuple[Any, Any]:
    """What the front end makes of a kernel, and the context without which it is gone."""
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    codegen, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    return src.make_ir(target, options, codegen, modules, context), context


def ttir(kernel: Translated) -> str:
    """The IR of a translated kernel, calls inlined and constants folded, by the driver that is active."""
    target = triton.runtime.driver.active.get_current_target()
    backend = make_backend(target)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, kernel.options, kernel.src.language)
    module, _context = _module(kernel.src, target, backend, kernel.options)
    return str(stages["ttir"](module, {}))


_compile = JITFunction._do_compile
launching = threading.RLock()
"""Held by the thread that launches. A kernel is interpreted in a changed triton.language, of which there is one, and in
which no other thread may translate, nor ask what a kernel refers to."""


@contextlib.contextmanager
def compiling(whole: bool) -> Iterator[None]:
    """Inside the `with`, a launch compiles its kernel as ever, or translates it only; one at a time."""
    compile, run = JITFunction._do_compile, JITFunction.run

    @functools.wraps(run)
    def run_alone(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        with launching:
            return run(self, *args, **kwargs)

    JITFunction._do_compile, JITFunction.run = _compile if whole else _translate, run_alone
    try:
        yield
    finally:
        JITFunction._do_compile, JITFunction.run = compile, run
