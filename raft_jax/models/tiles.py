"""A matrix laid out for products with a few rows on CPU, which is what decoding waits for.

XLA's product of a few rows there reads a matrix at half of what the memory gives. Sums over tiles that stay in a
core's own caches read it at nearly all of it (docs/performance.md).

Letters: I inputs, O outputs; the inputs in P parts of Q, the outputs in blocks of C.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

ROWS = range(2, 17)  # one row is XLA's product of a matrix and a vector, which is as fast; of more, its tiles pay
C = 64
MIN_Q, MAX_Q = 16, 144
TASK = 32_768  # partial sums, one a part, row and output, that XLA's library makes on one thread at a time


class Tiled(NamedTuple):
    """A matrix `[I, O]` in tiles, float32; see `product`. Or many of them, stacked."""

    tiles_OPQC: jax.Array


def tiled(matrix_IO: jax.Array, num_rows: int) -> jax.Array | Tiled:
    """The matrix, or `[L, I, O]` of them, in the layout for so many rows on CPU: tiles, or as it is where they do not
    pay.

    Example:
      >>> import jax.numpy as jnp
      >>> tiled(jnp.ones((576, 128)), 4).tiles_OPQC.shape
      (2, 4, 144, 64)
      >>> tiled(jnp.ones((576, 100)), 4).shape
      (576, 100)
    """
    return tiled_alike([matrix_IO], num_rows)[0]


def tiled_alike(matrices_IO: list[jax.Array], num_rows: int) -> list[jax.Array | Tiled]:
    """`tiled` of matrices with the same inputs, for `joined`; where that needs it, of the joined matrix alone."""
    if any(matrix.shape[-1] % C for matrix in matrices_IO):
        matrices_IO = [joined(matrices_IO)]
    num_inputs, num_outputs = matrices_IO[0].shape[-2], sum(matrix.shape[-1] for matrix in matrices_IO)
    sizes = [size for size in range(MIN_Q, MAX_Q + 1) if num_inputs % size == 0]
    if num_rows not in ROWS or matrices_IO[0].dtype != jnp.float32 or num_outputs % C or not sizes:
        return [joined(matrices_IO)]
    Q = min(reversed(sizes), key=partial(_cost, num_inputs, num_outputs // C, num_rows))
    return [_tiles(matrix, Q) for matrix in matrices_IO]


def _cost(num_inputs: int, num_blocks: int, num_rows: int, Q: int) -> float:
    """Blocks that the busier of two threads multiplies, and what the partial sums cost beside them, as measured."""
    blocks_a_task = max(1, TASK // (num_inputs // Q * num_rows * C))
    tasks = [min(blocks_a_task, num_blocks - start) for start in range(0, num_blocks, blocks_a_task)]
    return max(sum(tasks[::2]), sum(tasks[1::2])) * (1 + 4 * num_rows / Q)


def _tiles(matrix_IO: jax.Array, Q: int) -> Tiled:
    *stack, _, num_outputs = matrix_IO.shape
    tiles_OPQC = jnp.moveaxis(matrix_IO.reshape(*stack, -1, Q, num_outputs // C, C), -2, -4)
    rows = Layout(major_to_minor=tuple(range(tiles_OPQC.ndim)))
    return Tiled(jax.lax.optimization_barrier(with_layout_constraint(tiles_OPQC, rows)))  # made once


def joined(layouts: list[jax.Array | Tiled]) -> jax.Array | Tiled:
    """Matrices with the same inputs, their outputs side by side, all in tiles or none.

    Example:
      >>> import jax.numpy as jnp
      >>> parts = tiled_alike([jnp.ones((64, 64)), jnp.ones((64, 128))], 4)
      >>> product(jnp.ones((4, 64)), joined(parts)).shape
      (4, 192)
    """
    if isinstance(layouts[0], Tiled):
        return Tiled(jnp.concatenate([layout.tiles_OPQC for layout in layouts]))
    return jnp.concatenate(layouts, axis=-1)


def product(x_XI: jax.Array, matrix: jax.Array | Tiled, dtype=None) -> jax.Array:
    """x W, `[..., O]`, of an array `[I, O]` or its tiles; `dtype` as `preferred_element_type` of jnp.matmul.

    Example:
      >>> import jax.numpy as jnp
      >>> matrix = jnp.arange(64 * 64.).reshape(64, 64)
      >>> x = jnp.eye(64)[:2]
      >>> bool(jnp.all(product(x, tiled(matrix, 2)) == x @ matrix))
      True
    """
    if not isinstance(matrix, Tiled):
        return jnp.matmul(x_XI, matrix, preferred_element_type=dtype)
    tiles_OPQC = matrix.tiles_OPQC
    _, P, Q, _ = tiles_OPQC.shape
    x_BPQ = x_XI.reshape(-1, P, Q)
    part_OPBC = jnp.sum(x_BPQ.transpose(1, 0, 2)[None, ..., None] * tiles_OPQC[:, :, None], axis=3)
    # Without the barrier both sums become one, over inputs that no longer fit the cache.
    sum_OBC = jnp.sum(jax.lax.optimization_barrier(part_OPBC), axis=1)
    return sum_OBC.transpose(1, 0, 2).reshape(*x_XI.shape[:-1], -1)
