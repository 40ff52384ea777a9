"""Rotary position embedding in Hugging Face's models: each has a function for it, which is tried on small data."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch

from retainops.fusing._classes import OF_FUSION
from retainops.fusing._probe import agree, alone
from retainops.fusing.registry import fuse_rule
from retainops.nn.point import HoldsPoints
from retainops.ops.rope import ROPE
from retainops.points import unretained

Tensor = torch.Tensor
Function = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True)
class Form:
    """How a function of (q, k, cos, sin) turns.

    Attributes:
        interleaved, half_tables: as of `ro.rope`.
        repeated: the tables are of all columns, and the function takes the first half of them for both elements.
        partial: it takes tables of fewer columns than q has, and passes the rest of q on.
        packs: what it returns is contiguous, whatever q is; of the others it has q's strides, as that of the op has.
    """

    interleaved: bool = False
    half_tables: bool = False
    repeated: bool = False
    partial: bool = False
    packs: bool = False

    @property
    def each(self) -> int:
        """How many elements of q a column of a table is for."""
        return 2 if self.half_tables and not self.repeated else 1

    def inputs(self, q: Tensor, k: Tensor, *tables: Tensor) -> tuple[Any, ...]:
        """What the op is to be called with."""
        if self.packs:
            q, k = q.contiguous(), k.contiguous()
        if self.repeated:
            tables = tuple(table[..., : table.shape[-1] // 2] for table in tables)
        return q, k, *tables, self.interleaved, self.half_tables


FORMS = (
    Form(),  # LLaMA's
    Form(interleaved=True),  # Cohere's
    Form(interleaved=True, half_tables=True, repeated=True),  # GLM's
    Form(half_tables=True),  # gpt-oss's
)


@functools.cache
def form_of(function: Function) -> Form | None:
    """The form in which a function turns, up to rounding, gradients included; None: in no form that rope has.

    Many compute in float32 whatever they are given. In 16 bits they must return what they are given.
    """
    form = next((form for form in FORMS if _turns(function, form, 8)), None)
    if form is None:
        return None
    with alone():
        q, table = torch.ones(2, 5, 3, 8).transpose(1, 2), torch.ones(2, 5, 8 // form.each)
        packs = all(t.is_contiguous() for t in function(q, q, table, table))
    return dataclasses.replace(form, partial=_turns(function, form, 4), packs=packs)


def _turns(function: Function, form: Form, turned: int) -> bool:
    """Whether a function turns so many of 8 elements in a form."""
    table = 2, 5, turned // form.each
    shapes = (2, 3, 5, 8), (2, 1, 5, 8), table, table
    with alone() as generator:
        for dtype, rtol in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
            drawn = [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]
            try:
                theirs, ours = function(*drawn), ROPE.reference(*form.inputs(*drawn), unretained)
                if not agree(theirs, ours, drawn[:2], generator, rtol):
                    return False
            except Exception:
                return False
    return True


TURNS = OF_FUSION + "turns"
"""Of an attention module, while it is fused: its function and that one's form."""


class Rotary(HoldsPoints):
    """For an attention module that applies rope by a function; its points are q_rot and k_rot."""

    op = ROPE

    @staticmethod
    def adopt(module: Any) -> None:
        function = _function_of(module)
        module.__dict__[TURNS] = function, form_of(function)

    def fused_rope(self, function: Function, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """function(q, k, cos, sin)."""
        known, form = self.__dict__.get(TURNS, (None, None))
        # It may be another one that the file has by now.
        if known is function and all(t.dtype == q.dtype for t in (k, cos, sin)) and _fits(form, q, k, cos, sin):
            q_rot, k_rot = self.call(*form.inputs(q, k, cos, sin), op=ROPE)
        else:
            q_rot, k_rot = function(q, k, cos, sin)
            q_rot, k_rot = (self.point(name, t, as_view=False) for name, t in (("q_rot", q_rot), ("k_rot", k_rot)))
        return q_rot, k_rot


def _fits(form: Form, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether these are what the function was tried on: it may do something else of other sizes."""
    if (q.dim(), k.dim(), cos.dim()) != (4, 4, 3) or sin.shape != cos.shape or cos.shape[0] not in (1, q.shape[0]):
        return False
    if not (q.shape[0] == k.shape[0] and q.shape[2] == k.shape[2] == cos.shape[1] and q.shape[3] == k.shape[3]):
        return False
    turned, size = cos.shape[2] * form.each, q.shape[3]
    return turned % 2 == 0 and (turned == size or (form.partial and 0 < turned < size))


def _function_of(module: Any) -> Any:
    return inspect.unwrap(type(module).forward).__globals__.get("apply_rotary_pos_emb")


@fuse_rule(before="apply_rotary_pos_emb(Q, K, COS, SIN)", after="self.fused_rope(apply_rotary_pos_emb, Q, K, COS, SIN)")
def rope(module: Any) -> type[Rotary] | str:
    """Hugging Face's function for it."""
    function = _function_of(module)
    if not isinstance(function, FunctionType) or form_of(function) is None:
        return "its apply_rotary_pos_emb is not that of rope"
    other = f"{function.__name__}_interleave"
    names = inspect.unwrap(type(module).forward).__code__.co_names
    if other in names and getattr(getattr(module, "config", None), "rope_interleave", False):  # DeepSeek's
        return f"its configuration has rope_interleave, and it calls {other} then"
    return Rotary
