"""The example that explains a vision transformer: its maps are what it says, and it draws them, of any model."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from torch import nn

import retainops as ro
from tests.no_torchvision import import_timm

EXAMPLE = Path(__file__).parent.parent / "examples" / "explain_vit.py"


@pytest.fixture(scope="module")
def example() -> SimpleNamespace:
    for name in ("matplotlib", "sklearn", "transformers"):
        pytest.importorskip(name, reason=f"the example needs {name}, which is not installed")
    return SimpleNamespace(**runpy.run_path(str(EXAMPLE)))


def size_of(picture: Path) -> int:
    return picture.stat().st_size


def test_it_trains_judges_and_draws(
    example: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example.main(steps=2, out=tmp_path / "picture.png")
    assert size_of(tmp_path / "picture.png") > 100_000
    printed = capsys.readouterr().out
    assert "the digit is named" in printed
    assert "25%" in printed  # by chance: 9 of 36 patches
    assert "picture.png" in printed.replace("\n", "")


def test_maps_are_the_formulas(example: SimpleNamespace) -> None:
    """P from PyTorch's weights, dP from the whole gradient; rolled and summed here, another way."""
    torch.manual_seed(0)
    model, grid = example.ViT().double(), example.GRID
    for w in model.parameters():
        nn.init.normal_(w, std=0.2)
    images = torch.rand(2, 3, example.SIDE, example.SIDE, dtype=torch.float64)
    logits, maps = example.explain(example.Subject(model, example.SIDE, grid), images)
    assert all(w.grad is None for w in model.parameters())

    weights: list[torch.Tensor] = []

    def weigh(module: Any, inputs: Any) -> None:
        weights.append(nn.MultiheadAttention.forward(module, *inputs, average_attn_weights=False)[1].detach())

    for block in model.blocks:
        block.attention.register_forward_pre_hook(weigh)
    with ro.retain(model, "*.p") as kept:
        again = model(images)
        torch.stack([row[row.argmax()] for row in again]).sum().backward()
    torch.testing.assert_close(logits, again.detach())
    for i in range(2):
        rolled, summed = torch.eye(1 + grid**2, dtype=torch.float64), 0
        for p, slot in zip(weights, kept.values(), strict=True):
            dp = slot.grad[i]
            a = sum((p[i, h] * dp[h]).clamp(min=0) for h in range(example.HEADS)) / example.HEADS
            rolled = rolled + a @ rolled
            summed = summed + dp.clamp(min=0).sum((0, 1)) / (example.HEADS * (1 + grid**2))
        torch.testing.assert_close(maps["chefer"][i].flatten(), rolled[0, 1:])
        torch.testing.assert_close(maps["legrad"][i].flatten(), summed[1:])


def test_digits_are_where_the_scene_says(example: SimpleNamespace) -> None:
    black = torch.zeros(3, 60, 80)
    scenes = example.Scenes([black], seed=1)
    for training in (True, False):
        images, digits, where = scenes.batch(20, training)
        lit = images.sum(1).unflatten(1, (example.GRID, -1)).unflatten(3, (example.GRID, -1)).sum((2, 4)) > 0
        assert not (lit & ~where).any()
        assert (lit & where).flatten(1).sum(1).min() >= 4
        assert set(digits.tolist()) <= set(range(10))
    large, _, where = scenes.placed(torch.zeros(4, 3, 6 * example.SIDE, 6 * example.SIDE), False)
    small = example.resized(large, example.SIDE)
    assert small[where.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None].expand_as(small)].mean() > 0.1


def test_a_model_of_transformers_and_an_image_file(example: SimpleNamespace, tmp_path: Path) -> None:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        id2label={0: "a cat, or so", 1: "a dog"},
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text(
        '{"image_mean": [0.4, 0.5, 0.6], "image_std": [1, 1, 1]}'
    )
    subject = example.pretrained(str(tmp_path / "model"))
    assert (subject.side, subject.grid, subject.name_of(0)) == (16, 4, "a cat")
    torch.testing.assert_close(subject.prepare(torch.full((1, 3, 1, 1), 0.5)).flatten(), torch.tensor([0.1, 0, -0.1]))
    rgb = example.Image.new("RGB", (40, 30), (200, 100, 0))
    rgb.save(tmp_path / "photograph.png")
    torch.testing.assert_close(example.read(tmp_path / "photograph.png")[:, 0, 0], torch.tensor([200, 100, 0]) / 255)
    example.main(model=str(tmp_path / "model"), image=tmp_path / "photograph.png", out=tmp_path / "picture.png")
    assert size_of(tmp_path / "picture.png") > 10_000


def test_the_attention_of_timm(example: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = import_timm()
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **sizes)
    images = torch.rand(3, 3, 32, 32)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: model)
    subject = example.from_timm("vit")
    assert (subject.side, subject.grid) == (32, 4)
    with torch.no_grad():
        expected = model(subject.prepare(images))
    logits, maps = example.explain(subject, images)
    torch.testing.assert_close(logits, expected)
    assert {name: relevance.shape for name, relevance in maps.items()} == dict.fromkeys(maps, (3, 4, 4))
    ro.unfuse(model)
    model.blocks[0].attn.fused_attn = False
    with pytest.raises(ValueError, match="its attention cannot be asked; VisionTransformer, fused:"):
        example.from_timm("vit")
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: nn.Identity())
    with pytest.raises(ValueError, match="Identity is no plain ViT; use one, such as vit_base_patch16_224"):
        example.from_timm("vit")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": Path("no.jpg")}, "no.jpg cannot be read as an image"),
        ({"image": EXAMPLE}, "explain_vit.py cannot be read as an image"),
        ({"out": Path("nowhere/picture.png")}, "there is no folder nowhere"),
        ({"out": Path("picture.xyz")}, "expected a name that ends in .png, .pdf or .svg"),
        ({"model": str(EXAMPLE.parent)}, "examples"),
    ],
)
def test_errors_are_messages(example: SimpleNamespace, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(typer.BadParameter, match=message):
        example.main(**arguments)
