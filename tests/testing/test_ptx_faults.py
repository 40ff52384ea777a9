"""What the PTX emulator refuses, and that errors planted in compiled code show."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from retainops.testing.ptx import Emulator, PTXError  # noqa: E402
from tests.testing.ptx_kernels import (  # noqa: E402
    copy_kernel,
    dot_kernel,
    exp,
    fast_sin,
    rms_norm_kernel,
    run_all,
    sin,
    sqrt,
    unary_kernel,
)

FP32, FP64, FP16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_out_of_bounds_names_argument_thread_and_line():
    x, y = torch.randn(1000), torch.empty(1000)
    with pytest.raises(PTXError) as error:
        run_all(copy_kernel, (1,), x, y, 1024, 1, BLOCK=1024)
    for part in (
        "copy_kernel",
        "byte 4000 of X, which has 4000 bytes",
        "of CTA (0, 0, 0)",
        "ld.global",
        "ptx_kernels.py:",
    ):
        assert part in str(error.value)


def test_a_misaligned_pointer_where_alignment_was_compiled_in():
    x, y = torch.randn(1025), torch.zeros(1024)
    launch, _ = run_all(copy_kernel, (1,), x, y, 1024, 1, BLOCK=1024)
    emulator = Emulator(launch.kernel.asm["ptx"])
    emulator.launch((1,), 128, [x, y, 1024])
    with pytest.raises(PTXError, match=r"argument 0|not aligned to 16 bytes, as the kernel was compiled to assume"):
        emulator.launch((1,), 128, [x[1:], y, 1024])
    run_all(copy_kernel, (1,), x[1:], y, 1024, 1, BLOCK=1024)  # Triton compiles another kernel for it
    assert torch.equal(y, x[1:])


def test_unsupported_instructions_say_what_to_do():
    a, c = torch.randn(64, 64).to(BF16), torch.empty(64, 64)
    with pytest.raises(PTXError, match=r"unsupported instruction wgmma.*tensor cores are outside.*interpreter"):
        run_all(dot_kernel, (1,), a, a, c, M=64)


# Errors planted in compiled code: what the emulator computes depends on every instruction


@pytest.mark.parametrize(
    ("f", "before", "after"),
    [
        (sin, "0fBFC90FDA", "0f3FC90FDA"),  # the sign of pi/2 in the range reduction
        (sin, "0fB3A22168", "0f33A22168"),  # and of what its second word adds to it
        (sin, "cvt.rni", "cvt.rzi"),
        (fast_sin, "sin.approx", "cos.approx"),
        (exp, "ex2.approx", "lg2.approx"),
        (sqrt, "sqrt.approx", "rsqrt.approx"),
    ],
)
def test_a_changed_instruction_changes_the_result(f, before, after):
    x = torch.linspace(0.1, 50, 1024)
    right, wrong = torch.empty(1024), torch.empty(1024)
    launch, _ = run_all(unary_kernel, (1,), x, right, 1024, F=f, BLOCK=1024)
    text = launch.kernel.asm["ptx"]
    assert before in text
    Emulator(text.replace(before, after)).launch((1,), 128, [x, wrong, 1024])
    exact = {sin: torch.sin, fast_sin: torch.sin, exp: torch.exp, sqrt: torch.sqrt}[f](x.double())
    error, planted = (((y - exact).abs() / exact.abs().clamp(min=1)).max() for y in (right, wrong))
    assert error < 1e-5
    assert planted > 10 * error


def test_a_mask_that_lets_one_more_through_is_out_of_bounds():
    x, y = torch.randn(1001), torch.empty(1001)
    launch, _ = run_all(copy_kernel, (1,), x, y, 1001, 1, BLOCK=1024)
    text = launch.kernel.asm["ptx"]
    assert "setp.lt.s32" in text
    with pytest.raises(PTXError, match="byte 4004 of argument 0, which has 4004 bytes"):
        Emulator(text.replace("setp.lt.s32", "setp.le.s32")).launch((1,), 128, [x, y, 1001])


def test_a_reduction_that_skips_a_shuffle_is_wrong():
    x, w, y = torch.randn(1, 1000), torch.ones(1000), torch.empty(1, 1000)
    launch, _ = run_all(rms_norm_kernel, (1,), x, w, y, 1000, 1e-5, BLOCK=1024)
    text, exact = launch.kernel.asm["ptx"], x / x.square().mean().sqrt()
    torch.testing.assert_close(y, exact, rtol=1e-4, atol=1e-4)
    first = next(line for line in text.splitlines() if "shfl.sync.bfly.b32" in line)
    target, source = first.split()[1].rstrip(","), first.split()[2].rstrip(",")
    broken = text.replace(first, f"mov.b32 {target}, {source};", 1)
    Emulator(broken).launch((1,), 128, [x, w, y, 1000, 1e-5], launch.kernel.metadata.shared)
    assert (y - exact).abs().max() > 1e-3
