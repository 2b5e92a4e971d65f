"""Both losses of RAFT in one call, so that the unembedding's gradient is one product."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from raft_jax.losses import blocks, checks, linear, placement
from raft_jax.losses.head import Head, Tied
from raft_jax.losses.linear import Search
from raft_jax.losses.truncation import TopK


def linear_raft_losses(
    answer_hidden_BAD: jax.Array,
    labels_BA: jax.Array,
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
):
    """`linear_cross_entropy` of the answers and `linear_top_k_forward_kl` of the rollouts.

    The same numbers as from the two, and one gradient of the unembedding in place of two that are then added: one array
    of its size, written once. Answers and rollouts may be the same tokens.

    Args:
        answer_hidden_BAD, labels_BA: [B, A, D], float, and [B, A], int, as in `linear_cross_entropy`.
        student_hidden_BTD: [B, T, D], float, of the rollouts; it and all that follows as in `linear_top_k_forward_kl`.

    Returns:
        (sft_nats_BA, kl_nats_BT), float32; with metrics (sft_nats_BA, (kl_nats_BT, {name: [B, T]})).

    RAFT (arXiv:2606.00147), Eqs. 5 and 8 to 10.

    >>> hidden_BTD, unembedding_DV, labels_BT = jnp.ones((1, 1, 2)), jnp.zeros((2, 4)), jnp.array([[3]])
    >>> sft_BT, kl_BT = linear_raft_losses(
    ...     hidden_BTD, labels_BT, hidden_BTD, unembedding_DV, hidden_BTD, unembedding_DV, k=2)
    >>> round(float(sft_BT[0, 0]), 4), float(kl_BT[0, 0])  # log 4, and a student that is its teacher
    (1.3863, 0.0)
    """
    checks.floating("answer_hidden_BAD", answer_hidden_BAD, 3)
    checks.floating("student_hidden_BTD", student_hidden_BTD, 3)
    checks.labels(labels_BA, answer_hidden_BAD.shape[:2])
    (B, T, D), want = student_hidden_BTD.shape, (answer_hidden_BAD.shape[0], answer_hidden_BAD.shape[2])
    if want != (B, D):
        raise ValueError(f"answer_hidden_BAD must have shape [{B}, A, {D}] to meet student_hidden_BTD, "
                         f"got {answer_hidden_BAD.shape}")
    search = Search.checked(k, temperature, recall, return_metrics)
    head = Head.checked("student_", student_hidden_BTD, student_unembedding_DV, student_bias_V)
    teacher, form, teacher_form = search.teacher(
        (B, T), head, teacher_hidden_BTD, teacher_unembedding_DV, teacher_bias_V,
        (logit_scale, logit_softcap, vocab_size, chunk_size, vocab_shards),
    )  # fmt: skip

    def losses(answer_hidden, labels, student_hidden, head, teacher):
        teacher = search.top_k(teacher_form, teacher)
        sft_BA, *found = _both(
            form, search.statistics, answer_hidden, labels, student_hidden, head, teacher.indices_BTK
        )
        return sft_BA, search.nats(*found, teacher)

    return placement.automatic(losses, answer_hidden_BAD, labels_BA, student_hidden_BTD, head, teacher)


def _both(form, temperature, answer_BAD, labels_BA, student_BTD, head, indices_BTK):
    """(nats of the labels, logits at the indices, `describe` or None); the first two have a gradient."""
    return _both_forward(form, temperature, answer_BAD, labels_BA, student_BTD, head, indices_BTK)[0]


def _both_forward(form, temperature, answer_BAD, labels_BA, student_BTD, head, indices_BTK):
    nats_BA, (*_, normalizer_BA) = linear.cross_entropy_forward(form, answer_BAD, head, labels_BA)
    found, (*_, kept_BTK) = linear.logits_at_forward(form, temperature, student_BTD, head, indices_BTK)
    return (nats_BA, *found), (answer_BAD, labels_BA, normalizer_BA, student_BTD, head, indices_BTK, kept_BTK)


def _both_backward(form, temperature, residuals, cotangents):
    answer_BAD, labels_BA, normalizer_BA, student_BTD, head, indices_BTK, kept_BTK = residuals
    slopes = (
        linear.cross_entropy_slope(form, answer_BAD, labels_BA, normalizer_BA, cotangents[0]),
        linear.logits_at_slope(form, head.vocabulary, indices_BTK, kept_BTK, cotangents[1]),
    )
    B, A, _ = answer_BAD.shape

    def slope(pieces, columns):
        parts = [slope(pieces, columns).reshape(B, -1, len(columns)) for slope in slopes]
        return jnp.concatenate(parts, axis=1).reshape(-1, len(columns))

    # Behind one another in time, so that a batch that is split over devices stays where it is.
    both_BTD = jnp.concatenate([answer_BAD, student_BTD], axis=1)
    both_grad, head_grad = blocks.backward(form, slope, both_BTD, (head,))
    answer_grad, student_grad = both_grad[:, :A], both_grad[:, A:]
    return answer_grad.astype(answer_BAD.dtype), None, student_grad.astype(student_BTD.dtype), head_grad, None


_both = jax.custom_vjp(_both, nondiff_argnums=(0, 1))
_both.defvjp(_both_forward, _both_backward)
