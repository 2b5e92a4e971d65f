"""The whole-vocabulary divergences from hidden states and the unembeddings, never holding [B, T, V]."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from raft_jax.losses import blocks, checks, divergences, placement, reduce
from raft_jax.losses.head import Head, Tied, logits_slope, make_logits, pair


def linear_forward_kl(
    student_hidden_BTD: jax.Array,
    student_unembedding_DV: jax.Array | Tied,
    teacher_hidden_BTD: jax.Array,
    teacher_unembedding_DV: jax.Array | Tied,
    *,
    temperature: float = 1.5,
    **settings,
) -> jax.Array:
    """`forward_kl` of the logits h W.

    Args:
        student_hidden_BTD, student_unembedding_DV: [B, T, D] and [D, V], float, or `Tied`.
        teacher_hidden_BTD, teacher_unembedding_DV: the same of any width D'. No gradient.
        temperature: > 0.
        settings: student_bias_V, teacher_bias_V, logit_scale, logit_softcap, vocab_size, chunk_size and
            vocab_shards as in `linear_top_k_forward_kl`, weight_BT as in `linear_cross_entropy`.

    Returns:
        nats_BT: [B, T], float32; with weights a scalar.

    >>> hidden_BTD, unembedding_DV = jnp.ones((1, 2, 3)), jnp.arange(12.0).reshape(3, 4)
    >>> linear_forward_kl(hidden_BTD, unembedding_DV, hidden_BTD, unembedding_DV).tolist()
    [[0.0, 0.0]]
    """
    models = student_hidden_BTD, student_unembedding_DV, teacher_hidden_BTD, teacher_unembedding_DV
    return _from_hidden(divergences.FORWARD_KL, *models, temperature, **settings)


def linear_reverse_kl(
    student_hidden_BTD: jax.Array,
    student_unembedding_DV: jax.Array | Tied,
    teacher_hidden_BTD: jax.Array,
    teacher_unembedding_DV: jax.Array | Tied,
    *,
    temperature: float = 1.5,
    **settings,
) -> jax.Array:
    """`reverse_kl` of the logits h W. Arguments as in `linear_forward_kl`.

    >>> hidden_BTD, unembedding_DV = jnp.ones((1, 2, 3)), jnp.arange(12.0).reshape(3, 4)
    >>> linear_reverse_kl(hidden_BTD, unembedding_DV, hidden_BTD, unembedding_DV).tolist()
    [[0.0, 0.0]]
    """
    models = student_hidden_BTD, student_unembedding_DV, teacher_hidden_BTD, teacher_unembedding_DV
    return _from_hidden(divergences.REVERSE_KL, *models, temperature, **settings)


def linear_jensen_shannon(
    student_hidden_BTD: jax.Array,
    student_unembedding_DV: jax.Array | Tied,
    teacher_hidden_BTD: jax.Array,
    teacher_unembedding_DV: jax.Array | Tied,
    *,
    beta: float = 0.5,
    temperature: float = 1.5,
    **settings,
) -> jax.Array:
    """`jensen_shannon` of the logits h W. Arguments as in `linear_forward_kl`, and beta in (0, 1).

    >>> hidden_BTD, unembedding_DV = jnp.ones((1, 2, 3)), jnp.arange(12.0).reshape(3, 4)
    >>> round(float(linear_jensen_shannon(hidden_BTD, unembedding_DV, hidden_BTD, unembedding_DV).max()), 4)
    0.0
    """
    checks.beta(beta)
    models = student_hidden_BTD, student_unembedding_DV, teacher_hidden_BTD, teacher_unembedding_DV
    return _from_hidden(divergences.JensenShannon(beta), *models, temperature, **settings)


def _from_hidden(
    divergence,
    student_hidden_BTD,
    student_unembedding_DV,
    teacher_hidden_BTD,
    teacher_unembedding_DV,
    temperature,
    *,
    student_bias_V=None,
    teacher_bias_V=None,
    logit_scale=1.0,
    logit_softcap=None,
    vocab_size=None,
    chunk_size=512,
    vocab_shards=None,
    weight_BT=None,
):
    checks.temperature(temperature)
    checks.floating("student_hidden_BTD", student_hidden_BTD, 3)
    checks.floating("teacher_hidden_BTD", teacher_hidden_BTD, 3)
    checks.tokens("teacher_hidden_BTD", teacher_hidden_BTD, student_hidden_BTD.shape[:2])
    heads = [
        Head.checked("student_", student_hidden_BTD, student_unembedding_DV, student_bias_V),
        Head.checked("teacher_", teacher_hidden_BTD, teacher_unembedding_DV, teacher_bias_V),
    ]
    widths = [head.vocabulary for head in heads]
    vocab_size = checks.vocab_size(vocab_size, student_unembedding_DV=widths[0], teacher_unembedding_DV=widths[1])
    forms = [
        head.form(scale, softcap, vocab_size, chunk_size, vocab_shards)
        for head, scale, softcap in zip(heads, pair(logit_scale), pair(logit_softcap), strict=True)
    ]
    # Both models are cut into the same blocks of the vocabulary: the teacher's takes the student's padding.
    heads[1] = jax.tree.map(lambda x, axis: _fit(jax.lax.stop_gradient(x), axis, widths[0]), heads[1], heads[1].axes)
    forms[1] = forms[1]._replace(padded=forms[0].padded, shards=forms[0].shards)

    if weight_BT is not None:
        checks.weight(weight_BT, student_hidden_BTD.shape[:2])

    def loss(student_hidden, student_head, teacher_hidden, teacher_head, weight):
        at = jnp.asarray(temperature, jnp.promote_types(student_hidden.dtype, jnp.float32))
        teacher = jax.lax.stop_gradient(teacher_hidden), teacher_head, at
        if weight is None:
            return _divergence(divergence, *forms, student_hidden, student_head, *teacher)
        return _weighted(divergence, *forms, student_hidden, student_head, weight, *teacher)

    arrays = student_hidden_BTD, heads[0], teacher_hidden_BTD, heads[1], weight_BT
    return placement.automatic(loss, *arrays, scalar=weight_BT is not None)


def _fit(x, axis, size):
    if x.shape[axis] >= size:
        return jax.lax.slice_in_dim(x, 0, size, axis=axis)
    return jnp.pad(x, [(0, size - x.shape[axis]) if place == axis else (0, 0) for place in range(x.ndim)])


def _divergence(divergence, student_form, teacher_form, *arrays):
    return _divergence_forward(divergence, student_form, teacher_form, *arrays)[0]


def _divergence_forward(
    divergence,
    student_form,
    teacher_form,
    student_hidden,
    student_head,
    teacher_hidden,
    teacher_head,
    temperature,
):
    def chunk(student_hidden, teacher_hidden):
        student = make_logits(student_hidden, student_head, student_form)
        teacher = make_logits(teacher_hidden, teacher_head, teacher_form)
        return divergences.value(divergence, student, teacher, temperature)

    nats_BT, residuals = blocks.over_tokens(chunk, student_form.chunk_size, student_hidden, teacher_hidden)
    return nats_BT, (student_hidden, student_head, teacher_hidden, teacher_head, temperature, residuals)


def _divergence_backward(divergence, student_form, teacher_form, saved, cotangent_BT):
    student_hidden, student_head, teacher_hidden, teacher_head, temperature, residuals = saved
    student_ND, teacher_ND = (x.reshape(-1, x.shape[-1]) for x in (student_hidden, teacher_hidden))
    cotangent_N1, residuals = jax.tree.map(lambda x: x.reshape(-1, 1), (cotangent_BT, residuals))

    def slope(pieces, columns):
        student = make_logits(student_ND, pieces[0], student_form, columns)
        teacher = make_logits(teacher_ND, pieces[1], teacher_form, columns)
        pull = divergences.slope(divergence, student, teacher, residuals, temperature)
        return pull * cotangent_N1 * logits_slope(student, student_form)

    student_grads = blocks.backward(student_form, slope, student_hidden, (student_head, teacher_head))
    return *student_grads, None, None, None


_divergence = jax.custom_vjp(_divergence, nondiff_argnums=(0, 1, 2))
_divergence.defvjp(_divergence_forward, _divergence_backward)


def _weighted(divergence, student_form, teacher_form, student_hidden, student_head, weight, *teacher):
    nats_BT = _divergence(divergence, student_form, teacher_form, student_hidden, student_head, *teacher)
    return reduce.weighted(nats_BT, weight)


def _weighted_forward(divergence, student_form, teacher_form, student_hidden, student_head, weight, *teacher):
    teacher_hidden, teacher_head, temperature = teacher

    def evaluate(student_hidden, teacher_hidden):
        student = make_logits(student_hidden, student_head, student_form)
        teacher = make_logits(teacher_hidden, teacher_head, teacher_form)
        nats, residuals = divergences.value(divergence, student, teacher, temperature)
        pull = divergences.slope(divergence, student, teacher, residuals, temperature)
        return nats, pull * logits_slope(student, student_form)

    total, nats_BT, grads = blocks.weighted_sum(
        student_form, evaluate, student_hidden, student_head, weight, teacher_hidden
    )
    return total, (*grads, nats_BT.astype(weight.dtype))


def _weighted_backward(divergence, student_form, teacher_form, grads, cotangent):
    return *jax.tree.map(lambda x: (x * cotangent).astype(x.dtype), grads), None, None, None


_weighted = jax.custom_vjp(_weighted, nondiff_argnums=(0, 1, 2))
_weighted.defvjp(_weighted_forward, _weighted_backward)
