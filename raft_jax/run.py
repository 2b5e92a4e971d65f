"""A run: refine, train, export, evaluate and report in one folder, each stage going on where it was stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from raft_jax import interrupt
from raft_jax.checkpoint import remove_steps
from raft_jax.config import Config
from raft_jax.data.prompts import fusion_prompt, question_prompt, rewrite_prompt, teacher_prompt
from raft_jax.data.refined import RefinedRow, load_refined, publish, refined_with
from raft_jax.errors import InputError
from raft_jax.evaluate.compare import Evaluation
from raft_jax.files import read_json, require_sums
from raft_jax.host_memory import return_memory_after_compiling
from raft_jax.models import Model, Tokenizer, load_pretrained
from raft_jax.models.encoder import load_encoder
from raft_jax.models.export import export_hf
from raft_jax.preflight import Rows, require_source
from raft_jax.refine.judge import CoverageJudge, LikelihoodJudge, SimilarityJudge
from raft_jax.refine.ledger import Ledger
from raft_jax.refine.run import Parts, refine, summary
from raft_jax.refine.write import Item, LocalWriter
from raft_jax.run_dir import (
    RESULTS,
    all_settings,
    is_writer,
    read_evaluation,
    record_time,
    recorded_time,
    settings_for,
    start_date,
    wait_for_writer,
    write_atomically,
    write_results,
)
from raft_jax.sampling import Sampler, Scorer
from raft_jax.sharding import make_mesh
from raft_jax.sources import fingerprint_model, resolve
from raft_jax.stages import Settings, changes
from raft_jax.terminal import visible
from raft_jax.train.loop import read_metrics, tokens_trained, train
from raft_jax.train.methods import METHODS, Method


def renders(tokenizer: Tokenizer, item: Item, text: str) -> bool:
    """Whether a text can be an answer, and the teacher's reference, in the model's chat template."""
    asked = question_prompt(item.question, item.context, item.turns)
    try:
        tokenizer.chat_answer([*asked, {"role": "assistant", "content": text}])
        tokenizer.chat_prompt(teacher_prompt(item.question, text, item.context, item.turns))
    except InputError:
        return False
    return True


def _tokens_written(ledger: Ledger) -> int:
    return sum(record.get("num_tokens", 0) for record in ledger.records())


def _write_evaluation(path: Path, scores: Mapping[str, Any], settings: Settings) -> None:
    made_with = {name: settings_for(f"evaluate {name}", settings) for name in scores}
    write_atomically(path, json.dumps({"models": scores, "settings": made_with}, indent=1, ensure_ascii=False))


class Run:
    """The stages of one run. Each leaves its result in the folder and is passed over when that is there."""

    def __init__(self, config: Config, run_dir: Path):
        self.config, self.run_dir = config, run_dir
        self.settings = all_settings(config)
        self.results = read_json(run_dir / RESULTS) if (run_dir / RESULTS).exists() else {}
        self.mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)

    @cached_property
    def model(self) -> Model:
        given = self.config.model
        model = load_pretrained(
            given.source, jnp.dtype(given.dtype), self.mesh, remat=given.remat, attention=given.attention
        )
        model.tokenizer.date, model.tokenizer.thinking = start_date(self.run_dir), given.thinking
        return model

    @cached_property
    def model_identity(self) -> str:
        """Names the model, its tokenizer and how it is run, for what depends on them."""
        given = self.config.model
        return f"{fingerprint_model(resolve(given.source))} {given.dtype} thinking {given.thinking}"

    @cached_property
    def encoder(self):
        given = self.config.encoder
        require_source("encoder.source", given.source)
        return load_encoder(given.source, prefix=given.prefix, batch_size=given.batch_size)

    @cached_property
    def rows(self) -> Rows:
        """The examples that fit; what does not is told once."""
        rows = Rows(self.config, self.model.tokenizer, self.model.config.max_positions)
        if rows.incomplete:
            print(visible("\n".join(rows.describe())), flush=True)
        return rows

    @property
    def methods(self) -> list[Method]:
        return [METHODS[name] for name in self.config.methods]

    def refine(self) -> list[RefinedRow]:
        """Stage 1; rows that are published already are read."""
        folder = self.run_dir / "refined"
        examples, settings = self.rows.train, self.config.refine
        made_with = self._refined_with()
        if (folder / "refined.jsonl").exists():
            try:
                rows = load_refined(folder)
            except InputError as error:
                print(f"{error} (which happens now, from the ledger)")
            else:
                same = len(rows) == len(examples) and all(map(RefinedRow.is_of, rows, examples))
                if same and refined_with(folder) == made_with:
                    wait_for_writer("refined")  # it may have published them just now, and be waiting for this process
                    return rows
                what = "settings or models" if same else "texts"
                print(f"{folder}: made from other {what}; refining again, with what the ledger has of it")
        began = time.perf_counter()
        self.rows.check_refinement()
        sampler = Sampler(self.model, settings.batch_size, self.mesh)
        key = jax.random.key(self.config.seed)
        drawing = {name: getattr(settings, name) for name in ("temperature", "top_p")}
        drawing["max_new_tokens"] = self.config.refine_max_new_tokens

        def writer(prompt, stream: int) -> LocalWriter:
            return LocalWriter(sampler, self.model.params, prompt, key=jax.random.fold_in(key, stream),
                               model=self.model_identity, **drawing)

        judges = {
            "similarity": lambda: SimilarityJudge(self.encoder),
            "coverage": CoverageJudge,
            "likelihood": lambda: LikelihoodJudge(
                Scorer(self.model, mesh=self.mesh), self.model.params, self.model_identity
            ),
        }
        parts = Parts(
            writer(lambda item: rewrite_prompt(item.gold, *item.asked(settings.terse_words)), 0), self.encoder,
            writer(lambda item: fusion_prompt(item.gold, item.rewrite, *item.asked(settings.terse_words)), 1),
            [judges[name]() for name in settings.judges], partial(renders, self.model.tokenizer),
        )
        ledger = Ledger.open(folder / "ledger.jsonl", writes=is_writer())
        seconds_before = recorded_time(self.run_dir, "refine")[0] if ledger.records() else 0

        def record() -> None:
            seconds = seconds_before + time.perf_counter() - began
            record_time(self.run_dir, "refine", None, seconds, _tokens_written(ledger))

        ledger.on_append = record  # a process that is killed leaves the time of what it did
        rows = refine(examples, parts, settings, ledger)
        if is_writer():
            publish(rows, folder, made_with)
        wait_for_writer("refined")
        if recorded_time(self.run_dir, "refine")[1] != _tokens_written(ledger):
            record()
        print(*summary(rows), sep="\n", flush=True)
        return rows

    def _refined_with(self) -> str:
        """Names all that refined rows depend on besides their texts."""
        settings = dataclasses.asdict(self.config.refine)
        del settings["batch_size"]
        prompts = [rewrite_prompt("", "?"), fusion_prompt("", "", "?")]
        parts = [settings, self.config.seed, prompts, self.model_identity, self.encoder.identity]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def train(self) -> None:
        """Stage 2 for every method, each followed by its export."""
        methods = [method for method in self.methods if not self._is_current(f"export {method.name}")]
        if not methods:
            return
        return_memory_after_compiling()
        refined = any(method.target != "gold" for method in self.methods)
        if refined:
            self.rows.check_refinement()
        self.rows.check_training(methods, self.mesh.shape["data"] * self.mesh.shape["fsdp"])
        rows = self.refine() if refined else self.rows.gold
        for method in methods:
            interrupt.check()
            tokens = self.rows.tokens(rows, method)
            folder = self.run_dir / method.name
            self._note_settings(f"train {method.name}")
            params = train(self.model, tokens, method, self.config.train, folder, seed=self.config.seed, mesh=self.mesh)
            metrics = read_metrics(folder / "metrics.jsonl")
            seconds = sum(line.get("seconds", 0) for line in metrics)
            record_time(self.run_dir, "train", method.name, seconds, tokens_trained(metrics))
            self._export(method, params)

    def export(self) -> None:
        """Exports what is trained; training that is not finished is finished first."""
        self.train()

    def evaluate(self) -> None:
        """Base model and every trained one, on the same questions; a model that has its scores is passed over.

        Scores that were made with other settings stay until all the new ones are there.
        """
        path = self.run_dir / "evaluation.json"
        names = ["base", *(method.name for method in self.methods if self._exported(method.name))]
        found = read_evaluation(path)
        stale = [name for name in found["models"] if not self._is_current(f"evaluate {name}", found["settings"])]
        target = path.with_name("evaluation.new.json") if stale else path
        scores = {name: entry for name, entry in found["models"].items() if name not in stale}
        if stale and target.exists():
            begun = read_evaluation(target)
            scores |= {name: entry for name, entry in begun["models"].items()
                       if name in begun["settings"] and self._is_current(f"evaluate {name}", begun["settings"])}
        if dropped := sorted(set(stale) - set(names)):
            print(f"evaluation.json: without {', '.join(dropped)} from here on, evaluated with other settings and not "
                  "among methods", flush=True)
        self._write_cards(scores)  # one that was killed may have left them behind its scores
        missing = [name for name in names if name not in scores]
        if missing:
            self._evaluate(missing, scores, target)
        if stale and is_writer():
            if not missing:
                _write_evaluation(target, scores, self.settings)
            os.replace(target, path)
        wait_for_writer("evaluation")

    def _evaluate(self, names: Sequence[str], scores: dict[str, Any], path: Path) -> None:
        """Evaluates models, and writes their scores to a file as soon as each is done."""
        settings, general = self.config.evaluate, self.rows.check_evaluation()
        evaluation = Evaluation(self.model, self.encoder, self.rows.test, general, settings, self.mesh)
        for name in names:
            interrupt.check()
            began = time.perf_counter()
            scores[name] = evaluation.evaluate(name, self._params_of(name))
            _write_evaluation(path, scores, self.settings)
            self._write_cards(scores, evaluated=name)
            wait_for_writer(f"evaluate {name}")
            record_time(self.run_dir, "evaluate", name, time.perf_counter() - began, scores[name]["tokens"])

    def report(self) -> None:
        """Draws what the folder holds, whatever is still missing."""
        from raft_jax.report import write_report

        if is_writer():
            write_report(self.run_dir)

    def all(self) -> None:
        self.rows.check_evaluation()
        _ = self.encoder  # read now: one that cannot be is told before the training, not after it
        self.train()
        self.evaluate()

    def _is_current(self, stage: str, made_with: Mapping[str, Settings] | None = None) -> bool:
        """Whether the result of a stage is there, and was made with the settings that it would be made with now."""
        name = stage.partition(" ")[2]
        if made_with is None and not self._exported(name):
            return False
        before = self.results.get(stage) if made_with is None else made_with.get(name, self.results.get(stage))
        return not before or not changes(before, settings_for(stage, self.settings))

    def _note_settings(self, stage: str) -> None:
        """Notes with which settings the result of a stage is made."""
        self.results[stage] = settings_for(stage, self.settings)
        write_results(self.run_dir, self.results)

    def _export(self, method: Method, params) -> None:
        began = time.perf_counter()
        folder = self.run_dir / method.name / "hf"
        export_hf(self.model, params, folder, dtype=jnp.dtype(self.config.export.dtype), card=self._card(method))
        self._note_settings(f"export {method.name}")
        if is_writer() and not self.config.train.keep_finished:
            remove_steps(folder.with_name("checkpoints"))
        wait_for_writer(f"export {method.name}")
        record_time(self.run_dir, "export", method.name, time.perf_counter() - began, 0)

    def _write_cards(self, models: Mapping[str, Any], evaluated: str | None = None) -> None:
        """Scores into the model card of what was just evaluated, and of what has marks and a card without them."""
        from raft_jax.report.card import has_scores

        for method in self.methods:
            if method.name not in models or not self._exported(method.name):
                continue
            path = self.run_dir / method.name / "hf" / "README.md"
            if method.name == evaluated or not path.exists() or not has_scores(path.read_text("utf-8")):
                write_atomically(path, self._card(method, models))

    def _card(self, method: Method, models: Mapping[str, Any] | None = None) -> str:
        from raft_jax.report.card import model_card

        return model_card(self.config, method.name, method.title, len(self.rows.train), models)

    def _exported(self, name: str) -> bool:
        return (self.run_dir / name / "hf").is_dir()

    def _params_of(self, name: str):
        if name == "base":
            return self.model.params
        folder = self.run_dir / name / "hf"
        try:
            require_sums(folder)
            return load_pretrained(str(folder), jnp.dtype(self.config.model.dtype), self.mesh).params
        except InputError as error:
            how = "exports" if (folder.with_name("checkpoints")).exists() else "trains and exports"
            raise InputError(f"{error} (remove {folder}, and the same command {how} it again)") from error
