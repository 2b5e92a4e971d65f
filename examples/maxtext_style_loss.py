"""A loss over logits with the signature of MaxText's `loss_fn` (0.2.5, NNX): padded vocabulary, packed rows.

MaxText calls `loss_fn(model, config, data, dropout_rng, params, is_train=...)` with an NNX module, a batch with
`inputs`, `inputs_position`, `inputs_segmentation`, `targets` and `targets_segmentation` (0 is padding), and neither
key nor parameters. It takes the loss and reads `xent_sum`, `total_weights`, `moe_lb_loss` and `intermediate_outputs`
of what comes beside it. With MaxText,

    maxtext.trainers.pre_train.train.loss_fn = loss_fn

before its `train_loop`; the teacher's logits are one more entry of the batch, and where there are none (as in
evaluation) the loss is the cross entropy alone. MaxText divides the gradients of accumulated micro-batches by their
tokens itself: return sums there, as its own loss does. Here a model with the signature of MaxText's stands in for it.

    python examples/maxtext_style_loss.py
"""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from raft_jax.losses import cross_entropy, token_mean, top_k_forward_kl

CONFIG = SimpleNamespace(
    vocab_size=250,
    padded_vocab_size=256,
    width=32,
    enable_dropout=False,
    distill_k=32,
    distill_temperature=1.5,
)


class TinyModel(nnx.Module):
    """Logits over a padded vocabulary in bfloat16; each token sees those of its own text up to itself."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(CONFIG.padded_vocab_size, CONFIG.width, rngs=rngs)
        self.mix = nnx.Linear(2 * CONFIG.width, CONFIG.width, rngs=rngs)
        self.head = nnx.Linear(CONFIG.width, CONFIG.padded_vocab_size, rngs=rngs)

    def __call__(self, decoder_input_tokens, decoder_positions, decoder_segment_ids, enable_dropout, **targets):
        tokens_BTD = self.embed(decoder_input_tokens)
        same_text_BTT = decoder_segment_ids[:, :, None] == decoder_segment_ids[:, None, :]
        seen_BTT = jnp.tril(same_text_BTT).astype(tokens_BTD.dtype)
        before_BTD = seen_BTT @ tokens_BTD / (decoder_positions + 1)[..., None]
        hidden_BTD = jnp.tanh(self.mix(jnp.concatenate([tokens_BTD, before_BTD], axis=-1)))
        return self.head(hidden_BTD).astype(jnp.bfloat16)


def logits_of(model, config, data, is_train):
    return model(
        decoder_input_tokens=data["inputs"],
        decoder_positions=data["inputs_position"],
        decoder_segment_ids=data["inputs_segmentation"],
        enable_dropout=config.enable_dropout if is_train else False,
        decoder_target_tokens=data["targets"],
        decoder_target_mask=data["targets_segmentation"],
    )


def loss_fn(model, config, data, dropout_rng, params, sparsity_state=None, is_train=True):
    logits_BTV = logits_of(model, config, data, is_train)
    intermediate_outputs = nnx.pop(model, nnx.Intermediate).to_pure_dict()  # else the model's state would grow
    mask_BT = data["targets_segmentation"] != 0
    sft_BT = cross_entropy(logits_BTV, data["targets"], vocab_size=config.vocab_size)
    sft = token_mean(sft_BT, mask_BT)
    aux = {
        "xent_sum": jnp.sum(jnp.where(mask_BT, sft_BT, 0)),
        "total_weights": jnp.sum(mask_BT),
        "moe_lb_loss": 0.0,
        "intermediate_outputs": intermediate_outputs | {"logits": logits_BTV},
    }
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


def packed_batch() -> dict:
    """Four rows of twelve tokens: two texts in the first, padding after the others."""
    tokens_BT = jax.random.randint(jax.random.key(2), (4, 13), 0, CONFIG.vocab_size)
    lengths_B = jnp.array([[12], [9], [12], [7]])
    segments_BT = (jnp.arange(12) < lengths_B).astype(jnp.int32).at[0, 5:].set(2)
    positions_BT = jnp.broadcast_to(jnp.arange(12), (4, 12)).at[0, 5:].add(-5)
    return {
        "inputs": tokens_BT[:, :-1],
        "inputs_position": positions_BT,
        "inputs_segmentation": segments_BT,
        # The last token of a text does not predict the first of the next one.
        "targets": tokens_BT[:, 1:],
        "targets_segmentation": segments_BT.at[0, 4].set(0),
    }


def main(num_steps: int = 8) -> list[float]:
    model, teacher, data = TinyModel(nnx.Rngs(0)), TinyModel(nnx.Rngs(1)), packed_batch()
    data["teacher_logits"] = logits_of(teacher, CONFIG, data, is_train=False)
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, data):
        (loss, aux), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model, CONFIG, data, None, None)
        optimizer.update(model, grads)
        return loss, {name: value for name, value in aux.items() if name != "intermediate_outputs"}

    losses = []
    for index in range(num_steps):
        loss, aux = step(model, optimizer, data)
        print(f"step {index + 1}: " + "  ".join(f"{name} {float(value):.3f}" for name, value in aux.items()))
        losses.append(float(loss))
    return losses


if __name__ == "__main__":
    main()
