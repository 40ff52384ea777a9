"""diffusers' `dispatch_attention_fn`, whose scores and probabilities can be asked for in a model that is fused."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from torch import Tensor

from retainops.fusing.parts import ATTENTIONS, Sdpa, in_order
from retainops.nn.point import gradients_reach, note_grad_mode
from retainops.ops.attention import ATTENTION

NATIVE = AttentionBackendName.NATIVE


def dispatched(module: Sdpa, *args: Any, **named: Any) -> Tensor:
    """`dispatch_attention_fn` for a module of these points: while nothing is asked that function itself.

    Its tensors are (batch, tokens, heads, width); the points are those of `ro.attention`, heads before tokens.

    Raises:
        RuntimeError: a point is asked for, and attention goes to another backend than PyTorch's, "native".
    """
    note_grad_mode(module._requests)
    if not module._requests or not gradients_reach(*args, *named.values()):
        return dispatch_attention_fn(*args, **named)
    return _asked(module, *args, **named)


def _asked(
    module: Sdpa,
    *args: Any,
    attention_kwargs: dict[str, Any] | None = None,
    backend: Any = None,
    parallel_config: Any = None,
    **named: Any,
) -> Tensor:
    if backend is None:
        backend, _ = _AttentionBackendRegistry.get_active_backend()
    if backend != NATIVE or parallel_config is not None or attention_kwargs:
        what = f"that of the backend {backend!r}"
        if backend == NATIVE:
            what = "called with attention_kwargs" if parallel_config is None else "split over devices"
        raise RuntimeError(
            f"{type(module).__name__}: points of its attention are asked for, and it is {what}; they are there with "
            'model.set_attention_backend("native"), and neither of attention_kwargs and a parallel config'
        )
    query, key, value, mask, *rest = in_order(*args, **named)
    if mask is not None and mask.shape == (query.shape[0], key.shape[1]):
        mask = mask[:, None, None]  # of keys
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    return module.call(q, k, v, mask, *rest, op=ATTENTION).transpose(1, 2)


ATTENTIONS[dispatch_attention_fn] = dispatched
