"""Gated units: y = act * up, act = f(gate), of two tensors or of the halves of one. docs/ops/gated.md derives them.

Source: Shazeer 2020, GLU Variants Improve Transformer (arXiv 2002.05202); Dauphin et al. 2017 (arXiv 1612.08083).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from retainops.dispatch import run
from retainops.ops._check import check_elementwise, check_tensor
from retainops.ops._pointwise import Maths, Pointwise, functions_of, normal, pointwise
from retainops.ops.pointwise import UNARY
from retainops.registry import Op, Point, PointInfo
from retainops.retained import Retained

Tensor = torch.Tensor


def swiglu(
    gate: Tensor, up: Tensor | float | None = None, *, gate_first: bool = True, retain: Retained | None = None
) -> Tensor:
    """silu(gate) * up in one kernel: the gated unit of LLaMA, with its interiors' gradients on request.

    Args:
        gate: tensor of any floating dtype, layout and device; without `up`, the packed tensor of shape (..., 2n), whose
            halves are gate and up. They are not copied, and one gradient of shape (..., 2n) is written.
        up: tensor whose shape broadcasts with gate's, or a number.
        gate_first: of a packed tensor: whether gate is the first half.
        retain: `Retained("act")` to keep the gradient of the loss with respect to act = silu(gate); of a packed
            tensor "gate" and "up" are points too.

    Returns:
        silu(gate) * up, of the broadcast shape (packed: (..., n)) and the promoted dtype. Interiors are held in float32
        (float64 for float64).

    Raises:
        TypeError: gate is not a tensor, up neither a tensor nor a number, or `retain` is not a `Retained`.
        ValueError: the last dim of a packed tensor is odd.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names a point that there is not.

    Points:
        act = silu(gate), of gate's shape; packed: gate and up, of shape (..., n).

    Example:
        >>> kept = ro.Retained("act")
        >>> ro.swiglu(gate, up, retain=kept).sum().backward()
        >>> kept.act.grad  # up
    """
    return _call("swiglu", gate, up, gate_first, retain)


def geglu(
    gate: Tensor,
    up: Tensor | float | None = None,
    *,
    approximate: str = "none",
    gate_first: bool = True,
    retain: Retained | None = None,
) -> Tensor:
    """gelu(gate) * up in one kernel, as `swiglu` in all else.

    Args:
        gate, up, gate_first, retain: as of `swiglu`.
        approximate: "none" (by erf) or "tanh", as of `torch.nn.functional.gelu`.

    Raises:
        ValueError: another `approximate`; the last dim of a packed tensor is odd.

    Points:
        act = gelu(gate); packed: gate and up.

    Example:
        >>> ro.geglu(gate, up, approximate="tanh")
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f'geglu: approximate is {approximate!r}; expected "none" or "tanh"')
    return _call("geglu" if approximate == "none" else "geglu_tanh", gate, up, gate_first, retain)


def reglu(
    gate: Tensor, up: Tensor | float | None = None, *, gate_first: bool = True, retain: Retained | None = None
) -> Tensor:
    """relu(gate) * up in one kernel, as `swiglu` in all else.

    Points:
        act = relu(gate); packed: gate and up.

    Example:
        >>> ro.reglu(gate, up)
    """
    return _call("reglu", gate, up, gate_first, retain)


def glu(
    gate: Tensor, up: Tensor | float | None = None, *, gate_first: bool = False, retain: Retained | None = None
) -> Tensor:
    """sigmoid(gate) * up in one kernel, as `swiglu` in all else.

    A packed tensor is taken as by `torch.nn.functional.glu`, whose gate is the *second* half.

    Points:
        act = sigmoid(gate); packed: gate and up.

    Example:
        >>> ro.glu(x)  # torch.nn.functional.glu(x)
    """
    return _call("glu", gate, up, gate_first, retain)


def _call(name: str, gate: Any, up: Any, gate_first: bool, retain: Retained | None) -> Tensor:
    if up is None:
        return _call_packed(name, gate, gate_first, retain=retain)
    check_tensor(name, gate=gate)
    check_elementwise(name, gate=gate, up=up)
    return run(GATED[name], (gate, up), retain)


def _call_packed(name: str, x: Any, gate_first: bool, *, retain: Retained | None = None) -> Tensor:
    check_tensor(name, gate=x)
    halves(name, x, gate_first)
    return run(PACKED[name], (x, gate_first), retain)


def halves(op: str, x: Tensor, gate_first: bool) -> tuple[Tensor, Tensor]:
    """(gate, up) of a packed tensor: views of it."""
    if x.dim() == 0 or x.shape[-1] % 2:
        raise ValueError(
            f"{op}: without up, gate is the packed tensor, and its shape is {tuple(x.shape)}; expected an even last "
            "dim, (..., 2n), whose halves are gate and up"
        )
    first, second = x.chunk(2, dim=-1)
    return (first, second) if gate_first else (second, first)


class Packed(Pointwise):
    """A gated unit of (packed tensor, gate_first): its kernels read and write the halves where they are."""

    def __init__(self, op: str, maths: Maths, narrow: Maths) -> None:
        super().__init__(maths, grads=2, narrow=narrow)
        self.op = op

    def operands(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        return halves(self.op, *inputs)

    def gradients(self, inputs: Sequence[Any], shape: torch.Size, needed: Sequence[bool]) -> tuple[Any, ...]:
        from retainops.ops._operands import Grad

        x, gate_first = inputs
        dx = torch.empty_like(x) if needed[0] else x  # then only a shape
        parts = zip(halves(self.op, x, gate_first), halves(self.op, dx, gate_first), strict=True)
        return tuple(Grad(half, shape, needed[0], into, whole=dx) for half, into in parts)

    def returned(self, grads: Sequence[Any], inputs: Sequence[Any]) -> list[Tensor | None]:
        return [grads[0].whole if grads[0].needed else None, None]


def _gated(name: str, unary: str) -> Op:
    formula, f = UNARY[unary]
    formula = formula.format("gate")

    def reference(gate: Any, up: Any, point: Point) -> Tensor:
        act = point("act", f(gate))
        return act * up

    return pointwise(
        CALLS[name],
        f"{formula} * up",
        reference,
        Pointwise(_maths("gated", name, unary), grads=2, narrow=_maths("gated", name, unary, narrow=True)),
        name=name,
        points=[PointInfo("act", formula, "of gate", inputs=(0,))],
        sample=normal(2),
    )


def _packed(name: str, unary: str) -> Op:
    formula, f = UNARY[unary]
    formula = formula.format("gate")

    def reference(x: Any, gate_first: bool, point: Point) -> Tensor:
        gate, up = halves(name, x, gate_first)
        gate, up = point("gate", gate), point("up", up)
        act = point("act", f(gate))
        return act * up

    interiors = {"gate": "a half of x", "up": "the other half of x", "act": formula}
    return pointwise(
        functools.partial(_call_packed, name),
        f"{formula} * up, x = (gate, up)",
        reference,
        Packed(name, _maths("packed", name, unary), narrow=_maths("packed", name, unary, narrow=True)),
        name=f"{name}_packed",
        points=[PointInfo(point, value, "(..., n) of (..., 2n)") for point, value in interiors.items()],
        sample=normal(1, name != "glu"),
    )


def _maths(form: str, name: str, unary: str, narrow: bool = False) -> Maths:
    def make() -> tuple[Any, Any]:
        from retainops.kernels import gated

        f, f_grad = functions_of("unary", unary, f"{unary}_grad", narrow=narrow)
        return getattr(gated, form)(name, f, f_grad)

    return make


UNITS = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu", "glu": "sigmoid"}
"""From the name of a unit to that of its f."""

CALLS: dict[str, Callable[..., Tensor]] = {
    "swiglu": swiglu,
    "geglu": geglu,
    "geglu_tanh": functools.partial(geglu, approximate="tanh"),
    "reglu": reglu,
    "glu": glu,
}
GATED = {name: _gated(name, unary) for name, unary in UNITS.items()}
PACKED = {name: _packed(name, unary) for name, unary in UNITS.items()}
