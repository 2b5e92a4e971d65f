"""Packages built from the tree, and environments of their own to install them in, with what versions pip chooses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEFT_OUT = (".git", ".venv*", "runs", "packed", "__pycache__", "*.egg-info", "build", "dist")


def build_packages(folder: Path) -> tuple[Path, Path]:
    """Wheel and source distribution of a copy of the tree, by setuptools itself."""
    shutil.copytree(ROOT, folder / "tree", ignore=shutil.ignore_patterns(*LEFT_OUT))
    hooks = "from setuptools import build_meta\nbuild_meta.build_sdist('dist')\nbuild_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", hooks], cwd=folder / "tree", check=True, capture_output=True)
    dist = folder / "tree" / "dist"
    return next(dist.glob("*.whl")), next(dist.glob("*.tar.gz"))


def python_from(version: tuple[int, int]) -> str | None:
    """A Python of at least this version: this one, one on the path, or one of pyenv's."""
    if sys.version_info >= version:
        return sys.executable
    names = [f"python3.{minor}" for minor in range(version[1], version[1] + 2)]
    kept = sorted(Path("~/.pyenv/versions").expanduser().glob("3.*/bin/python3"))
    for candidate in (*names, *map(str, kept)):
        # pyenv's stand-ins are on the path whether or not they have something to run.
        asked = [candidate, "-c", f"import sys; sys.exit(sys.version_info < {version})"]
        with suppress(OSError):
            if subprocess.run(asked, capture_output=True).returncode == 0:
                return candidate
    return None


def make_environment(folder: Path, *requirements: object, python: str = sys.executable) -> Callable[..., str]:
    """`run(*arguments)` of a new environment's Python gives what it prints, and fails with what it complains of."""
    without = ("PYTHONPATH", "XLA_FLAGS")
    variables = {name: value for name, value in os.environ.items() if name not in without} | {"JAX_PLATFORMS": "cpu"}

    def run(*arguments: object, devices: int = 1) -> str:
        done = subprocess.run(
            [folder / "bin" / "python", *map(str, arguments)],
            env=variables | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"},
            cwd=folder,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    subprocess.run([python, "-m", "venv", folder], check=True)
    run("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile", *requirements)
    return run
