"""simulated_gpu: what it catches, what it leaves alone, and that it leaves no trace."""

import os
import sys
import threading
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice as any_libdevice
from triton.language.extra.cuda import libdevice as cuda_libdevice
from triton.runtime import interpreter as triton_interpreter

from retainops.testing.builder import builder
from retainops.testing.driver import driver
from retainops.testing.language import Patched
from retainops.testing.memory import KernelFault
from retainops.testing.simulated import simulated_gpu
from tests.testing import sample_kernels
from tests.testing.sample_kernels import (
    axpy_kernel,
    copy_kernel,
    mul_sin_bwd_kernel,
    rms_norm_fwd_kernel,
)


@triton.jit
def poke_kernel(X, OFFSETS, value, n, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """x[i] = value in the offsets' type: 32 bits are too few for a large x."""
    pid = tl.program_id(0)
    i = (pid.to(tl.int64) if WIDE else pid) * BLOCK + tl.arange(0, BLOCK)
    tl.store(X + OFFSETS[0] + i, value, mask=i < n)


def copy(x: torch.Tensor, y: torch.Tensor, n: int, block: int = 256) -> None:
    copy_kernel[(triton.cdiv(n, block),)](x, y, n, BLOCK=block)


def test_results_and_launches():
    n, x, w = 100, torch.randn(10, 100), torch.randn(100)
    y, rstd, z = torch.empty(10, 100), torch.empty(10), torch.empty(10, 100)
    with simulated_gpu() as launches:
        rms_norm_fwd_kernel[(10,)](x, w, y, rstd, n, 1e-5, BLOCK=128)
        axpy_kernel[(4,)](-2.5, x, y, z, 1000, BLOCK=256)
    assert [launch.name for launch in launches] == ["rms_norm_fwd_kernel", "axpy_kernel"]
    assert [launch.grid for launch in launches] == [(10, 1, 1), (4, 1, 1)]
    assert all(".entry" in launch.kernel.asm["ptx"] for launch in launches)
    expected = torch.nn.functional.rms_norm(x.double(), (n,), w.double(), 1e-5)
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(z, y - 2.5 * x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_none_pointer_and_a_function_of_autograd(dtype):
    class Sin(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            return torch.sin(a.float() * b.float()).to(a.dtype)

        @staticmethod
        def backward(ctx, dy):
            a, b = ctx.saved_tensors
            da, db = torch.empty_like(a), torch.empty_like(b)
            mul_sin_bwd_kernel[(4,)](a, b, dy.contiguous(), da, db, dc, a.numel(), BLOCK=256)
            return da, db

    a, b = (torch.randn(1000, dtype=dtype).requires_grad_() for _ in range(2))
    grads = []
    for dc in (None, torch.empty(1000, dtype=dtype)):  # noqa: B007 (backward reads it)
        with simulated_gpu():
            grads.append(torch.autograd.grad(Sin.apply(a, b).float().sum(), (a, b)))
    cos = torch.cos((a.float() * b.float()).double()).float()
    assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))
    assert torch.equal(dc, cos.to(dtype))
    assert torch.equal(grads[0][0], (cos * b).to(dtype))


@triton.autotune([triton.Config({"BLOCK": 128}), triton.Config({"BLOCK": 512}, num_warps=8)], key=["n"])
@triton.jit
def tuned_kernel(X, Y, n, BLOCK: tl.constexpr):
    """y = 2 x."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + i, 2 * tl.load(X + i, mask=i < n), mask=i < n)


def test_autotune():
    x, y = torch.randn(1000), torch.empty(1000)
    with simulated_gpu() as launches:
        tuned_kernel[lambda meta: (triton.cdiv(1000, meta["BLOCK"]),)](x, y, 1000)
    assert torch.equal(y, 2 * x)
    assert {launch.grid[0] for launch in launches} == {8, 2}


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_the_end_of_a_tensor_with_more_than_2_to_31_elements():
    n = 2**31 + 5000
    x = torch.empty(n, dtype=torch.uint8)  # never touched, so it has no memory but what the kernels write
    grid = (triton.cdiv(n, 1024),)
    before = resident_bytes()
    with simulated_gpu(programs=lambda index, total: index >= total - 2):
        poke_kernel[grid](x, (0,), 77, n, WIDE=True, BLOCK=1024)
        assert (x[-(n % 1024) - 1024 :] == 77).all()
        with pytest.raises(KernelFault, match=r"store to X\[-2147480576\] by program 2097155 .*out of bounds"):
            poke_kernel[grid](x, (0,), 77, n, WIDE=False, BLOCK=1024)
        with pytest.raises(KernelFault, match=r"store to X\[2147488648\] by program 2097156 .*out of bounds"):
            poke_kernel[grid](x, (1,), 77, n, WIDE=True, BLOCK=1024)
    assert resident_bytes() - before < 2**28


def test_programs_by_index():
    x, y = torch.ones(1000), torch.zeros(1000)
    with simulated_gpu(programs=[1, -1, 98, -98]):
        copy(x, y, 1000)  # of 4 programs
        copy(x, y[:100], 100)  # of 1 program, which is its last
    assert y.nonzero().flatten().tolist() == [*range(100), *range(256, 512), *range(768, 1000)]


def test_engines():
    x, y = torch.randn(1000), torch.zeros(1000)
    seen = []
    with simulated_gpu(engine=seen.append):
        copy(x, y, 1000)
    assert seen[0].args[0] is x
    assert not y.any()
    with simulated_gpu(engine="ptx"):
        copy(x, y, 1000)
    assert torch.equal(y, x)
    with pytest.raises(ValueError, match="unknown engine 'abacus'; expected one of interpreter, ptx, or a function"):
        simulated_gpu(engine="abacus").__enter__()
    with pytest.raises(ValueError, match="programs= is for engine=\"interpreter\"; the engine is 'ptx'"):
        simulated_gpu(engine="ptx", programs=[0]).__enter__()


def test_an_attribute_that_was_not_there_is_gone_again():
    class Owner:
        old = 1

    with Patched([(Owner, "old", 2), (Owner, "new", 3), (Owner, "__index__", 4)]):
        assert (Owner.old, Owner.new, Owner.__index__) == (2, 3, 4)
    assert Owner.old == 1
    assert not {"new", "__index__"} & vars(Owner).keys()


OWNERS = [tl, tl.core, tl.math, tl.tensor, tl.block_type, tl.dtype, tl.condition, tl.core.tensor_descriptor_base]
OWNERS += [any_libdevice, cuda_libdevice, triton_interpreter, triton.JITFunction, sample_kernels, sys.modules[__name__]]


def attributes() -> list[dict]:
    return [dict(vars(owner)) for owner in OWNERS] + [dict(os.environ), {"driver": triton.runtime.driver._active}]


def test_everything_is_restored():
    x, y = torch.randn(1000), torch.zeros(1000)
    before = attributes()
    with simulated_gpu():
        inside = attributes()[:-2]
        copy(x, y, 1000)
        assert attributes()[:-2] == inside
        with simulated_gpu("sm_80", check=False):
            copy(x, y, 1000)
        with pytest.raises(KernelFault):
            copy(x, y, 1001)
        copy(x, y, 1000)
    changed = [name for x, y in zip(inside, before, strict=False) for name in x if x[name] is not y.get(name)]
    assert changed == ["run"]  # of JITFunction, where threads wait for each other
    assert attributes() == before
    with pytest.raises(KernelFault), simulated_gpu():
        copy(x, y, 1001)
    assert attributes() == before
    assert builder.memory is None  # nothing keeps the tensors alive


def test_another_thread_is_told():
    told = []

    def enter() -> None:
        try:
            with simulated_gpu():
                pass
        except RuntimeError as error:
            told.append(str(error))

    with driver():
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    assert told == ["driver: another thread is simulating a GPU; Triton has one driver in a process"]


@pytest.mark.parametrize("compiles", [False, True])
def test_threads_launch_one_at_a_time(compiles):
    """What each compiles itself, and what all of them do; a fault is that of its thread."""
    found = []

    def work(number: int) -> None:
        for n in range(100, 120):
            x, y = torch.full((n,), float(number)), torch.zeros(n)
            copy(x, y, n)
            da, db = torch.zeros(2, n)
            mul_sin_bwd_kernel[(1,)](x, y, x, da, db, None, n, BLOCK=64 << number)
            if not torch.equal(y, x) or not da.any():
                return
        with pytest.raises(KernelFault, match=rf"store to Y\[{number}\]"):
            copy(x, y[:number], n)
        found.append(number)

    with simulated_gpu(compiles=compiles):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(found) == [1, 2, 3, 4]
