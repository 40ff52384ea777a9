"""Fused models of the transformers library, in that library's own ways."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import retainops as ro
from tests.conftest import simulated
from tests.fusing.families import FAMILIES, SIZES, make, step

DECODERS = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "t5"]


@pytest.mark.parametrize("name", DECODERS)
def test_generate(name: str) -> None:
    model, inputs = make(name)
    model.eval()
    prompt = {k: v[:1, :4] for k, v in inputs.items() if k != "labels"}
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(**prompt, **options)
    ro.fuse(model)
    assert torch.equal(model.generate(**prompt, **options), expected)
    said = pytest.warns(RuntimeWarning, match="retain: every call of .* was without grad")
    with said, ro.retain(model):  # nothing has a gradient there, and nothing is asked for
        assert torch.equal(model.generate(**prompt, **options), expected)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if " " not in name])
def test_save_and_load(name: str, tmp_path: Path) -> None:
    model, inputs = make(name)
    model.eval()
    unfused = step(model, inputs)
    ro.fuse(model)
    ours = step(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = type(model).fused_from if hasattr(type(model), "fused_from") else type(model)
    assert loaded.__name__ in (tmp_path / "config.json").read_text()
    other = loaded.from_pretrained(tmp_path).eval()
    again = step(other, inputs)
    assert all(torch.equal(again[what], unfused[what]) for what in unfused)
    ro.fuse(other)
    again = step(other, inputs)
    assert all(torch.equal(again[what], ours[what]) for what in ours)


@pytest.mark.parametrize("name", ["llama", "t5", "vit"])
def test_outputs_of_layers_and_checkpoints(name: str) -> None:
    """What the library records by hooks; and layers that run once more in backward."""
    model, inputs = make(name)
    more = {"output_hidden_states": True}
    model.eval()
    before = model(**inputs, **more)
    model.train()
    expected = step(model, inputs)
    ro.fuse(model)
    model.eval()
    after = model(**inputs, **more)
    for key in ("hidden_states", "encoder_hidden_states", "decoder_hidden_states"):
        for a, b in zip(getattr(after, key, None) or (), getattr(before, key, None) or (), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    model.train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # its name before
    with ro.retain(model, "*") as kept:
        ours = step(model, inputs)
    for what in expected:
        torch.testing.assert_close(ours[what], expected[what], rtol=1e-4, atol=1e-4)
    assert all(slot.grad is not None for slot in kept.values())


LOSSES: dict[str, dict[str, Any]] = {
    "mean": {},
    "items": {"num_items_in_batch": 7},
    "items in a tensor": {"num_items_in_batch": torch.tensor(7)},
    "labels shifted already": {"shift_labels": torch.tensor([[4, 5, -100], [1, 0, 9]])},
    "another ignore_index": {"ignore_index": 5},
}


@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_loss(options: dict[str, Any], dtype: torch.dtype) -> None:
    model, _ = make("llama")
    theirs = model.loss_function
    ro.fuse(model)
    logits = torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(4)).to(dtype)
    labels = torch.tensor([[1, 4, 5], [7, 5, options.get("ignore_index", -100)]])
    results = []
    for function in (theirs, model.loss_function):
        leaf = logits.clone().requires_grad_()
        loss = function(logits=leaf, labels=labels, vocab_size=11, **options)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    assert results[1][0].dtype == results[0][0].dtype == torch.float32
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=4 * torch.finfo(dtype).eps, atol=1e-7)


def test_points_of_the_loss_keep_the_batch_apart() -> None:
    """transformers' own loss flattens it, and a norm of a row would pass for one of a sample."""
    model, inputs = make("llama")
    logits = model(**inputs).logits
    logits.retain_grad()
    model.loss_function(logits=logits, labels=inputs["labels"], vocab_size=model.config.vocab_size).backward()
    ro.fuse(model)
    with ro.retain(model, "lm_loss.*", ro.Stats("l2", over="rows", grad=True)) as kept:
        model(**inputs).loss.backward()
    assert kept["lm_loss.logits"].shape == kept["lm_loss.p"].shape == logits.shape
    torch.testing.assert_close(kept["lm_loss.logits"].grad, logits.grad)
    torch.testing.assert_close(ro.per_sample_norms(kept)["lm_loss.logits"], logits.grad.flatten(1).norm(dim=1))


def test_a_loss_of_flattened_labels_is_the_same() -> None:
    model, inputs = make("llama")
    shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    model.eval()
    expected = model(**inputs).loss
    ro.fuse(model)
    for labels in (shifted, shifted.flatten()):
        with ro.retain(model, "lm_loss.logits") as kept:
            torch.testing.assert_close(model(**inputs, shift_labels=labels).loss, expected)
        assert kept["lm_loss.logits"].shape[:-1] == labels.shape


def test_a_loss_of_the_users_stays() -> None:
    def mine(logits: torch.Tensor, **_: Any) -> torch.Tensor:
        return logits.square().sum()

    model, inputs = make("llama")
    model.loss_function = mine
    table = ro.fuse(model)
    assert [row.why for row in table.left] == ["its loss_function, mine, is not that of a language model"]
    ro.unfuse(model)
    assert model.loss_function is mine

    model, inputs = make("llama")
    function = model.loss_function
    ro.fuse(model)
    model.loss_function = mine  # later
    assert model(**inputs).loss > 100
    ro.unfuse(model)
    assert model.loss_function is mine
    del model._loss_function
    model.loss_function = function  # set, and the library's own
    ro.fuse(model)
    assert model.lm_loss is copy.deepcopy(model).train() or "lm_loss.p" in ro.points(copy.deepcopy(model))
    ro.unfuse(model)
    assert vars(model)["_loss_function"] is function


def test_a_function_of_rope_that_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    def other(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return q * cos.unsqueeze(1), k * sin.unsqueeze(1)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", other)
    model, inputs = make("llama")
    expected = step(model, inputs)
    assert {row.why for row in ro.fuse(model).left} == {"rope: its apply_rotary_pos_emb is not that of rope"}
    torch.testing.assert_close(step(model, inputs)["loss"], expected["loss"])


def test_compiled_as_one_graph() -> None:
    model, inputs = make("llama")
    model.model.layers = nn.ModuleList(model.model.layers[:1])
    model.eval()
    expected = step(model, inputs)
    ro.fuse(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with ro.retain(compiled, "*", ro.Stats("l2")) as kept:
        ours = step(compiled, inputs)
    for what, value in ours.items():
        torch.testing.assert_close(value, expected[what.removeprefix("_orig_mod.")], rtol=1e-4, atol=1e-5)
    with ro.retain(model, "*", ro.Stats("l2")) as eager:
        step(model, inputs)
    for what, slot in eager.items():
        torch.testing.assert_close(kept[what].l2, slot.l2, rtol=1e-4, atol=1e-6, msg=what)


def test_on_the_kernels(request: pytest.FixtureRequest) -> None:
    model, inputs = make("llama")
    model.model.layers = nn.ModuleList(model.model.layers[:1])
    expected = step(model, inputs)
    ro.fuse(model)
    if torch.cuda.is_available():
        moved = {k: v.cuda() for k, v in inputs.items()}
        ours = {k: v.cpu() for k, v in step(model.cuda(), moved).items()}
    else:
        with simulated(request), ro.backend("triton"):
            ours = step(model, inputs)
    for what in expected:
        torch.testing.assert_close(ours[what], expected[what], rtol=1e-3, atol=1e-5, msg=what)


OTHERS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},  # experts in a loop
    "Cohere": {},  # layer norm out of its parts, and rope of pairs side by side
    "Glm": {},  # rope of a part of each head, pairs side by side
    "Olmo2": {},  # norms after attention and MLP
    "Phi": {},  # one norm for both, and rope of a part
    "StableLm": {},
    "Granite": {"residual_multiplier": 0.5},
    "Starcoder2": {},
}
"""Families that no rule was written for."""


@pytest.mark.parametrize("name", OTHERS)
def test_other_families(name: str) -> None:
    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(**SIZES, **OTHERS[name])
    model, inputs = getattr(transformers, f"{name}ForCausalLM")(config), FAMILIES["llama"].inputs()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    before = step(model, inputs)
    assert len(ro.fuse(model).replaced) > 2
    with ro.retain(model, "*", ro.Stats("l2")) as kept:
        after = step(model, inputs)
    top = max(value.abs().max().item() for value in before.values())
    for what, value in before.items():
        bound = 3e-6 * (value.abs().max().item() + 1e-3 * top)
        torch.testing.assert_close(after[what], value, rtol=0, atol=bound, msg=what)
    assert all(slot.l2 > 0 for slot in kept.values())
    ro.unfuse(model)
    assert all(torch.equal(value, before[what]) for what, value in step(model, inputs).items())


COMPARING: dict[str, dict[str, Any]] = {
    "DeepseekV32": {
        "num_key_value_heads": 4,
        "head_dim": None,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 24,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_topk": 4,
    },
    "Gemma4": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 67,
    },
}


@pytest.mark.parametrize("name", COMPARING)
def test_attention_that_is_another_under_another_name(name: str) -> None:
    """DeepSeek's chooses keys for a kernel there, and Gemma's drops queries that causality then counts wrongly."""
    if name == "Gemma4" and transformers.__version__ < "5.24":
        pytest.skip("its code compares no name there")
    torch.manual_seed(3)
    config = "Gemma4TextConfig" if name == "Gemma4" else f"{name}Config"
    options = {k: v for k, v in {**SIZES, **COMPARING[name]}.items() if v is not None}
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, config)(**options)).eval()
    tokens = torch.randint(3, 67, (2, 9))
    expected = model(tokens, logits_to_keep=3).logits
    why = [row.why for row in ro.fuse(model).left if row.name == ""]
    asks = {"DeepseekV32": "DeepseekV32Attention", "Gemma4": "Gemma4TextModel"}[name]
    assert why == [f"the code of {asks} compares its attention's name with sdpa and would find another"]
    torch.testing.assert_close(model(tokens, logits_to_keep=3).logits, expected)
    ro.unfuse(model)
    assert torch.equal(model(tokens, logits_to_keep=3).logits, expected)


@pytest.mark.parametrize("interleave", [True, False])
def test_rope_of_a_function_chosen_by_the_configuration(interleave: bool) -> None:
    """DeepSeek-V3's forward calls one of two. A point where it calls the other one would stay None."""
    index = ("index_n_heads", "index_head_dim", "index_topk")
    options = {**SIZES, **{k: v for k, v in COMPARING["DeepseekV32"].items() if k not in index}}
    config = transformers.DeepseekV3Config(**options, rope_interleave=interleave, n_shared_experts=1)
    model = transformers.DeepseekV3ForCausalLM(config)
    table = ro.fuse(model, rules=["rope"])
    assert [row.op for row in table.replaced] == ([] if interleave else ["rope"] * 2)
    if interleave:
        why = "rope: its configuration has rope_interleave, and it calls apply_rotary_pos_emb_interleave then"
        assert [row.why for row in table.left] == [why] * 2
    else:
        with ro.retain(model, "*", ro.Stats("l2")) as kept:
            model(torch.randint(3, 67, (2, 9))).logits.square().sum().backward()
        assert all(slot.l2 > 0 for slot in kept.values())


def test_parts_of_a_model_whose_attention_differs() -> None:
    """The eager one stays, though the whole model's is sdpa: rows that see no key are another matter there."""
    text = {**SIZES, "num_key_value_heads": 4}
    vision = {k: text[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text),
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=16, patch_size=8),
        image_token_index=66,
        vision_feature_select_strategy="full",
    )
    torch.manual_seed(3)
    chosen = {"text_config": "eager", "vision_config": "sdpa"}
    model = transformers.LlavaForConditionalGeneration._from_config(config, attn_implementation=chosen).eval()
    tokens = torch.randint(3, 66, (2, 9))
    tokens[:, 3:8] = 66  # a patch each, and one for the class
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0  # rows that see no key
    inputs = {"input_ids": tokens, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 16, 16)}
    expected = model(**inputs).logits
    table = ro.fuse(model)
    why = {row.name: row.why for row in table.left}
    assert why[""] == "that of model.language_model is eager, and all of a model's attention is exchanged at once"
    assert why["model.language_model"].startswith("eager attention treats rows that see no key in its own way")
    assert ("model.vision_tower", "attention") in {(row.name, row.op) for row in table.replaced}
    torch.testing.assert_close(model(**inputs).logits, expected)
    ro.unfuse(model)
    assert torch.equal(model(**inputs).logits, expected)


def test_what_is_said_of_attention_that_is_left() -> None:
    """Whisper's is called through the registry, and its class has no word about other implementations of it."""
    small = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(**{k: v for k, v in SIZES.items() if "size" not in k}, vocab_size=67, **small)
    model = transformers.WhisperModel(config)
    why = {row.why for row in ro.fuse(model).left}
    assert "its class does not say that any attention will do; if so, set_attn_implementation('retainops')" in why
    model.set_attn_implementation("retainops")
    assert "encoder.layers.0.self_attn.p" in ro.points(model)
    config = transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=67)
    why = {row.why for row in ro.fuse(transformers.BloomModel(config)).left}
    assert "its attention is not called through transformers' registry" in why
