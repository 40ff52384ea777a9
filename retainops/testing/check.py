"""Check an op against eager PyTorch and a float64 oracle: values, gradients, retained gradients, bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from retainops import registry
from retainops.testing._errors import bar, eager_errors, error, misplaced, same_bits
from retainops.testing._runs import Call, Dys, Quantities, Terms, name_of, several
from retainops.testing.layouts import check_layouts
from retainops.testing.report import Report, Row

__all__ = ["Report", "Row", "check_layouts", "check_op"]

SEED = 20060609661
"""Of the default dy: not a seed that the inputs may have come from, which would make it equal to one of them."""


def check_op(
    op: Callable[..., Any] | str,
    *inputs: Any,
    retain: Sequence[str] | None = None,
    dy: torch.Tensor | Dys | None = None,
    reference: Callable[..., torch.Tensor] | None = None,
) -> Report:
    """Compare an op with its definition run by eager PyTorch, at the inputs given.

    Compared are the output, the gradient of every input, and the gradient of every point (with what `retain_grad()`
    gives there). For each of them:

    - its shape, its dtype and, for the output, its strides are eager's;
    - it is NaN or infinite where eager's is, or where the oracle is once rounded to its dtype, and nowhere else;
    - **error <= eager's error + one unit in the last place**: an error is max |x - oracle| over finite elements, and
      the oracle is the reference in float64 on the same inputs.

    And for the op as a whole: no input is written to; the output and the inputs' gradients are equal bit by bit with
    retention on, off, and of each point alone; two runs are equal bit by bit, retained gradients too.

    Why this bar. An op of as many roundings as eager's has them in other places, so it may be better or worse by
    luck: by one rounding, not by more. The unit is taken where max |x - oracle| is reached for a rounding error, at
    the oracle's largest magnitude m: eps * m (of a subnormal m, the spacing of subnormals; and no less than float32's
    smallest normal number, since GPUs may flush what is below). To the unit of a gradient that is summed over
    broadcast dims is added what the order of the sum may change, in the dtype it is held in: n additions one after
    another of terms t are off by (eps / 2) * sqrt(n) * sum |t| (Higham and Mary 2019, SIAM J. Sci. Comput. 41(5)),
    where n is the number of terms, or 64 if that is less, since kernels and PyTorch sum in blocks.

    How eager's error is measured. With few elements, or one sum over many, it too is a matter of luck; so it is the
    largest of 4 measurements, at the inputs and at copies moved by up to four units in the last place. In float64,
    eager is its own oracle. There its error is the larger of two estimates: that of the same expression in float32,
    scaled by the ratio of the two dtypes' eps (the same roundings in the same places); and what it does to the result
    to round each operation inside it more coarsely, scaled likewise (where a function saturates, as in 1 - tanh^2,
    what cancels does so further out, the smaller eps is). It counts twice, since one rounded result is compared with
    another.

    The output of attention and the gradients of its inputs are those of a kernel of PyTorch's own, which lays out and
    sums otherwise than the definition: no strides are compared there, and the bar is four times as high. So it is for
    its scores, in whose gradient large terms cancel.

    What it cannot see: an error in elements far smaller than the largest one. Give it inputs of like magnitudes.

    Args:
        op: a function of retainops, its name, or a function of yours that is called `op(*inputs, retain=kept)`.
        *inputs: tensors of any layout, and numbers, as the op takes them. If some require grad, those are
            differentiated; otherwise all floating-point tensors are.
        retain: names of the points to check; default: all that the reference has. With `()` the op is called without
            `retain=`, so a function that knows nothing of points can be checked too.
        dy: the gradient of the output, in any layout; of several, a tuple of them; default: random numbers, the same
            ones each time.
        reference: for a function of yours, its definition in plain PyTorch, `reference(*inputs, point)`, in which
            `c = point("c", a * b)` names an interior value. It must compute in the dtype of its inputs, or wider.

    Returns:
        A `Report`: `.ok`, `.rows`, and a table as its `str`.

    Raises:
        KeyError: `op` is not an op of retainops and there is no `reference=`.
        TypeError: no input is a floating-point tensor, or the op returned something else than a tensor or a tuple
            of them.
        ValueError: `retain` names a point that the reference does not have, or `dy` is not of the output's shape.
        Exception: whatever eager PyTorch raises at these inputs.

    Example:
        >>> a, b = torch.randn(64, 96), torch.randn(96)
        >>> print(check_op(ro.mul_sin, a, b))
        >>> assert check_op(my_op, a, b, reference=my_reference).ok
    """
    if reference is None:
        record = registry.find(op)
        op, reference, name = record.call, record.reference, record.name
    else:
        name = name_of(op)
    if not callable(op):
        raise TypeError(f"check_op: op is {type(op).__name__}; expected a function, since reference= is given")
    by_pytorch = any(o.reference is reference and o.kind == "attention" for o in registry.ops())
    call = Call(reference, inputs)
    if not any(call.needed):
        raise TypeError(f"check_op: no input of {name} is a floating-point tensor; there is no gradient to check")
    retain = _chosen(name, call.points(), retain)
    outputs = [y for name, y in call.eager(None, ()).items() if name.startswith("y")]
    dys = _checked_dys([y for y in outputs if y is not None], dy)

    given = [x for x in (*inputs, *dys) if isinstance(x, torch.Tensor)]
    before = [x.detach().clone() for x in given]
    run = call.fused(op, dys, retain)
    differing = _differing_bits(call, op, dys, retain, run)
    intact = all(same_bits(x, was) for x, was in zip(given, before, strict=True))
    written = () if intact else ("an input or dy was written to",)
    return Report(
        op=name,
        inputs=", ".join(_described(n, x) for n, x in zip(call.names, inputs, strict=True)),
        rows=tuple(_rows(call, dys, retain, run, by_pytorch)),
        bitwise=not differing,
        problems=(*(f"other bits {when}: {', '.join(names)}" for when, names in differing.items()), *written),
        differing=tuple(name for name in run if any(name in names for names in differing.values())),
        intact=intact,
    )


def _chosen(name: str, points: tuple[str, ...], retain: Sequence[str] | None) -> tuple[str, ...]:
    unknown = [p for p in retain or () if p not in points]
    if unknown:
        raise ValueError(f"check_op: the reference of {name} has no point {unknown[0]!r}; it has: {', '.join(points)}")
    return points if retain is None else tuple(p for p in points if p in retain)


def _checked_dys(outputs: Sequence[torch.Tensor], dy: torch.Tensor | Dys | None) -> Dys:
    if dy is None:
        generator = torch.Generator().manual_seed(SEED)
        drawn = (torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in outputs)
        return tuple(d.to(y.device, y.dtype) for d, y in zip(drawn, outputs, strict=True))
    dys = several(dy)
    if [d.shape for d in dys] != [y.shape for y in outputs]:
        given, expected = (" and ".join(str(tuple(t.shape)) for t in ts) for ts in (dys, outputs))
        raise ValueError(f"check_op: dy has shape {given}; expected the output's, {expected}")
    return dys


def _differing_bits(
    call: Call, op: Callable[..., Any], dys: Dys, retain: tuple[str, ...], run: Quantities
) -> dict[str, list[str]]:
    """What differs in its bits between runs that must be equal, by when it does."""
    others = {"in a second run": retain}
    if len(retain) > 1:
        others |= {f"with only {p} retained": (p,) for p in retain}
    if retain:
        others["without retention"] = ()
    found = {}
    for when, points in others.items():
        other = call.fused(op, dys, points)
        if differ := [name for name, x in other.items() if not same_bits(run[name], x)]:
            found[when] = differ
    return found


def _rows(call: Call, dys: Dys, retain: tuple[str, ...], run: Quantities, by_pytorch: bool) -> list[Row]:
    eager = call.eager(dys, retain)
    oracle = call.in_dtype(torch.float64).eager(tuple(dy.double() for dy in dys), retain)
    errors, terms = eager_errors(call, dys, retain, eager), call.terms(dys, retain)
    kinds = {**{name: "output" for name in run if name.startswith("y")}, **{call.label(p): "point" for p in retain}}
    return [
        _row(name, kinds.get(name, "input"), x, eager[name], errors[name], oracle[name], terms.get(name), by_pytorch)
        for name, x in run.items()
    ]


def _row(
    name: str,
    kind: str,
    x: torch.Tensor | None,
    eager: torch.Tensor | None,
    eager_error: float,
    oracle: torch.Tensor | None,
    terms: Terms | None,
    by_pytorch: bool,
) -> Row:
    if x is None or eager is None or oracle is None:
        problems = [] if x is eager else ["None; eager has a gradient" if x is None else "eager has no gradient here"]
        return Row(name, kind, 0.0, 0.0, 0.0, tuple(problems))
    mine, allowed = error(x, oracle), bar(eager, eager_error, oracle, terms)
    if by_pytorch and (kind != "point" or name == "ds"):
        allowed *= 4
    problems = _unlike(x, eager, kind == "output" and not by_pytorch)
    if x.shape == eager.shape:
        if mine > allowed:
            problems.append(f"error {mine:.2e} is above the bar {allowed:.2e}")
        if count := misplaced(x, eager, oracle):
            problems.append(f"{count} elements are NaN, infinite or finite where eager's are not")
    return Row(name, kind, mine, eager_error, allowed, tuple(problems))


def _unlike(x: torch.Tensor, eager: torch.Tensor, strides: bool) -> list[str]:
    """Shape, dtype and, if they matter, strides that are not eager's, in words."""
    if x.shape != eager.shape:
        return [f"shape {tuple(x.shape)}; eager's is {tuple(eager.shape)}"]
    problems = []
    if x.dtype != eager.dtype:
        problems.append(f"{x.dtype}; eager's is {eager.dtype}")
    # The stride of a dim of one element, or of a tensor without any, says nothing.
    moving = [d for d, size in enumerate(x.shape) if size > 1] if x.numel() else []
    if strides and any(x.stride(d) != eager.stride(d) for d in moving):
        problems.append(f"strides {x.stride()}; eager's are {eager.stride()}")
    return problems


def _described(name: str, x: Any) -> str:
    if not isinstance(x, torch.Tensor):
        return f"{name}={x!r}"
    strides = "" if x.is_contiguous() else f" strides {x.stride()}"
    return f"{name}: {str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}{strides}"
