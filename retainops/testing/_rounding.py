"""What rounding does to a computation in float64, measured by moving every result in it (Monte Carlo arithmetic)."""

from __future__ import annotations

from typing import Any

import torch
from torch._decomp import decomposition_table
from torch.utils._python_dispatch import TorchDispatchMode

SCALE = 2.0**-12
"""A rounding of float64 moves a result by up to 2**-53 of itself. Here it moves by 2**-41: float64 can measure that."""

_EXACT = {"_to_copy", "abs", "clone", "copy_", "expand", "neg", "relu", "threshold_backward", "where", "zeros_like"}
_SEVERAL = {
    *("_log_softmax", "_log_softmax_backward_data", "_softmax", "_softmax_backward_data", "gelu", "gelu_backward"),
    *("mish", "mish_backward", "native_layer_norm", "native_layer_norm_backward", "sigmoid_backward", "silu"),
    *("silu_backward", "softplus", "softplus_backward", "tanh_backward"),
}
"""Operations whose insides round too: they are taken apart first."""


class Roundings(TorchDispatchMode):
    """Inside the `with`, every float64 result is rounded 2**12 times as coarsely, at random.

    What that changes, times `SCALE`, is what rounding may do: to first order the two are proportional, also where
    terms cancel. Source: Parker 1997, Monte Carlo Arithmetic (UCLA CSD-970002).
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if name in _SEVERAL and func in decomposition_table:
            with self:
                return decomposition_table[func](*args, **kwargs)
        out = func(*args, **kwargs)
        if func.is_view or name in _EXACT:
            return out
        return tuple(map(self._moved, out)) if isinstance(out, tuple) else self._moved(out)

    def _moved(self, x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or x.dtype != torch.float64:
            return x
        steps = torch.rand(x.shape, generator=self.generator, dtype=torch.float64).to(x.device)
        return x * (1 + (2 * steps - 1) * 2.0**-41)
