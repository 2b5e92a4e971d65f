"""Token ids with their mask, and batches of them: the types that data, sampling, models and training exchange."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp


@partial(jax.tree_util.register_dataclass, data_fields=("ids", "mask"), meta_fields=("max_tokens", "shared_prefix"))
@dataclass(frozen=True)
class Tokens:
    """Rows of token ids, and which of them are real. The static fields let a model skip padding; jit recompiles when
    one of them changes.

    Attributes:
      ids: [B, T], int32.
      mask: [B, T], bool, True on real tokens; or int32 segment ids, 0 at padding
        (see raft_jax.models.decoder.Decoder.hidden). None: every token is real.
      max_tokens: token capacity: an upper bound on the number of real tokens on one device, in one micro-batch. None if
        unknown; padding is then computed like any token.
      shared_prefix: number of equal tokens that all rows begin with. They count once in `max_tokens`.

    Example:
      >>> prompt, answer = Tokens(jnp.array([[0, 5]]), jnp.array([[False, True]]), 1), Tokens(jnp.array([[6, 7]]))
      >>> concatenate(prompt, answer)
      Tokens(ids=Array([[0, 5, 6, 7]], dtype=int32), mask=Array([[False,  True,  True,  True]], dtype=bool), \
max_tokens=None, shared_prefix=0)
    """

    ids: jax.Array
    mask: jax.Array | None = None
    max_tokens: int | None = None
    shared_prefix: int = 0

    @property
    def real(self) -> jax.Array:
        """[B, T], bool or int32: the mask; all True if it is None."""
        return jnp.ones(self.ids.shape, bool) if self.mask is None else self.mask

    @property
    def length(self) -> int:
        """T."""
        return self.ids.shape[1]


class Batch(NamedTuple):
    """One training batch. Prompts are padded on the left, completions on the right."""

    prompt: Tokens
    answer: Tokens  # includes the end-of-turn token
    teacher_prompt: Tokens
    row_ids: jax.Array  # [B], int32: identifies each row's stream of random numbers
    rollout: Tokens | None = None  # answers sampled by the student, if a term of the loss needs them


def concatenate(first: Tokens, *others: Tokens) -> Tokens:
    """Concatenates along time to `[B, T + T' + ...]`; `shared_prefix` is that of the first."""
    parts = (first, *others)
    counts = [part.max_tokens for part in parts]
    return Tokens(
        jnp.concatenate([part.ids for part in parts], axis=1),
        jnp.concatenate([part.real for part in parts], axis=1),
        None if None in counts else sum(counts),
        0 if None in counts else first.shared_prefix,
    )


def predicting(hidden_fn: Callable[[Tokens], jax.Array], prompt: Tokens, completion: Tokens) -> jax.Array:
    """Hidden states `[B, C, D]` from which each token of a completion is predicted, given its prompt."""
    return hidden_fn(concatenate(prompt, completion))[:, prompt.length - 1 : -1]
