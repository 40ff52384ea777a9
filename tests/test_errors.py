"""Bad input: a clear error, on every path, and nothing changed."""

from __future__ import annotations

import pytest
import torch

import retainops as ro
from retainops.registry import find
from tests.conftest import Path, random_leaves
from tests.oracle import FAMILY, is_float, sample


@pytest.fixture
def a(path: Path) -> torch.Tensor:
    return random_leaves(path.device)(3, 4)


def test_unknown_point(path: Path, a: torch.Tensor) -> None:
    kept = ro.Retained("d")
    with pytest.raises(KeyError, match=r"points are: c; a is an input: after backward its gradient is a\.grad"):
        ro.mul_sin(a, a, retain=ro.Retained("a"))
    with pytest.raises(KeyError, match="mul_sin: unknown point 'd'; its points are: c"):
        ro.mul_sin(a, a, retain=kept)
    assert kept.d.shape is None


@pytest.mark.parametrize("retain", ["c", {"c": None}, True, ("c",)])
def test_retain_of_another_type(path: Path, a: torch.Tensor, retain) -> None:
    name = type(retain).__name__
    with pytest.raises(TypeError, match=rf'mul_sin: retain is {name}; expected retainops.Retained, such as .*"c"'):
        ro.mul_sin(a, a, retain=retain)


def test_a_point_of_something_else() -> None:
    with pytest.raises(TypeError, match=r"point: x, to be 'c', is float; expected a torch\.Tensor that requires grad"):
        ro.point(3.0, "c", retain=ro.Retained("c"))
    assert ro.point(3.0, "d", retain=ro.Retained("c")) == 3.0


def test_shapes_that_do_not_broadcast(path: Path, a: torch.Tensor) -> None:
    b = torch.ones(3, device=path.device)
    with pytest.raises(RuntimeError, match=r"mul_sin: a of shape \(3, 4\) and b of shape \(3,\) do not broadcast"):
        ro.mul_sin(a, b)


def test_two_devices(path: Path, a: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match=rf"mul_sin: a is on {path.device}.*, b is on meta; expected all on one"):
        ro.mul_sin(a, torch.ones(3, 4, device="meta"))


@pytest.mark.parametrize("b", ["2", None, [1.0]])
def test_neither_tensor_nor_number(path: Path, a: torch.Tensor, b) -> None:
    with pytest.raises(TypeError, match=f"mul_sin: b is {type(b).__name__}; expected a torch.Tensor or a Python"):
        ro.mul_sin(a, b)


def test_numbers_alone(path: Path) -> None:
    with pytest.raises(TypeError, match="mul_sin: a and b are all numbers; expected a torch.Tensor among them"):
        ro.mul_sin(1.0, 2.0)


def test_integer_tensors_are_as_in_eager(path: Path, a: torch.Tensor) -> None:
    i = torch.arange(4, device=path.device)
    for x, y in ((i, a), (i, i), (i, 2), (i.bool(), i)):
        ours, want = ro.mul_sin(x, y), torch.sin(x * y)
        assert ours.dtype == want.dtype
        assert torch.equal(ours, want)
    kept = ro.Retained("c")
    ro.mul_sin(i, a, retain=kept).sum().backward()  # a requires grad, so does c
    assert kept.c.grad.dtype == torch.float32


def test_complex_tensors_are_as_in_eager(path: Path, a: torch.Tensor) -> None:
    z = torch.complex(a.detach(), a.detach()).requires_grad_()
    kept = ro.Retained("c")
    ro.mul_sin(z, a, retain=kept).real.sum().backward()
    c = (z * a).detach()
    torch.testing.assert_close(kept.c.grad, torch.cos(c).conj())


def test_a_failed_call_leaves_the_request_usable(path: Path, a: torch.Tensor) -> None:
    kept = ro.Retained("c")
    with pytest.raises(RuntimeError):
        ro.mul_sin(a, torch.ones(3, device=path.device), retain=kept)
    ro.mul_sin(a, a, retain=kept).sum().backward()
    assert kept.c.grad.shape == (3, 4)


# Every elementwise op: the message names the op, the argument, what it was, and what to do.

over_family = pytest.mark.parametrize("name", FAMILY)


def replaced(name: str, device: str, other: object) -> list[list]:
    """Calls of an op in which each of its tensors in turn is something else."""
    inputs = sample(name, device, shape=(3, 4), requires_grad=False)
    return [[*inputs[:i], other, *inputs[i + 1 :]] for i, x in enumerate(inputs) if is_float(x)]


@over_family
@pytest.mark.parametrize("other", ["2", [1.0], (), print], ids=["str", "list", "tuple", "function"])
def test_every_op_refuses_other_types(path: Path, name: str, other: object) -> None:
    for inputs in replaced(name, path.device, other):
        with pytest.raises(TypeError, match=rf"^{name.removesuffix('_packed')}: \w+ is \w+; expected a torch.Tensor"):
            find(name).call(*inputs)


@over_family
def test_every_op_refuses_shapes_that_do_not_broadcast(path: Path, name: str) -> None:
    for inputs in replaced(name, path.device, torch.ones(5, device=path.device)):
        if sum(map(is_float, inputs)) > 1:
            with pytest.raises(RuntimeError, match=rf"^{name}: .* of shape \(5,\).* do not broadcast.*unsqueeze"):
                find(name).call(*inputs)


@over_family
def test_every_op_refuses_two_devices(path: Path, name: str) -> None:
    for inputs in replaced(name, path.device, torch.ones(3, 4, device="meta")):
        if sum(map(is_float, inputs)) > 1:
            with pytest.raises(RuntimeError, match=rf"^{name}: .* is on meta.*expected .*on"):
                find(name).call(*inputs)


@over_family
def test_every_op_names_its_points(path: Path, name: str) -> None:
    points = ", ".join(p.name for p in find(name).points)
    with pytest.raises(KeyError, match=f"{name}: unknown point 'nope'; its points are: {points}"):
        find(name).call(*sample(name, path.device, shape=(3, 4)), retain=ro.Retained("nope"))


UNITS = [ro.swiglu, ro.geglu, ro.reglu, ro.glu]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.__name__)
@pytest.mark.parametrize("shape", [(3, 5), (1,), ()], ids=str)
def test_packed_tensors_without_halves(path: Path, unit, shape: tuple) -> None:
    text = str(shape).replace("(", r"\(").replace(")", r"\)")
    says = (
        rf"^{unit.__name__}: without up, gate is the packed tensor, and its shape is {text}; expected an even last dim"
    )
    for order in (True, False):
        with pytest.raises(ValueError, match=says):
            unit(torch.ones(shape, device=path.device), gate_first=order)


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.__name__)
def test_a_number_in_the_place_of_a_gate(path: Path, a: torch.Tensor, unit) -> None:
    for inputs in ((0.5,), (0.5, a)):
        with pytest.raises(TypeError, match=rf"^{unit.__name__}: gate is float; expected a torch.Tensor"):
            unit(*inputs)


@pytest.mark.parametrize("approximate", ["erf", "", None, True])
def test_approximations_that_there_are_not(path: Path, a: torch.Tensor, approximate) -> None:
    with pytest.raises(ValueError, match=rf'^geglu: approximate is {approximate!r}; expected "none" or "tanh"'):
        ro.geglu(a, a, approximate=approximate)


@pytest.mark.parametrize("cap", [0, 0.0, -1, -30.0, float("nan"), -float("inf")])
def test_caps_that_are_not_above_0(path: Path, a: torch.Tensor, cap: float) -> None:
    with pytest.raises(ValueError, match=rf"^softcap: cap is {cap}; expected a number above 0, such as 30.0"):
        ro.softcap(a, cap)


@pytest.mark.parametrize(
    "p", [-0.1, 1.0001, 2, float("nan"), float("inf"), "0.5", None, 0.5j, torch.tensor(0.5)], ids=str
)
@pytest.mark.parametrize("training", [True, False])
def test_probabilities_that_are_none(path: Path, a: torch.Tensor, p, training: bool) -> None:
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"^bias_dropout_add: p is .*; expected a probability, a number from 0 to 1"):
        ro.bias_dropout_add(a, None, a, p, training=training)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("seed", "says"),
    [
        (7, "seed is 7"),
        (torch.tensor(7, dtype=torch.int32), r"seed is of shape \(\), torch.int32"),
        (torch.tensor(7.0), r"seed is of shape \(\), torch.float32"),
        (torch.tensor([7]), r"seed is of shape \(1,\), torch.int64"),
        (torch.Generator(), "seed is <torch._C.Generator"),
    ],
    ids=["number", "int32", "float", "1-dim", "generator"],
)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_seeds_that_are_none(path: Path, a: torch.Tensor, seed, says: str, p: float) -> None:
    with pytest.raises(ValueError, match=rf"^bias_dropout_add: {says}.*; expected an int64 tensor of 0 dims"):
        ro.bias_dropout_add(a, None, a, p, seed)


def test_a_seed_elsewhere(path: Path, a: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match=rf"^bias_dropout_add: seed is on meta and x on {path.device}.*; expected"):
        ro.bias_dropout_add(a, None, a, 0.5, torch.tensor(7, device="meta"))


def test_siren_speaks_of_its_own_arguments(path: Path, a: torch.Tensor) -> None:
    with pytest.raises(TypeError, match="^siren: w0 is str; expected a torch.Tensor or a Python number"):
        ro.siren(a, "30")
    with pytest.raises(RuntimeError, match=r"^siren: x of shape \(3, 4\) and w0 of shape \(3,\) do not broadcast"):
        ro.siren(a, torch.ones(3, device=path.device))


@pytest.mark.parametrize("call", [ro.mish, ro.squared_relu])
def test_a_number_in_the_place_of_the_only_tensor(path: Path, call) -> None:
    with pytest.raises(TypeError, match=f"^{call.__name__}: x is float; expected a torch.Tensor"):
        call(1.0)


def test_numbers_alone_in_other_ops(path: Path) -> None:
    for call, inputs, names in (
        (ro.softcap, (1.0, 30.0), "x and cap"),
        (ro.scale_shift, (1.0, 2.0, 3.0), "x and scale and shift"),
        (ro.pointwise.div_tanh, (1.0, 2.0), "a and b"),
    ):
        with pytest.raises(TypeError, match=f"^{call.__name__}: {names} are all numbers; expected a torch.Tensor"):
            call(*inputs)


ROWS, HEADS, TABLE = torch.ones(3, 4), torch.ones(2, 3, 5, 8), torch.ones(5, 8)


@pytest.mark.parametrize(
    ("op", "inputs", "error", "words"),
    [
        (ro.softmax, (ROWS, -1), TypeError, "scale is the integer -1, as if it were a dim"),
        (ro.log_softmax, (ROWS, 1.0, ROWS.expand(2, 3, 4)), RuntimeError, r"mask has shape \(2, 3, 4\)"),
        (ro.rms_norm, (ROWS.long(),), TypeError, "x is torch.int64; expected a floating-point dtype"),
        (ro.layer_norm, (ROWS, torch.ones(1)), RuntimeError, r"weight has shape \(1,\); expected \(4,\)"),
        (ro.add_rms_norm, (ROWS, 1.0), TypeError, "residual is float; expected a torch.Tensor"),
        (ro.group_norm, (ROWS.long(), 2), TypeError, "x is torch.int64; expected a floating-point dtype"),
        (ro.rope, (HEADS, HEADS, TABLE[:, :7], TABLE[:, :7]), RuntimeError, "have 7 columns"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_compiled_row_ops_refuse_what_eager_does(op, inputs: tuple, error: type[Exception], words: str) -> None:
    """PyTorch's own operations, of which compiled code is made, would broadcast, truncate or negate without a word."""
    torch._dynamo.reset()
    with pytest.raises(error, match=f"^{op.__name__}: .*{words}"):
        torch.compile(op, backend="eager")(*inputs)


NUMBERED = {
    "layer_norm": (lambda x, n: ro.layer_norm(x, eps=n), "float64", 0.5),
    "softmax": (ro.softmax, "float64", 0.5),
    "group_norm": (ro.group_norm, "int64", 2),
}


@pytest.mark.parametrize(("call", "kind", "number"), NUMBERED.values(), ids=NUMBERED)
def test_numbers_of_numpy_in_compiled_code(call, kind: str, number: float) -> None:
    numpy = pytest.importorskip("numpy")
    x = torch.arange(12.0).view(3, 4)
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, getattr(numpy, kind)(number)), call(x, number))
