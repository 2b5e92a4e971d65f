"""Log-likelihoods of given answers under a model, in batches with a few compiled shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import numpy as np

from raft_jax.data.batches import pad
from raft_jax.losses import linear_cross_entropy, sequence_mean
from raft_jax.models import Model
from raft_jax.sampling.engine import bucket, rows_per_batch
from raft_jax.sharding import mesh_axes, put_batch, to_host, use_mesh
from raft_jax.tokens import Tokens, predicting


class Scorer:
    """Scores (prompt, answer) pairs of token ids."""

    def __init__(self, model: Model, batch_size: int = 16, mesh: jax.sharding.Mesh | None = None):
        self.model, self.batch_size, self.mesh = model, batch_size, mesh

        @model.jit
        def mean_logprob(params, prompt: Tokens, answer: Tokens):
            hidden_BAD = answer_hidden(model, params, prompt, answer)
            nll_BA = linear_cross_entropy(
                hidden_BAD,
                model.unembedding(params),
                answer.ids,
                vocab_shards=mesh_axes("vocabulary"),
                **model.head_settings,
            )
            return -answer_means(nll_BA, answer.mask)

        self._mean_logprob = mean_logprob

    def mean_logprob(
        self,
        params,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Mean log-likelihood per answer token given the prompt, nats: `[num_pairs]` float32."""
        return self.over_pairs(lambda *pair: self._mean_logprob(params, *pair), prompts, answers, progress)

    def over_pairs(
        self,
        function: Callable[..., jax.Array],
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Applies `function(prompt, answer) -> values_B`, which takes Tokens, to all pairs, in batches.

        `progress` is called after each batch with the number of pairs in it. Returns `[num_pairs]` float32.
        """
        values = np.zeros(len(prompts), np.float32)
        order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]) + len(answers[index]), index))
        pad_id = self.model.tokenizer.pad_id
        num_rows = rows_per_batch(self.batch_size, len(prompts), self.mesh)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            filled = chosen + chosen[:1] * (num_rows - len(chosen))
            pair = []
            for rows, left in ((prompts, True), (answers, False)):
                picked = [rows[index] for index in filled]
                pair.append(pad(picked, bucket(max(map(len, picked))), pad_id, left=left))
            if self.mesh is not None:
                pair = put_batch(pair, self.mesh)
            with use_mesh(self.mesh):
                values[chosen] = to_host(function(*pair))[: len(chosen)]
            if progress is not None:
                progress(len(chosen))
        return values


def answer_means(values_BA: jax.Array, mask_BA: jax.Array) -> jax.Array:
    """Mean of each answer's values over its own tokens: `[B]`."""
    return jax.vmap(lambda values_A, mask_A: sequence_mean(values_A[None], mask_A[None]))(values_BA, mask_BA)


def answer_hidden(model: Model, params, prompt: Tokens, answer: Tokens) -> jax.Array:
    """Hidden states `[B, A, D]` from which the model predicts each token of an answer that follows its prompt."""
    return predicting(partial(model.hidden, params), prompt, answer)
