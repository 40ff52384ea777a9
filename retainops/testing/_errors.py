"""How `check_op` measures: errors, the bar for them, and bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from retainops.testing._rounding import SCALE, Roundings
from retainops.testing._runs import Call, Dys, Quantities, Terms, cast, is_float

DRAWS = 4
"""In how many places (the inputs, and others near them) eager's error is measured."""

SUM_DEPTH = 64
"""How many additions one after another a sum may make: those of a tile of 64 rows, before tiles are added up."""


def error(x: torch.Tensor | None, oracle: torch.Tensor | None) -> float:
    """max |x - oracle| over the elements where both are finite; 0 where there is nothing to compare."""
    if x is None or oracle is None or x.shape != oracle.shape:
        return 0.0
    return largest(x.double() - oracle.double())


def largest(x: torch.Tensor) -> float:
    """The largest magnitude of a finite element; 0 if there is none."""
    finite = x[x.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def eager_errors(call: Call, dys: Dys, retain: Sequence[str], eager: Quantities) -> dict[str, float]:
    """Eager's error of each quantity, as `check_op` describes it: float64 ones in two other ways."""
    wide = [name for name, x in eager.items() if x is not None and x.dtype == torch.float64]
    errors = _largest_errors(call, dys, retain) if len(wide) < len(eager) else {}
    if wide:
        ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        narrow = _largest_errors(call.in_dtype(torch.float32), tuple(cast(dy, torch.float32) for dy in dys), retain)
        rounding = _rounding(call, dys, retain, eager)
        errors.update({name: max(narrow[name] * ratio, rounding[name]) for name in wide})
    return errors


def _largest_errors(call: Call, dys: Dys, retain: Sequence[str]) -> dict[str, float]:
    generator = torch.Generator().manual_seed(1)
    errors: dict[str, float] = {}
    for draw in range(DRAWS):
        here = call.with_inputs([_moved(x, generator) for x in call.inputs]) if draw else call
        grads = tuple(_moved(dy, generator) for dy in dys) if draw else dys
        eager = here.eager(grads, retain)
        oracle = here.in_dtype(torch.float64).eager(tuple(grad.double() for grad in grads), retain)
        for name, x in eager.items():
            errors[name] = max(errors.get(name, 0.0), error(x, oracle[name]))
    return errors


def _moved(x: Any, generator: torch.Generator) -> Any:
    """A floating-point tensor moved by up to four units in the last place, element by element."""
    if not is_float(x):
        return x
    steps = torch.randint(-4, 5, x.shape, generator=generator).to(x.device, x.dtype)
    return x.detach() * (1 + steps * torch.finfo(x.dtype).eps)


def _rounding(call: Call, dys: Dys, retain: Sequence[str], eager: Quantities) -> dict[str, float]:
    """What roundings do to eager's float64 results."""
    generator = torch.Generator().manual_seed(2)
    found = dict.fromkeys(eager, 0.0)
    for _ in range(DRAWS):
        with Roundings(generator):
            moved = call.eager(dys, retain)
        for name, x in eager.items():
            found[name] = max(found[name], SCALE * error(x, moved[name]))
    return found


def bar(eager: torch.Tensor, eager_error: float, oracle: torch.Tensor, terms: Terms | None) -> float:
    """What the error of a quantity may be, as `check_op` describes it."""
    info, held = torch.finfo(eager.dtype), torch.finfo(torch.promote_types(eager.dtype, torch.float32))
    unit = max(info.eps * max(largest(oracle), info.tiny), held.tiny)
    if terms is not None:
        unit += held.eps / 2 * math.sqrt(min(terms.n, SUM_DEPTH)) * largest(terms.magnitudes)
    return eager_error * (2 if eager.dtype == torch.float64 else 1) + unit


def misplaced(x: torch.Tensor, eager: torch.Tensor, oracle: torch.Tensor) -> int:
    """How many elements are NaN, infinite or finite where neither eager's nor the oracle's are."""
    same = torch.zeros_like(x, dtype=torch.bool)
    for other in (eager, oracle.to(eager.dtype)):
        same |= (x.isfinite() & other.isfinite()) | (x == other) | (x.isnan() & other.isnan())
    return int((~same).sum())


def same_bits(x: torch.Tensor | None, y: torch.Tensor | None) -> bool:
    """Whether two tensors are equal in every bit, signs of zeros among them."""
    if x is None or y is None:
        return x is y
    return x.shape == y.shape and x.dtype == y.dtype and torch.equal(_bytes(x), _bytes(y))


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
