"""A whole RAFT step on random weights, as a training run makes it: tokens a second, MFU by part, peak memory.

Rollout and train step are programs of their own. The teacher's pass, which is inside the train step, is timed once
more alone; what is left of the train step is the student: its passes, the losses and AdamW.
"""

from __future__ import annotations

import gc
from dataclasses import asdict, dataclass, replace

import jax
import jax.numpy as jnp
from shapes import causal_pairs, forward_flops, num_parameters, random_model
from timing import measured, once, peak_memory, shares
from train_step import make_programs

from raft_jax.tokens import Batch, Tokens


@dataclass(frozen=True)
class Sizes:
    """Tokens of each text of a row; every row is full, so padding plays no part."""

    prompt: int = 256
    answer: int = 256
    teacher_prompt: int = 544
    rollout: int = 256


FULL, TINY = Sizes(), Sizes(8, 8, 16, 8)
BATCHES = (16, 8, 4, 2)
PREDICTED = {
    "student": "a third to a half of the measured product rate; the goal is 0.5 for the 3B shape",
    "rollout": "bound by launches and by reading weights: MFU of some percent, 60 % of the bandwidth as the goal",
    "memory": "3B: 71 GB with float32 masters, AdamW and a bfloat16 teacher; 8B with LoRA rank 16: 28-32 GB",
}


def smollm2(record, tiny: bool) -> None:
    run(record, "tiny" if tiny else "smollm2", tiny, remat=False)


def llama_1b(record, tiny: bool) -> None:
    run(record, "tiny" if tiny else "llama-1b", tiny)


def llama_3b(record, tiny: bool) -> None:
    run(record, "tiny" if tiny else "llama-3b", tiny, batches=BATCHES[1:])


def llama_8b_lora(record, tiny: bool) -> None:
    run(record, "tiny" if tiny else "llama-8b", tiny, lora_rank=16, batches=BATCHES[1:])


def run(record, shape: str, tiny: bool, *, remat: bool = True, lora_rank: int = 0, batches=BATCHES) -> None:
    """The largest batch that fits, of those given."""
    sizes = TINY if tiny else FULL
    record.set(predicted=PREDICTED, shape=shape, sizes=asdict(sizes), remat=remat, lora_rank=lora_rank)
    for batch in (2,) if tiny else batches:
        went = measured(
            record,
            f"batch {batch}",
            lambda batch=batch: step(record, shape, batch, sizes, remat, lora_rank),
            batch=batch,
        )
        if went:
            return
        if record.of(record.part)[f"batch {batch}"]["status"] != "out of memory":
            break
    raise RuntimeError(record.of(record.part)[f"batch {batch}"]["error"])


def step(record, shape: str, batch: int, sizes: Sizes, remat: bool, lora_rank: int) -> dict:
    gc.collect()
    model = random_model(shape, "bfloat16", remat=remat)
    state, generate, train_step = make_programs(model, sizes.rollout, unroll=False, lora_rank=lora_rank)
    rows = random_batch(batch, sizes, model.config.vocab_size)
    key, temperature = jax.random.key(0), jnp.float32(1.0)

    def draw():
        return generate(state.params, model.params, rows.prompt, rows.row_ids, key, temperature)

    found, rollout = {"rollout": once(draw, repeats=2)}, draw()
    rows = rows._replace(rollout=replace(rollout, max_tokens=batch * sizes.rollout))
    teach = teacher_pass(model, rows)
    found["teacher"] = once(lambda: teach(model.params), repeats=3)
    losses = {}

    def train():
        nonlocal state
        state, losses["last"] = train_step(state, model.params, rows)
        return state

    found["train_step"] = once(train, repeats=3)
    metrics = {name: float(value) for name, value in losses["last"].items()}
    work = operations(model.config, batch, sizes, lora_rank)
    seconds = {
        "rollout": found["rollout"]["seconds"],
        "teacher": found["teacher"]["seconds"],
        "student": found["train_step"]["seconds"] - found["teacher"]["seconds"],
    }
    whole = seconds["rollout"] + found["train_step"]["seconds"]
    carrying = batch * (sizes.answer + sizes.rollout)
    return {
        "seconds": whole,
        "tokens_per_second": carrying / whole,
        "tokens_with_loss": carrying,
        "parts": {
            name: {"seconds": value, **shares(record, seconds=value, flops=work[name])}
            for name, value in seconds.items()
        },
        "whole": shares(record, seconds=whole, flops=sum(work.values())),
        "timed": found,
        "peak_memory_bytes": peak_memory(),
        "parameters": num_parameters(model.config),
        "kernel": model.config.kernel,
        "metrics_of_last_step": metrics,
    }


def random_batch(batch: int, sizes: Sizes, vocabulary: int) -> Batch:
    keys = jax.random.split(jax.random.key(6), 3)
    sides = [
        Tokens(jax.random.randint(key, (batch, length), 0, vocabulary), jnp.ones((batch, length), bool), batch * length)
        for key, length in zip(keys, (sizes.prompt, sizes.answer, sizes.teacher_prompt), strict=True)
    ]
    return Batch(*sides, jnp.arange(batch, dtype=jnp.int32))


def teacher_pass(model, rows: Batch):
    """What the train step asks of the teacher, but for its logits."""
    return jax.jit(lambda params: model.completion_hidden(params, rows.teacher_prompt, rows.rollout))


def operations(config, batch: int, sizes: Sizes, lora_rank: int) -> dict[str, float]:
    """Of each part; a backward pass counts twice its forward pass, or once where the weights are frozen, and what
    remat makes again does not count."""
    P, A, Q, C = sizes.prompt, sizes.answer, sizes.teacher_prompt, sizes.rollout
    passes = 2 if lora_rank else 3
    pairs = causal_pairs(P) + causal_pairs(A, P) + causal_pairs(C, P)
    student = forward_flops(config, batch * (P + A + C), batch * pairs, batch * (A + C))
    return {
        "rollout": forward_flops(config, batch * (P + C - 1), batch * causal_pairs(P + C - 1), batch * C),
        "teacher": forward_flops(config, batch * (Q + C), batch * causal_pairs(Q + C), 0),
        "student": passes * student + forward_flops(config, 0, 0, batch * C),  # the teacher's logits among the losses
    }
