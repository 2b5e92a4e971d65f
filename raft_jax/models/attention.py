"""Attention: the plain one, and kernels that never hold the scores: Pallas splash attention on TPU, cuDNN's on GPU.

Letters: B batch, T time, S tokens that may be seen, N query heads, K key/value heads, G = N/K, H head width. A config
is a DecoderConfig.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from raft_jax.sharding import partition_spec

MASKED = -1e30  # finite, so that a row with no visible key (padding) gives numbers and not NaN
BLOCK = 128  # splash attention's unit of query and key positions
LARGEST_BLOCK = 512


def attend(config, query_BTNH, key_BKHT, value_BKTH, positions_BT, mask_BT, fork, window) -> jax.Array:
    """Mixed values `[B, T, N, H]` of tokens that see themselves and what stands before them, up to a fork."""
    attend_last = partial(_attend_last, config, window)
    if fork is None:
        return attend_last(query_BTNH, key_BKHT, value_BKTH, positions_BT, mask_BT)
    length, end = fork[0], sum(fork)

    def second(array, axis):
        before, _, after = jnp.split(array, (length, end), axis)
        return jnp.concatenate([before, after], axis)

    first_BTNH = attend_last(
        query_BTNH[:, :end], key_BKHT[..., :end], value_BKTH[:, :, :end], positions_BT[:, :end], mask_BT[:, :end]
    )
    second_BTNH = attend_last(
        query_BTNH[:, end:], second(key_BKHT, 3), second(value_BKTH, 2), second(positions_BT, 1), second(mask_BT, 1)
    )
    return jnp.concatenate([first_BTNH, second_BTNH], axis=1)


def _attend_last(config, window, query_BTNH, key_BKHS, value_BKSH, positions_BS, mask_BS) -> jax.Array:
    """Mixed values `[B, T, N, H]` of the last T of S tokens."""
    if config.kernel != "plain":
        return _attend_by_kernel(config, window, query_BTNH, key_BKHS, value_BKSH, mask_BS)
    B, T, N, H = query_BTNH.shape
    S = key_BKHS.shape[-1]
    visible_BTS = visible(T, S, None) & mask_BS[:, None, :]
    if window is not None:
        visible_BTS &= positions_BS[:, S - T :, None] - positions_BS[:, None, :] < window
    query_BTKGH = _grouped(query_BTNH, key_BKHS.shape[1])
    scores = jnp.einsum("btkgh,bkhs->bkgts", query_BTKGH, key_BKHS, preferred_element_type=jnp.float32)
    scores = softcap(scores, config.attention_softcap)
    probs = jax.nn.softmax(jnp.where(visible_BTS[:, None, None], scores, MASKED), axis=-1)
    return jnp.einsum("bkgts,bksh->btkgh", probs.astype(value_BKSH.dtype), value_BKSH).reshape(B, T, N, H)


def _attend_by_kernel(config, window, query_BTNH, key_BKHS, value_BKSH, mask_BS) -> jax.Array:
    """The same by a kernel, into which the window is compiled: one branch for each that the layers have."""
    S = mask_BS.shape[1]

    def attend(size):
        size = None if size is None or size >= S else size
        return partial(
            flash, kernel=config.kernel, scale=1.0, softcap=config.attention_softcap, window=size
        )

    arguments = query_BTNH, key_BKHS.transpose(0, 3, 1, 2), value_BKSH.swapaxes(1, 2), mask_BS
    if window is None:
        return attend(None)(*arguments)
    sizes = sorted(set(config.windows))
    branch = jnp.searchsorted(jnp.array(sizes, jnp.int32), window)
    return jax.lax.switch(branch, [attend(size) for size in sizes], *arguments)


def attend_one(config, query_B1NH, key_BKH1, value_BK1H, past_key_BKHS, past_value_BKSH, visible_BS) -> jax.Array:
    """The same for one new token, which sees itself and the cache.

    Written as sums: XLA fuses them with reading the cache, where a product of matrices would first copy it.
    """
    B, _, N, H = query_B1NH.shape
    query_BKGH1 = _grouped(query_B1NH, key_BKH1.shape[1])[:, 0, ..., None].astype(jnp.float32)
    past_BKGS = softcap(jnp.sum(query_BKGH1 * past_key_BKHS[:, :, None], axis=3), config.attention_softcap)
    past_BKGS = jnp.where(visible_BS[:, None, None], past_BKGS, MASKED)
    own_BKG1 = softcap(jnp.sum(query_BKGH1 * key_BKH1[:, :, None], axis=3), config.attention_softcap)
    highest = jnp.maximum(jnp.max(past_BKGS, axis=-1, keepdims=True), own_BKG1)
    past_BKGS, own_BKG1 = jnp.exp(past_BKGS - highest), jnp.exp(own_BKG1 - highest)
    mixed_BKGH = jnp.sum(past_BKGS[..., None] * past_value_BKSH[:, :, None], axis=3) + own_BKG1 * value_BK1H
    mixed_BKGH = mixed_BKGH / (jnp.sum(past_BKGS, axis=-1, keepdims=True) + own_BKG1)
    return mixed_BKGH.astype(value_BK1H.dtype).reshape(B, 1, N, H)


def _grouped(query_BTNH, num_kv_heads: int) -> jax.Array:
    """Queries `[B, T, K, G, H]` beside the key head that each group shares."""
    B, T, N, H = query_BTNH.shape
    return query_BTNH.reshape(B, T, num_kv_heads, N // num_kv_heads, H)


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
    """cap tanh(x / cap), which keeps what is small and bounds what is large; without a cap x itself."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def best_kernel(dtype, softcap: float | None) -> str:
    """The kernel for the default backend; cuDNN's takes 16-bit floats and has no soft-cap."""
    backend = jax.default_backend()
    if backend == "tpu":
        return "splash"
    return "cudnn" if backend == "gpu" and jnp.dtype(dtype).itemsize == 2 and softcap is None else "plain"


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
