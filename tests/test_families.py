"""Every family against transformers on torch: random tiny models, with what is special to the family on and off."""

import json
import re
import textwrap
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from quick import quick_jit  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402
from tiny import make_tokenizer  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from raft_jax.models import Model, families, load_pretrained  # noqa: E402
from raft_jax.models.config import parameter_table  # noqa: E402
from raft_jax.models.export import export_hf  # noqa: E402
from raft_jax.models.families import FAMILIES, config_from_hf, settings  # noqa: E402
from raft_jax.tokens import Tokens  # noqa: E402

T, PROMPT = 20, 9
LENGTHS = (T, 14, 12)  # of the rows, when they are padded
SIZES = {
    "vocab_size": make_tokenizer().vocab_size,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
TOKENS = np.random.default_rng(0).integers(0, 300, (3, T))
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONG = {"type": "longrope", "short_factor": [1.0, 1.5, 2.0], "long_factor": [3.0, 5.0, 9.0]}
GEMMA = {"head_dim": 12, "sliding_window": 5, "query_pre_attn_scalar": 7, "hidden_activation": "gelu_pytorch_tanh"}
GEMMA2 = GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
GEMMA3 = GEMMA | {"num_hidden_layers": 3, "sliding_window_pattern": 3, "rope_theta": 900.0}
CASES = {  # config.json, older and newer style
    "llama": {"head_dim": None, "num_key_value_heads": None},
    "llama, theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 99.0}, "rms_norm_eps": 1e-3},
    "llama, rope llama3, tied": {"rope_scaling": LLAMA3, "rope_theta": 500.0, "tie_word_embeddings": True},
    "llama, rope llama3, head width": {"rope_parameters": LLAMA3 | {"rope_theta": 500.0}, "head_dim": 12},
    "llama, rope linear": {"rope_scaling": {"type": "linear", "factor": 3.0}, "num_key_value_heads": 1},
    "smollm3": {"num_hidden_layers": 4, "rope_theta": 900.0},
    "smollm3, untied": {"no_rope_layers": [0, 1], "tie_word_embeddings": False, "head_dim": 12},
    "smollm3, all rope": {"no_rope_layers": [1, 1]},
    "smollm3, window": {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 6},
    "phi3": {"num_key_value_heads": None},
    "phi3, partial rotary, window": {"partial_rotary_factor": 0.5, "sliding_window": 6, "rope_theta": 900.0},
    "phi3, longrope beyond the switch, tied": {
        "partial_rotary_factor": 0.75,
        "rope_scaling": LONG,
        "original_max_position_embeddings": 13,
        "tie_word_embeddings": True,
    },
    "phi3, longrope before the switch": {
        "rope_parameters": LONG | {"rope_type": "longrope", "partial_rotary_factor": 0.75, "attention_factor": 1.7},
        "original_max_position_embeddings": 32,
    },
    "qwen2": {},
    "qwen2, tied, window": {
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
    },
    "qwen3": {"head_dim": 12},
    "qwen3, tied, window": {
        "head_dim": 6,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mistral": {"sliding_window": None, "head_dim": 12},
    "mistral, window": {"sliding_window": 6, "rope_theta": 900.0, "tie_word_embeddings": True},
    "gemma2": GEMMA2,
    "gemma2, no caps, untied": GEMMA2
    | {
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "sliding_window": 64,
        "tie_word_embeddings": False,
    },
    "gemma3_text": GEMMA3 | {"rope_local_base_freq": 99.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "gemma3_text, new style, cap": GEMMA3
    | {
        "final_logit_softcapping": 3.0,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 900.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 99.0},
        },
    },
    "gemma3_text, no window": GEMMA3 | {"sliding_window": 64},
}


def hf_config(name: str) -> dict:
    return {"model_type": name.partition(",")[0], **SIZES, **CASES[name]}


pytestmark = pytest.mark.usefixtures("one_torch_thread")


def random_reference(hf: dict, seed: int):
    """A random model on torch in which no weight is 0 or 1 and norms multiply by about one."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(json.dumps(hf)))).float().eval()
    centre = 0.0 if "gemma" in hf["model_type"] else 1.0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(centre if "norm" in name else 0.0, 0.3)
    return model


def logits_of(reference, tokens=TOKENS) -> np.ndarray:
    with torch.no_grad():
        return reference(torch.from_numpy(tokens)).logits.numpy()


@partial(quick_jit, static_argnums=0)
def full(config, params, tokens, mask):
    return Model(config, params).apply(params, tokens, None, mask)


@partial(quick_jit, static_argnums=0)
def cached(config, params, prompt, rest):
    """Logits of prompts, padded on the right, and of what follows them, one token at a time."""
    model = Model(config, params)
    hidden_BPD, cache = model.prefill(params, prompt, prompt.length + rest.shape[1])

    def step(cache, token_B):
        hidden_B1D, cache = model.extend(params, token_B[:, None], cache)
        return cache.longer(1), hidden_B1D[:, 0]

    _, rest_TBD = jax.lax.scan(step, cache, rest.T)
    unembedding = model.unembedding(params)
    return model.logits(hidden_BPD, unembedding), model.logits(rest_TBD.swapaxes(0, 1), unembedding)


def padded(left: bool) -> tuple[np.ndarray, np.ndarray]:
    tokens, mask = np.full(TOKENS.shape, 7), np.zeros(TOKENS.shape, bool)
    for row, size in enumerate(LENGTHS):
        place = slice(T - size, None) if left else slice(0, size)
        tokens[row, place], mask[row, place] = TOKENS[row, :size], True
    return tokens, mask


def assert_close(found, expected, atol=1e-4):
    np.testing.assert_allclose(found, expected, atol=atol, rtol=0)


def write(folder, reference, hf: dict):
    """As transformers saves it, but with the config.json that was asked for."""
    reference.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    assert config_from_hf(saved) == config_from_hf(hf)
    (folder / "config.json").write_text(json.dumps(hf))
    make_tokenizer().save(folder)
    return folder


def test_every_family_is_here():
    assert {name.partition(",")[0] for name in CASES} == set(FAMILIES)


@pytest.mark.parametrize("name", ["phi3, longrope beyond the switch, tied", "gemma2", "gemma3_text"])
def test_bfloat16_stays_bfloat16(name):
    config = config_from_hf(hf_config(name))
    params = {key: jax.ShapeDtypeStruct(info.shape, jnp.bfloat16) for key, info in parameter_table(config).items()}
    model = Model(config, params)
    mask = np.ones(TOKENS.shape, bool)
    hidden, cache = jax.eval_shape(lambda params: model.prefill(params, Tokens(TOKENS, mask), T + 1), params)
    step, _ = jax.eval_shape(lambda params, cache: model.extend(params, TOKENS[:, :1], cache), params, cache)
    assert {hidden.dtype, step.dtype, cache.key_LBKHS.dtype, cache.value_LBKSH.dtype} == {jnp.dtype("bfloat16")}
    logits = jax.eval_shape(lambda params: model.apply(params, TOKENS), params)
    assert logits.dtype == jnp.float32 and logits.shape == (*TOKENS.shape, config.vocab_size)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_in_and_out(tmp_path, name, seed):
    hf = hf_config(name)
    reference = random_reference(hf, seed)
    model = load_pretrained(str(write(tmp_path / "theirs", reference, hf)))
    config, params = model.config, model.params

    expected = logits_of(reference)
    assert_close(full(config, params, TOKENS, np.ones(TOKENS.shape, bool)), expected)
    rows = [logits_of(reference, TOKENS[row : row + 1, :size])[0] for row, size in enumerate(LENGTHS)]
    for left in (True, False):
        tokens, mask = padded(left)
        found = np.asarray(full(config, params, tokens, mask))
        assert np.isfinite(found).all()
        assert_close(found[mask], np.concatenate(rows))
    sizes = np.array(LENGTHS) - (T - PROMPT)  # of the prompts, which are followed by equally many tokens
    prompt = Tokens(TOKENS[:, :PROMPT], np.arange(PROMPT) < sizes[:, None])
    rest = np.stack([row[size : size + T - PROMPT] for row, size in zip(TOKENS, sizes, strict=True)])
    parts = [np.asarray(part) for part in cached(config, params, prompt, rest)]
    found = [part for row, size in enumerate(sizes) for part in (parts[0][row, :size], parts[1][row])]
    assert_close(np.concatenate(found), np.concatenate(rows))

    export_hf(model, params, tmp_path / "ours", dtype=jnp.float32)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    np.testing.assert_array_equal(logits_of(again.eval()), expected)
    if seed == 0:
        stored, given = load_file(tmp_path / "ours/model.safetensors"), load_file(tmp_path / "theirs/model.safetensors")
        assert stored.keys() == given.keys() and all(np.array_equal(stored[key], given[key]) for key in given)
        second = load_pretrained(str(tmp_path / "ours"))
        export_hf(second, second.params, tmp_path / "twice", dtype=jnp.float32)
        for path in (tmp_path / "ours").iterdir():
            assert (tmp_path / "twice" / path.name).read_bytes() == path.read_bytes()


def test_the_worked_example_of_the_docs(tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs/models.md").read_text("utf-8").partition("## How to add a family")[2]
    function, row, cases = (textwrap.dedent(code) for code in re.findall(r" +```python\n(.*?) +```", page, re.DOTALL))
    exec(function, vars(settings))
    try:
        ((name, family),) = eval("{" + row + "}", vars(families)).items()
        monkeypatch.setitem(FAMILIES, name, family)
        for number, (case, changes) in enumerate(eval("{" + cases + "}").items()):
            monkeypatch.setitem(CASES, case, changes)
            assert case.partition(",")[0] == name
            test_in_and_out(tmp_path / str(number), case, 0)
    finally:
        del settings.seed_oss
