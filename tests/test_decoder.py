"""The decoder against a float64 NumPy twin, against stored values of the real SmolLM2, and against itself.

The comparisons with transformers on torch, live, are in test_export.py.
"""

import cmath
import math
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from raft_jax.models import Model
from raft_jax.models.decoder import DecoderConfig, init_parameters, parameter_table

LLAMA = DecoderConfig(
    family="llama", vocab_size=61, num_layers=3, width=20, num_heads=4, num_kv_heads=2, head_width=6, ffn_width=28,
    max_positions=64, rope_theta=100.0,
)
CONFIGS = {
    "llama": LLAMA,
    "tied": replace(LLAMA, tied_embeddings=True, num_kv_heads=4),
    "one kv head": replace(LLAMA, num_kv_heads=1, norm_epsilon=1e-3),
    "llama3 rope": replace(LLAMA, rope_scaling=(
        ("factor", 8.0), ("high_freq_factor", 4.0), ("low_freq_factor", 1.0),
        ("original_max_position_embeddings", 40.0),
    )),
    "qwen2": replace(LLAMA, family="qwen2", qkv_bias=True),
}


def make_model(config: DecoderConfig) -> Model:
    """Random parameters, with norms that are not one and biases that are not zero."""
    params = init_parameters(config, jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), len(params))
    return Model(config, {
        name: array + 0.2 * jax.random.normal(key, array.shape)
        for key, (name, array) in zip(keys, params.items(), strict=True)
    })


@pytest.fixture(params=CONFIGS, scope="module")
def model(request):
    return make_model(CONFIGS[request.param])


@pytest.fixture
def tokens_BT():
    return np.random.default_rng(3).integers(0, LLAMA.vocab_size, (3, 13))


def twin(config: DecoderConfig, params, tokens_T, first_position=0) -> np.ndarray:
    """Logits `[T, V]` of one row, a token and a head at a time, in float64."""
    p = {name: np.asarray(array, np.float64) for name, array in params.items()}

    def norm(x_D, scale_D):
        return x_D / math.sqrt((x_D**2).mean() + config.norm_epsilon) * scale_D

    def turn(x_H, position):
        """Rotates each pair (x_j, x_{j + H/2}), a complex number, by its angle."""
        half, out = len(x_H) // 2, x_H.copy()
        for j in range(half):
            frequency = config.rope_theta ** (-2 * j / len(x_H))
            if config.rope_scaling:
                scaling = dict(config.rope_scaling)
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


def test_logits_are_those_of_the_twin(model, tokens_BT):
    logits_BTV = jax.jit(model.apply)(model.params, tokens_BT)
    assert logits_BTV.dtype == jnp.float32
    for logits_TV, tokens_T in zip(logits_BTV, tokens_BT, strict=True):
        np.testing.assert_allclose(logits_TV, twin(model.config, model.params, tokens_T), atol=1e-4)


def test_given_positions_are_taken(tokens_BT):
    model = make_model(CONFIGS["llama3 rope"])
    positions_BT = np.broadcast_to(np.arange(13) + 30, (3, 13))
    found = model.apply(model.params, tokens_BT, positions_BT)[0]
    np.testing.assert_allclose(found, twin(model.config, model.params, tokens_BT[0], 30), atol=1e-4)


def pad_rows(tokens_BT, lengths, length, left):
    tokens, mask = np.full((len(lengths), length), 7), np.zeros((len(lengths), length), bool)
    for row, size in enumerate(lengths):
        place = slice(length - size, None) if left else slice(0, size)
        tokens[row, place], mask[row, place] = tokens_BT[row, :size], True
    return tokens, mask


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_padding_changes_nothing(model, tokens_BT, left):
    lengths = (13, 5, 1)
    tokens, mask = pad_rows(tokens_BT, lengths, 17, left)
    padded = np.asarray(jax.jit(model.apply)(model.params, tokens, None, mask))
    assert np.isfinite(padded).all()
    for row, size in enumerate(lengths):
        alone = model.apply(model.params, tokens_BT[row : row + 1, :size])[0]
        np.testing.assert_allclose(padded[row][mask[row]], alone, atol=2e-5)


@pytest.mark.parametrize("start", [1, 6, 13])
def test_cached_decoding_is_the_full_forward(model, tokens_BT, start):
    lengths = (13, 9, 13 - start + 1)  # the last row begins with the prompt's last token
    tokens, mask = pad_rows(tokens_BT, lengths, 13, left=True)
    expected = np.asarray(model.hidden(model.params, tokens, None, mask))
    hidden_BTD, cache = jax.jit(model.prefill, static_argnums=3)(model.params, tokens[:, :start], mask[:, :start], 15)
    found, step = [hidden_BTD], jax.jit(model.step)
    for t in range(start, 13):
        hidden_B1D, cache = step(model.params, tokens[:, t : t + 1], mask[:, t : t + 1], cache)
        found.append(hidden_B1D)
    np.testing.assert_allclose(np.concatenate(found, axis=1)[mask], expected[mask], atol=2e-5)
    assert int(cache.length) == 13 and np.asarray(cache.mask_BS).sum(-1).tolist() == list(lengths)


def test_a_finished_row_does_not_move_its_neighbours():
    """Decoding goes on with a masked token where a row is done, and may take real ones again; nobody must see it."""
    model = make_model(LLAMA)
    _, cache = model.prefill(model.params, jnp.array([[1, 2, 3], [4, 5, 6]]), jnp.ones((2, 3), bool), 8)
    _, cache = model.step(model.params, jnp.array([[8], [9]]), jnp.array([[False], [True]]), cache)
    hidden_B1D, _ = model.step(model.params, jnp.array([[10], [11]]), jnp.ones((2, 1), bool), cache)
    for row, text in enumerate(([1, 2, 3, 10], [4, 5, 6, 9, 11])):
        expected = model.hidden(model.params, jnp.array([text]))[0, -1]
        np.testing.assert_allclose(hidden_B1D[row, 0], expected, atol=2e-5)


def test_recomputed_layers_give_the_same_gradients(tokens_BT):
    plain = make_model(CONFIGS["qwen2"])

    def gradients(model):
        return jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(model.hidden(params, tokens_BT)))))(plain.params)

    again = gradients(Model(replace(plain.config, remat=True), plain.params))
    for name, gradient in gradients(plain).items():
        np.testing.assert_allclose(again[name], gradient, atol=1e-4, err_msg=name)
        assert np.abs(gradient).max() > 1e-3, name


def test_bfloat16_stays_bfloat16(tokens_BT):
    model = make_model(LLAMA)
    halved = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
    assert model.hidden(halved, tokens_BT).dtype == jnp.bfloat16
    logits = model.apply(halved, tokens_BT)
    assert logits.dtype == jnp.float32
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), halved)
    expected = model.apply(rounded, tokens_BT)
    assert float(jnp.max(jnp.abs(logits - expected))) < 0.05 * float(jnp.max(jnp.abs(expected)))


def test_initial_parameters():
    for config in CONFIGS.values():
        params, table = init_parameters(config, jax.random.key(0)), parameter_table(config)
        assert {name: array.shape for name, array in params.items()} == {n: info.shape for n, info in table.items()}
        assert ("unembedding_DV" in params) != config.tied_embeddings
        for name, array in params.items():
            if "norm" in name or "bias" in name:
                assert (array == ("norm" in name)).all()
            else:
                np.testing.assert_allclose(array.std(), table[name].fan_in ** -0.5, rtol=0.1)


def test_smollm2_logits(smollm2_logits, smollm2_golden):
    golden = np.load(Path(__file__).parent / "fixtures/smollm2/logits.npz")
    assert len(smollm2_logits) == len(smollm2_golden["tokens"]) > 200
    np.testing.assert_allclose(smollm2_logits[:, golden["columns"]], golden["logits"], atol=2e-3, rtol=0)
    np.testing.assert_allclose(smollm2_logits.max(-1), golden["largest"], atol=2e-3, rtol=0)
    normaliser = np.asarray(jax.nn.logsumexp(smollm2_logits, axis=-1))
    np.testing.assert_allclose(normaliser, golden["normaliser"], atol=2e-3, rtol=0)
    assert (smollm2_logits.argmax(-1) == golden["best"]).mean() > 0.98


def test_smollm2_greedy_answers(smollm2_greedy, smollm2_golden):
    assert smollm2_greedy == smollm2_golden["greedy"]
