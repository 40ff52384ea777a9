"""Every family, fused against unfused: values, gradients, interiors, in float32 and bfloat16."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import retainops as ro
from tests.fusing.families import FAMILIES, make, step

over_families = pytest.mark.parametrize("name", FAMILIES)


def scales(results: dict[str, torch.Tensor]) -> dict[str, float]:
    """The magnitude of each tensor; of one whose true value is zero, as a bias of keys has it, of its neighbours."""
    top = max(t.abs().max().item() for t in results.values())
    return {name: t.abs().max().item() + 1e-3 * top for name, t in results.items()}


@over_families
def test_float32(name: str) -> None:
    model, inputs = make(name)
    before, keys, kinds = step(model, inputs), list(model.state_dict()), [type(m) for m in model.modules()]
    table = ro.fuse(model)
    assert Counter(row.op.split("(")[0] for row in table.replaced) == FAMILIES[name].ops
    assert list(model.state_dict()) == keys
    after = step(model, inputs)
    assert list(after) == list(before)
    for what, scale in scales(before).items():
        assert after[what].dtype == before[what].dtype
        torch.testing.assert_close(after[what], before[what], rtol=0, atol=16 * 1.2e-7 * scale, msg=what)

    ro.unfuse(model)
    assert [type(m) for m in model.modules()] == kinds
    again = step(model, inputs)
    assert all(torch.equal(again[what], before[what]) for what in before)


@over_families
def test_bfloat16(name: str) -> None:
    """As far from the float32 model of the same weights as the unfused one is, or nearer."""
    model, inputs = make(name, torch.bfloat16)
    wide = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    true = step(copy.deepcopy(model).float(), wide)
    theirs = step(model, inputs)
    ro.fuse(model)
    ours = step(model, inputs)
    errors = {"theirs": 0.0, "ours": 0.0}
    for what, scale in scales(true).items():
        assert ours[what].dtype == theirs[what].dtype
        error = {"theirs": theirs[what], "ours": ours[what]}
        each = {who: (t.float() - true[what]).abs().max().item() / scale for who, t in error.items()}
        assert each["ours"] <= 2.5 * each["theirs"] + 2**-8, what
        errors = {who: errors[who] + each[who] for who in errors}
    assert errors["ours"] <= 1.3 * errors["theirs"]


LINEARS = {"gate": ("gate_proj", "wi_0"), "up": ("up_proj", "wi_1"), "c": ("c_fc", "dense", "fc1", "linear1")}
ACTS = ("act_fn", "act", "activation_fn")


def child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((getattr(module, n) for n in names if hasattr(module, n)), None)


class Eager:
    """The gradients at the points of a model that is not fused, by its modules' outputs and `retain_grad()`."""

    def __init__(self, model: nn.Module, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.values: dict[str, Any] = {}
        self.turned: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.handles = [h for name in names for h in self.watch(model, name, monkeypatch)]

    def keep(self, name: str, value: torch.Tensor) -> None:
        if value.requires_grad:
            value.retain_grad()
        self.values[name] = value

    def watch(self, model: nn.Module, name: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        path, _, point = name.rpartition(".")
        if point == "logits":
            return []
        module = model.get_submodule(path)
        if point in ("q_rot", "k_rot"):
            scope = inspect.unwrap(type(module).forward).__globals__
            function = scope["apply_rotary_pos_emb"]

            def recording(*args: Any) -> Any:
                self.turned.append(function(*args))
                for t in self.turned[-1]:
                    t.retain_grad()
                return self.turned[-1]

            if function.__name__ != "recording":
                monkeypatch.setitem(scope, "apply_rotary_pos_emb", recording)
            return []
        if point == "summed":
            return [module.register_forward_pre_hook(lambda m, args: self.keep(name, args[0]))]
        source = (
            child(module, LINEARS[point]) if point in LINEARS else child(module, ACTS) if point == "act" else module
        )
        packed = None if source is not None else module.gate_up_proj
        return [(packed or source).register_forward_hook(lambda m, i, out: self.keep(name, out))]

    def grad(self, model: nn.Module, name: str) -> torch.Tensor:
        path, _, point = name.rpartition(".")
        if point == "logits":  # flattened, where the model's own code does that before its loss
            grad = self.values["logits"].grad
            return grad if path else grad.flatten(0, 1)
        if point in ("q_rot", "k_rot"):
            layer = int(path.split(".layers.")[1].split(".")[0])
            return self.turned[layer][point == "k_rot"].grad
        grad, module = self.values[name].grad, model.get_submodule(path)
        if point in ("xhat", "y"):
            if type(module).__name__ == "LayerNorm2d":
                grad = grad.permute(0, 2, 3, 1)
            return grad * (module.weight + ("Gemma" in type(module).__name__))
        if hasattr(module, "gate_up_proj") and point in ("gate", "up"):
            return grad.chunk(2, -1)[point == "up"]
        return grad


@over_families
def test_interiors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = make(name)
    ro.fuse(model)
    # Attention's have a test of their own.
    names = [n for n in ro.points(model) if n.rpartition(".")[2] not in ("s", "p", "o")]
    with ro.retain(model, names) as kept:
        torch.manual_seed(5)
        out = model(**inputs)
        (out if isinstance(out, torch.Tensor) else getattr(out, "loss", out.logits)).square().sum().backward()
    ro.unfuse(model)
    eager = Eager(model, names, monkeypatch)
    torch.manual_seed(5)
    out = model(**inputs)
    if not isinstance(out, torch.Tensor):
        eager.keep("logits", out.logits)
    (out if isinstance(out, torch.Tensor) else getattr(out, "loss", out.logits)).square().sum().backward()
    unreached = {n for n in names if kept[n].grad is None}
    if name == "torch encoder, norm first":  # its first norm has no sum, and reads data, which has no gradient
        assert unreached == {"layers.0.norm1.summed", "layers.0.norm1.xhat", "layers.1.norm1.summed"}
    else:
        assert not unreached
    for n in set(names) - unreached:
        expected = eager.grad(model, n)
        scale = expected.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(kept[n].grad, expected, rtol=0, atol=1e-4 * scale, msg=n)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "bert", "vit"])
def test_interiors_of_attention(name: str) -> None:
    """Of attention modules that other rules have fused too, by their own weights and `retain_grad()`."""
    model, inputs = make(name)
    model.eval()
    if name == "gemma2":  # it comes with eager attention, which no rule takes away
        model.set_attn_implementation("retainops")
    ro.fuse(model)
    with ro.retain(model, "*.p") as kept:
        model(**inputs).logits.square().sum().backward()
    ro.unfuse(model)
    model.set_attn_implementation("eager")
    out = model(**inputs, output_attentions=True)
    for p in out.attentions:
        p.retain_grad()
    out.logits.square().sum().backward()
    found = [slot.grad for point, slot in kept.items() if point not in ("lm_loss.p", "p")]
    assert len(found) == len(out.attentions) == 2
    for ours, theirs in zip(found, out.attentions, strict=True):
        scale = theirs.grad.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(ours, theirs.grad, rtol=0, atol=1e-4 * scale)
