"""Unpadding: the real tokens of `[B, T]` behind one another, so that what works token by token skips the padding.

Letters: B batch, T time, G groups of rows, N places of a group. A group is the rows that one part of the mesh holds:
no token leaves its device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from raft_jax.sharding import constrain, num_batch_parts


class Packing:
    """Where the real tokens of `[B, T]` lie in `[G, N]`, and the way there and back.

    Example:
      >>> packing = Packing(jnp.array([[False, True], [True, True]]), 4)
      >>> packing.pack(jnp.array([[9, 5], [6, 7]])).tolist()
      [[5, 6, 7, 0]]
      >>> packing.unpack(jnp.array([[5, 6, 7, 3]])).tolist()
      [[0, 5], [6, 7]]
    """

    def __init__(self, mask_BT: jax.Array, num_tokens: int):
        """
        Args:
          mask_BT: bool, True on real tokens.
          num_tokens: N, at least the most real tokens of any group. Where it is too small floats come back as NaN:
            no text is cut in silence.
        """
        B, T = mask_BT.shape
        groups = num_batch_parts()
        if B % groups:
            raise ValueError(f"{B} rows do not divide over {groups} parts of the mesh")
        self._rows = (B, T)
        mask_GM = mask_BT.reshape(groups, -1)
        M = mask_GM.shape[1]
        self.num_tokens = num_tokens
        count_GM = jnp.cumsum(mask_GM, axis=1, dtype=jnp.int32)
        self._place_GM = jnp.where(mask_GM, count_GM - 1, self.num_tokens)
        find = partial(jnp.nonzero, size=self.num_tokens, fill_value=M)
        self._source_GN = jax.vmap(lambda mask_M: find(mask_M)[0])(mask_GM).astype(jnp.int32)
        self._fits = jnp.all(count_GM[:, -1] <= self.num_tokens)

    def pack(self, x_BTX: jax.Array) -> jax.Array:
        """`[B, T, ...]` → `[G, N, ...]`; places without a token hold zeros."""
        groups = self._place_GM.shape[0]
        x_GMX = x_BTX.reshape(groups, -1, *x_BTX.shape[2:])
        return self._pinned(_move(x_GMX, self._source_GN, self._place_GM))

    def unpack(self, x_GNX: jax.Array) -> jax.Array:
        """`[G, N, ...]` → `[B, T, ...]`; zeros at padding."""
        x_BTX = _move(x_GNX, self._place_GM, self._source_GN).reshape(*self._rows, *x_GNX.shape[2:])
        if jnp.issubdtype(x_GNX.dtype, jnp.floating):
            x_BTX = jnp.where(self._fits, x_BTX, jnp.nan)
        return self._pinned(x_BTX)

    @staticmethod
    def _pinned(x: jax.Array) -> jax.Array:
        return constrain(x, "batch", *(None,) * (x.ndim - 1))


def make_packing(mask_BT: jax.Array, num_tokens: int | None) -> tuple[Callable, Callable]:
    """`Packing`'s pack and unpack; both leave alone what they are given where there is no padding to leave out, or
    where num_tokens is None."""
    if num_tokens is None or num_tokens >= mask_BT.size // num_batch_parts():
        return lambda x: x, lambda x: x
    packing = Packing(mask_BT, num_tokens)
    return packing.pack, packing.unpack


@jax.custom_vjp
def _move(x_GSX, source_GN, back_GS):
    """x at the sources, zeros where one lies beyond the end. `back` are the sources of the way back, and so of the
    gradient, which is then a gather too: XLA's scatter goes row by row on CPU and sorts on a TPU."""
    return jax.vmap(lambda x_SX, source_N: x_SX.at[source_N].get(mode="fill", fill_value=0))(x_GSX, source_GN)


_move.defvjp(
    lambda x, source, back: (_move(x, source, back), (source, back)),
    lambda saved, slope: (_move(slope, saved[1], saved[0]), None, None),
)
