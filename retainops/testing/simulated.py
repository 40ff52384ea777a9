"""A simulated GPU: Triton kernels on CPU tensors, host code and compiler included."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

from retainops.testing import interpreter
from retainops.testing.driver import Execute, Launch, driver
from retainops.testing.interpreter import Programs

ENGINES = ("interpreter", "ptx")


@contextlib.contextmanager
def simulated_gpu(
    target: str = "sm_90",
    *,
    engine: str | Execute = "interpreter",
    check: bool = True,
    programs: Programs = None,
    compiles: bool = True,
) -> Iterator[list[Launch]]:
    """Inside the `with`, kernels run on CPU tensors: launched and compiled for real, executed here.

    The interpreter checks a kernel's logic. It computes as a GPU does where rounding is defined (bfloat16, fused
    multiply-add, TF32 operands of dots, each step of a reduction), and evaluates transcendental functions (sin, cos,
    exp, log, tanh, erf, sqrt, rsqrt, ..., libdevice's too) in float64, rounded once to the operand's type: the accuracy
    of the GPU's own sin is not its business, nor is the order in which it sums.

    Threads may share one `with`: they launch one at a time.

    Args:
        target: the architecture to compile for, one of `retainops.testing.driver.TARGETS`.
        engine: what executes a launch: "interpreter", "ptx" (the compiled PTX itself, `retainops.testing.ptx`), or a
            function of a `Launch`.
        check: of the interpreter: raise on an access outside the tensor that the pointer came from (or in the gaps of
            a strided one), on programs that race (one writes what another reads or writes; atomics may), on lanes
            of one store that meet in one element, on storing a floating-point value into which went lanes that
            a load masked off without `other=`, on arguments that the kernel was not compiled for (a compiled kernel
            that was kept and started again), and on hints to the compiler that are false (`tl.multiple_of`).
            Masked-off lanes hold a NaN that is marked, or the largest integer. What was computed of them by a
            comparison, a sort, an argmax or in integers has no mark, and passes. Without: several times faster, and
            such lanes hold 0.
        programs: of the interpreter: execute only these. A predicate `(index, total) -> bool` on the linear index (the
            grid's first dim runs fastest), or the indices; a negative one counts from the end, one that a
            launch's grid does not have is left out. None: all.
        compiles: False: kernels are translated to Triton's IR, which finds what is wrong with them as programs, and
            not compiled any further: their first launches are several times faster. Not for the engine "ptx".

    Yields:
        The launches so far, a list which grows.

    Raises:
        KernelFault: (from a launch) a check found a fault; the message names kernel, argument, element and program.
        ValueError: an unknown target or engine, `programs` with another engine than the interpreter, or
            the engine "ptx" and nothing compiled.
        RuntimeError: entered from another thread while one is active there.

    Example:
        >>> with simulated_gpu() as launches:
        ...     y = ro.mul_sin(a, b)
        >>> launches[0].name
        'mul_sin_fwd_kernel'
    """
    if engine == "ptx" and not compiles:
        raise ValueError('simulated_gpu: compiles=False with engine="ptx", which executes what the compiler makes')
    with driver(target, _execute(engine, check, programs), compiles=compiles) as launches:
        yield launches


def _execute(engine: str | Execute, check: bool, programs: Programs) -> Execute:
    if engine == "interpreter":
        chosen = programs if programs is None or callable(programs) else list(programs)
        return functools.partial(interpreter.run, check=check, programs=chosen)
    if programs is not None:
        raise ValueError(f'simulated_gpu: programs= is for engine="interpreter"; the engine is {engine!r}')
    if callable(engine):
        return engine
    if engine == "ptx":
        from retainops.testing import ptx

        return ptx.run
    raise ValueError(f"simulated_gpu: unknown engine {engine!r}; expected one of {', '.join(ENGINES)}, or a function")
