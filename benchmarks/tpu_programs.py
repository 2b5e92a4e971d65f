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
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from hlo import Module
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from raft_jax.config import Config
from raft_jax.config_file import load_config
from raft_jax.losses import linear_cross_entropy, linear_top_k_forward_kl
from raft_jax.methods import METHODS
from raft_jax.models import Model, parameter_shardings, vocab_padding
from raft_jax.models.config import parameter_table
from raft_jax.models.families import config_from_hf
from raft_jax.sampling.decode import Settings, empty, make_decode, make_generate
from raft_jax.sharding import make_mesh, mesh_axes, partition_spec
from raft_jax.tokens import Batch, Tokens
from raft_jax.train.loop import jit_train_step, optimizer_of
from raft_jax.train.state import init_state, state_shardings
from raft_jax.train.student import make_student

ROOT = Path(__file__).parents[1]
PROMPT, ANSWER, TEACHER_PROMPT, ROLLOUT = 256, 512, 1024, 512
REFINED_AT_ONCE = 128
GIGA = 1e9
KEY_DTYPE = jax.random.key(0).dtype

# By the generation of a chip: gigabytes of memory, and where known the clock in GHz and the gigabytes per second of
# the interconnect, per chip, in a corner of a slice without wrap-around links.
CHIPS = {"v5e": (16, 1.5, 90), "v6e": (32, None, None), "v5p": (95, None, None), "tpu7x": (96, None, None)}

# What matters of the config.json of Llama-3.2-3B-Instruct, SmolLM3-3B and Phi-4-mini-instruct. LongRoPE's divisors are
# numbers that change no shape.
MODELS = json.loads((Path(__file__).parent / "tpu_models.json").read_text())


class Programs:
    """The programs of a config on a mesh, lowered for shapes of arrays."""

    def __init__(self, name: str, config: Config, mesh: jax.sharding.Mesh, batch_size: int):
        self.config, self.mesh, self.batch_size = config, mesh, batch_size
        decoder = config_from_hf(MODELS[name])
        padding = vocab_padding(decoder, mesh)
        decoder = replace(decoder, remat=config.model.remat, kernel="splash", vocab_padding=padding)
        self.shardings, dtype = parameter_shardings(decoder, mesh), jnp.dtype(config.model.dtype)
        self.params = {
            key: jax.ShapeDtypeStruct(info.shape, dtype, sharding=self.shardings[key])
            for key, info in parameter_table(decoder).items()
        }
        self.model = Model(decoder, self.params, SimpleNamespace(stop_ids=(1,), pad_id=0))
        # Rows begin alike in all models but those whose rope depends on the length; see make_batches.
        self.shared = 0 if decoder.ropes_depend_on_length else 32

    def array(self, dtype, *shape: int, axes=("batch",)) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, partition_spec(axes)))

    def tokens(self, length: int, shared: int = 0) -> Tokens:
        """Rows of half the longest, where there is more than one on a chip."""
        rows = self.batch_size // (self.mesh.shape["data"] * self.mesh.shape["fsdp"])
        capacity = max(1, rows // 2) * length
        ids, mask = (self.array(dtype, self.batch_size, length) for dtype in (jnp.int32, bool))
        return Tokens(ids, mask, capacity, shared)

    def step(self):
        student, optimizer = (
            make_student(self.model, self.config.train.lora, self.mesh),
            optimizer_of(self.config.train, self.config.train.learning_rate),
        )
        state = jax.eval_shape(
            lambda params: init_state(student.init(params, jax.random.key(0)), optimizer), self.params
        )
        layout = state_shardings(state, student.shardings)
        state = jax.tree.map(lambda x, y: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=y), state, layout)
        prompt, teacher_prompt = self.tokens(PROMPT, self.shared), self.tokens(TEACHER_PROMPT, self.shared)
        row_ids = self.array(jnp.int32, self.batch_size)
        batch = Batch(prompt, self.tokens(ANSWER), teacher_prompt, row_ids, self.tokens(ROLLOUT))
        step = jit_train_step(student, optimizer, METHODS["raft"], self.config.train)
        return step.lower(state, self.params, batch)

    def losses(self):
        """Both losses and their gradients with respect to hidden states and table, from float32 master weights."""
        model, B = self.model, self.batch_size
        settings = {"vocab_shards": mesh_axes("vocabulary"), **model.head_settings}
        settings["chunk_size"] = self.config.train.loss_chunk_size or 512
        name = "embedding_VD" if model.config.tied_embeddings else "unembedding_DV"
        table, unembedding = self.params[name], make_student(model, self.config.train.lora, self.mesh).unembedding
        axes = ("batch", None, None)
        hidden = self.array(table.dtype, B, ROLLOUT, model.config.width, axes=axes)

        def losses(master, teacher_table, answer, student, teacher, labels, weight):
            def total(master, answer, student):
                head = unembedding({name: master.astype(table.dtype)})
                sft = linear_cross_entropy(answer, head, labels, weight_BT=weight, **settings)
                teacher_head = unembedding({name: teacher_table})
                kl, metrics = linear_top_k_forward_kl(
                    student, head, teacher, teacher_head, weight_BT=weight, k=512, return_metrics=True, **settings
                )
                return sft + kl, jax.tree.map(jnp.sum, metrics)

            return jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(master, answer, student)

        rows = NamedSharding(self.mesh, partition_spec(axes))
        shardings = ((None, None), (table.sharding, rows, rows))
        master = jax.ShapeDtypeStruct(table.shape, jnp.float32, sharding=table.sharding)
        arrays = (self.array(dtype, B, ROLLOUT) for dtype in (jnp.int32, jnp.float32))
        return jax.jit(losses, out_shardings=shardings).lower(master, table, hidden, hidden, hidden, *arrays)

    def rollout(self):
        return self._generate(self.tokens(PROMPT, self.shared), self.config.train.rollout.max_new_tokens)

    def refine(self):
        """Decoding of as many tokens as an answer may have, from a cache of prompts."""
        B, num_tokens = REFINED_AT_ONCE, self.config.refine.max_new_tokens
        decode = make_decode(self.model, Settings(num_tokens))

        def run(params, done_B, key, temperature):
            decoding = empty(self.model, params, B, TEACHER_PROMPT + num_tokens)._replace(done_B=done_B)
            return decode(params, decoding, key, temperature, B, num_tokens)

        return jax.jit(run).lower(self.params, self.array(bool, B), *self._drawing())

    def _generate(self, prompt: Tokens, num_tokens: int):
        key, temperature = self._drawing()
        row_ids = self.array(jnp.int32, len(prompt.ids))
        return make_generate(self.model, num_tokens).lower(self.params, prompt, row_ids, key, temperature)

    def _drawing(self):
        """Key and temperature, which every device has."""
        whole = NamedSharding(self.mesh, PartitionSpec())
        return [jax.ShapeDtypeStruct((), dtype, sharding=whole) for dtype in (KEY_DTYPE, jnp.float32)]


PROGRAMS = ("rollout", "losses", "step", "refine")


def read(name: str, lower, mesh: jax.sharding.Mesh, chip: str) -> dict:
    """Compiles one program and reads it."""
    began = time.perf_counter()
    with jax.set_mesh(mesh):
        compiled = lower().compile()
    memory = compiled.memory_analysis()
    in_memory = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    module = Module(compiled.as_text(), ROLLOUT)
    collectives = module.collectives()
    row = {"program": name, "gigabytes": (in_memory - memory.alias_size_in_bytes) / GIGA}
    row["exchanged"] = sum(collective.equivalent_bytes for collective in collectives) / GIGA
    for kind in ("all-gather", "all-reduce", "collective-permute"):
        row[kind] = sum(c.runs * c.num_bytes for c in collectives if c.kind == kind) / GIGA
    _, clock, bandwidth = CHIPS[chip]
    row["busy_seconds"] = clock and module.cycles() / (clock * GIGA)
    row["exchange_seconds"] = bandwidth and row["exchanged"] / bandwidth
    row["compile_seconds"] = time.perf_counter() - began
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama-3.2-3b")
    parser.add_argument("--topology", default="v5e:4x4", help="a slice that libtpu knows")
    parser.add_argument("--mesh", help="data,fsdp,tensor; default: that of the config")
    parser.add_argument("--batch-size", type=int, help="default: that of the config")
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=PROGRAMS)
    parser.add_argument("--json", type=Path, help="writes the rows to this file, too")
    options = parser.parse_args()
    config = load_config(ROOT / f"configs/{options.model}.yaml")
    sizes = (
        map(int, options.mesh.split(",")) if options.mesh else (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    )
    devices = topologies.get_topology_desc(platform="tpu", topology_name=options.topology).devices
    mesh, chip = make_mesh(*sizes, devices=devices), options.topology.partition(":")[0]
    programs = Programs(options.model, config, mesh, options.batch_size or config.train.batch_size)
    shape = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    print(f"{options.model} on {options.topology} ({CHIPS[chip][0]} GB a chip), {shape}, jax {jax.__version__}")
    print("| program | GB per chip | exchanged, GB | gathered | reduced | permuted | busy, s | exchange, s |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for name in options.programs:
        rows.append(read(name, getattr(programs, name), mesh, chip))
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
        head = {"model": options.model, "topology": options.topology, "mesh": dict(mesh.shape)}
        options.json.write_text(json.dumps(head | {"jax": jax.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
