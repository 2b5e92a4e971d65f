"""Attention: plain, and by kernels that never materialise the scores: Pallas splash attention on TPU, cuDNN on GPU.

Letters: B batch, T time, S key positions, N query heads, K key/value heads, G = N/K, H head width, M = G·T queries
that share a key/value head.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from raft_jax.models.config import DecoderConfig
from raft_jax.sharding import partition_spec, platform
from raft_jax.unpadding import indices_of, move

KERNELS = ("plain", "splash", "cudnn")
SAVED = "product"  # checkpoint name of values that are saved for the backward pass
MASKED = -1e30  # finite, so that a query with no visible key (padding) gives finite numbers, not NaN
BLOCK = 128  # splash attention: block lengths are multiples of this
LARGEST_BLOCK = 512
PLAIN_BLOCK = 128  # plain attention: queries per block; keys after a block's last query are skipped


def attend(
    config: DecoderConfig, query_BTNH, key_BKHT, value_BKTH, positions_BT, mask_BT, branches, window
) -> jax.Array:
    """Causal attention, `[B, T, N, H]`, over rows of one sequence, or of a prompt with two branches.

    The prompt and each branch use separate matrix products, as in a pass over the prompt and the second branch only.
    Both passes then round alike, so a student that equals its teacher gives exactly the teacher's values.

    Args:
      branches: (P, A): a prompt of P tokens, a branch of A tokens, and a second branch that does not attend to the
        first. None: one sequence.
      window: the number of tokens that each token attends to, including itself; None: itself and all before it.
    """
    attend_last = partial(_attend_last, config, window)
    arrays = (key_BKHT, 3), (value_BKTH, 2), (positions_BT, 1), (mask_BT, 1)
    if branches is None:
        return attend_last(query_BTNH, *(array for array, _ in arrays))
    prompt, end = branches[0], sum(branches)

    def until(stop):
        return [jax.lax.slice_in_dim(array, 0, stop, axis=axis) for array, axis in arrays]

    def without_first_branch():
        parts = [(jnp.split(array, (prompt, end), axis), axis) for array, axis in arrays]
        return [jnp.concatenate([before, after], axis) for (before, _, after), axis in parts]

    mixed = [attend_last(query_BTNH[:, :prompt], *until(prompt))]
    if end > prompt:
        mixed.append(attend_last(query_BTNH[:, prompt:end], *until(end)))
    mixed.append(attend_last(query_BTNH[:, end:], *without_first_branch()))
    return jnp.concatenate(mixed, axis=1)


def _attend_last(config: DecoderConfig, window, query_BTNH, key_BKHS, value_BKSH, positions_BS, mask_BS) -> jax.Array:
    """Attention output `[B, T, N, H]` of the last T of S tokens."""
    if config.kernel != "plain":
        return _attend_by_kernel(config, window, query_BTNH, key_BKHS, value_BKSH, mask_BS)
    T, S = query_BTNH.shape[1], mask_BS.shape[1]
    mixed = []
    for start in range(0, T, PLAIN_BLOCK):
        end = min(start + PLAIN_BLOCK, T)
        keys = slice(S - T + end)  # skip keys after the block's last query
        mixed.append(
            _attend_plain(
                config,
                window,
                query_BTNH[:, start:end],
                key_BKHS[..., keys],
                value_BKSH[:, :, keys],
                positions_BS[:, keys],
                mask_BS[:, keys],
            )
        )
    return jnp.concatenate(mixed, axis=1)


def _attend_plain(config: DecoderConfig, window, query_BTNH, key_BKHS, value_BKSH, positions_BS, mask_BS) -> jax.Array:
    """Attention output as in `_attend_last`, with explicit scores."""
    B, T, N, H = query_BTNH.shape
    K, S = key_BKHS.shape[1], key_BKHS.shape[-1]
    visible_BTS = visible(T, S, None) & same_segment(mask_BS, T)
    if window is not None:
        visible_BTS &= positions_BS[:, S - T :, None] - positions_BS[:, None, :] < window
    # The queries of a group's heads are concatenated, so that every product is a plain matrix product.
    query_BKMH = _grouped(query_BTNH, K).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    mixed_BKMH = _mix(config.attention_softcap, query_BKMH, key_BKHS, value_BKSH, visible_BTS)
    return mixed_BKMH.reshape(B, N, T, H).swapaxes(1, 2)


def _scores(cap, query_BKMH, key_BKHS, visible_BTS) -> jax.Array:
    scores_BKMS = jnp.einsum("bkmh,bkhs->bkms", query_BKMH, key_BKHS, preferred_element_type=jnp.float32)
    B, K, M, S = scores_BKMS.shape
    scores_BKGTS = softcap(scores_BKMS, cap).reshape(B, K, -1, *visible_BTS.shape[1:])
    return jnp.where(visible_BTS[:, None, None], scores_BKGTS, MASKED).reshape(B, K, M, S)


def _mix(cap, query_BKMH, key_BKHS, value_BKSH, visible_BTS) -> jax.Array:
    """softmax(scores) V.

    The gradient is that of flash attention without tiling: the backward pass recomputes the probabilities from the
    saved normalizer, and none of its products needs a transposed array of scores.
    """
    return _mix_forward(cap, query_BKMH, key_BKHS, value_BKSH, visible_BTS)[0]


def _mix_forward(cap, query_BKMH, key_BKHS, value_BKSH, visible_BTS):
    scores_BKMS = _scores(cap, query_BKMH, key_BKHS, visible_BTS)
    highest_BKM1 = _pinned(jnp.max(scores_BKMS, axis=-1, keepdims=True))
    weight_BKMS = _pinned(jnp.exp(scores_BKMS - highest_BKM1))
    total_BKM1 = jnp.sum(weight_BKMS, axis=-1, keepdims=True)
    dtype = value_BKSH.dtype
    mixed_BKMH = jnp.einsum(
        "bkms,bksh->bkmh", weight_BKMS.astype(dtype), value_BKSH, preferred_element_type=jnp.float32
    )
    mixed_BKMH = checkpoint_name((mixed_BKMH / total_BKM1).astype(dtype), SAVED)
    normalizer_BKM1 = checkpoint_name(highest_BKM1 + jnp.log(total_BKM1), SAVED)
    return mixed_BKMH, (query_BKMH, key_BKHS, value_BKSH, visible_BTS, mixed_BKMH, normalizer_BKM1)


def _pinned(x: jax.Array) -> jax.Array:
    """x (float32), unchanged. Keeps XLA on CPU from fusing x into its consumers; an optimization barrier does not.

    If fused, a program with a backward pass (the student) computes exp with other rounding than one without (the
    teacher). Where both models are equal, Eq. 12 would divide by that difference.
    """
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=23)


def _mix_backward(cap, saved, grad_BKMH):
    query_BKMH, key_BKHS, value_BKSH, visible_BTS, mixed_BKMH, normalizer_BKM1 = saved
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    dtype = value_BKSH.dtype
    scores_BKMS = _scores(cap, query_BKMH, key_BKHS, visible_BTS)
    probs_BKMS = jnp.exp(scores_BKMS - normalizer_BKM1)
    mean_BKM1 = jnp.sum(grad_BKMH.astype(jnp.float32) * mixed_BKMH, axis=-1, keepdims=True)
    score_grad_BKMS = probs_BKMS * (product("bkmh,bksh->bkms", grad_BKMH, value_BKSH) - mean_BKM1)
    if cap is not None:
        score_grad_BKMS *= 1 - jnp.square(jnp.where(scores_BKMS == MASKED, 0, scores_BKMS / cap))
    score_grad_BKMS = score_grad_BKMS.astype(dtype)
    query = product("bkms,bkhs->bkmh", score_grad_BKMS, key_BKHS)
    key = product("bkmh,bkms->bkhs", query_BKMH, score_grad_BKMS)
    value = product("bkmh,bkms->bkhs", grad_BKMH, probs_BKMS.astype(dtype)).swapaxes(2, 3)
    return query.astype(dtype), key.astype(dtype), value.astype(dtype), None


_mix = jax.custom_vjp(_mix, nondiff_argnums=(0,))
_mix.defvjp(_mix_forward, _mix_backward)


def _attend_by_kernel(config: DecoderConfig, window, query_BTNH, key_BKHS, value_BKSH, mask_BS) -> jax.Array:
    """Attention output as in `_attend_last`, by a kernel. A kernel's window is static: one switch branch per size."""
    S = mask_BS.shape[1]

    def attend(size):
        size = None if size is None or size >= S else size
        return partial(flash, kernel=config.kernel, scale=1.0, softcap=config.attention_softcap, window=size)

    arguments = query_BTNH, key_BKHS.transpose(0, 3, 1, 2), value_BKSH.swapaxes(1, 2), mask_BS
    if window is None:
        return attend(None)(*arguments)
    sizes = sorted(set(config.windows))
    branch = jnp.searchsorted(jnp.array(sizes, jnp.int32), window)
    return jax.lax.switch(branch, [attend(size) for size in sizes], *arguments)


def attend_cache(
    config: DecoderConfig, query_BTNH, key_BKHT, value_BKTH, past_key_BKHS, past_value_BKSH, length_B, window
) -> jax.Array:
    """Attention output `[B, T, N, H]` of the next T tokens of each row, which attend to the cache and to each other.

    Args:
      length_B: number of tokens of each row in the cache; slots from there on are not seen.
      window: as in `attend`.
    """
    B, T, N, H = query_BTNH.shape
    K, S = past_key_BKHS.shape[1], past_key_BKHS.shape[-1]
    query_BKMH = _grouped(query_BTNH, K).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    score = partial(jnp.einsum, "bkmh,bkhs->bkms", query_BKMH, preferred_element_type=jnp.float32)
    scores_BKMS = jnp.concatenate([score(past_key_BKHS), score(key_BKHT)], axis=-1)
    slots_S, ages_TT = jnp.arange(S), jnp.arange(T)[:, None] - jnp.arange(T)
    past_BTS = jnp.broadcast_to(slots_S < length_B[:, None, None], (B, T, S))
    own_TT = ages_TT >= 0
    if window is not None:
        past_BTS &= length_B[:, None, None] + jnp.arange(T)[:, None] - slots_S < window
        own_TT &= ages_TT < window
    seen_BTS = jnp.concatenate([past_BTS, jnp.broadcast_to(own_TT, (B, T, T))], axis=-1)
    scores_BKGTS = softcap(scores_BKMS, config.attention_softcap).reshape(B, K, N // K, T, S + T)
    scores_BKGTS = jnp.where(seen_BTS[:, None, None], scores_BKGTS, MASKED)
    weight_BKMS = jax.nn.softmax(scores_BKGTS, axis=-1).reshape(B, K, -1, S + T)
    mix = partial(jnp.einsum, "bkms,bksh->bkmh", preferred_element_type=jnp.float32)
    past_BKMS, own_BKMT = jnp.split(weight_BKMS.astype(value_BKTH.dtype), [S], axis=-1)
    mixed_BKMH = mix(past_BKMS, past_value_BKSH) + mix(own_BKMT, value_BKTH)
    return mixed_BKMH.astype(value_BKTH.dtype).reshape(B, N, T, H).swapaxes(1, 2)


def _grouped(query_BTNH, num_kv_heads: int) -> jax.Array:
    """Queries `[B, T, K, G, H]`, grouped by the key/value head that they share."""
    B, T, N, H = query_BTNH.shape
    return query_BTNH.reshape(B, T, num_kv_heads, N // num_kv_heads, H)


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
    """cap tanh(x / cap): about x for small x, and bounded by ±cap. Without a cap: x."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def best_kernel(dtype, softcap: float | None, head_width: int) -> str:
    """The kernel for the platform. cuDNN's takes head widths of multiples of 8 up to 128 on every GPU."""
    backend = platform()
    if backend == "tpu":
        return "splash"
    cudnn = not why_not_cudnn(dtype, softcap) and head_width <= 128 and head_width % 8 == 0
    return "cudnn" if backend == "gpu" and cudnn else "plain"


def why_not_cudnn(dtype, softcap: float | None) -> str:
    """What no version of cuDNN's kernel does for a model; empty if there is nothing."""
    if jnp.dtype(dtype).itemsize != 2:
        return f"cuDNN takes 16-bit floats only, not {jnp.dtype(dtype).name}"
    if softcap is not None:
        return f"cuDNN has no soft-cap, and this model's attention has one of {softcap:g}"
    return ""


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
    """Attention output of the last T of S tokens; each attends to the real tokens of its segment up to itself.

    Args:
      query_BTNH, key_BSKH, value_BSKH: bfloat16 or float32; cuDNN takes 16-bit floats only.
      mask_BS: bool, True on real tokens; or int32 segment ids, 0 at padding: a token attends only to its own segment.
        The output at padding is finite and has no meaning.
      kernel: "splash" or "cudnn".
      scale: factor of the scores.
      softcap: scores become softcap tanh(scores / softcap). Not applied by cuDNN's kernel.
      window: the number of tokens that a token attends to, including itself. Default: all.
      interpret: run the Pallas kernel without a TPU.

    Returns:
      mixed_BTNH in the values' dtype.
    """
    if kernel == "cudnn":
        return _cudnn(query_BTNH, key_BSKH, value_BSKH, mask_BS, scale, window)
    run = partial(_splash, softcap=softcap, window=window, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        # The compiler cannot partition a kernel, so each device runs it on its own rows and heads.
        heads, tokens = partition_spec(("batch", None, "heads", None)), partition_spec(("batch", None))
        run = jax.shard_map(run, in_specs=(heads, heads, heads, tokens), out_specs=heads, check_vma=False)
    return run(query_BTNH * jnp.asarray(scale, query_BTNH.dtype), key_BSKH, value_BSKH, mask_BS)


def _cudnn(query_BTNH, key_BSKH, value_BSKH, mask_BS, scale, window):
    T, S = query_BTNH.shape[1], key_BSKH.shape[1]
    # All S queries take less work than the last T with a mask of their own, by which cuDNN skips nothing.
    if window is None and mask_BS.dtype == bool and 2 * T > S:
        return _cudnn_causal(query_BTNH, key_BSKH, value_BSKH, mask_BS, scale)
    return _cudnn_masked(query_BTNH, key_BSKH, value_BSKH, mask_BS, scale, window)


def _cudnn_causal(query_BTNH, key_BSKH, value_BSKH, mask_BS, scale):
    """With cuDNN's own causal mask: it skips the keys after a query, and reads no mask.

    Its lengths count from the first token, and its queries begin where its keys do. So the real tokens of each row move
    to the front; the queries of all tokens but the last T are zeros, and what they give is dropped.
    """
    T, S = query_BTNH.shape[1], key_BSKH.shape[1]
    place_BS = jnp.where(mask_BS, jnp.cumsum(mask_BS, axis=1, dtype=jnp.int32) - 1, S)  # of each token; S: none
    source_BS = indices_of(mask_BS, S)  # the token at each place; S: none
    query_source_BS = jnp.where(source_BS >= S - T, source_BS - (S - T), T)
    query_place_BT = place_BS[:, S - T :]
    query_BSNH = move(query_BTNH, query_source_BS, query_place_BT)
    key_BSKH, value_BSKH = (move(array, source_BS, place_BS) for array in (key_BSKH, value_BSKH))
    lengths_B = jnp.maximum(jnp.sum(mask_BS, axis=1, dtype=jnp.int32), 1)  # not 0, so that no softmax is empty
    mixed_BSNH = jax.nn.dot_product_attention(
        query_BSNH,
        key_BSKH,
        value_BSKH,
        scale=scale,
        is_causal=True,
        query_seq_lengths=lengths_B,
        key_value_seq_lengths=lengths_B,
        implementation="cudnn",
    )
    return move(mixed_BSNH, query_place_BT, query_source_BS)


def _cudnn_masked(query_BTNH, key_BSKH, value_BSKH, mask_BS, scale, window):
    """With an explicit mask, [B, T, S]: for windows, packed texts, and a few queries after many keys."""
    # cuDNN's backward pass takes even lengths only. Padding goes in front, so that the last query and key stay aligned.
    odd_T, odd_S = query_BTNH.shape[1] % 2, key_BSKH.shape[1] % 2

    def even(array, odd):
        return jnp.pad(array, ((0, 0), (odd, 0), *((0, 0),) * (array.ndim - 2)))

    query_BTNH, key_BSKH, value_BSKH = even(query_BTNH, odd_T), even(key_BSKH, odd_S), even(value_BSKH, odd_S)
    mask_BS = even(mask_BS, odd_S)
    T, S = query_BTNH.shape[1], key_BSKH.shape[1]
    visible_BTS = visible(T, S, window) & same_segment(mask_BS, T)
    # Padding before a prompt has no visible key. Every token may attend to itself, so that no softmax is empty.
    visible_BTS |= jnp.eye(T, S, S - T, dtype=bool)
    mixed_BTNH = jax.nn.dot_product_attention(
        query_BTNH, key_BSKH, value_BSKH, mask=visible_BTS[:, None], scale=scale, implementation="cudnn"
    )
    return mixed_BTNH[:, odd_T:]


def by_cudnn(primitive, *_, **__) -> bool:
    """A checkpoint policy that saves the residuals of cuDNN's forward pass, which have no checkpoint name."""
    return primitive.name == "dot_product_attention_fwd_wrapper"


def visible(T: int, S: int, window: int | None) -> jax.Array:
    """Which of S tokens each of the last T may attend to, [T, S]: none after it and none outside the window."""
    seen_TS = jnp.tri(T, S, S - T, dtype=bool)
    return seen_TS if window is None else seen_TS & ~jnp.tri(T, S, S - T - window, dtype=bool)


def same_segment(mask_BS: jax.Array, T: int) -> jax.Array:
    """Which of S tokens are in the segment of each of the last T, [B, T, S]; padding is in none."""
    return (mask_BS[:, mask_BS.shape[1] - T :, None] == mask_BS[:, None, :]) & (mask_BS[:, None, :] != 0)


def for_attention(key_BTKH: jax.Array, value_BTKH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys `[B, K, H, T]` and values `[B, K, T, H]`, the layout of the cache."""
    return key_BTKH.transpose(0, 2, 3, 1), value_BTKH.swapaxes(1, 2)


def _splash(query_BTNH, key_BSKH, value_BSKH, mask_BS, *, softcap, window, interpret):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, S = query_BTNH.shape[1], key_BSKH.shape[1]
    block_T, block_S = (min(LARGEST_BLOCK, -(-size // BLOCK) * BLOCK) for size in (T, S))
    # Padding goes after the last token, with a key for every padded query, so that no softmax is empty.
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
        masks.MultiHeadMask([mask] * query.shape[1]),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        interpret=interpret,
        residual_checkpoint_name=SAVED,
        block_sizes=splash.BlockSizes(
            block_q=block_T,
            block_kv=block_S,
            block_kv_compute=block_S,
            block_q_dkv=block_T,
            block_kv_dkv=block_S,
            block_kv_dkv_compute=block_S,
            block_q_dq=block_T,
            block_kv_dq=block_S,
        ),
    )
    # Padding is a segment of its own, so it attends at least to itself.
    segment_BS = jnp.pad(mask_BS, ((0, 0), (0, padded_S - S))).astype(jnp.int32)
    query_segment_BT = jnp.pad(mask_BS[:, S - T :], ((0, 0), (0, padded_T - T))).astype(jnp.int32)
    mixed = jax.vmap(kernel)(query, key, value, splash.SegmentIds(query_segment_BT, segment_BS))
    return mixed.swapaxes(1, 2)[:, :T]
