"""Whole models: which points their modules hold, and asking for them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from retainops.buffers import check_apart
from retainops.names import listed
from retainops.nn.guests import Holder, holders
from retainops.nn.point import Point
from retainops.ops._check_attention import misfit
from retainops.patterns import Patterns, choose, matchers_of
from retainops.points import PointTable
from retainops.points import points as points_of_op
from retainops.registry import Op, PointInfo
from retainops.retained import Retained, aligned
from retainops.slots import Slot
from retainops.wants import Want, is_of_attention

# Wrappers are no part of the model: torch.compile's, a checkpoint's and a shard's. The names are those without them.
WRAPPED = ("", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
WRAPPERS = ("OptimizedModule", "DistributedDataParallel", "CheckpointWrapper", "FullyShardedDataParallel")


@dataclass(frozen=True)
class ModelPoint:
    """One point of a model.

    Attributes:
        name: the module's path, and the point's name where the module has several.
        formula: the value, in the symbols of the op.
        shape: in words.
        where: the class of the module, and of the one that holds it.
        holder: the module, or of one of another library what stands in for it.
        info: the point as the module knows it.
    """

    name: str
    where: str
    holder: Holder
    info: PointInfo

    @property
    def formula(self) -> str:
        return self.info.formula

    @property
    def shape(self) -> str:
        return self.info.shape


class ModelPoints(Mapping[str, ModelPoint]):
    """The points of a model, in the order of its modules: a mapping from name to `ModelPoint`; its repr is a table."""

    def __init__(self, model: nn.Module) -> None:
        self._model = type(_original(model)).__name__
        self._points: dict[str, ModelPoint] = {}
        for p in _points_in(model):
            if p.name in self._points:
                raise ValueError(
                    f"{self._model}: two points are called '{p.name}', {self._points[p.name].where}'s and {p.where}'s; "
                    "rename the module that holds one of them"
                )
            self._points[p.name] = p

    def __getitem__(self, name: str) -> ModelPoint:
        return self._points[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._points)

    def __len__(self) -> int:
        return len(self._points)

    def __repr__(self) -> str:
        rows = [(p.name, p.formula, f"({p.shape})", p.where) for p in self._points.values()]
        if not rows:
            return f"{self._model}: no points"
        return "\n".join([f"{self._model}:", *aligned(rows)])


def points(of: Callable[..., Any] | str | nn.Module) -> PointTable | ModelPoints:
    """What can be asked for in an op, or in a model: each point's name, formula and shape.

    Args:
        of: a function of retainops, its name, or a model: compiled or not.

    Raises:
        KeyError: not an op of retainops; the message lists them.

    Example:
        >>> ro.points(ro.mul_sin)
        mul_sin: sin(a * b)
          c = a * b   (broadcast of a and b)
        >>> ro.points(nn.Sequential(ro.nn.Point(), ro.nn.MulSin(30.0)))
        Sequential:
          0    x      (of its input)           Point in Sequential
          1.c  a * b  (broadcast of a and b)  MulSin in Sequential
    """
    return ModelPoints(of) if isinstance(of, nn.Module) else points_of_op(of)


def retain(model: nn.Module, what: Patterns = "*", want: Want = None) -> Retaining:
    """Ask for the gradients of a model's points, its code unchanged: they land in the `Retained` that this gives.

    The points are every `ro.nn.Point` by its module's path ("layers.0.act"), and every point of an op held by a module
    by path and name ("layers.0.sine.c"); `ro.points(model)` lists them. Run forward inside the `with`; backward may
    come after it, unless it runs forward again: with gradient checkpointing keep both inside. A module that is called
    without grad is left alone, and so is a point that no gradient reaches, as xhat of a norm of data. The model may be
    compiled, before or inside: each different set of points is one more graph (`torch._dynamo.config.recompile_limit`),
    kept for the next time.

    Args:
        model: any module; requests are held by its own modules alone, so other models see nothing. Threads that run
            the same model see them.
        what: a glob pattern of names ("*" crosses dots), a sequence of them, a callable on the name, or a mapping
            from pattern to want (of several patterns that match a name, the last one counts: general ones first).
        want: in what form: None (the gradient), `Stats(...)`, of points of attention `Part(...)` and `Relevance(...)`,
            or, of a single point, `Into(buffer)`.

    Returns:
        For a `with` statement, whose `as` is a mapping from name to `Slot`. It stays valid after the `with`. What is
        wrong is raised where that is entered. If all that it asks was called without grad, it warns at its end.

    Raises:
        TypeError: `model` is not a module, or the patterns or wants are of another type.
        ValueError: the model has no points, an `Into` is for several points, two of them share memory (unless both add,
            in different modules), a pattern of a mapping decides nothing, or want is given twice.
        KeyError: a pattern matches nothing; the message lists the names there are.

    Example:
        >>> with ro.retain(model, "layers.*.mlp.*", ro.Stats("l2")) as kept:
        ...     loss_of(model(x)).backward()
        >>> kept["layers.3.mlp.act"].l2
    """
    return Retaining(model, what, want)


class Retaining(contextlib.AbstractContextManager[Retained], contextlib.ContextDecorator):
    """What `retain` gives: the request is made, and the model asked, when the `with` is entered."""

    def __init__(self, model: nn.Module, what: Patterns, want: Want) -> None:
        self._arguments = model, what, want
        self._entered: list[Asked] = []

    def _recreate_cm(self) -> Retaining:
        """For each call of a function that it decorates: calls in two threads may end in any order."""
        return Retaining(*self._arguments)

    def __enter__(self) -> Retained:
        asked = Asked("retain", *self._arguments)
        asked.on()
        self._entered.append(asked)
        return asked.kept

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asked = self._entered.pop()
        asked.off()
        if kind is None and (names := asked.without_grad()):
            warnings.warn(
                f"retain: every call of {listed(names, 5)} was without grad, so nothing was kept (unless by a compiled "
                "call, which is not seen here); call the model where gradients are enabled, and with a reentrant "
                "checkpoint run backward inside the with, too",
                RuntimeWarning,
                stacklevel=2,
            )

    def __getitem__(self, name: str) -> NoReturn:
        raise TypeError(f"retain: {_USE_WITH}")

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"retain has no attribute '{name}': {_USE_WITH}")


_USE_WITH = (
    "use it in a with statement, whose `as` holds the gradients: with ro.retain(model, ...) as kept: "
    "loss_of(model(x)).backward()"
)


class Asked:
    """A request of a model's points, which its modules hold while it is on.

    Args:
        who: whom errors name.
        model, what, want: as of `retain`.

    Attributes:
        kept: the slots, by the names of the points.
    """

    def __init__(self, who: str, model: nn.Module, what: Patterns = "*", want: Want = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"{who}: model is {type(model).__name__}; expected a torch.nn.Module")
        self._who = who
        there = ModelPoints(model)
        if not there:
            more = ""
            if hasattr(_original(model), "set_attn_implementation"):
                more = (
                    "; for its attention, import retainops.integrations.transformers and call "
                    'model.set_attn_implementation("retainops")'
                )
            raise ValueError(
                f"{who}: {type(_original(model)).__name__} has no points; call ro.fuse(model), which makes points of "
                "what it knows, and with outputs=... of what any module returns, put ro.nn.Point() where a gradient is "
                f"wanted, or use modules of retainops.nn{more}"
            )
        wants = choose(who, list(there), matchers_of(who, what, want), isinstance(what, Mapping))
        for name, wanted in wants.items():
            _check_kind(who, there[name], wanted)
        check_apart(who, wants, {name: there[name].holder for name in wants})
        slots = {name: Slot(name, wants[name]) for name in there if name in wants}
        requests: dict[Holder, dict[str, Slot]] = {}
        for name, slot in slots.items():
            requests.setdefault(there[name].holder, {})[there[name].info.name] = slot
        self._of_holders = [(of, Retained.of(of_holder)) for of, of_holder in requests.items()]
        self.kept = Retained.of(slots)

    def on(self) -> None:
        """From here on the modules hold the request."""
        try:
            for of, request in self._of_holders:
                if not isinstance(of, Holder):
                    raise RuntimeError(f"{self._who}: a {type(of).__name__} holds no points any more; ask anew")
                of.ask(request)
        except BaseException:  # all of them, or none
            self.off()
            raise

    def off(self) -> None:
        """The modules are as they were, but for what others ask of them. Off already: nothing happens."""
        for of, request in self._of_holders:
            if isinstance(of, Holder):  # and not a module that was unfused since
                of.cease(request)

    def without_grad(self) -> list[str]:
        """The points that eager code called, if it did so without grad alone, so that nothing came and nothing will."""
        if any(slot.shape is not None or slot._arrival is not None for slot in self.kept.values()):
            return []
        requests = [request for _, request in self._of_holders]
        if any(request.with_grad for request in requests):
            return []
        return [slot.name for request in requests if request.without_grad for slot in request.values()]


def _original(module: nn.Module) -> nn.Module:
    """What torch.compile or DistributedDataParallel wrapped, or the module itself."""
    while True:
        inner = getattr(module, "_orig_mod", module.module if isinstance(module, DistributedDataParallel) else module)
        if inner is module:
            return module
        module = inner


def modules_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model and their paths, as the names of points have them: wrappers are no part of those."""
    for path, module in _original(model).named_modules():
        yield ".".join(part for part in path.split(".") if part not in WRAPPED), module


def _points_in(model: nn.Module) -> Iterator[ModelPoint]:
    parent_of = {child: type(parent).__name__ for parent in model.modules() for child in parent.children()}
    for path, module in modules_of(model):
        for of in holders(module):
            kind, parent = type(module).__name__, parent_of.get(module)
            where = kind if parent in (None, *WRAPPERS) else f"{kind} in {parent}"
            for info in of.point_infos():
                yield ModelPoint(".".join(filter(None, (path, info.name))), where, of, info)


def _check_kind(who: str, point: ModelPoint, want: Want) -> None:
    """What is for points of attention fails here, where the point is known to be another one, not in forward."""
    if not is_of_attention(want):
        return
    op = _op_of(point)
    asked = f"{who}: point '{point.name}' was asked for {want}"
    if op is not None and op.kind == "attention":
        if why := misfit(point.info.name, want):
            raise ValueError(f"{asked}; {why}")
    elif _is_of_another_op(point):
        of = point.where if op is None else op.name
        raise ValueError(
            f"{asked}, which is for points of attention, and it is one of {of}; leave it out by the pattern, or ask "
            "it for the gradient or for Stats over the tensor, rows or channels"
        )


def _is_of_another_op(point: ModelPoint) -> bool:
    """Whether it is no attention's for sure: a `Point`, or one in a module of the user's, may have any shape."""
    if _op_of(point) is not None:
        return True
    return all(part is not Point and part.__module__.startswith("retainops.") for part in _parts_of(point.holder))


def _op_of(point: ModelPoint) -> Op | None:
    """Whose point it is; None: it is not known, as of a `Point`."""
    ops = (getattr(part, "op", None) for part in (point.holder, *_parts_of(point.holder)))
    return next((op for op in ops if op is not None and point.info in op.points), None)


def _parts_of(holder: Holder) -> tuple[type, ...]:
    """The classes that a holder's points are of: of a fused module several."""
    return getattr(holder, "fused_parts", (type(holder),))
