"""Times TRL's nearest equivalent of one RAFT step, on CPU or on one GPU: an SDFTTrainer step, then an SFT step.

Both share one student and one AdamW state, as the two losses of RAFT do. Nothing here imports raft_jax: run
it with a Python that has torch and trl (benchmarks/README.md), on the rows of the other side. The JSON that
it writes also says what is equivalent and what is not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

# As raft_jax.data.prompts.teacher_prompt.
TEACHER_TEMPLATE = """Background reference knowledge:
{privileged_context}

Answer the following question, using the background knowledge where it helps.
{prompt}"""

TOP_K = 512
DISTILLATION_TEMPERATURE = 1.5
ROLLOUT_TEMPERATURE = 1.0

EQUIVALENT = [
    "rows and their order, batch size, dtype, threads, limit on new tokens, the model's chat template",
    "rollouts: sampled from the current student at every step at temperature 1.0 without top-k or top-p, "
    "up to and including the end-of-turn token; the batch runs until its last row ends or reaches the limit",
    "teacher: the frozen base model in the same dtype, sees the answer and the question, is never cut, "
    "RAFT's teacher template",
    "divergence: forward KL on 512 tokens, both sides renormalised, logits divided by 1.5, mean over each "
    "rollout's own length and then over the batch; logits at rollout positions only",
    "SFT: cross entropy of the answer; prompt tokens carry no loss",
    "AdamW (torch, fused), learning rate 5e-6, weight decay 0.01, one state for both losses; no dropout, "
    "sdpa attention, no logging, no checkpoint files",
]
NOT_EQUIVALENT = [
    "the 512 tokens are the student's most likely ones; RAFT takes the teacher's",
    "no factor T² in the KL and no balancing of the losses: as much work, another gradient",
    "two backward passes with an update after each. RAFT makes one update, so `seconds` leaves out the "
    "update of the SFT step; `seconds_two_updates` keeps it",
    "`seconds` takes the SFT step with its logits at answer positions only, which is the faster way on CPU. "
    "`seconds_sft_trainer` takes SFTTrainer as it comes: on CPU it projects prompt and padding onto the "
    "vocabulary too, and computes entropy and accuracy for its log",
    "SFT averages over the answer tokens of the batch; RAFT by default over each answer, then over the batch",
    "the gradient norm is clipped at 1.0, Trainer's default; RAFT by default computes it without clipping",
    "the SFT answer ends with what the chat template puts after the end-of-turn token (ChatML: a newline)",
    "other random numbers, so other rollouts: compare `generated_tokens`",
    "prompts are padded to the longest of their batch, not to fixed lengths, as nothing is compiled",
]


@dataclass
class Pass:
    """Token positions that one model pass of a step computed, and how many of them were real."""

    real: int = 0
    computed: int = 0


@dataclass
class Step:
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    rollout_seconds: float = 0.0
    optimizer_seconds: float = 0.0
    generated_tokens: int = 0
    prompt_tokens: int = 0
    teacher_prompt_tokens: int = 0
    answer_tokens: int = 0
    passes: dict[str, Pass] = field(default_factory=dict)


def read_rows(path: Path, count: int) -> list[dict[str, str]]:
    """The first `count` rows of a JSONL file, starting over where it has fewer."""
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    if not rows:
        sys.exit(f'{path} has no rows; give one {{"question", "answer"}} a line')
    for number, row in enumerate(rows, start=1):
        if not row.get("question") or not row.get("answer"):
            sys.exit(f"{path}: row {number} needs a question and an answer; it has {sorted(row)}")
    return [rows[index % len(rows)] for index in range(count)]


def user_turn(row: dict[str, str]) -> list[dict[str, str]]:
    return [{"role": "user", "content": row["question"]}]


def refuse_long_prompts(tokenizer, rows: list[dict[str, str]], limit: int) -> None:
    """Exits on a prompt above the limit: cut, it would leave the two sides with different work."""
    for row in rows:
        prompt = tokenizer.apply_chat_template(user_turn(row), add_generation_prompt=True, return_dict=False)
        length = len(prompt)
        if length > limit:
            sys.exit(
                f"the prompt {row['question'][:60]!r} has {length} tokens, --max-prompt-tokens allows "
                f"{limit}; raise it, or leave the row out on both sides"
            )


def take_device_peak() -> int:
    """The most bytes of the GPU's memory since the last call."""
    import torch

    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def take_peak_memory() -> int:
    """High-water mark of this process's resident memory in bytes; on Linux since the last call.

    Linux hands ru_maxrss down from the process that started this one, so VmHWM is taken where there is one.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    Path("/proc/self/clear_refs").write_text("5")  # starts the mark afresh
    return int(line.split()[1]) * 1024


def write_random_weights(options: argparse.Namespace) -> None:
    """Weights for the folder's config.json, made on the device."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(options.model)
    with torch.device(options.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype))
    model.save_pretrained(options.model)
    del model
    if options.device == "cuda":
        torch.cuda.empty_cache()


def wait_for(device: str) -> None:
    """Until the GPU has done all that it was given."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def make_clock(steps: list[Step], device: str):
    """A trainer callback that appends one timed Step per optimizer step."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            wait_for(device)
            steps.append(Step())
            self.started, self.cpu_started = time.perf_counter(), time.process_time()

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            wait_for(device)
            self.update_started = time.perf_counter()

        def on_optimizer_step(self, args, state, control, **kwargs):
            wait_for(device)
            steps[-1].optimizer_seconds = time.perf_counter() - self.update_started

        def on_step_end(self, args, state, control, **kwargs):
            wait_for(device)
            steps[-1].seconds = time.perf_counter() - self.started
            steps[-1].cpu_seconds = time.process_time() - self.cpu_started

    return Clock()


def common_settings(options: argparse.Namespace) -> dict:
    """Settings of both trainers: nothing but the step itself."""
    return {
        "output_dir": options.scratch,
        "use_cpu": options.device == "cpu",
        "bf16": False,
        "per_device_train_batch_size": options.batch_size,
        "max_steps": options.warmup + options.steps,
        "learning_rate": 5e-6,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.01,
        "optim": "adamw_torch_fused",
        "gradient_checkpointing": options.gradient_checkpointing,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "shuffle_dataset": False,
        "seed": options.seed,
    }


def make_distillation_trainer(options, rows, tokenizer, steps: list[Step]):
    """SDFTTrainer as near to RAFT's distillation as its options allow, counting tokens as it goes."""
    from datasets import Dataset
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    class CountingTrainer(SDFTTrainer):
        def _generate(self, prompt_ids):
            started = time.perf_counter()
            output = super()._generate(prompt_ids)
            wait_for(options.device)
            steps[-1].rollout_seconds = time.perf_counter() - started
            return output

        def _prepare_training_batch(self, inputs):
            batch = super()._prepare_training_batch(inputs)
            prompt, rollout, teacher = (
                (int(batch[name].sum()), batch[name].numel())
                for name in ("prompt_mask", "completion_mask", "teacher_attention_mask")
            )
            step, size = steps[-1], self.args.per_device_train_batch_size
            step.prompt_tokens, step.generated_tokens = prompt[0], rollout[0]
            step.teacher_prompt_tokens = teacher[0] - rollout[0]
            step.passes = {
                "prefill": Pass(*prompt),
                # The first new token comes out of the prefill; rows that have ended are still computed.
                "decode": Pass(rollout[0] - size, rollout[1] - size),
                "student": Pass(prompt[0] + rollout[0], prompt[1] + rollout[1]),
                "teacher": Pass(*teacher),
            }
            return batch

    settings = SDFTConfig(
        **common_settings(options),
        model_init_kwargs={"dtype": options.dtype, "attn_implementation": "sdpa"},
        num_generations=1,
        max_prompt_length=None,
        max_completion_length=options.max_new_tokens,
        # `temperature` divides the logits of the divergence; the sampler gets its own below.
        temperature=DISTILLATION_TEMPERATURE,
        generation_kwargs={"temperature": ROLLOUT_TEMPERATURE},
        teacher_model_kind="base",
        teacher_prompt_template=options.teacher_template,
        distillation_mode="topk_logits",
        distillation_topk=TOP_K,
        distillation_alpha=0.0,
        distillation_add_tail=False,
        distillation_is_clip=None,
    )
    prompts = [{"prompt": user_turn(row), "privileged_context": row["answer"]} for row in rows]
    return CountingTrainer(
        model=str(options.model),
        args=settings,
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer,
        callbacks=[make_clock(steps, options.device)],
    )


def make_sft_trainer(options, rows, distillation_trainer, steps: list[Step], *, lean: bool):
    """SFTTrainer on the answers, with the student and the optimizer of the distillation.

    `lean` replaces its loss by the cross entropy of logits computed at answer positions only.
    """
    from datasets import Dataset
    from torch.nn.functional import cross_entropy
    from trl import SFTConfig, SFTTrainer

    class CountingTrainer(SFTTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            mask = inputs["attention_mask"]
            steps[-1].answer_tokens = int((inputs["labels"] != -100).sum())
            steps[-1].prompt_tokens = int(mask.sum()) - steps[-1].answer_tokens
            steps[-1].passes = {"sft": Pass(int(mask.sum()), mask.numel())}
            return super().training_step(model, inputs, num_items_in_batch)

    class LeanTrainer(CountingTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            tokens, mask, labels = inputs["input_ids"], inputs["attention_mask"], inputs["labels"][:, 1:]
            hidden = model.base_model(tokens, attention_mask=mask, use_cache=False).last_hidden_state
            answer = labels != -100
            logits = model.get_output_embeddings()(hidden[:, :-1][answer])
            return cross_entropy(logits.float(), labels[answer])

    answers = [[{"role": "assistant", "content": row["answer"]}] for row in rows]
    return (LeanTrainer if lean else CountingTrainer)(
        model=distillation_trainer.model,
        args=SFTConfig(**common_settings(options), train_sampling_strategy="sequential", max_length=None),
        train_dataset=Dataset.from_dict({"prompt": [user_turn(row) for row in rows], "completion": answers}),
        processing_class=distillation_trainer.processing_class,
        callbacks=[make_clock(steps, options.device)],
        optimizers=(distillation_trainer.optimizer.optimizer, None),
    )


def summarize_stage(steps: list[Step]) -> dict:
    """One stage's figures, one entry per repeat, and the medians of its times."""
    records = [asdict(step) for step in steps]
    columns = {key: [record[key] for record in records] for key in records[0] if key != "passes"}
    summary = {key: values for key, values in columns.items() if any(values)}
    medians = {f"median_{key}": statistics.median(summary[key]) for key in summary if key.endswith("seconds")}
    return summary | medians


def summarize_padding(steps: list[Step]) -> dict:
    """Real and computed positions of every model pass over all repeats, and the share that was padding."""
    total: dict[str, Pass] = {}
    for step in steps:
        for name, counted in step.passes.items():
            sums = total.setdefault(name, Pass())
            sums.real += counted.real
            sums.computed += counted.computed
    real = sum(counted.real for counted in total.values())
    computed = sum(counted.computed for counted in total.values())
    return {"passes": {name: asdict(sums) for name, sums in total.items()}, "share": 1 - real / computed}


def measure(options: argparse.Namespace) -> dict:
    """Runs the three stages one after the other in this process; the JSON's content."""
    import datasets
    import torch
    import transformers
    import trl

    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    if options.random_weights:
        write_random_weights(options)
    rows = read_rows(options.rows, options.batch_size * (options.warmup + options.steps))
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    refuse_long_prompts(tokenizer, rows, options.max_prompt_tokens)

    take_peak = take_device_peak if options.device == "cuda" else take_peak_memory
    stages: dict[str, list[Step]] = {"distillation": [], "sft": [], "sft_trainer": []}
    load_before = os.getloadavg()
    trainer = make_distillation_trainer(options, rows, tokenizer, stages["distillation"])
    peaks = {"loading": take_peak()}
    trainer.train()
    peaks["distillation"] = take_peak()
    for name in ("sft", "sft_trainer"):
        make_sft_trainer(options, rows, trainer, stages[name], lean=name == "sft").train()
        peaks[name] = take_peak()

    distillation, sft, sft_trainer = (steps[options.warmup :] for steps in stages.values())
    pairs = list(zip(distillation, sft, strict=True))
    one_update = [one.seconds + two.seconds - two.optimizer_seconds for one, two in pairs]
    seconds = {
        "seconds": one_update,
        "seconds_two_updates": [one.seconds + two.seconds for one, two in pairs],
        "seconds_sft_trainer": [
            one.seconds + two.seconds - two.optimizer_seconds
            for one, two in zip(distillation, sft_trainer, strict=True)
        ],
    }
    generated = sum(one.generated_tokens for one in distillation)
    loss_tokens = [one.generated_tokens + two.answer_tokens for one, two in pairs]
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    return {
        "side": "trl",
        "settings": settings,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
        },
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "raft_equivalent": {
            **seconds,
            **{f"median_{key}": statistics.median(values) for key, values in seconds.items()},
            "loss_tokens": loss_tokens,
            "tokens_per_second": sum(loss_tokens) / sum(one_update),
            "generated_tokens_per_second": generated / sum(one_update),
        },
        "distillation": summarize_stage(distillation),
        "sft": summarize_stage(sft),
        "sft_trainer": summarize_stage(sft_trainer),
        "padding": summarize_padding(distillation + sft),
        "peak_memory_bytes": max(peaks["distillation"], peaks["sft"]),
        "peak_memory_bytes_by_stage": peaks,
        "equivalent": EQUIVALENT,
        "not_equivalent": NOT_EQUIVALENT,
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="Hugging Face folder with weights and tokenizer")
    add("--rows", type=Path, required=True, help='JSONL of {"question", "answer"}')
    add("--batch-size", type=int, default=4)
    add("--max-prompt-tokens", type=int, default=256, help="a longer prompt is refused, never cut")
    add("--max-new-tokens", type=int, default=64)
    add("--steps", type=int, default=5)
    add("--warmup", type=int, default=1)
    add("--threads", type=int, default=2)
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of weights, AdamW and compute")
    add("--gradient-checkpointing", action="store_true", help="TRL's default: slower, less memory")
    add("--teacher-template", default=TEACHER_TEMPLATE, help="has {privileged_context} and {prompt}")
    add("--random-weights", action="store_true", help="first write some into --model, which has a config.json only")
    add("--seed", type=int, default=0)
    add("--out", type=Path, required=True)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> dict:
    """Measures, and writes the JSON to `options.out`."""
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # torch reads it when it is imported
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    with tempfile.TemporaryDirectory() as options.scratch:
        result = measure(options)
    del result["settings"]["scratch"]
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def main() -> None:
    options = parse()
    result = run(options)
    seconds, peak = result["raft_equivalent"]["median_seconds"], result["peak_memory_bytes"] / 1e9
    padding = result["padding"]["share"]
    print(f"{seconds:.2f} s a step, {peak:.2f} GB peak, {padding:.0%} padding: {options.out}")


if __name__ == "__main__":
    main()
