"""Four workarounds for XLA's CPU backend. Programs for other devices are built without them; `fused_layers` gives
them each layer's weights without tiles.

- "norm": RMSNorm's gradient as matrix-vector products. The fused sums that XLA makes of the automatic gradient take up
  to a tenth of a train step.
- "matmul": a weight's gradient with the narrower of its two factors transposed. XLA transposes the wider one, and
  computes SiLU or its gradient with it in a strided copy, which takes a tenth of a train step.
- "tiles": for decoding, fused weights (matrices with the same input) in a tiled layout. XLA's product of a few rows
  reads a matrix at half of the memory bandwidth; sums over tiles that stay in a core's own caches use nearly all of it.
- "narrow": for 16-bit weights, which XLA multiplies in float32. Conversions stay in the loops, and memory decides on
  the order of operations; else all layers would be converted before the loop over layers, and kept. One row is
  multiplied by the unembedding as two, as the product of a matrix and a vector converts the whole matrix first.

`python benchmarks/xla_cpu.py` measures the saving of each, and tests/test_decoder_xla_cpu.py checks that none changes a
result beyond rounding.

Letters: I inputs, O outputs; the inputs in P parts of Q, the outputs in blocks of C.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from raft_jax.sharding import platform

WITHOUT: set[str] = set()  # workarounds that a test or a benchmark turns off

NARROW = {
    "xla_disable_hlo_passes": "while-loop-invariant-code-motion",
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
}
ROWS = range(2, 17)  # one row: XLA's matrix-vector product is as fast; more rows: XLA's own tiling is efficient
C = 64
MIN_Q, MAX_Q = 16, 144
TASK = 32_768  # partial sums (one per part, row and output) that XLA's library computes on one thread at a time


def uses(workaround: str) -> bool:
    """Whether programs are built with a workaround: on CPU, unless it is in WITHOUT."""
    return workaround not in WITHOUT and platform() == "cpu"


def is_narrow(params) -> bool:
    """Whether weights, or their shapes, have 16 bits and are multiplied on CPU, where XLA converts them to float32."""
    return uses("narrow") and any(leaf.dtype.itemsize == 2 for leaf in jax.tree.leaves(params))


def compiler_options(params) -> dict[str, str]:
    """Options for `jax.jit` of a program with these weights, or their shapes."""
    return NARROW if is_narrow(params) else {}


def normalize(epsilon: float, x: jax.Array, weight_D: jax.Array) -> jax.Array:
    """x / rms(x) · weight over the last axis, computed in float32 and returned in x's dtype."""
    return (_normalize if uses("norm") else _plain_normalize)(epsilon, x, weight_D)


def _plain_normalize(epsilon: float, x: jax.Array, weight_D: jax.Array) -> jax.Array:
    return (x.astype(jnp.float32) * _inverse_rms(epsilon, x) * weight_D).astype(x.dtype)


def _inverse_rms(epsilon: float, x: jax.Array) -> jax.Array:
    return jax.lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True) + epsilon)


def _normalize_backward(epsilon, saved, out_grad):
    x, weight_D = saved
    x32, grad32, inverse = x.astype(jnp.float32), out_grad.astype(jnp.float32), _inverse_rms(epsilon, x)
    weighted = grad32 * x32
    total = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    along = total("...d,d->...", weighted, weight_D)[..., None] / x.shape[-1]
    x_grad = inverse * (grad32 * weight_D - x32 * jnp.square(inverse) * along)
    return x_grad.astype(x.dtype), total("...,...d->d", inverse[..., 0], weighted)


_normalize = jax.custom_vjp(_plain_normalize, nondiff_argnums=(0,))
_normalize.defvjp(
    lambda epsilon, x, weight_D: (_plain_normalize(epsilon, x, weight_D), (x, weight_D)), _normalize_backward
)


def matmul(x_BTI: jax.Array, weight_IO: jax.Array) -> jax.Array:
    """x W."""
    return _matmul(x_BTI, weight_IO) if uses("matmul") else jnp.matmul(x_BTI, weight_IO)


def _matmul_backward(saved, grad_BTO):
    x_BTI, weight_IO = saved
    if x_BTI.shape[-1] > grad_BTO.shape[-1]:
        weight = jnp.einsum("bto,bti->oi", grad_BTO, x_BTI).T
    else:
        weight = jnp.einsum("bti,bto->io", x_BTI, grad_BTO)
    return jnp.einsum("bto,io->bti", grad_BTO, weight_IO), weight


_matmul = jax.custom_vjp(jnp.matmul)
_matmul.defvjp(lambda x_BTI, weight_IO: (jnp.matmul(x_BTI, weight_IO), (x_BTI, weight_IO)), _matmul_backward)


class Tiled(NamedTuple):
    """A float32 matrix `[I, O]` in a tiled layout, or a stack of them; see `product`."""

    tiles_OPQC: jax.Array


def tiled(matrix_IO: jax.Array, num_rows: int) -> jax.Array | Tiled:
    """The matrix, or a stack `[L, I, O]`, in the layout for products of `num_rows` rows on CPU: tiled, or unchanged
    where tiles do not fit or are not faster.

    Example:
      >>> import jax.numpy as jnp
      >>> tiled(jnp.ones((576, 128)), 4).tiles_OPQC.shape
      (2, 4, 144, 64)
      >>> tiled(jnp.ones((576, 100)), 4).shape
      (576, 100)
    """
    return tiled_alike([matrix_IO], num_rows)[0]


def tiled_alike(matrices_IO: list[jax.Array], num_rows: int) -> list[jax.Array | Tiled]:
    """`tiled` of matrices with the same inputs, for `fused`; or one fused matrix, if not all divide into blocks of C or
    tiles are not faster."""
    if any(matrix.shape[-1] % C for matrix in matrices_IO):
        matrices_IO = [fused(matrices_IO)]
    num_inputs, num_outputs = matrices_IO[0].shape[-2], sum(matrix.shape[-1] for matrix in matrices_IO)
    sizes = [size for size in range(MIN_Q, MAX_Q + 1) if num_inputs % size == 0]
    if not uses("tiles") or num_rows not in ROWS or matrices_IO[0].dtype != jnp.float32 or num_outputs % C or not sizes:
        return [fused(matrices_IO)]
    Q = min(reversed(sizes), key=partial(_cost, num_inputs, num_outputs // C, num_rows))
    return [_tiles(matrix, Q) for matrix in matrices_IO]


def _cost(num_inputs: int, num_blocks: int, num_rows: int, Q: int) -> float:
    """Number of blocks that the busier of two threads multiplies, times the measured overhead of the partial sums."""
    blocks_a_task = max(1, TASK // (num_inputs // Q * num_rows * C))
    tasks = [min(blocks_a_task, num_blocks - start) for start in range(0, num_blocks, blocks_a_task)]
    return max(sum(tasks[::2]), sum(tasks[1::2])) * (1 + 4 * num_rows / Q)


def _tiles(matrix_IO: jax.Array, Q: int) -> Tiled:
    *stack, _, num_outputs = matrix_IO.shape
    tiles_OPQC = jnp.moveaxis(matrix_IO.reshape(*stack, -1, Q, num_outputs // C, C), -2, -4)
    rows = Layout(major_to_minor=tuple(range(tiles_OPQC.ndim)))
    return Tiled(jax.lax.optimization_barrier(with_layout_constraint(tiles_OPQC, rows)))  # materialised once


def fused(layouts: list[jax.Array | Tiled]) -> jax.Array | Tiled:
    """Matrices with the same inputs, concatenated along the outputs; either all of them are tiled or none.

    Example:
      >>> import jax.numpy as jnp
      >>> parts = tiled_alike([jnp.ones((64, 64)), jnp.ones((64, 128))], 4)
      >>> product(jnp.ones((4, 64)), fused(parts)).shape
      (4, 192)
    """
    if isinstance(layouts[0], Tiled):
        return Tiled(jnp.concatenate([layout.tiles_OPQC for layout in layouts]))
    return jnp.concatenate(layouts, axis=-1)


def product(x_XI: jax.Array, matrix: jax.Array | Tiled, dtype=None) -> jax.Array:
    """x W, `[..., O]`, for a matrix W `[I, O]`, tiled or not; `dtype`: `preferred_element_type` of jnp.matmul if not.

    Example:
      >>> import jax.numpy as jnp
      >>> matrix = jnp.arange(64 * 64.).reshape(64, 64)
      >>> x = jnp.eye(64)[:2]
      >>> bool(jnp.all(product(x, tiled(matrix, 2)) == x @ matrix))
      True
    """
    if not isinstance(matrix, Tiled):
        if is_narrow(matrix) and math.prod(x_XI.shape[:-1]) == 1:
            twice_2I = jnp.broadcast_to(x_XI.reshape(1, -1), (2, x_XI.shape[-1]))
            return jnp.matmul(twice_2I, matrix, preferred_element_type=dtype)[0].reshape(*x_XI.shape[:-1], -1)
        return jnp.matmul(x_XI, matrix, preferred_element_type=dtype)
    tiles_OPQC = matrix.tiles_OPQC
    _, P, Q, _ = tiles_OPQC.shape
    x_BPQ = x_XI.reshape(-1, P, Q)
    part_OPBC = jnp.sum(x_BPQ.transpose(1, 0, 2)[None, ..., None] * tiles_OPQC[:, :, None], axis=3)
    # Without the barrier XLA merges both sums into one, over inputs that do not fit the cache.
    sum_OBC = jnp.sum(jax.lax.optimization_barrier(part_OPBC), axis=1)
    return sum_OBC.transpose(1, 0, 2).reshape(*x_XI.shape[:-1], -1)


def fused_name(names: tuple[str, ...]) -> str:
    """Name of the fused weight of several parameters: "gate+up"."""
    return "+".join(name.partition("_")[0] for name in names)


def fused_layers(
    stacked: dict[str, jax.Array], groups: tuple[tuple[str, ...], ...], as_matrix: Callable, num_rows: int
) -> list[dict[str, jax.Array | Tiled]]:
    """Each layer's weights for decoding with `num_rows` rows; those of each group are fused, and on CPU tiled.

    In a scan over layers, XLA copies each layer's slice of the weights at every token, on every kind of device. Slices
    that are made once, before decoding, cost one copy of the weights, and save a third of the time on CPU.

    Args:
      stacked: weights, stacked over layers.
      groups: names of parameters that multiply the same input.
      as_matrix: `(name, weight) -> [I, O]` of one layer.
      num_rows: rows of a decoding step on one device.
    """
    rest = dict(stacked)
    parts = {
        fused_name(names): [jax.vmap(partial(as_matrix, name))(rest.pop(name)) for name in names] for names in groups
    }
    layouts = {name: tiled_alike(matrices_LIO, num_rows) for name, matrices_LIO in parts.items()}

    def layer(index: int) -> dict[str, jax.Array | Tiled]:
        of_layer = partial(jax.tree.map, lambda array: array[index])
        return {name: fused(of_layer(layout)) for name, layout in layouts.items()} | of_layer(rest)

    return jax.lax.optimization_barrier([layer(index) for index in range(len(next(iter(stacked.values()))))])
