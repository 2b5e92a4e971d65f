"""What has to be so before jax is imported, for compiling for a TPU slice on a machine without one."""

from __future__ import annotations

import os
from importlib.util import find_spec

from raft_jax.errors import MissingExtra

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
      MissingExtra: libtpu, which compiles for a slice, is not installed.
    """
    if topology == LOCAL:
        return
    if find_spec("libtpu") is None:
        raise MissingExtra(
            f"--topology {topology} is compiled for by libtpu, which is not installed: pip install 'raft-jax[plan]'; "
            f"--topology {LOCAL} plans for the devices at hand"
        )
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
