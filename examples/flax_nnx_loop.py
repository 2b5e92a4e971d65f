"""RAFT's losses in a plain Flax NNX loop with optax: rollout, answer-conditioned teacher, balanced objective.

python examples/flax_nnx_loop.py
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from raft_jax.losses import (
    TiedEmbedding,
    init_balance,
    linear_cross_entropy,
    linear_top_k_forward_kl,
    raft_objective,
    sequence_mean,
    update_balance,
)

VOCABULARY, WIDTH = 256, 32


class TinyModel(nnx.Module):
    """A stand-in for a language model: all that the losses want is hidden states and an unembedding."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, embedding_init=nnx.initializers.normal(1.0), rngs=rngs)
        self.mix = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def hidden(self, tokens_BT):
        tokens_BTD = self.embed(tokens_BT)
        before_BTD = jnp.cumsum(tokens_BTD, axis=1) / jnp.arange(1, tokens_BT.shape[1] + 1)[:, None]
        return jnp.tanh(self.mix(jnp.concatenate([tokens_BTD, before_BTD], axis=-1)))

    def unembedding(self):
        return TiedEmbedding(self.embed.embedding[...])


def predictions(model, prompt_BP, answer_BA):
    """Hidden states from which each token of the answer is predicted."""
    return model.hidden(jnp.concatenate([prompt_BP, answer_BA], axis=1))[:, prompt_BP.shape[1] - 1 : -1]


@partial(jax.jit, static_argnums=(0, 4))
def rollout(graphdef, params, question_BP, key, num_tokens):
    """The student answers for itself (Eq. 6)."""
    model = nnx.merge(graphdef, params)

    def next_token(tokens_BT, step):
        logits_BTV = model.embed.attend(model.hidden(tokens_BT))
        at = question_BP.shape[1] + step
        drawn_B = jax.random.categorical(jax.random.fold_in(key, step), logits_BTV[:, at - 1])
        return tokens_BT.at[:, at].set(drawn_B), None

    room_BT = jnp.pad(question_BP, ((0, 0), (0, num_tokens)))
    return jax.lax.scan(next_token, room_BT, jnp.arange(num_tokens))[0][:, question_BP.shape[1] :]


def make_step(graphdef, optimizer):
    def loss(params, teacher_params, balance, question_BP, answer_BA, rollout_BC):
        student, teacher = nnx.merge(graphdef, params), nnx.merge(graphdef, teacher_params)
        sft_BA = linear_cross_entropy(predictions(student, question_BP, answer_BA), student.unembedding(), answer_BA)
        told_BQ = jnp.concatenate([answer_BA, question_BP], axis=1)  # the teacher sees the answer (Eq. 7)
        kl_BC, metrics = linear_top_k_forward_kl(
            predictions(student, question_BP, rollout_BC),
            student.unembedding(),
            predictions(teacher, told_BQ, rollout_BC),
            teacher.unembedding(),
            k=64,
            temperature=1.5,
            return_metrics=True,
        )
        sft = sequence_mean(sft_BA, jnp.ones(answer_BA.shape, bool))
        kl = sequence_mean(kl_BC, jnp.ones(rollout_BC.shape, bool))
        weight, balance = update_balance(balance, sft, kl)
        return raft_objective(sft, kl, weight), (balance, {"sft": sft, "kl": kl, "weight": weight, **metrics})

    @jax.jit
    def step(params, opt_state, balance, teacher_params, *batch):
        (_, (balance, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(params, teacher_params, balance, *batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, balance, jax.tree.map(jnp.mean, metrics)

    return step


def main(num_steps: int = 8) -> list[float]:
    graphdef, params = nnx.split(TinyModel(nnx.Rngs(0)))
    teacher_params = jax.tree.map(jnp.copy, params)
    optimizer = optax.adamw(1e-2)
    step, opt_state, balance = make_step(graphdef, optimizer), optimizer.init(params), init_balance()
    question_BP = jax.random.randint(jax.random.key(1), (4, 6), 0, VOCABULARY)
    answer_BA = jnp.flip(question_BP, axis=1)

    sft_losses = []
    for index in range(num_steps):
        rollout_BC = rollout(graphdef, params, question_BP, jax.random.fold_in(jax.random.key(2), index), 8)
        params, opt_state, balance, metrics = step(
            params, opt_state, balance, teacher_params, question_BP, answer_BA, rollout_BC
        )
        print(f"step {index + 1}: " + "  ".join(f"{name} {float(value):.3f}" for name, value in metrics.items()))
        sft_losses.append(float(metrics["sft"]))
    return sft_losses


if __name__ == "__main__":
    main()
