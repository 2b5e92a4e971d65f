"""Near the teacher, where float32 has few digits to lose: against float64 NumPy."""

from functools import partial

import jax
import numpy as np
import pytest
from quick import as_one, quick_jit

from raft_jax import losses

random = np.random.default_rng(0)
N, V = 6, 400
TEACHER = (random.normal(size=(1, N, V)) * 3 + 8).astype(np.float32)
NOISE = random.normal(size=(1, N, V)).astype(np.float32)


def softmax64(logits, temperature):
    shifted = np.float64(logits) / temperature
    weights = np.exp(shifted - shifted.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def kl64(p, q):
    return (p * np.log(p / q)).sum(-1)


def in_float64(name, student, temperature):
    p, q = softmax64(student, temperature), softmax64(TEACHER, temperature)
    if name == "forward_kl":
        value, slope = kl64(q, p), p - q
    elif name == "reverse_kl":
        value = kl64(p, q)
        slope = p * (np.log(p / q) - value[..., None])
    else:
        m = (p + q) / 2
        value, slope = (kl64(q, m) + kl64(p, m)) / 2, p / 2 * (np.log(p / m) - kl64(p, m)[..., None])
    return temperature**2 * value, temperature * slope


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_near_the_teacher(name):
    """From 1e-4 to 3 apart, and a student that is the teacher plus a constant."""
    values = quick_jit(lambda s, t: getattr(losses, name)(s, TEACHER, temperature=t))
    gradient = quick_jit(jax.grad(lambda s, t: getattr(losses, name)(s, TEACHER, temperature=t).sum()))
    for temperature in 1.5, 1000.0:
        for apart in 1e-3, 1e-2, 0.1, 3.0:
            student = TEACHER + np.float32(apart) * NOISE
            want, want_grad = in_float64(name, student, temperature)
            got, grad = values(student, temperature), gradient(student, temperature)
            np.testing.assert_allclose(got, want, rtol=2e-3)
            np.testing.assert_allclose(grad, want_grad, atol=2e-3 * np.abs(want_grad).max())
    assert values(TEACHER + np.float32(8), 1.5).min() >= 0 and values(TEACHER + np.float32(8), 1.5).max() < 1e-11
    assert not values(TEACHER, 1.5).any() and not values(TEACHER, 1000.0).any()


def test_linear_forms_too():
    """Each block of the vocabulary keeps the digits, and so does the top K."""
    hidden, unembedding = (random.normal(size=size).astype(np.float32) for size in [(1, N, 5), (5, V)])
    near = unembedding + np.float32(1e-3) * random.normal(size=unembedding.shape).astype(np.float32)
    p, q = softmax64(np.float64(hidden) @ near, 1.5), softmax64(np.float64(hidden) @ unembedding, 1.5)
    models = hidden, near, hidden, unembedding
    for name, want, slope in [
        ("linear_forward_kl", kl64(q, p), p - q), ("linear_reverse_kl", kl64(p, q), None),
        ("linear_top_k_forward_kl", kl64(q, p), p - q),
    ]:  # fmt: skip
        settings = {"chunk_size": 2} | ({"k": V} if "top_k" in name else {})
        loss = partial(getattr(losses, name), **settings)
        got = as_one(loss, *models)
        np.testing.assert_allclose(got, 1.5**2 * want, rtol=3e-3)
        if slope is not None:
            grad = quick_jit(jax.grad(lambda near, loss=loss: loss(hidden, near, hidden, unembedding).sum()))(near)
            want = 1.5 * np.einsum("btd,btv->dv", np.float64(hidden), slope)
            np.testing.assert_allclose(grad, want, atol=3e-3 * np.abs(want).max())
