"""Each loss at one token: its value from the logits, and its derivative with respect to any columns of the logits.

A loss is a frozen dataclass with

    value(logits_NV, targets) -> (outputs, residuals)                           over the whole vocabulary
    cotangent(tokens, outputs' cotangent) -> the cotangent for dlogits, 0 at ignored labels (tokens: `Targets.tokens`)
    dlogits(logits_NM, targets, residuals, cotangent, columns_M) -> [N, M]      at any columns of the vocabulary

in float32. All three work on any chunk of tokens, and `dlogits` on any block of the vocabulary. Residuals are
[N, ...]. Logits are -inf in padding columns. The caller sets the gradient to 0 in rows whose cotangent is 0, because
they may hold NaN. `needs_logits` says whether `dlogits` reads the logits; if not, they are not recomputed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from raft_jax.losses.lm_head import LogitConfig
from raft_jax.losses.truncation import gather, softmax_metrics, truncation_metrics


@dataclass(frozen=True)
class CrossEntropy:
    """log sum_a exp(v_a) - sum_a y_a v_a + z_loss (log sum_a exp(v_a))²; targets: labels [N]."""

    vocab_size: int
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    return_logsumexp: bool = False
    needs_logits: ClassVar[bool] = True

    def value(self, logits_NV, labels_N):
        top_N1, total_N1 = softmax_sums(logits_NV)
        logsumexp_N = (top_N1 + jnp.log(total_N1))[:, 0]
        index_N1 = jnp.clip(labels_N, 0, logits_NV.shape[-1] - 1)[:, None]
        target_N = jnp.take_along_axis(logits_NV, index_N1, axis=-1)[:, 0]
        if self.label_smoothing:
            mean_N = jnp.sum(jnp.where(self._real(jnp.arange(logits_NV.shape[-1])), logits_NV, 0), axis=-1)
            mean_N = mean_N / self.vocab_size
            target_N = (1 - self.label_smoothing) * target_N + self.label_smoothing * mean_N
        loss_N = logsumexp_N - target_N
        if self.z_loss:
            loss_N = loss_N + self.z_loss * logsumexp_N**2
        loss_N = jnp.where(labels_N < self.vocab_size, loss_N, jnp.nan)
        loss_N = jnp.where(labels_N < 0, 0, loss_N)
        return (loss_N, logsumexp_N) if self.return_logsumexp else loss_N, (top_N1, total_N1)

    def cotangent(self, labels_N, cotangent):
        def of_loss(x):
            return jnp.where(labels_N < 0, 0, x)

        return (of_loss(cotangent[0]), cotangent[1]) if self.return_logsumexp else of_loss(cotangent)

    def dlogits(self, logits_NM, labels_N, residuals, cotangent, columns_M):
        top_N1, total_N1 = residuals
        loss_N1, logsumexp_N1 = (x[:, None] for x in cotangent) if self.return_logsumexp else (cotangent[:, None], 0)
        probs_NM = jnp.exp(logits_NM - top_N1) * (1 / total_N1)
        of_probs = loss_N1 + logsumexp_N1
        if self.z_loss:
            of_probs = of_probs + 2 * self.z_loss * loss_N1 * (top_N1 + jnp.log(total_N1))
        loss_N1 = jnp.where(labels_N[:, None] < self.vocab_size, loss_N1, jnp.nan)
        is_label_NM = columns_M[None] == labels_N[:, None].astype(columns_M.dtype)
        targets_NM = jnp.where(is_label_NM, (1 - self.label_smoothing) * loss_N1, 0 * loss_N1)
        if self.label_smoothing:
            share = self.label_smoothing / self.vocab_size
            targets_NM = targets_NM + jnp.where(self._real(columns_M), share * loss_N1, 0)
        return of_probs * probs_NM - targets_NM

    def _real(self, columns_M):
        return columns_M[None] < self.vocab_size


class Divergence:
    """τ² times a divergence between softmax(v / τ) and softmax(u / τ); targets: (teacher logits u [N, V], τ).

    Subclasses define it elementwise; p is the student's probability, q the teacher's, and delta = log q - log p:

        terms(p, q, delta) -> terms whose sum over the vocabulary is the divergence
        centre(p, q, delta) -> terms whose sum over the vocabulary is the argument `total` of gradient
        gradient(p, q, delta, total) -> d divergence / d (v / τ)

    `curvature` is the divergence's curvature at p = q, in units of the Fisher matrix.
    """

    needs_logits: ClassVar[bool] = True
    curvature: ClassVar[float] = 1.0
    terms: ClassVar[Callable]
    centre: ClassVar[Callable]
    gradient: ClassVar[Callable]

    def value(self, student_NV, targets):
        teacher_NV, temperature = targets
        sums = softmax_sums(student_NV, temperature), softmax_sums(teacher_NV, temperature)
        p, q, delta = _compare(student_NV, teacher_NV, temperature, sums)
        # sum p - sum q is 0 but for rounding errors. At high temperatures their square is not small against the loss.
        rounding_N = jnp.sum(_difference(p, q, delta), axis=-1)
        loss_N = jnp.sum(self.terms(p, q, delta), axis=-1) - self.curvature / 2 * rounding_N**2
        # A teacher without any finite logit gives no target: loss 0 here, gradient 0 in `dlogits`.
        loss_N = jnp.where(sums[1][1][:, 0] == 0, 0, temperature**2 * jnp.maximum(loss_N, 0))
        return loss_N, (sums, jnp.sum(self.centre(p, q, delta), axis=-1, keepdims=True))

    def cotangent(self, tokens, cotangent):
        return cotangent

    def dlogits(self, student_NM, targets, residuals, cotangent_N, columns_M):
        teacher_NM, temperature = targets
        sums, total_N1 = residuals
        gradient_NM = self.gradient(*_compare(student_NM, teacher_NM, temperature, sums), total_N1)
        return jnp.where(sums[1][1] == 0, 0, temperature * cotangent_N[:, None] * gradient_NM)


@dataclass(frozen=True)
class ForwardKL(Divergence):
    def terms(self, p, q, delta):
        return _kl_terms(q, p, delta)

    def centre(self, p, q, delta):
        return _difference(p, q, delta)

    def gradient(self, p, q, delta, total):
        # p / sum(p) - q: corrects the rounding error of sum p
        return (_difference(p, q, delta) - q * total) / (1 + total)


@dataclass(frozen=True)
class ReverseKL(Divergence):
    def terms(self, p, q, delta):
        return _kl_terms(p, q, -delta)

    def centre(self, p, q, delta):
        return _times(p, -delta)

    def gradient(self, p, q, delta, total):
        # The loss is inf where q is 0 for a token whose p is not; its gradient is set to 0.
        return jnp.where(jnp.isposinf(total), 0, _times(p, -delta - total))


@dataclass(frozen=True)
class JensenShannon(Divergence):
    beta: float

    @property
    def curvature(self):
        return self.beta * (1 - self.beta)

    def _ratios(self, delta):
        """log p - log m and log q - log m; exactly 0 where delta is 0."""
        below, above = jnp.minimum(delta, 0), jnp.maximum(delta, 0)
        common = jnp.log1p(self.beta * jnp.expm1(below)) + jnp.log1p((1 - self.beta) * jnp.expm1(-above))
        return -common - above, below - common

    def terms(self, p, q, delta):
        mixture = self.beta * q + (1 - self.beta) * p
        of_student, of_teacher = self._ratios(delta)
        return self.beta * _kl_terms(q, mixture, of_teacher) + (1 - self.beta) * _kl_terms(p, mixture, of_student)

    def centre(self, p, q, delta):
        return _times(p, self._ratios(delta)[0])

    def gradient(self, p, q, delta, total):
        return (1 - self.beta) * _times(p, self._ratios(delta)[0] - total)


@dataclass(frozen=True)
class TopKForwardKL:
    """`ForwardKL` of the logits at the teacher's top K; targets: (`TopK` of [N, K], τ).

    The gradient at the K tokens is computed in the forward pass, so the backward pass does not recompute logits. It is
    the derivative with respect to h W + bias, so it includes softcap and scale.
    """

    vocabulary: int  # columns, padding included
    config: LogitConfig
    return_metrics: bool = False
    needs_logits: ClassVar[bool] = False

    def value(self, logits_NV, targets):
        teacher, temperature = targets
        student_NK, teacher_NK = gather(logits_NV, teacher, self.config.vocab_size)
        loss_N, residuals = ForwardKL().value(student_NK, (teacher_NK, temperature))
        dlogits_NK = ForwardKL().dlogits(student_NK, (teacher_NK, temperature), residuals, jnp.ones_like(loss_N), None)
        dlogits_NK = dlogits_NK * self.config.derivative(student_NK)
        if not self.return_metrics:
            return loss_N, dlogits_NK
        whole = softmax_metrics(logits_NV, temperature)
        return (loss_N, truncation_metrics(teacher, student_NK, teacher_NK, whole, temperature)), dlogits_NK

    def cotangent(self, tokens, cotangent):
        return cotangent[0] if self.return_metrics else cotangent

    def dlogits(self, logits_NM, targets, dlogits_NK, cotangent_N, columns_M):
        values_NK = dlogits_NK * cotangent_N[:, None]
        return _scatter(values_NK, targets[0].indices_BTK, columns_M, self.vocabulary, self.config.sharding.shards)


def any_nonzero(cotangent) -> jax.Array:
    """Mask [N] of the tokens for which any leaf of the cotangent is nonzero."""
    first, *others = [x != 0 for x in jax.tree.leaves(cotangent)]
    for other in others:
        first = first | other
    return first


def softmax_sums(logits_NV, temperature=None):
    """(top, total), [N, 1] each: softmax(v / τ) = exp((v - top) / τ) / total; total is 0 where all logits are -inf."""
    top_N1 = jnp.max(logits_NV, axis=-1, keepdims=True, initial=-jnp.inf)
    top_N1 = jnp.where(jnp.isneginf(top_N1), 0, top_N1)
    shifted_NV = logits_NV - top_N1 if temperature is None else (logits_NV - top_N1) / temperature
    return top_N1, jnp.sum(jnp.exp(shifted_NV), axis=-1, keepdims=True)


def _compare(student, teacher, temperature, sums):
    """(p, q, log q - log p) at some columns. The last is computed from the difference of the logits, for precision."""
    (student_top, student_total), (teacher_top, teacher_total) = sums
    student_total, teacher_total = (jnp.where(x == 0, 1, x) for x in (student_total, teacher_total))
    p = jnp.exp((student - student_top) / temperature) / student_total
    q = jnp.exp((teacher - teacher_top) / temperature) / teacher_total
    neither = jnp.isneginf(student) & jnp.isneginf(teacher)
    student, teacher = jnp.where(neither, student_top, student), jnp.where(neither, teacher_top, teacher)
    apart = ((teacher - student) - (teacher_top - student_top)) / temperature
    return p, q, apart - jnp.log(teacher_total / student_total)


def _kl_terms(p, q, delta):
    """p (delta + exp(-delta) - 1), delta = log p - log q. The terms sum to KL(p || q) if sum p = sum q.

    No term is negative and an error of the normalisers enters squared, so there is no cancellation where p is close
    to q.
    """
    near = jnp.abs(delta) < 0.25
    x = jnp.where(near, delta, 0)
    series = x * x / 2 * (1 - x / 3 * (1 - x / 4 * (1 - x / 5 * (1 - x / 6))))
    away = p * jnp.where(near | (p == 0), 0, delta) + (q - p)  # not `p > 0`, which would turn NaN into a loss of 0
    return jnp.where(near, p * series, away)


def _difference(p, q, delta):
    """p - q, precise where they are close; delta = log q - log p."""
    near = jnp.abs(delta) < 0.25
    return jnp.where(near, q * jnp.expm1(-jnp.where(near, delta, 0)), p - q)


def _times(p, values):
    """p * values, and 0 where p is 0 even if values is not finite."""
    return p * jnp.where(p == 0, 0, values)


def _scatter(values_NK, indices_NK, columns_M, vocabulary: int, shards: int):
    """[N, M]: each value at the column of its index, if that is among columns_M; 0 elsewhere. Index -1 is skipped."""
    rows, size = vocabulary // shards, len(columns_M) // shards
    within_NK = indices_NK % rows - columns_M[0].astype(indices_NK.dtype)
    inside_NK = (indices_NK >= 0) & (within_NK >= 0) & (within_NK < size)
    # Out-of-range positions are dropped. They differ from each other because `unique_indices` requires it.
    outside_1K = shards * size + jnp.arange(indices_NK.shape[-1], dtype=indices_NK.dtype)[None]
    places_NK = jnp.where(inside_NK, indices_NK // rows * size + within_NK, outside_1K)

    def one_token(places_K, values_K):
        empty_M = jnp.zeros(shards * size, values_K.dtype)
        return empty_M.at[places_K].set(values_K, mode="drop", unique_indices=True)

    return jax.vmap(one_token)(places_NK, values_NK)
