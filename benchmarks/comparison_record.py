"""Numbers of a comparison that `raft-jax compare` has made, without any text of its data, for keeping.

    python benchmarks/comparison_record.py RUN_DIR --out docs/results/NAME.json

Per cell and method: means and standard errors of every measure, the scores of every question by its id, seconds of
training and the machine. The base model stands beside them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

PER_QUESTION = ("gold_logprob", "token_f1", "similarity", "cut", "correct", "accepted", "divergence")
SETTINGS = ("model", "data", "refine", "train", "evaluate", "compare")


def numbers(value):
    """A record without its texts and without what is not known."""
    if isinstance(value, dict):
        return {key: kept for key, entry in value.items() if (kept := numbers(entry)) not in (None, {}, [])}
    if isinstance(value, list):
        return [numbers(entry) for entry in value]
    return round(value, 6) if isinstance(value, float) else value if isinstance(value, int) else None


def model_record(model: dict) -> dict:
    questions = {
        kind: {row["id"]: {key: row[key] for key in PER_QUESTION if row.get(key) is not None} for row in model[rows]}
        for kind, rows in (("domain", "answers"), ("general", "general_answers"))
    }
    measures = {key: model[key] for key in ("domain", "general", "weight_distance", "tasks") if key in model}
    return {"measures": numbers(measures), "questions": numbers(questions)}


def cell_record(folder: Path) -> dict:
    models = json.loads((folder / "evaluation.json").read_text("utf-8"))["models"]
    timings = [json.loads(line) for line in (folder / "timings.jsonl").read_text("utf-8").splitlines()]
    seconds = {f"{line['stage']} {line['method'] or ''}".strip(): line["seconds"] for line in timings}
    records = {name: model_record(model) for name, model in models.items()}
    return {"seconds": seconds, "machine": timings[-1].get("machine"), "models": records}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    import yaml

    config = yaml.safe_load((options.run_dir / "config.yaml").read_text("utf-8"))
    settings = {key: config[key] for key in SETTINGS if key in config}
    settings["data"]["path"] = Path(settings["data"]["path"]).name
    cells = json.loads((options.run_dir / "compare/cells.json").read_text("utf-8"))
    record = {"settings": settings, "over": cells["over"], "base": cell_record(options.run_dir), "cells": {}}
    for name, values in cells["cells"].items():
        folder = options.run_dir / "compare" / name
        if (folder / "evaluation.json").exists():
            record["cells"][name] = {"values": values, **cell_record(folder)}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n", "utf-8")
    print(f"{options.out}: {len(record['cells'])} cells, {options.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
