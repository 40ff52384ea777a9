"""The roofline model: what bounds a kernel, and what its time follows. The figures are a model's, not a GPU's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

triton = pytest.importorskip("triton", reason="without triton there is no machine code to predict from")
import triton.language as tl  # noqa: E402

from retainops.testing import predict, sass, static_report  # noqa: E402
from retainops.testing.flow import Step, whole_tile  # noqa: E402
from retainops.testing.roofline import BANDWIDTH_EFFICIENCY, GPUS, ISSUE_EFFICIENCY, work  # noqa: E402
from retainops.testing.sass import Instruction  # noqa: E402

BLOCK = 1024
ALIGNED, RAGGED = 1 << 22, (1 << 22) - 5
H200 = GPUS["H200"]


@triton.jit
def copy_kernel(X, Y, N, BLOCK: tl.constexpr):
    """y = x, unmasked where the tile is whole."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    whole = tl.program_id(0) * BLOCK + BLOCK <= N
    if whole:
        x = tl.load(X + i)
    else:
        x = tl.load(X + i, mask=i < N, other=0.0)
    if whole:
        tl.store(Y + i, x)
    else:
        tl.store(Y + i, x, mask=i < N)


@triton.jit
def masked_copy_kernel(X, Y, N, BLOCK: tl.constexpr):
    """y = x, masked everywhere."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + i, tl.load(X + i, mask=i < N), mask=i < N)


@triton.jit
def exponentials_kernel(X, Y, TIMES: tl.constexpr, BLOCK: tl.constexpr):
    """y = exp2 of x, again and again: TIMES results of the XU an element, and a few instructions beside each."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + i)
    for _ in tl.static_range(TIMES):
        x = tl.exp2(x)
    tl.store(Y + i, x)


@triton.jit
def sin_kernel(X, Y, BLOCK: tl.constexpr):
    """y = sin x."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + i, tl.sin(tl.load(X + i)))


@triton.jit
def column_sums_kernel(X, Y, ROWS, COLUMNS: tl.constexpr):
    """Partial sums over rows: a program walks every num_programs-th row."""
    i = tl.arange(0, COLUMNS)
    y = tl.zeros((COLUMNS,), tl.float32)
    for row in range(tl.program_id(0), ROWS, tl.num_programs(0)):
        y += tl.load(X + row * COLUMNS + i)
    tl.store(Y + tl.program_id(0) * COLUMNS + i, y)


@triton.jit
def product_kernel(X, Y, Z, K, SIZE: tl.constexpr):
    """z = x y, one tile of SIZE x SIZE a program, walking K."""
    i, j = tl.program_id(0) * SIZE + tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    z = tl.zeros((SIZE, SIZE), tl.float32)
    for k in range(0, K, SIZE):
        x = tl.load(X + i * K + k + tl.arange(0, SIZE)[None, :])
        y = tl.load(Y + (k + tl.arange(0, SIZE)[:, None]) * SIZE + j)
        z = tl.dot(x, y, z)
    tl.store(Z + i * SIZE + j, z)


def pair(n: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(n, dtype=dtype), torch.empty(n, dtype=dtype)


def copy(n: int, dtype: torch.dtype = torch.float32, kernel: object = copy_kernel) -> Callable[[], object]:
    x, y = pair(n, dtype)
    return lambda: kernel[(triton.cdiv(n, BLOCK),)](x, y, n, BLOCK=BLOCK)  # type: ignore[index]


def exponentials(times: int) -> Callable[[], object]:
    x, y = pair(ALIGNED)
    return lambda: exponentials_kernel[(ALIGNED // BLOCK,)](x, y, TIMES=times, BLOCK=BLOCK)


@pytest.mark.parametrize("gpu", GPUS)
def test_a_copy_is_bound_by_memory_and_reaches_what_the_assumption_says(gpu: str) -> None:
    found = predict(copy(ALIGNED), 8 * ALIGNED, ALIGNED, gpu)
    assert (found.gpu, found.bound) == (gpu, "memory")
    assert found.bytes_per_second == pytest.approx(BANDWIDTH_EFFICIENCY * GPUS[gpu].bandwidth)
    assert found.seconds == pytest.approx(8 * ALIGNED / found.bytes_per_second)
    assert found.instructions_per_element < 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_bytes_of_the_code_are_the_bytes_stated(dtype: torch.dtype) -> None:
    stated = 2 * dtype.itemsize * ALIGNED
    (launch,) = predict(copy(ALIGNED, dtype), stated, ALIGNED).launches
    assert launch.bytes_accessed == stated
    (ragged,) = predict(copy(RAGGED, dtype), stated, RAGGED).launches
    assert ragged.bytes_accessed == stated  # the last tile counts as a whole one


def test_time_follows_bytes_and_launches() -> None:
    one, two = (predict(copy(n), 8 * n, n) for n in (ALIGNED, 2 * ALIGNED))
    assert two.seconds == pytest.approx(2 * one.seconds)
    assert two.instructions_per_element == pytest.approx(one.instructions_per_element)

    first, second = copy(ALIGNED), copy(ALIGNED)
    both = predict(lambda: (first(), second()), 16 * ALIGNED, 2 * ALIGNED)
    assert both.seconds == pytest.approx(2 * one.seconds)
    assert [t.name for t in both.launches] == ["copy_kernel", "copy_kernel"]


def test_a_ragged_length_follows_the_whole_tile_and_not_the_tail() -> None:
    aligned, ragged, masked = (
        predict(copy(n, torch.bfloat16, kernel), 4 * n, n)
        for n, kernel in ((ALIGNED, copy_kernel), (RAGGED, copy_kernel), (RAGGED, masked_copy_kernel))
    )
    assert ragged.instructions_per_element == pytest.approx(aligned.instructions_per_element, rel=0.1)
    assert masked.instructions_per_element > 2 * ragged.instructions_per_element
    # A masked element is a 16-bit access: each takes the load/store units as long as 32 bits do.
    assert masked.launches[0].parts["lsu"] == pytest.approx(2 * ragged.launches[0].parts["lsu"], rel=0.01)


def test_many_exponentials_are_not_bound_by_memory() -> None:
    few, many = (predict(exponentials(times), 8 * ALIGNED, ALIGNED) for times in (1, 64))
    assert few.bound == "memory"
    assert many.bound in ("xu", "issue")
    assert many.seconds > 3 * few.seconds
    assert many.launches[0].parts["xu"] == pytest.approx(64 * ALIGNED / (16 * H200.sms * H200.clock))


def test_the_issue_slots_are_those_of_four_schedulers() -> None:
    found = predict(copy(ALIGNED), 8 * ALIGNED, ALIGNED)
    executed = found.instructions_per_element * ALIGNED
    expected = executed / (128 * ISSUE_EFFICIENCY * H200.sms * H200.clock)
    assert found.launches[0].parts["issue"] == pytest.approx(expected)


def test_a_launch_smaller_than_the_gpu_has_its_programs_only() -> None:
    few, full = (predict(copy(k * BLOCK), 8 * k * BLOCK, k * BLOCK) for k in (33, 132))
    assert few.launches[0].parts["issue"] == pytest.approx(full.launches[0].parts["issue"])


def test_the_slow_path_of_sin_costs_more() -> None:
    x, y = pair(ALIGNED)

    def call() -> None:
        sin_kernel[(ALIGNED // BLOCK,)](x, y, BLOCK=BLOCK)

    fast, slow = (predict(call, 8 * ALIGNED, ALIGNED, slow=slow) for slow in (False, True))
    assert fast.bound == "memory"
    assert slow.seconds > fast.seconds
    (report,) = static_report(call)
    steps = whole_tile(sass.parse(report.sass), slow=True)
    words = 6  # of the table of 2/pi, one a trip
    assert slow.instructions_per_element == sum(words if s.loop == "table" else 1 for s in steps) / (BLOCK // 128)
    assert slow.instructions_per_element > 3 * fast.instructions_per_element


PIPES = {
    "FFMA.FTZ": {"fp32": 1},
    "HFMA2.MMA": {"half": 1},
    "IMAD.WIDE.U32": {"imad": 1},
    "DMUL": {"fp64": 1},
    "MUFU.EX2": {"xu": 1},
    "F2I.FTZ.NTZ": {"xu": 1},
    "I2FP.F32.S32": {"alu": 1},
    "LOP3.LUT": {"alu": 1},
    "LDG.E.U16": {"lsu": 1},
    "STG.E.128": {"lsu": 4},
    "SHFL.BFLY": {"lsu": 1},
    "HMMA.16816.F32.BF16": {"tensor": 16 * 8 * 16 / 32},
    "HMMA.1688.F32.TF32": {"tensor": 2 * 16 * 8 * 8 / 32},
    "HGMMA.64x128x16.F32.BF16": {"tensor": 64 * 128 * 16 / 128},
    "UIADD3": {},
    "BRA.U": {},
    "NOP": {},
}


@pytest.mark.parametrize(("opcode", "pipes"), PIPES.items(), ids=PIPES)
def test_each_instruction_goes_to_its_pipe(opcode: str, pipes: dict[str, float]) -> None:
    step = Step(Instruction(0, "", opcode, "", ""))
    assert work([step], trips=1) == {"issue": 1, **pipes}
    assert work([dataclasses.replace(step, active=False)], trips=1) == {"issue": 1}
    looped = work([dataclasses.replace(step, loop="memory"), dataclasses.replace(step, loop="other")], trips=9)
    assert looped == {"issue": 10, **{pipe: 10 * n for pipe, n in pipes.items()}}


@pytest.mark.parametrize("programs", [132, 528])
def test_a_loop_over_rows_runs_as_often_as_its_bytes_take(programs: int) -> None:
    rows, columns = 1 << 14, 1024
    x, y = torch.empty(rows, columns), torch.empty(programs, columns)
    moved = x.nbytes + y.nbytes
    found = predict(lambda: column_sums_kernel[(programs,)](x, y, rows, COLUMNS=columns), moved, x.numel())
    assert found.bound == "memory"
    assert found.launches[0].bytes_accessed == pytest.approx(moved)
    # 8 elements a thread: 2 loads, 8 additions, and a row's share of addressing and branching.
    assert 1.2 < found.instructions_per_element < 4
    assert found.launches[0].parts["fp32"] == pytest.approx(x.numel() / (128 * H200.sms * H200.clock), rel=0.05)


@pytest.mark.parametrize("gpu", ["A100", "H200"])
def test_a_matrix_product_with_its_trips_stated_is_bound_by_tensor_cores(gpu: str) -> None:
    size, tiles, k = 128, 512, 1024
    x, y, z = (torch.empty(m, n, dtype=torch.bfloat16) for m, n in ((tiles * size, k), (k, size), (tiles * size, size)))
    found = predict(
        lambda: product_kernel[(tiles,)](x, y, z, k, SIZE=size, num_warps=8),
        bytes_moved=y.nbytes + z.nbytes,
        elements=z.numel(),
        gpu=gpu,
        trips=k / size,
    )
    peak = GPUS[gpu].lanes["tensor"] * GPUS[gpu].sms * GPUS[gpu].clock
    assert found.bound == "tensor"
    assert found.launches[0].parts["tensor"] == pytest.approx(z.numel() * k / peak, rel=0.05)


def test_the_text_says_that_it_is_a_prediction() -> None:
    text = str(predict(copy(ALIGNED), 8 * ALIGNED, ALIGNED))
    assert text.startswith("predicted by a model, not measured, for one H200: ")
    assert "TB/s, bound by memory" in text


@pytest.mark.parametrize("name", GPUS)
def test_the_table_agrees_with_the_datasheets(name: str) -> None:
    gpu = GPUS[name]
    fp32 = gpu.sms * gpu.lanes["fp32"] * 2 * gpu.clock
    assert fp32 == pytest.approx({"A100": 19.5e12, "H100": 67e12, "H200": 67e12}[name], rel=0.01)


def test_refusals_say_what_to_do() -> None:
    call = copy(BLOCK)
    with pytest.raises(ValueError, match="unknown GPU 'V100'; expected one of A100, H100, H200"):
        predict(call, 1, 1, gpu="V100")
    with pytest.raises(ValueError, match="NVIDIA's machine code only"):
        predict(call, 1, 1, target="gfx942")
    with pytest.raises(ValueError, match="both must be positive"):
        predict(call, 0, 1)
    with pytest.raises(ValueError, match="launched no kernel"):
        predict(lambda: None, 1, 1)
