"""Infinite logits, ties, padding, and the corners of the arguments."""

from functools import partial

import in_float64
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import unreduced_and_grad
from quick import as_one, quick_jit

from raft_jax.losses import (
    TopK,
    cross_entropy,
    forward_kl,
    linear_cross_entropy,
    linear_forward_kl,
    linear_top_k,
    linear_top_k_forward_kl,
    reverse_kl,
    sequence_mean,
    token_mean,
    token_weight,
    top_k,
    top_k_forward_kl,
)

INF = np.inf


def values(*rows):
    return np.array([rows], np.float32)


def value_and_grad(loss, student, *others, **settings):
    """The loss of each token and the gradient of their sum, by one program: op by op they are many."""
    value, grad = unreduced_and_grad(lambda x, *others: loss(x, *others, **settings))(student, *others)
    return np.asarray(value), np.asarray(grad)


def test_worked_example():
    """METHOD: q̃ = 5/9, 3/9, 1/9 and p̃ = 2/5, 2/5, 1/5."""
    teacher, student = np.log(values([0.50, 0.30, 0.10, 0.10])), np.log(values([0.20, 0.20, 0.10, 0.50]))
    q, p = np.array([5, 3, 1]) / 9, np.array([2, 2, 1]) / 5
    loss_BT, grad = value_and_grad(top_k_forward_kl, student, teacher, k=3, temperature=1.0)
    np.testing.assert_allclose(loss_BT, [[(q * np.log(q / p)).sum()]], rtol=1e-5)
    np.testing.assert_allclose(grad, values([*(p - q), 0]), atol=1e-6)


def test_teacher_excludes_tokens():
    """Outside 𝒦, and inside where K is more than it allows: such a token has q̃ = 0 and its share of p̃."""
    teacher = values([1.0, -INF, 0.0, -INF])
    for student in values([0.3, 0.2, 0.1, 0.4]), values([0.3, -INF, 0.1, 0.4]):
        loss_BT, grad = value_and_grad(top_k_forward_kl, student, teacher, k=2)
        want = in_float64.top_k_forward_kl(student[..., [0, 2]], teacher[..., [0, 2]])
        np.testing.assert_allclose(loss_BT, want, rtol=1e-5)
        assert np.isfinite(grad).all() and not grad[0, 0, [1, 3]].any()
        loss_BT, grad = value_and_grad(top_k_forward_kl, student, teacher, k=4)
        np.testing.assert_allclose(loss_BT, forward_kl(student, teacher), rtol=1e-5)
        np.testing.assert_allclose(grad, value_and_grad(forward_kl, student, teacher)[1], atol=1e-6)
        assert np.isfinite(loss_BT).all() and grad[0, 0, 3] > 0


def test_student_excludes_tokens():
    teacher = values([2.0, 1.0, 0.0, -1.0])
    loss_BT, grad = value_and_grad(top_k_forward_kl, values([0.3, -INF, 0.1, 0.0]), teacher, k=3)
    assert loss_BT == INF and np.isfinite(grad).all()
    loss_BT, grad = value_and_grad(top_k_forward_kl, values([0.3, 0.2, 0.1, -INF]), teacher, k=3)
    want = in_float64.top_k_forward_kl(values([0.3, 0.2, 0.1]), values([2.0, 1.0, 0.0]))
    np.testing.assert_allclose(loss_BT, want, rtol=1e-5)
    assert np.isfinite(grad).all()
    for loss in forward_kl, reverse_kl:
        loss_BT, grad = value_and_grad(loss, values([0.3, -INF, 0.1, 0.0]), teacher)
        assert (loss_BT == INF) == (loss is forward_kl) and np.isfinite(grad).all()
    loss_BT, grad = value_and_grad(reverse_kl, teacher, values([0.3, -INF, 0.1, 0.0]))
    assert loss_BT == INF and np.isfinite(grad).all()


def test_teacher_without_a_finite_logit_says_nothing():
    for loss in top_k_forward_kl, forward_kl:
        loss_BT, grad = value_and_grad(loss, values([1.0, 2.0]), values([-INF, -INF]))
        assert loss_BT == 0 and not grad.any()
    _, found = top_k_forward_kl(values([1.0, 2.0]), values([-INF, -INF]), return_metrics=True)
    assert found["teacher_mass"] == 0 and found["teacher_entropy"] == 0


def test_label_edges():
    logits, labels = values([1.0, -INF, 0.0], [1.0, -INF, 0.0], [1.0, 2.0, 0.0]), np.array([[0, 1, -100]])
    loss_BT, grad = value_and_grad(cross_entropy, logits, labels)
    np.testing.assert_allclose(loss_BT[0], [np.log1p(np.exp(-1)), INF, 0], rtol=1e-6)
    assert np.isfinite(grad).all() and not grad[0, 2].any()
    assert np.isnan(cross_entropy(logits, np.array([[3, 0, 0]]))[0, 0])
    for dtype in np.int8, np.uint8, np.uint16, np.uint32:
        loss_BT = cross_entropy(np.zeros((1, 1, 70000), np.float32), np.array([[5]], dtype))
        np.testing.assert_allclose(loss_BT, np.log(70000), rtol=1e-6)
    hidden, unembedding = np.ones((1, 3, 2), np.float32), np.ones((2, 3), np.float32)
    loss_BT, grad = value_and_grad(linear_cross_entropy, hidden, unembedding, np.array([[0, -1, 7]]))
    assert loss_BT[0, 1] == 0 and np.isnan(loss_BT[0, 2]) and np.isfinite(grad[0, :2]).all()


def test_ties_at_the_last_place():
    """Whichever of the equal tokens is taken, q̃ is the same; p̃ belongs to those that were taken."""
    teacher, student = values([3.0, 1.0, 1.0, 1.0, 0.0]), values([0.1, 0.2, 0.3, 0.4, 0.5])
    loss_BT, grad = value_and_grad(top_k_forward_kl, student, teacher, k=2, temperature=1.0)
    (taken,) = np.flatnonzero(grad[0, 0, 1:4]) + 1
    q, p = in_float64.softmax(np.array([3.0, 1.0])), in_float64.softmax(np.float64(student[0, 0, [0, taken]]))
    np.testing.assert_allclose(loss_BT, [[in_float64.kl(q, p)]], rtol=1e-5)
    assert top_k_forward_kl(teacher, teacher, k=2) == 0


def test_one_kept_token_teaches_nothing():
    loss_BT, grad = value_and_grad(top_k_forward_kl, values([0.1, 0.2]), values([3.0, 1.0]), k=1)
    assert loss_BT == 0 and not grad.any()


@pytest.mark.parametrize("size", [70, 96, 1000])
def test_binned_top_k_is_exact(size):
    """What backends without a fast top k run, against sorting."""
    from raft_jax.losses import truncation

    logits = np.random.default_rng(0).normal(size=(2, 3, size)).astype(np.float32)
    logits[0, 0] = np.round(logits[0, 0])  # many ties
    logits[0, 1, 5:] = -INF
    for k in 1, 4, 9, size:
        found, indices = as_one(truncation._by_bins, logits, k=k)
        np.testing.assert_array_equal(found, -np.sort(-logits)[..., :k])
        np.testing.assert_array_equal(np.take_along_axis(logits, np.asarray(indices), -1), found)
        assert all(len(set(row)) == k for row in np.asarray(indices).reshape(-1, k))


def test_shards():
    logits = np.random.default_rng(0).normal(size=(2, 3, 4096)).astype(np.float32)
    eight, one = (set_of(as_one(top_k, logits, k=64, vocab_shards=count)) for count in (8, 1))
    assert eight == one


def set_of(found):
    return {(b, t, int(a)) for (b, t, _), a in np.ndenumerate(found.indices_BTK)}


def random_models(seed=0, batch=3, time=7, width=4, teacher_width=5, vocabulary=30):
    random = np.random.default_rng(seed)
    sizes = [(batch, time, width), (width, vocabulary), (batch, time, teacher_width), (teacher_width, vocabulary)]
    return [random.normal(size=size).astype(np.float32) for size in sizes], random


ALL_OF_THE_HEAD = {"logit_softcap": 3.0, "logit_scale": 0.5, "vocab_size": 23, "bias": True}


@pytest.mark.parametrize("settings, chunk_size", [
    ({"logit_softcap": 3.0}, 4), ({"logit_scale": 0.5}, 4), ({"vocab_size": 26}, 4), ({"bias": True}, 4),
    (ALL_OF_THE_HEAD, 1), (ALL_OF_THE_HEAD, 512),
], ids=str)  # fmt: skip
def test_heads(settings, chunk_size):
    """Every part of the head, value and gradients, against the logits variants on logits made by hand."""
    (hidden, unembedding, teacher_hidden, teacher_unembedding), random = random_models()
    bias = random.normal(size=30).astype(np.float32) if settings.get("bias") else None
    labels, mask = random.integers(0, 23, (3, 7)), random.random((3, 7)) < 0.7
    common = {"vocab_size": settings.get("vocab_size")}
    head = {name: settings[name] for name in ("logit_softcap", "logit_scale") if name in settings}
    scale, softcap = head.get("logit_scale", 1.0), head.get("logit_softcap")

    def by_hand(hidden, unembedding, bias):
        logits = scale * (hidden @ unembedding + (0 if bias is None else bias))
        return logits if softcap is None else softcap * jnp.tanh(logits / softcap)

    teacher = by_hand(teacher_hidden, teacher_unembedding, bias)
    pairs = [
        (lambda h, w, b: linear_cross_entropy(h, w, labels, bias_V=b, chunk_size=chunk_size, **head, **common),
         lambda v: cross_entropy(v, labels, **common)),
        (lambda h, w, b: linear_top_k_forward_kl(h, w, teacher_hidden, teacher_unembedding, student_bias_V=b, k=5,
                                                 teacher_bias_V=bias, chunk_size=chunk_size, **head, **common),
         lambda v: top_k_forward_kl(v, teacher, k=5, **common)),
        (lambda h, w, b: linear_forward_kl(h, w, teacher_hidden, teacher_unembedding, student_bias_V=b,
                                           teacher_bias_V=bias, chunk_size=chunk_size, **head, **common),
         lambda v: forward_kl(v, teacher, **common)),
    ]  # fmt: skip
    for linear, of_logits in pairs:
        places = (0, 1) if bias is None else (0, 1, 2)
        got = jax.jit(jax.value_and_grad(lambda *x, f=linear: token_mean(f(*x), mask), places))
        want = quick_jit(jax.value_and_grad(lambda *x, f=of_logits: token_mean(f(by_hand(*x)), mask), places))
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-6),
            got(hidden, unembedding, bias),
            want(hidden, unembedding, bias),
        )
        if "vocab_size" in settings:
            grads = got(hidden, unembedding, bias)[1]
            assert not grads[1][:, settings["vocab_size"] :].any()


def test_padding_never_enters():
    """Padded columns may hold anything, and the two models may be padded to different widths."""
    (hidden, unembedding, teacher_hidden, teacher_unembedding), random = random_models()
    labels = random.integers(0, 30, (3, 7))
    loud = np.concatenate([unembedding, 1e4 * np.ones((4, 6), np.float32)], 1)
    teacher_loud = np.concatenate([teacher_unembedding, 1e4 * np.ones((5, 2), np.float32)], 1)
    for linear in linear_top_k_forward_kl, linear_forward_kl:
        want = as_one(linear, hidden, unembedding, teacher_hidden, teacher_unembedding)
        got = as_one(linear, hidden, loud, teacher_hidden, teacher_loud, vocab_size=30)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
        other_loud = np.pad(loud, ((0, 1), (0, 0)))
        assert np.isfinite(as_one(linear, hidden, teacher_loud[:4], teacher_hidden, other_loud, vocab_size=30)).all()
    want_loss = as_one(cross_entropy, hidden @ unembedding, labels)
    want_kl = as_one(top_k_forward_kl, hidden @ unembedding, teacher_hidden @ teacher_unembedding, k=99)
    for loud_logits in hidden @ loud, jnp.asarray(hidden @ loud).at[..., 30:].set(jnp.nan):
        got = as_one(cross_entropy, loud_logits, labels, vocab_size=30)
        np.testing.assert_allclose(got, want_loss, rtol=1e-5)
        got = as_one(top_k_forward_kl, loud_logits, teacher_hidden @ teacher_loud, k=99, vocab_size=30)
        np.testing.assert_allclose(got, want_kl, rtol=1e-4, atol=1e-6)


def test_kept_teacher():
    """A TopK from before gives the same as the teacher itself; of a shorter or bare one, what there is."""
    (hidden, unembedding, teacher_hidden, teacher_unembedding), _ = random_models()
    models = hidden, unembedding, teacher_hidden, teacher_unembedding
    linear_kl = partial(as_one, linear_top_k_forward_kl)
    kept = as_one(linear_top_k, teacher_hidden, teacher_unembedding, k=8)
    of_logits = as_one(top_k, teacher_hidden @ teacher_unembedding, k=8)  # NumPy's product: it may round differently
    np.testing.assert_array_equal(kept.indices_BTK, of_logits.indices_BTK)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), kept, of_logits)
    want, metrics = linear_kl(*models, k=8, return_metrics=True)
    got, same_metrics = linear_kl(hidden, unembedding, kept, k=8, return_metrics=True)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert metrics.keys() == same_metrics.keys()
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), same_metrics, metrics)
    np.testing.assert_allclose(linear_kl(hidden, unembedding, kept, k=3), linear_kl(*models, k=3), rtol=1e-4, atol=1e-6)
    bare = TopK(np.asarray(kept.indices_BTK), np.asarray(kept.logits_BTK))
    got, fewer = as_one(top_k_forward_kl, hidden @ unembedding, bare, return_metrics=True)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    assert fewer.keys() == {"student_mass", "student_entropy", "agreement"}


@pytest.mark.parametrize("k", [5, 30])
def test_metrics(k):
    (hidden, unembedding, teacher_hidden, teacher_unembedding), _ = random_models()
    student, teacher = hidden @ unembedding, teacher_hidden @ teacher_unembedding
    want = in_float64.metrics(student, teacher, k, 1.5)
    found = [
        as_one(top_k_forward_kl, student, teacher, k=k, return_metrics=True),
        as_one(
            linear_top_k_forward_kl,
            hidden,
            unembedding,
            teacher_hidden,
            teacher_unembedding,
            k=k,
            chunk_size=4,
            return_metrics=True,
        ),
    ]
    for _, got in found:
        assert got.keys() == want.keys()
        for name in want:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_metrics_carry_no_gradient():
    (hidden, unembedding, teacher_hidden, teacher_unembedding), _ = random_models()

    def loss(hidden, weight):
        loss_BT, metrics = linear_top_k_forward_kl(
            hidden, unembedding, teacher_hidden, teacher_unembedding, k=5, return_metrics=True
        )
        return loss_BT.sum() + weight * sum(x.sum() for x in metrics.values())

    grad = quick_jit(jax.grad(loss))
    np.testing.assert_array_equal(grad(hidden, 0.0), grad(hidden, 1.0))


def test_chunks_change_nothing():
    (hidden, unembedding, teacher_hidden, teacher_unembedding), random = random_models(batch=6, time=11, vocabulary=640)
    mask = random.random((6, 11)) < 0.6

    @partial(quick_jit, static_argnums=2)
    @partial(jax.value_and_grad, argnums=(0, 1))
    def loss(hidden, unembedding, chunk_size):
        return sequence_mean(
            linear_top_k_forward_kl(
                hidden, unembedding, teacher_hidden, teacher_unembedding, k=17, chunk_size=chunk_size, vocab_shards=1
            ),
            mask,
        )

    want = loss(hidden, unembedding, 10**6)
    for chunk_size in 2, 13:
        got = loss(hidden, unembedding, chunk_size)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-6), got, want)


def test_temperature_may_be_traced():
    student, teacher = values([0.1, 0.2, 0.4]), values([3.0, 1.0, 2.0])
    got = jax.jit(lambda t: top_k_forward_kl(student, teacher, k=2, temperature=t))(0.7)
    np.testing.assert_allclose(got, in_float64.top_k_forward_kl(student, teacher, k=2, temperature=0.7), rtol=1e-5)


@pytest.mark.parametrize("chunk_size", [4, 512])
def test_weights_with_every_part_of_the_head(chunk_size):
    """The weighted sum and the gradient that its forward pass forms, against the mean of the unreduced losses."""
    (hidden, unembedding, *teacher), random = random_models()
    labels, mask = random.integers(-1, 23, (3, 7)), random.random((3, 7)) < 0.7
    bias = random.normal(size=30).astype(np.float32)
    settings = {"logit_softcap": 3.0, "logit_scale": 0.5, "vocab_size": 23, "chunk_size": chunk_size}
    for loss in [
        lambda h, w, b, **more: linear_cross_entropy(h, w, labels, bias_V=b, **settings, **more),
        lambda h, w, b, **more: linear_forward_kl(h, w, *teacher, student_bias_V=b, **settings, **more),
    ]:

        def weighted(hidden, unembedding, bias, weight, loss=loss):
            return 3 * loss(hidden, unembedding, bias, weight_BT=weight)

        got = jax.jit(jax.value_and_grad(weighted, (0, 1, 2, 3)))(hidden, unembedding, bias, token_weight(mask))
        mean = jax.jit(jax.value_and_grad(lambda *x, f=loss: 3 * token_mean(f(*x), mask), (0, 1, 2)))
        value, grads = mean(hidden, unembedding, bias)
        want = value, (*grads, 3 * loss(hidden, unembedding, bias))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-6), got, want)
