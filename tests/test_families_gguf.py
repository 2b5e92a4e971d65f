"""GGUF files of every family that llama.cpp writes, as its converter lays them out, against transformers on torch."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import gguf  # noqa: E402
from test_families import TOKENS, assert_close, full, hf_config, logits_of, random_reference  # noqa: E402
from tiny import make_tokenizer  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from raft_jax.errors import InputError  # noqa: E402
from raft_jax.models import load_pretrained  # noqa: E402
from raft_jax.models.export import export_hf  # noqa: E402

LLAMA31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
CASES = {  # a case of test_families, changes of its config.json, fields of the file
    "llama": ("llama, rope linear", {}, {"rope.scaling.type": "linear", "rope.scaling.factor": 3.0}),
    "llama 3.1": (
        "llama, rope llama3, tied",
        {
            "rope_scaling": LLAMA31 | {"rope_type": "llama3"},
            "rope_theta": 10_000.0,
            "head_dim": 16,
        },
        {},
    ),
    "qwen2": ("qwen2", {}, {}),
    "qwen3": ("qwen3", {}, {}),
    "phi3": ("phi3, partial rotary, window", {}, {"attention.sliding_window": 6, "rope.dimension_count": 4}),
    "phi3, long": (
        "phi3, longrope beyond the switch, tied",
        {},
        {
            "attention.sliding_window": 0,
            "rope.dimension_count": 6,
            "rope.scaling.original_context_length": 13,
            "rope.scaling.attn_factor": math.sqrt(1 + math.log(64 / 13) / math.log(13)),
        },
    ),
    "gemma2": (
        "gemma2",
        {"query_pre_attn_scalar": 12},
        {
            "attention.sliding_window": 5,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "num_hidden_layers": 6,
            "query_pre_attn_scalar": 12,
            "rope_local_base_freq": 10_000.0,
            "sliding_window_pattern": 6,
        },
        {  # one layer is global
            "attention.sliding_window": 5,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 4.0,
        },
    ),
}


def rope_tensors(hf) -> dict[str, np.ndarray]:
    scaling = hf.get("rope_scaling") or {}
    if "long_factor" in scaling:
        return {
            f"rope_factors_{kind}.weight": np.array(scaling[f"{kind}_factor"], np.float32) for kind in ("long", "short")
        }
    if scaling.get("rope_type") != "llama3":
        return {}
    factors = []
    for index in range(0, hf["head_dim"], 2):
        wavelength = 2 * math.pi * hf["rope_theta"] ** (index / hf["head_dim"])
        low, high, original = (
            scaling[key] for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        )
        smooth = min(max((original / wavelength - low) / (high - low), 0), 1)
        factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    assert 1 < factors[6] < scaling["factor"] == factors[-1]
    return {"rope_freqs.weight": np.array(factors, np.float32)}


def write_gguf(path, arch: str, hf: dict, reference, fields: dict, extra=None):
    tokenizer = make_tokenizer()
    spec = json.loads(tokenizer.backend.to_str())
    special = {token["content"]: token["id"] for token in spec["added_tokens"]}
    vocab = spec["model"]["vocab"] | special
    heads = hf["num_attention_heads"]
    head_width = hf.get("head_dim") or hf["hidden_size"] // heads
    own = {
        "context_length": hf["max_position_embeddings"],
        "embedding_length": hf["hidden_size"],
        "block_count": hf["num_hidden_layers"],
        "feed_forward_length": hf["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": hf["num_key_value_heads"] or heads,
        "attention.key_length": head_width,
        "attention.value_length": head_width,
        "rope.freq_base": hf.get("rope_theta", 10_000.0),
        "attention.layer_norm_rms_epsilon": 1e-6,
        **fields,
    }
    if arch == "phi3":
        own["attention.layer_norm_rms_epsilon"] = 1e-5
    tokens = sorted(vocab, key=vocab.get)
    metadata = {f"{arch}.{key}": value for key, value in own.items()} | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2" if arch == "qwen2" else "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in spec["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_id,
        "tokenizer.chat_template": tokenizer.template.text,
    }
    writer = gguf.GGUFWriter(path, arch)
    add = {str: writer.add_string, list: writer.add_array, int: writer.add_uint32, float: writer.add_float32}
    for name, value in metadata.items():
        add[type(value)](name, value)
    by_name = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(by_name[arch], hf["num_hidden_layers"])
    for key, tensor in reference.state_dict().items():
        array = tensor.numpy()
        if key == "lm_head.weight" and reference.config.tie_word_embeddings:
            continue
        if arch == "llama" and key.endswith(("q_proj.weight", "k_proj.weight")):
            rows = heads if "q_proj" in key else own["attention.head_count_kv"]
            array = array.reshape(rows, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        if arch.startswith("gemma") and key.endswith("norm.weight"):
            array = array + 1
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(array))
    for name, array in (extra or rope_tensors(hf)).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def case(name: str) -> tuple[str, dict, dict]:
    base, changes, fields = CASES[name]
    return name.partition(",")[0].partition(" ")[0], hf_config(base) | changes, fields


@pytest.mark.parametrize("name", CASES)
def test_gguf_in_and_out(tmp_path, name):
    arch, hf, fields = case(name)
    reference = random_reference(hf, seed=3)
    model = load_pretrained(str(write_gguf(tmp_path / "model.gguf", arch, hf, reference, fields)))
    expected = logits_of(reference)
    assert_close(full(model.config, model.params, TOKENS, np.ones(TOKENS.shape, bool)), expected)
    export_hf(model, model.params, tmp_path / "out", dtype=jnp.float32)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert_close(logits_of(again.eval()), expected)


@pytest.mark.parametrize(
    ("name", "fields", "extra", "named"),
    [
        ("llama 3.1", {}, {"rope_freqs.weight": np.full(8, 2, np.float32)}, "not the rope of Llama 3"),
        ("llama 3.1", {}, {"rope_freqs.weight": np.ones(3, np.float32)}, "not the rope of Llama 3"),
        ("llama", {"rope.scaling.type": "yarn"}, None, "rope scaling 'yarn' is not supported"),
        ("phi3, long", {}, {"rope_factors_long.weight": np.ones(3, np.float32)}, "belong together"),
        ("qwen3", {}, {"rope_freqs.weight": np.ones(3, np.float32)}, "rope_freqs.weight is not part of a qwen3 model"),
    ],
)
def test_gguf_ropes_that_are_not_known(tmp_path, name, fields, extra, named):
    arch, hf, own = case(name)
    path = write_gguf(tmp_path / "m.gguf", arch, hf, random_reference(hf, seed=3), own | fields, extra)
    with pytest.raises(InputError, match=named):
        load_pretrained(str(path))
