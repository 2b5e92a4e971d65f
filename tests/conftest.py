"""Eight host devices on the CPU, and what several files of tests share."""

import json
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Threads of XLA on CPU. A collective blocks one on every device until all devices have come to it; with as many threads
# as devices, two collectives that may run at the same time can wait for each other for ever.
os.environ.setdefault("NPROC", "32")

import jax
import numpy as np
import pytest
from quick import PLAIN_LOOPS, xla_flags

# Compiling is most of the tests' time, so XLA saves itself its dearest optimisations; with `AS_USED=1 make test`, not.
if "AS_USED" not in os.environ:
    os.environ["XLA_FLAGS"] += " " + xla_flags(PLAIN_LOOPS)
    jax.config.update("jax_disable_most_optimizations", True)

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

# Files that take a minute and more: begun first, so that no worker is left with one of them at the end.
LONG = (
    "test_run.py",
    "test_resume.py",
    "test_train_step.py",
    "test_train_loop.py",
    "test_smollm2.py",
    "test_lora.py",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """The folder of compiled programs that all workers of a session share, and the programs that they start."""
    folder = tmp_path_factory.getbasetemp()
    return (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "compiled"


@pytest.fixture(scope="session", autouse=True)
def compile_once(compiled):
    """What a test compiles the next one finds: each run, train step and sampler makes its programs anew."""
    jax.config.update("jax_compilation_cache_dir", str(compiled))
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # Shorter ones are mostly single operations, which JAX keeps in memory.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture(scope="session")
def program_environment(compiled):
    """For the program in a process of its own: one device, and what one process compiles the next one finds.

    Whole runs are compared with each other, not with constants: XLA may save itself its dearest optimisations, but not
    with `AS_USED=1`, because some tests go on in this process, where the same numbers must come out.
    """
    quick = {"XLA_FLAGS": xla_flags(PLAIN_LOOPS), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return os.environ | {
        **({"XLA_FLAGS": ""} if "AS_USED" in os.environ else quick),
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


@pytest.fixture(scope="session")
def llama_config():
    """config.json of a llama: four heads over two, and a head width that is not width / heads."""
    from tiny import make_tokenizer

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": make_tokenizer().vocab_size,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 64,
        "max_position_embeddings": 256,
        "rope_theta": 500.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }


@pytest.fixture(scope="session")
def random_tensors():
    """`random_tensors(hf_config, seed=0)`: a model's tensors under Hugging Face's keys; none is made of 0s or 1s."""

    def make(hf, seed=0):
        random = np.random.default_rng(seed)
        D, F, V, H = hf["hidden_size"], hf["intermediate_size"], hf["vocab_size"], hf["head_dim"]
        N, K = hf["num_attention_heads"], hf["num_key_value_heads"]
        shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
        if not hf["tie_word_embeddings"]:
            shapes["lm_head.weight"] = (V, D)
        for layer in range(hf["num_hidden_layers"]):
            for name, shape in {
                "input_layernorm.weight": (D,),
                "self_attn.q_proj.weight": (N * H, D),
                "self_attn.k_proj.weight": (K * H, D),
                "self_attn.v_proj.weight": (K * H, D),
                "self_attn.o_proj.weight": (D, N * H),
                "post_attention_layernorm.weight": (D,),
                "mlp.gate_proj.weight": (F, D),
                "mlp.up_proj.weight": (F, D),
                "mlp.down_proj.weight": (D, F),
            }.items():
                shapes[f"model.layers.{layer}.{name}"] = shape
            if hf["model_type"] == "qwen2":
                for name, rows in {"q": N * H, "k": K * H, "v": K * H}.items():
                    shapes[f"model.layers.{layer}.self_attn.{name}_proj.bias"] = (rows,)
        return {
            key: (random.normal(size=shape) * shape[-1] ** -0.5 + (key.endswith("norm.weight"))).astype(np.float32)
            for key, shape in shapes.items()
        }

    return make


@pytest.fixture(scope="session")
def write_folder():
    """`write_folder(folder, hf_config, tensors)`: a Hugging Face folder with tiny.py's tokenizer."""
    from safetensors.numpy import save_file
    from tiny import make_tokenizer

    def write(folder, hf, tensors):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(hf))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        make_tokenizer().save(folder)
        return folder

    return write


@pytest.fixture(scope="session")
def write_gguf():
    """`write_gguf(path, hf_config, tensors, **metadata)`: a GGUF file as llama.cpp's converter lays it out.

    A tensor is an array, or a pair of packed bytes and their type. In `metadata`, None leaves a field out.
    """
    import gguf
    from tiny import make_tokenizer

    def permuted(rows, num_heads):
        return rows.reshape(num_heads, 2, len(rows) // num_heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)

    def name_of(key):
        stem, kind = key.rsplit(".", 1)
        if not stem.startswith("model.layers."):
            return f"{GGUF_NAMES[stem]}.{kind}"
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[rest]}.{kind}"

    def write(path, hf, tensors, family=None, **metadata):
        tokenizer = make_tokenizer()
        spec = json.loads(tokenizer.backend.to_str())
        special = {token["content"]: token["id"] for token in spec["added_tokens"]}
        vocab = spec["model"]["vocab"] | special
        family = family or hf["model_type"]
        fields = {
            f"{family}.context_length": hf["max_position_embeddings"],
            f"{family}.embedding_length": hf["hidden_size"],
            f"{family}.block_count": hf["num_hidden_layers"],
            f"{family}.feed_forward_length": hf["intermediate_size"],
            f"{family}.attention.head_count": hf["num_attention_heads"],
            f"{family}.attention.head_count_kv": hf["num_key_value_heads"],
            f"{family}.attention.key_length": hf["head_dim"],
            f"{family}.attention.value_length": hf["head_dim"],
            f"{family}.rope.freq_base": hf["rope_theta"],
            f"{family}.attention.layer_norm_rms_epsilon": hf["rms_norm_eps"],
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "qwen2" if family == "qwen2" else "gpt-2",
            "tokenizer.ggml.tokens": sorted(vocab, key=vocab.get),
            "tokenizer.ggml.token_type": [3 if token in special else 1 for token in sorted(vocab, key=vocab.get)],
            "tokenizer.ggml.merges": [" ".join(merge) for merge in spec["model"]["merges"]],
            "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
            "tokenizer.ggml.padding_token_id": tokenizer.pad_id,
            "tokenizer.chat_template": tokenizer.template.text,
        } | {name.replace("__", "."): value for name, value in metadata.items()}
        writer = gguf.GGUFWriter(path, family)
        add = {str: writer.add_string, list: writer.add_array, int: writer.add_uint32, float: writer.add_float32}
        for name, value in fields.items():
            if value is not None:
                add[type(value)](name, value)
        heads = {"q_proj.weight": hf["num_attention_heads"], "k_proj.weight": hf["num_key_value_heads"]}
        for key, tensor in tensors.items():
            rows, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
            if family == "llama" and (num_heads := heads.get(key.partition("self_attn.")[2])):
                rows = permuted(rows, num_heads)
            writer.add_tensor(name_of(key), np.ascontiguousarray(rows), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.fixture(scope="module")
def one_torch_thread():
    """Tiny models need no more, and waiting threads would burn the cores that other tests need."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
