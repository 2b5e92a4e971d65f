"""Unpadding against a loop over rows in NumPy, on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from raft_jax.packing import Packing
from raft_jax.sharding import make_mesh, put_batch

MASK = np.random.default_rng(0).random((8, 7)) < 0.6
X = np.random.default_rng(1).normal(size=(8, 7, 3)).astype(np.float32)


def packed(x, num_groups, num_tokens):
    """The real tokens of each group of rows behind one another, then zeros."""
    out = np.zeros((num_groups, num_tokens, *x.shape[2:]), x.dtype)
    for group, (rows, mask) in enumerate(zip(np.split(x, num_groups), np.split(MASK, num_groups), strict=True)):
        real = [token for row, row_mask in zip(rows, mask, strict=True) for token in row[row_mask]]
        out[group, : len(real)] = real
    return out


def test_there_and_back():
    num_tokens = MASK.sum() + 2
    packing = Packing(jnp.asarray(MASK), num_tokens)
    for x in (X, np.arange(56, dtype=np.int32).reshape(8, 7), MASK):
        found = packing.pack(x)
        assert found.dtype == x.dtype
        np.testing.assert_array_equal(found, packed(x, 1, num_tokens))
        mask = MASK.reshape(*MASK.shape, *(1,) * (x.ndim - 2))
        np.testing.assert_array_equal(packing.unpack(found), np.where(mask, x, 0))


def test_the_gradient_goes_to_the_tokens_alone():
    num_tokens = MASK.sum() + 2
    slope_GNX = np.random.default_rng(2).normal(size=(1, num_tokens, 3)).astype(np.float32)

    def there(x):
        return jnp.sum(Packing(jnp.asarray(MASK), num_tokens).pack(x) * slope_GNX)

    def back(x):
        return jnp.sum(Packing(jnp.asarray(MASK), num_tokens).unpack(x) * X)

    expected = np.zeros_like(X)
    expected[MASK] = slope_GNX[0, :-2]
    np.testing.assert_array_equal(jax.grad(there)(X), expected)
    np.testing.assert_array_equal(jax.grad(back)(slope_GNX), packed(X, 1, num_tokens))


def test_too_little_room_is_not_a_cut_text():
    packing = Packing(jnp.asarray(MASK), MASK.sum() - 1)
    assert np.isnan(packing.unpack(packing.pack(X))).all()


def test_eight_devices_pack_their_own_rows():
    room = int(MASK.reshape(4, -1).sum(-1).max())
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)) as _:
        mesh = jax.sharding.get_mesh()
        mask, x = put_batch((MASK, X), mesh)
        program = jax.jit(lambda mask, x: Packing(mask, room).pack(x)).lower(mask, x).compile()
        found = program(mask, x)
        again = jax.jit(lambda mask, x: Packing(mask, room).unpack(Packing(mask, room).pack(x)))(mask, x)
        np.testing.assert_array_equal(again, np.where(MASK[..., None], X, 0))
    np.testing.assert_array_equal(found, packed(X, 4, room))
    assert found.addressable_shards[0].data.shape == (1, room, 3)
    # One number tells whether all fits; no token leaves its device.
    assert "all-gather" not in program.as_text() and "all-to-all" not in program.as_text()


def test_rows_that_do_not_divide():
    with jax.set_mesh(make_mesh(data=8)), pytest.raises(ValueError, match="6 rows do not divide over 8 parts"):
        Packing(jnp.ones((6, 4), bool), 8)
