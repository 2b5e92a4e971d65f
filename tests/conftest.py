"""Eight host devices on the CPU, and small models that many tests share."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from raft_jax.models import Model  # noqa: E402
from raft_jax.models.decoder import init_parameters  # noqa: E402
from raft_jax.models.families import config_from_hf  # noqa: E402
from raft_jax.models.tokenizer import Tokenizer  # noqa: E402

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_backend():
    """A byte-pair tokenizer of 256 bytes, three special tokens and a few merges."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "n"), ("an", "d"), ("Ġ", "and"), ("i", "n"), ("in", "g"),
              ("e", "r"), ("o", "n"), ("Ġ", "w"), ("e", "s")]
    tokens += ["".join(merge) for merge in merges]
    backend = Backend(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return backend


@pytest.fixture
def tiny_tokenizer(tiny_backend):
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[1], "eos_token": SPECIAL[2],
                "pad_token": SPECIAL[0], "chat_template": CHATML, "clean_up_tokenization_spaces": False}
    return Tokenizer(tiny_backend, settings, "tiny")


@pytest.fixture
def tiny_hf_config(tiny_tokenizer):
    """A llama of two layers: four heads over two, and a head width that is not width / heads."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": tiny_tokenizer.vocab_size,
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "intermediate_size": 48, "max_position_embeddings": 256, "rope_theta": 10_000.0, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }


@pytest.fixture
def tiny_model(tiny_hf_config, tiny_tokenizer):
    """A random model in which no parameter is 0 or 1, norms included."""
    config = config_from_hf(tiny_hf_config)
    params = init_parameters(config, jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), len(params))
    params = {name: array + 0.1 * jax.random.normal(key, array.shape)
              for key, (name, array) in zip(keys, params.items(), strict=True)}
    return Model(config, params, tiny_tokenizer, tiny_hf_config)


def permuted(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's order of a query or key matrix's rows (its convert_hf_to_gguf.py)."""
    shape = weight.shape
    return weight.reshape(num_heads, 2, shape[0] // num_heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}


def gguf_name(key: str) -> str:
    stem, kind = key.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[rest]}.{kind}"
    return f"{GGUF_NAMES[stem]}.{kind}"


@pytest.fixture
def write_gguf(tiny_backend):
    """`write_gguf(path, hf_config, tensors, quantise, **metadata)`: a GGUF file as llama.cpp's converter lays it out."""
    import json

    import gguf

    def write(path, hf, tensors, quantise=None, tokenizer=None, **metadata):
        family = hf["model_type"]
        writer = gguf.GGUFWriter(path, family)
        writer.add_context_length(hf["max_position_embeddings"])
        writer.add_embedding_length(hf["hidden_size"])
        writer.add_block_count(hf["num_hidden_layers"])
        writer.add_feed_forward_length(hf["intermediate_size"])
        writer.add_head_count(hf["num_attention_heads"])
        writer.add_head_count_kv(hf["num_key_value_heads"])
        writer.add_key_length(hf["head_dim"])
        writer.add_value_length(hf["head_dim"])
        writer.add_rope_freq_base(hf["rope_theta"])
        writer.add_layer_norm_rms_eps(hf["rms_norm_eps"])
        backend = json.loads((tokenizer or tiny_backend).to_str())
        special = {token["content"] for token in backend["added_tokens"]}
        tokens = sorted(backend["model"]["vocab"], key=backend["model"]["vocab"].get)
        fields = {
            "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
            "tokenizer.ggml.merges": [" ".join(merge) for merge in backend["model"]["merges"]],
            "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.padding_token_id": 0,
            "tokenizer.chat_template": CHATML,
        } | metadata
        for name, value in fields.items():
            if value is not None:
                add = {str: writer.add_string, list: writer.add_array, int: writer.add_uint32, float: writer.add_float32}
                add[type(value)](name, value)
        heads = {"attn_q": hf["num_attention_heads"], "attn_k": hf["num_key_value_heads"]}
        for key, tensor in tensors.items():
            name = gguf_name(key)
            kind = name.split(".")[-2]
            if kind in heads and family == "llama":
                tensor = permuted(tensor, heads[kind])
            if quantise is None or tensor.ndim == 1:
                writer.add_tensor(name, np.ascontiguousarray(tensor, np.float32))
            else:
                writer.add_tensor(name, gguf.quantize(tensor, quantise), raw_dtype=quantise)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write
