"""Losses from logits [B, T, V]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from raft_jax.losses import checks, sharding, truncation
from raft_jax.losses.pointwise import CrossEntropy, ForwardKL, JensenShannon, ReverseKL, any_nonzero
from raft_jax.losses.sharding import VocabSharding
from raft_jax.losses.truncation import TopK


def cross_entropy(
    logits_BTV: jax.Array,
    labels_BT: jax.Array,
    *,
    vocab_size: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    return_logsumexp: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Negative log-likelihood of the labels.

        loss_bt = Z_bt - sum_a y_bta v_bta + z_loss Z_bt²,    Z_bt = log sum_a exp(v_bta)
        y_bta = (1 - label_smoothing) [a = label_bt] + label_smoothing / V

    Args:
        logits_BTV: [B, T, V], or any leading shape; float.
        labels_BT: [B, T], int. Tokens with a negative label are ignored: loss 0, no gradient.
        vocab_size: columns at or beyond it are padding and get no probability. Default: V.
        label_smoothing: in [0, 1).
        z_loss: >= 0; keeps Z near 0.
        return_logsumexp: also return Z, which is differentiable too.

    Returns:
        loss_BT: [B, T], float32 (float64 for float64), nats; or (loss_BT, Z_BT). inf where the label's logit is -inf;
        NaN, with a NaN gradient, for a label >= vocab_size.

    Raises:
        ValueError: an argument is invalid; raised while tracing.

    RAFT (arXiv:2606.00147), Eq. 5.

    >>> logits_BTV = jnp.log(jnp.array([[[0.5, 0.25, 0.25]]]))
    >>> round(float(cross_entropy(logits_BTV, jnp.array([[1]]))[0, 0]), 4)  # log 4
    1.3863
    """
    checks.floating("logits_BTV", logits_BTV)
    labels_BT = checks.labels(labels_BT, logits_BTV.shape[:-1])
    vocab_size = checks.vocab_size(vocab_size, logits_BTV=logits_BTV.shape[-1])
    loss = CrossEntropy(
        vocab_size, checks.label_smoothing(label_smoothing), checks.z_loss(z_loss), bool(return_logsumexp)
    )
    run = sharding.automatic(labels_BT.ndim)(partial(_pointwise, loss, vocab_size))
    return run(logits_BTV, labels_BT)


def top_k_forward_kl(
    student_logits_BTV: jax.Array,
    teacher_logits_BTV: jax.Array | TopK,
    *,
    k: int | None = None,
    temperature: float = 1.5,
    vocab_size: int | None = None,
    recall: float | None = None,
    vocab_shards: int | str | Sequence[str] | None = None,
    return_metrics: bool = False,
) -> jax.Array | tuple[jax.Array, dict[str, jax.Array]]:
    """Forward KL on the teacher's K most likely tokens, both distributions renormalised on them.

        loss_bt = τ² sum_{a in 𝒦} q̃_a (log q̃_a - log p̃_a),    q = softmax(u / τ),    p = softmax(v / τ)

    Args:
        student_logits_BTV: v: [B, T, V], or any leading shape; float.
        teacher_logits_BTV: u: [B, T, V], float; or a precomputed `TopK`. No gradient.
        k: number of tokens kept, >= 1; capped at the size of the vocabulary. Default: 512; for a `TopK` all of its
            tokens, and a larger k is an error.
        temperature: τ > 0. May be traced; has no gradient.
        vocab_size: columns at or beyond it are padding and get no probability. Default: V.
        recall: expected share of the true top K that `jax.lax.approx_max_k` finds, in (0, 1]. Default: exact top K.
        vocab_shards: mesh axes that the vocabulary is sharded over, or their size (see `linear_cross_entropy`).
        return_metrics: also return metrics of the truncation.

    Returns:
        loss_BT: [B, T], float32, nats. With return_metrics (loss_BT, {name: [B, T]}), the metrics computed at the
        temperature and without gradient: teacher_mass and student_mass (probability of 𝒦), teacher_entropy and
        student_entropy (nats, over the whole vocabulary), agreement (1 where both models have the same most likely
        token). Where u is -inf, q̃ is 0 and the token still takes part in p̃ (a `TopK` treats such a token as absent).
        Where only v is -inf, the KL is inf and its gradient finite.

    Raises:
        ValueError: an argument is invalid; raised while tracing.

    RAFT (arXiv:2606.00147), Eqs. 8 to 10.

    >>> teacher_BTV = jnp.log(jnp.array([[[0.50, 0.30, 0.10, 0.10]]]))
    >>> student_BTV = jnp.log(jnp.array([[[0.20, 0.20, 0.10, 0.50]]]))
    >>> loss_BT = top_k_forward_kl(student_BTV, teacher_BTV, k=3, temperature=1.0)
    >>> round(float(loss_BT[0, 0]), 4)  # KL of (5/9, 3/9, 1/9) to (2/5, 2/5, 1/5)
    0.0564
    """
    checks.floating("student_logits_BTV", student_logits_BTV)
    checks.truncation(k, recall)
    tau = checks.temperature(temperature, checks.accumulation_dtype(student_logits_BTV.dtype))
    shape, sizes = student_logits_BTV.shape[:-1], {"student_logits_BTV": student_logits_BTV.shape[-1]}
    is_truncated = isinstance(teacher_logits_BTV, TopK)
    if is_truncated:
        truncation.check_given(teacher_logits_BTV, shape, temperature, return_metrics)
    else:
        checks.floating("teacher_logits_BTV", teacher_logits_BTV)
        checks.tokens("teacher_logits_BTV", teacher_logits_BTV, shape)
        sizes["teacher_logits_BTV"] = teacher_logits_BTV.shape[-1]
    vocab_size = checks.vocab_size(vocab_size, **sizes)
    split = VocabSharding(1) if is_truncated else VocabSharding.of(vocab_shards, teacher_logits_BTV)

    @sharding.automatic(len(shape))
    def loss(student, teacher, tau):
        teacher = jax.lax.stop_gradient(teacher)
        if is_truncated:
            teacher = truncation.given_top_k(teacher, k, vocab_size)
        else:
            logits = truncation.mask_padding(checks.upcast(teacher), vocab_size)
            values, indices = truncation.top_k_sharded(logits, min(k or 512, vocab_size), recall, split)
            normalizer, entropy = truncation.softmax_metrics(logits, tau)[1:] if return_metrics else (None, None)
            teacher = TopK(indices, values, normalizer, entropy)
        student_BTK, teacher_BTK = truncation.gather(student, teacher, vocab_size)
        loss_BT = _pointwise(ForwardKL(), student_BTK.shape[-1], student_BTK, (teacher_BTK, tau))
        if not return_metrics:
            return loss_BT
        student = truncation.mask_padding(checks.upcast(jax.lax.stop_gradient(student)), vocab_size)
        whole = truncation.softmax_metrics(student, tau)
        return loss_BT, truncation.truncation_metrics(teacher, student_BTK, teacher_BTK, whole, tau)

    return loss(student_logits_BTV, teacher_logits_BTV, tau)


def forward_kl(
    student_logits_BTV: jax.Array,
    teacher_logits_BTV: jax.Array,
    *,
    temperature: float = 1.5,
    vocab_size: int | None = None,
) -> jax.Array:
    """Forward KL over the whole vocabulary, without the truncation of `top_k_forward_kl`.

        loss_bt = τ² sum_a q_a (log q_a - log p_a),    q = softmax(u / τ),    p = softmax(v / τ)

    Args:
        student_logits_BTV: v: [B, T, V], or any leading shape; float.
        teacher_logits_BTV: u: [B, T, V], float. No gradient.
        temperature: τ > 0. May be traced; has no gradient.
        vocab_size: columns at or beyond it are padding and get no probability. Default: V.

    Returns:
        loss_BT: [B, T], float32, nats. inf, with a finite gradient, where p is 0 for a token whose q is not. Precise
        where the student is close to the teacher, and exactly 0 where both are equal.

    Raises:
        ValueError: an argument is invalid; raised while tracing.

    >>> teacher_BTV = jnp.log(jnp.array([[[0.5, 0.5]]]))
    >>> student_BTV = jnp.log(jnp.array([[[0.8, 0.2]]]))
    >>> round(float(forward_kl(student_BTV, teacher_BTV, temperature=1.0)[0, 0]), 4)
    0.2231
    """
    return _divergence(ForwardKL(), student_logits_BTV, teacher_logits_BTV, temperature, vocab_size)


def reverse_kl(
    student_logits_BTV: jax.Array,
    teacher_logits_BTV: jax.Array,
    *,
    temperature: float = 1.5,
    vocab_size: int | None = None,
) -> jax.Array:
    """Reverse KL over the whole vocabulary.

        loss_bt = τ² sum_a p_a (log p_a - log q_a),    q = softmax(u / τ),    p = softmax(v / τ)

    Args, Returns and Raises as in `forward_kl`, but inf, with gradient 0, where q is 0 for a token whose p is not.

    >>> teacher_BTV = jnp.log(jnp.array([[[0.5, 0.5]]]))
    >>> student_BTV = jnp.log(jnp.array([[[0.8, 0.2]]]))
    >>> round(float(reverse_kl(student_BTV, teacher_BTV, temperature=1.0)[0, 0]), 4)
    0.1927
    """
    return _divergence(ReverseKL(), student_logits_BTV, teacher_logits_BTV, temperature, vocab_size)


def jensen_shannon(
    student_logits_BTV: jax.Array,
    teacher_logits_BTV: jax.Array,
    *,
    beta: float = 0.5,
    temperature: float = 1.5,
    vocab_size: int | None = None,
) -> jax.Array:
    """Generalised Jensen-Shannon divergence over the whole vocabulary.

        loss_bt = τ² [beta KL(q || m) + (1 - beta) KL(p || m)],    m = beta q + (1 - beta) p

    Args, Returns and Raises as in `forward_kl`, and
        beta: weight of the teacher in the mixture, in (0, 1). The divergence vanishes like beta `forward_kl` as beta
            goes to 0, and like (1 - beta) `reverse_kl` as beta goes to 1.

    GKD (arXiv:2306.13649), Eq. 1.

    >>> teacher_BTV = jnp.log(jnp.array([[[0.5, 0.5]]]))
    >>> student_BTV = jnp.log(jnp.array([[[0.8, 0.2]]]))
    >>> round(float(jensen_shannon(student_BTV, teacher_BTV, temperature=1.0)[0, 0]), 4)
    0.0507
    """
    loss = JensenShannon(checks.beta(beta))
    return _divergence(loss, student_logits_BTV, teacher_logits_BTV, temperature, vocab_size)


def _divergence(loss, student_logits_BTV, teacher_logits_BTV, temperature, vocab_size):
    checks.floating("student_logits_BTV", student_logits_BTV)
    checks.floating("teacher_logits_BTV", teacher_logits_BTV)
    checks.tokens("teacher_logits_BTV", teacher_logits_BTV, student_logits_BTV.shape[:-1])
    sizes = [x.shape[-1] for x in (student_logits_BTV, teacher_logits_BTV)]
    tau = checks.temperature(temperature, checks.accumulation_dtype(student_logits_BTV.dtype))
    vocab_size = checks.vocab_size(vocab_size, student_logits_BTV=sizes[0], teacher_logits_BTV=sizes[1])

    @sharding.automatic(student_logits_BTV.ndim - 1)
    def run(student, teacher, tau):
        student, teacher = student[..., : min(sizes)], teacher[..., : min(sizes)]
        return _pointwise(loss, vocab_size, student, (jax.lax.stop_gradient(teacher), tau))

    return run(student_logits_BTV, teacher_logits_BTV, tau)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _pointwise(loss, vocab_size: int, logits_BTV, targets):
    """Applies a loss of pointwise.py to logits [B, T, V]; the outputs are [B, T]."""
    return _pointwise_forward(loss, vocab_size, logits_BTV, targets)[0]


def _pointwise_forward(loss, vocab_size, logits_BTV, targets):
    shape = logits_BTV.shape[:-1]
    outputs, residuals = loss.value(*_by_token(vocab_size, logits_BTV, targets))
    outputs = jax.tree.map(lambda x: x.reshape(shape), outputs)
    return outputs, (logits_BTV, targets, residuals)


def _pointwise_backward(loss, vocab_size, saved, cotangent):
    logits_BTV, targets, residuals = saved
    logits_NV, targets = _by_token(vocab_size, logits_BTV, targets)
    labels_N = targets if isinstance(loss, CrossEntropy) else None
    cotangent = loss.cotangent(labels_N, jax.tree.map(lambda x: x.reshape(logits_NV.shape[0]), cotangent))
    dlogits_NV = loss.dlogits(logits_NV, targets, residuals, cotangent, jnp.arange(logits_NV.shape[-1]))
    dlogits_NV = jnp.where(any_nonzero(cotangent)[:, None], dlogits_NV, 0)  # a masked row may hold NaN
    return dlogits_NV.astype(logits_BTV.dtype).reshape(logits_BTV.shape), None


_pointwise.defvjp(_pointwise_forward, _pointwise_backward)


def _by_token(vocab_size, logits_BTV, targets):
    """The logits as [N, V] in float32, padding masked, and the targets with their tokens on one axis likewise."""

    def logits(x):
        x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        return truncation.mask_padding(checks.upcast(x), vocab_size)

    if isinstance(targets, tuple):
        return logits(logits_BTV), (logits(targets[0]), targets[1])
    return logits(logits_BTV), targets.reshape(math.prod(targets.shape))
