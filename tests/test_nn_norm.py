"""Modules of the norms: as PyTorch's and Hugging Face's, and all that is asked of their points."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import retainops as ro
from tests.conftest import Path, random_leaves
from tests.norm_cases import several
from tests.oracle import assert_near, random_like

D = 12


class Case(NamedTuple):
    """A module, the shapes of its inputs, and a module of PyTorch's that has the same state dict and first output."""

    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    theirs: Callable[[], nn.Module]


CASES = {
    "RMSNorm": Case(lambda: ro.nn.RMSNorm(D, 1e-3), ((3, 4, D),), lambda: nn.RMSNorm(D, 1e-3)),
    "RMSNorm, the dtype's eps": Case(lambda: ro.nn.RMSNorm(D, None), ((4, D),), lambda: nn.RMSNorm(D)),
    "RMSNorm, no weight": Case(
        lambda: ro.nn.RMSNorm((D,), 1e-3, elementwise_affine=False),
        ((4, D),),
        lambda: nn.RMSNorm(D, 1e-3, elementwise_affine=False),
    ),
    "LayerNorm": Case(lambda: ro.nn.LayerNorm(D), ((3, 4, D),), lambda: nn.LayerNorm(D)),
    "LayerNorm, no bias": Case(lambda: ro.nn.LayerNorm(D, bias=False), ((4, D),), lambda: nn.LayerNorm(D, bias=False)),
    "LayerNorm, no weights": Case(
        lambda: ro.nn.LayerNorm(D, elementwise_affine=False),
        ((4, D),),
        lambda: nn.LayerNorm(D, elementwise_affine=False),
    ),
    "AddRMSNorm": Case(lambda: ro.nn.AddRMSNorm(D, 1e-3), ((4, D), (4, D)), lambda: nn.RMSNorm(D, 1e-3)),
    "AddLayerNorm": Case(lambda: ro.nn.AddLayerNorm(D), ((4, D), (4, D)), lambda: nn.LayerNorm(D)),
    "GroupNorm": Case(lambda: ro.nn.GroupNorm(3, D), ((2, D, 5, 4),), lambda: nn.GroupNorm(3, D)),
    "GroupNorm, no weights": Case(
        lambda: ro.nn.GroupNorm(3, D, affine=False), ((2, D, 5),), lambda: nn.GroupNorm(3, D, affine=False)
    ),
}
over_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
over_sums = pytest.mark.parametrize("case", [CASES["AddRMSNorm"], CASES["AddLayerNorm"]], ids=["rms", "layer"])


def build(case: Case, device: str = "cpu") -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(11)
    module = case.make().to(device)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module, [random_leaves(device)(*shape) for shape in case.shapes]


def step(module: Callable, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    outputs = several(module(*inputs))
    torch.autograd.backward(outputs, [random_like(y, seed) for seed, y in enumerate(outputs)])
    return tuple(y.detach() for y in outputs)


def grads_of(module: nn.Module, inputs: Sequence[torch.Tensor]) -> list[Any]:
    """The gradients, which are taken away."""
    found = [t.grad for t in (*inputs, *module.parameters())]
    module.zero_grad()
    for x in inputs:
        x.grad = None
    return found


@over_cases
def test_as_pytorchs_module_state_dict_included(case: Case, path: Path) -> None:
    module, inputs = build(case, path.device)
    theirs = case.theirs().to(path.device)
    assert [(n, p.shape, p.dtype) for n, p in case.make().state_dict().items()] == [
        (n, p.shape, p.dtype) for n, p in case.theirs().state_dict().items()
    ]
    assert all(
        torch.equal(a.cpu(), b) for a, b in zip(case.make().parameters(), case.theirs().parameters(), strict=True)
    )
    theirs.load_state_dict(module.state_dict())
    ours = step(module, inputs)
    grads = grads_of(module, inputs)
    summed = sum(inputs) if len(inputs) > 1 else inputs[0]
    outputs = (theirs(summed), summed)[: len(ours)]
    torch.autograd.backward(outputs, [random_like(y, seed) for seed, y in enumerate(ours)])
    for a, b in zip([*ours, *grads], [*outputs, *grads_of(theirs, inputs)], strict=True):
        assert_near(a, b, 8)


@over_cases
def test_points_of_the_module_are_those_of_the_op(case: Case, path: Path) -> None:
    """All of them, each in two nested requests, and in forms that differ; with several outputs, too."""
    module, inputs = build(case, path.device)
    plain = step(module, inputs)
    grads = grads_of(module, inputs)
    names = list(ro.points(module))
    assert names == [p.name for p in module.op.points]
    given = [*inputs, *_rest(module, inputs)]
    direct = ro.Retained(*names)
    step(lambda *_: module.op.call(*given, retain=direct), inputs)
    grads_of(module, inputs)
    with ro.retain(module) as outer, ro.retain(module, names[0], ro.Stats("l2", over="rows")) as inner:
        for a, b in zip(plain, step(module, inputs), strict=True):
            assert torch.equal(a, b)
    for a, b in zip(grads, grads_of(module, inputs), strict=True):
        assert torch.equal(a, b)
    for name in names:
        assert_near(outer[name].grad, direct[name].grad, 4)
    torch.testing.assert_close(inner[names[0]].l2, direct[names[0]].grad.norm(dim=-1))


def _rest(module: nn.Module, inputs: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """What the module hands to its op besides its inputs."""
    if isinstance(module, ro.nn.GroupNorm):
        return module.num_groups, module.weight, module.bias, module.eps
    if isinstance(module, ro.nn.LayerNorm):
        return module.weight, module.bias, module.eps
    eps = torch.finfo(inputs[0].dtype).eps if module.eps is None else module.eps
    return module.weight, eps, module.offset, module.round_first


@over_sums
def test_nested_requests_of_several_outputs(case: Case, path: Path) -> None:
    """Over different things, which no launch can take; with each output used alone; under create_graph."""
    module, inputs = build(case, path.device)
    with ro.backend("auto" if path.name != "reference" else "reference"):
        for used in (0, 1):
            with (
                ro.retain(module, "summed", ro.Stats("l2", over="rows")) as rows,
                ro.retain(module, "summed", ro.Stats("l2", over="channels")) as channels,
                ro.retain(module, "summed") as dense,
            ):
                y = module(*inputs)[used]
                y.backward(random_like(y))
            torch.testing.assert_close(rows["summed"].l2, dense["summed"].grad.norm(dim=-1))
            torch.testing.assert_close(channels["summed"].l2, dense["summed"].grad.norm(dim=0))
            assert torch.equal(dense["summed"].grad, inputs[0].grad)
            grads_of(module, inputs)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@over_sums
def test_nested_requests_under_create_graph(case: Case, path: Path) -> None:
    module, inputs = build(case, path.device)
    with ro.retain(module) as outer, ro.retain(module, "summed") as inner:
        y, summed = module(*inputs)
        torch.autograd.backward((y, summed), (random_like(y), random_like(y, 1)), create_graph=True)
    assert torch.equal(outer["summed"].grad, inner["summed"].grad)
    first = outer["summed"].grad
    (dx,) = torch.autograd.grad(first.square().sum(), inputs[0], retain_graph=True)
    (want,) = torch.autograd.grad(inputs[0].grad.square().sum(), inputs[0])
    torch.testing.assert_close(dx, want)
    grads_of(module, inputs)
    for kept in (outer, inner):
        kept.reset()  # it refers to the graph, and the graph to it


@over_cases
def test_compiled(case: Case) -> None:
    module, inputs = build(case)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    plain = step(module, inputs)
    grads = grads_of(module, inputs)
    with ro.retain(module) as direct:
        step(module, inputs)
    grads_of(module, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        with ro.retain(compiled) as kept:
            outputs = step(compiled, inputs)
    for a, b in zip([*outputs, *grads_of(module, inputs)], [*plain, *grads], strict=True):
        assert_near(a, b, 4)
    for name, slot in direct.items():
        assert_near(kept[name].grad, slot.grad, 4)


@over_cases
def test_copies_and_pickles(case: Case) -> None:
    module, inputs = build(case)
    with ro.retain(module) as kept:
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert repr(other) == repr(module)
            for a, b in zip(step(other, inputs), several(module(*inputs)), strict=True):
                assert torch.equal(a, b)
    assert all(slot.grad is None for slot in kept.values())


def test_the_norms_of_hugging_faces_models() -> None:
    class LlamaRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(D).bfloat16())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            held = x.to(torch.float32)
            held = held * torch.rsqrt(held.pow(2).mean(-1, keepdim=True) + 1e-6)
            return self.weight * held.to(x.dtype)

    class GemmaRMSNorm(LlamaRMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            held = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
            return (held * (1.0 + self.weight.float())).type_as(x)

    x = random_leaves("cpu")(4, D).bfloat16()
    for theirs, options in ((LlamaRMSNorm(), {"round_first": True}), (GemmaRMSNorm(), {"offset": 1.0})):
        ours = ro.nn.RMSNorm(D, **options, dtype=torch.bfloat16)
        ours.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours(x), theirs(x))


def test_a_weight_starts_where_it_changes_nothing() -> None:
    assert not ro.nn.RMSNorm(D, offset=1.0).weight.any()
    norm = ro.nn.AddLayerNorm(D, dtype=torch.bfloat16, device="meta")
    assert (norm.weight.dtype, norm.bias.device.type) == (torch.bfloat16, "meta")
    norm = ro.nn.GroupNorm(3, D)
    nn.init.normal_(norm.weight)
    norm.reset_parameters()
    assert torch.equal(norm.weight, torch.ones(D))


def test_representations() -> None:
    modules = {
        ro.nn.RMSNorm(D): "RMSNorm(12, eps=1e-06)",
        ro.nn.RMSNorm(D, None, offset=1.0, round_first=True): "RMSNorm(12, eps=None, offset=1.0, round_first=True)",
        ro.nn.AddRMSNorm(D, elementwise_affine=False): "AddRMSNorm(12, eps=1e-06, elementwise_affine=False)",
        ro.nn.LayerNorm(D): "LayerNorm(12, eps=1e-05)",
        ro.nn.LayerNorm(D, bias=False): "LayerNorm(12, eps=1e-05, bias=False)",
        ro.nn.AddLayerNorm(D, 0.1, elementwise_affine=False): "AddLayerNorm(12, eps=0.1, elementwise_affine=False)",
        ro.nn.GroupNorm(3, D, affine=False): "GroupNorm(3, 12, eps=1e-05, affine=False)",
    }
    assert [repr(module) for module in modules] == list(modules.values())


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: ro.nn.RMSNorm(4.0), TypeError, "RMSNorm: normalized_shape is float; expected an integer"),
        (lambda: ro.nn.AddLayerNorm((3, 4)), ValueError, r"AddLayerNorm: normalized_shape is \(3, 4\); expected one"),
        (lambda: ro.nn.LayerNorm(0), ValueError, "LayerNorm: normalized_shape is 0; expected one size above 0"),
        (lambda: ro.nn.GroupNorm(5, 12), ValueError, "GroupNorm: num_groups is 5 and num_channels is 12; expected"),
    ],
    ids=range(4),
)
def test_errors(make: Callable[[], nn.Module], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fused", [False, True])
def test_an_eps_of_none_where_it_counts(fused: bool, dtype: torch.dtype) -> None:
    """PyTorch computes in float32 at least, and takes the eps of that: of 16 bits' own it would be the larger part."""
    x = (torch.randn(4, D, generator=torch.Generator().manual_seed(0)) * 1e-3).to(dtype)
    theirs = nn.RMSNorm(D, dtype=dtype)
    expected = theirs(x)
    ours = theirs if fused else ro.nn.RMSNorm(D, None, dtype=dtype)
    if fused:
        assert ro.fuse(ours).replaced
    torch.testing.assert_close(ours(x), expected)
