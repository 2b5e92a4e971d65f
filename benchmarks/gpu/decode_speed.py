"""Decoding: tokens a second and the share of memory bandwidth, with both forms of the attention to the cache.

One program draws many tokens, as make_generate's loop does, from a cache that is full of random keys and values.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from shapes import num_parameters, random_model
from timing import measured, once, shares

from raft_jax.models import decoder
from raft_jax.models.attention import MASKED, softcap
from raft_jax.models.decoder import Cache
from raft_jax.sampling.decode import sample_token

SUMS = decoder.decode_attention
PREDICTED = {
    "floor": "weights and cache are read once a token: 6.4 GB at 3 TB/s is 2.1 ms for the 3B shape",
    "sums": "11 times the cache's roofline on a TPU; at batch 1 bound by launches, some 25 a layer: 3-5 ms a token",
    "products": "within 2 times the floor from batch 16 on",
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


def attend_by_products(config, query_B1NH, key_BKH1, value_BK1H, past_key_BKHS, past_value_BKSH, visible_BS):
    """raft_jax.models.attention.decode_attention, with products of matrices that are summed up in float32."""
    B, _, N, H = query_B1NH.shape
    query_BKGH = query_B1NH.reshape(B, key_BKH1.shape[1], -1, H)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    past_BKGS = softcap(product("bkgh,bkhs->bkgs", query_BKGH, past_key_BKHS), config.attention_softcap)
    past_BKGS = jnp.where(visible_BS[:, None, None], past_BKGS, MASKED)
    own_BKG1 = softcap(product("bkgh,bkhs->bkgs", query_BKGH, key_BKH1), config.attention_softcap)
    probs_BKGS = jax.nn.softmax(jnp.concatenate([past_BKGS, own_BKG1], axis=-1)).astype(value_BK1H.dtype)
    mixed_BKGH = product("bkgs,bksh->bkgh", probs_BKGS[..., :-1], past_value_BKSH)
    mixed_BKGH = mixed_BKGH + probs_BKGS[..., -1:] * value_BK1H.astype(jnp.float32)
    return mixed_BKGH.astype(value_BK1H.dtype).reshape(B, 1, N, H)


FORMS = {"sums": SUMS, "products": attend_by_products}


def run(record, tiny: bool) -> None:
    record.set(predicted=PREDICTED)
    cases = (("tiny", 2),) if tiny else CASES
    filled, new = (12, 4) if tiny else (FILLED, NEW_TOKENS)
    model, name = None, None
    for shape, batch in cases:
        if shape != name:
            model, name = None, shape  # two models at once might not fit
            model = random_model(shape, "bfloat16")
        tokens = {}
        for form, function in FORMS.items():
            decoder.decode_attention = function
            try:
                measured(
                    record,
                    f"{shape} batch {batch} {form}",
                    partial(speed, record, model, batch, filled, new, tokens, form),
                    shape=shape,
                    batch=batch,
                )
            finally:
                decoder.decode_attention = SUMS


def speed(record, model, batch: int, filled: int, new: int, tokens: dict, form: str) -> dict:
    cache = random_cache(model.config, batch, filled, filled + new)
    program = make_decoding(model, new)
    found = once(lambda: program(model.params, cache), repeats=3)
    tokens[form] = jax.device_get(program(model.params, cache)).tolist()
    config, itemsize = model.config, 2
    cache_bytes = 2 * config.num_layers * batch * (filled + new) * config.num_kv_heads * config.head_width * itemsize
    table = 0 if config.tied_embeddings else config.vocab_size * config.width
    weight_bytes = (num_parameters(config) - table) * itemsize
    a_token = found["seconds"] / new
    same = (
        {"first_tokens_equal": sum(a[0] == b[0] for a, b in zip(*tokens.values(), strict=True)) / batch}
        if len(tokens) == 2
        else {}
    )
    return {
        **found,
        "seconds_per_token": a_token,
        "tokens_per_second": batch / a_token,
        "weight_bytes": weight_bytes,
        "cache_bytes": cache_bytes,
        **same,
        **shares(record, seconds=a_token, moved=weight_bytes + cache_bytes),
    }


def random_cache(config, batch: int, filled: int, length: int) -> Cache:
    keys = jax.random.split(jax.random.key(3), 2)
    sizes = (config.num_layers, batch, config.num_kv_heads)
    mask = jnp.broadcast_to(jnp.arange(length) < filled, (batch, length))

    @jax.jit
    def make(keys):
        key = jax.random.normal(keys[0], (*sizes, config.head_width, length), jnp.bfloat16)
        return key, jax.random.normal(keys[1], (*sizes, length, config.head_width), jnp.bfloat16)

    return Cache(*make(keys), mask, jnp.int32(filled))


def make_decoding(model, new: int):
    @jax.jit
    def decode(params, cache):
        batch = cache.mask_BS.shape[0]
        unembedding = model.unembedding(params)
        live = jnp.ones((batch, 1), bool)
        uniforms = jax.random.uniform(jax.random.key(4), (new, batch))

        def step(carry, uniform_B):
            token_B, cache = carry
            hidden, cache = model.step(params, token_B[:, None], live, cache)
            token_B = sample_token(model.logits(hidden[:, 0], unembedding), uniform_B, jnp.float32(1.0))
            return (token_B, cache), token_B

        _, tokens = jax.lax.scan(step, (jnp.arange(batch, dtype=jnp.int32), cache), uniforms)
        return tokens.T

    return decode
