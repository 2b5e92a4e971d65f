"""Divergences over the whole vocabulary, from logits: what the baselines distil with.

Each is two functions of logprobs, element by element, so that a block of the vocabulary is as good as all:

    terms(student, teacher) -> (what sums to its nats, what sums to its centre)
    slope(student, teacher, centre) -> d nats / d student logits, at temperature 1
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from raft_jax.losses import checks, placement, truncation


def forward_kl(
    student_logits_BTV: jax.Array,
    teacher_logits_BTV: jax.Array,
    *,
    temperature: float = 1.5,
    vocab_size: int | None = None,
) -> jax.Array:
    """Forward KL over the whole vocabulary: what `top_k_forward_kl` truncates.

        nats_bt = T² sum_a q_a (log q_a - log p_a),    q = softmax(u / T),    p = softmax(v / T)

    Args:
        student_logits_BTV: [B, T, V], float: v.
        teacher_logits_BTV: [B, T, V], float: u. Carries no gradient.
        temperature: T > 0.
        vocab_size: columns beyond it pad the vocabulary and do not exist. Default: V.

    Returns:
        nats_BT: [B, T], float32. inf where the student excludes what the teacher does not, with a finite gradient.

    >>> teacher_BTV = jnp.log(jnp.array([[[0.5, 0.5]]]))
    >>> student_BTV = jnp.log(jnp.array([[[0.8, 0.2]]]))
    >>> round(float(forward_kl(student_BTV, teacher_BTV, temperature=1.0)[0, 0]), 4)
    0.2231
    """
    return _from_logits(FORWARD_KL, student_logits_BTV, teacher_logits_BTV, temperature, vocab_size)


def reverse_kl(
    student_logits_BTV: jax.Array,
    teacher_logits_BTV: jax.Array,
    *,
    temperature: float = 1.5,
    vocab_size: int | None = None,
) -> jax.Array:
    """Reverse KL over the whole vocabulary.

        nats_bt = T² sum_a p_a (log p_a - log q_a),    q = softmax(u / T),    p = softmax(v / T)

    Args and Returns as in `forward_kl`; inf where the teacher excludes what the student does not, and no gradient.

    >>> teacher_BTV = jnp.log(jnp.array([[[0.5, 0.5]]]))
    >>> student_BTV = jnp.log(jnp.array([[[0.8, 0.2]]]))
    >>> round(float(reverse_kl(student_BTV, teacher_BTV, temperature=1.0)[0, 0]), 4)
    0.1927
    """
    return _from_logits(REVERSE_KL, student_logits_BTV, teacher_logits_BTV, temperature, vocab_size)


def jensen_shannon(
    student_logits_BTV: jax.Array,
    teacher_logits_BTV: jax.Array,
    *,
    beta: float = 0.5,
    temperature: float = 1.5,
    vocab_size: int | None = None,
) -> jax.Array:
    """Generalised Jensen-Shannon divergence over the whole vocabulary.

        nats_bt = T² [beta KL(q || m) + (1 - beta) KL(p || m)],    m = beta q + (1 - beta) p

    Args and Returns as in `forward_kl`, and
        beta: weight of the teacher in the mixture, in (0, 1). Towards the ends the divergence vanishes like
            beta `forward_kl` and (1 - beta) `reverse_kl`.

    GKD (arXiv:2306.13649), Eq. 1.

    >>> teacher_BTV = jnp.log(jnp.array([[[0.5, 0.5]]]))
    >>> student_BTV = jnp.log(jnp.array([[[0.8, 0.2]]]))
    >>> round(float(jensen_shannon(student_BTV, teacher_BTV, temperature=1.0)[0, 0]), 4)
    0.0507
    """
    checks.beta(beta)
    return _from_logits(JensenShannon(beta), student_logits_BTV, teacher_logits_BTV, temperature, vocab_size)


def expect(logprobs: jax.Array, values: jax.Array) -> jax.Array:
    """exp(logprobs) * values, 0 where the probability is."""
    probs = jnp.exp(logprobs)
    return jnp.where(probs == 0, 0, probs * values)  # not "where probs > 0": a NaN would be no loss


class ForwardKL(NamedTuple):
    def terms(self, student, teacher):
        return expect(teacher, teacher - student), jnp.zeros_like(student)

    def slope(self, student, teacher, centre):
        return jnp.exp(student) - jnp.exp(teacher)


class ReverseKL(NamedTuple):
    def terms(self, student, teacher):
        nats = expect(student, student - teacher)
        return nats, nats

    def slope(self, student, teacher, centre):
        pull = expect(student, student - teacher - centre)
        return jnp.where(jnp.isfinite(pull), pull, 0)


class JensenShannon(NamedTuple):
    beta: float

    def _ratios(self, student, teacher):
        """log(m / p) and log(m / q), exactly 0 where p = q."""
        apart = jnp.where(student == teacher, 0, teacher - student)
        below, above = jnp.minimum(apart, 0), jnp.maximum(apart, 0)
        common = jnp.log1p(self.beta * jnp.expm1(below)) + jnp.log1p((1 - self.beta) * jnp.expm1(-above))
        return common + above, common - below

    def terms(self, student, teacher):
        of_student, of_teacher = self._ratios(student, teacher)
        centre = -expect(student, of_student)
        return (1 - self.beta) * centre - self.beta * expect(teacher, of_teacher), centre

    def slope(self, student, teacher, centre):
        return (1 - self.beta) * expect(student, -self._ratios(student, teacher)[0] - centre)


FORWARD_KL, REVERSE_KL = ForwardKL(), ReverseKL()


def value(divergence, student, teacher, temperature):
    """(nats, residuals) from wide logits [..., V]."""
    normalizers = [truncation.log_normalizer(x / temperature)[..., None] for x in (student, teacher)]
    terms, centre = divergence.terms(*_logprobs((student, teacher), normalizers, temperature))
    # A teacher without one finite logit says nothing: no loss, and no gradient below.
    nats = jnp.where(jnp.isneginf(normalizers[1][..., 0]), 0, temperature**2 * jnp.sum(terms, axis=-1))
    return nats, (normalizers, jnp.sum(centre, axis=-1, keepdims=True))


def slope(divergence, student, teacher, residuals, temperature):
    """d nats / d student logits at any columns, from the residuals of the whole vocabulary."""
    normalizers, centre = residuals
    pull = divergence.slope(*_logprobs((student, teacher), normalizers, temperature), centre)
    return jnp.where(jnp.isneginf(normalizers[1]), 0, temperature * pull)


def _logprobs(logits, normalizers, temperature):
    return [x / temperature - jnp.where(jnp.isneginf(n), 0, n) for x, n in zip(logits, normalizers, strict=True)]


def _from_logits(divergence, student_logits_BTV, teacher_logits_BTV, temperature, vocab_size):
    checks.floating("student_logits_BTV", student_logits_BTV, 3)
    checks.floating("teacher_logits_BTV", teacher_logits_BTV, 3)
    checks.tokens("teacher_logits_BTV", teacher_logits_BTV, student_logits_BTV.shape[:2])
    checks.temperature(temperature)
    width = min(student_logits_BTV.shape[-1], teacher_logits_BTV.shape[-1])
    vocab_size = checks.vocab_size(
        vocab_size,
        student_logits_BTV=student_logits_BTV.shape[-1],
        teacher_logits_BTV=teacher_logits_BTV.shape[-1],
    )

    def loss(student, teacher):
        teacher = jax.lax.stop_gradient(teacher[..., :width])
        wide = jnp.promote_types(student.dtype, jnp.float32)
        return _divergence(divergence, vocab_size, student[..., :width], teacher, jnp.asarray(temperature, wide))

    return placement.automatic(loss, student_logits_BTV, teacher_logits_BTV)


def _divergence(divergence, vocab_size, student, teacher, temperature):
    return _divergence_forward(divergence, vocab_size, student, teacher, temperature)[0]


def _divergence_forward(divergence, vocab_size, student, teacher, temperature):
    wide = [truncation.mask_padding(checks.widen(x), vocab_size) for x in (student, teacher)]
    nats, residuals = value(divergence, *wide, temperature)
    return nats, (student, teacher, residuals, temperature)


def _divergence_backward(divergence, vocab_size, saved, cotangent):
    student, teacher, residuals, temperature = saved
    wide = [truncation.mask_padding(checks.widen(x), vocab_size) for x in (student, teacher)]
    pull = slope(divergence, *wide, residuals, temperature) * cotangent[..., None]
    return pull.astype(student.dtype), jnp.zeros_like(teacher), jnp.zeros_like(temperature)


_divergence = jax.custom_vjp(_divergence, nondiff_argnums=(0, 1))
_divergence.defvjp(_divergence_forward, _divergence_backward)
