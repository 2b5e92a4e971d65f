"""A run: refine, train, export, evaluate and report in one folder, each stage going on where it was stopped."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp

from raft_jax.config import Config, changed_keys, to_yaml
from raft_jax.data.batches import TokenRow
from raft_jax.data.examples import Columns, Example, fingerprint, load_examples, split_counts, split_held_out
from raft_jax.data.prompts import fusion_prompt, question_prompt, rewrite_prompt, teacher_prompt
from raft_jax.data.refined import RefinedRow, load_refined, publish
from raft_jax.errors import InputError
from raft_jax.evaluate.compare import Evaluation, load_general_prompts
from raft_jax.models import Model, load_pretrained
from raft_jax.models.encoder import load_encoder
from raft_jax.models.export import export_hf
from raft_jax.models.tokenizer import Tokenizer
from raft_jax.refine.judge import CoverageJudge, LikelihoodJudge, SimilarityJudge
from raft_jax.refine.ledger import Ledger
from raft_jax.refine.run import Parts, refine
from raft_jax.refine.write import LocalWriter
from raft_jax.sampling import Sampler, Scorer
from raft_jax.sharding import make_mesh
from raft_jax.train.loop import read_metrics, tokens_trained, train
from raft_jax.train.methods import METHODS, Method


@contextmanager
def open_run_dir(config: Config):
    """The run folder, held by this process alone, with the config that it was made with.

    Raises:
      InputError: another process uses the folder, or it was made with another config (says which keys).
    """
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "run.lock").open("w") as lock:
        if is_writer():
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(
                    f"{run_dir}: another process is running in this folder; wait for it, or set run_dir"
                ) from error
        saved = run_dir / "config.yaml"
        if saved.exists() and saved.stat().st_size:
            if changed := changed_keys(config, saved.read_text("utf-8")):
                raise InputError(
                    f"{run_dir}: was made with another config ({'; '.join(changed)}); "
                    "change that back, or set run_dir to a new folder"
                )
        else:
            write_atomically(saved, to_yaml(config))
        yield run_dir


def is_writer() -> bool:
    """Whether this process writes the run folder: of several that share it, the first."""
    return jax.process_index() == 0


def wait_for_writer(what: str) -> None:
    """Holds the other processes until the first has written something that they are about to look for."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file as a whole."""
    if not is_writer():
        return
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


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


class Run:
    """The stages of one run. Each leaves its result in the folder and is passed over when that is there."""

    def __init__(self, config: Config, run_dir: Path):
        self.config, self.run_dir = config, run_dir
        self.mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
        self._check_data_unchanged()

    @cached_property
    def model(self) -> Model:
        return load_pretrained(
            self.config.model.source, jnp.dtype(self.config.model.dtype), self.mesh, self.config.model.remat
        )

    @cached_property
    def encoder(self):
        return load_encoder(self.config.encoder.source)

    @cached_property
    def data(self) -> tuple[list[Example], list[Example]]:
        """Training and held-out examples that fit; what does not is listed once."""
        sides = []
        limits = (self.config.data.max_train, self.config.data.max_test)
        for name, examples, limit in zip(("training", "held-out"), read_data(self.config), limits, strict=True):
            kept, left_out = fitting(examples, self.model.tokenizer, self.config, limit)
            if left_out:
                listed = ", ".join(f"{key} ({why})" for key, why in list(left_out.items())[:10])
                more = f" and {len(left_out) - 10} more" if len(left_out) > 10 else ""
                print(f"{len(left_out)} of {len(kept) + len(left_out)} {name} rows are left out, longer than "
                      f"data.max_question_tokens {self.config.data.max_question_tokens} or data.max_answer_tokens "
                      f"{self.config.data.max_answer_tokens}: {listed}{more}")
            if not kept:
                raise InputError(f"{self.config.data.path}: all {len(examples)} {name} rows are longer than "
                                 "data.max_question_tokens or data.max_answer_tokens; raise them")
            sides.append(kept)
        return tuple(sides)

    @property
    def methods(self) -> list[Method]:
        return [METHODS[name] for name in self.config.methods]

    def refine(self) -> list[RefinedRow]:
        """Stage 1; rows that are published already are read."""
        folder = self.run_dir / "refined"
        examples = self.data[0]
        if (folder / "refined.jsonl").exists():
            rows = load_refined(folder)
            if [row.id for row in rows] == [example.id for example in examples]:
                return rows
        began = time.perf_counter()
        settings = self.config.refine
        sampler = Sampler(self.model, settings.batch_size, self.mesh)
        key = jax.random.key(self.config.seed)
        drawing = {name: getattr(settings, name) for name in ("temperature", "top_p", "max_new_tokens")}

        def writer(prompt, stream: int) -> LocalWriter:
            return LocalWriter(sampler, self.model.params, prompt, key=jax.random.fold_in(key, stream), **drawing)

        judges = {
            "similarity": lambda: SimilarityJudge(self.encoder, self.config.encoder.batch_size),
            "coverage": CoverageJudge,
            "likelihood": lambda: LikelihoodJudge(Scorer(self.model, mesh=self.mesh), self.model.params),
        }
        parts = Parts(
            writer(lambda item: rewrite_prompt(item.question, item.gold), 0), self.encoder,
            writer(lambda item: fusion_prompt(item.question, item.gold, item.rewrite), 1),
            [judges[name]() for name in settings.judges],
        )
        ledger = Ledger.open(folder / "ledger.jsonl", writes=is_writer())
        rows = refine(examples, parts, settings, ledger)
        if is_writer():
            publish(rows, folder)
        wait_for_writer("refined")
        tokens = sum(record.get("num_tokens", 0) for record in ledger.records())
        self._record_time("refine", None, time.perf_counter() - began, tokens)
        accepted = sum(row.accepted for row in rows)
        fused = sum(row.chosen == "fusion" for row in rows)
        print(f"refined {len(rows)} rows: {accepted} passed the filter, {fused} answers are fused, "
              f"{len(rows) - fused} stay gold")
        return rows

    def train(self) -> None:
        """Stage 2 for every method, each followed by its export."""
        rows = None
        for method in self.methods:
            if self._exported(method.name):
                continue
            rows = rows or self._training_rows()
            contexts = {example.id: example.context for example in self.data[0]}
            tokens = token_rows(rows, [contexts[row.id] for row in rows], self.model.tokenizer, method)
            self._check_fit(tokens, method)
            folder = self.run_dir / method.name
            params = train(self.model, tokens, method, self.config.train, folder, seed=self.config.seed, mesh=self.mesh)
            metrics = read_metrics(folder / "metrics.jsonl")
            self._record_time("train", method.name, sum(line["seconds"] for line in metrics), tokens_trained(metrics))
            self._export(method, params)

    def export(self) -> None:
        """Exports what is trained; training that is not finished is finished first."""
        self.train()

    def evaluate(self) -> None:
        """Base model and every trained one, on the same questions; a model that has its marks is passed over."""
        path = self.run_dir / "evaluation.json"
        found = json.loads(path.read_text("utf-8")) if path.exists() else {"models": {}}
        names = ["base", *(method.name for method in self.methods if self._exported(method.name))]
        missing = [name for name in names if name not in found["models"]]
        if not missing:
            return
        settings = self.config.evaluate
        evaluation = Evaluation(
            self.model, self.encoder, self.data[1], load_general_prompts(settings.general_path), settings, self.mesh
        )
        for name in missing:
            began = time.perf_counter()
            marks = evaluation.evaluate(name, self._params_of(name))
            found["models"][name] = marks
            write_atomically(path, json.dumps(found, indent=1, ensure_ascii=False))
            wait_for_writer(f"evaluate {name}")
            self._record_time("evaluate", name, time.perf_counter() - began, marks["tokens"])

    def report(self) -> Path:
        from raft_jax.report import write_report

        return write_report(self.run_dir) if is_writer() else self.run_dir / "report.html"

    def all(self) -> Path:
        self.train()
        self.evaluate()
        return self.report()

    def _check_data_unchanged(self) -> None:
        """The data file of a run must stay what it was: results of two files must not mix."""
        path = self.run_dir / "data.sha256"
        digest = fingerprint(self.config.data.path)
        if path.exists() and (before := path.read_text().strip()) and before != digest:
            raise InputError(
                f"{self.config.data.path}: has changed since {self.run_dir} was started; set run_dir to a new folder"
            )
        write_atomically(path, digest + "\n")

    def _training_rows(self) -> list[RefinedRow]:
        """Refined rows where a method needs them, the gold answers as they are where none does."""
        if any(method.target != "gold" for method in self.methods):
            return self.refine()
        reason = "No method of this run trains on refined answers."
        return [
            RefinedRow(example.id, example.question, example.answer, "", "empty", None, False, [], example.answer,
                       "gold", None, reason)
            for example in self.data[0]
        ]

    def _check_fit(self, rows: Sequence[TokenRow], method: Method) -> None:
        """A teacher's prompt is never cut: where a row cannot fit, the run stops before it starts."""
        limit = self.model.config.max_positions
        rollout = self.config.train.rollout.max_new_tokens if method.distill else 0
        longest = max(
            max(len(row.prompt) + len(row.answer),
                max(len(row.prompt), len(row.teacher_prompt)) + rollout)
            for row in rows
        )
        if longest > limit:
            raise InputError(f"{method.name}: a row takes {longest} tokens with its rollout, and the model has {limit} "
                             "positions; lower data.max_answer_tokens or train.rollout.max_new_tokens")

    def _export(self, method: Method, params) -> None:
        began = time.perf_counter()
        base, train_settings = self.config.model.source, self.config.train
        card = (
            f"# {method.title}\n\nBase model: {base}. Data: {self.config.data.path}, {len(self.data[0])} rows. "
            f"Learning rate {train_settings.learning_rate:g}, batch {train_settings.batch_size}, "
            f"{train_settings.epochs:g} epoch(s). Made with raft_jax; the method is RAFT (arXiv:2606.00147).\n"
        )
        folder = self.run_dir / method.name / "hf"
        export_hf(self.model, params, folder, dtype=jnp.dtype(self.config.export.dtype), card=card)
        wait_for_writer(f"export {method.name}")
        self._record_time("export", method.name, time.perf_counter() - began, 0)

    def _exported(self, name: str) -> bool:
        return (self.run_dir / name / "hf" / "config.json").exists()

    def _params_of(self, name: str):
        if name == "base":
            return self.model.params
        folder = self.run_dir / name / "hf"
        return load_pretrained(str(folder), jnp.dtype(self.config.model.dtype), self.mesh).params

    def _record_time(self, stage: str, method: str | None, seconds: float, tokens: int) -> None:
        if not is_writer():
            return
        line = {"stage": stage, "method": method, "seconds": round(seconds, 3), "tokens": tokens}
        with (self.run_dir / "timings.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def check(config: Config, console) -> None:
    """Looks at config and data, starts nothing, and shows one training example with the tokens that carry loss."""
    from rich.text import Text

    from raft_jax.models.tokenizer import load_tokenizer

    train_rows, test_rows = read_data(config)
    tokenizer = load_tokenizer(config.model.source)
    kept, left_out = fitting(train_rows, tokenizer, config, config.data.max_train)
    console.print(f"data: {len(train_rows)} training and {len(test_rows)} held-out rows in {config.data.path}")
    for key, why in left_out.items():
        console.print(f"left out: {key}, {why}", markup=False)
    console.print(f"{len(kept)} training rows are used, {len(left_out)} do not fit")
    if not kept:
        raise InputError(
            f"{config.data.path}: no training row fits; raise data.max_question_tokens or data.max_answer_tokens"
        )
    load_general_prompts(config.evaluate.general_path)
    steps = max(1, round(config.train.epochs * (len(kept) // config.train.batch_size)))
    steps = min(steps, config.train.max_steps or steps)
    if len(kept) < config.train.batch_size:
        raise InputError(f"{len(kept)} rows do not fill a batch of {config.train.batch_size}; lower train.batch_size")
    console.print(f"training: {', '.join(config.methods)}; {steps} steps of {config.train.batch_size} rows each")
    example = kept[0]
    asked = question_prompt(example.question, example.context)
    prompt = tokenizer.chat_prompt(asked)
    answer = tokenizer.chat_answer([*asked, {"role": "assistant", "content": example.answer}])
    console.print(
        f"one example, {example.id}: {len(prompt)} tokens of prompt carry no loss, {len(answer)} of the answer do"
    )
    text = Text()
    for ids, styles in ((prompt, ("dim", "dim")), (answer, ("black on green", "black on bright_green"))):
        for index, token in enumerate(ids):
            text.append(tokenizer.token_text(token), styles[index % 2])
    console.print(text, soft_wrap=True)
