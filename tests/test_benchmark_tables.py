"""The tables of docs/performance.md are those of benchmarks/results/, and the files there have what they should."""

from __future__ import annotations

import doctest
import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KEYS = {"benchmark", "recorded", "commands", "machine", "date", "versions", "notes", "columns", "rows"}
RECORDED = sorted((ROOT / "benchmarks/results").glob("recorded-*.json"))

spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks/tables.py")
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)


def test_the_page_is_up_to_date():
    page = tables.PAGE.read_text("utf-8")
    assert page == tables.filled(page), "run: python benchmarks/tables.py"


def test_every_recorded_result_is_on_the_page():
    names = re.findall(r"<!-- table: ([\w.-]+) -->", tables.PAGE.read_text("utf-8"))
    assert sorted(names) == sorted(path.stem for path in RECORDED)


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_a_recorded_result_is_complete(path):
    result = json.loads(path.read_text("utf-8"))
    assert result.keys() == KEYS
    assert result["recorded"] and result["commands"] and result["machine"] and result["rows"]
    assert result["date"] is None or re.fullmatch(r"\d{4}-\d\d-\d\d", result["date"])
    name = result["benchmark"]
    assert (ROOT / name).is_file() or (ROOT / f"benchmarks/{name}.py").is_file()
    keys = [column["key"] for column in result["columns"]]
    assert all(list(row) == keys for row in result["rows"])
    for row in result["rows"]:
        for value in row.values():
            if isinstance(value, dict):
                assert value["low"] <= value["median"] <= value["high"]


def test_the_examples_run():
    assert doctest.testmod(tables).failed == 0
