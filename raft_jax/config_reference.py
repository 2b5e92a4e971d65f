"""Generates docs/configuration.md from config.py: `python -m raft_jax.config_reference > docs/configuration.md`."""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import tokenize
from typing import Any
from unittest import mock

from raft_jax import config, endpoint_config
from raft_jax.config import Config, DataConfig, EndpointConfig, ModelConfig

HEAD = """\
# Configuration

Every key of a config, written by `python -m raft_jax.config_reference > docs/configuration.md` from
`raft_jax/config.py`; `tests/test_documentation.py` fails where this page is out of date.

A config is a YAML file; on the command line `key.path=value` replaces what it says, as in
`raft-jax run configs/own-data.yaml train.learning_rate=1e-5 methods=[sft,raft]`. Keys that are not given have the
default of the table, which is the paper's wherever the paper has one; keys without a default have to be given. An
unknown key, a wrong type or a value that is not allowed is one line and exit code 2, before anything is computed.
`null` means "none".

[configs/own-data.yaml](../configs/own-data.yaml) is a commented config to begin with. See [data](data.md) for `data.*`,
[refinement](refinement.md) for `refine.*` and `endpoints.*`, [evaluation](evaluation.md) for `evaluate.*`,
[models](models.md) for `model.*`, `encoder.*` and `train.lora.*`, [TPU](tpu.md) for `mesh.*`.
"""


@dataclasses.dataclass(frozen=True)
class Key:
    """One key: its dotted name, type, default ("" if the key is required), allowed values and comment."""

    name: str
    type: str
    default: str
    allowed: str
    comment: str


def reference() -> str:
    """The text of the page: a table for the keys of the run itself, then one for each group."""
    allowed = allowed_values()
    parts = [HEAD]
    for prefix, group in groups(Config):
        title = f"`{prefix[:-1]}`" if prefix else "The run"
        rows = [
            f"| `{key.name}` | {key.type} | {key.default} | {key.allowed} | {key.comment} |"
            for key in keys_of(prefix, group, allowed)
        ]
        parts.append(
            "\n".join(
                [
                    f"## {title}",
                    "",
                    inspect.cleandoc(group.__doc__),
                    "",
                    "| key | type | default | allowed | what |",
                    "|---|---|---|---|---|",
                    *rows,
                    "",
                ]
            )
        )
    return "\n".join(parts)


def groups(group: type, prefix: str = "") -> list[tuple[str, type]]:
    """A dataclass of the config and those nested in it, each with the prefix of its keys."""
    nested = [(prefix, group)]
    for field in dataclasses.fields(group):
        inner = field.default_factory
        if dataclasses.is_dataclass(inner):
            nested += groups(inner, f"{prefix}{field.name}.")
        elif "values" in field.metadata:
            nested += groups(field.metadata["values"], f"{prefix}{field.name}.NAME.")
    return nested


def keys_of(prefix: str, group: type, allowed: dict[str, str]) -> list[Key]:
    """The keys of one dataclass, without nested groups."""
    comments = comments_of(group)
    return [
        Key(
            prefix + field.name,
            _cell(str(field.type).replace("None", "null")),
            _default(field),
            _cell(allowed.get(prefix + field.name, "")),
            _cell(comments.get(field.name, "")),
        )
        for field in dataclasses.fields(group)
        if not dataclasses.is_dataclass(field.default_factory) and "values" not in field.metadata
    ]


def comments_of(group: type) -> dict[str, str]:
    """The end-of-line comment of each field in config.py."""
    lines, comments = inspect.getsource(group).splitlines(), {}
    names = {field.name for field in dataclasses.fields(group)}
    for token in tokenize.generate_tokens(io.StringIO("\n".join(lines)).readline):
        if token.type == tokenize.COMMENT and (name := token.line.partition(":")[0].strip()) in names:
            comments[name] = token.string.lstrip("# ")
    return comments


def allowed_values() -> dict[str, str]:
    """The allowed values of each key, found by running the checks and recording their arguments."""
    allowed_by_key: dict[str, str] = {}

    def record(condition: bool, key: str, value: Any, allowed: str) -> None:
        allowed_by_key[key] = f"{allowed_by_key[key]}; {allowed}" if key in allowed_by_key else allowed

    with mock.patch.object(config, "require", record), mock.patch.object(endpoint_config, "require", record):
        endpoints = {"NAME": EndpointConfig(base_url="", model="")}
        Config(run_dir="", model=ModelConfig(source=""), data=DataConfig(path=""), endpoints=endpoints)
    return allowed_by_key


def _default(field: dataclasses.Field) -> str:
    value = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    if value == "???":
        return ""
    if isinstance(value, list):
        return f"`[{', '.join(value)}]`"
    return f"`{json.dumps(value).strip(chr(34)) or chr(34) * 2}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


if __name__ == "__main__":
    print(reference(), end="")
