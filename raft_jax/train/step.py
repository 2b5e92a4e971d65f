"""RAFT's train step: cross entropy on the refined answers plus adaptive distillation on the student's rollouts.

The terms of the baselines that need no rollouts are here, too; TERMS is the table of all.

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

from raft_jax.losses import (
    linear_cross_entropy,
    linear_forward_kl,
    linear_reverse_kl,
    linear_top_k_forward_kl,
    sequence_weight,
    update_balance,
)
from raft_jax.sharding import mesh_axes
from raft_jax.tokens import Batch, Tokens, predicting
from raft_jax.train.accumulate import accumulated_vjp
from raft_jax.train.rollout_metrics import end_of_turn_probability, rollout_metrics
from raft_jax.train.state import TrainState
from raft_jax.unpadding import make_unpadding

DIVERGENCES = {"forward": linear_forward_kl, "reverse": linear_reverse_kl}  # over the whole vocabulary


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
      top_k, temperature: K (None: the whole vocabulary) and τ (T in the paper) of Eqs. 8-10.
      kl: "forward", KL(teacher ‖ student); or "reverse", KL(student ‖ teacher), with the whole vocabulary only.
      anchor_weight: the coefficient α of the term "anchor".
      reduction: "sequence" (mean over each row's tokens, then rows) or "token" (mean over all tokens).
      stop_ids: the tokens that end a turn, for the metrics of rollouts.
      head_settings: further arguments of the linear losses: chunk_size, logit_scale, logit_softcap, vocab_size.
    """

    completion_hidden: Callable[..., list[jax.Array]]
    unembedding: Callable[[Any], Any]
    forward_params: Callable[[Any, Any], Any] = lambda params, teacher_params: params
    top_k: int | None = 512
    kl: str = "forward"
    temperature: float = 1.5
    anchor_weight: float = 0.1
    reduction: str = "sequence"
    stop_ids: tuple[int, ...] = ()
    head_settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.reduction not in ("sequence", "token"):
            raise ValueError(f"reduction {self.reduction!r} is not known; use 'sequence' or 'token'")
        if self.kl not in DIVERGENCES or (self.kl == "reverse" and self.top_k is not None):
            raise ValueError(f"kl {self.kl!r} with top_k {self.top_k}; use 'forward', or 'reverse' with top_k None")

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
    with jax.named_scope("teacher"):
        (teacher_BCD,) = config.completion_hidden(teacher_params, batch.teacher_prompt, rollout)
    unpad, _ = make_unpadding(rollout.mask, rollout.max_tokens)
    student = unpad(student_BCD), config.unembedding(params)
    teacher = jax.lax.stop_gradient((unpad(teacher_BCD), config.unembedding(teacher_params)))
    settings = dict(temperature=config.temperature, weight_BT=unpad(config.token_weights(rollout)), **config.linear)
    ends = {}
    if config.stop_ids:
        for name, hidden_BCD, (_, unembedding) in (
            ("student", student_BCD, student),
            ("teacher", teacher_BCD, teacher),
        ):
            probability = end_of_turn_probability(hidden_BCD, unembedding, rollout, config.stop_ids, **config.linear)
            ends[f"{name}_end_of_turn"] = probability
    if config.top_k is None:
        return DIVERGENCES[config.kl](*student, *teacher, **settings), ends
    total, metrics = linear_top_k_forward_kl(*student, *teacher, k=config.top_k, return_metrics=True, **settings)
    mask_BT, num_tokens = unpad(rollout.mask), jnp.sum(rollout.mask)
    sums = {name: jnp.sum(jnp.where(mask_BT, values_BT, 0)) for name, values_BT in metrics.items()}
    return total, {name: (value, num_tokens) for name, value in sums.items()} | ends


def dft_term(config: LossConfig, params, teacher_params, batch: Batch, hidden_BAD) -> tuple[jax.Array, dict]:
    """Cross entropy on the answers, each token times the student's own probability of it, which carries no gradient.

        sum_t sg(p_t) (-log p_t)

    DFT (arXiv:2508.05629); the first term of ASFT (arXiv:2509.23753).
    """
    answer = batch.answer
    unpad, _ = make_unpadding(answer.mask, answer.max_tokens)
    hidden_BTD, labels_BT, weight_BT = map(unpad, (hidden_BAD, answer.ids, config.token_weights(answer)))
    nll_BT = linear_cross_entropy(hidden_BTD, config.unembedding(params), labels_BT, **config.linear)
    probs_BT = jax.lax.stop_gradient(jnp.exp(-nll_BT))
    # Padding has weight 0, and its hidden states may be anything.
    nll_BT = jnp.where(weight_BT > 0, nll_BT, 0)
    total = jnp.sum(weight_BT * jnp.where(weight_BT > 0, probs_BT, 0) * nll_BT)
    return total, {"answer_nll": (jnp.sum(jax.lax.stop_gradient(nll_BT)), jnp.sum(answer.mask))}


def anchor_term(config: LossConfig, params, teacher_params, batch: Batch, student_BAD) -> tuple[jax.Array, dict]:
    """KL(base ‖ student) over the whole vocabulary at the answers' tokens, given the question; temperature 1.

    The anchor of ASFT (arXiv:2509.23753) and of SFT with a KL to the base model.
    """
    answer = batch.answer
    with jax.named_scope("teacher"):
        (base_BAD,) = config.completion_hidden(teacher_params, batch.prompt, answer)
    unpad, _ = make_unpadding(answer.mask, answer.max_tokens)
    student = unpad(student_BAD), config.unembedding(params)
    base = jax.lax.stop_gradient((unpad(base_BAD), config.unembedding(teacher_params)))
    weight_BT = unpad(config.token_weights(answer))
    return linear_forward_kl(*student, *base, temperature=1.0, weight_BT=weight_BT, **config.linear), {}


# Each term of the loss, and the completion that it is computed on (a field of Batch). `term(config, params,
# teacher_params, batch, hidden_BCD) -> (sum, {metric: (sum, count)})`; a metric is a mean over what is counted.
TERMS = {
    "sft": (sft_term, "answer"),
    "dft": (dft_term, "answer"),
    "anchor": (anchor_term, "answer"),
    "kl": (kl_term, "rollout"),
}


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
      terms: names in TERMS. Without "kl" the batch needs no rollout; without "kl" and "anchor" teacher_params may be
        None unless `config.forward_params` needs them.
      ema_decay: β of Eq. 11.
      fixed_weight: a constant λ, in place of Eq. 12.
      num_micro_batches: number of groups that the rows are split into, run one after the other. The gradients on each
        completion are accumulated separately and combined once λ of the whole batch is known, so only memory changes.

    Returns:
      `train_step(state, teacher_params, batch) -> (state, metrics)`. `batch` is a raft_jax.tokens.Batch; metrics are
      float32 scalars, losses in nats.

    RAFT (arXiv:2606.00147), Eqs. 5-12.
    """
    completions = tuple(dict.fromkeys(TERMS[name][1] for name in terms))
    scales = {name: config.anchor_weight if name == "anchor" else 1 for name in terms}

    def losses(params, teacher_params, batch, completions):
        """The loss on each completion, without λ and divisor; each term's sum, and its metrics' sums and counts."""
        params = config.forward_params(params, teacher_params)
        with jax.named_scope("student"):
            hidden = config.completion_hidden(params, batch.prompt, *(getattr(batch, name) for name in completions))
        sums, results = {}, {}
        for completion, hidden_BCD in zip(completions, hidden, strict=True):
            names = [name for name in terms if TERMS[name][1] == completion]
            with jax.named_scope("losses"):
                outcomes = {name: TERMS[name][0](config, params, teacher_params, batch, hidden_BCD) for name in names}
            sums[completion] = sum(scales[name] * total for name, (total, _) in outcomes.items())
            results |= outcomes
        return sums, results

    def train_step(state: TrainState, teacher_params, batch: Batch):
        counts = {name: config.count(getattr(batch, name)) for name in completions}
        if num_micro_batches == 1:
            sums, pullback, results = jax.vjp(
                lambda params: losses(params, teacher_params, batch, completions), state.params, has_aux=True
            )
        else:
            sums, pullback, results = accumulated_vjp(
                lambda params, part, name: losses(params, teacher_params, part, (name,)),
                completions,
                state.params,
                batch,
                num_micro_batches,
            )
        values = {name: total / counts[TERMS[name][1]] for name, (total, _) in results.items()}
        weight, balance = _kl_weight(values, state.balance, ema_decay, fixed_weight)
        # λ depends on the values of the losses alone, so it is known before the backward pass.
        factors = {name: weight if name == "rollout" else jnp.float32(1) for name in completions}
        (grads,) = pullback({name: (factors[name] / counts[name]).astype(total.dtype) for name, total in sums.items()})
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        coefficients = {name: scales[name] * factors[TERMS[name][1]] for name in values}
        metrics = _metrics(values, coefficients, results, batch, config.stop_ids)
        metrics["gradient_norm"] = optax.global_norm(grads)
        if {"sft", "kl"} <= values.keys():
            averages = balance.corrected(decay=ema_decay)
            metrics |= dict(zip(("sft_average", "kl_average"), averages, strict=True))
        metrics = {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}
        return TrainState(state.step + 1, params, opt_state, balance), metrics

    return train_step


def _kl_weight(values, balance, ema_decay, fixed_weight):
    """λ, from Eq. 12 or fixed (1 if there is nothing to balance), and the running averages after this step."""
    weight = jnp.float32(1)
    if {"sft", "kl"} <= values.keys():
        weight, balance = update_balance(balance, values["sft"], values["kl"], decay=ema_decay)
    return weight if fixed_weight is None else jnp.float32(fixed_weight), balance


def _metrics(values, coefficients, results, batch: Batch, stop_ids) -> dict[str, jax.Array]:
    """The metrics of a step, except for the gradient's norm and the running averages."""
    metrics = {f"{name}_loss": value for name, value in values.items()}
    metrics["loss"] = sum(coefficients[name] * value for name, value in values.items())
    for _, sums_and_counts in results.values():
        metrics |= {name: total / jnp.maximum(count, 1) for name, (total, count) in sums_and_counts.items()}
    if any(TERMS[name][1] == "answer" for name in values):
        metrics["sft_tokens"] = jnp.sum(batch.answer.mask)
    if "kl" in values:
        metrics |= {"weight": coefficients["kl"], "rollout_tokens": jnp.sum(batch.rollout.mask)}
        metrics["empty_rollouts"] = jnp.sum(~jnp.any(batch.rollout.mask, axis=-1))
        metrics |= rollout_metrics(batch.rollout, stop_ids)
    return metrics


def completions_of(hidden_fn: Callable[..., jax.Array]) -> Callable[..., list[jax.Array]]:
    """`completion_hidden` for any model `hidden_fn(params, tokens: Tokens) -> hidden_BTD`; one pass per completion."""

    def completion_hidden(params, prompt: Tokens, *completions: Tokens) -> list[jax.Array]:
        return [predicting(partial(hidden_fn, params), prompt, completion) for completion in completions]

    return completion_hidden
