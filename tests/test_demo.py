"""The demo: it runs, it is right, and it says so when it is not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import retainops as ro
from retainops.cli import picture, siren
from retainops.cli.app import app
from retainops.testing.simulated import simulated_gpu


def run(*args: str):
    return CliRunner().invoke(app, ["demo", "--device", "cpu", *args])


def verdicts(output: str) -> list[str]:
    """The last cells of the table's rows."""
    rows = [line.split("│") for line in output.splitlines() if line.startswith("│")]
    return [row[-2].strip() for row in rows]


def test_a_tiny_run_writes_the_picture_and_agrees_with_eager(tmp_path):
    out = tmp_path / "tiny.png"
    result = run("--steps", "3", "--size", "16", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert verdicts(result.output) == ["bitwise equal"] * 5
    with Image.open(out) as image:
        assert image.width > 2 * image.height > 1000
        assert len(image.convert("RGB").getcolors(1 << 24)) > 200  # a photograph is in it, not blank axes


def test_it_takes_the_kernels_where_there_is_a_gpu_with_no_change(tmp_path):
    with simulated_gpu() as launches:
        result = run("--steps", "1", "--size", "4", "--out", str(tmp_path / "tiny.png"))
    assert result.exit_code == 0, result.output
    assert "takes the Triton kernels" in result.output
    assert {launch.name for launch in launches} == {"mul_sin_fwd_kernel", "mul_sin_bwd_kernel"}
    assert set(verdicts(result.output)) <= {"agrees", "bitwise equal"}


def test_it_fits_a_photograph_of_yours(tmp_path):
    y, x = np.mgrid[0:40, 0:30]
    photograph = np.stack([x * 8, y * 6, 0 * x + 128], axis=-1).astype(np.uint8)
    Image.fromarray(photograph).save(tmp_path / "mine.png")
    target = picture.load_photograph(tmp_path / "mine.png", 12).mul(2).sub(1).reshape(-1, 3)
    torch.manual_seed(0)
    model, coordinates = siren.Siren(width=24, hidden=2), siren.coordinates(12, torch.device("cpu"))
    fit = siren.fit(model, model, coordinates, target, 60, lambda step, loss: None)
    assert fit.norms.shape == (2, 60)
    assert siren.psnr(fit.losses[-1].item()) > 24 > siren.psnr(fit.losses[0].item())


def test_the_norms_are_those_of_retain_grad():
    torch.manual_seed(0)
    model, x, target = siren.Siren(width=8, hidden=3), siren.coordinates(6, torch.device("cpu")), torch.rand(36, 3)
    y, interiors = model.eager(x)
    (y - target).square().mean().backward()
    fit = siren.fit(model, model, x, target, 1, lambda step, loss: None)
    torch.testing.assert_close(fit.norms[:, 0], torch.stack([c.grad.norm() for c in interiors]))


def test_a_gradient_unlike_eagers_is_reported(tmp_path, monkeypatch):
    right = ro.mul_sin
    monkeypatch.setattr(ro, "mul_sin", lambda a, b, retain=None: right(a, b * 1.0001, retain=retain))
    monkeypatch.setattr(ro, "explain", lambda *_: "")
    result = run("--steps", "2", "--size", "8", "--out", str(tmp_path / "wrong.png"))
    assert result.exit_code == 1
    assert "differs" in verdicts(result.output)
    assert "a retained gradient differs from eager PyTorch's" in result.output


def test_16_bit_grey_photographs_are_not_clipped(tmp_path):
    ramp = np.linspace(0, 60000, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    loaded = picture.load_photograph(tmp_path / "deep.png", 8)
    assert loaded.shape == (8, 8, 3)
    assert 0.4 < loaded.mean() < 0.6


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--image", "nowhere.jpg"), "--image nowhere.jpg: No such file or directory"),
        (("--image", "."), "--image .: Is a directory"),
        (("--image", __file__), "not an image that pillow can read"),
        (("--out", "nowhere/demo.png"), "there is no folder nowhere"),
        (("--out", "demo.doc"), "--out demo.doc: cannot write this kind of file; use .png, .pdf or .svg"),
        (("--device", "gpu"), '--device gpu: expected "auto", "cpu", "cuda"'),
        (("--device", "cuda:99"), "--device cuda:99: PyTorch finds"),
        (("--device", "cuda:99999999999999999999"), "--device cuda:99999999999999999999: PyTorch finds"),
    ],
)
def test_a_mistake_gets_one_line_and_status_2(args, said):
    result = run(*args)
    assert result.exit_code == 2
    assert said in result.output
    assert len(result.output.splitlines()) == 1


def test_a_broken_image_is_named(tmp_path):
    path = tmp_path / "broken.png"
    Image.new("RGB", (40, 40), "red").save(path)
    path.write_bytes(path.read_bytes()[:60])
    result = run("--image", str(path))
    assert result.exit_code == 2
    assert "broken.png" in result.output


@pytest.mark.filterwarnings("ignore")  # what Inductor warns of while it loads is not ours
def test_compiled(tmp_path):
    result = run("--compile", "--steps", "2", "--size", "8", "--out", str(tmp_path / "tiny.png"))
    assert result.exit_code == 0, result.output
    assert "inside torch.compile" in result.output
    assert set(verdicts(result.output)) <= {"agrees", "bitwise equal"}
