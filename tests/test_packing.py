"""Unpadding against a loop over rows in NumPy, on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from raft_jax.models import parameter_shardings
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


def test_text_numbers_are_a_mask():
    numbers = np.where(MASK, 1 + np.arange(7) // 3, 0).astype(np.int32)
    num_tokens = MASK.sum() + 2
    packing = Packing(jnp.asarray(numbers), num_tokens)
    np.testing.assert_array_equal(packing.pack(X), packed(X, 1, num_tokens))


def test_too_little_room_is_not_a_cut_text():
    packing = Packing(jnp.asarray(MASK), MASK.sum() - 1)
    assert np.isnan(packing.pack(X)).all() and np.isnan(packing.unpack(X.reshape(1, -1, 3)[:, : MASK.sum() - 1])).all()


def test_eight_devices_pack_their_own_rows():
    room = int(MASK.reshape(4, -1).sum(-1).max())
    mesh = make_mesh(data=2, fsdp=2, tensor=2)

    def there_and_back(mask, x):
        packing = Packing(mask, room)
        there = packing.pack(x)
        return there, packing.unpack(there)

    with jax.set_mesh(mesh):
        program = jax.jit(there_and_back).lower(*put_batch((MASK, X), mesh)).compile()
        there, back = program(*put_batch((MASK, X), mesh))
    np.testing.assert_array_equal(there, packed(X, 4, room))
    np.testing.assert_array_equal(back, np.where(MASK[..., None], X, 0))
    assert there.addressable_shards[0].data.shape == (1, room, 3)
    # Whether all fits is one number; no token leaves its device.
    assert "all-gather" not in program.as_text() and "all-to-all" not in program.as_text()


def test_heads_stay_cut():
    """On a tensor mesh a packed forward pass moves no more between devices than a padded one."""
    model, mesh = tiny.make_model(), make_mesh(data=2, tensor=2, devices=jax.devices()[:4])
    params = jax.device_put(model.params, parameter_shardings(model.config, mesh))
    tokens, mask = put_batch((np.ones((8, 7), np.int32), MASK), mesh)
    hidden = jax.jit(model.hidden, static_argnums=(4, 5))
    with jax.set_mesh(mesh):
        texts = [hidden.lower(params, tokens, None, mask, None, n).compile().as_text() for n in (None, 24)]
    gathered = [text.count(" all-gather(") for text in texts]
    assert gathered[1] <= gathered[0], gathered


def test_rows_that_do_not_divide():
    with jax.set_mesh(make_mesh(data=8)), pytest.raises(ValueError, match="6 rows do not divide over 8 parts"):
        Packing(jnp.ones((6, 4), bool), 8)
