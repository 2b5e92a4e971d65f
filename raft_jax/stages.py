"""The settings that each result of a run depends on, and the results that remain valid after a change of the config."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from raft_jax.errors import InputError
from raft_jax.sources import COMMIT

Settings = Mapping[str, Any]  # dotted keys of a config, and fingerprints of files it names, as "data.path: content"

# The keys, or groups of keys, that the result of each stage depends on. Keys in no row, such as mesh.* or model.remat,
# change results by rounding only.
MODEL = ("model.source", "model.dtype", "model.thinking")
ENCODER = ("encoder.source", "encoder.prefix")
REFINE = (*MODEL, *ENCODER, "data", "seed", "refine", "endpoints")
TRAIN = (*MODEL, "data", "seed", "train")
EXPORT = (*TRAIN, "export.dtype")
OF_METHOD = {"fapm": ("fapm",)}  # further keys of a method's export
EVALUATE = (*MODEL, *ENCODER, "data", "seed", "evaluate")
# The keys of data.* that training does not depend on.
HELD_OUT = ("data.max_test", "data.test_split", "data.dev_split", "data.max_dev")
OF_BEST = ("train.eval_every", "data.dev_split", "data.max_dev")  # what training depends on with train.keep_best only
WITHOUT_EFFECT = (
    "refine.batch_size",
    "train.num_micro_batches",
    "train.loss_chunk_size",
    "train.checkpoint_every",
    "train.checkpoint_minutes",
    "train.eval_every",
    "train.keep_checkpoints",
    "train.keep_finished",
    "train.profile_steps",
    "train.trackers",
    "evaluate.batch_size",
    # Verdicts and tasks are recorded by what they depend on, and added to the scores at every start.
    "evaluate.judges",
    "evaluate.accept",
    "evaluate.tasks",
    "evaluate.limit",
    "evaluate.num_fewshot",
    "evaluate.task_new_tokens",
    "evaluate.chat_template",
)
# If these are raised, training continues and the export is made again, unless the learning rate depends on the number
# of steps. If any other key has changed, training would have to start again.
EXTENDS = ("train.epochs", "train.max_steps")
REDONE = (*EXTENDS, "export.dtype", "fapm.sparsity")
# Keys that came later, with the value that they had before: records of their group that lack them were made with it.
BEFORE = {
    "data.drop_duplicates": "none",
    "data.several_answers": "first",
    "refine.rewriter": "student",
    "refine.fuser": "student",
    "refine.prompts": None,
    "evaluate.label": None,
    "train.kl": "forward",
    "train.teacher_sees_answer": None,
    "train.student_init": None,
    "train.seed": None,
    "train.schedule": "constant",
    "train.final_learning_rate": 0.0,
    "train.stop_when_cut_share": None,
    "train.keep_best": False,
}
CONTENT = ": content"  # suffix of a key: the fingerprint of what the key's value names


def settings_of(stage: str, settings: Settings, refined: bool) -> dict[str, Any]:
    """The settings that a stage's result depends on.

    Args:
      stage: its name, with the method's name if it has one: "refine", "train sft" or "evaluate base".
      settings: all settings of the run.
      refined: whether the method trains on refined answers.
    """
    kind, _, name = stage.partition(" ")
    keys = {"refine": REFINE, "train": TRAIN, "export": EXPORT, "evaluate": EVALUATE}[kind]
    if kind == "evaluate" and name != "base":
        keys = (*keys, *EXPORT)
    if kind in ("export", "evaluate"):
        keys = (*keys, *OF_METHOD.get(name, ()))
    if refined:
        keys = (*keys, *REFINE)
    ignored = WITHOUT_EFFECT if kind == "evaluate" else (*WITHOUT_EFFECT, *HELD_OUT)
    drops = settings.get("data.drop_duplicates", "none")
    if drops == "near":  # the encoder decides which rows there are
        keys = (*keys, *ENCODER)
    else:
        ignored = (*ignored, "data.duplicate_similarity")
    if drops != "none":  # training rows with a held-out question are left out
        ignored = tuple(key for key in ignored if key != "data.test_split")
    if settings.get("train.keep_best"):
        ignored = tuple(key for key in ignored if key not in OF_BEST)
    return {
        name: value
        for name, value in settings.items()
        if (key := name.removesuffix(CONTENT)) not in ignored
        and any(key == part or key.startswith(part + ".") for part in keys)
    }


def changes(before: Settings, now: Settings) -> dict[str, str]:
    """The differences, as text by key. Keys that only one side has are ignored: another version wrote that side.

    A changed path is not a difference if the content at it is the same.
    """
    sections = {key.partition(".")[0] for key in before}
    before = {key: value for key, value in BEFORE.items() if key.partition(".")[0] in sections} | dict(before)
    both = before.keys() & now.keys()
    return {
        key: _change(key, before[key], now[key], now)
        for key in sorted(both)
        if _content(before[key]) != _content(now[key])
        and not (key + CONTENT in both and _content(before[key + CONTENT]) == _content(now[key + CONTENT]))
    }


def _content(value: Any) -> Any:
    """A value; of a model's fingerprints without the commit, which can change while the files stay the same."""
    return {name: digest for name, digest in value.items() if name != COMMIT} if isinstance(value, dict) else value


def _change(key: str, before: Any, now: Any, settings: Settings) -> str:
    if not key.endswith(CONTENT):
        return f"{key}: {before} → {now}"
    key = key.removesuffix(CONTENT)
    if isinstance(before, dict) and isinstance(now, dict):
        names = sorted(name for name in (before.keys() | now.keys()) - {COMMIT} if before.get(name) != now.get(name))
        moved = ""
        if COMMIT in before and before[COMMIT] != now.get(COMMIT):
            name = settings[key].partition("@")[0]
            moved = f" (commit {now.get(COMMIT, 'unknown')}; the run began with {name}@{before[COMMIT]})"
        return f"{key}: in {settings[key]}{moved}, {', '.join(names[:4])}{', …' if len(names) > 4 else ''} changed"
    return f"{key}: {settings[key]} has changed since"


@dataclass
class Plan:
    """The results of a run folder that are kept, and those that are made again, with the given settings.

    Attributes:
      stale: results that are made again, each with its changed settings.
      kept: results that are still valid.
    """

    stale: dict[str, dict[str, str]] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The lines that a run prints before it starts; none if nothing has changed."""
        lines = []
        if "refine" in self.stale:
            why = "; ".join(self.stale["refine"].values())
            lines.append(f"refining again, but for what the ledger has of it ({why})")
        for words, kind in (("training and exporting again", "export"), ("evaluating again", "evaluate")):
            stages = [stage for stage in self.stale if stage.startswith(kind + " ")]
            why = sorted({text for stage in stages for text in self.stale[stage].values()})
            lines += [f"{words}: {_names(stages)} ({'; '.join(why)})"] if stages else []
        kept = [
            f"{len(stages)} {words} ({_names(stages)})"
            for words, kind in (
                ("trained model(s)", "export"),
                ("evaluation(s)", "evaluate"),
            )
            if (stages := [stage for stage in self.kept if stage.startswith(kind + " ")])
        ]
        return [f"kept: {', '.join(kept)}", *lines] if lines and kept else lines


def _names(stages: Iterable[str]) -> str:
    return ", ".join(stage.partition(" ")[2] for stage in stages)


def plan(run_dir: str, records: Mapping[str, Settings], settings: Mapping[str, Settings]) -> Plan:
    """Compares the settings that the results of a folder were made with to the current settings.

    Args:
      run_dir: name of the folder, for the error message.
      records: the settings that each existing result was made with.
      settings: the current settings for each of these results.

    Raises:
      InputError: a changed setting would require a new refinement or training, which would discard existing results.
    """
    result, refused = Plan(), {}
    for stage, before in records.items():
        changed = changes(before, settings[stage])
        kind = stage.partition(" ")[0]
        # Rows can be refined again if nothing was trained on them; else the training's settings have changed as well.
        allowed = {"train": EXTENDS, "export": REDONE}.get(kind)
        if allowed and before.get("train.schedule", "constant") != "constant":
            allowed = set(allowed) - set(EXTENDS)  # with another number of steps every rate would have been another
        if allowed is not None:
            refused |= {key: text for key, text in changed.items() if key not in allowed}
        if changed and kind in ("refine", "export", "evaluate"):
            result.stale[stage] = changed
        elif not changed and kind != "train":
            result.kept.append(stage)
    if refused:
        raise InputError(
            f"{run_dir}: was made with another config ({'; '.join(refused[key] for key in sorted(refused))}); "
            "change that back, or set run_dir to a new folder"
        )
    return result
