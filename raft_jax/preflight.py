"""What is known of a run before anything is computed: which rows it takes, and that everything fits."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from raft_jax.config import Config
from raft_jax.data.batches import TokenRow
from raft_jax.data.examples import Columns, Example, load_examples, split_counts, split_held_out
from raft_jax.data.files import locate
from raft_jax.data.prompts import Conversation, fusion_prompt, question_of, question_prompt, rewrite_prompt
from raft_jax.data.refined import RefinedRow
from raft_jax.data.tokenize import prompt_and_answer, token_rows
from raft_jax.errors import InputError
from raft_jax.estimate import RowLengths, estimate_lines, model_size, num_steps
from raft_jax.evaluate.compare import GeneralPrompt, load_general_prompts
from raft_jax.lengths import KEPT, QUANTILES, Fitting, describe_lengths, fitting, quantiles
from raft_jax.methods import METHODS, Method, any_refines
from raft_jax.models.tokenizer import Tokenizer, tokenizer_of
from raft_jax.models.weights import check_keys, config_of, open_weights
from raft_jax.refine.generate import task_prompt
from raft_jax.resume import require_unchanged
from raft_jax.sources import resolve
from raft_jax.terminal import one_line, visible

NAMED = 3  # rows of each kind that are named


def _a_few(names: Sequence[str]) -> str:
    more = [f"and {len(names) - NAMED} more"] if len(names) > NAMED else []
    return ", ".join([*names[:NAMED], *more])


def require_source(key: str, source: str, find: Callable[[str], Path] = resolve) -> None:
    """Raises InputError with the setting's name where nothing is at its source."""
    try:
        find(source)
    except InputError as error:
        raise InputError(f"{key}: {error}") from error


def require_sources(config: Config) -> None:
    """Raises InputError unless everything is there that all stages take; the encoder is not among it."""
    require_source("model.source", config.model.source)
    require_source("data.path", config.data.path, locate)
    require_source("evaluate.general_path", config.evaluate.general_path)


def read_data(config: Config, bad_rows: dict[str, str] | None = None) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples, as data.* asks for them; see `load_examples` for `bad_rows`."""
    data = config.data
    columns = Columns(data.question, data.answer, data.id, data.split, data.context)
    if split_counts(data.path, columns):
        train_rows = load_examples(data.path, columns, data.train_split, bad_rows=bad_rows)
        test_rows = load_examples(data.path, columns, data.test_split, bad_rows=bad_rows)
    else:
        examples = load_examples(data.path, columns, bad_rows=bad_rows)
        train_rows, test_rows = split_held_out(examples, data.held_out, data.seed)
    return train_rows, test_rows


class Rows:
    """A run's examples within the limits of length, and the checks that each stage begins with.

    Nothing is ever cut: an example that is too long is left out and named, and where a prompt of ours leaves the model
    no room, the run stops before it starts.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, max_positions: int):
        self.config, self.tokenizer, self.max_positions = config, tokenizer, max_positions
        self.bad_rows: dict[str, str] = {}  # id → what is wrong
        self.given = read_data(config, self.bad_rows if config.data.skip_bad_rows else None)
        train, test = self.given
        self.train_fitting = self._fitting("training", train, config.data.max_train)
        self.test_fitting = self._fitting("held-out", test, config.data.max_test)
        self.train, self.test = self.train_fitting.kept, self.test_fitting.kept
        trained = {(example.question, example.context, example.turns) for example in self.train}
        self.remembered = [
            example.id for example in self.test if (example.question, example.context, example.turns) in trained
        ]

    def _fitting(self, name: str, examples: Sequence[Example], limit: int | None) -> Fitting:
        found = fitting(examples, self.tokenizer, self.config, limit)
        self.bad_rows |= found.bad
        if not found.kept and not found.too_long:
            raise InputError(f"{next(iter(found.bad.values()))}; none of the {len(examples)} {name} rows can be used")
        if not found.kept:
            raise InputError(f"{self.config.data.path}: all {len(found.too_long)} {name} rows are longer than "
                             "data.max_question_tokens or data.max_answer_tokens; raise them")
        return found

    @property
    def incomplete(self) -> bool:
        """Whether rows were left out that were asked for, or held-out questions are trained on."""
        return bool(self.bad_rows or self.train_fitting.too_long or self.test_fitting.too_long or self.remembered)

    def describe(self) -> Iterator[str]:
        """Lines about what is used and what is left out, naming a few rows of each kind."""
        data = self.config.data
        for name, given, found, key, limit in (
            ("training", self.given[0], self.train_fitting, "max_train", data.max_train),
            ("held-out", self.given[1], self.test_fitting, "max_test", data.max_test),
        ):
            line = f"{name}: {len(found.kept)} of {len(given)} rows are used"
            if len(found.kept) == limit:
                line += f" (a sample, data.{key}={limit})"
            if found.too_long:
                reasons = [f"{id}: {why}" for id, why in found.too_long.items()]
                line += (f"; left out, as longer than data.max_question_tokens={data.max_question_tokens} or "
                         f"data.max_answer_tokens={data.max_answer_tokens}: {len(reasons)} ({_a_few(reasons)})")
            yield one_line(line)
        if self.bad_rows:
            yield f"rows that cannot be used, left out by data.skip_bad_rows: {len(self.bad_rows)}"
            shown = list(self.bad_rows.values())[:NAMED]
            yield from (f"  {one_line(problem)}" for problem in shown)
            if len(self.bad_rows) > NAMED:
                yield f"  … and {len(self.bad_rows) - NAMED} more"
        if self.remembered:
            yield one_line(
                f"held-out questions that are training questions, too: {len(self.remembered)} "
                f"({_a_few(self.remembered)}); what is measured on them may be remembered, not learned"
            )

    def describe_lengths(self, refines: bool) -> Iterator[str]:
        """Lines about lengths in tokens, and warnings of limits that are shorter than most answers."""
        yield from describe_lengths(list((self.train_fitting.lengths | self.test_fitting.lengths).values()))
        limits = [("evaluate.max_new_tokens", self.config.evaluate.max_new_tokens, self.test_fitting,
                   "answers that end there are measured as cut")]
        if refines:
            limits.append(("refine.max_new_tokens", self.config.refine_max_new_tokens, self.train_fitting,
                           "rewritings that end there are not used"))
        for key, limit, found, consequence in limits:
            end = quantiles([lengths.answer for lengths in found.kept_lengths])[QUANTILES.index(KEPT)]
            if limit < end:
                yield (f"warning: {key}={limit} is shorter than the gold answers ({KEPT:.0%} of those used have up to "
                       f"{end} tokens): {consequence}")

    @property
    def gold(self) -> list[RefinedRow]:
        """Every training answer as it was given."""
        reason = "No method of this run trains on refined answers."
        return [RefinedRow.unrefined(example, reason) for example in self.train]

    def tokens(self, rows: Sequence[RefinedRow], method: Method, longest_answer: int = 0) -> list[TokenRow]:
        """What a method trains on, as ids.

        Args:
          rows: refined, or the gold answers alone.
          method: decides which of a row's answers, and whether a teacher sees it.
          longest_answer: tokens that there must be room for even where the row's own answer has less.

        Raises:
          InputError: a row does not fit the model with its rollout.
        """
        tokenized = token_rows(rows, self.tokenizer, method)
        rollout = self.config.train.rollout.max_new_tokens if method.distils else 0
        longest = 0
        for row in tokenized:
            more = max(0, longest_answer - len(row.answer))
            teacher = len(row.teacher_prompt) + (more if method.teacher_sees_answer else 0)
            longest = max(longest, len(row.prompt) + len(row.answer) + more, max(len(row.prompt), teacher) + rollout)
        if longest > self.max_positions:
            keys = ["data.max_answer_tokens", *(["refine.max_new_tokens"] if method.refines else []),
                    *(["train.rollout.max_new_tokens"] if method.distils else [])]
            raise InputError(
                f"{method.name}: a row may take {longest} tokens with its rollout, and the model has "
                f"{self.max_positions} positions; lower {' or '.join(keys)}"
            )
        return tokenized

    def check_training(self, methods: Iterable[Method], parts: int = 1) -> None:
        """Raises InputError where batches cannot be made, or cut into `parts`, or an answer does not fit.

        An answer: a gold one, or the longest that the refinement may write.
        """
        size, count = self.config.train.batch_size, self.config.train.num_micro_batches
        if len(self.train) < size:
            raise InputError(f"{len(self.train)} rows do not fill a batch of {size}; lower train.batch_size")
        if size % (parts * count):
            raise InputError(
                f"train.batch_size {size} in {count} micro-batch(es) does not divide over mesh data×fsdp = {parts}; "
                "change train.batch_size, train.num_micro_batches or the mesh"
            )
        for method in methods:
            self.tokens(self.gold, method, 0 if method.target == "gold" else self.config.refine_max_new_tokens)

    def check_refinement(self) -> None:
        """Raises InputError where a prompt for rewriting or fusion leaves no room for what is to be written."""
        length = self.config.refine_max_new_tokens
        self._require_room("refine.max_new_tokens", length,
                           (rewrite_prompt(row.answer, row.question, row.context, row.turns) for row in self.train))
        # The fusion's prompt has the rewriting in it.
        self._require_room("refine.max_new_tokens", 2 * length,
                           (fusion_prompt(row.answer, "", row.question, row.context, row.turns) for row in self.train))

    def check_evaluation(self) -> list[GeneralPrompt]:
        """The general prompts; raises InputError for whatever the evaluation would stumble over."""
        settings, general = self.config.evaluate, load_general_prompts(self.config.evaluate.general_path)
        self._require_room("evaluate.max_new_tokens", settings.max_new_tokens,
                           map(question_of, self.test))
        self._require_room("evaluate.general_new_tokens", settings.general_new_tokens,
                           (question_prompt(prompt.prompt) for prompt in general))
        for example in self.test:
            length = sum(map(len, prompt_and_answer(self.tokenizer, question_of(example), example.answer)))
            if length > self.max_positions:
                raise InputError(
                    f"{example.id}: question and gold answer have {length} tokens, and the model has "
                    f"{self.max_positions} positions; lower data.max_answer_tokens"
                )
        require_source("encoder.source", self.config.encoder.source)
        return general

    def _require_room(self, key: str, num_new_tokens: int, conversations: Iterable[Conversation]) -> None:
        longest = max(len(task_prompt(self.tokenizer, conversation)) for conversation in conversations)
        if longest + num_new_tokens > self.max_positions:
            raise InputError(
                f"a prompt of {longest} tokens and {num_new_tokens} new ones do not fit the model's "
                f"{self.max_positions} positions; lower {key}, data.max_question_tokens or data.max_answer_tokens"
            )


def check(config: Config, console) -> None:
    """Looks at config, data and model, starts nothing, and shows one training example with the tokens that carry loss.

    Raises:
      InputError: whatever a run would refuse before it computes anything, but for the mesh, the numbers in the weights
        and what is in the encoder's folder: no device is touched.
    """
    require_sources(config)
    require_unchanged(config)
    path = resolve(config.model.source)
    weights = open_weights(path)
    decoder = config_of(weights)
    tokenizer = tokenizer_of(weights, decoder.vocab_size)
    tokenizer.thinking = config.model.thinking
    check_keys(weights, decoder)
    rows = Rows(config, tokenizer, decoder.max_positions)
    methods = [METHODS[name] for name in config.methods]
    refines = any_refines(config.methods)
    console.print(f"data: {config.data.path}")
    for line in [*rows.describe(), *rows.describe_lengths(refines)]:
        console.print(line)
    general = rows.check_evaluation()
    rows.check_training(methods)
    if refines:
        rows.check_refinement()
    console.print(_steps(config, len(rows.train)))
    sizes = RowLengths(
        [(found.question, found.answer) for found in rows.train_fitting.kept_lengths],
        [(found.question, found.answer) for found in rows.test_fitting.kept_lengths],
        [len(tokenizer.encode(prompt.prompt)) for prompt in general],
    )
    for line in estimate_lines(config, model_size(decoder, config), sizes, free_disk=_free_disk(config.run_dir),
                               keep_finished=config.train.keep_finished):
        console.print(line)
    _print_example(rows, tokenizer, console)


def _free_disk(run_dir: str) -> int:
    """Bytes that are free where a run folder is or will be."""
    folder = Path(run_dir).absolute()
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.is_dir())).free


def _steps(config: Config, num_rows: int) -> str:
    """A line about methods and steps, and about rows that no step takes."""
    batch_size = config.train.batch_size
    steps = num_steps(config, num_rows)
    line = f"methods: {', '.join(config.methods)}; {steps} steps of {batch_size} rows each"
    if unused := num_rows - min(num_rows, steps * batch_size):
        return f"{line}; {unused} of the {num_rows} rows are in none of them"
    if unused := num_rows % batch_size:
        line += f"; in each epoch {unused} rows, in turn, do not fill a batch and wait for the next"
    return line


def _print_example(rows: Rows, tokenizer: Tokenizer, console) -> None:
    """One training example, with the tokens that carry loss in colour."""
    from rich.text import Text

    example = rows.train[0]
    prompt, answer = prompt_and_answer(tokenizer, question_of(example), example.answer)
    console.print(one_line(
        f"one example, {example.id}: {len(prompt)} tokens of prompt carry no loss, {len(answer)} of the answer do"
    ))
    text = Text()
    for ids, styles in ((prompt, ("dim", "dim")), (answer, ("black on green", "black on bright_green"))):
        for index, characters in enumerate(_characters(tokenizer, ids)):
            text.append(characters, styles[index % 2])
    console.print(text)


def _characters(tokenizer: Tokenizer, ids: Sequence[int]) -> Iterator[str]:
    """Each token's text; tokens that are parts of one character come together. Control characters are made visible."""
    held: list[int] = []
    for token in ids:
        held.append(token)
        text = tokenizer.token_text(held)
        if not text.endswith("\N{REPLACEMENT CHARACTER}") or len(held) == 4:  # bytes of the longest character
            yield visible(text)
            held = []
    if held:
        yield visible(tokenizer.token_text(held))
