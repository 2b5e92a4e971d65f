"""The training loop, the only part of training with side effects."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax

from raft_jax import bucket, interrupt
from raft_jax.checkpoint import Checkpoints
from raft_jax.config import TrainConfig
from raft_jax.data.batches import Batches, TokenRow
from raft_jax.errors import InputError
from raft_jax.methods import Method
from raft_jax.metrics import MetricsLog
from raft_jax.models import Model
from raft_jax.models.config import unpadded_shape
from raft_jax.models.lora import save_peft
from raft_jax.progress import progress
from raft_jax.run_folder import MethodFolder
from raft_jax.sharding import (
    any_process,
    is_writer,
    length_multiple,
    make_any_process_late,
    make_last_process,
    num_shards,
    to_host,
)
from raft_jax.trackers import Trackers
from raft_jax.train.best import SCORE, BestStep
from raft_jax.train.compiled import CompiledFunction
from raft_jax.train.profile import Profile
from raft_jax.train.programs import StepPrograms, compiles_ahead
from raft_jax.train.rollout import SampleRollout
from raft_jax.train.schedule import learning_rates, make_schedule
from raft_jax.train.state import TrainState, init_state, make_optimizer, state_shardings
from raft_jax.train.step import LossConfig, make_train_step
from raft_jax.train.step_metrics import StepMetrics
from raft_jax.train.student import Params, Student, make_student
from raft_jax.train.throughput import Throughput
from raft_jax.train.watch import CutWatch


def train(
    model: Model,
    rows: Sequence[TokenRow],
    method: Method,
    settings: TrainConfig,
    folder: Path,
    *,
    seed: int,
    mesh: jax.sharding.Mesh,
    start: Callable[[], Mapping[str, jax.Array]] | None = None,
    make_dev_scores: Callable[[Student], Callable[[Params], dict[str, float]]] | None = None,
) -> dict[str, jax.Array]:
    """Trains a copy of the model, or adapters on it; resumes from a checkpoint if there is one; returns full weights.

    Every batch, rollout and key is a function of the seed and the step, so a run that is killed and restarted gives the
    same numbers as an uninterrupted one.

    Args:
      model: the instruct model; its parameters are the frozen teacher and are not changed.
      rows: the training data as token ids.
      method: the training method.
      settings: the settings of training.
      folder: receives metrics.jsonl (one line per step), checkpoints/ and, with LoRA, adapter/.
      seed: of the shuffling and the rollouts.
      mesh: the devices that arrays are sharded over.
      start: loads the weights that the student starts from, with the model's names and shapes; None: the model's own.
      make_dev_scores: makes the function that scores the student every `settings.eval_every` steps, and at the end.

    Raises:
      TrainingDiverged: a loss or gradient norm is not finite; raised before that state is saved in a checkpoint.
      InputError: the checkpoint in the folder is of another model or a later step, or cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files, key = MethodFolder(folder), jax.random.key(seed)
    with jax.set_mesh(mesh):
        num_batch_shards = num_shards("batch")
    batches = make_batches(model, rows, settings, seed=seed, num_shards=num_batch_shards)
    num_steps, student = settings.num_steps(batches.steps_per_epoch), make_student(model, settings.lora, mesh)
    schedule = make_schedule(settings, num_steps)
    rates, optimizer = learning_rates(schedule, num_steps), optimizer_of(settings, schedule)
    state = first_state(student, optimizer, start() if start else model.params, jax.random.fold_in(key, 2))
    unpadded = partial(unpadded_shape, model.config)
    checkpoints = Checkpoints(files.checkpoints, settings.keep_checkpoints, unpadded)
    done, state = checkpoints.restore(state) or (0, state)
    _require_steps_left(done, num_steps, files)
    log = MetricsLog(files.metrics_jsonl, keep=done)
    watch = CutWatch(files.metrics(), settings.stop_when_cut_share)
    sample_rollout = SampleRollout(student, settings, num_batch_shards) if method.distils else None
    train_step = CompiledFunction(jit_train_step(student, optimizer, method, settings))
    programs, rollout_key = StepPrograms(sample_rollout, train_step, mesh), jax.random.fold_in(key, 1)
    dev_scores = make_dev_scores(student) if make_dev_scores and settings.eval_every else None
    best = BestStep(files.best, unpadded, files.metrics()) if dev_scores and settings.keep_best else None
    profile = Profile(settings.profile_steps, files.profile, programs.functions, done, num_steps)
    data = _Data(batches, rates, rollout_key, model.params)
    steps = _Steps(settings, files, data, programs, checkpoints, watch, dev_scores, best, state)
    if compiles_ahead(mesh):
        steps.compile(range(done, num_steps), f"compile {method.name}")
    throughput = Throughput(model.params, mesh.devices, adapters=settings.lora.rank > 0, anchors=method.anchors)
    steps.run(range(done, num_steps), f"train {method.name}", log, throughput, profile)
    return _trained_params(student, steps.best_state(), model, files, settings)


def _require_steps_left(done: int, num_steps: int, files: MethodFolder) -> None:
    """Raises InputError if the checkpoint is of a later step than the last one."""
    if done > num_steps:
        raise InputError(
            f"{files.path}: is trained up to step {done}, and train.epochs and train.max_steps ask for {num_steps} "
            f"steps; raise them, or remove {files.checkpoints}, and training begins at step 0"
        )


@dataclass(frozen=True)
class _Data:
    """What steps are computed from besides the state."""

    batches: Batches
    rates: np.ndarray  # the learning rate of each step of the run
    rollout_key: jax.Array
    teacher_params: Mapping[str, jax.Array]


@dataclass
class _Steps:
    """The steps of a run: what they need, and the state, which they change."""

    settings: TrainConfig
    files: MethodFolder
    data: _Data
    programs: StepPrograms
    checkpoints: Checkpoints
    watch: CutWatch
    dev_scores: Callable[[Params], dict[str, float]] | None
    best: BestStep | None
    state: TrainState

    def compile(self, numbers: range, title: str) -> None:
        """Compiles the programs of these steps before the first one."""
        batches = self.data.batches.one_of_each_shape(numbers)
        with jax.set_mesh(self.programs.mesh):
            self.programs.compile(self.state, self.data.teacher_params, batches, self.data.rollout_key, title)

    def run(self, numbers: range, title: str, log: MetricsLog, throughput: Throughput, profile: Profile) -> None:
        """Trains the steps of these numbers, counted from 0.

        Raises:
          TrainingDiverged: see `train`.
          KeyboardInterrupt: a signal asked a process to stop; the state is saved.
        """
        done, num_steps = numbers.start, numbers.stop
        mesh, any_asked_to_stop = self.programs.mesh, make_any_process_late(self.programs.mesh)
        late, last_process = self._late(mesh), make_last_process(mesh)
        # A stop is deferred: the loop saves before it stops.
        shown, deferred = progress(title, num_steps, "steps", done), interrupt.deferred()
        trackers = Trackers(self.settings.trackers if is_writer() else (), self.files.path, asdict(self.settings))
        with jax.set_mesh(mesh), deferred, shown as bar, log, trackers, profile:

            def on_line(line):
                bar.advance(note=_note(line))
                trackers.log(line)
                _warn(self.files, line["step"], self.watch.add(line))

            metrics = StepMetrics(log, throughput, self.files.path, on_line)
            for step in numbers if not self.watch.reached else ():
                profile.before(step + 1, metrics)
                self._dispatch(step, metrics)
                metrics.note_last_process(last_process())
                done = step + 1
                profile.after(done, metrics)
                if self.dev_scores is not None and (done % self.settings.eval_every == 0 or done == num_steps):
                    metrics.read(partial(self._scores, done))
                    metrics.restart()
                stop = any_asked_to_stop(interrupt.requested() is not None)
                due = done % self.settings.checkpoint_every == 0 or late() or done == num_steps
                if due or stop or self.watch.reached:
                    metrics.read()  # so that nothing is saved that is not finite
                    log.flush()
                    if is_writer():
                        bucket.send(self.files.path)  # the lines before the steps that they describe
                    self.checkpoints.save(done, self.state)
                    metrics.restart()
                if stop or self.watch.reached:
                    break
        self.checkpoints.close()
        if self.watch.reached:
            share, limit = f"{self.watch.share:.0%}", f"train.stop_when_cut_share={self.settings.stop_when_cut_share:g}"
            _warn(self.files, done, f"training ends here, {share} of the rollouts were cut at the limit ({limit})")
        if any_process(interrupt.requested() is not None):  # also if the signal arrived after the last step
            name = interrupt.requested() or "a signal to another process"
            raise KeyboardInterrupt(f"stopped by {name} after step {done}; the same command goes on there")

    def _late(self, mesh: jax.sharding.Mesh) -> Callable[[], bool]:
        """Whether the last save was too long ago, in any process; all of them must call it in each step."""
        minutes, any_late = self.settings.checkpoint_minutes, make_any_process_late(mesh)
        if minutes is None:
            return lambda: False
        return lambda: any_late(self.checkpoints.seconds_since > 60 * minutes)

    def best_state(self) -> TrainState:
        """The last state, with the parameters of the best step on the dev split where those are kept."""
        if self.best is None or (restored := self.best.restore(self.state.params)) is None:
            return self.state
        step, params = restored
        print(f"{self.files.path}: step {step} is exported, the best on the dev split", flush=True)
        return replace(self.state, params=params)

    def _dispatch(self, step: int, metrics: StepMetrics) -> None:
        """Puts a step on the devices."""
        data = self.data
        batch, key = data.batches.at(step), jax.random.fold_in(data.rollout_key, step)
        self.state, step_metrics = self.programs.dispatch(self.state, data.teacher_params, batch, key, metrics)
        metrics.add(step + 1, step_metrics, float(data.rates[step]), batch)

    def _scores(self, done: int) -> dict[str, float]:
        """The scores of the student on the dev split, which is kept where none was better."""
        assert self.dev_scores is not None
        scores = self.dev_scores(self.state.params)
        if self.best is not None:
            self.best.offer(done, scores[SCORE], self.state.params)
        return scores


def optimizer_of(settings: TrainConfig, schedule: float | optax.Schedule) -> optax.GradientTransformation:
    """AdamW with the settings of a run, and its learning rate from `make_schedule`."""
    return make_optimizer(
        schedule,
        weight_decay=settings.weight_decay,
        b1=settings.adam_b1,
        b2=settings.adam_b2,
        epsilon=settings.adam_epsilon,
        max_gradient_norm=settings.max_gradient_norm,
    )


def make_batches(
    model: Model, rows: Sequence[TokenRow], settings: TrainConfig, *, seed: int, num_shards: int
) -> Batches:
    """The batches of a run; each is a function of the seed and the step."""
    return Batches(
        rows,
        settings.batch_size,
        seed=seed,
        pad_id=model.tokenizer.pad_id,
        length_buckets=settings.length_buckets,
        epochs=settings.epochs,
        num_shards=num_shards,
        num_micro_batches=settings.num_micro_batches,
        length_multiple=length_multiple(),
        share_prefixes=not model.config.ropes_depend_on_length,
    )


def _trained_params(
    student: Student, state: TrainState, model: Model, files: MethodFolder, settings: TrainConfig
) -> dict[str, jax.Array]:
    """The full weights. Adapters are saved in PEFT's format and merged."""
    if not settings.lora.rank:
        return state.params
    adapters = jax.tree.map(to_host, state.params)
    if is_writer():
        save_peft(
            adapters,
            model.config,
            files.adapter,
            alpha=settings.lora.alpha,
            base=model.source,
            with_vision=model.with_vision,
        )
    return student.model.jit(student.merged_params)(state.params, model.params)


def first_state(student: Student, optimizer: optax.GradientTransformation, params, key: jax.Array) -> TrainState:
    """The state before the first step, sharded over the mesh, from the weights that the student starts from.

    The state is donated to every step, so the student is a copy that shares no buffers with the teacher.
    """

    def make(params):
        return init_state(student.init(params, key), optimizer)

    layout = state_shardings(jax.eval_shape(make, params), student.shardings)
    return jax.jit(make, out_shardings=layout)(params)


def jit_train_step(
    student: Student, optimizer: optax.GradientTransformation, method: Method, settings: TrainConfig
) -> Callable:
    """The jitted `make_train_step` with the settings of a run; the state is donated."""
    chunk_size = {} if settings.loss_chunk_size is None else {"chunk_size": settings.loss_chunk_size}
    losses = LossConfig(
        student.model.completion_hidden,
        student.unembedding,
        student.forward_params,
        top_k=settings.top_k,
        kl=settings.kl,
        temperature=settings.temperature,
        anchor_weight=settings.anchor_weight,
        reduction=settings.reduction,
        stop_ids=student.model.tokenizer.stop_ids,
        head_settings=student.model.head_settings | chunk_size,
    )
    step = make_train_step(
        losses,
        optimizer,
        terms=method.terms,
        ema_decay=settings.ema_decay,
        fixed_weight=method.constant_weight(settings.fixed_weight),
        num_micro_batches=settings.num_micro_batches,
    )
    return student.model.jit(step, donate_argnums=0)


def _warn(files: MethodFolder, step: int, warning: str | None) -> None:
    if warning is not None and is_writer():
        print(f"{files.path}: step {step}: {warning}", file=sys.stderr, flush=True)


def _note(metrics: dict[str, float]) -> str:
    losses = {"SFT": "sft_loss", "DFT": "dft_loss", "KL to base": "anchor_loss", "KL": "kl_loss"}
    parts = [f"{name} {metrics[key]:.3f}" for name, key in losses.items() if key in metrics]
    return ", ".join([*parts, f"λ {metrics['weight']:.2f}"] if "weight" in metrics else parts)
