"""The generated text: the same at every run, of identifiers and numbers alone, as good as one written by hand."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import torch

import retainops as ro
from tests.conftest import HAS_TRITON, random_leaves
from tests.conftest import Path as Route

ROOT = Path(__file__).parent.parent.parent

EXAMPLE = """
import torch, retainops as ro

@ro.fuse_pointwise
def example(a, b, bias, low=-1.0):
    c = a * b
    h = torch.tanh(c + bias)
    k = torch.where((c > 0) | (h < 0.5), h, c.clamp(low, 2)) + a ** 3
    return h * torch.sigmoid(c) + k / 3
"""


def test_the_same_source_at_every_run() -> None:
    found = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", EXAMPLE + "print(example.source)"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        found.add(done.stdout)
    assert len(found) == 1
    assert "def example_bwd_kernel(" in found.pop()


def test_a_source_reads_like_one_written_by_hand() -> None:
    @ro.fuse_pointwise
    def f(a, b, bias):
        c = a * b
        h = torch.tanh(c + bias)
        return h * torch.sigmoid(c)

    forward = f.source.split("def f_fwd_kernel(")[1].split("@triton.jit")[0]
    assert forward.splitlines()[1:-2] == [
        '    """One tile of y = h * sigmoid(c)."""',
        "    at = tile(SHAPE, BLOCK_M, BLOCK_N)",
        "    a = load(X[0], at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)",
        "    b = load(X[1], at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)",
        "    bias = load(X[2], at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)",
        "    c = a * b",
        "    h = tanh(c + bias)",
        "    y = h * sigmoid(c)",
        "    store(Y, y, at, SHAPE, BLOCK_M, BLOCK_N)",
    ]
    assert "    da = dc * b\n    db = dc * a\n    store_grad(DX[0], da, at, SHAPE, BLOCK_M, BLOCK_N)\n" in f.source
    assert f.source.endswith("    retain(DC[1], dh, h, at, SHAPE, BLOCK_M, BLOCK_N)\n")


def test_it_imports_triton_and_device_functions_alone() -> None:
    namespace: dict = {}
    exec(EXAMPLE, namespace)
    for node in ast.walk(ast.parse(namespace["example"].source)):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} == {"triton"}
        elif isinstance(node, ast.ImportFrom):
            assert node.module.startswith("retainops.kernels.")


# Names that the kernels use themselves, that Python or Triton keep, and that are no ASCII.
NAMES = [
    *("tl", "triton", "at", "load", "store", "store_grad", "retain_", "tile", "X", "Y", "DX", "DY", "DC", "SHAPE"),
    *("DTYPE", "BLOCK_M", "dy", "dx", "da", "y", "tanh", "sin", "divide", "power", "float", "range", "len", "print"),
    *("match", "_", "__x", "point", "tap", "torch", "v1", "g0", "f_fwd_kernel", "λ", "数", "ﬁ", "x²"[:1], "T", "K9"),
    *("op", "inputs", "rounded", "compared"),
]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_for_an_input_and_for_a_local(name: str) -> None:
    """Kernels (where triton is), reference and eager agree, whatever things are called."""
    name = unicodedata.normalize("NFKC", name)  # as Python does
    source = "def f({0}, w):\n    u = {0} * w\n    return sin_(u + {0}) * 2\n"
    local = "def f(x, w):\n    {0} = x * w\n    d{0} = sin_({0} + x)\n    return d{0} * {0}\n"
    for text, points in ((source, ["u"]), (local, [name, f"d{name}"])):
        namespace = {"sin_": torch.sin}
        exec(text.format(name), namespace)
        plain = namespace["f"]
        fused = ro.fuse_pointwise(plain)
        compile(fused.source, "generated", "exec")
        assert fused.source.isascii() or not name.isascii()
        assert [p for p in fused.points if p in points] == [p for p in points if p in fused.points] != []
        if HAS_TRITON:
            agree(plain, fused)


def agree(plain, fused) -> None:
    from retainops.testing import simulated_gpu

    rand = random_leaves("cpu")
    inputs = [rand(3, 5), rand(5)]
    twice = [x.detach().clone().requires_grad_() for x in inputs]
    with simulated_gpu(compiles=False), ro.backend("triton"):
        kept = ro.Retained(*fused.points)
        fused(*inputs, retain=kept).sum().backward()
    reference = ro.Retained(*fused.points)
    fused(*twice, retain=reference).sum().backward()
    exact = [x.detach().clone().requires_grad_() for x in inputs]
    plain(*exact).sum().backward()
    for x, other, eager in zip(inputs, twice, exact, strict=True):
        torch.testing.assert_close(x.grad, eager.grad)
        torch.testing.assert_close(other.grad, eager.grad)
    for name in fused.points:
        torch.testing.assert_close(kept[name].grad, reference[name].grad)


@pytest.mark.parametrize(
    "name",
    [
        "f(X):\n    pass\n#",
        'f"""',
        "f'; import os; '",
        "a b",
        "",
        "1f",
        "<lambda>",
        "class",
        "数",
        "f\x00",
        "../../f",
        "%s{0}",
    ],
)
def test_the_name_of_a_function_is_made_an_identifier(name: str) -> None:
    """A function's name is any string: `__name__` can be set."""

    def plain(x, w):
        c = x * w
        return c * 2

    plain.__name__ = name
    fused = ro.fuse_pointwise(plain)
    tree = ast.parse(fused.source)
    kernels = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert len(kernels) == 2
    assert all(kernel.isascii() and kernel.isidentifier() for kernel in kernels)
    assert "import os" not in fused.source
    if HAS_TRITON:
        agree(plain, fused)


def test_a_local_name_that_is_no_identifier_is_no_point() -> None:
    def plain(x, w):
        c = x * w
        return c * 2

    plain.__code__ = plain.__code__.replace(co_varnames=("x", "w", 'c"""\nimport os\n"""'))
    fused = ro.fuse_pointwise(plain)
    assert list(fused.points) == []
    assert "import os" not in fused.source


def test_strings_and_comments_of_the_user_do_not_get_into_the_source() -> None:
    @ro.fuse_pointwise
    def f(x):
        """Secret docstring."""
        marker = "secret string"  # secret comment
        c = torch.nn.functional.gelu(x, approximate="tanh")
        return c * len(marker)

    assert "secret" not in f.source.lower()


@pytest.mark.parametrize("number", [float("inf"), -float("inf"), float("nan"), 1e-320, -0.0, 2**60, True, 0.1])
def test_numbers(kernels: Route, number: float) -> None:
    x = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64, device=kernels.device, requires_grad=True)
    y = ro.fuse_pointwise(lambda x: x * number + number)(x)
    y.sum().backward()
    torch.testing.assert_close(y, x * number + number, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(x.grad, torch.full_like(x, number), rtol=0, atol=0, equal_nan=True)


class Number(float):
    """A number whose text is code."""

    def __repr__(self) -> str:
        return "__import__('os')"


def test_a_number_that_prints_as_something_else() -> None:
    source = ro.fuse_pointwise(lambda x: x * Number(2.0) ** 1 + torch.clamp(x, Number(0.5)) ** Number(2.0)).source
    assert "import" not in source.split("@triton.jit", 1)[1]
    assert "2.0" in source


machine = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed: there is no machine code")


@ro.fuse_pointwise
def my_mul_sin(a, b):
    c = a * b
    return torch.sin(c)


def reports(op, dtype: torch.dtype, retain=lambda: None, n: int = 4096, target: str = "sm_90"):
    from retainops.testing import static_report

    a, b = (torch.ones(n, dtype=dtype, requires_grad=True) for _ in "ab")

    def call() -> None:
        y = op(a, b, retain=retain())
        torch.autograd.grad(y, [a, b], torch.ones_like(y))

    return static_report(call, target)


@machine
@pytest.mark.parametrize("retain", [lambda: None, lambda: ro.Retained("c")], ids=["nothing", "c"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_machine_code_is_that_of_the_op_written_by_hand(dtype: torch.dtype, retain) -> None:
    """The same instructions, bit by bit, as ro.mul_sin's."""
    ours, theirs = reports(my_mul_sin, dtype, retain), reports(ro.mul_sin, dtype, retain)
    assert [r.name for r in ours] == ["my_mul_sin_fwd_kernel", "my_mul_sin_bwd_kernel"]
    assert [r.machine_code for r in ours] == [r.machine_code for r in theirs]


@machine
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_a_longer_expression(target: str) -> None:
    from retainops.testing import static_report

    namespace: dict = {}
    exec(EXAMPLE, namespace)
    a, b, bias = (torch.ones(4096, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    for kept, stores in ((None, 3), (ro.Retained("c", "h"), 5)):

        def call(kept=kept):
            y = namespace["example"](a, b, bias, retain=kept)
            torch.autograd.grad(y, [a, b, bias], torch.ones_like(y))

        forward, backward = static_report(call, target)
        for report in (forward, backward):
            assert (report.spill_stores, report.spill_loads) == (0, 0), str(report)
        if target != "gfx942":
            assert forward.narrowest == backward.narrowest == 128
            assert forward.whole_tile["LDG.128"] == 3 * forward.whole_tile["STG.128"]
            assert stores * backward.whole_tile["LDG.128"] == 4 * backward.whole_tile["STG.128"]


# What other ops' machine code does not hold.
SINGLE = {
    "erf": torch.erf,
    "expm1": torch.expm1,
    "log": torch.log,
    "log1p": torch.log1p,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "abs": torch.abs,
    "pow": lambda x: x**2.5,
    "maximum": lambda x: torch.maximum(x, x * x),
    "lerp": lambda x: torch.lerp(x, x * x, x),
    "where": lambda x: torch.where((x < 0.1) | ~(x > 0), x, x * x),
}


@machine
@pytest.mark.parametrize(("target", "dtype"), [("sm_90", torch.bfloat16), ("gfx942", torch.float32)], ids=str)
@pytest.mark.parametrize("name", SINGLE)
def test_no_spills(name: str, target: str, dtype: torch.dtype) -> None:
    from retainops.testing import static_report

    fused = ro.fuse_pointwise(lambda x: SINGLE[name](x) * x)
    x = torch.ones(4096, dtype=dtype, requires_grad=True)
    for report in static_report(lambda: torch.autograd.grad(fused(x), x, torch.ones_like(x)), target):
        assert (report.spill_stores, report.spill_loads) == (0, 0), str(report)
        if report.is_nvidia:
            assert report.narrowest == 128
