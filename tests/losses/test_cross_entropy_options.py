"""Label smoothing, z-loss and the returned log-sum-exp: against torch, and NumPy in float64."""

from functools import partial

import jax
import numpy as np
import pytest
from quick import quick_jit

from raft_jax.losses import TiedEmbedding, cross_entropy, linear_cross_entropy, linear_raft_losses

torch = pytest.importorskip("torch")

random = np.random.default_rng(0)
HIDDEN, UNEMBEDDING = random.normal(size=(2, 5, 4)).astype(np.float32), random.normal(size=(4, 160)).astype(np.float32)
LABELS = np.array([[3, 0, -100, 149, 7], [1, -100, 2, 5, 9]])
WEIGHT, OTHER = random.random((2, 2, 5)).astype(np.float32)
SMOOTHING, Z_LOSS, REAL = 0.1, 0.3, 150  # columns beyond are padding


def by_torch():
    """sum of WEIGHT loss + OTHER logsumexp, its parts, and the gradients."""
    hidden, unembedding = (torch.tensor(np.float64(x), requires_grad=True) for x in (HIDDEN, UNEMBEDDING))
    logits = (hidden @ unembedding)[..., :REAL]
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.tensor(LABELS).flatten(), label_smoothing=SMOOTHING, reduction="none"
    ).view(2, 5)
    logsumexp = torch.logsumexp(logits, -1)
    loss = loss + Z_LOSS * logsumexp**2 * torch.tensor(LABELS >= 0)
    ((torch.tensor(WEIGHT) * loss).sum() + (torch.tensor(OTHER) * logsumexp).sum()).backward()
    return [x.detach().numpy() for x in (loss, logsumexp, hidden.grad, unembedding.grad)]


SETTINGS = {"label_smoothing": SMOOTHING, "z_loss": Z_LOSS, "vocab_size": REAL}
FORMS = {
    "logits": lambda h, w, **s: cross_entropy(h @ w, LABELS, **s),
    "linear": lambda h, w, **s: linear_cross_entropy(h, w, LABELS, chunk_size=3, **s),
    "tied": lambda h, w, **s: linear_cross_entropy(h, TiedEmbedding(w.T), LABELS, chunk_size=512, **s),
}


@pytest.mark.parametrize("form", FORMS)
def test_all_three(form):
    def step(hidden, unembedding):
        loss, logsumexp = FORMS[form](hidden, unembedding, return_logsumexp=True, **SETTINGS)
        return (WEIGHT * loss).sum() + (OTHER * logsumexp).sum(), (loss, logsumexp)

    (_, outputs), grads = quick_jit(jax.value_and_grad(step, (0, 1), has_aux=True))(HIDDEN, UNEMBEDDING)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), [*outputs, *grads], by_torch())


def test_weighted_and_at_once():
    """The same loss, in the other two forms."""
    want, *_ = by_torch()
    got = linear_cross_entropy(HIDDEN, UNEMBEDDING, LABELS, weight_BT=WEIGHT, chunk_size=3, **SETTINGS)
    np.testing.assert_allclose(got, (WEIGHT * want).sum(), rtol=1e-5)
    models = HIDDEN, UNEMBEDDING, HIDDEN, UNEMBEDDING
    sft, _ = linear_raft_losses(HIDDEN, LABELS, *models, chunk_size=3, **SETTINGS)
    np.testing.assert_allclose(sft, want, rtol=1e-5, atol=1e-6)
