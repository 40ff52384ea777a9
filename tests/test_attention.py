"""attention on every path, masks and shapes of every kind: against float64 and eager PyTorch with retain_grad()."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import retainops as ro
from retainops.stats import STATISTICS, parts_of
from tests.attention_cases import CASES, Case, bar, error, loss_of, run_eager, truth
from tests.conftest import KERNELS

Tensor = torch.Tensor
DTYPES = (torch.bfloat16, torch.float32)
FEW = (
    "causal",
    "dead rows",
    "grouped, causal, strided",
    "other values",
    "softcap, added",
    "window to the left, causal",
)
"""Cases that have everything between them."""
BY_PYTORCH = [name for name, case in CASES.items() if case.softcap is None and case.window is None]

over_cases = pytest.mark.parametrize(
    ("path", "name"), [("reference", name) for name in CASES] + [(KERNELS, name) for name in FEW], indirect=["path"]
)
"""The kernels are held to every case in tests/test_attention_kernels.py."""
over_few = pytest.mark.parametrize(
    ("path", "name"), [("reference", name) for name in FEW] + [(KERNELS, name) for name in FEW[:3]], indirect=["path"]
)
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Ran:
    """A case, run forward and backward with a request."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str, *names: str, **wants: Any) -> None:
        self.q, self.k, self.v, self.mask = case.tensors(dtype, device)
        self.kept = ro.Retained(*names, **wants) if names or wants else None
        self.o = ro.attention(self.q, self.k, self.v, self.mask, **case.keywords(), retain=self.kept)
        loss_of(self.o).backward()
        self.grads = {"q": self.q.grad, "k": self.k.grad, "v": self.v.grad}


@over_dtypes
@over_cases
def test_gradients_of_points_are_eagers(name: str, dtype: torch.dtype, path: Any) -> None:
    case = CASES[name]
    true, eager = truth(case, dtype, path.device), run_eager(case, dtype, dtype, path.device)
    ran = Ran(case, dtype, path.device, "s", "p", "o")
    for point in ("s", "p", "o"):
        grad = ran.kept[point].grad
        assert grad.dtype == dtype
        assert error(grad, true[point]["grad"]) <= bar_of(point, true, eager, dtype), point
    assert error(ran.o.detach(), true["o"]["value"]) <= bar(eager["o"]["value"], true["o"]["value"], dtype, 2, 4)
    for x, grad in ran.grads.items():
        there = true[x]["grad"]
        allowed = bar(eager[x]["grad"], there, dtype, 8, 16)
        assert error(grad, there) <= max(allowed, 16 * torch.finfo(dtype).eps), (
            x
        )  # PyTorch's own, and no more than sane


def bar_of(point: str, true: Any, eager: Any, dtype: torch.dtype) -> float:
    """Of p and o: eager's error and one unit in the last place. Of s: four times eager's, or eight units, of the terms
    that are subtracted in it.
    """
    there, theirs = true[point]["grad"], eager[point]["grad"]
    if point != "s":
        return error(theirs, there) + bar(there, there, dtype)
    return max(4 * error(theirs, there), bar(terms := _terms(true), terms, dtype, 1, 8))


def _terms(true: Any) -> Tensor:
    return true["p"]["value"] * true["p"]["grad"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@over_few
def test_in_other_dtypes(name: str, dtype: torch.dtype, path: Any) -> None:
    case = CASES[name]
    true, eager = truth(case, dtype, path.device), run_eager(case, dtype, dtype, path.device)
    ran = Ran(case, dtype, path.device, "s", "p")
    for point in ("s", "p"):
        there = true[point]["grad"]
        # In float64 the truth is eager's own, with errors of its own.
        allowed = bar(there, there, dtype, 1, 8) if dtype == torch.float64 else bar_of(point, true, eager, dtype)
        assert error(ran.kept[point].grad, there) <= allowed


@over_cases
def test_retention_changes_no_bit_of_the_rest(name: str, path: Any) -> None:
    case = CASES[name]
    alone = Ran(case, torch.float32, path.device)
    part = {} if not alone.q.shape[2] else {"s": ro.Part(heads=0, queries=0)}
    for names, wants in (("s", {}), ("o", {"p": ro.Relevance("legrad")}), ("p", part)):
        asked = Ran(case, torch.float32, path.device, *names, **wants)
        assert torch.equal(asked.o, alone.o)
        for x, grad in alone.grads.items():
            assert torch.equal(asked.grads[x], grad), x


@pytest.mark.parametrize("name", BY_PYTORCH)
def test_without_retention_it_is_pytorchs_function(name: str) -> None:
    case = CASES[name]
    q, k, v, mask = case.tensors(torch.float32)
    theirs = F.scaled_dot_product_attention(q, k, v, mask, 0.0, case.causal, scale=case.scale, enable_gqa=case.gqa)
    mine = ro.attention(q, k, v, mask, 0.0, case.causal, case.scale, case.gqa)
    assert type(mine.grad_fn) is type(theirs.grad_fn)
    assert torch.equal(mine, theirs)


OVER = {"tensor": None, "queries": -1, "rows": -1, "keys": -2, "heads": (-2, -1), "channels": (0, 1, 2)}


@pytest.mark.parametrize("over", OVER)
@over_few
def test_statistics(name: str, over: str, path: Any) -> None:
    case, dtype = CASES[name], torch.float32
    true, eager = truth(case, dtype, path.device), run_eager(case, dtype, dtype, path.device)
    names = [n for n in STATISTICS if over == "tensor" or n != "hist"]
    wanted = {"p": names, "s": [n for n in names if n != "act_grad"]}
    kept = Ran(case, dtype, path.device, **{p: ro.Stats(*ns, over=over) for p, ns in wanted.items()}).kept
    for point, ns in wanted.items():
        for stat in ns:
            there, theirs = (_statistic(stat, over, x[point]) for x in (true, eager))
            mine = getattr(kept[point], stat)
            if stat in ("nonfinite", "hist"):
                assert mine.sum() == there.sum()
                continue
            assert mine.dtype == torch.float32
            allowed = bar(theirs, there, dtype, 4, 8)
            if stat in ("sum", "mean", "act_grad"):  # the terms cancel: those of s to nothing
                magnitudes = {what: x.abs() for what, x in true[point].items()}
                if point == "s":
                    magnitudes["grad"] = _terms(true).abs()
                allowed = max(allowed, bar(terms := _statistic(stat, over, magnitudes), terms, dtype, 1, 8))
            assert error(mine, there) <= allowed, (point, stat)


def _statistic(name: str, over: str, point: dict[str, Tensor]) -> Tensor:
    """Of a gradient, from the definition."""
    g, dims = point["grad"], OVER[over]
    if name in ("nonfinite", "hist"):
        return parts_of((name,), over, g, None)[0]
    terms = {
        "l2": lambda: torch.linalg.vector_norm(g, dim=dims),
        "sum": lambda: g.sum(dims),
        "abs_sum": lambda: g.abs().sum(dims),
        "amax": lambda: g.abs().amax(dims or ()),
        "mean": lambda: g.mean(dims),
        "act_grad": lambda: (g * point["value"]).sum(dims),
    }
    return terms[name]()


@over_few
def test_statistics_of_the_output_are_over_heads_and_queries(name: str, path: Any) -> None:
    case = CASES[name]
    grad = truth(case, torch.float32, path.device)["o"]["grad"]
    for over, dims in (("heads", (-2, -1)), ("queries", -1)):
        kept = Ran(case, torch.float32, path.device, o=ro.Stats("l2", over=over)).kept
        torch.testing.assert_close(kept.o.l2, torch.linalg.vector_norm(grad, dim=dims).float())


@over_dtypes
@over_cases
def test_relevance(name: str, dtype: torch.dtype, path: Any) -> None:
    case = CASES[name]
    true, eager = (
        _relevance(x["p"]) for x in (truth(case, dtype, path.device), run_eager(case, dtype, dtype, path.device))
    )
    names = list(true) if case.q[2] == case.k[2] else ["legrad"]
    kept = Ran(case, dtype, path.device, p=ro.Relevance(*names)).kept
    for kind in names:
        mine = getattr(kept.p, kind)
        assert mine.dtype == torch.float32
        assert error(mine, true[kind]) <= bar(eager[kind], true[kind], dtype, 4, 8), kind


def _relevance(p: dict[str, Tensor]) -> dict[str, Tensor]:
    value, grad = p["value"], p["grad"]
    queries = max(grad.shape[1] * grad.shape[2], 1)
    return {
        "chefer": (value * grad).clamp(min=0).mean(1),
        "attn_grad": (value * grad).mean(1),
        "legrad": grad.clamp(min=0).sum((1, 2)) / queries,
    }


PARTS = [
    ro.Part(heads=0),
    ro.Part(heads=[1, 0]),
    ro.Part(queries=-1),
    ro.Part(queries=slice(1, None, 3), heads=-1),
    ro.Part(keys=[5, 0, 5]),
    ro.Part(keys=slice(2, 7), queries=[3, 1]),
    ro.Part(heads=[0, 1], queries=[2, 8], keys=-1),
    ro.Part(queries=slice(0, 0)),
]


@pytest.mark.parametrize("part", PARTS, ids=repr)
@over_few
def test_part(name: str, part: ro.Part, path: Any) -> None:
    """s and p each of a part; those of the whole are elsewhere."""
    case, dtype = CASES[name], torch.float32
    true, eager = truth(case, dtype, path.device), run_eager(case, dtype, dtype, path.device)
    ran = Ran(case, dtype, path.device, s=part, p=part)
    for point in ("s", "p"):
        grad, there = ran.kept[point].grad, _of(part, true[point]["grad"])
        assert grad.is_contiguous()
        assert error(grad, there) <= bar_of(point, true, eager, dtype)
        assert ran.kept[point].shape == there.shape


def _of(part: ro.Part, x: Tensor) -> Tensor:
    for axis, dim in (("heads", 1), ("queries", 2), ("keys", 3)):
        choice = part.chosen.get(axis)
        if choice is not None:
            places = (
                list(range(x.shape[dim]))[choice] if isinstance(choice, slice) else [i % x.shape[dim] for i in choice]
            )
            x = x.index_select(dim, torch.tensor(places, dtype=torch.int64, device=x.device))
    return x


def test_heads_picked_out_of_groups(path: Any) -> None:
    case = CASES["grouped"]
    true = truth(case, torch.float64, path.device)
    kept = Ran(case, torch.float64, path.device, s=ro.Part(heads=[5, 1, 2]), p=ro.Part(heads=[5, 1, 2], keys=[4])).kept
    torch.testing.assert_close(kept.s.grad, true["s"]["grad"][:, [5, 1, 2]])
    torch.testing.assert_close(kept.p.grad, true["p"]["grad"][:, [5, 1, 2]][..., 4:5])


def test_other_parts_of_the_two_points(path: Any) -> None:
    case = CASES["causal"]
    true = truth(case, torch.float64, path.device)
    kept = Ran(case, torch.float64, path.device, s=ro.Part(heads=1), p=ro.Part(keys=3)).kept
    torch.testing.assert_close(kept.s.grad, true["s"]["grad"][:, 1:2])
    torch.testing.assert_close(kept.p.grad, true["p"]["grad"][..., 3:4])


@pytest.mark.parametrize("elements", [1, 40, 300, 1000])
def test_tiles_of_any_size_give_the_same(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several of the batch, several of the queries, or one row."""
    from retainops.ops import _scores

    case = CASES["padding"]
    wants = {"s": ro.Stats("l2", "amax", "hist", "mean", grad=True), "p": ro.Relevance("chefer", "legrad", "attn_grad")}
    rows = {over: {"s": ro.Stats("sum", over=over), "p": ro.Stats("sum", "amax", over=over)} for over in OVER}
    whole = [Ran(case, torch.float64, "cpu", **w).kept.state() for w in (wants, *rows.values())]
    monkeypatch.setattr(_scores, "ELEMENTS", elements)
    monkeypatch.setattr(_scores, "FEWEST_ROWS", 2)
    for want, expected in zip((wants, *rows.values()), whole, strict=True):
        found = Ran(case, torch.float64, "cpu", **want).kept.state()
        assert found.keys() == expected.keys()
        for name, x in expected.items():
            torch.testing.assert_close(found[name], x, msg=f"{name} of {want}")


@pytest.mark.parametrize("elements", [1, 300])
@pytest.mark.parametrize("name", ["softcap, added", "softcap, causal, grouped", "window to the right"])
def test_softcap_and_window_in_tiles_of_any_size(name: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from retainops.ops import _scores

    monkeypatch.setattr(_scores, "ELEMENTS", elements)
    monkeypatch.setattr(_scores, "FEWEST_ROWS", 2)
    case = CASES[name]
    true, ran = truth(case, torch.float64), Ran(case, torch.float64, "cpu")
    torch.testing.assert_close(ran.o.detach(), true["o"]["value"])
    for x, grad in ran.grads.items():
        torch.testing.assert_close(grad, true[x]["grad"])
