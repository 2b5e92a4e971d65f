"""All workarounds for XLA on CPU; each is selected by `on_cpu`.

XLA's CPU backend has no 16-bit arithmetic in loops: to slice, update or multiply a bfloat16 array, it converts the
whole array to float32 in every iteration. For an unembedding of 1 GiB this takes 2 GiB of memory and most of the time.
The plain versions give the same numbers as the workarounds (tests/losses/test_xla_cpu.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from raft_jax.losses import checks

ENABLED = True  # False in a test that compares with the plain versions


def on_cpu(special: Callable, plain: Callable, *arrays):
    """special(*arrays) if compiled for CPU, plain(*arrays) for other backends; the derivative is that of `plain`."""
    if not ENABLED:
        return plain(*arrays)

    @jax.custom_jvp
    def run(*arrays):
        return jax.lax.platform_dependent(*arrays, cpu=special, default=plain)

    @run.defjvp
    def derivative(primals, tangents):
        return jax.jvp(plain, primals, tangents)

    return run(*arrays)


def is_16_bit(array: jax.Array) -> bool:
    return array.dtype.itemsize == 2


def as_bits(array: jax.Array) -> jax.Array:
    """Bitcasts 16-bit floats to integers, which XLA on CPU slices and updates without conversion."""
    is_float = jnp.issubdtype(array.dtype, jnp.floating)
    return jax.lax.bitcast_convert_type(array, jnp.uint16) if is_16_bit(array) and is_float else array


def from_bits(array: jax.Array, dtype) -> jax.Array:
    return array if array.dtype == dtype else jax.lax.bitcast_convert_type(array, dtype)


def slice_in_dim(array: jax.Array, start: jax.Array, size: int, axis: int) -> jax.Array:
    """`jax.lax.dynamic_slice_in_dim`; on CPU, 16-bit arrays are sliced as integers."""

    def plain(array, start):
        return jax.lax.dynamic_slice_in_dim(array, start, size, axis)

    def by_bits(array, start):
        # Without the barrier XLA would bitcast the whole array before the loop.
        array, start = jax.lax.optimization_barrier((array, start))
        return from_bits(plain(as_bits(array), start), array.dtype)

    return on_cpu(by_bits, plain, array, start) if is_16_bit(array) else plain(array, start)


def gradient_product(left_NR: jax.Array, right_NC: jax.Array, dtype, shards: int) -> jax.Array:
    """left.T @ right, [R, C], accumulated in float32; on CPU in blocks of rows that contract over their last axis.

    XLA on CPU computes a product of this form in 16 bits. The transposed array is the input of a loop, outside of which
    it is materialised; otherwise XLA would fold the transposition back into the product. A sharded vocabulary is not
    split into such blocks.
    """
    factor = checks.compute_dtype(left_NR.dtype, right_NC.dtype)
    left_NR, right_NC = left_NR.astype(factor), right_NC.astype(factor)
    product = partial(jnp.einsum, preferred_element_type=checks.accumulation_dtype(factor))

    def plain(left_NR, right_NC):
        return product("nr,nc->rc", left_NR, right_NC).astype(dtype)

    def by_rows(left_NR, right_NC):
        num_rows = left_NR.shape[1]
        num_blocks = math.gcd(num_rows, 8)

        def block(carry, left_RN):
            return carry, product("rn,nc->rc", left_RN, right_NC).astype(dtype)

        _, blocks = jax.lax.scan(block, None, left_NR.T.reshape(num_blocks, num_rows // num_blocks, -1))
        return blocks.reshape(num_rows, -1)

    if shards == 1 and factor.itemsize == 2:
        return on_cpu(by_rows, plain, left_NR, right_NC)
    return plain(left_NR, right_NC)
