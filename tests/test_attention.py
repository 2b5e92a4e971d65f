"""The attention, plain and by kernels, against a float64 NumPy reference; splash runs in Pallas's interpreter."""

import re
from collections import Counter
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from quick import as_one

from raft_jax.config import ATTENTION
from raft_jax.errors import InputError
from raft_jax.models import attention, load_pretrained
from raft_jax.models.config import parameter_table
from raft_jax.models.decoder import positions_from_mask
from raft_jax.sharding import make_mesh
from raft_jax.tokens import Tokens

B, N, K, H = 2, 4, 2, 16


def arrays(T, S, seed=0, packed=False):
    """Random query, key and value, the slope of the output, and a mask with padding on both sides, or packed texts."""
    random = np.random.default_rng(seed)
    query, slope = random.normal(size=(2, B, T, N, H)).astype(np.float32)
    key, value = random.normal(size=(2, B, S, K, H)).astype(np.float32)
    mask_BS = np.ones((B, S), bool)
    mask_BS[0, :3] = mask_BS[1, -2:] = False
    if packed:  # texts of other lengths in each row
        mask_BS = mask_BS * (1 + (np.arange(S) >= np.array([[S // 3], [S // 2]])) + (np.arange(S) >= S - 5))
        mask_BS = mask_BS.astype(np.int32)
    return query, key, value, mask_BS, slope


def reference(query, key, value, mask_BS, scale, softcap, window):
    """One query and one head after the other, in float64."""
    T, S = query.shape[1], key.shape[1]
    mixed = np.zeros(query.shape)
    for b, t, n in np.ndindex(B, T, N):
        own = S - T + t
        text = mask_BS[b, own]
        seen = [s for s in range(own + 1) if text and mask_BS[b, s] == text and (window is None or own - s < window)]
        if not seen:
            continue
        keys, values = (array[b, seen, n * K // N].astype(float) for array in (key, value))
        scores = scale * keys @ query[b, t, n].astype(float)
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        weight = np.exp(scores - scores.max())
        mixed[b, t, n] = weight @ values / weight.sum()
    return mixed


CASES = {  # T, S, soft-cap, window, packed
    "whole": (40, 40, None, None, False),
    "last of many": (24, 152, None, None, False),
    "last of some": (24, 40, None, None, False),
    "window": (40, 40, None, 7, False),
    "soft-cap": (40, 40, 2.0, None, False),
    "all": (24, 140, 5.0, 9, False),
    "packed": (40, 40, None, None, True),
    "packed, all": (24, 140, 5.0, 9, True),
}


def compare_with_the_twin(run, given, mask_BS, slope, *settings):
    """Values, and the gradient of each argument along a direction, by finite differences of the reference."""
    real = mask_BS[:, mask_BS.shape[1] - given[0].shape[1] :] != 0
    slope = slope * real[..., None, None]

    def weighed(*given):
        mixed = run(*given, mask_BS)
        return jnp.sum(mixed * slope), mixed

    (found, whole), grads = jax.jit(jax.value_and_grad(weighed, (0, 1, 2), has_aux=True))(*given)
    whole = np.asarray(whole)
    expected = reference(*given, mask_BS, *settings)
    np.testing.assert_allclose(whole[real], expected[real], atol=2e-5)
    np.testing.assert_allclose(found, np.sum(expected * slope), rtol=1e-4, atol=1e-3)
    assert np.isfinite(whole).all()
    for place, grad in enumerate(grads):
        direction = np.random.default_rng(place).normal(size=grad.shape)
        moved = []
        for step in (1e-5, -1e-5):
            arguments = [x + step * direction if i == place else x for i, x in enumerate(given)]
            moved.append(np.sum(slope * reference(*arguments, mask_BS, *settings)))
        expected_slope = (moved[0] - moved[1]) / 2e-5
        np.testing.assert_allclose(np.sum(np.asarray(grad) * direction), expected_slope, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_splash_is_the_twin(case):
    T, S, softcap, window, packed = CASES[case]
    *given, mask_BS, slope = arrays(T, S, packed=packed)
    run = partial(attention.flash, kernel="splash", scale=0.3, softcap=softcap, window=window, interpret=True)
    compare_with_the_twin(run, given, mask_BS, slope, 0.3, softcap, window)


@pytest.mark.parametrize("case", [case for case, (T, S, *_) in CASES.items() if T == S])
@pytest.mark.parametrize("length", [40, 140])  # within a block of queries, and across two
def test_the_plain_one_is_the_twin(case, length):
    _, _, softcap, window, packed = CASES[case]
    *given, mask_BS, slope = arrays(length, length, packed=packed)
    config = tiny.make_config(8, num_heads=N, num_kv_heads=K, head_width=H, attention_softcap=softcap)

    def run(query, key, value, mask_BS):
        positions = positions_from_mask(jnp.asarray(mask_BS))
        return attention.attend(
            config, 0.3 * query, *attention.for_attention(key, value), positions, jnp.asarray(mask_BS), None, window
        )

    compare_with_the_twin(run, given, mask_BS, slope, 0.3, softcap, window)


def test_a_fork_longer_than_a_block_is_two_texts():
    """The second branch's queries go in blocks, too, and have more keys than queries."""
    P, A, C = 20, 30, 140
    query, key, value, _, _ = arrays(P + A + C, P + A + C)
    config = tiny.make_config(8, num_heads=N, num_kv_heads=K, head_width=H)
    mask = jnp.ones((B, P + A + C), bool)

    @jax.jit
    def forked(query, key, value):
        key, value = attention.for_attention(key, value)
        return attention.attend(config, query, key, value, positions_from_mask(mask, (P, A)), mask, (P, A), None)

    found = forked(0.3 * query, key, value)
    places = np.arange(P + A + C)
    for branch in places < P + A, (places < P) | (places >= P + A):
        whole = np.ones((B, branch.sum()), bool)
        expected = reference(query[:, branch], key[:, branch], value[:, branch], whole, 0.3, None, None)
        np.testing.assert_allclose(found[:, branch], expected, atol=2e-5)


def test_the_plain_ones_gradients_in_bfloat16():
    *given, mask_BS, slope = arrays(40, 40)
    config = tiny.make_config(8, num_heads=N, num_kv_heads=K, head_width=H)
    real = mask_BS[..., None, None]

    def weighed(query, key, value):
        key, value = attention.for_attention(key, value)
        mixed = attention.attend(config, query, key, value, positions_from_mask(mask_BS), mask_BS, None, None)
        return jnp.sum(jnp.where(real, mixed, 0) * slope.astype(mixed.dtype), dtype=jnp.float32)

    mask_BS = jnp.asarray(mask_BS)
    grads = jax.jit(jax.grad(weighed, (0, 1, 2)))
    expected = grads(*given)
    for found, wide in zip(grads(*(jnp.asarray(x, jnp.bfloat16) for x in given)), expected, strict=True):
        assert found.dtype == jnp.bfloat16
        error = np.asarray(found, np.float32) - wide
        assert 0 < np.sqrt(np.mean(error**2)) < 0.02 * np.std(wide)


OWN_MASK = ("whole", "last of some")  # cases in which cuDNN's own causal mask is used


@pytest.mark.parametrize("odd", [(0, 0), (1, 1), (0, 1), (1, 2)])
@pytest.mark.parametrize("case", ["whole", "last of some", "last of many", "window", "packed"])
def test_cudnn_is_asked_for_the_same(case, odd, monkeypatch):
    """Without the GPU its call is answered by JAX's own implementation: what is tested are masks, lengths and scale."""
    real_function, asked = jax.nn.dot_product_attention, []

    def answered_here(*args, implementation, **settings):
        asked.append(settings)
        assert implementation == "cudnn"
        if "mask" in settings:
            assert all(array.shape[1] % 2 == 0 for array in args)  # which JAX wants of it in training
        return real_function(*args, implementation="xla", **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", answered_here)
    T, S, _, window, packed = CASES[case]
    T, S = T + odd[0], S + odd[1]
    *given, mask_BS, _ = arrays(T, S, packed=packed)
    found = np.asarray(as_one(attention.flash, *given, mask_BS, kernel="cudnn", scale=0.3, window=window))
    real = mask_BS[:, S - T :] != 0
    np.testing.assert_allclose(found[real], reference(*given, mask_BS, 0.3, None, window)[real], atol=2e-5)
    assert np.isfinite(found).all()
    own = case in OWN_MASK
    assert [("mask" in settings, settings.get("is_causal", False)) for settings in asked] == [(not own, own)]


@pytest.mark.parametrize(("T", "S"), [(20, 20), (13, 20)])
def test_gradients_with_cudnns_own_mask_and_whatever_it_leaves_at_padding(T, S, monkeypatch):
    """Those of plain attention, with masks that have holes, and with NaN at padding, where cuDNN promises nothing."""
    real_function = jax.nn.dot_product_attention

    def answered_here(*args, implementation, query_seq_lengths, **settings):
        mixed = real_function(*args, implementation="xla", query_seq_lengths=query_seq_lengths, **settings)
        real_BT = jnp.arange(mixed.shape[1]) < query_seq_lengths[:, None]
        return jnp.where(real_BT[..., None, None], mixed, jnp.nan)

    monkeypatch.setattr(jax.nn, "dot_product_attention", answered_here)
    *given, mask_BS, slope = arrays(T, S)
    mask_BS[0, S - T + 4] = mask_BS[1, 2] = False

    def run(*arguments):
        return attention.flash(*arguments, jnp.asarray(mask_BS), kernel="cudnn", scale=0.3)

    def plain(query, key, value):
        seen_BTS = attention.visible(T, S, None) & attention.same_segment(jnp.asarray(mask_BS), T)
        scores = jnp.where(seen_BTS[:, None], 0.3 * jnp.einsum("btnh,bsnh->bnts", query, heads(key)), -1e30)
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), heads(value))

    def heads(array):
        return jnp.repeat(array, N // K, axis=2)

    def weighed(function):
        real = mask_BS[:, S - T :, None, None]
        return lambda *arguments: jnp.sum(jnp.where(real, slope * function(*arguments), 0))

    found, expected = (as_one(jax.grad(weighed(f), (0, 1, 2)), *given) for f in (run, plain))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.fixture
def a_gpu_with_cudnn(monkeypatch):
    """What JAX asks the machine before it lowers a call of cuDNN."""
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused, "check_compute_capability", lambda wanted: True)


def kernels(platform: str, function, *arguments) -> dict[str, int]:
    """How often each kernel is called by the program that another platform's compiler would get."""
    program = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    return dict(Counter(re.findall(r'@__cudnn\$(\w+)\(|kernel_name = "splash_mha_([a-z]+)', program)))


@pytest.mark.parametrize("width", [64, 96, 128])
@pytest.mark.parametrize("case", ["whole", "last of some", "last of many", "window", "packed"])
@pytest.mark.parametrize("odd", [(0, 0), (1, 2)])
def test_what_goes_to_a_gpu_is_cudnns(a_gpu_with_cudnn, case, odd, width):
    """Forward and backward pass, through all that JAX wants of shapes and dtypes; no GPU is needed to lower them."""
    T, S, _, window, packed = CASES[case]
    T, S = T + odd[0], S + odd[1]
    query, key = (jax.ShapeDtypeStruct((B, *shape, width), jnp.bfloat16) for shape in ((T, N), (S, K)))
    mask = jax.ShapeDtypeStruct((B, S), jnp.int32 if packed else jnp.bool_)

    def weighed(*arguments):
        run = partial(attention.flash, kernel="cudnn", scale=0.3, window=window)
        return jnp.sum(run(*arguments).astype(jnp.float32))

    found = kernels("cuda", jax.grad(weighed, (0, 1, 2)), query, key, key, mask)
    name = "fmhaSoftmax" if case in OWN_MASK else "fmhaScaleBiasSoftmax"
    assert found == {(name, ""): 1, (f"{name}Backward", ""): 1}


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize(
    ("kernel", "platform", "forward", "backward"),
    [
        # The prompt with cuDNN's own mask, and the branches, which attend to more than themselves, with theirs.
        (
            "cudnn",
            "cuda",
            {("fmhaSoftmax", ""): 1, ("fmhaScaleBiasSoftmax", ""): 2},
            {("fmhaSoftmaxBackward", ""): 1, ("fmhaScaleBiasSoftmaxBackward", ""): 2},
        ),
        # Answer and rollout are one shape for its blocks.
        ("splash", "tpu", {("", "fwd"): 2}, {("", "dq"): 2, ("", "dkv"): 2}),
    ],
)
def test_the_forward_kernel_runs_once(a_gpu_with_cudnn, kernel, platform, forward, backward, remat):
    """In the prompt and each branch, unpadded; and again in the backward pass where nothing is kept for it."""
    model = tiny.make_model()
    model = replace(model, config=replace(model.config, kernel=kernel, head_width=64, remat=remat))
    params = {
        name: jax.ShapeDtypeStruct(info.shape, jnp.bfloat16) for name, info in parameter_table(model.config).items()
    }
    tokens, mask = jax.ShapeDtypeStruct((2, 21), jnp.int32), jax.ShapeDtypeStruct((2, 21), jnp.bool_)

    def weighed(params, tokens, mask):
        return jnp.sum(model.hidden(params, Tokens(tokens, mask, 40), branches=(8, 7)).astype(jnp.float32))

    found = kernels(platform, jax.grad(weighed), params, tokens, mask)
    assert found == {name: count * (2 if remat else 1) for name, count in forward.items()} | backward


def test_splash_on_a_mesh():
    """Rows over data and fsdp, heads over tensor: the numbers of one device."""
    *given, mask_BS, _ = arrays(24, 24)
    given, mask_BS = [np.concatenate([x, x]) for x in given], np.concatenate([mask_BS, mask_BS])
    run = jax.jit(partial(attention.flash, kernel="splash", scale=0.3, interpret=True))
    expected = run(*given, mask_BS)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        np.testing.assert_allclose(run(*given, mask_BS), expected, atol=1e-6)


@pytest.mark.parametrize("windows", [None, (4, 99)])
def test_the_decoder_by_a_kernel(monkeypatch, windows):
    """Whole rows, two branches and a prompt, padded on the left; layers with and without a window."""
    plain = tiny.make_model()
    plain = replace(plain, config=replace(plain.config, windows=windows, attention_softcap=3.0))
    model = replace(plain, config=replace(plain.config, kernel="splash"))
    calls = []

    def flash(*arguments, **settings):
        calls.append(settings["window"])
        return real_flash(*arguments, interpret=True, **settings)

    real_flash = attention.flash
    monkeypatch.setattr(attention, "flash", flash)
    tokens = np.random.default_rng(0).integers(0, 200, (2, 20))
    mask = np.ones((2, 20), bool)
    mask[0, :3] = False
    for branches in (None, (8, 7)):
        found, expected = (as_one(x.hidden, x.params, Tokens(tokens, mask), branches=branches) for x in (model, plain))
        np.testing.assert_allclose(found[mask], expected[mask], atol=2e-5)
    found, expected = (as_one(x.prefill, x.params, Tokens(tokens, mask), length=24)[0] for x in (model, plain))
    np.testing.assert_allclose(found[mask], expected[mask], atol=2e-5)
    assert set(calls) == ({None} if windows is None else {4, None})


@pytest.mark.parametrize(
    ("backend", "dtype", "softcap", "head_width", "best"),
    [
        ("cpu", "bfloat16", None, 64, "plain"),
        ("tpu", "float32", 30.0, 256, "splash"),
        ("gpu", "bfloat16", None, 128, "cudnn"),
        ("gpu", "bfloat16", 30.0, 128, "plain"),
        ("gpu", "float32", None, 128, "plain"),
        ("gpu", "bfloat16", None, 256, "plain"),
    ],
)
def test_the_best_kernel(monkeypatch, backend, dtype, softcap, head_width, best):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert attention.best_kernel(dtype, softcap, head_width) == best


def test_what_cudnn_cannot_do_is_refused(tmp_path, llama_config, random_tensors, write_folder):
    """Its kernel would leave a soft-cap out without a word."""
    gemma2 = llama_config | {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
    }
    for name, config, dtype, words in (
        ("llama", llama_config, jnp.float32, "takes 16-bit floats only, not float32"),
        ("gemma2", gemma2, jnp.bfloat16, "has no soft-cap, and this model's attention has one of 50"),
    ):
        folder = write_folder(tmp_path / name, config, random_tensors(config | {"model_type": "llama"}))
        with pytest.raises(InputError, match=words):
            load_pretrained(str(folder), dtype, attention="cudnn")


def test_an_unknown_one_is_refused():
    with pytest.raises(InputError, match="attention 'flash' is not known; use auto, plain, splash, cudnn"):
        load_pretrained("nowhere", attention="flash")
    assert ("auto", *attention.KERNELS) == ATTENTION


@pytest.mark.slow
@pytest.mark.parametrize(("width", "softcap", "window"), [(64, None, None), (128, None, 1024), (256, 50.0, 512)])
def test_splash_compiles_for_a_tpu(width, softcap, window):
    """Forward and backward, at the head widths of real models."""
    pytest.importorskip("libtpu", reason="needs the extra raft-jax[tpu]")
    from jax.experimental import topologies

    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    place = jax.sharding.SingleDeviceSharding(device)

    def shape(*size, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(size, dtype, sharding=place)

    def weighed(query, key, value, mask):
        run = partial(attention.flash, kernel="splash", scale=0.1, softcap=softcap, window=window)
        return jnp.sum(run(query, key, value, mask).astype(jnp.float32))

    key = shape(2, 1280, 4, width)
    arguments = shape(2, 1024, 8, width), key, key, shape(2, 1280, dtype=jnp.bool_)
    program = jax.jit(jax.grad(weighed, (0, 1, 2))).lower(*arguments).compile()
    assert "tpu_custom_call" in program.as_text()
    # The scores of one model alone would take 2 x 8 x 1,024 x 1,280 floats.
    assert program.memory_analysis().temp_size_in_bytes < 2 * 8 * 1024 * 1280 * 4
