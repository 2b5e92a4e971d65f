"""Attention by kernels that never hold the scores: Pallas splash attention on TPU, cuDNN's on GPU.

The decoder's own attention is the plain one, and what these two are measured against.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from raft_jax.sharding import partition_spec

KERNELS = ("plain", "splash", "cudnn")
BLOCK = 128  # splash attention's unit of query and key positions
LARGEST_BLOCK = 512


def best_kernel(softcap: float | None) -> str:
    """The kernel for the default backend; cuDNN's has no soft-cap."""
    backend = jax.default_backend()
    if backend == "tpu":
        return "splash"
    return "cudnn" if backend in ("gpu", "cuda") and softcap is None else "plain"


def flash(
    query_BTNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKH: jax.Array,
    mask_BS: jax.Array,
    *,
    kernel: str,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Mixed values of the last T of S tokens; each sees the real tokens up to itself.

    Args:
      query_BTNH, key_BSKH, value_BSKH: bfloat16 or float32; cuDNN takes 16-bit floats only.
      mask_BS: bool, True on real tokens. What comes out at padding means nothing, but is finite.
      kernel: "splash" or "cudnn".
      scale: of the scores.
      softcap: scores are softcap tanh(scores / softcap).
      window: a token sees this many, itself among them. Default: all.
      interpret: run the Pallas kernel without a TPU.

    Returns:
      mixed_BTNH in the values' dtype.
    """
    if kernel == "cudnn":
        return _cudnn(query_BTNH, key_BSKH, value_BSKH, mask_BS, scale, window)
    run = partial(_splash, softcap=softcap, window=window, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        # The compiler cannot cut a kernel: every device runs its own rows and heads.
        heads, tokens = partition_spec(("batch", None, "heads", None)), partition_spec(("batch", None))
        run = jax.shard_map(run, in_specs=(heads, heads, heads, tokens), out_specs=heads, check_vma=False)
    return run(query_BTNH * jnp.asarray(scale, query_BTNH.dtype), key_BSKH, value_BSKH, mask_BS)


def _cudnn(query_BTNH, key_BSKH, value_BSKH, mask_BS, scale, window):
    T, S = query_BTNH.shape[1], key_BSKH.shape[1]
    visible_BTS = visible(T, S, window) & mask_BS[:, None, :]
    # A row of padding before its prompt sees nothing: it is given itself, so that its softmax has a term.
    visible_BTS |= jnp.eye(T, S, S - T, dtype=bool)
    return jax.nn.dot_product_attention(
        query_BTNH, key_BSKH, value_BSKH, mask=visible_BTS[:, None], scale=scale, implementation="cudnn"
    )


def visible(T: int, S: int, window: int | None) -> jax.Array:
    """Which of S tokens each of the last T may see [T, S]: none that come after it, none beyond the window."""
    seen_TS = jnp.tri(T, S, S - T, dtype=bool)
    return seen_TS if window is None else seen_TS & ~jnp.tri(T, S, S - T - window, dtype=bool)


def _splash(query_BTNH, key_BSKH, value_BSKH, mask_BS, *, softcap, window, interpret):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, S = query_BTNH.shape[1], key_BSKH.shape[1]
    block_T, block_S = (min(LARGEST_BLOCK, -(-size // BLOCK) * BLOCK) for size in (T, S))
    # Padding goes behind the last token, keys for every query: no softmax may be without a term.
    padded_T = -(-T // block_T) * block_T
    padded_S = -(-(S + padded_T - T) // block_S) * block_S
    query, key, value = (
        jnp.pad(array, ((0, 0), (0, size - array.shape[1]), (0, 0), (0, 0))).swapaxes(1, 2)
        for array, size in ((query_BTNH, padded_T), (key_BSKH, padded_S), (value_BSKH, padded_S))
    )
    if window is None:
        mask = masks.CausalMask((padded_T, padded_S), offset=S - T)
    else:
        mask = masks.LocalMask((padded_T, padded_S), window_size=(window - 1, 0), offset=S - T)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * query.shape[1]), head_shards=1, q_seq_shards=1, attn_logits_soft_cap=softcap,
        interpret=interpret,
        block_sizes=splash.BlockSizes(
            block_q=block_T, block_kv=block_S, block_kv_compute=block_S, block_q_dkv=block_T, block_kv_dkv=block_S,
            block_kv_dkv_compute=block_S, block_q_dq=block_T, block_kv_dq=block_S,
        ),
    )
    # Real tokens are one segment and padding another; so padding sees itself at least.
    segment_BS = jnp.pad(mask_BS, ((0, 0), (0, padded_S - S))).astype(jnp.int32)
    query_segment_BT = jnp.pad(mask_BS[:, S - T :], ((0, 0), (0, padded_T - T))).astype(jnp.int32)
    mixed = jax.vmap(kernel)(query, key, value, splash.SegmentIds(query_segment_BT, segment_BS))
    return mixed.swapaxes(1, 2)[:, :T]
