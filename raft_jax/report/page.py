"""Writes `report.html`: one self-contained page on what a run did, learned and forgot."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raft_jax.config import RefineConfig
from raft_jax.data.refined import STATUSES
from raft_jax.outcome import QUALITY_COLUMNS, judge_counts, perplexity, quality_cells, quality_counts, work_cells
from raft_jax.report import charts, figures
from raft_jax.report.flags import flags_of
from raft_jax.report.folder import RunRecords, label, read_run, style_of
from raft_jax.report.more_scores import forgetting, more_scores
from raft_jax.report.refinement import count_sentence, counts, worst_first
from raft_jax.report.summary import MISSING, estimate, number, summary_tables
from raft_jax.report.verdict import verdicts
from raft_jax.scores import DomainAnswer, GeneralAnswer
from raft_jax.settings_text import flat

_FOLDER = Path(__file__).parent
_MOST_ROWS = 300  # refined rows on the page, worst first
_MOST_ANSWERS = 100
# The most important settings, shown first.
_FACTS = {
    "model": "model.source",
    "data": "data.path",
    "methods": "methods",
    "epochs": "train.epochs",
    "steps at most": "train.max_steps",
    "batch size": "train.batch_size",
    "learning rate": "train.learning_rate",
    "rollout length": "train.rollout.max_new_tokens",
    "threshold τ": "refine.threshold",
    "fusion rounds": "refine.rounds",
    "temperature T": "train.temperature",
    "top K": "train.top_k",
    "EMA decay β": "train.ema_decay",
    "fixed λ": "train.fixed_weight",
    "seed": "seed",
}


def write_report(run_dir: Path) -> Path:
    """Writes the report of a run from the contents of its folder; parts that have not been run are shown as such.

    Args:
      run_dir: a run folder.

    Returns:
      The path of `report.html` in it.

    Raises:
      InputError: there is no run in the folder, or one of its files is damaged.
    """
    run = read_run(run_dir)
    return write_page(run.folder.report_html, render(run))


def write_page(path: Path, page: str) -> Path:
    """Replaces a page."""
    temporary = path.with_suffix(".html.partial")
    # Model output may have lone surrogates, which UTF-8 cannot encode.
    temporary.write_bytes(page.encode("utf-8", errors="replace"))
    os.replace(temporary, path)
    return path


def render(run: RunRecords) -> str:
    """The page of a run as HTML."""
    return render_page(
        "page.html.jinja",
        kicker="RAFT run",
        name=run.folder.path.resolve().name,
        run=run,
        verdicts=verdicts(run),
        tables={table.name: table for table in summary_tables(run)},
        more=more_scores(run),
        forgetting=forgetting(run),
        tradeoff=figures.tradeoff(run),
        curves=figures.curves(run),
        distance=figures.distance(run),
        similarity=figures.similarity(run),
        refinement=_refinement(run),
        answers=answers_side_by_side({name: model.answers for name, model in run.models.items()}, "similarity"),
        general=answers_side_by_side({name: model.general_answers for name, model in run.models.items()}, "divergence"),
        categories=_categories(run),
        progress=_progress(run),
        machines=_machines(run),
        facts=facts(run.config),
        settings=flat(run.config),
    )


def render_page(template: str, **values: Any) -> str:
    """A page that extends base.html.jinja, with its values."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(_FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        label=label, variable=charts.variable, number=number, estimate=estimate, perplexity=perplexity
    )
    # The page's content security policy allows only a script with this hash.
    script = (_FOLDER / "page.js").read_text(encoding="utf-8").strip()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = environment.get_template(template).render(
        styles=[(name, style_of(name)) for name in charts.MODELS],
        script=script,
        script_hash=f"sha256-{digest}",
        statuses=STATUSES,
        **values,
    )
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\ufffd", page.lstrip())


def facts(config: dict[str, Any]) -> list[tuple[str, str]]:
    """The most important settings that the config has, as (name, value)."""
    settings = flat(config)
    pairs = [(fact, settings[key]) for fact, key in _FACTS.items() if settings.get(key) is not None]
    return [(fact, ", ".join(value) if isinstance(value, list) else str(value)) for fact, value in pairs]


def _progress(run: RunRecords) -> list[tuple[str, str]]:
    if run.refined:
        refine = f"{len(run.refined):,} rows"
    else:
        refine = "begun, not finished" if run.refinement_begun else ""
    rows = [("refine", refine)]
    for method in run.methods:
        steps = run.metrics.get(method, ())
        rows.append((f"train {label(method)}", f"{int(steps[-1]['step']):,} steps" if steps else ""))
        rows.append((f"export {label(method)}", "done" if method in run.exported else ""))
    if not run.methods:
        rows.append(("train", ""))
    return [*rows, ("evaluate", f"{len(run.models)} models" if run.models else "")]


def _refinement(run: RunRecords) -> dict[str, Any]:
    rows = worst_first(run.refined)
    accept = flat(run.config).get("refine.accept", RefineConfig.accept)
    return {
        "sentence": count_sentence(run.refined),
        "counts": counts(run.refined, accept),
        "accept": accept,
        "judges": judge_counts(run.refined, accept),
        "quality_columns": QUALITY_COLUMNS,
        "quality": [quality_cells(count) for count in quality_counts(run.refined)],
        "works": [work_cells(work) for work in run.works],
        "rows": rows[:_MOST_ROWS],
        "count": len(rows),
    }


def answers_side_by_side(
    answers: Mapping[str, Sequence[DomainAnswer]] | Mapping[str, Sequence[GeneralAnswer]], score: str
) -> dict[str, Any]:
    """The models' answers to the same questions, with flags, in decreasing order of the largest loss of a method.

    The loss is the base model's similarity to the gold answer minus the method's, or the divergence from the
    base model.
    """
    questions: dict[str, dict[str, Any]] = {}
    for name, of_model in answers.items():
        for answer in of_model:
            entry = questions.setdefault(
                answer.id, {"first": answer, "answers": [], "scores": {}, "order": len(questions)}
            )
            known = (answer.question, answer.gold) if isinstance(answer, DomainAnswer) else (answer.prompt,)
            flags = flags_of(answer.answer, *known) + ([STATUSES["truncated"]] if answer.cut else [])
            entry["answers"].append((name, answer, flags))
            entry["scores"][name] = getattr(answer, score)
    for entry in questions.values():
        entry["lost"] = _lost(entry["scores"], higher_is_better=score == "similarity")
        entry["flags"] = sorted({flag for name, _, flags in entry["answers"] if name != "base" for flag in flags})
    shown = sorted(questions.values(), key=lambda entry: (-entry["lost"], entry["order"]))
    return {"count": len(questions), "shown": shown[:_MOST_ANSWERS]}


def _lost(scores: Mapping[str, float | None], higher_is_better: bool) -> float:
    """The largest loss of any method relative to the base model; 0 if scores are missing."""
    base = scores.get("base")
    others = [value for name, value in scores.items() if name != "base" and value is not None]
    if base is None or not others:
        return 0.0
    return base - min(others) if higher_is_better else max(others) - base


def _machines(run: RunRecords) -> list[tuple[str, list[tuple[str, str]]]]:
    """The machine that each stage ran on, and the peak memory; stages on the same machine are grouped."""
    stages: dict[str, list[str]] = {}
    machines: dict[str, list[Mapping[str, Any]]] = {}
    for timing in run.timings:
        if timing.machine:
            hardware = _hardware(timing.machine)
            name = f"{timing.stage} {label(timing.method)}" if timing.method else timing.stage
            stages.setdefault(hardware, []).append(name)
            machines.setdefault(hardware, []).append(timing.machine)
    return [(", ".join(names), _machine_facts(hardware, machines[hardware])) for hardware, names in stages.items()]


def _hardware(machine: Mapping[str, Any]) -> str:
    devices = ", ".join(map(str, machine.get("devices") or ()))
    processes = machine.get("processes")
    several = f", {processes} processes" if isinstance(processes, int) and processes > 1 else ""
    host = f"{machine.get('cores', MISSING)} cores, {machine.get('processor', MISSING)}{several}"
    return f"{devices or MISSING} (host: {host})"


def _machine_facts(hardware: str, machines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    facts = [("hardware", hardware)]
    for key, name in (
        ("peak_host_memory", "peak memory of the process"),
        ("peak_device_memory", "peak memory of a device"),
    ):
        peaks = [value for machine in machines if isinstance(value := machine.get(key), int)]
        if peaks:
            facts.append((name, f"{max(peaks) / 1e9:.2f} GB"))
    versions = {f"{name} {number}" for machine in machines for name, number in (machine.get("versions") or {}).items()}
    pythons = {f"Python {machine['python']}" for machine in machines if machine.get("python")}
    return [*facts, ("versions", ", ".join(sorted(versions | pythons, key=str.lower)))]


def _categories(run: RunRecords) -> list[tuple[str, list[str]]]:
    """Correct answers out of those that can be checked, by category and model."""
    checked: dict[str, dict[str, list[bool]]] = {}
    for name, model in run.models.items():
        for answer in model.general_answers:
            if answer.correct is not None:
                checked.setdefault(answer.category, {}).setdefault(name, []).append(answer.correct)
    return [
        (
            category,
            [f"{sum(right)} / {len(right)}" if (right := by_model.get(name)) else MISSING for name in run.models],
        )
        for category, by_model in sorted(checked.items())
    ]
