"""TRL's nearest equivalent of the same step on the same card: benchmarks/trl_step.py on random weights."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import tiny as toy
from record import Skipped
from shapes import hf_config
from step_speed import FULL, TINY

from raft_jax.data.prompts import teacher_prompt

PREDICTED = "slower than ours: its rollouts launch every operation from Python, at 30-40 ms a token"
TRL_STEP = Path(__file__).resolve().parents[1] / "trl_step.py"
WORD = " permit"  # one token of the made-up tokenizer


def smollm2(record, tiny: bool) -> None:
    run(record, "tiny" if tiny else "smollm2", tiny, batch=16)


def llama_1b(record, tiny: bool) -> None:
    run(record, "tiny" if tiny else "llama-1b", tiny, batch=16)


def llama_3b(record, tiny: bool) -> None:
    run(record, "tiny" if tiny else "llama-3b", tiny, batch=8)


def run(record, shape: str, tiny: bool, batch: int) -> None:
    missing = [name for name in ("torch", "trl", "datasets") if importlib.util.find_spec(name) is None]
    if missing:
        raise Skipped(f"{', '.join(missing)} is not installed")
    record.set(predicted=PREDICTED, shape=shape)
    sizes, batch = (TINY, 2) if tiny else (FULL, batch)
    with tempfile.TemporaryDirectory() as folder:
        model, rows, out = Path(folder) / "model", Path(folder) / "rows.jsonl", Path(folder) / "trl.json"
        write_model(model, shape)
        row = make_row(sizes)
        rows.write_text("".join(json.dumps(row) + "\n" for _ in range(batch)), "utf-8")
        command = [
            sys.executable,
            str(TRL_STEP),
            "--model",
            model,
            "--rows",
            rows,
            "--batch-size",
            batch,
            "--steps",
            2,
            "--warmup",
            1,
            "--max-prompt-tokens",
            8 * sizes.prompt,
            "--max-new-tokens",
            sizes.rollout,
            "--dtype",
            "bfloat16",
            "--device",
            "cpu" if tiny else "cuda",
            "--random-weights",
            "--out",
            out,
        ]
        # In a process of its own: raft_jax has imported transformers without torch.
        subprocess.run([str(word) for word in command], check=True)
        found = json.loads(out.read_text("utf-8"))
    record.add(f"batch {batch}", batch=batch, **summary(found), whole=found)


def summary(found: dict) -> dict:
    """The numbers that stand beside step_speed's."""
    equivalent, steps = found["raft_equivalent"], found["distillation"]
    return {
        "seconds": equivalent["median_seconds"],
        "tokens_per_second": equivalent["tokens_per_second"],
        "tokens_with_loss": equivalent["loss_tokens"],
        "peak_memory_bytes": found["peak_memory_bytes"],
        "rollout_seconds": steps.get("median_rollout_seconds"),
    }


def write_model(folder: Path, shape: str) -> None:
    """A Hugging Face folder without weights, and a tokenizer that knows the prompts' words."""
    tokenizer = toy.make_tokenizer()
    settings = hf_config(shape)
    settings |= {
        "vocab_size": max(settings["vocab_size"], tokenizer.vocab_size),
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "dtype": "bfloat16",
    }
    folder.mkdir()
    tokenizer.save(folder)
    (folder / "config.json").write_text(json.dumps(settings), "utf-8")


def make_row(sizes) -> dict[str, str]:
    """A question whose prompt, and an answer that, have the tokens that our side's rows have."""
    tokenizer = toy.make_tokenizer()

    def filled(length, count):
        words = 1
        while count(WORD * (words + 1)) <= length:
            words += 1
        return WORD * words

    question = filled(sizes.prompt, lambda text: len(tokenizer.chat_prompt([{"role": "user", "content": text}])))
    answer = filled(sizes.answer, lambda text: len(tokenizer.encode(text)))
    return {
        "question": question,
        "answer": answer,
        "teacher_prompt_tokens": len(tokenizer.chat_prompt(teacher_prompt(question, answer))),
    }
