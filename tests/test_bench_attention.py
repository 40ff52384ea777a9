"""The benchmark of attention's memory: each way computes attention, and the figures become a table and a picture."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("matplotlib", reason="the benchmark draws, and matplotlib is not installed")

from bench import attention_memory as bench

SIZES = {"tokens": [64, 128], "heads": 4, "width": 8, "dtype": "float32", "device": "cpu", "most": 1}


def test_every_way_is_attention() -> None:
    q, k, v = (torch.randn(1, 2, 8, 4, requires_grad=True) for _ in "qkv")
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    for way in bench.WAYS.values():
        torch.testing.assert_close(way(q, k, v), wanted)


def test_figures_become_a_table_and_a_picture(tmp_path: Path) -> None:
    found: dict[str, dict[int, dict[str, float]]] = {}
    for way in bench.WAYS:
        rows: list[dict[str, float]] = []
        for tokens in SIZES["tokens"]:
            bench.measure(way, tokens, SIZES, SimpleNamespace(put=rows.append))
        found[way] = dict(zip(SIZES["tokens"], rows, strict=True))
        assert all(row["bytes"] >= 0 and row["seconds"] > 0 for row in rows)
    assert bench.table(found, SIZES).row_count == 2
    bench.draw(found, SIZES, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_what_would_not_fit_is_left_out() -> None:
    sizes = {**SIZES, "heads": 32}
    assert bench.fits(bench.EAGER, 1024, sizes)  # 6 matrices of 128 MiB
    assert not bench.fits(bench.EAGER, 2048, sizes)
    assert bench.fits(bench.FULL, 2048, sizes)
    assert bench.fits(bench.LEGRAD, 2**20, sizes)


def test_the_forecast_is_of_every_request(capsys: pytest.CaptureFixture[str]) -> None:
    """legrad's kernel has no branch in its loop: one trip is a whole tile."""
    pytest.importorskip("triton", reason="without triton there are no kernels to predict for")
    from bench import attention_forecast as command

    assert command.main([]) == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == list(command.ASKED)
    assert all(1 < float(ratio) < 5 for row in rows for ratio in row[1:])
