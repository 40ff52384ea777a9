"""The norms over the last dim: tensors, and gradients that arrive, of any layout."""

from __future__ import annotations

import pytest
import torch

import retainops as ro
from retainops.ops.norm import LAYER_NORM, layer_norm
from retainops.registry import Op
from tests.conftest import GPU, Path
from tests.norm_cases import OPS, SUMS, cut_rows, differentiate, drawn, in_rows_and_chunks, inputs_of, over_ops, several
from tests.oracle import all_points, assert_near, clones, eager, is_float, leaves, random_like

EQUAL = "a stride of 0 in the row"


def views(device: str) -> dict[str, torch.Tensor]:
    base = drawn(4, 6, 40, device=device).detach()
    return {
        "transposed": base.transpose(0, 1),
        "rows apart": base[:, ::2],
        "columns apart": base[..., ::2],
        "columns outermost": base.permute(2, 0, 1).transpose(0, 2),
        "offset": base.flatten()[3 : 3 + 5 * 40].view(5, 40),
        "reversed roles": base.mT,
        "expanded": base[:, :1].expand(4, 6, 40),
        EQUAL: base[..., :1].expand(4, 6, 40),
        "four dims that do not merge": drawn(3, 4, 5, 20, device=device).detach()[:, ::2, ::2].transpose(0, 2),
    }


LAYOUTS = [(op, layout, "whole rows") for op in OPS for layout in views("cpu") if (op, layout) != (LAYER_NORM, EQUAL)]
LAYOUTS += [(op, layout, "chunks") for op in OPS for layout in ("columns apart", "expanded")]


@pytest.mark.parametrize(("op", "layout", "cut"), LAYOUTS, ids=lambda x: getattr(x, "name", x))
def test_layouts_of_the_input(op: Op, layout: str, cut: str, kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_rows(cut, monkeypatch)
    x = views(kernels.device)[layout]
    _, *rest = inputs_of(op, *x.shape, device=kernels.device)
    if op in SUMS:
        rest[0] = drawn(*x.shape[:-1], 2 * x.shape[-1], device=kernels.device)[..., ::2].detach().requires_grad_()
    ours, theirs = [x.detach().requires_grad_(), *rest], [x.detach().requires_grad_(), *clones(rest)]
    kept = all_points(op)
    outputs = op.call(*ours, retain=kept)
    want, values = eager(op, theirs)
    differentiate(want, differentiate(outputs))
    for y, w in zip(several(outputs), several(want), strict=True):
        assert_near(y, w, 4)
        assert y.stride() == w.stride()
    for a, b in zip(leaves(ours), leaves(theirs), strict=True):
        assert_near(a.grad, b.grad, 8)
    for name, slot in kept.items():
        assert_near(slot.grad, values[name].grad, 8)


@in_rows_and_chunks
def test_a_row_of_one_number(cut: str, kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its xhat is 0, up to rounding errors, of which 1 / sqrt(eps) makes hundreds of times as much."""
    cut_rows(cut, monkeypatch)
    x = drawn(4, 1, device=kernels.device).detach().expand(4, 70).requires_grad_()
    w, b = drawn(70, device=kernels.device, seed=4), drawn(70, device=kernels.device, seed=5)
    y = layer_norm(x, w, b, 0.01)
    torch.testing.assert_close(y, b.expand_as(y), rtol=0, atol=1e-5)
    dy = random_like(y)
    dx, dw, db = torch.autograd.grad(y, (x, w, b), dy)
    g = dy * w
    torch.testing.assert_close(dx, 10 * (g - g.mean(-1, keepdim=True)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dw, torch.zeros_like(w), rtol=0, atol=1e-5)
    torch.testing.assert_close(db, dy.sum(0))


def losses(y: torch.Tensor) -> dict[str, torch.Tensor]:
    """By how the gradient lies that backward gets."""
    return {
        "one element, strides of 0": y.sum(),
        "one row": (y.mean(0) * torch.arange(y.shape[1], device=y.device, dtype=y.dtype)).sum(),
        "one column": (y.mean(1) * torch.arange(y.shape[0], device=y.device, dtype=y.dtype)).sum(),
        "expanded": (y.expand(3, *y.shape) ** 2).sum(),
        "transposed": (y.t() * torch.arange(y.shape[0], device=y.device, dtype=y.dtype)).sum(),
        "mostly zeros": y[:, 3].sum(),
    }


@over_ops
@pytest.mark.parametrize("how", losses(torch.ones(2, 4)))
@in_rows_and_chunks
def test_gradients_of_any_layout(op: Op, how: str, cut: str, kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_rows(cut, monkeypatch)
    ours = inputs_of(op, 7, 40, device=kernels.device)
    theirs, kept = clones(ours), all_points(op)
    sum(losses(y)[how] for y in several(op.call(*ours, retain=kept))).backward()
    want, values = eager(op, theirs)
    sum(losses(y)[how] for y in several(want)).backward()
    for a, b in zip(leaves(ours), leaves(theirs), strict=True):
        assert_near(a.grad, b.grad, 16)
    for name, slot in kept.items():
        assert_near(slot.grad, values[name].grad, 16)


@pytest.mark.parametrize("how", ["one element, strides of 0", "one row", "one column"])
@in_rows_and_chunks
def test_gradients_without_weights(how: str, cut: str, kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight is 0 outside the row: what is broadcast must be."""
    cut_rows(cut, monkeypatch)
    ours, theirs = (drawn(7, 40, device=kernels.device) for _ in "ab")
    (dx,) = torch.autograd.grad(losses(layer_norm(ours))[how], ours)
    (want,) = torch.autograd.grad(losses(eager(LAYER_NORM, [theirs, None, None, 1e-5])[0])[how], theirs)
    torch.testing.assert_close(dx, want, rtol=0, atol=1e-5)


# Large tensors: memory that has addresses and no pages, of which only what is touched is ever there.


@pytest.mark.skipif(GPU, reason="runs only the last program, which a GPU cannot")
@over_ops
def test_offsets_beyond_two_to_the_31st(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the last rows; each tile has its program, as on a GPU without end."""
    from retainops.testing import simulated_gpu

    monkeypatch.setattr("retainops.ops._rows._multiprocessors", lambda device: 2**30)
    rows, kept = 2**31 // 64 + 8, ro.Retained("xhat")
    theirs = inputs_of(op, 1, 64, device="cpu", dtype=torch.bfloat16)
    ours = [x.detach().expand(rows, 64).requires_grad_() if is_float(x) and x.dim() > 1 else x for x in theirs]
    tensors = [x for x in leaves(ours) if x.dim() > 1]
    with simulated_gpu(programs=[-1], check=False):
        outputs = several(op.call(*ours, retain=kept))
        dys = [random_like(y[:1], seed) for seed, y in enumerate(outputs)]
        grads = torch.autograd.grad(outputs, [*tensors, kept.xhat.tensor], [dy.expand(rows, 64) for dy in dys])
    want, values = eager(op, theirs)
    differentiate(want, dys)
    for y, w in zip(outputs, several(want), strict=True):
        assert_near(y[-1:], w, 4)
    for a, b in zip(grads, [*(x for x in leaves(theirs) if x.dim() > 1), values["xhat"]], strict=True):
        assert_near(a[-1:], b.grad, 4)


@pytest.mark.skipif(GPU, reason="takes memory that has no pages")
@over_ops
@pytest.mark.parametrize("strides", [(2**30, 1), (1, 2**30)], ids=["rows", "columns"])
def test_strides_beyond_two_to_the_31st(op: Op, strides: tuple[int, int]) -> None:
    from retainops.testing import simulated_gpu

    near, *rest = inputs_of(op, 4, 4, device="cpu", dtype=torch.float16)
    far = torch.empty(3 * 2**30 + 8, dtype=torch.float16).as_strided((4, 4), strides)
    with torch.no_grad():
        far.copy_(near)
    found = []
    with simulated_gpu(compiles=False, check=False):
        for x in (near.detach().requires_grad_(), far.requires_grad_()):
            outputs = several(op.call(x, *rest))
            found.append([*outputs, *torch.autograd.grad(outputs, [x, rest[0]], [random_like(y) for y in outputs])])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
