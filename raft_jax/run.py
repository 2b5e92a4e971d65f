"""A run: refine, train, export, evaluate and report in one folder. Each stage resumes where it was stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp

from raft_jax import interrupt, outcome
from raft_jax.checkpoint import has_steps, remove_steps
from raft_jax.compile_cache import use_compile_cache
from raft_jax.config import Config
from raft_jax.data.examples import Example
from raft_jax.data.prompts import load_prompts
from raft_jax.data.refined import RefinedRow, load_refined, publish, refined_with
from raft_jax.dev import DevScores, dev_rows
from raft_jax.duplicates import asked, near_questions
from raft_jax.errors import InputError
from raft_jax.evaluate.compare import Evaluator
from raft_jax.evaluate.expected import load_expected
from raft_jax.evaluate.harness import make_lm
from raft_jax.evaluate.judges import Judges, require_judges
from raft_jax.evaluate.tasks import TaskRunner, require_tasks
from raft_jax.files import read_object, require_sums
from raft_jax.host_memory import return_memory_after_compiling
from raft_jax.methods import METHODS, Method, any_refines
from raft_jax.metrics import tokens_trained
from raft_jax.models import Model, load_pretrained
from raft_jax.models.encoder import load_encoder
from raft_jax.models.export import as_read_back, export_hf, remove_weights
from raft_jax.preflight import check_evaluation, check_refinement, check_training, require_pruned
from raft_jax.refine.account import account, preview_lines
from raft_jax.refine.ledger import Ledger
from raft_jax.refine.plan import plan
from raft_jax.refine.quality import with_quality
from raft_jax.refine.roles import Roles, require_roles
from raft_jax.refine.run import refine, summary
from raft_jax.resume import all_settings, settings_for
from raft_jax.run_data import RunData
from raft_jax.run_folder import Evaluation, NearDuplicates, RunFolder, write_atomically
from raft_jax.scores import ModelScores
from raft_jax.sharding import is_writer, make_mesh
from raft_jax.sources import model_identity, require_source
from raft_jax.stages import Settings, changes
from raft_jax.student_init import require_student_init
from raft_jax.terminal import visible
from raft_jax.train.fapm import fapm
from raft_jax.train.loop import train
from raft_jax.train.student import Student

# What a run can take over from another one with the same values of these keys.
SHARED = {
    "model": ("model",),
    "model_identity": ("model",),
    "encoder": ("encoder",),
    "evaluator": ("model", "encoder", "data", "evaluate", "seed"),
}
UNFINISHED = " unfinished"  # after the settings of rows for which a model has not replied to everything


def _num_generated(ledger: Ledger) -> int:
    return sum(record.get("num_tokens", 0) for record in ledger.records())


class Run:
    """The stages of one run. Each writes its result to the folder, and is skipped if that exists."""

    def __init__(self, config: Config, folder: RunFolder, like: Run | None = None):
        """
        Args:
          config, folder: of the run.
          like: a run whose model, encoder and evaluator are used, where the settings ask for the same ones.
        """
        self.config, self.folder = config, folder
        self.settings = all_settings(config)
        if like is not None and like.folder.date_begun() == folder.date_begun():
            for name, keys in SHARED.items():
                if all(getattr(like.config, key) == getattr(config, key) for key in (*keys, "mesh")):
                    self.__dict__[name] = getattr(like, name)  # where cached_property looks
        self.results = read_object(folder.results_json, optional=True)
        self._just_trained: dict[str, Any] = {}  # the last method's weights, until they are evaluated
        use_compile_cache(config.compilation_cache)
        self.mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)

    @cached_property
    def model(self) -> Model:
        settings = self.config.model
        model = load_pretrained(
            settings.source, jnp.dtype(settings.dtype), self.mesh, remat=settings.remat, attention=settings.attention
        )
        model.tokenizer.date, model.tokenizer.thinking = self.folder.start_date(), settings.thinking
        return model

    @cached_property
    def model_identity(self) -> str:
        """Identifies the model, its tokenizer and its settings, for results that depend on them."""
        settings = self.config.model
        return model_identity(settings.source, settings.dtype, settings.thinking)

    @cached_property
    def encoder(self):
        settings = self.config.encoder
        require_source("encoder.source", settings.source)
        return load_encoder(settings.source, prefix=settings.prefix, batch_size=settings.batch_size)

    @cached_property
    def evaluator(self) -> Evaluator:
        general, expected = check_evaluation(self.data), load_expected(self.config, self.data.test)
        prompts = load_prompts(self.config.refine.prompts)
        settings = self.config.evaluate
        return Evaluator(self.model, self.encoder, self.data.test, general, settings, self.mesh, expected, prompts)

    @cached_property
    def data(self) -> RunData:
        """The examples that are used; the others are printed once."""
        data = RunData(self.config, self.model.tokenizer, self.model.config.max_positions, self._near_duplicates)
        if data.incomplete:
            print(visible("\n".join(data.describe())), flush=True)
        return data

    def _near_duplicates(self, examples: Sequence[Example]) -> dict[str, str]:
        """`near_questions`; recorded, so that a machine that rounds otherwise leaves out the same rows."""
        similarity, encoder = self.config.data.duplicate_similarity, self.encoder
        questions = [[list(asked(example)), example.id] for example in examples]
        made_with = hashlib.sha256(json.dumps([questions, similarity, encoder.identity]).encode()).hexdigest()
        known = self.folder.near_duplicates()
        if known is None or known.made_with != made_with:
            known = NearDuplicates(made_with, near_questions(examples, encoder, similarity))
            self.folder.write_near_duplicates(known)
        return known.rows

    @property
    def methods(self) -> list[Method]:
        return self.config.compared_methods

    def refine(self, retry: bool = True) -> list[RefinedRow]:
        """Stage 1. Reads the rows if they are published already.

        With `retry`, what a model did not reply to is asked again, unless a method is being trained on the rows.
        """
        made_with = self._refined_with()
        retry = retry and not any(self.folder.method(name).path.exists() for name in METHODS)
        if (rows := self._published(made_with, retry)) is not None:
            return rows
        for line in self.data.describe_near_duplicates(self.encoder):
            print(visible(line), flush=True)
        rows, ledger = self._refine(self.data.train)
        works = account(ledger.used(), self.config)
        if is_writer():
            publish(rows, self.folder.refined, made_with + UNFINISHED * bool(ledger.num_failures))
            self.folder.write_account(works)
        self.folder.wait_for_writer("refined")
        print(*summary(rows), *outcome.lines(rows, self.config.refine.accept, works), sep="\n", flush=True)
        if ledger.num_failures:
            print(f"{ledger.num_failures} request(s) without a reply; `raft-jax refine` asks again", flush=True)
        return rows

    def preview(self, count: int) -> None:
        """Refines the first rows into the ledger, and prints them stage by stage with what they and all rows take."""
        examples = self.data.train[:count]
        rows, ledger = self._refine(examples)
        works = account(ledger.used(), self.config)
        print(*preview_lines(rows, works, len(self.data.train)), sep="\n", flush=True)

    def _refine(self, examples: Sequence[Example]) -> tuple[list[RefinedRow], Ledger]:
        """The refined rows of some examples, and the ledger with their records."""
        check_refinement(self.data)
        for line in require_roles(self.config):
            print(visible(line), flush=True)
        ledger, began = Ledger.open(self.folder.ledger_jsonl, writes=is_writer()), time.perf_counter()
        seconds_before = self.folder.timing("refine").seconds if ledger.records() else 0

        def record() -> None:
            seconds = seconds_before + time.perf_counter() - began
            self.folder.record_time("refine", None, seconds, _num_generated(ledger))

        ledger.on_append = record  # so that the time of a killed process is recorded too
        try:
            models = self.roles.models(self.encoder)
            if line := plan(examples, models, self.config.refine, ledger):
                print(line, flush=True)
            rows = refine(examples, models, self.config.refine, ledger)
            rows = with_quality(rows, self.roles.likelihood, ledger)
        finally:
            self.roles.close()
        if self.folder.timing("refine").tokens != _num_generated(ledger):
            record()
        return rows, ledger

    def _published(self, made_with: str, retry: bool) -> list[RefinedRow] | None:
        """The published rows, if they are of these examples and were made with these settings; else None.

        With `retry`, also None if a model has not replied to everything.
        """
        if not self.folder.refined_jsonl.exists():
            return None
        try:
            rows = load_refined(self.folder.refined)
        except InputError as error:
            print(f"{error} (which happens now, from the ledger)")
            return None
        examples = self.data.train
        same = len(rows) == len(examples) and all(map(RefinedRow.is_of, rows, examples))
        valid = (made_with,) if retry else (made_with, made_with + UNFINISHED)
        if same and refined_with(self.folder.refined) in valid:
            self.folder.wait_for_writer("refined")  # the first may have just published them, and wait for this one
            return rows
        if same and refined_with(self.folder.refined) == made_with + UNFINISHED:
            print(f"{self.folder.refined}: asking again for what had no reply", flush=True)
            return None
        what = "settings or models" if same else "texts"
        print(f"{self.folder.refined}: made from other {what}; refining again, with what the ledger has of it")
        return None

    @cached_property
    def roles(self) -> Roles:
        return Roles(self.config, self.model, self.model_identity, self.mesh)

    def _refined_with(self) -> str:
        """A hash of everything that refined rows depend on, except for the texts of the examples.

        Settings that came later are left out where they have their defaults, so that older folders stay valid.
        """
        settings = dataclasses.asdict(self.config.refine)
        for name in ("batch_size", "rewriter", "fuser", "prompts"):
            del settings[name]
        prompts = [self.roles.prompts.rewrite("", "?"), self.roles.prompts.fuse("", "", "?")]
        parts = [settings, self.config.seed, prompts, self.model_identity, self.encoder.identity]
        if others := self.roles.identities():
            parts.append([*others, *self.config.model_roles.values()])
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def train(self, methods: Sequence[Method] | None = None, keep: bool = False) -> None:
        """Stage 2: trains and exports each method, or those given; with `keep` the last weights stay in memory."""
        wanted = self.methods if methods is None else methods
        methods = [method for method in wanted if not self._is_current(f"export {method.name}")]
        if not methods:
            return
        methods.sort(key=lambda method: method.pruned_from is not None)  # after the method that it prunes
        for method in methods:
            if (source := method.pruned_from) and source not in self.config.methods:
                require_pruned(self.folder, method, self._is_current(f"export {source}"))
        return_memory_after_compiling()
        start, dev = self._student_start(), self._dev_scores()
        refines = any_refines(self.config.methods)
        if refines:
            check_refinement(self.data)
        check_training(self.data, methods, self.mesh.shape["data"] * self.mesh.shape["fsdp"])
        rows = self.refine(retry=False) if refines else self.data.gold
        for method in methods:
            interrupt.check()
            self._record_settings(f"train {method.name}")
            if method.pruned_from is not None:
                self._export(method, self._pruned(method.pruned_from))
                continue
            tokens, folder = self.data.tokens(rows, method), self.folder.method(method.name)
            settings = self.config.train
            seed = self.config.seed if settings.seed is None else settings.seed
            params = train(
                self.model,
                tokens,
                method,
                settings,
                folder.path,
                seed=seed,
                mesh=self.mesh,
                start=start,
                make_dev_scores=dev,
            )
            metrics = folder.metrics()
            seconds = sum(line.get("seconds", 0) for line in metrics)
            self.folder.record_time("train", method.name, seconds, tokens_trained(metrics))
            self._export(method, params)
            if keep and method == methods[-1]:
                held = as_read_back(params, self.config.export.dtype, self.model.params)
                self._just_trained = {method.name: held}
            del params  # else they are held while the next method trains

    def _dev_scores(self) -> Callable[[Student], DevScores] | None:
        """Makes the scores of train.eval_every, if there are to be any."""
        if not self.config.train.eval_every:
            return None
        rows, settings = dev_rows(self.config, self.model.tokenizer), self.config.evaluate
        return partial(
            DevScores,
            rows=rows,
            general=check_evaluation(self.data),
            general_new_tokens=settings.general_new_tokens,
            batch_size=settings.batch_size,
            mesh=self.mesh,
        )

    def _student_start(self) -> Callable[[], Mapping[str, jax.Array]] | None:
        """Loads the weights that the student starts from, if they are not the base model's."""
        if (source := self.config.train.student_init) is None:
            return None
        require_student_init(source, self.model.config, self.model.tokenizer)
        return lambda: load_pretrained(source, jnp.float32, self.mesh).params

    def _pruned(self, source: str):
        """The weights of a method's export, pruned by FAPM."""
        tuned = self._params_of(source, jnp.float32)
        return fapm(tuned, self.model.params, self.config.fapm.sparsity)

    def evaluate(self) -> None:
        """Evaluates the base model and every exported one on the same questions; skips models that have scores.

        Scores that were made with other settings are replaced only when all new ones are complete.
        """
        names = ["base", *(method.name for method in self.methods if self.folder.method(method.name).is_exported)]
        before = self.folder.evaluation()
        stale = [name for name in before.models if not self._is_current(f"evaluate {name}", before.settings)]
        scores = {name: entry for name, entry in before.models.items() if name not in stale}
        if stale:
            begun = self.folder.evaluation(begun=True)
            scores |= {
                name: entry
                for name, entry in begun.models.items()
                if name in begun.settings and self._is_current(f"evaluate {name}", begun.settings)
            }
        if dropped := sorted(set(stale) - set(names)):
            print(
                f"evaluation.json: without {', '.join(dropped)} from here on, evaluated with other settings and not "
                "among methods",
                flush=True,
            )
        self._write_cards(scores)  # a process that was killed may have written scores but not the cards
        missing = [name for name in names if name not in scores]
        if missing:
            self._evaluate(missing, scores, begun=bool(stale))
        if stale and is_writer():
            if not missing:
                self._write_evaluation(scores, begun=True)
            os.replace(self.folder.evaluation_new_json, self.folder.evaluation_json)
        self._just_trained.clear()
        self.folder.wait_for_writer("evaluation")
        if self.config.evaluate.judges:
            self._judge()
        if self.config.evaluate.tasks:
            self._run_tasks()

    def _judge(self) -> None:
        """Adds the judges' verdicts to the scores; verdicts that are recorded are not asked for again."""
        before, began = self.folder.evaluation(), time.perf_counter()
        ledger = Ledger.open(self.folder.verdicts_jsonl, writes=is_writer())
        num_known, timed = len(ledger.records()), self.folder.timing("judge").seconds
        base = (self.model, self.model_identity)
        judges = Judges(self.config, base, lambda: self.encoder, ledger, self.mesh)
        try:
            scores = {name: judges.judged(name, model, self.data.test) for name, model in before.models.items()}
        finally:
            judges.close()
        if len(ledger.records()) > num_known:
            self.folder.record_time("judge", None, timed + time.perf_counter() - began, _num_generated(ledger))
        self._replace_scores(before, scores)
        if ledger.num_failures:
            print(f"{ledger.num_failures} answer(s) without a verdict; `raft-jax evaluate` asks again", flush=True)

    def _run_tasks(self) -> None:
        """Adds the tasks of lm-evaluation-harness to the scores; a task that is recorded for a model is not run."""
        settings, before = self.config.evaluate, self.folder.evaluation()
        require_tasks(settings)
        scores = dict(before.models)
        for name in before.models:
            runner = TaskRunner(settings, self.folder.tasks / name, self._identity_of(name))
            if runner.missing():
                interrupt.check()
                lm = make_lm(
                    self.model, self._params_of(name), name=name, batch_size=settings.batch_size, mesh=self.mesh
                )
                began, timed = time.perf_counter(), self.folder.timing("tasks", name).seconds
                for spec in runner.missing():
                    runner.run(spec, lm)
                    seconds = timed + time.perf_counter() - began
                    self.folder.record_time("tasks", name, seconds, 0)
                del lm
            scores[name] = dataclasses.replace(scores[name], tasks=runner.scores())
            self._replace_scores(before, scores)
            before = self.folder.evaluation()

    def _identity_of(self, name: str) -> str:
        """Identifies a model and the settings that it is used with, as `model_identity` does the base model."""
        settings = self.config.model
        if name == "base":
            return self.model_identity
        return model_identity(str(self.folder.method(name).export), settings.dtype, settings.thinking)

    def _replace_scores(self, before: Evaluation, scores: Mapping[str, ModelScores]) -> None:
        """Writes scores that were completed, and the cards of their models, where they have changed."""
        changed = [name for name in scores if scores[name] != before.models[name]]
        if changed:
            self.folder.write_evaluation(Evaluation(dict(scores), before.settings))
        for name in changed:
            self._write_cards(scores, evaluated=name)
        self.folder.wait_for_writer("scores")

    def _evaluate(self, names: Sequence[str], scores: dict[str, ModelScores], *, begun: bool) -> None:
        """Evaluates models, and writes the scores after each one."""
        for line in require_judges(self.config):
            print(visible(line), flush=True)
        for name in names:
            interrupt.check()
            began = time.perf_counter()
            scores[name] = self.evaluator.evaluate(name, self._params_of(name))
            self._write_evaluation(scores, begun=begun)
            self._write_cards(scores, evaluated=name)
            self.folder.wait_for_writer(f"evaluate {name}")
            self.folder.record_time("evaluate", name, time.perf_counter() - began, scores[name].tokens)

    def _write_evaluation(self, scores: Mapping[str, ModelScores], *, begun: bool) -> None:
        settings = {name: settings_for(f"evaluate {name}", self.settings) for name in scores}
        self.folder.write_evaluation(Evaluation(dict(scores), settings), begun=begun)

    def report(self) -> None:
        """Writes the reports of all results in the folder, even if some are still missing."""
        from raft_jax.report import write_reports

        if is_writer():
            write_reports(self.folder.path)

    def all(self) -> None:
        check_evaluation(self.data)
        list(require_judges(self.config))
        _ = self.encoder  # loaded now, so that an unreadable encoder is reported before training, not after it
        self.train(keep=True)
        self.evaluate()

    def _is_current(self, stage: str, made_with: Mapping[str, Settings] | None = None) -> bool:
        """Whether the result of a stage exists and was made with the current settings."""
        name = stage.partition(" ")[2]
        if made_with is None and not self.folder.method(name).is_exported:
            return False
        before = self.results.get(stage) if made_with is None else made_with.get(name, self.results.get(stage))
        return not before or not changes(before, settings_for(stage, self.settings))

    def _record_settings(self, stage: str) -> None:
        """Records the settings that the result of a stage is made with."""
        self.results[stage] = settings_for(stage, self.settings)
        self.folder.write_results(self.results)

    def _export(self, method: Method, params) -> None:
        began, folder = time.perf_counter(), self.folder.method(method.name)
        export_hf(self.model, params, folder.export, dtype=jnp.dtype(self.config.export.dtype), card=self._card(method))
        self._record_settings(f"export {method.name}")
        if is_writer() and not self.config.train.keep_finished:
            remove_steps(folder.checkpoints)
            remove_steps(folder.best)
        self.folder.wait_for_writer(f"export {method.name}")
        self.folder.record_time("export", method.name, time.perf_counter() - began, 0)

    def remove_weights(self) -> None:
        """Removes the weights of evaluated models, which leaves scores, metrics and cards."""
        scores = self.folder.evaluation().models
        for method in self.methods:
            folder = self.folder.method(method.name)
            if method.name in scores and folder.is_exported and is_writer():
                remove_weights(folder.export)
        self.folder.wait_for_writer("weights removed")

    def _write_cards(self, scores: Mapping[str, ModelScores], evaluated: str | None = None) -> None:
        """Writes scores to the card of the model just evaluated, and to other cards that lack their model's scores."""
        from raft_jax.report.card import has_scores

        for method in self.methods:
            folder = self.folder.method(method.name)
            if method.name not in scores or not folder.is_exported:
                continue
            card = folder.model_card
            if method.name == evaluated or not card.exists() or not has_scores(card.read_text("utf-8")):
                write_atomically(card, self._card(method, scores))

    def _card(self, method: Method, scores: Mapping[str, ModelScores] | None = None) -> str:
        from raft_jax.report.card import model_card

        return model_card(self.config, method, len(self.data.train), scores)

    def _params_of(self, name: str, dtype=None):
        """The weights of the base model or of a method's export; the latter by default in the base model's dtype."""
        if name == "base":
            return self.model.params
        if dtype is None and name in self._just_trained:
            return self._just_trained.pop(name)
        self._just_trained.clear()  # there is room for two models
        folder = self.folder.method(name)
        try:
            require_sums(folder.export)
            dtype = dtype or jnp.dtype(self.config.model.dtype)
            return load_pretrained(str(folder.export), dtype, self.mesh).params
        except InputError as error:
            how = "exports" if has_steps(folder.checkpoints) else "trains and exports"
            raise InputError(f"{error} (remove {folder.export}, and the same command {how} it again)") from error
