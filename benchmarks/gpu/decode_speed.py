"""Decoding: tokens a second and the share of memory bandwidth.

One program draws many tokens, as the decoding loop does, from a cache that is full of random keys and values.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from shapes import num_parameters, random_model
from timing import measured, once, shares

from raft_jax.models.decoder import Cache
from raft_jax.sampling.decode import sample_token

PREDICTED = {
    "floor": "weights and cache are read once a token: 6.4 GB at 3 TB/s is 2.1 ms for the 3B shape",
    "products": "within 2 times the floor from batch 16 on; at batch 1 bound by launches, some 25 a layer: 3-5 ms",
}
# Most informative first, as the part may be cut off: shape, batch.
CASES = (
    ("llama-3b", 16),
    ("llama-3b", 128),
    ("llama-3b", 1),
    ("smollm2", 16),
    ("llama-3b", 256),
    ("smollm2", 128),
    ("smollm2", 1),
    ("llama-1b", 16),
)
FILLED, NEW_TOKENS = 448, 64


def run(record, tiny: bool) -> None:
    record.set(predicted=PREDICTED)
    cases = (("tiny", 2),) if tiny else CASES
    filled, new = (12, 4) if tiny else (FILLED, NEW_TOKENS)
    model, name = None, None
    for shape, batch in cases:
        if shape != name:
            model, name = None, shape  # two models at once might not fit
            model = random_model(shape, "bfloat16")
        job = partial(speed, record, model, batch, filled, new)
        measured(record, f"{shape} batch {batch}", job, shape=shape, batch=batch)


def speed(record, model, batch: int, filled: int, new: int) -> dict:
    cache = random_cache(model.config, batch, filled, filled + new)
    program = make_decoding(model, new)
    found = once(lambda: program(model.params, cache), repeats=3)
    config, itemsize = model.config, 2
    cache_bytes = 2 * config.num_layers * batch * (filled + new) * config.num_kv_heads * config.head_width * itemsize
    table = 0 if config.tied_embeddings else config.vocab_size * config.width
    weight_bytes = (num_parameters(config) - table) * itemsize
    a_token = found["seconds"] / new
    return {
        **found,
        "seconds_per_token": a_token,
        "tokens_per_second": batch / a_token,
        "weight_bytes": weight_bytes,
        "cache_bytes": cache_bytes,
        **shares(record, seconds=a_token, moved=weight_bytes + cache_bytes),
    }


def random_cache(config, batch: int, filled: int, length: int) -> Cache:
    keys = jax.random.split(jax.random.key(3), 2)
    sizes = (config.num_layers, batch, config.num_kv_heads)

    @jax.jit
    def make(keys):
        key = jax.random.normal(keys[0], (*sizes, config.head_width, length), jnp.bfloat16)
        return key, jax.random.normal(keys[1], (*sizes, length, config.head_width), jnp.bfloat16)

    return Cache(*make(keys), jnp.full(batch, filled, jnp.int32), jnp.full(batch, length, jnp.int32))


def make_decoding(model, new: int):
    @jax.jit
    def decode(params, cache):
        batch = len(cache.length_B)
        unembedding = model.unembedding(params)
        uniforms = jax.random.uniform(jax.random.key(4), (new, batch))

        def step(carry, uniform_B):
            token_B, cache = carry
            hidden, cache = model.extend(params, token_B[:, None], cache)
            token_B = sample_token(model.logits(hidden[:, 0], unembedding), uniform_B, jnp.float32(1.0))
            return (token_B, cache.longer(1)), token_B

        _, tokens = jax.lax.scan(step, (jnp.arange(batch, dtype=jnp.int32), cache), uniforms)
        return tokens.T

    return decode
