"""Generation for many prompts with a few compiled shapes: the engine of rewriting, rollouts and evaluation."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from raft_jax.accelerators import find_accelerator
from raft_jax.data.batches import pad
from raft_jax.models import Model
from raft_jax.models.decoder import Cache
from raft_jax.models.xla_cpu import is_narrow
from raft_jax.sampling.decode import Decoding, Settings, begin, decoding_weights, empty, make_decode, make_draw
from raft_jax.sharding import (
    bytes_per_device,
    device_kind,
    length_multiple,
    num_shards,
    platform,
    put_batch,
    to_host,
    use_mesh,
)
from raft_jax.tokens import Tokens

ADMITTED = 8  # new rows are admitted when so large a part of all places is free: an eighth
STEPS = 64  # decoding steps between two looks at what is done
# Decoding layer by layer is faster than a scan, but compiles longer and copies the weights. On CPU it is done where
# prompts wait for places, or where there may be so many steps and the weights have at most so many bytes, but not with
# 16-bit weights (see make_generate); on other devices where the copy takes at most so much of the memory, since base
# and tuned model may be there, too.
UNROLLED_STEPS, UNROLLED_BYTES, UNROLLED_SHARE = 64, 2 << 30, 0.25
# With `shrink`, the last rows move to a quarter of the places (at least to SMALLEST) when they fill no more, if their
# answers may have so many more tokens.
SHRINK_TO, SHRINK_STEPS, SMALLEST = 4, 32, 4
SHARED = 16  # the length of the shared prefix is a multiple of this
# Prompt lengths are rounded up to one of these, so that a run compiles only a few programs.
LENGTH_BUCKETS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)


@dataclass(frozen=True)
class Completion:
    """One generated answer: its tokens, including a stop token, and whether it ended with a stop token."""

    tokens: list[int]
    finished: bool


def bucket(length: int) -> int:
    """The smallest bucket that holds a length.

    Example:
      >>> bucket(65)
      96
    """
    for size in LENGTH_BUCKETS:
        if length <= size and size % length_multiple() == 0:
            return size
    return -(-length // 8192) * 8192


def row_number(name: str) -> int:
    """The id of a row's random stream, from the row's name: the same in every run and every batch."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF


def rows_per_batch(batch_size: int, num_prompts: int, mesh: jax.sharding.Mesh | None) -> int:
    """Rows per batch: `batch_size`, or `num_prompts` if smaller, rounded up to a multiple of the mesh's batch axes."""
    parts = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-min(batch_size, num_prompts) // parts) * parts


def unrolls(params, max_new_tokens: int, waiting: bool = False) -> bool:
    """Whether to decode layer by layer; `params` may be shapes, and `waiting` is whether prompts wait for places."""
    num_bytes = bytes_per_device(params)
    if platform() != "cpu":
        known = find_accelerator(device_kind())
        return known is None or num_bytes <= UNROLLED_SHARE * known[1].memory
    if is_narrow(params):
        return False
    return waiting or (max_new_tokens >= UNROLLED_STEPS and num_bytes <= UNROLLED_BYTES)


class Sampler:
    """Generates answers to prompts.

    `batch_size` rows are decoded at once; as soon as some are done, the next prompts take their places. What all
    prompts begin with is computed once. A row's tokens depend on the row's prompt and name, the key, the prompts of the
    call and the batch size, not on which other rows are done when it begins.

    With `shrink`, the last rows of a call go on in fewer places, on one CPU, where a step costs what its places cost. A
    row's tokens then depend on the other rows' lengths, too, by what products of other shapes round differently.
    """

    def __init__(
        self,
        model: Model,
        batch_size: int = 32,
        mesh: jax.sharding.Mesh | None = None,
        num_drafts: int = 0,
        shrink: bool = False,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} must be at least 1")
        self.model = model
        self.batch_size = batch_size
        self.mesh = mesh
        self.num_drafts = num_drafts
        self.shrink = shrink and (mesh is None or mesh.size == 1) and platform() == "cpu"
        self.steps = self.tokens = 0  # decoding steps so far, and the tokens that they gave
        self._programs: dict[Settings, Programs] = {}

    def generate(
        self,
        params,
        prompts: Sequence[Sequence[int]],
        *,
        on_batch: Callable[[list[int], list[Completion]], None] | None = None,
        **settings: Any,
    ) -> list[Completion]:
        """One completion per prompt; the other arguments, and errors, are those of `stream`.

        `on_batch` is called with the indices and completions of rows that are done, each once.
        """
        completions: dict[int, Completion] = {}
        for batch in self.stream(params, prompts, **settings):
            completions |= batch
            if on_batch:
                on_batch(list(batch), list(batch.values()))
        return [completions[index] for index in range(len(prompts))]

    def stream(
        self,
        params,
        prompts: Sequence[Sequence[int]],
        *,
        key: jax.Array,
        names: Sequence[str] | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_new_tokens: int,
        done: Container[int] = (),
    ) -> Iterator[dict[int, Completion]]:
        """Yields completions by the indices of their prompts, as they are done.

        Args:
          params: the model's parameters.
          prompts: token ids.
          key: random key of the whole call.
          names: the rows' names, which select their random streams; default: their indices.
          temperature: 0 is greedy.
          top_p: 1 samples from the whole vocabulary.
          max_new_tokens: maximum length of a completion.
          done: indices of prompts that need no completion.

        Raises:
          ValueError: an empty prompt, or one that with max_new_tokens exceeds the model's positions.
        """
        names = [str(index) for index in range(len(prompts))] if names is None else names
        limit = self.model.config.max_positions - max_new_tokens
        for name, prompt in zip(names, prompts, strict=True):
            if not prompt:
                raise ValueError(f"prompt {name} is empty")
            if len(prompt) > limit:
                raise ValueError(
                    f"prompt {name} has {len(prompt)} tokens; with max_new_tokens {max_new_tokens} the model's "
                    f"{self.model.config.max_positions} positions leave room for {limit}"
                )
        settings = Settings(max_new_tokens, top_p, self.num_drafts)
        waiting = [index for index in range(len(prompts)) if index not in done]
        if not waiting:
            return
        with use_mesh(self.mesh):
            if settings not in self._programs:
                self._programs[settings] = Programs(self.model, settings)
            rows = Rows(self, self._programs[settings], params, prompts, names, key, jnp.float32(temperature))
        # Long prompts first: their answers tend to be long, too, and the last places are then free at about one time.
        waiting.sort(key=lambda index: (-len(prompts[index]), index))
        while waiting or rows.taken:
            with use_mesh(self.mesh):  # left before each yield, so that the caller's context is its own
                while waiting and len(rows.free) >= min(rows.at_once, len(waiting)):
                    waiting = rows.admit(waiting)
                if not waiting:
                    rows.shrink()
                finished = rows.decode(rows.enough(len(waiting)))
            self.steps, self.tokens = self.steps + rows.steps, self.tokens + sum(map(_length, finished.values()))
            if finished:
                yield finished


class Programs:
    """The jitted programs of a model and settings: the shared prefix, the admission of new rows, decoding."""

    def __init__(self, model: Model, settings: Settings):
        self.model, self.settings = model, settings
        self.decode = model.jit(make_decode(model, settings), donate_argnums=1)
        self.admit = model.jit(self._admit, donate_argnums=1)
        self.prefix = model.jit(self._prefix)
        self.rows = jax.jit(Decoding.rows)
        self.empty = jax.jit(self._empty, static_argnums=(1, 2, 3))
        self.weights = jax.jit(partial(decoding_weights, model), static_argnums=1)

    def _empty(self, params, num_rows: int, num_slots: int, unroll: bool) -> Decoding:
        rows = empty(self.model, params, num_rows, num_slots)
        return rows._replace(cache=rows.cache.unstacked()) if unroll else rows

    def _prefix(self, params, ids_RX) -> Cache:
        """A cache of the tokens that all prompts begin with, in each of some rows."""
        cache = self.model.empty_cache(params, *ids_RX.shape)
        if not ids_RX.shape[1]:
            return cache
        _, cache = self.model.extend(params, ids_RX, cache)
        return cache.longer(jnp.int32(ids_RX.shape[1]))

    def _admit(self, params, decoding: Decoding, prefix: Cache, prompt: Tokens, places_R, row_ids_R, key, temperature):
        """Puts new prompts, padded on the right, into the given places; a place that does not exist is skipped."""
        X, P = prefix.key_LBKHS.shape[-1], prompt.length
        S = decoding.text_BS.shape[1] - 1
        keys = jnp.pad(prefix.key_LBKHS, ((0, 0),) * 4 + ((0, P - X),))
        values = jnp.pad(prefix.value_LBKSH, ((0, 0),) * 3 + ((0, P - X), (0, 0)))
        count_R = jnp.sum(prompt.real, axis=1, dtype=jnp.int32) - X
        limit_R = X + count_R + self.settings.max_new_tokens
        hidden, cache = self.model.extend(params, prompt.ids[:, X:], Cache(keys, values, prefix.length_B, limit_R))
        last_RD = jnp.take_along_axis(hidden, count_R[:, None, None] - 1, axis=1)[:, 0]
        draw = make_draw(self.model, self.model.unembedding(params), self.settings.top_p, key, temperature)
        text_RS = jnp.pad(prompt.ids, ((0, 0), (0, S + 1 - P)))
        new = begin(self.model, last_RD, cache.longer(count_R), text_RS, row_ids_R, draw, self.settings.max_new_tokens)
        rest = (
            before.at[places_R].set(after, mode="drop") for before, after in zip(decoding[1:], new[1:], strict=True)
        )
        return Decoding(decoding.cache.with_rows(places_R, new.cache), *rest)


class Rows:
    """The rows of one call of `Sampler.stream`: which prompt has which place, and the arrays on the devices."""

    def __init__(self, sampler: Sampler, programs: Programs, params, prompts, names, key, temperature):
        self.programs, self.params, self.key, self.temperature = programs, params, key, temperature
        self.prompts, self.names, self.mesh = prompts, names, sampler.mesh
        self.shrinks = sampler.shrink
        self.num_rows = rows_per_batch(sampler.batch_size, len(prompts), sampler.mesh)
        self.at_once = rows_per_batch(max(1, self.num_rows // ADMITTED), self.num_rows, sampler.mesh)
        self.taken: dict[int, int] = {}  # place → index of its prompt
        self.steps = 0
        num_shared = self._num_shared()
        self.lengths = self._lengths(num_shared)
        settings = programs.settings
        unroll = unrolls(params, settings.max_new_tokens, len(prompts) > self.num_rows)
        num_tokens = self.num_rows // num_shards("batch") * (1 + settings.num_drafts)
        self.weights = programs.weights(params, num_tokens) if unroll else ()
        ids_RX = np.tile(np.array(prompts[0][:num_shared], np.int32), (self.at_once, 1))
        self.prefix = programs.prefix(params, self._put(ids_RX))
        num_slots = max(self.lengths) + settings.max_new_tokens + settings.num_drafts
        self.decoding = programs.empty(params, self.num_rows, num_slots, unroll)

    @property
    def free(self) -> list[int]:
        return [place for place in range(self.num_rows) if place not in self.taken]

    def admit(self, waiting: list[int]) -> list[int]:
        """Gives free places to the first of the waiting prompts and others of its padded length; returns the rest."""
        same = [index for index in waiting if self.lengths[index] == self.lengths[waiting[0]]]
        chosen = same[: min(self.at_once, len(self.free))]
        filler = self.at_once - len(chosen)
        rows = [self.prompts[index] for index in [*chosen, *chosen[:1] * filler]]
        prompt = pad(rows, self.lengths[chosen[0]], self.programs.model.tokenizer.pad_id, left=False)
        places = self.free[: len(chosen)]
        places_R = np.array(places + [self.num_rows] * filler, np.int32)
        row_ids_R = np.array([row_number(self.names[index]) for index in chosen] + [-1] * filler, np.int32)
        arrays = self._put((prompt, places_R, row_ids_R))
        self.decoding = self.programs.admit(
            self.params, self.decoding, self.prefix, *arrays, self.key, self.temperature
        )
        self.taken |= dict(zip(places, chosen, strict=True))
        return [index for index in waiting if index not in chosen]

    @property
    def fewer(self) -> int:
        """The number of places that the last rows move to."""
        return max(min(SMALLEST, self.num_rows), self.num_rows // SHRINK_TO) if self.shrinks else self.num_rows

    def enough(self, num_waiting: int) -> int:
        """How many places must be free before something is to be done about it."""
        if num_waiting:
            return min(self.at_once, num_waiting)
        return self.num_rows - self.fewer if self.fewer < self.num_rows else self.num_rows

    def shrink(self) -> None:
        """Moves the last rows to fewer places if they are few enough, and may go on for some time."""
        if not 0 < len(self.taken) <= self.fewer < self.num_rows:
            return
        left = self.programs.settings.max_new_tokens - to_host(self.decoding.length_B - self.decoding.prompt_B)
        if max(left[place] for place in self.taken) < SHRINK_STEPS:
            self.shrinks = False
            return
        places = [*self.taken, *self.free][: self.fewer]
        self.decoding = self.programs.rows(self.decoding, jnp.array(places, jnp.int32))
        self.taken = dict(enumerate(self.taken.values()))
        self.num_rows = len(places)

    def decode(self, enough: int) -> dict[int, Completion]:
        """Decodes until so many places are free, or for some steps; returns the completions that are done."""
        arguments = self.key, self.temperature, jnp.int32(enough), jnp.int32(STEPS)
        self.decoding, steps = self.programs.decode(self.params, self.decoding, *arguments, *self.weights)
        done_B = to_host(self.decoding.done_B)
        self.steps = int(to_host(steps))
        finished = [place for place in self.taken if done_B[place]]
        if not finished:
            return {}
        text_BS, prompt_B, length_B = map(
            to_host, (self.decoding.text_BS, self.decoding.prompt_B, self.decoding.length_B)
        )
        stop_ids, completions = self.programs.model.tokenizer.stop_ids, {}
        for place in finished:
            tokens = text_BS[place, prompt_B[place] : length_B[place]].tolist()
            completions[self.taken.pop(place)] = Completion(tokens, tokens[-1] in stop_ids)
        return completions

    def _put(self, arrays):
        return arrays if self.mesh is None else put_batch(arrays, self.mesh)

    def _num_shared(self) -> int:
        """Number of tokens that all prompts begin with and that no prompt ends with, a multiple of SHARED."""
        if self.programs.model.config.ropes_depend_on_length:
            return 0
        shortest = min(self.prompts, key=len)
        same = (all(prompt[place] == token for prompt in self.prompts) for place, token in enumerate(shortest[:-1]))
        return sum(itertools.takewhile(bool, same)) // SHARED * SHARED

    def _lengths(self, shared: int) -> list[int]:
        """The padded length of each prompt: the shared prefix, and a bucket for the rest."""
        longest = self.programs.model.config.max_positions - self.programs.settings.max_new_tokens
        return [min(shared + bucket(len(prompt) - shared), longest) for prompt in self.prompts]


def _length(completion: Completion) -> int:
    return len(completion.tokens)
