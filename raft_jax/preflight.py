"""Checks for problems that would stop a run, made before anything is computed; each stage begins with its checks."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from jax.sharding import AbstractMesh

from raft_jax.bucket import local_path
from raft_jax.config import STUDENT, Config
from raft_jax.data.examples import Example
from raft_jax.data.files import locate
from raft_jax.data.prompts import Conversation, load_prompts, question_of, question_prompt
from raft_jax.data.tokenize import prompt_and_answer
from raft_jax.dev import dev_rows
from raft_jax.duplicates import near_questions
from raft_jax.errors import InputError
from raft_jax.estimate import RowLengths, estimate_lines, model_size, num_steps
from raft_jax.evaluate.compare import GeneralPrompt, load_general_prompts
from raft_jax.evaluate.expected import load_expected
from raft_jax.evaluate.judges import require_judges
from raft_jax.evaluate.tasks import require_tasks
from raft_jax.methods import Method, any_refines
from raft_jax.models import parameter_shardings, vocab_padding
from raft_jax.models.config import DecoderConfig
from raft_jax.models.encoder import load_encoder
from raft_jax.models.tokenizer import Tokenizer, tokenizer_of
from raft_jax.models.weights import check_keys, config_as_loaded, config_of, open_weights
from raft_jax.plan.short import short_lines
from raft_jax.refine.generate import task_prompt
from raft_jax.refine.roles import require_local_roles, require_roles
from raft_jax.resume import require_unchanged
from raft_jax.run_data import RunData
from raft_jax.run_folder import RunFolder
from raft_jax.sharding import MESH_AXES
from raft_jax.sources import require_source, resolve
from raft_jax.student_init import require_student_init
from raft_jax.terminal import one_line, visible
from raft_jax.trackers import require_trackers


def require_sources(config: Config) -> None:
    """Raises InputError unless the inputs that every stage needs exist. The encoder is not one of them."""
    require_source("model.source", config.model.source)
    require_source("data.path", config.data.path, locate)
    require_source("evaluate.general_path", config.evaluate.general_path)
    require_local_roles(config)


def require_pruned(folder: RunFolder, method: Method, is_current: bool = True) -> None:
    """Raises InputError unless the folder holds the export, made with the same settings, that a method prunes."""
    source = method.pruned_from
    if source and not (is_current and folder.method(source).is_exported):
        raise InputError(
            f"methods: {method.name} prunes what {source} trained, and {folder} holds no {source} of this config; "
            f"add {source} to methods"
        )


def check_training(data: RunData, methods: Iterable[Method], parts: int = 1) -> None:
    """Raises InputError if the rows do not fill a batch, a row is too long, or the batch size does not divide; or a
    tracker's package is missing.

    It must divide by `parts` (shards) times the number of micro-batches. A row has its gold answer or, for methods that
    train on refined answers, the longest that refinement may write.
    """
    size, count = data.config.train.batch_size, data.config.train.num_micro_batches
    if len(data.train) < size:
        raise InputError(f"{len(data.train)} rows do not fill a batch of {size}; lower train.batch_size")
    if size % (parts * count):
        raise InputError(
            f"train.batch_size {size} in {count} micro-batch(es) does not divide over mesh data×fsdp = {parts}; "
            "change train.batch_size, train.num_micro_batches or the mesh"
        )
    require_trackers(data.config.train.trackers)
    for method in methods:
        if method.pruned_from is not None:
            continue
        data.tokens(data.gold, method, data.config.refine_max_new_tokens if method.refines else 0)


def check_mesh(config: Config, decoder: DecoderConfig) -> int:
    """The number of parts that a mesh splits a batch into; an axis of -1 counts as 1.

    Raises InputError if the weights do not divide over the mesh. The devices need not be at hand.
    """
    sizes = {axis: max(1, getattr(config.mesh, axis)) for axis in MESH_AXES}
    mesh = AbstractMesh(tuple(sizes.values()), MESH_AXES)
    parameter_shardings(replace(decoder, vocab_padding=vocab_padding(decoder, mesh)), mesh)
    return sizes["data"] * sizes["fsdp"]


def check_refinement(data: RunData) -> None:
    """Raises InputError if a prompt of the student as rewriter or fuser, and its new tokens, exceed its positions."""
    settings, length = data.config.refine, data.config.refine_max_new_tokens
    prompts = load_prompts(settings.prompts)
    if settings.rewriter == STUDENT:
        _require_room(
            data,
            "refine.max_new_tokens",
            length,
            (prompts.rewrite(row.answer, row.question, row.context, row.turns) for row in data.train),
        )
    if settings.fuser == STUDENT:
        # The prompt for fusion contains the rewriting.
        _require_room(
            data,
            "refine.max_new_tokens",
            2 * length,
            (prompts.fuse(row.answer, "", row.question, row.context, row.turns) for row in data.train),
        )


def check_evaluation(data: RunData) -> list[GeneralPrompt]:
    """Returns the general prompts; raises InputError if the evaluation would fail because of its inputs."""
    settings, general = data.config.evaluate, load_general_prompts(data.config.evaluate.general_path)
    _require_room(data, "evaluate.max_new_tokens", settings.max_new_tokens, map(question_of, data.test))
    _require_room(
        data,
        "evaluate.general_new_tokens",
        settings.general_new_tokens,
        (question_prompt(prompt.prompt) for prompt in general),
    )
    expected = load_expected(data.config, data.test)
    labelled = [example for example in data.test if example.id in expected.labels]
    _require_room(data, "evaluate.label", settings.max_new_tokens, map(expected.choice_prompt, labelled))
    for example in data.test:
        length = sum(map(len, prompt_and_answer(data.tokenizer, question_of(example), example.answer)))
        if length > data.max_positions:
            raise InputError(
                f"{example.id}: question and gold answer have {length} tokens, and the model has "
                f"{data.max_positions} positions; lower data.max_answer_tokens"
            )
    require_tasks(settings)
    require_source("encoder.source", data.config.encoder.source)
    return general


def _require_room(data: RunData, key: str, num_new_tokens: int, conversations: Iterable[Conversation]) -> None:
    longest = max((len(task_prompt(data.tokenizer, conversation)) for conversation in conversations), default=0)
    if longest + num_new_tokens > data.max_positions:
        raise InputError(
            f"a prompt of {longest} tokens and {num_new_tokens} new ones do not fit the model's "
            f"{data.max_positions} positions; lower {key}, data.max_question_tokens or data.max_answer_tokens"
        )


def check(config: Config, console) -> None:
    """Checks config, data and model without starting a run, and prints one training example and the tokens in the loss.

    Raises:
      InputError: a problem that a run would report before it computes anything. Not checked, because only near
        duplicates that are to be left out are computed: whether the devices at hand make the mesh, the values of the
        weights, and the content of the encoder's folder.
    """
    require_sources(config)
    require_unchanged(config)
    path = resolve(config.model.source)
    weights = open_weights(path)
    decoder = config_of(weights)
    tokenizer = tokenizer_of(weights, decoder.vocab_size)
    tokenizer.thinking = config.model.thinking
    check_keys(weights, decoder)
    require_student_init(config.train.student_init, config_as_loaded(weights), tokenizer)
    data = RunData(config, tokenizer, decoder.max_positions, partial(_near_duplicates, config))
    methods = config.compared_methods
    refines = any_refines(config.methods)
    console.print(f"data: {config.data.path}")
    for line in [*data.describe(), *data.describe_lengths(refines)]:
        console.print(line)
    general = check_evaluation(data)
    for method in methods:
        if method.pruned_from not in config.methods:
            require_pruned(RunFolder(config.run_dir), method)
    check_training(data, methods, check_mesh(config, decoder))
    if config.train.eval_every:
        console.print(f"dev rows, for train.eval_every: {len(dev_rows(config, tokenizer))}")
    if refines:
        check_refinement(data)
        for line in require_roles(config):
            console.print(line)
    for line in require_judges(config):
        console.print(line)
    console.print(_steps(config, len(data.train)))
    sizes = RowLengths(
        [(lengths.question, lengths.answer) for lengths in data.train_fitting.kept_lengths],
        [(lengths.question, lengths.answer) for lengths in data.test_fitting.kept_lengths],
        [len(tokenizer.encode(prompt.prompt)) for prompt in general],
    )
    for line in estimate_lines(config, model_size(decoder, config), sizes, free_disk=_free_disk(config.run_dir)):
        console.print(line)
    if trained := [method for method in methods if method.pruned_from is None]:
        method = next((method for method in trained if method.distils), trained[0])
        for line in short_lines(config, decoder, method, data.tokens(data.gold, method)):
            console.print(line)
    _print_example(data, tokenizer, console)


def _near_duplicates(config: Config, examples: Sequence[Example]) -> dict[str, str]:
    """`near_questions` with the run's encoder, which is loaded for this alone."""
    settings = config.encoder
    require_source("encoder.source", settings.source)
    encoder = load_encoder(settings.source, prefix=settings.prefix, batch_size=settings.batch_size)
    return near_questions(examples, encoder, config.data.duplicate_similarity)


def _free_disk(run_dir: str) -> int:
    """Free bytes on the disk where a run folder is or will be."""
    folder = local_path(run_dir).absolute()
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.is_dir())).free


def _steps(config: Config, num_rows: int) -> str:
    """A line with the methods, the number of steps, and the number of rows that are in no step."""
    batch_size = config.train.batch_size
    steps = num_steps(config, num_rows)
    line = f"methods: {', '.join(config.methods)}; {steps} steps of {batch_size} rows each"
    if unused := num_rows - min(num_rows, steps * batch_size):
        return f"{line}; {unused} of the {num_rows} rows are in none of them"
    if unused := num_rows % batch_size:
        line += f"; in each epoch {unused} rows, in turn, do not fill a batch and wait for the next"
    return line


def _print_example(data: RunData, tokenizer: Tokenizer, console) -> None:
    """Prints one training example, with the tokens in the loss in colour."""
    from rich.text import Text

    example = data.train[0]
    prompt, answer = prompt_and_answer(tokenizer, question_of(example), example.answer)
    console.print(
        one_line(
            f"one example, {example.id}: {len(prompt)} tokens of prompt carry no loss, {len(answer)} of the answer do"
        )
    )
    text = Text()
    for ids, styles in ((prompt, ("dim", "dim")), (answer, ("black on green", "black on bright_green"))):
        for index, characters in enumerate(_characters(tokenizer, ids)):
            text.append(characters, styles[index % 2])
    console.print(text)


def _characters(tokenizer: Tokenizer, ids: Sequence[int]) -> Iterator[str]:
    """The text of each token; tokens that encode one character together are joined. Control characters are replaced."""
    held: list[int] = []
    for token in ids:
        held.append(token)
        text = tokenizer.token_text(held)
        if not text.endswith("\N{REPLACEMENT CHARACTER}") or len(held) == 4:  # bytes of the longest character
            yield visible(text)
            held = []
    if held:
        yield visible(tokenizer.token_text(held))
