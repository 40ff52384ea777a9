"""A SIREN (Sitzmann et al. 2020, arXiv 2006.09661): a network whose activations are sin(w0 * z), one fused op each."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from itertools import pairwise, repeat
from typing import NamedTuple

import torch

import retainops as ro

W0 = 30.0
"""The paper's frequency of the sine."""


class Siren(torch.nn.Module):
    """From coordinates in [-1, 1] to values: hidden layers sin(w0 * (W x + b)), then a linear one.

    Args:
        inputs, outputs: sizes of a coordinate and of a value.
        width: size of each hidden layer.
        hidden: how many hidden layers.
    """

    def __init__(self, inputs: int = 2, outputs: int = 3, width: int = 64, hidden: int = 5) -> None:
        super().__init__()
        sizes = [inputs, *[width] * hidden]
        self.hidden = torch.nn.ModuleList(torch.nn.Linear(m, n) for m, n in pairwise(sizes))
        self.last = torch.nn.Linear(width, outputs)
        # Section 3.2: pre-activations w0 * z are then normally distributed with variance 1 at every depth.
        for i, layer in enumerate([*self.hidden, self.last]):
            bound = 1 / inputs if i == 0 else math.sqrt(6 / width) / W0
            torch.nn.init.uniform_(layer.weight, -bound, bound)

    def forward(self, x: torch.Tensor, kept: Sequence[ro.Retained] | None = None) -> torch.Tensor:
        """The fused network; `kept` asks for the gradient of c = w0 * z, one `Retained("c")` for each hidden layer."""
        for layer, retain in zip(self.hidden, kept or repeat(None), strict=False):
            x = ro.mul_sin(layer(x), W0, retain=retain)
        return self.last(x)

    def eager(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The same network in plain PyTorch, and each c after `c.retain_grad()`."""
        interiors = []
        for layer in self.hidden:
            c = layer(x) * W0
            c.retain_grad()
            interiors.append(c)
            x = torch.sin(c)
        return self.last(x), interiors


def coordinates(size: int, device: torch.device) -> torch.Tensor:
    """The centres of size x size pixels, in [-1, 1]: shape (size * size, 2)."""
    line = torch.linspace(-1, 1, size, device=device)
    return torch.cartesian_prod(line, line)


class Fit(NamedTuple):
    """What a fit leaves: for each step the loss, and the norm of each layer's retained gradient.

    Attributes:
        losses: shape (steps,).
        norms: shape (layers, steps): the 2-norm of dloss/dc over all pixels.
    """

    losses: torch.Tensor
    norms: torch.Tensor


Run = Callable[[torch.Tensor, Sequence[ro.Retained]], torch.Tensor]
"""How the network is run: the module itself, or torch.compile of it."""


def fit(
    model: Siren,
    run: Run,
    x: torch.Tensor,
    target: torch.Tensor,
    steps: int,
    progress: Callable[[int, torch.Tensor], None],
) -> Fit:
    """Fit the network to `target` with Adam, all pixels in every step, retaining every layer's dloss/dc.

    Args:
        model: the network, whose parameters are fitted.
        run: runs it.
        x: coordinates, shape (pixels, 2).
        target: values in [-1, 1], shape (pixels, channels).
        steps: how many.
        progress: called after each step with its number and its loss.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    kept = [ro.Retained("c") for _ in model.hidden]
    losses = torch.empty(steps, device=x.device)
    norms = torch.empty(len(kept), steps, device=x.device)
    for step in range(steps):
        loss = (run(x, kept) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses[step] = loss.detach()
        for layer, request in enumerate(kept):
            norms[layer, step] = torch.linalg.vector_norm(request.c.grad)
            request.reset()
        progress(step, losses[step])
    return Fit(losses.cpu(), norms.cpu())


class LayerCheck(NamedTuple):
    """One layer's retained gradient beside eager's.

    Attributes:
        difference: max |retained - eager|.
        relative: that over max |eager|.
        error, eager_error: max distance of each from the same network in float64.
    """

    difference: float
    relative: float
    error: float
    eager_error: float

    @property
    def verdict(self) -> str:
        """In words; "differs" is the only bad one."""
        if self.difference == 0:
            return "bitwise equal"
        # Both are float32 results of the same chain of layers, rounded at other places: neither is the right one.
        return "agrees" if self.error <= 2 * self.eager_error else "differs"


def compare_with_eager(model: Siren, run: Run, x: torch.Tensor, target: torch.Tensor) -> list[LayerCheck]:
    """Every layer's retained gradient beside eager's `retain_grad()`, at the network's present weights."""
    kept = [ro.Retained("c") for _ in model.hidden]
    (run(x, kept) - target).square().mean().backward()
    retained = [request.c.grad for request in kept if request.c.grad is not None]
    eager = _eager_grads(model, x, target)
    oracle = _eager_grads(copy.deepcopy(model).double(), x.double(), target.double())
    checks = []
    for ours, plain, exact in zip(retained, eager, oracle, strict=True):
        difference = _largest(ours - plain)
        relative = difference / max(_largest(plain), torch.finfo(plain.dtype).tiny)
        checks.append(LayerCheck(difference, relative, _largest(ours - exact), _largest(plain - exact)))
    return checks


def _eager_grads(model: Siren, x: torch.Tensor, target: torch.Tensor) -> list[torch.Tensor]:
    y, interiors = model.eager(x)
    (y - target).square().mean().backward()
    return [c.grad for c in interiors if c.grad is not None]


def _largest(x: torch.Tensor) -> float:
    return x.abs().max().item()


def psnr(mean_square: float) -> float:
    """Peak signal-to-noise ratio in dB of values whose range is [-1, 1], from their mean squared error."""
    return 10 * math.log10(4 / mean_square) if mean_square else math.inf
