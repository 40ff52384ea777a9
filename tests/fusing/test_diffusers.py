"""Models of diffusers, whose attention is called by processors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import retainops as ro
from tests.fusing.families import step
from tests.fusing.test_attention import assert_points_are_eagers
from tests.fusing.test_families import scales

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
dispatch_attention_fn = pytest.importorskip("diffusers.models.attention_dispatch").dispatch_attention_fn
Tensor = torch.Tensor


class Sample(nn.Module):
    """A model of diffusers with what it is called with; what it returns is the tensor."""

    def __init__(self, model: nn.Module, **inputs: Any) -> None:
        super().__init__()
        self.model, self.inputs = model, inputs

    def forward(self) -> Tensor:
        dtype = next(self.model.parameters()).dtype
        moved = {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.inputs.items()}
        sample: Tensor = self.model(**moved).sample
        return sample


def unet() -> Sample:
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    return Sample(
        model,
        sample=torch.randn(2, 4, 8, 8),
        timestep=torch.tensor([3, 5]),
        encoder_hidden_states=torch.randn(2, 7, 16),
    )


def dit() -> Sample:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=8, norm_num_groups=None
    )
    labels = torch.tensor([1, 2])
    return Sample(model, hidden_states=torch.randn(2, 4, 8, 8), timestep=labels, class_labels=labels)


def vae() -> Sample:
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    return Sample(model, sample=torch.randn(1, 3, 8, 8))


def sd3() -> Sample:
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
    )
    return Sample(
        model,
        hidden_states=torch.randn(2, 4, 8, 8),
        encoder_hidden_states=torch.randn(2, 6, 16),
        pooled_projections=torch.randn(2, 16),
        timestep=torch.tensor([1, 2]),
    )


def flux() -> Sample:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    return Sample(
        model,
        hidden_states=torch.randn(1, 9, 4),
        encoder_hidden_states=torch.randn(1, 6, 16),
        pooled_projections=torch.randn(1, 16),
        timestep=torch.tensor([1.0]),
        img_ids=torch.randint(3, (9, 3)),
        txt_ids=torch.zeros(6, 3),
    )


def wan() -> Sample:
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return Sample(
        model,
        hidden_states=torch.randn(1, 4, 2, 8, 8),
        encoder_hidden_states=torch.randn(1, 6, 16),
        timestep=torch.tensor([1]),
    )


class Model(NamedTuple):
    """How to build it, how many attention modules are in it, whether they are called in the order of names, and how
    much its results may differ in float64."""

    build: Callable[[], Sample]
    attentions: int
    in_order: bool = True
    error: float = 1e-11


MODELS = {
    "unet": Model(unet, 8, False),
    "dit": Model(dit, 2),
    "vae": Model(vae, 2),
    "sd3": Model(sd3, 2),
    "flux": Model(flux, 2),
    "wan": Model(wan, 4, error=1e-5),  # its norms compute in float32 always
}
over_models = pytest.mark.parametrize("name", MODELS)
in_order = pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.in_order])


def made(name: str, seed: int = 3) -> Sample:
    torch.manual_seed(seed)
    return MODELS[name].build().train()


def attention_points(model: nn.Module) -> list[str]:
    return [name for name in ro.points(model) if name.rpartition(".")[2] in ("s", "p", "o")]


@over_models
def test_fused_is_unfused(name: str) -> None:
    model = made(name).double()  # where rounding is far below any error
    before, keys = step(model, {}), list(model.state_dict())
    table = ro.fuse(model)
    ops = [row.op for row in table.replaced]
    assert ops.count("attention_processor(processor)") == MODELS[name].attentions
    assert len(attention_points(model)) == 3 * MODELS[name].attentions
    assert list(model.state_dict()) == keys
    after = step(model, {})
    assert list(after) == list(before)
    for what, scale in scales(before).items():
        torch.testing.assert_close(after[what], before[what], rtol=0, atol=MODELS[name].error * scale, msg=what)
    ro.unfuse(model)
    again = step(model, {})
    assert all(torch.equal(again[what], before[what]) for what in before)


@in_order
def test_the_points_are_eagers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = made(name).eval(), MODELS[name].attentions
    assert_points_are_eagers(model, lambda: model().square().sum(), monkeypatch, calls)


@over_models
def test_asking_changes_nothing_and_all_is_answered(name: str) -> None:
    model = made(name)
    ro.fuse(model)
    plain = step(model, {})
    with ro.retain(model) as kept:
        asked = step(model, {})
    assert all(torch.equal(asked[what], plain[what]) for what in plain)
    assert {point for point in attention_points(model) if kept[point].grad is None} == set()


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_compiled(name: str) -> None:
    torch._dynamo.reset()
    model = made(name)
    ro.fuse(model)
    points = attention_points(model)
    with ro.retain(model, points) as eager:
        step(model, {})
    compiled = torch.compile(model, backend="aot_eager")
    with ro.retain(compiled, points) as kept:
        step(compiled, {})
    for point in points:
        torch.testing.assert_close(kept[point].grad, eager[point].grad)


def test_an_older_unet_makes_its_scores_itself() -> None:
    model = unet()
    model.model.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    left = {row.why for row in ro.fuse(model).left}
    why = "AttnProcessor makes the probabilities itself; diffusers' AttnProcessor2_0 calls attention"
    assert f"attention_processor(processor): {why}" in left
    ro.unfuse(model)
    model.model.set_attn_processor(diffusers.models.attention_processor.AttnProcessor2_0())
    ro.fuse(model)
    assert len(attention_points(model)) == 24


def test_another_backend() -> None:
    model = made("wan")
    ro.fuse(model)
    expected = model()
    model.model.set_attention_backend("_native_math")
    torch.testing.assert_close(model(), expected)  # nothing is asked: whatever was chosen computes it
    said = r"WanAttention: points of its attention are asked for, and it is that of the backend .*_native_math"
    with ro.retain(model, "model.blocks.0.attn1.p"), pytest.raises(RuntimeError, match=said):
        model()
    model.model.set_attention_backend("native")
    with ro.retain(model, "model.blocks.0.attn1.p") as kept:
        model().sum().backward()
    assert kept["model.blocks.0.attn1.p"].grad.shape == (1, 2, 32, 32)
    model.model.reset_attention_backend()
    chosen, said = diffusers.attention_backend("_native_math"), pytest.raises(RuntimeError, match="_native_math")
    with chosen, ro.retain(model, "model.blocks.0.attn1.p"), said:
        model()


class Keys(nn.Module):
    """A module that calls the function itself, with a mask of its keys, (batch, keys)."""

    def __init__(self, mask: Tensor | None) -> None:
        super().__init__()
        self.proj, self.mask = nn.Linear(8, 24), mask

    def forward(self, x: Tensor, **named: Any) -> Tensor:
        q, k, v = self.proj(x).unflatten(-1, (3, 2, 4)).unbind(2)
        out: Tensor = dispatch_attention_fn(q, k, v, attn_mask=self.mask, **named)
        return out


@pytest.mark.parametrize(
    "mask",
    [None, torch.tensor([[True] * 5, [True] * 3 + [False] * 2]), torch.randn(2, 1, 5, 5), torch.randn(5, 5)],
    ids=lambda mask: str(None if mask is None else (mask.dtype, *mask.shape)),
)
@pytest.mark.parametrize("named", [{}, {"scale": 0.3, "is_causal": False}, {"backend": "native"}], ids=str)
def test_a_module_that_dispatches(mask: Tensor | None, named: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Keys(mask), torch.randn(2, 5, 8)
    assert_points_are_eagers(model, lambda: model(x, **named).square().sum(), monkeypatch, calls=1)


def test_generating_without_grad_says_so() -> None:
    model = made("wan")
    ro.fuse(model)
    with pytest.warns(RuntimeWarning, match="without grad"), torch.no_grad(), ro.retain(model, "*.attn1.p"):
        model()
