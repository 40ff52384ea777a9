"""softmax and log_softmax: definition, widths, masks, layouts, rows that are special, errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import retainops as ro
from retainops.ops.softmax import LOG_SOFTMAX, SOFTMAX, log_softmax, softmax
from retainops.registry import Op
from retainops.testing import check_op
from tests.conftest import GPU, Path
from tests.oracle import DTYPES, all_points, assert_near, eager, random_like
from tests.softmax_cases import EAGER, OPS, boolean, compare, cut_rows, drawn, in_rows_and_chunks, over_ops

# The definition is PyTorch's.


@over_ops
@pytest.mark.parametrize("mask", [None, "boolean", "floating"])
@pytest.mark.parametrize("causal", [False, True])
def test_the_definition_in_pytorchs_words(op: Op, mask: str | None, causal: bool, path: Path) -> None:
    x = drawn(2, 3, 5, 7, device=path.device)
    given = {None: None, "boolean": boolean(2, 1, 5, 7, device=path.device)}.get(mask, drawn(3, 1, 7, seed=4).detach())
    given = given if given is None else given.to(path.device)
    s = x * 0.5
    if given is not None:
        s = s.masked_fill(~given, -torch.inf) if given.dtype == torch.bool else s + given
    if causal:
        s = s.masked_fill(~torch.ones(5, 7, dtype=torch.bool, device=path.device).tril(), -torch.inf)
    want = EAGER[op.name](s, -1)
    y = op.call(x, 0.5, given, causal)
    assert_near(y, want)
    dy = random_like(y)
    ours, theirs = (torch.autograd.grad(z, x, dy) for z in (y, want))
    assert_near(*ours, *theirs, 2)


def test_masks_are_those_of_attention(path: Path) -> None:
    q, k, v = (torch.randn(2, 3, 5, 8, device=path.device) for _ in "qkv")
    for mask, causal in ((None, True), (boolean(2, 1, 5, 5, device=path.device), False)):
        p = softmax(q @ k.mT, 8**-0.5, mask, causal)
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        assert_near(p @ v, want, 4)


# Widths, dtypes and accuracy.


@over_ops
@pytest.mark.parametrize("width", [1, 2, 63, 64, 65, 1000, 8191, 16384])
def test_widths(op: Op, width: int, kernels: Path) -> None:
    compare(op, drawn(3, width, device=kernels.device), 0.5, None, False)


@pytest.mark.parametrize(("op", "width"), [(SOFTMAX, 65536), (LOG_SOFTMAX, 65536), (SOFTMAX, 262144)])
def test_rows_wider_than_registers(op: Op, width: int, kernels: Path) -> None:
    x = drawn(2 if width == 65536 else 1, width, device=kernels.device)
    x.detach().sub_(512)  # exp of it is 0: the maximum has to be that of what takes part
    mask = torch.ones(x.shape, dtype=torch.bool, device=kernels.device)
    mask[0, : width // 2] = False  # whole chunks of which nothing takes part, at the beginning
    mask[1:, 5000:] = False  # and at the end
    compare(op, x, 0.5, mask, False, scale=2)


@over_ops
@pytest.mark.parametrize(
    ("width", "dtype"),
    [*((150, dtype) for dtype in DTYPES), (9000, torch.float64), (20000, torch.bfloat16), (20000, torch.float32)],
    ids=str,
)
def test_error_is_no_larger_than_eagers(op: Op, width: int, dtype: torch.dtype, kernels: Path) -> None:
    x = drawn(6 if width == 150 else 1, width, dtype=dtype, device=kernels.device)
    report = check_op(op.call, x, 0.7, None, False)
    assert report.ok, report


@over_ops
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((1, 1, 40), torch.bfloat16), ((6, 1), torch.float32), ((2, 6, 40), torch.float64)],
    ids=str,
)
def test_error_with_a_mask_that_is_added(op: Op, shape: tuple, dtype: torch.dtype, kernels: Path) -> None:
    x = drawn(4, 2, 6, 40, dtype=dtype, device=kernels.device)
    report = check_op(op.call, x, 0.7, drawn(*shape, dtype=dtype, device=kernels.device, seed=4), False)
    assert report.ok, report


def test_huge_and_tiny_values(path: Path) -> None:
    x = torch.tensor([[1e30, 1e30, -1e30], [3e38, -3e38, 0.0], [1e-40, 0.0, -1e-40]], device=path.device)
    for op in OPS:
        compare(op, x.clone().requires_grad_(), 1.0, None, False)
        compare(op, x.clone().requires_grad_(), 20.0, None, False)


@pytest.mark.parametrize("scale", [0.0, -1.5, 1, float("inf"), float("nan")])
def test_any_number_as_scale(scale: float, path: Path) -> None:
    for op in OPS:
        compare(op, drawn(3, 20, device=path.device), scale, None, False)


def test_a_scale_that_is_a_tensor_takes_the_reference(path: Path) -> None:
    x, scale = drawn(3, 20, device=path.device), torch.tensor(0.5, device=path.device, requires_grad=True)
    for op in OPS:
        compare(op, x, scale, None, False)
    assert "scale is a tensor" in ro.explain(SOFTMAX, x, scale) or path.name == "reference"


# Masks.


@over_ops
@pytest.mark.parametrize(
    ("shape", "causal"),
    [((4, 2, 6, 40), True), ((4, 1, 6, 40), False), ((4, 1, 1, 40), True), ((1, 2, 6, 1), False), ((), True)],
    ids=str,
)
def test_boolean_masks_of_any_shape(op: Op, shape: tuple, causal: bool, kernels: Path) -> None:
    x = drawn(4, 2, 6, 40, device=kernels.device)
    mask = boolean(*shape, device=kernels.device) if shape else torch.tensor(True, device=kernels.device)
    compare(op, x, 0.5, mask, causal)


@over_ops
@pytest.mark.parametrize(
    ("shape", "causal"), [((3, 2, 6, 20), True), ((3, 1, 6, 20), False), ((1, 1, 1, 20), True)], ids=str
)
def test_gradients_of_masks_that_are_added(op: Op, shape: tuple, causal: bool, kernels: Path) -> None:
    x, mask = drawn(3, 2, 6, 20, device=kernels.device), drawn(*shape, device=kernels.device, seed=4)
    compare(op, x, 0.5, mask, causal, scale=4)
    compare(op, x.detach(), 0.5, mask, causal, scale=4)
    compare(op, x, 0.5, mask.detach(), causal)


def test_an_added_mask_widens_the_dtype_as_in_eager(path: Path) -> None:
    x, mask = drawn(3, 8, dtype=torch.bfloat16, device=path.device), drawn(8, device=path.device, seed=4)
    compare(SOFTMAX, x, 0.5, mask, False)
    assert softmax(x, 0.5, mask).dtype == torch.float32


@over_ops
@pytest.mark.parametrize("queries", [1, 3, 9])
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_causal_counts_queries_from_the_top_left(op: Op, queries: int, layout: str, path: Path) -> None:
    x = drawn(2, queries, 3, 6, device=path.device).detach().transpose(1, 2)
    x = (x.contiguous() if layout == "contiguous" else x).requires_grad_()
    compare(op, x, 0.5, None, True)
    seen = softmax(x, causal=True) != 0
    assert torch.equal(seen[0, 0], torch.ones(queries, 6, dtype=torch.bool, device=path.device).tril())


@over_ops
def test_a_mask_is_not_copied(op: Op, kernels: Path) -> None:
    x, mask = drawn(64, 8, device=kernels.device), boolean(8, device=kernels.device)
    y = op.call(x, 0.5, mask.expand(64, 8))
    saved = [t for t in y.grad_fn.saved_tensors if t is not None and t.dtype == torch.bool]
    assert [t.untyped_storage().data_ptr() for t in saved] == [mask.untyped_storage().data_ptr()]


# Rows that are special.


@over_ops
@in_rows_and_chunks
@pytest.mark.parametrize("how", ["boolean", "added", "-inf"])
def test_rows_of_which_nothing_takes_part(
    op: Op, how: str, cut: str, kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN, as in eager; and as in eager the gradient is 0 where a boolean mask stands in front of the NaN."""
    cut_rows(cut, monkeypatch)
    width = 40
    x, mask = drawn(2, width, device=kernels.device), None
    if how == "boolean":
        mask = torch.tensor([[True], [False]], device=kernels.device).expand(2, width)
    elif how == "added":
        mask = torch.tensor([[0.0], [-torch.inf]], device=kernels.device)
    else:
        with torch.no_grad():
            x[1] = -torch.inf
    compare(op, x, 0.5, mask, False)
    y = op.call(x, 0.5, mask)
    assert y[1].isnan().all()
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert dx[1].eq(0).all() if how == "boolean" else dx[1].isnan().all()


@over_ops
@in_rows_and_chunks
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.25])
def test_rows_with_or_of_one_value(
    op: Op, value: float, cut: str, kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_rows(cut, monkeypatch)
    width = 40
    x = drawn(3, width, device=kernels.device)
    with torch.no_grad():
        x[0, 3] = x[1, -1] = value
        x[2] = value
    dy = random_like(x)
    compare(op, x, 0.5, None, False, dy=dy)
    dy[0, 5] = value
    compare(op, x, 0.5, boolean(3, width, device=kernels.device), False, dy=dy)


# Layouts and sizes.


@over_ops
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.mT,
        lambda x: x[::2, ::3],
        lambda x: x[3:, 5:],
        lambda x: x[:, :1].expand(40, 60),
        lambda x: x[:1].expand(40, 60),
        lambda x: x.view(8, 5, 60).transpose(0, 1),
        lambda x: x.view(8, 5, 6, 10).permute(3, 1, 0, 2),
    ],
    ids=["transposed", "stepped", "offset", "one column", "one row", "batches swapped", "permuted"],
)
def test_inputs_of_any_layout(op: Op, view: Callable, kernels: Path) -> None:
    x = view(drawn(40, 60, device=kernels.device).detach()).requires_grad_()
    compare(op, x, 0.5, None, False)
    kept = ro.Retained(scaled=ro.Stats("abs_sum", "amax", over="rows", grad=True))
    y = op.call(x, 0.5, retain=kept)
    y.backward(random_like(y))
    assert_near(kept.scaled.abs_sum, kept.scaled.grad.abs().sum(-1), 4)
    assert_near(kept.scaled.amax, kept.scaled.grad.abs().amax(-1))


@over_ops
@pytest.mark.parametrize("how", ["one element", "one column", "one row", "transposed"])
def test_gradients_of_any_layout(op: Op, how: str, kernels: Path) -> None:
    """As `sum().backward()` makes them, with strides of 0, and others."""
    x = drawn(7, 150, device=kernels.device)
    one = random_like(x)
    dy = {
        "one element": one[0, 0].expand(7, 150),
        "one column": one[:, :1].expand(7, 150),
        "one row": one[:1].expand(7, 150),
        "transposed": one.mT.contiguous().mT,
    }[how]
    report = check_op(op.call, x, 0.5, None, False, dy=dy)  # all of dx may cancel: what is left is rounding
    assert report.ok, report


@over_ops
@pytest.mark.parametrize("shape", [(), (5,), (0, 5), (5, 0), (2, 0, 3), (0,), (1, 1)], ids=str)
def test_few_dims_and_no_elements(op: Op, shape: tuple, path: Path) -> None:
    compare(op, drawn(*shape, device=path.device), 0.5, None, False)
    if len(shape) > 1:
        compare(op, drawn(*shape, device=path.device), 0.5, drawn(shape[-1], device=path.device), True)


@pytest.mark.skipif(GPU, reason="runs only the last program, which a GPU cannot")
@over_ops
def test_offsets_beyond_two_to_the_31st(op: Op) -> None:
    """Of the last rows alone, in memory that has addresses and no pages."""
    from retainops.testing import simulated_gpu

    rows = 2**31 // 64 + 8
    x, dy = (drawn(1, 64, dtype=torch.bfloat16, seed=seed).detach() for seed in (3, 4))
    kept, many = all_points(op), x.expand(rows, 64).requires_grad_()
    with simulated_gpu(programs=[-1], check=False):
        y = op.call(many, retain=kept)
        (dx, *points) = torch.autograd.grad(y, [many, *(slot.tensor for slot in kept.values())], dy.expand(rows, 64))
    theirs = x.clone().requires_grad_()
    want, values = eager(op, [theirs, 1.0, None, False])
    want.backward(dy)
    assert_near(y[-1:], want)
    assert_near(dx[-1:], theirs.grad, 2)
    for ours, value in zip(points, values.values(), strict=True):
        assert_near(ours[-1:], value.grad, 2)


@pytest.mark.skipif(GPU, reason="takes memory that has addresses and no pages")
def test_strides_beyond_two_to_the_31st() -> None:
    from retainops.testing import simulated_gpu

    x = drawn(9, 64, dtype=torch.bfloat16).detach()
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16).as_strided(x.shape, (2**28, 1)).copy_(x)
    with simulated_gpu(check=False):
        assert torch.equal(softmax(far), softmax(x))


# What is refused, and in which words.

X = torch.ones(3, 4)


@over_ops
@pytest.mark.parametrize(
    ("inputs", "error", "words"),
    [
        (([1.0],), TypeError, "x is list; expected a torch.Tensor"),
        ((X.long(),), TypeError, r"x is torch.int64; expected a floating-point tensor: convert it with .float\(\)"),
        ((X.to(torch.complex64),), TypeError, "x is torch.complex64; expected a floating-point tensor"),
        ((X, "1"), TypeError, "scale is str; expected a number"),
        ((X, -1), TypeError, "scale is the integer -1, as if it were a dim.*takes no dim.*write -1.0"),
        ((X, torch.ones(3)), RuntimeError, r"scale is a tensor of shape \(3,\).*no dims; multiply x by others"),
        ((X, 1.0, True), TypeError, "mask is bool; expected a torch.Tensor or None"),
        ((X, 1.0, X.long()), TypeError, r"mask is torch.int64; expected torch.bool \(True: takes part\).*\.bool\(\)"),
        (
            (X, 1.0, torch.ones(2, 4)),
            RuntimeError,
            r"mask has shape \(2, 4\), and x has \(3, 4\); expected.*broadcasts",
        ),
        ((X, 1.0, torch.ones(2, 3, 4)), RuntimeError, r"mask has shape \(2, 3, 4\), and x has \(3, 4\)"),
        ((X, 1.0, X.to("meta")), RuntimeError, r"mask is on meta and x on cpu; move one of them with .to\(device\)"),
        ((X, 1.0, None, 1), TypeError, "causal is int; expected True or False"),
        (
            (X[0], 1.0, None, True),
            RuntimeError,
            r"causal=True, and x has shape \(4,\); expected \(..., queries, keys\)",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors(op: Op, inputs: tuple, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"^{op.name}: {words}"):
        op.call(*inputs)


def test_an_unknown_point_and_one_that_no_gradient_reaches() -> None:
    x = X.clone().requires_grad_()
    with pytest.raises(KeyError, match="log_softmax: unknown point 'p'; its points are: scaled"):
        log_softmax(x, retain=ro.Retained("p"))
    with pytest.raises(RuntimeError, match="softmax: can't retain_grad on point 'p'"):
        softmax(X, retain=ro.Retained("p"))
