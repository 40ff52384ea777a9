"""The rules for code that come with retainops: what is found in the methods of modules, and what stands there then."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from retainops.fusing import norms, parts
from retainops.fusing import rotary as _rotary  # noqa: F401 - registers its rule
from retainops.fusing._classes import Fused
from retainops.fusing._probe import FUNCTIONS, recognised
from retainops.fusing.loss_calls import FUNCTION, MODULE, LossCall, why_not_once
from retainops.fusing.norm_calls import GROUP, LAYER, RMS, NormCall, is_norm
from retainops.fusing.op_calls import ANY_CALL
from retainops.fusing.processors import calls_sdpa
from retainops.fusing.registry import fuse_rule
from retainops.fusing.rules import Verdict, has_norm_call


@fuse_rule(before=ANY_CALL, after="self.fused_sdpa(FN, *ARGS, **NAMED)")
def sdpa(module: Any, FN: Any) -> Verdict:
    """A call of PyTorch's attention function, or of another that comes to it."""
    if not calls_sdpa(FN):
        return None
    if getattr(module, "fused_attn", True) is False:
        return "its fused_attn is False, with which timm's attention does not call it"
    return parts.Sdpa


@fuse_rule(before=ANY_CALL, after="self.fused_norm(FN, *ARGS, **NAMED)")
def functional_norm(module: Any, FN: Any) -> Verdict:
    """A call of PyTorch's layer_norm, rms_norm or group_norm."""
    return NormCall if is_norm(FN) and has_norm_call(module) else None


@fuse_rule(before=ANY_CALL, after="self.fused_loss(FN, *ARGS, **NAMED)")
def loss(module: Any, FN: Any) -> Verdict:
    """A cross entropy, by PyTorch's function or a module that is made here."""
    if FN is FUNCTION:
        return LossCall
    return (why_not_once(module) or LossCall) if FN is MODULE else None


NORMED = "self.fused_add_norm(self.NORM, X, Y)"
BLOCKS = [
    ("x = X + Y\n" + line.format("self.NORM(x)"), f"fused_normed, x = {NORMED}\n" + line.format("fused_normed"))
    for start in ("x = x + ", "return x + ")
    for line in (start + "self.F({})", start + "self.G(self.F({}))", start + "self.H(self.G(self.F({})))")
]
"""Blocks that norm first: from the sum after attention to that after the MLP, with what is around that."""

CROSSING = """
h = X + Y
if z is not None:
    CROSS_ATTENTION
    h = V + W
r = h
h = self.NORM(h)
"""
CROSSED = """
h = X, Y
if z is None:
    h, r = self.fused_add_norm(self.NORM, *h)
else:
    h = h[0] + h[1]
    CROSS_ATTENTION
    h, r = self.fused_add_norm(self.NORM, V, W)
"""
"""Blocks of decoders, which may have an encoder to attend to: the sum before the MLP is another one then."""


@fuse_rule(
    before=[
        CROSSING,
        "h = X + Y\nr = h\nh = self.NORM(h)",
        *(old for old, _ in BLOCKS),
        "h = X + Y\nu = self.NORM(h)",
        "h = X + Y\nreturn self.NORM(h)",
        "self.NORM(X + Y)",
    ],
    after=[
        CROSSED,
        f"h, r = {NORMED}",
        *(new for _, new in BLOCKS),
        f"h, u = {NORMED}[::-1]",  # in this order: u may be h
        f"fused_normed, h = {NORMED}\nreturn fused_normed",
        f"{NORMED}[0]",
    ],
)
def add_norm(module: Any, NORM: str) -> Verdict:
    """A sum and its norm."""
    fused = getattr(type(getattr(module, NORM, None)), "fused_parts", ())
    return parts.AddNorm if set(fused) & {*norms.OF_SUM, *norms.OF_SUM.values()} else None


@fuse_rule(
    before=[
        "h = self.LINEAR(X)\nh = ACT(h)",
        "h = self.LINEAR(X)\nh = ACT(h, approximate='tanh')",
        "h = self.LINEAR(X)\nreturn ACT(h)",
        "h = self.LINEAR(X)\nreturn ACT(h, approximate='tanh')",
        "ACT(self.LINEAR(X))",
        "ACT(self.LINEAR(X), approximate='tanh')",
    ],
    after=[
        "h = self.fused_bias_act(self.LINEAR, ACT, X)",
        "h = self.fused_bias_act(self.LINEAR, ACT, X, approximate='tanh')",
        "return self.fused_bias_act(self.LINEAR, ACT, X)",
        "return self.fused_bias_act(self.LINEAR, ACT, X, approximate='tanh')",
        "self.fused_bias_act(self.LINEAR, ACT, X)",
        "self.fused_bias_act(self.LINEAR, ACT, X, approximate='tanh')",
    ],
)
def bias_act(module: Any, LINEAR: str, ACT: Any) -> Verdict:
    """A linear layer with a bias and an activation, a module or a function."""
    linear: Any = getattr(module, LINEAR, None)
    name = recognised(ACT)
    if not isinstance(linear, nn.Module) or name not in parts.BIASED:
        return None
    # The weight of no other layer is looked at: a parametrized one is computed then, and that may change its state.
    weight: Any = linear.weight if parts.has_plain_product(linear) else None
    if weight is None or not weight.is_floating_point():
        linear_like = "linear" in type(linear).__name__.lower()
        return f"{LINEAR} is a {type(linear).__module__}.{type(linear).__name__}" if linear_like else None
    if linear.bias is None:
        return f"{LINEAR} has no bias to fuse with {name}"
    return parts.BiasAct


@fuse_rule(
    before=[
        "_g, u = X.chunk(2, dim=-1)\nu = u * ACT(_g)",
        "_g, u = X.chunk(2, dim=-1)\nu = ACT(_g) * u",
        "_a = ACT(self.GATE(X))\nb = Y\nc = _a * b",
        "ACT(self.GATE(X)) * Y",  # not ACT(X): Y could change X in place
        "ACT(X) * y",
        "Y * ACT(X)",
        "ACT(self.GATE(X), approximate='tanh') * Y",
        "ACT(X, approximate='tanh') * y",
        "Y * ACT(X, approximate='tanh')",
    ],
    after=[
        "u = self.fused_packed(ACT, X)",
        "u = self.fused_packed(ACT, X)",
        "_a = self.GATE(X)\nb = Y\nc = self.fused_gated(ACT, _a, b)",
        "self.fused_gated(ACT, self.GATE(X), Y)",
        "self.fused_gated(ACT, X, y)",
        "self.fused_gated(ACT, up=Y, gate=X)",
        "self.fused_gated(ACT, self.GATE(X), Y, approximate='tanh')",
        "self.fused_gated(ACT, X, y, approximate='tanh')",
        "self.fused_gated(ACT, up=Y, gate=X, approximate='tanh')",
    ],
)
def gated(module: Any, ACT: Any) -> Verdict:
    """act(gate) * up, in a gated MLP; act is a module or a function."""
    name = recognised(ACT) if callable(ACT) else None
    if name is None:
        return None
    if getattr(ACT, "inplace", False):
        return "it works in place, on a gate that may be used later"
    return parts.GatedUnit if name in parts.UNIT_OF else f"it is {name}, and there is no gated unit of it"


KNOWN: tuple[Any, ...] = (parts.SDPA, LAYER, RMS, GROUP, FUNCTION, MODULE, *FUNCTIONS)
NAMES = {function.__name__ for function in KNOWN}


def may_concern(module: nn.Module) -> bool:
    """Whether a rule for code might have found something in a forward, could that be read."""
    if any(isinstance(child, Fused) or recognised(child) for child in module.children()):
        return True
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and not NAMES.isdisjoint(code.co_names)
