"""The loop: every method, the optimiser, resuming, signals, and what it refuses to save."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from safetensors.numpy import load_file

from raft_jax import interrupt
from raft_jax.config import LoraConfig, RolloutConfig, TrainConfig
from raft_jax.data.batches import Batches, TokenRow
from raft_jax.errors import InputError
from raft_jax.methods import METHODS
from raft_jax.metrics import MetricsLog, read_metrics, tokens_trained
from raft_jax.models import parameter_shardings
from raft_jax.sharding import make_mesh
from raft_jax.tokens import Batch, Tokens
from raft_jax.train import loop, rollout, watch
from raft_jax.train.best import BestStep
from raft_jax.train.loop import train
from raft_jax.train.programs import StepPrograms
from raft_jax.train.schedule import learning_rates, make_schedule
from raft_jax.train.state import init_state, make_optimizer, state_shardings
from raft_jax.train.step_metrics import StepMetrics, TrainingDiverged
from raft_jax.train.throughput import Throughput
from raft_jax.train.watch import CutWatch

TIMES = ("seconds", "rollout_seconds", "tokens_per_second")


@pytest.fixture(scope="module")
def model():
    return tiny.make_model()


@pytest.fixture(scope="module")
def rows():
    random = np.random.default_rng(0)

    def ids(length):
        return random.integers(0, 200, length).tolist()

    return [
        TokenRow(ids(9 - number % 3), ids(3 + 2 * (number % 4)), ids(8 + 2 * (number % 4)), number)
        for number in range(8)
    ]


def settings(**changes) -> TrainConfig:
    return TrainConfig(
        **{
            "batch_size": 4,
            "epochs": 2.0,
            "learning_rate": 1e-3,
            "top_k": 16,
            "checkpoint_every": 2,
            "rollout": RolloutConfig(max_new_tokens=8),
            **changes,
        }
    )


def run(model, rows, folder, name="sft", **changes):
    mesh = make_mesh(devices=jax.devices()[:1])
    params = train(model, rows, METHODS[name], settings(**changes), folder, seed=5, mesh=mesh)
    return params, read_metrics(folder / "metrics.jsonl")


def without_times(lines):
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


@pytest.fixture(scope="module")
def undisturbed(model, rows, tmp_path_factory):
    return run(model, rows, tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="module")
def raft(model, rows, tmp_path_factory):
    """Four steps of the whole method on one device, and the base model before them."""
    before = jax.device_get(model.params)
    return *run(model, rows, tmp_path_factory.mktemp("raft"), "raft", **WHOLE), before


WHOLE = {"batch_size": 8, "epochs": 4.0}


def test_raft_writes_a_line_a_step_and_leaves_the_teacher_alone(model, raft):
    params, lines, before = raft
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert line.keys() == {
            "step",
            "loss",
            "sft_loss",
            "kl_loss",
            "weight",
            "sft_average",
            "kl_average",
            "gradient_norm",
            "learning_rate",
            "sft_tokens",
            "rollout_tokens",
            "empty_rollouts",
            "tokens_per_second",
            "rollout_length",
            "cut_share",
            "repetition",
            "student_end_of_turn",
            "teacher_end_of_turn",
            "teacher_mass",
            "student_mass",
            "teacher_entropy",
            "student_entropy",
            "agreement",
            "seconds",
            "rollout_seconds",
        }
        assert line["loss"] == pytest.approx(line["sft_loss"] + line["weight"] * line["kl_loss"], rel=1e-5)
        assert line["weight"] == pytest.approx(line["sft_average"] / (line["kl_average"] + 1e-8), rel=1e-5)
        assert 8 <= line["rollout_tokens"] <= 64 and line["empty_rollouts"] == 0 and line["learning_rate"] == 1e-3
        assert 0 < line["teacher_mass"] <= 1 and 0 < line["student_mass"] <= 1 and 0 <= line["agreement"] <= 1
        assert line["seconds"] > line["rollout_seconds"] > 0
    average = 0.0
    for line in lines:
        average = 0.9 * average + 0.1 * line["kl_loss"]
        assert line["kl_average"] == pytest.approx(average / (1 - 0.9 ** line["step"]), rel=1e-4)
    assert tokens_trained(lines) == sum(line["sft_tokens"] + line["rollout_tokens"] for line in lines)
    # The state was donated at each step; the teacher's arrays are still there, and unchanged.
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(model.params), before)
    assert not np.array_equal(params["query_LDNH"], before["query_LDNH"])


def test_a_mesh_of_eight_devices_trains_alike(model, rows, tmp_path, raft):
    """Rollout and train step: the numbers of one device, from parameters that are cut."""
    one, expected, _ = raft
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    batch = Batches(rows, 8, seed=5, pad_id=0, length_buckets=settings().length_buckets, num_shards=4).at(0)
    sides = batch.prompt, batch.answer, batch.teacher_prompt
    # Of two rows on each device, padding is left out.
    assert sum(side.max_tokens for side in sides) < 2 * sum(side.length for side in sides)
    cut = replace(model, params=jax.device_put(model.params, parameter_shardings(model.config, mesh)))
    trained = train(cut, rows, METHODS["raft"], settings(**WHOLE), tmp_path / "eight", seed=5, mesh=mesh)
    for params in (trained, cut.params):
        assert params["query_LDNH"].sharding.num_devices == 8
        assert params["query_LDNH"].addressable_shards[0].data.size == model.params["query_LDNH"].size // 4
    found = read_metrics(tmp_path / "eight" / "metrics.jsonl")
    for line, other in zip(without_times(found), without_times(expected), strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-6)
    assert 8 < found[0]["rollout_tokens"] < 8 * 8  # some ended before the limit
    for name, value in trained.items():
        np.testing.assert_allclose(value, one[name], rtol=0, atol=2e-4, err_msg=name)
    # The student was donated twice; the teacher is still there.
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(cut.params), jax.device_get(model.params))


def test_without_distillation_there_are_no_lines_about_it(undisturbed, rows):
    lines = undisturbed[1]
    assert all(
        line.keys() == {"step", "loss", "sft_loss", "gradient_norm", "learning_rate", "sft_tokens"} | set(TIMES)
        for line in lines
    )
    assert sum(line["sft_tokens"] for line in lines) == 2 * sum(len(row.answer) for row in rows)
    assert lines[-1]["sft_loss"] < lines[0]["sft_loss"]


def test_going_on_repeats_the_undisturbed_run_to_the_bit(model, rows, tmp_path, undisturbed):
    run(model, rows, tmp_path, max_steps=3)
    assert (tmp_path / "checkpoints/3").is_dir()
    with (tmp_path / "metrics.jsonl").open("a") as file:  # lines after the checkpoint, the last one torn
        file.write('{"step": 4, "loss": 99.0}\n{"step": 5, "lo')
    params, lines = run(model, rows, tmp_path)
    assert without_times(lines) == without_times(undisturbed[1])
    jax.tree.map(np.testing.assert_array_equal, params, undisturbed[0])
    # What is finished is not begun again.
    params, again = run(model, rows, tmp_path)
    assert again == lines
    jax.tree.map(np.testing.assert_array_equal, params, undisturbed[0])


def test_training_ends_where_rollouts_are_cut_too_often(model, rows, tmp_path, capsys, monkeypatch):
    """A limit of one token cuts nearly every rollout. The command that is given again does not go on."""
    monkeypatch.setattr(watch, "RECENT", 2)
    monkeypatch.setattr(watch, "EARLY", 1)
    changes = {"rollout": RolloutConfig(max_new_tokens=1), "stop_when_cut_share": 0.5, "epochs": 4.0}
    params, lines = run(model, rows, tmp_path, "raft", **changes)
    assert len(lines) == 2 and all(line["cut_share"] > 0.5 and line["rollout_length"] == 1 for line in lines)
    words = (
        r": step 2: training ends here, \d+% of the rollouts were cut at the limit \(train.stop_when_cut_share=0.5\)"
    )
    assert re.search(words, capsys.readouterr().err) and (tmp_path / "checkpoints/2").is_dir()
    again, lines = run(model, rows, tmp_path, "raft", **changes)
    assert len(lines) == 2
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_a_doubled_share_is_said_once():
    few, many = [{"cut_share": 0.06}] * 10, [{"cut_share": 1.0}] * 10
    found = CutWatch([], None)
    assert [found.add(line) for line in few] == [None] * 10
    said = [found.add(line) for line in many]
    # 9 x 0.06 + 1.0 is 15 % of ten, more than twice 6 %.
    assert said[0] == "rollouts cut at the limit: 15% over the last 10 steps, 6% over the first 10" and not any(
        said[1:]
    )
    assert not found.reached and CutWatch([*few, *many], 1.0).reached and not CutWatch(many[:9], 1.0).reached
    seldom = CutWatch([{"cut_share": 0.01}] * 10, None)
    assert seldom.add({"cut_share": 0.5}) is None  # 6 % of ten
    assert CutWatch([{"sft_loss": 1.0}] * 30, 0.1).share == 0


@pytest.mark.parametrize("last", [False, True])
def test_a_signal_saves_the_step_and_stops(model, rows, tmp_path, undisturbed, monkeypatch, last):
    """The line of a step is written while the next one is under way, so the signal arrives during that one."""
    number = 4 if last else 2

    class Interrupting:
        def advance(self, count=1, note=""):
            self.count = getattr(self, "count", 0) + 1
            if self.count == (number if last else number - 1):
                os.kill(os.getpid(), signal.SIGTERM)

    class Shown:
        def __enter__(self):
            return Interrupting()

        def __exit__(self, *_):
            return False

    with monkeypatch.context() as patch, interrupt.handled():
        patch.setattr(loop, "progress", lambda *_: Shown())
        with pytest.raises(KeyboardInterrupt, match=f"stopped by SIGTERM after step {number}; the same command"):
            run(model, rows, tmp_path, checkpoint_every=100)
    assert (tmp_path / f"checkpoints/{number}").is_dir()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == number
    lines = run(model, rows, tmp_path, checkpoint_every=100)[1]
    assert without_times(lines) == without_times(undisturbed[1])


def test_checkpoints_by_the_clock(model, rows, tmp_path, monkeypatch):
    saved = []

    class Saving(loop.Checkpoints):
        def save(self, step, state):
            saved.append(step)
            super().save(step, state)

        @property
        def seconds_since(self):  # 25 seconds a step
            return 25 * (done[-1] + 1 - max(saved, default=0))

    dispatch, done = loop.StepPrograms.dispatch, []

    def counted(self, *args):
        done.append(len(done))
        return dispatch(self, *args)

    monkeypatch.setattr(loop, "Checkpoints", Saving)
    monkeypatch.setattr(loop.StepPrograms, "dispatch", counted)
    run(model, rows, tmp_path, checkpoint_every=100, checkpoint_minutes=0.5, epochs=3.0)
    assert saved == [2, 4, 6]


def test_more_epochs_go_on_and_fewer_are_refused(model, rows, tmp_path, undisturbed):
    run(model, rows, tmp_path, epochs=1.0)
    lines = run(model, rows, tmp_path, epochs=2.0)[1]
    assert without_times(lines) == without_times(undisturbed[1])
    with pytest.raises(InputError, match=r"is trained up to step 4, and .* ask for 2 steps; raise them, or remove .*"):
        run(model, rows, tmp_path, epochs=1.0)


@pytest.mark.parametrize("checkpoint_every", [1, 2])
def test_what_is_not_finite_is_not_saved(model, rows, tmp_path, checkpoint_every):
    broken = {**model.params, "final_norm_D": model.params["final_norm_D"].at[0].set(jnp.nan)}
    words = r"step 1 is not finite \(.*sft_loss nan.*train\.learning_rate"
    with pytest.raises(TrainingDiverged, match=words) as caught:
        run(type(model)(model.config, broken, model.tokenizer), rows, tmp_path, checkpoint_every=checkpoint_every)
    assert isinstance(caught.value, InputError) and "\n" not in str(caught.value)
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    assert [path for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()] == []


@pytest.mark.parametrize(
    ("max_tokens", "expected"),
    [
        # The number of tokens of a rollout is waited for; the step before was read and timed before that.
        (8, ["sampling", "read", "sampled", "training"]),
        (None, ["sampling", "read", "training", "sampled"]),
        ("no rollout", ["training", "read"]),
    ],
)
def test_the_host_waits_for_a_step_once_the_next_one_is_under_way(max_tokens, expected):
    events, pending = [], ["read"]
    tokens = Tokens(np.zeros((8, 2), np.int32), np.ones((8, 2), bool))

    def sample(params, teacher_params, batch, key, meanwhile):
        events.append("sampling")
        meanwhile()
        return replace(tokens, max_tokens=max_tokens)

    def step(state, teacher_params, batch):
        events.append("training")
        assert (batch.rollout is None) == (max_tokens == "no rollout")
        return "state", "metrics"

    record = SimpleNamespace(
        read=lambda: pending and events.append(pending.pop()), rollout_sampled=lambda: events.append("sampled")
    )
    found = StepPrograms(None if max_tokens == "no rollout" else sample, step, make_mesh(devices=jax.devices()[:1]))
    batch = Batch(tokens, tokens, tokens, np.arange(8))
    key = jax.random.key(0)
    assert found.dispatch(SimpleNamespace(params={}), {}, batch, key, record) == ("state", "metrics")
    assert events == expected


def test_a_line_is_written_once_and_times_add_up(tmp_path):
    log, shown = MetricsLog(tmp_path / "metrics.jsonl", keep=0), []
    tokens = Tokens(np.zeros((1, 2), np.int32), np.ones((1, 2), bool))
    batch = Batch(tokens, tokens, tokens, np.arange(1))
    began = time.perf_counter()
    steps = StepMetrics(log, Throughput({}, np.array([SimpleNamespace(device_kind="cpu")])), tmp_path, shown.append)
    for step in (1, 2, 3):
        steps.rollout_sampled()
        steps.add(step, {"loss": jnp.float32(step), "sft_loss": jnp.float32(-step)}, 0.5, batch)
        assert len(shown) == step - 1
        steps.read()
        steps.read()
    took = time.perf_counter() - began
    log.flush()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines == shown and [line["step"] for line in lines] == [line["loss"] for line in lines] == [1, 2, 3]
    assert all(0 < line["rollout_seconds"] < line["seconds"] for line in lines)
    assert sum(line["seconds"] for line in lines) < took


def test_the_metrics_of_steps_that_were_lost_are_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    with MetricsLog(path, keep=0) as log:
        for step in (1, 2, 3):
            log.append({"step": step, "loss": 1.0 / step})
    with MetricsLog(path, keep=2) as log:
        log.append({"step": 3, "loss": 7.0})
    assert [line["loss"] for line in read_metrics(path)] == [1.0, 0.5, 7.0]
    assert path.read_text().count("\n") == 3
    assert MetricsLog(path, keep=0) and path.read_text() == ""


def test_damaged_and_missing_metrics_are_said_and_no_others_dropped(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    damaged = b'{"step": 1, "loss": 1.5}\n{"step": 2, "lo\xff}\n[]\n{"step": "4"}\n{"step": 5, "loss": 3.0}\n{"step": 6'
    path.write_bytes(damaged)
    MetricsLog(path, keep=5)
    error = capsys.readouterr().err
    assert error.startswith(f"{path}:2: 3 damaged line(s), left out of the curves; the file as it was is kept as")
    assert f"{path}: nothing there about step 2 (3 of 5 steps lack their line)" in error and error.count("\n") == 2
    assert read_metrics(path) == [{"step": 1, "loss": 1.5}, {"step": 5, "loss": 3.0}]
    assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == damaged
    path.unlink()
    MetricsLog(path, keep=5)
    assert "nothing there about step 1 (5 of 5 steps" in capsys.readouterr().err
    path.write_text('{"step": 1, "loss": 1.5}\n{"step": 2')  # what a process leaves that is killed
    MetricsLog(path, keep=1)
    assert capsys.readouterr().err == "" and read_metrics(path) == [{"step": 1, "loss": 1.5}]
    MetricsLog(path, keep=0)
    assert "no checkpoint of the 1 steps that are logged; training begins at step 0" in capsys.readouterr().err


def test_the_best_step_survives_a_process_that_is_killed_after_it(tmp_path):
    """The run goes on at an earlier checkpoint, and comes to the step that is saved again."""
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "dev_gold_logprob": -3.0}]

    def opened():
        return BestStep(tmp_path, lambda path, shape: shape, lines)

    assert opened().restore({"x": jnp.zeros(2)}) is None
    killed = opened()
    killed.offer(4, -2.0, {"x": jnp.full(2, 4.0)})
    killed.offer(6, -2.5, {"x": jnp.full(2, 6.0)})  # worse
    again = opened()
    again.offer(4, -2.0, {"x": jnp.full(2, 4.0)})
    step, params = again.restore({"x": jnp.zeros(2)})
    assert step == 4 and params["x"].tolist() == [4.0, 4.0]
    again.offer(8, -1.0, {"x": jnp.full(2, 8.0)})
    assert opened().restore({"x": jnp.zeros(2)})[0] == 8 and not (tmp_path / "4").exists()


# --- the optimiser ---


def adamw(params, gradients, *, rates, weight_decay, decays, clip=None, b1=0.9, b2=0.999, epsilon=1e-8):
    """AdamW in NumPy: decoupled decay, times the learning rate, of the parameters named in `decays`."""
    params = {name: np.array(value, np.float64) for name, value in params.items()}
    first, second = ({name: np.zeros_like(value) for name, value in params.items()} for _ in range(2))
    for step, (grads, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        norm = np.sqrt(sum(np.sum(grad**2) for grad in grads.values()))
        scale = 1 if clip is None else min(1, clip / norm)
        for name in params:
            grad = grads[name] * scale
            first[name] = b1 * first[name] + (1 - b1) * grad
            second[name] = b2 * second[name] + (1 - b2) * grad**2
            move = first[name] / (1 - b1**step) / (np.sqrt(second[name] / (1 - b2**step)) + epsilon)
            params[name] = params[name] - rate * (move + weight_decay * params[name] * (name in decays))
    return params


@pytest.mark.parametrize(("warmup", "clip"), [(0, None), (3, 0.5), (1, None)])
def test_the_optimiser_is_adamw_and_spares_norms_and_biases(warmup, clip):
    random = np.random.default_rng(0)
    shapes = {
        "query_LDNH": (2, 3, 2, 2),
        "embedding_VD": (5, 3),
        "attention_norm_LD": (2, 3),
        "final_norm_D": (3,),
        "query_bias_LNH": (2, 2, 2),
    }
    params = {name: random.normal(size=shape) for name, shape in shapes.items()}
    gradients = [{name: random.normal(size=shape) for name, shape in shapes.items()} for _ in range(5)]
    rates = [0.01 * min(1, step / max(warmup, 1)) for step in range(1, 6)]
    expected = adamw(params, gradients, rates=rates, weight_decay=0.3, decays=("query_LDNH", "embedding_VD"), clip=clip)
    schedule = make_schedule(TrainConfig(learning_rate=0.01, warmup_steps=warmup), 5)
    optimizer = make_optimizer(schedule, weight_decay=0.3, max_gradient_norm=clip)
    found = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
    state = optimizer.init(found)
    for grads in gradients:
        grads = {name: jnp.asarray(value, jnp.float32) for name, value in grads.items()}
        updates, state = optimizer.update(grads, state, found)
        found = optax.apply_updates(found, updates)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "num_steps"), [(0, 7), (3, 9), (1, 4), (6, 4)])
def test_schedules_by_hand(name, warmup, num_steps):
    settings = TrainConfig(learning_rate=0.02, schedule=name, final_learning_rate=0.005, warmup_steps=warmup)

    def expected(step):
        if step < warmup:
            return 0.02 * (step + 1) / warmup
        passed = (step - warmup) / (num_steps - warmup)
        share = {"constant": 1.0, "linear": 1 - passed, "cosine": (1 + np.cos(np.pi * passed)) / 2}[name]
        return 0.02 if name == "constant" else 0.005 + 0.015 * share

    rates = learning_rates(make_schedule(settings, num_steps), num_steps)
    np.testing.assert_allclose(rates, [expected(step) for step in range(num_steps)], rtol=1e-6)


def test_the_rate_that_is_logged_is_the_one_that_trains(model, rows, tmp_path):
    """AdamW's first move is as long as the rate wherever the gradient is not tiny."""
    changes = {"schedule": "cosine", "warmup_steps": 1, "weight_decay": 0.0}
    first, lines = run(model, rows, tmp_path / "one", max_steps=1, **changes)
    moved = np.abs(np.asarray(first["gate_LDF"]) - np.asarray(model.params["gate_LDF"]))
    assert np.median(moved) == pytest.approx(lines[0]["learning_rate"], rel=1e-3) == 1e-3
    _, whole = run(model, rows, tmp_path / "whole", **changes)
    assert [line["learning_rate"] for line in whole] == pytest.approx([1e-3, 1e-3, 0.75e-3, 0.25e-3], rel=1e-6)


def test_the_moments_lie_where_their_parameters_do(model):
    from raft_jax.models import parameter_shardings

    mesh = make_mesh(2, 2, 2)
    layout = parameter_shardings(model.config, mesh)
    for clip in (None, 1.0):
        optimizer = make_optimizer(optax.linear_schedule(0.0, 1e-3, 2), max_gradient_norm=clip)
        state = jax.eval_shape(lambda params, optimizer=optimizer: init_state(params, optimizer), model.params)
        found = state_shardings(state, layout)
        adam = next(
            part
            for part in jax.tree.leaves(found.opt_state, is_leaf=lambda part: hasattr(part, "mu"))
            if hasattr(part, "mu")
        )
        assert adam.mu == adam.nu == found.params == layout
        assert found.step.spec == found.balance.count.spec == adam.count.spec == jax.P()


def test_metrics_are_numbers_that_json_reads_back(undisturbed):
    assert json.loads(json.dumps(undisturbed[1], allow_nan=False)) == undisturbed[1]


@pytest.mark.parametrize("name", ["raft", "sft"])
def test_adapters_are_trained_beside_the_teacher(model, rows, tmp_path, name):
    """They are all that is kept, they go on where they stopped, and whole weights come out."""
    before = jax.device_get(model.params)
    lora = LoraConfig(rank=2, alpha=4.0, targets=["q_proj", "down_proj"])
    params, lines = run(model, rows, tmp_path / "one", name, lora=lora)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(model.params), before)
    moved = {key for key in before if np.any(np.asarray(params[key]) != before[key])}
    assert moved == {"query_LDNH", "down_LFD"}
    for key in moved:  # by no more than the rank
        layer = np.asarray(params[key] - before[key])[0]
        layer = layer.reshape(len(layer), -1)
        assert np.linalg.matrix_rank(layer, tol=1e-6) <= 2
    saved = load_file(tmp_path / "one/adapter/adapter_model.safetensors")
    assert {key.rpartition("layers.")[2] for key in saved} == {
        f"{layer}.{module}.lora_{half}.weight"
        for layer in (0, 1)
        for module in ("self_attn.q_proj", "mlp.down_proj")
        for half in "AB"
    }
    run(model, rows, tmp_path / "two", name, lora=lora, max_steps=2)
    again, more = run(model, rows, tmp_path / "two", name, lora=lora)
    assert without_times(more) == without_times(lines)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), jax.device_get(params))


def test_a_profile_has_the_parts_and_changes_no_number(model, rows, tmp_path, raft, capsys):
    lines = run(model, rows, tmp_path, "raft", **WHOLE, profile_steps=[2, 4])[1]
    assert without_times(lines) == without_times(raft[1])
    found = json.loads((tmp_path / "profile/parts.json").read_text())
    shares, profiled = found["shares"], found["steps"]
    assert profiled == [2, 4] and {"rollout", "student", "teacher", "losses", "optimizer", "idle"} <= shares.keys()
    assert min(shares.values()) >= 0 and sum(shares.values()) == pytest.approx(1, abs=1e-3)
    assert shares.get("other", 0) < 0.05  # nearly every operation says what it is of
    assert found["seconds"] == pytest.approx(sum(line["seconds"] for line in lines[1:]), abs=2e-3)
    assert "profile of steps 2 to 4" in capsys.readouterr().out
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1


def test_a_profile_that_ends_with_an_evaluation_leaves_the_line_to_it(model, rows, tmp_path):
    """The scores of a step are part of its line, which a trace that ends there must not write before."""
    mesh, scores = make_mesh(devices=jax.devices()[:1]), {"dev_gold_logprob": -1.5}
    both = settings(eval_every=2, profile_steps=[1, 2])
    train(
        model,
        rows,
        METHODS["sft"],
        both,
        tmp_path,
        seed=5,
        mesh=mesh,
        make_dev_scores=lambda student: lambda params: scores,
    )
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line.get("dev_gold_logprob") for line in lines] == [None, -1.5, None, -1.5]
    assert json.loads((tmp_path / "profile/parts.json").read_text())["steps"] == [1, 2]


@pytest.mark.parametrize("name", ["raft", "sft"])
def test_what_is_compiled_ahead_is_all_that_is_needed(model, rows, tmp_path, monkeypatch, capsys, name, raft):
    """As on TPU and GPU; and the numbers are those of programs that are compiled one by one."""
    counts, dispatch = [], StepPrograms.dispatch

    def counted(self, *arguments):
        sample = self.sample_rollout
        found = [0 if sample is None else len(sample.sample.programs), len(self.train_step.programs)]
        counts.append(found)
        return dispatch(self, *arguments)

    monkeypatch.setattr(StepPrograms, "dispatch", counted)
    monkeypatch.setattr(loop, "compiles_ahead", lambda mesh: True)
    params, lines = run(model, rows, tmp_path, name, **WHOLE)
    assert counts == [[1, 4] if name == "raft" else [0, 1]] * 4
    assert f"compile {name}: {sum(counts[0])}/{sum(counts[0])} programs" in capsys.readouterr().out
    if name == "raft":
        assert without_times(lines) == without_times(raft[1])
        jax.tree.map(np.testing.assert_array_equal, params, raft[0])


@pytest.mark.parametrize(
    ("num_shards", "num_micro_batches", "max_tokens"),
    # The most real tokens of a device in a micro-batch, rounded up to a quarter of its rows times 16.
    [(1, 1, 96), (4, 1, 32), (2, 2, 32), (1, 8, 16), (8, 1, None), (4, 2, None)],
)
def test_capacity_of_rollouts(monkeypatch, num_shards, num_micro_batches, max_tokens):
    lengths = np.array([16, 9, 12, 3, 8, 16, 11, 6])  # of the 8 rows, 16 at most
    tokens = Tokens(jnp.zeros((8, 16), jnp.int32), jnp.asarray(np.arange(16) < lengths[:, None]))
    monkeypatch.setattr(rollout, "make_generate", lambda *_, **__: lambda *_: tokens)
    model = SimpleNamespace(params={}, jit=jax.jit)
    student = SimpleNamespace(model=model, forward_params=lambda params, teacher_params: params)
    settings = TrainConfig(batch_size=8, num_micro_batches=num_micro_batches, rollout=RolloutConfig(max_new_tokens=16))
    sample = rollout.SampleRollout(student, settings, num_shards)
    prompt = Tokens(jnp.zeros((8, 4), jnp.int32), jnp.ones((8, 4), bool), 8)
    batch = Batch(prompt, prompt, prompt, jnp.arange(8))
    assert sample({}, {}, batch, jax.random.key(0)).max_tokens == max_tokens
