"""Models that go from transformers on torch to ours and back, live: random ones of each family."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import gguf  # noqa: E402
from tiny import make_tokenizer  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config  # noqa: E402
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint  # noqa: E402

from raft_jax.models import Model, load_pretrained  # noqa: E402
from raft_jax.models.export import export_hf  # noqa: E402

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "bos_token_id": None,
    "max_position_embeddings": 64,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS = {
    "plain": (LlamaConfig, {"num_key_value_heads": 4}),
    "grouped": (LlamaConfig, {"num_key_value_heads": 2, "head_dim": 12, "rms_norm_eps": 1e-3}),
    "one kv head, tied": (LlamaConfig, {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama3": (LlamaConfig, {"num_key_value_heads": 2, "head_dim": 16, "rope_parameters": LLAMA3}),
    "llama3, tied": (LlamaConfig, {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "theta": (LlamaConfig, {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 99.0}}),
    "qwen2": (Qwen2Config, {"num_key_value_heads": 2}),
    "qwen2, tied": (Qwen2Config, {"num_key_value_heads": 1, "head_dim": 10, "tie_word_embeddings": True}),
}
TOKENS = np.random.default_rng(0).integers(0, 300, (2, 48))


pytestmark = pytest.mark.usefixtures("one_torch_thread")


def random_reference(config, seed):
    """A random model on torch in which no weight is 0 or 1, biases and norms included."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return model


def logits_of(model, tokens=TOKENS) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


@partial(jax.jit, static_argnums=0)
def apply(config, params):
    return Model(config, params).apply(params, TOKENS)


def ours(model) -> np.ndarray:
    return np.asarray(apply(model.config, model.params))


def assert_close(found, expected, atol=1e-4):
    np.testing.assert_allclose(found, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", MODELS)
def test_random_models_in_and_out(tmp_path, name, seed):
    make, changes = MODELS[name]
    tokenizer = make_tokenizer()
    reference = random_reference(make(vocab_size=tokenizer.vocab_size, **SIZES, **changes), seed)
    reference.save_pretrained(tmp_path / "theirs")
    tokenizer.save(tmp_path / "theirs")
    expected = logits_of(reference)
    model = load_pretrained(str(tmp_path / "theirs"))
    assert_close(ours(model), expected)

    export_hf(model, model.params, tmp_path / "ours", dtype=jnp.float32)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert again.dtype == torch.float32
    np.testing.assert_array_equal(logits_of(again.eval()), expected)
    assert again.generation_config.eos_token_id == list(model.tokenizer.stop_ids)


def test_older_configs(tmp_path, llama_config, random_tensors, write_folder):
    """Two keys for the rope, as transformers 4 wrote them, and defaults left out, are read alike on both sides."""
    hf = {key: value for key, value in llama_config.items() if key not in ("hidden_act", "tie_word_embeddings")}
    hf["rope_scaling"] = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    hf["torch_dtype"] = "bfloat16"
    folder = write_folder(tmp_path / "model", hf, random_tensors(llama_config))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = load_pretrained(str(folder))
    assert_close(ours(model), logits_of(reference))
    export_hf(model, model.params, tmp_path / "out", dtype=jnp.float32)
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.float32


@pytest.mark.parametrize(
    ("family", "tied", "kind"),
    [
        ("llama", False, "F16"),
        ("llama", True, "Q8_0"),
        ("qwen2", False, "BF16"),
        ("qwen2", True, "Q4_0"),
    ],
)
def test_gguf_files(tmp_path, llama_config, random_tensors, write_gguf, family, tied, kind):
    """transformers' own reader of GGUF undoes the permutation of query and key as we do."""
    hf = llama_config | {"model_type": family, "tie_word_embeddings": tied}
    quant = gguf.GGMLQuantizationType[kind]
    packed = {
        key: tensor if tensor.ndim == 1 else (gguf.quantize(tensor, quant), quant)
        for key, tensor in random_tensors(hf).items()
    }
    path = write_gguf(tmp_path / "model.gguf", hf, packed, general__name="tiny")
    reference = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf)).float().eval()
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=reference)["tensors"]
    missing, surplus = reference.load_state_dict(tensors, strict=False)
    assert not surplus and missing == (["lm_head.weight"] if tied else [])
    model = load_pretrained(str(path))
    expected = logits_of(reference)
    assert_close(ours(model), expected)
    export_hf(model, model.params, tmp_path / "out", dtype=jnp.float32)
    assert_close(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()), expected, atol=1e-5)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == family


def test_shards_and_bfloat16(tmp_path, monkeypatch, llama_config, random_tensors, write_folder):
    monkeypatch.setattr("raft_jax.models.export.SHARD_BYTES", 20_000)
    model = load_pretrained(str(write_folder(tmp_path / "model", llama_config, random_tensors(llama_config))))
    export_hf(model, model.params, tmp_path / "out", dtype=jnp.bfloat16)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    reference, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not report["missing_keys"] and reference.dtype == torch.bfloat16
    rounded = jax.tree.map(lambda array: array.astype("bfloat16").astype("float32"), model.params)
    assert_close(logits_of(reference.float().eval()), np.asarray(apply(model.config, rounded)))
