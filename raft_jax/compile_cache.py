"""JAX's persistent cache of compiled programs: a run that goes on finds its programs, and need not compile them again.

A run has some fifty programs, whose compilation takes 10 to 30 minutes on a TPU.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

import jax

from raft_jax.errors import InputError
from raft_jax.files import unreadable, user_cache

AUTO, OFF = "auto", "off"


def use_compile_cache(setting: str) -> Path | None:
    """Turns the cache on, and returns its folder; None if there is none.

    A folder that JAX has been given otherwise (`JAX_COMPILATION_CACHE_DIR`) is left as it is. With several processes,
    JAX writes the cache from the first only, so the others find programs only in a folder that they share with it.

    Args:
      setting: "auto": in the user's cache folder on TPU and GPU; none on the CPU, whose programs may not run on another
        machine with the same home. "off". Or a folder.

    Raises:
      InputError: others may write to the folder, whose programs are run; or it cannot be made.
    """
    if setting == OFF or (setting == AUTO and jax.default_backend() == "cpu"):
        return None
    if path := jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        return Path(path)
    folder = user_cache() / "raft_jax/programs" if setting == AUTO else Path(setting).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
    except OSError as error:
        raise InputError(
            f"compilation_cache: {unreadable(folder, error)}; set it to another folder or to off"
        ) from error
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise InputError(
            f"compilation_cache: {folder} is not yours alone to write to, and programs in it are run; "
            f"`chmod go-w {folder}`, or set compilation_cache to another folder or to off"
        )
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder
