"""Attention that an object calls to which a module gives itself: `self.processor(self, x)`, as diffusers has it.

The object is no module, may be shared by several of them, and is exchanged at any time. It stays as it is: the module
calls a copy of its class's `__call__`, made from the source, in which the module's points are.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
from torch import nn

from retainops.fusing._classes import OF_FUSION
from retainops.fusing._code import called, keeps, rewritten, sites_in, wrappers
from retainops.fusing._patterns import Pattern, Site
from retainops.fusing.op_calls import ANY_CALL
from retainops.fusing.parts import ATTENTIONS, SDPA, Sdpa
from retainops.fusing.registry import fuse_rule

DIFFUSERS = "diffusers.models.attention_dispatch"
CALL = Pattern(ANY_CALL, "self.fused_sdpa(FN, *ARGS, **NAMED)")
GIVEN = 1
"""The number of the parameter of `__call__` that is the module."""


def calls_sdpa(function: Any) -> bool:
    """Whether it is PyTorch's attention, or comes to it."""
    if getattr(function, "__module__", None) == DIFFUSERS and DIFFUSERS in sys.modules:
        with contextlib.suppress(ImportError):  # of a version that has other names
            importlib.import_module("retainops.integrations.diffusers")
    return function is SDPA or (isinstance(function, FunctionType) and function in ATTENTIONS)


class ProcessorCall:
    """The `__call__` of a class of processors, and a copy whose attention is that of the module it is given.

    Attributes:
        kind, original: the class, and the function that it had.
        function: the copy.

    Raises:
        LookupError: the function cannot be made again.
    """

    def __init__(self, kind: Any) -> None:
        self.kind, self.original = kind, kind.__call__
        sites = tuple(_sites(kind))
        if not sites:
            raise LookupError("it calls no attention")
        if any(site.looped for site in sites):
            raise LookupError("its attention is in a loop, and its points would be of several calls")
        if not keeps(self.original, GIVEN):
            raise LookupError("its __call__ has no parameter that stays the module")
        self.function = rewritten(_functions(kind), sites, GIVEN)["__call__"]
        if wrappers(self.function) != wrappers(self.original):
            raise LookupError("its __call__ was wrapped since its class was made")

    def __deepcopy__(self, memo: Any) -> ProcessorCall:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return of_kind, (self.kind,)


def of_kind(kind: Any) -> ProcessorCall:
    """The one of a class as it is now."""
    return _of_kind(kind, kind.__call__)


@functools.cache
def _of_kind(kind: type, original: Any) -> ProcessorCall:
    return ProcessorCall(kind)


def _functions(kind: Any) -> tuple[tuple[str, Any], ...]:
    function = inspect.getattr_static(kind, "__call__", None)
    return (("__call__", function),) if isinstance(function, FunctionType) else ()


def _sites(kind: Any) -> Iterator[Site]:
    """Its calls of attention. Several are branches mostly, of which one runs."""
    for name, function in _functions(kind):
        for site in sites_in(((name, function),), CALL, owner=GIVEN):
            what = dict(site.called)["FN"]
            # What the module has by that name is not known here: several may share a processor.
            if not what.startswith("self.") and calls_sdpa(called(nn.Module(), function, what)):
                yield site


class Processed(Sdpa):
    """For a module whose attention a processor calls."""

    @staticmethod
    def adopt(module: nn.Module, *, PROCESSOR: Any) -> None:
        module.__dict__[KNOWN] = of_kind(type(PROCESSOR))

    def fused_processor(self, processor: Any, *args: Any, **named: Any) -> Any:
        """processor(self, *args, **named)."""
        known = self.__dict__.get(KNOWN)
        if known is not None and type(processor) is known.kind and known.kind.__call__ is known.original:
            return known.function(processor, self, *args, **named)
        if self._requests and torch.is_grad_enabled():
            raise RuntimeError(
                f"{type(self).__name__}: points of its attention are asked for, but its processor, "
                f"{type(processor).__name__}, is another one than when it was fused; call ro.unfuse(model) and "
                "ro.fuse(model) before asking"
            )
        return processor(self, *args, **named)


KNOWN = OF_FUSION + "processor"
"""Of a module, while it is fused: the `ProcessorCall` of the processor that it had."""


@fuse_rule(before="PROCESSOR(self, *ARGS, **NAMED)", after="self.fused_processor(PROCESSOR, *ARGS, **NAMED)")
def attention_processor(module: Any, PROCESSOR: Any) -> type[Processed] | str | None:
    """Attention that an object calls to which the module gives itself."""
    kind: Any = type(PROCESSOR)
    function = dict(_functions(kind)).get("__call__")
    is_module = isinstance(PROCESSOR, nn.Module) and type(PROCESSOR).forward is not nn.Module.forward
    if function is None or is_module:  # a whole module has points of its own
        return None
    if not any(_sites(kind)):
        code = getattr(inspect.unwrap(function), "__code__", None)
        scores = code is not None and "get_attention_scores" in code.co_names
        why = f"{kind.__name__} makes the probabilities itself; diffusers' AttnProcessor2_0 calls attention"
        return why if scores else None
    try:
        of_kind(kind)
    except LookupError as error:
        return f"of {kind.__name__}: {error}"
    return Processed
