"""Reads a config from YAML with dotted overrides, strictly, and writes it."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, cast

from raft_jax.config import Config
from raft_jax.errors import InputError, require_train
from raft_jax.files import read_text
from raft_jax.settings_text import ALIASES, flat, parse_yaml, require_literal


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Reads a YAML file and applies `key.path=value` overrides.

    Raises:
      InputError: no such file, not YAML, an unknown key (with the one that was likely meant), a wrong type, a
        missing value, or a value out of range.
    """
    require_train("omegaconf")
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = Path(path).expanduser()
    if not path.exists():
        raise InputError(f"{path}: no such file; configs/ holds examples")
    place = str(path)
    try:
        settings = require_literal(parse_yaml(read_text(path), place), place)
        merged = OmegaConf.merge(OmegaConf.structured(Config), settings)
        for override in overrides:
            if "=" not in override.lstrip("="):
                raise InputError(f"override {override!r}: expected key.path=value")
            place = f"override {override!r}"
            merged = OmegaConf.merge(merged, require_literal(_plain(OmegaConf.from_dotlist([override])), place))
        if missing := sorted(OmegaConf.missing_keys(merged)):
            raise InputError(f"{path}: no value for {', '.join(missing)}")
        for key, value in flat(_plain(merged)).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"config: {key} is {value}; allowed: a finite number")
        return cast(Config, OmegaConf.to_object(merged))
    except InputError:
        raise
    except OmegaConfBaseException as error:
        cause = error.__cause__ if isinstance(error.__cause__, InputError) else None
        raise cause or InputError(f"{place}: {_one_line(error)}") from error
    except RecursionError as error:
        raise InputError(f"{place}: settings that are nested too deeply or refer to each other in a circle") from error
    except Exception as error:  # the YAML parser, and what OmegaConf lets through of a value
        raise InputError(f"{place}: not valid YAML ({_one_line(error)})") from error


def _one_line(error: Exception) -> str:
    """The sentence of a library's error; OmegaConf adds lines about its own types."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    full_key = next((line.partition(":")[2].strip() for line in lines if line.startswith("full_key:")), "")
    kept = [line for line in lines if not line.startswith(("full_key:", "object_type=", "reference_type="))]
    sentence = " ".join(kept)
    if parsed := re.match(
        r"(?:Merge error|Invalid type assigned): \w+ is not a subclass of (\w+)Config\. value: (.*)", sentence
    ):
        sentence = f"{parsed[1].lower()} is a group of settings, got {parsed[2]}"
    elif "is not a ListConfig" in sentence:
        sentence = "expected a list, as in [a, b]"
    elif (parsed := re.match(r"Key '(\w+)' not in '\w+'", sentence)) and parsed[1].lower() in ALIASES:
        sentence = f"Key '{parsed[1]}' is not known; here it is {ALIASES[parsed[1].lower()]}"
    elif re.match(r"Key '(api_)?key' not in 'EndpointConfig'", sentence):
        sentence = "a key belongs into an environment variable, and the variable's name into api_key_env"
    elif parsed := re.fullmatch(r"Key '(\w+)' not in 'Config'", sentence):
        paths = (f".{key}.".partition(f".{parsed[1]}.") for key in flat(_defaults()))
        elsewhere = sorted({f"{above[1:]}.{parsed[1]}" for above, name, _ in paths if name})
        sentence += f"; there is {' and '.join(elsewhere)}" if elsewhere else ""
    return f"{full_key}: {sentence}" if full_key and full_key not in sentence else sentence


def _plain(config) -> dict[str, Any]:
    """An OmegaConf mapping as plain values."""
    from omegaconf import OmegaConf

    return cast(dict[str, Any], OmegaConf.to_container(config))


def _defaults() -> dict[str, Any]:
    from omegaconf import OmegaConf

    return _plain(OmegaConf.structured(Config))


def to_dict(config: Config) -> dict[str, Any]:
    """A config as nested dictionaries of plain values."""
    from omegaconf import OmegaConf

    return _plain(OmegaConf.structured(config))


def to_yaml(config: Config) -> str:
    """The config as YAML, every key written out."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))


def read_saved(path: Path) -> dict[str, Any]:
    """The dotted keys of a config that a run has saved; keys of other versions may be among them.

    Raises:
      InputError: it cannot be read, or is no config.
    """
    try:
        return flat(parse_yaml(read_text(path), str(path)))
    except InputError as error:
        raise InputError(f"{error}; the saved config is damaged: restore it, or set run_dir") from error
