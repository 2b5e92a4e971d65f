"""The losses in an Equinox model's loop: cross entropy and a distillation loss of your choice.

python examples/equinox_loop.py
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from raft_jax.losses import linear_cross_entropy, linear_forward_kl, linear_top_k_forward_kl, token_mean

VOCABULARY, WIDTH = 256, 32
DISTILLATION = {"top_k": linear_top_k_forward_kl, "whole": linear_forward_kl}


class TinyModel(eqx.Module):
    """A stand-in for a language model: all that the losses want is hidden states and an unembedding."""

    embed: eqx.nn.Embedding
    mix: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.embed = eqx.nn.Embedding(VOCABULARY, WIDTH, key=keys[0])
        self.mix = eqx.nn.Linear(2 * WIDTH, WIDTH, key=keys[1])
        self.head = eqx.nn.Linear(WIDTH, VOCABULARY, key=keys[2])

    def hidden(self, tokens_T):
        tokens_TD = jax.vmap(self.embed)(tokens_T)
        before_TD = jnp.cumsum(tokens_TD, axis=0) / jnp.arange(1, len(tokens_T) + 1)[:, None]
        return jnp.tanh(jax.vmap(self.mix)(jnp.concatenate([tokens_TD, before_TD], axis=-1)))


def loss(student, teacher, tokens_BT, mask_BT, distillation):
    hidden_BTD = jax.vmap(student.hidden)(tokens_BT)[:, :-1]
    teacher_BTD = jax.vmap(teacher.hidden)(tokens_BT)[:, :-1]
    labels_BT, mask_BT = tokens_BT[:, 1:], mask_BT[:, 1:]
    # An Equinox Linear keeps its weight as [out, in]: its transpose is the unembedding.
    unembedding_DV, bias_V = student.head.weight.T, student.head.bias
    sft = token_mean(linear_cross_entropy(hidden_BTD, unembedding_DV, labels_BT, bias_V=bias_V), mask_BT)
    kl = token_mean(
        DISTILLATION[distillation](
            hidden_BTD,
            unembedding_DV,
            teacher_BTD,
            teacher.head.weight.T,
            student_bias_V=bias_V,
            teacher_bias_V=teacher.head.bias,
            temperature=1.5,
        ),
        mask_BT,
    )
    return sft + kl, (sft, kl)


def main(num_steps: int = 8, distillation: str = "top_k") -> list[float]:
    student, teacher = TinyModel(jax.random.key(0)), TinyModel(jax.random.key(1))
    optimizer = optax.adamw(1e-2)
    opt_state = optimizer.init(eqx.filter(student, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(student, opt_state, tokens_BT, mask_BT):
        (value, parts), grads = eqx.filter_value_and_grad(loss, has_aux=True)(
            student, teacher, tokens_BT, mask_BT, distillation
        )
        updates, opt_state = optimizer.update(grads, opt_state, eqx.filter(student, eqx.is_inexact_array))
        return eqx.apply_updates(student, updates), opt_state, value, parts

    tokens_BT = jax.random.randint(jax.random.key(2), (4, 12), 0, VOCABULARY)
    mask_BT = jnp.arange(12) < jnp.array([[12], [9], [12], [7]])
    values = []
    for index in range(num_steps):
        student, opt_state, value, (sft, kl) = step(student, opt_state, tokens_BT, mask_BT)
        print(f"step {index + 1}: loss {float(value):.3f}  sft {float(sft):.3f}  kl {float(kl):.3f}")
        values.append(float(value))
    return values


if __name__ == "__main__":
    main()
