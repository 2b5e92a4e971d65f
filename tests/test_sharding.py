"""The mesh, what lies where on it, and that eight devices compute what one does."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tiny import make_config, make_model

from raft_jax.errors import InputError
from raft_jax.models import Model, parameter_shardings
from raft_jax.models.config import parameter_table
from raft_jax.models.decoder import init_parameters
from raft_jax.sharding import (
    LOGICAL_TO_MESH,
    constrain,
    make_mesh,
    named_sharding,
    partition_spec,
    put_batch,
    to_host,
    use_mesh,
)


def test_eight_devices():
    assert jax.device_count() == 8


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (1, 1, 1)),
        ({"data": 8}, (8, 1, 1)),
        ({"data": -1}, (8, 1, 1)),
        ({"data": 2, "fsdp": -1, "tensor": 2}, (2, 2, 2)),
        ({"fsdp": 4, "tensor": -1}, (1, 4, 2)),
        ({"tensor": 3}, (1, 1, 3)),
    ],
)
def test_meshes(sizes, shape):
    mesh = make_mesh(**sizes)
    assert mesh.axis_names == ("data", "fsdp", "tensor") and mesh.devices.shape == shape
    assert len(set(mesh.devices.flat)) == np.prod(shape)


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 16},
        {"data": 3, "fsdp": -1},
        {"data": -1, "fsdp": -1},
        {"data": 0},
        {"tensor": -2},
        {"data": 4, "fsdp": 4},
    ],
)
def test_meshes_that_do_not_fit(sizes):
    with pytest.raises(InputError, match=r"does not fit 8 device\(s\); set mesh.data, mesh.fsdp and mesh.tensor"):
        make_mesh(**sizes)


def test_given_devices():
    devices = jax.devices()[4:]
    assert list(make_mesh(data=-1, devices=devices).devices.flat) == devices


@pytest.mark.parametrize("sizes", [{"data": 1, "fsdp": 4}, {"data": 2}, {"data": 1, "fsdp": 2, "tensor": 2}])
def test_slices_are_laid_along_data(sizes):
    # Whether two slices are laid out rightly, the TPU's compiler says in test_tpu_compile.
    devices = [SimpleNamespace(platform="tpu", slice_index=number // 2) for number in range(4)]
    with pytest.raises(InputError, match=r"does not fit 2 slices of 2 devices; set mesh\.data to a multiple of 2"):
        make_mesh(**sizes, devices=devices)


def test_rules():
    assert partition_spec(("batch", None, "ffn")) == PartitionSpec(("data", "fsdp"), None, "tensor")
    assert partition_spec(("width", "heads", None)) == PartitionSpec("fsdp", "tensor", None)
    assert partition_spec(()) == PartitionSpec()
    for axes in (("heads", "ffn"), ("batch", "width"), ("vocabulary", "kv_heads"), ("width", "width")):
        with pytest.raises(ValueError, match="one mesh axis is used twice"):
            partition_spec(axes)
    with pytest.raises(KeyError):
        partition_spec(("depth",))


def test_no_parameter_wants_one_mesh_axis_twice():
    for changes in ({}, {"tied_embeddings": True}, {"qkv_bias": True}):
        for name, info in parameter_table(make_config(64, **changes)).items():
            spec = partition_spec(info.axes)
            is_matrix = "norm" not in name and "bias" not in name
            assert len(spec) == len(info.shape) and any(spec) == is_matrix, name


def test_dimensions_that_do_not_divide():
    mesh = make_mesh(data=2, tensor=4)
    with pytest.raises(InputError) as caught:
        parameter_shardings(make_config(64), mesh)
    assert str(caught.value) == (
        "key_LDKH: its kv_heads dimension of 2 does not divide over mesh tensor = 4; set mesh.tensor to a divisor of 2"
    )
    with pytest.raises(InputError, match="x: its batch dimension of 9 does not divide over mesh data×fsdp = 2; set"):
        named_sharding(mesh, ("batch",), (9,), "x")
    assert named_sharding(mesh, (None, "ffn"), (9, 8), "x").spec == PartitionSpec(None, "tensor")


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(data=2, fsdp=2, tensor=2)


def test_batches(mesh):
    batch = {"tokens": np.arange(24).reshape(8, 3), "mask": np.arange(8) > 3}
    placed = put_batch(batch, mesh)
    for name, array in batch.items():
        np.testing.assert_array_equal(to_host(placed[name]), array)
        assert placed[name].addressable_shards[0].data.shape == (2, *array.shape[1:])
    with pytest.raises(InputError, match="batch_size 6 does not divide over mesh data×fsdp = 4; use 4 or 8"):
        put_batch(np.zeros((6, 3)), mesh)
    with pytest.raises(InputError, match=r"batch_size 3 .* use 4$"):
        put_batch(np.zeros((3, 3)), mesh)


def test_constrain(mesh):
    array = jnp.ones((4, 6))
    assert constrain(array, "batch", None) is array
    with use_mesh(None):
        assert constrain(array, "batch", None) is array
    with use_mesh(mesh):
        pinned = jax.jit(lambda x: constrain(x + 1, "batch", "ffn"))(array)
    assert pinned.sharding.is_equivalent_to(named_sharding(mesh, ("batch", "ffn"), (4, 6), "x"), 2)
    assert pinned.addressable_shards[0].data.shape == (1, 3)


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True, "tied_embeddings": True, "remat": True}])
def test_eight_devices_compute_what_one_does(mesh, changes):
    """Logits, and the gradients of a loss, of parameters and rows cut over a 2×2×2 mesh."""
    model = make_model()
    config = make_config(model.config.vocab_size, **changes)
    model = Model(config, jax.jit(init_parameters, static_argnums=0)(config, jax.random.key(1, impl="rbg")))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (4, 9))
    mask = np.arange(9) >= np.array([[0], [3], [1], [8]])

    @jax.jit
    def logits_and_gradients(params, tokens, mask):
        def loss(params):
            logits_BTV = model.apply(params, tokens, None, mask)
            return jnp.sum(jnp.where(mask, jax.nn.logsumexp(logits_BTV, axis=-1), 0)), logits_BTV

        gradients, logits_BTV = jax.grad(loss, has_aux=True)(params)
        return logits_BTV, gradients

    expected, expected_gradients = logits_and_gradients(model.params, tokens, mask)
    shardings = parameter_shardings(config, mesh)
    params = jax.device_put(model.params, shardings)
    assert params["gate_LDF"].addressable_shards[0].data.shape == (2, 16, 24)
    assert params["embedding_VD"].addressable_shards[0].data.shape == (config.vocab_size // 4, 32)
    with use_mesh(mesh):
        found, gradients = logits_and_gradients(params, *put_batch((tokens, mask), mesh))
    np.testing.assert_allclose(to_host(found)[mask], np.asarray(expected)[mask], atol=2e-5)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(to_host(gradient), expected_gradients[name], atol=2e-5, err_msg=name)


def test_every_rule_names_a_mesh_axis(mesh):
    for entry in LOGICAL_TO_MESH.values():
        assert set((entry,) if isinstance(entry, str) else entry or ()) <= set(mesh.axis_names)
