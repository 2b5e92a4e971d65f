"""What JAX is told about GPUs before it opens one, and that this jaxlib understands it."""

import os
import subprocess
import sys

import pytest

from raft_jax import gpu_environment
from raft_jax.gpu_environment import count_gpus, set_gpu_environment

FLAG = "--xla_gpu_enable_latency_hiding_scheduler"
SHARE = {"XLA_CLIENT_MEM_FRACTION": "0.9"}


@pytest.mark.parametrize(
    ("given", "num_gpus", "expected"),
    [
        ({}, 0, {}),
        ({}, 1, SHARE),
        ({}, 8, SHARE | {"XLA_FLAGS": f"{FLAG}=true"}),
        ({"JAX_NUM_PROCESSES": "2"}, 1, SHARE | {"XLA_FLAGS": f"{FLAG}=true"}),
        ({"SLURM_STEP_NODELIST": "node[1-2]"}, 1, SHARE | {"XLA_FLAGS": f"{FLAG}=true"}),
        ({"XLA_FLAGS": "--xla_dump_to=here"}, 2, SHARE | {"XLA_FLAGS": f"--xla_dump_to=here {FLAG}=true"}),
        # What the user has set stays as it is.
        ({"XLA_FLAGS": f"{FLAG}=false"}, 2, SHARE),
        ({"XLA_FLAGS": "a-file-of-flags"}, 2, SHARE),
        ({"XLA_FLAGS": "--xla_gpu_memory_fraction_policy=0.5"}, 1, {}),
        ({"XLA_CLIENT_MEM_FRACTION": "0.5"}, 1, {}),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}, 1, {}),
        ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, 1, {}),
        ({"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}, 1, {}),
    ],
    ids=str,
)
def test_what_is_set(given, num_gpus, expected):
    assert gpu_environment.gpu_environment(given, num_gpus) == expected


@pytest.fixture
def devices(tmp_path):
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, 3),
        ({"JAX_PLATFORMS": "cpu"}, 0),
        ({"JAX_PLATFORMS": "tpu,cpu"}, 0),
        ({"JAX_PLATFORMS": "cuda,cpu"}, 3),
        ({"JAX_PLATFORMS": "gpu"}, 3),
        ({"CUDA_VISIBLE_DEVICES": "1,2"}, 2),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, 0),
    ],
    ids=str,
)
def test_gpus_that_jax_will_use(devices, monkeypatch, given, expected):
    monkeypatch.setattr(gpu_environment, "PLUGINS", ("no_such_plugin", "sys"))
    assert count_gpus(given, devices) == expected


def test_none_without_jax_for_gpus(devices, monkeypatch):
    monkeypatch.setattr(gpu_environment, "PLUGINS", ("no_such_plugin",))
    assert count_gpus({}, devices) == 0


def test_it_is_said_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(gpu_environment, "count_gpus", lambda environment: 2)
    monkeypatch.setattr(os, "environ", {"XLA_FLAGS": "--xla_dump_to=here"})
    set_gpu_environment()
    assert os.environ == {**SHARE, "XLA_FLAGS": f"--xla_dump_to=here {FLAG}=true"}
    assert capsys.readouterr().err == (
        f"GPU: XLA_CLIENT_MEM_FRACTION=0.9 XLA_FLAGS='--xla_dump_to=here {FLAG}=true' (what you set yourself stays)\n"
    )
    monkeypatch.setattr(gpu_environment, "count_gpus", lambda environment: 0)
    set_gpu_environment()
    assert capsys.readouterr().err == ""


def test_this_jaxlib_understands_it():
    """It ends a process with an unknown flag, which is tried as well, and reads the share of the memory by its name."""
    program = (
        "import jax; print(jax.jit(lambda x: x + 1)(1))\n"
        "from jaxlib.xla_client import generate_pjrt_gpu_plugin_options as options; print(options().values())"
    )

    def run(flags: str) -> subprocess.CompletedProcess:
        environment = os.environ | SHARE | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)

    done = run(f"{FLAG}=true")
    assert done.returncode == 0, done.stderr
    number, options = done.stdout.splitlines()
    assert number == "2" and "0.9" in options
    assert "Unknown flag" in run("--xla_gpu_no_such_flag=true").stderr
