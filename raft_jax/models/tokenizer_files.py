"""Checks of a folder's tokenizer files for errors that transformers silently misreads or explains badly."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raft_jax.errors import InputError
from raft_jax.files import MAX_BYTES, is_there, read_object, read_text, require_regular
from raft_jax.terminal import one_line

CONFIG, SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FILES = (
    "tokenizer.json",
    CONFIG,
    SPECIAL_TOKENS,
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "tokenizer.model",
)
MAX_TEMPLATE_BYTES = 1 << 20
TEMPLATE_NAME = re.compile(r"\w[\w. -]*")


def check_files(folder: Path) -> None:
    """Raises InputError unless each tokenizer file is a regular file of sensible size with valid contents."""
    for path in [*(folder / name for name in FILES), *sorted(folder.glob("additional_chat_templates/*"))]:
        if path.suffix == ".jinja" and is_there(path):
            read_text(path, MAX_TEMPLATE_BYTES)
        elif is_there(path) and require_regular(path).stat().st_size > MAX_BYTES:
            raise InputError(f"{path}: larger than {MAX_BYTES >> 20} MiB; is it the right file?")
    for name in (CONFIG, SPECIAL_TOKENS):
        settings = read_object(folder / name, optional=True)
        for key in NAMED_TOKENS:
            _check_token(folder / name, key, settings.get(key), typed=name == CONFIG)
        for key in ("extra_special_tokens", "additional_special_tokens"):
            _check_tokens(folder / name, key, settings.get(key))
    _check_templates(folder / CONFIG, read_object(folder / CONFIG, optional=True).get("chat_template"))


def _check_token(path: Path, key: str, value: Any, typed: bool) -> None:
    is_object = isinstance(value, Mapping) and (not typed or value.get("__type") == "AddedToken")
    if value is None or isinstance(value, str) or (is_object and isinstance(value.get("content"), str)):
        return
    raise InputError(
        f"{path}: {key} is {one_line(repr(value))}; expected a token's text, null, or an object with "
        + ('"__type": "AddedToken" and ' if typed else "")
        + '"content": a text'
    )


def _check_tokens(path: Path, key: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, list | Mapping):
        raise InputError(
            f"{path}: {key} is {one_line(repr(value))}; expected a list of tokens, or an object of names and tokens"
        )
    for name, token in value.items() if isinstance(value, Mapping) else enumerate(value):
        _check_token(path, f"{key}[{name!r}]", token, typed=False)
        if token is None:
            raise InputError(f"{path}: {key}[{name!r}] is null; expected a token's text")


def _check_templates(path: Path, value: Any) -> None:
    """One template, or several with names: a list of objects, or an object."""
    if value is None or isinstance(value, str):
        return
    named = value
    if isinstance(value, list) and all(isinstance(entry, Mapping) for entry in value):
        named = {entry.get("name"): entry.get("template") for entry in value}
    if not isinstance(named, Mapping) or not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise InputError(
            f"{path}: chat_template is {one_line(repr(value), 120)}; expected a text, an object of names "
            'and texts, or a list of {"name": ..., "template": ...}'
        )


def default_template(templates: str | Mapping[str, str] | None, source: str) -> str:
    """The template for rendering chats."""
    advice = "put the right one in chat_template.jinja"
    if source.lower().endswith(".gguf"):
        advice = "set the field tokenizer.chat_template, for example with gguf-new-metadata --chat-template"
    if isinstance(templates, Mapping):
        if bad := [name for name in templates if not TEMPLATE_NAME.fullmatch(name)]:
            raise InputError(f"{source}: the name {bad[0]!r} of a chat template; use letters, digits, '.', '_' and '-'")
        if templates and "default" not in templates:
            raise InputError(f"{source}: has the templates {', '.join(templates)} and no default; {advice}")
        templates = templates.get("default")
    if templates:
        return templates
    if (Path(source) / "chat_template.json").exists():
        advice = "chat_template.json is not read; put its template in chat_template.jinja"
        raise InputError(f"{source}: no chat template; {advice}")
    raise InputError(f"{source}: no chat template; an instruction-tuned model is needed, or {advice}")


def configured_stops(folder: Path) -> tuple[str, list[int]]:
    """The eos_token_id of generation_config.json, or else of config.json: the file's name, and the ids."""
    for name in ("generation_config.json", "config.json"):
        settings = read_object(folder / name, optional=True)
        value = settings.get("eos_token_id")
        if value is None and isinstance(text := settings.get("text_config"), Mapping):  # of a vision-language model
            value = text.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(index, int) and not isinstance(index, bool) and index >= 0 for index in ids):
            raise InputError(
                f"{folder / name}: eos_token_id is {one_line(repr(value))}; expected a token's id (0 or "
                "more), or a list of ids"
            )
        if ids:
            return name, ids
    return "", []
