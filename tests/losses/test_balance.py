"""EMA balance and the objective, against the paper's arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from raft_jax.losses import init_balance, raft_objective, sequence_mean, token_mean, update_balance


def test_first_step_is_the_ratio():
    weight, state = update_balance(init_balance(), 2.0, 0.5)
    np.testing.assert_allclose(weight, 4.0, rtol=1e-6)
    np.testing.assert_allclose(state.corrected(), (2.0, 0.5), rtol=1e-6)
    assert state.count == 1


def test_many_steps():
    random = np.random.default_rng(0)
    state, averages = init_balance(), np.zeros(2)
    step = jax.jit(update_balance)
    for s in range(1, 30):
        pair = random.uniform(0.1, 3, 2)
        averages = 0.9 * averages + 0.1 * pair
        corrected = averages / (1 - 0.9**s)
        weight, state = step(state, *np.float32(pair))
        np.testing.assert_allclose(weight, corrected[0] / (corrected[1] + 1e-8), rtol=1e-5)
        np.testing.assert_allclose(state.corrected(), corrected, rtol=1e-5)


def test_a_kl_that_is_rounding_has_no_weight():
    for kl in 0.0, 1.3e-13, 9e-10:
        weight, state = update_balance(init_balance(), 7.0, kl)
        assert weight == 0
        weight, state = update_balance(state, 7.0, 0.5)  # averages 7 and 0.05 / 0.19
        np.testing.assert_allclose(weight, 7 * 0.19 / 0.05, rtol=1e-6)
    np.testing.assert_allclose(update_balance(init_balance(), 7.0, 1e-8)[0], 7 / 2e-8, rtol=1e-6)
    np.testing.assert_allclose(update_balance(init_balance(), 7.0, 1e-10, floor=0)[0], 7 / 1.01e-8, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite(bad):
    """It is not hidden, and the averages are as if there had been no such step."""
    _, state = update_balance(init_balance(), 7.0, 0.5)
    want, _ = update_balance(state, 6.0, 0.4)
    for pair in (7.0, bad), (bad, 0.5):
        weight, after = update_balance(state, *pair)
        assert np.isnan(weight)
        np.testing.assert_array_equal(after, state)
        np.testing.assert_array_equal(update_balance(after, 6.0, 0.4)[0], want)
        assert np.isnan(raft_objective(*pair, weight))


def test_max_weight():
    assert update_balance(init_balance(), 7.0, 1e-4, max_weight=50.0)[0] == 50
    np.testing.assert_allclose(update_balance(init_balance(), 7.0, 0.5, max_weight=50.0)[0], 14, rtol=1e-6)
    _, state = update_balance(init_balance(), 7.0, 1e-4, max_weight=50.0)
    np.testing.assert_allclose(state.corrected(), (7, 1e-4), rtol=1e-6)  # the averages know no limit


def test_no_gradient_through_the_weight():
    def loss(x):
        sft, kl = 3 * x, x**2
        weight, state = update_balance(init_balance(), sft, kl)
        return raft_objective(sft, kl, weight) + 0 * state.sft_average

    np.testing.assert_allclose(jax.grad(loss)(2.0), 3 + (6 / 4) * 4, rtol=1e-6)
    assert jax.grad(lambda w: raft_objective(1.0, 2.0, w))(3.0) == 0


def test_state_lives_in_scan():
    def step(state, pair):
        weight, state = update_balance(state, *pair)
        return state, weight

    state, weights = jax.lax.scan(step, init_balance(), jnp.ones((5, 2)))
    np.testing.assert_allclose(weights, 1, rtol=1e-6)
    assert state.count == 5 and state.count.dtype == jnp.int32


def test_means():
    values, mask = np.array([[1.0, 3.0], [8.0, np.nan]]), np.array([[True, True], [True, False]])
    assert sequence_mean(values, mask) == 5 and token_mean(values, mask) == 4
    for mean in sequence_mean, token_mean:
        grad = jax.grad(lambda x, f=mean: f(x, mask))(values)
        assert grad[1, 1] == 0 and np.isfinite(grad).all()
    half_empty = np.array([[True, True], [False, False]])
    assert sequence_mean(values, half_empty) == 1 and token_mean(values, half_empty) == 2
    assert sequence_mean(values.astype(jnp.bfloat16), mask).dtype == jnp.float32
