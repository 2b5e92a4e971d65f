"""Supported sentence encoders: conversion of a folder's configuration, the stored key of each parameter, and checks.

A family is a row of `FAMILIES`: a key table, as in raft_jax.models.families, and the first position. Letters
beyond those of raft_jax.losses: P rows of the position table, Y token types, R buckets of relative position.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from raft_jax.errors import InputError
from raft_jax.files import read_json, read_object
from raft_jax.models.families import Stored
from raft_jax.models.weights import SafetensorsFolder
from raft_jax.terminal import one_line

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}
POOLINGS = ("cls", "max", "mean")
POOLING_FLAGS = {  # flags of sentence-transformers before 6; several modes are concatenated in this order
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
MOST, MOST_LAYERS = 1 << 31, 1024  # upper limits of any size, and of the number of layers
NUM_RELATIVE_BUCKETS = 32  # transformers computes MPNet's buckets with 32, whatever the config says
# Keys that are not part of the encoder: a pooler that sentence encoders do not use, index buffers of old versions.
HEADS = ("cls.", "lm_head.", "classifier.", "qa_outputs.")  # of other tasks, stored with a prefixed encoder
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
_MPNET_ATTENTION = {
    "self.query": "attn.q",
    "self.key": "attn.k",
    "self.value": "attn.v",
    "output.dense": "attn.o",
    "output.LayerNorm": "LayerNorm",
}


def _mpnet_key(key: str) -> str:
    before, attention, after = key.partition(".attention.")
    name, dot, kind = after.rpartition(".")
    return before + attention + _MPNET_ATTENTION[name] + dot + kind if attention else key


MPNET_KEYS = {
    "relative_bias_RN": Stored("encoder.relative_attention_bias.weight", ("R", "N")),
    **{
        name: stored._replace(key=_mpnet_key(stored.key))
        for name, stored in BERT_KEYS.items()
        if name != "token_type_YD"
    },
}


class Family(NamedTuple):
    keys: dict[str, Stored]
    first_position: Callable[[Mapping[str, Any]], int]  # row of the position table for a text's first token


def _after_padding(hf: Mapping[str, Any]) -> int:
    pad_id = hf.get("pad_token_id", 1)
    if type(pad_id) is not int or pad_id < 0:
        raise InputError(f"pad_token_id is {pad_id!r}; expected a token's id: its positions begin after it")
    return pad_id + 1


_ROBERTA = Family(BERT_KEYS, _after_padding)
FAMILIES = {
    "bert": Family(BERT_KEYS, lambda hf: 0),
    "mpnet": Family(MPNET_KEYS, lambda hf: 2),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
}


@dataclass(frozen=True)
class EncoderConfig:
    """Everything about an encoder that is not an array. Hashable, so that it can be a static argument of jit."""

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
    values = read_object(path)
    _require_supported(values, path)
    name = values["model_type"]
    family = FAMILIES[name]
    width, num_heads = _size(values, "hidden_size", path), _size(values, "num_attention_heads", path)
    if width % num_heads:
        raise InputError(f"{path}: hidden_size {width} does not divide over {num_heads} attention heads")

    settings_path = model / "sentence_bert_config.json"
    settings = read_object(settings_path, optional=True)
    num_positions = _size(values, "max_position_embeddings", path)
    try:
        first_position = family.first_position(values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    max_tokens = _max_tokens(model, settings, settings_path, num_positions - first_position)
    poolings, prefix_is_pooled = _read_poolings(folder, modules)
    prefix = _default_prefix(folder) if prefix is None else prefix
    if prefix and not prefix_is_pooled:
        raise InputError(
            f"{folder}: its pooling leaves the prefix out (include_prompt: false), which is not "
            'supported; load it with prefix=""'
        )
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
        activation=values.get("hidden_act", "gelu"),
        norm_epsilon=_number(values, "layer_norm_eps", 1e-12, path),
        poolings=poolings,
        normalize="Normalize" in modules,
        max_tokens=max_tokens,
        lower_case=bool(settings.get("do_lower_case", False)),
        prefix=prefix,
    ), model


def _require_supported(values: dict[str, Any], path: Path) -> None:
    """Raises InputError if config.json needs arithmetic that the encoder does not implement."""
    name, activation = values.get("model_type"), values.get("hidden_act", "gelu")
    if not isinstance(name, str) or name not in FAMILIES:
        raise InputError(
            f"{path}: model_type {name!r} is not a supported sentence encoder; supported: {', '.join(FAMILIES)}"
        )
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise InputError(f"{path}: hidden_act {activation!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    if values.get("position_embedding_type", "absolute") != "absolute":
        raise InputError(
            f"{path}: position_embedding_type {values['position_embedding_type']!r} is not supported; "
            "supported: absolute"
        )
    if values.get("is_decoder"):
        raise InputError(f"{path}: is_decoder is true; a sentence encoder attends in both directions")
    buckets = values.get("relative_attention_num_buckets", NUM_RELATIVE_BUCKETS)
    if "relative_bias_RN" in FAMILIES[name].keys and buckets != NUM_RELATIVE_BUCKETS:
        raise InputError(
            f"{path}: relative_attention_num_buckets {buckets} is not supported; supported: {NUM_RELATIVE_BUCKETS}"
        )


def _max_tokens(model: Path, settings: dict[str, Any], settings_path: Path, available: int) -> int:
    """Maximum number of tokens per text, at most the number of available positions."""
    if available < 3:
        raise InputError(f"{model / 'config.json'}: max_position_embeddings leaves {available} positions for a text")
    if settings.get("max_seq_length") is not None:
        max_tokens = _size(settings, "max_seq_length", settings_path)
        if not 3 <= max_tokens <= available:
            raise InputError(
                f"{settings_path}: max_seq_length {max_tokens} is outside 3 to {available}, the positions "
                "that config.json provides"
            )
        return max_tokens
    path = model / "tokenizer_config.json"
    values = read_object(path, optional=True)
    limit = _number(values, "model_max_length", available, path)
    if limit < 3:
        raise InputError(f"{path}: model_max_length is {limit:g}; expected 3 or more")
    return int(min(available, limit))


def _number(values: dict[str, Any], name: str, default: float, path: Path) -> float:
    value = values.get(name)
    if value is None:
        return default
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        raise InputError(f"{path}: {name} is {one_line(repr(value), 60)}; expected a number")
    return float(value)


def load_parameters(folder: Path, config: EncoderConfig, dtype: jax.typing.DTypeLike) -> dict[str, jax.Array]:
    """Reads the parameters under our names, with layers stacked [L, ...]; every key and shape is checked.

    Raises:
      InputError: the file is missing, truncated or not safetensors; a key is missing or surplus; a tensor is not
        floating point or not finite; a shape is not that of config.json.
    """
    weights, keys = SafetensorsFolder(folder), FAMILIES[config.family].keys
    sizes = {
        "V": config.vocab_size,
        "P": config.num_positions,
        "Y": config.num_token_types,
        "D": config.width,
        "N": config.num_heads,
        "H": config.width // config.num_heads,
        "F": config.ffn_width,
        "R": NUM_RELATIVE_BUCKETS,
    }
    wanted = {stored.key.format(layer): stored for stored in keys.values() for layer in range(config.num_layers)}
    stored_keys = weights.keys()
    prefix = _key_prefix(stored_keys, keys["token_VD"].key)
    present = {key.removeprefix(prefix) for key in stored_keys if key.startswith(prefix) or not key.startswith(HEADS)}
    for key, stored in wanted.items():
        if key not in present:
            raise InputError(f"{folder}: the weights lack {key}, expected with shape {_shape(stored, sizes)}")
    if surplus := present - set(wanted) - set(UNUSED_KEYS):
        raise InputError(
            f"{folder}: the weights hold {min(surplus)} ({len(surplus)} such in all), which is not part "
            f"of a {config.family} encoder of {config.num_layers} layers"
        )

    def read(name: str, key: str) -> np.ndarray:
        array, expected = weights.read(prefix + key), _shape(wanted[key], sizes)
        if array.shape != expected:
            raise InputError(f"{folder}: {key} has shape {array.shape}, and config.json asks for {expected}")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise InputError(f"{folder}: {key} holds {array.dtype}; expected float32, float16 or bfloat16")
        if not np.isfinite(array).all():
            raise InputError(f"{folder}: {key} holds numbers that are not finite; this encoder is broken")
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


def _key_prefix(keys: Collection[str], first: str) -> str:
    """The prefix of every key if the model was saved as part of another: "bert.", "0.auto_model.", …"""
    prefixes = sorted((key.removesuffix(first) for key in keys if key == first or key.endswith("." + first)), key=len)
    return prefixes[0] if prefixes else ""


def _letters(name: str) -> str:
    return name.rpartition("_")[2]


def _shape(stored: Stored, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[letter] for letter in dim) for dim in stored.dims)


def _read_modules(folder: Path) -> dict[str, str]:
    """{"Transformer": subfolder, "Pooling": subfolder, "Normalize": subfolder}, of those that modules.json names."""
    path = folder / "modules.json"
    if not path.exists():
        return {}  # a plain transformers folder: sentence-transformers adds mean pooling only
    entries = read_json(path)
    try:
        modules = {entry["type"].rsplit(".", 1)[-1]: str(Path(entry["path"])) for entry in entries}
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: expected a list of modules, each with a type and a path") from error
    if list(modules) not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise InputError(
            f"{path}: the modules {', '.join(modules)} are not supported; "
            "supported: Transformer, Pooling and, optionally, Normalize"
        )
    return modules


def _read_poolings(folder: Path, modules: dict[str, str]) -> tuple[tuple[str, ...], bool]:
    if "Pooling" not in modules:
        return ("mean",), True
    path = _inside(folder, modules["Pooling"]) / "config.json"
    values = read_object(path)
    modes = values.get("pooling_mode", [mode for flag, mode in POOLING_FLAGS.items() if values.get(flag)])
    if not isinstance(modes, str | list):
        raise InputError(f"{path}: pooling_mode is {modes!r}; supported: {', '.join(POOLINGS)}")
    modes = (modes,) if isinstance(modes, str) else tuple(modes) or ("mean",)
    for mode in modes:
        if mode not in POOLINGS:
            raise InputError(f"{path}: pooling mode {mode!r} is not supported; supported: {', '.join(POOLINGS)}")
    return modes, bool(values.get("include_prompt", True))


def _default_prefix(folder: Path) -> str:
    path = folder / "config_sentence_transformers.json"
    values = read_object(path, optional=True)
    name, prompts = values.get("default_prompt_name"), values.get("prompts") or {}
    if name is None:
        return ""
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise InputError(f"{path}: prompts is {prompts!r}; expected an object of texts")
    if not isinstance(name, str) or name not in prompts:
        raise InputError(f"{path}: default_prompt_name {name!r} is not among its prompts ({', '.join(prompts)})")
    return prompts[name]


def _inside(folder: Path, subfolder: str) -> Path:
    try:
        path = (folder / subfolder).resolve()
        inside = path.is_relative_to(folder.resolve()) and bool(os.fsencode(path))
    except ValueError:  # not a valid file name
        inside = False
    if not inside:
        raise InputError(f"{folder / 'modules.json'}: the path {subfolder!r} leaves the folder")
    return path


def _size(values: dict[str, Any], name: str, path: Path) -> int:
    value = values.get(name)
    most = MOST_LAYERS if name == "num_hidden_layers" else MOST
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise InputError(f"{path}: {name} is {one_line(repr(value), 60)}; expected a whole number from 1 to {most}")
    return value
