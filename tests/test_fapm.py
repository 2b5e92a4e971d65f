"""FAPM against its twin in float64 NumPy, and what it leaves as it is."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference
import pytest

from raft_jax.train.fapm import fapm

SHAPES = {
    "query_LDNH": (2, 4, 3, 2),
    "embedding_VD": (7, 4),
    "attention_norm_LD": (2, 4),
    "query_bias_LNH": (2, 3, 2),
}


@pytest.fixture(scope="module")
def models():
    random = np.random.default_rng(0)
    base = {name: random.normal(size=shape) for name, shape in SHAPES.items()}
    return {name: value + 0.1 * random.normal(size=value.shape) for name, value in base.items()}, base


@pytest.mark.parametrize("sparsity", [0.0, 0.35, 0.9, 1.0])
def test_each_matrix_is_pruned_as_the_twin_prunes_it(models, sparsity):
    tuned, base = models
    with jax.enable_x64(True):
        pruned = jax.device_get(fapm(*(jax.tree.map(jnp.asarray, one) for one in models), sparsity))
    np.testing.assert_array_equal(
        pruned["embedding_VD"], numpy_reference.fapm(tuned["embedding_VD"], base["embedding_VD"], sparsity)
    )
    for layer in range(2):  # each layer's matrix has its own mean and its own share
        expected = numpy_reference.fapm(tuned["query_LDNH"][layer], base["query_LDNH"][layer], sparsity)
        np.testing.assert_array_equal(pruned["query_LDNH"][layer], expected)
    for name in ("attention_norm_LD", "query_bias_LNH"):
        np.testing.assert_array_equal(pruned[name], tuned[name])


def test_weights_of_zero_go_first_and_bfloat16_stays_bfloat16():
    base = {"up_DF": jnp.array([[0.0, 1.0], [0.0, 1.0]], jnp.bfloat16)}
    tuned = {"up_DF": jnp.array([[9.0, 1.5], [0.0, 1.0]], jnp.bfloat16)}
    pruned = fapm(tuned, base, 0.25)["up_DF"]
    assert pruned.dtype == jnp.bfloat16 and pruned.tolist() == [[0.0, 1.5], [0.0, 1.0]]


def test_models_that_differ_and_shares_beyond_one_are_refused(models):
    tuned, base = models
    with pytest.raises(ValueError, match=r"sparsity 1\.5 must be between 0 and 1"):
        fapm(tuned, base, 1.5)
    with pytest.raises(ValueError, match="the same names and shapes; embedding_VD differ"):
        fapm({**tuned, "embedding_VD": np.ones((6, 4))}, base)
