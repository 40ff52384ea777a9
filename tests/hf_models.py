"""Tiny random models of Hugging Face transformers, their inputs, and what "eager" attention gives of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import nn

Tensor = torch.Tensor
VOCABULARY, WIDTH, LAYERS, HEADS, BATCH, LENGTH = 61, 32, 2, 4, 2, 7

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GROUPED = {**TEXT, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Family:
    """A model's class, its configuration, and the paths of its attention modules, in the order of `attentions`."""

    model: type[nn.Module]
    config: Any
    modules: str
    padding: str = "right"

    def paths(self) -> list[str]:
        return [self.modules.format(i) for i in range(LAYERS)]


FAMILIES = {
    "llama": Family(hf.LlamaForCausalLM, hf.LlamaConfig(**GROUPED), "model.layers.{}.self_attn"),
    "mistral": Family(
        hf.MistralForCausalLM, hf.MistralConfig(**GROUPED, sliding_window=3), "model.layers.{}.self_attn", "left"
    ),
    "gemma2": Family(
        hf.Gemma2ForCausalLM,
        hf.Gemma2Config(**GROUPED, head_dim=8, query_pre_attn_scalar=6, attn_logit_softcapping=2.0, sliding_window=3),
        "model.layers.{}.self_attn",
    ),
    "qwen2": Family(hf.Qwen2ForCausalLM, hf.Qwen2Config(**GROUPED), "model.layers.{}.self_attn", "left"),
    "bert": Family(hf.BertModel, hf.BertConfig(**TEXT), "encoder.layer.{}.attention.self"),
    "vit": Family(
        hf.ViTModel,
        hf.ViTConfig(
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            image_size=12,
            patch_size=4,
        ),
        "layers.{}.attention",
    ),
    "gpt2": Family(
        hf.GPT2LMHeadModel,
        hf.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            n_positions=64,
            bos_token_id=1,
            eos_token_id=2,
        ),
        "transformer.h.{}.attn",
    ),
}


def build(model: type[nn.Module], config: Any, backend: str = "eager") -> Any:
    """A model with weights large enough for attention to choose, in evaluation mode."""
    torch.manual_seed(0)
    made = model._from_config(config, attn_implementation=backend).eval()
    for w in made.parameters():
        if w.dim() > 1:
            nn.init.normal_(w, std=0.3)
    return made


def inputs(family: Family, padded: bool = True) -> dict[str, Tensor]:
    """Tokens, of which one sequence is padded; or pixels."""
    generator = torch.Generator().manual_seed(1)
    if family.model is hf.ViTModel:
        return {"pixel_values": torch.randn(BATCH, 3, 12, 12, generator=generator)}
    tokens = torch.randint(1, VOCABULARY, (BATCH, LENGTH), generator=generator)
    if not padded:
        return {"input_ids": tokens}
    seen = torch.ones_like(tokens)
    seen[0, slice(2) if family.padding == "left" else slice(-2, None)] = 0
    return {"input_ids": tokens * seen, "attention_mask": seen}


def projection(y: Tensor, given: dict[str, Tensor]) -> Tensor:
    """The gradient of a loss that is a random projection of the outputs, of padded tokens none.

    (Of a query that sees no key "eager" averages all values, and PyTorch's attention is 0.)
    """
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    seen = given.get("attention_mask")
    return dy if seen is None else dy * seen[..., None]


def grads_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters' gradients, which are then gone."""
    found = {name: w.grad for name, w in model.named_parameters() if w.grad is not None}
    model.zero_grad()
    return found


@dataclass
class Eager:
    """What "eager" gives: the first output, the parameters' gradients, and each layer's weights, with their .grad."""

    y: Tensor
    grads: dict[str, Tensor]
    weights: list[Tensor]


def eager(model: Any, given: dict[str, Tensor], dy: Tensor | None = None) -> Eager:
    """Run a model with "eager" attention, and leave it with what it had."""
    backend = model.config._attn_implementation
    model.set_attn_implementation("eager")
    out = model(**given, output_attentions=True)
    for w in out.attentions:
        w.retain_grad()
    out[0].backward(projection(out[0], given) if dy is None else dy)
    model.set_attn_implementation(backend)
    return Eager(out[0].detach(), grads_of(model), list(out.attentions))


def assert_close(found: Tensor | None, wanted: Tensor | None, what: str) -> None:
    """Within float32's rounding through a few layers, of the largest value there is.

    (Of 1, where that is less: the gradient of a bias of keys is 0 but for rounding.)
    """
    assert found is not None, what
    assert wanted is not None, what
    assert found.shape == wanted.shape, what
    error, size = (found - wanted).abs().max().item(), wanted.abs().max().item()
    assert error <= 2e-5 * max(size, 1.0), f"{what}: {error:.2e} of {size:.2e}"
