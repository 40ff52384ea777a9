"""How much memory attention's backward takes for what is asked: nothing of (heads, N, N) but what is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import retainops as ro
from retainops.ops import _scores
from tests.attention_cases import CASES, eager, loss_of

HEADS, WIDTH, KIB = 8, 16, 1024
TILE = 1 << 13
"""Elements of a tile of scores: 32 KiB."""


@pytest.fixture(autouse=True)
def few_threads() -> Iterator[None]:
    """PyTorch's attention on a CPU has buffers for each thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(min(threads, 2))
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_scores, "ELEMENTS", TILE)
    monkeypatch.setattr(_scores, "FEWEST_ROWS", 1)


def peak(step: Callable[[], Any]) -> int:
    """Bytes above what there was before, by what the allocator says."""
    with torch.autograd.profiler.profile(profile_memory=True) as found:
        step()
    events = [e for e in found.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def of_backward(n: int, compiled: bool = False, width: int = WIDTH, **wants: Any) -> int:
    """Of the backward of attention over n tokens."""
    q, k, v = (torch.randn(1, HEADS, n, width, requires_grad=True) for _ in range(3))
    keywords = {name: wants.pop(name) for name in ("softcap",) if name in wants}
    kept = ro.Retained(**wants) if wants else None

    def call(q: Any, k: Any, v: Any) -> torch.Tensor:
        return ro.attention(q, k, v, **keywords, retain=kept)

    if compiled:
        torch._dynamo.reset()
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
        call(q, k, v).sum().backward()
    loss = loss_of(call(q, k, v))
    for x in (q, k, v):
        x.grad = None
    return peak(loss.backward)


def of_eager(n: int) -> int:
    """Of eager PyTorch's forward and backward, with s and p retained."""
    q, k, v = (torch.randn(1, HEADS, n, WIDTH, requires_grad=True) for _ in range(3))
    return peak(lambda: loss_of(eager(CASES["plain"], q, k, v, None)["o"]).backward())


@pytest.mark.parametrize("compiled", [False, True])
def test_relevance_is_one_map_and_legrad_a_row(compiled: bool) -> None:
    n = 256
    one_map = 4 * n * n
    plain, chefer, legrad = (
        of_backward(n, compiled, **wants)
        for wants in ({}, {"p": ro.Relevance("chefer")}, {"p": ro.Relevance("legrad")})
    )
    tiles = 8 * 4 * TILE  # of what is computed of one
    assert chefer - plain <= 1.1 * one_map + tiles
    assert legrad - plain <= tiles
    assert chefer < HEADS * one_map  # so nothing of (heads, N, N) was there
    assert of_eager(n) > 3 * HEADS * one_map


def test_it_grows_as_it_should() -> None:
    """From N to 2 N: the map four times, above a plain backward; a row of it twice, with all of the backward."""

    def most(n: int, **wants: Any) -> int:
        # What was allocated before the profile, and is freed in it, is at times not told.
        return max(of_backward(n, **wants) for _ in range(4))

    thin = {"width": 4}  # of q's size, say, which is then far less than a map
    maps = [most(n, p=ro.Relevance("chefer"), **thin) - most(n, **thin) for n in (512, 1024)]
    rows = [most(n, p=ro.Relevance("legrad")) for n in (256, 512)]
    assert 3 < maps[1] / maps[0] < 4.5
    assert rows[1] < 2.2 * rows[0]


@pytest.mark.parametrize(
    "want", [ro.Stats("l2", over="keys"), ro.Stats("amax", "hist"), ro.Part(heads=0, queries=0)], ids=repr
)
def test_statistics_and_parts_take_no_more_than_they_are(want: Any) -> None:
    n = 256
    tiles = 10 * 4 * TILE
    assert of_backward(n, s=want) - of_backward(n) <= tiles + 8 * 4 * HEADS * n


def test_softcap_takes_tiles() -> None:
    n = 256
    assert of_backward(n, softcap=2.0) < HEADS * 4 * n * n / 2
