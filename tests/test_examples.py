"""The examples run, and compute what they say."""

from __future__ import annotations

import functools
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = {"steps": 6, "layers": 2, "width": 16, "batch": 4}


@functools.cache
def example(name: str) -> dict[str, Any]:
    pytest.importorskip("matplotlib", reason="examples draw, and matplotlib is not installed")
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def refusal(name: str, *arguments: str) -> str:
    """What an example says to arguments that it cannot take."""
    app = typer.Typer()
    app.command()(example(name)["main"])
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 2, result.output
    return result.output


@pytest.fixture
def noise() -> dict[str, Any]:
    return example("gradient_noise_scale")


def test_the_gradient_noise_scale_example_trains_and_draws(
    noise: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise["main"](steps=12, layers=1, out=tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    first, last = capsys.readouterr().out.split("loss ")[1].split(" nats")[0].split(" -> ")
    assert float(last) < float(first)


def test_the_noise_scale_is_that_of_the_gradients_that_were_drawn(noise: dict[str, Any]) -> None:
    """Tokens' gradients of mean G and covariance S: on average over many batches tr(S) and |G|^2, without bias."""
    torch.manual_seed(0)
    tokens, size = 16, 8
    mean = torch.randn(size, dtype=torch.float64)
    pairs = []
    for _ in range(4000):
        rows = (mean + 2.0 * torch.randn(tokens, size, dtype=torch.float64)) / tokens  # of a mean over tokens
        pairs.append(noise["noise_scale"](rows.norm(dim=1), rows.sum(0)))
    trace, square = torch.tensor(pairs, dtype=torch.float64).mean(0)
    torch.testing.assert_close(trace, torch.tensor(4.0 * size, dtype=torch.float64), rtol=0.02, atol=0)
    torch.testing.assert_close(square, mean.square().sum(), rtol=0.05, atol=0)


@pytest.fixture
def lm() -> dict[str, Any]:
    pytest.importorskip("transformers", reason="the model is of transformers, which is not installed")
    return example("train_lm")


def test_train_lm_trains_watches_and_draws(
    lm: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lm["main"](**SMALL | {"steps": 30}, out=tmp_path / "picture.png")
    printed = capsys.readouterr().out
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert "gated(act_fn)" in printed
    assert "largest gradient in step 25: model.layers." in printed
    first, last = printed.split("loss ")[1].split(" nats")[0].split(" -> ")
    assert float(last) < float(first) - 0.1


def test_train_lm_unfused_says_that_nothing_is_watched(
    lm: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lm["main"](**SMALL, fused=False, out=tmp_path / "picture.png")
    assert "has no points" in capsys.readouterr().out


def test_train_lm_compares_fused_with_unfused(
    lm: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lm["main"](**SMALL, compare=True, out=tmp_path / "picture.png")
    fused = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  fused "))
    assert float(fused.split("largest ")[1].split(";")[0]) < 1e-5
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_train_lm_on_two_ranks_is_the_same(
    lm: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under torchrun: the loss, and the largest gradient's name and norm, are those of one process."""
    lm["main"](**SMALL, every=1, out=tmp_path / "one.png")
    arguments = [f"--{name}={value}" for name, value in SMALL.items()]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, "examples/train_lm.py", *arguments, "--every=1", f"--out={tmp_path / 'two.png'}"],
        cwd=EXAMPLES.parent,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = results(capsys.readouterr().out), results(done.stdout)
    assert len(one) == 2
    assert one == two
    assert (tmp_path / "two.png").stat().st_size > 10_000


def results(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if " -> " in line or "largest" in line]


def test_examples_refuse_before_the_work(lm: dict[str, Any], tmp_path: Path) -> None:
    assert "multiple of 8" in refusal("train_lm", "--width", "12")
    for option in ("--steps", "--layers"):
        assert f"Invalid value for '{option}'" in refusal("gradient_noise_scale", option, "0")
    for name in ("train_lm", "attribution_patching", "quantisation_sensitivity", "gradient_noise_scale"):
        assert "there is no folder" in refusal(name, "--out", str(tmp_path / "missing" / "picture.png"))
        assert ".png, .pdf or .svg" in refusal(name, "--out", str(tmp_path / "picture.bmp"))


def test_attribution_patching_finds_what_patching_finds() -> None:
    """Of a model with random weights: the whole change is in the last value, and gradients in between add up to it."""
    of = example("attribution_patching")
    torch.manual_seed(0)
    model, pair = of["Model"](2), of["texts"](8, of["VALUE"])
    with torch.no_grad():
        whole = (of["metric"](model(pair.other), pair) - of["metric"](model(pair.clean), pair)).mean()
    exact, estimated = of["patched"](model, pair), of["attributed"](model, pair, between=32)
    torch.testing.assert_close(exact["layers.1.stream"][-1], whole)
    torch.testing.assert_close(exact["embedded"][of["VALUE"]], whole)
    torch.testing.assert_close(estimated["embedded"].sum(), whole, rtol=0.01, atol=0)
    assert estimated["embedded"].nonzero().flatten().tolist() == [of["VALUE"]]
    assert of["agreement"](exact, estimated) > 0.99


def test_attribution_of_smaller_values_is_their_first_order() -> None:
    of = example("attribution_patching")
    torch.manual_seed(0)
    grids = of["shrunk"](of["Model"](2).double(), of["texts"](4, of["VALUE"]), 1e-4)
    exact, first = (of["flat"](grids[name]) for name in (of["EXACT"], of["ONE"]))
    torch.testing.assert_close(exact, first.to(exact.dtype), rtol=2e-3, atol=1e-9)


def test_attribution_patching_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("attribution_patching")["main"](steps=4, pairs=2, out=tmp_path / "picture.png")
    assert "not learnt yet" in capsys.readouterr().out
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_quantisation_sensitivity_is_of_single_samples_gradients() -> None:
    """The mean square, over samples, of gradients that eager PyTorch finds one sample at a time."""
    of = example("quantisation_sensitivity")
    torch.manual_seed(0)
    model, context = of["Model"](2), torch.randint(256, (12, of["CONTEXT"]))
    torch.manual_seed(1)
    found = of["fisher"](model, context)
    torch.manual_seed(1)
    labels = torch.distributions.Categorical(logits=model(context).detach()).sample()
    expected = torch.zeros_like(found)
    for one, label in zip(context, labels, strict=True):
        acts: dict[int, torch.Tensor] = {}

        def kept(n: int, x: torch.Tensor, acts: dict[int, torch.Tensor] = acts) -> torch.Tensor:
            acts[n] = x
            x.retain_grad()
            return x

        with of["changed"](model, kept):
            torch.nn.functional.cross_entropy(model(one[None]), label[None]).backward()
        expected += torch.stack([acts[n].grad[0].square() for n in sorted(acts)]) / len(context)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-10)


def test_quantisation_rounds_to_as_many_values_as_bits_say() -> None:
    of = example("quantisation_sensitivity")
    values = torch.randn(2, 500, 3, generator=torch.Generator().manual_seed(0))
    quantise = of["Quantiser"](values, 2)
    rounded = quantise(1, values[1])
    assert [len(channel.unique()) for channel in rounded.T] == [4, 4, 4]
    assert ((rounded - values[1]).abs() <= quantise.step[1] / 2 + 1e-6).all()
    torch.testing.assert_close(quantise.error[1], (rounded - values[1]).square().mean(0))


def test_quantisation_sensitivity_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    of = example("quantisation_sensitivity")
    monkeypatch.setitem(of["main"].__globals__, "UNSEEN", 256)
    of["main"](steps=20, blocks=1, out=tmp_path / "picture.png")
    printed = capsys.readouterr().out
    assert float(printed.split("squared gradient x squared error │")[1].split("│")[0]) > 0.9
    assert (tmp_path / "picture.png").stat().st_size > 10_000
