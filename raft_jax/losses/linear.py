"""Losses from hidden states and the unembedding, without holding [B, T, V] for either model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from raft_jax.losses import checks, sharding, truncation
from raft_jax.losses.chunked import (
    Targets,
    Term,
    TokenChunks,
    linear_loss,
    linear_losses,
    over_tokens,
    weighted_linear_loss,
)
from raft_jax.losses.lm_head import LMHead, LogitConfig, TiedEmbedding, pair
from raft_jax.losses.pointwise import CrossEntropy, ForwardKL, JensenShannon, ReverseKL, TopKForwardKL
from raft_jax.losses.truncation import TopK


def linear_cross_entropy(
    hidden_BTD: jax.Array,
    unembedding_DV: jax.Array | TiedEmbedding,
    labels_BT: jax.Array,
    *,
    weight_BT: jax.Array | None = None,
    bias_V: jax.Array | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    vocab_size: int | None = None,
    chunk_size: int = 512,
    vocab_shards: int | str | Sequence[str] | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    return_logsumexp: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`cross_entropy` with logits h W.

        v = softcap tanh(scale (h W + bias) / softcap),    loss_bt = log sum_a exp(v_bta) - v_bt,label

    Args:
        hidden_BTD: [B, T, D], or any leading shape; float.
        unembedding_DV: [D, V], float; or `TiedEmbedding(embedding_VD)` for a tied embedding table.
        labels_BT: [B, T], int. Tokens with a negative label are ignored: loss 0, no gradient.
        weight_BT: [B, T], float. If given, the result is the scalar sum_bt weight_bt loss_bt, and its gradient is
            computed in the forward pass: three products with the unembedding instead of four, and one additional
            float32 array [D, V]. `sequence_weight` and `token_weight` make it from a mask.
        bias_V: [V], float. Default: none.
        logit_scale: multiplies h W + bias.
        logit_softcap: > 0. Default: none.
        vocab_size: columns at or beyond it are padding and get no probability. Default: V.
        chunk_size: about chunk_size * V logits are held at a time on each device, forward and backward.
        vocab_shards: the mesh axes that the vocabulary is sharded over (their names, under `jax.set_mesh`), or the
            number of devices. With names, the logits are constrained to the same axes; with a number, the compiler
            chooses. Default: read from the array's type if its mesh axes are explicit; 1 under `shard_map`; else
            gcd(V, number of devices, 16), and a chunk is then counted over all devices.
        label_smoothing, z_loss, return_logsumexp: as in `cross_entropy`; return_logsumexp not with weight_BT.

    Returns:
        loss_BT: [B, T], float32, nats; or (loss_BT, logsumexp_BT); a scalar if weight_BT is given.

    Raises:
        ValueError: an argument is invalid; raised while tracing.

    RAFT (arXiv:2606.00147), Eq. 5.

    >>> hidden_BTD, unembedding_DV = jnp.ones((1, 1, 2)), jnp.zeros((2, 4))
    >>> round(float(linear_cross_entropy(hidden_BTD, unembedding_DV, jnp.array([[3]]))[0, 0]), 4)  # log 4
    1.3863
    """
    checks.floating("hidden_BTD", hidden_BTD)
    labels_BT = checks.labels(labels_BT, hidden_BTD.shape[:-1])
    head = LMHead.checked("", hidden_BTD, unembedding_DV, bias_V)
    vocab_size = checks.vocab_size(vocab_size, unembedding_DV=head.vocabulary)
    loss = CrossEntropy(
        vocab_size, checks.label_smoothing(label_smoothing), checks.z_loss(z_loss), bool(return_logsumexp)
    )
    if return_logsumexp and weight_BT is not None:
        raise ValueError("return_logsumexp must be False with weight_BT: the weighted sum alone is returned")
    term = Term(loss, head.config(logit_scale, logit_softcap, vocab_size, vocab_shards))
    chunk_size = term.student.sharding.chunk_size(checks.chunk_size(chunk_size))
    return _one_loss(term, chunk_size, hidden_BTD, head, weight_BT, Targets(labels_BT))


def linear_forward_kl(
    student_hidden_BTD: jax.Array,
    student_unembedding_DV: jax.Array | TiedEmbedding,
    teacher_hidden_BTD: jax.Array,
    teacher_unembedding_DV: jax.Array | TiedEmbedding,
    *,
    temperature: float = 1.5,
    **settings,
) -> jax.Array:
    """`forward_kl` with logits h W.

        loss_bt = τ² sum_a q_a (log q_a - log p_a),    q = softmax(u / τ),    p = softmax(v / τ)

    Args:
        student_hidden_BTD, student_unembedding_DV: [B, T, D] and [D, V], float, or `TiedEmbedding`.
        teacher_hidden_BTD, teacher_unembedding_DV: likewise, with any width D'. No gradient.
        temperature: τ > 0. May be traced; has no gradient.
        settings: student_bias_V, teacher_bias_V, logit_scale, logit_softcap, vocab_size, chunk_size and
            vocab_shards as in `linear_top_k_forward_kl`, weight_BT as in `linear_cross_entropy`.

    Returns:
        loss_BT: [B, T], float32, nats; a scalar if weight_BT is given.

    Raises:
        ValueError: an argument is invalid; raised while tracing.

    >>> hidden_BTD, unembedding_DV = jnp.ones((1, 2, 3)), jnp.arange(12.0).reshape(3, 4)
    >>> linear_forward_kl(hidden_BTD, unembedding_DV, hidden_BTD, unembedding_DV).tolist()
    [[0.0, 0.0]]
    """
    models = student_hidden_BTD, student_unembedding_DV, teacher_hidden_BTD, teacher_unembedding_DV
    return _linear_divergence(ForwardKL(), *models, temperature, **settings)


def linear_reverse_kl(
    student_hidden_BTD: jax.Array,
    student_unembedding_DV: jax.Array | TiedEmbedding,
    teacher_hidden_BTD: jax.Array,
    teacher_unembedding_DV: jax.Array | TiedEmbedding,
    *,
    temperature: float = 1.5,
    **settings,
) -> jax.Array:
    """`reverse_kl` with logits h W. Arguments, result and errors as in `linear_forward_kl`.

    >>> hidden_BTD, unembedding_DV = jnp.ones((1, 2, 3)), jnp.arange(12.0).reshape(3, 4)
    >>> linear_reverse_kl(hidden_BTD, unembedding_DV, hidden_BTD, unembedding_DV).tolist()
    [[0.0, 0.0]]
    """
    models = student_hidden_BTD, student_unembedding_DV, teacher_hidden_BTD, teacher_unembedding_DV
    return _linear_divergence(ReverseKL(), *models, temperature, **settings)


def linear_jensen_shannon(
    student_hidden_BTD: jax.Array,
    student_unembedding_DV: jax.Array | TiedEmbedding,
    teacher_hidden_BTD: jax.Array,
    teacher_unembedding_DV: jax.Array | TiedEmbedding,
    *,
    beta: float = 0.5,
    temperature: float = 1.5,
    **settings,
) -> jax.Array:
    """`jensen_shannon` with logits h W. Arguments, result and errors as in `linear_forward_kl`, and beta in (0, 1).

    >>> hidden_BTD, unembedding_DV = jnp.ones((1, 2, 3)), jnp.arange(12.0).reshape(3, 4)
    >>> round(float(linear_jensen_shannon(hidden_BTD, unembedding_DV, hidden_BTD, unembedding_DV).max()), 4)
    0.0
    """
    models = student_hidden_BTD, student_unembedding_DV, teacher_hidden_BTD, teacher_unembedding_DV
    return _linear_divergence(JensenShannon(checks.beta(beta)), *models, temperature, **settings)


def linear_top_k(
    hidden_BTD: jax.Array,
    unembedding_DV: jax.Array | TiedEmbedding,
    *,
    k: int = 512,
    temperature: float = 1.5,
    bias_V: jax.Array | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    vocab_size: int | None = None,
    chunk_size: int = 512,
    recall: float | None = None,
    vocab_shards: int | str | Sequence[str] | None = None,
) -> TopK:
    """`top_k` with logits h W. Arguments and errors as in `linear_cross_entropy` and `top_k`; no gradient.

    >>> unembedding_DV = jnp.array([[0.0, 3.0, 2.0], [0.0, 0.0, 2.0]])
    >>> linear_top_k(jnp.ones((1, 1, 2)), unembedding_DV, k=2).indices_BTK.tolist()
    [[[2, 1]]]
    """
    checks.floating("hidden_BTD", hidden_BTD)
    checks.truncation(k, recall)
    head = LMHead.checked("", hidden_BTD, unembedding_DV, bias_V)
    tau = checks.temperature(temperature, checks.accumulation_dtype(hidden_BTD.dtype, head.dtype))
    vocab_size = checks.vocab_size(vocab_size, unembedding_DV=head.vocabulary)
    config = head.config(logit_scale, logit_softcap, vocab_size, vocab_shards)
    chunk_size = config.sharding.chunk_size(checks.chunk_size(chunk_size))

    @sharding.automatic(hidden_BTD.ndim - 1)
    def search(hidden_BTD, head, tau):
        teacher = _search(config, k, recall, chunk_size, hidden_BTD, head, tau)
        return teacher._replace(temperature=truncation.static_or_none(temperature))

    return search(hidden_BTD, head, tau)


def linear_top_k_forward_kl(
    student_hidden_BTD: jax.Array,
    student_unembedding_DV: jax.Array | TiedEmbedding,
    teacher_hidden_BTD: jax.Array | TopK,
    teacher_unembedding_DV: jax.Array | TiedEmbedding | None = None,
    *,
    k: int | None = None,
    temperature: float = 1.5,
    weight_BT: jax.Array | None = None,
    student_bias_V: jax.Array | None = None,
    teacher_bias_V: jax.Array | None = None,
    logit_scale: float | tuple[float, float] = 1.0,
    logit_softcap: float | tuple[float | None, float | None] | None = None,
    vocab_size: int | None = None,
    chunk_size: int = 512,
    recall: float | None = None,
    vocab_shards: int | str | Sequence[str] | None = None,
    return_metrics: bool = False,
) -> jax.Array | tuple[jax.Array, dict[str, jax.Array]]:
    """`top_k_forward_kl` with logits h W.

        loss_bt = τ² sum_{a in 𝒦} q̃_a (log q̃_a - log p̃_a),    q = softmax(u / τ),    p = softmax(v / τ)

    Args:
        student_hidden_BTD: [B, T, D], or any leading shape; float.
        student_unembedding_DV: [D, V], float, or `TiedEmbedding`.
        teacher_hidden_BTD: [B, T, D'], float, of any width D'; or a precomputed `TopK`. No gradient.
        teacher_unembedding_DV: [D', V], float, or `TiedEmbedding`; None with a `TopK`. No gradient.
        weight_BT: as in `linear_cross_entropy`. The backward pass then scatters each chunk's K entries once, and not
            once for every block of the vocabulary: faster where there are many tokens.
        student_bias_V, teacher_bias_V: [V], float. Default: none.
        logit_scale, logit_softcap: as in `linear_cross_entropy`; one value for both models, or (student, teacher).
        chunk_size, vocab_size, vocab_shards: as in `linear_cross_entropy`.
        k, temperature, recall, return_metrics: as in `top_k_forward_kl`.

    Returns:
        loss_BT: [B, T], float32, nats; a scalar if weight_BT is given. With return_metrics (loss, {name: [B, T]}), as
            in `top_k_forward_kl`.

    Raises:
        ValueError: an argument is invalid; raised while tracing.

    RAFT (arXiv:2606.00147), Eqs. 8 to 10.

    >>> hidden_BTD, unembedding_DV = jnp.ones((1, 2, 3)), jnp.arange(12.0).reshape(3, 4)
    >>> linear_top_k_forward_kl(hidden_BTD, unembedding_DV, hidden_BTD, unembedding_DV, k=2).tolist()
    [[0.0, 0.0]]
    """
    checks.floating("student_hidden_BTD", student_hidden_BTD)
    head = LMHead.checked("student_", student_hidden_BTD, student_unembedding_DV, student_bias_V)
    teacher = TeacherTopK.checked(
        student_hidden_BTD, head, teacher_hidden_BTD, teacher_unembedding_DV, teacher_bias_V, k, temperature, recall,
        return_metrics, vocab_size, chunk_size, vocab_shards, logit_scale, logit_softcap,
    )  # fmt: skip

    ndim = student_hidden_BTD.ndim - 1
    if weight_BT is None:

        @sharding.automatic(ndim)
        def loss(student_hidden, head, arrays, tau):
            targets = Targets(teacher.top_k(arrays, tau), temperature=tau)
            return linear_loss(teacher.term, teacher.chunk_size, student_hidden, head, targets)

        return loss(student_hidden_BTD, head, teacher.arrays, teacher.tau)

    checks.weight(weight_BT, student_hidden_BTD.shape[:-1])

    @sharding.automatic(0, ndim)
    def weighted(student_hidden, head, weight, arrays, tau):
        targets = Targets(teacher.top_k(arrays, tau), temperature=tau)
        return weighted_linear_loss(teacher.term, teacher.chunk_size, student_hidden, head, weight, targets)

    outputs: Any = weighted(student_hidden_BTD, head, jnp.asarray(weight_BT), teacher.arrays, teacher.tau)
    total, metrics = outputs
    return total if metrics is None else (total, metrics)


def linear_raft_losses(
    answer_hidden_BAD: jax.Array,
    labels_BA: jax.Array,
    student_hidden_BTD: jax.Array,
    student_unembedding_DV: jax.Array | TiedEmbedding,
    teacher_hidden_BTD: jax.Array | TopK,
    teacher_unembedding_DV: jax.Array | TiedEmbedding | None = None,
    *,
    k: int | None = None,
    temperature: float = 1.5,
    student_bias_V: jax.Array | None = None,
    teacher_bias_V: jax.Array | None = None,
    logit_scale: float | tuple[float, float] = 1.0,
    logit_softcap: float | tuple[float | None, float | None] | None = None,
    vocab_size: int | None = None,
    chunk_size: int = 512,
    recall: float | None = None,
    vocab_shards: int | str | Sequence[str] | None = None,
    return_metrics: bool = False,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
):
    """`linear_cross_entropy` on the answers and `linear_top_k_forward_kl` on the rollouts, in one call.

    The losses are those of the two functions. The unembedding's gradient is computed once for both, instead of adding
    two arrays of its size. Answers and rollouts may be the same tokens, and their numbers of rows may differ (for
    example two rollouts per prompt).

    Args:
        answer_hidden_BAD, labels_BA: [B, A, D], float, and [B, A], int, as in `linear_cross_entropy`.
        student_hidden_BTD: [B', T, D], float, of the rollouts. This and the other arguments are those of
            `linear_top_k_forward_kl`.
        label_smoothing, z_loss: as in `cross_entropy`.

    Returns:
        (sft_loss_BA, kl_loss_BT), float32, nats; with return_metrics (sft_loss_BA, (kl_loss_BT, {name: [B, T]})).

    Raises:
        ValueError: an argument is invalid; raised while tracing.

    RAFT (arXiv:2606.00147), Eqs. 5 and 8 to 10.

    >>> hidden_BTD, unembedding_DV, labels_BT = jnp.ones((1, 1, 2)), jnp.zeros((2, 4)), jnp.array([[3]])
    >>> sft_BT, kl_BT = linear_raft_losses(
    ...     hidden_BTD, labels_BT, hidden_BTD, unembedding_DV, hidden_BTD, unembedding_DV, k=2)
    >>> round(float(sft_BT[0, 0]), 4), float(kl_BT[0, 0])  # log 4, and a student that is its teacher
    (1.3863, 0.0)
    """
    checks.floating("answer_hidden_BAD", answer_hidden_BAD)
    checks.floating("student_hidden_BTD", student_hidden_BTD)
    labels_BA = checks.labels(labels_BA, answer_hidden_BAD.shape[:-1])
    shapes = answer_hidden_BAD.shape, student_hidden_BTD.shape
    if len(shapes[0]) != len(shapes[1]) or shapes[0][-1] != shapes[1][-1]:
        raise ValueError(
            f"answer_hidden_BAD must have shape [B, A, {shapes[1][-1]}] to meet student_hidden_BTD, got {shapes[0]}"
        )
    head = LMHead.checked("student_", student_hidden_BTD, student_unembedding_DV, student_bias_V)
    teacher = TeacherTopK.checked(
        student_hidden_BTD, head, teacher_hidden_BTD, teacher_unembedding_DV, teacher_bias_V, k, temperature, recall,
        return_metrics, vocab_size, chunk_size, vocab_shards, logit_scale, logit_softcap,
    )  # fmt: skip
    config = teacher.term.student
    smoothing = checks.label_smoothing(label_smoothing), checks.z_loss(z_loss)
    terms = Term(CrossEntropy(config.vocab_size, *smoothing), config), teacher.term

    @sharding.automatic(student_hidden_BTD.ndim - 1)
    def losses(answer_hidden, labels, student_hidden, head, arrays, tau):
        targets = Targets(labels), Targets(teacher.top_k(arrays, tau), temperature=tau)
        return linear_losses(terms, teacher.chunk_size, (answer_hidden, student_hidden), head, targets)

    arrays = answer_hidden_BAD, labels_BA, student_hidden_BTD, head, teacher.arrays, teacher.tau
    return losses(*arrays)


class TeacherTopK(NamedTuple):
    """Checked arguments and the top-K search, shared by the two losses on the teacher's top K."""

    term: Term
    chunk_size: int
    arrays: TopK | tuple[jax.Array, LMHead]  # a precomputed TopK, or the teacher's hidden states and head
    tau: jax.Array
    k: int | None
    recall: float | None
    config: LogitConfig | None  # the teacher's

    @classmethod
    def checked(
        cls, student_hidden, student_head, hidden, unembedding, bias_V, k, temperature, recall, return_metrics,
        vocab_size, chunk_size, vocab_shards, scale, softcap,
    ) -> TeacherTopK:  # fmt: skip
        """Raises ValueError if an argument is invalid or the two models' shapes do not match."""
        checks.truncation(k, recall)
        chunk_size, shape = checks.chunk_size(chunk_size), student_hidden.shape[:-1]
        tau = checks.temperature(temperature, checks.accumulation_dtype(student_hidden.dtype, student_head.dtype))
        scales, softcaps = pair("logit_scale", scale), pair("logit_softcap", softcap)
        sizes, head, arrays = {"student_unembedding_DV": student_head.vocabulary}, None, hidden
        if isinstance(hidden, TopK):
            truncation.check_given(hidden, shape, temperature, return_metrics)
            if unembedding is not None or bias_V is not None:
                raise ValueError("teacher_unembedding_DV and teacher_bias_V must be None where the teacher is a TopK")
        else:
            checks.floating("teacher_hidden_BTD", hidden)
            checks.tokens("teacher_hidden_BTD", hidden, shape)
            head = LMHead.checked("teacher_", hidden, unembedding, bias_V)
            sizes["teacher_unembedding_DV"], arrays = head.vocabulary, (hidden, head)
        vocab_size = checks.vocab_size(vocab_size, **sizes)
        student = student_head.config(scales[0], softcaps[0], vocab_size, vocab_shards)
        config = None if head is None else head.config(scales[1], softcaps[1], vocab_size, vocab_shards)
        term = Term(TopKForwardKL(student_head.vocabulary, student, bool(return_metrics)), student)
        return cls(term, student.sharding.chunk_size(chunk_size), arrays, tau, k, recall, config)

    def top_k(self, arrays, tau) -> TopK:
        """The precomputed `TopK`, truncated to k; or the search in the teacher's logits."""
        loss = self.term.loss
        if self.config is None:
            return truncation.given_top_k(arrays, self.k, loss.config.vocab_size)
        tau = tau if loss.return_metrics else None
        hidden_BTD, head = arrays
        return _search(self.config, self.k or 512, self.recall, self.chunk_size, hidden_BTD, head, tau)


def _search(config: LogitConfig, k, recall, chunk_size, hidden_BTD, head, tau) -> TopK:
    """Searches the top K in chunks of tokens; without `log_normalizer_BT` and `entropy_BT` if tau is None."""
    hidden_BTD, head = jax.lax.stop_gradient((hidden_BTD, head))
    num_rows = TokenChunks.of(hidden_BTD.shape[:-1], chunk_size).rows

    def chunk(hidden_ND):
        logits_NV = head.logits(config.sharding.gather(hidden_ND, num_rows), config)
        values_NK, indices_NK = truncation.top_k_sharded(logits_NV, min(k, config.vocab_size), recall, config.sharding)
        normalizer_N, entropy_N = (None, None) if tau is None else truncation.softmax_metrics(logits_NV, tau)[1:]
        return TopK(indices_NK, values_NK, normalizer_N, entropy_N)

    return over_tokens(chunk, hidden_BTD.shape[:-1], chunk_size, hidden_BTD)


def _linear_divergence(
    loss,
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
    checks.floating("student_hidden_BTD", student_hidden_BTD)
    checks.floating("teacher_hidden_BTD", teacher_hidden_BTD)
    checks.tokens("teacher_hidden_BTD", teacher_hidden_BTD, student_hidden_BTD.shape[:-1])
    student = LMHead.checked("student_", student_hidden_BTD, student_unembedding_DV, student_bias_V)
    teacher = LMHead.checked("teacher_", teacher_hidden_BTD, teacher_unembedding_DV, teacher_bias_V)
    tau = checks.temperature(temperature, checks.accumulation_dtype(student_hidden_BTD.dtype, student.dtype))
    widths = {"student_unembedding_DV": student.vocabulary, "teacher_unembedding_DV": teacher.vocabulary}
    vocab_size = checks.vocab_size(vocab_size, **widths)
    scales, softcaps = pair("logit_scale", logit_scale), pair("logit_softcap", logit_softcap)
    student_config = student.config(scales[0], softcaps[0], vocab_size, vocab_shards)
    teacher_config = teacher.config(scales[1], softcaps[1], vocab_size, vocab_shards)
    # Both heads are split into the same vocabulary blocks, so the teacher's is padded or sliced to the student's size.
    teacher = jax.tree.map(partial(_resized, size=student.vocabulary), teacher, teacher.axes)
    teacher_config = teacher_config._replace(padded=student_config.padded, sharding=student_config.sharding)
    teacher_hidden_BTD, teacher = jax.lax.stop_gradient((teacher_hidden_BTD, teacher))
    term = Term(loss, student_config, teacher_config)
    chunk_size = student_config.sharding.chunk_size(checks.chunk_size(chunk_size))
    targets = Targets(teacher_hidden_BTD, teacher, tau)
    return _one_loss(term, chunk_size, student_hidden_BTD, student, weight_BT, targets)


def _one_loss(term: Term, chunk_size: int, hidden_BTD, head, weight_BT, targets: Targets):
    """The unreduced loss [B, T], or its weighted sum if weight_BT is given."""
    if weight_BT is not None:
        checks.weight(weight_BT, hidden_BTD.shape[:-1])

        @sharding.automatic(0)
        def weighted(hidden_BTD, head, weight_BT, targets):
            outputs: Any = weighted_linear_loss(term, chunk_size, hidden_BTD, head, weight_BT, targets)
            return outputs[0]

        return weighted(hidden_BTD, head, jnp.asarray(weight_BT), targets)

    @sharding.automatic(hidden_BTD.ndim - 1)
    def run(hidden_BTD, head, targets):
        return linear_loss(term, chunk_size, hidden_BTD, head, targets)

    return run(hidden_BTD, head, targets)


def _resized(x, axis: int, size: int):
    if x.shape[axis] >= size:
        return jax.lax.slice_in_dim(x, 0, size, axis=axis)
    return jnp.pad(x, [(0, size - x.shape[axis]) if place == axis else (0, 0) for place in range(x.ndim)])
