"""Runs a comparison: every method in every cell of a grid, with what the cells share computed once."""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from statistics import median

from raft_jax import interrupt
from raft_jax.estimate import BYTES, num_steps
from raft_jax.files import is_there
from raft_jax.grid import Cell, Grid, add_to_record
from raft_jax.methods import Method, any_refines
from raft_jax.metrics import read_metrics
from raft_jax.preflight import check_training
from raft_jax.resume import all_settings, open_run_folder, settings_for
from raft_jax.run import Run
from raft_jax.run_folder import Evaluation, RunFolder, write_atomically
from raft_jax.sharding import is_writer
from raft_jax.stages import changes
from raft_jax.train.step_metrics import TrainingDiverged
from raft_jax.train.step_time import step_seconds


def compare(grid: Grid) -> None:
    """Trains and evaluates what the grid asks for and its folder does not hold yet, then writes the reports.

    Refined rows and the base model's scores are made once, in the run folder itself, where `raft-jax refine` would put
    them; each cell is a run folder below it, which every other command can be used on. A method that diverges in a cell
    is recorded there, and the others go on.

    Raises:
      InputError: as the stages of a run do.
      KeyboardInterrupt: on a signal; the next call goes on where this one stopped.
    """
    with open_run_folder(grid.config) as folder:
        add_to_record(grid)
        shared = Run(grid.config, folder)
        if any_refines(grid.config.methods):
            shared.refine(retry=False)
        shared.evaluate()
        began, done = time.monotonic(), 0
        for number, cell in enumerate(grid.cells, start=1):
            interrupt.check()
            print(f"\ncompare: {number}/{len(grid.cells)}: {cell.name}{_left(began, done, number, grid)}", flush=True)
            done += _run_cell(cell, shared)
        shared.report()


def _left(began: float, done: int, number: int, grid: Grid) -> str:
    """How long the cells from this one on will take, if cells of this call tell."""
    if not done:
        return ""
    return f", about {duration((time.monotonic() - began) / done * (len(grid.cells) - number + 1))} left"


def duration(seconds: float) -> str:
    """Seconds in words, to two digits.

    Example:
      >>> duration(50), duration(600), duration(9000)
      ('50 s', '10 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _run_cell(cell: Cell, shared: Run) -> bool:
    """Runs the stages of one cell; returns whether anything had to be trained."""
    _start_with(cell, shared.folder)
    with open_run_folder(cell.config) as folder:
        _give(shared, folder, cell)
        run = Run(cell.config, folder, like=shared)
        trained = any(_missing(cell))
        for method in run.methods:
            try:
                if not is_there(folder.method(method.name).diverged):
                    run.train([method])
            except TrainingDiverged as error:
                _record_divergence(folder, method.name, error)
        run.evaluate()
        if not cell.config.compare.keep_models:
            run.remove_weights()
        run.report()
    return trained


def _record_divergence(folder: RunFolder, name: str, error: TrainingDiverged) -> None:
    print(f"{error} (the comparison goes on without it)", flush=True)
    write_atomically(folder.method(name).diverged, f"{error}\n")
    folder.wait_for_writer(f"diverged {name}")


def _start_with(cell: Cell, shared: RunFolder) -> None:
    """Gives a cell's folder the date of the shared run, on which prompts may depend."""
    folder = RunFolder(cell.config.run_dir)
    if is_writer() and not is_there(folder.date_file):
        folder.path.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(shared.date_file, folder.date_file)
    folder.wait_for_writer("date of a cell")


def _give(shared: Run, folder: RunFolder, cell: Cell) -> None:
    """Copies refined rows and the base model's scores into a cell's folder, if they would come out the same there."""
    settings = all_settings(cell.config)

    def same(stage: str) -> bool:
        return not changes(settings_for(stage, shared.settings), settings_for(stage, settings))

    if is_writer():
        if is_there(shared.folder.duplicates_json) and not is_there(folder.duplicates_json):
            shutil.copyfile(shared.folder.duplicates_json, folder.duplicates_json)
        if is_there(shared.folder.refined_jsonl) and not folder.refined.exists() and same("refine"):
            partial = folder.path / "refined.partial"
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(shared.folder.refined, partial)
            partial.rename(folder.refined)
        evaluation = shared.folder.evaluation()
        if "base" in evaluation.models and not is_there(folder.evaluation_json) and same("evaluate base"):
            base = {"base": evaluation.models["base"]}
            folder.write_evaluation(Evaluation(base, {"base": evaluation.settings["base"]}))
        if shared.folder.tasks.is_dir() and not folder.tasks.exists():
            shutil.copytree(shared.folder.tasks / "base", folder.tasks / "base")
        if is_there(shared.folder.verdicts_jsonl) and not is_there(folder.verdicts_jsonl):
            folder.verdicts_jsonl.parent.mkdir(exist_ok=True)
            shutil.copyfile(shared.folder.verdicts_jsonl, folder.verdicts_jsonl)
    folder.wait_for_writer("shared by the cells")


def dry_run(grid: Grid) -> Iterator[str]:
    """What a comparison would take, line by line, with steps measured on this machine; the run folder is only read.

    A method that a cell has trained is timed by its metrics. Any other trains for a few steps, on gold answers, of
    which nothing is kept.
    """
    folder, config = RunFolder(grid.config.run_dir), grid.config
    with tempfile.TemporaryDirectory() as place:
        run = Run(dataclasses.replace(config, run_dir=place), RunFolder(place))
        num_rows, methods = len(run.data.train), run.methods
        left = [(cell, name) for cell in grid.cells for name in _missing(cell)]
        total = len(grid.cells) * len(methods)
        yield (
            f"{len(methods)} methods, {len(grid.cells)} runs of {grid.over} and train.seed: {total} models, "
            f"{total - len(left)} of them trained"
        )
        seconds = 0.0
        for method in methods:
            if method.pruned_from is not None:
                continue
            known = [line["seconds"] for cell in grid.cells for line in _metrics(cell, method.name)]
            check_training(run.data, [method])
            each = median(known) if known else _measured(run, method)
            steps = [num_steps(cell.config, num_rows) for cell, name in left if name == method.name]
            seconds += sum(steps) * each
            took = duration(sum(steps) * each)
            yield f"{method.name}: {sum(steps)} steps in {len(steps)} runs, {each:.2f} s each, {took}"
        model_bytes = sum(math.prod(value.shape) for value in run.model.params.values()) * BYTES[config.export.dtype]
    if evaluation := folder.timing("evaluate", "base").seconds:
        seconds += evaluation * len(left)
        yield f"evaluation: {evaluation:.0f} s a model, as of the base model, {duration(evaluation * len(left))}"
    else:
        yield "evaluation: measured on the base model first, which has no scores yet; not in the sum"
    if any_refines(config.methods) and not is_there(folder.refined_jsonl):
        yield "refinement: not done yet and not in the sum; `raft-jax refine CONFIG --preview 8` tells what it takes"
    kept = len(left) if config.compare.keep_models else len(methods)
    hint = "; compare.keep_models=false keeps those of one run at a time" if config.compare.keep_models else ""
    yield f"in all {duration(seconds)} and {kept * model_bytes / 1e9:.1f} GB of models{hint}"


def _missing(cell: Cell) -> Iterator[str]:
    """The methods of a cell that are neither exported nor known to diverge."""
    folder = RunFolder(cell.config.run_dir)
    for name in cell.config.methods:
        files = folder.method(name)
        if not files.is_exported and not is_there(files.diverged):
            yield name


def _metrics(cell: Cell, method: str) -> list[dict[str, float]]:
    path = RunFolder(cell.config.run_dir).method(method).metrics_jsonl
    return [line for line in read_metrics(path) if "seconds" in line][1:] if is_there(path) else []


def _measured(run: Run, method: Method) -> float:
    """Seconds of a step of a method."""
    settings = dataclasses.replace(run.config.train, student_init=None)
    return step_seconds(run.model, run.data.tokens(run.data.gold, method), method, settings, run.mesh)
