"""How natural gold, rewritten and fused answers are to the student: the numbers, their record, table and report."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")  # before transformers is imported

import tiny  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from raft_jax.cli import main  # noqa: E402
from raft_jax.data.examples import Example  # noqa: E402
from raft_jax.data.prompts import answered, question_of  # noqa: E402
from raft_jax.data.refined import RefinedRow, TextQuality, load_refined, publish  # noqa: E402
from raft_jax.outcome import lines, quality_counts  # noqa: E402
from raft_jax.refine.ledger import Ledger  # noqa: E402
from raft_jax.refine.quality import with_quality  # noqa: E402
from raft_jax.report.refinement import counts  # noqa: E402

GOLD = "Rule 13 binds every vessel, says the IMO."


class FakeLikelihood:
    name = identity = "log-likelihood"

    def __init__(self):
        self.asked = []

    def score(self, items, candidates):
        self.asked += [(item.id, text) for item, text in zip(items, candidates, strict=True)]
        return [-len(text) / 7 for text in candidates]


def refined(id: str, status: str = "ok", rewrite: str = "", fused: str = "", **changes) -> RefinedRow:
    row = RefinedRow.unrefined(Example(id, "Who is bound?", GOLD, "Rule 13."), "Because.")
    row = replace(row, rewrite=rewrite, rewrite_status=status, **changes)
    return replace(row, answer=fused, chosen="fusion", chosen_round=1) if fused else row


ROWS = [
    refined("plain", "empty"),
    refined("facts", "facts", "No vessel."),
    refined("kept", "ok", "Every vessel is bound by rule 13."),
    refined("fused", "ok", "Rule 13 is binding.", "Every vessel, says the IMO, is bound by rule 13."),
    refined("short", "ok", "The IMO binds vessels.", "Rule 13 binds all."),
]


def test_each_text_that_can_be_trained_on_is_compared_with_the_gold_answer(tmp_path):
    likelihood = FakeLikelihood()
    rows = with_quality(ROWS, likelihood, Ledger.open(tmp_path / "ledger.jsonl"))
    assert [list(row.quality) for row in rows] == [
        ["gold"],
        ["gold"],
        ["gold", "rewrite"],
        ["gold", "rewrite", "fused"],
        ["gold", "rewrite", "fused"],
    ]
    assert [replace(row, quality=None) for row in rows] == ROWS
    gold = TextQuality(logprob=round(-41 / 7, 6), length=1.0, coverage=1.0)
    assert len(GOLD) == 41 and all(row.quality["gold"] == gold for row in rows)
    # Rule 13 has the number; the name IMO is lost.
    assert rows[2].quality["rewrite"] == TextQuality(logprob=round(-33 / 7, 6), length=round(33 / 41, 6), coverage=0.5)
    assert rows[3].quality["fused"] == TextQuality(logprob=round(-48 / 7, 6), length=round(48 / 41, 6), coverage=1.0)
    assert len(likelihood.asked) == 5 + 3 + 2


def test_it_goes_on_from_any_line_of_the_ledger(tmp_path, monkeypatch):
    monkeypatch.setattr("raft_jax.refine.scoring.JUDGED_AT_ONCE", 2)
    whole = tmp_path / "whole.jsonl"
    expected = with_quality(ROWS, FakeLikelihood(), Ledger.open(whole))
    again = FakeLikelihood()
    assert with_quality(ROWS, again, Ledger.open(whole)) == expected and not again.asked
    written = whole.read_text().splitlines(keepends=True)
    for kept in range(len(written)):
        path = tmp_path / f"{kept}.jsonl"
        path.write_text("".join(written[:kept]))
        assert with_quality(ROWS, FakeLikelihood(), Ledger.open(path)) == expected
        assert path.read_text() == whole.read_text()


def quality(logprob: float | None, length: float = 1.0, coverage: float | None = None) -> TextQuality:
    return TextQuality(logprob=logprob, length=length, coverage=coverage)


def test_the_table_compares_on_the_same_rows_and_counts_what_defeats_the_purpose():
    ln = math.log
    rows = [
        replace(ROWS[0], quality={"gold": quality(-ln(100))}),
        replace(
            ROWS[3], quality={"gold": quality(-ln(8)), "rewrite": quality(-ln(2)), "fused": quality(-ln(4), 1.5, 1)}
        ),
        replace(ROWS[4], quality={"gold": quality(-ln(2)), "fused": quality(-ln(9), 0.5, 0.5)}),
        replace(ROWS[2], quality={"gold": quality(None), "rewrite": quality(-1.0)}),
        ROWS[1],  # of an older version
    ]
    rewritings, fused = quality_counts(rows)
    assert (rewritings.rows, rewritings.less_likely, rewritings.coverage) == (1, 0, None)
    assert (rewritings.perplexity, rewritings.gold_perplexity) == (pytest.approx(2), pytest.approx(8))
    assert (fused.rows, fused.less_likely, fused.length, fused.coverage) == (2, 1, 1.0, 0.75)
    assert (fused.perplexity, fused.gold_perplexity) == (pytest.approx(6), pytest.approx(4))
    said = "\n".join(lines(rows, 0.8, []))
    assert "1 of 2 fused answers are less natural to the student than the gold answer" in said
    row = next(line for line in said.splitlines() if line.startswith("  fused answers"))
    assert row.split() == ["fused", "answers", "2", "6", "4", "1.00", "75%", "1"]
    assert dict(counts(rows, 0.8))["fused answers less natural than gold"] == "1"
    assert "less natural" not in "\n".join(lines(rows[:2], 0.8, []))
    assert list(quality_counts(ROWS)) == []


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    path = tiny.write_run(folder)
    assert main(["refine", str(path)]) == 0
    return folder


def test_the_numbers_are_those_of_transformers(run):
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float64)
    tokenizer = tiny.make_tokenizer()
    rows = load_refined(run / "run/refined")
    assert any("fused" in row.quality for row in rows) and any("rewrite" in row.quality for row in rows)
    for row in rows:
        for name, found in row.quality.items():
            text = {"gold": row.gold, "rewrite": row.rewrite, "fused": row.answer}[name]
            prompt = tokenizer.chat_prompt(question_of(row))
            answer = tokenizer.chat_answer(answered(question_of(row), text))
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            logprobs = torch.log_softmax(logits, -1)[torch.arange(len(answer)), torch.tensor(answer)]
            assert found.logprob == pytest.approx(logprobs.mean().item(), abs=2e-5)


def test_report_and_rows_of_an_older_version(run, capsys):
    assert main(["report", str(run / "config.yaml")]) == 0
    page = (run / "run/report.html").read_text("utf-8")
    assert "How natural the texts are to the student" in page and "perplexity " in page and "length ×" in page
    path = run / "run/refined/refined.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    for row in rows:
        del row["quality"]
    tiny.write_jsonl(path, rows)
    assert main(["report", str(run / "config.yaml")]) == 0
    assert "How natural" not in (run / "run/report.html").read_text("utf-8")


def test_quality_comes_back_from_disk(tmp_path):
    rows = with_quality(ROWS, FakeLikelihood(), Ledger.open(tmp_path / "ledger.jsonl"))
    publish(rows, tmp_path)
    assert load_refined(tmp_path) == rows
