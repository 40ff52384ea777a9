"""Attention in models that know nothing of retainops: PyTorch's function where a module calls it, and its module."""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import retainops as ro
from tests.fusing.families import make, step

Tensor = torch.Tensor
POINTS = ("s", "p", "o")


class Recorded:
    """Attention by its definition, whose interiors have their gradients retained."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Tensor]] = []

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if enable_gqa:
            key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
        s = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(s.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None:
            s = s.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else s + attn_mask
        p = s.softmax(-1)
        o = F.dropout(p, dropout_p) @ value
        for t in (s, p, o):
            t.retain_grad()
        self.calls.append({"s": s, "p": p, "o": o})
        return o


def assert_points_are_eagers(
    model: nn.Module, loss: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """The gradients at the points of each call, in the order of the modules, beside `retain_grad()`."""
    before = loss()
    ro.fuse(model)
    torch.testing.assert_close(loss(), before)
    paths = list(dict.fromkeys(name.rpartition(".")[0] for name in ro.points(model) if name.rpartition(".")[2] == "s"))
    assert len(paths) == calls
    with ro.retain(model, [f"{path}.{point}".lstrip(".") for path in paths for point in POINTS]) as kept:
        loss().backward()
    ro.unfuse(model)
    recorded = Recorded()
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", recorded)
        loss().backward()
    assert len(recorded.calls) == calls
    for path, of_call in zip(paths, recorded.calls, strict=True):
        for point, expected in of_call.items():
            ours, theirs = kept[f"{path}.{point}".lstrip(".")].grad, expected.grad
            scale = theirs.abs().max().item()
            assert scale > 0
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("name", ["timm vit", "torch encoder", "torch encoder, norm first"])
def test_the_points_of_families(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = make(name)
    model.eval()  # dropout of as many numbers as a module draws is tested with the families
    assert_points_are_eagers(model, lambda: model(**inputs).square().sum(), monkeypatch, calls=2)


class Heads(nn.Module):
    """Attention of (batch, heads, tokens, width), written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.dropout = nn.Linear(8, 24), 0.0

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)


class Plain(Heads):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return F.scaled_dot_product_attention(q, k, v)


class Causal(Heads):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        dropout = self.dropout if self.training else 0
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=None, dropout_p=dropout, is_causal=True
        )


class Everything(Heads):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        mask = torch.zeros(x.shape[1], x.shape[1]).fill_diagonal_(-1.0)
        more = {"enable_gqa": True}
        return nn.functional.scaled_dot_product_attention(
            q, value=v[:, :1], key=k[:, :1], attn_mask=mask, scale=0.3, **more
        )


FORMS = [Plain, Causal, Everything]
over_forms = pytest.mark.parametrize("cls", FORMS, ids=lambda cls: cls.__name__)


def made(cls: type[nn.Module], *args: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return cls(*args), torch.randn(2, 5, 8)


@over_forms
def test_the_forms_of_a_call(cls: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = made(cls)
    assert_points_are_eagers(model, lambda: model(x).square().sum(), monkeypatch, calls=1)


@over_forms
def test_compiled(cls: type[nn.Module]) -> None:
    torch._dynamo.reset()
    model, x = made(cls)
    expected = model(x)
    ro.fuse(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    with ro.retain(compiled, "p") as kept:
        compiled(x).square().sum().backward()
    with ro.retain(model, "p") as eager:
        model(x).square().sum().backward()
    torch.testing.assert_close(kept["p"].grad, eager["p"].grad)


def test_dropout_is_that_of_the_call() -> None:
    model, x = made(Causal)
    model.dropout = 0.5
    torch.manual_seed(1)
    expected = model(x)
    ro.fuse(model)
    torch.manual_seed(1)
    assert torch.equal(model(x), expected)


def test_a_function_that_is_exchanged_later(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = made(Causal)
    ro.fuse(model)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **named: (named["is_causal"] + 1) * q)
    with ro.retain(model, POINTS) as kept:
        out = model(x)
        out.sum().backward()
    torch.testing.assert_close(out, 2 * model.heads(x)[0])
    assert [kept[name].grad is None for name in POINTS] == [True, True, False]


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Not PyTorch's."""
    return q + k + v


class Own(Heads):
    def forward(self, x: Tensor) -> Tensor:
        return scaled_dot_product_attention(*self.heads(x))


class Twice(Heads):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return F.scaled_dot_product_attention(q, F.scaled_dot_product_attention(q, k, v), v)


def test_what_is_no_call_of_it_or_one_too_many() -> None:
    assert not ro.fuse(made(Own)[0])
    model, x = made(Twice)
    expected = model(x)
    table = ro.fuse(model)
    assert [row.op for row in table] == ["sdpa(F.scaled_dot_product_attention)", None]
    assert "a second of its kind" in table[1].why
    torch.testing.assert_close(model(x), expected)


def test_timm_without_the_function() -> None:
    model, _ = make("timm vit")
    for block in model.blocks:
        block.attn.fused_attn = False
    why = "its fused_attn is False, with which timm's attention does not call it"
    assert [row.why for row in ro.fuse(model).left] == [f"sdpa(F.scaled_dot_product_attention): {why}"] * 2


# torch.nn.MultiheadAttention


def masked() -> dict[str, Tensor]:
    """Of two samples of 7 tokens, in the ways that an encoder hands masks on."""
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 5:] = True
    return {"mask": torch.ones(7, 7, dtype=torch.bool).triu(1), "src_key_padding_mask": padding}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masks", [{}, masked()], ids=["no masks", "masks"])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("asked", [True, False])
def test_an_encoder(training: bool, masks: dict[str, Tensor], grad: bool, asked: bool) -> None:
    """PyTorch's own fused path is taken where it was, and bypasses nothing that is asked."""
    model, inputs = make("torch encoder")
    model.train(training)
    with torch.set_grad_enabled(grad):
        torch.manual_seed(1)
        expected = model(**inputs, **masks)
        ro.fuse(model, rules=["multihead_attention"])
        torch.manual_seed(1)
        # In eval the layer calls PyTorch's own fused path, and no module of ours learns of it.
        warns = not grad and training
        said = pytest.warns(RuntimeWarning, match="without grad") if warns else contextlib.nullcontext()
        with said, ro.retain(model, "*.p" if asked else "*.o") as kept:
            ours = model(**inputs, **masks)
            if grad:
                ours.square().sum().backward()
    torch.testing.assert_close(ours, expected)
    assert all((slot.grad is not None) == grad for slot in kept.values())
    assert len(kept) == 2


def test_arguments_by_name_of_which_some_are_left_out() -> None:
    torch.manual_seed(0)
    model, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 5, 8)
    given = {"attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1), "average_attn_weights": False}
    expected = model(x, x, x, **given)
    ro.fuse(model)
    for ours, theirs in zip(model(x, key=x, value=x, **given), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_it_stays_the_module_that_it_is() -> None:
    torch.manual_seed(0)
    model = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x, memory = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    parameters, keys, expected = list(model.parameters()), list(model.state_dict()), model(x, memory)
    seen: list[Any] = []
    model.self_attn.register_forward_hook(lambda module, args, out: seen.append(out[0].shape))
    assert [row.op for row in ro.fuse(model) if row.kind == "MultiheadAttention"] == ["attention"] * 2
    assert {"self_attn.p", "multihead_attn.p"} <= set(ro.points(model))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    assert isinstance(model.self_attn, nn.MultiheadAttention)
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model.multihead_attn))):
        if other is model:
            torch.testing.assert_close(other(x, memory), expected)
        ro.unfuse(other)
        assert not [m for m in other.modules() if isinstance(m, ro.nn.MultiheadAttention)]
    assert len(seen) == 1
    torch.testing.assert_close(model(x, memory), expected, rtol=0, atol=0)


def test_a_hook_that_pytorch_never_calls() -> None:
    """Its module takes the weights of its projection, and so does ours when it is asked."""
    torch.manual_seed(0)
    model, x = nn.MultiheadAttention(8, 2), torch.randn(5, 2, 8)
    expected = model(x, x, x, need_weights=False)[0]
    model.out_proj.register_forward_hook(lambda module, args, out: 2 * out)
    ro.fuse(model)
    with ro.retain(model, "p"):
        assert torch.equal(model(x, x, x, need_weights=False)[0], expected)


class LoudAttention(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out, weights = super().forward(*args, **kwargs)
        return 2 * out, weights


def test_a_subclass_that_overrides() -> None:
    why = "it overrides the forward of torch.nn.MultiheadAttention"
    assert [(row.op, row.why) for row in ro.fuse(LoudAttention(8, 2))] == [(None, why)]


def test_one_whose_forward_was_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.MultiheadAttention, "forward", lambda self, query, *others: (query, None))
    why = "the forward of torch.nn.MultiheadAttention was exchanged"
    assert [(row.op, row.why) for row in ro.fuse(nn.MultiheadAttention(8, 2))] == [(None, why)]


def test_a_step_of_training_with_everything_asked() -> None:
    """With dropout: the same numbers are drawn, whatever is asked."""
    for name in ("timm vit", "torch encoder"):
        model, inputs = make(name)
        ro.fuse(model)
        theirs = step(model, inputs)
        with ro.retain(model, ["*.s", "*.p", "*.o"]):
            ours = step(model, inputs)
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-5 * value.abs().max().item() + 1e-6)
