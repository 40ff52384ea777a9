"""What a request hands to others: dicts, `first_nonfinite`, TensorBoard, and a live table in the terminal."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path as File
from typing import Any

import pytest
import torch
from torch import nn

import retainops as ro
from retainops.integrations.tensorboard import log
from tests.conftest import Path, random_leaves
from tests.oracle import assert_near

pytestmark = [
    # torch.compile's own doing.
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
]

POINTS = ["0", "2", "3.c"]


def model() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(ro.nn.Point(), nn.Linear(4, 4), ro.nn.Point(), ro.nn.MulSin(2.0))


def retained(want: Any = None, device: str = "cpu") -> ro.Retained:
    net, x = model().to(device), random_leaves(device)(3, 4)
    with ro.retain(net, want if isinstance(want, dict) else {"*": want}) as kept:
        net(x).sum().backward()
    return kept


# Dicts


def test_to_dict(path: Path) -> None:
    kept = retained({"*": ro.Stats("l2", "mean"), "2": None, "3.c": ro.Stats("amax", grad=True)}, path.device)
    found = kept.to_dict()
    assert {name: list(of) for name, of in found.items()} == {
        "0": ["grad", "l2", "mean"],
        "2": ["grad"],
        "3.c": ["grad", "amax"],
    }
    assert found["0"]["grad"] is None
    assert found["2"]["grad"] is kept["2"].grad
    assert_near(found["3.c"]["amax"], kept["3.c"].grad.abs().max())
    kept.reset()
    assert kept.to_dict()["3.c"] == {"grad": None, "amax": None}


def test_state_goes_through_torch_save(tmp_path: File) -> None:
    kept = retained({"*": ro.Stats("l2", "hist"), "2": None})
    torch.save(kept.state(), tmp_path / "kept.pt")
    loaded = torch.load(tmp_path / "kept.pt", weights_only=True)
    assert list(loaded) == ["0.l2", "0.hist", "2.grad", "3.c.l2", "3.c.hist"]
    for name, t in loaded.items():
        point, what = name.rsplit(".", 1)
        assert torch.equal(t, getattr(kept[point], what))
    kept.reset()
    assert kept.state() == {}


def test_state_is_detached() -> None:
    kept, a = ro.Retained("c"), torch.ones(3, requires_grad=True)
    y = ro.mul_sin(a, a, retain=kept).sum()
    (kept.c.tensor.grad,) = torch.autograd.grad(y, kept.c.tensor, create_graph=True)
    assert kept.c.grad.requires_grad
    assert not kept.state()["c.grad"].requires_grad


# The first gradient that is not finite


class Poison(torch.autograd.Function):
    """The identity, whose backward makes one element of the gradient what it likes."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, value: float) -> torch.Tensor:
        ctx.value = value
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        where = torch.arange(grad.numel(), device=grad.device).view(grad.shape) == 0
        return torch.where(where, ctx.value, grad), None


class Chain(nn.Module):
    """Five points in a row. Registered in forward order, or not; the gradient goes bad between two of them."""

    def __init__(self, bad: float, after: int = 3, order: tuple[int, ...] = (0, 1, 2, 3, 4)) -> None:
        super().__init__()
        self.bad, self.after = bad, after
        for i in order:
            self.add_module(f"p{i}", ro.nn.MulSin(1.0) if i == 1 else ro.nn.Point())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(5):
            x = getattr(self, f"p{i}")(x) * 1.5
            if i == self.after:
                x = Poison.apply(x, self.bad)
        return x


@pytest.mark.parametrize(
    "want", [None, ro.Stats("nonfinite"), ro.Stats("nonfinite", "l2", over="rows"), "into"], ids=str
)
@pytest.mark.parametrize(("after", "bad"), [(3, float("nan")), (1, float("inf")), (0, -float("inf")), (4, 7.0)])
def test_first_nonfinite(path: Path, want: Any, after: int, bad: float) -> None:
    net, x = Chain(bad, after), random_leaves(path.device)(2, 3)
    names = list(ro.points(net))
    if want == "into":
        wants = {name: ro.Into(torch.empty(2, 3, device=path.device)) for name in names}
    else:
        wants = dict.fromkeys(names, want)
    with ro.retain(net, wants) as kept:
        net(x).sum().backward()
    assert kept.first_nonfinite() == {3: "p3", 1: "p1.c", 0: "p0", 4: None}[after]


def test_first_nonfinite_goes_by_the_order_of_backward_not_of_names(path: Path) -> None:
    net, x = Chain(float("nan"), 4, order=(3, 0, 4, 1, 2)), random_leaves(path.device)(2, 3)
    with ro.retain(net) as kept:
        net(x).sum().backward()
    assert kept.first_nonfinite() == "p4"
    assert next(iter(kept)) == "p3"


def test_first_nonfinite_through_nested_requests(path: Path) -> None:
    net, x = Chain(float("nan"), 2), random_leaves(path.device)(2, 3)
    with ro.retain(net) as outer, ro.retain(net, "p[0-2]*", ro.Stats("nonfinite")) as inner:
        net(x).sum().backward()
    assert (outer.first_nonfinite(), inner.first_nonfinite()) == ("p2", "p2")


@pytest.mark.parametrize("want", [None, ro.Stats("nonfinite")], ids=str)
def test_first_nonfinite_compiled(want: Any) -> None:
    """A compiled graph hands over its gradients in any order: the later registered counts as the earlier."""
    torch._dynamo.reset()
    net, x = Chain(float("nan"), 3), torch.ones(2, 3, requires_grad=True)
    with ro.retain(net, "*", want) as kept:
        torch.compile(net, fullgraph=True, backend="aot_eager")(x).sum().backward()
    assert kept.first_nonfinite() == "p3"
    torch._dynamo.reset()


def test_first_nonfinite_says_what_it_lacks() -> None:
    kept = ro.Retained(c=ro.Stats("l2"), d=ro.Stats("nonfinite"))
    with pytest.raises(ValueError, match=r'nothing tells of c; ask for the gradient, or for Stats\("nonfinite"\)'):
        kept.first_nonfinite()
    kept = retained(ro.Stats("nonfinite"))
    assert kept.first_nonfinite() is None
    kept.reset()
    with pytest.raises(RuntimeError, match=r"no gradient has come to any point; call backward\(\) first"):
        kept.first_nonfinite()


# TensorBoard


@pytest.fixture
def events(tmp_path: File) -> Callable[..., Any]:
    """Log by `log(writer, *args)` into a real event file and read it back."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: there is no reader to test with")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of what tensorboard imports
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from torch.utils.tensorboard import SummaryWriter

    def write_and_read(*steps: tuple[ro.Retained, int], prefix: str = "") -> Any:
        with SummaryWriter(str(tmp_path)) as writer:
            for kept, step in steps:
                log(writer, kept, step, prefix)
        return EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "histograms": 0}).Reload()

    return write_and_read


def test_tensorboard_scalars(events: Callable, path: Path) -> None:
    kept = retained({"*": ro.Stats("l2", "amax", "nonfinite"), "2": None}, path.device)
    read = events((kept, 3), (kept, 4), prefix="gradients/")
    tags = [f"gradients/{name}/{what}" for name in ("0", "3.c") for what in ("l2", "amax", "nonfinite")]
    assert sorted(read.Tags()["scalars"]) == sorted([*tags, "gradients/2/l2"])
    for tag in tags:
        _, name, what = tag.split("/")
        values = [(e.step, e.value) for e in read.Scalars(tag)]
        assert values == [(step, pytest.approx(getattr(kept[name], what).item())) for step in (3, 4)]
    assert read.Scalars("gradients/2/l2")[0].value == pytest.approx(kept["2"].grad.norm().item())


def test_tensorboard_histograms_have_the_buckets_of_powers_of_two(events: Callable) -> None:
    kept = ro.Retained(c=ro.Stats("hist"))
    x = torch.ones(10, requires_grad=True)
    grad = torch.tensor([0.0, 1.0, -1.5, 2.0, 3.9, 4.0, 0.3, 0.25, float("inf"), float("nan")])
    ro.point(x * 1, "c", retain=kept).backward(grad)
    (event,) = events((kept, 7)).Histograms("c/hist")
    histogram = event.histogram_value
    counts = {limit: n for limit, n in zip(histogram.bucket_limit, histogram.bucket, strict=True) if n}
    assert counts == {2.0**-126: 1, 0.5: 2, 2.0: 2, 4.0: 2, 8.0: 1, 2.0**129: 2}
    assert (event.step, histogram.num, histogram.min, histogram.max) == (7, 10, 0.0, 2.0**129)


def test_tensorboard_vectors(events: Callable) -> None:
    kept = retained(ro.Stats("l2", over="channels"))
    bad = ro.Retained(c=ro.Stats("sum", over="rows"))
    ro.point(torch.ones(3, 2, requires_grad=True) * 1, "c", retain=bad).backward(
        torch.tensor([[1.0], [float("nan")], [3]]).expand(3, 2)
    )
    read = events((kept, 0), (bad, 0))
    assert sorted(read.Tags()["histograms"]) == ["0/l2", "2/l2", "3.c/l2", "c/sum"]
    assert read.Tags()["scalars"] == []
    histogram = read.Histograms("2/l2")[0].histogram_value
    assert (histogram.num, histogram.max) == (4, pytest.approx(kept["2"].l2.max().item()))
    assert read.Histograms("c/sum")[0].histogram_value.num == 2  # finite values alone


def test_tensorboard_of_nothing_yet(events: Callable) -> None:
    kept = retained(ro.Stats("l2", "hist"))
    kept.reset()
    tags = events((kept, 0)).Tags()
    assert (tags["scalars"], tags["histograms"]) == ([], [])
    with pytest.raises(TypeError, match="log: kept is dict; expected retainops.Retained"):
        events((kept.to_dict(), 0))


# Live table


def live_table(terminal: bool) -> tuple[Any, io.StringIO]:
    rich_console = pytest.importorskip("rich.console", reason="rich is not installed: there is no table to draw")
    from retainops.integrations.live import LiveTable

    out = io.StringIO()
    console = rich_console.Console(file=out, force_terminal=terminal, width=100, color_system=None)
    return LiveTable(console, history=5), out


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "file"])
def test_live_table(terminal: bool) -> None:
    table, out = live_table(terminal)
    kept = ro.Retained("d", c=ro.Stats("l2", "nonfinite"))
    x = torch.ones(4, requires_grad=True)
    with table:
        for step, size in enumerate((1.0, 2.0, 8.0, float("nan"), 4.0, 16.0)):
            kept.reset()
            y = ro.point(ro.point(x * 1, "c", retain=kept) * 1, "d", retain=kept)
            y.backward(torch.full((4,), size))
            table.update(step, kept, loss=y.sum())
        if not terminal:
            assert out.getvalue() == ""
    lines = [line for line in out.getvalue().splitlines() if line.strip()]
    last = lines[-8:]
    assert "step 5  loss 4" in last[0]
    cells = {line.split("│")[1].strip(): [c.strip() for c in line.split("│")[2:-1]] for line in last if "│" in line}
    assert cells == {"d": ["32", "", "▁▆!▃█"], "c": ["32", "0", "▁▆!▃█"]}


def test_live_table_of_nothing() -> None:
    table, out = live_table(terminal=False)
    with table:
        pass
    assert out.getvalue() == ""
    with pytest.raises(TypeError, match="LiveTable.update: kept is dict"):
        table.update(0, {})
    with pytest.raises(ValueError, match="history is 0; expected at least 1 step"):
        type(table)(history=0)


@pytest.mark.parametrize(
    ("values", "bars"),
    [
        ([], ""),
        ([3.0], "▄"),
        ([2.0, -2.0], "▄▄"),
        ([1.0, 2.0**7], "▁█"),
        ([0.0, 1.0, 2.0**7], "▁▁█"),
        ([float("inf"), float("nan")], "!!"),
        ([2.0**i for i in range(8)], "▁▂▃▄▅▆▇█"),
    ],
)
def test_sparkline(values: list[float], bars: str) -> None:
    pytest.importorskip("rich", reason="rich is not installed")
    from retainops.integrations.live import sparkline

    assert sparkline(values) == bars


def test_what_an_import_costs() -> None:
    """rich is loaded by who uses it alone, and its absence is told in words; tensorboard never is."""
    code = """if True:
        import sys
        import retainops, retainops.nn, retainops.integrations.tensorboard
        assert not {"rich", "tensorboard"} & set(sys.modules)
        sys.modules["rich"] = None
        try:
            import retainops.integrations.live
        except ImportError as error:
            print(error)
    """
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.strip() == (
        'retainops.integrations.live needs rich, which is not installed; pip install "retainops[demo]"'
    ), out.stderr
