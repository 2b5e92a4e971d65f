"""The model card: README.md of an exported model."""

from __future__ import annotations

from collections.abc import Mapping

from raft_jax.config import Config
from raft_jax.methods import Method
from raft_jax.report.summary import estimate, number
from raft_jax.scores import ModelScores

SCORES = (
    ("domain", "gold_logprob", "log-likelihood of held-out gold answers, nats per token"),
    ("domain", "token_f1", "token F1 of greedy answers"),
    ("domain", "similarity", "embedding similarity of greedy answers"),
    ("general", "divergence", "KL(base ‖ model) on general prompts, nats per token"),
    ("general", "accuracy", "accuracy on general prompts"),
)
SCORES_BEGIN = "| score |"


def has_scores(card: str) -> bool:
    """Whether the card of a model was written after its evaluation."""
    return SCORES_BEGIN in card


def model_card(config: Config, method: Method, num_rows: int, models: Mapping[str, ModelScores] | None = None) -> str:
    """The text of a model card: base model, method, data, settings and, if available, scores.

    Args:
      config: the configuration of the run.
      method: the method that trained the model.
      num_rows: the number of rows that it was trained on.
      models: the scores of each evaluated model, including "base".
    """
    train = config.train
    settings = {
        "epochs": train.epochs if train.max_steps is None else f"{train.epochs:g}, at most {train.max_steps} steps",
        "batch size": train.batch_size,
        "learning rate": f"{train.learning_rate:g}"
        + ("" if train.schedule == "constant" else f", {train.schedule} to {train.final_learning_rate:g}"),
        "weight decay": train.weight_decay,
        "seed": config.seed,
    }
    if train.student_init is not None:
        settings["started from"] = f"`{train.student_init}`"
    if train.lora.rank:
        settings["LoRA"] = f"rank {train.lora.rank}, alpha {train.lora.alpha:g}, merged"
    if method.anchors:
        settings["KL to the base model"] = f"{train.anchor_weight:g} times, on the answers' tokens"
    if method.pruned_from:
        settings["pruned"] = f"{config.fapm.sparsity:g} of each matrix reset to the base model's"
    if method.distils:
        weight = method.constant_weight(train.fixed_weight)
        settings |= {
            "distillation": f"{'whole vocabulary' if train.top_k is None else f'top {train.top_k}'}, "
            f"{'' if train.kl == 'forward' else 'reverse KL, '}temperature {train.temperature:g}, rollouts of "
            f"{train.rollout.max_new_tokens} tokens",
            "λ": f"averages with decay {train.ema_decay:g}" if weight is None else weight,
        }
    lines = [
        "---",
        "library_name: transformers",
        "tags: [raft_jax]",
        "---",
        "",
        f"# {method.title}",
        "",
        f"Fine-tuned from `{config.model.source}` on {num_rows} rows of `{config.data.path}` with raft_jax "
        "(method: RAFT, arXiv:2606.00147, and its baselines).",
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in settings.items()),
    ]
    if models and method.name in models:
        shown = [key for key in ("base", method.name) if key in models]
        heads = " | ".join("base model" if key == "base" else "this model" for key in shown)
        lines += ["", f"{SCORES_BEGIN} {heads} |", "|---|" + "---|" * len(shown)]
        for part, score, meaning in SCORES:
            values = [estimate(getattr(getattr(models[key], part), score)) for key in shown]
            lines.append(f"| {meaning} | {' | '.join(values)} |")
        distance = number(models[method.name].weight_distance.mean, 4)
        lines += ["", f"Mean ± standard error. Mean relative distance of the weights to the base model's: {distance}."]
    return "\n".join(lines) + "\n"
