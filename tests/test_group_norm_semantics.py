"""group_norm where autograd, torch.compile, statistics or buffers expect something; and what it refuses."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import retainops as ro
from retainops.ops import _group_norm_tiles
from retainops.ops.group_norm import GROUP_NORM, group_norm
from retainops.points import unretained
from tests.conftest import Path
from tests.group_norm_cases import CHANNELS_LAST, drawn, inputs_of
from tests.oracle import all_points, assert_near, clones, eager, leaves, random_like


def image(path: Path, dtype: torch.dtype = torch.float32, memory_format: Any = CHANNELS_LAST) -> list[Any]:
    x = drawn(2, 6, 20, 10, dtype=dtype, device=path.device).detach()
    return inputs_of(x.contiguous(memory_format=memory_format), 3)


by_shares_and_by_tiles = pytest.mark.parametrize("memory_format", [CHANNELS_LAST, torch.contiguous_format], ids=str)


@by_shares_and_by_tiles
def test_retention_changes_no_bit_and_two_runs_are_equal(memory_format: Any, kernels: Path) -> None:
    runs = []
    stats = (ro.Retained(xhat=ro.Stats("l2", "act_grad", over=over, grad=True)) for over in ("tensor", "channels"))
    for kept in (None, None, ro.Retained("xhat"), *stats):
        ours = image(kernels, torch.bfloat16, memory_format)
        y = group_norm(*ours, retain=kept)
        runs.append([y, *torch.autograd.grad(y, leaves(ours), random_like(y))])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@by_shares_and_by_tiles
def test_backward_again_and_nothing_written_over(memory_format: Any, path: Path) -> None:
    ours, kept, seen = image(path, memory_format=memory_format), all_points(GROUP_NORM), []
    before = [(t.detach().clone(), t._version) for t in leaves(ours)]
    y = group_norm(*ours, retain=kept)
    y.register_hook(seen.append)
    dy, held = random_like(y), y.detach().clone()
    (ours[0].detach() + y).backward(dy, retain_graph=True)
    first = [t.grad.clone() for t in (*leaves(ours), kept.xhat)]
    (y + ours[0].detach()).backward(dy)
    assert all(torch.equal(t.grad, 2 * g) for t, g in zip((*leaves(ours), kept.xhat), first, strict=True))
    assert all(torch.equal(t, value) and t._version == n for t, (value, n) in zip(leaves(ours), before, strict=True))
    assert torch.equal(y, held)
    assert all(torch.equal(g, random_like(y)) for g in (dy, *seen))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


@by_shares_and_by_tiles
def test_gradients_that_nobody_needs(memory_format: Any, kernels: Path) -> None:
    for wanted in range(3):
        ours = image(kernels, memory_format=memory_format)
        theirs, kept = clones(ours), ro.Retained(xhat=ro.Stats("l2"))
        for given in (ours, theirs):
            for i, t in enumerate(leaves(given)):
                t.requires_grad_(i == wanted)
        y, want = group_norm(*ours, retain=None if wanted else kept), eager(GROUP_NORM, theirs)[0]
        y.backward(random_like(y))
        want.backward(random_like(y))
        (mine,), (eagers,) = leaves(ours), leaves(theirs)
        assert_near(mine.grad, eagers.grad, 8)
        assert (kept.xhat.l2 is None) == bool(wanted)  # of x alone has xhat a gradient


def test_first_and_second_derivatives_in_float64(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = inputs_of(drawn(1, 4, 2, dtype=torch.float64, device=kernels.device), 2)
    assert torch.autograd.gradcheck(group_norm, ours, check_batched_grad=True)
    monkeypatch.setattr(_group_norm_tiles, "SMALLEST", 1)
    assert torch.autograd.gradcheck(group_norm, ours, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(group_norm, ours)


def test_torch_func_autocast_and_meta(path: Path) -> None:
    x, groups, *weights = (t.detach() if isinstance(t, torch.Tensor) else t for t in image(path))

    def f(op: Callable) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: (op(x, groups, *weights) ** 2).sum()

    def reference(*inputs: Any) -> torch.Tensor:
        return GROUP_NORM.reference(*inputs, unretained)

    torch.testing.assert_close(torch.func.grad(f(group_norm))(x), torch.func.grad(f(reference))(x))
    tangent = torch.func.jvp(f(group_norm), (x,), (x.flip(0),))[1]
    torch.testing.assert_close(tangent, torch.func.jvp(f(reference), (x,), (x.flip(0),))[1])
    with torch.autocast(path.device, torch.bfloat16):
        assert group_norm(x.bfloat16(), groups, *weights).dtype == torch.bfloat16
    on_meta = group_norm(x.to("meta"), groups, *(t.to("meta") for t in weights[:2]))
    assert (on_meta.shape, on_meta.device.type) == (x.shape, "meta")


def test_compiled_with_retention() -> None:
    torch._dynamo.reset()
    step = torch.compile(lambda kept, *given: group_norm(*given, retain=kept), fullgraph=True, backend="aot_eager")
    ours, kept = image(Path("reference", "cpu")), all_points(GROUP_NORM)
    theirs = clones(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        y = step(kept, *ours)
        y.backward(random_like(y))
    want, values = eager(GROUP_NORM, theirs)
    want.backward(random_like(y))
    for a, b in zip([*leaves(ours), kept.xhat], [*leaves(theirs), values["xhat"]], strict=True):
        assert_near(a.grad, b.grad, 8)


@by_shares_and_by_tiles
@pytest.mark.parametrize("over", ["tensor", "rows", "channels"])
def test_statistics_are_those_of_the_gradient(over: str, memory_format: Any, kernels: Path) -> None:
    names = ("l2", "sum", "abs_sum", "amax", "mean", "nonfinite", "act_grad")
    want, found = (ro.Retained(xhat=ro.Stats(*names, over=over)) for _ in "ab")
    for kept, backend in ((want, "reference"), (found, "triton")):
        with ro.backend(backend):
            y = group_norm(*image(kernels, memory_format=memory_format), retain=kept)
        y.backward(random_like(y))
    for name in names:
        torch.testing.assert_close(getattr(found.xhat, name), getattr(want.xhat, name), rtol=1e-4, atol=1e-3)


@by_shares_and_by_tiles
@pytest.mark.parametrize("accumulate", [False, True])
def test_into_a_buffer(accumulate: bool, memory_format: Any, kernels: Path) -> None:
    buffer = torch.ones(2, 6, 20, 10, device=kernels.device)
    into, kept = ro.Retained(xhat=ro.Into(buffer, accumulate=accumulate)), ro.Retained("xhat")
    for retain in (into, kept):
        y = group_norm(*image(kernels, memory_format=memory_format), retain=retain)
        y.backward(random_like(y))
    torch.testing.assert_close(buffer, kept.xhat.grad + accumulate)


# Bad input.

X, W = torch.ones(2, 6, 4), torch.ones(6)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: group_norm([1.0], 2), TypeError, "group_norm: x is list; expected a torch.Tensor"),
        (lambda: group_norm(X, 2, 1.0), TypeError, "group_norm: weight is float; expected a torch.Tensor"),
        (lambda: group_norm(X, 2.0), TypeError, "group_norm: num_groups is float; expected an integer, such as 32"),
        (lambda: group_norm(X, 2, W, W, "1"), TypeError, "group_norm: eps is str; expected a number, such as 1e-5"),
        (lambda: group_norm(X, 2, W, W, 0.0), ValueError, "group_norm: eps is 0.0; expected a number above 0"),
        (lambda: group_norm(X.int(), 2), TypeError, r"x is torch.int32; expected a floating-point dtype: .*\.to\("),
        (lambda: group_norm(W, 2), RuntimeError, r"x has shape \(6,\); expected \(batch, channels, \.\.\.\)"),
        (
            lambda: group_norm(X, 4),
            RuntimeError,
            r"num_groups is 4, and x of shape \(2, 6, 4\) has 6 channels; .*divid",
        ),
        (lambda: group_norm(X, 0), RuntimeError, r"num_groups is 0.*expected a number that divides them"),
        (lambda: group_norm(X, 2, W[:4]), RuntimeError, r"weight has shape \(4,\); expected \(6,\), one for each chan"),
        (lambda: group_norm(X, 2, W, W.to("meta")), RuntimeError, r"bias is on meta and x on cpu; move one of them"),
        (lambda: group_norm(X, 2, retain=ro.Retained("c")), KeyError, "unknown point 'c'; its points are: xhat"),
    ],
    ids=range(12),
)
def test_errors(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
