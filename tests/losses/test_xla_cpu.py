"""Without the workarounds for XLA on CPU: the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import quick_jit

from raft_jax.losses import TiedEmbedding, linear_cross_entropy, linear_raft_losses, xla_cpu

random = np.random.default_rng(0)
HIDDEN, TEACHER = (jnp.asarray(random.normal(size=(2, 6, 8)), jnp.bfloat16) for _ in range(2))
TABLE, LABELS = jnp.asarray(random.normal(size=(400, 8)), jnp.bfloat16), random.integers(0, 400, (2, 6))


@pytest.mark.parametrize("tied", [False, True])
def test_plain_is_the_same(tied, monkeypatch):
    """In bfloat16, over several chunks and blocks: the form with weights, and both losses at once."""

    def loss(hidden, table):
        head = TiedEmbedding(table) if tied else table.T
        weighted = linear_cross_entropy(hidden, head, LABELS, weight_BT=jnp.ones((2, 6)), chunk_size=4)
        sft, kl = linear_raft_losses(hidden, LABELS, hidden, head, TEACHER, head, k=9, chunk_size=4)
        return weighted + sft.sum() + 3 * kl.sum()

    found = []
    for enabled in True, False:
        monkeypatch.setattr(xla_cpu, "ENABLED", enabled)
        found.append(quick_jit(jax.value_and_grad(lambda *x: loss(*x), (0, 1)))(HIDDEN, TABLE))
    found = jax.tree.map(np.float32, found)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0.01, atol=1e-3 * np.abs(y).max()), *found)
