"""Against TRL's public generalised Jensen-Shannon divergence, where TRL is installed."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from raft_jax.losses import forward_kl, jensen_shannon, reverse_kl, top_k_forward_kl  # noqa: E402

random = np.random.default_rng(0)
STUDENT, TEACHER = random.normal(size=(2, 2, 5, 30)).astype(np.float32) * 2


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1])
@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_generalized_jsd(beta, temperature):
    """Theirs leaves T² out and takes the two KLs as the ends of beta."""
    from trl.experimental.gkd import GKDTrainer

    theirs = GKDTrainer.generalized_jsd_loss(
        torch.tensor(STUDENT), torch.tensor(TEACHER), beta=beta, temperature=temperature, reduction="none"
    ).sum(-1)
    if beta in (0, 1):
        ours = (forward_kl, reverse_kl)[beta](STUDENT, TEACHER, temperature=temperature)
    else:
        ours = jensen_shannon(STUDENT, TEACHER, beta=beta, temperature=temperature)
    np.testing.assert_allclose(ours, temperature**2 * theirs.numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", [4, 30])
def test_top_k(k):
    """Theirs keeps the student's most likely tokens. Given one ranking for both models, that is the teacher's."""
    from trl.experimental.sdft.loss_utils import compute_topk_self_distillation_loss

    teacher = 2 * STUDENT + 0.1 * np.sin(STUDENT)
    theirs = compute_topk_self_distillation_loss(
        torch.tensor(STUDENT),
        torch.tensor(teacher),
        distillation_topk=k,
        distillation_alpha=0.0,
        distillation_add_tail=False,
    )
    ours = top_k_forward_kl(STUDENT, teacher, k=k, temperature=1.0)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-4, atol=1e-6)
