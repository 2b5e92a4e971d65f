"""Errors that the user can fix."""

from __future__ import annotations

import importlib.util
from typing import Any


class InputError(ValueError):
    """Bad input: a file, a row, a config value or a run folder.

    The message is one line: what was given, where, and what to do. The command line prints it and exits with code 2.
    """


def require(condition: bool, key: str, value: Any, allowed: str) -> None:
    """Raises InputError with a setting's key, its value and what is allowed, unless the condition holds."""
    if not condition:
        raise InputError(f"config: {key} is {value!r}; allowed: {allowed}")


class MissingExtra(InputError, ImportError):
    """A package that an extra of raft-jax installs is missing."""


def require_train(*modules: str) -> None:
    """Checks that packages of the extra raft-jax[train] are installed. Call it before they are imported.

    Raises:
      MissingExtra: one of the modules, given by top-level names, is not installed.
    """
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        verb = "is" if len(missing) == 1 else "are"
        raise MissingExtra(
            f"{', '.join(missing)} {verb} not installed; everything but raft_jax.losses needs: "
            "pip install 'raft-jax[train]'"
        )
