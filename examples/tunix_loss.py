"""The losses in Tunix's own trainer: a small Llama of Tunix's, random weights, the teacher's top K from a file.

Tunix's losses want logits over the whole vocabulary; here the model's last product is left to the losses, which do it
in chunks. In an environment of its own:

    pip install google-tunix==0.1.7 raft-jax
    python examples/tunix_loss.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.llama3.model import Llama3, ModelConfig
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig
from tunix.sft.utils import build_positions_from_mask, make_causal_attn_mask

from raft_jax.losses import TopK, linear_cross_entropy, linear_top_k, linear_top_k_forward_kl, token_mean

CONFIG = ModelConfig(
    num_layers=2,
    vocab_size=256,
    embed_dim=32,
    hidden_dim=64,
    num_heads=4,
    head_dim=8,
    num_kv_heads=2,
    rope_theta=10_000,
    norm_eps=1e-5,
)
K, TEMPERATURE = 32, 1.5


def hidden_states(model: Llama3, tokens_BT, mask_BT):
    """The model's call without its last product."""
    positions_BT, attention_BTT = build_positions_from_mask(mask_BT), make_causal_attn_mask(mask_BT)
    hidden_BTD = model.embedder.encode(tokens_BT)
    for layer in model.layers:
        _, hidden_BTD = layer(hidden_BTD, positions_BT, None, attention_BTT)
    return model.final_norm(hidden_BTD)


def unembedding(model: Llama3):
    return model.lm_head.w[...]


def model_inputs(batch: dict) -> dict:
    """From what the data pipeline yields to the keywords of the loss."""
    return {"tokens_BT": batch["tokens"], "mask_BT": batch["mask"], "teacher": TopK(**batch["teacher"])}


def distillation_loss(model: Llama3, tokens_BT, mask_BT, teacher: TopK):
    hidden_BTD, unembedding_DV = hidden_states(model, tokens_BT, mask_BT)[:, :-1], unembedding(model)
    target_mask_BT = mask_BT[:, 1:]
    sft_BT = linear_cross_entropy(hidden_BTD, unembedding_DV, tokens_BT[:, 1:])
    kl_BT, metrics = linear_top_k_forward_kl(
        hidden_BTD, unembedding_DV, teacher, k=K, temperature=TEMPERATURE, return_metrics=True
    )
    sft, kl = token_mean(sft_BT, target_mask_BT), token_mean(kl_BT, target_mask_BT)
    aux = {name: token_mean(values_BT, target_mask_BT) for name, values_BT in metrics.items()}
    return sft + kl, {"loss": sft + kl, "sft": sft, "kl": kl} | aux


class Trainer(PeftTrainer):
    """Tunix's trainer, which keeps what else a loss says only where it is told how."""

    def train(self, batches) -> list[float]:
        self.seen: list[float] = []
        super().train(batches)
        return self.seen

    def _post_process_train_step(self, aux):
        print("  ".join(f"{name} {float(value):.3f}" for name, value in aux.items()))
        self.seen.append(float(aux["loss"]))


def write_teacher(path: Path, teacher: Llama3, tokens_BT, mask_BT) -> None:
    """One pass of the teacher, kept: 32 of 256 logits a token, and what the metrics want."""
    hidden_BTD = hidden_states(teacher, tokens_BT, mask_BT)[:, :-1]
    np.savez(path, **linear_top_k(hidden_BTD, unembedding(teacher), k=K, temperature=TEMPERATURE)._asdict())


def main(num_steps: int = 8) -> list[float]:
    tokens_BT = jax.random.randint(jax.random.key(2), (4, 12), 0, CONFIG.vocab_size)
    mask_BT = jnp.arange(12) < jnp.array([[12], [9], [12], [7]])
    with tempfile.TemporaryDirectory() as folder:
        write_teacher(Path(folder) / "teacher.npz", Llama3(CONFIG, rngs=nnx.Rngs(1)), tokens_BT, mask_BT)
        batch = {"tokens": tokens_BT, "mask": mask_BT, "teacher": dict(np.load(Path(folder) / "teacher.npz"))}
    config = TrainingConfig(max_steps=num_steps, eval_every_n_steps=num_steps)
    trainer = Trainer(Llama3(CONFIG, rngs=nnx.Rngs(0)), optax.adamw(1e-2), config)
    trainer.with_gen_model_input_fn(model_inputs).with_loss_fn(distillation_loss, has_aux=True)
    return trainer.train([batch] * num_steps)


if __name__ == "__main__":
    main()
