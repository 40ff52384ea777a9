"""The classes of fused modules: a module stays the object that it is, and its class becomes a subclass of its class.

So names, parameters, hooks, state dicts and `isinstance` stay, and torch.compile, which guards on classes, sees the
change. The original class is known to the new one, so a copy or a pickle of a fused module can be unfused too.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import nn

from retainops.fusing._code import Methods, methods, rewritten, wrappers, wrapping
from retainops.fusing._patterns import Site
from retainops.fusing.outputs import Output, with_point
from retainops.nn.point import HoldsPoints
from retainops.registry import Op, PointInfo


class Fused(HoldsPoints):
    """What the class of every fused module inherits from first.

    Attributes:
        fused_from: the module's class before.
        fused_parts: the classes of retainops that it inherits from.
        fused_sites: the places of its methods that are other code now.
    """

    fused_from: type[nn.Module]
    fused_parts: tuple[type[HoldsPoints], ...]
    fused_sites: tuple[Site, ...]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As the module's class before: some code makes another one of `type(module)`."""
        self.fused_from.__init__(self, *args, **kwargs)
        self.__dict__["_requests"] = ()

    def point_infos(self) -> tuple[PointInfo, ...]:
        kinds = (self.fused_from, *self.fused_parts)
        return tuple(info for kind in kinds if issubclass(kind, HoldsPoints) for info in _infos_of(kind, self))

    def _get_name(self) -> str:
        return f"{type(self).__name__} (fused)"  # in a model's repr

    def extra_repr(self) -> str:
        return self.fused_from.extra_repr(self)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Made again from the original class: a class made here has no name to be found by."""
        return _new, (self.fused_from, self.fused_parts, self.fused_sites), self.__getstate__()


def _infos_of(part: type[HoldsPoints], module: Fused) -> tuple[PointInfo, ...]:
    """The points of one part: `module.op` may be another's."""
    return part.op.points if part.point_infos is HoldsPoints.point_infos else part.point_infos(module)


def _new(*fusion: Any) -> nn.Module:
    cls = fused_class(*fusion)
    return cls.__new__(cls)


def fused_class(original: type, parts: tuple[type[HoldsPoints], ...], sites: tuple[Site, ...]) -> type[Fused]:
    """The subclass of a class with these parts. It has the same name: libraries look classes up by name.

    Raises:
        LookupError: the code of its methods is not what it was when the sites were found.
        TypeError: it cannot have such a subclass.
    """
    return _fused_class(original, parts, sites, methods(original))


@functools.cache
def _fused_class(
    original: Any, parts: tuple[type[HoldsPoints], ...], sites: tuple[Site, ...], functions: Methods
) -> type[Fused]:
    body: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "fused_from": original,
        "fused_parts": parts,
        "fused_sites": sites,
        **rewritten(functions, sites),
    }
    if (op := _op_of(parts)) is not None:
        body["op"] = op
    part = next((part for part in parts if has_forward(part)), None)
    if part is not None:
        body["forward"] = _called_as(original.forward, part.forward)
    cls: Any = type(original.__name__, (Fused, *parts, original), body)
    for name in dict.fromkeys(site.method for site in sites):  # a base's __init_subclass__ may have wrapped it again
        if name in vars(cls) and wrappers(vars(cls)[name]) != wrappers(dict(functions)[name]):
            raise LookupError(f"its method {name} was wrapped since its class was made")
    if Output in parts:
        cls.forward = with_point(vars(cls).get("forward", original.forward))
    return cls


def _op_of(parts: tuple[type[HoldsPoints], ...]) -> Op | None:
    """What `self.op` is, which `self.call(x)` calls; the parts of this package each say which op they call."""
    named = [part for part in parts if hasattr(part, "op") and part.__module__.rpartition(".")[0] != __package__]
    if any(part.op is not named[0].op for part in named):
        raise TypeError(
            f"{' and '.join(part.__name__ for part in named)} have an `op` each, and self.call(x) calls one alone; say "
            "in them which, by self.call(x, op=...) in the place of `op`, and by point_infos() what its points are"
        )
    return named[0].op if named else None


def has_forward(part: type[HoldsPoints]) -> bool:
    """Whether a part is a module's whole forward, and not only what its code calls."""
    return part.forward is not HoldsPoints.forward


def _called_as(original: Callable[..., Any], new: Callable[..., Any]) -> Callable[..., Any]:
    """`new`, whose arguments may be given by the names that they have in `original`."""
    names = list(inspect.signature(original).parameters)[1:]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs:
            for name in names[len(args) :]:
                if name not in kwargs:  # those after it stay with their names
                    break
                args += (kwargs.pop(name),)
        return new(self, *args, **kwargs)

    return wrapping(original, forward)


def is_fused(module: nn.Module) -> bool:
    """Whether a module's own class was made here, and not one that something made of such a class."""
    return "fused_from" in vars(type(module))


def why_not(module: nn.Module) -> str | None:
    """Why a module's class is not to be changed; None: it may be."""
    cls = type(module)
    if "forward" in vars(module):
        return "its forward is set on the module itself"
    bases = [c for c in cls.__mro__ if not issubclass(nn.Module, c) and not issubclass(c, HoldsPoints)]
    own = {name for c in bases for name in vars(c)}
    # A `__getstate__` alone, as torch.nn.LSTM's, goes on to be called; the class of a parametrized module has both.
    if own & {"__reduce__", "__reduce_ex__"} or {"__getstate__", "__deepcopy__"} <= own:
        return f"{cls.__name__} copies itself in a way of its own"
    if type(cls) is not type:
        return f"{cls.__name__} has a metaclass"
    return None


OURS = frozenset(["forward", "extra_repr", "_get_name", "normalized_shape"])
"""Names that parts have on purpose as the module has them."""


def clash(module: nn.Module, parts: tuple[Any, ...]) -> str | None:
    """A name that parts have and the module has too, for something else; None: there is none."""
    kinds: tuple[Any, ...] = (Fused, *parts)
    cls = type(module).fused_from if is_fused(module) else type(module)  # type: ignore[attr-defined]
    bases = {base for part in kinds for base in part.__mro__ if base not in cls.__mro__}
    ours = {name for base in bases for name in vars(base) if not name.startswith("__")} - OURS
    if not isinstance(module, HoldsPoints):
        ours.add("_requests")
    theirs = {name for base in cls.__mro__ if base not in nn.Module.__mro__ for name in vars(base)}
    own = (vars(module), module._modules, module._parameters, module._buffers)
    return min(ours & theirs.union(*own), default=None)


def twice(module: nn.Module, cls: type[Fused]) -> str | None:
    """What to say of two points of one name that a module would have as one of this class; None: there are none."""
    before = type(module)
    object.__setattr__(module, "__class__", cls)  # what its points are may depend on its attributes
    try:
        names = Counter(info.name for info in module.point_infos())  # type: ignore[operator]
    finally:
        object.__setattr__(module, "__class__", before)
    return next((f"it would have two points called '{name}'" for name, n in names.items() if n > 1), None)


def become(module: nn.Module, parts: tuple[type[HoldsPoints], ...], sites: tuple[Site, ...]) -> None:
    """Fuse one module."""
    _set_class(module, fused_class(type(module), parts, sites))


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    object.__setattr__(module, "__class__", cls)  # a module may refuse its attributes to be set
    if issubclass(cls, HoldsPoints):
        module.__dict__["_requests"] = ()
    else:
        del module.__dict__["_requests"]


OF_FUSION = "_retainops_fused_"
"""What the names of attributes start with that a module has while it is fused."""


def restore(module: nn.Module) -> None:
    """Unfuse one module."""
    for name in [name for name in vars(module) if name.startswith(OF_FUSION)]:
        del module.__dict__[name]
    _set_class(module, type(module).fused_from)  # type: ignore[attr-defined]


def change_parts(module: Any, parts: tuple[type[HoldsPoints], ...]) -> None:
    """Give a module that is fused these parts, in place of those that it has; none: it is unfused."""
    cls = type(module)
    if parts:
        _set_class(module, fused_class(cls.fused_from, parts, cls.fused_sites))
    else:
        restore(module)


def add_output(module: Any) -> None:
    """Make the output of a module a point, whether it is fused or not."""
    if is_fused(module):
        change_parts(module, (*type(module).fused_parts, Output))
    else:
        become(module, (Output,), ())


def remove_output(module: Any) -> None:
    """The module as it was before `add_output`."""
    change_parts(module, tuple(part for part in type(module).fused_parts if part is not Output))


def has_output(module: nn.Module) -> bool:
    """Whether `add_output` was here."""
    return is_fused(module) and isinstance(module, Output)


def class_before(module: nn.Module) -> type[nn.Module]:
    """A module's class, or where its output was made a point and nothing else, the one that it had before."""
    cls: Any = type(module)
    return cls.fused_from if getattr(cls, "fused_parts", ()) == (Output,) else cls
