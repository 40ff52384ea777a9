"""What the tests of `ro.fuse(model, outputs=...)` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.fusing.blocks import run

CHILDREN = ["norm1", "norm2", "norm3", "gate", "up", "down", "act", "gelu", "fc", "softmax"]


def retained_by_hooks(model: nn.Module, names: list[str], x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradients of what these modules return, by `retain_grad()`."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen[name] = output if isinstance(output, torch.Tensor) else output[0]
            seen[name].retain_grad()

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    run(model, x)
    for handle in handles:
        handle.remove()
    return {name: value.grad for name, value in seen.items()}


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))


class Returns(nn.Module):
    def __init__(self, made: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.made = made

    def forward(self, x: torch.Tensor) -> Any:
        return self.made(x * 2)
