"""What devices send to each other, read from the programs that XLA makes for eight of them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import make_config, make_model

from raft_jax.models import Model, decoder, parameter_shardings
from raft_jax.models.config import parameter_table
from raft_jax.models.decoder import init_parameters
from raft_jax.models.layer import BATCH
from raft_jax.models.vocabulary import lookup
from raft_jax.plan import hlo
from raft_jax.sampling import make_generate
from raft_jax.sharding import make_mesh, named_sharding, put_batch, to_host, use_mesh
from raft_jax.tokens import Tokens

B, P, NEW = 8, 6, 5
MESHES = [(1, 8, 1), (2, 4, 1), (2, 2, 2), (1, 2, 4), (1, 4, 2), (8, 1, 1), (2, 1, 4)]


def wide_model(tied: bool) -> Model:
    """Matrices that are all larger than any activation of one token per row."""
    tokenizer = make_model().tokenizer
    config = make_config(254, vocab_padding=2, width=128, num_heads=8, num_kv_heads=4, tied_embeddings=tied)
    params = jax.jit(init_parameters, static_argnums=0)(config, jax.random.key(1, impl="rbg"))
    return Model(replace(config, kernel="plain"), params, tokenizer)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request):
    return wide_model(request.param)


def prompts():
    ids = np.random.default_rng(0).integers(0, 254, (B, P)).astype(np.int32)
    return Tokens(ids, np.arange(P) >= np.arange(B)[:, None] % 4), np.arange(B, dtype=np.int32)


def sampled(model, mesh=None):
    """The program of a rollout, and the tokens that it samples."""
    params, arrays = model.params, prompts()
    if mesh is not None:
        params, arrays = jax.device_put(params, parameter_shardings(model.config, mesh)), put_batch(arrays, mesh)
    with use_mesh(mesh):
        program = make_generate(model, NEW).lower(params, *arrays, jax.random.key(0), jnp.float32(1.0)).compile()
        return program, to_host(program(params, *arrays, jax.random.key(0), jnp.float32(1.0)).ids)


@pytest.fixture(scope="module")
def tokens_of_one_device(model):
    return sampled(model)[1]


def moved_per_token(program) -> list[tuple[float, str]]:
    """Bytes, kind and shape of the collectives in the loop over new tokens."""
    rows = hlo.Module(program.as_text(), unknown_trips=NEW).collectives()
    return [(row.num_bytes, f"{row.kind} {row.shape}") for row in rows if row.runs >= NEW]


def largest_activation(model) -> int:
    """Bytes of the largest activation of one token per row, which is less than any matrix."""
    sizes, table = model.config.sizes, parameter_table(model.config)
    matrices = [info.shape[1:] if name.rpartition("_")[2][0] == "L" else info.shape for name, info in table.items()]
    largest = 4 * B * max(sizes[letter] for letter in "VDF")
    assert all(4 * np.prod(shape) > largest for shape in matrices if len(shape) > 1)
    return largest


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_decoding_moves_activations_and_no_weights(model, tokens_of_one_device, shape):
    program, tokens = sampled(model, make_mesh(*shape))
    np.testing.assert_array_equal(tokens, tokens_of_one_device)
    assert [moved for moved in moved_per_token(program) if moved[0] > largest_activation(model)] == []


def test_weights_that_move_would_be_seen(model, monkeypatch):
    monkeypatch.setattr(decoder, "DECODE", BATCH)
    program, _ = sampled(model, make_mesh(1, 8, 1))
    assert max(moved_per_token(program))[0] > largest_activation(model)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_lookup(shape):
    """Embeddings and the table's gradient beside NumPy; no device receives the whole table or its gradient."""
    random = np.random.default_rng(0)
    table, tokens = random.normal(size=(512, 4)).astype(np.float32), random.integers(0, 512, (B, 3)).astype(np.int32)
    slope = random.normal(size=(B, 3, 4)).astype(np.float32)
    mesh = make_mesh(*shape)
    part = named_sharding(mesh, ("vocabulary", None), table.shape, "table")

    def pulled(table, tokens, slope):
        found, pullback = jax.vjp(lambda table: lookup(table, tokens), table)
        return found, pullback(slope)[0]

    with use_mesh(mesh):
        arrays = jax.device_put(table, part), *put_batch((tokens, slope), mesh)
        program = jax.jit(pulled).lower(*arrays).compile()
        found, gradient = program(*arrays)
    np.testing.assert_array_equal(to_host(found), table[tokens])
    expected = np.zeros_like(table)
    np.add.at(expected, tokens, slope)
    np.testing.assert_allclose(to_host(gradient), expected, atol=1e-6)
    moved = hlo.Module(program.as_text()).collectives()
    assert shape == (8, 1, 1) or not [row for row in moved if row.num_bytes >= table.nbytes]
