"""The workarounds for XLA on CPU: products by tiles against NumPy in float64, and each beside the plain program."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from raft_jax.models import Model, xla_cpu
from raft_jax.models.config import DecoderConfig
from raft_jax.models.decoder import init_parameters
from raft_jax.models.families.rope import plain_rope
from raft_jax.models.xla_cpu import Tiled, product, tiled
from raft_jax.sampling import Sampler, make_generate
from raft_jax.tokens import Tokens

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("num_inputs, num_outputs", [(576, 128), (64, 64), (2048, 192), (37, 64)])
@pytest.mark.parametrize("num_rows", [2, 3, 16])
def test_a_product_is_that_of_the_matrix(num_rows, num_inputs, num_outputs):
    matrix = RANDOM.normal(size=(num_inputs, num_outputs)).astype(np.float32)
    x = RANDOM.normal(size=(num_rows, 1, num_inputs)).astype(np.float32)
    layout = tiled(jnp.asarray(matrix), num_rows)
    assert isinstance(layout, Tiled)
    found = jax.jit(product)(x, layout)
    assert found.shape == (num_rows, 1, num_outputs) and found.dtype == np.float32
    np.testing.assert_allclose(found, x.astype(np.float64) @ matrix, atol=2e-5 * (num_inputs / 64) ** 0.5)


@pytest.mark.parametrize(
    "num_rows, shape, dtype",
    [(1, (576, 128), np.float32), (17, (576, 128), np.float32), (4, (576, 100), np.float32), (4, (149, 64), np.float32),
     (4, (576, 128), jnp.bfloat16)],
)  # fmt: skip
def test_where_tiles_do_not_pay_the_matrix_stays(num_rows, shape, dtype):
    matrix = jnp.ones(shape, dtype)
    assert tiled(matrix, num_rows) is matrix
    assert product(jnp.ones((num_rows, shape[0]), dtype), matrix, jnp.float32).dtype == np.float32


# Wide enough for tiles.
CONFIG = DecoderConfig(
    family="llama",
    vocab_size=128,
    num_layers=2,
    width=64,
    num_heads=4,
    num_kv_heads=2,
    head_width=32,
    ffn_width=128,
    max_positions=64,
    ropes=(plain_rope(100.0, 32),),
)


@pytest.fixture
def without(monkeypatch):
    """`without(*workarounds)`: programs are built without them."""
    return lambda *workarounds: monkeypatch.setattr(xla_cpu, "WITHOUT", set(workarounds))


@pytest.mark.parametrize("workaround", ["norm", "matmul"])
def test_gradients_are_those_of_the_plain_program(without, workaround):
    params = init_parameters(CONFIG, jax.random.key(0))
    tokens = Tokens(jnp.asarray(RANDOM.integers(0, 128, (2, 9))))

    def gradients(params):
        return jax.grad(lambda params: jnp.sum(jnp.sin(Model(CONFIG, params).hidden(params, tokens))))(params)

    ours = jax.jit(gradients)
    text = ours.lower(params).as_text()
    found = ours(params)
    without(workaround)
    plain = jax.jit(lambda params: gradients(params))
    assert plain.lower(params).as_text() != text  # it was in the program
    for name, expected in plain(params).items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max(), err_msg=name)


def test_tokens_decoded_by_tiles_are_those_of_the_plain_program(without):
    params = init_parameters(CONFIG, jax.random.key(1))
    model = Model(CONFIG, params, SimpleNamespace(stop_ids=(-1,), pad_id=0))
    prompt = Tokens(jnp.asarray(RANDOM.integers(0, 128, (3, 5))))
    arguments = params, prompt, jnp.arange(3), jax.random.key(2), jnp.float32(1.0)
    with_tiles = make_generate(model, 12, unroll=True)
    assert any(isinstance(weight, Tiled) for weight in model.unstacked(params, 3)[0].values())
    found = with_tiles(*arguments)
    without("tiles")
    assert not any(isinstance(weight, Tiled) for weight in model.unstacked(params, 3)[0].values())
    assert found.ids.tolist() == make_generate(model, 12, unroll=True)(*arguments).ids.tolist()
    assert len(set(found.ids.ravel().tolist())) > 10


@pytest.mark.parametrize("num_rows", [1, 3])
def test_16_bit_weights_are_never_all_held_in_float32(without, num_rows):
    config = replace(CONFIG, num_layers=32)
    params = init_parameters(config, jax.random.key(3), jnp.bfloat16)
    model = Model(config, params, SimpleNamespace(stop_ids=(-1,), pad_id=0))
    in_float32 = sum(4 * weight.size for name, weight in params.items() if "_L" in name)
    prompts, temporary, answers = [[5, 6, 7]] * num_rows, [], []
    for workarounds in ((), ("narrow",)):
        without(*workarounds)
        sampler = Sampler(model, batch_size=num_rows)
        answers.append(sampler.generate(params, prompts, key=jax.random.key(4), temperature=0.0, max_new_tokens=4))
        (programs,) = sampler._programs.values()
        rows = jax.eval_shape(programs.empty, params, num_rows, 8, False)
        arguments = params, rows, jax.random.key(0), jnp.float32(0), jnp.int32(1), jnp.int32(4)
        temporary.append(programs.decode.lower(*arguments).compile().memory_analysis().temp_size_in_bytes)
    assert temporary[0] < in_float32 / 4 and temporary[1] > in_float32
    assert answers[0] == answers[1]


@pytest.mark.parametrize("rows", [(), (1,), (1, 1), (2, 1)])
def test_a_product_of_16_bits_is_that_of_the_matrix(rows):
    matrix, x = (jnp.asarray(RANDOM.normal(size=shape), jnp.bfloat16) for shape in ((576, 128), (*rows, 576)))
    found = jax.jit(partial(product, dtype=jnp.float32))(x, matrix)
    assert found.shape == (*rows, 128)
    np.testing.assert_allclose(found, np.asarray(x, np.float64) @ np.asarray(matrix, np.float64), atol=1e-4)


def test_a_row_by_16_bits_does_not_convert_the_matrix(without):
    shapes = jax.ShapeDtypeStruct((1, 576), jnp.bfloat16), jax.ShapeDtypeStruct((576, 8192), jnp.bfloat16)
    temporary = []
    for workarounds in ((), ("narrow",)):
        without(*workarounds)
        program = jax.jit(lambda x, matrix: product(x, matrix, jnp.float32)).lower(*shapes).compile()
        temporary.append(program.memory_analysis().temp_size_in_bytes)
    assert temporary[0] < 576 * 8192 and temporary[1] >= 4 * 576 * 8192
