"""Parses the untrusted YAML text of a settings file into plain values, with limits on its size."""

from __future__ import annotations

import re
from typing import Any

from raft_jax.errors import InputError, require_train

MAX_VALUES = 10_000
# What other programs and the paper call our keys, for the error about an unknown one.
ALIASES = {
    "lr": "train.learning_rate",
    "bs": "train.batch_size",
    "batch": "train.batch_size",
    "wd": "train.weight_decay",
    "per_device_train_batch_size": "train.batch_size",
    "steps": "train.max_steps",
    "num_steps": "train.max_steps",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "warmup": "train.warmup_steps",
    "lr_scheduler_type": "train.schedule",
    "gradient_accumulation_steps": "train.num_micro_batches",
    "grad_accum": "train.num_micro_batches",
    "max_grad_norm": "train.max_gradient_norm",
    "clip": "train.max_gradient_norm",
    "save_steps": "train.checkpoint_every",
    "save_total_limit": "train.keep_checkpoints",
    "lora_r": "train.lora.rank",
    "lora_rank": "train.lora.rank",
    "r": "train.lora.rank",
    "lora_alpha": "train.lora.alpha",
    "target_modules": "train.lora.targets",
    "k": "train.top_k",
    "topk": "train.top_k",
    "beta": "train.ema_decay",
    "lambda": "train.fixed_weight",
    "tau": "refine.threshold",
    "temp": "train.temperature",
    "model_name": "model.source",
    "name": "model.source",
    "model_name_or_path": "model.source",
    "base_model": "model.source",
    "dataset": "data.path",
    "file": "data.path",
    "val_size": "data.held_out",
    "output_dir": "run_dir",
    "out": "run_dir",
    "method": "methods",
    "bf16": "model.dtype",
    "precision": "model.dtype",
    "gradient_checkpointing": "model.remat",
    "fusion_model": "refine.fuser",
}


def parse_yaml(text: str, place: str) -> dict[str, Any]:
    """Parses a YAML mapping into plain values; interpolations are not resolved.

    Raises:
      InputError: it is not YAML, not a mapping, nested too deeply, or too large with its aliases expanded.
    """
    require_train("omegaconf")
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        _require_small(yaml.compose(text, Loader=yaml.SafeLoader), place)
        loaded = OmegaConf.create(text)
        if not OmegaConf.is_dict(loaded):
            raise InputError(f"{place}: expected a YAML mapping of settings")
        return OmegaConf.to_container(loaded)
    except InputError:
        raise
    except OmegaConfBaseException as error:
        raise InputError(f"{place}: {_one_line(error)}") from error
    except RecursionError as error:
        raise InputError(f"{place}: not valid YAML (nested too deeply)") from error
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise InputError(f"{place}: not valid YAML ({_one_line(error)})") from error


def _require_small(root, place: str) -> None:
    """Limits the number of values of a YAML document with all aliases expanded, which can far exceed those written."""
    sizes: dict[int, int | None] = {}

    def size(node) -> int:
        if id(node) in sizes:
            if sizes[id(node)] is None:
                raise InputError(f"{place}: not valid YAML (an alias that holds itself; write the value out)")
            return sizes[id(node)]
        sizes[id(node)] = None
        children = node.value if isinstance(node.value, list) else []
        parts = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
        sizes[id(node)] = 1 + sum(map(size, parts))
        return sizes[id(node)]

    if root is not None and size(root) > MAX_VALUES:
        raise InputError(f"{place}: more than {MAX_VALUES} values; this is no file of settings")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def require_literal(settings: dict[str, Any], place: str) -> dict[str, Any]:
    """Returns the settings if no value is taken from outside the file; those would be saved and shown.

    Raises:
      InputError: a value has an interpolation with a resolver, such as the environment's; `${other.key}` is allowed.
    """
    for key, value in flat(settings).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and re.search(r"(?<!\\)\$\{[^}]*:", text):
                raise InputError(
                    f"{place}: {key} is {text}, which takes a value from outside the file and would be saved with the "
                    "results; write the value (a path may begin with ~), or let the shell do it, as in "
                    "run_dir=$HOME/runs. Secrets such as HF_TOKEN are read from the environment"
                )
    return settings


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config as a flat dict with dotted keys."""
    result: dict[str, Any] = {}
    for key, value in config.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return result
