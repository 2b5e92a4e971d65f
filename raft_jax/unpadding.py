"""Unpadding: the real tokens of `[B, T]` behind one another, so that what works token by token skips the padding.

Tokens with which every text begins (a chat template's system turn) are worked through once: what a causal model makes
of them is the same in every row.

Letters: B batch, T time, R parts of the mesh that hold rows of the batch, U places of such a part. A part packs its own
rows: no token leaves its device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from raft_jax.sharding import UNCONSTRAINED, constrain, num_shards


class Unpadding:
    """Where the real tokens of `[B, T]` lie in `[R, U]`, and the way there and back.

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
          mask_BT: bool, True on real tokens; or int32, 0 at padding alone.
          num_tokens: U, at least the most real tokens of any part. Where it is too small floats become NaN, there and
            back: no text is cut in silence.
          shared: with how many equal tokens the rows of a part begin; they take places once.
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
        # What the rows share comes first among the first row's tokens, and so lies at its own index.
        self._own_RS = jnp.where(own_RS, count_RS - 1, num_tokens)
        self._place_RS = jnp.where(again_RS, index_BT.reshape(num_parts, S), self._own_RS)
        self._source_RU = _indices(own_RS, num_tokens)
        self._again_RM = _indices(again_RS, (B // num_parts - 1) * shared)
        self._shared = shared
        self._fits = jnp.all(count_RS[:, -1] <= num_tokens) & jnp.all(jnp.sum(mask_BT, axis=1) >= shared)

    def unpad(self, x_BTX: jax.Array) -> jax.Array:
        """`[B, T, ...]` → `[R, U, ...]`; places without a token hold zeros."""
        x_RSX = x_BTX.reshape(self._own_RS.shape[0], -1, *x_BTX.shape[2:])
        return self._whole(_move(x_RSX, self._source_RU, self._own_RS))

    def pad(self, x_RUX: jax.Array) -> jax.Array:
        """`[R, U, ...]` → `[B, T, ...]`; zeros at padding."""
        x_RSX = _spread(self._shared, x_RUX, self._place_RS, self._source_RU, self._again_RM)
        return self._whole(x_RSX.reshape(*self._rows, *x_RUX.shape[2:]))

    def _whole(self, x: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jnp.floating):
            x = jnp.where(self._fits, x, jnp.nan)
        # The other dimensions stay as they are: heads may be cut, too.
        return constrain(x, "batch", *(UNCONSTRAINED,) * (x.ndim - 1))


def make_unpadding(mask_BT: jax.Array, num_tokens: int | None, shared: int = 0) -> tuple[Callable, Callable]:
    """`Unpadding`'s unpad and pad; both leave alone what they are given where there is no padding to leave out, or
    where num_tokens is None."""
    if num_tokens is None or num_tokens >= mask_BT.size // num_shards("batch"):
        return lambda x: x, lambda x: x
    unpadding = Unpadding(mask_BT, num_tokens, shared)
    return unpadding.unpad, unpadding.pad


@jax.custom_vjp
def _move(x_RSX, source_RU, back_RS):
    """x at the sources, zeros where one lies beyond the end. `back` are the sources of the way back, and so of the
    gradient, which is then a gather too: XLA's scatter goes row by row on CPU and sorts on a TPU."""
    return _gather(x_RSX, source_RU)


_move.defvjp(
    lambda x, source, back: (_move(x, source, back), (source, back)),
    lambda saved, grad: (_move(grad, saved[1], saved[0]), None, None),
)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _spread(shared: int, x_RUX, place_RS, source_RU, again_RM):
    """x at the places, the first `shared` of which every row takes: their gradient is a sum over the rows, M places
    beside those of the first row."""
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
    """x at each part's own sources, zeros where one lies beyond the end."""
    return jax.vmap(lambda x_SX, source_U: x_SX.at[source_U].get(mode="fill", fill_value=0))(x_RSX, source_RU)


def _indices(mask_RS: jax.Array, size: int) -> jax.Array:
    """Where each part's mask is True, `size` of them, in order; one beyond the end where there are fewer."""
    find = partial(jnp.nonzero, size=size, fill_value=mask_RS.shape[1])
    return jax.vmap(lambda mask_S: find(mask_S)[0])(mask_RS).astype(jnp.int32)
