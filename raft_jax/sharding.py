"""The device mesh, and the mesh axes that each logical axis of an array is sharded over."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mesh_utils import create_hybrid_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from raft_jax.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor")

# Layers are sharded over `fsdp` along the model width and over `tensor` along heads or feed-forward, embedding tables
# over both along the vocabulary; a batch is sharded over `data` and `fsdp` together.
LOGICAL_TO_MESH = {
    "batch": ("data", "fsdp"),
    "decode_batch": "data",  # one token of every row: its width is sharded over `fsdp` instead, as the weights are
    "width": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "ffn": "tensor",
    "vocabulary": ("tensor", "fsdp"),
    None: None,
}
UNCONSTRAINED = PartitionSpec.UNCONSTRAINED  # for `constrain`: the compiler chooses the sharding of this dimension


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence | None = None) -> Mesh:
    """A mesh with the axes `data`, `fsdp` and `tensor`; also for one device.

    Several TPU slices are laid along `data`, so that only gradients cross the data centre's network.

    Args:
      data, fsdp, tensor: number of devices along each axis. One of them may be -1, for all remaining devices.
      devices: the devices to use; default all.

    Raises:
      InputError: the axes need more devices than there are, or leave some idle with several processes or slices; the
        number of slices does not divide `data`.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [data, fsdp, tensor]
    fixed = 1
    for size in sizes:
        fixed *= max(size, 1)
    if sizes.count(-1) == 1 and len(devices) % fixed == 0:
        sizes[sizes.index(-1)] = len(devices) // fixed
    if min(sizes) < 1 or sizes[0] * sizes[1] * sizes[2] > len(devices):
        raise InputError(
            f"mesh data={data} fsdp={fsdp} tensor={tensor} does not fit {len(devices)} device(s); "
            "set mesh.data, mesh.fsdp and mesh.tensor so that they multiply to the number of devices"
        )
    used = devices[: sizes[0] * sizes[1] * sizes[2]]
    if len(used) < len(devices) and jax.process_count() > 1:
        raise InputError(f"mesh data={data} fsdp={fsdp} tensor={tensor} leaves {len(devices) - len(used)} devices idle")
    axis_types = (AxisType.Auto,) * 3
    num_slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"})
    if num_slices <= 1:
        return jax.make_mesh(sizes, MESH_AXES, axis_types=axis_types, devices=used)
    if len(used) < len(devices) or sizes[0] % num_slices:
        raise InputError(
            f"mesh data={data} fsdp={fsdp} tensor={tensor} does not fit {num_slices} slices of "
            f"{len(devices) // num_slices} devices; set mesh.data to a multiple of {num_slices}, and all three so that "
            f"they multiply to {len(devices)}"
        )
    within = (sizes[0] // num_slices, *sizes[1:])
    # A slice's axes need not follow its physical ones: where a v5e:4x4 is split in two, for example, they do not.
    laid_out = create_hybrid_device_mesh(within, (num_slices, 1, 1), devices, allow_split_physical_axes=True)
    return Mesh(laid_out, MESH_AXES, axis_types=axis_types)


def partition_spec(axes: Sequence[str | None]) -> PartitionSpec:
    """Mesh axes for logical axes; two logical axes on one mesh axis are an error. UNCONSTRAINED is kept.

    Example:
      >>> tuple(partition_spec(("width", "ffn")))
      ('fsdp', 'tensor')
    """
    mapped = [axis if axis is UNCONSTRAINED else LOGICAL_TO_MESH[axis] for axis in axes]
    taken = [entry for entry in mapped if entry and entry is not UNCONSTRAINED]
    flat = [name for entry in taken for name in ((entry,) if isinstance(entry, str) else entry)]
    if len(flat) != len(set(flat)):
        raise ValueError(f"logical axes {tuple(axes)} map to mesh axes {mapped}: one mesh axis is used twice")
    return PartitionSpec(*mapped)


def named_sharding(
    mesh: Mesh | AbstractMesh, axes: Sequence[str | None], shape: Sequence[int], name: str
) -> NamedSharding:
    """The sharding of one array. Every sharded dimension must be divisible by its number of shards.

    Raises:
      InputError: a dimension is not divisible; names the array, the dimension and the setting.
    """
    spec = partition_spec(axes)
    for axis, size, entry in zip(axes, shape, spec, strict=True):
        names = () if entry is None else (entry,) if isinstance(entry, str) else entry
        parts = 1
        for mesh_axis in names:
            parts *= mesh.shape[mesh_axis]
        if size % parts:
            raise InputError(
                f"{name}: its {axis} dimension of {size} does not divide over mesh {'×'.join(names)} = {parts}; "
                + " or ".join(f"set mesh.{mesh_axis}" for mesh_axis in names)
                + f" to a divisor of {size}"
            )
    return NamedSharding(mesh, spec)


def constrain(array: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains the sharding of an activation under `jax.set_mesh`; does nothing without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return array
    return jax.lax.with_sharding_constraint(array, partition_spec(axes))


def platform() -> str:
    """The platform that programs are built for, "tpu", "gpu" or "cpu": that of the mesh's devices under `jax.set_mesh`,
    which need not be at hand, else the default backend's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def device_kind() -> str:
    """The kind of the devices that programs are built for, as JAX names it; see `platform`."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def bytes_per_device(tree) -> int:
    """Bytes of a tree of arrays or shapes on one device, by their shardings."""

    def of(array) -> int:
        shape = array.shape if array.sharding is None else array.sharding.shard_shape(array.shape)
        size = 8 if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key) else array.dtype.itemsize
        return math.prod(shape) * size

    return sum(map(of, jax.tree.leaves(tree)))


def length_multiple() -> int:
    """What lengths of padded rows are rounded up to: on TPU to 128, which its registers and splash attention's blocks
    are long, so that a kernel pads nothing more; elsewhere to 8."""
    return 128 if platform() == "tpu" else 8


def mesh_axes(axis: str) -> tuple[str, ...]:
    """Names of the mesh axes that a logical axis is sharded over under `jax.set_mesh`; none without a mesh."""
    mesh, names = jax.sharding.get_abstract_mesh(), LOGICAL_TO_MESH[axis]
    return () if mesh.empty or names is None else (names,) if isinstance(names, str) else names


def num_shards(axis: str) -> int:
    """The number of shards of a logical axis under `jax.set_mesh`; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for name in mesh_axes(axis))


def is_writer() -> bool:
    """Whether this process writes files. If several share a run folder, only the first does."""
    return jax.process_index() == 0


def wait_for_writer(what: str) -> None:
    """Makes all processes wait for each other, so that the others read files only after the first has written them."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process; all processes must call it."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def make_any_process_late(mesh: Mesh) -> Callable[[bool], bool]:
    """Builds `any_late(flag)`, like `any_process` but without waiting for devices that are busy.

    With several processes, the result is that of the flags of the call before (False at first), which a program on the
    devices has combined in between. All processes must call it equally often.
    """
    if jax.process_count() == 1:
        return bool
    combined = _combined_late(mesh, jnp.any)
    return lambda flag: bool(combined(flag))


def make_last_process(mesh: Mesh) -> Callable[[], tuple[int, float] | None]:
    """Builds `last_process()`, which all processes call at the same point of their programs: the index of the one that
    came there last, and how many seconds after the first. By the machines' clocks, to a millisecond.

    The result is that of the call before, as in `make_any_process_late`; None at first and with one process.
    """
    if jax.process_count() == 1:
        return lambda: None
    combined = _combined_late(mesh, lambda times: jnp.stack([jnp.argmax(times), jnp.max(times) - jnp.min(times)]))
    began = from_first_process(int(time.time()))
    assert began is not None

    def last_process() -> tuple[int, float] | None:
        found = combined(np.int32(1000 * (time.time() - began) % 2**31))
        return None if found is None else (mesh.devices.flat[found[0]].process_index, float(found[1]) / 1000)

    return last_process


def _combined_late(mesh: Mesh, combine: Callable[[jax.Array], jax.Array]) -> Callable[[Any], np.ndarray | None]:
    """Builds `combined(value)`: what `combine` makes of the values that the processes gave in the call before, one for
    each device; None at first."""
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    program = jax.jit(combine, out_shardings=NamedSharding(mesh, PartitionSpec()))
    before = None

    def combined(value) -> np.ndarray | None:
        nonlocal before
        values = jax.make_array_from_callback((mesh.size,), sharding, lambda _: np.array([value]))
        last, before = before, program(values)
        return None if last is None else np.asarray(last)

    return combined


def from_first_process(number: int | None) -> int | None:
    """The first process's number, in every process; all processes must call it."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    received = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if number is None else number)))
    return None if received < 0 else received


def use_mesh(mesh: Mesh | None):
    """A context in which `constrain` uses a mesh; changes nothing if the mesh is None."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def put_batch(batch, mesh: Mesh):
    """Host arrays `[B, ...]` → global arrays sharded over the batch axes, with any number of processes.

    Every process has the whole batch (it is a function of the step) and puts the rows of its own devices on them.
    """
    sharding = NamedSharding(mesh, partition_spec(("batch",)))
    num_rows, parts = len(jax.tree.leaves(batch)[0]), mesh.shape["data"] * mesh.shape["fsdp"]
    if num_rows % parts:
        raise InputError(
            f"batch_size {num_rows} does not divide over mesh data×fsdp = {parts}; use "
            + " or ".join(str(count * parts) for count in (num_rows // parts, num_rows // parts + 1) if count)
        )
    return jax.tree.map(
        lambda array: jax.make_array_from_callback(array.shape, sharding, lambda index: array[index]), batch
    )


def to_host(array: jax.Array) -> np.ndarray:
    """The whole array in this process's host memory, however it is sharded; all processes must call it."""
    if array.is_fully_addressable:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(array, tiled=True)
