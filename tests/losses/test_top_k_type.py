"""`TopK`: what it checks, what is absent, and what it remembers."""

import in_float64
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import unreduced_and_grad
from quick import as_one

from raft_jax.losses import TopK, linear_top_k_forward_kl, top_k, top_k_forward_kl

random = np.random.default_rng(0)
STUDENT = random.normal(size=(1, 2, 9)).astype(np.float32)
INDICES, LOGITS = np.array([[[4, 8, 1], [7, 2, 0]]]), np.array([[[2.0, 1.0, 0.5], [1.0, 0.5, 0.2]]], np.float32)
INF = np.inf


def in_numpy(student, indices, logits, temperature=1.5):
    p, q = (in_float64.softmax(np.float64(x) / temperature) for x in (student[indices], logits))
    return temperature**2 * in_float64.kl(q, p), temperature * (p - q)


def linear(student, teacher, **settings):
    return linear_top_k_forward_kl(student, np.eye(9, dtype=np.float32), teacher, chunk_size=1, **settings)


@pytest.mark.parametrize("loss", [top_k_forward_kl, linear])
@pytest.mark.parametrize("padding", [(-1, -INF), (-1, 3.0), (4, -INF)], ids=["both", "index -1", "logit -inf"])
def test_absent_entries_have_no_share(loss, padding):
    """Of rows that hold fewer than K tokens; the vocabulary's last token is not index -1."""
    indices, logits = INDICES.copy(), LOGITS.copy()
    indices[0, 0, 2], logits[0, 0, 2] = padding
    value, grad = unreduced_and_grad(lambda x: loss(x, TopK(indices, logits)))(STUDENT)
    want, slope = in_numpy(STUDENT[0, 0], [4, 8], LOGITS[0, 0, :2])
    np.testing.assert_allclose(value[0, 0], want, rtol=1e-4)
    np.testing.assert_allclose(grad[0, 0], np.bincount([4, 8], slope, 9), atol=1e-5)
    np.testing.assert_allclose(value[0, 1], in_numpy(STUDENT[0, 1], INDICES[0, 1], LOGITS[0, 1])[0], rtol=1e-4)


def test_nothing_present():
    """No token at all: as a teacher without one finite logit, it says nothing."""
    teacher = TopK(np.full((1, 2, 3), -1), LOGITS)
    value, grad = jax.value_and_grad(lambda x: linear(x, teacher).sum())(STUDENT)
    assert value == 0 and not grad.any()


def test_an_index_that_is_no_token():
    """Beyond the vocabulary, or in its padding: NaN, as for such a label."""
    for index, settings in (9, {}), (8, {"vocab_size": 8}):
        indices = INDICES.copy()
        indices[0, 0, 1] = index
        for loss in top_k_forward_kl, linear:
            value = loss(STUDENT, TopK(indices, LOGITS), **settings)
            assert np.isnan(value[0, 0]) and np.isfinite(value[0, 1])


def test_indices_are_distinct():
    indices = INDICES.copy()
    indices[0, 1, 2] = 7
    for array in np.asarray, jnp.asarray:
        with pytest.raises(ValueError, match="distinct at each position, got 7 twice; mark padding"):
            TopK(array(indices), array(LOGITS))
    jax.jit(lambda indices: TopK(indices, LOGITS).indices_BTK)(indices)  # traced: not read


def test_k_beyond_what_was_kept():
    teacher = TopK(INDICES, LOGITS)
    for loss in top_k_forward_kl, linear:
        with pytest.raises(ValueError, match="k must be at most the 3 tokens that the TopK holds, got 4"):
            loss(STUDENT, teacher, k=4)
        np.testing.assert_allclose(loss(STUDENT, teacher, k=3), loss(STUDENT, teacher))
    whole = as_one(top_k, STUDENT, k=512)
    assert whole.indices_BTK.shape[-1] == 9
    assert not top_k_forward_kl(STUDENT, whole, k=512).any()  # all of the vocabulary


def test_temperature_is_kept(tmp_path):
    kept = as_one(top_k, STUDENT, k=3, temperature=1.3)
    assert kept.temperature == 1.3 and jax.tree.map(lambda x: x, kept).temperature == 1.3
    np.savez(tmp_path / "teacher.npz", **kept._asdict())
    loaded = TopK(**np.load(tmp_path / "teacher.npz"))
    assert loaded.temperature == 1.3 and loaded._replace(temperature=2.0).temperature == 2
    for loss in top_k_forward_kl, linear:
        loss(STUDENT, loaded, temperature=1.3, return_metrics=True)
        loss(STUDENT, loaded, temperature=2.0)  # the loss itself is right at any
        with pytest.raises(ValueError, match=r"the loss's temperature 2.0, got one of 1.3"):
            loss(STUDENT, loaded, temperature=2.0, return_metrics=True)
    bare = TopK(INDICES, LOGITS)._asdict()
    assert bare.keys() == {"indices_BTK", "logits_BTK"}
