"""Every example in a docstring runs."""

import doctest
import importlib
from pathlib import Path

import pytest

import raft_jax

ROOT = Path(raft_jax.__file__).parent
MODULES = sorted(
    ".".join(("raft_jax", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
    for path in ROOT.rglob("*.py")
    if ">>>" in path.read_text("utf-8") and path.parent.name != "losses"  # those: tests/losses/test_docs.py
)


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried and not failed
