"""clamp and its kin: who has the gradient where x is at a bound depends on the torch that is there.

Up to torch 2.13 it is x. From 2.14 on it is nobody if the bound is a number; x and a tensor have half each, as with
torch.maximum and torch.minimum.
"""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

import torch

from retainops.elementwise.step import Refused, Step

TIES_ARE_SHARED = torch.__version__ >= "2.14"


class Grads(NamedTuple):
    """Of x and the bounds, for each way to give them."""

    low: tuple[str, str]
    high: tuple[str, str]
    both: tuple[str, str, str]


TO_X = Grads(
    ("tl.where({0} >= {1}, {dy}, 0.0)", "tl.where({0} < {1}, {dy}, 0.0)"),
    ("tl.where({0} <= {1}, {dy}, 0.0)", "tl.where({0} > {1}, {dy}, 0.0)"),
    (
        "tl.where(({0} >= {1}) & ({0} <= {2}), {dy}, 0.0)",
        "tl.where(({0} < {1}) & ({1} < {2}), {dy}, 0.0)",
        "tl.where(({0} > {2}) | ({2} < {1}), {dy}, 0.0)",
    ),
)
TO_NOBODY = Grads(  # numbers, which have no gradient
    ("tl.where({0} > {1}, {dy}, 0.0)", "0.0"),
    ("tl.where({0} < {1}, {dy}, 0.0)", "0.0"),
    ("tl.where(({0} > {1}) & ({0} < {2}), {dy}, 0.0)", "0.0", "0.0"),
)
_AT_ONE = "({1} < {2}) & (({0} == {1}) | ({0} == {2}))"
TO_BOTH = Grads(  # a NaN among x and the bounds goes the way that eager's comparisons with it go
    ("maximum_grad({0}, {1}, {dy})", "maximum_grad({1}, {0}, {dy})"),
    ("minimum_grad({0}, {1}, {dy})", "minimum_grad({1}, {0}, {dy})"),
    (
        "tl.where({0} != {0}, {dy}, tl.where(({0} < {1}) | ({0} > {2}) | ({2} < {1}), 0.0, "
        f"tl.where({_AT_ONE}, 0.5 * {{dy}}, {{dy}})))",
        "tl.where(({0} < {1}) & ({1} <= {2}), {dy}, tl.where(({0} == {1}) & ({1} < {2}), 0.5 * {dy}, 0.0))",
        "tl.where(({2} < {1}) | (({0} > {2}) & ({1} <= {2})), {dy}, "
        "tl.where(({0} == {2}) & ({1} < {2}), 0.5 * {dy}, 0.0))",
    ),
)


def clamp(input: Any, min: Any = None, max: Any = None) -> Step:
    """The rule: both bounds are inclusive."""
    if min is None and max is None:
        raise Refused("give min or max")
    numbered = isinstance(min, numbers.Real) or isinstance(max, numbers.Real)
    grads = TO_X if not TIES_ARE_SHARED else TO_NOBODY if numbered else TO_BOTH
    if min is None:
        return Step((input, max), "minimum({0}, {1})", grads.high, "clamp({0}, max={1})", compares=True)
    if max is None:
        return Step((input, min), "maximum({0}, {1})", grads.low, "clamp({0}, {1})", compares=True)
    value = "minimum(maximum({0}, {1}), {2})"
    return Step((input, min, max), value, grads.both, "clamp({0}, {1}, {2})", compares=True)
