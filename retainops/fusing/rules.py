"""The rules for modules that come with retainops. The last one that fits gets a module: a user's own come first."""

from __future__ import annotations

import dis
import importlib
import importlib.util
import inspect
import re
import sys
from typing import Any

import torch
from torch import nn

from retainops.fusing import gated_norms, norms
from retainops.fusing._probe import same_norm
from retainops.fusing.loss import PATH, LMLoss
from retainops.fusing.loss_calls import CrossEntropyLoss
from retainops.fusing.norm_calls import calls_norm
from retainops.fusing.registry import Change, Part, fuse_rule
from retainops.nn.attention import MultiheadAttention

Verdict = Part | Change | str | None


@fuse_rule
def attention(module: nn.Module) -> Verdict:
    """A Hugging Face model's attention, where retainops has a backend for it."""
    name = "retainops.integrations.transformers"
    if not hasattr(type(module), "set_attn_implementation") or importlib.util.find_spec(name) is None:
        return None
    decide = getattr(importlib.import_module(name), "fuse_attention", None)
    return decide(module) if decide else None


@attention.undo
def undo_attention(module: nn.Module) -> str | None:
    """Give the model its own attention back."""
    undo = getattr(sys.modules.get("retainops.integrations.transformers"), "unfuse_attention", None)
    return undo(module) if undo else None


@fuse_rule
def lm_loss(module: Any) -> Verdict:
    """A Hugging Face model's `loss_function`, where it is that of a language model."""
    cls = type(module)
    if not isinstance(getattr(cls, "loss_function", None), property):
        return None
    names = inspect.unwrap(cls.forward).__code__.co_names
    if "loss_function" not in names:
        made = [name for name in names if name.endswith("Loss") and hasattr(nn, name)]
        if not made or nn.CrossEntropyLoss.__name__ in made:  # which is found in its code
            return None
        return f"its forward makes its loss itself, by {made[0]}"
    if isinstance(module._modules.get(PATH), LMLoss):
        return "already fused"
    function = module.loss_function
    shifts = {"ForCausalLMLoss": True, "ForMaskedLMLoss": False}.get(getattr(function, "__name__", ""))
    if shifts is None or function.__module__ != "transformers.loss.loss_utils":
        return f"its loss_function, {getattr(function, '__name__', function)}, is not that of a language model"
    if hasattr(module, PATH):
        return f"it has a '{PATH}' of its own"

    def apply() -> None:
        loss = LMLoss(function, shifts, vars(module).get("_loss_function"))
        module.add_module(PATH, loss)
        vars(module)["_loss_function"] = loss

    return Change("cross_entropy", apply)


@lm_loss.undo
def undo_lm_loss(module: Any) -> str | None:
    """Give the model its own loss back."""
    loss = module._modules.get(PATH)
    if not isinstance(loss, LMLoss):
        return None
    del module._modules[PATH]
    if vars(module).get("_loss_function") is loss:  # and not one that was set since
        del vars(module)["_loss_function"]
        if loss.was_set is not None:
            vars(module)["_loss_function"] = loss.was_set
    return "cross_entropy"


@fuse_rule
def cross_entropy_loss(module: nn.Module) -> Verdict:
    """torch.nn.CrossEntropyLoss."""
    kind = nn.CrossEntropyLoss
    if type(module) is not kind:
        return _overriding(module, kind) if type(module).forward is not kind.forward else None
    return CrossEntropyLoss if _has_own_forward(kind) else "the forward of torch.nn.CrossEntropyLoss was exchanged"


@fuse_rule
def softmax(module: nn.Module) -> Verdict:
    """torch.nn.Softmax and LogSoftmax."""
    part = {nn.Softmax: norms.Softmax, nn.LogSoftmax: norms.LogSoftmax}.get(type(module))
    if part is None:
        return _overriding(module, nn.Softmax, nn.LogSoftmax)
    if not _has_own_forward(type(module)):
        return f"the forward of torch.nn.{type(module).__name__} was exchanged"
    return "it has no dim" if module.dim is None else part


@fuse_rule
def multihead_attention(module: Any) -> Verdict:
    """torch.nn.MultiheadAttention."""
    kind = nn.MultiheadAttention
    if not isinstance(module, kind):
        return None
    if type(module).forward is not kind.forward:
        return _overriding(module, kind)
    return MultiheadAttention if _has_own_forward(kind) else "the forward of torch.nn.MultiheadAttention was exchanged"


@fuse_rule
def norm(module: Any) -> Verdict:
    """torch.nn's LayerNorm, RMSNorm and GroupNorm, and timm's."""
    known = (nn.LayerNorm, norms.LayerNorm), (nn.RMSNorm, norms.TorchRMSNorm), (nn.GroupNorm, norms.GroupNorm)
    for kind, part in known:
        if isinstance(module, kind):
            if type(module).forward is not kind.forward:
                if (ours := _of_timm(module)) is not None:
                    return _no_room(module.eps) or ours
                return None if has_norm_call(module) else _overriding(module, kind)
            if not _has_own_forward(kind):
                return f"the forward of torch.nn.{kind.__name__} was exchanged"
            shape: Any = getattr(module, "normalized_shape", (1,))
            if len(shape) != 1:
                return f"it is over several dims, {tuple(shape)}"
            return _no_room(module.eps) or part
    return None


def _no_room(eps: float | None) -> str | None:
    """What to say of an eps that PyTorch takes and the ops do not; None: they do."""
    return None if eps is None or eps > 0 else f"its eps is {eps}; the op takes one above 0"


_TIMMS: dict[str, Part] = {
    "LayerNorm": norms.LayerNorm,
    "LayerNorm2d": norms.LayerNorm2d,
    "GroupNorm": norms.GroupNorm,
    "GroupNorm1": norms.GroupNorm,
}
"""timm's own subclasses, whose forward is that of the base unless a flag is set."""


def _of_timm(module: Any) -> Part | None:
    cls = type(module)
    if cls.__module__ != "timm.layers.norm" or cls.__name__ not in _TIMMS or module._fast_norm:
        return None
    return _TIMMS[cls.__name__] if _has_own_forward(cls) else None


def has_norm_call(module: nn.Module) -> bool:
    """Whether a norm that a module's code calls is for a rule of code: not in the library's classes that `norm` knows,
    nor where timm's flag says that it is not called."""
    owner = next(c for c in type(module).__mro__ if "forward" in vars(c))
    known = {"torch.nn.modules.normalization": owner.__name__, "timm.layers.norm": owner.__name__ in _TIMMS}
    return not (known.get(owner.__module__) or getattr(module, "_fast_norm", False)) and calls_norm(module)


def _has_own_forward(cls: Any) -> bool:
    """Whether a library's class has the forward of its own file: nobody wrapped it or put another there."""
    code = getattr(cls.forward, "__code__", None)
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return code is not None and code.co_filename == file and not hasattr(cls.forward, "__wrapped__")


def _overriding(module: nn.Module, *kinds: Any) -> str | None:
    """What to say of a subclass of something that is known."""
    base = next((kind for kind in kinds if isinstance(module, kind)), None)
    return None if base is None else f"it overrides the forward of torch.nn.{base.__name__}"


@fuse_rule
def rms_norm(module: Any) -> Verdict:
    """The norm that a model brings itself, RMSNorm mostly: known by its name, its attributes, and what it computes."""
    cls = type(module)
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or not _NORMS.search(cls.__name__) or list(module.children()):
        return None
    if has_norm_call(module):  # that call is fused: autocast may make another dtype of what goes through it
        return None
    parameters = dict(module.named_parameters())
    held = (*parameters.values(), *module.buffers())
    if held and not any(p.dim() == 1 for p in parameters.values()):
        return None
    forwards = [c for c in cls.__mro__[:-1] if c is not nn.Module and "forward" in vars(c)]
    if len(forwards) > 1:
        return f"it overrides the forward of {forwards[1].__name__}"
    if len(held) > 1:
        return "it has more than a weight"
    if held and norms.weight_of(module) is None:
        return f"its weight is called {next(iter(parameters))}, and none of {', '.join(norms.WEIGHTS)}"
    more = list(inspect.signature(cls.forward).parameters)[2:]
    for gated in gated_norms.KINDS if more == ["gate"] else ():
        if same_norm(module, gated.plain, takes=2):
            return gated
    if more:
        return f"its forward takes more than its input: {', '.join(more)}"
    if any(step.opname in ("STORE_ATTR", "STORE_GLOBAL") for step in dis.get_instructions(inspect.unwrap(cls.forward))):
        return "its forward does more than to return a value"
    if not isinstance(eps := norms.epsilon(module), (int, float)):
        return f"it has no number as its {', '.join(norms.EPSILONS[:-1])} or {norms.EPSILONS[-1]}"
    if (why := _no_room(eps)) is not None:
        return why
    rounding = norms.LlamaRMSNorm, norms.GemmaRMSNorm, norms.RMSNorm, norms.UnitOffsetRMSNorm, norms.T5RMSNorm
    weighted = (*rounding, norms.CohereLayerNorm)
    kinds = weighted if held else (norms.WeightlessRMSNorm, norms.WeightlessLayerNorm)
    if (fits := next((kind for kind in kinds if same_norm(module, kind.plain)), None)) is not None:
        return fits
    if any(same_norm(module, kind.plain, (torch.float32,)) for kind in kinds):
        return "in 16 bits it rounds in other places than any norm of retainops"
    return "no norm of retainops computes what it does"


_NORMS = re.compile("(rms|layer)_?norm", re.IGNORECASE)


@fuse_rule
def quantised(module: Any) -> Verdict:
    """Layers whose weights are not the numbers that they stand for."""
    cls = type(module)
    weights = [p for p in module._parameters.values() if p is not None]
    for weight in weights:
        if not (weight.is_floating_point() or weight.is_complex()):
            return f"its weights are {weight.dtype}"
    kinds = (cls, type(weights[0]) if weights else object, *map(type, module.children()))
    quantises = [bool(_QUANTISES.search(kind.__module__)) for kind in kinds]
    if any(quantises[:2]) and all(quantises[2:]):
        return f"it is quantised, by {cls.__module__.partition('.')[0]}"
    return None


_QUANTISES = re.compile("quant|bitsandbytes|torchao")
