"""A call's scores, what eager PyTorch makes of their gradients, and how near that others have to be."""

from __future__ import annotations

import torch

from retainops.ops._scores import Scores
from tests.attention_cases import Case, eager

Tensor = torch.Tensor


class Run:
    """A case's scores for the kernels, and eager's gradients of s and p, in float64 and in the dtype."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
        q, k, v, mask = case.tensors(dtype, device)
        generator = torch.Generator().manual_seed(7)
        self.do = torch.randn((*q.shape[:-1], v.shape[-1]), generator=generator, dtype=torch.float64).to(device, dtype)
        self.truth = self._grads(case, q.double(), k.double(), v.double(), mask)
        self.eager = self._grads(case, q, k, v, mask)
        left, right = case.window if isinstance(case.window, tuple) else (case.window, case.window)
        self.scores = Scores(
            q=q.detach(),
            k=k.detach(),
            v=v.detach(),
            mask=mask,
            do=self.do,
            o=self.truth["o"].to(dtype),
            lse=None,
            scale=q.shape[-1] ** -0.5 if case.scale is None else case.scale,
            causal=case.causal,
            window=(left, right),
            softcap=case.softcap,
            q_at=None,
            k_at=None,
        )

    def _grads(self, case: Case, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        mask = mask.to(q.dtype) if mask is not None and mask.is_floating_point() else mask
        points = eager(case, q, k, v, mask)
        points["o"].backward(self.do.to(q.dtype))
        values = {f"value of {name}": points[name].detach() for name in ("s", "p")}
        return {name: points[name].grad for name in ("s", "p")} | values | {"o": points["o"].detach()}

    def empty(self) -> Tensor:
        """For a gradient: whatever it is not written to shows."""
        return torch.full(self.scores.shape, torch.nan, dtype=self.do.dtype, device=self.do.device)


def check_as_eager(found: Tensor, truth: Tensor, eager: Tensor) -> None:
    """As `check_op` has it: an error of eager's, and one unit in the last place."""
    assert not found.isnan().any()
    assert error(found, truth) <= error(eager, truth) + eps_of(eager.dtype) * largest(truth)


def check(name: str, found: Tensor, truth: Tensor, eager: Tensor, size: float = 0) -> None:
    """An error of 4 times eager's, or of 8 eps of the largest magnitude, whichever is larger.

    `size`: what that magnitude would be if nothing cancelled.
    """
    assert found.shape == truth.shape, name
    assert torch.equal(found.isnan(), truth.isnan()), f"{name} is nan elsewhere"
    allowed = max(4 * error(eager, truth), 8 * eps_of(eager.dtype) * max(size, largest(truth)))
    assert error(found, truth) <= allowed, f"{name}: error {error(found, truth):.2e}; allowed {allowed:.2e}"


def error(x: Tensor, truth: Tensor) -> float:
    return largest(x.double() - truth)


def largest(x: Tensor) -> float:
    return float(x.nan_to_num(0.0).abs().max()) if x.numel() else 0.0


def eps_of(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps
