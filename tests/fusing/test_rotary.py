"""The functions for rotary position embedding that models of transformers have, each in its own form."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn

import retainops as ro
from retainops.fusing.rotary import Form, form_of

Tensor = torch.Tensor
SIZE = 8

FORMS = {
    "llama": Form(),
    "modernbert": Form(),  # in float32 whatever comes
    "phi3": Form(partial=True, packs=True),
    "qwen3_next": Form(partial=True, packs=True),
    "cohere": Form(interleaved=True),
    "glm4v": Form(interleaved=True, partial=True, packs=True),
    "ernie4_5": Form(interleaved=True, half_tables=True, repeated=True),
    "glm": Form(interleaved=True, half_tables=True, repeated=True, partial=True, packs=True),
    "gpt_oss": Form(half_tables=True, packs=True),
}
OTHERS = ["nanochat", "gemma4", "dinov3_vit"]  # the other way round; of one tensor; of images


def function_of(name: str) -> Any:
    module = pytest.importorskip(f"transformers.models.{name}.modeling_{name}", reason="an older transformers")
    return module.apply_rotary_pos_emb


apply_rotary_pos_emb: Any = None


class Attention(nn.Module):
    """(batch, heads, tokens, width), as models have q and k: a transposed view."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(6, 3 * SIZE), nn.Linear(6, SIZE)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q = self.q(x).unflatten(-1, (3, SIZE)).transpose(1, 2)
        k = self.k(x).unflatten(-1, (1, SIZE)).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q, k


def inputs(form: Form, turned: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    torch.manual_seed(4)
    angles = torch.rand(2, 5, turned // 2) * 6
    if form.interleaved and not form.half_tables:
        angles = angles.repeat_interleave(2, -1)
    elif not form.half_tables or form.repeated:
        angles = torch.cat([angles, angles], -1)
    return tuple(t.to(dtype) for t in (torch.randn(2, 5, 6), angles.cos(), angles.sin()))


def step(model: nn.Module, given: tuple[Tensor, ...]) -> dict[str, Tensor]:
    model.zero_grad()
    q, k = model(*given)
    for t in (q, k):
        t.retain_grad()
    (q.float() * torch.linspace(-1, 1, q.numel()).view(q.shape)).sum().backward(retain_graph=True)
    (k.float().square() * torch.linspace(1, 2, k.numel()).view(k.shape)).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    return {"q": q, "k": k, "q_rot": q.grad, "k_rot": k.grad, **grads}


@pytest.fixture
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setattr(sys.modules[__name__], "apply_rotary_pos_emb", function_of(request.param))
    torch.manual_seed(3)
    return Attention()


over_models = pytest.mark.parametrize(("model", "form"), FORMS.items(), indirect=["model"], ids=list(FORMS))


@over_models
@pytest.mark.parametrize("turned", [SIZE, SIZE // 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_values_gradients_points_and_strides(model: nn.Module, form: Form, turned: int, dtype: torch.dtype) -> None:
    if turned < SIZE and not form.partial:
        pytest.skip("the function takes tables as wide as q alone")
    given, model = inputs(form, turned, dtype), model.to(dtype)
    theirs = step(model, given)
    assert [row.op for row in ro.fuse(model)] == ["rope"]
    ours = step(model, given)
    with ro.retain(model) as kept:
        asked = step(model, given)
    eps = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps  # some compute in float32 always
    for what, value in theirs.items():
        assert (ours[what].dtype, ours[what].stride()) == (value.dtype, value.stride())
        torch.testing.assert_close(ours[what], value, rtol=0, atol=4 * eps * value.abs().max().item())
        assert torch.equal(asked[what], ours[what])
    for point in ("q_rot", "k_rot"):
        bound = 4 * eps * theirs[point].abs().max().item()
        torch.testing.assert_close(kept[point].grad, theirs[point], rtol=0, atol=bound)


@over_models
def test_the_function_is_called_for_what_it_was_not_tried_on(
    model: nn.Module, form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One table for all samples goes to the op; fewer positions than there are tokens, and an odd width, do not."""
    calls = [0]
    original = apply_rotary_pos_emb

    def counted(*args: Any) -> Any:
        calls[0] += 1
        return original(*args)

    monkeypatch.setattr(sys.modules[__name__], "apply_rotary_pos_emb", counted)
    assert form_of(counted) == form
    x, cos, sin = inputs(form, SIZE)
    cases = {(x, cos, sin): 0, (x, cos[:1], sin[:1]): 0, (x, cos[:, :1], sin[:, :1]): 1, (x, cos, sin[:1]): 1}
    if form.partial and not form.repeated:
        cases[x, cos[..., :3], sin[..., :3]] = 1
    for given, expected in cases.items():
        try:
            theirs = step(model, given)
        except RuntimeError:  # GPT-OSS's takes no odd width
            continue
        ro.fuse(model)
        calls[0] = 0
        with ro.retain(model) as kept:
            ours = step(model, given)
        assert calls[0] == expected
        for what, value in theirs.items():
            torch.testing.assert_close(ours[what], value)
        assert all(slot.grad is not None for slot in kept.values())
        ro.unfuse(model)


@over_models
def test_form(model: nn.Module, form: Form) -> None:
    assert form_of(apply_rotary_pos_emb) == form


@pytest.mark.parametrize("name", OTHERS)
def test_what_has_no_form_of_ours(name: str) -> None:
    assert form_of(function_of(name)) is None


@pytest.mark.parametrize("model", ["cohere", "glm"], indirect=True)
def test_compiled(model: nn.Module) -> None:
    torch._dynamo.reset()
    given = inputs(form_of(apply_rotary_pos_emb) or Form(), SIZE)
    ro.fuse(model)
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    with ro.retain(compiled) as kept:
        sum(t.square().sum() for t in compiled(*given)).backward()
    with ro.retain(model) as eager:
        sum(t.square().sum() for t in model(*given)).backward()
    for point, slot in eager.items():
        torch.testing.assert_close(kept[point].grad, slot.grad)


def returns_float(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.float() for t in function_of("llama")(q, k, cos, sin))


def test_one_that_returns_another_dtype_in_16_bits() -> None:
    assert form_of(returns_float) is None
