"""MFU: against operations that are counted by hand, and against XLA's own count of a forward pass."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import make_config

from raft_jax.models import Model
from raft_jax.models.decoder import init_parameters
from raft_jax.tokens import Batch, Tokens
from raft_jax.train.throughput import Throughput, num_weights, peak_of


def devices(*kinds):
    return np.array([SimpleNamespace(device_kind=kind) for kind in kinds])


def tokens(*lengths):
    return Tokens(np.zeros((len(lengths), 9), np.int32), np.arange(9) < np.array(lengths)[:, None])


def test_peaks():
    assert peak_of(devices("TPU v5 lite", "TPU v5 lite")) == 2 * 197e12
    assert peak_of(devices("NVIDIA H100 80GB HBM3")) == 989e12
    assert peak_of(devices("TPU v5 lite", "cpu")) is None and peak_of(np.array(jax.devices())) is None
    assert peak_of(devices("TPU v5")) == 459e12


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_those_that_xla_multiplies_by(tied):
    """Two operations per weight and token; attention's products over one token are next to nothing."""
    config = make_config(64, tied_embeddings=tied, width=128, ffn_width=256)
    params = jax.eval_shape(lambda key: init_parameters(config, key), jax.random.key(0))
    model = Model(config, params)
    counted = jax.jit(model.apply).lower(params, jax.ShapeDtypeStruct((8, 1), jnp.int32)).compile().cost_analysis()
    per_layer = num_weights(params) - 64 * 128
    # The scan over two layers is counted once.
    expected = 2 * 8 * (per_layer / 2 + 64 * 128)
    assert counted["flops"] == pytest.approx(expected, rel=0.05)


def test_shares():
    params = {"gate_LDF": np.zeros((2, 5, 10)), "embedding_VD": np.zeros((20, 5)), "mlp_norm_LD": np.zeros((2, 5))}
    weights = 2 * 5 * 10 + 20 * 5
    found = Throughput(params, devices("TPU v5 lite"))
    batch = Batch(tokens(2, 3), tokens(4, 1), tokens(6, 6), np.arange(2))
    rollout, train = 2 * weights * (5 + 8), weights * (6 * (5 + 5 + 8) + 2 * (12 + 8))
    shares = found.metrics(batch, 8, seconds=4.0, rollout_seconds=3.0)
    assert shares.pop("tokens_per_second") == (5 + 8) / 4
    expected = {"mfu": (rollout + train) / 4, "rollout_mfu": rollout / 3, "train_mfu": train}
    assert shares == pytest.approx({name: value / 197e12 for name, value in expected.items()})
    without = found.metrics(batch, 0, seconds=2.0, rollout_seconds=0.0)
    assert without.pop("tokens_per_second") == 5 / 2
    assert without == pytest.approx({name: 6 * weights * 10 / 2 / 197e12 for name in ("mfu", "train_mfu")})
    adapted = Throughput(params, devices("TPU v5 lite"), adapters=True).metrics(batch, 0, 2.0, 0.0)
    assert adapted.pop("tokens_per_second") == 5 / 2
    assert adapted == pytest.approx({name: 4 / 6 * value for name, value in without.items()})
    anchored = Throughput(params, devices("TPU v5 lite"), anchors=True).metrics(batch, 0, 2.0, 0.0)
    assert anchored.pop("tokens_per_second") == 5 / 2
    assert anchored == pytest.approx({name: 8 / 6 * value for name, value in without.items()})
    assert Throughput(params, devices("cpu")).metrics(batch, 8, 4.0, 3.0) == {"tokens_per_second": (5 + 8) / 4}
