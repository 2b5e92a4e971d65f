"""Attention, forward and with its backward pass: cuDNN's own causal mask, cuDNN with a bias, and the plain one."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from losses import temporary
from timing import measured, shares, timed

from raft_jax.models import attention
from raft_jax.models.decoder import positions_from_mask

PREDICTED = {
    "bias": "the whole square of scores: twice the work of the causal mask, and a bias of [B, 1, T, S] read as well",
    "plain": "scores in memory: slower than either; float32 has no kernel",
}
HEADS, KV_HEADS, HEAD_WIDTH = 24, 8, 128  # Llama-3.2-3B's
LENGTHS = ((8, 1024), (2, 4096))


def run(record, tiny: bool) -> None:
    record.set(predicted=PREDICTED)
    on_gpu = jax.default_backend() == "gpu"
    lengths = ((1, 32),) if tiny else LENGTHS
    sizes = (4, 2, 8) if tiny else (HEADS, KV_HEADS, HEAD_WIDTH)
    for batch, length in lengths:
        for name, (function, dtype) in contenders().items():
            full_name = f"{name} {dtype} {batch} x {length}"
            if "cuDNN" in name and not on_gpu:
                record.add(full_name, status="skipped", why="cuDNN runs on CUDA devices only")
                continue
            for backward in (False, True):
                measured(
                    record,
                    full_name + (" with backward" if backward else ""),
                    partial(speed, record, function, dtype, batch, length, sizes, backward),
                )


def contenders() -> dict:
    """{name: (function of query [B, T, N, H], key, value [B, T, K, H] and mask [B, T], dtype)}"""

    def causal(query, key, value, mask, implementation="cudnn"):
        return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation=implementation)

    def lengths(query, key, value, mask):
        """Its own causal mask with padding, which would have to lie on the right."""
        count = jnp.sum(mask, axis=1, dtype=jnp.int32)
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            query_seq_lengths=count,
            key_value_seq_lengths=count,
            implementation="cudnn",
        )

    def ours(kernel, query, key, value, mask):
        config = SimpleNamespace(kernel=kernel, attention_softcap=None, windows=None)
        key, value = attention.for_attention(key, value)
        query = query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
        return attention.attend(config, query, key, value, positions_from_mask(mask), mask, None, None)

    return {
        "raft_jax, cuDNN with a bias": (partial(ours, "cudnn"), "bfloat16"),
        "cuDNN, its causal mask": (causal, "bfloat16"),
        "cuDNN, its causal mask and lengths": (lengths, "bfloat16"),
        "raft_jax, plain": (partial(ours, "plain"), "bfloat16"),
        "raft_jax plain": (partial(ours, "plain"), "float32"),
        "JAX's own": (partial(causal, implementation="xla"), "bfloat16"),
    }


def speed(record, function, dtype: str, batch: int, length: int, sizes, backward: bool) -> dict:
    heads, kv_heads, width = sizes
    keys = jax.random.split(jax.random.key(5), 4)
    query, key, value, slope = (
        jax.random.normal(key, (batch, length, count, width), dtype)
        for key, count in zip(keys, (heads, kv_heads, kv_heads, heads), strict=True)
    )
    mask = jnp.ones((batch, length), bool)

    def forward(query, key, value):
        return function(query, key, value, mask)

    def both(query, key, value):
        mixed, pull = jax.vjp(forward, query, key, value)
        return mixed, pull(slope)

    program = jax.jit(both if backward else forward).lower(query, key, value).compile()
    found = timed(lambda: program(query, key, value), seconds=1.0)
    # Two products forward, five backward, over the half of the square below the diagonal.
    work = (7 if backward else 2) * 2.0 * batch * heads * width * length * (length + 1) / 2
    return {**found, "temporary_bytes": temporary(program), **shares(record, seconds=found["seconds"], flops=work)}
