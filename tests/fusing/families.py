"""Small models of every family that `ro.fuse` is for, with random weights, and inputs for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from tests.no_torchvision import import_timm

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 67,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Family(NamedTuple):
    """How to build a model, what it is called with, and which ops are to be in it, how often."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    ops: dict[str, int]


def _hf(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**options))

    return build


def _decoder(name: str, **options: Any) -> Callable[[], nn.Module]:
    return _hf(f"{name}ForCausalLM", f"{name}Config", **{**SIZES, **options})


def tokens() -> dict[str, Any]:
    ids = torch.randint(3, 67, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}


def sequences() -> dict[str, Any]:
    return {**tokens(), "labels": torch.randint(3, 67, (2, 5))}


def image(name: str, **more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {name: torch.randn(2, 3, 32, 32), **{k: v() for k, v in more.items()}}


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return import_timm().create_model(name, pretrained=False, num_classes=5, **options)

    return build


def _encoder(**options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.1, batch_first=True, **options)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    return build


def _source() -> dict[str, Any]:
    return {"src": torch.randn(2, 7, 32)}


LLAMA_LIKE = {"cross_entropy": 1, "attention": 1, "add_norm": 2, "rope": 2, "gated": 2, "rms_norm": 5}
ENCODER = {"layer_norm": 4, "add_norm": 4, "bias_act": 2, "attention": 2}
FAMILIES: dict[str, Family] = {
    "llama": Family(_decoder("Llama"), tokens, LLAMA_LIKE),
    "mistral": Family(_decoder("Mistral"), tokens, LLAMA_LIKE),
    "qwen2": Family(_decoder("Qwen2"), tokens, LLAMA_LIKE),
    "qwen3": Family(_decoder("Qwen3", tie_word_embeddings=True), tokens, {**LLAMA_LIKE, "rms_norm": 9}),
    "gemma2": Family(  # its attention is eager, which stays
        _decoder("Gemma2", query_pre_attn_scalar=8),
        tokens,
        {"cross_entropy": 1, "add_norm": 2, "rope": 2, "gated": 2, "rms_norm": 9},
    ),
    "gemma3": Family(
        _hf("Gemma3ForCausalLM", "Gemma3TextConfig", **SIZES, query_pre_attn_scalar=8),
        tokens,
        {**LLAMA_LIKE, "rms_norm": 13},
    ),
    "phi3": Family(_decoder("Phi3", resid_pdrop=0.1), tokens, LLAMA_LIKE),
    "gpt2": Family(
        _hf("GPT2LMHeadModel", "GPT2Config", n_embd=32, n_layer=2, n_head=4, vocab_size=67, n_positions=64),
        tokens,
        {"cross_entropy": 1, "attention": 1, "layer_norm": 5, "add_norm": 2, "bias_act": 2},
    ),
    "bert": Family(
        _hf("BertForMaskedLM", "BertConfig", **{k: v for k, v in SIZES.items() if k != "head_dim"}),
        tokens,
        {"attention": 1, "layer_norm": 6, "add_norm": 5, "bias_act": 3, "loss": 1},
    ),
    "vit": Family(
        _hf(
            "ViTForImageClassification",
            "ViTConfig",
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
            hidden_dropout_prob=0.1,
        ),
        image("pixel_values", labels=lambda: torch.tensor([0, 1])),
        {"attention": 1, "layer_norm": 5, "add_norm": 2, "bias_act": 2},
    ),
    "t5": Family(
        _hf(
            "T5ForConditionalGeneration",
            "T5Config",
            d_model=32,
            d_ff=48,
            d_kv=8,
            num_layers=2,
            num_heads=4,
            vocab_size=67,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
        ),
        sequences,
        {"rms_norm": 12, "gated": 4, "loss": 1},
    ),
    "timm vit": Family(
        _timm(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, proj_drop_rate=0.1
        ),
        image("x"),
        {"layer_norm": 5, "add_norm": 2, "bias_act": 2, "sdpa": 2},
    ),
    "timm convnext": Family(
        _timm("convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), drop_path_rate=0.1),
        image("x"),
        {"layer_norm": 9, "bias_act": 4},
    ),
    "timm convnext, convolutional": Family(
        _timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)),
        image("x"),
        {"layer_norm": 9},
    ),
    "torch encoder": Family(_encoder(activation="gelu"), _source, ENCODER),
    "torch encoder, norm first": Family(_encoder(norm_first=True), _source, ENCODER),
}
"""Of every family, a model small enough for a test."""


def make(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Any]]:
    """A model of a family with weights that leave nothing at its initial 0 or 1, and its inputs."""
    torch.manual_seed(3)
    family = FAMILIES[name]
    model = family.build()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    inputs = family.inputs()
    moved = {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    return model.to(dtype).train(), moved


def step(model: nn.Module, inputs: dict[str, Any], seed: int = 5) -> dict[str, torch.Tensor]:
    """Outputs, and the gradients of the loss plus a random projection of the logits, of one step with dropout."""
    torch.manual_seed(seed)
    model.zero_grad()
    out = model(**inputs)
    logits = out if isinstance(out, torch.Tensor) else out.logits
    generator = torch.Generator().manual_seed(9)
    slope = torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits) / logits.shape[-1]
    loss = (logits * slope).float().sum()
    results = {"logits": logits.detach()}
    if getattr(out, "loss", None) is not None:
        results["loss"] = out.loss.detach()
        loss = loss + out.loss
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**results, **copy.copy(grads)}
