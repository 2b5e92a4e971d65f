"""Operations along a vocabulary that is sharded over a mesh, in which the table stays where it is: tokens and hidden
states go to it, and embeddings and logits come back.

Written with `jax.shard_map`: from constraints alone XLA would gather the table, or replicate the logits.

Letters: B batch, T time, V vocabulary, D model width.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from raft_jax.sharding import LOGICAL_TO_MESH, constrain, num_shards, partition_spec

TENSOR, FSDP = LOGICAL_TO_MESH["vocabulary"]


def lookup(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """The embeddings `[B, T, D]` of tokens, sharded along the batch.

    The backward pass sends the embeddings' gradient to each device's part of the table, which is never summed whole.
    """
    if num_shards("vocabulary") == 1:
        return table_VD[tokens_BT]

    @partial(
        jax.shard_map,
        in_specs=(partition_spec(("vocabulary", None)), partition_spec(("batch", None))),
        out_specs=partition_spec(("batch", None, None)),
    )
    def of_device(part_VD, tokens_BT):
        index_BT = jax.lax.all_gather(tokens_BT, FSDP, tiled=True)
        index_BT = index_BT - jax.lax.axis_index((TENSOR, FSDP)) * len(part_VD)
        is_here_BT = (index_BT >= 0) & (index_BT < len(part_VD))
        found_BTD = jnp.where(is_here_BT[..., None], part_VD[jnp.where(is_here_BT, index_BT, 0)], 0)
        return jax.lax.psum(jax.lax.psum_scatter(found_BTD, FSDP, tiled=True), TENSOR)

    return of_device(table_VD, tokens_BT)


def to_table(hidden_BD: jax.Array) -> jax.Array:
    """Hidden states of one token per row, gathered for a product with a sharded unembedding."""
    return constrain(hidden_BD, "decode_batch", None)


def from_table(logits_BV: jax.Array) -> jax.Array:
    """Logits of a product with a sharded unembedding, sharded along the batch: each row's logits on its device."""
    if num_shards("vocabulary") == 1:
        return logits_BV

    @partial(
        jax.shard_map,
        in_specs=partition_spec(("decode_batch", "vocabulary")),
        out_specs=partition_spec(("batch", None)),
        check_vma=False,
    )
    def of_device(part_BV):
        rows_BV = jax.lax.all_to_all(part_BV, FSDP, split_axis=0, concat_axis=1, tiled=True)
        return jax.lax.all_gather(rows_BV, TENSOR, axis=1, tiled=True)

    return of_device(logits_BV)
