"""Drawing tokens, the decoding loop, and the sampler of one batch: pure functions, one jitted program per shape."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from raft_jax.models import Model
from raft_jax.models.attention import MASKED
from raft_jax.models.decoder import Cache
from raft_jax.models.vocabulary import from_table, to_table
from raft_jax.models.xla_cpu import Tiled, is_narrow, product, tiled
from raft_jax.sharding import num_shards
from raft_jax.tokens import Tokens


def sample_token(logits_BV: jax.Array, uniform_B: jax.Array, temperature: jax.Array, top_p: float = 1.0) -> jax.Array:
    """Samples one token per row by inverting the cumulative distribution function.

    This needs one uniform number per row, where the Gumbel trick needs one per vocabulary entry. The inversion has two
    levels, over blocks and then within a block, so that no sum has more than about √V terms.

    Args:
      logits_BV: float.
      uniform_B: float32 in [0, 1).
      temperature: float32 scalar; 0 takes the most likely token.
      top_p: samples from the smallest set of tokens with at least this probability; a static number.

    Returns:
      tokens_B: int32.

    Example:
      >>> import jax.numpy as jnp
      >>> logits_BV = jnp.log(jnp.array([[0.5, 0.3, 0.2]] * 3))
      >>> sample_token(logits_BV, jnp.array([0.49, 0.51, 0.81]), jnp.float32(1.0)).tolist()
      [0, 1, 2]
    """
    logits_BV = logits_BV.astype(jnp.float32)
    scaled_BV = logits_BV / jnp.maximum(temperature, 1e-6)
    if top_p < 1.0:
        scaled_BV = _keep_nucleus(scaled_BV, top_p)
    weight_BV = jnp.exp(scaled_BV - jnp.max(scaled_BV, axis=-1, keepdims=True))
    B, V = weight_BV.shape
    size = 1 << max(1, (V.bit_length() + 1) // 2)
    padded = jnp.pad(weight_BV, ((0, 0), (0, -V % size))).reshape(B, -1, size)
    block_sum = jnp.sum(padded, axis=-1)
    target_B = uniform_B * jnp.sum(block_sum, axis=-1)
    block_B, rest_B = _invert(block_sum, target_B)
    inside, _ = _invert(jnp.take_along_axis(padded, block_B[:, None, None], axis=1)[:, 0], rest_B)
    return jnp.where(temperature > 0, block_B * size + inside, jnp.argmax(logits_BV, axis=-1)).astype(jnp.int32)


def _invert(weight_BM: jax.Array, target_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First index with positive weight whose running sum exceeds the target, and the target minus the sum before it."""
    running_BM = jnp.cumsum(weight_BM, axis=-1)
    passed_BM = (running_BM > target_B[:, None]) & (weight_BM > 0)
    # Rounding may leave the target above the last sum: take the last entry with positive weight.
    last_B = weight_BM.shape[-1] - 1 - jnp.argmax(weight_BM[:, ::-1] > 0, axis=-1)
    index_B = jnp.where(jnp.any(passed_BM, axis=-1), jnp.argmax(passed_BM, axis=-1), last_B)
    before_B = jnp.take_along_axis(running_BM - weight_BM, index_B[:, None], axis=-1)[:, 0]
    return index_B, target_B - before_B


def _keep_nucleus(logits_BV: jax.Array, top_p: float) -> jax.Array:
    """Masks tokens outside the smallest set with at least `top_p` of the probability; ties at its edge stay in it."""
    probs_BV = jax.nn.softmax(logits_BV, axis=-1)
    sorted_BV = jnp.sort(probs_BV, axis=-1, descending=True)
    before_BV = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV
    smallest_B1 = jnp.min(jnp.where(before_BV < top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(probs_BV >= smallest_B1, logits_BV, MASKED)


class Decoding(NamedTuple):
    """Rows whose answers are being generated. Letters: B rows, S slots of the cache and places of the text."""

    cache: Cache  # of all tokens of the text but the last
    text_BS: jax.Array  # int32: the prompt and the tokens generated so far
    prompt_B: jax.Array  # int32: length of the prompt
    length_B: jax.Array  # int32: length of the text
    row_ids_B: jax.Array  # int32: select each row's stream of random numbers
    done_B: jax.Array  # bool: the answer has ended, or there is none

    def rows(self, places_R: jax.Array) -> Decoding:
        """The rows at some places."""
        return Decoding(self.cache.rows(places_R), *(array[places_R] for array in self[1:]))


@dataclass(frozen=True)
class Settings:
    """How tokens are drawn; all of it is static.

    Attributes:
      max_new_tokens: longest answer, its end-of-turn token included.
      top_p: see `sample_token`.
      num_drafts: tokens that each step guesses from the text so far, and verifies in the same forward pass.
    """

    max_new_tokens: int
    top_p: float = 1.0
    num_drafts: int = 0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {self.max_new_tokens} must be at least 1")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must be above 0 and up to 1")
        if self.num_drafts < 0:
            raise ValueError(f"num_drafts {self.num_drafts} must be at least 0")


def make_draw(model: Model, unembedding, top_p: float, key: jax.Array, temperature: jax.Array):
    """Builds `draw(hidden_BTD, row_ids_B, index_B) -> tokens_BT`: the tokens number index, index + 1, ... of answers.

    Each token has a random number of its own, which depends on the row's id and the token's number only.
    """

    def draw(hidden_BTD, row_ids_B, index_B):
        B, T, _ = hidden_BTD.shape
        hidden_XD = hidden_BTD.reshape(B * T, -1)
        logits_XV = model.capped(from_table(product(to_table(hidden_XD), unembedding, jnp.float32)))

        def uniforms(row_id, index):
            row_key = jax.random.fold_in(key, jnp.maximum(row_id, 0))
            return jax.vmap(lambda t: jax.random.uniform(jax.random.fold_in(row_key, index + t)))(jnp.arange(T))

        uniform_BT = jax.vmap(uniforms)(row_ids_B, index_B)
        return sample_token(logits_XV, uniform_BT.reshape(-1), temperature, top_p).reshape(B, T)

    return draw


def draft(text_BS: jax.Array, length_B: jax.Array, num_drafts: int) -> jax.Array:
    """Guesses `[B, num_drafts]` of the tokens that follow each text: what followed the latest earlier place at which
    the text had the same last two tokens, or the same last one.

    Example:
      >>> import jax.numpy as jnp
      >>> draft(jnp.array([[4, 5, 6, 7, 4, 5, 0, 0]]), jnp.array([6]), 2).tolist()
      [[6, 7]]
    """

    def of_row(text_S, length):
        places_S = jnp.arange(len(text_S))
        last, second = text_S[length - 1], text_S[length - 2]
        same_S = (text_S == last) & (places_S < length - 1)
        both_S = same_S & (jnp.roll(text_S, 1) == second) & (places_S > 0)
        place = jnp.argmax(places_S + len(text_S) * (same_S.astype(jnp.int32) + both_S))
        return jax.lax.dynamic_slice_in_dim(jnp.pad(text_S, (0, num_drafts)), place + 1, num_drafts)

    return jax.vmap(of_row)(text_BS, length_B)


def make_decode(model: Model, settings: Settings):
    """Builds the decoding loop, a pure function to be jitted.

    Returns:
      `decode(params, decoding, key, temperature, enough, max_steps, layers=None, unembedding=None) -> (decoding,
      num_steps)`. It ends when `enough` rows are done or after `max_steps` steps. `layers` and `unembedding` are those
      of `decoding_weights`; without them the layers run in a scan.
    """
    stop_ids = np.array(model.tokenizer.stop_ids, np.int32)

    def decode(params, decoding: Decoding, key, temperature, enough, max_steps, layers=None, unembedding=None):
        unembedding = model.unembedding(params) if unembedding is None else unembedding
        draw = make_draw(model, unembedding, settings.top_p, key, temperature)

        def step(carry):
            index, now = carry
            tokens_BT = _next_tokens(now, settings.num_drafts)
            hidden_BTD, cache = model.extend(params, tokens_BT, now.cache, layers)
            drawn_BT = draw(hidden_BTD, now.row_ids_B, now.length_B - now.prompt_B)
            return index + 1, _accept(now._replace(cache=cache), tokens_BT, drawn_BT, stop_ids, settings.max_new_tokens)

        def unfinished(carry):
            index, now = carry
            return (index < max_steps) & (jnp.sum(now.done_B) < enough)

        num_steps, decoding = jax.lax.while_loop(unfinished, step, (jnp.int32(0), decoding))
        return decoding, num_steps

    return decode


def _next_tokens(now: Decoding, num_drafts: int) -> jax.Array:
    """The text's last token, which the cache lacks, and guesses of the tokens after it: `[B, 1 + num_drafts]`."""
    last_B1 = jnp.take_along_axis(now.text_BS, now.length_B[:, None] - 1, axis=1)
    if not num_drafts:
        return last_B1
    return jnp.concatenate([last_B1, draft(now.text_BS, now.length_B, num_drafts)], axis=1)


def _accept(now: Decoding, tokens_BT, drawn_BT, stop_ids, max_new_tokens: int) -> Decoding:
    """Adds the drawn tokens up to the first that is not the draft in its place, a stop token or the last allowed one.

    Each draw is that of decoding token by token, so guesses change how many steps are needed, and not the answer.
    """
    T = tokens_BT.shape[1]
    right_BT = jnp.pad(tokens_BT[:, 1:] == drawn_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    stops_BT = jnp.any(drawn_BT[..., None] == stop_ids, axis=-1)
    number_BT = (now.length_B - now.prompt_B)[:, None] + jnp.arange(1, T + 1)
    ends_BT = stops_BT | (number_BT >= max_new_tokens)
    after_end_BT = jnp.cumsum(ends_BT, axis=1) - ends_BT > 0
    kept_BT = (jnp.cumprod(right_BT, axis=1) == 1) & ~after_end_BT & ~now.done_B[:, None]
    added_B = jnp.sum(kept_BT, axis=1, dtype=jnp.int32)
    return now._replace(
        cache=now.cache.longer(added_B),
        text_BS=put(now.text_BS, drawn_BT, now.length_B),
        length_B=now.length_B + added_B,
        done_B=now.done_B | jnp.any(kept_BT & ends_BT, axis=1),
    )


def put(text_BS: jax.Array, tokens_BT: jax.Array, place_B: jax.Array) -> jax.Array:
    """The texts with tokens written from each row's place on."""
    return jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=0))(text_BS, tokens_BT, place_B)


def decoding_weights(model: Model, params, num_tokens: int) -> tuple[list, Tiled | None]:
    """Layers and unembedding laid out for decoding layer by layer, `num_tokens` tokens at a time.

    Faster than a scan over layers, slower to compile, and a copy of the weights. The unembedding is None where the
    model's own layout is to be used: multiplying by rows of the embedding takes half the time of its transpose.
    """
    unembedding = tiled(model.unembedding(params), num_tokens)
    return model.unstacked(params, num_tokens), unembedding if isinstance(unembedding, Tiled) else None


def empty(model: Model, params, num_rows: int, num_slots: int) -> Decoding:
    """Rows without a prompt, all of them done."""
    zeros_B, ones_B = jnp.zeros(num_rows, jnp.int32), jnp.ones(num_rows, jnp.int32)
    cache = model.empty_cache(params, num_rows, num_slots)
    # One place more than the cache: rows that are done go on drawing tokens, which are put behind the text.
    text_BS = jnp.zeros((num_rows, num_slots + 1), jnp.int32)
    return Decoding(cache, text_BS, zeros_B, ones_B, -ones_B, ones_B == 1)


def begin(model: Model, hidden_BD, cache: Cache, text_BS, row_ids_B, draw, max_new_tokens: int) -> Decoding:
    """Rows with the first token of their answers, drawn from the hidden state of each prompt's last token."""
    first_B1 = draw(hidden_BD[:, None], row_ids_B, jnp.zeros_like(row_ids_B))
    ends_B = jnp.any(first_B1 == np.array(model.tokenizer.stop_ids, np.int32), axis=1) | (max_new_tokens == 1)
    prompt_B = cache.length_B
    text_BS = put(text_BS, first_B1, prompt_B)
    return Decoding(cache, text_BS, prompt_B, prompt_B + 1, row_ids_B, ends_B | (row_ids_B < 0))


def make_generate(model: Model, max_new_tokens: int, *, top_p: float = 1.0, unroll: bool = False):
    """Builds the jitted sampler of a batch of prompts, in one program: prefill, and decoding until every row is done.

    Args:
      max_new_tokens: the length of the output.
      top_p: see `sample_token`.
      unroll: decode layer by layer, see `decoding_weights`; not done with 16-bit weights on a CPU, where converting
        each layer to float32 is the larger part of its time. There `model.jit(generate)` needs less memory.

    Returns:
      `generate(params, prompt, row_ids, key, temperature) -> Tokens`. Prompts are Tokens padded on the left; the new
      tokens are padded on the right, and the end-of-turn token counts as real. `row_ids` ([B], int32) select each row's
      stream of random numbers, so that a row's sample does not depend on the other rows of its batch; a negative id
      marks a filler row, which is finished from the start. Decoding ends when every row is finished.
    """
    settings = Settings(max_new_tokens, top_p)
    decode = make_decode(model, settings)
    pad_id, unroll = model.tokenizer.pad_id, unroll and not is_narrow(model.params)

    @jax.jit
    def generate(params, prompt: Tokens, row_ids, key, temperature) -> Tokens:
        B, P = prompt.ids.shape
        prompt = left_to_right(prompt)
        layers = unembedding = None
        if unroll:
            layers, unembedding = decoding_weights(model, params, B // num_shards("batch"))
        unembedding = model.unembedding(params) if unembedding is None else unembedding
        hidden_BPD, cache = model.prefill(params, prompt, P + max_new_tokens)
        last_BD = jnp.take_along_axis(hidden_BPD, cache.length_B[:, None, None] - 1, axis=1)[:, 0]
        # One place more than an answer needs: rows that are done go on drawing tokens, which are put behind it.
        text_BS = jnp.pad(prompt.ids, ((0, 0), (0, max_new_tokens + 1)))
        draw = make_draw(model, unembedding, top_p, key, temperature)
        decoding = begin(model, last_BD, cache, text_BS, row_ids, draw, max_new_tokens)
        if unroll:
            decoding = decoding._replace(cache=decoding.cache.unstacked())
        decoding, _ = decode(params, decoding, key, temperature, B, max_new_tokens, layers, unembedding)
        return answers(decoding, max_new_tokens, pad_id)

    return generate


def left_to_right(prompt: Tokens) -> Tokens:
    """Rows that are padded on the left, padded on the right instead."""
    mask_BT, T = prompt.real, prompt.length
    place_BT = (jnp.arange(T) + T - jnp.sum(mask_BT, axis=1, keepdims=True)) % T
    ids_BT, mask_BT = (jnp.take_along_axis(array, place_BT, axis=1) for array in (prompt.ids, mask_BT))
    return replace(prompt, ids=ids_BT, mask=mask_BT)


def answers(decoding: Decoding, max_new_tokens: int, pad_id: int) -> Tokens:
    """The tokens generated so far, `[B, max_new_tokens]`, padded on the right."""
    number_C = jnp.arange(max_new_tokens)
    ids_BC = jnp.take_along_axis(decoding.text_BS, decoding.prompt_B[:, None] + number_C, axis=1)
    mask_BC = (number_C < (decoding.length_B - decoding.prompt_B)[:, None]) & (decoding.row_ids_B >= 0)[:, None]
    return Tokens(jnp.where(mask_BC, ids_BC, pad_id), mask_BC)
