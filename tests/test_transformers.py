"""The attention backend for Hugging Face transformers, beside their "eager" and retain_grad()."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch

import retainops as ro

hf = pytest.importorskip("transformers", reason="its attention backend is tested, and it is not installed")

from retainops.integrations.transformers import NAME, REFUSED, attention_forward, register  # noqa: E402
from tests.hf_models import (  # noqa: E402
    BATCH,
    FAMILIES,
    GROUPED,
    HEADS,
    LENGTH,
    VOCABULARY,
    Family,
    assert_close,
    build,
    eager,
    grads_of,
    inputs,
    projection,
)

over_families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def made(name: str) -> tuple[Family, Any, dict[str, torch.Tensor]]:
    family = FAMILIES[name]
    return family, build(family.model, family.config, NAME), inputs(family)


def seen_tokens(y: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """1 for each token, 0 where it is padding.

    What a padded token holds is nobody's, and differs: a query that sees no key is 0 here, the mean of all values in
    "eager". So do the probabilities of such a query, and the gradients of those of such a key, which are times 0.
    """
    return given.get("attention_mask", torch.ones(y.shape[:2]))


@over_families
@pytest.mark.parametrize("padded", [True, False])
def test_outputs_gradients_and_dp_of_every_layer_are_eagers(family: Family, padded: bool) -> None:
    model, given = build(family.model, family.config, NAME), inputs(family, padded)
    want = eager(model, given)
    assert [name for name in ro.points(model) if name.endswith(".p")] == [f"{path}.p" for path in family.paths()]
    plain = model(**given)[0]
    with ro.retain(model, "*.p") as kept:
        out = model(**given)
        y = out[0]
        y.backward(projection(y, given))
    assert torch.equal(plain, y)
    assert not getattr(out, "attentions", None)
    seen = seen_tokens(y, given)
    assert_close(y * seen[..., None], want.y * seen[..., None], "outputs")
    for name, grad in grads_of(model).items():
        assert_close(grad, want.grads[name], name)
    for slot, w in zip(kept.values(), want.weights, strict=True):
        assert slot.grad.abs().max() > 0
        assert_close(slot.grad * seen[:, None, None], w.grad * seen[:, None, None], slot.name)


@over_families
def test_retain_grad_on_the_attentions_that_a_model_returns(family: Family) -> None:
    """As transformers' own test_retain_grad_hidden_states_attentions, which "eager" alone passes; and the values."""
    model, given = build(family.model, family.config, NAME), inputs(family)
    want = eager(model, given)
    with ro.retain(model, "*.p") as kept:
        out = model(**given, output_attentions=True, output_hidden_states=True)
        kept_first = [out.hidden_states[0], *out.attentions]
        for t in kept_first:
            t.retain_grad()
        out[0].backward(projection(out[0], given))
    assert out.hidden_states[0].grad is not None
    seen = seen_tokens(out[0], given)[:, None, None]
    for mine, theirs, slot in zip(out.attentions, want.weights, kept.values(), strict=True):
        assert_close(mine * seen.mT, theirs * seen.mT, "weights")
        assert_close(mine.grad * seen, theirs.grad * seen, "their gradient")
        assert torch.equal(slot.grad, mine.grad)


@over_families
def test_one_element_of_the_output(family: Family) -> None:
    """The loss of transformers' own test: backward of one number."""
    model, given = build(family.model, family.config, NAME), inputs(family, padded=False)
    out = model(**given, output_attentions=True, output_hidden_states=True)
    for t in (out.hidden_states[0], out.attentions[0]):
        t.retain_grad()
    out[0].flatten()[0].backward(retain_graph=True)
    assert out.hidden_states[0].grad is not None
    assert out.attentions[0].grad is not None


def test_relevance_of_every_layer() -> None:
    _, model, given = made("bert")
    want = eager(model, given)
    with ro.retain(model, "*.p", ro.Relevance("chefer", "legrad", "attn_grad")) as kept:
        y = model(**given)[0]
        y.backward(projection(y, given))
    for slot, w in zip(kept.values(), want.weights, strict=True):
        assert slot.grad is None
        assert_close(slot.chefer, (w * w.grad).relu().mean(1).detach(), "chefer")
        assert_close(slot.attn_grad, (w * w.grad).mean(1).detach(), "attn_grad")
        assert_close(slot.legrad, w.grad.relu().mean((1, 2)), "legrad")


def test_parts_and_statistics_of_chosen_layers() -> None:
    _, model, given = made("llama")
    want = eager(model, given)
    wants = {"*.1.self_attn.p": ro.Part(heads=[3, 0], queries=-1), "*.0.self_attn.p": ro.Stats("l2", over="heads")}
    with ro.retain(model, wants) as kept:
        y = model(**given)[0]
        y.backward(projection(y, given))
    first, second = want.weights
    assert_close(kept["model.layers.0.self_attn.p"].l2, first.grad.norm(dim=(-2, -1)), "l2")
    assert_close(kept["model.layers.1.self_attn.p"].grad, second.grad[:, [3, 0], -1:], "part")


@pytest.mark.parametrize("cross", [False, True])
def test_t5_with_its_position_bias(cross: bool) -> None:
    config = hf.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=HEADS, decoder_start_token_id=0
    )
    model = build(hf.T5ForConditionalGeneration, config, NAME)
    given = inputs(FAMILIES["qwen2"])
    given["decoder_input_ids"] = torch.arange(1, 11).view(2, 5)
    dy = torch.randn(2, 5, VOCABULARY, generator=torch.Generator().manual_seed(2))
    model.set_attn_implementation("eager")
    out = model(**given, output_attentions=True)
    attentions = out.cross_attentions if cross else out.decoder_attentions + out.encoder_attentions
    for w in attentions:
        w.retain_grad()
    out.logits.backward(dy)
    want = grads_of(model)
    assert "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight" in want
    model.set_attn_implementation(NAME)
    pattern = "decoder.*.EncDecAttention.p" if cross else ["decoder.*.SelfAttention.p", "encoder.*.SelfAttention.p"]
    with ro.retain(model, pattern) as kept:
        y = model(**given).logits
        y.backward(dy)
    assert_close(y, out.logits, "logits")
    for name, grad in grads_of(model).items():
        assert_close(grad, want[name], name)
    in_order = sorted(kept.items(), key=lambda item: item[0].startswith("encoder"))
    for (name, slot), w in zip(in_order, attentions, strict=True):
        assert_close(slot.grad, w.grad, name)


def test_dropout_in_training() -> None:
    """The weights that a model returns are after dropout, as eager's; the point p is before it."""
    config = hf.BertConfig(**{**FAMILIES["bert"].config.to_dict(), "attention_probs_dropout_prob": 0.5})
    config.hidden_dropout_prob = 0.0
    model = build(hf.BertModel, config, NAME).train()
    given = inputs(FAMILIES["bert"], padded=False)
    with ro.retain(model, "*.0.*.p") as kept:
        out = model(**given, output_attentions=True)
        out[0].backward(projection(out[0], given))
    w = out.attentions[0]
    assert 0.3 < (w == 0).float().mean() < 0.7
    assert torch.equal(kept["encoder.layer.0.attention.self.p"].grad == 0, w == 0)
    torch.manual_seed(1)
    first = model(**given)[0]
    torch.manual_seed(2)
    assert not torch.equal(first, model(**given)[0])


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_caches(name: str, cache: str) -> None:
    family, model, given = made(name)
    given = {n: t.flip(1) for n, t in given.items()} if family.padding == "right" else given  # left, for generating
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    said = pytest.warns(RuntimeWarning, match="retain: every call of .* was without grad")
    with said, ro.retain(model, "*.p") as kept:  # no gradient comes, so nothing is kept
        found = model.generate(**given, **options)
    assert all(slot.grad is None for slot in kept.values())
    model.set_attn_implementation("eager")
    assert torch.equal(found, model.generate(**given, **options))


def test_the_last_tokens_after_a_cache() -> None:
    """Gradients of the probabilities of some new tokens, over cached and new keys."""
    _, model, _ = made("llama")
    tokens = inputs(FAMILIES["llama"], padded=False)["input_ids"]
    dy = torch.randn(BATCH, 3, VOCABULARY, generator=torch.Generator().manual_seed(2))
    found = {}
    for backend in ("eager", NAME):
        model.set_attn_implementation(backend)
        with torch.no_grad():
            out = model(tokens[:, :-3], use_cache=True)
        name = "cache" if "cache" in out else "past_key_values"  # the latter before transformers 5.21
        past = {name: out[name]}
        if backend == "eager":
            out = model(tokens[:, -3:], **past, output_attentions=True)
            out.attentions[1].retain_grad()
            out.logits.backward(dy)
            found[backend] = out.attentions[1].grad
        else:
            with ro.retain(model, "*.1.self_attn.p") as kept:
                model(tokens[:, -3:], **past).logits.backward(dy)
            found[backend] = kept["model.layers.1.self_attn.p"].grad
    assert found[NAME].shape == (BATCH, HEADS, 3, LENGTH)
    assert_close(found[NAME], found["eager"], "dP")


def test_keys_and_values_go_unrepeated(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def noted(q: Any, k: Any, v: Any, *rest: Any, **named: Any) -> torch.Tensor:
        seen.append((q.shape[1], k.shape[1], v.shape[1]))
        return sdpa(q, k, v, *rest, **named)

    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    _, model, given = made("llama")
    model(**given)
    assert seen == [(HEADS, 2, 2)] * 2


@pytest.mark.parametrize("weights", [False, True])
def test_attention_sinks(weights: bool) -> None:
    layers = ["full_attention", "sliding_attention"]
    sizes = {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 3}
    model = build(hf.GptOssForCausalLM, hf.GptOssConfig(**GROUPED, **sizes, layer_types=layers), NAME)
    for name, w in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(w)
    given = inputs(FAMILIES["llama"])
    want = eager(model, given)
    assert want.weights[0].sum(-1).min() < 0.5  # the sink has the rest
    with ro.retain(model, "*.p") as kept:
        out = model(**given, output_attentions=weights)
        out.logits.backward(projection(out.logits, given))
    for name, grad in grads_of(model).items():
        assert_close(grad, want.grads[name], name)
    for slot, w in zip(kept.values(), want.weights, strict=True):
        assert_close(slot.grad, w.grad, slot.name)
    if weights:
        assert_close(out.attentions[1], want.weights[1], "weights")
    else:
        assert not out.attentions


def test_what_cannot_be_done_is_refused_in_words() -> None:
    q = torch.randn(1, 2, 3, 4)
    for name, what in REFUSED.items():
        with pytest.raises(
            NotImplementedError, match=f"Module: {name}= is given, and .*'retainops' has no {what}; use"
        ):
            attention_forward(torch.nn.Module(), q, q, q, None, **{name: torch.ones(1)})


def test_the_mask_is_registered_too() -> None:
    """Without it transformers makes no mask, and padding is attended to, without a word."""
    _, model, given = made("bert")
    padded = model(**given)[0]
    given["input_ids"][0, -2:] = 5
    assert torch.equal(model(**given)[0][0, :-2], padded[0, :-2])
    del given["attention_mask"]
    assert not torch.allclose(model(**given)[0][0, :-2], padded[0, :-2])


def test_points_come_and_go_with_the_backend() -> None:
    _, model, _ = made("llama")
    names = [f"model.layers.{i}.self_attn.{point}" for i in range(2) for point in ("s", "p", "o")]
    assert list(ro.points(model)) == names
    assert "LlamaAttention in LlamaDecoderLayer" in repr(ro.points(model))
    model.set_attn_implementation("sdpa")
    assert not ro.points(model)
    with pytest.raises(ValueError, match=r'call model.set_attn_implementation\("retainops"\)'), ro.retain(model, "*.p"):
        pass
    model.set_attn_implementation(NAME)
    assert list(ro.points(model)) == names
    register()
    assert list(ro.points(model)) == names
    with pytest.raises(TypeError, match="register: name is 3"):
        register(3)


def test_nothing_stays_in_the_model() -> None:
    _, model, given = made("llama")
    before = [set(vars(m)) for m in model.modules()]
    state = list(model.state_dict())
    with ro.retain(model, "*.p") as outer, ro.retain(model, "*.p", ro.Stats("l2")) as inner:
        assert list(model.state_dict()) == state
        copies = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)))
        model(**given)[0].sum().backward()
    assert [set(vars(m)) for m in model.modules()] == before
    for name in outer:
        assert_close(inner[name].l2, outer[name].grad.norm(), name)
        outer[name].reset()
    for copied in copies:
        copied(**given)[0].sum().backward()
    assert all(slot.grad is None for slot in outer.values())


def test_two_models_in_two_threads() -> None:
    _, one, given = made("llama")
    other = copy.deepcopy(one)
    want = eager(one, given)
    found: dict[int, ro.Retained] = {}

    def work(i: int, model: Any, scale: float) -> None:
        with ro.retain(model, "*.p") as kept:
            for _ in range(3):
                y = model(**given)[0]
                y.backward(scale * projection(y, given) / 3)
        found[i] = kept

    threads = [threading.Thread(target=work, args=(i, m, 1.0 + i)) for i, m in enumerate((one, other))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        for slot, w in zip(found[i].values(), want.weights, strict=True):
            assert_close(slot.grad, (1.0 + i) * w.grad, slot.name)


def test_under_gradient_checkpointing() -> None:
    _, model, given = made("llama")
    want = eager(model, given)
    model.train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    with ro.retain(model, "*.p") as kept:
        y = model(**given, use_cache=False)[0]
        y.backward(projection(y, given))
    for slot, w in zip(kept.values(), want.weights, strict=True):
        assert_close(slot.grad, w.grad, slot.name)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "bert"])
def test_in_bfloat16_dp_is_as_near_to_float32s_as_eagers(name: str, autocast: bool) -> None:
    """Within twice its error: both are that of a whole model. Under autocast q and k may be wider than v."""
    family = FAMILIES[name]
    model, given = build(family.model, family.config, NAME), inputs(family, padded=False)
    for w in model.parameters():
        w.data = w.data.bfloat16().float()
    exact = eager(model, given)
    dy = projection(exact.y, given)
    narrow = copy.deepcopy(model).bfloat16()
    theirs = eager(narrow, given, dy.bfloat16())
    model = model if autocast else narrow
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), ro.retain(model, "*.p") as kept:
        y = model(**given)[0]
    y.backward(dy.to(y.dtype))
    for slot, other, w in zip(kept.values(), theirs.weights, exact.weights, strict=True):
        assert slot.grad.dtype == torch.bfloat16
        ours, bar = ((grad - w.grad).abs().max() for grad in (slot.grad, other.grad))
        assert ours <= 2 * bar, f"{slot.name}: {ours:.2e}, eager {bar:.2e}"


# torch.compile's own doing.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_in_one_graph() -> None:
    _, model, given = made("llama")
    want = eager(model, given)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with ro.retain(compiled, "*.p", ro.Relevance("chefer")) as kept:
        y = compiled(**given)[0]
        y.backward(projection(y, given))
    torch._dynamo.reset()
    for slot, w in zip(kept.values(), want.weights, strict=True):
        assert_close(slot.chefer, (w * w.grad).relu().mean(1).detach(), slot.name)


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_part_compiled_by_itself() -> None:
    """transformers says outside of that graph whether weights are collected, in a variable that Dynamo cannot read."""
    _, model, given = made("llama")
    with ro.retain(model, "*.p") as expected:
        model(**given)[0].square().sum().backward()
    torch._dynamo.reset()
    model.model.layers[1].self_attn.compile(backend="eager", fullgraph=True)
    with ro.retain(model, "*.p") as kept:
        model(**given)[0].square().sum().backward()
    for name, slot in kept.items():
        assert_close(slot.grad, expected[name].grad, name)
    model.model.layers[1].self_attn.compile(backend="eager")  # what collects weights is a hook, and breaks the graph
    weights = model(**given, output_attentions=True).attentions
    torch._dynamo.reset()
    assert [w.shape for w in weights] == [(BATCH, HEADS, LENGTH, LENGTH)] * 2
