"""Fixtures: the paths a call can take, with a real GPU where there is one and a simulated one elsewhere."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import retainops as ro

# What deterministic mode, which fills fresh memory with NaN below, asks of matrix products on CUDA.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

HAS_TRITON = importlib.util.find_spec("triton") is not None
GPU = torch.cuda.is_available()
KERNELS = "gpu" if GPU else "simulated"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-target", action="store_true", help="read the machine code of every op on every target: minutes more"
    )


@dataclass(frozen=True)
class Path:
    """One of the ways a call can be computed: its name, and where its tensors are."""

    name: str
    device: str

    def expects(self, op: str) -> str:
        return "Triton kernels" if self.name in ("gpu", "simulated") else "reference path"


@pytest.fixture(autouse=True)
def the_same_numbers() -> None:
    """What a test draws without a generator of its own is the same at every run, and in any order of tests."""
    torch.manual_seed(20)


@pytest.fixture(autouse=True)
def nothing_prepared() -> None:
    """Each test prepares its own launches: some change what tiles depend on."""
    if HAS_TRITON and "retainops.ops._launch" in sys.modules:
        sys.modules["retainops.ops._launch"].forget()


@pytest.fixture(params=["reference", KERNELS])
def path(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Run the test on each path. Memory that `torch.empty` returns is NaN, so that a missing store shows."""
    name = request.param
    with contextlib.ExitStack() as stack:
        if name == "simulated":
            if not HAS_TRITON:
                pytest.skip("triton is not installed: there are no kernels to simulate")
            stack.enter_context(simulated(request))
        elif name == "reference":
            stack.enter_context(ro.backend("reference"))
        stack.enter_context(nan_filled_memory())
        yield Path(name, "cuda" if name == "gpu" else "cpu")


@pytest.fixture
def kernels(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Run the test on the kernels' path alone."""
    with contextlib.ExitStack() as stack:
        if not GPU:
            if not HAS_TRITON:
                pytest.skip("triton is not installed: there are no kernels to simulate")
            stack.enter_context(simulated(request))
        stack.enter_context(ro.backend("triton"))
        stack.enter_context(nan_filled_memory())
        yield Path(KERNELS, "cuda" if GPU else "cpu")


def simulated(request: pytest.FixtureRequest) -> contextlib.AbstractContextManager[object]:
    """A simulated GPU, whose compiler goes the whole way where the test's module says `COMPILES = True`.

    Elsewhere it stops at Triton's own IR: several times faster, and what it makes of the rest is read by
    tests/test_machine_code.py and tests/test_family_machine_code.py, not executed.
    """
    from retainops.testing import simulated_gpu

    return simulated_gpu(compiles=getattr(request.module, "COMPILES", False))


@contextlib.contextmanager
def nan_filled_memory() -> Iterator[None]:
    """PyTorch's deterministic mode fills what `torch.empty` returns with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.fixture
def rand(path: Path) -> Callable[..., torch.Tensor]:
    """Random normal leaves on the path's device; the same ones at every run."""
    return random_leaves(path.device)


def random_leaves(device: str) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(20)

    def rand(*shape: int, dtype: torch.dtype = torch.float32, requires_grad: bool = True, **_: Any) -> torch.Tensor:
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        return x.to(device, dtype).requires_grad_(requires_grad)

    return rand


@pytest.fixture
def model_x(path: Path) -> tuple[torch.nn.Module, torch.Tensor]:
    """A small model with points, and its input, where the path runs."""
    from tests.small_model import make  # which imports this

    return make(path.device)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled yet, and no warnings: what the compiler says of the machine is not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch._dynamo.utils import counters

        torch._dynamo.reset()
        counters.clear()
        yield
        torch._dynamo.reset()


@pytest.fixture
def whole_graphs(fresh_compiler: None) -> Iterator[None]:
    """The same, for tests in which no graph may break."""
    from torch._dynamo.utils import counters

    yield
    assert not counters["graph_break"], "a graph break"
