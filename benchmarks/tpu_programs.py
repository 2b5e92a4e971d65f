"""Compiles the programs of a run for a TPU slice, on a machine without one, and reads what they will do there.

    python benchmarks/tpu_programs.py                                       # Llama-3.2-3B on v5e:4x4, all programs
    python benchmarks/tpu_programs.py --model phi-4-mini --mesh 2,1,8 --programs rollout step
    python benchmarks/tpu_programs.py --topology v6e:4x4 --json programs.json

The programs are those of configs/MODEL.yaml with the paper's lengths (prompt 256, answer and rollout 512, teacher's
prompt 1,024 tokens). For each: bytes per chip, bytes that a chip sends and receives (all-gathers, twice the
all-reduces, permutes), the compiler's own estimate of the cycles of everything else, and the seconds that both make.
Needs the extra [tpu]; set JAX_PLATFORMS=cpu and TPU_SKIP_MDS_QUERY=1 where there is no TPU. A program takes one to
five minutes.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import jax

from raft_jax.config import Config
from raft_jax.config_file import load_config
from raft_jax.models.families import config_from_hf
from raft_jax.plan.chips import Chip, find_slice
from raft_jax.plan.hlo import Module
from raft_jax.plan.programs import Programs, Side, Sides
from raft_jax.sharding import make_mesh

ROOT = Path(__file__).parents[1]
PROMPT, ANSWER, TEACHER_PROMPT, ROLLOUT = 256, 512, 1024, 512
SHARED = 32
REFINED_AT_ONCE = 128
GIGA = 1e9

# What matters of the config.json of Llama-3.2-3B-Instruct, SmolLM3-3B and Phi-4-mini-instruct. LongRoPE's divisors are
# numbers that change no shape.
MODELS = json.loads((Path(__file__).parent / "tpu_models.json").read_text())


def programs_of(name: str, config: Config, mesh: jax.sharding.Mesh) -> Programs:
    """The programs of a model, with rows of half the longest where there is more than one on a chip."""
    batch_size = config.train.batch_size
    share = 1.0 if batch_size == mesh.shape["data"] * mesh.shape["fsdp"] else 0.5
    sides = Sides(Side(PROMPT, share, SHARED), Side(ANSWER, share), Side(TEACHER_PROMPT, share, SHARED))
    return Programs(config_from_hf(MODELS[name]), config, mesh, sides, batch_size)


def lower(programs: Programs, name: str, num_drafts: int):
    if name == "refine":
        return programs.decode(REFINED_AT_ONCE, TEACHER_PROMPT, programs.config.refine.max_new_tokens, num_drafts)
    return getattr(programs, name)()


PROGRAMS = ("rollout", "losses", "step", "refine")


def read(name: str, programs: Programs, chip: Chip, num_drafts: int = 0) -> dict:
    """Compiles one program and reads it."""
    began = time.perf_counter()
    with jax.set_mesh(programs.mesh):
        compiled = lower(programs, name, num_drafts).compile()
    memory = compiled.memory_analysis()
    in_memory = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    module = Module(compiled.as_text(), ROLLOUT)
    collectives = module.collectives()
    row = {"program": name, "gigabytes": (in_memory - memory.alias_size_in_bytes) / GIGA}
    row["exchanged"] = sum(collective.equivalent_bytes for collective in collectives) / GIGA
    for kind in ("all-gather", "all-reduce", "collective-permute"):
        row[kind] = sum(c.runs * c.num_bytes for c in collectives if c.kind == kind) / GIGA
    row["busy_seconds"] = chip.clock and module.cycles() / chip.clock
    row["exchange_seconds"] = chip.link and row["exchanged"] * GIGA / chip.link
    row["compile_seconds"] = time.perf_counter() - began
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama-3.2-3b")
    parser.add_argument("--topology", default="v5e:4x4", help="a slice that libtpu knows")
    parser.add_argument("--slices", type=int, default=1, help="of this topology; what crosses them is not counted")
    parser.add_argument("--mesh", help="data,fsdp,tensor; default: that of the config")
    parser.add_argument("--batch-size", type=int, help="default: that of the config")
    parser.add_argument("--drafts", type=int, default=0, help="tokens that each step of refine guesses and verifies")
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=PROGRAMS)
    parser.add_argument("--json", type=Path, help="writes the rows to this file, too")
    options = parser.parse_args()
    words = [f"train.batch_size={options.batch_size}"] if options.batch_size else []
    config = load_config(ROOT / f"configs/{options.model}.yaml", words)
    sizes = (
        map(int, options.mesh.split(",")) if options.mesh else (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    )
    found = find_slice(options.topology, num_slices=options.slices)
    mesh, chip = make_mesh(*sizes, devices=found.devices), found.chip
    programs = programs_of(options.model, config, mesh)
    shape = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    where = f"{options.slices} × {options.topology} ({chip.memory / GIGA:.0f} GB a chip)"
    print(f"{options.model} on {where}, {shape}, jax {jax.__version__}")
    print("| program | GB per chip | exchanged, GB | gathered | reduced | permuted | busy, s | exchange, s |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for name in options.programs:
        rows.append(read(name, programs, chip, options.drafts))
        keys = (
            "gigabytes",
            "exchanged",
            "all-gather",
            "all-reduce",
            "collective-permute",
            "busy_seconds",
            "exchange_seconds",
        )
        cells = ("–" if rows[-1][key] is None else f"{rows[-1][key]:.2f}" for key in keys)
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    if options.json:
        head = {
            "model": options.model,
            "topology": options.topology,
            "slices": options.slices,
            "mesh": dict(mesh.shape),
        }
        options.json.write_text(json.dumps(head | {"jax": jax.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
