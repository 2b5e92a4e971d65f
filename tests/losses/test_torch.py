"""Against an implementation on torch, written from METHOD's equations, with torch's own autograd; and Optax."""

import jax
import numpy as np
import optax
import pytest
from quick import quick_jit

torch = pytest.importorskip("torch")
F = torch.nn.functional

from raft_jax import losses  # noqa: E402

B, T, D, V, K, TEMPERATURE = 3, 6, 8, 40, 7, 1.5
random = np.random.default_rng(0)
HIDDEN, TEACHER_HIDDEN = random.normal(size=(2, B, T, D)).astype(np.float32)
UNEMBEDDING, TEACHER_UNEMBEDDING = random.normal(size=(2, D, V)).astype(np.float32)
LABELS = random.integers(0, V, (B, T))
MASK = np.arange(T) < np.array([[6], [2], [4]])


def torch_cross_entropy(logits, labels):
    """Eq. 5, a mean over each answer and then over the batch."""
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(B, T)
    return ((loss * MASK_T).sum(1) / MASK_T.sum(1)).mean()


def torch_distillation(student, teacher):
    """Eqs. 8 to 10."""
    kept = teacher.topk(K, dim=-1)
    target = F.softmax(kept.values / TEMPERATURE, dim=-1)
    logprobs = F.log_softmax(student.gather(-1, kept.indices) / TEMPERATURE, dim=-1)
    loss = F.kl_div(logprobs, target, reduction="none").sum(-1)
    return TEMPERATURE**2 * ((loss * MASK_T).sum(1) / MASK_T.sum(1)).mean()


MASK_T = torch.tensor(MASK).float()


def torch_value_and_grad(loss, *fixed):
    hidden, unembedding = (torch.tensor(x, requires_grad=True) for x in (HIDDEN, UNEMBEDDING))
    value = loss(hidden @ unembedding, *fixed)
    value.backward()
    return value.detach().numpy(), (hidden.grad.numpy(), unembedding.grad.numpy())


def same(got, want):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), got, want)


def jax_value_and_grad(loss):
    mean = quick_jit(jax.value_and_grad(lambda h, w: losses.sequence_mean(loss(h, w), MASK), (0, 1)))
    return mean(HIDDEN, UNEMBEDDING)


def test_cross_entropy():
    want = torch_value_and_grad(torch_cross_entropy, torch.tensor(LABELS))
    same(jax_value_and_grad(lambda h, w: losses.linear_cross_entropy(h, w, LABELS, chunk_size=4)), want)
    same(jax_value_and_grad(lambda h, w: losses.cross_entropy(h @ w, LABELS)), want)


def test_distillation():
    teacher = TEACHER_HIDDEN @ TEACHER_UNEMBEDDING
    want = torch_value_and_grad(torch_distillation, torch.tensor(teacher))
    same(
        jax_value_and_grad(
            lambda h, w: losses.linear_top_k_forward_kl(
                h, w, TEACHER_HIDDEN, TEACHER_UNEMBEDDING, k=K, temperature=TEMPERATURE, chunk_size=4
            )
        ),
        want,
    )
    same(jax_value_and_grad(lambda h, w: losses.top_k_forward_kl(h @ w, teacher, k=K, temperature=TEMPERATURE)), want)


def test_objective_over_steps():
    """Eqs. 11 and 12: three steps' weights and the gradient of the third."""
    teacher = TEACHER_HIDDEN @ TEACHER_UNEMBEDDING
    averages, state = np.zeros(2), losses.init_balance()
    for step in 1, 2, 3:
        scale = 1 + 0.2 * step
        student = torch.tensor(HIDDEN @ UNEMBEDDING * scale, requires_grad=True)
        sft, kl = torch_cross_entropy(student, torch.tensor(LABELS)), torch_distillation(student, torch.tensor(teacher))
        averages = 0.9 * averages + 0.1 * np.array([sft.item(), kl.item()])
        corrected = averages / (1 - 0.9**step)
        weight = corrected[0] / (corrected[1] + 1e-8)
        (sft + weight * kl).backward()

        def objective(student, state=state):
            sft = losses.sequence_mean(losses.cross_entropy(student, LABELS), MASK)
            kl = losses.sequence_mean(losses.top_k_forward_kl(student, teacher, k=K), MASK)
            weight, state = losses.update_balance(state, sft, kl)
            return losses.raft_objective(sft, kl, weight), (weight, state)

        step = quick_jit(jax.value_and_grad(objective, has_aux=True))
        (value, (got, state)), grad = step(student.detach().numpy())
        same((got, value, grad), (weight, (sft + weight * kl).item(), student.grad.numpy()))


def test_optax():
    student, teacher = HIDDEN @ UNEMBEDDING, TEACHER_HIDDEN @ TEACHER_UNEMBEDDING
    same(losses.cross_entropy(student, LABELS), optax.softmax_cross_entropy_with_integer_labels(student, LABELS))
    logprobs, target = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
    kl = optax.losses.kl_divergence_with_log_targets(logprobs, target)
    same(losses.forward_kl(student, teacher, temperature=1.0), kl)
    same(losses.top_k_forward_kl(student, teacher, k=V, temperature=1.0), kl)
    same(
        losses.reverse_kl(student, teacher, temperature=1.0),
        optax.losses.kl_divergence_with_log_targets(target, logprobs),
    )
