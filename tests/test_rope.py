"""rope: its definition in other people's words, tables, layouts, sizes, errors, machine code."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import retainops as ro
from retainops.ops import _rope
from retainops.ops.rope import rope
from retainops.testing import check_op
from tests.conftest import GPU, Path
from tests.oracle import DTYPES, assert_near, random_like
from tests.rope_cases import angles, compare, drawn, gradients, inputs, tables

kinds = pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
table_kinds = pytest.mark.parametrize("half_tables", [False, True], ids=["whole tables", "half tables"])


# The definition, as others have written it.


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """Hugging Face's, of LLaMA and most others."""
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def apply_rotary_pos_emb(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple:
    """Hugging Face's, with unsqueeze_dim=1."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return (q * cos) + (rotate_half(q) * sin), (k * cos) + (rotate_half(k) * sin)


def apply_to_part(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple:
    """Hugging Face's, of GPT-NeoX and GLM."""
    rot = cos.shape[-1]
    parts = apply_rotary_pos_emb(q[..., :rot], k[..., :rot], cos, sin)
    return tuple(torch.cat((part, x[..., rot:]), -1) for part, x in zip(parts, (q, k), strict=True))


def rotate_every_two(x: torch.Tensor) -> torch.Tensor:
    """Hugging Face's, of GPT-J."""
    x1 = x[:, :, :, ::2]
    x2 = x[:, :, :, 1::2]
    return torch.stack((-x2, x1), dim=-1).flatten(-2)


def gpt_j(q: torch.Tensor, k: torch.Tensor, sin: torch.Tensor, cos: torch.Tensor) -> tuple:
    """Of a part of each head, with tables of one column for each pair; GPT-J has heads after positions."""

    def turned(x: torch.Tensor) -> torch.Tensor:
        x, rot = x.transpose(1, 2), 2 * sin.shape[-1]
        wide_sin, wide_cos = (torch.repeat_interleave(t[:, :, None, :], 2, 3) for t in (sin, cos))
        part = (x[..., :rot] * wide_cos) + (rotate_every_two(x[..., :rot]) * wide_sin)
        return torch.cat((part, x[..., rot:]), -1).transpose(1, 2)

    return turned(q), turned(k)


def complex_numbers(q: torch.Tensor, k: torch.Tensor, theta: torch.Tensor) -> tuple:
    """LLaMA's own code."""
    turns = torch.polar(torch.ones_like(theta), theta)[:, None]
    pairs = (torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous()) for x in (q, k))
    return tuple(torch.view_as_real(pair * turns).flatten(-2) for pair in pairs)


@pytest.mark.parametrize("whose", ["LLaMA", "GPT-NeoX", "GPT-J", "complex numbers"])
def test_the_definition_in_other_words(whose: str, path: Path) -> None:
    theta = angles(2, 20, 8 if whose in ("LLaMA", "complex numbers") else 6, device=path.device).float()
    half, whole = (theta.cos(), theta.sin()), (torch.cat((theta, theta), -1).cos(), torch.cat((theta, theta), -1).sin())
    q, k, *_ = inputs(path.device)
    ours, theirs = {
        "LLaMA": lambda: (rope(q, k, *whole), apply_rotary_pos_emb(q, k, *whole)),
        "GPT-NeoX": lambda: (rope(q, k, *half, half_tables=True), apply_to_part(q, k, *whole)),
        "GPT-J": lambda: (rope(q, k, *half, True, True), gpt_j(q, k, half[1], half[0])),
        "complex numbers": lambda: (rope(q, k, *half, True, True), complex_numbers(q, k, theta)),
    }[whose]()
    dys = gradients(ours)
    for y, want in zip(ours, theirs, strict=True):
        assert_near(y, want)
    for mine, other in zip(*(torch.autograd.grad(ys, (q, k), dys) for ys in (ours, theirs)), strict=True):
        assert_near(mine, other, 2)


@kinds
@table_kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_no_larger_than_eagers(
    dtype: torch.dtype, half_tables: bool, interleaved: bool, kernels: Path
) -> None:
    """Queries of 4 heads and keys of 2; 12 of 16 elements turned."""
    report = check_op(rope, *inputs(kernels.device, dtype, interleaved=interleaved, half_tables=half_tables))
    assert report.ok, report


@pytest.mark.parametrize("table", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_dtypes_may_differ(table: torch.dtype, kernels: Path) -> None:
    """All is computed in float32, or float64 if there is one, and each output is rounded once."""
    q, _, cos, sin, *_ = inputs(kernels.device, torch.bfloat16)
    k = inputs(kernels.device, torch.float16)[1]
    report = check_op(rope, q, k, cos.to(table), sin.to(table), False, False)
    assert report.ok, report
    assert [y.dtype for y in rope(q, k, cos.to(table), sin.to(table))] == [torch.bfloat16, torch.float16]


# Tables.


@kinds
@table_kinds
@pytest.mark.parametrize("shape", [(20,), (1, 20), (2, 20), (1, 1, 20), (2, 1, 20)], ids=str)
def test_tables_of_every_shape(shape: tuple, half_tables: bool, interleaved: bool, kernels: Path) -> None:
    q, k, *_ = inputs(kernels.device)
    cos, sin = tables(*shape, 6 if half_tables else 12, device=kernels.device)
    compare(q, k, cos, sin, interleaved, half_tables)
    whole = [t.reshape(-1, 1, *t.shape[-2:]).expand(2, 1, 20, t.shape[-1]) for t in (cos, sin)]
    if half_tables:
        whole = [t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1) for t in whole]
    for y, want in zip(rope(q, k, cos, sin, interleaved, half_tables), rope(q, k, *whole, interleaved), strict=True):
        assert torch.equal(y, want)


@kinds
@pytest.mark.parametrize(
    "change",
    [lambda t: t.mT.contiguous().mT, lambda t: t.repeat_interleave(2, -1)[..., ::2], lambda t: t[..., :1].expand_as(t)],
    ids=["transposed", "stepped", "one column"],
)
def test_tables_of_any_layout(change: Callable, interleaved: bool, kernels: Path) -> None:
    q, k, cos, sin, *_ = inputs(kernels.device)
    compare(q, k, change(cos), change(sin), interleaved, False)


# Layouts and sizes of q and k.


def transposed(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@kinds
@pytest.mark.parametrize(
    "change",
    [
        torch.Tensor.contiguous,
        transposed,
        lambda x: torch.stack((x, x.flip(0)), -1)[..., 0],
        lambda x: x.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0),
        lambda x: x[:, :1].expand_as(x),
        lambda x: x[..., :1].expand_as(x),
        lambda x: torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape),
        lambda x: torch.cat((x, x), 2)[:, :, ::2],
    ],
    ids=["contiguous", "transposed", "stepped", "dim outermost", "one head", "one column", "offset", "every other"],
)
def test_inputs_and_gradients_of_any_layout(change: Callable, interleaved: bool, kernels: Path) -> None:
    q, k, cos, sin, *_ = inputs(kernels.device)
    views = [change(x.detach()).requires_grad_() for x in (q, k)]
    compare(*views, cos, sin, interleaved, False)
    dys = [change(random_like(x)) for x in (q, k)]
    compare(q, k, cos, sin, interleaved, False, dys=dys)


def test_gradients_are_laid_out_as_the_inputs(kernels: Path) -> None:
    given = inputs(kernels.device)
    ys = rope(*given)
    for dx, x in zip(torch.autograd.grad(ys, given[:2], gradients(ys)), given, strict=False):
        assert dx.stride() == x.stride()


@kinds
@pytest.mark.parametrize(
    ("seq", "rot", "dim"),
    [(1, 2, 2), (1, 2, 3), (3, 6, 7), (33, 64, 128), (70, 128, 128), (5, 2, 4096), (2, 4096, 4096)],
)
def test_sizes(seq: int, rot: int, dim: int, interleaved: bool, kernels: Path) -> None:
    compare(*inputs(kernels.device, interleaved=interleaved, seq=seq, rot=rot, dim=dim))


@pytest.mark.parametrize(("heads", "others"), [(1, 1), (7, 3), (2, 5), (3, 0)])
@pytest.mark.parametrize("programs", [1, 5, 1056])
def test_heads_are_shared_out(
    heads: int, others: int, programs: int, kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """q may have more heads than k, or fewer; and a program takes all of them, some or one."""
    monkeypatch.setattr(_rope, "PROGRAMS", programs)
    q, k = (drawn(2, n, 3, 8, device=kernels.device, seed=n).requires_grad_() for n in (heads, others))
    compare(q, k, *tables(3, 8, device=kernels.device), False, False)


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 0, 5, 8), (2, 2, 0, 8)], ids=str)
def test_no_elements(shape: tuple, path: Path) -> None:
    q, k = (torch.empty(shape, device=path.device, requires_grad=True) for _ in "qk")
    compare(q, k, *tables(shape[2], 6, device=path.device), False, False)


def test_heads_wider_than_the_kernel_takes(path: Path) -> None:
    given = inputs(path.device, seq=1, rot=2, dim=4098)
    compare(*given)
    if path.name != "reference":
        assert "heads are of 4098 elements, and the kernels take up to 4096" in ro.explain(rope, *given)


def test_tables_that_require_grad_take_the_reference(path: Path) -> None:
    q, k, cos, sin, *flags = inputs(path.device)
    cos.requires_grad_()
    ys = rope(q, k, cos, sin, *flags)
    (dcos,) = torch.autograd.grad(ys, cos, gradients(ys))
    assert dcos.shape == cos.shape
    if path.name != "reference":
        assert "cos or sin requires grad" in ro.explain(rope, q, k, cos, sin, *flags)


@pytest.mark.skipif(GPU, reason="runs only the last program, which a GPU cannot")
def test_offsets_beyond_two_to_the_31st() -> None:
    """Of the last positions alone, in memory that has addresses and no pages."""
    from retainops.testing import simulated_gpu

    seq = 2**31 // 64 + 8
    q, k, dq, dk = (drawn(1, 1, 1, 64, dtype=torch.bfloat16, seed=seed) for seed in range(4))
    one = tables(1, 64, dtype=torch.bfloat16)
    many = [x.expand(1, 1, seq, 64).requires_grad_() for x in (q, k)]
    with simulated_gpu(programs=[-1], check=False):
        ys = rope(*many, *(t.expand(seq, 64) for t in one))
        dxs = torch.autograd.grad(ys, many, [dy.expand(1, 1, seq, 64) for dy in (dq, dk)])
    few = [x.clone().requires_grad_() for x in (q, k)]
    want = rope(*few, *one)
    for ours, theirs in zip((*ys, *dxs), (*want, *torch.autograd.grad(want, few, (dq, dk))), strict=True):
        assert_near(ours[:, :, -1:], theirs, 2)


@pytest.mark.skipif(GPU, reason="takes memory that has addresses and no pages")
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "heads", "seq"])
def test_strides_beyond_two_to_the_31st(dim: int) -> None:
    """In each dim, three times 2^30 apart: a stride that fits into int32 and an offset that does not."""
    from retainops.testing import simulated_gpu

    x, (cos, sin) = drawn(3, 3, 3, 8, dtype=torch.bfloat16), tables(3, 3, 8)
    strides = [2**30 if d == dim else stride for d, stride in enumerate(x.stride())]
    far = torch.empty(2**31 + x.numel(), dtype=torch.bfloat16).as_strided(x.shape, strides).copy_(x)
    with simulated_gpu(check=False):
        for ours, want in zip(rope(far, far, cos, sin), rope(x, x, cos, sin), strict=True):
            assert torch.equal(ours, want)


# What is refused, and in which words.

Q, K, T = torch.ones(2, 4, 5, 8), torch.ones(2, 2, 5, 8), torch.ones(5, 8)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ((1.0, K, T, T), TypeError, "q is float; expected a torch.Tensor"),
        ((Q, K, T, None), TypeError, "sin is NoneType; expected a torch.Tensor"),
        ((Q, K.long(), T, T), TypeError, "k is torch.int64; expected a floating-point tensor"),
        ((Q, K, T.to("meta"), T), RuntimeError, r"cos is on meta and q on cpu; move one of them with .to\(device\)"),
        ((Q, K, T, T, 1), TypeError, "interleaved is int; expected True or False"),
        ((Q, K, T, T, False, None), TypeError, "half_tables is NoneType; expected True or False"),
        ((Q[0], K, T, T), RuntimeError, r"q has shape \(4, 5, 8\); expected \(batch, heads, seq, dim\)"),
        ((Q, K[:, :, 1:], T, T), RuntimeError, r"k has shape \(2, 2, 4, 8\) and q has \(2, 4, 5, 8\).*in heads alone"),
        ((Q, K, T, T[:, :6]), RuntimeError, r"cos has shape \(5, 8\) and sin has \(5, 6\); expected one shape"),
        (
            (Q, K, T[1:], T[1:]),
            RuntimeError,
            r"have shape \(4, 8\), and q has \(2, 4, 5, 8\); expected \(5, rot\)",
        ),
        ((Q, K, *[T.expand(3, 5, 8)] * 2), RuntimeError, r"have shape \(3, 5, 8\).*rows of q's positions, as cos\[pos"),
        ((Q, K, *[T.expand(2, 4, 5, 8)] * 2), RuntimeError, r"have shape \(2, 4, 5, 8\).*\(2, 1, 5, rot\)"),
        ((Q, K, *[T[:, :5]] * 2), RuntimeError, "have 5 columns, so 5 of the 8 elements.*even number from 2 to 8"),
        ((Q, K, *[T[:, :0]] * 2), RuntimeError, "have 0 columns, so 0 of the 8"),
        ((Q, K, T, T, False, True), RuntimeError, "have 8 columns of half_tables, so 16 of the 8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors(given: tuple, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"^rope: .*{words}"):
        rope(*given)


def test_an_unknown_point_and_one_that_no_gradient_reaches(path: Path) -> None:
    q, k, *others = inputs(path.device)
    with pytest.raises(KeyError, match="rope: unknown point 'q'; its points are: q_rot, k_rot"):
        rope(q, k, *others, retain=ro.Retained("q"))
    with pytest.raises(RuntimeError, match="rope: can't retain_grad on point 'k_rot'"):
        rope(q, k.detach(), *others, retain=ro.Retained("k_rot"))


# Machine code.


@pytest.mark.parametrize(
    ("interleaved", "dtype", "rot", "dim", "target"),
    [
        (False, torch.bfloat16, 128, 128, "sm_90"),
        (True, torch.bfloat16, 128, 128, "sm_90"),
        (False, torch.float32, 64, 80, "sm_80"),
        (True, torch.float64, 96, 128, "sm_120"),
        (False, torch.float32, 4096, 4096, "sm_100"),
    ],
    ids=str,
)
def test_no_spills_and_accesses_of_128_bits(
    interleaved: bool, dtype: torch.dtype, rot: int, dim: int, target: str
) -> None:
    """Of views as models have them; in float32 with tables of one column for each pair."""
    from retainops.testing import static_report

    half_tables = dtype == torch.float32
    q, k, *others = inputs(dtype=dtype, interleaved=interleaved, half_tables=half_tables, seq=64, rot=rot, dim=dim)

    def run() -> None:
        ys = rope(q, k, *others)
        torch.autograd.grad(ys, (q, k), gradients(ys))

    for report in static_report(run, target):
        assert (report.spill_stores, report.spill_loads) == (0, 0), str(report)
        assert report.narrowest == 128, str(report)
