"""The layouts to try an op in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def check_layouts(*inputs: Any) -> dict[str, tuple[Any, ...]]:
    """From contiguous inputs of an op, its inputs in every layout worth trying.

    The first layouts keep every shape, and so suit any op. The broadcast ones are made where two or more tensors have
    one shape, as the inputs of an elementwise op do. An op that cannot take one of them (a row-wise op and 0 dims)
    is refused by eager PyTorch too, which is the sign to leave that one out.

    Args:
        *inputs: contiguous tensors; numbers and integer tensors pass through as they are.

    Returns:
        From the name of each layout to the inputs in it: contiguous; transposed (column-major strides); stepped
        (every second element of larger storage); offset (storage that is entered one element in, so that wide loads
        are misaligned); expanded (stride 0 along the first dim); mixed (the first input transposed, the others
        stepped); each input in turn a row, a column, a scalar ("row 0": the first one a row); outer (a column by
        rows); 0 elements; 0 dims.

    Example:
        >>> for name, inputs in check_layouts(torch.randn(64, 96), torch.randn(64, 96)).items():
        ...     assert check_op(ro.mul_sin, *inputs).ok, name
    """
    layouts = {
        "contiguous": inputs,
        "transposed": _each(_transposed, inputs),
        "stepped": _each(_stepped, inputs),
        "offset": _each(_offset, inputs),
        "expanded": _each(_expanded, inputs),
        "mixed": (*_each(_transposed, inputs[:1]), *_each(_stepped, inputs[1:])),
    }
    alike = [i for i, x in enumerate(inputs) if _is_float(x) and x.dim() > 1 and x.shape == inputs[0].shape]
    if len(alike) > 1:
        for i in alike:
            layouts |= {f"{name} {i}": _at({i: shrink}, inputs) for name, shrink in _SHRINK.items()}
        layouts["outer"] = _at(dict.fromkeys(alike, _SHRINK["row"]) | {alike[0]: _SHRINK["column"]}, inputs)
    layouts["0 elements"] = _each(lambda x: x[:0] if x.dim() else x, inputs)
    layouts["0 dims"] = _each(_SHRINK["scalar"], inputs)
    return layouts


_Change = Callable[[torch.Tensor], torch.Tensor]

_SHRINK: dict[str, _Change] = {
    "row": lambda x: x[0],
    "column": lambda x: x[..., :1],
    "scalar": lambda x: x.flatten()[0],
}


def _is_float(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def _each(change: _Change, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(change(x) if _is_float(x) else x for x in inputs)


def _at(changes: dict[int, _Change], inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(changes[i](x) if i in changes else x for i, x in enumerate(inputs))


def _transposed(x: torch.Tensor) -> torch.Tensor:
    return x.mT.contiguous().mT if x.dim() > 1 else x


def _stepped(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((x, torch.full_like(x, torch.nan)), dim=-1)[..., 0]


def _offset(x: torch.Tensor) -> torch.Tensor:
    return torch.cat((x.new_full((1,), torch.nan), x.flatten()))[1:].view(x.shape)


def _expanded(x: torch.Tensor) -> torch.Tensor:
    return x[:1].expand_as(x) if x.dim() else x
