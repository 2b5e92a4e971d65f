"""TRL's nearest equivalent of the same step on the same card: benchmarks/trl_step.py on random weights."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from pathlib import Path

import tiny as toy
import trl_step
from record import Skipped
from shapes import hf_config
from step_speed import FULL, TINY

from raft_jax.data.prompts import teacher_prompt

PREDICTED = "slower than ours: its rollouts launch every operation from Python, at 30-40 ms a token"
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
        model, rows = Path(folder) / "model", Path(folder) / "rows.jsonl"
        write_model(model, shape, on_gpu=not tiny)
        row = make_row(sizes)
        rows.write_text("".join(json.dumps(row) + "\n" for _ in range(batch)), "utf-8")
        options = trl_step.parse([
            "--model", str(model), "--rows", str(rows), "--batch-size", str(batch), "--steps", "2", "--warmup", "1",
            "--max-prompt-tokens", str(4 * sizes.prompt), "--max-new-tokens", str(sizes.rollout),
            "--dtype", "bfloat16", "--device", "cpu" if tiny else "cuda", "--out", str(Path(folder) / "trl.json"),
        ])
        found = trl_step.run(options)
    record.add(f"batch {batch}", batch=batch, **summary(found), whole=found)


def summary(found: dict) -> dict:
    """The numbers that stand beside step_speed's."""
    equivalent, steps = found["raft_equivalent"], found["distillation"]
    return {
        "seconds": equivalent["median_seconds"], "tokens_per_second": equivalent["tokens_per_second"],
        "tokens_with_loss": equivalent["loss_tokens"], "peak_memory_bytes": found["peak_memory_bytes"],
        "rollout_seconds": steps.get("median_rollout_seconds"),
    }


def write_model(folder: Path, shape: str, *, on_gpu: bool) -> None:
    """A Hugging Face folder with random weights in bfloat16 and a tokenizer that knows the prompts' words."""
    import torch
    import transformers

    tokenizer = toy.make_tokenizer()
    settings = hf_config(shape)
    settings |= {"vocab_size": max(settings["vocab_size"], tokenizer.vocab_size), "eos_token_id": tokenizer.eos_id,
                 "pad_token_id": tokenizer.pad_id}
    with torch.device("cuda" if on_gpu else "cpu"):
        model = transformers.LlamaForCausalLM._from_config(
            transformers.LlamaConfig.from_dict(settings),
            dtype=torch.bfloat16,
        )
    model.save_pretrained(folder)
    del model
    if on_gpu:
        torch.cuda.empty_cache()
    tokenizer.save(folder)


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
    return {"question": question, "answer": answer,
            "teacher_prompt_tokens": len(tokenizer.chat_prompt(teacher_prompt(question, answer)))}
