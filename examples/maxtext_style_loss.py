"""A loss over logits with the signature of MaxText's `loss_fn`: padded vocabulary, packed rows, (loss, aux) out.

MaxText hands the model, a config, a batch with `inputs`, `targets`, `targets_segmentation` (0 is padding), a key
and the parameters to one function. Replace its cross entropy by the two losses below; where the teacher's logits
are in the batch, they are distilled.

    python examples/maxtext_style_loss.py
"""

from __future__ import annotations

from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from raft_jax.losses import cross_entropy, token_mean, top_k_forward_kl

CONFIG = SimpleNamespace(vocab_size=250, padded_vocab_size=256, width=32, distill_k=32, distill_temperature=1.5)


class TinyModel(nn.Module):
    """A stand-in for a language model that returns logits over a padded vocabulary, in bfloat16."""

    @nn.compact
    def __call__(self, tokens_BT):
        tokens_BTD = nn.Embed(CONFIG.padded_vocab_size, CONFIG.width)(tokens_BT)
        before_BTD = jnp.cumsum(tokens_BTD, axis=1) / jnp.arange(1, tokens_BT.shape[1] + 1)[:, None]
        hidden_BTD = jnp.tanh(nn.Dense(CONFIG.width)(jnp.concatenate([tokens_BTD, before_BTD], axis=-1)))
        return nn.Dense(CONFIG.padded_vocab_size)(hidden_BTD).astype(jnp.bfloat16)


def loss_fn(model, config, data, dropout_rng, params, is_train=True):
    logits_BTV = model.apply(params, data["inputs"])
    mask_BT = data["targets_segmentation"] != 0
    sft = token_mean(cross_entropy(logits_BTV, data["targets"], vocab_size=config.vocab_size), mask_BT)
    aux = {"sft_loss": sft, "total_weights": jnp.sum(mask_BT)}
    if not is_train or "teacher_logits" not in data:
        return sft, aux
    kl_BT, metrics = top_k_forward_kl(
        logits_BTV,
        data["teacher_logits"],
        k=config.distill_k,
        temperature=config.distill_temperature,
        vocab_size=config.vocab_size,
        return_metrics=True,
    )
    kl = token_mean(kl_BT, mask_BT)
    return sft + kl, aux | {"kl_loss": kl} | {name: token_mean(x, mask_BT) for name, x in metrics.items()}


def main(num_steps: int = 8) -> list[float]:
    model = TinyModel()
    tokens_BT = jax.random.randint(jax.random.key(2), (4, 13), 0, CONFIG.vocab_size)
    data = {
        "inputs": tokens_BT[:, :-1],
        "targets": tokens_BT[:, 1:],
        "targets_segmentation": (jnp.arange(12) < jnp.array([[12], [9], [12], [7]])).astype(jnp.int32),
    }
    params = model.init(jax.random.key(0), data["inputs"])
    data["teacher_logits"] = model.apply(model.init(jax.random.key(1), data["inputs"]), data["inputs"])
    optimizer = optax.adamw(1e-2)
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state, data):
        (loss, aux), grads = jax.value_and_grad(loss_fn, argnums=4, has_aux=True)(model, CONFIG, data, None, params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss, aux

    losses = []
    for index in range(num_steps):
        params, opt_state, loss, aux = step(params, opt_state, data)
        print(f"step {index + 1}: " + "  ".join(f"{name} {float(value):.3f}" for name, value in aux.items()))
        losses.append(float(loss))
    return losses


if __name__ == "__main__":
    main()
