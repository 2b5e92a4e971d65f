"""Which sentence encoders are known: a folder's configuration → ours, where each parameter is stored, the checks.

A family is a row of `FAMILIES`: a key table, as in raft_jax.models.families, and where positions begin. Letters
beyond those of raft_jax.losses: P rows of the position table, Y token types, R buckets of relative position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from raft_jax.errors import InputError
from raft_jax.models.families import Stored
from raft_jax.models.weights import SafetensorsFolder, read_json

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}
POOLINGS = ("cls", "max", "mean")
POOLING_FLAGS = {  # how sentence-transformers before 6 writes the mode; several modes are concatenated in this order
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
NUM_RELATIVE_BUCKETS = 32  # transformers computes MPNet's buckets with 32, whatever the config says
# What files hold beside the encoder: a pooler that sentence encoders do not use, counters of old versions.
UNUSED_KEYS = ("pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids", "embeddings.token_type_ids")

BERT_KEYS = {
    "token_VD": Stored("embeddings.word_embeddings.weight", ("V", "D")),
    "position_PD": Stored("embeddings.position_embeddings.weight", ("P", "D")),
    "token_type_YD": Stored("embeddings.token_type_embeddings.weight", ("Y", "D")),
    "norm_scale_D": Stored("embeddings.LayerNorm.weight", ("D",)),
    "norm_bias_D": Stored("embeddings.LayerNorm.bias", ("D",)),
    "query_LDNH": Stored("encoder.layer.{}.attention.self.query.weight", ("NH", "D")),
    "query_bias_LNH": Stored("encoder.layer.{}.attention.self.query.bias", ("NH",)),
    "key_LDNH": Stored("encoder.layer.{}.attention.self.key.weight", ("NH", "D")),
    "key_bias_LNH": Stored("encoder.layer.{}.attention.self.key.bias", ("NH",)),
    "value_LDNH": Stored("encoder.layer.{}.attention.self.value.weight", ("NH", "D")),
    "value_bias_LNH": Stored("encoder.layer.{}.attention.self.value.bias", ("NH",)),
    "output_LNHD": Stored("encoder.layer.{}.attention.output.dense.weight", ("D", "NH")),
    "output_bias_LD": Stored("encoder.layer.{}.attention.output.dense.bias", ("D",)),
    "attention_norm_scale_LD": Stored("encoder.layer.{}.attention.output.LayerNorm.weight", ("D",)),
    "attention_norm_bias_LD": Stored("encoder.layer.{}.attention.output.LayerNorm.bias", ("D",)),
    "up_LDF": Stored("encoder.layer.{}.intermediate.dense.weight", ("F", "D")),
    "up_bias_LF": Stored("encoder.layer.{}.intermediate.dense.bias", ("F",)),
    "down_LFD": Stored("encoder.layer.{}.output.dense.weight", ("D", "F")),
    "down_bias_LD": Stored("encoder.layer.{}.output.dense.bias", ("D",)),
    "mlp_norm_scale_LD": Stored("encoder.layer.{}.output.LayerNorm.weight", ("D",)),
    "mlp_norm_bias_LD": Stored("encoder.layer.{}.output.LayerNorm.bias", ("D",)),
}
_MPNET_ATTENTION = {"self.query": "attn.q", "self.key": "attn.k", "self.value": "attn.v", "output.dense": "attn.o",
                    "output.LayerNorm": "LayerNorm"}


def _mpnet_key(key: str) -> str:
    before, attention, after = key.partition(".attention.")
    name, dot, kind = after.rpartition(".")
    return before + attention + _MPNET_ATTENTION[name] + dot + kind if attention else key


MPNET_KEYS = {
    "relative_bias_RN": Stored("encoder.relative_attention_bias.weight", ("R", "N")),
    **{name: stored._replace(key=_mpnet_key(stored.key)) for name, stored in BERT_KEYS.items()
       if name != "token_type_YD"},
}


class Family(NamedTuple):
    keys: dict[str, Stored]
    first_position: Callable[[Mapping[str, Any]], int]  # row of the position table that a text's first token takes


_ROBERTA = Family(BERT_KEYS, lambda hf: hf.get("pad_token_id", 1) + 1)
FAMILIES = {
    "bert": Family(BERT_KEYS, lambda hf: 0),
    "mpnet": Family(MPNET_KEYS, lambda hf: 2),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
}


@dataclass(frozen=True)
class EncoderConfig:
    """Everything about an encoder that is not an array. Hashable, so that it is a static argument of jit."""

    family: str
    vocab_size: int
    num_layers: int
    width: int
    num_heads: int
    ffn_width: int
    num_positions: int
    num_token_types: int
    first_position: int
    activation: str
    norm_epsilon: float
    poolings: tuple[str, ...]
    normalize: bool
    max_tokens: int
    lower_case: bool
    prefix: str

    @property
    def embedding_width(self) -> int:
        return self.width * len(self.poolings)


def read_config(folder: Path, prefix: str | None) -> tuple[EncoderConfig, Path]:
    """Reads the folder's configuration files.

    Returns:
      The configuration, and the folder of the transformer itself (config.json, tokenizer.json, weights), which
      modules.json may place in a subfolder.
    """
    modules = _read_modules(folder)
    model = _inside(folder, modules.get("Transformer", ""))
    path = model / "config.json"
    values = _read_object(path)
    name = values.get("model_type")
    if name not in FAMILIES:
        raise InputError(f"{path}: model_type {name!r} is not a supported sentence encoder; "
                         f"supported: {', '.join(FAMILIES)}")
    activation = values.get("hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise InputError(f"{path}: hidden_act {activation!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    if values.get("position_embedding_type", "absolute") != "absolute":
        raise InputError(f"{path}: position_embedding_type {values['position_embedding_type']!r} is not supported; "
                         "supported: absolute")
    if values.get("is_decoder"):
        raise InputError(f"{path}: is_decoder is true; a sentence encoder attends in both directions")
    family = FAMILIES[name]
    buckets = values.get("relative_attention_num_buckets", NUM_RELATIVE_BUCKETS)
    if "relative_bias_RN" in family.keys and buckets != NUM_RELATIVE_BUCKETS:
        raise InputError(f"{path}: relative_attention_num_buckets {buckets} is not supported; "
                         f"supported: {NUM_RELATIVE_BUCKETS}")
    width, num_heads = _size(values, "hidden_size", path), _size(values, "num_attention_heads", path)
    if width % num_heads:
        raise InputError(f"{path}: hidden_size {width} does not divide over {num_heads} attention heads")

    settings_path = model / "sentence_bert_config.json"
    settings = _read_object(settings_path) if settings_path.exists() else {}
    num_positions, first_position = _size(values, "max_position_embeddings", path), family.first_position(values)
    if settings.get("max_seq_length") is None:
        tokenizer_path = model / "tokenizer_config.json"
        limit = _read_object(tokenizer_path).get("model_max_length") if tokenizer_path.exists() else None
        max_tokens = int(min(num_positions - first_position, limit or num_positions))
    else:
        max_tokens = _size(settings, "max_seq_length", settings_path)
        if not 3 <= max_tokens <= num_positions - first_position:
            raise InputError(f"{settings_path}: max_seq_length {max_tokens} is outside 3 to "
                             f"{num_positions - first_position}, the positions that config.json provides")
    poolings, prefix_is_pooled = _read_poolings(folder, modules)
    prefix = _default_prefix(folder) if prefix is None else prefix
    if prefix and not prefix_is_pooled:
        raise InputError(f"{folder}: its pooling leaves the prefix out (include_prompt: false), which is not "
                         'supported; load it with prefix=""')
    return EncoderConfig(
        family=name,
        vocab_size=_size(values, "vocab_size", path),
        num_layers=_size(values, "num_hidden_layers", path),
        width=width,
        num_heads=num_heads,
        ffn_width=_size(values, "intermediate_size", path),
        num_positions=num_positions,
        num_token_types=_size(values, "type_vocab_size", path) if "token_type_YD" in family.keys else 0,
        first_position=first_position,
        activation=activation,
        norm_epsilon=float(values.get("layer_norm_eps", 1e-12)),
        poolings=poolings,
        normalize="Normalize" in modules,
        max_tokens=max_tokens,
        lower_case=bool(settings.get("do_lower_case", False)),
        prefix=prefix,
    ), model


def load_parameters(folder: Path, config: EncoderConfig, dtype: jax.typing.DTypeLike) -> dict[str, jax.Array]:
    """Reads the parameters under our names, those of the layers stacked [L, ...]; every key and shape is checked.

    Raises:
      InputError: the file is missing, truncated or not safetensors; a key is missing, surplus or not floating
        point; a shape is not the one that config.json asks for.
    """
    weights, keys = SafetensorsFolder(folder), FAMILIES[config.family].keys
    sizes = {
        "V": config.vocab_size, "P": config.num_positions, "Y": config.num_token_types, "D": config.width,
        "N": config.num_heads, "H": config.width // config.num_heads, "F": config.ffn_width, "R": NUM_RELATIVE_BUCKETS,
    }
    wanted = {stored.key.format(layer): stored for stored in keys.values() for layer in range(config.num_layers)}
    found = weights.keys()
    for key, stored in wanted.items():
        if key not in found:
            raise InputError(f"{folder}: the weights lack {key}, expected with shape {_shape(stored, sizes)}")
    if surplus := found - set(wanted) - set(UNUSED_KEYS):
        raise InputError(f"{folder}: the weights hold {min(surplus)} ({len(surplus)} such in all), which is not part "
                         f"of a {config.family} encoder of {config.num_layers} layers")

    def read(name: str, key: str) -> np.ndarray:
        array, expected = weights.read(key), _shape(wanted[key], sizes)
        if array.shape != expected:
            raise InputError(f"{folder}: {key} has shape {array.shape}, and config.json asks for {expected}")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise InputError(f"{folder}: {key} holds {array.dtype}; expected float32, float16 or bfloat16")
        letters, ours = "".join(wanted[key].dims), _letters(name).removeprefix("L")
        array = array.reshape([sizes[letter] for letter in letters])
        return array.transpose([letters.index(letter) for letter in ours])

    parameters = {}
    for name, stored in keys.items():
        if _letters(name).startswith("L"):
            array = np.stack([read(name, stored.key.format(layer)) for layer in range(config.num_layers)])
        else:
            array = read(name, stored.key)
        parameters[name] = jnp.asarray(array, dtype)
    return parameters


def _letters(name: str) -> str:
    return name.rpartition("_")[2]


def _shape(stored: Stored, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[letter] for letter in dim) for dim in stored.dims)


def _read_modules(folder: Path) -> dict[str, str]:
    """{"Transformer": subfolder, "Pooling": subfolder, "Normalize": subfolder}, as far as modules.json names them."""
    path = folder / "modules.json"
    if not path.exists():
        return {}  # a plain transformers folder: sentence-transformers gives it mean pooling and nothing more
    entries = read_json(path)
    try:
        modules = {entry["type"].rsplit(".", 1)[-1]: entry["path"] for entry in entries}
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: expected a list of modules, each with a type and a path") from error
    if list(modules) not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise InputError(f"{path}: the modules {', '.join(modules)} are not supported; "
                         "supported: Transformer, Pooling and, optionally, Normalize")
    return modules


def _read_poolings(folder: Path, modules: dict[str, str]) -> tuple[tuple[str, ...], bool]:
    if "Pooling" not in modules:
        return ("mean",), True
    path = _inside(folder, modules["Pooling"]) / "config.json"
    values = _read_object(path)
    modes = values.get("pooling_mode", [mode for flag, mode in POOLING_FLAGS.items() if values.get(flag)])
    modes = (modes,) if isinstance(modes, str) else tuple(modes) or ("mean",)
    for mode in modes:
        if mode not in POOLINGS:
            raise InputError(f"{path}: pooling mode {mode!r} is not supported; supported: {', '.join(POOLINGS)}")
    return modes, bool(values.get("include_prompt", True))


def _default_prefix(folder: Path) -> str:
    path = folder / "config_sentence_transformers.json"
    values = _read_object(path) if path.exists() else {}
    name, prompts = values.get("default_prompt_name"), values.get("prompts") or {}
    if name is None:
        return ""
    if name not in prompts:
        raise InputError(f"{path}: default_prompt_name {name!r} is not among its prompts ({', '.join(prompts)})")
    return prompts[name]


def _inside(folder: Path, subfolder: str) -> Path:
    path = (folder / subfolder).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise InputError(f"{folder / 'modules.json'}: the path {subfolder!r} leaves the folder")
    return path


def _size(values: dict[str, Any], name: str, path: Path) -> int:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{path}: {name} is {value!r}; expected a whole number of at least 1")
    return value


def _read_object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value
