"""kernels/narrow.py against float64, at every number of 16 bits, and that results of 16 bits and no others use it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from retainops.registry import find
from tests.conftest import Path
from tests.oracle import leaves, sample

pytest.importorskip("triton", reason="triton is not installed: there are no kernels")

from retainops.kernels import binary, chains, narrow, unary
from retainops.testing.driver import Launch, driver
from tests.narrow_kernels import both_kernel

Tensor = torch.Tensor
SMALLEST = 2.0**-118
"""Below it a result may be zero, of either sign."""


def sigmoid(x: Tensor) -> Tensor:
    """To float64's precision for negative x, too."""
    return torch.exp(torch.minimum(x, torch.zeros_like(x))) / (1 + torch.exp(-x.abs()))


def normal_cdf(x: Tensor) -> Tensor:
    return torch.special.erfc(-x / math.sqrt(2)) / 2


def two_z(x: Tensor) -> Tensor:
    return math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)


def gelu_slope(x: Tensor) -> Tensor:
    return normal_cdf(x) + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def gelu_tanh_slope(x: Tensor) -> Tensor:
    s, rest = sigmoid(two_z(x)), sigmoid(-two_z(x))
    return s + x * s * rest * math.sqrt(8 / math.pi) * (1 + 0.134145 * x * x)


def softplus(x: Tensor) -> Tensor:
    return torch.clamp(x, min=0) + torch.log1p(torch.exp(-x.abs()))


def mish_slope(x: Tensor) -> Tensor:
    t = torch.tanh(softplus(x))
    return torch.where(x > 20, 1.0, t + x * (1 - t) * (1 + t) * sigmoid(x))


def tanh_slope(x: Tensor) -> Tensor:
    return 1 / torch.cosh(x) ** 2


def quotient(a: Tensor, b: Tensor) -> Tensor:
    """NaN where float32 has none to its full precision."""
    c = a / b
    return torch.where((c.abs() > SMALLEST) & (c.abs() < 2.0**127), c, math.nan)


@dataclass(frozen=True)
class Function:
    """One function: what it is exactly, and how far off it may be.

    Attributes:
        exact: of float64 tensors: the first argument, and the second one where there are two; without dy.
        error: relative to the result.
        of_x: what is added to that, relative to the first argument.
        at_most: what is added to that: of a gradient, where its terms cancel.
        slope: whether the function has dy as its last argument, by which its result is multiplied.
        path: where in the function's results the one is that is looked at.
        arguments: how many, without dy.
    """

    exact: Callable[..., Tensor]
    error: float
    of_x: float = 0.0
    at_most: float = 0.0
    slope: bool = True
    path: tuple[int, ...] = ()
    arguments: int = 1


def value(exact: Callable[..., Tensor], error: float, of_x: float = 0.0, arguments: int = 1) -> Function:
    return Function(exact, error, of_x, slope=False, arguments=arguments)


FUNCTIONS = {
    "tanh": value(torch.tanh, 2**-17),
    "tanh_grad": Function(tanh_slope, 2**-17),
    "sigmoid": value(sigmoid, 2**-17),
    "sigmoid_grad": Function(lambda x: sigmoid(x) * sigmoid(-x), 2**-17, at_most=2**-22),
    "exp": value(torch.exp, 2**-17),
    "exp_grad": Function(torch.exp, 2**-17),
    "gelu": value(lambda x: x * normal_cdf(x), 2**-17, of_x=2**-24),
    "gelu_grad": Function(gelu_slope, 2**-17, at_most=2**-21),
    "gelu_tanh": value(lambda x: x * sigmoid(two_z(x)), 2**-16.5, of_x=2**-25),
    "gelu_tanh_grad": Function(gelu_tanh_slope, 2**-16.5, at_most=2**-20),
    "silu": value(lambda x: x * sigmoid(x), 2**-17),
    "silu_grad": Function(lambda x: sigmoid(x) * (1 + x * sigmoid(-x)), 2**-16.5, at_most=2**-22),
    "softplus": value(softplus, 2**-16),
    "softplus_grad": Function(sigmoid, 2**-17),
    "div": value(quotient, 2**-20, arguments=2),
    "div_grad da": Function(lambda a, b: 1 / b, 2**-20, path=(0,), arguments=2),
    "div_grad db": Function(lambda a, b: -quotient(quotient(a, b), b), 2**-20, path=(1,), arguments=2),
    "softcap_forward": value(lambda x, cap: cap * torch.tanh(x / cap), 2**-17, arguments=2),
    "softcap_backward dx": Function(lambda x, cap: tanh_slope(x / cap), 2**-15, path=(0, 0), arguments=2),
    "softcap_backward dcap": Function(
        lambda x, cap: torch.tanh(x / cap) - x / cap * tanh_slope(x / cap), 2**-17, 0.0, 2**-16, True, (0, 1), 2
    ),
    "mish_forward": value(lambda x: x * torch.tanh(softplus(x)), 2**-16.5),
    "mish_backward": Function(mish_slope, 2**-16.5, at_most=2**-21, path=(0, 0)),
}


def test_every_function_is_looked_at() -> None:
    """Each that stands for a function of another file; two of them are looked at as parts of others."""
    functions = {name for name, f in vars(narrow).items() if hasattr(f, "fn")}
    standing = {name for name in functions if any(hasattr(module, name) for module in (unary, binary, chains))}
    assert {name.split()[0] for name in FUNCTIONS} == standing - {"divide", "normal_cdf"}


def every_number() -> Tensor:
    """Of bfloat16 and of float16, in float32."""
    bits = torch.arange(1 << 16).to(torch.int16)
    return torch.cat([bits.view(torch.bfloat16).float(), bits.view(torch.float16).float()])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_errors_and_special_values(kernels: Path, name: str) -> None:
    """Against float64; and NaN, infinities and zeros where the function has them for which it stands."""
    f, n = FUNCTIONS[name], 1 << 17
    generator = torch.Generator().manual_seed(5)
    x = [every_number()]
    if f.arguments == 2:
        x.append(x[0][torch.randperm(n, generator=generator)])
    if name.startswith("softcap"):
        x[1] = 2 ** (8 * torch.rand(n, generator=generator) - 3)
    dy = 1.5 - torch.rand(n, generator=generator) if f.slope else torch.ones(n)
    given = tuple(t.to(kernels.device) for t in (*x, dy)[: f.arguments + f.slope])
    wide = next(module for module in (unary, binary, chains) if hasattr(module, name.split()[0]))
    y, z = torch.empty(2, n, device=kernels.device)
    functions = (getattr(module, name.split()[0]) for module in (narrow, wide))
    both_kernel[(n // 4096,)](given, y, z, 4096, *functions, f.path)
    y, z = y.cpu().double(), z.cpu().double()

    exact = f.exact(*(t.double() for t in x)) * dy
    bar = f.error * exact.abs() + dy * ((f.of_x * x[0].double()).abs().nan_to_num() + f.at_most) + SMALLEST
    comparable = exact.isfinite() & y.isfinite() & z.isfinite()
    assert comparable.sum() > n / 3
    wrong = comparable & (y != exact) & ~((y - exact).abs() <= bar)
    assert not wrong.any(), some(wrong, *x, y, exact)
    elsewhere = (y.isnan() != z.isnan()) | (y.isinf() != z.isinf()) | (y.isinf() & (y != z))
    assert not elsewhere.any(), some(elsewhere, *x, y, z)
    another_zero = (y == 0) & (z == 0) & (y.signbit() != z.signbit()) & ~(exact.abs() > 2.0**-126)
    assert not another_zero.any(), some(another_zero, *x, y, z)


def some(wrong: Tensor, *columns: Tensor) -> list[list[float]]:
    """The first rows that are wrong."""
    return torch.stack([column.double()[wrong][:5] for column in columns], -1).tolist()


def used(name: str, dtype: torch.dtype) -> set[Any]:
    """The functions that an op's kernels are made of."""
    found: set[Any] = set()

    def look(launch: Launch) -> None:
        for x in launch.args:
            if hasattr(x, "fn"):  # FORWARD or BACKWARD
                found.update([x, *inspect.getclosurevars(x.fn).nonlocals.values()])

    inputs = sample(name, "cpu", dtype, (16,))
    with driver(execute=look, compiles=False):
        y = find(name).call(*inputs)
        torch.autograd.grad(y, leaves(inputs), torch.ones_like(y))
    return found


@pytest.mark.parametrize(
    ("name", "functions"),
    {
        "mul_tanh": ["tanh", "tanh_grad"],
        "add_gelu": ["gelu", "gelu_grad"],
        "div_relu": ["div", "div_grad"],
        "swiglu": ["silu", "silu_grad"],
        "glu_packed": ["sigmoid", "sigmoid_grad"],
        "softcap": ["softcap_forward", "softcap_backward"],
        "mish": ["mish_forward", "mish_backward"],
    }.items(),
)
def test_results_of_16_bits_and_no_others_use_them(name: str, functions: list[str]) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        found = used(name, dtype)
        for function in functions:
            assert (getattr(narrow, function) in found) == (dtype.itemsize == 2), (dtype, found)
    assert unary.relu_grad in used("div_relu", torch.bfloat16)  # which has no narrow form
