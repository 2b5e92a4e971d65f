"""The data of a run: its training and held-out examples within the limits of length, and their token ids."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import NamedTuple

from raft_jax.config import Config, DataConfig
from raft_jax.data.answers import each_answer, first_answers, require_free_ids
from raft_jax.data.batches import TokenRow
from raft_jax.data.examples import Columns, Example, load_examples, split_counts, split_held_out
from raft_jax.data.prompts import load_prompts
from raft_jax.data.refined import RefinedRow
from raft_jax.data.tokenize import token_rows
from raft_jax.duplicates import FindNear, asked, near_questions, same_questions
from raft_jax.errors import InputError
from raft_jax.lengths import KEPT, QUANTILES, Fitting, describe_lengths, fitting, quantiles
from raft_jax.methods import Method
from raft_jax.models.encoder import Encoder
from raft_jax.models.tokenizer import Tokenizer
from raft_jax.terminal import one_line

NAMED = 3  # most rows of each kind that are printed


def _a_few(names: Sequence[str]) -> str:
    more = [f"and {len(names) - NAMED} more"] if len(names) > NAMED else []
    return ", ".join([*names[:NAMED], *more])


def _pairs(rows: Mapping[str, str]) -> str:
    return _a_few([f"{id} as {earlier}" for id, earlier in rows.items()])


def _within(rows: Mapping[str, str], held_out: Container[str]) -> dict[str, str]:
    """The pairs of which both rows are training rows, or both held-out ones."""
    return {id: earlier for id, earlier in rows.items() if (id in held_out) == (earlier in held_out)}


class GivenRows(NamedTuple):
    """The rows of the data before any is left out for its length.

    Attributes:
      train: training examples, each with one answer.
      test: held-out examples, the same.
      several: ids of the rows that have several answers.
      repeated: the rows with the question of an earlier row, as id → id of that row. Held-out rows count as earlier.
      dropped: the rows that data.drop_duplicates leaves out, in the same form.
    """

    train: list[Example]
    test: list[Example]
    several: list[str]
    repeated: dict[str, str]
    dropped: dict[str, str]


def columns_of(data: DataConfig) -> Columns:
    """The names of the columns, from the settings data.*."""
    return Columns(data.question, data.answer, data.id, data.split, data.context, data.system)


def read_data(config: Config, bad_rows: dict[str, str] | None = None, find_near: FindNear | None = None) -> GivenRows:
    """Training and held-out examples according to the settings data.*.

    Args:
      config: the run's.
      bad_rows: see `load_examples`.
      find_near: finds near duplicates; needed where they are left out.

    Raises:
      InputError: the data cannot be read, or no training row is left.
    """
    data, columns = config.data, columns_of(config.data)
    if split_counts(data.path, columns):
        train = load_examples(data.path, columns, data.train_split, bad_rows=bad_rows)
        test = load_examples(data.path, columns, data.test_split, bad_rows=bad_rows)
    else:
        examples = load_examples(data.path, columns, bad_rows=bad_rows)
        train, test = split_held_out(examples, data.held_out, data.seed)
    several = [example.id for example in (*train, *test) if example.more_answers]
    every = [*test, *train]
    repeated, dropped = same_questions(every), {}
    if data.drop_duplicates != "none":
        dropped = dict(repeated)
        if data.drop_duplicates == "near":
            if find_near is None:
                raise ValueError("data.drop_duplicates=near needs find_near")
            dropped |= find_near(every)
        train, test = ([example for example in rows if example.id not in dropped] for rows in (train, test))
        if not train:
            raise InputError(
                f"{data.path}: every training question is a held-out one, too, so that data.drop_duplicates="
                f"{data.drop_duplicates} leaves none; set data.train_split and data.test_split to different rows"
            )
    if data.several_answers == "each":
        require_free_ids([*train, *test], data.path)
        train, test = each_answer(train), each_answer(test)
    else:
        train, test = first_answers(train), first_answers(test)
    return GivenRows(train, test, several, repeated, dropped)


class RunData:
    """A run's examples within the limits of length. No text is ever truncated: too long examples are left out."""

    def __init__(self, config: Config, tokenizer: Tokenizer, max_positions: int, find_near: FindNear | None = None):
        self.config, self.tokenizer, self.max_positions = config, tokenizer, max_positions
        self.bad_rows: dict[str, str] = {}  # id → what is wrong
        self.given = read_data(config, self.bad_rows if config.data.skip_bad_rows else None, find_near)
        train, test, *_ = self.given
        self.train_fitting = self._fitting("training", train, config.data.max_train)
        self.test_fitting = self._fitting("held-out", test, config.data.max_test)
        self.train, self.test = self.train_fitting.kept, self.test_fitting.kept
        trained = set(map(asked, self.train))
        self.remembered = [example.id for example in self.test if asked(example) in trained]

    def _fitting(self, name: str, examples: Sequence[Example], limit: int | None) -> Fitting:
        fitted = fitting(examples, self.tokenizer, self.config, limit)
        self.bad_rows |= fitted.bad
        if not fitted.kept and not fitted.too_long:
            raise InputError(f"{next(iter(fitted.bad.values()))}; none of the {len(examples)} {name} rows can be used")
        if not fitted.kept:
            raise InputError(
                f"{self.config.data.path}: all {len(fitted.too_long)} {name} rows are longer than "
                "data.max_question_tokens or data.max_answer_tokens; raise them"
            )
        return fitted

    @property
    def incomplete(self) -> bool:
        """Whether something of the data is not used, or held-out questions are also training questions."""
        too_long = self.train_fitting.too_long or self.test_fitting.too_long
        unused_answers = self.given.several and self.config.data.several_answers == "first"
        return bool(
            self.bad_rows or too_long or self.remembered or self.given.repeated or self.given.dropped or unused_answers
        )

    def describe(self) -> Iterator[str]:
        """Lines about the rows that are used and left out, with a few examples of each kind."""
        data = self.config.data
        for name, rows, fitted, key, limit in (
            ("training", self.given[0], self.train_fitting, "max_train", data.max_train),
            ("held-out", self.given[1], self.test_fitting, "max_test", data.max_test),
        ):
            line = f"{name}: {len(fitted.kept)} of {len(rows)} rows are used"
            if len(fitted.kept) == limit:
                line += f" (a sample, data.{key}={limit})"
            if fitted.too_long:
                reasons = [f"{id}: {why}" for id, why in fitted.too_long.items()]
                line += (
                    f"; left out, as longer than data.max_question_tokens={data.max_question_tokens} or "
                    f"data.max_answer_tokens={data.max_answer_tokens}: {len(reasons)} ({_a_few(reasons)})"
                )
            yield one_line(line)
        if self.bad_rows:
            yield f"rows that cannot be used, left out by data.skip_bad_rows: {len(self.bad_rows)}"
            shown = list(self.bad_rows.values())[:NAMED]
            yield from (f"  {one_line(problem)}" for problem in shown)
            if len(self.bad_rows) > NAMED:
                yield f"  … and {len(self.bad_rows) - NAMED} more"
        yield from self._describe_duplicates()
        if several := self.given.several:
            how = {
                "first": "the first is used; data.several_answers=each makes each a row",
                "each": "each is a row, as data.several_answers=each",
            }[data.several_answers]
            yield one_line(f"rows with several answers: {len(several)} ({_a_few(several)}); {how}")

    def _describe_duplicates(self) -> Iterator[str]:
        """Lines about rows that ask the same."""
        setting, dropped = self.config.data.drop_duplicates, self.given.dropped
        if dropped:
            yield one_line(
                f"rows with the question of an earlier row, left out by data.drop_duplicates={setting}: "
                f"{len(dropped)} ({_pairs(dropped)})"
            )
        held_out = {example.id for example in self.given.test}
        if not dropped and (repeated := _within(self.given.repeated, held_out)):
            yield one_line(
                f"rows with the question of an earlier row: {len(repeated)} ({_pairs(repeated)}); "
                "data.drop_duplicates=exact leaves them out"
            )
        if self.remembered:
            yield one_line(
                f"held-out questions that are training questions, too: {len(self.remembered)} "
                f"({_a_few(self.remembered)}); what is measured on them may be remembered, not learned; "
                "data.drop_duplicates=exact leaves the training rows out"
            )

    def describe_near_duplicates(self, encoder: Encoder) -> Iterator[str]:
        """Lines about rows that are used and ask nearly the same; none where such rows are left out."""
        data = self.config.data
        if data.drop_duplicates == "near":
            return
        repeated = near_questions([*self.test, *self.train], encoder, data.duplicate_similarity)
        held_out = {example.id for example in self.test}
        within = _within(repeated, held_out)
        across = {id: earlier for id, earlier in repeated.items() if id not in within}
        for what, pairs in (
            ("rows with nearly the question of an earlier row", within),
            ("training rows with nearly the question of a held-out row", across),
        ):
            if pairs:
                yield one_line(
                    f"{what} (cosine of data.duplicate_similarity={data.duplicate_similarity:g} or more): "
                    f"{len(pairs)} ({_pairs(pairs)}); data.drop_duplicates=near leaves them out"
                )

    def describe_lengths(self, refines: bool) -> Iterator[str]:
        """Lines about lengths in tokens, and warnings if the limits of generation would truncate many answers."""
        yield from describe_lengths(list((self.train_fitting.lengths | self.test_fitting.lengths).values()))
        limits = [
            (
                "evaluate.max_new_tokens",
                self.config.evaluate.max_new_tokens,
                self.test_fitting,
                "answers that end there are measured as cut",
            )
        ]
        if refines:
            limits.append(
                (
                    "refine.max_new_tokens",
                    self.config.refine_max_new_tokens,
                    self.train_fitting,
                    "rewritings that end there are not used",
                )
            )
        for key, limit, fitted, consequence in limits:
            end = quantiles([lengths.answer for lengths in fitted.kept_lengths])[QUANTILES.index(KEPT)]
            if limit < end:
                yield (
                    f"warning: {key}={limit} is shorter than the gold answers ({KEPT:.0%} of those used have up to "
                    f"{end} tokens): {consequence}"
                )

    @property
    def gold(self) -> list[RefinedRow]:
        """The training rows with their gold answers."""
        reason = "No method of this run trains on refined answers."
        return [RefinedRow.unrefined(example, reason) for example in self.train]

    def tokens(self, rows: Sequence[RefinedRow], method: Method, longest_answer: int = 0) -> list[TokenRow]:
        """The token ids that a method trains on.

        Args:
          rows: refined rows, or rows with gold answers only.
          method: selects which of a row's answers is the target, and whether the teacher sees it.
          longest_answer: length of answer, in tokens, that has to fit even if the row's own answer is shorter.

        Raises:
          InputError: a row and its rollout exceed the model's positions.
        """
        tokenized = token_rows(rows, self.tokenizer, method, load_prompts(self.config.refine.prompts))
        rollout = self.config.train.rollout.max_new_tokens if method.distils else 0
        longest = 0
        for row in tokenized:
            more = max(0, longest_answer - len(row.answer))
            teacher = len(row.teacher_prompt) + (more if method.teacher_sees_answer else 0)
            longest = max(longest, len(row.prompt) + len(row.answer) + more, max(len(row.prompt), teacher) + rollout)
        if longest > self.max_positions:
            keys = [
                "data.max_answer_tokens",
                *(["refine.max_new_tokens"] if method.refines else []),
                *(["train.rollout.max_new_tokens"] if method.distils else []),
            ]
            raise InputError(
                f"{method.name}: a row may take {longest} tokens with its rollout, and the model has "
                f"{self.max_positions} positions; lower {' or '.join(keys)}"
            )
        return tokenized
