"""Adapters: what they add, that their student shares the teacher's weights, and what PEFT makes of the saved ones."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from quick import quick_jit, used_jit

import raft_jax
from raft_jax.config import LORA_TARGETS, LoraConfig
from raft_jax.models import Model, load_pretrained
from raft_jax.models.layer import adapter_names
from raft_jax.models.lora import TARGETS, adapter_table, init_adapters, merge, peft_base, save_peft
from raft_jax.sharding import make_mesh
from raft_jax.tokens import Tokens
from raft_jax.train.student import make_student

# Before transformers, which else is imported without it (raft_jax.models.transformers_quietly).
torch = pytest.importorskip("torch")
RANK, ALPHA = 3, 5.0
TOKENS = np.random.default_rng(0).integers(0, 200, (2, 9))


def random_adapters(config, targets=LORA_TARGETS):
    """Both halves random, so that they add something."""
    random = np.random.default_rng(1)
    return {
        name: jnp.asarray(0.3 * random.normal(size=info.shape), jnp.float32)
        for name, info in adapter_table(config, RANK, targets).items()
    }


def with_scale(model: Model) -> Model:
    return replace(model, config=replace(model.config, adapter_scale=ALPHA / RANK))


def test_the_config_offers_what_there_is():
    assert tuple(TARGETS) == LORA_TARGETS


def test_untrained_adapters_add_nothing():
    model = with_scale(tiny.make_model())
    adapters = init_adapters(model.config, RANK, LORA_TARGETS, jax.random.key(0))
    for target in LORA_TARGETS:
        down, up = (np.asarray(adapters[name]) for name in adapter_names(TARGETS[target]))
        assert not up.any() and 0.5 < np.abs(down).max() * np.prod(down.shape[1:-1]) ** 0.5 <= 1
    hidden = used_jit(model.hidden)
    np.testing.assert_array_equal(hidden(model.params | adapters, Tokens(TOKENS)), hidden(model.params, Tokens(TOKENS)))


def test_adapters_add_what_merging_adds():
    model = with_scale(tiny.make_model())
    adapters = random_adapters(model.config)
    expected = dict(model.params)
    for target, parameter in TARGETS.items():
        num_inputs = 2 if target == "o_proj" else 1
        a, b = (np.asarray(adapters[name], np.float64) for name in adapter_names(parameter))
        shape, L = expected[parameter].shape, len(a)
        added = a.reshape(L, -1, RANK) @ b.reshape(L, RANK, -1) * (ALPHA / RANK)
        assert np.prod(shape[1 : 1 + num_inputs]) == added.shape[1]
        expected[parameter] = np.float32(expected[parameter] + added.reshape(shape))
    merged = merge(model.params, adapters, ALPHA / RANK)
    for name, value in expected.items():
        np.testing.assert_allclose(merged[name], value, atol=1e-6, err_msg=name)
    hidden = quick_jit(model.hidden)
    plain, found = (hidden(weights, Tokens(TOKENS)) for weights in (model.params, model.params | adapters))
    assert np.abs(found - plain).max() > 0.1
    np.testing.assert_allclose(found, hidden(expected, Tokens(TOKENS)), atol=2e-5)
    # and in decoding, over stacked layers and one by one
    mask = np.ones(TOKENS.shape, bool)
    _, cache = quick_jit(model.prefill, static_argnums=2)(
        model.params | adapters, Tokens(TOKENS[:, :-1], mask[:, :-1]), 12
    )
    for layers in (None, model.unstacked(model.params | adapters, 2)):
        last, _ = quick_jit(model.extend)(model.params | adapters, TOKENS[:, -1:], cache, layers)
        np.testing.assert_allclose(last[:, 0], found[:, -1], atol=2e-5)


@pytest.mark.parametrize("rank", [0, RANK])
def test_a_student_is_float32_and_runs_in_the_teachers_dtype(rank):
    model = tiny.make_model()
    teacher = jax.tree.map(lambda array: array.astype(jnp.bfloat16), model.params)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    student = make_student(replace(model, params=teacher), LoraConfig(rank, ALPHA, ["q_proj", "down_proj"]), mesh)
    params = student.init(teacher, jax.random.key(0))
    assert {array.dtype for array in params.values()} == {np.dtype(np.float32)}
    assert student.shardings.keys() == params.keys()
    if rank:
        assert params.keys() == {"query_a_LDR", "query_b_LRNH", "down_a_LFR", "down_b_LRD"}
    forward_params = student.forward_params(params, teacher)
    assert {array.dtype for array in forward_params.values()} == {jnp.dtype(jnp.bfloat16)}
    found, expected = (
        used_jit(hidden)(weights, Tokens(TOKENS))
        for hidden, weights in ((student.model.hidden, forward_params), (model.hidden, teacher))
    )
    np.testing.assert_array_equal(found.astype(np.float32), expected.astype(np.float32))

    def loss(params, teacher):
        hidden_BTD = student.model.hidden(student.forward_params(params, teacher), Tokens(TOKENS))
        return jnp.sum(jnp.square(hidden_BTD).astype(np.float32))

    grads = quick_jit(jax.grad(loss))(params, teacher)
    assert all(grad.dtype == np.float32 for grad in grads.values()) and any(np.any(grad) for grad in grads.values())
    assert student.merged_params(params, teacher).keys() == teacher.keys()


SIZES = {
    "vocab_size": tiny.make_tokenizer().vocab_size,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", LORA_TARGETS),
        ("llama", ("q_proj", "v_proj")),
        ("phi3", LORA_TARGETS),
        ("phi3", ("v_proj", "o_proj")),
    ],
)
def test_peft_reads_what_is_saved(tmp_path, family, targets):
    peft = pytest.importorskip("peft")
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES)).eval()
    theirs.save_pretrained(tmp_path / "base")
    tiny.make_tokenizer().save(tmp_path / "base")
    model = with_scale(load_pretrained(str(tmp_path / "base")))
    adapters = random_adapters(model.config, targets)
    save_peft(adapters, model.config, tmp_path / "adapter", alpha=ALPHA, base="hf://owner/name")
    written = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "owner/name"  # as the hub calls it, for PEFT to find it
    adapted = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter"))
    with torch.no_grad():
        expected = adapted(torch.tensor(TOKENS)).logits.numpy()
    plain = model.apply(model.params, TOKENS)
    found = model.apply(model.params | adapters, TOKENS)
    assert np.abs(found - plain).max() > 0.05
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_peft_reads_what_is_saved_of_a_model_with_vision(tmp_path):
    """Its vision tower has modules of the same names, which stay as they are."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    text = SIZES | {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8, "tie_word_embeddings": True}
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=1)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    tiny.make_tokenizer().save(tmp_path / "base")
    model = with_scale(load_pretrained(str(tmp_path / "base")))
    assert model.with_vision
    adapters = random_adapters(model.config)
    save_peft(adapters, model.config, tmp_path / "adapter", alpha=ALPHA, base=str(tmp_path / "base"), with_vision=True)
    written = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    theirs = AutoModelForCausalLM.from_pretrained(written["base_model_name_or_path"]).eval()
    adapted = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter"))
    assert not [name for name, _ in adapted.named_parameters() if "lora" in name and "vision" in name]
    with torch.no_grad():
        expected = adapted(torch.tensor(TOKENS)).logits.numpy()
    found = model.apply(model.params | adapters, TOKENS)
    assert np.abs(found - model.apply(model.params, TOKENS)).max() > 0.05
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_base_is_a_name_that_peft_finds(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    assert peft_base("model") == (str(tmp_path / "model"), None)
    assert peft_base("hf://owner/name") == ("owner/name", None)
    assert peft_base("hf://owner/name@v1.0") == ("owner/name", "v1.0")
    folder, _ = peft_base("package://raft_jax/models")
    assert folder == str(Path(raft_jax.__file__).parent / "models")
    assert peft_base("model.gguf") == peft_base("gone") == (None, None)
    config = tiny.make_config(64)
    save_peft(random_adapters(config), config, tmp_path / "adapter", alpha=ALPHA, base="model.gguf")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] is None
    assert "belongs to model.gguf" in (tmp_path / "adapter/README.md").read_text()
