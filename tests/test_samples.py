"""The data that ships with the package: enough of it, in one style, with held-out questions that are new."""

import json
import re
from importlib import resources
from itertools import combinations

import pytest

SAMPLES = resources.files("raft_jax") / "data" / "samples"
CHECK_KINDS = {"contains_any": list, "number": (int, float), "regex": str, "exact": str}


def read(name):
    return [json.loads(line) for line in (SAMPLES / name).read_text(encoding="utf-8").splitlines()]


COLREGS = read("colregs.jsonl")
GENERAL = read("general.jsonl")
CHECKED = [row for row in GENERAL if row["check"] is not None]


def words(text):
    return frozenset(re.findall(r"[a-z0-9]+(?:\.[0-9]+)?", text.lower()))


def jaccard(one, other):
    return len(one & other) / len(one | other)


def passes(check, text):
    """A lenient reading of a check: what passes a stricter one passes this."""
    kind, value = check["kind"], check["value"]
    if kind == "contains_any":
        return any(item.lower() in text.lower() for item in value)
    if kind == "number":
        return any(float(found) == value for found in re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", "")))
    if kind == "regex":
        return re.search(value, text, re.IGNORECASE) is not None
    return text.strip(" .\"'\n").lower() == value.lower()


def test_there_are_enough_rows():
    splits = [row["split"] for row in COLREGS]
    assert splits.count("train") >= 128 and splits.count("test") >= 40
    assert splits.count("train") + splits.count("test") == len(COLREGS)
    assert len(GENERAL) >= 48 and len(CHECKED) >= 24


@pytest.mark.parametrize(
    "rows, fields",
    [
        (COLREGS, "id question answer split"),
        (GENERAL, "id category prompt check"),
    ],
)
def test_rows_have_the_fields_and_unique_ids(rows, fields):
    assert all(list(row) == fields.split() for row in rows)
    assert len({row["id"] for row in rows}) == len(rows)
    texts = [row[key] for row in rows for key in ("question", "answer", "prompt") if key in row]
    assert all(text and text == " ".join(text.split()) for text in texts)


def test_lengths():
    for row in COLREGS:
        assert 25 <= len(row["answer"].split()) <= 120, row["id"]
        assert 4 <= len(row["question"].split()) <= 30, row["id"]


def test_the_first_rows_hold_both_splits():
    # A limit takes rows from the top, so the file is in mixed order.
    splits = {row["split"] for row in COLREGS[:20]}
    assert splits == {"train", "test"}


def test_house_style_is_verdict_then_rule():
    for row in COLREGS:
        assert re.match(r".{2,70}?\. (Rules?|Annex) [\dIVX]", row["answer"]), row["id"]


@pytest.mark.parametrize("field", ["question", "answer"])
def test_no_two_rows_are_near_duplicates(field):
    sets = [(row["id"], words(row[field])) for row in COLREGS]
    for (one_id, one), (other_id, other) in combinations(sets, 2):
        assert jaccard(one, other) < 0.5, (one_id, other_id)


def test_general_prompts_differ_and_stay_on_land():
    prompts = [words(row["prompt"]) for row in GENERAL]
    assert all(jaccard(one, other) < 0.6 for one, other in combinations(prompts, 2))
    nautical = {
        "ship",
        "ships",
        "sea",
        "vessel",
        "vessels",
        "boat",
        "boats",
        "ocean",
        "sail",
        "sailing",
        "port",
        "harbour",
        "collision",
        "captain",
        "navigation",
    }
    assert not any(prompt & nautical for prompt in prompts)
    assert len({row["category"] for row in GENERAL}) >= 8


@pytest.mark.parametrize("row", CHECKED, ids=lambda row: row["id"])
def test_checks_are_well_formed_and_fail_on_the_prompt(row):
    check = row["check"]
    assert set(check) == {"kind", "value"} and isinstance(check["value"], CHECK_KINDS[check["kind"]])
    if check["kind"] == "contains_any":
        assert check["value"] and all(isinstance(item, str) and item.strip() for item in check["value"])
    if check["kind"] == "regex":
        re.compile(check["value"])
    assert not passes(check, row["prompt"])
    assert not passes(check, "")


def test_readme_counts_are_the_files_counts():
    text = (SAMPLES / "README.md").read_text(encoding="utf-8")
    splits = [row["split"] for row in COLREGS]
    assert f"{splits.count('train')} training and {splits.count('test')} held-out" in text
    assert f"{len(GENERAL)} prompts, {len(CHECKED)} with a check" in text
