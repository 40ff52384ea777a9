"""What is special to mul_sin: broadcasting with its sums, mixed dtypes, the tiles at their edges, huge tensors."""

from __future__ import annotations

import pytest
import torch

import retainops as ro
from tests.conftest import GPU, Path, random_leaves
from tests.oracle import assert_near

COMPILES = False  # the whole way to machine code, as on a GPU

BROADCASTS = {
    "row": ((300, 70), (70,)),
    "row of a ragged width": ((70, 1025), (1025,)),
    "column": ((70, 300), (70, 1)),
    "scalar": ((70, 300), ()),
    "one element": ((70, 300), (1, 1)),
    "leading one": ((5,), (1, 5)),
    "outer product": ((130, 1), (1, 70)),
    "middle": ((4, 5, 6), (4, 1, 6)),
    "outer and inner": ((4, 5, 6), (1, 5, 1)),
    "both sides": ((4, 1, 6), (5, 1)),
    "trailing dims": ((3, 4, 5, 6), (5, 6)),
    "five dims that do not merge": ((2, 3, 2, 3, 2), (2, 1, 2, 1, 2)),
    "column of one row": ((1, 5), (4, 1)),
}


@pytest.mark.parametrize(
    ("dtype", "swap"), [(torch.bfloat16, True), (torch.float32, False), (torch.float32, True), (torch.float64, False)]
)
@pytest.mark.parametrize("shapes", BROADCASTS.values(), ids=BROADCASTS)
def test_broadcasting(kernels: Path, shapes: tuple, dtype: torch.dtype, swap: bool) -> None:
    rand = random_leaves(kernels.device)
    a, b = (rand(*shape, dtype=dtype) for shape in (shapes[::-1] if swap else shapes))
    exact = [x.detach().double().requires_grad_() for x in (a, b)]
    kept = ro.Retained("c")
    y = ro.mul_sin(a, b, retain=kept)
    dy = rand(*y.shape, dtype=dtype, requires_grad=False)
    y.backward(dy)
    torch.sin(exact[0] * exact[1]).backward(dy.double())
    for ours, want in zip((a, b), exact, strict=True):
        assert ours.grad.shape == ours.shape
        # Each sum is held in fp32 (fp64): its error is that of its terms, and one rounding to the dtype at the end.
        terms = y.numel() // max(ours.numel(), 1)
        held = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        bound = torch.finfo(dtype).eps * want.grad.abs() + 8 * held * terms**0.5 * want.grad.abs().max() + 1e-300
        assert ((ours.grad.double() - want.grad).abs() <= bound).all()
    assert_near(
        kept.c.grad.double(),
        (torch.cos(exact[0] * exact[1]) * dy).detach(),
        1 / torch.finfo(torch.float64).eps * torch.finfo(dtype).eps,
    )


@pytest.mark.parametrize("n", [1, 2, 63, 64, 1023, 1024, 1025, 2048, 4099])
def test_lengths_at_the_edges_of_tiles(kernels: Path, n: int) -> None:
    rand = random_leaves(kernels.device)
    for shape in ((n,), (3, n), (n, 3)):
        a, b = rand(*shape), rand(*shape)
        kept = ro.Retained("c")
        ro.mul_sin(a, b, retain=kept).sum().backward()
        assert_near(kept.c.grad, torch.cos(a * b).detach())
        assert_near(a.grad, (torch.cos(a * b) * b).detach())


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float64),
    ],
    ids=str,
)
def test_mixed_dtypes_promote_as_in_eager(path: Path, left: torch.dtype, right: torch.dtype) -> None:
    rand = random_leaves(path.device)
    for shape in ((6, 5), ()):  # a 0-dim tensor does not promote one with dims
        a, b = rand(6, 5, dtype=left), rand(*shape, dtype=right)
        kept = ro.Retained("c")
        y, want = ro.mul_sin(a, b, retain=kept), torch.sin(a * b)
        assert y.dtype == want.dtype == kept.c.dtype
        y.sum().backward()
        assert (a.grad.dtype, b.grad.dtype) == (left, right)
        c = (a.double() * b.double()).detach()
        eps = torch.finfo(want.dtype).eps
        torch.testing.assert_close(y.double(), torch.sin(c), rtol=0, atol=8 * eps)
        torch.testing.assert_close(kept.c.grad.double(), torch.cos(c), rtol=0, atol=8 * eps)


@pytest.mark.parametrize("number", [2, -0.1, 30.0, True, 1e30, float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_python_numbers(path: Path, number: float, dtype: torch.dtype) -> None:
    rand = random_leaves(path.device)
    for shape in ((5, 7), ()):
        for flip in (False, True):
            a = rand(*shape, dtype=dtype)
            kept = ro.Retained("c")
            y = ro.mul_sin(number, a, retain=kept) if flip else ro.mul_sin(a, number, retain=kept)
            assert y.dtype == dtype
            y.backward(torch.ones_like(y))
            c = (a.detach().to(torch.promote_types(dtype, torch.float32)) * number).to(
                dtype if path.name == "reference" else torch.promote_types(dtype, torch.float32)
            )
            torch.testing.assert_close(
                y, torch.sin(c).to(dtype), equal_nan=True, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
            )
            torch.testing.assert_close(
                kept.c.grad,
                torch.cos(c).to(dtype),
                equal_nan=True,
                rtol=2e-2 if dtype == torch.bfloat16 else 1e-5,
                atol=1e-6,
            )
            # and the double backward knows the number too
            y = ro.mul_sin(a, number)
            (da,) = torch.autograd.grad(y.sum(), a, create_graph=True)
            da.sum().backward()


def test_output_is_laid_out_as_eagers(path: Path) -> None:
    rand = random_leaves(path.device)
    x = rand(4, 5, 6, 7, requires_grad=False)
    cases = [
        (x.to(memory_format=torch.channels_last), x),
        (x, x.to(memory_format=torch.channels_last)),
        (x.permute(3, 1, 0, 2), x.permute(3, 1, 0, 2)),
        (x[:, ::2], x[:, 1::2][:, :, :, :1]) if x.shape[1] % 2 == 0 else (x[:, ::2], x[0, ::2]),
        (x[:1].expand(4, 5, 6, 7), x[:1].expand(4, 5, 6, 7)),
        (x.transpose(0, 3), 2.0),
    ]
    for a, b in cases:
        assert ro.mul_sin(a, b).stride() == torch.sin(a * b).stride()
        torch.testing.assert_close(ro.mul_sin(a, b), torch.sin(a * b))


def test_the_same_tensor_twice(path: Path) -> None:
    a = random_leaves(path.device)(3, 50)
    kept = ro.Retained("c")
    y = ro.mul_sin(a, a, retain=kept)
    y.sum().backward()
    assert_near(a.grad, (2 * a * torch.cos(a * a)).detach(), 2)
    (da,) = torch.autograd.grad(ro.mul_sin(a, a).sum(), a, create_graph=True)
    (daa,) = torch.autograd.grad(da.sum(), a)
    assert_near(daa, (2 * torch.cos(a * a) - 4 * a * a * torch.sin(a * a)).detach(), 4)


def test_misaligned_storage(path: Path) -> None:
    base = random_leaves(path.device)(4097, requires_grad=False)
    a, b = base[1:].requires_grad_(), base[:-1].requires_grad_()
    ro.mul_sin(a, b).sum().backward()
    assert_near(a.grad, (torch.cos(a * b) * b).detach())


@pytest.mark.skipif(GPU, reason="on a GPU the next test runs the whole tensor")
def test_offsets_beyond_two_to_the_31st_by_the_last_programs(kernels: Path) -> None:
    """Address space, not memory: only the last programs run, and only what they touch is ever backed by pages."""
    from retainops.testing import simulated_gpu

    n = 2**31 + 5000
    tail = slice(n - 4500, n)
    with torch.no_grad():
        a, b = torch.empty(n, dtype=torch.float16), torch.empty(n, dtype=torch.float16)
    values = random_leaves("cpu")(4500, dtype=torch.float16, requires_grad=False)
    torch.use_deterministic_algorithms(False)  # which would fill, and so back, all of the outputs
    a[tail], b[tail] = values, values.flip(0)
    with simulated_gpu(programs=range(-4, 0)):
        y = ro.mul_sin(a, b)
    want = torch.sin(a[tail].float() * b[tail].float()).half()
    covered = 3 * 1024 + n % 1024
    assert torch.equal(y[tail][-covered:], want[-covered:])


@pytest.mark.skipif(not GPU or torch.cuda.get_device_properties(0).total_memory < 40e9, reason="needs 40 GB on a GPU")
def test_offsets_beyond_two_to_the_31st() -> None:
    n = 2**31 + 5000
    a = torch.zeros(n, dtype=torch.float16, device="cuda")
    a[-3:] = 1.5
    a.requires_grad_()
    kept = ro.Retained("c")
    y = ro.mul_sin(a, a, retain=kept)
    assert torch.equal(y[-4:].detach(), torch.sin(a[-4:].float() ** 2).half().detach())
    y.backward(torch.ones((), dtype=torch.float16, device="cuda").expand(n))
    assert torch.equal(kept.c.grad[-4:], torch.cos(a[-4:].detach().float() ** 2).half())
    assert torch.equal(kept.c.grad[:4], torch.ones(4, dtype=torch.float16, device="cuda"))


@pytest.mark.parametrize(("shape", "strides"), [((5,), ()), ((5, 3, 2), (16, 2))], ids=["inside a tile", "of tiles"])
def test_strides_beyond_two_to_the_31st(kernels: Path, shape: tuple, strides: tuple) -> None:
    """A column of a matrix with very long rows: the offsets inside one tile are large, or those of whole tiles."""
    step = 2**30
    size = 5 * step * 4  # bytes of address space
    if GPU and torch.cuda.mem_get_info()[0] < 1.1 * size:
        pytest.skip("needs 22 GB on the GPU")
    torch.use_deterministic_algorithms(False)
    a = torch.empty_strided(shape, (step, *strides), device=kernels.device)
    a.copy_(torch.arange(5.0).view(5, *[1] * len(strides)))
    assert_near(ro.mul_sin(a, 0.5), torch.sin(a * 0.5))


@pytest.mark.skipif(GPU, reason="on a GPU the machine code itself runs, in every other test")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shapes", [((1027,), (1027,)), ((70, 66), (66,)), ((5, 3, 7), (3, 1))], ids=str)
def test_the_compiled_code_itself(dtype: torch.dtype, shapes: tuple) -> None:
    """The PTX that a GPU would be given, executed: its own sin and cos, its shuffles, its addresses."""
    from retainops.testing import simulated_gpu

    rand = random_leaves("cpu")
    a, b = (rand(*shape, dtype=dtype) for shape in shapes)
    want = ro.Stats("l2", "amax", "act_grad", "nonfinite", grad=True)
    kept, simulated = ro.Retained(c=want), ro.Retained(c=want)
    with simulated_gpu(engine="ptx"):
        y = ro.mul_sin(a, b, retain=kept)
        y.sum().backward()
    grads, a.grad, b.grad = (a.grad, b.grad), None, None
    with simulated_gpu():
        z = ro.mul_sin(a, b, retain=simulated)
        z.sum().backward()
    # libdevice's sin and cos are good to 2 ulp, the interpreter's to half of one: 4 ulp of what interiors are held in,
    # which in 16 bits can move a rounding by one.
    held = 4 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    ulp = torch.finfo(dtype).eps if dtype.itemsize == 2 else 0
    pairs = [(y, z), (kept.c.grad, simulated.c.grad), (grads[0], a.grad), (grads[1], b.grad)]
    for ours, other in [*pairs, *((getattr(kept.c, n), getattr(simulated.c, n)) for n in want.names)]:
        terms = y.numel() / max(ours.numel(), 1)  # of each sum; the two differ in the order of adding too
        atol = held * max(other.abs().max().item(), 1.0) * terms**0.5
        torch.testing.assert_close(ours, other, rtol=ulp, atol=atol)
