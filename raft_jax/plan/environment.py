"""What has to be so before jax is imported, for compiling for TPUs or GPUs on a machine without them."""

from __future__ import annotations

import os
from importlib.util import find_spec

from raft_jax.errors import MissingExtra
from raft_jax.gpu_environment import PLUGINS, gpu_environment
from raft_jax.plan import gpus

LOCAL = "local"  # the topology of the devices at hand
# The machine's own devices are left alone. libtpu asks no metadata server and waits for no other process that uses it;
# without the type and the name of a worker it complains on stderr, whatever the topology.
VARIABLES = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def set_environment(topology: str) -> None:
    """Sets the variables for a topology in this process, where the user has not.

    Raises:
      MissingExtra: what compiles for the topology, libtpu or JAX's plugin for GPUs, is not installed.
      InputError: see `gpus.parse`.
    """
    if topology == LOCAL:
        return
    if (gpu := gpus.parse(topology)) is not None:
        if not any(map(find_spec, PLUGINS)):
            raise MissingExtra(
                f"--topology {topology} is compiled for by JAX's plugin for GPUs, which is not installed: pip install "
                f"'raft-jax[plan]'; --topology {LOCAL} plans for the devices at hand"
            )
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        os.environ.update(gpu_environment(os.environ, gpu[1]))
        return
    if find_spec("libtpu") is None:
        raise MissingExtra(
            f"--topology {topology} is compiled for by libtpu, which is not installed: pip install 'raft-jax[plan]'; "
            f"--topology {LOCAL} plans for the devices at hand"
        )
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
