"""Losses of single tokens, from logits."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from raft_jax.losses import checks, placement, truncation
from raft_jax.losses.truncation import TopK


def cross_entropy(logits_BTV: jax.Array, labels_BT: jax.Array, *, vocab_size: int | None = None) -> jax.Array:
    """Negative log-likelihood of the labels.

        nats_bt = log sum_a exp(v_bta) - v_bt,label

    Args:
        logits_BTV: [B, T, V], float of any width.
        labels_BT: [B, T], int. A negative label is no target: 0 nats, no gradient.
        vocab_size: columns beyond it pad the vocabulary and do not exist. Default: V.

    Returns:
        nats_BT: [B, T], float32 (float64 for float64). inf where the label's logit is -inf; NaN for a label
        beyond the vocabulary.

    RAFT (arXiv:2606.00147), Eq. 5.

    >>> logits_BTV = jnp.log(jnp.array([[[0.5, 0.25, 0.25]]]))
    >>> round(float(cross_entropy(logits_BTV, jnp.array([[1]]))[0, 0]), 4)  # log 4
    1.3863
    """
    checks.floating("logits_BTV", logits_BTV, 3)
    checks.labels(labels_BT, logits_BTV.shape[:2])
    vocab_size = checks.vocab_size(vocab_size, logits_BTV=logits_BTV.shape[-1])
    return placement.automatic(functools.partial(_cross_entropy, vocab_size), logits_BTV, labels_BT)


def _cross_entropy(vocab_size, logits, labels):
    return _cross_entropy_forward(vocab_size, logits, labels)[0]


def _cross_entropy_forward(vocab_size, logits, labels):
    nats, normalizer = label_nats(truncation.mask_padding(checks.widen(logits), vocab_size), labels)
    return nats, (logits, labels, normalizer)


def _cross_entropy_backward(vocab_size, residuals, cotangent):
    logits, labels, normalizer = residuals
    wide = truncation.mask_padding(checks.widen(logits), vocab_size)
    slope = label_slope(jnp.exp(wide - normalizer[..., None]), jnp.arange(logits.shape[-1]), labels[..., None])
    return (slope * cotangent[..., None]).astype(logits.dtype), None


def label_nats(logits, labels):
    """(nats, log normalizer) from wide logits."""
    normalizer = truncation.log_normalizer(logits)
    return _nats(logits, labels, normalizer), normalizer


def _nats(logits, labels, normalizer):
    picked = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], axis=-1, mode="fill")[..., 0]
    return jnp.where(labels < 0, 0, normalizer - picked)


def label_slope(probs, columns, labels):
    """d nats / d logits = p - onehot(label), at any columns of the vocabulary."""
    return jnp.where(labels < 0, 0, probs - (columns == labels))


def label_nats_and_slope(logits, labels):
    """Both from wide logits of the whole vocabulary, with one exp each: XLA on CPU is slow at sums of exps."""
    highest = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    slope = label_slope(weights / total, jnp.arange(logits.shape[-1]), labels[..., None])
    return _nats(logits, labels, (highest + jnp.log(total))[..., 0]), slope


_cross_entropy = jax.custom_vjp(_cross_entropy, nondiff_argnums=(0,))
_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def top_k_forward_kl(
    student_logits_BTV: jax.Array,
    teacher_logits_BTV: jax.Array | TopK,
    *,
    k: int = 512,
    temperature: float = 1.5,
    vocab_size: int | None = None,
    recall: float | None = None,
    vocab_shards: int | None = None,
    return_metrics: bool = False,
) -> jax.Array | tuple[jax.Array, dict[str, jax.Array]]:
    """Forward KL on the teacher's K most likely tokens, both distributions renormalised on them.

        nats_bt = T² sum_{a in 𝒦} q̃_a (log q̃_a - log p̃_a),    q = softmax(u / T),    p = softmax(v / T)

    Args:
        student_logits_BTV: [B, T, V], float: v.
        teacher_logits_BTV: [B, T, V], float: u; or the `TopK` of an earlier pass. Carries no gradient.
        k: tokens kept, >= 1; more than the vocabulary means all of it.
        temperature: T > 0.
        vocab_size: columns beyond it pad the vocabulary and do not exist. Default: V.
        recall: expected share of the true top K that `jax.lax.approx_max_k` finds, in (0, 1]. Default: exact.
        vocab_shards: devices over which the vocabulary is split (see `linear_cross_entropy`).
        return_metrics: also return what the truncation hides.

    Returns:
        nats_BT: [B, T], float32. With metrics (nats_BT, {name: [B, T]}), at the temperature and without
        gradient: teacher_mass and student_mass (probability on 𝒦), teacher_entropy and student_entropy (nats,
        whole vocabulary), agreement (1 where the most likely tokens coincide). Where u is -inf q̃ is 0 and
        p̃ keeps its share; where v alone is -inf the KL is inf and its gradient finite.

    RAFT (arXiv:2606.00147), Eqs. 8 to 10.

    >>> teacher_BTV = jnp.log(jnp.array([[[0.50, 0.30, 0.10, 0.10]]]))
    >>> student_BTV = jnp.log(jnp.array([[[0.20, 0.20, 0.10, 0.50]]]))
    >>> nats_BT = top_k_forward_kl(student_BTV, teacher_BTV, k=3, temperature=1.0)
    >>> round(float(nats_BT[0, 0]), 4)  # KL of (5/9, 3/9, 1/9) to (2/5, 2/5, 1/5)
    0.0564
    """
    checks.floating("student_logits_BTV", student_logits_BTV, 3)
    checks.truncation(k, recall)
    checks.temperature(temperature)
    given = isinstance(teacher_logits_BTV, TopK)
    sizes = {"student_logits_BTV": student_logits_BTV.shape[-1]}
    if given:
        checks.top_k(teacher_logits_BTV, student_logits_BTV.shape[:2])
    else:
        checks.floating("teacher_logits_BTV", teacher_logits_BTV, 3)
        checks.tokens("teacher_logits_BTV", teacher_logits_BTV, student_logits_BTV.shape[:2])
        sizes["teacher_logits_BTV"] = teacher_logits_BTV.shape[-1]
    vocab_size = checks.vocab_size(vocab_size, **sizes)
    shards = None if given else placement.vocab_shards(vocab_shards, teacher_logits_BTV)

    def loss(student_logits, teacher):
        teacher = jax.lax.stop_gradient(teacher)
        if given:
            teacher = truncation.first(teacher, k)
        else:
            wide = truncation.mask_padding(checks.widen(teacher), vocab_size)
            values, indices = truncation.select(wide, min(k, vocab_size), recall, shards)
            described = truncation.describe(wide, temperature)[1:] if return_metrics else (None, None)
            teacher = TopK(indices, values, *described)
        student_BTK = checks.widen(jnp.take_along_axis(student_logits, teacher.indices_BTK, axis=-1))
        nats_BT = truncation.truncated_forward_kl(student_BTK, checks.widen(teacher.logits_BTK), temperature)
        if not return_metrics:
            return nats_BT
        student_logits = truncation.mask_padding(checks.widen(jax.lax.stop_gradient(student_logits)), vocab_size)
        described = truncation.describe(student_logits, temperature)
        return nats_BT, truncation.metrics(teacher, student_BTK, described, temperature)

    return placement.automatic(loss, student_logits_BTV, teacher_logits_BTV)
