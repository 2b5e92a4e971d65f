"""Distances between a tuned model and the base model: KL of the predictions, and distance of the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from raft_jax.losses import linear_forward_kl
from raft_jax.models import Model
from raft_jax.models.xla_cpu import compiler_options
from raft_jax.sampling import Scorer, answer_hidden, answer_means
from raft_jax.scores import WeightDistance
from raft_jax.sharding import mesh_axes
from raft_jax.tokens import Tokens


def make_divergence(
    model: Model, batch_size: int = 16, mesh: jax.sharding.Mesh | None = None
) -> Callable[..., np.ndarray]:
    """KL(base ‖ tuned) over the whole vocabulary, mean over the tokens of each of the base model's own answers.

    Returns:
      `divergence(base_params, params, prompts, answers, progress=None)` → `[num_answers]` float32, nats per token.
      One program per shape is compiled and used for all parameters.
    """
    scorer = Scorer(model, batch_size, mesh)

    @model.jit
    def mean_kl(base_params, params, prompt: Tokens, answer: Tokens):
        base_BAD, tuned_BAD = (answer_hidden(model, weights, prompt, answer) for weights in (base_params, params))
        kl_BA = linear_forward_kl(
            tuned_BAD,
            model.unembedding(params),
            base_BAD,
            model.unembedding(base_params),
            temperature=1.0,
            vocab_shards=mesh_axes("vocabulary"),
            **model.head_settings,
        )
        return answer_means(kl_BA, answer.real)

    def divergence(
        base_params,
        params,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        return scorer.over_pairs(lambda *pair: mean_kl(base_params, params, *pair), prompts, answers, progress)

    return divergence


def _squares(params, base_params):
    """Sums of squares of the difference and of the base, per layer for parameters that are stacked over layers."""

    def sums(pair):
        tuned, base = (array.astype(jnp.float32) for array in pair)
        return jnp.sum((tuned - base) ** 2), jnp.sum(base**2)

    def of(name):  # layer by layer: no stack is ever held in float32
        pair = params[name], base_params[name]
        return jax.lax.map(sums, pair) if _is_stacked(name) else sums(pair)

    return {name: of(name) for name in params}


def _is_stacked(name: str) -> bool:
    return name.rpartition("_")[2].startswith("L")


def weight_distance(params: Mapping[str, jax.Array], base_params: Mapping[str, jax.Array]) -> WeightDistance:
    """Relative distance ‖W − W₀‖ / ‖W₀‖ of each layer, of the embedding, and the mean over the layers (Fig. 3)."""
    jitted = jax.jit(_squares, compiler_options=compiler_options(base_params))
    squares = jax.device_get(jitted(params, base_params))
    stacked = [values for name, values in squares.items() if _is_stacked(name)]
    layers = np.sqrt(sum(moved for moved, _ in stacked) / sum(base for _, base in stacked))
    moved, base = squares["embedding_VD"]
    return WeightDistance(float(layers.mean()), layers.tolist(), float(np.sqrt(moved / base)))
