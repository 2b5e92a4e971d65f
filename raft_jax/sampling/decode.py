"""Prefill, decoding step and sampling: pure functions, one jitted program per shape."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from raft_jax.models import Model
from raft_jax.models.attention import MASKED
from raft_jax.models.vocabulary import from_table, to_table
from raft_jax.models.xla_cpu import product, tiled
from raft_jax.sharding import num_shards
from raft_jax.tokens import Tokens


def sample_token(logits_BV: jax.Array, uniform_B: jax.Array, temperature: jax.Array, top_p: float = 1.0) -> jax.Array:
    """Samples one token per row by inverting the cumulative distribution function.

    This needs one uniform number per row, where the Gumbel trick needs one per vocabulary entry. The inversion has two
    levels, over blocks and then within a block, so that no sum has more than about √V terms.

    Args:
      logits_BV: float.
      uniform_B: float32 in [0, 1).
      temperature: float32 scalar; 0 takes the most likely token.
      top_p: samples from the smallest set of tokens with at least this probability; a static number.

    Returns:
      tokens_B: int32.

    Example:
      >>> import jax.numpy as jnp
      >>> logits_BV = jnp.log(jnp.array([[0.5, 0.3, 0.2]] * 3))
      >>> sample_token(logits_BV, jnp.array([0.49, 0.51, 0.81]), jnp.float32(1.0)).tolist()
      [0, 1, 2]
    """
    logits_BV = logits_BV.astype(jnp.float32)
    scaled_BV = logits_BV / jnp.maximum(temperature, 1e-6)
    if top_p < 1.0:
        scaled_BV = _keep_nucleus(scaled_BV, top_p)
    weight_BV = jnp.exp(scaled_BV - jnp.max(scaled_BV, axis=-1, keepdims=True))
    B, V = weight_BV.shape
    size = 1 << max(1, (V.bit_length() + 1) // 2)
    padded = jnp.pad(weight_BV, ((0, 0), (0, -V % size))).reshape(B, -1, size)
    block_sum = jnp.sum(padded, axis=-1)
    target_B = uniform_B * jnp.sum(block_sum, axis=-1)
    block_B, rest_B = _invert(block_sum, target_B)
    inside, _ = _invert(jnp.take_along_axis(padded, block_B[:, None, None], axis=1)[:, 0], rest_B)
    return jnp.where(temperature > 0, block_B * size + inside, jnp.argmax(logits_BV, axis=-1)).astype(jnp.int32)


def _invert(weight_BM: jax.Array, target_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First index with positive weight whose running sum exceeds the target, and the target minus the sum before it."""
    running_BM = jnp.cumsum(weight_BM, axis=-1)
    passed_BM = (running_BM > target_B[:, None]) & (weight_BM > 0)
    # Rounding may leave the target above the last sum: take the last entry with positive weight.
    last_B = weight_BM.shape[-1] - 1 - jnp.argmax(weight_BM[:, ::-1] > 0, axis=-1)
    index_B = jnp.where(jnp.any(passed_BM, axis=-1), jnp.argmax(passed_BM, axis=-1), last_B)
    before_B = jnp.take_along_axis(running_BM - weight_BM, index_B[:, None], axis=-1)[:, 0]
    return index_B, target_B - before_B


def _keep_nucleus(logits_BV: jax.Array, top_p: float) -> jax.Array:
    """Masks tokens outside the smallest set with at least `top_p` of the probability; ties at its edge stay in it."""
    probs_BV = jax.nn.softmax(logits_BV, axis=-1)
    sorted_BV = jnp.sort(probs_BV, axis=-1, descending=True)
    before_BV = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV
    smallest_B1 = jnp.min(jnp.where(before_BV < top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(probs_BV >= smallest_B1, logits_BV, MASKED)


def make_generate(model: Model, max_new_tokens: int, *, top_p: float = 1.0, unroll: bool = False):
    """Builds the jitted sampler for one output length.

    Args:
      max_new_tokens: the length of the output.
      top_p: see `sample_token`.
      unroll: decode layer by layer, not in a scan over layers, with weights laid out for few rows on CPU: faster there
        at small batches, slower to compile, and the weights are copied once.

    Returns:
      `generate(params, prompt, row_ids, key, temperature) -> Tokens`. Prompts are Tokens padded on the left; the new
      tokens are padded on the right, and the end-of-turn token counts as real. `row_ids` ([B], int32) select each row's
      stream of random numbers, so that a row's sample does not depend on the other rows of its batch; a negative id
      marks a filler row, which is finished from the start. Decoding ends when every row is finished.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens} must be at least 1")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} must be above 0 and up to 1")
    stop_ids = np.array(model.tokenizer.stop_ids, np.int32)
    pad_id = model.tokenizer.pad_id

    @jax.jit
    def generate(params, prompt: Tokens, row_ids, key, temperature) -> Tokens:
        B, P = prompt.ids.shape
        layers, unembedding = None, model.unembedding(params)
        if unroll:
            num_rows = B // num_shards("batch")
            layers, unembedding = model.unstacked(params, num_rows), tiled(unembedding, num_rows)
        keys_B = jax.vmap(partial(jax.random.fold_in, key))(jnp.maximum(row_ids, 0))

        def sample(hidden_BD, index):
            logits_BV = model.capped(from_table(product(to_table(hidden_BD), unembedding, jnp.float32)))
            uniform_B = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, index)))(keys_B)
            return sample_token(logits_BV, uniform_B, temperature, top_p)

        hidden_BPD, cache = model.prefill(params, prompt, P + max_new_tokens)
        if unroll:
            cache = cache.unstacked()
        first_B = sample(hidden_BPD[:, -1], 0)
        out_BC = jnp.full((B, max_new_tokens), pad_id, jnp.int32)
        mask_BC = jnp.zeros((B, max_new_tokens), bool)

        def unfinished(carry):
            index, _, done_B, *_ = carry
            return (index < max_new_tokens) & ~jnp.all(done_B)

        def step(carry):
            index, token_B, done_B, out_BC, mask_BC, cache = carry
            token_B = jnp.where(done_B, pad_id, token_B)
            out_BC = jax.lax.dynamic_update_slice(out_BC, token_B[:, None], (0, index))
            mask_BC = jax.lax.dynamic_update_slice(mask_BC, ~done_B[:, None], (0, index))
            done_after_B = done_B | jnp.any(token_B[:, None] == stop_ids, axis=-1)
            hidden_B1D, cache = model.step(params, token_B[:, None], ~done_B[:, None], cache, layers)
            return index + 1, sample(hidden_B1D[:, 0], index + 1), done_after_B, out_BC, mask_BC, cache

        carry = (jnp.int32(0), first_B, row_ids < 0, out_BC, mask_BC, cache)
        _, _, _, out_BC, mask_BC, _ = jax.lax.while_loop(unfinished, step, carry)
        return Tokens(out_BC, mask_BC)

    return generate
