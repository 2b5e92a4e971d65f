"""Rotary positions: pairs of numbers in each query and key turn with the token's position."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rope(NamedTuple):
    """One kind of rotary positions: how far each pair of numbers turns from one position to the next, in radians."""

    frequencies: tuple[float, ...]  # R/2 of them: the pairs (j, j + R/2) turn, what lies beyond R of H does not
    long_frequencies: tuple[float, ...] | None = None  # of rows longer than `switch`
    switch: int = 0
    scale: float = 1.0  # of cosine and sine


def rope_tables(ropes: tuple[Rope, ...], positions_BT: jax.Array, length_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the angles of every kind of rope, `[kinds, B, T, R/2]`, float32.

    `length_BT` is how long each token's text is, or may become in its cache: texts beyond a rope's switch turn by its
    long frequencies from their first token on.
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
    """Cosine and sine `[B, T, R/2]` of one kind, whose number may be traced."""
    cos, sin = tables
    return cos[kind], sin[kind]


def rotate(x_BTNH: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns the pairs (j, j + R/2) of each head; what lies beyond R stays."""
    cos, sin = (table[:, :, None, :].astype(x_BTNH.dtype) for table in rope)
    half = cos.shape[-1]
    first, second, rest = jnp.split(x_BTNH, (half, 2 * half), axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
