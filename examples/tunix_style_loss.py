"""A loss for trainers that take `loss_fn(model, **inputs)`, as Tunix's do; the teacher's top K comes from a file.

With Tunix the last lines of `main` are

    trainer = PeftTrainer(model, optimizer, config)
    trainer = trainer.with_gen_model_input_fn(model_inputs).with_loss_fn(distillation_loss, has_aux=True)
    trainer.train(batches)

Here a trainer of ten lines stands in for it, called in the same way.

    python examples/tunix_style_loss.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from raft_jax.losses import TopK, linear_cross_entropy, linear_top_k, linear_top_k_forward_kl, token_mean

VOCABULARY, WIDTH = 256, 32


class TinyModel(nnx.Module):
    """A stand-in for a language model whose call returns hidden states."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.mix = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)
        self.lm_head = nnx.Param(jax.random.normal(rngs.params(), (WIDTH, VOCABULARY)) * WIDTH**-0.5)

    def __call__(self, tokens_BT):
        tokens_BTD = self.embed(tokens_BT)
        before_BTD = jnp.cumsum(tokens_BTD, axis=1) / jnp.arange(1, tokens_BT.shape[1] + 1)[:, None]
        return jnp.tanh(self.mix(jnp.concatenate([tokens_BTD, before_BTD], axis=-1)))


def model_inputs(batch: dict) -> dict:
    """From what the data pipeline yields to the keywords of the loss."""
    return {"input_tokens": batch["tokens"], "input_mask": batch["mask"], "teacher": TopK(**batch["teacher"])}


def distillation_loss(model, input_tokens, input_mask, teacher: TopK):
    hidden_BTD, unembedding_DV = model(input_tokens)[:, :-1], model.lm_head[...]
    mask_BT = input_mask[:, 1:]
    sft_BT = linear_cross_entropy(hidden_BTD, unembedding_DV, input_tokens[:, 1:])
    kl_BT, metrics = linear_top_k_forward_kl(
        hidden_BTD, unembedding_DV, teacher, k=32, temperature=1.5, return_metrics=True
    )
    sft, kl = token_mean(sft_BT, mask_BT), token_mean(kl_BT, mask_BT)
    aux = {"sft": sft, "kl": kl} | {name: token_mean(values_BT, mask_BT) for name, values_BT in metrics.items()}
    return sft + kl, aux


class StandInTrainer:
    """The part of Tunix's trainer that a loss meets."""

    def __init__(self, model, optimizer):
        self.model, self.optimizer = model, nnx.Optimizer(model, optimizer, wrt=nnx.Param)

    def with_gen_model_input_fn(self, function):
        self.model_inputs = function
        return self

    def with_loss_fn(self, function, has_aux=False):
        self.value_and_grad = nnx.value_and_grad(function, has_aux=has_aux)
        return self

    def train(self, batches):
        @nnx.jit
        def step(model, optimizer, batch):
            (loss, aux), grads = self.value_and_grad(model, **self.model_inputs(batch))
            optimizer.update(model, grads)
            return loss, aux

        for batch in batches:
            yield step(self.model, self.optimizer, batch)


def write_teacher(path: Path, teacher: TinyModel, tokens_BT: jax.Array) -> None:
    """One pass of the teacher, kept: 32 of 256 logits a token, and what the metrics want."""
    kept = linear_top_k(teacher(tokens_BT)[:, :-1], teacher.lm_head[...], k=32, temperature=1.5)
    np.savez(path, **kept._asdict())


def main(num_steps: int = 8) -> list[float]:
    tokens_BT = jax.random.randint(jax.random.key(2), (4, 12), 0, VOCABULARY)
    with tempfile.TemporaryDirectory() as folder:
        write_teacher(Path(folder) / "teacher.npz", TinyModel(nnx.Rngs(1)), tokens_BT)
        batch = {
            "tokens": tokens_BT,
            "mask": jnp.arange(12) < jnp.array([[12], [9], [12], [7]]),
            "teacher": dict(np.load(Path(folder) / "teacher.npz")),
        }
    trainer = StandInTrainer(TinyModel(nnx.Rngs(0)), optax.adamw(1e-2))
    trainer = trainer.with_gen_model_input_fn(model_inputs).with_loss_fn(distillation_loss, has_aux=True)
    losses = []
    for loss, aux in trainer.train([batch] * num_steps):
        print(f"loss {float(loss):.3f}  " + "  ".join(f"{name} {float(value):.3f}" for name, value in aux.items()))
        losses.append(float(loss))
    return losses


if __name__ == "__main__":
    main()
