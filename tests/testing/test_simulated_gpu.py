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

from retainops.testing.driver import driver
from retainops.testing.language import Patched
from retainops.testing.memory import KernelFault
from retainops.testing.simulated import simulated_gpu
from tests.testing import sample_kernels
from tests.testing.sample_kernels import (
    Operand,
    add_operands_kernel,
    axpy_kernel,
    copy_kernel,
    mul_sin_bwd_kernel,
    rms_norm_fwd_kernel,
)


@triton.jit
def gather_kernel(X, INDEX, Y, n, BLOCK: tl.constexpr):
    """y[i] = x[index[i]]."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + i, tl.load(X + tl.load(INDEX + i, mask=i < n, other=0), mask=i < n), mask=i < n)


@triton.jit
def scatter_kernel(X, INDEX, Y, n, BLOCK: tl.constexpr):
    """y[index[i]] = x[i]."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + tl.load(INDEX + i, mask=i < n, other=0), tl.load(X + i, mask=i < n), mask=i < n)


@triton.jit
def reduce_rows_kernel(X, Y, n, MAX: tl.constexpr, OTHER: tl.constexpr, BLOCK: tl.constexpr):
    """The sum or the maximum of each row of n elements; without `other=` where OTHER is None."""
    j = tl.arange(0, BLOCK)
    if OTHER is None:
        x = tl.load(X + tl.program_id(0) * n + j, mask=j < n)
    else:
        x = tl.load(X + tl.program_id(0) * n + j, mask=j < n, other=OTHER)
    tl.store(Y + tl.program_id(0), tl.max(x, axis=0) if MAX else tl.sum(x, axis=0))


@triton.jit
def count_kernel(INDEX, COUNTS, n, BLOCK: tl.constexpr):
    """counts[index[i]] += 1, atomically."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(COUNTS + tl.load(INDEX + i, mask=i < n, other=0), 1, mask=i < n)


@triton.jit
def poke_kernel(X, OFFSETS, value, n, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """x[i] = value in the offsets' type: 32 bits are too few for a large x."""
    pid = tl.program_id(0)
    i = (pid.to(tl.int64) if WIDE else pid) * BLOCK + tl.arange(0, BLOCK)
    tl.store(X + OFFSETS[0] + i, value, mask=i < n)


def copy(x: torch.Tensor, y: torch.Tensor, n: int, block: int = 256) -> None:
    copy_kernel[(triton.cdiv(n, block),)](x, y, n, BLOCK=block)


# Faults: each planted, caught by name, and absent from the correct twin.


def test_load_out_of_bounds():
    x, y = torch.randn(1000), torch.zeros(1025)
    with simulated_gpu(), pytest.raises(KernelFault) as fault:
        copy(x, y, 1025)
    message = str(fault.value)
    assert "copy_kernel: load of X[1000] by program 3" in message
    assert "out of bounds in 24 of 256 active lanes" in message
    assert "(shape (1000,), strides (1,))" in message
    assert "mask the access" in message
    assert f"{sample_kernels.__file__}:" in message
    with simulated_gpu():
        copy(x, y, 1000)
    assert torch.equal(y[:1000], x)


def test_store_out_of_bounds():
    x, y = torch.randn(1000), torch.full((1000,), 7.0)
    with simulated_gpu(), pytest.raises(KernelFault, match=r"copy_kernel: store to Y\[400\] by program 1 at "):
        copy(x, y[:400], 1000)
    assert (y[400:] == 7).all()  # stopped before it wrote there


@pytest.mark.parametrize("index", [-1, -(10**9), 10**9, 100])
def test_out_of_bounds_is_never_another_tensor(index):
    x, y, i = torch.randn(100), torch.empty(100), torch.arange(100)
    i[17] = index
    with simulated_gpu():
        with pytest.raises(KernelFault, match=rf"load of X\[{index}\] by program 0 .* in 1 of 100 active lanes"):
            gather_kernel[(1,)](x, i, y, 100, BLOCK=128)
        gather_kernel[(1,)](x, i.clamp(0, 99), y, 100, BLOCK=128)


def test_gaps_of_a_strided_tensor_are_out_of_bounds():
    x, y = torch.randn(10, 8), torch.zeros(10, 8)
    view = y[:, :5]
    with simulated_gpu():
        operands = [Operand(t, t.stride()) for t in (x, x, view)]
        with pytest.raises(
            KernelFault, match=r"store to Y\.ptr\[5\] by program 0 at .* between the elements in 27 of 72"
        ):
            add_operands_kernel[(1,)](*operands, (9, 8), BLOCK_M=16, BLOCK_N=8)
        add_operands_kernel[(1,)](*operands, (10, 5), BLOCK_M=16, BLOCK_N=8)
    assert torch.equal(view, (x + x)[:, :5])
    assert not y[:, 5:].any()


def test_write_write_race():
    x, y = torch.randn(512), torch.zeros(512)
    i = torch.arange(512)
    with simulated_gpu():
        scatter_kernel[(2,)](x, i, y, 512, BLOCK=256)
        i[400] = 7
        with pytest.raises(
            KernelFault, match=r"store to Y\[7\] by program 1 at .*, which program 0 has written: .* order"
        ):
            scatter_kernel[(2,)](x, i, y, 512, BLOCK=256)


@pytest.mark.parametrize("order", [1, -1])
def test_read_write_race(order):
    base = torch.arange(1025.0)
    x, y = (base[:-1], base[1:])[::order]  # y[i] = x[i] in place, one off: each program's edge belongs to its neighbour
    touched = r"load of X\[256\] by program 1 at .*written" if order == 1 else r"store to Y\[256\] by program 1 .*read"
    with simulated_gpu():
        with pytest.raises(KernelFault, match=touched):
            copy(x, y, 1024)
        copy(x, x, 1024)
        copy(x, y, 1024, block=1024)


@triton.jit
def last_writes_kernel(X, Y):
    """Every program reads x[0]; the last one changes it."""
    i = tl.program_id(0)
    x = tl.load(X)
    tl.store(Y + i, x)
    if i == tl.num_programs(0) - 1:
        tl.store(X, x + 1)


def test_a_writer_of_what_several_programs_have_read():
    x, y = torch.zeros(1), torch.empty(3)
    with simulated_gpu():
        with pytest.raises(KernelFault, match=r"store to X\[0\] by program 2 .*, which other programs have read: "):
            last_writes_kernel[(3,)](x, y)
        last_writes_kernel[(1,)](x, y)
    assert x.item() == 1


@triton.jit
def two_views_kernel(WHOLE, HALVES, FIRST, BLOCK: tl.constexpr):
    """Program 0 writes 32-bit elements, program 1 every other 16-bit element from FIRST on."""
    i = tl.arange(0, BLOCK)
    if tl.program_id(0) == 0:
        tl.store(WHOLE + i, i.to(tl.float32))
    else:
        tl.store(HALVES[0] + FIRST + 2 * i, i.to(tl.bfloat16))


def test_race_between_views_of_different_dtypes():
    whole = torch.zeros(1024)
    halves = whole.view(torch.bfloat16)
    with simulated_gpu():
        with pytest.raises(
            KernelFault, match=r"store to HALVES\[0\]\[1023\] by program 1 at .*, which program 0 has written"
        ):
            two_views_kernel[(2,)](whole, (halves, 0), 1023, BLOCK=512)
        two_views_kernel[(2,)](whole, (halves, 0), 1024, BLOCK=512)


def test_lanes_of_one_store_that_meet():
    x, y, i = torch.randn(256), torch.zeros(256), torch.arange(256)
    with simulated_gpu():
        scatter_kernel[(1,)](x, i, y, 256, BLOCK=256)
        i[100] = 3
        with pytest.raises(
            KernelFault, match=r"scatter_kernel: store to Y\[3\] by program 0 at .* several lanes of one st"
        ):
            scatter_kernel[(1,)](x, i, y, 256, BLOCK=256)


@pytest.mark.parametrize("maximum", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_missing_other(dtype, maximum):
    x, y = torch.randn(3, 100).to(dtype), torch.zeros(3, dtype=dtype)
    with simulated_gpu():
        with pytest.raises(
            KernelFault, match=r"store to Y\[0\] .* masked-off lanes of X \(the load at .*pass other= to"
        ):
            reduce_rows_kernel[(3,)](x, y, 100, MAX=maximum, OTHER=None, BLOCK=128)
        reduce_rows_kernel[(3,)](x, y, 100, MAX=maximum, OTHER=float("-inf") if maximum else 0.0, BLOCK=128)
        reduce_rows_kernel[(3,)](x, y, 64, MAX=maximum, OTHER=None, BLOCK=64)  # nothing is masked off
    with simulated_gpu(check=False):
        reduce_rows_kernel[(3,)](x, y, 100, MAX=maximum, OTHER=None, BLOCK=128)


def test_nan_of_the_data_is_not_a_fault():
    x, y = torch.full((3, 100), float("nan")), torch.zeros(3)
    x[:, ::2] = float("inf")
    with simulated_gpu():
        reduce_rows_kernel[(3,)](x - x, y, 100, MAX=False, OTHER=0.0, BLOCK=128)
    assert y.isnan().all()


def test_integers_masked_off_are_the_largest():
    x, y = torch.zeros(100, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with simulated_gpu():
        reduce_rows_kernel[(1,)](x, y, 100, MAX=True, OTHER=None, BLOCK=128)
    assert y.item() == 2**31 - 1


def test_atomics_may_meet_but_not_leave():
    i, counts = torch.randint(0, 10, (1000,)), torch.zeros(10, dtype=torch.int32)
    with simulated_gpu():
        count_kernel[(4,)](i, counts, 1000, BLOCK=256)
        assert torch.equal(counts, i.bincount(minlength=10).int())
        i[999] = 10
        with pytest.raises(KernelFault, match=r"atomic on COUNTS\[10\] by program 3 .*out of bounds"):
            count_kernel[(4,)](i, counts, 1000, BLOCK=256)


def test_fault_names_nested_arguments_and_programs():
    x, y = torch.randn(20, 20), torch.zeros(20, 20)
    a, wrong, out = Operand(x, (20, 1)), Operand(x, (21, 1)), Operand(y, (20, 1))
    with simulated_gpu():
        with pytest.raises(KernelFault, match=r"load of B\.ptr\[400\] by program \(1, 0, 0\) at"):
            add_operands_kernel[(2, 2)](a, wrong, out, (20, 20), BLOCK_M=16, BLOCK_N=16)
        with pytest.raises(KernelFault, match=r"load of B\[0\]\[400\] by program"):
            first_of_kernel[(1,)](a.ptr, (x, 400), y)


@triton.jit
def first_of_kernel(A, B, Y):
    """y[0] = a[0] + b[0][b[1]]: B is a plain tuple."""
    tl.store(Y, tl.load(A) + tl.load(B[0] + B[1]))


def test_grid_that_no_gpu_takes():
    x = torch.zeros(10)
    with simulated_gpu(), pytest.raises(KernelFault, match=r"copy_kernel: a grid of \(1, 65536, 1\)"):
        copy_kernel[(1, 65536)](x, x, 10, BLOCK=16)


# What simulated_gpu runs, and how.


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


# Traces.


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
    assert inside == before[:-2]
    assert attributes() == before
    with pytest.raises(KernelFault), simulated_gpu():
        copy(x, y, 1001)
    assert attributes() == before


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
