"""The metrics of rollouts, against what Python counts row by row, and in the train step against the NumPy twin."""

import jax
import numpy as np
import numpy_reference
import optax
import pytest
import tiny
from tiny import padded, random_rows

from raft_jax.data.batches import pad
from raft_jax.train.rollout_metrics import repeated_ngrams, rollout_metrics
from raft_jax.train.state import init_state
from raft_jax.train.step import LossConfig, completions_of, make_train_step

STOPS = (3, 7)


@pytest.mark.parametrize(("length", "vocabulary"), [(40, 3), (12, 2), (5, 9), (3, 2)])
def test_lengths_cuts_and_repetitions_as_python_counts_them(length, vocabulary):
    random = np.random.default_rng(0)
    rows = [random.integers(4, 4 + vocabulary, random.integers(0, length + 1)).tolist() for _ in range(6)]
    full = random.integers(4, 4 + vocabulary, (2, length)).tolist()
    rows += [full[0], [*full[1][:-1], 7]]  # one is cut, and one ends with its last token
    repeated = ngrams = 0
    for row in rows:
        grams = [tuple(row[start : start + 4]) for start in range(len(row) - 3)]
        repeated, ngrams = repeated + len(grams) - len(set(grams)), ngrams + len(grams)
    cut = sum(len(row) == length and row[-1] not in STOPS for row in rows)
    # What padding holds does not count.
    tokens = pad(rows, length, 4, left=False)
    found = jax.device_get(jax.jit(lambda tokens: rollout_metrics(tokens, STOPS))(tokens))
    assert found["rollout_length"] == pytest.approx(np.mean([len(row) for row in rows]))
    assert found["cut_share"] == pytest.approx(cut / 8) and cut >= 1
    assert found["repetition"] == pytest.approx(repeated / max(ngrams, 1))
    assert tuple(map(int, repeated_ngrams(tokens))) == (repeated, ngrams)


@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_the_probability_of_ending_is_that_of_the_twin(num_micro_batches):
    rows, rollouts = random_rows(0)
    student, teacher = tiny.toy_parameters(0), tiny.toy_parameters(1)
    config = LossConfig(completions_of(tiny.toy_hidden), tiny.toy_unembedding, top_k=6, stop_ids=STOPS)
    optimizer = optax.sgd(0.1)
    step = jax.jit(make_train_step(config, optimizer, num_micro_batches=num_micro_batches))
    with jax.enable_x64(True):
        metrics = step(
            init_state(jax.tree.map(jax.numpy.asarray, student), optimizer), teacher, padded(rows, rollouts)
        )[1]
    for name, params, prompt in (("student", student, "prompt"), ("teacher", teacher, "teacher_prompt")):
        probs = [
            numpy_reference.softmax(numpy_reference.forward(params, np.array([*row[prompt], *z]))[0][-2])[
                list(STOPS)
            ].sum()
            for row, z in zip(rows, rollouts, strict=True)
            if z
        ]
        np.testing.assert_allclose(metrics[f"{name}_end_of_turn"], np.mean(probs), rtol=1e-6)
    assert metrics["rollout_length"] == 9 / 4 and metrics["cut_share"] == 0
