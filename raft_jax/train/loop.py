"""The training loop: the one place of training with side effects."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from raft_jax import interrupt
from raft_jax.checkpoint import Checkpoints
from raft_jax.config import TrainConfig
from raft_jax.data.batches import Batches, TokenRow, token_capacity
from raft_jax.errors import InputError
from raft_jax.files import parse_json, read_bytes
from raft_jax.models import Model
from raft_jax.models.lora import save_peft
from raft_jax.progress import progress
from raft_jax.sampling.decode import make_generate
from raft_jax.sharding import any_process, num_shards, put_batch, to_host
from raft_jax.tokens import Batch, Tokens
from raft_jax.train.methods import Method
from raft_jax.train.state import TrainState, init_state, make_optimizer, state_shardings
from raft_jax.train.step import LossConfig, make_train_step
from raft_jax.train.student import Student, make_student


class TrainingDiverged(InputError):
    """A loss or gradient that is not finite. The last checkpoint is from before it."""


def train(
    model: Model,
    rows: Sequence[TokenRow],
    method: Method,
    settings: TrainConfig,
    folder: Path,
    *,
    seed: int,
    mesh: jax.sharding.Mesh,
) -> dict[str, jax.Array]:
    """Trains a copy of the model or adapters over it, or goes on where an earlier run stopped; returns whole weights.

    Every batch, rollout and key is a function of the seed and the step, so a run that was killed and started again
    repeats the uninterrupted one's numbers.

    Args:
      model: the instruct model; its parameters are the frozen teacher and stay as they are.
      rows: the training data as ids.
      method, settings: what to train.
      folder: gets metrics.jsonl (a line a step) and checkpoints/.
      seed: of the shuffle and the rollouts.
      mesh: where arrays lie.

    Raises:
      TrainingDiverged: a loss or gradient norm that is not finite, before it is written into a checkpoint.
      InputError: the folder's checkpoint is of another model or of a later step, or cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with jax.set_mesh(mesh):
        num_batch_shards = num_shards("batch")
    batches = Batches(
        rows, settings.batch_size, seed=seed, pad_id=model.tokenizer.pad_id, length_buckets=settings.length_buckets,
        epochs=settings.epochs, num_shards=num_batch_shards, num_micro_batches=settings.num_micro_batches,
        # LongRoPE uses other frequencies for long sequences, so equal prefixes of a short and a long one differ.
        share_prefixes=all(rope.long_frequencies is None for rope in model.config.ropes),
    )
    all_steps = max(1, round(settings.epochs * batches.steps_per_epoch))
    num_steps = min(all_steps, settings.max_steps or all_steps)
    optimizer = make_optimizer(
        settings.learning_rate, weight_decay=settings.weight_decay, b1=settings.adam_b1, b2=settings.adam_b2,
        epsilon=settings.adam_epsilon, warmup_steps=settings.warmup_steps, max_gradient_norm=settings.max_gradient_norm,
    )
    student, teacher_params = make_student(model, settings.lora, mesh), model.params
    key = jax.random.key(seed)
    state = first_state(student, optimizer, teacher_params, jax.random.fold_in(key, 2))
    checkpoints = Checkpoints(folder / "checkpoints", settings.keep_checkpoints)
    restored = checkpoints.restore(state)
    start, state = restored or (0, state)
    if start > num_steps:
        raise InputError(
            f"{folder}: is trained up to step {start}, and train.epochs and train.max_steps ask for {num_steps} steps; "
            f"raise them, or remove {folder / 'checkpoints'}, and training begins at step 0"
        )
    log = MetricsLog(folder / "metrics.jsonl", keep=start)
    train_step = jit_train_step(student, optimizer, method, settings)
    sample_rollout = make_sample_rollout(student, settings, num_batch_shards)
    rollout_key = jax.random.fold_in(key, 1)
    done = start

    shown = progress(f"train {method.name}", num_steps, "steps", start)
    with jax.set_mesh(mesh), interrupt.deferred(), shown as bar:  # the loop saves before it stops
        for step in range(start, num_steps):
            began = time.perf_counter()
            batch = put_batch(batches.at(step), mesh)
            rollout_seconds = 0.0
            if method.distill:
                rollout = sample_rollout(state.params, teacher_params, batch, jax.random.fold_in(rollout_key, step))
                batch = batch._replace(rollout=jax.block_until_ready(rollout))
                rollout_seconds = time.perf_counter() - began
            state, metrics = train_step(state, teacher_params, batch)
            metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
            if not all(map(math.isfinite, metrics.values())):
                bad = ", ".join(f"{name} {value}" for name, value in metrics.items() if not math.isfinite(value))
                raise TrainingDiverged(
                    f"{folder}: step {step + 1} is not finite ({bad}); lower train.learning_rate or set "
                    f"train.max_gradient_norm, and start again in a new run_dir"
                )
            done = step + 1
            log.append({
                "step": done, **metrics,
                "learning_rate": settings.learning_rate * min(1, done / max(settings.warmup_steps, 1)),
                "seconds": time.perf_counter() - began, "rollout_seconds": rollout_seconds,
            })
            bar.advance(note=_note(metrics))
            stop = any_process(interrupt.requested() is not None)
            if done % settings.checkpoint_every == 0 or done == num_steps or stop:
                checkpoints.save(done, state)
            if stop:
                break
    checkpoints.close()
    if any_process(interrupt.requested() is not None):  # also where it came after the last step
        name = interrupt.requested() or "a signal to another process"
        raise KeyboardInterrupt(f"stopped by {name} after step {done}; the same command goes on there")
    if settings.lora.rank:
        adapters = jax.tree.map(to_host, state.params)
        if jax.process_index() == 0:
            save_peft(adapters, model.config, folder / "adapter", alpha=settings.lora.alpha, base=model.source,
                      with_vision=model.with_vision)
    return jax.jit(student.merged_params)(state.params, teacher_params) if settings.lora.rank else state.params


def first_state(
    student: Student, optimizer: optax.GradientTransformation, teacher_params, key: jax.Array
) -> TrainState:
    """The state before the first step, laid out over the mesh.

    It is donated to every step: the student is a copy that shares no buffers with the teacher.
    """

    def make(teacher_params):
        return init_state(student.init(teacher_params, key), optimizer)

    layout = state_shardings(jax.eval_shape(make, teacher_params), student.shardings)
    return jax.jit(make, out_shardings=layout)(teacher_params)


def jit_train_step(
    student: Student, optimizer: optax.GradientTransformation, method: Method, settings: TrainConfig
) -> Callable:
    """`make_train_step` of a run's settings, compiled; the state is donated."""
    chunk_size = {} if settings.loss_chunk_size is None else {"chunk_size": settings.loss_chunk_size}
    losses = LossConfig(
        student.model.completion_hidden, student.unembedding, student.forward_params, top_k=settings.top_k,
        temperature=settings.temperature, reduction=settings.reduction,
        head_settings=student.model.head_settings | chunk_size,
    )
    step = make_train_step(
        losses, optimizer, terms=method.terms, ema_decay=settings.ema_decay, fixed_weight=settings.fixed_weight,
        num_micro_batches=settings.num_micro_batches,
    )
    return jax.jit(step, donate_argnums=0)


def make_sample_rollout(student: Student, settings: TrainConfig, num_batch_shards: int) -> Callable[..., Tokens]:
    """Builds `sample_rollout(params, teacher_params, batch, key) -> Tokens`: the student's own answers (Eq. 6), with
    the most real tokens that a device has of them in one micro-batch, rounded up."""
    num_micro_batches, rollout = settings.num_micro_batches, settings.rollout
    rows = settings.batch_size // (num_batch_shards * num_micro_batches)
    # The rollout's program is used at every step: worth its compilation.
    generate = make_generate(
        student.model, rollout.max_new_tokens, top_p=rollout.top_p, unroll=jax.default_backend() == "cpu"
    )

    @jax.jit
    def sample(params, teacher_params, prompt, row_ids, key, temperature):
        tokens = generate(student.forward_params(params, teacher_params), prompt, row_ids, key, temperature)
        counts = jnp.sum(tokens.mask.reshape(num_batch_shards, rows, num_micro_batches, -1), axis=(1, 3))
        return tokens, jnp.max(counts)

    temperature = jnp.float32(rollout.temperature)

    def sample_rollout(params, teacher_params, batch: Batch, key: jax.Array) -> Tokens:
        # All micro-batches at once.
        prompt = replace(batch.prompt, max_tokens=num_micro_batches * batch.prompt.max_tokens)
        tokens, count = sample(params, teacher_params, prompt, batch.row_ids, key, temperature)
        return replace(tokens, max_tokens=token_capacity(int(count), rows * rollout.max_new_tokens))

    return sample_rollout


def _note(metrics: dict[str, float]) -> str:
    note = f"SFT {metrics['sft_loss']:.3f}"
    if "kl_loss" in metrics:
        note += f", KL {metrics['kl_loss']:.3f}, λ {metrics['weight']:.2f}"
    return note


class MetricsLog:
    """metrics.jsonl: one line a step, the source of every curve."""

    def __init__(self, path: Path, keep: int):
        """Opens the file for appending, with the lines of the first `keep` steps and no others.

        What is damaged or missing among them is said, and a damaged file is kept as metrics.damaged.jsonl.
        """
        self.path = path
        if jax.process_index() != 0:
            return
        lines, damaged = _scan(path)
        if damaged:
            copy = path.with_name("metrics.damaged.jsonl")
            shutil.copyfile(path, copy)
            print(f"{path}:{damaged[0]}: {len(damaged)} damaged line(s), left out of the curves; the file as it was "
                  f"is kept as {copy}", file=sys.stderr)
        if missing := [step for step in range(1, keep + 1) if step not in lines]:
            print(f"{path}: nothing there about step {missing[0]} ({len(missing)} of {keep} steps lack their line); "
                  "training goes on, and curves, time and token counts lack them", file=sys.stderr)
        if keep == 0 and lines:
            print(f"{path.parent}: no checkpoint of the {len(lines)} steps that are logged; training begins at step 0",
                  file=sys.stderr)
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(lines[step]) + "\n" for step in sorted(lines) if step <= keep), "utf-8")
        partial.replace(path)

    def append(self, record: dict[str, Any]) -> None:
        if jax.process_index() == 0:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def _scan(path: Path) -> tuple[dict[int, dict[str, float]], list[int]]:
    """The lines of a metrics file by their step (of two about one step the later), and the numbers of damaged lines.

    A last line without its end is that of a process that was killed, and no damage.
    """
    if not path.exists():
        return {}, []
    lines, damaged = {}, []
    texts = read_bytes(path).split(b"\n")
    for number, text in enumerate(texts, start=1):
        try:
            line = parse_json(text)
            if not isinstance(line["step"], int) or not all(type(value) in (int, float) for value in line.values()):
                raise ValueError("expected numbers")
            lines[line["step"]] = line
        except (ValueError, LookupError, TypeError, AttributeError):
            if number < len(texts):
                damaged.append(number)
    return lines, damaged


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All whole lines of a metrics file, in the order of their steps."""
    lines, _ = _scan(path)
    return [lines[step] for step in sorted(lines)]


def tokens_trained(metrics: Sequence[dict[str, float]]) -> int:
    """Tokens that carried loss."""
    return int(np.sum([line.get("sft_tokens", 0) + line.get("rollout_tokens", 0) for line in metrics]))
