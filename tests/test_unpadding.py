"""Unpadding against a loop over rows in NumPy, on one device and on eight."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from quick import quick_jit

from raft_jax.models import parameter_shardings
from raft_jax.sharding import make_mesh, put_batch
from raft_jax.tokens import Tokens
from raft_jax.unpadding import Unpadding

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
    unpadding = Unpadding(jnp.asarray(MASK), num_tokens)
    for x in (X, np.arange(56, dtype=np.int32).reshape(8, 7), MASK):
        found = unpadding.unpad(x)
        assert found.dtype == x.dtype
        np.testing.assert_array_equal(found, packed(x, 1, num_tokens))
        mask = MASK.reshape(*MASK.shape, *(1,) * (x.ndim - 2))
        np.testing.assert_array_equal(unpadding.pad(found), np.where(mask, x, 0))


def test_the_gradient_goes_to_the_tokens_alone():
    num_tokens = MASK.sum() + 2
    slope_GNX = np.random.default_rng(2).normal(size=(1, num_tokens, 3)).astype(np.float32)

    def there(x):
        return jnp.sum(Unpadding(jnp.asarray(MASK), num_tokens).unpad(x) * slope_GNX)

    def back(x):
        return jnp.sum(Unpadding(jnp.asarray(MASK), num_tokens).pad(x) * X)

    expected = np.zeros_like(X)
    expected[MASK] = slope_GNX[0, :-2]
    np.testing.assert_array_equal(jax.grad(there)(X), expected)
    np.testing.assert_array_equal(jax.grad(back)(slope_GNX), packed(X, 1, num_tokens))


# Rows of at least two real tokens, of which the first two are the same in all rows.
BEGUN = MASK | (np.arange(7) < 2)


def test_what_rows_share_has_places_once_and_the_sum_of_their_gradients():
    num_groups, shared = 2, 2
    x = X.copy()
    for row, mask in zip(x, BEGUN, strict=True):
        row[np.flatnonzero(mask)[:shared]] = [[1, 2, 3], [4, 5, 6]]
    slope = np.random.default_rng(3).normal(size=x.shape).astype(np.float32)
    rows, gradients = [], []
    for values, slopes, masks in zip(*(np.split(a, num_groups) for a in (x, slope, BEGUN)), strict=True):
        real = [(v[m], s[m]) for v, s, m in zip(values, slopes, masks, strict=True)]
        rows.append(np.concatenate([real[0][0][:shared], *(v[shared:] for v, _ in real)]))
        gradients.append(np.concatenate([sum(s[:shared] for _, s in real), *(s[shared:] for _, s in real)]))
    num_tokens = max(map(len, rows)) + 1
    rows, gradients = (
        np.stack([np.pad(part, ((0, num_tokens - len(part)), (0, 0))) for part in parts]) for parts in (rows, gradients)
    )

    def unpacked(x_RUX, mask):
        return Unpadding(mask, num_tokens, shared).pad(x_RUX)

    mesh = make_mesh(data=num_groups, devices=jax.devices()[:num_groups])
    with jax.set_mesh(mesh):
        mask, given, slopes = put_batch((BEGUN, x, slope), mesh)
        found = jax.jit(lambda x, mask: Unpadding(mask, num_tokens, shared).unpad(x))(given, mask)
        np.testing.assert_array_equal(found, rows)
        np.testing.assert_array_equal(jax.jit(unpacked)(found, mask), np.where(BEGUN[..., None], x, 0))
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(unpacked(x, mask) * slopes)))(found)
    np.testing.assert_allclose(gradient, gradients, rtol=1e-6, atol=1e-6)


def test_what_rows_share_is_computed_once_and_changes_nothing():
    """Hidden states and the gradient of every parameter, against rows that are padded."""
    model = tiny.make_model()
    random = np.random.default_rng(4)
    mask = np.arange(12) >= random.integers(0, 5, size=(4, 1))
    tokens = random.integers(5, 60, size=mask.shape).astype(np.int32)
    shared = 4
    for row, real in zip(tokens, mask, strict=True):
        row[np.flatnonzero(real)[:shared]] = [7, 8, 9, 10]
    slope = random.normal(size=(*mask.shape, model.config.width)).astype(np.float32) * mask[..., None]

    def total(params, tokens, **settings):
        return jnp.sum(model.hidden(params, Tokens(tokens, mask, **settings)) * slope)

    settings = {"max_tokens": int(mask.sum()) - 3 * shared, "shared_prefix": shared}
    expected = quick_jit(jax.value_and_grad(total))(model.params, tokens)
    of_shared = quick_jit(jax.value_and_grad(partial(total, **settings)))
    found = of_shared(model.params, tokens)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)

    # Rows that do not begin alike are an error that shows, not the first row's beginning.
    other = tokens.copy()
    other[2, np.flatnonzero(mask[2])[1]] = 11
    assert np.isnan(of_shared(model.params, other)[0])


def test_text_numbers_are_a_mask():
    numbers = np.where(MASK, 1 + np.arange(7) // 3, 0).astype(np.int32)
    num_tokens = MASK.sum() + 2
    unpadding = Unpadding(jnp.asarray(numbers), num_tokens)
    np.testing.assert_array_equal(unpadding.unpad(X), packed(X, 1, num_tokens))


def test_too_little_room_is_not_a_cut_text():
    unpadding = Unpadding(jnp.asarray(MASK), MASK.sum() - 1)
    assert np.isnan(unpadding.unpad(X)).all()
    assert np.isnan(unpadding.pad(X.reshape(1, -1, 3)[:, : MASK.sum() - 1])).all()


def test_eight_devices_pack_their_own_rows():
    room = int(MASK.reshape(4, -1).sum(-1).max())
    mesh = make_mesh(data=2, fsdp=2, tensor=2)

    def there_and_back(mask, x):
        unpadding = Unpadding(mask, room)
        there = unpadding.unpad(x)
        return there, unpadding.pad(there)

    with jax.set_mesh(mesh):
        program = jax.jit(there_and_back).lower(*put_batch((MASK, X), mesh)).compile()
        there, back = program(*put_batch((MASK, X), mesh))
    np.testing.assert_array_equal(there, packed(X, 4, room))
    np.testing.assert_array_equal(back, np.where(MASK[..., None], X, 0))
    assert there.addressable_shards[0].data.shape == (1, room, 3)
    # Whether all fits is one number; no token leaves its device.
    assert "all-gather" not in program.as_text() and "all-to-all" not in program.as_text()


def test_heads_stay_cut():
    """On a tensor mesh an unpadded forward pass moves no more between devices than a padded one."""
    model, mesh = tiny.make_model(), make_mesh(data=2, tensor=2, devices=jax.devices()[:4])
    params = jax.device_put(model.params, parameter_shardings(model.config, mesh))
    tokens, mask = put_batch((np.ones((8, 7), np.int32), MASK), mesh)
    hidden = jax.jit(model.hidden)
    with jax.set_mesh(mesh):
        texts = [hidden.lower(params, Tokens(tokens, mask, n)).compile().as_text() for n in (None, 24)]
    gathered = [text.count(" all-gather(") for text in texts]
    assert gathered[1] <= gathered[0], gathered


def test_rows_that_do_not_divide():
    with jax.set_mesh(make_mesh(data=8)), pytest.raises(ValueError, match="6 rows do not divide over 8 parts"):
        Unpadding(jnp.ones((6, 4), bool), 8)
