"""How fast a few rows are multiplied by a large matrix, by XLA and by raft_jax.models.xla_cpu: GB of matrix a second.

    python benchmarks/products.py --rows 1 2 4 8 16

Enough matrices are multiplied in turn that none is still in a cache.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from raft_jax.models.xla_cpu import product, tiled

SHAPES = [(576, 960), (576, 576), (576, 3072), (1536, 576), (576, 49152), (2048, 5632)]


def gigabytes_per_second(x_BI: jax.Array, matrices: list, num_bytes: int, repeats: int) -> float:
    @jax.jit
    def chain(x_BI, matrices):
        for matrix in matrices:
            y_BO = jax.lax.optimization_barrier(product(x_BI, matrix))
            x_BI = x_BI + 1e-4 * jnp.sum(y_BO, axis=-1, keepdims=True)  # the next product waits for all of this one
        return x_BI

    jax.block_until_ready(chain(x_BI, matrices))
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(chain(x_BI, matrices))
        seconds.append(time.perf_counter() - began)
    return num_bytes / statistics.median(seconds) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    print("| rows | matrix | product | tiles |\n|---|---|---|---|")
    for B in options.rows:
        for shape in SHAPES:
            num_bytes = 4 * shape[0] * shape[1]
            keys = jax.random.split(jax.random.key(0), -(-280_000_000 // num_bytes))
            matrices = [jax.random.normal(key, shape) for key in keys]
            x_BI = jax.random.normal(jax.random.key(1), (B, shape[0]))
            plain, by_tiles = (
                gigabytes_per_second(x_BI, layout, num_bytes * len(keys), options.repeats)
                for layout in (matrices, [tiled(matrix, B) for matrix in matrices])
            )
            print(f"| {B} | {shape[0]:,} x {shape[1]:,} | {plain:.1f} | {by_tiles:.1f} |", flush=True)


if __name__ == "__main__":
    main()
