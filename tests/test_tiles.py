"""Products by tiles against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from raft_jax.models.tiles import Tiled, product, tiled

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("num_inputs, num_outputs", [(576, 128), (64, 64), (2048, 192), (37, 64)])
@pytest.mark.parametrize("num_rows", [2, 3, 16])
def test_a_product_is_that_of_the_matrix(num_rows, num_inputs, num_outputs):
    matrix = RANDOM.normal(size=(num_inputs, num_outputs)).astype(np.float32)
    x = RANDOM.normal(size=(num_rows, 1, num_inputs)).astype(np.float32)
    layout = tiled(jnp.asarray(matrix), num_rows)
    assert isinstance(layout, Tiled)
    found = jax.jit(product)(x, layout)
    assert found.shape == (num_rows, 1, num_outputs) and found.dtype == np.float32
    np.testing.assert_allclose(found, x.astype(np.float64) @ matrix, atol=2e-5 * (num_inputs / 64) ** 0.5)


@pytest.mark.parametrize(
    "num_rows, shape, dtype",
    [(1, (576, 128), np.float32), (17, (576, 128), np.float32), (4, (576, 100), np.float32), (4, (149, 64), np.float32),
     (4, (576, 128), jnp.bfloat16)],
)  # fmt: skip
def test_where_tiles_do_not_pay_the_matrix_stays(num_rows, shape, dtype):
    matrix = jnp.ones(shape, dtype)
    assert tiled(matrix, num_rows) is matrix
    assert product(jnp.ones((num_rows, shape[0]), dtype), matrix, jnp.float32).dtype == np.float32
