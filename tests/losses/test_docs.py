"""Every example in the docstrings and on the documentation page runs."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import jax.numpy as jnp
import pytest

from raft_jax import losses

MODULES = [f"raft_jax.losses.{module.name}" for module in pkgutil.iter_modules(losses.__path__)]
PAGE = Path(__file__).parents[2] / "docs" / "losses.md"
NAMES = {name: getattr(losses, name) for name in losses.__all__} | {"jnp": jnp}


@pytest.mark.parametrize("module", MODULES)
def test_docstrings(module):
    failed, _ = doctest.testmod(importlib.import_module(module), extraglobs=NAMES)
    assert not failed


def test_page():
    failed, tried = doctest.testfile(str(PAGE), module_relative=False)
    assert tried and not failed


@pytest.mark.parametrize("name", losses.__all__)
def test_every_public_name_is_on_the_page_and_documented(name):
    assert f"`{name}`" in PAGE.read_text() or f"{name}(" in PAGE.read_text()
    assert getattr(losses, name).__doc__
