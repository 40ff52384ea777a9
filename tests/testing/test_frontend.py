"""simulated_gpu(compiles=False): kernels are translated and no further, and all else is as ever."""

import pytest
import torch
import triton
import triton.language as tl

from retainops.testing.driver import driver
from retainops.testing.memory import KernelFault
from retainops.testing.simulated import simulated_gpu
from tests.testing.sample_kernels import copy_kernel, rms_norm_fwd_kernel


@triton.jit
def mistyped_kernel(X, Y, n, BLOCK: tl.constexpr):
    """No interpreter minds that the branches differ in type; Triton does."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if n > 5:
        x = tl.load(X + i, mask=i < n, other=0.0)
    else:
        x = 1
    tl.store(Y + i, x, mask=i < n)


@triton.jit
def own_kernel(X, Y, n, BLOCK: tl.constexpr):
    """Launched by one test alone."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + i, tl.load(X + i, mask=i < n), mask=i < n)


def copy(kernel, x: torch.Tensor, y: torch.Tensor, n: int = 1000) -> None:
    kernel[(triton.cdiv(n, 256),)](x, y, n, BLOCK=256)


def test_the_same_bits_and_launches():
    x, w = torch.randn(10, 100), torch.randn(100)
    found = []
    for compiles in (True, False):
        y, rstd = torch.empty(10, 100), torch.empty(10)
        with simulated_gpu(compiles=compiles) as launches:
            rms_norm_fwd_kernel[(10,)](x, w, y, rstd, 100, 1e-5, BLOCK=128)
        found.append((y, rstd, launches[0]))
    (y, rstd, whole), (y2, rstd2, translated) = found
    assert torch.equal(y, y2)
    assert torch.equal(rstd, rstd2)
    assert (whole.name, whole.grid, whole.fn) == (translated.name, translated.grid, translated.fn)
    assert "cubin" in whole.kernel.asm
    assert not translated.kernel.asm
    assert whole.kernel.src.signature == translated.kernel.src.signature


def test_accesses_are_checked():
    x, y = torch.randn(1000), torch.zeros(1000)
    with simulated_gpu(compiles=False), pytest.raises(KernelFault, match=r"X\[1000\].*out of bounds"):
        copy(copy_kernel, x, y, 1001)


@pytest.mark.parametrize("compiles", [False, True])
def test_what_is_wrong_with_a_kernel_as_a_program_is_found(compiles):
    with (
        simulated_gpu(compiles=compiles),
        pytest.raises(triton.compiler.errors.CompilationError, match="initialized to|Mismatched type"),
    ):
        copy(mistyped_kernel, torch.randn(1000), torch.zeros(1000))


def test_a_kernel_that_was_translated_is_compiled_where_that_is_asked_for():
    x, y = torch.randn(1000), torch.zeros(1000)
    asm = []
    with simulated_gpu(compiles=False) as launches:
        copy(own_kernel, x, y)
        with driver("sm_90") as inner:  # as static_report does
            copy(own_kernel, x, y)
        asm.append(inner[0].kernel.asm)
        copy(own_kernel, x, y)
    with simulated_gpu() as after:
        copy(own_kernel, x, y)
        with simulated_gpu(compiles=False) as inner:
            copy(own_kernel, x, y)
        copy(own_kernel, x, y)
    assert [bool(launch.kernel.asm) for launch in (*launches, *inner, *after)] == [False, False, False, True, True]
    assert "ptx" in asm[0]


def test_the_emulator_needs_machine_code():
    with pytest.raises(ValueError, match='compiles=False with engine="ptx", which executes what the compiler makes'):
        simulated_gpu(engine="ptx", compiles=False).__enter__()
