"""The decoder against a float64 NumPy reference and against itself.

Comparisons with transformers on torch are in test_export.py and test_smollm2.py.
"""

import cmath
import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import quick_jit, used_jit

from raft_jax.models import Model, decoder
from raft_jax.models.config import DecoderConfig, parameter_table
from raft_jax.models.decoder import init_parameters
from raft_jax.models.families.rope import make_rope, plain_rope
from raft_jax.models.xla_cpu import Tiled
from raft_jax.sharding import make_mesh, use_mesh
from raft_jax.tokens import Tokens

LLAMA = DecoderConfig(
    family="llama",
    vocab_size=61,
    num_layers=3,
    width=20,
    num_heads=4,
    num_kv_heads=2,
    head_width=6,
    ffn_width=28,
    max_positions=64,
    ropes=(plain_rope(100.0, 6),),
)
LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 40.0,
}
LLAMA3_ROPE = make_rope({"rope_type": "llama3", "rope_theta": 100.0, **LLAMA3}, 6, 64)
CONFIGS = {
    "llama": LLAMA,
    "llama 3": replace(LLAMA, ropes=(LLAMA3_ROPE,), num_kv_heads=1, norm_epsilon=1e-3),
    # wide enough for tiles (raft_jax.models.xla_cpu)
    "qwen2": replace(
        LLAMA,
        family="qwen2",
        qkv_bias=True,
        tied_embeddings=True,
        width=64,
        num_kv_heads=4,
        head_width=16,
        ffn_width=128,
        ropes=(plain_rope(100.0, 16),),
    ),
}
TOKENS = np.random.default_rng(3).integers(0, LLAMA.vocab_size, (3, 13))


def random_params(config: DecoderConfig) -> dict[str, np.ndarray]:
    """Norms that are not one and biases that are not zero among them."""
    random = np.random.default_rng(0)
    return {
        name: (random.normal(size=info.shape) * (info.fan_in or 20) ** -0.5 + ("norm" in name)).astype(np.float32)
        for name, info in parameter_table(config).items()
    }


class Compiled:
    """A model's functions, each compiled once for all tests."""

    def __init__(self, config: DecoderConfig):
        self.config, self.params = config, random_params(config)
        model = Model(config, self.params)
        self.apply, self.extend = jax.jit(model.apply), jax.jit(model.extend)
        self.empty_cache = model.empty_cache
        self.hidden = quick_jit(model.hidden, static_argnames="branches")
        self.prefill = quick_jit(model.prefill, static_argnums=2)

    def logits(self, tokens_BT, mask_BT=None, first_position=None) -> np.ndarray:
        mask_BT = np.ones(tokens_BT.shape, bool) if mask_BT is None else mask_BT
        positions = None if first_position is None else first_position + np.arange(13) + np.zeros((3, 1), int)
        return np.asarray(self.apply(self.params, tokens_BT, positions, mask_BT))

    def head(self, hidden) -> np.ndarray:
        unembedding = self.params.get("unembedding_DV", self.params["embedding_VD"].T)
        return np.asarray(hidden) @ unembedding


@pytest.fixture(params=CONFIGS, scope="module")
def model(request):
    return Compiled(CONFIGS[request.param])


def reference(config: DecoderConfig, params, tokens_T, first_position=0) -> np.ndarray:
    """Logits `[T, V]` of one row, a token and a head at a time, in float64."""
    p = {name: np.asarray(array, np.float64) for name, array in params.items()}

    def norm(x_D, scale_D):
        return x_D / math.sqrt((x_D**2).mean() + config.norm_epsilon) * scale_D

    def turn(x_H, position):
        """Rotates each pair (x_j, x_{j + H/2}), a complex number, by its angle."""
        half, out = len(x_H) // 2, x_H.copy()
        for j in range(half):
            frequency = 100.0 ** (-2 * j / len(x_H))
            if config.ropes == (LLAMA3_ROPE,):
                scaling = LLAMA3
                wavelength, original = 2 * math.pi / frequency, scaling["original_max_position_embeddings"]
                if wavelength > original / scaling["low_freq_factor"]:
                    frequency /= scaling["factor"]
                elif wavelength > original / scaling["high_freq_factor"]:
                    smooth = (original / wavelength - scaling["low_freq_factor"]) / (
                        scaling["high_freq_factor"] - scaling["low_freq_factor"]
                    )
                    frequency = (1 - smooth) * frequency / scaling["factor"] + smooth * frequency
            turned = complex(x_H[j], x_H[j + half]) * cmath.exp(1j * position * frequency)
            out[j], out[j + half] = turned.real, turned.imag
        return out

    x_TD = p["embedding_VD"][np.asarray(tokens_T)]
    for layer in range(config.num_layers):
        weights = {name: array[layer] for name, array in p.items() if name.rpartition("_")[2].startswith("L")}
        keys, values, attended_TD = [], [], np.zeros_like(x_TD)
        for t, x_D in enumerate(x_TD):
            normed_D, position = norm(x_D, weights["attention_norm_LD"]), first_position + t
            key_KH = np.einsum("d,dkh->kh", normed_D, weights["key_LDKH"]) + weights.get("key_bias_LKH", 0)
            value_KH = np.einsum("d,dkh->kh", normed_D, weights["value_LDKH"]) + weights.get("value_bias_LKH", 0)
            query_NH = np.einsum("d,dnh->nh", normed_D, weights["query_LDNH"]) + weights.get("query_bias_LNH", 0)
            keys.append([turn(key_H, position) for key_H in key_KH])
            values.append(value_KH)
            for n in range(config.num_heads):
                k = n * config.num_kv_heads // config.num_heads
                scores = np.array([turn(query_NH[n], position) @ key[k] for key in keys]) / math.sqrt(config.head_width)
                weight = np.exp(scores - scores.max())
                mixed_H = sum(w * value[k] for w, value in zip(weight / weight.sum(), values, strict=True))
                attended_TD[t] += mixed_H @ weights["output_LNHD"][n]
        x_TD = x_TD + attended_TD
        for t, x_D in enumerate(x_TD):
            normed_D = norm(x_D, weights["mlp_norm_LD"])
            gate_F = normed_D @ weights["gate_LDF"]
            x_TD[t] = x_D + (gate_F / (1 + np.exp(-gate_F)) * (normed_D @ weights["up_LDF"])) @ weights["down_LFD"]
    head_DV = p["embedding_VD"].T if config.tied_embeddings else p["unembedding_DV"]
    return np.array([norm(x_D, p["final_norm_D"]) @ head_DV for x_D in x_TD])


def test_logits_are_those_of_the_twin(model):
    logits_BTV = model.logits(TOKENS)
    assert logits_BTV.dtype == np.float32
    for logits_TV, tokens_T in zip(logits_BTV, TOKENS, strict=True):
        np.testing.assert_allclose(logits_TV, reference(model.config, model.params, tokens_T), atol=1e-4)


def test_given_positions_are_taken(model):
    found = model.logits(TOKENS, first_position=30)[0]
    np.testing.assert_allclose(found, reference(model.config, model.params, TOKENS[0], 30), atol=1e-4)


def pad_rows(lengths, left):
    tokens, mask = np.full(TOKENS.shape, 7), np.zeros(TOKENS.shape, bool)
    for row, size in enumerate(lengths):
        place = slice(13 - size, None) if left else slice(0, size)
        tokens[row, place], mask[row, place] = TOKENS[row, :size], True
    return tokens, mask


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_padding_changes_nothing(model, left):
    lengths = (12, 5, 1)
    tokens, mask = pad_rows(lengths, left)
    padded = model.logits(tokens, mask)
    assert np.isfinite(padded).all()
    for row, size in enumerate(lengths):
        expected = reference(model.config, model.params, TOKENS[row, :size])
        np.testing.assert_allclose(padded[row][mask[row]], expected, atol=1e-4)


def test_a_fork_is_two_texts_after_one_prompt(model):
    """Prompts padded on the left, both continuations on the right, one of them empty."""
    prompts, firsts, seconds = (4, 2, 3), (5, 3, 0), (2, 4, 3)
    texts, mask = np.zeros((3, 13), int), np.zeros((3, 13), bool)
    for row, (prompt, first, second) in enumerate(zip(prompts, firsts, seconds, strict=True)):
        for start, length in (4 - prompt, prompt), (4, first), (9, second):
            texts[row, start : start + length] = TOKENS[row, start : start + length]
            mask[row, start : start + length] = True
    found = model.head(model.hidden(model.params, Tokens(texts, mask), branches=(4, 5)))
    for row, first in enumerate(firsts):
        places = np.arange(13)
        for branch in (places < 4 + first) & mask[row], ((places < 4) | (places >= 9)) & mask[row]:
            expected = reference(model.config, model.params, texts[row, branch])
            np.testing.assert_allclose(found[row, branch], expected, atol=1e-4)


def test_packed_texts_do_not_see_each_other(model):
    """Three texts in a row, padding before, between and behind them."""
    texts = ((1, 5), (5, 9), (10, 12))
    tokens, mask = TOKENS[:1], np.zeros((1, 13), np.int32)
    for number, (start, end) in enumerate(texts, start=1):
        mask[0, start:end] = number
    found = model.head(model.hidden(model.params, Tokens(tokens, mask)))
    unpadded = model.head(model.hidden(model.params, Tokens(tokens, mask, 11)))
    np.testing.assert_allclose(unpadded[mask != 0], found[mask != 0], atol=1e-5)
    for start, end in texts:
        expected = reference(model.config, model.params, tokens[0, start:end])
        np.testing.assert_allclose(found[0, start:end], expected, atol=1e-4)


@pytest.mark.parametrize("room", [18, 39])
def test_leaving_padding_out_changes_nothing(model, room):
    """16 real tokens of 39 places, padding on both sides; whole texts, and two texts after a prompt."""
    tokens, mask = pad_rows((12, 5, 1), left=True)
    mask[1, -2:] = False
    for branches in (None, (6, 3)):
        expected = np.asarray(model.hidden(model.params, Tokens(tokens, mask), branches=branches))
        found = np.asarray(model.hidden(model.params, Tokens(tokens, mask, room), branches=branches))
        np.testing.assert_allclose(found[mask], expected[mask], atol=1e-5)
        assert (found[~mask] == 0).all() or room == mask.size  # where there is no padding, nothing moves
    assert np.isnan(model.hidden(model.params, Tokens(tokens, mask, int(mask.sum()) - 1))).all()


@pytest.mark.parametrize(("at_once", "unroll"), [(1, False), (1, True), (3, False), (3, True)])
def test_cached_decoding_is_the_full_forward(model, at_once, unroll):
    """Prompts of different lengths, padded on the right, and what follows each of them, some tokens at a time."""
    layers = Model(model.config, model.params).unstacked(model.params, 3 * at_once) if unroll else None
    if unroll:
        assert sum(isinstance(weight, Tiled) for weight in layers[0].values()) == 4 * (model.config.width == 64)
    starts = np.array([6, 2, 1])
    prompt = Tokens(TOKENS[:, :6], np.arange(6) < starts[:, None], int(starts.sum()) if unroll else None)
    hidden_BTD, cache = model.prefill(model.params, prompt, 15)
    cache = cache.unstacked() if unroll else cache
    found = [[hidden_BTD[row, :start]] for row, start in enumerate(starts)]
    for _ in range(0, 6, at_once):
        places_BT = np.asarray(cache.length_B)[:, None] + np.arange(at_once)
        new = np.take_along_axis(TOKENS, places_BT, axis=1)
        hidden_BTD, cache = model.extend(model.params, new, cache, layers)
        cache = cache.longer(jnp.full(3, at_once))
        for row in range(3):
            found[row].append(hidden_BTD[row])
    assert cache.length_B.tolist() == (starts + 6).tolist()
    for row, parts in enumerate(found):
        expected = reference(model.config, model.params, TOKENS[row, : starts[row] + 6])
        np.testing.assert_allclose(model.head(np.concatenate(parts)), expected, atol=1e-4)


def test_tokens_that_do_not_count_are_not_seen_later(model):
    """Decoding goes on where a row is done, and drafts may be wrong; the cache must stay as it was."""
    _, cache = model.prefill(model.params, Tokens(TOKENS[:, :6]), 15)
    _, cache = model.extend(model.params, TOKENS[:, 6:9], cache)
    kept = np.array([0, 3, 1])
    cache = cache.longer(kept)
    hidden_BTD, _ = model.extend(model.params, TOKENS[:, 9:11], cache)
    for row, count in enumerate(kept):
        text = np.concatenate([TOKENS[row, : 6 + count], TOKENS[row, 9:11]])
        expected = reference(model.config, model.params, text)[-2:]
        np.testing.assert_allclose(model.head(hidden_BTD[row]), expected, atol=1e-4)


def test_windows_and_softcap_over_a_cache_are_those_of_a_whole_pass():
    config = replace(CONFIGS["qwen2"], attention_softcap=5.0, windows=(3, 64, 3))
    model = Model(config, random_params(config))
    whole = model.hidden(model.params, Tokens(TOKENS))
    starts = np.array([6, 2, 4])
    _, cache = model.prefill(model.params, Tokens(TOKENS[:, :6], np.arange(6) < starts[:, None]), 13)
    for at_once in (1, 4):
        new = np.take_along_axis(TOKENS, np.asarray(cache.length_B)[:, None] + np.arange(at_once), axis=1)
        hidden_BTD, cache = model.extend(model.params, new, cache)
        cache = cache.longer(at_once)
        for row, start in enumerate(starts):
            place = start if at_once == 1 else start + 1
            np.testing.assert_allclose(hidden_BTD[row], whole[row, place : place + at_once], atol=2e-5)


def test_a_cache_may_begin_empty(model):
    cache = model.empty_cache(model.params, 3, 9)
    hidden_BTD, _ = model.extend(model.params, TOKENS[:, :7], cache)
    np.testing.assert_allclose(model.head(hidden_BTD), model.logits(TOKENS[:, :7]), atol=2e-5)


def test_recomputed_layers_give_the_same_gradients():
    config = CONFIGS["qwen2"]
    params = random_params(config)

    chosen = {name: params[name] for name in ("embedding_VD", "query_LDNH", "key_bias_LKH", "down_LFD")}

    def gradients(remat):
        model = Model(replace(config, remat=remat), params)
        loss = lambda chosen: jnp.sum(jnp.sin(model.hidden(params | chosen, Tokens(TOKENS))))  # noqa: E731
        return quick_jit(jax.grad(loss))(chosen)

    again = gradients(True)
    for name, gradient in gradients(False).items():
        largest = float(np.abs(gradient).max())
        # The softmax does not see what all keys have in common, so the keys' bias has no gradient.
        assert largest > 1e-3 or name == "key_bias_LKH", name
        np.testing.assert_allclose(again[name], gradient, atol=1e-5 * max(largest, 1), err_msg=name)


def test_a_pass_has_the_same_bits_with_and_without_a_backward_pass():
    """A student and a teacher that are equal: Eq. 12 would divide by what they differ by."""
    random = np.random.default_rng(0)
    config = DecoderConfig(
        family="llama",
        vocab_size=128,
        num_layers=2,
        width=576,
        num_heads=9,
        num_kv_heads=3,
        head_width=64,
        ffn_width=1536,
        max_positions=512,
        ropes=(plain_rope(10_000.0, 64),),
        tied_embeddings=True,
    )
    model = Model(config, init_parameters(config, jax.random.key(0)))
    tokens_BT, mask_BT = random.integers(0, 128, (4, 120)), np.ones((4, 120), bool)
    mask_BT[1, :20] = False
    slope_BTD = random.normal(size=(4, 120, 576)).astype(np.float32)

    @used_jit
    def both(student, teacher):
        def loss(params):
            hidden_BTD = model.hidden(params, Tokens(tokens_BT, mask_BT))
            return jnp.sum(hidden_BTD * slope_BTD), hidden_BTD

        (_, hidden_BTD), grads = jax.value_and_grad(loss, has_aux=True)(student)
        return hidden_BTD, model.hidden(teacher, Tokens(tokens_BT, mask_BT)), grads

    student_BTD, teacher_BTD, _ = both(model.params, jax.tree.map(jnp.copy, model.params))
    np.testing.assert_array_equal(np.asarray(student_BTD)[mask_BT], np.asarray(teacher_BTD)[mask_BT])


def test_bfloat16_stays_bfloat16(model):
    halved = {name: jnp.asarray(array, jnp.bfloat16) for name, array in model.params.items()}
    hidden, cache = jax.eval_shape(lambda: Model(model.config, halved).prefill(halved, Tokens(TOKENS), 15))
    assert hidden.dtype == cache.key_LBKHS.dtype == cache.value_LBKSH.dtype == jnp.bfloat16
    step, _ = jax.eval_shape(lambda cache: Model(model.config, halved).extend(halved, TOKENS[:, :1], cache), cache)
    assert step.dtype == jnp.bfloat16
    logits = np.asarray(model.apply(halved, TOKENS, None, TOKENS >= 0))
    assert logits.dtype == np.float32
    error = logits - model.logits(TOKENS)
    assert 0 < np.sqrt(np.mean(error**2)) < 0.05 * model.logits(TOKENS).std()


def test_initial_parameters():
    config = CONFIGS["qwen2"]
    key, table = jax.random.key(0, impl="rbg"), parameter_table(config)
    params = quick_jit(init_parameters, static_argnums=0)(config, key)
    assert {name: array.shape for name, array in params.items()} == {n: info.shape for n, info in table.items()}
    assert "unembedding_DV" not in table and "unembedding_DV" in parameter_table(LLAMA)
    for name, array in params.items():
        if "norm" in name or "bias" in name:
            assert (array == ("norm" in name)).all()
        else:
            np.testing.assert_allclose(np.std(array), table[name].fan_in ** -0.5, rtol=0.1)


@pytest.mark.parametrize("num_layers", [None, 3])
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("shape", [None, (2, 2, 2), (1, 8, 1)])
def test_where_new_keys_are_written(num_layers, T, shape, monkeypatch):
    """By one scatter, and as on a TPU row by row on each device's own rows, against NumPy."""
    rng, places = np.random.default_rng(0), np.array([0, 4, 2, 1, 0, 3, 4, 2], np.int32)
    stack = () if num_layers is None else (num_layers,)
    past = rng.normal(size=(*stack, 8, 2, 5, 7)).astype(np.float32)
    new = rng.normal(size=(*stack, 8, 2, 5, T)).astype(np.float32)
    expected = past.copy()
    for row, place in enumerate(places):
        expected[..., row, :, :, place : place + T] = new[..., row, :, :, :]
    mesh = None if shape is None else make_mesh(*shape)
    for device in ("cpu", "tpu"):
        monkeypatch.setattr(decoder, "platform", lambda device=device: device)
        with use_mesh(mesh):
            keys = jax.jit(partial(decoder.write_slots, axis=-1))(past, new, places)
            values = jax.jit(partial(decoder.write_slots, axis=-2))(past.swapaxes(-1, -2), new.swapaxes(-1, -2), places)
        np.testing.assert_array_equal(keys, expected)
        np.testing.assert_array_equal(values, expected.swapaxes(-1, -2))
