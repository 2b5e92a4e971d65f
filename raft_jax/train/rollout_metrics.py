"""What goes wrong with rollouts first: they are cut at the limit, they repeat themselves, they no longer end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from raft_jax.losses import linear_cross_entropy
from raft_jax.tokens import Tokens

NGRAM = 4


def rollout_metrics(rollout: Tokens, stop_ids: Sequence[int]) -> dict[str, jax.Array]:
    """Metrics of a batch of rollouts, as float32 scalars.

    Args:
      rollout: [B, C]; the end-of-turn token is part of it.
      stop_ids: the tokens that end a turn.

    Returns:
      rollout_length: mean number of tokens, the end-of-turn token included.
      cut_share: share of the rollouts that were cut at the limit C.
      repetition: share of the 4-grams that stand earlier in the same rollout, too; 0 if there are no 4-grams.

    Example:
      >>> ids = jnp.array([[1, 2, 3, 4, 1, 2, 3, 4], [5, 6, 9, 0, 0, 0, 0, 0]])
      >>> rollout = Tokens(ids, jnp.arange(8) < jnp.array([[8], [3]]))
      >>> {name: float(value) for name, value in rollout_metrics(rollout, [9]).items()}
      {'rollout_length': 5.5, 'cut_share': 0.5, 'repetition': 0.20000000298023224}
    """
    mask = rollout.mask
    ended = jnp.isin(rollout.ids[:, -1], jnp.array(stop_ids, rollout.ids.dtype)) if len(stop_ids) else False
    num_repeated, num_ngrams = repeated_ngrams(rollout)
    return {
        "rollout_length": jnp.mean(jnp.sum(mask, axis=-1, dtype=jnp.float32)),
        "cut_share": jnp.mean((mask[:, -1] & ~ended).astype(jnp.float32)),
        "repetition": num_repeated / jnp.maximum(num_ngrams, 1).astype(jnp.float32),
    }


def repeated_ngrams(tokens: Tokens, n: int = NGRAM) -> tuple[jax.Array, jax.Array]:
    """The number of n-grams that stand earlier in the same row, too, and the number of all n-grams, over all rows.

    Rows are padded on the right. The n-grams are sorted, so that time and memory are near to linear in their number.
    """
    if tokens.length < n:
        return jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    count = tokens.length - n + 1
    shifted = [tokens.ids[:, start : start + count] for start in range(n)]
    padding = ~tokens.mask[:, n - 1 :]
    padding, *sorted_ = jax.lax.sort((padding.astype(jnp.int32), *shifted), dimension=1, num_keys=n + 1)
    same = jnp.stack([column[:, 1:] == column[:, :-1] for column in sorted_]).all(axis=0)
    return jnp.sum(same & (padding[:, 1:] == 0)), jnp.sum(padding == 0)


def end_of_turn_probability(hidden_BCD, unembedding: Any, rollout: Tokens, stop_ids: Sequence[int], **linear):
    """The probability of ending the turn where each rollout has its last token, summed over rows; and their number.

    Args:
      hidden_BCD: the hidden states from which the rollout's tokens are predicted.
      unembedding, linear: as in the linear losses.
      rollout, stop_ids: as in `rollout_metrics`. Empty rollouts do not count.
    """
    lengths_B = jnp.sum(rollout.mask, axis=-1)
    place_B = jnp.maximum(lengths_B - 1, 0)
    last_BD = jnp.take_along_axis(hidden_BCD, place_B[:, None, None], axis=1)[:, 0]
    labels_SB = jnp.broadcast_to(jnp.array(stop_ids, jnp.int32)[:, None], (len(stop_ids), len(last_BD)))
    hidden_SBD = jnp.broadcast_to(last_BD, (len(stop_ids), *last_BD.shape))
    nll_SB = linear_cross_entropy(*jax.lax.stop_gradient((hidden_SBD, unembedding)), labels_SB, **linear)
    probs_B = jnp.sum(jnp.exp(-nll_SB), axis=0)
    return jnp.sum(jnp.where(lengths_B > 0, probs_B, 0)), jnp.sum(lengths_B > 0)
