"""Targets of cross_entropy, in range and out of it; and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import retainops as ro
from retainops.ops.cross_entropy import cross_entropy
from tests.conftest import Path
from tests.cross_entropy_cases import drawn, targets, with_gradient


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_targets_of_any_integer_dtype(path: Path, dtype: torch.dtype) -> None:
    x, t = drawn(4, 6, device=path.device), targets(6, 4, device=path.device)
    expected = with_gradient(F.cross_entropy, x, t, ignore_index=2)
    torch.testing.assert_close(with_gradient(cross_entropy, x, t.to(dtype), ignore_index=2), expected)


@pytest.mark.parametrize("index", [2**62, -(2**63), 2**24 + 1])
def test_ignore_index_is_any_integer(path: Path, index: int) -> None:
    x, t = drawn(4, 6, device=path.device), targets(6, 4, device=path.device)
    t[1] = index
    expected = with_gradient(F.cross_entropy, x, torch.where(t == index, -100, t))
    torch.testing.assert_close(with_gradient(cross_entropy, x, t, ignore_index=index), expected)


OUT_OF_RANGE = [6, -1, -99, 2**31, 2**40, -(2**62)]


@pytest.mark.parametrize("wrong", OUT_OF_RANGE)
def test_targets_out_of_range_are_an_error_on_the_host(wrong: int) -> None:
    x, t = drawn(4, 6), targets(6, 4)
    t[1] = wrong
    with pytest.raises(IndexError, match=rf"cross_entropy: Target {wrong} is out of bounds: 1 of 4 .* 6 classes"):
        cross_entropy(x, t)


@pytest.mark.parametrize("wrong", OUT_OF_RANGE)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.1}], ids=["plain", "smoothed"])
def test_targets_out_of_range_are_nan_on_a_gpu(kernels: Path, wrong: int, options: dict) -> None:
    """Nobody waits for the GPU to look; and nothing is read out of bounds, which the simulated GPU would report."""
    x, t = drawn(4, 6, device=kernels.device), targets(6, 4, device=kernels.device)
    right = with_gradient(cross_entropy, x, t, reduction="none", **options)
    weight = torch.ones(6, device=kernels.device)
    t[1] = wrong
    for w in (None, weight):
        y, dx = with_gradient(cross_entropy, x, t, w, reduction="none", **options)
        assert y[1].isnan()
        assert dx[1].isnan().all()
        others = torch.tensor([0, 2, 3], device=kernels.device)
        assert torch.equal(y[others], right[0][others])
        assert torch.equal(dx[others], right[1][others])
        assert cross_entropy(x, t, w, **options).isnan()


def test_targets_are_checked_on_a_gpu_where_asked(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, t = drawn(4, 6, device=kernels.device), targets(6, 4, device=kernels.device)
    t[1] = 9
    monkeypatch.setenv("RETAINOPS_CHECK_TARGETS", "1")
    with pytest.raises(IndexError, match="Target 9 is out of bounds"):
        cross_entropy(x, t)
    assert cross_entropy(x, t, ignore_index=9).isfinite()


# Refusals.

X, T = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
REFUSED = [
    (([1.0], T), {}, TypeError, "logits is list; expected a torch.Tensor"),
    ((X.long(), T), {}, TypeError, r"logits is torch.int64; expected a floating-point dtype, as of logits.float\(\)"),
    ((torch.zeros(()), T[0]), {}, RuntimeError, r"logits has shape \(\); expected \(..., V\)"),
    ((X[:, :0], T), {}, RuntimeError, r"logits has shape \(3, 0\); expected \(..., V\), V classes, V above 0"),
    ((X, 1), {}, TypeError, "target is int; expected a torch.Tensor of class indices"),
    ((X, T.float()), {}, TypeError, r"target is torch.float32; expected class indices.*class probabilities"),
    ((X, T.bool()), {}, TypeError, "target is torch.bool; expected class indices"),
    ((X, T[:2]), {}, RuntimeError, r"target has shape \(2,\); expected \(3,\), since logits has shape \(3, 4\)"),
    ((X[None], T[None, :, None]), {}, RuntimeError, r"target has shape \(1, 3, 1\).*classes are the last dim"),
    ((X, T.to("meta")), {}, RuntimeError, r"target is on meta; expected cpu: move it with .to\(device\)"),
    ((X, T), {"weight": [1.0]}, TypeError, "weight is list; expected a torch.Tensor"),
    ((X, T), {"weight": T}, TypeError, "weight is torch.int64; expected a floating-point dtype"),
    (
        (X, T),
        {"weight": X[0, :3]},
        RuntimeError,
        r"weight has shape \(3,\); expected \(4,\), since there are 4 classes",
    ),
    ((X, T), {"weight": X[0].clone().requires_grad_()}, RuntimeError, r"not differentiable .* pass weight.detach\(\)"),
    ((X, T), {"ignore_index": 1.5}, TypeError, "ignore_index is float; expected an integer, such as -100"),
    ((X, T), {"ignore_index": True}, TypeError, "ignore_index is bool"),
    (
        (X, T),
        {"ignore_index": 2**63},
        ValueError,
        "ignore_index is 9223372036854775808; expected .* int64",
    ),
    ((X, T), {"reduction": "average"}, ValueError, "reduction is 'average'; expected one of none, mean, sum"),
    ((X, T), {"label_smoothing": 1.1}, ValueError, "label_smoothing is 1.1; expected a number between 0 and 1"),
    ((X, T), {"label_smoothing": -0.1}, ValueError, "label_smoothing is -0.1"),
    ((X, T), {"label_smoothing": "0.1"}, TypeError, "label_smoothing is str; expected a number between 0 and 1"),
    ((X, T), {"label_smoothing": float("nan")}, ValueError, "label_smoothing is nan"),
    ((X, T), {"z_loss": -1e-4}, ValueError, "z_loss is -0.0001; expected a number of 0 or above"),
    ((X, T), {"softcap": 0.0}, ValueError, "softcap is 0.0; expected a number above 0, such as 30.0, or None"),
    ((X, T), {"softcap": -30}, ValueError, "softcap is -30; expected a number above 0"),
    ((X, T), {"softcap": torch.ones(())}, TypeError, "softcap is Tensor; expected a number above 0"),
    ((X, T), {"retain": "p"}, TypeError, "retain is str; expected retainops.Retained"),
    ((X, T), {"retain": ro.Retained("q")}, KeyError, "unknown point 'q'; its points are: logits, p"),
    ((X, T), {"retain": ro.Retained("p")}, RuntimeError, "can't retain_grad on point 'p'"),
]


@pytest.mark.parametrize(("inputs", "options", "error", "says"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_refusals_say_what_was_expected(inputs: tuple, options: dict, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=f"cross_entropy: {says}"):
        cross_entropy(*inputs, **options)
