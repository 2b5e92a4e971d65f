"""transformers without its log, its warnings and torch, which it would import if it is installed."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def transformers_quietly() -> Iterator[None]:
    """Imports transformers and silences its logging and warnings: the faults that matter to us are raised as errors.

    torch takes seconds to import and is never used here; a program that wants transformers' torch models imports torch
    first.
    """
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    hidden = "torch" not in sys.modules and "transformers" not in sys.modules
    if hidden:
        sys.modules["torch"] = None
    try:
        try:
            import transformers  # noqa: F401
            from transformers import CONFIG_MAPPING  # noqa: F401
        finally:
            if hidden:
                del sys.modules["torch"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
