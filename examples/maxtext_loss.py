"""The losses in MaxText's own trainer: a small Llama of MaxText's, random weights, a teacher's top K in the batch.

Where `num_vocab_tiling` is above 1 MaxText computes no logits, but keeps the hidden states for a loss that does the
last product itself, in chunks; here the losses do. MaxText's wheel requires nothing outside of its extra for GPUs, so
what its trainer imports is named. In an environment of its own, with Python 3.12 or later:

    pip install maxtext==0.2.5 raft-jax aqtp drjax flax grain jaxtyping jinja2 ml_collections omegaconf optax \\
      orbax-checkpoint pathwaysutils pillow psutil pydantic qwix sentencepiece sympy tiktoken tokamax transformers
    XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu python examples/maxtext_loss.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from maxtext.input_pipeline import input_pipeline_interface as pipeline
from maxtext.trainers.pre_train import train
from maxtext.utils import globals as maxtext_globals
from maxtext.utils import maxtext_utils, model_creation_utils

from raft_jax.losses import TopK, linear_cross_entropy, linear_top_k, linear_top_k_forward_kl, token_mean

K, TEMPERATURE = 32, 1.5
SETTINGS = {
    "run_name": "tiny",
    "hardware": "cpu",
    "skip_jax_distributed_system": True,
    "attention": "dot_product",
    "dtype": "float32",
    "num_vocab_tiling": 2,
    "base_num_decoder_layers": 2,
    "base_emb_dim": 32,
    "base_mlp_dim": 64,
    "base_num_query_heads": 4,
    "base_num_kv_heads": 2,
    "head_dim": 8,
    "vocab_size": 256,
    "max_target_length": 16,
    "per_device_batch_size": 1,
    "max_segments_per_seq": 2,
    "dataset_type": "synthetic",
    "enable_checkpointing": False,
    "enable_goodput_recording": False,
    "log_config": False,
    "learning_rate": 1e-2,
    "warmup_steps_fraction": 0.0,
}


def hidden_states(model, config, data, is_train):
    """What the head is applied to, and what else the model kept on its way."""
    model(
        decoder_input_tokens=data["inputs"],
        decoder_positions=data["inputs_position"],
        decoder_segment_ids=data["inputs_segmentation"],
        enable_dropout=config.enable_dropout if is_train else False,
        decoder_target_tokens=data["targets"],
        decoder_target_mask=data["targets_segmentation"],
    )
    kept = nnx.pop(model, nnx.Intermediate).to_pure_dict()
    (hidden_BTD,) = kept["decoder"].pop("hidden_states")
    return model.decoder.decoder_norm(hidden_BTD), kept


def unembedding(model):
    return model.decoder.logits_dense.kernel[...]


def loss_fn(model, config, data, dropout_rng, params, sparsity_state=None, is_train=True):
    """In place of MaxText's; a batch without a teacher, as in evaluation, has the cross entropy alone."""
    hidden_BTD, kept = hidden_states(model, config, data, is_train)
    mask_BT = data["targets_segmentation"] != 0
    sft_BT = linear_cross_entropy(hidden_BTD, unembedding(model), data["targets"])
    loss_BT = sft_BT
    if "teacher_logits" in data:
        teacher = TopK(data["teacher_indices"], data["teacher_logits"])
        loss_BT += linear_top_k_forward_kl(hidden_BTD, unembedding(model), teacher, k=K, temperature=TEMPERATURE)
    xent_sum, total_weights = jnp.sum(jnp.where(mask_BT, sft_BT, 0)), jnp.sum(mask_BT)
    # MaxText divides the gradients of accumulated micro-batches by their tokens itself, and reports xent_sum alone.
    accumulates = is_train and config.gradient_accumulation_steps > 1
    loss = token_mean(loss_BT, mask_BT) * (total_weights if accumulates else 1)
    aux = {"xent_sum": xent_sum, "total_weights": total_weights, "intermediate_outputs": kept}
    return loss, aux | {"moe_lb_loss": 0.0, "indexer_loss": 0.0, "mtp_loss": 0.0}


class WithTeacher:
    """Batches of MaxText's, each with the teacher's top K: computed here, read from a file in a longer run."""

    def __init__(self, batches, config, mesh):
        self.batches, self.config = batches, config
        with jax.set_mesh(mesh):
            self.teacher = model_creation_utils.create_model(config, mesh, rngs=nnx.Rngs(params=1, dropout=1))

    def __iter__(self):
        return self

    def __next__(self):
        batch = next(self.batches)
        hidden_BTD, _ = hidden_states(self.teacher, self.config, batch, is_train=False)
        teacher = linear_top_k(hidden_BTD, unembedding(self.teacher), k=K)
        return batch | {"teacher_indices": teacher.indices_BTK, "teacher_logits": teacher.logits_BTK}


def install() -> None:
    """The loss, and the teacher in MaxText's batches and in what it compiles the step for beforehand."""
    create_data_iterator, get_shaped_batch = pipeline.create_data_iterator, maxtext_utils.get_shaped_batch

    def with_teacher(config, mesh):
        batches, eval_batches = create_data_iterator(config, mesh)
        return WithTeacher(batches, config, mesh), eval_batches

    def shaped_with_teacher(config, batch_sharding=None, is_eval=False):
        shaped = get_shaped_batch(config, batch_sharding, is_eval)
        if is_eval:
            return shaped
        for name, dtype in (("teacher_indices", jnp.int32), ("teacher_logits", jnp.float32)):
            shaped[name] = jax.ShapeDtypeStruct((*shaped["targets"].shape, K), dtype, sharding=batch_sharding)
        return shaped

    train.loss_fn = loss_fn
    pipeline.create_data_iterator, maxtext_utils.get_shaped_batch = with_teacher, shaped_with_teacher


def main(num_steps: int = 8, **settings) -> list[dict]:
    """The metrics of each step; the KL is what `learning/loss` has beyond `learning/lm_loss`."""
    install()
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "metrics.jsonl"
        settings = SETTINGS | {"steps": num_steps, "base_output_directory": folder, "metrics_file": metrics} | settings
        base = Path(maxtext_globals.MAXTEXT_CONFIGS_DIR) / "base.yml"
        train.main(["", str(base), *(f"{name}={value}" for name, value in settings.items())])
        lines = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]
    for line in lines:
        print(f"step {line['step']:.0f}: loss {line['learning/loss']:.3f}  sft {line['learning/lm_loss']:.3f}")
    return lines


if __name__ == "__main__":
    main()
