"""Both cross entropies: what can be asked of them, inputs of any layout, torch.func, compiled code, modules."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import pytest
import torch

import retainops as ro
from retainops.nn.loss import CrossEntropyLoss, LinearCrossEntropyLoss
from retainops.points import unretained
from retainops.registry import Op
from retainops.stats import STATISTICS
from tests.class_loss_cases import CLASSES, OPS, TARGET, WIDTH, compare, inputs_of, over_losses, over_reductions
from tests.conftest import GPU, Path
from tests.oracle import all_points, assert_near, clones, eager, leaves

pytestmark = over_losses


@pytest.mark.parametrize("over", ["tensor", "rows", "channels"])
def test_statistics_are_those_of_the_full_gradient(path: Path, name: str, over: str) -> None:
    op, names = OPS[name], [s for s in STATISTICS if s != "hist" or over == "tensor"]
    full, kept = all_points(op), ro.Retained(**{p.name: ro.Stats(*names, over=over) for p in op.points})
    theirs = inputs_of(name, path.device)
    _, values = eager(op, theirs)
    for request in (full, kept):
        for _ in range(2):  # they merge over calls
            op.call(*inputs_of(name, path.device), retain=request).sum().backward()
    for point in kept:
        g = full[point].grad / 2
        dims = {"tensor": (0, 1, 2), "rows": (2,), "channels": (0, 1)}[over]
        both = {"l2": g.square().sum(dims).mul(2).sqrt(), "sum": 2 * g.sum(dims), "abs_sum": 2 * g.abs().sum(dims)}
        both |= {"amax": g.abs().amax(dims), "mean": g.mean(dims), "act_grad": 2 * (g * values[point]).sum(dims)}
        for stat, want in both.items():
            torch.testing.assert_close(getattr(kept[point], stat), want, rtol=1e-4, atol=1e-4, msg=f"{point} {stat}")
        assert not kept[point].nonfinite.any()
        if over == "tensor":
            assert kept[point].hist.sum() == 2 * g.numel()
        assert kept[point].grad is None


@pytest.mark.parametrize("layout", ["dense", "rows apart", "transposed"])
def test_into_buffers(path: Path, name: str, layout: str) -> None:
    op, ours = OPS[name], inputs_of(name, path.device)
    theirs, shape = clones(ours), (2, 3, CLASSES)
    buffer = torch.zeros(shape, device=path.device)
    if layout == "rows apart":
        buffer = torch.zeros(2, 5, 2 * CLASSES, device=path.device)[:, ::2, :CLASSES]
    if layout == "transposed":
        buffer = torch.zeros(3, 2, CLASSES, device=path.device).transpose(0, 1)
    kept = ro.Retained(logits=ro.Into(buffer, accumulate=True))
    for _ in range(2):
        op.call(*ours, retain=kept).sum().backward()
    want, values = eager(op, theirs)
    want.sum().backward()
    assert kept.logits.grad is buffer
    assert_near(buffer, 2 * values["logits"].grad, 4)


@pytest.mark.parametrize("layout", ["transposed", "stepped", "offset", "expanded", "int32 targets"])
def test_inputs_of_any_layout(path: Path, name: str, layout: str) -> None:
    op, given = OPS[name], inputs_of(name, path.device, reduction="mean")

    def change(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or (x.is_floating_point() and layout == "int32 targets"):
            return x
        if layout == "int32 targets":
            return x.int()
        x = x.detach()
        if layout == "transposed":
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        if layout == "stepped":
            return x.repeat_interleave(2, -1)[..., ::2]
        if layout == "offset":
            return torch.cat([x.flatten()[:3], x.flatten()])[3:].view(x.shape)
        return x if x.shape == (CLASSES, WIDTH) else x[:1].expand(x.shape)  # equal logits: gradients of rounding alone

    def leaf(x: Any, like: Any) -> Any:
        return x.requires_grad_(like.requires_grad) if isinstance(x, torch.Tensor) else x

    ours = [leaf(change(x), x) for x in given]
    theirs = [leaf(x.detach().contiguous().clone() if isinstance(x, torch.Tensor) else x, x) for x in ours]
    kept = all_points(op)
    op.call(*ours, retain=kept).backward()
    want, values = eager(op, theirs)
    want.backward()
    compare(op, ours, theirs, kept, values)


@over_reductions
def test_meta_tensors_and_torch_func(path: Path, name: str, reduction: str) -> None:
    op = OPS[name]
    assert op.call(*inputs_of(name, "meta", reduction=reduction)).shape == ((2, 3) if reduction == "none" else ())
    x, *rest = inputs_of(name, path.device, reduction=reduction)
    rest = [r.detach() if isinstance(r, torch.Tensor) else r for r in rest]
    for transform in (
        lambda f: torch.func.grad(lambda x: f(x).sum()),
        lambda f: lambda x: torch.func.jvp(f, (x,), (x,))[1],
        torch.func.jacrev,
    ):
        ours, theirs = (
            transform(f)(x.detach())
            for f in (lambda x: op.call(x, *rest), lambda x: op.reference(x, *rest, unretained))
        )
        torch.testing.assert_close(ours, theirs)


EVERY = tuple(stat for stat in STATISTICS if stat != "hist")  # a rounding can change a bin


def compiled_as_in_eager(op: Op, *wants: str | None, dynamic: bool = False, rows: tuple = ((2, 3),)) -> None:
    torch._dynamo.reset()
    device = "cuda" if GPU else "cpu"

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=dynamic)
    def step(x: torch.Tensor, *rest: Any, kept: ro.Retained | None) -> torch.Tensor:
        return op.call(x * 2, *rest, retain=kept) + 1

    def asked(want: str | None) -> ro.Retained | None:
        if want is None or want == "grad":
            return None if want is None else all_points(op)
        return ro.Retained(**{p.name: ro.Stats(*EVERY, over=want, grad=want == "channels") for p in op.points})

    for shape, want in itertools.product(rows, wants):
        ours, theirs = (inputs_of(op.name, device, rows=shape, reduction="mean") for _ in "ab")
        kept, expected = asked(want), asked(want)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the compiler says of the machine is not ours
            y = step(*ours, kept=kept)
        y.backward()
        like = op.call(theirs[0] * 2, *theirs[1:], retain=expected) + 1
        like.backward()
        assert_near(y, like, 4)
        for a, b in zip(leaves(ours), leaves(theirs), strict=True):
            assert_near(a.grad, b.grad, 8)
        for point in kept or ():
            if want == "rows":
                assert kept[point].grad is None
            else:
                assert_near(kept[point].grad, expected[point].grad, 8)
            for stat in EVERY if want != "grad" else ():
                both = getattr(kept[point], stat), getattr(expected[point], stat)
                torch.testing.assert_close(*both, rtol=1e-4, atol=1e-4)


def test_compiled_with_retention(name: str) -> None:
    compiled_as_in_eager(OPS[name], None, "grad", "rows")


def test_compiled_with_dynamic_shapes(name: str) -> None:
    compiled_as_in_eager(OPS[name], "channels", dynamic=True, rows=((2, 3), (4, 2)))


@pytest.mark.parametrize("shape", [(3, 2), (1, 3), (6,)], ids=str)
def test_compiled_code_refuses_targets_of_another_shape(name: str, shape: tuple[int, ...]) -> None:
    """There gather would take fewer rows than there are, and reshape would take them in another order."""
    inputs = inputs_of(name, "cpu")
    inputs[TARGET[name]] = inputs[TARGET[name]].reshape(-1)[: math.prod(shape)].view(shape)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match=rf"{name}: target has shape .*; expected \(2, 3\)"):
        torch.compile(OPS[name].call, backend="eager")(*inputs)


def test_targets_out_of_range_are_nan_where_nobody_looks(name: str) -> None:
    """On a GPU the kernels have them so: tests/test_cross_entropy_targets.py and tests/test_linear_cross_entropy.py."""
    x, *others = inputs_of(name, "cpu")
    others[TARGET[name] - 1][0, 2] = CLASSES
    torch._dynamo.reset()
    compiled = torch.compile(OPS[name].call, fullgraph=True, backend="eager")
    (dx,) = torch.autograd.grad(compiled(x, *others)[0, 1:].sum(), x)  # of a row that is ignored, and the wrong one
    by_func = torch.func.grad(lambda x: OPS[name].call(x, *others)[0, 1:].sum())(x.detach())
    for found in (dx, by_func):
        assert found[0, 2].isnan().all()
        assert torch.equal(found[0, :2], torch.zeros_like(found[0, :2]))


def test_nobody_waits_for_the_gpu(kernels: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def waits(*_: Any) -> None:
        raise AssertionError("a value was read on the host")

    inputs = inputs_of(name, kernels.device, reduction="mean")
    kept = ro.Retained(**{p.name: ro.Stats("l2", "mean", grad=True) for p in OPS[name].points})
    with monkeypatch.context() as m:
        for method in ("item", "__bool__", "__int__", "__float__", "__index__", "tolist", "nonzero"):
            m.setattr(torch.Tensor, method, waits)
        OPS[name].call(*inputs, retain=kept).backward()
    assert all(x.grad.isfinite().all() for x in leaves(inputs))


def test_modules(path: Path, name: str) -> None:
    given = inputs_of(name, path.device, reduction="mean")
    names = ("ignore_index", "reduction", "label_smoothing", "z_loss", "softcap")
    if name == "cross_entropy":
        x, target, weight, *others = given
        module = CrossEntropyLoss(weight, **dict(zip(names, others, strict=True)))
        theirs = torch.nn.CrossEntropyLoss(weight)
    else:
        x, w, target, bias, weight, *others, chunk = given
        like = {"bias": True, "weight": weight, "device": path.device}
        module = LinearCrossEntropyLoss(WIDTH, CLASSES, chunk=chunk, **like, **dict(zip(names, others, strict=True)))
        if hasattr(torch.nn, "LinearCrossEntropyLoss"):  # new in torch 2.13
            like_torchs = torch.nn.LinearCrossEntropyLoss(WIDTH, CLASSES, **like)
            assert list(module.state_dict()) == list(like_torchs.state_dict())
            module.load_state_dict(like_torchs.state_dict())
        theirs = torch.nn.Module()
        theirs.linear = torch.nn.Linear(WIDTH, CLASSES, device=path.device)
        theirs.register_buffer("weight", weight)
        with torch.no_grad():
            theirs.linear.weight.copy_(w)
            theirs.linear.bias.copy_(bias)
    module.load_state_dict(theirs.state_dict())
    expected, values = eager(OPS[name], clones(given))
    with ro.retain(module, "*") as kept:
        y = module(x, target)
    assert_near(y, expected, 4)
    y.backward()
    expected.backward()
    for point, value in values.items():
        assert_near(kept[point].grad, value.grad, 4)
    assert "label_smoothing=0.1" in repr(module)
    with ro.retain(module, "*"):
        module(x.detach(), target)  # no gradient at x: no error, nothing kept of it
