"""Tasks of lm-evaluation-harness: names, task files and one's own rows; each is run once for a model and recorded."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from raft_jax.config import EvaluateConfig
from raft_jax.data.files import fingerprint, lines_of, locate, parse_json
from raft_jax.errors import InputError
from raft_jax.evaluate.harness import require_eval
from raft_jax.files import parse_record, read_bytes, read_text
from raft_jax.run_folder import write_atomically
from raft_jax.scores import TaskScore
from raft_jax.terminal import one_line

TEMPLATES = Path(__file__).parent / "task_templates"
# Tasks whose rows may come from a file, as in ifeval:rows.jsonl, and the keys of a row.
LOCAL = {
    "ifeval": ("key", "prompt", "instruction_id_list", "kwargs"),
    "mmlu": ("question", "choices", "answer", "subject"),
}
FEWSHOT = 5  # of MMLU, from the rows of the split "dev"
NEEDS_PUNKT = ("length_constraints:number_sentences", "change_case:capital_word_frequency")


@dataclass(frozen=True)
class TaskSpec:
    """A task as the setting names it.

    Attributes:
      text: the setting's text, the task's name in results.
      name: of the harness's task; "" for a task file.
      path: of the rows or of the task file; "" for a task whose data the harness fetches.
    """

    text: str
    name: str
    path: str = ""


@dataclass(frozen=True)
class TaskRecord:
    """What a task said of a model, and what that depends on.

    Attributes:
      made_with: model, task, data and settings.
      scores: the task's metrics, or the group's.
      subtasks: those of each task of a group.
      samples: each question with its metrics, and the answer where it is a text.
    """

    made_with: dict[str, Any]
    scores: dict[str, TaskScore]
    subtasks: dict[str, dict[str, TaskScore]] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)


def parse_task(text: str) -> TaskSpec:
    """Reads one task of `evaluate.tasks`.

    Example:
      >>> parse_task("mmlu"), parse_task("ifeval:my/rows.jsonl").path, parse_task("my/task.yaml").path
      (TaskSpec(text='mmlu', name='mmlu', path=''), 'my/rows.jsonl', 'my/task.yaml')
    """
    name, colon, path = text.partition(":")
    if colon and name in LOCAL:
        return TaskSpec(text, name, path)
    return TaskSpec(text, "", text) if text.endswith((".yaml", ".yml")) else TaskSpec(text, text)


def require_tasks(settings: EvaluateConfig) -> None:
    """Checks tasks before anything is computed.

    Raises:
      InputError: the harness is not installed, a file is missing, or a row is none of the task's; names the setting.
    """
    if settings.tasks:
        require_eval()
    for spec in map(parse_task, settings.tasks):
        if not spec.path:
            continue
        try:
            place = locate(spec.path)
            rows = read_task_rows(spec.name, place) if spec.name else [{"text": read_text(place)}]
        except InputError as error:
            raise InputError(f"evaluate.tasks: {error}") from error
        if any(set(row.get("instruction_id_list", ())) & set(NEEDS_PUNKT) for row in rows):
            _require_punkt(spec)


def read_task_rows(name: str, path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file for a task of `LOCAL`.

    Raises:
      InputError: a line is not such a row, or there are none; names the line and the keys.
    """
    rows = []
    for number, line in enumerate(lines_of(str(path), path, "\n"), start=1):
        if line.strip():
            row = parse_json(str(path), line.rstrip("\n"), number)
            if not isinstance(row, dict) or (missing := [key for key in LOCAL[name] if key not in row]):
                lacks = f"no {missing[0]!r}" if isinstance(row, dict) else "not an object"
                raise InputError(f"{path}:{number}: {lacks}; a row of {name} has {', '.join(LOCAL[name])}")
            if name == "mmlu" and (len(row["choices"]) != 4 or row["answer"] not in ("A", "B", "C", "D")):
                raise InputError(f"{path}:{number}: a row of mmlu has four choices, and A, B, C or D as answer")
            rows.append(row)
    if not any(row.get("split", "test") == "test" for row in rows):
        raise InputError(f"{path}: no rows in it, or none of the split 'test'")
    return rows


def _require_punkt(spec: TaskSpec) -> None:
    import nltk  # pyright: ignore[reportMissingImports]

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError as error:
        raise InputError(
            f"evaluate.tasks: {spec.text} counts sentences with NLTK's punkt_tab, which is not there; run `python -m "
            "nltk.downloader punkt_tab`, or set NLTK_DATA to a folder with tokenizers/punkt_tab"
        ) from error


def made_with(spec: TaskSpec, model: str, settings: EvaluateConfig) -> dict[str, Any]:
    """What the scores of a task depend on.

    Args:
      spec: the task.
      model: identifies the model, its tokenizer and their settings.
      settings: the evaluation's.
    """
    return {
        "task": spec.name or Path(spec.path).name,
        "content": fingerprint(spec.path) if spec.path else None,
        "model": model,
        "limit": settings.limit,
        "num_fewshot": settings.num_fewshot,
        "task_new_tokens": settings.task_new_tokens,
        "chat_template": settings.chat_template,
        "lm_eval": metadata.version("lm_eval"),
    }


class TaskRunner:
    """Runs the tasks of one model, and keeps their records in a folder.

    Args:
      settings: the evaluation's.
      folder: of the model's records.
      model: identifies the model, its tokenizer and their settings.
    """

    def __init__(self, settings: EvaluateConfig, folder: Path, model: str):
        self.settings, self.folder = settings, folder
        self.expected = {spec: made_with(spec, model, settings) for spec in map(parse_task, settings.tasks)}

    def missing(self) -> list[TaskSpec]:
        """The tasks without a record that was made with the current model, task and settings."""
        return [spec for spec in self.expected if self._record(spec) is None]

    def run(self, spec: TaskSpec, lm: Any) -> None:
        """Runs one task, and records it when it is finished."""
        record = run_task(spec, lm, self.settings, self.folder / f"{file_name(spec)}.files", self.expected[spec])
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path(spec), record_text(record))

    def scores(self) -> dict[str, dict[str, TaskScore]]:
        """The recorded metrics of the tasks that have been run."""
        return {spec.text: record.scores for spec in self.expected if (record := self._record(spec)) is not None}

    def _path(self, spec: TaskSpec) -> Path:
        return self.folder / f"{file_name(spec)}.json"

    def _record(self, spec: TaskSpec) -> TaskRecord | None:
        return read_record(self._path(spec), self.expected[spec])


def read_record(path: Path, expected: dict[str, Any]) -> TaskRecord | None:
    """The record in a file, if there is one that was made with what is expected."""
    if not path.exists():
        return None
    try:
        record = parse_record(TaskRecord, read_bytes(path))
    except ValueError:
        return None  # it is made again
    return record if record.made_with == expected else None


def record_text(record: TaskRecord) -> str:
    """A record as JSON."""
    return json.dumps(asdict(record), ensure_ascii=False, default=str) + "\n"


def file_name(spec: TaskSpec) -> str:
    """The name of a task's files.

    Example:
      >>> file_name(parse_task("ifeval:my/rows.jsonl"))
      'ifeval_rows.jsonl'
    """
    stem = "_".join(part for part in (spec.name, Path(spec.path).name if spec.path else "") if part)
    return "".join(character if character.isalnum() or character in "._-" else "_" for character in stem)


def run_task(spec: TaskSpec, lm: Any, settings: EvaluateConfig, folder: Path, provenance: dict[str, Any]) -> TaskRecord:
    """Runs a task of the harness on a model.

    Args:
      spec: the task.
      lm: from `raft_jax.evaluate.harness.make_lm`.
      settings: the evaluation's.
      folder: where the task files of rows of one's own are written.
      provenance: from `made_with`.

    Raises:
      InputError: the harness does not know the task, or cannot get its data.
    """
    from datasets import disable_progress_bars  # pyright: ignore[reportMissingImports]
    from lm_eval import evaluator  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    include, name = None, spec.name or str(locate(spec.path))
    if spec.name and spec.path:
        include, name = folder, write_task_files(spec.name, locate(spec.path), folder)
    try:
        manager = TaskManager(include_path=include, include_defaults=not spec.path)
        loaded: Any = manager.load([name])
    except Exception as error:  # of a file, of the network, of the data set: there is no common type
        raise InputError(f"evaluate.tasks: {spec.text}: {one_line(f'{type(error).__name__}: {error}', 300)}") from error
    simple_evaluate: Any = evaluator.simple_evaluate  # its declared type is that of another function
    results = simple_evaluate(
        lm,
        tasks=[*loaded["groups"].values()][:1] or [*loaded["tasks"].values()],
        limit=settings.limit,
        num_fewshot=settings.num_fewshot,
        gen_kwargs={"max_gen_toks": length} if (length := settings.task_new_tokens) else None,
        apply_chat_template=settings.chat_template,
        task_manager=manager,
        torch_random_seed=None,
        bootstrap_iters=1000,
    )
    return _record(results, list(loaded["groups"]), provenance)


def _record(results: dict[str, Any], groups: Sequence[str], provenance: dict[str, Any]) -> TaskRecord:
    tasks = {
        name: _scores(metrics, results["n-samples"][name]["effective"])
        for name, metrics in results["results"].items()
        if name in results["n-samples"]
    }
    total = sum(results["n-samples"][name]["effective"] for name in tasks)
    if groups:
        whole = _scores(results["groups"].get(groups[0], {}), total)
    else:
        whole = next(iter(tasks.values())) if len(tasks) == 1 else {}
    samples = [_sample(name, sample) for name, of_task in results["samples"].items() for sample in of_task]
    return TaskRecord(provenance, whole, tasks if len(tasks) > 1 else {}, samples)


def _scores(metrics: dict[str, Any], count: int) -> dict[str, TaskScore]:
    """The metrics of a task; their names lose the harness's filter where it is "none"."""
    scores = {}
    for key, value in metrics.items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = metrics.get(f"{metric}_stderr,{filtered}")
        stderr = float(error) if isinstance(error, int | float) else None
        scores[metric if filtered == "none" else key] = TaskScore(float(value), stderr, count)
    return scores


def _sample(task: str, sample: dict[str, Any]) -> dict[str, Any]:
    """A question's metrics, for comparisons on the same questions, and its answer if that is a text."""
    metrics = {name: sample[name] for name in sample.get("metrics", ()) if name in sample}
    text = sample["filtered_resps"][0] if sample.get("filtered_resps") else None
    return {"task": task, "id": sample["doc_id"], **metrics} | ({"answer": text} if isinstance(text, str) else {})


def write_task_files(name: str, path: Path, folder: Path) -> str:
    """Writes the task files for rows of one's own, from the templates, and returns the name of the task or group."""
    import lm_eval.tasks  # pyright: ignore[reportMissingImports]

    folder.mkdir(parents=True, exist_ok=True)
    harness = Path(lm_eval.tasks.__file__).parent
    template = read_text(TEMPLATES / f"{name}.yaml").replace("HARNESS", str(harness))
    if name == "ifeval":
        (folder / "ifeval.yaml").write_text(template.replace("TEST", str(path.resolve())), "utf-8")
        return "ifeval_local"
    by_subject: dict[str, dict[str, list[dict]]] = {}
    for row in read_task_rows(name, path):
        splits = by_subject.setdefault(row["subject"], {"test": [], "dev": []})
        splits.setdefault(row.get("split", "test"), []).append({key: row[key] for key in LOCAL[name]})
    subjects = [subject for subject, splits in by_subject.items() if splits["test"]]
    for subject in subjects:
        files, splits = {}, by_subject[subject]
        for split in ("test", "dev"):
            files[split] = folder / f"{subject}.{split}.jsonl"
            # An empty file has no columns that datasets could read, so a subject without examples has its questions.
            rows = splits[split] or splits["test"]
            files[split].write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
        text = template.replace("FEWSHOT", str(min(FEWSHOT, len(splits["dev"])))).replace("SUBJECT", subject)
        text = text.replace("WORDS", subject.replace("_", " "))
        for split, file in files.items():
            text = text.replace(split.upper(), str(file.resolve()))
        (folder / f"mmlu_{subject}.yaml").write_text(text, "utf-8")
    group = read_text(TEMPLATES / "mmlu_group.yaml")
    names = ", ".join(f"mmlu_local_{subject}" for subject in subjects)
    (folder / "mmlu_group.yaml").write_text(group.replace("SUBJECTS", names), "utf-8")
    return "mmlu_local"
