"""Methods x learning rates x seeds on SmolLM2, as many as fit: learning against forgetting, a point a cell.

    python benchmarks/gpu/compare.py --out FOLDER                # nine minutes
    python benchmarks/gpu/compare.py --out FOLDER --tiny         # a made-up model, on a CPU

FOLDER/compare.json is written after each cell, so that a call that is cut off keeps what it has. A cell trains on the
refined rows that pack.py --rows packed and is measured on the held-out rows of the sea rules and the general prompts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import record as records
from session import device, prepared, search_path, source_hash

ROOT = Path(__file__).resolve().parents[2]
# Most informative first: a method is judged by its frontier over the learning rate, so all rates come before a second
# seed, and the two ends of the comparison before what lies between.
METHODS = (("sft", "raft"), ("fused_sft", "on_policy"), ("sdft",))
LEARNING_RATES = (3e-5, 1e-4, 1e-5)
SEEDS = (0, 1, 2)
EPOCHS, BATCH, ROLLOUT, ANSWER = 3.0, 8, 64, 96


@dataclass(frozen=True)
class Cell:
    method: str
    learning_rate: float
    seed: int


def cells() -> list[Cell]:
    """All of them, in the order in which they are worth their time."""
    return [
        Cell(method, rate, seed)
        for seed, group, rate in itertools.product(SEEDS, METHODS, LEARNING_RATES)
        for method in group
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=540, help="no cell begins that would end later; default 540")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(arguments)
    if not options.seconds > 0:
        parser.error(f"--seconds {options.seconds:g} must be above 0")
    began = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    kept = prepared(options.out)
    sys.path[:0] = search_path(kept)
    path = options.out / "compare.json"
    content = {"tiny": options.tiny, "source": source_hash(), "cells": []}
    content["device"] = device(options.tiny, kept)
    records.write(path, content)
    try:
        bench = Bench(tiny_material() if options.tiny else material(kept))
    except records.Skipped as why:
        sys.exit(str(why))
    content |= {"settings": bench.settings, "base": bench.marks(bench.model.params)}
    records.write(path, content)
    longest = 0.0
    for cell in cells():
        left = options.seconds - (time.monotonic() - began)
        if left < longest:
            break
        started = time.monotonic()
        found = vars(cell) | bench.run(cell)
        # The first cells compile; the time of the longest of them is still the safe guess.
        longest = max(longest, time.monotonic() - started)
        content["cells"].append(found | {"seconds": time.monotonic() - started})
        records.write(path, content)
        print(json.dumps(content["cells"][-1]), flush=True)
    print(f"{path}: {len(content['cells'])} of {len(cells())} cells")
    return 0


def material(kept: Path) -> SimpleNamespace:
    """SmolLM2 in float32, refined rows, held-out questions and general prompts."""
    import carried

    from raft_jax.data.examples import Columns, load_examples
    from raft_jax.models import load_pretrained

    samples = ROOT / "raft_jax" / "data" / "samples"
    rows = [SimpleNamespace(**json.loads(line)) for line in carried.refined_rows().read_text("utf-8").splitlines()]
    held_out = load_examples(str(samples / "colregs.jsonl"), Columns(), "test")
    general = [json.loads(line)["prompt"] for line in (samples / "general.jsonl").read_text("utf-8").splitlines()]
    return SimpleNamespace(
        model=load_pretrained(str(carried.smollm2(kept))),
        rows=rows,
        held_out=[(example.question, example.answer) for example in held_out],
        general=general,
        settings={"epochs": EPOCHS, "batch_size": BATCH},
        rollout=ROLLOUT,
        answer=ANSWER,
    )


def tiny_material() -> SimpleNamespace:
    import tiny as toy

    rows = [
        SimpleNamespace(
            question=row["question"],
            gold=row["answer"],
            answer=row["answer"],
            rewrite=row["answer"],
            accepted=True,
            context="",
            turns=[],
        )
        for row in toy.ROWS[:8]
    ]
    return SimpleNamespace(
        model=toy.make_model(),
        rows=rows,
        held_out=[(row["question"], row["answer"]) for row in toy.ROWS[8:10]],
        general=[prompt["prompt"] for prompt in toy.GENERAL[:2]],
        settings={"epochs": 1.0, "batch_size": 4, "max_steps": 1, "top_k": 16},
        rollout=4,
        answer=4,
    )


class Bench:
    """One model, its data and the measures; programs are compiled once and serve all cells."""

    def __init__(self, given: SimpleNamespace):
        import jax

        from raft_jax.data.prompts import question_prompt
        from raft_jax.evaluate.divergence import make_divergence
        from raft_jax.sampling import Sampler, Scorer
        from raft_jax.sharding import make_mesh

        self.given, self.model = given, given.model
        self.settings = given.settings | {"rollout": given.rollout, "answer": given.answer, "rows": len(given.rows)}
        self.mesh, self.key = make_mesh(devices=jax.devices()[:1]), jax.random.key(0)
        self.sampler, self.scorer = Sampler(self.model, 64), Scorer(self.model, 16)
        self.divergence = make_divergence(self.model)
        tokenizer = self.model.tokenizer
        asked = [question_prompt(question) for question, _ in given.held_out]
        self.questions = [tokenizer.chat_prompt(turns) for turns in asked]
        self.answers = [
            tokenizer.chat_answer([*turns, {"role": "assistant", "content": answer}])
            for turns, (_, answer) in zip(asked, given.held_out, strict=True)
        ]
        self.general = [tokenizer.chat_prompt(question_prompt(prompt)) for prompt in given.general]
        self.base_texts = [found.tokens for found in self.greedy(self.model.params, self.general)]

    def greedy(self, params, prompts):
        return self.sampler.generate(params, prompts, key=self.key, temperature=0.0, max_new_tokens=self.given.answer)

    def run(self, cell: Cell) -> dict:
        """Trains one cell and measures it."""
        from raft_jax.config import RolloutConfig, TrainConfig
        from raft_jax.data.tokenize import token_rows
        from raft_jax.methods import METHODS
        from raft_jax.metrics import read_metrics
        from raft_jax.train.loop import train

        method = METHODS[cell.method]
        settings = TrainConfig(
            **self.given.settings,
            learning_rate=cell.learning_rate,
            checkpoint_every=10**6,
            rollout=RolloutConfig(max_new_tokens=self.given.rollout),
        )
        rows = token_rows(self.given.rows, self.model.tokenizer, method)
        with tempfile.TemporaryDirectory() as folder:
            params = train(self.model, rows, method, settings, Path(folder), seed=cell.seed, mesh=self.mesh)
            steps = read_metrics(Path(folder) / "metrics.jsonl")
        return {
            **self.marks(params),
            "steps": len(steps),
            "last_step": steps[-1],
            "train_seconds": sum(step["seconds"] for step in steps),
        }

    def marks(self, params) -> dict:
        """Learning: likelihood of held-out gold answers and the overlap of its own with them; forgetting: how far it
        has moved from the base model on what that one says."""
        import numpy as np

        from raft_jax.evaluate.accuracy import token_f1
        from raft_jax.evaluate.divergence import weight_distance

        written = self.greedy(params, self.questions)
        texts = [self.model.tokenizer.decode(found.tokens).strip() for found in written]
        overlap = [token_f1(text, gold) for text, (_, gold) in zip(texts, self.given.held_out, strict=True)]
        drift = self.divergence(self.model.params, params, self.general, self.base_texts)
        return {
            "gold_nll": -float(np.mean(self.scorer.mean_logprob(params, self.questions, self.answers))),
            "token_f1": float(np.mean(overlap)),
            "cut": sum(not found.finished for found in written),
            "divergence": float(np.mean(drift)),
            "weight_distance": weight_distance(params, self.model.params).mean,
        }


if __name__ == "__main__":
    sys.exit(main())
