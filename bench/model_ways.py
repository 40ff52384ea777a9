"""The ways in which `bench.model_step` makes a step: each has a copy of one LLaMA, which shares its weights.

A way is prepared from a `LlamaForCausalLM` and gives a step: a function of tokens that runs forward, loss and backward,
and returns the loss and, where gradients are read, the read statistics.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import retainops as ro

Tensor = torch.Tensor
Readings = dict[str, dict[str, float]]
Step = Callable[[Tensor], "tuple[Tensor, Readings | None]"]
STATS = ("l2", "nonfinite")
READ = {
    "mlp.act": ("mlp.act_fn", "output"),
    "self_attn.o": ("self_attn.o_proj", "input"),
    "post_attention_layernorm.summed": ("post_attention_layernorm", "input"),
}
"""The points read, three a layer; and where eager code has the same tensor: a module, and which side of it."""


class Way(NamedTuple):
    """A way to make a step.

    Attributes:
        what: in words, for the table's reader.
        prepare: from a model of its own to the step.
        compiles: by torch.compile: it takes a minute or more before its first step ends.
    """

    what: str
    prepare: Callable[[Any], Step]
    compiles: bool = False


def sharing(model: Any) -> Any:
    """A copy of a model that has the same parameters, not copies of them: a way may patch it as it likes."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def llama(sizes: dict[str, Any], device: str) -> Any:
    """A LLaMA of Llama-3.2-1B's proportions, with random weights, in training mode.

    RoPE's scaling for long contexts is left out: it changes the angles, and nothing that takes time.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(sizes["hidden"] // 64, 4)
    config = LlamaConfig(
        vocab_size=sizes["vocabulary"],
        hidden_size=sizes["hidden"],
        intermediate_size=4 * sizes["hidden"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        max_position_embeddings=max(sizes["tokens"], 2048),
        tie_word_embeddings=True,
        use_cache=False,  # a cache of keys and values is no part of training
        attn_implementation="sdpa",
    )
    before = torch.get_default_dtype()
    # Made in its dtype: `.to(bfloat16)` would take RoPE's frequencies along, which stay float32 in training.
    torch.set_default_dtype(getattr(torch, sizes["dtype"]))
    try:
        with torch.device(device):  # initialising a billion weights takes a slow CPU minutes
            return LlamaForCausalLM(config).train()
    finally:
        torch.set_default_dtype(before)


def by_labels(model: Any) -> Step:
    """The loss as transformers makes it: of all logits, which are in memory."""

    def step(tokens: Tensor) -> tuple[Tensor, None]:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return loss.detach(), None

    return step


def by_blocks(model: Any) -> Step:
    """The loss by `ro.linear_cross_entropy`, which never holds all logits: the layers are called, and then it."""

    def step(tokens: Tensor) -> tuple[Tensor, None]:
        hidden = model.model(input_ids=tokens).last_hidden_state
        loss = ro.linear_cross_entropy(hidden[:, :-1], model.lm_head.weight, tokens[:, 1:])
        loss.backward()
        return loss.detach(), None

    return step


def fused(model: Any, then: Callable[[Any], Step] = by_labels) -> Step:
    ro.fuse(model)
    return then(model)


def watched(model: Any, reads: bool) -> Step:
    """Fused, and watched: each step is read, or none is, as between two that are."""
    run = fused(model)
    every, start = (1, 0) if reads else (2**30, 1)
    watcher = ro.watch(model, [f"*.{point}" for point in READ], ro.Stats(*STATS), every=every, start=start)

    def step(tokens: Tensor) -> tuple[Tensor, Readings | None]:
        loss, _ = run(tokens)
        watcher.step()
        return loss, watcher.latest[1] if watcher.latest else None  # type: ignore[return-value]

    return step


def eager_read(model: Any, whole: bool) -> Step:
    """Eager, and the same statistics of the same gradients by what PyTorch has.

    Args:
        whole: `retain_grad()`, and the statistics after backward. Otherwise hooks on the tensors, which take them
            during backward, so that a gradient may go: less memory, and more for the user to write.
    """
    kept: dict[str, Tensor] = {}
    taken: dict[str, Tensor] = {}

    def take(name: str, grad: Tensor) -> None:
        l2, bad = torch.linalg.vector_norm(grad, dtype=torch.float32), grad.isfinite().logical_not().sum()
        taken[name] = torch.stack([l2, bad.float()])

    def seen(name: str, side: str, _module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        kept[name] = output if side == "output" else args[0]
        kept[name].retain_grad() if whole else kept.pop(name).register_hook(functools.partial(take, name))

    for i, layer in enumerate(model.model.layers):
        for point, (module, side) in READ.items():
            name = f"model.layers.{i}.{point}"
            layer.get_submodule(module).register_forward_hook(functools.partial(seen, name, side))
    run = by_labels(model)

    def step(tokens: Tensor) -> tuple[Tensor, Readings]:
        loss, _ = run(tokens)
        for name, tensor in kept.items():
            assert tensor.grad is not None
            take(name, tensor.grad)
        rows = torch.stack(list(taken.values())).tolist()  # the one wait for the device
        readings = {name: dict(zip(STATS, row, strict=True)) for name, row in zip(taken, rows, strict=True)}
        kept.clear()
        taken.clear()
        return loss, readings

    return step


def liger(model: Any, in_blocks: bool) -> Step:
    """By Liger-Kernel, with its linear cross entropy (its default), or with its cross entropy of logits in memory."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from transformers.models.llama import modeling_llama

    places = [(modeling_llama, name) for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")]
    places.append((F, "cross_entropy"))
    run = by_labels(model)
    with _restored(places):
        apply_liger_kernel_to_llama(
            rope=True,
            rms_norm=True,
            swiglu=True,
            cross_entropy=not in_blocks,
            fused_linear_cross_entropy=in_blocks,
            model=model,
        )
        its = [getattr(module, name) for module, name in places]

    def step(tokens: Tensor) -> tuple[Tensor, Readings | None]:
        with _restored(places):  # it patches modules that all ways use, so only while it runs
            for (module, name), value in zip(places, its, strict=True):
                setattr(module, name, value)
            return run(tokens)

    return step


@contextlib.contextmanager
def _restored(places: list[tuple[Any, str]]) -> Iterator[None]:
    """After it, these attributes are what they were before."""
    before = [getattr(module, name) for module, name in places]
    try:
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)


def compiled(model: Any, fuse: bool) -> Step:
    """By torch.compile in its default mode, as one model, its loss included."""
    if fuse:
        ro.fuse(model)
    return by_labels(torch.compile(model, dynamic=False))


EAGER = "eager"
WAYS = {
    EAGER: Way("transformers as it comes, attention by sdpa, the loss of all logits", by_labels),
    "eager, blocks": Way("eager layers, the loss by ro.linear_cross_entropy", by_blocks),
    "eager, retain_grad": Way(
        "eager; the points' gradients kept, then l2 and nonfinite of each", lambda m: eager_read(m, True)
    ),
    "eager, hooks": Way("eager; l2 and nonfinite in hooks on the points' tensors", lambda m: eager_read(m, False)),
    "fuse": Way("ro.fuse(model): norms, sums, RoPE, MLP, attention, the loss of all logits", fused),
    "fuse, blocks": Way(
        "ro.fuse(model), the loss by ro.linear_cross_entropy", functools.partial(fused, then=by_blocks)
    ),
    "fuse, watched, between": Way("fuse and ro.watch, a step between two that are read", lambda m: watched(m, False)),
    "fuse, watched, read": Way(
        "fuse and ro.watch, a step in which l2 and nonfinite are read", lambda m: watched(m, True)
    ),
    "Liger": Way("Liger-Kernel: norms, RoPE, MLP, its cross entropy of all logits", lambda m: liger(m, False)),
    "Liger, blocks": Way("Liger-Kernel as it comes: its linear cross entropy", lambda m: liger(m, True)),
    "compile": Way("torch.compile(model), default mode", lambda m: compiled(m, False), True),
    "fuse, compile": Way("torch.compile of the model after ro.fuse", lambda m: compiled(m, True), True),
}
