"""An attention backend for Hugging Face transformers, whose scores and probabilities can be asked for.

Importing this module registers it: every model there that dispatches its attention takes `attn_implementation=
"retainops"`, and its attention modules then have the points s, p and o of `ro.attention`.
"""

from __future__ import annotations

import copy
import dis
import functools
import inspect
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from retainops.fusing import Change
from retainops.nn.attention import attend
from retainops.nn.guests import find_by, requests_of
from retainops.nn.point import tapped
from retainops.ops.attention import ATTENTION
from retainops.registry import Op

try:  # what output_attentions=True came to, in models that do not hand it on; private, and new in 5
    from transformers.utils.output_capturing import _active_collector
except ImportError:
    _active_collector = None

Tensor = torch.Tensor
NAME = "retainops"
DISPATCH = "ALL_ATTENTION_FUNCTIONS"
"""What the forward of a module calls its attention by, in all of transformers."""

REFUSED = {
    "sinks": "attention sinks of several keys",
    "indices": "keys chosen by an index",
    "block_indices": "blocks of keys chosen by an index",
}


def register(name: str = NAME) -> None:
    """Register the backend in transformers' registries of attention functions and of masks.

    Importing this module does it, under "retainops". Registering again changes nothing.

    Args:
        name: what `attn_implementation=` is to call it.

    Example:
        >>> import retainops.integrations.transformers
        >>> model = AutoModel.from_pretrained(path, attn_implementation="retainops")
        >>> with ro.retain(model, "*.self_attn.p", ro.Relevance("chefer")) as kept:
        ...     model(**inputs).logits[0, -1].max().backward()
        >>> kept["layers.0.self_attn.p"].chefer  # (batch, N, N)
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"register: name is {name!r}; expected a string, such as {NAME!r}")
    AttentionInterface.register(name, attention_forward)
    # Without a mask function of the same name transformers makes no mask at all: padding would be attended to.
    AttentionMaskInterface.register(name, sdpa_mask)
    _names.add(name)
    find_by(_op_of)


_names: set[str] = set()


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls: attention of (B, H, Nq, D) queries to (B, Hk, Nk, D) keys, for a module of its.

    Without softcap it is PyTorch's `scaled_dot_product_attention`, to which keys and values go unrepeated. Where the
    weights are to be returned (output_attentions=True), and with attention sinks, they are made in memory, as by
    "eager", and are in the graph: `outputs.attentions[i].retain_grad()` gives their gradient.

    Args:
        module: whose `ro.retain` requests are answered.
        attention_mask: boolean, True where a key takes part, or added; (B, 1 or H, Nq, Nk).
        is_causal: None: what the module says. It counts where there is no mask and more than one query.
        position_bias: (1 or B, H, Nq, Nk), added.
        s_aux: (H,), attention sinks, as gpt-oss has them: the score of one key more, of value 0. The points are of the
            keys alone, so that p adds up to less than 1.
        kwargs: the rest of what models hand over. A sliding window is in the mask already.

    Returns:
        The output, (B, Nq, H, D), and the weights, (B, H, Nq, Nk), after dropout, or None.

    Raises:
        NotImplementedError: keys chosen by an index, or sinks of several keys.
    """
    for given, what in REFUSED.items():
        if kwargs.get(given) is not None:
            raise NotImplementedError(
                f"{type(module).__name__}: {given}= is given, and attn_implementation={NAME!r} has no {what}; use "
                '"eager", and retain_grad() on outputs.attentions'
            )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(query.shape[2] > 1 and attention_mask is None and causal)
    if causal and key.shape[2] > query.shape[2]:
        # The first tokens of a cache of fixed length, whose rest is empty. Flash attention takes causality of as many
        # queries as keys alone.
        key, value = (t[:, :, : query.shape[2]] for t in (key, value))
        position_bias = None if position_bias is None else position_bias[..., : query.shape[2]]
    if position_bias is not None:
        attention_mask, causal = _with_bias(attention_mask, position_bias, causal), False
    grouped = key.shape[1] != query.shape[1]
    if grouped and attention_mask is not None and query.is_cuda:
        # The fused kernels for masks on CUDA do not take groups: PyTorch would go back to a matrix in memory.
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
        grouped = False
    inputs = (query, key, value, attention_mask, dropout, causal, scaling, grouped, softcap, None)
    wanted = _weights_are_wanted(module, kwargs)
    if not wanted and s_aux is None:
        return attend(inputs, requests_of(module)).transpose(1, 2).contiguous(), None
    out, weights = _with_weights(module, inputs, s_aux)
    return out.transpose(1, 2).contiguous(), weights if wanted else None


def _with_bias(mask: Tensor | None, bias: Tensor, causal: bool) -> Tensor:
    """A mask to be added, of a bias and of what hides keys."""
    if causal:
        mask = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).tril()
    if mask is None:
        return bias
    return bias.masked_fill(mask.logical_not(), -torch.inf) if mask.dtype == torch.bool else bias + mask


def _weights_are_wanted(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    if kwargs.get("output_attentions"):
        return True
    outside = torch.compiler.is_compiling() and not getattr(_active_collector, "compiling", True)
    if outside and not module._forward_hooks:
        # A layer that is compiled by itself, say: Dynamo cannot read what was set before. Weights are collected by a
        # hook on the module, which transformers adds when it is first asked for them.
        return _are_collected()
    return _collects_attentions()


def _collects_attentions() -> bool:
    collected = None if _active_collector is None else _active_collector.get()
    return collected is not None and any("attentions" in key for key in collected)


_are_collected = torch.compiler.assume_constant_result(_collects_attentions)


def _with_weights(module: nn.Module, inputs: tuple[Any, ...], sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """The output and the weights, by the definition, with what is asked of its points."""
    requests, dropout = requests_of(module), inputs[4]
    seen: dict[str, Tensor] = {}

    def point(name: str, value: Tensor) -> Tensor:
        if name == "p" and sinks is not None:
            value = _softmax_with(sinks, seen["s"])
        value = tapped(ATTENTION.name, name, value, requests)
        if name == "p" and dropout:
            value = F.dropout(value, dropout)
        seen[name] = value
        return value

    return ATTENTION.reference(*inputs[:4], 0.0, *inputs[5:], point), seen["p"]


def _softmax_with(sinks: Tensor, s: Tensor) -> Tensor:
    """Softmax of s (B, H, Nq, Nk) and of one score more for each head, without that one's share."""
    joined = torch.cat([s, sinks.view(-1, 1, 1).expand(*s.shape[:-1], 1)], -1)
    return torch.softmax(joined, -1)[..., :-1].to(s.dtype)


def _op_of(module: nn.Module) -> Op | None:
    """Attention, for a module that calls it through transformers' registry by our name; None for all others."""
    config, forward = getattr(module, "config", None), getattr(type(module), "forward", None)
    asks = getattr(config, "_attn_implementation", None) in _names
    return ATTENTION if asks and _dispatches(forward) else None


@functools.cache
def _dispatches(forward: Any) -> bool:
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return code is not None and DISPATCH in code.co_names


register()


def fuse_attention(model: Any) -> Change | str | None:
    """The rule of `ro.fuse`: this backend in the place of PyTorch's own, for a model that takes any.

    Its undoing is `unfuse_attention`.
    """
    had = getattr(model.config, "_attn_implementation", None)
    if had in _names:  # a model inside of one whose configuration it shares
        return None
    if not getattr(model, "_supports_attention_backend", False):
        if any(_dispatches(getattr(type(module), "forward", None)) for module in model.modules()):
            return f"its class does not say that any attention will do; if so, set_attn_implementation({NAME!r})"
        named = any("attention" in type(module).__name__.lower() for module in model.modules())
        return "its attention is not called through transformers' registry" if named else None
    if had == "eager":
        return (
            f"eager attention treats rows that see no key in its own way; set_attn_implementation({NAME!r}) if none do"
        )
    if had != "sdpa":
        return f"its attention is {had}, which somebody chose"
    for path, part in model.named_modules():  # a model may be of several, with a configuration each
        config = getattr(part, "config", None)
        if getattr(config, "attn_logit_softcapping", None) is not None:
            return "its softcap is left out by sdpa, and would not be by retainops"
        theirs = getattr(config, "_attn_implementation", had) if hasattr(part, "set_attn_implementation") else had
        if theirs != had and theirs not in _names:
            return f"that of {path} is {theirs}, and all of a model's attention is exchanged at once"
    kinds: dict[Any, None] = dict.fromkeys(type(module) for module in model.modules())
    if (asks := next(filter(_asks_for_sdpa, kinds), None)) is not None:
        return f"the code of {asks.__name__} compares its attention's name with sdpa and would find another"

    def apply() -> None:
        vars(model)[HAD] = had, _own_configs(model)
        try:
            model.set_attn_implementation(NAME)
        except BaseException:
            _give_back(model, vars(model).pop(HAD)[1])
            raise

    return Change("attention", apply)


@functools.cache
def _asks_for_sdpa(cls: Any) -> bool:
    """Whether the code of a module compares the name of its attention, as where it chooses keys for a kernel."""
    functions = (f for c in cls.__mro__ if c not in PreTrainedModel.__mro__ for f in vars(c).values() if callable(f))
    for code in (getattr(inspect.unwrap(f), "__code__", None) for f in functions):
        steps = [] if code is None or "_attn_implementation" not in code.co_names else [*dis.get_instructions(code)]
        for name, known, step in zip(steps, steps[1:], steps[2:], strict=False):
            compares = step.opname in ("COMPARE_OP", "CONTAINS_OP") and name.argval == "_attn_implementation"
            if compares and isinstance(known.argval, (str, tuple)) and "sdpa" in known.argval:
                return True
    return False


def unfuse_attention(model: Any) -> str | None:
    """Give a model the attention back that it had before `fuse_attention`, unless it was given another one since."""
    if HAD not in vars(model):
        return None
    had, configs = vars(model).pop(HAD)
    if model.config._attn_implementation not in _names:
        return None
    model.set_attn_implementation(had)
    _give_back(model, configs)
    return "attention"


Configs = list[tuple[str, str, Any]]
"""The path of a module, its attribute, and the configuration that it had there."""


def _own_configs(model: nn.Module) -> Configs:
    """Give a model a configuration of its own: another model may be made of the same one."""
    memo: dict[int, Any] = {}  # modules that share one share its copy, and parts of it stay parts
    had: Configs = []
    for path, module in model.named_modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig):
                had.append((path, name, value))
                vars(module)[name] = copy.deepcopy(value, memo)
    return had


def _give_back(model: nn.Module, configs: Configs) -> None:
    """The configurations from before, unless something was set in them or in those in their place."""
    modules = dict(model.named_modules())
    there = [(modules[path].__dict__, name, old) for path, name, old in configs if path in modules]
    if all(name in own and own[name].to_dict() == old.to_dict() for own, name, old in there):
        for own, name, old in there:
            own[name] = old


HAD = "_retainops_attention"
"""Of a model: the attention that it had, and its configurations."""
