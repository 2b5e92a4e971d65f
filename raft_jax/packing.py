"""Unpadding: the real tokens of `[B, T]` behind one another, so that what works token by token skips the padding.

Letters: B batch, T time, R parts of the mesh that hold rows of the batch, U places of such a part. A part packs its own
rows: no token leaves its device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from raft_jax.sharding import UNCONSTRAINED, constrain, num_shards


class Packing:
    """Where the real tokens of `[B, T]` lie in `[R, U]`, and the way there and back.

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
          mask_BT: bool, True on real tokens; or int32, 0 at padding alone.
          num_tokens: U, at least the most real tokens of any part. Where it is too small floats become NaN, there and
            back: no text is cut in silence.
        """
        B, T = mask_BT.shape
        num_parts = num_shards("batch")
        if B % num_parts:
            raise ValueError(f"{B} rows do not divide over {num_parts} parts of the mesh")
        self._rows = (B, T)
        mask_RS = mask_BT.reshape(num_parts, -1) != 0
        S = mask_RS.shape[1]
        count_RS = jnp.cumsum(mask_RS, axis=1, dtype=jnp.int32)
        self._place_RS = jnp.where(mask_RS, count_RS - 1, num_tokens)
        find = partial(jnp.nonzero, size=num_tokens, fill_value=S)
        self._source_RU = jax.vmap(lambda mask_S: find(mask_S)[0])(mask_RS).astype(jnp.int32)
        self._fits = jnp.all(count_RS[:, -1] <= num_tokens)

    def pack(self, x_BTX: jax.Array) -> jax.Array:
        """`[B, T, ...]` → `[R, U, ...]`; places without a token hold zeros."""
        x_RSX = x_BTX.reshape(self._place_RS.shape[0], -1, *x_BTX.shape[2:])
        return self._whole(_move(x_RSX, self._source_RU, self._place_RS))

    def unpack(self, x_RUX: jax.Array) -> jax.Array:
        """`[R, U, ...]` → `[B, T, ...]`; zeros at padding."""
        x_RSX = _move(x_RUX, self._place_RS, self._source_RU)
        return self._whole(x_RSX.reshape(*self._rows, *x_RUX.shape[2:]))

    def _whole(self, x: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jnp.floating):
            x = jnp.where(self._fits, x, jnp.nan)
        # The other dimensions stay as they are: heads may be cut, too.
        return constrain(x, "batch", *(UNCONSTRAINED,) * (x.ndim - 1))


def make_packing(mask_BT: jax.Array, num_tokens: int | None) -> tuple[Callable, Callable]:
    """`Packing`'s pack and unpack; both leave alone what they are given where there is no padding to leave out, or
    where num_tokens is None."""
    if num_tokens is None or num_tokens >= mask_BT.size // num_shards("batch"):
        return lambda x: x, lambda x: x
    packing = Packing(mask_BT, num_tokens)
    return packing.pack, packing.unpack


@jax.custom_vjp
def _move(x_RSX, source_RU, back_RS):
    """x at the sources, zeros where one lies beyond the end. `back` are the sources of the way back, and so of the
    gradient, which is then a gather too: XLA's scatter goes row by row on CPU and sorts on a TPU."""
    return jax.vmap(lambda x_SX, source_U: x_SX.at[source_U].get(mode="fill", fill_value=0))(x_RSX, source_RU)


_move.defvjp(
    lambda x, source, back: (_move(x, source, back), (source, back)),
    lambda saved, slope: (_move(slope, saved[1], saved[0]), None, None),
)
