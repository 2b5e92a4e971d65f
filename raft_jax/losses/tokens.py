"""Losses of single tokens from logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from raft_jax.losses import checks, truncation
from raft_jax.losses.truncation import TopK


def cross_entropy(logits_BTV: jax.Array, labels_BT: jax.Array, *, vocab_size: int | None = None) -> jax.Array:
    """Negative log-likelihood of the labels.

        nats_bt = log sum_a exp(v_bta) - v_bt,label

    Args:
        logits_BTV: [B, T, V], float of any width; computed in float32.
        labels_BT: [B, T], int. A negative label is no target: 0 nats, no gradient.
        vocab_size: columns beyond it pad the vocabulary and do not exist. Default: V.

    Returns:
        nats_BT: [B, T], float32 (float64 for float64). NaN for a label that is not in the vocabulary.

    RAFT (arXiv:2606.00147), Eq. 5.

    >>> float(cross_entropy(jnp.log(jnp.array([[[0.5, 0.25, 0.25]]])), jnp.array([[1]]))[0, 0])  # log 4
    1.3862943...
    """
    checks.floating("logits_BTV", logits_BTV, 3)
    checks.integers("labels_BT", labels_BT)
    checks.shape("labels_BT", labels_BT, logits_BTV.shape[:2], "[B, T] of logits_BTV")
    vocab_size = checks.vocab_size(vocab_size, logits_BTV=logits_BTV.shape[-1])
    return _cross_entropy(vocab_size, logits_BTV, labels_BT)


def _cross_entropy(vocab_size, logits_BTV, labels_BT):
    return _cross_entropy_forward(vocab_size, logits_BTV, labels_BT)[0]


def _cross_entropy_forward(vocab_size, logits_BTV, labels_BT):
    wide_BTV = truncation.mask_padding(checks.widen(logits_BTV), vocab_size)
    normalizer_BT = truncation.log_normalizer(wide_BTV)
    picked_BT = pick_label(wide_BTV, labels_BT)
    return jnp.where(labels_BT < 0, 0, normalizer_BT - picked_BT), (logits_BTV, labels_BT, normalizer_BT)


def _cross_entropy_backward(vocab_size, residuals, cotangent_BT):
    logits_BTV, labels_BT, normalizer_BT = residuals
    wide_BTV = truncation.mask_padding(checks.widen(logits_BTV), vocab_size)
    slope_BTV = cross_entropy_slope(wide_BTV, jnp.arange(logits_BTV.shape[-1]), labels_BT, normalizer_BT)
    return (slope_BTV * cotangent_BT[..., None]).astype(logits_BTV.dtype), None


def pick_label(logits_BTV, labels_BT):
    picked_BT1 = jnp.take_along_axis(logits_BTV, jnp.maximum(labels_BT, 0)[..., None], axis=-1, mode="fill")
    return picked_BT1[..., 0]


def cross_entropy_slope(logits_BTV, columns_V, labels_BT, normalizer_BT):
    """d nats / d logits: p - onehot(label), over any columns of the vocabulary."""
    probs_BTV = jnp.exp(logits_BTV - normalizer_BT[..., None])
    slope_BTV = probs_BTV - (columns_V == labels_BT[..., None])
    return jnp.where(labels_BT[..., None] < 0, 0, slope_BTV)


_cross_entropy = jax.custom_vjp(_cross_entropy, nondiff_argnums=(0,))
_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def top_k_forward_kl(
    student_logits_BTV: jax.Array,
    teacher_logits_BTV: jax.Array | TopK,
    *,
    k: int = 512,
    temperature: float = 1.5,
    vocab_size: int | None = None,
    return_metrics: bool = False,
) -> jax.Array | tuple[jax.Array, dict[str, jax.Array]]:
    """Forward KL on the teacher's K most likely tokens, both distributions renormalised there.

        nats_bt = T² sum_{a in 𝒦} q̃_a (log q̃_a - log p̃_a),   q = softmax(u / T),   p = softmax(v / T)

    Args:
        student_logits_BTV: [B, T, V], float, v.
        teacher_logits_BTV: [B, T, V], float, u; or a `TopK` computed before. Carries no gradient.
        k: tokens kept; more than the vocabulary means all of it.
        temperature: > 0.
        vocab_size: columns beyond it pad the vocabulary and do not exist. Default: V.
        return_metrics: also return what the truncation hides.

    Returns:
        nats_BT: [B, T], float32. With metrics (nats_BT, {name: values_BT}): teacher_mass and student_mass
        (probability on 𝒦), teacher_entropy and student_entropy (nats, whole vocabulary), agreement (1 where
        the most likely tokens coincide), all at the temperature and without gradient.

    RAFT (arXiv:2606.00147), Eqs. 8 to 10.
    """
    checks.floating("student_logits_BTV", student_logits_BTV, 3)
    checks.temperature(temperature)
    if isinstance(teacher_logits_BTV, TopK):
        teacher = teacher_logits_BTV
        vocab_size = checks.vocab_size(vocab_size, student_logits_BTV=student_logits_BTV.shape[-1])
        teacher = TopK(*(part if part is None else part[..., :k] if part.ndim == 3 else part for part in teacher))
    else:
        checks.floating("teacher_logits_BTV", teacher_logits_BTV, 3)
        checks.shape("teacher_logits_BTV", teacher_logits_BTV[..., 0], student_logits_BTV.shape[:2], "the student's")
        vocab_size = checks.vocab_size(
            vocab_size,
            student_logits_BTV=student_logits_BTV.shape[-1],
            teacher_logits_BTV=teacher_logits_BTV.shape[-1],
        )
        teacher = truncation.top_k(teacher_logits_BTV, k, temperature=temperature, vocab_size=vocab_size)
    teacher = jax.lax.stop_gradient(teacher)
    student_BTK = checks.widen(jnp.take_along_axis(student_logits_BTV, teacher.indices_BTK, axis=-1))
    nats_BT = truncation.truncated_forward_kl(
        student_BTK, checks.widen(teacher.logits_BTK), jnp.asarray(temperature, student_BTK.dtype)
    )
    if not return_metrics:
        return nats_BT
    wide_BTV = truncation.mask_padding(checks.widen(jax.lax.stop_gradient(student_logits_BTV)), vocab_size)
    stats = truncation.distribution_stats(wide_BTV, temperature)
    return nats_BT, truncation.metrics(teacher, student_BTK, stats, temperature)
