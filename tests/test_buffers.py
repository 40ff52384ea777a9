"""Buffers of the caller's that gradients are written into, and the memory that they share."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import retainops as ro
from retainops.buffers import have_in_common, overlaps_itself, share_memory
from tests import slot_cases
from tests.conftest import Path, random_leaves
from tests.oracle import assert_near
from tests.slot_cases import dc_of

ab = slot_cases.ab  # a fixture


def test_into_a_buffer(path: Path, ab: tuple) -> None:
    buffer = torch.full((6, 50), 3.0, device=path.device)
    kept = ro.Retained(c=ro.Into(buffer))
    y = ro.mul_sin(*ab, retain=kept)
    assert kept.c.grad is None
    assert (buffer == 3).all()  # written by backward, not before
    y.sum().backward()
    assert kept.c.grad is buffer
    assert_near(buffer, dc_of(*ab))
    assert kept.c.tensor.grad is None  # no second copy anywhere


def test_into_adds_from_the_second_gradient_on(path: Path, ab: tuple) -> None:
    buffer = torch.full((6, 50), 3.0, device=path.device)
    kept = ro.Retained(c=ro.Into(buffer))
    (ro.mul_sin(*ab, retain=kept) + ro.mul_sin(*ab, retain=kept)).sum().backward()
    assert_near(buffer, 2 * dc_of(*ab))
    kept.reset()
    assert kept.c.grad is None
    ro.mul_sin(*ab, retain=kept).sum().backward()
    assert_near(buffer, dc_of(*ab))


def test_into_with_accumulate_adds_to_what_is_there(path: Path, ab: tuple) -> None:
    buffer = torch.full((6, 50), 3.0, device=path.device)
    kept = ro.Retained(c=ro.Into(buffer, accumulate=True))
    ro.mul_sin(*ab, retain=kept).sum().backward()
    assert_near(buffer, 3 + dc_of(*ab), 2)


def test_into_a_strided_buffer(path: Path, ab: tuple) -> None:
    whole = torch.full((50, 12), 3.0, device=path.device)
    kept = ro.Retained(c=ro.Into(whole[:, ::2].t()))
    ro.mul_sin(*ab, retain=kept).sum().backward()
    assert_near(whole[:, ::2].t(), dc_of(*ab))
    assert (whole[:, 1::2] == 3).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_float32_buffer_keeps_what_the_kernel_computed(kernels: Path, dtype: torch.dtype) -> None:
    rand = random_leaves(kernels.device)
    a, b = rand(6, 50, dtype=dtype), rand(6, 50, dtype=dtype)
    buffer = torch.empty(6, 50, device=kernels.device)
    ro.mul_sin(a, b, retain=ro.Retained(c=ro.Into(buffer))).sum().backward()
    torch.testing.assert_close(buffer, dc_of(a.float(), b.float()), rtol=1e-5, atol=1e-6)
    assert not torch.equal(buffer, buffer.to(dtype).float())  # finer than the interior's dtype can say


def test_into_under_create_graph(path: Path, ab: tuple) -> None:
    a, b = ab
    buffer = torch.empty(6, 50, device=path.device)
    y = ro.mul_sin(a, b, retain=ro.Retained(c=ro.Into(buffer)))
    torch.autograd.grad(y.sum(), a, create_graph=True)
    assert_near(buffer, dc_of(a, b))


def test_two_points_that_add_into_one_buffer(path: Path, ab: tuple) -> None:
    """Of code of yours: one gradient comes after the other. One op's kernel may read ahead of what it writes."""
    buffer = torch.zeros(6, 50, device=path.device)
    kept = ro.Retained(c=ro.Into(buffer, accumulate=True), h=ro.Into(buffer, accumulate=True))
    (ro.point(ab[0] * 2, "c", retain=kept) + 3 * ro.point(ab[0] * 4, "h", retain=kept)).sum().backward()
    assert torch.equal(buffer, torch.full_like(buffer, 4))

    @ro.fuse_pointwise
    def f(a, b):
        c = a * b
        h = torch.tanh(c)
        return h * b

    with pytest.raises(
        ValueError, match="f: the Into buffers for points 'c' and 'h' share memory.*; give each its own"
    ):
        f(*ab, retain=kept)


def test_parts_of_one_tensor_are_buffers_for_two_points(path: Path, ab: tuple) -> None:
    @ro.fuse_pointwise
    def f(a, b):
        c = a * b
        h = torch.tanh(c)
        return torch.sin(h)

    both = torch.full((6, 2, 50), 9.0, device=path.device)
    f(*ab, retain=ro.Retained(c=ro.Into(both[:, 0]), h=ro.Into(both[:, 1]))).sum().backward()
    kept = ro.Retained("c", "h")
    f(*ab, retain=kept).sum().backward()
    assert torch.equal(both[:, 0], kept.c.grad)
    assert torch.equal(both[:, 1], kept.h.grad)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.empty(6, 49), r"shape \(6, 49\).*expected shape \(6, 50\), torch.float32, on [a-z0-9:]+$"),
        (lambda: torch.empty(6, 50, dtype=torch.float64), "float64.*expected.*float32"),
        (lambda: torch.empty(6, 50, dtype=torch.bfloat16), "bfloat16.*expected.*float32"),
        (lambda: torch.empty(6, 50, device="meta"), "on meta.*expected.*"),
    ],
    ids=["shape", "float64", "bfloat16", "device"],
)
def test_a_buffer_that_does_not_fit(path: Path, ab: tuple, make, message: str) -> None:
    buffer = make()
    if path.device == "cuda" and buffer.device.type == "cpu":
        buffer = buffer.cuda()
    kept = ro.Retained(c=ro.Into(buffer))
    with pytest.raises(ValueError, match=f"mul_sin: the Into buffer for point 'c' has .*{message}"):
        ro.mul_sin(*ab, retain=kept)


def test_a_buffer_that_shares_memory_with_an_input(path: Path, ab: tuple) -> None:
    a, b = ab
    before = a.detach().clone()
    with pytest.raises(ValueError, match=r"mul_sin: the Into buffer for point 'c' shares memory with an input"):
        ro.mul_sin(a, b, retain=ro.Retained(c=ro.Into(a.detach())))
    assert torch.equal(a, before)


@pytest.mark.parametrize(
    ("buffer", "error", "message"),
    [
        ([1.0], TypeError, "buffer is list; expected a torch.Tensor"),
        (torch.zeros(3, requires_grad=True), ValueError, r"requires grad; pass buffer.detach\(\)"),
        (torch.zeros(3, dtype=torch.int32), ValueError, "int32.*floating-point"),
        (torch.zeros(3, dtype=torch.complex64).conj().imag, ValueError, "lazily negated"),
        (torch.inference_mode()(torch.zeros)(3), ValueError, "of inference mode.*outside"),
        (torch.zeros(1).expand(3), ValueError, "share memory"),
        (torch.zeros(3).unfold(0, 2, 1), ValueError, "share memory"),
    ],
)
def test_what_into_refuses(buffer, error, message: str) -> None:
    with pytest.raises(error, match=f"Into: .*{message}"):
        ro.Into(buffer)


def test_fake_buffers_share_no_memory() -> None:
    with FakeTensorMode():
        x, buffers = torch.zeros(3, requires_grad=True), [torch.zeros(3), torch.zeros(3)]
        kept = ro.Retained(c=ro.Into(buffers[0]), d=ro.Into(buffers[1]))
        ro.mul_sin(x, x, retain=ro.Retained.of({"c": kept.c})).sum().backward()
        assert kept.c.grad is buffers[0]


def test_into_refuses_another_shape_too(path: Path, ab: tuple) -> None:
    a, b = ab
    kept = ro.Retained(c=ro.Into(torch.empty(6, 50, device=path.device)))
    ro.mul_sin(a, b, retain=kept).sum().backward()
    kept.reset()
    with pytest.raises(ValueError, match=r"has shape \(6, 50\).*expected shape \(3, 50\)"):
        ro.mul_sin(a[:3], b, retain=kept)


def test_a_buffer_resized_before_backward(path: Path, ab: tuple) -> None:
    buffer = torch.empty(6, 50, device=path.device)
    y = ro.mul_sin(*ab, retain=ro.Retained(c=ro.Into(buffer)))
    buffer.resize_(2, 50)
    with pytest.raises(ValueError, match=r"has shape \(2, 50\).*expected shape \(6, 50\)"):
        y.sum().backward()


def test_writing_to_a_buffer_is_known_to_autograd(path: Path, ab: tuple) -> None:
    buffer = torch.ones(6, 50, device=path.device)
    y = ro.mul_sin(*ab, retain=ro.Retained(c=ro.Into(buffer)))
    x = torch.ones(6, 50, device=path.device, requires_grad=True)
    uses_the_buffer = (x * buffer).sum()
    y.sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        uses_the_buffer.backward()


def test_overlap() -> None:
    x = torch.zeros(4, 6)
    assert not any(overlaps_itself(t) for t in (x, x.t(), x[::2, 1::3], x[:, :0], torch.zeros(()), x[:1].expand(1, 6)))
    assert overlaps_itself(x[:1].expand(4, 6))
    assert overlaps_itself(torch.as_strided(x, (3, 3), (2, 1)))
    assert share_memory(x, x[2:])
    assert not share_memory(x[:2], x[2:])
    assert not share_memory(x, torch.zeros(4, 6))
    assert not share_memory(x[:0], x)


def _views(x: torch.Tensor) -> list[torch.Tensor]:
    n = x.numel()
    grids = [x, x.view(-1, 12), x.view(8, -1).t(), x.view(2, 3, -1)]
    steps = [v[..., i::j] for v in grids for i, j in ((0, 2), (1, 2), (2, 3))]
    rows = [v[i::2] for v in grids[1:] for i in (0, 1)]
    few = [x.view(-1, 12)[i : i + 2, :1] for i in (0, 3, 6)]  # met by steps of 7 only further on, or further back
    return [
        x[: n // 3],
        x[n // 3 :],
        x[n // 3 :].view(2, -1)[:, 3:5],
        *(x[i::7] for i in range(7)),
        *few,
        *steps,
        *rows,
    ]


def test_what_two_tensors_have_in_common() -> None:
    """Against what is written, of many views of one memory."""
    memory, seen = torch.zeros(96), []
    for t in _views(memory):
        for u in _views(memory) + _views(memory.view(torch.float16)):
            memory.zero_()
            u.fill_(1)
            seen.append(bool(t.count_nonzero()))
            assert have_in_common(t, u) == have_in_common(u, t) == seen[-1], (t.shape, t.stride(), u.shape, u.stride())
    assert {True, False} == set(seen)
