"""Sampling: exact distributions, random numbers by row, early stops, few programs; likelihoods of given answers."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import make_config, make_model, make_tokenizer, random_parameters

from raft_jax import sharding
from raft_jax.data.batches import pad
from raft_jax.models import Model, parameter_shardings
from raft_jax.sampling import Completion, Sampler, Scorer, engine, make_generate, sample_token
from raft_jax.sampling.engine import bucket, row_number
from raft_jax.sharding import make_mesh

KEY = jax.random.key(0)
draw = jax.jit(sample_token, static_argnums=3)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def sampler(model):
    return Sampler(model, batch_size=4)


@pytest.fixture(scope="module")
def prompts(model):
    texts = ("rule", "lantern binds the kettle", "?", "of the tenant and the ferry", "is", "form C-12", "which permit")
    return [model.tokenizer.chat_prompt([{"role": "user", "content": text}]) for text in texts]


def reference(logits_V, uniform, temperature, top_p=1.0) -> tuple[int, float]:
    """The token of one draw in float64, and how far the draw lies from where it would be another."""
    logits_V = np.asarray(logits_V, np.float64) / temperature
    probs = np.exp(logits_V - logits_V.max())
    probs /= probs.sum()
    if top_p < 1:
        order = np.argsort(-probs, kind="stable")
        num_kept = int(np.searchsorted(np.cumsum(probs[order]), top_p)) + 1
        probs[order[num_kept:]] = 0
        probs /= probs.sum()
    running = np.cumsum(probs)
    token = min(int(np.searchsorted(running, uniform, side="right")), int(np.flatnonzero(probs)[-1]))
    return token, min(abs(running[token] - uniform), abs(running[token] - probs[token] - uniform))


# One token


@pytest.mark.parametrize("size", [1, 2, 7, 255, 256, 257, 1000, 4099])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.4, 1.0), (2.5, 1.0), (1.0, 0.9), (0.7, 0.5)])
def test_draws_are_those_of_the_twin(size, temperature, top_p):
    random = np.random.default_rng(size)
    logits = (3 * random.normal(size=(64, size))).astype(np.float32)
    uniform = random.random(64).astype(np.float32)
    found = np.asarray(draw(logits, uniform, jnp.float32(temperature), top_p))
    for row in range(64):
        token, distance = reference(logits[row], uniform[row], temperature, top_p)
        assert found[row] == token or distance < 1e-6, (row, distance)
    assert found.dtype == np.int32


def test_frequencies_are_the_probabilities():
    """Pearson's chi-square of 40,000 draws: 36 degrees of freedom, so 69 is passed once in a thousand keys."""
    logits = np.random.default_rng(1).normal(size=37).astype(np.float32) * 1.5
    uniform = jax.random.uniform(jax.random.key(5), (40_000,))
    for temperature in (1.0, 1.7):
        found = np.asarray(draw(np.broadcast_to(logits, (40_000, 37)), uniform, jnp.float32(temperature), 1.0))
        expected = np.exp(logits / temperature, dtype=np.float64)
        expected *= 40_000 / expected.sum()
        assert ((np.bincount(found, minlength=37) - expected) ** 2 / expected).sum() < 69


def test_what_has_no_probability_is_never_drawn():
    """Not even where a draw falls on a boundary between blocks or tokens, or next to 0 or 1."""
    random = np.random.default_rng(0)
    logits = (3 * random.normal(size=5003)).astype(np.float32)
    logits[random.random(5003) < 0.7] = -np.inf
    logits[:300] = logits[-300:] = -np.inf
    running = np.cumsum(np.exp(logits.astype(np.float64)))
    on = (running / running[-1])[random.integers(0, 5003, 500)].astype(np.float32)
    beside = [np.nextafter(on, np.float32(0)), np.nextafter(on, np.float32(1))]
    uniform = np.concatenate([on, *beside, [0, 1e-30, 1 - 2**-24]])
    uniform = np.minimum(uniform, 1 - 2**-24).astype(np.float32)
    for top_p in (1.0, 0.8):
        found = np.asarray(draw(np.broadcast_to(logits, (len(uniform), 5003)), uniform, jnp.float32(1), top_p))
        assert np.isfinite(logits[found]).all()
    assert found[-1] < 4703 and found[-3] >= 300


def test_one_possible_token():
    uniform = np.array([0, 0.5, 1 - 2**-24], np.float32)
    for size, token in ((3, 0), (3, 2), (600, 17), (600, 599)):
        logits = np.full((3, size), -np.inf, np.float32)
        logits[:, token] = -5
        for temperature in (0.0, 1e-3, 1.0, 50.0):
            assert draw(logits, uniform, jnp.float32(temperature), 1.0).tolist() == [token] * 3


def test_temperature_0_takes_the_first_of_the_largest():
    logits = np.array([[1, 3, 3, 0], [-1, -1, -2, -1], [0, 0, 1e30, 0]], np.float32)
    for top_p in (1.0, 0.1):
        assert draw(logits, np.full(3, 0.99, np.float32), jnp.float32(0), top_p).tolist() == [1, 0, 2]


def test_top_p_keeps_the_smallest_sufficient_set():
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))
    uniform = np.arange(1000, dtype=np.float32) / 1000
    for top_p, kept, share in ((0.05, {1}, 1), (0.4, {1}, 1), (0.41, {1, 3}, 4 / 7), (0.75, {1, 2, 3}, 4 / 9)):
        found = np.asarray(draw(np.broadcast_to(logits, (1000, 4)), uniform, jnp.float32(1), top_p))
        assert set(found.tolist()) == kept and abs((found == 1).mean() - share) < 0.002


def test_half_precision_logits_are_widened():
    logits = np.random.default_rng(0).normal(size=(8, 50)).astype(np.float16)
    uniform = np.linspace(0.05, 0.95, 8, dtype=np.float32)
    expected = draw(logits.astype(np.float32), uniform, jnp.float32(1), 1.0)
    assert draw(logits, uniform, jnp.float32(1), 1.0).tolist() == expected.tolist()


# Whole answers


def test_greedy_answers_are_those_of_full_forwards(prompts):
    """Token by token: the most likely one after everything so far, without any cache."""
    tokenizer = make_tokenizer()
    config = make_config(tokenizer.vocab_size)
    params = {name: jnp.asarray(array) for name, array in random_parameters(config, 0).items()}
    model = Model(config, params, tokenizer)
    apply = jax.jit(model.apply)
    expected = [[] for _ in prompts]
    for _ in range(14):
        tokens = pad([*map(list.__add__, prompts, expected)], 96, 0, left=False)
        logits_BTV = np.asarray(apply(params, tokens.ids))
        for answer, logits_TV, row in zip(expected, logits_BTV, tokens.mask, strict=True):
            answer.append(int(logits_TV[row.sum() - 1].argmax()))
    assert min(len(set(answer)) for answer in expected) > 3
    tokenizer.stop_ids = (*tokenizer.stop_ids, expected[0][4])  # some end early
    ends = [
        next((place for place, token in enumerate(answer) if token in tokenizer.stop_ids), 14) for answer in expected
    ]
    assert len(set(ends)) > 2 and 14 in ends
    found = Sampler(model, batch_size=4).generate(params, prompts, key=KEY, temperature=0.0, max_new_tokens=14)
    assert found == [Completion(answer[: end + 1], end < 14) for answer, end in zip(expected, ends, strict=True)]


def test_the_mask_ends_with_the_stop_token(model, prompts):
    prompt = pad(prompts, 64, model.tokenizer.pad_id, left=True)
    row_B = np.array([0, 1, 2, 3, 4, 5, -1], np.int32)
    rollout = make_generate(model, 14)(model.params, prompt, row_B, KEY, jnp.float32(1))
    lengths = rollout.mask.sum(axis=1).tolist()
    assert lengths[-1] == 0 < min(lengths[:-1]) < 14  # a negative row is filler; some rows end early
    stops_BC = jnp.isin(rollout.ids, jnp.array(model.tokenizer.stop_ids))
    for length, tokens, mask, stops in zip(lengths, rollout.ids, rollout.mask, stops_BC, strict=True):
        assert mask.tolist() == [place < length for place in range(14)]
        assert not stops[: max(length - 1, 0)].any() and (length in (0, 14) or stops[length - 1])
        assert set(tokens[length:].tolist()) <= {model.tokenizer.pad_id}


def test_a_batch_in_one_program_draws_what_the_sampler_draws(model, sampler, prompts):
    """Rollouts are sampled in one program, rewritings by the Sampler."""
    names = [str(index) for index in range(4)]
    expected = sampler.generate(model.params, prompts[:4], key=KEY, names=names, max_new_tokens=14)
    prompt = pad(prompts[:4], 64, model.tokenizer.pad_id, left=True)
    row_ids = np.array([row_number(name) for name in names], np.int32)
    for unroll in (False, True):
        rollout = make_generate(model, 14, unroll=unroll)(model.params, prompt, row_ids, KEY, jnp.float32(1))
        found = [ids[mask].tolist() for ids, mask in zip(np.asarray(rollout.ids), rollout.mask, strict=True)]
        assert found == [completion.tokens for completion in expected]


def counting(model) -> tuple[Model, Counter]:
    """The model, and a count of the programs that are built around it and of the steps that they run."""
    counts = Counter()

    class Counting(Model):
        def extend(self, params, tokens_BT, cache, layers=None):
            kind = "decode" if tokens_BT.shape[1] == 1 else "prompt"
            counts[f"{kind} programs"] += 1
            jax.debug.callback(lambda: counts.update({f"{kind} runs": 1, f"{kind} rows": len(tokens_BT)}))
            return super().extend(params, tokens_BT, cache, layers)

    return Counting(model.config, model.params, model.tokenizer), counts


def test_decoding_ends_when_every_row_is_done(model, prompts):
    counted, counts = counting(model)
    found = Sampler(counted, batch_size=8).generate(model.params, prompts, key=KEY, max_new_tokens=200)
    jax.effects_barrier()
    assert all(completion.finished for completion in found)
    # The first token of each answer comes with its prompt.
    assert counts["decode runs"] == max(len(completion.tokens) for completion in found) - 1 < 199


def test_places_of_rows_that_are_done_are_taken_by_others(model, prompts):
    """Two rows at a time: fewer steps than in batches, in which the shorter answer waits for the longer."""
    counted, counts = counting(model)
    sampler = Sampler(counted, batch_size=2)
    found = sampler.generate(model.params, prompts, key=KEY, max_new_tokens=40)
    jax.effects_barrier()
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    steps = [len(found[index].tokens) - 1 for index in order]
    busy = [0, 0]  # each row takes the place that is free first
    for count in steps:
        busy[busy.index(min(busy))] += count
    in_batches = sum(max(steps[start : start + 2]) for start in range(0, len(steps), 2))
    assert counts["decode runs"] == sampler.steps == max(busy) < in_batches
    assert sampler.tokens == sum(len(completion.tokens) for completion in found)


@pytest.mark.parametrize("batch_size", [16, 12])  # all prompts at once, or some waiting
def test_the_last_rows_move_to_fewer_places(model, batch_size):
    counted, counts = counting(model)
    prompts = [[5 + index, 6] * (1 + index) for index in range(16)]
    settings = {"key": KEY, "temperature": 0.8, "max_new_tokens": 200}
    expected = Sampler(model, batch_size).generate(model.params, prompts, **settings)
    sampler = Sampler(counted, batch_size, shrink=True)
    for _ in range(2):
        assert sampler.generate(model.params, prompts, **settings) == expected
    jax.effects_barrier()
    assert counts["decode programs"] == 2  # of all places and of 4, and of none when it is run again
    steps = sorted((len(completion.tokens) - 1 for completion in expected), reverse=True)
    if batch_size == 16:  # 16 places until four rows are left
        assert counts["decode rows"] == 2 * (16 * steps[4] + 4 * (steps[0] - steps[4]))
    else:
        assert counts["decode rows"] < 0.8 * batch_size * counts["decode runs"]


def test_rows_that_must_end_soon_stay_where_they_are(model):
    counted, counts = counting(model)
    prompts = [[5 + index] * 3 for index in range(8)]
    Sampler(counted, batch_size=8, shrink=True).generate(model.params, prompts, key=KEY, max_new_tokens=30)
    jax.effects_barrier()
    assert counts["decode rows"] == 8 * counts["decode runs"]


def test_many_lengths_make_few_programs(model):
    counted, counts = counting(model)
    sampler = Sampler(counted, batch_size=4)
    prompts = [[5 + length % 3] * length for length in range(1, 65)]
    for seed, temperature in ((0, 1.0), (1, 0.0), (2, 0.5)):
        sampler.generate(model.params, prompts, key=jax.random.key(seed), temperature=temperature, max_new_tokens=2)
    # prompts of 32 and of 64 tokens; each program is traced once, and its scan over layers is within the model
    assert (counts["prompt programs"], counts["decode programs"]) == (2, 1)


def test_what_all_prompts_begin_with_is_computed_once(model, prompts):
    counted, counts = counting(model)
    shared = list(range(5, 45))
    longer = [shared + prompt for prompt in prompts]
    found = Sampler(counted, batch_size=4).generate(model.params, longer, key=KEY, max_new_tokens=14)
    assert counts["prompt programs"] >= 2  # the prefix, and the rest of prompts of one length or more
    for index, prompt in enumerate(longer):
        alone = Sampler(model, batch_size=1)
        assert alone.generate(model.params, [prompt], key=KEY, names=[str(index)], max_new_tokens=14) == [found[index]]


@pytest.mark.parametrize("num_drafts", [1, 3])
@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (0.5, 1.0), (1.0, 0.9)])
def test_drafts_change_no_token(model, prompts, num_drafts, temperature, top_p):
    settings = {"key": KEY, "temperature": temperature, "top_p": top_p, "max_new_tokens": 30}
    without, drafting = Sampler(model, batch_size=4), Sampler(model, batch_size=4, num_drafts=num_drafts)
    assert drafting.generate(model.params, prompts, **settings) == without.generate(model.params, prompts, **settings)
    assert drafting.tokens == without.tokens and drafting.steps <= without.steps


@pytest.mark.parametrize("T", [1, 3])
def test_new_tokens_are_written_into_the_cache_where_it_lies(model, T):
    """Transposed before and after, for several GPUs, it is an invalid program in some versions of XLA
    (openxla/xla#44890)."""
    cache = model.empty_cache(model.params, 4, 40)
    lowered = jax.jit(model.extend).lower(model.params, jnp.zeros((4, T), jnp.int32), cache).as_text()
    for array in (cache.key_LBKHS, cache.value_LBKSH):
        shape = "x".join(map(str, array.shape))
        assert re.search(rf'"stablehlo.scatter".*\n(.*\n)*?.*tensor<{shape}x', lowered)
        assert not re.search(rf"stablehlo.transpose .*tensor<{shape}x", lowered)


def test_drafts_that_are_right_save_steps(prompts):
    """A model that repeats its prompt: each token's successor in the prompt is likely after it."""
    tokenizer = make_tokenizer()
    config = make_config(tokenizer.vocab_size)
    params = {name: jnp.zeros_like(array) for name, array in random_parameters(config, 0).items()}
    # Without attention and feed-forward the hidden state is the token's embedding, and the unembedding shifts by one.
    size, width = params["embedding_VD"].shape
    rows = np.random.default_rng(0).normal(size=(size, width)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    params |= {"embedding_VD": jnp.asarray(rows), "unembedding_DV": jnp.asarray(np.roll(rows, 1, axis=0).T)}
    params["final_norm_D"] = jnp.ones(width)
    model = Model(config, params, tokenizer)
    prompt = [*range(10, 40), 10]
    for num_drafts, steps in ((0, 19), (4, 4)):
        sampler = Sampler(model, batch_size=1, num_drafts=num_drafts)
        (found,) = sampler.generate(params, [prompt], key=KEY, temperature=0.0, max_new_tokens=20)
        assert found.tokens == list(range(11, 31)) and sampler.steps == steps


def test_draws_follow_each_rows_own_random_numbers(model, sampler, prompts):
    """Every sampled token is the reference's for the full forward's logits and the row's number at that place."""
    completions = sampler.generate(model.params, prompts[:4], key=KEY, temperature=1.3, top_p=0.9, max_new_tokens=14)
    apply = jax.jit(model.apply)
    for index, (prompt, completion) in enumerate(zip(prompts[:4], completions, strict=True)):
        row_key = jax.random.fold_in(KEY, row_number(str(index)))
        tokens = np.zeros((1, 96), int)
        tokens[0, : len(prompt) + len(completion.tokens)] = prompt + completion.tokens
        logits_TV = np.asarray(apply(model.params, tokens))[0]
        for place, token in enumerate(completion.tokens):
            uniform = float(jax.random.uniform(jax.random.fold_in(row_key, place)))
            expected, distance = reference(logits_TV[len(prompt) - 1 + place], uniform, 1.3, 0.9)
            assert token == expected or distance < 1e-4


def test_same_key_same_tokens(model, sampler, prompts):
    def sample(key, **settings):
        return sampler.generate(model.params, prompts, key=key, max_new_tokens=14, **settings)

    assert (
        sample(KEY)
        == sample(KEY)
        == Sampler(model, batch_size=4).generate(model.params, prompts, key=KEY, max_new_tokens=14)
    )
    assert sample(KEY) != sample(jax.random.key(1))
    assert sample(KEY, names=list("abcdefg")) != sample(KEY)


def test_a_row_does_not_depend_on_its_neighbours(model, sampler, prompts):
    names = [f"row {index}" for index in range(len(prompts))]
    together = sampler.generate(model.params, prompts, key=KEY, names=names, max_new_tokens=14)
    backwards = sampler.generate(model.params, prompts[::-1], key=KEY, names=names[::-1], max_new_tokens=14)
    assert backwards[::-1] == together
    alone = [
        sampler.generate(model.params, [prompt], key=KEY, names=[name], max_new_tokens=14)[0]
        for name, prompt in zip(names, prompts, strict=True)
    ]
    assert alone == together
    assert (
        Sampler(model, batch_size=3).generate(model.params, prompts, key=KEY, names=names, max_new_tokens=14)
        == together
    )


def test_a_mesh_changes_nothing(model, sampler, prompts):
    expected = sampler.generate(model.params, prompts, key=KEY, max_new_tokens=14)
    on_mesh = Sampler(model, batch_size=4, mesh=make_mesh(data=4, fsdp=2))
    assert on_mesh.generate(model.params, prompts, key=KEY, max_new_tokens=14) == expected


def test_parameters_that_are_cut_over_a_mesh_draw_the_same(model, sampler, prompts):
    expected = sampler.generate(model.params, prompts, key=KEY, max_new_tokens=14)
    mesh = make_mesh(2, 2, 2)
    params = jax.device_put(model.params, parameter_shardings(model.config, mesh))
    assert Sampler(model, batch_size=4, mesh=mesh).generate(params, prompts, key=KEY, max_new_tokens=14) == expected


@pytest.mark.parametrize(
    ("device", "gigabytes", "expected"),
    [
        (("gpu", "NVIDIA L4"), 5.9, True),  # of 24 GB
        (("gpu", "NVIDIA L4"), 6.1, False),
        (("tpu", "TPU v5 lite"), 3.9, True),  # of 16 GB
        (("tpu", "TPU v5 lite"), 4.1, False),
        (("gpu", "Abacus 3000"), 500.0, True),
        (("cpu", "cpu"), 2.0, True),
        (("cpu", "cpu"), 2.2, False),
    ],
)
def test_where_weights_are_copied_to_decode_layer_by_layer(device, gigabytes, expected, monkeypatch):
    monkeypatch.setattr(engine, "platform", lambda: device[0])
    monkeypatch.setattr(engine, "device_kind", lambda: device[1])
    params = {"weight": jax.ShapeDtypeStruct((int(gigabytes * 1e9),), jnp.int8)}
    assert engine.unrolls(params, 64) is expected
    assert engine.unrolls(params, 64, waiting=True) is (expected or device[0] == "cpu")
    assert engine.unrolls(params, 8) is (expected and device[0] != "cpu")


def test_callbacks_and_rows_that_are_done(model, sampler, prompts):
    seen = {}

    def on_batch(indices, completions):
        assert indices and all(isinstance(completion, Completion) for completion in completions)
        assert not seen.keys() & set(indices)
        seen.update(zip(indices, completions, strict=True))

    found = sampler.generate(model.params, prompts, key=KEY, max_new_tokens=14, on_batch=on_batch)
    assert [seen[index] for index in range(len(prompts))] == found
    assert sampler.generate(model.params, [], key=KEY, max_new_tokens=14) == []
    for done in ({0, 1, 2, 4}, {5}, set(range(7))):
        rest = {}
        for batch in sampler.stream(model.params, prompts, key=KEY, max_new_tokens=14, done=done):
            rest |= batch
        assert rest == {index: found[index] for index in range(7) if index not in done}


def test_a_prompt_may_use_the_last_position(model):
    room = model.config.max_positions - 2
    sampler = Sampler(model, batch_size=1)
    assert sampler.generate(model.params, [[5] * room], key=KEY, max_new_tokens=2)[0].tokens
    with pytest.raises(ValueError, match=rf"prompt long has {room + 1} tokens; .* leave room for {room}"):
        sampler.generate(model.params, [[5] * (room + 1)], names=["long"], key=KEY, max_new_tokens=2)


def test_wrong_arguments(model):
    sampler = Sampler(model, batch_size=2)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        sampler.generate(model.params, [[5], []], key=KEY, max_new_tokens=2)
    with pytest.raises(ValueError, match="max_new_tokens 0 must be at least 1"):
        sampler.generate(model.params, [[5]], key=KEY, max_new_tokens=0)
    for top_p in (0.0, -1.0, 1.1):
        with pytest.raises(ValueError, match=r"top_p .* must be above 0 and up to 1"):
            sampler.generate(model.params, [[5]], key=KEY, max_new_tokens=2, top_p=top_p)
    with pytest.raises(ValueError, match="batch_size 0 must be at least 1"):
        Sampler(model, batch_size=0)


# Given answers


def test_scores_are_those_of_the_full_forward(model, prompts):
    answers = [model.tokenizer.encode(text) or [9] for text in ("Yes.", "Rule 3 binds each kettle.", "", "a " * 20)]
    scores = Scorer(model, batch_size=3).mean_logprob(model.params, prompts[:4], answers)
    apply = jax.jit(model.apply)
    for prompt, answer, score in zip(prompts, answers, scores, strict=False):
        tokens = np.zeros((1, 96), int)
        tokens[0, : len(prompt + answer)] = prompt + answer
        logits_TV = np.asarray(apply(model.params, tokens), np.float64)[0]
        logprobs_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
        expected = [logprobs_TV[len(prompt) - 1 + place, token] for place, token in enumerate(answer)]
        np.testing.assert_allclose(score, np.mean(expected), atol=1e-4)
    on_mesh = Scorer(model, batch_size=3, mesh=make_mesh(data=2)).mean_logprob(model.params, prompts[:4], answers)
    np.testing.assert_allclose(on_mesh, scores, atol=1e-5)


@pytest.mark.parametrize(
    ("platform", "expected"), [("cpu", [32, 96, 192, 8192, 16384]), ("tpu", [128, 128, 256, 8192, 16384])]
)
def test_lengths_of_prompts_are_what_the_kernels_want(monkeypatch, platform, expected):
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    assert [bucket(length) for length in (1, 65, 129, 8000, 8193)] == expected
