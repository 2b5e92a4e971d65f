"""The errors that are the user's to mend."""

from __future__ import annotations

import importlib.util


class InputError(ValueError):
    """Bad input: a file, a row, a config value or a run folder.

    The message is one line: what was given, where, and what to do. The command line prints it
    and exits with code 2.
    """


class MissingExtra(InputError, ImportError):
    """A package that only an extra of raft-jax brings is not installed."""


def require_train(*modules: str) -> None:
    """Stands before imports of packages that raft-jax[train] brings and raft-jax alone does not.

    Raises:
      MissingExtra: one of the modules, given by top-level names, is not installed.
    """
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        verb = "is" if len(missing) == 1 else "are"
        raise MissingExtra(
            f"{', '.join(missing)} {verb} not installed; everything but raft_jax.losses needs: "
            "pip install 'raft-jax[train]'"
        )
