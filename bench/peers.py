"""Other libraries' ops, as functions of our op's inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Peer = Callable[..., Any]


def _liger(make: Callable[[], Peer]) -> Callable[[], Peer | None]:
    """Liger-Kernel's, where it is installed."""

    def load() -> Peer | None:
        try:
            return make()
        except ImportError:
            return None

    return load


def _rms_norm() -> Peer:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda x, w, eps, offset, *_: LigerRMSNormFunction.apply(x, w, eps, offset, "gemma", False)


def _layer_norm() -> Peer:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return lambda x, w, b, eps: LigerLayerNormFunction.apply(x, w, b, eps)


def _add_rms_norm() -> Peer:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return lambda x, r, w, eps, offset, *_: LigerFusedAddRMSNormFunction.apply(x, r, w, eps, offset, "gemma", False)


def _softmax() -> Peer:
    from liger_kernel.ops.softmax import LigerSoftmaxFunction

    return lambda x, *_: LigerSoftmaxFunction.apply(x)  # it has no scale: less work than ours


def _swiglu() -> Peer:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return lambda gate, up: LigerSiLUMulFunction.apply(gate, up)


def _geglu() -> Peer:
    from liger_kernel.ops.geglu import LigerGELUMulFunction

    return lambda gate, up: LigerGELUMulFunction.apply(gate, up)


def _rope() -> Peer:
    from liger_kernel.ops.rope import LigerRopeFunction

    return lambda q, k, cos, sin, *_: LigerRopeFunction.apply(q, k, cos[None], sin[None])


PEERS: dict[str, dict[str, Callable[[], Peer | None]]] = {
    "rms_norm": {"Liger-Kernel": _liger(_rms_norm)},
    "layer_norm": {"Liger-Kernel": _liger(_layer_norm)},
    "add_rms_norm": {"Liger-Kernel": _liger(_add_rms_norm)},
    "softmax": {"Liger-Kernel": _liger(_softmax)},
    "swiglu": {"Liger-Kernel": _liger(_swiglu)},
    "geglu_tanh": {"Liger-Kernel": _liger(_geglu)},
    "rope": {"Liger-Kernel": _liger(_rope)},
}
"""By the name of our op: `load()` imports the library and returns its function, or None where it is not installed.

Liger's cross entropy is not among them: its forward computes the gradient and writes it over the logits, so neither its
forward nor its backward is what the others do.
"""
