"""check_op: right ops pass, and every planted fault is reported, each by the check that is there for it."""

from __future__ import annotations

import pytest
import torch

import retainops as ro
from retainops.points import reader
from retainops.testing.check import Report, check_layouts, check_op
from retainops.testing.simulated import simulated_gpu

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


class Faulty(torch.autograd.Function):
    """y = sin(c), c = a * b, with one fault."""

    @staticmethod
    def forward(ctx, a, b, c, fault):
        ctx.save_for_backward(a, b)
        ctx.fault = fault
        y = torch.sin(a * b)
        if fault == "output of other strides":
            return y.mT.contiguous().mT
        if fault == "output in the wrong dtype":
            return y.double()
        if fault == "an input is written to":
            b.add_(1)
        return y

    @staticmethod
    def backward(ctx, dy):
        a, b = ctx.saved_tensors
        needs_c, fault = ctx.needs_input_grad[2], ctx.fault
        dc = dy * torch.cos(a * b)
        da, db = dc * b, (dc * a).sum_to_size(b.shape)
        if fault == "sign of da":
            da = -da
        elif fault == "no da":
            da = None
        elif fault == "db off by a thousandth":
            db = db * 1.001
        elif fault == "db in bfloat16":
            db = db.bfloat16().to(db.dtype)
        elif fault == "one NaN in da":
            da[0, 0] = torch.nan
        elif fault == "da changes in its last bit when retained" and needs_c:
            da = torch.nextafter(da, torch.full_like(da, torch.inf))
        elif fault == "gradient changes from run to run":
            db = db + torch.rand_like(db) * 1e-7
        elif fault == "dc doubled":
            dc = dc * 2
        elif fault == "one element of dc missing":
            dc[-1, -1] = 0
        return da, db, dc if needs_c else None, None


def faulty(fault):
    def op(a, b, *, retain=None):
        c = None
        if retain is not None and fault != "dc never filled":
            c = retain["c"].bind("faulty", torch.broadcast_shapes(a.shape, b.shape), a.dtype, a.device)
        return Faulty.apply(a, b, c, fault)

    return op


def mul_sin_reference(a, b, point):
    c = point("c", a * b)
    return torch.sin(c)


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in ((19, 33), (33,))]


def problems(report: Report) -> dict[str, str]:
    found = {row.name: "; ".join(row.problems) for row in report.rows if row.problems}
    return found | ({"op": "; ".join(report.problems)} if report.problems else {})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_right_op_passes(dtype):
    report = check_op(faulty(None), *inputs(dtype), reference=mul_sin_reference)
    assert report.ok, report
    assert [(row.name, row.kind) for row in report.rows] == [
        ("y", "output"),
        ("da", "input"),
        ("db", "input"),
        ("dc", "point"),
    ]
    assert report.bitwise


@pytest.mark.parametrize(
    ("fault", "where", "said"),
    [
        ("output of other strides", "y", "strides (1, 19); eager's are (33, 1)"),
        ("output in the wrong dtype", "y", "torch.float64; eager's is torch.float32"),
        ("an input is written to", "op", "an input or dy was written to"),
        ("sign of da", "da", "is above the bar"),
        ("no da", "da", "None; eager has a gradient"),
        ("db off by a thousandth", "db", "is above the bar"),
        ("db in bfloat16", "db", "is above the bar"),
        ("one NaN in da", "da", "1 elements are NaN"),
        ("da changes in its last bit when retained", "op", "other bits without retention: da"),
        ("gradient changes from run to run", "op", "other bits in a second run: db"),
        ("dc doubled", "dc", "is above the bar"),
        ("one element of dc missing", "dc", "is above the bar"),
        ("dc never filled", "dc", "None; eager has a gradient"),
    ],
)
def test_a_planted_fault_is_reported(fault, where, said):
    report = check_op(faulty(fault), *inputs(), reference=mul_sin_reference)
    assert not report.ok
    assert said in problems(report)[where]
    assert "FAILED" in str(report)
    assert said in str(report)


@pytest.mark.parametrize("fault", ["dc doubled", "one element of dc missing", "dc never filled"])
def test_a_fault_in_one_quantity_is_blamed_on_no_other(fault):
    assert list(problems(check_op(faulty(fault), *inputs(), reference=mul_sin_reference))) == ["dc"]


def test_a_point_gradient_in_the_wrong_dtype_is_reported():
    def op(a, b, *, retain=None):
        c = None if retain is None else retain["c"].bind("op", torch.Size((19, 33)), torch.float64, a.device)
        return Faulty.apply(a, b, c, None)

    assert problems(check_op(op, *inputs(), reference=mul_sin_reference)) == {
        "dc": "torch.float64; eager's is torch.float32"
    }


def test_a_rounded_interior_is_reported():
    """Half precision inside a float32 op: what a kernel does that forgets to convert its loads."""

    def op(a, b):
        return torch.sin((a * b).half().float())

    assert "y" in problems(check_op(op, *inputs(), retain=(), reference=mul_sin_reference))


def test_retaining_one_point_alone_may_not_change_another():
    def reference(a, b, point):
        return point("s", torch.sin(point("c", a * b)))

    def op(a, b, *, retain=None):
        alone = retain is not None and list(retain) == ["s"]
        return reference(a * (1 + 1e-6) if alone else a, b, reader("op", retain or {}))

    report = check_op(op, *inputs(), reference=reference)
    assert "other bits with only s retained: y" in problems(report)["op"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mul_sin_passes_in_every_layout(dtype):
    a, b = (torch.randn(9, 21, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in range(2))
    for name, laid_out in check_layouts(a, b).items():
        report = check_op(ro.mul_sin, *laid_out)
        assert report.ok, f"{name}: {report}"


@pytest.mark.parametrize("layout", ["contiguous", "row 1", "outer", "0 elements", "0 dims"])
def test_the_kernels_pass_on_a_simulated_gpu(layout):
    a, b = (torch.randn(5, 7, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    with simulated_gpu() as launches:
        report = check_op(ro.mul_sin, *check_layouts(a, b)[layout])
    assert report.ok, report
    assert bool(launches) == (layout != "0 elements")


def test_nan_and_infinity_are_right_where_eager_has_them():
    a, b = torch.tensor([1.0, torch.inf, torch.nan, 2.0]), torch.tensor([1.0, 1.0, 1.0, torch.inf])
    assert check_op(ro.mul_sin, a, b).ok
    # In float16 eager's c overflows: an op that holds it in float32 is finite, as the oracle is.
    a = torch.full((4,), 3e4, dtype=torch.float16)

    def wide(a, b):
        return torch.sin(a.float() * b).to(a.dtype)

    assert check_op(wide, a, 4.0, retain=(), reference=mul_sin_reference).ok


def test_a_finite_value_where_eager_has_nan_is_reported():
    def op(a, b):
        return torch.sin(a * b).nan_to_num()

    a = torch.tensor([1.0, torch.nan])
    report = check_op(op, a, 1.0, retain=(), reference=mul_sin_reference)
    assert "1 elements are NaN, infinite or finite where eager's are not" in problems(report)["y"]


def saturating(x, point):
    """Its derivative is 1 - tanh(x)^2 as PyTorch computes it, of which nothing is right for large x."""
    return 1e6 * torch.nn.functional.gelu(point("c", x * 1.0), approximate="tanh")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_right_op_passes_where_a_derivative_cancels(dtype):
    """In float64 that happens further out than in float32, by whose error float64's could be judged else."""

    def op(x):
        z = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return 1e6 * 0.5 * x * (1 + torch.tanh(z))

    x = torch.linspace(-8, 8, 999, dtype=torch.float64).to(dtype)
    if dtype in (torch.float32, torch.float64):
        report = check_op(op, x, retain=(), reference=saturating)
        assert report.ok, report
    assert check_op(lambda x: saturating(x, lambda _, c: c), x, retain=(), reference=saturating).ok
    report = check_op(lambda x: op(x.detach()) + x * 1e-3, x, retain=(), reference=saturating)
    assert "is above the bar" in problems(report)["dx"]


@pytest.mark.parametrize("ulps", [8, -8])
def test_a_few_units_in_the_last_place_are_seen_in_float64(ulps):
    def op(a, b):
        return torch.sin(a * b) * (1 + ulps * torch.finfo(torch.float64).eps)

    assert (
        "is above the bar"
        in problems(check_op(op, *inputs(torch.float64), retain=(), reference=mul_sin_reference))["y"]
    )


def test_only_inputs_that_require_grad_are_differentiated():
    a, b = inputs()
    report = check_op(ro.mul_sin, a, b.requires_grad_())
    assert [row.name for row in report.rows] == ["y", "db", "dc"]
    assert b.grad is None  # the caller's tensors are left alone


def test_an_expanded_dy_and_numbers_are_taken():
    a, _ = inputs()
    assert check_op("mul_sin", a, 30.0, dy=torch.ones(()).expand(19, 33)).ok
    assert "b=30.0" in str(check_op("mul_sin", a, 30.0))


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda a, b: check_op("mul_cosh", a, b), KeyError, "is not an op of retainops"),
        (lambda a, b: check_op(ro.mul_sin, a, b, retain=("d",)), ValueError, "has no point 'd'; it has: c"),
        (lambda a, b: check_op(ro.mul_sin, a, b, dy=b), ValueError, "expected the output's, (19, 33)"),
        (lambda a, b: check_op(ro.mul_sin, a.long(), b.long()), TypeError, "no input of mul_sin is a floating-point"),
        (lambda a, b: check_op("f", a, b, reference=mul_sin_reference), TypeError, "op is str; expected a function"),
        (lambda a, b: check_op(lambda *_, retain: 1, a, b, reference=mul_sin_reference), TypeError, "returned int"),
        (lambda a, b: check_op(ro.mul_sin, a, b[:5]), RuntimeError, "must match"),
    ],
    ids=["unknown op", "unknown point", "dy of another shape", "integers", "a name", "no tensor", "eager refuses"],
)
def test_mistakes_are_named(call, error, said):
    with pytest.raises(error, match=r".") as raised:
        call(*inputs())
    assert said in str(raised.value)


def test_layouts_are_what_they_say():
    a, b = torch.randn(4, 6), torch.randn(4, 6)
    layouts = check_layouts(a, b, 2.0)
    for name in ("contiguous", "transposed", "stepped", "offset", "mixed"):
        assert all(torch.equal(x, y) for x, y in zip(layouts[name], (a, b), strict=False)), name
    strides = {name: tuple(x.stride() for x in laid_out[:2]) for name, laid_out in layouts.items()}
    assert strides["transposed"] == ((1, 4), (1, 4))
    assert strides["stepped"] == ((12, 2), (12, 2))
    assert strides["mixed"] == ((1, 4), (12, 2))
    assert strides["expanded"] == ((0, 1), (0, 1))
    assert layouts["offset"][0].data_ptr() % 16 == 4
    shapes = {name: tuple(tuple(x.shape) for x in laid_out[:2]) for name, laid_out in layouts.items()}
    assert shapes["row 0"] == ((6,), (4, 6))
    assert shapes["column 1"] == ((4, 6), (4, 1))
    assert shapes["scalar 0"] == ((), (4, 6))
    assert shapes["outer"] == ((4, 1), (6,))
    assert shapes["0 elements"] == ((0, 6), (0, 6))
    assert shapes["0 dims"] == ((), ())
    assert all(laid_out[2] == 2.0 for laid_out in layouts.values())
