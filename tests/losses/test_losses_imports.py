"""The losses bring jax and what jax needs, and nothing else."""

import subprocess
import sys


def modules_after(statement):
    program = f"import sys; {statement}; print(*{{name.split('.')[0] for name in sys.modules}})"
    return set(
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    )


def test_only_jax():
    added = modules_after("import raft_jax.losses") - modules_after("import jax, jax.numpy")
    assert added <= {"raft_jax"} | set(sys.stdlib_module_names)
