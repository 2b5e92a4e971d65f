"""Which decoders are known. A family is a row of `FAMILIES`: where its tensors lie and what its config.json means."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from raft_jax.errors import InputError
from raft_jax.models.decoder import DecoderConfig, parameter_table
from raft_jax.models.families import keys, settings
from raft_jax.models.families.keys import Stored


class Family(NamedTuple):
    """One row."""

    architecture: str  # the class in transformers
    read: Callable[[settings.Config, settings.Fields], settings.Fields]
    keys: Mapping[str, Stored] = keys.LLAMA
    defaults: Mapping[str, Any] = {}  # what transformers takes where config.json says nothing
    refused: tuple[str, ...] = ()  # options that change the arithmetic and are not written here


COMMON = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10_000.0,
}
QWEN = {"max_position_embeddings": 32768, "max_window_layers": 28, "sliding_window": 4096, "num_key_value_heads": 32}
GEMMA = {
    "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True, "head_dim": 256, "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256, "sliding_window": 4096,
}
BIASES = ("attention_bias", "mlp_bias")
BIDIRECTIONAL = ("attention_bias", "use_bidirectional_attention")
FAMILIES = {
    "llama": Family("LlamaForCausalLM", settings.llama, defaults={"max_position_embeddings": 2048}, refused=BIASES),
    "smollm3": Family("SmolLM3ForCausalLM", settings.smollm3, refused=BIASES, defaults={
        "max_position_embeddings": 32768, "num_key_value_heads": 4, "tie_word_embeddings": True,
        "rope_theta": 2_000_000.0, "no_rope_layer_interval": 4,
    }),
    "phi3": Family("Phi3ForCausalLM", settings.phi3, keys.PHI3, {
        "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    }),
    "qwen2": Family("Qwen2ForCausalLM", settings.qwen2, defaults=QWEN),
    "qwen3": Family("Qwen3ForCausalLM", settings.qwen3, defaults=QWEN | {"head_dim": 128}, refused=BIASES[:1]),
    "mistral": Family("MistralForCausalLM", settings.mistral, refused=("layer_types",), defaults={
        "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096,
    }),
    "gemma2": Family("Gemma2ForCausalLM", settings.gemma2, keys.GEMMA, GEMMA | {
        "max_position_embeddings": 8192, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    }, BIDIRECTIONAL),
    "gemma3_text": Family("Gemma3ForCausalLM", settings.gemma3, keys.GEMMA, GEMMA | {
        "max_position_embeddings": 131072, "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0,
        "sliding_window_pattern": 6, "num_attention_heads": 8, "vocab_size": 262208,
    }, BIDIRECTIONAL),
}
# Models that see, too: the family of the decoder in them, which is what is read.
DECODER_OF = {"gemma3": "gemma3_text"}


def decoder_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the decoder alone, where it has eyes beside it; else what it is."""
    name = hf.get("model_type")
    if name not in DECODER_OF:
        return dict(hf)
    text = hf.get("text_config")
    if not isinstance(text, Mapping):
        raise InputError(f"config.json: {name} needs an object under the key text_config")
    shared = {key: hf[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype",
                                       "tie_word_embeddings") if hf.get(key) is not None}
    family = DECODER_OF[name]
    return {**shared, **text, "model_type": family, "architectures": [FAMILIES[family].architecture]}


def decoder_key(key: str) -> str | None:
    """The key that a tensor of such a model has in the decoder alone; None where it has none."""
    for prefix, ours in (("model.language_model.", "model."), ("language_model.model.", "model."),
                         ("language_model.lm_head.", "lm_head."), ("lm_head.", "lm_head.")):
        if key.startswith(prefix):
            return ours + key.removeprefix(prefix)
    return None


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Maps a `config.json` to ours.

    Raises:
      InputError: the model type is not supported (named, with those that are), a key is missing, or an option
        is set that would need other arithmetic.
    """
    name = hf.get("model_type")
    if name not in FAMILIES:
        supported = ", ".join(sorted(FAMILIES | DECODER_OF))
        raise InputError(f"config.json: model_type {name!r} is not supported; supported: {supported}")
    family = FAMILIES[name]
    for key in (*family.refused, "quantization_config"):
        if hf.get(key):
            raise InputError(f"config.json: {name} with {key} is not supported")
    hf = {**COMMON, **family.defaults, **hf}
    fields = settings.plain(hf)
    return DecoderConfig(family=name, **fields | family.read(hf, fields))


def stored_keys(config: DecoderConfig) -> dict[str, Stored]:
    """Where a Hugging Face folder keeps each parameter of this config."""
    return {name: FAMILIES[config.family].keys[name] for name in parameter_table(config)}
