"""Times our whole RAFT step (rollout, teacher, SFT and KL, AdamW), in turn with TRL's nearest equivalent.

    python benchmarks/train_step.py --model MODEL --rows rows.jsonl --trl-python trl-venv/bin/python --repeats 3

Each side runs in a process of its own, one after the other, `--repeats` times; the table shows medians and the
range. Without --trl-python our side is timed alone. See benchmarks/README.md for the rules.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from trl_step import read_rows, take_peak_memory

HERE = Path(__file__).parent


def make_programs(model, max_new_tokens: int, *, unroll: bool, lora_rank: int = 0):
    """The first state, the rollout `generate(params, teacher_params, prompt, row_ids, key, temperature)` and the train
    step, as a training run has them on one device."""
    import jax

    from raft_jax.config import LoraConfig, TrainConfig
    from raft_jax.methods import METHODS
    from raft_jax.sampling import make_generate
    from raft_jax.sharding import make_mesh
    from raft_jax.train.loop import first_state, jit_train_step
    from raft_jax.train.state import make_optimizer
    from raft_jax.train.student import make_student

    optimizer = make_optimizer(5e-6)
    student = make_student(model, LoraConfig(rank=lora_rank), make_mesh(devices=jax.devices()[:1]))
    state = first_state(student, optimizer, model.params, jax.random.key(0))
    sample = make_generate(student.model, max_new_tokens, unroll=unroll)

    @student.model.jit
    def generate(params, teacher_params, *prompt_and_draw):
        return sample(student.forward_params(params, teacher_params), *prompt_and_draw)

    return state, generate, jit_train_step(student, optimizer, METHODS["raft"], TrainConfig())


def measure(options: argparse.Namespace) -> dict:
    """Our side: each step's seconds, tokens and padding, and the process's peak memory."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from raft_jax.data.batches import Batches, TokenRow, token_capacity
    from raft_jax.data.prompts import question_prompt, teacher_prompt
    from raft_jax.host_memory import return_memory_after_compiling
    from raft_jax.models import load_pretrained
    from raft_jax.tokens import Batch

    return_memory_after_compiling()  # as the command line does
    load_before = os.getloadavg()
    model = load_pretrained(options.model, jnp.dtype(options.dtype))
    tokenizer = model.tokenizer
    state, generate, train_step = make_programs(model, options.max_new_tokens, unroll=True)

    def prepared(rows: list[dict[str, str]], first: int) -> Batch:
        """The batch that a training run on just these rows has at every step."""
        found = []
        for number, row in enumerate(rows, first):
            asked = question_prompt(row["question"])
            answer = tokenizer.chat_answer([*asked, {"role": "assistant", "content": row["answer"]}])
            told = teacher_prompt(row["question"], row["answer"])
            found.append(TokenRow(tokenizer.chat_prompt(asked), answer, tokenizer.chat_prompt(told), number))
        return Batches(found, len(found), seed=0, pad_id=tokenizer.pad_id).at(0)

    size = options.batch_size
    rows = read_rows(Path(options.rows), (options.warmup + options.steps) * size)
    batches = [prepared(rows[start : start + size], start) for start in range(0, len(rows), size)]

    def step(state, index: int):
        batch = jax.device_put(batches[index])
        key = jax.random.fold_in(jax.random.key(0), index)
        rollout = generate(state.params, model.params, batch.prompt, batch.row_ids, key, jnp.float32(1.0))
        capacity = token_capacity(int(rollout.mask.sum()), rollout.mask.size)
        batch = batch._replace(rollout=replace(rollout, max_tokens=capacity))
        state, _ = jax.block_until_ready(train_step(state, model.params, batch))
        return state, batch

    seconds, first_seconds, loss_tokens, real, computed = [], [], [], 0, 0
    for index in range(options.warmup, options.warmup + options.steps):
        # A program serves many steps of a training run: the first, in which it is compiled, does not count.
        compiled = set()
        while len(seconds) <= index - options.warmup:
            began = time.perf_counter()
            state, batch = step(state, index)
            capacity = batch.rollout.max_tokens
            (seconds if capacity in compiled else first_seconds).append(time.perf_counter() - began)
            compiled.add(capacity)
        generate.clear_cache()
        train_step.clear_cache()
        drawn = np.asarray(batch.rollout.mask)
        loss_tokens.append(int(drawn.sum() + batch.answer.mask.sum()))
        # Prefill, decode (until the last row is done), student, teacher: places outside the attention.
        sides = batch.prompt, batch.prompt, batch.answer, batch.teacher_prompt
        decoded, generated = drawn[:, : drawn.any(0).sum()].size, int(drawn.sum())
        real += sum(int(side.mask.sum()) - (size - 1) * side.shared_prefix for side in sides) + 3 * generated
        computed += sum(side.max_tokens for side in sides) + decoded + 2 * capacity
    return {
        "side": "raft_jax",
        "jax": jax.__version__,
        "seconds": seconds,
        "loss_tokens": loss_tokens,
        "first_seconds": first_seconds,
        "padding": 1 - real / computed,
        "peak_memory_bytes": take_peak_memory(),
        "load_average": [load_before, os.getloadavg()],
    }


def run_side(command: list[str], out: Path) -> dict:
    subprocess.run([*command, "--out", str(out)], check=True, stdout=subprocess.DEVNULL)
    return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="a Hugging Face folder, the same for both sides")
    add("--rows", required=True, help='JSONL of {"question", "answer"}')
    add("--trl-python", help="a Python that has torch and TRL")
    add("--batch-size", type=int, default=4)
    add("--max-prompt-tokens", type=int, default=256)
    add("--max-new-tokens", type=int, default=64)
    add("--steps", type=int, default=5)
    add("--warmup", type=int, default=1)
    add("--repeats", type=int, default=3)
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
    add("--out", type=Path)
    add("--ours", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ours:
        options.out.write_text(json.dumps(measure(options)))
        return

    shared = [
        "--model",
        options.model,
        "--rows",
        options.rows,
        "--dtype",
        options.dtype,
        *(
            f"--{name}={getattr(options, name.replace('-', '_'))}"
            for name in ("batch-size", "max-prompt-tokens", "max-new-tokens", "steps", "warmup")
        ),
    ]
    runs: dict[str, list[dict]] = {"raft_jax": [], "TRL": []}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "side.json"
        for repeat in range(options.repeats):
            print(f"repeat {repeat + 1} of {options.repeats}", file=sys.stderr, flush=True)
            sides = ["raft_jax", *(["TRL"] if options.trl_python else [])]
            for side in sides if repeat % 2 == 0 else reversed(sides):
                if side == "raft_jax":
                    ours = [sys.executable, __file__, "--ours", *shared]
                    runs[side].append(run_side(ours, out))
                    continue
                trl = run_side([options.trl_python, str(HERE / "trl_step.py"), *shared], out)
                runs[side].append(
                    {
                        **trl,
                        **{key: trl["raft_equivalent"][key] for key in ("seconds", "loss_tokens")},
                        "padding": trl["padding"]["share"],
                    }
                )
    print(
        f"{platform.machine()}, {os.cpu_count()} cores; {options.dtype}, batch {options.batch_size}, "
        f"{options.max_new_tokens} new tokens, {options.steps} steps a repeat"
    )
    print("| side | s/step, median (range) | tokens with loss / s | peak memory | padding |\n|---|---|---|---|---|")
    for side, found in runs.items():
        if not found:
            continue
        seconds = [value for run in found for value in run["seconds"]]
        speed = sum(sum(run["loss_tokens"]) for run in found) / sum(seconds)
        print(
            f"| {side} | {statistics.median(seconds):.2f} ({min(seconds):.2f}-{max(seconds):.2f}) | {speed:.0f} | "
            f"{max(run['peak_memory_bytes'] for run in found) / 1e9:.2f} GB | "
            f"{statistics.median(run['padding'] for run in found):.0%} |"
        )
    if options.out:
        settings = vars(options) | {"out": str(options.out)}
        options.out.write_text(json.dumps({"settings": settings, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
