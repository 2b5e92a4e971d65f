"""The teacher's K most likely tokens, and the KL between the two distributions renormalised on them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from raft_jax.losses import checks


class TopK(NamedTuple):
    """The K most likely tokens of a teacher: from `top_k`, `linear_top_k`, a file or another process.

    The last three describe the whole vocabulary and feed the metrics only; None where unknown.
    """

    indices_BTK: jax.Array  # int32, most likely first
    logits_BTK: jax.Array  # their logits, before the temperature
    log_normalizer_BT: jax.Array | None = None  # log sum_a exp(u_a / temperature) over the vocabulary
    entropy_BT: jax.Array | None = None  # nats, at the temperature
    argmax_BT: jax.Array | None = None  # the most likely token; None means indices_BTK[..., 0]


def mask_padding(logits_BTV: jax.Array, vocab_size: int) -> jax.Array:
    """-inf in the columns that pad the vocabulary."""
    if logits_BTV.shape[-1] == vocab_size:
        return logits_BTV
    return jnp.where(jnp.arange(logits_BTV.shape[-1]) < vocab_size, logits_BTV, -jnp.inf)


def log_normalizer(logits: jax.Array) -> jax.Array:
    """log sum exp over the last axis; -inf where every logit is."""
    top = jnp.max(logits, axis=-1, keepdims=True)
    top = jnp.where(jnp.isneginf(top), 0, top)
    return jnp.log(jnp.sum(jnp.exp(logits - top), axis=-1)) + top[..., 0]


def log_softmax(logits: jax.Array) -> jax.Array:
    """Logprobs over the last axis; -inf everywhere where every logit is -inf."""
    normalizer = log_normalizer(logits)[..., None]
    return logits - jnp.where(jnp.isneginf(normalizer), 0, normalizer)


def distribution_stats(logits_BTV: jax.Array, temperature: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(log normalizer, entropy in nats, most likely token) of the softmax at the temperature, each [B, T]."""
    scaled_BTV = logits_BTV / temperature
    normalizer_BT = log_normalizer(scaled_BTV)
    logprobs_BTV = scaled_BTV - normalizer_BT[..., None]
    probs_BTV = jnp.exp(logprobs_BTV)
    entropy_BT = -jnp.sum(jnp.where(probs_BTV > 0, probs_BTV * logprobs_BTV, 0), axis=-1)
    return normalizer_BT, entropy_BT, jnp.argmax(logits_BTV, axis=-1)


def top_k(logits_BTV: jax.Array, k: int = 512, *, temperature: float = 1.5, vocab_size: int | None = None) -> TopK:
    """The K most likely tokens of each position, with what the metrics need. No gradient."""
    checks.floating("logits_BTV", logits_BTV, 3)
    checks.positive("k", k)
    checks.temperature(temperature)
    vocab_size = checks.vocab_size(vocab_size, logits_BTV=logits_BTV.shape[-1])
    logits_BTV = mask_padding(checks.widen(jax.lax.stop_gradient(logits_BTV)), vocab_size)
    return select(logits_BTV, min(k, vocab_size), temperature, with_stats=True)


def select(logits_BTV: jax.Array, k: int, temperature: float, with_stats: bool) -> TopK:
    values_BTK, indices_BTK = jax.lax.top_k(logits_BTV, k)
    stats = distribution_stats(logits_BTV, temperature) if with_stats else (None, None, None)
    return TopK(indices_BTK, values_BTK, *stats)


@jax.custom_vjp
def truncated_forward_kl(student_BTK: jax.Array, teacher_BTK: jax.Array, temperature: jax.Array) -> jax.Array:
    """T² KL(q̃ || p̃) in nats from the logits of both at the teacher's tokens."""
    return _truncated_forward(student_BTK, teacher_BTK, temperature)[0]


def _truncated_forward(student_BTK, teacher_BTK, temperature):
    student_logprobs_BTK = log_softmax(student_BTK / temperature)
    teacher_logprobs_BTK = log_softmax(teacher_BTK / temperature)
    teacher_probs_BTK = jnp.exp(teacher_logprobs_BTK)
    terms_BTK = teacher_probs_BTK * (teacher_logprobs_BTK - student_logprobs_BTK)
    nats_BT = temperature**2 * jnp.sum(jnp.where(teacher_probs_BTK > 0, terms_BTK, 0), axis=-1)
    # A teacher without a single finite logit says nothing: no loss and no gradient.
    pull_BTK = jnp.exp(student_logprobs_BTK) * jnp.any(teacher_probs_BTK > 0, axis=-1, keepdims=True)
    return nats_BT, (temperature * (pull_BTK - teacher_probs_BTK), teacher_BTK, temperature)


def _truncated_backward(residuals, cotangent_BT):
    slope_BTK, teacher_BTK, temperature = residuals
    return cotangent_BT[..., None] * slope_BTK, jnp.zeros_like(teacher_BTK), jnp.zeros_like(temperature)


truncated_forward_kl.defvjp(_truncated_forward, _truncated_backward)


def metrics(teacher: TopK, student_BTK: jax.Array, student_stats: tuple, temperature: float) -> dict[str, jax.Array]:
    """What the truncation hides, each [B, T]; the teacher's two only where its normalizer is known."""
    normalizer_BT, entropy_BT, argmax_BT = student_stats
    teacher_argmax_BT = teacher.indices_BTK[..., 0] if teacher.argmax_BT is None else teacher.argmax_BT
    values = {
        "student_mass": jnp.exp(log_normalizer(student_BTK / temperature) - normalizer_BT),
        "student_entropy": entropy_BT,
        "agreement": (argmax_BT == teacher_argmax_BT).astype(entropy_BT.dtype),
    }
    if teacher.log_normalizer_BT is not None:
        kept_BT = log_normalizer(checks.widen(teacher.logits_BTK) / temperature)
        values["teacher_mass"] = jnp.exp(kept_BT - teacher.log_normalizer_BT)
    if teacher.entropy_BT is not None:
        values["teacher_entropy"] = teacher.entropy_BT
    return jax.lax.stop_gradient(values)
