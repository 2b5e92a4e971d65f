"""Every loss in plain `jax.numpy`, for reading and as the reference that tests compare the fast versions with.

There is no chunking, no sharding and no custom derivative here; all logits [..., V] exist at once. Near the teacher the
KLs are less precise than those of `pointwise.py`, and masked values must be finite.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def logits(hidden, unembedding_DV, *, bias_V=0.0, scale=1.0, softcap=None):
    """v = softcap tanh(scale (h W + bias) / softcap)"""
    values = scale * (hidden @ unembedding_DV + bias_V)
    return values if softcap is None else softcap * jnp.tanh(values / softcap)


def cross_entropy(logits, labels, *, label_smoothing=0.0, z_loss=0.0):
    """log sum_a exp(v_a) - sum_a y_a v_a + z_loss (log sum_a exp(v_a))², y the smoothed one-hot label. Eq. 5."""
    V = logits.shape[-1]
    logsumexp = jax.nn.logsumexp(logits, axis=-1)
    target = (1 - label_smoothing) * jax.nn.one_hot(labels, V) + label_smoothing / V
    loss = logsumexp - jnp.sum(target * logits, axis=-1) + z_loss * logsumexp**2
    return jnp.where(labels < 0, 0.0, loss)


def kl(log_p, log_q):
    """KL(p || q) = sum_a p_a (log p_a - log q_a)"""
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def forward_kl(student_logits, teacher_logits, *, temperature=1.5):
    """τ² KL(q || p)"""
    log_p, log_q = _logprobs(student_logits, teacher_logits, temperature)
    return temperature**2 * kl(log_q, log_p)


def reverse_kl(student_logits, teacher_logits, *, temperature=1.5):
    """τ² KL(p || q)"""
    log_p, log_q = _logprobs(student_logits, teacher_logits, temperature)
    return temperature**2 * kl(log_p, log_q)


def jensen_shannon(student_logits, teacher_logits, *, beta=0.5, temperature=1.5):
    """τ² [beta KL(q || m) + (1 - beta) KL(p || m)],  m = beta q + (1 - beta) p"""
    log_p, log_q = _logprobs(student_logits, teacher_logits, temperature)
    log_m = jnp.logaddexp(jnp.log(beta) + log_q, jnp.log1p(-beta) + log_p)
    return temperature**2 * (beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m))


def top_k_forward_kl(student_logits, teacher_logits, *, k=512, temperature=1.5):
    """`forward_kl` on the teacher's K most likely tokens, both distributions renormalised on them. Eqs. 8 to 10."""
    teacher_logits, indices = jax.lax.top_k(teacher_logits, min(k, teacher_logits.shape[-1]))
    student_logits = jnp.take_along_axis(student_logits, indices, axis=-1)
    return forward_kl(student_logits, teacher_logits, temperature=temperature)


def _logprobs(student_logits, teacher_logits, temperature):
    teacher_logits = jax.lax.stop_gradient(teacher_logits)
    return [jax.nn.log_softmax(x / temperature) for x in (student_logits, teacher_logits)]
