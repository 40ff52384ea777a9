"""In what order gradients came to points, and so which was the first that was not finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import retainops as ro
from retainops.arrivals import MOST_CALLS, came_between, in_backward_order
from retainops.ops._plan import several
from retainops.registry import find, ops
from tests.conftest import Path
from tests.oracle import sample
from tests.test_integrations import Poison

SHAPES = {"attention": (1, 2, 3, 8), "group_norm": (2, 4, 6)}
IN_A_ROW = [op.name for op in ops() if len(op.points) > 1 and op.name != "rope"]
"""Of rope's points none is made of the other."""
WANTS = {
    "gradients": None,
    "statistics": ro.Stats("nonfinite"),
    "of values": ro.Stats("act_grad"),
    "both": ro.Stats("l2", grad=True),
}


@pytest.mark.parametrize("want", WANTS.values(), ids=WANTS)
@pytest.mark.parametrize("name", IN_A_ROW)
def test_the_points_of_an_op(path: Path, name: str, want: Any) -> None:
    op = find(name)
    last_first = [p.name for p in reversed(op.points)]
    for _ in range(4):  # called again, kernels are started by notes
        kept = ro.Retained(**dict.fromkeys(last_first, want)) if want else ro.Retained(*last_first)
        outputs = several(op.call(*sample(name, path.device, shape=SHAPES.get(name, (5, 8))), retain=kept))
        torch.autograd.backward([y.sum() for y in outputs])
        assert in_backward_order(kept) == last_first


@pytest.mark.parametrize("want", WANTS.values(), ids=WANTS)
def test_the_points_of_an_op_that_are_broadcast(path: Path, want: Any) -> None:
    """Their gradients are sums, which are done last."""
    x, residual = (torch.randn(shape, device=path.device, requires_grad=True) for shape in ((8,), (5, 8)))
    kept = ro.Retained(biased=want, dropped=want) if want else ro.Retained("biased", "dropped")
    ro.bias_dropout_add(x, 0.5, residual, 0.0, retain=kept).sum().backward()
    assert in_backward_order(kept) == ["dropped", "biased"]


@pytest.mark.parametrize("wants", [(None, None), ("l2", "amax"), (None, "l2"), ("l2", None)], ids=str)
def test_the_points_of_an_op_that_several_ask(path: Path, wants: tuple[str | None, str | None]) -> None:
    model, x = ro.nn.Softmax(), torch.randn(3, 4, device=path.device, requires_grad=True)
    asked = [ro.Stats(want) if want else None for want in wants]
    with ro.retain(model, "*", asked[0]) as first, ro.retain(model, "*", asked[1]) as second:
        model(x).square().sum().backward()
    assert in_backward_order(first) == in_backward_order(second) == ["p", "scaled"]
    assert not came_between(first, "p")
    assert not came_between(second, "p")


class Branch(nn.Module):
    """Backward goes through c, b and a, or past b."""

    def __init__(self, bad: str) -> None:
        super().__init__()
        self.a, self.b, self.c = (ro.nn.Point() for _ in range(3))
        self.bad = bad

    def forward(self, x: torch.Tensor, through: bool) -> torch.Tensor:
        for name in "abc" if through else "ac":
            x = getattr(self, name)(x * 1)
            if through and name == self.bad:
                x = Poison.apply(x, float("inf"))
        return x


@pytest.mark.parametrize("through", [(True, False), (False, True), (False, True, True, False)], ids=str)
@pytest.mark.parametrize(("bad", "says"), [("a", "'b'"), ("b", "'c'"), ("c", "nothing before it")])
def test_micro_batches_that_go_through_some_of_the_points(bad: str, says: str, through: tuple[bool, ...]) -> None:
    model, x = Branch(bad), torch.ones(3, requires_grad=True)
    with ro.watch(model, every=1) as watcher:
        for each in through:
            model(x, each).sum().backward()
        kept = watcher.kept
        assert in_backward_order(kept) == ["c", "b", "a"]
        assert kept.first_nonfinite() == bad
        with pytest.raises(ro.NonFiniteGradient, match=f"gradient of '{bad}' has .*; (that of )?{says}") as caught:
            watcher.step()
        assert caught.value.point == bad
        watcher.begin()
        for each in reversed(through):  # what was before a reset is no more
            model(x, each).sum().backward()
        assert in_backward_order(kept) == ["c", "b", "a"]


class Twice(nn.Module):
    """Backward comes to p, q, p and r, and goes bad right before q."""

    def __init__(self, bad: float) -> None:
        super().__init__()
        self.bad = bad
        self.p, self.q, self.r = (ro.nn.Point() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.p(Poison.apply(self.q(self.p(self.r(x) * 1) * 1), self.bad) * 1)


def test_a_point_that_a_backward_comes_to_twice() -> None:
    model, x = Twice(float("nan")), torch.ones(3, requires_grad=True)
    with ro.watch(model, every=1) as watcher:
        for _ in range(2):
            model(x).sum().backward()
        assert in_backward_order(watcher.kept) == ["p", "q", "r"]
        assert [came_between(watcher.kept, name) for name in "pqr"] == [["q"], [], []]
        with pytest.raises(ro.NonFiniteGradient) as caught:
            watcher.step()
    assert str(caught.value) == (
        "watch: step 0: the gradient of 'p' has 2 elements that are inf or nan; it got several, and between them came "
        "that of q: which had the first is not known; 1 point after it has some too"
    )


def test_micro_batches_that_all_go_the_same_way_are_no_circle() -> None:
    model, x = nn.Sequential(*(ro.nn.Point() for _ in range(4))), torch.ones(3, requires_grad=True)
    with ro.retain(model) as kept:
        for _ in range(3):
            model(x).sum().backward()
        (torch.autograd.grad(model(x).sum(), x, create_graph=True)[0].sum() + model(x).sum()).backward()
    assert in_backward_order(kept) == ["3", "2", "1", "0"]
    assert not any(came_between(kept, name) for name in kept)


class Gap(nn.Module):
    """Of a, b, x, c and d it is not known where x is, or only in part; backward goes bad right before c."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b, self.c, self.d = (ro.nn.Point() for _ in range(4))
        self.x = nn.Sequential(ro.nn.Point())
        if how == "compiled":
            self.x.compile(backend="eager", fullgraph=True)

    def forward(self, v: torch.Tensor, deep: bool) -> torch.Tensor:
        v = self.b(self.a(v * 1) * 1)
        v = checkpoint(self.x, v, use_reentrant=True) if self.how == "reentrant" else self.x(v)
        v = self.c(v * 1)
        return self.d(Poison.apply(v, torch.inf)) if deep else v


@pytest.mark.parametrize("how", ["compiled", "reentrant", "asked by another"])
def test_points_whose_place_is_not_known_everywhere(how: str, fresh_compiler: None) -> None:
    model, v = Gap(how), torch.ones(3, requires_grad=True)
    patterns = list("abcd") if how == "asked by another" else "*"
    with ro.watch(model, patterns, every=1) as watcher, ro.retain(model, "x.0"):
        for deep in (False, True):
            model(v, deep).sum().backward()
        assert in_backward_order(watcher.kept) == [name for name in ("d", "c", "x.0", "b", "a") if name in watcher.kept]
        with pytest.raises(ro.NonFiniteGradient, match="of 'c' has 1 element .*; that of 'd', .* is finite"):
            watcher.step()


def test_a_call_through_the_last_point_alone() -> None:
    """And then one that comes to p, q, p and r."""
    model, x = Twice(float("inf")), torch.ones(3, requires_grad=True)
    with ro.retain(model) as kept:
        model.r(x).sum().backward()
        model(x).sum().backward()
    assert in_backward_order(kept) == ["p", "q", "r"]


def test_more_calls_than_a_slot_knows() -> None:
    model, x = Branch("b"), torch.ones(3, requires_grad=True)
    with ro.retain(model) as kept:
        for call in range(3 * MOST_CALLS):
            model(x, call >= 2 * MOST_CALLS).sum().backward()
    assert all(len(slot._arrival.calls) <= MOST_CALLS for slot in kept.values())
    assert in_backward_order(kept) == ["c", "b", "a"]


def test_points_between_count_whether_or_not_they_tell_of_inf() -> None:
    model, x = Twice(float("nan")), torch.ones(3, requires_grad=True)
    with ro.watch(model, {"*": ro.Stats("nonfinite"), "q": ro.Stats("l2")}, every=1) as watcher:
        model(x).sum().backward()
        with pytest.raises(ro.NonFiniteGradient, match="it got several, and between them came that of q"):
            watcher.step()
