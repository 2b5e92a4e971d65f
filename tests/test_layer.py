"""The norm, whose backward pass is our own rule, against NumPy in float64 and its central differences."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from raft_jax.models.layer import rms_norm

EPSILON = 1e-3


def in_float64(x, scale, offset):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + EPSILON) * (offset + scale)


def central_differences(function, x, step=1e-5):
    slope = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        for sign in (1, -1):
            moved = x.copy()
            moved[index] += sign * step
            slope[index] += sign * function(moved) / (2 * step)
    return slope


@pytest.mark.parametrize("shape", [(12,), (3, 5, 12), (2, 3, 2, 8)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(("dtype", "error"), [("float32", 2e-6), ("bfloat16", 2e-2)])
def test_the_norm_and_its_slopes(shape, offset, dtype, error):
    config = SimpleNamespace(norm_epsilon=EPSILON, norm_offset=offset)
    random = np.random.default_rng(0)
    # Numbers that both dtypes hold; rows of very different size, one of them of little more than epsilon.
    x, scale, weight = (
        np.asarray(jnp.asarray(random.normal(size=size), "bfloat16"), np.float64) for size in (shape, shape[-1], shape)
    )
    x *= np.exp2(np.arange(x[..., :1].size).reshape(x[..., :1].shape) % 7 - 4)

    def weighed(x, scale):
        return jnp.sum(rms_norm(config, x, scale).astype(jnp.float32) * weight.astype(np.float32))

    given = jnp.asarray(x, dtype), jnp.asarray(scale, dtype)
    found = rms_norm(config, *given), *jax.jit(jax.grad(weighed, (0, 1)))(*given)
    expected = (
        in_float64(x, scale, offset),
        central_differences(lambda x: np.sum(in_float64(x, scale, offset) * weight), x),
        central_differences(lambda scale: np.sum(in_float64(x, scale, offset) * weight), scale),
    )
    for one, true in zip(found, expected, strict=True):
        assert one.dtype == dtype and one.shape == true.shape
        np.testing.assert_allclose(np.asarray(one, np.float64), true, rtol=error, atol=error * np.abs(true).max())
