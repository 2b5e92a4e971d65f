"""The fused data set on disk: JSONL for people, ArrayRecord for tfds, and a manifest with the hash of each file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Literal

from raft_jax.data.examples import Example
from raft_jax.errors import InputError, require_train
from raft_jax.files import parse_record, sync

Status = Literal[
    "ok", "empty", "truncated", "refusal", "leak", "copy", "repetition", "facts", "unrenderable", "unknown", "failed"
]
# The wording in console and report.
STATUSES: dict[Status, str] = {
    "ok": "usable",
    "empty": "empty",
    "truncated": "cut at the limit of length",
    "refusal": "refusal",
    "leak": "repeats our instructions",
    "copy": "the gold answer word for word",
    "repetition": "repeats itself",
    "facts": "differs in facts or words",
    "unrenderable": "not for the chat template",
    "unknown": "unknown to the sentence encoder",
    "failed": "no reply from the model",
}

_MANIFEST = "manifest.json"
_ROWS = "refined.jsonl"
_TEXTS = ("id", "question", "context", "gold", "rewrite", "rewrite_status", "rewrite_note")
_TEXTS += ("answer", "chosen", "reason")
_NESTED = ("turns", "rounds", "gold_scores", "quality")
_FORMAT = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
    """One round of answer fusion: a candidate, its status with a note if it is not "ok", and the judges' scores.

    `reasons` has what a judge says to its score, or why it gave none; programs say nothing.
    """

    round: int
    candidate: str
    status: Status
    note: str = ""
    scores: dict[str, float | None]
    mean: float | None
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextQuality:
    """How a text compares with the gold answer.

    Attributes:
      logprob: the student's mean log-likelihood per token before training, given the question, in nats.
      length: its characters, as a multiple of the gold answer's.
      coverage: share of the gold answer's numbers and names that it has; None if the gold answer has none.
    """

    logprob: float | None
    length: float
    coverage: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefinedRow:
    """A question with its gold answer, the target to train on, and the full history of how the target was chosen.

    Attributes:
      id: the example's id.
      question: x, as given.
      context: the text that the question refers to; "" if there is none.
      turns: [role, content] of the turns before the question.
      gold: y, the answer as given.
      rewrite: the text of the self-conditioned rewriting (Eq. 1), "" if there is none.
      rewrite_status: "ok" if the rewriting is usable, else why not: "truncated" (cut at the length limit), "leak" (it
        repeats its instructions), "copy" (the gold answer word for word), "repetition" (it repeats itself), "facts" (it
        has lost, added or reversed something), "unrenderable" (the chat template refuses or changes it), "unknown"
        (most of it is unknown to the sentence encoder), "failed" (the model did not reply), "empty", "refusal".
      rewrite_note: the problem in words; "" if there is none.
      similarity: cosine of the gold answer and the rewriting (Eq. 2) for the statuses "ok", "facts" and "copy"; else
        None.
      accepted: whether the rewriting passed the filter (Eq. 3).
      rounds: the rounds of fusion in their order (Eq. 4); empty if there were none.
      gold_scores: the judges' scores of the gold answer itself; empty if nothing was fused.
      gold_mean: the mean of `gold_scores`; None if no judge gave a score.
      answer: ŷ, the target to train on.
      chosen: the source of `answer`.
      chosen_round: the round of the chosen candidate, counted from 1; None if the gold answer was kept.
      reason: the reason for the choice, in a sentence.
      quality: of "gold", and where there are such texts of "rewrite" (a usable one) and "fused" (a chosen one); None in
        rows of older versions.
    """

    id: str
    question: str
    context: str = ""
    turns: list[list[str]] = dataclasses.field(default_factory=list)
    gold: str
    rewrite: str
    rewrite_status: Status
    rewrite_note: str = ""
    similarity: float | None
    accepted: bool
    rounds: list[Round]
    gold_scores: dict[str, float | None] = dataclasses.field(default_factory=dict)
    gold_mean: float | None = None
    answer: str
    chosen: Literal["fusion", "gold"]
    chosen_round: int | None
    reason: str
    quality: dict[str, TextQuality] | None = None

    @classmethod
    def unrefined(cls, example: Example, reason: str) -> RefinedRow:
        """The row of an example that keeps its gold answer as target."""
        return cls(
            id=example.id,
            question=example.question,
            context=example.context,
            turns=list(map(list, example.turns)),
            gold=example.answer,
            rewrite="",
            rewrite_status="empty",
            similarity=None,
            accepted=False,
            rounds=[],
            answer=example.answer,
            chosen="gold",
            chosen_round=None,
            reason=reason,
        )

    def is_of(self, example: Example) -> bool:
        """Whether this row was made from `example`: its id and all of its texts are equal."""
        turns = [tuple(turn) for turn in self.turns]
        ours = (self.id, self.question, self.context, turns, self.gold)
        return ours == (example.id, example.question, example.context, list(example.turns), example.answer)


def publish(rows: list[RefinedRow], folder: str | Path, settings: str = "") -> None:
    """Writes the data set atomically.

    Besides `refined.jsonl`, the folder holds an ArrayRecord data set that
    `tfds.builder_from_directory(folder).as_data_source("train")` reads without TensorFlow. In it, text is bytes, a
    number that is None is NaN, a chosen_round of None is 0, and `turns`, `rounds`, `gold_scores` and
    `quality` are JSON.
    Other files in the folder are not changed. Equal rows and settings give equal bytes.

    A process that is killed at any moment leaves the previous version or the new one, never a mixture: every file is
    first written under a hidden name that contains its hash; renaming the manifest switches to the new version; only
    then are the files renamed to their final names. tfds, which does not read the manifest, switches with
    `dataset_info.json`, because the name of the ArrayRecord file contains its hash, too.

    Args:
      rows: the data set.
      folder: the folder to write to.
      settings: identifies the settings that the rows were made with; `refined_with` returns it.

    Raises:
      ValueError: there are no rows, two rows have the same id, or a number is not finite.
    """
    if len({row.id for row in rows}) != len(rows) or not rows:
        raise ValueError(f"{folder}: a refined data set needs at least one row, and each its own id")
    folder = Path(folder)
    work = folder / ".publishing"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)

    entries = [_entry(row) for row in rows]
    text = "".join(json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n" for entry in entries)
    (work / _ROWS).write_bytes(text.encode())
    records = _write_tfds(entries, work)

    # dataset_info.json comes after the records that it names.
    names = [records, "features.json", "dataset_info.json", _ROWS]
    files = {name: _describe(work / name) for name in names}
    for name in (_ROWS, records):
        files[name]["rows"] = len(rows)
    manifest = {"format": _FORMAT, "rows": len(rows), "settings": settings, "files": files}
    (work / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")

    for path in work.iterdir():
        sync(path)
    for name in names:
        os.replace(work / name, _pending(folder, name, files[name]))
    sync(folder)
    os.replace(work / _MANIFEST, folder / _MANIFEST)
    sync(folder)
    for name in names:
        os.replace(_pending(folder, name, files[name]), folder / name)
        sync(folder)

    shutil.rmtree(work)
    for stale in [*folder.glob(".pending-*"), *folder.glob("refined-train-*.array_record-*")]:
        if stale.name not in files:
            stale.unlink()


def _entry(row: RefinedRow) -> dict:
    """A row as it is written; a round without reasons has no such field."""
    entry = dataclasses.asdict(row)
    for candidate in entry["rounds"]:
        if not candidate["reasons"]:
            del candidate["reasons"]
    return entry


def refined_with(folder: str | Path) -> str:
    """The `settings` that a data set was published with. Call `load_refined` first: it checks the files."""
    return json.loads((Path(folder) / _MANIFEST).read_bytes()).get("settings", "")


def load_refined(folder: str | Path) -> list[RefinedRow]:
    """Reads the data set, after checking each of its files against the manifest.

    Raises:
      InputError: there is no data set, or a file is missing or differs from the published one.
      OSError: a file cannot be read; its content may be intact.
    """
    folder = Path(folder)
    path = folder / _MANIFEST
    if not path.exists():
        raise InputError(f"{folder}: no refined data set here (no {_MANIFEST}); run the refinement first")
    try:
        manifest = json.loads(path.read_bytes())
        version, num_rows, files = manifest["format"], manifest["rows"], manifest["files"]
        if version != _FORMAT:
            raise InputError(
                f"{path}: format {version} is not one this version reads ({_FORMAT}); run the refinement again"
            )
        paths = {name: _checked(folder, name, expected) for name, expected in files.items()}
        lines = paths[_ROWS].read_text(encoding="utf-8").removesuffix("\n").split("\n")
        rows = [parse_record(RefinedRow, line) for line in lines]
    except InputError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: damaged ({error}); run the refinement again to publish it anew") from error
    if len(rows) != num_rows:
        raise InputError(f"{folder / _ROWS}: expected {num_rows} rows, found {len(rows)}; run the refinement again")
    return rows


def _write_tfds(entries: list[dict], work: Path) -> str:
    """Writes the ArrayRecord file with tfds' metadata, and returns the file's name."""
    require_train("array_record", "tensorflow_datasets")
    import numpy as np
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    text, scalar = tfds.features.Text, tfds.features.Scalar
    numbers = {"similarity": np.float32, "accepted": np.bool_, "gold_mean": np.float32, "chosen_round": np.int32}
    features = tfds.features.FeaturesDict(
        {
            **{name: text() for name in _TEXTS},
            **{name: scalar(dtype) for name, dtype in numbers.items()},
            **{name: text(doc="JSON, as in refined.jsonl") for name in _NESTED},
        }
    )
    serializer = ExampleSerializer(features.get_serialized_info())  # pyright: ignore[reportArgumentType]
    # One record per group, so that any row can be read without its neighbours.
    writer = ArrayRecordWriter(str(work / "records"), "group_size:1")
    num_bytes = 0
    for entry in entries:
        floats = {name: float("nan") if entry[name] is None else entry[name] for name in ("similarity", "gold_mean")}
        nested = {name: json.dumps(entry[name], ensure_ascii=False, allow_nan=False) for name in _NESTED}
        chosen_round = entry["chosen_round"] or 0
        example = features.encode_example({**entry, **floats, **nested, "chosen_round": chosen_round})
        # Without deterministic=True, the order of the fields differs between processes.
        record = serializer.get_tf_example(example).SerializeToString(deterministic=True)
        num_bytes += len(record)
        writer.write(record)
    writer.close()

    digest = _describe(work / "records")["sha256"][:16]
    template = tfds.core.ShardedFileTemplate(
        data_dir=work,  # pyright: ignore[reportArgumentType]
        dataset_name="refined",
        filetype_suffix="array_record",
        template="{DATASET}-{SPLIT}-" + digest + ".{FILEFORMAT}-{SHARD_X_OF_Y}",
    )
    split = tfds.core.SplitInfo(
        name="train", shard_lengths=[len(entries)], num_bytes=num_bytes, filename_template=template
    )
    name = f"refined-train-{digest}.array_record-00000-of-00001"
    os.replace(work / "records", work / name)
    # check_data would read the data back through TensorFlow.
    tfds.folder_dataset.write_metadata(
        data_dir=work,
        features=features,
        split_infos=[split],
        filename_template=template,
        version="1.0.0",
        check_data=False,
        description="Questions with fused answers, refined by raft_jax.",
    )
    return name


def _describe(path: Path) -> dict:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _pending(folder: Path, name: str, described: dict) -> Path:
    return folder / f".pending-{described['sha256'][:16]}-{name}"


def _checked(folder: Path, name: str, expected: dict) -> Path:
    """The path of a published file: its final name, or its hidden name if `publish` was killed before renaming it."""
    actually = "no such file"
    for path in (folder / name, _pending(folder, name, expected)):
        if path.exists():
            actual = _describe(path)
            if all(actual[key] == expected[key] for key in actual):
                return path
            if path.name == name:
                actually = f"{actual['bytes']} bytes, sha256 {actual['sha256'][:16]}…"
    wanted = f"{expected['bytes']} bytes, sha256 {expected['sha256'][:16]}…"
    raise InputError(f"{folder / name}: expected {wanted}; found {actually}; run the refinement again")
