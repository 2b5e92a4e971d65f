"""What XLA says it will need, without running anything."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jaxlib import version
from quick import used_jit

from raft_jax.losses import (
    TiedEmbedding,
    linear_cross_entropy,
    linear_raft_losses,
    linear_top_k_forward_kl,
    sequence_mean,
)

D, V, K = 4096, 128256, 512
GIB = 2**30
# Up to jaxlib 0.8 XLA on CPU multiplies bfloat16 as float32, and holds both models' unembeddings so.
WIDENED = 2 * 4 * D * V if version.__version_info__ < (0, 9) else 0


def compiled(time, batch=8, tied=False, sharding=None, at_once=False, **settings):
    """Value and gradient of both linear losses together, in bfloat16."""

    def shape(*size, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(size, dtype, sharding=sharding)

    def loss(answer_BTD, rollout_BTD, unembedding, teacher_BTD, teacher_unembedding, labels_BT, mask_BT, weight):
        if tied:
            unembedding, teacher_unembedding = TiedEmbedding(unembedding), TiedEmbedding(teacher_unembedding)
        teacher = teacher_BTD, teacher_unembedding
        if at_once:
            sft, kl = linear_raft_losses(answer_BTD, labels_BT, rollout_BTD, unembedding, *teacher, k=K, **settings)
        else:
            sft = linear_cross_entropy(answer_BTD, unembedding, labels_BT, **settings)
            kl = linear_top_k_forward_kl(rollout_BTD, unembedding, *teacher, k=K, **settings)
        return sequence_mean(sft, mask_BT) + weight * sequence_mean(kl, mask_BT)

    hidden, unembedding = shape(batch, time, D), shape(*(V, D) if tied else (D, V))
    labels, mask = shape(batch, time, dtype=jnp.int32), shape(batch, time, dtype=jnp.bool_)
    arguments = hidden, hidden, unembedding, hidden, unembedding, labels, mask, shape(dtype=jnp.float32)
    return used_jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*arguments).compile()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_temporary_memory(tied):
    """8,192 tokens, width 4,096, vocabulary 128,256, K = 512: at most 3 GiB."""
    whole = compiled(1024, tied=tied, vocab_shards=1)
    assert whole.memory_analysis().temp_size_in_bytes <= 3 * GIB + WIDENED


# At once the hidden states of both losses lie in one array, and so do their gradients in float32.
@pytest.mark.parametrize(("at_once", "share"), [(False, 1 / 4), (True, 1 / 3)], ids=["two calls", "at once"])
def test_twice_the_tokens_add_nothing_with_a_vocabulary(at_once, share):
    once, twice = (compiled(time, at_once=at_once, vocab_shards=1) for time in (1024, 2048))
    once_sizes, twice_sizes = (vocabulary_sizes(program.as_text()) for program in (once, twice))
    assert twice_sizes <= once_sizes
    added = twice.memory_analysis().temp_size_in_bytes - once.memory_analysis().temp_size_in_bytes
    assert added < 8192 * V * 2 * share  # of one model's logits of the added tokens


def vocabulary_sizes(program):
    """Numbers of elements of the arrays that have a dimension of the whole vocabulary."""
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", program)}
    return {math.prod(dims) for dims in shapes if V in dims}
