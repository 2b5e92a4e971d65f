"""The train step against its NumPy reference, in micro-batches, and with what is computed once or left out."""

import operator
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference
import optax
import pytest
import tiny
from quick import quick_jit, used_jit
from tiny import padded, random_rows

from raft_jax.config import LoraConfig
from raft_jax.data.batches import TokenRow, pad
from raft_jax.models import Model, parameter_shardings
from raft_jax.sharding import make_mesh, put_batch
from raft_jax.tokens import Batch, Tokens
from raft_jax.train.state import TrainState, init_state, make_optimizer, state_shardings
from raft_jax.train.step import LossConfig, completions_of, make_train_step
from raft_jax.train.student import make_student

V = 24
LEARNING_RATE = 0.01


def build(dtype=np.float32, jit=jax.jit, **settings):
    """A jitted train step and its first state."""
    optimizer = make_optimizer(LEARNING_RATE, weight_decay=settings.pop("weight_decay", 0.1))
    changes = {name: settings.pop(name) for name in ("reduction", "anchor_weight", "top_k", "kl") if name in settings}
    losses = LossConfig(completions_of(tiny.toy_hidden), tiny.toy_unembedding, **{"top_k": 6, **changes})
    step = make_train_step(losses, optimizer, **settings)
    params = jax.tree.map(lambda array: jnp.asarray(array, dtype), tiny.toy_parameters(0))
    return jit(step), init_state(params, optimizer)


def teacher_params(dtype=np.float32):
    return jax.tree.map(lambda array: jnp.asarray(array, dtype), tiny.toy_parameters(1))


@pytest.mark.parametrize(
    ("wide", "fixed_weight", "top_k", "kl"),
    [
        (True, None, 6, "forward"),
        (True, 0.3, 6, "forward"),
        (False, None, 6, "forward"),
        (True, None, None, "forward"),
        (True, None, None, "reverse"),
    ],
)
def test_five_steps_equal_the_twin(wide, fixed_weight, top_k, kl):
    dtype, tolerance = (np.float64, 1e-6) if wide else (np.float32, 1e-4)
    with jax.enable_x64(wide):
        step, state = build(dtype, fixed_weight=fixed_weight, top_k=top_k, kl=kl)
        expected, teacher = numpy_reference.first_state(tiny.toy_parameters(0)), tiny.toy_parameters(1)
        for number in range(5):
            rows, rollouts = random_rows(number)
            state, metrics = step(state, teacher_params(dtype), padded(rows, rollouts))
            expected, numbers = numpy_reference.train_step(
                expected,
                teacher,
                rows,
                rollouts,
                top_k=top_k,
                reverse=kl == "reverse",
                temperature=1.5,
                ema_decay=0.9,
                learning_rate=LEARNING_RATE,
                weight_decay=0.1,
                fixed_weight=fixed_weight,
            )
            for name, value in numbers.items():
                np.testing.assert_allclose(metrics[name], value, rtol=tolerance, err_msg=f"{name}, step {number}")
            for name, value in expected["params"].items():
                np.testing.assert_allclose(
                    state.params[name], value, rtol=0, atol=20 * tolerance * LEARNING_RATE, err_msg=name
                )
            assert metrics["sft_tokens"] == sum(len(row["answer"]) for row in rows)
            assert metrics["rollout_tokens"] == 9 and metrics["empty_rollouts"] == 1
        assert state.step == 5 and state.balance.count == 5
        if fixed_weight is not None:
            assert metrics["weight"] == np.float32(fixed_weight)


@pytest.mark.parametrize(("first_term", "num_micro_batches"), [("sft", 1), ("dft", 1), ("dft", 2)])
def test_anchored_steps_equal_the_twin(first_term, num_micro_batches):
    with jax.enable_x64(True):
        step, state = build(
            np.float64,
            terms=(first_term, "anchor"),
            anchor_weight=0.3,
            num_micro_batches=num_micro_batches,
        )
        expected, base = numpy_reference.first_state(tiny.toy_parameters(0)), tiny.toy_parameters(1)
        for number in range(3):
            rows, rollouts = random_rows(number)
            batch = padded(rows, rollouts)._replace(rollout=None)
            nll = [numpy_reference.sft_loss(expected["params"], row)[0] for row in rows]
            state, metrics = step(state, teacher_params(np.float64), batch)
            expected, numbers = numpy_reference.anchored_step(
                expected,
                base,
                rows,
                first_term=first_term,
                anchor_weight=0.3,
                learning_rate=LEARNING_RATE,
                weight_decay=0.1,
            )
            for name, value in numbers.items():
                np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=f"{name}, step {number}")
            for name, value in expected["params"].items():
                np.testing.assert_allclose(state.params[name], value, rtol=0, atol=2e-5 * LEARNING_RATE, err_msg=name)
            lengths = [len(row["answer"]) for row in rows]
            assert metrics["sft_tokens"] == sum(lengths)
            if first_term == "dft":
                np.testing.assert_allclose(metrics["answer_nll"], np.average(nll, weights=lengths), rtol=1e-5)
            assert "weight" not in metrics and state.balance.count == 0


def test_the_kl_alone_equals_the_twin():
    """Distillation on prompts alone: no answer, nothing to balance, the whole vocabulary."""
    with jax.enable_x64(True):
        step, state = build(np.float64, terms=("kl",), top_k=None)
        params, teacher = tiny.toy_parameters(0), tiny.toy_parameters(1)
        rows, rollouts = random_rows(0)
        batch = padded(rows, rollouts)
        batch = batch._replace(answer=pad([[] for _ in rows], 0, 5, left=False))
        kl = [
            numpy_reference.kl_loss(params, teacher, row, z, None, 1.5) for row, z in zip(rows, rollouts, strict=True)
        ]
        grads = {name: np.mean([grad[name] for _, grad in kl], axis=0) for name in params}
        expected = numpy_reference.updated_state(numpy_reference.first_state(params), grads, LEARNING_RATE, 0.1)
        state, metrics = step(state, teacher_params(np.float64), batch)
    np.testing.assert_allclose(metrics["loss"], np.mean([loss for loss, _ in kl]), rtol=1e-6)
    for name, value in expected["params"].items():
        np.testing.assert_allclose(state.params[name], value, rtol=0, atol=2e-5 * LEARNING_RATE, err_msg=name)
    keys = {"loss", "kl_loss", "weight", "gradient_norm", "rollout_tokens", "empty_rollouts"}
    assert (
        metrics.keys() == keys | {"rollout_length", "cut_share", "repetition"}
        and metrics["weight"] == 1
        and state.balance.count == 0
    )


def test_an_anchor_to_the_student_itself_is_sft():
    rows, rollouts = random_rows(1)
    batch = padded(rows, rollouts)._replace(rollout=None)
    results = []
    for terms in (("sft",), ("sft", "anchor")):
        step, state = build(jit=quick_jit, terms=terms)
        results.append(step(state, state.params, batch))
    (plain, plain_metrics), (anchored, metrics) = results
    assert metrics["anchor_loss"] == 0 and metrics["loss"] == plain_metrics["loss"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), anchored.params, plain.params)


def test_what_padding_holds_does_not_reach_an_anchored_step():
    rows, rollouts = random_rows(2)
    batch = padded(rows, rollouts)._replace(rollout=None)
    other = batch._replace(
        answer=replace(batch.answer, ids=np.where(batch.answer.mask, batch.answer.ids, 19)),
        prompt=replace(batch.prompt, ids=np.where(batch.prompt.mask, batch.prompt.ids, 11)),
    )
    step, state = build(jit=quick_jit, terms=("dft", "anchor"))
    (first, metrics), (second, others) = (step(state, teacher_params(), one) for one in (batch, other))
    assert metrics == others
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)


def test_the_twins_gradients_are_those_of_its_losses():
    params, teacher = tiny.toy_parameters(0), tiny.toy_parameters(1)
    (row, *_), (rollout, *_) = random_rows(0)
    for loss in (
        lambda p: numpy_reference.sft_loss(p, row),
        lambda p: numpy_reference.anchor_loss(p, teacher, row),
        lambda p: numpy_reference.kl_loss(p, teacher, row, rollout, 6, 1.5),
        lambda p: numpy_reference.kl_loss(p, teacher, row, rollout, None, 1.5, reverse=True),
    ):
        grads = loss(params)[1]
        for name, grad in grads.items():
            direction = np.random.default_rng(2).normal(size=grad.shape)
            low, high = (loss({**params, name: params[name] + sign * 1e-6 * direction})[0] for sign in (-1, 1))
            np.testing.assert_allclose(np.sum(grad * direction), (high - low) / 2e-6, rtol=1e-6, atol=1e-9)


def test_the_twin_knows_the_papers_worked_example():
    probs = np.array([0.5, 0.3, 0.1, 0.06, 0.04]), np.array([0.2, 0.2, 0.1, 0.25, 0.25])
    q, p = np.array([5, 3, 1]) / 9, np.array([2, 2, 1]) / 5
    # A model whose logits are given: h = tanh(large) = 1 in one dimension, so that U is the logits.
    teacher, student = (
        {
            "embedding_VD": np.full((5, 1), 30.0),
            "mixer_DD": np.eye(1),
            "scale_D": np.ones(1),
            "unembedding_DV": np.log(values)[None],
        }
        for values in probs
    )
    row = {"prompt": [0], "answer": [0], "teacher_prompt": [1, 2]}
    loss, _ = numpy_reference.kl_loss(student, teacher, row, [4], 3, 1.0)
    np.testing.assert_allclose(loss, np.sum(q * np.log(q / p)), rtol=1e-12)


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_micro_batches_change_nothing(reduction):
    rows, rollouts = random_rows(3)
    results = []
    for num_micro_batches in (1, 2, 4):
        step, state = build(jit=quick_jit, reduction=reduction, num_micro_batches=num_micro_batches)
        for _ in range(2):
            state, metrics = step(state, teacher_params(), padded(rows, rollouts))
        results.append((state, metrics))
    (whole, whole_metrics), *split = results
    for state, metrics in split:
        assert metrics.keys() == whole_metrics.keys()
        for name, value in metrics.items():
            np.testing.assert_allclose(value, whole_metrics[name], rtol=2e-5, atol=1e-7, err_msg=name)
        for name, value in state.params.items():
            np.testing.assert_allclose(value, whole.params[name], rtol=0, atol=1e-3 * LEARNING_RATE, err_msg=name)


def test_token_reduction_weighs_every_token_the_same():
    rows, rollouts = random_rows(3)
    step, state = build(reduction="token")
    metrics = step(state, teacher_params(), padded(rows, rollouts))[1]
    params, teacher = tiny.toy_parameters(0), tiny.toy_parameters(1)
    sft = [(numpy_reference.sft_loss(params, row)[0], len(row["answer"])) for row in rows]
    kl = [
        (numpy_reference.kl_loss(params, teacher, row, z, 6, 1.5)[0], len(z))
        for row, z in zip(rows, rollouts, strict=True)
    ]
    for name, losses in (("sft_loss", sft), ("kl_loss", kl)):
        values, lengths = zip(*losses, strict=True)
        np.testing.assert_allclose(metrics[name], np.average(values, weights=lengths), rtol=1e-5)


def test_a_reverse_kl_needs_the_whole_vocabulary():
    with pytest.raises(ValueError, match="kl 'reverse' with top_k 6; use 'forward', or 'reverse' with top_k None"):
        build(kl="reverse")


def test_rows_that_do_not_divide_are_refused():
    step, state = build(num_micro_batches=3)
    with pytest.raises(ValueError, match="4 rows do not divide into 3 micro-batches"):
        step(state, teacher_params(), padded(*random_rows(0)))


def test_nothing_flows_into_the_teacher():
    step, state = build(jit=lambda step: step)
    batch = padded(*random_rows(0))

    @quick_jit
    @partial(jax.grad, has_aux=True)
    def grad(teacher):
        metrics = step(state, teacher, batch)[1]
        return metrics["loss"], metrics["kl_loss"]

    grads, loss = grad(teacher_params())
    assert all(not np.any(grad) for grad in jax.tree.leaves(grads))
    # Not because the loss does not see the teacher at all:
    assert loss != grad(state.params)[1]


def test_rollouts_that_are_all_empty_leave_the_sft_loss():
    rows, rollouts = random_rows(0, rollout_lengths=(0, 0, 0, 0))
    step, state = build(jit=quick_jit)
    state, metrics = step(state, teacher_params(), padded(rows, rollouts))
    assert metrics["kl_loss"] == 0 and metrics["empty_rollouts"] == 4 and metrics["loss"] == metrics["sft_loss"]
    plain, first = build(jit=quick_jit, terms=("sft",))
    other, plain_metrics = plain(first, None, padded(rows, rollouts)._replace(rollout=None))
    np.testing.assert_allclose(metrics["gradient_norm"], plain_metrics["gradient_norm"], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.params, other.params)


def test_without_distillation_nothing_of_it_is_measured():
    step, state = build(terms=("sft",), num_micro_batches=2)
    rows, rollouts = random_rows(0)
    state, metrics = step(state, None, padded(rows, rollouts)._replace(rollout=None))
    assert metrics.keys() == {"loss", "sft_loss", "sft_tokens", "gradient_norm"}
    expected = np.mean([numpy_reference.sft_loss(tiny.toy_parameters(0), row)[0] for row in rows])
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    assert state.balance.count == 0


# --- on the decoder ---


def tiny_batch(model: Model) -> Batch:
    """Eight rows of the sample data; two lengths of prompt."""
    tokenizer = model.tokenizer
    rows = []
    for number, row in enumerate(tiny.ROWS[:8]):
        asked = [{"role": "user", "content": row["question"]}]
        told = [{"role": "user", "content": row["answer"] + " " + row["question"]}]
        answer = tokenizer.chat_answer([*asked, {"role": "assistant", "content": row["answer"]}])
        rows.append(TokenRow(tokenizer.chat_prompt(asked), answer, tokenizer.chat_prompt(told), number))
    return Batch(
        pad([row.prompt for row in rows], 32, tokenizer.pad_id, left=True),
        pad([row.answer for row in rows], 32, tokenizer.pad_id, left=False),
        pad([row.teacher_prompt for row in rows], 48, tokenizer.pad_id, left=True),
        np.array([row.number for row in rows], np.int32),
    )


SIDES = ("prompt", "answer", "teacher_prompt", "rollout")


def with_max_tokens(batch: Batch, num_shards: int = 1, num_micro_batches: int = 1, share: bool = False) -> Batch:
    """The batch, with the most real tokens that a device has of one micro-batch, and what its prompts share."""

    def known(name, tokens):
        count = max(
            int(rows[m::num_micro_batches].sum())
            for rows in np.split(tokens.mask, num_shards)
            for m in range(num_micro_batches)
        )
        shared = 0
        if share and "prompt" in name:
            columns = zip(*map(operator.getitem, tokens.ids, tokens.mask), strict=False)
            shared = next(i for i, column in enumerate(columns) if len(set(column)) > 1)
            assert shared > 3
        repeated = (len(tokens.ids) // (num_shards * num_micro_batches) - 1) * shared
        return replace(tokens, max_tokens=count - repeated, shared_prefix=shared)

    return batch._replace(**{name: known(name, getattr(batch, name)) for name in SIDES})


@pytest.fixture(scope="module")
def as_padded():
    """Two steps of the plainest kind, and what they were of."""
    model, teacher = tiny.make_model(), tiny.make_model(seed=1).params
    batch = tiny_batch(model)
    batch = batch._replace(rollout=Tokens(batch.answer.ids[::-1, :6], batch.answer.mask[::-1, :6]))

    # Plain descent: what the parameters differ by is what the gradients do. Adam would divide it by the smallest.
    optimizer = optax.sgd(LEARNING_RATE)

    def make(branches, reduction="sequence", **settings):
        completion_hidden = model.completion_hidden if branches else completions_of(model.hidden)
        losses = LossConfig(completion_hidden, model.unembedding, top_k=32, reduction=reduction)
        return make_train_step(losses, optimizer, **settings)

    def run(batch=batch, branches=False, **settings):
        step = quick_jit(make(branches, **settings))
        state = init_state(model.params, optimizer)
        for _ in range(2):
            state, metrics = step(state, teacher, batch)
        return metrics, state.params

    def loss_of(batch, name):
        """One loss of the first step, compiled without what else it gives."""

        @quick_jit
        def forward(*arguments):
            terms = ("sft", "kl") if name == "kl_loss" else ("sft",)
            return make(False, terms=terms)(*arguments)[1][name]

        return forward(init_state(model.params, optimizer), teacher, batch)

    return run, batch, run(), loss_of


@pytest.mark.parametrize(
    ("settings", "known"),
    [
        ({"branches": True}, None),
        ({"reduction": "token"}, {}),
        ({"branches": True}, {"share": True}),
        ({"branches": True, "num_micro_batches": 2}, {"share": True, "num_micro_batches": 2}),
    ],
    ids=["branches", "max tokens, by tokens", "branches, shared prefix", "micro-batches, shared prefix"],
)
def test_a_prompt_run_once_and_padding_left_out_change_nothing(as_padded, settings, known):
    run, batch, (expected_metrics, expected), _ = as_padded
    if settings.get("reduction"):
        expected_metrics, expected = run(reduction="token")
    metrics, params = run(batch if known is None else with_max_tokens(batch, **known), **settings)
    for name, value in metrics.items():
        np.testing.assert_allclose(value, expected_metrics[name], rtol=2e-5, atol=1e-7, err_msg=name)
    for name, value in params.items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=2e-5 * LEARNING_RATE, err_msg=name)


def test_more_real_tokens_than_max_tokens_are_seen(as_padded):
    _, batch, _, loss_of = as_padded
    for name, loss in (("teacher_prompt", "kl_loss"), ("rollout", "kl_loss"), ("answer", "sft_loss")):
        known = with_max_tokens(batch)
        if name == "answer":  # also where prompt and answer together would fit
            known = known._replace(prompt=replace(known.prompt, max_tokens=known.prompt.max_tokens + 9))
        tokens = getattr(known, name)
        short = known._replace(**{name: replace(tokens, max_tokens=tokens.max_tokens - 1)})
        assert np.isnan(loss_of(short, loss))


@pytest.mark.parametrize("whole", [True, False])
def test_a_teacher_that_is_the_student_teaches_nothing(whole):
    """To the bit on one device. Cut over eight the two round differently, and what is left has no weight."""
    mesh = make_mesh(devices=jax.devices()[:1]) if whole else make_mesh(2, 2, 2)
    model = tiny.make_model()
    model = replace(model, params=jax.device_put(model.params, parameter_shardings(model.config, mesh)))
    student = make_student(model, LoraConfig(), mesh)
    batch = tiny_batch(model)
    batch = batch._replace(
        teacher_prompt=batch.prompt, rollout=Tokens(batch.answer.ids[:, :8], batch.answer.mask[:, :8])
    )
    optimizer = make_optimizer(1e-3)
    losses = LossConfig(model.completion_hidden, student.unembedding, student.forward_params, top_k=32)
    step = make_train_step(losses, optimizer)
    state: TrainState = init_state(student.init(model.params, jax.random.key(0)), optimizer)
    state = jax.device_put(state, state_shardings(state, student.shardings))
    batch = with_max_tokens(batch, mesh.shape["data"] * mesh.shape["fsdp"])
    with jax.set_mesh(mesh):
        # Bits are compared on one device alone, so only there the program is the one that users have.
        compiled = (used_jit if whole else quick_jit)(step)
        metrics = compiled(state, model.params, put_batch(batch, mesh))[1]
    assert metrics["weight"] == 0 and metrics["loss"] == metrics["sft_loss"]
    if whole:
        assert metrics["kl_loss"] == 0 and metrics["agreement"] == 1
