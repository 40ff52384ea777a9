"""What `ro.retain` refuses of a model and of a request, and the words for each."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import retainops as ro
from retainops.registry import PointInfo, find
from tests.oracle import assert_near
from tests.small_model import (
    D,
    make,
    oracle,
    requests_in,
)


def test_two_points_in_one_buffer_are_refused_or_added_up(model_x: tuple) -> None:
    model, x = model_x
    buffer = torch.ones(4, D, device=x.device)
    names = ["layers.0.act", "layers.1.sine.c"]
    wants = {name: ro.Into(buffer) for name in names}
    says = "Into buffers for points 'layers.0.act' and 'layers.1.sine.c' share memory.*, or give both accumulate=True"
    with pytest.raises(ValueError, match=f"retain: the {says}"), ro.retain(model, wants):
        pass
    assert not requests_in(model)
    with ro.retain(model, dict.fromkeys(names, ro.Into(buffer, accumulate=True))):
        model(x).sum().backward()
    assert_near(buffer, 1 + sum(oracle(model, x)[name] for name in names), 4)


def test_two_points_of_one_op_share_no_buffer() -> None:
    mlp, buffer = ro.nn.GatedMLP(2, 4), torch.ones(3, 4)
    wants = dict.fromkeys(["gate", "up"], ro.Into(buffer, accumulate=True))
    message = "points 'gate' and 'up' share memory.*; give each its own buffer$"
    with pytest.raises(ValueError, match=message), ro.retain(mlp, wants):
        pass


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ("layer.*",),
            KeyError,
            "'layer.\\*' matches no point; there are: layers.\\*.act, layers.\\*.sine.c, out; did you",
        ),
        ((["out", "nope"],), KeyError, "'nope' matches no point"),
        ((lambda name: False,), KeyError, "'<lambda>' matches no point; there are"),
        (({"out": None, "nope": None},), KeyError, "'nope' matches no point"),
        (([],), ValueError, 'no pattern given; "\\*" asks for every point'),
        (([3],), TypeError, "a pattern is int; expected a string"),
        ((3,), TypeError, "the patterns are 3; expected a string, such as 'layers.\\*', several in a list"),
        ((None,), TypeError, "the patterns are None; expected a string"),
        ((ro.Stats("l2"),), TypeError, r"the patterns are Stats\(l2\); .*: .*\(\.\.\., \"\*\", Stats\(l2\)\)"),
        ((ro.nn.Point(),), TypeError, "the patterns are a module, Point; expected names"),
        (("layers.0.sine",), KeyError, "a pattern matches the whole name: 'layers.0.sine.\\*' matches some"),
        (("*", "l2"), TypeError, r"a want is str; expected None for the gradient, Into\(buffer\) or Stats"),
        (({"out": "l2"},), TypeError, "a want is str"),
        (({"out": None}, ro.Stats("l2")), ValueError, "leave out want"),
        (
            ({"out": None, "layers.*": None, "*": ro.Stats("l2")},),
            ValueError,
            r"'out' decides nothing: '\*' after it matches all of its points, .* put the general one first",
        ),
        (
            ({"layers.*": None, "*.act": None, "*.c": None},),
            ValueError,
            r"'layers.\*' decides nothing: '\*.act' and '\*.c' after it match all",
        ),
        (
            ("*", ro.Into(torch.zeros(4, D))),
            ValueError,
            "one Into buffer for layers.0.act, .*, out; give each its own|each name its own",
        ),
    ],
)
def test_requests_that_make_no_sense(arguments: tuple, error: type, message: str) -> None:
    model, _ = make()
    with pytest.raises(error, match=f"retain: .*{message}"), ro.retain(model, *arguments):
        pass
    assert not requests_in(model)


def test_a_long_list_of_names_is_shortened() -> None:
    model = nn.Sequential(*(ro.nn.Point() for _ in range(23)))
    with pytest.raises(KeyError, match=r"there are: 0, 1, .*, 19, \.\.\. and 3 more"), ro.retain(model, "x"):
        pass


def test_what_a_wrong_pattern_may_have_meant() -> None:
    layers = nn.ModuleList(nn.ModuleDict({"mlp": ro.nn.GatedMLP(2, 4)}) for _ in range(12))
    model = nn.ModuleDict({"layers": layers})
    there = r"there are: layers\.\*\.mlp\.gate, layers\.\*\.mlp\.up, layers\.\*\.mlp\.act; "
    whole = r"a pattern matches the whole name: '\*\.mlp\.act' matches some"
    with pytest.raises(KeyError, match=there + whole), ro.retain(model, "mlp.act"):
        pass
    with pytest.raises(KeyError, match=r"did you mean 'layers\.\*\.mlp\.act'"), ro.retain(model, "layers.*.mpl.act"):
        pass


@pytest.mark.parametrize(
    "want", [ro.Stats("l2", over="heads"), ro.Part(heads=0), ro.Relevance("chefer")], ids=["stats", "part", "relevance"]
)
def test_what_is_for_points_of_attention_is_refused_before_forward(want: object) -> None:
    model = nn.Sequential(ro.nn.LayerNorm(4), ro.nn.Point())
    with pytest.raises(ValueError, match=r"retain: point '0\.xhat' was asked for .*, and it is one of layer_norm"):
        ro.retain(model, "*", want).__enter__()
    assert not requests_in(model)
    attention = nn.Sequential(ro.nn.MultiheadAttention(8, 2), ro.nn.Point())
    with ro.retain(attention, "0.p", want):
        pass


class Users(ro.nn.HoldsPoints):
    op = find("mul_sin")


@pytest.mark.parametrize(
    ("model", "point", "of"),
    [
        (Users(), "c", "mul_sin"),
        (ro.nn.Siren(2.0), "c", "Siren"),  # their points are not an op's, word for word
        (ro.nn.GatedMLP(2, 4), "gate", "GatedMLP"),
        (nn.TransformerEncoderLayer(8, 2, batch_first=True), "c", "TransformerEncoderLayer"),
    ],
    ids=["user's", "siren", "gated", "fused"],
)
def test_points_of_no_attention_in_modules_of_ours(model: nn.Module, point: str, of: str) -> None:
    message = rf"retain: point '{point}' was asked for Relevance\(chefer\), .* it is one of {of};"
    if not isinstance(model, ro.nn.HoldsPoints):
        ro.fuse(model)
    with pytest.raises(ValueError, match=message), ro.retain(model, point, ro.Relevance("chefer")):
        pass


@pytest.mark.parametrize(
    ("point", "want", "message"),
    [
        ("s", ro.Relevance("legrad"), "it is of the probabilities: ask point 'p'"),
        ("o", ro.Part(keys=0), "it has no keys: ask for heads or queries"),
        ("o", ro.Stats("l2", over="keys"), "it has no keys: ask for heads or queries"),
    ],
    ids=["relevance of s", "part of o", "statistics of o"],
)
def test_what_a_point_of_attention_does_not_have_is_refused_before_forward(point, want, message: str) -> None:
    model = nn.Sequential(ro.nn.MultiheadAttention(8, 2))
    with pytest.raises(ValueError, match=rf"retain: point '0\.{point}' was .*{message}"), ro.retain(model, "*", want):
        pass
    with ro.retain(model, "0.p", want):
        pass


def test_points_of_modules_of_the_users_may_be_of_attention() -> None:
    class Mine(ro.nn.HoldsPoints):
        def point_infos(self):
            return (PointInfo("weights", "softmax(s)", "(batch, heads, queries, keys)"),)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.point("weights", x)

    x = torch.rand(1, 2, 3, 3, requires_grad=True)
    for model, name in ((Mine(), "weights"), (ro.nn.Point(), "")):
        with ro.retain(model, name, ro.Relevance("chefer")) as kept:
            model(x).sum().backward()
        assert torch.equal(kept[name].chefer, x.detach().mean(1))


def test_retain_without_with() -> None:
    model, _ = make()
    with pytest.raises(TypeError, match=r"retain: use it in a with statement.*: with ro.retain\(model, ...\) as kept"):
        ro.retain(model)["out"]
    with pytest.raises(AttributeError, match="retain has no attribute 'reset': use it in a with statement"):
        ro.retain(model).reset()
    asked = ro.retain(model)
    with asked, asked:
        assert len(requests_in(model)) == 5
    assert not requests_in(model)


def test_models_without_points() -> None:
    message = r"retain: Linear has no points; call ro.fuse\(model\), .* put ro.nn.Point\(\) where"
    with pytest.raises(ValueError, match=message), ro.retain(torch.compile(nn.Linear(2, 2), backend="aot_eager")):
        pass
    with pytest.raises(TypeError, match="retain: model is function; expected a torch.nn.Module"), ro.retain(make):
        pass


def test_a_point_takes_tensors() -> None:
    point = ro.nn.Point()
    assert point((1, 2)) == (1, 2)  # unasked it looks at nothing: torch.fx traces through it
    with pytest.raises(TypeError, match="Point '0': the input is tuple; expected"), ro.retain(nn.Sequential(point)):
        point((1, 2))


def test_retain_inside_a_torch_func_transform() -> None:
    model = ro.nn.MulSin(2.0)
    with pytest.raises(RuntimeError, match="mul_sin: retain= inside a torch.func transform"), ro.retain(model):
        torch.func.grad(lambda x: model(x).sum())(torch.ones(3))


@pytest.mark.parametrize("module", [ro.nn.MulSin(2.0), ro.nn.Point()], ids=["op", "point"])
def test_retain_inside_vmap(module: nn.Module) -> None:
    """There nothing says that it requires grad, and so the request would be left alone."""
    x = torch.ones(2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"retain= inside a torch.func transform"), ro.retain(module):
        torch.vmap(module)(x)
    with ro.retain(module) as kept:
        torch.vmap(module)(x.detach())  # as any module that no gradient reaches
        module(x).sum().backward()
    assert next(iter(kept.values())).grad.shape == (2, 3)


def test_a_name_matches_itself_whatever_is_in_it() -> None:
    model, x = nn.ModuleDict({"a[0]": ro.nn.Point(), "b*": ro.nn.Point()}), torch.ones(3, requires_grad=True)
    with ro.retain(model, ["a[0]", "b*"]) as kept:
        (model["a[0]"](x) * model["b*"](x)).sum().backward()
    assert list(kept) == ["a[0]", "b*"]
    assert torch.equal(kept["a[0]"].grad, x)
