"""Formats names and values from files for messages of one line."""

from __future__ import annotations

from typing import Any, NamedTuple

from raft_jax.terminal import one_line


class Unread(NamedTuple):
    """A placeholder for a value that was not requested."""

    kind: str


class Unreadable(NamedTuple):
    """A placeholder for a value that its library cannot decode."""

    problem: str


def shown(text: object) -> str:
    """A name from a file in printable form: a terminal would interpret control characters.

    Example:
      >>> shown("answer"), shown("an\\x1b[2Jswer")
      ('answer', "'an\\\\x1b[2Jswer'")
    """
    text = _short(text)
    return text if text.isprintable() else repr(text)


def quoted(text: object) -> str:
    """Like `shown`, but always in quotes."""
    return repr(_short(text))


def _short(text: object) -> str:
    text = str(text)
    return text if len(text) <= 60 else text[:59] + "…"


def brief(error: Exception) -> str:
    """A library's error in one line."""
    return one_line(f"{type(error).__name__}: {error}", 200)


def kind_of(value: Any) -> str:
    """The kind of a value, in words."""
    if isinstance(value, Unread):
        return value.kind
    if isinstance(value, Unreadable):
        return f"what cannot be read ({value.problem})"
    if isinstance(value, dict) and value:
        return f"an object with {', '.join(map(shown, list(value)[:4]))}"
    if isinstance(value, list) and value:
        of = {str: " of texts", dict: " of objects"}.get(type(value[0]), "")
        return f"a list{of}"
    kinds = {type(None): "null", str: "text", list: "an empty list", dict: "an empty object", bytes: "bytes"}
    return kinds.get(type(value), type(value).__name__)
