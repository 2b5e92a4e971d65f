"""RAFT's train step: cross entropy on the refined answers plus adaptive distillation on the student's rollouts.

Letters: B batch, A answer, C rollout, T time, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from raft_jax.losses import linear_cross_entropy, linear_top_k_forward_kl, sequence_weight, update_balance
from raft_jax.sharding import mesh_axes
from raft_jax.tokens import Batch, Tokens, predicting
from raft_jax.train.accumulate import accumulated_vjp
from raft_jax.train.state import TrainState
from raft_jax.unpadding import make_unpadding


@dataclass(frozen=True)
class LossConfig:
    """The functions and settings that the terms of the loss need.

    Attributes:
      completion_hidden: `(params, prompt, *completions) -> [hidden_BCD, ...]`, the hidden states from which each token
        of each completion is predicted; prompt and completions are Tokens. See `Model.completion_hidden`, and
        `completions_of` for other models.
      unembedding: `(params) -> unembedding_DV`, or `raft_jax.losses.TiedEmbedding(embedding_VD)`.
      forward_params: `(params, teacher_params) -> params of completion_hidden`; gradients flow through it. For training
        float32 master weights of a bfloat16 model, or adapters of the teacher.
      top_k, temperature: K and τ (T in the paper) of Eqs. 8-10.
      reduction: "sequence" (mean over each row's tokens, then rows) or "token" (mean over all tokens).
      head_settings: further arguments of the linear losses: chunk_size, logit_scale, logit_softcap, vocab_size.
    """

    completion_hidden: Callable[..., list[jax.Array]]
    unembedding: Callable[[Any], Any]
    forward_params: Callable[[Any, Any], Any] = lambda params, teacher_params: params
    top_k: int = 512
    temperature: float = 1.5
    reduction: str = "sequence"
    head_settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.reduction not in ("sequence", "token"):
            raise ValueError(f"reduction {self.reduction!r} is not known; use 'sequence' or 'token'")

    def count(self, tokens: Tokens) -> jax.Array | int:
        """The divisor of a term's sum: the number of rows, or of real tokens."""
        return len(tokens.ids) if self.reduction == "sequence" else jnp.maximum(jnp.sum(tokens.mask), 1)

    def token_weights(self, tokens: Tokens) -> jax.Array:
        """[B, T], float32: the weight of each token in a term's sum."""
        if self.reduction == "token":
            return tokens.mask.astype(jnp.float32)
        return sequence_weight(tokens.mask) * len(tokens.ids)

    @property
    def linear(self) -> dict[str, Any]:
        """Keyword arguments of all linear losses."""
        return {"vocab_shards": mesh_axes("vocabulary"), **self.head_settings}


def sft_term(config: LossConfig, params, teacher_params, batch: Batch, hidden_BAD) -> tuple[jax.Array, dict]:
    """Eq. 5, summed over rows or tokens: cross entropy on the answers."""
    answer = batch.answer
    unpad, _ = make_unpadding(answer.mask, answer.max_tokens)
    hidden_BTD, labels_BT, weight_BT = map(unpad, (hidden_BAD, answer.ids, config.token_weights(answer)))
    unembedding = config.unembedding(params)
    return linear_cross_entropy(hidden_BTD, unembedding, labels_BT, weight_BT=weight_BT, **config.linear), {}


def kl_term(config: LossConfig, params, teacher_params, batch: Batch, student_BCD) -> tuple[jax.Array, dict]:
    """Eqs. 7-10, summed over rows or tokens: KL between both models at the same prefixes of the student's rollout."""
    rollout = batch.rollout
    (teacher_BCD,) = config.completion_hidden(teacher_params, batch.teacher_prompt, rollout)
    unpad, _ = make_unpadding(rollout.mask, rollout.max_tokens)
    total, metrics = linear_top_k_forward_kl(
        unpad(student_BCD),
        config.unembedding(params),
        jax.lax.stop_gradient(unpad(teacher_BCD)),
        jax.lax.stop_gradient(config.unembedding(teacher_params)),
        k=config.top_k,
        temperature=config.temperature,
        weight_BT=unpad(config.token_weights(rollout)),
        return_metrics=True,
        **config.linear,
    )
    mask_BT = unpad(rollout.mask)
    return total, {name: jnp.sum(jnp.where(mask_BT, values_BT, 0)) for name, values_BT in metrics.items()}


# Each term of the loss, and the completion that it is computed on (a field of Batch). `term(config, params,
# teacher_params, batch, hidden_BCD) -> (sum, {metric: sum over the completion's tokens})`.
TERMS = {"sft": (sft_term, "answer"), "kl": (kl_term, "rollout")}


def make_train_step(
    config: LossConfig,
    optimizer: optax.GradientTransformation,
    *,
    terms: tuple[str, ...] = ("sft", "kl"),
    ema_decay: float = 0.9,
    fixed_weight: float | None = None,
    num_micro_batches: int = 1,
) -> Callable:
    """Builds the pure train step; jit it and donate the state.

    Args:
      config: the models and the losses.
      optimizer: an optax transformation.
      terms: names in TERMS. With "sft" alone the batch needs no rollout, and teacher_params may be None unless
        `config.forward_params` needs them.
      ema_decay: β of Eq. 11.
      fixed_weight: a constant λ, in place of Eq. 12.
      num_micro_batches: number of groups that the rows are split into, run one after the other. The gradients of each
        term are accumulated separately and combined once λ of the whole batch is known, so only memory changes.

    Returns:
      `train_step(state, teacher_params, batch) -> (state, metrics)`. `batch` is a raft_jax.tokens.Batch; metrics are
      float32 scalars, losses in nats.

    RAFT (arXiv:2606.00147), Eqs. 5-12.
    """

    def losses(params, teacher_params, batch, names):
        """The sum of each term, and the sums from which the metrics are computed."""
        params = config.forward_params(params, teacher_params)
        functions, completions = zip(*(TERMS[name] for name in names), strict=True)
        hidden = config.completion_hidden(params, batch.prompt, *(getattr(batch, name) for name in completions))
        results = [
            term(config, params, teacher_params, batch, hidden_BCD)
            for term, hidden_BCD in zip(functions, hidden, strict=True)
        ]
        sums = {name: total for name, (total, _) in zip(names, results, strict=True)}
        return sums, {name: value for _, metrics in results for name, value in metrics.items()}

    def train_step(state: TrainState, teacher_params, batch: Batch):
        counts = {name: config.count(getattr(batch, TERMS[name][1])) for name in terms}
        if num_micro_batches == 1:
            sums, pullback, metrics = jax.vjp(
                lambda params: losses(params, teacher_params, batch, terms), state.params, has_aux=True
            )
        else:
            sums, pullback, metrics = accumulated_vjp(
                lambda params, part, name: losses(params, teacher_params, part, (name,)),
                terms,
                state.params,
                batch,
                num_micro_batches,
            )
        values = {name: total / counts[name] for name, total in sums.items()}
        coefficients, balance = _coefficients(values, state.balance, ema_decay, fixed_weight)
        # λ depends on the values of the losses alone, so it is known before the backward pass.
        (grads,) = pullback(
            {name: (coefficients[name] / counts[name]).astype(total.dtype) for name, total in sums.items()}
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = _metrics(values, coefficients, metrics, grads, batch)
        if "kl" in terms:
            averages = balance.corrected(decay=ema_decay)
            metrics |= dict(zip(("sft_average", "kl_average"), averages, strict=True))
        metrics = {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}
        return TrainState(state.step + 1, params, opt_state, balance), metrics

    return train_step


def _coefficients(values, balance, ema_decay, fixed_weight):
    """The coefficient of each term, 1 and λ (from Eq. 12, or fixed), and the running averages after this step."""
    coefficients = {name: jnp.float32(1) for name in values}
    if "kl" in values:
        kl_weight, balance = update_balance(balance, values["sft"], values["kl"], decay=ema_decay)
        coefficients["kl"] = kl_weight if fixed_weight is None else jnp.float32(fixed_weight)
    return coefficients, balance


def _metrics(values, coefficients, sums, grads, batch: Batch) -> dict[str, jax.Array]:
    """The metrics of a step, except for the running averages."""
    metrics = {f"{name}_loss": value for name, value in values.items()}
    metrics["loss"] = sum(coefficients[name] * value for name, value in values.items())
    metrics["gradient_norm"] = optax.global_norm(grads)
    metrics["sft_tokens"] = jnp.sum(batch.answer.mask)
    if "kl" in values:
        num_tokens = jnp.sum(batch.rollout.mask)
        metrics |= {name: total / jnp.maximum(num_tokens, 1) for name, total in sums.items()}
        metrics |= {"weight": coefficients["kl"], "rollout_tokens": num_tokens}
        metrics["empty_rollouts"] = jnp.sum(~jnp.any(batch.rollout.mask, axis=-1))
    return metrics


def completions_of(hidden_fn: Callable[..., jax.Array]) -> Callable[..., list[jax.Array]]:
    """`completion_hidden` for any model `hidden_fn(params, tokens: Tokens) -> hidden_BTD`; one pass per completion."""

    def completion_hidden(params, prompt: Tokens, *completions: Tokens) -> list[jax.Array]:
        return [predicting(partial(hidden_fn, params), prompt, completion) for completion in completions]

    return completion_hidden
