"""A call that comes again and again is a replay: it gives the same bits, and nothing that was meant for another."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import retainops as ro
from retainops.arrivals import in_backward_order
from retainops.ops.pointwise import FAMILY
from retainops.registry import find, ops
from tests.conftest import HAS_TRITON, Path, random_leaves
from tests.oracle import all_points, assert_near, leaves, random_like, sample, several

if not HAS_TRITON:
    pytest.skip("triton is not installed: nothing is launched", allow_module_level=True)

from retainops.ops import _launch, _replay

OF_ONE_HOST = {*FAMILY} - {"mul_sin", "add_sin", "sub_sin", "div_sin"}
"""Ops f(a o b): those of one operation differ in their kernels alone."""
REPLAYED = [
    op.name
    for op in ops()
    if op.kind != "attention" and op.name != "linear_cross_entropy" and op.name not in OF_ONE_HOST
]
ASKED = ("nothing", "gradients", "statistics", "both")


@pytest.fixture(autouse=True)
def replays(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The calls that were replayed, of which each test must have some. The second of a kind is noted here."""
    monkeypatch.setattr(_replay, "PLAIN", 1)
    found: list[str] = []
    noted = _replay.Notes.replay

    def replay(self: Any, results: Any) -> Any:
        function = noted(self, results)
        name = self.source(results)
        return function and (lambda *given: found.append(name) or function(*given))

    monkeypatch.setattr(_replay.Notes, "replay", replay)
    yield found
    assert found


def shape_of(name: str) -> tuple[int, ...]:
    return {"group_norm": (2, 4, 6), "rope": (2, 3, 5, 8)}.get(name, (5, 40))


def run(name: str, device: str, asked: str, seed: int) -> list[torch.Tensor]:
    """Outputs, gradients and what was asked for, of an op at random inputs."""
    op, inputs = find(name), sample(name, device, shape=shape_of(name), seed=seed)
    kept = None if asked == "nothing" else all_points(op)
    if asked == "statistics":
        kept = ro.Retained(**{p.name: ro.Stats("l2", "amax") for p in op.points})
    if asked == "both":
        kept = ro.Retained(op.points[0].name, **{p.name: ro.Stats("l2") for p in op.points[1:]})
    outputs = several(op.call(*inputs, retain=kept) if kept else op.call(*inputs))
    torch.autograd.backward(outputs, [random_like(y, seed) for y in outputs])
    found = [] if kept is None else [t for of in kept.to_dict().values() for t in of.values()]
    if kept is not None:
        places = [in_backward_order(kept).index(name) for name in kept]
        found.append(torch.tensor(places, device=device))
    return [t for t in (*outputs, *(x.grad for x in leaves(inputs)), *found) if t is not None]


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("name", REPLAYED)
def test_bits_are_those_of_a_call_that_is_none(name: str, asked: str, kernels: Path, replays: list[str]) -> None:
    if name == "bias_dropout_add":
        torch.manual_seed(0)  # its sample brings a seed; nothing else is drawn
    for seed in range(3):
        run(name, kernels.device, asked, seed)
    again = run(name, kernels.device, asked, 7)
    assert len(replays) == 4, "forward and backward, twice"
    assert _replay.NEVER not in _replay._known.values()
    _launch.forget()
    for ours, plain in zip(again, run(name, kernels.device, asked, 7), strict=True):
        assert torch.equal(ours.nan_to_num(9), plain.nan_to_num(9))
        assert ours.stride() == plain.stride()


def mul_sin(a: torch.Tensor, b: Any, dy: torch.Tensor | None = None, kept: ro.Retained | None = None) -> None:
    """mul_sin and its gradients are eager's."""
    a, b = (x.detach().requires_grad_() if isinstance(x, torch.Tensor) else x for x in (a, b))
    dy = torch.ones_like(a) if dy is None else dy
    y = ro.mul_sin(a, b, retain=kept)
    y.backward(dy)
    assert_near(y.detach(), torch.sin(a * b).detach())
    assert_near(a.grad, (dy * torch.cos(a * b) * b).detach())


def test_one_tensor_in_two_places_is_two_the_next_time(kernels: Path) -> None:
    rand = random_leaves(kernels.device)
    for _ in range(3):
        x = rand(6, 8, requires_grad=False).requires_grad_()
        ro.mul_sin(x, x).sum().backward()
        assert_near(x.grad, (2 * x * torch.cos(x * x)).detach())
    mul_sin(rand(6, 8), rand(6, 8))
    mul_sin(rand(6, 8), rand(6, 8), dy=rand(6, 8, requires_grad=False))


def test_numbers_are_not_those_of_the_call_before(kernels: Path) -> None:
    x = random_leaves(kernels.device)(6, 8)
    for number in (2.0, 2.0, 2.0, 2, 2, 2, 1.0, 1.0, 1.0, True, 1, -3.5):
        mul_sin(x, number)
    for zero in (0.0, 0.0, 0.0, -0.0, -0.0, -0.0):
        assert torch.equal(ro.mul_sin(x, zero), torch.sin(x * zero))
        assert torch.equal(torch.signbit(ro.mul_sin(x, zero)), torch.signbit(torch.sin(x * zero)))


def test_layouts_and_alignment_are_told_apart(kernels: Path) -> None:
    rand = random_leaves(kernels.device)
    flat = rand(100, requires_grad=False)
    for first in (0, 0, 0, 1, 1, 1, 4, 2):
        mul_sin(flat[first : first + 48].view(6, 8), rand(6, 8))
    for _ in range(3):
        mul_sin(rand(8, 6).t(), rand(6, 8))
        mul_sin(rand(6, 8), rand(6, 8), dy=rand(8, 6, requires_grad=False).t())
        mul_sin(rand(6, 8), rand(1, 8))


def test_what_is_saved_may_come_back_in_another_layout(kernels: Path) -> None:
    """As from `torch.autograd.graph.saved_tensors_hooks`, which may bring anything of equal values."""
    rand = random_leaves(kernels.device)
    for _ in range(3):
        mul_sin(rand(6, 8), rand(6, 8))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.t().contiguous().t()):
        for _ in range(3):
            mul_sin(rand(6, 8), rand(6, 8))


def test_statistics_add_up_and_are_each_requests_own(kernels: Path) -> None:
    rand = random_leaves(kernels.device)
    once, all_of_them = [], ro.Retained(c=ro.Stats("l2", "sum"))
    for _ in range(5):
        a, b = rand(6, 8), rand(6, 8)
        mul_sin(a, b, kept=(kept := ro.Retained(c=ro.Stats("l2", "sum"))))
        mul_sin(a, b, kept=all_of_them)
        once.append(kept.c)
        assert_near(kept.c.sum, torch.cos(a * b).sum().detach())
    assert_near(all_of_them.c.sum, sum(slot.sum for slot in once))
    assert_near(all_of_them.c.l2, torch.stack([slot.l2 for slot in once]).norm())


def test_gradients_add_up_over_replays(kernels: Path) -> None:
    rand = random_leaves(kernels.device)
    kept, total = ro.Retained("c"), torch.zeros(6, 8, device=kernels.device)
    for _ in range(4):
        a, b = rand(6, 8), rand(6, 8)
        mul_sin(a, b, kept=kept)
        total += torch.cos(a * b).detach()
    assert_near(kept.c.grad, total)


def test_one_slot_for_two_points_takes_both(kernels: Path) -> None:
    rand = random_leaves(kernels.device)
    slot = ro.Retained(act=ro.Stats("sum"))["act"]
    for _ in range(4):
        x = rand(6, 8)
        own = ro.Retained(s=ro.Stats("sum"), t=ro.Stats("sum"))
        ro.mish(x, retain=own).sum().backward()
        slot.reset()
        ro.mish(x, retain=ro.Retained.of({"s": slot, "t": slot})).sum().backward()
        assert_near(slot.sum, own.s.sum + own.t.sum)


def test_a_buffer_of_the_callers_is_written_each_time(kernels: Path) -> None:
    rand = random_leaves(kernels.device)
    for _ in range(4):
        a, b, buffer = rand(6, 8), rand(6, 8), torch.zeros(6, 8, device=kernels.device)
        mul_sin(a, b, kept=ro.Retained(c=ro.Into(buffer)))
        assert_near(buffer, torch.cos(a * b).detach())
        mul_sin(a, b, kept=ro.Retained("c"))


def test_the_order_of_backward_is_known_of_replays(kernels: Path) -> None:
    rand = random_leaves(kernels.device)
    for _ in range(4):
        first, second = ro.Retained("c"), ro.Retained("c")
        y = ro.mul_sin(ro.mul_sin(rand(6, 8), rand(6, 8), retain=first), rand(6, 8), retain=second)
        y.sum().backward()
        assert second.c._arrival.number < first.c._arrival.number


def test_points_that_nothing_reaches_do_not_arrive(kernels: Path) -> None:
    rand = random_leaves(kernels.device)
    tables = [rand(5, 8, requires_grad=False) for _ in "cs"]
    for _ in range(4):
        kept = ro.Retained("q_rot", "k_rot")
        q_rot, _ = ro.rope(rand(2, 3, 5, 8), rand(2, 3, 5, 8), *tables, retain=kept)
        q_rot.sum().backward()
        assert in_backward_order(kept) == ["q_rot"]
        kept = ro.Retained("xhat", summed=ro.Stats("sum"))
        ro.add_rms_norm(rand(6, 8), rand(6, 8), rand(8), retain=kept)[1].sum().backward()
        assert in_backward_order(kept) == ["summed"]
    mul_sin(rand(6, 8), rand(6, 8))
    mul_sin(rand(6, 8), rand(6, 8))
    mul_sin(rand(6, 8), rand(6, 8))


def test_a_number_that_is_none_is_remembered_once(kernels: Path) -> None:
    x = random_leaves(kernels.device)(6, 8, requires_grad=False)
    for _ in range(4):
        assert ro.mul_sin(x, float("nan")).isnan().all()
    assert len(_replay._known) == 1


def test_some_calls_go_by_before_one_is_noted(
    kernels: Path, monkeypatch: pytest.MonkeyPatch, replays: list[str]
) -> None:
    monkeypatch.setattr(_replay, "PLAIN", 3)
    x = random_leaves(kernels.device)(6, 8, requires_grad=False)
    for n in range(1, 7):
        ro.mul_sin(x, x)
        assert len(replays) == max(0, n - 4)


def test_more_calls_than_are_remembered(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_replay, "MOST", 4)
    rand = random_leaves(kernels.device)
    for n in (3, 3, 3, 5, 7, 9, 3, 3, 3):
        mul_sin(rand(n, 4), rand(n, 4))
        assert len(_replay._known) <= 4


def noted(do: Callable[..., Any], *given: Any) -> tuple[Any, str]:
    """(what is replayed of do(*given), or NEVER; its lines)."""
    notes = _replay.Notes(given, {})
    with torch.no_grad():
        results = notes.take(do)
    return notes.replay(results), notes.source(results)


def test_what_is_done_to_tensors_is_done_again(replays: list[str]) -> None:
    def do(x: torch.Tensor, y: torch.Tensor) -> tuple[Any, ...]:
        first, second = x.chunk(2, dim=-1)
        total = torch.zeros(3, dtype=torch.float64)
        total += x.sum(-1, dtype=torch.float64)
        torch.empty(1000)  # which nobody uses
        return second[1:].t(), total.to(torch.float32), [y, None], x.view(torch.int32), first.clone().mul_(y)

    replay, source = noted(do, torch.randn(3, 4), torch.randn(()))
    assert "1000" not in source
    x, y = torch.randn(5, 4)[1:4], torch.randn(())  # at another offset in its memory
    for ours, plain in zip(replay({}, {}, x, y), do(x, y), strict=True):
        if isinstance(plain, list):
            assert ours[0] is y
            assert ours[1] is None
        else:
            assert torch.equal(ours, plain)
            assert ours.stride() == plain.stride()


CANNOT = {
    "a value is read": lambda x: x * x.sum().item(),
    "a tensor from elsewhere": lambda x, other=torch.ones(3): x + other,  # noqa: B008
    "several results": lambda x: x.max(0),
    "gradients are taken": lambda x: torch.enable_grad()(lambda: x.detach().requires_grad_() * 2)(),
}


@pytest.mark.parametrize("do", CANNOT.values(), ids=CANNOT)
def test_what_cannot_be_noted_is_never_replayed(do: Callable[..., Any], replays: list[str]) -> None:
    replay, _ = noted(do, torch.randn(3))
    assert replay is None
    replays.append("none was wanted")


def test_the_lines_are_few(kernels: Path, replays: list[str]) -> None:
    """Of a forward: memory for y and rstd, and one launch; no views, nothing twice."""
    x, weight = (random_leaves(kernels.device)(*size, requires_grad=False) for size in ((6, 8), (8,)))
    for _ in range(3):
        ro.rms_norm(x, weight)
    (source,) = replays
    lines = inspect.cleandoc(source).splitlines()
    assert [line.count("empty_strided(") for line in lines] == [0, 1, 1, 0, 0]
    assert len(lines) == 5
