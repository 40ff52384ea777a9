"""Launches are remembered by what they depend on: nothing is served that was prepared for other operands."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import retainops as ro
from tests.conftest import HAS_TRITON, Path, random_leaves
from tests.oracle import assert_near

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed: nothing is launched")


def check(a: Any, b: Any, want: Any = None, dy: torch.Tensor | None = None) -> None:
    """mul_sin's result, gradients and retained gradient are eager's."""
    a, b = (x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for x in (a, b))
    c = a * b
    dy = torch.ones_like(c) if dy is None else dy
    kept = ro.Retained("c") if want is None else ro.Retained(c=want)
    needed = [x for x in (a, b) if isinstance(x, torch.Tensor) and x.requires_grad]
    expected = (dy * torch.cos(c)).detach()
    gradients = torch.autograd.grad(torch.sin(c), needed, dy)
    retain = {"retain": kept} if needed else {}
    y = ro.mul_sin(a, b, **retain)
    y.backward(dy)
    assert_near(y.detach(), torch.sin(c).detach())
    for x, gradient in zip(needed, gradients, strict=True):
        assert_near(x.grad, gradient)
    found = kept.c.grad if not isinstance(want, ro.Stats) or want.grad else None
    if found is not None:
        assert_near(found, expected)
    if isinstance(want, ro.Stats):
        assert_near(kept.c.l2, expected.norm())


def transposed(x: torch.Tensor) -> torch.Tensor:
    return x.detach().t().contiguous().t().requires_grad_()


def unaligned(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x.detach().new_zeros(1), x.detach().reshape(-1)])[1:].view(x.shape).requires_grad_()


def without_grad(x: torch.Tensor) -> torch.Tensor:
    return x.detach()


CHANGES = {
    "nothing": lambda x: x,
    "strides": transposed,
    "alignment": unaligned,
    "requires_grad": without_grad,
    "dtype": lambda x: x.detach().double().requires_grad_(),
    "narrow dtype": lambda x: x.detach().bfloat16().requires_grad_(),
    "a broadcast dim": lambda x: x.detach()[:1].requires_grad_(),
    "a number": lambda x: 0.75,
    "a whole number": lambda x: 2,
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_operand_is_another_launch(kernels: Path, change: str) -> None:
    rand = random_leaves(kernels.device)
    for _ in range(2):  # the changed one too is repeated
        a, b = rand(6, 8), rand(6, 8)
        check(a, b)
        check(a, CHANGES[change](b))
        check(a, b)


@pytest.mark.parametrize("change", ["nothing", "strides", "alignment"])
def test_another_incoming_gradient_is_another_launch(kernels: Path, change: str) -> None:
    rand = random_leaves(kernels.device)
    for _ in range(2):
        a, b, dy = rand(6, 8), rand(6, 8), rand(6, 8, requires_grad=False)
        check(a, b, dy=dy)
        check(a, b, dy=CHANGES[change](dy).detach())
    check(a, b, dy=dy[:1, :1].expand(6, 8))


def test_another_number_is_no_stale_one(kernels: Path) -> None:
    x = random_leaves(kernels.device)(6, 8)
    for number in (0.5, 2.0, -3.0):
        check(x, number)
        check(x.double(), number)  # as a tensor, beside which numbers are


def test_another_request_is_another_launch(kernels: Path) -> None:
    rand = random_leaves(kernels.device)
    a, b = rand(6, 8), rand(6, 8)
    for _ in range(2):
        check(a, b)
        check(a, b, ro.Stats("l2"))
        check(a, b, ro.Stats("l2", grad=True))
        check(a, b, ro.Into(torch.empty_like(a.detach())))
        check(a, b, ro.Into(torch.zeros_like(a.detach()), accumulate=True))


def test_a_buffer_that_lies_elsewhere_is_another_launch(kernels: Path) -> None:
    """Where no GPU is the simulated one says so: it compares what was compiled in with what comes."""
    rand = random_leaves(kernels.device)
    a, b, memory = rand(6, 8), rand(6, 8), torch.zeros(100, device=kernels.device)
    for first in (0, 1, 0, 2, 1):
        for accumulate in (False, True):
            check(a, b, ro.Into(memory.zero_()[first : first + 48].view(6, 8), accumulate=accumulate))
    check(a, b, ro.Into(memory[:96].view(6, 16)[:, ::2]))


def test_some_gradients_of_those_there_are(kernels: Path) -> None:
    rand = random_leaves(kernels.device)
    a, b = rand(6, 8), rand(6, 8)
    da, db = ((torch.cos(a * b) * x).detach() for x in (b, a))
    for _ in range(2):
        for wanted, expected in (([a, b], [da, db]), ([a], [da]), ([b], [db])):
            found = torch.autograd.grad(ro.mul_sin(a, b).sum(), wanted)
            for x, y in zip(found, expected, strict=True):
                assert_near(x, y)


def test_a_buffer_beside_an_operand_is_never_repeated(kernels: Path) -> None:
    rand = random_leaves(kernels.device)
    a, b = rand(70, 70), rand(70, 70)
    for _ in range(2):
        dy = rand(70, 70, requires_grad=False)
        check(a, b, dy=dy.t())
        expected = (dy.t() * torch.cos(a * b)).detach()
        ro.mul_sin(a, b, retain=ro.Retained(c=ro.Into(buffer := dy))).backward(dy.t())
        assert_near(buffer, expected)


def test_dropout_that_drops_nothing_takes_no_seed(kernels: Path) -> None:
    x, residual = (random_leaves(kernels.device)(6, 8, requires_grad=False) for _ in "xr")
    seed = torch.tensor(7, device=kernels.device)
    first = [ro.bias_dropout_add(x, None, residual, p, seed) for p in (0.5, 0.0, 0.25)]
    again = [ro.bias_dropout_add(x, None, residual, p, seed) for p in (0.25, 0.0, 0.5)]
    for y, other in zip(first, reversed(again), strict=True):
        assert torch.equal(y, other)
    assert_near(first[1], x + residual)


def test_a_backend_chosen_later_is_taken(kernels: Path) -> None:
    rand = random_leaves(kernels.device)
    a, b = rand(6, 8), rand(6, 8)
    names = []
    for backend in ("triton", "reference", "triton"):
        with ro.backend(backend):
            names.append(type(ro.mul_sin(a, b).grad_fn).__name__)
    assert names[0] == names[2] != names[1]


def test_forgotten_launches_are_prepared_again(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from retainops.ops import _launch

    monkeypatch.setattr(_launch, "MOST", 2)
    rand = random_leaves(kernels.device)
    for n in (3, 5, 7, 3, 5, 7):
        check(rand(n, 4), rand(n, 4))
        assert len(_launch._prepared) <= 2


def test_a_profiler_that_comes_later_gets_what_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A repeated launch goes past Triton where nobody listens, and through it where a hook does."""
    import triton
    from triton.compiler import CompiledKernel

    from retainops.testing.driver import driver

    heard: list[str] = []
    told = CompiledKernel.launch_metadata
    monkeypatch.setattr(CompiledKernel, "launch_metadata", lambda self, *x: heard.append(self.name) or told(self, *x))
    a, b = (random_leaves("cpu")(6, 8, requires_grad=False) for _ in "ab")
    with driver() as launches:
        ro.mul_sin(a, b)
        for chain in (triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook):
            heard.clear()
            ro.mul_sin(a, b)
            assert not heard
            chain.add(print)
            try:
                ro.mul_sin(a, b)
            finally:
                chain.remove(print)
            assert len(heard) == 1
    assert len(launches) == 5


def test_halves_of_a_tensor_are_each_aligned_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """That x is unaligned says nothing of its second half; nor that both were unaligned the last time."""
    from retainops.ops import _replay
    from retainops.testing import simulated_gpu

    monkeypatch.setattr(_replay, "PLAIN", 1)  # by the third call of an alignment it is a replay
    with simulated_gpu(engine="ptx"), ro.backend("triton"):  # which faults where 128 bits are read from elsewhere
        for first in (2, 2, 2, 1, 3, 0, 2):
            x = torch.randn(4110)[first : first + 4100].requires_grad_()
            gate, up = (half.detach().double() for half in x.chunk(2))
            y = ro.swiglu(x)
            assert_near(y.detach(), (torch.nn.functional.silu(gate) * up).float())
            y.sum().backward()


def test_threads(kernels: Path) -> None:
    """Four at once: the same launches are prepared, and then replayed, by all of them."""
    done = []

    def work(seed: int) -> None:
        for n in range(20):
            size = 6, 8 + n % 3
            a, b, dy = (torch.randn(size, generator=generators[seed]).to(kernels.device) for _ in range(3))
            check(a.requires_grad_(), b.requires_grad_(), dy=dy)
        done.append(seed)

    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [0, 1, 2, 3]


@pytest.mark.parametrize("first", [ro.layer_norm, ro.add_layer_norm])
def test_which_op_comes_first_makes_no_difference(first: Any) -> None:
    """Where one launch serves two ops, both would have prepared the same one."""
    from retainops.ops import _launch
    from retainops.testing.driver import driver

    x, residual, w, b = (torch.empty(*size, requires_grad=True) for size in ((6, 1024), (6, 1024), (1024,), (1024,)))
    second = ro.add_layer_norm if first is ro.layer_norm else ro.layer_norm
    warps = []
    for order in ([first, second], [second, first]):
        _launch.forget()
        with driver() as launches:
            for op in order:
                y = op(x, residual, w, b)[0] if op is ro.add_layer_norm else op(x, w, b)
                y.sum().backward()
        warps += [launch.kernel.metadata.num_warps for launch in launches if launch.name == "norm_bwd_kernel"]
    assert len(warps) == 4
    assert len(set(warps)) == 1
