"""Unpadding: moves the real tokens of `[B, T]` next to each other, so that tokenwise operations skip the padding.

A prefix that all rows share (such as a chat template's system turn) is computed once: in a causal model its activations
are the same in every row.

Letters: B batch, T time, R shards of the batch, U slots for real tokens on a shard, S = B / R * T positions of a shard,
M positions of the shared prefix in all rows of a shard but the first, X any further dimensions. Each shard unpads its
own rows, so no token moves to another device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from raft_jax.sharding import UNCONSTRAINED, constrain, num_shards


class Unpadding:
    """The positions of the real tokens of `[B, T]` in `[R, U]`, with `unpad` and `pad` to move them there and back.

    Example:
      >>> unpadding = Unpadding(jnp.array([[False, True], [True, True]]), 4)
      >>> unpadding.unpad(jnp.array([[9, 5], [6, 7]])).tolist()
      [[5, 6, 7, 0]]
      >>> unpadding.pad(jnp.array([[5, 6, 7, 3]])).tolist()
      [[0, 5], [6, 7]]

    Two rows that both begin with 6:

      >>> unpadding = Unpadding(jnp.array([[False, True, True], [True, True, True]]), 4, shared=1)
      >>> unpadding.unpad(jnp.array([[9, 6, 5], [6, 7, 8]])).tolist()
      [[6, 5, 7, 8]]
      >>> unpadding.pad(jnp.array([[1, 2, 3, 4]])).tolist()
      [[0, 1, 2], [1, 3, 4]]
    """

    def __init__(self, mask_BT: jax.Array, num_tokens: int, shared: int = 0):
        """
        Args:
          mask_BT: bool, True on real tokens; or int32, 0 only at padding.
          num_tokens: U, at least the number of real tokens of any shard. If it is too small, `unpad` and `pad` return
            NaN for floats, so that no token is dropped unnoticed.
          shared: number of equal tokens that all rows of a shard begin with; they use slots only once.
        """
        B, T = mask_BT.shape
        num_parts = num_shards("batch")
        if B % num_parts:
            raise ValueError(f"{B} rows do not divide over {num_parts} parts of the mesh")
        self._rows = (B, T)
        S = B // num_parts * T
        mask_BT = mask_BT != 0
        index_BT = jnp.cumsum(mask_BT, axis=1, dtype=jnp.int32) - 1
        first_B1 = (jnp.arange(B) % (B // num_parts) == 0)[:, None]
        again_RS = (mask_BT & (index_BT < shared) & ~first_B1).reshape(num_parts, S)
        own_RS = mask_BT.reshape(num_parts, S) & ~again_RS
        count_RS = jnp.cumsum(own_RS, axis=1, dtype=jnp.int32)
        # The shared prefix is the first row's first tokens, so the slot of each equals its index in the row.
        self._own_RS = jnp.where(own_RS, count_RS - 1, num_tokens)
        self._place_RS = jnp.where(again_RS, index_BT.reshape(num_parts, S), self._own_RS)
        self._source_RU = indices_of(own_RS, num_tokens)
        self._again_RM = indices_of(again_RS, (B // num_parts - 1) * shared)
        self._shared = shared
        self._fits = jnp.all(count_RS[:, -1] <= num_tokens) & jnp.all(jnp.sum(mask_BT, axis=1) >= shared)

    def unpad(self, x_BTX: jax.Array) -> jax.Array:
        """`[B, T, ...]` → `[R, U, ...]`; slots without a token hold zeros."""
        x_RSX = x_BTX.reshape(self._own_RS.shape[0], -1, *x_BTX.shape[2:])
        return self._whole(move(x_RSX, self._source_RU, self._own_RS))

    def pad(self, x_RUX: jax.Array) -> jax.Array:
        """`[R, U, ...]` → `[B, T, ...]`; zeros at padding."""
        x_RSX = _spread(self._shared, x_RUX, self._place_RS, self._source_RU, self._again_RM)
        return self._whole(x_RSX.reshape(*self._rows, *x_RUX.shape[2:]))

    def _whole(self, x: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jnp.floating):
            x = jnp.where(self._fits, x, jnp.nan)
        # The other dimensions are unconstrained: heads, for example, may be sharded too.
        return constrain(x, "batch", *(UNCONSTRAINED,) * (x.ndim - 1))


def make_unpadding(mask_BT: jax.Array, num_tokens: int | None, shared: int = 0) -> tuple[Callable, Callable]:
    """`Unpadding`'s unpad and pad; both are the identity if num_tokens is None or so large that no padding would be
    skipped."""
    if num_tokens is None or num_tokens >= mask_BT.size // num_shards("batch"):
        return lambda x: x, lambda x: x
    unpadding = Unpadding(mask_BT, num_tokens, shared)
    return unpadding.unpad, unpadding.pad


@jax.custom_vjp
def move(x_RSX, source_RU, back_RS):
    """`[R, S, ...]` → `[R, U, ...]`: x at the source indices, zeros where an index is out of range.

    `back_RS` are the indices of the inverse, with which the gradient is a gather too: XLA's scatter goes row by row on
    CPU and sorts on TPU.
    """
    return _gather(x_RSX, source_RU)


move.defvjp(
    lambda x, source, back: (move(x, source, back), (source, back)),
    lambda saved, grad: (move(grad, saved[1], saved[0]), None, None),
)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _spread(shared: int, x_RUX, place_RS, source_RU, again_RM):
    """x at the slots place_RS. All rows of a shard read the first `shared` slots, so the gradient there is a sum over
    rows: that of the first row, and the M positions in again_RM of the others."""
    return _gather(x_RUX, place_RS)


def _spread_backward(shared, saved, grad_RSX):
    source_RU, again_RM = saved
    grad_RUX = _gather(grad_RSX, source_RU)
    if again_RM.size:
        again_RMX = _gather(grad_RSX, again_RM).reshape(len(again_RM), -1, shared, *grad_RSX.shape[2:])
        grad_RUX = grad_RUX.at[:, :shared].add(jnp.sum(again_RMX, axis=1))
    return grad_RUX, None, None, None


_spread.defvjp(
    lambda shared, x, place, source, again: (_spread(shared, x, place, source, again), (source, again)),
    _spread_backward,
)


def _gather(x_RSX: jax.Array, source_RU: jax.Array) -> jax.Array:
    """x at each shard's source indices, zeros where an index is out of range."""
    return jax.vmap(lambda x_SX, source_U: x_SX.at[source_U].get(mode="fill", fill_value=0))(x_RSX, source_RU)


def indices_of(mask_RS: jax.Array, size: int) -> jax.Array:
    """The first `size` indices at which each shard's mask is True; padded with an index that is out of range."""
    find = partial(jnp.nonzero, size=size, fill_value=mask_RS.shape[1])
    return jax.vmap(lambda mask_S: find(mask_S)[0])(mask_RS).astype(jnp.int32)
