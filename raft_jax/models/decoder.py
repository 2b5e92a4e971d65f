"""One decoder for every family: initialisation, forward pass, and decoding with a cache.

Letters: B batch, T time, S cache length, D model width, N query heads, K key/value heads, G = N/K,
H head width, F feed-forward, V vocabulary, L layers. A parameter's name ends in its dimensions.

Families differ only in numbers, and so do layers: each layer's window and rope index are scanned along with its
weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from raft_jax.models.attention import SAVED, attend, attend_cache, by_cudnn, for_attention
from raft_jax.models.config import DecoderConfig, ParameterInfo, parameter_table
from raft_jax.models.layer import BATCH, DECODE, SAME_INPUT, as_matrix, attention_output_and_mlp, project, rms_norm
from raft_jax.models.rope import of_kind, rope_tables
from raft_jax.models.vocabulary import lookup
from raft_jax.models.xla_cpu import Tiled, fused_layers
from raft_jax.sharding import constrain, num_shards, partition_spec, platform
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
MOST_ROWS = 32  # of a device that are written one by one on TPU


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
    """Keys and values of the tokens so far. A token's slot is its position in its row, so rows may differ in length."""

    # Keys have positions last, so that a score is a sum over rows of the array, not columns.
    key_LBKHS: jax.Array | tuple[jax.Array, ...]
    value_LBKSH: jax.Array | tuple[jax.Array, ...]
    length_B: jax.Array  # int32: number of tokens in each row; slots from there on have no meaning
    limit_B: jax.Array  # int32: number of tokens that each row may come to have (ropes with long frequencies ask)

    def unstacked(self) -> Cache:
        """Keys and values as one array per layer, for layers that are run one by one."""
        return self._replace(key_LBKHS=tuple(self.key_LBKHS), value_LBKSH=tuple(self.value_LBKSH))

    def rows(self, places_R: jax.Array) -> Cache:
        """The cache of the rows at some places."""

        def take(array):
            return tuple(layer[places_R] for layer in array) if isinstance(array, tuple) else array[:, places_R]

        return Cache(take(self.key_LBKHS), take(self.value_LBKSH), self.length_B[places_R], self.limit_B[places_R])

    def with_rows(self, places_R: jax.Array, rows: Cache) -> Cache:
        """The cache with other rows, of fewer slots, at some places; a place that does not exist is skipped."""

        def put(before, after):  # of one layer
            return before.at[places_R, :, : after.shape[2], : after.shape[3]].set(after, mode="drop")

        def put_layers(before, after):
            return tuple(map(put, before, after)) if isinstance(before, tuple) else jax.vmap(put)(before, after)

        return Cache(
            put_layers(self.key_LBKHS, rows.key_LBKHS),
            put_layers(self.value_LBKSH, rows.value_LBKSH),
            self.length_B.at[places_R].set(rows.length_B, mode="drop"),
            self.limit_B.at[places_R].set(rows.limit_B, mode="drop"),
        )

    def longer(self, num_tokens_B: jax.Array) -> Cache:
        """The cache in which the next tokens of each row, which are written already, count."""
        return self._replace(length_B=self.length_B + num_tokens_B)


def write_slots(past: jax.Array, new: jax.Array, place_B: jax.Array, axis: int) -> jax.Array:
    """Keys or values `past`, of one layer or stacked over layers, with those of each row's next tokens written along
    `axis` from the row's own place on.

    Example:
      >>> past, new = jnp.zeros((2, 1, 1, 4)), jnp.ones((2, 1, 1, 1))
      >>> write_slots(past, new, jnp.array([0, 2]), -1)[:, 0, 0].astype(int).tolist()
      [[1, 0, 0, 0], [0, 0, 1, 0]]
    """
    write = partial(_scatter, axis=axis)
    if platform() == "tpu" and len(place_B) // num_shards("batch") <= MOST_ROWS:
        write, mesh = partial(_row_by_row, axis=axis), jax.sharding.get_abstract_mesh()
        if not mesh.empty and mesh.size > 1:
            cache, rows = partition_spec(CACHE[-past.ndim :]), partition_spec(("batch",))
            write = jax.shard_map(write, in_specs=(cache, cache, rows), out_specs=cache, check_vma=False)
    return write(past, new.astype(past.dtype), place_B)


def _scatter(past, new, place_B, axis):
    # Not a vmapped dynamic_update_slice: where rows are not the first dimension that transposes the cache, and XLA
    # before openxla/xla#44890 then makes an invalid program for several GPUs.
    rows = past.ndim - 4
    dimensions = jax.lax.ScatterDimensionNumbers(
        update_window_dims=tuple(d for d in range(past.ndim) if d != rows),
        inserted_window_dims=(),
        scatter_dims_to_operand_dims=(past.ndim + axis,),
        operand_batching_dims=(rows,),
        scatter_indices_batching_dims=(0,),
    )
    each_once = {"indices_are_sorted": True, "unique_indices": True, "mode": "clip"}
    return jax.lax.scatter(past, place_B[:, None], new, dimensions, **each_once)


def _row_by_row(past, new, place_B, axis):
    # XLA on TPU makes a loop over rows of a scatter, whose steps take five times as long.
    for row in range(len(place_B)):
        start = [jnp.int32(0)] * past.ndim
        start[past.ndim - 4], start[axis] = jnp.int32(row), place_B[row]
        of_row = jax.lax.slice_in_dim(new, row, row + 1, axis=past.ndim - 4)
        past = jax.lax.dynamic_update_slice(past, of_row, start)
    return past


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
    """The decoder's parameters, stacked over layers, and its passes: over whole sequences, and of the next tokens."""

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
        """Hidden states of whole prompts, padded on the right, and a cache of `length` slots that begins with them."""
        num_new = length - prompt.length
        hidden_BTD, (keys, values) = self._forward(prompt, keep_cache=True, num_new=num_new)
        keys = constrain(jnp.pad(keys, ((0, 0),) * 4 + ((0, num_new),)), *CACHE)
        values = constrain(jnp.pad(values, ((0, 0),) * 3 + ((0, num_new), (0, 0))), *CACHE)
        length_B = jnp.sum(prompt.real != 0, axis=1, dtype=jnp.int32)
        return hidden_BTD, Cache(keys, values, length_B, length_B + num_new)

    def empty_cache(self, num_rows: int, length: int) -> Cache:
        """A cache of `length` slots without a token; rows may come to fill it."""
        config, dtype = self.config, self.embedding_VD.dtype
        sizes = (config.num_layers, num_rows, config.num_kv_heads)
        keys = constrain(jnp.zeros((*sizes, config.head_width, length), dtype), *CACHE)
        values = constrain(jnp.zeros((*sizes, length, config.head_width), dtype), *CACHE)
        return Cache(keys, values, jnp.zeros(num_rows, jnp.int32), jnp.full(num_rows, length, jnp.int32))

    def extend(self, tokens_BT, cache: Cache, layers=None) -> tuple[jax.Array, Cache]:
        """Hidden states `[B, T, D]` of the next T tokens of each row, and the cache with these tokens written.

        Their slots must exist. `Cache.longer` then says how many of them are kept; the others are overwritten. With
        `layers` from `unstacked`, the layers run one by one instead of in a scan, over an unstacked cache.
        """
        config, place_B = self.config, cache.length_B
        T = tokens_BT.shape[1]
        positions_BT = place_B[:, None] + jnp.arange(T)
        ropes = rope_tables(config.ropes, positions_BT, jnp.broadcast_to(cache.limit_B[:, None], positions_BT.shape))

        def write(key, value, past_key, past_value):
            return write_slots(past_key, key, place_B, -1), write_slots(past_value, value, place_B, -2)

        def layer(x_BTD, scanned, first=lambda *new_and_past: new_and_past):
            (weights, numbers), *past = scanned
            query, key, value = (
                constrain(part, "batch", None, heads, None)  # each row's attention is where its cache is
                for part, heads in zip(
                    project(config, x_BTD, weights, of_kind(ropes, numbers.get("rope", 0))), HEADS, strict=True
                )
            )
            *new, past_key_BKHS, past_value_BKSH = first(*for_attention(key, value), *past)
            mixed = attend_cache(config, query, *new, past_key_BKHS, past_value_BKSH, place_B, numbers.get("window"))
            mixed = constrain(mixed, DECODE[0], None, "heads", None)
            return attention_output_and_mlp(config, x_BTD, mixed, weights, DECODE), new

        x_BTD, keys, values = self._embed(tokens_BT, DECODE), cache.key_LBKHS, cache.value_LBKSH
        if layers is None:
            # The scan over layers only reads the cache, which is written once after it; a write inside would copy it.
            x_BTD, new = jax.lax.scan(layer, x_BTD, (self._layers(), keys, values))
            keys, values = write(*new, keys, values)
        else:
            # Layers that run one by one write in place before they read: after a read XLA on CPU would copy the cache.
            kept = []

            def write_first(key, value, *past):
                kept.append(write(key, value, *past))
                return key, value, *kept[-1]

            for i, weights in enumerate(layers):
                numbers = {name: of_L[i] for name, of_L in self._numbers().items()}
                x_BTD, _ = layer(x_BTD, ((weights, numbers), keys[i], values[i]), write_first)
            keys, values = zip(*kept, strict=True)
        cache = cache._replace(key_LBKHS=keys, value_LBKSH=values)
        return rms_norm(config, x_BTD, self.final_norm_D[...]), cache

    def unstacked(self, num_rows: int) -> list[dict[str, jax.Array | Tiled]]:
        """The weights layer by layer, for `extend` by `num_rows` tokens; see `fused_layers`."""
        stacked, _ = self._layers()
        groups = SAME_INPUT if num_shards("heads") == 1 else ()  # a part of what is fused would be on other devices
        return fused_layers(stacked, groups, as_matrix, num_rows)

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
