"""What a plan knows of a run without its weights: the model's shapes, and its rows, or their limits of length."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean

from raft_jax.config import STUDENT, Config
from raft_jax.data.batches import SIDES, Batches, TokenRow
from raft_jax.data.files import locate
from raft_jax.data.prompts import load_prompts, question_prompt
from raft_jax.errors import InputError
from raft_jax.estimate import TEACHER_TOKENS
from raft_jax.evaluate.compare import load_general_prompts
from raft_jax.files import read_object
from raft_jax.methods import Method, any_refines
from raft_jax.models.config import DecoderConfig
from raft_jax.models.families import config_from_hf, decoder_config
from raft_jax.models.tokenizer import Tokenizer, tokenizer_from_folder, tokenizer_from_gguf
from raft_jax.models.weight_files import GgufFile, open_weights
from raft_jax.plan.flops import RowTokens
from raft_jax.plan.programs import Side, Sides
from raft_jax.run_data import RunData
from raft_jax.sampling.engine import bucket
from raft_jax.sharding import length_multiple, num_shards
from raft_jax.sources import resolve

TEMPLATE_TOKENS = 64  # that a chat template adds to a prompt, where there is no tokenizer to ask
INSTRUCTION_TOKENS = 64  # of rewriting and fusion, the same


def load_shapes(source: str) -> tuple[DecoderConfig, Tokenizer | None]:
    """The decoder's config and, where there is one, the tokenizer of a source; no weights have to be there.

    Raises:
      InputError: there is no config.json, or a model that is not supported.
    """
    path = resolve(source, weights=False)
    if path.is_file():
        weights = open_weights(path)
        assert isinstance(weights, GgufFile)
        return config_from_hf(weights.hf_config), tokenizer_from_gguf(weights.metadata, str(path))
    try:
        decoder = config_from_hf(decoder_config(read_object(path / "config.json")))
    except InputError as error:
        raise InputError(f"model.source: {error}" if str(path) in str(error) else f"{path}: {error}") from error
    tokenizer = tokenizer_from_folder(path) if (path / "tokenizer.json").exists() else None
    if tokenizer is not None:
        tokenizer.check_ids(decoder.vocab_size)
    return decoder, tokenizer


@dataclass
class Facts:
    """The model and the rows of a run.

    Attributes:
      config: of the run.
      decoder, tokenizer: of the model; the tokenizer is None where there is none.
      given_rows: number of training rows, in place of the data's.
      notes: what is not known, and what is assumed in its place.
    """

    config: Config
    decoder: DecoderConfig
    tokenizer: Tokenizer | None
    given_rows: int | None = None
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, config: Config, rows: int | None = None) -> Facts:
        """The facts of a config."""
        facts = cls(config, *load_shapes(config.model.source), given_rows=rows)
        if facts.tokenizer is None:
            facts.notes.append(
                f"no tokenizer in {config.model.source}: a chat template is taken for {TEMPLATE_TOKENS} tokens"
            )
        if facts.data is None:
            why = (
                "cannot be measured without a tokenizer"
                if facts.tokenizer is None
                else f"{config.data.path} is missing"
            )
            facts.notes.append(f"lengths: the config's limits are taken for every row; the data {why}")
        elif any_refines(config.methods):
            facts.notes.append("lengths: those of the data; refined answers are taken for as long as the gold answers")
        return facts

    @cached_property
    def data(self) -> RunData | None:
        """The run's rows; None where the data or the tokenizer is missing."""
        if self.tokenizer is None:
            return None
        try:
            locate(self.config.data.path)
        except InputError:
            return None
        self.tokenizer.thinking = self.config.model.thinking
        return RunData(self.config, self.tokenizer, self.decoder.max_positions, lambda examples: {})

    @property
    def num_train(self) -> int | None:
        """Training rows; None if not known."""
        return self.given_rows or (None if self.data is None else len(self.data.train))

    @property
    def num_test(self) -> int:
        """Held-out questions, or as many as the config takes."""
        settings = self.config.data
        return len(self.data.test) if self.data is not None else settings.max_test or settings.held_out

    @cached_property
    def num_general(self) -> int:
        """General prompts; 0 where their file is missing."""
        try:
            return len(load_general_prompts(self.config.evaluate.general_path))
        except InputError:
            self.notes.append(f"general prompts: {self.config.evaluate.general_path} is missing; none are counted")
            return 0

    def row_tokens(self, method: Method) -> RowTokens:
        """The mean numbers of real tokens in a row of a method, with a rollout of full length."""
        rollout = self.config.train.rollout.max_new_tokens if method.distils else 0
        if self.data is None:
            return RowTokens(*self._limits(method), rollout)
        rows = self._rows(method)
        return RowTokens(*(fmean(len(getattr(row, name)) for row in rows) for name in SIDES), rollout)

    def sides(self, method: Method, batch_size: int) -> Sides:
        """The padded parts of a method's rows. Call it under `jax.set_mesh`, as they depend on mesh and platform."""
        multiple, shards, train = length_multiple(), num_shards("batch"), self.config.train
        if self.data is None or len(self.data.train) < batch_size:
            return Sides(*(Side(-(-length // multiple) * multiple) for length in self._limits(method)))
        parts = shards * train.num_micro_batches
        batches = Batches(
            self._rows(method),
            batch_size,
            seed=self.config.seed,
            pad_id=0,
            length_buckets=train.length_buckets,
            epochs=train.epochs,
            num_shards=shards,
            num_micro_batches=train.num_micro_batches,
            length_multiple=multiple,
            share_prefixes=not self.decoder.ropes_depend_on_length,
        )
        steps = range(train.num_steps(batches.steps_per_epoch))
        longest = max(batches.one_of_each_shape(steps), key=lambda batch: sum(part.length for part in batch[:3]))
        slots = batch_size // parts
        return Sides(
            *(
                Side(part.length, (part.max_tokens or 0) / max(1, slots * part.length), part.shared_prefix)
                for part in longest[:3]
            )
        )

    def refine_prompt(self) -> int:
        """Slots for the longest prompt of rewriting and fusion: two answers and the instructions."""
        return self._bucket(2 * self._longest_answer + INSTRUCTION_TOKENS + self._template)

    def question_prompt(self) -> int:
        """Slots for the longest question."""
        return self._bucket(self._limits_of_data[0])

    def _bucket(self, length: int) -> int:
        return bucket(min(length, self.decoder.max_positions))

    @property
    def refines_itself(self) -> bool:
        """Whether the student writes the rewritings or the fusions."""
        refine = self.config.refine
        return any_refines(self.config.methods) and STUDENT in (refine.rewriter, refine.fuser)

    def _rows(self, method: Method) -> list[TokenRow]:
        assert self.data is not None
        return self.data.tokens(self.data.gold, method)

    @property
    def _longest_answer(self) -> int:
        return self._limits_of_data[1]

    @cached_property
    def _limits_of_data(self) -> tuple[int, int]:
        """The longest prompt and answer: of the data, or by the config's limits."""
        if self.data is None:
            return self.config.data.max_question_tokens + self._template, self.config.data.max_answer_tokens
        kept = self.data.train_fitting.kept_lengths
        return max(lengths.question for lengths in kept) + self._template, max(lengths.answer for lengths in kept)

    def _limits(self, method: Method) -> tuple[int, int, int]:
        """The longest prompt, answer and teacher's prompt by the config's limits."""
        prompt, answer = self.config.data.max_question_tokens + self._template, self.config.data.max_answer_tokens
        if method.target == "none":
            return prompt, 0, prompt
        sees = answer + self._teacher_instructions if method.teacher_sees_answer else 0
        return prompt, answer, (prompt + sees if method.distils else 0)

    @cached_property
    def _template(self) -> int:
        """Tokens that the chat template adds to a question."""
        return self._added(question_prompt("?")) if self.tokenizer is not None else TEMPLATE_TOKENS

    @cached_property
    def _teacher_instructions(self) -> int:
        """Tokens that the teacher's prompt has besides question, answer and chat template."""
        if self.tokenizer is None:
            return TEACHER_TOKENS
        prompts = load_prompts(self.config.refine.prompts)
        return max(0, self._added(prompts.teacher("?", "!")) - self._template)

    def _added(self, conversation) -> int:
        assert self.tokenizer is not None
        return len(self.tokenizer.chat_prompt(conversation))


def name_of(config: Config) -> str:
    """A model's name for printing: the last part of its source."""
    return Path(config.model.source.partition("@")[0]).name
