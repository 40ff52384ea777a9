"""Backward functions that run as they are under compiled autograd, which traces those that it can."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def untraced(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The `backward` of a `Function`, a break in the graph of compiled autograd.

    It launches kernels by Triton's own launcher, reads addresses, and writes to slots: nothing that Dynamo can trace.
    """

    @functools.wraps(backward)
    def call(ctx: Any, *grads: torch.Tensor | None) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(backward)(ctx, *grads)
        return backward(ctx, *grads)

    return call
