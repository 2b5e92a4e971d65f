"""The losses from hidden states and the unembedding, never holding [B, T, V] for either model."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from raft_jax.losses import blocks, checks, placement, reduce, tokens, truncation
from raft_jax.losses.head import Head, Tied, logits_slope, make_logits, pair
from raft_jax.losses.truncation import TopK


def linear_cross_entropy(
    hidden_BTD: jax.Array,
    unembedding_DV: jax.Array | Tied,
    labels_BT: jax.Array,
    *,
    weight_BT: jax.Array | None = None,
    bias_V: jax.Array | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    vocab_size: int | None = None,
    chunk_size: int = 512,
    vocab_shards: int | None = None,
) -> jax.Array:
    """`cross_entropy` of the logits h W.

        v = softcap tanh(scale (h W + bias) / softcap),    nats_bt = log sum_a exp(v_bta) - v_bt,label

    Args:
        hidden_BTD: [B, T, D], float.
        unembedding_DV: [D, V], float; or `Tied(embedding_VD)`, the embedding table.
        labels_BT: [B, T], int. A negative label is no target: 0 nats, no gradient.
        weight_BT: [B, T], float. With it the result is the scalar sum_bt weight_bt nats_bt, and its gradient is
            formed in the forward pass: three products with the unembedding in place of four, and one float32
            array [D, V] more. `sequence_weight` and `token_weight` make it from a mask.
        bias_V: [V], float. Default: none.
        logit_scale: multiplies h W + bias.
        logit_softcap: > 0. Default: none.
        vocab_size: columns beyond it pad the vocabulary and do not exist. Default: V.
        chunk_size: chunk_size * V logits are held at a time, forward and backward.
        vocab_shards: devices over which the vocabulary is split. Default: from the array's type where its
            mesh axes are explicit, else the most that the number of devices and V allow, up to 16.

    Returns:
        nats_BT: [B, T], float32; with weights a scalar.

    RAFT (arXiv:2606.00147), Eq. 5.

    >>> hidden_BTD, unembedding_DV = jnp.ones((1, 1, 2)), jnp.zeros((2, 4))
    >>> round(float(linear_cross_entropy(hidden_BTD, unembedding_DV, jnp.array([[3]]))[0, 0]), 4)  # log 4
    1.3863
    """
    checks.floating("hidden_BTD", hidden_BTD, 3)
    checks.labels(labels_BT, hidden_BTD.shape[:2])
    head = Head.checked("", hidden_BTD, unembedding_DV, bias_V)
    vocab_size = checks.vocab_size(vocab_size, unembedding_DV=head.vocabulary)
    form = head.form(logit_scale, logit_softcap, vocab_size, chunk_size, vocab_shards)
    if weight_BT is None:
        return placement.automatic(functools.partial(_cross_entropy, form), hidden_BTD, head, labels_BT)
    checks.weight(weight_BT, hidden_BTD.shape[:2])
    return placement.automatic(
        functools.partial(_weighted_cross_entropy, form), hidden_BTD, head, weight_BT, labels_BT, scalar=True
    )


def _cross_entropy(form, hidden_BTD, head, labels_BT):
    return cross_entropy_forward(form, hidden_BTD, head, labels_BT)[0]


def cross_entropy_forward(form, hidden_BTD, head, labels_BT):
    def chunk(hidden, labels):
        return tokens.label_nats(make_logits(hidden, head, form), labels)

    nats_BT, normalizer_BT = blocks.over_tokens(chunk, form.chunk_size, hidden_BTD, labels_BT)
    return nats_BT, (hidden_BTD, head, labels_BT, normalizer_BT)


def _cross_entropy_backward(form, residuals, cotangent_BT):
    hidden_BTD, head, labels_BT, normalizer_BT = residuals
    slope = cross_entropy_slope(form, hidden_BTD, labels_BT, normalizer_BT, cotangent_BT)
    return *blocks.backward(form, slope, hidden_BTD, (head,)), None


def cross_entropy_slope(form, hidden_BTD, labels_BT, normalizer_BT, cotangent_BT):
    """slope(pieces, columns_M) -> [N, M], as `blocks.backward` takes it."""
    hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    labels_N1, normalizer_N1, cotangent_N1 = (x.reshape(-1, 1) for x in (labels_BT, normalizer_BT, cotangent_BT))

    def slope(pieces, columns):
        logits = make_logits(hidden_ND, pieces[0], form, columns)
        pull = tokens.label_slope(jnp.exp(logits - normalizer_N1), columns, labels_N1)
        return pull * cotangent_N1 * logits_slope(logits, form)

    return slope


_cross_entropy = jax.custom_vjp(_cross_entropy, nondiff_argnums=(0,))
_cross_entropy.defvjp(cross_entropy_forward, _cross_entropy_backward)


def _weighted_cross_entropy(form, hidden_BTD, head, weight_BT, labels_BT):
    return reduce.weighted(_cross_entropy(form, hidden_BTD, head, labels_BT), weight_BT)


def _weighted_cross_entropy_forward(form, hidden_BTD, head, weight_BT, labels_BT):
    def evaluate(hidden, labels):
        logits = make_logits(hidden, head, form)
        nats, pull = tokens.label_nats_and_slope(logits, labels)
        return nats, pull * logits_slope(logits, form)

    total, nats_BT, grads = blocks.weighted_sum(form, evaluate, hidden_BTD, head, weight_BT, labels_BT)
    return total, (*grads, nats_BT.astype(weight_BT.dtype))


def _weighted_cross_entropy_backward(form, grads, cotangent):
    return *jax.tree.map(lambda x: (x * cotangent).astype(x.dtype), grads), None


_weighted_cross_entropy = jax.custom_vjp(_weighted_cross_entropy, nondiff_argnums=(0,))
_weighted_cross_entropy.defvjp(_weighted_cross_entropy_forward, _weighted_cross_entropy_backward)


def linear_top_k(
    hidden_BTD: jax.Array,
    unembedding_DV: jax.Array | Tied,
    *,
    k: int = 512,
    temperature: float = 1.5,
    bias_V: jax.Array | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    vocab_size: int | None = None,
    chunk_size: int = 512,
    recall: float | None = None,
    vocab_shards: int | None = None,
) -> TopK:
    """`top_k` of the logits h W. Arguments as in `linear_cross_entropy` and `top_k`; no gradient.

    >>> unembedding_DV = jnp.array([[0.0, 3.0, 2.0], [0.0, 0.0, 2.0]])
    >>> linear_top_k(jnp.ones((1, 1, 2)), unembedding_DV, k=2).indices_BTK.tolist()
    [[[2, 1]]]
    """
    checks.floating("hidden_BTD", hidden_BTD, 3)
    checks.truncation(k, recall)
    checks.temperature(temperature)
    head = Head.checked("", hidden_BTD, unembedding_DV, bias_V)
    vocab_size = checks.vocab_size(vocab_size, unembedding_DV=head.vocabulary)
    form = head.form(logit_scale, logit_softcap, vocab_size, chunk_size, vocab_shards)
    search = functools.partial(_top_k, form, k, recall, temperature)
    return placement.automatic(search, hidden_BTD, head)


def _top_k(form, k, recall, temperature, hidden_BTD, head):
    """temperature None: without the statistics."""
    hidden_BTD, head = jax.lax.stop_gradient((hidden_BTD, head))

    def chunk(hidden):
        logits = make_logits(hidden, head, form)
        values, indices = truncation.select(logits, min(k, form.vocab_size), recall, form.shards)
        described = (None, None) if temperature is None else truncation.describe(logits, temperature)[1:]
        return TopK(indices, values, *described)

    return blocks.over_tokens(chunk, form.chunk_size, hidden_BTD)


def linear_top_k_forward_kl(
    student_hidden_BTD: jax.Array,
    student_unembedding_DV: jax.Array | Tied,
    teacher_hidden_BTD: jax.Array | TopK,
    teacher_unembedding_DV: jax.Array | Tied | None = None,
    *,
    k: int = 512,
    temperature: float = 1.5,
    student_bias_V: jax.Array | None = None,
    teacher_bias_V: jax.Array | None = None,
    logit_scale: float | tuple[float, float] = 1.0,
    logit_softcap: float | tuple[float | None, float | None] | None = None,
    vocab_size: int | None = None,
    chunk_size: int = 512,
    recall: float | None = None,
    vocab_shards: int | None = None,
    return_metrics: bool = False,
) -> jax.Array | tuple[jax.Array, dict[str, jax.Array]]:
    """`top_k_forward_kl` of the logits h W.

        nats_bt = T² sum_{a in 𝒦} q̃_a (log q̃_a - log p̃_a),    q = softmax(u / T),    p = softmax(v / T)

    Args:
        student_hidden_BTD: [B, T, D], float.
        student_unembedding_DV: [D, V], float, or `Tied`.
        teacher_hidden_BTD: [B, T, D'], float, of any width D'; or the `TopK` of an earlier pass. No gradient.
        teacher_unembedding_DV: [D', V], float, or `Tied`; none with a `TopK`. No gradient.
        student_bias_V, teacher_bias_V: [V], float. Default: none.
        logit_scale, logit_softcap: as in `linear_cross_entropy`; one for both models, or (student, teacher).
        chunk_size, vocab_size, vocab_shards: as in `linear_cross_entropy`.
        k, temperature, recall, return_metrics: as in `top_k_forward_kl`.

    Returns:
        nats_BT: [B, T], float32; with metrics (nats_BT, {name: [B, T]}), as in `top_k_forward_kl`.

    RAFT (arXiv:2606.00147), Eqs. 8 to 10.

    >>> hidden_BTD, unembedding_DV = jnp.ones((1, 2, 3)), jnp.arange(12.0).reshape(3, 4)
    >>> linear_top_k_forward_kl(hidden_BTD, unembedding_DV, hidden_BTD, unembedding_DV, k=2).tolist()
    [[0.0, 0.0]]
    """
    checks.floating("student_hidden_BTD", student_hidden_BTD, 3)
    search = Search.checked(k, temperature, recall, return_metrics)
    head = Head.checked("student_", student_hidden_BTD, student_unembedding_DV, student_bias_V)
    teacher, form, teacher_form = search.teacher(
        student_hidden_BTD.shape[:2], head, teacher_hidden_BTD, teacher_unembedding_DV, teacher_bias_V,
        (logit_scale, logit_softcap, vocab_size, chunk_size, vocab_shards),
    )  # fmt: skip

    def loss(student_hidden, student_head, teacher):
        teacher = search.top_k(teacher_form, teacher)
        found = _logits_at(form, search.statistics, student_hidden, student_head, teacher.indices_BTK)
        return search.nats(*found, teacher)

    return placement.automatic(loss, student_hidden_BTD, head, teacher)


class Search(NamedTuple):
    """The truncation's settings, and what hangs on them alone."""

    k: int
    temperature: float
    recall: float | None
    return_metrics: bool

    @classmethod
    def checked(cls, k, temperature, recall, return_metrics) -> Search:
        checks.truncation(k, recall)
        checks.temperature(temperature)
        return cls(k, temperature, recall, return_metrics)

    @property
    def statistics(self) -> float | None:
        """The temperature of what describes the whole vocabulary, where it is asked for."""
        return self.temperature if self.return_metrics else None

    def teacher(self, shape_BT, head, hidden_BTD, unembedding_DV, bias_V, numbers):
        """(the teacher's arrays, the student's form, the teacher's form); ValueError unless both models meet.

        numbers: what `Head.form` takes, scale and softcap for both models or as pairs.
        """
        scale, softcap, vocab_size, *rest = numbers
        heads, sizes, arrays = [head], {"student_unembedding_DV": head.vocabulary}, hidden_BTD
        if isinstance(hidden_BTD, TopK):
            checks.top_k(hidden_BTD, shape_BT)
            if unembedding_DV is not None or bias_V is not None:
                raise ValueError("teacher_unembedding_DV and teacher_bias_V must be None where the teacher is a TopK")
        else:
            checks.floating("teacher_hidden_BTD", hidden_BTD, 3)
            checks.tokens("teacher_hidden_BTD", hidden_BTD, shape_BT)
            heads.append(Head.checked("teacher_", hidden_BTD, unembedding_DV, bias_V))
            sizes["teacher_unembedding_DV"] = heads[1].vocabulary
            arrays = hidden_BTD, heads[1]
        vocab_size = checks.vocab_size(vocab_size, **sizes)
        forms = [
            head.form(scale, softcap, vocab_size, *rest)
            for head, scale, softcap in zip(heads, pair(scale), pair(softcap), strict=False)
        ]
        return arrays, forms[0], forms[-1]

    def top_k(self, form, teacher) -> TopK:
        """From the arrays of `teacher`."""
        if isinstance(teacher, TopK):
            return truncation.first(jax.lax.stop_gradient(teacher), self.k)
        return _top_k(form, self.k, self.recall, self.statistics, *teacher)

    def nats(self, student_BTK, described, teacher: TopK):
        """nats_BT, and the metrics where they are asked for."""
        nats_BT = truncation.truncated_forward_kl(student_BTK, checks.widen(teacher.logits_BTK), self.temperature)
        if not self.return_metrics:
            return nats_BT
        return nats_BT, truncation.metrics(teacher, student_BTK, described, self.temperature)


def _logits_at(form, temperature, hidden_BTD, head, indices_BTK):
    """(logits at the indices, `describe` or None); only the first has a gradient."""
    return logits_at_forward(form, temperature, hidden_BTD, head, indices_BTK)[0]


def logits_at_forward(form, temperature, hidden_BTD, head, indices_BTK):
    def chunk(hidden, indices):
        logits = make_logits(hidden, head, form)
        picked = jnp.take_along_axis(logits, indices, axis=-1)
        return picked, None if temperature is None else truncation.describe(logits, temperature)

    values = blocks.over_tokens(chunk, form.chunk_size, hidden_BTD, indices_BTK)
    return values, (hidden_BTD, head, indices_BTK, None if form.softcap is None else values[0])


def _logits_at_backward(form, temperature, residuals, cotangents):
    hidden_BTD, head, indices_BTK, picked_BTK = residuals
    slope = logits_at_slope(form, head.vocabulary, indices_BTK, picked_BTK, cotangents[0])
    return *blocks.backward(form, slope, hidden_BTD, (head,)), None


def logits_at_slope(form, vocabulary, indices_BTK, picked_BTK, cotangent_BTK):
    k = indices_BTK.shape[-1]
    pull_NK = (cotangent_BTK * logits_slope(picked_BTK, form)).reshape(-1, k)
    indices_NK = indices_BTK.reshape(-1, k)

    def slope(pieces, columns):
        return blocks.spread(pull_NK, indices_NK, columns, vocabulary, form.shards)

    return slope


_logits_at = jax.custom_vjp(_logits_at, nondiff_argnums=(0, 1))
_logits_at.defvjp(logits_at_forward, _logits_at_backward)
