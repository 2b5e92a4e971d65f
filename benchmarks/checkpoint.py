"""Saving a state from two processes: how long the training is held up, and how long until the save is on disk.

    python benchmarks/checkpoint.py --gigabytes 3 --folder FOLDER

Two processes with one CPU device each hold a state that is sharded over both. In turn, for each repeat: a few steps
without a save, a save with steps meanwhile, and the wait for its end. Told apart: the seconds in which `save` holds the
caller up, the seconds until the save is on disk, the median step with and without a save beside it, and the number of
bytes that each process hashed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def work(options) -> None:
    """One of the processes."""
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    import raft_jax.checkpoint as module

    env = os.environ
    jax.distributed.initialize(
        env["JAX_COORDINATOR_ADDRESS"], int(env["JAX_NUM_PROCESSES"]), int(env["JAX_PROCESS_ID"])
    )
    hashed = []
    digest = module.sha256_of

    def counted(path):
        hashed.append((str(path), path.stat().st_size))
        return digest(path)

    module.sha256_of = counted
    mesh = Mesh(jax.devices(), ("all",))
    rows = NamedSharding(mesh, PartitionSpec("all"))
    count = max(1, round(options.gigabytes * 1e9 / (64 << 20)))
    make = jax.jit(
        lambda: {str(i): jax.random.normal(jax.random.key(i), (4096, 4096)) for i in range(count)},
        out_shardings={str(i): rows for i in range(count)},
    )
    step = jax.jit(lambda state: jax.tree.map(lambda x: x * 0.999 + 1, state), donate_argnums=0)
    state = jax.block_until_ready(step(make()))
    checkpoints = module.Checkpoints(Path(options.folder) / "checkpoints", keep=1)

    def steps(seconds: float) -> list[float]:
        nonlocal state
        times, end = [], time.perf_counter() + seconds
        while time.perf_counter() < end:
            began = time.perf_counter()
            state = jax.block_until_ready(step(state))
            times.append(time.perf_counter() - began)
        return times

    for repeat in range(options.repeats):
        alone = steps(3)
        hashed.clear()
        began = time.perf_counter()
        checkpoints.save(repeat + 1, state)
        held = time.perf_counter() - began
        beside = steps(3)
        checkpoints._finishing.join()
        whole = time.perf_counter() - began
        checkpoints.wait()
        if jax.process_index() == 0:
            print(
                json.dumps(
                    {
                        "held": held,
                        "whole": whole,
                        "step_alone": statistics.median(alone),
                        "step_beside": statistics.median(beside),
                        "longest_step_beside": max(beside),
                    }
                ),
                flush=True,
            )
        assert len({name for name, _ in hashed}) == len(hashed), "a file was hashed twice"
        print(f"process {jax.process_index()} hashed {sum(size for _, size in hashed) / 1e9:.2f} GB", flush=True)
    checkpoints.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", help="where to save; default: a temporary folder")
    options = parser.parse_args()
    if "JAX_PROCESS_ID" in os.environ:
        work(options)
        return
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, "--gigabytes", str(options.gigabytes), "--repeats", str(options.repeats)]
    processes = [
        subprocess.Popen(
            [*command, "--folder", str(folder)],
            env=os.environ | shared | {"JAX_PROCESS_ID": str(number)},
            stderr=None,
        )
        for number in range(2)
    ]
    try:
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:
            process.kill()
        shutil.rmtree(folder)
    sys.exit(max(codes))


if __name__ == "__main__":
    main()
