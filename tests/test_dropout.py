"""The random numbers of bias_dropout_add: which they are, that every path draws the same, and what they cost."""

from __future__ import annotations

import gc
import itertools
import math
import weakref
from collections.abc import Callable

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import retainops as ro
from retainops.ops._random import philox, uniform, uniform_at
from retainops.testing import check_op
from tests.conftest import HAS_TRITON, Path, random_leaves

SEED = 0x0123456789ABCDEF
LAYOUTS = {
    "dense": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "stepped": lambda x: torch.stack((x, x), -1)[..., 0],
    "expanded": lambda x: x[:1].expand_as(x),
}


def philox_by_hand(counter: tuple[int, ...], key: tuple[int, ...], rounds: int = 7) -> tuple[int, ...]:
    """Philox4x32-7 as in the paper (Salmon et al. 2011, section 3.3), in Python's own integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(rounds):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def uniform_by_hand(seed: int, index: int) -> float:
    counter, key = ((x & 0xFFFFFFFF, x >> 32 & 0xFFFFFFFF) for x in (index // 4, seed))
    return (philox_by_hand((*counter, 0, 0), key)[index % 4] >> 8) / 2**24


def mask_by_hand(seed: int, shape: tuple[int, ...], p: float) -> torch.Tensor:
    """True for what is kept."""
    return torch.tensor([uniform_by_hand(seed, i) >= p for i in range(torch.Size(shape).numel())]).view(shape)


def seed_of(device: str, value: int = SEED) -> torch.Tensor:
    return torch.tensor(value, device=device)


def kept(*shape: int, device: str, p: float = 0.4, layout: Callable = lambda x: x, **options) -> torch.Tensor:
    """The mask of a call, by what it leaves of ones."""
    x = layout(torch.ones(shape, device=device, dtype=options.pop("dtype", torch.float32)))
    return ro.bias_dropout_add(x, None, torch.zeros_like(x), p, **options).cpu() != 0


@pytest.mark.parametrize(
    ("rounds", "counter", "key", "words"),
    [
        (7, "00000000 00000000 00000000 00000000", "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
        (7, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (7, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "4dfccaba 190a87f0 c47362ba b6b5242a"),
        (10, "00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (10, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (10, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(rounds: int, counter: str, key: str, words: str) -> None:
    """Of the generator's authors: kat_vectors of Random123."""
    read = (tuple(int(word, 16) for word in text.split()) for text in (counter, key))
    assert " ".join(f"{word:08x}" for word in philox_by_hand(*read, rounds)) == words


INDICES = [0, 1, 2, 3, 4, 4095, 2**31 - 1, 2**31, 2**32 + 5, 2**34 - 1, 2**34, 2**34 + 6, 2**40 + 3, 2**62 + 2]


@pytest.mark.parametrize("seed", [0, 7, 2**32, 2**63 - 2, SEED])
def test_the_references_numbers(seed: int) -> None:
    """Also where the counter is beyond 32 bits, which no tensor of a test's size reaches."""
    index = torch.tensor(INDICES)
    words = [
        philox_by_hand((i // 4 & 0xFFFFFFFF, i // 4 >> 32, 0, 0), (seed & 0xFFFFFFFF, seed >> 32)) for i in INDICES
    ]
    assert torch.stack(philox(torch.tensor(seed), index >> 2), -1).tolist() == [list(w) for w in words]
    assert uniform_at(torch.tensor(seed), index).tolist() == [uniform_by_hand(seed, i) for i in INDICES]
    assert uniform(torch.tensor(seed), torch.Size((3, 5))).flatten().tolist() == [
        uniform_by_hand(seed, i) for i in range(15)
    ]


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed: there are no kernels")
@pytest.mark.parametrize("step", [1, 3, 2**31, 2**33 + 1, 2**40])
@pytest.mark.parametrize("quads", [None, 1])
def test_the_kernels_numbers(kernels: Path, step: int, quads: int | None) -> None:
    """Of elements that are `step` apart: as far as that the counter is beyond 32 bits."""
    from retainops.kernels.tiles import Operand
    from tests.random_kernels import uniform_kernel

    y = torch.empty(32, device=kernels.device)
    numbers = Operand(None, (None, step), seed=seed_of(kernels.device), quads=quads)
    uniform_kernel[(2,)](numbers, Operand(y, (None, 1)), (1, 32), BLOCK=16)
    index = [4 * step * (i // 4) + i % 4 if quads else step * i for i in range(32)]
    assert y.tolist() == [uniform_by_hand(SEED, i) for i in index]


@pytest.mark.parametrize("shape", [(7, 150), (4099,), (5, 3, 8), (6, 1024), (), (1,), (64, 64)], ids=str)
def test_the_mask_is_the_generators(path: Path, shape: tuple[int, ...]) -> None:
    """On both paths, in whole and ragged tiles: the element's number decides, and nothing else."""
    assert torch.equal(kept(*shape, device=path.device, seed=seed_of(path.device)), mask_by_hand(SEED, shape, 0.4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_no_layout_and_no_dtype_changes_the_mask(path: Path, layout: Callable, dtype: torch.dtype) -> None:
    found = kept(6, 72, device=path.device, layout=layout, dtype=dtype, seed=seed_of(path.device))
    assert torch.equal(found, mask_by_hand(SEED, (6, 72), 0.4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rounding_p_does_not_change_the_mask(path: Path, dtype: torch.dtype) -> None:
    """Where a number is p itself to float32's precision, and above or below it to float64's."""
    number = next(u for i in itertools.count() if (u := uniform_by_hand(SEED, i)) > 0.5)
    for p in (number, number - 1e-12, number + 1e-12):
        found = kept(64, device=path.device, p=p, dtype=dtype, seed=seed_of(path.device))
        assert torch.equal(found, mask_by_hand(SEED, (64,), p))


@pytest.mark.parametrize(
    ("x", "bias", "residual"),
    [
        ((6, 40), (40,), (6, 40)),
        ((6, 1), (40,), (40,)),
        ((40,), (40,), (6, 40)),
        ((6, 1), (1,), (6, 40)),
        ((), (8,), (8,)),
    ],
    ids=str,
)
def test_broadcasting_draws_one_number_an_element_of_x_plus_bias(path: Path, x, bias, residual) -> None:
    """What `residual` adds by broadcasting has the same mask as its neighbours, as in the eager expression."""
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.rand(shape, generator=generator).to(path.device) + 1 for shape in (x, bias, residual)]
    y = ro.bias_dropout_add(*tensors, 0.4, seed_of(path.device)) - tensors[2]
    mask = mask_by_hand(SEED, torch.broadcast_shapes(x, bias), 0.4)
    assert torch.equal(y.cpu() > 0.5, mask.expand(y.shape))
    assert check_op("bias_dropout_add", *tensors, 0.4, seed_of(path.device)).ok


def test_backward_has_the_forwards_mask(path: Path) -> None:
    rand = random_leaves(path.device)
    x, bias, residual = rand(7, 150), rand(150), rand(7, 150)
    slots = ro.Retained("biased", "dropped")
    y = ro.bias_dropout_add(x, bias, residual, 0.3, retain=slots)
    y.sum().backward()
    mask = y.detach() != residual.detach()
    assert 0 < mask.sum() < mask.numel()
    for grad in (x.grad, slots.biased.grad):
        assert torch.equal(grad, mask / 0.7)
    assert (slots.dropped.grad == 1).all()
    assert (residual.grad == 1).all()
    torch.testing.assert_close(bias.grad, (mask / 0.7).sum(0))


def test_manual_seed_reproduces_and_the_paths_agree(path: Path) -> None:
    masks = []
    for _ in range(2):
        torch.manual_seed(3)
        masks.append([kept(7, 150, device=path.device) for _ in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))
    assert not torch.equal(masks[0][0], masks[0][1])  # one call is not the next
    torch.manual_seed(3)
    with ro.backend("reference"):
        assert torch.equal(kept(7, 150, device=path.device), masks[0][0])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore")  # what Inductor says of the machine's compilers is not ours
def test_compiled_code_has_the_same_mask(path: Path, backend: str) -> None:
    torch._dynamo.reset()
    step = torch.compile(lambda x, seed: ro.bias_dropout_add(x, None, 0.0, 0.4, seed), fullgraph=True, backend=backend)
    x = torch.ones(7, 150, device=path.device, requires_grad=True)
    y = step(x, seed_of(path.device))
    y.sum().backward()
    mask = mask_by_hand(SEED, (7, 150), 0.4)
    assert torch.equal(y.detach().cpu() != 0, mask)
    assert torch.equal(x.grad.cpu() != 0, mask)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.filterwarnings("ignore")  # as above
def test_compiled_code_follows_a_p_that_changes(path: Path, dynamic: bool | None) -> None:
    torch._dynamo.reset()
    step = torch.compile(lambda x, seed, p: ro.bias_dropout_add(x, None, 0.0, p, seed), fullgraph=True, dynamic=dynamic)
    x = torch.ones(7, 150, device=path.device)
    near = math.nextafter(uniform_by_hand(SEED, 7), 1.0)  # just above a number that is drawn
    for p in (0.1, 0.3, 0.6, near, 0.9):
        y = step(x, seed_of(path.device), p)
        assert torch.equal(y.cpu() != 0, mask_by_hand(SEED, (7, 150), p))
        torch.testing.assert_close(y.max().item(), 1 / (1 - p))


def test_compiled_code_draws_its_seeds(path: Path) -> None:
    torch._dynamo.reset()
    step = torch.compile(lambda x: ro.bias_dropout_add(x, None, 0.0, 0.4), fullgraph=True, backend="aot_eager")
    x = torch.ones(7, 150, device=path.device, requires_grad=True)
    masks = []
    for _ in range(2):
        torch.manual_seed(3)
        x.grad = None
        ys = [step(x) for _ in range(2)]
        ys[1].sum().backward()
        assert torch.equal(x.grad != 0, ys[1] != 0)
        masks.append([y != 0 for y in ys])
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))
    assert not torch.equal(masks[0][0], masks[0][1])


def test_a_checkpoint_draws_the_same_again(path: Path) -> None:
    x = torch.ones(7, 150, device=path.device, requires_grad=True)
    y = checkpoint(lambda x: ro.bias_dropout_add(x * 1, None, 0.0, 0.4), x, use_reentrant=False)
    y.sum().backward()
    assert torch.equal(x.grad != 0, y != 0)


@pytest.mark.parametrize("options", [{"p": 0.0}, {"p": 0.4, "training": False}], ids=["p=0", "not training"])
def test_nothing_is_dropped_and_nothing_drawn(path: Path, options: dict) -> None:
    rand = random_leaves(path.device)
    x, bias, residual = rand(7, 150), rand(150), rand(7, 150)
    before = torch.get_rng_state()
    y = ro.bias_dropout_add(x, bias, residual, **options)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(y, residual + (x + bias))
    y.sum().backward()
    assert (x.grad == 1).all()


def test_all_is_dropped(path: Path) -> None:
    rand = random_leaves(path.device)
    x, bias, residual = rand(7, 150), rand(150), rand(7, 150)
    slots = ro.Retained("biased", "dropped")
    y = ro.bias_dropout_add(x, bias, residual, 1.0, retain=slots)
    assert torch.equal(y, residual)
    y.sum().backward()
    assert not x.grad.any()
    assert not bias.grad.any()
    assert not slots.biased.grad.any()
    assert (residual.grad == 1).all()
    assert (slots.dropped.grad == 1).all()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_as_many_are_dropped_as_were_asked_for(path: Path, p: float) -> None:
    n = 40_000
    dropped = n - kept(n, device=path.device, p=p, seed=seed_of(path.device)).sum().item()
    assert abs(dropped - n * p) < 5 * (n * p * (1 - p)) ** 0.5


def test_numbers_are_uniform_and_neighbours_independent() -> None:
    n = 1 << 20
    u = uniform(torch.tensor(SEED), torch.Size((n,))).double()
    assert u.min() >= 0
    assert u.max() < 1
    for bins in (2, 16, 1000):  # chi squared: of mean bins - 1, of variance twice that
        counts = torch.histc(u, bins, 0, 1)
        chi2 = ((counts - n / bins) ** 2 / (n / bins)).sum().item()
        assert abs(chi2 - (bins - 1)) < 5 * (2 * (bins - 1)) ** 0.5 + 5
    other = uniform(torch.tensor(SEED + 1), torch.Size((n,))).double()
    pairs = [(u[:-lag], u[lag:]) for lag in (1, 2, 3, 4, 5, 1024, 4096)] + [(u, other)]
    for left, right in pairs:
        correlation = ((left - 0.5) * (right - 0.5)).mean() * 12
        assert abs(correlation) < 5 / len(left) ** 0.5


# What a call keeps for its backward: the seed.


def test_inputs_are_free_after_the_forward(path: Path) -> None:
    """The mask is made again, and no derivative depends on x, bias or residual: they may be freed, or written over."""
    leaf = torch.ones(7, 150, device=path.device, requires_grad=True)
    x, bias, residual = leaf * 1, leaf[0] * 2, leaf * 3
    refs = [weakref.ref(t) for t in (x, bias, residual)]
    y = ro.bias_dropout_add(x, bias, residual, 0.4)
    with torch.no_grad():
        for t in (x, bias, residual):
            t.detach().zero_()
    del x, bias, residual, t
    gc.collect()
    assert [ref() for ref in refs] == [None] * 3
    y.sum().backward()
    assert leaf.grad.isfinite().all()
    assert leaf.grad.max() > 3


def test_an_input_that_backward_does_not_read_is_free_after_the_forward(path: Path) -> None:
    leaf = torch.ones(7, 150, device=path.device, requires_grad=True)
    shift = leaf * 3
    ref = weakref.ref(shift)
    y = ro.scale_shift(leaf, leaf, shift)
    del shift
    assert ref() is None
    y.sum().backward()
    assert (leaf.grad == 2 + 1 + 3).all()


def test_a_statistic_of_value_times_gradient_still_has_the_values(path: Path) -> None:
    rand = random_leaves(path.device)
    x, bias, residual = rand(7, 150), rand(150), rand(7, 150)
    slots = ro.Retained(biased=ro.Stats("act_grad", grad=True), dropped=ro.Stats("act_grad", grad=True))
    y = ro.bias_dropout_add(x, bias, residual, 0.3, seed_of(path.device), retain=slots)
    dy = torch.arange(7 * 150, device=path.device).view(7, 150) / 1050
    y.backward(dy)
    with torch.no_grad():
        biased, dropped = x + bias, y - residual
    torch.testing.assert_close(slots.biased.act_grad, (biased * slots.biased.grad).sum(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(slots.dropped.act_grad, (dropped * dy).sum(), rtol=1e-4, atol=1e-3)
