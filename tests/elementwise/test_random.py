"""Random expressions, against eager PyTorch and its `retain_grad()` at every local name."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

import retainops as ro
from tests.conftest import Path

EXPRESSIONS = 200
MOST = 12  # operations in one expression
SHAPES = {"a": (3, 5), "b": (5,), "c": (3, 1), "d": ()}

FORMS = (  # with the number of operations in each
    *(
        (1, f"torch.{f}({{}})")
        for f in ("tanh", "sigmoid", "sin", "cos", "relu", "erf", "square", "abs", "neg", "expm1")
    ),
    *((1, f"F.{f}({{}})") for f in ("gelu", "silu", "softplus")),
    *((1, f"{{}} {o} {{}}") for o in "+-*" * 3),
    *((1, f"torch.{f}({{}}, {{}})") for f in ("maximum", "minimum")),
    (1, "torch.exp({})"),
    (1, "F.gelu({}, approximate='tanh')"),
    (1, "0.7 * {}"),
    (1, "{} + 1.25"),
    (1, "2 - {}"),
    (1, "{} / 3"),
    (1, "-{}"),
    (1, "{} ** 3"),
    (1, "{}.clamp(-0.75, 0.5)"),
    (1, "torch.lerp({}, {}, 0.3)"),
    (1, "torch.addcmul({}, {}, {}, value=0.5)"),
    (2, "torch.where({} > {}, {}, {})"),
    (2, "torch.where({} <= 0.25, {}, 0.5)"),
    (2, "{} * ({} >= {})"),
    (2, "{} / ({} * {} + 2)"),
    (2, "torch.log(torch.abs({}) + 1)"),
    (2, "torch.rsqrt({}.square() + 0.5)"),
    (2, "({} + {}) * {}"),
    (2, "torch.tanh({} - {})"),
    (3, "(torch.abs({}) + 0.5) ** -1.5"),
    (3, "torch.sqrt({} * {} + torch.exp({}))"),
    (3, "torch.where(({} < 0) & ~({} > 0.5), {}, {})"),
)


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for name, shape in SHAPES.items()
    }


def evaluate(lines: list[str], values: dict[str, Any]) -> dict[str, Any]:
    """The local names after these lines, in eager PyTorch."""
    local = dict(values)
    exec("\n".join(lines), {"torch": torch, "F": torch.nn.functional}, local)
    return local


def expression(seed: int) -> list[str]:
    """Lines of a function of a, b, c and d, with values of moderate size; the last one binds what it returns."""
    rng = random.Random(seed)
    names, lines, left = list(SHAPES), [], rng.randint(2, MOST)
    while left > 0:
        cost, form = rng.choice(FORMS)
        if cost > left:
            continue
        # The newer ones more often, so that expressions get deep.
        operands = [rng.choice(names[-3:] if rng.random() < 0.6 else names) for _ in range(form.count("{}"))]
        name = rng.choice(names[4:]) if len(names) > 6 and rng.random() < 0.15 else f"t{len(lines)}"
        line = f"{name} = {form.format(*operands)}"
        with torch.no_grad():
            new = evaluate([*lines, line], inputs())[name]
        if not (new.isfinite().all() and new.abs().max() < 30):
            continue
        left -= cost
        lines.append(line)
        names = [*(other for other in names if other != name), name]
    return lines


def function(lines: list[str], returns: str) -> Callable[..., Any]:
    """A function typed in: there is no file with its source."""
    body = "\n".join(f"    {line}" for line in [*lines, f"return {returns}"])
    namespace: dict[str, Any] = {"torch": torch, "F": torch.nn.functional}
    exec(f"def f({', '.join(SHAPES)}):\n{body}\n", namespace)
    return namespace["f"]


def interiors(local: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {
        name: x
        for name, x in local.items()
        if name not in SHAPES and isinstance(x, torch.Tensor) and x.requires_grad and not x.is_leaf
    }


@pytest.mark.parametrize("seed", range(EXPRESSIONS))
def test_random_expressions(kernels: Path, seed: int) -> None:
    lines = expression(seed)
    last = lines[-1].split(" = ")[0]
    values, ours = ({n: x.to(kernels.device).detach().requires_grad_() for n, x in inputs().items()} for _ in range(2))
    local = evaluate(lines, values)
    for x in interiors(local).values():
        x.retain_grad()
    dy = torch.randn(local[last].shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    dy = dy.to(kernels.device)
    local[last].backward(dy)
    reached = {name: x.grad for name, x in interiors(local).items() if x.grad is not None}

    fused = ro.fuse_pointwise(function(lines, last))
    assert set(fused.points) == set(reached)
    kept = ro.Retained(*fused.points)
    y = fused(**ours, retain=kept)
    y.backward(dy)
    pairs = [(y, local[last]), *((kept[name].grad, grad) for name, grad in reached.items())]
    pairs += [(ours[name].grad, x.grad) for name, x in values.items()]
    for mine, eagers in pairs:
        assert (mine is None) == (eagers is None)
        if mine is not None:
            scale = max(1.0, eagers.abs().max().item())
            torch.testing.assert_close(mine, eagers, rtol=0, atol=1e-11 * scale, msg="\n".join(lines))
