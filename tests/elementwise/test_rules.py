"""Every operation of the table, through the kernels: values and gradients as eager PyTorch's, NaN and inf included."""

from __future__ import annotations

import importlib
import itertools
import operator
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import retainops as ro
from retainops.elementwise.rules import FUNCTIONS, METHODS, ROWS, Row
from retainops.elementwise.step import HELPERS
from tests.conftest import HAS_TRITON, Path

INF = float("inf")
NAN = float("nan")

UNARY: dict[str, Callable] = {
    "neg": operator.neg,
    "square": torch.square,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "abs": abs,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log": torch.log,
    "log1p": torch.log1p,
    "sin": torch.sin,
    "cos": torch.cos,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "erf": torch.erf,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "softplus": F.softplus,
    **{f"pow {e}": lambda x, e=e: x**e for e in (0, 1, 2, 3, 4, 0.5, -0.5, -1, -2, -3, 2.5, 0.3, NAN)},
    "add, number": lambda x: 0.1 + x,
    "sub, number": lambda x: 0.1 - x,
    "mul, number": lambda x: 0.1 * x,
    "mul, inf": lambda x: x * INF,
    "mul, nan": lambda x: NAN * x,
    "mul, true": lambda x: x * True,
    "mul, numpy": lambda x: x * np.float32(0.1) + np.int64(3),
    "mul, integer beyond int32": lambda x: x * 3_000_000_001,
    "div, number": lambda x: x / 3,
    "div, of a number": lambda x: 0.1 / x,
    "clamp": lambda x: torch.clamp(x, -1, 2.0),
    "clamp, least": lambda x: x.clamp(min=0.5),
    "clamp, most": lambda x: x.clamp(max=0.1),
    "clamp, crossed": lambda x: torch.clamp(x, 1.0, -1.0),
    "clamp, nan": lambda x: torch.clamp(x, min=NAN),
    "clamp, infinite": lambda x: torch.clamp(x, -INF, INF),
    "clamp_min": lambda x: torch.clamp_min(x, 0.1),
    "clamp_max": lambda x: torch.clamp_max(x, -1.0),
    "where, number": lambda x: torch.where(x < 0.1, 0.1, x),
    "where, numbers": lambda x: x * torch.where(x < 0.1, 0.1, 0.7),
    "lerp, number": lambda x: torch.lerp(x, 2 * x, 0.3),
    "isnan": lambda x: torch.where(torch.isnan(x), 2 * x, 3 * x),
    "logical_not": lambda x: torch.where(~(x > 0.5), 2 * x, 3 * x),
    "condition times": lambda x: x * (x > 0.5),
    "condition plus": lambda x: (x > 0.5) + x,
    "condition times number": lambda x: x + (x > 0.5) * 2.5,
    "detach": lambda x: x * x.detach(),
    "straight through": lambda x: x + (torch.where(x > 0, 1.0, -1.0) - x).detach(),
}
BINARY: dict[str, Callable] = {
    "add": operator.add,
    "add, alpha": lambda x, y: torch.add(x, y, alpha=0.3),
    "sub": operator.sub,
    "sub, alpha": lambda x, y: torch.sub(x, y, alpha=3),
    "mul": operator.mul,
    "div": operator.truediv,
    "maximum": torch.maximum,
    "maximum, max": torch.max,
    "minimum": torch.minimum,
    "clamp, tensor": lambda x, y: torch.clamp(x, y),
    "clamp, tensor above": lambda x, y: torch.clamp(x, max=y),
    "where": lambda x, y: torch.where(x > y, x, y),
    "where, method": lambda x, y: x.where(x > y, y),
    "lt": lambda x, y: torch.where(x < y, 2 * x, 3 * y),
    "le": lambda x, y: torch.where(x <= y, 2 * x, 3 * y),
    "gt": lambda x, y: torch.where(x > y, 2 * x, 3 * y),
    "ge": lambda x, y: torch.where(x >= y, 2 * x, 3 * y),
    "eq": lambda x, y: torch.where(x == y, 2 * x, 3 * y),
    "ne": lambda x, y: torch.where(x != y, 2 * x, 3 * y),
    "logical_and": lambda x, y: torch.where((x > 0) & (y > 0.5), 2 * x, 3 * y),
    "logical_or": lambda x, y: torch.where((x > 0) | torch.logical_not(y > 0.5), 2 * x, 3 * y),
    "logical_xor": lambda x, y: torch.where((x > 0) ^ (y > 0.5), 2 * x, 3 * y),
}
TERNARY: dict[str, Callable] = {
    "clamp, tensors": torch.clamp,
    "lerp": torch.lerp,
    "addcmul": torch.addcmul,
    "addcmul, value": lambda x, y, z: torch.addcmul(x, y, z, value=0.3),
}
DEFAULTED = ("where, numbers", "condition times number", "straight through")
"""Values in them are made of conditions and numbers alone: PyTorch gives those its default dtype, float32."""

CASES = [*((1, name) for name in UNARY), *((2, name) for name in BINARY), *((3, name) for name in TERNARY)]
over_cases = pytest.mark.parametrize(("count", "name"), CASES, ids=lambda x: x if isinstance(x, str) else None)

# Where functions are delicate: signs of zero, ties, where they saturate or overflow, what has no value.
SPECIAL = [0.0, -0.0, 0.1, 0.5, -0.5, 1.0, -1.0, 2.0, 20.5, -30.0, 89.0, 1e-20, 1e30, -1e30, INF, -INF, NAN]
FEW = [0.0, -0.0, 0.5, 1.0, -1.0, 2.0, 1e30, INF, -INF, NAN]
FEWEST = [-1.0, 0.0, 0.5, 2.0, INF, NAN]


def case(count: int, name: str) -> Callable:
    return {1: UNARY, 2: BINARY, 3: TERNARY}[count][name]


def as_function(expression: Callable, count: int) -> Callable:
    """With a local name for its result, so that it is a point."""

    def one(x):
        r = expression(x)
        return r + 0.0

    def two(x, y):
        r = expression(x, y)
        return r + 0.0

    def three(x, y, z):
        r = expression(x, y, z)
        return r + 0.0

    return (one, two, three)[count - 1]


def inputs_of(count: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Every combination of delicate values, along one dim."""
    values = [SPECIAL, FEW, FEWEST][count - 1]
    columns = zip(*itertools.product(values, repeat=count), strict=True)
    return [torch.tensor(column, dtype=dtype, device=device).requires_grad_() for column in columns]


def test_every_operation_has_a_case() -> None:
    tested = {name.split(",")[0].split(" ")[0] for _, name in CASES}
    assert {row.names[0] for row in ROWS} <= tested


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@over_cases
def test_values_and_gradients_are_eagers(kernels: Path, count: int, name: str, dtype: torch.dtype) -> None:
    if name == "clamp, nan" and not torch.zeros(1, device=kernels.device).clamp(min=NAN).isnan():
        pytest.skip("PyTorch's kernel overlooks a bound that is NaN: on CUDA, in torch 2.11 on a CPU; these do not")
    fn = as_function(case(count, name), count)
    ours, theirs = (inputs_of(count, dtype, kernels.device) for _ in range(2))
    kept, fused = ro.Retained("r"), ro.fuse_pointwise(fn)
    if name in DEFAULTED and dtype == torch.float64:
        with pytest.raises(RuntimeError, match="a value made of conditions and numbers has PyTorch's default dtype"):
            fused(*ours)
        return
    y = fused(*(x.expand(4, -1) for x in ours), retain=kept)
    want = fn(*(x.expand(4, -1) for x in theirs))
    dy = torch.tensor([1.5, -2.0, 0.0, INF], dtype=dtype, device=kernels.device)[:, None].expand_as(y)
    y.backward(dy)
    want.backward(dy)
    # A few ulp: PyTorch's own functions on a CPU are not correctly rounded, nor are those of the kernels.
    near = {"rtol": 16 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).tiny, "equal_nan": True}
    torch.testing.assert_close(y, want, **near)
    torch.testing.assert_close(kept.r.grad, dy.contiguous(), **near)
    for x, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.grad, other.grad, **near)


AWAY = {  # from where a function has no derivative, or no value
    "sqrt": 3.0,
    "rsqrt": 3.0,
    "log": 3.0,
    "log1p": 3.0,
    "reciprocal": 3.0,
    "div, of a number": 3.0,
    "div": 3.0,
    **{f"pow {e}": 3.0 for e in (0.5, -0.5, -1, -2, -3, 2.5, 0.3)},
}


@over_cases
def test_gradcheck(kernels: Path, count: int, name: str) -> None:
    if name in DEFAULTED:
        pytest.skip("float64 takes the reference here, which is PyTorch's own")
    if "nan" in name or "inf" in name or "detach" in name or "through" in name:
        pytest.skip("its value is not finite, or its derivative is not that of its value")
    generator = torch.Generator().manual_seed(4)
    draw = (torch.rand(5, generator=generator, dtype=torch.float64) * 2 - 1 + AWAY.get(name, 0.0) for _ in range(count))
    inputs = [x.to(kernels.device).requires_grad_() for x in draw]
    fused = ro.fuse_pointwise(as_function(case(count, name), count))
    assert torch.autograd.gradcheck(fused, inputs)
    if count == 1:
        assert torch.autograd.gradgradcheck(fused, inputs)


def spellings(row: Row) -> list[Callable]:
    """Every way to write an operation of the table."""
    functions = [f for f, of in FUNCTIONS.items() if of is row]
    methods = [name for name in row.names if name in METHODS and name != "where"]
    return functions + [lambda x, *others, name=name: getattr(x, name)(*others) for name in methods]


def spelled(row: Row, spelling: Callable) -> Callable:
    def f(x, y, z):
        p, q = x > 0, y > 0
        given = {"x": x, "y": y, "z": z, "p": p, "q": q, "low": y, "high": z, "weight": z, "condition": p}
        r = spelling(*(given.get(name, name) for name in row.example))
        return torch.where(r, x, y) if row.rule(*row.example).gives else r * x

    return f


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.names[0])
def test_every_spelling_is_the_same_operation(row: Row) -> None:
    sources = {ro.fuse_pointwise(spelled(row, spelling)).source for spelling in spellings(row)}
    assert len(sources) == 1, "\n".join(sources)


def test_the_device_functions_are_there() -> None:
    if not HAS_TRITON:
        pytest.skip("triton is not installed: there are no device functions")
    for file, names in HELPERS.items():
        module = importlib.import_module(f"retainops.kernels.{file}")
        for name in names:
            assert hasattr(module, name), f"kernels/{file}.py has no {name}"
    text = "".join(ro.fuse_pointwise(as_function(case(*c), c[0])).source for c in CASES)
    for name in (name for names in HELPERS.values() for name in names):
        assert f"{name}(" in text, f"no operation needs {name}"
