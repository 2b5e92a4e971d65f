"""The whole-vocabulary divergences from hidden states and the unembeddings, never holding [B, T, V]."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from raft_jax.losses import blocks, checks, divergences, linear, placement


def linear_forward_kl(
    student_hidden_BTD: jax.Array,
    student_unembedding_DV: jax.Array,
    teacher_hidden_BTD: jax.Array,
    teacher_unembedding_DV: jax.Array,
    *,
    temperature: float = 1.5,
    **head,
) -> jax.Array:
    """`forward_kl` of the logits h W.

    Args:
        student_hidden_BTD, student_unembedding_DV: [B, T, D] and [D, V], float.
        teacher_hidden_BTD, teacher_unembedding_DV: [B, T, D'] and [D', V], float, any width D'. No gradient.
        temperature: > 0.
        head: student_bias_V, teacher_bias_V, logit_scale, logit_softcap, vocab_size, chunk_size and
            vocab_shards as in `linear_top_k_forward_kl`.

    Returns:
        nats_BT: [B, T], float32.

    >>> hidden_BTD, unembedding_DV = jnp.ones((1, 2, 3)), jnp.arange(12.0).reshape(3, 4)
    >>> linear_forward_kl(hidden_BTD, unembedding_DV, hidden_BTD, unembedding_DV).tolist()
    [[0.0, 0.0]]
    """
    models = student_hidden_BTD, student_unembedding_DV, teacher_hidden_BTD, teacher_unembedding_DV
    return _from_hidden(divergences.FORWARD_KL, *models, temperature, **head)


def linear_reverse_kl(
    student_hidden_BTD: jax.Array,
    student_unembedding_DV: jax.Array,
    teacher_hidden_BTD: jax.Array,
    teacher_unembedding_DV: jax.Array,
    *,
    temperature: float = 1.5,
    **head,
) -> jax.Array:
    """`reverse_kl` of the logits h W. Arguments as in `linear_forward_kl`.

    >>> hidden_BTD, unembedding_DV = jnp.ones((1, 2, 3)), jnp.arange(12.0).reshape(3, 4)
    >>> linear_reverse_kl(hidden_BTD, unembedding_DV, hidden_BTD, unembedding_DV).tolist()
    [[0.0, 0.0]]
    """
    models = student_hidden_BTD, student_unembedding_DV, teacher_hidden_BTD, teacher_unembedding_DV
    return _from_hidden(divergences.REVERSE_KL, *models, temperature, **head)


def linear_jensen_shannon(
    student_hidden_BTD: jax.Array,
    student_unembedding_DV: jax.Array,
    teacher_hidden_BTD: jax.Array,
    teacher_unembedding_DV: jax.Array,
    *,
    beta: float = 0.5,
    temperature: float = 1.5,
    **head,
) -> jax.Array:
    """`jensen_shannon` of the logits h W. Arguments as in `linear_forward_kl`, and beta in (0, 1).

    >>> hidden_BTD, unembedding_DV = jnp.ones((1, 2, 3)), jnp.arange(12.0).reshape(3, 4)
    >>> round(float(linear_jensen_shannon(hidden_BTD, unembedding_DV, hidden_BTD, unembedding_DV).max()), 4)
    0.0
    """
    checks.beta(beta)
    models = student_hidden_BTD, student_unembedding_DV, teacher_hidden_BTD, teacher_unembedding_DV
    return _from_hidden(divergences.JensenShannon(beta), *models, temperature, **head)


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
):
    checks.temperature(temperature)
    checks.floating("student_hidden_BTD", student_hidden_BTD, 3)
    checks.floating("teacher_hidden_BTD", teacher_hidden_BTD, 3)
    checks.tokens("teacher_hidden_BTD", teacher_hidden_BTD, student_hidden_BTD.shape[:2])
    heads = [
        linear.check_head("student_", student_hidden_BTD, student_unembedding_DV, student_bias_V),
        linear.check_head("teacher_", teacher_hidden_BTD, teacher_unembedding_DV, teacher_bias_V),
    ]
    widths = [head.unembedding_DV.shape[-1] for head in heads]
    vocab_size = checks.vocab_size(vocab_size, student_unembedding_DV=widths[0], teacher_unembedding_DV=widths[1])
    forms = [
        linear.make_form(head, scale, softcap, vocab_size, chunk_size, vocab_shards)
        for head, scale, softcap in zip(heads, linear.pair(logit_scale), linear.pair(logit_softcap), strict=True)
    ]
    # Both models are cut into the same blocks of the vocabulary: the teacher's takes the student's padding.
    heads[1] = jax.tree.map(lambda x: _fit(jax.lax.stop_gradient(x), widths[0]), heads[1])
    forms[1] = forms[1]._replace(padded=forms[0].padded, shards=forms[0].shards)

    def loss(student_hidden, student_head, teacher_hidden, teacher_head):
        at = jnp.asarray(temperature, jnp.promote_types(student_hidden.dtype, jnp.float32))
        teacher_hidden = jax.lax.stop_gradient(teacher_hidden)
        return _divergence(divergence, *forms, student_hidden, student_head, teacher_hidden, teacher_head, at)

    return placement.automatic(loss, student_hidden_BTD, heads[0], teacher_hidden_BTD, heads[1])


def _fit(x, width):
    if x.shape[-1] >= width:
        return x[..., :width]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])


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
        student = blocks.logits(student_hidden, student_head, student_form)
        teacher = blocks.logits(teacher_hidden, teacher_head, teacher_form)
        return divergences.value(divergence, student, teacher, temperature)

    nats_BT, residuals = blocks.over_tokens(chunk, student_form.chunk_size, student_hidden, teacher_hidden)
    return nats_BT, (student_hidden, student_head, teacher_hidden, teacher_head, temperature, residuals)


def _divergence_backward(divergence, student_form, teacher_form, saved, cotangent_BT):
    student_hidden, student_head, teacher_hidden, teacher_head, temperature, residuals = saved
    student_ND, teacher_ND = (x.reshape(-1, x.shape[-1]) for x in (student_hidden, teacher_hidden))
    cotangent_N1, residuals = jax.tree.map(lambda x: x.reshape(-1, 1), (cotangent_BT, residuals))

    def slope(pieces, columns):
        student = blocks.logits(student_ND, pieces[0], student_form, columns)
        teacher = blocks.logits(teacher_ND, pieces[1], teacher_form, columns)
        pull = divergences.slope(divergence, student, teacher, residuals, temperature)
        return pull * cotangent_N1 * blocks.logits_slope(student, student_form)

    student_grads = blocks.backward(student_form, slope, student_hidden, (student_head, teacher_head))
    return *student_grads, None, None, None


_divergence = jax.custom_vjp(_divergence, nondiff_argnums=(0, 1, 2))
_divergence.defvjp(_divergence_forward, _divergence_backward)
