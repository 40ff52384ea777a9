"""Faults of kernels: each planted, caught with the argument's name, and absent from the correct twin."""

import pytest
import torch
import triton
import triton.language as tl

from retainops.testing.memory import KernelFault
from retainops.testing.simulated import simulated_gpu
from tests.testing import sample_kernels
from tests.testing.sample_kernels import Operand, add_operands_kernel, copy_kernel


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


def copy(x: torch.Tensor, y: torch.Tensor, n: int, block: int = 256) -> None:
    copy_kernel[(triton.cdiv(n, block),)](x, y, n, BLOCK=block)


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


def test_between_the_elements_of_a_strided_vector():
    x, y = torch.randn(50), torch.zeros(100)[::2]
    with (
        simulated_gpu(),
        pytest.raises(KernelFault, match=r"store to Y\[1\] .* between the elements in 25 of 50 .* strides"),
    ):
        copy(x, y, 50)


@triton.jit
def choose_kernel(X, Y, Z, n, BLOCK: tl.constexpr):
    """z = x in the first half of the block, y in the second: pointers to two tensors in one load."""
    i = tl.arange(0, BLOCK)
    tl.store(Z + i, tl.load(tl.where(i < BLOCK // 2, X + i, Y + i), mask=i < n), mask=i < n)


def test_pointers_into_two_tensors():
    x, y, z = torch.randn(3, 60)
    with simulated_gpu():
        choose_kernel[(1,)](x, y, z, 60, BLOCK=64)
        assert torch.equal(z, torch.cat([x[:32], y[32:]]))
        with pytest.raises(KernelFault, match=r"load of Y\[60\] by program 0 .* in 4 of 32 active lanes"):
            choose_kernel[(1,)](x, y, z, 64, BLOCK=64)


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


@triton.jit
def narrower_kernel(X, DTYPE: tl.constexpr, APART: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """Each program stores its own BLOCK elements of X as they are, then as many of DTYPE from APART * program on."""
    i, program = tl.arange(0, BLOCK), tl.program_id(0)
    tl.store(X + program * BLOCK + i, 1.0)
    p = X.to(tl.pointer_type(DTYPE), bitcast=True)
    tl.store(p + APART * program + i // LANES, program.to(DTYPE))


@pytest.mark.parametrize("dtype", [tl.int16, tl.int8], ids=str)
def test_races_through_a_pointer_to_something_narrower(dtype: tl.dtype) -> None:
    x, parts = torch.zeros(64), 4 // (dtype.primitive_bitwidth // 8)
    with simulated_gpu(compiles=False):
        narrower_kernel[(2,)](x, dtype, 32 * parts, LANES=1, BLOCK=32)  # in its own elements
        assert x[32] != 1
        with pytest.raises(KernelFault, match=r"narrower_kernel: store to X\[31\] by program 1 at .* 0 has written"):
            narrower_kernel[(2,)](x, dtype, 32 * parts - 1, LANES=1, BLOCK=32)
        with pytest.raises(KernelFault, match=r"store to X\[0\] by program 0 at .* several lanes of one store"):
            narrower_kernel[(2,)](x, dtype, 32 * parts, LANES=2, BLOCK=32)


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


@triton.jit
def strided_kernel(X, Y, n, s, BLOCK: tl.constexpr):
    """y[i] = x.ptr[i s], as float32."""
    i = tl.arange(0, BLOCK)
    tl.store(Y + i, tl.load(X.ptr + i * s, mask=i < n, other=0.0).to(tl.float32), mask=i < n)


STALE = {
    "an int that was 1": ((0, 2, 64, torch.float32), r"strided_kernel: s is 2; the kernel was compiled for 1: start"),
    "alignment": ((1, 1, 64, torch.float32), r"X\.ptr is 0x\w+4; the kernel was compiled for what divides by 16"),
    "dtype": ((0, 1, 64, torch.int32), r"X\.ptr is \*i32; the kernel was compiled for \*fp32"),
    "constexpr": ((0, 1, 32, torch.float32), r"BLOCK is 32; the kernel was compiled for 64"),
}


@pytest.mark.parametrize("compiles", [True, False])
@pytest.mark.parametrize("changed", STALE)
def test_a_compiled_kernel_started_with_what_it_was_not_compiled_for(changed: str, compiles: bool) -> None:
    """The interpreter would make the right thing of it, and no GPU would."""
    (first, s, block, dtype), message = STALE[changed]
    x, y = torch.arange(256.0), torch.zeros(64)
    other = Operand(torch.arange(257, dtype=dtype)[first:], ())
    with simulated_gpu(compiles=compiles):
        compiled = strided_kernel[(1,)](Operand(x, ()), y, 48, 1, BLOCK=64)
        compiled[(1, 1, 1)](Operand(x + 1, ()), y, 32, 1, 64)
        assert torch.equal(y[:48], torch.cat([x[1:33], x[32:48]]))
        with pytest.raises(KernelFault, match=message):
            compiled[(1, 1, 1)](other, y, 32, s, block)
    with simulated_gpu(compiles=compiles, check=False):
        compiled[(1, 1, 1)](other, y, 32, s, block)


def test_a_compiled_kernel_started_with_other_numbers() -> None:
    x, y = Operand(torch.arange(256.0), ()), torch.zeros(64)
    with simulated_gpu(compiles=False):
        compiled = strided_kernel[(1,)](x, y, 48, 2, BLOCK=64)
        with pytest.raises(KernelFault, match="n is 33; the kernel was compiled for what divides by 16"):
            compiled[(1, 1, 1)](x, y, 33, 2, 64)
        with pytest.raises(KernelFault, match="s is 4294967296; the kernel was compiled for i32"):
            compiled[(1, 1, 1)](x, y, 48, 2**32, 64)
        with pytest.raises(KernelFault, match=r"X\.strides is 1 parts; the kernel was compiled for 0 parts"):
            compiled[(1, 1, 1)](Operand(x.ptr, (1,)), y, 48, 2, 64)
        compiled[(1, 1, 1)](x, y, 16, 5, 64)
    assert torch.equal(y[:16], x.ptr[:80:5])


def made(factor: tl.constexpr) -> triton.JITFunction:
    @triton.jit
    def times(x):
        return x * factor

    return times


@triton.jit
def apply_kernel(X, FUNCTION: tl.constexpr):
    tl.store(X, FUNCTION(tl.load(X)))


def test_a_function_made_again_is_the_same_constant() -> None:
    """As two threads may make it at once; another one is not."""
    x, two, three = torch.ones(1), tl.constexpr(2.0), tl.constexpr(3.0)
    with simulated_gpu(compiles=False):
        compiled = apply_kernel[(1,)](x, FUNCTION=made(two))
        compiled[(1, 1, 1)](x, made(two))
        assert x == 4
        with pytest.raises(KernelFault, match="FUNCTION is JITFunction.*; the kernel was compiled for JITFunction"):
            compiled[(1, 1, 1)](x, made(three))
