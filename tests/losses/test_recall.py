"""What `recall` promises. On TPU XLA keeps the largest logit of each of M bins; elsewhere the top K is exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import as_one

from raft_jax.losses import TopK, linear_top_k, top_k, top_k_forward_kl


def num_bins(vocabulary, k, recall):
    """XLA's own choice of M."""
    search = lambda x: jax.lax.approx_max_k(x, k, recall_target=recall, aggregate_to_topk=False)  # noqa: E731
    return jax.eval_shape(search, jax.ShapeDtypeStruct((1, vocabulary), jnp.float32))[0].shape[-1]


def kept_by_bins(ranks, bins):
    """Which of the K most likely tokens, at random places, are the largest of their bin; most likely first."""
    random = np.random.default_rng(0)
    found = np.zeros((200, ranks), bool)
    for row in found:
        _, first = np.unique(random.integers(0, bins, ranks), return_index=True)
        row[first] = True
    return found


@pytest.mark.parametrize("vocabulary", [49152, 128256])
@pytest.mark.parametrize("recall", [0.8, 0.95, 0.99])
def test_promise(vocabulary, recall, k=512):
    """XLA promises (1 - 1/M)^(K-1) >= recall; token r of the K is lost with probability 1 - (1 - 1/M)^(r-1)."""
    bins = num_bins(vocabulary, k, recall)
    if bins == vocabulary:  # one token a bin: exact
        assert (vocabulary, recall) == (49152, 0.99)
        return
    stays = 1 - 1 / bins
    assert stays ** (k - 1) >= recall
    found = kept_by_bins(k, bins)
    np.testing.assert_allclose(found.mean(), bins / k * (1 - stays**k), atol=4 * found.mean(1).std() / 200**0.5)
    assert found.mean() >= recall
    assert found[:, :16].mean() > 1 - 16 / bins - 0.02


def test_exact_off_the_tpu():
    logits = np.random.default_rng(0).normal(size=(2, 3, 4096)).astype(np.float32)
    for shards in 1, 4:
        exact, found = (as_one(top_k, logits, k=64, recall=recall, vocab_shards=shards) for recall in (None, 0.5))
        jax.tree.map(np.testing.assert_array_equal, found, exact)
    hidden, unembedding = np.eye(8, dtype=np.float32)[None], logits.reshape(8, -1)[:, :1024]
    for recall in None, 0.5:
        found = as_one(linear_top_k, hidden, unembedding, k=9, chunk_size=3, recall=recall)
        np.testing.assert_array_equal(found.indices_BTK, top_k(hidden @ unembedding, k=9).indices_BTK)


def test_a_lost_token_is_outside():
    """What the search loses leaves both distributions; it is not an error of the others' weights."""
    student, teacher = np.random.default_rng(0).normal(size=(2, 1, 1, 12)).astype(np.float32)
    kept = np.delete(np.argsort(-teacher[0, 0])[:5], 3)
    found = TopK(kept[None, None], teacher[:, :, kept])
    whole = top_k_forward_kl(student[:, :, kept], teacher[:, :, kept], k=4)
    np.testing.assert_allclose(top_k_forward_kl(student, found), whole, rtol=1e-5)
