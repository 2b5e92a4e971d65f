"""The teacher's K most likely tokens, and the KL between the two distributions renormalised on them."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from raft_jax.losses import checks, placement


class TopK(NamedTuple):
    """The K most likely tokens of a teacher: from `top_k`, `linear_top_k`, a file or another process.

    The last two describe the whole vocabulary and feed metrics only; None where they are not known.
    """

    indices_BTK: jax.Array  # int32, most likely first
    logits_BTK: jax.Array  # their logits, before the temperature
    log_normalizer_BT: jax.Array | None = None  # log sum_a exp(u_a / temperature) over the vocabulary
    entropy_BT: jax.Array | None = None  # nats, at the temperature


def mask_padding(logits: jax.Array, vocab_size: int) -> jax.Array:
    """-inf in the columns that pad the vocabulary."""
    if logits.shape[-1] == vocab_size:
        return logits
    return jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)


def log_normalizer(logits: jax.Array) -> jax.Array:
    """log sum exp over the last axis; -inf where every logit is."""
    top = jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf)
    top = jnp.where(jnp.isneginf(top), 0, top)
    return jnp.log(jnp.sum(jnp.exp(logits - top), axis=-1)) + top[..., 0]


def log_softmax(logits: jax.Array) -> jax.Array:
    """Logprobs over the last axis; -inf everywhere where every logit is -inf."""
    normalizer = log_normalizer(logits)[..., None]
    return logits - jnp.where(jnp.isneginf(normalizer), 0, normalizer)


def describe(logits: jax.Array, temperature: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(largest logit, log normalizer, entropy in nats) of softmax(logits / temperature) over the last axis."""
    best = jnp.max(logits, axis=-1)
    top = jnp.where(jnp.isneginf(best), 0, best)
    shifted = (logits - top[..., None]) / temperature
    weights = jnp.exp(shifted)
    total = jnp.sum(weights, axis=-1)
    moment = jnp.sum(jnp.where(weights == 0, 0, weights * shifted), axis=-1)
    entropy = jnp.where(total == 0, 0, jnp.log(total) - moment / total)
    return best, jnp.log(total) + top / temperature, entropy


def _mass(kept: jax.Array, normalizer_BT: jax.Array) -> jax.Array:
    """Probability of the kept scaled logits under the normalizer of all."""
    return jnp.exp(log_normalizer(kept) - jnp.where(jnp.isneginf(normalizer_BT), 0, normalizer_BT))


def select(logits: jax.Array, k: int, recall: float | None, shards: int) -> tuple[jax.Array, jax.Array]:
    """(values, indices) of the k largest along the last axis, largest first.

    Exact, or by `jax.lax.approx_max_k` with the given recall. Of equal values at the last place it depends on the
    platform which are taken, and on nothing else.
    """
    size = logits.shape[-1] // shards
    split = logits.reshape(*logits.shape[:-1], shards, size)
    if recall is not None:
        values, indices = jax.lax.approx_max_k(split, min(k, size), recall_target=recall)
    elif shards > 1:
        values, indices = _by_bins(split, min(k, size))
    else:
        values, indices = jax.lax.platform_dependent(
            split, cpu=lambda x: tuple(jax.lax.top_k(x, k)), default=lambda x: _by_bins(x, k)
        )
    indices = (indices + size * jnp.arange(shards, dtype=indices.dtype)[:, None]).reshape(*logits.shape[:-1], -1)
    values = values.reshape(indices.shape)
    if shards == 1:
        return values, indices
    values, order = _by_sort(values, k)
    return values, jnp.take_along_axis(indices, order, axis=-1)


def _by_bins(values: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Exact top k for compilers that sort: the k largest lie in the k bins with the largest maxima."""
    size = values.shape[-1]
    depth = 2 ** max(0, round(math.log2(size / k) / 2))
    if depth == 1:
        return _by_sort(values, k)
    padding = -size % depth
    if padding:
        values = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, padding)], constant_values=-jnp.inf)
    num_bins = (size + padding) // depth
    binned = values.reshape(*values.shape[:-1], depth, num_bins)
    _, bins = _by_sort(binned.max(-2), k)
    candidates = jnp.take_along_axis(binned, bins[..., None, :], axis=-1)
    values, order = _by_sort(candidates.reshape(*bins.shape[:-1], depth * k), k)
    return values, order // k * num_bins + jnp.take_along_axis(bins, order % k, axis=-1)


def _by_sort(values: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Top k that stays within its shard on every backend, which `jax.lax.top_k` does not."""
    indices = jax.lax.broadcasted_iota(jnp.int32, values.shape, values.ndim - 1)
    values, indices = jax.lax.sort((-values, indices), num_keys=1, is_stable=True)
    return -values[..., :k], indices[..., :k]


def top_k(
    logits_BTV: jax.Array,
    *,
    k: int = 512,
    temperature: float = 1.5,
    vocab_size: int | None = None,
    recall: float | None = None,
    vocab_shards: int | None = None,
) -> TopK:
    """The K most likely tokens at each position, to be kept in place of a teacher.

    Args:
        logits_BTV: [B, T, V], float, before the temperature. Carries no gradient.
        k: tokens kept, >= 1; more than the vocabulary means all of it.
        temperature: > 0; of the two statistics, not of the logits that are kept.
        vocab_size: columns beyond it pad the vocabulary and do not exist. Default: V.
        recall: expected share of the true top K that `jax.lax.approx_max_k` finds, in (0, 1]. Default: exact.
        vocab_shards: devices over which the vocabulary is split (see `linear_cross_entropy`).

    Returns:
        TopK of [B, T, K] and [B, T], logits in float32.

    RAFT (arXiv:2606.00147), Eq. 9.

    >>> top_k(jnp.log(jnp.array([[[0.1, 0.6, 0.3]]])), k=2).indices_BTK.tolist()
    [[[1, 2]]]
    """
    checks.floating("logits_BTV", logits_BTV, 3)
    checks.truncation(k, recall)
    checks.temperature(temperature)
    vocab_size = checks.vocab_size(vocab_size, logits_BTV=logits_BTV.shape[-1])
    shards = placement.vocab_shards(vocab_shards, logits_BTV)

    def search(logits_BTV):
        logits_BTV = mask_padding(checks.widen(jax.lax.stop_gradient(logits_BTV)), vocab_size)
        values_BTK, indices_BTK = select(logits_BTV, min(k, vocab_size), recall, shards)
        return TopK(indices_BTK, values_BTK, *describe(logits_BTV, temperature)[1:])

    return placement.automatic(search, logits_BTV)


def first(teacher: TopK, k: int) -> TopK:
    """The k most likely of what is there."""
    return teacher._replace(indices_BTK=teacher.indices_BTK[..., :k], logits_BTK=teacher.logits_BTK[..., :k])


def truncated_forward_kl(student_BTK: jax.Array, teacher_BTK: jax.Array, temperature: float) -> jax.Array:
    """T² KL(q̃ || p̃) in nats from the logits of both at the teacher's tokens; none for the teacher."""
    return _truncated(student_BTK, jax.lax.stop_gradient(teacher_BTK), jnp.asarray(temperature, student_BTK.dtype))


@jax.custom_vjp
def _truncated(student_BTK, teacher_BTK, temperature):
    return _truncated_forward(student_BTK, teacher_BTK, temperature)[0]


def _truncated_forward(student_BTK, teacher_BTK, temperature):
    student_BTK, teacher_BTK = student_BTK / temperature, teacher_BTK / temperature
    student_logprobs_BTK, teacher_logprobs_BTK = log_softmax(student_BTK), log_softmax(teacher_BTK)
    p_BTK, q_BTK = jnp.exp(student_logprobs_BTK), jnp.exp(teacher_logprobs_BTK)
    # Not "where q > 0": a NaN would be no loss.
    terms_BTK = jnp.where(q_BTK == 0, 0, q_BTK * (teacher_logprobs_BTK - student_logprobs_BTK))
    # Between close distributions the terms cancel to rounding. There, with d = log q - log p up to a constant,
    # KL = sum q d + log sum q exp(-d): precise, and exactly 0 where d is.
    apart_BTK = jnp.where(student_BTK == teacher_BTK, 0, teacher_BTK - student_BTK)
    close_BT1 = jnp.max(jnp.abs(apart_BTK), axis=-1, keepdims=True, initial=0) < 0.5
    apart_BTK = jnp.where(close_BT1, apart_BTK, 0)
    excess_BTK = jnp.expm1(-apart_BTK)
    mean_BT1 = jnp.sum(q_BTK * excess_BTK, axis=-1, keepdims=True)
    close_nats_BT = jnp.sum(q_BTK * apart_BTK, axis=-1) + jnp.log1p(mean_BT1[..., 0])
    nats_BT = jnp.where(close_BT1[..., 0], close_nats_BT, jnp.sum(terms_BTK, axis=-1))
    slope_BTK = jnp.where(close_BT1, q_BTK * (excess_BTK - mean_BT1) / (1 + mean_BT1), p_BTK - q_BTK)
    # A teacher without one finite logit says nothing: no loss above, no gradient here.
    slope_BTK = slope_BTK * jnp.any(q_BTK > 0, axis=-1, keepdims=True)
    return temperature**2 * nats_BT, temperature * slope_BTK


def _truncated_backward(slope_BTK, cotangent_BT):
    return cotangent_BT[..., None] * slope_BTK, jnp.zeros_like(slope_BTK), jnp.zeros((), slope_BTK.dtype)


_truncated.defvjp(_truncated_forward, _truncated_backward)


def metrics(teacher: TopK, student_BTK: jax.Array, described: tuple, temperature: float) -> dict[str, jax.Array]:
    """What the truncation hides, each [B, T], from `describe` of the student; of the teacher only what is known."""
    best_BT, normalizer_BT, entropy_BT = described
    values = {
        "student_mass": _mass(student_BTK / temperature, normalizer_BT),
        "student_entropy": entropy_BT,
        "agreement": (student_BTK[..., 0] >= best_BT).astype(entropy_BT.dtype),
    }
    if teacher.log_normalizer_BT is not None:
        teacher_BTK = checks.widen(teacher.logits_BTK)
        values["teacher_mass"] = _mass(teacher_BTK / temperature, teacher.log_normalizer_BT)
    if teacher.entropy_BT is not None:
        values["teacher_entropy"] = teacher.entropy_BT
    return jax.lax.stop_gradient(values)
