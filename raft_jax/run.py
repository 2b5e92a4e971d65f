"""A run: refine, train, export, evaluate and report in one folder, each stage going on where it was stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from raft_jax.config import Config
from raft_jax.data.prompts import fusion_prompt, rewrite_prompt
from raft_jax.data.refined import RefinedRow, load_refined, publish
from raft_jax.errors import InputError
from raft_jax.evaluate.compare import Evaluation
from raft_jax.host_memory import return_memory_after_compiling
from raft_jax.models import Model, load_pretrained
from raft_jax.models.encoder import load_encoder
from raft_jax.models.export import export_hf
from raft_jax.preflight import Rows, require_source
from raft_jax.refine.judge import CoverageJudge, LikelihoodJudge, SimilarityJudge
from raft_jax.refine.ledger import Ledger
from raft_jax.refine.run import Parts, refine
from raft_jax.refine.write import LocalWriter
from raft_jax.run_dir import (
    is_writer,
    record_time,
    recorded_time,
    start_date,
    wait_for_writer,
    write_atomically,
)
from raft_jax.sampling import Sampler, Scorer
from raft_jax.sharding import make_mesh
from raft_jax.train.loop import read_metrics, tokens_trained, train
from raft_jax.train.methods import METHODS, Method


def _tokens_written(ledger: Ledger) -> int:
    return sum(record.get("num_tokens", 0) for record in ledger.records())


class Run:
    """The stages of one run. Each leaves its result in the folder and is passed over when that is there."""

    def __init__(self, config: Config, run_dir: Path):
        self.config, self.run_dir = config, run_dir
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
    def encoder(self):
        given = self.config.encoder
        require_source("encoder.source", given.source)
        return load_encoder(given.source, prefix=given.prefix, batch_size=given.batch_size)

    @cached_property
    def rows(self) -> Rows:
        """The examples that fit; what does not is told once."""
        rows = Rows(self.config, self.model.tokenizer, self.model.config.max_positions)
        if rows.incomplete:
            print(*rows.describe(), sep="\n", flush=True)
        return rows

    @property
    def methods(self) -> list[Method]:
        return [METHODS[name] for name in self.config.methods]

    def refine(self) -> list[RefinedRow]:
        """Stage 1; rows that are published already are read."""
        folder = self.run_dir / "refined"
        examples = self.rows.train
        if (folder / "refined.jsonl").exists():
            try:
                rows = load_refined(folder)
            except InputError as error:
                print(f"{error} (which happens now, from the ledger)")
            else:
                if [row.id for row in rows] == [example.id for example in examples]:
                    wait_for_writer("refined")  # it may have published them just now, and be waiting for this process
                    return rows
        began = time.perf_counter()
        settings = self.config.refine
        self.rows.check_refinement()
        sampler = Sampler(self.model, settings.batch_size, self.mesh)
        key = jax.random.key(self.config.seed)
        drawing = {name: getattr(settings, name) for name in ("temperature", "top_p")}
        drawing["max_new_tokens"] = self.config.refine_max_new_tokens

        def writer(prompt, stream: int) -> LocalWriter:
            return LocalWriter(sampler, self.model.params, prompt, key=jax.random.fold_in(key, stream), **drawing)

        judges = {
            "similarity": lambda: SimilarityJudge(self.encoder),
            "coverage": CoverageJudge,
            "likelihood": lambda: LikelihoodJudge(Scorer(self.model, mesh=self.mesh), self.model.params),
        }
        parts = Parts(
            writer(lambda item: rewrite_prompt(item.question, item.gold, item.context), 0), self.encoder,
            writer(lambda item: fusion_prompt(item.question, item.gold, item.rewrite, item.context), 1),
            [judges[name]() for name in settings.judges],
        )
        ledger = Ledger.open(folder / "ledger.jsonl", writes=is_writer())
        seconds_before = recorded_time(self.run_dir, "refine")[0] if ledger.records() else 0

        def record() -> None:
            seconds = seconds_before + time.perf_counter() - began
            record_time(self.run_dir, "refine", None, seconds, _tokens_written(ledger))

        ledger.on_append = record  # a process that is killed leaves the time of what it did
        rows = refine(examples, parts, settings, ledger)
        if is_writer():
            publish(rows, folder)
        wait_for_writer("refined")
        if recorded_time(self.run_dir, "refine")[1] != _tokens_written(ledger):
            record()
        accepted = sum(row.accepted for row in rows)
        fused = sum(row.chosen == "fusion" for row in rows)
        print(f"refined {len(rows)} rows: {accepted} passed the filter, {fused} have a fused answer, "
              f"{len(rows) - fused} keep the gold one", flush=True)
        return rows

    def train(self) -> None:
        """Stage 2 for every method, each followed by its export."""
        methods = [method for method in self.methods if not self._exported(method.name)]
        if not methods:
            return
        return_memory_after_compiling()
        refined = any(method.target != "gold" for method in self.methods)
        if refined:
            self.rows.check_refinement()
        self.rows.check_training(methods, self.mesh.shape["data"] * self.mesh.shape["fsdp"])
        rows = self.refine() if refined else self.rows.gold
        for method in methods:
            tokens = self.rows.tokens(rows, method)
            folder = self.run_dir / method.name
            params = train(self.model, tokens, method, self.config.train, folder, seed=self.config.seed, mesh=self.mesh)
            metrics = read_metrics(folder / "metrics.jsonl")
            seconds = sum(line["seconds"] for line in metrics)
            record_time(self.run_dir, "train", method.name, seconds, tokens_trained(metrics))
            self._export(method, params)

    def export(self) -> None:
        """Exports what is trained; training that is not finished is finished first."""
        self.train()

    def evaluate(self) -> None:
        """Base model and every trained one, on the same questions; a model that has its marks is passed over."""
        path = self.run_dir / "evaluation.json"
        found = self._evaluated(path)
        names = ["base", *(method.name for method in self.methods if self._exported(method.name))]
        missing = [name for name in names if name not in found["models"]]
        self._write_cards(found["models"])  # one that was killed may have left them behind its marks
        if not missing:
            return
        settings, general = self.config.evaluate, self.rows.check_evaluation()
        evaluation = Evaluation(self.model, self.encoder, self.rows.test, general, settings, self.mesh)
        for name in missing:
            began = time.perf_counter()
            marks = evaluation.evaluate(name, self._params_of(name))
            found["models"][name] = marks
            write_atomically(path, json.dumps(found, indent=1, ensure_ascii=False))
            self._write_cards(found["models"], evaluated=name)
            wait_for_writer(f"evaluate {name}")
            record_time(self.run_dir, "evaluate", name, time.perf_counter() - began, marks["tokens"])

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

    @staticmethod
    def _evaluated(path: Path) -> dict[str, Any]:
        """The marks that are there."""
        try:
            found = json.loads(path.read_text("utf-8")) if path.exists() else {"models": {}}
            return {**found, "models": dict(found["models"])}
        except (ValueError, LookupError, TypeError) as error:
            raise InputError(f"{path}: damaged ({error}); remove it, and every model is evaluated again") from error

    def _export(self, method: Method, params) -> None:
        began = time.perf_counter()
        folder = self.run_dir / method.name / "hf"
        export_hf(self.model, params, folder, dtype=jnp.dtype(self.config.export.dtype), card=self._card(method))
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
        return (self.run_dir / name / "hf" / "config.json").exists()

    def _params_of(self, name: str):
        if name == "base":
            return self.model.params
        folder = self.run_dir / name / "hf"
        try:
            return load_pretrained(str(folder), jnp.dtype(self.config.model.dtype), self.mesh).params
        except InputError as error:
            raise InputError(f"{error} (remove {folder}, and the same command does)") from error
