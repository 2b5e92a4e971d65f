"""The train step of RAFT: cross entropy on the refined answers plus adaptive distillation on the student's rollouts.

Letters: B batch, P prompt, A answer, C rollout, Q teacher prompt, T time, D model width, V vocabulary.
Prompts are padded on the left and what follows them on the right, so that every row's first answer token is
predicted at the same place, and the unembedding is applied to nothing but predictions that carry loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from raft_jax.losses import (
    linear_cross_entropy,
    linear_top_k_forward_kl,
    raft_objective,
    sequence_mean,
    sequence_weight,
    token_mean,
    token_weight,
    update_balance,
)
from raft_jax.packing import make_packing
from raft_jax.sharding import num_shards
from raft_jax.train.state import TrainState

# How unmasked values become one number, the same as weights, and what a micro-batch counts for in the whole batch's
# number.
REDUCTIONS = {
    "sequence": (sequence_mean, sequence_weight, lambda mask_BT: mask_BT.shape[0]),
    "token": (token_mean, token_weight, lambda mask_BT: jnp.maximum(jnp.sum(mask_BT), 1)),
}


def make_train_step(
    hidden_fn: Callable[..., jax.Array],
    unembedding_fn: Callable[[Any], jax.Array],
    optimizer: optax.GradientTransformation,
    *,
    distill: bool = True,
    top_k: int = 512,
    temperature: float = 1.5,
    ema_decay: float = 0.9,
    fixed_weight: float | None = None,
    reduction: str = "sequence",
    num_micro_batches: int = 1,
    loss_chunk_size: int | None = None,
    forks: bool = False,
    effective: Callable[[Any, Any], Any] = lambda params, teacher_params: params,
    head_settings: Mapping[str, Any] | None = None,
) -> Callable:
    """Builds the pure train step; jit it and donate the state.

    Args:
      hidden_fn: `(params, tokens_BT, positions_BT, mask_BT) -> hidden_BTD`, any model at all.
      unembedding_fn: `(params) -> unembedding_DV`, or `raft_jax.losses.Tied(embedding_VD)`.
      optimizer: an optax transformation.
      distill: False leaves cross entropy alone; the rollout may then be None, and the teacher where `effective` does
        not need it.
      top_k, temperature: K and T of Eqs. 8-10.
      ema_decay: beta of Eq. 11.
      fixed_weight: lambda as a constant instead of Eq. 12.
      reduction: "sequence" (mean over each row's tokens, then rows) or "token" (mean over all tokens).
      num_micro_batches: rows are run in this many groups, one after the other. The gradients of the two losses are
        summed apart and joined once lambda of the whole batch is known, so nothing changes but memory.
      loss_chunk_size: tokens whose logits are held at once.
      forks: hidden_fn takes `fork=` (see raft_jax.models.decoder.Decoder.hidden): a batch that is not cut into
        micro-batches then runs each prompt once, with answer and rollout behind it. (Where a rope has long frequencies,
        both branches turn by the length of the longer one.) The teacher's rows are forks without an answer, so that
        one that is the student rounds as the student does, and the KL is 0 to the bit.
      effective: `(params, teacher_params) -> params of hidden_fn`, differentiated with them: where what is trained are
        float32 master weights of a bfloat16 model, or adapters of the teacher.
      head_settings: what else the linear losses take of the unembedding: logit_scale, logit_softcap, vocab_size.

    Returns:
      `train_step(state, teacher_params, batch, rollout, room=None) -> (state, metrics)`. `batch` is a
      raft_jax.data.batches.Batch, `rollout` has tokens_BC and mask_BC; metrics are float32 scalars, losses in nats.
      `room` (static) is a raft_jax.data.batches.Room: with it hidden_fn is given `num_tokens=` and `shared=`, and
      outside the attention no padding is computed, and once what all prompts begin with.

    RAFT (arXiv:2606.00147), Eqs. 5-12.
    """
    reduce, weigh, size = REDUCTIONS[reduction]

    def head() -> dict[str, Any]:
        chunk_size = {} if loss_chunk_size is None else {"chunk_size": loss_chunk_size}
        return {"vocab_shards": num_shards("vocabulary"), **chunk_size, **(head_settings or {})}

    def predictions(params, prompt, *completions):
        """Hidden states [B, C, D] from which each token of a completion is predicted; each one follows the prompt.

        Each is (tokens, mask, how many real ones there are at most or None), and a prompt has behind that how many
        tokens all of them begin with.
        """
        if len(completions) > 1 and not forks:
            return [predictions(params, prompt, completion)[0] for completion in completions]
        *prompt, shared = prompt
        tokens, masks, counts = zip(prompt, *completions, strict=True)
        tokens_BT, mask_BT = jnp.concatenate(tokens, axis=1), jnp.concatenate(masks, axis=1)
        settings = {} if None in counts else {"num_tokens": sum(counts), "shared": shared}
        P, A = tokens[0].shape[1], tokens[1].shape[1] if len(completions) > 1 else 0
        if forks:
            settings["fork"] = (P, A)
        hidden_BTD = hidden_fn(params, tokens_BT, None, mask_BT, **settings)
        last_BCD = jnp.concatenate([hidden_BTD[:, P - 1 : P], hidden_BTD[:, P + A : -1]], axis=1)
        return [hidden_BTD[:, P - 1 : P + A - 1], last_BCD] if A else [last_BCD]

    def sft_loss(params, answer, hidden_BAD, whole_size):
        """Eq. 5, this micro-batch's share."""
        answer_BA, mask_BA, count = answer
        pack, _ = make_packing(mask_BA, count)
        hidden_BTD, labels_BT, weight_BT = map(pack, (hidden_BAD, answer_BA, weigh(mask_BA)))
        loss = linear_cross_entropy(hidden_BTD, unembedding_fn(params), labels_BT, weight_BT=weight_BT, **head())
        return loss * size(mask_BA) / whole_size

    def kl_loss(params, teacher_params, teacher_prompt, rollout, student_BCD, whole_size, num_tokens):
        """Eqs. 7-10, this micro-batch's share: both models at the same prefixes of the student's own answer."""
        (teacher_BCD,) = predictions(teacher_params, teacher_prompt, rollout)
        _, mask_BC, count = rollout
        pack, unpack = make_packing(mask_BC, count)
        found = linear_top_k_forward_kl(
            pack(student_BCD), unembedding_fn(params), jax.lax.stop_gradient(pack(teacher_BCD)),
            jax.lax.stop_gradient(unembedding_fn(teacher_params)), k=top_k, temperature=temperature,
            return_metrics=True, **head(),
        )
        nats_BC, seen = jax.tree.map(unpack, found)
        seen = {name: jnp.sum(jnp.where(mask_BC, values, 0)) / num_tokens for name, values in seen.items()}
        return reduce(nats_BC, mask_BC) * size(mask_BC) / whole_size, seen

    def parts_of(batch, rollout, room):
        """Prompt, answer, the teacher's prompt and the rollout, as `predictions` takes them."""
        counts, shared = ([None] * 4, (0, 0)) if room is None else (room[:4], room[4:])
        return (
            (batch.prompt_BP, batch.prompt_mask_BP, counts[0], shared[0]),
            (batch.answer_BA, batch.answer_mask_BA, counts[1]),
            (batch.teacher_prompt_BQ, batch.teacher_prompt_mask_BQ, counts[2], shared[1]),
            None if rollout is None else (rollout.tokens_BC, rollout.mask_BC, counts[3]),
        )

    def gradients(params, teacher_params, batch, rollout, sizes, room):
        """Losses and the gradient of each, of one micro-batch."""
        prompt, answer, teacher_prompt, rollout = parts_of(batch, rollout, room)

        def sft_part(params):
            params = effective(params, teacher_params)
            return sft_loss(params, answer, *predictions(params, prompt, answer), sizes["sft"])

        def kl_part(params):
            params = effective(params, teacher_params)
            (student_BCD,) = predictions(params, prompt, rollout)
            return kl_loss(
                params, teacher_params, teacher_prompt, rollout, student_BCD, sizes["kl"], sizes["rollout_tokens"]
            )

        sft, sft_grads = jax.value_and_grad(sft_part)(params)
        if not distill:
            return {"sft": (sft, sft_grads)}, {}
        (kl, seen), kl_grads = jax.value_and_grad(kl_part, has_aux=True)(params)
        return {"sft": (sft, sft_grads), "kl": (kl, kl_grads)}, seen

    def balanced(balance, sft, kl):
        """Lambda of Eq. 12, or the fixed one, and the averages that go on."""
        weight, balance = update_balance(balance, sft, kl, decay=ema_decay)
        return weight if fixed_weight is None else jnp.float32(fixed_weight), balance

    def at_once(state, teacher_params, batch, rollout, sizes, room):
        """Eq. 12 and its gradient: lambda hangs on the losses only, so it is known before the backward pass."""
        prompt, answer, teacher_prompt, rollout = parts_of(batch, rollout, room)

        def objective(params):
            params = effective(params, teacher_params)
            answer_BAD, student_BCD = predictions(params, prompt, answer, rollout)
            sft = sft_loss(params, answer, answer_BAD, sizes["sft"])
            kl, seen = kl_loss(
                params, teacher_params, teacher_prompt, rollout, student_BCD, sizes["kl"], sizes["rollout_tokens"]
            )
            weight, balance = balanced(state.balance, *jax.lax.stop_gradient((sft, kl)))
            return raft_objective(sft, kl, weight), (sft, kl, seen, weight, balance)

        (_, parts), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
        return *parts, grads

    def in_turn(state, teacher_params, batch, rollout, sizes, room):
        """The same over micro-batches."""
        losses, seen = _sum_over(
            lambda part: gradients(state.params, teacher_params, *part, sizes, room), (batch, rollout),
            num_micro_batches,
        )
        (sft, grads), (kl, kl_grads) = losses["sft"], losses["kl"]
        weight, balance = balanced(state.balance, sft, kl)
        grads = jax.tree.map(lambda a, b: a + (weight * b).astype(a.dtype), grads, kl_grads)
        return sft, kl, seen, weight, balance, grads

    def train_step(state: TrainState, teacher_params, batch, rollout, room=None):
        sizes = {"sft": size(batch.answer_mask_BA)}
        metrics = {"sft_tokens": jnp.sum(batch.answer_mask_BA)}
        if distill:
            sizes["kl"] = size(rollout.mask_BC)
            sizes["rollout_tokens"] = jnp.maximum(jnp.sum(rollout.mask_BC), 1)
            run = at_once if num_micro_batches == 1 else in_turn
            sft, kl, seen, weight, balance, grads = run(state, teacher_params, batch, rollout, sizes, room)
            loss = raft_objective(sft, kl, weight)
            sft_average, kl_average = balance.corrected(decay=ema_decay)
            metrics |= {
                "kl_loss": kl, "weight": weight, "sft_average": sft_average, "kl_average": kl_average,
                "rollout_tokens": jnp.sum(rollout.mask_BC),
                "empty_rollouts": jnp.sum(~jnp.any(rollout.mask_BC, axis=-1)), **seen,
            }
        else:
            losses, _ = _sum_over(
                lambda part: gradients(state.params, teacher_params, *part, sizes, room), (batch, None),
                num_micro_batches,
            )
            (sft, grads), balance = losses["sft"], state.balance
            loss = sft
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics |= {"sft_loss": sft, "loss": loss, "gradient_norm": optax.global_norm(grads)}
        metrics = {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}
        return TrainState(state.step + 1, params, opt_state, balance), metrics

    return train_step


def _sum_over(function: Callable, whole, num_micro_batches: int):
    """Sums `function(part)` over the micro-batches of `whole`.

    Micro-batch m takes rows m, m + M, m + 2M, ...: a batch that is cut over devices stays cut.
    """

    def split(array):
        if array.shape[0] % num_micro_batches:
            raise ValueError(f"{array.shape[0]} rows do not divide into {num_micro_batches} micro-batches")
        return array.reshape(-1, num_micro_batches, *array.shape[1:]).swapaxes(0, 1)

    if num_micro_batches == 1:
        return function(whole)
    parts = jax.tree.map(split, whole)
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(function, jax.tree.map(lambda array: array[0], parts)),
    )
    total, _ = jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, function(part)), None), zeros, parts)
    return total
