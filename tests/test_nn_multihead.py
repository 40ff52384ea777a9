"""MultiheadAttention beside PyTorch's: outputs, gradients and weights to the bit, and the points it has in addition."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

import retainops as ro
from tests.conftest import Path

Tensor = torch.Tensor
N, L, S, E, H = 2, 5, 7, 12, 3


@dataclass
class Case:
    """How the module is made and called."""

    options: dict[str, Any] = field(default_factory=dict)
    same: str = "none"  # which of query, key and value are one tensor
    mask: str = ""  # of attn_mask: "", "bool", "float", "heads" (one for each), "causal"
    padding: str = ""  # of key_padding_mask: "", "bool", "float"
    batched: bool = True

    @property
    def lengths(self) -> tuple[int, int]:
        return (L, L) if self.same == "all" else (L, S)


CASES = {
    "self": Case(same="all"),
    "self, batch first": Case({"batch_first": True}, same="all"),
    "cross, key is value": Case({"batch_first": True}, same="key and value"),
    "three tensors": Case(),
    "no bias": Case({"bias": False}, same="all"),
    "kdim, vdim": Case({"kdim": 4, "vdim": 6}),
    "bias_kv": Case({"add_bias_kv": True}, mask="bool"),
    "zero_attn": Case({"add_zero_attn": True, "add_bias_kv": True}, padding="bool"),
    "boolean mask": Case(mask="bool"),
    "added mask, padding": Case({"batch_first": True}, same="all", mask="float", padding="float"),
    "a mask for each head, padding": Case(mask="heads", padding="bool"),
    "causal": Case({"batch_first": True}, same="all", mask="causal"),
    "causal, padding, one key more": Case({"add_bias_kv": True}, same="all", mask="causal", padding="bool"),
    "self, unbatched": Case(same="all", batched=False),
    "unbatched": Case({"batch_first": True}, mask="heads", padding="bool", batched=False),
}
over_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def modules(case: Case, dtype: torch.dtype = torch.float32) -> tuple[ro.nn.MultiheadAttention, nn.MultiheadAttention]:
    """Ours and PyTorch's, with the same weights."""
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(E, H, **case.options, dtype=dtype)
    for w in theirs.parameters():
        nn.init.normal_(w, std=0.5)
    ours = ro.nn.MultiheadAttention(E, H, **case.options, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(case: Case, module: nn.MultiheadAttention, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Query, key, value and masks; no row is masked altogether."""
    generator = torch.Generator().manual_seed(4)
    n, (length, keys) = N if case.batched else 1, case.lengths

    def drawn(length: int, features: int) -> Tensor:
        x = torch.randn(length, n, features, generator=generator, dtype=torch.float64).to(dtype)
        x = x.transpose(0, 1) if module.batch_first else x
        return x.requires_grad_() if case.batched else x.reshape(length, features).requires_grad_()

    query = drawn(length, E)
    key = query if case.same == "all" else drawn(keys, module.kdim)
    value = key if case.same != "none" else drawn(keys, module.vdim)
    given: dict[str, Any] = {"query": query, "key": key, "value": value}
    size = (n * H, length, keys) if case.mask == "heads" else (length, keys)
    hidden = torch.rand(size, generator=generator) < 0.4
    hidden[..., 0] = False
    if case.mask == "float":
        given["attn_mask"] = torch.randn(size, generator=generator).to(dtype).masked_fill(hidden, -torch.inf)
    elif case.mask == "causal":
        given["attn_mask"] = torch.ones(size, dtype=torch.bool).triu(1)
        given["is_causal"] = True
    elif case.mask:
        given["attn_mask"] = hidden
    if case.padding:
        padding = torch.zeros(n, keys, dtype=torch.bool)
        padding[0, -2:] = True
        if case.padding == "float":
            padding = torch.zeros(n, keys, dtype=dtype).masked_fill(padding, -torch.inf)
        given["key_padding_mask"] = padding if case.batched else padding[0]
    return given


def run(module: nn.Module, given: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """The output, the weights, and the gradients of inputs and parameters, of a random projection of them."""
    y, weights = module(**given, **options)
    generator = torch.Generator().manual_seed(5)
    loss = sum((t * torch.randn(t.shape, generator=generator).to(t.dtype)).sum() for t in (y, weights) if t is not None)
    leaves = {id(t): t for t in given.values() if isinstance(t, Tensor) and t.requires_grad}.values()
    grads = torch.autograd.grad(loss, [*leaves, *module.parameters()])
    return y, weights, list(grads)


def eager(module: nn.MultiheadAttention, given: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The output and the points, written down from the definition: another expression than PyTorch's and ours."""
    first = (lambda t: t.transpose(0, 1)) if module.batch_first and given["query"].dim() == 3 else (lambda t: t)
    q, k, v = (
        first(given[name]).reshape(-1, 1 if given[name].dim() == 2 else N, given[name].shape[-1])
        for name in ("query", "key", "value")
    )
    n = q.shape[1]
    weights = (
        module.in_proj_weight.chunk(3)
        if module.in_proj_weight is not None
        else (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    )
    q, k, v = (t @ w.mT for t, w in zip((q, k, v), weights, strict=True))
    if module.in_proj_bias is not None:
        q, k, v = (t + b for t, b in zip((q, k, v), module.in_proj_bias.chunk(3), strict=True))
    for extra in ([(module.bias_k, module.bias_v)] if module.bias_k is not None else []) + (
        [(k.new_zeros(1, 1, E),) * 2] if module.add_zero_attn else []
    ):
        k, v = (torch.cat([t, e.expand(1, n, E)]) for t, e in zip((k, v), extra, strict=True))
    q, k, v = (torch.einsum("lnhd->nhld", t.unflatten(-1, (H, E // H))) for t in (q, k, v))
    s = torch.einsum("nhld,nhsd->nhls", q, k) / (E // H) ** 0.5
    for name, view in (
        ("attn_mask", lambda m: m.unflatten(0, (n, H)) if m.dim() == 3 else m),
        ("key_padding_mask", lambda m: m.reshape(n, 1, 1, -1)),
    ):
        if (mask := given.get(name)) is not None:
            added = (
                torch.zeros(mask.shape, dtype=s.dtype).masked_fill(mask, -torch.inf)
                if (mask.dtype == torch.bool)
                else mask
            )
            s = s + nn.functional.pad(view(added), (0, s.shape[-1] - mask.shape[-1]))
    s.retain_grad()
    p = torch.softmax(s, -1)
    p.retain_grad()
    o = torch.einsum("nhls,nhsd->nhld", p, v)
    o.retain_grad()
    y = torch.einsum("nhld->lnhd", o).flatten(2) @ module.out_proj.weight.mT
    y = y if module.out_proj.bias is None else y + module.out_proj.bias
    y = y.squeeze(1) if given["query"].dim() == 2 else first(y)
    return y, {"s": s, "p": p, "o": o}


@over_cases
@pytest.mark.parametrize("need_weights", [False, True])
def test_outputs_and_gradients_are_pytorchs_to_the_bit(case: Case, need_weights: bool) -> None:
    ours, theirs = modules(case)
    given = inputs(case, theirs)
    for average in (True, False)[: 1 + need_weights]:
        options = {"need_weights": need_weights, "average_attn_weights": average}
        y, weights, grads = run(theirs, given, **options)
        for what in (None, "s", "p"):
            if what is None:
                found = run(ours, given, **options)
            else:
                with ro.retain(ours, what):
                    found = run(ours, given, **options)
            assert torch.equal(found[0], y)
            assert weights is None if found[1] is None else torch.equal(found[1], weights)
            for mine, wanted in zip(found[2], grads, strict=True):
                assert torch.equal(mine, wanted), (what, (mine - wanted).abs().max())
            assert found[0].stride() == y.stride()


@over_cases
@pytest.mark.parametrize("need_weights", [False, True])
def test_points(case: Case, need_weights: bool) -> None:
    ours, theirs = modules(case, torch.float64)
    given = inputs(case, theirs, torch.float64)
    y, points = eager(theirs, given)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    y.backward(dy)
    with ro.retain(ours) as kept:
        out, _ = ours(**given, need_weights=need_weights)
        out.backward(dy)
    torch.testing.assert_close(out, y)
    assert list(kept) == ["s", "p", "o"]
    for name, value in points.items():
        torch.testing.assert_close(kept[name].grad, value.grad, msg=lambda m, name=name: f"{name}: {m}")


def test_relevance_and_parts_of_a_transformer() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(E, H, 16, dropout=0.0, batch_first=True, norm_first=True),
        2,
        enable_nested_tensor=False,
    )
    x, dy = torch.randn(N, L, E), torch.randn(N, L, E)
    for layer in model.layers:
        ours = ro.nn.MultiheadAttention(E, H, batch_first=True)
        ours.load_state_dict(layer.self_attn.state_dict())
        layer.self_attn = ours
    assert [name for name in ro.points(model) if name.endswith(".p")] == [f"layers.{i}.self_attn.p" for i in range(2)]
    plain = model(x)
    with ro.retain(model, "*.p") as full, ro.retain(model, "*.o", ro.Part(heads=1)) as part:
        y = model(x)
        y.backward(dy)
    assert torch.equal(plain, y)
    with ro.retain(model, "*.p", ro.Relevance("chefer", "legrad")) as kept:
        model(x).backward(dy)
    for name, slot in kept.items():
        dp = full[name].grad
        assert dp.shape == (N, H, L, L)
        torch.testing.assert_close(slot.legrad, dp.relu().mean((1, 2)))
        assert slot.chefer.shape == (N, L, L)
        assert part[name.removesuffix("p") + "o"].grad.shape == (N, 1, L, E // H)


def test_on_each_path(path: Path) -> None:
    case = CASES["boolean mask"]
    ours, theirs = modules(case)
    given = inputs(case, theirs)
    y, points = eager(theirs, given)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    y.backward(dy)
    ours, on_device = ours.to(path.device), {}
    for name, t in given.items():
        on_device[name] = t.detach().to(path.device).requires_grad_(t.requires_grad)
    with ro.retain(ours, "p", ro.Relevance("legrad")) as relevance, ro.retain(ours, "[sp]") as kept:
        ours(**on_device, need_weights=False)[0].backward(dy.to(path.device))
    for name, slot in kept.items():
        torch.testing.assert_close(slot.grad.cpu(), points[name].grad)
    torch.testing.assert_close(relevance["p"].legrad.cpu(), points["p"].grad.relu().mean((1, 2)))


def test_dropout_in_training_and_not_in_evaluation() -> None:
    """p is before dropout: its gradient contains the factors, 0 or 1 / (1 - dropout), of the weights used."""
    ours, _ = modules(Case({"dropout": 0.5}))
    given = inputs(Case(), ours)
    with ro.retain(ours, "p") as kept:
        y, weights = ours(**given, average_attn_weights=False)
        y.sum().backward()
    dropped = weights == 0
    assert 0.2 < dropped.float().mean() < 0.8
    assert torch.equal(kept.p.grad == 0, dropped)
    with ro.retain(ours, "p") as kept:
        ours(**given, need_weights=False)[0].sum().backward()
    assert 0.2 < (kept.p.grad == 0).float().mean() < 0.8
    ours.eval()
    with ro.retain(ours, "p") as kept:
        ours(**given, need_weights=False)[0].sum().backward()
    assert not (kept.p.grad == 0).any()


def test_it_is_pytorchs_module() -> None:
    ours, theirs = modules(Case({"batch_first": True}))
    assert isinstance(ours, nn.MultiheadAttention)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert repr(ours) == repr(theirs)
    x = torch.randn(N, L, E)
    ours.eval(), theirs.eval()
    said = pytest.warns(RuntimeWarning, match="every call of s, p, o was without grad")
    with said, torch.inference_mode(), ro.retain(ours):  # no gradient comes: PyTorch's fast path
        assert torch.equal(ours(x, x, x)[0], theirs(x, x, x)[0])
    with ro.retain(ours, "p"):
        for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert ours._requests
            assert not copied._requests
            assert torch.equal(copied(x, x, x)[0], theirs(x, x, x)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.ones(L, N, E + 1)}, "embed_dim"),
        ({"key": torch.ones(S + 1, N, E)}, "key"),
        ({"attn_mask": torch.zeros(L, S + 1, dtype=torch.bool)}, "attn_mask"),
        ({"attn_mask": torch.zeros(L, S, dtype=torch.int64)}, "attn_mask"),
        ({"key_padding_mask": torch.zeros(N, S + 1, dtype=torch.bool)}, r"\d"),
        ({"is_causal": True}, "is_causal"),
        ({"query": torch.ones(L)}, "query"),
    ],
)
def test_bad_calls_raise_as_pytorchs(change: dict[str, Any], message: str) -> None:
    ours, theirs = modules(Case())
    given = {**inputs(Case(), ours), **change}
    with pytest.raises(Exception) as wanted:  # noqa: PT011 -- whatever PyTorch's is
        theirs(**given, need_weights=False)
    with ro.retain(ours), pytest.raises(type(wanted.value), match=message):
        ours(**given, need_weights=False)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("name", ["self, batch first", "added mask, padding", "boolean mask"])
def test_under_autocast(name: str, need_weights: bool) -> None:
    ours, theirs = modules(CASES[name])
    given = inputs(CASES[name], theirs)
    with torch.autocast("cpu", torch.bfloat16):
        y, weights, grads = run(theirs, given, need_weights=need_weights)
        with ro.retain(ours, "p"):
            found = run(ours, given, need_weights=need_weights)
    assert torch.equal(found[0], y)
    assert weights is None or torch.equal(found[1], weights)
    for mine, wanted in zip(found[2], grads, strict=True):
        assert torch.equal(mine, wanted)
    with torch.autocast("cpu", torch.bfloat16), ro.retain(ours, "p") as kept:
        out = ours(**given, need_weights=need_weights)[0]
    out.float().sum().backward()
    assert kept["p"].grad.abs().max() > 0


@pytest.mark.parametrize("need_weights", [False, True])
def test_an_empty_batch(need_weights: bool) -> None:
    """Of which PyTorch's module needs weights, where there is a key_padding_mask."""
    ours, theirs = modules(CASES["causal, padding, one key more"])
    x, padding = torch.randn(L, 0, E, requires_grad=True), torch.zeros(0, L, dtype=torch.bool)
    expected, weights = theirs(x, x, x, padding)
    with ro.retain(ours) as kept:
        y, mine = ours(x, x, x, padding, need_weights)
        y.sum().backward()
    assert y.shape == expected.shape
    assert not need_weights or mine.shape == weights.shape
    assert kept["p"].grad.shape == (0, H, L, L + 1)


# torch.compile's own doing.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("need_weights", [False, True])
def test_compiled_in_one_graph(need_weights: bool) -> None:
    ours, theirs = modules(CASES["boolean mask"])
    given = inputs(CASES["boolean mask"], theirs)
    y, points = eager(theirs, given)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    y.backward(dy)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    with ro.retain(compiled, "p") as kept:
        compiled(**given, need_weights=need_weights)[0].backward(dy)
    torch._dynamo.reset()
    torch.testing.assert_close(kept["p"].grad, points["p"].grad)
