"""CUDA's libdevice, as far as numpy and PyTorch have its functions: evaluated in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]
Function = Callable[..., Array]


def _torch(op: Callable[[torch.Tensor], torch.Tensor]) -> Function:
    return lambda x: op(torch.from_numpy(np.array(x))).numpy()


erf = _torch(torch.special.erf)


def rsqrt(x: Array) -> Array:
    """1 / sqrt(x)."""
    return 1 / np.sqrt(x)


_FUNCTIONS: dict[str, Function] = {
    "abs": np.fabs,
    "acos": np.arccos,
    "acosh": np.arccosh,
    "asin": np.arcsin,
    "asinh": np.arcsinh,
    "atan": np.arctan,
    "atan2": np.arctan2,
    "atanh": np.arctanh,
    "cbrt": np.cbrt,
    "ceil": np.ceil,
    "copysign": np.copysign,
    "cos": np.cos,
    "cosh": np.cosh,
    "cyl_bessel_i0": _torch(torch.special.i0),
    "cyl_bessel_i1": _torch(torch.special.i1),
    "dadd_rn": np.add,
    "ddiv_rn": np.divide,
    "dmul_rn": np.multiply,
    "drcp_rn": np.reciprocal,
    "dsqrt_rn": np.sqrt,
    "dsub_rn": np.subtract,
    "erf": erf,
    "erfc": _torch(torch.special.erfc),
    "erfcx": _torch(torch.special.erfcx),
    "erfinv": _torch(torch.special.erfinv),
    "exp": np.exp,
    "exp10": lambda x: np.power(10.0, x),
    "exp2": np.exp2,
    "expm1": np.expm1,
    "fabs": np.fabs,
    "fadd_rn": np.add,
    "fdim": lambda x, y: np.maximum(x - y, 0.0),
    "fdiv_rn": np.divide,
    "fdivide": np.divide,
    "finite": np.isfinite,
    "floor": np.floor,
    "fmod": np.fmod,
    "fmul_rn": np.multiply,
    "frcp_rn": np.reciprocal,
    "frsqrt_rn": rsqrt,
    "fsqrt_rn": np.sqrt,
    "fsub_rn": np.subtract,
    "hypot": np.hypot,
    "isfinite": np.isfinite,
    "isinf": np.isinf,
    "isnan": np.isnan,
    "lgamma": _torch(torch.lgamma),
    "llabs": np.fabs,
    "llrint": np.rint,
    "log": np.log,
    "log10": np.log10,
    "log1p": np.log1p,
    "log2": np.log2,
    "nearbyint": np.rint,
    "normcdf": _torch(torch.special.ndtr),
    "normcdfinv": _torch(torch.special.ndtri),
    "pow": np.power,
    "powi": np.power,
    "rcbrt": lambda x: 1 / np.cbrt(x),
    "rhypot": lambda x, y: 1 / np.hypot(x, y),
    "rint": np.rint,
    "round": lambda x: np.copysign(np.floor(np.abs(x) + 0.5), x),
    "rsqrt": rsqrt,
    "saturate": lambda x: np.clip(x, 0.0, 1.0),
    "signbit": np.signbit,
    "sin": np.sin,
    "sinh": np.sinh,
    "sqrt": np.sqrt,
    "tan": np.tan,
    "tanh": np.tanh,
    "trunc": np.trunc,
}


def function(symbol: str) -> Function:
    """What a symbol of libdevice computes, such as "__nv_tanhf" or "__nv_fast_expf": a function of float64 arrays.

    Raises:
        NotImplementedError: a function that is not simulated.
    """
    name = symbol.removeprefix("__nv_").removeprefix("fast_")
    for candidate in (name, name[:-1] if name[-1] in "fd" else name):
        if candidate in _FUNCTIONS:
            return _FUNCTIONS[candidate]
    raise NotImplementedError(
        f"the interpreter of simulated_gpu has no {symbol}; use a function of triton.language instead, or "
        'engine="ptx", or add it to retainops.testing.libdevice'
    )
