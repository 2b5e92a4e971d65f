"""Refused at trace time, naming the argument, what it got and what it wants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from raft_jax import losses

B, T, D, V = 2, 3, 4, 8
LOGITS, HIDDEN, UNEMBEDDING = jnp.zeros((B, T, V)), jnp.zeros((B, T, D)), jnp.zeros((D, V))
LABELS, MASK = jnp.zeros((B, T), int), jnp.ones((B, T), bool)
NEGATIVE = jnp.float32(-1)
TIED = losses.TiedEmbedding
KEPT = losses.TopK(jnp.broadcast_to(jnp.arange(2), (B, T, 2)), jnp.zeros((B, T, 2)))

LINEAR = HIDDEN, UNEMBEDDING, LABELS
AT_ONCE = losses.linear_raft_losses
CROSS_ENTROPY, TOP_K = losses.linear_cross_entropy, losses.linear_top_k_forward_kl

WRONG = [
    (lambda: losses.cross_entropy(LOGITS.astype(int), LABELS), "logits_BTV must be a floating-point array, got int32"),
    (lambda: losses.cross_entropy(LOGITS[0], LABELS), r"labels_BT must have shape \(3,\), got \(2, 3\)"),
    (lambda: losses.cross_entropy(jnp.float32(0), LABELS), "logits_BTV must have at least one dimension, got a scalar"),
    (lambda: losses.cross_entropy(LOGITS, LABELS, label_smoothing=1.0), r"label_smoothing must be in \[0, 1\)"),
    (lambda: losses.cross_entropy(LOGITS, LABELS, z_loss=-1), "z_loss must be >= 0, got -1"),
    (lambda: losses.top_k_forward_kl(LOGITS, KEPT, k=3), "k must be at most the 2 tokens that the TopK holds, got 3"),
    (lambda: losses.TopK(np.zeros((1, 2), int), np.zeros((1, 2))), "must be distinct at each position, got 0 twice"),
    (lambda: losses.TopK(LOGITS, LOGITS), "indices_BTK must be an integer array, got float32"),
    (lambda: losses.TopK(KEPT.indices_BTK, KEPT.logits_BTK, LOGITS), "log_normalizer_BT must have shape"),
    (lambda: losses.top_k_forward_kl(LOGITS, losses.top_k(LOGITS), temperature=2.0, return_metrics=True),
     "statistics are at the loss's temperature 2.0, got one of 1.5"),
    (lambda: losses.top_k_forward_kl(LOGITS, LOGITS, temperature=LOGITS), "temperature must be a scalar, got shape"),
    (lambda: losses.cross_entropy(LOGITS, LABELS[:1]), r"labels_BT must have shape \(2, 3\), got \(1, 3\)"),
    (lambda: losses.cross_entropy(LOGITS, MASK), "labels_BT must be an integer array, got bool"),
    (lambda: losses.cross_entropy(LOGITS, LABELS, vocab_size=9), "vocab_size must be between 1 and 8, got 9"),
    (lambda: losses.top_k_forward_kl(LOGITS, LOGITS[:, :2]), r"teacher_logits_BTV must have shape \[2, 3, ...\]"),
    (lambda: losses.top_k_forward_kl(LOGITS, LOGITS[..., :7]), "vocabularies differ .* set vocab_size"),
    (lambda: losses.top_k_forward_kl(LOGITS, LOGITS, k=0), "k must be an integer >= 1, got 0"),
    (lambda: losses.top_k_forward_kl(LOGITS, LOGITS, k=2.5), "k must be an integer >= 1, got 2.5"),
    (lambda: losses.top_k_forward_kl(LOGITS, LOGITS, temperature=0), "temperature must be > 0, got 0"),
    (lambda: losses.top_k_forward_kl(LOGITS, LOGITS, recall=1.5), r"recall must be in \(0, 1\] or None"),
    (lambda: losses.top_k_forward_kl(LOGITS, KEPT._replace(logits_BTK=LOGITS)), "indices_BTK must have the shape"),
    (lambda: losses.top_k(LOGITS, vocab_shards=3), "vocab_shards must divide the vocabulary of 8, got 3"),
    (lambda: losses.forward_kl(LOGITS, LOGITS, temperature=NEGATIVE), "temperature must be > 0, got -1.0"),
    (lambda: losses.forward_kl(LOGITS, LOGITS, temperature=-1.0), "temperature must be > 0, got -1.0"),
    (lambda: losses.jensen_shannon(LOGITS, LOGITS, beta=1.0), r"beta must be in \(0, 1\), got 1.0; use"),
    (lambda: CROSS_ENTROPY(HIDDEN, UNEMBEDDING.T, LABELS), r"unembedding_DV must have shape .* TiedEmbedding\(table\)"),
    (lambda: CROSS_ENTROPY(HIDDEN, TIED(UNEMBEDDING), LABELS), r"TiedEmbedding\(embedding_VD\) must have shape \[V,"),
    (lambda: CROSS_ENTROPY(HIDDEN, TIED(None), LABELS), r"TiedEmbedding\(embedding_VD\) must be a floating"),
    (lambda: CROSS_ENTROPY(*LINEAR, weight_BT=MASK), "weight_BT must be a floating-point array, got bool"),
    (lambda: CROSS_ENTROPY(*LINEAR, weight_BT=LOGITS[:1, :, 0]), r"weight_BT must have shape \(2, 3\), got \(1, 3\)"),
    (lambda: losses.sequence_weight(LOGITS[..., 0]), "mask_BT must be a bool or integer array, got float32"),
    (lambda: CROSS_ENTROPY(*LINEAR, weight_BT=LOGITS[..., 0], return_logsumexp=True), "must be False with weight_BT"),
    (lambda: CROSS_ENTROPY(*LINEAR, chunk_size=0), "chunk_size must be an integer"),
    (lambda: CROSS_ENTROPY(*LINEAR, logit_softcap=0), "logit_softcap must be > 0"),
    (lambda: CROSS_ENTROPY(*LINEAR, bias_V=HIDDEN[0, 0]), r"bias_V must have shape \[8\]"),
    (lambda: CROSS_ENTROPY(HIDDEN, LABELS, LABELS), "unembedding_DV must be a floating-point array, got int"),
    (lambda: TOP_K(HIDDEN, UNEMBEDDING, HIDDEN, UNEMBEDDING, logit_scale=(1, 2, 3)), "logit_scale must be one value"),
    (lambda: TOP_K(HIDDEN, UNEMBEDDING, KEPT, UNEMBEDDING), "must be None where the teacher is a TopK"),
    (lambda: TOP_K(HIDDEN, UNEMBEDDING, HIDDEN), "teacher_unembedding_DV must be a floating"),
    (lambda: TOP_K(HIDDEN, UNEMBEDDING, HIDDEN[:, 1:], UNEMBEDDING), "teacher_hidden_BTD must"),
    (lambda: AT_ONCE(HIDDEN[..., 1:], LABELS, *LINEAR[:2], HIDDEN, UNEMBEDDING), r"answer_hidden_BAD .* \[B, A, 4\]"),
    (lambda: AT_ONCE(HIDDEN, LABELS, *LINEAR[:2], HIDDEN[:, 1:], UNEMBEDDING), "teacher_hidden_BTD must"),
    (lambda: losses.linear_forward_kl(HIDDEN, UNEMBEDDING, HIDDEN, UNEMBEDDING[:, 1:]), "vocabularies differ"),
    (lambda: losses.sequence_mean(LOGITS[..., 0], MASK[:1]), r"mask_BT must have the shape \(2, 3\) of values_BT, got"),
    (lambda: losses.token_mean(LOGITS, MASK), r"mask_BT must have the shape \(2, 3, 8\) of values_BT, got \(2, 3\)"),
    (lambda: losses.raft_objective(LOGITS[0, 0], 1.0, 1.0), r"sft_loss must be a scalar, got shape \(8,\)"),
    (lambda: losses.update_balance(losses.init_balance(), 1.0, 1.0, decay=1.0), r"decay must be in \[0, 1\), got 1.0"),
    (lambda: losses.update_balance(losses.init_balance(), 1.0, 1.0, epsilon=0), "epsilon must be > 0, got 0"),
    (lambda: losses.update_balance(losses.init_balance(), 1.0, 1.0, floor=-1), "floor must be >= 0, got -1"),
    (lambda: losses.update_balance(losses.init_balance(), 1.0, 1.0, max_weight=0), "max_weight must be > 0, got 0"),
]  # fmt: skip


@pytest.mark.parametrize("call, message", WRONG, ids=[message[:40] for _, message in WRONG])
def test_said_at_trace_time(call, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call)
