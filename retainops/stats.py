"""Statistics of a gradient: what can be asked for, how it is computed from parts, and how parts merge.

A statistic is made of *parts* that two gradients' worth of can be merged into one: a sum of squares adds up where an
l2 norm does not. Kernels and the reference compute parts; a slot merges them over uses and backward calls, and derives
the statistic when it is read. So a statistic speaks of all gradient values that passed since `reset()`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from retainops.relevance import KINDS
from retainops.shards import alike, is_dtensor, on_shards, parts_of_shards, together

HIST_BINS = 256
"""Bin i counts the elements with 2**(i - 127) <= |g| < 2**(i - 126): the exponent field of float32. Bin 0 holds zeros
and what float32 calls subnormal, bin 255 inf and nan."""

MERGE: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "dense": torch.add,
    "sumsq": torch.add,
    "sum": torch.add,
    "abs_sum": torch.add,
    "act_grad": torch.add,
    "amax": torch.maximum,  # nan wins, as in torch.amax
    "count": torch.add,
    "nonfinite": torch.add,
    "hist": torch.add,
    **dict.fromkeys(KINDS, torch.add),
}


TAKE_VALUE = frozenset(("act_grad", *(name for name, kind in KINDS.items() if kind.square)))
"""Parts that need the point's value beside its gradient."""


@dataclass(frozen=True)
class Statistic:
    """One statistic: its parts, and how it is read off them."""

    formula: str
    parts: tuple[str, ...]
    read: Callable[..., torch.Tensor]


STATISTICS: dict[str, Statistic] = {
    "l2": Statistic("sqrt(sum(g * g))", ("sumsq",), torch.sqrt),
    "sum": Statistic("sum(g)", ("sum",), torch.clone),
    "abs_sum": Statistic("sum(|g|)", ("abs_sum",), torch.clone),
    "amax": Statistic("max(|g|)", ("amax",), torch.clone),
    "mean": Statistic("sum(g) / count", ("sum", "count"), torch.true_divide),
    "nonfinite": Statistic("how many of g are inf or nan", ("nonfinite",), torch.clone),
    "act_grad": Statistic("sum(value * g)", ("act_grad",), torch.clone),
    "hist": Statistic("counts of g by power-of-two exponent", ("hist",), torch.clone),
}

HALF_OVERFLOWS = 65520.0
"""A float32 number of this magnitude is the least that rounds to an inf of float16."""

OVER = ("tensor", "rows", "channels")
OVER_OF_ATTENTION = ("heads", "queries", "keys")


class Stats:
    """Ask for statistics of a point's gradient instead of the gradient: no buffer of its size exists at any time.

    A kernel leaves a float32 a warp for each statistic and tile, mostly of 1024 elements in four warps, of 16-bit
    tensors in two ("hist": 256 counts a tile); they are put together when the statistic is read. The tiles are smaller,
    and their shares more, where no two dims of the operands merge.

    Args:
        *names: of "l2", "sum", "abs_sum", "amax", "mean", "nonfinite", "act_grad" (the sum of value x gradient) and
            "hist" (counts by power-of-two exponent; see `HIST_BINS`).
        over: "tensor" (one number), "rows" (reduced over the last dim: one a row) or "channels" (reduced over all
            dims but the last). "hist" is of the whole tensor only. For points of `attention`, and `ro.point`, of
            (..., heads, queries, keys): "heads" (one a head), "queries" (one a query of each head; these are the rows)
            or "keys" (one a key of each head).
        grad: keep the full gradient too.

    Sums are held in float32 (float64 for float64 gradients). In a kernel all but "nonfinite" are taken before the
    gradient is rounded to the tensor's dtype. Over several uses and backward calls sums and counts add up and amax
    takes the maximum: l2, mean and the others speak of all gradient values since `reset()`.

    Raises:
        TypeError: a name is not a string.
        ValueError: nothing is named, a name or `over` is unknown, or "hist" over anything but the tensor.

    Example:
        >>> kept = ro.Retained(c=ro.Stats("l2", "amax"))
        >>> ro.mul_sin(a, b, retain=kept).sum().backward()
        >>> kept.c.l2, kept.c.amax
    """

    __slots__ = ("grad", "names", "over")

    def __init__(self, *names: str, over: str = "tensor", grad: bool = False) -> None:
        if not names:
            raise ValueError(f"Stats: nothing asked for; name some of {', '.join(STATISTICS)}")
        for name in names:
            if not isinstance(name, str):
                raise TypeError(f'Stats: a name is {name!r}; expected strings, as in Stats("l2", "amax")')
            if name not in STATISTICS:
                raise ValueError(f"Stats: unknown statistic {name!r}; expected some of {', '.join(STATISTICS)}")
        if over not in OVER + OVER_OF_ATTENTION:
            raise ValueError(f"Stats: over is {over!r}; expected one of {', '.join(OVER + OVER_OF_ATTENTION)}")
        if over != "tensor" and "hist" in names:
            raise ValueError(
                f'Stats: "hist" over {over}; it is taken over the whole tensor: ask for it with over="tensor"'
            )
        self.names, self.over, self.grad = tuple(dict.fromkeys(names)), over, grad

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that its statistics are read off."""
        return tuple(dict.fromkeys(part for name in self.names for part in STATISTICS[name].parts))

    def shape(self, of: torch.Size) -> torch.Size:
        """The shape of a statistic of a gradient of shape `of` (hist: one dim of `HIST_BINS` more)."""
        dims = reduced_dims(self.over, len(of))
        return torch.Size(size for dim, size in enumerate(of) if dim not in dims)

    def check(self, op: str, point: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        """Raise if these statistics cannot be taken of a gradient like this."""
        if self.over != "tensor" and len(shape) == 0:
            raise ValueError(
                f"{op}: Stats(over={self.over!r}) of point '{point}', which has no dims; use over=\"tensor\""
            )
        if self.over in OVER_OF_ATTENTION and len(shape) < 2:
            raise ValueError(
                f"{op}: Stats(over={self.over!r}) of point '{point}', which has shape {tuple(shape)}; expected "
                "(..., heads, queries, keys)"
            )
        if dtype.is_complex:
            raise ValueError(f"{op}: Stats of point '{point}', which is {dtype}; they are for real gradients")

    def __repr__(self) -> str:
        more = "" if self.over == "tensor" else f", over={self.over!r}"
        return f"Stats({', '.join(self.names)}{more}{', grad=True' if self.grad else ''})"


def reduced_dims(over: str, ndim: int) -> tuple[int, ...]:
    """The dims that statistics are taken over, of a tensor of so many dims."""
    if over == "tensor":
        return tuple(range(ndim))
    if over == "channels":
        return tuple(range(ndim - 1))
    if over == "heads":
        return (ndim - 2, ndim - 1)
    return (ndim - 2,) if over == "keys" else (ndim - 1,)


def parts_of(
    wanted: tuple[str, ...],
    over: str,
    g: torch.Tensor,
    value: torch.Tensor | None,
    dtype: torch.dtype | None = None,
) -> list[torch.Tensor]:
    """The parts of a gradient's statistics, in plain PyTorch: what kernels compute as they go.

    Args:
        wanted: names of parts, and of relevances.
        over: as of `Stats`.
        g: the gradient, any real dtype.
        value: the interior's value; needed for those of `TAKE_VALUE` alone.
        dtype: the interior's, where g may be wider.
    """
    if is_dtensor(g) and not any(name in KINDS for name in wanted):  # a relevance has a shape of its own
        dims, shape = reduced_dims(over, g.dim()), Stats("l2", over=over).shape(g.shape)
        return parts_of_shards(wanted, functools.partial(parts_of, wanted, over), g, value, dims, shape)
    wide = g.to(torch.promote_types(g.dtype, torch.float32) if g.dtype.itemsize > 1 else torch.float32)  # float8: none
    dims = reduced_dims(over, g.dim())

    def add_up(x: torch.Tensor) -> torch.Tensor:
        return x.sum(dims) if dims else x.clone()  # the gradient itself is autograd's to add to

    def part(name: str) -> torch.Tensor:
        if name == "sumsq":
            return add_up(wide * wide)
        if name == "sum":
            return add_up(wide)
        if name == "abs_sum":
            return add_up(wide.abs())
        if name == "act_grad":
            assert value is not None
            return add_up(wide * value.to(wide.dtype))
        if name == "amax":
            return amax(wide.abs(), dims)
        if name == "count":
            return count(g, over)
        if name == "nonfinite":
            # Compiled code may hold what is of float16 in float32.
            is_wide = g.dtype != torch.float16 or torch.compiler.is_compiling()
            half = torch.float16 in (g.dtype, dtype) and is_wide
            flags = wide.masked_fill(wide.abs() >= HALF_OVERFLOWS, torch.nan) if half else wide
            return nonfinite(flags, dims) if dims else (~flags.isfinite()).to(torch.int64)
        if name in KINDS:
            return KINDS[name].of(wide, None if value is None else value.to(wide.dtype))
        return hist(wide)

    return [part(name) for name in wanted]


def amax(magnitudes: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """The maximum over dims, nan if one is; 0 of no elements."""
    if not dims:
        return magnitudes
    if magnitudes.numel() == 0:
        return magnitudes.sum(dims)  # no maximum of nothing: 0, of the right shape
    return magnitudes.amax(dims)


def nonfinite(wide: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """How many are inf or nan, over dims."""
    of_rows = dims[-1] in (-1, wide.dim() - 1) and wide.shape[-1] <= 2**24  # up to where float32 counts
    if torch.compiler.is_compiling() or not of_rows or wide.is_complex():
        return (~wide.isfinite()).to(torch.int64).sum(dims)
    # The difference is 0 where finite, nan elsewhere. Two passes over one new tensor, where the above makes four.
    rows = (wide - wide).ne_(0).sum(-1).to(torch.int64)
    return rows.sum(dims[:-1]) if len(dims) > 1 else rows


def count(g: torch.Tensor, over: str) -> torch.Tensor:
    """How many elements each statistic is of."""
    if torch.compiler.is_compiling():  # a size may be wrong there: Dynamo takes it from strides that g may not have
        ones, dims = torch.ones_like(g, dtype=torch.int64), reduced_dims(over, g.dim())
        return (ones.sum(dims) if dims else ones).reshape(-1)[:1].sum()
    shape = Stats("mean", over=over).shape(g.shape)
    return torch.full((), g.numel() // max(shape.numel(), 1), dtype=torch.int64, device=g.device)


def hist(wide: torch.Tensor) -> torch.Tensor:
    """Counts by the exponent field of float32."""
    exponent = (wide.float().resolve_neg().view(torch.int32) >> 23 & 255).reshape(-1).to(torch.int64)
    zeros = torch.zeros(HIST_BINS, dtype=torch.int64, device=wide.device)
    return zeros.scatter_add(0, exponent, torch.ones_like(exponent))


class Shared(NamedTuple):
    """A part as a kernel leaves it: shares of it, one a row. They are put together when somebody looks.

    So a backward with statistics launches no other kernel, and a CUDA graph that is replayed changes what is read.
    """

    name: str
    shares: torch.Tensor
    shape: torch.Size

    def total(self) -> torch.Tensor:
        """The part itself."""
        together = self.shares.amax(0) if self.name == "amax" else self.shares.sum(0)
        return together.view(self.shape)


Part = torch.Tensor | Shared


def total(part: Part) -> torch.Tensor:
    """A part, whatever it is kept as. That of a DTensor is put together from all ranks of its mesh: all must ask."""
    return part.total() if isinstance(part, Shared) else together(part)


def merge(point: str, old: Mapping[str, Part], new: Mapping[str, Part]) -> dict[str, Part]:
    """Parts of all gradients seen, from those seen before and those of one more.

    Raises:
        RuntimeError: statistics over rows or channels of gradients of different shapes.
    """
    for name, part in new.items():
        if name in old and old[name].shape != part.shape:
            raise RuntimeError(
                f"point '{point}': statistics of shape {tuple(part.shape)} do not merge with those of shape "
                f"{tuple(old[name].shape)} from another gradient; call reset() on the slot between the two"
            )
    return {name: _merged(name, old[name], part) if name in old else part for name, part in new.items()}


def _merged(name: str, old: Part, new: Part) -> Part:
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor) and alike(old, new):
        return on_shards(MERGE[name], old, new)
    return MERGE[name](total(old), total(new))
