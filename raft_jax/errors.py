"""The one error that is the user's to mend."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input: a file, a row, a config value or a run folder.

    The message is one line: what was given, where, and what to do. The command line prints it
    and exits with code 2.
    """
