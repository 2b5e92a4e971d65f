"""Rotary position embeddings: pairs of elements of each query and key are rotated in proportion to the position."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rope(NamedTuple):
    """One kind of rotary embedding: the angle by which each pair is rotated, in radians per position."""

    frequencies: tuple[float, ...]  # R/2: the pairs (j, j + R/2) are rotated, elements from R to H are not
    long_frequencies: tuple[float, ...] | None = None  # for sequences longer than `switch`
    switch: int = 0  # tokens
    scale: float = 1.0  # factor of cosine and sine


def rope_tables(ropes: tuple[Rope, ...], positions_BT: jax.Array, length_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the angles of every kind of rope, `[kinds, B, T, R/2]`, float32.

    `length_BT` is the length of each token's sequence, or the length that it may reach in its cache: a sequence longer
    than a rope's switch uses the long frequencies from its first token on.
    """
    cos, sin = [], []
    for rope in ropes:
        frequency = jnp.array(rope.frequencies, jnp.float32)
        if rope.long_frequencies is not None:
            long = jnp.array(rope.long_frequencies, jnp.float32)
            frequency = jnp.where(length_BT[..., None] > rope.switch, long, frequency)
        angle = positions_BT[..., None].astype(jnp.float32) * frequency
        cos.append(jnp.cos(angle) * rope.scale)
        sin.append(jnp.sin(angle) * rope.scale)
    return jnp.stack(cos), jnp.stack(sin)


def of_kind(tables: tuple[jax.Array, jax.Array], kind) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine `[B, T, R/2]` of one kind, an index that may be traced."""
    cos, sin = tables
    return cos[kind], sin[kind]


def rotate(x_BTNH: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (j, j + R/2) of each head; elements from R on are unchanged."""
    cos, sin = (table[:, :, None, :].astype(x_BTNH.dtype) for table in rope)
    half = cos.shape[-1]
    first, second, rest = jnp.split(x_BTNH, (half, 2 * half), axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
