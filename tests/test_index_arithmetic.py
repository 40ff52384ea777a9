"""No kernel's addresses, masks or loops overflow int32, however large its tensors are: read in Triton's IR, for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import retainops as ro
from retainops.registry import Op, find, ops
from tests.attention_cases import CASES
from tests.attention_oracle import Run
from tests.oracle import all_points, leaves, several

pytest.importorskip("triton")
# Of elementwise ops one of each kind of kernel: addresses are of no function.
NAMES = ["mul_sin", "swiglu", "swiglu_packed", "scale_shift", "bias_dropout_add"]
NAMES += [op.name for op in ops() if op.kind == "row"]
WHOLE = (-(2**31), 2**31 - 1)
BOUNDS = {
    "[QK]_HEADS": (1, 2**15),
    "IGNORE": WHOLE,
    **dict.fromkeys(("X.queries", "X.keys"), (0, 2**29)),  # _scores_launch.LONGEST
    **dict.fromkeys(("X.left", "X.right"), (-(2**30), 2**30)),  # _scores_launch.FAR
    "X.heads": (1, 2**16),
    "SHARES": (0, 2**16),
    "CHANNELS": (0, 2**14),  # of one group: as many shares as that fill 12 GB
}
WALKERS = {"num_programs": (1, 2**16)}
"""Programs that share the rows of a norm: so many for each multiprocessor."""


def found(call: Callable[[], Any], **bounds: tuple[int, int]) -> list[str]:
    from retainops.testing import overflows

    return [str(each) for each in overflows(call, bounds={**BOUNDS, **bounds})]


def backward(of: Callable[..., Any], *inputs: Any, retain: ro.Retained | None = None, **options: Any) -> Any:
    outputs = several(of(*inputs, **options, **({} if retain is None else {"retain": retain})))
    outputs = [y for y in outputs if y.requires_grad]
    return torch.autograd.grad(outputs, leaves(inputs), [torch.ones_like(y) for y in outputs], allow_unused=True)


def statistics(op: Op) -> ro.Retained:
    return ro.Retained(**{p.name: ro.Stats("l2", "amax", "hist", "nonfinite") for p in op.points})


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *((name, (40, 1000)) for name in NAMES),
        *((name, (2, 65536)) for name in NAMES if name.endswith(("_norm", "softmax", "_entropy"))),
    ],
)
def test_op(name: str, shape: tuple[int, int]) -> None:
    op = find(name)
    inputs = op.sample(torch.Size(shape), torch.bfloat16, "cpu", torch.Generator().manual_seed(0))
    for i, x in enumerate(inputs):
        if isinstance(x, torch.Tensor) and x.is_floating_point() and i not in op.constants:
            x.requires_grad_()
    for retain in (all_points(op), statistics(op)):
        bounds = WALKERS if name.endswith("_norm") else {}
        assert found(lambda retain=retain: backward(op.call, *inputs, retain=retain), **bounds) == []


X = torch.randn(3, 4, 40, 128, dtype=torch.bfloat16, requires_grad=True)
Y = torch.randn(4, 3, 40, 128, dtype=torch.bfloat16, requires_grad=True)
W, WIDE = torch.randn(128, requires_grad=True), torch.randn(1000, requires_grad=True)
ROWS = torch.randn(40, 1000, requires_grad=True)
SPARSE_ROWS = torch.randn(1000, 40).t().requires_grad_()
IMAGES = torch.randn(2, 64, 30, 30, requires_grad=True)
LAST = IMAGES.detach().to(memory_format=torch.channels_last).requires_grad_()
MASK = torch.randn(40, 40)
T, TABLES = torch.randint(0, 1000, (40,)), torch.randn(2, 40, 64)


@ro.fuse_pointwise
def own(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    c = a * b
    return torch.tanh(c) * torch.sigmoid(c + b)


OTHERS: dict[str, Callable[[], Any]] = {
    "pointwise, transposed": lambda: backward(ro.mul_sin, X.transpose(0, 1), Y, retain=ro.Retained("c")),
    "pointwise, broadcast": lambda: backward(ro.add_gelu, X, W, retain=ro.Retained("c")),
    "pointwise, channels": lambda: backward(ro.mul_sin, LAST, torch.randn(64, 1, 1, requires_grad=True)),
    "a function of one's own": lambda: backward(own, X, W, retain=ro.Retained("c")),
    "packed": lambda: backward(ro.swiglu, X, retain=ro.Retained("act", "gate")),
    "dropout": lambda: backward(ro.bias_dropout_add, X.transpose(0, 1), W, Y, p=0.5),
    "softmax, mask": lambda: backward(ro.softmax, X[..., :40], 2.0, MASK, True, retain=ro.Retained("p")),
    "softmax, columns apart": lambda: backward(ro.softmax, SPARSE_ROWS, causal=True, retain=ro.Retained("scaled")),
    "norm, columns apart": lambda: backward(ro.layer_norm, SPARSE_ROWS, WIDE, WIDE, retain=ro.Retained("xhat")),
    "norm, long": lambda: backward(ro.rms_norm, torch.randn(2, 262144, requires_grad=True)),
    "groups": lambda: backward(ro.group_norm, IMAGES, 4, W[:64], W[:64], retain=ro.Retained("xhat")),
    "groups of one tile": lambda: backward(ro.group_norm, IMAGES[..., :8, :8], 4, W[:64], retain=ro.Retained("xhat")),
    "groups, channels last": lambda: backward(ro.group_norm, LAST, 4, W[:64], W[:64], retain=ro.Retained("xhat")),
    "losses": lambda: backward(ro.cross_entropy, ROWS, T, weight=torch.rand(1000), label_smoothing=0.1, softcap=30.0),
    "losses of images": lambda: backward(
        ro.cross_entropy, IMAGES.movedim(1, -1), torch.zeros(2, 30, 30, dtype=torch.int64)
    ),
    "losses of rows apart": lambda: backward(ro.cross_entropy, SPARSE_ROWS, T % 40, retain=ro.Retained("p")),
    "rope, interleaved": lambda: backward(ro.rope, X, X[:, :2], *TABLES, interleaved=True, retain=ro.Retained("q_rot")),
    "rope, heads last": lambda: backward(
        ro.rope, *(X.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for _ in "qk"), *TABLES
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_layouts_and_options(kind: str) -> None:
    assert found(OTHERS[kind], **(WALKERS if kind.startswith("norm") else {})) == []


ATTENTION = [
    "plain",
    "causal, fewer queries",
    "boolean",
    "added in each head",
    "grouped, causal, strided",
    "heads of 80",
]
ATTENTION += ["other values", "one query", "softcap, causal, grouped", "window", "window past the keys"]


def near(run: Run) -> dict[str, tuple[int, int]]:
    """What strides of rows and columns are where `_scores_launch.heads` does not say that they are far apart."""
    from retainops.ops._scores_launch import arguments

    unit = 1 if arguments(run.scores).q.eighths is None else 8
    return {"*.row": (0, 2**22 // unit), "*.column": (0, 2**22)}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str) -> None:
    from retainops.ops import _scores_kernels as kernels
    from retainops.ops._scores import Wanted

    run = Run(CASES[name], torch.bfloat16)
    assert kernels.refuses(run.scores, None, None) is None
    s, p = Wanted(run.empty(), parts=("sumsq",)), Wanted(run.empty(), relevance=("chefer", "legrad"))
    assert found(lambda: kernels.answer(run.scores, s, p), **near(run)) == []
    if name in ("plain", "window", "grouped, causal, strided"):
        s, p = Wanted(parts=("amax",), over="keys"), Wanted(parts=("sumsq",), over="rows")
        assert found(lambda: kernels.answer(run.scores, s, p), **near(run)) == []


def test_attention_of_rows_far_apart() -> None:
    """The host says so, and nothing is bounded: without it they would overflow."""
    from retainops.ops import _scores_kernels as kernels
    from retainops.ops._scores import Wanted

    run = Run(CASES["plain"], torch.bfloat16)
    b, h, n, d = run.scores.q.shape
    far = torch.empty(2**22 * n + b * h * d, dtype=torch.bfloat16).as_strided((b, h, n, d), (h * d, d, 2**22, 1))
    others = {"OUT.row": (0, 2**22), "S.grad.row": (0, 2**22)}
    for scores, expected in ((run.scores, False), (run.scores._replace(q=far), True)):
        answers = found(lambda scores=scores: kernels.answer(scores, Wanted(run.empty()), None), **others)
        assert (answers == []) == expected
