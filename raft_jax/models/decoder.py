"""One decoder for every family: initialisation, forward pass, and decoding with a cache.

Letters: B batch, T time, S cache length, D model width, N query heads, K key/value heads, G = N/K,
H head width, F feed-forward, V vocabulary, L layers. A parameter's name ends in its dimensions.

Families differ only in numbers, and so do layers: each layer's window and rope index are scanned along with its
weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from raft_jax.models.attention import SAVED, attend, by_cudnn, decode_attention, for_attention
from raft_jax.models.config import DecoderConfig, ParameterInfo, parameter_table
from raft_jax.models.layer import BATCH, DECODE, SAME_INPUT, as_matrix, attention_output_and_mlp, project, rms_norm
from raft_jax.models.rope import of_kind, rope_tables
from raft_jax.models.vocabulary import lookup
from raft_jax.models.xla_cpu import Tiled, fused_layers
from raft_jax.sharding import constrain
from raft_jax.tokens import Tokens
from raft_jax.unpadding import make_unpadding

# Saved for the backward pass without remat: matrix products, values named SAVED, and cuDNN's residuals.
POLICY = reduce(
    jax.checkpoint_policies.save_from_both_policies,
    (
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(SAVED),
        by_cudnn,
    ),
)

HEADS = ("heads", "kv_heads", "kv_heads")  # logical axis of the heads of query, key and value
CACHE = (None, "batch", "kv_heads", None, None)


def init_parameters(config: DecoderConfig, key: jax.Array, dtype=jnp.float32) -> dict[str, jax.Array]:
    """Random weights: normal with standard deviation fan_in^-1/2; norms multiply by one, biases are zero."""

    def init(name: str, info: ParameterInfo, key: jax.Array) -> jax.Array:
        if info.fan_in is None or info.fan_in == 0:
            return jnp.full(info.shape, 1 - config.norm_offset if info.fan_in is None else 0, dtype)
        return jax.random.normal(key, info.shape, dtype) / math.sqrt(info.fan_in)

    table = parameter_table(config)
    keys = jax.random.split(key, len(table))
    return {name: init(name, info, key) for (name, info), key in zip(table.items(), keys, strict=True)}


class Cache(NamedTuple):
    """Keys and values of the tokens so far. All rows write to the same slot, so prompts are left-padded."""

    # Keys have positions last, so that the scores of one new token are a sum over rows of the array, not columns.
    key_LBKHS: jax.Array | tuple[jax.Array, ...]
    value_LBKSH: jax.Array | tuple[jax.Array, ...]
    mask_BS: jax.Array  # bool: True at slots that hold a real token
    length: jax.Array  # int32 scalar: number of slots written

    def unstacked(self) -> Cache:
        """Keys and values as one array per layer, for layers that are run one by one."""
        return self._replace(key_LBKHS=tuple(self.key_LBKHS), value_LBKSH=tuple(self.value_LBKSH))


def positions_from_mask(mask_BT: jax.Array, branches: tuple[int, int] | None = None) -> jax.Array:
    """Position of each real token within its segment, counted from 0.

    Padding gets 0 before the first segment and, after a segment, that segment's last position.
    With branches (P, A) the second branch's positions follow the prompt's, as if the first branch were absent.

    Example:
      >>> positions_from_mask(jnp.array([[0, 1, 1, 2, 2, 2]])).tolist()  # two segments in one row
      [[0, 0, 1, 0, 1, 2]]
    """
    segment_BT = jax.lax.cummax(mask_BT.astype(jnp.int32), axis=1)  # padding: the preceding segment
    count_BT = jnp.cumsum(mask_BT != 0, axis=-1, dtype=jnp.int32)
    begins_BT = jnp.diff(segment_BT, axis=-1, prepend=0) > 0
    count_BT = count_BT - jax.lax.cummax(jnp.where(begins_BT, count_BT - 1, 0), axis=1)
    if branches is not None:
        end = sum(branches)
        passed_B1 = count_BT[:, end - 1 : end] - count_BT[:, branches[0] - 1 : branches[0]]
        count_BT = jnp.concatenate([count_BT[:, :end], count_BT[:, end:] - passed_B1], axis=-1)
    return jnp.maximum(count_BT - 1, 0)


def segment_lengths(mask_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """Number of tokens in each token's segment, `[B, T]`; with two branches, of the prompt and the longer branch."""
    same_BTS = mask_BT[:, :, None] == mask_BT[:, None, :]
    return jnp.max(jnp.where(same_BTS, positions_BT[:, None, :] + 1, 0), axis=-1)


class Decoder(nnx.Module):
    """The decoder's parameters, stacked over layers, and its passes: over whole sequences, and of one token."""

    def __init__(self, config: DecoderConfig, parameters: Mapping[str, jax.Array]):
        self.config = config
        self._stacked = tuple(name for name in parameters if name.rpartition("_")[2].startswith("L"))
        for name, value in parameters.items():
            setattr(self, name, nnx.Param(value))

    def hidden(self, tokens: Tokens, positions_BT=None, branches: tuple[int, int] | None = None) -> jax.Array:
        """Final hidden states, after the last norm, of whole sequences.

        Args:
          tokens: padding may be on either side. With an int32 mask (segment ids, increasing along a row), tokens attend
            only within their segment. With `max_tokens`, padding is skipped everywhere except in the attention; with
            more real tokens than that the result is NaN. With `shared_prefix`, the tokens that all rows on a device
            begin with are computed once outside the attention; if rows differ there, the result is NaN. Not for ropes
            with long frequencies, which rotate equal tokens of a short and a long sequence differently.
          positions_BT: int32; default: the position of each real token in its segment.
          branches: (P, A): rows are a prompt of P tokens and two branches. The second branch does not attend to the A
            tokens of the first, and its positions follow the prompt's. With A = 0 the result is that of one sequence,
            rounded as with a first branch.

        Returns:
          hidden_BTD in the parameters' dtype; values at padding have no meaning.
        """
        return self._forward(tokens, positions_BT, branches)[0]

    def prefill(self, prompt: Tokens, length: int) -> tuple[jax.Array, Cache]:
        """Hidden states of whole prompts, padded on the left, and a cache of `length` slots that begins with them."""
        num_new = length - prompt.length
        hidden_BTD, (keys, values) = self._forward(prompt, keep_cache=True, num_new=num_new)
        keys = constrain(jnp.pad(keys, ((0, 0),) * 4 + ((0, num_new),)), *CACHE)
        values = constrain(jnp.pad(values, ((0, 0),) * 3 + ((0, num_new), (0, 0))), *CACHE)
        return hidden_BTD, Cache(keys, values, jnp.pad(prompt.real, ((0, 0), (0, num_new))), jnp.int32(prompt.length))

    def step(self, token_B1, mask_B1, cache: Cache, layers=None) -> tuple[jax.Array, Cache]:
        """Hidden states `[B, 1, D]` of the next token, and the cache with that token added.

        With `layers` from `unstacked`, the layers run one by one instead of in a scan, over an unstacked cache.
        """
        config, positions_BS = self.config, positions_from_mask(cache.mask_BS)
        position_B1 = jnp.sum(cache.mask_BS, axis=-1, keepdims=True, dtype=jnp.int32)
        ropes = rope_tables(config.ropes, position_B1, position_B1 + cache.mask_BS.shape[1] - cache.length)
        place = cache.length

        def written(new, past, axis):
            return jax.lax.dynamic_update_slice_in_dim(past, new.astype(past.dtype), place, axis)

        def write(key, value, past_key, past_value):
            return written(key, past_key, -1), written(value, past_value, -2)

        def layer(x_BTD, scanned, first=lambda *new_and_past: new_and_past):
            (weights, numbers), *past = scanned
            query, key, value = (
                constrain(part, "batch", None, heads, None)  # each row's attention is where its cache is
                for part, heads in zip(
                    project(config, x_BTD, weights, of_kind(ropes, numbers.get("rope", 0))), HEADS, strict=True
                )
            )
            key, value = for_attention(key, value)
            visible_BS = cache.mask_BS  # excludes the new token, even if it is already written
            if "window" in numbers:
                visible_BS &= position_B1 - positions_BS < numbers["window"]
            *new, past_key_BKHS, past_value_BKSH = first(key, value, *past)
            mixed = decode_attention(config, query, key, value, past_key_BKHS, past_value_BKSH, visible_BS)
            mixed = constrain(mixed, DECODE[0], None, "heads", None)
            return attention_output_and_mlp(config, x_BTD, mixed, weights, DECODE), new

        x_BTD, keys, values = self._embed(token_B1, DECODE), cache.key_LBKHS, cache.value_LBKSH
        if layers is None:
            # The scan over layers only reads the cache, which is written once after it; a write inside would copy it.
            x_BTD, new = jax.lax.scan(layer, x_BTD, (self._layers(), keys, values))
            keys, values = write(*new, keys, values)
        else:
            # Layers that run one by one write in place before they read: after a read XLA on CPU would copy the cache.
            def write_first(key, value, *past):
                return 2 * write(key, value, *past)

            kept = []
            for i, weights in enumerate(layers):
                numbers = {name: of_L[i] for name, of_L in self._numbers().items()}
                x_BTD, written_layer = layer(x_BTD, ((weights, numbers), keys[i], values[i]), write_first)
                kept.append(written_layer)
            keys, values = zip(*kept, strict=True)
        cache = Cache(keys, values, written(mask_B1, cache.mask_BS, -1), place + 1)
        return rms_norm(config, x_BTD, self.final_norm_D[...]), cache

    def unstacked(self, num_rows: int) -> list[dict[str, jax.Array | Tiled]]:
        """The weights layer by layer, for decoding steps of `num_rows` rows on CPU; see `fused_layers`."""
        stacked, _ = self._layers()
        return fused_layers(stacked, SAME_INPUT, as_matrix, num_rows)

    def unembedding(self) -> jax.Array:
        """The matrix `[D, V]` from hidden states to logits; in tied models the transposed embedding."""
        return self.embedding_VD[...].T if self.config.tied_embeddings else self.unembedding_DV[...]

    def _forward(self, tokens: Tokens, positions_BT=None, branches=None, *, keep_cache=False, num_new=0):
        """Hidden states, and with `keep_cache` all layers' keys `[L,B,K,H,T]` and values `[L,B,K,T,H]`."""
        config, tokens_BT, mask_BT = self.config, tokens.ids, tokens.real
        positions_BT = positions_from_mask(mask_BT, branches) if positions_BT is None else positions_BT
        unpad, pad = make_unpadding(mask_BT, tokens.max_tokens, tokens.shared_prefix)
        length_BT = segment_lengths(mask_BT, positions_BT) + num_new
        ropes = rope_tables(config.ropes, unpad(positions_BT), unpad(length_BT))

        def layer(x, scanned):
            weights, numbers = scanned
            query, key, value = map(pad, project(config, x, weights, of_kind(ropes, numbers.get("rope", 0))))
            key, value = for_attention(key, value)
            mixed = attend(config, query, key, value, positions_BT, mask_BT, branches, numbers.get("window"))
            return attention_output_and_mlp(config, x, unpad(mixed), weights), (key, value) if keep_cache else None

        # Without remat most matrix products are saved for the backward pass, and cheap operations are recomputed.
        policy = None if config.remat else POLICY
        layer = jax.checkpoint(layer, policy=policy)
        x = self._embed(unpad(tokens_BT), BATCH)
        if tokens.shared_prefix:
            same = jnp.all((pad(unpad(tokens_BT)) == tokens_BT) | (mask_BT == 0))
            x = jnp.where(same, x, jnp.nan)
        x, kept = jax.lax.scan(layer, x, self._layers())
        return pad(rms_norm(config, x, self.final_norm_D[...])), kept

    def _embed(self, tokens_BT, axes) -> jax.Array:
        x_BTD = lookup(self.embedding_VD[...], tokens_BT)
        x_BTD = x_BTD * jnp.asarray(self.config.embedding_scale, x_BTD.dtype)
        return constrain(x_BTD, *axes)

    def _layers(self) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Inputs of the scan over layers: each layer's weights, and the numbers in which layers differ."""
        return (
            {name: getattr(self, name)[...] for name in self._stacked},
            {name: jnp.array(of_L, jnp.int32) for name, of_L in self._numbers().items()},
        )

    def _numbers(self) -> dict[str, tuple[int, ...]]:
        numbers = {"rope": self.config.layer_ropes, "window": self.config.windows}
        return {name: of_L for name, of_L in numbers.items() if of_L is not None}
