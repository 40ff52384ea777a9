"""Points inside torch.compile whose values leave the graph, or share memory with something: as in eager."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import retainops as ro
from retainops import delivery
from tests.conftest import GPU, random_leaves
from tests.oracle import assert_near

DEVICE = "cuda" if GPU else "cpu"
BACKENDS = ["aot_eager", "inductor"]


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def doubled(a: torch.Tensor, kept: ro.Retained) -> tuple[torch.Tensor, torch.Tensor]:
    h = a * 2
    return h, ro.point(h, "c", retain=kept)


def leaves_beside_its_base(a: torch.Tensor, kept: ro.Retained) -> tuple[torch.Tensor, ...]:
    return doubled(a, kept)


def leaves_beside_its_base_and_is_used(a: torch.Tensor, kept: ro.Retained) -> tuple[torch.Tensor, ...]:
    h, c = doubled(a, kept)
    return h, c, c.sin()


def leaves_as_a_view(a: torch.Tensor, kept: ro.Retained) -> tuple[torch.Tensor, ...]:
    return (doubled(a, kept)[1].unflatten(-1, (2, 2)).transpose(0, 1),)


def of_an_input_leaves_as_a_view(a: torch.Tensor, kept: ro.Retained) -> tuple[torch.Tensor, ...]:
    c = ro.point(a, "c", retain=kept)
    return c.t(), c.sin()


def leaves_twice(a: torch.Tensor, kept: ro.Retained) -> tuple[torch.Tensor, ...]:
    c = ro.point(a * 2, "c", retain=kept)
    return c, c.view(-1)


def both_of_rope(a: torch.Tensor, kept: ro.Retained) -> tuple[torch.Tensor, ...]:
    x, table = a.view(1, 1, 3, 4), torch.linspace(0, 1, 12, device=a.device).view(3, 4)
    q, k = ro.rope(x, x + 1, table, 1 - table, retain=ro.Retained.of({"q_rot": kept.c}))
    q.mul_(3)  # an op's output may be changed in place: PyTorch's rule for what no other gradient needs
    return q, k


FORMS = [
    leaves_beside_its_base,
    leaves_beside_its_base_and_is_used,
    leaves_as_a_view,
    of_an_input_leaves_as_a_view,
    leaves_twice,
    both_of_rope,
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
def test_a_value_that_leaves_the_graph(form: Callable, backend: str) -> None:
    found = []
    for run in (form, torch.compile(form, fullgraph=True, backend=backend)):
        a, kept = random_leaves(DEVICE)(3, 4), ro.Retained("c")
        sum(y.square().sum() for y in run(a, kept)).backward()
        found.append((a.grad, kept.c.grad))
    (da, dc), ours = found
    assert_near(ours[0], da)
    assert_near(ours[1], dc)


STRIDED = {
    "a part": lambda a: a[:, :4],
    "overlapping": lambda a: a.unfold(1, 2, 1),
    "expanded": lambda a: a[:, :1].expand(3, 5),
}


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED)
def test_a_strided_value_of_any_size(view: Callable) -> None:
    """The copy has the strides where it can: bits of what is computed from it may depend on them."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(a: torch.Tensor, kept: ro.Retained) -> tuple[torch.Tensor, torch.Tensor]:
        c = ro.point(view(a), "c", retain=kept)
        return c, c.sin()

    for n in (8, 10, 12):
        a, kept = random_leaves(DEVICE)(3, n), ro.Retained("c")
        c, y = f(a, kept)
        y.sum().backward()
        assert_near(kept.c.grad, view(a.detach()).cos())
        if view is not STRIDED["overlapping"] and view is not STRIDED["expanded"]:
            assert c.stride() == view(a).stride()


class Residual(nn.Module):
    """h + f(c), c the point of h: both are alive where the graph breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.point, self.second = nn.Linear(4, 4), ro.nn.Point(), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        c = self.point(h)
        torch._dynamo.graph_break()
        return h + self.second(c).tanh()


@pytest.mark.parametrize("want", [None, ro.Stats("l2", "act_grad")], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_residual_connection_over_a_graph_break(backend: str, want: ro.Stats | None) -> None:
    model, x = Residual().to(DEVICE), torch.randn(3, 4, device=DEVICE)
    states = []
    for run in (model, torch.compile(model, backend=backend)):
        with ro.retain(model, "point", want) as kept:
            run(x).square().sum().backward()
        states.append(kept.state())
    assert states[0].keys() == states[1].keys()
    for name, expected in states[0].items():
        torch.testing.assert_close(states[1][name], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_slots_of_equal_gradients_have_memory_of_their_own(backend: str) -> None:
    """Inductor computes what is equal once, and returns it twice; autograd then adds to it in place, once a slot."""
    model = ro.nn.RMSNorm(4).to(DEVICE)  # the weight is 1: the gradients of xhat and y are one expression
    x = random_leaves(DEVICE)(3, 4)
    with ro.retain(model) as kept, ro.retain(model) as again:
        torch.compile(model, fullgraph=True, backend=backend)(x).sin().sum().backward()
        every = [*kept.values(), *again.values()]
        assert len({slot.grad.data_ptr() for slot in every}) == len(every) == 4
        once = [slot.grad.clone() for slot in every]
        model(x).sin().sum().backward()
    for slot, grad in zip(every, once, strict=True):
        assert_near(slot.grad, 2 * grad)


def test_what_is_remembered_of_memory_is_forgotten() -> None:
    f = torch.compile(lambda a, kept: ro.point(a * 2, "c", retain=kept).sin(), fullgraph=True, backend="aot_eager")
    before, kept, grads = len(delivery._owners), ro.Retained("c"), []
    for _ in range(5):
        kept.reset()
        f(random_leaves(DEVICE)(3), kept).sum().backward()
        grads.append(kept.c.grad)  # alive, so that the next one is elsewhere
    assert len(delivery._owners) <= before + 1
    del kept
    assert len(delivery._owners) <= before


def test_a_compiled_graph_of_an_earlier_step_adds_nothing_to_this_one() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), ro.nn.Point()).to(DEVICE), torch.randn(3, 4, device=DEVICE)
    compiled, read = torch.compile(model, backend="aot_eager"), []
    with ro.watch(model, "*", ro.Stats("l2"), every=1, to=lambda step, readings: read.append(readings)) as watcher:
        late = compiled(x).square().sum()
        watcher.step()
        for graphs in ([], [late]):
            compiled(x).square().sum().backward()
            for graph in graphs:
                graph.backward()
            watcher.step()
    assert read[-1] == read[-2]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("want", [None, ro.Stats("l2", "amax", grad=True)], ids=str)
def test_anomaly_mode(want: ro.Stats | None, backend: str) -> None:
    @torch.compile(fullgraph=True, backend=backend)
    def f(a: torch.Tensor, kept: ro.Retained) -> torch.Tensor:
        return ro.point(a * 2, "c", retain=kept).sqrt()

    for value, is_nan in ((1.0, False), (-1.0, True)):
        kept = ro.Retained("c") if want is None else ro.Retained(c=want)
        a = torch.full((3,), value, device=DEVICE, requires_grad=True)
        y = f(a, kept)
        with torch.autograd.set_detect_anomaly(True):
            if is_nan:
                with pytest.raises(RuntimeError, match="returned nan values"):
                    y.sum().backward()
            else:
                y.sum().backward()
                assert_near(kept.c.grad, torch.full((3,), 8**-0.5, device=DEVICE))


def test_two_dtypes_at_one_slot_before_one_backward() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(a: torch.Tensor, kept: ro.Retained) -> torch.Tensor:
        c, d = ro.point(a * 2, "c", retain=kept), ro.point(a.bfloat16() * 2, "c", retain=kept)
        return c.sum() + d.sum()

    with pytest.raises(RuntimeError, match=r"point: .*two dtypes before one backward: torch\.\w+ and torch\.\w+"):
        f(random_leaves(DEVICE)(3), ro.Retained("c")).backward()


def test_a_slice_of_places_is_one_graph_for_all_lengths() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: ro.Retained) -> torch.Tensor:
        return ro.attention(q, k, v, is_causal=True, retain=kept)

    for n in range(4, 9):
        if n == 6:
            counters.clear()
        q, k, v = (random_leaves(DEVICE)(1, 2, n, 8) for _ in "qkv")
        kept, eager = (ro.Retained(p=ro.Part(queries=slice(2), keys=slice(1, 3))) for _ in range(2))
        f(q, k, v, kept).square().sum().backward()
        ro.attention(q, k, v, is_causal=True, retain=eager).square().sum().backward()
        assert_near(kept.p.grad, eager.p.grad, 4)
    assert not counters["stats"]["unique_graphs"]  # of lengths 6, 7 and 8: 4 is a graph, and 5 one for all others
