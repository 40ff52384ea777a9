"""Attention's tiles at the edges of a window: those are left out of which nothing is seen, and no others."""

from __future__ import annotations

import pytest
import torch

from retainops.stats import parts_of
from tests.attention_cases import Case
from tests.attention_oracle import Run, check
from tests.conftest import HAS_TRITON, Path

if not HAS_TRITON:
    pytest.skip("triton is not installed: nothing is launched", allow_module_level=True)

from retainops.ops import _scores_kernels
from retainops.ops._scores import Wanted

TOKENS = 130  # two tiles of 64 and two tokens
PARTS = "sumsq", "abs_sum"


@pytest.mark.parametrize("window", [(1, 0), (0, 1), (65, 0), (0, 65)], ids=str)
def test_one_key_of_a_tile_is_seen(kernels: Path, window: tuple[int, int]) -> None:
    """By one query of another tile: a tile left out there is missed in the sums of a row, and of a column."""
    shape = (1, 1, TOKENS, 16)
    run = Run(Case(shape, shape, shape, window=window), torch.float32, kernels.device)
    for over in ("queries", "keys"):
        truth, eager = (parts_of(PARTS, over, g["s"], None) for g in (run.truth, run.eager))
        found, _ = _scores_kernels.answer(run.scores, Wanted(parts=PARTS, over=over), None)
        for part, x, y in zip(PARTS, truth, eager, strict=True):
            check(f"{part} over {over}", found[part], x, y)
    s = run.empty()
    _, of_p = _scores_kernels.answer(run.scores, Wanted(s), Wanted(relevance=("attn_grad",)))
    check("s", s, run.truth["s"], run.eager["s"])
    relevance = (g["p"] * g["value of p"] for g in (run.truth, run.eager))
    check("attn_grad", of_p["attn_grad"], *(x.mean(1) for x in relevance))
