"""What the cases on several ranks share with the tests that judge them, which compute the same in one process."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import retainops as ro

EVERY = ro.Stats("l2", "sum", "abs_sum", "amax", "mean", "nonfinite", "act_grad", "hist")
EVERY_AND_GRAD = ro.Stats(*EVERY.names, grad=True)
CHANNELS = ro.Stats("l2", "amax", "mean", "nonfinite", over="channels")
BATCH, D = 8, 6
WIDTH = 12


class MLP(nn.Module):
    """What tensor parallelism splits: a column-wise layer, a point, a row-wise layer, a point."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(D, WIDTH), ro.nn.MulSin(1.5), nn.Linear(WIDTH, D)
        self.hidden, self.out = ro.nn.Point(), ro.nn.Point()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.down(self.hidden(self.act(self.up(x)))))


def model_of(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return kind().double()


def batch() -> torch.Tensor:
    return torch.randn(BATCH, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def loss_of(y: torch.Tensor) -> torch.Tensor:
    return y.square().mean()


def step(
    call: Callable, model: nn.Module, x: torch.Tensor, want: Any = EVERY, what: str = "*"
) -> tuple[ro.Retained, torch.Tensor]:
    """One forward and backward; what was retained, and the loss."""
    with ro.retain(model, what, want) as kept:
        loss = loss_of(call(x))
        loss.backward()
    return kept, loss.detach()


def single(kind: type[nn.Module], want: Any = EVERY) -> dict[str, Any]:
    """The same by one process, on the whole batch."""
    model, x = model_of(kind), batch()
    kept, loss = step(model, model, x, want)
    return {"stats": kept.to_dict(), "loss": loss, "grads": [p.grad for p in model.parameters()]}


@functools.cache
def mesh() -> Any:
    """One for all cases: torch.compile fails on DTensors, ours or not, where a process made two alike (torch 2.13)."""
    from torch.distributed.tensor import init_device_mesh

    return init_device_mesh("cpu", (dist.get_world_size(),))


def whole(t: Any) -> torch.Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def error_of(f: Callable[[], object]) -> str:
    try:
        f()
    except Exception as caught:
        return f"{type(caught).__name__}: {caught}"
    return "no error"


def uneven() -> torch.Tensor:
    return torch.randn(5, 3, 7, generator=torch.Generator().manual_seed(2))


def losses(place: Callable[[torch.Tensor, Any], torch.Tensor], target: torch.Tensor) -> dict[Any, list[torch.Tensor]]:
    """Cross entropies, and their gradients, of logits and weights that `place` puts somewhere by a dim of theirs."""
    from torch.distributed.tensor.parallel import loss_parallel

    drawn = torch.Generator().manual_seed(4)
    logits, weight = torch.randn(4, 8, generator=drawn), torch.rand(8, generator=drawn)
    found = {}
    for dim, weighted, parallel in itertools.product((None, 0, 1), (False, True), (False, True)):
        kept, linear = ro.Retained("logits", "p"), ro.Retained("logits")
        x, z = (place(logits, dim).requires_grad_() for _ in "xz")
        of_classes = weight if weighted else None
        with loss_parallel() if parallel else contextlib.nullcontext():
            loss = ro.cross_entropy(x, target, of_classes, label_smoothing=0.1, z_loss=0.01, retain=kept)
            eye = place(torch.eye(8), None if dim != 1 else 0)
            other = ro.linear_cross_entropy(z, eye, target, class_weight=of_classes, retain=linear)
            (loss + other).backward()
        slots = [*kept.values(), *linear.values()]
        found[dim, weighted, parallel] = [whole(t.detach()) for t in (loss, other, x.grad, z.grad)]
        found[dim, weighted, parallel] += [whole(slot.grad) for slot in slots]
    return found


TARGET = torch.tensor([1, 3, -100, 7])


def attended(place: Callable[[torch.Tensor], torch.Tensor], want: Any, point: str, causal: bool) -> list[Any]:
    """What is retained of two calls of attention, and the gradient of q."""
    drawn = torch.Generator().manual_seed(5)
    kept = ro.Retained(**{point: want})
    q, k, v = (place(torch.randn(4, 4, 5, 8, generator=drawn)).requires_grad_() for _ in "qkv")
    with sdpa_kernel(SDPBackend.MATH):  # PyTorch's own of a CPU takes no DTensor
        for scale in (1.0, -2.0):
            (whole(ro.attention(q, k, v, is_causal=causal, retain=kept).square().sum()) * scale).backward()
    return [*(whole(t) for t in kept.to_dict()[point].values() if t is not None), whole(q.grad)]


ATTENDED = {
    "s": ro.Stats("l2", "sum", over="heads"),
    "p": ro.Relevance("chefer", "legrad", "attn_grad"),
    "o": ro.Stats("l2", grad=True),
}
