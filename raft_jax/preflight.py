"""What is known of a run before anything is computed: which rows it takes, and that everything fits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from raft_jax.config import Config
from raft_jax.data.batches import TokenRow
from raft_jax.data.examples import Columns, Example, load_examples, locate, split_counts, split_held_out
from raft_jax.data.prompts import Conversation, fusion_prompt, question_prompt, rewrite_prompt, teacher_prompt
from raft_jax.data.refined import RefinedRow
from raft_jax.errors import InputError
from raft_jax.evaluate.compare import GeneralPrompt, load_general_prompts
from raft_jax.models.tokenizer import Tokenizer, tokenizer_from_folder, tokenizer_from_gguf
from raft_jax.models.weights import GgufFile, check_keys, check_token_ids, config_of, open_weights
from raft_jax.run_dir import require_unchanged
from raft_jax.sources import resolve
from raft_jax.train.methods import METHODS, Method

# Control characters but tab and newline → their pictures: a terminal would obey them.
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}


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


def read_data(config: Config) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples, as data.* asks for them."""
    data = config.data
    columns = Columns(data.question, data.answer, data.id, data.split, data.context)
    if split_counts(data.path, columns):
        train_rows = load_examples(data.path, columns, split=data.train_split)
        test_rows = load_examples(data.path, columns, split=data.test_split)
    else:
        train_rows, test_rows = split_held_out(load_examples(data.path, columns), data.held_out, config.seed)
    return train_rows, test_rows


def fitting(
    examples: Sequence[Example], tokenizer: Tokenizer, config: Config, limit: int | None
) -> tuple[list[Example], dict[str, str]]:
    """The first `limit` examples within the limits of length, and why each of the others is left out."""
    kept, left_out = [], {}
    for example in examples:
        if len(kept) == limit:
            break
        messages = question_prompt(example.question, example.context)
        question = len(tokenizer.encode(messages[0]["content"]))
        answer = len(tokenizer.chat_answer([*messages, {"role": "assistant", "content": example.answer}]))
        if question > config.data.max_question_tokens:
            left_out[example.id] = f"question of {question} tokens"
        elif answer > config.data.max_answer_tokens:
            left_out[example.id] = f"answer of {answer} tokens"
        else:
            kept.append(example)
    return kept, left_out


def token_rows(
    rows: Sequence[RefinedRow], contexts: Sequence[str], tokenizer: Tokenizer, method: Method
) -> list[TokenRow]:
    """What a method trains on, as ids."""
    made = []
    for number, (row, context) in enumerate(zip(rows, contexts, strict=True)):
        target = {
            "gold": row.gold, "rewrite": row.rewrite if row.accepted else row.gold, "fused": row.answer,
        }[method.target]
        asked = question_prompt(row.question, context)
        teacher = teacher_prompt(row.question, target, context) if method.teacher_sees_answer else asked
        made.append(TokenRow(
            prompt=tokenizer.chat_prompt(asked),
            answer=tokenizer.chat_answer([*asked, {"role": "assistant", "content": target}]),
            teacher_prompt=tokenizer.chat_prompt(teacher) if method.distill else [],
            number=number,
        ))
    return made


class Rows:
    """A run's examples within the limits of length, and the checks that each stage begins with.

    Nothing is ever cut: an example that is too long is left out and named, and where a prompt of ours leaves the model
    no room, the run stops before it starts.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, max_positions: int):
        self.config, self.tokenizer, self.max_positions = config, tokenizer, max_positions
        self.given = read_data(config)
        train, test = self.given
        self.train, self.train_left_out = fitting(train, tokenizer, config, config.data.max_train)
        self.test, self.test_left_out = fitting(test, tokenizer, config, config.data.max_test)
        trained = {example.question for example in self.train}
        self.remembered = [example.id for example in self.test if example.question in trained]
        for name, given, kept, *_ in self._sides():
            if not kept:
                raise InputError(f"{config.data.path}: all {len(given)} {name} rows are longer than "
                                 "data.max_question_tokens or data.max_answer_tokens; raise them")

    def _sides(self):
        data = self.config.data
        return (("training", self.given[0], self.train, self.train_left_out, "max_train", data.max_train),
                ("held-out", self.given[1], self.test, self.test_left_out, "max_test", data.max_test))

    def describe(self, at_most: int | None = None) -> Iterator[str]:
        """Lines about what is used and what is left out, naming at most so many rows of each side."""
        data = self.config.data
        for name, given, kept, left_out, key, limit in self._sides():
            line = f"{name}: {len(kept)} of {len(given)} rows are used"
            if len(kept) == limit:
                line += f" (data.{key}={limit})"
            if not left_out:
                yield line
                continue
            yield (f"{line}; left out, as longer than data.max_question_tokens={data.max_question_tokens} or "
                   f"data.max_answer_tokens={data.max_answer_tokens}: {len(left_out)}")
            for example, why in list(left_out.items())[:at_most]:
                yield f"  {example}: {why}"
            if at_most is not None and len(left_out) > at_most:
                yield f"  … and {len(left_out) - at_most} more, which `raft-jax check` lists"
        if self.remembered:
            named = ", ".join([*self.remembered[:3], *(["…"] if len(self.remembered) > 3 else [])])
            yield (f"held-out questions that are training questions, too: {len(self.remembered)} ({named}); "
                   "what is measured on them may be remembered, not learned")

    @property
    def gold(self) -> list[RefinedRow]:
        """Every training answer as it was given."""
        reason = "No method of this run trains on refined answers."
        return [
            RefinedRow(example.id, example.question, example.answer, "", "empty", None, False, [], example.answer,
                       "gold", None, reason)
            for example in self.train
        ]

    def tokens(self, rows: Sequence[RefinedRow], method: Method, longest_answer: int = 0) -> list[TokenRow]:
        """What a method trains on, as ids.

        Args:
          rows: refined, or the gold answers alone.
          method: decides which of a row's answers, and whether a teacher sees it.
          longest_answer: tokens that there must be room for even where the row's own answer has less.

        Raises:
          InputError: a row does not fit the model with its rollout.
        """
        contexts = {example.id: example.context for example in self.train}
        made = token_rows(rows, [contexts[row.id] for row in rows], self.tokenizer, method)
        rollout = self.config.train.rollout.max_new_tokens if method.distill else 0
        longest = 0
        for row in made:
            more = max(0, longest_answer - len(row.answer))
            told = len(row.teacher_prompt) + (more if method.teacher_sees_answer else 0)
            longest = max(longest, len(row.prompt) + len(row.answer) + more, max(len(row.prompt), told) + rollout)
        if longest > self.max_positions:
            keys = ["data.max_answer_tokens", *(["refine.max_new_tokens"] if method.target != "gold" else []),
                    *(["train.rollout.max_new_tokens"] if method.distill else [])]
            raise InputError(
                f"{method.name}: a row may take {longest} tokens with its rollout, and the model has "
                f"{self.max_positions} positions; lower {' or '.join(keys)}"
            )
        return made

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
            self.tokens(self.gold, method, 0 if method.target == "gold" else self.config.refine.max_new_tokens)

    def check_refinement(self) -> None:
        """Raises InputError where a prompt for rewriting or fusion leaves no room for what is to be written."""
        length = self.config.refine.max_new_tokens
        self._require_room("refine.max_new_tokens", length,
                           (rewrite_prompt(row.question, row.answer, row.context) for row in self.train))
        # The fusion's prompt has the rewriting in it.
        self._require_room("refine.max_new_tokens", 2 * length,
                           (fusion_prompt(row.question, row.answer, "", row.context) for row in self.train))

    def check_evaluation(self) -> list[GeneralPrompt]:
        """The general prompts; raises InputError for whatever the evaluation would stumble over."""
        settings, general = self.config.evaluate, load_general_prompts(self.config.evaluate.general_path)
        self._require_room("evaluate.max_new_tokens", settings.max_new_tokens,
                           (question_prompt(example.question, example.context) for example in self.test))
        self._require_room("evaluate.general_new_tokens", settings.general_new_tokens,
                           (question_prompt(prompt.prompt) for prompt in general))
        for example in self.test:
            messages = question_prompt(example.question, example.context)
            answer = self.tokenizer.chat_answer([*messages, {"role": "assistant", "content": example.answer}])
            length = len(self.tokenizer.chat_prompt(messages)) + len(answer)
            if length > self.max_positions:
                raise InputError(
                    f"{example.id}: question and gold answer have {length} tokens, and the model has "
                    f"{self.max_positions} positions; lower data.max_answer_tokens"
                )
        require_source("encoder.source", self.config.encoder.source)
        return general

    def _require_room(self, key: str, num_new_tokens: int, conversations: Iterable[Conversation]) -> None:
        longest = max(len(self.tokenizer.chat_prompt(conversation)) for conversation in conversations)
        if longest + num_new_tokens > self.max_positions:
            raise InputError(
                f"a prompt of {longest} tokens and {num_new_tokens} new ones do not fit the model's "
                f"{self.max_positions} positions; lower {key}, data.max_question_tokens or data.max_answer_tokens"
            )


def check(config: Config, console) -> None:
    """Looks at config, data and model, starts nothing, and shows one training example with the tokens that carry loss.

    Raises:
      InputError: whatever a run would refuse before it computes anything, but for the mesh, the shapes of the weights
        and what is in the encoder's folder: no device is touched, no tensor read.
    """
    from rich.text import Text

    require_sources(config)
    require_unchanged(config)
    path = resolve(config.model.source)
    weights = open_weights(path)
    if isinstance(weights, GgufFile):
        tokenizer = tokenizer_from_gguf(weights.metadata, str(path))
    else:
        tokenizer = tokenizer_from_folder(path)
    tokenizer.thinking = config.model.thinking
    decoder = config_of(weights)
    check_keys(weights, decoder)
    check_token_ids(tokenizer.backend, decoder, path, (*tokenizer.stop_ids, tokenizer.pad_id))
    rows = Rows(config, tokenizer, decoder.max_positions)
    methods = [METHODS[name] for name in config.methods]
    console.print(f"data: {config.data.path}")
    for line in rows.describe():
        console.print(line)
    rows.check_evaluation()
    rows.check_training(methods)
    if any(method.target != "gold" for method in methods):
        rows.check_refinement()
    steps = max(1, round(config.train.epochs * (len(rows.train) // config.train.batch_size)))
    steps = min(steps, config.train.max_steps or steps)
    console.print(f"methods: {', '.join(config.methods)}; {steps} steps of {config.train.batch_size} rows each")
    example = rows.train[0]
    asked = question_prompt(example.question, example.context)
    prompt = tokenizer.chat_prompt(asked)
    answer = tokenizer.chat_answer([*asked, {"role": "assistant", "content": example.answer}])
    console.print(
        f"one example, {example.id}: {len(prompt)} tokens of prompt carry no loss, {len(answer)} of the answer do"
    )
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
            yield text.translate(VISIBLE)
            held = []
    if held:
        yield tokenizer.token_text(held).translate(VISIBLE)
