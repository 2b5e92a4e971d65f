"""Each example trains a few steps, and its loss falls."""

import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"


LIBRARIES = {"flax_nnx_loop": "flax", "equinox_loop": "equinox", "maxtext_style_loss": "flax"}


def load(name):
    """Its library is no requirement of the losses: `make test-python` installs none."""
    pytest.importorskip(LIBRARIES[name])
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", LIBRARIES)
def test_example(name, capsys):
    losses = load(name).main(num_steps=4)
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert capsys.readouterr().out.count("\n") == 4


def test_another_divergence_is_one_argument_away():
    losses = load("equinox_loop").main(num_steps=2, distillation="whole")
    assert losses[-1] < losses[0]
