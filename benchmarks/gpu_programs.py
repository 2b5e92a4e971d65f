"""Compiles the programs of a training step for NVIDIA's GPUs, on a machine without one, and reads what they will do.

    python benchmarks/gpu_programs.py                                        # Llama-3.2-3B on one H100
    python benchmarks/gpu_programs.py --topology h100x8 --mesh 1,8,1 2,1,4   # on eight, in two mixes
    python benchmarks/gpu_programs.py --scan                                 # decoding in a scan over layers, too

For each mesh and program: the GB that a card holds, and sends; for the rollout also what each new token costs: GB that
kernels copy out of stacked arrays (weights and cache of one layer), GB of weights and cache that have to be read, the
milliseconds that both take at the maker's bandwidth, and the number of kernels. Lengths are the config's limits.
Needs the extra [plan]; a program takes about ten seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from raft_jax.plan.environment import set_environment

ROOT = Path(__file__).parents[1]
MODELS = json.loads((Path(__file__).parent / "tpu_models.json").read_text())
GIGA = 1e9
KERNELS = ("fusion", "custom-call", "copy")


def measure_of(model: str, topology: str, mesh: str, words: list[str]):
    """The programs of configs/MODEL.yaml on some cards."""
    from raft_jax.config_file import load_config
    from raft_jax.plan.chips import find_slice
    from raft_jax.plan.facts import Facts
    from raft_jax.plan.measure import Measure

    sizes = [f"mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), mesh.split(","), strict=True)]
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODELS[model]))
        config = load_config(ROOT / f"configs/{model}.yaml", [f"model.source={folder}", *sizes, *words])
        return Measure(Facts.of(config, rows=5000), find_slice(topology), lambda text: None)


def per_token(module, measure) -> dict[str, float]:
    """What a new token costs a card."""
    from raft_jax.plan.hlo import num_bytes

    programs, length = measure.programs(measure.first_method), measure.config.train.rollout.max_new_tokens
    copied = kernels = 0.0
    for name, instructions in module.computations.items():
        if name in module.fused or module.runs[name] < length:
            continue
        runs = module.runs[name] / length
        for instruction in instructions:
            if instruction.opcode not in KERNELS and not instruction.opcode.endswith("-start"):
                continue
            kernels += runs
            if instruction.source.endswith("dynamic_slice") and instruction.opcode == "fusion":
                copied += runs * num_bytes(instruction.type)
    weights = (measure.flops.layer_weights + measure.flops.head_weights) * 2
    weights /= measure.mesh.shape["fsdp"] * measure.mesh.shape["tensor"]
    sides = programs.sides
    cache = programs.cache_bytes(measure.config.train.batch_size, 1) * (sides.prompt.length + length / 2)
    bandwidth = measure.slice.chip.bandwidth
    return {
        "copied": copied / GIGA,
        "read": (weights + cache) / GIGA,
        "milliseconds": 1e3 * (2 * copied + weights + cache) / bandwidth,  # a copy reads and writes
        "kernels": kernels,
    }


def read(measure, name: str) -> dict:
    """Compiles one program and reads it."""
    import jax

    from raft_jax.plan.hlo import Module

    programs, began = measure.programs(measure.first_method), time.perf_counter()
    with jax.set_mesh(measure.mesh):
        lowered = programs.rollout() if name == "rollout" else programs.step(measure.first_method)
        compiled = lowered.compile()
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    module = Module(compiled.as_text(), measure.config.train.rollout.max_new_tokens)
    sent = sum(collective.equivalent_bytes for collective in module.collectives())
    row = {"program": name, "gigabytes": (held - memory.alias_size_in_bytes) / GIGA, "sent": sent / GIGA}
    row["compile_seconds"] = time.perf_counter() - began
    return row | (per_token(module, measure) if name == "rollout" else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama-3.2-3b")
    parser.add_argument("--topology", default="h100", help="as for `raft-jax plan`")
    parser.add_argument("--mesh", nargs="+", default=["1,1,1"], help="data,fsdp,tensor")
    parser.add_argument("--scan", action="store_true", help="the rollout also as a scan over layers")
    parser.add_argument("--json", type=Path, help="writes the rows to this file, too")
    parser.add_argument("words", nargs="*", help="KEY=VALUE of the config")
    options = parser.parse_args()
    set_environment(options.topology)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from raft_jax.train import rollout

    keys = ("gigabytes", "sent", "copied", "read", "milliseconds", "kernels")
    print("| mesh | program | GB a card | GB sent | GB copied a token | GB to read | ms at least | kernels |")
    print("|---|---|---|---|---|---|---|---|")
    rows, make_generate = [], rollout.make_generate

    def in_a_scan(*given, unroll, **settings):
        return make_generate(*given, unroll=False, **settings)

    for mesh in options.mesh:
        for form in ("layer by layer", "scan over layers") if options.scan else ("layer by layer",):
            rollout.make_generate = make_generate if form == "layer by layer" else in_a_scan
            measure = measure_of(options.model, options.topology, mesh, options.words)
            for name in ("rollout", "step") if form == "layer by layer" else ("rollout",):
                row = {"mesh": mesh, "form": form, **read(measure, name)}
                rows.append(row)
                cells = (f"{row[key]:.3g}" if key in row else "–" for key in keys)
                shown = f"{name}, {form}" if name == "rollout" else name
                print(f"| {mesh} | {shown} | {' | '.join(cells)} |", flush=True)
    if options.json:
        import jax

        head = {"model": options.model, "topology": options.topology, "jax": jax.__version__}
        options.json.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
