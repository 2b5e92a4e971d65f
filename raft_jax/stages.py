"""Which settings each result of a run depends on, and what of a run folder a changed config leaves standing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from raft_jax.errors import InputError
from raft_jax.sources import COMMIT

Settings = Mapping[str, Any]  # dotted keys of a config, and the content of what it names, as in "data.path: content"

# What each stage's result depends on: a key, or a group of keys. What is in no row changes no result beyond rounding:
# where arrays lie, how much is computed at once.
MODEL = ("model.source", "model.dtype", "model.thinking")
ENCODER = ("encoder.source", "encoder.prefix")
REFINE = (*MODEL, *ENCODER, "data", "seed", "refine")
TRAIN = (*MODEL, "data", "seed", "train")
EXPORT = (*TRAIN, "export.dtype")
EVALUATE = (*MODEL, *ENCODER, "data", "seed", "evaluate")
HELD_OUT = ("data.max_test", "data.test_split")  # of data.*, what only the evaluation depends on
WITHOUT_EFFECT = (
    "refine.batch_size",
    "train.num_micro_batches",
    "train.loss_chunk_size",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.keep_finished",
    "evaluate.batch_size",
)
# Training goes on where these are raised, and the export is made anew; with any other key it would begin again.
EXTENDS = ("train.epochs", "train.max_steps")
REDONE = (*EXTENDS, "export.dtype")
CONTENT = ": content"  # after a key: not its value has changed, but what is there


def settings_of(stage: str, settings: Settings, refined: bool) -> dict[str, Any]:
    """Those of all settings that a stage's result depends on.

    Args:
      stage: its name and a method's where it has one, as in "refine", "train sft" or "evaluate base".
      settings: of the whole run.
      refined: whether the method trains on refined answers.
    """
    kind, _, name = stage.partition(" ")
    keys = {"refine": REFINE, "train": TRAIN, "export": EXPORT, "evaluate": EVALUATE}[kind]
    if kind == "evaluate" and name != "base":
        keys = (*keys, *EXPORT)
    if refined:
        keys = (*keys, *REFINE)
    ignored = WITHOUT_EFFECT if kind == "evaluate" else (*WITHOUT_EFFECT, *HELD_OUT)
    return {
        name: value
        for name, value in settings.items()
        if (key := name.removesuffix(CONTENT)) not in ignored
        and any(key == part or key.startswith(part + ".") for part in keys)
    }


def changes(before: Settings, now: Settings) -> dict[str, str]:
    """What differs, as text by key. A key that one side does not know says nothing: it is of another version.

    Where the content of what a key names is the same, its place may be another.
    """
    both = before.keys() & now.keys()
    return {
        key: _change(key, before[key], now[key], now)
        for key in sorted(both)
        if _content(before[key]) != _content(now[key])
        and not (key + CONTENT in both and _content(before[key + CONTENT]) == _content(now[key + CONTENT]))
    }


def _content(value: Any) -> Any:
    """A value, or the fingerprints of a model's files without its commit, which may move without them."""
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
    """What of a run folder stands with the settings given.

    Attributes:
      stale: results that are made again, each with what has changed for it.
      kept: results that stand.
    """

    stale: dict[str, dict[str, str]] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """What a run says of it before it begins; nothing where nothing has changed."""
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
    """Compares what the results of a folder were made with and what they would be made with now.

    Args:
      run_dir: its name, for the error.
      records: of each result that is there, the settings that it was made with.
      settings: of each of them, the settings now.

    Raises:
      InputError: a changed setting asks for refinement or training anew, which would throw away what is there.
    """
    result, refused = Plan(), {}
    for stage, before in records.items():
        changed = changes(before, settings[stage])
        kind = stage.partition(" ")[0]
        # Rows that nothing is trained on yet can be refined again; else the training's settings have changed, too.
        allowed = {"train": EXTENDS, "export": REDONE}.get(kind)
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
