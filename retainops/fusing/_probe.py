"""What something computes, found out by trying it on small random data: nothing here touches a model's parameters."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from retainops.ops.pointwise import UNARY

FUNCTIONS: dict[Callable[..., Any], str] = {
    F.relu: "relu",
    F.gelu: "gelu",
    F.silu: "silu",
    F.sigmoid: "sigmoid",
    F.tanh: "tanh",
    torch.relu: "relu",
    torch.sigmoid: "sigmoid",
    torch.tanh: "tanh",
}
"""The name of each function of PyTorch's that has an op, as retainops.ops.pointwise.UNARY has it."""

LIBRARIES = ("torch", "torchvision", "transformers", "timm", "diffusers")


@contextlib.contextmanager
def alone() -> Iterator[torch.Generator]:
    """Whatever is in force around: gradients, no autocast, CPU tensors, and random numbers that nobody misses.

    Tensors are real ones in a FakeTensorMode, too: what is found out is remembered.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        yield torch.Generator("cpu").manual_seed(7)


def recognised(act: Any) -> str | None:
    """The name of the function that an activation computes, of those that ops have; None: another, or not one alone."""
    if isinstance(act, MethodType):
        return _recognised_method(act)
    if not isinstance(act, nn.Module):
        return function_named(act)
    # Calls of one that somebody wrote themselves may do more than to return a value.
    if type(act).__module__.split(".")[0] not in LIBRARIES or "forward" in vars(act):
        return None
    if any(True for _ in (*act.parameters(), *act.buffers())):
        return None
    # A slope or a threshold may be set to another value at any time.
    if any(isinstance(v, (int, float)) and not isinstance(v, bool) for v in vars(act).values()):
        return None
    return _computed(functools.partial(type(act).forward, act))


def _recognised_method(method: MethodType) -> str | None:
    """As diffusers' GEGLU and GELU have one for it; of their attributes it may read `approximate` alone."""
    file = getattr(method.__func__, "__module__", None) or ""  # a method may be of something that has none
    if not isinstance(method.__self__, nn.Module) or file.split(".")[0] not in LIBRARIES:
        return None
    return _computed(functools.partial(method.__func__, _Approximate(method.__self__)))


class _Approximate:
    """A module that has nothing but that attribute, if it has it."""

    def __init__(self, module: nn.Module) -> None:
        vars(self).update({name: value for name, value in vars(module).items() if name == "approximate"})

    def __getattr__(self, name: str) -> Any:
        raise LookupError(name)  # no AttributeError: getattr(self, name, None) is to fail, too


def _computed(act: Callable[[torch.Tensor], Any]) -> str | None:
    with alone():
        x = torch.linspace(-6, 6, 97, dtype=torch.float64)  # in both of GELU's forms they differ by 5e-4
        far = [-1e30, -1e3, 1e3, 1e30, torch.inf]  # some are cut off, at 6 or 10
        x = torch.cat([x, torch.tensor(far, dtype=torch.float64)])
        try:
            y = act(x.clone())
            for name in dict.fromkeys(FUNCTIONS.values()) | {"gelu_tanh": None}:
                if torch.allclose(y, UNARY[name][1](x), rtol=1e-9, atol=1e-9):
                    return name
        except Exception:  # whatever it wants, it is not a tensor alone
            return None
    return None


def function_named(function: Any) -> str | None:
    """The name of a function, of those in FUNCTIONS."""
    try:
        return FUNCTIONS.get(function)
    except TypeError:  # it cannot be hashed: an object of somebody's own
        return None


def agree(theirs: Any, ours: Any, leaves: list[Any], generator: torch.Generator, rtol: float = 1e-9) -> bool:
    """Whether outputs and gradients of random projections of them are the same up to rounding."""
    theirs, ours = ((y,) if isinstance(y, torch.Tensor) else tuple(y) for y in (theirs, ours))
    if [(y.shape, y.dtype) for y in theirs] != [(y.shape, y.dtype) for y in ours]:
        return False
    slopes = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in theirs]
    grads = [torch.autograd.grad(ys, leaves, slopes) for ys in (theirs, ours)]
    pairs = [*zip(theirs, ours, strict=True), *zip(*grads, strict=True)]
    return all(torch.allclose(a, b, rtol=rtol, atol=rtol * float(b.detach().abs().max())) for a, b in pairs)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def same_norm(
    module: Any, forward: Callable[..., torch.Tensor], dtypes: tuple[torch.dtype, ...] = DTYPES, takes: int = 1
) -> bool:
    """Whether a norm that has a weight or nothing computes what `forward` does, in each mix of dtypes.

    `takes` is how many tensors it is called with, all of one shape: 2 of a norm with a gate.

    Values of 16 bits have to be the same but for one in a hundred: then both round in the same places. It is tried in
    training and in evaluation, on inputs of two to four dims, whose sizes all differ.
    """
    weight = next(((name, weight.numel()) for name, weight in module.named_parameters()), None)
    state = tuple((k, v) for k, v in vars(module).items() if isinstance(v, (int, float, str, bool, type(None))))
    state = tuple((k, v) for k, v in state if k != "training")
    empty = tuple(name for name, parameter in module._parameters.items() if parameter is None)
    cls: Any = type(module)
    return _same_norm(cls, cls.forward, weight, empty, state, forward, dtypes, takes)


@functools.cache
def _same_norm(
    cls: Any,
    original: Any,
    weight: tuple[str, int] | None,
    empty: tuple[str, ...],
    state: tuple[Any, ...],
    forward: Callable[..., Any],
    dtypes: tuple[torch.dtype, ...],
    takes: int,
) -> bool:
    name, size = weight or (None, 5)
    others = [n for n in (2, 3, 4, 6) if n != size]
    shapes = (6 if size != 6 else 7, size), (*others[:2], size), (*others[:3], size)
    with alone() as generator:
        for shape, training, x_dtype in itertools.product(shapes, (True, False), dtypes):
            for dtype in dict.fromkeys((torch.float32, x_dtype)):
                module = object.__new__(cls)  # a class made by `fully_shard` gives an object of another one
                nn.Module.__init__(module)
                vars(module).update(state)
                module.training = training
                for other in empty:
                    module.register_parameter(other, None)
                drawn = [3 * torch.randn(shape, generator=generator) for _ in range(takes)]
                xs = [x.to(x_dtype).requires_grad_() for x in drawn]
                leaves = [*xs]
                if name is not None:
                    leaves.append(nn.Parameter(torch.randn(size, generator=generator).to(dtype)))
                    module.register_parameter(name, leaves[-1])
                try:
                    theirs, ours = original(module, *xs), forward(module, *xs)
                    if not _same_values(theirs, ours):
                        return False
                    if x_dtype == torch.float32 and not agree(theirs, ours, leaves, generator, rtol=1e-5):
                        return False
                except Exception:
                    return False
    return True


def _same_values(theirs: torch.Tensor, ours: torch.Tensor) -> bool:
    if (theirs.shape, theirs.dtype) != (ours.shape, ours.dtype) or not torch.isfinite(ours).all():
        return False
    eps = torch.finfo(ours.dtype).eps
    near = torch.allclose(theirs, ours, rtol=4 * eps, atol=4 * eps)
    return near and (ours.dtype == torch.float32 or bool((theirs != ours).double().mean() <= 0.01))
