"""Supported decoders. A family is a row of `FAMILIES`: the keys of its tensors and how its config.json is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from raft_jax.errors import InputError
from raft_jax.models.config import DecoderConfig, parameter_table
from raft_jax.models.families import keys, quantised, settings
from raft_jax.models.families.keys import Stored


class Family(NamedTuple):
    """One row of `FAMILIES`."""

    architecture: str  # the class in transformers
    read: Callable[[settings.Config, settings.Fields], settings.Fields]
    keys: Mapping[str, Stored] = keys.LLAMA
    refused: tuple[str, ...] = ()  # options that change the arithmetic and are not implemented


BIASES = ("attention_bias", "mlp_bias")
BIDIRECTIONAL = ("attention_bias", "use_bidirectional_attention")
FAMILIES = {
    "llama": Family("LlamaForCausalLM", settings.llama, refused=(*BIASES, "layer_types")),
    "smollm3": Family("SmolLM3ForCausalLM", settings.smollm3, refused=BIASES),
    "phi3": Family("Phi3ForCausalLM", settings.phi3, keys.PHI3, refused=("layer_types",)),
    "qwen2": Family("Qwen2ForCausalLM", settings.qwen2),
    "qwen3": Family("Qwen3ForCausalLM", settings.qwen3, refused=BIASES[:1]),
    "mistral": Family("MistralForCausalLM", settings.mistral, refused=("layer_types",)),
    "gemma2": Family("Gemma2ForCausalLM", settings.gemma2, keys.GEMMA, BIDIRECTIONAL),
    "gemma3_text": Family("Gemma3ForCausalLM", settings.gemma3, keys.GEMMA, BIDIRECTIONAL),
}
# Vision-language models: the family of their decoder, the only part that is read.
DECODER_OF = {"gemma3": "gemma3_text"}


def decoder_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a vision-language model's decoder; any other config.json unchanged."""
    name = hf.get("model_type")
    if not isinstance(name, str) or name not in DECODER_OF:
        return dict(hf)
    text = hf.get("text_config")
    if not isinstance(text, Mapping):
        raise InputError(f"config.json: {name} needs an object under the key text_config")
    shared = {
        key: hf[key]
        for key in ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", *quantised.CONFIG_KEYS)
        if hf.get(key) is not None
    }
    if isinstance(tied := hf.get("tie_word_embeddings"), bool):  # the whole model's value counts, as in transformers
        text = {**text, "tie_word_embeddings": tied}
    family = DECODER_OF[name]
    return {**shared, **text, "model_type": family, "architectures": [FAMILIES[family].architecture]}


def decoder_key(key: str) -> str | None:
    """The decoder's key for a tensor of a vision-language model; None for a tensor outside the decoder."""
    for prefix, ours in (
        ("model.language_model.", "model."),
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
        ("lm_head.", "lm_head."),
    ):
        if key.startswith(prefix):
            return ours + key.removeprefix(prefix)
    return None


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Converts a `config.json` to a DecoderConfig.

    Raises:
      InputError: the model type is not supported (the message lists those that are), a key is missing, or an option
        needs arithmetic that is not implemented.
    """
    name = hf.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        supported = ", ".join(sorted(FAMILIES | DECODER_OF))
        raise InputError(f"config.json: model_type {name!r} is not supported; supported: {supported}")
    family = FAMILIES[name]
    quantised.refuse_config(hf)
    for key in (*family.refused, "per_layer_config"):
        if hf.get(key):
            raise InputError(f"config.json: {name} with {key} is not supported")
    hf = settings.as_transformers_reads(hf)
    fields = settings.plain(hf)
    return DecoderConfig(family=name, **fields | family.read(hf, fields))


def stored_keys(config: DecoderConfig) -> dict[str, Stored]:
    """How a Hugging Face folder stores each parameter of this config."""
    return {name: FAMILIES[config.family].keys[name] for name in parameter_table(config)}
